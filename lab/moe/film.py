"""The film of a training: what each token of a fixed batch does at about 24 moments, for the page of `lab.report.page`.

    film = Film(folder / "film-ce-s0", model, config, batch, shown, steps, answer)
    film.step_done(0)                      # then after each step of the loop; lab.run.training does both
    film.save()

A moment is one forward and one backward of the batch in eval mode, down to the linears' outputs and to no parameter. It
draws no random number and leaves no gradient, so the training stays the same to the last digit. `delta` steps later, the
twin of a moment keeps the experts alone: how many tokens have moved. The first, the middle and the last moment have one more
forward and backward, for the numbers of lab.moe.probe. The film is two files, NAME.safetensors and NAME.json.

Shapes: M moments, T real tokens of the batch, N tokens that are shown, E experts, K per token, L linears.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lab.moe import probe
from lab.run.cli import UserError
from lab.run.files import write_json, written
from lab.run.reading import read_json
from stgc import MoELayer
from stgc_plus import STGC, STGCConfig

COUNT, BINS = 24, 20  # moments; of the histogram of similarities
JUDGED, CONFLICT, UNKNOWN = 1, 2, 255  # the state of a pair; no expert that would fit best
KINDS = {"run": dict, "examples": list, "tokens": list, "steps": list, "layers": list, "matrices": list, "seconds": float}


def moments(steps: int) -> list[int]:
    """The steps of the moments: from 0 to the last one, the early ones closer together."""
    return sorted({round(steps * (number / (COUNT - 1)) ** 1.5) for number in range(COUNT)})


@dataclass
class Shown:
    """What the page shows of a batch: examples, and where their tokens are in it."""

    examples: list[dict]  # as lab.report.page documents
    tokens: list[dict]
    index_N: Tensor  # of the shown tokens in the flattened batch


class Film:
    """See the module. `config`: of the variant that trains. `answer(out)`: the answers to the shown examples, as texts.
    `autocast`: around a forward. Only the process that `writes` has the files; all processes look at the same batch."""

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
    ):
        self.path, self.model, self.batch, self.shown, self.steps = path, model, batch, shown, moments(steps)
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
        run |= {"loss": config.conflict_loss, "placebo": config.select == "random", "beta": config.beta, "delta": self.delta}
        run["linears"] = ["gate"] * first.experts.gated + ["in", "out"]
        names = ("load", "conflicts", "histogram", "conflict_ratio", "consistency", "margin", "moved")
        layers = [{"name": name} | {key: [] for key in names} for name in self.stgc.names]
        self.content = {"run": run, "examples": shown.examples, "tokens": shown.tokens, "layers": layers, "seconds": 0.0}
        self.content |= {key: [] for key in ("steps", "loss", "answers", "matrices", "probe")}
        self.arrays: dict[str, list[Tensor]] = {}  # by name, one per moment
        self.matrices: dict[str, Tensor] = {}

    # ---- 1. Looking ----

    def step_done(self, step: int) -> float:
        """Looks, if a moment or a twin is due after this step; a step that is on the film already is left out. Returns the
        seconds that it took."""
        start = time.perf_counter()
        if step in self.steps and step not in self.content["steps"]:
            self.look(step)
        for number, moment in enumerate(self.content["steps"]):
            if step == moment + self.delta and number == len(self.content["layers"][0]["moved"]):
                self.look_again()
        took = time.perf_counter() - start
        self.content["seconds"] += took
        return took

    def forward(self, judge: bool, stgc: STGC | None = None):
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
                stgc.loss(out.loss)
        finally:
            for weight in frozen:
                weight.requires_grad_(False)
            for module, training in modes:
                module.training = training
            for layer, own in zip(self.stgc.layers, before):
                layer.watch = own
        return out, [seen[i] for i in range(len(before))]

    def look(self, step: int) -> None:
        """Adds a moment."""
        out, seen = self.forward(judge=True)
        number = len(self.content["steps"])
        self.content["steps"].append(step)
        self.content["loss"].append(out.loss.item())
        self.content["answers"].append(self.answer(out))
        stats, closer = self.stgc.stats(), step in (self.steps[0], self.steps[len(self.steps) // 2], self.steps[-1])
        for i, (routing, keep_T, step_of_layer) in enumerate(seen):
            self.add_layer(i, routing, keep_T, stats[i])
            if closer:
                self.add_matrices(i, number, step_of_layer)
        if closer:
            self.add_probe(number)

    def add_probe(self, number: int) -> None:
        """The numbers of a moment for the record: one more forward and backward, for the whole weights."""
        _, seen = self.forward(judge=True, stgc=self.whole)
        layers = [probe.layer_of(step, verdict) for (*_, step), verdict in zip(seen, self.whole.verdicts)]
        rows = [probe.relations(layer) | probe.from_stats(own) for layer, own in zip(layers, self.whole.stats())]
        self.content["probe"].append({"moment": number, "layers": rows})

    @torch.no_grad()
    def add_layer(self, i: int, routing, keep_T: Tensor, stats: dict) -> None:
        verdict, own = self.stgc.verdicts[i], self.content["layers"][i]
        logits_TE, ids_TK = routing.logits_TE.detach(), routing.expert_ids_TK
        state_TK = (verdict.judged_TK * JUDGED).where(~verdict.conflict_TK, CONFLICT)
        best_TK = verdict.target_TK if self.stgc.config.conflict_loss == "reroute" else torch.full_like(ids_TK, UNKNOWN)
        length_TK = torch.linalg.vector_norm(verdict.norm_TKL, dim=-1)
        arrays = {"logits": logits_TE, "experts": ids_TK.byte(), "state": state_TK.byte(), "best": best_TK.byte()}
        arrays |= {"cosines": verdict.cos_TKL, "norms": length_TK.clamp_min(1e-37).log10()}
        for key, rows in arrays.items():
            self.keep(f"{i}.{key}", rows[self.shown.index_N.to(rows.device)])
        self.keep(f"{i}.first", ids_TK[:, 0].byte())
        pairs_E, conflicts_E = (
            ids_TK[mask_TK].bincount(minlength=logits_TE.shape[1])
            for mask_TK in (keep_T.unsqueeze(1).expand_as(ids_TK), verdict.conflict_TK)
        )
        similarity = verdict.similarity_TK[verdict.judged_TK].float().clamp(-1, 1)
        margin = stats.get("router_margin", math.inf)
        own["load"].append((pairs_E / pairs_E.sum()).tolist())
        own["conflicts"].append((conflicts_E / pairs_E.clamp_min(1)).tolist())
        own["histogram"].append(similarity.cpu().histc(BINS, -1, 1).tolist())
        own["margin"].append(margin if math.isfinite(margin) else None)
        own["conflict_ratio"].append(stats.get("conflict_ratio", 0.0))
        own["consistency"].append(stats.get("consistency", 0.0))

    @torch.no_grad()
    def add_matrices(self, i: int, number: int, step) -> None:
        """The cosines between all shown pairs on an expert, means over its linears, ordered by example, then by similarity
        with the expert's mean."""
        if not step.grads:
            return
        where = self.shown.index_N
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

    def finish(self, step: int) -> list[dict]:
        """The probe of a training that has ended after `step`, maybe before the planned last one, for the record."""
        if step not in self.content["steps"]:
            self.steps = [*self.content["steps"], step]
            self.step_done(step)
        elif step not in (self.content["steps"][one["moment"]] for one in self.content["probe"]):
            self.add_probe(len(self.content["steps"]) - 1)
        self.save()
        return probe.for_record(self.content)

    def save(self) -> None:
        """Writes both files. The arrays come first: a film without its JSON is none."""
        if self.writes and self.content["steps"]:
            stacked = {key: torch.stack(rows) for key, rows in self.arrays.items()}
            with written(self.path.with_suffix(".safetensors")) as new:
                save_file(stacked | self.matrices, new)
            write_json(self.path.with_suffix(".json"), self.content)

    def load(self, step: int) -> None:
        """What an interrupted run has filmed up to `step`. Without films nothing is read."""
        if not self.path.with_suffix(".json").is_file():
            return
        content, arrays = read_film(self.path)
        kept = sum(moment <= step for moment in content["steps"])
        twins = sum(moment + self.delta <= step for moment in content["steps"])
        for key in ("steps", "loss", "answers"):
            self.content[key] = content[key][:kept]
        for own, old in zip(self.content["layers"], content["layers"], strict=True):
            own |= {key: values[: twins if key == "moved" else kept] for key, values in old.items() if key != "name"}
        self.content["seconds"] = content["seconds"]
        self.content["probe"] = [one for one in content.get("probe", []) if one["moment"] < kept]
        for number, one in enumerate(content["matrices"]):
            if one["moment"] < kept:
                self.matrices[f"matrix{len(self.content['matrices'])}"] = arrays[f"matrix{number}"]
                self.content["matrices"].append(one)
        self.arrays = {key: [*rows[:kept]] for key, rows in arrays.items() if not key.startswith("matrix")}


