"""stgc.py against its oracle, its properties and its promises. Each docstring says what would be wrong if its test failed.

`make_net`, `make_batch` and `run` (one forward and backward under a fresh STGC object) live in conftest.py. Everything is
float64 unless a test is about another dtype, so a difference above rounding is an error of the method.
"""

import copy
import functools
import gc
import math
import pickle
import re
import shutil
import weakref
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import Batch, close, main_loss, make_batch, make_net, run, same_grads, same_verdicts, train_step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import stgc as stgc_module
import stgc_plus
from stgc import MoELayer, Router, balance_loss, route
from stgc_plus import CONFLICT_LOSSES, STGC, Experts, LayerStep, STGCConfig, draw_placebo

PASSES, GRADIENTS, KINDS = ("two", "one"), ("bias", "weight"), ("ce", "mse", "reroute")
both_passes = pytest.mark.parametrize("passes", PASSES)
both_gradients = pytest.mark.parametrize("gradients", GRADIENTS)


# ---- 1. The oracle ----

NETS = {  # options of the net and of STGC, and a seed that gives each layer conflicting, agreeing and unjudged pairs
    "top1": ({"top_k": 1}, {"tau": 0.4}, 4),
    "top2": ({}, {}, 3),
    "all on": ({"top_k": 4}, {}, 1),
    "no biases": ({"bias": False}, {}, 6),
    "gated": ({"gated": True, "activation": F.silu}, {}, 34),
    "gated, no biases, top1": ({"gated": True, "bias": False, "activation": F.silu, "top_k": 1}, {"tau": 0.4}, 2),
    "scores not normalised": ({"normalize": False, "scale": 2.0}, {"tau": 0.1, "alpha": 0.3, "beta": 0.7}, 1),
    "layer 1 of 3": ({"num_layers": 3}, {"layers": (1,)}, 16),
}
CASES = [
    (name, gradients, kind)
    for name in NETS
    for gradients in GRADIENTS
    for kind in (*KINDS, "none")
    if (name, kind) != ("all on", "reroute") and (name in ("top2", "gated") or kind in ("ce", "reroute"))
]


@functools.cache
def oracle_case(name: str, gradients: str):
    """A net, a batch, the oracle's copy of the net, and its judgements, which depend on no switch of the losses."""
    options, config, seed = NETS[name]
    torch.manual_seed(seed)
    net, batch = make_net(**options), make_batch(tokens=12)
    layers = []
    for layer in net.layers:
        switches = {"top_k": layer.top_k, "normalize": layer.normalize, "scale": layer.scale}
        stacked = dict(layer.experts.named_parameters())
        layers.append(reference.RefLayer(layer.router.weight, **stacked, **switches, act=layer.experts.activation))
    ref = reference.RefNet(layers, net.head.weight, after_block=torch.tanh)
    return net, batch, ref, reference.judge(ref, *batch, config.get("tau", 0.0), gradients)


def same_as_oracle(result, expected, passes: str, alpha: float, judged, of=stgc_plus):
    """Every number that STGC reports or leaves behind; the outputs themselves enter through the main loss."""
    names = {"router.weight": "router_ED", "head.weight": "head_CD", "experts.": ""}
    renamed = functools.partial(re.sub, "|".join(names), lambda match: names[match[0]])
    same_grads({renamed(name): grad for name, grad in result.grads.items()}, expected.grads)
    early = expected.main + alpha * expected.balance  # with one pass L_CEL is known after the backward only
    close(result.total, early if passes == "one" else expected.total)
    for i, (verdict, row, truth) in enumerate(zip(result.verdicts, result.stats, expected.judgements, strict=True)):
        close(row["load"], truth.load_E)
        close(row["balance_loss"], expected.balance_L[i])
        if judged is not None and i not in judged:
            assert verdict is None and "conflict_ratio" not in row
            continue
        close(verdict.similarity_TK, truth.similarity_TK)
        assert torch.equal(verdict.judged_TK, truth.judged_TK)
        assert torch.equal(verdict.conflict_TK, truth.conflict_TK)
        close(verdict.cos_TKL, truth.cos_TKL)
        extended = ("consistency_by_chance", "conflict_ratio_others") if of is stgc_plus else ()
        for name in ("conflict_ratio", "consistency", "consistency_std", *extended):
            close(row[name], getattr(truth, name))
        if of is stgc_plus:
            close(row["judged_ratio"], truth.judged_TK.sum() / truth.count_E.sum())
        close(row.get("conflict_loss", 0.0), expected.conflict_L[i])


@pytest.mark.parametrize("name, gradients, kind", CASES)
def test_oracle(name, gradients, kind, monkeypatch):
    """Similarities, flags, statistics, losses and all gradients equal those of one backward per pair, in both passes."""
    net, batch, ref, judgements = oracle_case(name, gradients)
    monkeypatch.setattr(reference, "judge", lambda *_: judgements)  # once per net: it takes most of the time
    config = {"conflict_loss": kind, "alpha": 0.1} | NETS[name][1]
    for router_only in (False, True):
        expected = reference.total_loss_and_grads(ref, *batch, gradients=gradients, router_only=router_only, **config)
        for passes in ("two", "one")[: 1 + router_only]:
            result = run(net, batch, passes=passes, gradients=gradients, router_only=router_only, **config)
            same_as_oracle(result, expected, passes, config["alpha"], config.get("layers"))
            for verdict, truth in zip(result.verdicts, judgements, strict=True):
                if verdict is not None and kind == "reroute":
                    assert torch.equal(verdict.target_TK[truth.conflict_TK], truth.target_TK[truth.conflict_TK])


PAPER = [(name, kind) for name in NETS for kind in ("ce", "mse", "none") if "layers" not in NETS[name][1]]


@pytest.mark.parametrize("name, kind", PAPER)
def test_oracle_of_the_paper_alone(name, kind, monkeypatch):
    """The same of stgc.py by itself: its own loop over slices, its own sums, two passes, bias gradients."""
    options, config, seed = NETS[name]
    _, batch, ref, judgements = oracle_case(name, "bias")
    torch.manual_seed(seed)
    net, config = make_net(**options, of=stgc_module), {"conflict_loss": kind, "alpha": 0.1} | config
    monkeypatch.setattr(reference, "judge", lambda *_: judgements)
    expected = reference.total_loss_and_grads(ref, *batch, **config)
    result = run(net, batch, of=stgc_module, **config)
    same_as_oracle(result, expected, "two", config["alpha"], None, of=stgc_module)


@both_passes
@pytest.mark.parametrize("name", NETS)
def test_oracle_of_the_others(name, passes):
    """leave_one_out: a pair against the other pairs of its expert, summed up one by one; the loss and its gradients."""
    net, batch, ref, judgements = oracle_case(name, "bias")
    config = {"router_only": True, "alpha": 0.1} | NETS[name][1]
    result = run(net, batch, passes=passes, leave_one_out=True, **config)
    for verdict, truth in zip(result.verdicts, judgements, strict=True):
        if verdict is not None:
            close(verdict.similarity_TK[truth.judged_others_TK], truth.similarity_others_TK[truth.judged_others_TK])
            assert torch.equal(verdict.judged_TK, truth.judged_others_TK)
            assert torch.equal(verdict.conflict_TK, truth.conflict_others_TK)
    picked = [truth.conflict_others_TK for truth in judgements]
    same_grads(
        {key.replace("router.weight", "router_ED").replace("head.weight", "head_CD").replace("experts.", ""): grad
         for key, grad in result.grads.items()},
        reference.total_loss_and_grads(ref, *batch, picked=picked, **config).grads,
    )  # fmt: skip
    assert any((truth.conflict_others_TK != truth.conflict_TK).any() for truth in judgements)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6, 1e15])
