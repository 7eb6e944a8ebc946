"""stgc.py by itself: its size, what it refuses, what it shares with stgc_plus.py, that it is correct where it is copied to.

Its numbers are compared with the oracle in test_stgc.py, and with one process's in test_distributed.py.
"""

import ast
import copy
import inspect
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Batch, close, main_loss, make_batch, make_net, run, same_grads, same_verdicts
from torch import nn
from torch.utils.checkpoint import checkpoint

import stgc
import stgc_plus

ROOT = Path(__file__).resolve().parent.parent
CALM = os.environ | {"OMP_NUM_THREADS": "1"}


# ---- 1. The files ----
@pytest.mark.parametrize("name, lines, characters", [("stgc.py", 450, 27_000), ("stgc_plus.py", 330, 21_000)])
def test_the_files_stay_short(name, lines, characters):
    """What makes them harder to read goes elsewhere: `wc -l` and `wc -m`."""
    text = (ROOT / name).read_text()
    assert text.count("\n") <= lines and len(text) <= characters


def test_each_equation_is_computed_once():
    """In one place of stgc.py, with its tag; eq. 12 and definition 1, the heart, on lines of their own."""
    found = []
    for line in (ROOT / "stgc.py").read_text().splitlines():
        for tag in re.findall(r"PAPER (eq\. \d+(?:(?:, | and )\d+)*|definition 1|sec\. 4\.3)", line):
            found += [f"eq. {number}" for number in re.findall(r"\d+", tag)] if tag.startswith("eq.") else [tag]
            if tag in ("eq. 12", "definition 1"):
                assert re.match(r" +\w+ = [^#;]+  # PAPER", line), line
    assert sorted(found) == sorted([*(f"eq. {number}" for number in range(5, 15)), "definition 1", "sec. 4.3"])
    assert "PAPER" not in (ROOT / "stgc_plus.py").read_text()


def methods_of(cls: type) -> dict:
    return {name: value for name, value in vars(cls).items() if inspect.isfunction(value) or isinstance(value, staticmethod)}


@pytest.mark.parametrize("name", ["STGC", "LayerStep", "Experts"])
def test_hooks_are_what_is_extended(name):
    """Each method that stgc_plus replaces or extends is marked as a hook, with what the paper does there, or is extended
    through super(); no hook goes unused; nothing is patched."""
    paper, plus = methods_of(getattr(stgc, name)), methods_of(getattr(stgc_plus, name))
    plus |= {key: value for key, value in vars(getattr(stgc_plus, name)).items() if key in paper}
    hooks = {key for key, value in paper.items() if (inspect.getdoc(value) or "").startswith("Hook")}
    for key in plus.keys() & paper.keys() - hooks:
        assert f"super().{key}(" in inspect.getsource(plus[key]), key
    import stgc_hf  # noqa: PLC0415  (needs transformers)

    elsewhere = {"find_layers"} & set(vars(stgc_hf.ModelSTGC))  # the library's layers; balance_loss: for other routers
    assert hooks - plus.keys() - elsewhere <= {"balance_loss"}
    assert not [node for node in ast.walk(ast.parse((ROOT / "stgc_plus.py").read_text())) if is_patch(node)]


