"""`python -m lab.bench --all`, the measurements for a GPU, as far as a CPU can run them."""

import json
import sys
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig

import lab.bench.__main__ as program
from lab.bench import everything, layer, measure, step
from lab.report import costs
from lab.run.cli import RunFailed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    tiny = BertConfig(vocab_size=1100, num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    monkeypatch.setitem(step.SIZES, "small", tiny)


def start(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["lab.bench", "--all", "--device", "cpu", *map(str, words)])
    program.main()


@pytest.mark.slow
def test_all_on_a_cpu(tmp_path, monkeypatch, capsys):
    """The whole path, and that the page's generator takes such a record beside those it shows."""
    monkeypatch.chdir(tmp_path)
    start(monkeypatch)
    record = json.loads((tmp_path / "results" / "bench-cpu.json").read_text())
    assert [*everything.PARTS] == [*record["seconds"]] and all(part in record for part in everything.PARTS)
    assert len(record["layer"]) == len(layer.KINDS) and record["config"]["dtype"] == "torch.bfloat16"
    gated = record["layer"]["64 tokens, hidden size 64, gated"]
    assert {"limit", "dense FFN", "stgc_plus.Experts", "transformers, grouped_mm"} <= gated.keys()
    assert list(record["bert"]) == everything.VARIANTS["bert"] and list(record["lvlm"]) == everything.VARIANTS["lvlm"]
    for rows in (gated, record["bert"], record["lvlm"]):
        assert all(row["rounds"] == everything.CPU.rounds and row["seconds"] > 0 for row in rows.values())
    assert all(row["peak_bytes"] > 0 for row in [*record["bert"].values(), *record["lvlm"].values()])
    assert record["waits"] is None  # not 0: a CPU says nothing about it
    assert sum(record["tests"].values()) == 0 or torch.cuda.is_available()
    assert "written: results/bench-cpu.json" in capsys.readouterr().out
    assert "bench-cpu" not in costs.render(tmp_path / "results")


def part(result, device, sizes, until):
    if isinstance(result, Exception):
        raise result
    return result


FAILURES = {
    "memory": (torch.OutOfMemoryError("out of memory.\nTried"), r"OutOfMemoryError: out of memory.\nTried ("),
    "a library": (KeyError("odd"), "KeyError: 'odd' ("),
    "the tests": (RunFailed("no tests"), "RunFailed: no tests ("),
    "long": (ValueError("x" * 9000), f"ValueError: {'x' * 300} ("),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_part_that_fails_stops_no_other(name, tmp_path, monkeypatch):
    error, reason = FAILURES[name]
    parts = {"layer": ({"a": 1}, 1), "bert": (error, 1), "lvlm": ({"b": 2}, 1)}
    monkeypatch.setattr(everything, "PARTS", {key: (partial(part, result), limit) for key, (result, limit) in parts.items()})
    with pytest.raises(RunFailed, match="^bert failed"):
        start(monkeypatch, "--output", tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["layer"], record["lvlm"]) == ({"a": 1}, {"b": 2}) and list(record["bert"]) == ["failed"]
    found = record["bert"]["failed"]
    assert found.startswith(f"{reason}test_everything.py, line ") and "\n" not in found


def test_the_parts_have_seven_minutes():
    assert sum(limit for _, limit in everything.PARTS.values()) == 420


@pytest.mark.parametrize("late, rounds", [(True, measure.FEWEST), (False, 9)])
def test_rounds_end_with_the_time(late, rounds):
    seconds = measure.take_turns({"a": int, "b": int}, 9, CPU, until=0.0 if late else float("inf"))
    assert [len(own) for own in seconds.values()] == [rounds, rounds]
    assert measure.compare(seconds, "a")["b"]["rounds"] == rounds


def test_waits_are_counted_within_a_step():
    """None is invented, and what is to be counted on a GPU runs. On a CPU no kernel is launched."""
    number = torch.ones(1)
    assert everything.count_waits(lambda: number * 2) == dict.fromkeys([*everything.WAITS, "launches"], 0)
    counts = everything.count_waits(lambda: [number.item(), number.nonzero(), number.item()])
    assert (counts["aten::item"], counts["aten::nonzero"]) == (2, 1)
    found = everything.find_waits(CPU, everything.CPU)
    assert {"stgc_plus.Experts", "stgc_plus.Experts, one pass", "BERT, dense", "BERT, one pass"} <= found.keys()


class Products(TorchDispatchMode):
    """The dtypes of the matrix products with experts' weights: with anything else one side is narrow."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "_grouped_mm"):
            factors = [one for one in args if isinstance(one, torch.Tensor) and one.is_floating_point()]
            self.dtypes |= {one.dtype for one in factors if all(own.shape[-1] >= 64 for own in factors)}
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_compute_in_one_precision(dtype):
    """transformers' grouped_mm, too, which takes no part in autocast: else float32 would be compared with bf16."""
    for name, own in layer.make_layers(64, "gated").items():
        with Products() as products:
            layer.make_step(own, torch.randn(16, 64), dtype)()
        assert products.dtypes == {dtype}, name


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_bert_runs_in_the_asked_precision(kind):
    bench, seen = step.Bench("one pass", "small", "1", 2, 8, CPU, dtype=kind), []
    bench.model.bert.pooler.dense.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    bench.step()
    assert seen == [kind] and all(p.dtype == torch.float32 for p in bench.model.parameters())
