"""Pictures and conversations of the user, in LLaVA's format, for `toy_lvlm.py`. Nothing is left out or changed silently.

The file is a JSON list, or JSON lines, of entries: {"image": "dogs/7.png", "conversations": [{"from": "human", "value":
"<image>\\nwhat is it?"}, {"from": "gpt", "value": "a dog"}]}. Without "image" an entry is text only. `<image>` stands for
the picture in the first question. Optional: "id", "kind" (one of KINDS), "accept" (further right answers to the last
question). Spaces around a text are removed. Other keys are not read, and the run reports them; null stands for no key.

CHOICE: without "kind" an entry is "vqa" if its last answer is one word, otherwise "caption".
CHOICE: a question without `<image>` gets it in front, where LLaVA puts it, and the run reports it. LLaVA would train without
the picture there.
DIFFERS: LLaVA makes one `<image>` of several and moves it to the front of its turn. Here several are an error, and one stays
in its place.

Shapes: N pictures, S a picture's side in pixels.   1 Problems  2 Entries  3 Pictures  4 Loading
"""

import json
import os
import warnings
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PureWindowsPath

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from lab.run.cli import UserError, printable
from lab.run.reading import name_repeated
from lab.vision.instructions import IMAGE, KINDS, Instruction, InstructionSet

NAMED = 3  # entries that a message names for each kind of problem
CLIP_MEAN = (122, 116, 104)  # image_mean of openai/clip-vit-large-patch14-336 x 255, as LLaVA pads
MEMORY_SHARE = 0.8  # of the free memory, for the pictures; the rest is for the model
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not EPS: for it, Pillow runs Ghostscript

# ---- 1. Problems ----


class BadEntry(Exception):
    """An entry that cannot be used. The message reads "kind of problem: detail"."""


class Problems:
    """Collects problems of entries as ("train.json entry 17", "kind of problem: detail"), for all files and all steps."""

    def __init__(self, max_bad: int):
        self.max_bad, self.total = max_bad, 0  # total: entries of all files; each reader adds to it
        self.left_out: list[tuple[str, str]] = []  # in the order found
        self.changed: list[tuple[str, str]] = []  # used in a changed form; not counted as bad
        self.shared = 0  # pictures of --eval-data that are also in --data, under any name

    def add(self, where: str, what: str) -> None:
        """Leaves an entry out. UserError if there are now more than `max_bad`."""
        self.left_out.append((where, what))
        if len(self.left_out) > self.max_bad:
            raise UserError(f"--max-bad {self.max_bad}: {by_kind(self.left_out)}; fix or remove these, or allow more")

    def summary(self) -> str:
        """One line, or "" if every entry is used unchanged."""
        changed = len(list(groupby(self.changed, key=itemgetter(0))))  # an entry may be changed in two ways
        lists = ((len(self.left_out), self.left_out, "left out"), (changed, self.changed, "changed"))
        lines = [f"{count} of {self.total} entries {how}: {by_kind(own)}" for count, own, how in lists if own]
        if self.shared:
            lines.append(f"{self.shared} pictures of --eval-data are in --data too: the model may know their answers")
        return ". ".join(lines)


def by_kind(problems: list[tuple[str, str]]) -> str:
    """2 x picture not found (train.json entry 3: 'a.png'; dev.json line 8: 'b.png'); 1 x blank text (...). Names NAMED
    entries of each kind."""
    groups: dict[str, list[str]] = {}
    for where, what in problems:
        kind, _, detail = what.partition(": ")
        groups.setdefault(kind, []).append(f"{where}: {detail}" if detail else where)
    return "; ".join(f"{len(own)} x {kind} ({'; '.join(own[:NAMED])})" for kind, own in groups.items())


# ---- 2. Entries ----

ENTRY_KEYS, TURN_KEYS = {"image", "conversations", "id", "kind", "accept"}, {"from", "value"}


parse_json = partial(json.loads, object_pairs_hook=name_repeated)


