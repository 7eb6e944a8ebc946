"""Turns a pretrained BERT into a Mixture-of-Experts and fine-tunes it on a GLUE task, with or without STGC.

  python glue_moefy.py --task rte --toy                        nothing downloaded, three minutes on a laptop CPU
  python glue_moefy.py --task rte                              BERT-large and RTE from the Hugging Face hub
  python glue_moefy.py --task rte --conflict-loss none         the baseline: the balance loss only
  python glue_moefy.py --task rte --model DIR --data-dir DIR   local folders instead of the hub

The run is written to --output-dir: results.json, a curve per run as JSON lines, a plot.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lab.cli import Parser, UserError, hub_is_reachable, model_is_cached, number, offline_message, run_main


@dataclass(frozen=True)
class Task:
    """One row of GLUE."""

    columns: tuple[str, ...]  # one sentence or two
    num_labels: int
    metrics: tuple[str, ...]  # their mean is the score


TASKS = {"rte": Task(("sentence1", "sentence2"), 2, ("accuracy",))}

TOY_DEFAULTS = {"moe_layers": "2", "epochs": 4, "lr": 2e-4, "max_length": 64, "seeds": [0]}


def make_parser() -> Parser:
    parser = Parser(prog="glue_moefy.py", description=__doc__)
    # what
    parser.add_argument("--task", choices=list(TASKS), required=True, help="GLUE task")
    parser.add_argument("--toy", action="store_true", help="tiny BERT and generated sentence pairs, nothing downloaded")
    parser.add_argument("--model", default="google-bert/bert-large-cased", help="hub name or folder of a BERT-like encoder")
    parser.add_argument("--data-dir", help="folder with <task>/train-*.parquet, as on the hub; default: nyu-mll/glue there")
    # Mixture-of-Experts
    parser.add_argument("--num-experts", type=number(int, 1), default=8, help="experts per MoE layer")
    parser.add_argument("--top-k", type=number(int, 1), default=2, help="experts per token")
    parser.add_argument("--moe-layers", default="10", help="from 0: indices as 1,3,5, or every-second, or all")
    parser.add_argument("--experts", choices=["copy", "split"], default="copy", help="copies of the FFN, or parts of it")
    parser.add_argument(
        "--router",
        choices=["linear", "cosine"],
        default="cosine",
        help="linear: the paper's; cosine: DynMoE's, bounded logits",
    )
    # method; the meaning of each is in stgc.STGCConfig
    parser.add_argument(
        "--conflict-loss", choices=["none", "ce", "mse", "reroute"], default="ce", help="none: the MoE baseline"
    )
    parser.add_argument(
        "--select", choices=["conflict", "random"], default="conflict", help="random: the placebo, as many pairs at random"
    )
    parser.add_argument("--passes", choices=["two", "one"], default="two", help="two: as the paper; one: no extra backward")
    parser.add_argument("--gradients", choices=["bias", "weight"], default="bias", help="token gradients to compare")
    parser.add_argument("--tau", type=number(float, -1.001, 1.001), default=0.0, help="a pair conflicts below this cosine")
    parser.add_argument("--beta", type=number(float, 0), default=1.0, help="weight of the conflict loss")
    parser.add_argument("--alpha", type=number(float, 0), default=0.01, help="weight of the balance loss")
    parser.add_argument("--every", type=number(int, 1), default=1, help="judge the tokens at each k-th step")
    # training
    parser.add_argument("--epochs", type=number(int, 1), default=10, help="at most; see --patience")
    parser.add_argument("--patience", type=number(int, 0), default=3, help="stop after more epochs without gain on dev")
    parser.add_argument("--batch-size", type=number(int, 1), default=32, help="sentence pairs per step, over all processes")
    parser.add_argument("--lr", type=number(float, 0), default=3e-5, help="peak of AdamW's rate; falls linearly, no warm-up")
    parser.add_argument("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2], help="one full run each")
    parser.add_argument("--max-length", type=number(int, 4), default=128, help="tokens per pair; longer ones are cut")
    parser.add_argument("--max-train-samples", type=number(int, 1), help="use the first n training examples")
    parser.add_argument("--max-eval-samples", type=number(int, 1), help="use the first n dev examples")
    # run
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the forward and backward")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: CUDA, MPS or CPU")
    parser.add_argument("--log-steps", type=number(int, 1), default=10, help="write the curve at each n-th step")
    parser.add_argument("--output-dir", help="folder of the run; default: runs/<task>-<variant>")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --output-dir holds")
    parser.add_argument("--save-model", action="store_true", help="keep each run's last model, as model-<variant>-s<seed>")
    return parser


def parse(argv: list[str]):
    """The options, checked as far as they can be without loading anything."""
    parser = make_parser()
    if "--toy" in argv:
        parser.set_defaults(**TOY_DEFAULTS)
    args = parser.parse_args(argv)
    if args.top_k > args.num_experts:
        parser.error(f"--top-k {args.top_k} is above --num-experts {args.num_experts}: lower one or raise the other")
    if args.conflict_loss == "reroute" and args.top_k == args.num_experts:
        parser.error("--conflict-loss reroute needs --top-k below --num-experts: else no expert is left to go to")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: a seed repeated is the same run again; name each once")
    if args.toy and (args.data_dir or args.model != parser.get_default("model")):
        parser.error("--toy makes its own model and data: leave out --model and --data-dir, or leave out --toy")
    for flag, folder in (("--data-dir", args.data_dir), ("--model", args.model if "/" in args.model else None)):
        looks_local = folder and (flag == "--data-dir" or folder.startswith((".", "/", "~")) or folder.count("/") > 1)
        if looks_local and not Path(folder).expanduser().is_dir():
            parser.error(f"{flag} {folder}: no such folder; give an existing one, or leave it out to use the hub")
    local_model = args.toy or Path(args.model).is_dir()
    if not (local_model and (args.toy or args.data_dir)):
        reachable = hub_is_reachable()
        if not (reachable or local_model or model_is_cached(args.model)):
            parser.error(offline_message("the model", args.model))
    return args


def variant_name(conflict_loss: str, args) -> str:
    """Names a run in files and tables: none, ce, mse, reroute, placebo; -one for one pass, -weight for weight gradients."""
    name = conflict_loss
    if args.select == "random" and name != "none":
        name = "placebo" if name == "ce" else f"placebo-{name}"
    return name + ("-one" if args.passes == "one" else "") + ("-weight" if args.gradients == "weight" else "")


if __name__ == "__main__":  # before the heavy imports, so that --help and mistakes are answered at once
    ARGS = parse(sys.argv[1:])

# ruff: noqa: E402
import datasets
import torch
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from lab import figures, moefication, toy
from lab.metrics import GlueMetric
from lab.report import score_rows, spread
from lab.runs import RunFolder, RunLog, check_losses, claim_folder, make_accelerator, peak_memory_bytes, stats_line
from stgc import STGC, STGCConfig


@dataclass
class Source:
    """Where a run's model and data come from: the hub, folders, or the toy."""

    name: str  # of the run: rte, or toy-rte
    kind: str  # hub | folder | toy
    config: object  # the dense model's, of transformers
    load_model: Callable[[int], torch.nn.Module]  # seed -> dense classifier
    tokenizer: object
    splits: dict  # train and validation, checked


