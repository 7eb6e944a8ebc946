"""Use of a saved model: predictions for a file of sentences, and the routing of example sentences, token by token.

    print(predict(run, "pairs.csv"))    # writes pairs.predictions.csv
    print(inspect(run))

A model folder holds the files that `save_pretrained` of model and tokenizer wrote, and a card, task.json, which describes
the model's inputs and answers. Nothing in the folder is unpickled or run as code.

  1 Card  2 Saved models  3 Predict  4 Inspect
"""

import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedModel

from lab.moe import moefication
from lab.moe.baselines import CosineRouter
from lab.moe.film import Shown, look_at
from lab.run.cli import UserError, printable
from lab.run.files import write_json, written
from lab.run.hub import Checkpoint, count_positions, misfit
from lab.text.tables import load_rows, write_rows
from stgc import MoELayer, Verdict
from stgc_plus import STGC, STGCConfig

# ---- 1. Card ----

CARD = "task.json"


def is_names(texts, *lengths: int) -> bool:
    good = isinstance(texts, (list, tuple)) and all(isinstance(t, str) and t and t.isprintable() for t in texts)
    return good and len(set(texts)) == len(texts) in lengths


@dataclass(frozen=True)
class TaskCard:
    """The inputs and answers of a saved model. Bad values raise ValueError."""

    task: str
    columns: list[str]  # one sentence or two
    num_labels: int  # 1 means a regression
    max_length: int  # in tokens; longer inputs are cut
    labels: list[str] | None  # names of the classes; None if they have none, and for a regression
    examples: list[dict]  # rows of dev: the text of each column, and `label`

    def __post_init__(self):
        good = {
            "task": isinstance(self.task, str),
            "columns": is_names(self.columns, 1, 2),
            "num_labels": type(self.num_labels) is int and self.num_labels > 0,
            "max_length": type(self.max_length) is int and self.max_length > 0,
            "labels": self.labels is None or (self.num_labels != 1 and is_names(self.labels, self.num_labels)),
            "examples": all(map(self.fits, self.examples)),
        }
        if not all(good.values()):
            bad = min(good, key=good.get)
            raise ValueError(f"invalid {bad}={getattr(self, bad)!r:.60}")

    def fits(self, row: dict) -> bool:
        """Whether a row is a valid example."""
        numbers = {1: (int, float)}.get(self.num_labels, (int,))
        fits = type(row.get("label")) in numbers and (self.num_labels == 1 or 0 <= row["label"] < self.num_labels)
        return fits and all(isinstance(row.get(name), str) for name in self.columns)


def write_task_card(folder: Path, task: str, columns, num_labels: int, max_length: int, labels, examples) -> None:
    """Writes the card into the folder of a saved model. ValueError for values that `read_task_card` would refuse."""
    write_json(Path(folder) / CARD, asdict(TaskCard(task, columns, num_labels, max_length, labels, examples)))


def read_task_card(folder: Path, flag: str = "--run") -> TaskCard:
    """The card of a model folder. UserError if it is missing or damaged."""
    return Checkpoint(flag, folder, again="train again with --save-model").read(CARD, TaskCard)


# ---- 2. Saved models ----


def find_model(run: str | Path, flag: str = "--run") -> Path:
    """`run` itself if it is a model folder, otherwise the only one in it. UserError for none or several, which it lists."""
    run = Path(run).expanduser()
    if not run.is_dir():
        raise UserError(f"{flag} {run}: no such folder; give the output folder of a run, or a model folder in it")
    models = [run] if (run / "config.json").is_file() else sorted(path for path in run.glob("model-*") if path.is_dir())
    if not models:
        raise UserError(f"{flag} {run} holds no saved model: train with --save-model")
    if len(models) > 1:
        raise UserError(f"{flag} {run} holds {', '.join(path.name for path in models)}: name one, as {flag} {models[0]}")
    return models[0]


