"""Sentence pairs and a tiny pretrained BERT, both made on the spot: what `--toy` needs so that nothing is downloaded.

Each pair asks RTE's question: does sentence1 (the premise) entail sentence2 (the hypothesis)? There are eight kinds of
inference (KINDS), so that experts have different work. The hypothesis is drawn first, the same way for both labels, and
only the premise depends on the label: who reads the hypothesis alone is left with guessing.

    pairs = make_pairs(num_train=2000, num_dev=400, seed=0)     # a DatasetDict with the columns of RTE
    model, tokenizer = tiny_bert(pairs, seed=0)                 # a BertForSequenceClassification with a pretrained encoder
"""

import itertools
import random
import sys
from collections.abc import Iterator, Sequence

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
)

LABEL_NAMES = ["entailment", "not_entailment"]  # RTE's, in RTE's order

# ---- 1. Words ----

NAMES = "Anna Ben Carla David Emma Felix".split()
PLACES = ["in the garden", "in the park", "in the village", "in the forest"]
DEEDS = ["baked a cake", "fixed the roof", "read a book", "sold a car", "wrote a letter", "won a prize"]
ANIMALS = "dog cat horse fox goat hen".split()
ANIMAL_VERBS = "chased followed watched kicked".split()
HYPONYMS = {
    "dog": "poodle terrier beagle husky".split(),
    "bird": "sparrow robin hawk crow".split(),
    "fish": "trout salmon carp shark".split(),
    "flower": "rose tulip daisy lily".split(),
    "tool": "hammer saw drill wrench".split(),
    "vehicle": "truck bus van tractor".split(),
}
SYNONYMS = [  # two words for a quality, two for its opposite
    (("rich", "wealthy"), ("poor", "needy")),
    (("clever", "smart"), ("foolish", "silly")),
    (("brave", "bold"), ("timid", "fearful")),
    (("happy", "cheerful"), ("sad", "gloomy")),
    (("big", "large"), ("small", "little")),
    (("kind", "gentle"), ("cruel", "harsh")),
]
JOBS = "farmer teacher nurse baker".split()
VERBS = {"washed": "wash", "opened": "open", "moved": "move", "repaired": "repair", "used": "use"}  # past: infinitive
THINGS = "car house box door hat boat".split()
COLOURS = "red blue green white black".split()
NUMBERS = dict(enumerate("two three four five six seven eight nine ten".split(), start=2))
BOUNDS = {
    "at least": lambda n, bound: n >= bound,
    "more than": lambda n, bound: n > bound,
    "at most": lambda n, bound: n <= bound,
    "fewer than": lambda n, bound: n < bound,
}
COMPARISONS = ["older", "taller", "faster", "richer"]

# ---- 2. Kinds of inference: (a random.Random, the label) -> (premise, hypothesis) ----


