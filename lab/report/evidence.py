"""Rows of docs/claims.md: GLUE, the curves, films and saved models of any run, the conflict loss alone, costs, controls."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import mean

from lab.moe.probe import mean_of
from lab.report import pictures
from lab.report.compare import PUBLISHED, Paired
from lab.report.records import RESULTS, ends_of, is_whole
from lab.report.tables import read_bench, spread
from lab.report.verdicts import (
    NOT_RUN,
    NOT_TESTABLE,
    Row,
    Setting,
    gain_rows,
    gains,
    gap_of,
    judge_fall,
    judge_sign,
    own_gaps,
    say_gap,
    score_sign_row,
    sign_row,
    tell,
    verdict_of,
)
from lab.run.options import label
from lab.text.tasks import TASKS, TITLES

# ---- 1. Scores on GLUE ----


def glue_rows(settings: list[Setting]) -> list[Row]:
    """Table 12: each of the paper's tasks, and where a part of its data was trained on, that."""
    before, after = PUBLISHED["MoE-8Top2 (re-run)"], PUBLISHED["+ STGC"]
    own, found = [setting for setting in settings if not setting.borrows], []
    for i, (name, title) in enumerate(TITLES.items()):
        row = Row("table 12", f"STGC gains on {title}", f"{after[i] - before[i]:+.1f}")
        found += gain_rows(row, [one for one in own if one.record["name"] == name and is_whole(one.record)])
        parts = [one for one in own if one.record["name"].startswith(f"{name}-") and not is_whole(one.record)]
        for size in sorted({setting.record["data"]["train"] for setting in parts}):
            part = replace(row, claim=f"{row.claim}, trained on {size:,} of its {TASKS[name].rows:,} examples")
            same = [setting for setting in parts if setting.record["data"]["train"] == size]
            found += [one for one in gain_rows(part, same) if one.verdict != NOT_RUN]
    return found


def gate_rows(settings: list[Setting]) -> list[Row]:
    """Table 12's row of DynMoE, task by task: its gate beside the cosine router, both without a conflict loss."""
    own, base, found = PUBLISHED["DynMoE"], PUBLISHED["MoE-8Top2 (DynMoE's)"], []
    for i, (name, title) in enumerate(TITLES.items()):
        gain = round(own[i] - base[i], 1)
        claim = f"DynMoE's gate {'gains' if gain > 0 else 'costs'} score on {title}"
        row = Row("table 12", f"{claim} (reproduced: by its interval, and as far as the paper's)", f"{gain:+.1f}")
        whole = [s for s in settings if s.record["name"] == name and is_whole(s.record) and "dynmoe" in s.variants]
        gaps = [(setting, setting.gap("dynmoe", "none")) for setting in whole]
        more = [s.last_epoch("dynmoe", "none") + s.beside("dynmoe") + same_commit(s, "dynmoe", "none") for s in whole]
        rows = [score_sign_row(row, gap, 1 if gain > 0 else -1, s, end, gain=gain) for (s, gap), end in zip(gaps, more)]
        found += rows or [row]
    return found


def same_commit(setting: Setting, one: str, other: str) -> str:
    """What to say where not all pairs of two variants are of one commit."""
    pairs = setting.of_one_commit(one, other)
    return f"; pairs of one commit: {pairs}" if pairs else ""


# ---- 2. Curves ----


def curve_rows(settings: list[Setting]) -> list[Row]:
    """Figures 4, 5, 6 and 9: from the curves of the settings with at least three seeds."""
    found, whole = [], [s for s in settings if len(gains(s)) > 2]
    for where, key, name in (("figure 4", "balance_loss", "balance"), ("figure 6", "conflict_loss", "conflict")):
        claim = f"the {name} loss falls in training (reproduced: its last tenth lies below its first in most runs)"
        row = Row(where, claim, "it falls")
        found += [falling_row(row, key, setting) for setting in whole] or [row]
    claim = "STGC evens the loads (reproduced: the busiest expert's share, first MoE layer, lies below the baseline's)"
    row = Row("figure 5", claim, "more even")
    for setting in whole:
        none, ce, placebo = (ends_by_seed(setting, variant, "load", 0) for variant in ("none", "ce", "placebo"))
        found.append(sign_row(row, gap_of(none, ce), -1, setting, "; % of the pairs", {"placebo": gap_of(placebo, ce)}))
    found += [] if whole else [row]
    claim = "conflicts remain in shallow layers (reproduced: of the pairs that have a gradient, the first MoE layer flags a "
    claim += "larger share than the last)"
    row = Row("figure 9", claim, "shallow")
    layered = [setting for setting in whole if not setting.record["config"]["moe_layers"].isdecimal()]
    found += [shallow_row(row, setting) for setting in layered] or [row]
    picture = lambda row: f"{row.setting.record['folders'][0]}/curves.png"  # noqa: E731
    return [replace(row, picture=picture(row)) if row.setting else row for row in found]


