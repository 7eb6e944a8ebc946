"""docs/costs.md, from the records of lab.bench in results/: `python -m lab.report.costs` writes it and its plots again."""

from pathlib import Path

from matplotlib.ticker import LogLocator, NullLocator

from lab.bench.layer import SIZE, START, slope
from lab.report.figures import HATCHES, SHADES, plt, save
from lab.report.styles import style_of
from lab.report.tables import bench_table, header, peer_table, read_bench
from lab.run.cli import Parser, run_main, say
from lab.run.runs import ROOT

HEAD = """# What STGC costs

`python -m lab.report.costs` generates this page from the records in `results/`; below each table is the command that made
its record. All that is compared takes its turn within each round, so that other load on the machine affects all of it. A
ratio is the median over the rounds of the ratio to the base in the same round, with the 95 % interval of this median by
bootstrap (older records: the middle half of the rounds). Peak memory is the most that was allocated at once.

On a CPU the scripts let glibc keep the memory that a step frees, which saves 5 to 20 % of a step
(`lab.run.runs.keep_freed_memory`; the benches do the same). A step is forward, losses, backward and AdamW.

Stored token gradients in the paper's settings, by `lab.bench.step.gradient_memory`: 0.30 GiB (StableLM-1.6B) and 0.38 GiB
(Phi-2-2.7B) for biases, 773 and 1562 GiB for weights, which the paper calls impossible. One pass on biases stores none, and
weight gradients of single tokens are never formed.

st-moe-pytorch is not among the peers: it drops the tokens over an expert's capacity and skips second choices, so it does
not do the same work.
"""


def layer_table(record: dict) -> str:
    """Markdown: a row per size, a column per layer."""
    names = list(dict.fromkeys(name for rows in record["layers"].values() for name in rows))
    lines = header("size", *names)
    for size, rows in record["layers"].items():
        cells = [
            "{ratio:.2f}x ({interval[0]:.2f} to {interval[1]:.2f})".format(**rows[n]) if n in rows else "-" for n in names
        ]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    said = []
    for name in names[2:]:  # behind the limit and the dense FFN
        ratios = [rows[name]["ratio"] for rows in record["layers"].values() if name in rows]
        said.append(f"{name} {min(ratios):.2f}x to {max(ratios):.2f}x")
    return "\n".join([*lines, "", f"Over these sizes: {'; '.join(said)}.", "", f"    {record['command']}"])


def growth_table(record: dict) -> str:
    """Markdown: how time and memory grow along each axis."""
    lines = header("axis", "variant", "seconds of a step", "slope", "peak memory, MiB", "slope")
    for axis, rows in record["growth"].items():
        sizes = [int(size) for size in rows]
        for name in next(iter(rows.values())):
            cells = [f"{axis}, {sizes[0]} to {sizes[-1]}", name]
            for key, unit, digits in (("seconds", 1, 3), ("bytes", 2**20, 1)):
                values = [row[name][key] / unit for row in rows.values()]
                cells += [f"{values[0]:.{digits}f} to {values[-1]:.{digits}f}", f"{slope(sizes, values):.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"    {record['command']}"])


SHOWN = [("seconds", "seconds of a step", 1), ("bytes", "peak memory, MiB", 2**20)]
WAYS = {"no STGC": "none", "one pass": "ce-one", "two passes": "ce"}  # of lab.bench.layer, by their variants


def plot_growth(growth: dict, path: Path) -> Path:
    """A column per axis; above the time, below the memory."""
    figure, axes = plt.subplots(2, len(growth), figsize=(3.4 * len(growth), 6.4), sharex="col", squeeze=False)
    for column, (axis, rows) in zip(axes.T, growth.items()):
        sizes = [int(size) for size in rows]
        for panel, (key, label, unit) in zip(column, SHOWN):
            for name in next(iter(rows.values())):
                values = [found[name][key] / unit for found in rows.values()]
                look = dict(zip(("color", "linestyle", "marker"), style_of(WAYS[name]))) | {"markersize": 4}
                panel.loglog(sizes, values, **look, label=f"{name}: slope {slope(sizes, values):.2f}")
            panel.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes])
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
            panel.legend(frameon=False, fontsize=8)
            panel.set_ylabel(label if axis == next(iter(growth)) else "")
        column[1].set_xlabel(axis.replace("top_k", "experts per token"))
    rest = "{tokens} tokens, {experts} experts, {top_k} experts per token, layers: {layers}".format(**START)
    title = f"MoE layers alone, hidden size {SIZE[0]}, no model around them: one number varies, the others are {rest}"
    figure.suptitle(title, fontsize=11)
    return save(figure, path)


