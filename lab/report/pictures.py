"""Rows of docs/claims.md on scores of the toy LVLM: tables 2, 3, 4, 5, 8, 9, 10, and which settings can judge routing."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from lab.report.tables import header, spread
from lab.report.verdicts import (
    NO_ROUTING,
    NOT_RUN,
    NOT_TESTABLE,
    OPEN,
    Gap,
    Row,
    Setting,
    controls_of,
    gain_rows,
    gains,
    gap_of,
    lacks_dice,
    no_lead,
    say_gap,
    score_of,
    score_sign_row,
    series,
    tell,
)
from lab.run.options import label


def pictures_of(settings: list[Setting], **config) -> list[Setting]:
    """The settings of toy_lvlm.py with these options."""
    found = [s for s in settings if s.record["stages"] or s.record["name"].startswith("lvlm")]
    return [s for s in found if all(s.record["config"].get(key) == value for key, value in config.items())]


def lvlm_rows(settings: list[Setting]) -> list[Row]:
    """Tables 2, 4, 9 and 10: scores of the toy LVLM, and its other losses beside their own placebos."""
    found, usual = [], pictures_of(settings, beta=1.0, tau=0.0, alpha=0.01)
    for top_k, gain in ((2, "+0.7"), (1, "+1.1")):
        own = pictures_of(settings, tau=0.0, alpha=0.01, top_k=top_k)
        own = [s for s in own if s.record["config"]["beta"] == 1 or judge_use(s) == "usable"]
        claim = f"STGC gains with Top-{top_k} (there 4Top{top_k}; beta 1, and others where its gain is known to 0.7)"
        found += gain_rows(Row("table 2", claim, gain), own)
    for name, gain in (("embedding", "-0.4"), ("feature", "-0.1"), ("task", "-8.4")):
        row = Row("table 4", f"routing by sample ({name}) is worse (reproduced: below 0, and as far as the paper's)", gain)
        gaps = [(setting, gap) for setting in usual if (gap := setting.gap(name, "none"))]
        found += [score_sign_row(row, gap, -1, s, s.beside(name), gain=float(gain)) for s, gap in gaps] or [row]
    found += gain_rows(Row("table 9", "CE gains more than MSE", "+0.3"), usual, "ce", "mse")
    claim = "with another loss STGC beats its own placebo (reproduced: by its interval)"
    row, rows = Row("new", claim, "not asked"), []
    for setting, one in product(usual, ("mse", "reroute")):
        if gap := setting.gap(one, controls_of(one)[0]):
            flat = setting.gap(one, controls_of(one)[1])
            more = f"; minus the baseline {say_gap(setting.gap(one, 'none'))}"
            more += f"; minus flat {say_gap(flat)}" if flat else ""
            own = score_sign_row(row, gap, 1, setting, more)
            rows.append(replace(own, here=f"{one} {own.here}"))
    found += rows or [row]
    return judge_untestable([*found, *capacity_rows(usual)], settings)


def capacity_rows(settings: list[Setting]) -> list[Row]:
    """Table 10: experts of half the usual size, where the positive control is that of this size."""
    found = []
    for bpr, gain in ((False, "+10.9"), (True, "+7.0")):
        half, row = (0.5, bpr), Row("table 10", f"at capacity 0.5{', batch prioritized' * bpr}, STGC gains", gain)
        rows = []
        for setting in settings:
            if gap := setting.gap("ce", "none", half):
                scores = {name: own for name in setting.variants if (own := limited(setting, name, *half))}
                here = tell(gap) + "".join(f"; {label(name)} {spread([*own.values()])}" for name, own in scores.items())
                here += setting.beside("ce", half)
                rows.append(replace(row, here=here, verdict=setting.verdict(float(gain), select=half), setting=setting))
        found += rows or [row]
    return found


def begins(setting: Setting, what: str) -> dict[int, float]:
    """seed -> the score in % of what the baseline began from: its "start", or the "dense" model that it was made from."""
    return {run["seed"]: 100 * run[what] for run in setting.runs("none") if run.get(what) is not None}


def above_dense(setting: Setting) -> Gap:
    """The baseline minus the dense model that it was made from, as far as it is recorded."""
    return gap_of(begins(setting, "dense"), setting.scores("none", "last"))


def leads(setting: Setting) -> tuple[Gap, Gap, Gap]:
    """What tells whether a setting of toy_lvlm.py can judge routing, at the last step: its baseline minus its start, minus
    dice, and STGC minus the baseline. Copies whose weights sum to 1 start as stage II ends. Others have their own start,
    which older records do not know."""
    ends, config = setting.scores("none", "last"), setting.record["config"]
    starts = begins(setting, "start")
    if not starts and config.get("experts", "copy") == "copy" and config.get("normalize", True):
        starts = begins(setting, "dense")
    return gap_of(starts, ends), setting.gap("none", "random", "last"), setting.gap("ce", "none", "last")


def judge_use(setting: Setting) -> str:
    """Says "usable" if the baseline ends 3 points above its start and above dice, and STGC minus the baseline is known to
    0.7 points over five seeds or more. Where the last is open: "so far"."""
    *gaps, ce = leads(setting)
    if not all(gap is not None and gap.mean >= 3 for gap in gaps):
        return "not usable"
    if ce is None or ce.low is None or ce.seeds < 5:
        return "usable so far: half width not known"
    return "usable" if ce.high - ce.low <= 2 * 0.7 else "usable, but for the half width"


def usable_rows(settings: list[Setting]) -> list[Row]:
    """Which settings of the toy LVLM can judge routing. The baseline does not depend on beta, the half width does."""
    claim = "the toy LVLM can judge routing (usable: the baseline ends 3 points above its start and above dice, "
    row, found = Row("new", f"{claim}STGC minus it is known to 0.7)", "not asked"), []
    for setting in pictures_of(settings):
        start, dice, ce = leads(setting)
        if dice and (ce or not setting.borrows):
            here = f"minus start {say_gap(start)}; minus dice {tell(dice)}"
            here += f"; STGC minus the baseline {tell(ce)}" if ce else ""
            if gap := above_dense(setting):
                here += f"; baseline minus the dense model that it was made from {say_gap(gap)}"
            found.append(replace(row, here=here, verdict=judge_use(setting), setting=setting))
    return found or [row]


def judge_untestable(rows: list[Row], settings: list[Setting]) -> list[Row]:
    """Where at least four settings were tried and none is usable, a score that was not run is not testable."""
    tried = [setting for setting in pictures_of(settings) if setting.gap("none", "random")]
    if len(tried) < 4 or any(judge_use(setting) != "not usable" for setting in tried):
        return rows
    seeds = ", ".join(str(setting.gap("none", "random").seeds) for setting in tried)
    verdict = f"{NOT_TESTABLE}: no usable setting in {len(tried)} tries ({seeds} seeds)"
    return [replace(row, verdict=verdict) if row.verdict == NOT_RUN else row for row in rows]


def limited(setting: Setting, variant: str, capacity: float, bpr: bool) -> dict[int, float]:
    """seed -> score in %, with experts of limited capacity."""
    scores = {run["seed"]: score_of(run, (capacity, bpr)) for run in setting.runs(variant)}
    return {seed: score for seed, score in scores.items() if score is not None}


def capacity_table(setting: Setting) -> Iterator[str]:
    """Markdown: every variant's scores with experts of limited capacity; nothing where none was tested."""
    runs = [run for run in setting.record["runs"] if run.get("limited") and not run.get("lent")]
    tested = dict.fromkeys((own["capacity"], own["bpr"]) for run in runs for own in run["limited"])
    if tested:
        yield from header("variant", *(f"capacity {size:g}{', BPR' * bpr}" for size, bpr in tested))
        for name in dict.fromkeys(run["variant"] for run in runs):
            cells = [spread([*own.values()]) if (own := limited(setting, name, *one)) else "-" for one in tested]
            yield f"| {' | '.join([label(name), *cells])} |"
        yield from ("", "BPR: with a capacity the pairs of the largest weight come first, not those that stand first.")


