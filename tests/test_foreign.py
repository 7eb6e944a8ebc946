"""The tutorial's foreign MoE layer: the three plain functions of stgc.py do in it what STGC does in a layer of ours."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stgc import STGC, Experts, MoELayer, STGCConfig

TEXT = (Path(__file__).parent.parent / "tutorial.md").read_text()
NAMES = {
    "w_gate_EDF": "gate",
    "w_in_EDF": "up",
    "w_out_EFD": "down",
    "b_gate_EF": "gate",
    "b_in_EF": "up",
    "b_out_ED": "down",
}


def foreign_code() -> dict:
    """What the tutorial's fence defines, run by itself: whoever copies it needs nothing else."""
    (fence,) = (code for code in re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S) if "class ForeignMoE" in code)
    scope = {"__name__": "foreign"}
    exec(compile(fence, "tutorial.md", "exec"), scope)
    return scope


def stacked(foreign: nn.Module, name: str, of=lambda parameter: parameter) -> Tensor:
    """The weights or biases of the experts' linears, or of(...) them, as stgc.Experts has them."""
    linears = [getattr(expert, NAMES[name]) for expert in foreign.experts]
    rows = [of(linear.weight).T if name.startswith("w") else of(linear.bias) for linear in linears]
    return torch.stack(rows)


class Net(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x_TD):
        for layer in self.layers:
            x_TD = torch.tanh(x_TD + layer(x_TD))
        return x_TD


@pytest.mark.parametrize("num_layers, tokens", [(1, 60), (2, 60), (2, 3)])  # with 3 tokens some experts have none
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_foreign_layer_with_the_plain_functions_is_stgc(top_k, gated, num_layers, tokens):
    scope, config = foreign_code(), STGCConfig(alpha=0.3, beta=0.7, tau=0.05)
    foreign = Net(scope["ForeignMoE"](8, 12, num_experts=4, top_k=top_k, gated=gated) for _ in range(num_layers)).double()
    ours = []
    for layer in foreign.layers:
        layer.router.weight.data *= 4  # clear choices, far from a tie
        experts = Experts(4, 8, 12, gated=gated, activation=F.silu if gated else F.gelu, dtype=torch.float64)
        ours.append(MoELayer(experts, top_k=top_k))
        ours[-1].router.weight.data.copy_(layer.router.weight.data)
        for name, parameter in experts.named_parameters():
            parameter.data.copy_(stacked(layer, name, lambda parameter: parameter.data))
    ours = Net(ours)
    x_TD, target_TD = torch.randn(2, tokens, 8, dtype=torch.float64)
    x_TD, own_x_TD = x_TD.clone().requires_grad_(), x_TD.clone().requires_grad_()

    main_loss = (foreign(x_TD) - target_TD).square().sum()
    found = [scope["stgc_losses"](main_loss, layer, config.tau) for layer in foreign.layers]
    conflict, balance = (torch.stack(losses).mean() for losses in list(zip(*found))[:2])
    total = main_loss + config.alpha * balance + config.beta * conflict
    total.backward()

    stgc = STGC(ours, config)
    own_total = stgc.loss((ours(own_x_TD) - target_TD).square().sum())
    own_total.backward()

    exactly = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(total, own_total, **exactly)
    torch.testing.assert_close(x_TD.grad, own_x_TD.grad, **exactly)
    for layer, own, row, verdict, one in zip(foreign.layers, ours.layers, stgc.stats(), stgc.verdicts, found, strict=True):
        conflict, balance, conflict_S, token_S, expert_S = one
        conflict_TE = torch.zeros(tokens, 4, dtype=torch.bool)
        conflict_TE[token_S, expert_S] = conflict_S
        assert len(conflict_S) == tokens * top_k
        assert conflict_TE.gather(1, verdict.target_TK).equal(verdict.conflict_TK)
        assert tokens == 3 or 0 < verdict.conflict_TK.sum() < tokens * top_k
        assert conflict.item() == pytest.approx(row["conflict_loss"], rel=1e-12, abs=1e-12)
        assert balance.item() == pytest.approx(row["balance_loss"], rel=1e-12, abs=1e-12)
        torch.testing.assert_close(layer.router.weight.grad, own.router.weight.grad, **exactly)
        for name, parameter in own.experts.named_parameters():
            grad = stacked(
                layer, name, lambda parameter: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
            torch.testing.assert_close(grad, parameter.grad, **exactly)
