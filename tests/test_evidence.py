"""Rows and sentences of docs/claims.md on invented records: each predicate, and what stands beside it."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from test_claims import NONE, a_picture_record, a_record, plus, verdicts

from lab.bench.regimes import BETAS, COLUMNS
from lab.report import claims, evidence, pictures, records
from lab.report.regimes import FROZEN, ORACLE, RANDOM
from lab.report.regimes import NONE as SETTLED
from lab.report.verdicts import NO_ROUTING, NOT_RUN, Setting, controls_of

WORSE = plus(-4, -5, -4, -5, -4)


def setting_of(record: dict) -> Setting:
    return Setting(records.merge([record])[0])


def test_controls_have_the_same_loss_passes_and_gradients():
    for name in ("ce", "placebo", "flat"):
        assert controls_of(name) == ("placebo", "flat")
    for name in ("mse", "placebo-mse", "flat-mse"):
        assert controls_of(name) == ("placebo-mse", "flat-mse")
    assert controls_of("ce-one") == ("placebo-one", "flat-one")
    assert controls_of("ce-weight")[0] == "placebo-weight" and controls_of("reroute")[0] == "placebo-reroute"


@pytest.mark.parametrize(
    ("gate", "dice", "verdict"),
    [
        (plus(4, 5, 4, 5, 4), WORSE, "reproduced"),
        (plus(0.5, 0.4, 0.5, 0.6, 0.5), WORSE, "smaller than the paper's"),
        (plus(0.7, 0.6, 0.7, 0.7, 0.7), WORSE, "reproduced"),  # as far as the paper's 0.7
        (WORSE, WORSE, "not reproduced"),
        (WORSE, NONE, NO_ROUTING),
        (plus(4, 5, 4, 5, 4), None, "reproduced (dice not run)"),
    ],
)
def test_dynmoes_gate_is_compared_with_the_cosine_router(gate, dice, verdict):
    """Its record has a baseline alone, and one more option."""
    base = a_record(none=NONE, ce=NONE, **({"random": dice} if dice else {}))
    other = a_record(none=gate)
    other["config"] |= {"router": "dynmoe", "max_experts": 16}
    other["command"] = "the gate's"
    row, *others = evidence.gate_rows(claims.usable([base, other]))
    assert row.verdict == verdict and row.claim.startswith("DynMoE's gate gains score on CoLA") and row.paper == "+0.7"
    assert row.setting.record["command"] == ["x", "the gate's"] and "dynmoe" in row.setting.variants
    assert [one.verdict for one in others] == [NOT_RUN] * 4 and "costs score on RTE" in others[-1].claim
    other["config"]["epochs"] = 9
    assert {row.verdict for row in evidence.gate_rows(claims.usable([base, other]))} == {NOT_RUN}  # nothing else may differ


def a_filmed_record(**sides) -> dict:
    """Variant -> per MoE layer of one moment: (share below 0 at first, at last, feature_gradient, bias_weight)."""
    record = a_record(**dict.fromkeys(sides, NONE))
    for run in record["runs"]:
        layers = sides[run["variant"]]
        shift = run["seed"] / 100  # seeds differ a little

        def moment(which, layers=layers, shift=shift):
            return {
                "layers": [
                    {
                        "histogram": [10 * row[which]] + [0] * 18 + [10 * (1 - row[which])],
                        "feature_gradient": row[2] + shift * (1 + row[2]),
                        "bias_weight": row[3],
                    }
                    for row in layers
                ]
            }

        run |= {"probe": [moment(0), moment(1)], "curve": Path("results/x/none-s0.jsonl"), "commit": "a"}
    return record


FALLS, RISES = (0.5, 0.25, 0.1, 0.95), (0.25, 0.5, 0.1, 0.95)


@pytest.mark.parametrize(
    ("sides", "verdict"),
    [
        ({"none": [RISES], "ce": [FALLS], "placebo": [RISES]}, "reproduced"),
        ({"none": [RISES], "ce": [FALLS]}, "reproduced (placebo not run)"),
        ({"none": [RISES], "ce": [FALLS], "placebo": [FALLS]}, "the control does as well"),
        ({"none": [FALLS], "ce": [FALLS], "placebo": [RISES]}, "the control does as well"),
        ({"none": [FALLS], "ce": [RISES], "placebo": [FALLS]}, "not reproduced"),
        ({"none": [RISES], "ce": [FALLS, FALLS, RISES], "placebo": [RISES]}, "reproduced"),  # in most layers
        ({"none": [RISES], "ce": [FALLS, RISES, RISES], "placebo": [RISES]}, "not reproduced"),
    ],
)
def test_the_shift_of_similarities(sides, verdict):
    (row,) = (row for row in evidence.probe_rows([setting_of(a_filmed_record(**sides))]) if row.where == "figure 7")
    assert row.verdict == verdict and row.picture == "x/curves.png"
    assert f"ce {'0.50' if sides['ce'][0] == FALLS else '0.25'}" in row.here or len(sides["ce"]) > 1


def test_correlations_of_films_are_of_all_layers():
    """Table 13: the first layer rises, their mean falls. Section 6.1: above 0.9 in most layers."""

    def rows(none, ce):
        found = evidence.probe_rows([setting_of(a_filmed_record(none=none, ce=ce, placebo=none))])
        return {row.where: row for row in found}

    found = rows([(0, 0, 0.1, 0.95), (0, 0, 0.7, 0.95)], [(0, 0, 0.2, 0.95), (0, 0, 0.4, 0.5)])
    assert found["table 13"].here.startswith("-0.102 [") and found["table 13"].verdict == "not reproduced"
    assert found["sec. 6.1"].verdict == "reproduced"
    found = rows([(0, 0, 0.1, 0.85)], [(0, 0, 0.2, 0.85)])
    assert found["table 13"].verdict == "reproduced" and found["sec. 6.1"].verdict == "not reproduced"


@pytest.mark.parametrize(("margin", "rows"), [(0.51, 1), (0.49, 0), (0.1, 0)])
def test_a_dose_counts_if_it_leaves_half_of_the_margin(margin, rows):
    record = a_record(none=NONE, ce=plus(3, 4, 3, 4, 3), placebo=NONE, random=WORSE)
    for run in record["runs"]:
        run |= {"router_margin": [0.5, 0.02 if run["variant"] == "none" else 0.02 * margin], "commit": "a"}
    own = evidence.dose_rows([setting_of(record)])
    assert [row.verdict for row in own] == (["reproduced"] if rows else [NOT_RUN])
    assert not rows or f"margin {margin:.2f} of the baseline's (5 seeds)" in own[0].here


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.1, 1.2, "reproduced"), (1.19, 1.22, "inconclusive"), (1.22, 1.31, "not reproduced")],
)
def test_costs_are_judged_by_their_interval(tmp_path, monkeypatch, low, high, verdict):
    """Of time, beside the paper's 21.3 %; memory: less than a tenth more."""
    two = {"ratio": (low + high) / 2, "interval": [low, high], "peak_ratio": low}
    record = {"command": "x", "variants": {"two passes": two, "one pass, weight gradients": two}}
    for name in ("bert-large", "mixtral", "olmoe"):
        (tmp_path / f"bench-{name}.json").write_text(json.dumps(record))
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    rows = evidence.bench_rows()
    assert [row.verdict for row in rows] == [verdict] * 3 + ["not reproduced"] * 3 + ["measured"] * 3


