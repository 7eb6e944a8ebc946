"""Figures, drawn only from the records of runs.

  python -m lab.report.figures FOLDER              draws a run's figures again
  python -m lab.report.figures FOLDER FOLDER ...   several runs side by side: comparison.png in their common parent folder;
                                                   parts of one experiment, such as other seeds, become one
  python -m lab.report.figures --idea FILE.png     the picture of the method, which shows no run
  python -m lab.report.figures --tutorial FOLDER   the pictures of tutorial.md, which show no run

A variant looks the same in all of them, see lab.report.styles.
"""

import os
import re
import textwrap
import warnings
from itertools import cycle, product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no screen needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from lab.report.compare import gap_to_baseline, has_best, select_rows
from lab.report.records import merge
from lab.report.styles import STYLES, style_of
from lab.run.cli import Parser, UserError, run_main, say
from lab.run.files import written
from lab.run.runs import read_lines, read_record

plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
plt.rcParams["figure.constrained_layout.use"] = True
plt.rcParams["text.parse_math"] = False  # a name such as a$x$ is not a formula
PANELS = [  # of curves.png; the titles say what to look for
    ("loss", "training loss\nit should fall"),
    ("conflict_ratio", "conflict ratio: flagged / all pairs\nSTGC should lower it"),
    ("consistency", "gradient consistency, mean over experts\nSTGC should raise it"),
    ("router_margin", "router margin: last chosen p - the next\nnear 0 a choice is nearly chance"),
    ("load", "share of pairs on the busiest expert\n1 / experts is even"),
    ("balance_loss", "balance loss\n1 is even"),
    ("conflict_loss", "conflict loss\nCE: a uniform router has ln(experts)"),
    ("eval_score", "dev score\nhigher is better"),
]
LENGTHS = "A batch holds sentences of similar length, and the values follow the length: single batches go up and down.\n"
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


def value_of(line: dict, key: str, layer: int | None = None) -> float | None:
    """A plotted value of a log line, of one MoE layer or the mean over them. `load` is the share of the busiest expert."""
    if key != "load" and layer is None:
        return line.get(key)
    layers = line.get("layers", [])[slice(layer, layer if layer is None else layer + 1)]
    values = [max(own[key]) if key == "load" else own[key] for own in layers if key in own]
    return sum(values) / len(values) if values else None