def test_others_keep_their_digits(scale):
    """One gradient outweighs all others of its expert, in float32: G_e - g_n has no digit of theirs left, and a plain
    subtraction gives a cosine of noise. A pair alone on its expert is not judged by others, nor counted."""
    grads_SO, ids_S = torch.randn(60, 24), torch.randint(4, (60,)).sort().values
    ids_S[-1] = 4  # alone
    grads_SO[[3, 40]] *= scale  # on two experts
    pairs = stgc_plus.Pairs(ids_S.unsqueeze(1), torch.ones(60, 1), 6)  # and an expert without pairs
    one = stgc_module.compare_to_means(grads_SO[pairs.order_S], pairs)
    alone = SimpleNamespace(group=None, num_processes=1, average=lambda tensor: tensor)
    found = stgc_plus.compare_to_others(grads_SO[pairs.order_S], one, pairs, alone)
    for n in range(59):
        rest_O = (grads_SO.double() * ((ids_S == ids_S[n]) & (torch.arange(60) != n)).unsqueeze(1)).sum(0)
        truth = F.cosine_similarity(grads_SO[n].double(), rest_O, dim=0)
        close(found.cos_S[n], truth, rtol=1e-5, atol=2e-5)
    assert found.norm_S[:59].all() and not found.norm_S[59]


def test_unrelated_gradients_are_consistent_by_chance():
    """1/N from the diagonal of the cosine matrix alone: an expectation, no bound, since g and -g give 0."""
    grads_SO, ids_S = torch.randn(4000, 200, dtype=torch.float64), torch.arange(4000) % 400  # 10 pairs on each expert
    pairs = stgc_plus.Pairs(ids_S.unsqueeze(1), torch.ones(4000, 1, dtype=torch.float64), 400)
    found = stgc_module.compare_to_means(grads_SO[pairs.order_S], pairs)
    assert abs(found.consistency_E.mean() - 1 / 10) < 0.002
    opposed = stgc_module.find_conflicts([torch.tensor([[1.0, 2.0], [-1.0, -2.0]])], torch.zeros(2, dtype=torch.long), 1)
    assert opposed.judged_TK.all() and not opposed.conflict_TK.any()
    pairs = stgc_module.Pairs(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), 1)
    assert stgc_module.compare_to_means(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), pairs).consistency_E == 0


@both_gradients
@pytest.mark.parametrize("name", NETS)
def test_the_oracle_has_something_to_say(name, gradients):
    """Conflicting, agreeing and unjudged pairs and padding in every layer above: a comparison without them proves little."""
    for truth in oracle_case(name, gradients)[3]:
        real_TK = truth.expert_ids_TK >= 0
        assert 1 < truth.conflict_TK.sum() < truth.judged_TK.sum() < real_TK.sum() < real_TK.numel()


@both_passes
@pytest.mark.parametrize("name", ["top2", "gated"])
def test_oracle_with_the_placebo(name, passes):
    """The pairs that the placebo picks get the loss that conflicting ones would; the statistics stay the true ones."""
    net, batch, ref, _ = oracle_case(name, "bias")
    result = run(net, batch, passes=passes, router_only=True, select="random", seed=7)
    picked = [verdict.picked_TK for verdict in result.verdicts]
    expected = reference.total_loss_and_grads(ref, *batch, router_only=True, picked=picked)
    same_as_oracle(result, expected, passes, 0.01, None)
    assert any((mask_TK != truth.conflict_TK).any() for mask_TK, truth in zip(picked, expected.judgements, strict=True))


def test_reroute_needs_an_expert_to_go_to():
    """With every expert on there is no other one: an error, not a loss towards some expert."""
    with pytest.raises(ValueError, match="reroute"):
        STGC(make_net(top_k=4), STGCConfig(conflict_loss="reroute"))


# ---- 2. One pass and two ----


@pytest.mark.slow
@pytest.mark.parametrize("case", ["200 bias float64", "200 bias float32", "40 weight float64"])
def test_one_pass_flags_what_two_passes_flag(case):
    """At every step of training 6 layers: the same flags and gradients. Else what reaches a tap is not the main loss's
    gradient alone. In float32 at most 1 pair in 10000 may differ, and only within rounding of tau."""
    steps, gradients, dtype = int(case.split()[0]), case.split()[1], getattr(torch, case.split()[2])
    net, teacher = make_net(num_layers=6, dtype=dtype), torch.randn(3, 8, 3, dtype=dtype)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    pairs = flips = conflicts = 0
    for _ in range(steps):
        x_TD, task_T = torch.randn(18, 8, dtype=dtype), torch.arange(18) % 3  # three tasks: their tokens conflict
        batch = Batch(x_TD, (x_TD.unsqueeze(1) @ teacher[task_T]).squeeze(1).argmax(-1), task_T >= 0)
        two = run(net, batch, passes="two", gradients=gradients, router_only=True)
        one = run(net, batch, passes="one", gradients=gradients)
        for a, b in zip(one.verdicts, two.verdicts, strict=True):
            flipped_TK = a.conflict_TK != b.conflict_TK
            pairs, flips, conflicts = pairs + flipped_TK.numel(), flips + flipped_TK.sum(), conflicts + b.conflict_TK.sum()
            assert (b.similarity_TK[flipped_TK].abs() < 1e-5).all()
        if dtype == torch.float64:
            assert not flips
            close(*(torch.cat([grad.flatten() for grad in result.grads.values()]) for result in (one, two)))
        optimizer.step()
    assert flips <= 1e-4 * pairs
    assert 0.02 * pairs < conflicts < 0.6 * pairs  # there was something to disagree on


@pytest.mark.parametrize("router_only", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_two_passes_train_on_the_plain_sum_of_losses(kind, router_only):
    """Given the flags, the gradients are those of L_main + alpha L_bal + beta L_CEL written down as in the paper."""
    net, batch = make_net(num_layers=3), make_batch(tokens=20)
    result = run(net, batch, conflict_loss=kind, alpha=0.2, beta=0.5, router_only=router_only)
    h_TD = x_TD = batch.x_TD.clone().requires_grad_()
    balance, conflict = [], []
    for layer, verdict in zip(net.layers, result.verdicts, strict=True):
        logits_TE = F.linear(h_TD.detach() if router_only else h_TD, layer.router.weight)
        ids_TK = logits_TE.topk(2).indices
        share_E = F.one_hot(ids_TK[batch.keep_T], 4).to(h_TD.dtype).mean((0, 1))
        balance.append(4 * share_E @ logits_TE[batch.keep_T].softmax(-1).mean(0))
        t_C, k_C = verdict.conflict_TK.nonzero(as_tuple=True)
        e_C = ids_TK[t_C, k_C]
        conflict.append({
            "ce": lambda z_CE, e_C=e_C: F.cross_entropy(-z_CE, e_C),
            "mse": lambda z_CE, e_C=e_C: z_CE.softmax(-1)[torch.arange(len(e_C)), e_C].square().mean(),
            "reroute": lambda z_CE, to_C=verdict.target_TK[t_C, k_C]: F.cross_entropy(z_CE, to_C),
        }[kind](logits_TE[t_C]))  # fmt: skip
        h_TD = torch.tanh(h_TD + layer(h_TD, batch.keep_T))
    main = F.cross_entropy(net.head(h_TD), batch.labels_T)
    total = main + 0.2 * sum(balance) / 3 + 0.5 * sum(conflict) / 3
    named = {**dict(net.named_parameters()), "x_TD": x_TD}
    close(result.total, total.item())
    same_grads(result.grads, dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True)))


# ---- 3. Properties ----


