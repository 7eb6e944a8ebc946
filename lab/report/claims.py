"""docs/claims.md, the paper claim by claim: what it says, what was measured here, and a verdict, from the records alone.

  python -m lab.report.claims                  writes docs/claims.md again from results/
  python -m lab.report.claims --quick          measures three claims anew, beside their records: a minute on two cores
  python -m lab.report.claims --check FOLDER   checks somebody's record of a run, and prints it as rows of the page

A verdict on a score follows from paired 95 % t-intervals over the seeds: a = variant - its baseline, b = variant - its
controls (the placebo and flat, where they were run), c = placebo - baseline, and the paper's gain g. `judge` has the rule.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import mean, median

from lab.report import regimes
from lab.report.compare import COLUMNS, PUBLISHED, Paired, paired
from lab.report.readme import fold, read_bench, spread
from lab.report.records import RESULTS, merge, read_all
from lab.run.cli import Parser, UserError, path, run_main, say
from lab.run.runs import ROOT, read_record
from lab.text.tasks import TASKS

# ---- 1. Verdicts ----

NOT_RUN = "not run"
NO_ROUTING = "routing does not matter here"


def judge(a: Paired | None, b: list[Paired], c: Paired | None, gain: float, routing: Paired | None = None) -> str:
    """The verdict on a gain, in points. `routing`: baseline - random, the positive control: where it holds 0 or lies below,
    no routing can show anything. The first rule that fits decides."""
    if a is None or a.low is None:
        return f"{NOT_RUN}: one seed" if a else NOT_RUN
    if routing and routing.low is not None and routing.low <= 0:
        return NO_ROUTING
    if a.low <= 0 <= a.high and a.low <= gain <= a.high:
        return "inconclusive"
    if a.high < gain and a.low <= 0:
        return "not reproduced"
    if a.low > 0 and a.high < gain:
        return "smaller than the paper's"
    if a.low > 0 and a.high >= gain and b and all(one.low is not None and one.low > 0 for one in b):
        return "reproduced"
    if a.low > 0 and c and c.low is not None and c.low > 0 and any(one.low is None or one.low <= 0 <= one.high for one in b):
        return "the control does as well"
    return "a gain, the selection undecided" if a.low > 0 else "inconclusive"


def say_gap(gap: Paired | None, digits: int = 1) -> str:
    """Mean and interval, such as points."""
    if gap is None:
        return "-"
    show = lambda value: f"{value:+.{digits}f}"  # noqa: E731
    return show(gap.mean) + (f" [{show(gap.low)}, {show(gap.high)}]" if gap.low is not None else " (one seed)")


# ---- 2. Settings ----


@dataclass
class Setting:
    """One experiment: a merged record, and how many intervals were computed from it."""

    record: dict
    intervals: set = field(default_factory=set)

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(run["variant"] for run in self.record["runs"]))

    @property
    def title(self) -> str:
        config, name = self.record["config"], self.record["name"]
        parts = [name, Path(config["model"]).name] if "model" in config and not config.get("toy") else [name]
        parts += [f"{config['num_experts']}Top{config['top_k']}, {config['router']} router, beta {config['beta']:g}"]
        return ", ".join(parts)

    def runs(self, variant: str) -> list[dict]:
        """Of the lowest learning rate, if there are several."""
        found = [run for run in self.record["runs"] if run["variant"] == variant]
        rates = sorted({run["lr"] for run in found})
        return [run for run in found if run["lr"] == rates[0]] if rates else []

    def measured(self, variant: str | None = None) -> list[dict]:
        """All runs, also those that were repeated: for what older runs did not record."""
        found = [*self.record["runs"], *(again for _, again in self.record["repeated"])]
        return [run for run in found if variant in (None, run["variant"])]

    def scores(self, variant: str, select: str = "best", key: str = "score", scale: float = 100) -> dict[int, float]:
        """seed -> score in %. Records without a best epoch have the last."""
        found = {run["seed"]: run.get(select) or run["last"] for run in self.runs(variant)}
        return {seed: scale * own[key] for seed, own in found.items() if key in own}

    def gap(self, one: str, other: str, select: str = "best") -> Paired | None:
        """one - other, in points; None if they share no seed."""
        sides = self.scores(other, select), self.scores(one, select)
        if not sides[0].keys() & sides[1].keys():
            return None
        found = paired(*sides)
        self.intervals |= {(*sorted((one, other)), select)} if found.low is not None else set()
        return found

    def verdict(self, gain: float, one: str = "ce", other: str = "none", select: str = "best") -> str:
        placebo = "placebo" if one == "ce" else f"placebo-{one}"
        controls = [self.gap(one, name, select) for name in (placebo, one.replace("ce", "flat"))]
        against = self.gap("none", "random", select)
        return judge(
            self.gap(one, other, select), [b for b in controls if b], self.gap(placebo, other, select), gain, against
        )

    def table(self) -> Iterator[str]:
        """Markdown: every variant's scores, what its training reached, and its paired differences."""
        heads = ["variant", "seeds", "best", "last", "dev loss", "training loss", "margin at the end"]
        yield from header(*heads, *(f"minus {name}" for name in ("none", "placebo", "random")))
        for name in self.variants:
            cells = [label(name), str(len(self.runs(name)))]
            cells += [spread([*self.scores(name, select).values()]) for select in ("best", "last")]
            cells.append(spread([*found.values()], 3) if (found := self.scores(name, "last", "dev_loss", 1)) else "-")
            for key in ("loss", "router_margin"):
                ends = [run[key][1] for run in self.measured(name) if run.get(key)]
                ends = [] if (name, key) == ("random", "router_margin") else ends
                cells.append(spread(ends, 3 if key == "loss" else 4) if ends else "-")
            cells += [say_gap(self.gap(name, other) if name != other else None) for other in ("none", "placebo", "random")]
            yield f"| {' | '.join(cells)} |"

    def notes(self) -> Iterator[str]:
        for first, again in self.record["repeated"]:
            gap = 100 * (again["last"]["score"] - first["last"]["score"])
            names = f"{first['variant']}, seed {first['seed']}"
            yield f"{names}, was run at {str(first['commit'])[:7]} and at {str(again['commit'])[:7]}: {gap:+.1f} points."
        commits = sorted({str(run["commit"])[:7] for run in self.record["runs"]})
        yield f"Commits: {', '.join(commits)}."


