"""STGC: token gradient conflict in Mixture-of-Experts, in one file.

Paper: Yang et al., ICLR 2025, arXiv:2406.19905; "eq." and "sec." always mean it. Three tags keep it and us apart: PAPER (an
equation is computed here), CHOICE (the paper is silent), DIFFERS (we depart from it, knowingly).

  T tokens                    K experts per token       S = T*K pairs (token, expert), the unit that is judged
  E experts in a layer        D hidden size             F expert ffn size            I, O  in and out of one linear

  1 Config  2 Router  3 Experts  4 MoE layer  5 Token gradients  6 Conflicts  7 Losses  8 Taps  9 STGC  10 Demo

    stgc = STGC(model, STGCConfig(conflict_loss="ce"))      # finds the MoE layers of the model
    main_loss = model(**batch).loss
    loss = stgc.loss(main_loss)                             # main + alpha * balance + beta * conflict, eq. 10
    loss.backward()
    stgc.stats()                                            # per layer: conflict ratio, consistency, load, losses
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    passes: str = "two"  # two: an extra backward for the token gradients (paper) | one: the ordinary backward (ours)
    gradients: str = "bias"  # bias: of the (virtual) biases (paper) | weight: of the whole weights (ours)
    select: str = "conflict"  # conflict | random: the placebo, as many pairs drawn at random get the loss
    every: int = 1  # judge the tokens at each k-th call of `loss` only; 0: never, which leaves the balance loss
    layers: tuple[int, ...] | None = None  # which MoE layers to judge, counted from 0; None: all
    router_only: bool | None = None  # both losses train the router, not the features; None: only with one pass
    seed: int = 0  # of the placebo's draw

    def __post_init__(self):
        choices = {"conflict_loss": "none ce mse reroute", "passes": "two one", "gradients": "bias weight"}
        for name, allowed in (choices | {"select": "conflict random"}).items():
            if getattr(self, name) not in allowed.split():
                raise ValueError(f"{name}={getattr(self, name)!r} is none of: {allowed}")
        if not all(math.isfinite(value) for value in (self.alpha, self.beta, self.tau)):
            raise ValueError(f"alpha={self.alpha}, beta={self.beta} and tau={self.tau} must be finite numbers")
        if self.every < (self.conflict_loss != "none"):
            raise ValueError(f"every={self.every} must be at least 1 (or 0, with conflict_loss='none')")
        # DIFFERS: with one pass the gradient that arrives at a layer must be the main loss's alone. So neither loss may
        # reach the features: both act on logits recomputed from x.detach().
        if self.passes == "one" and self.router_only is False:
            raise ValueError("passes='one' needs router_only: in one backward the losses' effect on features is inseparable")
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
    multiplies them: experts that are parts of one FFN add up, so their weights sum to K. With top_k=1 a renormalised weight
    is 1, so the main loss trains no router: turn `normalize` off there.
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

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of each expert, then those of padding. Copies their numbers to the host."""
        ends_E = self.ends_E.tolist()
        return rows.split([end - start for start, end in zip([0, *ends_E], [*ends_E, len(rows)], strict=True)])


def sort_pairs(expert_ids_TK: Tensor, keep_T: Tensor, num_experts: int, dtype: torch.dtype) -> Pairs:
    """Sort the pairs by expert; tokens with keep_T False are padding. Dropless: no expert has a capacity."""
    ids_S, order_S = expert_ids_TK.masked_fill(~keep_T.unsqueeze(1), num_experts).flatten().sort(stable=True)
    experts_E = torch.arange(num_experts, device=ids_S.device)
    onehot_SE = (ids_S.unsqueeze(1) == experts_E).to(dtype)
    return Pairs(order_S, order_S.argsort(), onehot_SE, torch.searchsorted(ids_S, experts_E, right=True))


class Permute(torch.autograd.Function):
    """x[index // copies]; backward gathers and sums up copies: autograd's own would be an index_add, whose atomics add in
    random order."""

    @staticmethod
    def forward(ctx, x, index, inverse, copies=1):
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, index // copies)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.saved_tensors[0])
        return grad if ctx.copies == 1 else grad.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


