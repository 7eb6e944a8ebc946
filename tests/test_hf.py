"""stgc_hf.py against transformers' own models, tiny and random, built from configs. Docstrings say what failing would mean.

The oracle is `judge_slowly`: the library's model with a slow experts function, in which every (token, expert) pair has
biases of its own, and loops over pairs that compare their gradients. It shares nothing with stgc.py or stgc_hf.py.
"""

import copy
import importlib
import json
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from conftest import close
from forked import METHOD
from packaging.version import Version
from torch import nn
from torch.multiprocessing import start_processes
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import stgc_hf
import stgc_plus
from lab.bench import step as bench
from lab.report import costs
from stgc_plus import LayerStep, STGCConfig

TEXT = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "n_shared_experts": 1, "moe_num_shared_experts": 1, "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "first_k_dense_replace": 0, "num_dense_layers": 0, "moe_layer_start_index": 0, "mlp_only_layers": [],
    "decoder_sparse_step": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
MLA = {"num_key_value_heads": 4, "qk_head_dim": 16}  # latent attention
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "mrope_section": [1, 1, 2]}
NOPE = MLA | {
    "qk_rope_head_dim": 0,
    "qk_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 8,
    "index_kpool": 2,
}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
FAMILIES = {  # the model's class, and what its config needs besides TEXT
    "afmoe": ("AfmoeForCausalLM", {}),
    "aria": ("AriaTextForCausalLM", {}),
    "axk1": ("AXK1ForCausalLM", MLA),
    "axk2": ("AXK2ForCausalLM", MLA),
    "bailing_hybrid": ("BailingHybridForCausalLM", MLA | LINEAR),
    "beam": ("BeamForCausalLM", SPARSE),
    "cohere2_moe": ("Cohere2MoeForCausalLM", {}),
    "deepseek_ocr2": ("DeepseekOcr2TextModel", SPARSE),
    "deepseek_v2": ("DeepseekV2ForCausalLM", MLA),
    "deepseek_v3": ("DeepseekV3ForCausalLM", MLA),
    "deepseek_v32": ("DeepseekV32ForCausalLM", MLA),
    "deepseek_v4": ("DeepseekV4ForCausalLM", {"mlp_layer_types": ["hash_moe", "moe"]}),
    "diffusion_gemma": ("DiffusionGemmaEncoderTextModel", {"hidden_size_per_layer_input": 0, "global_head_dim": 8}),
    "dots1": ("Dots1ForCausalLM", {}),
    "dots3_note": ("Dots3NoteForCausalLM", {"num_key_value_heads": 4}),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {}),
    "ernie4_5_vl_moe": ("Ernie4_5_VLMoeTextModel", SPARSE | {"moe_intermediate_size": [16, 16], "rope_parameters": ROPE}),
    "exaone_moe": ("ExaoneMoeForCausalLM", {}),
    "flex_olmo": ("FlexOlmoForCausalLM", {}),
    "flint": ("FlintForCausalLM", {}),
    "gemma4": ("Gemma4ForCausalLM", {"enable_moe_block": True, "hidden_size_per_layer_input": 0, "global_head_dim": 8}),
    "glm4_moe": ("Glm4MoeForCausalLM", {}),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", MLA | SPARSE),
    "glm4v_moe": ("Glm4vMoeTextModel", {"rope_parameters": ROPE}),
    "glm5_next": ("Glm5NextTextModel", NOPE | LINEAR | SPARSE | {"linear_head_dim": 8, "linear_num_heads": 4}),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", MLA),
    "gpt_oss": ("GptOssForCausalLM", {}),
    "granitemoe": ("GraniteMoeForCausalLM", {}),
    "granitemoe_swa": ("GraniteMoeSWAForCausalLM", {}),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", MAMBA | {"layer_types": ["mamba", "attention"]}),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {}),
    "hy_v3": ("HYV3ForCausalLM", SPARSE),
    "hy_v4": ("HYV4ForCausalLM", SPARSE),
    "inkling": ("InklingForCausalLM", {}),
    "inkling2": ("Inkling2ForCausalLM", {}),
    "jamba": ("JambaForCausalLM", {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0,
        "mamba_d_state": 4, "mamba_dt_rank": 4,
    }),
    "kimi_linear": ("KimiLinearForCausalLM", MLA | LINEAR | {"linear_head_dim": 8, "linear_num_heads": 4}),
    "kolibri1": ("Kolibri1ForCausalLM", {}),
    "laguna": ("LagunaForCausalLM", SPARSE),
    "lfm2_moe": ("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "mellum": ("MellumForCausalLM", {}),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", SPARSE),
    "minimax": ("MiniMaxForCausalLM", {}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {}),
    "minimax_m3_vl": ("MiniMaxM3VLForCausalLM", {}),
    "mistral4": ("Mistral4ForCausalLM", MLA | {"head_dim": 16}),
    "mistral_large4": ("MistralLarge4TextModel", MLA),
    "mixtral": ("MixtralForCausalLM", {}),
    "muse_spark": ("MuseSparkTextModel", SPARSE | {"moe_hidden_size": 24}),
    "nemotron_h": ("NemotronHForCausalLM", {
        "layers_block_type": ["moe", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8,
    }),
    "olmoe": ("OlmoeForCausalLM", {}),
    "openai_privacy_filter": ("OpenAIPrivacyFilterForTokenClassification", {"num_labels": 50}),
    "phimoe": ("PhimoeForCausalLM", {"router_jitter_noise": 2.0, "input_jitter_noise": 0.1}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", LINEAR | DELTA),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinkerTextModel", {}),
    "qwen3_next": ("Qwen3NextForCausalLM", LINEAR | DELTA),
    "qwen3_vl_moe": ("Qwen3VLMoeTextModel", {}),
    "qwen4_exp": ("Qwen4ExpForCausalLM", LINEAR | DELTA | INDEXER),
    "solar_open": ("SolarOpenForCausalLM", {}),
    "unlimited_ocr": ("UnlimitedOcrTextModel", SPARSE),
    "zaya": ("ZayaForCausalLM", {"num_experts_per_tok": 1, "router_hidden_size": 8}),
}  # fmt: skip


