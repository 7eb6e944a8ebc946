"""docs/claims.md, the paper claim by claim: what it says, what was measured here, and a verdict, from the records alone.

  python -m lab.report.claims                  writes docs/claims.md again from results/
  python -m lab.report.claims --quick          measures three claims anew, beside their records: a minute on two cores
  python -m lab.report.claims --check FOLDER   checks somebody's record of a run, and prints it as rows of the page

The rule of a verdict is lab.report.verdicts.judge.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, median

from lab.bench.regimes import find_hits
from lab.moe.probe import mean_of
from lab.report import evidence, pictures, regimes
from lab.report.compare import Paired
from lab.report.records import MODEL, RESULTS, data_name, key_of, merge, probes_of, read_all
from lab.report.tables import fold, header, spread
from lab.report.verdicts import (
    NOT_RUN,
    NOT_TESTABLE,
    Row,
    Setting,
    by_claim,
    is_above,
    is_open,
    join,
    no_lead,
    own_gaps,
    say_gap,
    series,
)
from lab.run.cli import Parser, UserError, path, run_main, say
from lab.run.options import label
from lab.run.reading import check_kinds
from lab.run.runs import ROOT, read_record

# ---- 1. The page ----

HEAD = """# The paper, claim by claim

The models here have a few thousand to 44 million parameters, each trained on one kind of data; only the measurements of time
and memory (table 11) are of larger ones. Nothing here says what happens at 1.6 billion.
"""
WORDS = """\
Words: MiniLM is `all-MiniLM-L6-v2`, which was trained on pairs of sentences, MNLI's among them. *ce* is STGC with the
paper's loss in two passes, *ce-one* in one pass (`stgc_plus.py`), *mse* and *reroute* are other losses. The *placebo*
(placebo-mse, ...) gives the same loss to as many pairs drawn by dice, *flat* to all pairs; *random*, or dice, draws the
experts of each token and has no loss of the router. *8Top2*: 8 experts, 2 per token. A *linear* or *cosine* router
scores them. Experts are *copies* of one FFN, or *parts* of it: split by its neurons. Stages I, II, III: as in MoE-LLaVA,
the last trains the experts. The *conflict ratio* is the share of flagged pairs, *consistency* the mean cosine of the
gradients on an expert. *Weight not 1*: with 1 expert per token and no normalization, a level router also shrinks the
layer's output, which dice do not. *Points*: 100 times Matthews' correlation (CoLA), the mean of accuracy and F1 (MRPC),
% of right answers (the others). The toy LVLM is scored once, at its end.

`python -m lab.report.claims` writes this page from the records in `results/`. In the commands `models/` and `data/`
are local copies of the hub's `sentence-transformers/all-MiniLM-L6-v2` and `nyu-mll/glue`, and `runs/` holds what other
commands made: `runs/lvlm-base-s0` the dense stages of `python toy_lvlm.py --variants none,random --seeds 0 --no-film
--output-dir runs/lvlm-base-s0`, `runs/lvlm-probe` a copy of what made `results/lvlm-stages`, the others the folder of that
name in a command of this page or in [results/](../results/README.md)."""
LOSS = """\
The conflict loss lowers a token's score on the expert where it conflicts, and never says where the token shall go. Nor does
it rest when the token has moved: a flag depends on the batch's mean gradient, every batch flags pairs, and in many trained
models another batch flags other ones (kappa, below). So a token meets the loss on every expert in turn, and what remains is
a router whose scores are nearly equal: its *margin* (the probability of the last chosen expert minus that of the first one
not chosen) shrinks as beta grows, and tokens keep changing experts (*moved*: the share of a batch's tokens whose first
expert differs some steps later).

Restless routing can help where a model overfits few noisy data (in the settings below dice gain there, the levelled router
hardly), and it costs where experts have learnt different things. The placebo and flat do the same to the router, so what is
STGC's own is the difference to these, not to the baseline. Below are medians of small synthetic settings
(`results/regimes.json`), without Top-1 whose weight is not 1."""
RULE = """\
A score is compared by paired 95 % t-intervals over the seeds. The first rule that fits gives the verdict:

