"""A user's own data in LLaVA's format: what is read, how pictures come out, and every fault named. Real digits among it."""

import io
import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from lab.run.cli import UserError
from lab.vision import llava
from lab.vision.instructions import Instruction
from lab.vision.llava import CLIP_MEAN, Problems, load_llava

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
QUESTION = "<image>\nwhich digit is this? one word."


def write_digits(folder: Path, count: int, start: int = 0) -> tuple[Path, Path]:
    """Digits start ... start + count - 1 of scikit-learn's 1797 handwritten ones, in LLaVA's format: (JSON, image folder).

    Pictures are 8 x 8, of 17 greys. The same folder may take several parts, say one to train and one to test.
    """
    from sklearn.datasets import load_digits  # scikit-learn's import takes longer than all other tests here

    digits, entries = load_digits(), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for row in range(start, start + count):
        Image.fromarray((digits.images[row] * 15).astype(np.uint8)).save(folder / "images" / f"{row:04}.png")
        entries.append(entry(f"{row:04}.png", QUESTION, str(digits.target[row]), id=f"digit-{row}"))
    file = folder / f"digits-{start}.json"
    file.write_text(json.dumps(entries))
    return file, folder / "images"


def entry(image: object, *texts: object, **keys) -> dict:
    """An entry with human and gpt in turn. Without texts: a good question and answer. `image` None: without the key."""
    texts = texts or ("<image>\nwhat is it?", "a dog")
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return ({} if image is None else {"image": image}) | {"conversations": turns} | keys


def turns(*pairs: tuple[str, str]) -> list[dict]:
    return [{"from": speaker, "value": text} for speaker, text in pairs]