@pytest.mark.parametrize("gated", [False, True])
def test_pair_gradients_sum_to_the_bias_gradient(gated, monkeypatch):
    """What is compared are a bias's gradients pair by pair: over the pairs of an expert they add up to autograd's."""
    seen, real = [], stgc_module.compare_to_means
    monkeypatch.setattr(stgc_module, "compare_to_means", lambda *args: seen.append(args[:2]) or real(*args))
    grads = run(make_net(num_layers=1, gated=gated), make_batch(), conflict_loss="none", alpha=0.0).grads
    biases = ["b_gate_EF", "b_in_EF", "b_out_ED"][not gated :]
    for name, (grad_SO, pairs) in zip(biases, seen, strict=True):
        close(pairs.onehot_SE.T @ grad_SO, grads[f"layers.0.experts.{name}"])


@both_passes
@both_gradients
def test_permuting_tokens_permutes_verdicts(passes, gradients):
    """A pair is judged by what it is, not by where it stands."""
    net, batch = make_net(), make_batch()
    order_T = torch.randperm(len(batch.x_TD))
    result = run(net, batch, passes=passes, gradients=gradients)
    permuted = run(net, Batch(*(t[order_T] for t in batch)), passes=passes, gradients=gradients)
    same_verdicts(permuted.verdicts, [type(v)(*(t[order_T] for t in v)) for v in result.verdicts])
    close(permuted.grads.pop("x_TD"), result.grads.pop("x_TD")[order_T])
    same_grads(permuted.grads, result.grads)


@both_passes
@both_gradients
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_scale_of_the_loss_flips_no_flag(passes, gradients, dtype):
    """Cosines have no scale: a mean over more tokens, or a loss scale, must not underflow into other flags."""
    net, batch = make_net(dtype=dtype), make_batch(dtype=dtype)
    full, tiny = (run(net, batch, scale, passes=passes, gradients=gradients) for scale in (1.0, 1e-9))
    rounding = 1e-9 if dtype == torch.float64 else 1e-5  # of a float32 cosine, with room
    assert all((v.similarity_TK.abs() > rounding)[v.judged_TK].all() for v in full.verdicts)
    same_verdicts(tiny.verdicts, full.verdicts, rtol=0, atol=rounding)


def test_grad_scale_changes_nothing_but_the_first_backward():
    """`loss(main, grad_scale)` keeps fp16 token gradients from underflowing; in float64 it must not be seen anywhere."""
    net, batch = make_net(), make_batch()
    expected, stgc = run(net, batch), STGC(net)
    x_TD = batch.x_TD.clone().requires_grad_()
    total = stgc.loss(main_loss(net, batch._replace(x_TD=x_TD)), grad_scale=2.0**10)
    close(total.item(), expected.total)
    same_verdicts(stgc.verdicts, expected.verdicts)


@both_passes
@both_gradients
def test_equal_tokens_never_conflict(passes, gradients):
    """They are their own mean: similarity 1."""
    one = make_batch(tokens=1, padding=0, unlabelled=0)
    batch = Batch(*(t.repeat_interleave(9, 0) for t in one))
    for verdict in run(make_net(), batch, passes=passes, gradients=gradients, tau=0.999).verdicts:
        close(verdict.similarity_TK, torch.ones(9, 2))
        assert verdict.judged_TK.all() and not verdict.conflict_TK.any()


@both_passes
@both_gradients
def test_zero_gradients_are_neither_flagged_nor_averaged(passes, gradients):
    """Padding, and tokens that the loss does not reach: no tau flags them, and the others are judged as without them."""
    net, batch = make_net(num_layers=1), make_batch(padding=3, unlabelled=4)
    config = {"passes": passes, "gradients": gradients, "tau": 0.99, "alpha": 0.0}
    result, reached_T = run(net, batch, **config), batch.labels_T >= 0
    (verdict,) = result.verdicts
    assert verdict.conflict_TK[reached_T].any() and not verdict.judged_TK[~reached_T].any()
    alone = run(net, Batch(*(t[reached_T] for t in batch)), **config)
    same_verdicts(alone.verdicts, [type(verdict)(*(t[reached_T] for t in verdict))])
    for key in ("consistency", "consistency_std"):
        close(result.stats[0][key], alone.stats[0][key])
    close(result.grads.pop("x_TD")[reached_T], alone.grads.pop("x_TD"))
    same_grads(result.grads, alone.grads)
    for tau in (0.99, 1.0, 3.0):
        (verdict,) = run(net, batch, **config | {"tau": tau}).verdicts
        assert not verdict.conflict_TK[~reached_T].any()


@both_passes
@both_gradients
def test_one_token(passes, gradients):
    """Alone on its experts it agrees with itself; and a batch that is padding but for one token is that token's."""
    net, token = make_net(), make_batch(tokens=1, padding=0, unlabelled=0)
    pad = make_batch(tokens=7, padding=7, unlabelled=0)
    alone = run(net, token, passes=passes, gradients=gradients)
    padded = run(net, Batch(*(torch.cat(both) for both in zip(pad, token, strict=True))), passes=passes, gradients=gradients)
    for verdict, more in zip(alone.verdicts, padded.verdicts, strict=True):
        close(verdict.similarity_TK, torch.ones(1, 2))
        assert not verdict.conflict_TK.any() and not more.judged_TK[:7].any()
        close(more.similarity_TK[7:], verdict.similarity_TK)
    assert not padded.grads["x_TD"][:7].any()
    padded.grads["x_TD"] = padded.grads["x_TD"][7:]
    same_grads(padded.grads, alone.grads)
    close([row["conflict_ratio"] for row in padded.stats], [0.0, 0.0])
    close(padded.total, alone.total)


@both_passes
@both_gradients
def test_nothing_but_padding(passes, gradients):
    """A process may get such a batch: zeros come out, and no number is NaN."""
    net, batch = make_net(), make_batch(padding=14)
    stgc = STGC(net, STGCConfig(passes=passes, gradients=gradients))
    out = net(batch.x_TD, batch.keep_T)
    stgc.loss(out.square().sum()).backward()
    assert not net.layers[0](batch.x_TD, batch.keep_T).any()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    for row in stgc.stats():
        assert row["conflict_ratio"] == row["conflict_loss"] == row["balance_loss"] == 0.0
        assert all(math.isfinite(number) for number in (row["consistency"], row["consistency_std"], *row["load"]))


@both_passes
@both_gradients
def test_an_expert_without_tokens(passes, gradients):
    """No mean, no gradient, no NaN; and it lowers neither the consistency of the others nor its std."""

    class Avoiding(Router):
        def forward(self, x_TD):
            return super().forward(x_TD) - torch.tensor([0.0, 0.0, 1e3, 0.0])  # -1e3: never chosen, probability 0

    net, batch = make_net(), make_batch()
    for layer in net.layers:
        layer.router.__class__ = Avoiding
    result = run(net, batch, passes=passes, gradients=gradients)
    for name, grad in result.grads.items():
        assert grad.isfinite().all(), name
        assert "experts" not in name or not grad[2].any(), name
    without = [0, 1, 3]
    for layer in net.layers:  # the same net with the expert taken out
        layer.router.__class__ = Router
        for module in (layer.router, layer.experts):
            for name, parameter in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(parameter.data[without]))
        layer.experts.num_experts = 3
    smaller = run(net, batch, passes=passes, gradients=gradients)
    same_verdicts(result.verdicts, smaller.verdicts)
    for row, expected in zip(result.stats, smaller.stats, strict=True):
        assert row["load"][2] == 0.0
        close([row["consistency"], row["consistency_std"]], [expected["consistency"], expected["consistency_std"]])