| verdict | where |
| --- | --- |
| not run; one seed | there is no interval |
| routing does not matter here | baseline minus dice holds 0 or lies below: that routing matters is not shown |
| inconclusive | the gain over the baseline holds 0 and the paper's gain |
| not reproduced | the gain ends below the paper's, and begins at or below 0 |
| smaller than the paper's | the gain lies above 0 and below the paper's |
| reproduced | the gain lies above 0 and reaches the paper's; the differences from placebo and flat lie above 0 |
| the control does as well | gain and placebo lie above the baseline, their difference holds 0 (curves: they do the same) |
| a gain, the selection undecided | the rest |
| not testable here | too large a model, experts that are equal, or no usable setting of the toy LVLM in four tries |
| measured; usable | a question that the paper does not ask; the toy LVLM as a judge of routing |

The paper's gains have one digit, and an upper end is rounded to it. In brackets: which control was not run, what the
last epoch would give, or which value is better that the paper did not try. Best epochs are
chosen on dev, as in the paper's source; the last epoch stands beside them. Every other claim names its rule in brackets. On
the toy LVLM a half width above 0.7 points leaves small differences open. Where a repeated run differs by some points, no
difference of one seed means anything."""


def usable(records: list[dict]) -> list[Setting]:
    """The settings that compare something with the baseline, real data first. One that was run without a baseline has that
    of another beta or tau, which train it no differently, and so have dice. Dice have no balance loss, either: a baseline
    without dice has those of another alpha. The loss on every pair compares nothing with tau: a baseline without it has that
    of another tau. DynMoE's gate stands beside the cosine router as a variant."""
    found = [Setting(record) for record in merge(records)]
    join_gates(found)
    lend(found, ("none", "random"), ("beta", "tau"), lambda setting: "none" not in setting.variants)
    lend(found, ("random",), ("alpha",), lambda setting: "none" in setting.variants and "random" not in setting.variants)
    lend(found, ("flat",), ("tau",), lambda setting: "none" in setting.variants and "flat" not in setting.variants)
    found = [s for s in found if "none" in s.variants and len(s.variants) > 1]
    return sorted(found, key=lambda s: (s.record["name"].startswith("toy"), s.record["name"]))


def join_gates(settings: list[Setting]) -> None:
    """The baseline with DynMoE's gate becomes the variant `dynmoe` of the setting that differs in the router alone."""
    for pair in series(settings, "router", "cosine", "none", also=("max_experts",)):
        if "dynmoe" in pair:
            record, gate = pair["cosine"].record, pair["dynmoe"]
            record["runs"] += [run | {"variant": "dynmoe"} for run in gate.runs("none")]
            record["command"] += gate.record["command"]


def lend(settings: list[Setting], names: tuple[str, ...], options: tuple[str, ...], needs: Callable) -> None:
    """Gives the settings that need them the runs of these variants from the one that differs in `options` alone."""
    free = dict.fromkeys(options)
    keys = [key_of(setting.record | {"config": setting.record["config"] | free}) for setting in settings]
    bases = {key: setting for key, setting in zip(keys, settings) if names[0] in setting.variants and not setting.borrows}
    for key, setting in zip(keys, settings):
        if needs(setting) and key in bases:
            commits, lent = {run["commit"] for run in setting.record["runs"]}, {}
            pool = [run for run in bases[key].measured() if run["variant"] in names]
            for run in sorted(pool, key=lambda run: run["commit"] in commits):  # of the same commit, else the newest
                lent[run["variant"], run["seed"], run["lr"]] = run | {"lent": True}
            setting.record["runs"] = [*lent.values(), *setting.record["runs"]]


