"""What did harm without a word in toy_lvlm.py's own data and in the Trainer mixin: what is done, with what, and what comes
out. A refusal is a pattern of its one line."""

import functools
import io
import json
import re
import struct
import zlib
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from harm.build import CARD, PIXELS, refused
from PIL import Image
from test_hf import trainer
from test_llava import QUESTION, entry, turns
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import toy_lvlm
from lab.run.cli import UserError
from lab.vision import llava, lvlm
from lab.vision.instructions import IMAGE, Instruction, InstructionSet, encode, is_right, make_tokenizer


class Refused(NamedTuple):
    """What comes out of a case that is refused in one line."""

    pattern: str
    error: type[Exception] = UserError


LOOK = ["--device", "cpu", "--batch-size", "2"]


# ---- 1. Format words in texts ----


@functools.cache
def tokenizer_of(kind: str):
    """own: the one that toy_lvlm.py trains. lm: as a pretrained one, with an end, words of a chat, and ▁ for spaces."""
    texts = ["what does it say?", " a red circle", " the end of a text, for the USER"] * 3
    if kind == "own":
        return make_tokenizer(texts)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<|im_end|>", "[INST]"]
    letters = [*map(chr, range(32, 127)), "\n", "▁"]
    options = {"special_tokens": special, "vocab_size": 300, "initial_alphabet": letters, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**options))
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found.add_special_tokens({"pad_token": "<pad>"})
    found.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return found


def specials(tokenizer, ids) -> str:
    names = {id: one.content for id, one in tokenizer.added_tokens_decoder.items() if one.special}
    return " ".join(names[id] for id in ids if id in names)


def encoded(kind, question, answer):
    """The special words among a conversation's tokens, and the text of its answer."""
    tokenizer = tokenizer_of(kind)
    (one,) = encode([((question, answer),)], tokenizer, 1)
    learnt = [token for token, label in zip(one.input_ids, one.labels) if label >= 0]
    return specials(tokenizer, one.input_ids), tokenizer.decode(learnt, skip_special_tokens=True).strip()


def by_heart(kind, *answers, monkeypatch):
    """The score of a model that knows every answer by heart."""
    tokenizer = tokenizer_of(kind)
    test = [Instruction(((f"question {i}", answer),), None, "vqa") for i, answer in enumerate(answers)]
    known = encode([one.turns for one in test], tokenizer, 0)

    def generate(model, samples, batch, tokenizer, max_new_tokens):
        rows = batch["input_ids"].tolist()
        found = []
        for row in rows:
            prompt = [token for token, real in zip(row, batch["attention_mask"][len(found)].tolist()) if real]
            (whole,) = (one.input_ids for one in known if one.input_ids[: len(prompt)] == prompt)
            found.append(torch.tensor(whole[len(prompt) :][:max_new_tokens]))
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=tokenizer.pad_token_id)

    monkeypatch.setattr(lvlm, "generate", generate)
    data = InstructionSet(torch.empty(0, 3, 4, 4, dtype=torch.uint8), test)
    data = lvlm.Data("x", data, data, ([], []), tokenizer, PIXELS, 1, [])
    job = SimpleNamespace(data=data, accelerator=Accelerator(cpu=True), args=SimpleNamespace(batch_size=1))
    return toy_lvlm.score(job, toy_lvlm.answers(job, torch.nn.Linear(1, 1)))["score"]


def asked(kind, question, *, monkeypatch):
    """What the model reads for --ask, without special words."""
    tokenizer = tokenizer_of(kind)
    monkeypatch.setattr(lvlm, "generate", lambda model, samples, batch, *_, **__: batch["input_ids"])
    return lvlm.ask(torch.nn.Linear(1, 1), tokenizer, CARD, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), question)


def captioned(kind, caption):
    """The special words of a caption for CLIP, which reads a text up to its first end."""
    tokenizer = tokenizer_of(kind)
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    collate = lvlm.CollateClip(images, [caption], tokenizer, PIXELS)
    return specials(tokenizer, collate([0])["input_ids"][0].tolist()[:-1])


