"""What every script does around its training loop: device, progress, checkpoints, and a record that can be checked later.

A run folder holds `results.json` (whole configuration, exact command, commit, versions, one entry per finished run; written
atomically) and one `<run>.jsonl` per run: a line per logged step and one per evaluation. While a run goes on its latest two
checkpoints are in `checkpoints/<run>/`: safetensors and JSON, each a folder that is there as a whole or not at all.

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

ROOT = Path(lab.__file__).resolve().parent.parent  # of the project: wherever in lab/ this file is
RECORD, CHECKPOINTS, STAGES, ENTRIES = "results.json", "checkpoints", "stages", "entries.json"

# ---- 1. Device ----


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
        # split_batches: --batch-size is that of all processes together, so that N of them train as one does
        loaders = DataLoaderConfiguration(split_batches=True)
        return accelerate.Accelerator(cpu=on_cpu, mixed_precision=mixed, dataloader_config=loaders)
    except ValueError as error:
        raise UserError(f"--precision {precision}: {error}") from None


def start(args) -> accelerate.Accelerator:
    """The accelerator that a script's flags ask for, once they are known to fit it. UserError."""
    accelerator = make_accelerator(args.device, args.precision)
    if args.batch_size % accelerator.num_processes:
        raise UserError(f"--batch-size {args.batch_size}: {accelerator.num_processes} processes share it; use a multiple")
    if args.report_to == "tensorboard":
        summary_writer_class()
    return accelerator


def announce(args, device: torch.device, configs: list) -> None:
    """Prints what is compared, and on what; `configs`: an STGCConfig of each of args.variants, None for the dense model."""
    for variant, config in zip(args.variants, configs, strict=True):
        print(f"{variant}: {config or 'the dense model, no MoE'}")
    print(f"device={device} precision={args.precision} threads={torch.get_num_threads()} seeds={args.seeds}")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held: by tensors on a CUDA device since its last reset; else by the whole process since it began, so
    that a later run of a sweep reports what an earlier one took, too."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- 2. Record ----


def read_record(folder: Path, flag: str = "--output-dir") -> dict | None:
    """The record of a run folder; None where there is none. UserError if it is damaged."""
    try:
        return json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {folder}: {RECORD} cannot be read ({error}); name another folder, or --overwrite") from None


