"""Three claims measured anew in a minute, beside their records: `python -m lab.report.claims --quick`.

They need no download: a net of two MoE layers, and stgc.Demo. Everything is trained in this process, with one thread.
"""

import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stgc
from lab.bench import measure
from lab.report import regimes
from lab.report.grader import load_oracle
from lab.report.records import RESULTS
from lab.report.tables import read_bench
from lab.run.cli import layout
from lab.run.options import label
from stgc import MoELayer
from stgc_plus import STGC, Experts, STGCConfig

SEEDS, STEPS, ROUNDS = 3, 150, 15


class Net(nn.Module):
    """x <- tanh(x + MoE(x)) for every layer, then a linear head: what tests/reference.py computes slowly."""

    def __init__(self, d_model: int, d_ff: int, dtype: torch.dtype, num_layers: int = 2):
        super().__init__()
        layers = [MoELayer(Experts(4, d_model, d_ff, dtype=dtype)) for _ in range(num_layers)]
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(d_model, 3, bias=False, dtype=dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        for layer in self.layers:
            x_TD = torch.tanh(x_TD + layer(x_TD))
        return self.head(x_TD)


def compare_flags() -> Iterator[str]:
    """Flags against one backward per pair, in float64."""
    reference, pairs, equal, gap = load_oracle(), 0, 0, 0.0
    for seed in range(5):
        torch.manual_seed(seed)
        net, x_TD, label_T = Net(8, 12, torch.float64), torch.randn(24, 8, dtype=torch.float64), torch.randint(3, (24,))
        slow = [reference.RefLayer(one.router.weight, **dict(one.experts.named_parameters())) for one in net.layers]
        slow = reference.RefNet(slow, net.head.weight, after_block=torch.tanh)
        truth = reference.judge(slow, x_TD, label_T, torch.ones(24, dtype=torch.bool))
        watch = STGC(net, STGCConfig(passes="one"))
        watch.loss(F.cross_entropy(net(x_TD), label_T)).backward()
        for verdict, own in zip(watch.verdicts, truth, strict=True):
            pairs += verdict.conflict_TK.numel()
            equal += (verdict.conflict_TK == own.conflict_TK).sum().item()
            gap = max(gap, (verdict.similarity_TK - own.similarity_TK).abs().max().item())
    same, recorded = f"{equal} of {pairs} equal, similarities within {gap:.0e}", recorded_flags()
    yield f"1. Flags by the fast code and one backward per pair: {same}{'' if recorded else '.'}"
    if recorded:
        yield f"   (recorded: {recorded})."


def recorded_flags() -> str:
    """The same of the run whose output is kept; empty while that file is written anew."""
    found = re.search(r"(\d+ of \d+) equal, similarities within ([\de+-]+)", (RESULTS / "log-quick.txt").read_text())
    return ", ".join(found.groups()) if found else ""


def compare_margins() -> Iterator[str]:
    """The router's margin after training stgc.Demo with the loss on conflicting, on random and on all pairs."""
    found: dict[str, list[list[float]]] = {}
    for name, fields in {
        "none": {"conflict_loss": "none"},
        "ce": {},
        "placebo": {"select": "random"},
        "flat": {"select": "all"},
    }.items():
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            model = stgc.Demo(Experts(4, 16, 32))
            how = STGC(model, STGCConfig(**fields)), torch.optim.AdamW(model.parameters(), 5e-3)
            model.fit(*how, STEPS, keys=())
            found.setdefault(name, []).append(model.fit(*how, 25, keys=("router_margin",)))
    rows, recorded = [["variant", "margin", "of baseline's", "recorded", "main loss"]], recorded_margins()
    base = torch.tensor(found["none"]).mean(0)[0]
    for name, own in found.items():
        margin, loss = torch.tensor(own).mean(0).tolist()
        rows.append([label(name), f"{margin:.4f}", f"{margin / base:.3f}", recorded.get(name, ""), f"{loss:.3f}"])
    yield f"2. The router's margin after {STEPS + 25} steps of stgc.Demo, beta 1, mean of {SEEDS} seeds. Recorded: the"
    yield "   median of the settings in results/regimes.json."
    yield from layout(rows).split("\n")


def recorded_margins() -> dict[str, str]:
    """The median over the recorded settings of a variant's margin, relative to none's, at beta 1."""
    record = regimes.read_record(RESULTS / "regimes.json")
    runs = regimes.runs_of(record)
    names = regimes.sound(record, regimes.settings_of(record, runs))
    return {name: f"{regimes.median_margin(runs, names, (name, 1.0)):.3f}" for name in regimes.DOSED}


def compare_passes() -> Iterator[str]:
    """One pass against two: the same flags where both losses act on the router only; their time, in turn."""
    torch.manual_seed(0)
    x_TD, label_T, device = torch.randn(512, 128), torch.randint(3, (512,)), torch.device("cpu")
    kinds = {"no conflict loss": None, "two": {"router_only": True}, "one": {"passes": "one"}}
    steps, watches = {}, {}
    for name, fields in kinds.items():
        torch.manual_seed(1)
        net = Net(128, 512, torch.float32, num_layers=4)
        watches[name] = watch = None if fields is None else STGC(net, STGCConfig(**fields))

        def step(net=net, watch=watch):
            net.zero_grad()
            main_loss = F.cross_entropy(net(x_TD), label_T)
            (main_loss if watch is None else watch.loss(main_loss)).backward()

        steps[name] = step
    rows = measure.compare(measure.take_turns(steps, ROUNDS, device), "no conflict loss")
    both = zip(watches["one"].verdicts, watches["two"].verdicts)
    equal = [torch.equal(one.conflict_TK, two.conflict_TK) for one, two in both]
    yield f"3. One pass and two passes flag the same pairs in {sum(equal)} of {len(equal)} layers. Their time, relative to a"
    yield "   step without STGC:"
    for name in ("two", "one"):
        low, high = rows[name]["interval"]
        yield f"   {name} pass{'es' * (name == 'two')}: {rows[name]['ratio']:.2f}x [{low:.2f}, {high:.2f}]"
    recorded = read_bench(RESULTS / "bench-bert-base.json")["variants"]
    ratios = " and ".join(f"{recorded[name]['ratio']:.2f}x" for name in ("two passes", "one pass"))
    yield f"   (Of this tiny net. Recorded, of BERT-base's size: {ratios}.)"


def measure_all() -> Iterator[str]:
    """The lines of all three."""
    torch.set_num_threads(1)
    for part in (compare_flags, compare_margins, compare_passes):
        yield from part()