TRIED = {"beta": (0.5, 1.0, 2.0), "tau": (-0.1, 0.0, 0.1)}  # in the paper


def sweep_rows(settings: list[Setting]) -> list[Row]:
    """Tables 3, 5 and 8: one option varies, all others are equal. Seeds are paired across the settings."""
    found, settings = [], pictures_of(settings)
    for option, best in (("beta", 1.0), ("tau", 0.0)):
        tried = ", ".join(f"{value:g}" for value in TRIED[option])
        claim = f"{option} {best:g} is the best of {tried} (reproduced: it lies above each other one)"
        row = Row("table 5", claim, "best")
        found += [best_row(row, option, best, own) for own in series(settings, option, best, "ce")] or [row]
    claim = "alpha 0.1 for 0.01, without STGC, costs score (reproduced: below 0, and as far as the paper's)"
    row = Row("table 8", claim, "-0.1")
    own = [one for one in series(settings, "alpha", 0.01, "none") if 0.1 in one]
    found += [weight_row(row, one) for one in own] or [row]
    row = Row("new", "does the weight of the balance loss decide what STGC gives? ce minus the baseline", "not asked")
    found += [alpha_row(row, own) for own in series(settings, "alpha", 0.01, "ce")] or [row]
    claim = "four times the data, a larger gain (reproduced: their difference lies above 0, and as far as the paper's)"
    row = Row("table 3", claim, "+0.4")
    own = [one for one in series(settings, "scenes", 12000, "ce") if 3000 in one]
    found += [data_row(row, one) for one in own] or [row]
    return judge_untestable(found, settings)