def test_tables_of_other_losses():
    """Table 9: ce minus mse, with placebo minus mse as c. Below it each loss beside its own placebo."""
    scores = {"none": NONE, "random": WORSE, "ce": plus(2, 3, 2, 3, 2), "placebo": plus(1, 1.5, 1, 1.5, 1), "flat": NONE}
    scores |= {"mse": plus(1, 1, 1, 1, 1.5), "reroute": plus(-1, -1.5, -1, -1.5, -1)}
    scores |= {"placebo-mse": NONE, "flat-mse": NONE, "placebo-reroute": NONE}
    rows = pictures.lvlm_rows([setting_of(a_picture_record(scores))])
    (row,) = (row for row in rows if row.where == "table 9")
    assert row.here.startswith("+1.3 [") and row.verdict == "reproduced"
    mse, reroute = (row for row in rows if row.claim.startswith("with another loss"))
    assert mse.here.startswith("mse +1.1 [") and "minus flat +1.1" in mse.here and mse.verdict == "reproduced"
    assert reroute.here.startswith("reroute -1.2 [") and "flat" not in reroute.here and reroute.verdict == "not reproduced"
    assert verdicts((scores | {"placebo": scores["ce"]}, {}), where="table 9") == ["the control does as well"]
    wide = {"ce": plus(5, 6, 5, 6, 5), "mse": plus(4, 4, 4, 4, 4.5), "placebo": plus(3, 7, 3.5, 6, 5)}  # above none alone
    assert verdicts((scores | wide, {}), where="table 9") == ["a gain, the selection undecided"]
    assert NO_ROUTING in verdicts((scores | {"random": NONE}, {}), where="new")


