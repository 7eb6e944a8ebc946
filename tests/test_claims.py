"""docs/claims.md: the rule of its verdicts, and that the page is what the records say."""

import json

import pytest
from test_compare import run

from lab.report import claims, records
from lab.report.claims import NO_ROUTING, NOT_RUN, ROOT, check, judge, render
from lab.report.compare import Paired
from lab.run.cli import UserError


def gap(low, high, seeds=10):
    return Paired((low + high) / 2, low, high, 0, 0, seeds)


@pytest.mark.parametrize(
    ("a", "b", "c", "routing", "verdict"),
    [
        ((-1, 3), [(-1, 1)], (-1, 1), None, "inconclusive"),  # holds 0 and the paper's 2
        ((-2, 1), [(-1, 1)], (-1, 1), None, "not reproduced"),
        ((-3, -1), [(-1, 1)], (-1, 1), (1, 2), "not reproduced"),
        ((0.5, 1.5), [(0.1, 1)], (-1, 1), None, "smaller than the paper's"),
        ((1, 3), [(0.1, 1), (0.2, 1)], (-1, 1), (0.1, 1), "reproduced"),
        ((1, 3), [(0.1, 1), (-0.2, 1)], (-1, 1), None, "a gain, the selection undecided"),
        ((1, 3), [(-1, 1)], (0.5, 2), None, "the control does as well"),
        ((1, 3), [(-1, 1)], (-0.5, 2), None, "a gain, the selection undecided"),
        ((1, 3), [], None, None, "a gain, the selection undecided"),
        ((1, 3), [(0.1, 1)], (-1, 1), (-0.5, 1), NO_ROUTING),
        ((1, 3), [(0.1, 1)], (-1, 1), (-2, -1), NO_ROUTING),
        (None, [], None, None, NOT_RUN),
    ],
)
def test_verdicts(a, b, c, routing, verdict):
    gaps = [side and gap(*side) for side in (a, c, routing)]
    assert judge(gaps[0], [gap(*one) for one in b], gaps[1], 2.0, gaps[2]) == verdict


def test_one_seed_is_no_verdict():
    assert judge(Paired(3.0, None, None, 1, 0, 1), [], None, 2.0) == "not run: one seed"


def test_the_page_is_what_the_records_say():
    page = ROOT / "docs" / "claims.md"
    assert page.read_text() == render(records.read_all()), "run python -m lab.report.claims"


def a_record(seeds=range(5), **scores):
    """A record of CoLA with variants whose scores are given per seed."""
    runs = [run(name, seed, own[seed] / 100, own[seed] / 100) for name, own in scores.items() for seed in seeds]
    config = {"model": "m", "num_experts": 8, "top_k": 2, "router": "cosine", "beta": 0.1, "epochs": 3}
    data = {"train": 8551, "dev": 1043, "source": "folder"}
    return {"name": "cola", "command": "x", "commit": "abc", "config": config, "data": data, "runs": runs, "dirty": False}


def test_rows_of_a_setting():
    none, ce = [10, 12, 11, 14, 9], [13, 15, 13.5, 17, 12]
    setting = claims.Setting(records.merge([a_record(none=none, ce=ce, placebo=[10, 12, 11.5, 14, 9])])[0])
    (row, *others) = list(claims.glue_rows([setting]))
    assert (
        row.where == "table 12"
        and row.here.startswith("+2.9 [+2.6, +3.2], half width 0.3, 5 seeds")
        and row.verdict == "reproduced"
    )
    assert [other.verdict for other in others] == [NOT_RUN] * 4 and len(setting.intervals) == 6
    random = a_record(none=none, ce=ce, placebo=none, random=[10, 12, 11, 14, 10])
    (row, *_) = claims.glue_rows([claims.Setting(records.merge([random])[0])])
    assert row.verdict == NO_ROUTING and "minus random +2.7" in row.here


def test_rows_of_saved_models():
    """Reliability has no verdict; confusing tokens and harm have one each, by the predicate that the row names."""
    assert [row.verdict for row in claims.saved_rows([])] == [NOT_RUN] * 3
    one = {"model": "m", "loss": 0.5, "kappa": 0.1, "error": 0.02, "triples": 16, "command": "x"}
    one["confusing"] = {"pairs": 9, "own": 8.0, "other": 5.0, "rest": -1.0}

    def found(gap, **confusing):
        harm = {"sizes": [0.1, 0.2], "fresh": {"no conflicting": {"minus_all": [[0.0, 0.0], gap]}}}
        probes = [one | {"harm": harm, "confusing": one["confusing"] | confusing}]
        return [row.verdict for row in claims.saved_rows([{"name": "lvlm", "probes": probes}])]

    assert found([-0.03, 0.01]) == ["measured", "reproduced", "reproduced"]
    assert found([-0.03, 0.02], other=3.0) == ["measured", "not reproduced", "not reproduced"]


def test_somebodys_record(tmp_path):
    """Complete, clean and paired; what is wrong is named, with the fix."""
    whole = a_record(none=[10, 12, 11, 14, 9], ce=[13, 15, 13.5, 17, 12]) | {
        "versions": {"torch": "2"},
        "made_from": {"d": "1"},
    }

    def found(record):
        (tmp_path / "results.json").write_text(json.dumps(record))
        return check(tmp_path)

    lines = found(whole)
    assert (
        len(lines) == 3
        and lines[2].startswith("table 12")
        and lines[2].endswith("(paper +2.3): a gain, the selection undecided")
    )
    for wrong, message in (
        ({"dirty": True}, "commit them"),
        ({"made_from": None}, "has no made_from"),
        ({"runs": whole["runs"][:-1]}, "ce and none differ in seeds 4; finish the run"),
        ({"runs": whole["runs"][:5]}, "compares nothing with the baseline"),
    ):
        with pytest.raises(UserError, match=message):
            found(whole | wrong)
    with pytest.raises(UserError, match="no results.json is there"):
        check(tmp_path / "nothing")
