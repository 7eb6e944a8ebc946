"""The cost of STGC: time and memory of a training step, all variants in one run, and the paper's memory table as arithmetic.

  python -m lab.bench                          a BERT of MiniLM's size (6 layers, hidden 384), random weights
  python -m lab.bench --size base              BERT-base's size; or large
  python -m lab.bench --moe-layers all         every layer MoE instead of one in the middle
  python -m lab.bench --all --device cuda      all that a GPU is measured by: see `--all --help`
  python -m lab.bench --model mixtral          transformers' own model, mid-size, with and without stgc_hf; or olmoe
  python -m lab.bench --model olmoe --output results/bench-olmoe.json     writes the record that docs/costs.md shows

A step is forward, losses, backward and AdamW. All variants take turns within each round, so that other load on the machine
affects all of them. The result is the median over rounds of the ratio to the base in the same round, and its interval. The
base is "moe", the MoE model with its balance loss and without STGC; for a model of transformers it is the faster
of its own implementations without STGC. Peak memory is the most that the allocator held while a model was built and trained
for two steps.
"""

import copy
from dataclasses import dataclass
from statistics import median

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

import stgc_hf
from lab.bench.measure import autocast, compare, line_of, measure_steps, write_record
from lab.moe import moefication
from lab.run.cli import Parser, number, path, say
from lab.run.runs import make_accelerator
from stgc_plus import STGC, STGCConfig

SIZES = {
    "small": BertConfig(num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536),
    "base": BertConfig(),
    "large": BertConfig(num_hidden_layers=24, hidden_size=1024, num_attention_heads=16, intermediate_size=4096),
}
OFF = STGCConfig(conflict_loss="none", every=0)
VARIANTS = {
    "dense": None,
    "moe": OFF,
    "moe, router-only": STGCConfig(conflict_loss="none", every=0, router_only=True),
    "one pass": STGCConfig(passes="one"),
    "two passes": STGCConfig(passes="two"),
    "one pass, weight gradients": STGCConfig(passes="one", gradients="weight"),
    "two passes, weight gradients": STGCConfig(passes="two", gradients="weight"),
    "two passes, every 4th step": STGCConfig(passes="two", every=4),
}
LIBRARY = ("grouped_mm", "eager")  # implementations of transformers, without STGC
ATTACHED = {  # the models of transformers with stgc_hf attached
    **dict.fromkeys(LIBRARY),
    "attached, no judging": OFF,
    "one pass": STGCConfig(passes="one"),
    "two passes": STGCConfig(passes="two"),
    "one pass, weight gradients": STGCConfig(passes="one", gradients="weight"),
}
SHARED = {"vocab_size": 2000, "hidden_size": 512, "num_attention_heads": 8, "eos_token_id": None, "pad_token_id": 0}
TEXT_MODELS = {  # proportions of Mixtral-8x7B and OLMoE-1B-7B; layers by --size
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(**SHARED, intermediate_size=1792, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2),
    ),
    "olmoe": (
        OlmoeForCausalLM,
        OlmoeConfig(**SHARED, intermediate_size=256, num_key_value_heads=8, num_experts=64, num_experts_per_tok=8),
    ),
}
TEXT_LAYERS = {"small": 2, "base": 4, "large": 8}


@dataclass(frozen=True)
class GradientMemory:
    """Size of stored per-token gradients in GiB: of the biases, and of the whole weights."""

    bias_gib: float
    weight_gib: float


def gradient_memory(
    linears: list[tuple[int, int]], moe_layers: int, tokens: int = 1000, bytes_per_number: int = 2
) -> GradientMemory:
    """The paper's memory table (sec. 6.4): `tokens` gradients of each linear (in, out) of an expert, in `moe_layers` layers.

    One pass stores neither: it compares a layer's gradients while the backward holds them.
    """
    unit = tokens * moe_layers * bytes_per_number / 2**30
    return GradientMemory(unit * sum(out for _, out in linears), unit * sum(a * b for a, b in linears))


PAPER_MODELS = {  # linears of an expert and number of MoE layers, as in the paper
    "StableLM-1.6B": ([(2048, 5632), (2048, 5632), (5632, 2048)], 12),
    "Phi-2-2.7B": ([(2560, 10240), (10240, 2560)], 16),
}


