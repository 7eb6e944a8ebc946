"""The search over synthetic settings: its data, routers, pairing, measures, record and report."""

import copy
import json
import sys
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

from lab.bench import regimes
from lab.report import regimes as report
from lab.run.cli import RunFailed, UserError

STEPS = 16


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(regimes, "HELD_OUT", 1024)


@pytest.mark.parametrize("tasks, mark, wrong", [(1, "strong", 0.3), (4, "weak", 0.2), (5, "absent", 0.0)])
def test_labels_and_noise_are_what_the_setting_says(tasks, mark, wrong):
    setting = regimes.Setting(tasks=tasks, mark=mark, wrong=wrong, examples=2000)
    train, held_out = regimes.make_data(setting, seed=3)
    classes = max(4, tasks)
    answers_IC = torch.randn(regimes.CONTENT, classes, generator=torch.Generator().manual_seed(3))
    for data, share in ((train, wrong), (held_out, 0.0)):
        right_T = ((data.x_TI[:, tasks:] @ answers_IC).argmax(-1) + data.task_T) % classes
        assert (right_T != data.label_T).sum() == round(share * len(right_T))
        assert data.task_T.unique().tolist() == list(range(tasks)) and data.label_T.max() == classes - 1
        own_T = data.x_TI[torch.arange(len(right_T)), data.task_T]  # the mark of the task, then those of the others
        assert abs(own_T.mean() - regimes.MARKS[mark]) < 0.15 and abs(own_T.std() - 1) < 0.15
        assert tasks == 1 or abs((data.x_TI[:, :tasks].sum(1) - own_T).mean()) < 0.3


@pytest.mark.parametrize("experts, top_k", [(4, 2), (8, 2), (4, 1)])
def test_an_oracle_routes_by_task(experts, top_k):
    setting = regimes.Setting(experts=experts, top_k=top_k, mark="absent", depth=2)
    model, train, _ = regimes.begin(setting, 0, STEPS)
    model, seen = copy.deepcopy(model), []
    model.reroute("oracle")
    for layer in model.layers:
        layer.watch = lambda *forward: seen.append(forward[1])  # its routing
    model(train.x_TI, train.task_T)
    for routing in seen:
        weight_TE = torch.zeros_like(routing.logits_TE).scatter(1, routing.expert_ids_TK, routing.weights_TK)
        own = experts // setting.tasks
        for expert, task in product(range(experts), range(setting.tasks)):
            expected = 1 / min(top_k, own) if expert // own == task else 0
            assert (weight_TE[train.task_T == task, expert] - expected).abs().max() < 1e-6
    assert len(seen) == 2


def test_the_variants_of_a_seed_share_data_and_start():
    setting, seen = regimes.Setting(examples=64), {}
    for variant, beta in regimes.variants_of(setting):
        model, train, _ = regimes.begin(setting, 1, STEPS)
        model = copy.deepcopy(model)
        model.reroute(variant)
        start = [p for name, p in model.named_parameters() if "router" not in name]
        inputs = [torch.cat([p.detach().flatten() for p in start])]
        model.register_forward_pre_hook(lambda _, args, into=inputs: into.append(args[0]))
        for _ in regimes.fit(model, train, variant, beta, 1, 5, routers_alone=False):
            pass
        seen[variant, beta] = inputs
    assert len(seen) == 19
    for inputs in seen.values():
        assert len(inputs) == 6 and all(map(torch.equal, inputs, seen["none", None]))
    assert not torch.equal(*seen["none", None][1:3])


@pytest.mark.parametrize("setting", [regimes.Setting(), regimes.Setting(start="copied", router="cosine", top_k=1)])
def test_without_weight_the_losses_change_nothing(setting):
    none, *others = (
        regimes.measure(setting, variant, 0.0, 2, STEPS) for variant in ("none", "ce", "placebo", "flat", "long")
    )  # ce-one holds the balance loss to the router, too
    assert others == [none] * 4


