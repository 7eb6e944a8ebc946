"""Training on the conflict loss alone (sec. 4.3; figures 3, 8 and 9), from a trained model, beside its controls.

  python -m lab.report.alone RUN --output results/alone-lvlm.json
  python -m lab.report.alone --picture results/alone-lvlm.json       draws the picture beside a record again

RUN is the output folder of toy_lvlm.py, whose stage II is made into an MoE as stage III begins, or of glue_moefy.py with
--save-model. The loss acts on conflicting pairs (ce), on as many random ones (placebo) or on all (flat). It trains the
routers only, or everything that the run trained. A seed fixes the batches, of training examples, so the arms are compared
seed by seed. Dropout is off. The record has, per arm and seed, the main loss, and per MoE layer the conflict ratio, the
judged ratio (the pairs that have a gradient), the consistency and its standard deviation over experts: of one batch that
is not trained on, before every `--every`-th step and after the last. The picture shows all of it; with several MoE layers
also the ratio and the consistency of each.
"""

import random
from itertools import product
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from lab.moe.dynmoe import make_stgc
from lab.moe.probe import mean_of
from lab.report import probe
from lab.report.figures import plt, save, value_of
from lab.report.styles import MARKERS, style_of
from lab.run.cli import Parser, UserError, number, path, run_main, say
from lab.run.files import write_json
from lab.run.reading import read_json
from lab.run.runs import environment, make_accelerator, read_record
from lab.vision import lvlm
from stgc import MoELayer
from stgc_plus import STGC, STGCConfig

ARMS = {"ce": "conflict", "placebo": "random", "flat": "all"}  # -> STGCConfig.select
PARTS = ("routers", "everything")
KEYS = ("conflict_ratio", "consistency", "consistency_std")


def parameters_of(model: nn.Module, part: str) -> list[nn.Parameter]:
    """What an arm trains."""
    if part == "routers":
        return [p for layer in model.modules() if isinstance(layer, MoELayer) for p in layer.router.parameters()]
    return lvlm.trainable(model) if isinstance(model, LlavaForConditionalGeneration) else [*model.parameters()]


def measure(model: nn.Module, batch: dict, tau: float) -> dict:
    """The main loss, and the statistics of each layer, of one batch. The watch of the layers is back after it."""
    watches = [layer.watch for layer in model.modules() if isinstance(layer, MoELayer)]
    stgc = STGC(model, STGCConfig("none", tau=tau))
    main_loss = model(**batch).loss
    stgc.loss(main_loss)
    rows = [{key: row[key] for key in (*KEYS, "judged_ratio") if key in row} for row in stgc.stats()]
    for layer, watch in zip(stgc.layers, watches):
        layer.watch = watch
    return {"main_loss": main_loss.item(), "layers": rows}


def train_alone(model: nn.Module, batches: list[dict], config: STGCConfig, part: str, lr: float, every: int) -> list[dict]:
    """Trains a model in place, on the conflict loss alone, with all batches but the first, by which it is measured. Returns
    what was measured on the way and after the last step."""
    model.eval()
    model.requires_grad_(False)
    trained = parameters_of(model, part)
    for parameter in trained:
        parameter.requires_grad_(True)
    stgc, optimizer, rows = make_stgc(model, config), torch.optim.AdamW(trained, lr, weight_decay=0.0), []
    for layer in stgc.layers:
        layer.experts.requires_grad_(True)  # else no gradient reaches them
    probed, *batches = batches
    for step, batch in enumerate(batches):
        if step % every == 0:
            rows.append({"step": step} | measure(model, probed, config.tau))
        main_loss = model(**batch).loss
        (stgc.loss(main_loss) - main_loss).backward()
        optimizer.step()
        model.zero_grad()
    rows.append({"step": len(batches)} | measure(model, probed, config.tau))
    stgc.detach()
    return rows