def from_hub(what: str, flag: str, name: str, load):
    """Runs `load`; where the hub or its cache cannot give `name`, UserError names the ways on."""
    try:
        return load()
    except (OSError, ConnectionError, ValueError) as error:  # the libraries raise all three for "not found" and "offline"
        if os.environ.get("HF_HUB_OFFLINE"):
            raise UserError(offline_message(what, name)) from None
        raise UserError(f"{flag}: {what} {name} cannot be loaded ({str(error).splitlines()[0]})") from None


def load_task(args):
    """The splits train and validation, checked. UserError names what is wrong with them."""
    task = TASKS[args.task]
    if args.data_dir is None:
        where = "nyu-mll/glue"
        dataset = from_hub("the data set", "--data-dir", where, lambda: load_dataset(where, args.task))
    else:
        where = f"--data-dir {args.data_dir}"
        root = Path(args.data_dir).expanduser()
        folder = root / args.task if (root / args.task).is_dir() else root
        files = {split: sorted(map(str, folder.glob(f"{split}-*.parquet"))) for split in ("train", "validation")}
        for split, found in files.items():
            if not found:
                raise UserError(f"{where} has no {args.task}/{split}-*.parquet: lay it out as nyu-mll/glue is on the hub")
        try:
            dataset = {split: load_dataset("parquet", data_files=found, split="train") for split, found in files.items()}
        except (OSError, ValueError, DatasetGenerationError) as error:
            raise UserError(f"{where} is no readable Parquet ({str(error).splitlines()[0]}): fetch it again") from None
    for split in ("train", "validation"):
        missing = [column for column in (*task.columns, "label") if column not in dataset[split].column_names]
        if missing:
            raise UserError(f"{where}: {split} has no column {missing[0]!r}; it needs {', '.join(task.columns)}, label")
        wrong = set(dataset[split]["label"]) - set(range(task.num_labels))
        if wrong:
            raise UserError(f"{where}: {split} has the label {wrong.pop()}; use 0 to {task.num_labels - 1}")
    return {"train": dataset["train"], "validation": dataset["validation"]}