@pytest.fixture
def data(tmp_path):
    """A folder with a red and a blue picture, and what writes a data file beside it and loads that."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (4, 4), RED).save(folder / "red.png")
    Image.new("RGB", (4, 4), BLUE).save(folder / "sub" / "blue.png")

    def load(entries, problems=None, image_dir=folder, **options):
        file = tmp_path / "train.json"
        if isinstance(entries, bytes):
            file.write_bytes(entries)
        elif entries is not None:
            file.write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return load_llava(file, image_dir, 4, Problems(0) if problems is None else problems, **options)

    load.folder = folder
    return load


def pixels(colour) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 4, 4)


# ---- 1. Good data ----

GOOD = [
    entry("red.png", "<image>\nwhat colour?", "red", "and now,\n  in words?", "  still red, I think \n"),
    entry("sub/blue.png", "what colour?\n<image>", "blue", id=7),
    entry(None, "which is warmer, red or blue?", "red, most say", kind="choice", accept=["red", " warm red"]),
    entry("./red.png", "read it <image>, please", "STOP", kind="ocr", id="a"),
    entry("red.png", "<image>", "red square"),
]


@pytest.mark.parametrize("lines", [False, True])
def test_good_entries_come_out_verbatim(data, lines, capsys):
    problems = Problems(0)
    text = "\n".join(map(json.dumps, GOOD)) + "\n\n" if lines else "\ufeff" + json.dumps(GOOD, indent=1)
    images_N3SS, instructions = data(text, problems)
    assert instructions == [
        Instruction(
            (("<image>\nwhat colour?", "red"), ("and now,\n  in words?", "still red, I think")), image=0, kind="caption"
        ),
        Instruction((("what colour?\n<image>", "blue"),), image=1, kind="vqa"),
        Instruction(
            (("which is warmer, red or blue?", "red, most say"),), image=None, kind="choice", accept=("red", "warm red")
        ),
        Instruction((("read it <image>, please", "STOP"),), image=0, kind="ocr"),
        Instruction((("<image>", "red square"),), image=0, kind="caption"),
    ]
    assert images_N3SS.dtype == torch.uint8 and torch.equal(images_N3SS, torch.stack([pixels(RED), pixels(BLUE)]))
    assert (problems.summary(), problems.left_out, problems.changed, problems.total) == ("", [], [], 5)
    assert [one.place.split("/")[-1] for one in instructions][:2] == (
        ["train.json line 1", "train.json line 2 (id 7)"] if lines else ["train.json entry 1", "train.json entry 2 (id 7)"]
    )
    assert capsys.readouterr() == ("", "")  # no bar where stderr is no terminal


def test_a_picture_is_decoded_once(data, monkeypatch):
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file, **options: opened.append(file.name) or real(file, **options))
    data(GOOD)
    assert opened == ["red.png", "blue.png"]


def test_text_alone_needs_no_image_dir(data):
    nothing = dict.fromkeys(["image", "kind", "accept", "video"])  # as pandas writes what is not there
    null = entry(None, "2 + 2?", "4") | nothing
    images_N3SS, instructions = data([entry(None, "1 + 1?", "2"), null], image_dir=None)
    assert images_N3SS.shape == (0, 3, 4, 4)
    assert [own.turns for own in instructions] == [(("1 + 1?", "2"),), (("2 + 2?", "4"),)]


def test_lines_are_split_at_newlines_only(data):
    odd = "a\u2028b\x85c"
    _, instructions = data(json.dumps(entry(None, odd, "x"), ensure_ascii=False) + "\r\n")
    assert instructions[0].turns == ((odd, "x"),)


def test_a_missing_marker_is_put_in_front_and_told(data):
    problems = Problems(0)
    _, instructions = data([entry("red.png", "what is it?", "red", "sure?", "yes"), *GOOD], problems)
    assert instructions[0].turns == (("<image>\nwhat is it?", "red"), ("sure?", "yes")) and instructions[0].image == 0
    assert problems.left_out == [] and len(problems.changed) == 1
    assert problems.summary().startswith("1 of 6 entries changed: 1 x no <image>, so it was put before the first question (")
    assert "train.json entry 1)" in problems.summary()


# ---- 2. Pictures ----


def ramp(top: int, dtype) -> np.ndarray:
    return (np.arange(16).reshape(4, 4) * (top / 15)).round().astype(dtype)


def saved(folder: Path, image: Image.Image, name: str = "it.png", **options) -> torch.Tensor:
    image.save(folder / name, **options)
    return llava.read_picture(folder / name, 4)


GREY = torch.from_numpy(ramp(255, np.uint8)).expand(3, 4, 4)


def test_greys_of_8_and_16_bits_are_the_same(tmp_path):
    assert torch.equal(saved(tmp_path, Image.fromarray(ramp(255, np.uint8))), GREY)
    assert torch.equal(saved(tmp_path, Image.fromarray(ramp(65535, np.uint16))), GREY)
    assert torch.equal(saved(tmp_path, Image.fromarray(ramp(65535, np.uint16)), "it.tiff"), GREY)
    assert torch.equal(saved(tmp_path, Image.fromarray(ramp(65535, np.uint16)), "it.ppm"), GREY)
    assert torch.equal(saved(tmp_path, Image.fromarray(ramp(255, np.uint8)).convert("LA")), GREY)


def test_colours_of_every_mode(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([*WHITE, *RED])
    assert torch.equal(saved(tmp_path, palette, "it.gif"), pixels(RED))
    assert torch.equal(saved(tmp_path, palette, transparency=1), pixels(WHITE))
    assert torch.equal(saved(tmp_path, Image.new("1", (4, 4), 1)), pixels(WHITE))
    assert torch.equal(saved(tmp_path, Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "it.tiff"), pixels(RED))
    assert torch.equal(saved(tmp_path, Image.new("RGBA", (4, 4), (0, 0, 255, 255))), pixels(BLUE))
    assert torch.equal(saved(tmp_path, Image.new("RGBA", (4, 4), (9, 9, 9, 0))), pixels(WHITE))
    half = saved(tmp_path, Image.new("RGBA", (4, 4), (0, 0, 0, 51)))  # a fifth of black on white
    assert torch.equal(half, pixels((204, 204, 204)))
    jpeg = saved(tmp_path, Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "it.jpg", quality=95)
    assert (jpeg.int() - pixels(RED).int()).abs().max() <= 3


def test_other_shapes_are_padded_with_clips_mean(tmp_path):
    wide, tall = saved(tmp_path, Image.new("RGB", (80, 40), RED)), saved(tmp_path, Image.new("RGB", (2, 4), RED))
    grey, red = pixels(CLIP_MEAN)[:, 0], pixels(RED)[:, 0]
    assert torch.equal(wide, torch.stack([grey, red, red, grey], dim=1))
    assert torch.equal(tall, torch.stack([grey, red, red, grey], dim=2))
    assert torch.equal(saved(tmp_path, Image.new("RGB", (300, 300), BLUE)), pixels(BLUE))
    thin = saved(tmp_path, Image.new("RGB", (15, 2), RED))
    assert torch.equal(thin.flatten(1).unique(dim=1), torch.tensor([CLIP_MEAN, RED], dtype=torch.uint8).T)  # one row is left


def test_exif_turns_the_picture(tmp_path):
    lying = Image.new("RGB", (4, 4), WHITE)
    lying.paste(RED, (0, 0, 4, 2))  # red on top
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: red on the right
    image = saved(tmp_path, lying, exif=exif)
    assert torch.equal(image[:, :, 2:], pixels(RED)[:, :, 2:]) and torch.equal(image[:, :, :2], pixels(WHITE)[:, :, :2])


def test_digits_come_back(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    write_digits(tmp_path, 50)
    file, image_dir = write_digits(tmp_path, 40, start=50)
    problems = Problems(0)
    images_N3SS, instructions = load_llava(file, image_dir, 8, problems, flag="--eval-data")
    expected_N88 = torch.from_numpy(digits.images[50:90] * 15).to(torch.uint8)
    assert torch.equal(images_N3SS, expected_N88[:, None].expand(-1, 3, -1, -1))
    labels = [str(label) for label in digits.target[50:90]]
    assert [own.turns for own in instructions] == [((QUESTION, label),) for label in labels]
    assert [own.image for own in instructions] == list(range(40)) and {own.kind for own in instructions} == {"vqa"}
    assert instructions[3].place == f"{file} entry 4 (id 'digit-53')"
    assert len(list(image_dir.iterdir())) == 90 and problems.summary() == ""


# ---- 3. Bad entries ----

OK = turns(("human", "<image>\nwhat?"), ("gpt", "x"))
TEXT = turns(("human", "what?"), ("gpt", "x"))
BAD_ENTRIES = {  # entry: message behind "entry 2"
    "not an object": ("a string", "not an object: a str"),
    "no conversations": ({"image": "red.png"}, "conversations of the wrong type: None instead of a list"),
    "conversations text": ({"conversations": "hi"}, "conversations of the wrong type: 'hi' instead of a list"),
    "conversations empty": ({"conversations": []}, "turns out of order: [] instead of human, gpt, human, gpt and so on"),
    "gpt first": ({"conversations": TEXT[::-1]}, "turns out of order: ['gpt', 'human'] instead of human"),
    "twice human": ({"conversations": [TEXT[0], *TEXT]}, "turns out of order: ['human', 'human', 'gpt'] instead"),
    "no last answer": ({"conversations": [*TEXT, TEXT[0]]}, "turns out of order: ['human', 'gpt', 'human'] instead"),
    "one turn": ({"conversations": TEXT[:1]}, "turns out of order: ['human'] instead"),
    "turn no object": ({"conversations": ["hi", "ho"]}, "turns out of order: [None, None] instead"),
    "speaker a list": ({"conversations": [{"from": ["human"]}]}, "turns out of order: [['human']] instead"),
    "other speakers": ({"conversations": turns(("user", "hi"), ("assistant", "ho"))}, "order: ['user', 'assistant'] ins"),
    "value no text": (entry(None, "how many?", 3), "text of the wrong type: turn 2 is a int"),
    "value absent": ({"conversations": [{"from": "human"}, TEXT[1]]}, "text of the wrong type: turn 1 is a NoneType"),
    "blank answer": (entry(None, "what?", " \n\t"), "blank text: turn 2"),
    "blank question": (entry("red.png", "", "x"), "blank text: turn 1"),
    "blank later answer": (entry(None, "a", "b", "c", ""), "blank text: turn 4"),
    "surrogate": (entry(None, "what?", "\ud83d"), "broken Unicode: turn 2"),
    "several markers": (entry("red.png", "<image> or <image>?", "x"), "several <image>: 2, for one picture"),
    "marker, no picture": (entry(None, "<image> what?", "x"), "<image> without a picture"),
    "marker in answer": (entry("red.png", "<image> what?", "an <image>"), "<image> outside the first question: it may only"),
    "marker in turn 3": (entry("red.png", "hello", "hi", "<image> what?", "x"), "<image> outside the first question: it"),
    "unknown kind": (entry(None, "a", "b", kind="poem"), "unknown kind: 'poem' instead of caption, vqa, choice, ocr"),
    "kind a list": (entry(None, "a", "b", kind=["vqa"]), "unknown kind: ['vqa'] instead"),
    "accept text": (entry(None, "a", "b", accept="c"), "accept of the wrong type: 'c' instead of a list"),
    "accept number": (entry(None, "a", "4", accept=["four", 4]), "text of the wrong type: accept 2 is a int"),
    "accept blank": (entry(None, "a", "4", accept=[""]), "blank text: accept 1"),
    "image a number": (entry(7), "image of the wrong type: 7 instead of a str"),
    "image a list": (entry(["red.png"]), "image of the wrong type: ['red.png'] instead of a str"),
    "image false": (entry(False), "image of the wrong type: False instead of a str"),
    "image empty": (entry(""), "picture not found: ''"),
    "image a folder": (entry("sub"), "picture not found: 'sub'"),
    "image missing": (entry("green.png"), "picture not found: 'green.png'"),
    "image with NUL": (entry("red\0.png"), "picture not found: 'red\\x00.png'"),
    "image too long": (entry("x" * 9999), "picture not found: 'xxx"),
    "image surrogate": (entry("\ud83d.png"), "picture not found: '\\ud83d.png'"),
    "image a URL": (entry("https://example.org/a.png"), "'https://example.org/a.png', as URLs are not fetched"),
    "image absolute": (entry("/etc/passwd"), "path outside --image-dir: '/etc/passwd'"),
    "image above": (entry("../images/red.png"), "path outside --image-dir: '../images/red.png'"),
    "image above, inside": (entry("sub/../red.png"), "path outside --image-dir: 'sub/../red.png'"),
    "image above, windows": (entry("..\\red.png"), "path outside --image-dir: '..\\\\red.png'"),
    "image drive": (entry("C:red.png"), "path outside --image-dir: 'C:red.png'"),
}


@pytest.mark.parametrize("bad, message", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_bad_entry(data, bad, message):
    entries = [GOOD[0], bad, GOOD[1]]
    with pytest.raises(UserError) as error:
        data(entries)
    told = str(error.value)
    assert told.startswith("--max-bad 0: 1 x ") and told.endswith("; fix or remove these, or allow more")
    assert "train.json entry 2" in told and "\n" not in told and len(told) < 400
    problems = Problems(1)
    _, instructions = data(entries, problems)
    assert [own.turns for own in instructions] == [data(GOOD[:2])[1][i].turns for i in (0, 1)]  # the others as if alone
    ((where, what),) = problems.left_out
    assert where.endswith("train.json entry 2") and message in what
    assert problems.summary().startswith(f"1 of 3 entries left out: 1 x {what.split(': ')[0]} (")


def png(width: int, height: int) -> bytes:
    """A PNG that says it has that many pixels, and has few."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def encoded(form: str, cut: float = 1, mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(file, form)
    return file.getvalue()[: int(len(file.getvalue()) * cut)]


