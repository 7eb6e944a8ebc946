"""GLUE for `glue_moefy.py`: a task's data from the hub or from local Parquet files, checked, tokenised, in batches.

Wrong data are never accepted silently. Each kind raises a UserError that names the flag and the fix.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import pyarrow
import torch
from datasets import ClassLabel
from datasets.fingerprint import Hasher
from datasets.info import DatasetInfo, DatasetInfosDict
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding
from transformers.trainer_pt_utils import LengthGroupedSampler

from lab.moe.moefication import FFN, MoESpec, ffns_of
from lab.run.cli import GLUE_WAYS, UserError, is_offline, offline_message, say
from lab.run.hub import Checkpoint, cache_of, fetch, from_hub
from lab.run.runs import digest_of
from lab.text.tables import read_parquet
from lab.text.tasks import HUB, Task


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
        where, again = HUB, f"remove {cache_of(HUB, 'dataset')} and run the command again, or give --data-dir DIR"
        guard = partial(from_hub, f"the data set {name} of", "--data-dir", HUB, kind="dataset")
        root = guard(lambda: fetch(HUB, rf"{name}/({'|'.join(wanted)})-[^/]+\.parquet", "dataset"))
    else:
        where, again, root = f"--data-dir {data_dir}", "fetch it again", Path(data_dir)
    folder = root if root.name == name else root / name
    files = {split: sorted(folder.glob(f"{split}-*.parquet")) for split in wanted}
    for split, found in files.items():
        if not found and data_dir is None and is_offline():
            raise UserError(offline_message(f"the data set {name} of", HUB, GLUE_WAYS))
        if not found:
            raise UserError(f"{where} has no {name}/{split}-*.parquet: {again}, laid out as {HUB} is on the hub")
        counts = {match[1] for file in found if (match := re.search(r"-\d+-of-(\d+)$", file.stem))}
        if counts and set(map(int, counts)) != {len(found)}:
            fault = f"has {len(found)} files {name}/{split}-*, named as files of {', '.join(sorted(counts)):.40}"
            raise UserError(f"{where} {fault}; fetch those that are missing, or remove those of another version")
    splits = {split: read_split(found, where, again) for split, found in files.items()}
    if data_dir is None:
        splits = guard(lambda: as_the_card_says(splits, name))
    for split in wanted:
        check_split(splits[split], split, task, where)
    check_names(splits, task, where)
    return splits


def as_the_card_says(splits: dict[str, datasets.Dataset], name: str) -> dict[str, datasets.Dataset]:
    """The splits with the features that the hub's card gives them. ValueError for another number of rows."""
    card = DatasetInfosDict.from_directory(fetch(HUB, r"README\.md", "dataset")).get(name, DatasetInfo())
    for split, dataset in splits.items():
        if (expected := (card.splits or {}).get(split)) and len(dataset) != expected.num_examples:
            raise ValueError(f"{split} has {len(dataset)} rows, by its card {expected.num_examples}")
        if card.features not in (None, dataset.features):
            splits = splits | {split: dataset.cast(card.features)}
    return splits


def read_split(files: list[Path], where: str, again: str) -> datasets.Dataset:
    """The rows of exactly these files, in memory. Results on them are cached under a hash of the files' contents, not under
    their paths and times as `load_dataset` does it. UserError."""
    parts = []
    for file in files:
        try:
            table, digest = read_parquet(file)
            parts.append(datasets.Dataset(table, fingerprint=digest))
        except Exception as error:  # from a damaged file the libraries raise anything, such as TypeError
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{where}: {file.name} is not readable Parquet ({reason:.90}): {again}") from None
        if parts[-1].features != parts[0].features:
            other = f"{file.name} has other columns, types or class names than {files[0].name}"
            raise UserError(f"{where}: {other}; make them the same")
    return datasets.concatenate_datasets(parts)


