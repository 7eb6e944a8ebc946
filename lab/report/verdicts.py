"""Verdicts on the paper's claims, by a rule in code: settings, their paired differences, and the rows of docs/claims.md.

A verdict on a score follows from paired 95 % t-intervals over the seeds: a = variant - its baseline, b = variant - its
controls (the placebo and flat), c = placebo - baseline, and the paper's gain g. `judge` has the rule.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

from lab.report.compare import Paired, paired
from lab.report.records import MODEL, busiest, data_name, ends_in, key_of, unusual
from lab.report.tables import header, spread
from lab.run.options import label
from lab.run.runs import read_lines

# ---- 1. Verdicts ----

NOT_RUN, NOT_TESTABLE, OPEN = "not run", "not testable here", "no verdict"
NO_ROUTING = "routing does not matter here"


Gap = Paired | None


def score_of(run: dict, select: str | tuple[float, bool]) -> float | None:
    """In %: of the best epoch (of records without, the last), of the last, or of experts of a (capacity, bpr)."""
    if isinstance(select, tuple):
        found = [own["scores"] for own in run.get("limited") or [] if (own["capacity"], own["bpr"]) == select]
    else:
        found = [run.get(select) or run["last"]]
    return 100 * found[0]["score"] if found else None


def controls_of(variant: str) -> tuple[str, str]:
    """The names of its placebo and its flat: the same loss, passes and gradients on pairs drawn by dice, and on all. Not
    each of these variants exists."""
    rest = re.sub(r"^(ce|placebo|flat)(-|$)", "", variant)
    placebo, flat = (f"{control}-{rest}" if rest else control for control in ("placebo", "flat"))
    return placebo, flat


def judge(a: Gap, placebo: Gap, flat: Gap, c: Gap, gain: float, routing: Gap = None) -> str:
    """The verdict on a gain, in points; `placebo` and `flat` are the two b. `routing`: baseline - random, the positive
    control: where it holds 0 or lies below, no score can judge a routing. The first rule that fits decides."""
    if a is None or a.low is None:
        return NOT_RUN if a is None else f"{'one seed' if a.seeds == 1 else 'no spread'}, {OPEN}"
    if no_lead(routing):
        return NO_ROUTING
    reaches = round(a.high, 1) >= gain  # the paper's gains have one digit
    if a.low <= 0:
        return "inconclusive" if reaches else "not reproduced"
    if not reaches:
        return "smaller than the paper's"
    if is_above(placebo) and is_above(flat):
        return "reproduced"
    if is_above(c) and placebo and placebo.low is not None and placebo.low <= 0 <= placebo.high:
        return "the control does as well"
    return "a gain, the selection undecided"


def is_open(verdict: str) -> bool:
    """Whether there is no interval to judge by."""
    return verdict == NOT_RUN or verdict.endswith(OPEN)


def no_lead(routing: Gap) -> bool:
    """Whether the baseline is known not to beat dice: no score can judge a routing there."""
    return routing is not None and routing.low is not None and routing.low <= 0


def lacks_dice(routing: Gap) -> list[str]:
    """What a verdict on a score says where the positive control does not judge."""
    if routing is None:
        return ["dice not run"]
    return [f"dice: {'one seed' if routing.seeds == 1 else 'no spread'}"] if routing.low is None else []


def is_above(gap: Gap, sign: int = 1) -> bool:
    """Whether an interval is known and lies above 0, with sign -1 below it."""
    return gap is not None and gap.low is not None and min(sign * gap.low, sign * gap.high) > 0


def judge_sign(gap: Gap, sign: int, *controls: Gap) -> str:
    """The verdict on a known difference that shall lie above 0 (sign 1) or below it (-1). `controls`: the same minus each
    control; what a control shares is not due to STGC."""
    if not is_above(gap, sign):
        return "not reproduced" if is_above(gap, -sign) else "inconclusive"
    return "reproduced" if all(is_above(one, sign) for one in controls) else "the control does as well"


def judge_fall(falls: dict[str, bool]) -> str:
    """The verdict on a value that shall fall with ce (variant -> whether it does)."""
    if falls["ce"] and (falls.get("none") or falls.get("placebo")):
        return "the control does as well"
    return verdict_of(falls["ce"]) + (" (placebo not run)" if falls["ce"] and "placebo" not in falls else "")


def own_gaps(settings: list["Setting"], one: str, other: str) -> list[tuple["Setting", Paired]]:
    """The settings whose own runs compare these two over seeds, and the difference."""
    gaps = [(setting, setting.gap(one, other)) for setting in settings if not setting.lent & {one, other}]
    return [(setting, gap) for setting, gap in gaps if gap and gap.low is not None]


def say_gap(gap: Gap, digits: int = 1) -> str:
    """Mean and interval, such as points."""
    if gap is None:
        return "-"
    show = lambda value: f"{value:+.{digits}f}"  # noqa: E731
    if gap.low is None:
        return f"{show(gap.mean)} ({'one seed' if gap.seeds == 1 else f'{gap.seeds} seeds, no spread'})"
    return f"{show(gap.mean)} [{show(gap.low)}, {show(gap.high)}]"


def begin_alike(one: dict, other: dict) -> bool:
    """Whether two runs were made from the same dense model, as far as it is recorded."""
    return None in (one.get("dense"), other.get("dense")) or one["dense"] == other["dense"]


def gap_of(one: dict[int, float], other: dict[int, float]) -> Gap:
    """other - one, over the seeds of both; None without any."""
    return paired(one, other) if one.keys() & other.keys() else None


def tell(gap: Gap, digits: int = 1) -> str:
    """A gap with its half width and seeds."""
    if gap is None or gap.low is None:
        return say_gap(gap, digits)
    return f"{say_gap(gap, digits)}, half width {(gap.high - gap.low) / 2:.{digits}f}, {gap.seeds} seeds"


# ---- 2. Settings ----


@dataclass
class Setting:
    """One experiment: a merged record."""

    record: dict

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(run["variant"] for run in self.record["runs"]))

    @property
    def title(self) -> str:
        config, name = self.record["config"], self.record["name"]
        parts = [name, Path(config["model"]).name] if "model" in config and not config.get("toy") else [name]
        parts += [f"{config['num_experts']}Top{config['top_k']}, {config['router']} router, beta {config['beta']:g}"]
        epochs = [f"{config['epochs']} epochs"] if "epochs" in config else []
        return ", ".join([*parts, *epochs, *unusual(self.record)])

    @property
    def brief(self) -> str:
        """Its data, its model if that is none of the recorded runs', its number of experts, and what tells it from others of
        these data; for readers."""
        config = self.record["config"]
        usual = "cosine" if "epochs" in config else "linear"  # the default of glue_moefy.py, of toy_lvlm.py
        more = [] if config.get("toy") or Path(config.get("model", MODEL)).name == MODEL else [Path(config["model"]).name]
        more += [f"{config['num_experts']}Top{config['top_k']}", *["parts"] * (config.get("experts") == "split")]
        more += ["experts trained apart"] if config.get("experts_from") else []
        more += [f"{config['router']} router"] if config.get("router", usual) != usual else []
        more += [] if config["top_k"] > 1 or config.get("normalize", True) else ["weight not 1"]
        more += [f"{config['scenes']} pictures"] if config.get("scenes", 12000) != 12000 else []
        return ", ".join([data_name(self.record), *more])

    @property
    def borrows(self) -> bool:
        """Whether it has runs of another setting, whose training is the same."""
        return bool(self.lent)

    @property
    def lent(self) -> set[str]:
        """The variants whose runs are another setting's."""
        return {run["variant"] for run in self.record["runs"] if run.get("lent")}

    def runs(self, variant: str) -> list[dict]:
        """Of the learning rate with the most seeds, then with the best mean score on dev, as the paper's rows are made."""
        rates: dict[float, list[dict]] = {}
        for run in self.record["runs"]:
            if run["variant"] == variant:
                rates.setdefault(run["lr"], []).append(run)
        mean_of = lambda runs: mean((run.get("best") or run["last"])["score"] for run in runs)  # noqa: E731
        return max(rates.values(), key=lambda runs: (len(runs), mean_of(runs), -runs[0]["lr"])) if rates else []

    def measured(self, variant: str | None = None) -> list[dict]:
        """All runs, also those that were repeated: for what older runs did not record."""
        found = [*self.record["runs"], *(again for _, again in self.record["repeated"])]
        return [run for run in found if variant in (None, run["variant"])]

    def scores(self, variant: str, select: str = "best", key: str = "score", scale: float = 100) -> dict[int, float]:
        """seed -> score in %. Records without a best epoch have the last."""
        found = {run["seed"]: run.get(select) or run["last"] for run in self.runs(variant)}
        return {seed: scale * own[key] for seed, own in found.items() if key in own}

    def sides(self, one: str, other: str, select: str = "best") -> tuple[dict[int, float], dict[int, float]]:
        """Of two variants: seed -> score in %, of the seeds that both have. Of a seed that was run several times it is the
        mean over its pairs: over those of one commit if there are some, since between two commits the machine may have been
        another one, too. Runs from two dense models are no pair."""
        runs: list[dict[int, list[dict]]] = []
        for variant in (one, other):
            rates, own = {run["lr"] for run in self.runs(variant)}, {}
            for run in self.measured(variant):
                if run["lr"] in rates and score_of(run, select) is not None:
                    own.setdefault(run["seed"], []).append(run)
            runs.append(own)
        found: tuple[dict[int, float], dict[int, float]] = {}, {}
        for seed in sorted(runs[0].keys() & runs[1].keys()):
            both = [pair for pair in product(runs[0][seed], runs[1][seed]) if begin_alike(*pair)]
            alike = [pair for pair in both if pair[0].get("commit") == pair[1].get("commit")] or both
            for side, own in zip(found, zip(*alike)):
                side[seed] = mean(score_of(run, select) for run in own)
        return found

    def gap(self, one: str, other: str, select: str = "best") -> Gap:
        """one - other, in points; None if they share no seed."""
        scores, base = self.sides(one, other, select)
        return gap_of(base, scores)

    def verdict(self, gain: float, one="ce", other="none", select="best") -> str:
        """By `judge`, and which of the controls that it asks for were not run."""
        gap, names = partial(self.gap, select=select), controls_of(one)
        both, routing = [gap(one, name) for name in names], gap("none", "random")
        verdict = judge(gap(one, other), *both, gap(names[0], other), gain, routing)
        missing = lacks_dice(routing)
        if verdict.startswith("a gain"):
            missing += [f"{name} not run" for name, control in zip(names, both) if control is None]
        return f"{verdict} ({', '.join(missing)})" if missing and not is_open(verdict) else verdict

    def last_epoch(self, one: str, other: str) -> str:
        """What to say of the last epoch where the scores are of the best."""
        best, last = (self.gap(one, other, select) for select in ("best", "last"))
        return "" if last == best else f"; last epoch {say_gap(last)}"

    def beside(self, one: str, select="best") -> str:
        """What stands beside a difference of a variant: minus its controls and dice, and the positive control."""
        gap = partial(self.gap, select=select)
        known = [(name, gap(one, name)) for name in (*controls_of(one), "random") if name in self.variants]
        dice = gap("none", "random")
        more = f"; baseline minus random {say_gap(dice)}" if dice else ""
        return "".join(f"; minus {name} {say_gap(control)}" for name, control in known) + more

    def table(self) -> Iterator[str]:
        """Markdown: every variant's scores and its paired differences."""
        heads = ("baseline", "its placebo", "its flat", "random")
        picked = any(self.scores(name) != self.scores(name, "last") for name in self.variants)  # best epochs
        exact = any("accuracy" in run["last"] and run["last"]["accuracy"] != run["last"]["score"] for run in self.measured())
        columns = ["variant", "seeds", "best", "last", *["accuracy, last"] * exact, "dev loss"]
        columns += [f"minus {name}" for name in heads]
        yield from header(*columns, *["minus baseline, last"] * picked)
        for name in self.variants:
            lent = " (lent)" if all(run.get("lent") for run in self.runs(name)) else ""
            cells = [f"{label(name)}{lent}", str(len(self.runs(name)))]
            cells += [spread([*self.scores(name, select).values()]) for select in ("best", "last")]
            for key, scale, digits in (*[("accuracy", 100, 1)] * exact, ("dev_loss", 1, 3)):
                found = [*self.scores(name, "last", key, scale).values()]
                cells.append(self.counted(name, found, digits))
            others = ("none", *controls_of(name), "random")
            cells += [self.difference(name, other) for other in others]
            cells += [self.difference(name, "none", "last")] * picked
            yield f"| {' | '.join(cells)} |"

    def difference(self, one: str, other: str, select: str = "best") -> str:
        """A cell of the table. * where a seed was run several times, so that it is not the difference of the means shown."""
        if one == other or not (gap := self.gap(one, other, select)):
            return "-"
        shown = gap_of(self.scores(other, select), self.scores(one, select))
        return say_gap(gap) + "*" * (f"{shown.mean:.1f}" != f"{gap.mean:.1f}")

    def training(self) -> Iterator[str]:
        """Markdown: what every variant's training reached, means over its last tenth and over the MoE layers. Dice have no
        margin, and a baseline that was lent from another tau has other flags. Each seed counts once: of those that were run
        several times, the first run that has the value."""
        digits = {"loss": 3, "router_margin": 4, "conflict_ratio": 3, "consistency": 3}
        yield from header("variant", "training loss", "margin", "conflict ratio", "consistency", "busiest expert's share")
        for name in self.variants:
            rate, cells = self.runs(name)[0]["lr"], [label(name)]
            runs = [run for run in reversed(self.measured(name)) if run["lr"] == rate]  # the first run of a seed stays
            curves = [(run["seed"], read_lines(run["curve"]) if run.get("curve") else []) for run in runs]
            void = ["router_margin"] if name == "random" else []
            void += ["conflict_ratio", "consistency"] if name in self.lent and self.record["config"]["tau"] else []
            for key, places in digits.items():
                both = [(seed, run.get(key) or ends_in(lines, key)) for run, (seed, lines) in zip(runs, curves)]
                ends = {seed: end[1] for seed, end in both if end and key not in void}
                cells.append(self.counted(name, [*ends.values()], places))
            ends = {seed: share for seed, lines in curves if (share := busiest(lines)) is not None}
            yield f"| {' | '.join([*cells, self.counted(name, [*ends.values()], 3)])} |"

    def counted(self, variant: str, values: list[float], digits: int) -> str:
        """Mean and spread, and the number of seeds where it is not that of the variant's."""
        few = f" ({len(values)} seed{'s' * (len(values) > 1)})" if len(values) != len(self.runs(variant)) else ""
        return spread(values, digits) + few if values else "-"

    def notes(self) -> Iterator[str]:
        if self.borrows:
            text = "Lent rows are another setting's whose training is the same: the baseline of another beta or tau, "
            yield text + "flat of another tau, dice of another beta, tau or alpha."
        for first, again in self.record["repeated"]:
            ends = [first.get("best") or first["last"], again.get("best") or again["last"], first["last"], again["last"]]
            best, last = (100 * (ends[i + 1]["score"] - ends[i]["score"]) for i in (0, 2))
            names = f"{label(first['variant'])}, seed {first['seed']}"
            gap = f"{best:+.1f} points (last step {last:+.1f})"
            yield f"{names}, was run at {str(first['commit'])[:7]} and at {str(again['commit'])[:7]}: {gap}."
        commits = sorted({str(run["commit"])[:7] for run in self.measured()})
        text = f"Commits: {', '.join(commits)}."
        text += " Another commit may mean another machine, too." * (len(commits) > 1)
        if self.record["repeated"]:
            text += " Of a seed that was run several times the first run stands in the scores; a difference is the mean"
            text += " over its pairs, over those of one commit if there are some, and has a * where it is not that of the"
            text += " scores."
        yield text
        for other, what in (("none", "the baseline"), ("", "the placebo of the same loss")):
            sides = [(name, other or controls_of(name)[0]) for name in self.variants]
            sides = [(one, base) for one, base in sides if base in self.variants and one != base]
            few = [f"{label(one)} {pairs}" for one, base in sides if (pairs := self.of_one_commit(one, base))]
            if few:
                rest = "; of the other variants all" * (len(few) < len(sides))
                yield f"Pairs with {what} that are of one commit: {', '.join(few)}{rest}."

    def of_one_commit(self, one: str, other: str) -> str:
        """In how many seeds two variants have a pair of one commit, where not in all that they share: "2 of 10"."""
        sides = [{(run["seed"], run.get("commit")) for run in self.measured(name)} for name in (one, other)]
        seeds = set.intersection(*({seed for seed, _ in side} for side in sides))
        same = {seed for seed, _ in set.intersection(*sides)}
        return f"{len(same)} of {len(seeds)}" if same != seeds else ""


