"""lab/moe/dynmoe.py against plain loops over tokens and experts; in the scripts: kill and resume, two processes, page."""

import copy
import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from accelerate import DistributedType
from conftest import close, same_grads
from forked import Launched
from safetensors.torch import load_file
from test_glue import data, model, plain, run, words  # noqa: F401  (fixtures)
from test_launch import curve, still  # noqa: F401
from test_lvlm import WORDS as LVLM
from test_moefication import make_batch as make_texts
from test_moefication import make_model, outputs
from test_page import read_data, unpack
from test_resume import Killed, assert_same, kill_at, outcome
from torch import nn

import stgc_plus
import toy_lvlm
from lab.moe import dynmoe
from lab.moe.baselines import limit_capacity
from lab.moe.dynmoe import TopAnyLayer, TopAnyRouter
from lab.moe.moefication import MoESpec, load_moefied, moefy
from lab.report import alone, page
from lab.run import runs
from lab.run.cli import UserError
from lab.vision import routes
from stgc_plus import STGCConfig

KEEP_T = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1], dtype=torch.bool)
LABELS_T = torch.tensor([0, 1, -100, 2, 0, 1, 2, -100, -100, 0, 1, 2, 0, 1])


class Net(nn.Module):
    """One layer of 6 experts, of which 1 and 5 are inactive, in float64; columns and thresholds are far from the start."""

    def __init__(self):
        super().__init__()
        self.moe = TopAnyLayer(stgc_plus.Experts(6, 8, 12, dtype=torch.float64), TopAnyRouter(8, 4, 6, dtype=torch.float64))
        router, self.head = self.moe.router, nn.Linear(8, 3, bias=False, dtype=torch.float64)
        router.weight_DE.data.normal_()
        router.thresholds_E.data.uniform_(-0.25, 0.15)
        router.active_E.copy_(torch.tensor([1, 0, 1, 1, 1, 0]))

    def forward(self, x_TD):
        return self.head(x_TD + self.moe(x_TD, KEEP_T))


@pytest.fixture
def x_TD():
    return torch.randn(14, 8, dtype=torch.float64)


# ---- 1. Loops ----


class Step(torch.autograd.Function):
    """1 above 0, else 0; its backward passes the gradient on. The ReLU before it stops the gradient of what is off."""

    @staticmethod
    def forward(ctx, over):
        return torch.sign(over)

    @staticmethod
    def backward(ctx, grad):
        return grad


def slow_logits(router, x_D):
    """z of the active experts."""
    columns = router.weight_DE.unbind(1)
    cosines = {e: x_D @ columns[e] / (x_D.norm() * columns[e].norm()) for e in range(6) if router.active_E[e]}
    return {e: cosine - router.thresholds_E[e] for e, cosine in cosines.items()}


def slow_layer(layer, x_TD, training):
    """The output and, for the oracle, what was routed where; a token's experts in the order of z."""
    router, experts, rows = layer.router, layer.experts, []
    parts = {name: getattr(experts, name) for name in ("w_in_EDF", "w_out_EFD", "b_in_EF", "b_out_ED")}
    ref, trace = reference.RefLayer(router_ED=router.weight_DE.T, top_k=6, **parts), reference.Trace(x_TD, {}, {})
    vars(ref).update(parts)  # the layer's own parameters, whose gradients are wanted
    for t, x_D in enumerate(x_TD):
        gates, z, y_D = {}, slow_logits(router, x_D), torch.zeros_like(x_D)
        for e in z:
            score, threshold = torch.sigmoid(z[e] + router.thresholds_E[e]), torch.sigmoid(router.thresholds_E[e])
            gate = Step.apply(torch.relu(score - threshold))
            gates |= {e: gate} if gate > 0 else {}
        if not gates and not training:
            gates = {max(z, key=lambda e: z[e] + router.thresholds_E[e]): torch.tensor(1.0)}
        for k, e in enumerate(sorted(gates, key=lambda e: -z[e])) if KEEP_T[t] else ():
            one_D, trace.leaves_of[t, k] = reference.run_expert(ref, e, x_D)
            trace.expert_of[t, k] = e
            y_D = y_D + gates[e] / sum(gates.values()) * one_D
        rows.append(y_D)
    return torch.stack(rows), ref, trace


