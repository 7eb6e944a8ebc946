"""What every script needs around its training loop: device, progress, checkpoints, and a record that can be checked later.

A run folder holds `results.json`, written atomically: whole configuration, exact command, commit, versions, one entry per
finished run. It holds one `<run>.jsonl` per run: one line per logged step and one per evaluation. During a run its latest
two checkpoints are in `checkpoints/<run>/`, as safetensors and JSON. A checkpoint is a folder that is complete or absent.

  1 Device  2 Record  3 Log  4 Interruptions  5 Checkpoints
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import accelerate
import psutil
import torch
from accelerate.utils import DataLoaderConfiguration
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tqdm.auto import tqdm

import lab
from lab.run.cli import Interrupted, RunFailed, UserError

ROOT = Path(lab.__file__).resolve().parent.parent  # of the project, wherever in lab/ this file lies
RECORD, CHECKPOINTS, STAGES, ENTRIES = "results.json", "checkpoints", "stages", "entries.json"

# ---- 1. Device ----


def make_accelerator(device: str, precision: str) -> accelerate.Accelerator:
    """An accelerator for `device` (auto, cpu, cuda, mps) and `precision` (fp32, bf16, fp16). UserError if they don't fit."""
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
        # split_batches: --batch-size counts all processes together, so that N processes train as one does
        loaders = DataLoaderConfiguration(split_batches=True)
        return accelerate.Accelerator(cpu=on_cpu, mixed_precision=mixed, dataloader_config=loaders)
    except ValueError as error:
        raise UserError(f"--precision {precision}: {error}") from None


def start(args) -> accelerate.Accelerator:
    """The accelerator for a script's flags. UserError if the flags do not fit."""
    accelerator = make_accelerator(args.device, args.precision)
    if args.batch_size % accelerator.num_processes:
        raise UserError(f"--batch-size {args.batch_size}: {accelerator.num_processes} processes share it; use a multiple")
    if args.report_to == "tensorboard":
        summary_writer_class()
    return accelerator


def print_settings(args, device: torch.device, configs: list) -> None:
    """Prints what is compared and on which device. `configs`: an STGCConfig per entry of args.variants, None for `dense`."""
    for variant, config in zip(args.variants, configs, strict=True):
        print(f"{variant}: {config or 'the dense model, no MoE'}")
    print(f"device={device} precision={args.precision} threads={torch.get_num_threads()} seeds={args.seeds}")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory: of the tensors on a CUDA device since the last reset, otherwise of the whole process since its start.
    On a CPU a later run of a sweep therefore includes the peak of the earlier ones."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- 2. Record ----


def read_record(folder: Path, flag: str = "--output-dir") -> dict | None:
    """The record of a run folder, or None if there is none. UserError if it is damaged."""
    try:
        return json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {folder}: {RECORD} cannot be read ({error}); name another folder, or --overwrite") from None


def check_folder(folder: Path, config: dict, defaults: dict, free: set[str], overwrite: bool, resume: bool) -> None:
    """Checks that a run of this configuration may write here; writes nothing. UserError otherwise.

    A folder that holds a run is refused unless `overwrite`, or `resume` with a configuration that differs only in the
    `free` options (which seeds, which variants). So two configurations never share a folder. If the record lacks an option,
    because the option is newer, the record counts as made with its value in `defaults`.
    """
    existing = next((parent for parent in (folder, *folder.parents) if parent.exists()), None)
    if existing is None or not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output-dir {folder}: cannot be written; name another folder")
    record = None if overwrite else read_record(folder)
    if record is None and not overwrite and (folder / CHECKPOINTS).is_dir():
        raise UserError(f"--output-dir {folder} has {CHECKPOINTS} but no {RECORD}: name another folder, or pass --overwrite")
    if record is None:
        return
    if not resume:
        raise UserError(
            f"--output-dir {folder} holds another run: name another folder, or pass --overwrite to replace it "
            "(--resume: to continue it)"
        )
    before = defaults | record.get("config", {})
    other = [name for name in before if name not in free and before[name] != json.loads(json.dumps(config.get(name)))]
    if other:
        flags = ", ".join(f"--{name.replace('_', '-')} {before[name]}" for name in other)
        raise UserError(f"--resume: {folder} was started with {flags}; give the same, or name another --output-dir")


OWN = {RECORD, CHECKPOINTS, STAGES, ENTRIES, "all_results.json", "curves.png", "comparison.png", "tensorboard"}
OWN_RUN = re.compile(r"[a-z]+(-[a-z]+)*(-lr[\d.e-]+)?-s\d+(\.jsonl|\.png)?")  # curve, pictures and model of a run


