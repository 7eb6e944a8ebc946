"""The film of a training changes nothing, survives a kill, and has the numbers of the verdicts; its page shows them."""

import json
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import without_pictures
from safetensors.torch import load_file
from test_glue import data, model, plain, run, words  # noqa: F401  (fixtures)
from test_page import read_data
from test_resume import Killed, assert_same, kill_at, outcome
from torch import nn

import glue_moefy
import toy_lvlm
from lab.moe import film
from lab.report import page
from lab.run import options
from lab.run.cli import UserError
from lab.run.training import Training
from stgc import MoELayer
from stgc_plus import STGC, Experts, STGCConfig

SIZES = "--task rte --moe-layers 1 --num-experts 4 --epochs 2 --batch-size 8 --max-length 16 --save-steps 2 --device cpu"
SIZES = SIZES.split()
VARIANTS = ["none", "ce", "placebo", "flat", "random"]


@pytest.fixture(scope="module")
def runs_of(data, model, tmp_path_factory):  # noqa: F811
    """The command, and the folders of the same variants with and without a film."""
    root = tmp_path_factory.mktemp("film")
    command = [*SIZES, "--seeds", "0", "--variants", *VARIANTS, "--save-model", "--log-steps", "2"]
    command += ["--model", str(model), "--data-dir", str(data)]
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        run([*command, "--film", "--output-dir", root / "with"])
        run([*command, "--output-dir", root / "without"])
    return command, root / "with", root / "without"


def read(folder, name):
    content = json.loads((folder / f"film-{name}.json").read_text())
    return {key: value for key, value in content.items() if key != "seconds"}, load_file(folder / f"film-{name}.safetensors")


def same_film(one, other):
    assert one[0] == other[0] and one[1].keys() == other[1].keys()
    assert all(torch.equal(value, other[1][key]) for key, value in one[1].items())


def test_a_short_training_pays_for_fewer_examples_and_moments():
    found = [film.affordable(32, steps) for steps in (6, 50, 125, 500, 1000, 5000)]
    assert found == [(4, 6), (4, 9), (4, 24), (16, 24), (32, 24), (32, 24)]
    assert film.affordable(2, 20) == (2, 6) and film.affordable(8, 200) == (4, 9)


def test_the_runs_of_a_command_share_the_steps_that_it_trains_once():
    found = [film.affordable(16, 100, 1000, runs) for runs in (1, 2, 3, 5, 100)]
    assert found == [(9, 24), (9, 24), (9, 18), (9, 12), (9, 6)]  # a page shows them side by side
    for size, steps, shared, runs in product((2, 16, 32), (5, 40, 400), (0, 300, 2000), (1, 2, 7)):
        examples, count = film.affordable(size, steps, shared, runs)
        least = (examples <= 4 or runs > 2) and count == 6
        assert least or 40 * examples / size * count / film.COUNT <= (steps + shared / runs) / 25


@pytest.mark.parametrize(
    "script, flags, examples, moments",
    [
        (glue_moefy, "", 12, 24),
        (glue_moefy, "--seeds 0 1 2 --compare", 12, 24),
        (glue_moefy, "--toy", 32, 24),
        (glue_moefy, "--toy --seeds 0 1 2", 32, 14),
        (glue_moefy, "--toy --seeds 0 1 --compare --lrs 1e-4 3e-4", 32, 11),
        (glue_moefy, "--toy --batch-size 8", 8, 24),
        (toy_lvlm, "", 9, 24),
        (toy_lvlm, "--seeds 0 1 2", 9, 24),
        (toy_lvlm, "--compare", 9, 18),
        (toy_lvlm, "--stage2-steps 500", 5, 24),
        (toy_lvlm, "--stages-from {}", 4, 9),
        (toy_lvlm, "--stages-from {} --stage3-steps 40", 4, 6),
        (toy_lvlm, "--moe-from stage1 --train all", 4, 9),
    ],
)
def test_the_films_of_a_script_cost_what_its_command_pays_for(script, flags, examples, moments, monkeypatch, tmp_path):
    """--toy's pretraining is paid for by all its runs; stage II by the variants, unless another run has trained it."""
    monkeypatch.setattr(options, "check_model", lambda *given: None)
    args = script.parse([*(["--task", "rte"] if script is glue_moefy else []), *flags.format(tmp_path).split()])
    job, made, shown = MagicMock(args=args), [], MagicMock()
    monkeypatch.setattr(script, "evenly", lambda size, count: made.append(count) or [0] * count)
    monkeypatch.setattr(script, "Film", lambda *given, count, **how: made.append(count))
    if script is glue_moefy:
        monkeypatch.setattr(script, "DataCollatorWithPadding", lambda tokenizer: lambda rows: shown)
        monkeypatch.setattr(script.use, "show_texts", lambda *given: shown)
        script.make_film(job, "ce-s0", None, STGCConfig(), 376)
    else:
        job.plan = lambda stage: script.Job.plan(job, stage)
        monkeypatch.setattr(script.lvlm, "film_batch", lambda *given: [shown] * 3)
        script.make_film(job, "ce-s0", None, STGCConfig(), [])
    assert made == [examples, moments]


