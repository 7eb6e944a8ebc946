"""Experts from a trained FFN, and models of transformers with such experts in place of their FFN.

    spec = MoESpec(layers="every-second", num_experts=8, top_k=2, experts="copy")
    model = moefy(AutoModelForSequenceClassification.from_pretrained(...), spec)    # in place
    model.save_pretrained(folder)                                                   # safetensors and json, as usual
    model = load_moefied(folder)                                                    # gives the same logits, bit for bit

Experts are full copies of the FFN (`copy`: sparse upcycling, as in DynMoE's GLUE runs and MoE-LLaVA) or parts of it
(`split`: MoEfication, arXiv:2110.01786). Copies are averaged: their weights sum to 1, so the new layer equals the dense one
for any router. Parts are added up: their weights sum to K and each has 1/K of the last bias, so K = E parts with equal
weights equal the dense FFN. Copies may also be those of other dense models' FFNs: experts that were trained apart, each on
data of its own, and get a common router (Branch-Train-MiX, arXiv:2403.07816).

Shapes as in stgc.py: E experts, D hidden size, F neurons (the FFN's size), N neurons of one expert; B, L batch and length.

  1 Neurons  2 Experts  3 Spec  4 Padding  5 Conversion  6 Loading  7 Parameters
"""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.preprocessing import normalize
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, LlavaConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lab.moe import baselines
from lab.moe.dynmoe import TopAnyLayer
from lab.run.cli import UserError
from lab.run.hub import Checkpoint, check_sizes, sketch
from lab.run.reading import read_json
from stgc import MoELayer
from stgc_plus import Experts

# ---- 1. Neurons: which of them form an expert ----


def balanced_assignment(cost_FE: np.ndarray) -> np.ndarray:
    """labels_F that give each of E clusters F / E rows, at the least total cost.

    A constant added to all costs of a cluster does not change the optimum, since each cluster takes the same number of rows.
    The loop raises this price for clusters that too many rows prefer, until the preferences are nearly balanced. Then the
    exact solver has little left to do: 16 s became 0.2 s at F = 4096, E = 8.
    """
    share = len(cost_FE) // cost_FE.shape[1]
    price_E, spread = np.zeros(cost_FE.shape[1]), cost_FE.std()
    for i in range(1000):
        demand_E = np.bincount((cost_FE + price_E).argmin(1), minlength=len(price_E))
        price_E += spread / (1 + i / 10) * (demand_E / share - 1)
    return linear_sum_assignment(np.repeat(cost_FE + price_E, share, axis=1))[1] // share


def balanced_kmeans(x_FD: np.ndarray, num_clusters: int, seed: int, rounds: int = 10) -> np.ndarray:
    """labels_F of k-means with clusters of F / E rows each. Starts at scikit-learn's centres and ends when no row moves, or
    after `rounds`. Deterministic: the same arguments give the same clusters.
    """
    centres_ED = KMeans(num_clusters, random_state=seed).fit(x_FD).cluster_centers_
    labels_F = None
    for _ in range(rounds):
        before_F = labels_F
        labels_F = balanced_assignment((centres_ED**2).sum(1) - 2 * x_FD @ centres_ED.T)  # |x - c|^2, less |x|^2
        if before_F is not None and (labels_F == before_F).all():
            break
        centres_ED = np.stack([x_FD[labels_F == e].mean(0) for e in range(num_clusters)])
    return labels_F


SPLITS = ("kmeans", "random", "contiguous")


