"""The tutorial stays true: its code runs, its quotes are the code, its links lead where they say, its list is complete."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lab.report import figures

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "tutorial.md").read_text()
FENCE = re.compile(r"^```(\w+)[^\S\n]*([^\n]*)\n(.*?)^```$", re.M | re.S)
TAGS = re.compile(r"\b(CHOICE|DIFFERS): ((?:[^\n]|\n)*?\S(?:\s+(?:# )?\S+){2})")  # a tag and the first three words behind it


def fences(language: str, mark: str = "") -> list[tuple[int, str]]:
    """(line of its first code line, code) of each fence of this language that is marked so. Lines count from 1."""
    found = [fence for fence in FENCE.finditer(TEXT) if (fence[1], fence[2].strip()) == (language, mark)]
    return [(TEXT[: fence.start(3)].count("\n") + 1, fence[3]) for fence in found]


def title_above(line: int) -> str:
    return next(row[3:] for row in reversed(TEXT.splitlines()[: line - 1]) if row.startswith("## "))


def test_every_fence_is_checked():
    """No fence of a kind that no test below looks at, and none that is left open."""
    kinds = {(fence[1], fence[2].strip()) for fence in FENCE.finditer(TEXT)}
    assert kinds == {("python", ""), ("python", "from=stgc.py"), ("bash", ""), ("math", "")}
    assert len(re.findall(r"^\s*```", TEXT, re.M)) == 2 * len(FENCE.findall(TEXT))


def test_code_runs_in_order(monkeypatch):
    """All python fences in one namespace, from the project's folder. A traceback has the tutorial's line numbers."""
    monkeypatch.chdir(ROOT)
    scope, code = {"__name__": "tutorial"}, fences("python")
    assert len(code) > 30
    with torch.random.fork_rng():
        for line, source in code:
            exec(compile("\n" * (line - 1) + source, str(ROOT / "tutorial.md"), "exec"), scope)


def test_each_section_proves_something():
    """A section with code of its own has an assert, an equation and an exercise with an answer."""
    sections = re.split(r"^## ", TEXT, flags=re.M)[1:]
    numbered = [section for section in sections if re.match(r"\d+\. ", section)]
    assert len(numbered) == 10
    for section in numbered:
        for part in ("assert ", "```math", "```python from=stgc.py", "**Exercise.**", "<details><summary>Answer</summary>"):
            assert part in section, (section.splitlines()[0], part)
    assert TEXT.count("<details>") == TEXT.count("</details>") == TEXT.count("**Exercise.**")


def test_quotes_are_the_code():
    """Quotes are whole lines of stgc.py, in its order, and each is from the section of that file that it stands in."""
    source, position = (ROOT / "stgc.py").read_text(), 0
    quotes = fences("python", "from=stgc.py")
    assert len(quotes) > 10
    for line, quote in quotes:
        assert f"\n{quote}" in source[position:], (line, "not in stgc.py behind the quote before", quote)
        position += source[position:].index(f"\n{quote}") + len(quote)
        assert re.findall(r"^# ---- (.+) ----$", source[:position], re.M)[-1] == title_above(line), (line, quote)


def test_titles_are_those_of_the_file():
    banners = re.findall(r"^# ---- (.+) ----$", (ROOT / "stgc.py").read_text(), re.M)
    assert banners
    assert re.findall(r"^## (\d+\. .+)$", TEXT, re.M) == banners


@pytest.mark.parametrize("line, script", fences("bash"))
def test_shell_parses(line, script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for word in re.findall(r"[\w/]+\.py\b", script):
        assert (ROOT / word).exists(), (line, word)


@pytest.mark.parametrize("name", ["tutorial.md", "README.md", "results/README.md"])
def test_links_lead_somewhere(name):
    page = FENCE.sub("", (ROOT / name).read_text())
    links = re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", page)
    titles = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^##? (.+)$", page, re.M)}
    assert links or name.startswith("results")
    for text, target in links:
        path, _, anchor = target.partition("#")
        if not target.startswith("https://"):
            assert ((ROOT / name).parent / path).exists(), target
        if anchor and not path:
            assert anchor in titles, target
        elif anchor:
            row = (ROOT / path).read_text().splitlines()[int(re.fullmatch(r"L(\d+)", anchor)[1]) - 1]
            assert re.search(rf"\b{text.strip('`')}\b", row), (text, target, row)


def test_pictures_have_words():
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", TEXT)
    assert pictures and all(len(words) > 60 for words, _ in pictures)


def test_pictures_show_what_the_text_says(tmp_path):
    rows = re.findall(r"^\| ([a-f]) \| .+? \| (\d) \| \((-?\d+), (-?\d+)\) \|", TEXT, re.M)
    told = {(int(expert), name): (int(x), int(y)) for name, expert, x, y in rows}
    assert told == {(e, name): grad for e, grads in figures.SIX_TOKENS.items() for name, grad in grads.items()}
    z = torch.tensor([0.7, 0.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    score, label = z.softmax(0)[0], torch.tensor(0)
    losses = [F.cross_entropy(-z, label), score**2, -F.cross_entropy(z, label)]
    drawn = [push.item() for push in figures.pushes(score.detach().numpy()).values()]
    assert drawn == pytest.approx([torch.autograd.grad(loss, z, retain_graph=True)[0][0].item() for loss in losses])
    for draw in (figures.draw_six_tokens, figures.draw_push, figures.draw_taps):
        draw(tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 10_000


def test_the_list_of_choices_is_complete():
    """Each CHOICE and DIFFERS of the code has a row, and each row is in the code: by file, tag and first three words."""
    code = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lab/**/*.py")]:
        for tag, words in TAGS.findall(path.read_text()):
            code.append((path.relative_to(ROOT).as_posix(), tag, " ".join(re.sub(r"\n\s*(# )?", " ", words).split()[:3])))
    listed = re.findall(r"^\| `([\w/]+\.py)` \| (CHOICE|DIFFERS) \| (.+?) \|", TEXT, re.M)
    assert sorted(code) == sorted(listed)
