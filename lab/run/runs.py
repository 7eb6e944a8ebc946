"""What every script needs around its training loop: device, progress, checkpoints, and a record that can be checked later.

A run folder holds `results.json`, written atomically: whole configuration, exact command, commit, versions, digests of data
and model, one entry per finished run. It holds one `<run>.jsonl` per run: one line per logged step and one per evaluation.
During a run its latest two checkpoints are in `checkpoints/<run>/`, as safetensors and JSON. A checkpoint is a folder that
is complete or absent. How all of this is written and removed: lab/run/files.py.

  1 Device  2 Record  3 Log  4 Interruptions  5 Checkpoints
"""

import ctypes
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path

import accelerate
import psutil
import torch
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, gather_object
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from tqdm.auto import tqdm

import lab
from lab.run import options, trackers
from lab.run.cli import Interrupted, RunFailed, UserError, layout, report, say
from lab.run.files import RECORD, claim, lock_list, read_list, refuse_foreign, remove, sync, write_json, written
from lab.run.reading import check_kinds, parse_json, read_json

ROOT = Path(lab.__file__).resolve().parent.parent  # of the project, wherever in lab/ this file lies
CHECKPOINTS, STAGES, ENTRIES, PAGE = "checkpoints", "stages", "entries.json", "inspect.html"

# ---- 1. Device ----


def make_accelerator(device: str, precision: str, tracker: str = "none") -> accelerate.Accelerator:
    """An accelerator for `device` (auto, cpu, cuda, mps), `precision` (fp32, bf16, fp16) and `tracker`, see --report-to.
    UserError if they don't fit."""
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
    if on_cpu:
        keep_freed_memory()
    trackers.check(tracker)
    try:
        # split_batches: --batch-size counts all processes together, so that N processes train as one does
        how = {"mixed_precision": mixed, "dataloader_config": DataLoaderConfiguration(split_batches=True)}
        if tracker != "none":  # each run sets a folder of its own
            how |= {"log_with": tracker, "project_config": ProjectConfiguration(logging_dir=".")}
        return accelerate.Accelerator(cpu=on_cpu, **how)
    except ValueError as error:
        raise UserError(f"--precision {precision}: {error}") from None


def keep_freed_memory() -> None:
    """Lets glibc keep up to 2 GiB that a step has freed for the next step. Else it returns large blocks to the system and
    asks for them again, page by page, which takes 5 to 20 % of a step on a CPU. Without glibc nothing happens."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_max = -1, -4  # their numbers in malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)  # large blocks, too, come from what is kept


def start(args) -> accelerate.Accelerator:
    """The accelerator for a script's flags. UserError if the flags do not fit."""
    accelerator = make_accelerator(args.device, args.precision, args.report_to)
    if args.batch_size % accelerator.num_processes:
        raise UserError(f"--batch-size {args.batch_size}: {accelerator.num_processes} processes share it; use a multiple")
    return accelerator


def refuse_shards(accelerator: accelerate.Accelerator, why: str) -> None:
    """UserError where accelerate divides a model's weights among the processes."""
    kind, kinds = accelerator.distributed_type, accelerate.DistributedType
    if kind in (kinds.FSDP, kinds.DEEPSPEED, kinds.MEGATRON_LM):
        raise UserError(f"accelerate is set to {kind.value}, but {why}: use its multi-GPU (DDP) setting")


def print_settings(args, device: torch.device, configs: list) -> None:
    """Prints what is compared and on which device. `configs`: an STGCConfig per entry of args.variants, None for `dense`."""
    rows = [["variant", "conflict loss", "pairs", "passes", "gradients", "tau", "beta", "alpha", "conflicts measured at"]]
    for variant, own in zip(args.variants, configs, strict=True):
        if own is None:
            rows.append([options.label(variant), "no MoE", *["-"] * 7])
            continue
        often = "every step" if own.every == 1 else f"every {own.every} steps"
        pairs, beta = ("-", "-") if own.conflict_loss == "none" else (own.select, f"{own.beta:g}")
        passes, gradients = ("-", "-") if own.conflict_loss == "none" else (own.passes, own.gradients)
        how = [own.conflict_loss, pairs, passes, gradients, f"{own.tau:g}", beta, f"{own.alpha:g}", often]
        rows.append([options.label(variant), *how])
    say("", *layout(rows).split("\n"), "")
    seeds = " ".join(map(str, args.seeds))
    say(f"seeds {seeds}; device {device}, precision {args.precision}, threads {torch.get_num_threads()}")


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