def header(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]


def label(variant: str) -> str:
    return "none (baseline)" if variant == "none" else variant


# ---- 3. Claims ----


@dataclass
class Row:
    """A row of the page."""

    where: str  # in the paper
    claim: str
    paper: str
    here: str = "-"
    verdict: str = NOT_RUN
    command: str = ""

    def cells(self) -> str:
        command = f"`{self.command}`" if self.command else "-"
        return f"| {self.where} | {self.claim} | {self.paper} | {self.here} | {self.verdict} | {command} |"


def gain_row(where: str, claim: str, gain: float, settings: list[Setting], one="ce", other="none") -> Iterator[Row]:
    """A row per setting that compares these two variants; one row that says "not run" if there is none."""
    found = [setting for setting in settings if {one, other} <= {*setting.variants}]
    if not found:
        yield Row(where, claim, f"{gain:+.1f}")
    for setting in found:
        gap, last = setting.gap(one, other), setting.gap(one, other, "last")
        half = f", half width {(gap.high - gap.low) / 2:.1f}" if gap and gap.low is not None else ""
        here = f"{say_gap(gap)}{half}, {gap.seeds} seeds; last epoch {say_gap(last)}" if gap else "-"
        controls = [(name, setting.gap(one, name)) for name in ("placebo", "flat", "random") if name in setting.variants]
        here += "".join(f"; minus {name} {say_gap(control)}" for name, control in controls)
        verdict, last_verdict = (setting.verdict(gain, one, other, select) for select in ("best", "last"))
        verdict += "" if last_verdict == verdict else f" (last epoch: {last_verdict})"
        yield Row(where, f"{claim}: {setting.title}", f"{gain:+.1f}", here, verdict, setting.record["command"][0])


def stat_row(where: str, claim: str, paper: str, values: list, holds: Callable, digits: int, command: str) -> Row:
    """A claim without a gain. `values`: one per run; `holds` is the predicate on them, which the row's claim names."""
    if not values:
        return Row(where, claim, paper)
    return Row(where, claim, paper, f"{spread(values, digits)}, {len(values)} runs", verdict_of(holds(values)), command)