def load_saved(folder: Path, flag: str = "--run") -> tuple[PreTrainedModel, object, TaskCard]:
    """Model (moefied or dense, in eval mode), tokenizer and card, read from this folder only. UserError if it is damaged."""
    card, saved = read_task_card(folder, flag), Checkpoint(flag, folder, again="train again with --save-model")
    saved.require("config.json", "tokenizer_config.json", "tokenizer.json")
    model = moefication.load_either(saved, AutoModelForSequenceClassification)
    config, tokenizer = model.config, saved.tokenizer(model.config)
    if not type(model).__name__.endswith("ForSequenceClassification") or config.num_labels != card.num_labels:
        saved.refuse(f"{type(model).__name__} of {config.num_labels} labels, {CARD} has {card.num_labels}")
    if card.max_length > (positions := count_positions(config)):
        saved.refuse(f"{CARD} promises {card.max_length} tokens, the model has {positions} positions")
    if reason := misfit(config, tokenizer, len(card.columns)):
        saved.refuse(reason)
    return model, tokenizer, card


# ---- 3. Predict ----


@torch.no_grad()
def compute_logits(model, tokenizer, encoded, batch_size: int, device) -> Tensor:
    """logits_NC in the order of the inputs. Batches are made of inputs of similar length, the longest first."""
    inputs = [dict(zip(encoded, values)) for values in zip(*encoded.values())]
    order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]["input_ids"]))
    collate, logits_NC = DataCollatorWithPadding(tokenizer), torch.empty(len(inputs), model.config.num_labels)
    model.to(device)
    for start in tqdm(range(0, len(order), batch_size), desc="predict", unit="batch", disable=None):
        picked = order[start : start + batch_size]
        logits_NC[picked] = model(**collate([inputs[i] for i in picked]).to(device)).logits.to(logits_NC)
    return logits_NC


def predict(run: str | Path, file: str | Path, output: str | Path | None = None, batch_size: int = 32, device="cpu") -> str:
    """Writes the rows of `file` with `prediction` and the classes' probabilities, in the same format. Returns the message.

    The default output is NAME.predictions.SUFFIX in the folder of the file. An existing file is never replaced. UserError
    for anything wrong with run, file or output; then nothing is written. Empty sentences and unknown words are predicted
    like others; the message counts them.
    """
    folder, file = find_model(run), Path(file).expanduser()
    card = read_task_card(folder)
    names = card.labels or range(card.num_labels)
    columns = [] if card.num_labels == 1 else [f"probability_{name}" for name in names]
    rows, sentences = load_rows(file, card.columns, ["prediction", *columns])
    target = Path(output).expanduser() if output else file.with_name(f"{file.stem}.predictions{file.suffix}")
    if target.suffix.lower() != file.suffix.lower():
        raise UserError(f"--output {target}: the name must end in {file.suffix}, as the output has the format of the file")
    if os.path.lexists(target):
        raise UserError(f"--output {target} exists already: remove it, or name another file with --output")
    try:
        with written(target, new_only=True) as new_file:  # fails now rather than after the work
            model, tokenizer, card = load_saved(folder)
            encoded = tokenizer(*sentences, truncation=True, max_length=card.max_length)
            logits_NC = compute_logits(model, tokenizer, encoded, batch_size, device)
            if not logits_NC.isfinite().all():
                raise UserError(f"--run {folder}: this model's outputs are not finite; train another")
            if card.num_labels == 1:
                new = {"prediction": logits_NC[:, 0].tolist()}
            else:
                new = {"prediction": [names[i] for i in logits_NC.argmax(-1).tolist()]}
                new |= {name: [round(p, 6) for p in own] for name, own in zip(columns, logits_NC.softmax(-1).T.tolist())}
            write_rows(new_file, file.suffix.lower(), rows, new)
    except OSError as error:
        raise UserError(f"--output {target} cannot be written ({error.strerror}): name another file") from error
    blank = sum(not all(text.strip() for text in texts) for texts in zip(*sentences))
    ids = [one for row in encoded["input_ids"] for one in row]
    lost = ids.count(tokenizer.unk_token_id)
    said = f"written: {printable(target)}, {len(rows)} rows" + (f", {blank} of them with an empty sentence" if blank else "")
    unknown = f"{lost} of {len(ids)} tokens are unknown to the model, which reads each as {tokenizer.unk_token}"
    return said + (f"\nwarning: {unknown}" if lost else "")


# ---- 4. Inspect ----

WIDTH, TOKEN, BAR = 100, 20, 28  # columns of the terminal, of a token at most, of the longest bar