def read_entries(path: Path, flag: str) -> list[tuple[str, object]]:
    """The unchecked entries, each with its place before it: "train.json entry 17 (id 'a7')", counted from 1. UserError."""
    where, entries = "", []
    try:
        text = path.read_text(encoding="utf-8-sig")
        if is_list := text.lstrip().startswith("["):
            entries = list(enumerate(parse_json(text), start=1))
        else:
            for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also split at a U+2028
                where = f"line {number}: "
                entries += [(number, parse_json(line))] if line.strip() else []
    except (OSError, ValueError, RecursionError) as error:  # wrong UTF-8 and wrong JSON are ValueErrors
        raise UserError(f"{flag} {path} is neither a JSON list nor JSON lines ({where}{error}): give one") from None
    if not entries:
        raise UserError(f"{flag} {path} has no entries: give at least one")
    ids = [f" (id {entry['id']!r:.40})" if isinstance(entry, dict) and "id" in entry else "" for _, entry in entries]
    return [(f"{path} {'entry' if is_list else 'line'} {number}{own}", entry) for (number, entry), own in zip(entries, ids)]


def check_entry(entry: object, folder: Path | None) -> tuple[Path | None, Instruction, list[str]]:
    """The picture's file, the instruction (with `image` None), and what is changed: "kind: detail". BadEntry."""
    if not isinstance(entry, dict):
        raise BadEntry(f"not an object: a {type(entry).__name__}")
    entry = {"accept": []} | {key: value for key, value in entry.items() if value is not None}
    for key, form in (("conversations", list), ("accept", list), ("image", str)):
        if not isinstance(entry.get(key, ""), form):
            raise BadEntry(f"{key} of the wrong type: {entry.get(key)!r:.60} instead of a {form.__name__}")
    turns, picture = entry["conversations"], entry.get("image")
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if repeated := [own[None] for own in (entry, *turns) if isinstance(own, dict) and None in own]:
        raise BadEntry(f"key given twice: {repeated[0]!r:.60}")
    if speakers != ["human", "gpt"] * max(1, len(turns) // 2):
        raise BadEntry(f"turns out of order: {speakers!r:.60} instead of human, gpt, human, gpt and so on")
    texts = [check_text(turn.get("value"), f"turn {number}") for number, turn in enumerate(turns, start=1)]
    accept = tuple(check_text(text, f"accept {number}") for number, text in enumerate(entry["accept"], start=1))
    if any(IMAGE in text for text in (*texts[1:], *accept)):
        raise BadEntry(f"{IMAGE} outside the first question: it may only be there")
    if (markers := texts[0].count(IMAGE)) > (picture is not None):
        raise BadEntry(f"{IMAGE} without a picture" if picture is None else f"several {IMAGE}: {markers}, for one picture")
    kind = entry.get("kind", "caption" if len(texts[-1].split()) > 1 else "vqa")
    if kind not in KINDS:
        raise BadEntry(f"unknown kind: {kind!r:.40} instead of {', '.join(KINDS)}")
    unread = [f"{key!r:.60}" for key in entry if key not in ENTRY_KEYS]
    for number, turn in enumerate(turns, start=1):
        unread += [f"{key!r:.60} of turn {number}" for key in turn if key not in TURN_KEYS and turn[key] is not None]
    changed = [f"keys that are not read: {', '.join(unread[:NAMED])}{' ...' * (len(unread) > NAMED)}"] if unread else []
    if picture is not None and not markers:
        texts[0] = f"{IMAGE}\n{texts[0]}"
        changed.append(f"no {IMAGE}, so it was put before the first question")
    instruction = Instruction(tuple(zip(texts[::2], texts[1::2])), None, kind, accept=accept)
    return None if picture is None else find_picture(picture, folder), instruction, changed


def check_text(text: object, which: str) -> str:
    """The text, stripped. BadEntry."""
    if not isinstance(text, str):
        raise BadEntry(f"text of the wrong type: {which} is a {type(text).__name__}")
    if not text.strip() or text.encode(errors="ignore").decode() != text:  # half a surrogate pair: no tokenizer accepts it
        raise BadEntry(f"{'broken Unicode' if text.strip() else 'blank text'}: {which}")
    return text.strip()


def find_picture(picture: str, folder: Path | None) -> Path:
    """The file in the folder. Links may lead out of the folder, which the user made; paths in the data may not. BadEntry."""
    if folder is None:
        raise UserError("--image-dir is missing: give the folder that the pictures' paths are relative to")
    path = PureWindowsPath(picture)  # understands / and \, roots and drives on any system
    if path.drive or path.root or ".." in path.parts:
        raise BadEntry(f"path outside --image-dir: {picture!r:.80}")
    if not os.path.isfile(folder / picture):  # also False for a text that cannot be a path
        why = ", as URLs are not fetched" * ("://" in picture) + ", write / instead of its \\" * ("\\" in picture)
        raise BadEntry(f"picture not found: '{printable(picture):.80}'{why}")
    return folder / picture


# ---- 3. Pictures ----


def read_picture(file: Path, size: int) -> Tensor:
    """uint8 (3, S, S): the whole picture, upright, transparency on white, centred on a square of CLIP's mean colour.
    DIFFERS: LLaVA pads and then scales. Scaling first avoids a huge square for a very long picture. BadEntry."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow's own limit on pixels
            with Image.open(file, formats=FORMATS) as opened:
                depth = opened.tile[0][3] if opened.format == "PNG" and "transparency" in opened.info else None
                image = ImageOps.exif_transpose(opened)  # decodes the whole file: a truncated one fails here
            clear = transparent_pixels(image, depth, file)
        if image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM")):
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))  # convert() would clip at 255
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
        if image.mode in ("I", "F"):  # 32 bits
            raise ValueError(f"mode {image.mode} does not define white, save it as RGB")
        if max(image.size) >= 2 * size * min(image.size):  # pad() would scale it to nothing
            raise ValueError("it is so thin that scaling leaves nothing")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        square = ImageOps.pad(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC, CLIP_MEAN)
    except FileNotFoundError:
        raise BadEntry(f"picture not found: {str(file)!r}") from None
    except Exception as error:  # decoders raise almost anything on damaged files
        raise BadEntry(f"picture cannot be read as {', '.join(FORMATS)}: {str(file)!r}, {error!r:.120}") from None
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def transparent_pixels(image: Image.Image, depth: object, file: Path) -> np.ndarray | None:
    """Where a PNG has its transparent colour. Pillow compares 8-bit values, but the colour has the file's depth, as `depth`
    names it: this compares in that depth. None if Pillow does it right."""
    if depth not in ("L;2", "L;4", "I;16B", "RGB;16B"):
        return None
    values, colour = np.asarray(image).astype(int), image.info.pop("transparency")
    if depth.startswith("L"):
        return values == colour * 255 // (2 ** int(depth[2]) - 1)
    if depth == "I;16B":
        return values == colour
    with Image.open(file, formats=FORMATS) as again:  # Pillow keeps the high bytes: read the low ones
        again.tile = [(*tile[:3], "RGB;16L") for tile in again.tile]
        values = 256 * values + np.asarray(ImageOps.exif_transpose(again))
    return (values == np.array(colour)).all(2)


# ---- 4. Loading ----


def load_llava(path, image_dir, size: int, problems: Problems, flag: str = "--data") -> InstructionSet:
    """The good entries in the file's order, each picture once. The others go to `problems`. `image_dir` None: no
    pictures."""
    path, folder = Path(path), None if image_dir is None else Path(image_dir)
    entries, earlier, checked = read_entries(path, flag), len(problems.left_out), []
    problems.total += len(entries)
    for where, entry in entries:
        try:
            checked.append((where, *check_entry(entry, folder)))
        except BadEntry as fault:
            problems.add(where, str(fault))
    count = len({file for _, file, *_ in checked if file})
    if count > (fit := int(MEMORY_SHARE * psutil.virtual_memory().available / (3 * size * size))):
        raise UserError(f"{flag} {path}: {fit} of its {count} pictures of {size} x {size} fit in memory; give fewer")
    images_N3SS = torch.empty(count, 3, size, size, dtype=torch.uint8)
    rows, instructions = {}, []
    for where, file, instruction, changed in tqdm(checked, f"read {printable(path.name)}", dynamic_ncols=True, disable=None):
        try:
            if file and file not in rows:
                images_N3SS[len(rows)] = read_picture(file, size)
                rows[file] = len(rows)
        except BadEntry as fault:
            problems.add(where, str(fault))
        else:
            instructions.append(replace(instruction, image=rows.get(file), place=where))
            problems.changed += [(where, what) for what in changed]
    if not instructions:
        raise UserError(f"{flag} {path} has no entry that can be used: {by_kind(problems.left_out[earlier:])}; fix them")
    return InstructionSet(images_N3SS[: len(rows)], instructions)