class Headed(nn.Module):
    """A bare text model, as vision-language models have it, with a head and a loss: no PreTrainedModel, as a user's own."""

    def __init__(self, body):
        super().__init__()
        self.body, self.config, self.head = body, body.config, nn.Linear(32, 50)

    def forward(self, input_ids, attention_mask, labels):
        logits = self.head(self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def make(family="mixtral", dtype=torch.float64, implementation="eager", **more):
    """A tiny model with random weights. Its own fast experts do not know float64."""
    torch.manual_seed(0)
    name, needs = FAMILIES[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    cls = getattr(module, name)
    model = cls(cls.config_class(**copy.deepcopy(TEXT | needs | more), experts_implementation=implementation))
    return (Headed(model) if name.endswith("TextModel") else model).to(dtype).train()


def make_batch(padding=3) -> dict:
    """Two sequences, the second with padding behind; labels are random, not the next tokens, and none on padding."""
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 7 - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(3, 50, (2, 7)).masked_fill(mask == 0, -100)}


def forward(model, batch):
    torch.manual_seed(2)  # phimoe draws its experts at random
    return model(**batch)


# ---- 1. The oracle ----


def experts_of(model) -> dict:
    return {name: module for name, module in model.named_modules() if hasattr(module, "has_post_expert_norm")}


class Slow:
    """An experts function for one pair at a time. `seen`: of each pair its expert, the linears' inputs and biases."""

    def __init__(self):
        self.seen = {}

    def __call__(self, experts, x_TD, ids_TK, weights_TK):
        pairs, rows = {}, []
        first = experts.gate_up_proj if experts.has_gate else experts.up_proj
        w_in, w_out = (w if experts.is_transposed else w.transpose(1, 2) for w in (first, experts.down_proj))
        for t, x_D in enumerate(x_TD):
            rows.append(torch.zeros_like(x_D))
            for k, e in enumerate(ids_TK[t].tolist()):
                leaf_h, leaf_y = (torch.zeros(w.shape[2], dtype=x_D.dtype, requires_grad=True) for w in (w_in, w_out))
                h = x_D @ w_in[e] + leaf_h
                if experts.has_bias:
                    h = h + experts.gate_up_proj_bias[e]
                a = experts._apply_gate(h[None])[0] if experts.has_gate else experts.act_fn(h)
                y = a @ w_out[e] + leaf_y
                if experts.has_bias:
                    y = y + experts.down_proj_bias[e]
                if experts.has_post_expert_norm:
                    y = experts.post_expert_norm(y[None])[0]
                rows[-1] = rows[-1] + y * weights_TK[t, k]
                pairs[t, k] = (e, x_D.detach(), leaf_h, a.detach(), leaf_y)
        self.seen[experts] = (pairs, ids_TK.shape)
        return torch.stack(rows).to(x_TD.dtype)


def cos(a, b) -> float:
    norms = (a.norm() * b.norm()).item()
    return (a.flatten() @ b.flatten()).item() / norms if norms > 0 else 0.0


def judge_slowly(model, batch, gradients="bias", loss_of=lambda out: out.loss):
    """Per MoE layer (expert_ids_TK, similarity_TK, judged_TK) of the main loss, by one gradient of each pair alone; None for
    a layer that did not run. And the model's output."""
    slow, before = Slow(), model.config._experts_implementation
    ALL_EXPERTS_FUNCTIONS.register("slow", slow)
    configs = {id(experts.config): experts.config for experts in experts_of(model).values()}
    for config in configs.values():
        config._experts_implementation_internal = "slow"
    out = forward(model, batch)
    keep = batch["attention_mask"].flatten().tolist()
    found = []
    for experts in experts_of(model).values():
        if experts not in slow.seen:  # the vision experts of ernie4_5_vl_moe
            found.append(None)
            continue
        pairs, shape = slow.seen[experts]
        leaves = [leaf for pair in pairs.values() for leaf in (pair[2], pair[4])]
        grads = iter(torch.autograd.grad(loss_of(out), leaves, retain_graph=True, materialize_grads=True))
        grads_of = {}
        for pair, (e, x_D, _, a_F, _) in pairs.items():
            g_h, g_y = next(grads).double(), next(grads).double()
            if not keep[pair[0]]:
                continue
            if experts.has_gate:
                parts = [g_h[::2], g_h[1::2]] if not experts.is_concatenated else list(g_h.chunk(2))
            else:
                parts = [g_h]
            linears = [(x_D.double(), part) for part in parts] + [(a_F.double(), g_y)]
            grads_of[pair] = e, [torch.outer(a, g) if gradients == "weight" else g for a, g in linears]
        similarity, judged = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
        ids = torch.tensor([[pairs[t, k][0] for k in range(shape[1])] for t in range(shape[0])])
        for (t, k), (e, own) in grads_of.items():
            group = [vectors for other, vectors in grads_of.values() if other == e]
            means = [sum(vectors) / len(group) for vectors in zip(*group)]
            judged[t, k] = any(vector.norm() > 0 for vector in own)
            similarity[t, k] = sum(cos(vector, mean) for vector, mean in zip(own, means)) / len(own)
        found.append((ids, similarity, judged))
    for config in configs.values():
        config._experts_implementation_internal = before
    return found, out


def same_as_oracle(stgc, truth, tau, tolerance=1e-9):
    """Similarities and flags; a pair whose similarity lies within rounding of tau may go either way."""
    assert len(stgc.verdicts) == len(truth)
    for verdict, layer in zip(stgc.verdicts, truth):
        assert (verdict is None) == (layer is None)
        if layer is None:
            continue
        _, similarity_TK, judged_TK = layer
        assert torch.equal(verdict.judged_TK, judged_TK)
        close(verdict.similarity_TK, similarity_TK, tolerance, tolerance)
        sure_TK = (similarity_TK - tau).abs() > tolerance
        assert torch.equal(verdict.conflict_TK & sure_TK, judged_TK & (similarity_TK < tau) & sure_TK)


def grads_of(model) -> dict:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def step(model, batch, **config):
    """Verdicts, statistics, logits and all gradients of one step with a STGC object that lives for it only."""
    model.zero_grad(set_to_none=True)
    stgc = stgc_hf.attach(model, STGCConfig(**config))
    out = forward(model, batch)
    stgc.ids = [stgc.steps[i].pairs.expert_ids_TK if i in stgc.steps else None for i in range(len(stgc.layers))]
    stgc.loss(out.loss).backward()
    stgc.rows, stgc.grads, stgc.logits = stgc.stats(), grads_of(model), out.logits.detach()
    stgc.detach()
    return stgc


def same(actual: dict, expected: dict, tolerance=1e-9):
    assert actual.keys() == expected.keys()
    scale = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        assert (actual[name] - grad).abs().max().item() <= tolerance * scale, name


LOOSE = {"inkling2": torch.float32}  # computes in float32 and cannot be float64


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    """The oracle's flags in both passes, logits as without STGC, and the conflict loss trains routers and nothing else."""
    dtype = LOOSE.get(family, torch.float64)
    model, batch, tau = make(family, dtype), make_batch(), 0.3
    # families that compute parts in float32 whatever their weights are: what rounds there differs with the order of sums
    tolerance = 1e-3 if dtype == torch.float32 else 1e-5
    truth, slow_out = judge_slowly(model, batch)
    plain = forward(model, batch)
    close(slow_out.logits, plain.logits, 1e-5, 1e-5)  # the oracle is this model
    plain.loss.backward()
    main = grads_of(model)
    ran = [layer for layer in truth if layer]
    assert any(0 < (judged & (similarity < tau)).sum() < judged.sum() < judged.numel() for _, similarity, judged in ran)

    stgc = stgc_hf.attach(model, STGCConfig(tau=tau, alpha=0.0, router_only=True))
    assert len(stgc.layers) == len(truth)
    model.zero_grad(set_to_none=True)
    out = forward(model, batch)
    close(out.logits, plain.logits, 1e-5, 1e-5)
    (stgc.loss(out.loss) - out.loss).backward()
    same_as_oracle(stgc, truth, tau, tolerance)
    conflict = grads_of(model)
    routers = {p for layer in stgc.layers for p in layer.routers[0].parameters()}
    assert all(p in routers for p in model.parameters() if p.grad is not None and p.grad.any())
    for layer, verdict in ((layer, verdict) for layer, verdict in zip(stgc.layers, stgc.verdicts) if verdict):
        grads = [p.grad for p in layer.routers[0].parameters() if p.grad is not None]
        assert any(grad.any() for grad in grads) == bool(verdict.conflict_TK.any())
    stgc.detach()

    result = step(model, batch, tau=tau, alpha=0.0, passes="one")
    same_as_oracle(result, truth, tau, tolerance)
    same(result.grads, {name: main[name] + conflict[name] for name in main}, tolerance)
    model.eval()
    with torch.no_grad():
        plain = forward(model, batch).logits
        stgc_hf.attach(model, STGCConfig())
        assert torch.equal(forward(model, batch).logits, plain)


def picture_model():
    """A tiny qwen3_vl_moe, and a batch with a picture in each of its two sequences and padding behind the second."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    torch.manual_seed(0)
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    tokens = {"image_token_id": 40, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **tokens, experts_implementation="eager")
    model = Qwen3VLMoeForConditionalGeneration(config).double().train()
    ids = torch.randint(3, 39, (2, 10))
    ids[:, 1:7] = torch.tensor([42, 40, 40, 40, 40, 43])
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = torch.randint(3, 39, ids.shape).masked_fill(mask == 0, -100)
    pictures = {"pixel_values": torch.randn(32, 96).double(), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "mm_token_type_ids": (ids == 40).int()}
    return model, batch | pictures


@pytest.mark.parametrize("passes", ["two", "one"])
def test_picture(passes):
    """A vision-language model: its language model is found inside, picture tokens are judged, padding is not."""
    model, batch = picture_model()
    truth, _ = judge_slowly(model, batch)
    plain = forward(model, batch).logits
    result = step(model, batch, passes=passes, tau=0.3)
    close(result.logits, plain)
    same_as_oracle(result, truth, 0.3)
    picture_T = (batch["input_ids"] == 40).flatten()
    assert result.verdicts[0].conflict_TK[picture_T].any()
    assert model.config.text_config._experts_implementation == "eager"


# ---- 2. Losses, passes, gradients ----


def mixtral_by_hand(model, batch, truth, kind, tau, alpha, beta, router_only):
    """All gradients of main + alpha * balance + beta * conflict, from the oracle's judgement and eq. 8, 9, 10, 13."""
    seen = []
    routers = [module for name, module in model.named_modules() if name.endswith("gate")]
    handles = [router.register_forward_hook(lambda module, args, out: seen.append((module, args[0]))) for router in routers]
    main = forward(model, batch).loss
    for handle in handles:
        handle.remove()
    keep = [t for t, kept in enumerate(batch["attention_mask"].flatten().tolist()) if kept]
    balances, conflicts = [], []
    for (router, x_TD), (ids, similarity, judged) in zip(seen, truth):
        z_TE = (x_TD.detach() if router_only else x_TD) @ router.weight.T
        load = [sum((ids[t] == e).sum().item() for t in keep) / (len(keep) * ids.shape[1]) for e in range(4)]
        balances.append(4 * sum(load[e] * sum(z_TE[t].softmax(-1)[e] for t in keep) / len(keep) for e in range(4)))
        terms = []
        for t, k in (judged & (similarity < tau)).nonzero().tolist():
            e = ids[t, k]
            terms.append(-torch.log_softmax(-z_TE[t], -1)[e] if kind == "ce" else z_TE[t].softmax(-1)[e] ** 2)
        conflicts.append(sum(terms) / len(terms) if terms else z_TE.sum() * 0)
    model.zero_grad(set_to_none=True)
    (main + alpha * sum(balances) / 2 + beta * sum(conflicts) / 2).backward()
    return grads_of(model), [value.item() for value in balances], [value.item() for value in conflicts]


@pytest.mark.parametrize("kind", ["ce", "mse"])
@pytest.mark.parametrize("gradients", ["bias", "weight"])
@pytest.mark.parametrize("passes, router_only", [("two", False), ("two", True), ("one", True)])
@pytest.mark.parametrize("lossy", [False, True])
def test_losses(kind, gradients, passes, router_only, lossy):
    """Flags, losses and every parameter's gradient are those of the oracle and the equations; also where the main loss
    reaches padding, which must not be averaged, flagged or counted then either."""
    model, batch = make(), make_batch()
    if lossy:
        batch["labels"] = batch["labels"].where(batch["labels"] >= 0, 7)
    truth, _ = judge_slowly(model, batch, gradients)
    values = {"tau": 0.1, "alpha": 0.3, "beta": 0.7}
    expected, balances, conflicts = mixtral_by_hand(model, batch, truth, kind, **values, router_only=router_only)
    result = step(model, batch, **values, conflict_loss=kind, passes=passes, gradients=gradients, router_only=router_only)
    same_as_oracle(result, truth, 0.1)
    same(result.grads, expected)
    for row, balance, conflict, (ids, similarity, judged) in zip(result.rows, balances, conflicts, truth):
        close([row["balance_loss"], row["conflict_loss"]], [balance, conflict])
        close(row["conflict_ratio"], (judged & (similarity < 0.1)).sum().double() / (11 * 2))  # 14 tokens, 3 of them padding
        load_E = torch.stack([(ids[batch["attention_mask"].flatten() == 1] == e).sum() for e in range(4)])
        close(row["load"], load_E.double() / 22)


@pytest.mark.parametrize("kind", ["ce", "mse"])
@pytest.mark.parametrize("passes, router_only", [("two", False), ("one", True)])
@pytest.mark.parametrize("case", ["plain", "frozen experts", "checkpointing", "one layer, every second step"])
def test_flat(kind, passes, router_only, case, monkeypatch):
    """select="all": the equations' loss of all pairs but padding, without an extra backward; nothing asks for gradients of
    experts, not even that they train."""
    model, batch, values = make(use_cache=False), make_batch(), {"tau": 0.1, "alpha": 0.3, "beta": 0.7}
    real_T1 = batch["attention_mask"].flatten().bool().unsqueeze(1)
    truth = [(ids, torch.full_like(s, -1.0), real_T1.expand_as(s)) for ids, s, _ in judge_slowly(model, batch)[0]]
    expected, balances, conflicts = mixtral_by_hand(model, batch, truth, kind, **values, router_only=router_only)
    if case == "frozen experts":
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.mlp.gate.requires_grad_(True)
        expected |= {name: torch.zeros_like(grad) for name, grad in expected.items() if ".gate." not in name}
    if case == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    more = {"layers": (1,), "every": 2} if "every" in case else {}
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("an extra backward"))
    stgc = stgc_hf.attach(model, STGCConfig(**values, select="all", conflict_loss=kind, passes=passes, **more))
    for number in range(2):
        model.zero_grad(set_to_none=True)
        main_loss = forward(model, batch).loss
        total = stgc.loss(main_loss)
        total.backward()
        if not more:
            same(grads_of(model), expected)
        judged = [conflicts[i] for i in more.get("layers", (0, 1))] if number % more.get("every", 1) == 0 else [0.0]
        close(total.item(), main_loss.item() + 0.3 * sum(balances) / 2 + 0.7 * sum(judged) / len(judged))
    assert stgc.verdicts == [None, None]
    assert ["conflict_loss" in row for row in stgc.stats()] == [not more, True]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "muse_spark", "aria"])
