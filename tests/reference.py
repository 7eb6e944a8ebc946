"""The oracle: STGC the slow, obvious way, to decide whether `stgc.py` is right.

Nothing here is fast and nothing is shared with `stgc.py`: float64, Python loops over tokens and experts, one
backward per (token, expert) pair, every per-pair gradient and every N x N cosine matrix written out in full. Where
`stgc.py` uses an identity (taps, outer products, closed forms), this file uses the definition. "eq." and "sec." are
those of arXiv:2406.19905v3. Two implementations that agree although only one of them is clever: that is the proof.

  T tokens, padding included (`keep_T` False)     K experts per token     E experts     D hidden size     F expert size
  C classes     L layers     N pairs on one expert     I, O inputs and outputs of a linear
  P entries of one gradient: O for a bias gradient, I * O for a weight gradient (flattened)
A pair is written (t, k): token t and its k-th choice. "gate", "in" and "out" name the linears of an expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # label of a token that the main loss does not reach
NOWHERE = -1  # expert id of padding; reroute target of padding and of a token that is on all experts already


# ---- The network ----
@dataclass
class RefLayer:
    """One MoE layer. Every tensor handed in is cloned to a float64 leaf that requires grad. eq. 5, 6"""

    router_ED: Tensor
    w_in_EDF: Tensor
    w_out_EFD: Tensor
    b_in_EF: Tensor | None = None
    b_out_ED: Tensor | None = None
    w_gate_EDF: Tensor | None = None  # given: a gated (SwiGLU-like) expert with three linears
    b_gate_EF: Tensor | None = None
    act: Callable[[Tensor], Tensor] = torch.nn.functional.gelu
    top_k: int = 2
    normalize: bool = True
    scale: float = 1.0

    def __post_init__(self):
        for name, tensor in tensors_of(self).items():
            setattr(self, name, tensor.detach().to(torch.float64).clone().requires_grad_())


@dataclass
class RefNet:
    """x <- after_block(x + MoE_l(x)) for every layer l, then a linear head without bias."""

    layers: list[RefLayer]
    head_CD: Tensor
    after_block: Callable[[Tensor], Tensor] = lambda x_TD: x_TD

    def __post_init__(self):
        self.head_CD = self.head_CD.detach().to(torch.float64).clone().requires_grad_()

    def parameters(self) -> dict[str, Tensor]:
        layers = enumerate(self.layers)
        named = {f"layers.{i}.{name}": tensor for i, layer in layers for name, tensor in tensors_of(layer).items()}
        return {**named, "head_CD": self.head_CD}


def tensors_of(layer: RefLayer) -> dict[str, Tensor]:
    return {f.name: getattr(layer, f.name) for f in fields(layer) if isinstance(getattr(layer, f.name), Tensor)}


class Leaves(NamedTuple):
    """Zeros added to one linear for one pair alone: their gradient is what this pair alone asks of that linear."""

    bias_O: Tensor
    weight_IO: Tensor


class Trace(NamedTuple):
    """What one MoE layer did in one forward pass; padding tokens appear in none of the dicts."""

    x_TD: Tensor  # input of the layer
    expert_of: dict[tuple[int, int], int]  # (t, k) -> expert
    leaves_of: dict[tuple[int, int], dict[str, Leaves]]  # (t, k) -> linear -> its leaves


def log_softmax(z_E: Tensor) -> Tensor:
    return z_E - torch.logsumexp(z_E, dim=0)


def softmax(z_E: Tensor) -> Tensor:
    return torch.exp(log_softmax(z_E))


def run_expert(layer: RefLayer, e: int, x_D: Tensor) -> tuple[Tensor, dict[str, Leaves]]:
    """act(x W_in + b_in) W_out + b_out of expert e; gated: (act(x W_gate + b_gate) * (x W_in + b_in)) W_out + b_out."""
    leaves = {}

    def linear(name: str, x_I: Tensor, w_EIO: Tensor, b_EO: Tensor | None) -> Tensor:
        bias_O = torch.zeros(w_EIO.shape[2], dtype=torch.float64, requires_grad=True)
        weight_IO = torch.zeros(w_EIO.shape[1:], dtype=torch.float64, requires_grad=True)
        leaves[name] = Leaves(bias_O, weight_IO)
        y_O = x_I @ (w_EIO[e] + weight_IO) + bias_O
        return y_O if b_EO is None else y_O + b_EO[e]

    if layer.w_gate_EDF is None:
        h_F = layer.act(linear("in", x_D, layer.w_in_EDF, layer.b_in_EF))
    else:
        gate_F = linear("gate", x_D, layer.w_gate_EDF, layer.b_gate_EF)
        h_F = layer.act(gate_F) * linear("in", x_D, layer.w_in_EDF, layer.b_in_EF)
    return linear("out", h_F, layer.w_out_EFD, layer.b_out_ED), leaves


def moe(layer: RefLayer, x_TD: Tensor, keep_T: Tensor) -> tuple[Tensor, Trace]:
    """Top-K of softmax(W_r x), token by token; padding is not routed and gets 0. eq. 5, 6"""
    trace, out_rows = Trace(x_TD, {}, {}), []
    for t, x_D in enumerate(x_TD):
        out_D = torch.zeros_like(x_D)
        if keep_T[t]:
            probs_E = softmax(layer.router_ED @ x_D)
            chosen = sorted(range(len(probs_E)), key=lambda e: -probs_E[e].item())[: layer.top_k]
            total = sum(probs_E[e] for e in chosen) if layer.normalize else 1.0
            for k, e in enumerate(chosen):
                y_D, trace.leaves_of[t, k] = run_expert(layer, e, x_D)
                trace.expert_of[t, k] = e
                out_D = out_D + layer.scale * probs_E[e] / total * y_D
        out_rows.append(out_D)
    return torch.stack(out_rows), trace


def forward(net: RefNet, x_TD: Tensor, keep_T: Tensor) -> tuple[Tensor, list[Trace]]:
    traces = []
    for layer in net.layers:
        out_TD, trace = moe(layer, x_TD, keep_T)
        x_TD = net.after_block(x_TD + out_TD)
        traces.append(trace)
    return x_TD @ net.head_CD.T, traces


def main_loss_of(logits_TC: Tensor, labels_T: Tensor, keep_T: Tensor) -> Tensor:
    """Mean cross entropy over the labelled tokens."""
    assert all(labels_T[~keep_T] == IGNORED), "a padding token carries no label"
    labelled = [t for t in range(len(labels_T)) if labels_T[t] != IGNORED]
    assert labelled, "no labelled token: the mean is undefined"
    return sum(-log_softmax(logits_TC[t])[labels_T[t]] for t in labelled) / len(labelled)


# ---- Which pairs conflict: sec. 3.2, eq. 7, 11, 12, definition 1 ----
class Judgement(NamedTuple):
    """One layer. Padding: expert and target NOWHERE, similarity 0, neither judged nor in conflict."""

    expert_ids_TK: Tensor
    similarity_TK: Tensor
    judged_TK: Tensor
    conflict_TK: Tensor
    target_TK: Tensor  # where `reroute` would send the pair
    gain_TKE: Tensor  # cos(g2_n, gbar2_e) for every expert. One token alone on two experts ties them, up to rounding
    consistency: float
    consistency_std: float
    conflict_ratio: float
    cos_TKL: Tensor  # the terms of the similarity, by linear
    similarity_others_TK: Tensor  # extension: by the mean of the other pairs of the expert; always of bias gradients
    judged_others_TK: Tensor
    conflict_others_TK: Tensor
    conflict_ratio_others: float
    consistency_by_chance: float
    count_E: Tensor  # pairs on each expert
    load_E: Tensor  # the same as a fraction of all pairs: f_e of eq. 9
    bias_grads: dict[tuple[int, int], dict[str, Tensor]]  # (t, k) -> linear -> gradient, shape O
    weight_grads: dict[tuple[int, int], dict[str, Tensor]]  # (t, k) -> linear -> gradient, shape I, O


def cos(a_P: Tensor, b_P: Tensor) -> float:
    """Cosine; 0 if either is a zero vector."""
    norms = (a_P.norm() * b_P.norm()).item()
    return (a_P.flatten() @ b_P.flatten()).item() / norms if norms > 0 else 0.0


def is_nonzero(grad_P: Tensor) -> bool:
    return bool((grad_P != 0).any())


def mean(values: Sequence):
    return sum(values) / len(values)


def judge(net, x_TD, labels_T, keep_T, tau: float = 0.0, gradients: str = "bias") -> list[Judgement]:
    """Judge every pair of every layer by the gradient of the main loss alone."""
    assert gradients in ("bias", "weight")
    logits_TC, traces = forward(net, x_TD.detach().to(torch.float64), keep_T)
    main_loss = main_loss_of(logits_TC, labels_T, keep_T)
    return [judge_layer(layer, trace, main_loss, tau, gradients) for layer, trace in zip(net.layers, traces)]


def judge_layer(layer: RefLayer, trace: Trace, main_loss: Tensor, tau: float, gradients: str) -> Judgement:
    expert_of, experts = trace.expert_of, range(len(layer.router_ED))
    linears = ["in", "out"] if layer.w_gate_EDF is None else ["gate", "in", "out"]
    pairs_on = {e: [pair for pair in expert_of if expert_of[pair] == e] for e in experts}

    bias_grads, weight_grads = {}, {}
    for pair, leaves in trace.leaves_of.items():  # one backward per pair
        flat = [leaf for name in linears for leaf in leaves[name]]
        grads = torch.autograd.grad(main_loss, flat, retain_graph=True, materialize_grads=True)
        bias_grads[pair] = dict(zip(linears, grads[0::2]))
        weight_grads[pair] = dict(zip(linears, grads[1::2]))

    def mean_gradient(grads: dict, e: int, name: str) -> Tensor | None:
        """gbar_e of one linear, eq. 7 and 11; None without pairs. Zero gradients only shorten it: no cosine notices."""
        return mean([grads[pair][name] for pair in pairs_on[e]]) if pairs_on[e] else None

    judged_by = bias_grads if gradients == "bias" else weight_grads
    judged = [pair for pair in expert_of if any(is_nonzero(judged_by[pair][name]) for name in linears)]
    gbar = {(e, name): mean_gradient(judged_by, e, name) for e in experts for name in linears}
    similarity, cosines = {}, {}  # eq. 12
    for pair in judged:
        cosines[pair] = [cos(judged_by[pair][name], gbar[expert_of[pair], name]) for name in linears]
        similarity[pair] = mean(cosines[pair])
    conflict = [pair for pair in judged if similarity[pair] < tau]

    similarity_others = {}  # extension: a pair without others, or whose others have no gradient, is not judged by them
    for pair in expert_of:
        others = [other for other in pairs_on[expert_of[pair]] if other != pair]
        of_linear = []
        for name in linears:
            rest = sum((bias_grads[other][name] for other in others), torch.zeros_like(bias_grads[pair][name]))
            of_linear.append((bias_grads[pair][name], rest))
        if any(is_nonzero(own) and is_nonzero(rest) for own, rest in of_linear):
            similarity_others[pair] = mean([cos(own, rest) for own, rest in of_linear])
    conflict_others = [pair for pair in similarity_others if similarity_others[pair] < tau]
    alone = [pair for pair in judged if pair not in similarity_others]
    judged_on = [sum(expert_of[pair] == e for pair in judged) for e in experts]

    gain, target = {}, {}  # extension (design.md, Idea 3): the best expert, by g2, among those that the token is not on
    gbar_out = {e: mean_gradient(bias_grads, e, "out") for e in experts}
    for t, k in expert_of:
        gain[t, k] = [cos(bias_grads[t, k]["out"], gbar_out[e]) if pairs_on[e] else 0.0 for e in experts]
        free = [e for e in experts if e not in [expert_of.get((t, other)) for other in range(layer.top_k)]]
        target[t, k] = max(free, key=gain[t, k].__getitem__) if free else NOWHERE  # a tie: the lowest expert

    consistency = []  # sec. 4.3, one value per expert that has a judged pair; always of bias gradients
    for e in sorted({expert_of[pair] for pair in judged}):
        of_linear = []
        for name in linears:
            grads = [bias_grads[pair][name] for pair in pairs_on[e] if is_nonzero(bias_grads[pair][name])]
            cosines_NN = [[cos(a_O, b_O) for b_O in grads] for a_O in grads]
            of_linear.append(mean([mean(row_N) for row_N in cosines_NN]) if grads else 0.0)
        consistency.append(mean(of_linear))
    center = mean(consistency) if consistency else 0.0
    variance = mean([(c - center) ** 2 for c in consistency]) if consistency else 0.0

    count_E = torch.tensor([len(pairs_on[e]) for e in experts], dtype=torch.float64)

    def table(values: dict, default, dtype=torch.float64) -> Tensor:
        pairs_TK = [[values.get((t, k), default) for k in range(layer.top_k)] for t in range(len(trace.x_TD))]
        return torch.tensor(pairs_TK, dtype=dtype)

    return Judgement(
        expert_ids_TK=table(expert_of, NOWHERE, torch.int64),
        similarity_TK=table(similarity, 0.0, torch.float64),
        judged_TK=table(dict.fromkeys(judged, True), False, torch.bool),
        conflict_TK=table(dict.fromkeys(conflict, True), False, torch.bool),
        target_TK=table(target, NOWHERE, torch.int64),
        gain_TKE=table(gain, [0.0] * len(experts), torch.float64),
        consistency=center,
        consistency_std=variance**0.5,
        conflict_ratio=len(conflict) / len(expert_of),
        cos_TKL=table(cosines, [0.0] * len(linears)),
        similarity_others_TK=table(similarity_others, 0.0),
        judged_others_TK=table(dict.fromkeys(similarity_others, True), False, torch.bool),
        conflict_others_TK=table(dict.fromkeys(conflict_others, True), False, torch.bool),
        conflict_ratio_others=len(conflict_others) / (len(expert_of) - len(alone)),
        consistency_by_chance=mean([1 / number for number in judged_on if number]) if judged else 0.0,
        count_E=count_E,
        load_E=count_E / len(expert_of),
        bias_grads=bias_grads,
        weight_grads=weight_grads,
    )


# ---- What is done about them: sec. 3.3, eq. 8, 9, 10, 13, 14 ----
def conflict_loss_of(kind: str, z_TE: Tensor, picked_TK: Tensor, judgement: Judgement) -> Tensor:
    """Mean over the picked pairs of one layer; none: 0. A pair that `reroute` can send nowhere counts as not picked."""
    terms = []
    for t, k in picked_TK.nonzero().tolist():
        e, target, z_E = judgement.expert_ids_TK[t, k], judgement.target_TK[t, k], z_TE[t]
        assert e != NOWHERE, "padding cannot be picked"
        if kind == "ce":  # eq. 8, 14
            terms.append(-log_softmax(-z_E)[e])
        elif kind == "mse":  # eq. 13
            terms.append(softmax(z_E)[e] ** 2)
        elif kind == "reroute" and target != NOWHERE:  # extension (design.md, Idea 3)
            terms.append(-log_softmax(z_E)[target])
    return mean(terms) if terms else torch.zeros((), dtype=torch.float64)


def balance_loss_of(z_TE: Tensor, keep_T: Tensor, load_E: Tensor) -> Tensor:
    """E * sum_e f_e P_e. eq. 9"""
    mean_probs_E = mean([softmax(z_E) for z_E, keep in zip(z_TE, keep_T) if keep])
    return len(load_E) * sum(f * p for f, p in zip(load_E, mean_probs_E))


class Total(NamedTuple):
    main: float
    balance: float  # mean over all layers, before alpha
    conflict: float  # mean over the judged layers, before beta
    total: float
    balance_L: list[float]
    conflict_L: list[float]  # 0 for a layer that is not judged
    grads: dict[str, Tensor]  # gradient of the total by name: "layers.0.router_ED", ..., "head_CD" and "x_TD"
    judgements: list[Judgement]  # of every layer, judged or not


def total_loss_and_grads(
    net, x_TD, labels_T, keep_T, *, conflict_loss="ce", alpha=0.01, beta=1.0, tau=0.0, gradients="bias",
    router_only=False, layers: Sequence[int] | None = None, picked: Sequence[Tensor | None] | None = None,
) -> Total:  # fmt: skip
    """main + alpha * balance + beta * conflict, and its gradient. eq. 10

    `layers`: the judged layers (None: all). `picked[l]`: a mask_TK that replaces the conflict mask of layer l (None:
    keep it). `router_only`: the logits in both regularisers come from x.detach(), so they train the routers alone.
    """
    assert conflict_loss in ("none", "ce", "mse", "reroute")
    judgements = judge(net, x_TD, labels_T, keep_T, tau, gradients)
    x_TD = x_TD.detach().to(torch.float64).requires_grad_()
    logits_TC, traces = forward(net, x_TD, keep_T)
    main = main_loss_of(logits_TC, labels_T, keep_T)
    balance_L, conflict_L = [], []
    for i, (layer, trace, judgement) in enumerate(zip(net.layers, traces, judgements)):
        z_TE = (trace.x_TD.detach() if router_only else trace.x_TD) @ layer.router_ED.T
        balance_L.append(balance_loss_of(z_TE, keep_T, judgement.load_E))
        picked_TK = judgement.conflict_TK if picked is None or picked[i] is None else picked[i]
        if layers is not None and i not in layers:
            picked_TK = torch.zeros_like(picked_TK)
        conflict_L.append(conflict_loss_of(conflict_loss, z_TE, picked_TK, judgement))
    balance = mean(balance_L)
    conflict = sum(conflict_L) / len(net.layers if layers is None else layers)
    total = main + alpha * balance + beta * conflict
    named = {**net.parameters(), "x_TD": x_TD}
    grads = torch.autograd.grad(total, list(named.values()), materialize_grads=True)
    values = [value.item() for value in (main, balance, conflict, total)]
    per_layer = [[value.item() for value in row_L] for row_L in (balance_L, conflict_L)]
    return Total(*values, *per_layer, dict(zip(named, grads)), judgements)