def matmul_kernel(x_SI: Tensor, w_EIO: Tensor) -> str:
    """How the experts' products are computed, the one place that decides. On CUDA torch has a kernel of its own for bf16 and
    compute capability 9 and 10; elsewhere its grouped_mm is a loop, and waits for the numbers of rows."""
    aligned = all(size * x_SI.element_size() % 16 == 0 for size in w_EIO.shape[1:])
    able, compiled = hasattr(F, "grouped_mm") and aligned and x_SI.dtype != torch.float64, torch.compiler.is_compiling()
    if x_SI.is_cuda:  # torch compiles it for bf16 only. dense: every expert on every row, E times the work
        able = able and torch.cuda.get_device_capability(x_SI.device) >= (8, 0)
        return "grouped_mm" if able and (x_SI.dtype == torch.bfloat16 or not compiled) else "dense"
    # slices: a loop over contiguous rows; for 8 experts and more without biases grouped_mm takes 0.83x to 1.00x its time
    able = able and not compiled and x_SI.device.type == "cpu" and torch.__version__ >= (2, 11)
    return "grouped_mm" if able else "slices"


def grouped_linear(x_SI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, pairs: Pairs) -> Tensor:
    """x @ w[e] + b[e], each row with its own expert e. Rows of padding come out finite, and meaningless."""
    if torch.is_autocast_enabled(x_SI.device.type):
        dtype = torch.get_autocast_dtype(x_SI.device.type)
        x_SI, w_EIO, b_EO = x_SI.to(dtype), w_EIO.to(dtype), None if b_EO is None else b_EO.to(dtype)
    kernel = matmul_kernel(x_SI, w_EIO)
    if kernel == "slices":  # unbind, not w_EIO[e]: each indexing would write a gradient of the full size
        *rows, padding_NI = pairs.split(x_SI)
        biases = [None] * len(rows) if b_EO is None else b_EO.unbind(0)
        out = [F.linear(x_NI, w_IO.T, b_O) for x_NI, w_IO, b_O in zip(rows, w_EIO.unbind(0), biases, strict=True)]
        return torch.cat([*out, x_SI.new_zeros(len(padding_NI), w_EIO.shape[2])])
    onehot_SE = pairs.onehot_SE.to(x_SI.dtype)
    if kernel == "dense":
        out_SO = torch.einsum("si,eio,se->so", x_SI, w_EIO, onehot_SE)
    else:  # rows behind `end` would stay unwritten. On a GPU, which must not wait, padding joins the last expert
        end = len(x_SI) if x_SI.is_cuda else int(pairs.ends_E[-1])
        ends_E = torch.cat([pairs.ends_E[:-1], pairs.ends_E.new_full((1,), end)]).to(torch.int32)
        out_SO = F.grouped_mm(x_SI[:end], w_EIO, offs=ends_E)
        out_SO = out_SO if end == len(x_SI) else F.pad(out_SO, (0, 0, 0, len(x_SI) - end))
    return out_SO if b_EO is None else out_SO + onehot_SE @ b_EO


