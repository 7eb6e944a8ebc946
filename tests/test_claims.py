"""docs/claims.md: the rule of its verdicts, and that the page is what the records say."""

import json
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
from test_compare import LR, run

from lab.report import claims, evidence, pictures, records
from lab.report.claims import ROOT, check, render
from lab.report.compare import Paired
from lab.report.tables import spread
from lab.report.verdicts import (
    NO_ROUTING,
    NOT_RUN,
    Row,
    Setting,
    gap_of,
    join,
    judge,
    say_gap,
    sign_row,
)
from lab.run.cli import UserError


def gap(low, high, seeds=10):
    return Paired((low + high) / 2, low, high, 0, 0, seeds)


@pytest.mark.parametrize(
    ("a", "placebo", "flat", "c", "routing", "verdict"),
    [
        ((-1, 3), (-1, 1), None, (-1, 1), None, "inconclusive"),  # holds 0 and the paper's 2
        ((-1, 1.96), (-1, 1), None, (-1, 1), None, "inconclusive"),  # to the one digit that the paper gives
        ((-2, 1), (-1, 1), None, (-1, 1), None, "not reproduced"),
        ((-3, -1), (-1, 1), None, (-1, 1), (1, 2), "not reproduced"),
        ((0.5, 1.5), (0.1, 1), None, (-1, 1), None, "smaller than the paper's"),
        ((1, 3), (0.1, 1), (0.2, 1), (-1, 1), (0.1, 1), "reproduced"),
        ((1, 3), (0.1, 1), (0.2, 1), (-1, 1), None, "reproduced"),
        ((1, 3), (0.1, 1), None, (-1, 1), None, "a gain, the selection undecided"),  # without flat
        ((1, 3), (0.1, 1), (-0.2, 1), (-1, 1), None, "a gain, the selection undecided"),
        ((1, 3), None, (0.2, 1), None, None, "a gain, the selection undecided"),  # without a placebo
        ((1, 3), (-1, 1), None, (0.5, 2), None, "the control does as well"),
        ((1, 3), (0.1, 1), (-1, 1), (0.5, 2), None, "a gain, the selection undecided"),  # c is the placebo's alone
        ((1, 3), (-1, 1), None, (-0.5, 2), None, "a gain, the selection undecided"),
        ((1, 3), None, None, None, None, "a gain, the selection undecided"),
        ((1, 3), (0.1, 1), None, (-1, 1), (-0.5, 1), NO_ROUTING),
        ((1, 3), (0.1, 1), None, (-1, 1), (-2, -1), NO_ROUTING),
        (None, None, None, None, None, NOT_RUN),
    ],
)
def test_verdicts(a, placebo, flat, c, routing, verdict):
    gaps = [side and gap(*side) for side in (a, placebo, flat, c)]
    assert judge(*gaps, 2.0, routing and gap(*routing)) == verdict


def test_without_an_interval_there_is_no_verdict():
    one, three = Paired(3.0, None, None, 1, 0, 1), Paired(3.0, None, None, 3, 0, 3)
    assert judge(one, None, None, None, 2.0) == "one seed, no verdict"
    assert judge(three, None, None, None, 2.0) == "no spread, no verdict"
    assert judge(gap(1, 3), one, None, gap(0.5, 2), 2.0) == "a gain, the selection undecided"


def test_the_page_is_what_the_records_say():
    page = ROOT / "docs" / "claims.md"
    assert page.read_text() == render(records.read_all()), "run python -m lab.report.claims"


def a_record(seeds=range(5), **scores):
    """A record of CoLA with variants whose scores are given per seed."""
    runs = [run(name, seed, own[seed] / 100, own[seed] / 100) for name, own in scores.items() for seed in seeds[: len(own)]]
    config = {"seeds": [*seeds], "model": "m", "num_experts": 8, "top_k": 2, "router": "cosine", "beta": 0.1, "epochs": 3}
    data = {"train": 8551, "dev": 1043, "source": "folder"}
    return {"name": "cola", "command": "x", "commit": "abc", "config": config, "data": data, "runs": runs, "dirty": False}


def test_rows_of_a_setting():
    none, ce = [10, 12, 11, 14, 9], [13, 15, 13.5, 17, 12]
    setting = Setting(records.merge([a_record(none=none, ce=ce, placebo=[10, 12, 11.5, 14, 9])])[0])
    (row, *others) = list(evidence.glue_rows([setting]))
    assert (
        row.where == "table 12"
        and row.here.startswith("+2.9 [+2.6, +3.2], half width 0.3, 5 seeds")
        and row.verdict == "a gain, the selection undecided (dice not run, flat not run)"
    )
    assert [other.verdict for other in others] == [NOT_RUN] * 4
    random = a_record(none=none, ce=ce, placebo=none, random=[10, 12, 11, 14, 10])
    (row, *_) = evidence.glue_rows([Setting(records.merge([random])[0])])
    assert row.verdict == NO_ROUTING and "minus random +2.7" in row.here


