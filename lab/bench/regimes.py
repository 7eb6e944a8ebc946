"""Where does the conflict loss's selection help, and where does restless routing? A search over small synthetic settings.

  python -m lab.bench.regimes              all settings, 8 seeds each, then 10 fresh seeds for hits: an hour on one core
  python -m lab.bench.regimes --resume     continues a search that was stopped
  python -m lab.report.regimes             the table and the picture of its record

The data and the model resemble stgc.Demo: an example is one token, and tasks want different answers to the same content. The
input holds the content, and a mark of the task under noise. The variants of a seed share data, batches and initial weights:

  none      no conflict loss              ce        on the pairs in conflict, as the paper does
  random    experts drawn by dice         placebo   on as many random pairs
  frozen    the router stays as it was    flat      on all pairs
  oracle    each task has its own experts long      on pairs whose gradient is longer than average (experts trained before)
                                          ce-one    as ce; both losses reach the router alone, as in one pass;
                                                    placebo-one: its own placebo

Held-out examples have right labels. Half of them choose the best checkpoint; the scores are of the other half. Margin and
moved are means over layers. Margin: p_K - p_(K+1) in the last step. Moved: the share of 512 held-out tokens whose first
expert differs between two moments an eighth of the training apart, mean over the last quarter. A hit is a setting and a beta
where ce is more accurate than none and than the placebo, both by a paired 95 % t-interval over the seeds of the search.
"""

import copy
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import ttest_1samp
from torch import Tensor, nn

import stgc_plus
from lab.moe.baselines import RandomRouter, make_router
from lab.run.cli import Parser, UserError, number, path, run_main, say
from lab.run.files import written
from lab.run.reading import read_json
from lab.run.runs import environment
from stgc import MoELayer

CONTENT, BATCH, RATE = 12, 128, 3e-3  # numbers of an example's content; examples of a step; AdamW's learning rate
HELD_OUT, PROBE = 4096, 512
MARKS = {"strong": 5.0, "weak": 2.0, "absent": 0.0}  # over noise of standard deviation 1
BETAS = (1.0, 0.1, 0.01)
FIRST_FRESH = 1000  # the first seed of a hit's fresh runs
COLUMNS = ("setting", "variant", "beta", "seed", "accuracy", "loss", "best_accuracy", "best_loss")
COLUMNS += ("train_loss", "margin", "moved")  # train_loss: mean over the last tenth of the steps


@dataclass(frozen=True)
class Setting:
    """What a model learns, and what the model is."""

    tasks: int = 4
    mark: str = "weak"  # of the task, in the input: a key of MARKS
    examples: int = 8192
    wrong: float = 0.0  # share of the training labels
    experts: int = 4
    top_k: int = 2
    width: int = 16
    depth: int = 1  # MoE layers
    router: str = "linear"
    start: str = "random"  # of the experts | copied: equal | trained: one per task, then a new router learns alone
    normalize: bool | None = None  # the K weights sum to 1; None: where that leaves the router a gradient, K > 1


FEW = {"examples": 512, "wrong": 0.2}
SETTINGS = {
    "one-task-wrong-30": Setting(tasks=1, examples=256, wrong=0.3),
    "few-wrong-40": Setting(examples=512, wrong=0.4),
    "few-wrong-20": Setting(**FEW),
    "few-wrong-20-top-1": Setting(**FEW, top_k=1),
    "few-wrong-20-top-1-sum-1": Setting(**FEW, top_k=1, normalize=True),
    "few-wrong-20-strong": Setting(**FEW, mark="strong"),
    "few-wrong-20-cosine": Setting(**FEW, router="cosine"),
    "few-wrong-20-copied": Setting(**FEW, start="copied"),
    "one-task": Setting(tasks=1, examples=256),
    "weak": Setting(),
    "absent": Setting(mark="absent"),
    "strong": Setting(mark="strong"),
    "strong-top-1": Setting(mark="strong", top_k=1),
    "strong-top-1-sum-1": Setting(mark="strong", top_k=1, normalize=True),
    "strong-8-experts": Setting(mark="strong", experts=8),
    "strong-width-64": Setting(mark="strong", width=64),
    "strong-depth-3": Setting(mark="strong", depth=3),
    "strong-like-glue": Setting(mark="strong", router="cosine", start="copied", depth=3),
    "trained-strong": Setting(mark="strong", start="trained"),
    "trained-weak": Setting(start="trained"),
}


# ---- 1. Data and model ----


class Examples(NamedTuple):
    x_TI: Tensor  # the mark, then the content
    task_T: Tensor
    label_T: Tensor


