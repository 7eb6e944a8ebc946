"""lab/vision/instructions.py: conversations as tokens, packs that share a picture, batches, and when an answer is right."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from lab.vision.instructions import (
    IGNORED,
    IMAGE,
    Collate,
    Instruction,
    InstructionSet,
    Pixels,
    encode,
    is_right,
    majority,
    make_packs,
    make_tokenizer,
    overlap,
    score,
    shuffled,
    unknown_words,
)

TEXTS = ["what colour is the circle?", " red", " blue", "where is it?", " 12 4 20 7", "a large red circle."]
TOKENS = 4  # of a picture


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEXTS * 3)


def ask(question: str, answer: str | None, image=0, kind="vqa", **more) -> Instruction:
    return Instruction(((question, answer),), image, kind, **more)


def make_set() -> InstructionSet:
    """Two pictures with three and one conversations, one of two turns with its mark behind, one without a picture."""
    torch.manual_seed(0)
    first = f"{IMAGE}\nwhat colour is the circle?"
    instructions = [
        ask(first, "red"),
        ask(f"{IMAGE}\nwhere is it?", "12 4 20 7", kind="region", part="box"),
        ask(first, "blue", image=1),
        Instruction(((f"where is it?\n{IMAGE}", "a large red circle."), (first.split("\n")[1], "red")), 0, "caption"),
        ask("what colour is the circle?", "blue", image=None),
    ]
    return InstructionSet(torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8), instructions)


def collate_all(data, tokenizer, share=True, prompts=False, max_length=200) -> Collate:
    turns = [(*one.turns[:-1], (one.turns[-1][0], None)) if prompts else one.turns for one in data.instructions]
    encoded = encode(turns, tokenizer, TOKENS)
    packs = make_packs(data, encoded, tokenizer.convert_tokens_to_ids(IMAGE), max_length, share and not prompts)
    return Collate(data, packs, Pixels(16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), tokenizer.pad_token_id, prompts)


@pytest.fixture
def model(tokenizer):
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    image = {"image_token_index": tokenizer.convert_tokens_to_ids(IMAGE), "image_seq_length": TOKENS}
    config = LlavaConfig(vision_config=vision, text_config=text, **image)
    return LlavaForConditionalGeneration(config).double().eval()


def test_tokens_give_back_any_text_and_keep_digits_apart(tokenizer):
    for text in ["what colour is the circle?", "Grüße, 漢字 🙂", "12 4 20 7"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.decode([i]) for i in tokenizer(" 12 4")["input_ids"]] == [" 1", "2", " 4"]
    assert len(tokenizer(" red")["input_ids"]) == 1


def test_only_answers_and_their_end_have_a_loss(tokenizer):
    turns = ((f"{IMAGE}\nwhere is it?", "red"), ("what colour is the circle?", "blue"))
    (one,), image_id = encode([turns], tokenizer, TOKENS), tokenizer.convert_tokens_to_ids(IMAGE)
    learnt = [token for token, label in zip(one.input_ids, one.labels) if label != IGNORED]
    assert tokenizer.decode(learnt) == " red<eos> blue<eos>"
    assert all(label in (token, IGNORED) for token, label in zip(one.input_ids, one.labels))
    assert one.input_ids.count(image_id) == TOKENS
    asked = tokenizer.decode([token for token, asked in zip(one.input_ids, one.asked) if asked])
    assert asked == "USER: \nwhere is it? ASSISTANT:USER: what colour is the circle? ASSISTANT:"
    (open_end,) = encode([(turns[0], ("what colour is the circle?", None))], tokenizer, 0)
    assert tokenizer.decode(open_end.input_ids).endswith("red<eos>USER: what colour is the circle? ASSISTANT:")


def test_packs_hold_each_conversation_once(tokenizer):
    data = make_set()
    packs = collate_all(data, tokenizer).packs
    assert [pack.rows for pack in packs] == [[0, 1], [2], [3], [4]]  # the fourth has its own prefix, the last no picture
    encoded = encode([one.turns for one in data.instructions], tokenizer, TOKENS)
    for pack in packs:
        for row, rest in zip(pack.rows, pack.rests, strict=True):
            assert pack.prefix.input_ids + rest.input_ids == encoded[row].input_ids
    both = sum(len(part.input_ids) for part in (packs[0].prefix, *packs[0].rests))
    assert [pack.rows for pack in collate_all(data, tokenizer, max_length=both).packs][0] == [0, 1]
    assert [pack.rows for pack in collate_all(data, tokenizer, max_length=both - 1).packs][:2] == [[0], [1]]
    assert [pack.rows for pack in collate_all(data, tokenizer, share=False).packs] == [[0], [1], [2], [3], [4]]


def run(model, batch: dict):
    batch = {key: value for key, value in batch.items() if key not in ("keep", "asked", "rows", "labels")}
    return model(**batch | {"pixel_values": batch["pixel_values"].double()}).logits


def test_a_pack_computes_what_single_conversations_compute(model, tokenizer):
    """The logits of a batch of packs are those of each conversation alone; those of a prompt, of one padded on the left."""
    data = make_set()
    packed, single = collate_all(data, tokenizer), collate_all(data, tokenizer, share=False)
    logits_BLV = run(model, packed(range(len(packed))))
    for i, pack in enumerate(packed.packs[:3]):
        start = len(pack.prefix.input_ids)
        for row, rest in zip(pack.rows, pack.rests):
            end = start + len(rest.input_ids)
            alone_LV = run(model, single([row]))[0]
            torch.testing.assert_close(logits_BLV[i, start:end], alone_LV[-len(rest.input_ids) :], rtol=1e-9, atol=1e-11)
            start = end
    prompts = collate_all(data, tokenizer, prompts=True)
    left_BLV = run(model, prompts([0, 3]))
    for i, row in enumerate([0, 3]):
        torch.testing.assert_close(left_BLV[i, -1], run(model, prompts([row]))[0, -1], rtol=1e-9, atol=1e-11)


def test_a_batch_fits_together(tokenizer):
    data = make_set()
    batch = collate_all(data, tokenizer)([1, 3, 0])
    assert batch["rows"].tolist() == [2, 4, 0] and batch["pixel_values"].shape == (2, 3, 16, 16)
    expected = (data.images_N3SS[1, 2, 5, 7].item() / 255 - 0.3) / 0.4
    assert batch["pixel_values"][0, 2, 5, 7].item() == pytest.approx(expected, rel=1e-5)
    assert (batch["input_ids"][~batch["keep"]] == tokenizer.pad_token_id).all()
    assert not (batch["asked"] & (batch["labels"] != IGNORED)).any() and not batch["asked"][~batch["keep"]].any()
    sees_BLL = batch["attention_mask"][:, 0]
    assert sees_BLL.any(2).all()  # no softmax over nothing
    assert torch.equal(sees_BLL.any(1), batch["keep"])  # what nobody sees is padding: so the MoE layers tell it
    assert not sees_BLL.triu(1).any()
    alone = collate_all(data, tokenizer)([3])
    assert "pixel_values" not in alone


def test_shuffled_is_whole_shufflings():
    drawn = list(shuffled(5, 13, seed=3))
    assert len(drawn) == len(shuffled(5, 13, 3)) == 13
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(5)) and drawn[:5] != drawn[5:10]
    assert drawn == list(shuffled(5, 13, 3)) != list(shuffled(5, 13, 4))


def test_right_and_wrong():
    word = ask("q", "left", part="relation", accept=("above",))
    good = ["left", " Left ", "left.", "above"]
    assert all(is_right(word, text) for text in good) and not any(is_right(word, text) for text in ["lef", "", "below"])
    box = ask("q", "0 0 10 10", kind="region", part="box")
    assert is_right(box, "0 0 10 6") and is_right(box, "0, 0, 10, 5") and not is_right(box, "0 0 10 4")
    assert not any(is_right(box, text) for text in ["", "0 0 10", "10 10 0 0", "a b c d", "0 0 10 10 10", "nan 0 1 1"])
    assert overlap("0 0 2 2", "1 1 3 3") == pytest.approx(1 / 7)
    assert not is_right(ask("q", "top left", kind="region", part="cell"), "left")


def test_scores_and_the_majority():
    train = [ask("q", a, part=p) for p, a in [("colour", "red"), ("colour", "red"), ("colour", "blue"), ("count", "2")]]
    test = [
        ask("q", "red", part="colour", where="clean"),
        ask("q", "blue", part="colour", where="cluttered"),
        ask("q", "x", kind="ocr"),
    ]
    assert majority(train, test) == ["red", "red", ""]
    asked = [ask("how many?", "1", part="count"), ask("how many red ones?", "0", part="count"), *train]
    assert majority(asked, [ask(q, "", part="count") for q in ("how many?", "how many red ones?")]) == ["1", "0"]
    found = score(test, [True, False, True])
    assert list(found)[0] == "score" and found["score"] == pytest.approx(2 / 3)
    assert found["vqa"] == 0.5 and found["ocr"] == 1 and found["vqa, clean"] == 1 and found["cluttered"] == 0
    assert found["vqa colour"] == 0.5 and not any(name.endswith((",", " ")) or not name for name in found)


def test_unknown_words_of_a_question():
    """A small tokenizer has every frequent word as one token; a large one spells many, and may have an unknown token."""
    small = make_tokenizer(["what colour is it?", " red"] * 9)
    assert unknown_words(small, "what zyxw is it, Red 12 red?") == ["zyxw", "Red"]
    assert unknown_words(small, "colour red") == []  # one at the start, one with a space before it, in training
    words = {f"w{i}": i for i in range(2000)} | {"[UNK]": 2000, "red": 2001}
    large = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    large.pre_tokenizer = pre_tokenizers.Whitespace()
    large = PreTrainedTokenizerFast(tokenizer_object=large, unk_token="[UNK]")
    assert unknown_words(large, "red zyxw zyxw") == ["zyxw"]
    small.add_tokens([f"<{i}>" for i in range(2000)])
    assert unknown_words(small, "what zyxw") == []
