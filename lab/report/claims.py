"""docs/claims.md, the paper claim by claim: what it says, what was measured here, and a verdict, from the records alone.

  python -m lab.report.claims                  writes docs/claims.md again from results/
  python -m lab.report.claims --quick          measures three claims anew, beside their records: a minute on two cores
  python -m lab.report.claims --check FOLDER   checks somebody's record of a run, and prints it as rows of the page

The rule of a verdict is lab.report.verdicts.judge.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, median

from lab.bench.regimes import find_hits
from lab.report import pictures, regimes
from lab.report.compare import COLUMNS, PUBLISHED, Paired
from lab.report.records import RESULTS, ends_of, key_of, merge, read_all
from lab.report.tables import fold, header, read_bench, spread
from lab.report.verdicts import (
    NOT_RUN,
    NOT_TESTABLE,
    Row,
    Setting,
    gain_rows,
    gap_of,
    is_above,
    join,
    say_gap,
    sign_row,
    verdict_of,
)
from lab.run.cli import Parser, UserError, path, run_main, say
from lab.run.options import label
from lab.run.runs import ROOT, read_record
from lab.text.tasks import TASKS

# ---- 1. Claims ----


def glue_rows(settings: list[Setting]) -> list[Row]:
    """Table 12: each of the paper's tasks."""
    before, after = PUBLISHED["MoE-8Top2 (re-run)"], PUBLISHED["+ STGC"]
    found = []
    for i, (name, title) in enumerate(COLUMNS.items()):
        own = [s for s in settings if s.record["name"] == name and not s.borrows]
        own = [s for s in own if s.record["data"]["train"] == TASKS[name].rows]
        found += gain_rows(Row("table 12", f"STGC gains on {title}", f"{after[i] - before[i]:+.1f}"), own)
    return found


def curve_rows(settings: list[Setting]) -> list[Row]:
    """Figures 4, 5, 6 and 9: from the curves of the settings with at least three seeds."""
    found, whole = [], [s for s in settings if len(pictures.gains(s)) > 2]
    for where, key, name in (("figure 4", "balance_loss", "balance"), ("figure 6", "conflict_loss", "conflict")):
        claim = f"the {name} loss falls in training (reproduced: its last tenth lies below its first in most runs)"
        row = Row(where, claim, "it falls")
        found += [falling_row(row, key, setting) for setting in whole] or [row]
    claim = "STGC evens the loads (reproduced: the busiest expert's share, first MoE layer, lies below the baseline's)"
    row = Row("figure 5", claim, "more even")
    for setting in whole:
        none, ce, placebo = (ends_by_seed(setting, variant, "load", 0) for variant in ("none", "ce", "placebo"))
        found.append(sign_row(row, gap_of(none, ce), -1, setting, " % of the pairs", gap_of(placebo, ce)))
    found += [] if whole else [row]
    claim = "conflicts remain in shallow layers (reproduced: the first MoE layer's ratio minus the last one's lies above 0)"
    row, rows = Row("figure 9", claim, "shallow"), []
    for setting in whole:
        if setting.record["config"]["moe_layers"].isdecimal():  # one MoE layer
            continue
        sides = {v: [ends_by_seed(setting, v, "conflict_ratio", layer) for layer in (0, -1)] for v in ("ce", "none")}
        texts = [f"{label(v)} {' and '.join(spread([*side.values()]) for side in both)}" for v, both in sides.items()]
        first, last = sides["ce"]
        rows.append(sign_row(row, gap_of(last, first), 1, setting, f" % of the pairs ({'; '.join(texts)})"))
    return found + (rows or [row])


def falling_row(row: Row, key: str, setting: Setting) -> Row:
    ends = {v: [pair for run in setting.runs(v) if (pair := ends_of(run, key))] for v in ("ce", "placebo")}
    if not ends["ce"]:
        return replace(row, setting=setting)
    texts = {v: " to ".join(spread([*side], 3) for side in zip(*own)) for v, own in ends.items() if own}
    fall, same = (bool(ends[v]) and mean(last < first for first, last in ends[v]) > 0.5 for v in ("ce", "placebo"))
    verdict = "the control does as well" if fall and same else verdict_of(fall)
    return replace(row, here="; ".join(f"{v} {text}" for v, text in texts.items()), verdict=verdict, setting=setting)


