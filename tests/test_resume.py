"""Kill at any moment, resume, and end where the run that was never killed ends: weights, log and record, bit for bit."""

import errno
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from conftest import without_pictures
from forked import Forked
from safetensors.torch import load_file
from test_glue import data, model, plain, run, words  # noqa: F401  (fixtures)

from lab.run import runs
from lab.run.cli import Interrupted, RunFailed, UserError

CLOCK = ("seconds", "film_seconds", "samples_per_second", "peak_memory_bytes")


SMALL = (
    "--task rte --moe-layers 1 --num-experts 4 --epochs 3 --save-steps 2 --seeds 0 --batch-size 8 --max-length 16".split()
)
SMALL += "--device cpu --save-model".split()


class Killed(Exception):
    """Stands for SIGKILL: nothing of ours catches it."""


def kill_at(monkeypatch, step: int) -> None:
    """The process ends in the middle of its step-th optimizer step, counted over the calls of `run` from here on."""
    real, count = torch.optim.AdamW.step, [0]

    def dying(self, *args, **kwargs):
        count[0] += 1
        if count[0] == step:
            raise Killed
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", dying)


def outcome(folder):
    """What two runs of the same command share: record without clocks, curves, weights."""
    record = json.loads((folder / "results.json").read_text())
    entries = [{key: value for key, value in entry.items() if key not in CLOCK} for entry in record["runs"]]
    curves = {path.name: path.read_text() for path in sorted(folder.glob("*.jsonl"))}
    weights = {path.parent.name: load_file(path) for path in sorted(folder.glob("model-*/model.safetensors"))}
    return entries, curves, weights


def assert_same(one, other):
    assert one[:2] == other[:2] and one[2].keys() == other[2].keys() and one[2]
    for name, weights in one[2].items():
        assert weights.keys() == other[2][name].keys()
        assert all(torch.equal(value, other[2][name][key]) for key, value in weights.items()), name


KILLED = [
    "--log-steps 2",
    "--passes one --select random --every 2 --log-steps 1",
    "--conflict-loss none",
    "--variants dense",
]


@pytest.fixture(scope="module", params=KILLED)
def straight(request, data, model, tmp_path_factory):  # noqa: F811
    """A command with these flags, and the outcome of its run in one go."""
    command = [*SMALL, "--log-steps", "5", *request.param.split(), "--model", str(model), "--data-dir", str(data)]
    folder = tmp_path_factory.mktemp("straight") / "out"
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        run([*command, "--output-dir", folder])
    return command, outcome(folder)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 5, 8])  # before any checkpoint is there, within an epoch, and right after one
def test_a_killed_run_ends_as_if_it_had_not_been(straight, tmp_path, monkeypatch, step):
    command, whole = straight
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            run([*command, "--output-dir", tmp_path / "cut"])
    saved = sorted(int(path.name[5:]) for path in (tmp_path / "cut" / "checkpoints").glob("*/step-*"))
    assert saved == {2: [], 5: [3, 4], 8: [4, 6]}[step]
    torch.manual_seed(123)
    run([*command, "--output-dir", tmp_path / "cut", "--resume"])
    assert_same(whole, outcome(tmp_path / "cut"))
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_a_sweep_goes_on_where_it_stopped_and_does_nothing_twice(words, tmp_path, monkeypatch, capsys):  # noqa: F811
    command = [*words, "--variants", "none,ce", "--seeds", "0", "1", "--epochs", "1", "--save-model"]
    run([*command, "--output-dir", tmp_path / "whole"])
    with monkeypatch.context() as patch:
        kill_at(patch, 8)  # 3 steps a run: in the third
        with pytest.raises(Killed):
            run([*command, "--output-dir", tmp_path / "cut"])
    assert [(entry["variant"], entry["seed"]) for entry in outcome(tmp_path / "cut")[0]] == [("none", 0), ("ce", 0)]
    with monkeypatch.context() as patch:
        kill_at(patch, 7)  # two runs are left: six steps
        run([*command, "--output-dir", tmp_path / "cut", "--resume"])
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))
    record = json.loads((tmp_path / "cut" / "results.json").read_text())
    assert len(record["resumed"]) == 1 and record["resumed"][0]["versions"] == record["versions"]
    with monkeypatch.context() as patch:
        kill_at(patch, 1)  # complete: nothing is trained
        run([*command, "--output-dir", tmp_path / "cut", "--resume"])
    capsys.readouterr()
    run([*command, "--seeds", "0", "1", "2", "--output-dir", tmp_path / "cut", "--resume"])  # more seeds are no other run
    assert capsys.readouterr().out.count("complete already") == 4
    assert len(outcome(tmp_path / "cut")[0]) == 6


def test_two_configurations_never_share_a_folder(words, data, tmp_path):  # noqa: F811
    run([*words, "--epochs", "1"])
    for message, flags in {
        "was started with --beta 0.1; give the same": ["--beta", "0.5"],
        "was started with --epochs 1": ["--epochs", "2"],
        "was started with --conflict-loss ce": ["--conflict-loss", "mse"],
        "was started with --max-train-samples None": ["--max-train-samples", "8"],
    }.items():
        before = (tmp_path / "out" / "results.json").read_text()
        with pytest.raises(UserError, match=message):
            run([*words, "--epochs", "1", "--resume", *flags])
        assert (tmp_path / "out" / "results.json").read_text() == before