def test_a_part_of_a_task_has_a_row_of_its_own():
    """Its claim says of how many examples; without STGC there is none."""
    record = a_record(none=NONE, ce=plus(1, 2, 1, 2, 1)) | {"name": "mnli-8k", "data": {"train": 8000, "dev": 1000}}
    rows = evidence.glue_rows([Setting(records.merge([record])[0])])
    assert [row.claim for row in rows if row.verdict != NOT_RUN] == [
        "STGC gains on MNLI, trained on 8,000 of its 392,702 examples"
    ]
    without = record | {"runs": [one | {"variant": one["variant"].replace("ce", "random")} for one in record["runs"]]}
    rows = evidence.glue_rows([Setting(records.merge([without])[0])])
    assert [row.verdict for row in rows] == [NOT_RUN] * 5


def a_picture_record(scores, **config):
    """A record of the toy LVLM: variant -> score in % per seed."""
    one = a_record(**scores)
    usual = {"top_k": 2, "num_experts": 4, "router": "linear", "beta": 1.0, "tau": 0.0, "alpha": 0.01, "scenes": 12000}
    return one | {"name": "lvlm-scenes", "stages": [], "config": usual | config, "data": {"train": 1}}


NONE = [80, 82, 81, 84, 79]


def verdicts(*sides, where):
    """Of a table, from records (scores, options)."""
    settings = [Setting(one) for one in records.merge([a_picture_record(scores, **config) for scores, config in sides])]
    return [row.verdict for row in (*pictures.sweep_rows(settings), *pictures.lvlm_rows(settings)) if row.where == where]


def plus(*gaps):
    return [own + gap for own, gap in zip(NONE, gaps)]


@pytest.mark.parametrize(
    ("weak", "strong", "dice", "verdict"),
    [
        (plus(0, 1, 0, 1, 0), plus(0, 0.5, 0, 0.5, 0), None, "reproduced (dice not run)"),  # beta 1 has +2 or so
        (
            plus(9, 8, 9, 8, 9),
            plus(0, 0.5, 0, 0.5, 0),
            None,
            "reproduced (beta 0.1, not tried there, better) (dice not run)",
        ),
        (plus(0, 1, 0, 1, 0), plus(0, 0.5, 0, 0.5, 0), plus(-4, -5, -4, -5, -4), "reproduced"),
        (plus(0, 1, 0, 1, 0), plus(4, 3, 4, 3, 4.5), None, "not reproduced (dice not run)"),
        (plus(0, 1, 0, 1, 0), plus(2, 1, 2, 2, 3), None, "inconclusive (dice not run)"),
        (plus(0, 1, 0, 1, 0), plus(0, 0.5, 0, 0.5, 0), plus(1, 2, 1, 2, 1), NO_ROUTING),
        (plus(0, 1, 0, 1, 0), NONE[:1], None, "one seed, no verdict"),
    ],
)
def test_the_best_of_several_values(weak, strong, dice, verdict):
    base = {"none": NONE, "ce": plus(2, 2, 2, 2.5, 2)} | ({"random": dice} if dice else {})
    others = [({"none": NONE[: len(own)], "ce": own}, {"beta": beta}) for own, beta in ((weak, 0.1), (strong, 2.0))]
    assert verdicts((base, {}), *others, where="table 5") == [verdict, NOT_RUN]  # of beta and tau
    assert verdicts((base, {}), *others[:1], where="table 5") == [NOT_RUN] * 2


def test_the_controls_step_beside_the_best_of_several_values():
    """placebo and flat at the best value minus at another one; runs that are lent are no step."""
    one = a_picture_record({"none": NONE, "ce": plus(2, 2, 2, 2.5, 2), "placebo": plus(1, 1, 1, 1.5, 1), "flat": NONE})
    two = a_picture_record({"none": NONE, "ce": NONE, "placebo": plus(4, 4, 4, 4, 4)}, beta=2.0)
    settings = [Setting(records.merge([record])[0]) for record in (one, two)]
    (row,) = (row for row in pictures.sweep_rows(settings) if row.claim.startswith("beta 1 is"))
    assert row.here.startswith("minus beta 2: +2.1 [") and row.here.endswith(", the same of placebo -2.9 [-3.2, -2.6]")
    for trained in settings[1].record["runs"]:
        trained["lent"] = trained["variant"] == "placebo"
    (row,) = (row for row in pictures.sweep_rows(settings) if row.claim.startswith("beta 1 is"))
    assert "placebo" not in row.here


def test_the_doses_are_of_minilm_on_cola_alone():
    """The largest and the smallest beta whose margin is known, of the default router and experts."""

    def dose(beta, left, name="cola", **config):
        record = a_record(none=NONE, ce=NONE) | {"name": name}
        record["config"] |= {"beta": beta, "experts": "copy", "model": "models/all-MiniLM-L6-v2"} | config
        for trained in record["runs"]:
            margin = 0.1 * (left or 0) if trained["variant"] == "ce" else 0.1
            trained |= {"commit": "a"} | ({"router_margin": [0.1, margin]} if left else {})
        return Setting(records.merge([record])[0])

    own = [dose(0.1, 0.04), dose(0.01, 0.2), dose(0.001, 0.7), dose(0.0001, None)]
    other = [dose(1, 0.5, name="toy-cola"), dose(0.1, 0.9, model="bert"), dose(2, 0.9, router="linear")]
    found = claims.cola_doses([*own, *other, dose(0.1, None, epochs=9)])
    assert found == {0.1: pytest.approx(0.04), 0.001: pytest.approx(0.7)}
    assert claims.cola_doses(other) == {}


