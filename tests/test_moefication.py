"""lab/moe/moefication.py through models of transformers, tiny and random: parity with the dense model, padding, files."""

import copy
import io
import itertools
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, GPTNeoXConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import stgc
import stgc_plus
from lab.moe import moefication
from lab.moe.baselines import CosineRouter
from lab.moe.moefication import MoESpec, load_moefied, moefy

FAMILIES = {
    "bert": transformers.BertForSequenceClassification,
    "roberta": transformers.RobertaForSequenceClassification,
    "electra": transformers.ElectraForSequenceClassification,
    "xlm-roberta": transformers.XLMRobertaForSequenceClassification,
    "camembert": transformers.CamembertForSequenceClassification,
}
PAD = 1


def make_model(model_class=FAMILIES["bert"], dtype=torch.float64, attention="sdpa", **options):
    """Four layers without dropout, in eval mode; the FFN's biases and the weights are large enough to matter."""
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": PAD, "num_labels": 3}
    config = model_class.config_class(**small, **off, max_position_embeddings=40, initializer_range=0.5, **options)
    config._attn_implementation = attention
    model = model_class(config).to(dtype).eval()
    for layer in model.base_model.encoder.layer:
        nn.init.normal_(layer.intermediate.dense.bias)
        nn.init.normal_(layer.output.dense.bias)
    return model


def make_batch(lengths=(7, 4, 9), width=9):
    """Sequences of these lengths, padded on the right to the width."""
    keep_BL = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(2, 50, (len(lengths), 40), generator=torch.Generator().manual_seed(1))[:, :width]
    return {"input_ids": ids.masked_fill(~keep_BL, PAD), "attention_mask": keep_BL.long()}


def outputs(model, batch):
    """(logits, the last hidden state of the real tokens): what padding must not touch."""
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    return out.logits, out.hidden_states[-1][batch["attention_mask"].bool()]


def moe_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, stgc.MoELayer)]


