"""lab/moe/baselines.py: routers and capacity against plain loops over samples and tokens, and in a decoder's generate."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import close, make_net
from sklearn.metrics import adjusted_rand_score
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import stgc
import stgc_plus
from lab.moe.baselines import (
    FAMILIES,
    ROUTERS,
    CosineRouter,
    EmbeddingRouter,
    FeatureRouter,
    Samples,
    TaskRouter,
    cluster_instructions,
    label_loss,
    limit_capacity,
    make_router,
    nearest_cluster,
    samples_of,
    set_centres,
    share_samples,
)
from lab.vision.instructions import KINDS

# ---- Cosine router ----


def slow_logits(router, x_TD):
    """normalise(W x + b) . normalise(S column) * exp(min(t, log 100)), one number at a time."""
    scale = math.exp(min(router.log_scale.item(), math.log(100)))
    rows = []
    for x_D in x_TD:
        h_P = router.project.weight @ x_D + router.project.bias
        columns = router.experts_PE.unbind(1)
        rows.append([scale * (h_P / h_P.norm()).dot(s_P / s_P.norm()).item() for s_P in columns])
    return torch.tensor(rows, dtype=x_TD.dtype)


@pytest.mark.parametrize("log_scale", [math.log(2), 0.3, math.log(100), 7.0])
def test_cosine_router_is_its_formula(log_scale):
    router = CosineRouter(5, 3, d_project=7, dtype=torch.float64)
    router.log_scale.data.fill_(log_scale)
    x_TD = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(router(x_TD), slow_logits(router, x_TD), rtol=1e-12, atol=1e-12)


def test_cosine_router_starts_as_dynmoe_has_it():
    router = CosineRouter(64, 8)
    assert router.experts_PE.shape == (256, 8) and router.project.weight.shape == (256, 64)
    assert abs(router.experts_PE.std().item() - 0.01) < 0.001
    assert router.log_scale.item() == pytest.approx(math.log(2))
    for size in (1e-3, 1.0, 1e4):
        assert router(size * torch.randn(500, 64)).abs().max() <= 2 + 1e-5  # cosines, times two
    wide = CosineRouter(256, 8)
    along_TD = torch.linalg.solve(wide.project.weight, wide.experts_PE.detach() - wide.project.bias.detach().unsqueeze(1)).T
    torch.testing.assert_close(wide(along_TD).diagonal(), torch.full((8,), 2.0), rtol=1e-3, atol=0)  # the bound is met


def test_cosine_router_is_wide_in_half_precision_and_keeps_float64():
    x_TD = torch.randn(9, 16)
    router = CosineRouter(16, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside_TE = router(x_TD)
    assert inside_TE.dtype == torch.float32
    assert torch.equal(inside_TE, router(x_TD))
    assert CosineRouter(16, 4, dtype=torch.bfloat16)(x_TD.bfloat16()).dtype == torch.float32
    assert CosineRouter(16, 4, dtype=torch.float64)(x_TD.double()).dtype == torch.float64


def test_cosine_router_trains_every_parameter_and_routes():
    router = CosineRouter(8, 4, dtype=torch.float64)
    layer = stgc.MoELayer(stgc_plus.Experts(4, 8, 6, dtype=torch.float64), router, top_k=2)
    layer(torch.randn(10, 8, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in router.parameters())
    x_TD = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(router, (x_TD,))


# ---- Sample-level routers ----

SAMPLE_KINDS = ("embedding", "feature", "task")
LEFT_PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
QUESTION = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0]], dtype=torch.bool)


# ---- Routing by dice ----


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_random_routing(dtype, normalize):
    """Each expert is a first and a second choice as often as any other, whatever the token is; weights are equal."""
    torch.manual_seed(0)
    router, num_tokens = make_router("random", 16, 4, top_k=2), 20_000
    routing = stgc.route(router, torch.ones(num_tokens, 16, dtype=dtype), top_k=2, normalize=normalize)
    assert not [*router.parameters()] and routing.logits_TE.dtype == torch.promote_types(dtype, torch.float32)
    close(routing.weights_TK, torch.full((num_tokens, 2), 0.5), rtol=1e-6)
    for ids_T in routing.expert_ids_TK.T:
        assert (ids_T.bincount(minlength=4) / num_tokens - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / num_tokens)
    assert (routing.expert_ids_TK[:, 0] != routing.expert_ids_TK[:, 1]).all()
    again = stgc.route(router.eval(), torch.ones(num_tokens, 16, dtype=dtype), top_k=2)
    moved = (again.expert_ids_TK[:, 0] != routing.expert_ids_TK[:, 0]).float().mean()
    assert abs(moved - 0.75) < 0.02  # in evaluation, too
    for top_k in (1, 2, 4, 8):
        routing = stgc.route(make_router("random", 16, 8, top_k=top_k), torch.ones(50, 16, dtype=dtype), top_k, normalize)
        assert (top_k * routing.weights_TK - 1).abs().max() < top_k * 2.0**-22


# ---- Sample-level routers ----


def make_sampled_net(kind, **factory):
    """Two layers with routers of a kind, samples set for the 3 x 6 batch above."""
    net = make_net()
    for layer in net.layers:
        layer.router = make_router(kind, 8, 4, num_clusters=3, dtype=torch.float64)
    set_all(share_samples(net))
    return net


def set_all(samples, keep_BL=LEFT_PADDED, rows=slice(None)):
    ids_B = torch.tensor([2, 0, 0])
    samples.set(keep_BL[rows], instruction_BL=QUESTION[rows], cluster_B=ids_B[rows], task_B=ids_B[rows])


def test_embedding_router_by_hand():
    router = EmbeddingRouter(2, 3, num_clusters=3)
    router.clusters_CD.data = torch.tensor([[1.0, 2.0], [9.0, 9.0], [0.0, -1.0]])
    router.router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    set_all(router.samples)
    first_E, last_E = [1.0, 2.0, 3.0], [0.0, -1.0, -1.0]
    assert router(torch.randn(18, 2)).tolist() == [last_E] * 6 + [first_E] * 12
    assert router(torch.randn(3, 2)).tolist() == [last_E, first_E, first_E]  # a step of generate
    router(torch.randn(18, 2)).sum().backward()
    assert (router.clusters_CD.grad.abs().sum(1) > 0).tolist() == [True, False, True]


def test_feature_router_by_hand():
    router = FeatureRouter(2, 3)
    router.router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    first_LD = [[50.0, 50.0], [1.0, 2.0], [3.0, 6.0], [70.0, 7.0]]
    second_LD = [[1.0, 1.0], [8.0, 8.0], [5.0, -5.0], [2.0, 2.0]]
    x_BLD = torch.tensor([first_LD, second_LD], requires_grad=True)
    keep_BL = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])  # as a tokenizer gives it
    router.samples.set(keep_BL, instruction_BL=torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]]))
    logits_TE = router(x_BLD.flatten(0, 1))
    assert logits_TE.tolist() == [[2.0, 4.0, 6.0]] * 4 + [[5.0, -5.0, 0.0]] * 4
    with torch.no_grad():  # steps: whatever they bring, the prompt decides
        assert router(torch.randn(2, 2)).tolist() == router(torch.randn(2, 2)).tolist() == logits_TE[[0, 4]].tolist()
    logits_TE.sum().backward()
    wanted_BL = torch.tensor([[0, 4 * 2 / 2, 4 * 2 / 2, 0], [0, 0, 4 * 2.0, 0]])  # 4 tokens, column sums 2, mean of 2 or 1
    close(x_BLD.grad, wanted_BL.unsqueeze(2).expand(-1, -1, 2))
    assert router.router.weight.grad.abs().min() > 0


@pytest.mark.parametrize("kind", SAMPLE_KINDS)
def test_a_batch_routes_as_its_samples_do_and_padding_does_not_matter(kind):
    net = make_sampled_net(kind)
    router, samples = net.layers[0].router, samples_of(net)
    x_BLD = torch.randn(3, 6, 8, dtype=torch.float64)
    logits_BLE = router(x_BLD.flatten(0, 1)).view(3, 6, 4)
    for b in range(3):
        set_all(samples, rows=slice(b, b + 1))
        close(router(x_BLD[b]), logits_BLE[b])
        start = 6 - LEFT_PADDED[b].sum()
        cut = samples.values | {name: samples.values[name][:, start:] for name in ("keep_BL", "instruction_BL")}
        samples.set(**cut)
        close(router(x_BLD[b, start:]), logits_BLE[b, start:])
    set_all(samples)
    other_BLD = torch.where(LEFT_PADDED.unsqueeze(2), x_BLD, 100.0)
    close(router(other_BLD.flatten(0, 1)).view(3, 6, 4)[LEFT_PADDED], logits_BLE[LEFT_PADDED])
    if kind != "task":
        assert (logits_BLE == logits_BLE[:, :1]).all() and not torch.allclose(logits_BLE[0], logits_BLE[1])


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if kind != "random"])
def test_routers_are_wide_and_come_back_from_their_state(kind, tmp_path):
    def logits(router, dtype=torch.float32):
        if kind in SAMPLE_KINDS:
            set_all(router.samples)
        return router(x_TD.to(dtype))

    torch.manual_seed(1)
    x_TD = torch.randn(18, 16)
    router = make_router(kind, 16, 4, num_clusters=5)
    plain_TE = logits(router)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logits(router).dtype == torch.float32 and torch.equal(logits(router), plain_TE)
    x_TD = x_TD.bfloat16()
    half = copy.deepcopy(router).bfloat16()
    assert torch.equal(logits(half, torch.bfloat16), logits(copy.deepcopy(half).float()))
    assert logits(make_router(kind, 16, 4, dtype=torch.float64), torch.float64).dtype == torch.float64
    plain_TE = logits(router)
    torch.save(router.state_dict(), tmp_path / "router.pt")
    other = make_router(kind, 16, 4, num_clusters=5)
    assert not torch.equal(logits(other), plain_TE)
    other.load_state_dict(torch.load(tmp_path / "router.pt", weights_only=True))
    assert torch.equal(logits(other), plain_TE)


@pytest.mark.parametrize("kind", SAMPLE_KINDS)
@pytest.mark.parametrize("router_only", [False, True])
def test_stgc_trains_sample_routers(kind, router_only):
    """Without the balance loss the total is the main loss, and the routers learn from it (and from labels)."""
    net = make_sampled_net(kind)
    trainer = stgc_plus.STGC(net, stgc_plus.STGCConfig("none", alpha=0.0, router_only=router_only))
    x_BLD = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)
    main_loss = net(x_BLD, LEFT_PADDED).square().mean()
    total = trainer.loss(main_loss)
    assert total.item() == main_loss.item()
    total.backward(retain_graph=True)
    grads = [p.grad.clone() for layer in net.layers for p in layer.router.parameters()]
    assert all(grad.abs().sum() > 0 for grad in grads)
    if kind == "task":
        x_BLD.grad = None
        label_loss(net).backward()
        assert all(p.grad.abs().sum() > 0 for layer in net.layers for p in layer.router.parameters())
        assert (x_BLD.grad is None) == router_only
    for config in ({"passes": "one"}, {"passes": "two"}):  # and conflicting tokens push them as they do any router
        trainer = stgc_plus.STGC(net, stgc_plus.STGCConfig("ce", alpha=0.0, **config))
        net.zero_grad()
        trainer.loss(net(x_BLD, LEFT_PADDED).square().mean()).backward()
        assert all(row["conflict_loss"] > 0 for row in trainer.stats())


def test_label_loss_is_its_loop():
    net = make_sampled_net("task")
    x_BLD = torch.randn(3, 6, 8, dtype=torch.float64)
    net(torch.randn(3, 6, 8, dtype=torch.float64), LEFT_PADDED)  # an earlier forward does not count
    net(x_BLD, LEFT_PADDED)
    start, wanted = label_loss(net), []
    for layer in net.layers:
        losses = []
        for b, expert in enumerate((2, 0, 0)):
            for i in range(6):
                if LEFT_PADDED[b, i]:
                    logits_E = layer.router.router.weight @ x_BLD[b, i]
                    losses.append(logits_E.exp().sum().log() - logits_E[expert])
        wanted.append(sum(losses) / len(losses))
        x_BLD = torch.tanh(x_BLD + layer(x_BLD, LEFT_PADDED))
    close(start, sum(wanted) / 2)

    x_BLD = x_BLD.detach()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        net(x_BLD, LEFT_PADDED)
        label_loss(net).backward()
        optimizer.step()
    assert label_loss(net) < start / 2
    with torch.no_grad():
        net(x_BLD, LEFT_PADDED)
        assert all(layer.router.last_logits_TE is None for layer in net.layers)
        share_samples(net)  # decides by itself: no samples are needed
        net(x_BLD[:1], LEFT_PADDED[:1])
    with pytest.raises(RuntimeError, match="gradients on"):
        label_loss(net)


def test_families_beyond_the_experts_wrap_around():
    router = TaskRouter(4, 3)
    router.samples.set(torch.ones(2, 2), task_B=torch.tensor([FAMILIES["region"], FAMILIES["vqa"]]))
    logits_TE = router(torch.randn(4, 4))
    close(label_loss(router), F.cross_entropy(logits_TE, torch.tensor([0, 0, 1, 1])))
    assert sorted(FAMILIES) == sorted(KINDS) and set(FAMILIES.values()) == set(range(4))


def test_labels_under_gradient_checkpointing(monkeypatch):
    def grads(call):
        net = copy.deepcopy(start)
        net.call = call
        main_loss = net(x_BLD, LEFT_PADDED).square().mean()
        (main_loss + label_loss(net)).backward()
        kept = [layer.router.last_logits_TE for layer in net.layers]
        return [p.grad for p in net.parameters()], kept

    start, x_BLD = make_sampled_net("task"), torch.randn(3, 6, 8, dtype=torch.float64)
    plain, _ = grads(lambda layer, *inputs: layer(*inputs))
    made, plain_forward = [], TaskRouter.forward
    monkeypatch.setattr(TaskRouter, "forward", lambda self, x_TD: made.append(plain_forward(self, x_TD)) or made[-1])
    again, kept = grads(lambda layer, *inputs: checkpoint(layer, *inputs, use_reentrant=False))
    for a, b in zip(again, plain, strict=True):
        close(a, b)
    assert len(made) == 4 and all(a is b for a, b in zip(kept, made[:2], strict=True))  # the forward's, not the recomputed


@pytest.mark.parametrize("kind", SAMPLE_KINDS)
def test_a_copy_has_samples_of_its_own(kind):
    net = make_sampled_net(kind)
    x_BLD = torch.randn(3, 6, 8, dtype=torch.float64)
    y_BLC = net(x_BLD, LEFT_PADDED)  # leaves a graph
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert samples_of(other) is not samples_of(net)
        assert torch.equal(other(x_BLD, LEFT_PADDED), y_BLC)
        samples_of(other).set(torch.ones(1, 2))
        assert torch.equal(net(x_BLD, LEFT_PADDED), y_BLC)
    assert not any("samples" in name for name in net.state_dict())


def test_samples_are_shared_once_the_model_is_built():
    net = make_net()
    assert share_samples(net) is None and samples_of(net) is None
    for layer in net.layers:
        layer.router = FeatureRouter(8, 4)
    with pytest.raises(RuntimeError, match="share_samples"):
        samples_of(net)
    assert isinstance(share_samples(net), Samples)
    assert samples_of(net) is net.layers[0].router.samples is net.layers[1].router.samples


def test_samples_that_do_not_fit():
    samples = Samples()
    router = FeatureRouter(8, 4)
    for wrong in (
        {"keep_BL": LEFT_PADDED[0]},
        {"keep_BL": LEFT_PADDED[:, :1]},
        {"keep_BL": LEFT_PADDED, "instruction_BL": QUESTION[:2]},
        {"keep_BL": LEFT_PADDED, "instruction_BL": QUESTION | ~LEFT_PADDED},
        {"keep_BL": LEFT_PADDED, "instruction_BL": QUESTION & QUESTION[1:2]},
        {"keep_BL": LEFT_PADDED, "cluster_B": torch.zeros(2)},
        {"keep_BL": LEFT_PADDED, "task_B": torch.zeros(3, 1)},
    ):
        with pytest.raises(ValueError, match="_B"):
            samples.set(**wrong)
        assert samples.values == {} and samples.batch == 0
    with pytest.raises(RuntimeError, match="need instruction_BL"):
        router(torch.randn(18, 8))
    router.samples.set(LEFT_PADDED, task_B=torch.zeros(3))
    with pytest.raises(RuntimeError, match="need instruction_BL"):
        router(torch.randn(18, 8))
    set_all(router.samples)
    with pytest.raises(RuntimeError, match="no forward of the prompt"):
        router(torch.randn(3, 8))
    for tokens in (17, 12, 21, 6):
        with pytest.raises(ValueError, match="3 x 6"):
            router(torch.randn(tokens, 8))
    router(torch.randn(18, 8))
    set_all(router.samples)  # a new batch: the old prompt is not its
    with pytest.raises(RuntimeError, match="no forward of the prompt"):
        router(torch.randn(3, 8))
    with pytest.raises(ValueError, match="no TaskRouter"):
        label_loss(router)
    with pytest.raises(ValueError, match="is none of linear, cosine, random"):
        make_router("dice", 8, 4)


def test_clusters():
    middle_CD = 20 * torch.randn(5, 6)
    true_N = torch.arange(5).repeat(8)
    embeddings_ND = middle_CD[true_N] + torch.randn(40, 6)
    centres_CD = cluster_instructions(embeddings_ND, 5, seed=0)
    cluster_N = nearest_cluster(embeddings_ND, centres_CD)
    assert adjusted_rand_score(true_N, cluster_N) == 1.0
    for c in range(5):
        torch.testing.assert_close(centres_CD[c], embeddings_ND[cluster_N == c].mean(0), rtol=1e-5, atol=1e-5)
    assert cluster_N.tolist() == [min(range(5), key=lambda c: (x_D - centres_CD[c]).norm()) for x_D in embeddings_ND]
    assert torch.equal(centres_CD, cluster_instructions(embeddings_ND, 5, seed=0))
    few_CD = cluster_instructions(middle_CD.repeat(9, 1), 128, seed=0)  # never more than distinct instructions
    assert few_CD.shape == (5, 6) and few_CD.dtype == torch.float32
    close(few_CD[nearest_cluster(middle_CD, few_CD)], middle_CD, rtol=1e-6)


def test_centres_go_with_the_model():
    net, other = make_sampled_net("embedding"), make_sampled_net("embedding")
    embeddings_ND = torch.randn(20, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="set_centres"):
        nearest_cluster(embeddings_ND, net.layers[0].router.centres_CD)
    centres_CD = cluster_instructions(embeddings_ND, 3, seed=0)
    set_centres(net, centres_CD)
    other.load_state_dict(net.state_dict())
    assert all(torch.equal(layer.router.centres_CD, centres_CD) for layer in other.layers)
    assert "centres_CD" not in dict(net.layers[0].router.named_parameters())
    with pytest.raises(ValueError, match="routers built for"):
        set_centres(net, centres_CD[:1])  # would broadcast
    with pytest.raises(ValueError, match="no EmbeddingRouter"):
        set_centres(make_net(), centres_CD)


# ---- Capacity ----


def slow_limited(layer, x_BLD, keep_BL, capacity, bpr):
    """The layer's output under a capacity, one sample, choice and token after the other; dropped pairs, pairs."""
    experts, y_BLD, counts = layer.experts, torch.zeros_like(x_BLD), [0, 0]
    for b, x_LD in enumerate(x_BLD):
        tokens = [i for i in range(len(x_LD)) if keep_BL[b, i]]
        probs = {i: torch.softmax(layer.router.weight @ x_LD[i], 0) for i in tokens}
        chosen = {i: sorted(range(4), key=lambda e: -probs[i][e])[: layer.top_k] for i in tokens}
        room = [math.ceil(len(tokens) * layer.top_k * capacity / 4)] * 4
        kept = {i: [] for i in tokens}
        for k in range(layer.top_k):
            for i in sorted(tokens, key=lambda i: -probs[i].max()) if bpr else tokens:
                e = chosen[i][k]
                counts[1] += 1
                if room[e] > 0:
                    room[e] -= 1
                    kept[i].append(e)
                else:
                    counts[0] += 1
        for i in tokens:
            total = sum(probs[i][e] for e in kept[i]) if layer.normalize else 1.0
            for e in kept[i]:
                h_F = F.gelu(x_LD[i] @ experts.w_in_EDF[e] + experts.b_in_EF[e])
                y_BLD[b, i] += layer.scale * probs[i][e] / total * (h_F @ experts.w_out_EFD[e] + experts.b_out_ED[e])
    return y_BLD, counts


