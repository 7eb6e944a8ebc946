"""The layout: which file imports which, what a wheel holds, that records have a commit, and that old ones are still read."""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import accelerate
import pytest
from test_glue import run

import glue_moefy
import toy_lvlm
from lab.report import compare, figures, tables
from lab.run import options, runs
from lab.run.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {  # the rooms of lab/, and those to the left of each
    "run": (),
    "moe": ("run",),
    "text": ("run", "moe"),
    "vision": ("run", "moe"),
    "bench": ("run", "moe", "text", "vision"),
    "report": ("run", "moe", "text", "vision", "bench"),
}
METHOD = {"stgc": (), "stgc_plus": ("stgc",), "stgc_hf": ("stgc", "stgc_plus")}  # and what of ours each may import
STANDARD = sys.stdlib_module_names | {"torch"}  # all that stgc.py imports
TOP = sorted(path.stem for path in ROOT.glob("*.py"))
SCRIPTS = [name for name in TOP if name not in METHOD]
LAB = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("lab/**/*.py"))
CALM = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


# ---- 1. Arrows ----


def imported(source: str, file: str) -> list[str]:
    """What a file imports, anywhere in it, as dotted names: `from lab.run import cli` is lab.run.cli."""
    names, package = [], file.split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names += [word.value for word in node.args[:1] if isinstance(word, ast.Constant)]
    return names


def faults(file: str, source: str) -> list[str]:
    """The imports of a file that the layout forbids; an unknown room, too."""
    *folders, _ = file.split("/")
    inside = folders[0] == "lab" if folders else False
    room = folders[1] if len(folders) > 1 else None
    found = [f"{file}: {room} is no room"] if inside and room not in (*ROOMS, None) else []
    for name in imported(source, file):
        top, *rest = name.split(".")
        target = rest[0] if rest else None
        if top in SCRIPTS:
            found.append(f"{file} imports the script {top}")
        elif top == "lab" and not inside and Path(file).stem in METHOD:
            found.append(f"{file} imports {name}: the method needs no lab")
        elif top == "lab" and target not in (*ROOMS, None):
            found.append(f"{file} imports {name}: {target} is no room")
        elif top == "lab" and inside and target not in (None, room, *ROOMS.get(room, ())):
            found.append(f"{file} imports {name}: the arrow runs back")
        elif top in METHOD and not inside and top not in (Path(file).stem, *METHOD.get(Path(file).stem, METHOD)):
            found.append(f"{file} imports {top}: the arrow runs back")
        elif file == "stgc.py" and top not in STANDARD:
            found.append(f"{file} imports {top}: only torch and the standard library")
    return found


def test_arrows_run_one_way():
    files = [*LAB, *(f"{name}.py" for name in TOP)]
    assert {"stgc", "stgc_hf", "glue_moefy", "toy_lvlm"} <= set(TOP) and {file.split("/")[1] for file in LAB} > set(ROOMS)
    assert [fault for file in files for fault in faults(file, (ROOT / file).read_text())] == []


@pytest.mark.parametrize(
    "file, source, fault",
    [
        ("lab/run/runs.py", "from lab.moe import baselines", "runs back"),
        ("lab/moe/moefication.py", "def f():\n    import lab.text.use", "runs back"),
        ("lab/text/use.py", "from lab.vision.scenes import Scene", "runs back"),
        ("lab/vision/lvlm.py", "from ..text import use", "runs back"),
        ("lab/bench/step.py", "from lab import report", "runs back"),
        ("lab/run/cli.py", "importlib.import_module('lab.report.figures')", "runs back"),
        ("lab/text/use.py", "from lab import moefication", "moefication is no room"),
        ("lab/cellar/wine.py", "", "cellar is no room"),
        ("lab/bench/peer.py", "def f():\n    import glue_moefy", "the script glue_moefy"),
        ("toy_lvlm.py", "from glue_moefy import parse", "the script glue_moefy"),
        ("stgc_hf.py", "import toy_lvlm", "the script toy_lvlm"),
        ("stgc_hf.py", "from lab.run import cli", "needs no lab"),
        ("stgc.py", "import stgc_hf", "runs back"),
        ("stgc.py", "import numpy", "only torch and the standard library"),
        ("stgc_plus.py", "import stgc_hf", "runs back"),
    ],
)
def test_an_arrow_that_runs_back_is_found(file, source, fault):
    (found,) = faults(file, source)
    assert fault in found


