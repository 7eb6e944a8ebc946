"""Recorded routes against a loop over tokens; shares and paths counted by hand; what the figures show of them."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import drawn, make_batch, make_net, run, same_grads
from torch import nn

from lab.report import figures
from lab.report.styles import style_of
from lab.vision import scenes
from lab.vision.routes import count_pathways, load_by_modality, record_routes, summary
from stgc import MoELayer
from stgc_plus import STGC, Experts, STGCConfig

E = 4


class Told(nn.Module):
    """Its input says, layer by layer, which experts a token takes: ids_BLMK, the first choice first."""

    def __init__(self, num_layers, top_k):
        super().__init__()
        moe = [MoELayer(Experts(E, E, 3), nn.Identity(), top_k) for _ in range(num_layers)]
        self.layers = nn.ModuleList(moe)

    def forward(self, ids_BLMK, mask_BL=None):
        top_k = ids_BLMK.shape[-1]
        for m, layer in enumerate(self.layers):
            logits_BLE = torch.full((*ids_BLMK.shape[:2], E), -9.0)
            layer(
                logits_BLE.scatter(-1, ids_BLMK[:, :, m], torch.arange(top_k, 0, -1.0).expand(*ids_BLMK.shape[:2], -1)),
                mask_BL,
            )


def told(paths, modality_N):
    """Routes of one forward with these first choices, a path per token; second choices are the next expert."""
    first_1NM = torch.tensor(paths).unsqueeze(0)
    model = Told(first_1NM.shape[2], top_k=2)
    with record_routes(model) as routes:
        model(torch.stack([first_1NM, (first_1NM + 1) % E], dim=-1))
        routes.add(torch.tensor([modality_N]), torch.ones(1, len(paths), dtype=torch.bool))
    return routes


# ---- 1. Recording ----


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_routes_match_a_loop_over_tokens(top_k):
    net, seen = make_net(num_layers=3, top_k=top_k), []
    batches = [(torch.randn(2, L, 8).double(), torch.rand(2, L) < 0.7, torch.randint(2, (2, L))) for L in (5, 9)]
    with torch.no_grad(), record_routes(net) as routes:
        for x_BLD, keep_BL, modality_BL in batches:
            net(x_BLD, keep_BL)
            routes.add(modality_BL, keep_BL)
    with torch.no_grad():
        for x_BLD, keep_BL, modality_BL in batches:
            paths = {}
            for layer in net.layers:
                for b, i in keep_BL.nonzero().tolist():
                    logits = (layer.router.weight @ x_BLD[b, i]).tolist()
                    paths.setdefault((b, i), []).append(sorted(range(E), key=lambda e: -logits[e])[:top_k])
                x_BLD = torch.tanh(x_BLD + layer(x_BLD, keep_BL))
            seen += [(path, modality_BL[place].item()) for place, path in paths.items()]
    assert routes.all_NMK.tolist() == [path for path, _ in seen] and len(seen) > 9
    assert routes.all_NMK[:, :, 0].tolist() == [[ids[0] for ids in path] for path, _ in seen]
    assert routes.modality_N.tolist() == [modality for _, modality in seen]
    assert routes.all_NMK.dtype == torch.int16 and routes.names == ["layers.0", "layers.1", "layers.2"]


class Stateful(nn.Module):
    """A router that holds something of the batch, as those of sample-level baselines do, and counts its calls."""

    expert, calls = 0, 0

    def forward(self, x_TD):
        self.calls += 1
        return 9.0 * nn.functional.one_hot(torch.tensor(self.expert), E).expand(len(x_TD), -1)


def test_the_routing_of_the_forward_itself_is_noted():
    layer = MoELayer(Experts(E, 5, 3), Stateful(), top_k=1)
    with record_routes(layer) as routes:
        for layer.router.expert in (2, 1):
            layer(torch.randn(3, 5))
            layer.router.expert = 3
            routes.add(torch.zeros(1, 3), torch.ones(1, 3))
    assert routes.all_NMK[:, :, 0].flatten().tolist() == [2, 2, 2, 1, 1, 1] and layer.router.calls == 2


def test_first_is_the_largest_weight_and_not_the_first_column():
    net = make_net(num_layers=1, top_k=2)
    layer, x_TD = net.layers[0], make_batch().x_TD
    routing = layer.routing(x_TD)
    layer.routing = lambda x_TD: routing._replace(
        **{k: getattr(routing, k).flip(1) for k in ("weights_TK", "expert_ids_TK")}
    )
    with record_routes(net) as routes:
        net(x_TD)
        routes.add(torch.zeros(14), torch.ones(14))
    assert torch.equal(routes.all_NMK[:, 0].long(), routing.expert_ids_TK)


def test_each_forward_is_added_or_dropped():
    model, ids_BLMK = Told(2, 1), torch.randint(E, (1, 4, 2, 1))
    zeros, ones = torch.zeros(1, 4), torch.ones(1, 4)
    with record_routes(model) as routes:
        with pytest.raises(RuntimeError, match="layers.0 ran 0 times since the last add"):
            routes.add(zeros, ones)
        for start in range(1, 5):  # a generate loop without a cache: only the last forward, of all tokens, counts
            routes.drop()
            model(ids_BLMK[:, :start])
        routes.add(zeros, ones)
        assert routes.all_NMK[:, :, 0].tolist() == ids_BLMK[0, :, :, 0].tolist()
        model(ids_BLMK)
        model(ids_BLMK)
        with pytest.raises(RuntimeError, match="layers.0 ran 2 times since the last add: add or drop each time"):
            routes.add(zeros, ones)
        routes.drop()
        model(ids_BLMK)
        model.layers[1](torch.randn(1, 4, E))
        with pytest.raises(RuntimeError, match="layers.1 ran 2 times"):
            routes.add(zeros, ones)
        routes.drop()
    assert len(routes.all_NMK) == 4  # what failed has added nothing
    with pytest.raises(RuntimeError, match="neither added nor dropped"), record_routes(model):
        model(ids_BLMK)


def test_add_takes_only_what_fits_the_forward():
    model, ids_BLMK = Told(1, 1), torch.randint(E, (2, 3, 1, 1))
    mask_BL = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    with record_routes(model) as routes:
        model(ids_BLMK, mask_BL)
        for modality, keep, message in (
            (torch.zeros(2, 4), torch.ones(2, 4), "5 of 6 tokens, keep 8 of 8"),
            (torch.zeros(2, 3), torch.ones(2, 3), "5 of 6 tokens, keep 6 of 6: keep must lie within its mask"),
            (torch.zeros(2, 2), mask_BL, "for each of the 6 tokens"),
            (torch.full((2, 3), 2), mask_BL, "modality must be 0 or 1"),
        ):
            with pytest.raises(ValueError, match=message):
                routes.add(modality, keep)
        mask_BL[1, 0] = False  # a part of the mask
        routes.add(torch.ones(2, 3), mask_BL)
    assert (
        routes.all_NMK[:, :, 0].flatten().tolist() == ids_BLMK[mask_BL].flatten().tolist() and routes.modality_N.sum() == 4
    )
    with pytest.raises(ValueError, match="no stgc.MoELayer"), record_routes(nn.Linear(2, 2)):
        pass
    uneven = nn.ModuleList([MoELayer(Experts(4, 5, 3), top_k=k) for k in (1, 2)])
    with pytest.raises(ValueError, match=r"same top_k, not \[\(4, 1\), \(4, 2\)\]"), record_routes(uneven):
        pass


def test_nothing_stays_behind():
    net, x_TD = make_net(), make_batch().x_TD
    with pytest.raises(KeyError), record_routes(net):
        net(x_TD)
        raise KeyError
    assert all(layer.watch is None for layer in net.layers)
    with record_routes(net) as routes:
        newest = STGC(net, STGCConfig("none"))  # replaces the recorder, and stays
        net(x_TD)
        with pytest.raises(RuntimeError, match="ran 0 times"):
            routes.add(torch.zeros(14), torch.ones(14))
    assert all(layer.watch.func.__self__ is newest for layer in net.layers)
    newest.detach()
    assert all(layer.watch is None for layer in net.layers)


def test_stgc_watches_along():
    net, batch = make_net(), make_batch()
    expected = run(net, batch)
    net.zero_grad()
    stgc = STGC(net, STGCConfig())
    with record_routes(net) as routes:
        logits_TC = net(batch.x_TD, batch.keep_T)
        routes.add(torch.zeros(14), batch.keep_T)
    loss = stgc.loss(nn.functional.cross_entropy(logits_TC, batch.labels_T))
    loss.backward()
    same_grads({n: p.grad for n, p in net.named_parameters()}, {n: g for n, g in expected.grads.items() if n != "x_TD"})
    load = load_by_modality(routes)["text"]
    assert load["all_ME"] == [pytest.approx(row["load"]) for row in stgc.stats()]
    stgc.detach()
    assert all(layer.watch is None for layer in net.layers)


# ---- 2. Statistics ----

PATHS = [(2, 0, 3), (1, 1, 1), (2, 0, 3), (0, 3, 1), (1, 1, 1), (0, 0, 0), (3, 3, 3), (2, 0, 3)]
MODALITY = [1, 1, 1, 1, 1, 0, 0, 0]


def test_shares_by_hand():
    load = load_by_modality(told(PATHS, MODALITY))
    assert load["picture"]["tokens"] == 5 and load["text"]["tokens"] == 3
    first = [[0.2, 0.4, 0.4, 0.0], [0.4, 0.4, 0.0, 0.2], [0.0, 0.6, 0.0, 0.4]]
    np.testing.assert_allclose(load["picture"]["first_ME"], first, atol=1e-12)
    both = [[(row[e] + row[e - 1]) / 2 for e in range(E)] for row in first]  # the second choice is the next expert
    np.testing.assert_allclose(load["picture"]["all_ME"], both, atol=1e-12)
    assert list(load_by_modality(told(PATHS, [0] * 8))) == ["text"]


def test_paths_by_hand_and_ties_in_order():
    paths = count_pathways(told(PATHS, MODALITY))
    assert paths["picture"] == [((1, 1, 1), 0.4), ((2, 0, 3), 0.4), ((0, 3, 1), 0.2)]
    assert [path for path, _ in paths["text"]] == [(0, 0, 0), (2, 0, 3), (3, 3, 3)]
    assert count_pathways(told(PATHS, MODALITY), top=1) == {"text": [((0, 0, 0), 1 / 3)], "picture": [((1, 1, 1), 0.4)]}


def test_paths_match_a_counter():
    ids_NM = torch.randint(E, (400, 4)).clamp(max=2)
    paths = count_pathways(told(ids_NM.tolist(), [1] * 400), top=10)["picture"]
    counted = Counter(map(tuple, ids_NM.tolist()))
    assert paths == [(path, n / 400) for path, n in sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:10]]


def test_summary_is_json_and_nothing_recorded_is_no_modality():
    found = summary(told(PATHS, MODALITY))
    assert json.loads(json.dumps(found)) == found
    assert found["num_experts"] == E and found["top_k"] == 2 and found["layers"] == [f"layers.{m}" for m in range(3)]
    assert found["modalities"]["picture"]["pathways"][2] == {"path": [0, 3, 1], "share": 0.2}
    with record_routes(make_net()) as routes:
        pass
    assert summary(routes)["modalities"] == {} and routes.all_NMK.shape == (0, 2, 2)
    with pytest.raises(ValueError, match="no token's route was recorded"):
        figures.plot_routes(summary(routes), "never.png")


# ---- 3. Figures ----


def texts(axis):
    return [text.get_text().strip() for text in axis.texts]


def test_figure_shows_load_and_paths(tmp_path, monkeypatch):
    found = summary(told(PATHS, MODALITY)) | {"layers": [f"model.layers.{i}.mlp" for i in (1, 3, 5)]}
    figure, _ = drawn(monkeypatch, figures.plot_routes, found, tmp_path / "routes.png")
    load, paths, load_text, _ = figure.axes
    how = "expert 1 in the first MoE layer (layer 1), then expert 1 in the second MoE layer (layer 3), and so on."
    assert figure.get_supxlabel() == f"1-1-1 is a path: the token's first choice is {how}"
    assert [load.get_title(), load_text.get_title()] == ["picture: 5 tokens", "text: 3 tokens"]
    heights = np.array([[bar.get_height() for bar in bars] for bars in load.containers])
    np.testing.assert_allclose(heights.T, found["modalities"]["picture"]["first_ME"], atol=1e-12)
    tops = [bar.get_y() + bar.get_height() for bar in load.containers[-1]]
    np.testing.assert_allclose(tops, 1, atol=1e-12)
    looks = {(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in load.containers}
    assert len(looks) == E and len({hatch for _, hatch in looks}) == E  # told apart in grey too
    assert [label.get_text() for label in load.get_xticklabels()] == ["layer 1", "layer 3", "layer 5"]
    assert sorted(texts(load)) == ["20"] * 2 + ["40"] * 5 + ["60"]
    assert [label.get_text() for label in paths.get_yticklabels()] == ["1-1-1", "2-0-3", "0-3-1"]
    assert texts(paths) == ["40.0", "40.0", "20.0"] and paths.get_title().endswith("together 100.0 %")
    only, _ = drawn(monkeypatch, figures.plot_routes, summary(told(PATHS, [0] * 8)), tmp_path / "routes.png", "ce-s0")
    assert only.get_suptitle() == "ce-s0"
    assert [label.get_text() for label in only.axes[0].get_xticklabels()] == ["layer 0", "layer 1", "layer 2"]
    assert len(only.axes) == 2


def test_sheet_shows_every_picture_with_its_verdict(tmp_path, monkeypatch):
    row = {"question": "<image>\nWhat colour is it?", "answer": "red", "expected": "blue", "right": False, "kind": "vqa"}
    long = row | {"question": "many words " * 60, "answer": "$a_", "right": True, "kind": "caption"}
    images_N3SS = torch.randint(256, (5, 3, 6, 6), dtype=torch.uint8)
    sheet, _ = drawn(monkeypatch, figures.plot_sheet, images_N3SS, [row, long, row, row, row], tmp_path / "sheet.png")
    assert len(sheet.axes) == 5  # in one row
    wrong, right = sheet.axes[:2]
    assert texts(wrong) == ["\u2717 wrong (vqa)", "Q: What colour is it?\nA: red\nRight: blue"]
    title, text = texts(right)
    assert title == "\u2713 right (caption)" and "blue" not in text and text.endswith("\nA: $a_")
    assert len(text.splitlines()) == 5 and "\u2026" in text and max(map(len, text.splitlines())) <= 34
    pictures = [axis.child_axes[0] for axis in sheet.axes if axis.child_axes]
    assert len(pictures) == 5
    for picture, image_3SS in zip(pictures, images_N3SS):
        assert np.array_equal(picture.images[0].get_array(), image_3SS.permute(1, 2, 0))
    frames = [picture.spines["left"] for picture in pictures[:2]]
    assert frames[0].get_linestyle() != frames[1].get_linestyle() and frames[0].get_linewidth() > frames[1].get_linewidth()
    rows = [row | {"image": image} for image in (3, None, 3)]  # two questions about one picture, one about none
    sheet, _ = drawn(monkeypatch, figures.plot_sheet, images_N3SS, rows, tmp_path / "sheet.png")
    pictures = [axis.child_axes[0] for axis in sheet.axes]
    for picture in pictures[::2]:
        assert np.array_equal(picture.images[0].get_array(), images_N3SS[3].permute(1, 2, 0))
    assert not pictures[1].images and texts(pictures[1]) == ["no picture"]
    region = row | {"kind": "region", "boxes": [scenes.read_place("16 0 32 8"), scenes.read_place("bottom left")]}
    rows = [region, region | {"right": True}, region | {"boxes": [None, (0, 0, 1, 1)]}]
    rows = [row | {"image": 0} for row in rows + [row | {"right": True}] * 2 + [row | {"answer": "a " * 200}]]
    sheet, _ = drawn(monkeypatch, figures.plot_sheet, images_N3SS, rows, tmp_path / "sheet.png")
    boxes = [[box.get_bbox().extents.tolist() for box in axis.child_axes[0].patches] for axis in sheet.axes[:4]]
    top_right, bottom_left = [2.5, -0.5, 5.5, 1.0], [-0.5, 2.5, 2.5, 5.5]  # edges of pixels, of a picture with six a side
    assert boxes == [[top_right] * 2 + [bottom_left] * 2, [top_right] * 2, [[-0.5, -0.5, 5.5, 5.5]] * 2, []]
    lines = [box.get_linestyle() for box in sheet.axes[0].child_axes[0].patches]
    assert lines[0] == lines[2] == "-" and lines[3] == ":" and len(set(map(str, lines))) == 3  # on white: dashed, dotted
    first, second = (sheet.axes[i].get_position().height for i in (0, 5))
    assert second > first  # a row is as high as its texts
    with pytest.raises(ValueError, match="5 pictures for 1 rows"):
        figures.plot_sheet(images_N3SS, [row], tmp_path / "sheet.png")


def curve(steps, depth=1, **more):
    layer = {"load": [0.7, 0.3], "conflict_ratio": 0.2, "layer": "h.1.mlp"}
    layers = [layer, layer | {"conflict_ratio": 0.4, "layer": "h.3.mlp"}]
    return [{"step": s, "loss": 1 / s, "conflict_ratio": 0.3, "layers": layers[:depth]} | more for s in steps]


def panels_of(figure):
    return {axis.get_title(): axis for axis in figure.axes if axis.axison}


def test_curves_have_a_panel_for_what_was_logged(tmp_path, monkeypatch):
    record = {"name": "toy", "runs": [{"variant": "ce", "seed": 0, "lr": 0.1}]}
    losses = {"router_margin": 0.01, "balance_loss": 1.0, "conflict_loss": 2.0}
    for more, score, labels in (
        ({}, [], []),
        ({}, [{"step": 8, "eval_score": 0.5}], ["dev score"]),
        (losses, [], ["router margin", "balance loss", "conflict loss"]),
    ):
        (tmp_path / "ce-s0.jsonl").write_text("\n".join(map(json.dumps, curve(range(1, 9), **more) + score)))
        panels = panels_of(drawn(monkeypatch, figures.plot_run, tmp_path, record)[0])
        shown = [re.split("[:,\\n]", title)[0] for title in panels]
        assert sorted(shown) == sorted(["training loss", "conflict ratio", "share of pairs on the busiest expert", *labels])
        assert all(len(title.splitlines()) == 2 for title in panels)  # the second says what to look for


def test_curves_of_several_layers_have_a_line_for_each(tmp_path, monkeypatch):
    runs = [{"variant": variant, "seed": seed, "lr": 0.1} for variant in ("ce", "none") for seed in (0, 1)]
    for own in runs:
        lines = curve(range(1, 40), depth=2)
        (tmp_path / f"{own['variant']}-s{own['seed']}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    figure, _ = drawn(monkeypatch, figures.plot_run, tmp_path, {"name": "toy", "runs": runs})
    panels = panels_of(figure)
    layers = panels["conflict ratio\nof each MoE layer, by its number"]
    assert [line.get_ydata()[0] for line in layers.lines] == pytest.approx([0.2, 0.4] * 2) and texts(layers) == ["1", "3"]
    together = panels["conflict ratio: flagged / all pairs\nSTGC should lower it"]
    assert [line.get_linewidth() < 1 for line in together.lines] == [True, True, False] * 2  # seeds, then their mean
    for axis in (layers, together):
        looks = {(line.get_color(), line.get_linestyle()) for line in axis.lines}
        assert looks == {(style_of(name)[0], style_of(name)[1]) for name in ("ce", "none")}


def test_curves_say_why_single_batches_go_up_and_down(tmp_path, monkeypatch):
    """And they are smoothed at 38 points, which is a toy run."""
    record = {"name": "toy", "runs": [{"variant": "ce", "seed": 0, "lr": 0.1}], "config": {"task": "rte"}}
    lines = [line | {"loss": float(i % 2)} for i, line in enumerate(curve(range(1, 39)))]
    (tmp_path / "ce-s0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for config, said in (({"task": "rte"}, True), ({}, False)):
        figure, _ = drawn(monkeypatch, figures.plot_run, tmp_path, record | {"config": config})
        note = figure.legends[0].get_title().get_text()
        assert ("sentences of similar length" in note) == said and "averages over 5 logged points" in note
    values = figure.axes[0].lines[0].get_ydata()
    assert len(values) == 38 and 0.3 < min(values) and max(values) < 0.7  # instead of 0 and 1


def test_dice_have_no_margin(tmp_path, monkeypatch):
    runs = [{"variant": variant, "seed": 0, "lr": 0.1} for variant in ("none", "random")]
    for own in runs:
        lines = curve(range(1, 9), router_margin=0.5 if own["variant"] == "random" else 0.01)
        (tmp_path / f"{own['variant']}-s0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    panels = panels_of(drawn(monkeypatch, figures.plot_run, tmp_path, {"name": "toy", "runs": runs})[0])
    (margin,) = (axis for title, axis in panels.items() if title.startswith("router margin"))
    assert [line.get_label() for line in margin.lines] == ["none"]
    figure, _ = drawn(monkeypatch, figures.plot_run, tmp_path, {"name": "toy", "runs": runs[1:]})
    assert not any(title.startswith("router margin") for title in panels_of(figure))
