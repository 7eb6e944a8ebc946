"""Token gradients of one MoE layer: ours beside the general tools for gradients per sample.

  python -m lab.bench.peers                                       256 tokens, 8 experts, Top-2, float32, CPU
  python -m lab.bench.peers --output results/peers.json           writes the record that docs/costs.md shows

Each way computes the same numbers from the same weights: for every pair (token, expert), the gradient of the main loss at
both biases of the expert, in full. Only the biases require a gradient. All must give the same flags before one is timed.
Each has the layer in a form that it can handle; routing is part of its time, building the form is not. Opacus is measured
where it is installed: pip install opacus.
"""

import copy
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import stgc
from lab.bench.measure import compare, line_of, peak_bytes, take_turns, write_record
from lab.run.cli import Parser, RunFailed, number, path, run_main, say
from lab.run.runs import environment

SIZES = (8, 128, 256)  # experts, hidden size, expert size
CLASSES, TOP_K = 16, 2
CLOSE = 1e-4  # between similarities in float32


class Problem:
    """A layer, a head, and tokens with labels. `experts`: those of the layer as modules of two nn.Linear, with equal
    weights."""

    def __init__(self, tokens: int, sizes: tuple[int, int, int] = SIZES):
        torch.manual_seed(0)
        self.layer, self.head = stgc.MoELayer(stgc.Experts(*sizes), top_k=TOP_K), nn.Linear(sizes[1], CLASSES)
        self.x_TD, self.labels_T = torch.randn(tokens, sizes[1]), torch.randint(CLASSES, (tokens,))
        self.experts = [self.as_module(e) for e in range(sizes[0])]
        for module in (self.layer, self.head, *self.experts):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name.endswith(("b_in_EF", "b_out_ED", "0.bias", "2.bias")))

    def as_module(self, e: int) -> nn.Sequential:
        stacked = self.layer.experts
        module = nn.Sequential(nn.Linear(*stacked.w_in_EDF[e].shape), nn.GELU(), nn.Linear(*stacked.w_out_EFD[e].shape))
        values = stacked.w_in_EDF[e].T, stacked.b_in_EF[e], stacked.w_out_EFD[e].T, stacked.b_out_ED[e]
        module.load_state_dict(dict(zip(module.state_dict(), values, strict=True)))
        return module

    def loss(self, x_TD: Tensor, y_TD: Tensor, labels_T: Tensor) -> Tensor:
        """Of all tokens, or of some: their part of the mean over all."""
        return F.cross_entropy(self.head(x_TD + y_TD), labels_T, reduction="sum") / len(self.x_TD)

    def empty(self) -> list[Tensor]:
        """To be filled with the gradients of all pairs: one tensor per linear."""
        _, d_model, d_ff = self.layer.experts.w_in_EDF.shape
        return [self.x_TD.new_zeros(len(self.x_TD), TOP_K, size) for size in (d_ff, d_model)]


class Looped:
    """The forward of an MoE layer as a loop over the experts in use."""

    def __init__(self, problem: Problem, experts: list[Callable[[Tensor], Tensor]], of: slice = slice(None)):
        """of: the tokens."""
        x_TD = problem.x_TD[of]
        routing = problem.layer.routing(x_TD)
        y_TD, self.pairs = torch.zeros_like(x_TD), {}  # expert -> its tokens, and which of their choices it is
        for e in routing.expert_ids_TK.unique().tolist():
            token_N, choice_N = self.pairs[e] = (routing.expert_ids_TK == e).nonzero(as_tuple=True)
            weight_N1 = routing.weights_TK[token_N, choice_N].unsqueeze(1)
            y_TD = y_TD.index_add(0, token_N, experts[e](x_TD[token_N]) * weight_N1)
        self.loss = problem.loss(x_TD, y_TD, problem.labels_T[of])


# ---- The ways: each gives the gradients of the in and of the out biases, (T, K, F) and (T, K, D) ----


def ours(problem: Problem) -> list[Tensor]:
    """The first of STGC's two passes: a backward to the outputs of the linears, whose rows are the gradients."""
    watch = stgc.STGC(problem.layer)
    loss = problem.loss(problem.x_TD, problem.layer(problem.x_TD), problem.labels_T)
    step = watch.steps.pop(0)
    return [step.pairs.by_token(grad_SO) for grad_SO in torch.autograd.grad(loss, list(step.edges.values()))]


def backward_per_token(problem: Problem) -> list[Tensor]:
    """A forward and a backward of each token alone: with the others in the graph, each backward would run through all."""
    found = problem.empty()
    for t in range(len(problem.x_TD)):
        alone = Looped(problem, problem.experts, slice(t, t + 1))
        biases = [linear.bias for e in alone.pairs for linear in problem.experts[e][::2]]
        grads = iter(torch.autograd.grad(alone.loss, biases))
        for _, choice_1 in alone.pairs.values():
            for grad_TKO in found:
                grad_TKO[t, choice_1] = next(grads)
    return found