RECORD_KINDS = {"name": str, "config": dict, "data": dict, "runs": list, "made_from": dict | None, "versions": dict | None}
RECORD_KINDS |= {"probes": list | None}
RUN = {"variant": str, "seed": int, "lr": float | int, "best": dict | None, "last": dict, "collapsed": bool}
RUN |= {"limited": list | None, "probe": list | None}
STAGE = {"stage": str, "seed": int, "scores": dict | None, "blind": dict | None}
PROBE = {"model": str, "loss": float, "kappa": float | None, "error": float | None}


def read_record(folder: Path, flag: str = "--output-dir") -> dict | None:
    """The record of a run folder, or None if there is none. UserError if it is damaged or something else."""
    try:
        record = read_json(folder / RECORD, **RECORD_KINDS)
        for key, kinds in (("runs", RUN), ("stages", STAGE), ("resumed", {"versions": dict}), ("probes", PROBE)):
            for entry in record.get(key, []):
                check_kinds(entry, f"one of its {key}", **kinds)
        for scores in (run.get(key) or {} for run in record["runs"] for key in ("best", "last")):
            check_kinds(scores, "a run's score", **dict.fromkeys(scores, float | int))
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{flag} {folder}: {RECORD} cannot be read ({error}); remove it, or name another folder") from None


def check_folder(
    folder: Path, config: dict, defaults: dict, free: set[str], overwrite: bool, resume: bool, names: Iterable[str] = ()
) -> None:
    """Checks that a run of this configuration may write `names` here; writes nothing. UserError otherwise.

    A folder that holds a run is refused unless `overwrite`, or `resume` with a configuration that differs only in the
    `free` options (which seeds, which variants). So two configurations never share a folder. `defaults`: see `other_flags`.
    """
    existing = next((parent for parent in (folder, *folder.parents) if parent.exists()), None)
    if existing is None or not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output-dir {folder}: cannot be written; name another folder")
    record, listed = read_record(folder), read_list(folder)
    if record and overwrite and not listed:
        raise UserError(f"--overwrite: what the old run in {folder} wrote is not listed there: remove it, or name another")
    if record is None and not overwrite and any((folder / name).exists() for name in listed or []):
        raise UserError(f"--output-dir {folder} has parts of a run, no {RECORD}: name another folder, or pass --overwrite")
    if record is None or listed:
        refuse_foreign(folder, names)
    if record is None or overwrite:
        return
    flags = other_flags(record, config, defaults, [name for name in defaults | record["config"] if name not in free])
    if not resume:
        other = other_flags(record, config, defaults, read_options(record, defaults))
        ways = "name another folder, or pass --overwrite to replace it" + " (--resume: to continue it)" * (not flags)
        raise UserError(f"--output-dir {folder} holds {f'a run with {other}' if other else 'this run already'}: {ways}")
    if flags:
        raise UserError(f"--resume: {folder} was started with {flags}; give the same, or name another --output-dir")


def read_options(record: dict, defaults: dict) -> list[str]:
    """The options that say what a folder holds. A free one that an older record does not know says nothing."""
    return sorted((record["config"].keys() | defaults.keys() - options.FREE) - options.UNREAD)


def finished(folder: Path, config: dict, defaults: dict, wanted: Iterable[dict]) -> dict | None:
    """The record of a folder where a command of these options has trained all `wanted` runs (variant, seed, lr), else None.
    `defaults`: see `other_flags`. Data and models are not compared: --resume does that."""
    if config["overwrite"] or config["resume"] or not (record := read_record(folder)):
        return None
    changed = other_flags(record, config, defaults, read_options(record, defaults))
    return None if changed or not all(find_entry(record, **key) for key in wanted) else record


def say_finished(folder: Path, table: str) -> None:
    ways = "--overwrite trains anew, another --output-dir trains beside it"
    say(f"{folder} holds this run, finished with the same options; nothing is trained ({ways})", "", *table.split("\n"))


