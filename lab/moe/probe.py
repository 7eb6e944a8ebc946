"""What the flags of a model measure: statistics of token gradients. `lab.moe.film` uses the first two sections in every
training, `lab.report.probe` the others on saved models.

P judged pairs of one layer and batch, sorted by expert; E experts; L linears of an expert, each from I to O; T tokens of the
batch; C pairs of pairs; N anything.

  1 A layer  2 With every film  3 Agreement  4 Causes  5 Confusing tokens  6 Leaving pairs out
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stgc import Verdict, compare_to_means, flag_conflicts, widen
from stgc_plus import LayerStep, draw_placebo

TINY = 1e-37  # the shortest gradient with a direction, as in stgc_plus

# ---- 1. A layer ----


class Layer(NamedTuple):
    """The judged pairs of one layer in one batch, sorted by expert."""

    tokens_P: Tensor  # their places in the flattened batch
    experts_P: Tensor
    conflict_P: Tensor
    similarity_P: Tensor  # by the gradients of the biases, eq. 12
    whole_P: Tensor  # the same by whole weights
    length_P: Tensor  # of the gradient, over all linears
    inputs: list[Tensor]  # a_PI of each linear; the first one has the layer's input tokens
    grads: list[Tensor]  # g_PO
    means: list[Tensor]  # gbar_EO, up to a factor

    def only(self, keep_P: Tensor) -> "Layer":
        """Some of the pairs, with the means of all."""
        rows = {name: getattr(self, name)[keep_P] for name in self._fields if name.endswith("_P")}
        return self._replace(
            **rows, inputs=[a_PI[keep_P] for a_PI in self.inputs], grads=[g_PO[keep_P] for g_PO in self.grads]
        )


def layer_of(step: LayerStep, verdict: Verdict) -> Layer | None:
    """From a step and its verdict after `STGC.loss`, of a config with two passes and gradients="weight". The flags are the
    paper's, by the biases, all the same. None if no pair has a gradient."""
    if not step.grads or not verdict.judged_TK.any():
        return None
    pairs = step.pairs
    grads, inputs = zip(*((g_SO, step.linears[i][0]) for i, parts in sorted(step.grads.items()) for g_SO in parts))
    found = [compare_to_means(g_SO, pairs) for g_SO in grads]
    own = flag_conflicts(found, pairs, step.config.tau)

    def rows_P(rows_TK: Tensor) -> Tensor:
        return rows_TK.flatten()[pairs.order_S][judged_S]

    judged_S = own.judged_TK.flatten()[pairs.order_S]
    columns = (pairs.expert_ids_TK, own.conflict_TK, own.similarity_TK, verdict.similarity_TK, own.norm_TKL.norm(dim=-1))
    tokens_P = pairs.order_S[judged_S] // pairs.expert_ids_TK.shape[1]
    rows = ([widen(rows_S[judged_S]) for rows_S in some] for some in (inputs, grads))
    return Layer(tokens_P, *map(rows_P, columns), *rows, [one.mean_EO for one in found])


# ---- 2. With every film ----

MOST = 512  # judged pairs of an expert whose cosines with each other are computed: evenly spaced ones


def pearson(one_N: Tensor, other_N: Tensor) -> float | None:
    """Pearson's correlation. None if one of them does not vary."""
    one_N, other_N = (row - row.mean() for row in (one_N.double(), other_N.double()))
    scale = (one_N.norm() * other_N.norm()).item()
    return (one_N @ other_N).item() / scale if scale > 0 else None


