"""Figures drawn from a run's records alone: `python -m lab.figures FOLDER` draws them again.

Variants differ by line style and marker as well as by colour, so that a grey print stays readable.
"""

import argparse
import json
from itertools import cycle, product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no screen needed
import matplotlib.pyplot as plt
import numpy as np

from lab.compare import select_rows

STYLES = [
    ("#1b1b1b", "-", "o"),
    ("#d1495b", "--", "s"),
    ("#2e86ab", "-.", "^"),
    ("#8f6bb3", ":", "D"),
    ("#3a7d44", "-", "v"),
]
PANELS = [
    ("loss", "training loss"),
    ("conflict_ratio", "conflict ratio\n(flagged / all pairs)"),
    ("consistency", "gradient consistency\n(mean over experts)"),
    ("load", "share of pairs\non the busiest expert"),
    ("eval_score", "dev score"),
]


def read_curves(folder: Path) -> dict[str, list[list[dict]]]:
    """variant -> one list of log lines per seed, from <variant>-s<seed>.jsonl."""
    curves: dict[str, list[list[dict]]] = {}
    for path in sorted(folder.glob("*-s[0-9]*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        curves.setdefault(path.stem.rpartition("-s")[0], []).append(lines)
    return curves


def value_of(line: dict, key: str) -> float | None:
    """A plotted value of a log line; `load` is the busiest expert's share, averaged over the MoE layers."""
    if key != "load":
        return line.get(key)
    loads = [max(layer["load"]) for layer in line.get("layers", []) if "load" in layer]
    return sum(loads) / len(loads) if loads else None


def series(lines: list[dict], key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], value_of(line, key)) for line in lines]
    points = [(step, value) for step, value in points if value is not None]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: list[float]) -> np.ndarray:
    """Mean over a moving window of a twentieth of the run: single batches are too noisy to read."""
    window = max(1, len(values) // 20)
    padded = np.pad(np.asarray(values, dtype=float), (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.ones(window) / window, mode="valid")


def plot_run(folder: Path, title: str) -> Path:
    """Loss, conflict ratio, consistency, load and dev score of every run in the folder: a thin line per seed, a thick one
    for the mean of each variant's seeds. Returns the path of the PNG, `curves.png`."""
    curves = read_curves(folder)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(3.3 * len(PANELS), 3.1), constrained_layout=True)
    for axis, (key, label) in zip(axes, PANELS, strict=True):
        for (variant, runs), (colour, style, marker) in zip(curves.items(), cycle(STYLES)):
            drawn = [series(lines, key) for lines in runs]
            drawn = [(steps, values if key == "eval_score" else smooth(values)) for steps, values in drawn if values]
            for steps, values in drawn if len(drawn) > 1 else []:
                axis.plot(steps, values, style, color=colour, linewidth=0.7, alpha=0.35)
            if drawn:
                shared = min(len(values) for _, values in drawn)
                mean = np.mean([values[:shared] for _, values in drawn], axis=0)
                points = {"marker": marker, "markersize": 4} if key == "eval_score" else {}
                axis.plot(drawn[0][0][:shared], mean, style, color=colour, linewidth=1.8, label=variant, **points)
        axis.set(xlabel="step", title=label)
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def plot_comparison(folder: Path, records: list[dict], select: str = "best", metric: str = "score") -> Path:
    """A panel per record: a point per seed over its variants, the points of a seed joined by a thin line, since variants are
    compared seed by seed; a short bar at each variant's mean; hollow where a run collapsed. `select`: see lab.compare.
    Under `last` rows of several learning rates stand side by side, joined within a rate. Writes folder/comparison.png."""
    panels = [select_rows(record, select) for record in records]
    widths = [1 + 0.75 * len(rows) for rows in panels]
    size = (2.2 + sum(widths), 3.6)  # the legend stands to the right
    figure, axes = plt.subplots(1, len(panels), figsize=size, width_ratios=widths, squeeze=False, constrained_layout=True)
    seeds = sorted({seed for rows in panels for row in rows for seed in row.scores})
    styles = dict(zip(seeds, cycle(STYLES)))
    for axis, record, rows in zip(axes[0], records, panels, strict=True):
        for x, row in enumerate(rows):
            for seed, value in row.of(metric).items():
                colour, _, marker = styles[seed]
                face = "white" if seed in row.collapsed else colour
                axis.plot(x, value, marker, color=colour, markerfacecolor=face, markersize=6)
            mean = np.mean(list(row.of(metric).values()))
            axis.plot([x - 0.3, x + 0.3], [mean, mean], "-", color="#1b1b1b", linewidth=2.2, zorder=1.5)
        rates = [None] if select == "best" else sorted({row.lr for row in rows})
        for rate, seed in product(rates, seeds):
            joined = [x for x, row in enumerate(rows) if seed in row.scores and rate in (None, row.lr)]
            values = [rows[x].of(metric)[seed] for x in joined]
            axis.plot(joined, values, "-", color="#999999", linewidth=0.8, zorder=1)
        axis.set_xticks(range(len(rows)), [row.label.replace(", ", "\n") for row in rows], rotation=30, fontsize=9)
        axis.set(title=record["name"], xlim=(-0.6, len(rows) - 0.4))
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25, axis="y")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"dev {metric} in % ({select})")
    for seed, (colour, _, marker) in styles.items():
        axes[0][0].plot([], [], marker, color=colour, label=f"seed {seed}")
    axes[0][0].plot([], [], "-", color="#1b1b1b", linewidth=2.2, label="mean")
    if any(row.collapsed for rows in panels for row in rows):
        axes[0][0].plot([], [], "o", color="#1b1b1b", markerfacecolor="white", label="hollow: collapsed")
    figure.legend(frameon=False, loc="outside right upper", fontsize=9)
    path = folder / "comparison.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_idea(path: Path) -> None:
    """The method in one picture: gradients of the tokens on one expert, their mean, and which of them conflict with it."""
    rng = np.random.default_rng(3)
    angles = np.concatenate([rng.normal(0.55, 0.45, 9), [2.45, 2.9, -1.75]])
    grads = rng.uniform(0.55, 1.0, len(angles))[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mean_grad = grads.mean(0)
    conflict = grads @ mean_grad < 0
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), constrained_layout=True)
    for grad, flagged in zip(grads, conflict, strict=True):
        colour, style = ("#d1495b", (0, (3, 2))) if flagged else ("#2e86ab", "-")
        arrow = {"arrowstyle": "-|>", "color": colour, "linestyle": style, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
        left.annotate("", xy=grad, xytext=(0, 0), arrowprops=arrow)
    thick = {"arrowstyle": "-|>", "color": "#1b1b1b", "linewidth": 4, "shrinkA": 0, "shrinkB": 0}
    left.annotate("", xy=mean_grad * 1.9, xytext=(0, 0), arrowprops=thick)
    border = np.array([-mean_grad[1], mean_grad[0]]) / np.linalg.norm(mean_grad)
    left.plot(*np.stack([-1.15 * border, 1.15 * border], axis=1), color="#777777", linewidth=1, linestyle=":")
    left.text(*(mean_grad * 2.0), "mean", fontsize=11, weight="bold")
    left.text(-1.7, 1.05, "dashed: cosine with the\nmean below 0: conflict", color="#d1495b", fontsize=10, va="top")
    left.set(xlim=(-1.7, 1.35), ylim=(-1.1, 1.1), title="token gradients on one expert, one arrow per token", aspect="equal")
    left.axis("off")

    logits = np.array([2.0, 0.4, -0.3, 0.9])
    push = -0.9 * (np.eye(4)[0] - np.exp(-logits) / np.exp(-logits).sum())
    x = np.arange(4)
    right.bar(x - 0.19, logits, 0.36, color="#b9c4cc", edgecolor="#1b1b1b", label="before")
    right.bar(x + 0.19, logits + push, 0.36, color="#d1495b", edgecolor="#1b1b1b", hatch="//", label="after a few steps")
    right.axhline(0, color="#1b1b1b", linewidth=0.8)
    right.set_xticks(x, ["expert 0\n(it conflicts here)", "expert 1", "expert 2", "expert 3"])
    right.set(title="router logits of a conflicting token, pushed by CE(-z, 0)", ylabel="logit")
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a run's output folder; or, with --idea, the PNG to write")
    parser.add_argument("--idea", action="store_true", help="draw the README's picture of the method instead")
    args = parser.parse_args()
    if args.idea:
        draw_idea(args.folder)
    else:
        record = json.loads((args.folder / "results.json").read_text())
        print(plot_run(args.folder, record["name"]))
        if len({run["variant"] for run in record["runs"]}) > 1:
            print(plot_comparison(args.folder, [record]))