def split_neurons(w_FD: Tensor, num_experts: int, split: str = "kmeans", seed: int = 0) -> Tensor:
    """neurons_EN: a partition of the F rows of the first linear's weight into E equal parts.

    kmeans: neurons with similar input weights, by balanced k-means on the L2-normalised rows (MoEfication's parameter
    clustering). random. contiguous: blocks. Deterministic for a `seed`. ValueError if E does not divide F.
    """
    size = len(w_FD)
    if size % num_experts:
        fits = [n for n in range(num_experts, 1, -1) if size % n == 0]
        fix = f"take num_experts={fits[0]}" if fits else f"take a divisor of {size}"
        raise ValueError(f"{size} neurons cannot be split into {num_experts} equal experts: {fix}, or experts='copy'")
    if split == "kmeans":
        rows_FD = normalize(w_FD.detach().to("cpu", torch.float64).numpy())
        order_F = torch.from_numpy(balanced_kmeans(rows_FD, num_experts, seed).argsort(kind="stable"))
    elif split == "random":
        order_F = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    elif split == "contiguous":
        order_F = torch.arange(size)
    else:
        raise ValueError(f"split={split!r} is none of {', '.join(SPLITS)}")
    return order_F.view(num_experts, -1).to(w_FD.device)


# ---- 2. Experts ----


class FFN(NamedTuple):
    """last(activation(first(x))), or gated: last(activation(gate(x)) * first(x)). All linears have a bias, or none has."""

    first: nn.Linear
    last: nn.Linear
    activation: Callable[[Tensor], Tensor]
    gate: nn.Linear | None = None


def gather_experts(ffn: FFN, neurons_EN: Tensor, bias_share: float = 1.0) -> Experts:
    """Experts of which the e-th consists of the FFN's neurons neurons_EN[e].

    Each has `bias_share` times the last bias. The parameters are copies, on the FFN's device and in its dtype.
    """
    num_experts, d_ff = neurons_EN.shape
    bias, gated = ffn.first.bias is not None, ffn.gate is not None
    values = {"w_out_EFD": ffn.last.weight.detach().T[neurons_EN]}
    for name, linear in (("in", ffn.first), ("gate", ffn.gate)):
        if linear is not None:
            values[f"w_{name}_EDF"] = linear.weight.detach()[neurons_EN].mT.contiguous()
            values |= {f"b_{name}_EF": linear.bias.detach()[neurons_EN]} if bias else {}
    if bias:
        values["b_out_ED"] = (ffn.last.bias.detach() * bias_share).repeat(num_experts, 1)
    shape = (num_experts, ffn.first.in_features, d_ff)
    experts = Experts(*shape, gated=gated, bias=bias, activation=ffn.activation, device="meta")
    for name, value in values.items():
        setattr(experts, name, nn.Parameter(value))
    return experts


def copy_ffn(ffn: FFN, num_experts: int) -> Experts:
    """E full copies of the FFN. Use them with weights that sum to 1: `MoELayer(..., scale=1.0)`.

    CHOICE: the last bias stays whole. DynMoE's code divides it by K, so its layer does not start equal to the dense one.
    """
    neurons_F = torch.arange(ffn.first.out_features, device=ffn.first.weight.device)
    return gather_experts(ffn, neurons_F.expand(num_experts, -1))


def join_ffns(ffns: Sequence[FFN], num_experts: int) -> Experts:
    """E experts that are full copies of several FFNs of one shape: the first expert of the first FFN, the next of the next,
    and so on, in turn. Like `copy_ffn` if there is one FFN."""
    experts = copy_ffn(ffns[0], num_experts)
    for e in (e for e in range(num_experts) if e % len(ffns)):  # the others are copies of the first already
        one = copy_ffn(ffns[e % len(ffns)], 1)
        for own, given in zip(experts.parameters(), one.parameters(), strict=True):
            own.data[e] = given.data[0]
    return experts


def split_ffn(ffn: FFN, num_experts: int, top_k: int, split: str = "kmeans", seed: int = 0) -> Experts:
    """The FFN's neurons in E parts of equal size (`split_neurons`), each with 1/K of the last bias.

    Use them with weights that sum to K: `MoELayer(..., scale=top_k)`. ValueError if E does not divide the neurons.
    """
    neurons_EN = split_neurons(ffn.first.weight, num_experts, split, seed)
    return gather_experts(ffn, neurons_EN, bias_share=1 / top_k)


