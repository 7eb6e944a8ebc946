"""The experts of each token in every MoE layer: expert load by modality, and the tokens' paths through the layers.

    with record_routes(model) as routes:
        model(**batch)
        routes.add(modality_BL, keep_BL)  # after each forward. 0 is text, 1 picture; True for real tokens
    record["routes"] = summary(routes)  # for lab.report.figures.plot_routes

N real tokens of all forwards   M MoE layers   K choices per token   E experts   B, L  batch and length of a forward
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from stgc import MoELayer, Pairs, Routing

MODALITIES = ("text", "picture")  # what 0 and 1 stand for

# ---- 1. Recording ----


class Routes:
    """The choices of all tokens added so far. Layers are in the order of `model.named_modules()`, as in STGC."""

    def __init__(self, layers: dict[str, MoELayer]):
        sizes = {(layer.experts.num_experts, layer.top_k) for layer in layers.values()}
        if len(sizes) != 1:
            raise ValueError(f"all MoE layers need the same number of experts and the same top_k, not {sorted(sizes)}")
        self.names, ((self.num_experts, self.top_k),) = list(layers), sizes
        self.forwards: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]  # of each layer, since the last add
        self.parts = [(torch.empty(0, len(layers), self.top_k, dtype=torch.int16), torch.empty(0, dtype=torch.int8))]

    all_NMK = property(lambda self: torch.cat([ids for ids, _ in self.parts]), doc="Ids, largest weight first; int16.")
    modality_N = property(lambda self: torch.cat([kinds for _, kinds in self.parts]), doc="Index in MODALITIES; int8.")

    def on_forward(self, i: int, watch, x_TD: Tensor, routing: Routing, pairs: Pairs, keep_T: Tensor):
        """Stores the routing of a forward of layer i, then calls `watch`, which watched the layer before."""
        weights_TK, order_TK = routing.weights_TK.sort(dim=-1, descending=True, stable=True)
        ids_TK = routing.expert_ids_TK.gather(1, order_TK).masked_fill(weights_TK == 0, -1)  # -1: it is not run
        self.forwards[i].append((ids_TK, keep_T))
        return None if watch is None else watch(x_TD, routing, pairs, keep_T)

    def add(self, modality_BL: Tensor, keep_BL: Tensor) -> None:
        """Adds the tokens of the forward since the last add; keep_BL may also leave out real tokens, such as a prompt's.
        Call it, or `drop`, after each forward, also in a generate loop. RuntimeError unless each layer ran exactly once
        since the last call; ValueError for tensors that do not fit the forward."""
        modality_T, keep_T = modality_BL.detach().flatten().cpu(), keep_BL.detach().flatten().cpu().bool()
        if len(modality_T) != len(keep_T) or not ((modality_T == 0) | (modality_T == 1)).all():
            raise ValueError(f"modality must be 0 or 1 for each of the {len(keep_T)} tokens of keep")
        for name, forwards in zip(self.names, self.forwards):
            if len(forwards) != 1:
                raise RuntimeError(f"MoE layer {name} ran {len(forwards)} times since the last add: add or drop each time")
            routed_T = forwards[0][1].cpu()
            if len(routed_T) != len(keep_T) or (keep_T & ~routed_T).any():
                tokens = f"{routed_T.sum()} of {len(routed_T)} tokens, keep {keep_T.sum()} of {len(keep_T)}"
                raise ValueError(f"MoE layer {name} had {tokens}: keep must lie within its mask")
        ids_TMK = torch.stack([forwards[0][0].cpu() for forwards in self.forwards], dim=1)
        self.parts.append((ids_TMK[keep_T].to(torch.int16), modality_T[keep_T].to(torch.int8)))
        self.drop()

    def drop(self) -> None:
        """Discards the forwards since the last add."""
        self.forwards = [[] for _ in self.names]

    def by_modality(self) -> dict[str, Tensor]:
        """all_NMK split by modality, without modalities that have no token."""
        parts = {name: self.all_NMK[self.modality_N == number] for number, name in enumerate(MODALITIES)}
        return {name: ids_NMK for name, ids_NMK in parts.items() if len(ids_NMK)}


@contextmanager
def record_routes(model: nn.Module) -> Iterator[Routes]:
    """Records the routing that a forward used. It calls no router again, since a router may hold a batch's state or draw
    noise.

    An STGC object may be active if it is created before and detached after. Each process records its own tokens.
    RuntimeError at the end if a forward was neither added nor dropped."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    if not layers:
        raise ValueError("the model has no stgc.MoELayer whose routes could be recorded")
    routes, before = Routes(layers), [layer.watch for layer in layers.values()]
    ours = [partial(routes.on_forward, i, watch) for i, watch in enumerate(before)]
    for layer, mine in zip(layers.values(), ours):
        layer.watch = mine
    try:
        yield routes
        if any(routes.forwards):
            raise RuntimeError("the last forward was neither added nor dropped: call add() after each")
    finally:
        for layer, mine, watch in zip(layers.values(), ours, before):
            layer.watch = watch if layer.watch is mine else layer.watch


# ---- 2. Statistics ----


def load_by_modality(routes: Routes) -> dict[str, dict]:
    """By modality: `tokens`, their number; `first_ME`, each expert's share of first choices, as plotted for MoE-LLaVA; and
    `all_ME`, its share of all K choices, not weighted. The shares are lists with one row per layer, which sums to 1."""

    def share_ME(ids_NMK):
        count_ME = torch.stack([(ids_NMK == e).sum((0, 2)) for e in range(routes.num_experts)], dim=1)
        return (count_ME.double() / count_ME.sum(1, keepdim=True)).tolist()

    shares = {name: (len(ids), share_ME(ids[:, :, :1]), share_ME(ids)) for name, ids in routes.by_modality().items()}
    return {name: dict(zip(("tokens", "first_ME", "all_ME"), values)) for name, values in shares.items()}


def count_pathways(routes: Routes, top: int = 10) -> dict[str, list[tuple[tuple[int, ...], float]]]:
    """By modality the most frequent paths and their share of the tokens. A path is a token's first choice in each layer, so
    (2, 2) means expert 2 of the first layer and expert 2 of the second. Of equally frequent paths the smaller tuple comes
    first. DIFFERS: the paper's figure 5 follows MoE-LLaVA: moellava/vis/vis3.py (00d3f2b) takes 12 principal components of
    the matrix layers x tokens and divides the range of each into E bins, its "expert ids". Our paths are counted."""
    found = {}
    for name, ids_NMK in routes.by_modality().items():
        paths_PM, count_P = ids_NMK[:, :, 0].unique(dim=0, return_counts=True)
        best_P = count_P.argsort(descending=True, stable=True)[:top]  # unique sorts, so ties stay in order
        share_P = count_P[best_P].double() / len(ids_NMK)
        found[name] = list(zip(map(tuple, paths_PM[best_P].tolist()), share_P.tolist()))
    return found


def summary(routes: Routes, top: int = 10) -> dict:
    """Load and pathways as JSON, for a run's record: layers, num_experts, top_k, and both by modality."""
    rows = load_by_modality(routes)
    for name, paths in count_pathways(routes, top).items():
        rows[name]["pathways"] = [{"path": list(path), "share": share} for path, share in paths]
    return {"layers": routes.names, "num_experts": routes.num_experts, "top_k": routes.top_k, "modalities": rows}