def slow_auxiliary(router):
    active = [column_D for column_D, on in zip(router.weight_DE.unbind(1), router.active_E) if on]
    squares = [
        (a @ b / (a.norm() * b.norm()) - float(i == j)) ** 2 for i, a in enumerate(active) for j, b in enumerate(active)
    ]
    return sum(squares).sqrt() + sum(column_D.norm() for column_D in active) / len(active)


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_is_its_loop(x_TD, training):
    net, found = Net().train(training), []
    named = dict(net.moe.named_parameters()) | {"x_TD": x_TD.requires_grad_()}
    y_TD, _, trace = slow_layer(net.moe, x_TD, training)
    close(net.moe(x_TD, KEEP_T), y_TD)
    for one_TD in (net.moe(x_TD, KEEP_T), y_TD):
        grads = torch.autograd.grad(
            (one_TD * torch.linspace(0, 1, 8)).square().sum(), named.values(), materialize_grads=True
        )
        found.append(dict(zip(named, grads)))
    same_grads(*found)
    assert found[0]["router.weight_DE"].any(0).tolist() == [True, False, True, True, True, False]
    sizes = {sum(token == t for token, _ in trace.expert_of) for t in range(14) if KEEP_T[t]}
    assert {1, 2, 3} <= sizes and (0 in sizes) == training


@pytest.mark.parametrize(
    "config",
    [{}, {"conflict_loss": "mse"}, {"select": "all"}, {"passes": "one"}, {"conflict_loss": "mse", "passes": "one"}],
    ids=str,
)
def test_total_verdicts_and_gradients_are_those_of_the_oracle(x_TD, config):
    config = STGCConfig(alpha=0.3, beta=0.7, tau=0.4, **config)
    net, x_TD = Net(), x_TD.requires_grad_()
    named = dict(net.named_parameters()) | {"x_TD": x_TD}
    trainer = dynmoe.make_stgc(net, config)
    total = trainer.loss(F.cross_entropy(net(x_TD), LABELS_T))
    total.backward()
    (stats,), (verdict,) = trainer.stats(), trainer.verdicts
    grads = {name: one.grad for name, one in named.items()}

    y_TD, ref, trace = slow_layer(net.moe, x_TD, training=True)
    main_loss = reference.main_loss_of(net.head(x_TD + y_TD), LABELS_T, KEEP_T)
    judgement = reference.judge_layer(ref, trace, main_loss, 0.4, "bias")
    losses = []
    for (t, k), e in trace.expert_of.items():
        z = slow_logits(net.moe.router, x_TD[t].detach() if config.passes == "one" else x_TD[t])
        values, place = torch.stack([*z.values()]), [*z].index(e)
        if config.select == "all" or judgement.conflict_TK[t, k]:
            ce = -reference.log_softmax(-values)[place]
            losses.append(ce if config.conflict_loss == "ce" else reference.softmax(values)[place] ** 2)
    conflict, auxiliary = sum(losses) / len(losses), slow_auxiliary(net.moe.router)
    expected = main_loss + 0.3 * auxiliary + 0.7 * conflict
    same_grads(grads, dict(zip(named, torch.autograd.grad(expected, [*named.values()]))))
    assert ("balance_loss" in stats, "router_margin" in stats) == (False, False) and 5 < len(losses) < 40
    close(stats["auxiliary_loss"], auxiliary.item())
    close(stats["conflict_loss"], conflict.item())
    close(stats["experts_per_token"], len(trace.expert_of) / KEEP_T.sum())
    close(stats["load"], judgement.load_E)
    assert stats["active_experts"] == 4
    if config.passes == "two":
        close(total.item(), expected.item())
    if config.select == "conflict":
        most = verdict.conflict_TK.shape[1]
        for name in ("judged_TK", "conflict_TK"):
            assert torch.equal(getattr(verdict, name), getattr(judgement, name)[:, :most]), name
            assert not getattr(judgement, name)[:, most:].any()
        close(verdict.similarity_TK[verdict.judged_TK], judgement.similarity_TK[:, :most][verdict.judged_TK])
        close(stats["conflict_ratio"], judgement.conflict_ratio)
        close(stats["consistency"], judgement.consistency)


def test_other_models_get_the_usual_object():
    net = nn.Sequential(stgc_plus.stgc.MoELayer(stgc_plus.Experts(4, 8, 12)))
    assert type(dynmoe.make_stgc(net, STGCConfig())) is stgc_plus.STGC and dynmoe.summary(net) == {}
    logits_TE = torch.randn(5, 4)
    assert torch.equal(dynmoe.ce_of_active(logits_TE), stgc_plus.CONFLICT_LOSSES["ce"](logits_TE))