def check_split(dataset: datasets.Dataset, split: str, task: Task, where: str) -> None:
    """Checks columns, rows, labels and texts of a split. UserError. Blank texts and absent classes only print a note."""
    needed = (*task.columns, "label")
    for column in needed:
        if column not in dataset.column_names:
            raise UserError(f"{where}: {split} has no column {column!r}; it needs {', '.join(needed)}")
    if not len(dataset):
        raise UserError(f"{where}: {split} has no rows; give at least one example")
    kind, labels = dataset.data.schema.field("label").type, dataset["label"][:]
    if None in labels:
        raise UserError(f"{where}: {split} has no label in row {labels.index(None)}; add a label, or remove the row")
    named, scores = isinstance(dataset.features["label"], ClassLabel), task.num_labels == 1
    fits = pyarrow.types.is_integer(kind) or (scores and pyarrow.types.is_floating(kind))
    if not fits or (scores and named):  # the number of a named class is not a score
        wanted = "a number" if scores else f"an integer, 0 to {task.num_labels - 1}"
        raise UserError(f"{where}: {split} has labels of type {'class' if named else kind!s:.40}; make each {wanted}")
    if scores and len(wrong := torch.tensor(labels, dtype=torch.float32).isfinite().logical_not().nonzero()):
        row = wrong[0].item()  # as float32, which the loss gets
        raise UserError(f"{where}: {split} has the score {labels[row]} in row {row}; use a finite number, or remove the row")
    classes = set(range(task.num_labels))
    if task.num_labels > 1 and (wrong := set(labels) - classes):
        raise UserError(f"{where}: {split} has the label {wrong.pop()}; use 0 to {task.num_labels - 1}")
    for column in task.columns:
        texts = dataset[column][:]
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"{where}: {split} has no text in column {column!r}, row {row}; add one, or remove the row")
        if blank := sum(not text.strip() for text in texts):
            say(f"note: {blank} of {len(texts)} texts in {split}, column {column}, are blank; they are kept")
    if task.num_labels > 1 and (absent := classes - set(labels)):
        say(f"note: {split} has no example of class {', '.join(map(str, sorted(absent)))}: its scores say little")


def digest_of_split(dataset: datasets.Dataset, task: Task) -> str:
    """The digest of what a run reads of a split, for its record: class names, texts, labels."""
    names = getattr(dataset.features["label"], "names", None)
    return digest_of(names, *(dataset[name][:] for name in (*task.columns, "label")))


def class_names(dataset: datasets.Dataset) -> list[str] | None:
    """The names of the classes; None if the labels have no names, or only their own numbers."""
    names = getattr(dataset.features["label"], "names", None)
    return None if names == [str(i) for i in range(len(names or ()))] else names


def check_names(splits: dict[str, datasets.Dataset], task: Task, where: str) -> None:
    """Checks that a label means the same in all splits and, where it has GLUE's name of a class, in GLUE. UserError."""
    usual = {name: i for i, name in enumerate(task.labels)} | {str(i): i for i in range(task.num_labels)}
    named = {split: names for split, dataset in splits.items() if (names := class_names(dataset))}
    for split, names in named.items():
        first, expected = next(iter(named.items()))
        plain = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in names]
        moved = [(i, usual[name]) for i, name in enumerate(plain) if usual.get(name, i) != i]
        if len(names) != task.num_labels:
            raise UserError(f"{where}: {split} has {len(names)} class names for {task.num_labels} classes; name each class")
        if moved:
            i, place = moved[0]
            fault = f"{split} calls class {i} {names[i]!r:.40}, which is GLUE's name of class {place}"
            raise UserError(f"{where}: {fault}; put names and labels in GLUE's order")
        if names != expected:
            one, two = (f"{', '.join(map(repr, some)):.60}" for some in (names, expected))
            raise UserError(f"{where}: the classes of {split} are {one}, those of {first} {two}; make them the same")
    if named and "f1" in task.metrics and plain[1] != task.labels[1]:
        say(f"note: f1 is that of class 1, {names[1]!r}")


FRESH = {"new": r"^classifier\.|\bpooler\b", "dtype": torch.float32}  # what a classifier may draw anew; its dtype
SHAPE = ("model_type", "hidden_size", "intermediate_size", "hidden_act", "num_hidden_layers")  # that FFNs have to share


def load_ffns(names: list[str] | None, spec: MoESpec, config) -> list[list[FFN]]:
    """The FFNs of --experts-from, model by model, as `moefy` reads them. UserError for a model that has not the shape of
    --model, whose config this is."""
    found = []
    for checkpoint in (Checkpoint("--experts-from", name) for name in names or ()):
        own = checkpoint.config("the model")
        for key in SHAPE:
            if (here := getattr(own, key, None)) != (wanted := getattr(config, key)):
                checkpoint.refuse(f"its {key} is {here}, that of --model is {wanted}")
        model = checkpoint.model("the model", AutoModelForSequenceClassification, own, **FRESH)
        found.append(ffns_of(model, spec))
    return found