def ends_by_seed(setting: Setting, variant: str, key: str, layer: int) -> dict[int, float]:
    """seed -> a value of one layer at the end of the training, in %."""
    ends = {run["seed"]: ends_of(run, key, layer) for run in setting.runs(variant)}
    return {seed: 100 * found[1] for seed, found in ends.items() if found}


def probe_rows(settings: list[Setting]) -> list[Row]:
    """Figure 7, table 13 and section 6.1: from the probe of each film, at its last moment, setting by setting."""
    claim = "similarities by biases and by whole weights correlate (reproduced: above 0.9 in most layers)"
    correlate = Row("sec. 6.1", claim, "> 0.9")
    claim = "STGC raises the correlation of an expert's features and gradients (reproduced: ce minus baseline above 0)"
    rises = Row("table 13", claim, "0.265 to 0.356")
    claim = "STGC leaves fewer similarities below 0 than before training (reproduced: in most layers)"
    shift = Row("figure 7", claim, "a shift to the right")
    found: dict[str, list[Row]] = {row.where: [] for row in (correlate, rises, shift)}
    for setting in settings:
        runs = filmed(setting)
        values = probed(runs, "bias_weight")
        if values:
            here = f"{spread(values, 2)}, {len(values)} layer{'s' * (len(values) > 1)}"
            verdict = verdict_of(mean(value > 0.9 for value in values) > 0.5)
            found["sec. 6.1"].append(replace(correlate, here=here, verdict=verdict, setting=setting))
        sides = {}
        for name in ("none", "ce", "placebo"):
            own = [run for run in setting.measured(name) if run.get("probe")]
            sides[name] = {run["seed"]: values[0] for run in own if (values := probed([run], "feature_gradient"))}
        if gap := gap_of(sides["none"], sides["ce"]):
            more = "; ".join(f"{label(name)} {spread([*own.values()], 2)}" for name, own in sides.items() if own)
            row = sign_row(rises, gap, 1, setting, f": {more}", gap_of(sides["placebo"], sides["ce"]))
            found["table 13"].append(replace(row, here=more) if gap.low is None else row)
        shares = [share for run in runs if run["variant"] == "ce" for share in shares_below(run)]
        if shares:
            before, after = (spread([*side], 2) for side in zip(*shares))
            verdict = verdict_of(mean(last < first for first, last in shares) > 0.5)
            row = replace(shift, here=f"share below 0: {before} before, {after} after", verdict=verdict, setting=setting)
            found["figure 7"].append(row)
    return [row for first in (correlate, rises, shift) for row in found[first.where] or [first]]


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
    probes = [(record.get("folder", record["name"]), one) for record in records for one in record.get("probes", [])]
    new = Row("new", "other batches give the same flags (kappa: agreement beyond chance)", "not asked")
    about = Row("new", "what the flags are about: the share of their variance that is explained", "not asked")
    claim = "confusing tokens: logits on the own label, the other's, the rest (reproduced: the second nearer to the first)"
    confusing = Row("table 14", claim, "23.5, 14.6, -0.7")
    claim = "without the conflicting pairs a step lowers a fresh loss more than with all (reproduced: the loss lies below)"
    harm = Row("sec. 6.6", claim, "0.05 lower")
    found = [] if probes else [new, about, confusing, harm]
    for name, one in sorted(probes, key=lambda pair: (pair[0], -pair[1]["loss"])):
        where, command = f"{name}, {one['model']}, main loss {one['loss']:.2f}", one["command"]
        here = f"{one['kappa']:.2f} ± {one['error']:.2f}, {one['triples']} triples; {where}"
        found.append(replace(new, here=here, verdict="measured", command=command))
        if shares := one.get("about"):
            here = ", ".join(f"{name} {share:.2f} (chance {chance:.2f})" for name, (share, chance) in shares.items())
            found.append(replace(about, here=f"{here}; {where}", verdict="measured", command=command))
        if logits := one.get("confusing"):
            own, other, rest = (logits[key] for key in ("own", "other", "rest"))
            here = f"{own:.1f}, {other:.1f}, {rest:.1f}, {logits['pairs']:,.0f} pairs; {where}"
            verdict = verdict_of(own - other < other - rest)
            found.append(replace(confusing, here=here, verdict=verdict, command=command))
        if arms := one.get("harm"):
            (gap, error), (dice, _) = (arms["fresh"][arm]["minus_all"][1] for arm in ("no conflicting", "no random"))
            here = f"{gap:+.4f} ± {error:.4f} (standard error) at an update of {arms['sizes'][1]:g}; "
            here += f"without as many random pairs {dice:+.4f}; {where}"
            found.append(replace(harm, here=here, verdict=verdict_of(gap + 2 * error < 0), command=command))
    return found


