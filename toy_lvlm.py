"""Builds a small vision-language Mixture-of-Experts with the architecture of MoE-LLaVA, and trains it with STGC.

  python toy_lvlm.py                                  the baseline and STGC on generated pictures, minutes on a CPU
  python toy_lvlm.py --compare --seeds 0 1 2          the baseline, STGC and the placebo, seed by seed
  python toy_lvlm.py --variants none,ce,embedding,feature,task    also the paper's sample-level routings
  python toy_lvlm.py --capacity 0.5 1.0 --bpr         evaluation with experts of limited capacity
  python toy_lvlm.py --data FILE.json --image-dir DIR --eval-data FILE.json      your pictures, in LLaVA's format
  python toy_lvlm.py --clip openai/clip-vit-large-patch14 --lm HuggingFaceTB/SmolLM2-135M    pretrained parts
  python toy_lvlm.py ... --resume                     continues a run that was stopped
  accelerate launch --num_processes 2 toy_lvlm.py ... several processes or GPUs

  python toy_lvlm.py --ask "what colour is the circle?" --image x.png --run RUN     asks a trained model; or --chat
  python toy_lvlm.py --inspect RUN                    its routing, token by token; --html FILE: as a page

A tiny CLIP is trained on pictures with captions, a small language model on the texts, and a LLaVA joins them. Stage I trains
the projector, stage II also the language model, stage III its experts, which start as copies of its FFNs. Output goes to
--output-dir: results.json, a curve per run as JSON lines, the models of all stages, plots, a sheet of answers.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from lab.run import options
from lab.run.cli import Parser, UserError, layout, number, path, report, run_main, say

SAMPLED = ("embedding", "feature", "task")
ROUTINGS = (*SAMPLED, "random")
STAGES = {  # flag: (default steps, learning rate, rate with a pretrained language model as in MoE-LLaVA, what is trained)
    "clip": (300, 4e-4, 4e-4, "the tiny CLIP"),
    "text": (80, 2e-3, 2e-3, "the small language model, on texts alone"),
    "stage1": (40, 1e-3, 1e-3, "the projector, on captions"),
    "stage2": (1000, 4e-3, 2e-5, "projector and language model, on all instructions"),
    "stage3": (100, 5e-4, 2e-5, "the MoE layers"),
}
FREE = options.FREE | {"max_bad"}
DENSE = ["clip", "lm", "scenes", "test_scenes", "data", "image_dir", "eval_data", "max_length", "batch_size", "precision"]
DENSE += [f"{stage}_{what}" for stage in list(STAGES)[:-1] for what in ("steps", "lr")]  # what the dense stages depend on
METHOD_FLAGS = [*options.METHOD, "alpha", "beta", "tau", "every"]


def make_parser() -> Parser:
    parser = Parser(prog="toy_lvlm.py", description=__doc__)
    # what
    options.add_compare(parser, more=f"; {', '.join(SAMPLED)}: see --routing")
    text = "hub name or folder of a pretrained {}; default: a small one is trained"
    parser.add_argument("--clip", type=path("model"), help=text.format("CLIP"))
    parser.add_argument("--lm", type=path("model"), help=text.format("Llama-like decoder"))
    # data
    parser.add_argument("--scenes", type=number(int, 64), default=12000, help="generated pictures to train on")
    parser.add_argument("--test-scenes", type=number(int, 3), default=300, help="generated pictures to test on")
    file, folder = {"type": path("file"), "metavar": "FILE"}, path("folder")
    parser.add_argument("--data", **file, help="your own instructions in LLaVA's format (JSON list or JSON lines)")
    parser.add_argument("--image-dir", type=folder, metavar="DIR", help="folder of the pictures of --data and --eval-data")
    parser.add_argument("--eval-data", **file, help="test data; default: a tenth of --data is held out")
    parser.add_argument("--max-bad", type=number(int, 0), default=0, help="bad entries of your data that may be left out")
    parser.add_argument("--max-length", type=number(int, 16), default=256, help="tokens of a conversation, picture included")
    # Mixture-of-Experts
    options.add_moe(parser, num_experts=4, layers="every-second", router="linear")
    text = "token: as usual; random: by dice; embedding (MoCLE), feature (LoRA-MoE), task (MoLA): by sample; without losses"
    parser.add_argument("--routing", choices=["token", *ROUTINGS], default="token", help=text)
    parser.add_argument("--clusters", type=number(int, 2), default=128, help="clusters of instructions, for embedding")
    text = "stage III trains the MoE layers, or all except CLIP"
    parser.add_argument("--train", choices=["moe", "all"], default="moe", help=text)
    text = "the model that gets the experts; stage1 has learnt captions alone, and needs --train all"
    parser.add_argument("--moe-from", choices=["stage1", "stage2"], default="stage2", help=text)
    text = "take the dense stages of a finished run, of the same data, seeds and flags, instead of training them"
    parser.add_argument("--stages-from", type=folder, metavar="RUN", help=text)
    options.add_method(parser, beta=1.0, why_beta="the paper's 1 leaves about half of the margin here")
    # training
    for name, (steps, lr, lr_pretrained, what) in STAGES.items():
        parser.add_argument(f"--{name}-steps", type=number(int, 1), default=steps, help=f"steps of training {what}")
        otherwise = f", with --lm {lr_pretrained:g}" if lr != lr_pretrained else ""
        why = f"peak of its learning rate; default: {lr:g}{otherwise}"
        parser.add_argument(f"--{name}-lr", type=number(float, 0), help=why)
    text = "pictures with all their questions per step, over all processes; 4x for CLIP and texts"
    parser.add_argument("--batch-size", type=number(int, 2), default=16, help=text)
    text = "one full run of all stages each"
    parser.add_argument("--seeds", type=number(int, 0, 10**6), nargs="+", default=[0], help=text)
    # evaluation
    text = "test again with experts of that capacity"
    parser.add_argument("--capacity", type=number(float, 0.01), nargs="+", default=[], help=text)
    parser.add_argument("--bpr", action="store_true", help="and again with Batch Prioritized Routing; needs --capacity")
    # run
    options.add_run(parser, "runs/lvlm-<variant>", films="on generated pictures; of stage III, with --routing token")
    # use of a trained model
    parser.add_argument("--ask", metavar="QUESTION", help="answer a question about --image with the model of --run")
    parser.add_argument("--chat", action="store_true", help="keep asking about --image, line by line")
    parser.add_argument("--image", **file, help="the picture for --ask or --chat; none: text only")
    parser.add_argument("--run", type=folder, help="output folder of a run, or a model in it, for --ask and --chat")
    parser.add_argument("--inspect", type=folder, metavar="RUN", help="print experts and conflicts of examples by token")
    options.add_page(parser)
    return parser


def parse(argv: list[str]):
    """The options, checked as far as possible without loading anything. `args.variants` is the list of variants to train."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.ask is not None or args.chat:
        if not args.run:
            parser.error("--ask and --chat need --run RUN, the output folder of a finished run")
        options.refuse_unread(parser, args, "--ask and --chat", ("ask", "chat", "image", "run", "device"))
        return args
    if args.inspect:
        options.refuse_unread(parser, args, "--inspect", ("inspect", "html", "seed", "device"))
        return args
    options.refuse_page(parser, args)
    args.film = not args.data if args.film is None else args.film
    for flag in ("run", "image"):
        if getattr(args, flag):
            parser.error(f"--{flag} goes with --ask or --chat: leave it out, or add one of them")
    for one, flag in (("clip", "clip_steps"), ("clip", "clip_lr"), ("lm", "text_steps"), ("lm", "text_lr")):
        if getattr(args, one) and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag.replace('_', '-')}: not read with --{one}; leave one of them out")
    if args.routing != "token" and any(getattr(args, name) != parser.get_default(name) for name in METHOD_FLAGS):
        parser.error(f"--routing {args.routing} has neither loss: leave out --conflict-loss, --beta and similar flags")
    if args.routing != "token" and (args.compare or args.variants):
        fix = f"leave it out, and add {args.routing} to --variants"
        parser.error(f"--routing {args.routing} is a variant's name here: {fix}")
    options.check(parser, args, more=ROUTINGS)
    if args.moe_from == "stage1" and args.train == "moe":
        parser.error("--moe-from stage1 needs --train all: its language model has not learnt the instructions")
    for name, (_, lr, lr_pretrained, _) in STAGES.items():
        if getattr(args, f"{name}_lr") is None:
            setattr(args, f"{name}_lr", lr_pretrained if args.lm else lr)
    if not args.compare:
        chosen = args.routing if args.routing != "token" else args.variants[0]
        args.variants = ["none", chosen] if not chosen.startswith("none") else [chosen]
    routed = [name for name in args.variants if name in SAMPLED]
    if routed and args.router != parser.get_default("router"):
        parser.error(f"--router {args.router}: {routed[0]} is a router of its own; leave one of them out")
    if routed and args.top_k == 1 and args.normalize and set(routed) & {"embedding", "feature"}:
        parser.error(f"--top-k 1: nothing trains the router of {routed[0]}, as the only weight is 1; add --no-normalize")
    if "embedding" not in routed and args.clusters != parser.get_default("clusters"):
        parser.error(f"--clusters {args.clusters}: only `embedding` has clusters; leave it out, or add that routing")
    if len(set(args.capacity)) < len(args.capacity):
        parser.error(f"--capacity {' '.join(map(str, args.capacity))}: one repeated gives the same test; name each once")
    if args.bpr and not args.capacity:
        parser.error("--bpr needs a capacity: add --capacity 0.5, or leave it out")
    if (args.image_dir or args.eval_data or args.max_bad) and not args.data:
        parser.error("--image-dir, --eval-data and --max-bad go with --data: add --data FILE.json, or leave them out")
    for flag, name in (("--clip", args.clip), ("--lm", args.lm)):
        if name:
            options.check_model(parser, flag, name, f"give a folder ({flag} DIR), or leave {flag} out: one is trained")
    return args