def run_arms(run: Path, args, device: torch.device) -> None:
    """All arms and seeds. The record is written after each. UserError."""
    record = read_record(run, "RUN")
    if record is None:
        raise UserError(f"RUN {run} holds no record: give the output folder of a run")
    found = {saved.name: saved for saved in probe.find_models(run, record)}
    name = args.model or next((name for name in found if "stage2" in name), [*found][-1])
    if name not in found:
        raise UserError(f"--model {name}: {run} has {', '.join(found)}; name one of these")
    material = probe.load_material(record, found[name].folder)
    content = environment(device) | {"run": record["name"], "made_by": record["command"], "model": name}
    content |= {"steps": args.steps, "lr": args.lr, "rows": []}
    for seed in args.seeds:
        rng = random.Random(seed)
        rows = [[rng.choice(group) for group in rng.sample(material.groups, material.size)] for _ in range(1 + args.steps)]
        batches = [{key: value.to(device) for key, value in material.collate(some).items()} for some in rows]
        for part in PARTS:
            for arm, select in ARMS.items():
                config = STGCConfig(alpha=0.0, tau=record["config"]["tau"], select=select, seed=seed)
                model = found[name].load().to(device)
                curve = train_alone(model, batches, config, part, args.lr, args.every)
                content["rows"].append({"part": part, "arm": arm, "seed": seed, "curve": curve})
                first, last = (f"{row['main_loss']:.2f}, {ratio_of(row):.3f}" for row in (curve[0], curve[-1]))
                say(f"{part}, {arm}, seed {seed}: main loss, conflict ratio: {first} -> {last}")
                write_json(Path(args.output), content)


def ratio_of(row: dict) -> float:
    """The conflict ratio, mean over the layers that have one."""
    return mean_of([layer.get("conflict_ratio") for layer in row["layers"]]) or 0.0


SHOWN = {  # measured -> what it is, what to know of it, label of its axis
    "main_loss": ("main loss", "no arm trains on it", "nats, if cross-entropy"),
    "conflict_ratio": ("conflict ratio", "in the paper it falls", "flagged / all pairs"),
    "consistency": ("consistency, mean over experts", "in the paper it rises", "mean cosine"),
    "consistency_std": ("std of consistency over experts", "in the paper it rises", "std of mean cosines"),
}
PER_LAYER = {"conflict_ratio": "conflict ratio", "consistency": "consistency"}  # figures 9 and 3b


def mean_curves(record: dict, part: str, arm: str) -> list[list[dict]]:
    """A curve per seed. Its rows also have the means over the MoE layers."""
    curves = [row["curve"] for row in record["rows"] if (row["part"], row["arm"]) == (part, arm)]
    means = lambda row: {key: mean_of([layer.get(key) for layer in row["layers"]]) for key in KEYS}  # noqa: E731
    return [[row | means(row) for row in curve] for curve in curves]


def plot_mean(axis, curves: list[list[dict]], key: str, layer: int | None = None, **look) -> None:
    """A line of means over the seeds, of one MoE layer or of the mean over them. Steps without a value are left out."""
    means = {rows[0]["step"]: mean_of([value_of(row, key, layer) for row in rows]) for rows in zip(*curves)}
    shown = {step: value for step, value in means.items() if value is not None}
    axis.plot([*shown], [*shown.values()], **look)


def finish(axes, label: str) -> None:
    """Panels with one y axis. It starts at 0, so that a small change looks small."""
    top = max((value for axis in axes for line in axis.lines for value in line.get_ydata()), default=0.0)
    for axis in axes:
        axis.set(xlabel="step", ylim=(0, 1.08 * top or 1))
        axis.grid(alpha=0.25)
        if axis is not axes[0]:
            axis.tick_params(labelleft=False)
    axes[0].set_ylabel(label)


def plot_arms(record: dict, target: Path) -> Path:
    """What SHOWN names, and with several MoE layers below it what PER_LAYER names, over the steps."""
    curves = {(part, arm): mean_curves(record, part, arm) for part, arm in product(PARTS, ARMS)}
    layers = max((len(row["curve"][0]["layers"]) for row in record["rows"]), default=0)
    note = f"a line: mean over {len({row['seed'] for row in record['rows']})} seeds"
    blocks = 1 + (layers > 1)
    figure = plt.figure(figsize=(3.5 * len(SHOWN), 5.9 * blocks))
    upper, *lower = figure.subfigures(blocks, 1, squeeze=False).flat
    plot_values(upper, curves, note)
    for below in lower:
        plot_layers(below, curves, layers, note)
    names = [str(record[key]) for key in ("run", "model") if key in record]
    figure.suptitle(f"Training on the conflict loss alone: {', '.join([*names, f'MoE layers: {layers}'])}", fontsize=11)
    return save(figure, target)