def series(settings: list[Setting], option: str, base, variant: str, also: tuple[str, ...] = ()) -> list[dict]:
    """Value of an option -> setting, of settings that differ in this option alone, and in what goes with it (`also`); those
    with `base`."""
    found: dict[str, dict] = {}
    for setting in settings:
        record, config = setting.record, setting.record["config"]
        if variant in setting.variants and option in config:
            data = None if option == "scenes" else record.get("data")
            same = key_of(record | {"config": config | dict.fromkeys((option, *also)), "data": data})
            found.setdefault(same, {})[config[option]] = setting
    return [own for own in found.values() if base in own and len(own) > 1]


def gains(setting: Setting, variant: str = "ce") -> dict[int, float]:
    """seed -> the gain of a variant over the baseline, in points."""
    own, none = setting.sides(variant, "none")
    return {seed: own[seed] - none[seed] for seed in own}


# ---- 3. Rows ----


@dataclass
class Row:
    """What was measured of a claim, in one setting. The page joins the rows of a claim."""

    where: str  # in the paper
    claim: str  # a claim without a gain names its predicate
    paper: str
    here: str = "-"
    verdict: str = NOT_RUN
    command: str = ""  # or:
    setting: Setting | None = None
    picture: str = ""  # in results/


def gain_rows(row: Row, settings: list[Setting], one="ce", other="none") -> list[Row]:
    """A gain, in each setting that compares these two variants; "not run" if there is none."""
    found, gain = [], float(row.paper)
    for setting in settings:
        if not (gap := setting.gap(one, other)):
            continue
        here = f"{tell(gap)}{setting.last_epoch(one, other)}{setting.beside(one)}"
        if gap.low is None:
            ends = (f"{label(name)} {spread([*own.values()])}" for name, own in zip((one, other), setting.sides(one, other)))
            here += f"; {', '.join(ends)}"
        for name in (one, other):
            if stuck := [run for run in setting.runs(name) if run.get("collapsed")]:
                here += f"; {label(name)} answers one class alone in {len(stuck)} of {len(setting.runs(name))} runs"
        verdict, last_verdict = (setting.verdict(gain, one, other, select) for select in ("best", "last"))
        verdict += "" if last_verdict == verdict or verdict == NO_ROUTING else f" (last epoch: {last_verdict})"
        found.append(replace(row, here=here, verdict=verdict, setting=setting))
    return found or [row]