def falling_row(row: Row, key: str, setting: Setting) -> Row:
    """A loss that falls in training. The baseline and the placebo stand beside it, where they have this loss."""
    ends = {v: [pair for run in setting.runs(v) if (pair := ends_of(run, key))] for v in ("ce", "none", "placebo")}
    if not ends["ce"]:
        return replace(row, setting=setting)
    texts = [f"{label(v)} {' to '.join(spread([*side], 3) for side in zip(*own))}" for v, own in ends.items() if own]
    falls = {v: mean(last < first for first, last in own) > 0.5 for v, own in ends.items() if own}
    return replace(row, here="; ".join(texts), verdict=judge_fall(falls), setting=setting)


def shallow_row(row: Row, setting: Setting) -> Row:
    """The flagged share of the pairs that are judged, of the first MoE layer minus that of the last, beside the same of the
    baseline and the placebo. Of all pairs it would compare how many have a gradient: where a token's answer counts nothing,
    its last layer has none. A baseline that is lent from another tau has flags of that tau: it stands in no row."""
    steps, texts = {}, []
    for name in ("ce", "none", "placebo"):
        if name in setting.lent and setting.record["config"]["tau"]:
            continue
        first, last = (judged_share(setting, name, at) for at in (0, -1))
        if first:
            steps[name] = {seed: first[seed] - last[seed] for seed in first.keys() & last.keys()}
            texts.append(f"{label(name)} {spread([*first.values()])} and {spread([*last.values()])}")
    if not steps.get("ce"):
        return replace(row, setting=setting)
    more, zero = f"; % of the judged pairs ({'; '.join(texts)})", dict.fromkeys(steps["ce"], 0.0)
    controls = {label(name): gap_of(steps.get(name, {}), steps["ce"]) for name in ("none", "placebo")}
    return sign_row(row, gap_of(zero, steps["ce"]), 1, setting, more, controls)


def judged_share(setting: Setting, variant: str, layer: int) -> dict[int, float]:
    """seed -> the flagged share of one layer's judged pairs at the end of the training, in %."""
    flagged, judged = (ends_by_seed(setting, variant, key, layer) for key in ("conflict_ratio", "judged_ratio"))
    return {seed: 100 * flagged[seed] / judged[seed] for seed in flagged if judged.get(seed)}


def ends_by_seed(setting: Setting, variant: str, key: str, layer: int) -> dict[int, float]:
    """seed -> a value of one layer at the end of the training, in %."""
    ends = {run["seed"]: ends_of(run, key, layer) for run in setting.runs(variant)}
    return {seed: 100 * found[1] for seed, found in ends.items() if found}


# ---- 3. Films and saved models ----


def probe_rows(settings: list[Setting]) -> list[Row]:
    """Section 6.1, table 13 and figure 7: from the probe of each film, at its last moment, setting by setting."""
    claim = "similarities by biases and by whole weights correlate (reproduced: above 0.9 in most layers)"
    rows = {correlation_row: Row("sec. 6.1", claim, "> 0.9")}
    claim = "STGC raises the correlation of an expert's features and gradients (reproduced: ce minus baseline above 0, mean "
    rows[feature_row] = Row("table 13", f"{claim}over the MoE layers)", "0.265 to 0.356")
    claim = "fewer similarities lie below 0 after training with STGC than before (reproduced: in most layers)"
    rows[shift_row] = Row("figure 7", claim, "a shift to the right")
    found = []
    for make, row in rows.items():
        found += [made for setting in settings if (made := make(row, setting))] or [row]
    return found