def series(lines: list[dict], key: str, layer: int | None = None) -> tuple[list[int], list[float]]:
    points = [(line["step"], value) for line in lines if (value := value_of(line, key, layer)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def window_of(count: int) -> int:
    """How many of so many points a plotted one averages: an eighth, and at least five. At the logged steps of our runs this
    covers more than a pass of the loader through the lengths of the sentences."""
    return min(count, max(5, count // 8))


def smooth(values: list[float]) -> np.ndarray:
    """Moving average, since single batches are noisy. At the ends it averages what there is."""
    kernel = np.ones(window_of(len(values)))
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones(len(values)), kernel, mode="same")


def layer_name(name: str) -> str:
    """Such as "layer 3" for "model.layers.3.mlp"."""
    numbers = re.findall(r"\d+", str(name))
    return f"layer {numbers[-1]}" if numbers else str(name)


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


def plot_curve(axis, runs: list[list[dict]], key: str, look: dict, layer: int | None = None) -> None:
    """A thin line per seed, unless `layer` is given, and a thick one for the mean over the seeds."""
    drawn = [series(lines, key, layer) for lines in runs]
    drawn = [(steps, values if key == "eval_score" else smooth(values)) for steps, values in drawn if values]
    if not drawn:
        return
    thin = look | {"linewidth": 0.7, "alpha": 0.35, "marker": "", "label": None}
    for steps, values in drawn if len(drawn) > 1 and layer is None else []:
        axis.plot(steps, values, **thin)
    shared = min(len(values) for _, values in drawn)
    mean = np.mean([values[:shared] for _, values in drawn], axis=0)
    axis.plot(drawn[0][0][:shared], mean, **look, markevery=max(1, shared // 6), markersize=4)


def plot_similarities(axis, runs: list[dict]) -> None:
    """Of filmed runs: how the similarities of the pairs with their expert's mean are spread (figure 7), at the first moment
    (dotted) and at the last one; means over the seeds and the MoE layers."""
    for variant in dict.fromkeys(run["variant"] for run in runs):
        colour, line, marker = style_of(variant)
        for which, look in ((0, {"linestyle": ":", "linewidth": 1}), (-1, {"linestyle": line, "marker": marker})):
            own = [run["probe"][which]["layers"] for run in runs if run["variant"] == variant]
            counts = np.array([layer["histogram"] for layers in own for layer in layers], dtype=float)
            shares = (counts / counts.sum(1, keepdims=True).clip(1)).mean(0)
            edges = np.linspace(-1, 1, len(shares) + 1)
            axis.plot((edges[1:] + edges[:-1]) / 2, shares, color=colour, markersize=3, **look)
    title = "share of pairs over their similarity\ndotted: first moment; the other: last one"
    axis.set(xlabel="similarity with the mean: below tau is flagged", title=title)
    axis.grid(alpha=0.25)


def plot_run(folder: Path, record: dict) -> Path:
    """What the runs of a folder logged, see PANELS; values that no run has logged get no panel. With several MoE layers a
    second panel of a value has a line per layer, the mean over the seeds. The last panel is of runs with a film. Returns
    the path of the PNG, `curves.png`."""
    curves = read_curves(folder, record)
    lines = [line for runs in curves.values() for lines in runs for line in lines]
    layers = {i: layer_name(own.get("layer", i)) for line in lines for i, own in enumerate(line.get("layers", []))}

    def shows(name: str, key: str) -> bool:
        return key != "router_margin" or not name.startswith("random")  # dice have none

    def logged(key: str, layer: int | None = None) -> bool:
        return any(series(lines, key, layer)[0] for name, runs in curves.items() if shows(name, key) for lines in runs)

    panels = [(key, title, [None]) for key, title in PANELS if key == "loss" or logged(key)]
    if len(layers) > 1:
        own = [(key, re.split("[:,\n]", title)[0] + "\nof each MoE layer, by its number") for key, title in PANELS]
        panels += [(key, title, [*layers]) for key, title in own if any(logged(key, i) for i in layers)]
    filmed = [run for run in record["runs"] if run.get("probe")]
    count = len(panels) + bool(filmed)
    columns = min(4, count)
    rows = -(-count // columns)
    size = (max(7, 3.4 * columns), 2.9 * rows + 0.9)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    if filmed:
        plot_similarities(axes.flat[len(panels)], filmed)
    for axis, (key, title, which) in zip(axes.flat, panels):
        for i, (name, runs) in enumerate(curves.items()):
            colour, line, marker = style_of(name)
            same = sum(style_of(other) == style_of(name) for other in [*curves][:i])  # of other rates
            look = {"color": colour, "linestyle": line, "marker": marker, "linewidth": 1.6 + same, "label": name}
            for layer in which if shows(name, key) else ():
                plot_curve(axis, runs, key, look, layer)
        for layer, line in zip(which if None not in which else [], axis.lines):  # the first variant's
            place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
            axis.annotate(layers[layer].removeprefix("layer "), line.get_xydata()[-1], **place)
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.25)
        if key == "router_margin":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter("{x:g}")
    count = max((len(series(lines, "loss")[0]) for runs in curves.values() for lines in runs), default=0)
    note = f"Lines are averages over {window_of(count)} logged points; dev scores are not. Thin: a seed. Thick: their mean."
    note = LENGTHS * ("task" in record.get("config", {})) + note
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=6, title=note, title_fontsize=9)
    figure.suptitle(record["name"], fontsize=11)
    return save(figure, folder / "curves.png")


def plot_comparison(folder: Path, records: list[dict], select: str = "best") -> Path:
    """One panel per record: a point per variant and seed, hollow if collapsed, and a short bar for a variant's mean. A thin
    line joins the points of a seed, since variants are compared seed by seed. Beside the points stands the paired 95 %
    interval of the difference from the baseline, above or below the baseline's mean. The axis spans at least ten examples.
    `select`: see `compare`. Under `last`, several learning rates are side by side, with lines within a rate. Scores are on
    dev if best epochs were selected there, otherwise on test. Writes folder/comparison.png."""
    what = "dev" if any(map(has_best, records)) else "test"
    panels = [select_rows(record, select) for record in records]
    widths = [1 + 0.85 * len(rows) for rows in panels]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(max(6.5, 0.8 + sum(widths)), 4.4), width_ratios=widths, squeeze=False
    )
    for axis, record, rows in zip(axes[0], records, panels, strict=True):
        seeds, examples = sorted({seed for row in rows for seed in row.scores}), record.get("data", {}).get(what)
        for x, row in enumerate(rows):
            colour, _, marker = style_of(row.variant)
            for seed, value in row.of("score").items():
                face = "white" if seed in row.collapsed else colour
                axis.plot(x, value, marker, color=colour, markerfacecolor=face, markersize=6)
            mean = np.mean(list(row.of("score").values()))
            axis.plot([x - 0.25, x + 0.25], [mean, mean], "-", color="#1b1b1b", linewidth=2.2, zorder=1.5)
            found = gap_to_baseline(row, rows, select)
            if found and found[1].low is not None:
                zero, gap = np.mean(list(found[0].of("score").values())), found[1]
                ends = [[gap.mean - gap.low], [gap.high - gap.mean]]
                axis.errorbar(x + 0.36, zero + gap.mean, ends, color=colour, linewidth=1.4, capsize=3.5, fmt="_")
                axis.hlines(zero, x - 0.5, x + 0.5, color="#1b1b1b", linestyle=":", linewidth=1)
        rates = [None] if select == "best" else sorted({row.lr for row in rows})
        for rate, seed in product(rates, seeds):
            joined = [x for x, row in enumerate(rows) if seed in row.scores and rate in (None, row.lr)]
            values = [rows[x].of("score")[seed] for x in joined]
            axis.plot(joined, values, "-", color="#999999", linewidth=0.8, zorder=1)
        labels = [row.label.replace(", ", "\n") + "\n1 seed" * (len(row.scores) == 1 < len(seeds)) for row in rows]
        axis.set_xticks(range(len(rows)), labels, fontsize=9, rotation=30 if max(map(len, labels)) > 14 else 0)
        axis.set(title=record["name"] + (f"\n{examples:,} {what} examples" if examples else ""))
        axis.set(xlim=(-0.6, len(rows) - 0.4))
        low, high = axis.get_ylim()
        room = max(0.0, 1000 / examples - (high - low)) / 2 if examples else 0.0  # ten examples, in %
        axis.set_ylim(low - room, high + room + 0.12 * (high - low + 2 * room) * (len(seeds) == 1))
        if len(seeds) == 1 < len(rows):
            axis.text(0.5, 0.99, "one seed: no conclusion", transform=axis.transAxes, ha="center", va="top", weight="bold")
        axis.grid(alpha=0.25, axis="y")
    axes[0][0].set_ylabel(f"{what} score in % ({select})")
    legend = {"one seed": {"color": "#999999", "linewidth": 0.8}, "mean": {"color": "#1b1b1b", "linewidth": 2.2}}
    if any(axis.collections for axis in axes[0]):
        text = "paired 95 % interval: a difference where it misses the dotted baseline"
        legend[text] = {"color": "#1b1b1b", "marker": "|", "markersize": 12, "linestyle": ""}
    if any(row.collapsed for rows in panels for row in rows):
        legend["hollow: collapsed"] = {"color": "#1b1b1b", "marker": "o", "markerfacecolor": "white", "linestyle": ""}
    handles = [axes[0][0].plot([], [], label=label, **look)[0] for label, look in legend.items()]
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=2, fontsize=9)
    return save(figure, folder / "comparison.png")


def plot_routes(summary: dict, path: Path, title: str = "") -> Path:
    """Where tokens go, from lab.vision.routes.summary: one row per modality, pictures first. Left: one bar per MoE layer,
    divided into the experts' shares of first choices. Right: the most frequent pathways. Below: how to read a path.
    ValueError if no token was recorded."""
    if not summary["modalities"]:
        raise ValueError("no token's route was recorded")
    names = list(map(layer_name, summary["layers"]))
    percent = lambda share: f"{100 * share:.{1 if share >= 0.01 else 3}f}"  # noqa: E731
    modalities = [name for name in ("picture", "text") if name in summary["modalities"]]
    widths = [1.8 + 0.8 * len(names), 3.8 + 0.12 * len(names)]
    size = (sum(widths) + 1.4, 3.1 * len(modalities) + 0.3)  # the legend stands to the right
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
    example = summary["modalities"][modalities[0]]["pathways"][0]["path"]
    figure.supxlabel(how_to_read(example, names), fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], frameon=False, loc="outside right upper", fontsize=9, handleheight=1.6)
    return save(figure, path)


def how_to_read(path: list[int], names: list[str]) -> str:
    """The caption of pathways, by the example of one."""
    steps = [
        f"expert {expert} in the {nth} MoE layer ({name})" for expert, nth, name in zip(path, ("first", "second"), names)
    ]
    more = ", and so on" * (len(path) > 2)
    return f"{'-'.join(map(str, path))} is a path: the token's first choice is {', then '.join(steps)}{more}."


def cut(mark: str, text: str, lines: int) -> list[str]:
    """A mark and a text, wrapped for a cell of a sheet and cut after `lines` lines."""
    whole = " ".join([mark, *text.split()])
    return textwrap.wrap(whole, 34, subsequent_indent="   ", max_lines=lines, placeholder=" \u2026")


def plot_sheet(images_N3SS, rows: list[dict], path: Path) -> Path:
    """Test pictures (uint8, or floats in [0, 1]), each with its kind, question, the model's answer, and the expected answer
    if the model is wrong. rows: dicts with question, answer, expected, right, kind and optionally `image`, the picture's
    number or None; without it, row i has picture i. `boxes`, optional: left, top, right, bottom of the answer and of the
    expected answer relative to the picture's side, or None. The answer's box is drawn, and dotted the expected one if the
    model is wrong. Right and wrong differ in symbol, frame and colour. Long texts are cut."""
    if not rows or not all("image" in row for row in rows) and len(images_N3SS) != len(rows):
        raise ValueError(f"{len(images_N3SS)} pictures for {len(rows)} rows: give each row a picture, or `image`")
    texts = []
    for row in rows:
        lines = [*cut("Q:", row["question"].replace("<image>", ""), 4), *cut("A:", row["answer"], 3)]
        texts.append(lines + ([] if row["right"] else cut("Right:", row["expected"], 3)))
    columns = min(5, len(rows))
    wide, head, side = 2.45, 0.3, 2.25  # inches: a cell's width, the height of its title, the side of its picture
    deep = [0.2 + 0.16 * max(map(len, texts[i : i + columns])) for i in range(0, len(rows), columns)]  # of a row's texts
    tall = [head + side + depth for depth in deep]
    size = {"figsize": (wide * columns, sum(tall)), "height_ratios": tall}
    figure, axes = plt.subplots(len(tall), columns, **size, squeeze=False, layout="none")
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0, hspace=0)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (axis, row, lines) in enumerate(zip(axes.flat, rows, texts)):
        number, depth, height = row.get("image", i), deep[i // columns], tall[i // columns]
        verdict, style, colour, width = MARKS[bool(row["right"])]
        picture = axis.inset_axes([(wide - side) / 2 / wide, depth / height, side / wide, side / height])
        if number is None:
            picture.text(0.5, 0.5, "no picture", fontsize=9, ha="center", va="center")
        else:
            image_SS3 = np.asarray(images_N3SS[number]).transpose(1, 2, 0)
            picture.imshow(image_SS3, interpolation="nearest")
            looks = [(style, colour), (":", "#1b1b1b")]
            for box, (line, edge) in zip(row.get("boxes", ())[: 2 - bool(row["right"])], looks):
                draw_box(picture, box, len(image_SS3), line, edge)
        picture.set(xticks=[], yticks=[])
        for spine in picture.spines.values():
            spine.set(visible=True, linestyle=style, color=colour, linewidth=width)
        title = f"{verdict} ({row['kind']})"
        axis.text(0.5, (depth + side + 0.08) / height, title, fontsize=10, weight="bold", ha="center")
        text = {"fontsize": 9, "va": "top", "linespacing": 1.1, "clip_on": True}
        axis.text((wide - side) / 2 / wide, (depth - 0.07) / height, "\n".join(lines), **text)
    return save(figure, path)


def draw_box(axis, box: tuple[float, float, float, float] | None, side: int, line, colour: str) -> None:
    """A box on a picture of `side` pixels, on a white line, which is seen on every colour."""
    if box is not None:
        left, top, right, bottom = (side * edge - 0.5 for edge in box)
        for style, width, edge in (("-", 4.5, "white"), (line, 2, colour)):
            shape = {"fill": False, "linestyle": style, "linewidth": width, "edgecolor": edge}
            axis.add_patch(plt.Rectangle((left, top), right - left, bottom - top, **shape))


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
    """Draws an MoE layer from left to right; below it the backward from right to left, with the two taps where gradients are
    read, up to the push on the router's logits. No two lines cross."""
    red, blue = "#d1495b", "#2e86ab"
    figure, axis = plt.subplots(figsize=(11, 2.9))
    forward = ["tokens x", "router:\nTop-K", "sort pairs\nby expert", "first\nlinear", "act", "last\nlinear"]
    forward += ["times\nweight", "add up", "main\nloss"]
    below = [(1.5, "both seen:\nflags, and a push\non the logits", blue), (5.25, "g1: one row\nper pair", red)]
    below += [(8.25, "g2: one row\nper pair", red)]
    boxes = [(1.5 * i, 1, name, "#1b1b1b") for i, name in enumerate(forward)] + [(x, -1, *rest) for x, *rest in below]
    shown = []
    for x, y, name, colour in boxes:
        shade = "#e8edf0" if "linear" in name else "white"
        box = {"boxstyle": "round,pad=0.45", "facecolor": shade, "edgecolor": colour, "linewidth": 1.3}
        shown.append(axis.text(x, y, name, color=colour, ha="center", va="center", fontsize=10, bbox=box))

    def arrow(start, end, **look):
        ends = {f"patch{side}": shown[i].get_bbox_patch() for side, i in (("A", start), ("B", end))}
        style = {"arrowstyle": "-|>", "color": "#1b1b1b", "linewidth": 1.3, "shrinkA": 2, "shrinkB": 2} | ends | look
        axis.annotate("", xy=shown[end].get_position(), xytext=shown[start].get_position(), arrowprops=style)

    for i in range(len(forward) - 1):
        arrow(i, i + 1)
    loss, push, g1, g2 = range(len(forward) - 1, len(boxes))
    back = {"color": red, "linestyle": (0, (4, 2)), "linewidth": 1.8}
    arrow(loss, g2, **back, connectionstyle="angle,angleA=-90,angleB=0,rad=0")
    arrow(g2, g1, **back)
    arrow(g1, push, **back)
    arrow(push, 1, color=blue, linewidth=2.2)
    axis.text(10.6, -0.9, "backward", color=red, fontsize=10, ha="center", va="bottom")
    for x, name in ((8.25, "tap 2"), (5.25, "tap 1")):  # at the output of a linear
        axis.plot([x, x], [1, -0.68], color=red, linewidth=1.4, linestyle=":")
        axis.plot(x, 1, "o", color=red, markersize=6)
        axis.text(x + 0.12, 0.15, name, color=red, fontsize=10, va="center")
    axis.set(xlim=(-0.6, 12.5), ylim=(-1.5, 1.4))
    axis.axis("off")
    save(figure, path)


def main() -> None:
    parser = Parser(prog="lab.report.figures", description=__doc__)
    wanted = "a run's output folder, or several; --idea: a PNG; --tutorial: a folder to write"
    parser.add_argument("folder", type=Path, nargs="+", help=wanted)
    parser.add_argument("--idea", action="store_true", help="draw the picture of the method instead")
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
            common = Path(os.path.commonpath([path.resolve() for path in args.folder]))
            say(plot_comparison(common, merge(records), select))
        else:
            say(plot_run(folder, records[0]))
            if len({run["variant"] for run in records[0]["runs"]}) > 1:
                say(plot_comparison(folder, records, select))
            for run in records[0]["runs"]:
                name = f"{run['variant']}-s{run['seed']}"
                if run.get("routes") and (picture := folder / f"routes-{name}.png").is_file():
                    say(plot_routes(run["routes"], picture, name))


if __name__ == "__main__":
    run_main("lab.report.figures", main, resumes=False)
