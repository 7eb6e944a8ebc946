"""Token gradients by other tools equal ours, and docs/costs.md shows what the records say."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import stgc
from lab.bench import peers
from lab.report import costs
from lab.run.cli import RunFailed, UserError

ROOT = Path(__file__).parent.parent
TINY = (4, 8, 12)
NAMES = list(peers.find_ways(peers.Problem(1, TINY)))
INSTALLED = [name for name, way in peers.find_ways(peers.Problem(1, TINY)).items() if way]  # Opacus is an extra


@pytest.mark.parametrize("tokens", [24, 3, 1], ids="{} tokens".format)  # the fewest leave experts without a token
@pytest.mark.parametrize("name", INSTALLED)
def test_each_way_gives_the_gradients_and_flags_of_stgc(name, tokens):
    problem = peers.Problem(tokens, TINY)
    way = peers.find_ways(problem)[name]
    watch = stgc.STGC(problem.layer, stgc.STGCConfig(conflict_loss="none"))
    watch.loss(problem.loss(problem.x_TD, problem.layer(problem.x_TD), problem.labels_T))
    (expected,), ids_TK = watch.verdicts, problem.layer.routing(problem.x_TD).expert_ids_TK
    for _ in range(2):  # nothing of the first call is left
        found = stgc.find_conflicts(way(), ids_TK, TINY[0])
        assert torch.equal(found.conflict_TK, expected.conflict_TK)
        torch.testing.assert_close(found.norm_TKL, expected.norm_TKL, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.similarity_TK, expected.similarity_TK, rtol=0, atol=1e-5)
    assert tokens < 24 or 0 < expected.conflict_TK.sum() < expected.conflict_TK.numel()


def test_ways_that_flag_others_are_not_timed():
    problem = peers.Problem(24, TINY)
    ways = peers.find_ways(problem)
    ours, *_ = ways.values()
    assert peers.check_flags(problem, ways | {"absent": None}).conflict_TK.any()
    with pytest.raises(RunFailed, match="wrong: [1-9][0-9]* flags differ from ours"):
        peers.check_flags(problem, ways | {"wrong": lambda: [grad_TKO.flip(0) for grad_TKO in ours()]})


def test_the_record_of_the_ways(tmp_path, monkeypatch):
    """Every way and version; Opacus as if it were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "opacus" else find(name, *more))
    words = ["--tokens", "8", "--rounds", "3", "--threads", "1", "--output", str(tmp_path / "peers.json")]
    monkeypatch.setattr(sys, "argv", ["peers", *words])
    peers.main()
    record = json.loads((tmp_path / "peers.json").read_text())
    assert list(record["variants"]) == NAMES and record["variants"][NAMES[0]]["ratio"] == 1 == record["threads"]
    assert record["variants"].pop(NAMES[-1]) is None and record["versions"]["opacus"] is None
    assert record["versions"]["torch"] and record["versions"]["transformers"] and record["pairs"] == 16
    for row in record["variants"].values():
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1] and row["peak_bytes"] > 0
    page = costs.render(tmp_path)
    assert f"| {NAMES[-1]} | not installed | - | - |" in page and "opacus not installed" in page
    assert costs.plot_peers(record, tmp_path / "peers.png").stat().st_size > 10_000
    assert "](../results/peers.png)" in costs.render(tmp_path)


MADE = {
    "command": "python -m lab.bench.layer",
    "device": "cpu",
    "threads": 1,
    "commit": "12345678",
    "versions": {"torch": "2"},
}


def test_tables_of_layers_and_of_growth(tmp_path):
    row = {"seconds": 0.1, "ratio": 1.25, "interval": [1.2, 1.3]}
    layers = {"704 tokens, plain": {"limit": row, "ours": row}, "704 tokens, gated": {"ours": row, "eager": row}}
    growth = {"tokens": {str(n): {"one pass": {"seconds": n / 1000, "bytes": n * n * 2**20}} for n in (10, 20, 40)}}
    for name, content in {"layer-1": {"layers": layers}, "layer-2": {"layers": {}}, "scaling": {"growth": growth}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(MADE | content))
    page = costs.render(tmp_path)
    assert re.findall(r"\(`(.*?)`\)$", page, re.M) == ["layer-1.json", "layer-2.json", "scaling.json"]
    assert "| size | limit | ours | eager |" in page and "cpu, 1 thread; torch 2; commit 1234567." in page
    assert "| 704 tokens, gated | - | 1.25x (1.20 to 1.30) | 1.25x (1.20 to 1.30) |" in page
    assert "| tokens, 10 to 40 | one pass | 0.010 to 0.040 | 1.00 | 100.0 to 1600.0 | 2.00 |" in page
    assert page.count("    python -m lab.bench.layer") == 3 and "![" not in page


def test_costs_show_what_the_records_say():
    page = (ROOT / "docs" / "costs.md").read_text()
    assert page == costs.render(ROOT / "results"), "run python -m lab.report.costs"
    assert "st-moe-pytorch is not among the peers" in page
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / "docs" / link).is_file(), link


@pytest.mark.parametrize("text", ["", "[]", '{"variants": {}}', '{"command": 3}'])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "peers.json").write_text(text)
    with pytest.raises(UserError, match=r"peers\.json: .*restore it") as error:
        costs.render(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
