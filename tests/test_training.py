"""lab/training.py: the optimizer of its own. The loop's bookkeeping is tested where it is used, in test_resume.py and
test_lvlm.py."""

import copy

import torch
from torch import nn

from lab.training import MuonAdamW

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