def load_model(args, config_only: bool = False):
    """The dense classifier (its head drawn from the global seed), or only its config."""
    if Path(args.model).is_dir() and not (Path(args.model) / "config.json").is_file():
        raise UserError(f"--model {args.model} has no config.json: give a folder that save_pretrained wrote, or a hub name")
    labels = TASKS[args.task].num_labels
    if config_only:
        return from_hub(
            "the model", "--model", args.model, lambda: AutoConfig.from_pretrained(args.model, num_labels=labels)
        )
    load = partial(AutoModelForSequenceClassification.from_pretrained, args.model, num_labels=labels, dtype=torch.float32)
    return from_hub("the model", "--model", args.model, load)


def make_spec(args, config) -> moefication.MoESpec:
    """What becomes of which layers, checked against the dense model's config."""
    try:
        spec = moefication.MoESpec(args.moe_layers, args.num_experts, args.top_k, args.experts, router=args.router)
        spec = moefication.check_spec(spec, config)
    except ValueError as error:
        flags = (("layers=", "--moe-layers"), ("neurons", "--num-experts"), ("", "--model"))
        raise UserError(f"{next(flag for word, flag in flags if word in str(error))}: {error}") from None
    if args.max_length > config.max_position_embeddings:
        raise UserError(
            f"--max-length {args.max_length}: the model has {config.max_position_embeddings} positions; lower it"
        )
    return spec


def tokenize(splits, task: Task, tokenizer, max_length: int):
    """input_ids, attention_mask, labels (and token_type_ids where the model has them); batches are padded, not this."""

    def encode(rows):
        return tokenizer(*(rows[column] for column in task.columns), truncation=True, max_length=max_length)

    encoded = {}
    for split, dataset in splits.items():
        dataset = dataset.rename_column("label", "labels")
        unused = [column for column in dataset.column_names if column != "labels"]
        encoded[split] = dataset.map(encode, batched=True, remove_columns=unused, desc=f"tokenize {split}")
    return encoded


def make_loaders(args, encoded, tokenizer, seed: int):
    """Train batches of similar length in an order drawn from the seed, dev batches in file order; padded per batch."""
    collate = DataCollatorWithPadding(tokenizer)
    lengths = [len(ids) for ids in encoded["train"]["input_ids"]]
    sampler = LengthGroupedSampler(args.batch_size, lengths=lengths, generator=torch.Generator().manual_seed(seed))
    train = DataLoader(encoded["train"], args.batch_size, sampler=sampler, collate_fn=collate)
    return train, DataLoader(encoded["validation"], 2 * args.batch_size, collate_fn=collate)


