"""Comparison of variants, from records alone: paired differences over seeds, and the paper's table with our rows below.

A seed fixes the data order and the initial weights, so variants are compared seed by seed, by a 95 % t-interval of the mean
difference. The intervals are not corrected for their number: one of twenty misses by chance. All functions take `select`:

  best   the best epoch on dev, and per variant the learning rate whose best epochs have the highest mean score. This is how
         the published rows were made. It selects on the set that it reports, so it is biased upward.
  last   the last epoch. Nothing is selected: each learning rate has its own rows, with its own baseline.

Runs that were measured only once, at their end, on test data, have no `best`: their records support only `last`.
"""

from statistics import mean
from typing import NamedTuple

from scipy.stats import ttest_1samp

from lab.report.tables import spread
from lab.run.cli import layout, printable
from lab.run.options import label
from lab.text.tasks import TITLES

BASELINE = "none"
FIRST = ("dense", BASELINE)  # the rows at the top
PUBLISHED = {  # the paper's GLUE table: the five columns, then Avg
    "MoE-8Top2 (DynMoE's)": (64.5, 90.2, 92.4, 86.7, 74.9, 81.7),
    "DynMoE": (65.2, 90.6, 92.6, 86.4, 73.4, 81.6),
    "MoE-8Top2 (re-run)": (64.5, 90.0, 93.4, 86.9, 72.9, 81.5),
    "+ STGC": (66.8, 91.2, 93.8, 87.6, 74.7, 82.8),
}


class Paired(NamedTuple):
    """A variant minus the baseline, over the seeds that both have."""

    mean: float
    low: float | None  # 95 % t-interval; None if the seeds give none
    high: float | None
    wins: int
    ties: int
    seeds: int

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return "one seed, no interval" if self.seeds == 1 else "no spread, no interval"
        return "no difference" if self.low <= 0 <= self.high else ("better" if self.low > 0 else "worse")


def paired(baseline: dict[int, float], other: dict[int, float]) -> Paired:
    """The mean difference of two variants and its interval. Both are given as seed -> score, in any unit.

    Differences below 1e-9 are ties. One seed gives no interval. Several seeds with equal differences other than 0 give none
    either: dev scores change in steps of one example, so a spread of 0 is chance and would make any difference look
    certain. If all are ties, the interval is [0, 0]. ValueError if no seed is shared.
    """
    shared = sorted(baseline.keys() & other.keys())
    if not shared:
        raise ValueError(f"no seed in common: the baseline has {sorted(baseline)}, the other {sorted(other)}")
    gaps = [round(other[seed] - baseline[seed], 9) for seed in shared]
    wins, ties = sum(gap > 0 for gap in gaps), gaps.count(0)
    low = high = None
    if len(set(gaps)) > 1:
        low, high = map(float, ttest_1samp(gaps, 0).confidence_interval(0.95))
    elif len(gaps) > 1 and ties:
        low = high = 0.0
    return Paired(mean(gaps), low, high, wins, ties, len(gaps))


class Row(NamedTuple):
    """A row of a table: all seeds of a variant at one learning rate."""

    variant: str
    lr: float
    label: str  # the variant, with its learning rate if the record has several
    scores: dict[int, dict[str, float]]  # seed -> metrics in [0, 1], Matthews in [-1, 1]
    collapsed: set[int]  # seeds whose model predicts only one class

    def of(self, metric: str) -> dict[int, float]:
        """seed -> the metric in %."""
        return {seed: 100 * scores[metric] for seed, scores in self.scores.items()}


