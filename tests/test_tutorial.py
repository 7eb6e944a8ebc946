"""The tutorial stays true: its code runs, its quotes are the code, its links lead where they say, its list is complete."""

import contextlib
import io
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import stgc
import stgc_plus
from lab.report import figures

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "tutorial.md").read_text()
FENCE = re.compile(r"^```(\w+)[^\S\n]*([^\n]*)\n(.*?)^```$", re.M | re.S)
PARTS = {"stgc.py": "", "stgc_plus.py": "II."}  # the two files, and how the titles of their part begin
LEGEND = "CHOICE: the paper is silent.\nDIFFERS: we knowingly depart."  # stgc.py says what the tags mean
CODE = [cell for cell in json.loads((ROOT / "tutorial.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
OUTPUTS = ["".join(row for out in cell["outputs"] for row in out["text"]) for cell in CODE[1:]]  # the first gets the files
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")
TAGS = re.compile(r"\b(CHOICE|DIFFERS): ((?:[^\n]|\n)*?\S(?:\s+(?:# )?\S+){2})")  # a tag and the first three words behind it


def fences(language: str, mark: str = "") -> list[tuple[int, str]]:
    """(line of its first code line, code) of each fence of this language that is marked so. Lines count from 1."""
    found = [fence for fence in FENCE.finditer(TEXT) if (fence[1], fence[2].strip()) == (language, mark)]
    return [(TEXT[: fence.start(3)].count("\n") + 1, fence[3]) for fence in found]


def numbered(file: str) -> dict[str, str]:
    """The numbered sections of a file's part: title, as the file has it, to text."""
    found = re.findall(
        r"^## (\S+ .+)\n((?:(?!^##? ).*\n)*)", FENCE.sub(lambda fence: re.sub(r"^#", " #", fence[0], flags=re.M), TEXT), re.M
    )
    return {
        title.removeprefix(PARTS[file]): text for title, text in found if re.match(re.escape(PARTS[file]) + r"\d+\. ", title)
    }


def title_above(line: int) -> str:
    return next(row[3:] for row in reversed(TEXT.splitlines()[: line - 1]) if row.startswith("## "))


def test_every_fence_is_checked():
    """No fence of a kind that no test below looks at, and none that is left open."""
    kinds = {(fence[1], fence[2].strip()) for fence in FENCE.finditer(TEXT)}
    assert kinds == {("python", ""), *(("python", f"from={file}") for file in PARTS), ("bash", ""), ("math", "")}
    assert len(re.findall(r"^\s*```", TEXT, re.M)) == 2 * len(FENCE.findall(TEXT))


@pytest.mark.slow
def test_code_runs_in_order(monkeypatch):
    """All python fences in one namespace, from the project's folder. A traceback has the tutorial's line numbers. Each
    numbered section prints something to look at, and no fence prints more than a screen. The notebook has what is printed;
    numbers after a training differ from one CPU to another."""
    monkeypatch.chdir(ROOT)
    scope, code, titles = {"__name__": "tutorial"}, fences("python"), set()
    assert len(code) > 60
    with torch.random.fork_rng():
        for (line, source), output in zip(code, OUTPUTS, strict=True):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile("\n" * (line - 1) + source, str(ROOT / "tutorial.md"), "exec"), scope)
            rows = printed.getvalue().splitlines()
            assert NUMBER.sub("#", printed.getvalue()).split() == NUMBER.sub("#", output).split(), line
            new, old = (list(map(float, NUMBER.findall(text))) for text in (printed.getvalue(), output))
            assert new == pytest.approx(old, rel=0.05, abs=0.05), line
            assert len(rows) < 25 and all(len(row) < 125 for row in rows), (line, rows)
            titles |= {title_above(line)} if rows else set()
    assert titles >= {PARTS[file] + title for file in PARTS for title in numbered(file)}


@pytest.mark.slow
@pytest.mark.parametrize("lecture", ["45", "90"])
def test_a_lecture_runs_without_the_rest(monkeypatch, lecture):
    """The fences of its sections, and those in front of the sections, which import things."""
    monkeypatch.chdir(ROOT)
    wanted = {
        title for title, marks in re.findall(r"^## (.+)\n\n\*(.+)\*$", TEXT, re.M) if re.search(rf"\b{lecture}\b", marks)
    }
    scope, ran = {"__name__": "tutorial"}, 0
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        for line, source in fences("python"):
            above = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), TEXT).splitlines()[: line - 1]
            heading = next(row for row in reversed(above) if re.match("##? ", row))
            if heading.startswith("# ") or heading.removeprefix("## ") in wanted:
                exec(compile("\n" * (line - 1) + source, str(ROOT / "tutorial.md"), "exec"), scope)
                ran += 1
    assert ran > {"45": 20, "90": 40}[lecture]


