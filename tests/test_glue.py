"""glue_moefy.py from its command line: whole runs on a tiny model and real-looking files, and every kind of bad input."""

import dataclasses
import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import without_pictures
from datasets import ClassLabel, Dataset, Features, Value
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, GPT2Config

import glue_moefy
from lab.moe import moefication
from lab.run import options
from lab.run.cli import Parser, RunFailed, UserError, hub_is_reachable
from lab.text import glue
from lab.text.tasks import TASKS, TITLES
from stgc_plus import STGCConfig

ROOT = Path(__file__).parent.parent
WORDS = "a the cat dog bird fish sees likes eats not red blue".split()
CONFIG = BertConfig(
    vocab_size=5 + len(WORDS),
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
)


def write_split(folder: Path, split: str, rows: int, **columns) -> None:
    sentence = [" ".join(WORDS[(i * 7 + j * (i + 1)) % len(WORDS)] for j in range(3 + i % 5)) for i in range(rows)]
    content = {
        "sentence1": sentence,
        "sentence2": sentence[::-1],
        "label": [i % 2 for i in range(rows)],
        "idx": list(range(rows)),
    }
    content = {name: values for name, values in (content | columns).items() if values is not None}
    features = Features(
        {"sentence1": Value("string"), "sentence2": Value("string"), "label": ClassLabel(2), "idx": Value("int32")}
    )
    free = any(name in columns for name in ("label", "sentence2"))
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(content, features=None if free else features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("glue")
    write_split(root / "rte", "train", 24)
    write_split(root / "rte", "validation", 9)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertForSequenceClassification(CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture
def words(data, model, tmp_path):
    """A command line that works; later words override earlier ones."""
    small = "--task rte --moe-layers 1 --num-experts 4 --epochs 2 --seeds 0 --batch-size 8 --max-length 16".split()
    return [
        *small,
        "--device",
        "cpu",
        "--log-steps",
        "1",
        "--model",
        str(model),
        "--data-dir",
        str(data),
        "--output-dir",
        str(tmp_path / "out"),
    ]


@pytest.fixture
def pictures():
    """A test that asks for this has them drawn."""


@pytest.fixture(autouse=True)
def plain(request, monkeypatch):
    if "pictures" not in request.fixturenames:
        without_pictures(monkeypatch)


def run(words):
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision per process
    glue_moefy.main(glue_moefy.parse(list(map(str, words))))


def test_a_run_leaves_a_full_record_and_a_model_that_loads(words, tmp_path, pictures, capsys):
    run([*words, "--seeds", "0", "3", "--save-model"])
    out = tmp_path / "out"
    record = json.loads((out / "results.json").read_text())
    assert record["name"] == "rte-24" and record["data"] == {"train": 24, "dev": 9, "source": "folder"}
    assert record["command"].startswith("python ") and record["versions"]["torch"] == torch.__version__
    assert record["config"]["beta"] == 0.1 and record["config"]["num_experts"] == 4
    assert [(entry["variant"], entry["seed"]) for entry in record["runs"]] == [("ce", 0), ("ce", 3)]
    for entry in record["runs"]:
        curve = [json.loads(line) for line in (out / f"ce-s{entry['seed']}.jsonl").read_text().splitlines()]
        steps = [line for line in curve if "loss" in line]
        dev = [line for line in curve if "eval_score" in line]
        assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6] and [line["step"] for line in dev] == [3, 6]
        assert all(0 <= line["conflict_ratio"] <= 1 and math.isfinite(line["loss"]) for line in steps)
        assert entry["last"]["accuracy"] == dev[-1]["eval_accuracy"] and entry["last"]["epoch"] == 2
        assert entry["best"]["score"] == max(line["eval_score"] for line in dev)
        assert entry["conflict_ratio"] == [steps[0]["conflict_ratio"], steps[-1]["conflict_ratio"]]
        assert entry["peak_memory_bytes"] > 0 and entry["samples_per_second"] > 0
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert isinstance(moefication.load_moefied(out / "model-ce-s3"), BertForSequenceClassification)
    assert not list(out.glob("*.tmp"))
    printed = capsys.readouterr().out
    assert "variant=ce seed=3 epoch=2" in printed and "best epoch on dev" in printed


def test_the_same_command_gives_the_same_run(words, tmp_path):
    """The seed fixes head, router, dropout and data order; only the clock differs."""
    curves = []
    for name in ("a", "b"):
        run([*words, "--output-dir", tmp_path / name])
        curves.append((tmp_path / name / "ce-s0.jsonl").read_text())
    assert curves[0] == curves[1]


def test_baseline_and_variants_start_alike(words, tmp_path):
    """Same seed: the first loss, before any update, cannot depend on the variant."""
    first = {}
    variants = [
        "--conflict-loss none",
        "--conflict-loss mse",
        "--passes one",
        "--select random",
        "--gradients weight",
        "--beta 1",
    ]
    for i, flags in enumerate(variants):
        run([*words, *flags.split(), "--epochs", "1", "--output-dir", tmp_path / str(i)])
        (path,) = (tmp_path / str(i)).glob("*.jsonl")
        first[path.stem] = json.loads(path.read_text().splitlines()[0])
    assert set(first) == {"none-s0", "mse-s0", "ce-one-s0", "placebo-s0", "ce-weight-s0", "ce-s0"}
    assert len({line["loss"] for line in first.values()}) == 1
    bias = [line["conflict_ratio"] for name, line in first.items() if name != "ce-weight-s0"]
    assert len(set(bias)) == 1


@pytest.mark.parametrize(
    "flags", ["--experts split", "--router cosine", "--moe-layers every-second --every 2", "--precision bf16"]
)
def test_options_run(words, tmp_path, flags):
    run([*words, *flags.split(), "--epochs", "1"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"]


def test_experts_from_other_models_are_trained_on(words, model, tmp_path, capsys):
    """Expert e begins as the FFN of the e-th model, in turn; a run of other weights is not resumed."""
    for i in (1, 2):
        torch.manual_seed(i)
        shutil.copytree(model, tmp_path / str(i))
        BertForSequenceClassification(CONFIG).save_pretrained(tmp_path / str(i))
    words += ["--experts-from", tmp_path / "1", tmp_path / "2", "--lr", "1e-30", "--epochs", "1"]
    run([*words, "--save-model", "--variants", "none,random"])
    assert f"the experts are, in turn, the FFNs of {tmp_path / '1'}, {tmp_path / '2'}" in capsys.readouterr().out
    for variant in ("none", "random"):
        experts = (
            moefication.load_moefied(tmp_path / "out" / f"model-{variant}-s0").bert.encoder.layer[1].output.dense.experts
        )
        for e in range(4):
            weights = load_file(tmp_path / str(1 + e % 2) / "model.safetensors")
            ffn = weights["bert.encoder.layer.1.intermediate.dense.weight"]
            assert torch.equal(experts.w_in_EDF[e].T, ffn), (variant, e)
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["config"]["experts_from"] == [str(tmp_path / "1"), str(tmp_path / "2")]
    BertForSequenceClassification(CONFIG).save_pretrained(tmp_path / "2")
    with pytest.raises(UserError, match="the weights or config of --experts-from .*2"):
        run([*words, "--save-model", "--variants", "none,random", "--resume", "--seeds", "0", "1"])


def test_other_models_are_checked_before_the_data_are_tokenized(words, model, tmp_path, monkeypatch):
    monkeypatch.setattr(glue, "tokenize", lambda *_: pytest.fail("the data are tokenized"))
    shutil.copytree(model, tmp_path / "wide")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"intermediate_size": 7}))
    with pytest.raises(UserError, match="--experts-from .*wide: its intermediate_size is 7, that of --model is"):
        run([*words, "--experts-from", tmp_path / "wide"])