def find_entry(record: dict, to: str = "runs", **key) -> dict | None:
    """The entry of a finished run (variant, seed, lr), or of a finished stage (`to="stages"`). None if there is none."""
    return next((one for one in record.get(to, []) if all(one.get(name) == value for name, value in key.items())), None)


def other_flags(record: dict, config: dict, defaults: dict, names: Iterable[str]) -> str:
    """The options among `names` that a record has otherwise than `config`, as flags; empty if there is none. An option that
    the record does not know, because it is newer, counts as made with its value in `defaults`."""
    before = defaults | record["config"]
    other = [name for name in names if before.get(name) != json.loads(json.dumps(config.get(name)))]
    text = lambda value: " ".join(map(str, value)) if isinstance(value, list) else value  # noqa: E731
    return ", ".join(f"--{name.replace('_', '-')} {text(before.get(name))}" for name in other)


def names_of(runs: Iterable[str], *more: str, stages: Iterable[str] = ()) -> list[str]:
    """All that a command may write to its folder apart from the record: for each of its runs and stages, and `more`."""
    own = ("{}.jsonl", "model-{}", "sheet-{}.png", "routes-{}.png", f"{CHECKPOINTS}/{{}}", "tensorboard/{}")
    own += ("film-{}.json", "film-{}.safetensors")
    names = [
        "all_results.json",
        "curves.png",
        "comparison.png",
        PAGE,
        *more,
        *(kind.format(run) for run in runs for kind in own),
    ]
    staged = ("{}", "{}.jsonl", f"{CHECKPOINTS}/{{}}", "tensorboard/{}")
    return names + [f"{STAGES}/{kind.format(stage)}" for stage in stages for kind in staged]


def is_anywhere(error: Exception | None, accelerator: accelerate.Accelerator) -> bool:
    """Whether one of the processes has an error. All get the same answer."""
    return bool(accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device)).item())


@contextmanager
def claim_folder(
    folder: Path, overwrite: bool, accelerator, check: Callable = lambda: None, names: Iterable[str] = ()
) -> Iterator[None]:
    """Creates the folder after all processes have checked it, and locks it. `check` is called again, as another process may
    have written there since. `overwrite` removes the files of an earlier run. A run from before the list is taken to have
    written `names`."""
    accelerator.wait_for_everyone()
    with ExitStack() as lock:
        error = None
        try:
            if accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                lock.enter_context(lock_list(folder))
                check()
                if overwrite:
                    remove(folder)
                elif not read_list(folder) and (folder / RECORD).exists():
                    found = [path for name in names for path in (folder / name, *(folder / name).rglob("*"))]
                    claim(*(path for path in (folder / RECORD, *found) if path.is_file()), made=True)
        except OSError as failure:
            error = UserError(f"--output-dir {folder}: cannot be written ({failure.strerror}); name another folder")
        except UserError as failure:
            error = failure
        if is_anywhere(error, accelerator):
            raise error or UserError(f"--output-dir {folder}: see the main process")
        yield


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


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "transformers", "datasets", "accelerate")}


def environment(device: torch.device) -> dict:
    """The exact command, commit, versions and machine that make a result."""
    commit, dirty = git_state()
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", module.name.removesuffix(".__main__")] if module else sys.argv[:1]
    return {
        "command": shlex.join(["python", *program, *sys.argv[1:]]),
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version()} | versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "processes": accelerate.PartialState().num_processes,
    }