def own_files(folder: Path) -> list[Path]:
    """The files that runs wrote to a folder. Empty if the folder has neither a record nor checkpoints."""
    if not any((folder / name).exists() for name in (RECORD, CHECKPOINTS)):
        return []
    return [path for path in sorted(folder.iterdir()) if path.name in OWN or OWN_RUN.fullmatch(path.name)]


def claim_folder(folder: Path, overwrite: bool, accelerator: accelerate.Accelerator) -> None:
    """Creates the folder after all processes have checked it. `overwrite` removes the files of an earlier run."""
    accelerator.wait_for_everyone()
    try:
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            for path in own_files(folder) if overwrite else []:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written ({error.strerror}); name another folder") from None
    accelerator.wait_for_everyone()


def write_json(path: Path, content: dict) -> None:
    """Writes atomically: a reader finds the old file or the new one, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def git_state() -> tuple[str | None, bool | None]:
    """The commit of the code, and whether files differ from it. (None, None) if the project is not a git checkout."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:  # installed inside another project's checkout
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no", "--", ":!results"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def environment(device: torch.device) -> dict:
    """The exact command, commit, versions and machine that make a result."""
    commit, dirty = git_state()
    modules = ("torch", "transformers", "datasets", "accelerate")
    versions = {name: metadata.version(name) for name in modules}
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", module.name.removesuffix(".__main__")] if module else sys.argv[:1]
    return {
        "command": shlex.join(["python", *program, *sys.argv[1:]]),
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version()} | versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "processes": accelerate.PartialState().num_processes,
    }


class RunFolder:
    """The record of one command: `results.json`, with one entry per run. Its format: README, "The record of a run"."""

    def __init__(self, folder: Path, name: str, config: dict, data: dict, accelerator: accelerate.Accelerator):
        self.folder, self.main = folder, accelerator.is_main_process
        made_by, before = environment(accelerator.device), read_record(folder)
        if before is None:
            self.record = {"name": name} | made_by | {"config": config, "data": data, "runs": []}
        elif before["name"] != name or before["data"] != data:
            raise UserError(f"--resume: {folder} holds {before['name']} on {before['data']}, not {name} on {data}")
        else:
            self.record = before | {"config": config, "resumed": [*before.get("resumed", []), made_by]}
        self.write()

    def find(self, to: str = "runs", **key) -> dict | None:
        """The entry of a finished run (variant, seed, lr), or of a finished stage (`to="stages"`). None if there is none."""
        entries = self.record.get(to, [])
        return next((one for one in entries if all(one.get(name) == value for name, value in key.items())), None)

    def add(self, entry: dict, to: str = "runs") -> None:
        """Adds an entry and writes the record."""
        self.record.setdefault(to, []).append(entry)
        self.write()

    def write(self) -> None:
        if self.main:
            write_json(self.folder / RECORD, self.record)


# ---- 3. Log ----