def weight_row(row: Row, own: dict[float, Setting]) -> Row:
    """The baseline at two weights of the balance loss, and its lead over dice at each."""
    gap, both = gap_of(own[0.01].scores("none"), own[0.1].scores("none")), [(alpha, own[alpha]) for alpha in (0.01, 0.1)]
    dice = "".join(f"; minus random at alpha {alpha:g} {say_gap(one.gap('none', 'random'))}" for alpha, one in both)
    return score_sign_row(row, gap, -1, own[0.1], dice, gain=0.1)


def data_row(row: Row, own: dict[int, Setting]) -> Row:
    """What STGC gains with all pictures minus with a quarter, beside the same of its controls and dice."""
    names = ("ce", "placebo", "flat", "random")
    gap, *others = (gap_of(*(gains(own[size], name) for size in (3000, 12000))) for name in names)
    more = "".join(f"; the same of {name} {say_gap(other)}" for name, other in zip(names[1:], others) if other)
    return score_sign_row(row, gap, 1, own[3000], more, gain=0.4)


def alpha_row(row: Row, own: dict[float, Setting]) -> Row:
    """What STGC gives at each weight of the balance loss, beside the baseline's own score there."""
    texts = []
    for alpha, setting in sorted(own.items()):
        base = spread([*setting.scores("none").values()])
        texts.append(f"alpha {alpha:g}: {tell(setting.gap('ce', 'none'))} (baseline {base}{setting.beside('ce')})")
    routing = own[0.01].gap("none", "random")
    verdict = NO_ROUTING if no_lead(routing) else ", ".join(["measured", *lacks_dice(routing)])
    return replace(row, here="; ".join(texts), verdict=verdict, setting=own[0.01])


def own_step(variant: str, one: Setting, other: Setting) -> Gap:
    """other - one, of a variant that both have run themselves."""
    lent = variant in one.lent | other.lent
    return None if lent else gap_of(one.scores(variant), other.scores(variant))


def best_row(row: Row, option: str, best: float, own: dict[float, Setting]) -> Row:
    """The value of an option that the paper finds best, beside each other value that it tried, in points of `ce`. Those that
    it did not try are shown, and decide nothing."""
    others, texts = [value for value in sorted(own) if value != best], {True: [], False: []}
    steps = {name: {value: own_step(name, own[value], own[best]) for value in others} for name in ("ce", "placebo", "flat")}
    known = {value: gap for value, gap in steps["ce"].items() if gap and gap.low is not None}
    for value, gap in steps["ce"].items():
        more = "".join(
            f", the same of {name} {say_gap(steps[name][value])}" for name in ("placebo", "flat") if steps[name][value]
        )
        texts[value in TRIED[option]].append(f"minus {option} {value:g}: {tell(gap)}{more}")
    here = "; not tried in the paper: ".join("; ".join(some) for some in texts.values() if some)
    routing, judged = own[best].gap("none", "random"), [value for value in others if value in TRIED[option]]
    if not judged:
        verdict = NOT_RUN
    elif any(value not in known for value in judged):
        verdict = f"one seed, {OPEN}"
    elif no_lead(routing):
        verdict = NO_ROUTING
    else:
        above, below = all(known[value].low > 0 for value in judged), any(known[value].high < 0 for value in judged)
        verdict = "reproduced" if above else "not reproduced" if below else "inconclusive"
        better = [f"{value:g}" for value in known if value not in judged and known[value].high < 0]
        verdict += f" ({option} {' and '.join(better)}, not tried there, better)" if better else ""
        verdict += "".join(f" ({missing})" for missing in lacks_dice(routing))
    return replace(row, here=here, verdict=verdict, setting=own[best])