def verdict_of(holds: bool) -> str:
    return "reproduced" if holds else "not reproduced"


def glue_rows(settings: list[Setting]) -> Iterator[Row]:
    """Table 12: each of the paper's tasks."""
    before, after = PUBLISHED["MoE-8Top2 (re-run)"], PUBLISHED["+ STGC"]
    for i, name in enumerate(COLUMNS):
        own = [s for s in settings if s.record["name"] == name and s.record["data"]["train"] == TASKS[name].rows]
        yield from gain_row("table 12", "STGC gains on GLUE", round(after[i] - before[i], 1), own)


def pictures_of(settings: list[Setting], **config) -> list[Setting]:
    """The settings of toy_lvlm.py with these options."""
    found = [s for s in settings if s.record["stages"] or s.record["name"].startswith("lvlm")]
    return [s for s in found if all(s.record["config"].get(key) == value for key, value in config.items())]


def lvlm_rows(settings: list[Setting]) -> Iterator[Row]:
    """Tables 2, 4, 9 and 10: scores of the toy LVLM."""
    yield from gain_row("table 2", "STGC gains with 4Top2", 0.7, pictures_of(settings, top_k=2, num_experts=4))
    yield from gain_row("table 2", "STGC gains with 4Top1", 1.1, pictures_of(settings, top_k=1, num_experts=4))
    for name, gain in (("embedding", -0.4), ("feature", -0.1), ("task", -8.4)):
        gaps = [(s, gap) for s in pictures_of(settings) if (gap := s.gap(name, "none"))]
        row = Row("table 4", f"routing by sample ({name}) is worse (its interval lies below 0)", f"{gain:+.1f}")
        yield from [] if gaps else [row]
        for s, gap in gaps:
            verdict = verdict_of(gap.high is not None and gap.high < 0)
            yield replace(row, here=say_gap(gap), verdict=verdict, command=s.record["command"][0])
    yield from gain_row("table 9", "CE gains more than MSE", 0.3, pictures_of(settings), "ce", "mse")
    for bpr, gain in ((False, 10.9), (True, 7.0)):
        claim = f"at capacity 0.5{', batch prioritized' * bpr}, STGC loses less"
        yield capacity_row(claim, gain, bpr, pictures_of(settings))


def capacity_row(claim: str, gain: float, bpr: bool, settings: list[Setting]) -> Row:
    for setting in settings:
        sides = []
        for variant in ("none", "ce"):
            limited = [(run["seed"], own) for run in setting.runs(variant) for own in run.get("limited") or []]
            limited = [(seed, own) for seed, own in limited if (own["capacity"], own["bpr"]) == (0.5, bpr)]
            sides.append({seed: 100 * own["scores"]["score"] for seed, own in limited})
        if sides[0].keys() & sides[1].keys():
            gap, command = paired(*sides), setting.record["command"][0]
            return Row("table 10", claim, f"{gain:+.1f}", say_gap(gap), judge(gap, [], None, gain), command)
    return Row("table 10", claim, f"{gain:+.1f}")


def sweep_rows(settings: list[Setting]) -> Iterator[Row]:
    """Tables 3, 5 and 8: one option varies, all others are equal."""
    for where, option, values, claim in (
        ("table 5", "beta", (0.01, 0.1, 0.5, 1.0, 2.0), "beta 1 is the best"),
        ("table 5", "tau", (-0.1, 0.0, 0.1), "tau 0 is the best"),
        ("table 8", "alpha", (0.0, 0.01, 0.1), "alpha 0.1 instead of 0.01, without STGC, changes little (-0.1)"),
        ("table 3", "scenes", (3000, 12000), "more data, a larger gain (1.1 against 0.7)"),
    ):
        found = [s for s in pictures_of(settings) if "ce" in s.variants]
        own = {value: [s for s in found if s.record["config"].get(option) == value] for value in values}
        yield Row(where, claim, "-", "-", NOT_RUN if not all(own.values()) else "see the settings below")


