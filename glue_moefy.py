"""Turns a pretrained BERT into a Mixture-of-Experts and fine-tunes it on GLUE tasks, with or without STGC.

  python glue_moefy.py --task rte --toy                        nothing downloaded, a minute or two on a laptop CPU
  python glue_moefy.py --task rte                              BERT-large and RTE from the Hugging Face hub
  python glue_moefy.py --task rte --compare                    the baseline, STGC and the placebo, seed by seed
  python glue_moefy.py --task all --variants dense,none,ce     the paper's five tasks and its table
  python glue_moefy.py --task rte --model DIR --data-dir DIR   local folders instead of the hub
  python glue_moefy.py --task rte ... --resume                 continues a run that was stopped
  accelerate launch --num_processes 2 glue_moefy.py ...        several processes or GPUs

  python glue_moefy.py --predict FILE --run RUN                predictions of a model saved by --save-model
  python glue_moefy.py --inspect RUN                           its routing, token by token; --html FILE: as a page

Output goes to --output-dir: results.json, a curve per run as JSON lines, plots.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lab.run import options
from lab.run.cli import GLUE_WAYS, Parser, RunFailed, UserError, hub_is_reachable, number, path, run_main, say
from lab.text.tasks import HUB, TASKS, TITLES, Task

TOY_SHARED = 40_000  # examples to train on, in time: what --toy does once for all of its runs, see make_film
TOY_DEFAULTS = {"task": "rte", "moe_layers": "2", "epochs": 4, "lr": 2e-4, "max_length": 64, "seeds": [0]}


def make_parser() -> Parser:
    parser = Parser(prog="glue_moefy.py", description=__doc__)
    # what
    parser.add_argument("--task", choices=[*TASKS, "all"], help="GLUE task; all: the paper's five and its table")
    shown = {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in TOY_DEFAULTS.items()}
    toys = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in shown.items())
    text = f"tiny BERT and generated sentence pairs, nothing downloaded; also trains the baseline; other defaults: {toys}"
    parser.add_argument("--toy", action="store_true", help=text)
    text = "hub name or folder of a BERT-like encoder"
    parser.add_argument("--model", type=path("model"), default="google-bert/bert-large-cased", help=text)
    text = f"folder with <task>/train-*.parquet, as on the hub; default: {HUB} of the hub"
    parser.add_argument("--data-dir", type=path("folder"), help=text)
    options.add_compare(parser)
    # Mixture-of-Experts
    options.add_moe(parser, num_experts=8, layers="10", router="cosine")
    text = "dense models of --model's shape whose FFNs the experts copy in turn, instead of --model's: experts trained apart"
    parser.add_argument("--experts-from", type=path("model"), nargs="+", metavar="MODEL", help=text)
    margin = "on CoLA 0.1 leaves 4 %% of the margin, 0.01 a fifth, 0.001 two thirds; the paper's 1 wrecks small models"
    options.add_method(parser, beta=0.1, why_beta=margin)
    # training
    parser.add_argument("--epochs", type=number(int, 1, 10**6), help="at most, see --patience; default: 10, large tasks 3")
    parser.add_argument("--patience", type=number(int, 0), default=3, help="stop after more epochs without gain on dev")
    parser.add_argument("--batch-size", type=number(int, 1), default=32, help="sentence pairs per step, over all processes")
    parser.add_argument("--lr", type=number(float, 0), default=3e-5, help="peak of AdamW's rate; falls linearly, no warm-up")
    text = "several rates instead of --lr, one run each; `best` selects on dev"
    parser.add_argument("--lrs", type=number(float, 0), nargs="+", help=text)
    parser.add_argument("--seeds", type=number(int, 0, 10**6), nargs="+", default=[0, 1, 2], help="one full run each")
    parser.add_argument("--max-length", type=number(int, 4), default=128, help="tokens per pair; longer ones are cut")
    parser.add_argument("--max-train-samples", type=number(int, 1), help="use the first n training examples")
    parser.add_argument("--max-eval-samples", type=number(int, 1), help="use the first n dev examples")
    # run
    options.add_run(parser, "runs/<task>-<variant>; with --toy, for the baseline and STGC, runs/toy-rte", films="with --toy")
    parser.add_argument("--save-model", action="store_true", help="keep each run's last model, as model-<variant>-s<seed>")
    # use of a saved model
    file, folder = {"type": path("file"), "metavar": "FILE"}, path("folder")
    parser.add_argument("--predict", **file, help="csv, tsv, jsonl or parquet with the task's sentences; needs --run")
    parser.add_argument("--run", type=folder, help="folder of a run with --save-model, or of a model in it, for --predict")
    parser.add_argument("--output", type=path("new file"), help="of --predict; default: <name>.predictions.<ending>")
    parser.add_argument("--inspect", type=folder, metavar="RUN", help="print experts and conflicts of examples by token")
    options.add_page(parser)
    return parser


def parse(argv: list[str]):
    """The options, checked as far as possible without loading anything. `args.variants` is the list of variants to train."""
    parser = make_parser()
    if "--toy" in argv:
        parser.set_defaults(**TOY_DEFAULTS)
    args = parser.parse_args(argv)
    if args.predict or args.inspect:
        if args.predict and not args.run:
            parser.error("--predict FILE needs --run RUN (a run with --save-model)")
        use = ("predict", "run", "output") if args.predict else ("inspect", "html", "seed")
        options.refuse_unread(parser, args, f"--{use[0]}", (*use, "device"))
        return args
    if args.task is None:
        parser.error(f"--task is needed: one of {', '.join(TASKS)}, or all")
    for flag in ("run", "output"):
        if getattr(args, flag):
            parser.error(f"--{flag} goes with --predict: leave it out, or add --predict FILE")
    options.check(parser, args)
    options.refuse_page(parser, args)
    check_experts(parser, args)
    args.film = args.toy if args.film is None else args.film
    if args.toy and not args.compare and not args.variants[0].startswith("none"):
        args.variants.insert(0, "none")
    if args.toy and args.task != "rte":
        parser.error(f"--toy makes pairs in the format of rte: use --task rte, or {args.task} without --toy")
    if args.toy and (args.data_dir or args.model != parser.get_default("model")):
        parser.error("--toy makes its own model and data: leave out --model and --data-dir, or leave out --toy")
    if not args.toy:
        if not args.data_dir and Path(HUB).is_dir():  # `datasets` reads it
            args.data_dir = HUB
            say(f"note: the data are read from the folder {HUB} here, not from the hub")
        options.check_model(parser, "--model", args.model, GLUE_WAYS)
        if Path(args.model).is_dir() and not args.data_dir:
            hub_is_reachable(parser)  # sets offline mode for the data, if needed
    return args


def check_experts(parser: Parser, args) -> None:
    """An error where the flags contradict --experts-from."""
    names = args.experts_from
    if not names:
        return
    if args.toy:
        parser.error("--toy makes its own model: leave out --experts-from, or leave out --toy")
    if args.experts != "copy" or args.router == "dynmoe":
        flag = "--experts split" if args.experts != "copy" else "--router dynmoe"
        parser.error(f"--experts-from copies whole FFNs to a fixed number of experts: leave it out, or {flag}")
    if len(names) > args.num_experts:
        fault = f"--experts-from names {len(names)} models for {args.num_experts} experts"
        parser.error(f"{fault}: name fewer, or raise --num-experts")
    for name in names:
        options.check_model(parser, "--experts-from", name, GLUE_WAYS)


def run_key(args, variant: str, lr: float, seed: int) -> str:
    """The name of a run's files."""
    return f"{variant}-lr{lr:g}-s{seed}" if args.lrs else f"{variant}-s{seed}"