def bench_rows() -> list[Row]:
    """Table 11, from the records of lab.bench: time, and the memory that the token gradients take."""
    time = Row("table 11", "time of a step with STGC (reproduced: not above the paper's)", "+21.3 %")
    claim = "gradients of the biases take little memory (reproduced: the peak rises by less than a tenth)"
    small = Row("table 11", claim, "0.29 GiB")
    claim = "gradients of whole weights do not fit in memory (reproduced: the peak more than doubles; here in one pass)"
    whole = Row("table 11", claim, "773 GiB, fails")
    found: dict[str, list[Row]] = {row.claim: [] for row in (time, small, whole)}
    for name in ("bench-bert-large.json", "bench-mixtral.json", "bench-olmoe.json"):
        record = read_bench(RESULTS / name)
        two, full = (record["variants"][key] for key in ("two passes", "one pass, weight gradients"))
        low, ratio, high = (100 * (value - 1) for value in (two["interval"][0], two["ratio"], two["interval"][1]))
        here = f"{ratio:+.1f} % [{low:+.1f}, {high:+.1f}], two passes, {name}"
        found[time.claim].append(replace(time, here=here, verdict=verdict_of(ratio <= 21.3), command=record["command"]))
        for row, own, holds in ((small, two, two["peak_ratio"] < 1.1), (whole, full, full["peak_ratio"] > 2)):
            here = f"peak {100 * (own['peak_ratio'] - 1):+.1f} %, {name}"
            found[row.claim].append(replace(row, here=here, verdict=verdict_of(holds), command=record["command"]))
    return [row for rows in found.values() for row in rows]


OUT_OF_REACH = [
    Row("table 2", "gains with StableLM, Phi-2, Vicuna, SigLIP", "+0.6 to +0.8", "-", f"{NOT_TESTABLE}: too large"),
]
ALONE = {  # of the conflict loss alone: what is measured -> the direction in the paper
    "conflict_ratio": ("the conflict ratio falls", -1),
    "consistency": ("consistency rises", 1),
    "consistency_std": ("its std over experts rises", 1),
}


def alone_rows() -> list[Row]:
    """Figures 3 and 8: the change from the first to the last step, of ce and minus the placebo's, over seeds."""
    found = []
    for record in map(read_bench, sorted(RESULTS.glob("alone-*.json"))):
        for part, (key, (claim, sign)) in product(("routers", "everything"), ALONE.items()):
            own = changes(record, part, "ce", lambda layers, key=key: mean(layer[key] for layer in layers))
            placebo = changes(record, part, "placebo", lambda layers, key=key: mean(layer[key] for layer in layers))
            row = Row("figures 3, 8", f"the conflict loss alone trains {part}: {claim}", "yes")
            flat = changes(record, part, "flat", lambda layers, key=key: mean(layer[key] for layer in layers))
            found.append(alone_row(row, record, own, placebo, sign, flat))
        deeper = [
            changes(record, "everything", arm, lambda layers: layers[-1]["consistency"] - layers[0]["consistency"])
            for arm in ("ce", "placebo")
        ]
        if any(deeper[0].values()):  # it has several MoE layers
            claim = "the conflict loss alone trains everything: consistency rises most in the last MoE layer"
            found.append(alone_row(Row("figure 3b", claim, "yes"), record, *deeper, 1))
    return found or [Row("figures 3, 8", "training on the conflict loss alone", "-")]


def changes(record: dict, part: str, arm: str, value: Callable) -> dict[int, float]:
    """seed -> the change of a value of the MoE layers from the first to the last step."""
    rows = [row for row in record["rows"] if (row["part"], row["arm"]) == (part, arm)]
    return {row["seed"]: value(row["curve"][-1]["layers"]) - value(row["curve"][0]["layers"]) for row in rows}


