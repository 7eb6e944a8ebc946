"""Two processes with half a batch each do what one does with the whole batch, averaged by hand, under DDP, and with the
weights spread by FSDP: gloo on the CPU, all cases in one start."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import Batch, close, make_batch, make_net, run, same_grads
from forked import METHOD
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

import stgc
import stgc_plus

pytestmark = pytest.mark.slow
CASES = {
    f"{passes} {gradients} {kind} {wrapped}": (
        {"passes": passes, "gradients": gradients, "conflict_loss": kind, "alpha": 0.1},
        wrapped,
    )
    for passes in ("two", "one")
    for gradients, kind in (("bias", "ce"), ("weight", "ce"), ("bias", "reroute"))
    for wrapped in ("by hand", "ddp", "fsdp")
}
CASES |= {f"leave one out {passes}": ({"passes": passes, "leave_one_out": True}, "by hand") for passes in ("two", "one")}
PAPER = [f"the paper {wrapped}" for wrapped in ("by hand", "ddp")]  # stgc.py alone, in torch's own process group
CASES |= {name: ({"conflict_loss": "ce", "alpha": 0.1}, name.removeprefix("the paper ")) for name in PAPER}


def net_and_halves(name: str):
    """As many labelled tokens in each half, so that the mean of their losses is the whole batch's; not as many real ones.
    The seed gives each half conflicts, and an expert that only one of the halves uses."""
    torch.manual_seed(5)
    net = make_net(of=module_of(name))
    return net, make_batch(tokens=8, padding=2, unlabelled=0), make_batch(tokens=8, padding=1, unlabelled=1)


def module_of(name: str):
    return stgc if name in PAPER else stgc_plus


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    found = {}
    for name, (config, wrapped) in CASES.items():
        net, *halves = net_and_halves(name)
        x_TD, labels_T, keep_T = halves[rank]
        model = DistributedDataParallel(net) if wrapped == "ddp" else net
        if wrapped == "fsdp":
            for module in (*net.layers, net):
                fully_shard(module)
        of = module_of(name)
        trainer = of.STGC(model, of.STGCConfig(**config))
        trainer.loss(F.cross_entropy(model(x_TD, keep_T), labels_T)).backward()
        if wrapped == "by hand":  # what DistributedDataParallel does
            for parameter in net.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
        grads = {key: parameter.grad for key, parameter in net.named_parameters()}
        if wrapped == "fsdp":
            grads = {key: grad.full_tensor() for key, grad in grads.items()}
        stats = [{key: value for key, value in row.items() if key != "layer"} for row in trainer.stats()]
        found[name] = {"grads": grads, "verdicts": [verdict._asdict() for verdict in trainer.verdicts], "stats": stats}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, server):
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(work, args=(str(folder),), nprocs=2, start_method=METHOD)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(name, ranks):
    """Flags, statistics and averaged gradients: else means and losses are those of a process, not of the global batch."""
    net, *halves = net_and_halves(name)
    whole = Batch(*(torch.cat(both) for both in zip(*halves, strict=True)))
    expected = run(net, whole, of=module_of(name), **CASES[name][0])
    expected.grads.pop("x_TD")
    results = [rank[name] for rank in ranks]
    for i, truth in enumerate(expected.verdicts):
        both = {key: torch.cat([result["verdicts"][i][key] for result in results]) for key in truth._fields}
        close(both["similarity_TK"], truth.similarity_TK)
        for key in ("judged_TK", "conflict_TK", "picked_TK"):
            assert torch.equal(both[key], getattr(truth, key)), key
        assert all(half_TK.any() for half_TK in truth.conflict_TK.chunk(2))  # there is something to agree on
    for result in results:
        same_grads(result["grads"], expected.grads)
        for row, truth in zip(result["stats"], expected.stats, strict=True):
            assert row.keys() == truth.keys() - {"layer"}
            for key, value in row.items():
                close(value, truth[key])