@pytest.fixture(scope="module")
def cut(data, model, tmp_path_factory):  # noqa: F811
    """A command, the outcome of its run, and the folder of one that was killed with checkpoints of steps 4 and 6 there."""
    root = tmp_path_factory.mktemp("cut")
    command = [*SMALL, "--model", str(model), "--data-dir", str(data)]
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        run([*command, "--output-dir", root / "whole"])
        kill_at(patch, 8)
        with pytest.raises(Killed):
            run([*command, "--output-dir", root / "cut"])
    return command, outcome(root / "whole"), root / "cut"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "random-0.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(cut, tmp_path, capsys, name, damage):
    command, whole, folder = cut
    shutil.copytree(folder, tmp_path / "cut")
    newest = sorted((tmp_path / "cut" / "checkpoints" / "ce-s0").iterdir())[-1]
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 0xFF
    if damage == "gone":
        (newest / name).unlink()
    elif damage == "cut":
        os.truncate(newest / name, 40)
    else:
        (newest / name).write_bytes(content)
    run([*command, "--output-dir", tmp_path / "cut", "--resume"])
    assert f"damaged checkpoint {newest}" in capsys.readouterr().out
    assert_same(whole, outcome(tmp_path / "cut"))


def test_a_checkpoint_of_another_version_is_one_line(cut, tmp_path):
    command, _, folder = cut
    shutil.copytree(folder, tmp_path / "cut")
    newest = sorted((tmp_path / "cut" / "checkpoints" / "ce-s0").iterdir())[-1] / "state.json"
    state = json.loads(newest.read_text())
    state["state"]["mood"] = 1
    state["digest"] = runs.digest({key: value for key, value in state.items() if key != "digest"})
    newest.write_text(json.dumps(state))
    with pytest.raises(UserError, match="--resume: the checkpoint of ce-s0 is of another version .*'mood'.*--overwrite"):
        run([*command, "--output-dir", tmp_path / "cut", "--resume"])


def test_checkpoints_hold_no_pickle(cut):
    names = {path.name for path in (cut[2] / "checkpoints").rglob("*") if path.is_file()}
    assert names == {"model.safetensors", "optimizer.safetensors", "random-0.safetensors", "state.json"}


def test_what_a_run_stores_names_no_module(cut):
    """So a file of the lab may move between a run and its resumption."""
    stored = [path for path in cut[2].rglob("*.json*") if path.parent.name[:5] != "model"]
    assert {path.name for path in stored} >= {"results.json", "state.json", "ce-s0.jsonl"}
    assert not [path for path in stored if re.search(r"\blab\.", path.read_text())]


def test_a_full_disk_leaves_the_checkpoint_before(words, tmp_path, monkeypatch):  # noqa: F811
    command = [*words, "--epochs", "3", "--save-steps", "2", "--save-model"]
    run([*command, "--output-dir", tmp_path / "whole"])
    real, count = runs.save_file, [0]

    def full(tensors, path):
        count[0] += 1
        if count[0] == 8:  # in the third checkpoint, after half of the file
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_file", full)
        with pytest.raises(
            RunFailed, match="checkpoint of step 4 cannot be saved .*No space.*step-00000003 is kept: free the disk"
        ):
            run([*command, "--output-dir", tmp_path / "cut"])
    (folder,) = (tmp_path / "cut" / "checkpoints").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    run([*command, "--output-dir", tmp_path / "cut", "--resume"])
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))


def test_ctrl_c_saves_and_says_how_to_go_on(words, tmp_path, monkeypatch):  # noqa: F811
    command = [*words, "--epochs", "3", "--save-model"]
    run([*command, "--output-dir", tmp_path / "whole"])
    real, count = torch.optim.AdamW.step, [0]

    def step(self, *args, **kwargs):
        count[0] += 1
        if count[0] == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(Interrupted, match="ce-s0 is saved at step 5; the same command with --resume continues there"):
            run([*command, "--output-dir", tmp_path / "cut"])
    run([*command, "--output-dir", tmp_path / "cut", "--resume"])
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))


@pytest.mark.slow
def test_kill_and_ctrl_c_of_the_real_process(words, tmp_path, server):  # noqa: F811
    """SIGKILL, then Ctrl-C with exit code 130, then to the end: the same curve as in one go."""
    command = [*words, "--epochs", "8", "--patience", "9", "--save-steps", "1", "--log-steps", "1", "--save-model"]

    def start(folder, *more):
        return Forked("glue_moefy.py", *command, "--output-dir", tmp_path / folder, *more)

    whole = start("whole")
    curve = tmp_path / "cut" / "ce-s0.jsonl"
    for number, expected in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        lines = len(curve.read_text().splitlines()) if curve.exists() else 0
        process = start("cut", "--resume")
        while process.process.is_alive() and (not curve.exists() or len(curve.read_text().splitlines()) < lines + 7):
            time.sleep(0.02)
        process.send(number)
        assert process.wait(timeout=60) == expected
    assert "with --resume continues there" in process.read("stderr")
    assert start("cut", "--resume").wait() == whole.wait() == 0
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))
