"""STGC in a Mixture-of-Experts model of transformers, in one line: nothing is ported, nothing is converted.

    stgc = stgc_hf.attach(model, STGCConfig(conflict_loss="ce"))
    out = model(**batch)                    # its 2-D attention_mask says which tokens are padding
    stgc.loss(out.loss).backward()          # main + alpha * balance + beta * conflict, eq. 10
    stgc.stats()                            # and stgc.verdicts, as in stgc.py
    stgc.detach()                           # the model is exactly what it was

A registered function of transformers' experts interface computes judged experts with taps on their linears (a fused gate
and up projection counts as the two linears that it is), hooks on the routers record their raw logits; taps, flags and
losses are those of stgc_plus.py. What is not judged, such as evaluation and generation, runs the library's function that
was chosen before.

CHOICE: the losses act on softmax(z) of the raw logits z, also where the model scores with a sigmoid (deepseek_v3, glm4_moe,
...): ce still lowers the logit of the expert that the token leaves and raises the others', so the scores follow, but mse
and the balance loss then weigh by a softmax that the model does not route with. Scores' correction biases are left alone.

CHOICE: padding is computed as the library does it, but never averaged, flagged or counted. It is what a 2-D
`attention_mask` has zeros for; 4-D masks and packed sequences have none. A model's own balance loss
(output_router_logits=True) is part of out.loss, and reaches tokens that the main loss does not. TrainerMixin refuses it. In
a loop of your own take it out of what is judged, with two passes and alpha=0, `own = model.config.router_aux_loss_coef *
out.aux_loss; (stgc.loss(out.loss - own) + own).backward()`. torch.compile with two passes needs
torch._functorch.config.donated_buffer = False, as torch's error says too.

Families tested, all 64 that transformers 5.23 serves, from random weights: afmoe, aria, axk1, axk2, bailing_hybrid, beam,
cohere2_moe, deepseek_ocr2, deepseek_v2, deepseek_v3, deepseek_v32, deepseek_v4, diffusion_gemma, dots1, dots3_note,
ernie4_5_moe, ernie4_5_vl_moe, exaone_moe, flex_olmo, flint, gemma4, glm4_moe, glm4_moe_lite, glm4v_moe, glm5_next,
glm_moe_dsa, gpt_oss, granitemoe, granitemoe_swa, granitemoehybrid, granitemoeshared, hunyuan_v1_moe, hy_v3, hy_v4, inkling,
inkling2, jamba, kimi_linear, kolibri1, laguna, lfm2_moe, mellum, mimo_v2_flash, minimax, minimax_m2, minimax_m3_vl,
mistral4, mistral_large4, mixtral, muse_spark, nemotron_h, olmoe, openai_privacy_filter, phimoe, qwen2_moe, qwen3_5_moe,
qwen3_moe, qwen3_next, qwen3_omni_moe, qwen3_vl_moe, qwen4_exp, solar_open, unlimited_ocr, zaya.

With a limit: deepseek_v4 looks the experts of its first layers up by token id (`hash_moe`), where a loss on the logits
moves no token: leave them out with STGCConfig.layers. ernie4_5_vl_moe with pictures gives its experts a part of the
sequence each: batches without padding only. zaya's tokens that skip all experts count as load of expert 0. Not at all, as
their experts are outside the interface: switch_transformers, nllb_moe, dbrx, doge, jetmoe, llama4, longcat_flash, step3p7.
Nor quantized experts and expert parallelism.
"""

import copy
import inspect
import re
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from stgc import Routing, widen
from stgc_plus import STGC, LayerStep, Pairs, STGCConfig, grouped_linear, weight_cosine

OLDEST = "5.23"  # tested from here on; older ones lack flags of the interface, or their routers return probabilities
if Version(transformers.__version__) < Version(OLDEST):
    raise ImportError(f"transformers {transformers.__version__} is too old, stgc_hf needs {OLDEST}: pip install -U it")
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

NAME = "stgc"  # of our function in the experts interface


# ---- 1. Experts ----


