"""What would harm a user: a file lost or replaced, a run continued from other content."""

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import without_pictures
from harm.build import ENTRY as SHORT
from harm.build import ONCE, refused, start
from safetensors.torch import load_file, save_file
from test_glue import write_split
from test_resume import Killed, kill_at, outcome

import glue_moefy
import toy_lvlm
from lab.run import files as written_files
from lab.run import runs
from lab.run.cli import UserError
from lab.text import use

KEPT = "this is a user's\n"  # in every file of the user
ENTRY = SHORT | {
    "best": {"score": 0.5, "epoch": 1},
    "conflict_ratio": [0.1, 0.1],
    "consistency": [0.1, 0.1],
    "seconds": 1.0,
    "samples_per_second": 1.0,
    "peak_memory_bytes": 1,
}


@pytest.fixture(scope="module")
def done(data, model, tmp_path_factory):
    """A command, the folder of its finished run, and that of one that was killed with checkpoints of steps 2 and 3."""
    root = tmp_path_factory.mktemp("done")
    small = "--task rte --moe-layers 1 --num-experts 4 --epochs 2 --save-steps 2 --seeds 0 --batch-size 8 --max-length 16"
    command = [*small.split(), "--device", "cpu", "--save-model"]
    shutil.copytree(data, root / "data")
    shutil.copytree(model, root / "model")
    command += ["--model", root / "model", "--data-dir", root / "data"]
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            start([*command, "--output-dir", root / "cut"])
    shutil.copytree(root / "cut", root / "done")
    start([*command, "--output-dir", root / "done", "--resume"])
    return command, root