def test_who_learns():
    model, train, _ = regimes.begin(regimes.Setting(start="trained"), 0, STEPS)
    for variant, routers_alone, moving in (("ce", True, {True}), ("frozen", False, {False}), ("flat", False, {True, False})):
        own = copy.deepcopy(model)
        for _ in regimes.fit(own, train, variant, 1.0, 0, 3, routers_alone):
            pass
        pairs = zip(own.named_parameters(), model.parameters())
        assert {"router" in name for (name, after), before in pairs if not torch.equal(after, before)} == moving
    untrained, *_ = regimes.begin(regimes.Setting(), 0, STEPS)  # of the same seed
    trained = {name: not torch.equal(p, model.get_parameter(name)) for name, p in untrained.named_parameters()}
    assert all(trained[name] == ("router" not in name) for name in trained)


def test_only_the_router_meets_the_loss_of_ce_one():
    """In the first step what lies before the router gets the same gradient at any beta."""
    setting, seen = regimes.Setting(), {}
    for variant, beta in (("ce", 0.0), ("ce", 1.0), ("ce-one", 0.0), ("ce-one", 1.0)):
        model, train, _ = regimes.begin(setting, 0, STEPS)
        model = copy.deepcopy(model)
        embed, router = model.embed.weight, model.layers[0].router.weight
        gradients = []
        embed.register_hook(lambda grad, into=gradients: into.append(grad.clone()))
        router.register_hook(lambda grad, into=gradients: into.append(grad.clone()))
        next(regimes.fit(model, train, variant, beta, 0, 1, routers_alone=False))
        seen[variant, beta] = {len(grad) == setting.experts: grad for grad in gradients}  # True: the router's
    for variant, router in product(("ce", "ce-one"), (True, False)):
        equal = (variant, router) == ("ce-one", False)
        assert torch.allclose(seen[variant, 0.0][router], seen[variant, 1.0][router], atol=1e-7) is equal


def test_weights_of_one_expert_sum_to_1_where_the_setting_says():
    for normalize, expected in ((None, False), (True, True)):
        model = regimes.Model(regimes.Setting(top_k=1, normalize=normalize))
        seen = []
        model.layers[0].watch = lambda *forward, into=seen: into.append(forward[1].weights_TK)
        model(torch.randn(5, 4 + regimes.CONTENT), torch.zeros(5, dtype=torch.long))
        assert (seen[0] == 1).all().item() is expected


def test_copied_experts_start_equal():
    w_EDF = regimes.Model(regimes.Setting(start="copied")).layers[0].experts.w_in_EDF
    assert (w_EDF == w_EDF[0]).all() and w_EDF[0].unique().numel() > 1


def test_long_picks_the_pairs_with_long_gradients():
    model, train, _ = regimes.begin(regimes.Setting(), 0, STEPS)
    for _, _, stgc in regimes.fit(copy.deepcopy(model), train, "long", 1.0, 0, 2, routers_alone=False):
        (verdict,) = stgc.verdicts
        lengths = [sum(x * x for x in norms) ** 0.5 for norms in verdict.norm_TKL.flatten(0, 1).tolist()]
        average = sum(lengths) / len(lengths)
        assert verdict.picked_TK.flatten().tolist() == [length > average for length in lengths]


