"""lab/report/alone.py: the conflict loss alone, which arm trains what, and what is measured."""

import copy
import json

import pytest
import torch
from conftest import drawn
from test_film import Net  # a net with the interface of a model

from lab.report import alone
from lab.run.cli import UserError
from stgc_plus import STGCConfig


@pytest.fixture
def net_and_batches():
    torch.manual_seed(0)
    shape = {"mask": torch.ones(5, 4).bool(), "labels": torch.randint(3, (5, 4))}
    return Net(), [{"x": torch.randn(5, 4, 6)} | shape for _ in range(4)]


@pytest.mark.parametrize("part", alone.PARTS)
@pytest.mark.parametrize("select", alone.ARMS.values())
def test_the_conflict_loss_alone(part, select, net_and_batches):
    """Only the arm's parameters move, and not by the main loss; the measured batch is none of those that train."""
    net, batches = net_and_batches
    before, seen = copy.deepcopy(net.state_dict()), []
    net.register_forward_pre_hook(lambda _, args, kwargs: seen.append(id(kwargs["x"])), with_kwargs=True)
    rows = alone.train_alone(net, batches, STGCConfig(alpha=0.0, select=select), part, lr=1e-2, every=2)
    assert [row["step"] for row in rows] == [0, 2, 3]
    assert seen == [id(batches[i]["x"]) for i in (0, 1, 2, 0, 3, 0)]
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    routers = {name for name in before if "router" in name}
    assert moved == routers if part == "routers" else routers < moved and any("experts" in name for name in moved)
    assert all(layer.watch is None for layer in net.modules() if isinstance(layer, alone.MoELayer))
    for row in rows:
        layer = row["layers"][0]
        assert all(layer[key] >= 0 for key in alone.KEYS) and row["main_loss"] > 0
        assert layer["conflict_ratio"] <= layer["judged_ratio"] <= 1 and layer["judged_ratio"] > 0


def test_the_main_loss_does_not_train(net_and_batches):
    """With tau below -1 no pair conflicts, so nothing moves at all."""
    net, batches = net_and_batches
    before = copy.deepcopy(net.state_dict())
    alone.train_alone(net, batches, STGCConfig(alpha=0.0, tau=-1.001), "everything", lr=1e-2, every=2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("layers", [1, 3])
def test_the_picture_has_a_panel_of_every_value(layers, tmp_path, monkeypatch):
    """Arms over the steps, for each part and value, the std over experts too; for each layer, where there are several. Lines
    are means over the seeds. A value that no seed has leaves a gap."""
    numbers = iter(torch.rand(2000).tolist())

    def curve():
        measured = lambda: [{key: next(numbers) for key in alone.KEYS} for _ in range(layers)]  # noqa: E731
        return [{"step": step, "main_loss": next(numbers), "layers": measured()} for step in (0, 5, 7)]

    runs = [(part, arm, seed) for part in alone.PARTS for arm in alone.ARMS for seed in (3, 4)]
    rows = [{"part": part, "arm": arm, "seed": seed, "curve": curve()} for part, arm, seed in runs]
    for row in rows:
        row["curve"][1]["layers"][0].pop("consistency_std")
    figure, path = drawn(monkeypatch, alone.plot_arms, {"rows": rows}, tmp_path / "alone.png")
    assert path == tmp_path / "alone.png"
    panels = {axis.get_title(): axis for axis in figure.axes}
    legends = [[text.get_text() for text in part.legends[0].get_texts()] for part in figure.subfigs]

    def value(row, key, layer=None):
        own = [each[key] for each in row["layers"][slice(layer, None if layer is None else layer + 1)] if key in each]
        return row[key] if key == "main_loss" else sum(own) / len(own) if own else None

    def check(title, key, part, looks, lines):
        """`lines`: arm and layer of each."""
        panel = panels.pop(title)
        assert panel.get_xlabel() == "step" and panel.get_ylim()[0] == 0
        assert len({(line.get_color(), line.get_marker()) for line in panel.lines}) == len(panel.lines) == looks
        for line, (arm, layer) in zip(panel.lines, lines, strict=True):
            both = [row["curve"] for row in rows if (row["part"], row["arm"]) == (part, arm)]
            found = [(a["step"], value(a, key, layer), value(b, key, layer)) for a, b in zip(*both)]
            points = [(step, (a + b) / 2) for step, a, b in found if a is not None]
            assert len(points) == 3 - (key == "consistency_std" and layers == 1)
            assert line.get_xydata() == pytest.approx(torch.tensor(points).numpy(), abs=1e-6)  # float32 numbers
            assert panel.get_ylim()[1] > max(number for _, number in points)
        return panel

    for part in alone.PARTS:
        for key, title in {
            "main_loss": f"main loss\n{part} trained; no arm trains on it",
            "conflict_ratio": f"conflict ratio\n{part} trained; in the paper it falls",
            "consistency": f"consistency, mean over experts\n{part} trained; in the paper it rises",
            "consistency_std": f"std of consistency over experts\n{part} trained; in the paper it rises",
        }.items():
            assert check(title, key, part, 3, [(arm, None) for arm in alone.ARMS]).get_ylabel()
        for key, name in {"conflict_ratio": "conflict ratio", "consistency": "consistency"}.items() if layers > 1 else ():
            titles = {arm: f"{name}, {arm}\n{part} trained" for arm in alone.ARMS}
            own = [check(title, key, part, 3, [(arm, layer) for layer in range(3)]) for arm, title in titles.items()]
            assert own[0].get_ylabel() and len({panel.get_ylim() for panel in own}) == 1  # one axis for all arms
    assert not panels
    assert legends == [["ce", "placebo", "flat"], ["MoE layer 1", "MoE layer 2", "MoE layer 3"]][: 1 + (layers > 1)]


def test_the_picture_of_a_record(net_and_batches, tmp_path, monkeypatch, capsys):
    """From the command line; anything but a record is named."""
    net, batches = net_and_batches
    arms = [(part, arm, select) for part in alone.PARTS for arm, select in alone.ARMS.items()]
    train = lambda part, select: alone.train_alone(  # noqa: E731
        copy.deepcopy(net), batches, STGCConfig(alpha=0.0, select=select), part, lr=1e-2, every=2
    )
    rows = [{"part": part, "arm": arm, "seed": 0, "curve": train(part, select)} for part, arm, select in arms]
    (tmp_path / "alone.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr("sys.argv", ["lab.report.alone", "--picture", str(tmp_path / "alone.json")])
    alone.main()
    assert (tmp_path / "alone.png").read_bytes()[:4] == b"\x89PNG" and "written: " in capsys.readouterr().out
    (tmp_path / "alone.json").write_text("{}")
    with pytest.raises(UserError, match="--picture .*alone.json: .*; give a record of this command"):
        alone.main()
    monkeypatch.setattr("sys.argv", ["lab.report.alone"])
    with pytest.raises(SystemExit):
        alone.main()
    assert "RUN and --output are needed" in capsys.readouterr().err
