"""stgc_hf.py against transformers' own models: tiny, random, built from configs. Each docstring says what failing would mean.

The oracle is `judge_slowly`: the library's model with a slow experts function, in which every (token, expert) pair has a bias
(and weight) gradient of its own, and loops over pairs that compare them. It shares nothing with stgc.py or stgc_hf.py.
"""

import copy
import importlib
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from conftest import close
from torch.multiprocessing import spawn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import stgc_hf
from stgc import LayerStep, STGCConfig

TEXT = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "n_shared_experts": 1, "moe_num_shared_experts": 1, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
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
FAMILIES = {  # the model's class, and what its config needs besides TEXT
    "afmoe": ("AfmoeForCausalLM", {}),
    "aria": ("AriaTextForCausalLM", {}),
    "axk1": ("AXK1ForCausalLM", MLA),
    "axk2": ("AXK2ForCausalLM", MLA),
    "bailing_hybrid": ("BailingHybridForCausalLM", MLA | LINEAR),
    "cohere2_moe": ("Cohere2MoeForCausalLM", {}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", MLA),
    "deepseek_v3": ("DeepseekV3ForCausalLM", MLA),
    "deepseek_v32": ("DeepseekV32ForCausalLM", MLA),
    "dots1": ("Dots1ForCausalLM", {}),
    "dots3_note": ("Dots3NoteForCausalLM", {"num_key_value_heads": 4}),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {}),
    "exaone_moe": ("ExaoneMoeForCausalLM", {}),
    "flex_olmo": ("FlexOlmoForCausalLM", {}),
    "flint": ("FlintForCausalLM", {}),
    "gemma4": ("Gemma4ForCausalLM", {"enable_moe_block": True, "hidden_size_per_layer_input": 0, "global_head_dim": 8}),
    "glm4_moe": ("Glm4MoeForCausalLM", {}),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", MLA | SPARSE),
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
    "kimi_linear": ("KimiLinearForCausalLM", MLA | LINEAR),
    "kolibri1": ("Kolibri1ForCausalLM", {}),
    "laguna": ("LagunaForCausalLM", SPARSE),
    "lfm2_moe": ("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "mellum": ("MellumForCausalLM", {}),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", SPARSE),
    "minimax": ("MiniMaxForCausalLM", {}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {}),
    "minimax_m3_vl": ("MiniMaxM3VLForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {}),
    "nemotron_h": ("NemotronHForCausalLM", {
        "layers_block_type": ["moe", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8,
    }),
    "olmoe": ("OlmoeForCausalLM", {}),
    "openai_privacy_filter": ("OpenAIPrivacyFilterForTokenClassification", {"num_labels": 50}),
    "phimoe": ("PhimoeForCausalLM", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", LINEAR | DELTA),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "qwen3_next": ("Qwen3NextForCausalLM", LINEAR | DELTA),
    "solar_open": ("SolarOpenForCausalLM", {}),
    "zaya": ("ZayaForCausalLM", {"num_experts_per_tok": 1, "router_hidden_size": 8}),
}  # fmt: skip


def make(family="mixtral", dtype=torch.float64, implementation="eager", **more):
    """A tiny model with random weights. Its own fast experts do not know float64."""
    torch.manual_seed(0)
    name, needs = FAMILIES[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    cls = getattr(module, name)
    model = cls(cls.config_class(**copy.deepcopy(TEXT | needs | more), experts_implementation=implementation))
    return model.to(dtype).train()


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
    """An experts function with one pair at a time, and what it saw: x of each pair's linears, and where its gradients come."""

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
    """Per MoE layer (expert_ids_TK, similarity_TK, judged_TK) of the main loss, by one gradient of each pair alone."""
    slow, before = Slow(), model.config._experts_implementation
    ALL_EXPERTS_FUNCTIONS.register("slow", slow)
    configs = {id(experts.config): experts.config for experts in experts_of(model).values()}
    for config in configs.values():
        config._experts_implementation_internal = "slow"
    out = forward(model, batch)
    keep = batch["attention_mask"].flatten().tolist()
    found = []
    for experts in experts_of(model).values():
        if experts not in slow.seen:
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
    for verdict, (_, similarity_TK, judged_TK) in zip(stgc.verdicts, truth):
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
    """One step: the oracle's flags in both passes, logits as without STGC, and the conflict loss trains routers, all of them."""
    dtype = LOOSE.get(family, torch.float64)
    model, batch, tau = make(family, dtype), make_batch(), 0.3
    # families that compute parts in float32 whatever their weights are: what rounds there differs with the order of sums
    tolerance = 1e-3 if dtype == torch.float32 else 1e-5
    truth, slow_out = judge_slowly(model, batch)
    plain = forward(model, batch)
    close(slow_out.logits, plain.logits, 1e-5, 1e-5)  # the oracle is this model
    plain.loss.backward()
    main = grads_of(model)
    assert any(0 < (judged & (similarity < tau)).sum() < judged.sum() < judged.numel() for _, similarity, judged in truth)

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
    for layer, verdict in zip(stgc.layers, stgc.verdicts):
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