if __name__ == "__main__":  # before the heavy imports, so that --help and errors come at once
    ARGS = run_main("toy_lvlm.py", lambda: parse(sys.argv[1:]), resumes=False)

# ruff: noqa: E402
import math
import random
from functools import partial
from itertools import product, zip_longest

import torch
from torch.utils.data import DataLoader
from transformers import CLIPModel, LlamaForCausalLM, get_cosine_schedule_with_warmup, set_seed
from transformers.utils import logging

from lab.moe import baselines, dynmoe, moefication
from lab.moe.film import Film, affordable, evenly
from lab.report import compare, figures, page
from lab.run import runs
from lab.run.hub import Checkpoint
from lab.run.training import MuonAdamW, Training
from lab.vision import instructions, llava, lvlm, routes, scenes
from lab.vision.instructions import KINDS, Collate, InstructionSet, Unpacked, encode, is_right, make_packs, shuffled
from stgc import MoELayer
from stgc_plus import STGCConfig

STAGE_FILE = "stage.json"  # in the folder of a saved stage: its entry of the record
BETAS = (0.9, 0.98)  # of AdamW
PAIRS = 4  # times --batch-size: pictures per step of the CLIP, texts per step of the language model


@dataclass(frozen=True)
class Job:
    """The values that all stages and runs of one seed share."""

    args: object
    seed: int
    folder: Path
    record: runs.RunFolder
    accelerator: object
    data: lvlm.Data
    spec: moefication.MoESpec
    clip: CLIPModel | None  # a pretrained one
    lm: object | None

    def plan(self, stage: str) -> tuple[int, float]:
        """Steps and learning rate of a stage."""
        return getattr(self.args, f"{stage}_steps"), getattr(self.args, f"{stage}_lr")

    def packs(self, rows: list[int] | None = None, share: bool = True) -> Collate:
        """Training instructions in packs, or one by one without `share`."""
        chosen = range(len(self.data.train.instructions)) if rows is None else rows
        part = InstructionSet(self.data.train.images_N3SS, [self.data.train.instructions[row] for row in chosen])
        encoded = [self.data.encoded[row] for row in chosen]
        packs = make_packs(part, encoded, self.data.image_id, self.args.max_length, share)
        return Collate(part, packs, self.data.pixels, self.data.pad_id)

    def loader(self, collate, stage: str, size: int) -> DataLoader:
        """Batches of `size`, in an order that depends on seed and stage."""
        sampler = shuffled(len(collate), size * self.plan(stage)[0], seed=100 * self.seed + list(STAGES).index(stage))
        return DataLoader(range(len(collate)), size, sampler=sampler, collate_fn=collate, generator=torch.Generator())

    def print_line(self, text: str) -> None:
        if self.accelerator.is_main_process:
            say(f"seed {self.seed}: {text}")