def test_weight_gradients(family):
    """Whole weights of experts with and without gate, bias, post-expert norm, in both layouts: the oracle's flags, where
    the loss reaches padding too."""
    model, batch = make(family), make_batch()
    batch["labels"] = batch["labels"].where(batch["labels"] >= 0, 7)
    truth, _ = judge_slowly(model, batch, "weight")
    for passes in ("two", "one"):
        same_as_oracle(step(model, batch, tau=0.1, passes=passes, gradients="weight"), truth, 0.1, 1e-5)


@pytest.mark.parametrize("config", [{"conflict_loss": "reroute"}, {"select": "random"}, {"conflict_loss": "none"}])
def test_one_pass_is_two(config):
    """The other losses: the same gradients and flags in both passes, and with reroute the same destinations."""
    model, batch = make(), make_batch()
    two, one = (step(model, batch, tau=0.1, router_only=True, passes=passes, **config) for passes in ("two", "one"))
    same(one.grads, two.grads)
    for a, b in zip(one.verdicts, two.verdicts):
        assert torch.equal(a.picked_TK, b.picked_TK) and torch.equal(a.target_TK, b.target_TK) and a.conflict_TK.any()
    plain = step(model, batch, alpha=0.01, conflict_loss="none", every=0, router_only=True)
    changed = any((one.grads[name] != plain.grads[name]).any() for name in one.grads if "gate.weight" in name)
    assert changed == (config.get("conflict_loss") != "none")


