"""What the flags of saved models measure: whether other batches give the same flags, what they are about, whether they harm.

  python -m lab.report.probe RUN                           of every saved model, into `probes` of the run's results.json
  python -m lab.report.probe RUN --models model-none-s0    of this one alone
  python -m lab.report.probe RUN RUN ... --picture FILE    draws kappa against the training loss, of runs that are probed

RUN is the output folder of glue_moefy.py with --save-model, or of toy_lvlm.py. There the models of stages I and II are
probed, too: made into an MoE, as stage III begins. Dense models and sample-level routings are left out. The batches are
random training examples, as many as in a step of the training. An entry of `probes`, means over batches and MoE layers:

  model, variant, seed, loss            the folder; the main loss
  kappa, error, triples, kappas         flags of a batch by the means of two others: agreement beyond chance, its standard
                                        error, the number of triples of disjoint batches (until the error is at most ENOUGH,
                                        but no more than MOST); kappa of each layer
  flagged                               the share of the judged pairs that conflict
  about     {name: [share, chance]}     of the flags' variance: the share between sentences, pictures, or positions in an
                                        answer (of answer tokens), and the same for permuted groups
  labels    {label: share, gap}         GLUE: the flagged share of each label's pairs, and the mean largest difference
  confusing {pairs, own, other, rest}   LVLM: see lab.moe.probe.confusing
  harm                                  LVLM: see `measure_harm`
"""

import argparse
import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.lines import Line2D
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding

from lab.moe import baselines, moefication, probe
from lab.moe.probe import Layer, error_of, mean_of
from lab.report import page
from lab.report.figures import plt, save
from lab.report.records import probes_of
from lab.report.styles import STYLES
from lab.run.cli import Parser, UserError, number, path, run_main, say
from lab.run.files import LIST, lock_list, write_json
from lab.run.hub import Checkpoint
from lab.run.runs import RECORD, STAGES, digest_of, environment, make_accelerator, read_record
from lab.text import glue, toy, use
from lab.text.tasks import TASKS
from lab.vision import llava, lvlm
from lab.vision.instructions import IGNORED, Collate, make_packs
from stgc import Experts, MoELayer, widen
from stgc_plus import STGC, STGCConfig

ENOUGH, MOST = 0.03, 200  # the standard error of kappa that ends the search, and the most triples that it takes
SIZES = (0.003, 0.01, 0.03)  # of an update, relative to the length of the expert's parameters

# ---- 1. A run's models and data ----


class Saved(NamedTuple):
    """A saved model. `load()` gives it with MoE layers, or as the dense model that it is."""

    name: str  # of its folder below the run's
    folder: Path
    variant: str  # or stage
    seed: int
    load: Callable[[], nn.Module]


class Material(NamedTuple):
    """The training data of a run. Rows in a group, such as two packs of one picture, never are in disjoint batches."""

    groups: list[list[int]]
    collate: Callable[[list[int]], dict]
    size: int  # rows of a batch
    labels: list[str] | None  # GLUE: names of the classes; None: a regression, or an LVLM
    pictures: bool  # an LVLM


def find_models(run: Path, record: dict) -> list[Saved]:
    """The models of a run that may be probed, in the order of its training; its dense stages may lie in another run, see
    --stages-from. UserError without any."""
    args, found = argparse.Namespace(**record["config"]), []

    def load(folder: Path, seed: int | None) -> nn.Module:
        if "task" in record["config"]:
            return use.load_saved(folder, "RUN")[0]
        model = lvlm.load(Checkpoint("RUN", folder, again="train again"))[0]
        if seed is None:
            return model
        return moefication.moefy(model, replace(lvlm.check_spec(args, *lvlm.find_parts(args)), seed=seed))

    def add(name: str, what: str, seed: int, dense: bool) -> None:
        folders = [Path(home) / name for home in (run, record["config"].get("stages_from")) if home]
        if folder := next((folder for folder in folders if folder.is_dir()), None):
            found.append(Saved(name, folder, what, seed, lambda: load(folder, seed if dense else None)))

    for entry in record.get("stages", []):
        if entry["stage"] in ("stage1", "stage2"):
            add(f"{STAGES}/{entry['stage']}-s{entry['seed']}", entry["stage"], entry["seed"], dense=True)
    for entry in record["runs"]:
        for rate in page.rates(entry):
            add(f"model-{entry['variant']}{rate}-s{entry['seed']}", entry["variant"], entry["seed"], dense=False)
    if not found:
        raise UserError(f"RUN {run} holds no saved model: train again with --save-model")
    return found