def assert_same(ours, theirs, tolerance=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- 1. Neurons ----


@pytest.mark.parametrize("shape", [(6, 2), (6, 3), (8, 2), (4, 4), (5, 1)])
def test_balanced_assignment_is_the_best_of_all(shape):
    rows, clusters = shape
    for seed in range(5):
        cost_FE = np.random.default_rng(seed).normal(size=shape)
        labels_F = moefication.balanced_assignment(cost_FE)
        assert np.bincount(labels_F, minlength=clusters).tolist() == [rows // clusters] * clusters
        every = set(itertools.permutations([e for e in range(clusters) for _ in range(rows // clusters)]))
        best = min(cost_FE[np.arange(rows), list(labels)].sum() for labels in every)
        assert cost_FE[np.arange(rows), labels_F].sum() == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("split", moefication.SPLITS)
@pytest.mark.parametrize("num_experts", [1, 2, 8])
def test_splits_are_equal_partitions_that_a_seed_decides(split, num_experts):
    w_FD = torch.randn(32, 6)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    neurons_EN = moefication.split_neurons(w_FD, num_experts, split, seed=3)
    assert neurons_EN.shape == (num_experts, 32 // num_experts)
    assert sorted(neurons_EN.flatten().tolist()) == list(range(32))
    assert torch.equal(neurons_EN, moefication.split_neurons(w_FD, num_experts, split, seed=3))
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    if split == "random":
        assert not torch.equal(neurons_EN, moefication.split_neurons(w_FD, num_experts, split, seed=4))


def within_distance(w_FD, neurons_EN):
    """Sum over the parts of the squared distances between the part's normalised rows and their mean."""
    rows_END = F.normalize(w_FD, dim=1)[neurons_EN]
    return (rows_END - rows_END.mean(1, keepdim=True)).square().sum().item()


def test_kmeans_groups_alike_neurons():
    for seed in range(3):
        w_FD = torch.randn(64, 8, dtype=torch.float64)
        parts = {split: moefication.split_neurons(w_FD, 4, split, seed) for split in moefication.SPLITS}
        assert within_distance(w_FD, parts["kmeans"]) < 0.85 * within_distance(w_FD, parts["random"])
    # planted clusters come back, however long their rows: the rows are normalised
    centres_ED, planted_F = 3 * torch.eye(4, 8), torch.randperm(64) % 4
    w_FD = (centres_ED[planted_F] + 0.1 * torch.randn(64, 8)) * torch.rand(64, 1).add(0.1).exp() ** 3
    found_EN = moefication.split_neurons(w_FD, 4, "kmeans", seed=0)
    assert all(len(set(planted_F[part].tolist())) == 1 for part in found_EN)


def test_unequal_clusters_are_balanced():
    planted_F = torch.tensor([0] * 40 + [1] * 8)
    w_FD = torch.eye(2, 6)[planted_F] + 0.05 * torch.randn(48, 6)
    found_EN = moefication.split_neurons(w_FD, 2, "kmeans", seed=0)
    small = next(part for part in found_EN if 1 in planted_F[part])
    assert planted_F[small].sum() == 8  # the small cluster stays whole, filled up from the large one


def test_uneven_split_names_numbers_and_fix():
    with pytest.raises(ValueError, match=r"24 neurons .* into 7 equal experts: take num_experts=6, or experts='copy'"):
        moefication.split_neurons(torch.randn(24, 3), 7)
    with pytest.raises(ValueError, match="split='kmean' is none of kmeans"):
        moefication.split_neurons(torch.randn(24, 3), 2, "kmean")


# ---- 2. Experts ----


@pytest.mark.parametrize("bias", [True, False])
def test_experts_are_copies_of_the_ffn_or_its_parts(bias):
    first, last = nn.Linear(5, 12, bias, dtype=torch.float64), nn.Linear(12, 5, bias, dtype=torch.float64)
    x_TD = torch.randn(9, 5, dtype=torch.float64)
    dense_TD = last(F.gelu(first(x_TD)))

    def expert(experts, e):
        ids_TK = torch.full((9, 1), e)
        pairs = stgc_plus.Pairs(ids_TK, torch.ones(9, 1, dtype=torch.float64), experts.num_experts)
        return experts(x_TD, pairs)

    copies = moefication.copy_ffn(moefication.FFN(first, last, F.gelu), 3)
    assert_same([expert(copies, e) for e in range(3)], [dense_TD] * 3)
    for split in moefication.SPLITS:
        parts = moefication.split_ffn(moefication.FFN(first, last, F.gelu), num_experts=4, top_k=4, split=split)
        assert_same([sum(expert(parts, e) for e in range(4))], [dense_TD])
    before = copies.w_in_EDF[0].clone()
    first.weight.data.zero_()
    assert torch.equal(copies.w_in_EDF[0], before) and copies.w_in_EDF.is_contiguous() and copies.w_in_EDF.requires_grad


def test_experts_that_were_trained_apart_are_copies_of_their_models_ffns_in_turn(tmp_path):
    """Everything else is the encoder's; no memory is shared, and a saved model needs the others no more."""
    batch, spec = make_batch(), MoESpec("1,3", num_experts=5, top_k=1, router="cosine")
    torch.manual_seed(5)
    base, *others = (make_model() for _ in range(3))
    dense = {name: value.clone() for name, value in base.state_dict().items()}
    layers = {i: [moefication.bert_ffn(other.base_model.encoder.layer[i]) for other in others] for i in (1, 3)}
    moe = moefy(base, spec, [moefication.ffns_of(other, spec) for other in others])
    x_TD = torch.randn(9, 16, dtype=torch.float64)
    for (i, ffns), layer in zip(layers.items(), moe_layers(moe), strict=True):
        for e in range(5):
            ffn, pairs = ffns[e % 2], stgc_plus.Pairs(torch.full((9, 1), e), torch.ones(9, 1, dtype=torch.float64), 5)
            assert_same([layer.experts(x_TD, pairs)], [ffn.last(ffn.activation(ffn.first(x_TD)))])
            assert not torch.equal(ffn.first.weight, dense[f"bert.encoder.layer.{i}.intermediate.dense.weight"])
    same = [name for name, value in moe.state_dict().items() if name in dense and torch.equal(value, dense[name])]
    assert len(same) == len(dense) - 2 * 4
    moe.save_pretrained(tmp_path)
    before = outputs(moe, batch)
    for other in others:
        for parameter in other.parameters():
            parameter.data.zero_()
    assert_same(outputs(moe, batch), before, 0)
    assert_same(outputs(load_moefied(tmp_path), batch), before, 0)


# ---- 3. Spec ----


def test_layers_are_parsed():
    parse = moefication.parse_layers
    assert parse("10", 24) == (10,)
    assert parse("5, 1,3", 24) == (1, 3, 5)
    assert parse("every-second", 5) == (1, 3)
    assert parse("every-second", 24) == tuple(range(1, 24, 2))
    assert parse("all", 3) == (0, 1, 2)
    for text, layers in [("10", 10), ("-1", 4), ("1,4", 4), ("every-second", 1)]:
        with pytest.raises(ValueError, match=rf"has {layers} layers: 0 to {layers - 1}"):
            parse(text, layers)
    for text in ("", "one", "1,,2", "every_second", "1-3"):
        with pytest.raises(ValueError, match="neither indices such as 1,3,5 nor every-second nor all"):
            parse(text, 24)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"top_k": 9}, "top_k=9 must lie between 1 and num_experts=8"),
        ({"top_k": 0}, "top_k=0 must lie between"),
        ({"num_experts": 2.0}, "num_experts=2.0 must be of type int"),
        ({"normalize": 1}, "normalize=1 must be of type bool"),
        ({"layers": 3}, "layers=3 must be of type str"),
        ({"experts": "copies"}, "experts='copies' is none of copy, split"),
        ({"split": "k"}, "split='k' is none of kmeans"),
        ({"router": "mlp"}, "router='mlp' is none of linear, cosine"),
    ],
)
def test_bad_specs_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        MoESpec(**bad)


# ---- 4. Parity ----


@pytest.mark.parametrize(
    "family, top_k, attention",
    [(family, 2, "sdpa") for family in FAMILIES] + [("bert", 1, "eager"), ("bert", 4, "sdpa"), ("electra", 3, "eager")],
)
def test_copies_equal_the_dense_model(family, top_k, attention):
    dense = make_model(FAMILIES[family], attention=attention)
    spec = MoESpec("every-second", num_experts=4, top_k=top_k, router="cosine" if top_k == 2 else "linear")
    moe = moefy(copy.deepcopy(dense), spec)
    assert [type(layer.output.dense) is stgc.MoELayer for layer in moe.base_model.encoder.layer] == [
        False,
        True,
        False,
        True,
    ]
    batch = make_batch()
    assert_same(outputs(moe, batch), outputs(dense, batch))
    no_mask = {"input_ids": batch["input_ids"][2:]}
    assert_same([moe(**no_mask).logits], [dense(**no_mask).logits])


def test_copies_equal_the_dense_model_before_a_step_not_after():
    dense = make_model()
    moe = moefy(copy.deepcopy(dense), MoESpec("all", num_experts=4))
    batch = make_batch()
    moe(**batch, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None for layer in moe_layers(moe) for p in layer.experts.parameters())
    torch.optim.SGD(moe.parameters(), lr=0.1).step()
    assert (outputs(moe, batch)[0] - outputs(dense, batch)[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "family, split", [(family, "kmeans") for family in FAMILIES] + [("bert", "random"), ("bert", "contiguous")]
)
def test_all_parts_with_equal_weights_equal_the_dense_model(family, split):
    dense = make_model(FAMILIES[family])
    moe = moefy(copy.deepcopy(dense), MoESpec("0,2", num_experts=4, top_k=4, experts="split", split=split))
    batch = make_batch()
    assert (outputs(moe, batch)[0] - outputs(dense, batch)[0]).abs().max() > 1e-6  # the router matters
    for layer in moe_layers(moe):
        layer.router.weight.data.zero_()
    assert_same(outputs(moe, batch), outputs(dense, batch))


def test_a_linear_router_of_parts_starts_as_their_centres():
    model = make_model()
    rows_FD = F.normalize(model.bert.encoder.layer[1].intermediate.dense.weight.detach(), dim=1)
    moefy(model, MoESpec("1", num_experts=4, experts="split", seed=2))
    neurons_EN = moefication.split_neurons(rows_FD, 4, "kmeans", seed=2)
    assert_same([moe_layers(model)[0].router.weight], [torch.stack([rows_FD[part].mean(0) for part in neurons_EN])])


def test_half_of_the_parts_get_the_whole_last_bias():
    model = make_model()
    ffn = model.bert.encoder.layer[1].output.dense
    ffn.weight.data.zero_()
    bias_D = ffn.bias.detach().clone()
    layer = moe_layers(moefy(model, MoESpec("1", num_experts=4, top_k=2, experts="split")))[0]
    x_TD = torch.randn(11, 16, dtype=torch.float64)
    assert_same([layer(x_TD)], [bias_D.expand(11, 16)])


# ---- 5. Padding ----


@pytest.mark.parametrize(
    "family, attention", [(family, "sdpa") for family in FAMILIES] + [("bert", "eager"), ("roberta", "eager")]
)
def test_padding_reaches_no_expert_and_changes_nothing(family, attention):
    moe = moefy(make_model(FAMILIES[family], attention=attention), MoESpec("1,2", num_experts=4, top_k=1, experts="split"))
    seen = []
    for layer in moe_layers(moe):
        layer.register_forward_hook(lambda layer, args, out: seen.append(out.detach().abs().sum(-1) > 0))
    batch = make_batch()
    short = outputs(moe, batch)
    assert len(seen) == 2
    for touched_BL in seen:  # the output of a padding position is zero
        assert torch.equal(touched_BL, batch["attention_mask"].bool())
    assert_same(outputs(moe, make_batch(width=14)), short)  # more padding
    for row, length in enumerate((7, 4, 9)):  # none at all: no mask is made, and none is left from before
        alone = {name: value[row : row + 1, :length] for name, value in batch.items()}
        seen.clear()
        assert_same(outputs(moe, alone)[:1], [short[0][row : row + 1]])
        assert all(touched_BL.all() for touched_BL in seen)
    left = {name: value.flip(1) for name, value in batch.items()}  # padding on the left
    seen.clear()
    outputs(moe, left)
    assert all(torch.equal(touched_BL, left["attention_mask"].bool()) for touched_BL in seen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masks_of_every_attention_are_read(dtype):
    keep_BL = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    bool_BHLL = keep_BL[:, None, None, :].expand(-1, 1, 3, -1)
    for hidden in (torch.finfo(dtype).min, -torch.inf, -10_000.0):
        float_BHLL = torch.zeros(3, 1, 3, 3, dtype=dtype).masked_fill(~bool_BHLL, hidden)
        assert torch.equal(moefication.keep_mask(float_BHLL), keep_BL)
    biased_BHLL = float_BHLL + torch.randn(3, 4, 3, 3).to(dtype)  # an additive bias hides nothing
    for mask in (keep_BL, keep_BL.long(), bool_BHLL, biased_BHLL):
        assert torch.equal(moefication.keep_mask(mask), keep_BL)
    packed_BHLL = torch.block_diag(torch.ones(2, 2), torch.ones(1, 1)).bool()[None, None]  # two sequences in one row
    assert moefication.keep_mask(packed_BHLL).all()


def test_masks_that_cannot_be_read_are_refused():
    for mask, what in [(torch.ones(2, 3, 3), r"\(2, 3, 3\)"), ("block", "str")]:
        with pytest.raises(ValueError, match=f"cannot tell padding from an attention mask {what}: use .*sdpa"):
            moefication.keep_mask(mask)
    moe = moefy(make_model(), MoESpec("1", num_experts=2))
    attention = moe.bert.encoder.layer[1].attention
    with pytest.raises(ValueError, match="attention mask for 2 tokens, layer with 3"):
        attention(torch.randn(1, 3, 16, dtype=torch.float64), torch.ones(1, 1, 3, 2, dtype=torch.bool))


def test_a_mask_serves_one_forward_and_all_rows():
    moe = moefy(make_model(), MoESpec("1", num_experts=4))
    batch = make_batch()
    full = {"input_ids": batch["input_ids"]}
    expected = moe(**full).logits
    moe_layers(moe)[0].mask = torch.zeros(3, 9, dtype=torch.bool)  # as a forward leaves it that fails in the attention
    assert torch.equal(moe(**full).logits, expected)
    seen = []
    moe_layers(moe)[0].register_forward_hook(lambda layer, args, out: seen.append(out.abs().sum(-1) > 0))
    keep_L = torch.arange(9) < 5
    moe(**full, attention_mask=keep_L.expand(1, 1, 9, 9))  # one mask for the three rows
    assert torch.equal(seen[0], keep_L.expand(3, 9))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_checkpointing_gives_the_same_gradients(attention):
    moe = moefy(make_model(attention=attention), MoESpec("1,3", num_experts=4, experts="split", seed=1)).train()
    batch = make_batch() | {"labels": torch.tensor([0, 1, 2])}
    calls = []
    moe_layers(moe)[0].register_forward_hook(lambda layer, args, out: calls.append(out.detach()))

    def gradients():
        moe.zero_grad()
        moe(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None}

    plain = gradients()
    moe.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = gradients()
    assert len(calls) == 3 and torch.equal(calls[1], calls[2])  # the recomputation saw the same padding
    assert (calls[2].abs().sum(-1) == 0).sum() == (batch["attention_mask"] == 0).sum() > 0
    assert plain.keys() == recomputed.keys()
    assert_same(recomputed.values(), plain.values())


def clones(model):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


def test_copies_and_pickles_of_a_model_refer_to_their_own_layers():
    moe = moefy(make_model(), MoESpec("1,3", num_experts=4, top_k=1, experts="split"))
    batch = make_batch()
    keep_BL, masks = batch["attention_mask"].bool(), []
    logits = moe(**batch).logits
    for clone in clones(moe):
        masks.clear()
        for layer in moe_layers(clone):
            layer.register_forward_pre_hook(lambda layer, args: masks.append(layer.mask))
        for layer in moe_layers(moe):
            layer.mask = "untouched"
        assert torch.equal(clone(**batch).logits, logits)
        assert len(masks) == 2 and all(torch.equal(mask, keep_BL) for mask in masks)
        assert all(layer.mask == "untouched" for layer in moe_layers(moe))
        for layer in moe_layers(moe):
            layer.mask = None
        assert type(clone.config) is moefication.MoefiedBertConfig and clone.config.moe == moe.config.moe


# ---- 6. Conversion ----


def test_only_what_must_change_changes():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24
    )
    first, second = (transformers.BertForMaskedLM(config) for _ in range(2))
    torch.manual_seed(5)
    state, other = torch.get_rng_state(), second.state_dict()
    moe = moefy(first.train(), MoESpec("2", num_experts=4, seed=9))
    assert moe is first
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        second.config is config and config.model_type == "bert" and not hasattr(config, "moe")
    )  # a shared config is left alone
    assert all(module.config is moe.config for module in moe.modules() if hasattr(module, "config"))
    assert moe.config.moe == {"layers": "2", "num_experts": 4, "top_k": 2, "experts": "copy", "split": "kmeans"} | {
        "router": "linear",
        "num_clusters": 128,
        "max_experts": 16,
        "normalize": True,
        "seed": 9,
    }
    assert moe.config._attn_implementation == config._attn_implementation
    changed = moe.state_dict().keys() ^ other.keys()
    assert changed and all(".layer.2.intermediate." in name or ".layer.2.output.dense." in name for name in changed)
    layer = moe_layers(moe)[0]
    assert layer.training and all(part.training for part in layer.modules())
    assert not moe_layers(moefy(second.eval(), MoESpec("0", num_experts=4)))[0].training


@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_the_seed_decides_the_routers(router):
    def routers(seed):
        layers = moe_layers(moefy(make_model(), MoESpec("1,2", num_experts=4, router=router, seed=seed)))
        assert all(isinstance(layer.router, CosineRouter if router == "cosine" else stgc.Router) for layer in layers)
        return [torch.cat([p.flatten() for p in layer.router.parameters()]) for layer in layers]

    a, b, c = routers(3), routers(3), routers(4)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0]) and not torch.equal(a[0], a[1])


def test_dtype_and_normalize_are_taken_over():
    moe = moefy(make_model(dtype=torch.bfloat16), MoESpec("1", num_experts=4, normalize=False))
    assert {p.dtype for p in moe.parameters()} == {torch.bfloat16}
    assert moe_layers(moe)[0].normalize is False
    assert torch.isfinite(outputs(moe, make_batch())[0]).all()


def test_what_does_not_fit_is_refused():
    spec = MoESpec("1", num_experts=4)
    small = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = {**small, "hidden_size": 16, "intermediate_size": 24}
    distil = transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
    )
    with pytest.raises(ValueError, match="'distilbert' is not BERT-like; supported model types: bert, roberta, electra"):
        moefy(distil, spec)
    with pytest.raises(ValueError, match="'gpt2' is not BERT-like"):
        moefy(transformers.GPT2Model(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)), spec)
    with pytest.raises(ValueError, match="Linear is not a model of transformers; supported model types: bert"):
        moefy(nn.Linear(2, 2), spec)
    with pytest.raises(ValueError, match="is_decoder=True"):
        moefy(transformers.BertLMHeadModel(transformers.BertConfig(**bert, is_decoder=True)), spec)
    with pytest.raises(ValueError, match=r"chunk_size_feed_forward=8 .* set it to 0"):
        moefy(transformers.BertModel(transformers.BertConfig(**bert, chunk_size_feed_forward=8)), spec)
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="has 4 layers: 0 to 3"):
        moefy(model, MoESpec("1,10", num_experts=4))
    with pytest.raises(ValueError, match=r"24 neurons .* 5 equal experts: take num_experts=4"):
        moefy(model, MoESpec("1", num_experts=5, experts="split"))
    assert model.config.model_type == "bert" and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    moefy(model, MoESpec("1", num_experts=5))  # copies need no divisor
    with pytest.raises(ValueError, match="'moefied-bert' is an MoE already"):
        moefy(model, MoESpec("2", num_experts=5))