def is_patch(node) -> bool:
    """stgc.x = ... or setattr(stgc, ...)"""
    targets = node.targets if isinstance(node, ast.Assign) else []
    owners = [target.value for target in targets if isinstance(target, ast.Attribute)]
    owners += node.args[:1] if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr" else []
    return any(isinstance(owner, ast.Name) and owner.id == "stgc" for owner in owners)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Both at once where nothing else of the project is: their processes, two rows of stgc.py, whether it ran on then."""
    folder, started = tmp_path_factory.mktemp("demos"), {}
    for name in ("stgc.py", "stgc_plus.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("stgc.py", "stgc_plus.py"):
        command, pipe = [sys.executable, "-u", name], subprocess.PIPE
        started[name] = subprocess.Popen(command, cwd=folder, env=CALM, stdout=pipe, stderr=pipe, text=True)
    rows = [started["stgc.py"].stdout.readline() for _ in range(2)]
    yield started, rows, started["stgc.py"].poll() is None
    for process in started.values():
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("script, rows, last", [("stgc.py", 8, "python stgc_plus.py"), ("stgc_plus.py", 5, "no gain")])
def test_demos(script, rows, last, demos):
    """Each runs alone (stgc_plus needs stgc), and shows the main loss in each row."""
    process = demos[0][script]
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    header, *table, end = ("".join(demos[1] if script == "stgc.py" else []) + stdout).splitlines()
    assert header.endswith("main loss") and len(table) == rows and last in end
    numbers = [[float(number) for number in re.findall(r"-?\d+\.\d+", row)] for row in table]
    if script == "stgc.py":  # the ratio falls and the consistency rises, and it does not hide what that costs
        assert numbers[-1][0] < numbers[3][0] - 0.05 and numbers[-1][1] > numbers[3][1] and numbers[-1][2] > numbers[3][2]
    else:  # none, ce, reroute, random, one pass: chance keeps the paper's ratio below that of the others
        assert all(row[0] < row[1] for row in numbers) and len({tuple(row) for row in numbers[:4]}) == 4


@pytest.mark.slow
def test_the_demo_and_its_control():
    """The conflict loss alone lowers the ratio, and raises the consistency more than the same loss on random pairs does."""
    torch.manual_seed(0)
    model = stgc.Demo(stgc_plus.Experts(4, 16, 32))
    everything = torch.optim.AdamW(model.parameters(), 3e-3)
    model.fit(stgc_plus.STGC(model, stgc.STGCConfig("none")), everything, 190)
    before = model.fit(stgc_plus.STGC(model, stgc.STGCConfig("none")), everything, 10)
    found = {}
    for select in ("conflict", "random"):
        twin = copy.deepcopy(model)
        trainer = stgc_plus.STGC(twin, stgc_plus.STGCConfig(alpha=0.0, select=select))
        optimizer = torch.optim.AdamW(twin.moe.router.parameters(), 1e-2)
        twin.fit(trainer, optimizer, 140, alone=True)
        found[select] = twin.fit(trainer, optimizer, 10, alone=True)
    ce, placebo = found["conflict"], found["random"]
    assert ce[0] < before[0] - 0.05 and ce[1] > before[1] and ce[1] > placebo[1]
    assert ce[2] > before[2]  # the conflict loss alone serves no task: the demo does not hide it


@pytest.mark.slow
def test_the_demo_prints_as_it_goes(demos):
    """A row is there as soon as it is known, not at the end."""
    _, rows, still_running = demos
    assert rows[1].startswith("without STGC") and still_running


# ---- 2. Base and extension ----
OPTIONS = [{"top_k": 1}, {}, {"top_k": 4}, {"bias": False}, {"gated": True, "activation": F.silu}]


@pytest.mark.parametrize("options", OPTIONS, ids=["top1", "top2", "all on", "no biases", "gated"])
@pytest.mark.parametrize("kind", ["ce", "mse", "none"])
def test_both_agree(options, kind):
    """float64: the same flags, losses, statistics and gradients to 1e-12, on the layers of either file."""
    net, batch = make_net(**options, of=stgc), make_batch(tokens=40)
    twin = make_net(**options)
    twin.load_state_dict(net.state_dict())
    config = {"conflict_loss": kind, "alpha": 0.2, "beta": 0.7, "tau": 0.1}
    expected = run(net, batch, of=stgc, **config)
    for model in (net, twin):
        result = run(model, batch, **config)
        same_verdicts(result.verdicts, expected.verdicts, rtol=1e-12)
        same_grads(result.grads, expected.grads, rtol=1e-12)
        close(result.total, expected.total, rtol=1e-12)
        for row, truth in zip(result.stats, expected.stats, strict=True):
            for key, value in truth.items():
                assert key == "layer" or close(row[key], value, rtol=1e-12) is None


def test_a_base_config_is_one_without_extensions():
    net, batch = make_net(), make_batch()
    trainer = stgc_plus.STGC(net, stgc.STGCConfig("mse", tau=0.2, beta=0.5))
    assert trainer.config == stgc_plus.STGCConfig("mse", tau=0.2, beta=0.5)
    expected = run(net, batch, conflict_loss="mse", tau=0.2, beta=0.5)
    net.zero_grad()
    trainer.detach()
    trainer = stgc_plus.STGC(net, stgc.STGCConfig("mse", tau=0.2, beta=0.5))
    trainer.loss(main_loss(net, batch)).backward()
    assert all(torch.equal(parameter.grad, expected.grads[name]) for name, parameter in net.named_parameters())


def test_the_base_refuses_what_it_does_not_know():
    """Each refusal names stgc_plus, and leaves an earlier watch alone."""
    net, plus = make_net(of=stgc), make_net()
    earlier = stgc.STGC(net)
    for model, config in ((net, stgc_plus.STGCConfig()), (net, stgc_plus.STGCConfig(passes="one")), (net, {"tau": 0.0})):
        with pytest.raises(TypeError, match="stgc_plus"):
            stgc.STGC(model, config)
    with pytest.raises(ValueError, match="stgc_plus"):
        stgc.STGC(plus)
    assert all(layer.watch.func.__self__ is earlier for layer in net.layers)
    assert all(layer.watch is None for layer in plus.layers)
    for field in ("passes", "gradients", "select", "every", "layers", "router_only", "seed", "leave_one_out"):
        with pytest.raises(TypeError, match=f"no {field}: .*stgc_plus"):
            stgc.STGCConfig(**{field: 1})
    with pytest.raises(TypeError, match="no tua"):
        stgc_plus.STGCConfig(tua=0.1)
    with pytest.raises(ValueError, match="reroute.*stgc_plus"):
        stgc.STGCConfig("reroute")
    for bad in ({"tau": math.nan}, {"alpha": math.inf}, {"beta": -math.inf}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            stgc.STGCConfig(**bad)


def test_refused_by_the_extension():
    """Bad layers leave an earlier watch alone, too; whole weights have no sum without the pair."""
    net = make_net()
    earlier = stgc_plus.STGC(net)
    for config in ({"layers": (7,)}, {"layers": (-1,)}):
        with pytest.raises(ValueError, match="layers"):
            stgc_plus.STGC(net, stgc_plus.STGCConfig(**config))
    assert all(layer.watch.func.__self__ is earlier for layer in net.layers)
    with pytest.raises(ValueError, match="leave_one_out"):
        stgc_plus.STGCConfig(leave_one_out=True, gradients="weight")


# ---- 3. Where the base cannot be correct it raises, elsewhere it is ----
def test_what_the_base_leaves_to_the_extension():
    """Frozen routers and experts, a layer that did not run, reentrant checkpointing: each would train on something else."""
    net, batch = make_net(of=stgc), make_batch()
    net.layers[1].router.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"router of layers\.1 is frozen.*stgc_plus"):
        stgc.STGC(net).loss(main_loss(net, batch))
    run(net, batch, of=stgc, conflict_loss="none")  # measured
    net.layers[1].router.requires_grad_(True)
    trainer = stgc.STGC(net)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no forward of layers\.0 .*call the model first.*stgc_plus"):
            trainer.loss(torch.zeros((), requires_grad=True))
    out_TD = net.layers[0](batch.x_TD)
    with pytest.raises(RuntimeError, match=r"no forward of layers\.1 "):
        trainer.loss(out_TD.sum())
    with torch.no_grad():
        net(batch.x_TD)
    with pytest.raises(RuntimeError, match=r"no forward of layers\.0 "):
        trainer.loss(torch.zeros((), requires_grad=True))
    for parameter in net.layers[0].experts.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"no gradient reaches the experts of layers\.0"):
        main_loss(net, batch)
    for parameter in net.layers[0].experts.parameters():
        parameter.requires_grad_(True)
    net.call = lambda layer, *inputs: checkpoint(layer, *inputs, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        trainer.loss(main_loss(net, batch._replace(x_TD=batch.x_TD.clone().requires_grad_())))


def test_the_base_under_checkpointing():
    """Non-reentrant: the same flags, losses and gradients."""
    net, batch = make_net(of=stgc), make_batch(tokens=20)
    expected = run(net, batch, of=stgc)
    net.call = lambda layer, *inputs: checkpoint(layer, *inputs, use_reentrant=False)
    result = run(net, batch, of=stgc)
    same_grads(result.grads, expected.grads)
    same_verdicts(result.verdicts, expected.verdicts)
    assert result.stats == expected.stats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_base_in_any_dtype(dtype):
    """Dtype in is dtype out; means and cosines are wide; autocast changes few flags."""
    net, batch = make_net(dtype=dtype, of=stgc), make_batch(dtype=dtype)
    result = run(net, batch, of=stgc)
    assert net(*batch[::2]).dtype == dtype and all(grad.dtype == dtype for grad in result.grads.values())
    assert all(grad.isfinite().all() for grad in result.grads.values())
    wide = torch.promote_types(dtype, torch.float32)
    assert all(verdict.similarity_TK.dtype == wide for verdict in result.verdicts)


def test_the_base_under_autocast():
    net, batch = make_net(dtype=torch.float32, of=stgc), make_batch(tokens=60, dtype=torch.float32)
    expected, trainer = run(net, batch, of=stgc), stgc.STGC(net)
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        assert net.layers[0](batch.x_TD).dtype == torch.bfloat16
        total = trainer.loss(main_loss(net, batch))
    total.backward()
    for verdict, truth in zip(trainer.verdicts, expected.verdicts, strict=True):
        assert verdict.similarity_TK.dtype == torch.float32
        assert (verdict.conflict_TK == truth.conflict_TK).float().mean() > 0.9


def test_a_second_object_replaces_the_first():
    net, batch = make_net(of=stgc), make_batch()
    first, second = stgc.STGC(net), stgc.STGC(net)
    main = main_loss(net, batch)
    with pytest.raises(RuntimeError, match="another STGC object"):
        first.loss(main)
    second.loss(main).backward()
    assert None not in second.verdicts


@pytest.mark.parametrize("of", [stgc, stgc_plus], ids=["base", "plus"])
def test_pairs_of_weight_zero_are_off(of):
    """A router that chooses fewer than K experts gives the others weight 0: they are not run, judged or counted."""

    class Choosy(of.Experts):
        rows = 0

        def forward(self, x_SD, pairs, step=None):
            Choosy.rows = int(pairs.ends_E[-1])
            return super().forward(x_SD, pairs, step)

    net, batch = make_net(num_layers=1, of=of), make_batch(padding=0)
    (layer,) = net.layers
    layer.experts.__class__ = Choosy
    off_T, routing = torch.arange(14) % 3 == 0, layer.routing

    def choose(x_TD):
        found = routing(x_TD)
        return found._replace(weights_TK=found.weights_TK * torch.stack([~torch.zeros_like(off_T), ~off_T], dim=1))

    layer.routing = choose
    trainer = stgc_plus.STGC(net)
    trainer.loss(main_loss(net, batch)).backward()
    (verdict,), (row,) = trainer.verdicts, trainer.stats()
    assert Choosy.rows == 28 - off_T.sum() and not (verdict.judged_TK | verdict.conflict_TK)[off_T, 1].any()
    labelled_T = batch.labels_T >= 0
    assert torch.equal(verdict.judged_TK[:, 0], labelled_T)
    close(row["conflict_ratio"], verdict.conflict_TK.sum().item() / (28 - off_T.sum().item()))
    close(sum(row["load"]), 1.0)


def test_a_router_without_parameters():
    """It has nothing to freeze, in either file."""

    class Fixed(nn.Module):
        def forward(self, x_TD):
            return x_TD[:, :4]

    for of in (stgc, stgc_plus):
        net, batch = make_net(of=of), make_batch()
        for layer in net.layers:
            layer.router = Fixed()
        assert all(verdict.judged_TK.any() for verdict in run(net, batch, of=of).verdicts)


# ---- 4. The three functions for any MoE layer ----
def test_find_conflicts_takes_any_shape():
    """(T, K), (S,) in any order, or three axes; a negative expert is no pair. The same flags as a loop in float64."""
    ids_TK, grads = torch.randint(5, (30, 2)), [torch.randn(30, 2, 8), torch.randn(30, 2, 6)]
    ids_TK[4] = -1
    grads[0][7, 1] = grads[1][7, 1] = 0
    found = stgc.find_conflicts(grads, ids_TK, 5, tau=0.1)
    order_S = torch.randperm(60)
    flat = stgc.find_conflicts([grad.flatten(0, 1)[order_S] for grad in grads], ids_TK.flatten()[order_S], 5, tau=0.1)
    deep = stgc.find_conflicts([grad.unflatten(0, (5, 6)) for grad in grads], ids_TK.unflatten(0, (5, 6)), 5, tau=0.1)
    for name in ("similarity_TK", "judged_TK", "conflict_TK"):
        one = getattr(found, name)
        close(getattr(flat, name).double(), one.flatten()[order_S].double(), 1e-5, 1e-5)
        close(getattr(deep, name).flatten().double(), one.flatten().double(), 1e-5, 1e-5)
    for (t, k), e in ((pair, ids_TK[pair]) for pair in [(t, k) for t in range(30) for k in range(2)]):
        means = [grad[ids_TK == e].double().mean(0) for grad in grads]
        cosines = [F.cosine_similarity(grad[t, k].double(), mean_O, dim=0) for grad, mean_O in zip(grads, means)]
        alive = e >= 0 and (t, k) != (7, 1)
        assert found.judged_TK[t, k] == alive
        if alive:
            close(found.similarity_TK[t, k], sum(cosines) / 2, 1e-5, 1e-5)
            assert found.conflict_TK[t, k] == (found.similarity_TK[t, k] < 0.1)


def test_expert_ids_out_of_range_are_refused():
    with pytest.raises(ValueError, match="up to 4, but there are 4 experts"):
        stgc.find_conflicts([torch.randn(3, 8)], torch.tensor([0, 4, 1]), 4)
    ids_TK = torch.tensor([[0, -1], [2, 1]])  # no pair: not in a loss either
    found = stgc.find_conflicts([torch.randn(2, 2, 8)], ids_TK, 4, tau=3.0)
    assert found.conflict_TK.tolist() == [[True, False], [True, True]]
    assert stgc.conflict_loss(torch.zeros(2, 4), ids_TK, found.conflict_TK).item() == pytest.approx(math.log(4))


def test_losses_take_plain_tensors():
    """Counts from torch.bincount, masks of bool: means over the conflicting pairs, 0 without any; 1 for even loads."""
    logits_TE, ids_TK = torch.randn(12, 4, dtype=torch.float64), torch.arange(24).view(12, 2) % 4
    conflict_TK = torch.rand(12, 2) < 0.5
    t_C, k_C = conflict_TK.nonzero(as_tuple=True)
    close(stgc.conflict_loss(logits_TE, ids_TK, conflict_TK), F.cross_entropy(-logits_TE[t_C], ids_TK[t_C, k_C]))
    mse = logits_TE.softmax(-1)[t_C, ids_TK[t_C, k_C]].square().mean()
    close(stgc.conflict_loss(logits_TE, ids_TK, conflict_TK, "mse"), mse)
    assert stgc.conflict_loss(logits_TE, ids_TK, torch.zeros_like(conflict_TK)) == 0
    load_E = torch.bincount(ids_TK.flatten(), minlength=4)
    close(stgc.balance_loss(logits_TE, load_E), 1.0)
    load_E[0] = 18
    share_E = load_E / load_E.sum()
    keep_T = torch.arange(12) != 3
    expected = 4 * (share_E * logits_TE[keep_T].softmax(-1).mean(0)).sum()
    close(stgc.balance_loss(logits_TE, load_E, keep_T), expected, rtol=1e-6)
    assert stgc.balance_loss(logits_TE, 0 * load_E, torch.zeros(12, dtype=torch.bool)) == 0


def test_a_batch_of_padding_only():
    net, batch = make_net(of=stgc), make_batch(padding=14)
    trainer = stgc.STGC(net)
    trainer.loss(net(batch.x_TD, batch.keep_T).square().sum()).backward()
    for row in trainer.stats():
        assert row["conflict_ratio"] == row["conflict_loss"] == row["balance_loss"] == 0.0
        assert all(math.isfinite(number) for number in (row["consistency"], row["consistency_std"], *row["load"]))
    assert isinstance(batch, Batch)


def test_the_demo_as_a_picture(tmp_path):
    """Drawn from a run of its own; the cosine matrix has ones on its diagonal and the mean that `consistency` reports."""
    from lab.report import demo  # noqa: PLC0415

    rows, before, after, _ = demo.run_demo(steps=5)
    assert len(rows) == 5 and all(len(row) == 3 for row in rows)
    for moment in (before, after):
        torch.testing.assert_close(moment.cosine_NN.diagonal(), torch.ones(len(moment.cosine_NN)))
        assert len(moment.similarity_N) == 512
    assert demo.plot_demo(tmp_path / "demo.png", steps=5).stat().st_size > 20_000


# ---- 6. Padding and scales ----
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38])
@pytest.mark.parametrize("config", [{}, {"conflict_loss": "none"}, {"conflict_loss": "mse"}], ids=str)
@pytest.mark.parametrize("of", [stgc, stgc_plus], ids=["base", "plus"])
def test_nothing_comes_from_padding(of, config, value):
    """Whatever stands there, or comes back there: the same loss, gradients, flags and statistics as with zeros."""
    net, batch = Chain(make_net(of=of, dtype=torch.float32)), make_batch(dtype=torch.float32)
    same_run(*(run(net, fill(batch, content), of=of, **config) for content in (0.0, value)))


@pytest.mark.parametrize("config", [{"passes": "one"}, {"gradients": "weight"}, {"conflict_loss": "reroute"}], ids=str)
def test_nothing_comes_from_padding_in_the_extension(config):
    net, batch = Chain(make_net(dtype=torch.float32)), make_batch(dtype=torch.float32)
    same_run(*(run(net, fill(batch, content), **config) for content in (0.0, float("nan"))))


class Chain(nn.Module):
    """Layers without a residual around them, which would carry padding on. What is in padding also comes back to it."""

    def __init__(self, net):
        super().__init__()
        self.layers, self.head = net.layers, net.head

    def forward(self, x_TD, keep_T):
        back_TD = x_TD.detach()
        for layer in self.layers:
            x_TD = layer(x_TD, keep_T)
            x_TD.register_hook(lambda grad_TD: torch.where(keep_T.unsqueeze(1), grad_TD, back_TD))
        return self.head(x_TD)


def fill(batch, content: float):
    return batch._replace(x_TD=batch.x_TD.masked_fill(~batch.keep_T.unsqueeze(1), content))


def same_run(expected, found):
    assert found.total == expected.total and found.stats == expected.stats
    for one, other in zip(found.verdicts, expected.verdicts):
        assert torch.equal(one.conflict_TK, other.conflict_TK) and torch.equal(one.judged_TK, other.judged_TK)
    for name, grad in expected.grads.items():
        assert torch.equal(found.grads[name], grad), name


def test_plain_functions_leave_padding_out():
    logits_TE, keep_T = torch.randn(6, 4), torch.tensor([1, 1, 0, 1, 1, 0])
    broken_TE = logits_TE.masked_fill(keep_T.unsqueeze(1) == 0, float("nan")).requires_grad_()
    conflict_TK, load_E = (torch.rand(6, 2) < 0.7) & keep_T.bool().unsqueeze(1), torch.arange(4)
    ids_TK = torch.randint(4, (6, 2))
    for loss in (lambda z: stgc.balance_loss(z, load_E, keep_T), lambda z: stgc.conflict_loss(z, ids_TK, conflict_TK)):
        assert loss(broken_TE) == loss(logits_TE)
        assert torch.autograd.grad(loss(broken_TE), broken_TE)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.int32])
def test_masks_of_any_whole_type(dtype):
    net, batch = make_net(of=stgc), make_batch()
    assert torch.equal(net(batch.x_TD, batch.keep_T.to(dtype)), net(batch.x_TD, batch.keep_T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_an_additive_mask_is_refused(dtype):
    """0 for tokens and -3e38 for padding: taken as numbers it would keep the padding alone."""
    layer = make_net(of=stgc).layers[0]
    mask_T = torch.zeros(6, dtype=dtype).index_fill(0, torch.tensor([4, 5]), torch.finfo(dtype).min)
    with pytest.raises(TypeError, match=str(dtype)):
        layer(torch.randn(6, 8, dtype=torch.float64), mask_T)
    layer.mask = mask_T
    with pytest.raises(TypeError, match=str(dtype)):
        layer(torch.randn(6, 8, dtype=torch.float64))


EXTENSIONS = [{}, {"passes": "one"}, {"gradients": "weight"}, {"leave_one_out": True}]
SCALES = [2.0**-66, 1e-20, 1e-8, 1e12, 1e22, 2.0**73]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("config", EXTENSIONS, ids=str)
def test_flags_do_not_depend_on_the_scale_of_the_loss(config, scale):
    net, batch = make_net(dtype=torch.float32), make_batch(60, dtype=torch.float32)
    expected, found = (run(net, batch, by, **config) for by in (1.0, scale))
    for one, other in zip(found.verdicts, expected.verdicts):
        assert torch.equal(one.conflict_TK, other.conflict_TK) and torch.equal(one.judged_TK, other.judged_TK)
        close(one.similarity_TK, other.similarity_TK, rtol=1e-4, atol=1e-5)
        assert one.similarity_TK.abs().max() <= 1 + 1e-5
    for one, other in zip(found.stats, expected.stats):
        for key in ("conflict_ratio", "conflict_ratio_others", "consistency", "consistency_by_chance"):
            close(one[key], other[key], rtol=1e-4)


@pytest.mark.parametrize("small", [1.0, 1e-12, 1e-21, 1e-30])
def test_small_gradients_are_compared_as_others_are(small):
    """Float32 beside float64, whose squares have room for all of them."""
    grads, ids_T = [torch.randn(40, size) for size in (8, 12)], torch.randint(4, (40,))
    grads = [grad_TO * torch.where(torch.rand(40, 1) < 0.4, small, 1.0) for grad_TO in grads]
    found, expected = (
        stgc.find_conflicts([one.to(dtype) for one in grads], ids_T, 4) for dtype in (torch.float32, torch.float64)
    )
    close(found.similarity_TK, expected.similarity_TK.float(), rtol=1e-4, atol=1e-5)
    close(found.norm_TKL, expected.norm_TKL.float(), rtol=1e-5, atol=0)
    assert torch.equal(found.conflict_TK, expected.conflict_TK) and found.judged_TK.all()


@pytest.mark.parametrize("infinite", [float("inf"), float("nan"), -float("inf"), 3e38])
def test_infinite_gradients_are_left_out(infinite):
    """They change no other pair, and are not judged."""
    grads, ids_T = [torch.randn(20, 8), torch.randn(20, 6)], torch.arange(20) % 4
    broken = [grads[0].index_put((torch.tensor([5]), torch.tensor([2])), torch.tensor(infinite)), grads[1]]
    broken[0][5, 3] = infinite
    others = [grads[0].index_fill(0, torch.tensor([5]), 0.0), grads[1]]
    found, expected = (stgc.find_conflicts(given, ids_T, 4) for given in (broken, others))
    rest_T = torch.arange(20) != 5
    assert torch.equal(found.conflict_TK[rest_T], expected.conflict_TK[rest_T]) and not found.judged_TK[5]
    assert torch.equal(found.similarity_TK[rest_T], expected.similarity_TK[rest_T])
    assert found.similarity_TK.isfinite().all() and found.norm_TKL[5, 0] == float("inf")


@pytest.mark.parametrize("config", [*EXTENSIONS, {"conflict_loss": "reroute"}], ids=str)
def test_statistics_stay_finite(config):
    """One infinite token gradient, of a token that is neither padding nor without a label: counted, and nothing else."""
    net, batch = make_net(num_layers=1, dtype=torch.float32), make_batch(60, dtype=torch.float32)
    token = int((batch.labels_T >= 0).nonzero()[7])
    trainer = stgc_plus.STGC(net, stgc_plus.STGCConfig(**config))
    out_TC = net(batch.x_TD, batch.keep_T)
    out_TC.register_hook(lambda grad_TC: grad_TC.index_fill(0, torch.tensor([token]), float("inf")))
    total = trainer.loss(F.cross_entropy(out_TC, batch.labels_T))
    total.backward()
    (numbers,), (verdict,) = trainer.stats(), trainer.verdicts
    values = torch.cat([torch.tensor(value).flatten() for key, value in numbers.items() if key != "layer"])
    assert values.isfinite().all() and total.isfinite(), numbers
    assert not verdict.judged_TK[token].any() and not verdict.conflict_TK[token].any()
    whole = "weight" in config.values()  # its experts' weight gradients are infinite
    pairs = sum(numbers["load"][e] for e in verdict.target_TK[token]) if whole else 2 / (2 * batch.keep_T.sum())
    assert numbers["infinite_ratio"] == pytest.approx(float(pairs), rel=1e-4)
    assert verdict.judged_TK.any() != (numbers["infinite_ratio"] > 0.9)
