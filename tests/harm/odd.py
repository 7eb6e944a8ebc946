"""Damaged and odd files: of a model, a tokenizer, pictures, a card, a record, a checkpoint, a curve and a table. Each is
refused in one line, before anything is allocated for it or written. Memory that is too small, too, is one line.
"""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from harm.build import CARD, ENTRY, ONCE, PIXELS, refused, stopped
from harm.models import CLIP, LM, RUN, TRAIN, change, refused_in_one_line_before_anything_is_written
from pyarrow import parquet, table
from transformers import Gemma2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import glue_moefy
import toy_lvlm
from lab.bench import peer, step
from lab.report import demo, figures, readme
from lab.run import cli, files, hub, runs, training
from lab.run.cli import RunFailed, UserError, run_main
from lab.run.hub import Checkpoint
from lab.text import glue, tables
from lab.text.tasks import TASKS
from lab.vision import lvlm
from lab.vision.instructions import IMAGE, make_tokenizer

# ---- 1. Models ----


def text(content, file="config.json"):
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def part(which, **values):
    """Values of one part of a CLIP's config."""

    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        config[which] |= values
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def gemma(**values):
    """A config that makes a list of its layers."""
    return lambda folder: text(json.dumps(Gemma2Config().to_dict() | {"layer_types": None} | values))(folder)


def deep(depth):
    return '{"a": ' * depth + "1" + "}" * depth


def damaged_model(*row, root, tmp_path, monkeypatch):
    """As the other models that are refused, and before the data are loaded."""
    monkeypatch.setattr(glue, "load_splits", lambda *_: pytest.fail("loaded data before the model was checked"))
    refused_in_one_line_before_anything_is_written(*row, root=root, tmp_path=tmp_path)


def nothing_is_allocated_for_a_sketch(*, good):
    """Where the files do not bound it, as on the hub, the machine does."""
    checkpoint = Checkpoint("--lm", good / "lm")
    config = checkpoint.config(vocab_size=10**6, hidden_size=10**5, intermediate_size=10**5)
    loader = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with pytest.raises(UserError, match=MANY):
        checkpoint.sketch("the model", loader, config)
    (sketched,) = {one.device.type for one in checkpoint.sketch("the model", loader, checkpoint.config()).parameters()}
    assert sketched == "meta"
    with pytest.raises(ValueError, match=MANY):
        hub.sketch(lambda: torch.nn.Linear(10**8, 10**6), "google/none")


def flags_that_do_not_go_together(flags, message, *, capsys):
    for script, words in ((glue_moefy, ["--task", "rte", "--toy"]), (toy_lvlm, [])):
        if ("--experts-from" if script is toy_lvlm else "--capacity") not in flags:  # which it has not
            with stopped(capsys, message):
                script.parse([*words, *flags.split()])


# ---- 2. Records, stages, curves and checkpoints ----

RECORD = {"name": "toy", "config": {}, "data": {}, "runs": [ENTRY], "stages": [{"stage": "clip", "seed": 0}]}


def written(content) -> bytes:
    return content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode()


def damaged_record(content, *, tmp_path):
    (tmp_path / "results.json").write_bytes(written(RECORD))
    assert runs.read_record(tmp_path) == RECORD
    (tmp_path / "results.json").write_bytes(written(content))
    with refused("results.json cannot be read .*remove it, or name another", tmp_path):
        runs.read_record(tmp_path)


def damaged_stage(content, *, tmp_path):
    (tmp_path / "stage.json").write_bytes(written(content))
    saved = Checkpoint("--output-dir", tmp_path, again="remove it to train it again")
    with refused("--output-dir: stage.json of .*remove it to train it again", tmp_path):
        saved.read("stage.json", **runs.STAGE)


LINE = {"step": 1, "epoch": 1, "loss": 0.5, "layers": [{"layer": "a", "load": [0.5, 0.5]}]}


def damaged_curve(content, *, tmp_path):
    curve = tmp_path / "ce-s0.jsonl"
    curve.write_bytes(written(LINE) + b"\n" + written(LINE))
    assert runs.read_lines(curve) == [LINE, LINE]
    curve.write_bytes(written(LINE) + b"\n" + written(content) + b"\n")
    assert runs.read_lines(curve, 1) == [LINE] if not isinstance(content, bytes) else True
    with refused("ce-s0.jsonl cannot be read .*start again with --overwrite", tmp_path, error=RunFailed):
        runs.read_lines(curve, 2)