Curves = dict[tuple[str, str], list[list[dict]]]  # (part, arm) -> a curve per seed


def plot_values(figure, curves: Curves, note: str) -> None:
    """A row of panels per part: a line per arm, the mean over seeds and MoE layers."""
    panels = figure.subplots(len(PARTS), len(SHOWN))
    for part, line in zip(PARTS, panels):
        for axis, (key, (title, what, label)) in zip(line, SHOWN.items()):
            for arm in ARMS:
                colour, style, marker = style_of(arm)
                look = {"color": colour, "linestyle": style, "marker": marker, "markersize": 4}
                plot_mean(axis, curves[part, arm], key, label=arm, **look)
            axis.set_title(f"{title}\n{part} trained; {what}")
            finish([axis], label)
    name_lines(figure, panels, f"{note} and the MoE layers")


def plot_layers(figure, curves: Curves, layers: int, note: str) -> None:
    """A row of panels per part: of each value a panel per arm, with a line per layer, the deeper the darker."""
    panels = figure.subplots(len(PARTS), len(PER_LAYER) * len(ARMS))
    for part, line in zip(PARTS, panels):
        for i, (key, title) in enumerate(PER_LAYER.items()):
            axes = line[i * len(ARMS) : (i + 1) * len(ARMS)]
            for axis, arm in zip(axes, ARMS):
                for layer in range(layers):
                    look = {"color": str(0.65 - 0.55 * layer / (layers - 1)), "marker": MARKERS[layer % len(MARKERS)]}
                    plot_mean(axis, curves[part, arm], key, layer, label=f"MoE layer {layer + 1}", markersize=5, **look)
                axis.set_title(f"{title}, {arm}\n{part} trained")
            finish(axes, SHOWN[key][-1])
    text = f"{note}, of one MoE layer; layer 1 is nearest to the input. A ratio is of all pairs of the layer, also of those "
    name_lines(figure, panels, f"{text}without a gradient:\ncompare how far each line falls, not how high it lies")


def name_lines(figure, panels, title: str) -> None:
    """One legend, for all panels have the same lines."""
    handles, labels = panels[0][0].get_legend_handles_labels()
    look = {"loc": "outside lower center", "frameon": False, "title_fontsize": 9}
    figure.legend(handles, labels, ncols=min(6, len(labels)), title=title, **look)


def main() -> None:
    parser = Parser(prog="lab.report.alone", description=__doc__)
    parser.add_argument("run", nargs="?", type=path("folder"), metavar="RUN", help="output folder with saved models")
    text = "folder of a model in RUN; default: stage II of the first seed, or the last model"
    parser.add_argument("--model", metavar="NAME", help=text)
    parser.add_argument("--steps", type=number(int, 2), default=40, help="steps of each arm")
    parser.add_argument("--every", type=number(int, 1), default=5, help="measure at every n-th step")
    parser.add_argument("--lr", type=number(float, 0), default=1e-3, help="AdamW's learning rate")
    parser.add_argument("--seeds", type=number(int, 0, 10**6), nargs="+", default=[0, 1, 2, 3, 4], help="of the batches")
    parser.add_argument("--output", type=path("new file"), metavar="FILE.json", help="the record")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: CUDA, MPS or CPU")
    parser.add_argument("--picture", type=path("file"), metavar="FILE.json", help="draw this record instead of making one")
    args = parser.parse_args()
    if not args.picture:
        if not args.run or not args.output:
            parser.error("RUN and --output are needed: the folder of a run, and a new file for the record")
        run_arms(Path(args.run), args, make_accelerator(args.device, "fp32").device)
    record = Path(args.picture or args.output)
    try:
        content = read_json(record, rows=list)
    except (OSError, ValueError) as error:
        raise UserError(f"--picture {record}: {error}; give a record of this command") from None
    say(f"written: {plot_arms(content, record.with_suffix('.png'))}")


if __name__ == "__main__":
    run_main("lab.report.alone", main, resumes=False)