def correlation_row(row: Row, setting: Setting) -> Row | None:
    runs = filmed(setting)
    if not (values := probed(runs, "bias_weight")):
        return None
    count = len({(run["variant"], run["seed"], run["commit"]) for run in runs})
    here = f"{spread(values, 2)}, the layers of {count} run{'s' * (count > 1)}"
    return replace(row, here=here, verdict=verdict_of(mean(value > 0.9 for value in values) > 0.5), setting=setting)


def feature_row(row: Row, setting: Setting) -> Row | None:
    sides = {}
    for name in ("none", "ce", "placebo"):
        ends = {run["seed"]: run["probe"][-1]["layers"] for run in setting.measured(name) if run.get("probe")}
        means = {seed: mean_of([layer.get("feature_gradient") for layer in layers]) for seed, layers in ends.items()}
        sides[name] = {seed: value for seed, value in means.items() if value is not None}
    if not (gap := gap_of(sides["none"], sides["ce"])):
        return None
    more = "; ".join(f"{label(name)} {spread([*own.values()], 2)}" for name, own in sides.items() if own)
    controls = {"placebo": gap_of(sides["placebo"], sides["ce"])}
    found = sign_row(row, gap, 1, setting, f"; {more}", controls, digits=3)
    return replace(found, here=more) if gap.low is None else found


def shift_row(row: Row, setting: Setting) -> Row | None:
    runs, shares = filmed(setting), {}
    for run in runs:
        shares.setdefault(run["variant"], []).extend(shares_below(run))
    shares = {name: shares[name] for name in ("none", "ce", "placebo") if shares.get(name)}
    if "ce" not in shares:
        return None
    texts = [f"{label(name)} {' to '.join(spread([*side], 2) for side in zip(*own))}" for name, own in shares.items()]
    verdict = judge_fall({name: mean(last < first for first, last in own) > 0.5 for name, own in shares.items()})
    here, picture = f"share below 0, layer by layer: {'; '.join(texts)}", f"{runs[0]['curve'].parent.name}/curves.png"
    return replace(row, here=here, verdict=verdict, setting=setting, picture=picture)


def filmed(setting: Setting) -> list[dict]:
    """The setting's own runs that have a probe."""
    return [run for run in setting.measured() if run.get("probe") and not run.get("lent")]


def probed(runs: list[dict], key: str) -> list[float]:
    """A value of every MoE layer at the last moment of the runs' films."""
    layers = [layer for run in runs for layer in run["probe"][-1]["layers"]]
    return [layer[key] for layer in layers if layer.get(key) is not None]


def shares_below(run: dict) -> list[tuple[float, float]]:
    """Of each MoE layer: the share of similarities below 0 at the first and the last moment."""
    sides = [[layer["histogram"] for layer in run["probe"][which]["layers"]] for which in (0, -1)]
    return [*zip(*([sum(one[:10]) / max(1, sum(one)) for one in side] for side in sides))]


