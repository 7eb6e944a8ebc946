"""Flags that the scripts share, and the names of the variants. Standard library only, so that --help answers at once.

A variant is `dense` (no MoE), `random` (no learned router) or a treatment of conflicts. The ending `-one` means one pass,
`-weight` weight gradients.
"""

import re
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from pathlib import Path

from lab.run.cli import Parser, hub_is_reachable, model_is_cached, number, offline_message, path, say

KINDS = "none|ce|mse|reroute|placebo(?:-mse|-reroute)?|flat(?:-mse)?"
VARIANT = re.compile(rf"(dense|random|(?!flat.*-weight)(?:({KINDS})(-one)?(-weight)?))")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
COMPARED = ["none", "ce", "placebo"]
METHOD = ("conflict_loss", "select", "passes", "gradients")  # the flags that a variant's name replaces
# options that may differ when a run is resumed
FREE = {*"seeds variants compare lrs resume overwrite output_dir save_steps save_model report_to film".split()}
# those that may differ when a finished run is only shown again
UNREAD = {*"resume overwrite output_dir save_steps report_to".split()}
TRACKERS = "aim clearml comet_ml dvclive mlflow swanlab tensorboard trackio wandb".split()  # that accelerate knows
# flags that use a trained model, and train nothing
USES = {"inspect", "html", "seed", "predict", "run", "output", "ask", "chat", "image"}
# options that older records do not have, with their defaults
NEWER = {"normalize": True, "lrs": None, "moe_from": "stage2", "max_experts": None, "experts_from": None}


def words(text: str) -> list[str]:
    """An argparse type: `a,b` gives two words."""
    return [word for word in text.split(",") if word]


def add_compare(parser: Parser, more: str = "") -> None:
    parser.add_argument("--compare", action="store_true", help="train several --variants with the same seeds, and compare")
    text = "dense, none, ce, mse, reroute; placebo, placebo-mse, placebo-reroute: on random pairs; flat, flat-mse: on all; "
    text += f"random: experts drawn by dice{more}; endings -one: one pass, -weight: weight gradients"
    text += f"; default of --compare: {','.join(COMPARED)}"
    parser.add_argument("--variants", type=words, nargs="+", help=text)


def add_moe(parser: Parser, num_experts: int, layers: str, router: str) -> None:
    parser.add_argument("--num-experts", type=number(int, 1, 1024), default=num_experts, help="experts per MoE layer")
    text = "experts per token; 1: its weight is 1, so the main loss trains no router unless --no-normalize is given"
    parser.add_argument("--top-k", type=number(int, 1), default=2, help=text)
    text = "the K weights sum to 1; otherwise they are the routing scores"
    parser.add_argument("--normalize", action=BooleanOptionalAction, default=True, help=text)
    parser.add_argument("--moe-layers", default=layers, help="layers from 0: indices such as 1,3,5, or every-second, or all")
    parser.add_argument("--experts", choices=["copy", "split"], default="copy", help="each a copy of the FFN, or a part")
    text = "linear: the paper's; cosine: bounded logits, of DynMoE's baseline; dynmoe: DynMoE's own, any number of"
    text += " experts per token; --alpha then weighs its auxiliary loss, and only random reads --top-k"
    parser.add_argument("--router", choices=["linear", "cosine", "dynmoe"], default=router, help=text)
    text = "of --router dynmoe, which starts with --num-experts of them; default: twice as many"
    parser.add_argument("--max-experts", type=number(int, 1, 2048), help=text)


def spec_options(args) -> dict:
    """The options of a lab.moe.moefication.MoESpec that these flags set."""
    names = ("num_experts", "top_k", "normalize", "experts", "router") + ("max_experts",) * (args.router == "dynmoe")
    return {"layers": args.moe_layers} | {name: getattr(args, name) for name in names}


