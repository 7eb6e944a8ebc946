"""The film of a training: what each token of a fixed batch does at 24 moments or fewer, for the page of `lab.report.page`.

    film = Film(folder / "film-ce-s0", model, config, batch, shown, steps, answer)
    film.step_done(0)                      # then after each step of the loop; lab.run.training does both
    film.save()

A moment is one forward and one backward of the batch in eval mode, down to the linears' outputs and to no parameter. It
draws no random number and leaves no gradient, so the training stays the same to the last digit. `delta` steps later, the
twin of a moment keeps the experts alone: how many tokens have moved. At the first, the middle and the last moment the
numbers of lab.moe.probe come with one more forward and backward. The film is two files, NAME.safetensors and NAME.json.

Shapes: M moments, T real tokens of the batch, N tokens that are shown, E experts, K per token, L linears.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lab.moe import probe
from lab.moe.baselines import RandomRouter
from lab.moe.dynmoe import TopAnyLayer
from lab.run.cli import UserError
from lab.run.files import write_json, written
from lab.run.reading import read_json
from stgc import MoELayer
from stgc_plus import STGC, STGCConfig

COUNT, BINS = 24, 20  # moments; of the histogram of similarities
JUDGED, CONFLICT, UNKNOWN = 1, 2, 255  # the state of a pair; no expert: none that would fit best, or a pair that is off
CURVES = ("load", "conflicts", "histogram", "conflict_ratio", "consistency", "margin", "moved")  # of a layer
ARRAYS = ("logits", "experts", "state", "best", "cosines", "norms")  # of a layer, (M, N, ...)
NUMBER, TEXT, LIST = float | int | None, str | None, list | None
RUN = {"experts": int, "topK": int, "normalize": bool, "tau": NUMBER, "linears": [str], "drawn": bool | None}
RUN |= {"loss": str, "select": TEXT, "beta": NUMBER, "delta": int, "equal": bool | None}
KINDS = {  # of the JSON file. What it means: lab.report.page
    "run": RUN,
    "examples": [{"kind": str, "gold": str, "fields": [list], "image": TEXT, "grid": LIST, "question": TEXT}],
    "tokens": [{"text": str, "joined": bool, "example": int, "patch": LIST}],
    "steps": [int],
    "loss": [NUMBER],
    "answers": [[str]],
    "layers": [{"name": str} | {key: [list] if key in CURVES[:3] else [NUMBER] for key in CURVES}],
    "matrices": [{"layer": int, "moment": int, "expert": int, "pairs": [[int]]}],
    "probe": [{"moment": int, "layers": [dict]}],
    "seconds": float,
}


def moments(steps: int, count: int = COUNT) -> list[int]:
    """The steps of the moments: from 0 to the last one, the early ones closer together."""
    return sorted({round(steps * (number / (count - 1)) ** 1.5) for number in range(count)})


def evenly(size: int, count: int) -> list[int]:
    """`count` of the numbers below `size`, or all of them, evenly spread."""
    return torch.linspace(0, size - 1, min(size, count)).long().tolist()


def affordable(size: int, steps: int, shared: int = 0, runs: int = 1) -> tuple[int, int]:
    """Of a batch of `size` examples how many to look at, and at how many moments, so that a film takes less than a twentieth
    of the time of its run. That has so many steps of its own, and a part of the steps that a command trains once for all of
    its `runs`. All examples at all moments cost as much as 30 to 40 steps. At least four examples and six moments, which
    cost more where a training has few steps or small batches. The examples are those that two runs pay for, however many
    there are: --resume can add some, and a page shows the same examples of all."""
    examples = min(size, max(4, size * (steps + shared // 2) // 1000))
    return examples, min(COUNT, max(6, COUNT * size * (steps + shared // runs) // (1000 * examples)))


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass
class Shown:
    """What the page shows of a batch: examples, and where their tokens are in it."""

    examples: list[dict] = field(default_factory=list)  # as lab.report.page documents
    tokens: list[dict] = field(default_factory=list)
    index: list[int] = field(default_factory=list)  # of the shown tokens in the flattened batch

    def add(self, tokenizer, ids: Sequence[int], index: Iterable[int], gold: str, patches: Sequence = (), **more) -> None:
        """An example: its tokens, where they are, the right answer, the [row, column] of those that are patches of a picture
        (None for a word), and what else lab.report.page documents."""
        pieces = split_pieces(tokenizer.convert_ids_to_tokens(ids), tokenizer.all_special_tokens)
        for (text, joined), patch in zip_longest(pieces, patches):
            self.tokens.append({"text": text, "joined": joined, "example": len(self.examples), "patch": patch})
        self.index += index
        empty = {"kind": "text", "fields": [], "image": None, "grid": None, "question": None}
        self.examples.append(empty | {"gold": gold} | more)


class Film:
    """See the module. `config`: of the variant that trains. `answer(out)`: the answers to the shown examples, as texts.
    `autocast`: around a forward. Only the process that `writes` has the files; all processes look at the same batch.
    `count`: of moments."""

    def __init__(
        self,
        path: Path,
        model: torch.nn.Module,
        config: STGCConfig,
        batch: dict,
        shown: Shown,
        steps: int,
        answer: Callable[[object], list[str]],
        autocast: Callable = nullcontext,
        writes: bool = True,
        count: int = COUNT,
    ):
        self.path, self.model, self.batch, self.shown, self.steps = path, model, batch, shown, moments(steps, count)
        self.index_N = torch.as_tensor(shown.index, dtype=torch.long)
        self.answer, self.autocast, self.writes, self.delta = answer, autocast, writes, max(5, steps // 20)
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        before = [layer.watch for layer in layers]
        kind = "reroute" if all(layer.top_k < layer.experts.num_experts for layer in layers) else "none"
        self.stgc = STGC(model, STGCConfig(kind, tau=config.tau, gradients=config.gradients))
        self.whole = STGC(model, STGCConfig("none", tau=config.tau, gradients="weight"))  # of the probe
        for stgc in (self.stgc, self.whole):  # each process looks at the whole batch: there is nothing to average
            stgc.detach()
            stgc.num_processes, stgc.average = 1, lambda tensor: tensor
        for layer, watch in zip(layers, before):  # these objects replaced it; the training's own is back
            layer.watch = watch
        first = self.stgc.layers[0]
        run = {"experts": first.experts.num_experts, "topK": first.top_k, "normalize": first.normalize, "tau": config.tau}
        run |= {"loss": config.conflict_loss, "select": config.select, "beta": config.beta, "delta": self.delta}
        run |= {"linears": ["gate"] * first.experts.gated + ["in", "out"], "drawn": isinstance(first.router, RandomRouter)}
        run["equal"] = isinstance(first, TopAnyLayer)
        layers = [{"name": name} | {key: [] for key in CURVES} for name in self.stgc.names]
        self.content = {"run": run, "examples": shown.examples, "tokens": shown.tokens, "layers": layers, "seconds": 0.0}
        self.content |= {key: [] for key in ("steps", "loss", "answers", "matrices", "probe")}
        self.arrays: dict[str, list[Tensor]] = {}  # by name, one per moment
        self.matrices: dict[str, Tensor] = {}

    # ---- 1. Looking ----

    def step_done(self, step: int, grad_scale: float = 1.0) -> float:
        """Looks, if a moment or a twin is due after this step; a step that is on the film already is left out. Returns the
        seconds that it took. `grad_scale`: the loss scale of fp16, without which small gradients become 0."""
        start = time.perf_counter()
        if step in self.steps and step not in self.content["steps"]:
            self.look(step, grad_scale)
        for number, moment in enumerate(self.content["steps"]):
            if step == moment + self.delta and number == len(self.content["layers"][0]["moved"]):
                self.look_again()
        took = time.perf_counter() - start
        self.content["seconds"] += took
        return took

    def forward(self, judge: bool, grad_scale: float = 1.0, stgc: STGC | None = None):
        """The model's output on the batch and, for each layer, what its watch was given and its LayerStep. `stgc`: who
        judges; the film's own by default."""
        stgc = stgc or self.stgc
        seen, modes = {}, [(module, module.training) for module in self.model.modules()]
        before = [layer.watch for layer in self.stgc.layers]

        def watch(i, x_TD, routing, pairs, keep_T):
            seen[i] = (routing, keep_T, stgc.on_forward(i, x_TD, routing, pairs, keep_T) if judge else None)
            return seen[i][2]

        for i, layer in enumerate(self.stgc.layers):
            layer.watch = partial(watch, i)
        self.model.eval()
        weights = [weight for layer in self.stgc.layers for weight in layer.experts.parameters()]
        frozen = [weight for weight in weights if not weight.requires_grad]
        for weight in frozen:
            weight.requires_grad_(judge)
        device = next(self.model.parameters()).device
        try:
            with torch.random.fork_rng([device] * (device.type == "cuda")), torch.set_grad_enabled(judge), self.autocast():
                out = self.model(**self.batch)
            if judge:
                stgc.loss(out.loss, grad_scale)
        finally:
            for weight in frozen:
                weight.requires_grad_(False)
            for module, training in modes:
                module.training = training
            for layer, own in zip(self.stgc.layers, before):
                layer.watch = own
        return out, [seen[i] for i in range(len(before))]

    def look(self, step: int, grad_scale: float) -> None:
        """Adds a moment."""
        out, seen = self.forward(True, grad_scale)
        number = len(self.content["steps"])
        self.content["steps"].append(step)
        self.content["loss"].append(finite(out.loss.item()))
        self.content["answers"].append(self.answer(out))
        stats, closer = self.stgc.stats(), step in (self.steps[0], self.steps[len(self.steps) // 2], self.steps[-1])
        for i, (routing, keep_T, step_of_layer) in enumerate(seen):
            self.add_layer(i, routing, keep_T, stats[i], grad_scale)
            if closer:
                self.add_matrices(i, number, step_of_layer)
        if closer:
            self.add_probe(number, grad_scale)

    def add_probe(self, number: int, grad_scale: float) -> None:
        """The numbers of a moment for the record: one more forward and backward, for the whole weights."""
        _, seen = self.forward(True, grad_scale, self.whole)
        rows = []
        for (*_, step), verdict, stats in zip(seen, self.whole.verdicts, self.whole.stats()):
            num_pairs = step.pairs.onehot_SE.sum().item()
            rows.append(probe.relations(probe.layer_of(step, verdict), num_pairs) | probe.from_stats(stats))
        self.content["probe"].append({"moment": number, "layers": rows})

    @torch.no_grad()
    def add_layer(self, i: int, routing, keep_T: Tensor, stats: dict, grad_scale: float) -> None:
        verdict, own = self.stgc.verdicts[i], self.content["layers"][i]
        logits_TE, ids_TK, off_TK = routing.logits_TE.detach(), routing.expert_ids_TK, routing.weights_TK == 0
        state_TK = (verdict.judged_TK * JUDGED).where(~verdict.conflict_TK, CONFLICT)
        best_TK = verdict.target_TK if self.stgc.config.conflict_loss == "reroute" else torch.full_like(ids_TK, UNKNOWN)
        length_TK = torch.linalg.vector_norm(verdict.norm_TKL, dim=-1) / grad_scale
        arrays = {"logits": logits_TE, "experts": ids_TK.masked_fill(off_TK, UNKNOWN).byte()}
        arrays |= {"state": state_TK.byte(), "best": best_TK.byte()}
        arrays |= {"cosines": verdict.cos_TKL, "norms": length_TK.clamp_min(1e-37).log10()}
        for key, rows in arrays.items():
            self.keep(f"{i}.{key}", rows[self.index_N.to(rows.device)])
        self.keep(f"{i}.first", ids_TK[:, 0].byte())
        pairs_E, conflicts_E = (
            ids_TK[mask_TK].bincount(minlength=logits_TE.shape[1])
            for mask_TK in (keep_T.unsqueeze(1) & ~off_TK, verdict.conflict_TK)
        )
        similarity = verdict.similarity_TK[verdict.judged_TK].float().clamp(-1, 1)
        margin = math.inf if self.content["run"]["drawn"] else stats.get("router_margin", math.inf)  # dice have none
        own["load"].append((pairs_E / pairs_E.sum()).tolist())
        own["conflicts"].append((conflicts_E / pairs_E.clamp_min(1)).tolist())
        own["histogram"].append(similarity.cpu().histc(BINS, -1, 1).tolist())
        own["margin"].append(finite(margin))
        own["conflict_ratio"].append(stats.get("conflict_ratio", 0.0))
        own["consistency"].append(stats.get("consistency", 0.0))

    @torch.no_grad()
    def add_matrices(self, i: int, number: int, step) -> None:
        """The cosines between all shown pairs on an expert, means over its linears, ordered by example, then by similarity
        with the expert's mean."""
        if not step.grads:
            return
        where = self.index_N
        rows = [step.pairs.by_token(grad_SO)[where] for grads in step.grads.values() for grad_SO in grads]
        unit_LNKO = [F.normalize(grad_NKO.float(), dim=-1, eps=1e-37) for grad_NKO in rows]
        verdict, ids_NK = self.stgc.verdicts[i], step.pairs.expert_ids_TK[where]
        rank_NK = verdict.similarity_TK[where]
        for expert in range(self.content["run"]["experts"]):
            pairs = ((ids_NK == expert) & verdict.judged_TK[where]).nonzero().tolist()
            pairs.sort(key=lambda pair: (self.shown.tokens[pair[0]]["example"], -rank_NK[pair[0], pair[1]].item()))
            if len(pairs) < 2:
                continue
            n, k = torch.tensor(pairs).T
            cosines = torch.stack([unit[n, k] @ unit[n, k].T for unit in unit_LNKO]).mean(0)
            self.matrices[f"matrix{len(self.content['matrices'])}"] = (127 * cosines).round().char().cpu()
            self.content["matrices"].append({"layer": i, "moment": number, "expert": expert, "pairs": pairs})

    def look_again(self) -> None:
        """The twin of the next moment: its experts, and how many tokens have moved since the moment."""
        _, seen = self.forward(judge=False)
        for i, (routing, keep_T, _) in enumerate(seen):
            own = self.content["layers"][i]
            before_T, now_T = self.arrays[f"{i}.first"][len(own["moved"])], routing.expert_ids_TK[:, 0].byte().cpu()
            own["moved"].append((before_T != now_T)[keep_T.cpu()].float().mean().item())

    def keep(self, key: str, rows: Tensor) -> None:
        rows = rows.detach().cpu().contiguous()
        self.arrays.setdefault(key, []).append(rows.half() if rows.is_floating_point() else rows)

    # ---- 2. Files ----

    def finish(self, step: int, grad_scale: float = 1.0) -> list[dict]:
        """The probe of a training that has ended after `step`, maybe before the planned last one, for the record."""
        start = time.perf_counter()
        if step not in self.content["steps"]:
            self.steps = [*self.content["steps"], step]
            self.step_done(step, grad_scale)
        elif step not in (self.content["steps"][one["moment"]] for one in self.content["probe"]):
            self.add_probe(len(self.content["steps"]) - 1, grad_scale)
            self.content["seconds"] += time.perf_counter() - start
        self.save()
        return probe.for_record(self.content)

    def save(self) -> None:
        """Writes both files. The arrays come first: a film without its JSON is none."""
        if self.writes and self.content["steps"]:
            content, arrays = self.found()
            with written(self.path.with_suffix(".safetensors")) as new:
                save_file(arrays, new)
            write_json(self.path.with_suffix(".json"), content)

    def found(self) -> tuple[dict, dict[str, Tensor]]:
        """What `read_film` reads again."""
        return self.content, {key: torch.stack(rows) for key, rows in self.arrays.items()} | self.matrices

    def load(self, step: int) -> None:
        """What an interrupted run has filmed up to `step`. Without films nothing is read."""
        if not self.path.with_suffix(".json").is_file():
            return
        content, arrays = read_film(self.path)
        if content["tokens"] != self.content["tokens"]:  # another version of this program showed others: begin again
            return
        kept = sum(moment <= step for moment in content["steps"])
        twins = sum(moment + self.delta <= step for moment in content["steps"])
        for key in ("steps", "loss", "answers"):
            self.content[key] = content[key][:kept]
        for own, old in zip(self.content["layers"], content["layers"], strict=True):
            own |= {key: values[: twins if key == "moved" else kept] for key, values in old.items() if key != "name"}
        self.content["seconds"] = content["seconds"]
        self.content["probe"] = [one for one in content["probe"] if one["moment"] < kept]
        for number, one in enumerate(content["matrices"]):
            if one["moment"] < kept:
                self.matrices[f"matrix{len(self.content['matrices'])}"] = arrays[f"matrix{number}"]
                self.content["matrices"].append(one)
        self.arrays = {key: [*rows[:kept]] for key, rows in arrays.items() if not key.startswith("matrix")}


def read_film(path: Path, flag: str = "--output-dir") -> tuple[dict, dict[str, Tensor]]:
    """The JSON and the arrays of a film. UserError if one of them is damaged."""
    try:
        content, arrays = read_json(path.with_suffix(".json"), **KINDS), load_file(path.with_suffix(".safetensors"))
        count, pairs = len(content["steps"]), [len(one["pairs"]) for one in content["matrices"]]
        shapes = {f"matrix{number}": (size, size) for number, size in enumerate(pairs)}
        wrong = [key for key in ("loss", "answers") if len(content[key]) != count]
        for i, layer in enumerate(content["layers"]):
            sizes = dict.fromkeys(ARRAYS, content["run"]["topK"]) | {"logits": content["run"]["experts"]}
            shapes |= {f"{i}.{key}": (count, len(content["tokens"]), size) for key, size in sizes.items()}
            shapes |= {f"{i}.first": (count,)}
            wrong += [key for key in CURVES[:-1] if len(layer[key]) != count]
        wrong += [key for key, shape in shapes.items() if key not in arrays or arrays[key].shape[: len(shape)] != shape]
        if wrong:
            raise ValueError(f"its {wrong[0]} is absent or of another size")
        return content, arrays
    except (OSError, ValueError, SafetensorError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{flag} {path.parent}: the film {path.name} cannot be read ({line}); remove it") from None


def look_at(model: torch.nn.Module, batch: dict, shown: Shown, answer: Callable) -> tuple[dict, dict[str, Tensor]]:
    """One moment of a saved model, as `read_film` gives it."""
    torch.manual_seed(0)  # for experts that are drawn by dice
    film = Film(Path("film"), model, STGCConfig("none"), batch, shown, 0, answer)
    film.step_done(0)
    return film.found()


def split_pieces(tokens: Sequence[str], special: Sequence[str]) -> list[tuple[str, bool]]:
    """Each token as text, and whether it continues the word before it: WordPiece's ##, or no space mark where others have
    one."""
    marks = tuple(mark for mark in ("\u0120", "\u2581") if any(token.startswith(mark) for token in tokens))
    found, before = [], True
    for token in tokens:
        mark = token[:1] if marks and token.startswith(marks) else ""
        joined = token.startswith("##") or bool(marks and not mark and not before and token not in special)
        text = token.removeprefix("##")[len(mark) :].replace("\u010a", "\u21b5")  # a line's end, as byte-level BPE writes it
        found.append((text or ("\u2423" if mark else token), joined))  # a space alone
        before = token in special
    return found