def test_sweeps_are_paired_across_settings():
    """Tables 3 and 8: the sign decides; a setting that differs in two options is not compared."""
    small = {"none": NONE, "ce": plus(0, 0.1, 0, 0.1, 0)}
    large = {"none": NONE, "ce": plus(2, 2.5, 2, 2.5, 2)}
    assert verdicts((large, {}), (small, {"scenes": 3000}), where="table 3") == ["reproduced (dice not run)"]
    assert verdicts((small, {}), (large, {"scenes": 3000}), where="table 3") == ["not reproduced (dice not run)"]
    assert verdicts((large, {}), (small, {"scenes": 3000, "tau": 0.1}), where="table 3") == [NOT_RUN]
    worse = {"none": plus(-1, -1.5, -1, -1.5, -1), "ce": NONE}
    assert verdicts((large, {}), (worse, {"alpha": 0.1}), where="table 8") == ["reproduced (dice not run)"]
    assert verdicts((worse, {}), (large, {"alpha": 0.1}), where="table 8") == ["not reproduced (dice not run)"]


def test_rows_of_sample_level_routings():
    sides = {"none": NONE, "ce": NONE, "random": plus(-4, -5, -4, -5, -4)}
    sides |= {"task": plus(-3, -4, -3, -4, -3), "feature": plus(-1, 1, 0, 1, -1)}
    embedding, feature, task = verdicts((sides, {}), where="table 4")
    assert (embedding, feature, task) == (NOT_RUN, "inconclusive", "smaller than the paper's")  # its 8.4 points
    far, near = {"task": plus(-9, -10, -8, -10, -9)}, {"task": plus(-1, 1, 0, 1, -1)}
    assert [verdicts((sides | one, {}), where="table 4")[2] for one in (far, near)] == ["reproduced", "not reproduced"]
    assert set(verdicts((sides | {"random": NONE}, {}), where="table 4")) == {NOT_RUN, NO_ROUTING}


@pytest.mark.parametrize(
    ("ce", "placebo", "dice", "verdict"),
    [
        (plus(11, 12, 11, 12, 11), NONE, -4, "a gain, the selection undecided (flat not run)"),
        (plus(3, 4, 3, 4, 3), NONE, -4, "smaller than the paper's"),
        (plus(11, 12, 11, 12, 11), plus(12, 11, 12, 11, 12), -4, "the control does as well"),
        (plus(0, 1, -1, 1, 0), NONE, -4, "not reproduced"),  # its end lies below the paper's 10.9
        (plus(11, 12, 11, 12, 11), NONE, 0, NO_ROUTING),  # dice do as well at this capacity
    ],
)
def test_rows_of_limited_capacity(ce, placebo, dice, verdict):
    """Table 10: by the rule of a gain, with the positive control at this capacity."""
    limited = {"none": NONE, "ce": ce, "placebo": placebo, "random": plus(*[dice] * 4, dice - 0.5)}
    record = a_picture_record(dict.fromkeys(limited, plus(*[9] * 5)) | {"random": plus(4, 5, 4, 5, 4)})
    for one in record["runs"]:
        scores = {"score": limited[one["variant"]][one["seed"]] / 100}
        one["limited"] = [{"capacity": capacity, "bpr": False, "scores": scores} for capacity in (0.5, 1.0)]
    (setting,) = [Setting(one) for one in records.merge([record])]
    plain, prioritized = (row for row in pictures.lvlm_rows([setting]) if row.where == "table 10")
    assert plain.verdict == verdict and prioritized.verdict == NOT_RUN
    assert plain.here.startswith(say_gap(gap_of(dict(enumerate(NONE)), dict(enumerate(ce)))))
    table = [*pictures.capacity_table(setting)]
    assert table[2].startswith(f"| baseline | {spread(NONE)} |") and len(table) == 8
    for one in record["runs"]:
        one["lent"] = one["variant"] == "none"
    assert len([*pictures.capacity_table(Setting(records.merge([record])[0]))]) == 7  # it stands where it was run


def test_what_no_setting_can_judge_is_not_testable():
    """Four settings where random does as well, and nothing else was run; one where none gains over start and random."""

    def setting(lead, steps):
        scores = {"none": plus(*[lead] * 4, lead + 0.1), "random": NONE}
        record = a_picture_record(scores, stage3_steps=steps)
        stages = [{"stage": "stage2", "seed": seed, "scores": {"score": score / 100}} for seed, score in enumerate(NONE)]
        return record | {"stages": stages}

    def verdicts_of(*sides):
        settings = [Setting(one) for one in records.merge([*sides])]
        return {row.verdict for row in (*pictures.sweep_rows(settings), *pictures.lvlm_rows(settings))}

    poor = [setting(2, steps) for steps in (100, 200, 300, 400)]
    assert verdicts_of(*poor[:3]) == {NOT_RUN}
    assert verdicts_of(*poor) == {"not testable here: no usable setting in 4 tries (5, 5, 5, 5 seeds)"}
    assert verdicts_of(*poor, setting(4, 500)) == {NOT_RUN}