@dataclass
class Search:
    """What the search over small synthetic settings found (lab.bench.regimes). A pair of counts: better, and worse."""

    settings: int
    intervals: int  # that were computed for all these counts
    matters: int  # where the learned router beats dice
    seeds: int
    restless: list[tuple[Paired, Paired]]  # where dice beat the learned router: dice, and ce at the largest beta
    hits: dict[float, int]  # beta -> where ce beats baseline and placebo, at the last step or the best checkpoint
    change: dict[float, float]  # beta -> median change of accuracy by ce where routing matters, in points
    margin: dict[float, float]  # beta -> median of the router's margin, of the baseline's
    moved: dict[float, float]  # beta -> median share of moved tokens, with 0.0 for the baseline
    dice_moved: float
    choice: dict[float, list[tuple[int, int]]]  # beta -> ce against placebo and flat
    one: dict[str, tuple[int, int]]  # ce-one at the largest beta, against ce and its own placebo
    between: float  # the largest difference of the medians of ce, placebo and flat at one beta, in points
    apart: dict[str, list[Paired]]  # experts trained apart: ce, and the loss on long gradients, minus the placebo


def read_search() -> Search:
    runs = regimes.runs_of(record := regimes.read_record(RESULTS / "regimes.json"))
    names = regimes.sound(record, regimes.settings_of(record, runs))
    dice = {name: regimes.gap(runs, name, regimes.RANDOM) for name in names}
    matters = [name for name in names if dice[name].verdict == "worse"]
    restless = [name for name in names if dice[name].verdict == "better"]
    seeds = sorted({run[3] for run in record["runs"] if run[3] < regimes.FIRST_FRESH})
    hits = [at for _, at in find_hits([run for run in record["runs"] if run[0] in names], names, seeds)]
    change, choice, between = {}, {}, 0.0
    for beta in regimes.BETAS:
        change[beta] = median(regimes.gap(runs, name, ("ce", beta)).mean for name in matters)
        choice[beta] = [regimes.wins(runs, names, ("ce", beta), (other, beta)) for other in ("placebo", "flat")]
        middles = [median(regimes.gap(runs, name, (variant, beta)).mean for name in names) for variant in regimes.DOSED]
        between = max(between, max(middles) - min(middles))
    moved = {beta: median(regimes.average(runs, name, ("ce", beta), "moved") for name in names) for beta in regimes.BETAS}
    most, apart = max(regimes.BETAS), {}
    trained = [name for name in names if record["settings"][name].get("start") == "trained"]
    for variant in ("ce", "long"):
        sides = (variant, most), ("placebo", most)
        apart[variant] = [regimes.gap(runs, n, *sides) for n in trained if all((n, *side) in runs for side in sides)]
    return Search(
        settings=len(names),
        # dice; ce against baseline, placebo (at the last step and the best checkpoint) and flat; one pass against two others
        intervals=len(names) * (1 + len(regimes.BETAS) * (2 + 2 + 1) + 2),
        matters=len(matters),
        seeds=len(seeds),
        restless=[(dice[name], regimes.gap(runs, name, ("ce", most))) for name in restless],
        hits={beta: hits.count(beta) for beta in regimes.BETAS},
        change=change,
        margin={beta: regimes.median_margin(runs, names, ("ce", beta)) for beta in regimes.BETAS},
        moved=moved | {0.0: median(regimes.average(runs, name, regimes.NONE, "moved") for name in names)},
        dice_moved=median(regimes.average(runs, name, regimes.RANDOM, "moved") for name in names),
        choice=choice,
        one={other: regimes.wins(runs, names, ("ce-one", most), (other, most)) for other in ("ce", "placebo-one")},
        between=between,
        apart=apart,
    )


def sentences(settings: list[Setting], records: list[dict], search: Search) -> list[str]:
    """Five sentences that a busy reader can quote."""
    gains, routing, selection = say_gains(settings), say_routing(settings), say_selection(settings, search)
    return [gains, routing, selection, say_flags(records), say_dose(search)]