def read_film(path: Path, flag: str = "--output-dir") -> tuple[dict, dict[str, Tensor]]:
    """The JSON and the arrays of a film. UserError if one of them is damaged."""
    try:
        content, arrays = read_json(path.with_suffix(".json"), **KINDS), load_file(path.with_suffix(".safetensors"))
        for i in range(len(content["layers"])):
            if len(arrays[f"{i}.experts"]) != len(content["steps"]):
                raise ValueError(f"layer {i} has {len(arrays[f'{i}.experts'])} moments of {len(content['steps'])}")
        return content, arrays
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{flag} {path.parent}: the film {path.name} cannot be read ({error}); train again") from None


def split_pieces(tokens: Sequence[str], special: Sequence[str]) -> list[tuple[str, bool]]:
    """Each token as text, and whether it continues the word before it: WordPiece's ##, or no space mark where others have
    one."""
    marks = tuple(mark for mark in ("\u0120", "\u2581") if any(token.startswith(mark) for token in tokens))
    found, before = [], True
    for token in tokens:
        mark = token[:1] if marks and token.startswith(marks) else ""
        joined = token.startswith("##") or bool(marks and not mark and not before and token not in special)
        text = token.removeprefix("##")[len(mark) :].replace("\u010a", "\u21b5")  # a line's end, as byte-level BPE writes it
        found.append((text or token, joined))
        before = token in special
    return found
