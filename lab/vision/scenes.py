"""Generated pictures with instructions, for `toy_lvlm.py`: coloured shapes and written words, nothing downloaded.

A picture shows up to four shapes on a light background, each near the middle of its own cell of a 2x2 grid. Two of five
pictures also show a word or a number. The questions have the kinds of `lab.vision.instructions`, so that a
Mixture-of-Experts has mixed work. Some pairs of colour and shape are held out: training never shows or names them, and a
third of the test pictures contain one.

  1 Scenes  2 Random scenes  3 Pictures (N of them, S pixels a side)  4 Questions  5 Instructions
"""

import random
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import permutations, product
from math import cos, pi, sin
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from lab.vision.instructions import IMAGE, Instruction, InstructionSet, plain, read_box

# ---- 1. Scenes ----

HUES = "red d61820 yellow fada00 green 149632 cyan 00c8dc blue 2448e6 pink ff78be".split()
COLOURS = {name: tuple(bytes.fromhex(code)) for name, code in zip(HUES[::2], HUES[1::2], strict=True)}
# the x of its corners; the y are the same list, three corners later
CROSS = [0.33, 0.67, 0.67, 1, 1, 0.67, 0.67, 0.33, 0.33, 0, 0, 0.33]
OUTLINES = {  # corners, relative to the box
    "circle": [(0.5 + 0.5 * sin(pi * i / 24), 0.5 - 0.5 * cos(pi * i / 24)) for i in range(48)],
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "cross": list(zip(CROSS, CROSS[9:] + CROSS[:9], strict=True)),
}
CELLS = ["top left", "top right", "bottom left", "bottom right"]  # of shapes
ROWS = ["top", "bottom"]  # of texts, two cells each
HELD_OUT = list(zip("blue yellow cyan red".split(), OUTLINES, strict=True))  # never in training


@dataclass(frozen=True)
class Thing:
    """A shape, or a text. For a text `shape` is "word" or "number", and `cell` is an index of ROWS instead of CELLS."""

    colour: str
    shape: str
    size: str  # small or large; "" for a text
    cell: int
    box: tuple[float, float, float, float]  # left, top, right, bottom, relative to the picture's side
    text: str = ""


@dataclass(frozen=True)
class Scene:
    """The content of a picture: shapes in reading order, and at most one text, in its own row and colour."""

    shapes: tuple[Thing, ...]
    texts: tuple[Thing, ...] = ()
    where: str = "clean"  # or "cluttered", or "new pairs": clean, with a held-out pair
    background: tuple[int, int, int] = (242, 242, 242)
    seed: int = 0  # of its clutter and of the order of options

    @property
    def key(self) -> tuple[Thing, ...]:
        """Equal for pictures of the same things. They may differ in jitter, background and clutter."""
        return tuple(replace(thing, box=None) for thing in self.shapes + self.texts)


def is_new(*things: Thing) -> bool:
    return any((thing.colour, thing.shape) in HELD_OUT for thing in things)


# ---- 2. Random scenes ----

WORDS = "ant bed box bus cat cow cup dog egg fan fox hat ice jam key map owl pen pig sea sky sun tea zoo".split()
SIDES = {"small": (0.26, 0.29), "large": (0.4, 0.44)}
JITTER = 0.025  # distance from the middle of the cell or row: a tiny CLIP needs too long to find things anywhere
BACKGROUNDS = [(242, 242, 242), (226, 222, 214), (214, 220, 228), (232, 238, 226), (228, 222, 236)]
WHERE = {"train": ("clean", "cluttered"), "test": ("clean", "cluttered", "new pairs")}