class Experts(nn.Module):
    """E feed-forward networks as stacked parameters: act(x W_in) W_out or, gated (SwiGLU), (act(x W_gate) * x W_in) W_out.

    `activation` is any elementwise callable; `bias` gives every linear one. Initialised as nn.Linear is.
    """

    def __init__(
        self, num_experts: int, d_model: int, d_ff: int, *, gated=False, bias=True, activation: Callable = F.gelu, **factory
    ):
        super().__init__()
        self.num_experts, self.d_model = num_experts, d_model
        self.gated, self.activation = gated, activation

        def stacked(wanted, fan_in, *shape):
            bound = fan_in**-0.5
            return nn.Parameter(torch.empty(num_experts, *shape, **factory).uniform_(-bound, bound)) if wanted else None

        self.w_gate_EDF = stacked(gated, d_model, d_model, d_ff)
        self.b_gate_EF = stacked(gated and bias, d_model, d_ff)
        self.w_in_EDF = stacked(True, d_model, d_model, d_ff)
        self.b_in_EF = stacked(bias, d_model, d_ff)
        self.w_out_EFD = stacked(True, d_ff, d_ff, d_model)
        self.b_out_ED = stacked(bias, d_ff, d_model)

    def forward(self, x_SD: Tensor, pairs: Pairs, step: "LayerStep | None" = None) -> Tensor:
        """y_SD, not yet weighted. The step of a watched layer taps its linears in this order: [gate,] in, out."""
        weights = [w for w in (self.w_gate_EDF, self.w_in_EDF, self.w_out_EFD) if w is not None]
        if step is not None:
            x_SD, weights = step.enter(x_SD, weights)

        def linear(i, a_SI, b_EO):
            out_SO = grouped_linear(a_SI, weights[i], b_EO, pairs)
            return out_SO if step is None else step.tap(a_SI, weights[i], out_SO)

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
    library's layer that calls us with x alone can set `layer.mask` before; the next forward uses it up. ValueError for a
    top_k that the experts do not allow, and a mask of another size.
    """

    def __init__(self, experts: Experts, router: nn.Module | None = None, top_k: int = 2, normalize=True, scale=1.0):
        super().__init__()
        if not 1 <= top_k <= experts.num_experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and the number of experts, {experts.num_experts}")
        like = experts.w_in_EDF
        self.router = router or Router(experts.d_model, experts.num_experts, device=like.device, dtype=like.dtype)
        self.experts, self.top_k, self.normalize, self.scale = experts, top_k, normalize, scale
        self.mask: Tensor | None = None
        self.watch: Callable | None = None  # set by an STGC object; without one the layer costs nothing extra

    def routing(self, x_TD: Tensor) -> Routing:
        return route(self.router, x_TD, self.top_k, self.normalize, self.scale)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask, self.mask = self.mask if mask is None else mask, None
        x_TD = x.reshape(-1, x.shape[-1])
        keep_T = x_TD.new_ones(len(x_TD), dtype=torch.bool) if mask is None else mask.reshape(-1).to(torch.bool)
        if len(keep_T) != len(x_TD):
            raise ValueError(f"mask {tuple(mask.shape)} does not fit x {tuple(x.shape)}: one entry per token is needed")
        routing = self.routing(x_TD)
        pairs = sort_pairs(routing.expert_ids_TK, keep_T, self.experts.num_experts, routing.logits_TE.dtype)
        step = None if self.watch is None else self.watch(x_TD, routing, pairs, keep_T)
        x_SD = Permute.apply(x_TD, pairs.order_S, pairs.inverse_S, self.top_k)
        y_SD = self.experts(x_SD, pairs, step)
        y_TKD = Permute.apply(y_SD, pairs.inverse_S, pairs.order_S).unflatten(0, (-1, self.top_k))
        weights_TK1 = (routing.weights_TK * keep_T.unsqueeze(1)).unsqueeze(2)
        return (y_TKD * weights_TK1.to(y_TKD.dtype)).sum(1).reshape(x.shape)

    def __getstate__(self):  # copies and pickles are unwatched: nothing of a graph goes with them
        return self.__dict__ | {"watch": None}


# ---- 5. Token gradients ----
#
# The gradient of a linear's bias from one pair alone is the gradient of the loss at that linear's output for this pair. So
# the linear needs no bias, and nothing is computed sample by sample: the rows of one ordinary tensor are what eq. 7 and 11
# speak of. At the last linear it is the gradient before the routing weight, so it contains the factor w_e.


class Compared(NamedTuple):
    """One linear's gradients g_n against the means gbar_e of its experts."""

    cos_S: Tensor  # with the mean of the pair's own expert
    norm_S: Tensor  # |g_n|
    consistency_E: Tensor  # sec. 4.3, in [0, 1]
    direction_EO: Tensor  # gbar_e / |gbar_e|


def compare_to_means(grad_SO: Tensor, pairs: Pairs, all_reduce: Callable = lambda t: t) -> Compared:
    """PAPER eq. 7 and 11; the cosine is one term of eq. 12. A zero gradient has no direction, cosine 0, and adds nothing to
    the sums; the scale of the loss cancels. Consistency is the mean of the cosine matrix of an expert's pairs,
    diagonal included: the squared norm of their mean unit vector. `all_reduce` sums over processes: global means.
    """
    grad_SO = widen(grad_SO.detach())
    onehot_SE, tiny = pairs.onehot_SE.to(grad_SO.dtype), torch.finfo(grad_SO.dtype).tiny
    norm_S, real_S = torch.linalg.vector_norm(grad_SO, dim=-1), onehot_SE.sum(1)
    alive_S = real_S * (norm_S > 0)
    per_norm_S = alive_S / norm_S.clamp_min(tiny)
    scale_S2 = torch.stack([real_S, per_norm_S], dim=1)  # for the sum of gradients, and of unit vectors
    if grad_SO.is_cuda:  # E times the work, but nothing waits for the numbers of rows
        sums_E2O = torch.einsum("sw,se,so->ewo", scale_S2, onehot_SE, grad_SO)
    else:
        rows = zip(pairs.split(scale_S2)[:-1], pairs.split(grad_SO)[:-1], strict=True)
        sums_E2O = torch.stack([scale_N2.T @ grad_NO for scale_N2, grad_NO in rows])
    sum_EO, unit_sum_EO = all_reduce(sums_E2O).unbind(1)
    count_E = all_reduce(alive_S @ onehot_SE).clamp_min(1)
    direction_EO = F.normalize(sum_EO, dim=-1, eps=tiny)
    cos_S = grouped_linear(grad_SO, direction_EO.unsqueeze(2), None, pairs).squeeze(1) * per_norm_S
    return Compared(cos_S, norm_S, (unit_sum_EO / count_E.unsqueeze(1)).square().sum(-1), direction_EO)