def inspect(run: str | Path, device="cpu") -> str:
    """A text for the terminal with routing and conflicts of the card's examples: answers, then each token, then each layer.

    All examples form one batch, since a conflict is relative to a mean gradient. UserError for a model without MoE layers.
    """
    model, tokenizer, card, batch = load_examples(find_model(run, "--inspect"), device)
    stgc, inputs = STGC(model, STGCConfig(conflict_loss="none")), {}
    for layer in stgc.layers:
        layer.register_forward_pre_hook(lambda layer, args: inputs.update({layer: args[0].detach()}))
    out = model(**batch)
    stgc.loss(out.loss)  # two passes: the backward that finds the conflicts happens here

    keep_BL = batch["attention_mask"].bool()
    tokens = [tokenizer.convert_ids_to_tokens(ids[keep].tolist()) for ids, keep in zip(batch["input_ids"], keep_BL)]
    sums, blocks = [], [describe_example(card, i, out.logits[i].detach()) for i in range(len(tokens))]
    for layer, name, verdict in zip(stgc.layers, stgc.names, stgc.verdicts):
        found = describe_layer(layer, name, inputs[layer], keep_BL, verdict, tokens)
        sums, blocks = [*sums, found[0]], [*blocks, *found[1:]]
    intro = [
        f"{card.task}: {len(tokens)} dev examples, {sum(map(len, tokens))} tokens, MoE layers: {len(stgc.layers)}",
        "  They form one batch: conflicts are relative to its mean gradients and differ in another batch.",
        *explain_marks("\n".join(blocks[len(tokens) :])),
    ]
    if any(isinstance(layer.router, CosineRouter) for layer in stgc.layers):
        intro.append("  A cosine router's logits are bounded, so the weights stay near 1 / K until its scale has grown.")
    return "\n\n".join(["\n".join(intro), *blocks, *sums])


def load_examples(folder: Path, device) -> tuple[PreTrainedModel, object, TaskCard, dict]:
    """A saved model, its tokenizer and card, and the card's examples as a batch. UserError for one without MoE layers or
    examples."""
    model, tokenizer, card = load_saved(folder, "--inspect")
    if not any(isinstance(module, MoELayer) for module in model.modules()):
        raise UserError(f"--inspect {folder} is a dense model without MoE layers; only --predict works with it")
    if not card.examples:
        raise UserError(f"--inspect {folder}: {CARD} has no examples; train again with --save-model")
    texts = [[row[name] for row in card.examples] for name in card.columns]
    batch = tokenizer(*texts, truncation=True, max_length=card.max_length, padding=True, return_tensors="pt").to(device)
    labels = torch.tensor([row["label"] for row in card.examples], device=device)
    return model.to(device), tokenizer, card, {**batch, "labels": labels}


def show_texts(tokenizer, batch, columns: Sequence[str], names: Sequence, most: int = 12, room: int = 400) -> Shown:
    """What a page shows of a batch: its first examples, 8 to `most` of them, as far as about `room` tokens go."""
    shown, length = Shown(), batch["input_ids"].shape[1]
    for number, (ids, keep, label) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"])):
        if number == most or (number >= 8 and len(shown.tokens) > room):
            break
        places = keep.nonzero().flatten()  # some tokenizers pad on the left
        ids = ids[places].tolist()
        special = [id in tokenizer.all_special_ids for id in ids]
        groups = [[*group] for is_special, group in groupby(range(len(ids)), key=special.__getitem__) if not is_special]
        fields = [[name, group[0], group[-1] + 1] for name, group in zip(columns, groups)]
        gold = f"{label:.2f}" if label.is_floating_point() else str(names[label])
        shown.add(tokenizer, ids, (number * length + places).tolist(), gold, fields=fields)
    return shown


def read_answers(out, names: Sequence, count: int) -> list[str]:
    """The model's answers to the first examples of a batch."""
    logits_NC = out.logits[:count].detach()
    if logits_NC.shape[1] == 1:
        return [f"{value:.2f}" for value in logits_NC[:, 0].tolist()]
    return [str(names[best]) for best in logits_NC.argmax(1).tolist()]


def film_of_model(folder: Path, device="cpu") -> tuple[dict, dict[str, Tensor]]:
    """A film of one moment: a saved model on its card's examples. UserError for one without MoE layers or examples."""
    model, tokenizer, card, batch = load_examples(folder, device)
    names = card.labels or range(card.num_labels)
    shown = show_texts(tokenizer, batch, card.columns, names)
    return look_at(model, batch, shown, partial(read_answers, names=names, count=len(shown.examples)))