# ---- 2. Content ----


def reported(content, max_bad=0, *, tmp_path):
    """What a run says of these entries: "" if they are used unchanged."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    file, problems = tmp_path / "train.json", llava.Problems(max_bad)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    llava.load_llava(file, tmp_path, 4, problems)
    return problems.summary().replace(f"{tmp_path}/", "")


def preceded(text: str, count: int = 1) -> str:
    """Good entries as JSON, with the text put before the first one's keys."""
    return json.dumps([entry("red.png")] * count).replace("{", "{" + text, 1)


TWICE_IN_TURN = preceded("").replace('"value": "a dog"', '"value": "a cat", "value": "a dog"')


# ---- 3. The held-out tenth ----


def held_out(pictures, texts, copies=0, *, tmp_path):
    """(train pictures, test pictures, test texts, pictures or texts on both sides), of different pictures and texts and
    `copies` more of each."""
    random, entries = np.random.default_rng(0), []
    for i in range(pictures):
        Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        for copy in range(1 + copies):
            (tmp_path / f"{i}-{copy}.png").write_bytes((tmp_path / f"{i}.png").read_bytes())
            entries.append(entry(f"{i}-{copy}.png", f"{QUESTION} {copy}", str(i % 10)))
    entries += [entry(None, f"what is {i}?", str(i)) for i in range(texts) for _ in range(1 + copies)]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    args = toy_lvlm.parse([*LOOK, "--data", str(tmp_path / "train.json"), "--image-dir", str(tmp_path)])
    data = lvlm.load_data(args, None, None, llava.Problems(0))
    sides = [
        {own.images_N3SS[one.image].numpy().tobytes() if one.image is not None else one.turns for one in own.instructions}
        for own in (data.train, data.test)
    ]
    assert len(data.train.instructions) + len(data.test.instructions) == len(entries)
    shown = [sum(isinstance(one, bytes) for one in side) for side in sides]
    return shown[0], shown[1], len(sides[1]) - shown[1], len(sides[0] & sides[1])


# ---- 4. Pictures and boxes ----


def png(pixels: np.ndarray, kind: int, bits: int, transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG of that colour type and depth. `pixels`: (H, W) or (H, W, channels)."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = pixels.reshape(len(pixels), -1)
    if bits == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        lines = [np.packbits([(v >> b) & 1 for v in row for b in reversed(range(bits))]).tobytes() for row in rows]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), bits, kind, 0, 0, 0))
    clear = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    content = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines)))
    return b"\x89PNG\r\n\x1a\n" + header + clear + content + chunk(b"IEND", b"")


def shown(columns, *how, tmp_path):
    """The colours of a picture whose columns have these values, from left to right."""
    (tmp_path / "it.png").write_bytes(png(np.array([columns] * len(columns)), *how))
    image = llava.read_picture(tmp_path / "it.png", len(columns))
    assert (image == image[:, :1]).all()
    return [tuple(own) for own in image[:, 0].T.tolist()]


def turned(*, tmp_path):
    """A 16-bit grey picture, transparent above, that its EXIF turns to the right."""
    pixels, file = np.array([[300] * 4] * 2 + [[0] * 4] * 2), io.BytesIO()
    with Image.open(io.BytesIO(png(pixels, 0, 16, (300,)))) as image:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(file, "PNG", exif=exif, transparency=300)
    (tmp_path / "it.png").write_bytes(file.getvalue())
    return llava.read_picture(tmp_path / "it.png", 4)[0, 0].tolist()


def right(expected, answer, *accept, tmp_path):
    (tmp_path / "red.png").touch()
    _, one, _ = llava.check_entry(entry("red.png", "<image> where?", expected, kind="region", accept=list(accept)), tmp_path)
    return is_right(one, answer)


# ---- 5. The Trainer ----