def split_columns(concatenated: bool, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A fused gate and up projection (..., 2F), or its gradient, as the two linears (..., F) that it is."""
    return rows.chunk(2, dim=-1) if concatenated else (rows[..., ::2], rows[..., 1::2])


def everything(x_TD: Tensor) -> Tensor:
    """keep_T without padding: all True."""
    return torch.ones(len(x_TD), dtype=torch.bool, device=x_TD.device)


def sort_pairs(experts: nn.Module, expert_ids_TK: Tensor, keep_T: Tensor, dtype=torch.float32) -> Pairs:
    """The pairs of the tokens with keep_T True, by expert."""
    return Pairs(expert_ids_TK, keep_T.unsqueeze(1).to(dtype), experts.num_experts)


def linear_names(experts: nn.Module) -> list[str]:
    """Names of the stacked weights, the first linear's and the last's; a bias is named alike, with `_bias` behind it."""
    return ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]


def run_experts(
    experts: nn.Module, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, pairs: Pairs, step: LayerStep | None = None
) -> Tensor:
    """out_TD, the sum over a token's experts of w_e * E_e(x), by the parameters of the library's module. `step` taps it."""
    names = linear_names(experts)
    weights = [w if experts.is_transposed else w.mT for w in (getattr(experts, name) for name in names)]
    biases = [getattr(experts, f"{name}_bias") if experts.has_bias else None for name in names]
    x_SD = pairs.dispatch(x_TD.to(weights[0].dtype))
    if step is not None:
        x_SD, weights = step.on_experts(x_SD, weights)
    h_SF = grouped_linear(x_SD, weights[0], biases[0], pairs)
    if step is not None:
        split = [partial(split_columns, experts.is_concatenated)] if experts.has_gate else []
        step.on_linear(x_SD, weights[0], h_SF, *split)
    a_SF = experts._apply_gate(h_SF) if experts.has_gate else experts.act_fn(h_SF)
    y_SD = grouped_linear(a_SF, weights[1], biases[1], pairs)
    if step is not None:
        step.on_linear(a_SF, weights[1], y_SD)
    if experts.has_post_expert_norm:
        y_SD = experts.post_expert_norm(y_SD)
    y_SD = y_SD.to(torch.promote_types(y_SD.dtype, weights_TK.dtype))  # as the library computes
    return pairs.combine(y_SD, weights_TK).to(x_TD.dtype)


def experts_function(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts interface calls in the place of its own, by its names: x_TD, expert_ids_TK, weights_TK -> out_TD."""
    layer = getattr(experts, "stgc_layer", None)
    if layer is None:  # of another model, which only shares the config
        pairs = sort_pairs(experts, top_k_index, everything(hidden_states))
        return run_experts(experts, hidden_states, top_k_index, top_k_weights, pairs)
    return layer.forward(hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_function)


# ---- 2. Padding ----


class Padding:
    """Which tokens are padding: the 2-D attention mask (B, L) of the model call that runs, the innermost one that has it.

    `on_call` and `on_return` are hooks around the forward of each model in it; `names`: the parameters of that forward.
    """

    def __init__(self):
        self.masks: list[Tensor | None] = []

    def on_call(self, names: list[str], module, args, kwargs) -> None:
        mask = kwargs.get("attention_mask", dict(zip(names, args)).get("attention_mask"))
        outer = self.masks[-1] if self.masks else None
        self.masks.append(mask if isinstance(mask, Tensor) and mask.dim() == 2 else outer)

    def on_return(self, module, args, output) -> None:
        self.masks.pop()

    def keep(self, x_TD: Tensor) -> Tensor | None:
        """keep_T, False for padding. None: no call that runs was given a 2-D mask, so every token is real.

        Raises ValueError where a mask with zeros does not fit the tokens.
        """
        if not self.masks or self.masks[-1] is None:
            return None
        mask = self.masks[-1]
        length = len(x_TD) // len(mask)  # with a cache, the mask begins with tokens that went before
        if length * len(mask) == len(x_TD) and length <= mask.shape[1]:
            return mask[:, mask.shape[1] - length :].reshape(-1).to(x_TD.device, torch.bool)
        if bool(mask.all()):
            return None
        fault = f"an attention mask {tuple(mask.shape)} does not tell which of the {len(x_TD)} tokens here are padding"
        raise ValueError(f"{fault}: train on batches without padding, whose mask is all ones")


# ---- 3. Layer ----


class RouterCall(NamedTuple):
    """A router's latest call, as STGC wants a router: parameters, and logits that depend on them alone."""

    tensors: list[Tensor]
    alone_TE: Tensor | None  # from its detached input, where the losses are held to the router

    def parameters(self) -> list[Tensor]:
        return self.tensors

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.alone_TE  # x_TD, the experts' input, need not be the router's


class Layer:
    """One block of the library, as STGC wants a layer: experts whose linears are tapped, and the logits of their router."""

    top_k = None  # known when the layer runs

    def __init__(self, experts: nn.Module, routers: list[nn.Module], before: str, padding: Padding):
        self.experts, self.routers, self.before, self.padding = experts, routers, before, padding
        self.watch, self.handles = None, []
        self.linear_out: Tensor | None = None  # of the linear in a router, where it has one
        self.call: tuple[Tensor, RouterCall] | None = None  # logits, and the router's call that these experts belong to
        self.router: RouterCall | None = None
        self.keep_T: Tensor | None = None
        self.experts_train = False

    def __getstate__(self):  # copies of the model are unwatched, as those of a stgc.MoELayer are
        return self.__dict__ | dict.fromkeys(("watch", "linear_out", "call", "router", "keep_T"))

    @property
    def training(self) -> bool:
        return self.experts.training

    @property
    def stgc(self) -> STGC | None:
        return None if self.watch is None else self.watch.func.__self__

    def install(self) -> None:
        """Hooks on the routers, and the experts' function in the place of the one chosen before; `remove` undoes both."""
        for router in self.routers:
            self.handles.append(router.register_forward_hook(self.on_router, with_kwargs=True))
            for child in router.children():  # what the router returns may be probabilities, as in gemma4
                if getattr(child, "out_features", 0) >= self.experts.num_experts:
                    self.handles.append(child.register_forward_hook(self.on_router_linear))
        self.experts.stgc_layer = self
        self.experts.config._experts_implementation_internal = NAME  # the public setter may miss it, and cannot set it back

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        if self.experts.__dict__.get("stgc_layer") is self:
            del self.experts.stgc_layer
            if self.experts.config._experts_implementation == NAME:  # else the user has chosen another one since
                self.experts.config._experts_implementation_internal = self.before

    def on_router_linear(self, linear, args, output) -> None:
        """After a linear inside the router, as wide as there are experts: what it returns are the raw logits."""
        self.linear_out = output

    def on_router(self, router, args, kwargs, output) -> None:
        """After the router: its raw logits and, where the losses are held to it, the same from its detached input."""
        if self.watch is None or not torch.is_grad_enabled():
            return

        def logits_of(output) -> Tensor:
            found, self.linear_out = output[0] if self.linear_out is None else self.linear_out, None
            return widen(found.flatten(0, -2)[:, : self.experts.num_experts])  # beyond: shared or no-op experts

        logits_TE, alone_TE = logits_of(output), None
        if self.stgc.config.router_only:
            args = [value.detach() if isinstance(value, Tensor) else value for value in args]
            kwargs = {name: value.detach() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
            if isinstance(router, nn.Linear):  # phimoe: the rest of its forward draws random numbers
                alone_TE = logits_of([F.linear(args[0], router.weight, router.bias)])
            else:
                alone_TE = logits_of(router.forward(*args, **kwargs))
        tensors = [*router.parameters(), *(getattr(router, name) for name in getattr(router, "parametrizations", {}))]
        self.call = logits_TE, RouterCall(tensors, alone_TE)

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """out_TD. Where no token gradient is wanted, without gradients for one, the library's own function computes.

        Raises RuntimeError where the router did not run on the same tokens before, or frozen parts leave nothing to judge.
        """
        eager = type(self.experts).forward.__wrapped__
        library = partial(ALL_EXPERTS_FUNCTIONS.get_interface(self.before, eager), self.experts, x_TD, expert_ids_TK)
        if self.watch is None:
            return library(weights_TK)
        if not torch.is_grad_enabled():
            self.watch(x_TD, None, None, None)  # notes that the layer ran
            return library(weights_TK)
        if self.call is None or len(self.call[0]) != len(x_TD):
            experts, router = type(self.experts).__name__, type(self.routers[0]).__name__
            fault = f"{experts} ran on {len(x_TD)} tokens, {router} did not run on them before"
            raise RuntimeError(f"{fault}: stgc_hf cannot tell their router logits")
        (logits_TE, self.router), self.call = self.call, None
        if torch._C._current_graph_task_id() == -1:
            self.keep_T = self.padding.keep(x_TD)
        # else gradient checkpointing computes the layer once more: the latest forward's tokens, or those of one before it,
        # which does not count and whose padding no longer matters
        known = self.keep_T is not None and len(self.keep_T) == len(x_TD)
        keep_T = self.keep_T if known else everything(x_TD)
        # The library computes padding as it does tokens, and so do we, but it is not judged. For gradients of whole weights,
        # which sum up over all rows of a product, it runs apart on a GPU; elsewhere its share in the sum is taken out.
        apart = self.keep_T is not None and self.stgc.config.gradients == "weight" and x_TD.is_cuda
        if apart and not known:
            fault = "gradient checkpointing computes a forward again that was not the latest"
            raise RuntimeError(f"{fault}, and gradients='weight' needs its attention mask: call backward after each forward")
        sort = partial(sort_pairs, self.experts, expert_ids_TK, dtype=logits_TE.dtype)
        pairs = sort(keep_T if apart else everything(x_TD))
        keep_S = keep_T.unsqueeze(1).expand_as(expert_ids_TK).flatten().index_select(0, pairs.order_S)
        real = copy.copy(pairs)
        real.onehot_SE = pairs.onehot_SE * keep_S.unsqueeze(1)
        step, self.router = self.watch(x_TD, Routing(logits_TE, weights_TK, expert_ids_TK), real, keep_T), None
        if step is None:
            return library(weights_TK)
        self.experts_train = any(getattr(self.experts, name).requires_grad for name in linear_names(self.experts))
        run, device, keep_T1 = partial(run_experts, self.experts, x_TD, expert_ids_TK), x_TD.device.type, keep_T.unsqueeze(1)
        # the library's grouped_mm computes in the weights' precision whatever autocast says, its others as autocast says
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and self.before != "grouped_mm"):
            if not apart:
                return run(weights_TK, pairs, step)
            return run(weights_TK * keep_T1, pairs, step) + run(weights_TK * ~keep_T1, sort(~keep_T))


# ---- 4. STGC ----


def is_experts(module: nn.Module) -> bool:
    """Has what the interface's decorator gives a module, and a forward that dispatches."""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "_apply_gate")
    return all(hasattr(module, flag) for flag in flags) and hasattr(type(module).forward, "__wrapped__")