def load_material(record: dict, model: Path) -> Material:
    return (load_texts if "task" in record["config"] else load_pictures)(record, model)


def load_texts(record: dict, model: Path) -> Material:
    """The training data of a run of glue_moefy.py, with the tokenizer of its model."""
    args = argparse.Namespace(**record["config"])
    task, (_, tokenizer, card) = TASKS[args.task], use.load_saved(model, "RUN")
    train = (toy.make_pairs(task.columns) if args.toy else glue.load_splits(args.task, task, args.data_dir))["train"]
    train = train.select(range(min(len(train), args.max_train_samples or len(train))))
    check_digest(record, "the data of train", glue.digest_of_split(train, task))
    encoded = glue.tokenize({"train": train}, task, tokenizer, args.max_length)["train"]
    collate = DataCollatorWithPadding(tokenizer)
    names = None if task.num_labels == 1 else list(map(str, card.labels or range(task.num_labels)))
    make = lambda rows: dict(collate([encoded[row] for row in rows]))  # noqa: E731
    return Material([[row] for row in range(len(encoded))], make, args.batch_size, names, False)


def load_pictures(record: dict, model: Path) -> Material:
    """The training data of a run of toy_lvlm.py, with the tokenizer of its model."""
    args = argparse.Namespace(**record["config"])
    tokenizer = lvlm.load(Checkpoint("RUN", model, again="train again"))[1]
    clip = lvlm.load_clip(*lvlm.find_clip(args.clip)) if args.clip else None
    data = lvlm.load_data(args, clip, tokenizer, llava.Problems(args.max_bad))
    check_digest(record, "the data to train", digest_of(data.train.images_N3SS, data.train.instructions))
    packs = make_packs(data.train, data.encoded, data.image_id, args.max_length)
    collate, groups = Collate(data.train, packs, data.pixels, data.pad_id), {}
    for row, pack in enumerate(packs):
        image = data.train.instructions[pack.rows[0]].image
        groups.setdefault(("text", row) if image is None else image, []).append(row)

    def make(rows: list[int]) -> dict:
        batch = collate(rows)
        return {key: value for key, value in batch.items() if key not in ("keep", "asked", "rows")}

    return Material([*groups.values()], make, args.batch_size, None, True)


def check_digest(record: dict, what: str, found: str) -> None:
    if (record.get("made_from") or {}).get(what, found) != found:
        raise UserError(f"RUN: {what} of {record['name']} changed since its training; restore what was there")


def draw_triples(material: Material, seed: int = 0) -> Iterator[list[list[int]]]:
    """Three disjoint batches at a time, without end. No group comes again before all had their turn, but for a rest."""
    rng, size = random.Random(seed), material.size
    while True:
        rows = [rng.choice(group) for group in rng.sample(material.groups, len(material.groups))]
        for start in range(0, len(rows) - 3 * size + 1, 3 * size):
            yield [rows[start + i * size : start + (i + 1) * size] for i in range(3)]


# ---- 2. Measuring ----


class Look(NamedTuple):
    """What a model shows of one batch."""

    batch: dict
    loss: float
    logits_BLV: Tensor  # of a classifier (B, C)
    layers: list[Layer | None]