def check_folder(folder: Path, config: dict, defaults: dict, free: set[str], overwrite: bool, resume: bool) -> None:
    """Checks that a run of this configuration may write here; writes nothing. UserError otherwise.

    A folder that holds another run is refused, unless that is to be overwritten, or resumed with a configuration that
    differs in the `free` options only (which seeds, which variants): two configurations never share a folder. An option
    that is newer than the record had its default then, see `defaults`.
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
            "(--resume: to go on with it)"
        )
    before = defaults | record.get("config", {})
    other = [name for name in before if name not in free and before[name] != json.loads(json.dumps(config.get(name)))]
    if other:
        flags = ", ".join(f"--{name.replace('_', '-')} {before[name]}" for name in other)
        raise UserError(f"--resume: {folder} was begun with {flags}; give the same, or name another --output-dir")


OWN = {RECORD, CHECKPOINTS, STAGES, ENTRIES, "all_results.json", "curves.png", "comparison.png", "tensorboard"}
OWN_RUN = re.compile(r"[a-z]+(-[a-z]+)*(-lr[\d.e-]+)?-s\d+(\.jsonl|\.png)?")  # curve, pictures and model of one run


def own_files(folder: Path) -> list[Path]:
    """What runs wrote to a folder; nothing where there is neither a record nor a checkpoint of theirs."""
    if not any((folder / name).exists() for name in (RECORD, CHECKPOINTS)):
        return []
    return [path for path in sorted(folder.iterdir()) if path.name in OWN or OWN_RUN.fullmatch(path.name)]


def claim_folder(folder: Path, overwrite: bool, accelerator: accelerate.Accelerator) -> None:
    """Creates the folder once all processes have seen it as it was. `overwrite` removes what an earlier run left."""
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
    """Atomically: a reader sees the old file or the new one, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def git_state() -> tuple[str | None, bool | None]:
    """The commit that made a result, and whether files differed from it. (None, None) outside a git checkout."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:  # installed below another project's checkout
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no", "--", ":!results"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def environment(device: torch.device) -> dict:
    """What made a result: the exact command, commit, versions and machine."""
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
    """The record of one command: `results.json` with an entry per run. Format: README, "The record of a run"."""

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
        """The entry of a finished run (variant, seed, lr), or of a stage before the runs (`to="stages"`)."""
        entries = self.record.get(to, [])
        return next((one for one in entries if all(one.get(name) == value for name, value in key.items())), None)

    def add(self, entry: dict, to: str = "runs") -> None:
        """Adds such an entry."""
        self.record.setdefault(to, []).append(entry)
        self.write()

    def write(self) -> None:
        if self.main:
            write_json(self.folder / RECORD, self.record)


# ---- 3. Log ----


class RunLog:
    """The log of one run: a progress bar on stderr (off where that is no terminal), and a curve as JSON lines.

    A resumed run keeps the first `kept` lines of its curve and counts on from `step`: RunFailed where they are gone.
    `board`: a folder for TensorBoard. Only the main process has lines.
    """

    def __init__(self, path: Path, steps: int, main: bool = True, step: int = 0, kept: int = 0, board: Path | None = None):
        self.lines: list[dict] = read_lines(path, kept) if main and kept else []
        self.file = None
        if main:
            begun = path.with_name(path.name + ".tmp")  # the curve is there as a whole at any moment
            begun.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
            os.replace(begun, path)
            self.file = open(path, "a")
        hidden = None if main else True  # None: where stderr is no terminal
        self.bar = tqdm(total=steps, initial=step, desc=path.stem, dynamic_ncols=True, disable=hidden)
        self.board = summary_writer_class()(str(board)) if board and main else None
        self.main = main

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
        for name, value in line.items() if self.board else ():
            if isinstance(value, float):
                self.board.add_scalar(name, value, line["step"])

    def say(self, **values) -> None:
        """One line on stdout, as `step=200 loss=0.412 conflict=0.07`, above the bar."""
        if self.main:
            self.bar.clear()
            print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()), flush=True)

    def tenths(self, key: str) -> list[float] | None:
        """Mean of a logged value over the first and the last tenth of the training; None where it was never logged."""
        values = [line[key] for line in self.lines if key in line]
        tenth = max(1, len(values) // 10)
        return [sum(part) / tenth for part in (values[:tenth], values[-tenth:])] if values else None

    def close(self) -> None:
        self.bar.close()
        for file in (self.file, self.board):
            if file:
                file.close()


def read_lines(path: Path, count: int) -> list[dict]:
    """The first lines of a curve. RunFailed if it does not have them."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    except (OSError, ValueError) as error:
        raise RunFailed(f"the curve {path} cannot be read ({error}); start anew with --overwrite") from None
    if len(lines) < count:
        raise RunFailed(f"the curve {path} has {len(lines)} lines, its checkpoint {count}; start anew with --overwrite")
    return lines


def summary_writer_class():
    """TensorBoard's writer. UserError where that optional package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--report-to tensorboard needs a package more: pip install tensorboard, or leave it out") from None
    return SummaryWriter


def stats_line(stats: list[dict]) -> dict:
    """STGC's statistics for a curve: means over the MoE layers under their own names, and each layer under `layers`."""
    names = ["balance_loss", "conflict_ratio", "judged_ratio", "consistency", "consistency_std", "conflict_loss"]
    found = {name: [layer[name] for layer in stats if name in layer] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items() if values} | {"layers": stats}