def explain_marks(text: str) -> list[str]:
    """Explains the cells of a token, with the first cell of each kind in the text."""
    lines, conflict = [], "in conflict: its gradient has cosine {2} with the mean of that expert's tokens"
    for pattern, ending in (
        (r"(\d+) (\d\.\d\d)(?! [!-])", ""),
        (r"(\d+) (\d\.\d\d) ! (-\d\.\d\d)", f",\n{'':19}{conflict}"),
        (r"(\d+) (\d\.\d\d) -(?!\S)", ", no gradient reaches it"),
    ):
        if cell := re.search(f"   {pattern}", text):
            lines.append(f"  {cell[0].strip():<17}on expert {cell[1]} with weight {cell[2]}{ending.format(*cell.groups())}")
    return lines


def describe_example(card: TaskCard, number: int, logits_C: Tensor) -> str:
    """Gold label, answer and text of an example."""
    row = card.examples[number]
    if card.num_labels == 1:
        answer = f"gold {row['label']:.2f}, predicted {logits_C[0]:.2f}"
    else:
        names, best = card.labels or range(card.num_labels), logits_C.argmax().item()
        answer = f"gold {names[row['label']]}, predicted {names[best]} with probability {logits_C.softmax(-1)[best]:.2f}"
        answer += "" if best == row["label"] else " (wrong)"
    lines = [f"example {number + 1}: {answer}"]
    for name in card.columns:
        lines += textwrap.wrap(f"{name}: {printable(row[name])}", WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def describe_layer(layer: MoELayer, name: str, x_BLD: Tensor, keep_BL: Tensor, verdict: Verdict, tokens) -> list[str]:
    """A block of lines on the layer's experts, followed by one block per example with a line per token."""
    with torch.no_grad():
        routing = layer.routing(x_BLD.flatten(0, -2))
    keep_T, size = keep_BL.flatten(), layer.experts.num_experts
    ids_TK, conflict_TK, judged_TK = routing.expert_ids_TK[keep_T], verdict.conflict_TK[keep_T], verdict.judged_TK[keep_T]
    weights_TK = routing.weights_TK[keep_T]
    on_TK = weights_TK > 0  # not all, where the router decides how many
    count, per_token = on_TK.sum(), f"Top-{layer.top_k}" if on_TK.all() else f"{on_TK.sum() / len(on_TK):.2f} per token"
    pairs_E, conflicts_E = ids_TK[on_TK].bincount(minlength=size), ids_TK[conflict_TK].bincount(minlength=size)
    ratio_E = conflicts_E / pairs_E.clamp_min(1)
    worst = ", ".join(f"{e} ({ratio_E[e]:.2f})" for e in ratio_E.argsort(descending=True)[:3].tolist() if ratio_E[e] > 0)
    lines = [
        f"MoE layer {name}: {size} experts, {per_token}",
        f"  {count} pairs of token and expert, {judged_TK.sum()} with a gradient, {conflict_TK.sum()} conflict",
        f"  conflict ratio {conflict_TK.sum() / count:.3f}; highest on expert {worst or '- (none)'}",
    ]
    for e in range(size):
        bar = "#" * round(BAR * (pairs_E[e] / pairs_E.max()).item())
        load = pairs_E[e] / count
        lines.append(f"  expert {e:>2}  load {load:.2f} {bar:<{BAR}}  {conflicts_E[e]} of {pairs_E[e]} pairs conflict")

    blocks, digits = ["\n".join(lines)], len(str(size - 1))
    per_line = max(1, (WIDTH - TOKEN - 2) // (digits + 16))
    found = zip(ids_TK.tolist(), weights_TK.tolist(), judged_TK, conflict_TK, verdict.similarity_TK[keep_T])
    for number, part in enumerate(tokens, start=1):
        lines = [f"MoE layer {name}, example {number}"]
        for token, pairs in zip(part, found):
            token = printable(token)
            token = token if len(token) <= TOKEN else token[: TOKEN - 3] + "..."
            cells = []
            for e, weight, judged, conflict, cos in zip(*pairs):
                mark = f"! {cos:+.2f}" if conflict else " " if judged else "-"
                cells += [f"   {e:>{digits}} {weight:.2f} {mark:<7}"] if weight else []
            for start in range(0, len(cells), per_line):
                lines.append(f"  {'' if start else token:<{TOKEN}}{''.join(cells[start : start + per_line])}".rstrip())
        blocks.append("\n".join(lines))
    return blocks
