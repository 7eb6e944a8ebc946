"""The notebooks are their pages, and the grader of exercises.ipynb tells right from wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lab.report import grader, notebook
from lab.run.cli import UserError

ROOT = Path(__file__).parent.parent
BOOKS = {name: json.loads((ROOT / f"{name}.ipynb").read_text()) for name in notebook.PAGES}
SOURCES = {name: ["".join(cell["source"]) for cell in book["cells"]] for name, book in BOOKS.items()}
NEEDED = "no nbformat or nbclient: the notebooks are not compared with their pages, or not run in Jupyter"


# ---- 1. The notebooks ----
@pytest.mark.parametrize("name", notebook.PAGES)
def test_a_notebook_is_its_page(name):
    """To the byte, apart from its outputs: `python -m lab.report.notebook` writes both anew."""
    nbformat = pytest.importorskip("nbformat", reason=NEEDED)
    page, book = (ROOT / f"{name}.md").read_text(), nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    assert (ROOT / f"{name}.ipynb").read_text() == nbformat.writes(book) + "\n"
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert all((output.output_type, output.name) == ("stream", "stdout") for output in cell.outputs)
        cell.outputs, cell.execution_count = [], None
    assert nbformat.writes(book) == nbformat.writes(notebook.convert(page))


def test_what_becomes_of_the_page():
    """Code is code; quotes, shell lines and formulas are text; the code of answers is hidden."""
    page = (ROOT / "tutorial.md").read_text()
    code = [cell for cell in BOOKS["tutorial"]["cells"] if cell["cell_type"] == "code"]
    hidden = [cell for cell in code if cell["metadata"] == notebook.HIDDEN]
    text = "\n".join("".join(cell["source"]) for cell in BOOKS["tutorial"]["cells"] if cell["cell_type"] == "markdown")
    assert ["".join(cell["source"]) for cell in code[1:]] == [
        source.strip() for source in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    ]
    answers = re.findall(r"<details>(.*?)</details>", page, re.S)
    assert len(hidden) == sum(answer.count("```python\n") for answer in answers) > 10
    assert text.count("<details>") == text.count("</details>") >= len(answers)
    assert len(re.findall(r"^\$\$\n[^$]+\n\$\$$", text, re.M)) == page.count("```math") > 10
    assert "$`" not in text and "`$" not in text and "```math" not in text and "from=" not in text
    assert text.count("```bash\n") == page.count("```bash\n")
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) == set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("name", notebook.PAGES)
def test_the_first_cell_gets_the_files(name, tmp_path, monkeypatch):
    """In a clone it does nothing. Elsewhere it clones from the address that is written there, and installs."""
    first, calls = SOURCES[name][0], []

    def fake(words, check):
        assert check
        calls.append(words)
        Path("stgc-project").mkdir(exist_ok=True)

    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.chdir(ROOT)
    exec(first, {})
    assert not calls and Path.cwd() == ROOT
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="write the address"):
        exec(first, {})
    exec(first.replace('repository = ""', 'repository = "https://a.b/c"'), {})
    assert calls[0] == ["git", "clone", "--depth", "1", "https://a.b/c", "stgc-project"]
    assert calls[1] == [sys.executable, "-m", "pip", "install", "-q", "-r", "requirements.txt"]
    assert Path.cwd() == tmp_path / "stgc-project"


@pytest.mark.slow
def test_a_kernel_runs_the_exercises():
    """As `python -m lab.report.notebook` does with both; the code of the tutorial is run by test_tutorial.py."""
    nbformat = pytest.importorskip("nbformat", reason=NEEDED)
    pytest.importorskip("nbclient", reason=NEEDED)
    pytest.importorskip("ipykernel", reason=NEEDED)
    book = notebook.execute(notebook.convert((ROOT / "exercises.md").read_text()))
    assert nbformat.writes(book) + "\n" == (ROOT / "exercises.ipynb").read_text()
    assert nbformat.writes(book).count("not written yet") == 4


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook"])
    monkeypatch.setitem(sys.modules, "nbformat", None)
    with pytest.raises(UserError, match="nbformat is missing: pip install -r requirements-dev.txt"):
        notebook.main()


# ---- 2. The exercises ----
MOE = """
def moe(x_TD, router_ED, experts, top_k, normalize):
    weights_TK, ids_TK = (x_TD @ router_ED.T).softmax(-1).topk(top_k)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    y_TD = torch.zeros_like(x_TD)
    for e, expert in enumerate(experts):
        token_N, choice_N = (ids_TK == e).nonzero(as_tuple=True)
        y_TD[token_N] += weights_TK[token_N, choice_N].unsqueeze(1) * expert(x_TD[token_N])
    return y_TD
