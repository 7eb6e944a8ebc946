"""Flags that the scripts share, and the names of what they compare. Standard library only, so that --help answers at once.

A variant is `dense` (no MoE) or a way to treat conflicts, with the endings `-one` (one pass) and `-weight` (weight
gradients).
"""

import re
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from pathlib import Path

from lab.run.cli import Parser, hub_is_reachable, model_is_cached, number, offline_message

VARIANT = re.compile(r"(dense|(?:(none|ce|mse|reroute|placebo(?:-mse|-reroute)?)(-one)?(-weight)?))")
COMPARED = ["none", "ce", "placebo"]
METHOD = ("conflict_loss", "select", "passes", "gradients")  # the flags that a variant's name stands for
# what may differ between a run and its resumption
FREE = {"seeds", "variants", "compare", "lrs", "resume", "overwrite", "output_dir", "save_steps", "save_model", "report_to"}


def words(text: str) -> list[str]:
    """An argparse type: `a,b` is two words."""
    return [word for word in text.split(",") if word]


def add_compare(parser: Parser, more: str = "") -> None:
    parser.add_argument("--compare", action="store_true", help="train several --variants with the same seeds, and compare")
    parser.add_argument(
        "--variants",
        type=words,
        nargs="+",
        help=f"dense, none, ce, mse, reroute, placebo (ce on random pairs){more}; -one: one pass, -weight: weight "
        f"gradients; default of --compare: {','.join(COMPARED)}",
    )


def add_moe(parser: Parser, num_experts: int, layers: str, router: str, routers: dict[str, str]) -> None:
    parser.add_argument("--num-experts", type=number(int, 1), default=num_experts, help="experts per MoE layer")
    parser.add_argument(
        "--top-k",
        type=number(int, 1),
        default=2,
        help="experts per token; with 1 its weight is 1, so the main loss trains no router, but for --no-normalize",
    )
    text = "the K weights sum to 1; else they are the routing scores"
    parser.add_argument("--normalize", action=BooleanOptionalAction, default=True, help=text)
    parser.add_argument("--moe-layers", default=layers, help="from 0: indices as 1,3,5, or every-second, or all")
    parser.add_argument("--experts", choices=["copy", "split"], default="copy", help="copies of the FFN, or parts of it")
    text = "; ".join(f"{name}: {what}" for name, what in routers.items())
    parser.add_argument("--router", choices=[*routers], default=router, help=text)


def spec_options(args) -> dict:
    """What those flags say of a lab.moe.moefication.MoESpec."""
    names = ("num_experts", "top_k", "normalize", "experts", "router")
    return {"layers": args.moe_layers} | {name: getattr(args, name) for name in names}


def add_method(parser: Parser, beta: float, why_beta: str) -> None:
    """The meaning of each is in stgc.STGCConfig."""
    losses = ["none", "ce", "mse", "reroute"]
    parser.add_argument("--conflict-loss", choices=losses, default="ce", help="none: the MoE baseline")
    parser.add_argument(
        "--select", choices=["conflict", "random"], default="conflict", help="random: the placebo, as many pairs at random"
    )
    parser.add_argument("--passes", choices=["two", "one"], default="two", help="two: as the paper; one: no extra backward")
    parser.add_argument("--gradients", choices=["bias", "weight"], default="bias", help="token gradients to compare")
    parser.add_argument("--tau", type=number(float, -1.001, 1.001), default=0.0, help="a pair conflicts below this cosine")
    parser.add_argument("--beta", type=number(float, 0), default=beta, help=f"weight of the conflict loss; {why_beta}")
    parser.add_argument("--alpha", type=number(float, 0), default=0.01, help="weight of the balance loss")
    parser.add_argument("--every", type=number(int, 1), default=1, help="judge the tokens at each k-th step")


def add_run(parser: Parser, folder: str) -> None:
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the forward and backward")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: CUDA, MPS or CPU")
    parser.add_argument("--log-steps", type=number(int, 1), default=10, help="write the curve at each n-th step")
    parser.add_argument("--save-steps", type=number(int, 1), help="checkpoint at each n-th step, too")
    parser.add_argument("--report-to", choices=["none", "tensorboard"], default="none", help="a tracker beside the curves")
    parser.add_argument("--output-dir", help=f"folder of the run; default: {folder}")
    parser.add_argument("--resume", action="store_true", help="go on with what --output-dir holds; finished runs are kept")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --output-dir holds")


