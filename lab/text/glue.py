"""GLUE for `glue_moefy.py`: a task's data from the hub or from local Parquet files, checked, tokenised, in batches.

Wrong data are never accepted silently. Each kind raises a UserError that names the flag and the fix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import pyarrow
import torch
from datasets import ClassLabel, load_dataset
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding
from transformers.trainer_pt_utils import LengthGroupedSampler

from lab.run.cli import UserError
from lab.run.hub import Checkpoint, from_hub
from lab.text.tasks import Task

HUB = "nyu-mll/glue"


@dataclass
class Source:
    """The model and the data of a run, from the hub, from folders, or generated."""

    name: str  # of the run: rte, toy-rte, or qnli-12k for a part of the data
    kind: str  # hub | folder | toy
    config: object  # the dense model's, of transformers
    load_model: Callable[[], torch.nn.Module]  # the dense classifier, with a head drawn from the global seed
    tokenizer: object
    splits: dict[str, datasets.Dataset]  # train and the task's dev splits, checked


def load_splits(name: str, task: Task, data_dir: str | None) -> dict[str, datasets.Dataset]:
    """The train and dev splits, checked. UserError names the fault."""
    wanted = ("train", *task.dev)
    if data_dir is None:
        where = HUB
        dataset = from_hub("the data set", "--data-dir", where, lambda: load_dataset(where, name))
    else:
        where = f"--data-dir {data_dir}"
        root = Path(data_dir).expanduser()
        folder = root if root.name == name else root / name
        files = {split: sorted(map(str, folder.glob(f"{split}-*.parquet"))) for split in wanted}
        for split, found in files.items():
            if not found:
                raise UserError(f"{where} has no {name}/{split}-*.parquet: lay it out as {HUB} is on the hub")
        try:
            dataset = {split: load_dataset("parquet", data_files=found, split="train") for split, found in files.items()}
        except (OSError, ValueError, DatasetGenerationError) as error:
            raise UserError(f"{where} is not readable Parquet ({str(error).splitlines()[0]}): fetch it again") from None
    for split in wanted:
        check_split(dataset[split], split, task, where)
    return {split: dataset[split] for split in wanted}


def check_split(dataset: datasets.Dataset, split: str, task: Task, where: str) -> None:
    """Checks columns, rows, labels and texts of a split. UserError. Blank texts and absent classes only print a note."""
    needed = (*task.columns, "label")
    for column in needed:
        if column not in dataset.column_names:
            raise UserError(f"{where}: {split} has no column {column!r}; it needs {', '.join(needed)}")
    if not len(dataset):
        raise UserError(f"{where}: {split} has no rows; give at least one example")
    kind = dataset.features["label"]
    labels = dataset["label"][:]
    if None in labels:
        raise UserError(f"{where}: {split} has no label in row {labels.index(None)}; add a label, or remove the row")
    if not (pyarrow.types.is_integer(kind.pa_type) or (task.num_labels == 1 and pyarrow.types.is_floating(kind.pa_type))):
        wanted = "a number" if task.num_labels == 1 else f"an integer, 0 to {task.num_labels - 1}"
        raise UserError(f"{where}: {split} has labels of type {kind.dtype}; make each {wanted}")
    classes = set(range(task.num_labels))
    if task.num_labels > 1 and (wrong := set(labels) - classes):
        raise UserError(f"{where}: {split} has the label {wrong.pop()}; use 0 to {task.num_labels - 1}")
    for column in task.columns:
        texts = dataset[column][:]
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"{where}: {split} has no text in column {column!r}, row {row}; add one, or remove the row")
        if blank := sum(not text.strip() for text in texts):
            print(f"note: {blank} of {len(texts)} texts in {split}, column {column}, are blank; they are kept")
    if task.num_labels > 1 and (absent := classes - set(labels)):
        print(f"note: {split} has no example of class {', '.join(map(str, sorted(absent)))}: its scores say little")


def load_source(name: str, task: Task, model: str, data_dir: str | None) -> Source:
    """A task's data and a model, from the hub or from folders. UserError."""
    checkpoint, kind = Checkpoint("--model", model), "folder" if data_dir else "hub"
    loss = "regression" if task.num_labels == 1 else "single_label_classification"
    config = checkpoint.config(num_labels=task.num_labels, problem_type=loss)
    tokenizer = checkpoint.tokenizer(config)
    splits = load_splits(name, task, data_dir)
    names = label_names(splits[task.dev[0]], task) or ["LABEL_0"]
    config.id2label, config.label2id = dict(enumerate(names)), {label: i for i, label in enumerate(names)}
    options = {"new": r"^classifier\.|\bpooler\b", "dtype": torch.float32}
    load = partial(checkpoint.model, "the model", AutoModelForSequenceClassification, config, **options)
    return Source(name, kind, config, load, tokenizer, splits)