def test_a_config_is_enough_to_check_a_spec():
    config = make_model().config
    assert moefication.check_spec(MoESpec("every-second"), config).layers == "1,3"
    with pytest.raises(ValueError, match="0 to 3"):
        moefication.check_spec(MoESpec("10"), config)


# ---- 7. Files ----


def save(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "spec", [MoESpec("1,3", 4), MoESpec("all", 4, 3, "split", "kmeans", "cosine", normalize=False, seed=7)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_gives_the_same_logits_bit_for_bit(family, spec, tmp_path):
    model = make_model(FAMILIES[family], dtype=torch.float32)
    save(model, tmp_path / "dense")
    model = moefy(type(model).from_pretrained(tmp_path / "dense"), spec)  # as a script gets it: from files
    state = torch.get_rng_state()
    assert sorted(path.name for path in save(model, tmp_path / "moe").iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_moefied(tmp_path / "moe")
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded) is type(model) and not loaded.training and loaded.num_labels == 3
    assert loaded.config.model_type == model.config.model_type == f"moefied-{family}"
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert all(p.requires_grad for p in loaded.parameters())
    batch = make_batch()
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, batch), outputs(model, batch), strict=True))
    again = load_moefied(save(loaded, tmp_path / "moe"))  # over the files it came from
    assert torch.equal(outputs(again, batch)[0], outputs(model, batch)[0])


