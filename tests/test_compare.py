"""Paired differences against numbers worked out by hand; which runs a table takes, and what it prints and leaves out."""

import warnings

import pytest
from conftest import drawn

from lab.report import figures
from lab.report.compare import PUBLISHED, Paired, comparison_table, metric_names, paired, paper_table, select_rows
from lab.report.styles import style_of

LR = 2e-5


def run(variant, seed, best, last=0.5, lr=LR, collapsed=False, **others):
    def scores(score):
        return (others or {"accuracy": score}) | {"score": score, "epoch": 3}

    return {"variant": variant, "seed": seed, "lr": lr, "best": scores(best), "last": scores(last), "collapsed": collapsed}


def record(name, runs, **config):
    return {"name": name, "runs": runs, "config": {"model": "bert"} | config}


def by_seed(*values):
    return dict(enumerate(values))


def row_of(table, *start):
    """The cells of the one line that begins with these cells."""
    found = [line.split("  ") for line in table.splitlines()]
    found = [[cell.strip() for cell in line if cell.strip()] for line in found]
    found = [line for line in found if line[: len(start)] == list(start)]
    assert len(found) == 1, table
    return found[0][len(start) :]


@pytest.mark.parametrize(
    ("gaps", "half", "verdict"),
    [
        ((1, 2, 3), 2.4841377, "no difference"),  # t(2) = 4.3026527, std 1, / sqrt(3)
        ((1, 2, 3, 2, 2), 0.8779889, "better"),  # t(4) = 2.7764451, std sqrt(0.5), / sqrt(5)
        ((-1, -2, -3, -2, -2), 0.8779889, "worse"),
        ((2, 3), 6.3531024, "no difference"),  # t(1) = 12.7062047, std sqrt(0.5), / sqrt(2)
    ],
)
def test_interval_by_hand(gaps, half, verdict):
    base = by_seed(50.0, 61.0, 47.5, 30.0, -8.0)  # much wider than the gaps: pairing takes it out
    result = paired(base, {seed: base[seed] + gap for seed, gap in enumerate(gaps)})
    centre = sum(gaps) / len(gaps)
    assert (result.mean, result.low, result.high) == pytest.approx((centre, centre - half, centre + half), abs=1e-6)
    assert (result.wins, result.ties, result.seeds) == (len(gaps) * (gaps[0] > 0), 0, len(gaps))
    assert result.verdict == verdict


def test_only_shared_seeds_count():
    result = paired({0: 1.0, 1: 2.0, 7: 100.0}, {1: 4.0, 0: 1.0, 9: -100.0})
    assert (result.mean, result.wins, result.ties, result.seeds) == (1.0, 1, 1, 2)
    with pytest.raises(ValueError, match=r"no seed in common: the baseline has \[0\], the other \[1\]"):
        paired({0: 0.5}, {1: 0.5})


def test_differences_without_spread():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paired(by_seed(0.7, 0.6), by_seed(0.7, 0.6)) == Paired(0, 0, 0, 0, 2, 2)
        assert paired(by_seed(0.7, 0.6), by_seed(0.7, 0.6)).verdict == "no difference"
        # 0.1 + 0.2 - 0.3 and 0.2 - 0.1 - 0.1 are not equal in floats: still two ties, and two equal gaps
        assert paired(by_seed(0.3, 0.5), by_seed(0.1 + 0.2, 0.5)).ties == 2
        equal = paired(by_seed(0.2, 0.3, 0.6), by_seed(0.3, 0.4, 0.7))
        assert (equal.low, equal.high, equal.wins, equal.verdict) == (None, None, 3, "no spread, no interval")
        assert equal.mean == pytest.approx(0.1)
        for other in (0.7, 0.9):
            assert paired({3: 0.7}, {3: other}).verdict == "one seed, no interval"


def several_rates():
    """none is best at 3e-5 by mean, though 2e-5 has its best seed; ce at 5e-5 has one lucky run and one missing."""
    runs = [run("ce", s, best, last, lr) for lr, best, last in ((2e-5, 0.80, 0.62), (3e-5, 0.70, 0.75)) for s in (1, 0)]
    runs += [run("ce", 0, 0.99, 0.99, 5e-5)]
    runs += [run("none", 0, 0.90, 0.60, 2e-5), run("none", 1, 0.50, 0.61, 2e-5)]
    return record("rte", [*runs, run("none", 0, 0.74, 0.70, 3e-5), run("none", 1, 0.76, 0.71, 3e-5)])