def find_routers(model: nn.Module, path: str) -> list[nn.Module]:
    """The routers in the closest module around the experts at `path` that has any: one, or the copies of it that peft keeps.

    A router is of the class that the model names as the source of its router logits, or of one named as routers are.
    """
    classes = set()
    for module in model.modules():
        found = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        classes |= {getattr(one, "target_class", one) for one in (found if isinstance(found, list) else [found])}
    experts, named = model.get_submodule(path), re.compile("(Router|Gate|Gating)$")
    while path:
        path = path.rpartition(".")[0]
        beside = [module for module in model.get_submodule(path).modules() if experts not in module.modules()]
        if any(is_experts(module) for module in beside):
            break  # from here on, routers are those of other layers
        routers = [module for module in beside if type(module) in classes or named.search(type(module).__name__)]
        if routers:
            return routers
    return []


class PaddedStep(LayerStep):
    """A step whose products hold padding, too. The gradient of a whole weight is compared without padding's share in it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.shares: dict[int, Tensor] = {}  # by linear, as far as the main loss reaches padding

    def on_gradient(self, linear: int, grad_SO: Tensor) -> None:
        super().on_gradient(linear, grad_SO)
        if not self.whole or linear < 0 or grad_SO.is_cuda:
            return
        drop_S = ~self.pairs.onehot_SE.any(1)
        if grad_SO[drop_S].any():
            rows = (self.linears[linear][0], grad_SO * drop_S.unsqueeze(1))
            slices = zip(*(tensor.tensor_split(self.pairs.ends_E.tolist())[:-1] for tensor in rows))
            self.shares[linear] = torch.stack([a_NI.T @ grad_NO for a_NI, grad_NO in slices])

    def find_conflicts(self):
        shares, self.shares = self.shares, {}
        for linear, share_EIO in shares.items():
            self.weight_grads[linear] = self.weight_grads[linear] - share_EIO
        return super().find_conflicts()


def cosine_by_pairs(grad_SO: Tensor, a_SI: Tensor, sum_EIO: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor] | None:
    """As `stgc_plus.weight_cosine`, where G_e sums these pairs alone: <a_n g_n^T, G_e> is the sum over an expert's pairs m
    of (a_n . a_m)(g_n . g_m). None where the product with G_e costs less, since an expert has many pairs, and for lengths so
    large or small that they need the scaling there."""
    ends_E = pairs.ends_E.tolist()
    counts = [end - start for start, end in zip([0, *ends_E], ends_E)]
    if sum(count**2 for count in counts) * (a_SI.shape[1] + grad_SO.shape[1]) >= ends_E[-1] * sum_EIO[0].numel():
        return None
    grad_SO, a_SI, sum_EIO = widen(grad_SO), widen(a_SI), widen(sum_EIO)
    grad_norm_S, a_norm_S = (torch.linalg.vector_norm(rows, dim=-1) for rows in (grad_SO, a_SI))
    sum_norm_E = torch.linalg.vector_norm(sum_EIO, dim=(1, 2))
    lengths = torch.cat([grad_norm_S, a_norm_S, sum_norm_E])
    if not ((lengths == 0) | ((lengths > 1e-10) & (lengths < 1e10))).all():
        return None
    real_SO = grad_SO * pairs.onehot_SE.any(1, keepdim=True)
    slices = zip(*(rows.tensor_split(ends_E)[:-1] for rows in (a_SI, grad_SO, real_SO)))
    dots = [((a_NI @ a_NI.T) * (grad_NO @ real_NO.T)).sum(1) for a_NI, grad_NO, real_NO in slices]
    dot_S, norm_S = F.pad(torch.cat(dots), (0, len(a_SI) - ends_E[-1])), grad_norm_S * a_norm_S
    sum_norm_S = pairs.onehot_SE.to(sum_norm_E.dtype) @ sum_norm_E
    cos_S = dot_S / (norm_S * sum_norm_S).clamp_min(torch.finfo(dot_S.dtype).tiny)
    return cos_S.masked_fill(sum_norm_S == 0, 0.0), norm_S


class ModelSTGC(STGC):
    """`stgc_plus.STGC` on the MoE layers of a model of transformers. `attach` makes it."""

    step_type = PaddedStep

    def cosine(self, grad_SO: Tensor, a_SI: Tensor, sum_EIO: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Of whole weight gradients, by sums of products of pairs where that costs less."""
        found = None if self.num_processes > 1 or a_SI.is_cuda else cosine_by_pairs(grad_SO, a_SI, sum_EIO, pairs)
        return weight_cosine(grad_SO, a_SI, sum_EIO, pairs) if found is None else found

    def __init__(self, model: nn.Module, config: STGCConfig):
        self.padding = Padding()
        super().__init__(model, config)
        for layer in self.layers:  # the newest object on a model is the one that counts
            old = getattr(layer.experts, "stgc_layer", None)
            if old is not None:
                old.remove() if old.stgc is None else old.stgc.detach()
        for layer in self.layers:
            layer.install()
        self.handles = []
        for module in model.modules():
            if module is model or isinstance(module, PreTrainedModel):
                names = list(inspect.signature(module.forward).parameters)
                on_call = partial(self.padding.on_call, names)
                self.handles.append(module.register_forward_pre_hook(on_call, with_kwargs=True))
                self.handles.append(module.register_forward_hook(self.padding.on_return, always_call=True))

    def find_layers(self, model: nn.Module) -> dict[str, Layer]:
        """Every module whose experts go through the interface, by name. Raises ValueError for what cannot be watched."""
        found = {name: module for name, module in model.named_modules() if is_experts(module)}
        if not found:
            raise ValueError(
                f"no experts of {type(model).__name__} go through transformers' experts interface: it has none, or is of a "
                "family outside (switch_transformers, nllb_moe, dbrx, llama4, jetmoe, ...). Build it with stgc.MoELayer"
            )
        layers = {}
        for name, experts in found.items():
            old, routers = getattr(experts, "stgc_layer", None), find_routers(model, name)
            before = experts.config._experts_implementation if old is None else old.before
            if not routers:
                raise ValueError(f"no router near {name}: its class must be named in the model's _can_record_outputs")
            if before == NAME:
                raise ValueError("another attached model shares this config object: build each from copy.deepcopy(config)")
            w_out, spread = experts.down_proj, experts._is_expert_parallel or (getattr(model, "_tp_size", None) or 1) > 1
            if spread or not w_out.is_floating_point() or w_out.element_size() < 2:
                raise ValueError(f"{name} are quantized, or spread over devices: load them whole, in 16 bits or more")
            layers[name] = Layer(experts, routers, before, self.padding)
        return layers

    def on_forward(self, i: int, x_TD: Tensor, routing: Routing, pairs: Pairs, keep_T: Tensor) -> LayerStep | None:
        """As in STGC. Raises ValueError where reroute has no expert to send to."""
        step, layer = super().on_forward(i, x_TD, routing, pairs, keep_T), self.layers[i]
        if step is not None and self.config.conflict_loss == "reroute":
            if routing.weights_TK.shape[1] == layer.experts.num_experts:
                raise ValueError("conflict_loss='reroute' needs top_k below the number of experts: else no expert is left")
        return step

    def loss(self, main_loss: Tensor, grad_scale: float = 1.0) -> Tensor:
        """As in STGC. RuntimeError where all judged experts are frozen, but for select="all", which reads no gradient."""
        judged = [self.layers[step.index] for step in self.steps.values() if step.judged]
        if judged and self.config.select != "all" and not any(layer.experts_train for layer in judged):
            fault = "the experts of all judged layers are frozen, so no tokens conflict in training them"
            peft = "peft: target_parameters=['experts.gate_up_proj', 'experts.down_proj']"
            raise RuntimeError(f"{fault}: unfreeze them ({peft}); they need not be in the optimizer")
        return super().loss(main_loss, grad_scale)

    def detach(self) -> None:
        super().detach()
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            layer.remove()