# ---- 3. Spec ----


@dataclass(frozen=True)
class MoESpec:
    """Which layers become MoE layers, and of which kind. Saved as `moe` in config.json. Bad values raise ValueError."""

    layers: str = "10"  # of the encoder or language model, from 0: indices as "1,3,5" | every-second: 1,3,5,... | all
    num_experts: int = 8
    top_k: int = 2  # experts per token; router="dynmoe" decides it for each token
    experts: str = "copy"  # copy | split
    split: str = "kmeans"  # kmeans | random | contiguous: how `experts="split"` groups the neurons
    router: str = "linear"  # linear (stgc.Router) | another of lab.moe.baselines.ROUTERS
    num_clusters: int = 128  # of instructions, for router="embedding"
    max_experts: int = 16  # of a layer, which starts with num_experts, for router="dynmoe"
    normalize: bool = True  # the K weights sum to 1 (split: to K) | off: they are the routing scores
    seed: int = 0  # of the routers and of the split

    def __post_init__(self):
        kinds = {"layers": str, "num_experts": int, "top_k": int, "num_clusters": int, "max_experts": int, "seed": int}
        kinds |= {"normalize": bool}
        for name, kind in kinds.items():
            if type(getattr(self, name)) is not kind:
                like = type(self).__dataclass_fields__[name].default
                raise ValueError(f"{name}={getattr(self, name)!r} must be of type {kind.__name__}, such as {like!r}")
        choices = {"experts": ("copy", "split"), "split": SPLITS, "router": (*baselines.ROUTERS,)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(allowed)}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} must lie between 1 and num_experts={self.num_experts}")
        if self.router == "dynmoe" and (self.experts, self.normalize) != ("copy", True):
            raise ValueError("router='dynmoe' takes the mean of its experts: it needs experts='copy' and normalize=True")

    def __str__(self) -> str:
        what = "copies" if self.experts == "copy" else "parts"
        many = f"up to {self.max_experts} experts, any number per token" if self.router == "dynmoe" else f"Top-{self.top_k}"
        plain = "" if self.normalize else ", weights not normalised"
        where = f"layer{'s' * (',' in self.layers)} {self.layers}"
        return f"MoE in {where}: {self.num_experts} {what} of the FFN, {many}, {self.router} router{plain}"


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers named by "10", "1,3,5", "every-second" (1, 3, 5, ...) or "all", counted from 0, in order.

    ValueError for any other text, for an index outside of 0 to num_layers - 1, and for no layer at all.
    """
    if text == "all":
        return tuple(range(num_layers))
    if text == "every-second":
        layers = tuple(range(1, num_layers, 2))
    else:
        try:
            layers = tuple(sorted({int(part) for part in text.split(",")}))
        except ValueError:
            raise ValueError(f"layers={text!r} is neither indices such as 1,3,5 nor every-second nor all") from None
    outside = [i for i in layers if not 0 <= i < num_layers]
    if outside or not layers:
        what = ", ".join(map(str, outside)) or "none"
        raise ValueError(f"layers={text!r} names {what}, but the model has {num_layers} layers: 0 to {num_layers - 1}")
    return layers


MOEFIED = {  # own model types, so that the Auto classes of transformers refuse the model: they would fill in random FFNs
    kind: type(f"Moefied{CONFIG_MAPPING[kind].__name__}", (CONFIG_MAPPING[kind],), {"model_type": f"moefied-{kind}"})
    for kind in ("bert", "roberta", "electra", "xlm-roberta", "camembert", "llava")
}
globals().update({config.__name__: config for config in MOEFIED.values()})  # so that a model can be pickled
SUPPORTED = f"supported model types: {', '.join(MOEFIED)}"


def check_spec(spec: MoESpec, config: PreTrainedConfig) -> MoESpec:
    """Checks that the spec fits a model with this config, and returns it with its layers as indices. Needs no weights.

    The layers of a LLaVA are those of its language model. ValueError for a model that is neither BERT-like nor a LLaVA, a
    BERT that is a decoder, a chunked FFN, layers out of range, or a split into unequal parts.
    """
    kind = getattr(config, "model_type", None)
    if kind not in MOEFIED:
        done = "is an MoE already" if str(kind).startswith("moefied-") else "is not BERT-like"
        raise ValueError(f"model type {kind!r} {done}; {SUPPORTED}")
    text = config.get_text_config()
    if getattr(config, "is_decoder", False):
        raise ValueError(f"this {kind} is a decoder (is_decoder=True), and its causal mask hides padding; only encoders fit")
    if size := getattr(config, "chunk_size_feed_forward", 0):
        raise ValueError(f"chunk_size_feed_forward={size} splits a batch before the router: set it to 0")
    if spec.experts == "split":
        split_neurons(torch.empty(text.intermediate_size, 0), spec.num_experts, "contiguous")
    return replace(spec, layers=",".join(map(str, parse_layers(spec.layers, text.num_hidden_layers))))


def spec_of(config: PreTrainedConfig, model_flag: str, **options) -> MoESpec:
    """The spec with these options, checked against the dense model's config. UserError names the flag."""
    try:
        return check_spec(MoESpec(**options), config)
    except ValueError as error:
        flags = (("layers=", "--moe-layers"), ("neurons", "--num-experts"), ("", model_flag))
        raise UserError(f"{next(flag for word, flag in flags if word in str(error))}: {error}") from None