def test_a_setting_is_usable_at_the_doses_whose_half_width_is_small():
    """Baseline and dice are the same at any beta; how well STGC minus the baseline is known is not."""
    lead = {"none": NONE, "random": plus(-4, -5, -4, -5, -4)}
    wide = a_picture_record(lead | {"ce": plus(-4, 0, -3, -1, -5)}, normalize=False)
    narrow = a_picture_record({"ce": plus(-2, -1.8, -2, -2.2, -2)}, beta=0.1, normalize=False)
    for record in (wide, narrow):
        record["runs"] = [own | {"start": 0.1, "commit": "a"} for own in record["runs"]]
    rows = pictures.usable_rows(claims.usable([wide, narrow]))
    assert [row.verdict for row in rows] == ["usable, but for the half width", "usable"]
    assert rows[1].here.endswith("STGC minus the baseline -2.0 [-2.2, -1.8], half width 0.2, 5 seeds")
    gains = [row.verdict for row in pictures.lvlm_rows(claims.usable([wide, narrow])) if "Top-2" in row.claim]
    assert gains == ["not reproduced"] * 2  # at the paper's beta, and at one where the setting is usable


def test_many_measurements_of_a_claim_are_folded():
    """Their verdicts are counted, so that one that contradicts the paper is seen without opening the fold."""
    settings = [Setting(records.merge([a_record(none=NONE)])[0]) for _ in range(6)]
    tags = {id(setting): f"S{i}" for i, setting in enumerate(settings)}
    verdicts = ["reproduced"] * 5 + ["not reproduced"]
    parts = [(f"+{i}", verdict, "", settings[i], f"{i}.png") for i, verdict in enumerate(verdicts)]
    rows = [Row("figure 6", "x", "y", *part) for part in parts]
    (few,), (many,) = (list(join(own, tags, {})) for own in (rows[4:], rows))
    same = "CoLA, m, 8Top2, beta 0.1"  # m: the model
    assert f"S4 ({same}): +4<br>S5 ({same}): +5 | S4: reproduced<br>S5: not reproduced | [S4](#s4)<br>[S5](#s5)<br>[" in few
    assert many.endswith("</details> | reproduced: 5 of 6<br>not reproduced: 1 of 6 | [picture](../results/0.png) |")
    assert (
        f" | [S0](#s0), [picture](../results/0.png) ({same}): +0: reproduced<details><summary>5 more</summary>[S1]" in many
    )
    rows[4].setting.record["runs"] += a_record(ce=NONE)["runs"]
    rows[3] = replace(rows[3], verdict=NOT_RUN, setting=rows[4].setting)
    shown = next(join(rows, tags, {}))  # the most variants, of those with a verdict, and its picture
    assert " | [S4](#s4), [picture](../results/4.png) (" in shown and shown.endswith(" | [picture](../results/4.png) |")
    rows[5].setting.record["runs"] += a_record(ce=[*NONE, 80], seeds=range(6))["runs"]
    assert " | [S5](#s5), [picture]" in next(join(rows, tags, {}))  # as many variants, more seeds
    assert many.count("|") == few.count("|") == 7


def test_a_baseline_is_the_same_at_any_tau():
    """tau changes what is measured of a baseline, not its training; alpha changes it."""
    base = a_picture_record({"none": NONE, "random": NONE, "ce": NONE})
    parts = [base, *(a_picture_record({"ce": plus(1, 2, 1, 2, 1)}, **option) for option in ({"tau": 0.1}, {"alpha": 0.1}))]
    for part in parts:
        part["runs"] = [one | {"commit": "a"} for one in part["runs"]]
    settings = {(s.record["config"]["tau"], s.record["config"]["alpha"]): s for s in claims.usable(parts)}
    assert settings.keys() == {(0.0, 0.01), (0.1, 0.01)}
    assert settings[0.1, 0.01].gap("ce", "none").mean == settings[0.1, 0.01].gap("ce", "random").mean == pytest.approx(1.4)


def test_the_loss_on_every_pair_is_the_same_at_any_tau():
    """It compares no gradient with tau, but beta weighs it."""
    base = a_picture_record({"none": NONE, "ce": NONE, "flat": plus(-1, -2, -1, -2, -1.5)})
    more = [a_picture_record({"ce": plus(1, 2, 1, 2, 1)}, **option) for option in ({"tau": 0.1}, {"beta": 0.5})]
    settings = claims.usable([part | {"runs": [one | {"commit": "a"} for one in part["runs"]]} for part in (base, *more)])
    found = {(s.record["config"]["tau"], s.record["config"]["beta"]): s for s in settings}
    assert found[0.1, 1.0].gap("ce", "flat").mean == pytest.approx(2.9) and found[0.1, 1.0].lent == {"none", "flat"}
    assert found[0.0, 0.5].gap("ce", "flat") is None and found[0.0, 0.5].lent == {"none"}
    assert any("flat of another tau" in line for line in found[0.1, 1.0].notes())


