"""Everything that a GPU is measured by, in one command: bf16 autocast, random weights, no download.

  python -m lab.bench --all --device cuda              writes results/bench-<name of the GPU>.json
  python -m lab.bench --all --device cpu               the same path at tiny sizes: a rehearsal, not a measurement

Its parts: one MoE layer beside its limit, a dense FFN and transformers' own; a training step of BERT-large with 8 experts
Top-2 in the middle layer; a step of stage III of the toy LVLM; how often the layer makes the CPU wait for the GPU; the tests
that need a GPU. The parts have 7 minutes together: each measures as many rounds as fit into its share, at least 5, and the
record has their number. It is written after each part. A part that fails leaves its reason there, and the others go on.
"""

import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch

import stgc_plus
from lab.bench import layer, step
from lab.bench.measure import WARM, autocast, compare, line_of, measure_steps, write_record
from lab.moe import moefication
from lab.run import runs
from lab.run.cli import Parser, RunFailed, path, printable, say
from lab.vision import instructions, llava, lvlm
from stgc import MoELayer

DTYPE = torch.bfloat16
VARIANTS = {  # by their names in `step`
    "bert": ["dense", "moe", "one pass", "two passes", "one pass, weight gradients"],
    "lvlm": ["moe", "one pass", "two passes"],
}


@dataclass(frozen=True)
class Sizes:
    shapes: tuple[tuple[int, int], ...]  # of the layer: tokens and hidden size
    bert: str  # of `step.SIZES`
    batch: int  # sequences of the BERT
    length: int
    pictures: int  # per step of the toy LVLM; 16 is the script's default
    rounds: int  # at most


GPU = Sizes((*layer.SHAPES, (16384, 1024)), "large", batch=32, length=128, pictures=16, rounds=31)
CPU = Sizes(((64, 64),), "small", batch=2, length=8, pictures=2, rounds=5)


# ---- 1. Parts ----
# Each takes the device, its sizes, and the time on time.perf_counter after which no further round begins.


def measure_layer(device: torch.device, sizes: Sizes, until: float) -> dict:
    """Rows of `layer.compare_layers` by size and kind, each with its share of the time."""
    cases, start, found = list(product(sizes.shapes, layer.KINDS)), time.perf_counter(), {}
    for number, ((tokens, d_model), kind) in enumerate(cases, 1):
        share = start + (until - start) * number / len(cases)
        name = f"{tokens} tokens, hidden size {d_model}, {kind}"
        found[name] = layer.compare_layers(tokens, d_model, kind, sizes.rounds, device, DTYPE, share)
        say("", f"{name}; ratio to the limit", *(line_of(own, row) for own, row in found[name].items()))
    return found


def compare_steps(title: str, build: Callable, names: list[str], device: torch.device, sizes: Sizes, until: float) -> dict:
    """Time and peak memory of the steps that `build` makes by name, as ratios to "moe"."""
    peaks, seconds = measure_steps(build, names, sizes.rounds, device, until)
    rows = compare(seconds, "moe", peaks)
    say("", f"{title}; ratio to moe", *(line_of(name, row) for name, row in rows.items()))
    return rows


def measure_bert(device: torch.device, sizes: Sizes, until: float) -> dict:
    shared = (sizes.bert, step.middle(sizes.bert), sizes.batch, sizes.length, device)
    title = f"{sizes.bert} BERT, MoE in layer {shared[1]}, {sizes.batch} x {sizes.length}"
    build = lambda name: step.Bench(name, *shared, dtype=DTYPE).step  # noqa: E731
    return compare_steps(title, build, VARIANTS["bert"], device, sizes, until)


def measure_lvlm(device: torch.device, sizes: Sizes, until: float) -> dict:
    """Forward, losses and backward of stage III, as toy_lvlm.py's defaults make it, with random weights."""
    length = 256  # --max-length
    args = SimpleNamespace(data=None, scenes=64, test_scenes=3, max_length=length)
    data = lvlm.load_data(args, None, None, llava.Problems(0))
    packs = instructions.make_packs(data.train, data.encoded, data.image_id, length)
    batch = instructions.Collate(data.train, packs, data.pixels, data.pad_id)(range(sizes.pictures))
    batch = {key: value.to(device) for key, value in batch.items() if key not in ("keep", "asked", "rows")}

    def build(name: str) -> Callable[[], None]:
        torch.manual_seed(0)
        model = lvlm.join(lvlm.make_clip(data.tokenizer), lvlm.make_lm(data.tokenizer, length), data)
        model = moefication.moefy(model, moefication.MoESpec("every-second", num_experts=4)).to(device).train()
        for module in model.requires_grad_(False).modules():
            if isinstance(module, MoELayer):
                module.requires_grad_(True)
        watch = stgc_plus.STGC(model, step.VARIANTS[name])

        def take() -> None:
            with autocast(device, DTYPE):
                loss = model(**batch).loss
            watch.loss(loss).backward()
            model.zero_grad()

        return take

    title = f"toy LVLM, stage III, {' x '.join(map(str, batch['input_ids'].shape))} tokens"
    return compare_steps(title, build, VARIANTS["lvlm"], device, sizes, until)


WAITS = ["cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize"]  # of CUDA, and torch's that lead there
WAITS += ["aten::item", "aten::_local_scalar_dense", "aten::nonzero"]


