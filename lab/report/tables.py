"""Tables in Markdown from records: scores of runs, speed and memory, the toy LVLM. No cell is emphasised, and collapsed runs
stay in the table."""

from pathlib import Path
from statistics import mean, median, stdev

from lab.report.records import merge, unusual
from lab.run.cli import UserError
from lab.run.options import label
from lab.run.reading import read_json
from lab.vision.instructions import KINDS

RENAMED = {"lab.peer": "lab.bench.peer"}  # old name of a module in recorded commands -> its name now


def spread(values: list[float], digits: int = 1) -> str:
    """mean ± sample standard deviation."""
    text = f"{mean(values):.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def score_rows(record: dict) -> list[dict]:
    """One row per variant and learning rate of a record. Scores in %."""
    rows, rates = [], {run["lr"] for run in record["runs"]}
    for variant, lr in dict.fromkeys((run["variant"], run["lr"]) for run in record["runs"]):
        runs = [run for run in record["runs"] if (run["variant"], run["lr"]) == (variant, lr)]
        row = {"variant": variant, "seeds": len(runs), "collapsed": sum(run["collapsed"] for run in runs)}
        row["label"] = f"{variant}, lr {lr:g}" if len(rates) > 1 else variant
        row |= {key: [100 * run[key]["score"] for run in runs] for key in ("best", "last")}
        for key in ("conflict_ratio", "consistency"):
            ends = [run[key] for run in runs if run[key]]
            row[key] = " → ".join(f"{mean(values):.3f}" for values in zip(*ends, strict=True)) if ends else "-"
        row["samples_per_second"] = mean(run["samples_per_second"] for run in runs)
        rows.append(row)
    return rows


def header(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]


def fold(title: str, lines: list[str]) -> list[str]:
    return [f"<details><summary>{title}</summary>", "", *lines, "", "</details>", ""]


def folded(commands: list[str]) -> str:
    """The commands that made a table, in a fold."""
    return "\n".join(fold("the commands", [f"    {one}" for one in commands])[:-1])


def results_table(records: list[dict]) -> str:
    """Markdown: dev scores of recorded runs, and the commands that made them. Comparisons on real data come first. Single
    variants and toys are in a fold."""
    head = header("run", "variant", "best on dev", "last epoch", "conflict ratio", "consistency", "collapsed")
    shown, hidden, commands = [], [], []
    for record in merge(records):
        rows, config = score_rows(record), record["config"]
        for row in rows:
            router = "" if row["variant"] == "dense" else f", {config['router']} router"
            beta = "" if row["variant"] in ("dense", "none") else f", beta {config['beta']:g}"
            name = ", ".join([record["name"], f"{config['epochs']} epoch{'s' * (config['epochs'] > 1)}", *unusual(record)])
            cells = [name, f"{label(row['label'])}{router}{beta}", spread(row["best"]), spread(row["last"])]
            cells += [row["conflict_ratio"], row["consistency"], f"{row['collapsed']} of {row['seeds']}"]
            (shown if len(rows) > 1 and not record["name"].startswith("toy") else hidden).append(f"| {' | '.join(cells)} |")
        commands += record["command"]
    more = [*fold("single variants, and the generated toy", [*head, *hidden])] if hidden else []
    return "\n".join([*(head + shown if shown else []), "", *more, folded(commands)])


def read_bench(path: Path) -> dict:
    """A record of lab.bench, its command with today's names. UserError if it is damaged."""
    try:
        record = read_json(path, command=str)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; restore it") from None
    return record | {"command": " ".join(RENAMED.get(word, word) for word in record["command"].split(" "))}


def bench_table(record: dict) -> str:
    """Markdown: step time and memory relative to the base of the record."""
    what = "95 % interval" if "interval" in next(iter(record["variants"].values())) else "middle half of the rounds"
    lines = header("variant", "step time", what, "peak memory")
    for name, row in record["variants"].items():
        if row is None:
            lines.append(f"| {name} | not installed | - | - |")
            continue
        low, high = row.get("interval") or row["ratio_quartiles"]  # of records of before
        lines.append(f"| {name} | {row['ratio']:.3f}x | {low:.3f} to {high:.3f} | {row['peak_ratio']:.3f}x |")
    return "\n".join([*lines, "", f"    {record['command']}"])


def peer_table(record: dict) -> str:
    """Markdown: samples per second of training, and their ratio to transformers' Trainer."""
    lines = header("loop", "samples per second, median", "against the Trainer, median and each round")
    for name, ratio in record["ratio"].items():
        rounds = ", ".join(f"{row[name] / row['Trainer, dense']:.2f}" for row in record["rounds"])
        lines.append(f"| {name} | {median(row[name] for row in record['rounds']):.1f} | {ratio:.2f}x ({rounds}) |")
    return "\n".join([*lines, "", f"    {record['command']}"])


def lvlm_table(records: list[dict]) -> str:
    """Markdown: exact match of the toy LVLM in %, over seeds: stage II, its blind baselines, then the variants of stage
    III."""
    names = {"score": "all", **{kind: kind for kind in KINDS}, "vqa, clean": "clean vqa"}
    lines = header("in `results/`", "model", "seeds", *names.values())
    for record in merge(records):
        stages = [stage for stage in record["stages"] if stage.get("blind")]
        rows = {"stage II": [stage["scores"] for stage in stages]}
        rows |= {
            f"blind: {how}": [stage["blind"][how] for stage in stages] for how in (stages or [{"blind": {}}])[0]["blind"]
        }
        for run in record["runs"]:
            rows.setdefault(f"stage III, {label(run['variant'])}", []).append(run["last"] | run["where"])
        for model, scores in ((model, scores) for model, scores in rows.items() if scores):
            cells = [spread([100 * own[name] for own in scores]) if name in scores[0] else "-" for name in names]
            folders = ", ".join(dict.fromkeys(record["folders"]))
            lines.append(f"| {folders} | {model} | {len(scores)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", folded([command for record in merge(records) for command in record["command"]])])