def say_gains(settings: list[Setting]) -> str:
    known = own_gaps(settings, "ce", "none")
    seeds = max(gap.seeds for _, gap in known)
    most = [(setting, gap) for setting, gap in known if gap.seeds == seeds]
    gaps = [f"{say_gap(gap)} points ({one.brief}, beta {one.record['config']['beta']:g})" for one, gap in most]
    text = f"Over {seeds} paired seeds STGC minus its baseline is {listed(gaps)}"
    if even := sum(no_lead(setting.gap("none", "random")) for setting, _ in most):
        which = "there" if even == len(most) else f"in {even} of these {len(most)}"
        text += f"; {which} the baseline is not shown to beat experts drawn by dice, so its scores cannot judge a routing"
    return f"{text}."


def say_routing(settings: list[Setting]) -> str:
    dice = own_gaps(settings, "none", "random")
    lead = [setting for setting, gap in dice if gap.low > 0]
    text = f"The learned router beats dice in {len(lead)} of the {len(dice)} settings with text or pictures where both were "
    text += "run with two seeds or more"
    gaps = [(setting, gap) for setting in lead if (gap := setting.gap("ce", "none"))]
    if gaps:
        gaps.sort(key=lambda pair: pair[0].record["config"]["top_k"] == 1)  # its weight may not be 1
        betas = listed([f"{beta:g}" for beta in sorted({one.record["config"]["beta"] for one, _ in gaps})])
        text += f"; there STGC at beta {betas} minus the baseline is "
        text += listed([f"{say_gap(gap)} points ({setting.brief})" for setting, gap in gaps])
    if below := [-gap.mean for setting in lead if (gap := pictures.above_dense(setting)) and gap.mean < 0]:
        points = " to ".join(dict.fromkeys(f"{value:.0f}" for value in (min(below), max(below))))
        text += f"; in {len(below)} of them the baseline lies {points} points below "
        text += "the dense model that its experts were cut from"
    return f"{text}."


def say_selection(settings: list[Setting], search: Search) -> str:
    known, hits = own_gaps(settings, "ce", "placebo"), max(search.hits.values())
    above = [f"{say_gap(gap)} points, {setting.brief}" for setting, gap in known if is_above(gap)]
    text = "STGC beats its placebo, the same loss on as many pairs drawn by dice, in "
    text += f"{len(above)} of the {len(known)} such settings where both were run with two seeds or more"
    text += f" ({listed(above)}; by chance {len(known) / 40:.1f})" if above else ""
    many = f"at most {hits}" if hits else "none"
    return f"{text}; it beats placebo and baseline in {many} of {search.settings} synthetic ones."


def say_flags(records: list[dict]) -> str:
    text = "Would other batches flag the same tokens? Kappa, their agreement beyond chance (1 is full), is, model by model "
    return f"{text}as their main loss falls, {'; '.join(kappas(records))}."


def kappas(records: list[dict]) -> Iterator[str]:
    """By data: kappa of each probed model, as the main loss falls."""
    for name, probes in probes_of(records).items():
        values = [f"{probe['kappa']:.2f}" for probe in probes]
        yield f"{', '.join(values)} ({name})"


def listed(parts: list[str]) -> str:
    """As in "a, b and c"."""
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def say_dose(search: Search) -> str:
    margin, change = ({beta: own[beta] for beta in (max(own), min(own))} for own in (search.margin, search.change))
    says = [
        f"{100 * margin[beta]:.0f} % at beta {beta:g} ({change[beta]:+.1f} points where routing matters)" for beta in margin
    ]
    text = "Of the router's margin, the last chosen expert's lead over the next, the loss leaves "
    return f"{text}{' and '.join(says)}; medians of synthetic settings."


