"""README's first commands print what its logs show: the same lines, with other numbers after less training."""

import re
from functools import partial

from test_glue import run

from lab.report import quick, readme
from lab.text import toy


def lines_of(text: str) -> list[str]:
    """Without numbers, epochs, empty lines and collapses. Of a row of scores only the metric and the variant."""
    found = []
    for line in text.splitlines():
        if line.strip() and not line.startswith(("task=", "collapse: ")):
            line = " ".join(line.split()[:2]) if line.startswith("accuracy") else line
            line = line.removesuffix("  collapsed")
            found.append(" ".join(re.sub(r"[-+]?\d[\d.]*(e-\d+)?", "#", line).split()))
    return found


def log_of(name: str) -> list[str]:
    return lines_of("\n".join((readme.ROOT / "results" / f"log-{name}.txt").read_text().splitlines()[1:-1]))


def test_the_first_command_prints_what_readme_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "make_pairs", partial(toy.make_pairs, num_train=32, num_dev=16))
    monkeypatch.setattr(toy, "pretrain", partial(toy.pretrain, steps=2))
    monkeypatch.chdir(tmp_path)
    run("--task rte --toy --device cpu --epochs 1".split())
    assert lines_of(capsys.readouterr().out) == log_of("toy")


def test_the_second_command_prints_what_readme_shows(monkeypatch):
    for name, small in (("SEEDS", 1), ("STEPS", 5), ("ROUNDS", 3)):
        monkeypatch.setattr(quick, name, small)
    lines = [*quick.measure_all()]
    assert lines_of("\n".join(lines)) == log_of("quick")
    assert not any("\n" in line for line in lines)  # `say` would escape it