def random_shape(colour: str, shape: str, cell: int, rng: random.Random) -> Thing:
    size = rng.choice(list(SIDES))
    side = rng.uniform(*SIDES[size])
    x, y = ((i + 0.5) / 2 - side / 2 + rng.uniform(-JITTER, JITTER) for i in (cell % 2, cell // 2))
    return Thing(colour, shape, size, cell, (x, y, x + side, y + side))


def random_text(colour: str, row: int, rng: random.Random) -> Thing:
    """Half of the texts are words. The numbers have one or two digits, equally often."""
    word = rng.choice(WORDS) if rng.random() < 0.5 else str(rng.randrange(*rng.choice([(0, 10), (10, 100)])))
    *_, width, height = ink(word)
    x, y = (1 - width) / 2 + rng.uniform(-JITTER, JITTER), (row + 0.5) / 2 - height / 2 + rng.uniform(-JITTER, JITTER)
    return Thing(colour, "number" if word.isdigit() else "word", "", row, (x, y, x + width, y + height), word)


def some_of(words: Collection[str], num: int, rng: random.Random) -> list[str]:
    """`num` of the words. Half of the time all differ; otherwise one to three words repeat, so that things share
    attributes."""
    words = rng.sample(list(words), len(words))
    return words[:num] if rng.random() < 0.5 else rng.choices(words[: rng.randint(1, 3)], k=num)


def random_looks(num: int, colours: Collection[str], new: bool, rng: random.Random) -> list[tuple[str, str]]:
    """Colour and shape of `num` things, with at least one held-out pair if `new`, otherwise with none."""
    looks = []
    while len(looks) < num or any(look in HELD_OUT for look in looks) != (new and num > 0):
        looks = list(zip(*(some_of(words, num, rng) for words in (colours, OUTLINES)), strict=True))
    return looks


def random_scenes(num: int, split: str, seed: int, taken: frozenset = frozenset()) -> list[Scene]:
    """Scenes with the split's conditions in turn. None has a key in `taken`; within a split a key may repeat."""
    rng, scenes = random.Random(f"{split} {seed}"), []
    while len(scenes) < num:
        where, written, row = WHERE[split][len(scenes) % len(WHERE[split])], rng.random() < 0.4, rng.randrange(2)
        num_shapes = rng.choice([0, 1, 1, 2, 2] if written else [1, 2, 3, 4])
        cells = sorted(rng.sample([cell for cell in range(4) if not written or cell // 2 != row], num_shapes))
        colour, *colours = rng.sample(list(COLOURS), len(COLOURS))  # a text's, and those left for shapes
        looks = random_looks(num_shapes, colours, where == "new pairs", rng)
        shapes = tuple(random_shape(*look, cell, rng) for look, cell in zip(looks, cells, strict=True))
        texts = (random_text(colour, row, rng),) if written else ()
        scene = Scene(shapes, texts, where, rng.choice(BACKGROUNDS), rng.getrandbits(32))
        if (shapes or where != "new pairs") and scene.key not in taken:
            scenes.append(scene)
    return scenes


# ---- 3. Pictures ----

SCALE = 3  # drawn so many times larger and then reduced, for smooth edges
EM = 0.36  # font size, relative to the picture's side; digits are 0.27 high
FONT = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf"
font = lru_cache(partial(ImageFont.truetype, FONT, layout_engine=ImageFont.Layout.BASIC))  # by its size in pixels


@lru_cache(maxsize=2048)
def ink(word: str) -> tuple[float, float, float, float]:
    """The word's ink: left and top relative to the pen's start, then width and height, relative to the picture's side."""
    x, y, *_ = font(100).getbbox(word)  # starts before the ink by the letter's bearing
    left, top, right, bottom = font(100).getmask(word).getbbox()
    return tuple(EM / 100 * length for length in (x + left, y + top, right - left, bottom - top))


def draw_clutter(pen: ImageDraw.ImageDraw, scene: Scene, side: int) -> None:
    """Blobs and lines in colours near the background: visible, but unlike the colour of any thing."""
    rng = random.Random(scene.seed)
    for draw in [pen.ellipse] * 4 + [partial(pen.line, width=max(1, side // 64))] * 5:
        shift = rng.choice([-1, 1]) * rng.randint(10, 26)
        fill = tuple(min(max(channel + shift + rng.randint(-6, 6), 0), 255) for channel in scene.background)
        x, y, u, v = (rng.uniform(-0.1, 1.1) * side for _ in range(4))
        draw((min(x, u), min(y, v), max(x, u), max(y, v)), fill=fill)


def draw_scene(scene: Scene, size: int = 64) -> torch.Tensor:
    """The picture, uint8 of shape (3, size, size). Clutter is behind the things, its noise on the whole picture."""
    side = SCALE * size
    image = Image.new("RGB", (side, side), scene.background)
    pen = ImageDraw.Draw(image)
    if scene.where == "cluttered":
        draw_clutter(pen, scene, side)
    for thing in scene.shapes + scene.texts:
        (left, top, right, bottom), fill = [edge * side - 0.5 for edge in thing.box], COLOURS[thing.colour]
        if thing.text:
            x, y, *_ = ink(thing.text)
            pen.text((left - x * side, top - y * side), thing.text, fill, font(round(EM * side)))
        else:
            pen.polygon([(left + x * (right - left), top + y * (bottom - top)) for x, y in OUTLINES[thing.shape]], fill)
    pixels_SS3 = np.array(image.reduce(SCALE))
    if scene.where == "cluttered":
        noise_SS3 = np.random.default_rng(scene.seed).integers(-16, 17, pixels_SS3.shape, np.int16)
        pixels_SS3 = (pixels_SS3 + noise_SS3).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(pixels_SS3).permute(2, 0, 1)


# ---- 4. Questions ----
# Each function returns all questions of its kind about a scene, without the words that say how to answer.

BOX = 32  # the coordinates of a box are integers from 0 to BOX
LETTERS = "abc"  # of a choice's options


class Ask(NamedTuple):
    question: str
    answer: str
    about: tuple[Thing, ...]
    accept: tuple[str, ...] = ()


# questions about places use full names: with a quarter of the names shorter, one trial did not learn them in 600 steps
WHOLE = "size colour shape"


def named(scene: Scene, *ways: str) -> list[tuple[Thing, str]]:
    """The shapes, each with the first name that fits no other shape: "the cross" before "the small cross". Some have
    none."""
    called = {}
    for thing, way in product(scene.shapes, ways):
        words, *others = [[getattr(some, word) for word in way.split()] for some in (thing, *scene.shapes)]
        if others.count(words) == 1:
            called.setdefault(thing, " ".join(["the", *words] if "shape" in way else ["the", *words, "object"]))
    return list(called.items())


def caption(scene: Scene) -> str:
    """The caption of this scene. Shapes are sorted by colour and name, not by place, so a model must look where each is."""
    shapes = sorted(scene.shapes, key=lambda thing: ([*COLOURS].index(thing.colour), [*OUTLINES].index(thing.shape)))
    parts = [f"a {thing.size} {thing.colour} {thing.shape} at the {CELLS[thing.cell]}" for thing in shapes]
    parts += [f"the {text.shape} {text.text} in {text.colour} at the {ROWS[text.cell]}" for text in scene.texts]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts) + "."


def ask_attribute(scene: Scene, part: str) -> list[Ask]:
    """Asks for colour, shape or size of a thing that its other attributes identify, or for the text's colour."""
    ways = {"colour": ("shape", "size shape"), "shape": ("colour", "size colour"), "size": ("shape", "colour shape")}
    found = named(scene, *ways[part]) + [(text, f"the {text.shape}") for text in scene.texts if part == "colour"]
    return [Ask(f"what {part} is {it}?", getattr(thing, part), (thing,)) for thing, it in found]


def ask_choice(scene: Scene, part: str) -> Iterator[Ask]:
    """Choices of three colours or shapes, preferably of the picture. In training no option makes a held-out pair."""
    rng = random.Random(f"{part} {scene.seed}")
    present = {getattr(thing, part) for thing in scene.shapes + scene.texts}
    for ask in ask_attribute(scene, part):
        words = COLOURS if part == "colour" else OUTLINES
        options = [word for word in words if scene.where == "new pairs" or not is_new(replace(ask.about[0], **{part: word}))]
        options = sorted(rng.sample(options, len(options)), key=lambda word: (word != ask.answer, word not in present))
        options = rng.sample(options[: len(LETTERS)], len(LETTERS))
        listed = " ".join(f"{letter}: {word}" for letter, word in zip(LETTERS, options, strict=True))
        yield ask._replace(question=f"{ask.question} {listed}.", answer=LETTERS[options.index(ask.answer)])


def ask_count(scene: Scene) -> list[Ask]:
    """Counts of all shapes, of a colour, of a kind. Without shapes it asks half of the time, or 0 would be a good guess."""
    groups = {"shapes": scene.shapes} if scene.shapes or scene.seed % 2 else {}
    for word in [*COLOURS, *OUTLINES] if scene.shapes else []:
        if all(text.colour != word for text in scene.texts):  # a text is not a shape
            plural = f"{word} shapes" if word in COLOURS else f"{word}es" if word == "cross" else f"{word}s"
            groups[plural] = tuple(thing for thing in scene.shapes if word in (thing.colour, thing.shape))
    return [Ask(f"how many {plural} are there?", str(len(things)), things) for plural, things in groups.items()]


def ask_yes_no(scene: Scene) -> list[Ask]:
    """Asks whether a colour, a shape, or a pair of both is there. Of each, as many answers are no as yes, and at least one.
    Hard negatives come first: colour and shape are both there, but on different things."""
    written, rng, asks = {text.colour for text in scene.texts}, random.Random(f"no {scene.seed}"), []
    for colours, kinds in (([""], OUTLINES), (set(COLOURS) - written, [""]), (COLOURS, OUTLINES)):  # a text is not a shape
        yes, hard, easy = [], [], []
        for colour, kind in product(sorted(colours), kinds) if scene.shapes else ():
            fits = [(colour in ("", thing.colour), kind in ("", thing.shape)) for thing in scene.shapes]
            found, apart = (True, True) in fits, all(map(any, zip(*fits, strict=True)))
            about = tuple(thing for thing in scene.shapes if colour == thing.colour or kind == thing.shape)
            if scene.where == "new pairs" or (colour, kind) not in HELD_OUT:
                question = " ".join(filter(None, ["is there a", colour, kind or "shape"])) + "?"
                (yes if found else hard if apart else easy).append(Ask(question, "yes" if found else "no", about))
        asks += yes + hard + rng.sample(easy, min(len(easy), max(len(yes) - len(hard), not hard)))
    return asks


def ask_relation(scene: Scene) -> Iterator[Ask]:
    """The direction along the larger displacement. The other one is accepted, too, if the cells differ in both."""
    for (one, it), (other, origin) in permutations(named(scene, WHOLE), 2):
        x, y = (one.box[i] + one.box[i + 2] - other.box[i] - other.box[i + 2] for i in (0, 1))
        ways = [(abs(x), "left" if x < 0 else "right"), (abs(y), "above" if y < 0 else "below")]
        (_, answer), (_, second) = sorted(ways, reverse=True)
        diagonal = one.cell % 2 != other.cell % 2 and one.cell // 2 != other.cell // 2
        yield Ask(f"where is {it} from {origin}?", answer, (one, other), (second,) if diagonal else ())


def read_place(answer: str) -> tuple[float, float, float, float] | None:
    """The box of an answer of `ask_place`, relative to the picture's side; a cell is a quarter of the picture. None if the
    text names no place inside the picture."""
    if (name := plain(answer)) in CELLS:
        left, top = CELLS.index(name) % 2 / 2, CELLS.index(name) // 2 / 2
        return left, top, left + 0.5, top + 0.5
    box = read_box(answer)
    inside = box is not None and min(box) >= 0 and max(box) <= BOX
    return tuple(edge / BOX for edge in box) if inside else None


def ask_place(scene: Scene, part: str) -> Iterator[Ask]:
    """Asks for a shape's cell, or for the box of a shape or of the text, such as "4 0 13 9"."""
    for thing, it in named(scene, WHOLE) + [(text, f"the {text.shape}") for text in scene.texts if part == "box"]:
        answer = CELLS[thing.cell] if part == "cell" else " ".join(str(round(BOX * edge)) for edge in thing.box)
        yield Ask(f"where is {it}?", answer, (thing,))


# ---- 5. Instructions ----

ASKED = {  # kind: {part: (questions about a scene, how to answer)}
    "caption": {"": (lambda scene: [Ask("describe the picture", caption(scene), scene.shapes)], "in one sentence.")},
    "vqa": {
        **{part: (partial(ask_attribute, part=part), "one word.") for part in ("colour", "shape", "size")},
        "count": (ask_count, "one number."),
        "yes/no": (ask_yes_no, "one word."),
        "relation": (ask_relation, "one word."),
    },
    "choice": {part: (partial(ask_choice, part=part), "one letter.") for part in ("colour", "shape")},
    "ocr": {"": (lambda scene: [Ask("what is written?", text.text, ()) for text in scene.texts], "the text.")},
    "region": {part: (partial(ask_place, part=part), f"the {part}.") for part in ("cell", "box")},
}
NUM_ASKED = {"vqa": 6, "region": 4}  # questions per picture, if it has so many; 1 for the other kinds
OFTEN = {"cell": 3}  # times as often in training as other parts of the kind: it is learnt last, and relations need it
BARE = 0.3  # share of one-word training questions without the words that say how to answer, as people ask


def instruct(scene: Scene, image: int, split: str, rng: random.Random, used: Counter) -> Iterator[Instruction]:
    """NUM_ASKED questions of each kind that fits the scene. It takes the part used least so far, and of that the answer used
    least, so both occur about equally often, except for OFTEN. Questions about a held-out pair come first. `used` counts by
    condition, and is updated."""
    often = OFTEN if split == "train" else {}
    for kind, parts in ASKED.items():
        found = [(part, ask) for part, (find, _) in parts.items() for ask in find(scene)]
        asks = [((scene.where, kind, part), not is_new(*ask.about), ask) for part, ask in found]
        for _ in range(min(NUM_ASKED.get(kind, 1), len(asks))):
            order = [
                (known, used[key] / often.get(key[2], 1), used[key, ask.answer], rng.random()) for key, known, ask in asks
            ]
            key, _, ask = asks.pop(order.index(min(order)))
            used.update([key, (key, ask.answer)])
            bare = split == "train" and kind == "vqa" and rng.random() < BARE
            turn = (f"{IMAGE}\n{ask.question}" + f" {parts[key[2]][1]}" * (not bare), ask.answer)
            yield Instruction((turn,), image, kind, key[2], scene.where, ask.accept)


def make_scenes(num_train: int, num_test: int, seed: int = 0, size: int = 64) -> dict[str, InstructionSet]:
    """The splits train and test, with so many pictures and no common scene. Test does not depend on num_train."""
    splits, test = {}, random_scenes(num_test, "test", seed)
    train = random_scenes(num_train, "train", seed, frozenset(scene.key for scene in test))
    for split, scenes in (("train", train), ("test", test)):
        rng, used, instructions = random.Random(f"{split} questions {seed}"), Counter(), []
        images_N3SS = torch.empty(len(scenes), 3, size, size, dtype=torch.uint8)
        for i, scene in enumerate(scenes):
            images_N3SS[i] = draw_scene(scene, size)
            instructions += instruct(scene, i, split, rng, used)
        splits[split] = InstructionSet(images_N3SS, instructions)
    return splits
