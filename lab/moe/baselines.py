"""What the paper compares with: other routers, three of them for whole samples, and a capacity at evaluation.

    samples = share_samples(model)                       # one object for all routers that make_router built
    samples.set(keep_BL, task_B=...)                     # before each forward, or generate
    loss = stgc.loss(model(**batch).loss) + label_loss(model)     # the latter with task routers only
    with limit_capacity(model, 0.5, bpr=True) as limit:  # evaluation; limit.share of the pairs was dropped
        model.generate(...)

Shapes as in stgc.py: T tokens, K experts per token, E experts, D hidden size. B samples of L tokens each lie one behind the
other: T = B * L, or T = B in a step of `generate`. P projected size, C clusters, N instructions.

  1 Cosine router  2 Sample-level routers  3 Clusters and labels  4 Building  5 Capacity
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn

from stgc import MoELayer, Router, Routing, widen

# ---- 1. Cosine router ----


class CosineRouter(nn.Module):
    """Logits from cosines, as DynMoE's and EMoE's GLUE runs have them (LINs-lab/DynMoE at 4927232, after GMoE).

    z = normalise(W x + b) . normalise_columns(S) * exp(min(t, log 100)), x_TD -> logits_TE, in at least float32 even under
    autocast. t is learnt from log 2, so that the logits start within [-2, 2] and never leave [-100, 100]: a conflict loss
    that pushes them meets a bound, which a linear router does not have.
    """

    START, LIMIT, SPREAD = math.log(2), math.log(100), 0.01  # of t, of t, standard deviation of S

    def __init__(self, d_model: int, num_experts: int, d_project: int = 256, **factory):
        super().__init__()
        self.project = nn.Linear(d_model, d_project, **factory)
        self.experts_PE = nn.Parameter(torch.empty(d_project, num_experts, **factory).normal_(std=self.SPREAD))
        self.log_scale = nn.Parameter(torch.full((), self.START, **factory))

    def forward(self, x_TD: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TP = F.linear(widen(x_TD), widen(self.project.weight), widen(self.project.bias))
            cosines_TE = F.normalize(x_TP, dim=1) @ F.normalize(widen(self.experts_PE), dim=0)
            return cosines_TE * widen(self.log_scale).clamp(max=self.LIMIT).exp()


# ---- 2. Sample-level routers ----


class Samples:
    """What the routers of a model know of the batch: one object for all of them, see `share_samples`.

    `set` it before each forward, and once before a whole `generate`: it replaces all that was known, and nothing else does.
    With gradient checkpointing it must stay until the backward is done. No part of a state_dict. A copy of a model has a
    copy of it, again one for all its routers: `samples_of(copy)`.
    """

    def __init__(self):
        self.values: dict[str, Tensor | None] = {}
        self.batch = 0  # how often it was set

    def set(self, keep_BL: Tensor, *, instruction_BL=None, cluster_B=None, task_B=None) -> None:
        """keep_BL: not padding. instruction_BL: the question's tokens, neither picture nor answer. task_B: see FAMILIES.

        Beside keep_BL only what the model's kind of router reads. ValueError for what does not fit together.
        """
        if keep_BL.ndim != 2 or keep_BL.shape[1] < 2:
            raise ValueError(f"keep_BL {tuple(keep_BL.shape)} must be (B, L) with L > 1: L = 1 is a step of generate")
        values = {"keep_BL": keep_BL, "instruction_BL": instruction_BL, "cluster_B": cluster_B, "task_B": task_B}
        for name, value in values.items():
            if value is not None and value.shape != keep_BL.shape[: 2 if name.endswith("_BL") else 1]:
                raise ValueError(f"{name} {tuple(value.shape)} does not fit keep_BL {tuple(keep_BL.shape)}")
        if instruction_BL is not None and not (keep_BL[instruction_BL.bool()].all() and instruction_BL.any(1).all()):
            raise ValueError("instruction_BL must mark at least one token of each sample, and no padding")
        self.values, self.batch = values, self.batch + 1

    def take(self, name: str, x_TD: Tensor) -> Tensor:
        """A value for a router with x_TD before it. RuntimeError if it was not set; ValueError if x_TD is another batch."""
        value = self.values.get(name)
        if value is None:
            raise RuntimeError(f"the model's routers need {name}: call samples_of(model).set(keep_BL, {name}=...) before")
        num_samples, length = self.values["keep_BL"].shape
        if len(x_TD) not in (num_samples, num_samples * length):
            raise ValueError(f"{len(x_TD)} tokens, samples are set for {num_samples} x {length} (generate needs its cache)")
        return value.to(x_TD.device)


class SampleRouter(nn.Module):
    """A linear router that knows the samples, wide as `stgc.Router` is: x_TD -> logits_TE."""

    def __init__(self, d_model: int, num_experts: int, **factory):
        super().__init__()
        self.router = Router(d_model, num_experts, **factory)
        self.samples = Samples()


def spread(logits_BE: Tensor, x_TD: Tensor) -> Tensor:
    """logits_TE: each sample's for all its tokens, padding too."""
    return logits_BE.unsqueeze(1).expand(-1, len(x_TD) // len(logits_BE), -1).flatten(0, 1)


class EmbeddingRouter(SampleRouter):
    """A sample's tokens go where the learnt vector of its instruction's cluster says. PAPER, embedding-based; after MoCLE.

    Reads `cluster_B`, see `nearest_cluster`. The centres are a buffer, so that a saved model can route new instructions; NaN
    until `set_centres`. CHOICE: the vectors start from N(0, 1) like nn.Embedding's, sized as tokens behind a LayerNorm.
    """

    def __init__(self, d_model: int, num_experts: int, num_clusters: int = 128, **factory):
        super().__init__(d_model, num_experts, **factory)
        self.clusters_CD = nn.Parameter(torch.empty(num_clusters, d_model, **factory).normal_())
        self.register_buffer("centres_CD", torch.full((num_clusters, d_model), math.nan, **factory))

    def forward(self, x_TD: Tensor) -> Tensor:
        cluster_B = self.samples.take("cluster_B", x_TD)
        return spread(self.router(F.embedding(cluster_B, self.clusters_CD)), x_TD)


class FeatureRouter(SampleRouter):
    """A sample's tokens go where the mean of its instruction tokens says. PAPER, feature-based; after LoRA-MoE.

    Reads `instruction_BL`. CHOICE: the mean is of this layer's input. A step of `generate` has no instruction before it: it
    takes the prompt's logits, which stay here without a graph. RuntimeError if samples were set since.
    """

    prompt: tuple[int, Tensor] | None = None  # samples.batch, logits_BE

    def forward(self, x_TD: Tensor) -> Tensor:
        instruction_BL = self.samples.take("instruction_BL", x_TD)
        if len(x_TD) == len(instruction_BL):
            if self.prompt is None or self.prompt[0] != self.samples.batch:
                raise RuntimeError("a step of generate, but no forward of the prompt since samples were set")
            return spread(self.prompt[1], x_TD)
        x_BLD, mask_BL1 = widen(x_TD).unflatten(0, instruction_BL.shape), instruction_BL.bool().unsqueeze(2)
        logits_BE = self.router((x_BLD * mask_BL1).sum(1) / mask_BL1.sum(1))
        self.prompt = self.samples.batch, logits_BE.detach()
        return spread(logits_BE, x_TD)


class TaskRouter(SampleRouter):
    """A token router that learns from `label_loss` where each task family belongs. PAPER, task-based; after MoLA.

    CHOICE: the paper says only that each family has an expert as its label. Here the label is a target for the logits of
    every real token, and the router decides by itself, also in training; so the loss alone needs samples.
    """

    last_logits_TE: Tensor | None = None  # with their graph; None without gradients

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE = self.router(x_TD)
        if torch._C._current_graph_task_id() == -1:  # what a checkpoint recomputes in the backward is too late for the loss
            self.last_logits_TE = logits_TE if torch.is_grad_enabled() else None
        return logits_TE

    def __getstate__(self):  # nothing of a graph goes with copies and pickles
        return self.__dict__ | {"last_logits_TE": None}


# ---- 3. Clusters and labels ----

FAMILIES = {"caption": 0, "vqa": 1, "choice": 1, "ocr": 2, "region": 3}  # task_B of lab.vision.instructions' kinds


def cluster_instructions(embeddings_ND: Tensor, num_clusters: int, seed: int) -> Tensor:
    """centres_CD by k-means (paper: 128 clusters), C = len(centres_CD): for `make_router`, then `set_centres`.

    There are never more clusters than distinct embeddings, so C can be less than asked for.
    """
    num_clusters = min(num_clusters, len(embeddings_ND.unique(dim=0)))
    kmeans = KMeans(num_clusters, random_state=seed).fit(widen(embeddings_ND.detach()).cpu().numpy())
    return torch.from_numpy(kmeans.cluster_centers_).to(embeddings_ND)


def nearest_cluster(embeddings_ND: Tensor, centres_CD: Tensor) -> Tensor:
    """cluster_N: the least Euclidean distance. Also in training take the centres of a router, since it may round them."""
    if centres_CD.isnan().any():
        raise RuntimeError("the routers have no centres yet: call set_centres(model, cluster_instructions(...))")
    return torch.cdist(widen(embeddings_ND), widen(centres_CD).to(embeddings_ND.device)).argmin(1)


def set_centres(model: nn.Module, centres_CD: Tensor) -> None:
    """Give every EmbeddingRouter the centres. ValueError if there is none, or for another number of clusters."""
    for router in routers_of(model, EmbeddingRouter):
        if router.centres_CD.shape != centres_CD.shape:
            raise ValueError(f"centres {tuple(centres_CD.shape)}, routers built for {tuple(router.centres_CD.shape)}")
        router.centres_CD.copy_(centres_CD)


def label_loss(model: nn.Module) -> Tensor:
    """CE(z, expert of the sample's family): mean over the real tokens, then over the layers with a TaskRouter.

    Of what the latest forward left: call it before the backward, and before samples are set anew. With fewer experts than
    families, family f has expert f modulo E. With STGC's `router_only` it reaches the routers alone. ValueError if the
    model has no TaskRouter, RuntimeError if none ran with gradients on.
    """
    losses = []
    for router in routers_of(model, TaskRouter):
        logits_TE = router.last_logits_TE
        if logits_TE is not None:
            keep_BL, task_B = (router.samples.take(name, logits_TE) for name in ("keep_BL", "task_B"))
            label_BL = (task_B % logits_TE.shape[1]).unsqueeze(1).expand_as(keep_BL)
            losses.append(F.cross_entropy(logits_TE[keep_BL.bool().flatten()], label_BL[keep_BL.bool()]))
    if not losses:
        raise RuntimeError("no forward with gradients on: call the model first")
    return torch.stack(losses).mean()


# ---- 4. Building ----

TOKEN_ROUTERS = {"linear": Router, "cosine": CosineRouter}
ROUTERS = TOKEN_ROUTERS | {"embedding": EmbeddingRouter, "feature": FeatureRouter, "task": TaskRouter}


def make_router(kind: str, d_model: int, num_experts: int, num_clusters: int = 128, **factory) -> nn.Module:
    """A router of a kind in ROUTERS; `embedding` alone reads num_clusters. With the model built, call `share_samples`."""
    if kind not in ROUTERS:
        raise ValueError(f"router={kind!r} is none of {', '.join(ROUTERS)}")
    size = {"num_clusters": num_clusters} if kind == "embedding" else {}
    return ROUTERS[kind](d_model, num_experts, **size, **factory)


def routers_of(model: nn.Module, kind: type[SampleRouter]) -> list[SampleRouter]:
    """At least one; ValueError if there is none."""
    routers = [module for module in model.modules() if isinstance(module, kind)]
    if not routers:
        raise ValueError(f"the model has no {kind.__name__}")
    return routers


def share_samples(model: nn.Module) -> Samples | None:
    """Give all routers of a model one new Samples, and return it; None if no router wants any."""
    samples = Samples()
    for module in model.modules():
        if isinstance(module, SampleRouter):
            module.samples = samples
    return samples_of(model)


def samples_of(model: nn.Module) -> Samples | None:
    """The Samples that all routers of a model share; None if no router wants any. RuntimeError if they have several."""
    found = {module.samples for module in model.modules() if isinstance(module, SampleRouter)}
    if len(found) > 1:
        raise RuntimeError("the routers do not share their samples: call share_samples(model) once after building it")
    return next(iter(found), None)


# ---- 5. Capacity ----


def find_room(expert_ids_BLK: Tensor, keep_BL: Tensor, score_BL: Tensor | None, num_experts: int, capacity: float) -> Tensor:
    """kept_BLK: the pairs that come when their expert still has room, for ceil(T * K * capacity / E) pairs of each sample.

    T counts the sample's real tokens; padding takes no room, and counts as kept. All first choices come before any second
    one, and within these tokens come by position (GShard; DeepSpeed at 0c691a5, top2gating) or, given scores, the highest
    first: V-MoE's Batch Prioritized Routing (google-research/vmoe at 1030c71, moe.py).
    """
    position_BL = torch.arange(keep_BL.shape[1], device=keep_BL.device).expand_as(keep_BL)
    order_BL = position_BL if score_BL is None else score_BL.argsort(dim=1, descending=True, stable=True)
    order_BKL = order_BL.unsqueeze(1).expand_as(expert_ids_BLK.mT)
    onehot_BKLE = F.one_hot(expert_ids_BLK.mT.gather(2, order_BKL), num_experts)
    onehot_BKLE = onehot_BKLE * keep_BL.gather(1, order_BL)[:, None, :, None]
    place_BKLE = onehot_BKLE.flatten(1, 2).cumsum(1).view_as(onehot_BKLE)  # from 1
    share = expert_ids_BLK.shape[2] * capacity / num_experts
    limit_B = (keep_BL.sum(1).float() * share - 1e-4).ceil()  # less a rounding error, which would be one pair more
    kept_BKL = (place_BKLE * onehot_BKLE).sum(3) <= limit_B[:, None, None]
    return kept_BKL.gather(2, order_BKL.argsort(2)).mT


class CapacityLimit:
    """What `limit_capacity` puts into the layers of a model, and its count of the pairs of real tokens, over all layers."""

    def __init__(self, capacity: float, bpr: bool):
        self.capacity, self.bpr = capacity, bpr
        self.pairs = self.dropped = 0  # tensors after the first forward

    @property
    def share(self) -> float:
        """Dropped over all pairs so far, those of generate's steps among them, which always find room."""
        return float(self.dropped) / max(float(self.pairs), 1.0)

    def see(self, layer: MoELayer, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook: where the samples begin, and the padding, before the layer flattens and consumes them."""
        x, mask = args[0] if args else kwargs["x"], args[1] if len(args) > 1 else kwargs.get("mask")
        self.length, self.mask = x.shape[-2], layer.mask if mask is None else mask

    def route(self, layer: MoELayer, x_TD: Tensor) -> Routing:
        """The layer's own routing, with weights of 0 for what finds no room."""
        logits_TE, _, ids_TK = MoELayer.routing(layer, x_TD)
        probs_TK = logits_TE.softmax(-1).gather(1, ids_TK)
        keep_T = torch.ones_like(ids_TK[:, 0]) if self.mask is None else self.mask.flatten()
        keep_T, rows = keep_T.bool(), (-1, self.length)
        score_BL = probs_TK[:, 0].view(rows) if self.bpr else None
        kept_BLK = find_room(ids_TK.unflatten(0, rows), keep_T.view(rows), score_BL, logits_TE.shape[1], self.capacity)
        kept_TK = kept_BLK.flatten(0, 1)
        self.pairs = self.pairs + keep_T.sum() * layer.top_k
        self.dropped = self.dropped + (~kept_TK).sum()
        weights_TK = probs_TK * kept_TK
        if layer.normalize:
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp_min(torch.finfo(weights_TK.dtype).tiny)
        return Routing(logits_TE, layer.scale * weights_TK, ids_TK)


@contextmanager
def limit_capacity(model: nn.Module, capacity: float, bpr: bool = False) -> Iterator[CapacityLimit]:
    """For evaluation: within it every MoE layer drops the pairs that find no room at their expert (`find_room`).

    PAPER, evaluation with a capacity; bpr: with Batch Prioritized Routing. Layers see (B, L, D), or (L, D) as one sample.
    A dropped pair adds 0. CHOICE: room is per sample, as the paper evaluates one by one, so the batch size changes nothing.
    CHOICE: a layer that normalises does so again over what a token keeps, as DeepSpeed's top2gating does and V-MoE does not:
    one expert left has the token wholly; none left, and the layer's output is 0. CHOICE: the least room is 1, by rounding
    up (DeepSpeed can have more), which the single tokens of `generate` always find.
    Leaves the model as it was, whatever happens. ValueError for a capacity that is not positive and finite or a model
    without MoE layers, RuntimeError within another limit.
    """
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    if not layers or not 0 < capacity < math.inf:
        raise ValueError(f"capacity={capacity} must be positive, and the model have MoE layers (it has {len(layers)})")
    if any("routing" in vars(layer) for layer in layers):
        raise RuntimeError("the model's capacity is limited already")
    limit = CapacityLimit(capacity, bpr)
    hooks = [layer.register_forward_pre_hook(limit.see, with_kwargs=True) for layer in layers]
    for layer in layers:
        layer.routing = partial(limit.route, layer)
    try:
        yield limit
    finally:
        for layer, hook in zip(layers, hooks, strict=True):
            hook.remove()
            del layer.routing