def sign_row(
    row: Row,
    gap: Gap,
    sign: int,
    setting: Setting,
    more: str = "",
    controls: dict[str, Gap] | None = None,
    digits: int = 1,
) -> Row:
    """A difference that shall lie above 0 (sign 1) or below it (-1). `more`: what follows the interval. `controls`: name ->
    the same of the variant minus this control, None if that was not run."""
    if gap is None or gap.low is None:
        verdict = judge(gap, None, None, None, 0.0)
        return replace(row, here=f"{say_gap(gap)}{more}", verdict=verdict, setting=setting)
    known = {name: one for name, one in (controls or {}).items() if one}
    more += "".join(f"; minus {name} {say_gap(one, digits)}" for name, one in known.items())
    verdict = judge_sign(gap, sign, *known.values())
    missing = [f"{name} not run" for name in controls or {} if name not in known and verdict == "reproduced"]
    verdict += f" ({', '.join(missing)})" if missing else ""
    return replace(row, here=f"{tell(gap, digits)}{more}", verdict=verdict, setting=setting)


def score_sign_row(row: Row, gap: Gap, sign: int, setting: Setting, more: str = "", gain: float = 0.0) -> Row:
    """The same of a score, which can judge a routing only where dice do worse. `gain`: the paper's difference, which a
    reproduced one reaches."""
    found, routing = sign_row(row, gap, sign, setting, more), setting.gap("none", "random")
    if is_open(found.verdict):
        return found
    if no_lead(routing):
        return replace(found, verdict=NO_ROUTING)
    verdict = found.verdict
    if round(max(sign * gap.low, sign * gap.high), 1) < abs(gain):  # the paper's have one digit
        shorter = {"inconclusive": "not reproduced", "reproduced": "smaller than the paper's"}
        verdict = shorter.get(verdict, verdict)
    return replace(found, verdict=verdict + "".join(f" ({missing})" for missing in lacks_dice(routing)))