def damaged_checkpoint(content, *, tmp_path, capsys):
    """It is named, and the one before it is used."""
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "state.json").write_bytes(written(content))
    checkpoints = runs.Checkpoints(tmp_path, runs.make_accelerator("cpu", "fp32"), None, None, None)
    assert checkpoints.load() is None
    printed = capsys.readouterr().out
    assert printed.startswith(f"damaged checkpoint {tmp_path}") and printed.count("\n") == 1 and len(printed) < 400


# ---- 3. Numbers that are not finite ----


def what_is_recorded_is_finite(*, tmp_path):
    for value in (math.nan, math.inf, [1.0, -math.inf]):
        with pytest.raises(ValueError, match="not JSON compliant"):
            files.write_json(tmp_path / "a.json", {"value": value})
        with pytest.raises(ValueError, match="not JSON compliant"):
            runs.RunLog(tmp_path / "a.jsonl", 1).write({"step": 1, "loss": value})
    assert not (tmp_path / "a.json").exists()
    stats = [{"layer": "a", "load": [1.0], "consistency": math.nan, "conflict_ratio": 0.5}, {"conflict_ratio": math.inf}]
    assert runs.stats_line(stats) == {
        "conflict_ratio": 0.5,
        "layers": [{"layer": "a", "load": [1.0], "conflict_ratio": 0.5}, {}],
    }


def score_that_is_not_finite(score, *, tmp_path):
    run = training.Training.__new__(training.Training)
    run.at, run.log = training.Progress(), runs.RunLog(tmp_path / "a.jsonl", 1)
    run.losses, run.accelerator = [], None
    with refused("the scores after epoch 1 .*lower the learning rate", error=RunFailed):
        run.epoch_done({"pearson": score, "score": 0.5})
    assert not (tmp_path / "a.jsonl").read_text()


# ---- 4. Tables ----


def table_to_predict(name, content, message, *, tmp_path):
    """None: it is read."""
    file = tmp_path / name
    if isinstance(content, str):
        file.write_text(content)
    else:
        parquet.write_table(table([["a"]] * len(content), names=content), file)
    if message is None:
        _, (first, _) = tables.load_rows(file, ["sentence1", "sentence2"], [])
        assert first == ["a"] or first[0].strip() == LONG
        return
    with refused(f"^--predict.*{message}.*: fix it$", tmp_path):
        tables.load_rows(file, ["sentence1", "sentence2"], [])


def two_columns_of_one_name_to_train_on(*, tmp_path):
    file = tmp_path / "rte" / "train-0.parquet"
    file.parent.mkdir()
    names = ["sentence1", "sentence2", "label", "label"]
    parquet.write_table(table([["a"], ["b"], [0], [1]], names=names), file)
    shutil.copy(file, file.parent / "validation-0.parquet")
    with refused("train-0.parquet .*'label' is there twice", tmp_path):
        glue.load_splits("rte", TASKS["rte"], str(tmp_path))


# ---- 5. Memory ----


def too_little_memory(error, message, *, capsys):
    def main():
        raise error

    with stopped(capsys, f"{message}.*lower --batch-size or --max-length, or use a smaller model", cli.FAILED):
        run_main("x.py", main)
    with refused("the memory is too small for it") as found:
        hub.from_hub("the model", "--model", "a/b", main)
    assert "fetch it again" not in str(found.value)


def the_allocator_says_what_we_look_for(*, capsys):
    with stopped(capsys, "can't allocate memory: you tried to allocate", cli.FAILED):
        run_main("x.py", lambda: torch.empty(1 << 50))
    with pytest.raises(RuntimeError, match="shape"):
        run_main("x.py", lambda: torch.empty(2).view(3))


# ---- 6. Programs that draw ----


