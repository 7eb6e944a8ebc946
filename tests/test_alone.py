"""lab/report/alone.py: the conflict loss alone, which arm trains what, and what is measured."""

import copy
import json

import pytest
import torch
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
        assert all(row["layers"][0][key] >= 0 for key in alone.KEYS) and row["main_loss"] > 0


def test_the_main_loss_does_not_train(net_and_batches):
    """With tau below -1 no pair conflicts, so nothing moves at all."""
    net, batches = net_and_batches
    before = copy.deepcopy(net.state_dict())
    alone.train_alone(net, batches, STGCConfig(alpha=0.0, tau=-1.001), "everything", lr=1e-2, every=2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_picture_of_a_record(net_and_batches, tmp_path, monkeypatch, capsys):
    """A panel per trained part and value; anything but a record is named."""
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