@pytest.mark.parametrize("bpr", [False, True])
@pytest.mark.parametrize("capacity", [0.125, 0.5, 1.0, 1.25])
@pytest.mark.parametrize("layer_of", [{}, {"top_k": 1}, {"top_k": 3, "normalize": False}, {"scale": 2.0}], ids=str)
def test_capacity_is_its_loop(capacity, bpr, layer_of):
    layer = make_net(1, **layer_of).layers[0].requires_grad_(False)
    keep_BL = torch.rand(4, 9) > 0.2  # padding anywhere
    x_BLD = torch.randn(4, 9, 8, dtype=torch.float64) + torch.randn(8)  # one expert is liked
    y_BLD, (dropped, pairs) = slow_limited(layer, x_BLD, keep_BL, capacity, bpr)
    with limit_capacity(layer, capacity, bpr) as limit:
        close(layer(x_BLD, keep_BL), y_BLD)
        assert limit.share == dropped / pairs and (dropped > 0 or capacity > 1)
        layer.mask = keep_BL
        close(layer(x_BLD), y_BLD)
        close(layer(mask=keep_BL, x=x_BLD), y_BLD)
        for b in range(4):  # batch size 1, (L, D), and without the padding
            close(layer(x_BLD[b : b + 1], keep_BL[b : b + 1]), y_BLD[b : b + 1])
            close(layer(x_BLD[b, keep_BL[b]]), y_BLD[b, keep_BL[b]])
        assert (limit.dropped, limit.pairs) == (5 * dropped, 5 * pairs)


