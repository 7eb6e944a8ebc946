"""What STGC is compared with: other routers, three of which route whole samples, and a capacity limit at evaluation.

    samples = share_samples(model)                       # one object for all routers that make_router built
    samples.set(keep_BL, task_B=...)                     # before each forward, or generate
    loss = stgc.loss(model(**batch).loss) + label_loss(model)     # the second term only with task routers
    with limit_capacity(model, 0.5, bpr=True) as limit:  # evaluation; limit.share of the pairs was dropped
        model.generate(...)

Shapes as in stgc.py: T tokens, K experts per token, E experts, D hidden size. The tokens are those of B samples with L
tokens each, in order: T = B * L, or T = B in a step of `generate`. P projected size, C clusters, N instructions.

  1 Token routers  2 Sample-level routers  3 Clusters and labels  4 Building  5 Capacity
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn

from lab.moe.dynmoe import TopAnyRouter, layers_of
from stgc import MoELayer, Router, Routing, widen

# ---- 1. Token routers ----


class CosineRouter(nn.Module):
    """Logits from cosines, as in the GLUE runs of DynMoE and EMoE (LINs-lab/DynMoE at 4927232, after GMoE).

    z = normalise(W x + b) . normalise_columns(S) * exp(min(t, log 100)), x_TD -> logits_TE, in at least float32 even under
    autocast. t is learnt and starts at log 2, so the logits start within [-2, 2] and stay within [-100, 100]. This bounds
    the effect of a conflict loss on them; the logits of a linear router are not bounded.
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


class RandomRouter(nn.Module):
    """Draws the K experts of each token by dice, with equal weights, in training and in evaluation, as THOR does
    (arXiv:2110.04260). It has no parameter. The control for a learned router: x_TD -> logits_TE.

    The logits of the chosen experts are 0, except for a term that ranks them by dice, too, and changes a weight 1/K by less
    than K * 2^-22 of it. The others' are low enough for a weight of 0. The draws come from torch's default generator of the
    device.
    """

    OTHER, RANK = -50.0, 2.0**-21

    def __init__(self, d_model: int, num_experts: int, top_k: int, **factory):
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE = widen(x_TD).new_full((len(x_TD), self.num_experts), self.OTHER)
        ids_TK = torch.rand_like(logits_TE).topk(self.top_k).indices
        rank_K = self.RANK * torch.arange(self.top_k, 0, -1).to(logits_TE)
        return logits_TE.scatter(1, ids_TK, rank_K.expand_as(ids_TK))


# ---- 2. Sample-level routers ----


