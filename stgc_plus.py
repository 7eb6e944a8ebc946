"""What the paper of STGC could not do. stgc.py has its method, and the dimensions in all names; this file extends its hooks.

    from stgc_plus import STGC, STGCConfig    # the same five lines, and more fields:

  passes="one"              the token gradients come with the ordinary backward
  gradients="weight"        gradients of whole weights
  leave_one_out=True        a pair is judged by the mean of the other pairs of its expert
  conflict_loss="reroute"   names the expert where a conflicting token should go
  select="random"           the placebo: the loss goes to as many random pairs
  router_only, every, layers; loss scales of fp16, gradient checkpointing, frozen parts, kernels, its own process group

  1 Config  2 Kernels  3 Whole weights  4 Leave one out  5 Placebo and reroute  6 One pass  7 STGC  8 Demo
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

import stgc
from stgc import Compared, Routing, Verdict, widen


# ---- 1. Config ----
@dataclass(frozen=True)
class STGCConfig(stgc.STGCConfig):
    """The paper's fields and ours; bad values raise ValueError."""

    passes: str = "two"  # two: an extra backward for the token gradients (paper) | one: the ordinary backward
    gradients: str = "bias"  # bias: of the (virtual) biases (paper) | weight: of the whole weights
    select: str = "conflict"  # conflict | random: the placebo, as many pairs drawn at random get the loss
    every: int = 1  # judge the tokens at each k-th call of `loss` only; 0: never, which leaves the balance loss
    layers: tuple[int, ...] | None = None  # which MoE layers to judge, counted from 0; None: all
    router_only: bool | None = None  # both losses train the router, not the features; None: only with one pass
    seed: int = 0  # of the placebo's draw
    leave_one_out: bool = False  # judge a pair by the mean of the other pairs of its expert
    kinds = (*stgc.STGCConfig.kinds, "reroute")

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in {"passes": "two one", "gradients": "bias weight", "select": "conflict random"}.items():
            if getattr(self, name) not in allowed.split():
                raise ValueError(f"{name}={getattr(self, name)!r} is none of: {allowed}")
        if self.every < (self.conflict_loss != "none"):
            raise ValueError(f"every={self.every} must be at least 1 (or 0, with conflict_loss='none')")
        # DIFFERS: with one pass the gradient that arrives at a layer must be the main loss's alone. So neither loss may
        # reach the features: both act on logits recomputed from x.detach().
        if self.passes == "one" and self.router_only is False:
            raise ValueError("passes='one' needs router_only: in one backward the losses' effect on features is inseparable")
        if self.router_only is None:
            object.__setattr__(self, "router_only", self.passes == "one")


# ---- 2. Kernels ----
class Permute(torch.autograd.Function):
    """x[index // copies]. Its backward gathers, and sums up copies; autograd's index_add would add in random order on CUDA."""

    @staticmethod
    def forward(ctx, x, index, inverse, copies=1):
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, index // copies)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.saved_tensors[0])
        return grad if ctx.copies == 1 else grad.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class Pairs(stgc.Pairs):
    """The same results: reproducible and without waiting on CUDA, without E times the work elsewhere."""

    def dispatch(self, x_TD: Tensor) -> Tensor:
        return Permute.apply(x_TD, self.order_S, self.inverse_S, self.expert_ids_TK.shape[-1])

    def by_token(self, rows_S: Tensor) -> Tensor:
        return Permute.apply(rows_S, self.inverse_S, self.order_S).unflatten(0, self.expert_ids_TK.shape)

    def sums(self, scale_SW: Tensor, rows_SO: Tensor) -> Tensor:
        if rows_SO.is_cuda:
            return super().sums(scale_SW, rows_SO)
        scales, rows = (tensor.tensor_split(self.ends_E.tolist())[:-1] for tensor in (scale_SW, rows_SO))
        return torch.stack([scale_NW.T @ rows_NO for scale_NW, rows_NO in zip(scales, rows)])

    def dot(self, rows_SO: Tensor, vectors_EO: Tensor) -> Tensor:
        return grouped_linear(rows_SO, vectors_EO.unsqueeze(2), None, self).squeeze(1)