def verdict_of(holds: bool) -> str:
    return "reproduced" if holds else "not reproduced"


def by_claim(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """(where, claim, paper) -> its rows, a setting or a command each."""
    claims: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        claims.setdefault((row.where, row.claim, row.paper), []).append(row)
    return claims


MANY = 5  # settings of a claim; of more, the page shows the weightiest and folds the others


def weight(row: Row) -> tuple[bool, int, int]:
    """Rows that can be judged come first, then those with the most variants and seeds."""
    setting = row.setting
    return not is_open(row.verdict), len(setting.variants) if setting else 0, len(setting.runs("ce")) if setting else 0


def join(rows: list[Row], tags: dict[int, str], commands: dict[str, str]) -> Iterator[str]:
    """Markdown: one line per claim, with a part per setting; if there are many, all but one in a fold, and their verdicts
    counted. `tags`: id of a setting -> how the page calls it; `commands`: the same of a command, for rows without one."""
    for names, own in by_claim(rows).items():
        marks = [tags[id(row.setting)] if row.setting else commands.get(row.command, "") for row in own]
        found = [row.setting for row in own]
        apart = [f" ({one.brief}, beta {one.record['config']['beta']:g})" if one else "" for one in found]
        links = [f"[{mark}](#{mark.lower()})" if mark else "" for mark in marks]
        pictures = [f"[picture](../results/{row.picture})" if row.picture else "" for row in own]
        count = Counter(row.verdict for row in own)
        if len(own) > MANY:
            sees = (", ".join(filter(None, both)) for both in zip(links, pictures))
            ends = (f": {row.verdict}" * (len(count) > 1) for row in own)
            parts = [f"{see}{one}: {row.here}{end}" for see, one, row, end in zip(sees, apart, own, ends)]
            first = max(range(len(own)), key=lambda i: weight(own[i]))
            rest = "<br>".join(part for i, part in enumerate(parts) if i != first)
            here = f"{parts[first]}<details><summary>{len(own) - 1} more</summary>{rest}</details>"
            verdict = "<br>".join(f"{verdict}: {number} of {len(own)}" for verdict, number in count.most_common())
            sees = [pictures[first]]
        else:
            apart = apart if len(set(marks)) > 1 else [""] * len(own)
            here = "<br>".join(f"{mark}{one}: {row.here}" if mark else row.here for mark, one, row in zip(marks, apart, own))
            verdict = "<br>".join(f"{mark}: {row.verdict}" if mark else row.verdict for mark, row in zip(marks, own))
            sees = dict.fromkeys(filter(None, [*links, *pictures]))
        verdict = own[0].verdict if len(count) == 1 else verdict
        yield f"| {' | '.join([*names, here, verdict, '<br>'.join(sees) or '-'])} |"