def test_dice_are_the_same_at_any_alpha():
    """They have no balance loss. A baseline has: of another alpha it is compared, not lent."""

    def parts_of(dice):
        base = a_picture_record({"none": NONE, "random": dice, "ce": NONE})
        more = (
            ({"none": plus(-1, -2, -1, -2, -1.5)}, 0.1),
            ({"ce": NONE}, 0.2),
            ({"none": NONE, "ce": plus(1, 2, 1, 2, 1)}, 0.0),
        )
        parts = [base, *(a_picture_record(scores, alpha=alpha) for scores, alpha in more)]
        return [part | {"runs": [one | {"commit": "a"} for one in part["runs"]]} for part in parts]

    settings = claims.usable(parts_of(plus(-4, -5, -4, -5, -4)))
    found = {s.record["config"]["alpha"]: (s.borrows, s.gap("none", "random").mean) for s in settings}
    assert found == {0.0: (True, pytest.approx(4.4)), 0.01: (False, pytest.approx(4.4)), 0.1: (True, pytest.approx(2.9))}
    rows = pictures.sweep_rows(settings)
    assert [row.verdict for row in rows if row.where == "table 8"] == ["reproduced"]
    (row,) = (row for row in rows if "weight of the balance loss" in row.claim)
    assert row.here.startswith(
        "alpha 0: +1.4 [+0.7, +2.1], half width 0.7, 5 seeds (baseline 81.2 ± 1.9; minus random +5.8 ["
    )
    assert "; baseline minus random +4.4 [+3.7, +5.1]); alpha 0.01: +0.0" in row.here
    assert row.verdict == "measured"
    (row,) = (row for row in pictures.sweep_rows(claims.usable(parts_of(NONE))) if "weight of the balance loss" in row.claim)
    assert row.verdict == NO_ROUTING


def test_a_baseline_is_the_same_at_any_beta():
    """A dose that was run without a baseline is compared with that of another beta, of the same commit if there is one;
    other settings lend none."""

    def record(beta, commit, lr=1e-4, **scores):
        margins, one = {"none": [0.01, 0.008], "ce": [0.01, 0.002]}, a_record(**scores)
        runs = [run | {"router_margin": margins[run["variant"]], "commit": commit} for run in one["runs"]]
        return one | {"runs": runs, "config": one["config"] | {"beta": beta, "lr": lr}}

    whole, again = record(0.1, "a", none=NONE, ce=NONE), record(0.1, "b", none=plus(1, 1, 1, 1, 1.5))
    dose = record(0.01, "b", ce=plus(1, 2, 1, 2, 1))
    for parts, mean in (([whole, dose], 1.4), ([dose, whole], 1.4), ([whole, again, dose], 0.3)):
        settings = {setting.record["config"]["beta"]: setting for setting in claims.usable(parts)}
        assert settings.keys() == {0.1, 0.01} and settings[0.01].gap("ce", "none").mean == pytest.approx(mean)
        assert evidence.margins_of(settings[0.01], "ce") == dict.fromkeys(range(5), pytest.approx(0.25))
        same = "Pairs with the baseline that are of one commit: ce 0 of 5."
        assert (same in " ".join(settings[0.01].notes())) == (again not in parts)
        assert settings[0.01].borrows and not settings[0.1].borrows
    others = claims.usable([whole, record(0.01, "a", lr=1.0, ce=NONE)])
    assert [setting.record["config"]["lr"] for setting in others] == [1e-4]


def test_runs_of_one_commit_are_paired():
    """A baseline that was repeated at the commit of a variant is the one that the variant is compared with."""
    record = a_record(none=NONE, ce=plus(1, 1, 1, 1, 1.5))
    record["runs"] = [one | {"commit": "new" if one["variant"] == "ce" else "old"} for one in record["runs"]]
    again = a_record(none=plus(2, 2, 2, 2, 2), seeds=range(5))
    again["runs"] = [one | {"commit": "new"} for one in again["runs"][:2]]
    setting = Setting(records.merge([record, again])[0])
    assert setting.gap("ce", "none").mean == pytest.approx((1.0 - 2.0 + 1.0 - 2.0 + 1.0 + 1.0 + 1.5) / 5)
    assert setting.of_one_commit("ce", "none") == "2 of 5"
    assert setting.scores("none") == dict(enumerate(map(float, NONE)))  # the first run of a seed
    assert any("was run at old and at new: +2.0 points (last step +2.0)" in line for line in setting.notes())


def test_a_seed_of_several_pairs_counts_with_their_mean():
    """Whichever folder comes first, the difference is the same."""
    pairs = (("old", 0.0, 1.0), ("new", 2.0, 6.0))
    parts = []
    for commit, none, ce in pairs:
        part = a_record(none=plus(*[none] * 5), ce=plus(*[ce] * 4, ce + 0.5))
        parts.append(part | {"runs": [one | {"commit": commit} for one in part["runs"]]})
    parts[1]["runs"] = [one for one in parts[1]["runs"] if one["seed"] == 0]
    for order in (parts, parts[::-1]):
        gap = Setting(records.merge(order)[0]).gap("ce", "none")
        assert gap.mean == pytest.approx(((1 + 4) / 2 + 1 + 1 + 1 + 1.5) / 5) and gap.seeds == 5
    for one in parts[1]["runs"]:
        one["commit"] = f"new, {one['variant']}"  # none of one commit: then all pairs count
    parts[0]["runs"] = [one | {"commit": one["variant"]} for one in parts[0]["runs"]]
    assert Setting(records.merge(parts)[0]).gap("ce", "none").mean == pytest.approx((3.5 - 1 + 1 + 1 + 1 + 1.5) / 5)