"""
COSINE = """
def cosine_to_mean(grad_SD, expert_ids_S, num_experts):
    sum_ED = grad_SD.new_zeros(num_experts, grad_SD.shape[1]).index_add(0, expert_ids_S, grad_SD)
    mean_ED = sum_ED / expert_ids_S.bincount(minlength=num_experts).clamp_min(1).unsqueeze(1)
    return F.cosine_similarity(grad_SD, mean_ED[expert_ids_S], dim=1, eps=1e-60)
"""
LOSS = """
def conflict_loss(logits_TE, expert_ids_TK, conflict_TK):
    loss_TK = -(-logits_TE).log_softmax(-1).gather(1, expert_ids_TK)
    return (loss_TK * conflict_TK).sum() / conflict_TK.sum().clamp_min(1)
"""
ONE_PASS = """
class OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_SD, logits_TE, expert_ids_TK):
        ctx.save_for_backward(logits_TE, expert_ids_TK)
        return y_SD.view_as(y_SD), logits_TE.new_zeros(())

    @staticmethod
    def backward(ctx, grad_SD, grad_zero):
        logits_TE, expert_ids_TK = ctx.saved_tensors
        cos_S = cosine_to_mean(grad_SD, expert_ids_TK.flatten(), logits_TE.shape[1])
        with torch.enable_grad():
            z_TE = logits_TE.detach().requires_grad_()
            loss = conflict_loss(z_TE, expert_ids_TK, (cos_S < 0).view_as(expert_ids_TK))
        return grad_SD, grad_zero * torch.autograd.grad(loss, z_TE)[0], None