@pytest.mark.parametrize("passes", ["two", "one"])
def test_bias_gradient(passes, monkeypatch):
    """gpt_oss has biases: the token gradients of an expert sum up to its bias's gradient, so the virtual bias is right."""
    model, batch, seen = make("gpt_oss"), make_batch(), []
    on_gradient = LayerStep.on_gradient
    monkeypatch.setattr(
        LayerStep,
        "on_gradient",
        lambda self, linear, grad: (seen.append((self.index, linear, self.pairs, grad)), on_gradient(self, linear, grad))[1],
    )
    step(model, batch, passes=passes, alpha=0.0, conflict_loss="none")
    assert len(seen) == 4
    for index, linear, pairs, grad_SO in seen:
        experts = model.model.layers[index].mlp.experts
        bias = experts.down_proj_bias if linear == 1 else experts.gate_up_proj_bias
        close(pairs.onehot_SE.T @ grad_SO, bias.grad, 1e-12, 1e-14)
        assert bias.grad.any()


@pytest.mark.parametrize("passes, router_only", [("two", False), ("two", True), ("one", True)])
@pytest.mark.parametrize("family, linear", [("gemma4", "proj"), ("hunyuan_v1_moe", "wg"), ("granitemoe", None)])
def test_raw_logits(family, linear, passes, router_only):
    """The conflict loss is that of the router's linear output, though gemma4's router returns probabilities."""
    model, batch, seen = make(family), make_batch(), {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == (linear or "router"):
            module.register_forward_hook(lambda m, args, out: seen.update({m: out if linear else out[0]}) or None)
    result = step(model, batch, passes=passes, router_only=router_only, tau=0.3)
    for z_TE, row, verdict, layer in zip(seen.values(), result.rows, result.verdicts, result.ids):
        losses_TK = -(-z_TE).log_softmax(-1).gather(1, layer)
        close(row["conflict_loss"], losses_TK[verdict.conflict_TK].mean(), 1e-5)


def test_balance_of_the_model():
    """output_router_logits=True: the model's own balance loss can take the place of ours, outside of the token gradients."""
    model, batch = make(), make_batch() | {"output_router_logits": True}
    truth, _ = judge_slowly(model, batch, loss_of=lambda out: out.loss - model.config.router_aux_loss_coef * out.aux_loss)
    stgc = stgc_hf.attach(model, STGCConfig(alpha=0.0, tau=0.1))
    out = forward(model, batch)
    own = model.config.router_aux_loss_coef * out.aux_loss
    (stgc.loss(out.loss - own) + own).backward()
    same_as_oracle(stgc, truth, 0.1)
    assert len(out.router_logits) == 2  # the library's records hold each router's call once
    total, coefficient = grads_of(model), model.config.router_aux_loss_coef
    routers = {name: p for name, p in model.named_parameters() if name.endswith("gate.weight")}
    own_grads = torch.autograd.grad(coefficient * forward(model, batch).aux_loss, [*routers.values()])
    without = step(model, batch | {"output_router_logits": False}, alpha=0.0, tau=0.1).grads
    for name, grad in zip(routers, own_grads):
        assert grad.any()
        close(total[name], without[name] + grad, 1e-5, 1e-6)  # the library computes this loss in float32


def test_some_layers_and_steps(monkeypatch):
    """`layers` and `every`: what is not judged runs the library's own function, and the balance loss goes on."""
    model, batch = make(), make_batch()
    stgc, ours = stgc_hf.attach(model, STGCConfig(layers=(1,), every=2, tau=0.1)), []
    run = stgc_hf.run_experts
    monkeypatch.setattr(stgc_hf, "run_experts", lambda experts, *args: ours.append(experts) or run(experts, *args))
    for number in range(3):
        stgc.loss(forward(model, batch).loss).backward()
        assert stgc.verdicts[0] is None
        assert (stgc.verdicts[1] is not None) == (number != 1)
        assert ours == [model.model.layers[1].mlp.experts] * (number != 1)
        stgc.verdicts[1] = None
        ours.clear()
        assert all(row["balance_loss"] > 0 for row in stgc.stats())


# ---- 3. The model stays as it is ----


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_outputs(family, implementation):
    """Attached to each of the library's implementations: its logits in training and evaluation, and its generation."""
    model, batch = make(family, torch.float32, implementation), make_batch()
    train, evaluate = forward(model, batch).logits, forward(model.eval(), batch).logits
    prompt = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    text = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    stgc = stgc_hf.attach(model, STGCConfig())
    close(forward(model, batch).logits, evaluate, 1e-5, 1e-5)
    assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False), text)
    close(forward(model.train(), batch).logits, train, 1e-5, 1e-5)
    model.generate(**prompt, max_new_tokens=2)  # in training mode, as in reinforcement learning
    stgc.loss(forward(model, batch).loss).backward()
    assert stgc.verdicts[0].judged_TK.any()