def probe_rows(settings: list[Setting]) -> Iterator[Row]:
    """Figures 7 and 9, table 13 and section 6.1: from the probe of each film, at its last moment."""
    runs = [run for setting in settings for run in setting.measured() if run.get("probe")]
    command = runs[0]["command"] if runs else ""

    def ends(key: str, variant: str | None = None) -> list[float]:
        chosen = [run for run in runs if variant in (None, run["variant"])]
        layers = [layer for run in chosen for layer in run["probe"][-1]["layers"]]
        return [layer[key] for layer in layers if layer.get(key) is not None]

    claim = "similarities by biases and by whole weights correlate (reproduced: above 0.9 in most layers)"
    yield stat_row("sec. 6.1", claim, "> 0.9", ends("bias_weight"), lambda v: mean(x > 0.9 for x in v) > 0.5, 2, command)
    for variant, paper in (("none", "0.265"), ("ce", "0.356")):
        claim = f"cosines of an expert's features and gradients correlate, {label(variant)} (reproduced: above 0)"
        yield stat_row("table 13", claim, paper, ends("feature_gradient", variant), lambda v: mean(v) > 0, 2, command)
    shares = []
    for run in runs:
        for first, last in zip(*(run["probe"][which]["layers"] for which in (0, -1))):
            shares.append([sum(own["histogram"][:10]) / max(1, sum(own["histogram"])) for own in (first, last)])
    claim = "fewer similarities below 0 after training than before (reproduced: in most layers)"
    row = Row("figure 7", claim, "a shift to the right")
    if shares:
        before, after = (spread([*side], 2) for side in zip(*shares))
        verdict = verdict_of(mean(b < a for a, b in shares) > 0.5)
        row = replace(row, here=f"share below 0: {before} before, {after} after", verdict=verdict, command=command)
    yield row


def saved_rows(records: list[dict]) -> Iterator[Row]:
    """Table 14 and section 6.6, and how reliable the flags are: from lab.report.probe on saved models."""
    probes = [(record["name"], one) for record in records for one in record.get("probes", [])]
    new = Row("new", "other batches give the same flags (kappa: agreement beyond chance)", "not asked")
    confusing = Row(
        "table 14", "confusing tokens: the other's label is high (nearer to the own label's)", "23.5, 14.6, -0.7"
    )
    harm = Row("sec. 6.6", "a step without the conflicting pairs lowers a fresh loss more than with all", "0.25 to 0.20")
    yield from [] if probes else [new, confusing, harm]
    for name, one in sorted(probes, key=lambda pair: (pair[0], -pair[1]["loss"])):
        where, command = f"{name}, {one['model']}, main loss {one['loss']:.2f}", one["command"]
        here = f"{one['kappa']:.2f} ± {one['error']:.2f}, {one['triples']} triples; {where}"
        yield replace(new, here=here, verdict="measured", command=command)
        if found := one.get("confusing"):
            own, other, rest = (found[key] for key in ("own", "other", "rest"))
            here, verdict = f"{own:.1f}, {other:.1f}, {rest:.1f}; {where}", verdict_of(own - other < other - rest)
            yield replace(confusing, here=here, verdict=verdict, command=command)
        if found := one.get("harm"):
            gap, error = found["fresh"]["no conflicting"]["minus_all"][1]
            here = f"{gap:+.4f} ± {error:.4f} at an update of {found['sizes'][1]:g}; {where}"
            yield replace(harm, here=here, verdict=verdict_of(gap + 2 * error < 0), command=command)


def bench_rows() -> Iterator[Row]:
    """Table 11, from the records of lab.bench."""
    for name in ("bench-bert-large.json", "bench-mixtral.json", "bench-olmoe.json"):
        record = read_bench(RESULTS / name)
        rows = {key: row for key, row in record["variants"].items() if row and "two passes" in key and "weight" not in key}
        for key, row in list(rows.items())[:1]:
            low, high = row["interval"]
            here = f"{100 * (row['ratio'] - 1):+.1f} % [{100 * (low - 1):+.1f}, {100 * (high - 1):+.1f}], {key}, {name}"
            claim = "time of a step with STGC (reproduced: not above the paper's)"
            yield Row("table 11", claim, "+21.3 %", here, verdict_of(row["ratio"] <= 1.217), record["command"])


OUT_OF_REACH = [
    Row("table 2", "gains with StableLM, Phi-2, Vicuna, SigLIP", "+0.6 to +0.8", "-", "not testable here: too large"),
]
ALONE = {  # of the conflict loss alone: what is measured -> the direction in the paper
    "conflict_ratio": ("the conflict ratio falls", -1),
    "consistency": ("consistency rises", 1),
    "consistency_std": ("its std over experts rises", 1),
}


