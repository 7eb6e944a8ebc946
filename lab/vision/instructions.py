"""Instructions on pictures, the training data of `toy_lvlm.py`, as tokens and batches; and which answers are right.

Shapes: N pictures, B batch, L tokens, S the picture's side in pixels.

  1 Instructions  2 Tokens  3 Batches  4 Right and wrong
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import RandomSampler
from transformers import PreTrainedTokenizerFast

IMAGE = "<image>"  # stands for the picture in a question
KINDS = ("caption", "vqa", "choice", "ocr", "region")

# ---- 1. Instructions ----


Turns = tuple[tuple[str, str | None], ...]  # of a conversation: (question, answer); one question contains `<image>`


@dataclass(frozen=True)
class Instruction:
    """One conversation, about one picture or without a picture."""

    turns: Turns
    image: int | None  # row of images_N3SS
    kind: str  # one of KINDS
    part: str = ""  # the subject within the kind: colour, count, box, ...
    where: str = ""  # test condition: clean, cluttered, new pairs, ...
    accept: tuple[str, ...] = ()  # further right answers to the last question
    place: str = field(default="", repr=False, compare=False)  # in the user's file


class InstructionSet(NamedTuple):
    images_N3SS: Tensor  # uint8
    instructions: list[Instruction]


# ---- 2. Tokens ----

USER, ASSISTANT = "USER:", "ASSISTANT:"
PAD, EOS = "<pad>", "<eos>"
IGNORED = -100  # a label that has no loss


VOCABULARY = 1024  # tokens of a small model


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts: any text can be encoded, a frequent word is one token, so is a
    digit."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r" ?\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), [PAD, EOS, IMAGE, USER, ASSISTANT]
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, **options))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def unknown_words(tokenizer, text: str) -> list[str]:
    """The words of a text that a tokenizer of `make_tokenizer` has to spell. A large one spells words that its model knows,
    too: then only those with an unknown token count."""
    small, unknown = len(tokenizer) <= VOCABULARY, tokenizer.unk_token_id

    def is_known(word: str) -> bool:
        spelled = [tokenizer(start + word, add_special_tokens=False)["input_ids"] for start in ("", " ")]
        return min(map(len, spelled)) == 1 if small else unknown is None or unknown not in spelled[1]

    return [word for word in dict.fromkeys(re.findall(r"[^\W\d_]+", text)) if not is_known(word)]


def tokenize(texts: Sequence[Sequence[str]], tokenizer) -> list[list[int]]:
    """Each text, given in parts, as tokens. A part that is a format word is its one token. In all other parts the
    tokenizer's special words, such as <eos>, are plain text."""
    special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ours = {IMAGE, USER, ASSISTANT} & set(special.values())
    whole, plain = (partial(tokenizer, add_special_tokens=False, split_special_tokens=split) for split in (False, True))
    found = whole(["".join(parts) for parts in texts])["input_ids"] if texts else []
    for row, parts in enumerate(texts):
        if [special[id] for id in found[row] if id in special] != [part for part in parts if part in ours]:
            pieces = [(plain, whole)[own]("".join(group)) for own, group in groupby(parts, key=ours.__contains__)]
            found[row] = [id for piece in pieces for id in piece["input_ids"]]
    return found


class Encoded(NamedTuple):
    """One conversation as tokens. All lists have the same length."""

    input_ids: list[int]
    labels: list[int]  # the token itself in an answer and its <eos>, IGNORED elsewhere
    asked: list[bool]  # True for the question's tokens, without the picture's


def encode(conversations: Sequence[Turns], tokenizer, image_tokens: int) -> list[Encoded]:
    """`USER: question ASSISTANT: answer <eos>` for each turn, with `<image>` repeated image_tokens times. If the last answer
    is None, the tokens end before it: it is for the model to generate."""
    image_id, end = tokenizer.convert_tokens_to_ids(IMAGE), [tokenizer.eos_token_id]
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id in tokenizer("")["input_ids"] else []
    turns = [turn for conversation in conversations for turn in conversation]
    texts = []
    for question, answer in turns:
        before, image, after = question.partition(IMAGE)
        texts.append(((USER, f" {before}", image, f"{after} ", ASSISTANT), (f" {answer}" if answer is not None else "",)))
    different = list(dict.fromkeys(text for pair in texts for text in pair))  # far fewer than all, if generated
    tokens_of = dict(zip(different, tokenize(different, tokenizer), strict=True))
    encoded, pairs = [], iter(texts)
    for conversation in conversations:
        ids, labels, asked = list(start), [IGNORED] * len(start), [False] * len(start)
        for _, answer in conversation:
            question, reply = (tokens_of[text] for text in next(pairs))
            for token in question:
                times = image_tokens if token == image_id else 1
                ids += [token] * times
                labels += [IGNORED] * times
                asked += [token != image_id] * times
            reply = reply + (end if answer is not None else [])
            ids += reply
            labels += reply
            asked += [False] * len(reply)
        encoded.append(Encoded(ids, labels, asked))
    return encoded


