"""The bookkeeping around a training loop: resume, log, checkpoints, interruptions. The loop itself stays in the script.

    with Training(args, folder, "ce-s0", accelerator, model, optimizer, schedule, steps, stgc) as run:
        while run.at.epoch <= epochs:
            for batch in run.batches(loader):
                main_loss = model(**batch).loss
                accelerator.backward(stgc.loss(main_loss, grad_scale=run.grad_scale()))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                run.step_done(main_loss, samples)
            run.epoch_done()

A run that is killed at any point and resumed gives the same result, bit for bit, as a run that never stopped. This requires
that the order of the batches in an epoch depends on the epoch alone.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lab.run import options, trackers
from lab.run.cli import CONTINUE, Interrupted, RunFailed, UserError, handle_signals, say
from lab.run.runs import CHECKPOINTS, Checkpoints, RunLog, StopSignal, check_losses, stats_line


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon for the matrices and its AdamW for all other parameters: one optimizer, one rate, no weight decay.

    Muon's updates are scaled to the size of AdamW's: torch's "match_rms_adamw", from Moonlight, arXiv:2502.16982.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float, betas: tuple[float, float]):
        muon = torch.optim.Muon(matrices, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, lr, betas, weight_decay=0.0)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.parts = muon, adamw
        self.share_state()

    def share_state(self) -> None:
        """Makes both parts use the groups and state of this object, so schedules and checkpoints see one optimizer."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.share_state()

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


@dataclass
class Progress:
    """How far a run is: the part of a checkpoint that is neither tensors nor random numbers."""

    epoch: int = 1  # the current one
    batch: int = 0  # batches done in it
    step: int = 0
    samples: int = 0
    seconds: float = 0.0  # of training, without evaluation
    losses: list[float] = field(default_factory=list)  # since the last logged step
    lines: int = 0  # of the curve
    stats: list[dict] = field(default_factory=list)  # what STGC.stats() repeats until it measures again
    kept: dict = field(default_factory=dict)  # the script's own values, as JSON: scores so far
    trackers: dict[str, str] = field(default_factory=dict)  # a tracker's name: the id of its run


LONG, FIRST = 3600, 3  # seconds of a training on a CPU that are announced; steps that they are estimated from


