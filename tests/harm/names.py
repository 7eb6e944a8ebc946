"""Names, texts and signals that would end in a traceback, in a raw terminal code or in another exit code."""

import argparse
import ast
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from forked import ROOT, Forked, Launched
from harm.build import ONCE, stopped
from PIL import Image
from test_llava import entry
from test_use import EXAMPLES

import glue_moefy
import toy_lvlm
from lab.report import figures
from lab.run import cli
from lab.run.cli import RunFailed, UserError, printable, run_main, say
from lab.vision import llava

LONG, RAW = "x" * 300, "\udcff"  # a name that the system refuses, and a byte that is not UTF-8
CALM = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": ""}


# ---- 1. Paths on the command line ----


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with things of all kinds. Root may read everything: `closed` is said to be unreadable."""
    monkeypatch.chdir(tmp_path)
    for name in ("file", "closed.json"):
        Path(name).write_text("{}")
    for name in ("folder", "closed"):
        Path(name).mkdir()
    os.symlink("loop", "loop")
    os.mkfifo("pipe")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("closed") and access(path, mode))
    monkeypatch.setattr("lab.run.options.hub_is_reachable", lambda parser: True)
    return tmp_path


def a_path_that_cannot_be_is_one_line(script, flag, name, reason, *, here, capsys):
    before = sorted(os.listdir())
    with stopped(capsys, f"--{flag}.*{re.escape(reason)}.*name another"):
        script.parse([*["--task", "rte"] * (script is glue_moefy), f"--{flag}={name}"])
    assert sorted(os.listdir()) == before


def a_thing_without_permissions(kind, mode, closed, reason):
    """As nobody, if this is root, who may read all. `closed`: in a folder that may not be entered. None: it is read."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        path = Path(folder, "x")
        path.mkdir() if kind == "folder" else path.write_text("")
        path.chmod(mode)
        os.chmod(folder, 0o600 if closed else 0o755)
        if not (child := os.fork()):
            if os.getuid() == 0:
                os.setuid(65534)
            elif closed:
                os.chmod(folder, 0)
            try:
                cli.path(kind)(str(path))
            except argparse.ArgumentTypeError as error:
                said.write(str(error))
                said.flush()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.chmod(folder, 0o755)
        path.chmod(0o755)
        said.seek(0)
        text = said.read()
    assert reason in text and "name another" in text if reason else text == ""


def home_is_expanded(kind, name, expected, *, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bert").mkdir()
    (tmp_path / "a~b").write_text("")
    assert Path(cli.path(kind)(name.replace("HOME", str(tmp_path)))) == tmp_path / expected


def a_folder_with_the_name_of_the_hub_is_said_to_be_read(folder, flags, note, *, here, capsys):
    Path(folder).mkdir(parents=True)
    Path("nyu").mkdir()
    args = glue_moefy.parse(["--task", "rte", *flags.split()])
    said = capsys.readouterr().out
    assert said.startswith(note) and said.count("\n") == bool(note)
    assert args.data_dir == {"nyu-mll/glue": "nyu-mll/glue"}.get(folder, "nyu" if "nyu" in flags else None)


def neither_a_folder_nor_a_name_of_the_hub(name, *, here, capsys):
    with stopped(capsys, "no such folder; give an existing one, or a hub name"):
        toy_lvlm.parse([f"--lm={name}"])


def a_backslash_in_the_data(files, path, message, *, tmp_path):
    """`files` that are there. None: the path is read."""
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name, "PNG")
    if message is None:
        assert llava.check_entry(entry(path), tmp_path)[0] == tmp_path / path
        return
    with pytest.raises(llava.BadEntry) as error:
        llava.check_entry(entry(path), tmp_path)
    line = printable(str(error.value))
    assert line.startswith(message.strip()) and "\n" not in line


# ---- 2. The terminal ----


def what_could_change_the_terminal_is_escaped(text, shown, *, capsys):
    say(text, "two")
    cli.report(text)
    assert capsys.readouterr() == (f"{shown}\ntwo\n", f"{shown}\n")


def one_process_speaks(*, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    say("a")
    cli.report("b")
    assert capsys.readouterr() == ("", "")


def another_process_fails_alone(*, capsys, monkeypatch, handlers):
    """It says so, but only after process 0 had the time to say the same, whose launcher then ends all."""
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)

    def fail(error):
        raise error

    for rank, error, said in (
        ("0", RunFailed("the loss is nan"), "p: stopped: the loss is nan\n"),
        ("1", RunFailed("the loss is nan"), "p: process 1: stopped: the loss is nan\n"),
        ("2", UserError("--x: no"), "p: process 2: error: --x: no\n"),
        ("1", KeyboardInterrupt(), ""),  # process 0 has it too
    ):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            run_main("p", partial(fail, error))
        assert capsys.readouterr().err == said
    assert waited == [cli.GRACE] * 2