def look(model: nn.Module, stgc: STGC, batch: dict) -> Look:
    """`stgc`: of two passes and gradients="weight"."""
    batch = {key: value.to(next(model.parameters()).device) for key, value in batch.items()}
    out = model(**batch)
    steps = dict(stgc.steps)
    stgc.loss(out.loss)
    layers = [probe.layer_of(steps[i], verdict) for i, verdict in enumerate(stgc.verdicts)]
    return Look(batch, out.loss.item(), out.logits.detach(), layers)


def answer_places(labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """label_T, the token that each place has to predict, IGNORED without one; and its position in its answer, from 0."""
    label_BL = F.pad(labels_BL[:, 1:], (0, 1), value=IGNORED)
    count_BL = (label_BL != IGNORED).long().cumsum(1)
    before_BL = count_BL.where(label_BL == IGNORED, 0).cummax(1).values
    return label_BL.flatten(), (count_BL - before_BL - 1).flatten()


def find_causes(own: Look, layer: Layer, labels: list[str] | None, pictures: bool) -> tuple[dict, dict]:
    """`about` and `labels` of one batch and layer, see the module."""
    rows_T = torch.arange(len(own.batch["input_ids"])).repeat_interleave(own.batch["input_ids"].shape[1])
    row_P = rows_T.to(layer.tokens_P.device)[layer.tokens_P]
    if pictures:
        label_T, position_T = answer_places(own.batch["labels"])
        answers = layer.only(label_T[layer.tokens_P] != IGNORED)
        places = probe.explained(answers.conflict_P, position_T[answers.tokens_P])
        return {"picture": probe.explained(layer.conflict_P, row_P), "position": places}, {}
    label_P, shares = own.batch["labels"][row_P], {}
    for i, name in enumerate(labels or ()):
        if (label_P == i).any():
            shares[name] = layer.conflict_P[label_P == i].float().mean().item()
    gap = {"gap": max(shares.values()) - min(shares.values())} if len(shares) > 1 else {}
    return {"sentence": probe.explained(layer.conflict_P, row_P)}, shares | gap


def parameters_of(experts: Experts) -> list[nn.Parameter]:
    """The stacked parameters in the order of `probe.expert_gradient`."""
    own = dict(experts.named_parameters())
    return [own[key] for part in ("gate", "in", "out") for kind in "wb" for key in own if key.startswith(f"{kind}_{part}_")]


@torch.no_grad()
def measure_harm(model: nn.Module, layer: MoELayer, i: int, own: Look, fresh: Look, seed: int) -> Tensor:
    """loss_2AZ: the mean main loss of the tokens on the fullest expert of MoE layer i, in the batch itself and a fresh one,
    after one SGD step on this expert with the pairs of each arm, in each of SIZES. A: first no step, then probe.ARMS. All
    updates of a size have one length. NaN where no token of the expert has a loss of its own. For a small step on the batch
    itself all pairs are the best choice, by construction: their sum is the steepest descent. The fresh batch decides.
    """
    expert = own.layers[i].experts_P.bincount().argmax().item()
    experts, parameters = layer.experts, parameters_of(layer.experts)
    before, biased = [parameter[expert].clone() for parameter in parameters], experts.b_in_EF is not None
    length = torch.stack([part.norm() for part in before]).norm()
    rows = [[loss_on(one, one.logits_BLV, i, expert) for one in (own, fresh)]] * len(SIZES)
    for keep_P in probe.arms(own.layers[i], expert, seed).values():
        grads = probe.expert_gradient(own.layers[i], keep_P, biased)
        norm = torch.stack([grad.norm() for grad in grads]).norm().clamp_min(probe.TINY)
        for size in SIZES:
            for parameter, start, grad in zip(parameters, before, grads, strict=True):
                parameter[expert] = start - size * length / norm * grad
            rows.append([loss_on(one, model(**one.batch).logits, i, expert) for one in (own, fresh)])
    for parameter, start in zip(parameters, before):
        parameter[expert] = start
    return torch.tensor(rows, dtype=torch.float64).view(-1, len(SIZES), 2).permute(2, 0, 1)


def loss_on(one: Look, logits_BLV: Tensor, i: int, expert: int) -> float:
    """The mean main loss of the tokens of a batch that have one and that are on an expert of MoE layer i."""
    label_T, _ = answer_places(one.batch["labels"])
    tokens_N = one.layers[i].tokens_P[one.layers[i].experts_P == expert]
    tokens_N = tokens_N[label_T[tokens_N] != IGNORED]
    return F.cross_entropy(widen(logits_BLV.flatten(0, 1)[tokens_N]), label_T[tokens_N]).item()


def sum_up_harm(found: list[Tensor]) -> dict:
    """`found`: loss_2AZ of each batch. Means over batches: the loss `before` and after each arm; `minus_all`: the difference
    to the arm with all pairs, and its standard error."""
    loss_N2AZ = torch.stack(found)
    result = {"sizes": list(SIZES), "batches": len(found), "own": {}, "fresh": {}}
    for side, loss_NAZ in zip(("own", "fresh"), loss_N2AZ.unbind(1)):
        loss_NAZ = loss_NAZ[loss_NAZ.isfinite().all(-1).all(-1)]
        result[side]["before"] = mean_of(loss_NAZ[:, 0, 0].tolist())
        for a, arm in enumerate(probe.ARMS, start=1):
            gaps = (loss_NAZ[:, a] - loss_NAZ[:, 1]).T.tolist()
            result[side][arm] = {"loss": [mean_of(values) for values in loss_NAZ[:, a].T.tolist()]}
            result[side][arm]["minus_all"] = [[mean_of(values), error_of(values)] for values in gaps]
    return result


def means(rows: list[dict]) -> dict:
    """The mean of each key over the rows that have it: of numbers, or of tuples element by element."""
    found = {key: [row[key] for row in rows if row.get(key) is not None] for row in rows for key in row}
    return {
        key: [mean_of(part) for part in zip(*values)] if isinstance(values[0], tuple) else mean_of(values)
        for key, values in found.items()
        if values
    }


def probe_model(model: nn.Module, material: Material, tau: float, triples: int) -> dict:
    """The numbers of an entry, see the module. At least `triples` triples, then more until kappa's standard error is known
    and at most ENOUGH, or MOST triples are there. The other statistics are of the first batch of each of the first
    `triples`."""
    model.requires_grad_(False)
    stgc = STGC(model, STGCConfig("none", tau=tau, gradients="weight"))
    for layer in stgc.layers:
        layer.requires_grad_(True)
    kappas, by_layer, losses, flagged, about, labels, pairs, harm = [], [], [], [], [], [], [], []
    bar = tqdm(draw_triples(material), desc="triples", dynamic_ncols=True, disable=None)
    for count, rows in enumerate(bar, start=1):
        three = [look(model, stgc, material.collate(some)) for some in rows]
        there = [i for i in range(len(stgc.layers)) if all(one.layers[i] is not None for one in three)]
        by_layer.append({stgc.names[i]: probe.agreement([one.layers[i] for one in three], tau) for i in there})
        kappas.append(mean_of([*by_layer[-1].values()]))
        losses += [one.loss for one in three]
        flagged += [layer.conflict_P.float().mean().item() for one in three for layer in one.layers if layer is not None]
        if count <= triples:
            own, fresh, _ = three
            for i in there:
                causes, shares = find_causes(own, own.layers[i], material.labels, material.pictures)
                about.append(causes)
                labels.append(shares)
            if material.pictures:
                logits_TV, (label_T, _) = own.logits_BLV.flatten(0, 1), answer_places(own.batch["labels"])
                pairs += [probe.confusing(own.layers[i], logits_TV, label_T) for i in there]
                seen = [measure_harm(model, stgc.layers[i], i, own, fresh, seed=1000 * count) for i in there]
                harm.append(torch.stack(seen).mean(0))
        error = error_of(kappas)
        if count >= max(triples, MOST) or (count >= triples and error is not None and error <= ENOUGH):
            break
    stgc.detach()
    numbers = {"loss": mean_of(losses), "kappa": mean_of(kappas), "error": error, "triples": count}
    numbers |= {"kappas": means(by_layer), "flagged": mean_of(flagged), "about": means(about)}
    if not material.pictures:
        return numbers | {"labels": means(labels)}
    total, *sums = (sum(column) for column in zip(*pairs))
    confusing = {key: value / total if total else None for key, value in zip(("own", "other", "rest"), sums)}
    return numbers | {"confusing": {"pairs": int(total)} | confusing, "harm": sum_up_harm(harm)}


def probe_run(run: Path, triples: int, device: torch.device, names: list[str] | None = None) -> None:
    """Probes the models of a run, all or those that are named, and writes each entry when it is there. UserError."""
    if read_record(run, "RUN") is None:
        raise UserError(f"RUN {run} holds no {RECORD}: give the output folder of a run")
    if not os.access(run, os.W_OK):
        raise UserError(f"RUN {run}: cannot be written; copy it, or change its permissions")
    with lock_list(run) if (run / LIST).is_file() else nullcontext():
        record = read_record(run, "RUN")
        models, probes = find_models(run, record), {one["model"]: one for one in record.get("probes", [])}
        material = load_material(record, models[0].folder)
        if len(material.groups) < (need := 3 * material.size):
            what = f"three disjoint batches of {material.size} need {need} training examples, it has {len(material.groups)}"
            raise UserError(f"RUN {run}: {what}; train with a smaller --batch-size")
        known = [saved.name for saved in models]
        if unknown := [name for name in names or () if name not in known]:
            raise UserError(f"--models {unknown[0]}: RUN {run} holds {', '.join(known)}")
        for saved in models:
            if names and saved.name not in names:
                continue
            model = saved.load().to(device)
            routed = any(isinstance(module, MoELayer) for module in model.modules())
            if not routed or baselines.samples_of(model) is not None:
                say(f"{saved.name}: left out, {'it routes whole samples' if routed else 'it is dense'}")
                continue
            entry = {"model": saved.name, "variant": saved.variant, "seed": saved.seed}
            entry |= probe_model(model, material, record["config"]["tau"], triples)
            entry |= {key: value for key, value in environment(device).items() if key in ("command", "commit", "dirty")}
            probes[saved.name] = entry
            write_json(run / RECORD, record | {"probes": [*probes.values()]})
            say(*describe(entry))
        if any(run.glob("film-*.json")):
            say(page.write_run(run))


# ---- 3. Showing ----


def describe(entry: dict) -> list[str]:
    """Lines for the terminal."""
    show = lambda value: "-" if value is None else f"{value:.4f}"  # noqa: E731
    kappa = f"kappa {show(entry['kappa'])} ± {show(entry['error'])} ({entry['triples']} triples)"
    lines = [f"{entry['model']}: main loss {show(entry['loss'])}, {kappa}, flagged {show(entry['flagged'])}"]
    lines += [
        f"  the {name} explains {show(a)} of the flags, by chance {show(b)}" for name, (a, b) in entry["about"].items()
    ]
    if entry.get("labels"):
        lines.append("  flagged by label: " + ", ".join(f"{name} {show(share)}" for name, share in entry["labels"].items()))
    if "confusing" in entry:
        count, *logits = entry["confusing"].values()
        lines.append(
            "  confusing tokens: {} pairs, logit on own label {}, other's {}, rest {}".format(count, *map(show, logits))
        )
        for side in ("own", "fresh"):
            own = entry["harm"][side]
            lines.append(f"  loss on the {side} batch after a step on an expert, before it {show(own['before'])}:")
            for arm in probe.ARMS:
                rows = zip(entry["harm"]["sizes"], own[arm]["loss"], own[arm]["minus_all"])
                cells = [f"size {z:g}: {show(loss)} ({show(gap)} ± {show(error)})" for z, loss, (gap, error) in rows]
                lines.append(f"    {arm:<26} {', '.join(cells)}")
    return lines


WHOSE = {"own": "the own label", "other": "the other's", "rest": "the rest"}
MARKS = {"own": "o", "other": "s", "rest": "^"}


def plot_probes(records: list[dict], file: Path) -> Path:
    """Kappa against the training loss: a point per probed model, with its standard error if it has one, in the order of the
    loss, which falls to the right. Not all models of a line are of one training. Beside it the logits of confusing tokens
    (table 14). UserError without a number."""
    series = probes_of(records)
    if not series:
        raise UserError("RUN: none of these runs is probed: first run the same without --picture")
    logits = any(one.get("confusing") for found in series.values() for one in found)
    models: dict[str, Line2D] = {}  # of the right legend: a line's look tells the models, its marker the label
    figure, axes = plt.subplots(1, 1 + logits, figsize=(6.5 * (1 + logits), 4.2), squeeze=False)
    for (title, found), (colour, style, marker) in zip(series.items(), cycle(STYLES)):
        losses, kappas, errors = ([one[key] for one in found] for key in ("loss", "kappa", "error"))
        errors = [math.nan if error is None else error for error in errors]  # unknown: no bar
        look = {"linestyle": style, "color": colour, "label": title}
        axes[0, 0].errorbar(losses, kappas, errors, marker=marker, capsize=3, **look)
        tokens = [(one["loss"], one["confusing"]) for one in found if one.get("confusing")]
        if tokens:
            models[title] = Line2D([], [], linestyle=style, color=colour)
        for key, sign in MARKS.items() if tokens else ():
            losses, values = zip(*((loss, own[key]) for loss, own in tokens))
            axes[0, 1].plot(losses, values, marker=sign, **look | {"label": f"{title}: {WHOSE[key]}"})
    axes[0, 0].axhline(0, color="#777777", linewidth=1, linestyle=":")
    axes[0, 0].set(title="do other batches flag the same tokens?", ylabel="kappa of the flags by other batches")
    if logits:
        axes[0, 1].set(title="confusing tokens: does the model mix them up?", ylabel="mean logit")
    for axis in axes[0]:
        axis.margins(0.12)
        axis.invert_xaxis()
        axis.set(xlabel="main loss on training batches of the probed models")
        axis.grid(alpha=0.25)
    axes[0, 0].legend(frameon=False, fontsize=8)
    if logits:
        looks = {f"logit on {WHOSE[key]}": Line2D([], [], linestyle="", color="#555555", marker=MARKS[key]) for key in WHOSE}
        looks = models | looks
        low, high = axes[0, 1].get_ylim()
        axes[0, 1].set_ylim(low, high + (high - low) / 5)
        axes[0, 1].legend(looks.values(), looks, frameon=False, fontsize=8, ncols=2, loc="upper left")
    return save(figure, file)


def main() -> None:
    parser = Parser(prog="lab.report.probe", description=__doc__)
    parser.add_argument("run", type=path("folder"), nargs="+", metavar="RUN", help="output folder with saved models")
    text = f"triples of batches at least; more, up to {MOST}, until the standard error of kappa is {ENOUGH}"
    parser.add_argument("--triples", type=number(int, 2), default=16, help=text)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="these alone, such as stages/stage2-s0 model-none-s0")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: CUDA, MPS or CPU")
    parser.add_argument(
        "--picture", type=path("new file"), metavar="FILE", help="draw the probed runs into this PNG instead"
    )
    args = parser.parse_args()
    if args.picture:
        records = [read_record(Path(run), "RUN") or {"config": {}} for run in args.run]
        return say(f"written: {plot_probes(records, Path(args.picture))}")
    device = make_accelerator(args.device, "fp32").device
    for run in args.run:
        probe_run(Path(run), args.triples, device, args.models)


if __name__ == "__main__":
    run_main("lab.report.probe", main, resumes=False)