# ---- 3. Batches ----


class Pixels(NamedTuple):
    """The size and normalisation of the pictures that a vision tower expects."""

    size: int  # side in pixels
    mean: tuple[float, float, float]  # of the channels, in [0, 1]
    std: tuple[float, float, float]

    def values(self, images_B3SS: Tensor) -> Tensor:
        """uint8 pictures as normalised floats of the same shape."""
        mean_311, std_311 = (torch.tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return (images_B3SS / 255 - mean_311) / std_311


class Pack(NamedTuple):
    """Conversations with the same tokens up to the last one of their picture. This prefix is stored once."""

    rows: list[int]  # indices of the instructions
    prefix: Encoded
    rests: list[Encoded]


def make_packs(data: InstructionSet, encoded: Sequence[Encoded], image_id: int, max_length: int, share=True) -> list[Pack]:
    """Packs of conversations about the same picture, with at most max_length tokens each, ordered by their first
    conversation. A longer conversation is a pack of its own; without `share`, each is. Conversations in a pack are masked
    from each other, so their logits equal those of single conversations.

    DIFFERS: a picture's token is judged once per pack, with the sum of its gradients over the pack's conversations. The
    paper judges it once per conversation.
    """
    packs, opened = [], {}
    for row, (instruction, one) in enumerate(zip(data.instructions, encoded, strict=True)):
        ids = one.input_ids
        cut = len(ids) - ids[::-1].index(image_id) if image_id in ids else 0
        prefix, rest = (Encoded(*(part[a:b] for part in one)) for a, b in ((0, cut), (cut, None)))
        key = (instruction.image, tuple(prefix.input_ids))
        pack = opened.get(key) if share and cut else None
        if pack is None or cut + sum(len(own.input_ids) for own in (*pack.rests, rest)) > max_length:
            pack = opened[key] = Pack([], prefix, [])
            packs.append(pack)
        pack.rows.append(row)
        pack.rests.append(rest)
    return packs


class Collate:
    """Makes a batch for LlavaForConditionalGeneration from packs. Pads on the right, or on the left for `prompts`, which
    must be packs of one conversation.

    In addition to the model's arguments a batch has `keep`, which marks real tokens, `asked`, which marks the questions'
    tokens, and `rows`, the first instruction of each pack. The script removes these three.
    """

    def __init__(self, data: InstructionSet, packs: list[Pack], pixels: Pixels, pad_id: int, prompts: bool = False):
        self.data, self.packs, self.pixels, self.pad_id, self.prompts = data, packs, pixels, pad_id, prompts

    def __len__(self) -> int:
        return len(self.packs)

    def __call__(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        packs = [self.packs[index] for index in chosen]
        parts = [[pack.prefix, *pack.rests] for pack in packs]
        length = max(sum(len(part.input_ids) for part in row) for row in parts)

        def padded(rows: list[list], fill) -> Tensor:
            rows = [list(chain.from_iterable(row)) for row in rows]
            fills = ([fill] * (length - len(row)) for row in rows)
            return torch.tensor([rest + row if self.prompts else row + rest for row, rest in zip(rows, fills)])

        batch = {
            "input_ids": padded([[part.input_ids for part in row] for row in parts], self.pad_id),
            "asked": padded([[part.asked for part in row] for row in parts], False),
            "rows": torch.tensor([pack.rows[0] for pack in packs]),
        }
        # 0: the prefix, which all later tokens of the row attend to; 1, 2, ...: the conversations; -1: padding
        group_BL = padded([[[i] * len(part.input_ids) for i, part in enumerate(row)] for row in parts], -1)
        batch["keep"] = group_BL >= 0
        if self.prompts:
            batch["attention_mask"] = batch["keep"].long()
        else:
            batch["labels"] = padded([[part.labels for part in row] for row in parts], IGNORED)
            starts = [[0, *[len(row[0].input_ids)] * (len(row) - 1)] for row in parts]
            positions = [[range(s, s + len(part.input_ids)) for s, part in zip(own, row)] for own, row in zip(starts, parts)]
            batch["position_ids"] = padded(positions, 0)
            query_BL1, key_B1L = group_BL.unsqueeze(2), group_BL.unsqueeze(1)
            sees_BLL = ((query_BL1 == key_B1L) | (key_B1L == 0)) & torch.ones(length, length, dtype=torch.bool).tril()
            sees_BLL &= key_B1L >= 0
            sees_BLL[:, :, 0] |= group_BL < 0  # padding attends to one token, since a softmax over none is NaN
            batch["attention_mask"] = sees_BLL.unsqueeze(1)
        pictures = [self.data.instructions[pack.rows[0]].image for pack in packs]
        shown = torch.tensor([picture for picture in pictures if picture is not None], dtype=torch.long)
        if len(shown):
            batch["pixel_values"] = self.pixels.values(self.data.images_N3SS[shown])
        return batch


class Unpacked:
    """Batches with the same conversations as a Collate of packs, but not packed: for routers that route whole samples."""

    def __init__(self, packs: Collate, singles: Collate):
        self.packs, self.singles = packs, singles  # singles: a Collate of all conversations, in order

    def __len__(self) -> int:
        return len(self.packs)

    def __call__(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        return self.singles([row for index in chosen for row in self.packs.packs[index].rows])


def shuffled(size: int, count: int, seed: int) -> RandomSampler:
    """`count` indices below `size`: one random permutation after another, determined by the seed."""
    return RandomSampler(range(size), num_samples=count, generator=torch.Generator().manual_seed(seed))


# ---- 4. Right and wrong ----

OVERLAP = 0.5  # a box is right from this intersection over union on


def is_right(instruction: Instruction, answer: str) -> bool:
    """Exact match, up to case, spaces and a final full stop, with the answer or with another accepted one (a relation can
    have two right answers). A box of kind region is also right if its intersection over union with the answer, or with
    another accepted one, is at least 0.5."""
    right = (instruction.turns[-1][1], *instruction.accept)
    boxed = instruction.kind == "region" and max(overlap(answer, text) for text in right) >= OVERLAP
    return boxed or plain(answer) in map(plain, right)


def plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".")


def read_box(text: str) -> tuple[float, float, float, float] | None:
    """The box of a text "x1 y1 x2 y2" or "[x1, y1, x2, y2]"; None if it is not one."""
    try:
        a, b, c, d = map(float, re.sub(r"[\[\](),]", " ", text.strip().removesuffix(".")).split())
    except ValueError:
        return None
    return (a, b, c, d) if a < c and b < d else None


def overlap(one: str, other: str) -> float:
    """Intersection over union of two boxes, see `read_box`. 0 if a text is not a box."""
    boxes = read_box(one), read_box(other)
    if None in boxes:
        return 0.0
    (a, b, c, d), (e, f, g, h) = boxes
    shared = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    return shared / ((c - a) * (d - b) + (g - e) * (h - f) - shared)


def score(instructions: Sequence[Instruction], right: Sequence[bool]) -> dict[str, float]:
    """Share of right answers: `score` over all, and by kind, by part, by condition, by kind and condition; in [0, 1]."""
    groups: dict[str, list[bool]] = {"score": list(right)}
    for one, good in zip(instructions, right, strict=True):
        names = {one.kind, one.where, f"{one.kind} {one.part}", f"{one.kind}, {one.where}"}
        for name in names - {"", f"{one.kind} ", f"{one.kind}, "}:
            groups.setdefault(name, []).append(good)
    return {name: sum(group) / len(group) for name, group in sorted(groups.items(), key=lambda item: item[0] != "score")}


def majority(train: Sequence[Instruction], test: Sequence[Instruction]) -> list[str]:
    """Answers of a blind baseline: the most frequent training answer to the same question or, for a new question, to all
    questions of its kind and part."""
    counts: dict[tuple, Counter] = {}
    for one in train:
        question, answer = one.turns[-1]
        for key in ((one.kind, one.part, question), (one.kind, one.part)):
            counts.setdefault(key, Counter())[answer] += 1
    best = {key: min(count, key=lambda answer: (-count[answer], answer)) for key, count in counts.items()}
    return [best.get((one.kind, one.part, one.turns[-1][0]), best.get((one.kind, one.part), "")) for one in test]
