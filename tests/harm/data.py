"""Data files that would do harm without a word: other files than the named ones, labels that mean something else in another
split or in GLUE, scores that are not numbers. Each ends before anything is written.
"""

import json
import os
import shutil
from pathlib import Path

import datasets
import pyarrow
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, List, Value
from harm.build import ONCE, VOCABULARY, refused, save_tokenizer, start
from pyarrow.parquet import write_table
from test_glue import WORDS

import glue_moefy
from lab.text import tables
from lab.text.tasks import TASKS

REAL, ORDER = Value("float64"), ["entailment", "not_entailment"]
PART = "00000-of-00001"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One for all cases, so that none of them finds the data of another one."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path, model, cache, monkeypatch):
    """Empty but for a model, m."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    shutil.copytree(model, tmp_path / "m")
    return tmp_path


def sentences(start: int, rows: int) -> list[str]:
    """Sentences that differ, and differ from those of another `start`."""
    return [f"{WORDS[start % 11]} {WORDS[i // 11 % 11]} {WORDS[i % 11]}" for i in range(rows)]


def put(root, split="train", task="rte", rows=8, part=PART, kind=None, names=None, label=None, start=None, **texts):
    """One file. `names`: of the classes, with labels 0 1 0 1 ...; or give `label` and `kind`, its type."""
    start = {"train": 0}.get(split, 1) if start is None else start
    classes = max(TASKS[task].num_labels, 2)
    kind = ClassLabel(names=names) if names else kind or (REAL if TASKS[task].num_labels == 1 else Value("int64"))
    labels = [i % classes for i in range(rows)] if label is None else label
    columns = {name: texts.get(name, sentences(start, rows)) for name in TASKS[task].columns} | {"label": labels}
    features = Features(dict.fromkeys(TASKS[task].columns, Value("string")) | {"label": kind})
    file = root / task / f"{split}-{part}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as out:  # the name, with :: in it, would be an address
        Dataset.from_dict(columns, features).to_parquet(out)
    return file


def both(root, task="rte", train=None, **dev):
    """Both splits, mostly alike; returns the folder. `train` and `dev`: what `put` takes."""
    put(root, task=task, **(train or {}))
    for split in TASKS[task].dev:
        put(root, split, task, **dev)
    return root


def beside(named, other):
    """Data in the folder that is named, and other data in a folder that its name matches as a pattern."""

    def make(root):
        both(root / other, train={"start": 5, "rows": 12})
        return both(root / named)

    return make


def replaced(**new):
    """A run on other data of the same size, before the same files are written again with the same time."""

    def make(root):
        file = put(both(root), **new)
        before = file.stat()
        prepare(root, root)
        put(root)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        return root

    return make


def damaged(content=None, metadata=None):
    """A train file with these bytes, or with this `huggingface` entry in its schema. Content None: a folder."""

    def make(root):
        file = put(both(root))
        if metadata:
            table = pyarrow.table({"sentence1": ["a"], "sentence2": ["b"], "label": [1]})
            write_table(table.replace_schema_metadata({"huggingface": metadata}), file)
        elif content is None:
            file.unlink()
            file.mkdir()
        else:
            file.write_bytes(content(file.read_bytes()))
        return root

    return make


def not_utf8(root):
    file, text = put(both(root)), pyarrow.array([b"\xff\xfe"]).cast("string", safe=False)
    write_table(pyarrow.table({"sentence1": text, "sentence2": ["b"], "label": [1]}), file)
    return root


def shards(task="rte", **second):
    """Train in two files; the second one has what is given."""

    def make(root):
        put(both(root, task), task=task, part="00000-of-00002").with_name(f"train-{PART}.parquet").unlink()
        put(root, task=task, part="00001-of-00002", **second)
        return root

    return make


def lost(root):
    shards()(root)
    (root / "rte" / "train-00001-of-00002.parquet").unlink()
    return root


def mixed(root):
    for part in ("00000-of-00002", "00001-of-00002"):
        put(root, "validation", part=part)
    return both(root)


def of(task="rte", **splits):
    return lambda root: both(root, task, **splits)


def half(root):
    """Only the second dev set of mnli has its names in another order."""
    names = ["no", "maybe", "yes"]
    both(root, "mnli", train={"names": names}, names=names)
    put(root, "validation_mismatched", "mnli", names=names[::-1])
    return root


def arrow(kind, *values):
    """Labels of an Arrow type."""

    def make(root):
        rows = {"sentence1": ["a"] * len(values), "sentence2": ["b"] * len(values)}
        write_table(pyarrow.table(rows | {"label": pyarrow.array(values, kind)}), put(both(root)))
        return root

    return make


def prepare(root: Path, data: Path, task: str = "rte"):
    words = f"--task {task} --moe-layers 1 --num-experts 4 --max-length 16 --device cpu --model".split()
    args = glue_moefy.parse([*words, str(root / "m"), "--data-dir", str(data), "--output-dir", str(root / "out")])
    AcceleratorState._reset_state(reset_partial_state=True)
    return glue_moefy.prepare(args, task, root / "out", glue_moefy.runs.start(args))


def data_are_what_they_are_said_to_be(make, expected, task="rte", *, folder, capsys):
    """`expected` is a refusal. "+ text": no refusal, this is printed; "": trains on exactly these files."""
    data = make(folder)
    before = sorted(folder.rglob("*"))
    if expected and not expected.startswith("+"):
        with refused(f"^--data-dir.*{expected}", folder):
            prepare(folder, data, task)
    else:
        capsys.readouterr()
        job = prepare(folder, data, task)
        printed = capsys.readouterr().out
        assert expected[2:] in printed and ("warning:" in printed) == ("warning:" in expected)
        written = [table for file in sorted((data / task).glob("train-*")) for table in tables.read_rows(file).to_pylist()]
        columns = [[row[column] for row in written] for column in TASKS[task].columns]
        assert job.encoded["train"]["input_ids"][:] == job.source.tokenizer(*columns)["input_ids"]
        assert job.encoded["train"]["labels"][:] == [row["label"] for row in written]
        assert job.source.splits["train"].to_list() == written
    assert sorted(folder.rglob("*")) == before


def a_vocabulary_replaced_in_place_is_read(*, folder):
    """The tokenised data in the cache are those of the tokenizer's content."""
    both(folder)
    first = prepare(folder, folder).encoded["train"]["input_ids"][:]
    times = {file: file.stat().st_mtime_ns for file in (folder / "m").iterdir()}
    save_tokenizer(folder / "m", [*VOCABULARY[:5], *WORDS[::-1]])
    for file in (folder / "m").iterdir():
        os.utime(file, ns=(times[file], times[file]))
    assert prepare(folder, folder).encoded["train"]["input_ids"][:] != first