def synthetic(search: Search) -> Iterator[str]:
    """Markdown: what the synthetic settings say of the loss, of restless routing, and of the choice of pairs, with a
    picture."""
    count = search.settings
    heads = ["beta", "margin / the baseline's", "moved", "points where routing matters", "beats baseline and placebo"]
    yield from header(*heads, "against its placebo", "against flat")
    for beta in search.margin:
        cells = [f"{beta:g}", f"{search.margin[beta]:.2f}", f"{search.moved[beta]:.2f}", f"{search.change[beta]:+.1f}"]
        cells.append(f"{search.hits[beta]} of {count}")
        yield f"| {' | '.join([*cells, *(f'{better}+ {worse}-' for better, worse in search.choice[beta])])} |"
    yield from ("", "2+ 1-: by the interval better in two settings, worse in one. Points and counts are of the last step;")
    text = "where both baseline and placebo are beaten the best checkpoint counts, too. Moved of the baseline: "
    yield from (f"{text}{search.moved[0.0]:.2f}, of dice: {search.dice_moved:.2f}.", "")
    text = f"The router beats dice in {search.matters} of the {search.settings} settings, with {search.seeds} seeds each; "
    text += f"dice beat the router in {len(search.restless)}"
    if search.restless:
        dice, ce = zip(*search.restless)
        better = sum(gap.verdict == "better" for gap in ce)
        text += f", by {median(gap.mean for gap in dice):.1f} points in the median. There STGC at beta "
        text += f"{max(search.margin):g} beats the baseline in {better}; its median is {median(gap.mean for gap in ce):+.1f}"
    yield f"{text}."
    yield from ("", "![accuracy over the router's margin, in small synthetic settings](../results/regimes.png)", "")
    pairs = [pair for pairs in search.choice.values() for pair in pairs]
    (above, below), tried = map(sum, zip(*pairs)), search.settings * len(pairs)
    chance = tried / 40  # of intervals of 95 % one in forty lies above 0
    text = "One line or several? "
    if search.between < 1 and above <= chance:
        text += "One, as far as it is known" if below <= chance else "Nearly one; where they differ, ce is the worse one"
    else:
        text += "Several"
    text += f". At any beta the medians of ce, placebo and flat differ by at most {search.between:.2f} points. At the last "
    text += f"step ce is better than placebo or flat in {above} of {tried} comparisons and worse in {below}; chance alone "
    yield f"{text}gives {chance:.1f} of each."


def searched(search: Search) -> Iterator[str]:
    """What the synthetic settings say of one pass, and of experts that were trained apart."""
    text = "With both losses held to the router, as in one pass, accuracy at beta {:g} is better than with two passes in "
    text += "{} settings and worse in {}; than with its own placebo it is better in {} and worse in {}."
    yield text.format(max(search.margin), *search.one["ce"], *search.one["placebo-one"])
    ce, long = (" and ".join(map(say_gap, search.apart[variant])) for variant in ("ce", "long"))
    text = "Where each expert was trained on one task and a new router learns to choose (task mark strong, and weak), ce "
    yield f"{text}minus its placebo is {ce} points; with the loss on the pairs of the longest gradients it is {long}."


def say_alone(rows: list[Row]) -> Iterator[str]:
    """What training on the conflict loss alone does, counted over the models where it can be told."""
    texts = []
    for what in ("the conflict ratio falls", "consistency rises"):
        counts = []
        for part in ("routers", "everything"):
            alone = [row.verdict for row in rows if f"trains {part}: {what} (" in row.claim]
            alone = [verdict for verdict in alone if not is_open(verdict) and not verdict.startswith(NOT_TESTABLE)]
            counts.append(f"{alone.count('reproduced')} of {len(alone)}")
        texts.append(counts)
    text = (
        "On the conflict loss alone (figures 3 and 8) the conflict ratio falls, by more than with the placebo and flat, in "
    )
    text += "{} models whose routers train and in {} that train as a whole; consistency rises so in {} and {}."
    yield text.format(*texts[0], *texts[1])
    yield "A model that trains as a whole forgets its task then: the rows show its main loss."


