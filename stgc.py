"""STGC: token gradient conflict in Mixture-of-Experts, in one file.

Paper: Yang et al., "Solving Token Gradient Conflict in Mixture-of-Experts for Large Vision-Language Model", ICLR 2025,
arXiv:2406.19905. "eq." and "sec." always mean that paper. Three tags keep it and us apart: PAPER (the line that is the
equation), CHOICE (the paper is silent), DIFFERS (we depart from it, knowingly).

  T tokens                    K experts per token       S = T*K pairs (token, expert), the unit that is judged
  E experts in a layer        D hidden size             F expert ffn size            I, O  in and out of one linear

  1 Config  2 Router  3 Experts  4 MoE layer  5 Token gradients  6 Conflicts  7 Losses  8 Taps  9 STGC  10 Demo

    stgc = STGC(model, STGCConfig(conflict_loss="ce"))      # finds the MoE layers of the model
    main_loss = model(**batch).loss
    loss = stgc.loss(main_loss)                             # main + alpha * balance + beta * conflict, eq. 10
    loss.backward()
    stgc.stats()                                            # per layer: conflict ratio, consistency, load, losses
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

# ---- 1. Config ----


@dataclass(frozen=True)
class STGCConfig:
    """What is done about conflicting tokens. The defaults are the paper's (sec. 4.1); bad values raise ValueError."""

    conflict_loss: str = "ce"  # none | ce (eq. 8, 14) | mse (eq. 13) | reroute (ours: towards the best other expert)
    alpha: float = 0.01  # weight of the balance loss, eq. 9
    beta: float = 1.0  # weight of the conflict loss, eq. 10
    tau: float = 0.0  # a pair conflicts when its similarity, in [-1, 1], is below tau
    passes: str = "two"  # two: an extra backward finds the token gradients (paper) | one: the ordinary backward does (ours)
    gradients: str = "bias"  # bias: of the (virtual) biases (paper) | weight: of the whole weights (ours)
    select: str = "conflict"  # conflict | random: the placebo, as many pairs drawn at random get the loss
    every: int = 1  # judge the tokens at each k-th step only; 0: never, which leaves the balance loss
    layers: tuple[int, ...] | None = None  # which MoE layers to judge, counted from 0; None: all
    router_only: bool | None = None  # both losses train the router, not the features; None: what `passes` implies
    seed: int = 0  # of the placebo's draw

    def __post_init__(self):
        choices = {
            "conflict_loss": ("none", "ce", "mse", "reroute"),
            "passes": ("two", "one"),
            "gradients": ("bias", "weight"),
            "select": ("conflict", "random"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(allowed)}")
        for name in ("alpha", "beta", "tau"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number")
        if self.every < 0 or (self.every == 0 and self.conflict_loss != "none"):
            raise ValueError(f"every={self.every} must be at least 1 (0 only with conflict_loss='none')")
        # DIFFERS: with one pass the gradient that reaches a layer's taps must be the main loss's alone, so neither loss may
        # reach the features of a shallower layer: both then act on logits recomputed from x.detach().
        if self.passes == "one" and self.router_only is False:
            raise ValueError("passes='one' needs router_only: in one backward a regulariser of the features is inseparable")
        if self.router_only is None:
            object.__setattr__(self, "router_only", self.passes == "one")


# ---- 2. Router ----


def widen(tensor: Tensor) -> Tensor:
    """At least float32, never less than it was: half precision is widened, float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Router(nn.Linear):
    """z = W_r x, eq. 5: linear, bias-free, in at least float32 even under autocast. Any module x_TD -> logits_TE will do."""

    def __init__(self, d_model: int, num_experts: int, **factory):
        super().__init__(d_model, num_experts, bias=False, **factory)

    def forward(self, x_TD: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(widen(x_TD), widen(self.weight))


class Routing(NamedTuple):
    """A token's logits, and its Top-K experts with their weights."""

    logits_TE: Tensor
    weights_TK: Tensor
    expert_ids_TK: Tensor


def route(router: nn.Module, x_TD: Tensor, top_k: int, normalize: bool = True, scale: float = 1.0) -> Routing:
    """Top-K of p = softmax(z). PAPER eq. 5.

    CHOICE: the K weights are renormalised to sum to 1 (MoE-LLaVA's gate does) unless `normalize` is off. `scale`
    multiplies them: experts that are parts of one FFN add up, so their weights sum to K.
    """
    logits_TE = widen(router(x_TD))
    weights_TK, expert_ids_TK = logits_TE.softmax(-1).topk(top_k, dim=-1)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return Routing(logits_TE, scale * weights_TK, expert_ids_TK)


# ---- 3. Experts ----


class Pairs(NamedTuple):
    """The S pairs sorted by expert. Padding belongs to no expert and stands behind the last one."""

    order_S: Tensor  # which pair, counted t * K + k, stands here
    inverse_S: Tensor  # where pair t * K + k stands
    onehot_SE: Tensor  # its expert, as a float row; zero for padding
    ends_E: Tensor  # where each expert's pairs end


def sort_pairs(expert_ids_TK: Tensor, keep_T: Tensor, num_experts: int, dtype: torch.dtype) -> Pairs:
    """Sort the pairs by expert; tokens with keep_T False are padding. Dropless: no expert has a capacity."""
    ids_S, order_S = expert_ids_TK.masked_fill(~keep_T.unsqueeze(1), num_experts).flatten().sort(stable=True)
    experts_E = torch.arange(num_experts, device=ids_S.device)
    ends_E = torch.searchsorted(ids_S, experts_E, right=True)
    return Pairs(order_S, order_S.argsort(), (ids_S.unsqueeze(1) == experts_E).to(dtype), ends_E)


class TakeRows(torch.autograd.Function):
    """x[index], where each row is taken `times` times. Its backward gathers as well: an index_add would need atomics, whose
    order (and so the last bits of a gradient) changes from run to run on a GPU."""

    @staticmethod
    def forward(ctx, x, index, back_index, times):
        ctx.save_for_backward(back_index)
        ctx.times = times
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.saved_tensors[0])
        return (grad if ctx.times == 1 else grad.unflatten(0, (-1, ctx.times)).sum(1)), None, None, None


def matmul_kernel(x_SI: Tensor, w_EIO: Tensor) -> str:
    """How the experts' products are computed; the one place that decides. No CUDA path copies a number to the host.

    slices: a loop over contiguous rows, fastest on a CPU. grouped_mm: one kernel for all experts (needs compute capability
    8 and rows of whole 16 bytes). masked: every expert on every row, E times the work: for what grouped_mm refuses.
    """
    if not x_SI.is_cuda:
        return "slices"
    aligned = all(n * x_SI.element_size() % 16 == 0 for n in w_EIO.shape[1:])
    able = hasattr(F, "grouped_mm") and torch.cuda.get_device_capability(x_SI.device) >= (8, 0)
    return "grouped_mm" if able and aligned and x_SI.dtype != torch.float64 else "masked"


def grouped_linear(x_SI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, pairs: Pairs) -> Tensor:
    """x @ w[e] + b[e], each row with its own expert e. Rows of padding come out finite, and meaningless."""
    if torch.is_autocast_enabled(x_SI.device.type):
        dtype = torch.get_autocast_dtype(x_SI.device.type)
        x_SI, w_EIO, b_EO = x_SI.to(dtype), w_EIO.to(dtype), None if b_EO is None else b_EO.to(dtype)
    kernel = matmul_kernel(x_SI, w_EIO)
    if kernel == "slices":  # unbind, not w_EIO[e]: each indexing would write a gradient of the full size
        ends = [0, *pairs.ends_E.tolist(), len(x_SI)]
        rows = x_SI.split([end - start for start, end in zip(ends, ends[1:])])
        if b_EO is None:
            out = [x_NI @ w_IO for x_NI, w_IO in zip(rows, w_EIO.unbind(0))]
        else:
            out = [torch.addmm(b_O, x_NI, w_IO) for x_NI, w_IO, b_O in zip(rows, w_EIO.unbind(0), b_EO.unbind(0))]
        return torch.cat([*out, x_SI.new_zeros(len(rows[-1]), w_EIO.shape[2])])
    if kernel == "grouped_mm":  # rows behind the last end would stay unwritten, so padding joins the last expert
        ends_E = torch.cat([pairs.ends_E[:-1], pairs.ends_E.new_full((1,), len(x_SI))]).to(torch.int32)
        out_SO = F.grouped_mm(x_SI, w_EIO, offs=ends_E)
    else:
        on_SE = pairs.onehot_SE.to(x_SI.dtype)
        out_SO = sum((x_SI * on_S1) @ w_IO for on_S1, w_IO in zip(on_SE.split(1, dim=1), w_EIO.unbind(0)))
    return out_SO if b_EO is None else out_SO + pairs.onehot_SE.to(x_SI.dtype) @ b_EO


class Experts(nn.Module):
    """E feed-forward networks as stacked parameters: act(x W_in) W_out or, gated (SwiGLU), (act(x W_gate) * x W_in) W_out.

    `activation` is any elementwise callable; `bias` gives every linear one. Initialised as nn.Linear is.
    """

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_ff: int,
        *,
        gated: bool = False,
        bias: bool = True,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        **factory,
    ):
        super().__init__()
        self.num_experts, self.d_model, self.d_ff = num_experts, d_model, d_ff
        self.gated, self.activation = gated, activation

        def uniform(fan_in, *shape):
            return nn.Parameter(torch.empty(shape, **factory).uniform_(-(fan_in**-0.5), fan_in**-0.5))

        E, D, F_ = num_experts, d_model, d_ff
        self.w_gate_EDF = uniform(D, E, D, F_) if gated else None
        self.b_gate_EF = uniform(D, E, F_) if gated and bias else None
        self.w_in_EDF = uniform(D, E, D, F_)
        self.b_in_EF = uniform(D, E, F_) if bias else None
        self.w_out_EFD = uniform(F_, E, F_, D)
        self.b_out_ED = uniform(F_, E, D) if bias else None

    def forward(self, x_SD: Tensor, pairs: Pairs, record: "Record | None" = None) -> Tensor:
        """y_SD, not yet weighted. A record, where an STGC object watches, taps each linear: [gate,] in, out."""
        weights = [w for w in (self.w_gate_EDF, self.w_in_EDF, self.w_out_EFD) if w is not None]
        if record is not None:
            x_SD, weights = record.enter(x_SD, weights)

        def linear(i, a_SI, b_EO):
            out_SO = grouped_linear(a_SI, weights[i], b_EO, pairs)
            if record is not None:
                record.tap(a_SI, weights[i], out_SO)
            return out_SO

        if self.gated:
            gate_SF = linear(0, x_SD, self.b_gate_EF)
            a_SF = self.activation(gate_SF) * linear(1, x_SD, self.b_in_EF)
        else:
            a_SF = self.activation(linear(0, x_SD, self.b_in_EF))
        return linear(-1, a_SF, self.b_out_ED)