def add_method(parser: Parser, beta: float, why_beta: str) -> None:
    """Their meaning: see stgc_plus.STGCConfig."""
    losses = ["none", "ce", "mse", "reroute"]
    parser.add_argument("--conflict-loss", choices=losses, default="ce", help="none: the MoE baseline")
    text = "pairs that get the loss; random: the placebo, as many drawn by dice; all: without an extra backward"
    parser.add_argument("--select", choices=["conflict", "random", "all"], default="conflict", help=text)
    parser.add_argument("--passes", choices=["two", "one"], default="two", help="two: the paper's; one: no extra backward")
    parser.add_argument("--gradients", choices=["bias", "weight"], default="bias", help="token gradients to compare")
    parser.add_argument("--tau", type=number(float, -1.001, 1.001), default=0.0, help="a pair conflicts below this cosine")
    text = f"weight of the conflict loss: the larger, the less the router prefers any expert (its margin); {why_beta}"
    parser.add_argument("--beta", type=number(float, 0), default=beta, help=text)
    parser.add_argument("--alpha", type=number(float, 0), default=0.01, help="weight of the balance loss")
    parser.add_argument("--every", type=number(int, 1), default=1, help="look for conflicts at every k-th step")


def add_run(parser: Parser, folder: str, films: str) -> None:
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the forward and backward")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: CUDA, MPS or CPU")
    parser.add_argument("--log-steps", type=number(int, 1), default=10, help="write a line of the curve at every n-th step")
    parser.add_argument("--save-steps", type=number(int, 1), help="also write a checkpoint at every n-th step")
    text = "also log to this tracker, which needs its package; --resume stays in the same run of mlflow, tensorboard, wandb"
    parser.add_argument("--report-to", choices=["none", *TRACKERS], default="none", help=text)
    text = "keep a film of the training, and write inspect.html from it, tokens and experts moment by moment; default: {}"
    parser.add_argument("--film", action=BooleanOptionalAction, default=None, help=text.format(films))
    text = f"folder of the run; a finished one is shown; default: {folder}"
    parser.add_argument("--output-dir", type=path("new folder"), help=text)
    parser.add_argument("--resume", action="store_true", help="continue the run in --output-dir; finished runs are kept")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --output-dir")


def add_page(parser: Parser) -> None:
    parser.add_argument("--html", type=path("new file"), metavar="FILE", help="of --inspect: write a page instead of a text")
    parser.add_argument("--seed", type=number(int, 0, 10**6), help="of --inspect: which to show; default: the run's first")


def refuse_page(parser: Parser, args) -> None:
    """An error for flags of --inspect where a run is trained."""
    for flag in ("html", "seed"):
        if getattr(args, flag) is not None:
            parser.error(f"--{flag} goes with --inspect RUN: leave it out, or add --inspect")


def check_model(parser: Parser, flag: str, name: str, ways: str) -> None:
    """An error for a missing folder, and for a hub model that is neither reachable nor cached; `ways`: what to do then. A
    folder goes before a hub model of the same name, and a note says so."""
    if Path(name).is_dir():
        if HUB_NAME.fullmatch(name):
            say(f"note: {flag} {name} is the folder of this name, not a model of the hub")
    elif not HUB_NAME.fullmatch(name):
        parser.error(f"{flag} {name}: no such folder; give an existing one, or a hub name")
    elif not (hub_is_reachable(parser) or model_is_cached(name)):
        parser.error(offline_message("the model", name, ways))


def refuse_unread(parser: Parser, args, use: str, read: Sequence[str]) -> None:
    """An error for the first flag that was given but that `use`, a flag that trains nothing, does not read."""
    for name, value in vars(args).items():
        if name not in read and value != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is not read by {use}: leave it out")


def check(parser: Parser, args, more: Sequence[str] = ()) -> None:
    """An error where these flags contradict each other. Sets `args.variants` to the list of variants to train. `more`: names
    of variants that only this script has."""
    if args.select == "all" and (args.gradients == "weight" or args.conflict_loss == "reroute"):
        flag = "--gradients weight" if args.gradients == "weight" else "--conflict-loss reroute"
        parser.error(f"--select all reads no gradients: leave out {flag}, or --select")
    if args.select != parser.get_default("select") and args.conflict_loss == "none":
        parser.error(f"--select {args.select} chooses pairs for a conflict loss: leave it out, or --conflict-loss none")
    args.compare, given = bool(args.compare or args.variants), args.variants
    args.variants = sum(given or [COMPARED], []) if args.compare else [variant_name(args)]
    if not args.variants:
        parser.error("--variants is empty: give some, such as none,ce,placebo")
    if args.top_k > args.num_experts and reads_top_k(args):
        parser.error(f"--top-k {args.top_k} is above --num-experts {args.num_experts}: lower one or raise the other")
    for name in METHOD if args.compare else ():
        if getattr(args, name) != parser.get_default(name):
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} is part of a variant's name, such as ce-one-weight: leave it out, or leave out --variants")
    for name in args.variants:
        if name not in more and not VARIANT.fullmatch(name):
            parser.error(f"--variants {name}: unknown; see --help for the names and endings")
        if "reroute" in name and args.top_k == args.num_experts and args.router != "dynmoe":
            flag = "--variants" if args.compare else "--conflict-loss"
            parser.error(f"{flag} {name} needs --top-k below --num-experts: otherwise no other expert is left")
    check_dynmoe(parser, args)
    lrs = getattr(args, "lrs", None) or []
    if lrs and args.lr != parser.get_default("lr"):
        parser.error(f"--lr {args.lr:g} is not read when --lrs is given: name all rates in --lrs")
    for flag, values in (("--seeds", args.seeds), ("--variants", args.variants), ("--lrs", lrs)):
        if len(set(values)) < len(values):
            parser.error(f"{flag} {' '.join(map(str, values))}: one repeated gives the same run again; name each once")
    if args.resume and args.overwrite:
        parser.error("--resume keeps the content of --output-dir and --overwrite replaces it: choose one")