class Training:
    """One run of `steps` steps in total, see the module. It reads these flags of lab.run.options.add_run from `args`:
    log_steps, save_steps, resume. It also writes a checkpoint after each epoch. `film`: a lab.moe.film.Film."""

    def __init__(
        self, args, folder: Path, name: str, accelerator, model, optimizer, schedule, steps: int, stgc=None, film=None
    ):
        self.name, self.accelerator, self.stgc, self.film = name, accelerator, stgc, film
        self.steps, self.log_steps, self.save_steps = steps, args.log_steps, args.save_steps
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        if accelerator.scaler:  # all runs of a process share it: reset it for each run
            accelerator.scaler.load_state_dict(torch.amp.GradScaler("cpu").state_dict())
        self.checkpoints = Checkpoints(folder / CHECKPOINTS / name, accelerator, model, optimizer, schedule)
        saved = self.checkpoints.load() if args.resume else None
        try:
            self.at, self.resumed = Progress(**(saved or {})), saved is not None
        except TypeError as error:
            fault = f"the checkpoint of {name} is of another version of this project ({error})"
            raise UserError(f"--resume: {fault}; continue with that version, or start again with --overwrite") from None
        if stgc and self.resumed:
            stgc.step = self.at.step
            stgc.numbers = [{key: torch.tensor(value) for key, value in numbers.items()} for numbers in self.at.stats]
        if film and self.resumed:
            film.load(self.at.step)
        self.start_tracker = partial(trackers.start, accelerator, folder, name, vars(args), self.at.step, self.at.trackers)
        track = accelerator.log if accelerator.log_with else None
        self.log = RunLog(folder / f"{name}.jsonl", steps, accelerator.is_main_process, self.at.step, self.at.lines, track)
        self.losses = [torch.tensor(value, device=accelerator.device) for value in self.at.losses]
        self.stop = StopSignal(accelerator)
        self.began, self.args, self.start = (self.at.step, self.at.seconds), args, time.perf_counter()

    def __enter__(self) -> "Training":
        self.start_tracker()
        self.let_go = handle_signals(self.stop.on_signal)
        return self

    def __exit__(self, *error) -> None:
        self.let_go()
        self.log.close()
        trackers.finish(self.accelerator)
        if self.stgc:
            self.stgc.detach()

    def grad_scale(self) -> float:
        """The loss scale of fp16, which the two-pass mode needs; 1 otherwise."""
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0

    def batches(self, loader: Iterable) -> Iterator[dict]:
        """The remaining batches of the epoch."""
        left = self.accelerator.skip_first_batches(loader, self.at.batch) if self.at.batch else loader
        self.start = time.perf_counter()
        for batch in left:
            if self.resumed:  # after the first batch is made, since making it may draw numbers
                self.checkpoints.restore_random()
                self.resumed = False
            if self.film and self.at.step == 0:
                self.start += self.film.step_done(0, self.grad_scale())
            yield batch
        self.at.seconds += time.perf_counter() - self.start

    def step_done(self, main_loss: torch.Tensor, samples: int) -> None:
        """Logs and saves if this step is due. `samples`: in all processes together. Raises Interrupted after Ctrl-C, once
        everything is saved, and RunFailed for a loss that is not finite."""
        at = self.at
        self.losses.append(main_loss.detach())
        at.step, at.batch, at.samples = at.step + 1, at.batch + 1, at.samples + samples
        if self.film:
            self.start += self.film.step_done(at.step, self.grad_scale())
        due = at.step % self.log_steps == 1 % self.log_steps
        if due or at.step == self.steps:
            values, self.losses = check_losses(self.losses, at.step, self.accelerator), []
            line = {"step": at.step, "epoch": at.epoch, "loss": sum(values) / len(values)}
            if self.stgc and due:  # not at a last step that is not due: the baseline's last measurement would count twice
                line |= stats_line(self.stgc.stats())
            shown = {"conflict": line["conflict_ratio"]} if "conflict_ratio" in line else {}
            self.log.step(line, loss=line["loss"], **shown)
        else:
            self.log.step()
        if at.step == self.began[0] + FIRST:
            self.say_how_long()
        stopped = self.stop.should_stop(at.step)
        if stopped or (self.save_steps and at.step % self.save_steps == 0):
            at.seconds += time.perf_counter() - self.start
            self.save()
            self.start = time.perf_counter()
        if stopped:
            raise Interrupted(f"{self.name} is saved at step {at.step}; {CONTINUE} there", stopped)

    def say_how_long(self) -> None:
        """Says once a command how long a training on a CPU takes, if that is long, and what is faster."""
        seconds = (self.at.seconds + time.perf_counter() - self.start - self.began[1]) / FIRST  # of a step
        left = seconds * (self.steps - self.at.step)
        if left < LONG or self.accelerator.device.type != "cpu" or getattr(self.accelerator, "said_how_long", False):
            return
        self.accelerator.said_how_long = True
        long = f"{left / 3600:.0f} hours" if left < 72 * 3600 else f"{left / 86400:.0f} days"
        count = options.count_runs(self.args)
        rest = f"{self.steps - self.at.step} steps of {seconds:.1f} s, without evaluations"
        toy = "--toy, " if getattr(self.args, "toy", None) is False else ""
        ways = f"the command has {count} run{'s' * (count > 1)}; faster: {toy}a small model, a GPU"
        say(f"note: {self.name} takes about {long} on this CPU ({rest}); {ways}")

    def epoch_done(self, scores: dict | None = None, **shown) -> None:
        """Writes the epoch's scores to the curve and, with `shown`, to the terminal. Then starts the next epoch."""
        at = self.at
        if scores is not None:
            check_losses(self.losses, at.step, self.accelerator)  # a training loss is the earlier sign
            if not torch.tensor([*scores.values()]).isfinite().all():
                raise RunFailed(f"the scores after epoch {at.epoch} are {scores}; lower the learning rate or --beta")
            self.log.write({"step": at.step, "epoch": at.epoch} | {f"eval_{key}": value for key, value in scores.items()})
            shown |= {"epoch": at.epoch, "step": at.step}
            for key in ("loss", "conflict_ratio"):  # the latest value of each
                shown |= next(({key: line[key]} for line in reversed(self.log.lines) if key in line), {})
            self.log.print_line(**shown, **scores)
        at.epoch, at.batch = at.epoch + 1, 0
        self.save()
        if stopped := self.stop.should_stop(0):  # the signal came during the evaluation
            raise Interrupted(f"{self.name} is saved after epoch {at.epoch - 1}; {CONTINUE} there", stopped)

    def save(self) -> None:
        self.at.losses = check_losses(self.losses, self.at.step, self.accelerator)
        self.at.lines = len(self.log.lines)
        if self.stgc:
            self.at.stats = [{k: v.tolist() for k, v in own.items() if v.isfinite().all()} for own in self.stgc.numbers]
        if self.film:
            self.film.save()
        self.log.sync()
        self.checkpoints.save(self.at.step, asdict(self.at))

    def summary(self) -> dict:
        """The values that every run has in results.json. A film adds its probe, see lab.moe.probe.for_record, and its own
        seconds, which `seconds` does not contain."""
        probed = {"probe": self.film.finish(self.at.step, self.grad_scale())} if self.film else {}
        probed |= {"film_seconds": round(self.film.content["seconds"], 2)} if self.film else {}
        mean = self.log.tenths("experts_per_token")  # only DynMoE's router has logged it
        return {
            "conflict_ratio": self.log.tenths("conflict_ratio"),
            "consistency": self.log.tenths("consistency"),
            "router_margin": self.log.tenths("router_margin"),
            "loss": self.log.tenths("loss"),
            "seconds": round(self.at.seconds, 2),
            "samples_per_second": round(self.at.samples / self.at.seconds, 2),
            **({"experts_per_token": mean} if mean else {}),
            **probed,
        }