@torch.no_grad()
def evaluate(model, loader, accelerator, metric) -> tuple[dict, list[int]]:
    """The task's scores on dev, and the predictions."""
    model.eval()
    everything = []
    for batch in loader:
        predictions = model(**batch).logits.argmax(-1)
        predictions, labels = accelerator.gather_for_metrics((predictions, batch["labels"]))
        metric.add_batch(predictions=predictions, references=labels)
        everything += predictions.tolist()
    return metric.compute(), everything


def train_one(args, seed, variant, config, source, spec, encoded, folder, accelerator) -> dict:
    """One run: one variant, one seed. Returns its entry of results.json; its curve is in <variant>-s<seed>.jsonl."""
    set_seed(seed)  # the head, the router and dropout; a variant sees the same data in the same order
    model = moefication.moefy(source.load_model(seed), replace(spec, seed=seed))
    train, dev = make_loaders(args, encoded, source.tokenizer, seed)
    steps = args.epochs * len(train)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0, fused=accelerator.device.type != "mps")
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    model, optimizer, train, dev, schedule = accelerator.prepare(model, optimizer, train, dev, schedule)
    stgc = STGC(model, config)
    metric = GlueMetric(TASKS[args.task].metrics)
    log = RunLog(folder / f"{variant}-s{seed}.jsonl", steps, f"{variant} seed {seed}", accelerator.is_main_process)
    best = last = None
    losses, step, waited, seconds, samples = [], 0, 0, 0.0, 0
    try:
        for epoch in range(1, args.epochs + 1):
            model.train()
            start = time.perf_counter()
            for batch in train:
                main_loss = model(**batch).loss
                loss = stgc.loss(main_loss, grad_scale=accelerator.scaler.get_scale() if accelerator.scaler else 1.0)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(main_loss.detach())
                samples += len(batch["labels"]) * accelerator.num_processes
                if step % args.log_steps == 0 or step == steps - 1:
                    values = check_losses(losses, step + 1)
                    losses = []
                    line = {"step": step + 1, "epoch": epoch, "loss": sum(values) / len(values)} | stats_line(stgc.stats())
                    log.step(line, loss=line["loss"], conflict=line.get("conflict_ratio", 0.0))
                else:
                    log.step()
                step += 1
            seconds += time.perf_counter() - start
            last, predictions = evaluate(model, dev, accelerator, metric)
            log.write({"step": step, "epoch": epoch} | {f"eval_{name}": value for name, value in last.items()})
            shown = {name: log.lines[-2][name] for name in ("loss", "conflict_ratio") if name in log.lines[-2]}
            log.say(variant=variant, seed=seed, epoch=epoch, step=step, **shown, **last)
            waited = 0 if best is None or last["score"] > best["score"] else waited + 1
            best = last | {"epoch": epoch} if waited == 0 else best
            if waited > args.patience:
                break
    finally:
        log.close()
        stgc.detach()
    collapsed = len(set(predictions)) == 1
    if collapsed:
        print(f"collapse: {variant}, seed {seed}: every dev example gets class {predictions[0]}; this score is no result")
    if args.save_model and accelerator.is_main_process:
        target = folder / f"model-{variant}-s{seed}"
        accelerator.unwrap_model(model).save_pretrained(target)
        source.tokenizer.save_pretrained(target)
    return {
        "variant": variant,
        "seed": seed,
        "lr": args.lr,
        "best": best,
        "last": last | {"epoch": epoch},
        "conflict_ratio": log.tenths("conflict_ratio"),
        "consistency": log.tenths("consistency"),
        "seconds": round(seconds, 2),
        "samples_per_second": round(samples / seconds, 2),
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
        "collapsed": collapsed,
    }