def plot_peers(record: dict, path: Path) -> Path:
    """Time and memory of each way relative to ours, on logarithmic axes. Ways that were not installed are left out."""
    rows = {name: row for name, row in record["variants"].items() if row}
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 0.7 + 0.46 * len(rows)), sharey=True)
    for axis, key, label in zip(axes, ("ratio", "peak_ratio"), ("time", "peak memory")):
        for y, (row, face, hatch) in enumerate(zip(rows.values(), SHADES, HATCHES)):
            low, high = row["interval"] if key == "ratio" else [row[key]] * 2
            axis.barh(y, row[key] - 1, 0.7, left=1, color=face, hatch=hatch, edgecolor="#1b1b1b", linewidth=0.8)
            axis.plot([low, high], [y, y], "|-", color="#1b1b1b", linewidth=1.6, markersize=8)
            place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
            axis.annotate(f"{row[key]:.2f}x", (max(1, high), y), **place)
        ends = [1, *(row[key] for row in rows.values())]
        axis.set(xscale="log", xlim=(0.7 * min(ends), 2.2 * max(ends)), xlabel=f"{label}, relative to {record['base']}")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}x")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.axvline(1, color="#1b1b1b", linewidth=1)
    axes[0].set_yticks(range(len(rows)), rows, fontsize=9)
    axes[0].invert_yaxis()
    return save(figure, path)


ATTACHED = "A model of transformers with `stgc_hf` attached, against the faster of the library's own implementations."
SECTIONS = {  # records -> title, text, table
    "bench.json": ("A step of training", "A small BERT with MoE layers, against itself without STGC.", bench_table),
    "bench-bert-*.json": (
        "A step of training, larger",
        "BERT-base and BERT-large with random weights and one MoE layer in the middle, 8 experts, Top-2.",
        bench_table,
    ),
    "bench-mixtral.json": ("Attached to Mixtral", f"{ATTACHED} 8 experts, Top-2.", bench_table),
    "bench-olmoe.json": ("Attached to OLMoE", f"{ATTACHED} 64 experts, Top-8.", bench_table),
    "bench-peer.json": (
        "The whole loop",
        "Training by `glue_moefy.py` with one MoE layer, beside transformers' Trainer on the dense model: the same data,\n"
        "batches by length, fused AdamW, fp32, no evaluation, each in a fresh process, taking turns. Two experts per token\n"
        "in one of six layers are 80/72 of the dense model's multiplications outside attention's products, so 0.90x is\n"
        "what the layer itself costs.",
        peer_table,
    ),
    "layer*.json": (
        "One MoE layer",
        "Forward and backward of 8 experts, Top-2, as ratios to the limit: eight FFNs on even slices, without a router and\n"
        "without sorting. The loop of `stgc.Experts` stays simple; `stgc_plus.Experts` has the faster kernels.",
        layer_table,
    ),
    "scaling*.json": (
        "How it grows",
        "One number varies at a time. The slope is that of the line through the logarithms of both: 1 is linear growth.\n"
        "Time and memory are linear in tokens and nearly so in layers. With more experts the products stay the same, so\n"
        "only what is kept for each expert grows. With more experts per token the router's part stays the same, so\n"
        "growth is below linear.",
        growth_table,
    ),
    "peers.json": (
        "Token gradients by other tools",
        "The gradient of the main loss at both biases of the expert, for every pair (token, expert), of one MoE layer\n"
        "with a head. All ways gave the same flags before they were timed. The paper used\n"
        "`call_for_per_sample_grads`. Each tool has the layer in a form that it can handle: a module for each expert\n"
        "or, for `vmap`, all experts for each token.",
        bench_table,
    ),
}


def made_on(record: dict) -> str:
    """The machine, the versions and the commit of a record."""
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in record["versions"].items())
    threads = f"{record['threads']} thread{'s' * (record['threads'] > 1)}"
    return f"{record['device']}, {threads}; {versions}; commit {str(record['commit']):.7}"


def render(results: Path) -> str:
    """The page: a section for each record that is there, with the picture beside the record."""
    parts = [HEAD]
    for pattern, (title, text, table) in SECTIONS.items():
        for path in sorted(results.glob(pattern)):
            record, picture = read_bench(path), path.with_suffix(".png")
            image = f"![{title}](../results/{picture.name})\n\n" if picture.is_file() else ""
            parts.append(f"## {title} (`{path.name}`)\n\n{text}\n\n{made_on(record)}.\n\n{image}{table(record)}\n")
    return "\n".join(parts)


def main() -> None:
    Parser(prog="lab.report.costs", description=__doc__).parse_args()
    results, page = ROOT / "results", ROOT / "docs" / "costs.md"
    if (results / "peers.json").is_file():
        say(plot_peers(read_bench(results / "peers.json"), results / "peers.png"))
    for record in sorted(results.glob("scaling*.json")):
        say(plot_growth(read_bench(record)["growth"], record.with_suffix(".png")))
    page.parent.mkdir(exist_ok=True)
    page.write_text(render(results))
    say(page)


if __name__ == "__main__":
    run_main("lab.report.costs", main, resumes=False)