def saved_rows(records: list[dict]) -> list[Row]:
    """Table 14 and section 6.6, and how reliable the flags are: from lab.report.probe on saved models."""
    probes = [(record.get("folder", record["name"]), one, record) for record in records for one in record.get("probes", [])]
    new = Row("new", "do other batches give the same flags? kappa: agreement beyond chance", "not asked")
    about = Row("new", "what are the flags about? the share of their variance that is explained", "not asked")
    claim = "confusing tokens: logits on the own label, the other's, the rest (reproduced: the second nearer to the first)"
    confusing = Row("table 14", claim, "23.5, 14.6, -0.7")
    claim = "without the conflicting pairs a step lowers a fresh batch's loss more than with all (reproduced: the loss lies "
    claim += "below by two standard errors, at the middle one of three lengths of the step)"
    harm = Row("sec. 6.6", claim, "0.05 lower")
    found = [] if probes else [new, about, confusing, harm]
    for name, one, record in sorted(probes, key=lambda found: (found[0], -found[1]["loss"])):
        where, command = f"{name}, {one['model']}, main loss {one['loss']:.2f}", one["command"]
        where += collapsed(record, one)
        if one["kappa"] is not None:  # there are flags, and other tokens without
            error = "" if one["error"] is None else f" ± {one['error']:.2f}"
            here = f"{one['kappa']:.2f}{error}, {one['triples']} triples; {where}"
            found.append(replace(new, here=here, verdict="measured", command=command, picture="probe.png"))
        if shares := one.get("about"):
            here = ", ".join(f"{cause} {share:.2f} (chance {chance:.2f})" for cause, (share, chance) in shares.items())
            here += f", flagged share of the labels apart by {one['labels']['gap']:.2f}" if one.get("labels") else ""
            found.append(replace(about, here=f"{here}; {where}", verdict="measured", command=command))
        if logits := one.get("confusing"):
            own, other, rest = (logits[key] for key in ("own", "other", "rest"))
            here = f"{own:.1f}, {other:.1f}, {rest:.1f}, {logits['pairs']:,.0f} pairs; {where}"
            verdict = verdict_of(own - other < other - rest)
            found.append(replace(confusing, here=here, verdict=verdict, command=command, picture="probe.png"))
        if arms := one.get("harm"):
            names = ("no conflicting", "no random", "no random of equal length")
            fresh, sizes = arms["fresh"], [f"{size:g}" for size in arms["sizes"]]
            own, random, equal = (fresh[arm]["minus_all"] for arm in names)
            gap, error = own[1]
            interval = Paired(gap, gap - 2 * error, gap + 2 * error, 0, 0, 0)
            here = f"{gap:+.4f} ± {error:.4f} (standard error), a step of {sizes[1]} of the expert's length; "
            here += f"without as many random pairs {random[1][0]:+.4f}, of equal length {equal[1][0]:+.4f}; "
            here += f"a step of {sizes[0]} or {sizes[-1]}: {own[0][0]:+.4f}, {own[-1][0]:+.4f}; "
            here += f"the loss before {fresh['before']:.4f}, after the step with all {fresh['all']['loss'][1]:.4f}; {where}"
            found.append(replace(harm, here=here, verdict=judge_sign(interval, -1), command=command))
    return found


def collapsed(record: dict, probe: dict) -> str:
    """What to say of a probed model that answers one class alone."""
    names, runs = (probe.get("variant"), probe.get("seed")), record.get("runs", [])
    same = [run for run in runs if (run["variant"], run["seed"]) == names]
    return ", answers one class alone" if any(run.get("collapsed") for run in same) else ""


# ---- 4. Costs, and the loss alone ----


BENCHED = {  # record -> what was measured; weights are random
    "bench-bert-large.json": "BERT-large's size, one layer of 24 an MoE",
    "bench-mixtral.json": "a small model built as Mixtral is",
    "bench-olmoe.json": "a small model built as OLMoE is",
}


def bench_rows() -> list[Row]:
    """Table 11, from the records of lab.bench: time, and the memory that the token gradients take."""
    time = Row("table 11", "time of a step with STGC (reproduced: not above the paper's, by its interval)", "+21.3 %")
    claim = "gradients of the biases take little memory (reproduced: the peak rises by less than a tenth)"
    small = Row("table 11", claim, "0.29 GiB")
    claim = "flags from whole weights are possible (measured: the peak of one pass, which never stores these gradients)"
    whole = Row("table 11", claim, "773 GiB to store, fails")
    found: dict[str, list[Row]] = {row.claim: [] for row in (time, small, whole)}
    for name, what in BENCHED.items():
        record = read_bench(RESULTS / name)
        two, full = (record["variants"][key] for key in ("two passes", "one pass, weight gradients"))
        low, ratio, high = (100 * (value - 1) for value in (two["interval"][0], two["ratio"], two["interval"][1]))
        here = f"{ratio:+.1f} % [{low:+.1f}, {high:+.1f}], two passes, {what}"
        verdict = "reproduced" if high <= 21.3 else "not reproduced" if low > 21.3 else "inconclusive"
        found[time.claim].append(replace(time, here=here, verdict=verdict, command=record["command"]))
        for row, own, verdict in ((small, two, verdict_of(two["peak_ratio"] < 1.1)), (whole, full, "measured")):
            here = f"peak {100 * (own['peak_ratio'] - 1):+.1f} %, {what}"
            found[row.claim].append(replace(row, here=here, verdict=verdict, command=record["command"]))
    return [row for rows in found.values() for row in rows]