def weight_cosine(grad_SO: Tensor, a_SI: Tensor, weight_grad_EIO: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """cos(a_n g_n^T, Gbar_e), and the norm, of the pair's whole weight gradient ("STGC-full", sec. 6.4), never formed.

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
    """What was found in one layer at one step, pairs in the order of the tokens. No graph."""

    similarity_TK: Tensor  # s_n, eq. 12
    judged_TK: Tensor  # has a gradient at all
    conflict_TK: Tensor  # judged, and s_n < tau
    picked_TK: Tensor  # gets the loss: the conflicting pairs, or the placebo's
    target_TK: Tensor  # where "reroute" sends the pair's token; with another loss, its own expert


def draw_placebo(conflict_TK: Tensor, judged_TK: Tensor, seed: int) -> Tensor:
    """As many of the judged pairs as conflict, drawn at random: what the selection itself is worth shows against this."""
    key_TK = torch.rand(judged_TK.shape, generator=torch.Generator().manual_seed(seed)).to(judged_TK.device)
    rank_S = key_TK.masked_fill(~judged_TK, -1.0).flatten().argsort(descending=True).argsort()
    return (rank_S < conflict_TK.sum()).view_as(conflict_TK)


def best_other_expert(gain_TKE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """argmax over the experts e' that the token is not on of cos(g2_n, gbar2_e'), or of that times |g2_n|.

    DIFFERS: the paper leaves the destination open, as a token passes only its own experts. But g2 lives in the hidden space
    that all experts share, so it can be compared with every expert's mean. An expert without tokens has the cosine 0.
    """
    on_TE = torch.zeros_like(gain_TKE[:, 0], dtype=torch.bool).scatter(1, expert_ids_TK, True)
    return gain_TKE.masked_fill(on_TE.unsqueeze(1), -math.inf).argmax(-1)


# ---- 7. Losses ----


def conflict_loss(kind: str, logits_TE: Tensor, target_TK: Tensor, picked_TK: Tensor) -> Tensor:
    """Sum of the picked pairs' losses; no picked pair, no loss and no gradient. target_TK: the pair's expert e_n, or where
    reroute sends it. KeyError for another kind.

    ce: CE(-z_n, e_n), PAPER eq. 8 and 14; its gradient on z is onehot(e_n) - softmax(-z_n): the token leaves e_n.
    mse: p_{n, e_n}^2, PAPER eq. 13. reroute: CE(z_n, target), ours: the token also learns where to go.
    """
    loss_TE = {
        "ce": -(-logits_TE).log_softmax(-1),
        "mse": logits_TE.softmax(-1).square(),
        "reroute": -logits_TE.log_softmax(-1),
    }[kind]
    return (loss_TE.gather(1, target_TK) * picked_TK).sum()


def balance_loss(logits_TE: Tensor, keep_T: Tensor, load_E: Tensor, num_tokens: Tensor) -> Tensor:
    """E * sum_e f_e * P_e, PAPER eq. 9 (Switch Transformer). Even loads give 1. Padding counts for nothing.

    load_E holds the pairs of each expert over all processes, num_tokens the mean number of tokens of one process: data
    parallelism averages the gradients, so the mean of what the processes compute is the global batch's value.
    """
    score_E = (logits_TE.softmax(-1) * keep_T.unsqueeze(1)).sum(0) / num_tokens.clamp_min(1)
    return len(load_E) * (load_E / load_E.sum().clamp_min(1) * score_E).sum()


# ---- 8. Taps ----


class LayerStep:
    """One forward of a watched layer: taps its linears in their order, takes in the token gradients, judges the pairs."""

    def __init__(self, stgc: "STGC", index: int, judged: bool, expert_ids_TK, logits_TE, pairs, keep_T):
        self.stgc, self.index, self.judged, self.config, self.number = stgc, index, judged, stgc.config, stgc.forward_step
        self.expert_ids_TK, self.logits_TE, self.pairs, self.keep_T = expert_ids_TK, logits_TE, pairs, keep_T
        self.whole, self.rerouted = self.config.gradients == "weight", self.config.conflict_loss == "reroute"
        self.inputs, self.splits = [], []  # of each linear
        self.edges = []  # where its outputs (and weights) hang in the graph
        self.compared, self.grads = {}, {}  # linear -> what compare_to_means found, and the gradients if they are needed on

    def enter(self, x_SD: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Before the first linear."""
        if not self.judged or self.config.passes == "two":  # a view's gradient is that of this forward alone
            return x_SD, [w.view_as(w) for w in weights] if self.whole else weights
        # autograd asks only for what something trains: a frozen router's logits may be no such thing, and are measured
        logits_TE = self.logits_TE if self.logits_TE.requires_grad else self.logits_TE.detach().requires_grad_()
        conflict, x_SD, *tapped = ConflictTap.apply(self, logits_TE, x_SD, *(weights if self.whole else []))
        if self.stgc.steps[self.index] is self:  # not where gradient checkpointing computes an earlier forward again
            self.stgc.conflicts[self.index] = conflict
        return x_SD, tapped or weights

    def tap(self, a_SI: Tensor, w_EIO: Tensor, out_SO: Tensor, split: Callable = lambda rows: (rows,)) -> Tensor:
        """At the output of each linear. `split` takes several that are fused into one product apart, by their columns."""
        if self.judged:
            if not (out_SO.requires_grad and (w_EIO.requires_grad or not self.whole)):
                raise RuntimeError("no gradient reaches these experts: unfreeze them or leave them out of STGCConfig.layers")
            if self.config.passes == "one":  # no edges: the graph would hold this object, and this object the graph
                out_SO.register_hook(partial(self.see, len(self.inputs)))
            else:
                self.edges += [get_gradient_edge(tensor) for tensor in (out_SO, w_EIO)[: 1 + self.whole]]
            self.inputs.append(a_SI.detach() if self.whole else None)
            self.splits.append(split)
        return out_SO

    def see(self, linear: int, grad_SO: Tensor) -> None:
        """The gradient of the main loss at the output of a linear: compared at once, and kept only where it is needed on."""
        if not self.judged:  # a later forward came before the loss
            return
        grads = self.splits[linear](grad_SO.detach())
        with torch.no_grad(), torch.autocast(grad_SO.device.type, enabled=False):
            self.compared[linear] = [compare_to_means(grad, self.pairs, self.stgc.all_reduce) for grad in grads]
        self.grads |= {linear: grads} if self.whole or self.rerouted else {}

    def close(self, logits_TE: Tensor, weight_grads: Sequence[Tensor]) -> Tensor:
        """All gradients are in: judges the pairs, and returns the conflict loss, differentiable in logits_TE.

        A layer that the main loss did not reach has no gradients, and is not judged.
        """
        if not self.compared:
            return logits_TE.sum() * 0.0
        with torch.no_grad(), torch.autocast(logits_TE.device.type, enabled=False):
            verdict, num_picked = self.judge(weight_grads)
        self.compared, self.grads = {}, {}  # whoever holds the loss holds this object
        if self.config.conflict_loss == "none":
            return logits_TE.sum() * 0.0
        loss = conflict_loss(self.config.conflict_loss, logits_TE, verdict.target_TK, verdict.picked_TK)
        loss = loss * self.stgc.num_processes / num_picked.clamp_min(1)  # times: data parallelism averages over processes
        self.stgc.numbers[self.index]["conflict_loss"] = self.stgc.all_reduce(loss.detach()) / self.stgc.num_processes
        return loss

    def judge(self, weight_grads: Sequence[Tensor]) -> tuple[Verdict, Tensor]:
        """Flags, statistics, and the number of picked pairs over all processes. PAPER eq. 12 and definition 1."""
        ids_TK, onehot_SE, all_reduce = self.expert_ids_TK, self.pairs.onehot_SE, self.stgc.all_reduce
        found = [one for linear in sorted(self.compared) for one in self.compared[linear]]
        terms = [(one.cos_S, one.norm_S) for one in found]
        if self.whole:
            terms = []
            for i, a_SI in enumerate(self.inputs):
                parts = zip(self.grads[i], self.splits[i](all_reduce(widen(weight_grads[i]))), strict=True)
                terms += [weight_cosine(grad_SO, a_SI, sum_EIO, self.pairs) for grad_SO, sum_EIO in parts]
        cos_LS, norm_LS = (torch.stack(term) for term in zip(*terms, strict=True))
        judged_S = (norm_LS > 0).any(0) & onehot_SE.any(1)  # not padding, whatever the loss does with it

        def by_token(rows_S: Tensor) -> Tensor:
            return rows_S.index_select(0, self.pairs.inverse_S).unflatten(0, ids_TK.shape)

        similarity_TK, judged_TK, target_TK = by_token(cos_LS.mean(0)), by_token(judged_S), ids_TK
        if self.rerouted:  # g2 against every expert's mean
            gain_SE = widen(self.grads[max(self.grads)][-1]) @ found[-1].direction_EO.T
            target_TK = best_other_expert(by_token(gain_SE), ids_TK)
        picked_TK = conflict_TK = judged_TK & (similarity_TK < self.config.tau)
        if self.config.select == "random":
            seed = hash((self.config.seed, self.number, self.index, self.stgc.rank))
            picked_TK = draw_placebo(conflict_TK, judged_TK, seed)
        counts = torch.stack([picked_TK.sum(), conflict_TK.sum(), onehot_SE.sum()]).to(onehot_SE.dtype)
        sums = all_reduce(torch.cat([counts, judged_S.to(onehot_SE.dtype) @ onehot_SE]))
        (num_picked, num_conflicts, num_pairs), judged_E = sums[:3], sums[3:]
        # CHOICE: consistency is that of bias gradients, averaged over the linears and over the experts in use
        used_E, consistency_E = (judged_E > 0).to(sums.dtype), torch.stack([one.consistency_E for one in found]).mean(0)
        share_E = used_E / used_E.sum().clamp_min(1)
        consistency = (share_E * consistency_E).sum()
        self.stgc.numbers[self.index] |= {
            "conflict_ratio": num_conflicts / num_pairs.clamp_min(1),
            "judged_ratio": judged_E.sum() / num_pairs.clamp_min(1),
            "consistency": consistency,
            "consistency_std": (share_E * (consistency_E - consistency).square()).sum().sqrt(),
        }
        verdict = Verdict(similarity_TK, judged_TK, conflict_TK, picked_TK, target_TK)
        self.stgc.verdicts[self.index] = verdict
        return verdict, num_picked