def test_capacity_by_hand():
    """Top-2 of 4, five tokens, capacity 0.8: room for two pairs on an expert; weights as DeepSpeed's top2gating has them."""
    layer = stgc.MoELayer(stgc_plus.Experts(4, 4, 2, dtype=torch.float64), top_k=2)
    layer.router.weight.data = torch.eye(4, dtype=torch.float64)
    likes_0_then_1 = [[0.50, 0.30, 0.15, 0.05], [0.60, 0.30, 0.06, 0.04]]
    likes_0_then_2 = [[0.40, 0.05, 0.35, 0.20], [0.70, 0.10, 0.15, 0.05]]
    probs_TE = torch.tensor([*likes_0_then_1, *likes_0_then_2, [0.02, 0.30, 0.66, 0.02]])
    x_TD = probs_TE.double().log()
    with limit_capacity(layer, 0.8) as limit:
        weights_TK = limit_weights(layer, x_TD)
    # expert 0: tokens 0 and 1. Expert 2: token 4 first, then the second choice of 2, not of 3. Expert 1: 0 and 1, not 4
    close(weights_TK, [[5 / 8, 3 / 8], [2 / 3, 1 / 3], [0, 1], [0, 0], [1, 0]], rtol=1e-6)
    assert limit.share == 4 / 10
    with limit_capacity(layer, 0.8, bpr=True) as limit:
        weights_TK = limit_weights(layer, x_TD)
    # by score 3 (.7), 4 (.66), 1 (.6), 0 (.5), 2 (.4). Expert 0: 3, 1. Expert 2: 4 and 3, not 2. Expert 1: 4, 1, not 0
    close(weights_TK, [[0, 0], [2 / 3, 1 / 3], [0, 0], [14 / 17, 3 / 17], [66 / 96, 30 / 96]], rtol=1e-6)
    assert limit.share == 4 / 10


