"""lab/run/trackers.py through glue_moefy.py: what a tracker gets, where it writes, and how a resumed run continues in it."""

import json
import types
from pathlib import Path

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from test_glue import data, model, plain, run, words  # noqa: F401  (fixtures)
from test_resume import Killed, kill_at

from lab.run import options
from lab.run.cli import UserError


class Notes(GeneralTracker):
    """Stands for a tracker: its runs, by their ids."""

    runs, name, requires_logging_directory = {}, "notes", False

    def __init__(self, project, *folder, **options):
        self.project, self.folder, self.options = project, folder, options

    def start(self):
        id = self.options.get("id") or self.options.get("run_id") or f"id{len(self.runs)}"
        self.tracker = types.SimpleNamespace(id=id, info=types.SimpleNamespace(run_id=id))
        self.own = self.runs.setdefault(id, {"started": [], "lines": [], "config": [], "finished": 0})
        self.own["started"].append((self.project, self.options))
        if self.folder:
            path = Path(*self.folder, self.project, f"events{len(self.own['started'])}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")

    def store_init_configuration(self, values):
        self.own["config"].append(values)

    def log(self, values, step=None):
        self.own["lines"].append((step, values))

    def finish(self):
        self.own["finished"] += 1

    tracker = None


@pytest.fixture
def notes(monkeypatch):
    """Makes Notes the tracker of a name, whose package then is installed."""
    monkeypatch.setattr(Notes, "runs", {})

    def install(name, folder=False):
        monkeypatch.setattr(tracking, "_available_trackers", [LoggerType(name)])
        monkeypatch.setattr(Notes, "requires_logging_directory", folder)
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Notes)
        return Notes.runs

    return install


def test_a_tracker_is_optional(words, tmp_path, monkeypatch):  # noqa: F811
    assert {*options.TRACKERS} <= {*map(str, LoggerType)} - {"all"}
    monkeypatch.setattr(tracking, "_available_trackers", [])
    for name in options.TRACKERS:
        with pytest.raises(UserError, match=f"--report-to {name} needs another package: pip install {name}, or leave"):
            run([*words, "--report-to", name])
    assert not (tmp_path / "out").exists()


def test_a_tracker_has_a_run_of_its_own_for_each_run(words, tmp_path, notes):  # noqa: F811
    found = notes("wandb")
    run([*words, "--variants", "none,ce", "--report-to", "wandb"])
    assert [own["started"] for own in found.values()] == [
        [("stgc", {"name": "out/none-s0"})],
        [("stgc", {"name": "out/ce-s0"})],
    ]
    for name, own in zip(("none", "ce"), found.values()):
        curve = [json.loads(line) for line in (tmp_path / "out" / f"{name}-s0.jsonl").read_text().splitlines()]
        assert own["lines"] == [
            (line["step"], {key: value for key, value in line.items() if isinstance(value, float)}) for line in curve
        ]
        assert {"loss", "conflict_ratio"} <= own["lines"][0][1].keys() and "eval_score" in own["lines"][-1][1]
        (config,) = own["config"]
        assert config["beta"] == 0.1 and config["seeds"] == "[0]" and own["finished"] == 1


@pytest.mark.parametrize("name, option", [("wandb", "id"), ("mlflow", "run_id")])
def test_a_resumed_run_stays_in_the_run_of_its_tracker(words, monkeypatch, notes, name, option):  # noqa: F811
    found, words = notes(name), [*words, "--save-steps", "2", "--report-to", name]
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            run(words)
    run([*words, "--resume"])
    (own,) = found.values()
    first, again = (options for _, options in own["started"])
    assert option not in first and again[option] == "id0" and len(own["config"]) == 1
    assert [step for step, _ in own["lines"]] == [1, 2, 3, 3, 4, 5, 6, 6]
    run([*words, "--overwrite"])
    assert len(found) == 2


def test_what_a_tracker_writes_is_listed(words, tmp_path, monkeypatch, notes):  # noqa: F811
    """So --overwrite removes it. TensorBoard's curves of one run lie in one folder, also after a resumption."""
    found, words = notes("tensorboard", folder=True), [*words, "--save-steps", "2", "--report-to", "tensorboard"]
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            run(words)
    run([*words, "--resume"])
    assert "tensorboard/ce-s0/events1" in (tmp_path / "out" / "written.txt").read_text().split()
    assert [own["started"] for own in found.values()] == [[("ce-s0", {})], [("ce-s0", {"purge_step": 5})]]
    run([*words[:-2], "--overwrite"])
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_a_tracker_that_cannot_start_is_one_line(words, monkeypatch, notes):  # noqa: F811
    notes("wandb")
    monkeypatch.setattr(Notes, "start", lambda self: (_ for _ in ()).throw(ConnectionError("no\nserver")))
    with pytest.raises(UserError, match=r"--report-to wandb cannot start \(no server\); set it up, or leave it out"):
        run([*words, "--report-to", "wandb"])
