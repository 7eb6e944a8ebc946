"""Records, tables, figures, metrics and the bench's arithmetic."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import accelerate
import pytest
import torch
from sklearn.metrics import f1_score
from test_glue import data, model  # noqa: F401  (fixtures)

from lab.bench import step as bench
from lab.report import figures, readme, styles, tables
from lab.run import runs
from lab.run.cli import Parser, RunFailed, UserError, model_is_cached, number, run_main
from lab.run.hub import from_hub
from lab.run.options import VARIANT
from lab.text.metrics import GlueMetric

ROOT = Path(__file__).parent.parent


def test_gradient_memory_gives_the_papers_table():
    """0.29, 0.38, 773 and 1562 GiB (sec. 6.4); the paper cuts 0.2976 and 773.4, so do we."""
    memory = {name: bench.gradient_memory(*setting) for name, setting in bench.PAPER_MODELS.items()}
    stable, phi = memory["StableLM-1.6B"], memory["Phi-2-2.7B"]
    assert [int(gib * 100) / 100 for gib in (stable.bias_gib, phi.bias_gib)] == [0.29, 0.38]
    assert [int(gib) for gib in (stable.weight_gib, phi.weight_gib)] == [773, 1562]


@pytest.fixture(scope="module")
def scripts(data, model, tmp_path_factory):  # noqa: F811
    """All that is started as a whole here, at once: by name a folder, and a function that waits for what it prints."""
    folder = tmp_path_factory.mktemp("scripts")
    calm = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that wait for each other on a busy machine take minutes
    bench = "-m lab.bench --rounds 3 --batch-size 2 --length 8 --threads 1 --device cpu --output".split()
    peer = "-m lab.bench.peer --rounds 1 --samples 16 --max-length 16 --moe-layers 1 --variants ce-one --output".split()
    commands = {
        "peer": [*peer, folder / "peer.json", "--model", model, "--data-dir", data],
        "bench": [*bench, folder / "bench.json", "--variants", "one pass", "two passes"],
    }
    started = {}
    for name, words in commands.items():
        command = [sys.executable, *map(str, words)]
        started[name] = subprocess.Popen(command, cwd=ROOT, env=calm, stdout=subprocess.PIPE, text=True)

    def wait(name):
        stdout, _ = started[name].communicate(timeout=300)
        assert started[name].returncode == 0
        return stdout

    yield folder, wait
    for process in started.values():
        process.kill()


@pytest.mark.slow
def test_bench_measures_every_variant(scripts):
    folder, wait = scripts
    wait("bench")
    record = json.loads((folder / "bench.json").read_text())
    assert list(record["variants"]) == ["moe", "one pass", "two passes"]
    assert record["variants"]["moe"]["ratio"] == 1 == record["variants"]["moe"]["peak_ratio"]
    parameters = sum(p.numel() for p in bench.Bench("moe", "small", "2", 2, 8, torch.device("cpu")).model.parameters())
    assert record["variants"]["moe"]["peak_bytes"] > 4 * 4 * parameters  # weights, gradients and AdamW's two moments
    assert "| one pass |" in tables.bench_table(record)
    assert record["command"].startswith("python -m lab.bench --rounds 3")


@pytest.mark.slow
def test_peer_measures_the_trainer_and_ours(scripts):
    folder, wait = scripts
    wait("peer")
    record = json.loads((folder / "peer.json").read_text())
    (speeds,) = record["rounds"]
    assert record["ratio"]["ce-one"] == pytest.approx(speeds["ce-one"] / speeds["Trainer, dense"])
    assert min(speeds.values()) > 0 and record["command"].startswith("python -m lab.bench.peer")


def entry(variant, seed, score, collapsed=False, lr=1e-4):
    scores = {"accuracy": score, "score": score}
    ends = {"conflict_ratio": [0.25, 0.5], "consistency": [0.01, 0.02]}
    return {
        "variant": variant,
        "seed": seed,
        "lr": lr,
        "best": scores,
        "last": scores,
        "collapsed": collapsed,
        "samples_per_second": 9.0,
    } | ends


def test_tables_show_mean_and_spread_and_collapses():
    record = {"runs": [entry("none", 0, 0.6), entry("none", 1, 0.64), entry("ce", 0, 0.5, True), entry("ce", 1, 0.5)]}
    none, ce = tables.score_rows(record)
    assert tables.spread(none["best"]) == "62.0 ± 2.8" and tables.spread([50.0]) == "50.0"
    assert (ce["collapsed"], ce["seeds"]) == (1, 2) and none["conflict_ratio"] == "0.250 → 0.500"
    record |= {"name": "toy-rte", "command": "python x.py --y", "config": {"router": "linear", "beta": 1.0, "epochs": 3}}
    again = record | {"runs": [entry("ce", 2, 0.8)], "config": record["config"] | {"seeds": [2], "resume": True}}
    assert "| toy-rte, 3 epochs | ce, linear router, beta 1 | 60.0 ± 17.3 |" in tables.results_table([record, again])
    table = tables.results_table([record])
    assert "| toy-rte, 3 epochs | ce, linear router, beta 1 | 50.0 ± 0.0 |" in table and "    python x.py --y" in table
    dense = tables.results_table([record | {"runs": [entry("dense", 0, 0.7)]}])
    assert "| toy-rte, 3 epochs | dense | 70.0 |" in dense


def test_learning_rates_are_rows_of_their_own():
    runs = [entry("ce", seed, 0.5 + lr, lr=lr) for lr in (0.1, 0.4) for seed in (0, 1)]
    low, high = tables.score_rows({"runs": runs})
    assert (low["label"], low["seeds"], high["label"]) == ("ce, lr 0.1", 2, "ce, lr 0.4")
    assert tables.spread(low["best"]) == "60.0 ± 0.0" and tables.spread(high["best"]) == "90.0 ± 0.0"


def test_the_table_of_the_toy_lvlm():
    """Seeds of two records in one row; stage II and its blind baselines above stage III."""

    def record(seed, score):
        scores = {"score": score, "vqa": score, "vqa, clean": score + 0.1}
        stage = {"stage": "stage2", "seed": seed, "scores": scores, "blind": {"majority": {"score": 0.25, "vqa": 0.3}}}
        run = {"variant": "ce", "seed": seed, "last": {"score": score, "vqa": score}, "where": {"vqa, clean": score + 0.1}}
        config = {"seeds": [seed], "resume": bool(seed)}
        return {"name": "lvlm-scenes", "command": f"x --seeds {seed}", "config": config, "stages": [stage], "runs": [run]}

    table = tables.lvlm_table([record(0, 0.7), record(1, 0.8)]).splitlines()
    assert "| lvlm-scenes | stage II | 2 | 75.0 ± 7.1 |" in table[2] and table[2].endswith("| 85.0 ± 7.1 |")
    assert "| lvlm-scenes | blind: majority | 2 | 25.0 ± 0.0 |" in table[3] and table[3].endswith("| - |")
    assert "| lvlm-scenes | stage III, ce | 2 | 75.0 ± 7.1 |" in table[4]
    assert "    x --seeds 0" in table and "    x --seeds 1" in table


def test_pages_show_what_the_records_say():
    """Tables, the six claims and the logs; each mark of a page is generated."""
    texts, marks = readme.sections(), set()
    for name in readme.PAGES:
        page = (ROOT / name).read_text()
        assert page == readme.render(page, texts), f"{name}: run python -m lab.report"
        marks |= set(re.findall(r"<!-- (\w+) -->", page))
    assert marks == texts.keys()
    assert texts["claims"].count("\n") == 7


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text()) <= 10_000


def test_a_log_is_shown_whole(tmp_path):
    path = tmp_path / "log-x.txt"
    path.write_text("$ python x.py\none\n\ntask=1\ntask=2\ntwo\n# 3 s\n")
    assert readme.log_block(path) == "```text\none\n\n...\ntwo\n```\n\n(3 s)"
    path.write_text("one\ntwo\n")
    with pytest.raises(UserError, match="record it again"):
        readme.log_block(path)


def test_recorded_runs_are_complete():
    """What results/ holds is reproducible: command, commit, versions, and a curve for each run it lists."""
    for path in (ROOT / "results").rglob("results.json"):
        record = json.loads(path.read_text())
        assert re.fullmatch(r"[0-9a-f]{40}", record["commit"]) and record["dirty"] is False, path
        script = "toy_lvlm.py" if "stages" in record else "glue_moefy.py"
        assert record["command"].startswith(f"python {script}") and record["versions"]["torch"], path
        assert record["runs"] and {run["seed"] for run in record["runs"]} <= set(record["config"]["seeds"]), path
        for run in record["runs"]:
            assert (path.parent / f"{run['variant']}-s{run['seed']}.jsonl").exists()
        assert (path.parent / "curves.png").exists()


def test_figures_draw_every_series(tmp_path):
    for seed in (0, 1):
        lines = [{"step": s, "loss": 1 / s, "conflict_ratio": 0.3, "layers": [{"load": [0.7, 0.3]}]} for s in range(1, 50)]
        lines.append({"step": 49, "eval_score": 0.5 + seed})
        (tmp_path / f"ce-one-s{seed}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    record = {"name": "toy", "runs": [{"variant": "ce-one", "seed": seed, "lr": 0.1} for seed in (0, 1)]}
    (tmp_path / "mine-s0.jsonl").write_text("no curve of a run")
    curves = figures.read_curves(tmp_path, record)
    assert list(curves) == ["ce-one"] and len(curves["ce-one"]) == 2
    assert figures.series(curves["ce-one"][1], "eval_score") == ([49], [1.5])
    assert figures.series(curves["ce-one"][0], "load")[1][0] == 0.7
    values = figures.smooth([1.0] * 30 + [3.0] * 30)
    assert len(values) == 60 and values[0] == 1 and values[-1] == 3
    assert figures.plot_run(tmp_path, record).stat().st_size > 10_000
    figures.draw_idea(tmp_path / "idea.png")


def test_figures_draw_the_similarities_of_filmed_runs(tmp_path, monkeypatch):
    """Figure 7: of the first and the last moment, the mean share over seeds and layers; runs without a film are left out."""
    sides = [[[0, 4], [2, 2]], [[9, 9], [9, 9]], [[3, 1], [1, 1]]]  # moments of two layers, counts of two bins
    probe = [{"layers": [{"histogram": counts} for counts in layers]} for layers in sides]
    record = {"name": "toy", "runs": [{"variant": "ce", "seed": 0, "lr": 0.1, "probe": probe}]}
    record["runs"].append({"variant": "none", "seed": 0, "lr": 0.1})
    (tmp_path / "ce-s0.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in range(1, 50)))
    drawn, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (drawn.extend(figure.axes), save(figure, path))[1])
    figures.plot_run(tmp_path, record)
    lines = drawn[-1].get_lines()
    assert [[*line.get_ydata()] for line in lines] == [[0.25, 0.75], [0.625, 0.375]]
    assert [*lines[0].get_xdata()] == [-0.5, 0.5] and len(drawn) == 2


def test_parts_of_one_experiment_are_drawn_as_one(monkeypatch):
    drawn, folders = (
        [],
        [str(ROOT / "results" / name) for name in ("mrpc-minilm-seed3", "mrpc-minilm-seeds4-6", "rte-minilm")],
    )
    monkeypatch.setattr(figures, "plot_comparison", lambda folder, records, select: drawn.append((folder, records, select)))
    monkeypatch.setattr(sys, "argv", ["figures", *folders])
    figures.main()
    ((folder, records, select),) = drawn
    seeds = [sorted({run["seed"] for run in record["runs"]}) for record in records]
    assert (folder, select, seeds) == (ROOT / "results", "best", [[3, 4, 5, 6], [0, 1, 2]])


def test_smoothing_smooths_a_toy_run():
    """38 points, of which neighbours differ by 1."""
    values = figures.smooth([float(i % 2) for i in range(38)])
    assert len(values) == 38 and max(abs(values - 0.5)) < 0.2
    assert list(figures.smooth([2.0])) == [2.0] and list(figures.smooth([1.0, 3.0, 3.0])) == pytest.approx([2.0, 7 / 3, 3.0])
    assert figures.smooth(list(range(80)))[40] == pytest.approx(39.5)  # of ten values


def test_each_variant_has_a_style_of_its_own():
    """Also in grey, by line and marker; and the figures, the search and the page have no second table."""
    kinds = "none ce mse reroute placebo placebo-mse placebo-reroute flat flat-mse".split()
    names = ["".join(parts) for parts in product(kinds, ("", "-one"), ("", "-weight"))]
    names = ["dense", "random", *filter(VARIANT.fullmatch, names), "embedding", "feature", "task", "frozen"]
    looks = [styles.style_of(name) for name in names]
    assert len(set(looks)) == len({(line, marker) for _, line, marker in looks}) == len(names)
    assert styles.style_of("ce-lr2e-05") == styles.style_of("ce")
    for path in ROOT.glob("lab/**/*.py"):
        if path.name != "styles.py":
            assert not re.search(r'"#\w{6}", "[^"]+", "\w"\)', path.read_text()), path


def test_the_page_draws_variants_as_the_figures_do():
    for names, looks in (
        (["none", "ce", "placebo"], [0, 1, 2]),
        (["none", "placebo"], [0, 2]),
        (["mse", "ce-lr1e-05", "ce-lr2e-05", "x"], [0, 1, 2, 3]),
        (["dense", "none", "ce", "placebo", "flat", "random"], [0, 0, 1, 2, 3, 4]),
    ):
        assert styles.looks_of(names) == looks
    page = (ROOT / "lab/report/page.html").read_text()
    colours = [re.search(rf"--v{i}: (#\w{{6}})", page)[1] for i in range(5)]  # of the light page, which comes first
    assert colours == [colour for colour, _, _ in styles.STYLES]


def test_metric_is_the_mean_of_its_scores():
    metric = GlueMetric(("accuracy", "f1"))
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=torch.tensor([1, 1]), references=torch.tensor([1, 1]))
    scores = metric.compute()
    assert scores["accuracy"] == 0.75 and scores["f1"] == pytest.approx(f1_score([0, 0, 1, 1], [0, 1, 1, 1]))
    assert scores["score"] == pytest.approx((scores["accuracy"] + scores["f1"]) / 2)
    with pytest.raises(ValueError, match="unknown metrics"):
        GlueMetric(("bleu",))


def test_losses_are_checked_by_step():
    one = accelerate.Accelerator(cpu=True)
    assert runs.check_losses([torch.tensor(1.0), torch.tensor(2.0)], 7, one) == [1.0, 2.0]
    with pytest.raises(RunFailed, match="inf at step 6"):
        runs.check_losses([torch.tensor(1.0), torch.tensor(float("inf")), torch.tensor(float("nan"))], 7, one)


def test_tenths_and_log(tmp_path):
    log = runs.RunLog(tmp_path / "a.jsonl", 20, "a")
    for step in range(20):
        log.step({"step": step, "conflict_ratio": float(step)})
    log.close()
    assert log.tenths("conflict_ratio") == [0.5, 18.5] and log.tenths("nothing") is None
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 20


def test_writing_json_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    runs.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        runs.write_json(path, {"a": object()})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        runs.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_folder_must_be_writable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        with runs.claim_folder(tmp_path / "file", False, accelerate.Accelerator(cpu=True)):
            pass


def test_numbers_on_the_command_line(capsys):
    parser = Parser(prog="p", description="")
    parser.add_argument("--n", type=number(int, 1, 5))
    assert parser.parse_args(["--n", "5"]).n == 5
    for text in ("0", "6", "x", "1.5"):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(["--n", text])
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_cached_models_are_found_without_the_network(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert not model_is_cached("a/b")
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    assert model_is_cached("a/b")


def test_a_damaged_folder_says_why_also_offline(tmp_path, monkeypatch):
    def load():
        raise ValueError("it is a siglip, not a CLIP")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (tmp_path, "openai/clip"):
        with pytest.raises(UserError, match=f"^--clip: the CLIP {name} cannot be loaded .it is a siglip"):
            from_hub("the CLIP", "--clip", str(name), load, "a way")


def test_who_cannot_resume_is_not_told_to(capsys, handlers):
    def interrupted():
        raise KeyboardInterrupt

    for resumes in (True, False):
        with pytest.raises(SystemExit) as stop:
            run_main("p", interrupted, resumes)
        assert stop.value.code == 130 and ("--resume" in capsys.readouterr().err) == resumes