def a_search(differs: dict[tuple[str, str], float]) -> dict:
    """A record of synthetic settings: (setting, variant) -> its accuracy above the baseline's."""
    names = sorted({name for name, _ in differs})
    variants = [SETTLED, RANDOM, FROZEN, ORACLE, *product(("ce", "placebo", "flat"), BETAS)]
    rows = []
    for name, (variant, beta), seed in product(names, variants, range(4)):
        accuracy = 0.5 + 0.01 * seed + differs.get((name, variant), 0) * (1 + 0.01 * seed)
        row = dict.fromkeys(COLUMNS, 0.5) | {"setting": name, "variant": variant, "beta": beta, "seed": seed}
        rows.append([*(row | {"accuracy": accuracy, "best_accuracy": accuracy}).values()])
    setting = {"top_k": 2, "normalize": None, "start": "random"}
    return {"command": "x", "config": {}, "settings": dict.fromkeys(names, setting), "columns": COLUMNS, "runs": rows}


def test_the_search_is_counted_by_intervals(tmp_path, monkeypatch):
    """Where dice are neither better nor worse, routing does not matter, and they gain nothing."""
    found = {("a", "random"): -0.1, ("a", "ce"): -0.2, ("b", "random"): 0.1, ("b", "ce"): 0.1, ("c", "random"): 0.0}
    (tmp_path / "regimes.json").write_text(json.dumps(a_search(found)))
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    search = claims.read_search()
    assert (search.settings, search.matters, len(search.restless)) == (3, 1, 1)
    assert [gap.mean for gap in search.restless[0]] == pytest.approx([10.15, 10.15])
    assert search.change[1.0] == pytest.approx(-20.3)
    assert search.hits == dict.fromkeys(BETAS, 1) and search.choice == dict.fromkeys(BETAS, [(1, 1), (1, 1)])
    text = " ".join(claims.synthetic(search))
    assert "The router beats dice in 1 of the 3 settings, with " in text
    assert "dice beat the router in 1, by 10.2 points in the median. There STGC at beta 1 beats the baseline in 1; " in text
    assert (
        "One line or several? Several. At any beta" in text
        and "or flat in 6 of 18 comparisons and worse in 6; chance alone gives 0.5 of" in text
    )
    (tmp_path / "regimes.json").write_text(json.dumps(a_search(found | {("b", "ce"): 0.0})))
    worse = " ".join(claims.synthetic(claims.read_search()))
    assert (
        "Nearly one; where they differ, ce is the worse one. At" in worse
        and "in 0 of 18 comparisons and worse in 6; chance" in worse
    )
    (tmp_path / "regimes.json").write_text(json.dumps(a_search({("a", "random"): -0.1, ("b", "random"): 0.0})))
    level = claims.read_search()
    assert "several? One, as far as it is known. At any beta" in " ".join(claims.synthetic(level))
    assert "several? Nearly one; where they differ, ce is the worse" in " ".join(
        claims.synthetic(replace(level, choice=dict.fromkeys(BETAS, [(0, 1), (0, 1)])))
    )
    assert "Several. At" in " ".join(claims.synthetic(replace(level, choice=dict.fromkeys(BETAS, [(1, 0), (0, 0)]))))
    assert "Several. At" in " ".join(claims.synthetic(replace(level, between=1.5)))


