"""Generated sentence pairs and a tiny BERT, for `glue_moefy.py --toy`: the whole experiment without a download.

The pairs have the columns of RTE and need several kinds of inference, so that a Mixture-of-Experts has mixed work. They are
not GLUE: every result on them is named "toy-rte".
"""

import copy
import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import count, islice

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm.auto import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

# ---- 1. Sentence pairs ----

NAMES = "Anna Ben Carla David Emma Frank Grace Henry".split()
PLACES = ["at home", "in the garden", "in the park", "near the river", "at the market", "on the farm"]
COLOURS = "red blue green yellow black white".split()
THINGS = "car house boat door chair table".split()
KINDS_OF = {
    "dog": "poodle collie beagle husky".split(),
    "bird": "robin hawk crow sparrow".split(),
    "fish": "trout salmon carp shark".split(),
}
SYNONYMS = [("rich", "wealthy"), ("happy", "glad"), ("tired", "weary"), ("clever", "smart"), ("ill", "sick")]
DEEDS = {"bought": "buy", "sold": "sell", "painted": "paint", "cleaned": "clean", "saw": "see"}
ANIMALS = "dog cat horse goat hen pig".split()
MOVES = "chased followed watched pushed".split()
NUMBERS = dict(enumerate("two three four five six seven eight nine ten".split(), start=2))