@both_passes
@both_gradients
def test_all_or_nothing_flagged(passes, gradients):
    """tau above 1 flags all judged pairs. Below -1 it flags none, and then training is bit by bit as without the loss."""
    net, batch = make_net(), make_batch()
    config = {"passes": passes, "gradients": gradients, "router_only": True}
    everything, nothing = (run(net, batch, **config, tau=tau) for tau in (2.0, -2.0))
    without = run(net, batch, **config, conflict_loss="none")
    for verdict, row in zip(everything.verdicts, everything.stats, strict=True):
        assert torch.equal(verdict.conflict_TK, verdict.judged_TK) and row["conflict_ratio"] == row["judged_ratio"] > 0.5
    for verdict, row in zip(nothing.verdicts, nothing.stats, strict=True):
        assert not verdict.conflict_TK.any() and row["conflict_ratio"] == row["conflict_loss"] == 0.0
    assert nothing.total == without.total
    for name, grad in without.grads.items():
        assert torch.equal(nothing.grads[name], grad), name
        assert torch.equal(everything.grads[name], grad) is ("router" not in name), name


@both_passes
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_forward_without_gradients_leaves_nothing_behind(passes, mode):
    """generate() or an evaluation between the forward and its loss must not change the loss: nanoMoE's mistake."""
    net, batch = make_net(), make_batch()
    expected, stgc = run(net, batch, passes=passes), STGC(net, STGCConfig(passes=passes))
    net.zero_grad()
    x_TD = batch.x_TD.clone().requires_grad_()
    main = main_loss(net, batch._replace(x_TD=x_TD))
    with torch.no_grad():
        getattr(net, mode)()
        net(torch.randn(5, 8, dtype=torch.float64))
        net.train()
    total = stgc.loss(main)
    total.backward()
    assert total.item() == expected.total and torch.equal(x_TD.grad, expected.grads["x_TD"])
    assert all(torch.equal(parameter.grad, expected.grads[name]) for name, parameter in net.named_parameters())
    assert stgc.stats() == expected.stats


@both_passes
@both_gradients
def test_the_latest_forward_counts(passes, gradients):
    """Two forwards before one loss: verdicts and statistics are those of the second, though one pass meets the first later,
    and the first trains on its main loss alone."""
    net, first, second = make_net(), make_batch(tokens=9), make_batch()
    config = {"passes": passes, "gradients": gradients, "router_only": True}
    expected, stgc = run(net, second, **config), STGC(net, STGCConfig(**config))
    net.zero_grad()
    early = main_loss(net, first)
    grads = dict(zip(names := [n for n, _ in net.named_parameters()], torch.autograd.grad(early, net.parameters())))
    stgc.loss(main_loss(net, first) + main_loss(net, second)).backward()
    same_verdicts(stgc.verdicts, expected.verdicts)
    for row, truth in zip(stgc.stats(), expected.stats, strict=True):
        close([row["conflict_ratio"], row["consistency"]], [truth["conflict_ratio"], truth["consistency"]])
    same_grads(
        {name: p.grad for name, p in net.named_parameters()}, {name: grads[name] + expected.grads[name] for name in names}
    )


@both_passes
def test_every(passes):
    """Between the judged steps the loss is main + alpha * balance, and the verdicts are those of the last judged step."""
    net, batches = make_net(), [make_batch() for _ in range(5)]
    config = {"passes": passes, "router_only": True}
    stgc, last = STGC(net, STGCConfig(every=3, **config)), None
    results = [train_step(stgc, net, batch) for batch in batches]
    stgc.detach()
    for step, (result, batch) in enumerate(zip(results, batches, strict=True)):
        judged = step % 3 == 0
        expected = run(net, batch, **config, conflict_loss="ce" if judged else "none")
        same_grads(result.grads, expected.grads)
        close(result.total, expected.total)
        last = expected.verdicts if judged else last
        same_verdicts(result.verdicts, last)
    never = run(net, batches[0], conflict_loss="none", every=0)
    close(never.total, run(net, batches[0], conflict_loss="none").total)
    assert never.verdicts == [None, None]


@both_passes
@both_gradients
def test_gradient_accumulation(passes, gradients):
    """Two halves, each loss divided by 2: the mean of the two gradients. One pass learns of the 2 in backward only."""
    net, batches = make_net(), [make_batch(), make_batch()]
    halves = [run(net, batch, passes=passes, gradients=gradients) for batch in batches]
    stgc = STGC(net, STGCConfig(passes=passes, gradients=gradients))
    net.zero_grad()
    for batch in batches:
        (stgc.loss(main_loss(net, batch)) / 2).backward()
    same_grads(
        {name: parameter.grad for name, parameter in net.named_parameters()},
        {name: (halves[0].grads[name] + halves[1].grads[name]) / 2 for name in halves[0].grads if name != "x_TD"},
    )


def graph_nodes(tensor) -> set:
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [after for after, _ in node.next_functions]
    return seen


@both_passes
def test_detach_and_takeover(passes):
    """An unwatched layer adds nothing: no node, no hook. The newest STGC object counts; an older one's detach spares it."""
    net, batch = make_net(), make_batch()
    config = STGCConfig(passes=passes)
    unwatched = main_loss(net, batch)
    first, second = STGC(net, config), STGC(net, config)
    first.detach()
    watched = main_loss(net, batch)
    with pytest.raises(RuntimeError, match="no forward"):
        first.loss(watched)
    second.loss(watched).backward()
    assert None not in second.verdicts
    second.detach()
    detached = main_loss(net, batch)
    assert torch.equal(detached, unwatched) and torch.equal(watched, unwatched)
    sizes = [len(graph_nodes(loss)) for loss in (detached, unwatched, watched)]
    assert sizes[0] == sizes[1] and (sizes[1] < sizes[2]) is (passes == "one")  # with two passes no watched one does either
    with pytest.raises(RuntimeError, match="no forward"):
        second.loss(detached)


def test_placebo():
    """As many judged pairs as conflict, but others; known from seed and step alone; the statistics stay the true ones."""
    net, batch = make_net(), make_batch(tokens=40, padding=6, unlabelled=6)
    truth = run(net, batch, router_only=True)

    def two_steps(seed, passes="two"):
        stgc = STGC(net, STGCConfig(select="random", seed=seed, passes=passes, router_only=True))
        return [train_step(stgc, net, batch) for _ in range(2)]

    results = [*two_steps(1), *two_steps(1, passes="one"), *two_steps(2)]
    for result in results:
        for a, b in zip(result.verdicts, truth.verdicts, strict=True):
            assert torch.equal(a.conflict_TK, b.conflict_TK)
            close(a.similarity_TK, b.similarity_TK)
            assert a.picked_TK.sum() == b.conflict_TK.sum() > 0
            assert not (a.picked_TK & ~b.judged_TK).any() and not torch.equal(a.picked_TK, b.conflict_TK)
        for a, b in zip(result.stats, truth.stats, strict=True):
            for key in ("conflict_ratio", "consistency", "consistency_std", "judged_ratio"):
                close(a[key], b[key])
    drawn = [torch.stack([verdict.picked_TK for verdict in result.verdicts]) for result in results]
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
    assert not any(torch.equal(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 4), (1, 5)))  # another step, another seed
    assert not torch.equal(drawn[0][0], drawn[0][1])  # nor do two layers share a draw


def test_draw_placebo_is_uniform():
    """Each judged pair gets its turn as often as any other."""
    judged_TK = torch.rand(20, 2) < 0.7
    conflict_TK = judged_TK & (torch.rand(20, 2) < 0.4)
    share_TK = torch.stack([draw_placebo(conflict_TK, judged_TK, seed) for seed in range(2000)]).float().mean(0)
    p = (conflict_TK.sum() / judged_TK.sum()).item()
    assert not share_TK[~judged_TK].any()
    assert (share_TK[judged_TK] - p).abs().max() < 5 * math.sqrt(p * (1 - p) / 2000)  # five standard deviations


