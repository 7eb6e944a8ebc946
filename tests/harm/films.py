"""Damaged films, damaged examples in the card of a saved LVLM, and flags of the page that do not fit. Each is refused in one
line, and no page is written. What is done to a film is an edit of its JSON and its arrays, or of the text of its files.
"""

import base64
import io
import json
from dataclasses import asdict

import torch
from harm.build import CARD, ENTRY, refused, stopped
from PIL import Image
from safetensors.torch import save_file
from test_film import Net

import glue_moefy
import toy_lvlm
from lab.moe import film
from lab.report import page
from lab.run import files
from lab.vision import lvlm
from lab.vision.instructions import make_tokenizer
from stgc_plus import STGCConfig

# ---- 1. Films ----


def changed(**values):
    return lambda content, arrays: content.update(values)


def within(key, **values):
    """Values of the run, or of its first token, layer and so on."""
    return lambda content, arrays: (content[key] if key == "run" else content[key][0]).update(values)


def array(name, change):
    return lambda content, arrays: arrays.update({name: change(arrays[name])})


def absent(*names):
    return lambda content, arrays: [part.pop(name, None) for part in (content, arrays) for name in names]


def damaged_film(edit, message, *, tmp_path):
    """`edit`: of both parts; or an ending, and the bytes of this file made of those before, or None for no file."""
    net, shown, path = Net(), film.Shown(), tmp_path / "film-ce-s0"
    batch = {"x": torch.randn(2, 4, 6), "mask": torch.ones(2, 4).bool(), "labels": torch.randint(3, (2, 4))}
    for start in (0, 4):
        shown.add(make_tokenizer(["a b"]), [5, 6, 7, 8], range(start, start + 4), "red")
    made = film.Film(path, net, STGCConfig(), batch, shown, 0, lambda out: ["red", "blue"])
    made.step_done(0)
    made.save()
    files.write_json(tmp_path / "results.json", {"name": "toy", "config": {}, "data": {}, "runs": [ENTRY]})
    page.inspect(tmp_path, tmp_path / "good.html")
    if callable(edit):
        content, arrays = film.read_film(path)
        edit(content, arrays)
        path.with_suffix(".json").write_text(json.dumps(content))
        save_file(arrays, path.with_suffix(".safetensors"))
    else:
        file = path.with_suffix(edit[0])
        before = file.read_bytes()
        file.unlink()
        if edit[1] is not None:
            file.write_bytes(edit[1](before))
    with refused(f"^--inspect.*film.* (cannot be read|cannot be shown) .*{message}.*; remove it", tmp_path):
        page.inspect(tmp_path, tmp_path / "bad.html")
    assert not (tmp_path / "bad.html").exists()


# ---- 2. Cards ----


def picture(*size, form="PNG", mode="RGB", cut=None) -> str:
    file = io.BytesIO()
    Image.new(mode, size).save(file, form)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()[:cut]).decode()


def example(**values) -> list[dict]:
    return [{"turns": [["<image> what?", "red"]], "kind": "vqa", "image": picture(4, 4)} | values]


def damaged_examples(examples, message, *, tmp_path, monkeypatch):
    """None: a card of before."""
    card = asdict(CARD) | {"examples": examples}
    files.write_json(tmp_path / lvlm.CARD, {key: value for key, value in card.items() if value is not None})
    monkeypatch.setattr(lvlm, "load", lambda saved: (Net(), None, saved.read(lvlm.CARD, lvlm.Card)))
    with refused(f"^--inspect.*{message}.*; train again", tmp_path):
        lvlm.film_of_model(tmp_path)


# ---- 3. Flags ----


def flags_that_do_not_fit(flags, message, *, capsys, tmp_path):
    for script, words in ((glue_moefy, ["--task", "rte", "--toy"]), (toy_lvlm, [])):
        flags = flags.replace("HERE", str(tmp_path))
        with stopped(capsys, message):
            script.parse([*words * ("--inspect" not in flags), *flags.split()])


# ---- 4. The table ----