# ---- 4. Padding ----

MASKED = -1e3  # an additive mask below this hides a position in every dtype: exp(-1000) is 0


def keep_mask(attention_mask: Tensor) -> Tensor:
    """keep_BL, True for real tokens, from the mask that a layer of transformers 5 gives to its attention.

    sdpa: (B, 1, L, L), True where a query attends to a key. eager: the same, as floats that are added to the scores. flash:
    (B, L), True for tokens. A token that no query attends to is padding. ValueError for other masks (flex_attention).
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim not in (2, 4):
        what = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"cannot tell padding from an attention mask {what}: use attn_implementation='sdpa' or 'eager'")
    if attention_mask.ndim == 2:
        return attention_mask.bool()
    return (attention_mask if attention_mask.dtype == torch.bool else attention_mask > MASKED).any(dim=(1, 2))


class PassMask:
    """Forward pre-hook of a layer's attention that passes the padding mask to the MoE layer behind it.

    It is on the attention, not on the layer: transformers checkpoints a layer's `forward`, and a recomputation would skip
    the layer's own hooks. It is an object with a reference to its MoE layer, so a copy of a model refers to the copied
    layer.
    """

    def __init__(self, layer: MoELayer):
        self.layer = layer

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        x_BLD = args[0] if args else kwargs["hidden_states"]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if mask is not None:
            mask = keep_mask(mask)
            if mask.shape[1] < x_BLD.shape[1]:
                raise ValueError(f"attention mask for {mask.shape[1]} tokens, layer with {x_BLD.shape[1]}")
            mask = mask[:, -x_BLD.shape[1] :].expand(x_BLD.shape[:2])  # tokens before these: a cache, or a prefix
        self.layer.mask = mask


# ---- 5. Conversion ----


def build_moe(ffn: FFN, spec: MoESpec, others: Sequence[FFN] = ()) -> MoELayer:
    """The MoE layer for an FFN under a spec, on the FFN's device and in its dtype. `others`: FFNs to copy instead.

    The router is drawn from torch's default generator on the CPU, so a seed gives the same router on every device. For
    `split` a linear router starts at MoEfication's parameter centres: the mean of the normalised rows of each part.
    """
    shape = (ffn.first.in_features, spec.num_experts, spec.num_clusters, spec.top_k, spec.max_experts)
    device = "meta" if ffn.first.weight.is_meta else "cpu"
    router = baselines.make_router(spec.router, *shape, device=device, dtype=torch.float32).to(ffn.first.weight)
    if spec.router == "dynmoe":
        return TopAnyLayer(copy_ffn(ffn, spec.max_experts), router)
    if spec.experts == "copy":
        experts = join_ffns(others or [ffn], spec.num_experts)
    else:
        experts = split_ffn(ffn, spec.num_experts, spec.top_k, spec.split, spec.seed)
        if spec.router == "linear":
            router.weight.data.copy_(F.normalize(experts.w_in_EDF.detach(), dim=1).mean(2))
    scale = 1.0 if spec.experts == "copy" else float(spec.top_k)
    return MoELayer(experts, router, spec.top_k, spec.normalize, scale)


DECODER_FFNS = (  # names of first, last, activation and gate in the `mlp` of a decoder's layer
    ("up_proj", "down_proj", "act_fn", "gate_proj"),  # SwiGLU: Llama, Mistral, Qwen, Gemma, StableLM
    ("fc1", "fc2", "activation_fn", None),  # Phi
)


def decoder_ffn(layer: nn.Module) -> FFN:
    """The FFN of a decoder's layer. ValueError for an unknown kind."""
    mlp = getattr(layer, "mlp", None)
    for names in DECODER_FFNS:
        parts = [getattr(mlp, name, None) for name in names if name]
        if None not in parts:
            return FFN(*parts)
    what = type(mlp or layer).__name__
    raise ValueError(f"the language model's FFN, {what}, is not known: use a Llama, Mistral, Qwen, StableLM or Phi-like one")