def test_best_takes_the_rate_with_the_best_mean_of_all_seeds():
    rows = select_rows(several_rates(), "best")
    assert [(row.variant, row.lr, row.label) for row in rows] == [
        ("none", 3e-5, "none, lr 3e-05"),
        ("ce", 2e-5, "ce, lr 2e-05"),
    ]
    assert rows[1].of("score") == pytest.approx({0: 80.0, 1: 80.0})
    gap = row_of(comparison_table(several_rates(), "best"), "accuracy", "ce, lr 2e-05")
    assert gap == ["2", "80.0 ± 0.0", "+5.0 [-7.7, +17.7]", "2 of 2", "no difference"]  # gaps 6 and 4: 12.706 * 1


def test_equal_rates_choose_the_lowest():
    runs = [run("none", 0, 0.7, lr=lr) for lr in (5e-5, 2e-5, 3e-5)]
    assert [row.lr for row in select_rows(record("rte", runs), "best")] == [2e-5]


def test_last_selects_nothing_and_pairs_within_a_rate():
    table = comparison_table(several_rates(), "last")
    labels = [line.split("  ")[1] for line in table.splitlines()[2:]]
    assert labels == ["baseline, lr 2e-05", "ce, lr 2e-05", "baseline, lr 3e-05", "ce, lr 3e-05", "ce, lr 5e-05"]
    assert row_of(table, "accuracy", "ce, lr 2e-05", "2")[:2] == ["62.0 ± 0.0", "+1.5 [-4.9, +7.9]"]
    assert row_of(table, "accuracy", "ce, lr 3e-05", "2")[:2] == ["75.0 ± 0.0", "+4.5 [-1.9, +10.9]"]
    assert row_of(table, "accuracy", "ce, lr 5e-05") == ["1", "99.0"]  # no baseline at this rate


def test_the_table_says_what_it_prints():
    title = comparison_table(several_rates(), "best").splitlines()[0]
    assert title == "rte, in %, best epoch on dev, best learning rate on dev of 2e-05 3e-05 5e-05; seeds: 0 1"
    assert comparison_table(several_rates(), "last").startswith("rte, in %, last epoch, nothing selected; seeds: 0 1\n")
    one_rate = record("rte", [run("none", 4, 0.7)])
    assert comparison_table(one_rate).startswith("rte, in %, best epoch on dev; seeds: 4\n")
    with pytest.raises(ValueError, match="select='first': use best or last"):
        comparison_table(one_rate, "first")


def three_variants():
    scores = {"ce": (0.71, 0.63, 0.72), "none": (0.70, 0.61, 0.75), "dense": (0.71, 0.63, 0.78)}
    return [run(v, s, score, collapsed=(v, s) == ("ce", 1)) for v, all_ in scores.items() for s, score in enumerate(all_)]


def test_rows_difference_wins_and_collapses():
    table = comparison_table(record("qnli-12k", three_variants()))
    assert [line.split()[1] for line in table.splitlines()[2:]] == ["dense", "baseline", "ce"]
    assert row_of(table, "accuracy", "dense") == ["3", "70.7 ± 7.5", "+2.0 [-0.5, +4.5]", "3 of 3", "no difference"]
    assert row_of(table, "accuracy", "baseline") == ["3", "68.7 ± 7.1"]
    # gaps 1, 2, -3: mean 0, std sqrt(7), half 4.3027 * sqrt(7 / 3)
    ce = row_of(table, "accuracy", "ce")
    assert ce == ["3", "68.7 ± 4.9", "+0.0 [-6.6, +6.6]", "2 of 3", "no difference", "1 collapsed"]
    tied = record("rte", [run("none", 0, 0.5), run("none", 1, 0.5), run("ce", 0, 0.5), run("ce", 1, 0.6)])
    assert row_of(comparison_table(tied), "accuracy", "ce")[3] == "1 of 2, 1 tied"