# ---- 1. Training ----


def train(
    job: Job,
    folder: Path,
    name: str,
    model,
    trained: list,
    loader,
    stage: str,
    config=None,
    alike=False,
    muon=False,
    film=None,
) -> dict:
    """Trains the parameters `trained` in one stage, with AdamW; with `muon`, matrices with Muon. Returns its summary. `film`
    makes the film.

    `alike`: every process does the same work on whole batches, since a contrastive loss needs all pairs of a batch.
    """
    args, accelerator, (steps, lr) = job.args, job.accelerator, job.plan(stage)
    what = "in stage III" if stage == "stage3" else STAGES[stage][-1]
    job.print_line(f"{options.label(name.removesuffix(f'-s{job.seed}'))}: {steps} steps of training {what}")
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    model.train()
    if muon:
        optimizer = MuonAdamW(*lvlm.split_matrices(model, trained), lr, BETAS)
    else:
        optimizer = torch.optim.AdamW(trained, lr, BETAS, weight_decay=0.0, fused=accelerator.device.type != "mps")
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * steps), steps)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    prepared = model.to(accelerator.device) if alike else accelerator.prepare(model)
    loader = loader if alike else accelerator.prepare(loader)
    stgc = None if config is None else dynmoe.make_stgc(prepared, config)
    samples = baselines.samples_of(model)
    labelled = any(isinstance(module, baselines.TaskRouter) for module in model.modules())
    film = film() if film else None
    with Training(args, folder, name, accelerator, prepared, optimizer, schedule, steps, stgc, film) as run:
        for batch in run.batches(loader) if run.at.epoch == 1 else ():  # a stage is one epoch
            batch = {key: value.to(accelerator.device) for key, value in batch.items()}
            keep, asked, rows = (batch.pop(name, None) for name in ("keep", "asked", "rows"))
            if samples:
                samples.set(keep, **lvlm.sample_values(job.data, model, rows, batch["input_ids"], asked))
            if "labels" in batch:  # so that the loss is the mean over the answer tokens of all processes
                count = (batch["labels"][:, 1:] != instructions.IGNORED).sum().float()
                batch["num_items_in_batch"] = accelerator.reduce(count, "mean")
            with accelerator.autocast():  # a prepared model does this itself, but not one of `alike`
                main_loss = prepared(**batch, **({"return_loss": True} if alike else {})).loss  # for a CLIP
            loss = stgc.loss(main_loss, grad_scale=run.grad_scale()) if stgc else main_loss
            if labelled:  # instead of the balance loss; its mean, too, is over the tokens of all processes
                tokens = keep.sum().float()
                loss = loss + args.alpha * baselines.label_loss(model) * tokens / accelerator.reduce(tokens, "mean")
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            dynmoe.adapt(model, run.at.batch + 1, steps, accelerator.reduce)
            run.step_done(main_loss, args.batch_size * (1 if stage.startswith("stage") else PAIRS))
        if run.at.epoch == 1:
            run.epoch_done()
    accelerator.free_memory()
    return run.summary()