class RunLog:
    """The log of one run: a progress bar on stderr, if that is a terminal, and a curve as JSON lines.

    A resumed run keeps the first `kept` lines of its curve and continues at `step`. RunFailed if the lines are missing.
    `board`: a folder for TensorBoard. Only the main process writes.
    """

    def __init__(self, path: Path, steps: int, main: bool = True, step: int = 0, kept: int = 0, board: Path | None = None):
        self.lines: list[dict] = read_lines(path, kept) if main and kept else []
        self.file = None
        if main:
            temporary = path.with_name(path.name + ".tmp")  # so that a kill never leaves half of the kept lines
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
            os.replace(temporary, path)
            self.file = open(path, "a")
        hidden = None if main else True  # None: off if stderr is not a terminal
        self.bar = tqdm(total=steps, initial=step, desc=path.stem, dynamic_ncols=True, disable=hidden)
        self.board = summary_writer_class()(str(board)) if board and main else None
        self.main = main

    def step(self, line: dict | None = None, **shown: float) -> None:
        """Counts one training step. `line` is written to the curve, `shown` is printed next to the bar."""
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
        for name, value in line.items() if self.board else ():
            if isinstance(value, float):
                self.board.add_scalar(name, value, line["step"])

    def print_line(self, **values) -> None:
        """Prints one line such as `step=200 loss=0.412 conflict=0.07` on stdout, above the bar."""
        if self.main:
            self.bar.clear()
            print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()), flush=True)

    def tenths(self, key: str) -> list[float] | None:
        """Means of a logged value over the first and the last tenth of the training. None if it was never logged."""
        values = [line[key] for line in self.lines if key in line]
        tenth = max(1, len(values) // 10)
        return [sum(part) / tenth for part in (values[:tenth], values[-tenth:])] if values else None

    def close(self) -> None:
        self.bar.close()
        for file in (self.file, self.board):
            if file:
                file.close()


def read_lines(path: Path, count: int) -> list[dict]:
    """The first `count` lines of a curve. RunFailed if it has fewer."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    except (OSError, ValueError) as error:
        raise RunFailed(f"the curve {path} cannot be read ({error}); start again with --overwrite") from None
    if len(lines) < count:
        raise RunFailed(f"the curve {path} has {len(lines)} lines, its checkpoint {count}; start again with --overwrite")
    return lines


def summary_writer_class():
    """TensorBoard's writer. UserError if that optional package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--report-to tensorboard needs another package: pip install tensorboard, or leave it out") from None
    return SummaryWriter


def stats_line(stats: list[dict]) -> dict:
    """STGC's statistics for a curve: the mean of each over the MoE layers, and the values of each layer under `layers`."""
    names = ["balance_loss", "conflict_ratio", "judged_ratio", "consistency", "consistency_std", "conflict_loss"]
    found = {name: [layer[name] for layer in stats if name in layer] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items() if values} | {"layers": stats}


def check_losses(losses: list[torch.Tensor], last_step: int, accelerator: accelerate.Accelerator) -> list[float]:
    """The losses since the last check as numbers, averaged over the processes, in one transfer from the device. RunFailed
    names the first step whose loss is not finite."""
    values = accelerator.reduce(torch.stack(losses), "mean").tolist() if losses else []
    for step, value in enumerate(values, start=last_step - len(values) + 1):
        if value != value or abs(value) == float("inf"):
            raise RunFailed(
                f"the loss is {value} at step {step}; lower the learning rate or --beta, or use --precision fp32 "
                "(bf16 rather than fp16)"
            )
    return values


# ---- 4. Interruptions ----


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a request: the step is finished and saved first. A second signal stops at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    STEPS = 10  # several processes agree on stopping every so many steps

    def __init__(self, accelerator: accelerate.Accelerator):
        self.requested, self.accelerator = False, accelerator

    def __enter__(self):
        self.before = [signal.signal(number, self.on_signal) for number in self.SIGNALS]
        return self

    def __exit__(self, *_):
        for number, handler in zip(self.SIGNALS, self.before, strict=True):
            signal.signal(number, handler)

    def on_signal(self, *_):
        if self.requested:
            raise Interrupted("at once; --resume continues from the last checkpoint")
        self.requested = True
        print("stopping after this step, which is saved; a second signal stops at once", file=sys.stderr, flush=True)

    def should_stop(self, step: int) -> bool:
        """Whether to stop after this step. All processes get the same answer, although their signals arrive at different
        times: they agree on it at every tenth step. Step 0 makes them agree now."""
        if self.accelerator.num_processes == 1 or step % self.STEPS:
            return self.requested and self.accelerator.num_processes == 1
        requested = torch.tensor(float(self.requested), device=self.accelerator.device)
        return self.accelerator.reduce(requested).item() > 0


# ---- 5. Checkpoints ----

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)  # gathers the shards of FSDP