def test_nothing_to_compare_with():
    ce, none = ([one for one in three_variants() if one["variant"] == name] for name in ("ce", "none"))
    for runs in (none, [*ce, run("mse", 0, 0.5)]):  # only the baseline; no baseline
        table = comparison_table(record("rte", runs))
        assert "minus" not in table and "verdict" not in table and "accuracy" in table
    apart = comparison_table(record("rte", [*none, run("mse", 9, 0.5)]))
    assert row_of(apart, "accuracy", "mse") == ["1", "50.0"]
    with pytest.raises(ValueError, match="rte has no runs"):
        comparison_table(record("rte", []))
    with pytest.raises(ValueError, match="rte: ce, seed 0, lr 2e-05 is there twice"):
        comparison_table(record("rte", [*ce, ce[0]]))


def test_score_is_printed_where_it_is_no_metric():
    mrpc = record("mrpc", [run("none", s, 0.85, accuracy=0.8, f1=0.9) for s in (0, 1)])
    assert metric_names(mrpc) == ["accuracy", "f1", "score"]
    assert metric_names(record("mnli", [run("none", 0, 0.8, 0.8, accuracy=0.8, accuracy_mm=0.7)])) == [
        "accuracy",
        "accuracy_mm",
    ]
    assert metric_names(record("cola", [run("none", 0, -0.1, -0.1, matthews=-0.1)])) == ["matthews"]
    assert row_of(comparison_table(mrpc), "f1", "baseline") == ["2", "90.0 ± 0.0"]


def measured_once():
    """Runs that have no best epoch: measured on test data when they ended."""
    runs = [run(v, s, 0.0, 0.5 + 0.1 * s + 0.02 * (v == "ce")) for v in ("ce", "none") for s in (0, 1, 2)]
    for one in runs:
        del one["best"]
        score = one["last"].pop("accuracy")
        one["last"] |= {"caption": score + 0.1, "vqa": score - 0.1, "parts": {"colour": score}}
    return record("toy-lvlm", runs)


def test_runs_without_a_best_epoch():
    table = comparison_table(measured_once(), "last")
    assert table.splitlines()[0] == "toy-lvlm, in %, end of the run, nothing selected; seeds: 0 1 2"
    assert metric_names(measured_once()) == ["caption", "vqa", "score"]
    assert [row.label for row in select_rows(measured_once(), "last")] == ["none", "ce"]
    assert row_of(table, "vqa", "baseline") == ["3", "50.0 ± 10.0"]
    assert row_of(table, "score", "ce")[:3] == ["3", "62.0 ± 10.0", "+2.0"]
    with pytest.raises(ValueError, match="toy-lvlm has runs without a best epoch: use select='last'"):
        comparison_table(measured_once())


def full_records(lr=LR):
    scores = {"cola": 0.6, "mrpc": 0.9, "qnli": 0.91, "mnli": 0.85, "rte": 0.7}
    return [
        record(task, [run(v, s, score + 0.01 * s, 0.5, lr) for v in ("ce", "none") for s in (0, 2)])
        for task, score in scores.items()
    ]


def record_of(records, name):
    return next(one for one in records if one["name"] == name)


def test_published_averages_fit_their_columns():
    for name, row in PUBLISHED.items():
        assert len(row) == 6 and round(sum(row[:5]) / 5, 1) == row[5], name
    assert list(PUBLISHED.values())[-1] == (66.8, 91.2, 93.8, 87.6, 74.7, 82.8)


def test_papers_table_has_ours_below():
    lines = paper_table(full_records()).splitlines()
    assert lines[0].split() == ["row", "CoLA", "MRPC", "QNLI", "MNLI", "RTE", "Avg"]
    assert [line.split("  ")[0] for line in lines[1:7]] == [
        *(f"published: {name}" for name in PUBLISHED),
        "ours: baseline",
        "ours: ce",
    ]
    none = row_of("\n".join(lines), "ours: baseline")
    assert none == ["61.0 ± 1.4", "91.0 ± 1.4", "92.0 ± 1.4", "86.0 ± 1.4", "71.0 ± 1.4", "80.2"]
    assert "- rte, bert: baseline (seeds: 2); ce (seeds: 2)" in lines
    assert "best epoch and best tried learning rate; ± is the sample std" in lines[9]
    last = paper_table(full_records(), "last")
    assert row_of(last, "ours: ce")[:2] == ["50.0 ± 0.0"] * 2 and "last epoch, nothing selected" in last