def alone_row(row: Row, record: dict, own: dict, placebo: dict, sign: int, flat: dict | None = None) -> Row:
    """Reproduced: the change has the paper's sign, and lies beyond the placebo's. Changes: by seed."""
    gaps = [gap_of(dict.fromkeys(own, 0.0), own), gap_of(placebo, own)]
    if any(gap is None or gap.low is None for gap in gaps):
        return row
    (low, high), (beyond, _) = (sorted((sign * gap.low, sign * gap.high)) for gap in gaps)
    verdict = "not reproduced" if high < 0 else "inconclusive" if low <= 0 else "the control does as well"
    verdict = "reproduced" if low > 0 and beyond > 0 else verdict
    here = f"{say_gap(gaps[0], 3)}; minus placebo {say_gap(gaps[1], 3)}; "
    here += f"minus flat {say_gap(gap_of(flat, own), 3)}; " if flat else ""
    here += f"{record['run']}, {record['model']}"
    return replace(row, here=here, verdict=verdict, command=record["command"])


def control_rows(settings: list[Setting]) -> list[Row]:
    """The positive control, dice instead of the router; and one pass, whose conflict loss reaches the router alone."""
    found = []
    for one, other, claim in (
        ("none", "random", "routing matters (measured: the baseline minus routing by dice)"),
        ("ce-one", "ce", "what the loss costs goes through the features (measured: one pass, which spares them, minus two)"),
    ):
        row = Row("new", claim, "not asked")
        gaps = [(setting, setting.gap(one, other)) for setting in settings if not setting.borrows]
        rows = [replace(row, here=say_gap(gap), verdict="measured", setting=setting) for setting, gap in gaps if gap]
        found += rows or [row]
    return found


def router_rows(settings: list[Setting]) -> list[Row]:
    """What the loss does to the router's margin."""
    row = Row("new", "the loss leaves the router its preferences (its margin at the end, of the baseline's)", "not asked")
    found = []
    for setting in settings:
        ratios = {name: ratio for name in ("ce", "placebo", "flat") if (ratio := margin_of(setting, name)) is not None}
        if "ce" in ratios:
            here = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            found.append(replace(row, here=here, verdict="measured", setting=setting))
    return found or [row]


def margin_of(setting: Setting, variant: str) -> float | None:
    """The router's margin at the end of training, as a share of the baseline's of the same seed, if possible of the same
    commit: mean over seeds."""
    ratios = {}
    for run in setting.measured(variant):
        bases = [one for one in setting.measured("none") if one["seed"] == run["seed"] and one.get("router_margin")]
        bases = [one for one in bases if one["commit"] == run["commit"]] or bases
        if bases and run.get("router_margin"):
            ratios.setdefault(run["seed"], run["router_margin"][1] / bases[0]["router_margin"][1])
    return mean(ratios.values()) if ratios else None


def all_rows(settings: list[Setting], records: list[dict]) -> list[Row]:
    makers = (glue_rows, pictures.lvlm_rows, pictures.sweep_rows, curve_rows, probe_rows)
    makers += (control_rows, pictures.usable_rows, router_rows)
    rows = [row for make in makers for row in make(settings)]
    return [*rows, *saved_rows(records), *alone_rows(), *bench_rows(), *OUT_OF_REACH]


# ---- 2. The page ----