def test_a_row_says_what_stands_in_no_mean():
    """A variant that answers one class alone; no second verdict where no score can judge a routing."""
    record = a_record(none=NONE, ce=plus(1, 2, 1, 2, 1), random=NONE)
    for one in record["runs"]:
        one["collapsed"] = one["variant"] == "ce" and one["seed"] < 2
        last = {"none": 0.9, "ce": 0.5, "random": 0.2}[one["variant"]]  # there the router beats dice
        one["last"] = {"score": last + one["seed"] / 100 + (one["seed"] == 1) / 50 * (one["variant"] == "ce")}
    (row, *_) = evidence.glue_rows([Setting(records.merge([record])[0])])
    assert row.here.endswith("; ce answers one class alone in 2 of 5 runs") and row.verdict == NO_ROUTING
    alone = a_record(none=NONE[:1], ce=plus(3)[:1])
    alone["runs"] = [one | {"collapsed": one["variant"] == "none"} for one in alone["runs"]]
    (row, *_) = evidence.glue_rows([Setting(records.merge([alone])[0])])
    assert row.here == "+3.0 (one seed); ce 83.0, baseline 80.0; baseline answers one class alone in 1 of 1 runs"


def test_the_table_of_a_setting_tells_the_last_epoch_and_repeated_seeds():
    """Best epochs have a column of differences at the last one; a difference over repeated runs is marked."""
    record = a_record(none=NONE, ce=plus(1, 2, 1, 2, 1))
    once, again = (json.loads(json.dumps(record)) for _ in range(2))
    again["runs"] = [again["runs"][0] | {"loss": [9.0, 9.0]}]  # seed 0 of the baseline, ten points better
    again["runs"][0]["last"]["score"] += 0.1
    for part in (once, again):
        part["runs"] = [one | {"commit": "a", "loss": one.get("loss", [1.0, 0.5])} for one in part["runs"]]
        for one in part["runs"]:
            one["best"] = one["last"]
    setting = Setting(records.merge([once, again])[0])
    head, _, none, ce = setting.table()
    assert "minus baseline, last" not in head and none.startswith("| baseline | 5 | 81.2 ± 1.9 |")
    assert "| +0.4 [-2.7, +3.5]* |" in ce  # once over five pairs, with seed 0 the mean of two
    losses = [line.split(" | ")[1] for line in [*setting.training()][2:]]
    assert losses == ["0.500 ± 0.000", "0.500 ± 0.000"]  # a seed counts once
    for one in once["runs"]:
        one["best"] = one["last"] | {"score": 0.9 + one["seed"] / 100}
    head, _, none, ce = Setting(records.merge([once])[0]).table()
    assert head.endswith("| minus baseline, last |") and ce.endswith("| +1.4 [+0.7, +2.1] |") and none.endswith("| - |")


def test_a_setting_names_its_model_and_router():
    one = a_record(none=NONE)
    names = {"model": "models/all-MiniLM-L6-v2"}, {"model": "google-bert/bert-large-cased", "router": "linear"}
    settings = [
        Setting(records.merge([one | {"config": one["config"] | more}])[0])
        for more in (*names, {"experts_from": ["a", "b"]})
    ]
    assert [setting.brief for setting in settings] == [
        "CoLA, 8Top2",
        "CoLA, bert-large-cased, 8Top2, linear router",
        "CoLA, m, 8Top2, experts trained apart",
    ]
    assert [setting.title.endswith("experts from 2 models") for setting in settings] == [False, False, True]


def test_runs_from_two_dense_models_are_no_pair():
    """Another stage II is another start: its dice are no control, also where they are of a nearer commit."""
    record = a_picture_record({"ce": plus(1, 1, 1, 1, 1), "random": NONE})
    far, near = ([one | {"dense": dense} for one in record["runs"]] for dense in (0.8, 0.9))
    again = [one | {"last": {"score": 0.5}, "best": {"score": 0.5}} for one in near if one["variant"] == "random"]
    record["runs"] = [*far, *again]
    assert Setting(records.merge([record])[0]).gap("ce", "random").mean == pytest.approx(1.0)
    record["runs"] = [*(one for one in far if one["variant"] == "ce"), *again]
    assert Setting(records.merge([record])[0]).gap("ce", "random") is None


def test_a_layer_keeps_a_share_of_its_own_conflicts():
    """However few of its pairs have a gradient."""
    first, last = ([{"conflict_ratio": share} for share in shares] for shares in ((0.4, 0.1), (0.2, 0.02)))
    assert evidence.keep_shallow(first, last) == pytest.approx(0.5 - 0.2)