def make_data(setting: Setting, seed: int) -> tuple[Examples, Examples]:
    """The training examples, some with a wrong label, and the held-out ones."""
    dice, classes = torch.Generator().manual_seed(seed), count_classes(setting)
    answers_IC = torch.randn(CONTENT, classes, generator=dice)

    def draw(count: int) -> Examples:
        task_T = torch.randint(setting.tasks, (count,), generator=dice)
        mark_TI, content_TI = torch.randn(count, setting.tasks + CONTENT, generator=dice).split([setting.tasks, CONTENT], 1)
        mark_TI = mark_TI + MARKS[setting.mark] * F.one_hot(task_T, setting.tasks)
        label_T = ((content_TI @ answers_IC).argmax(-1) + task_T) % classes
        return Examples(torch.cat([mark_TI, content_TI], dim=1), task_T, label_T)

    train, held_out = draw(setting.examples), draw(HELD_OUT)
    wrong = torch.randperm(setting.examples, generator=dice)[: round(setting.wrong * setting.examples)]
    train.label_T[wrong] = (train.label_T[wrong] + torch.randint(1, classes, wrong.shape, generator=dice)) % classes
    return train, held_out


def count_classes(setting: Setting) -> int:
    return max(4, setting.tasks)


class Oracle(nn.Module):
    """A router that is told the tasks: each has E // tasks experts of its own. x_TD -> logits_TE."""

    task_T: Tensor  # set by each forward of the model

    def __init__(self, tasks: int, num_experts: int):
        super().__init__()
        self.num_experts, self.own = num_experts, num_experts // tasks

    def forward(self, x_TD: Tensor) -> Tensor:
        owner_E = torch.arange(self.num_experts) // self.own
        return RandomRouter.OTHER * (owner_E != self.task_T.unsqueeze(1)).to(x_TD.dtype)


