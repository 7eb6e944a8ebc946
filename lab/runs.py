"""What every script does around its training loop: device, seeds, progress, and a record that can be checked later.

A run folder holds `results.json` (whole configuration, exact command, commit, versions, one entry per run; written
atomically after each run) and one `<variant>-s<seed>.jsonl` per run: a line per logged step and one per evaluation.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import accelerate
import psutil
import torch
from tqdm.auto import tqdm

from lab.cli import RunFailed, UserError

RECORD = "results.json"


def make_accelerator(device: str, precision: str) -> accelerate.Accelerator:
    """The device and precision of a run: `device` is auto | cpu | cuda | mps, `precision` fp32 | bf16 | fp16. UserError."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device != "auto" and not available[device]:
        found = ", ".join(name for name, there in available.items() if there)
        raise UserError(f"--device {device}: this machine has {found}; use one of these, or auto")
    on_cpu = device == "cpu" or not (available["cuda"] or available["mps"])
    if precision == "fp16" and on_cpu:
        raise UserError("--precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    if device == "mps" and available["cuda"]:
        raise UserError("--device mps: accelerate prefers the CUDA device that this machine has; use cuda or cpu")
    mixed = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[precision]
    try:
        return accelerate.Accelerator(cpu=on_cpu, mixed_precision=mixed)
    except ValueError as error:
        raise UserError(f"--precision {precision}: {error}") from None


def claim_folder(folder: Path, overwrite: bool) -> None:
    """Checks that a run may write here, and creates the folder. With `overwrite`, what an earlier run left is removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written ({error.strerror}); name another folder") from None
    ours = [path for pattern in (RECORD, "*-s*.jsonl", "*.png") for path in sorted(folder.glob(pattern))]
    if ours and not overwrite:
        raise UserError(f"--output-dir {folder} holds another run: name another folder, or pass --overwrite to replace it")
    for path in ours:
        path.unlink()


def write_json(path: Path, content: dict) -> None:
    """Atomically: a reader sees the old file or the new one, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def git_state() -> tuple[str | None, bool | None]:
    """The commit that made a result, and whether files differed from it. (None, None) outside a git checkout."""
    here = Path(__file__).resolve().parent.parent

    def git(*words):
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here:
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def environment(device: torch.device) -> dict:
    """What made a result: the exact command, commit, versions and machine."""
    commit, dirty = git_state()
    modules = ("torch", "transformers", "datasets", "accelerate")
    versions = {name: metadata.version(name) for name in modules}
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", module.name] if module else sys.argv[:1]
    return {
        "command": shlex.join(["python", *program, *sys.argv[1:]]),
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version()} | versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


class RunFolder:
    """The record of one command: `results.json` with an entry per run. Format: README, "The record of a run"."""

    def __init__(self, folder: Path, name: str, config: dict, data: dict, accelerator: accelerate.Accelerator):
        self.folder, self.accelerator = folder, accelerator
        self.record = {"name": name} | environment(accelerator.device) | {"config": config, "data": data, "runs": []}

    def add(self, run: dict) -> None:
        """Adds a finished run."""
        self.record["runs"].append(run)
        if self.accelerator.is_main_process:
            write_json(self.folder / RECORD, self.record)


class RunLog:
    """The log of one run: a progress bar on stderr (off where that is no terminal), and a curve as JSON lines."""

    def __init__(self, path: Path, steps: int, title: str, main: bool = True):
        self.file = open(path, "w") if main else None
        self.bar = tqdm(total=steps, desc=title, dynamic_ncols=True, disable=None if main else True)
        self.lines: list[dict] = []
        self.start = time.perf_counter()

    def step(self, line: dict | None = None, **shown: float) -> None:
        """One training step is done; a `line` goes to the curve, `shown` beside the bar."""
        self.bar.update()
        if shown:
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
        if line is not None:
            self.write(line)

    def write(self, line: dict) -> None:
        self.lines.append(line)
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def say(self, **values) -> None:
        """One line on stdout, as `step=200 loss=0.412 conflict=0.07`, above the bar."""
        self.bar.clear()
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()), flush=True)

    def tenths(self, key: str) -> list[float] | None:
        """Mean of a logged value over the first and the last tenth of the training; None where it was never logged."""
        values = [line[key] for line in self.lines if key in line]
        tenth = max(1, len(values) // 10)
        return [sum(part) / tenth for part in (values[:tenth], values[-tenth:])] if values else None

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()


def stats_line(stats: list[dict]) -> dict:
    """STGC's statistics for a curve: means over the MoE layers under their own names, and each layer under `layers`."""
    names = ["balance_loss", "conflict_ratio", "judged_ratio", "consistency", "consistency_std", "conflict_loss"]
    found = {name: [layer[name] for layer in stats if name in layer] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items() if values} | {"layers": stats}


def check_losses(losses: list[torch.Tensor], last_step: int) -> list[float]:
    """The losses since the last check as numbers, in one transfer. RunFailed names the first step that is not finite."""
    values = torch.stack(losses).tolist()
    for step, value in enumerate(values, start=last_step - len(values) + 1):
        if value != value or abs(value) == float("inf"):
            raise RunFailed(
                f"the loss is {value} at step {step}; lower --lr or --beta, or use --precision fp32 (bf16 rather than fp16)"
            )
    return values


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: by tensors on a CUDA device since its last reset, else by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
