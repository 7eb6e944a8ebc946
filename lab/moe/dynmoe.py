"""DynMoE's routing: thresholds decide how many experts a token has, and a layer drops experts and adds new ones.

    layer = TopAnyLayer(Experts(16, d_model, d_ff), TopAnyRouter(d_model, num_experts=8, max_experts=16))
    stgc = make_stgc(model, config)  # with DynMoE's loss in the place of the balance loss
    adapt(model, done, steps)        # after each step, `done` of the `steps` of this epoch

Arithmetic and schedule are those of DynMoE's GLUE runs (arXiv:2405.14297; LINs-lab/DynMoE at 4927232, EMoE/tutel). Shapes as
in stgc.py, where E is the largest number of experts. Not all E are active. K is the most that a token may be on, at most E:
a pair that is off has the weight 0.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stgc_plus
from stgc import LayerStep, MoELayer, Routing, widen


class TopAnyRouter(nn.Module):
    """z_e = cos(x, w_e) - G_e, x_TD -> logits_TE, in at least float32 even under autocast; -inf for an inactive expert. A
    token is on the experts with z_e > 0: DynMoE compares sigmoid(cos) with sigmoid(G), which is the same.

    CHOICE: the conflict loss acts on z, so it moves scores and thresholds. The mask, and the record since the last `adapt`,
    are buffers of fixed shape, which a checkpoint has. ValueError for max_experts below num_experts.
    """

    def __init__(self, d_model: int, num_experts: int, max_experts: int = 16, **factory):
        super().__init__()
        if max_experts < num_experts:
            raise ValueError(f"max_experts={max_experts} must be at least num_experts={num_experts}")
        rows_ED = nn.init.orthogonal_(torch.empty(max_experts, d_model, **factory))
        self.weight_DE = nn.Parameter(rows_ED.T.contiguous())
        self.thresholds_E = nn.Parameter(torch.zeros(max_experts, **factory))  # G
        place_E = torch.arange(max_experts, device=rows_ED.device)
        self.register_buffer("active_E", (place_E < num_experts).long())
        self.register_buffer("used_E", torch.zeros_like(place_E))  # pairs on each expert
        self.register_buffer("lost_D", torch.zeros_like(rows_ED[0]))  # sum of the tokens without an expert

    def forward(self, x_TD: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            cosines_TE = F.normalize(widen(x_TD), dim=1) @ F.normalize(widen(self.weight_DE), dim=0)
            return (cosines_TE - widen(self.thresholds_E)).masked_fill(self.active_E == 0, -math.inf)

    def auxiliary_loss(self) -> Tensor:
        """|W^T W - I|_F of the normalised columns, plus the mean length of the columns; of the active experts. DIFFERS: the
        code that we follow takes the mean length over all E columns."""
        weight_DE = widen(self.weight_DE) * self.active_E
        unit_DE, norm_E = F.normalize(weight_DE, dim=0), torch.linalg.vector_norm(weight_DE, dim=0)
        return torch.linalg.matrix_norm(unit_DE.T @ unit_DE - self.active_E.diag()) + norm_E.sum() / self.active_E.sum()

    @torch.no_grad()
    def adapt(self) -> None:
        """Drops experts that no token used. If a token had none, adds one in the first free place: its column is the
        direction of the sum of these tokens, its G is 0, and its parameters are those of that place."""
        self.active_E *= self.used_E > 0
        if self.lost_D.any() and not self.active_E.all():
            new = (self.active_E == 0).nonzero()[0, 0]
            self.weight_DE[:, new] = F.normalize(self.lost_D, dim=0)
            self.thresholds_E[new] = 0.0
            self.active_E[new] = 1
        self.forget()

    def forget(self) -> None:
        self.used_E.zero_()
        self.lost_D.zero_()


class TopAnyLayer(MoELayer):
    """y = the mean of the experts that a token is on. While training this may be none, y = 0; in evaluation the token then
    has the expert of the best score. The step at the threshold passes its gradient to the scores of the experts that are on.

    The mean divides by the sum of the steps, gradient included: the gradient of a single expert is 0, as with Top-1.
    """

    def __init__(self, experts: nn.Module, router: TopAnyRouter):
        super().__init__(experts, router, top_k=experts.num_experts)
        self.found: tuple[Tensor, Tensor] | None = None  # the record of the latest training forward, for `adapt`

    def routing(self, x_TD: Tensor) -> Routing:
        logits_TE, threshold_E = self.router(x_TD), widen(self.router.thresholds_E)
        score_TE, on_TE = torch.sigmoid(logits_TE + threshold_E), logits_TE > 0
        none_T1 = ~on_TE.any(1, keepdim=True)
        if self.training:
            real_T1 = x_TD.any(1, keepdim=True)  # padding comes as zeros
            self.found = (on_TE & real_T1).sum(0), (widen(x_TD.detach()) * none_T1).sum(0)
        else:
            on_TE = on_TE | none_T1 & F.one_hot(score_TE.argmax(1), len(threshold_E)).bool()
        over_TE = score_TE - torch.sigmoid(threshold_E)
        step_TE = on_TE * (1 + (over_TE - over_TE.detach()))  # exactly 0 or 1
        weights_TE = step_TE / step_TE.sum(1, keepdim=True).clamp_min(1)
        ids_TE = logits_TE.where(on_TE, -math.inf).argsort(dim=1, descending=True, stable=True)
        cut = self.training and not x_TD.is_cuda  # columns without a pair cost time; a GPU would have to wait
        ids_TK = ids_TE[:, : max(1, int(on_TE.sum(1).max()))] if cut else ids_TE
        return Routing(logits_TE, weights_TE.gather(1, ids_TK), ids_TK)


def ce_of_active(logits_TE: Tensor) -> Tensor:
    """The loss `ce` of stgc.py among the active experts: in the softmax of -z the others, at -inf, would win."""
    off_TE = logits_TE.isneginf()
    return -(-logits_TE).masked_fill(off_TE, -math.inf).log_softmax(-1).masked_fill(off_TE, 0.0)


class TopAnySTGC(stgc_plus.STGC):
    losses = stgc_plus.CONFLICT_LOSSES | {"ce": ce_of_active}

    def balance_loss(self, step: LayerStep) -> Tensor:
        """DynMoE's auxiliary loss. Besides: experts_per_token, the mean over the tokens, and active_experts."""
        router, tokens = self.layers[step.index].router, step.keep_T.sum().to(step.logits_TE)
        load_E, loss = self.average(step.pairs.onehot_SE.sum(0)), router.auxiliary_loss()
        found = {"load": F.normalize(load_E, p=1, dim=0), "experts_per_token": load_E.sum() / self.average(tokens)}
        found |= {"auxiliary_loss": loss.detach(), "active_experts": router.active_E.sum().to(load_E)}
        self.numbers[step.index] |= found
        return loss


def layers_of(model: nn.Module) -> list[TopAnyLayer]:
    return [module for module in model.modules() if isinstance(module, TopAnyLayer)]


def make_stgc(model: nn.Module, config: stgc_plus.STGCConfig) -> stgc_plus.STGC:
    """The STGC object for a model, with DynMoE's layers or with others."""
    return (TopAnySTGC if layers_of(model) else stgc_plus.STGC)(model, config)


def adapt(model: nn.Module, done: int, steps: int, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
    """Call it after each step, when `done` of an epoch's `steps` are done; `reduce` sums over the processes. As in DynMoE,
    each layer records from the half of the epoch to three quarters, and then drops and adds experts."""
    for layer in layers_of(model):
        for total, found in zip((layer.router.used_E, layer.router.lost_D), layer.found):
            total += reduce(found)
        if done == steps // 2:
            layer.router.forget()
        if done == 3 * steps // 4 + 1:
            layer.router.adapt()


def summary(model: nn.Module) -> dict:
    """For a run's record: the number of active experts of each layer; {} for other routers."""
    found = [int(layer.router.active_E.sum()) for layer in layers_of(model)]
    return {"active_experts": found} if found else {}