# ---- 2. Stages ----


def stage(job: Job, name: str, load, make):
    """The model of a stage. If it is not saved yet, `make` trains it; then `load` reads it from its folder.

    `make(folder, name)`, with the folder and name of the curve, returns the model, a summary, and a function that saves it.
    """
    other, accelerator = job.args.stages_from, job.accelerator
    folder = Path(other or job.folder) / runs.STAGES / f"{name}-s{job.seed}"
    if not folder.is_dir() and not other:  # it is complete or absent
        if accelerator.is_main_process:
            folder.parent.mkdir(exist_ok=True)
        accelerator.wait_for_everyone()
        set_seed(job.seed)
        model, entry, save = make(folder.parent, folder.name)
        if accelerator.is_main_process:
            with runs.replaced_folder(folder) as target:
                save(model, target)
                runs.write_json(target / STAGE_FILE, {"stage": name, "seed": job.seed} | entry)
    if not other:
        runs.remove_checkpoints(folder.parent / runs.CHECKPOINTS / folder.name, accelerator)
    accelerator.wait_for_everyone()
    flag, again = ("--stages-from", "name another run") if other else ("--output-dir", "remove it to train it again")
    saved = Checkpoint(flag, folder, again=again)
    if not job.record.find(to="stages", stage=name, seed=job.seed):  # also after a kill right after saving
        job.record.add(saved.read(STAGE_FILE, **runs.STAGE), to="stages")
    return load(saved)


def clip_stage(job: Job) -> CLIPModel:
    """The tiny CLIP, trained on pictures with captions."""
    data, sets = job.data, zip((job.data.train, job.data.test), job.data.captions)
    collate, test = (lvlm.CollateClip(own.images_N3SS, texts, data.tokenizer, data.pixels) for own, texts in sets)

    def make(folder: Path, name: str):
        clip = lvlm.make_clip(data.tokenizer)
        if cut := collate.cut + test.cut:
            job.print_line(f"note: {cut} of {len(collate) + len(test)} captions are cut: CLIP reads {lvlm.CAPTION} tokens")
        loader = job.loader(collate, "clip", PAIRS * job.args.batch_size)
        entry = train(job, folder, name, clip, [*clip.parameters()], loader, "clip", alike=True)
        entry["retrieval"], group = lvlm.retrieval(clip, test)
        share = f"{100 * entry['retrieval']:.0f} %"
        job.print_line(f"the tiny CLIP finds {share} of the test pictures' captions, each among {group}")
        return clip, entry, CLIPModel.save_pretrained

    return stage(job, "clip", lambda saved: saved.model("the model", CLIPModel, dtype=torch.float32), make)


def text_stage(job: Job) -> LlamaForCausalLM:
    """The small language model, trained on the texts of the instructions."""
    data = job.data

    def make(folder: Path, name: str):
        lm = lvlm.make_lm(data.tokenizer, job.args.max_length)
        blind = InstructionSet(data.train.images_N3SS[:0], [replace(one, image=None) for one in data.train.instructions])
        encoded = encode([one.turns for one in blind.instructions], data.tokenizer, image_tokens=0)
        encoded = [one._replace(labels=one.input_ids) for one in encoded]
        packs = make_packs(blind, encoded, data.image_id, job.args.max_length)
        loader = job.loader(Collate(blind, packs, data.pixels, data.pad_id), "text", PAIRS * job.args.batch_size)
        return lm, train(job, folder, name, lm, [*lm.parameters()], loader, "text"), LlamaForCausalLM.save_pretrained

    return stage(job, "text", lambda saved: saved.model("the model", LlamaForCausalLM, dtype=torch.float32), make)