def a_line_is_not_longer_than_a_screen(*, capsys):
    cli.report(f"--run {LONG * 20}: what is wrong; what to do")
    line = capsys.readouterr().err
    assert len(line) < cli.LONGEST + 10 and line.startswith("--run xx") and line.endswith("what is wrong; what to do\n")
    cli.report(f"--model: {LONG * 2} cannot be loaded (a reason); remove {LONG * 2}/name and run the command again")
    line = capsys.readouterr().err
    assert re.fullmatch(r"--model: x+\.\.\.x+ cannot be loaded \(a reason\); remove x+\.\.\.x+/name and .* again\n", line)


def nothing_else_prints():
    """Of lab/ and the scripts: all goes through `say` and `report`; a prompt may stay on its line."""
    found = []
    for path in [*ROOT.glob("lab/**/*.py"), ROOT / "glue_moefy.py", ROOT / "toy_lvlm.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write"):
                found.append((path.name, ast.unparse(node)))
    assert {name for name, _ in found} == {"cli.py", "toy_lvlm.py"}
    assert [text for name, text in found if name != "cli.py"] == ["print('> ', end='', file=sys.stderr, flush=True)"]


def every_encoding_can_say_everything(encoding, *, monkeypatch, handlers):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def main():
        say("中文 ça \udcff")
        raise cli.UserError("中\n文")

    with pytest.raises(SystemExit) as stop:
        run_main("p", main)
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())
    both = {"utf-8": ("中文 ça", "中"), "ascii": (r"\u4e2d\u6587 \xe7a", r"\u4e2d")}
    first, second = both.get(encoding, (r"\u4e2d\u6587 ça", r"\u4e2d"))
    assert stop.value.code == 2 and out == first + " \\udcff\n" and err.startswith(f"p: error: {second}\\n")


HEAD = "import sys; sys.path.insert(0, '.'); from lab.run.cli import *; "