BAD_PICTURES = {
    "truncated png": (encoded("PNG", 0.6), "OSError"),
    "truncated jpeg": (encoded("JPEG", 0.6), "truncated"),
    "truncated webp": (encoded("WEBP", 0.6), "OSError"),
    "truncated tiff": (encoded("TIFF", 0.6), "Error"),
    "truncated bmp": (encoded("BMP", 0.6), "truncated"),
    "no picture": (b"hello", "cannot identify image file"),
    "empty": (b"", "cannot identify image file"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "cannot identify image file"),
    "eps": (encoded("EPS"), "cannot identify image file"),  # opening one would run Ghostscript
    "bomb": (png(20_000, 20_000), "DecompressionBombError"),
    "bomb that Pillow warns of": (png(10_000, 10_000), "DecompressionBombWarning"),
    "floats": (encoded("TIFF", mode="F"), "mode F does not define white"),
    "thin": (encoded("PNG", size=(8, 1)), "so thin that scaling leaves nothing"),
    "32-bit integers": (encoded("TIFF", mode="I"), "mode I does not define white"),
}


@pytest.mark.parametrize("content, message", BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_bad_picture(data, content, message):
    (data.folder / "sub" / "bad.png").write_bytes(content)
    entries = [entry("sub/bad.png"), GOOD[0], entry("sub/bad.png", "what?", "x"), GOOD[1]]
    with pytest.raises(UserError, match="^--max-bad 1: 2 x picture cannot be read as BMP, .*WEBP") as error:
        data(entries, Problems(1))
    assert "train.json entry 1: " in str(error.value) and "train.json entry 3: " in str(error.value)
    assert "sub/bad.png'" in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(llava.BadEntry, match=message):  # so too for who reads a single picture
        llava.read_picture(data.folder / "sub" / "bad.png", 4)
    problems = Problems(2)
    images_N3SS, instructions = data(entries, problems)
    assert torch.equal(images_N3SS, torch.stack([pixels(RED), pixels(BLUE)])) and [i.image for i in instructions] == [0, 1]
    assert [where.split("/")[-1] for where, _ in problems.left_out] == ["train.json entry 1", "train.json entry 3"]
    places = [one.place.split("/")[-1] for one in instructions]
    assert places == ["train.json entry 2", "train.json entry 4 (id 7)"]
    assert problems.changed == []  # an entry left out is not told as changed too


# ---- 4. Problems ----


def test_problems_are_counted_by_kind_over_files_and_steps(data):
    problems = Problems(8)
    data([*GOOD, *[entry(f"{i}.png") for i in range(5)], entry(None, "a", "")], problems)
    tested = data([*GOOD, "x"], problems, flag="--eval-data")
    problems.add(tested.instructions[1].place, "answer too long: 600 tokens of 512")
    where = str(data.folder.parent / "train.json")
    assert problems.summary() == (
        f"8 of 17 entries left out: 5 x picture not found ({where} entry 6: '0.png'; {where} entry 7: '1.png'; "
        f"{where} entry 8: '2.png'); 1 x blank text ({where} entry 11: turn 2); "
        f"1 x not an object ({where} entry 6: a str); 1 x answer too long ({where} entry 2 (id 7): 600 tokens of 512)"
    )
    assert len(problems.left_out) == 8  # all, though the summary names few
    (folder := data.folder.parent / "other").mkdir()
    (folder / "none.json").write_text('["no good entry"]')
    roomy = Problems(9)
    roomy.left_out += problems.left_out
    with pytest.raises(UserError, match="^--data [^ ]*none.json has no entry that can be used: 1 x not [^;]*; fix them$"):
        load_llava(folder / "none.json", None, 4, roomy)  # of this file only
    with pytest.raises(UserError, match="^--max-bad 8: 5 x picture not found"):
        problems.add("dev.json entry 9", "no detail")
    assert problems.summary().endswith("; 1 x no detail (dev.json entry 9)")


# ---- 5. Faults that end the run at once ----

NOT_JSON = "^--data .*train.json is neither a JSON list nor JSON lines \\("
FATAL = {  # content of the file: message
    "missing": (None, NOT_JSON + ".*No such file"),
    "empty": ("", "^--data .*train.json has no entries: give at least one$"),
    "empty list": (" []", "^--data .*train.json has no entries: give at least one$"),
    "cut off": (json.dumps(GOOD)[:-9], NOT_JSON + ".*line 1 column"),
    "no list": (json.dumps({"a": 1}, indent=1), NOT_JSON + "line 1: "),
    "a bad line": (json.dumps(GOOD[0]) + "\n{oops}", NOT_JSON + "line 2: "),
    "other text": ("id,image\n1,red.png", NOT_JSON + "line 1: "),
    "bytes": (b"\x89PNG\xff\xfe", NOT_JSON + ".*utf-8"),
    "pickle": (b"\x80\x04\x95.", NOT_JSON),
    "deep": ("[" * 200_000, NOT_JSON + ".*recursion"),
    "nothing good": (["x", entry("green.png")], "no entry that can be used: 1 x not an obj.*; 1 x picture not f.*; fix"),
}


@pytest.mark.parametrize("content, message", FATAL.values(), ids=FATAL)
def test_fatal(data, content, message):
    with pytest.raises(UserError, match=message) as error:
        data(content, Problems(100))
    assert "\n" not in str(error.value)


def test_no_image_dir(data):
    with pytest.raises(UserError, match="^--image-dir is missing: give the folder"):
        data(GOOD, Problems(100), image_dir=None)
    with pytest.raises(UserError, match="^--eval-data .*neither"):
        data("x", flag="--eval-data")


def test_memory_is_checked_before_decoding(data, monkeypatch):
    (data.folder / "bad.png").write_bytes(b"never opened")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * 48 / llava.MEMORY_SHARE + 1))
    with pytest.raises(UserError, match="^--data .*: 2 of its 3 pictures of 4 x 4 fit in memory; give fewer$"):
        data([*GOOD, entry("bad.png")])
    data(GOOD)