@pytest.mark.parametrize("setting", [regimes.Setting(depth=2), regimes.Setting(top_k=1, experts=3, tasks=2)])
def test_margin_and_moved_against_loops(setting, monkeypatch):
    """From what the routers gave: 16 steps, so that the three moments lie 2 apart."""
    fit, trained, looked = regimes.fit, [], []

    def see(router, args, logits_TE):
        if logits_TE.requires_grad:
            trained.append(logits_TE)
        elif len(logits_TE) == regimes.PROBE:
            looked.append((len(trained) // setting.depth, logits_TE.argmax(-1).tolist()))

    def spy(model, *args, **kwargs):
        for layer in model.layers:
            layer.router.register_forward_hook(see)
        yield from fit(model, *args, **kwargs)

    monkeypatch.setattr(regimes, "fit", spy)
    values = dict(zip(regimes.COLUMNS[4:], regimes.measure(setting, "ce", 1.0, 0, STEPS)))
    margins = []
    for row in torch.cat(trained[-setting.depth :]).softmax(-1).tolist():
        row.sort(reverse=True)
        margins.append(row[setting.top_k - 1] - row[setting.top_k])
    assert values["margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    assert [step for step, _ in looked[:: setting.depth]] == [12, 14, 16]
    firsts = [first for _, first in looked]
    shares = [
        sum(a != b for a, b in zip(before, now)) / regimes.PROBE
        for layer in range(setting.depth)
        for before, now in pairwise(firsts[layer :: setting.depth])
    ]
    assert values["moved"] == pytest.approx(sum(shares) / len(shares), rel=1e-4) and values["moved"] > 0


@pytest.mark.parametrize("variant, moved", [("random", 0.75), ("oracle", 0.0)])
def test_without_a_learned_router_there_is_no_margin(variant, moved):
    *_, margin, found = regimes.measure(regimes.Setting(), variant, None, 0, STEPS)
    assert margin is None and found == pytest.approx(moved, abs=0.1)


def test_scores_are_of_the_half_that_does_not_choose():
    model, _, held_out = regimes.begin(regimes.Setting(), 0, STEPS)
    half = regimes.HELD_OUT // 2
    chooses, accuracy, loss = regimes.evaluate(model, held_out)
    rows = [regimes.Examples(*(part[own] for part in held_out)) for own in (slice(half), slice(half, None))]
    doubled = [regimes.Examples(*(part.repeat(2, *[1] * (part.ndim - 1)) for part in own)) for own in rows]
    (_, first, _), (_, second, its_loss) = (regimes.evaluate(model, own) for own in doubled)
    assert (chooses, accuracy, loss) == pytest.approx((first, second, its_loss), rel=1e-5) and first != second


def test_the_best_checkpoint_is_chosen_by_the_other_half(monkeypatch):
    scores = iter([(0.1, 0.8, 3.0), (0.3, 0.2, 1.0), (0.2, 0.9, 2.0)] + [(0.0, 0.4, 5.0)] * 20)
    monkeypatch.setattr(regimes, "evaluate", lambda *_: next(scores))
    assert regimes.measure(regimes.Setting(), "none", None, 0, STEPS)[:4] == [0.4, 5.0, 0.2, 1.0]


# ---- The record ----


def search(monkeypatch, file, *words) -> dict:
    monkeypatch.setattr(sys, "argv", ["regimes", "--steps", str(STEPS), "--output", str(file), *words])
    regimes.main()
    return json.loads(file.read_text())


def test_a_stopped_search_continues(tmp_path, monkeypatch):
    words, measure, left = ("--settings", "few-wrong-20", "--seeds", "1"), regimes.measure, [5]

    def stop(*args):
        left[0] -= 1
        if left[0] < 0:
            raise RunFailed
        return measure(*args)

    whole = search(monkeypatch, tmp_path / "whole.json", *words)
    monkeypatch.setattr(regimes, "measure", stop)
    with pytest.raises(RunFailed):
        search(monkeypatch, tmp_path / "part.json", *words)
    part = json.loads((tmp_path / "part.json").read_text())
    assert part["runs"] == whole["runs"][:5]
    left[0] = 14  # the rest, and no more
    del part["settings"]["few-wrong-20"]["normalize"]  # as in a record of before that option
    (tmp_path / "part.json").write_text(json.dumps(part))
    part = search(monkeypatch, tmp_path / "part.json", *words, "--resume")
    assert part["runs"] == whole["runs"] and part["command"] and len(part["resumed"]) == 1
    assert [run[:4] for run in whole["runs"]] == [
        ["few-wrong-20", *one, 0] for one in regimes.variants_of(regimes.Setting())
    ]
    assert "commit" in whole and whole["versions"]["torch"] and whole["threads"] == 1
    assert whole["columns"] == list(regimes.COLUMNS) and whole["config"]["steps"] == STEPS


def test_another_search_is_refused(tmp_path, monkeypatch, capsys):
    file = tmp_path / "found.json"
    monkeypatch.setattr(regimes, "measure", lambda *_: [0.5] * 7)
    words = ("--settings", "weak", "--seeds", "1")
    search(monkeypatch, file, *words)
    before = file.read_text()

    def refused(*more) -> str:
        with pytest.raises(SystemExit) as error:
            search(monkeypatch, file, *words, *more)
        assert error.value.code == 2 and file.read_text() == before
        return capsys.readouterr().err

    assert "continue it with --resume" in refused()
    assert "was made with {'steps': 16" in refused("--resume", "--steps", "17")
    changed = regimes.SETTINGS | {"weak": replace(regimes.SETTINGS["weak"], width=17)}
    monkeypatch.setattr(regimes, "SETTINGS", changed)
    assert "another setting 'weak'" in refused("--resume")
    file.write_text("{}")
    with pytest.raises(UserError, match="found.json has no valid command; name another file"):
        search(monkeypatch, file, *words, "--resume")


def invent(setting, variant, beta, seed, steps) -> list:
    """ce is better than all at beta 1, and as the placebo at others; dice are worse than none; flat has half the margin."""
    gain = {"ce": 0.04 if beta == 1 else 0.01, "placebo": 0.01, "random": -0.02}.get(variant, 0.0)
    noise = 0.001 * (seed * sum(map(ord, variant)) % 13)
    margin = None if variant in ("random", "oracle") else 0.05 if variant == "flat" else 0.1
    return [0.5 + gain + noise, 1.0, 0.6 + noise, 0.9, 0.8, margin, 0.25]


@pytest.fixture
def invented(tmp_path, monkeypatch):
    monkeypatch.setattr(regimes, "measure", invent)
    words = ("--settings", "weak", "trained-weak", "--seeds", "4", "--fresh", "3")
    return tmp_path / "regimes.json", search(monkeypatch, tmp_path / "regimes.json", *words)


def test_hits_run_again_on_fresh_seeds(invented):
    _, record = invented
    keys = [tuple(run[:4]) for run in record["runs"]]
    wanted = [(name, *one, seed) for name, count in (("weak", 19), ("trained-weak", 22)) for seed in range(4)
              for one in regimes.variants_of(regimes.SETTINGS[name])[:count]]  # fmt: skip
    again = [("none", None), ("random", None), ("ce", 1.0), ("placebo", 1.0), ("flat", 1.0)]
    fresh = [(name, *one, 1000 + seed) for name in ("weak", "trained-weak") for seed in range(3) for one in again]
    assert sorted(keys, key=str) == sorted(wanted + fresh, key=str) and len(wanted) == 4 * 41
    assert ("trained-weak", "long", 0.1, 3) in keys and ("weak", "long", 0.1, 3) not in keys


def test_the_report_of_a_record(invented, monkeypatch, capsys):
    file, record = invented
    monkeypatch.setattr(sys, "argv", ["regimes", str(file)])
    report.main()
    out = capsys.readouterr().out
    runs = report.runs_of(record)
    scores = [{run[3]: run[4] for run in record["runs"] if run[0] == "weak" and run[1:3] == own and run[3] < 1000}
              for own in (["ce", 1.0], ["placebo", 1.0])]  # fmt: skip
    expected = sum(100 * (scores[0][seed] - scores[1][seed]) for seed in range(4)) / 4
    found = report.gap(runs, "weak", ("ce", 1.0), ("placebo", 1.0))
    assert found.mean == pytest.approx(expected) and found.seeds == 4 and found.verdict == "better"
    again = report.gap(runs, "weak", ("ce", 1.0), fresh=True)
    assert again.seeds == 3 and f"{again.mean:+.1f} [{again.low:+.1f}, {again.high:+.1f}]" in out.split("on fresh seeds")[1]
    assert report.margin_ratio(runs, "weak", ("flat", 0.1)) == pytest.approx(0.5)
    (row,) = [words for words in map(str.split, out.splitlines()) if words[:2] == ["ce", "1"]]
    assert row[4:] == ["2+", "0-", "2+", "0-", "2+", "0-", "2+", "0-", "1.000", "0.25"]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    record["runs"] = record["runs"][:12]
    regimes.write(record, file)
    with pytest.raises(SystemExit) as error:
        report.main()
    assert error.value.code == 2 and "no setting has runs of all variants" in capsys.readouterr().err