def test_moments_are_closer_together_at_the_beginning():
    assert film.moments(50, 6) == [0, 4, 13, 23, 36, 50]
    for steps in (1, 7, 100, 520, 10**5):
        found = film.moments(steps)
        gaps = np.diff(found)
        assert found[0] == 0 and found[-1] == steps and len(found) <= film.COUNT and (gaps > 0).all()
    assert len(found) == film.COUNT and (np.diff(gaps) >= -1).all() and gaps[-1] > 5 * gaps[0]


def test_the_film_changes_nothing_in_the_training(runs_of):
    _, filmed, plainly = runs_of
    entries, *rest = outcome(filmed)
    assert [[one["step"] for one in entry.pop("probe")] for entry in entries] == [[0, 3, 6]] * len(VARIANTS)
    assert_same((entries, *rest), outcome(plainly))
    assert not list(plainly.glob("film-*")) and not (plainly / "inspect.html").exists()
    assert {path.name for path in filmed.glob("film-*.json")} == {f"film-{name}-s0.json" for name in VARIANTS}


def test_variants_show_the_same_examples_and_start_alike(runs_of):
    _, folder, _ = runs_of
    (one, arrays), *others, (dice, drawn) = (read(folder, f"{name}-s0") for name in VARIANTS)
    assert dice["tokens"] == one["tokens"] and dice["layers"][0]["margin"] == [None] * len(one["steps"])
    assert (drawn["0.experts"][1:] != drawn["0.experts"][:-1]).float().mean() > 0.5  # each moment has draws of its own
    assert one["steps"] == film.moments(6, 6) and one["run"]["delta"] == 5 and len(one["examples"]) == 4
    for content, values in others:
        for key in ("steps", "tokens", "examples"):
            assert content[key] == one[key]
        for key in ("0.logits", "0.experts", "0.cosines", "0.state"):  # before the first step
            assert torch.equal(values[key][0], arrays[key][0])
        assert not torch.equal(values["0.logits"][-1], arrays["0.logits"][-1])
    (own,) = one["layers"]
    assert len(own["moved"]) == sum(step + 5 <= 6 for step in one["steps"])
    for key in ("load", "conflicts"):
        assert all(len(row) == 4 for row in own[key])
    assert sum(own["load"][0]) == pytest.approx(1) and len(own["histogram"][0]) == film.BINS