def test_the_best_learning_rate_counts_as_in_the_papers_table():
    record = a_record(none=NONE, ce=NONE)
    runs = record["runs"]
    record["runs"] = [own | {"lr": lr, "best": {"score": own["best"]["score"] + lr}} for own in runs for lr in (0.1, 0.2)]
    record["runs"].append(record["runs"][0] | {"lr": 0.3, "best": {"score": 1.0}})  # one seed alone
    assert {run["lr"] for run in Setting(records.merge([record])[0]).runs("none")} == {0.2}


def test_a_placebo_that_does_as_well_is_said():
    setting, row = Setting(records.merge([a_record(none=NONE, ce=NONE)])[0]), Row("figure 5", "x", "y")
    same = "the control does as well"
    one = Paired(-2.0, None, None, 0, 0, 1)
    cases = (None, "reproduced (placebo not run)"), (gap(-3, -1), "reproduced"), (gap(-1, 1), same), (one, same)
    for beyond, verdict in cases:
        assert sign_row(row, gap(-3, -1), -1, setting, controls={"placebo": beyond}).verdict == verdict
    both = {"baseline": gap(-1, 1), "placebo": gap(-3, -1)}
    assert sign_row(row, gap(-3, -1), -1, setting, controls=both).verdict == same
    assert sign_row(row, gap(-3, -1), -1, setting).verdict == "reproduced"  # a claim without a placebo
    assert sign_row(row, gap(1, 3), -1, setting).verdict == "not reproduced"
    assert sign_row(row, gap(-1, 3), -1, setting).verdict == "inconclusive"