def test_a_router_starts_as_dynmoe_has_it():
    router = TopAnyRouter(32, 8)
    unit_DE = router.weight_DE.detach()
    close(unit_DE.T @ unit_DE, torch.eye(16), rtol=0, atol=1e-5)
    assert router.active_E.tolist() == [1] * 8 + [0] * 8 and not router.thresholds_E.any()
    assert router.state_dict().keys() == {"weight_DE", "thresholds_E", "active_E", "used_E", "lost_D"}  # in a checkpoint
    assert (router(torch.randn(9, 32)).isneginf() == (router.active_E == 0)).all()
    with pytest.raises(ValueError, match="max_experts=3 must be at least num_experts=4"):
        TopAnyRouter(32, 4, 3)


# ---- 2. The number of experts ----


def slow_adapt(net, batches, steps):
    """What one epoch makes of active experts and columns, from the routing of its steps."""
    router, used, lost_D = net.moe.router, set(), torch.zeros(8, dtype=torch.float64)
    for step, x_TD in enumerate(batches):
        if steps // 2 <= step <= 3 * steps // 4:
            for x_D in x_TD[KEEP_T]:
                on = [e for e, z in slow_logits(router, x_D).items() if z > 0]
                used |= {*on}
                lost_D = lost_D if on else lost_D + x_D
    active = [e for e in range(6) if router.active_E[e] and e in used]
    columns, thresholds = router.weight_DE.detach().clone(), router.thresholds_E.detach().clone()
    if lost_D.any() and len(active) < 6:
        new = min(e for e in range(6) if e not in active)
        columns[:, new], thresholds[new], active = lost_D / lost_D.norm(), 0.0, [*active, new]
    return sorted(active), columns, thresholds


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("shift", [1.0, -3.0])  # of thresholds: an expert is unused and tokens have none; all are on
def test_an_epoch_drops_and_adds_as_its_loop(steps, shift):
    net, changed = Net(), 0
    net.moe.router.thresholds_E.data += torch.tensor([shift if shift < 0 else 0.0] * 4 + [shift] * 2)
    for _ in range(3):
        batches = torch.randn(steps, 14, 8, dtype=torch.float64) + torch.randn(8)
        before = net.moe.router.active_E.nonzero().flatten().tolist()
        active, columns, thresholds = slow_adapt(net, batches, steps)
        for step, x_TD in enumerate(batches):
            net(x_TD)
            net.eval()(torch.randn(14, 8).double())  # an evaluation in between is not recorded
            net.train()
            found = net.moe.router.active_E.nonzero().flatten().tolist()
            assert found == (before if step <= 3 * steps // 4 else active)
            dynmoe.adapt(net, step + 1, steps)
        assert net.moe.router.active_E.nonzero().flatten().tolist() == active
        assert dynmoe.summary(net) == {"active_experts": [len(active)]}
        close(net.moe.router.weight_DE.detach(), columns)
        assert torch.equal(net.moe.router.thresholds_E, thresholds)
        changed += before != active
    assert (changed > 0) == (shift > 0)
    shapes, fresh = ({name: value.shape for name, value in one.state_dict().items()} for one in (net, Net()))
    assert shapes == fresh


def test_padding_uses_no_expert():
    """It would be on expert 0, whose threshold is negative and which no token is on."""
    net = Net()
    net.moe.router.weight_DE.data[:, 0], net.moe.router.thresholds_E.data[0] = -1.0, -0.1
    net(torch.rand(14, 8).double())
    assert net.moe.found[0][0] == 0 and net.moe.router(torch.zeros(1, 8).double())[0, 0] > 0


def test_in_evaluation_the_best_score_counts_not_the_nearest_threshold():
    layer = TopAnyLayer(stgc_plus.Experts(2, 2, 4), TopAnyRouter(2, 2, 2)).eval()
    layer.router.weight_DE.data, layer.router.thresholds_E.data = torch.eye(2), torch.tensor([0.9, 0.6])
    logits_TE, weights_TK, expert_ids_TK = layer.routing(torch.tensor([[0.7, 0.5]]))  # cosines 0.81 and 0.58
    assert logits_TE[0, 0] < logits_TE[0, 1] < 0 and (expert_ids_TK.tolist(), weights_TK.tolist()) == (
        [[0, 1]],
        [[1.0, 0.0]],
    )


def test_a_copy_and_a_pickle_route_alike(x_TD):
    net = Net()
    net(x_TD)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other.eval()(x_TD), net.eval()(x_TD))
        dynmoe.adapt(other, 4, 4)
        assert torch.equal(net.moe.router.active_E, torch.tensor([1, 0, 1, 1, 1, 0]))