def limit_weights(layer, x_TD):
    layer(x_TD)
    return layer.routing(x_TD).weights_TK


def test_capacity_leaves_no_trace_and_large_ones_change_nothing():
    net = make_net(normalize=True)
    x_BLD, keep_BL = torch.randn(3, 7, 8, dtype=torch.float64), torch.rand(3, 7) > 0.3
    plain_BLC, step_BLC = net(x_BLD, keep_BL), net(x_BLD[:, :1])
    before = [repr(vars(layer)) for layer in net.layers]
    with limit_capacity(net, 4.0, bpr=True) as limit:
        assert torch.equal(net(x_BLD, keep_BL), plain_BLC) and limit.share == 0
    with limit_capacity(net, 0.01) as limit:
        assert limit.share == 0
        assert torch.equal(net(x_BLD[:, :1]), step_BLC) and limit.share == 0  # steps of generate: never dropped
        assert not torch.allclose(net(x_BLD, keep_BL), plain_BLC) and limit.share > 0.3
        with pytest.raises(RuntimeError, match="limited already"), limit_capacity(net, 1.0):
            pass
    assert torch.equal(net(x_BLD, keep_BL), plain_BLC)
    with pytest.raises(ValueError, match="does not fit"), limit_capacity(net, 0.5):
        net(x_BLD, keep_BL[:2])
    assert torch.equal(net(x_BLD, keep_BL), plain_BLC)
    assert [repr(vars(layer)) for layer in net.layers] == before
    for model, capacity in ((net, 0.0), (net, -1.0), (net, math.inf), (net, math.nan), (net.head, 1.0)):
        with pytest.raises(ValueError, match="must be positive"), limit_capacity(model, capacity):
            pass


