"""The record of lab.bench.regimes: tables of paired differences in points of accuracy, and a picture.

  python -m lab.report.regimes                 results/regimes.json; the picture is written beside it, as regimes.png
  python -m lab.report.regimes RECORD.json     another record

"2+ 1-": in two settings the paired 95 % interval lies above 0, in one below. No correction for the number of intervals.
The picture leaves out Top-1 with a weight that is not 1.
"""

from itertools import product
from pathlib import Path
from statistics import mean, median

from lab.bench.regimes import BETAS, FIRST_FRESH, read_record
from lab.report.compare import Paired, paired
from lab.report.figures import plt, save
from lab.report.styles import style_of
from lab.run.cli import Parser, layout, path, run_main, say

NONE, RANDOM, FROZEN, ORACLE = ((name, None) for name in ("none", "random", "frozen", "oracle"))
DOSED = ("ce", "placebo", "flat")
MORE = ("ce-one", "placebo-one")  # newer: a record may lack them
CONTROL = {"ce-one": "placebo-one"}  # the placebo of a variant, if it is not `placebo`
PANELS = {  # the verdict of random - none -> title
    "better": "random beats none",
    "no difference": "random as good as none",
    "worse": "none beats random",
}
KEYS = {"accuracy": "last step", "best_accuracy": "best checkpoint"}
Runs = dict[tuple, dict[int, dict]]  # (setting, variant, beta) -> seed -> column -> value


def runs_of(record: dict) -> Runs:
    runs: Runs = {}
    for name, variant, beta, seed, *values in record["runs"]:
        runs.setdefault((name, variant, beta), {})[seed] = dict(zip(record["columns"][4:], values))
    return runs


def settings_of(record: dict, runs: Runs) -> list[str]:
    """The settings that have runs of all variants. A search that was stopped may lack some."""
    needed = [NONE, RANDOM, FROZEN, ORACLE, *((variant, beta) for variant in DOSED for beta in BETAS)]
    return [name for name in record["settings"] if all((name, *own) in runs for own in needed)]


def sound(record: dict, names: list[str]) -> list[str]:
    """Without the settings where levelling the router also shrinks the layer's output: one expert whose weight is not 1."""
    settings = record["settings"]
    return [name for name in names if settings[name]["top_k"] > 1 or settings[name].get("normalize")]


def gap(runs: Runs, name: str, own: tuple, other: tuple = NONE, key: str = "accuracy", fresh: bool = False) -> Paired:
    """own - other, variants with their betas, in points: over the seeds of the search, or over the fresh ones."""
    both = (runs[(name, *side)].items() for side in (other, own))
    return paired(*({seed: 100 * run[key] for seed, run in side if (seed >= FIRST_FRESH) == fresh} for side in both))


def wins(runs: Runs, names: list[str], own: tuple, other: tuple, key: str = "accuracy") -> tuple[int, int]:
    """In how many settings that have both a variant is better than another, and in how many worse, by the interval."""
    known = [name for name in names if {(name, *own), (name, *other)} <= runs.keys()]
    verdicts = [gap(runs, name, own, other, key).verdict for name in known]
    return verdicts.count("better"), verdicts.count("worse")


def average(runs: Runs, name: str, own: tuple, key: str, fresh: bool = False) -> float:
    return mean(run[key] for seed, run in runs[(name, *own)].items() if (seed >= FIRST_FRESH) == fresh)


def margin_ratio(runs: Runs, name: str, own: tuple) -> float:
    """The variant's mean margin over none's."""
    return average(runs, name, own, "margin") / average(runs, name, NONE, "margin")


def median_margin(runs: Runs, names: list[str], own: tuple) -> float:
    """The median of that ratio over settings."""
    return median(margin_ratio(runs, name, own) for name in names)


def summary_table(runs: Runs, names: list[str]) -> str:
    """By variant and beta: medians over the settings, and in how many of them it is better or worse than a control."""
    rows = [["variant", "beta", "minus none", "best", "than none", "placebo", "flat", "random", "margin / none's", "moved"]]
    whole = [own for own in product(MORE, BETAS) if all((name, *own) in runs for name in names)]
    for own in [NONE, RANDOM, FROZEN, ORACLE, *((variant, beta) for beta in BETAS for variant in DOSED), *whole]:
        variant, beta = own
        row = [variant, "" if beta is None else f"{beta:g}"]
        row += [f"{median(gap(runs, name, own, key=key).mean for name in names):+.1f}" for key in KEYS]
        for other in (NONE, (CONTROL.get(variant, "placebo"), beta), ("flat", beta), RANDOM):
            known = own != other and any((name, *other) in runs for name in names)
            row.append("{}+ {}-".format(*wins(runs, names, own, other)) if known else "")
        learned = own not in (RANDOM, ORACLE)
        row.append(f"{median_margin(runs, names, own):.3f}" if learned else "")
        row.append(f"{median(average(runs, name, own, 'moved') for name in names):.2f}")
        rows.append(row)
    return layout(rows)