class ConflictTap(torch.autograd.Function):
    """One pass: the identity on a layer's pairs (and weights), and a scalar 0 that stands for the layer's conflict loss.

    When autograd asks for its backward, all that lies above in the layer is done: the hooks at the linears' outputs have
    seen every token gradient, and the ordinary weight gradients are in hand. So the flags are decided there and then, and
    the loss's gradient goes to the logits, times d loss / d scalar: beta, loss scaling and accumulation come out right.
    """

    @staticmethod
    def forward(ctx, step, logits_TE, x_SD, *weights):
        ctx.step = step
        ctx.save_for_backward(logits_TE)
        return logits_TE.new_zeros(()), x_SD.view_as(x_SD), *(w.view_as(w) for w in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, grad_x_SD, *weight_grads):
        with torch.enable_grad():
            logits_TE = ctx.saved_tensors[0].detach().requires_grad_()
            (grad_TE,) = torch.autograd.grad(ctx.step.close(logits_TE, weight_grads), logits_TE)
        return None, grad_loss * grad_TE, grad_x_SD, *weight_grads


# ---- 9. STGC ----


class STGC:
    """Watches the MoE layers of a model, and adds their losses to the main loss: the five lines at the top of this file.

    Under torch.distributed create it after init_process_group (or Accelerator()): means, flags and losses are then those of
    the global batch, summed through a process group of its own, so that its collectives never mix with DDP's; each step has
    to run the same layers on all processes. `verdicts` has each layer's latest Verdict. The newest STGC object on a model is
    the one that counts; `detach()` ends the watch. ValueError for a model without MoE layers, and for `layers` that it has
    not or that cannot reroute; what only a forward shows, a frozen router or experts that no gradient reaches (with whole
    weights: frozen ones), raises RuntimeError there.
    """

    def __init__(self, model: nn.Module, config: STGCConfig = STGCConfig()):
        layers = self.find_layers(model)
        self.config, self.names, self.layers = config, list(layers), list(layers.values())
        self.chosen = set(range(len(layers)) if config.layers is None else config.layers)
        if not self.chosen <= set(range(len(layers))):
            raise ValueError(f"layers={config.layers} must lie between 0 and {len(layers) - 1}, the model's MoE layers")
        if config.conflict_loss == "reroute" and any(
            self.layers[i].top_k == self.layers[i].experts.num_experts for i in self.chosen
        ):
            raise ValueError("conflict_loss='reroute' needs top_k below the number of experts: else no expert is left")
        self.group = dist.new_group() if dist.is_available() and dist.is_initialized() else None
        self.num_processes, self.rank = (self.group.size(), self.group.rank()) if self.group else (1, 0)
        self.step = 0  # losses so far: decides `every` and the placebo's draw; a resumed run sets it
        self.forward_step = 0  # the step that the latest forward belongs to
        self.steps: list[LayerStep | None] = [None] * len(layers)  # these two hold a graph, until `loss` takes them
        self.conflicts: list[Tensor | None] = [None] * len(layers)
        self.verdicts: list[Verdict | None] = [None] * len(layers)
        self.numbers: list[dict[str, Tensor]] = [{} for _ in layers]
        self.blind: set[int] = set()  # layers that ran without gradients although they train
        for i, layer in enumerate(self.layers):
            layer.watch = partial(self.begin, i)

    def find_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers to watch, by name. Another library's are found by a subclass: stgc_hf.py."""
        layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
        if not layers:
            raise ValueError("the model has no stgc.MoELayer: build or convert it first, then create STGC")
        return layers

    def is_watching(self, layer: nn.Module) -> bool:
        return getattr(getattr(layer.watch, "func", None), "__self__", None) is self

    def detach(self) -> None:
        """End the watch: the layers run as if there had been none."""
        for layer in self.layers:
            if self.is_watching(layer):
                layer.watch = None
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, as a new tensor; with one process, the tensor."""
        if self.group is not None:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def begin(self, i: int, x_TD: Tensor, routing: Routing, pairs: Pairs, keep_T: Tensor) -> LayerStep | None:
        """The forward of layer i begins. Overwrites what an earlier forward left: the last one before `loss` counts."""
        replay = torch._C._current_graph_task_id() != -1  # in a backward: gradient checkpointing recomputes the layer
        if not torch.is_grad_enabled():
            self.blind |= {i} if self.layers[i].training else set()
            return None
        if not replay:
            self.forward_step = self.step
        judged = i in self.chosen and self.config.every > 0 and self.forward_step % self.config.every == 0
        logits_TE = widen(self.layers[i].router(x_TD.detach())) if self.config.router_only else routing.logits_TE
        trains = judged and self.config.conflict_loss != "none"
        if trains and not self.router_trains(i, logits_TE):
            raise RuntimeError(
                f"the router of {self.names[i]} is frozen, the conflict loss would teach it nothing: unfreeze it (peft: "
                "modules_to_save=['gate'], or its name here), leave the layer out of STGCConfig.layers, or only measure "
                "(conflict_loss='none')"
            )
        step = LayerStep(self, i, judged, routing.expert_ids_TK, logits_TE, pairs, keep_T)
        if not replay:
            if self.steps[i] is not None:
                self.steps[i].judged = False
            self.steps[i] = step
        return step

    def router_trains(self, i: int, logits_TE: Tensor) -> bool:
        """Whether a loss on these logits teaches layer i's router; one without parameters has nothing to freeze."""
        parameters = list(self.layers[i].router.parameters())
        return not parameters or (logits_TE.requires_grad and any(p.requires_grad for p in parameters))

    def loss(self, main_loss: Tensor, grad_scale: float = 1.0) -> Tensor:
        """L = L_main + alpha * L_bal + beta * L_CEL, PAPER eq. 10; each of the two averaged over the layers it acts on.

        Call it once after each forward, then backward on what it returns. With two passes the extra backward happens here;
        under fp16 give it the loss scale, since unscaled token gradients underflow. With one pass L_CEL is 0 here and its
        gradient comes with the ordinary backward; `stats` has the value after that. RuntimeError without a forward before.
        """
        steps, self.steps = [step for step in self.steps if step is not None], [None] * len(self.layers)
        unseen, self.blind = sorted(self.blind - {step.index for step in steps}), set()
        if unseen:
            raise RuntimeError(
                f"MoE layer {self.names[unseen[0]]} ran in training mode without gradients: call model.eval() before an "
                "evaluation; under gradient checkpointing pass use_reentrant=False (gradient_checkpointing_kwargs)"
            )
        if not steps:
            watched = any(map(self.is_watching, self.layers))
            why = "call the model first, with gradients on" if watched else "detach() or another STGC object ended the watch"
            raise RuntimeError(f"no forward of a watched layer since the last loss: {why}")
        judged = [step for step in steps if step.judged]
        if judged and self.config.passes == "two":
            self.first_backward(main_loss * grad_scale, judged)
        balance = [self.balance(step).to(main_loss.device) for step in steps]
        total = main_loss + self.config.alpha * torch.stack(balance).mean()
        if judged and self.config.conflict_loss != "none":
            conflict = [self.conflicts[step.index].to(main_loss.device) for step in judged]
            total = total + self.config.beta * torch.stack(conflict).mean()
        self.conflicts = [None] * len(self.layers)
        self.step += 1
        return total

    def first_backward(self, main_loss: Tensor, judged: list[LayerStep]) -> None:
        """The paper's extra backward (sec. 3.2): activation gradients of the main loss only, no parameter is touched. Whole
        weights need theirs too, which the ordinary backward then forms again."""
        edges = [edge for step in judged for edge in step.edges]
        all_grads = iter(torch.autograd.grad(main_loss, edges, retain_graph=True, allow_unused=True))
        for step in judged:
            grads = [next(all_grads) for _ in step.edges]
            for linear, grad_SO in enumerate(grads[:: 1 + step.whole]):
                if grad_SO is not None:
                    step.see(linear, grad_SO)
            self.conflicts[step.index] = step.close(step.logits_TE, grads[1::2] if step.whole else [])

    def balance(self, step: LayerStep) -> Tensor:
        load_E = self.all_reduce(step.pairs.onehot_SE.sum(0))
        num_tokens = load_E.sum() / (step.expert_ids_TK.shape[1] * self.num_processes)
        loss = balance_loss(step.logits_TE, step.keep_T, load_E, num_tokens)
        mean = self.all_reduce(loss.detach()) / self.num_processes
        self.numbers[step.index] |= {"load": load_E / load_E.sum().clamp_min(1), "balance_loss": mean}
        return loss

    def stats(self) -> list[dict]:
        """One dict of plain numbers per MoE layer: of the last step, what needs token gradients of the last judged one.

        layer; load: share of the pairs on each expert; balance_loss beside its value for even loads; conflict_ratio: flagged
        over all pairs; judged_ratio: pairs with a gradient over all; consistency (sec. 4.3) as mean and (population)
        standard deviation over the experts in use; conflict_loss beside its value for a uniform router.
        """
        rows = []
        for name, layer, numbers in zip(self.names, self.layers, self.numbers, strict=True):
            size, row = layer.experts.num_experts, {key: value.tolist() for key, value in numbers.items()}
            uniform = size**-2 if self.config.conflict_loss == "mse" else math.log(size)
            row |= {"balance_loss_if_even": 1.0} if "balance_loss" in row else {}
            row |= {"conflict_loss_if_uniform": uniform} if "conflict_loss" in row else {}
            rows.append({"layer": name} | row)
        return rows