HEAD = """# The paper, claim by claim

`python -m lab.report.claims` writes this page from the records in `results/`. All models here are small, a few thousand to
31 million parameters, each on one kind of data. Nothing here says what happens at 1.6 billion. In the commands `models/` and
`data/` are local copies of the hub's `sentence-transformers/all-MiniLM-L6-v2` and `nyu-mll/glue`; a folder in `runs/` is
what another command of the same setting made.
"""
LOSS = """The conflict loss lowers a token's score on the expert where it conflicts. It never says where the token shall go,
and it does not rest when a token has moved: a flag depends on the mean gradient of the batch, up to half of the pairs are
flagged in any batch, and another batch flags other ones. So a token meets the loss on every expert in turn, and what remains
is a router whose scores are nearly equal. Its *margin* (the probability of the last chosen expert minus that of the first
one not chosen) shrinks as beta grows, and tokens keep changing experts: *moved* is the share of a batch's tokens whose first
expert differs a twentieth of the training later.

That restless routing is a regulariser, as routing by dice is: it may help where a model overfits few noisy data, and it
costs where experts have learnt different things. The placebo, the same loss on as many pairs drawn by dice, does the same to
the router; so does the loss on all pairs (flat). What is STGC's own is therefore the difference to these two, not to the
baseline. In small synthetic settings (`results/regimes.json`), medians:"""
RULE = """A score is compared by paired 95 % t-intervals over the seeds. The first rule that fits gives the verdict:

| verdict | where |
| --- | --- |
| not run | there is no interval |
| routing does not matter here | baseline minus dice holds 0 or lies below: no score can judge a routing |
| inconclusive | the gain over the baseline holds 0 and the paper's gain |
| not reproduced | the gain ends below the paper's, and begins at or below 0 |
| smaller than the paper's | the gain lies above 0 and below the paper's |
| reproduced | the gain lies above 0 and reaches the paper's; the differences from placebo and flat lie above 0 |
| the control does as well | gain and placebo lie above the baseline, and their difference holds 0 |
| a gain, the selection undecided | the rest |
| not testable here | too large a model; or of four settings or more none ends 3 points above its start and above dice |

Best epochs are chosen on dev, as in the paper's source; the last epoch stands beside them. A claim without a gain names its
predicate. Where a repeated run differs by some points, no difference of one seed means anything."""


def usable(records: list[dict]) -> list[Setting]:
    """The settings that compare something with the baseline, real data first. One that was run without a baseline has that
    of another beta or tau, which train it no differently, and so have dice."""
    found = [Setting(record) for record in merge(records)]
    free = {"beta": None, "tau": None}
    keys = [key_of(setting.record | {"config": setting.record["config"] | free}) for setting in found]
    bases = {key: setting for key, setting in zip(keys, found) if "none" in setting.variants}
    for key, setting in zip(keys, found):
        if "none" not in setting.variants and key in bases:
            commits, lent = {run["commit"] for run in setting.record["runs"]}, {}
            pool = [run for run in bases[key].measured() if run["variant"] in ("none", "random")]
            for run in sorted(pool, key=lambda run: run["commit"] in commits):  # of the same commit, if there is one
                lent[run["variant"], run["seed"], run["lr"]] = run | {"lent": True}
            setting.record["runs"] = [*lent.values(), *setting.record["runs"]]
    found = [s for s in found if "none" in s.variants and len(s.variants) > 1]
    return sorted(found, key=lambda s: (s.record["name"].startswith("toy"), s.record["name"]))


@dataclass
class Search:
    """What the search over small synthetic settings found (lab.bench.regimes)."""

    settings: int
    matters: int  # where the learned router beats dice
    hits: dict[float, int]  # beta -> settings where ce beats both the baseline and the placebo, last step or best checkpoint
    change: dict[float, float]  # beta -> median change of accuracy by ce where routing matters, in points
    margin: dict[float, float]  # beta -> median of the router's margin, of the baseline's
    one: dict[str, tuple[int, int]]  # ce-one at the largest beta, against another: settings where it is better, and worse


def read_search() -> Search:
    """Without the settings where levelling the router also shrinks the layer's output: one expert whose weight is not 1."""
    runs = regimes.runs_of(record := regimes.read_record(RESULTS / "regimes.json"))
    shrinks = {name for name, own in record["settings"].items() if own["top_k"] == 1 and not own.get("normalize")}
    names = [name for name in regimes.settings_of(record, runs) if name not in shrinks]
    matters = [name for name in names if regimes.gap(runs, name, ("random", None)).verdict == "worse"]
    found = Search(len(names), len(matters), {}, {}, {}, {})
    seeds = sorted({run[3] for run in record["runs"] if run[3] < regimes.FIRST_FRESH})
    hits = find_hits([run for run in record["runs"] if run[0] in names], names, seeds)
    for beta in regimes.BETAS:
        own = ("ce", beta)
        found.hits[beta] = sum(at == beta for _, at in hits)
        found.change[beta] = median(regimes.gap(runs, name, own).mean for name in matters)
        found.margin[beta] = regimes.median_margin(runs, names, own)
    most = max(regimes.BETAS)
    for other in ("ce", "placebo-one"):
        sides = ("ce-one", most), (other, most)
        verdicts = [regimes.gap(runs, n, *sides).verdict for n in names if all((n, *side) in runs for side in sides)]
        found.one[other] = verdicts.count("better"), verdicts.count("worse")
    return found