def check_stages(args, made_from: dict) -> None:
    """UserError unless --stages-from holds the dense stages that this command would train. `made_from`: see `digests`."""
    run, what = Path(args.stages_from), f"--stages-from {args.stages_from}"
    record = runs.read_record(run, "--stages-from")
    if record is None or "stages" not in record:
        raise UserError(f"{what}: no run of toy_lvlm.py is there; give the --output-dir of one")
    if flags := runs.other_flags(record, vars(args), vars(make_parser().parse_args([])), DENSE):
        raise UserError(f"{what} was made with {flags}; give the same, or leave --stages-from out")
    known = record.get("made_from") or {}
    if changed := [name for name, digest in made_from.items() if known.get(name) != digest]:
        raise UserError(f"{what}: {', '.join(changed)} changed since; leave --stages-from out")
    names = [f"{args.moe_from}-s{seed}" for seed in args.seeds]
    if missing := [name for name in names if not (run / runs.STAGES / name).is_dir()]:
        raise UserError(f"{what} has no {missing[0]}: train that seed there first, or leave it out of --seeds")


def dense_model(job: Job):
    """The LLaVA that gets the experts, trained as in MoE-LLaVA. Stage I: the projector, on captions. Stage II: the language
    model and the projector, on all."""
    size, save = job.args.batch_size, partial(lvlm.save, data=job.data)
    load = lambda saved: lvlm.load(saved)[0]  # noqa: E731

    def stage_1(folder: Path, name: str):
        clip, lm = job.clip or clip_stage(job), job.lm or text_stage(job)
        set_seed(job.seed)
        model = lvlm.join(clip, lm, job.data)
        shown = [row for row, one in enumerate(job.data.train.instructions) if one.image is not None]
        captions = [row for row in shown if job.data.train.instructions[row].kind == "caption"]
        loader, projector = job.loader(job.packs(captions or shown), "stage1", size), model.model.multi_modal_projector
        return model, train(job, folder, name, model, [*projector.parameters()], loader, "stage1"), save

    def stage_2(folder: Path, name: str):
        model = stage(job, "stage1", load, stage_1)
        set_seed(job.seed)
        loader = job.loader(job.packs(), "stage2", size)
        # CHOICE: from nothing, Muon needs half of AdamW's steps to learn to read things from a picture
        entry = train(job, folder, name, model, lvlm.trainable(model), loader, "stage2", muon=job.lm is None)
        test = job.data.test.instructions
        guesses = instructions.majority(job.data.train.instructions, test)
        entry["scores"] = score(job, answers(job, model))
        entry["blind"] = {"majority": score(job, guesses), "no picture": score(job, answers(job, model, picture=False))}
        right, best = 100 * entry["scores"]["score"], 100 * max(own["score"] for own in entry["blind"].values())
        job.print_line(f"stage II answers {right:.1f} % of {len(test)} right; blind {best:.1f} %")
        return model, entry, save

    return stage(job, job.args.moe_from, load, {"stage1": stage_1, "stage2": stage_2}[job.args.moe_from])


def build(job: Job, variant: str):
    """The model that stage III starts from, dense or an MoE, and the layers to train."""
    model = dense_model(job)
    if variant == "dense":
        chosen = moefication.parse_layers(job.spec.layers, model.config.get_text_config().num_hidden_layers)
        return model, [model.model.language_model.layers[i].mlp for i in chosen]
    spec = replace(job.spec, router=variant if variant in ROUTINGS else job.spec.router, seed=job.seed)
    if spec.router == "embedding":
        centres_CD = lvlm.cluster_questions(model, job.data, job.args.clusters, job.seed)
        spec = replace(spec, num_clusters=len(centres_CD))
    model = moefication.moefy(model, spec)
    if spec.router == "embedding":
        baselines.set_centres(model, centres_CD)
    return model, [module for module in model.modules() if isinstance(module, MoELayer)]


def make_config(args, variant: str) -> STGCConfig | None:
    """The STGCConfig of a variant; None for `dense`. Sample-level routings have neither loss and are only measured."""
    if variant in SAMPLED:
        return STGCConfig("none", alpha=0.0, tau=args.tau, every=args.log_steps)
    chosen = options.variant_options(variant, args)
    return None if chosen is None else STGCConfig(**chosen)


