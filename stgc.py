"""STGC: token gradient conflict in Mixture-of-Experts, in one file: the paper, and nothing but the paper.

Paper: Yang et al., ICLR 2025, arXiv:2406.19905; "eq." and "sec." mean it. PAPER: computed here. CHOICE: the paper is silent.
DIFFERS: we knowingly depart. Hook: what stgc_plus.py extends, and what the paper does there. For MoE layers of your own:
`find_conflicts`, `conflict_loss` and `balance_loss` take plain tensors.

  T tokens        K experts per token        S = T*K pairs (token, expert), the unit that is judged
  E experts       D hidden size, F expert ffn size        I, O in and out of a linear, L linears of an expert
  1 Config  2 Router  3 Experts  4 MoE layer  5 Token gradients  6 Conflicts  7 Losses  8 STGC  9 Demo

    stgc = STGC(model, STGCConfig(conflict_loss="ce"))  # finds the MoE layers of the model
    main_loss = model(**batch).loss
    stgc.loss(main_loss).backward()  # main + alpha * balance + beta * conflict, eq. 10
    stgc.stats()  # per layer: conflict ratio, consistency, load, losses
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge


# ---- 1. Config ----
@dataclass(frozen=True)
class STGCConfig:
    """What is done about conflicting tokens. The defaults are the paper's (sec. 4.1); bad values raise ValueError."""

    conflict_loss: str = "ce"  # none | ce (eq. 8, 14) | mse (eq. 13)
    alpha: float = 0.01  # weight of the balance loss, eq. 9
    beta: float = 1.0  # weight of the conflict loss, eq. 10
    tau: float = 0.0  # a pair conflicts when its similarity, in [-1, 1], is below tau
    choices = {"conflict_loss": ("none", "ce", "mse")}

    def __new__(cls, *args, **fields):
        for name in fields.keys() - cls.__dataclass_fields__:
            raise TypeError(f"{cls.__module__}.STGCConfig has no {name}: what goes beyond the paper is in stgc_plus")
        return super().__new__(cls)

    def __post_init__(self):
        for name, allowed in self.choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: use {', '.join(allowed)} (stgc_plus has more)")
        if not all(abs(value) < float("inf") for value in (self.alpha, self.beta, self.tau)):
            raise ValueError(f"alpha={self.alpha}, beta={self.beta} and tau={self.tau} must be finite numbers")


# ---- 2. Router ----
def widen(tensor: Tensor) -> Tensor:  # to at least float32
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Router(nn.Linear):
    """z = W_r x, eq. 5: linear, bias-free, in at least float32 even under autocast. Any module x_TD -> logits_TE will do."""

    def __init__(self, d_model: int, num_experts: int, **factory):
        super().__init__(d_model, num_experts, bias=False, **factory)

    def forward(self, x_TD: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(widen(x_TD), widen(self.weight))


class Routing(NamedTuple):
    logits_TE: Tensor
    weights_TK: Tensor  # of the token's K experts; a pair of weight 0 is not run, judged or counted
    expert_ids_TK: Tensor


def route(router: nn.Module, x_TD: Tensor, top_k: int, normalize: bool = True, scale: float = 1.0) -> Routing:
    """Top-K of p = softmax(z). PAPER eq. 5. CHOICE: the K weights are renormalised to sum to 1, as MoE-LLaVA's. With top_k=1
    they are always 1 then, and the main loss trains no router. Experts that are parts of one FFN need the sum `scale`, K."""
    logits_TE = widen(router(x_TD))
    weights_TK, expert_ids_TK = logits_TE.softmax(-1).topk(top_k, dim=-1)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True) if normalize else weights_TK
    return Routing(logits_TE, scale * weights_TK, expert_ids_TK)