def colour(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """Anna saw a red car in the park. => The car was red."""
    asked, other = rng.sample(COLOURS, 2)
    name, thing, seen = rng.choice(NAMES), rng.choice(THINGS), asked if entailed else other
    return f"{name} saw a {seen} {thing} {rng.choice(PLACES)}", f"the {thing} was {asked}"


def hypernym(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """Ben saw a poodle at home. => Ben saw a dog."""
    asked, other = rng.sample(sorted(KINDS_OF), 2)
    name, seen = rng.choice(NAMES), rng.choice(KINDS_OF[asked if entailed else other])
    return f"{name} saw a {seen} {rng.choice(PLACES)}", f"{name} saw a {asked}"


def synonym(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """Carla was tired at home. => Carla was weary."""
    asked, other = (rng.sample(pair, 2) for pair in rng.sample(SYNONYMS, 2))
    name = rng.choice(NAMES)
    return f"{name} was {asked[1] if entailed else other[1]} {rng.choice(PLACES)}", f"{name} was {asked[0]}"


def negation(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """David did not sell the boat at home. => David did not sell the boat."""
    done, name, thing = rng.random() < 0.5, rng.choice(NAMES), rng.choice(THINGS)
    deed = rng.choice(sorted(DEEDS))
    say = {True: f"{name} {deed} the {thing}", False: f"{name} did not {DEEDS[deed]} the {thing}"}
    return f"{say[done == entailed]} {rng.choice(PLACES)}", say[done]


def roles(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """The dog chased the cat on the farm. => The cat was chased by the dog."""
    (a, b), move = rng.sample(ANIMALS, 2), rng.choice(MOVES)
    one, two = (a, b) if entailed else (b, a)
    return f"the {one} {move} the {two} {rng.choice(PLACES)}", f"the {b} was {move} by the {a}"


def counting(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """There were seven cats in the garden. => There were at least six cats. (The bound is too high in half of the cases.)"""
    bound, animal = rng.choice([5, 6, 7, 8]), rng.choice(ANIMALS)
    seen = bound + (rng.choice([0, 1, 2]) if entailed else rng.choice([-3, -2, -1]))
    return f"there were {NUMBERS[seen]} {animal}s {rng.choice(PLACES)}", f"there were at least {NUMBERS[bound]} {animal}s"


def order(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """Anna came before Ben and Carla came after Ben. => Anna came before Carla. (Two steps, the hardest kind.)"""
    first, middle, last = rng.sample(NAMES, 3)
    given = [(first, middle), (middle, last)]
    asked = (first, last) if entailed else (last, first)
    rng.shuffle(given)
    say = [rng.choice([f"{one} came before {two}", f"{two} came after {one}"]) for one, two in (*given, asked)]
    return f"{say[0]} and {say[1]}", say[2]


KINDS = [colour, hypernym, synonym, negation, roles, counting, order]
LABELS = ["entailment", "not_entailment"]
PATIENCE = 1000  # after so many repeated pairs in a row a kind counts as exhausted


def sentence_pairs(seed: int) -> Iterator[tuple[str, str, bool]]:
    """Yields (premise, hypothesis, entailed) without end: labels alternate, kinds take turns, pairs repeat."""
    rng = random.Random(seed)
    for turn in count():
        entailed = turn % 2 == 0
        premise, hypothesis = KINDS[turn // 2 % len(KINDS)](rng, entailed)
        yield f"{premise}.", f"{hypothesis}.", entailed


def make_pairs(columns: tuple[str, str], num_train: int = 3000, num_dev: int = 400, seed: int = 0) -> DatasetDict:
    """Splits train and validation with RTE's columns and labels, shuffled, half of each entailed. No pair occurs twice.

    The hypothesis is drawn in the same way for both labels, so it says nothing about the label by itself.
    """
    rng, seen, splits = random.Random(seed), set(), {}
    strings = {name: Value("string") for name in columns}
    features = Features({**strings, "label": ClassLabel(names=LABELS), "idx": Value("int32")})
    for split, size in (("train", num_train), ("validation", num_dev)):
        rows = []
        for turn in range(size):
            kind, entailed = KINDS[turn // 2 % len(KINDS)], turn % 2 == 0
            new = next((pair for pair in (kind(rng, entailed) for _ in range(PATIENCE)) if pair not in seen), None)
            if new is None:
                raise ValueError(f"{kind.__name__}: too few different pairs for {num_train} + {num_dev}, ask for fewer")
            seen.add(new)
            rows.append((*(f"{sentence}." for sentence in new), entailed))
        rng.shuffle(rows)
        first, second, entailed = zip(*rows, strict=True)
        content = {columns[0]: first, columns[1]: second, "label": [int(not e) for e in entailed], "idx": range(size)}
        splits[split] = Dataset.from_dict({name: list(values) for name, values in content.items()}, features)
    return DatasetDict(splits)


# ---- 2. A tiny BERT ----


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token per word of the texts, in BERT's format [CLS] a [SEP] b [SEP] with its token types."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for text in texts for word in text.lower().replace(".", " .").split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    frame = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"}
    tokenizer.post_processor = processors.TemplateProcessing(**frame, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def make_bert(tokenizer) -> BertForTokenClassification:
    """A tiny, untrained BERT that classifies tokens into two classes. Its query weights start equal to its key weights, so
    that equal words attend to each other from the first step. Drawn independently, they learn this after hundreds of steps,
    or never."""
    size = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 256}
    tokens = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": tokenizer.pad_token_id}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForTokenClassification(BertConfig(**size, **tokens, **dropout, initializer_range=0.1))
    for layer in model.bert.encoder.layer:
        layer.attention.self.query.load_state_dict(layer.attention.self.key.state_dict())
    return model


def replace_words(batch: dict, other: dict) -> dict:
    """Replaces half of the second sentence's tokens by those at the same place in `other`. Labels: 1 for a changed token, 0
    for an unchanged one, -100 (no loss) in the first sentence."""
    ids, judged = batch["input_ids"], batch["token_type_ids"] == 1
    mixed = torch.where(judged & (torch.rand(ids.shape) < 0.5), other["input_ids"], ids)
    return {**batch, "input_ids": mixed, "labels": (mixed != ids).long().masked_fill(~judged, -100)}


STEPS = 500  # of the pretraining


def pretrain(splits: DatasetDict, columns: tuple[str, str], steps: int = STEPS, seed: int = 0):
    """Pretrains a tiny BERT briefly with replaced-token detection, ELECTRA's objective. The texts are generated pairs whose
    second sentence follows from the first; none is in `splits`. Replacements come from pairs with the same two lengths.
    Returns the classifier, whose head is not trained yet, and the tokenizer."""
    own = {pair for split in splits.values() for pair in zip(split[columns[0]], split[columns[1]], strict=True)}
    tokenizer = make_tokenizer([sentence for pair in own for sentence in pair])
    stream = ((a, b) for a, b, entailed in sentence_pairs(seed + 1) if entailed and (a, b) not in own)
    texts, alike, rng = [tokenizer(*pair) for pair in islice(stream, 2000)], defaultdict(list), random.Random(seed)
    for text in texts:
        alike[tuple(text["token_type_ids"])].append(text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_bert(tokenizer)
        classifier = BertForSequenceClassification(model.config)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.98), fused=True)
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        for _ in tqdm(range(steps), desc="pretrain the tiny BERT", dynamic_ncols=True, disable=None):
            rows = rng.choices(texts, k=32)
            others = [rng.choice(alike[tuple(row["token_type_ids"])]) for row in rows]
            batch, other = (tokenizer.pad(some, return_tensors="pt") for some in (rows, others))
            model(**replace_words(batch, other)).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    classifier.bert.load_state_dict(model.bert.state_dict(), strict=False)  # the detector has no pooler
    return classifier, tokenizer


def with_new_head(pretrained: BertForSequenceClassification) -> BertForSequenceClassification:
    """A copy with a new pooler and classifier from torch's generator, like the new head of a downloaded model."""
    model = copy.deepcopy(pretrained)
    model.config.problem_type = "single_label_classification"  # as the first forward sets it
    for linear in (model.bert.pooler.dense, model.classifier):
        torch.nn.init.normal_(linear.weight, std=model.config.initializer_range)
        torch.nn.init.zeros_(linear.bias)
    return model