def router_table(settings: list[Setting], tags: dict[int, str]) -> Iterator[str]:
    """Markdown: the router's margin at the end of training, as a share of the baseline's, and the share of moved tokens."""
    yield from header("setting", "variant", "margin / the baseline's", "seeds", "moved, mean over layers", "after steps")
    for setting in settings:
        ratios = {name: evidence.margins_of(setting, name) for name in setting.variants if name != "random"}
        for name, own in ratios.items():
            if own and any(ratios[other] for other in ratios if other != "none"):
                probes = [run["probe"][-1] for run in setting.measured(name) if run.get("probe")]
                moved = [mean_of([layer["moved"] for layer in probe["layers"]]) for probe in probes]
                moved = [value for value in moved if value is not None]
                cells = [tags[id(setting)], label(name), spread([*own.values()], 2), str(len(own))]
                cells += [spread(moved, 2), ", ".join(sorted({str(probe["delta"]) for probe in probes}))] if moved else "--"
                yield f"| {' | '.join(cells)} |"


def render(records: list[dict]) -> str:
    """docs/claims.md."""
    settings, search = usable(records), read_search()
    tags = {id(setting): f"S{number}" for number, setting in enumerate(settings, 1)}
    rows = evidence.all_rows(settings, records)
    told = [f"{number}. {text}" for number, text in enumerate(sentences(settings, records, search), 1)]
    lines = [HEAD, *told, "", WORDS, "", "## What the loss does to the router", "", LOSS, ""]
    lines += [*synthetic(search), ""]
    lines += fold("with one pass, experts trained apart, the conflict loss alone", [*searched(search), *say_alone(rows)])
    lines += fold("in the settings with text or pictures (S1, ...: see the end)", [*router_table(settings, tags)])
    commands: dict[str, str] = {}
    for row in rows:
        if row.command:
            commands.setdefault(row.command, f"C{len(commands) + 1}")
    table = [*header("in the paper", "claim", "paper", "here", "verdict", "see"), *join(rows, tags, commands)]
    claims = by_claim(rows)
    only = lambda what: sum(all(row.verdict.startswith(what) for row in own) for own in claims.values())  # noqa: E731
    title = f"{len(claims)} claims and questions, {only(NOT_RUN)} of them not run, {only(NOT_TESTABLE)} not testable"
    lines += [f"## {title}", "", RULE, "", *table, ""]
    at = len(lines)
    lines += ["![kappa of the flags by other batches, over the main loss](../results/probe.png)", "", "## The settings", ""]
    for setting in settings:
        tag = tags[id(setting)]
        parts = [setting.table(), setting.training(), pictures.capacity_table(setting), setting.notes()]
        parts.append(f"    {one}" for one in setting.record["command"])
        lines += [f'<a id="{tag.lower()}"></a>', ""]
        lines += fold(f"{tag}: {setting.title}", [line for part in parts if (own := [*part]) for line in (*own, "")][:-1])
    lines += ["## Commands", "", *(f'- <a id="{tag.lower()}"></a>{tag}: `{command}`' for command, tag in commands.items())]
    count = len(re.findall(r"\[[+-][\d.]+, [+-][\d.]+\]", "\n".join(lines)))
    text = f"{count} intervals stand on this page, some twice, and {search.intervals} are behind the synthetic counts."
    lines[at:at] = [f"{text} Of twenty, one misses by chance; no correction is made.", ""]
    return "\n".join(lines).rstrip() + "\n"