def bert_ffn(layer: nn.Module) -> FFN:
    """The FFN of a BERT-like layer."""
    return FFN(layer.intermediate.dense, layer.output.dense, layer.intermediate.intermediate_act_fn)


def ffns_of(model: PreTrainedModel, spec: MoESpec) -> list[FFN]:
    """The FFNs of a dense BERT-like model in the layers that the spec makes MoE layers."""
    return [bert_ffn(model.base_model.encoder.layer[i]) for i in parse_layers(spec.layers, model.config.num_hidden_layers)]


def install(model: PreTrainedModel, spec: MoESpec, others: Sequence[list[FFN]] = ()) -> None:
    """Replaces the FFN in each layer of a checked spec. The library's dropout, residual and LayerNorm stay unchanged.
    `others`: see `moefy`."""
    with torch.random.fork_rng(devices=[]):  # the routers use the CPU's generator; its state is restored
        torch.default_generator.manual_seed(spec.seed)
        for n, i in enumerate(parse_layers(spec.layers, model.config.get_text_config().num_hidden_layers)):
            if isinstance(model.config, LlavaConfig):
                layer = model.base_model.language_model.layers[i]
                layer.mlp = moe = build_moe(decoder_ffn(layer), spec).train(layer.training)
                attention = layer.self_attn
            else:
                layer = model.base_model.encoder.layer[i]
                moe = build_moe(bert_ffn(layer), spec, [ffns[n] for ffns in others]).train(layer.training)
                layer.intermediate, layer.output.dense = nn.Identity(), moe
                attention = layer.attention
            attention.register_forward_pre_hook(PassMask(moe), with_kwargs=True)
    model._weight_conversions = []  # otherwise transformers saves the names that the files had, such as gamma and beta
    baselines.share_samples(model)