def test_limits_patience_and_collapse(words, data, tmp_path, capsys):
    """One label to learn: all dev examples get it, which is called out; and no epoch after the first one gains."""
    one = tmp_path / "one"
    write_split(one / "rte", "train", 24, label=[1] * 24)
    write_split(one / "rte", "validation", 9, label=[1] * 6 + [0] * 3)
    run([*words, "--data-dir", one, "--lr", "0.01", "--epochs", "9", "--patience", "1", "--max-train-samples", "16"])
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["data"]["train"] == 16 and record["runs"][0]["collapsed"] and record["runs"][0]["last"]["epoch"] < 9
    assert "collapse: ce, seed 0: every dev example gets class 1" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(words, tmp_path):
    with pytest.raises(RunFailed, match=r"the loss is nan at step \d+; lower the learning rate"):
        run([*words, "--lr", "1e30", "--log-steps", "3"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"] == []


def test_overwrite_replaces_a_run_and_nothing_else(words, tmp_path, pictures):
    out = tmp_path / "out"
    run([*words, "--epochs", "1"])
    mine = ["notes.txt", "holiday.png", "train-set.jsonl", "model-x-small.bin"]
    for name in mine:
        (out / name).write_text("mine")
    with pytest.raises(UserError, match="--output-dir .* holds a run with --conflict-loss ce, --variants ce: name another"):
        run([*words, "--epochs", "1", "--conflict-loss", "mse"])
    run([*words, "--epochs", "1", "--overwrite", "--conflict-loss", "mse"])
    ours = ["all_results.json", "curves.png", "mse-s0.jsonl", "results.json", "written.txt"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*ours, *mine])


def test_the_same_command_again(words, tmp_path, monkeypatch, capsys):
    """Finished: its table again, and nothing else. Other options, or a run that is missing: one line."""
    words, file = [*words, "--epochs", "1", "--variants", "none,ce"], tmp_path / "out" / "results.json"
    run(words)
    table, before = capsys.readouterr().out.split("\nrte-24, in %")[1].split("\nwritten")[0], file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(glue_moefy, "prepare", lambda *_: pytest.fail("something is loaded"))
        run([*words, "--save-steps", "1"])  # which changes nothing
    printed = capsys.readouterr().out
    assert "holds this run, finished with the same options; nothing is trained (--overwrite" in printed and table in printed
    for flags, message in {
        "--beta 0.5": "holds a run with --beta 0.1: name another folder, or pass --overwrite to replace it$",
        "--seeds 0 1": r"holds a run with --seeds 0: .*\(--resume: to continue it\)",
        "--save-model": r"holds a run with --save-model False: .*\(--resume: to continue it\)",
    }.items():
        with pytest.raises(UserError, match=message):
            run([*words, *flags.split()])
    assert file.read_bytes() == before
    run([*words, "--resume"])
    assert capsys.readouterr().out.count("complete already") == 2
    record = json.loads(before)
    file.write_text(json.dumps(record | {"runs": record["runs"][:1]}))
    with pytest.raises(UserError, match=r"holds this run already: .*\(--resume: to continue it\)"):
        run(words)
    run([*words, "--overwrite"])
    assert len(json.loads(file.read_text())["runs"]) == 2 and "nothing is trained" not in capsys.readouterr().out


def test_the_folder_says_what_it_holds(monkeypatch):
    found = []
    monkeypatch.setattr(glue_moefy, "finished", lambda args, name, folder: found.append(str(folder)))
    monkeypatch.setattr(glue_moefy, "prepare", lambda *_: (_ for _ in ()).throw(UserError("")))
    for flags in ("", "--conflict-loss none", "--conflict-loss mse", "--compare", "--variants none,ce"):
        with pytest.raises(UserError):
            run(["--task", "rte", "--toy", "--device", "cpu", *flags.split()])
    assert found == [f"runs/toy-rte{ending}" for ending in ("", "-none", "-mse", "-compare", "-compare")]


def test_the_screen_is_for_people(words, capsys):
    """Settings as a table, no dumps of objects, no speeds; the baseline under its own name in every table."""
    run([*words, "--epochs", "1", "--variants", "dense,none,ce-one", "--every", "3"])
    printed = capsys.readouterr().out
    assert not re.search(r"STGCConfig|MoESpec|samples/s", printed)
    assert re.search(r"\nMoE in layer 1: 4 copies of the FFN, Top-2, cosine router; \d\.\d M parameters", printed)
    heads = ["variant", "conflict loss", "pairs", "passes", "gradients", "tau", "beta", "alpha", "conflicts measured at"]
    assert re.search(" +".join(["\nvariant", *heads[1:]]) + "\n", printed)
    assert re.search(r"\ndense +no MoE +- +-", printed)
    assert re.search(r"\nbaseline +none +- +- +- +0 +- +0.01 +every step\n", printed)  # --log-steps 1
    assert re.search(r"\nce-one +ce +conflict +one +bias +0 +0.1 +0.01 +every 3 steps\n", printed)
    tables = printed.split("\nrte-24, in %")[1:]
    assert len(tables) == 2 and all("\naccuracy  baseline " in table and "none" not in table for table in tables)
    assert "\nbaseline: conflict ratio 0." in tables[1]


def test_the_toy_says_what_it_does_first(monkeypatch, capsys):
    monkeypatch.setattr(glue_moefy.toy, "pretrain", lambda *_: (types.SimpleNamespace(config=None), None))
    monkeypatch.setattr(glue_moefy.toy, "make_pairs", lambda *_: {})
    glue_moefy.toy_source()
    assert capsys.readouterr().out == "pretraining a tiny BERT on generated sentences: 500 steps\n"


def write_task(root: Path, name: str, rows: int = 16, dev: int = 6) -> None:
    """A small stand-in for a task's files, in the hub's layout."""
    task, folder = TASKS[name], root / name
    folder.mkdir(parents=True, exist_ok=True)
    label = Value("float32") if task.num_labels == 1 else ClassLabel(task.num_labels)
    features = Features({**{column: Value("string") for column in task.columns}, "label": label, "idx": Value("int32")})
    for split, size in (("train", rows), *((split, dev) for split in task.dev)):
        content = {
            column: [" ".join(WORDS[i % 5 : i % 5 + 3 + j]) for i in range(size)] for j, column in enumerate(task.columns)
        }
        content |= {"label": [i % max(task.num_labels, 2) for i in range(size)], "idx": list(range(size))}
        Dataset.from_dict(content, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_a_row(words, tmp_path, name):
    write_task(tmp_path / "data", name)
    run([*words, "--task", name, "--data-dir", tmp_path / "data", "--epochs", "1"])
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    found, task = record["runs"][0]["last"], TASKS[name]
    suffixed = {f"{metric}_mm" for metric in task.metrics if len(task.dev) == 2}
    assert found.keys() == {*task.metrics, *task.also, *suffixed, "score", "dev_loss", "epoch"}
    assert record["name"] == f"{name}-16"
    assert found["score"] == pytest.approx(sum(found[metric] for metric in task.metrics) / len(task.metrics))
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    names = {"matthews": "matthews_correlation", "spearman": "spearmanr"}
    assert {f"eval_{names.get(metric, metric)}" for metric in (*task.metrics, *suffixed)} < results.keys()
    assert all(results[f"eval_{names.get(metric, metric)}"] == found[metric] for metric in task.metrics)
    assert results["eval_samples"] == 6 and results["eval_combined_score"] == found["score"]
    assert results["eval_loss"] == found["dev_loss"] > 0


def test_mnli_scores_its_two_halves_apart(words, tmp_path):
    """The mismatched half has the matched one's sentences and other labels: both are scored, the matched one counts."""
    write_task(tmp_path / "data", "mnli", dev=6)
    for split, labels in (("validation_matched", [0, 0, 0, 0, 1, 1]), ("validation_mismatched", [1, 1, 1, 1, 2, 2])):
        path = tmp_path / "data" / "mnli" / f"{split}-00000-of-00001.parquet"
        Dataset.from_parquet(str(path)).remove_columns("label").add_column("label", labels).to_parquet(path)
    run([*words, "--task", "mnli", "--data-dir", tmp_path / "data", "--epochs", "1"])
    last = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["last"]
    assert last["accuracy"] == last["score"] != last["accuracy_mm"]  # whichever class it answers


@pytest.mark.slow
def test_task_all_trains_the_papers_five_and_prints_its_table(words, tmp_path, pictures, capsys, monkeypatch):
    without_pictures(monkeypatch, "plot_run")
    for name in TITLES:
        write_task(tmp_path / "data", name, rows=8)
    run([*words, "--task", "all", "--data-dir", tmp_path / "data", "--epochs", "1", "--variants", "dense,none,ce"])
    assert sorted(path.parent.name for path in (tmp_path / "out").glob("*/results.json")) == sorted(TITLES)
    printed = capsys.readouterr().out
    assert re.search(r"CoLA +MRPC +QNLI +MNLI +RTE +Avg", printed) and "82.8" in printed
    assert "rte-8" in printed.split("CoLA")[1]  # a part of the data: under its own name, below the columns
    assert (tmp_path / "out" / "comparison.png").exists()
    run([*words, "--task", "all", "--data-dir", tmp_path / "data", "--epochs", "1", "--variants", "dense,none,ce"])
    again = capsys.readouterr().out
    assert again.count("nothing is trained") == 5 and again.split("CoLA")[1] == printed.split("CoLA")[1]


@pytest.mark.slow
def test_variants_differ_in_the_method_alone(words, tmp_path, pictures, capsys, monkeypatch):
    """Same seed: the same first loss whatever the variant; a dense BERT's too, as copies start as what they copy."""
    without_pictures(monkeypatch, "plot_run")
    names = ["none", "ce", "mse", "reroute", "placebo", "ce-one", "ce-weight", "placebo-mse-one-weight", "dense"]
    run([*words, "--compare", "--variants", *names, "--epochs", "1", "--seeds", "0", "1"])
    first = {name: json.loads((tmp_path / "out" / f"{name}-s1.jsonl").read_text().splitlines()[0]) for name in names}
    losses = [first[name]["loss"] for name in names]
    assert losses[:-1] == [losses[0]] * 8 and losses[-1] == pytest.approx(losses[0], rel=1e-5)
    assert "conflict_ratio" not in first["dense"] and len({first[name]["conflict_ratio"] for name in names[:6]}) == 1
    printed = capsys.readouterr().out
    assert "best epoch on dev" in printed and "last epoch, nothing selected" in printed and "minus baseline" in printed
    assert (tmp_path / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_variant_names_are_the_flags():
    more = "--select all --passes one", "--select all --conflict-loss mse"
    for flags in (
        "",
        "--conflict-loss mse --passes one",
        "--select random --gradients weight",
        "--conflict-loss none",
        *more,
    ):
        args = glue_moefy.make_parser().parse_args(["--task", "rte", *flags.split()])
        found = options.variant_options(options.variant_name(args), args)
        every = args.log_steps if args.conflict_loss == "none" else args.every
        assert found == {name: getattr(args, name) for name in found} | {"every": every}
    assert options.variant_options("dense", args) is None and options.variant_options("random", args)["alpha"] == 0
    for wrong in ("dense-one", "random-one", "flat-weight", "flat-mse-one-weight", "flat-reroute"):
        assert not options.VARIANT.fullmatch(wrong)


def test_several_learning_rates(words, tmp_path, pictures, capsys, monkeypatch):
    without_pictures(monkeypatch, "plot_run")
    run([*words, "--lrs", "1e-5", "1e-2", "--variants", "none,ce", "--epochs", "1"])
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(entry["variant"], entry["lr"]) for entry in record["runs"]] == [
        ("none", 1e-5), ("none", 1e-2), ("ce", 1e-5), ("ce", 1e-2)
    ]  # fmt: skip
    assert (tmp_path / "out" / "ce-lr0.01-s0.jsonl").exists() and (tmp_path / "out" / "ce-lr1e-05-s0.jsonl").exists()
    assert "best learning rate on dev of 1e-05 0.01" in capsys.readouterr().out


def test_a_sweep_holds_one_model_at_a_time(words, monkeypatch):
    alive, most, real = weakref.WeakSet(), [], moefication.moefy

    def counting(model, *rest):
        gc.collect()
        model = real(model, *rest)
        if next(model.parameters()).device.type != "meta":
            alive.add(model)
            most.append(len(alive))
        return model

    monkeypatch.setattr(moefication, "moefy", counting)
    run([*words, "--variants", "none,ce", "--seeds", "0", "1", "--epochs", "1"])
    assert most == [1] * 5  # the first: the load before anything is written


@pytest.mark.parametrize(
    "error", [ConnectionError("reset by peer"), HTTPError("timed out"), OSError("Consistency check failed")]
)
def test_an_interrupted_download_is_one_line(error, monkeypatch):
    def broken():
        raise error

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(UserError, match="--model: the model m cannot be loaded .*run the command again, or first remove"):
        glue.from_hub("the model", "--model", "m", broken)


def test_odd_data_train(words, data, tmp_path, capsys):
    """One example; a batch above the data; blank sentences, which are counted; a class that dev lacks, which is told."""
    write_split(tmp_path / "odd" / "rte", "train", 1)
    write_split(tmp_path / "odd" / "rte", "validation", 3, sentence2=["", "  ", "a cat"], label=[0, 0, 0])
    run([*words, "--data-dir", tmp_path / "odd", "--epochs", "1"])
    printed = capsys.readouterr().out
    assert "2 of 3 texts in validation, column sentence2, are blank" in printed
    assert "validation has no example of class 1" in printed and "rte-1: 1 train, 3 dev" in printed


def test_a_tokenised_data_set_is_kept(words, data, model, monkeypatch):
    """A second run on the same data tokenises nothing: the hash of the function and its tokenizer is the same."""
    task, tokenizer = TASKS["rte"], BertTokenizerFast.from_pretrained(model)
    files = {split: glue.load_splits("rte", task, str(data))[split] for split in ("train", "validation")}
    first = glue.tokenize(files, task, tokenizer, 16)
    again = glue.tokenize(files, task, BertTokenizerFast.from_pretrained(model), 16)
    assert all(first[split]._fingerprint == again[split]._fingerprint for split in files)
    other = glue.tokenize(files, task, tokenizer, 12)
    assert first["train"]._fingerprint != other["train"]._fingerprint


def test_a_saved_run_predicts_and_is_inspected(words, tmp_path, capsys):
    run([*words, "--save-model", "--epochs", "1"])
    (tmp_path / "new.csv").write_text('sentence1,sentence2\nthe cat,a dog\nfish,"red, blue"\n')
    capsys.readouterr()
    run(["--predict", tmp_path / "new.csv", "--run", tmp_path / "out", "--device", "cpu"])
    lines = (tmp_path / "new.predictions.csv").read_text().splitlines()
    assert len(lines) == 3 and "prediction" in lines[0] and "probability_" in lines[0]
    run(["--inspect", tmp_path / "out", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "example 1" in printed and "conflict ratio" in printed and "[CLS]" in printed


def bad_data(tmp_path, **columns):
    write_split(tmp_path / "bad" / "rte", "train", 8, **columns)
    write_split(tmp_path / "bad" / "rte", "validation", 4)
    return tmp_path / "bad"


def other_model(tmp_path, model, config):
    folder = tmp_path / "other"
    folder.mkdir()
    for path in model.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    if config is not None:
        config.save_pretrained(folder)
    return folder


def damaged_model(tmp_path, model, cut: bool):
    """Weights that break off, or that are another model's."""
    folder = tmp_path / ("cut" if cut else "foreign")
    shutil.copytree(model, folder)
    if cut:
        os.truncate(folder / "model.safetensors", 200)
    else:
        weights = load_file(folder / "model.safetensors")
        save_file(
            {f"other.{name}": value for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
        )
    return folder


def test_bad_input_is_one_line_that_names_the_flag_and_writes_nothing(words, model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    cases = {
        "--task: invalid choice: 'rtee'": ["--task", "rtee"],
        "--data-dir: .*nowhere.: no such folder": ["--data-dir", tmp_path / "nowhere"],
        "--data-dir .*empty has no rte/train": ["--data-dir", tmp_path / "empty"],
        "--data-dir .*bad: train has no column 'sentence2'": ["--data-dir", bad_data(tmp_path / "1", sentence2=None)],
        "--data-dir .*bad: train has the label 7": ["--data-dir", bad_data(tmp_path / "2", label=[0, 1, 7, 0, 1, 0, 1, 0])],
        "--model .*empty: it has no config.json": ["--model", tmp_path / "empty"],
        "--model .*nowhere: no such folder": ["--model", tmp_path / "nowhere"],
        "--model: model type 'gpt2' is not BERT-like": ["--model", other_model(tmp_path, model, GPT2Config())],
        "--top-k 5 is above --num-experts 4": ["--top-k", 5],
        "--select random chooses pairs for a conflict loss": ["--select", "random", "--conflict-loss", "none"],
        "--moe-layers: layers='7' names 7, but the model has 3": ["--moe-layers", 7],
        "--moe-layers: layers='first'": ["--moe-layers", "first"],
        "--num-experts: 32 neurons cannot be split into 5": ["--experts", "split", "--num-experts", 5],
        "--output-dir: .*file.*: Not a directory; name another": ["--output-dir", tmp_path / "file" / "out"],
        "--max-length 64: the model has 32 positions": ["--max-length", 64],
        "--conflict-loss reroute needs --top-k below": ["--conflict-loss", "reroute", "--top-k", 4],
        "--variants ce2: unknown": ["--variants", "none", "ce2"],
        "--variants dense-one: unknown": ["--variants", "dense-one"],
        "--variants ce ce: one repeated": ["--variants", "ce,ce"],
        "--lrs 0.1 0.1: one repeated": ["--lrs", 0.1, 0.1],
        "--passes is part of a variant's name": ["--compare", "--passes", "one"],
        "--resume keeps .* and --overwrite replaces": ["--resume", "--overwrite"],
        "--predict FILE needs --run": ["--predict", tmp_path / "file"],
        "--run goes with --predict": ["--run", tmp_path],
        "--inspect: .*nowhere.: no such folder": ["--inspect", tmp_path / "nowhere"],
        "--epochs is not read by --inspect": ["--inspect", tmp_path, "--epochs", 3],
        "--inspect is not read by --predict": ["--predict", tmp_path / "file", "--run", tmp_path, "--inspect", tmp_path],
        "--variants is empty": ["--variants", ","],
        "--lr 0.1 is not read when --lrs is given": ["--lr", 0.1, "--lrs", 0.2, 0.3],
        "--beta: 'inf' must be a number at least 0": ["--beta", "inf"],
        "--data-dir .*bad: train has labels of type (large_)?string": [
            "--data-dir",
            bad_data(tmp_path / "5", label=[*"abababab"]),
        ],
        "--model: the model .*cut cannot be loaded .*fetch it again": ["--model", damaged_model(tmp_path, model, cut=True)],
        "--model .*foreign: its weights lack bert.": ["--model", damaged_model(tmp_path, model, cut=False)],
        "--seeds: '4294967296' must be an integer between": ["--seeds", 2**32],
        "--data-dir .*bad: train has no label in row 2": [
            "--data-dir",
            bad_data(tmp_path / "3", label=[0, 1, None, 0, 1, 0, 1, 0]),
        ],
        "--data-dir .*bad: train has no text in column 'sentence2', row 1": [
            "--data-dir",
            bad_data(tmp_path / "4", sentence2=["a", None, *"abcdef"]),
        ],  # fmt: skip
        "--seeds 1 1: one repeated": ["--seeds", 1, 1],
        "--lr: 'fast' must be a number at least 0": ["--lr", "fast"],
        "--batch-size: '0' must be an integer at least 1": ["--batch-size", 0],
        "--tau: 'nan' must be a number between": ["--tau", "nan"],
        "unrecognized arguments: --conflict": ["--conflict", "ce"],
        "--toy makes its own model and data": ["--toy"],
        "--experts-from copies whole FFNs .*or --experts split": ["--experts-from", model, "--experts", "split"],
        "--experts-from copies whole FFNs .*or --router dynmoe": ["--experts-from", model, "--router", "dynmoe"],
        "--experts-from names 5 models for 4 experts": ["--experts-from", *[model] * 5],
        "--experts-from .*nowhere: no such folder": ["--experts-from", model, tmp_path / "nowhere"],
        "--experts-from .*other: its model_type is gpt2, that of --model is bert": ["--experts-from", tmp_path / "other"],
        "--experts-from: the model .*cut cannot be loaded": ["--experts-from", model, tmp_path / "cut"],
        "--toy makes pairs in the format of rte": ["--toy", "--task", "cola"],
        "--precision fp16 needs a GPU": ["--precision", "fp16"],
    }
    if not torch.cuda.is_available():
        cases["--device cuda: this machine has"] = ["--device", "cuda"]
    for message, flags in cases.items():
        capsys.readouterr()
        use = bool({"--inspect", "--predict"} & {*flags})
        try:
            run([*(words if not use else []), *flags])
        except UserError as error:
            text = str(error)
        except SystemExit as stop:
            assert stop.code == 2
            text = capsys.readouterr().err.strip()
        else:
            pytest.fail(f"{flags} was taken")
        assert re.search(message, text) and "\n" not in text, (message, text)
        assert not (tmp_path / "out").exists(), message


def script(*words, **environment):
    """A process that was started, and a function that waits for it: what it printed on stderr."""
    command, environment = [sys.executable, "glue_moefy.py", *map(str, words)], os.environ | environment
    done = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return done, lambda: done.communicate(timeout=120)[1]


def test_without_network_and_cache_the_message_names_both_ways_on(tmp_path):
    nothing = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": ""}
    done, wait = script("--task", "rte", "--output-dir", tmp_path / "out", **nothing)
    stderr = wait()
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    (line,) = stderr.strip().splitlines()
    assert "cannot be reached" in line and "--model DIR --data-dir DIR" in line and "--toy" in line


def test_an_unreachable_hub_is_noticed_in_time(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not hub_is_reachable(Parser(), seconds=2)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.slow
def test_exit_codes_of_the_script(words, tmp_path):
    wrong, wait_for_wrong = script(*words, "--moe-layers", "9", OMP_NUM_THREADS="1")  # both at once
    failed, wait = script(*words, "--lr", "1e30", "--output-dir", tmp_path / "failed", OMP_NUM_THREADS="1")
    assert wait().strip().splitlines()[-1].startswith("glue_moefy.py: stopped: the loss is nan")
    assert wait_for_wrong() and (wrong.returncode, failed.returncode) == (2, 1)


def test_help_needs_no_heavy_import_and_shows_every_default():
    code = "import runpy, sys; sys.argv = ['glue_moefy.py', '--help']\n"
    code += "try: runpy.run_path('glue_moefy.py', run_name='__main__')\n"
    code += "except SystemExit: print('heavy:', [m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "heavy: []" in done.stdout
    flags = re.findall(r"^  (--[\w-]+)", done.stdout, re.M)
    assert len(flags) == len(set(flags)) > 30


def test_every_flag_is_read():
    files = ("glue_moefy.py", "lab/run/options.py", "lab/run/runs.py", "lab/run/training.py")
    source = "".join((ROOT / name).read_text() for name in files)
    flags = {action.dest for action in glue_moefy.make_parser()._actions} - {"help"}
    dead = [flag for flag in flags if not re.search(rf'\bargs\.{flag}\b|getattr\(.*"{flag}"|[(,] "{flag}"', source)]
    assert len(flags) > 30 and not dead, dead


def test_method_defaults_are_those_of_the_config():
    """The flags repeat them, as --help must answer without importing torch. beta alone differs: docs/guide.md."""
    args = glue_moefy.make_parser().parse_args(["--task", "rte"])
    config = STGCConfig()
    assert (args.beta, config.beta) == (0.1, 1.0)
    for field in dataclasses.fields(config):
        if hasattr(args, field.name) and field.name not in ("beta", "seed"):  # --seed: of the page
            assert getattr(args, field.name) == getattr(config, field.name), field.name