def matmul_kernel(x_SI: Tensor, w_EIO: Tensor) -> str:
    """Chooses the kernel of the experts' products. On CUDA torch has one for bf16 and compute capability 9 and 10; elsewhere
    its grouped_mm is a loop that waits for the numbers of rows."""
    aligned = all(size * x_SI.element_size() % 16 == 0 for size in w_EIO.shape[1:])
    able, compiled = hasattr(F, "grouped_mm") and aligned and x_SI.dtype != torch.float64, torch.compiler.is_compiling()
    if x_SI.is_cuda:  # torch compiles it for bf16 only. dense: every expert on every row, E times the work
        able = able and torch.cuda.get_device_capability(x_SI.device) >= (8, 0)
        return "grouped_mm" if able and (x_SI.dtype == torch.bfloat16 or not compiled) else "dense"
    # slices: stgc.py's loop; for 8 experts and more without biases grouped_mm takes 0.83x to 1.00x its time
    able = able and not compiled and x_SI.device.type == "cpu" and torch.__version__ >= (2, 11)
    return "grouped_mm" if able else "slices"


def grouped_linear(x_SI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, pairs: stgc.Pairs) -> Tensor:
    """x @ w[e] + b[e], each row with its own expert e. Rows of padding are finite and mean nothing."""
    if torch.is_autocast_enabled(x_SI.device.type):
        dtype = torch.get_autocast_dtype(x_SI.device.type)
        x_SI, w_EIO, b_EO = x_SI.to(dtype), w_EIO.to(dtype), None if b_EO is None else b_EO.to(dtype)
    kernel, onehot_SE = matmul_kernel(x_SI, w_EIO), pairs.onehot_SE.to(x_SI.dtype)
    if kernel == "slices":
        return stgc.Experts.product(x_SI, w_EIO, b_EO, pairs)
    if kernel == "dense":
        out_SO = torch.einsum("si,eio,se->so", x_SI, w_EIO, onehot_SE)
    else:  # rows behind `end` would stay unwritten. A GPU must not wait, so there padding joins the last expert
        end = len(x_SI) if x_SI.is_cuda else int(pairs.ends_E[-1])
        ends_E = torch.cat([pairs.ends_E[:-1], pairs.ends_E.new_full((1,), end)]).to(torch.int32)
        out_SO = F.grouped_mm(x_SI[:end], w_EIO, offs=ends_E)
        out_SO = out_SO if end == len(x_SI) else F.pad(out_SO, (0, 0, 0, len(x_SI) - end))
    return out_SO if b_EO is None else out_SO + onehot_SE @ b_EO


class Experts(stgc.Experts):
    pairs_type, product = Pairs, staticmethod(grouped_linear)