class Bench:
    """One variant: a model, its optimizer and a fixed batch."""

    def __init__(
        self,
        name: str,
        size: str,
        moe_layers: str,
        batch: int,
        length: int,
        device: torch.device,
        kind: str = "bert",
        dtype: torch.dtype = torch.float32,
    ):
        torch.manual_seed(0)
        self.stgc, self.device, self.dtype = None, device, dtype
        if kind == "bert":
            config, stgc_config = SIZES[size], VARIANTS[name]
            model = BertForSequenceClassification(config)
            if stgc_config is not None:
                model = moefication.moefy(model, moefication.MoESpec(moe_layers))
                self.stgc = STGC(model, stgc_config)
        else:
            cls, config = TEXT_MODELS[kind]
            config, stgc_config = copy.deepcopy(config), ATTACHED[name]
            config.num_hidden_layers = TEXT_LAYERS[size]
            model = cls(config)
            model.set_experts_implementation(name if name in LIBRARY else LIBRARY[0])
            if stgc_config is not None:
                self.stgc = stgc_hf.attach(model, stgc_config)
        self.model = model.to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-5, fused=device.type != "mps")
        ids = torch.randint(1000, config.vocab_size, (batch, length))
        keep = torch.arange(length) < torch.linspace(length // 2, length, batch).long().unsqueeze(1)  # some padding
        labels = torch.randint(2, (batch,)) if kind == "bert" else ids.masked_fill(~keep, -100)
        self.batch = {"input_ids": ids, "attention_mask": keep.long(), "labels": labels}
        self.batch = {key: value.to(device) for key, value in self.batch.items()}

    def step(self) -> None:
        with autocast(self.device, self.dtype):
            loss = self.model(**self.batch).loss
        (loss if self.stgc is None else self.stgc.loss(loss)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def middle(size: str) -> str:
    """The BERT's layer that is MoE unless others are named."""
    return str(SIZES[size].num_hidden_layers // 2 - 1)


def main() -> None:
    parser = Parser(prog="lab.bench", description=__doc__)
    parser.add_argument("--model", choices=["bert", *TEXT_MODELS], default="bert", help="ours, or transformers' own")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of the BERT; sets the layers of another model")
    parser.add_argument("--moe-layers", default="middle", help="of the BERT: middle, indices as 1,3,5, every-second, all")
    known = list(VARIANTS | ATTACHED)
    parser.add_argument("--variants", nargs="+", choices=known, help="what to compare; default: all that fit the model")
    parser.add_argument("--rounds", type=number(int, 3), default=15, help="timed steps of each variant, taking turns")
    parser.add_argument("--batch-size", type=number(int, 1), default=16, help="sequences per step")
    parser.add_argument("--length", type=number(int, 4), default=64, help="tokens of the longest sequence")
    parser.add_argument("--threads", type=number(int, 1), default=2, help="threads of the CPU")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run")
    parser.add_argument("--output", type=path("new file"), help="write the record here as json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = make_accelerator(args.device, "fp32").device
    layers = middle(args.size) if args.moe_layers == "middle" else args.moe_layers
    variants, bases = (VARIANTS, ("moe",)) if args.model == "bert" else (ATTACHED, LIBRARY)
    if unknown := [name for name in args.variants or [] if name not in variants]:
        parser.error(f"--variants {unknown[0]!r} is none of --model {args.model}: {', '.join(variants)}")
    names = list(dict.fromkeys([*bases, *(args.variants or variants)]))
    shared = (args.size, layers, args.batch_size, args.length, device)

    say("stored token gradients, the paper's settings (sec. 6.4)")
    memory = {name: gradient_memory(*setting) for name, setting in PAPER_MODELS.items()}
    for name, gib in memory.items():
        say(f"  {name:<15} biases {gib.bias_gib:7.2f} GiB   weights {gib.weight_gib:7.1f} GiB   one pass: none stored")

    peaks, seconds = measure_steps(lambda name: Bench(name, *shared, kind=args.model).step, names, args.rounds, device)
    base = min(bases, key=lambda name: median(seconds[name]))
    title = f"{args.size} BERT, MoE in layer(s) {layers}" if args.model == "bert" else f"{args.size} {args.model}"
    say("", f"{title}, {args.batch_size} x {args.length}, {device}, {args.threads} threads; ratio to {base}")
    say(f"  {'variant':<30}{'step':>10}{'ratio':>10}{'95 % interval':>18}{'peak memory':>13}")
    rows = compare(seconds, base, peaks)
    say(*(line_of(name, row) for name, row in rows.items()))
    gib = {name: vars(value) for name, value in memory.items()}
    write_record(args.output, device, config=vars(args), base=base, variants=rows, gradient_memory_gib=gib)