def settings_table(runs: Runs, names: list[str], pairs: list[tuple[tuple, tuple]], key: str, fresh: bool = False) -> str:
    """By setting: none's accuracy in %, and the difference of each pair (own, other) with its interval."""
    heads = [f"{own[0]} {own[1] or ''}".strip() + (f" - {other[0]}" if other != NONE else "") for own, other in pairs]
    rows = [["setting", "none", *heads]]
    for name in names:
        row = [name, f"{100 * average(runs, name, NONE, key, fresh):.1f}"]
        for own, other in pairs:
            one = gap(runs, name, own, other, key, fresh) if {(name, *own), (name, *other)} <= runs.keys() else None
            interval = f" [{one.low:+.1f}, {one.high:+.1f}]" if one and one.low is not None else ""
            row.append(f"{one.mean:+.1f}{interval}" if one else "")
        rows.append(row)
    return layout(rows)


def draw(runs: Runs, names: list[str], target: Path) -> Path:
    """Accuracy against none over the margin, in a panel per verdict on random routing. An open mark is a setting at a beta;
    a line joins the medians of a variant over the settings, beta by beta."""
    groups: dict[str, list[str]] = {verdict: [] for verdict in PANELS}
    for name in names:
        verdict = gap(runs, name, RANDOM).verdict
        groups[verdict if verdict in PANELS else "no difference"].append(name)
    groups = {verdict: group for verdict, group in groups.items() if group}
    figure, axes = plt.subplots(1, len(groups), figsize=(4.2 * max(2, len(groups)), 4.2), squeeze=False, sharex=True)
    for axis, (verdict, group) in zip(axes[0], groups.items()):
        for variant in DOSED:
            colour, line, marker = style_of(variant)
            middle = []
            for beta in BETAS:
                points = [
                    (margin_ratio(runs, name, (variant, beta)), gap(runs, name, (variant, beta)).mean) for name in group
                ]
                axis.plot(*zip(*points), marker, color=colour, markersize=4, fillstyle="none", alpha=0.6)
                middle.append([median(values) for values in zip(*points)])
            axis.plot(*zip(*middle), line, marker=marker, color=colour, markersize=8, label=variant)
        still = [(margin_ratio(runs, name, FROZEN), gap(runs, name, FROZEN).mean) for name in group]
        colour, _, marker = style_of("frozen")
        axis.plot(*zip(*still), marker, color=colour, label="frozen router")
        dice = [gap(runs, name, RANDOM).mean for name in group]
        axis.hlines(dice, 0, 0.05, *style_of("random")[:2], transform=axis.get_yaxis_transform(), label="random (no margin)")
        axis.axhline(0, color="#777777", linewidth=0.8)
        axis.set(xscale="log", xlabel="router margin / that of none", title=f"{PANELS[verdict]}: {len(group)} settings")
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("accuracy - that of none,\npoints, last step")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return save(figure, target)


def main() -> None:
    parser = Parser(prog="lab.report.regimes", description=__doc__)
    parser.add_argument("record", nargs="?", type=path("file"), default="results/regimes.json", help="of lab.bench.regimes")
    file = Path(parser.parse_args().record)
    record = read_record(file)
    runs = runs_of(record)
    names = settings_of(record, runs)
    if not names:
        parser.error(f"{file}: no setting has runs of all variants; continue it: python -m lab.bench.regimes --resume")
    tables = {"medians over the settings; at the last step better and worse": summary_table(runs, names)}
    against_none = [(own, NONE) for own in (RANDOM, FROZEN, ORACLE, *(("ce", beta) for beta in BETAS))]
    against_placebo = [
        ((variant, beta), (CONTROL.get(variant, "placebo"), beta)) for variant in ("ce", "long", "ce-one") for beta in BETAS
    ]
    for key, when in KEYS.items():
        tables[f"minus none, {when}"] = settings_table(runs, names, against_none, key)
        tables[f"minus the placebo, {when}"] = settings_table(runs, names, against_placebo, key)
    for name, variant, beta in [key for key, seeds in runs.items() if key[1] == "ce" and max(seeds) >= FIRST_FRESH]:
        again = [((variant, beta), other) for other in (NONE, ("placebo", beta), ("flat", beta), RANDOM)]
        for key, when in KEYS.items():
            tables[f"{name}, a hit at beta {beta:g}, on fresh seeds, {when}"] = settings_table(
                runs, [name], again, key, fresh=True
            )
    for title, table in tables.items():
        say("", title, *table.splitlines())
    say("", str(draw(runs, sound(record, names), file.with_suffix(".png"))))


if __name__ == "__main__":
    run_main("lab.report.regimes", main, resumes=False)
