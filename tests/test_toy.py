"""The generated pairs must be right and fair, or what --toy shows means nothing."""

import random
from itertools import islice

import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer

from lab import toy

COLUMNS = ("sentence1", "sentence2")


def follows(kind: str, premise: str, hypothesis: str) -> bool:
    """Whether it is entailed, worked out from the sentences alone."""
    a, b = (sentence.rstrip(".").split() for sentence in (premise, hypothesis))
    if kind == "colour":
        return b[-1] in a
    if kind == "hypernym":
        return toy.KINDS_OF[a[3]] == b[-1]
    if kind == "synonym":
        return toy.SYNONYMS[a[2]] == b[-1]
    if kind == "negation":
        return ("not" in a) == ("not" in b)
    if kind == "roles":
        return (a[1], a[4]) == (b[6], b[1])
    return toy.NUMBERS.index(a[2]) >= toy.NUMBERS.index(b[4])


@pytest.mark.parametrize("kind", toy.KINDS)
def test_labels_are_right(kind):
    rng = random.Random(0)
    for i in range(200):
        premise, hypothesis = (f"{sentence}." for sentence in kind(rng, i % 2 == 0))
        assert follows(kind.__name__, premise, hypothesis) == (i % 2 == 0), (premise, hypothesis)


def test_pairs_are_deterministic_balanced_and_apart():
    splits, again, other = (toy.make_pairs(COLUMNS, 600, 200, seed) for seed in (0, 0, 1))
    assert splits["train"][:] == again["train"][:] != other["train"][:]
    assert splits["train"].features["label"].names == ["entailment", "not_entailment"]
    pairs = {split: set(zip(rows["sentence1"], rows["sentence2"], strict=True)) for split, rows in splits.items()}
    assert not pairs["train"] & pairs["validation"] and len(pairs["train"]) == 600
    for rows in splits.values():
        assert abs(sum(rows["label"]) / len(rows) - 0.5) < 0.06


def test_the_hypothesis_alone_gives_nothing_away():
    """A bag of its words must not tell the label: chance, within what 800 dev rows can show."""
    splits = toy.make_pairs(COLUMNS, 2400, 800)
    words = CountVectorizer().fit(splits["train"]["sentence2"])
    model = LogisticRegression(max_iter=500).fit(words.transform(splits["train"]["sentence2"]), splits["train"]["label"])
    score = model.score(words.transform(splits["validation"]["sentence2"]), splits["validation"]["label"])
    assert score < 0.62, score


def test_tokenizer_saves_and_loads(tmp_path):
    tokenizer = toy.make_tokenizer(["Anna saw a red car.", "The car was red."])
    encoded = tokenizer("Anna saw a red car.", "The car was blue.")
    assert tokenizer.decode(encoded["input_ids"]) == "[CLS] anna saw a red car . [SEP] the car was [UNK] . [SEP]"
    assert encoded["token_type_ids"] == [0] * 8 + [1] * 6
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("the red car.")["input_ids"] == tokenizer("the red car.")["input_ids"]


def test_pretraining_reaches_the_classifier_and_disturbs_no_seed():
    splits = toy.make_pairs(COLUMNS, 60, 20)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, tokenizer = toy.pretrain(splits, COLUMNS, steps=2)
    second, _ = toy.pretrain(splits, COLUMNS, steps=2)
    longer, _ = toy.pretrain(splits, COLUMNS, steps=4)
    assert torch.equal(before, torch.get_rng_state())
    name = "bert.encoder.layer.3.output.dense.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], longer.state_dict()[name])
    assert set(islice(tokenizer.get_vocab(), 5)) and first.config.vocab_size == len(tokenizer)
    torch.manual_seed(0)
    one, two = toy.with_new_head(first), toy.with_new_head(first)
    assert not torch.equal(one.classifier.weight, two.classifier.weight)
    assert torch.equal(one.bert.encoder.layer[0].output.dense.weight, two.bert.encoder.layer[0].output.dense.weight)