def state_of(model) -> dict:
    """All that attaching could leave behind: attributes, classes and numbers of hooks of every module, and the choice."""
    installed = "_output_capturing_hooks_installed"  # the library's, at the first forward
    state = {"implementation": model.config._experts_implementation}
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if "hooks" in key and isinstance(value, dict)}
        state[name] = type(module), set(vars(module)) - {installed}, hooks
    return state


def test_detach_restores():
    """After detach nothing is left: hooks, attributes, implementation, numbers; a later choice of the user's stays."""
    model, batch = make(), make_batch()
    plain = forward(model, batch).logits
    before = state_of(model)
    stgc = stgc_hf.attach(model, STGCConfig())
    attached = state_of(model)
    stgc.loss(forward(model, batch).loss).backward()
    stgc.detach()
    assert state_of(model) == before != attached
    assert torch.equal(forward(model, batch).logits, plain)
    with pytest.raises(ValueError, match="layers"):
        stgc_hf.attach(model, STGCConfig(layers=(7,)))
    assert state_of(model) == before
    stgc = stgc_hf.attach(model, STGCConfig())
    model.set_experts_implementation("batched_mm")
    stgc.detach()
    assert model.config._experts_implementation == "batched_mm"


def test_newest_counts():
    """Attached once more, as a notebook cell that runs twice: the new object watches, and its detach restores all."""
    model, batch = make(), make_batch()
    before = state_of(model)
    first, second = (stgc_hf.attach(model, STGCConfig(tau=0.1)) for _ in range(2))
    loss = forward(model, batch).loss
    with pytest.raises(RuntimeError, match="no forward"):
        first.loss(loss)
    second.loss(loss).backward()
    first.detach()
    with pytest.raises(ValueError, match="layers"):  # an attempt that fails takes nothing away
        stgc_hf.attach(model, STGCConfig(layers=(7,)))
    second.loss(forward(model, batch).loss).backward()
    second.detach()
    assert state_of(model) == before
    stgc_hf.attach(model, STGCConfig())
    stgc_hf.attach(model, STGCConfig()).detach()
    assert state_of(model) == before


def test_copies_are_unwatched():
    """Copies and pickles of an attached model, even between forward and loss, compute as it does, and can be attached."""
    model, batch = make(), make_batch()
    stgc = stgc_hf.attach(model, STGCConfig())
    out = forward(model, batch)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(experts.stgc_layer.watch is None for experts in experts_of(copied).values())
        close(forward(copied, batch).logits, out.logits)
        again = stgc_hf.attach(copied, STGCConfig())
        again.loss(forward(copied, batch).loss).backward()
        again.detach()
        assert copied.config._experts_implementation == "eager"
    stgc.loss(out.loss).backward()


def test_shared_config():
    """A second model of the same config object computes as ever while the first is attached, and cannot be attached too."""
    model, batch = make(), make_batch()
    other = type(model)(model.config).double()
    plain = forward(other, batch).logits
    stgc = stgc_hf.attach(model, STGCConfig())
    close(forward(other, batch).logits, plain)
    with pytest.raises(ValueError, match="deepcopy"):
        stgc_hf.attach(other, STGCConfig())
    stgc.detach()


def test_whatever_mask():
    """No mask, no padding; with a cache the mask's end counts; a 4-D one is the attention's; what cannot be told raises."""
    model, batch = make(), make_batch()
    stgc = stgc_hf.attach(model, STGCConfig(conflict_loss="none"))

    def load(**inputs):
        stgc.loss(model(**inputs).logits.square().mean())
        return [step["judged_ratio"] for step in stgc.stats()]

    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert load(input_ids=ids) == load(input_ids=ids, attention_mask=torch.ones_like(mask)) == [1.0, 1.0]
    assert not stgc.padding.masks
    load(input_ids=ids, attention_mask=mask)
    assert stgc.verdicts[0].judged_TK.all(-1).equal(mask.flatten() == 1)
    load(input_ids=ids, attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.bool).tril())
    assert stgc.verdicts[0].judged_TK.all()
    cache = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    load(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=cache)
    assert stgc.verdicts[0].judged_TK.all(-1).equal(mask[:, 4:].flatten() == 1)
    with pytest.raises(IndexError):
        model(input_ids=ids + 50, attention_mask=mask)
    assert not stgc.padding.masks  # nothing of a forward that failed
    stgc.padding.masks.append(mask)
    with pytest.raises(ValueError, match="without padding"):
        stgc.padding.keep(torch.zeros(9, 32))
    assert stgc.padding.keep(torch.zeros(14, 32)).equal(mask.flatten() == 1)
    stgc.padding.masks.append(torch.ones_like(mask))
    assert stgc.padding.keep(torch.zeros(9, 32)) is None


# ---- 4. What cannot work says so ----


def test_outside_the_interface():
    """A dense model, and a Mixture-of-Experts of another kind: set_experts_implementation would do nothing, silently."""
    with pytest.raises(ValueError, match="interface"):
        stgc_hf.attach(LlamaForCausalLM(LlamaConfig(**TEXT)), STGCConfig())
    sizes = {
        "d_model": 16,
        "d_ff": 16,
        "d_kv": 8,
        "num_heads": 2,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "vocab_size": 50,
    }
    config = transformers.SwitchTransformersConfig(**sizes, num_experts=4)
    with pytest.raises(ValueError, match="switch_transformers"):
        stgc_hf.attach(transformers.SwitchTransformersForConditionalGeneration(config), STGCConfig())


def test_quantized_or_spread():
    """Experts in 8 bits or spread over devices are not what the products here compute."""
    model = make()
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="16 bits"):
        stgc_hf.attach(model, STGCConfig())
    model = make()
    model._tp_size = 2
    with pytest.raises(ValueError, match="spread"):
        stgc_hf.attach(model, STGCConfig())
    model = make()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="16 bits"):
        stgc_hf.attach(model, STGCConfig())


def test_no_router():
    """A block without a module that is a router by class or name; or one whose router did not run."""
    model = make()
    gate = model.model.layers[1].mlp.gate
    model.model.layers[1].mlp.gate = nn.Identity()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts"):
        stgc_hf.attach(model, STGCConfig())
    model.model.layers[1].mlp.gate = gate
    stgc_hf.attach(model, STGCConfig())
    gate._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="router logits"):
        forward(model, make_batch())


@pytest.mark.parametrize("passes", ["two", "one"])
def test_frozen_routers(passes):
    """A conflict loss on a frozen router would train nothing or only the features; measuring, or leaving it out, works."""
    model, batch = make(), make_batch()
    for layer in model.model.layers[:1]:
        layer.mlp.gate.weight.requires_grad_(False)
    stgc = stgc_hf.attach(model, STGCConfig(passes=passes))
    with pytest.raises(RuntimeError, match="modules_to_save"):
        forward(model, batch)
    stgc.detach()
    step(model, batch, passes=passes, layers=(1,))
    assert step(model, batch, passes=passes, conflict_loss="none").verdicts[0].judged_TK.any()


