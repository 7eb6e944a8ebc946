"""The pictures show what their captions say, and every answer is right, by other means than those that made it."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lab.vision import scenes
from lab.vision.instructions import IMAGE, KINDS, InstructionSet
from lab.vision.scenes import CELLS, COLOURS, HELD_OUT, OUTLINES, Scene, Thing

SIZES = ("small", "large")
NUM_TRAIN, NUM_TEST = 1200, 450


class Split(NamedTuple):
    data: InstructionSet
    captions: list[str]  # of its pictures, in their order: each is asked for one


def make_splits(*args: int) -> dict[str, Split]:
    made = scenes.make_scenes(*args)
    return {
        name: Split(data, [some.turns[0][1] for some in data.instructions if some.kind == "caption"])
        for name, data in made.items()
    }


@pytest.fixture(scope="module")
def splits():
    return make_splits(NUM_TRAIN, NUM_TEST)


def instructions(splits, kind: str = "", part: str | None = None) -> list:
    found = [some for split in splits.values() for some in split.data.instructions]
    return [some for some in found if kind in ("", some.kind) and part in (None, some.part)]


def digest(num_train: int, num_test: int, seed: int) -> dict[str, str]:
    return {
        split: hashlib.sha256(repr([data.images_N3SS.numpy().tobytes(), *data[1:]]).encode()).hexdigest()
        for split, data in scenes.make_scenes(num_train, num_test, seed, 32).items()
    }


# ---- The whole ----


def test_same_seed_same_scenes():
    once = digest(40, 30, 0)
    assert once == digest(40, 30, 0)
    assert once["test"] == digest(10, 30, 0)["test"]
    captions = [set(some.captions) for seed in (0, 1) for some in make_splits(40, 30, seed, 32).values()]
    assert all(len(one & other) < 5 for i, one in enumerate(captions) for other in captions[:i])


@pytest.mark.slow
def test_string_hashes_do_not_matter():
    """In another process the hashes of strings, and so the order of a set, are others."""
    code = "from tests.test_scenes import digest; print(digest(40, 30, 0))"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    command, root = [sys.executable, "-c", code], Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as other:
        own = digest(40, 30, 0)
        assert other.communicate()[0].strip() == str(own) and other.returncode == 0


def test_form(splits):
    for split, num in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        data, captions = splits[split]
        assert data.images_N3SS.shape == (num, 3, 64, 64) and data.images_N3SS.dtype == torch.uint8 and len(captions) == num
        kinds, questions, of_texts = defaultdict(list), defaultdict(set), []
        for some in data.instructions:
            ((question, answer),) = some.turns
            kinds[some.image].append(some.kind)
            questions[some.image].add(question)
            assert question.startswith(f"{IMAGE}\n") and (question + answer) == (question + answer).lower()
            assert some.where == scenes.WHERE[split][some.image % len(scenes.WHERE[split])]
            how = (" one word.", " one number.", " one letter.", " sentence.", " the text.", " the cell.", " the box.")
            bare = split == "train" and some.kind == "vqa" and question.endswith("?")
            assert bare or question.endswith(how)
        assert list(kinds) == list(range(num))
        for image, found in kinds.items():
            shapes, text = read(captions[image])
            times = {
                "caption": 1,
                "vqa": 6 if shapes else found.count("vqa"),
                "choice": bool(text) or alone(shapes, "size", "shape") > 0 or alone(shapes, "size", "colour") > 0,
                "ocr": bool(text),
                "region": min(4, 2 * alone(shapes, "size", "colour", "shape") + bool(text)),
            }
            assert found == [kind for kind in KINDS for _ in range(times[kind])]
            assert len(questions[image]) == len(found)  # all different
            of_texts += [] if shapes else [found.count("vqa")]
        assert set(of_texts) == {1, 2}  # of a text alone: its colour, and half the time that there are no shapes
        assert 0.2 < of_texts.count(2) / len(of_texts) < 0.7  # few in test
    assert 0.35 < len(instructions(splits, "ocr")) / (NUM_TRAIN + NUM_TEST) < 0.45
    assert len(instructions(splits)) > 8.8 * (NUM_TRAIN + NUM_TEST)


def alone(shapes: list[dict], *attributes: str) -> int:
    """How many of the shapes these attributes single out."""
    return list(Counter(tuple(s[name] for name in attributes) for s in shapes).values()).count(1)


@pytest.mark.parametrize("size", [32, 96])
def test_other_sizes_show_the_same(size):
    small, other = (make_splits(12, 0, 0, some)["train"] for some in (64, size))
    assert other.data.images_N3SS.shape == (12, 3, size, size)
    assert small.captions == other.captions and small.data.instructions == other.data.instructions
    coarse, coarse_other = (
        torch.nn.functional.adaptive_avg_pool2d(some.data.images_N3SS[::2].double(), 16) for some in (small, other)
    )  # the clean ones
    assert (coarse - coarse_other).abs().mean() < 1.5


def test_no_picture_asked_for():
    assert scenes.make_scenes(3, 0)["test"].images_N3SS.shape == (0, 3, 64, 64)


# ---- What is shown, read from the captions ----


def read(caption: str) -> tuple[list[dict], dict | None]:
    """The shapes and the text of a caption."""
    assert caption.endswith(".")
    shapes, text = [], None
    for part in re.split(", | and ", caption[:-1]):
        if found := re.fullmatch(r"the (word|number) (\w+) in (\w+) at the (top|bottom)", part):
            noun, word, colour, row = found.groups()
            assert (noun == "number") == word.isdigit() and word.isdigit() != (word in scenes.WORDS)
            text = {"noun": noun, "word": word, "colour": colour, "row": ("top", "bottom").index(row)}
        else:
            size, colour, shape, cell = re.fullmatch(r"a (\w+) (\w+) (\w+) at the (\w+ \w+)", part).groups()
            shapes.append({"size": size, "colour": colour, "shape": shape, "cell": CELLS.index(cell)})
    return shapes, text


def test_captions_keep_the_rules(splits):
    counts, written = Counter(), Counter()
    for split in splits.values():
        for caption in split.captions:
            shapes, text = read(caption)
            cells = [shape["cell"] for shape in shapes]
            assert len(cells) == len(set(cells))
            order = [(list(COLOURS).index(s["colour"]), list(OUTLINES).index(s["shape"])) for s in shapes]
            assert order == sorted(order)
            assert all(s["size"] in SIZES and s["colour"] in COLOURS and s["shape"] in OUTLINES for s in shapes)
            if text:
                assert text["colour"] not in [shape["colour"] for shape in shapes]
                assert text["row"] not in [cell // 2 for cell in cells]
                written[f"{len(text['word'])} digits" if text["noun"] == "number" else "word"] += 1
            counts[len(shapes), bool(text)] += 1
    assert set(counts) == {(1, False), (2, False), (3, False), (4, False), (0, True), (1, True), (2, True)}
    assert len(written) == 3 and len(set(scenes.WORDS)) == 24
    for noun, share in {"word": 0.5, "1 digits": 0.25, "2 digits": 0.25}.items():
        assert abs(written[noun] / written.total() - share) < 0.06


def test_train_and_test_share_no_scene(splits):
    assert not set(splits["train"].captions) & set(splits["test"].captions)
    free = scenes.random_scenes(NUM_TRAIN, "train", 0)  # unless told to, it does
    assert {scenes.caption(scene) for scene in free} & set(splits["test"].captions)


def test_held_out_pairs_are_in_test_only(splits):
    assert len(HELD_OUT) == len(dict(HELD_OUT)) == 4 and {shape for _, shape in HELD_OUT} == set(OUTLINES)
    names = [" ".join(pair) for pair in HELD_OUT]
    shown = {split: [any(name in caption for name in names) for caption in splits[split].captions] for split in splits}
    assert not any(shown["train"])
    assert shown["test"] == [False, False, True] * (NUM_TEST // 3)
    assert all(any(name in caption for caption in splits["test"].captions) for name in names)
    about = []
    for some in instructions(splits):
        question, answer = some.turns[0]
        if some.where != "new pairs":
            assert not any(name in question or name in answer for name in names), some
            if some.kind == "choice":
                options = re.findall(r"[a-c]: (\w+)", question)
                asked = question.split("?")[0].split()
                assert not any(a in options and b in asked or b in options and a in asked for a, b in HELD_OUT), some
        elif some.kind in ("vqa", "choice", "region"):
            words = question.split("?")[0].replace("crosses", "cross").split()
            words += [word.rstrip("s") for word in words]
            new = [pair for pair in HELD_OUT if " ".join(pair) in splits["test"].captions[some.image]]
            about.append("shapes" in words and "many" in words or any(set(pair) & set(words) for pair in new))
    assert sum(about) > 0.9 * len(about)  # a held-out thing that has no name of its own is not asked about


# ---- What is asked ----


def the(name: str, shapes: list[dict], whole: bool = False) -> dict:
    """The one shape that this names: by no more words than it takes, or by all if `whole`."""
    first, *words = name.split()

    def fit(words: list[str]) -> list[dict]:
        return [s for s in shapes if set(words) - {"object"} <= {s["size"], s["colour"], s["shape"]}]

    (found,) = fit(words)
    assert first == "the" and words == [w for w in (found["size"], found["colour"], found["shape"], "object") if w in words]
    assert len(words) == 3 if whole else words[1:] in ([], ["object"]) or len(fit(words[1:])) > 1, (name, shapes)
    return found


def true_answers(question: str, caption: str) -> set[str]:
    """All right answers, of those questions that a caption can answer."""
    shapes, text = read(caption)
    question = question.removeprefix(f"{IMAGE}\n").rsplit("?", 1)[0]
    if found := re.fullmatch(r"what (colour|shape|size) is (the [\w ]+)", question):
        part, name = found.groups()
        return {text["colour"] if text and name == f"the {text['noun']}" else the(name, shapes)[part]}
    if found := re.fullmatch(r"how many (?:(\w+) )?(\w+) are there", question):
        colour, plural = found.groups()
        shape = next((shape for shape in OUTLINES if plural in (f"{shape}s", f"{shape}es")), None)
        assert shape or plural == "shapes"
        assert not (text and text["colour"] == colour)
        return {str(sum(colour in (None, s["colour"]) and shape in (None, s["shape"]) for s in shapes))}
    if found := re.fullmatch(r"is there a (?:(\w+) )?(\w+)", question):
        colour, shape = found.groups()
        assert not (shape == "shape" and text and text["colour"] == colour)
        fit = [colour in (None, s["colour"]) and shape in ("shape", s["shape"]) for s in shapes]
        return {"yes" if any(fit) else "no"}
    if found := re.fullmatch(r"where is (the [\w ]+) from (the [\w ]+)", question):
        (row, column), (other_row, other_column) = (
            divmod(the(name, shapes, whole=True)["cell"], 2) for name in found.groups()
        )
        ways = {
            "left": other_column - column,
            "right": column - other_column,
            "above": other_row - row,
            "below": row - other_row,
        }
        return {way for way, cells in ways.items() if cells > 0}
    if question == "what is written":
        return {text["word"]}
    if question.startswith("where is the "):
        return {CELLS[the(question.removeprefix("where is "), shapes, whole=True)["cell"]]}
    raise AssertionError(question)


def test_every_answer_is_right(splits):
    asked = Counter()
    for split in splits.values():
        for some in split.data.instructions:
            ((question, answer),) = some.turns
            asked[some.kind, some.part] += 1
            caption = split.captions[some.image]
            if some.kind == "caption":
                assert (question, answer) == (f"{IMAGE}\ndescribe the picture in one sentence.", caption)
            elif some.kind == "choice":
                question, options = question.split("? ")
                found = dict(re.findall(r"([a-c]): (\w+)", options))
                assert list(found) == list("abc") and len(set(found.values())) == 3
                assert {found[answer]} == true_answers(f"{question}?", caption)
            elif some.part != "box":
                assert {answer, *some.accept} == true_answers(question, caption), (question, caption)
                assert some.part == "relation" or not some.accept
    assert len(asked) == 12 and min(asked.values()) > 500
    assert min(num for (kind, _), num in asked.items() if kind == "vqa") > 1400


def test_the_way_named_first_is_the_longer_one():
    long_across = Scene((shape("large red circle", 0, y=0.06), shape("large blue square", 3)))
    asks = {ask.question: ask[1::2] for ask in scenes.ask_relation(long_across)}
    assert asks["where is the large red circle from the large blue square?"] == ("left", ("above",))
    assert asks["where is the large blue square from the large red circle?"] == ("right", ("below",))
    long_down = Scene((shape("large red circle", 1), shape("small blue square", 2, y=0.7)))
    asks = {ask.question: ask[1::2] for ask in scenes.ask_relation(long_down)}
    assert asks["where is the large red circle from the small blue square?"] == ("above", ("right",))
    assert asks["where is the small blue square from the large red circle?"] == ("below", ("left",))
    straight = Scene((shape("small red circle", 0, y=0.02), shape("large blue square", 1)))
    asks = {ask.question: ask[1::2] for ask in scenes.ask_relation(straight)}
    assert asks["where is the small red circle from the large blue square?"] == ("left", ())


def asked_after(question: str) -> tuple[str | None, str | None]:
    """Colour and shape of "is there a ...?"; None for the one that is not named."""
    colour, shape = re.search(r"is there a (?:(\w+) )?(\w+)\?", question).groups()
    return colour, None if shape == "shape" else shape


def looks(caption: str) -> tuple[set, set, set]:
    """The colours and shapes of a picture, and their pairs."""
    shapes, _ = read(caption)
    return {s["colour"] for s in shapes}, {s["shape"] for s in shapes}, {(s["colour"], s["shape"]) for s in shapes}


def test_noes_are_hard_where_they_can_be():
    """Hard: the colour and the shape are there, apart. All of these are asked, and easy ones until there are as many noes
    as yesses, one at least; the same for a colour alone, and for a shape alone."""
    totals = Counter()
    for split in ("train", "test"):
        for scene in scenes.random_scenes(300, split, 3):
            colours, shapes, pairs = looks(scenes.caption(scene))
            asked = {"yes": set(), "no": set()}
            for ask in scenes.ask_yes_no(scene):
                assert asked_after(ask.question) not in asked[ask.answer]
                asked[ask.answer].add(asked_after(ask.question))
            if not shapes:
                assert not any(asked.values())
                continue
            hidden = set() if scene.where == "new pairs" else set(HELD_OUT)
            free = set(COLOURS) - {text.colour for text in scene.texts}
            hard = {(a, b) for a in colours for b in shapes} - pairs - hidden
            for own, yes, no in (
                ({(a, None) for a in free}, {(a, None) for a in colours}, set()),
                ({(None, b) for b in OUTLINES}, {(None, b) for b in shapes}, set()),
                ({(a, b) for a in COLOURS for b in OUTLINES} - hidden, pairs, hard),
            ):
                assert asked["yes"] & own == yes and no <= asked["no"] & own
                rest = own - yes - no
                assert len((asked["no"] & own) - no) == min(len(rest), max(len(yes) - len(no), not no))
            totals.update(hard=len(hard), easy=len(asked["no"] - hard))
    assert totals["hard"] > 100 and totals["easy"] > 400
    noes = [{ask.question for ask in scenes.ask_yes_no(replace(PAIR, seed=seed)) if ask.answer == "no"} for seed in range(9)]
    assert len(set.union(*noes)) > 6  # other easy ones for another seed


def test_every_kind_of_no_is_asked(splits):
    counts = Counter()
    for split in splits.values():
        for some in split.data.instructions:
            if some.part == "yes/no":
                colour, shape = asked_after(some.turns[0][0])
                colours, shapes, _ = looks(split.captions[some.image])
                pair = bool(colour and shape)
                counts[some.turns[0][1], pair, pair and colour in colours and shape in shapes] += 1
    assert len(counts) == 5 and min(counts.values()) > 50, counts


def test_options_come_from_the_picture_first(splits):
    for split in splits.values():
        for some in split.data.instructions:
            if some.kind == "choice" and some.where == "new pairs":  # where no option is ruled out
                shapes, text = read(split.captions[some.image])
                shown = {s[some.part] for s in shapes} | ({text["colour"]} if text and some.part == "colour" else set())
                options = set(re.findall(r"[a-c]: (\w+)", some.turns[0][0]))
                assert len(options & shown) == min(3, len(shown))


BOUNDS = {
    **{
        ("vqa", "colour"): 0.18,
        ("vqa", "shape"): 0.27,
        ("vqa", "size"): 0.54,
        ("vqa", "count"): 0.27,
        ("vqa", "yes/no"): 0.54,
    },
    **{("vqa", "relation"): 0.36, ("choice", "colour"): 0.36, ("choice", "shape"): 0.36, ("region", "cell"): 0.27},
    **{("region", "box"): 0.03, ("ocr", ""): 0.05, ("caption", ""): 0.01},
}


@pytest.mark.parametrize("kind, part", BOUNDS)
def test_no_constant_answer_does_well(splits, kind, part):
    found = [some for some in splits["train"].data.instructions if (some.kind, some.part) == (kind, part)]
    right = Counter(answer for some in found for answer in (some.turns[0][1], *some.accept))
    assert max(right.values()) / len(found) < BOUNDS[kind, part], right.most_common(3)


@pytest.mark.parametrize("part, bound", [("yes/no", 0.62), ("size", 0.58), ("count", 0.42)])
def test_no_question_answers_itself(splits, part, bound):
    """Nor does the best constant answer to each question, as "is there a red circle?", do well over all of them."""
    answers = defaultdict(Counter)
    for some in splits["train"].data.instructions:
        if (some.kind, some.part) == ("vqa", part):
            answers[some.turns[0][0] if part != "size" else some.turns[0][0].split()[-3]][some.turns[0][1]] += 1
    right = sum(max(counts.values()) for counts in answers.values())
    assert len(answers) > 3 and right / sum(counts.total() for counts in answers.values()) < bound


def test_counts_are_spread_within_each_question(splits):
    forms = defaultdict(Counter)
    for some in instructions(splits, "vqa", "count"):
        words = some.turns[0][0].split()
        forms["colour" if words[3] in COLOURS else "all" if words[3] == "shapes" else "shape"][some.turns[0][1]] += 1
    for counts in forms.values():
        assert set(counts) == set("01234") and max(counts.values()) < 0.45 * sum(counts.values()), counts


def test_parts_take_turns(splits):
    for split in splits.values():
        for where in scenes.WHERE["test"]:
            for kind in ("vqa", "choice", "region"):
                found = [some.part for some in split.data.instructions if (some.where, some.kind) == (where, kind)]
                counts = Counter(found)
                if split is splits["train"] and kind == "region" and found:  # OFTEN, where there is a choice
                    assert counts["cell"] > 1.25 * counts["box"]
                    continue
                share = 0.1 if where == "new pairs" else 0.03  # the parts that can ask most about a held-out pair do
                assert not found or max(counts.values()) - min(counts.values()) <= share * len(found) + 2


# ---- Scenes by hand ----


def shape(words: str, cell: int, x: float | None = None, y: float | None = None) -> Thing:
    """ "large red circle", in the middle of its cell, or from x, or from y on."""
    size, colour, kind = words.split()
    side = {"small": 0.27, "large": 0.42}[size]
    x, y = (i / 2 + (1 / 2 - side) / 2 if at is None else at for i, at in ((cell % 2, x), (cell // 2, y)))
    return Thing(colour, kind, size, cell, (x, y, x + side, y + side))


WORD = Thing("green", "word", "", 1, (0.15, 0.6, 0.85, 0.9), "cat")
PAIR = Scene((shape("large red circle", 0), shape("small blue square", 1)), (WORD,))
CROWD = Scene(
    tuple(shape(words, cell) for cell, words in enumerate(["large red square", "small red circle", "large red circle"]))
)
SAME = Scene(
    tuple(shape(words, cell) for cell, words in enumerate(["large red circle", "large blue circle", "large red cross"]))
)
TWINS = Scene(tuple(shape("large pink cross", cell) for cell in (1, 2, 3)))

BY_HAND = [
    ("caption", "", PAIR, "describe the picture in one sentence.", None),
    ("vqa", "colour", PAIR, "what colour is the circle? one word.", "red"),
    ("vqa", "colour", PAIR, "what colour is the word? one word.", "green"),
    ("vqa", "shape", PAIR, "what shape is the blue object? one word.", "square"),
    ("vqa", "size", PAIR, "what size is the square? one word.", "small"),
    ("vqa", "count", PAIR, "how many shapes are there? one number.", "2"),
    ("vqa", "count", PAIR, "how many red shapes are there? one number.", "1"),
    ("vqa", "count", PAIR, "how many crosses are there? one number.", "0"),
    ("vqa", "yes/no", PAIR, "is there a red circle? one word.", "yes"),
    ("vqa", "yes/no", PAIR, "is there a red square? one word.", "no"),
    ("vqa", "relation", PAIR, "where is the small blue square from the large red circle? one word.", "right"),
    ("ocr", "", PAIR, "what is written? the text.", "cat"),
    ("region", "cell", PAIR, "where is the small blue square? the cell.", "top right"),
    ("region", "box", PAIR, "where is the large red circle? the box.", "1 1 15 15"),
    ("region", "box", PAIR, "where is the word? the box.", "5 19 27 29"),
    ("vqa", "colour", CROWD, "what colour is the small circle? one word.", "red"),
    ("vqa", "shape", CROWD, "what shape is the small red object? one word.", "circle"),
    ("vqa", "count", CROWD, "how many red shapes are there? one number.", "3"),
    ("vqa", "count", CROWD, "how many circles are there? one number.", "2"),
    ("vqa", "relation", CROWD, "where is the large red square from the large red circle? one word.", "above"),
    ("vqa", "relation", CROWD, "where is the small red circle from the large red circle? one word.", {"right", "above"}),
    ("region", "cell", CROWD, "where is the small red circle? the cell.", "top right"),
    ("region", "cell", SAME, "where is the large red circle? the cell.", "top left"),
    ("vqa", "relation", SAME, "where is the large blue circle from the large red cross? one word.", {"right", "above"}),
    ("vqa", "count", Scene((), (WORD,), seed=1), "how many shapes are there? one number.", "0"),
    ("vqa", "count", TWINS, "how many crosses are there? one number.", "3"),
    ("vqa", "yes/no", TWINS, "is there a pink cross? one word.", "yes"),
]


def all_asked(kind: str, part: str, scene: Scene) -> dict:
    find, how = scenes.ASKED[kind][part]
    return {f"{ask.question} {how}": {ask.answer, *ask.accept} for ask in find(scene)}


@pytest.mark.parametrize("kind, part, scene, question, answer", BY_HAND)
def test_by_hand(kind, part, scene, question, answer):
    expected = scenes.caption(scene) if kind == "caption" else answer
    assert all_asked(kind, part, scene)[question] == (expected if isinstance(expected, set) else {expected})


def test_captions_by_hand():
    two = "a large red circle at the top left, a small blue square at the top right"
    assert scenes.caption(PAIR) == f"{two} and the word cat in green at the bottom."
    assert scenes.caption(Scene(PAIR.shapes)) == f"{two}.".replace(",", " and")
    assert scenes.caption(Scene((), (WORD,))) == "the word cat in green at the bottom."


def test_the_ambiguous_is_not_asked():
    for kind, part in [
        ("vqa", "colour"),
        ("vqa", "shape"),
        ("vqa", "size"),
        ("vqa", "relation"),
        ("region", "cell"),
        ("choice", "shape"),
    ]:
        assert not all_asked(kind, part, TWINS)
    assert set(all_asked("vqa", "colour", CROWD)) == {
        f"what colour is the {name}? one word." for name in ("square", "small circle", "large circle")
    }
    assert set(all_asked("region", "cell", SAME)) == {
        f"where is the large {name}? the cell." for name in ("red circle", "blue circle", "red cross")
    }
    assert not all_asked("vqa", "count", Scene((), (WORD,), seed=2))  # of half the pictures with no shape
    assert set(all_asked("vqa", "size", CROWD)) == {"what size is the square? one word."}
    assert not any("green" in question for question in all_asked("vqa", "count", PAIR))  # the word's colour


def test_cells_are_named_as_they_lie():
    assert scenes.ROWS == ["top", "bottom"] and len(CELLS) == 4
    for cell, name in enumerate(CELLS):
        assert name == f"{('top', 'bottom')[cell // 2]} {('left', 'right')[cell % 2]}"


# ---- Pixels ----


def covered(image_3SS: torch.Tensor, colour: str) -> torch.Tensor:
    """Where a clean picture has this colour, in full."""
    return (image_3SS.int() - torch.tensor(COLOURS[colour])[:, None, None]).abs().amax(0) <= 3


def bounds(mask_SS: torch.Tensor) -> list[float]:
    """Left, top, right, bottom in units of the side."""
    ys, xs = mask_SS.nonzero().T / len(mask_SS)
    return [*(float(some.min()) for some in (xs, ys)), *(float(some.max()) + 1 / len(mask_SS) for some in (xs, ys))]


@pytest.mark.parametrize("kind", OUTLINES)
@pytest.mark.parametrize("size", SIZES)
def test_a_shape_fills_its_box_and_nothing_else(kind, size):
    thing = shape(f"{size} red {kind}", 3)
    mask_SS = covered(scenes.draw_scene(Scene((thing,)), 256), "red")
    for seen, edge in zip(bounds(mask_SS), thing.box, strict=True):
        assert abs(seen - edge) < 0.01  # the tip of a triangle is thin
    left, top, right, bottom = thing.box
    share = {"circle": 0.785, "square": 1, "triangle": 0.5, "cross": 0.56}[kind]
    assert abs(float(mask_SS.double().mean()) / ((right - left) * (bottom - top)) - share) < 0.08


@pytest.mark.parametrize("word", ["ant", "key", "map", "7", "48"])
def test_a_text_fills_its_box(word):
    width, height = scenes.ink(word)[2:]
    text = Thing("pink", "word", "", 0, (0.05, 0.15, 0.05 + width, 0.15 + height), word)
    for seen, edge in zip(bounds(covered(scenes.draw_scene(Scene((), (text,)), 256), "pink")), text.box, strict=True):
        assert abs(seen - edge) < 0.015  # hinting moves letters by a pixel or two of 768
    digit = scenes.ink("8")[3]
    assert 14 <= 64 * digit <= 18


def test_things_lie_apart_and_inside():
    """Near the middle of their cells or rows, each a little elsewhere, of the sizes they are said to have."""
    places = defaultdict(list)
    for split in ("train", "test"):
        for scene in scenes.random_scenes(300, split, 3):
            for thing in scene.shapes + scene.texts:
                left, top, right, bottom = thing.box
                row, column = (thing.cell, 0) if thing.text else divmod(thing.cell, 2)
                assert 0 < left < right < 1 and row / 2 < top < bottom < (row + 1) / 2
                places[bool(thing.text), "y"].append((top + bottom) / 2 - (row + 0.5) / 2)
                places[bool(thing.text), "x"].append((left + right) / 2 - (0.5 if thing.text else (column + 0.5) / 2))
                if not thing.text:
                    assert column / 2 < left < right < (column + 1) / 2
                    low, high = {"small": (0.26, 0.29), "large": (0.4, 0.44)}[thing.size]
                    assert low < right - left < high and abs((right - left) - (bottom - top)) < 1e-9
    assert len(places) == 4
    for found in places.values():
        assert -0.026 < min(found) < -0.022 and 0.022 < max(found) < 0.026


def test_places_are_read_as_they_are_asked():
    """What a sheet draws: the box of the thing itself, and the quarter that holds it."""
    thing = Thing("red", "circle", "large", 2, (0.06, 0.55, 0.45, 0.94))
    ((_, box, *_),) = scenes.ask_place(Scene((thing,)), "box")
    assert scenes.read_place(box) == pytest.approx(thing.box, abs=0.5 / scenes.BOX)
    ((_, cell, *_),) = scenes.ask_place(Scene((thing,)), "cell")
    assert scenes.read_place(cell) == (0, 0.5, 0.5, 1) and scenes.read_place("Top right.") == (0.5, 0, 1, 0.5)
    for text in ("", "red", "1 2 3", "9 9 4 20", "1 1 33 9", "-1 1 9 9"):
        assert scenes.read_place(text) is None


def test_the_box_asked_for_holds_the_thing(splits):
    """In clean pictures, the pixels of the named thing's colour in its part of the picture are bounded by the answer."""
    checked = 0
    for split in splits.values():
        for some in split.data.instructions:
            if some.part == "box" and some.where != "cluttered":
                shapes, text = read(split.captions[some.image])
                name = some.turns[0][0].split("where is ")[1].split("?")[0]
                if text and name == f"the {text['noun']}":
                    colour, rows, columns = text["colour"], slice(None), slice(None)
                else:
                    thing = the(name, shapes, whole=True)
                    row, column = divmod(thing["cell"], 2)
                    colour, rows, columns = (
                        thing["colour"],
                        *(slice(32 * i, 32 * (i + 1)) for i in (row, column)),
                    )
                mask_SS = torch.zeros(64, 64, dtype=torch.bool)
                mask_SS[rows, columns] = covered(split.data.images_N3SS[some.image], colour)[rows, columns]
                numbers = [int(number) for number in some.turns[0][1].split()]
                assert len(numbers) == 4 and min(numbers) >= 0 and max(numbers) <= scenes.BOX
                assert all(
                    abs(scenes.BOX * seen - edge) <= 1.51 for seen, edge in zip(bounds(mask_SS), numbers, strict=True)
                ), some
                checked += 1
    assert checked > 400


def test_clutter_is_no_colour_of_a_thing():
    """Nothing in an empty cluttered picture is near a colour of things, and it is not plain. The ground is light."""
    palette_K3 = torch.tensor(list(COLOURS.values())).float()
    for seed, background in enumerate(scenes.BACKGROUNDS * 3):
        assert min(background) > 200
        image_3SS = scenes.draw_scene(Scene((), (), "cluttered", background, seed)).float()
        assert torch.cdist(image_3SS.flatten(1).T, palette_K3).min() > 60
        assert 8 < image_3SS.std(dim=(1, 2)).min() and image_3SS.std(dim=(1, 2)).max() < 30
        assert scenes.draw_scene(Scene((), (), "clean", background, seed)).flatten(1).unique(dim=1).shape == (3, 1)