def changed(model, further: str, tuples: bool):
    """Adds a z-loss to the model's loss, and to its outputs under that name. Its outputs may become a tuple."""
    forward = model.forward

    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        out = forward(*args, **kwargs)
        if further:
            z_loss = out.logits.logsumexp(-1).square().mean()
            out["loss"] = out.loss + z_loss
            out[further] = [z_loss] if further.endswith("es") else z_loss
        return out.to_tuple() if tuples else out

    model.forward = wrapped


def own_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / 20


def judged(how, *, tmp_path):
    """Whether the pairs judged in the first step are those of the same step without the model's balance loss."""
    how, found = {"own": False, "further": None, "tuples": False, "func": None} | how, []
    own, further, tuples, func = (how.pop(name) for name in ("own", "further", "tuples", "func"))
    for flag in (own, False):
        run = trainer(tmp_path / f"{flag}", 1, **{"save_strategy": "no", "gradient_accumulation_steps": 1} | how)
        run.train_dataset = [row | {"labels": row["labels"].where(torch.arange(7) < 4, -100)} for row in run.train_dataset]
        run.model.config.output_router_logits, run.compute_loss_func = flag, func
        if further or tuples:
            changed(run.model, further, tuples)
        run.train()
        found.append([verdict.judged_TK.clone() for verdict in run.stgc.verdicts])
    assert any(one.any() for one in found[0])
    return all(map(torch.equal, *found))


# ---- 6. The table ----


def gives(what):
    """The kind of `what`, which returns what comes out."""

    @functools.wraps(what)
    def kind(*row, **fixtures):
        *given, expected = row
        if isinstance(expected, Refused):
            with refused(expected.pattern, *fixtures.values(), error=expected.error):
                what(*given, **fixtures)
        elif what is reported:
            assert re.search(expected or "^$", what(*given, **fixtures))
        else:
            assert what(*given, **fixtures) == expected

    return kind