def moe_stage(job: Job, variant: str) -> dict:
    """Stage III of one variant. Returns its entry of results.json."""
    args, name = job.args, f"{variant}-s{job.seed}"
    model, layers = build(job, variant)
    same = variant == "dense" or (args.experts == "copy" and args.normalize)  # outputs as before; stage II's score is known
    start = None if same and args.moe_from == "stage2" else score(job, answers(job, model))
    set_seed(job.seed)
    trained = lvlm.trainable(model) if args.train == "all" else [p for layer in layers for p in layer.parameters()]
    collate = Unpacked(job.packs(), job.packs(share=False)) if variant in SAMPLED else job.packs()
    loader = job.loader(collate, "stage3", args.batch_size)  # each step has the same conversations for all variants
    config = make_config(args, variant)
    film = partial(make_film, job, name, model, config, collate) if args.film and config and variant not in SAMPLED else None
    entry = train(job, job.folder, name, model, trained, loader, "stage3", config, film=film)
    texts = answers(job, model)
    scores, limited = score(job, texts), []
    for capacity in args.capacity if variant != "dense" else ():
        for bpr in (False, True)[: 1 + args.bpr]:
            with baselines.limit_capacity(model, capacity, bpr) as limit:
                found = score(job, answers(job, model))
            counts = torch.tensor([float(limit.dropped), float(limit.pairs)], device=job.accelerator.device)
            dropped, pairs = job.accelerator.reduce(counts).tolist()
            limited.append({"capacity": capacity, "bpr": bpr, "dropped": dropped / max(pairs, 1.0), "scores": found})
    if job.accelerator.is_main_process:
        with runs.replaced_folder(job.folder / f"model-{name}") as target:
            lvlm.save(model, target, job.data)
        if rows := sheet_rows(job, texts):
            figures.plot_sheet(job.data.test.images_N3SS, rows, job.folder / f"sheet-{name}.png")
    kinds = {kind: scores[kind] for kind in ("score", *KINDS) if kind in scores}
    return {
        "variant": variant,
        "seed": job.seed,
        "lr": args.stage3_lr,
        "last": kinds,
        "where": {key: value for key, value in scores.items() if key not in kinds},
        "start": start and start["score"],
        "limited": limited,
        "routes": None if variant == "dense" else routes.summary(trace_routes(job, model)),
        **entry,
        **dynmoe.summary(model),
        "peak_memory_bytes": runs.peak_memory_bytes(job.accelerator.device),
        "collapsed": len(set(texts)) == 1 < len(texts),
    }


def make_film(job: Job, name: str, model, config: STGCConfig, collate: Collate) -> Film:
    """The film of stage III, on as many training pictures as a batch has, or as its training pays for, evenly spread over
    the data. Where this command also trains stage II, whose steps cost as much, all variants share them. Earlier stages are
    not counted."""
    args, accelerator, side = job.args, job.accelerator, math.isqrt(job.data.image_tokens)
    (steps, _), (stage2, _) = job.plan("stage3"), job.plan("stage2")
    shared = stage2 if args.moe_from == "stage2" and not args.stages_from else 0
    count, moments = affordable(args.batch_size, steps, shared, len(args.variants))
    rows = evenly(len(collate), count)
    batch, shown, answer = lvlm.film_batch(model, collate, rows, job.data.tokenizer, side)
    where, how = (job.folder / f"film-{name}", model), (accelerator.autocast, accelerator.is_main_process)
    return Film(*where, config, batch, shown, steps, answer, *how, count=moments)


# ---- 3. Evaluation ----


def batches(job: Job, picture: bool = True, prompts: bool = True) -> DataLoader:
    """The test conversations, not packed, sorted by kind. `prompts`: without the last answer, which the model generates."""
    data, test = job.data, job.data.test
    if not picture:
        test = InstructionSet(test.images_N3SS, [replace(one, image=None) for one in test.instructions])
    turns = [(*one.turns[:-1], (one.turns[-1][0], None)) if prompts else one.turns for one in test.instructions]
    packs = make_packs(test, encode(turns, data.tokenizer, data.image_tokens * picture), data.image_id, 0, share=False)
    order = sorted(range(len(packs)), key=lambda i: (test.instructions[i].kind, test.instructions[i].part))
    collate = Collate(test, packs, data.pixels, data.pad_id, prompts)
    return DataLoader(order, 4 * PAIRS * job.args.batch_size, collate_fn=collate)


@torch.no_grad()
def answers(job: Job, model, picture: bool = True) -> list[str]:
    """The model's greedy answer to each test instruction, without the pictures if not `picture`."""
    data, accelerator, found = job.data, job.accelerator, {}
    samples, model = baselines.samples_of(model), model.to(accelerator.device).eval()
    replies = instructions.tokenize([(one.turns[-1][1],) for one in data.test.instructions], data.tokenizer)
    for batch in accelerator.prepare(batches(job, picture)):
        rows = batch.pop("rows")
        longest = max(len(replies[row]) for row in rows.tolist())
        ids = lvlm.generate(model, samples, batch, data.tokenizer, max_new_tokens=longest + 4)
        ids = accelerator.pad_across_processes(ids, dim=1, pad_index=data.pad_id)
        rows, ids = accelerator.gather_for_metrics((rows, ids))
        found |= dict(zip(rows.tolist(), data.tokenizer.batch_decode(ids, skip_special_tokens=True)))
    accelerator.free_memory()
    return [found[row].strip() for row in range(len(data.test.instructions))]


