"""Figures, drawn only from the records of runs.

  python -m lab.report.figures FOLDER              draws a run's figures again
  python -m lab.report.figures FOLDER FOLDER ...   several runs side by side, as comparison.png in their common parent folder
  python -m lab.report.figures --idea FILE.png     the picture of README.md, which shows no run
  python -m lab.report.figures --tutorial FOLDER   the pictures of tutorial.md, which show no run

Variants differ in line style and marker as well as in colour, so that a grey print stays readable.
"""

import os
import textwrap
import warnings
from itertools import cycle, product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no screen needed
import matplotlib.pyplot as plt
import numpy as np

from lab.report.compare import has_best, select_rows
from lab.run.cli import Parser, UserError, run_main, say
from lab.run.files import written
from lab.run.runs import read_lines, read_record

plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
plt.rcParams["figure.constrained_layout.use"] = True
plt.rcParams["text.parse_math"] = False  # a name such as a$x$ is not a formula
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
# of experts; black text is readable on each
SHADES = ["#ffffff", "#9ecae1", "#fdd49e", "#6a8caf", "#d9d9d9", "#c994c7", "#a1d99b", "#8c8c8c"]
HATCHES = ["", "///", "...", "\\\\\\", "xx", "--", "++", "oo"]
MARKS = {True: ("\u2713 right", "-", "#2e86ab", 1.2), False: ("\u2717 wrong", (0, (4, 2)), "#d1495b", 2.6)}


def read_curves(folder: Path, record: dict) -> dict[str, list[list[dict]]]:
    """variant, or variant and learning rate -> one list of log lines per seed, of the recorded runs. RunFailed."""
    names = {f"{run['variant']}{rate}-s{run['seed']}" for run in record["runs"] for rate in ("", f"-lr{run['lr']:g}")}
    curves: dict[str, list[list[dict]]] = {}
    for name in sorted(names):
        if (path := folder / f"{name}.jsonl").is_file():
            curves.setdefault(name.rpartition("-s")[0], []).append(read_lines(path))
    return curves


def value_of(line: dict, key: str) -> float | None:
    """A plotted value of a log line. `load` is the share of the busiest expert, averaged over the MoE layers."""
    if key != "load":
        return line.get(key)
    loads = [max(layer["load"]) for layer in line.get("layers", []) if "load" in layer]
    return sum(loads) / len(loads) if loads else None