"""
ANSWERS = {"moe": MOE, "cosine_to_mean": COSINE, "conflict_loss": LOSS, "one_pass": ONE_PASS}
NAMES = {name: re.search(r"(?:def|class) (\w+)", code)[1] for name, code in ANSWERS.items()}
WRONG = [  # exercise, what is right, what is wrong, part of the line
    ("moe", "if normalize:", "if not normalize:", "sum to 1"),
    ("moe", "if normalize:", "if True:", "without normalize the softmax is over all E experts"),
    ("moe", ".softmax(-1)", ".softmax(0)", "the softmax is over the experts of a token"),
    ("moe", "weights_TK[token_N, choice_N].unsqueeze(1) * ", "", "multiply each output by its weight"),
    ("moe", "+= weights", "= weights", "add their outputs, do not overwrite"),
    ("moe", "expert(x_TD[token_N])", "expert(x_TD)[token_N]", "the number of rows that the experts ran is 96 instead of 24"),
    ("moe", "return y_TD", "return y_TD.float()", "is (24, 6) torch.float32, and must be a tensor (24, 6) torch.float64"),
    ("moe", "return y_TD", "pass", "y_TD is a NoneType, and must be a tensor"),
    ("moe", "return y_TD", "y_TD[5, 2] += 1\n    return y_TD", "at token 5, feature 2, where it differs most."),
    ("cosine_to_mean", "mean_ED[expert_ids_S]", "grad_SD.mean(0, keepdim=True)", "not over all"),
    ("cosine_to_mean", "mean_ED[expert_ids_S]", "sum_ED[expert_ids_S] - grad_SD", "belongs to the mean of its expert"),
    ("cosine_to_mean", "expert_ids_S, grad_SD)", "expert_ids_S, F.normalize(grad_SD))", "not of unit vectors"),
    ("cosine_to_mean", "F.cosine_similarity(grad_SD, mean_ED[expert_ids_S], dim=1, eps=1e-60)",
     "(grad_SD * mean_ED[expert_ids_S]).sum(1)", "divided by both lengths"),
    ("cosine_to_mean", "F.cosine_similarity(grad_SD, mean_ED[expert_ids_S], dim=1, eps=1e-60)",
     "((g := grad_SD) * (m := mean_ED[expert_ids_S])).sum(1) / g.norm(dim=1) / m.norm(dim=1)", "its cosine is 0"),
    ("cosine_to_mean", ", eps=1e-60", "", "shorter than eps"),
    ("cosine_to_mean", "eps=1e-60)", "eps=1e-60) + F.one_hot(torch.tensor(3), len(grad_SD))", "at pair 3, where"),
    ("conflict_loss", "(-logits_TE)", "logits_TE", "CE(z, e) raises the logit of e"),
    ("conflict_loss", "-(-logits_TE)", "logits_TE", "-CE(z, e) has no lower bound"),
    ("conflict_loss", " / conflict_TK.sum().clamp_min(1)", "", "not their sum"),
    ("conflict_loss", "conflict_TK.sum().clamp_min(1)", "conflict_TK.numel()", "not over all pairs"),
    ("conflict_loss", ".clamp_min(1)", "", "0/0"),
    ("conflict_loss", "logits_TE)", "logits_TE.detach())", "do not detach it"),
    ("one_pass", "grad_zero * ", "", "multiply by the derivative of the total"),
    ("one_pass", "grad_zero * ", "-grad_zero * ", "not the step against it"),
    ("one_pass", "grad_zero * torch.autograd.grad(loss, z_TE)[0]", "None", "no gradient on the logits"),
    ("one_pass", "return grad_SD, ", "return None, ", "the experts learn from it"),
    ("one_pass", "cos_S < 0", "cos_S < 2", "only pairs in conflict get the loss"),
    ("one_pass", "y_SD.view_as(y_SD)", "2 * y_SD", "output y_SD is"),
]  # fmt: skip


def printed_by(capsys, answers: dict[str, str]) -> list[str]:
    """What the checks of exercises.ipynb print, in a namespace in which these answers take the place of the empty cells."""
    scope, found = {}, []
    for cell in BOOKS["exercises"]["cells"][1:]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            for name, code in answers.items():
                source = code if "raise NotImplementedError" in source and f" {NAMES[name]}(" in source else source
            exec(source, scope)
            found += capsys.readouterr().out.splitlines()
    return found


def test_empty_cells_are_not_written_yet(capsys):
    assert printed_by(capsys, {}) == [f"{name}: not written yet" for name in ANSWERS]


def test_solutions_are_right(capsys):
    assert printed_by(capsys, ANSWERS) == [f"{name}: right: the same as the oracle" for name in ANSWERS]


@pytest.mark.parametrize("name, right, wrong, part", WRONG)
def test_a_wrong_answer_gets_its_hint(name, right, wrong, part, capsys):
    assert ANSWERS[name].count(right) == 1
    scope = {"torch": torch, "F": F}
    for other, code in ANSWERS.items():
        exec(code.replace(right, wrong) if other == name else code, scope)
    getattr(grader, name)(scope[NAMES[name]])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{name}: top_k=") and part in line, line


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_sample_has_something_to_find(top_k):
    """Pairs in conflict and others, by both linears and by the last one; one gradient is zero."""
    one = grader.sample(top_k)
    assert 2 < one.found.conflict_TK.sum() < len(one.cos_S) - 2 and 2 < (one.cos_S < 0).sum() < len(one.cos_S) - 2
    assert (one.g_SD == 0).all(1).sum() == top_k


def test_the_oracle_needs_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(grader, "ROOT", tmp_path)
    grader.load_oracle.cache_clear()
    with pytest.raises(UserError, match="run this in a checkout"):
        grader.moe(None)
