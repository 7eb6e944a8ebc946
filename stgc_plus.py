"""What the paper of STGC could not do: an extension of stgc.py, which has the method and the names of dimensions.

1 Config  2 Kernels  3 Whole weights  4 Leave one out  5 Placebo and reroute  6 One pass  7 STGC  8 Demo
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import stgc
from stgc import Compared, get_gradient_edge, scale_rows, widen


# ---- 1. Config ----
@dataclass(frozen=True)
class STGCConfig(stgc.STGCConfig):  # bad values raise ValueError
    passes: str = "two"  # two: an extra backward for the token gradients (paper) | one: the ordinary backward
    gradients: str = "bias"  # bias: of the (virtual) biases (paper) | weight: of whole weights
    select: str = "conflict"  # conflict | random: the placebo, as many by dice | all: no extra backward
    every: int = 1  # judge the tokens at each k-th call of `loss` only; 0: never
    layers: tuple[int, ...] | None = None  # MoE layers to judge, counted from 0; None: all
    router_only: bool | None = None  # both losses train the router, not the features; None: only with one pass
    seed: int = 0  # of the placebo's draw
    leave_one_out: bool = False  # judge a pair by the mean of the other pairs of its expert
    choices = {"conflict_loss": ("none", "ce", "mse", "reroute"), "passes": ("two", "one"), "gradients": ("bias", "weight")}
    choices["select"] = ("conflict", "random", "all")

    def __post_init__(self):
        super().__post_init__()
        if self.leave_one_out and self.gradients == "weight":
            raise ValueError("leave_one_out needs gradients='bias': a weight gradient has no sum without the pair")
        if self.select == "all" and {self.gradients, self.conflict_loss, self.leave_one_out} - {"bias", "ce", "mse", False}:
            raise ValueError("select='all' reads no gradients: not with 'none', 'weight', 'reroute', leave_one_out")
        if self.every < (self.conflict_loss != "none"):
            raise ValueError(f"every={self.every} must be at least 1 (0 with conflict_loss='none')")
        # DIFFERS: with one pass only the main loss may send gradients down. So both losses act on router(x.detach()).
        if self.passes == "one" and self.router_only is False:
            raise ValueError("passes='one' needs router_only: one backward cannot tell the losses' gradients apart")
        object.__setattr__(self, "router_only", self.passes == "one" if self.router_only is None else self.router_only)


# ---- 2. Kernels ----
class Pairs(stgc.Pairs):
    def sums(self, scale_SW, rows_SO):
        if rows_SO.is_cuda:
            return super().sums(scale_SW, rows_SO)
        slices = zip(*(rows.tensor_split(self.ends_E.tolist())[:-1] for rows in (scale_SW, rows_SO)))
        return torch.stack([scale_NW.T @ rows_NO for scale_NW, rows_NO in slices])

    def dot(self, rows_SO, vectors_EO):
        return grouped_linear(rows_SO, vectors_EO.unsqueeze(2), None, self).squeeze(1)

    def combine(self, y_SD, w_TK):  # without a tensor of all pairs between
        if y_SD.device.type != "cpu":
            return super().combine(y_SD, w_TK)
        return F.embedding_bag(self.inverse_S.view_as(w_TK), y_SD, mode="sum", per_sample_weights=w_TK.to(y_SD.dtype))


def matmul_kernel(x_SI: Tensor, w_EIO: Tensor) -> str:
    """torch's grouped_mm where it can; else stgc.py's loop over slices or, on a GPU, as that waits, dense products."""
    aligned = all(size * x_SI.element_size() % 16 == 0 for size in w_EIO.shape[1:])
    able, compiled = hasattr(F, "grouped_mm") and aligned and x_SI.dtype != torch.float64, torch.compiler.is_compiling()
    if x_SI.is_cuda:  # it is compiled for bf16 only
        able = able and torch.cuda.get_device_capability(x_SI.device) >= (8, 0)
        return "grouped_mm" if able and (x_SI.dtype == torch.bfloat16 or not compiled) else "dense"
    able = able and x_SI.device.type == "cpu" and torch.__version__ >= (2, 11)
    return "grouped_mm" if able and not compiled else "slices"


def grouped_linear(x_SI: Tensor, w_EIO: Tensor, b_EO: Tensor | None, pairs: stgc.Pairs) -> Tensor:
    """x w[e] + b[e], each row with its own expert e. Rows of padding are finite but mean nothing."""
    if torch.is_autocast_enabled(x_SI.device.type):
        x_SI, w_EIO, b_EO = (t if t is None else t.to(torch.get_autocast_dtype(t.device.type)) for t in (x_SI, w_EIO, b_EO))
    kernel, onehot_SE = matmul_kernel(x_SI, w_EIO), pairs.onehot_SE.to(x_SI.dtype)
    if kernel == "slices":
        return stgc.Experts.product(x_SI, w_EIO, b_EO, pairs)
    if kernel == "dense":  # every expert on every row
        out_SO = torch.einsum("si,eio,se->so", x_SI, w_EIO, onehot_SE)
    else:  # rows behind `end` would stay unwritten; on a GPU padding joins the last expert
        end = len(x_SI) if x_SI.is_cuda else int(pairs.ends_E[-1])
        ends_E = torch.cat([pairs.ends_E[:-1], pairs.ends_E.new_full((1,), end)]).to(torch.int32)
        out_SO = F.grouped_mm(x_SI[:end], w_EIO, offs=ends_E)
        out_SO = out_SO if end == len(x_SI) else F.pad(out_SO, (0, 0, 0, len(x_SI) - end))
    return out_SO if b_EO is None else out_SO.addmm_(onehot_SE, b_EO)


class Experts(stgc.Experts):
    pairs_type, product = Pairs, staticmethod(grouped_linear)


# ---- 3. Whole weights ----
def weight_cosine(grad_SO: Tensor, a_SI: Tensor, sum_EIO: Tensor, pairs: stgc.Pairs) -> tuple[Tensor, Tensor]:
    """cos(a_n g_n^T, G_e) of whole weights ("STGC-full", sec. 6.4), and |a_n g_n^T|. DIFFERS: nothing is stored, since
    <a g^T, G> = a^T G g and |a g^T| = |a| |g|. An infinite pair leaves its whole expert out."""
    grad_SO, grad_norm_S, grad_power_S = scale_rows(widen(grad_SO))
    a_SI, a_norm_S, a_power_S = scale_rows(widen(a_SI))
    sum_EIO, *sums_E = scale_rows(widen(sum_EIO), dim=(1, 2))
    sum_norm_S, sum_power_S = (pairs.onehot_SE.to(sum_EIO.dtype) @ torch.stack(sums_E, dim=1)).unbind(1)
    cos_S = (grouped_linear(a_SI, sum_EIO, None, pairs) * grad_SO).sum(-1)
    for norm_S in (grad_norm_S, a_norm_S, sum_norm_S):  # one by one: their product may underflow
        cos_S = cos_S / norm_S.clamp_min(torch.finfo(norm_S.dtype).tiny)
    norm_S = grad_norm_S * grad_power_S * a_norm_S * a_power_S / (sum_power_S > 0)
    return cos_S.masked_fill(sum_norm_S == 0, 0.0), norm_S


# ---- 4. Leave one out ----
def compare_to_others(grad_SO: Tensor, one: Compared, pairs: stgc.Pairs, over: "STGC") -> Compared:
    """DIFFERS: by the mean of the other pairs: cos(g_n, G_e - g_n) follows from cos(g_n, G_e) and two lengths. Where an
    expert's longest gradient hides the others' digits, they are summed up again, without it. Alone it has length 0."""
    grad_SO, finite_S = widen(grad_SO), one.norm_S.isfinite()
    if grad_SO.is_cuda or not finite_S.all():  # those left out
        grad_SO = torch.where(finite_S.unsqueeze(1), grad_SO, 0.0)
    onehot_SE, tiny = pairs.onehot_SE.to(grad_SO.dtype), torch.finfo(grad_SO.dtype).tiny
    _, sum_norm_E, sum_power_E = scale_rows(one.mean_EO * over.num_processes)
    sum_S, norm_S = onehot_SE @ (sum_norm_E * sum_power_E), one.norm_S.masked_fill(~finite_S, 0.0)
    along_S = one.cos_S - (norm_S / sum_S.clamp_min(tiny)).clamp_max(1e18)  # (G_e - g_n) / |G_e|, along g_n
    cos_S = along_S / torch.hypot(along_S, (1 - one.cos_S.square()).clamp_min(0).sqrt()).clamp_min(tiny)
    index_E = (norm_S.unsqueeze(1) * onehot_SE).argmax(0)
    longest_SE = onehot_SE * (torch.arange(len(cos_S), device=cos_S.device).unsqueeze(1) == index_E)
    longest_EO = grad_SO[index_E] * longest_SE.sum(0).unsqueeze(1)
    rest_EO = one.mean_EO - longest_EO
    if grad_SO.is_cuda or over.group is not None or (rest_EO.abs().amax(1) < 0.01 * longest_EO.abs().amax(1)).any():
        rest_EO = over.average(pairs.sums((onehot_SE - longest_SE).sum(1, keepdim=True), grad_SO)).squeeze(1)
    if over.group is not None:  # with the longest ones of the others; float64 keeps their digits
        rest_EO = rest_EO + (over.average(longest_EO.double()) - longest_EO / over.num_processes).to(rest_EO.dtype)
    cos_E = F.cosine_similarity(scale_rows(longest_EO)[0], scale_rows(rest_EO)[0], eps=tiny)
    cos_S = torch.where(longest_SE.any(1), longest_SE @ cos_E, cos_S)
    return one._replace(cos_S=cos_S, norm_S=one.norm_S * (1 - longest_SE @ (~rest_EO.any(1)).to(cos_S.dtype)))


# ---- 5. Placebo and reroute ----
def draw_placebo(conflict_TK: Tensor, judged_TK: Tensor, seed: int) -> Tensor:
    """As many judged pairs as conflict, drawn at random: the control for the selection."""
    key_TK = torch.rand(judged_TK.shape, generator=torch.Generator().manual_seed(seed)).to(judged_TK.device)
    rank_S = key_TK.masked_fill(~judged_TK, -1.0).flatten().argsort(descending=True).argsort()
    return (rank_S < conflict_TK.sum()).view_as(conflict_TK)


CONFLICT_LOSSES = stgc.CONFLICT_LOSSES | {"reroute": lambda logits_TE: -logits_TE.log_softmax(-1)}  # CE(z_n, target)


# ---- 6. One pass ----
class ConflictTap(torch.autograd.Function):
    """The identity on a layer's pairs (and weights), and a scalar 0 in place of its conflict loss. In its backward all token
    gradients are known: it flags the pairs, and sends down d conflict loss / d logits times d loss / d scalar."""

    @staticmethod
    def forward(ctx, step, logits_TE, x_SD, *weights):
        ctx.step = step
        ctx.save_for_backward(logits_TE)
        return logits_TE.new_zeros(()), x_SD.view_as(x_SD), *(w.view_as(w) for w in weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, grad_x_SD, *weight_grads):
        step, logits_TE = ctx.step, ctx.saved_tensors[0].detach().requires_grad_()
        step.weight_grads = dict(enumerate(weight_grads))
        with torch.enable_grad():
            (grad_TE,) = torch.autograd.grad(step.stgc.conflict_loss(step, logits_TE), logits_TE)
        step.compared, step.by_others, step.grads, step.weight_grads = {}, {}, {}, {}  # the loss still holds the step
        return None, grad_loss * grad_TE, grad_x_SD, *weight_grads


class LayerStep(stgc.LayerStep):
    def __init__(self, stgc, *forward):
        super().__init__(stgc, *forward)
        self.config, self.number, self.whole = stgc.config, stgc.forward_step, stgc.config.gradients == "weight"
        self.linears, self.by_others, self.grads, self.weight_grads, self.judged = [], {}, {}, {}, True

    def on_experts(self, x_SD, weights):
        if self.config.passes == "two":  # a view's gradient is that of this forward alone
            return x_SD, [w.view_as(w) for w in weights] if self.whole else weights
        logits_TE = self.logits_TE if self.logits_TE.requires_grad else self.logits_TE.detach().requires_grad_()  # frozen
        placeholder, x_SD, *tapped = ConflictTap.apply(self, logits_TE, x_SD, *(weights if self.whole else []))
        self.stgc.placeholders |= {self.index: placeholder} if self.stgc.steps.get(self.index) is self else {}  # no replay
        return x_SD, tapped or weights

    def on_linear(self, a_SI, w_EIO, out_SO, split=lambda rows: (rows,)):  # split: of fused linears, by columns
        super().on_linear(a_SI, w_EIO, out_SO if w_EIO.requires_grad or not self.whole else w_EIO)
        linear, (_, edge) = len(self.linears), self.edges.popitem()
        self.linears.append((a_SI.detach() if self.whole else None, split))
        if self.config.passes == "one":  # an edge would make a cycle with the graph
            out_SO.register_hook(partial(self.on_gradient, linear))
        else:
            self.edges |= {linear: edge} | ({-1 - linear: get_gradient_edge(w_EIO)} if self.whole else {})
        return out_SO

    def on_gradient(self, linear, grad_SO):
        if linear < 0:  # of a weight
            self.weight_grads[-1 - linear] = grad_SO
        elif self.judged:  # else a later forward came before the loss
            grads = self.linears[linear][1](grad_SO.detach())
            self.grads |= {linear: grads} if self.whole or self.config.conflict_loss == "reroute" else {}
            for part, grad in enumerate(grads):
                super().on_gradient((linear, part), grad)
                self.by_others[linear, part] = compare_to_others(grad, self.compared[linear, part], self.pairs, self.stgc)

    def find_conflicts(self):
        with torch.autocast(self.logits_TE.device.type, enabled=False):
            for linear, (a_SI, split) in enumerate(self.linears if self.whole else []):
                sums = split(self.stgc.average(widen(self.weight_grads[linear])))
                for part, (grad_SO, sum_EIO) in enumerate(zip(self.grads[linear], sums)):
                    cos_S, norm_S = self.stgc.cosine(grad_SO, a_SI, sum_EIO, self.pairs)
                    self.compared[linear, part] = self.compared[linear, part]._replace(cos_S=cos_S, norm_S=norm_S)
            self.compared = self.by_others if self.config.leave_one_out else self.compared
            verdict = super().find_conflicts()
            if self.config.conflict_loss == "reroute":  # DIFFERS: to the other expert e' of the best cos(g2_n, gbar2_e')
                direction_EO = F.normalize(scale_rows(self.compared[max(self.compared)].mean_EO)[0], dim=-1, eps=1e-37)
                gain_TKE = self.pairs.by_token(widen(self.grads[max(self.grads)][-1]) @ direction_EO.T)
                own_TE = torch.zeros_like(gain_TKE[:, 0]).scatter(1, verdict.target_TK, torch.inf)
                verdict = verdict._replace(target_TK=(gain_TKE - own_TE.unsqueeze(1)).argmax(-1))
            if self.config.select == "random":
                seed = hash((self.config.seed, self.number, self.index, self.stgc.rank))
                verdict = verdict._replace(picked_TK=draw_placebo(verdict.conflict_TK, verdict.judged_TK, seed))
        return verdict


# ---- 7. STGC ----
class STGC(stgc.STGC):
    """On layers of both files, with a config of either. With several processes, which must run the same layers, create it
    after Accelerator() or init_process_group."""

    config_type, step_type, losses, cosine = STGCConfig, LayerStep, CONFLICT_LOSSES, staticmethod(weight_cosine)

    def __init__(self, model: nn.Module, config: stgc.STGCConfig = STGCConfig()):
        config = STGCConfig(**vars(config)) if type(config) is stgc.STGCConfig else config
        layers = list(self.find_layers(model).values())
        self.chosen = set(range(len(layers)) if config.layers is None else config.layers)
        if not self.chosen <= set(range(len(layers))):
            raise ValueError(f"layers={config.layers} must lie between 0 and {len(layers) - 1}, the MoE layers")
        if config.conflict_loss == "reroute" and any(layers[i].top_k == layers[i].experts.num_experts for i in self.chosen):
            raise ValueError("conflict_loss='reroute' needs top_k below the number of experts")
        super().__init__(model, config)
        self.group = dist.new_group() if dist.is_available() and dist.is_initialized() else None
        self.num_processes, self.rank = (self.group.size(), self.group.rank()) if self.group else (1, 0)
        self.step = self.forward_step = 0  # losses so far; a resumed run sets it
        self.placeholders, self.blind = {}, set()  # of one pass; layers that ran without gradients

    def detach(self) -> None:  # ends the watch
        for layer in [one for one in self.layers if getattr(getattr(one.watch, "func", None), "__self__", None) is self]:
            layer.watch = None
        self.group = self.group and dist.destroy_process_group(self.group)  # None

    def on_forward(self, i, x_TD, routing, pairs, keep_T):
        if not torch.is_grad_enabled():
            self.blind |= {i} if self.layers[i].training else set()
            return None
        if self.config.router_only:
            routing = routing._replace(logits_TE=widen(self.layers[i].router(x_TD.detach())))
        earlier, again = self.steps.get(i), torch._C._current_graph_task_id() != -1
        self.forward_step = self.forward_step if again else self.step
        step = super().on_forward(i, x_TD, routing, pairs, keep_T)
        if again:  # gradient checkpointing: one pass saves tensors again
            step = self.step_type(self, i, routing.logits_TE, pairs, keep_T)
        elif earlier is not None:
            earlier.judged = False
        step.judged = i in self.chosen and self.config.every > 0 and self.forward_step % self.config.every == 0
        trains = [p.requires_grad and step.logits_TE.requires_grad for p in self.layers[i].router.parameters()]
        if step.judged and self.config.conflict_loss != "none" and trains and not any(trains):
            raise RuntimeError(f"router of {self.names[i]} is frozen: unfreeze it (peft: modules_to_save), or see layers=")
        return step if step.judged and self.config.select != "all" else None

    def check(self, steps):
        blind, self.blind = self.blind - steps.keys(), set()
        if blind or not steps:  # a layer may be skipped, not run without gradients
            super().check(dict.fromkeys(set(range(len(self.layers))) - blind) if blind else steps)

    def loss(self, main_loss: Tensor, grad_scale: float = 1.0) -> Tensor:
        """grad_scale: of fp16, for two passes. With one pass L_CEL is 0 here; its gradient comes in the backward."""
        self.grad_scale, self.step = grad_scale, self.step + 1
        total, self.placeholders = super().loss(main_loss), {}
        return total

    def conflict_losses(self, main_loss, steps):
        judged = [step for step in steps if step.judged]
        if self.config.select == "all":
            return [self.flat_loss(step) for step in judged]
        if self.config.passes == "one":
            return [self.placeholders[step.index] for step in judged]
        return super().conflict_losses(main_loss * self.grad_scale, judged) if judged else []

    def flat_loss(self, step):  # of all pairs, whether or not a gradient reaches them
        how, pairs = (self.losses[self.config.conflict_loss], self.average), step.pairs
        loss = stgc.conflict_loss(step.logits_TE, pairs.expert_ids_TK, pairs.by_token(pairs.onehot_SE.any(1)), *how)
        self.numbers[step.index]["conflict_loss"] = self.average(loss.detach())
        return loss

    def balance_loss(self, step):
        if (top_k := step.pairs.expert_ids_TK.shape[1]) < len(step.pairs.ends_E):
            p_TK = step.logits_TE.detach().softmax(-1).topk(top_k + 1).values.masked_fill(~step.keep_T[:, None], 0.0)
            sums = (p_TK[:, -2] - p_TK[:, -1]).sum(), step.keep_T.sum(), step.pairs.onehot_SE.sum()
            margin, tokens, num_pairs = self.average(torch.stack(sums))
            self.numbers[step.index]["router_margin"] = margin / tokens / (num_pairs >= tokens * top_k)
        return super().balance_loss(step)

    def statistics(self, step, verdict):
        """judged_ratio, infinite_ratio: of all pairs. consistency_by_chance: of unrelated gradients. conflict_ratio_others:
        of bias gradients, among pairs with others. router_margin: p_K - p_(K+1), infinite where K is not fixed."""
        numbers, (load_E, judged_E, _) = super().statistics(step, verdict), step.counts
        others = stgc.flag_conflicts([one for _, one in sorted(step.by_others.items())], step.pairs, self.config.tau)
        infinite_S = ~verdict.norm_TKL.isfinite().all(-1).flatten()[step.pairs.order_S] & step.pairs.onehot_SE.any(1)
        counts = [(verdict.judged_TK & ~others.judged_TK).sum(), others.conflict_TK.sum(), infinite_S.sum()]
        num_pairs, (num_alone, num_conflicts, num_infinite) = load_E.sum(), self.average(torch.stack(counts).to(load_E))
        used_E = (judged_E > 0).to(load_E)
        parts = judged_E.sum(), num_infinite, num_conflicts, (used_E / (judged_E * self.num_processes).clamp_min(1)).sum()
        wholes = num_pairs, num_pairs, num_pairs - num_alone, used_E.sum()
        names = "judged_ratio", "infinite_ratio", "conflict_ratio_others", "consistency_by_chance"
        return numbers | {name: part / whole.clamp_min(1e-9) for name, part, whole in zip(names, parts, wholes)}


# ---- 8. Demo ----
def demo() -> None:
    torch.set_num_threads(1)
    keys = ("conflict_ratio", "conflict_ratio_others", "consistency", "consistency_by_chance")
    print("mean of steps 101 to 150       conflicts  by others  consistency  by chance  main loss")
    for fields in [{"conflict_loss": k} for k in ("none", "ce", "reroute")] + [{"select": "random"}, {"passes": "one"}]:
        torch.manual_seed(0)
        model = stgc.Demo(Experts(4, 16, 32))
        how = STGC(model, STGCConfig(**fields)), torch.optim.AdamW(model.parameters(), 5e-3)
        model.fit(*how, 100)
        print("{!s:<31}{:>9.3f}{:>11.3f}{:>13.3f}{:>11.3f}{:>11.3f}".format(fields, *model.fit(*how, 50, keys=keys)))
    print("What random pairs reach too is not due to the selection. A lower ratio at a higher main loss: no gain.")


if __name__ == "__main__":
    demo()