class Checkpoints:
    """The latest two checkpoints of one run, in folder/step-00000123.

    Each holds the weights, the optimizer's state, the state of each process's random generators, and `state.json`: the
    schedule, the script's own state, and the SHA-256 of the other files. It is written under another name and then renamed,
    so the previous checkpoint survives a kill or a full disk.
    """

    def __init__(self, folder: Path, accelerator: accelerate.Accelerator, model, optimizer, schedule):
        self.folder, self.accelerator = folder, accelerator
        self.model, self.optimizer, self.schedule = model, optimizer, schedule

    def save(self, step: int, state: dict) -> None:
        """Writes a checkpoint. `state` must be JSON. RunFailed if the disk refuses; earlier checkpoints are kept."""
        target, part = self.folder / f"step-{step:08d}", self.folder / "part"
        weights, optimizer = get_state_dict(self.model, self.optimizer.optimizer, options=WHOLE)  # empty in the others
        scaler = self.accelerator.scaler
        main, error = self.accelerator.is_main_process, None
        try:
            part.mkdir(parents=True, exist_ok=True)
            save_file(random_state(self.accelerator.device), part / f"random-{self.accelerator.process_index}.safetensors")
            if main:
                moments = {(name, key): value for name, own in optimizer["state"].items() for key, value in own.items()}
                save_file(unshared(weights), part / "model.safetensors")
                save_file(unshared({"/".join(key): value for key, value in moments.items()}), part / "optimizer.safetensors")
        except (OSError, SafetensorError) as failure:
            error = failure
        self.check_written(step, error)
        try:
            if main:
                state = {
                    "step": step,
                    "processes": self.accelerator.num_processes,
                    "state": state,
                    "schedule": self.schedule.scheduler.state_dict(),
                    "groups": optimizer["param_groups"],
                    "scaler": scaler.state_dict() if scaler else None,
                    "sha256": {path.name: sha256(path) for path in sorted(part.glob("*.safetensors"))},
                }
                write_json(part / "state.json", state | {"digest": digest(state)})
                shutil.rmtree(target, ignore_errors=True)  # it can only be a damaged one
                os.replace(part, target)
                for old in self.newest_first()[2:]:
                    shutil.rmtree(old)
        except OSError as failure:
            error = failure
        self.check_written(step, error)

    def check_written(self, step: int, error: Exception | None) -> None:
        """Raises RunFailed in all processes if one of them could not write."""
        failed = torch.tensor(float(error is not None), device=self.accelerator.device)
        if self.accelerator.reduce(failed).item() == 0:
            return
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / "part", ignore_errors=True)
        kept = self.newest_first()[0] if self.newest_first() else "no earlier one"
        reason = error or "in another process"
        raise RunFailed(
            f"the checkpoint of step {step} cannot be saved ({reason}); {kept} is kept: free the disk, then add --resume"
        )

    def newest_first(self) -> list[Path]:
        """The checkpoints, newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def load(self) -> dict | None:
        """Restores the newest intact checkpoint and returns its `state`, or None if there is none. Prints the damaged ones.

        Call `restore_random` right before the first step, since the code in between may draw random numbers.
        """
        for path in self.newest_first():
            try:
                return self.load_one(path)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                if self.accelerator.is_main_process:
                    print(f"damaged checkpoint {path}: {error}; using the one before it", flush=True)
        return None

    def load_one(self, path: Path) -> dict:
        state = json.loads((path / "state.json").read_text())
        if state.pop("digest") != digest(state):
            raise ValueError("state.json has changed since it was written")
        for name, expected in state["sha256"].items():
            if sha256(path / name) != expected:
                raise ValueError(f"{name} has changed since it was written")
        processes = self.accelerator.num_processes
        if state["processes"] != processes:
            raise UserError(f"--resume: {path} is of {state['processes']} processes, not {processes}; start as many")
        moments: dict[str, dict] = {}
        for name, value in load_file(path / "optimizer.safetensors").items():
            parameter, _, key = name.rpartition("/")
            moments.setdefault(parameter, {})[key] = value
        set_state_dict(
            self.model,
            self.optimizer.optimizer,
            model_state_dict=load_file(path / "model.safetensors"),
            optim_state_dict={"state": moments, "param_groups": state["groups"]},
            options=WHOLE,
        )
        self.schedule.scheduler.load_state_dict(state["schedule"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.random = load_file(path / f"random-{self.accelerator.process_index}.safetensors")
        return state["state"]

    def restore_random(self) -> None:
        """Sets the random generators to their state in the loaded checkpoint."""
        torch.set_rng_state(self.random["cpu"])
        if "device" in self.random:
            torch.get_device_module(self.accelerator.device).set_rng_state(self.random["device"])


def remove_checkpoints(folder: Path, accelerator: accelerate.Accelerator) -> None:
    """Removes the checkpoints of a recorded run, and the folder of all checkpoints once it is empty."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yields a folder to write into. It replaces `target` once everything is written. RunFailed if the disk refuses."""
    part = target.with_name(target.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"{target} cannot be saved ({error}): free the disk, then add --resume") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states if device.type == "cpu" else states | {"device": torch.get_device_module(device).get_rng_state()}


def unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies tied weights, since safetensors refuses tensors that share memory."""
    seen, result = set(), {}
    for name, tensor in tensors.items():
        fresh = tensor.data_ptr() not in seen
        seen.add(tensor.data_ptr())
        result[name] = tensor.contiguous() if fresh else tensor.clone()
    return result


def digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    result = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            result.update(block)
    return result.hexdigest()