# ---- 3. In a model ----

SPEC = MoESpec("1,3", 4, router="dynmoe", max_experts=6)


def test_copies_equal_the_dense_model_and_survive_a_file(tmp_path):
    dense, batch = make_model(dtype=torch.float32), make_texts()
    moe = moefy(copy.deepcopy(dense), SPEC)
    torch.testing.assert_close(outputs(moe, batch), outputs(dense, batch), rtol=1e-4, atol=1e-5)
    for layer in dynmoe.layers_of(moe):
        layer.experts.w_out_EFD.data += 0.1 * torch.randn(6, 1, 1)
        layer.router.active_E[:] = torch.tensor([1, 0, 1, 1, 0, 1])
    moe.save_pretrained(tmp_path)
    loaded = load_moefied(tmp_path)
    assert torch.equal(outputs(loaded, batch)[0], outputs(moe, batch)[0]) and dynmoe.summary(loaded) == {
        "active_experts": [4, 4]
    }


def test_the_conflict_loss_alone_trains_its_router():
    moe, batch = moefy(make_model(dtype=torch.float32), SPEC), make_texts() | {"labels": torch.tensor([0, 1, 2])}
    before = [layer.router.weight_DE.clone() for layer in dynmoe.layers_of(moe)]
    alone.train_alone(moe, [batch] * 4, STGCConfig(alpha=0.0), alone.PARTS[0], lr=1e-2, every=1)
    for layer, old_DE in zip(dynmoe.layers_of(moe), before):
        assert layer.router.weight_DE.isfinite().all() and not torch.equal(layer.router.weight_DE, old_DE)


@pytest.mark.parametrize("bad", [{"experts": "split"}, {"normalize": False}, {"max_experts": 3}])
def test_a_spec_that_cannot_be(bad):
    with pytest.raises(ValueError, match="dynmoe' takes the mean|max_experts=3"):
        moefy(make_model(), MoESpec("1", 4, router="dynmoe", **bad))


def test_no_capacity_and_routes_of_pairs_that_are_on(x_TD):
    net = Net().eval()
    with pytest.raises(ValueError, match="fixed number of experts per token"), limit_capacity(net, 1.0):
        pass
    with routes.record_routes(net) as found:
        net(x_TD)
        found.add(torch.zeros(14), KEEP_T)
    _, _, trace = slow_layer(net.moe, x_TD, training=False)
    rows = [[e for (token, _), e in trace.expert_of.items() if token == t] for t in range(14) if KEEP_T[t]]
    assert [[e for e in row if e >= 0] for row in found.all_NMK[:, 0].tolist()] == rows
    share_E = [sum(row.count(e) for row in rows) / len(trace.expert_of) for e in range(6)]
    assert routes.load_by_modality(found)["text"]["all_ME"][0] == pytest.approx(share_E)


# ---- 4. In the scripts ----

FLAGS = "--router dynmoe --max-experts 6 --lr 1e-3".split()


def test_a_run_its_record_and_its_page(words, tmp_path):  # noqa: F811
    run([*words, *FLAGS, "--variants", "none,ce,mse-one,placebo,flat,random", "--film", "--save-model"])
    out, first = tmp_path / "out", set()
    for entry in json.loads((out / "results.json").read_text())["runs"]:
        lines = [line for line in curve(out, f"{entry['variant']}-s0") if "loss" in line]
        ours = entry["variant"] != "random"
        for line in lines:
            names = ("auxiliary_loss", "router_margin", "balance_loss")
            assert [name in line for name in names] == [ours, not ours, not ours]
        assert ("active_experts" in entry) == ("experts_per_token" in entry) == ours
        if ours:
            first.add(lines[0]["loss"])
            assert lines[0]["active_experts"] == 4 < entry["active_experts"][0] <= 6
            assert 1 < entry["experts_per_token"][1] < 4
            loaded = load_moefied(out / f"model-{entry['variant']}-s0")
            assert dynmoe.summary(loaded)["active_experts"] == entry["active_experts"]
    assert len(first) == 1

    shown = read_data(out / "inspect.html")
    assert shown["experts"] == 6 and 2 < shown["topK"] <= 5
    assert [one["equal"] for one in shown["variants"]] == [True] * 5 + [False]
    for one in shown["variants"]:
        (layer,) = one["layers"]
        experts, state, logits = (unpack(layer[name]) for name in ("experts", "state", "logits"))
        on, size = experts != 255, 4 if one["name"] == "random" else 6
        assert on[..., 0].all() and (on.sum(-1) == 2).all() == (one["name"] == "random") and experts[on].max() < size
        assert (state[~on] == 0).all() and layer["norms"]["shape"] == layer["best"]["shape"] == layer["state"]["shape"]
        assert len(layer["load"][0]) == 6 and layer["load"][0][4:] == [0, 0] != layer["load"][0][:2]
        if one["name"] != "random":
            z = np.take_along_axis(logits, np.where(on, experts, 0).astype(int), -1)
            assert (z[on & (on.sum(-1, keepdims=True) > 1)] >= 0).all()  # a single one may be the best of those that are off
            inactive = logits <= -32767.5 * layer["logits"]["scale"]
            assert (inactive[0].sum(-1) == 2).all()
    assert " 255 " not in page.describe(out)


