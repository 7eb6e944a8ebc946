"""The toy's pairs mean what their labels say and give nothing away; its tokenizer and BERT are usable as ordinary ones."""

import random
import re

import pytest
import torch
from transformers import AutoTokenizer

from lab.text import toy

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
    if "came" in second:  # a came before c; one by one, the earlier to the left
        told = [(c[0], c[3]) if c[2] == "before" else (c[3], c[0]) for c in (first[:4], first[5:], second)]
        (a, b), (c, d), asked = told
        return asked == ((a, d) if b == c else (c, b))
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


@pytest.fixture
def losses(monkeypatch):
    """Filled with the loss of each step of pretraining."""
    filled = []

    class Recorded(toy.BertForTokenClassification):
        def forward(self, **batch):
            output = super().forward(**batch)
            filled.append(output.loss.item())
            return output

    monkeypatch.setattr(toy, "BertForTokenClassification", Recorded)
    return filled


def test_replaced_words_are_labelled_and_the_first_sentence_stays():
    tokenizer = toy.make_tokenizer(["anna was ill at home.", "ben was rich.", "anna was sick.", "ben was wealthy."])
    texts = [("Anna was ill.", "Anna was sick."), ("Ben was rich at home.", "Ben was wealthy.")]
    batch = tokenizer([a for a, _ in texts] * 200, [b for _, b in texts] * 200, padding=True, return_tensors="pt")
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    second = batch["token_type_ids"] == 1
    new = {
        tokenizer.convert_tokens_to_ids(x): tokenizer.convert_tokens_to_ids(y) for x, y in (("anna", "ben"), ("sick", "ill"))
    }
    for old, word in new.items():
        other["input_ids"][batch["input_ids"] == old] = word  # "was" and "." stay: their replacement is no change
    kept = batch["input_ids"].clone()
    made = toy.replace_words(batch, other)
    assert torch.equal(batch["input_ids"], kept) and torch.equal(made["attention_mask"], batch["attention_mask"])
    assert torch.equal(made["input_ids"][~second], kept[~second]) and (made["labels"][~second] == -100).all()
    assert torch.equal(made["labels"][second], (made["input_ids"] != kept)[second].long())
    for old, word in new.items():
        found = made["input_ids"][second & (kept == old)]
        assert set(found.tolist()) == {old, word} and 60 < (found == word).sum() < 140  # of 200, half expected


@pytest.mark.slow
def test_pretraining_finds_words_that_do_not_fit_the_first_sentence(pairs, losses):
    """Who does not compare the sentences stays above 0.25, knowing only which places change how often."""
    toy.pretrain(pairs, COLUMNS, steps=200, seed=1)
    assert sum(losses[-20:]) / 20 < 0.2


def test_pretraining_repeats_itself_and_its_model_is_loadable(tmp_path, losses):
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