def front(records: list[dict]) -> Iterator[str]:
    """Markdown: the six rows of README, (claim, paper, here, verdict), each from the row that says most."""
    settings, search = usable(records), read_search()
    rows = evidence.all_rows(settings, records)

    def most(claim: str) -> Row:
        """Of the setting with the most seeds, of those that can judge a routing if there is one."""
        own = [row for row in rows if row.claim.startswith(claim)]
        able = [row for row in own if row.setting and is_above(row.setting.gap("none", "random"))]
        return max(able or own, key=lambda row: len(row.setting.scores("ce")) if row.setting else 0)

    found = []
    for claim in ("STGC gains on", "STGC gains with Top-2"):
        row = most(claim)
        gap, control = row.setting.gap("ce", "none"), row.setting.gap("ce", "placebo")
        here = f"{say_gap(gap)} points, {gap.seeds} seeds ({row.setting.brief}); minus placebo {say_gap(control)}"
        name = re.split(r",| \(", row.claim)[0]  # without the number of examples, and without what the paper has
        found.append(replace(row, claim=f"{name} ({row.where})", paper=f"{row.paper} points", here=here))
    row = most("do other batches give the same flags")
    here = f"kappa, as the main loss falls: {'; '.join(kappas(records))}"
    found.append(replace(row, claim="a flag tells about the token: other batches flag it, too", here=here))
    row = most("similarities by biases")
    own = [one for one in rows if one.claim == row.claim and one.setting]
    parts: dict[str, list[float]] = {}
    for one in own:
        values = evidence.probed(evidence.filmed(one.setting), "bias_weight")
        parts.setdefault(data_name(one.setting.record), []).extend(values)
    here = "; ".join(f"{name} {min(values):.2f} to {max(values):.2f}" for name, values in parts.items())
    verdict = " / ".join(dict.fromkeys(one.verdict for one in own)) or row.verdict
    found.append(replace(row, claim=f"biases tell what whole weights tell ({row.where})", here=here, verdict=verdict))
    row = most("without the conflicting pairs")
    harms = [one["harm"]["fresh"] for record in records for one in record.get("probes", []) if one.get("harm")]
    values = [fresh["no conflicting"]["minus_all"][1][0] for fresh in harms]
    here = f"loss {min(values):+.4f} to {max(values):+.4f}, {len(values)} models"
    found.append(replace(row, claim=f"without conflicting pairs a step lowers a fresh loss more ({row.where})", here=here))
    own, doses = ", ".join(f"{change:+.1f}" for change in search.change.values()), cola_doses(settings)
    here = f"by beta: {say_margins(search.margin)}, medians of {search.settings} synthetic settings; {own} "
    here += f"points in those {search.matters} where routing matters{f'; on CoLA {say_margins(doses)}' if doses else ''}"
    found.append(Row("new", "what the loss leaves of the router's margin", "not asked", here, "measured"))
    for row in found:
        yield f"| {row.claim} | {row.paper} | {row.here} | {row.verdict} |"


def say_margins(ratios: dict[float, float]) -> str:
    return ", ".join(f"{ratio:.2f} at {beta:g}" for beta, ratio in ratios.items())


def cola_doses(settings: list[Setting]) -> dict[float, float]:
    """The largest and the smallest beta -> the share of the baseline's margin that STGC leaves, of MiniLM on CoLA with the
    default router and experts: the mean over the seeds where it is known."""
    usual, known = {"router": "cosine", "experts": "copy"}, {}
    for setting in (one for one in settings if one.record["name"] == "cola"):
        config, ratios = setting.record["config"], evidence.margins_of(setting, "ce")
        if ratios and usual.items() <= config.items() and Path(config["model"]).name == MODEL:
            known[config["beta"]] = mean(ratios.values())
    return {beta: known[beta] for beta in (max(known), min(known))} if known else {}


# ---- 2. Others' records ----

NEEDED = ("command", "commit", "versions", "data", "made_from")
# option -> its values in the paper's experiments that a record is compared with; on GLUE, and of the LVLMs
PAPER = {"beta": {1.0}, "tau": {0.0}, "alpha": {0.01}, "router": {"linear"}, "experts": {"copy"}}
SIZES = {"glue": {"model": {"bert-large"}, "num_experts": {8}, "top_k": {2}}, "lvlm": {"num_experts": {4}, "top_k": {1, 2}}}