def test_rows_of_curves(tmp_path):
    """Loads, losses and conflicts per layer come from the curves; the signs decide."""

    def curve(seed, name, busiest, loss):
        lines = []
        for step in range(20):
            shares = {0.8: 0.4 + seed / 250, 0.4: 0.1 + seed / 1000}  # judged -> flagged
            layers = [{"conflict_ratio": flagged, "judged_ratio": judged} for judged, flagged in shares.items()]
            layers = [layer | {"load": [busiest, 1 - busiest]} for layer in layers]
            lines.append({"step": step, "conflict_loss": loss + step / 10, "balance_loss": 2 - step / 10, "layers": layers})
        (tmp_path / f"{name}-s{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    record = a_record(none=NONE, ce=NONE)
    for one in record["runs"]:
        curve(one["seed"], one["variant"], 0.5 if one["variant"] == "ce" else 0.6 + one["seed"] / 100, 1.0)
        one["curve"] = tmp_path / f"{one['variant']}-s{one['seed']}.jsonl"
    record["config"]["moe_layers"] = "1,3"
    setting = Setting(records.merge([record])[0])
    shares = [line.split(" | ")[-1] for line in [*setting.training()][2:]]
    assert shares == ["0.620 ± 0.016 |", "0.500 ± 0.000 |"]  # of the baseline and ce, mean over layers
    rows = {row.where: row for row in evidence.curve_rows([setting])}
    assert rows["figure 4"].verdict == "the control does as well" and rows["figure 6"].verdict == "not reproduced"
    assert rows["figure 5"].here.startswith("-12.0 [") and rows["figure 5"].verdict == "reproduced (placebo not run)"
    same = "the control does as well"  # the baseline's conflicts are in the same layers
    assert rows["figure 9"].here.startswith("+25.5 [") and rows["figure 9"].verdict == same
    for one in record["runs"]:  # a baseline of another tau has flags of that tau
        one["lent"] = one["variant"] == "none"
    record["config"]["tau"] = 0.1
    row = evidence.shallow_row(Row("figure 9", "x", "y"), Setting(records.merge([record])[0]))
    assert row.verdict == "reproduced (baseline not run, placebo not run)" and "baseline" not in row.here


@pytest.mark.parametrize(
    ("ce", "placebo", "flat", "main_loss", "verdict"),
    [
        (-0.2, -0.1, 0.0, 0.1, "reproduced"),
        (-0.2, -0.2, 0.0, 0.1, "the control does as well"),
        (-0.2, -0.1, -0.2, 0.1, "the control does as well"),
        (0.0, 0.0, 0.0, 0.1, "inconclusive"),
        (0.2, 0.0, 0.0, 0.1, "not reproduced"),
        (-0.2, -0.1, 0.0, 0.0, "not testable here: the experts are equal copies"),
    ],
)
def test_rows_of_the_conflict_loss_alone(ce, placebo, flat, main_loss, verdict):
    """The change of the conflict ratio, which shall fall, and by more than with the placebo and flat."""
    falls, rows = {"ce": ce, "placebo": placebo, "flat": flat}, []
    for arm, seed in product(falls, range(4)):
        noise = 0.01 * (seed if arm == "ce" else -seed) - 0.015
        ends = [{"main_loss": 0.5, "layers": [{"conflict_ratio": 0.5}]}]
        ends.append({"main_loss": 0.5 + main_loss, "layers": [{"conflict_ratio": 0.5 + falls[arm] + noise}]})
        rows.append({"part": "routers", "arm": arm, "seed": seed, "curve": ends})
    record = {"rows": rows, "run": "lvlm", "model": "m", "command": "x"}
    ratio = partial(evidence.rise, "conflict_ratio")
    row = evidence.alone_row(Row("figures 3, 8", "x", "yes"), record, "routers", -1, ratio, "conflict_ratio")
    assert row.verdict == verdict and f"main loss ce 0.50 ± 0.00 to {0.5 + main_loss:.2f}" in row.here
    assert "4 seeds: other batches of one model" in row.here and f"layer by layer: {0.5 + ce:.2f} ± 0.01;" in row.here


def test_rows_of_saved_models():
    """Reliability has no verdict; confusing tokens and harm have one each, by the predicate that the row names."""
    assert [row.verdict for row in evidence.saved_rows([])] == [NOT_RUN] * 4
    one = {"model": "m", "loss": 0.5, "kappa": 0.1, "error": 0.02, "triples": 16, "command": "x"}
    one["confusing"] = {"pairs": 9, "own": 8.0, "other": 5.0, "rest": -1.0}
    one["about"] = {"sentence": [0.5, 0.1]}

    arms = ("no conflicting", "no random", "no random of equal length")

    def found(gap, **confusing):
        fresh = {arm: {"minus_all": [[0.2, 0.1], [i, 0.1], [0.3, 0.1]]} for i, arm in enumerate(arms)}
        fresh["no conflicting"]["minus_all"][1] = gap
        harm = {"sizes": [0.1, 0.2, 0.4], "fresh": fresh | {"before": 0.7, "all": {"loss": [0.6, 0.5, 0.8]}}}
        probes = [one | {"harm": harm, "confusing": one["confusing"] | confusing}]
        rows = evidence.saved_rows([{"name": "lvlm", "probes": probes}])
        assert (
            "; a step of 0.1 or 0.4: +0.2000, +0.3000; the loss before 0.7000, after the step with all 0.5000; "
            in rows[-1].here
        )
        return [row.verdict for row in rows]

    assert found([-0.03, 0.01]) == ["measured", "measured", "reproduced", "reproduced"]
    assert found([-0.03, 0.02], other=3.0) == ["measured", "measured", "not reproduced", "inconclusive"]
    assert found([0.03, 0.01])[-1] == "not reproduced"


def test_somebodys_record(tmp_path):
    """Complete, clean and paired; what is wrong is named, with the fix."""
    whole = a_record(none=[10, 12, 11, 14, 9], ce=[13, 15, 13.5, 17, 12]) | {
        "versions": {"torch": "2"},
        "made_from": {"d": "1"},
    }

    def found(record):
        (tmp_path / "results.json").write_text(json.dumps(record))
        return check(tmp_path)

    title, _, *table, _, differs, made_with = found(whole)
    assert title.startswith("cola, m, 8Top2")
    assert table[2].startswith("| table 12 | STGC gains on CoLA | +2.3 | +2.9 [") and table[2].endswith(" | - |")
    assert "| a gain, the selection undecided (dice not run, placebo not run, flat not run) |" in table[2]
    assert differs == "Not as in the paper: beta 0.1 (1.0), router cosine (linear), model m (bert-large)."
    assert made_with == "Made with torch 2."
    usual = {"beta": 1, "router": "linear", "model": "google-bert/bert-large-cased"}
    resumed = {"resumed": [{"dirty": False, "versions": {"torch": "3"}}]}
    *_, differs, made_with = found(whole | {"config": whole["config"] | usual} | resumed)
    assert differs == "These options are as in the paper." and made_with == "Made with torch 2; resumed with torch 3."
    first = whole["runs"][0]
    for wrong, message in (
        ({"dirty": True}, "commit them"),
        ({"resumed": [{"dirty": True, "versions": {}}]}, "commit them"),
        ({"config": {"seeds": [0]}}, "its config has no valid num_experts; give the record as it was"),
        ({"data": {"dev": 1}}, "its data has no valid train"),
        ({"runs": [*whole["runs"], first]}, "none, seed 0 is there twice"),
        ({"runs": [first | {"last": {"score": 5.0}}, *whole["runs"][1:]]}, r"a score of none, seed 0 is not in \[-1, 1\]"),
        ({"made_from": None}, "has no made_from"),
        ({"runs": whole["runs"][:-1]}, "ce and none differ in seeds 4; finish the run"),
        ({"runs": whole["runs"][:5]}, "compares nothing with the baseline"),
        ({"config": whole["config"] | {"variants": ["none", "ce", "placebo"]}}, "placebo, seeds 0, 1, 2, 3, 4 is missing"),
        ({"config": whole["config"] | {"variants": ["ce"], "seeds": [0, 7]}}, "ce, seed 7 is missing; finish it"),
        ({"config": whole["config"] | {"variants": ["ce"], "lrs": [LR, 0.5]}}, "ce, lr 0.5, seeds 0, 1, 2, 3, 4 is missing"),
    ):
        with pytest.raises(UserError, match=message):
            found(whole | wrong)
    with pytest.raises(UserError, match="no results.json is there"):
        check(tmp_path / "nothing")