# ---- In a decoder ----


class Ffn(torch.nn.Module):
    """An MLP of transformers: called with (B, L, D) alone. Notes what the router was given, and what it gave."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.seen = layer, []
        layer.router.register_forward_hook(lambda router, args, out: self.seen.append((len(args[0]), out)))

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("kind", SAMPLE_KINDS)
def test_generate_routes_by_the_prompt_and_batches_change_nothing(kind):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=2, pad_token_id=0, eos_token_id=None, bos_token_id=1, **size)
    model = LlamaForCausalLM(config).double().eval()
    for block in model.model.layers:
        router = make_router(kind, 16, 4, num_clusters=3, dtype=torch.float64)
        experts = stgc_plus.Experts(4, 16, 32, gated=True, bias=False, activation=F.silu, dtype=torch.float64)
        block.mlp = Ffn(stgc.MoELayer(experts, router))
    for p in model.parameters():
        p.data *= 3  # answers that depend on what was asked
    samples = share_samples(model)
    ids_BL = torch.randint(2, 50, (3, 6)).masked_fill(~LEFT_PADDED, 0)
    greedy = {"do_sample": False, "max_new_tokens": 4}
    set_all(samples)
    answer_BL = model.generate(ids_BL, attention_mask=LEFT_PADDED.long(), **greedy)[:, 6:]
    for block in model.model.layers:
        (tokens, prompt_TE), *steps = block.mlp.seen
        assert tokens == 18 and [tokens for tokens, _ in steps] == [3, 3, 3]
        if kind != "task":
            assert all(torch.equal(step_BE, prompt_TE.view(3, 6, 4)[:, 0]) for _, step_BE in steps)
    for b in range(3):
        set_all(samples, rows=slice(b, b + 1))
        alone = model.generate(ids_BL[b : b + 1], attention_mask=LEFT_PADDED[b : b + 1].long(), **greedy)
        assert torch.equal(alone[0, 6:], answer_BL[b])
    if kind == "feature":
        with pytest.raises(ValueError, match="generate needs its cache"):
            model.generate(ids_BL[b : b + 1], attention_mask=LEFT_PADDED[b : b + 1].long(), use_cache=False, **greedy)