def test_a_run_that_starts_with_one_expert(words, tmp_path):  # noqa: F811
    """No variant reads --top-k, so its default, 2, is not too large. Dice read it, also those of toy_lvlm.py --routing."""
    run([*words, *FLAGS, "--num-experts", "1", "--variants", "none,ce"])
    entries = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [one["variant"] for one in entries] == ["none", "ce"] and all(one["active_experts"] for one in entries)
    toy_lvlm.parse("--router dynmoe --num-experts 1".split())
    assert toy_lvlm.parse("--router dynmoe --routing random --top-k 3".split()).top_k == 3


@pytest.mark.parametrize("step", [3, 5])
def test_a_killed_run_ends_as_if_it_had_not_been(words, tmp_path, monkeypatch, step):  # noqa: F811
    """At the third step the newest checkpoint lies between the two that are recorded."""
    command = [*words, *FLAGS, "--save-steps", "1", "--save-model"]
    run([*command, "--output-dir", tmp_path / "whole"])
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            run([*command, "--output-dir", tmp_path / "cut"])
    run([*command, "--output-dir", tmp_path / "cut", "--resume"])
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))
    assert outcome(tmp_path / "whole")[0][0]["active_experts"] > [4]


@pytest.mark.slow
def test_two_processes_count_the_global_batch(words, still, tmp_path, server):  # noqa: F811
    command = [*words, *FLAGS, "--model", still, "--variants", "ce,ce-one", "--save-model"]
    two = Launched(2, "glue_moefy.py", *command, "--output-dir", tmp_path / "two")
    run([*command, "--output-dir", tmp_path / "one"])
    done = two.wait()
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("ce-s0", "ce-one-s0"):
        for a, b in zip(curve(tmp_path / "one", name), curve(tmp_path / "two", name), strict=True):
            for key in a.keys() & {"loss", "conflict_ratio", "auxiliary_loss", "experts_per_token", "active_experts"}:
                assert a[key] == pytest.approx(b[key], rel=1e-2, abs=1e-2), (name, a["step"], key)
        one, other = (load_file(tmp_path / folder / f"model-{name}" / "model.safetensors") for folder in ("one", "two"))
        for key in [key for key in one if ".router." in key]:
            torch.testing.assert_close(one[key], other[key], rtol=1e-2, atol=1e-2)


def test_divided_weights_are_refused(words, monkeypatch):  # noqa: F811
    monkeypatch.setattr(runs, "start", lambda args: SimpleNamespace(distributed_type=DistributedType.FSDP))
    with pytest.raises(UserError, match="FSDP, but --router dynmoe changes columns of whole weights: use its multi-GPU"):
        run([*words, *FLAGS])


@pytest.mark.slow
def test_the_vision_language_model(tmp_path):
    command = [*LVLM, "--router", "dynmoe", "--variants", "none,ce-one,random", "--output-dir", str(tmp_path / "out")]
    toy_lvlm.main(toy_lvlm.parse(command))
    found = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [len(one.get("active_experts", [])) for one in found] == [2, 2, 0]
    assert found[0]["routes"]["num_experts"] == 8 and found[2]["routes"]["top_k"] == 2
    assert math.isfinite(found[1]["loss"][1]) and read_data(tmp_path / "out" / "inspect.html")["experts"] == 8
