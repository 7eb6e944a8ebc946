"""One MoE layer, forward and backward, beside its limit, a dense FFN and transformers' own; and how its cost grows.

  python -m lab.bench.layer                            tables of ratios to the limit, at several sizes
  python -m lab.bench.layer --growth                   time and memory over tokens, experts, Top-K and layers

The limit: E FFNs on equal slices of T * K rows, without a router and without sorting. The dense FFN has as many active
weights as a token's K experts, so it does the same floating-point operations.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import stgc
import stgc_plus
from lab.bench.measure import autocast, compare, line_of, peak_bytes, take_turns, write_record
from lab.run.cli import Parser, number, path, run_main, say
from lab.run.runs import make_accelerator

SHAPES = ((2048, 384), (2048, 768), (2048, 1024), (704, 384))  # tokens and hidden size
KINDS = {  # of an expert: gated, with biases
    "plain, biases": (False, True),
    "plain": (False, False),
    "gated, biases": (True, True),
    "gated": (True, False),
}


class FFN(nn.Module):
    def __init__(self, d_model: int, d_ff: int, gated: bool, bias: bool):
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias) if gated else None
        self.up, self.down = nn.Linear(d_model, d_ff, bias), nn.Linear(d_ff, d_model, bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_TD)) if self.gate is None else F.silu(self.gate(x_TD)) * self.up(x_TD))


class EvenSlices(nn.Module):
    """The limit: each token's K copies, in E equal slices, each through an FFN of its own."""

    def __init__(self, num_experts: int, top_k: int, *args):
        super().__init__()
        self.top_k, self.experts = top_k, nn.ModuleList(FFN(*args) for _ in range(num_experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        rows = x_TD.repeat(self.top_k, 1).tensor_split(len(self.experts))
        return torch.cat([expert(rows_ND) for expert, rows_ND in zip(self.experts, rows)])


def make_layers(
    d_model: int, kind: str, num_experts: int = 8, top_k: int = 2, d_ff: int | None = None
) -> dict[str, nn.Module]:
    """The layers that do the same work, by name; the limit is first."""
    gated, bias = KINDS[kind]
    d_ff = d_ff or (d_model * 8 // 3 // 64 * 64 if gated else 4 * d_model)
    sizes, more = (num_experts, d_model, d_ff), {"gated": gated, "bias": bias, "activation": F.silu if gated else F.gelu}
    layers = {
        "limit": EvenSlices(num_experts, top_k, d_model, d_ff, gated, bias),
        "dense FFN": FFN(d_model, top_k * d_ff, gated, bias),
        "stgc_plus.Experts": stgc.MoELayer(stgc_plus.Experts(*sizes, **more), top_k=top_k),
        "stgc.Experts": stgc.MoELayer(stgc.Experts(*sizes, **more), top_k=top_k),
    }
    if kind == "gated":  # what Mixtral has
        for name in ("grouped_mm", "eager"):
            config = MixtralConfig(
                hidden_size=d_model, intermediate_size=d_ff, num_local_experts=num_experts, num_experts_per_tok=top_k
            )
            config._experts_implementation = name
            block = MixtralSparseMoeBlock(config)
            for parameter in block.parameters():  # they come unset
                nn.init.normal_(parameter, std=0.02)
            layers[f"transformers, {name}"] = Batched(block)
    return layers


class Batched(nn.Module):
    """A block that wants (B, L, D). transformers' grouped_mm takes no part in autocast: its weights are cast here, at each
    forward, as autocast casts those of the other layers."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x_TD: Tensor) -> Tensor:
        kind, x_1TD = x_TD.device.type, x_TD.unsqueeze(0)
        if not torch.is_autocast_enabled(kind):
            return self.block(x_1TD).squeeze(0)
        dtype = torch.get_autocast_dtype(kind)
        weights = {name: weight.to(dtype) for name, weight in self.block.named_parameters()}
        return torch.func.functional_call(self.block, weights, (x_1TD,)).squeeze(0)


def make_step(layer: nn.Module, x_TD: Tensor, dtype: torch.dtype = torch.float32):
    """Forward and backward, to the weights and to the input."""
    x_TD = x_TD.clone().requires_grad_()

    def step() -> None:
        with autocast(x_TD.device, dtype):
            y = layer(x_TD)
        y.backward(torch.ones_like(y))
        for tensor in (x_TD, *layer.parameters()):
            tensor.grad = None

    return step


def compare_layers(
    tokens: int, d_model: int, kind: str, rounds: int, device: torch.device, dtype=torch.float32, until: float = math.inf
) -> dict:
    """Rows of `rounds.compare` at one size, as ratios to the limit."""
    torch.manual_seed(0)
    layers = {name: layer.to(device) for name, layer in make_layers(d_model, kind).items()}
    x_TD = torch.randn(tokens, d_model, device=device)
    steps = {name: make_step(layer, x_TD, dtype) for name, layer in layers.items()}
    return compare(take_turns(steps, rounds, device, until), "limit")


# ---- Growth ----

START = {"tokens": 2048, "experts": 8, "top_k": 2, "layers": 1}
GROWTH = {  # one at a time, from START
    "tokens": (1024, 2048, 4096, 8192, 16384, 32768, 65536),
    "experts": (4, 8, 16, 32, 64),
    "top_k": (1, 2, 4, 8),
    "layers": (1, 2, 4, 8, 16, 24),
}
SIZE = (128, 256)  # hidden size and expert size


VARIANTS = {"no STGC": None, "one pass": stgc_plus.STGCConfig(passes="one"), "two passes": stgc_plus.STGCConfig()}


def measure_growth(axis: str, value: int, rounds: int, device: torch.device) -> dict[str, dict]:
    """By variant: seconds of a step, and the most bytes that it allocates."""
    at = START | {axis: value}
    torch.manual_seed(0)
    experts = [stgc_plus.Experts(at["experts"], *SIZE) for _ in range(at["layers"])]
    stack = nn.Sequential(*(stgc.MoELayer(one, top_k=at["top_k"]) for one in experts)).to(device)
    x_TD = torch.randn(at["tokens"], SIZE[0], device=device)

    def make_step(config: stgc_plus.STGCConfig | None):
        def step() -> None:
            watch = config and stgc_plus.STGC(stack, config)
            loss = stack(x_TD).square().mean()
            (watch.loss(loss) if watch else loss).backward()
            stack.zero_grad()
            if watch:
                watch.detach()

        return step

    steps = {name: make_step(config) for name, config in VARIANTS.items()}
    seconds = take_turns(steps, rounds, device)
    return {
        name: {"seconds": float(np.median(seconds[name])), "bytes": peak_bytes(step, device)} for name, step in steps.items()
    }


def slope(sizes: list[int], values: list[float]) -> float:
    """Of the straight line through the logarithms of both: 1 is linear growth."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


# ---- Command line ----


def main() -> None:
    parser = Parser(prog="lab.bench.layer", description=__doc__)
    parser.add_argument("--growth", action="store_true", help="how the cost grows, instead of the tables")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="of the experts")
    parser.add_argument("--rounds", type=number(int, 3), default=31, help="timed steps of each layer, taking turns")
    parser.add_argument("--threads", type=number(int, 1), default=2, help="threads of the CPU")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run")
    parser.add_argument(
        "--output", type=path("new file"), help="write the record here as json; lab.report.costs draws that of --growth"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = make_accelerator(args.device, "fp32").device
    found = {}
    if args.growth:
        for axis, sizes in GROWTH.items():
            found[axis] = {size: measure_growth(axis, size, args.rounds, device) for size in sizes}
            for name in VARIANTS:
                seconds = [row[name]["seconds"] for row in found[axis].values()]
                say(f"{axis:<8}{name:<12}slope of time {slope(sizes, seconds):.2f}, {seconds[0]:.3f} to {seconds[-1]:.3f} s")
        write_record(args.output, device, config=vars(args), growth=found)
        return
    for tokens, d_model in SHAPES:
        for kind in args.kinds:
            rows = found[f"{tokens} tokens, hidden size {d_model}, {kind}"] = compare_layers(
                tokens, d_model, kind, args.rounds, device
            )
            say("", f"{tokens} tokens, hidden size {d_model}, {kind}, {args.threads} threads; ratio to the limit")
            say(*(line_of(name, row) for name, row in rows.items()))
    write_record(args.output, device, config=vars(args), layers=found)


if __name__ == "__main__":
    run_main("lab.bench.layer", main, resumes=False)
