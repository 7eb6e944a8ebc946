"""Experiment trackers, such as TensorBoard, wandb and mlflow, through accelerate: a run of the tracker per training run.

`Accelerator.log` writes to the tracker that `start` has started. `finish` ends it, as `Accelerator.end_training` does, but
keeps the process group: the next training run of the command needs it.
"""

from pathlib import Path

import accelerate
from accelerate.tracking import get_available_trackers

from lab.run.cli import UserError
from lab.run.files import claim

PROJECT = "stgc"
NAMES = {"mlflow": "run_name", "swanlab": "experiment_name", "trackio": "name", "wandb": "name"}  # options: a run's name
IDS = {  # of those that can go on in a run: its id, and the options for it
    "mlflow": (lambda run: run.info.run_id, lambda id: {"run_id": id}),
    "wandb": (lambda run: run.id, lambda id: {"id": id, "resume": "allow"}),
}


def check(name: str) -> None:
    """UserError for a tracker whose package is not installed."""
    if name != "none" and name not in map(str, get_available_trackers()):
        raise UserError(f"--report-to {name} needs another package: pip install {name}, or leave it out")


def start(accelerator, folder: Path, name: str, config: dict, step: int, ids: dict[str, str]) -> None:
    """Starts the tracker of an accelerator on a training run, in the main process. `step`: of a stopped run that continues,
    else 0. `ids`: trackers and their runs' ids; a new one is added. Files that the tracker writes to the run folder are
    listed there. UserError if it cannot start."""
    if not (accelerator.log_with and accelerator.is_main_process):
        return
    kind = str(accelerator.log_with[0])
    before = set((folder / kind).rglob("*"))
    accelerator.project_configuration.logging_dir = str(folder / kind)
    options = {NAMES[kind]: f"{folder.name}/{name}"} if kind in NAMES else {}
    if kind == "tensorboard" and step:
        options["purge_step"] = step + 1  # what a killed run wrote after its checkpoint
    if kind == "dvclive":
        options["dir"] = str(folder / kind / name)
    if kind in IDS and kind in ids:
        options |= IDS[kind][1](ids[kind])
    values = {key: value if isinstance(value, int | float | str) else str(value) for key, value in config.items()}
    try:
        project = PROJECT if kind in NAMES else name
        accelerator.init_trackers(project, None if kind in ids or kind == "tensorboard" else values, {kind: options})
        if kind in IDS:
            ids[kind] = IDS[kind][0](accelerator.trackers[-1].tracker)
    except Exception as error:  # a tracker raises anything, such as for a missing key or server
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--report-to {kind} cannot start ({reason:.200}); set it up, or leave it out") from None
    claim(*sorted(path for path in {*(folder / kind).rglob("*")} - before if path.is_file()), made=True)


def finish(accelerator: accelerate.Accelerator) -> None:
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()