if __name__ == "__main__":  # before the heavy imports, so that --help and errors come at once
    ARGS = run_main("glue_moefy.py", lambda: parse(sys.argv[1:]), resumes=False)

# ruff: noqa: E402
from itertools import product

import datasets
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup, set_seed
from transformers.utils import logging

from lab.moe import dynmoe, moefication
from lab.moe.film import Film, affordable, evenly
from lab.report import compare, figures, page
from lab.report.tables import score_rows
from lab.run import hub, runs
from lab.run.training import Training
from lab.text import glue, toy, use
from lab.text.metrics import GlueMetric
from stgc_plus import STGCConfig


@dataclass(frozen=True)
class Job:
    """The values that all runs on one task share."""

    args: object
    name: str  # of the task
    task: Task
    source: glue.Source
    spec: moefication.MoESpec
    others: list[list[moefication.FFN]]  # of --experts-from
    encoded: dict
    card: use.TaskCard  # of the models that are saved
    folder: Path
    accelerator: object
    check: Callable  # of the folder, again
    names: list[str]  # that the runs may write to it


def make_spec(args, config, tokenizer) -> moefication.MoESpec:
    """The MoE spec of the flags. The flags and the tokenizer are checked against the dense model's config. UserError."""
    spec, positions = moefication.spec_of(config, "--model", **options.spec_options(args)), hub.count_positions(config)
    if args.max_length > positions:
        raise UserError(f"--max-length {args.max_length}: the model has {positions} positions; lower it")
    if reason := hub.misfit(config, tokenizer, len(TASKS[args.task].columns)):
        raise UserError(f"--model {args.model}: {reason}; give another checkpoint")
    return spec