def alone_rows() -> Iterator[Row]:
    """Figures 3 and 8: the change from the first to the last step, of ce and minus the placebo's, over seeds."""
    files = sorted(RESULTS.glob("alone-*.json"))
    if not files:
        yield Row("figures 3, 8", "training on the conflict loss alone", "-")
    for record in map(read_bench, files):
        for part, (key, (claim, sign)) in product(("routers", "everything"), ALONE.items()):
            changes: dict[str, dict[int, float]] = {}
            for row in record["rows"]:
                if row["part"] == part:
                    first, last = (mean(layer[key] for layer in row["curve"][end]["layers"]) for end in (0, -1))
                    changes.setdefault(row["arm"], {})[row["seed"]] = last - first
            losses = [row["curve"][-1]["main_loss"] for row in record["rows"] if (row["part"], row["arm"]) == (part, "ce")]
            if len(changes.get("ce", {})) < 2:
                continue
            zero = dict.fromkeys(changes["ce"], 0.0)
            own, control = paired(zero, changes["ce"]), paired(changes["placebo"], changes["ce"])
            here = f"{say_gap(own, 3)}; minus placebo {say_gap(control, 3)}; main loss at the end {spread(losses, 2)}"
            low, high = sorted((sign * own.low, sign * own.high)) if own.low is not None else (-1, 1)
            held = sorted((sign * control.low, sign * control.high)) if control.low is not None else (-1, 1)
            verdict = "not reproduced" if low <= 0 else "reproduced" if held[0] > 0 else "the control does as well"
            what = f"the conflict loss alone trains {part}, {record['run']}, {record['model']}: {claim}"
            yield Row("figures 3, 8", what, "yes", here, verdict, record["command"])


def all_rows(settings: list[Setting], records: list[dict]) -> list[Row]:
    rows = [row for make in (glue_rows, lvlm_rows, sweep_rows, probe_rows) for row in make(settings)]
    return [*rows, *saved_rows(records), *alone_rows(), *bench_rows(), *OUT_OF_REACH]


# ---- 4. The page ----

HEAD = """# The paper, claim by claim

`python -m lab.report.claims` writes this page from the records in `results/`. All models here are small, 1,500 to 31 million
parameters, each on one kind of data. Nothing here says what happens at 1.6 billion.
"""
RULE = """A score is compared by paired 95 % t-intervals over the seeds: a = variant - baseline, b = variant - placebo (and
- flat), c = placebo - baseline; g is the paper's gain. *Inconclusive*: a holds 0 and g. *Not reproduced*: a ends below g,
and begins at or below 0. *Smaller than the paper's*: a lies above 0 and below g. *Reproduced*: a lies above 0 and reaches g,
and b lies above 0. *The control does as well*: a and c lie above 0, and b holds 0. *Routing does not matter here*:
baseline - random holds 0 or lies below, so no routing can show a gain; then no other verdict is given. Best epochs are
chosen on dev, as in the paper's source; the last epoch stands beside them. A claim without a gain names its predicate."""


def usable(records: list[dict]) -> list[Setting]:
    """The settings that compare something with the baseline, real data first."""
    found = [Setting(record) for record in merge(records)]
    found = [s for s in found if "none" in s.variants and len(s.variants) > 1]
    return sorted(found, key=lambda s: (s.record["name"].startswith("toy"), s.record["name"]))


def sentences(settings: list[Setting]) -> list[str]:
    """What a busy reader can quote, from the settings with the most seeds."""
    found = []
    for setting in settings:
        gap = setting.gap("ce", "none")
        if gap and gap.seeds >= 10 and gap.low is not None:
            placebo = setting.gap("ce", "placebo")
            other = f", from the placebo by {say_gap(placebo)}" if placebo else ""
            text = f"STGC differs from the baseline by {say_gap(gap)} points{other} ({gap.seeds} paired seeds)"
            found.append(f"On {setting.title}, {text}.")
    for setting in settings:
        gap = setting.gap("none", "random")
        if gap and gap.low is not None:
            more = "so routing matters there" if gap.low > 0 else "so no routing could show a gain there"
            text = f"the learned router differs from routing by dice by {say_gap(gap)} points"
            found.append(f"On {setting.title}, {text}, {more}.")
    return found[:4]


