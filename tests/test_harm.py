"""Some 1,000 bad inputs, and what must come out. One table: a line per case.

The next hole is one line in a module of harm/, in the table CASES at its end, below the kind that it belongs to:

    "what is bad": (what is given, ..., what comes out),

A kind is a function whose positional arguments are such a row and whose others are fixtures. It does what the row says, and
checks what comes out. A new kind is such a function and its own rows; a story is a kind without rows, ONCE. Fixtures of
harm/ are imported here. `pytest tests/test_harm.py -k "what is bad"` runs the case.
"""

from inspect import signature

import pytest
from harm.data import CASES as DATA
from harm.data import cache, folder  # noqa: F401  (fixtures)
from harm.files import CASES as FILES
from harm.files import done, out, quick  # noqa: F401
from harm.films import CASES as FILMS
from harm.hub import CASES as HUB
from harm.hub import content, everything, place  # noqa: F401
from harm.lvlm import CASES as LVLM
from harm.models import CASES as MODELS
from harm.models import good, root  # noqa: F401
from harm.names import CASES as NAMES
from harm.names import here  # noqa: F401
from harm.odd import CASES as ODD
from test_glue import data, model, words  # noqa: F401
from test_use import run as saved  # noqa: F401

QUICK = DATA | LVLM | FILMS
CASES = QUICK | FILES | MODELS | NAMES | ODD | HUB  # kind -> its rows, with names or without


def word(value) -> str:
    """The same in each process: a function has an address."""
    return f"{getattr(value, '__name__', value)!s:.30}"


def named(rows: dict | list) -> list[tuple[str, tuple]]:
    """Rows with their names, which those in a list get from their values. A row of one value needs no tuple."""
    names, rows = (rows.keys(), rows.values()) if isinstance(rows, dict) else (None, rows)
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    return list(zip(names or ["-".join(map(word, row)) for row in rows], rows))


def table():
    for kind, rows in CASES.items():
        marks = [] if kind in QUICK else pytest.mark.slow
        fixtures = [name for name, one in signature(kind).parameters.items() if one.kind is one.KEYWORD_ONLY]
        for name, row in named(rows):
            yield pytest.param(kind, row, fixtures, id=f"{kind.__name__}-{name}" if row else kind.__name__, marks=marks)


@pytest.mark.parametrize("kind, row, fixtures", list(table()))
def test_case(kind, row, fixtures, request):
    kind(*row, **{name: request.getfixturevalue(name) for name in fixtures})