def program_that_draws(module, words, code, message, *, tmp_path, monkeypatch, capsys):
    for name, record in (("empty", RECORD | {"runs": []}), ("bad", "[]"), ("fine", RECORD)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_bytes(written(record))
    (tmp_path / "fine" / "ce-s0.jsonl").write_text("{")
    (tmp_path / "file").touch()
    (tmp_path / "page" / "results").mkdir(parents=True)
    (tmp_path / "page" / "README.md").touch()
    (tmp_path / "page" / "results" / ("bench.json" if "bench.json" in message else "results.json")).write_text("[")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lab.report.readme.ROOT", tmp_path / "page")
    monkeypatch.setattr(sys, "argv", ["x", *words])
    before = sorted(tmp_path.rglob("*"))
    main = {"figures": figures, "demo": demo, "page": readme, "step": step, "peer": peer}[module].main
    if module == "demo":
        moment = demo.Moment(torch.rand(4), torch.eye(2))
        monkeypatch.setattr(demo, "run_demo", lambda steps: ([[0.0] * 3], moment, moment, 0))
    with stopped(capsys, message, code):
        run_main("x", main, resumes=False)
    assert sorted(tmp_path.rglob("*")) == before


# ---- 7. What is said ----


def captions_that_are_cut_are_counted(length, cut):
    tokenizer = make_tokenizer(["a b"])
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    captions = ["1" * length, "2" * length, "a"]
    collate = lvlm.CollateClip(images, captions, tokenizer, PIXELS)
    assert collate.cut == cut and all(len(ids) <= 77 for ids in collate.ids)


def picture_word_in_a_question(question, said, *, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lvlm, "load", lambda saved: (torch.nn.Linear(1, 1), None, CARD))
    monkeypatch.setattr(lvlm, "ask", lambda *_: "an answer")
    monkeypatch.setattr(toy_lvlm.instructions, "unknown_words", lambda *_: [])
    (tmp_path / lvlm.CARD).touch()
    toy_lvlm.main(toy_lvlm.parse(["--ask", question, "--run", str(tmp_path), "--device", "cpu"]))
    out, err = capsys.readouterr()
    assert out == "an answer\n" and err.count(f"note: {IMAGE} in a question is left out") == said


def one_note_counts_the_cut_captions(*, monkeypatch, capsys):
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    own, texts = SimpleNamespace(images_N3SS=images), ["1" * 300, "a"]
    data = SimpleNamespace(train=own, test=own, captions=(texts, texts), tokenizer=make_tokenizer(["a b"]), pixels=PIXELS)
    job = SimpleNamespace(data=data, print_line=print, loader=lambda *_: None, args=SimpleNamespace(batch_size=2))
    monkeypatch.setattr(toy_lvlm, "train", lambda *_, **__: {})
    monkeypatch.setattr(lvlm, "retrieval", lambda *_: (1.0, 2))
    monkeypatch.setattr(toy_lvlm, "stage", lambda job, name, load, make: make(None, "clip-s0"))
    toy_lvlm.clip_stage(job)
    assert capsys.readouterr().out.count("note: 2 of 4 captions are cut: CLIP reads 77 tokens") == 1


# ---- 8. The table ----

OBJECT, MANY = "is not a JSON object", "config describes .* weights, its files or this machine hold"
LONG = "x" * 200_000
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate {}"
CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8.00 GiB\nof which 1 is free."
CASES = {
    damaged_model: {
        **{
            f"{flag.split()[1]}, {case}": (flag, edit, message)
            for flag in (TRAIN, RUN, LM, CLIP)
            for case, (edit, message) in {
                "null": (text("null"), OBJECT),
                "a number": (text("5"), OBJECT),
                "nothing": (text(""), OBJECT),
                "a text": (text('"bert"'), OBJECT),
                "deep": (text(deep(10**5)), OBJECT),
                "less deep": (text(deep(900)), "recursion|model type is none|Unrecognized"),
                "not UTF-8": (text(b'{"model_type": "\xff"}'), OBJECT),
                "a key twice": (text('{"hidden_size": 1, "hidden_size": 2}'), "'hidden_size' is there twice"),
                "a part that is a number": (change(text_config=5), "cannot be loaded"),
            }.items()
        },
        **{
            f"{flag.split()[1]}, {case}": (flag, edit, message)
            for flag in (TRAIN, RUN, LM)
            for case, (edit, message) in {
                "size abc": (change(hidden_size="abc"), "hidden_size"),
                "size 0": (change(hidden_size=0), "its hidden_size is 0"),
                "size -1": (change(hidden_size=-1), "its hidden_size is -1"),
                "size 10^12": (change(hidden_size=10**12), f"{MANY}|overflowed"),
                "size 10^9": (change(hidden_size=10**9), MANY),
                "FFN 10^10": (change(intermediate_size=10**10), MANY),
                "FFN 0": (change(intermediate_size=0), "its intermediate_size is 0"),
                "words 10^11": (change(vocab_size=10**11), MANY),
                "10^9 layers": (change(num_hidden_layers=10**9), f"its num_hidden_layers is {10**9}"),
                "no layer": (change(num_hidden_layers=0), "its num_hidden_layers is 0"),
                "-3 layers": (change(num_hidden_layers=-3), "its num_hidden_layers is -3"),
                "heads -1": (change(num_attention_heads=-1), "its num_attention_heads is -1"),
                "an unknown activation": (change(hidden_act="nope"), "nope"),
                "an activation 5": (change(hidden_act=5), "hidden_act"),
            }.items()
        },
        **{f"{flag.split()[1]}, no size": (flag, change(hidden_size=None), "the shape|size mismatch") for flag in (RUN, LM)},
        "bert, positions 10^12": (TRAIN, change(max_position_embeddings=10**12), MANY),
        "run, 10^9 experts": (RUN, change(moe={"layers": "1", "num_experts": 10**9}), MANY),
        "run, 10^9 experts of a cosine router": (
            RUN,
            change(moe={"layers": "1", "num_experts": 10**9, "router": "cosine"}),
            MANY,
        ),
        "run, fewer places than experts of DynMoE's router": (
            RUN,
            change(moe={"layers": "1", "num_experts": 4, "router": "dynmoe", "max_experts": 2}),
            "max_experts=2 must be at least num_experts=4",
        ),
        "run, parts of an FFN with DynMoE's router": (
            RUN,
            change(moe={"layers": "1", "num_experts": 4, "router": "dynmoe", "experts": "split"}),
            "needs experts='copy'",
        ),
        "run, 10^9 places of DynMoE's router": (
            RUN,
            change(moe={"layers": "1", "num_experts": 4, "router": "dynmoe", "max_experts": 10**9}),
            MANY,
        ),
        "run, a spec that is a list": (RUN, change(moe=[1]), "mapping"),
        "run, architectures 5": (RUN, change(architectures=5), "no valid architectures"),
        "lm, a list of 10^9 layers": (LM, gemma(num_hidden_layers=10**9), f"its num_hidden_layers is {10**9}"),
        "clip, pictures: no layer": (CLIP, part("vision_config", num_hidden_layers=0), "its num_hidden_layers is 0"),
        "clip, pictures: -1 layers": (CLIP, part("vision_config", num_hidden_layers=-1), "its num_hidden_layers is -1"),
        "clip, texts: 10^9 layers": (
            CLIP,
            part("text_config", num_hidden_layers=10**9),
            f"its num_hidden_layers is {10**9}",
        ),
        "clip, texts: size 10^9": (CLIP, part("text_config", hidden_size=10**9), MANY),
        "clip, pictures: FFN 10^11": (CLIP, part("vision_config", intermediate_size=10**11), MANY),
        "clip, pictures: abc": (CLIP, part("vision_config", hidden_size="abc"), "hidden_size"),
        "clip, pictures: unknown activation": (CLIP, part("vision_config", hidden_act="nope"), "nope"),
        "clip, pictures: patch 0": (CLIP, part("vision_config", patch_size=0), "cannot be loaded"),
        **{
            f"{flag.split()[1]}, {file} {content}": (flag, text(content, file), "tokenizer")
            for flag in (TRAIN, RUN, LM)
            for file in ("tokenizer.json", "tokenizer_config.json")
            for content in ("null", "[]")
        },
        **{f"{flag.split()[1]}, no words": (flag, text("{}", "tokenizer.json"), "tokenizer") for flag in (TRAIN, RUN, LM)},
        **{
            f"{flag.split()[1]}, a length abc": (
                flag,
                change("tokenizer_config.json", model_max_length="abc"),
                "the tokenizer",
            )
            for flag in (TRAIN, RUN)
        },
        **{
            f"clip, pictures {number}": (CLIP, text(content, "preprocessor_config.json"), "the image processor")
            for number, content in enumerate(["null", "[]", deep(10**5)])
        },
        **{
            f"clip, {key}={value}": (CLIP, change("preprocessor_config.json", **{key: value}), "the image processor")
            for key, value in [
                *(("image_mean", value) for value in (5, [1], "abc", [0.1, 0.2, math.inf])),
                *(
                    ("image_std", value)
                    for value in ([0, 0, 0], ["a", "b", "c"], [1e-320] * 3, [math.nan] * 3, [0.1] * 4, {})
                ),
            ]
        },
        **{
            f"run, card {number}": (RUN, text(content, "task.json"), "task.json")
            for number, content in enumerate(["null", "[]", "{}", deep(10**5)])
        },
    },
    nothing_is_allocated_for_a_sketch: ONCE,
    damaged_record: {
        "null": "null",
        "a list": [],
        "nothing": "",
        "deep": deep(10**5),
        "not UTF-8": b"\xff",
        "cut": json.dumps(RECORD)[:-9],
        "a key twice": '{"name": "a", "name": "b"}',
        "runs null": RECORD | {"runs": None},
        "runs of numbers": RECORD | {"runs": [1]},
        "stages 5": RECORD | {"stages": 5},
        "stages of texts": RECORD | {"stages": ["a"]},
        "a stage without a name": RECORD | {"stages": [{"seed": 0}]},
        "scores of a stage": RECORD | {"stages": [{"stage": "stage2", "seed": 0, "scores": 5}]},
        "resumed by null": RECORD | {"resumed": [None]},
        "versions 5": RECORD | {"resumed": [{"versions": 5}]},
        "versions null": RECORD | {"resumed": [{"versions": None}]},
        "versions of the record 5": RECORD | {"versions": 5},
        **{f"made from {value!r}": RECORD | {"made_from": value} for value in (5, [1], "ab")},
        **{
            f"{key} {value}": RECORD | {"runs": [ENTRY | {key: value}]}
            for key, value in [
                ("variant", 5),
                ("seed", "0"),
                ("lr", None),
                ("last", None),
                ("last", {"score": "x"}),
                ("best", []),
                ("best", {"score": None}),
                ("collapsed", "no"),
                ("limited", 5),
            ]
        },
    },
    damaged_stage: [
        "null",
        "[]",
        "",
        deep(10**5),
        b"\xff",
        '{"stage": 5, "seed": 0}',
        '{"stage": "a"}',
        '{"stage": "a", "seed": null}',
    ],
    damaged_curve: [
        "null",
        "[]",
        "",
        "{",
        {},
        LINE | {"step": "1"},
        LINE | {"loss": "x"},
        LINE | {"loss": None},
        LINE | {"layers": 5},
        *[LINE | {"layers": value} for value in ([5], [None], [{"load": []}], [{"load": "abc"}], [{"load": ["a"]}])],
        deep(10**5),
        '{"step": 1, "step": 2}',
        b'{"step": 1, "a": "\xff"}',
    ],
    damaged_checkpoint: [
        "null",
        "[]",
        "",
        "{}",
        deep(10**5),
        b"\xff",
        '{"digest": 5}',
        '{"digest": "a", "state": 5, "sha256": {}}',
    ],
    what_is_recorded_is_finite: ONCE,
    score_that_is_not_finite: [math.nan, math.inf, -math.inf],
    table_to_predict: {
        "a long field": ("a.csv", f"sentence1,sentence2\n{LONG},b\n", None),
        "a long quoted field": ("a.csv", f'sentence1,sentence2\n"{LONG}\n",b\n', None),
        "a long field of another column": ("a.csv", f"sentence1,sentence2,x\na,b,{LONG}\n", None),
        "a long tsv field": ("a.tsv", f"sentence1\tsentence2\n{LONG}\tb\n", None),
        "two columns, csv": ("a.csv", "sentence1,sentence2,x,x\na,b,c,d\n", "'x' is there twice"),
        "two columns, tsv": ("a.tsv", "sentence1\tsentence2\tsentence1\na\tb\tc\n", "'sentence1' is there twice"),
        "a key twice": (
            "a.jsonl",
            '{"sentence1": "a", "sentence2": "b", "sentence1": "c"}',
            "line 1 .*'sentence1' is there",
        ),
        "another key twice": ("a.jsonl", '\n{"sentence1": "a", "sentence2": "b", "x": 1, "x": 2}', "line 2 .*'x' is there"),
        "a key twice, inside": (
            "a.json",
            '{"sentence1": "a", "sentence2": "b", "x": {"y": 1, "y": 2}}',
            "'y' is there twice",
        ),
        "a deep line": ("a.jsonl", deep(10**5), "line 1 is not a JSON object"),
        "two columns, parquet": ("a.parquet", ["sentence1", "sentence2", "sentence2"], "'sentence2' is there twice"),
        "two others, parquet": ("a.parquet", ["sentence1", "sentence2", "x", "x"], "'x' is there twice"),
    },
    two_columns_of_one_name_to_train_on: ONCE,
    too_little_memory: {
        "Python's": (MemoryError(), "out of memory"),
        "numpy's": (MemoryError("Unable to allocate 8.00 TiB for an array"), "out of memory"),
        "the CPU's": (RuntimeError(CPU.format(10**15)), "can't allocate memory: you tried to allocate 1"),
        "Windows'": (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "not enough memory: you tried"),
        "CUDA's": (torch.OutOfMemoryError(CUDA), "out of memory. Tried to allocate 20.00 GiB"),
        "MPS'": (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "out of memory"),
    },
    the_allocator_says_what_we_look_for: ONCE,
    program_that_draws: {
        "a folder that is missing": ("figures", ["none"], 2, "none: no results.json"),
        "a folder without a record": ("figures", ["."], 2, "no results.json"),
        "no run yet": ("figures", ["empty"], 2, "no results.json with a finished run"),
        "a damaged record": ("figures", ["bad"], 2, "results.json cannot be read"),
        "one damaged record of two": ("figures", ["fine", "bad"], 2, "results.json cannot be read"),
        "a damaged curve": ("figures", ["fine"], 1, "ce-s0.jsonl cannot be read"),
        "no folder for the picture": ("figures", ["--idea", "none/a.png"], 2, "cannot be drawn"),
        "a folder in its place": ("figures", ["--idea", "fine"], 2, "cannot be drawn"),
        "an unknown format": ("figures", ["--idea", "a.xyz"], 2, "a.xyz: cannot be drawn .*xyz.* not supported"),
        "a file as folder": ("figures", ["--tutorial", "file"], 2, "cannot be drawn"),
        "an unknown flag": ("figures", ["fine", "--ideas"], 2, "--ideas"),
        "the demo, an unknown format": ("demo", ["a.xyz"], 2, "a.xyz: cannot be drawn"),
        "the demo, no folder": ("demo", ["none/a.png"], 2, "cannot be drawn"),
        "the bench, no folder": ("step", ["--output", "none/a.json"], 2, "'none/a.json': no such folder"),
        "the bench, a folder": ("step", ["--output", "fine"], 2, "--output: 'fine': it is not a file .*name another file"),
        "peers, no folder": ("peer", ["--model", "m", "--output", "none/a.json"], 2, "'none/a.json': no such folder"),
        "the page, a word": ("page", ["word"], 2, "word"),
        "the page, a damaged record": ("page", [], 2, "results.json cannot be read"),
        "the page, a damaged bench": ("page", [], 2, "bench.json .*restore it"),
    },
    flags_that_do_not_go_together: [
        ("--max-experts 8", "--max-experts goes with --router dynmoe: leave it out, or add --router dynmoe"),
        ("--router dynmoe --num-experts 8 --max-experts 7", "--max-experts 7 is below --num-experts 8: raise it"),
        ("--router dynmoe --max-experts 0", "--max-experts: '0' must be an integer"),
        (
            "--router dynmoe --experts split",
            "--router dynmoe takes the mean of a token's experts: leave out --experts split",
        ),
        ("--router dynmoe --no-normalize", "leave out --no-normalize"),
        ("--router dynmoe --top-k 3", "--top-k 3: with --router dynmoe only the variant random reads it"),
        ("--router dynmoe --num-experts 1 --variants none random", "--top-k 2 is above --num-experts 1: lower one"),
        ("--router dynmoe --conflict-loss reroute", "--router dynmoe cannot reroute.*use ce, mse or flat"),
        ("--router dynmoe --num-experts 2 --conflict-loss reroute", "--router dynmoe cannot reroute.*use ce, mse or flat"),
        ("--router dynmoe --variants none,placebo-reroute", "--router dynmoe cannot reroute"),
        ("--router dynmoe --capacity 0.5", "--capacity needs a fixed number of experts per token"),
        ("--select all --gradients weight", "--select all reads no gradients: leave out --gradients weight, or --select"),
        ("--select all --conflict-loss reroute", "reads no gradients: leave out --conflict-loss reroute, or --select"),
        ("--experts-from tests", "--toy makes its own model: leave out --experts-from, or leave out --toy"),
    ],
    captions_that_are_cut_are_counted: [(10, 0), (75, 0), (77, 2), (300, 2)],
    picture_word_in_a_question: [("what is it?", 0), (f"{IMAGE} what is it?", 1), (f"a{IMAGE}b{IMAGE}", 1)],
    one_note_counts_the_cut_captions: ONCE,
}