class Model(nn.Module):
    """Residual MoE layers between two linears."""

    def __init__(self, setting: Setting):
        super().__init__()
        self.setting, width = setting, setting.width
        self.embed = nn.Linear(setting.tasks + CONTENT, width)
        self.layers = nn.ModuleList(self.make_layer() for _ in range(setting.depth))
        self.head = nn.Linear(width, count_classes(setting))

    def make_layer(self) -> MoELayer:
        of = self.setting
        normalize = of.top_k > 1 if of.normalize is None else of.normalize
        experts, router = stgc_plus.Experts(of.experts, of.width, 2 * of.width), make_router(of.router, of.width, of.experts)
        for parameter in experts.parameters() if of.start == "copied" else ():
            parameter.data[1:] = parameter.data[0]
        return MoELayer(experts, router, of.top_k, normalize=normalize)

    def forward(self, x_TI: Tensor, task_T: Tensor) -> Tensor:
        h_TD = self.embed(x_TI)
        for layer in self.layers:
            layer.router.task_T = task_T
            h_TD = h_TD + layer(h_TD)
        return self.head(h_TD)

    def reroute(self, variant: str) -> None:
        """Replaces the routers, for random and oracle."""
        of = self.setting
        for layer in self.layers:
            if variant == "random":
                layer.router = RandomRouter(of.width, of.experts, of.top_k)
            elif variant == "oracle":
                layer.router, layer.top_k = Oracle(of.tasks, of.experts), min(of.top_k, of.experts // of.tasks)


# ---- 2. One run ----


class LongStep(stgc_plus.LayerStep):
    """The loss goes to the judged pairs whose gradient is longer than the layer's average, whatever their direction."""

    def find_conflicts(self):
        verdict = super().find_conflicts()
        length_TK = verdict.norm_TKL.norm(dim=-1)
        return verdict._replace(picked_TK=verdict.judged_TK & (length_TK > length_TK[verdict.judged_TK].mean()))


class LongSTGC(stgc_plus.STGC):
    step_type = LongStep


SELECT = {"ce": "conflict", "placebo": "random", "flat": "all", "long": "conflict"}  # the variants with a beta
SELECT |= {"ce-one": "conflict", "placebo-one": "random"}


def fit(model: Model, train: Examples, variant: str, beta: float | None, seed: int, steps: int, routers_alone: bool):
    """Trains. Yields after each step: its number, from 1; the main loss; the STGC object."""
    config = {"conflict_loss": "none", "every": 0}
    if variant in SELECT:
        config = {"beta": beta, "select": SELECT[variant], "seed": seed, "router_only": variant.endswith("-one")}
    stgc = (LongSTGC if variant == "long" else stgc_plus.STGC)(model, stgc_plus.STGCConfig(**config))
    routers = [parameter for layer in model.layers for parameter in layer.router.parameters()]
    others = [parameter for parameter in model.parameters() if all(parameter is not router for router in routers)]
    rates = {"lr": RATE * (variant != "frozen")}, {"lr": RATE * (not routers_alone)}  # at rate 0 AdamW changes nothing
    groups = [{"params": own} | rate for own, rate in zip((routers, others), rates)]
    optimizer, dice = torch.optim.AdamW(groups, fused=True), torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        batch_T = torch.randint(len(train.label_T), (BATCH,), generator=dice)
        x_TI, task_T, label_T = (rows[batch_T] for rows in train)
        main_loss = F.cross_entropy(model(x_TI, task_T), label_T)
        stgc.loss(main_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step, main_loss.item(), stgc


@lru_cache(maxsize=1)
def begin(setting: Setting, seed: int, steps: int) -> tuple[Model, Examples, Examples]:
    """What the variants of a seed share: the model before training, and the data."""
    train, held_out = make_data(setting, seed)
    torch.manual_seed(seed)
    model = Model(setting)
    if setting.start == "trained":
        new = [(layer.router, layer.top_k) for layer in model.layers]
        model.reroute("oracle")
        for _ in fit(model, train, "oracle", None, seed, steps, routers_alone=False):
            pass
        for layer, (router, top_k) in zip(model.layers, new):
            layer.router, layer.top_k = router, top_k
    return model, train, held_out


@torch.no_grad()
def first_experts(model: Model, probe: Examples) -> Tensor:
    """first_LT: each token's first expert in each layer."""
    rows = []
    hooks = [layer.router.register_forward_hook(lambda *seen: rows.append(seen[-1].argmax(-1))) for layer in model.layers]
    model(probe.x_TI, probe.task_T)
    for hook in hooks:
        hook.remove()
    return torch.stack(rows)


@torch.no_grad()
def evaluate(model: Model, held_out: Examples) -> tuple[float, float, float]:
    """The accuracy on the half that chooses the checkpoint; on the other half accuracy and loss."""
    logits_TC = model(held_out.x_TI, held_out.task_T)
    right_T = (logits_TC.argmax(-1) == held_out.label_T).float()
    half = len(right_T) // 2
    loss = F.cross_entropy(logits_TC[half:], held_out.label_T[half:])
    return right_T[:half].mean().item(), right_T[half:].mean().item(), loss.item()


def measure(setting: Setting, variant: str, beta: float | None, seed: int, steps: int) -> list[float | None]:
    """One run: the values of COLUMNS from accuracy on. The margin is None where no router learns or all experts run."""
    start, train, held_out = begin(setting, seed, steps)
    model, gap = copy.deepcopy(start), max(1, steps // 8)
    model.reroute(variant)
    torch.manual_seed(seed)  # of a random router's dice
    losses, checkpoints, firsts, probe = [], [], [], Examples(*(rows[:PROBE] for rows in held_out))
    for step, main_loss, stgc in fit(model, train, variant, beta, seed, steps, setting.start == "trained"):
        losses.append(main_loss)
        if (steps - step) % max(1, steps // 12) == 0:
            checkpoints.append(evaluate(model, held_out))
        if steps - step in (0, gap, 2 * gap):
            firsts.append(first_experts(model, probe))
            stats = stgc.stats()
    _, *last = checkpoints[-1]
    _, *best = max(checkpoints, key=lambda one: one[0])
    learns = variant not in ("random", "oracle")
    margins = [layer["router_margin"] for layer in stats if learns and "router_margin" in layer]
    moved = [(before != now).float().mean().item() for before, now in zip(firsts, firsts[1:])]
    values = *last, *best, mean(losses[-max(1, steps // 10) :]), mean(margins) if margins else None, mean(moved)
    return [value if value is None else float(f"{value:.5g}") for value in values]


# ---- 3. The search ----


def variants_of(setting: Setting) -> list[tuple[str, float | None]]:
    """The variants of a setting, each with its beta."""
    names = [name for name in SELECT if name != "long" or setting.start == "trained"]
    return [*((name, None) for name in ("none", "random", "frozen", "oracle")), *product(names, BETAS)]


def find_hits(runs: list[list], names: list[str], seeds: range) -> list[tuple[str, float]]:
    """The settings and betas where ce beats none and the placebo, at the last step or at the best checkpoint."""
    table = {tuple(run[:4]): dict(zip(COLUMNS, run)) for run in runs}

    def beats(name: str, beta: float, other: tuple[str, float | None], key: str) -> bool:
        gaps = [table[name, "ce", beta, seed][key] - table[(name, *other, seed)][key] for seed in seeds]
        return len(gaps) > 1 and bool(ttest_1samp(gaps, 0).confidence_interval(0.95).low > 0)

    def is_hit(name: str, beta: float, key: str) -> bool:
        return beats(name, beta, ("none", None), key) and beats(name, beta, ("placebo", beta), key)

    found = product(names, BETAS)
    return [(name, beta) for name, beta in found if any(is_hit(name, beta, key) for key in ("accuracy", "best_accuracy"))]


def search(record: dict, names: list[str], seeds: int, fresh: int, target: Path) -> None:
    """Adds the runs that the record lacks. It is written after each seed of a setting, and when a signal ends the search."""
    for seed in range(seeds):
        for name in names:
            run_seed(record, name, seed, variants_of(SETTINGS[name]), target)
    hits = find_hits(record["runs"], names, range(seeds))
    say("", f"hits: {'; '.join(f'{name}, beta {beta}' for name, beta in hits) or 'none'}")
    for (name, beta), seed in product(hits, range(FIRST_FRESH, FIRST_FRESH + fresh)):
        again = [(variant, beta) for variant in ("ce", "placebo", "flat")]
        run_seed(record, name, seed, [("none", None), ("random", None), *again], target)


def run_seed(record: dict, name: str, seed: int, variants: list[tuple[str, float | None]], target: Path) -> None:
    runs = record["runs"]
    known = {tuple(run[:4]) for run in runs}
    missing = [(variant, beta) for variant, beta in variants if (name, variant, beta, seed) not in known]
    try:
        for variant, beta in missing:
            runs.append(
                [name, variant, beta, seed, *measure(SETTINGS[name], variant, beta, seed, record["config"]["steps"])]
            )
    finally:
        write(record, target)
    scores = [f"{run[1]}{'' if run[2] is None else f' {run[2]}'} {100 * run[4]:.1f}" for run in runs[-len(missing) :]]
    say(f"seed {seed}, {name}: {', '.join(scores)}" if missing else f"seed {seed}, {name}: complete already")


def write(record: dict, target: Path) -> None:
    """A line per run: half as long as with a line per number."""
    head, runs = {key: value for key, value in record.items() if key != "runs"}, record["runs"]
    rows = ",\n".join(json.dumps(run, separators=(",", ":"), allow_nan=False) for run in runs)
    with written(target) as new:
        new.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "runs": [\n{rows}\n]}}\n')


def read_record(file: Path) -> dict:
    """A record of this search. UserError if it is damaged or something else."""
    try:
        return read_json(file, command=str, config=dict, settings=dict, columns=list, runs=list)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {error}; name another file") from None


def main() -> None:
    parser = Parser(prog="lab.bench.regimes", description=__doc__)
    text = f"which to search, of {', '.join(SETTINGS)}; default: all"
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), metavar="NAME", default=[], help=text)
    parser.add_argument("--seeds", type=number(int, 1, FIRST_FRESH), default=8, help="seeds of each setting, from 0")
    parser.add_argument("--fresh", type=number(int, 0), default=10, help=f"fresh seeds of each hit, from {FIRST_FRESH}")
    parser.add_argument("--steps", type=number(int, 12), default=300, help="training steps of a run")
    parser.add_argument("--output", type=path("new file"), default="results/regimes.json", help="the record")
    parser.add_argument("--resume", action="store_true", help="continue the record; only runs that it lacks are trained")
    args = parser.parse_args()
    torch.set_num_threads(1)  # more would only wait for each other
    target, made_by = Path(args.output), environment(torch.device("cpu"))
    names = args.settings or list(SETTINGS)
    settings = {name: asdict(SETTINGS[name]) for name in names}
    config = {"steps": args.steps, "batch": BATCH, "rate": RATE, "marks": MARKS}
    record = made_by | {"config": config, "settings": settings, "columns": list(COLUMNS), "runs": []}
    if target.exists() and not args.resume:
        parser.error(f"--output {target} exists: continue it with --resume, or name another file")
    if target.exists():
        before = read_record(target)
        settings = before["settings"] | settings  # of options that an older record lacks: the defaults
        changed = [name for name, own in before["settings"].items() if settings[name] != asdict(Setting()) | own]
        if changed or before["config"] != config or before["columns"] != list(COLUMNS):
            what = f"another setting {changed[0]!r}" if changed else f"{before['config']}"
            parser.error(f"--resume: {target} was made with {what}; give the same, or name another --output")
        record = before | {"settings": settings, "resumed": [*before.get("resumed", []), made_by]}
    search(record, names, args.seeds, args.fresh, target)


if __name__ == "__main__":
    run_main("lab.bench.regimes", main)
