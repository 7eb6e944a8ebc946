"""tutorial.ipynb and exercises.ipynb, each made from the page of the same name, and executed.

  python -m lab.report.notebook

Plain python code of the page becomes code cells. Everything else becomes text: code quoted from a file, shell lines, and
formulas, written with $ and $$. Answers stay folded, and the cell with the code of an answer is hidden until it is opened.
"""

import os
import re
from pathlib import Path

from lab.run.cli import Parser, UserError, run_main, say
from lab.run.runs import ROOT

PAGES = ("tutorial", "exercises")
SETUP = '''\
# In the project's folder this cell does nothing. Elsewhere, as in Colab, it gets the project's files.
import os
import subprocess
import sys

repository = ""  # elsewhere: write the address for git clone between the quotes
if not os.path.isfile("stgc.py"):
    assert repository, "write the address of the project's repository into this cell"
    subprocess.run(["git", "clone", "--depth", "1", repository, "stgc-project"], check=True)
    os.chdir("stgc-project")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", "requirements.txt"], check=True)'''
FOLDED, CONTINUED, UNFOLDED = "<details>", "<details><summary>Answer, continued</summary>\n\n", "</details>"
HIDDEN = {"cellView": "form", "jupyter": {"source_hidden": True, "outputs_hidden": True}}  # Colab; Jupyter and VS Code


def as_text(fence: str) -> str:
    """A fence that is not run: a formula between $$, anything else as code."""
    formula = re.fullmatch(r"```math\n(.*)```", fence, re.S)
    return f"$$\n{formula[1]}$$" if formula else re.sub(r"\A(```\w*).*", r"\1", fence)


def cells_of(page: str) -> list[tuple[str, str, bool]]:
    """(code or markdown, source, part of an answer) of each cell. Headings begin a new cell."""
    found, prose = [("code", SETUP, False)], ""

    def finish(before_code: bool) -> bool:
        nonlocal prose
        text, prose = prose.strip(), ""
        answer = before_code and text.count(FOLDED) > text.count(UNFOLDED)
        if answer:
            text += f"\n\n*The next cell has the code.*\n\n{UNFOLDED}"
            prose = CONTINUED
        if text.removeprefix(CONTINUED.strip()).strip() not in ("", UNFOLDED):
            found.append(("markdown", text, False))
        return answer

    for part in re.split(r"^(```.*?^```)$|^(?=#{1,3} )", page, flags=re.M | re.S):
        part = part or ""
        if part.startswith("```python\n"):
            answer = finish(before_code=True)
            found.append(("code", part.removeprefix("```python\n").removesuffix("```").strip(), answer))
        elif part.startswith("```"):
            prose += as_text(part)
        else:
            if re.match("#{1,3} ", part):
                finish(before_code=False)
            prose += re.sub(r"\$`(.+?)`\$", r"$\1$", part)
    finish(before_code=False)
    return found


def convert(page: str):
    """The notebook of a page's text, without outputs. The id of a cell is its heading and its number under it, so a change
    of one section leaves the other ids as they are."""
    from nbformat import v4

    cells, name, used = [], "files", {}
    for kind, source, answer in cells_of(page):
        if kind == "markdown" and (heading := re.match(r"#{1,3} (.+)", source)):
            slug = re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-")  # as in the page's own links
            anchor = f' <a id="{slug}"></a>' * (f"](#{slug})" in page)
            name, source = slug[:50], heading[0] + anchor + source.removeprefix(heading[0])
        used[name] = used.get(name, 0) + 1
        new = v4.new_code_cell if kind == "code" else v4.new_markdown_cell
        cells.append(new(source, id=f"{name}-{used[name]}", metadata=HIDDEN if answer else {}))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def execute(book, folder: Path = ROOT):
    """The notebook with the outputs of its cells, run in this folder. A cell that fails raises CellExecutionError."""
    from nbclient import NotebookClient

    metadata = dict(book.metadata)
    client = NotebookClient(
        book, timeout=600, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
    book.metadata = metadata  # without the versions of this machine
    for cell in filter(lambda cell: cell.cell_type == "code", book.cells):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]  # warnings name its folders
    return book


def main() -> int:
    Parser(prog="lab.report.notebook", description=__doc__).parse_args()
    try:
        import nbformat

        for name in PAGES:
            book = execute(convert((ROOT / f"{name}.md").read_text()))
            nbformat.write(book, ROOT / f"{name}.ipynb")
            say(f"written: {name}.ipynb")
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install -r requirements-dev.txt") from error
    return 0


if __name__ == "__main__":
    run_main("lab.report.notebook", main, resumes=False)