def run_name(name: str, task: Task, rows: int, dev_rows: int) -> str:
    """The task's name, or for other rows than the official sets a name that shows it: qnli-12k, rte-dev100."""
    if rows != task.rows:
        return f"{name}-{rows}" if rows < 1000 else f"{name}-{round(rows / 1000)}k"
    return name if dev_rows == task.dev_rows else f"{name}-dev{dev_rows}"


def label_names(dataset: datasets.Dataset, task: Task) -> list[str] | None:
    """The names of the classes; None for a regression."""
    if task.num_labels == 1:
        return None
    feature = dataset.features["label"]
    named = isinstance(feature, ClassLabel) and len(feature.names) == task.num_labels
    return list(feature.names) if named else [str(i) for i in range(task.num_labels)]


def tokenize(splits: dict[str, datasets.Dataset], task: Task, tokenizer, max_length: int) -> dict[str, datasets.Dataset]:
    """Splits with input_ids, attention_mask, labels, and token_type_ids if the model has them. Not padded: batches are.

    `datasets` caches the result on disk, under a hash of the data, of `encode_rows` and of its arguments.
    """
    encode = partial(encode_rows, columns=task.columns, tokenizer=tokenizer, max_length=max_length)
    encode({column: ["x"] for column in task.columns})  # sets the tokenizer's truncation before it is hashed
    encoded = {}
    for split, dataset in splits.items():
        dataset = dataset.rename_column("label", "labels")
        if task.num_labels == 1:
            dataset = dataset.cast_column("labels", datasets.Value("float32"))
        unused = [column for column in dataset.column_names if column != "labels"]
        encoded[split] = dataset.map(encode, batched=True, remove_columns=unused, desc=f"tokenize {split}")
    return encoded


def encode_rows(rows: dict, columns: tuple[str, ...], tokenizer, max_length: int):
    return tokenizer(*(rows[column] for column in columns), truncation=True, max_length=max_length)


def token_counts(encoded: dict) -> dict[str, list[int]]:
    """The number of tokens of each example, by split."""
    return {split: [len(ids) for ids in dataset["input_ids"]] for split, dataset in encoded.items()}


def make_loaders(
    encoded: dict, lengths: dict[str, list[int]], tokenizer, batch_size: int
) -> tuple[DataLoader, dict[str, DataLoader], torch.Generator]:
    """A train loader with batches of similar length, dev loaders sorted by length, and the generator of the training order.

    Batches are padded one by one. The order of an epoch depends only on the generator's state at its start: seed it there,
    and a resumed run sees the same batches. The loaders have their own generators, so they draw no global random numbers.
    """
    collate = DataCollatorWithPadding(tokenizer)
    order = torch.Generator()

    def loader(dataset, size, **kwargs):
        return DataLoader(dataset, size, collate_fn=collate, generator=torch.Generator(), **kwargs)

    sampler = LengthGroupedSampler(batch_size, lengths=lengths["train"], generator=order)
    train = loader(encoded["train"], batch_size, sampler=sampler)
    by_length = {split: sorted(range(len(own)), key=own.__getitem__) for split, own in lengths.items()}
    dev = {split: loader(encoded[split].select(by_length[split]), 2 * batch_size) for split in encoded if split != "train"}
    return train, dev, order