def the_same_content_elsewhere_is_not_tokenised_again(*, folder):
    """The path and the time of a file are no part of the key."""
    first = prepare(folder, both(folder / "a")).encoded
    (file,) = (Path(entry["filename"]) for entry in first["train"].cache_files)
    written = file.stat()
    again, other = (
        prepare(folder, both(folder / "b")).encoded,
        prepare(folder, both(folder / "c", train={"start": 2})).encoded,
    )
    assert all(again[split].cache_files == first[split].cache_files for split in first)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert other["train"].cache_files != first["train"].cache_files


def a_table_to_predict_is_exactly_the_named_one(kind, named, other, *, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in ((other, "other"), (named, "former"), (named, "mine")):
        file = Path(f"{name}.{kind}")
        tables.write_rows(file, f".{kind}", pyarrow.table({"s": [text]}) if kind == "parquet" else [{"s": text}], {"n": [1]})
        os.utime(file, (5, 5))
    assert tables.load_rows(file, ["s"], [])[1] == [["mine"]]


def scores_are_json(*, folder):
    """The record of a run on whole scores has no NaN."""
    both(folder, "stsb", train={"label": SCORES(5.0)})
    words = "--task stsb --moe-layers 1 --num-experts 4 --epochs 1 --seeds 0 --max-length 16 --save-model".split()
    start([*words, "--device", "cpu", "--model", folder / "m", "--data-dir", folder, "--output-dir", folder / "out"])
    no = lambda value: pytest.fail(f"{value} is not JSON")  # noqa: E731
    record = json.loads((folder / "out" / "results.json").read_text(), parse_constant=no)
    assert torch.isfinite(torch.tensor(record["runs"][0]["last"]["score"]))
    assert json.loads((folder / "out" / "model-ce-s0" / "task.json").read_text())["examples"][0]["label"] == 0


# ---- The table ----

SWAP, MRPC = ORDER[::-1], ["equivalent", "not_equivalent"]
FINITE, TYPE, OTHER = "the score {} in row 3; use", "train has labels of type", "{}which is GLUE's name of class"
NAN, INF = float("nan"), float("inf")
SCORES = lambda value: [1.0, 2.0, 3.5, value, 0.0, 1.0, 4.0, 5.0]  # noqa: E731
UNREADABLE = "train-.*is not readable Parquet"
COPIES = "warning: {} of {} examples in {} are in train, too"
CASES = {
    data_are_what_they_are_said_to_be: {
        "a folder that is a class of characters": (beside("run [1]", "run 1"), ""),
        "a folder with a star": (beside("a*b", "axb"), ""),
        "a file replaced in place": (replaced(start=5), ""),
        "a folder with a question mark": (beside("a?b", "acb"), ""),
        "a folder that is a negated class": (beside("run [!1]", "run 2"), ""),
        "a folder that is a chained address": (beside("a::b", "b"), ""),
        "a folder with two stars": (beside("**", "x/y"), ""),
        "labels replaced in place": (replaced(label=[1, 0] * 4), ""),
        "two files": (shards(start=3), ""),
        "one of two files": (lost, "has 1 files rte/train-.*, named as files of 00002; fetch those"),
        "files of two versions": (mixed, "has 3 files rte/validation-.*, named as files of 00001, 00002"),
        "a file that breaks off": (damaged(lambda old: old[:-9]), UNREADABLE),
        "an empty file": (damaged(lambda old: b""), UNREADABLE),
        "a folder in the place of a file": (damaged(), UNREADABLE),
        "types that are null": (damaged(metadata="null"), UNREADABLE),
        "types that are a list": (damaged(metadata='{"info": {"features": [5]}}'), UNREADABLE),
        "text that is not UTF-8": (not_utf8, UNREADABLE),
        "NaN in train": (of("stsb", train={"label": SCORES(NAN)}), "train has " + FINITE.format("nan"), "stsb"),
        "inf in dev": (of("stsb", label=SCORES(INF)), "validation has " + FINITE.format("inf"), "stsb"),
        "-inf in train": (of("stsb", train={"label": SCORES(-INF)}), FINITE.format("-inf"), "stsb"),
        "above float32": (of("stsb", label=SCORES(1e300)), FINITE.format(r"1e\+300"), "stsb"),
        "NaN in the second file": (shards("stsb", label=SCORES(NAN)), "the score nan in row 11", "stsb"),
        "NaN as float32": (of("stsb", label=SCORES(NAN), kind=Value("float32")), FINITE.format("nan"), "stsb"),
        "scores as classes": (of("stsb", train={"names": ["1.5", "4.0"]}), TYPE, "stsb"),
        "scores as integers": (of("stsb", train={"kind": Value("int64"), "label": [0, 1, 2, 3, 4, 5, 0, 1]}), "", "stsb"),
        "names of dev in another order": (
            of(train={"names": ["no", "yes"]}, names=["yes", "no"]),
            "classes of validation are 'yes', 'no', those of train 'no', 'yes'",
        ),
        "GLUE's names of dev in another order": (of(train={"names": ORDER}, names=SWAP), OTHER.format("'not_ent.*")),
        "names of the second dev set": (half, "classes of validation_mismatched are 'yes'", "mnli"),
        "names of the second file": (shards(names=["x", "y"]), "00001-of-00002.parquet has other .* class names"),
        "other names in dev": (of(train={"names": ["a", "b"]}, names=["a", "c"]), "classes of validation are 'a', 'c'"),
        "more names in dev": (of(names=["a", "b", "c"]), "validation has 3 class names for 2 classes"),
        "one split without names": (of(train={"names": ORDER}), ""),
        "names that are the numbers": (of(train={"names": ["0", "1"]}, names=ORDER), ""),
        "mrpc's names the other way round": (
            of("mrpc", train={"names": MRPC}, names=MRPC),
            "class 0 'equi.* class 1",
            "mrpc",
        ),
        "in capitals": (
            of("mrpc", train={"names": ["Equivalent", "Not-Equivalent"]}),
            "train calls class 0 'Equivalent'.*of class 1",
            "mrpc",
        ),
        "qqp's": (
            of("qqp", names=["duplicate", "not_duplicate"]),
            "validation calls class 0 'duplicate'.*of class 1",
            "qqp",
        ),
        "cola's": (of("cola", names=["acceptable", "unacceptable"]), "validation calls class 0 'acceptable'", "cola"),
        "mnli's": (
            of("mnli", names=["contradiction", "neutral", "entailment"]),
            "class 0 'contradiction'.*of class 2",
            "mnli",
        ),
        "one of them": (
            of("mrpc", train={"names": ["paraphrase", "not_equivalent"]}),
            "class 1 'not_equiv.*of class 0",
            "mrpc",
        ),
        "numbers": (of(train={"names": ["1", "0"]}), "class 0 '1'.*of class 1"),
        "own names": (of("mrpc", train={"names": ["same", "new"]}), "+ note: f1 is that of class 1, 'new'", "mrpc"),
        "a list": (of(train={"kind": List(Value("int64")), "label": [[0]] * 8}), TYPE),
        "a record": (of(train={"kind": {"is": Value("int64")}, "label": [{"is": 0}] * 8}), TYPE),
        "a list of classes": (of(train={"kind": List(ClassLabel(names=ORDER)), "label": [[0]] * 8}), TYPE),
        "a time": (arrow(pyarrow.timestamp("s"), 0, 1), TYPE),
        "nothing": (arrow(pyarrow.null(), None), "train has no label in row 0"),
        "truth values": (arrow(pyarrow.bool_(), True, False), TYPE),
        "a long record": (arrow(pyarrow.struct([(f"field{i}", pyarrow.int8()) for i in range(90)]), {}), TYPE),
        "an empty name": (of(train={"names": ["", "x"]}), "labels=.'', 'x'.*rename the classes"),
        "a name that moves the cursor": (of(train={"names": ["\x1b[2J", "x"]}), "rename the classes"),
        "a name of two lines": (of("mnli", train={"names": ["a", "b", "c\nd"]}), "rename the classes", "mnli"),
        "a name without width": (of(names=["a", "a\u200b"]), "rename the classes"),
        "dev is train": (of(start=0), "+ " + COPIES.format(8, 8, "validation")),
        "dev has labels of its own": (of(start=0, label=[1] * 8), "+ " + COPIES.format(8, 8, "validation")),
        "dev has train": (of(start=0, rows=11), "+ " + COPIES.format(8, 11, "validation")),
        "dev of one sentence": (of("cola", start=0, rows=3), "+ " + COPIES.format(3, 3, "validation"), "cola"),
        "dev has one sentence of the pair": (of(start=0, sentence2=sentences(1, 8)), ""),
    },
    a_vocabulary_replaced_in_place_is_read: ONCE,
    the_same_content_elsewhere_is_not_tokenised_again: ONCE,
    a_table_to_predict_is_exactly_the_named_one: [
        (kind, *names)
        for kind in ("csv", "tsv", "jsonl", "parquet")
        for names in (("run [1]", "run 1"), ("a*b", "axb"), ("a?b", "acb"), ("file:x", "x"))
    ],
    scores_are_json: ONCE,
}