# ---- 4. MoE layer ----


class MoELayer(nn.Module):
    """Router, dispatch, experts, combine: y = sum over the Top-K experts of w_e * E_e(x). PAPER eq. 6.

    x is (..., D) in any float dtype, mask (...) is True for real tokens: padding is not routed and comes out as zeros. A
    library's layer that calls us with x alone can set `layer.mask` before; the next forward uses it up.
    """

    def __init__(
        self, experts: Experts, router: nn.Module | None = None, top_k: int = 2, normalize: bool = True, scale: float = 1.0
    ):
        super().__init__()
        if not 1 <= top_k <= experts.num_experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and the number of experts, {experts.num_experts}")
        like = experts.w_in_EDF
        self.router = router or Router(experts.d_model, experts.num_experts, device=like.device, dtype=like.dtype)
        self.experts, self.top_k, self.normalize, self.scale = experts, top_k, normalize, scale
        self.mask: Tensor | None = None
        self.watch: Callable | None = None  # set by an STGC object; without one the layer costs nothing extra

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask, self.mask = self.mask if mask is None else mask, None
        x_TD = x.reshape(-1, x.shape[-1])
        keep_T = x_TD.new_ones(len(x_TD), dtype=torch.bool) if mask is None else mask.reshape(-1).to(torch.bool)
        if len(keep_T) != len(x_TD):
            raise ValueError(f"mask {tuple(mask.shape)} does not fit x {tuple(x.shape)}: one entry per token is needed")
        routing = route(self.router, x_TD, self.top_k, self.normalize, self.scale)
        pairs = sort_pairs(routing.expert_ids_TK, keep_T, self.experts.num_experts, routing.logits_TE.dtype)
        record = None if self.watch is None else self.watch(x_TD, routing, pairs, keep_T)
        x_SD = TakeRows.apply(x_TD, pairs.order_S // self.top_k, pairs.inverse_S, self.top_k)
        y_SD = self.experts(x_SD, pairs, record)
        y_TKD = TakeRows.apply(y_SD, pairs.inverse_S, pairs.order_S, 1).unflatten(0, (-1, self.top_k))
        weights_TK1 = (routing.weights_TK * keep_T.unsqueeze(1)).unsqueeze(2)
        return (y_TKD * weights_TK1.to(y_TKD.dtype)).sum(1).reshape(x.shape)

    def __getstate__(self):  # copies and pickles are unwatched: nothing of a graph goes with them
        return self.__dict__ | {"watch": None}


# ---- 5. Token gradients ----
#
# The gradient of a linear's bias from one pair alone is the gradient of the loss at that linear's output for this pair. So
# the linear needs no bias, and nothing has to be computed for each sample: the rows of one ordinary tensor are what eq. 7
# and 11 speak of. At the last linear that tensor stands before the routing weight, so it contains the factor w_e.

AllReduce = Callable[[Tensor], Tensor]  # sums a tensor over the processes, so that every mean is the global batch's


class Compared(NamedTuple):
    """One linear's gradients against the mean gradients of the experts."""

    cos_SE: Tensor  # with the mean of every expert; 0 where either has no direction
    norm_S: Tensor
    consistency_E: Tensor  # mean of the cosine matrix of each expert's pairs, in [0, 1] (sec. 4.3)


def compare_to_means(grad_SO: Tensor, pairs: Pairs, all_reduce: AllReduce) -> Compared:
    """cos(g_n, gbar_e) for every expert e. PAPER eq. 7 and 11, one term of eq. 12 at the pair's own expert.

    A zero gradient has no direction and adds nothing to the sums; the scale of the loss cancels. The mean of an N x N
    cosine matrix, diagonal included, is the squared norm of the mean unit vector.
    """
    grad_SO = widen(grad_SO.detach())
    tiny = torch.finfo(grad_SO.dtype).tiny
    norm_S = torch.linalg.vector_norm(grad_SO, dim=-1)
    alive_S, onehot_SE = (norm_S > 0).to(grad_SO.dtype), pairs.onehot_SE.to(grad_SO.dtype)
    unit_SE = onehot_SE * (alive_S / norm_S.clamp_min(tiny)).unsqueeze(1)
    sum_EO, unit_sum_EO = all_reduce(torch.cat([onehot_SE, unit_SE], dim=1).T @ grad_SO).chunk(2)
    count_E = all_reduce(alive_S @ onehot_SE).clamp_min(1)
    cos_SE = grad_SO @ F.normalize(sum_EO, dim=-1, eps=tiny).T / norm_S.clamp_min(tiny).unsqueeze(1)
    return Compared(cos_SE, norm_S, (unit_sum_EO / count_E.unsqueeze(1)).square().sum(-1))


def weight_cosine(grad_SO: Tensor, a_SI: Tensor, weight_grad_EIO: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """cos(a_n g_n^T, Gbar_e) and the norm of the pair's whole weight gradient ("STGC-full", sec. 6.4), never formed.

    DIFFERS: held impossible there. But <a g^T, G> = a^T G g and |a g^T| = |a| |g|, so one product with the ordinary weight
    gradient does it (the ghost norm of differentially private training).
    """
    grad_SO, a_SI, weight_grad_EIO = widen(grad_SO.detach()), widen(a_SI), widen(weight_grad_EIO)
    tiny = torch.finfo(grad_SO.dtype).tiny
    cos_S = (grouped_linear(a_SI, weight_grad_EIO, None, pairs) * grad_SO).sum(-1)
    mean_norm_E = torch.linalg.vector_norm(weight_grad_EIO, dim=(1, 2))
    grad_norm_S, a_norm_S = (torch.linalg.vector_norm(rows, dim=-1) for rows in (grad_SO, a_SI))
    for norm_S in (grad_norm_S, a_norm_S, pairs.onehot_SE.to(mean_norm_E.dtype) @ mean_norm_E):
        cos_S = cos_S / norm_S.clamp_min(tiny)  # one by one: their product may underflow
    return cos_S, grad_norm_S * a_norm_S


# ---- 6. Conflicts ----


class Verdict(NamedTuple):
    """What was found in one layer in one step; pairs in the order of the tokens. No graph."""

    similarity_TK: Tensor  # s_n, eq. 12
    judged_TK: Tensor  # has a gradient at all
    conflict_TK: Tensor  # judged, and s_n < tau
    picked_TK: Tensor  # gets the loss: the conflicting pairs, or the placebo's
    target_TK: Tensor  # the expert that suits the pair's token best among those it is not on (Idea 3; for "reroute")
    consistency_E: Tensor
    occupied_E: Tensor  # experts with at least one judged pair
    counts_4: Tensor  # of picked, conflicting, judged and all pairs, over all processes
    loss: Tensor


def draw_placebo(conflict_TK: Tensor, judged_TK: Tensor, seed: int) -> Tensor:
    """As many of the judged pairs as conflict, drawn at random: what the selection itself is worth shows against this."""
    key_TK = torch.rand(judged_TK.shape, generator=torch.Generator().manual_seed(seed)).to(judged_TK.device)
    rank_S = key_TK.masked_fill(~judged_TK, -1.0).flatten().argsort(descending=True).argsort()
    return (rank_S < conflict_TK.sum()).view_as(conflict_TK)


def best_other_expert(cos_TKE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """argmax over the experts e' that the token is not on of cos(g2_n, gbar2_e').

    DIFFERS: sec. 6.2 leaves the destination open, as a token passes its own experts only. But g2 lives in the hidden space
    that all experts share, so its cosine with every expert's mean is there already.
    """
    on_TE = torch.zeros_like(cos_TKE[:, 0], dtype=torch.bool).scatter(1, expert_ids_TK, True)
    return cos_TKE.masked_fill(on_TE.unsqueeze(1), -math.inf).argmax(-1)


# ---- 7. Losses ----


def conflict_loss(kind: str, logits_TE: Tensor, expert_ids_TK: Tensor, picked_TK: Tensor, target_TK: Tensor) -> Tensor:
    """The loss of each picked pair; the caller divides the sum by their number.

    ce: CE(-z_n, e_n), PAPER eq. 8 and 14; its gradient on z is onehot(e_n) - softmax(-z_n): the token leaves e_n.
    mse: p_{n, e_n}^2, PAPER eq. 13. reroute: CE(z_n, target), ours: the token also learns where to go.
    """
    if kind == "none":
        return logits_TE.sum() * 0.0
    if kind == "ce":
        loss_TK = -(-logits_TE).log_softmax(-1).gather(1, expert_ids_TK)
    elif kind == "mse":
        loss_TK = logits_TE.softmax(-1).gather(1, expert_ids_TK).square()
    else:
        loss_TK = -logits_TE.log_softmax(-1).gather(1, target_TK)
    return (loss_TK * picked_TK).sum()


def balance_loss(logits_TE: Tensor, keep_T: Tensor, load_E: Tensor, num_tokens: Tensor) -> Tensor:
    """E * sum_e f_e * P_e, PAPER eq. 9 (Switch Transformer). Balanced value: 1. Padding counts for nothing.

    load_E holds the pairs of each expert over all processes, num_tokens the mean number of tokens of one process: data
    parallelism averages the gradients, so the mean of what the processes compute is the global batch's value.
    """
    score_E = (logits_TE.softmax(-1) * keep_T.unsqueeze(1)).sum(0) / num_tokens.clamp_min(1)
    return len(load_E) * (load_E / load_E.sum().clamp_min(1) * score_E).sum()


# ---- 8. Taps ----


@dataclass
class Judge:
    """Judges the pairs of one layer in one step, as their gradients come in. It holds no graph and, for bias gradients, no
    gradient either: a linear's are compared at once, and dropped."""

    config: STGCConfig
    expert_ids_TK: Tensor
    pairs: Pairs
    all_reduce: AllReduce
    num_processes: int
    placebo_seed: int
    publish: Callable[[Verdict], None]
    compared: dict[int, Compared] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)  # for gradients="weight", of each linear
    grads: dict[int, Tensor] = field(default_factory=dict)  # likewise, until the weight gradients are known

    def see(self, linear: int, grad_SO: Tensor) -> None:
        """Takes the gradient of the main loss at the output of a linear (0, 1, ... in the order of the forward)."""
        with torch.no_grad(), torch.autocast(grad_SO.device.type, enabled=False):
            self.compared[linear] = compare_to_means(grad_SO, self.pairs, self.all_reduce)
        if self.inputs:
            self.grads[linear] = grad_SO.detach()

    def close(self, logits_TE: Tensor, weight_grads: Sequence[Tensor]) -> Tensor:
        """Flags the conflicting pairs, PAPER definition 1 and eq. 12, and returns their loss, differentiable in logits_TE.

        A layer that the main loss did not reach has no gradients: it is not judged, and its loss is 0.
        """
        if not self.compared:
            return logits_TE.sum() * 0.0
        with torch.no_grad(), torch.autocast(logits_TE.device.type, enabled=False):
            compared = [self.compared[i] for i in sorted(self.compared)]
            if self.inputs:
                sums = [self.all_reduce(widen(grad_EIO)) for grad_EIO in weight_grads]
                terms = [weight_cosine(self.grads[i], a_SI, sums[i], self.pairs) for i, a_SI in enumerate(self.inputs)]
            else:
                terms = [((c.cos_SE * self.pairs.onehot_SE).sum(-1), c.norm_S) for c in compared]
            cos_LS, norm_LS = (torch.stack(term) for term in zip(*terms))
            verdict = self.decide(cos_LS.mean(0), (norm_LS > 0).any(0), compared)
        loss = conflict_loss(self.config.conflict_loss, logits_TE, self.expert_ids_TK, verdict.picked_TK, verdict.target_TK)
        loss = loss * self.num_processes / verdict.counts_4[0].clamp_min(1)  # processes average their gradients
        self.publish(verdict._replace(loss=loss.detach()))
        return loss

    def decide(self, similarity_S: Tensor, judged_S: Tensor, compared: list[Compared]) -> Verdict:
        """From sorted pairs to pairs in the order of the tokens, and to flags."""
        ids_TK, pairs, config = self.expert_ids_TK, self.pairs, self.config

        def by_token(rows_S):
            return rows_S.index_select(0, pairs.inverse_S).unflatten(0, ids_TK.shape)

        similarity_TK, judged_TK = by_token(similarity_S), by_token(judged_S)
        conflict_TK = judged_TK & (similarity_TK < config.tau)
        random = config.select == "random"
        picked_TK = draw_placebo(conflict_TK, judged_TK, self.placebo_seed) if random else conflict_TK
        target_TK = best_other_expert(by_token(compared[-1].cos_SE), ids_TK)
        counts = [picked_TK.sum(), conflict_TK.sum(), judged_TK.sum(), pairs.onehot_SE.sum()]
        counts_4 = self.all_reduce(torch.stack([count.to(pairs.onehot_SE.dtype) for count in counts]))
        occupied_E = self.all_reduce(judged_S.to(pairs.onehot_SE.dtype) @ pairs.onehot_SE) > 0
        consistency_E = torch.stack([c.consistency_E for c in compared]).mean(0)
        return Verdict(
            similarity_TK, judged_TK, conflict_TK, picked_TK, target_TK, consistency_E, occupied_E, counts_4, counts_4[0]
        )


class ConflictTap(torch.autograd.Function):
    """One pass: the identity on a layer's pairs (and weights), and a scalar 0 that stands for the layer's conflict loss.

    When autograd asks for its backward, all that lies above in the layer is done: the hooks at the linears' outputs have
    seen every token gradient, and the ordinary weight gradients are in hand. So the flags are decided there and then, and
    the loss's gradient goes to the logits, times d loss / d scalar: beta, loss scaling and accumulation come out right.
    """

    @staticmethod
    def forward(ctx, judge, logits_TE, x_SD, *weights):
        ctx.judge = judge
        ctx.save_for_backward(logits_TE)
        return logits_TE.new_zeros(()), x_SD.view_as(x_SD), *(w.view_as(w) for w in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, grad_x_SD, *weight_grads):
        with torch.enable_grad():
            logits_TE = ctx.saved_tensors[0].detach().requires_grad_()
            (grad_TE,) = torch.autograd.grad(ctx.judge.close(logits_TE, weight_grads), logits_TE)
        return None, grad_loss * grad_TE, grad_x_SD, *weight_grads


@dataclass
class Record:
    """What one forward of a watched layer leaves for `STGC.loss`. It holds the graph, so it lives there, and not for long."""

    config: STGCConfig
    logits_TE: Tensor  # what the two losses act on
    keep_T: Tensor
    load_E: Tensor
    judge: Judge | None  # None: not judged at this step
    conflict: Tensor | None = None  # one pass: the tap's scalar
    edges: list = field(default_factory=list)  # two passes: where the linears' outputs hang in the graph
    weight_edges: list = field(default_factory=list)

    def enter(self, x_SD: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Before the first linear."""
        if self.judge is None or self.config.passes == "two":
            return x_SD, weights
        tapped = weights if self.config.gradients == "weight" else []
        self.conflict, x_SD, *tapped = ConflictTap.apply(self.judge, self.logits_TE, x_SD, *tapped)
        return x_SD, tapped or weights

    def tap(self, a_SI: Tensor, w_EIO: Tensor, out_SO: Tensor) -> None:
        """At the output of each linear, with its input and weight."""
        if self.judge is None:
            return
        by_weight = self.config.gradients == "weight"
        if not out_SO.requires_grad or (by_weight and not w_EIO.requires_grad):
            raise RuntimeError("no gradient reaches these experts: unfreeze them, or leave the layer out of STGCConfig.layers")
        if by_weight:
            self.judge.inputs.append(a_SI.detach())
            self.weight_edges.append(get_gradient_edge(w_EIO))
        if self.config.passes == "one":
            out_SO.register_hook(partial(self.judge.see, len(self.edges)))
        self.edges.append(get_gradient_edge(out_SO))


# ---- 9. STGC ----


class STGC:
    """Watches the MoE layers of a model, and adds their losses to the main loss. See the five lines at the top.

    Under torch.distributed create it after init_process_group (or Accelerator()): means, flags and losses are then those of
    the global batch, summed through a process group of its own, so that its collectives never mix with DDP's. The newest
    STGC object on a model is the one that counts; `detach()` ends the watch. Raises ValueError where the model has no MoELayer.
    """

    def __init__(self, model: nn.Module, config: STGCConfig = STGCConfig()):
        layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
        if not layers:
            raise ValueError("the model has no stgc.MoELayer: build or convert it first, then create STGC")
        self.config, self.names, self.layers = config, list(layers), list(layers.values())
        chosen = range(len(layers)) if config.layers is None else config.layers
        if not all(0 <= i < len(layers) for i in chosen):
            raise ValueError(f"layers={config.layers} must lie between 0 and {len(layers) - 1}, the model's MoE layers")
        if config.conflict_loss == "reroute" and any(m.top_k == m.experts.num_experts for m in self.layers):
            raise ValueError("conflict_loss='reroute' needs top_k below the number of experts: else no expert is left to go to")
        self.chosen, self.step, self._forward_step = set(chosen), 0, 0
        self.group = dist.new_group() if dist.is_available() and dist.is_initialized() else None
        self.num_processes = dist.get_world_size() if self.group is not None else 1
        self.rank = dist.get_rank() if self.group is not None else 0
        self.verdicts: list[Verdict | None] = [None] * len(layers)  # the latest of each layer
        self._balance: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)  # load and loss, likewise
        self._records: list[Record | None] = [None] * len(layers)
        self._blind: set[int] = set()  # layers that ran without gradients although they train
        for i, layer in enumerate(self.layers):
            layer.watch = partial(self._begin, i)

    def detach(self) -> None:
        """End the watch: the layers run as if there had been none."""
        for i, layer in enumerate(self.layers):
            if getattr(layer.watch, "args", None) == (i,) and layer.watch.func.__self__ is self:
                layer.watch = None

    def state_dict(self) -> dict:
        """What a resumed run needs: the step, which decides `every` and the placebo's draw."""
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.step = int(state["step"])

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        if self.group is None:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def _begin(self, i: int, x_TD: Tensor, routing: Routing, pairs: Pairs, keep_T: Tensor) -> Record | None:
        """A layer's forward begins. Overwrites what an earlier forward left: only the last one before `loss` counts."""
        replay = torch._C._current_graph_task_id() != -1  # inside a backward: gradient checkpointing recomputes the layer
        if not torch.is_grad_enabled():
            if self.layers[i].training:
                self._blind.add(i)
            return None
        if not replay:
            self._forward_step = self.step
        every, config = self.config.every, self.config
        judge = None
        if i in self.chosen and every and self._forward_step % every == 0:
            seed = hash((config.seed, self._forward_step, i, self.rank))
            publish = partial(self.verdicts.__setitem__, i)
            judge = Judge(config, routing.expert_ids_TK, pairs, self._all_reduce, self.num_processes, seed, publish)
        logits_TE = widen(self.layers[i].router(x_TD.detach())) if config.router_only else routing.logits_TE
        record = Record(config, logits_TE, keep_T, pairs.onehot_SE.sum(0), judge)
        if not replay:
            self._records[i] = record
            self._blind.discard(i)
        return record

    def loss(self, main_loss: Tensor, grad_scale: float = 1.0) -> Tensor:
        """L = L_main + alpha * L_bal + beta * L_CEL, PAPER eq. 10; each regulariser averaged over the layers it acts on.

        Call it once after each forward, then backward on what it returns. With two passes the extra backward happens here;
        under fp16 give it the loss scale, since unscaled token gradients underflow. With one pass the value of L_CEL is 0
        here and its gradient comes with the ordinary backward; `stats` has the value after that.
        """
        records = {i: record for i, record in enumerate(self._records) if record is not None}
        self._records = [None] * len(self.layers)
        unseen = sorted(self._blind - records.keys())
        if unseen:
            raise RuntimeError(
                f"MoE layer {self.names[unseen[0]]} ran in training mode without gradients, as reentrant gradient "
                "checkpointing makes it: pass use_reentrant=False (gradient_checkpointing_kwargs in transformers)"
            )
        if not records:
            raise RuntimeError("no forward of the watched layers since the last loss: call the model first, with gradients on")
        judged = [record for record in records.values() if record.judge is not None]
        if judged and self.config.passes == "two":
            self._first_backward(main_loss if grad_scale == 1.0 else main_loss * grad_scale, judged)
        balance = []
        for i, record in records.items():
            load_E = self._all_reduce(record.load_E)
            num_tokens = load_E.sum() / (self.layers[i].top_k * self.num_processes)
            balance.append(balance_loss(record.logits_TE, record.keep_T, load_E, num_tokens).to(main_loss.device))
            self._balance[i] = (load_E, self._all_reduce(balance[-1].detach()) / self.num_processes)
        total = main_loss + self.config.alpha * torch.stack(balance).mean()
        if judged and self.config.conflict_loss != "none":
            conflict = torch.stack([record.conflict.to(main_loss.device) for record in judged]).mean()
            total = total + self.config.beta * conflict
        self.step += 1
        return total

    def _first_backward(self, main_loss: Tensor, judged: list[Record]) -> None:
        """The paper's extra backward (sec. 3.2): activation gradients of the main loss only, no parameter is touched."""
        edges = [edge for record in judged for edge in record.edges + record.weight_edges]
        grads = iter(torch.autograd.grad(main_loss, edges, retain_graph=True, allow_unused=True))
        for record in judged:
            for i, _ in enumerate(record.edges):
                if (grad_SO := next(grads)) is not None:
                    record.judge.see(i, grad_SO)
            record.conflict = record.judge.close(record.logits_TE, [next(grads) for _ in record.weight_edges])

    def stats(self) -> list[dict]:
        """One dict per MoE layer, of the last step (the last judged one for what needs token gradients), as plain numbers.

        layer; load: share of the pairs on each expert, and balance_loss beside its value for even loads; conflict_ratio:
        flagged over all pairs; judged_ratio: pairs with a gradient over all; consistency: mean over the experts in use
        (sec. 4.3), consistency_std over them (population); conflict_loss beside its value for uniform scores.
        """
        rows = []
        for name, layer, balance, verdict in zip(self.names, self.layers, self._balance, self.verdicts):
            row = {"layer": name}
            if balance is not None:
                load_E, loss = balance
                row["load"] = (load_E / load_E.sum().clamp_min(1)).tolist()
                row |= {"balance_loss": loss.item(), "balance_loss_if_even": 1.0}
            if verdict is not None:
                _, conflicts, judged, pairs = verdict.counts_4.tolist()
                consistency_E = [c for c, used in zip(verdict.consistency_E.tolist(), verdict.occupied_E.tolist()) if used]
                mean = sum(consistency_E) / max(len(consistency_E), 1)
                variance = sum((c - mean) ** 2 for c in consistency_E) / max(len(consistency_E), 1)
                row |= {"conflict_ratio": conflicts / max(pairs, 1), "judged_ratio": judged / max(pairs, 1)}
                row |= {"consistency": mean, "consistency_std": variance**0.5}
                if self.config.conflict_loss != "none":
                    E = layer.experts.num_experts
                    uniform = E**-2 if self.config.conflict_loss == "mse" else math.log(E)
                    row |= {"conflict_loss": verdict.loss.item(), "conflict_loss_if_uniform": uniform}
            rows.append(row)
        return rows