NOT_MEASURED = [
    Row("table 2", "gains with StableLM, Phi-2, Vicuna, SigLIP", "+0.6 to +0.8", "-", f"{NOT_TESTABLE}: too large"),
    Row("figure 5", "tokens of different data take different pathways (their shares are recorded, not compared)", "yes"),
]
ALONE = {  # of the conflict loss alone: what is measured -> the direction in the paper
    "conflict_ratio": ("the conflict ratio falls", -1),
    "consistency": ("consistency rises", 1),
    "consistency_std": ("its std over experts rises", 1),
}


def alone_rows() -> list[Row]:
    """Figures 3 and 8: the change from the first to the last step, of ce and minus its controls, over seeds."""
    found = []
    for path in sorted(RESULTS.glob("alone-*.json")):
        record, first = read_bench(path), len(found)
        for part, (key, (claim, sign)) in product(("routers", "everything"), ALONE.items()):
            row = Row("figures 3, 8", f"the conflict loss alone trains {part}: {claim} (reproduced: {BEYOND})", "yes")
            found.append(alone_row(row, record, part, sign, partial(rise, key)))
        if len(record["rows"][0]["curve"][0]["layers"]) > 1:
            claim = "the conflict loss alone trains everything: consistency rises most in the last layer"
            claim += f" (reproduced: {BEYOND})"
            found.append(alone_row(Row("figure 3b", claim, "yes"), record, "everything", 1, rise_deeper))
            claim = "the conflict loss alone trains everything: conflicts remain in shallow layers"
            claim += f" (reproduced: the first layer keeps a larger share of its conflicts than the last, {BEYOND})"
            found.append(alone_row(Row("figure 9", claim, "yes"), record, "everything", 1, keep_shallow, "conflict_ratio"))
        found[first:] = [replace(row, picture=path.with_suffix(".png").name) for row in found[first:]]
    return found or [Row("figures 3, 8", "training on the conflict loss alone", "-")]


def rise(key: str, first: list[dict], last: list[dict]) -> float:
    """The mean rise of a statistic over the MoE layers."""
    return mean(after[key] - before[key] for before, after in zip(first, last))


def rise_deeper(first: list[dict], last: list[dict]) -> float:
    """By how much more the consistency of the last layer rises than that of the first."""
    return rise("consistency", first[-1:], last[-1:]) - rise("consistency", first[:1], last[:1])


def keep_shallow(first: list[dict], last: list[dict]) -> float:
    """The share of its conflicts that the first layer keeps, minus that of the last layer: how many of a layer's pairs are
    judged, which differs between layers, cancels."""
    kept = [after["conflict_ratio"] / before["conflict_ratio"] for before, after in zip(first, last)]
    return kept[0] - kept[-1]


BEYOND = "so by its interval, and by more than the placebo and flat"


