"""Generated pictures with instructions, for `toy_lvlm.py`: coloured shapes and written words, nothing downloaded.

A picture shows up to four shapes, each near the middle of a cell of its own of a 2x2 grid, and in two of five pictures a
word or a number, on light ground. What is asked about it comes in the kinds of `lab.vision.instructions`, so that a
Mixture-of-Experts has mixed work. Some pairs of colour and shape are held out: training neither shows nor names them, and a
third of the test pictures is about them.

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

from lab.vision.instructions import IMAGE, Instruction, InstructionSet

# ---- 1. Scenes ----

HUES = "red d61820 yellow fada00 green 149632 cyan 00c8dc blue 2448e6 pink ff78be".split()
COLOURS = {name: tuple(bytes.fromhex(code)) for name, code in zip(HUES[::2], HUES[1::2], strict=True)}
CROSS = [0.33, 0.67, 0.67, 1, 1, 0.67, 0.67, 0.33, 0.33, 0, 0, 0.33]  # its corners' x; their y, three corners later
OUTLINES = {  # corners, in units of the box
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
    """A shape, or a text: then `shape` is "word" or "number", and `cell` an index of ROWS instead of CELLS."""

    colour: str
    shape: str
    size: str  # small or large; of a text ""
    cell: int
    box: tuple[float, float, float, float]  # left, top, right, bottom in units of the picture's side, as seen
    text: str = ""


@dataclass(frozen=True)
class Scene:
    """What a picture shows: shapes in reading order, and one text at most, in a row and a colour of its own."""

    shapes: tuple[Thing, ...]
    texts: tuple[Thing, ...] = ()
    where: str = "clean"  # or "cluttered", or "new pairs": clean, with a held-out pair
    background: tuple[int, int, int] = (242, 242, 242)
    seed: int = 0  # of its clutter and of its options' order

    @property
    def key(self) -> tuple[Thing, ...]:
        """Equal for pictures of the same things, which may differ in jitter, background and clutter."""
        return tuple(replace(thing, box=None) for thing in self.shapes + self.texts)


def is_new(*things: Thing) -> bool:
    return any((thing.colour, thing.shape) in HELD_OUT for thing in things)


# ---- 2. Random scenes ----

WORDS = "ant bed box bus cat cow cup dog egg fan fox hat ice jam key map owl pen pig sea sky sun tea zoo".split()
SIDES = {"small": (0.26, 0.29), "large": (0.4, 0.44)}
JITTER = 0.025  # things lie that near to the middle of their cell or row: to find them anywhere takes a tiny CLIP too long
BACKGROUNDS = [(242, 242, 242), (226, 222, 214), (214, 220, 228), (232, 238, 226), (228, 222, 236)]
WHERE = {"train": ("clean", "cluttered"), "test": ("clean", "cluttered", "new pairs")}


def random_shape(colour: str, shape: str, cell: int, rng: random.Random) -> Thing:
    size = rng.choice(list(SIDES))
    side = rng.uniform(*SIDES[size])
    x, y = ((i + 0.5) / 2 - side / 2 + rng.uniform(-JITTER, JITTER) for i in (cell % 2, cell // 2))
    return Thing(colour, shape, size, cell, (x, y, x + side, y + side))


def random_text(colour: str, row: int, rng: random.Random) -> Thing:
    """Half of the texts are words; numbers have one or two digits equally often."""
    word = rng.choice(WORDS) if rng.random() < 0.5 else str(rng.randrange(*rng.choice([(0, 10), (10, 100)])))
    *_, width, height = ink(word)
    x, y = (1 - width) / 2 + rng.uniform(-JITTER, JITTER), (row + 0.5) / 2 - height / 2 + rng.uniform(-JITTER, JITTER)
    return Thing(colour, "number" if word.isdigit() else "word", "", row, (x, y, x + width, y + height), word)


def some_of(words: Collection[str], num: int, rng: random.Random) -> list[str]:
    """So many: half of the time all different, else of one to three, so that things share some."""
    words = rng.sample(list(words), len(words))
    return words[:num] if rng.random() < 0.5 else rng.choices(words[: rng.randint(1, 3)], k=num)


def random_looks(num: int, colours: Collection[str], new: bool, rng: random.Random) -> list[tuple[str, str]]:
    """Colour and shape of so many things; with a held-out pair among them if `new`, else without."""
    looks = []
    while len(looks) < num or any(look in HELD_OUT for look in looks) != (new and num > 0):
        looks = list(zip(*(some_of(words, num, rng) for words in (colours, OUTLINES)), strict=True))
    return looks


def random_scenes(num: int, split: str, seed: int, taken: frozenset = frozenset()) -> list[Scene]:
    """The conditions of the split take turns. No scene has a key of `taken`; within a split, a key may come twice."""
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

SCALE = 3  # drawn that much larger and then reduced: smooth edges
EM = 0.36  # the font's size in units of the picture's side: digits are 0.27 high
FONT = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf"
font = lru_cache(partial(ImageFont.truetype, FONT, layout_engine=ImageFont.Layout.BASIC))  # by its size in pixels


@lru_cache(maxsize=2048)
def ink(word: str) -> tuple[float, float, float, float]:
    """Where the written word's ink begins, seen from where its pen does, and its width and height, as in a box."""
    x, y, *_ = font(100).getbbox(word)  # left of the ink by the letter's bearing
    left, top, right, bottom = font(100).getmask(word).getbbox()
    return tuple(EM / 100 * length for length in (x + left, y + top, right - left, bottom - top))