def make_config(args, variant: str) -> STGCConfig | None:
    """The STGCConfig of a variant; None for `dense`."""
    chosen = options.variant_options(variant, args)
    return None if chosen is None else STGCConfig(**chosen)


@torch.no_grad()
def evaluate(model, loaders: dict, accelerator, task: Task) -> tuple[dict, float | None]:
    """The task's metrics and the mean loss on dev, and the prediction for all examples of the first split, if it is the same
    for all."""
    model.eval()
    scores, answer = {}, None
    for split, loader in loaders.items():
        metric, answers, losses = GlueMetric(task.metrics, task.also), set(), []
        for batch in loader:
            logits = model(**batch).logits.float()
            predictions = logits.squeeze(-1) if task.num_labels == 1 else logits.argmax(-1)
            loss = F.mse_loss if task.num_labels == 1 else F.cross_entropy
            losses_B = loss(logits.squeeze(-1), batch["labels"], reduction="none")
            predictions, labels, losses_B = accelerator.gather_for_metrics((predictions, batch["labels"], losses_B))
            metric.add_batch(predictions=predictions, references=labels)
            answers |= set(predictions.tolist())
            losses += losses_B.tolist()
        found = metric.compute() | {"dev_loss": sum(losses) / len(losses)}
        scores |= {f"{name}_mm": found[name] for name in task.metrics} if scores else found
        if split == task.dev[0] and len(answers) == 1 < len(loader.dataset):
            (answer,) = answers
    return scores, answer


def train_one(job: Job, variant: str, lr: float, seed: int) -> dict:
    """One run: one variant, one learning rate, one seed. Returns its entry of results.json."""
    args, accelerator = job.args, job.accelerator
    name = run_key(args, variant, lr, seed)
    config = make_config(args, variant)
    set_seed(seed)  # for head, router and dropout; all variants get the same data in the same order
    model = job.source.load_model()
    if config is not None:
        router = "random" if variant == "random" else job.spec.router
        model = moefication.moefy(model, replace(job.spec, seed=seed, router=router), job.others)
    train, dev, order = glue.make_loaders(job.encoded, job.source.tokenizer, args.batch_size)
    steps = args.epochs * len(train)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, fused=accelerator.device.type != "mps")
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    model, optimizer, train, schedule = accelerator.prepare(model, optimizer, train, schedule)
    dev = {split: accelerator.prepare(loader) for split, loader in dev.items()}
    stgc = None if config is None else dynmoe.make_stgc(model, config)
    if accelerator.process_index:  # otherwise all processes would use the same dropout masks
        torch.manual_seed(seed + 1_000_003 * accelerator.process_index)

    film = make_film(job, name, model, config, steps) if args.film and config is not None else None
    run = Training(args, job.folder, name, accelerator, model, optimizer, schedule, steps, stgc, film)
    kept = run.at.kept = {"best": None, "last": None, "waited": 0, "answer": None} | run.at.kept
    with run:
        while run.at.epoch <= args.epochs and kept["waited"] <= args.patience:
            model.train()
            order.manual_seed(1_000_000 * seed + run.at.epoch)
            for batch in run.batches(train):
                main_loss = model(**batch).loss
                loss = stgc.loss(main_loss, grad_scale=run.grad_scale()) if stgc else main_loss
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                dynmoe.adapt(model, run.at.batch + 1, len(train), accelerator.reduce)
                run.step_done(main_loss, len(batch["labels"]) * accelerator.num_processes)
            scores, kept["answer"] = evaluate(model, dev, accelerator, job.task)
            kept["last"] = scores | {"epoch": run.at.epoch}
            gain = kept["best"] is None or scores["score"] > kept["best"]["score"]
            kept |= {"best": kept["last"], "waited": 0} if gain else {"waited": kept["waited"] + 1}  # epochs without gain
            run.epoch_done(scores, task=job.source.name, variant=variant, seed=seed)
    if kept["answer"] is not None and accelerator.is_main_process:
        kind = "the number" if job.task.num_labels == 1 else "class"
        say(f"collapse: {variant}, seed {seed}: every dev example gets {kind} {kept['answer']}; this is not a result")
    if args.save_model:
        save_model(job, name, model)
    return {
        "variant": variant,
        "seed": seed,
        "lr": lr,
        "best": kept["best"],
        "last": kept["last"],
        **run.summary(),
        **dynmoe.summary(model),
        "peak_memory_bytes": runs.peak_memory_bytes(accelerator.device),
        "collapsed": kept["answer"] is not None,
    }