@pytest.mark.parametrize("kind", ["ce", "mse"])
@pytest.mark.parametrize("options", [{}, {"passes": "one"}, {"router_only": True}, {"layers": (1,)}], ids=str)
def test_flat_is_a_tau_that_flags_every_pair(options, kind, monkeypatch):
    """The conflict loss on all routed pairs: where each of them is judged, it equals tau above 1, without its backward."""
    net, batch = make_net(), make_batch(padding=3, unlabelled=0)
    config = {"conflict_loss": kind, "alpha": 0.1, "beta": 0.7} | options
    tau = run(net, batch, tau=1.001, **config)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("an extra backward"))
    flat = run(net, batch, select="all", **config)
    assert flat.verdicts == [None, None]
    same_grads(flat.grads, tau.grads, rtol=1e-12)
    for row, truth in zip(flat.stats, tau.stats, strict=True):
        assert truth.get("judged_ratio", 1) == 1 and not {"conflict_ratio", "consistency", "judged_ratio"} & row.keys()
        for key in ("load", "balance_loss", "router_margin", *(["conflict_loss"] * ("conflict_loss" in truth))):
            close(row[key], truth[key], rtol=1e-12)


def test_flat_reads_no_gradient():
    """Pairs that no gradient reaches get the loss, too, and so do all pairs of a layer that the main loss does not reach."""
    net, batch = make_net(num_layers=1), make_batch()
    stgc = STGC(net, STGCConfig(select="all", alpha=0.0))
    net.layers[0](batch.x_TD, batch.keep_T)
    loss = stgc.loss(torch.zeros(()))
    logits_TE, ids_TK = net.layers[0].routing(batch.x_TD)[::2]
    expected = stgc_module.conflict_loss(logits_TE, ids_TK, batch.keep_T.unsqueeze(1).expand_as(ids_TK))
    close(loss.detach(), expected.detach())
    for wrong in ({"gradients": "weight"}, {"conflict_loss": "reroute"}, {"conflict_loss": "none"}, {"leave_one_out": True}):
        with pytest.raises(ValueError, match="select='all' reads no gradient"):
            STGCConfig(select="all", **wrong)


def test_resume():
    """A resumed run that is told the step judges at the same steps, and its placebo draws the same pairs."""
    net, batches = make_net(), [make_batch(tokens=30) for _ in range(5)]
    config = STGCConfig(select="random", every=2)
    whole = [train_step(stgc, net, batch) for stgc in [STGC(net, config)] for batch in batches]
    resumed = STGC(net, config)
    resumed.step = 3
    for batch, expected in zip(batches[3:], whole[3:], strict=True):
        result = train_step(resumed, net, batch)
        same_grads(result.grads, expected.grads)
    same_verdicts(result.verdicts, expected.verdicts)


# ---- 4. Who gets gradient ----


@pytest.mark.parametrize("term", [{"beta": 0.0, "alpha": 1.0}, {"alpha": 0.0, "beta": 1.0}], ids=["balance", "conflict"])
@pytest.mark.parametrize("passes, router_only", [("two", False), ("two", True), ("one", None)])
def test_who_gets_gradient(passes, router_only, term):
    """Held to the router, both losses move routers alone, bit by bit; else they also reach what lies below a later router,
    but never what lies above the last: its experts and the head."""
    net, batch = make_net(), make_batch()
    result = run(net, batch, passes=passes, router_only=router_only, **term)
    without = run(net, batch, passes=passes, router_only=router_only, conflict_loss="none", alpha=0.0)
    moved = {name for name, grad in result.grads.items() if not torch.equal(grad, without.grads[name])}
    routers = {"layers.0.router.weight", "layers.1.router.weight"}
    features = {"x_TD"} | {name for name in result.grads if name.startswith("layers.0.experts")}
    assert moved == routers | (set() if router_only is not False else features)


@pytest.mark.parametrize("kind", KINDS)
def test_conflict_loss_gradient(kind):
    """gradcheck with the mask fixed, and the closed forms. ce: onehot(e) - softmax(-z), so that a step lowers z_e."""
    logits_TE = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    target_TK, picked_TK = torch.randint(5, (6, 2)), torch.rand(6, 2) < 0.5

    def conflict_loss(logits_TE, mask_TK=picked_TK):
        return stgc_module.conflict_loss(logits_TE, target_TK, mask_TK, CONFLICT_LOSSES[kind])

    assert torch.autograd.gradcheck(conflict_loss, logits_TE)
    (grad_TE,) = torch.autograd.grad(conflict_loss(logits_TE), logits_TE)
    expected_TE = torch.zeros(6, 5, dtype=torch.float64)
    for t, k in picked_TK.nonzero().tolist():
        z_E, e, eye_EE = logits_TE[t].detach(), target_TK[t, k], torch.eye(5, dtype=torch.float64)
        p_E, q_E = z_E.softmax(0), (-z_E).softmax(0)
        closed = {"ce": eye_EE[e] - q_E, "mse": 2 * p_E[e] ** 2 * (eye_EE[e] - p_E), "reroute": p_E - eye_EE[e]}
        expected_TE[t] += closed[kind] / picked_TK.sum()
    close(grad_TE, expected_TE, atol=1e-15)
    none = conflict_loss(logits_TE, torch.zeros_like(picked_TK))
    assert not none.any() and not torch.autograd.grad(none, logits_TE)[0].any()
    with pytest.raises(KeyError):
        stgc_module.conflict_loss(logits_TE, target_TK, picked_TK, kind.upper())


def test_balance_loss_gradient():
    """gradcheck, the closed form E / T * p (f - f.p), and 1 for even loads whatever the scores."""
    logits_TE, keep_T = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.arange(6) != 2
    load_E, tokens = torch.tensor([3.0, 0.0, 1.0, 5.0, 1.0], dtype=torch.float64), keep_T.sum()
    assert torch.autograd.gradcheck(lambda z_TE: balance_loss(z_TE, load_E, keep_T, tokens), logits_TE)
    (grad_TE,) = torch.autograd.grad(balance_loss(logits_TE, load_E, keep_T, tokens), logits_TE)
    p_TE, f_E = logits_TE.detach().softmax(-1), load_E / 10
    close(grad_TE, 5 / 5 * p_TE * (f_E - (p_TE @ f_E).unsqueeze(1)) * keep_T.unsqueeze(1), atol=1e-15)
    close(balance_loss(logits_TE, torch.full((5,), 2.0, dtype=torch.float64), keep_T, tokens).item(), 1.0)


# ---- 5. Robustness ----


@both_passes
@both_gradients
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"])
def test_copies_are_unwatched_and_whole(clone, passes, gradients):
    """Between a watched forward and its loss: the copy takes no graph along, and the original does not notice."""
    net, batch = make_net(), make_batch()
    config = {"passes": passes, "gradients": gradients}
    expected, stgc = run(net, batch, **config), STGC(net, STGCConfig(**config))
    net.zero_grad()
    main = main_loss(net, batch)
    twin = clone(net)
    assert all(layer.watch is None for layer in twin.layers)
    stgc.loss(main).backward()
    assert all(torch.equal(parameter.grad, expected.grads[name]) for name, parameter in net.named_parameters())
    with torch.no_grad():
        assert torch.equal(twin(*batch[::2]), net(*batch[::2]))
    same_grads(run(twin, batch, **config).grads, expected.grads)