@pytest.mark.parametrize("gradients", ["bias", "weight"])
def test_frozen_experts(gradients):
    """All judged experts frozen: an error. Some of them: the others work, and so do those above that gradients pass."""
    model, batch = make(), make_batch()
    for layer in model.model.layers:
        layer.mlp.experts.requires_grad_(False)
    stgc = stgc_hf.attach(model, STGCConfig(gradients=gradients))
    with pytest.raises(RuntimeError, match="frozen|unfreeze"):
        stgc.loss(forward(model, batch).loss)
    model.model.layers[1].mlp.experts.requires_grad_(True)
    assert step(model, batch, gradients=gradients, layers=(1,)).verdicts[1].judged_TK.any()


def test_reentrant_checkpointing():
    """Its forward has no gradients, so a loss on the router's logits would train nothing."""
    model = make(**{"use_cache": False})
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    stgc = stgc_hf.attach(model, STGCConfig())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        stgc.loss(forward(model, make_batch()).loss)


def test_reroute_needs_an_expert_to_go_to():
    """With every expert on there is no other one: an error, not a loss towards some expert."""
    model = make(num_experts_per_tok=4)
    stgc_hf.attach(model, STGCConfig(conflict_loss="reroute"))
    with pytest.raises(ValueError, match="reroute"):
        forward(model, make_batch())


def test_old_transformers(monkeypatch):
    """An older version lacks what this needs: the import names both versions."""
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"4\.57\.1 is too old, stgc_hf needs 5\.23"):
        importlib.reload(stgc_hf)


# ---- 5. Around the step ----