@pytest.mark.parametrize(
    "file, source",
    [
        ("lab/run/runs.py", "import lab\nfrom lab.run.cli import UserError"),
        ("lab/report/tables.py", "from lab.vision.instructions import KINDS\nfrom lab.bench import step"),
        ("lab/bench/step.py", "import stgc_hf, stgc_plus\nfrom stgc import STGC"),
        ("stgc_hf.py", "from stgc_plus import STGC\nimport transformers"),
        ("glue_moefy.py", "from lab.report import figures\nfrom stgc import STGC\nimport stgc_plus"),
        ("stgc.py", "import math\nfrom torch import nn"),
    ],
)
def test_an_arrow_of_the_layout_is_allowed(file, source):
    assert faults(file, source) == []


def test_modules_that_are_named_are_there():
    """Commands, paths and dotted names in pages, docstrings and messages lead to files of today."""
    patterns, commands = ("*.md", "docs/*.md", "results/*.md", "*.py", "lab/**/*.py", "tests/*.py"), 0
    for page in {page for pattern in patterns for page in ROOT.glob(pattern)} - {Path(__file__).resolve()}:
        text = page.read_text()
        for path in re.findall(r"\blab/[\w/]+\.py\b", text):
            assert (ROOT / path).is_file(), (page.name, path)
        for name in re.findall(r"(?<![\w./])lab\.[a-z]\w*(?:\.\w+)?", text):
            found = (ROOT / name.replace(".", "/")).with_suffix(".py").is_file() or (ROOT / name.replace(".", "/")).is_dir()
            assert found or name in tables.RENAMED, (page.name, name)
        for name in re.findall(r"\bpython -m (lab[\w.]*)", text):
            spec, commands = importlib.util.find_spec(name), commands + 1
            main = spec.name + ".__main__" if spec.submodule_search_locations else spec.name
            assert '__name__ == "__main__"' in Path(importlib.util.find_spec(main).origin).read_text(), (page.name, name)
    assert commands > 10


# ---- 2. The commit of a record ----


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def copy_project(target: Path) -> Path:
    """What makes a wheel or a commit of this project, without results and tests."""
    target.mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "README.md", ROOT / "LICENSE"]:
        shutil.copy(path, target)
    shutil.copytree(ROOT / "lab", target / "lab", ignore=shutil.ignore_patterns("__pycache__"))
    return target


def state_of(folder: Path, cwd: Path) -> list:
    """git_state() of the copy of lab/ in this folder."""
    code = f"import sys, json; sys.path.insert(0, {str(folder)!r}); from lab.run.runs import git_state; "
    code += "print(json.dumps(git_state()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True, env=CALM)
    return json.loads(done.stdout)


def test_a_record_has_its_commit(tmp_path):
    assert runs.ROOT == ROOT
    runs.RunFolder(tmp_path, "rte", {}, {}, accelerate.Accelerator(cpu=True))
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["commit"] == (git(ROOT, "rev-parse", "HEAD") if (ROOT / ".git").exists() else None)


@pytest.mark.slow
def test_the_commit_is_that_of_the_projects_own_checkout(tmp_path):
    """None without one, and below another project's: its commit did not make the result."""
    project = copy_project(tmp_path / "other" / "project")
    assert state_of(project, cwd=tmp_path) == [None, None]
    for folder in (project.parent, project):
        git(folder, "init", "-q")
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", "x")
        expected = [git(folder, "rev-parse", "HEAD"), False] if folder == project else [None, None]
        assert state_of(project, cwd=tmp_path) == expected
    (project / "stgc.py").write_text("")
    assert state_of(project, cwd=tmp_path) == [git(project, "rev-parse", "HEAD"), True]


# ---- 3. The wheel ----


@pytest.mark.slow
def test_a_wheel_holds_and_imports_everything(tmp_path):
    """Built from a copy, since a build leaves files behind, and imported from a folder of its own. No network, and no skip:
    torch requires the setuptools that this needs."""
    project, wheel = copy_project(tmp_path / "project"), tmp_path / "wheel"
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=project, capture_output=True, text=True, check=True, env=CALM)
    (file,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(file, wheel, "zip")
    content = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    content = {path for path in content if ".dist-info/" not in path}
    lab = [path.relative_to(project).as_posix() for path in project.glob("lab/**/*") if path.is_file()]
    assert content == {*lab, *(f"{name}.py" for name in METHOD.keys() & set(TOP))}
    names = [path.removesuffix(".py") for path in sorted(content) if path.endswith(".py")]
    modules = [name.removesuffix("/__init__").replace("/", ".") for name in names]
    code = (
        f"import importlib, sys; sys.path.insert(0, {str(wheel)!r})\n"
        f"files = [importlib.import_module(name).__file__ for name in {modules}]\n"
        f"print(len([file for file in files if file.startswith({str(wheel)!r})]))"
    )
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "elsewhere", capture_output=True, text=True, env=CALM)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(modules) > 30