@both_passes
@both_gradients
def test_autocast(passes, gradients):
    """bf16 products, but router, means and cosines in float32: most flags are those of float32, and so are all dtypes."""
    net, batch = make_net(dtype=torch.float32), make_batch(tokens=60, dtype=torch.float32)
    config = {"passes": passes, "gradients": gradients, "router_only": True}
    expected, stgc = run(net, batch, **config), STGC(net, STGCConfig(**config))
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        assert net.layers[0](batch.x_TD).dtype == torch.bfloat16
        logits_TE = route(net.layers[0].router, batch.x_TD.bfloat16(), 2).logits_TE
        total = stgc.loss(main_loss(net, batch))
    total.backward()
    assert logits_TE.dtype == torch.float32
    close(logits_TE, batch.x_TD.bfloat16().float() @ net.layers[0].router.weight.T, 1e-5, 1e-5)  # bf16 products: 1e-2
    for name, parameter in net.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
    for verdict, truth in zip(stgc.verdicts, expected.verdicts, strict=True):
        assert verdict.similarity_TK.dtype == torch.float32
        assert (verdict.conflict_TK == truth.conflict_TK).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_in_is_dtype_out(dtype):
    """Half precision is widened where it matters, float64 is never narrowed."""
    net, batch = make_net(dtype=dtype), make_batch(dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for gradients in GRADIENTS:
        for passes in PASSES:
            result = run(net, batch, passes=passes, gradients=gradients)
            assert net(*batch[::2]).dtype == dtype and all(grad.dtype == dtype for grad in result.grads.values())
            assert all(grad.isfinite().all() for grad in result.grads.values())
            assert all(verdict.similarity_TK.dtype == wide for verdict in result.verdicts)


@both_passes
@both_gradients
@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_changes_nothing(passes, gradients, every):
    """Non-reentrant checkpointing runs each layer again in backward: no flag, loss, gradient or draw may differ for it."""
    net, batches = make_net(), [make_batch(tokens=20) for _ in range(3)]
    config = STGCConfig(passes=passes, gradients=gradients, every=every, select="random")
    expected = [train_step(stgc, net, batch) for stgc in [STGC(net, config)] for batch in batches]
    net.call = lambda layer, *inputs: checkpoint(layer, *inputs, use_reentrant=False)
    results = [train_step(stgc, net, batch) for stgc in [STGC(net, config)] for batch in batches]
    for a, b in zip(results, expected, strict=True):
        same_grads(a.grads, b.grads)
        same_verdicts(a.verdicts, b.verdicts)
        assert a.stats == b.stats and a.total == b.total


@both_passes
def test_reentrant_checkpointing_is_refused(passes):
    """It runs the forward without gradients: nothing could be judged, and saying nothing would train without the loss."""
    net, batch = make_net(), make_batch()
    stgc = STGC(net, STGCConfig(passes=passes))
    net.call = lambda layer, *inputs: checkpoint(layer, *inputs, use_reentrant=True)
    x_TD = batch.x_TD.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        stgc.loss(main_loss(net, batch._replace(x_TD=x_TD)))


class Marked(Router):
    """Each forward puts a node into the graph whose end is seen through `alive`."""

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, alive):
            ctx.sign = type("Sign", (), {})()
            alive.add(ctx.sign)
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    def forward(self, x_TD):
        return self.Mark.apply(super().forward(x_TD), self.alive)


@both_passes
@both_gradients
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_leaves_no_graph_behind(passes, gradients, checkpointed):
    """After the backward nothing may hold activations: neither the watching object, nor a cycle that waits for the collector
    (torch's own checkpointing leaves such cycles, so there it may run)."""
    net, batch, alive = make_net(), make_batch(), weakref.WeakSet()
    for layer in net.layers:
        layer.router.__class__, layer.router.alive = Marked, alive
    if checkpointed:
        net.call = lambda layer, *inputs: checkpoint(layer, *inputs, use_reentrant=False)
    stgc = STGC(net, STGCConfig(passes=passes, gradients=gradients))
    gc.collect()
    gc.disable()
    try:
        total = stgc.loss(main_loss(net, batch))
        assert alive
        total.backward()
        del total
        if checkpointed:
            gc.collect()
        assert not alive
    finally:
        gc.enable()


def test_one_pass_keeps_no_token_gradients():
    """Not even while the caller holds the loss: a training loop does, until its next loss is there."""
    net, batch = make_net(), make_batch()
    for config in ({"gradients": "weight"}, {"conflict_loss": "reroute"}):
        stgc = STGC(net, STGCConfig(passes="one", **config))
        total = stgc.loss(main_loss(net, batch))
        steps = [found for found in gc.get_objects() if isinstance(found, LayerStep) and found.stgc is stgc]
        total.backward()
        assert len(steps) == len(net.layers)
        assert not any(step.grads or step.compared or step.by_others or step.weight_grads for step in steps)
        stgc.detach()


def test_a_placebo_is_drawn_by_its_own_forward():
    """Two losses before one backward: each draws as it does alone."""
    net, batches = make_net(), [make_batch(), make_batch()]

    def router_grads(together):
        net.zero_grad()
        stgc = STGC(net, STGCConfig(passes="one", select="random"))
        losses = []
        for batch in batches:
            losses.append(stgc.loss(main_loss(net, batch)))
            if not together:
                losses.pop().backward()
        if together:
            sum(losses).backward()
        stgc.detach()
        return [layer.router.weight.grad.clone() for layer in net.layers]

    torch.testing.assert_close(router_grads(True), router_grads(False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", [{"passes": "one"}, {"passes": "two"}, {"passes": "two", "router_only": True}])
@pytest.mark.parametrize("i", [0, 1])
def test_a_frozen_router_is_named(config, i):
    """With two passes the loss would still reach the features that the second layer reads, and teach its router nothing."""
    net, batch = make_net(), make_batch()
    net.layers[i].router.requires_grad_(False)
    stgc = STGC(net, STGCConfig(**config))
    with pytest.raises(RuntimeError, match=f"router of layers.{i} is frozen"):
        main_loss(net, batch)
    stgc.detach()
    run(net, batch, **config, layers=(1 - i,))


@pytest.mark.parametrize("gradients", ["bias", "weight"])
def test_a_frozen_router_is_measured(gradients):
    """Also where nothing before the experts' weights trains, so that autograd asks for nothing there."""
    net, batch, found = make_net(), make_batch(), []
    net.layers[0].router.requires_grad_(False)
    for passes in ("two", "one"):
        stgc = STGC(net, STGCConfig("none", passes=passes, gradients=gradients))
        stgc.loss(main_loss(net, batch)).backward()
        found.append(stgc.stats()[0]["conflict_ratio"])
    assert not batch.x_TD.requires_grad and found[0] == found[1] > 0


def test_only_judged_layers_have_to_be_reroutable():
    net = make_net()
    net.layers[0].top_k = net.layers[0].experts.num_experts
    with pytest.raises(ValueError, match="reroute"):
        STGC(net, STGCConfig("reroute"))
    STGC(net, STGCConfig("reroute", layers=(1,))).detach()


def test_a_replaced_object_says_so():
    net, batch = make_net(), make_batch()
    old, new = STGC(net, STGCConfig()), STGC(net, STGCConfig())
    loss = main_loss(net, batch)
    with pytest.raises(RuntimeError, match="another STGC object"):
        old.loss(loss)
    new.loss(loss)
    with pytest.raises(RuntimeError, match="call the model first"):
        new.loss(loss)


def test_detach_leaves_another_watch_alone():
    net = make_net()
    stgc, other = STGC(net, STGCConfig()), object()
    net.layers[0].watch = other
    stgc.detach()
    assert net.layers[0].watch is other and net.layers[1].watch is None


BACKENDS = [pytest.param("aot_eager", marks=pytest.mark.slow)]
if any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):  # inductor writes C++
    BACKENDS.append(pytest.param("inductor", marks=pytest.mark.slow))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend, monkeypatch):
    """torch.compile, watched and then not: the same loss, flags and gradients, whatever the graph breaks.

    The first backward of compiled code decides whether it may be run with retain_graph=True, as two passes do: else torch
    raises an error that names the way out. So the step with two passes comes first here.
    """
    net, batch = make_net(num_layers=1), make_batch()
    configs = [{"passes": "two", "gradients": "bias"}, {"passes": "one", "gradients": "weight"}]
    expected, plain = [run(net, batch, **config) for config in configs], main_loss(net, batch).item()
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes for so little
    if backend == "inductor":  # nor vector instructions: finding out which there are takes as long as all the rest
        monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", False)
    torch._dynamo.reset()
    net.compile(backend=backend)
    for config, truth in zip(configs, expected, strict=True):
        result = run(net, batch, **config)
        close(result.total, truth.total)
        same_grads(result.grads, truth.grads)
        same_verdicts(result.verdicts, truth.verdicts)
    close(main_loss(net, batch).item(), plain)
    torch._dynamo.reset()