def one_of_two_clauses(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """Ben sold a car while Anna read a book. => Anna read a book."""
    (a, b), (x, y, z) = rng.sample(NAMES, 2), rng.sample(DEEDS, 3)
    clauses = [f"{a} {x}", f"{b} {y}"] if entailed else [f"{a} {y}", f"{b} {rng.choice([x, z])}"]
    rng.shuffle(clauses)
    return rng.choice([" and ", " while "]).join(clauses), f"{a} {x}"


def who_did_it(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """The cat was chased by the dog in the park. => The dog chased the cat."""
    (a, b, c), verb = rng.sample(ANIMALS, 3), rng.choice(ANIMAL_VERBS)
    doer, other = (a, b) if entailed else rng.choice([(b, a), (b, a), (a, c), (c, b)])
    premise = rng.choice([f"The {doer} {verb} the {other}", f"The {other} was {verb} by the {doer}"])
    hypothesis = rng.choice([f"The {a} {verb} the {b}", f"The {b} was {verb} by the {a}"])
    return f"{premise} {rng.choice(PLACES)}", hypothesis


def what_kind(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """Anna saw a poodle in the park. => Anna saw a dog. (A dog need not be a poodle, nor is a trout a dog.)"""
    group, other = rng.sample(sorted(HYPONYMS), 2)
    special, sibling = rng.sample(HYPONYMS[group], 2)
    if rng.random() < 0.5:
        word, seen = group, rng.choice([group, special]) if entailed else rng.choice(HYPONYMS[other])
    else:
        word, seen = special, special if entailed else rng.choice([group, sibling])
    name, verb = rng.choice(NAMES), rng.choice(["saw", "drew", "found"])
    return f"{name} {verb} a {seen} {rng.choice(PLACES)}", f"{name} {verb} a {word}"


def same_meaning(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """Anna met a wealthy farmer in the village. => Anna met a rich farmer."""
    words, opposites = rng.sample(rng.choice(SYNONYMS), 2)
    (a, b), verb, job = rng.sample(NAMES, 2), rng.choice(["met", "visited", "thanked"]), rng.choice(JOBS)
    name, seen = (a, rng.choice(words)) if entailed else rng.choice([(a, rng.choice(opposites)), (b, rng.choice(words))])
    return f"{name} {verb} a {seen} {job} {rng.choice(PLACES)}", f"{a} {verb} a {rng.choice(words)} {job}"


def negation(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """Anna washed the car but did not wash the door. => Anna did not wash the door."""
    name, past, (thing, other, third), done = rng.choice(NAMES), rng.choice(sorted(VERBS)), rng.sample(THINGS, 3), rng.random() < 0.5
    say = {True: f"{past} the", False: f"did not {VERBS[past]} the"}
    hypothesis = f"{name} {say[done]} {thing}"
    if not entailed:
        if rng.random() < 0.5: thing = third
        else: done = not done
    facts = [f"{say[done]} {thing}", f"{say[not done]} {other}"]
    rng.shuffle(facts)
    return f"{name} {facts[0]} but {facts[1]}", hypothesis


def how_many(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """There were five cats in the garden. => There were at least three cats."""
    animals, words, bound = rng.sample("dogs cats horses goats hens wolves bears rabbits".split(),2), rng.choice(sorted(BOUNDS)), rng.randint(4, 8)
    same = entailed or rng.random() < 0.5
    number = rng.choice([n for n in NUMBERS if BOUNDS[words](n, bound) == (entailed or not same)])
    return f"There were {NUMBERS[number]} {animals[not same]} {rng.choice(PLACES)}", f"There were {words} {NUMBERS[bound]} {animals[0]}"


def which_colour(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """The blue house stood behind the red car. => The car was red."""
    (thing, other), (colour, another, third) = rng.sample(THINGS, 2), rng.sample(COLOURS, 3)
    seen = [f"{colour} {thing}", f"{another} {other}"] if entailed else [f"{another} {thing}", f"{rng.choice([colour, third])} {other}"]
    rng.shuffle(seen)
    return f"The {seen[0]} was {rng.choice(['behind', 'near'])} the {seen[1]}", f"The {thing} was {colour}"


def what_order(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """Anna is older than Ben and Ben is older than Carla. => Anna is older than Carla."""
    (a, middle, b, c), more = rng.sample(NAMES, 4), rng.choice(COMPARISONS)
    first, last = (a, b) if entailed else rng.choice([(b, a), (b, a), (a, c), (c, b)])
    steps = [f"{first} is {more} than {middle}", f"{middle} is {more} than {last}"]
    rng.shuffle(steps)
    return " and ".join(steps), f"{a} is {more} than {b}"


KINDS = [one_of_two_clauses, who_did_it, what_kind, same_meaning, negation, how_many, which_colour, what_order]

# ---- 3. Data sets ----


def sentence_pairs(seed: int, entailed_only: bool = False) -> Iterator[tuple[str, str, bool]]:
    """Endless (premise, hypothesis, entailed): the kinds in turn, the labels alternating within each. Pairs may repeat."""
    rng = random.Random(seed)
    for count in itertools.count():
        entailed = entailed_only or count // len(KINDS) % 2 == 0
        premise, hypothesis = KINDS[count % len(KINDS)](rng, entailed)
        yield f"{premise}.", f"{hypothesis}.", entailed


def make_pairs(task_columns: Sequence[str] = ("sentence1", "sentence2"), num_train: int = 2000, num_dev: int = 400, seed: int = 0) -> DatasetDict:
    """Splits train and validation with RTE's columns; no pair occurs twice, whichever the split. Deterministic under `seed`."""
    columns = {name: Value("string") for name in task_columns}
    features = Features({**columns, "label": ClassLabel(names=LABEL_NAMES), "idx": Value("int32")})
    stream, rng, splits, seen = sentence_pairs(seed), random.Random(seed), {}, set()
    for split, size in (("train", num_train), ("validation", num_dev)):
        rows = []
        for i in range(size):
            slot = [i % len(KINDS), i // len(KINDS) % 2 == 0]
            rows.append(None)
            for _ in range(1000):
                pair = KINDS[slot[0]](rng, slot[1])
                if pair not in seen: break
            else: raise ValueError
            seen.add(pair); rows[-1] = (pair[0]+".", pair[1]+".", slot[1])
        rng.shuffle(rows)
        premises, hypotheses, entailed = zip(*rows)
        table = dict(zip(task_columns, (premises, hypotheses)), label=[int(not e) for e in entailed], idx=range(size))
        splits[split] = Dataset.from_dict(table, features=features)
    return DatasetDict(splits)


def make_texts(num: int, seed: int, exclude: set) -> list[tuple[str, str]]:
    """Unlabelled text to pretrain on: two sentences that are true together, none of them a pair in `exclude`."""
    stream = ((a, b) for a, b, _ in sentence_pairs(seed, entailed_only=True) if (a, b) not in exclude)
    return [next(stream) for _ in range(num)]