def search_lines() -> Iterator[str]:
    """What the search over small synthetic settings found: where routing matters, and what the choice of pairs adds."""
    runs = regimes.runs_of(record := regimes.read_record(RESULTS / "regimes.json"))
    names = regimes.settings_of(record, runs)
    matters = [name for name in names if regimes.gap(runs, name, ("random", None)).verdict == "worse"]
    many = f"{len(matters)} of {len(names)} small synthetic settings (`results/regimes.json`)"
    yield f"In {many} the learned router beats dice."
    for beta in regimes.BETAS:
        own, control = ("ce", beta), ("placebo", beta)
        pairs = [(regimes.gap(runs, name, own), regimes.gap(runs, name, own, control)) for name in names]
        both = sum(none.verdict == placebo.verdict == "better" for none, placebo in pairs)
        middle = median(regimes.gap(runs, name, own).mean for name in matters)
        ratio = regimes.median_margin(runs, names, own)
        text = f"At beta {beta:g} the loss beats both the baseline and the placebo in {both} of {len(names)}"
        text += f"; where routing matters it changes accuracy by {middle:+.1f} points (median)"
        yield f"{text}; the router's margin is {ratio:.2f} of the baseline's."


def router_lines(settings: list[Setting]) -> Iterator[str]:
    """Markdown: the router's margin at the end of training, as a share of the baseline's, and the share of moved tokens."""
    yield from header("setting", "variant", "margin / the baseline's", "moved")
    for setting in settings:
        base = [run["router_margin"][1] for run in setting.measured("none") if run.get("router_margin")]
        for name in setting.variants:
            runs = [run for run in setting.measured(name) if run.get("router_margin")]
            if base and runs and name != "random":
                ratio = mean(run["router_margin"][1] for run in runs) / mean(base)
                layers = [layer["moved"] for run in runs if run.get("probe") for layer in run["probe"][-1]["layers"]]
                moved = spread([one for one in layers if one is not None], 2) if layers else "-"
                yield f"| {setting.title} | {label(name)} | {ratio:.2f} | {moved} |"


def render(records: list[dict]) -> str:
    """docs/claims.md."""
    settings = usable(records)
    rows = all_rows(settings, records)
    told = [f"{number}. {text}" for number, text in enumerate(sentences(settings), 1)]
    table = [*header("in the paper", "claim", "paper", "here", "verdict", "command"), *(row.cells() for row in rows)]
    parts = []
    for setting in settings:
        lines = [*setting.table(), "", *setting.notes(), "", *(f"    {one}" for one in setting.record["command"])]
        parts += fold(setting.title, lines)
    count = sum(len(setting.intervals) for setting in settings)
    note = f"{count} intervals were computed; of twenty, one misses by chance. No correction is made."
    done = sum(not row.verdict.startswith("not run") for row in rows)
    lines = [HEAD, *told, "", "## What the loss does to the router", "", *search_lines(), "", *router_lines(settings), ""]
    lines += ["![accuracy over the router's margin, in small synthetic settings](../results/regimes.png)", ""]
    lines += ["![kappa of the flags by other batches, over the main loss](../results/probe.png)", ""]
    lines += [f"## The claims: {done} of {len(rows)} measured", "", RULE, "", *table, "", note, ""]
    lines += ["## The settings", "", *parts]
    return "\n".join(lines).rstrip() + "\n"


# ---- 5. Others' records ----

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
    seeds = {variant: {run["seed"] for run in setting.runs(variant)} for variant in setting.variants}
    if "none" not in seeds or len(seeds) < 2:
        raise UserError(f"--check {folder}: it compares nothing with the baseline; train with --variants none,ce,placebo")
    for variant, own in seeds.items():
        if own != seeds["none"]:
            other = ", ".join(map(str, sorted(own ^ seeds["none"])))
            raise UserError(f"--check {folder}: {variant} and none differ in seeds {other}; finish the run with --resume")
    rows = [*glue_rows([setting]), *lvlm_rows([setting])]
    found = [row for row in rows if row.verdict != NOT_RUN]
    texts = [f"{row.where}: {row.claim}: {row.here} (paper {row.paper}): {row.verdict}" for row in found]
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