def test_sentences_count_a_settings_own_runs(tmp_path, monkeypatch):
    """Above the placebo by its interval; a setting whose baseline is lent still compares ce with its own placebo."""
    (tmp_path / "regimes.json").write_text(json.dumps(a_search({("a", "random"): -0.1})))
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    above, near = plus(1, 2, 1, 2, 1), plus(1, -1, 0, 1, -2)
    base = a_picture_record({"none": NONE, "random": WORSE, "ce": near, "placebo": NONE})
    dose = a_picture_record({"ce": above, "placebo": NONE}, beta=0.1)
    for part in (base, dose):
        part["runs"] = [run | {"commit": "a"} for run in part["runs"]]
    settings = claims.usable([base, dose])
    assert [setting.lent for setting in settings] == [set(), {"none", "random"}]
    one, two, three, _, five = claims.sentences(settings, a_probed_record(), claims.read_search())
    assert one.startswith("Over 5 paired seeds STGC minus its baseline is -0.2 [")
    assert one.endswith("] points (toy LVLM, 4Top2, beta 1).")
    start = "The learned router beats dice in 1 of the 1 settings with text or pictures where both were run with two seeds"
    assert two.startswith(f"{start} or more; there STGC at beta 1 minus the baseline is -0.2 [")
    assert two.endswith("] points (toy LVLM, 4Top2).")
    assert (
        "in 1 of the 2 such settings where both were run with two seeds or more (+" in three and "; by chance 0.1)" in three
    )
    for run in base["runs"]:
        run["dense"] = NONE[run["seed"]] / 100 + 0.05
    text = claims.say_routing(claims.usable([base]))
    assert text.endswith("; in 1 of them the baseline lies 5 points below the dense model that its experts were cut from.")
    assert five.startswith("Of the router's margin, ") and " % at beta 1 (" in five
    even = claims.usable([a_picture_record({"none": NONE, "random": NONE, "ce": near})])
    assert "there the baseline is not shown to beat experts drawn by dice, so its" in claims.say_gains(even)


def a_probed_record() -> list[dict]:
    probes = [{"loss": loss, "kappa": kappa} for loss, kappa in ((0.1, 0.3), (2.0, 0.6), (1.0, 0.0))]
    probes.append({"loss": 3.0, "kappa": None})  # no token is flagged, or all are
    one = {"name": "cola", "config": {}, "probes": probes}
    return [one, *(one | {"name": "lvlm-scenes", "config": {"experts": "split", "num_experts": n}} for n in (4, 8, 4))]


def test_kappa_is_told_as_the_loss_falls():
    """Settings of other experts are no one line."""
    text = claims.say_flags(a_probed_record())
    assert "0.60, 0.00, 0.30 (CoLA); 0.60, 0.60, 0.00, 0.00, 0.30, 0.30 (toy LVLM, 4 parts); 0.60, 0.00, 0.30 (toy " in text
    usual = {"model": "m", "command": "x", "triples": 16, "error": None}
    record, *_ = a_probed_record()
    rows = evidence.saved_rows([record | {"probes": [usual | one for one in record["probes"]]}])
    shown = ["0.60, 16 triples; cola, m, main loss 2.00", "0.00, 16 triples; cola, m, main loss 1.00"]
    assert [row.here for row in rows] == [*shown, "0.30, 16 triples; cola, m, main loss 0.10"]