def check(folder: Path) -> list[str]:
    """The rows of somebody's record. UserError if it is not complete, not paired, or not of a clean checkout."""
    record = read_record(folder, "--check")
    if record is None:
        raise UserError(f"--check {folder}: no results.json is there; give the --output-dir of a run")
    if missing := [name for name in NEEDED if not record.get(name)]:
        raise UserError(f"--check {folder}: its record has no {', '.join(missing)}; train with a newer version")
    try:
        check_kinds(record["config"], "its config", num_experts=int, top_k=int, router=str, beta=float | int)
        check_kinds(record["data"], "its data", train=int)
    except ValueError as error:
        raise UserError(f"--check {folder}: {error}; give the record as it was written") from None
    parts = [record, *record.get("resumed", [])]
    if any(part.get("dirty") is not False for part in parts):
        raise UserError(f"--check {folder}: it was made by changed files (dirty); commit them, and train again")
    (setting,) = [Setting(one) for one in merge([record])]
    if fault := find_fault(setting):
        raise UserError(f"--check {folder}: {fault}")
    rows = [row for row in (*evidence.glue_rows([setting]), *pictures.lvlm_rows([setting])) if row.verdict != NOT_RUN]
    rows = rows or [Row("-", "no claim of the paper is about this setting", "-", verdict="-", setting=setting)]
    table = [*header("in the paper", "claim", "paper", "here", "verdict", "see"), *join(rows, {id(setting): ""}, {})]
    made_by = dict.fromkeys(", ".join(f"{name} {version}" for name, version in part["versions"].items()) for part in parts)
    return [setting.title, "", *table, "", other_options(record["config"]), f"Made with {'; resumed with '.join(made_by)}."]


def find_fault(setting: Setting) -> str:
    """What is missing, double or impossible in a record, with the fix; empty if nothing is."""
    config, runs = setting.record["config"], setting.record["runs"]
    done = set()
    for run in runs:
        key = (run["variant"], run["lr"], run["seed"])
        if key in done:
            return f"{run['variant']}, seed {run['seed']} is there twice; give the record as it was written"
        if not all(abs(scores["score"]) <= 1 for scores in (run.get("best") or run["last"], run["last"])):
            return f"a score of {run['variant']}, seed {run['seed']} is not in [-1, 1]; give the record as it was written"
        done.add(key)
    rates = config.get("lrs") or sorted({lr for _, lr, _ in done})
    for variant, lr in product(config.get("variants") or [], rates):
        if lacking := [seed for seed in config.get("seeds", []) if (variant, lr, seed) not in done]:
            what = f"{variant}{f', lr {lr:g}' * (len(rates) > 1)}, seed{'s' * (len(lacking) > 1)} "
            return f"it is not finished, {what}{', '.join(map(str, lacking))} is missing; finish it with --resume"
    seeds = {variant: {run["seed"] for run in setting.runs(variant)} for variant in setting.variants}
    if "none" not in seeds or len(seeds) < 2:
        return "it compares nothing with the baseline; train with --variants none,ce,placebo"
    for variant, own in seeds.items():
        if own != seeds["none"]:
            other = ", ".join(map(str, sorted(own ^ seeds["none"])))
            return f"{variant} and none differ in seeds {other}; finish the run with --resume"
    return ""


def other_options(config: dict) -> str:
    """Which options of a record are not those of the paper."""
    paper = PAPER | SIZES["glue" if "epochs" in config else "lvlm"]
    own = {name: config[name] for name in paper if name in config}
    if "bert-large" in str(own.get("model")):  # of whatever folder
        own["model"] = "bert-large"
    other = {name: value for name, value in own.items() if value not in paper[name]}
    texts = [f"{name} {value} ({' or '.join(map(str, sorted(paper[name])))})" for name, value in other.items()]
    return f"Not as in the paper: {', '.join(texts)}." if other else "These options are as in the paper."


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