def cosines_within_experts(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """index_2C, feature_C, gradient_C: two pairs n < m of one expert, the cosine of their input tokens, and that of their
    gradients, the mean over the linears. All experts in a row."""
    found = []
    for expert in layer.experts_P.unique().tolist():
        index_N = (layer.experts_P == expert).nonzero().flatten()
        index_N = index_N[torch.linspace(0, len(index_N) - 1, min(len(index_N), MOST)).long()]
        n, m = torch.triu_indices(len(index_N), len(index_N), 1)
        units = [F.normalize(rows_PO[index_N], dim=-1, eps=TINY) for rows_PO in (layer.inputs[0], *layer.grads)]
        feature_C, *cosines = ((unit_NO @ unit_NO.T)[n, m] for unit_NO in units)
        found.append((index_N[torch.stack([n, m])], feature_C, torch.stack(cosines).mean(0)))
    return tuple(torch.cat(parts, dim=-1) for parts in zip(*found))


def relations(layer: Layer | None, num_pairs: int) -> dict:
    """feature_gradient: Pearson of the cosines of two tokens on an expert, of their features and of their gradients (table
    13). bias_weight: of the pairs' similarities by biases and by whole weights (sec. 6.1). conflict_ratio_bias: the
    share of the layer's `num_pairs` that conflict by the biases. conflict_ratio_others is by the biases, too, so compare
    these two: conflict_ratio itself is by whole weights in a variant that trains with them."""
    if layer is None:
        return dict.fromkeys(("feature_gradient", "bias_weight", "conflict_ratio_bias"))
    _, feature_C, gradient_C = cosines_within_experts(layer)
    found = {"feature_gradient": pearson(feature_C, gradient_C), "bias_weight": pearson(layer.similarity_P, layer.whole_P)}
    return found | {"conflict_ratio_bias": layer.conflict_P.sum().item() / num_pairs}


def from_stats(stats: dict) -> dict:
    """What a layer's statistics of the same step add: of the biases, also with gradients="weight"."""
    return {key: stats.get(key) for key in ("conflict_ratio_others", "consistency_by_chance", "consistency_std")}


def for_record(film: dict) -> list[dict]:
    """The probe of a run for results.json, from the content of its film: the first, the middle and the last moment. `moved`
    is the mean over the moments with a twin that lie within a quarter of the training from this one, for the last moment
    thus over the last quarter. None without any."""
    steps, rows = film["steps"], []
    for one in film["probe"]:
        number, layers = one["moment"], []
        near = [i for i, step in enumerate(steps) if abs(step - steps[number]) <= steps[-1] / 4]
        for layer, own in zip(film["layers"], one["layers"]):
            moved = mean_of([layer["moved"][i] for i in near if i < len(layer["moved"])])
            row = {key: layer[key][number] for key in ("margin", "conflict_ratio", "consistency", "load", "histogram")}
            layers.append({"name": layer["name"], "moved": moved} | row | own)
        rows.append({"step": steps[number], "loss": film["loss"][number], "delta": film["run"]["delta"], "layers": layers})
    return rows


# ---- 3. Agreement: do other batches give the same flags? ----


def kappa(one_N: Tensor, other_N: Tensor) -> float | None:
    """Cohen's kappa of two rows of flags: (agreement - chance) / (1 - chance). None where chance alone agrees always."""
    p, q = one_N.double().mean().item(), other_N.double().mean().item()
    chance = p * q + (1 - p) * (1 - q)
    return ((one_N == other_N).double().mean().item() - chance) / (1 - chance) if chance < 1 else None  # NaN is not < 1


def flags_by(layer: Layer, means: Sequence[Tensor], tau: float) -> tuple[Tensor, Tensor]:
    """The flags of the pairs by other means, gbar_EO of each linear, and for which pairs these have a direction."""
    units = [F.normalize(gbar_EO, dim=-1, eps=TINY) for gbar_EO in means]
    cosines = [
        (F.normalize(g_PO, dim=-1, eps=TINY) * unit_EO[layer.experts_P]).sum(-1) for g_PO, unit_EO in zip(layer.grads, units)
    ]
    known_E = torch.stack([unit_EO.any(-1) for unit_EO in units]).any(0)
    return torch.stack(cosines).mean(0) < tau, known_E[layer.experts_P]


def agreement(three: Sequence[Layer], tau: float) -> float | None:
    """Kappa of the flags of one batch by the means of two others, all three of one layer. The mean of the three ways to
    choose the one. None if no way has a kappa."""
    found = []
    for own, one, other in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        (flags_P, known_P), (others_P, too_P) = (flags_by(three[own], three[i].means, tau) for i in (one, other))
        found.append(kappa(flags_P[known_P & too_P], others_P[known_P & too_P]))
    return mean_of(found)


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of the numbers among them. None without any."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def error_of(values: Sequence[float | None]) -> float | None:
    """The standard error of that mean. None for fewer than two numbers."""
    values = [value for value in values if value is not None]
    return torch.tensor(values, dtype=torch.float64).std().item() / math.sqrt(len(values)) if len(values) > 1 else None


# ---- 4. Causes: what are the flags about? ----


def explained(flags_N: Tensor, groups_N: Tensor) -> tuple[float, float] | None:
    """The share of the flags' variance that lies between the groups (eta squared), and its mean over all permutations of
    `groups_N`, which is (G - 1) / (N - 1) for G groups. None if the flags do not vary."""
    flags_N, (groups, group_N, count_G) = flags_N.double(), groups_N.unique(return_inverse=True, return_counts=True)
    total = (flags_N - flags_N.mean()).square().sum().item() if len(flags_N) else 0.0
    if not total:
        return None
    mean_G = torch.zeros(len(groups), dtype=torch.float64, device=flags_N.device).index_add_(0, group_N, flags_N) / count_G
    between = (count_G * (mean_G - flags_N.mean()).square()).sum().item()
    return between / total, (len(groups) - 1) / (len(flags_N) - 1)


# ---- 5. Confusing tokens: similar features, opposite gradients ----


def confusing(layer: Layer, logits_TV: Tensor, labels_T: Tensor) -> list[float]:
    """Table 14. Of the pairs of tokens on one expert whose feature cosine is in the top tenth and whose gradient cosine in
    the bottom tenth: their number, and the sums of the two tokens' mean logits on the own label, on the other's, on all the
    rest. The tenths are those of this layer and batch, over all its experts. Then pairs with equal labels are left out. Two
    tokens that share two experts count twice, as they do in two layers or batches. labels_T is negative for tokens without
    a loss of their own, which are left out before."""
    layer = layer.only(labels_T[layer.tokens_P] >= 0)
    if len(layer.tokens_P) < 2 or not len((found := cosines_within_experts(layer))[1]):
        return [0.0] * 4
    index_2C, feature_C, gradient_C = found
    tenth = math.ceil(len(feature_C) / 10)
    picked_C = (feature_C >= -(-feature_C).kthvalue(tenth).values) & (gradient_C <= gradient_C.kthvalue(tenth).values)
    tokens_2C = layer.tokens_P[index_2C[:, picked_C]]
    labels_2C = labels_T[tokens_2C]
    tokens_2C, labels_2C = (rows_2C[:, labels_2C[0] != labels_2C[1]] for rows_2C in (tokens_2C, labels_2C))
    logits_2CV = widen(logits_TV)[tokens_2C]
    own_2C, other_2C = (
        logits_2CV.gather(-1, label_2C.unsqueeze(-1)).squeeze(-1) for label_2C in (labels_2C, labels_2C.flip(0))
    )
    rest_2C = (logits_2CV.sum(-1) - own_2C - other_2C) / max(logits_TV.shape[1] - 2, 1)
    return [float(tokens_2C.shape[1]), *(rows_2C.mean(0).sum().item() for rows_2C in (own_2C, other_2C, rest_2C))]


# ---- 6. Leaving pairs out: does a conflicting token harm its expert? ----

ARMS = ("all", "no conflicting", "no random", "no random of equal length")


def arms(layer: Layer, expert: int, seed: int, bins: int = 10) -> dict[str, Tensor]:
    """keep_P of the expert's pairs in each of ARMS. Like the placebo, the random pairs are drawn from all of the expert: as
    many as conflict, then as many in each tenth of the lengths of the biases' gradients (of whole weights they differ)."""
    on_P = layer.experts_P == expert
    conflict_P = layer.conflict_P & on_P
    rank_P = layer.length_P.masked_fill(~on_P, torch.inf).argsort().argsort()
    bin_P = rank_P * bins // on_P.sum().clamp_min(1)
    alike_P = torch.zeros_like(on_P)
    for number in range(bins):
        own_P = on_P & (bin_P == number)
        alike_P |= draw_placebo(conflict_P & own_P, own_P, seed + 1 + number)
    left_out = (torch.zeros_like(on_P), conflict_P, draw_placebo(conflict_P, on_P, seed), alike_P)
    return {name: on_P & ~out_P for name, out_P in zip(ARMS, left_out)}


def expert_gradient(layer: Layer, keep_P: Tensor, bias: bool) -> list[Tensor]:
    """The gradient of an expert's parameters from some of its pairs alone, as a sum over pairs: for each linear its weight
    (I, O), then with `bias` its bias (O)."""
    kept = layer.only(keep_P)
    found = [[a_PI.T @ g_PO, g_PO.sum(0)][: 1 + bias] for a_PI, g_PO in zip(kept.inputs, kept.grads)]
    return [grad for grads in found for grad in grads]