def alone_row(row: Row, record: dict, part: str, sign: int, change: Callable, each: str = "") -> Row:
    """`sign`: of the change in the paper. `change`: of the MoE layers' statistics at the first and the last step. `each`: a
    value to show of each layer after the training. Where no routing changes the main loss, the experts still are equal
    copies, and a router has nothing to gain."""
    curves = {arm: curves_of(record, part, arm) for arm in ("ce", "placebo", "flat")}
    changes = {
        arm: {seed: change(curve[0]["layers"], curve[-1]["layers"]) for seed, curve in own.items()}
        for arm, own in curves.items()
    }
    own = changes["ce"]
    gaps = [gap_of(dict.fromkeys(own, 0.0), own), *(gap_of(changes[arm], own) for arm in ("placebo", "flat"))]
    if any(gap is None or gap.low is None for gap in gaps):
        return row
    verdict = judge_sign(gaps[0], sign, *gaps[1:])
    losses = {arm: [[curve[at]["main_loss"] for curve in of.values()] for at in (0, -1)] for arm, of in curves.items()}
    if part == "routers" and all(abs(a - b) < 1e-6 for both in losses.values() for a, b in zip(*both)):
        verdict = f"{NOT_TESTABLE}: the experts are equal copies"
    width = (gaps[0].high - gaps[0].low) / 2
    here = f"{say_gap(gaps[0], 3)}, half width {width:.3f}, {len(own)} seeds: other batches of one model"
    here += "".join(f"; minus {name} {say_gap(gap, 3)}" for name, gap in zip(("placebo", "flat"), gaps[1:]))
    if each:
        ends = zip(*([layer[each] for layer in curve[-1]["layers"]] for curve in curves["ce"].values()))
        here += f"; after it, layer by layer: {', '.join(spread([*values], 2) for values in ends)}"
    texts = [f"{arm} {' to '.join(spread(side, 2) for side in both)}" for arm, both in losses.items()]
    here += f"; main loss {', '.join(texts)}; {record['run']}, {record['model']}"
    return replace(row, here=here, verdict=verdict, command=record["command"])


def curves_of(record: dict, part: str, arm: str) -> dict[int, list[dict]]:
    """seed -> the curve of an arm of training on the conflict loss alone."""
    return {row["seed"]: row["curve"] for row in record["rows"] if (row["part"], row["arm"]) == (part, arm)}


# ---- 5. What the paper does not ask ----


def control_rows(settings: list[Setting]) -> list[Row]:
    """The positive control, dice instead of the router, over two seeds or more (those of one seed have a row below); and one
    pass, whose conflict loss reaches the router alone."""
    found = []
    for one, other, claim in (
        ("none", "random", "does routing matter? the baseline minus routing by dice"),
        ("ce-one", "ce", "does the loss cost through the features? one pass, which spares them, minus two passes"),
    ):
        row = Row("new", claim, "not asked")
        known = own_gaps(settings, one, other)
        here = [f"{tell(gap)}{s.last_epoch(one, other)}{same_commit(s, one, other)}" for s, gap in known]
        found += [replace(row, here=text, verdict="measured", setting=s) for text, (s, _) in zip(here, known)] or [row]
    return found


def dose_rows(settings: list[Setting]) -> list[Row]:
    """STGC at doses that leave the router half of its margin or more."""
    claim = "where the loss leaves the router half of its margin, STGC beats its placebo (reproduced: by its interval)"
    row, found = Row("new", claim, "not asked"), []
    for setting in settings:
        ratios, gap = [*margins_of(setting, "ce").values()], setting.gap("ce", "placebo")
        if ratios and mean(ratios) >= 0.5 and gap and gap.low is not None:
            more = f"{setting.last_epoch('ce', 'placebo')}; minus the baseline {say_gap(setting.gap('ce', 'none'))}"
            more += f"{setting.last_epoch('ce', 'none')}; margin {mean(ratios):.2f} of the baseline's ({len(ratios)} seeds)"
            found.append(score_sign_row(row, gap, 1, setting, more))
    return found or [row]


def margins_of(setting: Setting, variant: str) -> dict[int, float]:
    """seed -> the router's margin at the end of training, as a share of the baseline's of the same seed, if possible of the
    same commit."""
    ratios: dict[int, float] = {}
    for run in setting.measured(variant):
        bases = [one for one in setting.measured("none") if one["seed"] == run["seed"] and one.get("router_margin")]
        bases = [one for one in bases if one["commit"] == run["commit"]] or bases
        if bases and run.get("router_margin"):
            ratios.setdefault(run["seed"], run["router_margin"][1] / bases[0]["router_margin"][1])
    return ratios


def all_rows(settings: list[Setting], records: list[dict]) -> list[Row]:
    """All rows of the page, in its order."""
    found = [*glue_rows(settings), *gate_rows(settings), *pictures.lvlm_rows(settings)]
    for make in (pictures.sweep_rows, curve_rows, probe_rows, control_rows, pictures.usable_rows, dose_rows):
        found += make(settings)
    return [*found, *saved_rows(records), *alone_rows(), *bench_rows(), *NOT_MEASURED]