def score(job: Job, texts: list[str]) -> dict[str, float]:
    """Share of right answers: in total, by kind, by condition."""
    test = job.data.test.instructions
    return instructions.score(test, [is_right(one, text) for one, text in zip(test, texts, strict=True)])


@torch.no_grad()
def trace_routes(job: Job, model) -> routes.Routes:
    """The experts of each token of the test conversations. All processes do the same work."""
    samples, model, device = baselines.samples_of(model), model.eval(), job.accelerator.device
    with routes.record_routes(model) as found:
        for batch in batches(job, prompts=False):
            batch = {key: value.to(device) for key, value in batch.items() if key not in ("rows", "labels")}
            keep, asked = batch.pop("keep"), batch.pop("asked")
            if samples:
                samples.set(keep, **lvlm.question_values(model, batch["input_ids"], asked))
            model(**batch, logits_to_keep=1)
            found.add(batch["input_ids"] == job.data.image_id, keep)
    return found


def sheet_rows(job: Job, texts: list[str], count: int = 20) -> list[dict]:
    """Some test instructions with pictures, of all kinds and conditions, with the model's answers, for the sheet."""
    test, groups = job.data.test.instructions, {}
    for row in random.Random(0).sample(range(len(test)), len(test)):
        if test[row].image is not None:
            groups.setdefault((test[row].kind, test[row].where), []).append(row)
    chosen = [row for rows in zip_longest(*groups.values()) for row in rows if row is not None][:count]
    rows = []
    for row in chosen:
        one = test[row]
        shown = {"image": one.image, "kind": one.kind, "question": one.turns[-1][0].replace(instructions.IMAGE, "").strip()}
        shown |= {"answer": texts[row], "expected": one.turns[-1][1], "right": is_right(one, texts[row])}
        places = ("answer", "expected") if one.part in scenes.ASKED["region"] else ()  # your own data may have other units
        rows.append(shown | {"boxes": [scenes.read_place(shown[key]) for key in places]})
    return rows


# ---- 4. Asking ----


def ask(args) -> None:
    """Answers --ask, then, with --chat, each line from the terminal. Questions are independent of each other."""
    folder = newest_model(Path(args.run))
    model, tokenizer, card = lvlm.load(Checkpoint("--run", folder, again="train again"))
    model.to(runs.make_accelerator(args.device, "fp32").device)
    pictures = torch.empty(0, 3, card.size, card.size, dtype=torch.uint8)
    if args.image:
        try:
            pictures = llava.read_picture(Path(args.image), card.size).unsqueeze(0)
        except llava.BadEntry as error:
            raise UserError(f"--image: {error}") from None
    report(f"{folder}, {args.image or 'no picture'}")
    for question in questions(args):
        if words := instructions.unknown_words(tokenizer, question.replace(instructions.IMAGE, " ")):
            report(f"warning: words that are unknown to the model: {', '.join(words)}")
        if instructions.IMAGE in question:
            report(f"note: {instructions.IMAGE} in a question is left out; a picture stands before it")
        say(lvlm.ask(model, tokenizer, card, pictures, question) or "(no answer)")


def questions(args):
    if args.ask is not None:
        yield args.ask.encode(errors="replace").decode()
    while args.chat and sys.stdin:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line


def newest_model(run: Path) -> Path:
    """`run` itself if it is a model folder, otherwise the folder of its last run's model. UserError."""
    if (run / lvlm.CARD).is_file():
        return run
    record = runs.read_record(run, "--run") if run.is_dir() else None
    names = [f"model-{entry['variant']}-s{entry['seed']}" for entry in (record or {}).get("runs", [])]
    found = [run / name for name in names if (run / name).is_dir()]
    if not found:
        raise UserError(f"--run {run} holds no model: give the --output-dir of a finished run, or a model folder in it")
    return found[-1]


# ---- 5. Main ----


def summarize(record: dict) -> str:
    """Stage II and the blind baselines, then stage III seed by seed."""
    lines = []
    for entry in record.get("stages", []):
        if entry["stage"] == "stage2":
            rows = {"stage II": entry["scores"], **entry["blind"]}
            names = [name for name in ("score", *KINDS) if name in entry["scores"]]
            table = [[f"seed {entry['seed']}", *names]]
            table += [[label, *(f"{100 * own.get(name, 0):.1f}" for name in names)] for label, own in rows.items()]
            lines += [layout(table), ""]
    lines.append(compare.comparison_table(record, "last"))
    for run in record["runs"]:
        for own in run["limited"]:
            how = f"capacity {own['capacity']:g}{', batch prioritized' if own['bpr'] else ''}"
            shares = f"{100 * own['scores']['score']:.1f} % right, {100 * own['dropped']:.1f} % of the pairs dropped"
            lines.append(f"{options.label(run['variant'])}, seed {run['seed']}, {how}: {shares}")
    return "\n".join(lines + compare.seeds_note(record))