def count_waits(take: Callable[[], object]) -> dict[str, int]:
    """How often each of WAITS is called within a step, after some that warm up; the profiler's own are outside. And how many
    kernels are launched, as a sign that the profiler sees what CUDA is asked for."""
    for _ in range(WARM):
        take()
    with torch.profiler.profile() as profiler, torch.profiler.record_function("the step"):
        take()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
    span = next(event.time_range for event in events if event.name == "the step")
    names = [event.name for event in events if span.start <= event.time_range.start <= span.end]
    return {name: names.count(name) for name in WAITS} | {"launches": sum("LaunchKernel" in name for name in names)}


def find_waits(device: torch.device, sizes: Sizes) -> dict[str, dict[str, int]]:
    """By what runs: the counts of `count_waits`. Beside the layer stgc.py's loop, which does wait, and beside one pass the
    dense model and the MoE without STGC, since transformers' own code may wait as well."""
    tokens, d_model = sizes.shapes[0]
    layers = layer.make_layers(d_model, "plain, biases")
    x_TD = torch.randn(tokens, d_model, device=device)
    steps = {name: layer.make_step(layers[name].to(device), x_TD, DTYPE) for name in ("stgc_plus.Experts", "stgc.Experts")}
    watched = layers["stgc_plus.Experts"]
    watch = stgc_plus.STGC(watched, step.VARIANTS["one pass"])

    def one_pass() -> None:
        with autocast(device, DTYPE):
            loss = watched(x_TD).square().mean()
        watch.loss(loss).backward()
        watched.zero_grad()

    found = {name: count_waits(own) for name, own in steps.items()}
    found["stgc_plus.Experts, one pass"] = count_waits(one_pass)
    for name in ("dense", "moe", "one pass"):
        shared = ("small", step.middle("small"), sizes.batch, sizes.length, device)
        found[f"BERT, {name}"] = count_waits(step.Bench(name, *shared, dtype=DTYPE).step)
    return found


def measure_waits(device: torch.device, sizes: Sizes, until: float) -> dict | None:
    """None on a CPU. RunFailed where the profiler may not look into CUDA."""
    if device.type != "cuda":
        return None
    found = find_waits(device, sizes)
    say("", "calls that wait for the GPU, in a step", *(f"  {name:<30}{counts}" for name, counts in found.items()))
    if not all(counts["launches"] for counts in found.values()):
        raise RunFailed("the profiler sees no kernels here, so nothing is known about waiting")
    return found


def run_tests(device: torch.device, sizes: Sizes, until: float) -> dict:
    """Numbers of the tests marked gpu. RunFailed if they cannot run."""
    files = [file for file in sorted((runs.ROOT / "tests").glob("test_*.py")) if "@pytest.mark.gpu" in file.read_text()]
    if not files:
        raise RunFailed(f"no tests in {runs.ROOT}: run this in a clone of the project")
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(words, cwd=runs.ROOT, capture_output=True, text=True, timeout=max(until - time.perf_counter(), 30))
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode not in (0, 1, 5):  # 5: there is none, as without CUDA
        raise RunFailed(f"pytest: {(done.stderr.strip().splitlines() or [last])[-1]}")
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    say("", f"tests that need a GPU: {last}")
    return {word: counts.get(word, 0) for word in ("passed", "failed", "skipped", "error")}


# ---- 2. All of them ----

PARTS = {  # and their seconds; what one leaves over, or takes more, is the next one's
    "layer": (measure_layer, 120),
    "bert": (measure_bert, 120),
    "lvlm": (measure_lvlm, 60),
    "waits": (measure_waits, 30),
    "tests": (run_tests, 90),
}


def reason_of(error: Exception) -> str:
    """One line, with the place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {printable(error):.300} ({Path(place.filename).name}, line {place.lineno})"


def main() -> None:
    parser = Parser(prog="lab.bench", description=__doc__)
    parser.add_argument("--all", action="store_true", help="all parts; reads only the flags here")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run")
    text = "write the record here as json; default: results/bench-<device>.json"
    parser.add_argument("--output", type=path("new file"), help=text)
    args = parser.parse_args()
    device = runs.make_accelerator(args.device, "fp32").device
    sizes = GPU if device.type == "cuda" else CPU
    name = re.sub("[^a-z0-9]+", "-", runs.environment(device)["device"].lower()).strip("-")
    if not args.output:
        Path("results").mkdir(exist_ok=True)
        args.output = f"results/bench-{name}.json"
    found, seconds, failed, until = {}, {}, [], time.perf_counter()
    for part, (measure, limit) in PARTS.items():
        start, until = time.perf_counter(), until + limit
        try:
            found[part] = measure(device, sizes, until)
        except Exception as error:  # of any kind: time on a GPU is rare, and the other parts do not depend on this one
            found[part] = {"failed": reason_of(error)}
            failed.append(part)
            say("", f"{part} failed: {found[part]['failed']}")
        seconds[part] = time.perf_counter() - start
        config = vars(args) | {"dtype": str(DTYPE), "sizes": asdict(sizes)}
        write_record(args.output, device, config=config, seconds=seconds, **found)
    say("", f"written: {args.output}")
    if failed:
        raise RunFailed(f"{', '.join(failed)} failed, for the reasons in {args.output}")