@pytest.fixture
def out(done, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(done[1] / "done", tmp_path / "out")


def tree(folder: Path) -> dict:
    """Every file and link of a folder, with its content."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink()]
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes() for path in files}


def put(folder: Path, name: str, content) -> None:
    """A file; a link, from ("link", target); a folder with a file, from a name that ends in /; None removes."""
    path = folder / name.rstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif name.endswith("/"):
        put(path, "mine.txt", content)
    elif isinstance(content, tuple):
        path.symlink_to(content[1])
    else:
        path.write_text(content)


@pytest.fixture
def quick(monkeypatch):
    """Training that takes no time, but writes a curve and a model."""

    def train_one(job, variant, lr, seed):
        runs.RunLog(job.folder / f"{variant}-s{seed}.jsonl", 1).close()
        with runs.replaced_folder(job.folder / f"model-{variant}-s{seed}") as target:
            (target / "config.json").write_text("{}")
        return ENTRY | {"seed": seed, "lr": lr}

    monkeypatch.setattr(glue_moefy, "train_one", train_one)
    without_pictures(monkeypatch, "plot_run")


def a_users_file_is_never_lost(state, files, flags, message, *, done, tmp_path, quick):
    """`state` of the folder before: of `done`, or none. `files`: a user's in it. Message None: the run is written."""
    out = tmp_path / "out"
    (tmp_path / "precious.txt").write_text(KEPT)
    out.mkdir() if state == "none" else shutil.copytree(done[1] / state, out)
    for name, content in files.items():
        put(out, name, content)
    before, command = tree(out), [*done[0], "--output-dir", out, *flags.split()]
    if message:
        with refused(message, tmp_path):
            start(command)
        assert tree(out) == before
    else:
        start(command)
        mine = {name: content for name, content in before.items() if any(map(name.startswith, files))}
        assert mine and mine.items() <= tree(out).items()
        assert not list(out.rglob("model-*/model.safetensors")), "what the run wrote is still there"
    assert (tmp_path / "precious.txt").read_text() == KEPT


def changed_content_is_not_continued(name, change, state, message, *, done, tmp_path, quick):
    """`change` of a split or of a file of the model, in place after the run was started."""
    command, root = done
    for folder in ("data", "model", state):
        shutil.copytree(root / folder, tmp_path / folder)
    places = ["--model", tmp_path / "model", "--data-dir", tmp_path / "data", "--output-dir", tmp_path / state]
    record = json.loads((tmp_path / state / "results.json").read_text())
    record["config"] |= {"model": str(tmp_path / "model"), "data_dir": str(tmp_path / "data")}
    (tmp_path / state / "results.json").write_text(json.dumps(record))
    if isinstance(change, dict):
        rows = 24 if name == "train" else 9
        write_split(tmp_path / "data" / "rte", name, rows, **change)
    else:
        path = tmp_path / "model" / name
        path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    before = tree(tmp_path / state)
    if message is None:
        return start([*command, *places, "--resume"])
    with refused(f"--resume: .*{message} since .*restore", tmp_path):
        start([*command, *places, "--resume"])
    assert tree(tmp_path / state) == before


def forget(record: dict) -> None:
    del record["made_from"]


def at(**values):
    """The record, or its resumption, has these values."""

    def change(record: dict) -> None:
        for name, value in values.items():
            if name == "resumed":
                value = [record | one for one in value]
            elif isinstance(value, dict):
                value = record[name] | value
            record[name] = value

    return change


def a_resumption_says_what_differs(change, note, *, done, out, quick, capsys):
    """In one line, after a change of the record."""
    record = json.loads((out / "results.json").read_text())
    record.pop("resumed")
    record["threads"] = 1
    change(record)
    (out / "results.json").write_text(json.dumps(record))
    for times in (1, 0):  # said once
        capsys.readouterr()
        start([*done[0], "--output-dir", out, "--resume"])
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert len(printed) == times and all(re.match(note, line) for line in printed)


def seal(newest: Path) -> None:
    """Digests of a checkpoint that was changed, as if it had been written so."""
    state = json.loads((newest / "state.json").read_text())
    del state["digest"]
    state["sha256"] = {name: runs.sha256(newest / name) for name in state["sha256"]}
    state["versions"] = {"torch": "1.0"}
    (newest / "state.json").write_text(json.dumps(state | {"digest": runs.digest(state)}))


def state(text: str):
    return lambda newest: (newest / "state.json").write_text(text)


def reshape(file: str):
    def change(newest: Path):
        tensors = load_file(newest / f"{file}.safetensors")
        key = next(key for key in tensors if key.startswith("classifier.weight"))
        tensors[key] = tensors[key][:-1].clone()
        save_file(tensors, newest / f"{file}.safetensors")
        seal(newest)

    return change


def rename(newest: Path) -> None:
    tensors = load_file(newest / "model.safetensors")
    tensors["other.weight"] = tensors.pop("classifier.weight")
    save_file(tensors, newest / "model.safetensors")
    seal(newest)


def more(newest: Path) -> None:
    save_file(load_file(newest / "model.safetensors") | {"zz.bias": torch.zeros(3)}, newest / "model.safetensors")
    seal(newest)


def a_checkpoint_fits_or_is_not_used(change, message, *, done, tmp_path, monkeypatch, capsys):
    """`change` of the newest one. Message None: the one before it is used."""
    without_pictures(monkeypatch, "plot_run")
    command, root = done
    out = tmp_path / "out"
    shutil.copytree(root / "cut", out)
    (newest,) = (out / "checkpoints" / "ce-s0").glob("step-*4")
    change(newest)
    if message:
        with pytest.raises(UserError, match=message):
            start([*command, "--output-dir", out, "--resume"])
        return
    start([*command, "--output-dir", out, "--resume"])
    assert f"damaged checkpoint {newest}" in capsys.readouterr().out
    assert outcome(out)[:2] == outcome(root / "done")[:2]


# ---- kills ----


def resumed(done, out) -> None:
    start([*done[0], "--output-dir", out, "--resume"])


def killed(patch, module, name: str, out, command, at: int = 1) -> None:
    """Runs the command until the at-th call of module.name."""
    real, calls = getattr(module, name), []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return real(*args, **kwargs)

    with patch.context() as context:
        context.setattr(module, name, dies)
        with pytest.raises(Killed):
            start([*command, "--output-dir", out])


def kill_while_overwriting(*, done, out, monkeypatch):
    """What was removed is not called complete; --overwrite ends what it began."""
    killed(monkeypatch, Path, "unlink", out, [*done[0], "--overwrite"], at=3)
    with pytest.raises(UserError, match="has parts of a run, no results.json.*--overwrite"):
        resumed(done, out)
    start([*done[0], "--output-dir", out, "--overwrite"])


def kill_before_drawing(*, done, out):
    """The curves are drawn by the resumption, once."""
    put(out, "curves.png", None)
    resumed(done, out)
    first = (out / "curves.png").stat().st_mtime_ns
    os.utime(out / "curves.png", (1, 1))
    resumed(done, out)
    assert (out / "curves.png").stat().st_mtime_ns >= first


def kill_before_saving(*, done, out, monkeypatch):
    """After the last step there is no forward that would set the config's problem_type."""
    shutil.rmtree(out)
    killed(monkeypatch, glue_moefy, "save_model", out, done[0])
    resumed(done, out)
    assert json.loads((out / "model-ce-s0" / "config.json").read_text())["problem_type"] == "single_label_classification"


def kill_while_checkpoints_are_removed(*, done, out, monkeypatch):
    shutil.rmtree(out)
    killed(monkeypatch, runs, "remove_checkpoints", out, done[0])
    assert (out / "checkpoints").exists()
    put(out, "checkpoints/mine.txt", KEPT)
    resumed(done, out)
    assert list(tree(out / "checkpoints")) == ["mine.txt"]


def two_runs_at_a_time(*, done, out, monkeypatch):
    """The second is refused, with --resume and --overwrite, too; after the first has ended, not."""
    said = []

    def train_one(job, variant, lr, seed):
        for flags in ([], ["--resume"], ["--overwrite"]):
            with pytest.raises(UserError) as error:
                start([*done[0], "--output-dir", out, *flags])
            said.append(str(error.value))
        return ENTRY

    shutil.rmtree(out)
    with monkeypatch.context() as context:
        context.setattr(glue_moefy, "train_one", train_one)
        start([*done[0], "--output-dir", out])
    assert ["another process is writing there; wait" in text for text in said] == [False, True, True]
    resumed(done, out)


def two_started_at_once(*, done, out, monkeypatch):
    """Both have seen an empty folder; the second comes when the first has finished."""
    shutil.rmtree(out)
    real = runs.claim_folder

    def claim(*args, **kwargs):
        monkeypatch.setattr(runs, "claim_folder", real)
        shutil.copytree(done[1] / "done", out)
        return real(*args, **kwargs)

    monkeypatch.setattr(runs, "claim_folder", claim)
    before = tree(done[1] / "done")
    with pytest.raises(UserError, match="holds this run already"):
        start([*done[0], "--output-dir", out])
    assert tree(out) == before


def all_is_on_the_disk(*, done, out, monkeypatch):
    """Nothing takes its place before it was synced."""
    synced, early, fsync, replace = set(), [], os.fsync, os.replace

    def sync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        return fsync(descriptor)

    def watch(source, target):
        files = [Path(source)] if Path(source).is_file() else [path for path in Path(source).rglob("*") if path.is_file()]
        early.extend(path for path in files if out in path.parents and path.stat().st_ino not in synced)
        return replace(source, target)

    shutil.rmtree(out)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", watch)
    start([*done[0], "--output-dir", out])
    assert synced and not early


def predictions_beside_a_link(*, done, out, monkeypatch):
    """A user's link has the name of a temporary file; a refusal leaves nothing behind."""
    put(out, "x.csv", "sentence1,sentence2\nthe,cat\n")
    put(out, "precious.txt", KEPT)
    put(out, "x.predictions.csv.tmp", ("link", "precious.txt"))
    before = tree(out)
    with monkeypatch.context() as context:
        context.setattr(use, "compute_logits", lambda *_, **__: torch.full((1, 2), torch.nan))
        with pytest.raises(UserError, match="not finite"):
            use.predict(out / "model-ce-s0", out / "x.csv")
    assert tree(out) == before
    use.predict(out / "model-ce-s0", out / "x.csv")
    assert before.items() <= tree(out).items() and (out / "x.predictions.csv").is_file()
    start([*done[0], "--output-dir", out, "--overwrite"])
    assert (out / "x.predictions.csv").is_file(), "made for the user, who may want to keep it"


def home_is_home(*, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for script, flags in ((glue_moefy, ["--task", "rte", "--toy"]), (toy_lvlm, [])):
        for name in ("x", "runs/x", "a b"):
            assert script.parse([*flags, f"--output-dir=~/{name}"]).output_dir == f"/home/me/{name}"


def a_folder_from_before_the_list(*, done, out, monkeypatch):
    """It is resumed, and its files are its own from then on."""
    put(out, "written.txt", None)
    resumed(done, out)
    put(out, "mine.txt", KEPT)
    monkeypatch.setattr(glue_moefy, "train_one", lambda *_: ENTRY)
    start([*done[0], "--output-dir", out, "--overwrite"])
    assert not (out / "model-ce-s0").exists() and not (out / "ce-s0.jsonl").exists() and (out / "mine.txt").exists()


def a_line_that_no_run_wrote(line, *, done, out):
    """Cut by a full disk, or changed by hand: nothing else is removed, and the run's own files are."""
    put(out.parent, "precious.txt", KEPT)
    put(out, "checkpoints/mine.txt", KEPT)
    with open(out / "written.txt", "a") as file:
        file.write(line.format(out.parent) + "\n")
    written_files.remove(out)
    assert (out.parent / "precious.txt").read_text() == (out / "checkpoints" / "mine.txt").read_text() == KEPT
    assert not (out / "results.json").exists()


def a_hub_model_has_a_revision(*, out, monkeypatch):
    cached = out / "models--a--b" / "snapshots" / "abc123"
    put(cached, "config.json", "{}")
    put(out / "models--a--b" / "refs", "main", "abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(out))
    monkeypatch.setattr(runs, "try_to_load_from_cache", lambda *names: str(cached / names[1]))
    assert runs.digests_of_model("--model", "a/b") == {"the revision of --model": "abc123"}


@contextmanager
def scenes_without_training(patch):
    """toy_lvlm.py, whose stages take no time."""
    entry = ENTRY | {"variant": "none", "limited": [], "routes": None, "last": {"score": 0.5}, "best": None}
    del entry["best"]
    with patch.context() as context:
        context.setattr(toy_lvlm, "moe_stage", lambda job, variant: entry | {"variant": variant, "seed": job.seed})
        yield context


def own_pictures(*, out, monkeypatch):
    """Answers, pictures and words of toy_lvlm.py's data that are changed in place, as many as before."""
    from PIL import Image
    from test_llava import write_digits

    shutil.rmtree(out)
    with scenes_without_training(monkeypatch):
        file, pictures = write_digits(out.parent / "digits", 24)
        test, _ = write_digits(out.parent / "digits", 6, start=24)
        command = ["--data", file, "--eval-data", test, "--image-dir", pictures, "--variants", "none", "--device", "cpu"]
        command = [*map(str, command), "--output-dir", str(out)]
        toy_lvlm.main(toy_lvlm.parse(command))
        before, text = tree(out), Path(file).read_text()
        one, other = sorted(pictures.iterdir())[:2]
        picture = one.read_bytes()
        for change, what in (
            (lambda: Path(file).write_text(text.replace('"value": "3"', '"value": "4"')), "the data to train"),
            (lambda: Path(file).write_text(text.replace("digit", "figure")), "the data to train"),
            (lambda: shutil.copy(other, one), "the data to train"),
            (lambda: Path(test).write_text(Path(test).read_text().replace('"value": "', '"value": "1')), "the data to test"),
            (lambda: Image.new("L", (8, 8)).save(sorted(pictures.iterdir())[-1]), "the data to test"),
        ):
            change()
            with pytest.raises(UserError, match=f"--resume: .*{what}.* changed since"):
                toy_lvlm.main(toy_lvlm.parse([*command, "--resume"]))
            assert tree(out) == before
            Path(file).write_text(text)
            one.write_bytes(picture)


def kill_before_routes_are_drawn(*, out, monkeypatch):
    """toy_lvlm.py: the picture of the routes and the curves come with the resumption; checkpoints of a saved stage go."""
    shutil.rmtree(out)
    command = [*"--scenes 64 --test-scenes 6 --batch-size 4 --device cpu --variants none".split(), "--output-dir", str(out)]
    drawn = []
    with scenes_without_training(monkeypatch) as context:
        entry = toy_lvlm.moe_stage
        context.setattr(toy_lvlm, "moe_stage", lambda *key: entry(*key) | {"routes": {"layers": [1]}})
        context.setattr(
            toy_lvlm.figures, "plot_routes", lambda _, path, title: (drawn.append(path.name), runs.write_json(path, {}))
        )
        with monkeypatch.context() as dying:
            dying.setattr(toy_lvlm.figures, "plot_run", lambda *_: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                toy_lvlm.main(toy_lvlm.parse(command))
        for _ in range(2):
            toy_lvlm.main(toy_lvlm.parse([*command, "--resume"]))
    assert drawn == ["routes-none-s0.png"] and (out / "curves.png").is_file()


def kill_while_a_stages_checkpoints_are_removed(*, out):
    """toy_lvlm.py: the stage is saved; what is left of its checkpoints goes when it is loaded."""
    left = "stages/checkpoints/clip-s0/step-00000003/model.safetensors"
    for name in (left, "stages/checkpoints/mine.txt"):
        put(out, name, KEPT)
    (out / "stages" / "clip-s0").mkdir()
    with open(out / "written.txt", "a") as file:
        file.write(f"{left}\n")
    found = type("Found", (), {"find": lambda *_, **__: True})()
    accelerator = type("One", (), {"wait_for_everyone": lambda self: None, "is_main_process": True})()
    parts = {"folder": out, "seed": 0, "accelerator": accelerator, "record": found, "args": Namespace(stages_from=None)}
    job = type("Job", (), parts)()
    assert toy_lvlm.stage(job, "clip", lambda saved: saved.name.name, None) == "clip-s0"
    assert list(tree(out / "stages" / "checkpoints")) == ["mine.txt"]


def a_lock_ends_with_its_process(*, tmp_path):
    """SIGKILL of who holds it."""
    code = f"import sys, time; sys.path.insert(0, {str(runs.ROOT)!r}); from pathlib import Path; from lab.run import files\n"
    code += f"lock = files.lock_list(Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match="another process is writing there; wait until it ends"):
            runs.lock_list(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    runs.lock_list(tmp_path).close()


# ---- The table ----

LINK = ("link", "../precious.txt")
CUT = '{"name": "rte-24", "config": {}, "data": {}, "runs": [], "ver'
FOREIGN, DAMAGED = "exists, but no run wrote it: move it", "results.json cannot be read .*remove it, or name another"
OVERWRITE = [
    "checkpoints/mine.txt",
    "tensorboard/",
    "my-thesis-s1/",
    "model-ce-s0.part/",
    "figure-s1.png",
    "model-ce-s0/mine.txt",  # in a folder of ours
    "stages/",
    "model-ce-s1/",
    "curves.png.tmp",
    "ce-s1.txt",
    "entries.json",
]
WEIGHTS = "the weights or config of --model changed"
OTHER = r"--resume: .*step-0*4 is of another model: {}.* does not fit; it was written with torch 1.0, now {}"
CASES = {
    a_users_file_is_never_lost: [
        *[("done", {name: KEPT}, "--overwrite", None) for name in OVERWRITE],
        ("none", {"ce-s0.jsonl": KEPT}, "", FOREIGN),
        ("none", {"curves.png": KEPT}, "--overwrite", FOREIGN),
        ("none", {"all_results.json": LINK}, "--resume", FOREIGN),
        ("none", {"model-ce-s0/": KEPT}, "", FOREIGN),
        ("none", {"checkpoints/ce-s0/": KEPT}, "", FOREIGN),
        ("none", {"checkpoints": KEPT}, "", FOREIGN),
        ("none", {"written.txt": KEPT}, "", "written.txt exists, but no run wrote it"),
        ("none", {"written.txt": LINK}, "", "cannot be written"),
        ("done", {"ce-s1.jsonl": KEPT}, "--seeds 0 1 --resume", FOREIGN),
        *[
            ("done", {"results.json": text}, "--resume", DAMAGED)
            for text in ("null", "{}", "[]", "3", CUT, "[[[1]]]", '"x"')
        ],
        *[("done", {"results.json": text}, "--overwrite", DAMAGED) for text in ("null", '{"thesis": 1}')],
        (
            "done",
            {"results.json": json.dumps({"name": "rte-24", "config": {}, "data": {}, "runs": [1]})},
            "--resume",
            DAMAGED,
        ),
        *[("none", {f"{name}.tmp": LINK}, "", None) for name in ("results.json", "ce-s0.jsonl", "all_results.json")],
        ("none", {"unfinished.part": LINK}, "", None),
        ("none", {"unfinished.part/": KEPT}, "", None),
        ("none", {"model-ce-s0.part/": KEPT}, "", None),
        ("none", {"checkpoints/ce-s0.part": KEPT}, "", None),
        ("done", {"results.json": None}, "--resume", "has parts of a run, no results.json"),
        ("done", {"results.json": None}, "", "has parts of a run, no results.json"),
        ("done", {"written.txt": None}, "--overwrite", "what the old run in .* wrote is not listed"),
    ],
    changed_content_is_not_continued: [
        ("train", {"label": [(i // 2) % 2 for i in range(24)]}, "done", "the data of train changed"),
        ("train", {"sentence2": ["a dog sees the cat"] * 24}, "cut", "the data of train changed"),
        ("validation", {"label": [1] * 9}, "done", "the data of validation changed"),
        ("validation", {"sentence1": ["the fish"] * 9}, "cut", "the data of validation changed"),
        ("model.safetensors", lambda text: text[:-1] + bytes([text[-1] ^ 1]), "done", WEIGHTS),
        ("config.json", lambda text: text.replace(b'"gelu"', b'"relu"'), "cut", WEIGHTS),
        ("tokenizer.json", lambda text: text.replace(b'"cat"', b'"cow"'), "done", "the tokenizer of --model changed"),
        ("tokenizer_config.json", lambda text: text + b"\n", "cut", "the tokenizer of --model changed"),
        ("README.md", lambda text: b"new", "done", None),
        (".DS_Store", lambda text: b"new", "cut", None),
    ],
    a_resumption_says_what_differs: {
        "no digests": (forget, "note: .* has no digests of its data and model: whether they are the same is not checked"),
        "threads": (at(threads=7), "note: resumed with threads 1 instead of 7: the weights may differ in the last"),
        "torch": (at(versions={"torch": "1.0"}), "note: resumed with torch .* instead of 1.0: the weights"),
        "device": (at(device="NVIDIA X"), "note: resumed with device cpu instead of NVIDIA X"),
        "threads of a resumption": (at(resumed=[{"threads": 5}]), "note: resumed with threads 1 instead of 5"),
    },
    a_checkpoint_fits_or_is_not_used: {
        "null": (state("null"), None),
        "a list": (state("[]"), None),
        "a number": (state("3"), None),
        "a text": (state('"x"'), None),
        "nothing": (state("{}"), None),
        "another shape": (reshape("model"), OTHER.format("classifier.weight", torch.__version__[:3])),
        "another optimizer's": (reshape("optimizer"), OTHER.format("exp_avg.* of classifier.weight", "")),
        "another name": (rename, OTHER.format("classifier.weight", "")),
        "a tensor more": (more, OTHER.format("zz.bias", "")),
    },
    kill_while_overwriting: ONCE,
    kill_before_drawing: ONCE,
    kill_before_saving: ONCE,
    kill_while_checkpoints_are_removed: ONCE,
    two_runs_at_a_time: ONCE,
    two_started_at_once: ONCE,
    all_is_on_the_disk: ONCE,
    predictions_beside_a_link: ONCE,
    home_is_home: ONCE,
    a_folder_from_before_the_list: ONCE,
    a_line_that_no_run_wrote: {
        "outside": ("../precious.txt",),
        "absolute": ("{}/precious.txt",),
        "a folder": ("checkpoints/",),
        "a folder outside": ("../unfinished.part/../",),
        "the root": ("/",),
        "blank": ("",),
    },
    a_hub_model_has_a_revision: ONCE,
    own_pictures: ONCE,
    kill_before_routes_are_drawn: ONCE,
    kill_while_a_stages_checkpoints_are_removed: ONCE,
    a_lock_ends_with_its_process: ONCE,
}