OWN = "USER: <image> ASSISTANT: <eos>"
DROPPED = "keys that are not read \\(train.json entry 1: "
RED, WHITE = (255, 0, 0), (255, 255, 255)
REFUSED = "adds {} to its loss, which tokens would be judged by.*output_router_logits=False"
CASES = {
    # format words: the format's own are special, a text's are text
    gives(encoded): {
        "no word": ("own", "<image>\nwhat?", "a red circle", (OWN, "a red circle")),
        "an end in an answer": ("own", "<image>\nwhat?", "the <eos> of it", (OWN, "the <eos> of it")),
        "USER: in an answer": ("own", "<image>\nwhat?", "USER: hi", (OWN, "USER: hi")),
        "padding in an answer": ("own", "what? <image>", "<pad>", (OWN, "<pad>")),
        "ASSISTANT: in both": ("own", "ASSISTANT: <image> ?", "ASSISTANT:", (OWN, "ASSISTANT:")),
        "a whole turn as question": ("own", "<image> USER: a ASSISTANT: b <eos>", "c", (OWN, "c")),
        "words without a gap": ("own", "<eos><image><eos>", "<eos><eos>", (OWN, "<eos><eos>")),
        "a word as text only": ("own", "USER:", "<eos>", ("USER: ASSISTANT: <eos>", "<eos>")),
        "lm: no word": ("lm", "<image>\nwhat?", "a red circle", ("<image> </s>", "a red circle")),
        "lm: an end": ("lm", "<image>\nwhat?", "a </s> of it", ("<image> </s>", "a </s> of it")),
        "lm: its chat's words": ("lm", "<image> <|im_end|>", "[INST] <s>", ("<image> </s>", "[INST] <s>")),
        "lm: USER: is text anyhow": ("lm", "<image> what?", "USER: hi", ("<image> </s>", "USER: hi")),
    },
    gives(by_heart): {
        "by heart": ("own", "red", "<eos>", "a <pad> b", "ASSISTANT: hi", "USER: <eos> " * 9, 1.0),
        "by heart, lm": ("lm", "red", "</s>", "a <|im_end|> b", "[INST] </s> " * 9, 1.0),
        "by heart, one word": ("own", "<pad>", 1.0),
        "by heart, nearly": ("own", "<eos", "< eos>", "user:", 1.0),
    },
    gives(asked): {
        "asked for an end": ("own", "what is <eos>?", "what is <eos>?"),
        "asked for USER:": ("own", "USER: what? ASSISTANT:", "USER: what? ASSISTANT:"),
        "asked for padding": ("own", "<pad><pad>", "<pad><pad>"),
        "asked, no word": ("own", "what?", "what?"),
    },
    gives(captioned): {
        "caption with an end": ("own", "a <eos> b", ""),
        "caption with USER:": ("own", "USER: a", ""),
        "caption without": ("own", "a red circle", ""),
        "caption of padding": ("own", "<pad>", ""),
    },
    # content that is not read
    gives(reported): {
        "nothing else": ([entry("red.png", id=7, kind="ocr", accept=["x"])], ""),
        "video": ([entry("red.png", video="a.mp4")], f"1 of 1 entries changed: 1 x {DROPPED}'video'\\)"),
        "images": ([entry(None, "a", "b", images=["red.png"])], f"1 x {DROPPED}'images'"),
        "a system prompt": ([entry("red.png", system="be short")], f"1 x {DROPPED}'system'"),
        "a weight in a turn": (
            [{"conversations": [turns(("human", "a"))[0] | {"weight": 0}, *turns(("gpt", "b"))]}],
            f"1 x {DROPPED}'weight' of turn 1",
        ),
        "no content": ([entry("red.png", video=None)], ""),
        "many keys": ([entry("red.png", **dict.fromkeys("abcdef", 0))], f"{DROPPED}'a', 'b', 'c' ...\\)"),
        "key and marker": (
            [entry("red.png", "what?", "x", video="a"), entry("red.png")],
            f"^1 of 2 entries changed: 1 x {DROPPED}'video'\\); 1 x no <image>, so",
        ),
        "a key that is empty": ([entry("red.png", **{"": "text"})], f"{DROPPED}''"),
        "a long key": ([entry("red.png", **{"x" * 999: 1})], f"{DROPPED}'x{{59}}\\)"),
        "twice: image": (preceded('"image": "green.png", '), Refused("1 x key given twice \\(.* entry 1: 'image'\\)")),
        "twice: the same": (preceded('"image": "red.png", '), Refused("key given twice .*'image'")),
        "twice: conversations": (preceded('"conversations": [], '), Refused("given twice .*'conversations'")),
        "twice: value": (TWICE_IN_TURN, Refused("key given twice .*'value'")),
        "twice: on a line": (
            json.dumps(entry(None, "a", "b")) + '\n{"id": 1, "id": 2, "conversations": []}',
            Refused("line 2 .*'id'"),
        ),
        "twice: null": (preceded('"image": null, '), Refused("given twice .*'image'")),
        "twice: left out": (preceded('"id": 1, "id": 2, ', 2), 1, "^1 of 2 entries left out: 1 x key given twice"),
    },
    # the held-out tenth: (train pictures, test pictures, test texts, on both sides)
    gives(held_out): {
        "pictures alone": (20, 0, (18, 2, 0, 0)),
        "10 + 10": (10, 10, (9, 1, 1, 0)),
        "5 + 15": (5, 15, (4, 1, 1, 0)),
        "3 + 20": (3, 20, (2, 1, 2, 0)),
        "2 + 100": (2, 100, (1, 1, 10, 0)),
        "30 + 4": (30, 4, (27, 3, 0, 0)),
        "copies": (20, 0, 1, (18, 2, 0, 0)),
        "copies of both": (12, 20, 2, (11, 1, 2, 0)),
        "two pictures, ten copies": (2, 0, 10, (1, 1, 0, 0)),
        "one picture": (1, 0, Refused("--data: one picture cannot be both trained and tested on; give more")),
        "one picture, two names": (1, 0, 1, Refused("one picture cannot be both trained and tested on")),
        "one picture, 20 texts": (1, 20, Refused("one picture cannot be both trained and tested on")),
        "no picture": (0, 20, Refused("--data: no training conversation has a picture")),
    },
    # transparency, on white
    gives(shown): {
        "16 bits, grey": ([300, 65535, 0, 301], 0, 16, (300,), [WHITE, WHITE, (0, 0, 0), (1, 1, 1)]),
        "16 bits, black": ([0, 1, 0, 30000], 0, 16, (0,), [WHITE, (0, 0, 0), WHITE, (117, 117, 117)]),
        "16 bits, RGB": (
            [(1000, 20000, 60000), (1001, 20000, 60000), (65535, 0, 0), (3, 78, 234)],
            2,
            16,
            (1000, 20000, 60000),
            [WHITE, (3, 78, 234), RED, (0, 0, 0)],
        ),
        "16 bits, RGB, black": ([(0, 0, 0), (0, 0, 255), (65535, 0, 0)], 2, 16, (0, 0, 0), [WHITE, (0, 0, 0), RED]),
        "16 bits, RGBA": ([(9, 9, 9, 0), (65535, 0, 0, 65535)], 6, 16, [WHITE, RED]),
        "16 bits, grey and alpha": ([(0, 0), (0, 65535)], 4, 16, [WHITE, (0, 0, 0)]),
        "16 bits, opaque": ([300, 65535, 0, 30000], 0, 16, [(1, 1, 1), WHITE, (0, 0, 0), (117, 117, 117)]),
        "8 bits, grey": ([30, 31], 0, 8, (30,), [WHITE, (31, 31, 31)]),
        "4 bits, grey": ([3, 15, 0, 4], 0, 4, (3,), [WHITE, WHITE, (0, 0, 0), (68, 68, 68)]),
        "2 bits, grey": ([1, 3, 0, 2], 0, 2, (1,), [WHITE, WHITE, (0, 0, 0), (170, 170, 170)]),
        "1 bit": ([0, 1, 0, 0], 0, 1, (0,), [WHITE] * 4),
    },
    gives(turned): {"16 bits, turned": ([0, 0, 255, 255],)},
    # own boxes
    gives(right): {
        "box": ("0 0 10 10", "0 0 10 6", True),
        "box, too small": ("0 0 10 10", "0 0 10 4", False),
        "box, LLaVA's form": ("[0.1, 0.1, 0.5, 0.5]", "[0.1, 0.1, 0.5, 0.45].", True),
        "box, accepted": ("0 0 1 1", "5, 5, 9, 9", "5 5 9 8", True),
        "box, in words": ("top left", "Top left.", True),
        "box, other words": ("top left", "0 0 1 1", False),
        "box, without area": ("5 5 5 5", "5 5 5 5", True),
        "box, of another form": ("0 0 10 10", "(0,0,10,9)", True),
    },
    # the Trainer's loss
    gives(judged): {
        "no addition": ({}, True),
        "balance loss": ({"own": True}, Refused(REFUSED.format("aux_loss"), RuntimeError)),
        "balance loss, no flags": ({"own": True, "tuples": True}, Refused(REFUSED.format("1"), RuntimeError)),
        "z-loss": ({"further": "z_loss"}, Refused(REFUSED.format("z_loss"), RuntimeError)),
        "losses of further tokens": ({"further": "mtp_losses"}, Refused(REFUSED.format("mtp_losses"), RuntimeError)),
        "two additions": ({"own": True, "further": "z_loss"}, Refused("adds aux_loss, z_loss to its", RuntimeError)),
        "accumulated": ({"own": True, "gradient_accumulation_steps": 2}, Refused(REFUSED.format("aux_loss"), RuntimeError)),
        "label smoothing": ({"own": True, "label_smoothing_factor": 0.1}, True),
        "the user's own loss": ({"own": True, "func": own_loss}, True),
        "a loss in a tuple": ({"tuples": True}, True),
    },
}