def sentences(settings: list[Setting], records: list[dict], search: Search) -> Iterator[str]:
    """Five sentences that a busy reader can quote."""

    def known(one: str, other: str) -> list[tuple[Setting, Paired]]:
        gaps = [(setting, setting.gap(one, other)) for setting in settings if not setting.borrows]
        return [(setting, gap) for setting, gap in gaps if gap and gap.low is not None]

    seeds = max(gap.seeds for _, gap in known("ce", "none"))
    own = [(setting, gap) for setting, gap in known("ce", "none") if gap.seeds == seeds]
    texts = [f"{setting.record['name']} {say_gap(gap)}" for setting, gap in own]
    none = all(gap.low <= 0 <= gap.high for _, gap in own)
    more = "; all contain 0, so no difference is shown" if none else ""
    yield f"STGC minus its baseline, {seeds} paired seeds, in points: {', '.join(texts)}{more}."
    gaps, hits = [gap for _, gap in known("ce", "placebo")], max(search.hits.values())
    above = sum(gap.low > 0 for gap in gaps)
    text = f"It beats the placebo, the same loss on as many pairs drawn by dice, in {above} of {len(gaps)} trained settings"
    text += f", and placebo and baseline at any one beta in at most {hits} of {search.settings} synthetic ones"
    yield text + (": that its choice of pairs helps is not shown." if not above and not hits else ".")
    gaps = [gap for _, gap in known("none", "random")]
    text = f"The learned router beats experts drawn by dice in {sum(gap.low > 0 for gap in gaps)} of {len(gaps)} trained"
    yield f"{text} settings and in {search.matters} of {search.settings} synthetic ones; no score can judge it elsewhere."
    texts = []
    for name, own in probes_of(records).items():
        points = [f"{one['kappa']:.2f} at {one['loss']:.2f}" for one in sorted(own, key=loss_of, reverse=True)]
        texts.append(f"{name} {', '.join(points)}")
    yield f"Agreement of the flags by other batches beyond chance (kappa), at a main loss: {'; '.join(texts)}."
    strong, weak = max(search.margin), min(search.margin)
    text = f"The loss levels the router: at beta {strong:g} its margin is {search.margin[strong]:.2f} of the baseline's, "
    text += f"at {weak:g} {search.margin[weak]:.2f}; where routing matters, accuracy moves by {search.change[strong]:+.1f} "
    yield f"{text}and {search.change[weak]:+.1f} points (medians of the synthetic settings)."


def loss_of(probe: dict) -> float:
    return probe["loss"]


def probes_of(records: list[dict]) -> dict[str, list[dict]]:
    """The data's name, and how its experts began -> the probes of saved models that learn it."""
    found: dict[str, list[dict]] = {}
    for record in records:
        parts = " (parts)" if record["config"].get("experts") == "split" else ""
        for one in record.get("probes", []):
            found.setdefault(record["name"].partition("-")[0] + parts, []).append(one)
    return found


def router_table(settings: list[Setting], tags: dict[int, str]) -> Iterator[str]:
    """Markdown: the router's margin at the end of training, as a share of the baseline's, and the share of moved tokens."""
    yield from header("setting", "variant", "margin / the baseline's", "moved")
    for setting in settings:
        ratios = {name: margin_of(setting, name) for name in setting.variants if name != "random"}
        for name, ratio in ratios.items():
            if ratio is not None and any(ratios[other] is not None for other in ratios if other != "none"):
                probes = [run["probe"][-1] for run in setting.measured(name) if run.get("probe")]
                moved = [layer["moved"] for probe in probes for layer in probe["layers"] if layer["moved"] is not None]
                cells = [tags[id(setting)], label(name), f"{ratio:.2f}", spread(moved, 2) if moved else "-"]
                yield f"| {' | '.join(cells)} |"