CASES = {
    damaged_film: {
        "cut arrays": ((".safetensors", lambda text: text[:-9]), "Error while"),
        "the start of its arrays": ((".safetensors", lambda text: text[:99]), "Error while"),
        "no arrays": ((".safetensors", None), "No such file"),
        "empty arrays": ((".safetensors", lambda text: b""), "Error while"),
        "a pickle": ((".safetensors", lambda text: b"\x80\x04K\x05."), "Error while"),
        "cut JSON": ((".json", lambda text: text[:-9]), "is not a JSON object"),
        "empty JSON": ((".json", lambda text: b""), "is not a JSON object"),
        "not UTF-8": ((".json", lambda text: b"\xff"), "is not a JSON object"),
        "null": ((".json", lambda text: b"null"), "is not a JSON object"),
        "deep": ((".json", lambda text: b"[" * 10**5), "is not a JSON object"),
        "a key twice": ((".json", lambda text: b'{"run": {}, "run": {}}'), "'run' is there twice"),
        **{f"no {key}": (absent(key), f"has no valid {key}") for key in film.KINDS},
        **{
            f"{key} {value!r}": (changed(**{key: value}), f"has no valid {key}")
            for key in film.KINDS
            for value in ("a", [5], {"a": 1})
            if (key, value) != ("loss", [5]) and (key, value) != ("steps", [5])
        },
        "experts two": (within("run", experts="two"), "has no valid run"),
        "linears of numbers": (within("run", linears=[1, 2]), "has no valid run"),
        "a token's text 5": (within("tokens", text=5), "has no valid tokens"),
        "a token of no example": (within("tokens", example=None), "has no valid tokens"),
        "a picture 5": (within("examples", image=5), "has no valid examples"),
        "no gold": (within("examples", gold=None), "has no valid examples"),
        "a layer's loads": (within("layers", load=[1]), "has no valid layers"),
        "a layer's margin": (within("layers", margin=["a"]), "has no valid layers"),
        "a layer's name": (within("layers", name=None), "has no valid layers"),
        "a matrix of words": (within("matrices", pairs=[["a", "b"]]), "has no valid matrices"),
        "a matrix of others": (within("matrices", pairs=[[0, 0]]), "matrix0 is absent or of another size"),
        "a step more": (changed(steps=[0, 1]), "its loss is absent or of another size"),
        "no loss": (changed(loss=[]), "its loss is absent or of another size"),
        "no consistency": (within("layers", consistency=[]), "its consistency is absent or of another size"),
        "a token fewer": (changed(tokens=[]), "0.logits is absent or of another size"),
        "no logits": (absent("0.logits"), "0.logits is absent or of another size"),
        "no first experts": (absent("1.first"), "1.first is absent or of another size"),
        "logits of a token": (array("1.logits", lambda rows: rows[:, :1].clone()), "1.logits is absent or of another size"),
        "logits that are NaN": (array("0.logits", lambda rows: rows * float("nan")), "values that do not fit int16"),
        "a loss that is NaN": (changed(loss=[float("nan")]), "a number is nan"),
        "a margin that is infinite": (within("layers", margin=[float("inf")]), "a number is inf"),
    },
    damaged_examples: {
        "of before": (None, "lvlm.json has no examples, as an older version wrote it"),
        "none": ([], "lvlm.json has no examples"),
        **{f"{value!r}": (value, "invalid examples") for value in (5, "a", {}, [5], [[]], [{}])},
        "turns 5": (example(turns=5), "invalid examples"),
        "turns of texts": (example(turns=["<image> what?", "red"]), "invalid examples"),
        "an answer 5": (example(turns=[["<image> what?", 5]]), "invalid examples"),
        "no answer": (example(turns=[["<image> what?"]]), "unpack"),
        "two answers": (example(turns=[["<image> what?", "red", "blue"]]), "unpack"),
        "no turn": (example(turns=[]), "has not one <image>"),
        "no <image>": (example(turns=[["what?", "red"]]), "has not one <image>"),
        "two <image>": (example(turns=[["<image> what?", "red"], ["<image>?", "blue"]]), "has not one <image>"),
        "a kind 5": (example(kind=5), "invalid examples"),
        "no picture": (example(image=None), "invalid examples"),
        "a picture of text": (example(image="a cat"), "lvlm.json"),
        "a picture of other bytes": (example(image="data:image/png;base64,AAAA"), "cannot identify"),
        "a cut picture": (example(image=picture(4, 4, cut=43)), "truncated|lvlm.json"),
        "a JPEG": (example(image=picture(4, 4, form="JPEG")), "cannot identify"),
        "a large picture": (example(image=picture(8, 4)), "RGB, 8 x 4, not RGB, 4 x 4"),
        "a huge picture": (example(image=picture(8000, 8000, mode="1")), "1, 8000 x 8000, not RGB"),
        "a grey picture": (example(image=picture(4, 4, mode="L")), "L, 4 x 4, not RGB"),
    },
    flags_that_do_not_fit: [
        ("--html a.html", "--html goes with --inspect RUN: leave it out, or add --inspect"),
        ("--seed 3", "--seed goes with --inspect RUN: leave it out, or add --inspect"),
        ("--inspect HERE --html HERE/no/a.html", "--html: .*no/a.html': no such folder; name another file"),
        ("--inspect HERE --html HERE", "--html: .*it is not a file"),
        ("--inspect HERE --seed -1", "--seed: '-1' must be an integer"),
        ("--inspect HERE --seed all", "--seed: 'all' must be an integer"),
        ("--inspect HERE --film", "--film is not read by --inspect"),
        ("--inspect HERE --seeds 3", "--seeds is not read by --inspect"),
        ("--inspect HERE --run HERE", "--run is not read by --inspect"),
    ],
}