@pytest.mark.parametrize("gradients", ["bias", "weight"])
@pytest.mark.parametrize("passes", ["two", "one"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_checkpointing(family, passes, gradients):
    """Non-reentrant checkpointing runs each layer twice: the same flags and gradients, and padding known in both runs."""
    batch, config = make_batch(), {"passes": passes, "gradients": gradients, "tau": 0.3}
    expected = step(make(family), batch, **config)
    model = make(family)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    result = step(model, batch, **config)
    same(result.grads, expected.grads)
    for a, b in zip(result.verdicts, expected.verdicts):
        assert torch.equal(a.conflict_TK, b.conflict_TK) and b.conflict_TK.any()


@pytest.mark.parametrize("case", ["bf16", "autocast", "autocast eager", "bf16 experts"])
@pytest.mark.parametrize("passes", ["two", "one"])
def test_bf16(passes, case):
    """A model in bf16, one under autocast, one whose experts alone are bf16: the library's logits, most flags of float32."""
    batch = make_batch()
    expected = step(make(dtype=torch.float32), batch, passes=passes)
    model = make(
        dtype=torch.bfloat16 if case == "bf16" else torch.float32,
        implementation="eager" if "eager" in case else "grouped_mm",
    )
    if case == "bf16 experts":
        for experts in experts_of(model).values():
            experts.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in case):
        plain = forward(model, batch).logits
        result = step(model, batch, passes=passes)
    torch.testing.assert_close(result.logits.float(), plain.float(), rtol=0.05, atol=0.1)  # 8 bits of mantissa
    agree = [(a.conflict_TK == b.conflict_TK).float().mean() for a, b in zip(result.verdicts, expected.verdicts)]
    assert min(agree) > 0.7  # routers in bf16 send some tokens elsewhere
    assert all(grad.isfinite().all() for grad in result.grads.values())
    assert result.grads["model.layers.0.mlp.gate.weight"].any()


@pytest.mark.parametrize("passes", ["two", "one"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards(passes, checkpointing, monkeypatch):
    """Of two forwards before one loss, of other lengths, the latest counts, in the statistics too, whichever autograd or
    checkpointing comes to last; and every parameter's gradient is there. On a GPU whole weights need the earlier's mask."""
    model, first, second = make(use_cache=False), make_batch(), {key: value[:1] for key, value in make_batch(0).items()}
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    forward(model, first).loss.backward()
    main = grads_of(model)
    for gradients in ("bias", "weight"):
        expected = step(model, second, passes=passes, tau=0.3, gradients=gradients)
        model.zero_grad(set_to_none=True)
        stgc = stgc_hf.attach(model, STGCConfig(passes=passes, tau=0.3, gradients=gradients))
        stgc.loss(forward(model, first).loss + forward(model, second).loss).backward()
        same(grads_of(model), {name: main[name] + grad for name, grad in expected.grads.items()})
        for verdict, truth in zip(stgc.verdicts, expected.verdicts):
            assert torch.equal(verdict.conflict_TK, truth.conflict_TK) and verdict.conflict_TK.any()
        close([row["conflict_ratio"] for row in stgc.stats()], [row["conflict_ratio"] for row in expected.rows])
    if checkpointing:
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        losses = forward(model, first).loss + forward(model, second).loss
        with pytest.raises(RuntimeError, match="backward after each forward"):
            stgc.loss(losses).backward()


class Delta(nn.Module):
    """A parametrization as low-rank adapters are: a frozen weight plus the product of two trained ones."""

    def __init__(self, weight):
        super().__init__()
        *lead, rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(*lead, rows, 2, dtype=weight.dtype) * 0.1)
        self.b = nn.Parameter(torch.randn(*lead, 2, columns, dtype=weight.dtype) * 0.1)

    def forward(self, weight):
        return weight + self.a @ self.b


@pytest.mark.parametrize("gradients", ["bias", "weight"])
@pytest.mark.parametrize("passes", ["two", "one"])
def test_adapters(passes, gradients):
    """Frozen experts and routers with low-rank adapters by hand: judged by the adapted weights, and adapters alone train."""
    model, batch = make(), make_batch()
    model.requires_grad_(False)
    for layer in model.model.layers:
        for module, name in [
            (layer.mlp.gate, "weight"),
            (layer.mlp.experts, "gate_up_proj"),
            (layer.mlp.experts, "down_proj"),
        ]:
            nn.utils.parametrize.register_parametrization(module, name, Delta(getattr(module, name)))
    truth, _ = judge_slowly(model, batch, gradients)
    result = step(model, batch, passes=passes, gradients=gradients, tau=0.1)
    same_as_oracle(result, truth, 0.1)
    without = step(model, batch, passes=passes, conflict_loss="none", every=0)
    moved = {name for name in result.grads if (result.grads[name] != without.grads[name]).any()}
    assert any("gate.parametrizations.weight.0.a" in name for name in moved)
    assert all(".parametrizations." in name and "original" not in name for name in moved)


def test_peft():
    """peft's adapters on experts, with the router trained whole or adapted; on attention alone, the errors of frozen parts.
    Where peft is not installed, test_adapters is what holds."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return
    batch, experts = make_batch(), ["experts.gate_up_proj", "experts.down_proj"]
    for extra in ({"modules_to_save": ["gate"]}, {"target_parameters": [*experts, "gate.weight"]}):
        config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "target_parameters": experts} | extra)
        model = get_peft_model(make(), config)
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        plain = forward(model, batch).logits
        for passes, gradients in (("two", "bias"), ("one", "bias"), ("one", "weight")):
            result = step(model, batch, passes=passes, gradients=gradients, tau=0.1)
            close(result.logits, plain)
            assert all(verdict.conflict_TK.any() for verdict in result.verdicts)
            without = step(model, batch, passes=passes, conflict_loss="none", every=0)
            moved = {name for name in result.grads if (result.grads[name] - without.grads[name]).abs().max() > 1e-9}
            assert any("gate." in name and ("modules_to_save" in name or "lora" in name) for name in moved), moved
        merged = copy.deepcopy(model).merge_and_unload() if "modules_to_save" in extra else None
        if merged is not None:
            truth, _ = judge_slowly(merged, batch, "weight")
            same_as_oracle(step(model, batch, passes="one", gradients="weight", tau=0.1), truth, 0.1)
    attention = get_peft_model(make(), LoraConfig(r=2, target_modules=["q_proj"]))
    stgc_hf.attach(attention, STGCConfig())
    with pytest.raises(RuntimeError, match="modules_to_save|unfreeze"):
        forward(attention, batch)


@pytest.mark.slow
@torch._functorch.config.patch(donated_buffer=False)  # else no graph is kept for a second backward
def test_compile():
    """torch.compile, whatever the graph breaks: the same flags and gradients in both passes, and logits in evaluation."""
    model, batch = make(num_hidden_layers=1), make_batch()
    expected = {passes: step(model, batch, passes=passes, tau=0.3) for passes in ("two", "one")}
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    for passes, truth in expected.items():
        result = step(model, batch, passes=passes, tau=0.3)
        same(result.grads, truth.grads)
        assert (
            torch.equal(result.verdicts[0].conflict_TK, truth.verdicts[0].conflict_TK)
            and truth.verdicts[0].conflict_TK.any()
        )
    with torch.no_grad():
        close(forward(model.eval(), batch).logits, truth.logits)
    torch._dynamo.reset()


# ---- 6. Trainer, processes ----


class STGCTrainer(stgc_hf.TrainerMixin, Trainer):
    pass


def trainer(folder, steps, dtype=torch.float32, **arguments):
    batch = make_batch(padding=2)
    rows = [{name: value[i % 2] for name, value in batch.items()} for i in range(16)]
    for i, row in enumerate(rows):
        row["input_ids"] = (row["input_ids"] + i) % 50
    more = {
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "constant",
    }
    args = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **more | arguments,
    )
    # the placebo's draw and `every` depend on the step, so a resumed run shows whether it is right
    config = STGCConfig(select="random", every=3, tau=0.3, alpha=0.1)
    # gpt_oss: a Trainer cannot resume models whose checkpoints name each expert (mixtral), it loads them unconverted
    return STGCTrainer(make("gpt_oss", dtype), args, train_dataset=rows, eval_dataset=rows[:2], stgc_config=config)


def test_trainer(tmp_path):
    """A real Trainer: adds the loss, logs the statistics, evaluates without them, saves, and goes on as if never stopped."""
    whole = trainer(tmp_path / "whole", 4)
    whole.train()
    logs = [row for row in whole.state.log_history if "loss" in row]
    assert len(logs) == 4 and all(
        {"conflict_ratio", "consistency", "balance_loss", "conflict_loss"} <= row.keys() for row in logs
    )
    assert all("conflict_ratio" not in row for row in whole.state.log_history if "eval_loss" in row or "train_loss" in row)
    before = whole.stgc.step
    assert whole.evaluate()["eval_loss"] > 0 and whole.stgc.step == before == 8
    cut = trainer(tmp_path / "cut", 4)
    cut.args.max_steps = 2
    cut.train()
    again = trainer(tmp_path / "cut", 4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    plain = Trainer(make("gpt_oss", torch.float32), whole.args, train_dataset=whole.train_dataset)
    plain.train()
    assert any((a != b).any() for a, b in zip(whole.model.parameters(), plain.model.parameters()))
    reloaded = type(whole.model).from_pretrained(tmp_path / "cut" / "checkpoint-4")  # a plain model of transformers
    assert "stgc" not in (tmp_path / "cut" / "checkpoint-4" / "config.json").read_text()
    assert reloaded.config._experts_implementation != stgc_hf.NAME


def test_trainer_with_model_init(tmp_path):
    """train() then makes the model anew: the one that trains is watched."""
    run = trainer(tmp_path, 1, save_strategy="no")
    run = STGCTrainer(
        None,
        run.args,
        train_dataset=run.train_dataset,
        model_init=lambda: make("gpt_oss", torch.float32),
        stgc_config=STGCConfig(tau=0.3),
    )
    run.train()
    assert run.stgc.layers[0].experts is run.model.model.layers[0].mlp.experts
    assert any("conflict_ratio" in row for row in run.state.log_history)


@pytest.mark.parametrize("scaled", [True, False])
def test_trainer_accumulates(tmp_path, scaled):
    """One step of two micro-batches adds the mean of their two regularisers, whether the model's loss is scaled or not."""
    results = []
    for accumulation in (1, 2):
        run = trainer(tmp_path, 1, torch.float64, gradient_accumulation_steps=accumulation, save_strategy="no")
        run.model_accepts_loss_kwargs = scaled
        run.stgc.detach()
        run.stgc = stgc_hf.attach(run.model, STGCConfig("none", alpha=1.0, every=0))
        grads = {}
        row = run.train_dataset[0]
        run.train_dataset = [row] * 4  # each micro-batch is the same, so that accumulating changes nothing
        run.create_optimizer()
        run.optimizer.register_step_pre_hook(lambda *_, run=run, grads=grads: grads.update(grads_of(run.model)))
        run.args.max_grad_norm = 0.0
        run.train()
        results.append(grads)
    same(results[1], results[0], 1e-6)  # the Trainer hands the number of labels on as a float32


def started(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for config in PROCESSES:
        model, batch = make(), halves()[rank]
        result = step(model, batch, **config)
        for name, grad in result.grads.items():
            dist.all_reduce(grad)
            result.grads[name] = grad / 2  # as DistributedDataParallel does
        flags = [verdict.conflict_TK for verdict in result.verdicts]
        found[str(config)] = result.grads, flags, [row["conflict_ratio"] for row in result.rows]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


PROCESSES = [
    {"passes": passes, "gradients": gradients, "tau": 0.1} for passes in ("two", "one") for gradients in ("bias", "weight")
]


def halves() -> list[dict]:
    """Two batches with as many labels, so that the mean of their losses is the loss of both."""
    first, second = make_batch(), make_batch()
    return [first, second | {"input_ids": second["input_ids"].roll(5, 1).flip(0).clamp(4) - 1, "labels": first["labels"]}]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, server):
    """Flags, statistics and averaged gradients of two processes are those of one with both batches."""
    start_processes(started, args=(str(tmp_path),), nprocs=2, start_method=METHOD)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    both = {name: torch.cat([half[name] for half in halves()]) for name in halves()[0]}
    for config in PROCESSES:
        expected = step(make(), both, **config)
        results = [rank[str(config)] for rank in ranks]
        for i, verdict in enumerate(expected.verdicts):
            assert torch.equal(torch.cat([flags[i] for _, flags, _ in results]), verdict.conflict_TK)
        assert all(flags[1].any() for _, flags, _ in results)
        for grads, _, ratios in results:
            same(grads, expected.grads)
            close(ratios, [row["conflict_ratio"] for row in expected.rows])


def test_lists_of_families():
    """docs/transformers.md and docstring name exactly the families tested here, all that the interface serves."""
    folder = Path(sys.modules["transformers"].__path__[0]) / "models"
    served = {p.parent.name for p in folder.glob("*/modeling_*.py") if "\n@use_experts_implementation" in p.read_text()}
    assert served <= FAMILIES.keys() or Version(sys.modules["transformers"].__version__) >= Version("5.24")
    page = Path("docs/transformers.md").read_text()
    paragraph = re.search(r"<!-- families -->(.*?)<!-- /families -->", page, re.S)[1]
    assert re.findall(r"`(\w+)`", paragraph) == sorted(FAMILIES)
    listed = re.search(r"Families tested[^:]*:(.*?)\.\n", stgc_hf.__doc__, re.S)[1]
    assert re.findall(r"\w+", listed) == sorted(FAMILIES)


@pytest.mark.parametrize("kind", bench.TEXT_MODELS)
def test_bench(kind):
    """What lab.bench measures beside the library: the attached model judges, the library's own is not attached."""
    arguments = ("small", "", 1, 6, torch.device("cpu"))
    assert bench.Bench("eager", *arguments, kind=kind).stgc is None
    measured = bench.Bench("one pass", *arguments, kind=kind)
    measured.step()
    assert measured.stgc.verdicts[0].judged_TK.any()


@pytest.mark.parametrize("kind", bench.TEXT_MODELS)
def test_bench_in_costs(kind, tmp_path, monkeypatch):
    """`--model` writes a record, and docs/costs.md shows its table: one of an unknown name would be left out in silence."""
    cls, config = bench.TEXT_MODELS[kind]
    config = copy.deepcopy(config)
    config.hidden_size, config.intermediate_size = 64, 32
    monkeypatch.setitem(bench.TEXT_MODELS, kind, (cls, config))
    output = tmp_path / "results" / f"bench-{kind}.json"
    output.parent.mkdir()
    words = (
        f"bench --model {kind} --rounds 3 --batch-size 1 --length 6 --threads 1 --device cpu --output {output} --variants"
    )
    monkeypatch.setattr(sys, "argv", [*words.split(), "one pass"])
    bench.main()
    record = json.loads(output.read_text())
    assert list(record["variants"]) == [*bench.LIBRARY, "one pass"] and record["variants"][record["base"]]["ratio"] == 1
    assert "| one pass |" in costs.render(output.parent).partition(f"(`bench-{kind}.json`)")[2]


@pytest.mark.parametrize("passes", ["two", "one"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_whole_weights_are_compared_without_padding_that_has_a_loss(family, passes, monkeypatch):
    """Where the main loss reaches padding, its share in a weight's gradient is taken out. So does the GPU's way, apart."""
    found = []
    for on_gpu in (False, True):
        model, batch = make(family), make_batch()
        batch["labels"] = torch.where(batch["labels"] < 0, 7, batch["labels"])
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", on_gpu)
            stgc = stgc_hf.attach(model, STGCConfig(passes=passes, gradients="weight"))
            stgc.loss(forward(model, batch).loss).backward()
        found.append((stgc.verdicts, grads_of(model)))
    (verdicts, grads), (expected, wanted) = found
    for one, other in zip(verdicts, expected):
        kept = other.judged_TK
        assert torch.equal(one.judged_TK, kept) and not kept.all() and torch.equal(one.conflict_TK, other.conflict_TK)
        torch.testing.assert_close(one.similarity_TK[kept], other.similarity_TK[kept], rtol=1e-9, atol=1e-12)
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("passes", ["two", "one"])
def test_padding_that_is_not_a_number(passes):
    """The library computes padding as tokens. What becomes NaN there changes no loss, flag or statistic of ours."""
    found = []
    for content in (0.0, float("nan")):
        torch.manual_seed(0)
        model, batch = make(), make_batch()
        stgc = stgc_hf.attach(model, STGCConfig(passes=passes, layers=(1,)))  # attention carries NaN on to those below
        drop_BL1 = (batch["attention_mask"] == 0).unsqueeze(2)
        experts = [module for module in model.modules() if stgc_hf.is_experts(module)][-1]
        block = next(module for module in model.modules() if experts in module.children())  # of the last layer
        block.register_forward_pre_hook(lambda _, args, x=content, drop_BL1=drop_BL1: args[0].masked_fill(drop_BL1, x))
        loss = stgc.loss(forward(model, batch).loss)
        loss.backward()
        found.append((loss.item(), stgc.verdicts[1].conflict_TK.tolist(), stgc.stats()))
    assert found[0][0] > 0 and found[0] == found[1]


def test_whole_weights_by_pairs_where_that_costs_less(monkeypatch):
    """Sums of products of pairs equal the product with the weight gradient: with an expert without pairs, padding inside and
    behind the pairs, and without a gradient. Many pairs on an expert, or lengths that need scaling, take the product."""
    torch.manual_seed(0)
    ids_S = torch.tensor([0] * 5 + [2] * 6 + [3] * 3 + [1])
    pairs = stgc_plus.Pairs(ids_S.unsqueeze(1), (ids_S != 1).double().unsqueeze(1), 4)
    a_SI, grad_SO = torch.randn(15, 20).double(), torch.randn(15, 30).double()
    pairs.onehot_SE[3], grad_SO[6] = 0, 0  # padding among expert 0's; without a gradient
    sum_EIO = torch.einsum("se,si,so->eio", pairs.onehot_SE, a_SI, grad_SO)
    real_S = pairs.onehot_SE.any(1)
    for scale in (1.0, 1e-9):
        cos_S, norm_S = stgc_hf.cosine_by_pairs(scale * grad_SO, a_SI, scale * sum_EIO, pairs)
        expected_S, length_S = stgc_plus.weight_cosine(scale * grad_SO, a_SI, scale * sum_EIO, pairs)
        torch.testing.assert_close(cos_S[real_S], expected_S[real_S], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm_S[real_S], length_S[real_S], rtol=1e-12, atol=0.0)
        assert cos_S[6] == 0 and cos_S[real_S].abs().max() <= 1
    for huge in (1e11, 1e-12, float("inf"), float("nan")):
        assert stgc_hf.cosine_by_pairs(huge * grad_SO, a_SI, huge * sum_EIO, pairs) is None
    assert stgc_hf.cosine_by_pairs(grad_SO[:, :4], a_SI[:, :4], sum_EIO[:, :4, :4], pairs) is None  # 6 pairs and more
    calls = []
    monkeypatch.setattr(stgc_hf, "weight_cosine", lambda *args: calls.append(args) or stgc_plus.weight_cosine(*args))
    watch = stgc_hf.attach(make(), STGCConfig(gradients="weight"))
    for processes, few in ((1, True), (2, False)):  # with two, G_e sums the other's pairs, too
        watch.num_processes = processes
        watch.cosine(grad_SO, a_SI, sum_EIO, pairs)
        assert bool(calls) is not few