class Samples:
    """What a model's routers need to know about the batch. All routers share one object, see `share_samples`.

    Call `set` before each forward, and once before a whole `generate`; it replaces all earlier values. With gradient
    checkpointing the values must stay until the backward is done. They are not part of a state_dict. A copy of a model has
    its own copy, again shared by its routers: `samples_of(copy)`.
    """

    def __init__(self):
        self.values: dict[str, Tensor | None] = {}
        self.batch = 0  # how often it was set

    def set(self, keep_BL: Tensor, *, instruction_BL=None, cluster_B=None, task_B=None) -> None:
        """keep_BL: real tokens. instruction_BL: the question's tokens, neither picture nor answer. task_B: see FAMILIES.

        Only keep_BL and the values that the model's kind of router reads are needed. ValueError if shapes do not fit.
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

    def get(self, name: str, x_TD: Tensor) -> Tensor:
        """A value for a router whose input is x_TD. RuntimeError if it was not set, ValueError if x_TD is another batch."""
        value = self.values.get(name)
        if value is None:
            raise RuntimeError(f"the model's routers need {name}: call samples_of(model).set(keep_BL, {name}=...) before")
        num_samples, length = self.values["keep_BL"].shape
        if len(x_TD) not in (num_samples, num_samples * length):
            raise ValueError(f"{len(x_TD)} tokens, samples are set for {num_samples} x {length} (generate needs its cache)")
        return value.to(x_TD.device)


class SampleRouter(nn.Module):
    """A linear router, in the precision of `stgc.Router`, that knows the samples: x_TD -> logits_TE."""

    def __init__(self, d_model: int, num_experts: int, **factory):
        super().__init__()
        self.router = Router(d_model, num_experts, **factory)
        self.samples = Samples()


def spread(logits_BE: Tensor, x_TD: Tensor) -> Tensor:
    """logits_TE: the logits of each sample, repeated for all its tokens and padding."""
    return logits_BE.unsqueeze(1).expand(-1, len(x_TD) // len(logits_BE), -1).flatten(0, 1)


class EmbeddingRouter(SampleRouter):
    """Routes a sample by the learnt vector of its instruction's cluster. PAPER, embedding-based; after MoCLE.

    Reads `cluster_B`, see `nearest_cluster`. The centres are a buffer, so that a saved model can route new instructions.
    They are NaN until `set_centres`. CHOICE: the vectors start from N(0, 1), as in nn.Embedding: the size of a LayerNorm's
    output.
    """

    def __init__(self, d_model: int, num_experts: int, num_clusters: int = 128, **factory):
        super().__init__(d_model, num_experts, **factory)
        self.clusters_CD = nn.Parameter(torch.empty(num_clusters, d_model, **factory).normal_())
        self.register_buffer("centres_CD", torch.full((num_clusters, d_model), math.nan, **factory))

    def forward(self, x_TD: Tensor) -> Tensor:
        cluster_B = self.samples.get("cluster_B", x_TD)
        return spread(self.router(F.embedding(cluster_B, self.clusters_CD)), x_TD)


class FeatureRouter(SampleRouter):
    """Routes a sample by the mean of its instruction tokens. PAPER, feature-based; after LoRA-MoE.

    Reads `instruction_BL`. CHOICE: the mean is of this layer's input. A step of `generate` has no instruction in its input:
    it uses the prompt's logits, which are kept here, detached. RuntimeError if samples were set since.
    """

    prompt: tuple[int, Tensor] | None = None  # samples.batch, logits_BE

    def forward(self, x_TD: Tensor) -> Tensor:
        instruction_BL = self.samples.get("instruction_BL", x_TD)
        if len(x_TD) == len(instruction_BL):
            if self.prompt is None or self.prompt[0] != self.samples.batch:
                raise RuntimeError("a step of generate, but no forward of the prompt since samples were set")
            return spread(self.prompt[1], x_TD)
        x_BLD, mask_BL1 = widen(x_TD).unflatten(0, instruction_BL.shape), instruction_BL.bool().unsqueeze(2)
        logits_BE = self.router((x_BLD * mask_BL1).sum(1) / mask_BL1.sum(1))
        self.prompt = self.samples.batch, logits_BE.detach()
        return spread(logits_BE, x_TD)


class TaskRouter(SampleRouter):
    """A token router that learns from `label_loss` which expert serves which task family. PAPER, task-based; after MoLA.

    CHOICE: the paper says only that each family has an expert as its label. Here the label is a target for the logits of
    every real token. The router itself never reads the label, in training either, so only the loss needs samples.
    """

    last_logits_TE: Tensor | None = None  # with their graph; None without gradients

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE = self.router(x_TD)
        if torch._C._current_graph_task_id() == -1:  # not when a checkpoint recomputes: then the loss is computed already
            self.last_logits_TE = logits_TE if torch.is_grad_enabled() else None
        return logits_TE

    def __getstate__(self):  # copies and pickles cannot hold a graph
        return self.__dict__ | {"last_logits_TE": None}


# ---- 3. Clusters and labels ----

FAMILIES = {"caption": 0, "vqa": 1, "choice": 1, "ocr": 2, "region": 3}  # task_B of lab.vision.instructions' kinds


def cluster_instructions(embeddings_ND: Tensor, num_clusters: int, seed: int) -> Tensor:
    """centres_CD by k-means (paper: 128 clusters). Give C = len(centres_CD) to `make_router`, and them to `set_centres`.

    There are at most as many clusters as distinct embeddings, so C can be below num_clusters.
    """
    num_clusters = min(num_clusters, len(embeddings_ND.unique(dim=0)))
    kmeans = KMeans(num_clusters, random_state=seed).fit(widen(embeddings_ND.detach()).cpu().numpy())
    return torch.from_numpy(kmeans.cluster_centers_).to(embeddings_ND)


def nearest_cluster(embeddings_ND: Tensor, centres_CD: Tensor) -> Tensor:
    """cluster_N: the nearest centre. In training, too, use the centres of a router, since it may round them."""
    if centres_CD.isnan().any():
        raise RuntimeError("the routers have no centres yet: call set_centres(model, cluster_instructions(...))")
    return torch.cdist(widen(embeddings_ND), widen(centres_CD).to(embeddings_ND.device)).argmin(1)


def set_centres(model: nn.Module, centres_CD: Tensor) -> None:
    """Gives every EmbeddingRouter the centres. ValueError if there is none, or if the number of clusters differs."""
    for router in routers_of(model, EmbeddingRouter):
        if router.centres_CD.shape != centres_CD.shape:
            raise ValueError(f"centres {tuple(centres_CD.shape)}, routers built for {tuple(router.centres_CD.shape)}")
        router.centres_CD.copy_(centres_CD)


def label_loss(model: nn.Module) -> Tensor:
    """CE(z, expert of the sample's family): mean over the real tokens, then over the layers with a TaskRouter.

    It uses the logits of the latest forward: call it before the backward, and before samples are set again. With fewer
    experts than families, family f has expert f modulo E. With STGC's `router_only` its gradient reaches the routers only.
    ValueError if the model has no TaskRouter, RuntimeError if none ran with gradients on.
    """
    losses = []
    for router in routers_of(model, TaskRouter):
        logits_TE = router.last_logits_TE
        if logits_TE is not None:
            keep_BL, task_B = (router.samples.get(name, logits_TE) for name in ("keep_BL", "task_B"))
            label_BL = (task_B % logits_TE.shape[1]).unsqueeze(1).expand_as(keep_BL)
            losses.append(F.cross_entropy(logits_TE[keep_BL.bool().flatten()], label_BL[keep_BL.bool()]))
    if not losses:
        raise RuntimeError("no forward with gradients on: call the model first")
    return torch.stack(losses).mean()


# ---- 4. Building ----

TOKEN_ROUTERS = {"linear": Router, "cosine": CosineRouter, "random": RandomRouter, "dynmoe": TopAnyRouter}
ROUTERS = TOKEN_ROUTERS | {"embedding": EmbeddingRouter, "feature": FeatureRouter, "task": TaskRouter}


def make_router(
    kind: str, d_model: int, num_experts: int, num_clusters: int = 128, top_k: int = 2, max_experts: int = 16, **factory
) -> nn.Module:
    """A router of a kind in ROUTERS; only `embedding` reads num_clusters, only `random` top_k, only `dynmoe`, which needs a
    TopAnyLayer, max_experts. Call `share_samples` once the model is built."""
    if kind not in ROUTERS:
        raise ValueError(f"router={kind!r} is none of {', '.join(ROUTERS)}")
    more = {"embedding": {"num_clusters": num_clusters}, "random": {"top_k": top_k}, "dynmoe": {"max_experts": max_experts}}
    return ROUTERS[kind](d_model, num_experts, **more.get(kind, {}), **factory)


def routers_of(model: nn.Module, kind: type[SampleRouter]) -> list[SampleRouter]:
    """The routers of this kind. ValueError if there is none."""
    routers = [module for module in model.modules() if isinstance(module, kind)]
    if not routers:
        raise ValueError(f"the model has no {kind.__name__}")
    return routers


def share_samples(model: nn.Module) -> Samples | None:
    """Gives all routers of a model one new Samples and returns it. None if no router needs it."""
    samples = Samples()
    for module in model.modules():
        if isinstance(module, SampleRouter):
            module.samples = samples
    return samples_of(model)


def samples_of(model: nn.Module) -> Samples | None:
    """The Samples that all routers of a model share. None if no router needs it. RuntimeError if there are several."""
    found = {module.samples for module in model.modules() if isinstance(module, SampleRouter)}
    if len(found) > 1:
        raise RuntimeError("the routers do not share their samples: call share_samples(model) once after building it")
    return next(iter(found), None)


# ---- 5. Capacity ----


def find_room(expert_ids_BLK: Tensor, keep_BL: Tensor, score_BL: Tensor | None, num_experts: int, capacity: float) -> Tensor:
    """kept_BLK: the pairs that fit, when each expert has room for ceil(T * K * capacity / E) pairs of each sample.

    T counts the sample's real tokens; padding takes no room and counts as kept. All first choices are placed before any
    second choice. Within a choice, tokens are placed by position (GShard; DeepSpeed at 0c691a5, top2gating) or, given
    scores, highest first: V-MoE's Batch Prioritized Routing (google-research/vmoe at 1030c71, moe.py).
    """
    position_BL = torch.arange(keep_BL.shape[1], device=keep_BL.device).expand_as(keep_BL)
    order_BL = position_BL if score_BL is None else score_BL.argsort(dim=1, descending=True, stable=True)
    order_BKL = order_BL.unsqueeze(1).expand_as(expert_ids_BLK.mT)
    onehot_BKLE = F.one_hot(expert_ids_BLK.mT.gather(2, order_BKL), num_experts)
    onehot_BKLE = onehot_BKLE * keep_BL.gather(1, order_BL)[:, None, :, None]
    place_BKLE = onehot_BKLE.flatten(1, 2).cumsum(1).view_as(onehot_BKLE)  # from 1
    share = expert_ids_BLK.shape[2] * capacity / num_experts
    limit_B = (keep_BL.sum(1).float() * share - 1e-4).ceil()  # less 1e-4, since a rounding error would add a pair
    kept_BKL = (place_BKLE * onehot_BKLE).sum(3) <= limit_B[:, None, None]
    return kept_BKL.gather(2, order_BKL.argsort(2)).mT


class CapacityLimit:
    """The hooks of `limit_capacity`, and the number of all and of dropped pairs of real tokens, over all layers."""

    def __init__(self, capacity: float, bpr: bool):
        self.capacity, self.bpr = capacity, bpr
        self.pairs = self.dropped = 0  # tensors after the first forward

    @property
    def share(self) -> float:
        """Dropped pairs over all pairs so far. The steps of `generate` count, too; their pairs always fit."""
        return float(self.dropped) / max(float(self.pairs), 1.0)

    def on_forward(self, layer: MoELayer, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook: stores sample length and padding before the layer flattens and consumes them."""
        x, mask = args[0] if args else kwargs["x"], args[1] if len(args) > 1 else kwargs.get("mask")
        self.length, self.mask = x.shape[-2], layer.mask if mask is None else mask

    def route(self, layer: MoELayer, x_TD: Tensor) -> Routing:
        """The layer's own routing, with weight 0 for pairs that do not fit."""
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
    """For evaluation: within it every MoE layer drops the pairs that do not fit at their expert (`find_room`).

    PAPER, evaluation with a capacity; bpr: with Batch Prioritized Routing. Layers get (B, L, D), or (L, D) as one sample.
    A dropped pair adds 0. CHOICE: room is per sample, since the paper evaluates one by one, so the batch size has no effect.
    CHOICE: a layer that normalises its weights does so again over the kept pairs of a token, as DeepSpeed's top2gating does
    and V-MoE does not. A token with one kept expert gives it weight 1; with none, the layer's output is 0. CHOICE: the least
    room is 1, by rounding up (DeepSpeed can have more), so the single tokens of `generate` always fit.
    The model is restored on exit, also after an error. ValueError for a capacity that is not positive and finite, or a model
    without MoE layers, or with DynMoE's, which have no fixed K. RuntimeError within another limit.
    """
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    if not layers or not 0 < capacity < math.inf:
        raise ValueError(f"capacity={capacity} must be positive, and the model have MoE layers (it has {len(layers)})")
    if layers_of(model):
        raise ValueError("a capacity needs a fixed number of experts per token, which DynMoE's layers do not have")
    if any("routing" in vars(layer) for layer in layers):
        raise RuntimeError("the model's capacity is limited already")
    limit = CapacityLimit(capacity, bpr)
    hooks = [layer.register_forward_pre_hook(limit.on_forward, with_kwargs=True) for layer in layers]
    for layer in layers:
        layer.routing = partial(limit.route, layer)
    try:
        yield limit
    finally:
        for layer, hook in zip(layers, hooks, strict=True):
            hook.remove()
            del layer.routing
