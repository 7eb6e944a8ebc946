"""What the flags measure: each statistic against its definition, slowly, and the command on real runs."""

import copy
import json
import shutil
from itertools import permutations, product

import pytest
import torch
import torch.nn.functional as F
from conftest import close, drawn, without_pictures
from sklearn.metrics import cohen_kappa_score
from test_glue import data, model, plain, run, words  # noqa: F401  (fixtures)
from test_lvlm import WORDS
from test_lvlm import run as run_lvlm
from torch import nn

from lab.moe import probe
from lab.report import page
from lab.report import probe as report
from lab.run.cli import UserError
from lab.vision.instructions import IGNORED
from stgc import MoELayer
from stgc_plus import STGC, Experts, STGCConfig


class Tiny(nn.Module):
    """A language model of two MoE layers, with the loss of transformers' models."""

    def __init__(self, gated=False, bias=True):
        super().__init__()
        factory = {"dtype": torch.float64}
        self.table, self.head = nn.Embedding(9, 8, **factory), nn.Linear(8, 9, **factory)
        self.moe = nn.ModuleList(MoELayer(Experts(3, 8, 6, gated=gated, bias=bias, **factory)) for _ in range(2))

    def forward(self, input_ids, labels):
        x = self.table(input_ids)
        for layer in self.moe:
            x = torch.tanh(x + layer(x) + 0.1 * x.cumsum(1))  # a token's loss reaches those before it
        logits = self.head(x)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        return type("Out", (), {"loss": loss, "logits": logits})


def draw_batch(rows=4, length=10) -> dict:
    ids = torch.randint(9, (rows, length))
    return {"input_ids": ids, "labels": ids.where(torch.rand(rows, length) < 0.6, IGNORED)}


def looks(count=1, tau=0.0, **options) -> tuple[Tiny, STGC, list[report.Look]]:
    tiny = Tiny(**options)
    stgc = STGC(tiny, STGCConfig("none", tau=tau, gradients="weight"))
    return tiny, stgc, [report.look(tiny, stgc, draw_batch()) for _ in range(count)]


def cosine(one, other) -> float:
    return F.cosine_similarity(one, other, dim=0).item()


def share_between(flags: list, groups: list) -> float:
    """Of the flags' variance, the share between the groups."""
    rows, mean = [[f for f, g in zip(flags, groups) if g == one] for one in set(groups)], sum(flags) / len(flags)
    return sum(len(row) * (sum(row) / len(row) - mean) ** 2 for row in rows) / sum((f - mean) ** 2 for f in flags)


# ---- 1. Against the definitions ----


def test_a_layers_pairs_are_those_of_the_verdicts():
    tiny, stgc, (own,) = looks(tau=0.1)
    whole = [verdict.similarity_TK for verdict in stgc.verdicts]
    bias = STGC(tiny, STGCConfig("none", tau=0.1))
    bias.loss(tiny(**own.batch).loss)
    for layer, verdict, whole_TK in zip(own.layers, bias.verdicts, whole):
        ids_TK = verdict.target_TK
        k_P = (ids_TK[layer.tokens_P] == layer.experts_P.unsqueeze(1)).float().argmax(1)
        assert len(layer.tokens_P) == verdict.judged_TK.sum() and layer.experts_P.diff().min() == 0
        assert torch.equal(ids_TK[layer.tokens_P, k_P], layer.experts_P)
        assert torch.equal(layer.conflict_P, verdict.conflict_TK[layer.tokens_P, k_P]) and layer.conflict_P.any()
        close(layer.similarity_P, verdict.similarity_TK[layer.tokens_P, k_P])
        close(layer.whole_P, whole_TK[layer.tokens_P, k_P])
        close(layer.length_P, verdict.norm_TKL[layer.tokens_P, k_P].square().sum(-1).sqrt())
    close(own.layers[0].inputs[0], tiny.table(own.batch["input_ids"]).flatten(0, 1)[own.layers[0].tokens_P])


def test_pearson():
    one, other = torch.randn(2, 50)
    close(probe.pearson(one, other), torch.corrcoef(torch.stack([one, other]).double())[0, 1])
    assert probe.pearson(one, torch.ones(50)) is None and probe.pearson(one[:1], other[:1]) is None


