"""toy_lvlm.py end to end, tiny: stages, variants, resume, a user's own data, asking, two processes."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import without_pictures
from forked import Launched
from PIL import Image
from test_launch import curve
from test_llava import write_digits
from test_page import read_data
from test_resume import Killed, kill_at
from transformers import CLIPImageProcessorPil, CLIPModel, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

import toy_lvlm
from lab.moe import moefication
from lab.report import figures, page
from lab.run.cli import UserError
from lab.run.hub import Checkpoint
from lab.vision import lvlm
from lab.vision.instructions import (
    KINDS,
    Collate,
    Instruction,
    InstructionSet,
    Pixels,
    Unpacked,
    encode,
    make_packs,
    make_tokenizer,
)
from stgc import MoELayer
from stgc_plus import STGCConfig

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--scenes 64 --test-scenes 6 --batch-size 4 --log-steps 2 --device cpu".split()
STEPS = "--clip-steps 3 --text-steps 2 --stage1-steps 2 --stage2-steps 3 --stage3-steps 4".split()
WORDS = [*SMALL, *STEPS]
VARIANTS = "dense,none,ce,reroute-one,placebo-weight,embedding,feature,task"
WHOLE = [*WORDS, "--variants", VARIANTS, "--capacity", "0.5", "--bpr"]
PIXELS = Pixels(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def run(command) -> None:
    toy_lvlm.main(toy_lvlm.parse(list(map(str, command))))


def fails(command, message: str) -> None:
    """One line, exit code 2, before anything heavy or in it."""
    try:
        args = toy_lvlm.parse(list(map(str, command)))
    except SystemExit as stop:
        assert stop.code == 2
        return
    with pytest.raises(UserError, match=message):
        toy_lvlm.main(args)


def read(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    without_pictures(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a finished run of every kind of variant."""
    folder, draw = tmp_path_factory.mktemp("lvlm") / "whole", figures.plot_run

    def draw_all(folder, record):
        """The curves once, not after each variant anew."""
        if len([*folder.glob("*.jsonl")]) == len(VARIANTS.split(",")):
            draw(folder, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "plot_run", draw_all)
        run([*WHOLE, "--output-dir", folder])
    return folder


@pytest.mark.slow
def test_the_record_of_a_run(whole):
    record = read(whole)
    assert record["name"] == "lvlm-scenes" and record["data"]["train_pictures"] == 64
    assert [one["stage"] for one in record["stages"]] == ["clip", "text", "stage1", "stage2"]
    assert 0 <= record["stages"][0]["retrieval"] <= 1
    dense = record["stages"][-1]
    assert dense["blind"].keys() == {"majority", "no picture"} and 0 < dense["blind"]["majority"]["score"] < 0.5
    assert {"score", "caption", "vqa", "choice", "ocr", "region", "new pairs", "vqa, clean"} <= dense["scores"].keys()
    first = {}
    for entry in record["runs"]:
        lines = curve(whole, f"{entry['variant']}-s0")
        first[entry["variant"]] = lines[0]["loss"]
        assert lines[-1]["step"] == 4 and ("conflict_ratio" in lines[0]) == (entry["variant"] != "dense")
        assert entry["last"].keys() == {"score", "caption", "vqa", "choice", "ocr", "region"}
        assert len(entry["limited"]) == (0 if entry["variant"] == "dense" else 2)
        assert all(0 < own["dropped"] < 1 for own in entry["limited"])
        assert (whole / f"model-{entry['variant']}-s0" / "model.safetensors").exists()
        assert (whole / f"sheet-{entry['variant']}-s0.png").exists()
        assert (whole / f"routes-{entry['variant']}-s0.png").exists() == (entry["variant"] != "dense")
    for variant in ("none", "ce", "reroute-one", "placebo-weight"):
        assert first[variant] == pytest.approx(first["dense"], rel=1e-5)  # copies of the FFN compute what it did
    for name in ("curves.png", "comparison.png"):
        assert (whole / name).read_bytes()[:4] == b"\x89PNG"
    assert not (whole / "checkpoints").exists() and not (whole / "stages" / "checkpoints").exists()