def load_source(name: str, task: Task, model: str, data_dir: str | None, check: Callable = lambda *_: None) -> Source:
    """A task's data and a model, from the hub or from folders. `check`s config and tokenizer before more is downloaded."""
    checkpoint, kind = Checkpoint("--model", model), "folder" if data_dir else "hub"
    loss = "regression" if task.num_labels == 1 else "single_label_classification"
    config = checkpoint.config(num_labels=task.num_labels, problem_type=loss)
    checkpoint.sketch("the model", AutoModelForSequenceClassification, config)
    tokenizer = checkpoint.tokenizer(config)
    check(config, tokenizer)
    splits = load_splits(name, task, data_dir)
    names = label_names(splits, task) or ["LABEL_0"]
    config.id2label, config.label2id = dict(enumerate(names)), {label: i for i, label in enumerate(names)}
    load = partial(checkpoint.model, "the model", AutoModelForSequenceClassification, config, **FRESH)
    return Source(name, kind, config, load, tokenizer, splits)


def run_name(name: str, task: Task, rows: int, dev_rows: int) -> str:
    """The task's name, or for other rows than the official sets a name that shows it: qnli-12k, rte-dev100."""
    if rows != task.rows:
        return f"{name}-{rows}" if rows < 1000 else f"{name}-{round(rows / 1000)}k"
    return name if dev_rows == task.dev_rows else f"{name}-dev{dev_rows}"


def label_names(splits: dict[str, datasets.Dataset], task: Task) -> list[str] | None:
    """The names of the classes, or their numbers; None for a regression."""
    if task.num_labels == 1:
        return None
    return next(filter(None, map(class_names, splits.values())), [str(i) for i in range(task.num_labels)])


def print_copies(splits: dict[str, datasets.Dataset], task: Task) -> None:
    """Warns of dev examples whose texts are in train."""
    texts = {split: list(zip(*(dataset[column][:] for column in task.columns))) for split, dataset in splits.items()}
    train = set(texts["train"])
    for split in task.dev:
        if copies := sum(row in train for row in texts[split]):
            share = f"{copies} of {len(texts[split])} examples in {split} are in train, too"
            say(f"warning: {share}: its scores are biased upward")


def tokenize(splits: dict[str, datasets.Dataset], task: Task, tokenizer, max_length: int) -> dict[str, datasets.Dataset]:
    """Splits with input_ids, attention_mask, labels, and token_type_ids if the model has them. Not padded: batches are.

    `datasets` caches the result on disk, under a hash of the data, of `encode_rows` and of its arguments.
    """
    encode = partial(encode_rows, columns=task.columns, tokenizer=tokenizer, max_length=max_length)
    encode({column: ["x"] for column in task.columns})  # sets the tokenizer's truncation before it is hashed
    encoded, cache = {}, Path(datasets.config.HF_DATASETS_CACHE, "stgc")
    for split, dataset in splits.items():
        dataset = dataset.select_columns([*task.columns, "label"]).rename_column("label", "labels")
        if task.num_labels == 1:
            dataset = dataset.cast_column("labels", datasets.Value("float32"))
        options = {"remove_columns": [column for column in dataset.column_names if column != "labels"]}
        if not dataset.cache_files:  # data in memory need the name of a file
            options["cache_file_name"] = str(cache / f"{Hasher.hash((dataset._fingerprint, encode))}.arrow")
        encoded[split] = dataset.map(encode, batched=True, desc=f"tokenize {split}", **options)
    return encoded


def encode_rows(rows: dict, columns: tuple[str, ...], tokenizer, max_length: int):
    return tokenizer(*(rows[column] for column in columns), truncation=True, max_length=max_length)


def make_loaders(encoded: dict, tokenizer, batch_size: int) -> tuple[DataLoader, dict[str, DataLoader], torch.Generator]:
    """A train loader with batches of similar length, dev loaders sorted by length, and the generator of the training order.

    Batches are padded one by one. The order of an epoch depends only on the generator's state at its start: seed it there,
    and a resumed run sees the same batches. The loaders have their own generators, so they draw no global random numbers.
    """
    collate, order = DataCollatorWithPadding(tokenizer), torch.Generator()
    lengths = {split: list(map(len, dataset["input_ids"])) for split, dataset in encoded.items()}

    def loader(dataset, size, **kwargs):
        return DataLoader(dataset, size, collate_fn=collate, generator=torch.Generator(), **kwargs)

    sampler = LengthGroupedSampler(batch_size, lengths=lengths["train"], generator=order)
    train = loader(encoded["train"], batch_size, sampler=sampler)
    by_length = {split: sorted(range(len(own)), key=own.__getitem__) for split, own in lengths.items()}
    dev = {split: loader(encoded[split].select(by_length[split]), 2 * batch_size) for split in encoded if split != "train"}
    return train, dev, order
