"""The training speed of transformers' Trainer and of `glue_moefy.py`, side by side.

  python -m lab.bench.peer --task rte --model DIR --data-dir DIR

Each round runs transformers' Trainer on the dense model and then `glue_moefy.py` for every variant, without evaluation
during training, each in a fresh process. Model, data, batches by length, fused AdamW, schedule, precision and number of
steps are the same. The result is the median over rounds of the ratio of samples per second to the Trainer's.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from lab.run.cli import Parser, RunFailed, number, path, run_main, say
from lab.text.tasks import TASKS


def make_parser() -> Parser:
    parser = Parser(prog="lab.bench.peer", description=__doc__)
    parser.add_argument("--task", choices=list(TASKS), default="rte", help="GLUE task")
    parser.add_argument("--model", type=path("model"), required=True, help="hub name or folder of a BERT-like encoder")
    parser.add_argument("--data-dir", type=path("folder"), help="folder in the hub's layout; default: nyu-mll/glue there")
    parser.add_argument("--moe-layers", default="2", help="as for glue_moefy.py")
    parser.add_argument("--variants", nargs="+", default=["none", "ce", "ce-one"], help="as for glue_moefy.py")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="precision of both")
    parser.add_argument("--max-length", type=number(int, 4), default=128, help="tokens per pair; longer ones are cut")
    parser.add_argument("--samples", type=number(int, 1), default=640, help="training examples of a round, one epoch")
    parser.add_argument("--rounds", type=number(int, 1), default=3, help="rounds; in each, all take turns")
    parser.add_argument("--output", type=path("new file"), help="write the record here as json")
    parser.add_argument("--trainer", action="store_true", help="only one round of the Trainer, in this process")
    return parser


BATCH, RATE = 32, 3e-5  # the defaults of glue_moefy.py


def run_trainer(args) -> float:
    """Samples per second of one epoch of transformers' Trainer."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from lab.text import glue

    task = TASKS[args.task]
    source = glue.load_source(args.task, task, args.model, args.data_dir)
    train = source.splits["train"].select(range(min(args.samples, len(source.splits["train"]))))
    encoded = glue.tokenize({"train": train}, task, source.tokenizer, args.max_length)["train"]
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            weight_decay=0.0,
            max_grad_norm=0.0,  # no clipping, as in glue_moefy.py
            lr_scheduler_type="linear",
            optim="adamw_torch_fused",
            train_sampling_strategy="group_by_length",
            bf16=args.precision == "bf16",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        collate = DataCollatorWithPadding(source.tokenizer)
        trainer = Trainer(source.load_model(), options, train_dataset=encoded, data_collator=collate)
        return trainer.train().metrics["train_samples_per_second"]


def run_child(words: list[str]) -> str:
    """The output of a fresh process. RunFailed with the last line of its stderr."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout


def run_ours(args, variant: str) -> float:
    """Samples per second of one epoch of glue_moefy.py, without evaluation, like the Trainer's number."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "glue_moefy.py", "--task", args.task, "--model", args.model, "--variants", variant]
        words += ["--data-dir", args.data_dir] if args.data_dir else []
        words += ["--moe-layers", args.moe_layers, "--precision", args.precision, "--epochs", "1", "--seeds", "0"]
        words += ["--batch-size", str(BATCH), "--max-length", str(args.max_length), "--lr", str(RATE), "--log-steps", "10"]
        words += ["--max-train-samples", str(args.samples), "--max-eval-samples", "1", "--output-dir", folder]
        run_child(words)
        return json.loads((Path(folder) / "results.json").read_text())["runs"][0]["samples_per_second"]


def main() -> None:
    args = make_parser().parse_args()
    if args.trainer:
        say(json.dumps({"samples_per_second": run_trainer(args)}))
        return
    rounds = []
    for turn in range(args.rounds):
        words = [sys.executable, "-m", "lab.bench.peer", "--trainer", *sys.argv[1:]]
        found = {"Trainer, dense": json.loads(run_child(words).splitlines()[-1])["samples_per_second"]}
        rounds.append(found | {variant: run_ours(args, variant) for variant in args.variants})
        say(f"round {turn + 1}: " + ", ".join(f"{name} {speed:.1f}" for name, speed in rounds[-1].items()))
    ratios = {name: [row[name] / row["Trainer, dense"] for row in rounds] for name in rounds[0]}
    for name, values in ratios.items():
        say(f"{name:<20}{median(row[name] for row in rounds):8.1f} samples/s {median(values):8.3f}x of the Trainer's")
    from lab.bench.measure import write_record
    from lab.run.runs import make_accelerator

    ratio = {name: median(values) for name, values in ratios.items()}
    write_record(args.output, make_accelerator("auto", "fp32").device, config=vars(args), rounds=rounds, ratio=ratio)


if __name__ == "__main__":
    run_main("lab.bench.peer", main, resumes=False)