def real_source(args) -> Source:
    config = load_model(args, config_only=True)
    tokenizer = from_hub("the tokenizer", "--model", args.model, lambda: AutoTokenizer.from_pretrained(args.model))
    kind = "folder" if args.data_dir else "hub"
    return Source(args.task, kind, config, lambda seed: load_model(args), tokenizer, load_task(args))


def toy_source(args) -> Source:
    """Generated pairs, and a tiny BERT that is pretrained on generated text once and copied for each run."""
    columns = TASKS[args.task].columns
    splits = toy.make_pairs(columns)
    pretrained, tokenizer = toy.pretrain(splits, columns)
    load = lambda seed: toy.with_new_head(pretrained)  # noqa: E731
    return Source(f"toy-{args.task}", "toy", pretrained.config, load, tokenizer, splits)


def summarize(record: dict) -> str:
    """A table for the terminal: a row per variant, mean ± standard deviation over its seeds, in %."""
    lines = [f"{'variant':<16}{'best on dev':>16}{'last epoch':>16}{'conflict ratio':>20}{'samples/s':>11}  seeds"]
    for row in score_rows(record):
        note = f", {row['collapsed']} collapsed" if row["collapsed"] else ""
        lines.append(
            f"{row['variant']:<16}{spread(row['best']):>16}{spread(row['last']):>16}{row['conflict_ratio']:>20}"
            f"{row['samples_per_second']:>11.1f}  {row['seeds']}{note}"
        )
    return "\n".join(lines)


def main(args) -> None:
    logging.set_verbosity_error()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails is said once, by us
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
    accelerator = make_accelerator(args.device, args.precision)
    method = STGCConfig(
        args.conflict_loss, args.alpha, args.beta, args.tau, args.passes, args.gradients, args.select, args.every
    )
    # the baseline measures its conflicts at logged steps only: it owes the method no extra backward
    baseline = replace(method, conflict_loss="none", select="conflict", every=args.log_steps)
    variants = {variant_name("none", args): baseline} if args.toy or args.conflict_loss == "none" else {}
    if args.conflict_loss != "none":
        variants[variant_name(args.conflict_loss, args)] = method

    set_seed(args.seeds[0])
    source = toy_source(args) if args.toy else real_source(args)
    spec = make_spec(args, source.config)
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    splits = source.splits
    splits = {name: split.select(range(min(len(split), limits[name] or len(split)))) for name, split in splits.items()}
    encoded = tokenize(splits, TASKS[args.task], source.tokenizer, args.max_length)

    folder = Path(args.output_dir or f"runs/{source.name}-{list(variants)[-1]}")
    claim_folder(folder, args.overwrite)
    data = {"train": len(splits["train"]), "dev": len(splits["validation"]), "source": source.kind}
    record = RunFolder(folder, source.name, vars(args) | {"output_dir": str(folder)}, data, accelerator)
    print(f"{source.name}: {data['train']} train, {data['dev']} dev examples; {'tiny BERT' if args.toy else args.model}")
    print(f"{spec}\n{method}")
    with torch.device("meta"):  # shapes only
        shapes = AutoModelForSequenceClassification.from_config(source.config)
        parameters = moefication.count_parameters(moefication.moefy(shapes, replace(spec, split="contiguous")))
    print(f"parameters: {parameters.total / 1e6:.1f} M in all, {parameters.active / 1e6:.1f} M active per token")
    print(f"device={accelerator.device} precision={args.precision} threads={torch.get_num_threads()} seeds={args.seeds}")
    for seed in args.seeds:
        for variant, config in variants.items():
            run = train_one(args, seed, variant, config, source, spec, encoded, folder, accelerator)
            record.add(run)
            figures.plot_run(folder, source.name)
    print(f"\n{source.name}, mean score in % (± standard deviation over seeds)\n{summarize(record.record)}")
    print(f"\nwritten: {folder}/results.json, {folder}/curves.png")


if __name__ == "__main__":
    run_main("glue_moefy.py", lambda: main(ARGS))