def series(lines: list[dict], key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], value) for line in lines if (value := value_of(line, key)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: list[float]) -> np.ndarray:
    """Moving average over a twentieth of the run, since single batches are noisy."""
    window = max(1, len(values) // 20)
    padded = np.pad(np.asarray(values, dtype=float), (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.ones(window) / window, mode="valid")


def save(figure, path: Path) -> Path:
    """Writes the figure and closes it. Returns the path. UserError if it cannot be a picture's."""
    try:
        with written(path) as new, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # its font has no Chinese, for example
            figure.savefig(new, dpi=110)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ValueError) as error:
        raise UserError(f"{path}: cannot be drawn ({error!s:.120}); name another file or folder") from None
    plt.close(figure)
    return path


def plot_run(folder: Path, record: dict) -> Path:
    """Loss, conflict ratio, consistency, load and score of every run in the folder: a thin line per seed, and a thick line
    for the mean over a variant's seeds. Values that no run has logged get no panel. Returns the path of the PNG,
    `curves.png`."""
    curves = read_curves(folder, record)
    lines = [line for runs in curves.values() for lines in runs for line in lines]
    panels = [panel for panel in PANELS if panel[0] == "loss" or any(value_of(line, panel[0]) is not None for line in lines)]
    size = (3.3 * max(2, len(panels)), 3.1)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, (key, label) in zip(axes[0], panels, strict=True):
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
        axis.grid(alpha=0.25)
    axes[0][0].legend(frameon=False)
    figure.suptitle(record["name"], fontsize=11)
    return save(figure, folder / "curves.png")


def plot_comparison(folder: Path, records: list[dict], select: str = "best") -> Path:
    """One panel per record, with a point per variant and seed. A thin line joins the points of a seed, since variants are
    compared seed by seed. A short bar marks the mean of a variant, a hollow point a collapsed run. `select`: see `compare`.
    Under `last`, several learning rates are side by side, with lines within a rate. Scores are on dev if best epochs were
    selected there, otherwise on test. Writes folder/comparison.png."""
    what = "dev" if any(map(has_best, records)) else "test"
    panels = [select_rows(record, select) for record in records]
    widths = [1 + 0.75 * len(rows) for rows in panels]
    size = (2.2 + sum(widths), 3.6)  # plus the legend at the right
    figure, axes = plt.subplots(1, len(panels), figsize=size, width_ratios=widths, squeeze=False)
    seeds = sorted({seed for rows in panels for row in rows for seed in row.scores})
    styles = dict(zip(seeds, cycle(STYLES)))
    for axis, record, rows in zip(axes[0], records, panels, strict=True):
        for x, row in enumerate(rows):
            for seed, value in row.of("score").items():
                colour, _, marker = styles[seed]
                face = "white" if seed in row.collapsed else colour
                axis.plot(x, value, marker, color=colour, markerfacecolor=face, markersize=6)
            mean = np.mean(list(row.of("score").values()))
            axis.plot([x - 0.3, x + 0.3], [mean, mean], "-", color="#1b1b1b", linewidth=2.2, zorder=1.5)
        rates = [None] if select == "best" else sorted({row.lr for row in rows})
        for rate, seed in product(rates, seeds):
            joined = [x for x, row in enumerate(rows) if seed in row.scores and rate in (None, row.lr)]
            values = [rows[x].of("score")[seed] for x in joined]
            axis.plot(joined, values, "-", color="#999999", linewidth=0.8, zorder=1)
        axis.set_xticks(range(len(rows)), [row.label.replace(", ", "\n") for row in rows], rotation=30, fontsize=9)
        axis.set(title=record["name"], xlim=(-0.6, len(rows) - 0.4))
        axis.grid(alpha=0.25, axis="y")
    axes[0][0].set_ylabel(f"{what} score in % ({select})")
    for seed, (colour, _, marker) in styles.items():
        axes[0][0].plot([], [], marker, color=colour, label=f"seed {seed}")
    axes[0][0].plot([], [], "-", color="#1b1b1b", linewidth=2.2, label="mean")
    if any(row.collapsed for rows in panels for row in rows):
        axes[0][0].plot([], [], "o", color="#1b1b1b", markerfacecolor="white", label="hollow: collapsed")
    figure.legend(frameon=False, loc="outside right upper", fontsize=9)
    return save(figure, folder / "comparison.png")


def plot_routes(summary: dict, names: list[str] | None, path: Path, title: str = "") -> Path:
    """Where tokens go, from lab.vision.routes.summary: one row per modality, pictures first. Left: one bar per MoE layer,
    divided into the experts' shares of first choices. Right: the most frequent pathways. `names`: names of the layers, in
    order; None numbers them from 0."""
    names = names or [f"layer {i}" for i in range(len(summary["layers"]))]
    if not summary["modalities"]:
        raise ValueError("no token's route was recorded")
    if isinstance(names, str) or len(names) != len(summary["layers"]):
        raise ValueError(f"names={names!r}: a list with one for each of {len(summary['layers'])} MoE layers is needed")
    percent = lambda share: f"{100 * share:.{1 if share >= 0.01 else 3}f}"  # noqa: E731
    modalities = [name for name in ("picture", "text") if name in summary["modalities"]]
    widths = [1.8 + 0.8 * len(names), 3.8 + 0.12 * len(names)]
    size = (sum(widths) + 1.4, 3.1 * len(modalities))  # the legend stands to the right
    figure, axes = plt.subplots(len(modalities), 2, figsize=size, width_ratios=widths, squeeze=False)
    for (left, right), modality in zip(axes, modalities, strict=True):
        row, experts = summary["modalities"][modality], range(summary["num_experts"])
        share_ME = np.asarray(row["first_ME"])
        start_ME = share_ME.cumsum(1) - share_ME
        for e, face, hatch in zip(experts, cycle(SHADES), cycle(HATCHES)):
            bars = {"color": face, "hatch": hatch, "edgecolor": "#1b1b1b", "linewidth": 0.8, "label": f"expert {e}"}
            left.bar(range(len(names)), share_ME[:, e], 0.72, start_ME[:, e], **bars)
            for x in np.flatnonzero(share_ME[:, e] >= 0.07):  # smaller shares have no room for a label
                middle, box = start_ME[x, e] + share_ME[x, e] / 2, {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
                left.text(x, middle, f"{100 * share_ME[x, e]:.0f}", ha="center", va="center", fontsize=9, bbox=box)
        for e in experts[1:]:
            left.axhline(e / len(experts), color="#1b1b1b", linestyle=":", linewidth=1.2, label="even shares" * (e == 1))
        left.set_xticks(range(len(names)), names, fontsize=9, rotation=30 if max(map(len, names)) > 9 else 0)
        left.set(xlim=(-0.6, len(names) - 0.4), ylim=(0, 1), ylabel="share of first choices")
        left.set_title(f"{modality}: {row['tokens']:,} tokens", fontsize=10)

        paths, shares = zip(*[(one["path"], one["share"]) for one in row["pathways"]])
        right.barh(range(len(paths)), [100 * share for share in shares], 0.7, color="#9ecae1", edgecolor="#1b1b1b")
        for y, share in enumerate(shares):
            right.text(100 * share, y, f" {percent(share)}", va="center", fontsize=9)
        labels = ["-".join(map(str, one)) for one in paths]
        right.set_yticks(range(len(paths)), labels, fontsize=9, family="monospace")
        right.set(xlabel=f"% of {modality} tokens", xlim=(0, 116 * max(shares)), ylim=(len(paths) - 0.4, -0.6))
        right.set_title(f"{modality}: the most frequent paths, together {percent(sum(shares))} %", fontsize=10)
        right.locator_params(axis="x", nbins=5)
    figure.suptitle(title, fontsize=11)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], frameon=False, loc="outside right upper", fontsize=9, handleheight=1.6)
    return save(figure, path)


