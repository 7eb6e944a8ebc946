"""The checks of exercises.ipynb: an answer against tests/reference.py, the float64 oracle.

A check prints one line: right, not written yet, or where the answer differs and by how much. The grader also computes what
the common mistakes give. Where the answer is the same, the line ends with a hint.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache, partial, wraps
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.run.cli import UserError, say
from lab.run.runs import ROOT

T, E, D, F_, C = 24, 4, 6, 10, 3  # tokens, experts, hidden size, size of an expert, classes
SHAPES = (E, D), (E, D, F_), (E, F_, D), (E, F_), (E, D)  # of the router, and of the experts' weights and biases
TOLERANCE = 1e-9  # relative to the largest entry


@cache
def load_oracle() -> ModuleType:
    """tests/reference.py, by its path: an installed package has no tests. UserError."""
    path = ROOT / "tests" / "reference.py"
    if not path.is_file():
        raise UserError(f"the oracle is {path}, which an installed package lacks: run this in a checkout")
    spec = importlib.util.spec_from_file_location("reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sample(top_k: int, normalize: bool = True) -> SimpleNamespace:
    """A layer with a linear head, a batch in which token 1 has no label, and what the oracle finds. g_SD: the token
    gradients at the last linear. cos_S: their cosines with the means."""
    oracle, draw = load_oracle(), partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(top_k))
    layer = oracle.RefLayer(*(0.4 * draw(*shape) for shape in SHAPES), top_k=top_k, normalize=normalize)
    net, x_TD = oracle.RefNet([layer], 0.4 * draw(C, D)), draw(T, D)
    label_T, keep_T = (torch.arange(T) % C).index_fill(0, torch.tensor(1), oracle.IGNORED), torch.ones(T, dtype=torch.bool)
    (found,) = oracle.judge(net, x_TD, label_T, keep_T)
    g_SD = torch.stack([found.bias_grads[t, k]["out"] for t in range(T) for k in range(top_k)])
    z_TE = (x_TD @ layer.router_ED.T).detach().requires_grad_()
    own = {"net": net, "layer": layer, "x_TD": x_TD, "label_T": label_T, "keep_T": keep_T, "z_TE": z_TE}
    return SimpleNamespace(**own, found=found, ids_TK=found.expert_ids_TK, g_SD=g_SD, cos_S=found.cos_TKL[..., 1].flatten())


# ---- 1. Comparing ----
def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE * b.abs().nan_to_num(0.0).max().item(), equal_nan=True)


def fault_of(where: str, found, truth: Tensor, mistakes: dict[str, Tensor], names: tuple[str, ...] = ()) -> str:
    """What is wrong, in one line; "" if nothing is. mistakes: what each gives, by its hint. names: of the dimensions."""
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (truth.shape, truth.dtype):
        own = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        return f"{where} is {own}, and must be a tensor {tuple(truth.shape)} {truth.dtype}"
    if same(found, truth):
        return ""
    gap = (found - truth).abs().double().nan_to_num(torch.inf)
    index = [int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)]
    place = " at " * bool(names) + ", ".join(f"{name} {i}" for name, i in zip(names, index))
    hint = next((f" Hint: {hint}." for hint, value in mistakes.items() if same(found, value)), "")
    own, right = (f"{tensor[tuple(index)].item():.6g}" for tensor in (found, truth))
    return f"{where} is {own} instead of {right}{place}{', where it differs most' * bool(names)}.{hint}"


def check(cases: Callable[..., Iterator[tuple]]) -> Callable[..., None]:
    """The cases of an answer, each as `fault_of` takes them, as a function that prints the first fault or "right"."""

    @wraps(cases)
    def grade(answer) -> None:
        try:
            line = next(filter(None, (fault_of(*case) for case in cases(answer))), "right: the same as the oracle")
        except NotImplementedError:
            line = "not written yet"
        say(f"{cases.__name__}: {line}")

    return grade


# ---- 2. The exercises ----
@check
def moe(answer) -> Iterator[tuple]:
    """answer(x_TD, router_ED, experts, top_k, normalize) -> y_TD. The experts are functions x_ND -> y_ND."""
    for top_k, normalize in ((1, True), (2, True), (2, False), (E, True)):
        one, oracle, where, rows = sample(top_k, normalize), load_oracle(), f"top_k={top_k}, normalize={normalize}: ", []

        def run(e, x_ND, one=one, rows=rows, oracle=oracle):
            rows.append(len(x_ND))
            return oracle.run_expert(one.layer, e, x_ND)[0].detach()

        experts = [partial(run, e) for e in range(E)]
        out_TED = torch.stack([expert(one.x_TD) for expert in experts], dim=1)
        both = (one.z_TE.detach().softmax(dim) for dim in (1, 0))  # over the experts, and wrongly over the tokens
        p_TE, q_TE = (a_TE.where(a_TE >= a_TE.topk(top_k).values[:, -1:], 0.0) for a_TE in both)  # the K largest alone
        scaled_TE = p_TE / p_TE.sum(1, keepdim=True)
        weights_TE, other_TE = (scaled_TE, p_TE) if normalize else (p_TE, scaled_TE)
        last_TE = weights_TE * (p_TE > 0).flip(1).cumsum(1).eq(1).flip(1)
        scale = "scale the K weights, so that they sum to 1"
        no_scale = "a softmax over the K chosen logits sums to 1: without normalize the softmax is over all E experts"
        mistakes = {
            scale if normalize else no_scale: other_TE,
            "the softmax is over the experts of a token": q_TE / q_TE.sum(1, keepdim=True) if normalize else q_TE,
            "multiply each output by its weight": (p_TE > 0).double(),
            "a token has several experts: add their outputs, do not overwrite": last_TE,
        }
        mistakes = {hint: torch.einsum("te,ted->td", w_TE, out_TED) for hint, w_TE in mistakes.items()}
        rows.clear()
        found = answer(one.x_TD, one.layer.router_ED.detach(), experts, top_k, normalize)
        truth_TD = oracle.moe(one.layer, one.x_TD, one.keep_T)[0].detach()
        yield where + "y_TD", found, truth_TD, mistakes, ("token", "feature")
        every = {"give each expert its own tokens only": torch.tensor(T * E)}
        yield where + "the number of rows that the experts ran", torch.tensor(sum(rows)), torch.tensor(T * top_k), every


@check
def cosine_to_mean(answer) -> Iterator[tuple]:
    """answer(g_SD, expert_ids_S, num_experts) -> cos_S. One gradient is zero, and the last expert has no pair."""
    for top_k, scale in ((1, 1.0), (2, 1.0), (2, 1e-9)):
        one, cosine = sample(top_k), partial(F.cosine_similarity, eps=torch.finfo(torch.float64).tiny)
        g_SD, ids_S = scale * one.g_SD, one.ids_TK.flatten()
        on_SS = (ids_S.unsqueeze(1) == ids_S).double()  # pairs on the same expert
        mean_SD, unit_SD = on_SS @ g_SD / on_SS.sum(1, keepdim=True), F.normalize(g_SD, dim=1, eps=1e-30)
        mistakes = {
            "the mean is over the pairs of the same expert, not over all": cosine(g_SD, g_SD.mean(0, keepdim=True)),
            "the pair itself belongs to the mean of its expert": cosine(g_SD, on_SS @ g_SD - g_SD),
            "the mean is of the gradients, not of unit vectors: long ones count more": cosine(g_SD, on_SS @ unit_SD),
            "a cosine is the inner product divided by both lengths": (g_SD * mean_SD).sum(1),
            "a zero gradient has no direction: its cosine is 0": one.cos_S.masked_fill(~g_SD.any(1), torch.nan),
            "gradients can be shorter than eps, by default 1e-8: choose a smaller one": cosine(g_SD, mean_SD, eps=1e-8),
        }
        where = f"top_k={top_k}, gradients times {scale:g}: cos_S"
        yield where, answer(g_SD, ids_S, E + 1), one.cos_S, mistakes, ("pair",)


@check
def conflict_loss(answer) -> Iterator[tuple]:
    """answer(logits_TE, expert_ids_TK, conflict_TK) -> loss, a scalar with a gradient on the logits."""
    for top_k, flagged in ((1, True), (2, True), (2, False)):
        one, oracle = sample(top_k), load_oracle()
        conflict_TK, z_TE = one.found.conflict_TK & flagged, one.z_TE
        where = f"top_k={top_k}, {conflict_TK.sum()} pairs in conflict: the "
        up_N, down_N = (-(sign * z_TE.detach()).log_softmax(1).gather(1, one.ids_TK)[conflict_TK] for sign in (1, -1))
        mistakes = {
            "without a pair in conflict the loss is 0, not 0/0": down_N.mean(),
            "CE(z, e) raises the logit of e: negate the logits": up_N.mean(),
            "-CE(z, e) has no lower bound: negate the logits, not the loss": -up_N.mean(),
            "the mean over the pairs in conflict, not their sum": down_N.sum(),
            "the mean is over the pairs in conflict, not over all pairs": down_N.sum() / conflict_TK.numel(),
        }
        loss, truth = answer(z_TE, one.ids_TK, conflict_TK), oracle.conflict_loss_of("ce", z_TE, conflict_TK, one.found)
        yield where + "loss", loss, truth, mistakes
        if flagged:
            cut_TE = torch.zeros_like(z_TE)
            grad_TE, truth_TE = (torch.autograd.grad(a, z_TE)[0] if a.requires_grad else cut_TE for a in (loss, truth))
            hint = {"the loss has no graph: do not detach it": cut_TE}
            yield where + "gradient on the logits", grad_TE, truth_TE, hint, ("token", "expert")


@check
def one_pass(answer) -> Iterator[tuple]:
    """answer.apply(y_SD, logits_TE, expert_ids_TK) -> y_SD, 0: an autograd function. Pair t*K + k is choice k of token t."""
    for top_k, beta in ((1, 1.0), (2, 0.25)):
        one, oracle, where = sample(top_k), load_oracle(), f"top_k={top_k}, beta={beta}: the "
        pairs = zip(one.ids_TK.flatten().tolist(), one.x_TD.repeat_interleave(top_k, 0))
        y_SD = torch.stack([oracle.run_expert(one.layer, e, x_D)[0] for e, x_D in pairs]).detach().requires_grad_()
        out_SD, zero = answer.apply(y_SD, one.z_TE, one.ids_TK)
        yield where + "output y_SD", out_SD, y_SD, {}, ("pair", "feature")
        yield where + "scalar", zero, one.z_TE.new_zeros(()), {}
        weights_TK = F.normalize(one.z_TE.detach().softmax(1).gather(1, one.ids_TK), p=1, dim=1)
        moved_TD = one.x_TD + (weights_TK.unsqueeze(2) * out_SD.unflatten(0, weights_TK.shape)).sum(1)
        main_loss = oracle.main_loss_of(moved_TD @ one.net.head_CD.detach().T, one.label_T, one.keep_T)
        g_SD, grad_TE = torch.autograd.grad(main_loss + beta * zero, [y_SD, one.z_TE], materialize_grads=True)
        hint = {"return the gradient of y_SD too: the experts learn from it": torch.zeros_like(y_SD)}
        yield where + "gradient on y_SD", g_SD, one.g_SD, hint, ("pair", "feature")
        masks = (one.cos_S.view(weights_TK.shape) < 0, weights_TK > 0)
        losses = [oracle.conflict_loss_of("ce", one.z_TE, mask_TK, one.found) for mask_TK in masks]
        truth_TE, every_TE = (beta * torch.autograd.grad(loss, one.z_TE)[0] for loss in losses)
        mistakes = {
            "multiply by the derivative of the total by the scalar, which backward gets": truth_TE / beta,
            "backward returns the gradient, not the step against it": -truth_TE,
            "backward returns no gradient on the logits": torch.zeros_like(truth_TE),
            "only pairs in conflict get the loss": every_TE,
        }
        yield where + "gradient on the logits", grad_TE, truth_TE, mistakes, ("token", "expert")