@both_passes
def test_any_router(passes):
    """Whatever maps x_TD to logits_TE is trained by all three losses, like the linear one."""
    net, batch = make_net(), make_batch()
    for layer in net.layers:
        layer.router = nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    terms = [{"alpha": 0.0, "beta": 0.0}, {"alpha": 1.0, "beta": 0.0}, {"alpha": 0.0, "beta": 1.0}]
    main, balance, conflict = (run(net, batch, passes=passes, **term).grads for term in terms)
    for name in (name for name in main if "router" in name):
        assert main[name].any()
        assert not torch.equal(main[name], balance[name]) and not torch.equal(main[name], conflict[name])


def as_on_cuda(patch):
    """CUDA's ways, run here: every choice that depends on the device falls as on a GPU with grouped products."""
    patch.setattr(torch.Tensor, "is_cuda", True)
    patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


KERNELS = [("dense", torch.float64, 1e-12)] + [("grouped_mm", torch.float32, 1e-4)] * hasattr(F, "grouped_mm")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("on_cuda", [True, False])
@pytest.mark.parametrize("padding", [5, 0])
@pytest.mark.parametrize("kernel, dtype, tolerance", KERNELS)
def test_kernels_agree(kernel, dtype, tolerance, on_cuda, padding, gated, monkeypatch):
    """All ways to the experts' products and sums: loss, flags, statistics and gradients are those of the loop, padding or
    not, and for reroute, which alone compares with every expert."""
    if kernel == "dense" and not on_cuda:
        return  # a CPU has no use for it
    net, batch = make_net(dtype=dtype, gated=gated), make_batch(tokens=24, padding=padding, dtype=dtype)
    kinds = [("ce", passes, gradients) for passes in PASSES for gradients in GRADIENTS] + [("reroute", "one", "bias")]
    cases = [{"conflict_loss": kind, "passes": passes, "gradients": gradients} for kind, passes, gradients in kinds]
    used, choose = set(), stgc_plus.matmul_kernel
    monkeypatch.setattr(stgc_plus, "matmul_kernel", lambda *_: "slices")
    expected, expected_TD = [run(net, batch, alpha=0.1, **case) for case in cases], net.layers[0](*batch[::2]).detach()
    if on_cuda:
        as_on_cuda(monkeypatch)
    monkeypatch.setattr(stgc_plus, "matmul_kernel", lambda *args: used.add(choose(*args)) or choose(*args))
    with torch.no_grad():
        out_TD = net.layers[0](*batch[::2])
        close(out_TD, expected_TD, tolerance, tolerance)
        assert used == {kernel} and not out_TD[~batch.keep_T].any()
    for case, truth in zip(cases, expected, strict=True):
        result = run(net, batch, alpha=0.1, **case)
        same_grads(result.grads, truth.grads, rtol=tolerance, atol=tolerance)
        same_verdicts(result.verdicts, truth.verdicts, rtol=tolerance, atol=tolerance)
        close(result.total, truth.total, rtol=tolerance)
        for row, true_row in zip(result.stats, truth.stats, strict=True):
            close(
                [row[key] for key in ("consistency", "consistency_std")],
                [true_row["consistency"], true_row["consistency_std"]],
                tolerance,
                tolerance,
            )


def count_products(work) -> int:
    """The matrix products with stacked weights, and those that make their gradients."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    names = [event.name for event in profiler.events()]
    return sum(name in ("aten::_grouped_mm", "aten::_scaled_grouped_mm") for name in names)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_combine_is_the_plain_sum(dtype, tolerance):
    """Weighted rows of a token, added up, with both gradients; pairs of weight 0 (padding) add nothing."""
    torch.manual_seed(0)
    ids_TK, weights_TK = torch.rand(20, 6).topk(3).indices, torch.rand(20, 3) * (torch.rand(20, 3) > 0.2)
    rows_SD, up_TD, results = torch.randn(60, 8, dtype=dtype), torch.randn(20, 8, dtype=dtype), []
    for own in (stgc_module, stgc_plus):
        pairs = own.Pairs(ids_TK, weights_TK, 6)
        y_SD, w_TK = rows_SD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        y_TD = pairs.combine(y_SD, w_TK)
        results.append((y_TD, *torch.autograd.grad(y_TD, (y_SD, w_TK), up_TD)))
    for found, expected in zip(*results):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    order = [(pairs.order_S == 3 * t + k).nonzero().item() for t in range(20) for k in range(3)]
    expected_TD = (rows_SD[order].view(20, 3, 8).double() * weights_TK.unsqueeze(2)).sum(1)
    torch.testing.assert_close(results[0][0].double(), expected_TD, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.skipif(torch.__version__ < (2, 11), reason="the CPU has no grouped_mm before 2.11")
@pytest.mark.parametrize("gated, products", [(False, 1), (True, 1)])
def test_the_first_of_two_passes_makes_no_weight_gradient(gated, products):
    """It goes from the last linear's output to the first ones', by one product. A whole backward makes two per linear."""
    layer = MoELayer(stgc_plus.Experts(4, 8, 16, gated=gated))
    stgc = STGC(layer, STGCConfig())
    y_TD = layer(torch.randn(32, 8, requires_grad=True))
    main_loss = y_TD.square().mean()
    assert count_products(lambda: stgc.loss(main_loss)) == products
    assert count_products(main_loss.backward) == 2 * (2 + gated)  # to the input and to the weight of each linear


@pytest.mark.parametrize("config", [{}, {"passes": "one"}, {"passes": "one", "gradients": "weight"}], ids=str)
def test_two_runs_are_the_same_to_the_last_bit(config):
    """With more than one thread, too."""
    torch.set_num_threads(2)
    net, batch = make_net(dtype=torch.float32, d_ff=64), make_batch(300, dtype=torch.float32)
    one, other = (run(net, batch, **config) for _ in range(2))
    assert one.total == other.total and one.stats == other.stats
    assert all(torch.equal(one.grads[name], other.grads[name]) for name in one.grads)


def test_matmul_kernel(monkeypatch):
    """A CPU takes torch's own product where it can; that refuses other dtypes and sizes, so a loop must take these."""

    def chosen(dtype=torch.float32, size=8):
        return stgc_plus.matmul_kernel(torch.zeros(12, 8, dtype=dtype), torch.zeros(4, 8, size, dtype=dtype))

    best = "grouped_mm" if hasattr(F, "grouped_mm") and torch.__version__ >= (2, 11) else "slices"
    assert chosen() == chosen(dtype=torch.bfloat16) == best
    assert chosen(dtype=torch.float64) == chosen(size=7) == chosen(size=12, dtype=torch.bfloat16) == "slices"
    with monkeypatch.context() as patch:  # torch compiles it for bf16 only, and reading numbers breaks the graph
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert chosen() == chosen(dtype=torch.bfloat16) == "slices"
        as_on_cuda(patch)
        assert chosen() == "dense" and (chosen(dtype=torch.bfloat16) == "grouped_mm") is hasattr(F, "grouped_mm")
    as_on_cuda(monkeypatch)
    assert chosen(dtype=torch.float64) == chosen(size=7) == "dense"
    if hasattr(F, "grouped_mm"):
        assert chosen() == "grouped_mm"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert chosen() == "dense"


