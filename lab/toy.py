"""Generated sentence pairs and a tiny BERT, for `glue_moefy.py --toy`: the whole path with nothing downloaded.

The pairs have the columns of RTE and several kinds of inference, so that a Mixture-of-Experts has mixed work. They are not
GLUE, and what is measured on them is named "toy-rte" everywhere.
"""

import copy
import random
from collections.abc import Iterator
from itertools import islice

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm.auto import tqdm
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

# ---- 1. Sentence pairs ----

NAMES = "Anna Ben Carla David Emma Frank Grace Henry".split()
PLACES = ["at home", "in the garden", "in the park", "near the river", "at the market", "on the farm"]
COLOURS = "red blue green yellow black white".split()
THINGS = "car house boat door chair table".split()
KINDS_OF = {"poodle": "dog", "collie": "dog", "robin": "bird", "owl": "bird", "trout": "fish", "salmon": "fish"}
SYNONYMS = {"rich": "wealthy", "happy": "glad", "tired": "weary", "clever": "smart", "angry": "furious"}
DEEDS = {"bought": "buy", "sold": "sell", "painted": "paint", "cleaned": "clean", "saw": "see"}
ANIMALS = "dog cat horse goat".split()
NUMBERS = "two three four five six seven".split()


def colour(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """Anna saw a red car in the park. => The car was red."""
    seen, other = rng.sample(COLOURS, 2)
    thing = rng.choice(THINGS)
    return f"{rng.choice(NAMES)} saw a {seen} {thing} {rng.choice(PLACES)}", f"the {thing} was {seen if entailed else other}"


def hypernym(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """Ben saw a poodle at home. => Ben saw a dog."""
    special = rng.choice(sorted(KINDS_OF))
    wrong = sorted(set(KINDS_OF.values()) - {KINDS_OF[special]})
    name = rng.choice(NAMES)
    return (
        f"{name} saw a {special} {rng.choice(PLACES)}",
        f"{name} saw a {KINDS_OF[special] if entailed else rng.choice(wrong)}",
    )


def synonym(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """Carla was tired at home. => Carla was weary."""
    word, other = rng.sample(sorted(SYNONYMS), 2)
    name = rng.choice(NAMES)
    return f"{name} was {word} {rng.choice(PLACES)}", f"{name} was {SYNONYMS[word if entailed else other]}"


def negation(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """David did not sell the boat. => David did not sell the boat; but not: David sold the boat."""
    done, name, thing = rng.random() < 0.5, rng.choice(NAMES), rng.choice(THINGS)
    deed = rng.choice(sorted(DEEDS))
    say = {True: f"{name} {deed} the {thing}", False: f"{name} did not {DEEDS[deed]} the {thing}"}
    return f"{say[done == entailed]} {rng.choice(PLACES)}", say[done]


def roles(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """The dog chased the cat. => The cat was chased by the dog."""
    a, b = rng.sample(ANIMALS, 2)
    one, two = (a, b) if entailed else (b, a)
    return f"the {a} chased the {b} {rng.choice(PLACES)}", f"the {two} was chased by the {one}"


def counting(rng: random.Random, entailed: bool) -> tuple[str, str]:
    """There were five cats in the garden. => There were at least three cats."""
    low, high = sorted(rng.sample(range(len(NUMBERS)), 2))
    seen, bound = (high, low) if entailed else (low, high)
    animal = rng.choice(ANIMALS)
    return f"there were {NUMBERS[seen]} {animal}s {rng.choice(PLACES)}", f"there were at least {NUMBERS[bound]} {animal}s"


KINDS = [colour, hypernym, synonym, negation, roles, counting]
LABELS = ["entailment", "not_entailment"]


def sentence_pairs(seed: int) -> Iterator[tuple[str, str, bool]]:
    """Endless (premise, hypothesis, entailed), the kinds in turn, both labels of a kind alternating; no pair comes twice."""
    rng, seen, made = random.Random(seed), set(), 0
    while True:
        kind, entailed = KINDS[made % len(KINDS)], made // len(KINDS) % 2 == 0
        pair = tuple(f"{sentence}." for sentence in kind(rng, entailed))
        if pair not in seen or rng.random() < 0.01:  # a kind may be exhausted: then its turn is left out
            made += 1
        if pair not in seen:
            seen.add(pair)
            yield *pair, entailed


def make_pairs(columns: tuple[str, str], num_train: int = 3000, num_dev: int = 400, seed: int = 0) -> DatasetDict:
    """Splits train and validation with the columns and labels of RTE, shuffled; no pair is in both."""
    rows = list(islice(sentence_pairs(seed), num_train + num_dev))
    random.Random(seed).shuffle(rows)
    strings = {name: Value("string") for name in columns}
    features = Features({**strings, "label": ClassLabel(names=LABELS), "idx": Value("int32")})
    splits = {}
    for split, part in (("train", rows[:num_train]), ("validation", rows[num_train:])):
        first, second, entailed = zip(*part, strict=True)
        content = {columns[0]: first, columns[1]: second, "label": [int(not e) for e in entailed], "idx": range(len(part))}
        splits[split] = Dataset.from_dict({name: list(values) for name, values in content.items()}, features)
    return DatasetDict(splits)


# ---- 2. A tiny BERT ----


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token per word of the texts, and BERT's [CLS] a [SEP] b [SEP] with its token types."""
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


def pretrain(splits: DatasetDict, columns: tuple[str, str], steps: int = 400, seed: int = 0):
    """A tiny BERT after a brief masked language modelling of generated pairs in which the second sentence follows from the
    first, none of them in `splits`. Returns the classifier, its head not yet trained, and the tokenizer."""
    own = {pair for split in splits.values() for pair in zip(split[columns[0]], split[columns[1]], strict=True)}
    tokenizer = make_tokenizer([sentence for pair in own for sentence in pair])
    stream = ((a, b) for a, b, entailed in sentence_pairs(seed + 1) if entailed and (a, b) not in own)
    texts = [tokenizer(*pair) for pair in islice(stream, 2000)]
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        language, classifier = BertForMaskedLM(config), BertForSequenceClassification(config)
        collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.2)
        optimizer = torch.optim.AdamW(language.parameters(), 1e-3, fused=True)
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        for _ in tqdm(range(steps), desc="pretrain the tiny BERT", dynamic_ncols=True, disable=None):
            batch = collate([texts[i] for i in torch.randint(len(texts), (32,)).tolist()])
            language(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    classifier.bert.load_state_dict(language.bert.state_dict(), strict=False)  # the language model has no pooler
    return classifier, tokenizer


def with_new_head(pretrained: BertForSequenceClassification) -> BertForSequenceClassification:
    """A copy whose pooler and classifier are drawn anew from torch's generator, as a head on a downloaded model is."""
    model = copy.deepcopy(pretrained)
    for linear in (model.bert.pooler.dense, model.classifier):
        torch.nn.init.normal_(linear.weight, std=model.config.initializer_range)
        torch.nn.init.zeros_(linear.bias)
    return model