def expand(args, names: Sequence[str]) -> None:
    """`~` in these paths, which a shell leaves alone in --flag=~/path."""
    for name in names:
        if (getattr(args, name) or "").startswith("~"):
            setattr(args, name, str(Path(getattr(args, name)).expanduser()))


def check_model(parser: Parser, flag: str, name: str, ways: str) -> None:
    """An error for a folder that is not there, and for a hub's model out of reach and not in the cache; `ways` on then."""
    if Path(name).is_dir():
        return
    if name.startswith((".", "/")) or name.count("/") > 1:
        parser.error(f"{flag} {name}: no such folder; give an existing one, or a hub name")
    if not (hub_is_reachable() or model_is_cached(name)):
        parser.error(offline_message("the model", name, ways))


def refuse_unread(parser: Parser, args, use: str, read: Sequence[str]) -> None:
    """An error for the first flag that was given although `use`, a flag that trains nothing, does not read it."""
    for name, value in vars(args).items():
        if name not in read and value != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is not read by {use}: leave it out")


def check(parser: Parser, args, more: Sequence[str] = ()) -> None:
    """What those flags can contradict each other in. `args.variants` becomes the list of what to train; `more`: names of
    variants that only this script has."""
    if args.top_k > args.num_experts:
        parser.error(f"--top-k {args.top_k} is above --num-experts {args.num_experts}: lower one or raise the other")
    args.compare, given = bool(args.compare or args.variants), args.variants
    args.variants = sum(given or [COMPARED], []) if args.compare else [variant_name(args)]
    if not args.variants:
        parser.error("--variants names none: give some, as none,ce,placebo")
    for name in METHOD if args.compare else ():
        if getattr(args, name) != parser.get_default(name):
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} is part of a variant's name here, as ce-one-weight: leave it out, or leave out --variants")
    for name in args.variants:
        if name not in more and not VARIANT.fullmatch(name):
            parser.error(f"--variants {name}: unknown; see --help for the names and endings")
        if "reroute" in name and args.top_k == args.num_experts:
            flag = "--variants" if args.compare else "--conflict-loss"
            parser.error(f"{flag} {name} needs --top-k below --num-experts: else no expert is left to go to")
    lrs = getattr(args, "lrs", None) or []
    if lrs and args.lr != parser.get_default("lr"):
        parser.error(f"--lr {args.lr:g} is left unread beside --lrs: name all rates in --lrs")
    for flag, values in (("--seeds", args.seeds), ("--variants", args.variants), ("--lrs", lrs)):
        if len(set(values)) < len(values):
            one = "a seed" if flag == "--seeds" else "one"
            shown = " ".join(map(str, values))
            parser.error(f"{flag} {shown}: {one} repeated is the same run again; name each once")
    if args.resume and args.overwrite:
        parser.error("--resume keeps what --output-dir holds and --overwrite replaces it: choose one")


def variant_name(args) -> str:
    """What the method's flags make, as `--variants` names it, in files and tables too."""
    name = args.conflict_loss
    if args.select == "random" and name != "none":
        name = "placebo" if name == "ce" else f"placebo-{name}"
    return name + ("-one" if args.passes == "one" else "") + ("-weight" if args.gradients == "weight" else "")


def variant_options(name: str, args) -> dict | None:
    """The STGCConfig options of a variant; None for `dense`. The baseline measures its conflicts at logged steps only: it
    owes the method no extra backward."""
    _, kind, one, weight = VARIANT.fullmatch(name).groups()
    if kind is None:
        return None
    loss = "ce" if kind == "placebo" else kind.removeprefix("placebo-")
    return {
        "conflict_loss": loss,
        "select": "random" if kind.startswith("placebo") else "conflict",
        "passes": "one" if one else "two",
        "gradients": "weight" if weight else "bias",
        "every": args.log_steps if loss == "none" else args.every,
        "alpha": args.alpha,
        "beta": args.beta,
        "tau": args.tau,
    }