def render(records: list[dict]) -> str:
    """docs/claims.md."""
    settings, search = usable(records), read_search()
    tags = {id(setting): f"S{number}" for number, setting in enumerate(settings, 1)}
    rows = all_rows(settings, records)
    told = [f"{number}. {text}" for number, text in enumerate(sentences(settings, records, search), 1)]
    lines = [HEAD, *told, "", "## What the loss does to the router", "", LOSS, ""]
    lines += [*header("beta", "margin / the baseline's", "points where routing matters", "beats baseline and placebo")]
    for beta in search.margin:
        cells = [f"{beta:g}", f"{search.margin[beta]:.2f}", f"{search.change[beta]:+.1f}"]
        lines.append(f"| {' | '.join([*cells, f'{search.hits[beta]} of {search.settings}'])} |")
    text = "With both losses held to the router, as in one pass, accuracy at beta {:g} is better than with two passes in "
    text += "{} of {} settings and worse in {}; than with its own placebo it is better in {} and worse in {}."
    (better, worse), (above, below) = search.one["ce"], search.one["placebo-one"]
    lines += ["", text.format(max(search.margin), better, search.settings, worse, above, below)]
    lines += ["", "![accuracy over the router's margin, in small synthetic settings](../results/regimes.png)", ""]
    lines += ["In the trained settings (S1, ...: see the end):", "", *router_table(settings, tags), ""]
    table = [*header("in the paper", "claim", "paper", "here", "verdict", "settings or command"), *join(rows, tags)]
    missing = [sum(row.verdict.startswith(what) for row in rows) for what in (NOT_RUN, NOT_TESTABLE)]
    title = f"{len(rows) - sum(missing)} measured, {missing[0]} not run, {missing[1]} not testable"
    lines += [f"## The claims, setting by setting: {title}", "", RULE, "", *table, ""]
    lines += ["![kappa of the flags by other batches, over the main loss](../results/probe.png)", "", "## The settings", ""]
    at = len(lines)
    for setting in settings:
        tag = tags[id(setting)]
        parts = setting.table(), setting.training(), setting.notes(), (f"    {one}" for one in setting.record["command"])
        lines += [f'<a id="{tag.lower()}"></a>', ""]
        lines += fold(f"{tag}: {setting.title}", [line for part in parts for line in (*part, "")][:-1])
    count = sum(len(setting.intervals) for setting in settings)  # now that all tables have asked for theirs
    text = f"{count} intervals of scores were computed, besides those of figures and of the search; of twenty, one misses by"
    lines[at:at] = [f"{text} chance. No correction is made.", ""]
    return "\n".join(lines).rstrip() + "\n"


def front(records: list[dict]) -> Iterator[str]:
    """Markdown: the six rows of README, (claim, paper, here, verdict), each from the row that says most."""
    settings, search = usable(records), read_search()
    rows = all_rows(settings, records)

    def most(claim: str) -> Row:
        """Of the setting with the most seeds, of those that can judge a routing if there is one."""
        own = [row for row in rows if row.claim.startswith(claim)]
        able = [row for row in own if row.setting and is_above(row.setting.gap("none", "random"))]
        return max(able or own, key=lambda row: len(row.setting.scores("ce")) if row.setting else 0)

    found = []
    for claim in ("STGC gains on CoLA", "STGC gains with Top-2"):
        row = most(claim)
        gap, control = row.setting.gap("ce", "none"), row.setting.gap("ce", "placebo")
        record, config = row.setting.record, row.setting.record["config"]
        where = f"{record['name']}, {config['num_experts']}Top{config['top_k']}"
        here = f"{say_gap(gap)} points, {gap.seeds} seeds ({where}); minus placebo {say_gap(control)}"
        found.append(replace(row, claim=f"{claim} ({row.where})", paper=f"{row.paper} points", here=here))
    row = most("other batches give the same flags")
    pairs = [(max(own, key=loss_of), min(own, key=loss_of)) for own in probes_of(records).values()]
    here = "; ".join(f"kappa {young['kappa']:.2f}, once trained {old['kappa']:.2f}" for young, old in pairs)
    here += f" ({', '.join(probes_of(records))})"
    found.append(replace(row, claim="a flag tells about the token: other batches flag it, too", here=here))
    row = most("similarities by biases")
    own = [one for one in rows if one.claim == row.claim and one.setting]
    parts: dict[str, list[float]] = {}
    for one in own:
        parts.setdefault(one.setting.record["name"], []).extend(probed(filmed(one.setting), "bias_weight"))
    here = "; ".join(f"{name} {min(values):.2f} to {max(values):.2f}" for name, values in parts.items())
    verdict = " / ".join(dict.fromkeys(one.verdict for one in own)) or row.verdict
    found.append(replace(row, claim=f"biases tell what whole weights tell ({row.where})", here=here, verdict=verdict))
    row = most("without the conflicting pairs")
    here = "loss " + "; ".join(one.here.partition(" (")[0] for one in rows if one.claim == row.claim)
    found.append(replace(row, claim=f"without conflicting pairs a step lowers a fresh loss more ({row.where})", here=here))
    row = most("the loss leaves the router its preferences")
    here = ", ".join(f"{ratio:.2f} of it at beta {beta:g}" for beta, ratio in search.margin.items())
    cost = ", ".join(f"{change:+.1f}" for change in search.change.values())
    here += f"; points, where routing matters: {cost}"
    found.append(replace(row, claim="what the loss does to the router's margin", here=here))
    for row in found:
        yield f"| {row.claim} | {row.paper} | {row.here} | {row.verdict} |"