@both_passes
@both_gradients
def test_two_runs_are_bit_identical(passes, gradients):
    """Nothing random: a row that is read K times gets its gradient by gathering, not from an index_add with its atomics."""
    net, batch = make_net(dtype=torch.float32), make_batch(tokens=100, dtype=torch.float32)
    first, second = (run(net, batch, passes=passes, gradients=gradients) for _ in range(2))
    assert first.total == second.total
    assert all(torch.equal(grad, second.grads[name]) for name, grad in first.grads.items())
    nodes = {type(node).__name__ for node in graph_nodes(main_loss(net, batch))}
    assert not nodes & {"IndexBackward0", "IndexSelectBackward0", "IndexAddBackward0", "ScatterAddBackward0"}


def test_shapes_and_masks():
    """(B, L, D) is T tokens; padding comes out as zeros; `layer.mask` stands in for the argument once."""
    (layer,), (x_TD, _, keep_T) = make_net(num_layers=1).layers, make_batch(tokens=12)
    out_TD = layer(x_TD, keep_T)
    close(layer(x_TD.view(3, 4, 8), keep_T.view(3, 4).long()), out_TD.view(3, 4, 8))
    assert not out_TD[~keep_T].any() and out_TD[keep_T].all()
    layer.mask = keep_T
    assert torch.equal(layer(x_TD), out_TD) and layer.mask is None and layer(x_TD).all()
    close(layer(x_TD[keep_T]), out_TD[keep_T])


# ---- 6. Errors ----


@pytest.mark.parametrize(
    "bad",
    [
        {"conflict_loss": "kl"},
        {"passes": "three"},
        {"gradients": "all"},
        {"select": "best"},
        {"tau": math.nan},
        {"alpha": math.inf},
        {"beta": math.nan},
        {"every": 0},
        {"every": -1, "conflict_loss": "none"},
        {"passes": "one", "router_only": False},
    ],
    ids=str,
)
def test_bad_configurations(bad):
    """The first bad field is named, at once, not at step 1000."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        STGCConfig(**bad)


def test_other_errors():
    """Each error says what to do about it."""
    net, (x_TD, _, keep_T) = make_net(), make_batch()
    for top_k in (0, 5):
        with pytest.raises(ValueError, match="top_k"):
            MoELayer(Experts(4, 8, 12), top_k=top_k)
    for layers in ((2,), (-1,)):
        with pytest.raises(ValueError, match="layers"):
            STGC(net, STGCConfig(layers=layers))
    with pytest.raises(ValueError, match="mask"):
        net(x_TD, keep_T[1:])
    with pytest.raises(ValueError, match=r"no stgc\.MoELayer"):
        STGC(nn.Linear(2, 2))
    stgc = STGC(net)
    with pytest.raises(RuntimeError, match="no forward"):
        stgc.loss(torch.zeros((), requires_grad=True))
    stgc.loss(net(x_TD).sum())
    with pytest.raises(RuntimeError, match="no forward"):
        stgc.loss(torch.zeros((), requires_grad=True))


# ---- 7. No synchronisation with the host on CUDA ----


class NoSync(TorchDispatchMode):
    """Fails on what would make a CPU wait for a GPU: numbers read from tensors, and shapes that depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "repeat_interleave")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]), "boolean indexing"
        return func(*args, **kwargs or {})


@both_passes
@both_gradients
@pytest.mark.parametrize("dtype", [case[1] for case in KERNELS])
def test_nothing_waits_for_the_gpu(dtype, passes, gradients, monkeypatch):
    """The CUDA path, run here: no .item(), .tolist() or boolean indexing from the forward to the end of backward."""
    net, batch = make_net(dtype=dtype), make_batch(dtype=dtype)

    def refuse(*_):
        raise AssertionError("a tensor was read")

    def step(**config):
        stgc = STGC(net, STGCConfig(passes=passes, gradients=gradients, **config))
        with NoSync(), monkeypatch.context() as patch:
            for name in ("tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"):
                patch.setattr(torch.Tensor, name, refuse)
            stgc.loss(main_loss(net, batch)).backward()

    with pytest.raises(AssertionError):  # the loop over slices reads where each expert's rows end, so the guard works
        step()
    as_on_cuda(monkeypatch)
    for kind in (*KINDS, "none"):
        step(conflict_loss=kind)


if torch.cuda.is_available():

    @pytest.mark.gpu
    @both_passes
    def test_no_synchronisation_on_cuda(passes):
        """CUDA itself counts: bf16 through grouped_mm, float64 through the dense products (there is no grouped one)."""
        for dtype, gradients in ((torch.bfloat16, "bias"), (torch.float64, "bias"), (torch.float64, "weight")):
            net = make_net(d_ff=16, dtype=dtype).cuda()
            batch = Batch(*(t.cuda() for t in make_batch(dtype=dtype)))
            stgc = STGC(net, STGCConfig(passes=passes, gradients=gradients))
            for mode in ("default", "error"):  # the first step warms up
                torch.cuda.set_sync_debug_mode(mode)
                try:
                    stgc.loss(main_loss(net, batch)).backward()
                finally:
                    torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.gpu
    @both_passes
    @both_gradients
    def test_cuda_equals_cpu(passes, gradients):
        """float64 on both."""
        net, batch = make_net(), make_batch()
        expected = run(net, batch, passes=passes, gradients=gradients)
        result = run(net.cuda(), Batch(*(t.cuda() for t in batch)), passes=passes, gradients=gradients)
        same_grads({name: grad.cpu() for name, grad in result.grads.items()}, expected.grads)
        same_verdicts([type(v)(*(t.cpu() for t in v)) for v in result.verdicts], expected.verdicts)


@pytest.mark.parametrize("passes", ["two", "one"])
def test_router_margin(passes):
    """The probability of the last expert chosen minus that of the first one not chosen, over real tokens; without one where
    all experts are chosen, not finite where a token has fewer than K."""
    torch.manual_seed(0)
    x_TD, mask_T = torch.randn(9, 6), torch.arange(9) < 7
    for top_k, dropped in ((1, False), (2, False), (4, False), (2, True)):
        layer = stgc_module.MoELayer(stgc_plus.Experts(4, 6, 8), top_k=top_k, normalize=False)
        routing = layer.routing(x_TD)
        if dropped:
            weights_TK = routing.weights_TK * (torch.arange(9).unsqueeze(1) != 3)
            layer.routing = lambda x, weights_TK=weights_TK, routing=routing: routing._replace(weights_TK=weights_TK)
        watch = STGC(layer, STGCConfig(passes=passes))
        watch.loss(layer(x_TD, mask_T).square().mean()).backward()
        (stats,) = watch.stats()
        probs = [sorted(torch.softmax(row, 0).tolist(), reverse=True) for row in routing.logits_TE[:7]]
        if top_k == 4:
            assert "router_margin" not in stats
        elif dropped:
            assert stats["router_margin"] == float("inf")
        else:
            assert stats["router_margin"] == pytest.approx(sum(p[top_k - 1] - p[top_k] for p in probs) / 7, abs=1e-6)