@pytest.mark.parametrize("file, parts", [("stgc.py", ["```math"]), ("stgc_plus.py", [])])
def test_each_section_proves_something(file, parts):
    """A numbered section has a quote, an assert and an exercise with an answer; one of part I has an equation, too."""
    sections = numbered(file)
    assert len(sections) == {"stgc.py": 9, "stgc_plus.py": 8}[file]
    parts = ["assert ", f"```python from={file}", "**Exercise.**", "<details><summary>Answer</summary>", *parts]
    for title, section in sections.items():
        for part in parts:
            assert part in section, (title, part)
    assert TEXT.count("<details>") == TEXT.count("</details>") == TEXT.count("**Exercise.**")


@pytest.mark.parametrize("file", PARTS)
def test_quotes_are_the_code(file):
    """Quotes are whole lines of the file, in its order, and each is from the section of that file that it stands in."""
    source, position = (ROOT / file).read_text(), 0
    quotes = fences("python", f"from={file}")
    assert len(quotes) > 10
    for line, quote in quotes:
        assert f"\n{quote}" in source[position:], (line, f"not in {file} behind the quote before", quote)
        position += source[position:].index(f"\n{quote}") + len(quote)
        banner = re.findall(r"^# ---- (.+) ----$", source[:position], re.M)[-1]
        assert PARTS[file] + banner == title_above(line), (line, quote)


@pytest.mark.parametrize("file", PARTS)
def test_titles_are_those_of_the_file(file):
    banners = re.findall(r"^# ---- (.+) ----$", (ROOT / file).read_text(), re.M)
    assert banners
    assert re.findall(rf"^## {re.escape(PARTS[file])}(\d+\. .+)$", TEXT, re.M) == banners


def test_lectures_last_as_long_as_they_say():
    """The table has each section with its minutes, each section repeats its mark, and the two lectures add up."""
    rows = re.findall(r"^\| \[(.+)\]\(#\S+\) \| (\d+) \| (yes)? ?\| (yes)? ?\|$", TEXT, re.M)
    marks = {("yes", "yes"): "In the lectures of 45 and of 90 minutes", ("", "yes"): "In the lecture of 90 minutes"}
    shown = re.findall(r"^## (.+)\n\n\*(\d+) minutes?(?:\. (.+)\.|, at home\.)\*$", TEXT, re.M)
    assert [
        (title, minutes, marks.get(lectures, "")) for title, minutes, *lectures in rows for lectures in [tuple(lectures)]
    ] == shown
    assert [title for title, *_ in rows] == [row[3:] for row in FENCE.sub("", TEXT).splitlines() if row.startswith("## ")]
    assert sum(int(minutes) for _, minutes, short, _ in rows if short) == 45
    assert sum(int(minutes) for _, minutes, _, long in rows if long) == 90


def test_the_table_of_hooks_is_complete():
    """Every method whose docstring begins with "Hook" has a row, in the file's order, which says whether it is extended."""
    hooks = {}
    for owner in vars(stgc).values():
        if isinstance(owner, type) and owner.__module__ == "stgc":
            for name, method in vars(owner).items():
                if (getattr(method, "__doc__", None) or "").startswith("Hook"):
                    hooks[f"{owner.__name__}.{name}"] = name in vars(getattr(stgc_plus, owner.__name__))
    rows = re.findall(r"^\| `([A-Z]\w+\.\w+)` \| .+? \| (.+) \|$", TEXT, re.M)
    assert {hook: not extension.startswith("-") for hook, extension in rows} == hooks and len(hooks) > 8
    assert [hook for hook, _ in rows] == list(hooks)


@pytest.mark.parametrize("line, script", fences("bash"))
def test_shell_parses(line, script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for word in re.findall(r"[\w/]+\.py\b", script):
        assert (ROOT / word).exists(), (line, word)


def titles(page: str) -> set[str]:
    """The anchors of a page's headings."""
    named = set(re.findall(r'<a id="([\w-]+)"></a>', page))
    return named | {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in re.findall(r"^##? (.+)$", page, re.M)}


PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("name", [*PAGES, "results/README.md"])
def test_links_lead_somewhere(name):
    page = FENCE.sub("", (ROOT / name).read_text())
    links = re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", page)
    assert links or name.startswith("results")
    for text, target in links:
        path, _, anchor = target.partition("#")
        if not target.startswith("https://"):
            assert ((ROOT / name).parent / path).exists(), target
        if anchor and (not path or path.endswith(".md")):
            assert anchor in titles(((ROOT / name).parent / path).read_text() if path else page), target
        elif anchor:
            row = (ROOT / path).read_text().splitlines()[int(re.fullmatch(r"L(\d+)", anchor)[1]) - 1]
            name = text.strip("`").split(".")[-1]
            assert re.search(rf"\b{name}\b", row), (text, target, row)
            assert name != "tutorial.md" or re.match(rf"\s*(class|def) {name}\b", row), (text, target, row)


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
        for tag, words in TAGS.findall(path.read_text().replace(LEGEND, "")):
            code.append((path.relative_to(ROOT).as_posix(), tag, " ".join(re.sub(r"\n\s*(# )?", " ", words).split()[:3])))
    listed = re.findall(r"^\| `([\w/]+\.py)` \| (CHOICE|DIFFERS) \| (.+?) \|", TEXT, re.M)
    assert sorted(code) == sorted(listed)