# ---- 3. Others' records ----

NEEDED = ("command", "commit", "versions", "data", "made_from")


def check(folder: Path) -> list[str]:
    """The rows of somebody's record. UserError if it is not complete, not paired, or not of a clean checkout."""
    record = read_record(folder, "--check")
    if record is None:
        raise UserError(f"--check {folder}: no results.json is there; give the --output-dir of a run")
    if missing := [name for name in NEEDED if not record.get(name)]:
        raise UserError(f"--check {folder}: its record has no {', '.join(missing)}; train with a newer version")
    if record.get("dirty") is not False:
        raise UserError(f"--check {folder}: it was made by changed files (dirty); commit them, and train again")
    (setting,) = [Setting(one) for one in merge([record])]
    config = record["config"]
    wanted, seeds = {variant: {*config.get("seeds", [])} for variant in config.get("variants") or []}, {}
    for variant in {*wanted, *setting.variants}:
        seeds[variant] = {run["seed"] for run in setting.runs(variant)}
        if lacking := wanted.get(variant, set()) - seeds[variant]:
            what = f"{variant}, seed{'s' * (len(lacking) > 1)} {', '.join(map(str, sorted(lacking)))}"
            raise UserError(f"--check {folder}: it is not finished, {what} is missing; finish it with --resume")
    if "none" not in seeds or len(seeds) < 2:
        raise UserError(f"--check {folder}: it compares nothing with the baseline; train with --variants none,ce,placebo")
    for variant, own in seeds.items():
        if own != seeds["none"]:
            other = ", ".join(map(str, sorted(own ^ seeds["none"])))
            raise UserError(f"--check {folder}: {variant} and none differ in seeds {other}; finish the run with --resume")
    rows = [*glue_rows([setting]), *pictures.lvlm_rows([setting])]
    found = [row for row in rows if row.verdict != NOT_RUN]
    texts = [f"{row.where}, {row.claim}: {row.here} (paper {row.paper}): {row.verdict}" for row in found]
    return [setting.title, "", *(texts or ["no claim of the paper is about this setting: its settings table would show it"])]


def main() -> None:
    parser = Parser(prog="lab.report.claims", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="measure three claims anew")
    parser.add_argument("--check", type=path("folder"), metavar="FOLDER", help="the --output-dir of somebody's run")
    args = parser.parse_args()
    if args.quick and args.check:
        parser.error("--quick measures and --check reads a record: choose one")
    if args.check:
        return say(*check(Path(args.check)))
    if args.quick:
        from lab.report.quick import measure_all

        for line in measure_all():
            say(line)
        return
    target = ROOT / "docs" / "claims.md"
    before = target.read_text() if target.is_file() else ""
    target.write_text(render(read_all()))
    say(f"{'unchanged' if target.read_text() == before else 'written'}: {target}")


if __name__ == "__main__":
    run_main("lab.report.claims", main, resumes=False)