@pytest.mark.parametrize(
    "partial", [{"name": "qnli-12k"}, {"config": {"max_train_samples": 9}}, {"config": {"max_eval_samples": 9}}]
)
def test_partial_data_stands_in_no_published_column(partial):
    records = full_records()
    record_of(records, "qnli").update(partial)
    table = paper_table(records)
    assert row_of(table, "ours: ce") == ["61.0 ± 1.4", "91.0 ± 1.4", "-", "86.0 ± 1.4", "71.0 ± 1.4", "-"]
    inside, below = table.split("Other or partial data, not comparable with these columns:")
    assert "92.0" not in inside and "baseline 92.0 ± 1.4 (seeds: 2); ce 92.0 ± 1.4 (seeds: 2)" in below
    assert "Other or partial" not in paper_table(full_records())


def test_papers_table_of_uneven_records():
    records = full_records()
    records.remove(record_of(records, "mrpc"))
    record_of(records, "rte")["runs"] += [run("mse", 0, 0.8, lr=3e-5, collapsed=True), run("none", 0, 0.1, lr=3e-5)]
    best = paper_table(records)
    assert row_of(best, "ours: mse") == ["-", "-", "-", "-", "80.0", "-"]
    assert row_of(best, "ours: baseline")[1:] == ["-", "92.0 ± 1.4", "86.0 ± 1.4", "71.0 ± 1.4", "-"]
    assert "mse, lr 3e-05 (seeds: 1, collapsed: 1)" in best
    assert row_of(paper_table(records, "last"), "ours: baseline, lr 3e-05") == ["-", "-", "-", "-", "50.0", "-"]
    with pytest.raises(ValueError, match="several records are named rte: merge them"):
        paper_table([*records, record_of(records, "rte")])


def test_dynmoes_gate_has_rows_of_its_own():
    scores = {"random": 0.4, "ce": 0.8, "none": 0.6, "dense": 0.9}
    gate = record("rte", [run(name, 0, score) for name, score in scores.items()], router="dynmoe")
    records = full_records()
    for select, none in (("best", "71.0 ± 1.4"), ("last", "50.0 ± 0.0")):
        table = paper_table([*records, gate], select)
        assert row_of(table, "ours: baseline")[4] == none  # the usual router's
        for name, score in (("baseline", 0.6), ("ce", 0.8)):
            score = score if select == "best" else 0.5
            assert row_of(table, f"ours: {name}, DynMoE's gate") == ["-", "-", "-", "-", f"{100 * score:.1f}", "-"]
        assert "- rte, bert: dense" in table and "; ce, DynMoE's gate" in table
        for name in ("dense", "random"):
            row_of(table, f"ours: {name}")
            assert f"{name}, DynMoE's gate" not in table
    partial = paper_table([record("rte", gate["runs"], router="dynmoe", max_train_samples=9)])
    assert "dense 90.0 (seeds: 1); baseline, DynMoE's gate 60.0 (seeds: 1)" in partial
    for more in (gate, record("rte", [run("dense", 0, 0.9)])):
        with pytest.raises(ValueError, match="several records are named rte: merge them"):
            paper_table([gate, more])


def intervals(axis):
    """The ends of each vertical line, left to right."""
    lines = [line for found in axis.collections for line in found.get_segments()]
    return sorted((line.tolist() for line in lines if line[0][0] == line[1][0]), key=lambda line: line[0])


def points(axis, style):
    return [list(zip(*line.get_data())) for line in axis.lines if line.get_linestyle() == style and len(line.get_xdata())]