def vmap_grad(problem: Problem) -> list[Tensor]:
    """A token on all experts, with weight 0 for those that it did not choose, as two products that all tokens share (X =
    E * F). With a token's own experts alone, vmap would copy their weights for each token."""
    experts, routing = problem.layer.experts, problem.layer.routing(problem.x_TD)
    weights_TE = torch.zeros_like(routing.logits_TE).scatter(1, routing.expert_ids_TK, routing.weights_TK)
    w_in_DX, w_out_XD = experts.w_in_EDF.transpose(0, 1).flatten(1), experts.w_out_EFD.flatten(0, 1)

    def loss(biases: tuple[Tensor, Tensor], x_D: Tensor, weights_E: Tensor, label: Tensor) -> Tensor:
        b_in_EF, b_out_ED = biases
        a_EF = F.gelu((x_D @ w_in_DX).view_as(b_in_EF) + b_in_EF) * weights_E.unsqueeze(1)
        return problem.loss(x_D, a_EF.flatten() @ w_out_XD + weights_E @ b_out_ED, label)

    per_token = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
    grads = per_token((experts.b_in_EF, experts.b_out_ED), problem.x_TD, weights_TE, problem.labels_T)
    return [grad_TEO.take_along_dim(routing.expert_ids_TK.unsqueeze(2), 1) for grad_TEO in grads]


def grad_samples(problem: Problem, experts: list[nn.Module], wrap: Callable = lambda expert: expert) -> list[Tensor]:
    """A backward that leaves the gradient of each row at `grad_sample`."""
    found, looped = problem.empty(), Looped(problem, [*map(wrap, experts)])
    looped.loss.backward()
    for e, pairs in looped.pairs.items():
        biases = [parameter for parameter in experts[e].parameters() if parameter.requires_grad]
        for grad_TKO, bias in zip(found, biases, strict=True):
            grad_TKO[pairs] = bias.grad_sample
            bias.grad_sample = bias.grad = None
    return found


def find_ways(problem: Problem) -> dict[str, Callable[[], list[Tensor]] | None]:
    """By name; None for what is not installed. The first is the base."""
    ways = {
        "ours, extra backward": partial(ours, problem),
        "one backward per token": partial(backward_per_token, problem),
        "torch.func.vmap(grad)": partial(vmap_grad, problem),
        "call_for_per_sample_grads": partial(grad_samples, problem, problem.experts, call_for_per_sample_grads),
        "Opacus, GradSampleModule": None,
    }
    if importlib.util.find_spec("opacus"):
        from opacus import GradSampleModule

        warnings.filterwarnings("ignore", "Full backward hook is firing")  # the tokens require no gradient
        wrapped = [GradSampleModule(copy.deepcopy(expert), loss_reduction="sum") for expert in problem.experts]
        ways["Opacus, GradSampleModule"] = partial(grad_samples, problem, wrapped)
    return ways


def check_flags(problem: Problem, ways: dict[str, Callable[[], list[Tensor]] | None]) -> stgc.Verdict:
    """The verdict of all. RunFailed if the flags of one differ from the first's."""
    expert_ids_TK = problem.layer.routing(problem.x_TD).expert_ids_TK
    verdicts = {
        name: stgc.find_conflicts(way(), expert_ids_TK, problem.layer.experts.num_experts)
        for name, way in ways.items()
        if way
    }
    first, *_ = verdicts.values()
    for name, verdict in verdicts.items():
        flags = (verdict.conflict_TK != first.conflict_TK).sum().item()
        gap = (verdict.similarity_TK - first.similarity_TK).abs().max().item()
        if flags or not gap < CLOSE:
            raise RunFailed(f"{name}: {flags} flags differ from ours, similarities by up to {gap:.1e}; nothing was timed")
    return first


def main() -> None:
    parser = Parser(prog="lab.bench.peers", description=__doc__)
    parser.add_argument("--tokens", type=number(int, 1), default=256, help="tokens of the batch")
    parser.add_argument("--rounds", type=number(int, 3), default=31, help="timed turns of each way, within rounds")
    parser.add_argument("--threads", type=number(int, 1), default=2, help="threads of the CPU")
    parser.add_argument("--output", type=path("new file"), help="write the record here as json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    problem, device = Problem(args.tokens), torch.device("cpu")
    ways = find_ways(problem)
    conflict_TK = check_flags(problem, ways).conflict_TK
    installed, base = {name: way for name, way in ways.items() if way}, next(iter(ways))
    peaks = {name: peak_bytes(way, device) for name, way in installed.items()}
    rows = compare(take_turns(installed, args.rounds, device), base, peaks)
    say(
        f"{args.tokens} tokens, {args.threads} threads; all flag the same {conflict_TK.sum()} of {conflict_TK.numel()} pairs"
    )
    for name in ways:
        say(line_of(name, rows[name]) if name in rows else f"  {name:<30}not installed")
    content = {"config": vars(args), "base": base, "variants": {name: rows.get(name) for name in ways}}
    content["versions"] = environment(device)["versions"] | {
        "opacus": importlib.metadata.version("opacus") if importlib.util.find_spec("opacus") else None
    }
    write_record(args.output, device, **content, pairs=conflict_TK.numel(), flagged=conflict_TK.sum().item())


if __name__ == "__main__":
    run_main("lab.bench.peers", main, resumes=False)