def test_the_cosines_of_tokens_on_an_expert(monkeypatch):
    _, _, (own,) = looks(gated=True)
    layer, slow = own.layers[1], []
    for n, m in product(range(len(layer.tokens_P)), repeat=2):
        if n < m and layer.experts_P[n] == layer.experts_P[m]:
            grads = [cosine(g_PO[n], g_PO[m]) for g_PO in layer.grads]
            slow.append((n, m, cosine(layer.inputs[0][n], layer.inputs[0][m]), sum(grads) / 3))
    index, feature, gradient = probe.cosines_within_experts(layer)
    assert index.T.tolist() == [[n, m] for n, m, _, _ in slow]
    close(feature, [row[2] for row in slow])
    close(gradient, [row[3] for row in slow])
    found = probe.relations(layer, 100)
    assert found["feature_gradient"] == probe.pearson(feature, gradient)
    assert found["bias_weight"] == probe.pearson(layer.similarity_P, layer.whole_P) > 0.5
    assert found["conflict_ratio_bias"] == layer.conflict_P.sum() / 100 and set(probe.relations(None, 9).values()) == {None}
    monkeypatch.setattr(probe, "MOST", 4)
    index, *_ = probe.cosines_within_experts(layer)
    assert index.shape[1] == 3 * 6 and index[0, 0] == 0 and index[1].max() == len(layer.tokens_P) - 1


def test_kappa():
    one, other = torch.rand(2, 40) < torch.tensor([[0.3], [0.6]])
    other[:20] = one[:20]
    close(probe.kappa(one, other), cohen_kappa_score(one, other))
    assert probe.kappa(one, one) == 1 and probe.kappa(one, ~one) < 0
    for some in (one[:0], torch.ones(9).bool()):
        assert probe.kappa(some, some) is None


def test_agreement_of_a_batch_with_two_others():
    _, _, three = looks(3, tau=0.05)
    own = [one.layers[0] for one in three]
    own[2] = own[2].only(own[2].experts_P > 0)  # no pair on expert 0: by its means nothing is known there
    own[2] = own[2]._replace(means=[gbar_EO * torch.tensor([[0.0], [1.0], [1.0]]) for gbar_EO in own[2].means])

    def flags(layer, by, p):
        expert = layer.experts_P[p]
        mean = [g_PO[by.experts_P == expert].mean(0) for g_PO in by.grads]
        return sum(cosine(g_PO[p], mean_O) for g_PO, mean_O in zip(layer.grads, mean)) / 2 < 0.05

    kappas = []
    for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        places = [p for p, expert in enumerate(own[a].experts_P) if expert > 0 or (b, c) == (0, 1)]
        kappas.append(cohen_kappa_score(*([flags(own[a], own[i], p) for p in places] for i in (b, c))))
    close(probe.agreement(own, tau=0.05), sum(kappas) / 3)
    same = own[0]._replace(means=own[1].means)
    assert probe.agreement([same] * 3, tau=0.05) == 1


def test_what_groups_explain():
    flags, groups = torch.tensor([1, 0, 0, 1, 1, 0]).bool(), torch.tensor([7, 7, 3, 3, 3, 1])
    share, chance = probe.explained(flags, groups)
    close(share, share_between(flags.tolist(), groups.tolist()))
    orders = list(permutations(groups.tolist()))
    close(chance, sum(share_between(flags.tolist(), order) for order in orders) / len(orders))
    assert probe.explained(flags, flags.long())[0] == 1 and probe.explained(flags[1:3], groups[1:3]) is None


def test_the_places_of_answers():
    x = IGNORED
    label_T, position_T = report.answer_places(torch.tensor([[x, 5, 6, x, x, 7], [4, 4, x, 3, 3, 3]]))
    assert label_T.tolist() == [5, 6, x, x, 7, x, 4, x, 3, 3, 3, x]
    assert position_T[label_T != x].tolist() == [0, 1, 0, 0, 0, 1, 2]