# ---- 10. Demo ----


def demo(seed: int = 0) -> None:
    """Four tasks want different answers to the same content, and one small MoE layer serves them all: their tokens conflict.
    All is trained first, then the router on the conflict loss alone, as in the paper's statistical verification."""
    torch.manual_seed(seed)
    tasks, size = 4, 16
    answers_IC, head = torch.randn(size - tasks, tasks), nn.Linear(size, tasks)

    def train(title, moe, config, parameters, steps, lr):
        torch.manual_seed(seed)
        stgc, optimizer, rows = STGC(moe, config), torch.optim.AdamW(parameters, lr), []
        for _ in range(steps):
            task_T = torch.randint(tasks, (256,))
            x_TD = torch.cat([F.one_hot(task_T, tasks), torch.randn(256, size - tasks)], dim=1)
            label_T = ((x_TD[:, tasks:] @ answers_IC).argmax(-1) + task_T) % tasks
            main_loss = F.cross_entropy(head(x_TD + moe(x_TD)), label_T)
            loss = stgc.loss(main_loss)
            (loss if config.conflict_loss == "none" else loss - main_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            rows.append((*(stgc.stats()[0][key] for key in ("conflict_ratio", "consistency")), main_loss.item()))
        print("{:<34}{:>14.3f}{:>13.3f}{:>11.3f}".format(title, *(sum(column) / 10 for column in zip(*rows[-10:]))))

    print(f"{'':<34}conflict ratio  consistency  main loss")
    moe = MoELayer(Experts(4, size, 32))
    train("without STGC: trained", moe, STGCConfig("none"), [*moe.parameters(), *head.parameters()], 200, 3e-3)
    for title, kind, select in (("ce", "ce", "conflict"), ("reroute", "reroute", "conflict"), ("placebo", "ce", "random")):
        moved, config = copy.deepcopy(moe), STGCConfig(kind, alpha=0.0, select=select)
        train(f"then its router on {title} alone", moved, config, moved.router.parameters(), 150, 1e-2)
    print(
        "The main loss is left out of the last three, so it rises. What the placebo, the same loss on as many random "
        "pairs,\nreaches as well is not due to the selection."
    )


if __name__ == "__main__":
    demo()