# ---- 3. Experts ----
class Pairs:  # sorted by expert, without a capacity (dropless); those of weight 0, such as padding, come last
    def __init__(self, expert_ids_TK: Tensor, weights_TK: Tensor, num_experts: int):
        self.expert_ids_TK = expert_ids_TK
        ids_S, self.order_S = expert_ids_TK.masked_fill(weights_TK == 0, num_experts).flatten().sort(stable=True)
        self.inverse_S = self.order_S.argsort()
        self.onehot_SE = (ids_S.unsqueeze(1) == torch.arange(num_experts, device=ids_S.device)).to(weights_TK.dtype)
        self.ends_E = self.onehot_SE.sum(0).long().cumsum(0)  # where each expert's pairs end

    def dispatch(self, x_TD: Tensor) -> Tensor:  # x_SD: each pair's token; an embedding's backward has a fixed order
        return F.embedding(self.order_S // self.expert_ids_TK.shape[-1], x_TD)

    def by_token(self, rows_S: Tensor) -> Tensor:  # rows_TK: back in the order of the tokens
        return rows_S.index_select(0, self.inverse_S).unflatten(0, self.expert_ids_TK.shape)

    def combine(self, y_SD: Tensor, weights_TK: Tensor) -> Tensor:  # Hook: y_TD, PAPER eq. 6
        return (self.by_token(y_SD) * weights_TK.unsqueeze(2).to(y_SD.dtype)).sum(1)

    def sums(self, scale_SW: Tensor, rows_SO: Tensor) -> Tensor:  # Hook, as is `dot`: sums_EWO of each expert's scale * row
        return torch.einsum("sw,se,so->ewo", scale_SW, self.onehot_SE.to(rows_SO.dtype), rows_SO)

    def dot(self, rows_SO: Tensor, vectors_EO: Tensor) -> Tensor:  # dot_S: each row with its expert's vector
        return (rows_SO @ vectors_EO.T * self.onehot_SE).sum(1)


class Experts(nn.Module):
    """E feed-forward networks, stacked: act(x W_in) W_out or, gated (SwiGLU), (act(x W_gate) * x W_in) W_out."""

    pairs_type = Pairs

    def __init__(self, num_experts: int, d_model: int, d_ff: int, *, gated=False, bias=True, activation=F.gelu, **factory):
        super().__init__()
        self.num_experts, self.d_model, self.gated, self.activation = num_experts, d_model, gated, activation

        def stacked(wanted, bound, *shape):
            return nn.Parameter(torch.empty(num_experts, *shape, **factory).uniform_(-bound, bound)) if wanted else None

        self.w_gate_EDF = stacked(gated, d_model**-0.5, d_model, d_ff)
        self.b_gate_EF = stacked(gated and bias, d_model**-0.5, d_ff)
        self.w_in_EDF = stacked(True, d_model**-0.5, d_model, d_ff)
        self.b_in_EF = stacked(bias, d_model**-0.5, d_ff)
        self.w_out_EFD = stacked(True, d_ff**-0.5, d_ff, d_model)
        self.b_out_ED = stacked(bias, d_ff**-0.5, d_model)

    @staticmethod
    def product(x_SI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, pairs: Pairs) -> Tensor:
        """Hook: x w[e] + b[e], each row with its own expert e: a loop over experts. Rows of padding are finite, no more."""
        *rows, padding_NI = x_SI.tensor_split(pairs.ends_E.tolist())  # waits for the device
        biases = [None] * len(rows) if b_EO is None else b_EO.unbind(0)
        out = [F.linear(x_NI, w_IO.T, b_O) for x_NI, w_IO, b_O in zip(rows, w_EIO.unbind(0), biases)]
        return torch.cat([*out, out[0].new_zeros(len(padding_NI), w_EIO.shape[2])])

    def forward(self, x_SD: Tensor, pairs: Pairs, step: "LayerStep | None" = None) -> Tensor:
        """y_SD, not yet weighted. `step` sees the linears in this order: [gate,] in, out."""
        weights = [w for w in (self.w_gate_EDF, self.w_in_EDF, self.w_out_EFD) if w is not None]
        if step is not None:
            x_SD, weights = step.on_experts(x_SD, weights)

        def linear(i, a_SI, b_EO):
            out_SO = self.product(a_SI, weights[i], b_EO, pairs)
            return out_SO if step is None else step.on_linear(a_SI, weights[i], out_SO)

        gate_SF = linear(0, x_SD, self.b_gate_EF) if self.gated else None
        h_SF = linear(-2, x_SD, self.b_in_EF)
        a_SF = self.activation(gate_SF) * h_SF if self.gated else self.activation(h_SF)
        return linear(-1, a_SF, self.b_out_ED)


# ---- 4. MoE layer ----
class MoELayer(nn.Module):
    """y = sum over the Top-K experts of w_e * E_e(x). x is (..., D) in any float dtype; mask (...) is False for padding,
    which comes out as zeros. Where only x can be passed, set `layer.mask` for the next forward."""

    def __init__(self, experts: Experts, router: nn.Module | None = None, top_k: int = 2, normalize=True, scale=1.0):
        super().__init__()
        if not 1 <= top_k <= experts.num_experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and the number of experts, {experts.num_experts}")
        like = experts.w_in_EDF
        self.router = router or Router(experts.d_model, experts.num_experts, device=like.device, dtype=like.dtype)
        self.experts, self.top_k, self.normalize, self.scale = experts, top_k, normalize, scale
        self.mask, self.watch = None, None  # an STGC object sets `watch`; without one the layer costs nothing extra

    def routing(self, x_TD: Tensor) -> Routing:
        return route(self.router, x_TD, self.top_k, self.normalize, self.scale)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask, self.mask = self.mask if mask is None else mask, None
        x_TD = x.reshape(-1, x.shape[-1])
        mask = x_TD.new_ones(len(x_TD), dtype=torch.bool) if mask is None else mask
        if mask.is_floating_point() or mask.numel() != len(x_TD):
            error = TypeError if mask.is_floating_point() else ValueError
            raise error(f"mask {tuple(mask.shape)} {mask.dtype} does not fit x {tuple(x.shape)}: give a bool or int each")
        keep_T = mask.reshape(-1).to(torch.bool)
        padding_T1 = ~keep_T.unsqueeze(1)
        x_TD = x_TD.masked_fill(padding_T1, 0.0)  # not even a NaN comes out of padding
        routing = self.routing(x_TD)
        weights_TK = routing.weights_TK.masked_fill(padding_T1, 0.0)
        pairs = self.experts.pairs_type(routing.expert_ids_TK, weights_TK, self.experts.num_experts)
        step = None if self.watch is None else self.watch(x_TD, routing, pairs, keep_T)
        y_TD = pairs.combine(self.experts(pairs.dispatch(x_TD), pairs, step), weights_TK)
        return y_TD.masked_fill(padding_T1, 0.0).reshape(x.shape)

    def __getstate__(self):  # copies and pickles are unwatched: nothing of a graph goes with them
        return self.__dict__ | {"watch": None}


# ---- 5. Token gradients ----
# The gradient of a linear's bias from one pair alone is the gradient of the loss at that linear's output for this pair. So
# eq. 7 and 11 speak of rows of one tensor, also without a bias. At the last linear they contain the factor w_e.
class Compared(NamedTuple):  # the gradients g_n of one linear, with the means of their experts
    cos_S: Tensor
    norm_S: Tensor  # |g_n|
    consistency_E: Tensor  # in [0, 1]
    mean_EO: Tensor  # gbar_e, up to a factor


def scale_rows(rows_SO: Tensor, dim=-1) -> tuple[Tensor, Tensor, Tensor]:
    """rows / 2^n, where no square overflows or vanishes and no digit changes; |rows| then; 2^n. Infinite rows: 0, 0, 0."""
    norm_S1 = torch.linalg.vector_norm(rows_SO, dim=dim, keepdim=True)
    power_S1 = torch.ones_like(norm_S1)
    if rows_SO.is_cuda or rows_SO[((norm_S1 < 1e-10) | ~(norm_S1 < 1e10)).flatten()].any():  # no wait on a GPU
        size_S1 = torch.linalg.vector_norm(rows_SO, 1, dim, keepdim=True)
        power_S1 = (size_S1 / torch.frexp(size_S1).mantissa).nan_to_num(1.0, 0.0) * size_S1.isfinite()
        rows_SO = (rows_SO / power_S1).nan_to_num(0.0, 0.0, 0.0)
        norm_S1 = torch.linalg.vector_norm(rows_SO, dim=dim, keepdim=True)
    return rows_SO, norm_S1.flatten(), power_S1.flatten()


def compare_to_means(grad_SO: Tensor, pairs: Pairs, average: Callable = lambda tensor: tensor) -> Compared:
    """cos(g_n, gbar_e), and consistency: the mean of the cosine matrix of an expert's pairs. `average` is over processes.
    A gradient that is zero or infinite has no direction: its cosine is 0, it adds nothing. The scale of the loss cancels."""
    with torch.autocast(grad_SO.device.type, enabled=False):
        grad_SO, norm_S, power_S = scale_rows(widen(grad_SO.detach()))
        onehot_SE, tiny = pairs.onehot_SE.to(grad_SO.dtype), torch.finfo(grad_SO.dtype).tiny
        alive_S = onehot_SE.sum(1) * (norm_S > 0)
        per_norm_S = alive_S / norm_S.clamp_min(tiny)
        sums_E2O = average(pairs.sums(torch.stack([alive_S * power_S, per_norm_S], dim=1), grad_SO))
        mean_EO, unit_EO = sums_E2O.unbind(1)  # PAPER eq. 7 and 11: gbar_e times N_e, which cancels in a cosine
        cos_S = pairs.dot(grad_SO, F.normalize(scale_rows(mean_EO)[0], dim=-1, eps=tiny)) * per_norm_S
        count_E = average(alive_S @ onehot_SE).clamp_min(tiny)
        consistency_E = (unit_EO / count_E.unsqueeze(1)).square().sum(-1)  # PAPER sec. 4.3: |mean unit vector|^2
    return Compared(cos_S, (norm_S * power_S).masked_fill(power_S == 0, torch.inf), consistency_E, mean_EO)


class LayerStep:
    """One forward of a watched layer: what its losses need, and where its token gradients arrive."""

    def __init__(self, stgc: "STGC", index: int, logits_TE: Tensor, pairs: Pairs, keep_T: Tensor):
        self.stgc, self.index, self.logits_TE, self.pairs, self.keep_T = stgc, index, logits_TE, pairs, keep_T
        self.edges, self.compared = {}, {}  # by linear: its output in the graph, its gradients against their means

    def on_experts(self, x_SD: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Hook, before the first linear."""
        return x_SD, weights

    def on_linear(self, a_SI: Tensor, w_EIO: Tensor, out_SO: Tensor) -> Tensor:
        """Hook, after each linear: the rows of the main loss's gradient here are the token gradients."""
        if not out_SO.requires_grad:
            raise RuntimeError(f"no gradient reaches the experts of {self.stgc.names[self.index]}: unfreeze them")
        self.edges[len(self.edges)] = get_gradient_edge(out_SO)
        return out_SO

    def on_gradient(self, linear: int, grad_SO: Tensor) -> None:
        """Hook: compares the token gradients of a linear with their means."""
        self.compared[linear] = compare_to_means(grad_SO, self.pairs, self.stgc.average)

    def find_conflicts(self) -> "Verdict":
        """Hook: by the gradients of the biases."""
        return flag_conflicts([one for _, one in sorted(self.compared.items())], self.pairs, self.stgc.config.tau)


# ---- 6. Conflicts ----
class Verdict(NamedTuple):  # of one layer at one step, without a graph; pairs in the order of the tokens
    similarity_TK: Tensor  # s_n, eq. 12
    judged_TK: Tensor  # has a gradient, and a finite one
    conflict_TK: Tensor  # judged, and s_n < tau
    cos_TKL: Tensor  # of each linear
    norm_TKL: Tensor
    picked_TK: Tensor  # gets the conflict loss: those in conflict (stgc_plus can pick others)
    target_TK: Tensor  # the expert that the loss names: the pair's own (stgc_plus can name another)


def flag_conflicts(found: list[Compared], pairs: Pairs, tau: float) -> Verdict:
    """The heart of the method. A pair without a gradient, or with an infinite one, is never flagged."""
    cos_LS, norm_LS = (torch.stack(rows) for rows in zip(*((one.cos_S, one.norm_S) for one in found)))
    similarity_S = cos_LS.mean(0)  # PAPER eq. 12: the mean of its linears' cosines
    judged_S = (norm_LS > 0).any(0) & norm_LS.isfinite().all(0) & pairs.onehot_SE.any(1)
    conflict_S = judged_S & (similarity_S < tau)  # PAPER definition 1
    rows = (similarity_S, judged_S, conflict_S, cos_LS.T, norm_LS.T, conflict_S)
    return Verdict(*map(pairs.by_token, rows), pairs.expert_ids_TK)


def find_conflicts(grads: Sequence[Tensor], expert_ids: Tensor, num_experts: int, tau: float = 0.0) -> Verdict:
    """For any MoE layer. grads: the main loss's gradient at the output of each linear of experts, (*expert_ids.shape, O); at
    the last one before the routing weight. expert_ids: any shape, such as (T, K); negative where there is no pair."""
    if (expert_ids >= num_experts).any():
        raise ValueError(f"expert_ids go up to {expert_ids.max()}, but there are {num_experts} experts, counted from 0")
    pairs = Pairs(expert_ids, widen((expert_ids >= 0).to(grads[0].dtype)), num_experts)
    return flag_conflicts([compare_to_means(grad.flatten(0, -2)[pairs.order_S], pairs) for grad in grads], pairs, tau)


# ---- 7. Losses ----
CONFLICT_LOSSES = {  # logits_TE -> each token's loss on each expert
    "ce": lambda logits_TE: -(-logits_TE).log_softmax(-1),  # PAPER eq. 8 and 14: CE(-z_n, e), which lowers z_e
    "mse": lambda logits_TE: logits_TE.softmax(-1).square(),  # PAPER eq. 13: p_{n,e}^2
}


def conflict_loss(logits_TE: Tensor, expert_ids_TK: Tensor, conflict_TK: Tensor, loss="ce", average=None) -> Tensor:
    """Mean loss of the conflicting pairs; 0 without any. loss: as above. average: of their number over processes."""
    logits_TE = logits_TE.masked_fill(~conflict_TK.any(1, keepdim=True), 0.0)
    loss_TE = (loss if callable(loss) else CONFLICT_LOSSES[loss])(logits_TE)
    count = (average or torch.clone)(conflict_TK.sum().to(loss_TE.dtype)).clamp_min(torch.finfo(loss_TE.dtype).tiny)
    return (loss_TE.gather(1, expert_ids_TK.clamp_min(0)) * conflict_TK).sum() / count


def balance_loss(logits_TE: Tensor, load_E: Tensor, keep_T: Tensor | None = None, num_tokens=None) -> Tensor:
    """E * sum_e f_e * P_e, PAPER eq. 9 (Switch Transformer). Even loads give 1. Padding, keep_T False, counts for nothing.
    load_E: the pairs on each expert, of all processes. num_tokens: the tokens, or their mean over processes."""
    keep_T = torch.ones_like(logits_TE[:, 0]) if keep_T is None else keep_T
    logits_TE = logits_TE.masked_fill(keep_T.unsqueeze(1) == 0, 0.0)
    num_tokens = (keep_T.sum() if num_tokens is None else num_tokens).to(logits_TE.dtype)
    score_E = (logits_TE.softmax(-1) * keep_T.unsqueeze(1)).sum(0) / num_tokens.clamp_min(torch.finfo(num_tokens.dtype).tiny)
    return len(load_E) * (F.normalize(load_E.to(logits_TE.dtype), p=1, dim=0) * score_E).sum()


# ---- 8. STGC ----
class STGC:
    """Watches a model's MoE layers and adds their losses. A second one replaces the first. Has their latest `verdicts`."""

    config_type, step_type, losses, group = STGCConfig, LayerStep, CONFLICT_LOSSES, None

    def __init__(self, model: nn.Module, config: STGCConfig = STGCConfig()):
        if type(config) is not self.config_type:
            raise TypeError(f"a {type(config).__module__}.{type(config).__name__} needs stgc_plus.STGC")
        layers = self.find_layers(model)
        self.config, self.names, self.layers = config, list(layers), list(layers.values())
        self.steps: dict[int, LayerStep] = {}  # of the latest forward, until `loss` takes them
        self.verdicts: list[Verdict | None] = [None] * len(layers)
        self.numbers: list[dict[str, Tensor]] = [{} for _ in layers]
        for i, layer in enumerate(self.layers):
            layer.watch = partial(self.on_forward, i)

    def find_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Hook: the layers to watch, by name."""
        layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
        if not layers or (type(self) is STGC and any(type(layer.experts) is not Experts for layer in layers.values())):
            raise ValueError("the model has no stgc.MoELayer, or one with other experts: convert it, or use stgc_plus.STGC")
        return layers

    def average(self, tensor: Tensor) -> Tensor:
        """The mean over the processes, if there are several."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(tensor := tensor / dist.get_world_size(), group=self.group)
        return tensor

    def on_forward(self, i: int, x_TD: Tensor, routing: Routing, pairs: Pairs, keep_T: Tensor) -> LayerStep | None:
        """Hook, when layer i runs: the latest forward counts, unless a backward runs it again (gradient checkpointing)."""
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return None
        self.steps[i] = self.step_type(self, i, routing.logits_TE, pairs, keep_T)
        return self.steps[i]

    def loss(self, main_loss: Tensor) -> Tensor:
        """L_main + alpha * L_bal + beta * L_CEL, PAPER eq. 10; the two are means over layers. Call it after each forward."""
        steps, self.steps = self.steps, {}
        self.check(steps)
        conflict = self.conflict_losses(main_loss, list(steps.values()))
        balance = [self.balance_loss(step).to(main_loss.device) for step in steps.values()]
        total = main_loss + self.config.alpha * torch.stack(balance).mean()
        if conflict and self.config.conflict_loss != "none":
            total = total + self.config.beta * torch.stack([loss.to(main_loss.device) for loss in conflict]).mean()
        return total

    def check(self, steps: dict[int, LayerStep]) -> None:
        """Hook: every layer must have run, and every router must train. stgc_plus can leave some out."""
        for i, name in enumerate(self.names):
            if i not in steps:
                why = "call the model first (another STGC object? use_reentrant=False?), or see stgc_plus"
                raise RuntimeError(f"no forward of {name} to judge: {why}")
            trains = {parameter.requires_grad for parameter in self.layers[i].router.parameters()}
            if self.config.conflict_loss != "none" and trains == {False}:
                raise RuntimeError(f"the router of {name} is frozen: unfreeze it, or see stgc_plus.STGCConfig.layers")

    def conflict_losses(self, main_loss: Tensor, steps: list[LayerStep]) -> list[Tensor]:
        """Hook: an extra backward of the main loss alone (sec. 3.2), to the linears' outputs and to no parameter."""
        edges = {(step, linear): edge for step in steps for linear, edge in step.edges.items()}
        grads = torch.autograd.grad(main_loss, list(edges.values()), retain_graph=True, allow_unused=True)
        for (step, linear), grad in zip(edges, grads):
            if grad is not None:
                step.on_gradient(linear, grad)
        return [self.conflict_loss(step, step.logits_TE) for step in steps]

    def conflict_loss(self, step: LayerStep, logits_TE: Tensor) -> Tensor:
        """After the comparisons in a layer: its flags and statistics, and its loss, differentiable in logits_TE."""
        if step.compared:  # the main loss reaches the layer
            with torch.no_grad():
                verdict = self.verdicts[step.index] = step.find_conflicts()
                self.numbers[step.index] |= self.statistics(step, verdict)
        if self.config.conflict_loss == "none" or not step.compared:
            return logits_TE[:0].sum()
        how = self.losses[self.config.conflict_loss], self.average
        loss = conflict_loss(logits_TE, verdict.target_TK, verdict.picked_TK, *how)
        self.numbers[step.index]["conflict_loss"] = self.average(loss.detach())
        return loss

    def statistics(self, step: LayerStep, verdict: Verdict) -> dict[str, Tensor]:
        """Hook: what the paper reports, over processes. CHOICE: consistency is the mean over linears and used experts."""
        onehot_SE = step.pairs.onehot_SE
        judged_SE, flags_SE = (mask_TK.flatten()[step.pairs.order_S, None] * onehot_SE for mask_TK in verdict[1:3])
        load_E, judged_E, flags_E = step.counts = self.average(torch.stack([onehot_SE, judged_SE, flags_SE]).sum(1))
        consistency_E = torch.stack([one.consistency_E for _, one in sorted(step.compared.items())]).mean(0)
        share_E = F.normalize((judged_E > 0).to(judged_E.dtype), p=1, dim=0)  # of each expert in use
        mean = (share_E * consistency_E).sum()
        std = (share_E * (consistency_E - mean).square()).sum().sqrt()
        return {"conflict_ratio": flags_E.sum() / load_E.sum().clamp_min(1e-9), "consistency": mean, "consistency_std": std}

    def balance_loss(self, step: LayerStep) -> Tensor:
        """Hook: eq. 9, with the loads of the global batch."""
        load_E, num_tokens = self.average(step.pairs.onehot_SE.sum(0)), self.average(step.keep_T.sum().to(step.logits_TE))
        loss = balance_loss(step.logits_TE, load_E, step.keep_T, num_tokens)
        self.numbers[step.index] |= {"load": F.normalize(load_E, p=1, dim=0), "balance_loss": self.average(loss.detach())}
        return loss

    def stats(self) -> list[dict]:
        """Of each layer's last step: load, the share of the pairs on each expert; balance_loss, 1 if even; conflict_ratio,
        flagged over all pairs; consistency, its mean and (population) std over the experts in use; conflict_loss."""
        return [{"layer": name} | {k: v.tolist() for k, v in found.items()} for name, found in zip(self.names, self.numbers)]


# ---- 9. Demo ----
class Demo(nn.Module):
    """Four tasks want different answers to the same content from one small MoE layer, so their tokens conflict."""

    def __init__(self, experts: Experts):
        super().__init__()
        self.answers_IC, self.head, self.moe = torch.randn(12, 4), nn.Linear(16, 4), MoELayer(experts)

    def fit(self, stgc: STGC, optimizer, steps: int, alone=False, keys=("conflict_ratio", "consistency")) -> list[float]:
        """Means over the steps of these statistics and the main loss. alone: without the main loss, as in sec. 4.3."""
        rows = []
        for _ in range(steps):
            task_T, content_TI = torch.randint(4, (256,)), torch.randn(256, 12)
            label_T = ((content_TI @ self.answers_IC).argmax(-1) + task_T) % 4
            x_TD = torch.cat([F.one_hot(task_T, 4), content_TI], dim=1)
            main_loss = F.cross_entropy(self.head(x_TD + self.moe(x_TD)), label_T)
            (stgc.loss(main_loss) - main_loss * alone).backward()
            optimizer.step()
            optimizer.zero_grad()
            rows.append([*(stgc.stats()[0][key] for key in keys), main_loss.item()])
        return torch.tensor(rows).mean(0).tolist()


def demo() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more would only wait for each other
    model, ce_only = Demo(Experts(4, 16, 32)), STGCConfig(alpha=0.0)
    print("mean of 50 steps        conflict ratio  consistency  main loss")
    for title, config, part in ("without STGC", STGCConfig("none"), model), ("router, ce only", ce_only, model.moe.router):
        stgc, optimizer = STGC(model, config), torch.optim.AdamW(part.parameters(), 5e-3)
        for _ in range(4):
            print("{:<24}{:>14.3f}{:>13.3f}{:>11.3f}".format(title, *model.fit(stgc, optimizer, 50, config is ce_only)))
    print("Is that due to the choice of tokens? This cannot show it; compare with random pairs: python stgc_plus.py")


if __name__ == "__main__":
    demo()