# ---- 4. Records of before ----

RECORDS = sorted(path.parent.relative_to(ROOT) for path in ROOT.glob("results/**/results.json"))


@pytest.fixture
def old(tmp_path):
    """A run folder that the flat lab/ wrote, of generated pairs: its record and its curves."""
    (tmp_path / "old").mkdir()
    for path in (ROOT / "results" / "toy-rte").glob("*.json*"):
        shutil.copy(path, tmp_path / "old")
    return tmp_path / "old"


def test_an_old_record_is_compared_and_drawn(old):
    record = runs.read_record(old)
    assert "normalize" not in record["config"]  # a record of before that flag
    table = compare.comparison_table(record, "best")
    assert [line.split()[1] for line in table.splitlines()[2:]] == ["baseline", "ce", "placebo"]
    assert {row["variant"]: row["seeds"] for row in tables.score_rows(record)} == {"none": 3, "ce": 3, "placebo": 3}
    assert "toy-rte" in tables.results_table([record]) and "--toy" in tables.results_table([record])
    counts = {name: len(curves) for name, curves in figures.read_curves(old, record).items()}
    assert counts == {"none": 3, "ce": 3, "placebo": 3}
    assert figures.plot_run(old, record).is_file() and figures.plot_comparison(old, [record]).is_file()


@pytest.mark.parametrize("folder", RECORDS, ids=str)
def test_every_recorded_run_is_read(folder):
    record = runs.read_record(ROOT / folder)
    for select in ("best", "last") if compare.has_best(record) else ("last",):
        rows = compare.select_rows(record, select)
        assert {row.variant for row in rows} == {entry["variant"] for entry in record["runs"]}
        assert all(0 <= score <= 100 for row in rows for score in row.of("score").values())
    assert figures.read_curves(ROOT / folder, record).keys() == {entry["variant"] for entry in record["runs"]}


@pytest.mark.slow
def test_an_old_folder_is_continued(old, monkeypatch, capsys):
    """The recorded command with --resume: nothing is trained again, and what was recorded stays as it was."""
    before = json.loads((old / "results.json").read_text())
    monkeypatch.setattr(glue_moefy.toy, "pretrain", partial(glue_moefy.toy.pretrain, steps=1))  # no run starts from it
    monkeypatch.setattr(glue_moefy, "train_one", lambda *_: pytest.fail("a recorded run is trained again"))
    run([*shlex.split(before["command"])[2:], "--output-dir", old, "--resume"])
    assert capsys.readouterr().out.count("complete already") == 9
    after = json.loads((old / "results.json").read_text())
    assert after["runs"] == before["runs"] and after["commit"] == before["commit"] and len(after["resumed"]) == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--beta 0.5", "holds a run with --beta 0.1: name another folder, or pass --overwrite to replace it$"),
        ("--seeds 0", r"holds a run with --seeds 0 1 2: .*\(--resume: to continue it\)"),
        ("--resume --beta 0.5", "was started with --beta 0.1; give the same"),
        ("--resume --no-normalize", "was started with --normalize True; give the same"),  # an option that the record lacks
    ],
)
def test_an_old_folder_is_refused_in_one_line(old, flags, message):
    before = (old / "results.json").read_text()
    words = shlex.split(json.loads(before)["command"])[2:]
    with pytest.raises(UserError, match=message) as error:
        run([*words, "--output-dir", old, *flags.split()])
    assert "\n" not in str(error.value) and (old / "results.json").read_text() == before


@pytest.mark.parametrize("folder", RECORDS, ids=str)
def test_the_configuration_of_every_record_is_known(folder):
    """Each may be resumed with its own options, and with no other: no flag of then is gone or means something else."""
    config = json.loads((ROOT / folder / "results.json").read_text())["config"]
    script, free = (toy_lvlm, toy_lvlm.FREE) if "scenes" in config else (glue_moefy, options.FREE)
    defaults = vars(script.make_parser().parse_args([]))
    assert config.keys() <= defaults.keys()
    check = partial(runs.check_folder, ROOT / folder, defaults=defaults, free=free, overwrite=False, resume=True)
    check(config=defaults | config)
    for name in defaults.keys() - free:
        with pytest.raises(UserError, match=f"was started with --{name.replace('_', '-')} "):
            check(config=defaults | config | {name: "another"})