@pytest.mark.slow
@torch.no_grad()
def test_the_moe_equals_the_dense_model_before_stage_iii(whole):
    model, tokenizer, card = lvlm.load(Checkpoint("--run", whole / "stages" / "stage2-s0"))
    torch.manual_seed(0)
    image_id, ids = model.config.image_token_id, torch.randint(5, len(tokenizer), (2, 30))
    ids[:, 3 : 3 + card.image_tokens] = image_id
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 64, 64), "attention_mask": torch.ones(2, 30).long()}
    batch["attention_mask"][1, 25:] = 0
    dense = model(**batch).logits
    sparse = moefication.moefy(model, moefication.MoESpec("every-second", num_experts=4))
    assert [name for name, one in sparse.named_modules() if isinstance(one, MoELayer)] == [
        f"model.language_model.layers.{i}.mlp" for i in (1, 3)
    ]
    keep = batch["attention_mask"].bool()
    torch.testing.assert_close(sparse(**batch).logits[keep], dense[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_stage_iii_trains_the_moe_layers_alone(whole, tmp_path):
    before, _, _ = lvlm.load(Checkpoint("--run", whole / "stages" / "stage2-s0"))
    after, _, _ = lvlm.load(Checkpoint("--run", whole / "model-ce-s0"))
    old, new = before.state_dict(), after.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old.keys() & new.keys())
    assert {name.rpartition(".layers.")[2].split(".")[0] for name in new.keys() - old.keys()} == {"1", "3"}
    experts = [one.experts for one in after.modules() if isinstance(one, MoELayer)]
    assert all(not torch.equal(own.w_in_EDF[0], own.w_in_EDF[1]) for own in experts)  # they were copies
    clip = CLIPModel.from_pretrained(whole / "stages" / "clip-s0")
    vision = clip.vision_model.state_dict()
    assert all(torch.equal(old[f"model.vision_tower.{name}"], value) for name, value in vision.items())
    (tmp_path / "all").mkdir()
    run([*WORDS, "--train", "all", "--conflict-loss", "none", "--output-dir", tmp_path / "all", "--overwrite"])
    other, _, _ = lvlm.load(Checkpoint("--run", tmp_path / "all" / "model-none-s0"))
    moved = {name for name, value in other.state_dict().items() if name in old and not torch.equal(value, old[name])}
    assert any("self_attn" in name for name in moved) and not any("vision_tower" in name for name in moved)


def outcome(folder):
    drop = ("seconds", "film_seconds", "samples_per_second", "peak_memory_bytes")
    record = read(folder)
    entries = [{key: value for key, value in one.items() if key not in drop} for one in record["stages"] + record["runs"]]
    weights = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("model.safetensors"))}
    return entries, {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*.jsonl"))}, weights


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "out"
    command = [*WORDS, "--variants", "ce,feature", "--save-steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        run([*command, "--output-dir", folder])
    assert [path.name for path in folder.glob("film-*.json")] == ["film-ce-s0.json"] and (folder / "inspect.html").exists()
    return command, outcome(folder)


@pytest.mark.slow
def test_the_film_changes_nothing_in_the_training(straight, tmp_path):
    command, (entries, *rest) = straight
    run([*command, "--no-film", "--output-dir", tmp_path / "out"])
    assert ["probe" in entry for entry in entries] == [False] * 4 + [True, False]  # ce has a film, feature has none
    entries = [{key: value for key, value in entry.items() if key != "probe"} for entry in entries]
    assert outcome(tmp_path / "out") == (entries, *rest)
    assert not list((tmp_path / "out").glob("film-*")) and not (tmp_path / "out" / "inspect.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 5, 10, 18])  # clip 1-3, text 4-5, I 6-7, II 8-10, ce 11-14, feature 15-18
def test_a_killed_run_ends_as_if_it_had_not_been(straight, tmp_path, monkeypatch, capsys, step):
    command, expected = straight
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            run([*command, "--output-dir", tmp_path / "cut"])
    torch.manual_seed(123)
    run([*command, "--output-dir", tmp_path / "cut", "--resume"])
    assert outcome(tmp_path / "cut") == expected
    with monkeypatch.context() as patch:
        kill_at(patch, 1)  # complete: nothing is trained
        run([*command, "--output-dir", tmp_path / "cut", "--resume"])
        capsys.readouterr()
        run([*command, "--output-dir", tmp_path / "cut"])
    printed = capsys.readouterr().out
    assert "finished with the same options; nothing is trained" in printed and "stage II" in printed
    with pytest.raises(UserError, match="holds a run with --stage2-steps 3: name another folder"):
        run([*command, "--stage2-steps", "5", "--output-dir", tmp_path / "cut"])
    with pytest.raises(UserError, match="was started with --stage2-steps 3"):
        run([*command, "--stage2-steps", "5", "--output-dir", tmp_path / "cut", "--resume"])


@pytest.mark.slow
def test_dense_stages_of_another_run(whole, tmp_path):
    """--stages-from: the same curves as where the stages were trained, and nothing is trained or written there again.
    --moe-from stage1: the experts come before stage II. What was made otherwise is refused before anything is written."""
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    run([*WORDS, "--variants", "none,random", "--stages-from", whole, "--output-dir", tmp_path / "same"])
    assert curve(tmp_path / "same", "none-s0") == curve(whole, "none-s0")
    assert [one["stage"] for one in read(tmp_path / "same")["stages"]] == ["stage2"]
    assert read(tmp_path / "same")["stages"][0] == read(whole)["stages"][-1]
    early = [*WORDS, "--variants", "none", "--stages-from", whole, "--moe-from", "stage1", "--train", "all"]
    run([*early, "--output-dir", tmp_path / "early"])
    (entry,) = read(tmp_path / "early")["runs"]
    assert 0 <= entry["start"] <= 1 and read(tmp_path / "early")["stages"][0]["stage"] == "stage1"
    assert [one["start"] for one in read(tmp_path / "same")["runs"]] == [None, None]  # copies answer as the dense model does
    parts = [*WORDS, "--variants", "none", "--stages-from", whole, "--experts", "split"]
    run([*parts, "--output-dir", tmp_path / "parts"])
    assert 0 <= read(tmp_path / "parts")["runs"][0]["start"] <= 1
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    for wrong, message in (
        (["--stage1-lr", "1e-4"], "was made with --stage1-lr 0.001"),
        (["--seeds", "1"], "has no stage2-s1: train that seed there first"),
        (["--stages-from", tmp_path], "no run of toy_lvlm.py is there"),
    ):
        fails([*WORDS, "--stages-from", whole, "--output-dir", tmp_path / "no", *wrong], message)
    with (tmp_path / "same" / "results.json").open("r+") as file:
        text = file.read().replace(read(whole)["made_from"]["the data to train"], "0")
        file.seek(0), file.truncate(), file.write(text)
    fails([*WORDS, "--stages-from", tmp_path / "same", "--output-dir", tmp_path / "no"], "the data to train changed since")
    fails([*WORDS, "--moe-from", "stage1"], "")
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, server):
    command = [*WORDS, "--variants", "ce,ce-one,feature,task", "--log-steps", "1"]
    plain = "from conftest import without_pictures; from pytest import MonkeyPatch; without_pictures(MonkeyPatch())"
    two = Launched(2, "toy_lvlm.py", *command, "--output-dir", tmp_path / "two", before=plain)
    run([*command, "--output-dir", tmp_path / "one"])
    done = two.wait()
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written:") == 1
    names = ["stages/clip-s0", "stages/text-s0", "stages/stage1-s0", "stages/stage2-s0"]
    for name in [*names, "ce-s0", "ce-one-s0", "feature-s0", "task-s0"]:
        one, two = curve(tmp_path / "one", name), curve(tmp_path / "two", name)
        assert len(one) == len(two)
        keys = {"loss", "conflict_ratio", "consistency", "balance_loss", "conflict_loss"}
        keys = {"loss"} if name == "feature-s0" else keys  # a near tie there moves a whole conversation to another expert
        for a, b in zip(one, two, strict=True):
            for key in a.keys() & keys:
                close = 1e-3 if name in names[:3] else 4e-3  # Muon rounds to bfloat16: sums in another order show more
                if key == "conflict_loss":  # the mean of the flagged pairs, of which a near tie exchanges a few
                    close = 2e-2
                assert a[key] == pytest.approx(b[key], rel=close, abs=close), (name, a["step"], key)


@pytest.mark.slow
def test_own_data(tmp_path, capsys):
    """scikit-learn's handwritten digits in LLaVA's format, a few faults among them."""
    file, pictures = write_digits(tmp_path, 40)
    entries = json.loads(Path(file).read_text())
    entries[3]["image"] = "missing.png"
    entries[5]["conversations"][1]["value"] = "seven " * 300
    Path(file).write_text(json.dumps(entries))
    command = [*STEPS, *"--batch-size 4 --device cpu --conflict-loss none --data".split(), file, "--image-dir", pictures]
    fails([*command, "--output-dir", tmp_path / "out"], "--max-bad 0: .*entry 4.*missing.png")
    assert not (tmp_path / "out").exists()
    fails([*command, "--max-bad", "1", "--output-dir", tmp_path / "out"], "--max-bad 1: .*too long.*entry 6")
    capsys.readouterr()
    run([*command, "--max-bad", "2", "--output-dir", tmp_path / "out"])
    printed = capsys.readouterr().out
    assert "2 of 40 entries left out" in printed and "entry 4" in printed and "entry 6" in printed
    record, told = read(tmp_path / "out"), json.loads((tmp_path / "out" / "entries.json").read_text())
    assert len(told["left out"]) == 2 and record["name"].startswith("lvlm-")
    assert record["data"]["train"] + record["data"]["test"] == 38 and record["data"]["test"] == 3
    test, more = write_digits(tmp_path, 5, start=36)  # the training's last ones are among them
    assert Path(more) == Path(pictures)
    run([*command, "--max-bad", "2", "--eval-data", test, "--output-dir", tmp_path / "eval"])
    assert read(tmp_path / "eval")["data"]["test"] == 5
    assert re.search(r"\. \d pictures of --eval-data are in --data too", capsys.readouterr().out)


@pytest.mark.slow
def test_a_damaged_stage_is_named(whole, tmp_path):
    """A run that stopped behind CLIP's stage, whose folder then was cut."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "stages" / "clip-s0" / "config.json").write_text("{")
    for name in ("text", "stage1", "stage2"):
        shutil.rmtree(folder / "stages" / f"{name}-s0")
    (folder / "results.json").write_text(json.dumps(read(folder) | {"runs": []}))
    fails([*WHOLE, "--output-dir", folder, "--resume"], "clip-s0 cannot be loaded .*remove it")


@pytest.mark.slow
def test_all_stages_have_the_precision(tmp_path, monkeypatch):
    found, forward = [], CLIPModel.forward

    def watched(*args, **kwargs):
        found.append(torch.is_autocast_enabled("cpu"))
        return forward(*args, **kwargs)

    monkeypatch.setattr(CLIPModel, "forward", watched)
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision per process
    run([*WORDS, "--precision", "bf16", "--variants", "dense", "--output-dir", tmp_path / "out"])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert found[:3] == [True] * 3  # its training; what it has learnt is tested as it is


@pytest.mark.slow
def test_pretrained_parts(tmp_path, monkeypatch):
    """Folders that save_pretrained wrote, with another picture size, no padding token and biases in no linear."""
    tokenizer = make_tokenizer(["what colour is it?", " red"])
    tokenizer.pad_token = None
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **text)).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    file = tmp_path / "lm" / "tokenizer.json"
    file.write_text(file.read_text().replace("<image>", "<other>"))  # so that the model needs a new row for the picture
    clip = lvlm.make_clip(make_tokenizer(["red"]))
    clip.config.vision_config.image_size = 96
    CLIPModel(clip.config).save_pretrained(tmp_path / "clip")
    size = {"size": {"shortest_edge": 96}, "crop_size": {"height": 96, "width": 96}}
    CLIPImageProcessorPil(**size).save_pretrained(tmp_path / "clip")
    command = [*SMALL, *STEPS[4:], "--conflict-loss", "none", "--clip", tmp_path / "clip", "--lm", tmp_path / "lm"]
    looked = []
    for name in ("find_clip", "find_lm"):
        real = getattr(lvlm, name)
        monkeypatch.setattr(lvlm, name, lambda path, real=real: (looked.append(Path(path).name), real(path))[1])
    run([*command, "--output-dir", tmp_path / "out"])
    assert looked == ["clip", "lm"]  # each once
    assert [one["stage"] for one in read(tmp_path / "out")["stages"]] == ["stage1", "stage2"]
    model, _, card = lvlm.load(Checkpoint("--run", tmp_path / "out" / "model-none-s0"))
    assert card.size == 96 and card.image_tokens == 9 and model.config.text_config.hidden_size == 32
    fails([*command, "--lm", tmp_path / "clip", "--output-dir", tmp_path / "x"], "--lm: the .* cannot be loaded")
    fails([*command, "--clip", tmp_path / "lm", "--output-dir", tmp_path / "x"], "--clip .*it is a llama, not a CLIP")
    config = PhiConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **text)
    PhiForCausalLM(config).save_pretrained(tmp_path / "lm")
    fails([*command, "--output-dir", tmp_path / "x"], "--lm: its head has a bias")
    fails([*command, "--text-steps", "3"], "")


def test_a_page_shows_conversations_of_mixed_kinds_where_they_are_in_the_batch():
    data = lvlm.load_data(toy_lvlm.parse(WORDS), None, None, None)
    packs = make_packs(data.train, data.encoded, data.image_id, 256)[:12]
    batch = Collate(data.train, packs, data.pixels, data.pad_id)(range(12))
    shown, ends = lvlm.show_packs(data.train, packs, data.tokenizer, 2, batch["input_ids"].shape[1])
    ids, labels = (batch[name].flatten()[shown.index].tolist() for name in ("input_ids", "labels"))
    texts = data.tokenizer.convert_ids_to_tokens(ids)
    assert len(texts) == len(shown.tokens) > 150 and len(shown.examples) == len(ends) == 8
    kinds = []
    for number, (example, (start, end), pack) in enumerate(zip(shown.examples, ends, packs)):
        own = [n for n, token in enumerate(shown.tokens) if token["example"] == number]
        assert [shown.tokens[n]["patch"] for n in own if texts[n] == "<image>"] == [[0, 0], [0, 1], [1, 0], [1, 1]]
        ((_, _, first), (name, answer, last)) = example["fields"]
        assert name == "answer" and first == answer and texts[own[last]] == "<eos>"
        assert [labels[n] for n in own] == [-100] * answer + [ids[n] for n in own[answer:]]
        assert batch["labels"][number, start:end].tolist()[-len(own[answer:]) :] == [ids[n] for n in own[answer:]]
        group = [data.train.instructions[row] for row in pack.rows]
        (one,) = (one for one in group if one.turns[0] == (f"<image>\n{example['question']}", example["gold"]))
        assert data.tokenizer.decode([ids[n] for n in own[answer:last]]).strip() == example["gold"]
        assert torch.equal(lvlm.picture_of(example["image"], 64), data.train.images_N3SS[one.image])
        kinds.append(one.kind)
    assert len(set(kinds)) == 5 and max(map(kinds.count, kinds)) == 2


def test_a_conversation_of_turns_and_one_without_a_picture():
    picture = torch.randint(256, (1, 3, 4, 4), dtype=torch.uint8)
    turns = (("<image>\nwhat?", "a cat"), ("what colour?", "red"))
    data = InstructionSet(picture, [Instruction(turns, 0, "vqa"), Instruction((("who?", "I"),), None, "vqa")])
    tokenizer = make_tokenizer(["what colour? who? a cat red I"])
    packs = make_packs(data, encode([one.turns for one in data.instructions], tokenizer, 4), tokenizer.vocab["<image>"], 99)
    shown, _ = lvlm.show_packs(data, packs, tokenizer, 2, 50)
    one, other = shown.examples
    assert (one["kind"], one["question"], one["gold"]) == ("picture", "what? what colour?", "a cat red")
    assert [name for name, *_ in one["fields"]] == ["question", "answer"] * 2
    assert (other["kind"], other["question"], other["gold"], other["image"]) == ("text", "who?", "I", None)
    assert [token["text"] for token in shown.tokens if token["example"] == 1][-2:] == ["I", "<eos>"]


def test_a_card_keeps_examples_of_mixed_kinds(tmp_path):
    data = lvlm.load_data(toy_lvlm.parse(WORDS), None, None, None)
    card = lvlm.Card(*data.pixels, data.image_tokens, lvlm.choose_examples(data.test))
    (tmp_path / "lvlm.json").write_text(json.dumps(dataclasses.asdict(card)))
    kept = Checkpoint("--inspect", tmp_path).read("lvlm.json", lvlm.Card).instructions()
    assert {one.kind for one in kept.instructions} == set(KINDS) and torch.equal(kept.images_N3SS, data.test.images_N3SS)
    known = [(one.turns, one.image, one.kind) for one in data.test.instructions]
    assert all((one.turns, i, one.kind) in known for i, one in enumerate(kept.instructions)) and len(kept.instructions) == 6
    assert (tmp_path / "lvlm.json").stat().st_size < 100_000


@pytest.mark.slow
def test_inspect(whole, tmp_path, capsys):
    """From the film; without one, from the saved models, also of sample-level routings: a token's logits are those of its
    conversation alone."""
    run(["--inspect", whole])
    said = capsys.readouterr().out
    assert said.count("after step 4, MoE layer") == 2 * 4 and "training examples" in said and "patch 1 1" in said
    for path in [whole / "results.json", *whole.glob("model-*")]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    run(["--inspect", tmp_path])
    assert capsys.readouterr().out.count(", MoE layer") == 2 * 7  # all but dense
    run(["--inspect", tmp_path, "--html", tmp_path / "page.html"])
    data = read_data(tmp_path / "page.html")
    assert [one["name"] for one in data["variants"]] == VARIANTS.split(",")[1:] and data["source"] == "model"
    for variant in data["variants"]:
        model, tokenizer, card = lvlm.load(Checkpoint("--run", tmp_path / f"model-{variant['name']}-s0"))
        layers = [one for one in model.modules() if isinstance(one, MoELayer)]
        alone = []
        for one in card.instructions().instructions:
            single = InstructionSet(card.instructions().images_N3SS[[one.image]], [dataclasses.replace(one, image=0)])
            encoded = encode([one.turns], tokenizer, card.image_tokens)
            packs = make_packs(single, encoded, tokenizer.vocab["<image>"], 0, share=False)
            found = lvlm.look_at(model, *lvlm.film_batch(model, Collate(single, packs, card.pixels, 0), [0], tokenizer, 2))
            alone.append([found[1][f"{i}.logits"][0] for i in range(len(layers))])
        for i, layer in enumerate(variant["layers"]):
            shown = torch.tensor(page.unpack(layer["logits"])[0])
            torch.testing.assert_close(shown, torch.cat([own[i] for own in alone]).double(), rtol=0.0, atol=2e-3)
    card = json.loads((tmp_path / "model-none-s0" / "lvlm.json").read_text())
    del card["examples"]
    (tmp_path / "model-none-s0" / "lvlm.json").write_text(json.dumps(card))
    fails(["--inspect", tmp_path / "model-none-s0"], "lvlm.json has no examples, as an older version wrote it; train again")
    fails(["--inspect", tmp_path / "model-dense-s0"], "is a dense model without MoE layers")
    fails(["--inspect", whole / "stages"], "holds no film and no saved model")
    run(["--ask", "what?", "--run", tmp_path / "model-none-s0"])  # which needs none


def test_the_end_of_a_caption_is_where_clip_reads_it():
    """Whatever number the tokenizer's end has: another text before it is another feature."""
    tokenizer = make_tokenizer(["red blue green"])
    for end in (tokenizer.eos_token, tokenizer.convert_ids_to_tokens(2)):
        tokenizer.eos_token = end
        clip = lvlm.make_clip(tokenizer)
        captions = lvlm.CollateClip(
            torch.zeros(2, 3, 64, 64, dtype=torch.uint8), ["red", "blue green red"], tokenizer, PIXELS
        )
        ids_BL = captions([0, 1])["input_ids"]
        texts = clip.text_model(ids_BL)
        ends_B = (ids_BL == lvlm.caption_end(tokenizer)).int().argmax(1)
        torch.testing.assert_close(texts.pooler_output, texts.last_hidden_state[[0, 1], ends_B])


def test_sample_level_variants_train_on_the_same_conversations():
    seen = {}
    data = lvlm.load_data(toy_lvlm.parse(WORDS), None, None, None)
    for share in (True, False):
        packs = make_packs(data.train, data.encoded, data.image_id, 256, share)
        seen[share] = Collate(data.train, packs, data.pixels, data.pad_id)
    both = seen[True], Unpacked(seen[True], seen[False])
    assert len(both[0]) == len(both[1]) == 64
    one, other = (collate([5, 2]) for collate in both)
    assert (one["labels"] != -100).sum() == (other["labels"] != -100).sum() > 40
    assert len(other["rows"]) > 10 and len(other["pixel_values"]) == len(other["rows"])


def test_data_without_pictures(tmp_path):
    file, pictures = write_digits(tmp_path, 12)
    entries = json.loads(Path(file).read_text())
    for entry in entries:
        entry.pop("image")
        entry["conversations"][0]["value"] = entry["conversations"][0]["value"].replace("<image>", "").strip()
    Path(file).write_text(json.dumps(entries))
    command = [*STEPS, *"--batch-size 4 --device cpu --data".split(), file, "--image-dir", pictures]
    fails([*command, "--output-dir", tmp_path / "out"], "--data: no training conversation has a picture")


@pytest.mark.slow
def test_ask_and_chat(whole, tmp_path, capsys, monkeypatch):
    Image.new("RGBA", (90, 50), (255, 0, 0, 128)).save(tmp_path / "x.png")
    for variant in ("ce", "embedding", "feature", "task", "dense"):
        run(["--ask", "what colour is the circle?", "--image", tmp_path / "x.png", "--run", whole / f"model-{variant}-s0"])
    out = capsys.readouterr()
    assert len(out.out.splitlines()) >= 4 and "model-dense-s0" in out.err and "unknown" not in out.err
    run(["--ask", "what zyxw is the circle?", "--run", whole])
    assert "warning: words that are unknown to the model: zyxw\n" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("where is it?\n\n<image> what?\n"))
    run(["--chat", "--run", whole])
    assert "model-task-s0, no picture" in capsys.readouterr().err  # the last run's
    fails(["--ask", "what?"], "")
    fails(["--ask", "what?", "--run", tmp_path], "--run .* holds no model")
    fails(["--ask", "what?", "--run", whole, "--image", tmp_path / "y.png"], "--image: picture")
    broken = tmp_path / "model-none-s0"
    broken.mkdir()
    for path in (whole / "model-none-s0").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "lvlm.json").write_text('{"size": -1, "mean": [0, 0, 0], "std": [1, 1, 1], "image_tokens": 16}')
    fails(["--ask", "what?", "--run", broken], "cannot be loaded .*size")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--image-dir .", "--image-dir, --eval-data and --max-bad go with --data"),
        ("--max-bad 3", "--image-dir, --eval-data and --max-bad go with --data"),
        ("--clusters 9", "--clusters 9: only `embedding` has clusters"),
        ("--ask what? --run . --precision bf16", "--precision is not read by --ask and --chat"),
        ("--data nowhere.json", "--data: 'nowhere.json': no such file; name another"),
        ("--bpr", "--bpr needs a capacity"),
        ("--routing task --variants none,ce", "--routing task is a variant's name here"),
        ("--routing task --beta 7", "--routing task has neither loss"),
        ("--variants none,feature --router cosine", "--router cosine: feature is a router of its own"),
        ("--routing embedding --top-k 1", "--top-k 1: nothing trains the router of embedding"),
        ("--capacity 0.5 0.5", "--capacity 0.5 0.5: one repeated"),
        ("--variants none,everything", "--variants everything: unknown"),
        ("--seeds 1 1", "--seeds 1 1: one repeated"),
        ("--top-k 5", "--top-k 5 is above --num-experts 4"),
        ("--top-k 4 --conflict-loss reroute", "needs --top-k below --num-experts"),
        ("--clip ./nowhere", "--clip ./nowhere: no such folder"),
        ("--run .", "--run goes with --ask or --chat"),
        ("--resume --overwrite", "choose one"),
        ("--scenes 5", "must be an integer at least 64"),
    ],
)
def test_bad_flags_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        toy_lvlm.parse(flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_bad_values_that_only_the_model_shows(tmp_path):
    out = ["--output-dir", tmp_path / "out"]
    fails([*WORDS, "--moe-layers", "7", *out], "--moe-layers: layers='7' names 7, but the model has 4 layers")
    fails([*WORDS, "--experts", "split", "--num-experts", "5", *out], "--num-experts: 352 neurons cannot be split")
    fails([*WORDS, "--max-length", "16", *out], "--max-length 16: generated scenes need")
    fails([*WORDS, "--device", "mps", *out], "--device mps: this machine has")
    assert not (tmp_path / "out").exists()


def test_help_is_quick_and_every_flag_is_read():
    code = (
        "import atexit, runpy, sys; sys.argv = ['toy_lvlm.py', '--help']; "
        "atexit.register(lambda: print('heavy:', [m for m in ('torch', 'PIL', 'numpy') if m in sys.modules])); "
        "runpy.run_path('toy_lvlm.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "heavy: []" in done.stdout and "--stage3-lr" in done.stdout
    files = ("toy_lvlm.py", "lab/run/options.py", "lab/run/runs.py", "lab/run/training.py", "lab/vision/lvlm.py")
    source = "".join((ROOT / name).read_text() for name in files)
    flags = {action.dest for action in toy_lvlm.make_parser()._actions} - {"help"}
    flags -= {f"{stage}_{what}" for stage in toy_lvlm.STAGES for what in ("steps", "lr")}  # read by Job.plan
    dead = [flag for flag in flags if not re.search(rf'\bargs\.{flag}\b|getattr\(.*"{flag}"|[(,] ?"{flag}"', source)]
    assert len(flags) > 30 and not dead, dead


def test_method_defaults_are_those_of_the_config():
    args, config = toy_lvlm.make_parser().parse_args([]), STGCConfig()
    for field in dataclasses.fields(config):
        if hasattr(args, field.name) and field.name != "seed":  # --seed: of the page
            assert getattr(args, field.name) == getattr(config, field.name), field.name
