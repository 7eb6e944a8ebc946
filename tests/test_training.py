"""lab/run/training.py: the optimizer of its own, what a curve repeats, the loss scale. The rest of the bookkeeping is tested
where it is used, in test_resume.py and test_lvlm.py."""

import copy
from types import SimpleNamespace

import accelerate
import pytest
import torch
from torch import nn

from lab.run import training as lab_training
from lab.run.training import MuonAdamW, Training

BETAS = (0.9, 0.98)


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def split(model):
    return [p for p in model.parameters() if p.ndim == 2], [p for p in model.parameters() if p.ndim == 1]


def train(model, optimizers, steps, start=0):
    for step in range(start, start + steps):
        x_BD = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(x_BD).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def same(one, other):
    torch.testing.assert_close([*one.parameters()], [*other.parameters()], rtol=0, atol=0)


def test_muon_adamw_is_both_of_torchs():
    ours, theirs = make(), make()
    train(ours, [MuonAdamW(*split(ours), 0.01, BETAS)], 5)
    matrices, others = split(theirs)
    muon = torch.optim.Muon(matrices, 0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    train(theirs, [muon, torch.optim.AdamW(others, 0.01, BETAS, weight_decay=0.0)], 5)
    same(ours, theirs)
    assert not torch.equal(ours[0].weight, make()[0].weight) and not torch.equal(ours[0].bias, make()[0].bias)


def test_muon_adamw_goes_on_from_its_state():
    whole, half = make(), make()
    train(whole, [MuonAdamW(*split(whole), 0.01, BETAS)], 6)
    optimizer = MuonAdamW(*split(half), 0.01, BETAS)
    train(half, [optimizer], 3)
    saved = copy.deepcopy(optimizer.state_dict())
    assert len(saved["state"]) == 4 and len(saved["param_groups"]) == 2
    again = MuonAdamW(*split(half), 1.0, BETAS)
    again.load_state_dict(saved)
    train(half, [again], 3, start=3)
    same(half, whole)


def test_muon_adamw_follows_a_schedule():
    model, before = make(), make()
    optimizer = MuonAdamW(*split(model), 0.01, BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    train(model, [optimizer], 2)
    schedule.step()
    same(model, before)


@pytest.fixture
def training(tmp_path):
    """A run of 14 steps that logs at each 4th, with what STGC would say of them; its accelerator's loss scale has moved."""

    class Said:
        numbers, step = [], 0

        def stats(self):
            return [{"layer": "moe", "conflict_ratio": float(run.at.step), "load": [1.0]}]

        def detach(self):
            pass

    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    args = SimpleNamespace(log_steps=4, save_steps=None, resume=False, seeds=[0, 1], variants=["none", "ce"], toy=False)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    run = Training(args, tmp_path, "ce-s0", accelerator, model, optimizer, schedule, 14, Said())
    yield run
    accelerator.scaler = None


def test_the_last_line_repeats_no_statistics(training, capsys):
    """The last step is logged always, but who judges at logged steps only has nothing new to say there."""
    with training as run:
        for _ in range(14):
            run.step_done(torch.tensor(1.0), 1)
        run.checkpoints = SimpleNamespace(save=lambda *_: None)
        run.epoch_done({"score": 0.5}, task="rte")
    assert "step=14 loss=1 conflict_ratio=13 " in capsys.readouterr().out, "the terminal has the latest of each"
    lines = [line for line in run.log.lines if "loss" in line]
    assert [line["step"] for line in lines] == [1, 5, 9, 13, 14]
    assert [line.get("conflict_ratio") for line in lines] == [1.0, 5.0, 9.0, 13.0, None]


def test_each_run_begins_with_a_fresh_loss_scale(training):
    assert training.grad_scale() == 65536.0


@pytest.mark.parametrize("step, hours", [(1000.0, "about 3 hours on this CPU (11 steps of 1000.0 s"), (300.0, None)])
def test_a_long_training_on_a_cpu_is_announced_once(training, capsys, monkeypatch, step, hours):
    """From its first three steps. What is faster is named."""
    monkeypatch.setattr(lab_training, "time", SimpleNamespace(perf_counter=lambda: training.start + 3 * step))
    with training as run:
        for _ in range(14):
            run.step_done(torch.tensor(1.0), 1)
        said = capsys.readouterr().out
        run.at.step = 3  # as in the next run of the command
        run.say_how_long()
    if hours:
        assert said.count("note: ce-s0 takes") == 1 and hours in said and not capsys.readouterr().out
        assert said.endswith("; the command has 4 runs; faster: --toy, a small model, a GPU\n")
    else:
        assert not said


def test_the_last_steps_of_a_resumed_run_are_not_long(training, capsys, monkeypatch):
    monkeypatch.setattr(lab_training, "time", SimpleNamespace(perf_counter=lambda: training.start + 3000.0))
    training.at.step, training.began = 9, (9, 0.0)
    with training as run:
        for _ in range(5):
            run.step_done(torch.tensor(1.0), 1)
    assert not capsys.readouterr().out
