"""lab/baselines.py: the cosine router against its formula, written out token by token."""

import math

import pytest
import torch

import stgc
from lab.baselines import CosineRouter


def slow_logits(router, x_TD):
    """normalise(W x + b) . normalise(S column) * exp(min(t, log 100)), one number at a time."""
    scale = math.exp(min(router.log_scale.item(), math.log(100)))
    rows = []
    for x_D in x_TD:
        h_P = router.project.weight @ x_D + router.project.bias
        columns = router.experts_PE.unbind(1)
        rows.append([scale * (h_P / h_P.norm()).dot(s_P / s_P.norm()).item() for s_P in columns])
    return torch.tensor(rows, dtype=x_TD.dtype)


@pytest.mark.parametrize("log_scale", [math.log(2), 0.3, math.log(100), 7.0])
def test_cosine_router_is_its_formula(log_scale):
    router = CosineRouter(5, 3, d_project=7, dtype=torch.float64)
    router.log_scale.data.fill_(log_scale)
    x_TD = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(router(x_TD), slow_logits(router, x_TD), rtol=1e-12, atol=1e-12)


def test_cosine_router_starts_as_dynmoe_has_it():
    router = CosineRouter(64, 8)
    assert router.experts_PE.shape == (256, 8) and router.project.weight.shape == (256, 64)
    assert abs(router.experts_PE.std().item() - 0.01) < 0.001
    assert router.log_scale.item() == pytest.approx(math.log(2))
    for size in (1e-3, 1.0, 1e4):
        assert router(size * torch.randn(500, 64)).abs().max() <= 2 + 1e-5  # cosines, times two
    wide = CosineRouter(256, 8)
    along_TD = torch.linalg.solve(wide.project.weight, wide.experts_PE.detach() - wide.project.bias.detach().unsqueeze(1)).T
    torch.testing.assert_close(wide(along_TD).diagonal(), torch.full((8,), 2.0), rtol=1e-3, atol=0)  # the bound is met


def test_cosine_router_is_wide_in_half_precision_and_keeps_float64():
    x_TD = torch.randn(9, 16)
    router = CosineRouter(16, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside_TE = router(x_TD)
    assert inside_TE.dtype == torch.float32
    assert torch.equal(inside_TE, router(x_TD))
    assert CosineRouter(16, 4, dtype=torch.bfloat16)(x_TD.bfloat16()).dtype == torch.float32
    assert CosineRouter(16, 4, dtype=torch.float64)(x_TD.double()).dtype == torch.float64


def test_cosine_router_trains_every_parameter_and_routes():
    router = CosineRouter(8, 4, dtype=torch.float64)
    layer = stgc.MoELayer(stgc.Experts(4, 8, 6, dtype=torch.float64), router, top_k=2)
    layer(torch.randn(10, 8, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in router.parameters())
    x_TD = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(router, (x_TD,))
