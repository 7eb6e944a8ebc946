"""What the tests share: a seed, one thread, a small network of MoE layers with a batch for it, and comparisons."""

import gc
import signal
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from forked import serve
from torch import Tensor, nn

import stgc_plus
from lab.run.cli import SIGNALS
from stgc import MoELayer, Verdict
from stgc_plus import STGC

pytest.register_assert_rewrite("harm")


def pytest_configure():
    """Signals are tested, also where a shell that starts the tests in the background has them ignored."""
    for name, handler in {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}.items():
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def server():
    """For what `forked.py` starts."""
    serve()


def pytest_collection_finish(session):
    """It imports while tests run that need none."""
    rows = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    names = [item.fixturenames for item in session.items] + [row.get("fixtures", []) for row in rows]  # see test_harm.py
    if any("server" in own for own in names):
        serve()


def without_pictures(patch, *names) -> None:
    """Most of the time of runs as short as the tests' is drawn away; a few tests have every kind of picture drawn."""
    for name in names or ("plot_sheet", "plot_routes", "plot_run", "plot_comparison"):
        patch.setattr(f"lab.report.figures.{name}", lambda *_, **__: None)


@pytest.fixture(autouse=True, scope="module")
def swift():
    """What the imports made stays out of the garbage collector's sight: it is a million objects, and looking through them
    takes half a second, which every training run and many a test would ask for several times."""
    torch.set_num_threads(1)  # small tensors: more threads only wait for each other
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def handlers():
    """For what runs `run_main` in this process: signals are handled as before again."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Net(nn.Module):
    """x <- tanh(x + MoE(x)) for every layer, then a linear head without bias: what `reference.RefNet` computes."""

    def __init__(self, layers: list[MoELayer], classes: int):
        super().__init__()
        like = layers[0].experts.w_in_EDF
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(like.shape[1], classes, bias=False, dtype=like.dtype, device=like.device)
        self.call = lambda layer, *inputs: layer(*inputs)  # a test may checkpoint here

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(x + self.call(layer, x, mask))
        return self.head(x)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "call"}

    def __setstate__(self, state):
        super().__setstate__(state | {"call": lambda layer, *inputs: layer(*inputs)})


def make_net(num_layers=2, top_k=2, normalize=True, scale=1.0, d_ff=12, dtype=torch.float64, of=stgc_plus, **experts) -> Net:
    """`of`: the module whose Experts it has."""
    layers = []
    for _ in range(num_layers):
        stacked = of.Experts(4, 8, d_ff, dtype=dtype, **experts)
        layers.append(MoELayer(stacked, top_k=top_k, normalize=normalize, scale=scale))
        layers[-1].router.weight.data *= 4  # clear choices, far from a tie
    return Net(layers, classes=3)


class Batch(NamedTuple):
    x_TD: Tensor
    labels_T: Tensor
    keep_T: Tensor


def make_batch(tokens=14, padding=2, unlabelled=2, dtype=torch.float64) -> Batch:
    """Padding and tokens without a label stand anywhere between the others."""
    rank_T = torch.randperm(tokens)
    labels_T = torch.randint(3, (tokens,)).masked_fill(rank_T < padding + unlabelled, -100)
    return Batch(torch.randn(tokens, 8, dtype=dtype), labels_T, rank_T >= padding)


class Run(NamedTuple):
    total: float
    grads: dict[str, Tensor]  # of every parameter, and of the input as "x_TD"
    verdicts: list[Verdict | None]
    stats: list[dict]


def main_loss(net: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch.x_TD, batch.keep_T), batch.labels_T)


def train_step(stgc: STGC, net: nn.Module, batch: Batch, loss_scale: float = 1.0) -> Run:
    """One forward and backward of an STGC object that is there already."""
    net.zero_grad(set_to_none=True)
    batch = batch._replace(x_TD=batch.x_TD.detach().requires_grad_())
    total = stgc.loss(loss_scale * main_loss(net, batch))
    total.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    return Run(total.item(), grads | {"x_TD": batch.x_TD.grad}, list(stgc.verdicts), stgc.stats())


def run(net: nn.Module, batch: Batch, loss_scale: float = 1.0, of=stgc_plus, **config) -> Run:
    """The same with an STGC object, that of a module, which lives for this step only."""
    stgc = of.STGC(net, of.STGCConfig(**config))
    result = train_step(stgc, net, batch, loss_scale)
    for layer in stgc.layers:
        layer.watch = None
    return result


def close(actual, expected, rtol=1e-9, atol=1e-12):
    """Equal up to float64 rounding; `atol` is relative to the largest entry, since entries that cancel keep its rounding."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float64), expected, rtol=rtol, atol=atol * scale)


def same_grads(actual: dict, expected: dict, rtol=1e-9, atol=1e-12):
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        try:
            close(actual[name], grad, rtol, atol)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


def same_verdicts(actual: list, expected: list, rtol=1e-9, atol=1e-12):
    for a, b in zip(actual, expected, strict=True):
        close(a.similarity_TK, b.similarity_TK, rtol, atol)
        for name in ("judged_TK", "conflict_TK", "picked_TK"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def drawn(monkeypatch, draw, *args):
    """The figure that a drawing function saves, and the path of its PNG. It ends by closing the figure: that is put off."""
    from matplotlib import pyplot as plt

    figures = []
    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", figures.append)
        path = draw(*args)
    plt.close(figures[0])
    assert path.read_bytes().startswith(b"\x89PNG")
    return figures[0], path