def attach(model: nn.Module, config: STGCConfig = STGCConfig()) -> ModelSTGC:  # noqa: B008  (frozen)
    """STGC on a model of transformers, or on any module around one. Its parameters and outputs stay as they are.

    Returns an object with the `loss`, `stats`, `verdicts` and `detach` of stgc_plus.STGC; a later one on the same model
    replaces it. Raises ValueError for a model without a layer to watch, or whose config another attached model shares.
    The forward or `loss` raises RuntimeError where router logits or experts get no gradient: frozen, or checkpointed with
    use_reentrant=True. Each message says what to do.
    """
    return ModelSTGC(model, config)


# ---- 5. Trainer ----


def find_additions(main_loss: Tensor, outputs) -> list[str]:
    """Names of the losses that a model adds to its own: scalars with a gradient among its outputs (aux_loss, a z-loss, ...).
    None where `main_loss` is not the model's but the user's (compute_loss_func), or that of label smoothing."""
    named = dict(outputs.items() if isinstance(outputs, dict) else enumerate(outputs))
    if named.pop("loss" if "loss" in named else 0, None) is not main_loss:
        return []
    scalars = {name: [one for one in tree_leaves(value) if isinstance(one, Tensor)] for name, value in named.items()}
    return [str(name) for name, own in scalars.items() if any(one.dim() == 0 and one.requires_grad for one in own)]