def cut(mark: str, text: str, lines: int) -> list[str]:
    """A mark and a text, wrapped for a cell of a sheet and cut after `lines` lines."""
    whole = " ".join([mark, *text.split()])
    return textwrap.wrap(whole, 34, subsequent_indent="   ", max_lines=lines, placeholder=" \u2026")


def plot_sheet(images_N3SS, rows: list[dict], path: Path) -> Path:
    """Test pictures (uint8, or floats in [0, 1]), each with its kind, question, the model's answer, and the expected answer
    if the model is wrong. rows: dicts with question, answer, expected, right, kind and optionally `image`, the picture's
    number or None; without it, row i has picture i. Right and wrong differ in symbol, frame and colour. Long texts are
    cut."""
    if not rows or not all("image" in row for row in rows) and len(images_N3SS) != len(rows):
        raise ValueError(f"{len(images_N3SS)} pictures for {len(rows)} rows: give each row a picture, or `image`")
    texts = []
    for row in rows:
        lines = [*cut("Q:", row["question"].replace("<image>", ""), 4), *cut("A:", row["answer"], 3)]
        texts.append(lines + ([] if row["right"] else cut("Right:", row["expected"], 3)))
    columns = min(4, len(rows))
    wide, head, side = 2.45, 0.4, 1.8  # inches: a cell's width, the height of its title, the side of its picture
    deep = 0.25 + 0.172 * max(map(len, texts))  # the height of its text
    tall = head + side + deep
    shape = (-(-len(rows) // columns), columns)
    figure, axes = plt.subplots(*shape, figsize=(wide * shape[1], tall * shape[0]), squeeze=False, layout="none")
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0, hspace=0)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (axis, row, lines) in enumerate(zip(axes.flat, rows, texts)):
        number = row.get("image", number)
        verdict, style, colour, width = MARKS[bool(row["right"])]
        picture = axis.inset_axes([(wide - side) / 2 / wide, deep / tall, side / wide, side / tall])
        if number is None:
            picture.text(0.5, 0.5, "no picture", fontsize=9, ha="center", va="center")
        else:
            picture.imshow(np.asarray(images_N3SS[number]).transpose(1, 2, 0), interpolation="nearest")
        picture.set(xticks=[], yticks=[])
        for spine in picture.spines.values():
            spine.set(visible=True, linestyle=style, color=colour, linewidth=width)
        title = f"{verdict} ({row['kind']})"
        axis.text(0.5, (deep + side + 0.1) / tall, title, fontsize=10, weight="bold", ha="center")
        text = {"fontsize": 9, "va": "top", "linespacing": 1.15, "clip_on": True}
        axis.text(0.05, (deep - 0.08) / tall, "\n".join(lines), **text)
    return save(figure, path)


def draw_idea(path: Path) -> None:
    """Draws the method: gradients of the tokens on one expert, their mean, and those that conflict with it."""
    rng = np.random.default_rng(3)
    angles = np.concatenate([rng.normal(0.55, 0.45, 9), [2.45, 2.9, -1.75]])
    grads = rng.uniform(0.55, 1.0, len(angles))[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mean_grad = grads.mean(0)
    conflict = grads @ mean_grad < 0
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9))
    for grad, flagged in zip(grads, conflict, strict=True):
        colour, style = ("#d1495b", (0, (3, 2))) if flagged else ("#2e86ab", "-")
        arrow = {"arrowstyle": "-|>", "color": colour, "linestyle": style, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
        left.annotate("", xy=grad, xytext=(0, 0), arrowprops=arrow)
    thick = {"arrowstyle": "-|>", "color": "#1b1b1b", "linewidth": 4, "shrinkA": 0, "shrinkB": 0}
    left.annotate("", xy=mean_grad * 1.9, xytext=(0, 0), arrowprops=thick)
    border = np.array([-mean_grad[1], mean_grad[0]]) / np.linalg.norm(mean_grad)
    left.plot(*np.stack([-1.15 * border, 1.15 * border], axis=1), color="#777777", linewidth=1, linestyle=":")
    beyond = 1.02 * mean_grad / np.linalg.norm(mean_grad)  # no gradient is longer than 1
    left.text(*beyond, "mean", fontsize=11, weight="bold")
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
    right.legend(frameon=False)
    save(figure, path)


SIX_TOKENS = {  # the example of tutorial.md, section 6: expert -> token -> gradient
    0: {"a": (3, 4), "b": (3, -4), "c": (4, -3), "d": (-4, 3)},
    1: {"e": (0, 10), "f": (3, -4)},
}


def draw_arrow(axis, end, **style) -> None:
    shape = {"arrowstyle": "-|>", "mutation_scale": 15, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", xy=end, xytext=(0, 0), arrowprops=shape | style)


def draw_six_tokens(path: Path) -> None:
    """Draws the tutorial's six tokens: their gradients on each expert, the mean, and those that conflict with it."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6))
    for axis, (expert, grads) in zip(axes, SIX_TOKENS.items(), strict=True):
        mean = np.mean(list(grads.values()), axis=0)
        border = np.array([-mean[1], mean[0]]) / np.linalg.norm(mean)
        axis.plot(*np.stack([-6 * border, 6 * border], axis=1), color="#777777", linewidth=1, linestyle=":")
        for name, grad in grads.items():
            cosine = np.dot(grad, mean) / np.linalg.norm(grad) / np.linalg.norm(mean)
            colour, style = ("#d1495b", (0, (4, 2))) if cosine < 0 else ("#2e86ab", "-")
            draw_arrow(axis, grad, color=colour, linestyle=style, linewidth=1.8)
            text = {"ha": "center", "va": "center", "fontsize": 11, "color": colour}
            place = np.array(grad) * (1 + 1.25 / np.linalg.norm(grad)) + np.array([0.55 * np.sign(grad[0]), 0])
            axis.text(*place, f"{name}\n{cosine:.2f}", linespacing=0.95, **text)
        draw_arrow(axis, mean, color="#1b1b1b", linewidth=4.5)
        axis.text(*(mean + (0.35, 0.35)), "mean", fontsize=11, weight="bold")
        axis.set(xlim=(-7, 7), ylim=(-7, 12), aspect="equal", title=f"expert {expert}: gradients, cosines with the mean")
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    figure.supxlabel("dotted: a right angle to the mean. dashed: beyond it, in conflict", fontsize=10)
    save(figure, path)


def pushes(p: np.ndarray) -> dict[str, np.ndarray]:
    """How strongly three losses push down the logit of a token's expert, at its score p. 4 experts; the other logits are
    equal."""
    return {
        "CE(-z, e): eq. 8, 14": 1 - 1 / (1 + 9 * p / (1 - p)),  # 1 - softmax(-z)_e; exp(z_e - others) is 3p / (1 - p)
        "squared score: eq. 13": 2 * p**2 * (1 - p),
        "minus CE(z, e): not used": 1 - p,
    }


def draw_push(path: Path) -> None:
    """Draws `pushes` over the scores."""
    p = np.linspace(0.001, 0.999, 400)
    places = [(0.55, 0.86), (0.42, 0.08), (0.55, 0.49)]
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    for (label, push), place, (colour, style, _) in zip(pushes(p).items(), places, STYLES):
        axis.plot(p, push, style, color=colour, linewidth=2.2)
        axis.text(*place, label, color=colour, fontsize=10)
    axis.set(xlabel="score p of the token's expert", ylabel="push on its logit, downwards", ylim=(0, 1.05), xlim=(0, 1))
    axis.grid(alpha=0.25)
    save(figure, path)


def draw_taps(path: Path) -> None:
    """Draws an MoE layer from left to right, the backward from right to left, and the two taps where gradients are read."""
    figure, axis = plt.subplots(figsize=(11, 3.3))
    names = ["tokens x", "router:\nTop-K", "sort pairs\nby expert", "first\nlinear", "act", "last\nlinear", "times\nweight"]
    names += ["add up", "main\nloss"]
    for i, name in enumerate(names):
        shade = "#e8edf0" if "linear" in name else "white"
        box = {"boxstyle": "round,pad=0.45", "facecolor": shade, "edgecolor": "#1b1b1b"}
        axis.text(1.5 * i, 0, name, ha="center", va="center", fontsize=10, bbox=box)
        if i:
            arrow = {"arrowstyle": "-|>", "color": "#1b1b1b", "linewidth": 1.2}
            axis.annotate("", xy=(1.5 * i - 0.5, 0), xytext=(1.5 * i - 1.0, 0), arrowprops=arrow)
    back = {"arrowstyle": "-|>", "color": "#d1495b", "linewidth": 1.8, "linestyle": (0, (4, 2))}
    axis.annotate("", xy=(4.7, -1.05), xytext=(12, -1.05), arrowprops=back)
    axis.text(12, -1.3, "backward", color="#d1495b", fontsize=10, ha="right", va="top")
    for x, name in ((8.25, "tap 2: g2,\none row per pair"), (5.25, "tap 1: g1,\none row per pair")):
        axis.plot([x, x], [-1.05, 0.75], color="#d1495b", linewidth=1.2)
        axis.plot(x, -1.05, "o", color="#d1495b")
        axis.text(x, 0.82, name, color="#d1495b", ha="center", va="bottom", fontsize=10)
    push = {"arrowstyle": "-|>", "color": "#2e86ab", "linewidth": 2.2, "connectionstyle": "arc3,rad=-0.25"}
    axis.annotate("", xy=(1.6, -0.5), xytext=(4.7, -1.15), arrowprops=push)
    axis.text(2.7, -1.75, "both seen: flags, and a push on the logits", color="#2e86ab", fontsize=10, ha="center", va="top")
    axis.set(xlim=(-0.9, 12.8), ylim=(-2.2, 1.7))
    axis.axis("off")
    save(figure, path)


def main() -> None:
    parser = Parser(prog="lab.report.figures", description=__doc__)
    wanted = "a run's output folder, or several; --idea: a PNG; --tutorial: a folder to write"
    parser.add_argument("folder", type=Path, nargs="+", help=wanted)
    parser.add_argument("--idea", action="store_true", help="draw the README's picture of the method instead")
    parser.add_argument("--tutorial", action="store_true", help="draw the tutorial's pictures instead")
    args = parser.parse_args()
    folder = args.folder[0]
    if args.idea:
        draw_idea(folder)
    elif args.tutorial:
        draw_six_tokens(folder / "tutorial-six.png")
        draw_push(folder / "tutorial-push.png")
        draw_taps(folder / "tutorial-taps.png")
    else:
        records = [read_record(path, "folder") for path in args.folder]
        if missing := [path for path, record in zip(args.folder, records) if not (record and record["runs"])]:
            parser.error(f"{missing[0]}: no results.json with a finished run; give a run's output folder")
        select = "best" if all(map(has_best, records)) else "last"
        if len(records) > 1:
            say(plot_comparison(Path(os.path.commonpath([path.resolve() for path in args.folder])), records, select))
        else:
            say(plot_run(folder, records[0]))
            if len({run["variant"] for run in records[0]["runs"]}) > 1:
                say(plot_comparison(folder, records, select))


if __name__ == "__main__":
    run_main("lab.report.figures", main, resumes=False)
