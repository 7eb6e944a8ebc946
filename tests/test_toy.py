"""The toy's pairs mean what their labels say and give nothing away; its tokenizer and BERT are usable as ordinary ones."""

import random
import re

import pytest
import torch
from transformers import AutoTokenizer

from lab import toy

COLUMNS = ("sentence1", "sentence2")


@pytest.fixture(scope="module")
def pairs():
    return toy.make_pairs(COLUMNS, num_train=3000, num_dev=400, seed=0)


def rows(split) -> list[tuple]:
    return list(zip(split["sentence1"], split["sentence2"], split["label"], strict=True))


def test_same_seed_same_pairs(pairs):
    again, other = (toy.make_pairs(COLUMNS, num_train=3000, num_dev=400, seed=seed) for seed in (0, 1))
    for split in ("train", "validation"):
        assert rows(pairs[split]) == rows(again[split]) != rows(other[split])


def test_columns_and_label_names_are_rtes(pairs):
    assert list(pairs) == ["train", "validation"]
    assert pairs["train"].column_names == ["sentence1", "sentence2", "label", "idx"]
    assert pairs["train"].features["label"].names == ["entailment", "not_entailment"]
    assert pairs["validation"]["idx"] == list(range(400))
    assert toy.make_pairs(("question", "sentence"), 24, 12)["train"].column_names[:2] == ["question", "sentence"]


def test_half_of_each_split_is_entailed_and_no_pair_comes_twice(pairs):
    for split in pairs.values():
        assert sum(split["label"]) * 2 == len(split)
    everything = [row[:2] for split in pairs.values() for row in rows(split)]
    assert len(set(everything)) == len(everything) == 3400


def test_more_pairs_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="ask for fewer"):
        toy.make_pairs(COLUMNS, num_train=100_000)


def entailed(premise: str, hypothesis: str) -> bool:
    """The answer read off the two sentences, word by word, by other means than those that made them."""
    first, second = (sentence.rstrip(".").split() for sentence in (premise, hypothesis))
    if "least" in second:
        words = "zero one two three four five six seven eight nine ten".split()
        return first[3] == second[5] and words.index(first[2]) >= words.index(second[4])
    if "by" in second:  # the b was chased by the a
        return first[:5] == ["the", second[6], second[3], "the", second[1]]
    if second[0] == "the":  # the car was red
        return f"{second[3]} {second[1]}" in premise
    if second[1] == "was":
        return first[0] == second[0] and any({first[2], second[2]} == set(pair) for pair in toy.SYNONYMS)
    if second[1:3] == ["saw", "a"]:
        return first[0] == second[0] and first[3] in toy.KINDS_OF[second[3]]
    return premise.startswith(hypothesis.rstrip("."))


def test_every_label_is_right(pairs):
    for split in pairs.values():
        for premise, hypothesis, label in rows(split):
            assert entailed(premise, hypothesis) == (label == 0), (premise, hypothesis, label)


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("kind", toy.KINDS, ids=lambda kind: kind.__name__)
def test_each_kind_shows_both_answers_and_its_own_docstring(kind, answer):
    rng = random.Random(0)
    made = [kind(rng, answer) for _ in range(200)]
    assert len(set(made)) > 50
    assert all(entailed(*pair) == answer for pair in made), kind.__name__
    premise, hypothesis = re.search(r"^(.+?)\. => (.+?)\.", kind.__doc__).groups()
    assert entailed(*((s[0].lower() + s[1:]) if s.split()[0] in ("The", "There") else s for s in (premise, hypothesis)))


@pytest.mark.parametrize("kind", toy.KINDS, ids=lambda kind: kind.__name__)
def test_the_hypothesis_alone_gives_nothing_away(kind):
    """Each hypothesis is as frequent for one label as for the other: no reader of it alone can beat chance."""
    share = []
    for answer in (True, False):
        rng = random.Random(1)
        words = [word for _ in range(3000) for word in kind(rng, answer)[1].split()]
        share.append({word: words.count(word) / 3000 for word in set(words)})
    assert share[0].keys() == share[1].keys()
    for word in share[0]:
        assert abs(share[0][word] - share[1][word]) < 0.06, word  # 4.6 standard deviations at a share of one half


def test_tokenizer_saves_and_loads(tmp_path, pairs):
    tokenizer = toy.make_tokenizer([s for row in rows(pairs["train"]) for s in row[:2]])
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for split in pairs.values():
        batch = tokenizer(split["sentence1"][:], split["sentence2"][:])
        assert dict(batch) == dict(again(split["sentence1"][:], split["sentence2"][:]))
        assert tokenizer.unk_token_id not in {i for ids in batch["input_ids"] for i in ids}
    batch = again("Anna was ill at home.", "Anna was sick.")
    assert again.decode(batch["input_ids"]) == "[CLS] anna was ill at home . [SEP] anna was sick . [SEP]"
    assert batch["token_type_ids"] == [0] * 8 + [1] * 5
    assert again("zyx")["input_ids"][1] == again.unk_token_id


def test_pretraining_lowers_the_loss_repeats_itself_and_is_loadable(tmp_path, monkeypatch):
    losses = []

    class Recorded(toy.BertForMaskedLM):
        def forward(self, **batch):
            output = super().forward(**batch)
            losses.append(output.loss.item())
            return output

    monkeypatch.setattr(toy, "BertForMaskedLM", Recorded)
    pairs = toy.make_pairs(COLUMNS, num_train=600, num_dev=60)
    state = torch.get_rng_state()
    model, tokenizer = toy.pretrain(pairs, COLUMNS, steps=25)
    assert torch.equal(state, torch.get_rng_state())
    first = losses.copy()
    losses.clear()
    again, _ = toy.pretrain(pairs, COLUMNS, steps=25)
    assert losses == first and sum(first[-3:]) < 0.8 * sum(first[:3])
    for one, two in zip(model.bert.encoder.parameters(), again.bert.encoder.parameters(), strict=True):
        assert torch.equal(one, two)

    model.save_pretrained(tmp_path)
    batch = tokenizer(["Anna was ill at home."], ["Anna was sick."], return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        torch.testing.assert_close(type(model).from_pretrained(tmp_path).eval()(**batch).logits, expected, rtol=0, atol=0)


def test_a_new_head_leaves_the_encoder_as_it_is():
    model, _ = toy.pretrain(toy.make_pairs(COLUMNS, num_train=60, num_dev=24), COLUMNS, steps=1)
    new = toy.with_new_head(model)
    assert torch.equal(new.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)
    assert not torch.equal(new.classifier.weight, model.classifier.weight)
    assert new.classifier.weight is not model.classifier.weight