def test_the_causes_on_pictures_are_the_picture_and_the_place_in_the_answer():
    _, _, (own,) = looks()
    labels, layer = own.batch["labels"].tolist(), own.layers[0]
    rows, flags = [token // 10 for token in layer.tokens_P.tolist()], layer.conflict_P.tolist()
    answers, positions = [], []
    for token, row, flag in zip(layer.tokens_P.tolist(), rows, flags):
        place = token % 10
        if place < 9 and labels[row][place + 1] != IGNORED:
            start = place
            while start > 0 and labels[row][start] != IGNORED:
                start -= 1
            answers.append(flag)
            positions.append(place - start)
    about, nothing = report.find_causes(own, layer, None, pictures=True)
    assert nothing == {} and about.keys() == {"picture", "position"} and len(answers) < len(flags)
    close(about["picture"], [share_between(flags, rows), 3 / (len(flags) - 1)])
    close(about["position"], [share_between(answers, positions), (len(set(positions)) - 1) / (len(answers) - 1)])


def test_the_cause_on_texts_is_the_sentence_and_each_label_has_its_share():
    _, _, (own,) = looks()
    layer, classes = own.layers[0], [3, 0, 3, 1]  # of the four sentences
    rows, flags = [token // 10 for token in layer.tokens_P.tolist()], layer.conflict_P.tolist()
    own = own._replace(batch=own.batch | {"labels": torch.tensor(classes)})
    about, shares = report.find_causes(own, layer, ["a", "b", "c", "d"], pictures=False)
    assert about.keys() == {"sentence"}
    close(about["sentence"], [share_between(flags, rows), 3 / (len(flags) - 1)])
    expected = {}
    for i, name in ((0, "a"), (1, "b"), (3, "d")):
        found = [flag for row, flag in zip(rows, flags) if classes[row] == i]
        expected[name] = sum(found) / len(found)
    assert min(expected.values()) > 0  # else the gap would be the largest share
    assert shares == pytest.approx(expected | {"gap": max(a - b for a, b in product(expected.values(), repeat=2))})
    alone = report.find_causes(own, layer.only(layer.tokens_P // 10 == 1), ["a", "b", "c", "d"], pictures=False)[1]
    assert alone == pytest.approx({"a": expected["a"]})
    assert report.find_causes(own, layer, None, pictures=False) == (about, {})


def test_moved_in_the_record_is_of_a_quarter_around_each_moment():
    steps = [0, 1, 4, 9, 16, 25, 31, 33, 36, 40]
    moved = torch.rand(2, 8).tolist()  # twins five steps later: the last two moments have none
    curves = dict.fromkeys(("margin", "conflict_ratio", "consistency", "load", "histogram"), steps)
    content = {"steps": steps, "loss": steps, "run": {"delta": 5}}
    content["layers"] = [{"name": f"moe.{i}", "moved": row} | curves for i, row in enumerate(moved)]
    content["probe"] = [{"moment": number, "layers": [{"bias_weight": 0.9}, {}]} for number in (0, 5, 9)]
    found = probe.for_record(content)
    assert [(one["step"], one["loss"], one["delta"]) for one in found] == [(0, 0, 5), (25, 25, 5), (40, 40, 5)]
    for one, near in zip(found, ([0, 1, 4, 9], [16, 25, 31, 33], [31, 33])):
        for layer, row in zip(one["layers"], moved):
            close(layer["moved"], sum(row[steps.index(step)] for step in near) / len(near))
            assert all(layer[key] == one["step"] for key in curves)
        assert [layer.get("bias_weight") for layer in one["layers"]] == [0.9, None]


def test_confusing_tokens():
    tiny, stgc, _ = looks()
    own = report.look(tiny, stgc, draw_batch(8, 14))
    layer, logits_TV, (label_T, _) = own.layers[1], own.logits_BLV.flatten(0, 1), report.answer_places(own.batch["labels"])
    label_T, pairs = label_T.where(label_T < 0, label_T % 3), []  # so that some pairs have one label
    for n, m in product(range(len(layer.tokens_P)), repeat=2):
        tokens = layer.tokens_P[[n, m]].tolist()
        if n < m and layer.experts_P[n] == layer.experts_P[m] and min(label_T[tokens]) >= 0:
            gradient = sum(cosine(g_PO[n], g_PO[m]) for g_PO in layer.grads) / 2
            pairs.append((tokens, cosine(layer.inputs[0][n], layer.inputs[0][m]), gradient))
    tenth = -(-len(pairs) // 10)
    high, low = sorted(row[1] for row in pairs)[-tenth], sorted(row[2] for row in pairs)[tenth - 1]
    expected = torch.zeros(4)
    for (n, m), feature, gradient in pairs:
        if feature >= high - 1e-12 and gradient <= low + 1e-12 and label_T[n] != label_T[m]:
            rows = [(logits_TV[n], label_T[n], label_T[m]), (logits_TV[m], label_T[m], label_T[n])]
            rest = [row[[v for v in range(9) if v not in (a, b)]].mean() for row, a, b in rows]
            expected += (
                torch.tensor([2, sum(row[a] for row, a, _ in rows), sum(row[b] for row, _, b in rows), sum(rest)]) / 2
            )
    assert expected[0] > 1
    close(probe.confusing(layer, logits_TV, label_T), expected.double(), rtol=1e-5)
    assert probe.confusing(layer, logits_TV, torch.full_like(label_T, IGNORED)) == [0] * 4


def test_the_arms_leave_out_as_many():
    _, _, (own,) = looks()
    layer = own.layers[0]
    order_P = torch.randperm(len(layer.tokens_P))
    layer = layer._replace(experts_P=(order_P < 47).long(), conflict_P=order_P % 3 == 0)
    arms, on_P = probe.arms(layer, expert=1, seed=5), layer.experts_P == 1
    full, without, fewer, alike = arms.values()
    assert [*arms] == [*probe.ARMS] and torch.equal(full, on_P) and torch.equal(without, on_P & ~layer.conflict_P)
    assert without.sum() == fewer.sum() == alike.sum() and not (fewer & ~on_P).any() and not torch.equal(fewer, alike)
    sorted_P = layer.length_P.masked_fill(~on_P, torch.inf).argsort()[:47]
    for number in range(10):
        tenth = [p for place, p in enumerate(sorted_P.tolist()) if place * 10 // 47 == number]
        assert (~alike[tenth]).sum() == layer.conflict_P[tenth].sum()
    assert torch.equal(probe.arms(layer, 1, 5)["no random"], fewer) and not torch.equal(
        probe.arms(layer, 1, 99)["no random"], fewer
    )


@pytest.mark.parametrize("options", [{}, {"gated": True, "bias": False}])
def test_a_step_without_some_pairs_is_the_step_of_the_loss(options):
    """Against autograd: the token gradients of the pairs left out are zeroed at the expert's last linear."""
    tiny, _, (own, fresh) = looks(2, **options)
    before = copy.deepcopy(tiny.state_dict())
    found = report.measure_harm(tiny, tiny.moe[1], 1, own, fresh, seed=3)
    assert all(torch.equal(value, tiny.state_dict()[name]) for name, value in before.items())
    layer = own.layers[1]
    expert = layer.experts_P.bincount().argmax().item()
    masks, places = probe.arms(layer, expert, seed=3), places_of(tiny, own)
    for a, keep_P in enumerate([None, *masks.values()]):
        for z, size in enumerate(report.SIZES):
            other = copy.deepcopy(tiny)
            experts, outs = other.moe[1].experts, []
            product_of = experts.product
            experts.product = lambda *args, of=product_of, outs=outs: outs.append(of(*args)) or outs[-1]
            loss = other(**own.batch).loss
            if keep_P is not None:
                keep_S = torch.zeros(len(outs[-1]), 1, dtype=torch.float64)
                keep_S[places, 0] = keep_P.double()
                outs[-1].register_hook(lambda grad, keep_S=keep_S: grad * keep_S)
                loss.backward()
                own_parameters = [(value, value.grad[expert]) for value in experts.parameters()]
                norm = sum(grad.square().sum() for _, grad in own_parameters).sqrt()
                length = sum(value[expert].square().sum() for value, _ in own_parameters).sqrt()
                with torch.no_grad():
                    for value, grad in own_parameters:
                        value[expert] -= size * length / norm * grad
            for side, one in enumerate((own, fresh)):
                logits, losses = other(**one.batch).logits.flatten(0, 1), []
                for token, on in zip(one.layers[1].tokens_P.tolist(), one.layers[1].experts_P.tolist()):
                    label = F.pad(one.batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()[token]
                    if on == expert and label != IGNORED:
                        losses.append(F.cross_entropy(logits[token], label).item())
                close(found[side, a, z], sum(losses) / len(losses))
    assert (found[0, 1] < found[0, 0]).all()  # all pairs: the loss falls


def places_of(tiny, own) -> torch.Tensor:
    """Where the judged pairs of layer 1 are among the rows of its experts."""
    stgc = STGC(tiny, STGCConfig("none"))
    loss = tiny(**own.batch).loss
    pairs = stgc.steps[1].pairs
    stgc.loss(loss)
    return stgc.verdicts[1].judged_TK.flatten()[pairs.order_S].nonzero().flatten()


def test_means_and_errors():
    loss_N2AZ = torch.rand(5, 2, 5, 3, dtype=torch.float64)
    loss_N2AZ[4, 1] = torch.nan  # no token of that expert in this fresh batch
    found = report.sum_up_harm([*loss_N2AZ])
    gaps = loss_N2AZ[:4, 1, 3] - loss_N2AZ[:4, 1, 1]
    close(found["fresh"]["before"], loss_N2AZ[:4, 1, 0, 0].mean())
    for z in range(3):
        close(found["fresh"]["no random"]["minus_all"][z], [gaps[:, z].mean(), gaps[:, z].std() / 2])
        close(found["own"]["all"]["loss"][z], loss_N2AZ[:, 0, 1, z].mean())
    rows = [{"a": (1.0, 3.0), "b": 2.0}, {"a": (2.0, 5.0), "b": None}, {"c": None}]
    assert report.means(rows) == {"a": [1.5, 4.0], "b": 2.0}
    assert probe.error_of([1.0, None]) is None and probe.mean_of([None]) is None


def material_of(rows: int, size: int) -> report.Material:
    """Random rows without labels or pictures, each of them alone in its group."""
    table = draw_batch(rows)
    collate = lambda rows: {key: value[rows] for key, value in table.items()}  # noqa: E731
    return report.Material([[n] for n in range(rows)], collate, size, None, False)


def test_kappa_is_of_three_batches_that_differ(monkeypatch):
    monkeypatch.setattr(report, "MOST", 5)
    tiny, material = Tiny(), material_of(24, 4)
    found, kappas = report.probe_model(tiny, material, tau=0.05, triples=2), []
    stgc, drawn = STGC(tiny, STGCConfig("none", tau=0.05, gradients="weight")), report.draw_triples(material)
    for _ in range(found["triples"]):
        three = [report.look(tiny, stgc, material.collate(rows)) for rows in next(drawn)]
        kappas.append([probe.agreement([one.layers[i] for one in three], 0.05) for i in range(2)])
    kappas = torch.tensor(kappas, dtype=torch.float64)
    assert 2 <= len(kappas) and 0 < found["kappa"] < 0.9  # of one batch alone it would be 1
    close(found["kappa"], kappas.mean())
    close(found["error"], kappas.mean(1).std() / len(kappas) ** 0.5)
    close([*found["kappas"].values()], kappas.mean(0))


@pytest.mark.parametrize("kappas, count", [([0.5] * 9, 3), ([0.0, 0.1, 0.0, 0.06, 0.5], 4), ([None] * 9, 6)])
def test_triples_are_drawn_until_the_error_is_known_and_small(kappas, count, monkeypatch):
    """At least as many as asked for, at most MOST, also where no triple has a kappa."""
    monkeypatch.setattr(report, "MOST", 6)
    of_triple = iter(kappas)
    monkeypatch.setattr(probe, "agreement", lambda three, tau: next(of_triple))
    tiny = Tiny()
    del tiny.moe[1]
    found = report.probe_model(tiny, material_of(24, 4), tau=0.0, triples=3)
    assert (found["triples"], found["error"] is None) == (count, kappas[0] is None)


def test_triples_are_disjoint():
    material = report.Material([[0, 1], [2], [3, 4, 5], *([n] for n in range(6, 11))], None, 2, None, True)
    group = {row: number for number, rows in enumerate(material.groups) for row in rows}
    drawn = report.draw_triples(material)
    seen = [next(drawn) for _ in range(40)]
    for three in seen:
        used = [group[row] for rows in three for row in rows]
        assert [len(rows) for rows in three] == [2, 2, 2] and len(set(used)) == 6
    assert {row for three in seen for rows in three for row in rows} == set(range(11))


def test_the_picture_has_kappa_over_the_loss(tmp_path, monkeypatch):
    """A line per setting, of all its runs, with standard errors where they are known; beside it the confusing tokens."""
    values = iter(torch.rand(99).tolist())

    def entry(loss, error=True, pictures=False):
        numbers = {"loss": loss, "kappa": next(values), "error": next(values) / 10 if error else None}
        return numbers | {"confusing": {"pairs": 5} | {key: next(values) for key in report.WHOSE}} if pictures else numbers

    cola, mrpc = (
        {"name": name, "config": {}, "probes": [entry(0.2), entry(0.7, False), entry(0.4)]} for name in ("cola", "mrpc")
    )
    cola["probes"].append({"loss": 9.0, "kappa": None, "error": None})
    lvlm = [
        {"name": "lvlm-scenes", "config": {"experts": "split", "num_experts": 8}, "probes": [entry(loss, pictures=True)]}
        for loss in (0.5, 2.0)
    ]
    figure, path = drawn(monkeypatch, report.plot_probes, [lvlm[0], cola, mrpc, lvlm[1]], tmp_path / "probe.png")
    assert path == tmp_path / "probe.png"
    left, right = figure.axes
    own = {"toy LVLM, 8 parts": lvlm[1]["probes"] + lvlm[0]["probes"]}
    own |= {name: [one["probes"][i] for i in (1, 2, 0)] for name, one in (("CoLA", cola), ("MRPC", mrpc))}
    assert [text.get_text() for text in left.get_legend().get_texts()] == [*own]
    assert "kappa" in left.get_ylabel() and all("loss" in axis.get_xlabel() for axis in (left, right))
    assert left.xaxis_inverted() and right.xaxis_inverted()
    for bars, found in zip(left.containers, own.values(), strict=True):
        line, _, (segments,) = bars.lines
        assert line.get_xydata().tolist() == [[one["loss"], one["kappa"]] for one in found]
        ends = [(one["loss"], one["kappa"] - one["error"], one["kappa"] + one["error"]) for one in found if one["error"]]
        seen = [(x, low, high) for (x, low), (_, high) in filter(len, segments.get_segments())]
        assert seen == [pytest.approx(row) for row in ends]
    assert len({bars.lines[0].get_color() for bars in left.containers}) == 3
    lines = {line.get_label(): line.get_xydata().tolist() for line in right.lines}
    for key, whose in report.WHOSE.items():
        tokens = [[one["loss"], one["confusing"][key]] for one in own["toy LVLM, 8 parts"]]
        assert lines.pop(f"toy LVLM, 8 parts: {whose}") == tokens
    assert not lines


# ---- 2. The command ----


def probe_of(folder, *more):
    """Runs the command; returns its entries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lab.report.probe", str(folder), "--triples", "2", "--device", "cpu", *more])
        report.main()
    return json.loads((folder / "results.json").read_text())["probes"]


@pytest.fixture(scope="module")
def texts(data, model, tmp_path_factory):  # noqa: F811
    """The command and the folder of a filmed run with three saved models, two of them with MoE layers."""
    folder = tmp_path_factory.mktemp("texts") / "out"
    small = (
        "--task rte --moe-layers 0,1 --num-experts 4 --epochs 2 --seeds 0 --batch-size 4 --max-length 16 --device cpu --film"
    )
    command = [*small.split(), "--variants", "dense,none,ce", "--save-model", "--model", model, "--data-dir", data]
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        run([*command, "--output-dir", folder])
    return command, folder


def test_a_run_on_texts_is_probed(texts, monkeypatch, capsys):
    command, folder = texts
    monkeypatch.setattr(report, "MOST", 5)
    before = json.loads((folder / "results.json").read_text())
    assert page.collect(folder)["agreement"] is None
    with pytest.raises(UserError, match="--models model-mse-s0: RUN .* holds model-dense-s0, model-none-s0, model-ce-s0$"):
        probe_of(folder, "--models", "model-none-s0", "model-mse-s0")
    assert [one["model"] for one in probe_of(folder, "--models", "model-none-s0")] == ["model-none-s0"]
    none, ce = probes = probe_of(folder)  # again: it replaces
    after = json.loads((folder / "results.json").read_text())
    assert {key: value for key, value in after.items() if key != "probes"} == before
    assert "model-dense-s0: left out, it is dense" in capsys.readouterr().out
    assert [(one["model"], one["variant"], one["seed"]) for one in probes] == [
        ("model-none-s0", "none", 0),
        ("model-ce-s0", "ce", 0),
    ]
    assert 2 <= none["triples"] <= 5 and -1 <= none["kappa"] <= 1 and len(none["kappas"]) == 2 and 0.4 < none["loss"] < 1
    assert none["triples"] == 5 or none["error"] <= report.ENOUGH
    ((share, chance),) = none["about"].values()
    assert chance < share <= 1 and none["labels"].keys() == {"0", "1", "gap"}
    assert page.collect(folder)["agreement"] == {"kappa": none["kappa"], "error": none["error"]}
    assert f'"kappa": {none["kappa"]}' in (folder / "inspect.html").read_text()
    assert report.plot_probes([after], folder.parent / "probe.png").read_bytes()[:4] == b"\x89PNG"
    run([*command, "--output-dir", folder, "--resume"])
    assert json.loads((folder / "results.json").read_text())["probes"] == probes


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda record, folder: (folder / "results.json").unlink(),
            "holds no results.json: give the output folder of a run",
        ),
        (lambda record, folder: [shutil.rmtree(one) for one in folder.glob("model-*")], "train again with --save-model"),
        (lambda record, folder: record["config"].update(batch_size=9), "three disjoint batches of 9 need 27 .*it has 24"),
        (lambda record, folder: record["config"].update(max_train_samples=20), "the data of train of .* changed since its"),
        (lambda record, folder: record["config"].update(data_dir="gone"), "--data-dir gone has no rte/train"),
    ],
)
def test_what_cannot_be_probed_is_named(texts, tmp_path, change, message):
    shutil.copytree(texts[1], tmp_path / "out")
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    change(record, tmp_path / "out")
    if (tmp_path / "out" / "results.json").exists():
        (tmp_path / "out" / "results.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        probe_of(tmp_path / "out")
    with pytest.raises(UserError, match="none of these runs is probed"):
        report.plot_probes([record | {"probes": []}], tmp_path / "probe.png")


@pytest.mark.slow
def test_a_run_on_pictures_is_probed_stage_by_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "MOST", 2)
    run_lvlm([*WORDS, "--variants", "none,feature", "--no-film", "--output-dir", tmp_path / "out"])
    entries = probe_of(tmp_path / "out")
    assert [one["model"] for one in entries] == ["stages/stage1-s0", "stages/stage2-s0", "model-none-s0"]
    assert "model-feature-s0: left out, it routes whole samples" in capsys.readouterr().out
    for one in entries:
        assert one["triples"] == 2 and len(one["kappas"]) == 2 and one["about"].keys() == {"picture", "position"}
        assert one["confusing"]["pairs"] > 50 and one["confusing"]["own"] != one["confusing"]["rest"]
        harm = one["harm"]
        assert harm["batches"] == 2 and harm["own"]["all"]["loss"][0] < harm["own"]["before"]
        assert all(harm[side][arm]["minus_all"][0][1] > 0 for side in ("own", "fresh") for arm in probe.ARMS[1:])
    lines = report.describe(entries[0])
    assert lines[0].startswith("stages/stage1-s0: main loss ") and len(lines) == 14
    other = [*WORDS, "--variants", "none", "--no-film", "--stages-from", tmp_path / "out"]
    run_lvlm([*other, "--output-dir", tmp_path / "other"])  # its dense stage lies in the first run
    (stage,) = probe_of(tmp_path / "other", "--models", "stages/stage2-s0")
    assert stage["kappa"] == entries[1]["kappa"] and stage["loss"] == entries[1]["loss"]