def check_losses(losses: list[torch.Tensor], last_step: int, accelerator: accelerate.Accelerator) -> list[float]:
    """The losses since the last check as numbers, in one transfer: means over the processes. RunFailed names the first step
    whose loss is not finite."""
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
    """Within it Ctrl-C (and SIGTERM) only asks to stop: a step is finished and saved first. A second one ends at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    STEPS = 10  # between the agreements of several processes

    def __init__(self, accelerator: accelerate.Accelerator):
        self.asked, self.accelerator = False, accelerator

    def __enter__(self):
        self.before = [signal.signal(number, self.ask) for number in self.SIGNALS]
        return self

    def __exit__(self, *_):
        for number, handler in zip(self.SIGNALS, self.before, strict=True):
            signal.signal(number, handler)

    def ask(self, *_):
        if self.asked:
            raise Interrupted("at once; --resume goes on from the checkpoint before")
        self.asked = True
        print("stopping after this step, which is saved; once more to stop at once", file=sys.stderr, flush=True)

    def agreed(self, step: int) -> bool:
        """Whether to stop after this step: the same answer in all processes, which get their signals at different times.
        They agree at each tenth step only; step 0 asks for an answer now."""
        if self.accelerator.num_processes == 1 or step % self.STEPS:
            return self.asked and self.accelerator.num_processes == 1
        asked = torch.tensor(float(self.asked), device=self.accelerator.device)
        return self.accelerator.reduce(asked).item() > 0


# ---- 5. Checkpoints ----

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)  # gathers what FSDP has spread


class Checkpoints:
    """The latest two checkpoints of one run, in folder/step-00000123.

    Each has the weights, the optimizer, each process's random numbers and `state.json`: the schedule, whatever the script
    passes, and the SHA-256 of the other files. It is written beside its place and renamed, so that a kill or a full disk
    at any moment leaves the one before.
    """

    def __init__(self, folder: Path, accelerator: accelerate.Accelerator, model, optimizer, schedule):
        self.folder, self.accelerator = folder, accelerator
        self.model, self.optimizer, self.schedule = model, optimizer, schedule

    def save(self, step: int, state: dict) -> None:
        """Writes a checkpoint. `state` must survive JSON. RunFailed where the disk refuses; earlier ones are kept then."""
        target, part = self.folder / f"step-{step:08d}", self.folder / "part"
        weights, optimizer = get_state_dict(self.model, self.optimizer.optimizer, options=WHOLE)  # empty on other processes
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
        self.all_well(step, error)
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
                shutil.rmtree(target, ignore_errors=True)  # one that was found damaged
                os.replace(part, target)
                for old in self.found()[2:]:
                    shutil.rmtree(old)
        except OSError as failure:
            error = failure
        self.all_well(step, error)

    def all_well(self, step: int, error: Exception | None) -> None:
        """RunFailed in all processes where one of them could not write."""
        failed = torch.tensor(float(error is not None), device=self.accelerator.device)
        if self.accelerator.reduce(failed).item() == 0:
            return
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / "part", ignore_errors=True)
        kept = self.found()[0] if self.found() else "no earlier one"
        reason = error or "in another process"
        raise RunFailed(
            f"the checkpoint of step {step} cannot be saved ({reason}); {kept} is kept: free the disk, then add --resume"
        )

    def found(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def load(self) -> dict | None:
        """Restores the newest whole checkpoint, and returns its `state`; None where there is none. Damaged ones are named.

        Call `restore_random` right before the first step: what comes in between may draw numbers.
        """
        for path in self.found():
            try:
                return self.load_one(path)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                if self.accelerator.is_main_process:
                    print(f"damaged checkpoint {path}: {error}; the one before it is used", flush=True)
        return None

    def load_one(self, path: Path) -> dict:
        state = json.loads((path / "state.json").read_text())
        if state.pop("digest") != digest(state):
            raise ValueError("state.json is not what was written")
        for name, expected in state["sha256"].items():
            if sha256(path / name) != expected:
                raise ValueError(f"{name} is not what was written")
        processes = self.accelerator.num_processes
        if state["processes"] != processes:
            raise UserError(f"--resume: {path} is of {state['processes']} processes, these are {processes}; start as many")
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
        """Random numbers go on where the loaded checkpoint left them."""
        torch.set_rng_state(self.random["cpu"])
        if "device" in self.random:
            torch.get_device_module(self.accelerator.device).set_rng_state(self.random["device"])


def remove_checkpoints(folder: Path, accelerator: accelerate.Accelerator) -> None:
    """A run is complete and recorded: its checkpoints go, and the folder of all of them once it is empty."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `target` when all is written. RunFailed where the disk refuses."""
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
    """Tied weights as copies: safetensors refuses tensors that share memory."""
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