def test_figure_has_a_point_per_seed_and_joins_the_pairs(tmp_path, monkeypatch):
    cola = record("cola", [run("none", 0, -0.1), run("ce", 0, 0.2)])
    figure, path = drawn(monkeypatch, figures.plot_comparison, tmp_path, [record("rte", three_variants()), cola])
    left, right = figure.axes
    assert path == tmp_path / "comparison.png" and path.read_bytes().startswith(b"\x89PNG")
    assert [left.get_title(), right.get_title(), left.get_ylabel()] == ["rte", "cola", "dev score in % (best)"]
    assert [label.get_text() for label in left.get_xticklabels()] == ["dense", "none", "ce"]
    expected = {(0, 71.0), (0, 63.0), (0, 78.0), (1, 70.0), (1, 61.0), (1, 75.0), (2, 71.0), (2, 63.0), (2, 72.0)}
    assert {(x, round(y, 6)) for one in points(left, "None") for x, y in one if x == int(x)} == expected
    hollow = [line.get_data() for line in left.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [(x[0], round(y[0], 6)) for x, y in hollow] == [(2, 63.0)]
    lines = [[(x, round(y, 6)) for x, y in line] for line in points(left, "-")]
    assert [(0, 71.0), (1, 70.0), (2, 71.0)] in lines and len(lines) == 3 + 3  # means and seeds
    assert [(0.75, 68.666667), (1.25, 68.666667)] in lines
    looks = {(line.get_color(), line.get_marker()) for line in left.lines if list(line.get_xdata()) in ([0], [1], [2])}
    assert looks == {style_of(name)[::2] for name in ("dense", "none", "ce")}  # of the variants, not of the seeds
    (_, low), (_, high) = intervals(left)[
        1
    ]  # around the baseline's mean, 68.667: gaps 1, 2, -3, half 4.3026527 * sqrt(7 / 3)
    assert (low, high) == pytest.approx((68.666667 - 6.572411, 68.666667 + 6.572411), abs=1e-4)
    assert sorted(y for one in points(right, "None") for _, y in one) == pytest.approx([-10, 20]) and not intervals(right)
    said = [text.get_text() for text in right.texts]
    assert said == ["one seed: no conclusion"] and not left.texts


def test_figure_spans_ten_examples_and_names_their_number(tmp_path, monkeypatch):
    near = record("toy", [run("none", 0, 0.93), run("ce", 0, 0.9325)]) | {"data": {"train": 9, "dev": 400}}
    figure, _ = drawn(monkeypatch, figures.plot_comparison, tmp_path, [near])
    (axis,) = figure.axes
    low, high = axis.get_ylim()
    assert axis.get_title() == "toy\n400 dev examples" and high - low >= 10 * 100 / 400
    far = near | {"data": {"dev": 10000}}
    figure, _ = drawn(monkeypatch, figures.plot_comparison, tmp_path, [far])
    (axis,) = figure.axes
    assert axis.get_ylim()[1] - axis.get_ylim()[0] < 0.5  # one example of 400 is 25 of 10,000: nothing to widen


def test_figure_names_a_variant_of_one_seed(tmp_path, monkeypatch):
    runs = [run("dense", 0, 0.5), *(run(name, seed, 0.5 + seed / 10) for name in ("none", "ce") for seed in (0, 1))]
    figure, _ = drawn(monkeypatch, figures.plot_comparison, tmp_path, [record("toy", runs)])
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["dense\n1 seed", "none", "ce"]


def test_figure_names_the_data_of_its_scores(tmp_path, monkeypatch):
    for args, label in (
        ((measured_once(), "last"), "test score in % (last)"),
        ((several_rates(), "last"), "dev score in % (last)"),
    ):
        figure, _ = drawn(monkeypatch, figures.plot_comparison, tmp_path, [args[0]], *args[1:])
        (axis,) = figure.axes
        assert axis.get_ylabel() == label


def test_figure_joins_within_a_rate(tmp_path, monkeypatch):
    figure, _ = drawn(monkeypatch, figures.plot_comparison, tmp_path, [several_rates()], "last")
    (axis,) = figure.axes
    assert axis.get_ylabel() == "dev score in % (last)"
    assert [label.get_text() for label in axis.get_xticklabels()][:2] == ["none\nlr 2e-05", "ce\nlr 2e-05"]
    joined = [[x for x, _ in line] for line in points(axis, "-")]
    assert joined.count([0, 1]) == 2 and joined.count([2, 3]) == 2 and [0, 1, 2, 3, 4] not in joined
