"""The recorded runs in results/, and how parts of one experiment become one record.

Old and new records merge: an option that a record does not know, because it is newer, counts as its default. What may differ
between parts (seeds, variants, folders, checkpoints) is left out of the comparison.
"""

import json
from pathlib import Path
from statistics import mean

from lab.run.options import FREE, METHOD, NEWER, USES
from lab.run.runs import ROOT, read_lines, read_record
from lab.text.tasks import TASKS, TITLES

RESULTS = ROOT / "results"
# may differ between the parts of one experiment; of METHOD a run's variant tells it
APART = (FREE - {"lrs"}) | USES | {"stages_from", "capacity", "bpr", *METHOD}


def read_all(folder: Path = RESULTS) -> list[dict]:
    """The records of all runs in a folder, by path, each with its own folder's name. Each run has its record's commit and
    command, and the path of its curve. UserError for a damaged one."""
    found = []
    for path in sorted(folder.rglob("results.json")):
        record = read_record(path.parent, "results of")
        made_by = {key: record.get(key) for key in ("commit", "command")}
        curves = [path.parent / f"{run['variant']}-s{run['seed']}.jsonl" for run in record["runs"]]
        runs = [run | made_by | {"curve": curve} for run, curve in zip(record["runs"], curves)]
        found.append(record | {"folder": path.parent.name, "runs": runs})
    return found


def ends_of(run: dict, key: str, layer: int | None = None) -> tuple[float, float] | None:
    """Means over the first and the last tenth of a run's curve, of a value of all layers or of one; of `load`, the busiest
    expert's share. None if the curve has fewer than two lines of it."""
    return ends_in(read_lines(run["curve"]), key, layer)


def ends_in(lines: list[dict], key: str, layer: int | None = None) -> tuple[float, float] | None:
    """The same, of the lines of a curve."""
    rows = lines if layer is None else [line["layers"][layer] for line in lines if line.get("layers")]
    values = [max(row[key]) if key == "load" else row[key] for row in rows if row.get(key) is not None]
    tenth = max(1, len(values) // 10)
    return (mean(values[:tenth]), mean(values[-tenth:])) if len(values) > 1 else None


def busiest(lines: list[dict]) -> float | None:
    """The busiest expert's share of the pairs at the end of a curve, mean over the MoE layers."""
    layers = next((line["layers"] for line in lines if line.get("layers")), [])
    ends = [ends_in(lines, "load", layer) for layer in range(len(layers))]
    return mean(end[1] for end in ends) if ends and all(ends) else None


def key_of(record: dict) -> str:
    """Equal for the parts of one experiment: name and data, and the options that matter."""
    config = {name: value for name, value in (NEWER | record["config"]).items() if name not in APART}
    return json.dumps([record["name"], record.get("data"), config], sort_keys=True)


MODEL = "all-MiniLM-L6-v2"  # of the recorded runs on GLUE
USUAL = {  # options that a title names where they differ from these
    "moe_layers": ("2", "every-second"),
    "experts": ("copy",),
    "experts_from": (None,),
    "train": ("moe",),
    "moe_from": ("stage2",),
    "normalize": (True,),
    "tau": (0.0,),
    "alpha": (0.01,),
    "scenes": (12000,),
    "stage3_steps": (100,),
    "stage3_lr": (None, 5e-4),
    "lr": (None, 1e-4, 2e-4),
}


def unusual(record: dict) -> list[str]:
    """What a title says of a record's options, such as "experts split"."""
    config = record["config"]
    odd = {key: config[key] for key, usual in USUAL.items() if config.get(key, usual[0]) not in usual}
    odd = {key: f"{len(value)} models" if key == "experts_from" else value for key, value in odd.items()}
    return [f"{key.replace('_', ' ')} {value}" for key, value in odd.items()]


def data_name(record: dict, part: bool = True) -> str:
    """How readers know a record's data: the title of the task, with the number of training examples where they are a part
    of it, the toy LVLM, or the record's own name."""
    task = record["name"].partition("-")[0]
    if task not in TITLES:
        return "toy LVLM" if record["name"] == "lvlm-scenes" else record["name"]
    return TITLES[task] + (f" with {record['data']['train']:,} examples" if part and not is_whole(record) else "")


def is_whole(record: dict) -> bool:
    """Whether it was trained on all data of its GLUE task."""
    return record["data"]["train"] == TASKS[record["name"].partition("-")[0]].rows


def probes_of(records: list[dict]) -> dict[str, list[dict]]:
    """The data, and the experts if they are parts -> the probes of saved models that have kappa, as the main loss falls."""
    found: dict[str, list[dict]] = {}
    for record in (one for one in records if one.get("probes")):
        name = data_name(record, part=False)
        name += f", {record['config']['num_experts']} parts" if record["config"].get("experts") == "split" else ""
        for probe in record["probes"]:
            if probe["kappa"] is not None:
                found.setdefault(name, []).append(probe)
    return {name: sorted(probes, key=lambda probe: -probe["loss"]) for name, probes in found.items()}


def merge(records: list[dict]) -> list[dict]:
    """One record per experiment, with the runs, stages, probes, commands and folders of its parts. Each run has as `dense`
    the score of the dense model that it was made from, if it is recorded. A run that occurs again, such as the baseline's at
    a newer commit, is under `repeated`: a list of [first run, run]."""
    merged: dict[str, dict] = {}
    for record in records:
        fresh = record | {"runs": [], "stages": [], "probes": [], "command": [], "folders": [], "repeated": []}
        one = merged.setdefault(key_of(record), fresh)
        first = {(run["variant"], run["seed"], run.get("lr")): run for run in one["runs"]}
        dense = {stage["seed"]: stage["scores"]["score"] for stage in record.get("stages", []) if stage.get("scores")}
        for run in (run | {"dense": dense[run["seed"]]} if run["seed"] in dense else run for run in record["runs"]):
            before = first.get((run["variant"], run["seed"], run.get("lr")))
            (one["repeated"] if before else one["runs"]).append([before, run] if before else run)
        known = {(stage["stage"], stage["seed"]) for stage in one["stages"]}  # a stage that runs share counts once
        one["stages"] = one["stages"] + [s for s in record.get("stages", []) if (s["stage"], s["seed"]) not in known]
        one["probes"] = [*one["probes"], *record.get("probes", [])]
        one["command"] = [*one["command"], record["command"]]
        one["folders"] = [*one["folders"], record.get("folder", record["name"])]
    return list(merged.values())