def main(args) -> None:
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if args.ask is not None or args.chat:
        return ask(args)
    if args.inspect:
        look = partial(lvlm.film_of_model, device=runs.make_accelerator(args.device, "fp32").device)
        if args.html:
            return say(f"written: {page.inspect(args.inspect, Path(args.html), args.seed, look)}")
        return say(*page.describe(args.inspect, args.seed, look).split("\n"))
    accelerator = runs.start(args)
    runs.refuse_shards(accelerator, "each process holds the whole model")
    folder = Path(args.output_dir or f"runs/lvlm-{'compare' if args.compare else args.variants[-1]}")
    args.output_dir = str(folder)
    keys, stages = ([f"{one}-s{seed}" for one in own for seed in args.seeds] for own in (args.variants, STAGES))
    names, flags = runs.names_of(keys, runs.ENTRIES, stages=stages), (args.overwrite, args.resume)
    defaults, wanted = vars(make_parser().parse_args([])), product(args.variants, args.seeds)
    wanted = [{"variant": variant, "seed": seed} for variant, seed in wanted]
    if record := runs.finished(folder, vars(args), defaults, wanted):
        return runs.say_finished(folder, summarize(record))
    check = partial(runs.check_folder, folder, vars(args), defaults, FREE, *flags, names)
    check()
    clip, lm = lvlm.find_parts(args)
    spec, tokenizer = lvlm.check_spec(args, clip, lm), None
    clip = lvlm.load_clip(*clip) if clip else None
    if lm:
        lm, tokenizer = lvlm.load_lm(*lm)
    problems = llava.Problems(args.max_bad)
    data = lvlm.load_data(args, clip, tokenizer, problems)
    made_from = digests(args, data)
    if args.stages_from:
        check_stages(args, made_from)
    with runs.claim_folder(folder, args.overwrite, accelerator, check, names):
        train_all(args, folder, accelerator, data, spec, clip, lm, problems, made_from)


def digests(args, data: lvlm.Data) -> dict[str, str]:
    """Of the data and the models that a run is made from, by their names for the user."""
    sets = {"train": data.train, "test": data.test}
    found = {f"the data to {name}": runs.digest_of(own.images_N3SS, own.instructions) for name, own in sets.items()}
    for flag, name in (("--clip", args.clip), ("--lm", args.lm)):
        found |= runs.digests_of_model(flag, name) if name else {}
    return found


def train_all(args, folder: Path, accelerator, data: lvlm.Data, spec, clip, lm, problems, made_from: dict) -> None:
    """All seeds and variants, in the folder that is ours by now."""
    main_process = accelerator.is_main_process
    sets = {"train": data.train, "test": data.test}
    sizes = {name: len(own.instructions) for name, own in sets.items()}
    pictures = {f"{name}_pictures": len(own.images_N3SS) for name, own in sets.items()}
    record = runs.RunFolder(folder, f"lvlm-{data.name}", vars(args), sizes | pictures, accelerator, made_from)
    if main_process and problems.total:
        runs.write_json(folder / runs.ENTRIES, {"left out": problems.left_out, "changed": problems.changed})
        say(problems.summary() or f"all {problems.total} entries are used unchanged")
    if main_process:
        training = f"{sizes['train']} instructions on {pictures['train_pictures']} pictures to train"
        say(f"{record.record['name']}: {training}, {sizes['test']} on {pictures['test_pictures']} to test", str(spec))
        runs.print_settings(args, accelerator.device, [make_config(args, variant) for variant in args.variants])
    for seed in args.seeds:
        job = Job(args, seed, folder, record, accelerator, data, spec, clip, lm)
        for variant in args.variants:
            name = f"{variant}-s{seed}"
            if entry := record.find(variant=variant, seed=seed):
                job.print_line(f"{options.label(variant)} is complete already")
            else:
                entry = moe_stage(job, variant)
                record.add(entry)
                right = f"{100 * entry['last']['score']:.1f} % right"
                job.print_line(f"{options.label(variant)} answers {right} after stage III")
            if main_process:
                if record.is_newer_than("curves.png"):
                    figures.plot_run(folder, record.record)
                picture = folder / f"routes-{name}.png"
                if entry.get("routes") and not picture.exists():
                    figures.plot_routes(entry["routes"], picture, name)
            runs.remove_checkpoints(folder / runs.CHECKPOINTS / name, accelerator)
    if main_process:
        if len(args.variants) > 1:
            figures.plot_comparison(folder, [record.record], "last")
        say("", *summarize(record.record).split("\n"), "", f"written: {folder}/results.json and plots")
        if args.film:
            say(page.write_run(folder))


if __name__ == "__main__":
    run_main("toy_lvlm.py", lambda: main(ARGS), resumes=not (ARGS.chat or ARGS.ask is not None or ARGS.inspect))