def a_closed_pipe_or_a_full_disk(program, where, code, error):
    """`where` the output goes. In bash, whose PIPESTATUS has the exit code of the first."""
    line = ["bash", "-c", f'"$@" {where}; exit ${{PIPESTATUS[0]}}', "bash", sys.executable, *program]
    done = subprocess.run(line, cwd=ROOT, env=CALM | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith(error) and done.stderr.count("\n") == bool(error)


def any_name_is_drawn(title, *, tmp_path):
    """As text, not as a formula, and without a word about letters that the font lacks."""
    scores = {"score": 0.5}
    record = {"name": title, "runs": [{"variant": "ce", "seed": 0, "lr": 1e-4, "last": scores, "collapsed": False}]}
    (tmp_path / "ce-s0.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    row = {"question": title, "answer": title, "expected": title, "right": False, "kind": "vqa"}
    part = {"tokens": 1, "first_ME": [[1.0, 0.0]], "pathways": [{"path": [0], "share": 1.0}]}
    routes = {"layers": [0], "modalities": {"text": part}, "num_experts": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.plot_run(tmp_path, record)
        figures.plot_comparison(tmp_path, [record], "last")
        figures.plot_sheet(torch.zeros(1, 3, 8, 8), [row], tmp_path / "sheet.png")
        figures.plot_routes(routes | {"layers": [title]}, tmp_path / "routes.png", title)
    assert len(list(tmp_path.glob("*.png"))) == 4


# ---- 3. Signals ----

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
WAIT = "import time; [time.sleep(0.05) for _ in range(600)]"  # a signal right before a sleep is seen after it
READY = f"print('ready', flush=True); {WAIT}"


def signalled(command, number, line="ready\n", **environment) -> tuple[int, str]:
    """The exit code and stderr of a process that gets the signal once it has printed `line`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=CALM | environment, text=True, **pipes) as process:
        assert process.stdout.readline() == line
        process.send_signal(number)
        error = process.communicate(timeout=30)[1]
    return process.returncode, error


def a_signal_during_the_imports(script, first, number, *, tmp_path):
    """`first` is what the script imports first of all that takes long."""
    (tmp_path / f"{first}.py").write_text(READY)
    flags = ["--task", "rte", "--toy"] * (script == "glue_moefy.py")
    code, error = signalled([sys.executable, script, *flags], number, PYTHONPATH=str(tmp_path))
    assert (code, error) == (128 + number, f"{script}: interrupted\n")


def a_signal_at_any_other_time(program, line, number):
    code, error = signalled([sys.executable, "-c", HEAD + "\n" + program], number)
    assert code == 128 + number and error.startswith(line) and error.count("\n") == 1


def what_is_ignored_stays_ignored(number):
    """As SIGHUP is under nohup, and SIGINT in the background of a shell script."""
    body = "def main():\n    say('ready'); sys.stdin.readline(); say('end')\nrun_main('p', main)"
    code = f"import signal; signal.signal({int(number)}, signal.SIG_IGN)\n{HEAD}\n{body}"
    pipes = {"stdout": subprocess.PIPE, "stdin": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate("\n", timeout=30)[0] == "end\n" and process.returncode == 0


def a_signal_while_the_hub_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"}
        line = [sys.executable, "glue_moefy.py", "--task", "rte"]
        with subprocess.Popen(line, cwd=ROOT, env=CALM | host, text=True, stderr=subprocess.PIPE) as process:
            with server.accept()[0]:  # open, and silent
                process.send_signal(signal.SIGTERM)
                assert process.communicate(timeout=30)[1] == "glue_moefy.py: interrupted\n" and process.returncode == 143


HERE = "import os, signal\ndef here(): os.kill(os.getpid(), {number})\n"
STEP = """
import torch
real, count = torch.optim.AdamW.step, []
def step(self, *args, **kwargs):
    count.append(1)
    [here() for _ in range({times} * (len(count) == 5))]
    return real(self, *args, **kwargs)
torch.optim.AdamW.step = step
"""
AT = """
import {module} as module
real = module.{name}
def at(*args, **kwargs):
    here()
    return real(*args, **kwargs)
module.{name} = at
"""
NOTICE = "stopping after this step, which is saved; a second signal stops at once\n"
KEPT = "finished runs are kept, the same command with --resume continues"


def a_signal_during_a_run(code, line, number, *, words, tmp_path, server):
    process = Forked("glue_moefy.py", *words, "--save-model", before=HERE.format(number=int(number)) + code)
    assert process.wait(timeout=120) == 128 + number, process.read("stderr")[-2000:]
    assert process.read("stderr") == line.replace("@", "glue_moefy.py: interrupted: ") + "\n"
    assert not [path for path in tmp_path.rglob("*") if "unfinished" in path.name], "a temporary folder is left"


def a_signal_to_one_of_several_processes_stops_all_and_one_speaks(rank, *, words, server):
    before = HERE.format(number=int(signal.SIGHUP)).replace("here(): ", f"here(): os.environ['RANK'] == '{rank}' and ")
    started = Launched(2, "glue_moefy.py", *words, "--epochs", "4", before=before + STEP.format(times=1))
    assert [one.wait(timeout=60) for one in started.ranks] == [129, 129]
    line = "glue_moefy.py: interrupted: ce-s0 is saved after epoch 2; the same command with --resume continues there\n"
    assert [one.read("stderr") for one in started.ranks] == [NOTICE * (rank == "0") + line, ""]


def a_signal_while_a_model_is_used(number, *, saved, tmp_path, monkeypatch, capsys, handlers):
    """It trains nothing, so that there is nothing to resume; what was begun is gone."""
    (tmp_path / "x.jsonl").write_text(json.dumps(EXAMPLES[0]) + "\n")
    monkeypatch.setattr("lab.text.use.compute_logits", lambda *_, **__: os.kill(os.getpid(), number))
    args = glue_moefy.parse(["--predict", str(tmp_path / "x.jsonl"), "--run", str(saved), "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        run_main("glue_moefy.py", lambda: glue_moefy.main(args), resumes=False)
    assert stop.value.code == 128 + number and capsys.readouterr().err == "glue_moefy.py: interrupted\n"
    assert os.listdir(tmp_path) == ["x.jsonl"]


# ---- 4. The table ----


def each(name, *row) -> dict:
    """The rows of a case for every signal."""
    return {f"{name}-{number.name}": (*row, number) for number in ALL}


GLUE_PATHS = ["model", "data-dir", "predict", "run", "output", "inspect", "output-dir", "html"]
LVLM_PATHS = ["clip", "lm", "data", "image-dir", "eval-data", "image", "run", "inspect", "output-dir", "html"]
FLAGS = [(glue_moefy, name) for name in GLUE_PATHS] + [(toy_lvlm, name) for name in LVLM_PATHS]
NAMES = [  # a name that no flag takes, and the reason
    ("", "'': the name is empty"),
    (LONG, "File name too long"),
    (f"a/{LONG}/b", "File name too long"),  # a is not there
    ("é" * 128, "File name too long"),
    ("a/" * 3000, "File name too long"),
    ("a\0b", "embedded null byte"),
    (f"a{RAW}", "it is not UTF-8"),
    (f"{RAW}/{RAW}", "it is not UTF-8"),
    ("\ud83d.json", "it is not UTF-8"),
    ("~no-such-user", "there is no such user"),
    ("~no-such-user/bert", "there is no such user"),
    ("file/inside", "Not a directory"),
    ("loop", "symbolic links"),
]
FOLDERS = {"data-dir", "run", "inspect", "output-dir", "model", "clip", "lm", "image-dir"}
FOLDER, FILE = "it is not a folder that can be read", "it is not a file that can be read"
OTHER_KINDS = [  # of a flag: a name of the other kind, and the reason
    (flag, name, FOLDER if flag[1] in FOLDERS else FILE)
    for flag in FLAGS
    for name in (("file", "closed/") if flag[1] in FOLDERS else ("folder", "closed.json", "pipe"))
]
ABSENT = [
    (flag, "nowhere", "no such")
    for flag in FLAGS
    if flag[1] in ("data-dir", "predict", "run", "inspect", "data", "image-dir", "eval-data", "image")
]
PATHS = [(flag, *case) for flag in FLAGS for case in NAMES] + OTHER_KINDS + ABSENT
THERE = "the same command with --resume continues there"
SAY = HEAD + "run_main('p', lambda: [say('中' * 99) for _ in range(999)])"
BAD = HEAD + "\ndef main():\n    say('x')\n    raise UserError('no')\nrun_main('p', main)"
FULL = "p: stopped: [Errno 28] No space left on device; free the disk, then the same command with --resume continues\n"
SLEEP = f"say('ready'); {WAIT}"
EXIT = f"import atexit\ndef f():\n    {SLEEP}\natexit.register(f)\n"
JOIN = "import threading\ndef main():\n    thread = threading.Thread(target=f, daemon=True); thread.start(); thread.join()\n"
CATCH = f"def main():\n    try:\n        {SLEEP}\n    except Exception:\n        say('swallowed')\n"
CASES = {
    a_path_that_cannot_be_is_one_line: {
        f"{script.__name__} --{flag} {name!r:.40}": (script, flag, name, reason) for (script, flag), name, reason in PATHS
    },
    a_thing_without_permissions: [
        ("folder", 0o444, False, FOLDER),
        ("folder", 0o111, False, FOLDER),
        ("folder", 0o555, False, None),
        ("file", 0o222, False, FILE),
        ("file", 0o444, False, None),
        ("file", 0o666, True, "Permission denied"),  # in a folder that may not be entered
        ("new file", 0o666, True, "Permission denied"),
    ],
    home_is_expanded: [
        ("folder", "~/bert", "bert"),
        ("model", "~", ""),
        ("new folder", "~/x/y", "x/y"),
        ("file", "HOME/a~b", "a~b"),
    ],
    a_folder_with_the_name_of_the_hub_is_said_to_be_read: [
        ("nyu-mll/glue", "--model bert", "note: the data are read from the folder nyu-mll/glue here, not from the hub"),
        ("google-bert/bert-large-cased", "", "note: --model google-bert/bert-large-cased is the folder of this name, not a"),
        ("bert", "--model bert --data-dir nyu", "note: --model bert is the folder of this name, not a model of the hub"),
        ("bert", "--model ./bert --data-dir nyu", ""),
    ],
    neither_a_folder_nor_a_name_of_the_hub: ["a b/c", "a/b/c", "../x", "a\nb", "\x1b[2J", "中/文", "-a/b", "a//b"],
    a_backslash_in_the_data: [
        (["dogs\\7.png"], "dogs\\7.png", None),
        (["a\\b\\c.png"], "a\\b\\c.png", None),
        (["\\"], "x\\", r"picture not found: 'x\', write / instead of its \ "),
        (["dogs/7.png"], "dogs\\7.png", r"picture not found: 'dogs\7.png', write / instead of its \ "),
        ([], "a\\b\n.png", r"picture not found: 'a\b\n.png', write / instead of its \ "),
        ([], "..\\7.png", r"path outside --image-dir: '..\\7.png'"),
    ],
    what_could_change_the_terminal_is_escaped: [
        ("a\nb\r\n", r"a\nb\r\n"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("a\u202eb\u2028", r"a\u202eb\u2028"),
        (f"a{RAW}", r"a\udcff"),
        ("中文 ça 🐈", "中文 ça 🐈"),
        ("a\tb\x00", r"a\tb\x00"),
    ],
    one_process_speaks: ONCE,
    another_process_fails_alone: ONCE,
    a_line_is_not_longer_than_a_screen: ONCE,
    nothing_else_prints: ONCE,
    every_encoding_can_say_everything: ["ascii", "cp1252", "utf-8", "latin-1"],
    a_closed_pipe_or_a_full_disk: [
        (["-c", SAY], "| true", 141, ""),
        (["-c", SAY], "| head -1 > /dev/null", 141, ""),
        (["-c", SAY], "> /dev/full", 1, FULL),
        (["-c", HEAD + "run_main('p', lambda: say('a'))"], "> /dev/full", 1, FULL),
        (["-c", HEAD + "import time; run_main('p', lambda: [time.sleep(0.3), say('a')])"], "| true", 141, ""),
        (["-c", SAY], "2> /dev/full > /dev/full", 1, ""),
        (["-c", SAY], ">&-", 0, ""),
        (["-c", BAD], "2> /dev/full", 2, ""),
        (["-c", BAD], "2>&-", 2, ""),
        (["-c", BAD], "> /dev/null", 2, "p: error: no\n"),
        (["glue_moefy.py", "--help"], "> /dev/full", 1, "glue_moefy.py: stopped: [Errno 28] No space left on"),
        (["toy_lvlm.py", "--help"], "> /dev/null", 0, ""),
        (["toy_lvlm.py", "--tau", "2"], "2> /dev/full", 2, ""),
        (["toy_lvlm.py", f"--run=\x1b[2J{RAW}\n"], "", 2, r"toy_lvlm.py: error: argument --run: '\x1b[2J\udcff\n'"),
    ],
    any_name_is_drawn: ["a$\\x$", "a$b", "$\\frac{1$", "中文", "\x1b[31m", "a\nb", "🐈 $", "_x"],
    a_signal_during_the_imports: {**each("glue", "glue_moefy.py", "datasets"), **each("lvlm", "toy_lvlm.py", "torch")},
    a_signal_at_any_other_time: {
        **each("main", f"def main():\n    {SLEEP}\nrun_main('p', main, False)", "p: interrupted\n"),
        **each("main that resumes", f"def main():\n    {SLEEP}\nrun_main('p', main)", f"p: interrupted: {KEPT}\n"),
        **each("after main", f"run_main('p', lambda: 0)\n{SLEEP}", "p: interrupted\n"),
        **each("exit", f"{EXIT}run_main('p', lambda: 0)", "p: interrupted\n"),
        **each("exit after an error", f"{EXIT}def main():\n    raise UserError('x')\nrun_main('p', main)", "p: error: x\n"),
        **each(
            "reading", "def main():\n    say('ready'); sys.stdin.readline()\nrun_main('p', main, False)", "p: interrupted\n"
        ),
        **each("a thread", f"def f():\n    {SLEEP}\n{JOIN}run_main('p', main, False)", "p: interrupted\n"),
        **each("a guard", f"{CATCH}run_main('p', main, False)", "p: interrupted\n"),
    },
    what_is_ignored_stays_ignored: [signal.SIGHUP, signal.SIGINT],
    a_signal_while_the_hub_does_not_answer: ONCE,
    a_signal_during_a_run: {
        **each("step", STEP.format(times=1), f"{NOTICE}@ce-s0 is saved at step 5; {THERE}"),
        **each("twice", STEP.format(times=2), f"{NOTICE}@at once; --resume continues from the last checkpoint"),
        **each(
            "evaluation",
            AT.format(module="lab.text.metrics", name="GlueMetric._compute"),
            f"{NOTICE}@ce-s0 is saved after epoch 1; {THERE}",
        ),
        **each("load", AT.format(module="lab.text.glue", name="load_source"), f"@{KEPT}"),
        **each("library", AT.format(module="transformers", name="AutoConfig.from_pretrained"), f"@{KEPT}"),
        **each("draw", AT.format(module="lab.report.figures", name="plot_run"), f"@{KEPT}"),
        **each("save", AT.format(module="lab.text.use", name="write_task_card"), f"@{KEPT}"),
    },
    a_signal_to_one_of_several_processes_stops_all_and_one_speaks: ["0", "1"],
    a_signal_while_a_model_is_used: ALL,
}