class RunFolder:
    """The record of one command: `results.json`, with one entry per run. Its format: docs/guide.md, "The record of a run".
    """

    def __init__(self, folder: Path, name: str, config: dict, data: dict, accelerator, made_from: dict | None = None):
        """`made_from`: digests of the data and of the models, by their names for the user. Others than before: UserError."""
        self.folder, self.main = folder, accelerator.is_main_process
        made_by, before = environment(accelerator.device), read_record(folder)
        if before is None:
            self.record = {"name": name} | made_by | {"config": config, "data": data, "made_from": made_from, "runs": []}
        else:
            self.check_content(before, name, data, made_from or {})
            if self.main:
                self.note_changes(before, made_by)
            resumed = [*before.get("resumed", []), made_by]
            self.record = before | {"config": config, "made_from": made_from, "resumed": resumed}
        self.write()

    def check_content(self, before: dict, name: str, data: dict, made_from: dict) -> None:
        if before["name"] != name or before["data"] != data:
            raise UserError(f"--resume: {self.folder} holds {before['name']} on {before['data']}, not {name} on {data}")
        known = before.get("made_from") or {}
        changed = [what for what in sorted({*known, *made_from}) if known.get(what) != made_from.get(what)] if known else []
        if changed:
            reason = f"{', '.join(changed)} changed since {self.folder} was started"
            raise UserError(f"--resume: {reason}; restore what was there, or name another --output-dir")

    def note_changes(self, before: dict, made_by: dict) -> None:
        """Prints what may change the last digits of the weights, although it is no reason to stop."""
        if not before.get("made_from"):
            say(f"note: {self.folder} has no digests of its data and model: whether they are the same is not checked")
        both, keys = ([before, *before.get("resumed", [])][-1], made_by), ("threads", "device")
        old, new = (one.get("versions", {}) | {key: one.get(key) for key in keys} for one in both)
        other = [f"{key} {new[key]} instead of {old[key]}" for key in new if old.get(key, new[key]) != new[key]]
        if other:
            say(f"note: resumed with {', '.join(other)}: the weights may differ in the last digits")

    def find(self, to: str = "runs", **key) -> dict | None:
        """See `find_entry`."""
        return find_entry(self.record, to, **key)

    def add(self, entry: dict, to: str = "runs") -> None:
        """Adds an entry and writes the record."""
        self.record.setdefault(to, []).append(entry)
        self.write()

    def write(self) -> None:
        if self.main:
            write_json(self.folder / RECORD, self.record)

    def is_newer_than(self, name: str) -> bool:
        """Whether a file of the folder is missing or older than the record, as after a kill between the two."""
        path = self.folder / name
        return not path.exists() or path.stat().st_mtime_ns <= (self.folder / RECORD).stat().st_mtime_ns


def digest_of(*parts) -> str:
    """The SHA-256 of tensors and of other values by their repr."""
    result = hashlib.sha256()
    for part in parts:
        result.update(part.numpy() if isinstance(part, torch.Tensor) else f"{part!r}\n".encode(errors="surrogatepass"))
    return result.hexdigest()


MODEL_FILES = ("*.safetensors", "*.bin", "*config.json", "*.index.json")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")


def digests_of_model(flag: str, name: str) -> dict[str, str]:
    """The digests of the files of a model folder: its weights and config, and its tokenizer; of a hub model the revision."""
    folder = Path(name)
    if not folder.is_dir():
        cached = try_to_load_from_cache(name, "config.json")
        return {f"the revision of {flag}": Path(cached).parent.name} if isinstance(cached, str) else {}
    tokenizer = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    model = {path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()} - tokenizer
    kinds = {f"the weights or config of {flag}": model, f"the tokenizer of {flag}": tokenizer}
    return {kind: digest_of(*((path.name, sha256(path)) for path in sorted(paths))) for kind, paths in kinds.items()}


# ---- 3. Log ----