def in_order(variants) -> list[str]:
    """Each variant once: `dense` and the baseline first, then the others in the given order."""
    return sorted(dict.fromkeys(variants), key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def has_best(record: dict) -> bool:
    """Whether the runs selected a best epoch on dev. Otherwise they were measured once, on test data."""
    return all("best" in run for run in record["runs"])


def select_rows(record: dict, select: str) -> list[Row]:
    """The rows of a record; see the module's docstring for `select`.

    `best` selects among the learning rates with the most seeds of the variant (all rates, unless runs are missing), and the
    lowest of equal ones. `last` sorts by rate first. ValueError for an unknown `select`, for `best` if a run has none, for
    no runs, and for a run that occurs twice.
    """
    if select not in ("best", "last"):
        raise ValueError(f"select={select!r}: use best or last")
    if select == "best" and record["runs"] and not has_best(record):
        raise ValueError(f"{record['name']} has runs without a best epoch: use select='last'")
    grid: dict[tuple[str, float], dict[int, dict]] = {}
    for run in sorted(record["runs"], key=lambda run: run["seed"]):
        runs = grid.setdefault((run["variant"], run["lr"]), {})
        if run["seed"] in runs:
            raise ValueError(f"{record['name']}: {run['variant']}, seed {run['seed']}, lr {run['lr']:g} is there twice")
        runs[run["seed"]] = run
    if not grid:
        raise ValueError(f"{record['name']} has no runs to compare")
    rates, variants = sorted({lr for _, lr in grid}), in_order(run["variant"] for run in record["runs"])
    keys = [(variant, lr) for lr in rates for variant in variants if (variant, lr) in grid]
    if select == "best":
        rank = {key: (len(runs), mean(run["best"]["score"] for run in runs.values()), -key[1]) for key, runs in grid.items()}
        keys = [max((key for key in keys if key[0] == variant), key=rank.get) for variant in variants]
    rows = []
    for variant, lr in keys:
        scores = {seed: run[select] for seed, run in grid[variant, lr].items()}
        collapsed = {seed for seed, run in grid[variant, lr].items() if run["collapsed"]}
        rows.append(Row(variant, lr, variant if len(rates) == 1 else f"{variant}, lr {lr:g}", scores, collapsed))
    return rows


def metric_names(record: dict) -> list[str]:
    """The task's metrics that all runs have. `score`, their mean, is included only if it differs from all of them: for RTE
    it is the accuracy, for MNLI the matched accuracy. Entries that are not numbers are left out.
    """
    entries = [run[select] for run in record["runs"] for select in ("best", "last") if select in run]
    names = [name for name, value in entries[0].items() if isinstance(value, (int, float))]
    names = [name for name in names if name not in ("epoch", "score", "dev_loss") and all(name in own for own in entries)]
    return names + ["score"] * (not any(all(entry[name] == entry["score"] for entry in entries) for name in names))


def gap_to_baseline(row: Row, rows: list[Row], select: str, metric: str = "score") -> tuple[Row, Paired] | None:
    """The baseline's row, under `last` that of the same learning rate, and the difference from it; None without a shared
    seed."""
    for base in rows:
        if base.variant == BASELINE != row.variant and (select == "best" or base.lr == row.lr):
            if base.scores.keys() & row.scores.keys():
                return base, paired(base.of(metric), row.of(metric))
    return None


def comparison_table(record: dict, select: str = "best") -> str:
    """Per metric and variant, in %: mean ± sample standard deviation, difference from the baseline, seeds won, verdict.

    The line above the table names the selection. Differences need the baseline, another variant and a shared seed;
    otherwise they are left out.
    """
    rows = select_rows(record, select)
    lines = [["metric", "variant", "seeds", "mean ± std", f"minus {label(BASELINE)} [95 %]", "won", "verdict", "collapsed"]]
    for metric in metric_names(record):
        for row in rows:
            values = row.of(metric)
            line = [metric, label(row.label), str(len(values)), spread(list(values.values())), "", "", ""]
            if found := gap_to_baseline(row, rows, select, metric):
                _, gap = found
                interval = "" if gap.low is None else f" [{gap.low:+.1f}, {gap.high:+.1f}]"
                won = f"{gap.wins} of {gap.seeds}" + (f", {gap.ties} tied" if gap.ties else "")
                line[4:] = [f"{gap.mean:+.1f}{interval}", won, gap.verdict]
            lines.append([*line, f"{len(row.collapsed)} collapsed" if row.collapsed else ""])
    rates, seeds = (sorted({run[key] for run in record["runs"]}) for key in ("lr", "seed"))
    how = "last epoch" if has_best(record) else "end of the run"
    how = f"{how}, nothing selected" if select == "last" else "best epoch on dev"
    if select == "best" and len(rates) > 1:
        how += f", best learning rate on dev of {' '.join(f'{lr:g}' for lr in rates)}"
    title = f"{record['name']}, in %, {how}; seeds: {' '.join(map(str, seeds))}"
    return f"{title}\n{layout(lines)}"


def seeds_note(record: dict) -> list[str]:
    """A note below a comparison that has only one seed; empty for others."""
    seeds, variants = ({run[key] for run in record["runs"]} for key in ("seed", "variant"))
    few = len(seeds) == 1 < len(variants)
    return ["one seed: any difference above may be chance; --seeds 0 1 2 gives it an interval"] if few else []


def paper_table(records: list[dict], select: str = "best") -> str:
    """The paper's GLUE table: published rows, then ours. Scores in % (Matthews, mean of accuracy and F1, accuracy).

    A task without a record on all its data is "-", and then Avg is, too. Records of other or partial data (qnli-12k,
    toy-rte, `--max-train-samples`) are listed below with their scores. DynMoE's gate has rows of its own; `dense` and
    `random` have no gate. ValueError if two records would fill the same column of the same row.
    """
    ours: dict[str, dict[str, list[float]]] = {}  # row -> task -> scores
    notes: dict[bool, list[str]] = {True: [], False: []}
    for record in records:
        config, name = record.get("config", {}), record["name"]
        whole = name in TITLES and not (config.get("max_train_samples") or config.get("max_eval_samples"))
        texts = []
        for row in select_rows(record, select):
            scores = list(row.of("score").values())
            gate = ", DynMoE's gate" * (config.get("router") == "dynmoe" and row.variant not in ("dense", "random"))
            count = f"seeds: {len(scores)}" + (f", collapsed: {len(row.collapsed)}" if row.collapsed else "")
            title = f"{row.variant if select == 'best' else row.label}{gate}"
            texts.append(f"{label(row.label)}{gate}{'' if whole else ' ' + spread(scores)} ({count})")
            if whole and name in ours.setdefault(title, {}):
                raise ValueError(f"several records are named {name}: merge them, or print one at a time")
            if whole:
                ours[title][name] = scores
        notes[whole].append(f"- {name}, {printable(config.get('model', 'model not recorded'))}: {'; '.join(texts)}")
    lines = [["row", *TITLES.values(), "Avg"]]
    lines += [[f"published: {name}", *(f"{value:.1f}" for value in row)] for name, row in PUBLISHED.items()]
    for name in in_order(ours):
        cells = [spread(ours[name][task]) if task in ours[name] else "-" for task in TITLES]
        average = "-" if "-" in cells else f"{mean(mean(scores) for scores in ours[name].values()):.1f}"
        lines.append([f"ours: {label(name)}", *cells, average])
    how = "best epoch and best tried learning rate" if select == "best" else "last epoch, nothing selected, so lower by that"
    text = [layout(lines), ""]
    text += ["Published: BERT-large, best epoch and learning rate on dev; a std published there is the population one."]
    text += [f"Ours: {how}; ± is the sample std.", "", *notes[True]]
    if notes[False]:
        text += ["", "Other or partial data, not comparable with these columns:", "", *notes[False]]
    return "\n".join(text).rstrip()