# ---- 3. Whole weights ----
def weight_cosine(grad_SO: Tensor, a_SI: Tensor, sum_EIO: Tensor, pairs: stgc.Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """cos(a_n g_n^T, Gbar_e) of whole weight gradients ("STGC-full", sec. 6.4), |a_n g_n^T|, and the norm of e's sum.

    DIFFERS: the paper could not store them. But <a g^T, G> = a^T G g and |a g^T| = |a| |g|, so one product with the ordinary
    weight gradient G suffices (the ghost norm of differentially private training).
    """
    grad_SO, a_SI, sum_EIO = widen(grad_SO.detach()), widen(a_SI), widen(sum_EIO)
    cos_S = (grouped_linear(a_SI, sum_EIO, None, pairs) * grad_SO).sum(-1)
    grad_norm_S, a_norm_S = (torch.linalg.vector_norm(rows, dim=-1) for rows in (grad_SO, a_SI))
    sum_norm_S = pairs.onehot_SE.to(cos_S.dtype) @ torch.linalg.vector_norm(sum_EIO, dim=(1, 2))
    for norm_S in (grad_norm_S, a_norm_S, sum_norm_S):
        cos_S = cos_S / norm_S.clamp_min(torch.finfo(norm_S.dtype).tiny)  # one by one: their product may underflow
    return cos_S, grad_norm_S * a_norm_S, sum_norm_S


# ---- 4. Leave one out ----
# A pair is part of its own mean, so chance alone keeps the conflict ratio below one half. DIFFERS: judged by the others,
# cos(g_n, G_e - g_n) follows from cos(g_n, G_e) and the two lengths, without a further product of matrices.
def others_cosine(cos_S: Tensor, norm_S: Tensor, sum_norm_S: Tensor) -> tuple[Tensor, Tensor]:
    """cos(g_n, G_e - g_n), and |G_e - g_n|^2 in units of the longer of both; where that is small, digits were lost."""
    tiny, longer_S = torch.finfo(norm_S.dtype).tiny, torch.maximum(norm_S, sum_norm_S)
    g_S, sum_S = norm_S / longer_S.clamp_min(tiny), sum_norm_S / longer_S.clamp_min(tiny)
    rest_S = (sum_S.square() - 2 * cos_S * g_S * sum_S + g_S.square()).clamp_min(tiny)
    return ((cos_S * sum_S - g_S) / rest_S.sqrt()).clamp(-1, 1), rest_S


def compare_to_others(grad_SO: Tensor, one: Compared, pairs: stgc.Pairs, over: "STGC") -> Compared:
    """The cosine with the others; length 0 for a pair without others. An expert's longest gradient may outweigh the others, and
    G_e - g_n lose their digits: for that pair (if it is the only longest) the others are summed up on their own."""
    grad_SO, norm_S = widen(grad_SO), one.norm_S
    onehot_SE, top_E = pairs.onehot_SE.to(norm_S.dtype), (norm_S.unsqueeze(1) * pairs.onehot_SE).amax(0)
    if over.group is not None:
        dist.all_reduce(top_E, dist.ReduceOp.MAX, group=over.group)
    longest_S = onehot_SE.any(1) & (norm_S == onehot_SE @ top_E)
    alive_E, longest_E = over.total(torch.stack([norm_S > 0, longest_S]).to(norm_S.dtype) @ onehot_SE)
    rest_EO = over.total(pairs.sums((onehot_SE.sum(1) * ~longest_S).unsqueeze(1), grad_SO)).squeeze(1)
    cos_E = F.cosine_similarity(grad_SO[(longest_S.unsqueeze(1) * onehot_SE).argmax(0)], rest_EO, eps=torch.finfo(rest_EO.dtype).tiny)
    cos_S, _ = others_cosine(one.cos_S, norm_S, onehot_SE @ torch.linalg.vector_norm(one.mean_EO, dim=1) * over.num_processes)
    cos_S = torch.where(longest_S & (onehot_SE @ longest_E == 1), onehot_SE @ cos_E, cos_S)
    return one._replace(cos_S=cos_S, norm_S=norm_S * (onehot_SE @ alive_E > 1))


# ---- 5. Placebo and reroute ----
CONFLICT_LOSSES = stgc.CONFLICT_LOSSES | {"reroute": lambda logits_TE: -logits_TE.log_softmax(-1)}  # CE(z_n, target)


def draw_placebo(conflict_TK: Tensor, judged_TK: Tensor, seed: int) -> Tensor:
    """As many of the judged pairs as conflict, drawn at random: the comparison that shows what the selection is worth."""
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


# ---- 6. One pass ----
class ConflictTap(torch.autograd.Function):
    """The identity on a layer's pairs (and weights), and a scalar 0 that stands for the layer's conflict loss.

    When autograd asks for its backward, all that lies above in the layer is done: the hooks at the linears' outputs have
    seen every token gradient, and the ordinary weight gradients are there. So the flags are decided now, and the loss's
    gradient goes to the logits, times d loss / d scalar: beta, loss scaling and accumulation come out right.
    """

    @staticmethod
    def forward(ctx, step, logits_TE, x_SD, *weights):
        ctx.step = step
        ctx.save_for_backward(logits_TE)
        return logits_TE.new_zeros(()), x_SD.view_as(x_SD), *(w.view_as(w) for w in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, grad_x_SD, *weight_grads):
        ctx.step.weight_grads = dict(zip(ctx.step.linears, weight_grads))
        with torch.enable_grad():
            logits_TE = ctx.saved_tensors[0].detach().requires_grad_()
            (grad_TE,) = torch.autograd.grad(ctx.step.stgc.conflict_loss(ctx.step, logits_TE), logits_TE)
        return None, grad_loss * grad_TE, grad_x_SD, *weight_grads


class LayerStep(stgc.LayerStep):
    """One forward of a watched layer, judged or not, with one pass or two, of biases or weights."""

    def __init__(self, stgc: "STGC", index: int, logits_TE: Tensor, pairs: stgc.Pairs, keep_T: Tensor):
        super().__init__(stgc, index, logits_TE, pairs, keep_T)
        self.config, self.number, self.judged = stgc.config, stgc.forward_step, stgc.judges(index)
        self.whole, self.one_pass = self.config.gradients == "weight", self.config.passes == "one"
        self.linears: dict[int, tuple] = {}  # input (for whole weights), and how to separate the linear
        self.by_others: dict[tuple, Compared] = {}
        self.grads, self.weight_grads = {}, {}  # by linear, only if they are needed later

    def on_experts(self, x_SD: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if not self.judged or not self.one_pass:  # a view's gradient is that of this forward alone
            return x_SD, [w.view_as(w) for w in weights] if self.whole and self.judged else weights
        # a frozen router's logits need no gradient: detached ones let the tap run, so that the layer is still measured
        logits_TE = self.logits_TE if self.logits_TE.requires_grad else self.logits_TE.detach().requires_grad_()
        placeholder, x_SD, *tapped = ConflictTap.apply(self, logits_TE, x_SD, *(weights if self.whole else []))
        if self.stgc.steps.get(self.index) is self:  # not where gradient checkpointing computes an earlier forward again
            self.stgc.placeholders[self.index] = placeholder
        return x_SD, tapped or weights

    def on_linear(self, a_SI: Tensor, w_EIO: Tensor, out_SO: Tensor, split: Callable = lambda rows: (rows,)) -> Tensor:
        """`split` separates linears that are fused into one product, by its columns."""
        if not self.judged:
            return out_SO
        if not (out_SO.requires_grad and (w_EIO.requires_grad or not self.whole)):
            raise RuntimeError("no gradient reaches these experts: unfreeze them or leave them out of STGCConfig.layers")
        linear = len(self.edges) or len(self.linears)
        self.linears[linear] = a_SI.detach() if self.whole else None, split
        if self.one_pass:  # no edge: it would make a cycle of this object and the graph
            out_SO.register_hook(partial(self.on_gradient, linear))
            return out_SO
        super().on_linear(a_SI, w_EIO, out_SO)
        self.edges |= {-1 - linear: get_gradient_edge(w_EIO)} if self.whole else {}
        return out_SO

    def on_gradient(self, linear: int, grad_SO: Tensor) -> None:
        if not self.judged:  # a later forward came before the loss
            return
        if linear < 0:  # an edge of a weight
            self.weight_grads[-1 - linear] = grad_SO
            return
        grads = self.linears[linear][1](grad_SO.detach())
        self.grads |= {linear: grads} if self.whole or self.config.conflict_loss == "reroute" else {}
        with torch.no_grad(), torch.autocast(grad_SO.device.type, enabled=False):
            for key, grad in [((linear, part), grad) for part, grad in enumerate(grads)]:
                super().on_gradient(key, grad)
                self.by_others[key] = compare_to_others(grad, self.compared[key], self.pairs, self.stgc)

    def judge(self) -> Verdict:
        with torch.autocast(self.logits_TE.device.type, enabled=False):
            for linear, (a_SI, split) in self.linears.items() if self.whole else ():
                sums = split(self.stgc.total(widen(self.weight_grads[linear])))
                for part, (grad_SO, sum_EIO) in enumerate(zip(self.grads[linear], sums)):
                    cos_S, norm_S, sum_norm_S = weight_cosine(grad_SO, a_SI, sum_EIO, self.pairs)
                    others_S, rest_S = others_cosine(cos_S, norm_S, sum_norm_S)
                    one, known_S = self.compared[linear, part], rest_S > torch.finfo(rest_S.dtype).eps ** 0.5
                    self.compared[linear, part] = one._replace(cos_S=cos_S, norm_S=norm_S)
                    self.by_others[linear, part] = one._replace(cos_S=others_S, norm_S=norm_S * known_S)
            self.compared = self.by_others if self.config.leave_one_out else self.compared
            verdict = super().judge()
            if self.config.conflict_loss == "reroute":  # g2 with every expert's mean
                mean_EO = self.compared[max(self.compared)].mean_EO
                direction_EO = F.normalize(mean_EO, dim=-1, eps=torch.finfo(mean_EO.dtype).tiny)
                gain_TKE = self.pairs.by_token(widen(self.grads[max(self.grads)][-1]) @ direction_EO.T)
                verdict = verdict._replace(target_TK=best_other_expert(gain_TKE, verdict.target_TK))
            if self.config.select == "random":
                seed = hash((self.config.seed, self.number, self.index, self.stgc.rank))
                verdict = verdict._replace(picked_TK=draw_placebo(verdict.conflict_TK, verdict.judged_TK, seed))
        return verdict


# ---- 7. STGC ----
class STGC(stgc.STGC):
    """stgc.STGC with these fields, on layers of both files; a stgc.STGCConfig is one without extensions.

    With several processes create it after init_process_group (or Accelerator()): it sums through a process group of its own,
    so that its collectives never mix with DDP's; each step has to run the same layers on all processes. Raises ValueError for
    `layers` that the model does not have or that cannot reroute; in a forward RuntimeError for a frozen router (unless the
    loss is "none") and for experts that no gradient reaches (with whole weights: frozen ones).
    """

    config_type, step_type, losses = STGCConfig, LayerStep, CONFLICT_LOSSES

    def __init__(self, model: nn.Module, config: stgc.STGCConfig = STGCConfig()):
        config = STGCConfig(**vars(config)) if type(config) is stgc.STGCConfig else config
        layers = list(self.find_layers(model).values())
        self.chosen = set(range(len(layers)) if config.layers is None else config.layers)
        if not self.chosen <= set(range(len(layers))):
            raise ValueError(f"layers={config.layers} must lie between 0 and {len(layers) - 1}, the model's MoE layers")
        if config.conflict_loss == "reroute" and any(layers[i].top_k == layers[i].experts.num_experts for i in self.chosen):
            raise ValueError("conflict_loss='reroute' needs top_k below the number of experts: else no expert is left")
        super().__init__(model, config)
        self.group = dist.new_group() if dist.is_available() and dist.is_initialized() else None
        self.num_processes, self.rank = (self.group.size(), self.group.rank()) if self.group else (1, 0)
        self.step = 0  # losses so far: decides `every` and the placebo's draw; a resumed run sets it
        self.forward_step = 0  # the step that the latest forward belongs to
        self.grad_scale = 1.0
        self.placeholders: dict[int, Tensor] = {}  # of one pass, until `loss` takes them
        self.blind: set[int] = set()  # layers that ran without gradients although they train

    def detach(self) -> None:
        super().detach()
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def average(self, tensor: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(tensor := tensor / self.num_processes, group=self.group)
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        return self.average(tensor) * self.num_processes

    def judges(self, i: int) -> bool:
        """Whether layer i is judged at the step of the latest forward."""
        return i in self.chosen and self.config.every > 0 and self.forward_step % self.config.every == 0

    def router_trains(self, i: int, logits_TE: Tensor) -> bool:
        """Whether a loss on these logits teaches layer i's router; one without parameters has nothing to freeze."""
        parameters = list(self.layers[i].router.parameters())
        return not parameters or (logits_TE.requires_grad and any(p.requires_grad for p in parameters))

    def on_forward(self, i: int, x_TD: Tensor, routing: Routing, pairs: stgc.Pairs, keep_T: Tensor) -> LayerStep | None:
        if not torch.is_grad_enabled():
            self.blind |= {i} if self.layers[i].training else set()
            return None
        replayed = torch._C._current_graph_task_id() != -1  # by gradient checkpointing, in a backward
        self.forward_step = self.forward_step if replayed else self.step
        if self.config.router_only:
            routing = routing._replace(logits_TE=widen(self.layers[i].router(x_TD.detach())))
        if self.judges(i) and self.config.conflict_loss != "none" and not self.router_trains(i, routing.logits_TE):
            raise RuntimeError(
                f"the router of {self.names[i]} is frozen, the conflict loss would teach it nothing: unfreeze it (peft: "
                "modules_to_save=['gate'], or its name here), leave the layer out of STGCConfig.layers, or only measure "
                "(conflict_loss='none')"
            )
        if replayed:  # one pass saves tensors here, as it did in the forward
            return self.step_type(self, i, routing.logits_TE, pairs, keep_T)
        if i in self.steps:
            self.steps[i].judged = False
        return super().on_forward(i, x_TD, routing, pairs, keep_T)

    def check(self, steps: dict[int, LayerStep]) -> None:
        """Some layers may not have run, but none without gradients."""
        unseen, self.blind = sorted(self.blind - steps.keys()), set()
        if unseen:
            raise RuntimeError(
                f"MoE layer {self.names[unseen[0]]} ran in training mode without gradients: call model.eval() before an "
                "evaluation; under gradient checkpointing pass use_reentrant=False (gradient_checkpointing_kwargs)"
            )
        if not steps:
            super().check(steps)

    def loss(self, main_loss: Tensor, grad_scale: float = 1.0) -> Tensor:
        """As in stgc.STGC. Under fp16 give two passes the loss scale, since unscaled token gradients underflow. With one pass
        L_CEL is 0 here, and its gradient comes with the ordinary backward; `stats` has the value after that."""
        self.grad_scale = grad_scale
        total = super().loss(main_loss)
        self.placeholders = {}
        self.step += 1
        return total

    def conflict_losses(self, main_loss: Tensor, steps: list[LayerStep]) -> list[Tensor]:
        judged = [step for step in steps if step.judged]
        if self.config.passes == "one":
            return [self.placeholders[step.index] for step in judged]
        return super().conflict_losses(main_loss * self.grad_scale, judged) if judged else []

    def conflict_loss(self, step: LayerStep, logits_TE: Tensor) -> Tensor:
        loss = super().conflict_loss(step, logits_TE)
        step.compared, step.by_others, step.grads = {}, {}, {}  # frees memory: the loss still references the step
        return loss

    def statistics(self, step: LayerStep, verdict: Verdict) -> dict[str, Tensor]:
        """Also judged_ratio, pairs with a gradient over all; consistency_by_chance, the mean of 1/N_e: the consistency of
        unrelated gradients, whose cosine matrices have but a diagonal; conflict_ratio_others, without pairs that have none."""
        onehot_SE = step.pairs.onehot_SE
        others = stgc.judge_pairs([one for _, one in sorted(step.by_others.items())], step.pairs, self.config.tau)
        judged_E = self.total(verdict.judged_TK.flatten()[step.pairs.order_S].to(onehot_SE.dtype) @ onehot_SE)
        counts = torch.stack([onehot_SE.sum(), (verdict.judged_TK & ~others.judged_TK).sum(), others.conflict_TK.sum()])
        num_pairs, num_alone, num_conflicts = self.total(counts)
        used_E = (judged_E > 0).to(judged_E.dtype)
        return super().statistics(step, verdict) | {
            "judged_ratio": judged_E.sum() / num_pairs.clamp_min(1),
            "consistency_by_chance": (used_E / judged_E.clamp_min(1)).sum() / used_E.sum().clamp_min(1),
            "conflict_ratio_others": num_conflicts / (num_pairs - num_alone).clamp_min(1),
        }

    def stats(self) -> list[dict]:
        """Also what balance loss and conflict loss are for even loads and a uniform router."""
        rows = super().stats()
        for row in rows:
            row |= {"balance_loss_if_even": 1.0} if "balance_loss" in row else {}
            if "conflict_loss" in row:
                uniform_1E = self.losses[self.config.conflict_loss](torch.zeros(1, len(row["load"]), dtype=torch.float64))
                row["conflict_loss_if_uniform"] = uniform_1E[0, 0].item()
        return rows


# ---- 8. Demo ----
def demo() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    keys = ("conflict_ratio", "conflict_ratio_others", "consistency")
    row = "{:<38}" + "{:>10.3f}" * 4
    print(f"{'mean of the last 50 steps':<38}{'conflicts':>10}{'by others':>10}{'consistent':>11}{'main loss':>9}")
    model = stgc.Demo(Experts(4, 16, 32))
    found = model.fit(STGC(model, STGCConfig("none")), torch.optim.AdamW(model.parameters(), 5e-3), 200, keys)
    print(row.format("all, without STGC", *found))
    for title, config in {
        "router only, the paper's loss": STGCConfig(alpha=0.0),
        "router only, random pairs": STGCConfig(alpha=0.0, select="random"),
        "router only, reroute": STGCConfig("reroute", alpha=0.0),
        "router only, the paper's, in one pass": STGCConfig(alpha=0.0, passes="one"),
    }.items():
        twin = copy.deepcopy(model)
        trainer, optimizer = STGC(twin, config), torch.optim.AdamW(twin.moe.router.parameters(), 5e-3)
        twin.fit(trainer, optimizer, 150)
        print(row.format(title, *twin.fit(trainer, optimizer, 50, keys)))
    print("What random pairs reach as well is not due to the selection; and mind the main loss, which is not trained here.")


if __name__ == "__main__":
    demo()