def test_the_record_has_the_probe_of_the_film(runs_of, words, tmp_path):  # noqa: F811
    _, folder, _ = runs_of
    content, _ = read(folder, "ce-s0")
    (entry,) = (one for one in json.loads((folder / "results.json").read_text())["runs"] if one["variant"] == "ce")
    (first,), (middle,), (last,) = (one["layers"] for one in entry["probe"])
    (layer,) = content["layers"]
    for own, step in ((first, 0), (middle, 3), (last, 6)):
        number = content["steps"].index(step)
        for key in ("margin", "load", "histogram", "conflict_ratio", "consistency"):
            assert own[key] == layer[key][number]
        assert -1 <= own["feature_gradient"] <= 1 and own["bias_weight"] > 0 and own["consistency_by_chance"] < 0.5
        assert 0 < own["conflict_ratio"] <= own["conflict_ratio_others"]  # a pair is part of its mean
    assert content["run"]["delta"] == 5 and content["steps"] == film.moments(6, 6)  # moments 0 and 1 alone have twins
    assert first["moved"] == sum(layer["moved"]) / 2 and last["moved"] is None
    whole = json.loads((folder / "film-ce-s0.json").read_text())
    assert 0 < entry["film_seconds"] == round(whole["seconds"], 2)
    run([*words, "--conflict-loss", "none", "--epochs", "9", "--patience", "0", "--lr", "0", "--film"])  # no gain after one
    (entry,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [one["step"] for one in entry["probe"]] == [0, 6] and read(tmp_path / "out", "none-s0")[0]["steps"][-1] == 6


@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_film_survives_a_kill(runs_of, tmp_path, monkeypatch, step):
    command, folder, _ = runs_of
    command = [*command, "--film", "--output-dir", tmp_path / "cut"]
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            run(command)
    run([*command, "--resume"])
    assert_same(outcome(folder), outcome(tmp_path / "cut"))
    for name in VARIANTS:
        same_film(read(folder, f"{name}-s0"), read(tmp_path / "cut", f"{name}-s0"))


class Net(nn.Module):
    """Two MoE layers; its dropout would draw random numbers in train mode."""

    def __init__(self):
        super().__init__()
        self.moe = nn.ModuleList(MoELayer(Experts(4, 6, 8), top_k=2) for _ in range(2))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x, mask, labels):
        for layer in self.moe:
            x = x + self.drop(layer(x, mask))
        logits = self.head(x)
        kept = logits[mask], labels[mask]
        return type("Out", (), {"loss": nn.functional.cross_entropy(*kept), "logits": logits})