def reads_top_k(args) -> bool:
    """Whether a token of some variant has --top-k experts. With DynMoE's gate only those of dice do."""
    return args.router != "dynmoe" or "random" in (*args.variants, getattr(args, "routing", None))


def check_dynmoe(parser: Parser, args) -> None:
    """An error where the flags contradict --router dynmoe. Sets `args.max_experts`; lowers a top_k that no variant reads to
    the number of experts."""
    if args.router != "dynmoe":
        if args.max_experts:
            parser.error("--max-experts goes with --router dynmoe: leave it out, or add --router dynmoe")
        return
    args.max_experts = args.max_experts or 2 * args.num_experts
    if args.max_experts < args.num_experts:
        parser.error(f"--max-experts {args.max_experts} is below --num-experts {args.num_experts}: raise it")
    if args.experts != "copy" or not args.normalize:
        flag = "--no-normalize" if args.experts == "copy" else "--experts split"
        parser.error(f"--router dynmoe takes the mean of a token's experts: leave out {flag}")
    if args.top_k != parser.get_default("top_k") and not reads_top_k(args):
        parser.error(f"--top-k {args.top_k}: with --router dynmoe only the variant random reads it; leave it out")
    args.top_k = min(args.top_k, args.num_experts)
    if any("reroute" in name for name in args.variants):
        parser.error("--router dynmoe cannot reroute, since a token may be on all experts: use ce, mse or flat")
    if getattr(args, "capacity", None):
        parser.error("--capacity needs a fixed number of experts per token: leave it out, or --router dynmoe")


def count_runs(args) -> int:
    """How many runs a command has: one for each variant, learning rate and seed."""
    return len(args.variants) * len(getattr(args, "lrs", None) or [1]) * len(args.seeds)


def variant_name(args) -> str:
    """The name of the variant that the method's flags describe, for `--variants`, files and tables."""
    name, control = args.conflict_loss, {"random": "placebo", "all": "flat"}.get(args.select)
    if control and name != "none":
        name = control if name == "ce" else f"{control}-{name}"
    return name + ("-one" if args.passes == "one" else "") + ("-weight" if args.gradients == "weight" else "")


def label(variant: str) -> str:
    """How tables on the screen call a variant: the baseline's name in records and flags, `none`, says little there."""
    return re.sub(r"^none\b", "baseline", variant)


def variant_options(name: str, args) -> dict | None:
    """The STGCConfig options of a variant; None for `dense`. The baseline measures its conflicts at logged steps only, since
    it should not pay for an extra backward. Routing by dice has no loss of the router."""
    _, kind, one, weight = VARIANT.fullmatch(name).groups()
    if name == "random":
        return {"conflict_loss": "none", "every": args.log_steps, "alpha": 0.0, "tau": args.tau}
    if kind is None:
        return None
    control, _, loss = kind.rpartition("-") if kind not in ("placebo", "flat") else (kind, "", "ce")
    return {
        "conflict_loss": loss,
        "select": {"placebo": "random", "flat": "all"}.get(control, "conflict"),
        "passes": "one" if one else "two",
        "gradients": "weight" if weight else "bias",
        "every": args.log_steps if loss == "none" else args.every,
        "alpha": args.alpha,
        "beta": args.beta,
        "tau": args.tau,
    }
