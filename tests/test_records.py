"""Recorded runs: old and new parts of one experiment become one record, and nothing else does."""

import json

import glue_moefy
import toy_lvlm
from lab.report.records import APART, RESULTS, key_of, merge, read_all
from lab.run.options import NEWER
from lab.run.runs import read_record

OLD, NEW = RESULTS / "cola-minilm", RESULTS / "cola-minilm-seeds3-9"


def test_old_and_new_records_merge():
    """Of commits that knew other options; the pairs of ten seeds come from two records."""
    old, new = read_record(OLD), read_record(NEW)
    assert "normalize" not in old["config"] and new["config"]["save_steps"] == 200
    (record,) = merge([old, new])
    assert len(record["runs"]) == len(old["runs"]) + len(new["runs"]) and not record["repeated"]
    for variant in ("none", "ce", "placebo"):
        assert sorted(run["seed"] for run in record["runs"] if run["variant"] == variant) == [*range(10)]
    assert record["command"] == [old["command"], new["command"]]


def test_other_options_do_not_merge():
    one = read_record(NEW)
    for name, value in (("lr", 3e-5), ("beta", 1.0), ("normalize", False), ("lrs", [1e-4]), ("router", "linear")):
        assert len(merge([one, one | {"config": one["config"] | {name: value}}])) == 2, name
    assert len(merge([one, one | {"data": one["data"] | {"train": 8}}])) == 2
    same = (("seeds", [77]), ("output_dir", "elsewhere"), ("variants", ["flat"]), ("film", True))
    for name, value in (*same, ("conflict_loss", "none"), ("passes", "one")):  # a run's variant tells the last two
        assert key_of(one) == key_of(one | {"config": one["config"] | {name: value}}), name


def test_probes_of_all_parts_are_kept():
    one = read_record(NEW)
    (record,) = merge([one | {"probes": [{"kappa": kappa}]} for kappa in (0.1, 0.2)])
    assert record["probes"] == [{"kappa": 0.1}, {"kappa": 0.2}]


def test_a_run_that_occurs_again_is_kept_apart():
    one = read_record(NEW)
    again = one | {"runs": [one["runs"][0] | {"commit": "newer"}]}
    (record,) = merge([one, again])
    assert len(record["runs"]) == len(one["runs"]) and record["repeated"] == [[one["runs"][0], again["runs"][0]]]


def test_what_a_record_does_not_know_is_its_default():
    """Each option of a script that a record lacks has its default in NEWER, or does not matter."""
    for record in read_all():
        script = toy_lvlm if "stages" in record else glue_moefy
        defaults = vars(script.make_parser().parse_args([]))
        for name in defaults.keys() - record["config"].keys() - APART:
            assert NEWER[name] == defaults[name], (record["command"], name)
    assert json.loads(json.dumps(NEWER)) == NEWER