@pytest.mark.parametrize("gradients", ["bias", "weight"])
def test_a_moment_has_what_the_verdicts_have(tmp_path, gradients):
    torch.manual_seed(0)
    net = Net().train()
    batch = {"x": torch.randn(5, 4, 6), "mask": torch.rand(5, 4) > 0.2, "labels": torch.randint(3, (5, 4))}
    index = batch["mask"].flatten().nonzero().flatten()[:9]
    tokens = [{"text": str(n), "joined": False, "example": int(n) // 4, "patch": None} for n in index]
    examples = [{"kind": "text", "fields": [], "gold": "?", "image": None, "grid": None, "question": None}] * 5
    config = STGCConfig("ce", gradients=gradients, tau=0.1)
    STGC(net, config)  # the training's: its watches stay
    watches, state = [layer.watch for layer in net.moe], torch.get_rng_state()
    made = film.Film(tmp_path / "film-x", net, config, batch, film.Shown(examples, tokens, index), 30, lambda out: ["?"] * 5)
    made.step_done(0)
    assert [layer.watch for layer in net.moe] == watches and torch.equal(torch.get_rng_state(), state)
    assert net.training and net.drop.training and all(parameter.grad is None for parameter in net.parameters())
    net.eval()
    watch = STGC(net, STGCConfig("reroute", gradients=gradients, tau=0.1))
    loss = net(**batch).loss
    watch.loss(loss)
    assert made.content["loss"] == [pytest.approx(loss.item(), rel=1e-6)]
    others = STGC(net, STGCConfig("none", tau=0.1, gradients="weight" if gradients == "bias" else "bias"))
    others.loss(net(**batch).loss)
    both = zip(*([one.similarity_TK[one.judged_TK] for one in stgc.verdicts] for stgc in (watch, others)))
    bias_weight = [torch.corrcoef(torch.stack(rows))[0, 1].item() for rows in both]
    by_bias, by_weight = [stgc.stats() for stgc in (watch, others)][:: 1 if gradients == "bias" else -1]
    for i, (verdict, stats) in enumerate(zip(watch.verdicts, watch.stats())):
        found = {key: made.arrays[f"{i}.{key}"][0] for key in ("state", "best", "cosines", "norms", "experts")}
        assert torch.equal(found["state"] == film.CONFLICT, verdict.conflict_TK[index])
        assert torch.equal(found["state"] > 0, verdict.judged_TK[index]) and (found["state"] == film.CONFLICT).any()
        assert torch.equal(found["best"].long(), verdict.target_TK[index])
        torch.testing.assert_close(found["cosines"].float(), verdict.cos_TKL[index], atol=1e-3, rtol=1e-3)
        length_NK = verdict.norm_TKL[index].square().sum(-1).sqrt()
        torch.testing.assert_close(10 ** found["norms"].float(), length_NK, rtol=0.01, atol=0.0)
        own = made.content["layers"][i]
        (probed,) = (one["layers"][i] for one in made.content["probe"])
        assert all(probed[key] == stats[key] for key in ("conflict_ratio_others", "consistency_by_chance"))
        assert probed["bias_weight"] == pytest.approx(bias_weight[i], abs=1e-5)
        assert probed["conflict_ratio_bias"] == pytest.approx(by_bias[i]["conflict_ratio"]) != by_weight[i]["conflict_ratio"]
        assert own["conflict_ratio"] == [pytest.approx(stats["conflict_ratio"])]
        assert own["margin"] == [pytest.approx(stats["router_margin"], abs=1e-6)]
        assert own["load"][0] == pytest.approx(stats["load"])
        counts, real_T1 = [0] * film.BINS, batch["mask"].flatten().unsqueeze(1)
        for n, k in (verdict.judged_TK & real_T1).nonzero().tolist():
            similarity = sum(verdict.cos_TKL[n, k].tolist()) / verdict.cos_TKL.shape[2]
            counts[min(int((similarity + 1) / 2 * film.BINS), film.BINS - 1)] += 1
        assert own["histogram"] == [counts]


def test_moved_is_the_share_of_real_tokens_with_another_first_expert():
    net, mask = Net(), torch.rand(5, 4) > 0.2
    batch = {"x": torch.randn(5, 4, 6), "mask": mask, "labels": torch.randint(3, (5, 4))}
    made = film.Film(Path("film"), net, STGCConfig(), batch, film.Shown(), 30, lambda out: [])
    real = [n for n, keep in enumerate(mask.flatten().tolist()) if keep]
    firsts = [[], []]  # for each layer and step: the expert with the largest logit, of each token
    for step in range(12):
        for layer in net.moe:
            layer.router.weight.data += 0.2 * torch.randn_like(layer.router.weight)
        made.step_done(step)
        logits = []
        hooks = [layer.router.register_forward_hook(lambda *call, to=logits: to.append(call[2])) for layer in net.moe]
        net.eval()(**batch)
        for hook, own, logits_TE in zip(hooks, firsts, logits, strict=True):
            hook.remove()
            own.append([row.index(max(row)) for row in logits_TE.tolist()])
    pairs = [(step, step + made.delta) for step in made.content["steps"] if step + made.delta < 12]
    assert len(pairs) > 3 and len(real) < 20
    for own, first in zip(made.content["layers"], firsts):
        expected = [sum(first[a][n] != first[b][n] for n in real) / len(real) for a, b in pairs]
        assert own["moved"] == pytest.approx(expected, abs=1e-6) and 0 < sum(expected) < len(pairs)


class Faint(Net):
    """Its gradients are below the smallest number of float16, 6e-8."""

    def forward(self, x, mask, labels):
        out = super().forward(x, mask, labels)
        out.loss = out.loss * 1e-7
        return out


def test_fp16_with_its_loss_scale_shows_what_float32_shows():
    torch.manual_seed(0)
    net, batch = Faint(), {"x": torch.randn(5, 4, 6), "mask": torch.ones(5, 4).bool(), "labels": torch.randint(3, (5, 4))}
    half, found = partial(torch.autocast, "cpu", torch.float16), []
    for autocast, scale in ((nullcontext, 1.0), (half, 2.0**16), (half, 1.0)):
        shown = film.Shown([], [{"example": n // 4} for n in range(20)], range(20))
        made = film.Film(Path("film"), net, STGCConfig(), batch, shown, 30, lambda out: [], autocast)
        made.step_done(0, scale)
        found.append({key: value[0].float() for key, value in made.arrays.items()})
    exact, scaled, lost = found
    for i in range(2):
        assert (lost[f"{i}.state"] == 0).any() and (exact[f"{i}.state"] > 0).all()
        assert (scaled[f"{i}.state"] == exact[f"{i}.state"]).float().mean() > 0.9
        for key, close in (("norms", 0.05), ("cosines", 0.05)):
            torch.testing.assert_close(scaled[f"{i}.{key}"], exact[f"{i}.{key}"], atol=close, rtol=0.0)


def test_the_film_gets_the_loss_scale_of_the_training(words, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setattr(Training, "grad_scale", lambda self: 8.0)
    monkeypatch.setattr(film.Film, "look", lambda self, step, grad_scale: seen.append((step, grad_scale)))
    monkeypatch.setattr(film.Film, "finish", lambda self, step, grad_scale: seen.append((step, grad_scale)))
    run([*words, "--film", "--epochs", "1"])
    assert seen == [(step, 8.0) for step in (0, 1, 2, 3, 3)]


def test_a_film_that_is_ahead_of_its_checkpoint_is_cut(tmp_path):
    batch = {"x": torch.randn(2, 4, 6), "mask": torch.ones(2, 4).bool(), "labels": torch.randint(3, (2, 4))}
    make = lambda: film.Film(tmp_path / "f", net, STGCConfig(), batch, shown, 4, lambda out: [])  # noqa: E731
    net, shown = Net(), film.Shown()
    net.moe[0].experts.requires_grad_(False)  # all the same
    ahead, again = make(), make()
    for step in range(5):
        ahead.step_done(step)
    ahead.save()
    again.load(3)
    assert [one["moment"] for one in ahead.content["probe"]] == [0, 2, 4] and not net.moe[0].experts.w_in_EDF.requires_grad
    assert again.content["probe"] == ahead.content["probe"][:2] and again.content["steps"] == [0, 1, 2, 3]
    before = again.content["seconds"]
    again.finish(3)  # a training that ends here: its probe takes time, too
    assert [one["moment"] for one in again.content["probe"]] == [0, 2, 3] and again.content["seconds"] > before > 0


def test_a_matrix_has_the_cosines_of_its_pairs(tmp_path):
    torch.manual_seed(0)
    net, batch = Net(), {"x": torch.randn(5, 4, 6), "mask": torch.ones(5, 4).bool(), "labels": torch.randint(3, (5, 4))}
    tokens = [{"text": "t", "joined": False, "example": n // 4, "patch": None} for n in range(20)]
    made = film.Film(tmp_path / "f", net, STGCConfig(), batch, film.Shown([], tokens, torch.arange(20)), 30, lambda out: [])
    made.step_done(0)
    net.eval()
    outs, layer = [], net.moe[1]
    real, layer.experts.product = layer.experts.product, lambda *args: outs.append(real(*args)) or outs[-1]
    pairs = []
    layer.watch = lambda x, routing, own, keep: pairs.append(own)
    grads = torch.autograd.grad(net(**batch).loss, outs)
    rows = [pairs[0].by_token(grad) for grad in grads]
    places = [one for one in made.content["matrices"] if one["layer"] == 1]
    assert sum(len(one["pairs"]) for one in places) > 30
    for number, one in enumerate(made.content["matrices"]):
        if one["layer"] == 1:
            assert [tokens[n]["example"] for n, _ in one["pairs"]] == sorted(tokens[n]["example"] for n, _ in one["pairs"])
            n, k = torch.tensor(one["pairs"]).T
            assert (pairs[0].expert_ids_TK[n, k] == one["expert"]).all()
            cosines = [nn.functional.cosine_similarity(row[n, k][:, None], row[n, k][None], dim=-1) for row in rows]
            found = made.matrices[f"matrix{number}"].float() / 127
            torch.testing.assert_close(found, torch.stack(cosines).mean(0), atol=0.006, rtol=0.0)


def test_the_page_of_a_run_has_its_numbers(runs_of, tmp_path):
    _, folder, _ = runs_of
    written = (folder / "inspect.html").read_text()
    data = page.collect(folder)  # noqa: F811
    assert read_data(folder / "inspect.html") == data
    assert [one["name"] for one in data["variants"]] == VARIANTS and data["source"] == "film"
    assert [one["loss"] for one in data["variants"]] == ["none", "ce", "ce", "ce", "none"]
    assert [one["select"] for one in data["variants"]] == ["conflict", "conflict", "random", "all", "conflict"]
    assert [one["drawn"] for one in data["variants"]] == [False] * 4 + [True]
    content, arrays = film.read_film(folder / "film-ce-s0")
    own = data["variants"][1]["layers"][0]
    for key in ("experts", "state", "best", "logits", "cosines"):
        values = arrays[f"0.{key}"].float().numpy()
        assert np.abs(page.unpack(own[key]) - values).max() <= max(np.abs(values).max(), 1) / 32767
    assert own["moved"] == page.rounded(content["layers"][0]["moved"]) + [None] * (len(content["steps"]) - 2)
    text = page.describe(folder)
    assert text.count("after step 6, MoE layer") == 5 and "example 4" in text and "gold" in text
    assert "! s: it conflicts" in text
    target = tmp_path / "page.html"
    assert page.inspect(folder, target, 0).read_text() == written == page.inspect(folder, target).read_text()


def test_a_run_without_a_film_is_shown_from_its_models(runs_of, tmp_path, capsys):
    _, _, folder = runs_of
    run(["--inspect", folder, "--html", tmp_path / "page.html"])
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    shown = read_data(tmp_path / "page.html")
    assert shown["source"] == "model" and [one["name"] for one in shown["variants"]] == VARIANTS
    assert "no film" in shown["notes"][0] and all(one["steps"] == [0] for one in shown["variants"])
    run(["--inspect", folder / "model-ce-s0", "--html", tmp_path / "page.html"])  # a page of ours is replaced
    capsys.readouterr()
    run(["--inspect", folder, "--seed", "0"])
    said = capsys.readouterr().out
    assert "no film" in said and said.count(", MoE layer") == 5 and "after step" not in said
    with pytest.raises(UserError, match="--seed 3: .* has 0; name one"):
        run(["--inspect", folder, "--seed", "3"])


def test_a_run_of_the_dense_model_has_no_page(words, tmp_path, capsys):  # noqa: F811
    run([*words, "--variants", "dense", "--film", "--epochs", "1"])
    assert "no page: no variant of this run has a film" in capsys.readouterr().out
    assert not (tmp_path / "out" / "inspect.html").exists()


def test_the_text_of_a_run_without_a_model_is_its_films(runs_of, tmp_path, capsys):
    _, folder, _ = runs_of
    for path in [*folder.glob("film-*"), folder / "results.json"]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    run(["--inspect", tmp_path])
    assert "placebo, after step 6, MoE layer" in capsys.readouterr().out


def test_what_cannot_be_shown_is_named(runs_of, tmp_path):
    _, folder, plainly = runs_of
    (tmp_path / "mine.html").write_text("my notes")
    for call, message in (
        (lambda: page.inspect(folder, tmp_path / "mine.html"), "mine.html exists and is no page of a run"),
        (lambda: page.inspect(folder, tmp_path / "a.html", 7), "--seed 7: .* has 0; name one"),
        (lambda: page.inspect(plainly, tmp_path / "a.html"), "holds no film; train with --film"),
        (lambda: page.describe(tmp_path), "holds no film"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert (tmp_path / "mine.html").read_text() == "my notes" and not (tmp_path / "a.html").exists()


def test_the_pages_own_command(runs_of, tmp_path, monkeypatch, capsys):
    """It draws the page again, and its errors name its own flags."""
    _, folder, plainly = runs_of
    (tmp_path / "mine.html").write_text("my notes")
    for given, message in (
        ([folder, "--output", tmp_path / "again.html"], None),
        ([folder, "--output", tmp_path / "mine.html"], f"--output {tmp_path}/mine.html exists and is no page"),
        ([folder, "--seed", "7"], "--seed 7: "),
        ([plainly], f"the run {plainly} holds no film; train with --film"),
    ):
        monkeypatch.setattr("sys.argv", ["lab.report.page", *map(str, given)])
        if message is None:
            page.main()
            assert (tmp_path / "again.html").read_text() == (folder / "inspect.html").read_text()
        else:
            with pytest.raises(UserError) as error:
                page.main()
            assert str(error.value).startswith(message)