class TrainerMixin:
    """class MyTrainer(stgc_hf.TrainerMixin, Trainer): pass. Then MyTrainer(..., stgc_config=STGCConfig()).

    Adds the losses in training, logs their means over the layers and the conflict statistics, and continues at the right
    step when resumed. Evaluation is the Trainer's. `trainer.stgc` is what `attach` returned.

    Raises RuntimeError where the model's loss contains others, such as its own balance loss: they would be judged, too.
    """

    def __init__(self, *args, stgc_config: STGCConfig, **kwargs):
        self.stgc_config = stgc_config
        super().__init__(*args, **kwargs)
        self.stgc = attach(self.model, stgc_config)

    def call_model_init(self, trial=None):  # `train` makes the model anew where a model_init is given
        model = super().call_model_init(trial)
        self.stgc = attach(model, self.stgc_config)
        return model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        resumed = self.state.global_step * self.args.gradient_accumulation_steps
        self.stgc.step = max(self.stgc.step, resumed)  # the forward below belongs to it
        main_loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = main_loss
        if torch.is_grad_enabled():  # not in evaluation
            if added := find_additions(main_loss, outputs):
                fault = f"the model adds {', '.join(added)} to its loss, which tokens would be judged by"
                balance = "set output_router_logits=False in its config, STGCConfig.alpha adds one"
                others = "turn them off, or give the Trainer a compute_loss_func"
                raise RuntimeError(f"{fault}. A balance loss: {balance}. Others: {others}")
            scaler = self.accelerator.scaler
            loss = self.stgc.loss(main_loss, 1.0 if scaler is None else scaler.get_scale())
            if num_items_in_batch is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
                loss = main_loss + (loss - main_loss) / self.current_gradient_accumulation_steps  # as main_loss is already
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            rows = self.stgc.stats()
            for key in ("conflict_ratio", "consistency", "balance_loss", "conflict_loss"):
                values = [row[key] for row in rows if key in row]
                logs |= {key: sum(values) / len(values)} if values else {}
        super().log(logs, *args, **kwargs)
