"""The bench of one layer: all that is compared does the same work, slopes are those of powers, freed memory is kept."""

import ctypes
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lab.bench import layer
from lab.bench.measure import compare
from lab.report import costs
from lab.run import runs

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", layer.KINDS)
def test_the_layers_do_the_same_work(kind):
    """As many multiplications in the dense FFN and in the limit as in the experts, and both Experts agree."""
    gated, bias = layer.KINDS[kind]
    layers = layer.make_layers(64, kind, num_experts=4, top_k=2)
    sizes = {name: sum(p.numel() for p in layers[name].parameters() if p.ndim == 2) for name in ("limit", "dense FFN")}
    assert sizes["dense FFN"] * 2 == sizes["limit"]  # 2 of 4 experts
    for name in ("stgc.Experts", "stgc_plus.Experts"):
        experts = layers[name].experts
        assert experts.gated == gated and (experts.b_in_EF is not None) == bias
        assert sum(p.numel() for p in experts.parameters() if p.ndim == 3) == sum(
            p.numel() for p in layers["limit"].parameters() if p.ndim == 2
        )
    assert [name for name in layers if "transformers" in name] == (
        ["transformers, grouped_mm", "transformers, eager"] if kind == "gated" else []
    )
    x_TD = torch.randn(12, 64)
    assert layers["limit"](x_TD).shape == (24, 64) and all(layers[name](x_TD).shape == (12, 64) for name in list(layers)[1:])
    one, other = layers["stgc.Experts"], layers["stgc_plus.Experts"]
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(x_TD), other(x_TD), rtol=1e-4, atol=1e-5)


def test_transformers_block_is_our_layer():
    """With the same weights Mixtral's block gives what our gated experts give, by either of its implementations."""
    layers = layer.make_layers(64, "gated", num_experts=4, top_k=2)
    ours, x_TD = layers["stgc_plus.Experts"], torch.randn(12, 64)
    for name in ("transformers, grouped_mm", "transformers, eager"):
        block = layers[name].block
        with torch.no_grad():
            block.gate.weight.copy_(ours.router.weight)
            fused = torch.cat([ours.experts.w_gate_EDF, ours.experts.w_in_EDF], dim=2)
            block.experts.gate_up_proj.copy_(fused.mT)
            block.experts.down_proj.copy_(ours.experts.w_out_EFD.mT)
        torch.testing.assert_close(layers[name](x_TD), ours(x_TD), rtol=1e-4, atol=1e-5)


def test_the_limit_is_a_row_and_the_base(monkeypatch):
    rows = layer.compare_layers(8, 16, "plain", rounds=3, device=CPU)
    assert list(rows) == ["limit", "dense FFN", "stgc_plus.Experts", "stgc.Experts"]
    assert rows["limit"]["ratio"] == 1 and rows["limit"]["interval"] == [1, 1] and rows["limit"]["rounds"] == 3
    known = compare({"limit": [1.0, 2.0, 4.0], "ours": [1.5, 4.0, 4.0]}, "limit")["ours"]
    assert known["ratio"] == 1.5 and known["interval"] == [1.0, 2.0] and known["seconds"] == 4.0


def test_slopes_are_those_of_powers():
    sizes = [1, 2, 4, 8, 32]
    for power in (0.0, 1.0, 2.5):
        assert layer.slope(sizes, [3 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)


def test_growth_is_measured_recorded_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layer, "GROWTH", {"tokens": (32, 64), "top_k": (1, 2)})
    monkeypatch.setattr(layer, "START", layer.START | {"tokens": 32, "experts": 4})
    monkeypatch.setattr(layer, "SIZE", (16, 32))
    words = ["--growth", "--rounds", "3", "--threads", "1", "--device", "cpu", "--output", str(tmp_path / "scaling.json")]
    monkeypatch.setattr(sys, "argv", ["layer", *words])
    threads = torch.get_num_threads()
    layer.main()
    torch.set_num_threads(threads)
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert list(record["growth"]) == ["tokens", "top_k"] and list(record["growth"]["tokens"]) == ["32", "64"]
    for rows in record["growth"]["tokens"].values():
        assert list(rows) == list(layer.VARIANTS) and all(row["seconds"] > 0 and row["bytes"] > 0 for row in rows.values())
    for name in layer.VARIANTS:  # twice the tokens need more memory, whatever the machine does
        assert record["growth"]["tokens"]["64"][name]["bytes"] > 1.3 * record["growth"]["tokens"]["32"][name]["bytes"]
    assert costs.plot_growth(record["growth"], tmp_path / "scaling.png").stat().st_size > 20_000
    assert capsys.readouterr().out.count("slope of time") == 6


def test_freed_memory_is_kept_where_the_system_has_a_way(monkeypatch):
    """glibc is told so before training on a CPU; what has no mallopt, such as macOS, Windows or musl, is left alone."""
    told = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *args: told.append(args)))
    runs.make_accelerator("cpu", "fp32")
    assert told == [(-1, 2**31 - 1), (-4, 0)]  # M_TRIM_THRESHOLD, M_MMAP_MAX
    for error in (AttributeError, OSError, TypeError):

        def refuse(name, error=error):
            raise error

        monkeypatch.setattr(ctypes, "CDLL", refuse)
        runs.keep_freed_memory()


def test_a_step_leaves_no_gradient_behind():
    for one in layer.make_layers(64, "gated, biases", num_experts=4).values():
        step = layer.make_step(one, torch.randn(6, 64))
        step(), step()
        assert isinstance(one, nn.Module) and all(parameter.grad is None for parameter in one.parameters())
