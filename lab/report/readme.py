"""README.md and docs/results.md: `python -m lab.report` writes their tables and logs again, from results/, between marks."""

import re
from itertools import groupby
from pathlib import Path

from lab.report import claims
from lab.report.records import read_all
from lab.report.tables import header, lvlm_table, read_bench, results_table
from lab.run.cli import Parser, UserError, say
from lab.run.runs import ROOT

PAGES = ("README.md", "docs/results.md")
LOGS = ("toy", "quick", "tests")  # results/log-<name>.txt: `$ command`, what it printed, `# the time that it took`


def log_block(path: Path) -> str:
    """Markdown: what a command printed, its epochs as "...", and below how long it took. UserError for a damaged log."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) < 3 or not lines[0].startswith("$ ") or not lines[-1].startswith("# "):
        raise UserError(f"{path}: a log begins with `$ command` and ends with `# time`; record it again")
    shown = [key for key, _ in groupby("..." if line.startswith("task=") else line for line in lines[1:-1])]
    return "\n".join(["```text", *shown, "```", "", f"({lines[-1][2:]})"])


def costs_sentence(path: Path) -> str:
    """What a step costs, from a record of lab.bench."""
    rows = read_bench(path)["variants"]
    one, two = (f"{100 * (rows[name]['ratio'] - 1):.0f} %" for name in ("one pass", "two passes"))
    text = f"STGC makes a step of a small BERT with one MoE layer {one} longer in one pass, {two} in two, the paper's way"
    return f"{text}:\n[docs/costs.md](docs/costs.md)."


def sections() -> dict[str, str]:
    """Mark -> generated text."""
    results = ROOT / "results"
    records, texts = read_all(results), {"costs": costs_sentence(results / "bench.json")}
    texts |= {name: log_block(results / f"log-{name}.txt") for name in LOGS}
    texts["results"] = results_table([record for record in records if "stages" not in record])
    texts["lvlm"] = lvlm_table([record for record in records if "stages" in record])
    return texts | {"claims": "\n".join([*header("claim", "paper", "here", "verdict"), *claims.front(records)])}


def render(page: str, texts: dict[str, str]) -> str:
    """A page with every generated section, between <!-- NAME --> and <!-- /NAME -->."""
    for name, text in texts.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        page = mark.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
    return page


def main() -> None:
    Parser(prog="lab.report", description=__doc__).parse_args()
    texts = sections()
    for path in (ROOT / name for name in PAGES):
        before = path.read_text()
        path.write_text(render(before, texts))
        say(f"{'unchanged' if path.read_text() == before else 'written'}: {path}")