def moefy(model: PreTrainedModel, spec: MoESpec, others: Sequence[list[FFN]] = ()) -> PreTrainedModel:
    """Turns layers of a BERT-like encoder, with any head, or of a LLaVA's language model into MoE layers, in place.

    `others`: the FFNs, by `ffns_of`, of dense models of the encoder's shape, which the experts copy in turn instead of its
    own. Everything else stays the encoder's.

    Padding is known from the attention mask and is not routed. With `copy` and normalised weights the model's outputs do not
    change. Returns the model. It gets a config of its own, with the spec as `moe`. Raises the errors of `check_spec`.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is not a model of transformers; {SUPPORTED}")
    dense = model.config
    spec = check_spec(spec, dense)
    install(model, spec, others)
    config = copy.deepcopy(dense)  # another model may share the old config
    config.__class__ = MOEFIED[dense.model_type]
    config.model_type = config.__class__.model_type  # a config read from a file has the old type as its own attribute
    config.moe = asdict(spec)
    for module in model.modules():
        if getattr(module, "config", None) is dense:
            module.config = config
    return model


# ---- 6. Loading ----

FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, StrictDataclassError)


def load_moefied(folder: str | Path) -> PreTrainedModel:
    """A moefied model from a folder that `save_pretrained` wrote: same class, tensors and dtypes, in eval mode.

    Reads only config.json and model.safetensors. One-line ValueError if the folder is missing, damaged, or of another kind
    of model.
    """
    folder = Path(folder)
    try:
        saved = check_sizes(read_json(folder / "config.json", architectures=list))
        kind = str(saved.get("model_type", "none"))
        config_class = MOEFIED.get(kind.removeprefix("moefied-")) if kind.startswith("moefied-") else None
        if config_class is None:
            raise ValueError(f"its model type is {kind}, not that of a moefied model")
        spec = MoESpec(**saved["moe"])
        config = config_class.from_dict(saved)
        model_class = getattr(transformers, (saved["architectures"] or ["none"])[0], None)
        if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
            raise ValueError(f"its architecture, {saved['architectures']}, is not in transformers")

        def build() -> PreTrainedModel:
            with no_init_weights():  # all weights are read: drawing random ones first would take most of the time
                model = model_class(config)
            model.tie_weights()
            install(model, replace(spec, split="contiguous"))  # the weights are in their final order already
            return model

        sketch(build, folder)
        model = build()
        saved_tensors = load_file(folder / "model.safetensors")
        own = model.state_dict(keep_vars=True)
        for old, new in (("gamma", "weight"), ("beta", "bias")):  # the first names of BERT, and of models saved from it
            saved_tensors = {re.sub(rf"\bLayerNorm\.{old}$", f"LayerNorm.{new}", k): v for k, v in saved_tensors.items()}
        if any("language_model.model." in name for name in saved_tensors):  # written by transformers before 5
            raise ValueError("its tensors have other names: use save_pretrained(folder, save_original_format=False)")
        for name, value in saved_tensors.items():
            if name in own:
                own[name].data = own[name].data.to(value.dtype)
        tied = {id(own[name]): value for name, value in saved_tensors.items() if name in own}  # saved under one of its names
        saved_tensors |= {name: tied[id(value)] for name, value in own.items() if id(value) in tied}
        model.load_state_dict(saved_tensors)  # strict; it copies, so the file may be replaced later
    except FAULTS as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"cannot load a moefied model from {folder}: {reason}") from error
    return model.eval()


def load_either(saved: Checkpoint, dense_class: type) -> PreTrainedModel:
    """A moefied model, or a dense one of `dense_class` (of transformers), from a folder, in eval mode. UserError."""
    if not str(saved.read("config.json").get("model_type")).startswith("moefied-"):
        return saved.model("the model", dense_class)
    saved.require("model.safetensors")
    model = saved.guard("the model", lambda: load_moefied(saved.name))
    saved.check_weights(model)
    return model


# ---- 7. Parameters ----


class Parameters(NamedTuple):
    """The number of a model's parameters, and of those that one token uses: at most, with DynMoE's layers. Embedding tables
    count as used."""

    total: int
    active: int


def count_parameters(model: nn.Module) -> Parameters:
    """Total, and active per token, which excludes the experts that Top-K leaves out. Tied parameters count once."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            per_expert = sum(p.numel() for p in layer.experts.parameters()) // layer.experts.num_experts
            idle += per_expert * (layer.experts.num_experts - layer.top_k)
    return Parameters(total, total - idle)