class RunLog:
    """The log of one run: a progress bar on stderr, if that is a terminal, and a curve as JSON lines.

    A resumed run keeps the first `kept` lines of its curve and continues at `step`. RunFailed if the lines are missing.
    `track` gets the numbers of each line, and their step. Only the main process writes.
    """

    def __init__(
        self, path: Path, steps: int, main: bool = True, step: int = 0, kept: int = 0, track: Callable | None = None
    ):
        self.lines: list[dict] = read_lines(path, kept) if main and kept else []
        self.file = None
        if main:
            with written(path) as new:  # so that a kill never leaves half of the kept lines
                new.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in self.lines))
            self.file = open(path, "a")
        hidden = None if main else True  # None: off if stderr is not a terminal
        self.bar = tqdm(total=steps, initial=step, desc=path.stem, dynamic_ncols=True, disable=hidden)
        self.main, self.track = main, track

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
            self.file.write(json.dumps(line, allow_nan=False) + "\n")
            self.file.flush()
        if self.track:
            self.track({name: value for name, value in line.items() if isinstance(value, float)}, line["step"])

    def sync(self) -> None:
        """Waits until the curve is on the disk, as a checkpoint counts on its lines."""
        if self.file:
            sync(self.file)

    def print_line(self, **values) -> None:
        """Prints one line such as `step=200 loss=0.412 conflict=0.07` on stdout, above the bar."""
        if self.main:
            self.bar.clear()
            say(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()))

    def tenths(self, key: str) -> list[float] | None:
        """Means of a logged value over the first and the last tenth of the training. None if it was never logged."""
        values = [line[key] for line in self.lines if key in line]
        tenth = max(1, len(values) // 10)
        return [sum(part) / tenth for part in (values[:tenth], values[-tenth:])] if values else None

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()


def read_lines(path: Path, count: int | None = None) -> list[dict]:
    """The first `count` lines of a curve, or all. RunFailed if it has fewer, or if one of them is damaged."""
    try:
        lines = [parse_json(line, "one line", step=int) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
        for line in lines:
            check_kinds(line, "one line", **{key: list if key == "layers" else float | int for key in line})
            for layer in line.get("layers", []):
                check_kinds(layer, "one layer of a line", load=list | None)
                if not all(isinstance(share, float | int) for share in layer.get("load", [0.0]) or [None]):
                    raise ValueError("one layer of a line has no valid load")
    except (OSError, ValueError) as error:
        raise RunFailed(f"the curve {path} cannot be read ({error}); start again with --overwrite") from None
    if count and len(lines) < count:
        raise RunFailed(f"the curve {path} has {len(lines)} lines, its checkpoint {count}; start again with --overwrite")
    return lines


def stats_line(stats: list[dict]) -> dict:
    """STGC's finite statistics for a curve: the mean of each over the MoE layers, and each layer's under `layers`."""
    names = ["balance_loss", "conflict_ratio", "judged_ratio", "consistency", "consistency_std", "conflict_loss"]
    names += ["router_margin", "auxiliary_loss", "experts_per_token", "active_experts"]
    stats = [{key: v for key, v in layer.items() if not isinstance(v, float) or math.isfinite(v)} for layer in stats]
    found = {name: [layer[name] for layer in stats if name in layer] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items() if values} | {"layers": stats}


def check_losses(losses: list[torch.Tensor], last_step: int, accelerator: accelerate.Accelerator) -> list[float]:
    """The losses since the last check as numbers, averaged over the processes, in one transfer from the device. RunFailed
    names the first step whose loss is not finite."""
    values = accelerator.reduce(torch.stack(losses), "mean").tolist() if losses else []
    for step, value in enumerate(values, start=last_step - len(values) + 1):
        if not math.isfinite(value):
            ways = "lower the learning rate or --beta, or use --precision fp32 (bf16 rather than fp16)"
            raise RunFailed(f"the loss is {value} at step {step}; {ways}")
    return values


# ---- 4. Interruptions ----


class StopSignal:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a request: the step is finished and saved first. A second one stops at once."""

    STEPS = 10  # several processes agree on stopping every so many steps

    def __init__(self, accelerator: accelerate.Accelerator):
        self.requested, self.accelerator = 0, accelerator  # requested: the signal's number

    def on_signal(self, number: int, _):
        if self.requested:
            raise Interrupted("at once; --resume continues from the last checkpoint", number)
        self.requested = number
        report("stopping after this step, which is saved; a second signal stops at once")

    def should_stop(self, step: int) -> int:
        """The number of the signal to stop for after this step, or 0. All processes get the same answer, although their
        signals arrive at different times: they agree on it at every tenth step. Step 0 makes them agree now."""
        if self.accelerator.num_processes == 1:
            return self.requested
        if step % self.STEPS:
            return 0
        requested = torch.tensor([self.requested], device=self.accelerator.device)
        return self.accelerator.gather(requested).max().item()


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
        weights, optimizer = get_state_dict(self.model, self.optimizer.optimizer, options=WHOLE)  # empty in the others
        random = gather_object([random_state(self.accelerator.device)])
        scaler, error = self.accelerator.scaler, None
        try:
            if self.accelerator.is_main_process:
                self.folder.mkdir(parents=True, exist_ok=True)
                moments = {f"{name}/{key}": one for name, own in optimizer["state"].items() for key, one in own.items()}
                with written(self.folder / f"step-{step:08d}", folder=True) as new:
                    for index, own in enumerate(random):
                        save_file(own, new / f"random-{index}.safetensors")
                    save_file(unshared(weights), new / "model.safetensors")
                    save_file(unshared(moments), new / "optimizer.safetensors")
                    state = {
                        "step": step,
                        "processes": self.accelerator.num_processes,
                        "state": state,
                        "schedule": self.schedule.scheduler.state_dict(),
                        "groups": optimizer["param_groups"],
                        "scaler": scaler.state_dict() if scaler else None,
                        "versions": versions(),
                        "sha256": {path.name: sha256(path) for path in sorted(new.glob("*.safetensors"))},
                    }
                    write_json(new / "state.json", state | {"digest": digest(state)})
                for old in self.newest_first()[2:]:
                    remove(old)
        except (OSError, SafetensorError) as failure:
            error = failure
        if is_anywhere(error, self.accelerator):
            kept, reason = next(iter(self.newest_first()), "no earlier one"), error or "in another process"
            fault = f"the checkpoint of step {step} cannot be saved ({reason}); {kept} is kept"
            raise RunFailed(f"{fault}: free the disk, then add --resume")

    def newest_first(self) -> list[Path]:
        """The checkpoints, newest first."""
        return sorted(self.folder.glob("step-[0-9]*"), reverse=True)

    def load(self) -> dict | None:
        """Restores the newest intact checkpoint and returns its `state`, or None if there is none. Prints the damaged ones.

        Call `restore_random` right before the first step, since the code in between may draw random numbers.
        """
        for path in self.newest_first():
            try:
                return self.load_one(path)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                if self.accelerator.is_main_process:
                    say(f"damaged checkpoint {path}: {error}; using the one before it")
        return None

    def load_one(self, path: Path) -> dict:
        state = read_json(path / "state.json", digest=str, state=dict, sha256=dict)
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
        weights = load_file(path / "model.safetensors")
        self.check_fit(path, weights, moments, state.get("versions", {}))
        states = {"model_state_dict": weights, "optim_state_dict": {"state": moments, "param_groups": state["groups"]}}
        set_state_dict(self.model, self.optimizer.optimizer, **states, options=WHOLE)
        self.schedule.scheduler.load_state_dict(state["schedule"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.random = load_file(path / f"random-{self.accelerator.process_index}.safetensors")
        return state["state"]

    def check_fit(self, path: Path, weights: dict, moments: dict, before: dict) -> None:
        """UserError if the checkpoint has other tensors than the model and the optimizer need."""
        own = {name: value.shape for name, value in get_model_state_dict(self.model).items()}
        found = {name: value.shape for name, value in weights.items()}
        other = [name for name in sorted({*own, *found}) if own.get(name) != found.get(name)]
        for name, values in moments.items():
            other += [f"{key} of {name}" for key, one in values.items() if one.ndim and one.shape != own.get(name)]
        if other:
            now = versions()
            changed = [f"{key} {before[key]}, now {now[key]}" for key in before if before[key] != now.get(key)]
            reason = f"{other[0]} does not fit{'; it was written with ' * bool(changed)}{', '.join(changed)}"
            raise UserError(f"--resume: {path} is of another model: {reason}; use what wrote it, or another --output-dir")

    def restore_random(self) -> None:
        """Sets the random generators to their state in the loaded checkpoint."""
        torch.set_rng_state(self.random["cpu"])
        if "device" in self.random:
            torch.get_device_module(self.accelerator.device).set_rng_state(self.random["device"])


def remove_checkpoints(folder: Path, accelerator: accelerate.Accelerator) -> None:
    """Removes the checkpoints of a recorded run, and the folder of all checkpoints once it is empty."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        remove(folder)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yields a folder to write into. It replaces `target` once everything is written. RunFailed if the disk refuses."""
    try:
        with written(target, folder=True) as new:
            yield new
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"{target} cannot be saved ({error}): free the disk, then add --resume") from None


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states if device.type == "cpu" else states | {"device": torch.get_device_module(device).get_rng_state()}


def unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies tied weights, since safetensors refuses tensors that share memory."""
    first = {tensor.data_ptr(): name for name, tensor in reversed(tensors.items())}
    return {name: one.contiguous() if first[one.data_ptr()] == name else one.clone() for name, one in tensors.items()}


def digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()