def draw_clutter(pen: ImageDraw.ImageDraw, scene: Scene, side: int) -> None:
    """Blobs and lines in greys near the background: seen, but no colour of a thing."""
    rng = random.Random(scene.seed)
    for draw in [pen.ellipse] * 4 + [partial(pen.line, width=max(1, side // 64))] * 5:
        shift = rng.choice([-1, 1]) * rng.randint(10, 26)
        fill = tuple(min(max(channel + shift + rng.randint(-6, 6), 0), 255) for channel in scene.background)
        x, y, u, v = (rng.uniform(-0.1, 1.1) * side for _ in range(4))
        draw((min(x, u), min(y, v), max(x, u), max(y, v)), fill=fill)


def draw_scene(scene: Scene, size: int = 64) -> torch.Tensor:
    """The picture, uint8 of shape (3, size, size). Clutter lies behind the things, its noise on everything."""
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
# Each function gives all that can be asked of its kind about a scene, but for the words that say how to answer.

BOX = 32  # boxes are asked for as integers from 0 to BOX
LETTERS = "abc"  # of a choice's options


class Ask(NamedTuple):
    question: str
    answer: str
    about: tuple[Thing, ...]
    accept: tuple[str, ...] = ()


# so places are asked for: with a quarter of the names shorter, one try did not learn them in 600 steps
WHOLE = "size colour shape"


def named(scene: Scene, *ways: str) -> list[tuple[Thing, str]]:
    """The shapes, each by the first way that fits no other: "the cross" before "the small cross". Some have none."""
    called = {}
    for thing, way in product(scene.shapes, ways):
        words, *others = [[getattr(some, word) for word in way.split()] for some in (thing, *scene.shapes)]
        if others.count(words) == 1:
            called.setdefault(thing, " ".join(["the", *words] if "shape" in way else ["the", *words, "object"]))
    return list(called.items())


def caption(scene: Scene) -> str:
    """The one sentence for this scene. Shapes come by colour and name, not by place: so one has to look where each is."""
    shapes = sorted(scene.shapes, key=lambda thing: ([*COLOURS].index(thing.colour), [*OUTLINES].index(thing.shape)))
    parts = [f"a {thing.size} {thing.colour} {thing.shape} at the {CELLS[thing.cell]}" for thing in shapes]
    parts += [f"the {text.shape} {text.text} in {text.colour} at the {ROWS[text.cell]}" for text in scene.texts]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts) + "."


def ask_attribute(scene: Scene, part: str) -> list[Ask]:
    """The colour, shape or size of a thing that the other attributes single out; or the text's colour."""
    ways = {"colour": ("shape", "size shape"), "shape": ("colour", "size colour"), "size": ("shape", "colour shape")}
    found = named(scene, *ways[part]) + [(text, f"the {text.shape}") for text in scene.texts if part == "colour"]
    return [Ask(f"what {part} is {it}?", getattr(thing, part), (thing,)) for thing, it in found]


def ask_choice(scene: Scene, part: str) -> Iterator[Ask]:
    """Three colours or shapes to choose from, those in the picture first in line. None makes a held-out pair in training."""
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
    """All shapes (if there are none only half the time, or 0 were a good guess), those of a colour, and those of a kind."""
    groups = {"shapes": scene.shapes} if scene.shapes or scene.seed % 2 else {}
    for word in [*COLOURS, *OUTLINES] if scene.shapes else []:
        if all(text.colour != word for text in scene.texts):  # a text is no shape
            plural = f"{word} shapes" if word in COLOURS else f"{word}es" if word == "cross" else f"{word}s"
            groups[plural] = tuple(thing for thing in scene.shapes if word in (thing.colour, thing.shape))
    return [Ask(f"how many {plural} are there?", str(len(things)), things) for plural, things in groups.items()]


def ask_yes_no(scene: Scene) -> list[Ask]:
    """After a colour, a shape, or a colour and a shape. Of each, as many to say no to as yes, but one at least: first the
    hard ones, where colour and shape are both there, apart."""
    written, rng, asks = {text.colour for text in scene.texts}, random.Random(f"no {scene.seed}"), []
    for colours, kinds in (([""], OUTLINES), (set(COLOURS) - written, [""]), (COLOURS, OUTLINES)):  # a text is no shape
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
    """The way along the longer displacement; the other way is accepted where the cells differ in it too."""
    for (one, it), (other, origin) in permutations(named(scene, WHOLE), 2):
        x, y = (one.box[i] + one.box[i + 2] - other.box[i] - other.box[i + 2] for i in (0, 1))
        ways = [(abs(x), "left" if x < 0 else "right"), (abs(y), "above" if y < 0 else "below")]
        (_, answer), (_, second) = sorted(ways, reverse=True)
        diagonal = one.cell % 2 != other.cell % 2 and one.cell // 2 != other.cell // 2
        yield Ask(f"where is {it} from {origin}?", answer, (one, other), (second,) if diagonal else ())


def ask_place(scene: Scene, part: str) -> Iterator[Ask]:
    """The name of a shape's cell; or the box of a shape or of the text, as in "4 0 13 9"."""
    for thing, it in named(scene, WHOLE) + [(text, f"the {text.shape}") for text in scene.texts if part == "box"]:
        answer = CELLS[thing.cell] if part == "cell" else " ".join(str(round(BOX * edge)) for edge in thing.box)
        yield Ask(f"where is {it}?", answer, (thing,))


# ---- 5. Instructions ----

ASKED = {  # kind: {part: (what can be asked, how to answer)}
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
NUM_ASKED = {"vqa": 6, "region": 4}  # of a picture, if there are that many different questions; of the other kinds 1
OFTEN = {"cell": 3}  # times as often as the kind's other parts in the training: learnt last, and relations need it
BARE = 0.3  # of the one-word questions of the training do not say how to answer, for people do not either


def instruct(scene: Scene, image: int, split: str, rng: random.Random, used: Counter) -> Iterator[Instruction]:
    """NUM_ASKED of each kind that fits: of its parts the least used so far, and of that the least used answer. So both come
    about equally often, but for OFTEN; and questions about a held-out pair go first. `used` counts by condition, and is
    updated."""
    often = OFTEN if split == "train" else {}
    for kind, parts in ASKED.items():
        asks = [
            ((scene.where, kind, part), not is_new(*ask.about), ask)
            for part, (find, _) in parts.items()
            for ask in find(scene)
        ]
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
    """The splits train and test, of that many pictures, with no scene in common. Test does not depend on num_train."""
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