def test_tied_weights_and_mixed_dtypes_are_kept(tmp_path):
    model = moefy(make_model(transformers.BertForMaskedLM, dtype=torch.bfloat16), MoESpec("2", num_experts=4))
    moe_layers(model)[0].router.float()
    loaded = load_moefied(save(model, tmp_path))
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    assert moe_layers(loaded)[0].router.weight.dtype == torch.float32
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {
        name: p.dtype for name, p in model.named_parameters()
    }
    assert torch.equal(outputs(loaded, make_batch())[0], outputs(model, make_batch())[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes_refuse_a_moefied_folder(family, tmp_path):
    save(moefy(make_model(FAMILIES[family], dtype=torch.float32), MoESpec("1", num_experts=4)), tmp_path)
    for auto in (transformers.AutoModel, transformers.AutoModelForSequenceClassification, transformers.AutoConfig):
        with pytest.raises(ValueError, match=f"model type `moefied-{family}`"):
            auto.from_pretrained(tmp_path)


def edit_config(**changes):
    def edit(folder):
        content = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit


def edit_weights(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors = {name: value.clone() for name, value in tensors.items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


ROUTER = "bert.encoder.layer.1.output.dense.router.weight"
MOE = {"layers": "1", "num_experts": 4}
DAMAGE = {
    "no folder": (shutil.rmtree, "No such file"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "No such file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "No such file"),
    "half a config": (lambda folder: (folder / "config.json").write_text('{"moe": {'), "Expecting|Unterminated"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
    "cut weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08" + bytes(11)), "header|deserializing"),
    "a dense model": (edit_config(model_type="bert"), "its model type is bert, not that of a moefied model"),
    "no model type": (edit_config(model_type=None), "its model type is none"),
    "an unknown family": (edit_config(model_type="moefied-gpt2"), "its model type is moefied-gpt2, not that"),
    "no spec": (edit_config(moe=None), "lacks 'moe'"),
    "a spec of something else": (edit_config(moe=MOE | {"gates": 3}), "gates"),
    "a bad spec": (edit_config(moe=MOE | {"top_k": 5}), "top_k=5 must lie between"),
    "a layer too many": (edit_config(moe=MOE | {"layers": "1,7"}), "0 to 3"),
    "a layer too few": (edit_config(moe=MOE | {"layers": "2"}), "layer.1.output.dense"),
    "other sizes": (edit_config(moe=MOE | {"num_experts": 3}), "size mismatch"),
    "a strange class": (edit_config(architectures=["os"]), r"\['os'\], is not in transformers"),
    "no class": (edit_config(architectures=None), "no valid architectures"),
    "a bad config": (edit_config(hidden_size="wide"), "hidden_size"),
    "a tensor too few": (edit_weights(lambda tensors: tensors.pop(ROUTER)), ROUTER),
    "a tensor too many": (edit_weights(lambda tensors: tensors.update(extra=torch.ones(1))), "extra"),
}


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    folder = save(moefy(make_model(dtype=torch.float32), MoESpec(**MOE)), tmp_path_factory.mktemp("good"))
    load_moefied(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_foreign_folders_give_one_line(damage, good_folder, tmp_path):
    folder = shutil.copytree(good_folder, tmp_path / "model")
    break_it, message = DAMAGE[damage]
    break_it(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_moefied(folder)
    assert str(caught.value).startswith(f"cannot load a moefied model from {folder}: ") and "\n" not in str(caught.value)


# ---- 8. Parameters ----


def test_parameters_are_counted():
    dense = make_model(transformers.BertForMaskedLM)  # its decoder is tied to the embeddings
    total = sum(p.numel() for p in dense.parameters())
    assert moefication.count_parameters(dense) == (total, total)
    ffn, router = 16 * 24 + 24 + 24 * 16 + 16, 16 * 8
    moe = moefy(copy.deepcopy(dense), MoESpec("1,3", num_experts=8, top_k=2))
    assert moefication.count_parameters(moe) == (total + 2 * (7 * ffn + router), total + 2 * (ffn + router))
    moe = moefy(copy.deepcopy(dense), MoESpec("1", num_experts=8, top_k=2, experts="split"))
    biases = 16 * 8  # each part has a last bias of its own
    idle = 6 * (ffn + biases - 16) // 8
    assert moefication.count_parameters(moe) == (total + biases - 16 + router, total + biases - 16 + router - idle)


def make_llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, image_seq_length=4)
    return LlavaForConditionalGeneration(config).double().eval()


def make_prompts() -> dict:
    """Two prompts with a picture each, the second shorter and padded on the left, as `generate` wants them."""
    ids_BL = torch.randint(4, 40, (2, 12))
    ids_BL[:, 5:9] = 3
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, :4] = 0
    return {"input_ids": ids_BL, "attention_mask": mask_BL, "pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}


@torch.no_grad()
def test_a_llava_keeps_its_answers_and_does_not_route_padding(tmp_path):
    """Gated, bias-free FFNs; the mask of a prompt, and of steps with a cache."""
    dense, batch = make_llava(), make_prompts()
    expected, keep = dense(**batch).logits, batch["attention_mask"].bool()
    answer = dense.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0)
    moe, seen = moefy(make_llava(), MoESpec("every-second", num_experts=4)), []
    (layer,) = moe_layers(moe)
    assert moe.model.language_model.layers[1].mlp is layer and layer.experts.gated and layer.experts.b_in_EF is None
    layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1].onehot_SE.sum().item()))
    torch.testing.assert_close(moe(**batch).logits[keep], expected[keep], rtol=1e-9, atol=1e-11)
    assert torch.equal(moe.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0), answer)
    assert seen == [2 * 20, 2 * 20, *[2 * 2] * 5]  # Top-2; in a step of generate each sample has one token
    moe.save_pretrained(tmp_path / "new")
    torch.testing.assert_close(load_moefied(tmp_path / "new")(**batch).logits, moe(**batch).logits, rtol=0, atol=0)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    old = {f"language_model.{name}": value for name, value in load_file(tmp_path / "new" / "model.safetensors").items()}
    save_file({name: value.clone() for name, value in old.items()}, tmp_path / "old" / "model.safetensors")
    with pytest.raises(ValueError, match="save_original_format=False"):
        load_moefied(tmp_path / "old")
    parts = moefy(make_llava(), MoESpec("1", num_experts=4, top_k=4, experts="split"))
    moe_layers(parts)[0].router.weight.zero_()  # equal weights: all parts together are the FFN
    torch.testing.assert_close(parts(**batch).logits[keep], expected[keep], rtol=1e-9, atol=1e-11)


def test_a_language_model_with_another_ffn_is_named():
    config = LlavaConfig(
        vision_config=make_llava().config.vision_config,
        text_config=GPTNeoXConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        ),
        image_token_index=3,
    )
    with pytest.raises(ValueError, match="FFN, GPTNeoXMLP, is not known: use a Llama"):
        moefy(LlavaForConditionalGeneration(config), MoESpec("1", num_experts=2))