def make_film(job: Job, name: str, model, config: STGCConfig, steps: int) -> Film:
    """The film of a run, on as many training examples as a batch has, or as its training pays for, evenly spread over the
    data. The steps of --toy are a small part of its command: it starts and pretrains in the time of 25 000 examples, and its
    films cost two thirds of what `affordable` reckons with, hence TOY_SHARED. Two runs have whole films, more of them fewer
    moments."""
    train, accelerator, tokenizer = job.encoded["train"], job.accelerator, job.source.tokenizer
    size = job.args.batch_size
    count, moments = affordable(size, steps, job.args.toy * TOY_SHARED // size, options.count_runs(job.args))
    rows = [train[row] for row in evenly(len(train), count)]
    batch = DataCollatorWithPadding(tokenizer)(rows).to(accelerator.device)
    names = job.card.labels or range(job.task.num_labels)
    shown = use.show_texts(tokenizer, batch, job.task.columns, names)
    answer = partial(use.read_answers, names=names, count=len(shown.examples))
    where, main = (job.folder / f"film-{name}", accelerator.unwrap_model(model)), accelerator.is_main_process
    return Film(*where, config, batch, shown, steps, answer, accelerator.autocast, writes=main, count=moments)


def save_model(job: Job, name: str, model) -> None:
    """Writes model-<name>: weights and tokenizer in transformers' format, and the card that --predict and --inspect read."""
    weights = job.accelerator.get_state_dict(model)
    if not job.accelerator.is_main_process:
        return
    with runs.replaced_folder(job.folder / f"model-{name}") as target:
        job.accelerator.unwrap_model(model).save_pretrained(target, state_dict=weights)
        job.source.tokenizer.save_pretrained(target)
        use.write_task_card(target, **vars(job.card))


def make_card(args, task: Task, source: glue.Source) -> use.TaskCard:
    """The card of the models that are saved, made before the training. UserError for data that it refuses."""
    split = source.splits[task.dev[0]]
    examples = [{key: split[i][key] for key in (*task.columns, "label")} for i in range(min(8, len(split)))]
    labels = glue.label_names(source.splits, task)
    try:
        return use.TaskCard(source.name, task.columns, task.num_labels, args.max_length, labels, examples)
    except ValueError as error:
        where = args.data_dir or HUB
        raise UserError(f"--data-dir {where}: a saved model's card would have {error}; rename the classes") from None


def toy_source() -> glue.Source:
    """Generated pairs, and a tiny BERT, pretrained on generated text once and copied for each run."""
    columns = TASKS["rte"].columns
    splits = toy.make_pairs(columns)
    say(f"pretraining a tiny BERT on generated sentences: {toy.STEPS} steps")
    pretrained, tokenizer = toy.pretrain(splits, columns)
    return glue.Source("toy-rte", "toy", pretrained.config, lambda: toy.with_new_head(pretrained), tokenizer, splits)


def summarize(record: dict) -> str:
    """Scores of all variants at the best and at the last epoch, then conflict ratios."""
    lines = [compare.comparison_table(record, "best"), "", compare.comparison_table(record, "last"), ""]
    for row in score_rows(record):
        ratio = f"conflict ratio {row['conflict_ratio']} (first and last tenth of training)"
        lines.append(f"{options.label(row['label'])}: {ratio}")
    return "\n".join(lines + compare.seeds_note(record))


def options_of(args, name: str, folder: Path):
    """The options of one task's runs, as its record keeps them."""
    args = type(args)(**vars(args))
    args.task, args.epochs, args.output_dir = name, args.epochs or TASKS[name].epochs, str(folder)
    return args


def finished(args, name: str, folder: Path) -> dict | None:
    """The record of a task whose runs are all there, made with these options, else None. UserError if it is damaged."""
    keys = product(args.variants, args.lrs or [args.lr], args.seeds)
    wanted = [dict(zip(("variant", "lr", "seed"), key)) for key in keys]
    return runs.finished(folder, vars(options_of(args, name, folder)), vars(make_parser().parse_args([])), wanted)


def prepare(args, name: str, folder: Path, accelerator) -> Job:
    """Loads and checks a task's data, model and folder, before anything is written. UserError."""
    args, task = options_of(args, name, folder), TASKS[name]
    defaults = vars(make_parser().parse_args([]))
    keys = [run_key(args, *key) for key in product(args.variants, args.lrs or [args.lr], args.seeds)]
    names, flags = runs.names_of(keys), (args.overwrite, args.resume)
    check = partial(runs.check_folder, folder, vars(args), defaults, options.FREE, *flags, names)
    check()  # first, since everything else takes longer
    set_seed(args.seeds[0])
    source = toy_source() if args.toy else glue.load_source(name, task, args.model, args.data_dir, partial(make_spec, args))
    spec = make_spec(args, source.config, source.tokenizer)
    others = glue.load_ffns(args.experts_from, spec, source.config)
    limits = {"train": args.max_train_samples, **dict.fromkeys(task.dev, args.max_eval_samples)}
    for split, dataset in source.splits.items():
        source.splits[split] = dataset.select(range(min(len(dataset), limits[split] or len(dataset))))
    if not args.toy:
        source.name = glue.run_name(name, task, *(len(source.splits[split]) for split in ("train", task.dev[0])))
    card = make_card(args, task, source)
    if accelerator.is_main_process:
        glue.print_copies(source.splits, task)
    with accelerator.main_process_first():
        encoded = glue.tokenize(source.splits, task, source.tokenizer, args.max_length)
    return Job(args, name, task, source, spec, others, encoded, card, folder, accelerator, check, names)


def made_from(job: Job) -> dict[str, str]:
    """The digests of what the runs are made from: data, and model."""
    found = {} if job.args.toy else runs.digests_of_model("--model", job.args.model)
    for name in job.args.experts_from or ():
        found |= runs.digests_of_model(f"--experts-from {name}", name)
    splits = job.source.splits.items()
    return found | {f"the data of {split}": glue.digest_of_split(dataset, job.task) for split, dataset in splits}


def run_task(job: Job) -> dict:
    """All runs on one task. Returns the record."""
    # a model that cannot be converted fails here, before anything is written
    model = moefication.moefy(job.source.load_model(), replace(job.spec, split="contiguous"), job.others)
    parameters = moefication.count_parameters(model)
    del model
    with runs.claim_folder(job.folder, job.args.overwrite, job.accelerator, job.check, job.names):
        return train_all(job, parameters)


def train_all(job: Job, parameters: moefication.Parameters) -> dict:
    """The same, in the folder that is ours by now."""
    args, source, folder, accelerator = job.args, job.source, job.folder, job.accelerator
    main = accelerator.is_main_process
    data = {"train": len(job.encoded["train"]), "dev": len(job.encoded[job.task.dev[0]]), "source": source.kind}
    record = runs.RunFolder(folder, source.name, vars(args), data, accelerator, made_from(job))
    if main:
        say(f"{source.name}: {data['train']} train, {data['dev']} dev examples; {'tiny BERT' if args.toy else args.model}")
        million = (parameters.total / 1e6, parameters.active / 1e6)
        say(f"{job.spec}; {'{:.1f} M parameters, {:.1f} M active per token'.format(*million)}")
        if args.experts_from:
            say(f"the experts are, in turn, the FFNs of {', '.join(args.experts_from)}")
        runs.print_settings(args, accelerator.device, [make_config(args, variant) for variant in args.variants])
    for seed in args.seeds:
        for variant in args.variants:
            for lr in args.lrs or [args.lr]:
                key = run_key(args, variant, lr, seed)
                if not record.find(variant=variant, seed=seed, lr=lr):
                    try:
                        record.add(train_one(job, variant, lr, seed))
                    except RunFailed as error:
                        raise RunFailed(f"{error} ({key}; the runs before it are kept)") from None
                    accelerator.free_memory()  # otherwise a sweep would keep every model in memory
                elif main:
                    lost = args.save_model and not (folder / f"model-{key}").is_dir()
                    note = "; its model was not saved, train again with --overwrite to get one" * lost
                    say(f"task={source.name} variant={variant} seed={seed} lr={lr:g}: complete already{note}")
                if main and record.is_newer_than("curves.png"):
                    figures.plot_run(folder, record.record)
                runs.remove_checkpoints(folder / runs.CHECKPOINTS / key, accelerator)
    if main:
        runs.write_json(folder / "all_results.json", all_results(record.record))
        if len(args.variants) > 1:
            figures.plot_comparison(folder, [record.record])
        say("", *summarize(record.record).split("\n"), "", f"written: {folder}/results.json and plots")
        if args.film:
            say(page.write_run(folder))
    return record.record


def all_results(record: dict) -> dict:
    """The last variant at its best learning rate, with the keys of transformers' own GLUE scripts: means over its seeds, at
    the last epoch."""
    variant = record["runs"][-1]["variant"]
    row = next(row for row in compare.select_rows(record, "best") if row.variant == variant)
    found = [run for run in record["runs"] if (run["variant"], run["lr"]) == (variant, row.lr)]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    result = {}
    for key in found[0]["last"]:
        name = "epoch" if key == "epoch" else f"eval_{THEIR_NAMES.get(key, key)}"
        result[name] = mean([run["last"][key] for run in found])
    result |= {"variant": variant, "lr": row.lr, "seeds": sorted(run["seed"] for run in found)}
    result |= {"train_samples": record["data"]["train"], "eval_samples": record["data"]["dev"]}
    return result | {key: mean([run[name] for run in found]) for key, name in TRAIN_KEYS.items()}


THEIR_NAMES = {"dev_loss": "loss", "matthews": "matthews_correlation", "spearman": "spearmanr", "score": "combined_score"}
TRAIN_KEYS = {"train_runtime": "seconds", "train_samples_per_second": "samples_per_second"}


def main(args) -> None:
    logging.set_verbosity_error()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # this script reports errors once
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
    if args.predict or args.inspect:
        device = runs.make_accelerator(args.device, "fp32").device
        look = partial(use.film_of_model, device=device)
        if args.html:
            return say(f"written: {page.inspect(args.inspect, Path(args.html), args.seed, look)}")
        if args.inspect and (args.seed is not None or page.shows_film_alone(args.inspect)):
            return say(*page.describe(args.inspect, args.seed, look).split("\n"))
        if args.inspect:
            return say(*use.inspect(args.inspect, device).split("\n"))
        return say(*use.predict(args.run, args.predict, args.output, device=device).split("\n"))
    accelerator = runs.start(args)
    if args.router == "dynmoe":
        runs.refuse_shards(accelerator, "--router dynmoe changes columns of whole weights")
    names = TITLES if args.task == "all" else [args.task]
    default = "all" if args.task == "all" else f"{'toy-' * args.toy}{args.task}"
    alone = args.toy and not args.compare and args.variants == ["none", "ce"]
    default += "" if alone else f"-{'compare' if args.compare else args.variants[-1]}"
    folder = Path(args.output_dir or f"runs/{default}")
    places = [(name, folder / name if args.task == "all" else folder) for name in names]
    records = [finished(args, *place) for place in places]
    if all(records):
        for (_, own), record in zip(places, records):
            runs.say_finished(own, summarize(record))
        return say_paper_tables(records) if args.task == "all" else None
    jobs = [prepare(args, *place, accelerator) for place in places]
    if args.task != "all":
        run_task(jobs[0])
        return
    runs.refuse_foreign(folder, ["comparison.png"])
    records = [run_task(job) for job in jobs]
    with runs.claim_folder(folder, False, accelerator):
        if not accelerator.is_main_process:
            return
        figures.plot_comparison(folder, records)
        say_paper_tables(records)


def say_paper_tables(records: list[dict]) -> None:
    for select in ("best", "last"):
        say("", *compare.paper_table(records, select).split("\n"))


if __name__ == "__main__":
    run_main("glue_moefy.py", lambda: main(ARGS), resumes=not (ARGS.predict or ARGS.inspect))
