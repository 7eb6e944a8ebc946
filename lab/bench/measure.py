"""Time and memory. All that is compared takes its turn within each round, so that other load affects all of it alike."""

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median

import numpy as np
import torch

from lab.run.files import write_json
from lab.run.runs import environment

WARM, FEWEST = 2, 5  # rounds before the first that counts; that count, also where time is short


def take_turns(
    steps: dict[str, Callable[[], object]], rounds: int, device: torch.device, until: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each step in each round. After `until`, on time.perf_counter, no round begins beyond FEWEST."""
    seconds = {name: [] for name in steps}
    for turn in range(WARM + rounds):
        if turn >= WARM + FEWEST and time.perf_counter() > until:
            break
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if turn >= WARM:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(device: torch.device, dtype: torch.dtype):
    """For the forward; float32 changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def compare(seconds: dict[str, list[float]], base: str, peaks: dict[str, int] | None = None) -> dict[str, dict]:
    """By name: the median time, the median over rounds of its ratio to the base's in the same round, and the 95 % interval
    of this median by bootstrap, which draws as many of the rounds, with repetition, 2000 times; and the number of rounds."""
    rounds = len(seconds[base])
    draws = np.random.default_rng(0).integers(rounds, size=(2000, rounds))
    rows = {}
    for name, own in seconds.items():
        ratios = np.array(own) / np.array(seconds[base])
        low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
        rows[name] = {"seconds": median(own), "ratio": float(np.median(ratios)), "interval": [float(low), float(high)]}
        rows[name]["rounds"] = rounds
        if peaks:
            rows[name] |= {"peak_bytes": peaks[name], "peak_ratio": peaks[name] / peaks[base]}
    return rows


def line_of(name: str, row: dict) -> str:
    """A line of a table, which ends in the ratio of the peak memory where it was measured."""
    (low, high), peak = row["interval"], f"{row['peak_ratio']:>12.3f}x" if "peak_ratio" in row else ""
    return f"  {name:<30}{row['seconds']:>9.4f}s{row['ratio']:>9.3f}x{low:>9.3f} to {high:.3f}{peak}"


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes allocated at once by `work`, on top of what is there already. Exact, not sampled."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in events))  # allocations and frees, in order


def measure_steps(
    build: Callable[[str], Callable], names: Iterable[str], rounds: int, device: torch.device, until: float = math.inf
) -> tuple[dict[str, int], dict[str, list[float]]]:
    """Of the steps that `build` makes by name: the peak of memory while one is built and taken twice, and the seconds of
    `take_turns`."""
    steps = {}

    def build_and_take(name: str) -> None:
        steps[name] = build(name)
        steps[name](), steps[name]()

    peaks = {name: peak_bytes(partial(build_and_take, name), device) for name in names}
    return peaks, take_turns(steps, rounds, device, until)


def write_record(output: str | None, device: torch.device, **content) -> None:
    """Writes what was measured, and on what, as json where --output says so."""
    if output:
        write_json(Path(output), environment(device) | content)
