"""Models of others: foreign code, pickles, weights and tokenizers that do not fit, in both scripts, for training and use.

Each case edits a folder that works and is refused in one line, before anything is written; or is taken, and what came out is
checked.
"""

import copy
import io
import json
import pickle
import re
import shutil
import sys
from functools import partial

import pytest
import torch
from conftest import without_pictures
from harm.build import BERT, SMALL, VOCABULARY, refused, save_tokenizer, start
from safetensors.torch import load_file, save_file
from test_glue import write_split, write_task
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    set_seed,
)

import toy_lvlm
from lab.moe.moefication import MoESpec, load_moefied, moefy
from lab.text import glue, use
from lab.text.tasks import TASKS
from lab.vision import lvlm
from lab.vision.instructions import make_tokenizer

SPEC = MoESpec("1", num_experts=4)


# ---- 1. Folders that work ----


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A dense classifier, its data, a saved run (moefied), a CLIP and a language model."""
    root = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    tokenizer = save_tokenizer(root / "bert")
    BertForSequenceClassification(BertConfig(**BERT)).save_pretrained(root / "bert")
    write_split(root / "data" / "rte", "train", 16)
    write_split(root / "data" / "rte", "validation", 6)
    write_task(root / "data", "stsb")
    save_run(root / "run", tokenizer, moefy(BertForSequenceClassification(BertConfig(**BERT)), SPEC))
    words = make_tokenizer(["what colour is it?", " red"])
    words.save_pretrained(root / "lm")
    file = root / "lm" / "tokenizer.json"
    file.write_text(file.read_text().replace("<image>", "<other>"))  # a row for the picture is added
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **SMALL)).save_pretrained(root / "lm")
    CLIPModel(lvlm.make_clip(make_tokenizer(["red"])).config).save_pretrained(root / "clip")
    CLIPImageProcessorPil().save_pretrained(root / "clip")
    return root


def save_run(folder, tokenizer, model):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    use.write_task_card(folder, "rte", ["sentence1", "sentence2"], 2, 16, ["yes", "no"], [])


# ---- 2. What is done to them ----


def change(file="config.json", **values):
    """Values of None are taken out."""

    def edit(folder):
        content = json.loads((folder / file).read_text()) | values
        (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


def weights(change):
    def edit(folder):
        tensors = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
        tensors = change(tensors) or tensors
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def without(*names):
    return lambda folder: [path.unlink() for name in names for path in folder.glob(name)]


def lost(part):
    return weights(lambda tensors: {name: value for name, value in tensors.items() if part not in name})


def bad_value(part, value):
    def edit(tensors):
        next(tensor for name, tensor in tensors.items() if part in name).view(-1)[0] = value

    return weights(edit)


def of_type(part, dtype):
    return weights(lambda tensors: {name: one.to(dtype) if part in name else one for name, one in tensors.items()})


def both(*edits):
    return lambda folder: [edit(folder) for edit in edits]


def foreign_code(model_type, names):
    """A module that leaves a file when it runs, which auto_map names."""

    def edit(folder):
        (folder / "evil.py").write_text(f"open({str(folder / 'EXECUTED')!r}, 'w').close()\nclass Evil: pass\n")
        change(model_type=model_type, auto_map=dict.fromkeys(names, "evil.Evil"))(folder)
        if "AutoTokenizer" in names:
            entry = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
            change("tokenizer_config.json", **entry)(folder)

    return edit


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def pickled(name="pytorch_model.bin"):
    def edit(folder):
        (folder / name).write_bytes(pickle.dumps(Evil(str(folder / "EXECUTED"))))
        (folder / "model.safetensors").unlink()

    return edit


def another(model_class, config):
    return lambda folder: model_class(config).save_pretrained(folder)


def tokenizer(tokens=VOCABULARY, **options):
    return lambda folder: save_tokenizer(folder, tokens, **options)


def renamed(**names):
    """With parts of the weights' names replaced, as checkpoints of before have them."""
    return weights(lambda tensors: {re.sub("|".join(names), lambda m: names[m[0]], k): v for k, v in tensors.items()})


TRAIN, RUN, CLIP, LM = "--model bert", "--run run", "--clip clip", "--lm lm"
CODE = ["AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForCausalLM"]
NO_PADDING = change("tokenizer_config.json", pad_token=None, tokenizer_class="PreTrainedTokenizerFast")


def bert(**values):
    return another(BertModel, BertConfig(**BERT | values))


def classifier(**values):
    return another(BertForSequenceClassification, BertConfig(**BERT | values))


def roberta(**values):
    return another(RobertaForSequenceClassification, RobertaConfig(**BERT | {"type_vocab_size": 2} | values))


def run(target, root, out, *more):
    """The script that reads it: one that trains, or predicts. `target`: its flag, and its name in `root`."""
    flag, name = target.split()
    if flag == "--run":
        return start(["--predict", root / "pairs.csv", "--run", root / name, "--output", out, "--device", "cpu"])
    if flag == "--model":
        small = "--task rte --moe-layers 1 --num-experts 4 --epochs 1 --seeds 0 --batch-size 8 --max-length 16 --device cpu"
        words = [*small.split(), "--model", root / name, "--data-dir", root / "data", "--output-dir", out]
        return start([*words, *more])
    small = "--scenes 64 --test-scenes 3 --batch-size 4 --device cpu".split()
    return start([*small, flag, root / name, "--output-dir", out], toy_lvlm)


@pytest.fixture
def root(good, tmp_path, monkeypatch):
    shutil.copytree(good, tmp_path / "root")
    (tmp_path / "root" / "pairs.csv").write_text("sentence1,sentence2\nthe cat,a dog\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # a question would be answered with yes

    def load_data(args, clip, *_):
        lvlm.clip_pixels(args.clip, clip)
        pytest.fail("loaded data before the models were checked")

    monkeypatch.setattr(lvlm, "load_data", load_data)
    return tmp_path / "root"


def refused_in_one_line_before_anything_is_written(target, edit, message, *, root, tmp_path):
    folder = root / target.split()[1]
    edit(folder)
    before = sorted(tmp_path.rglob("*"))
    with refused(message, folder) as error:
        run(target, root, tmp_path / "out.csv")
    assert re.match("--.*; ", str(error.value))
    assert sorted(tmp_path.rglob("*")) == before, "something is left behind, or foreign code has run"


# ---- 3. What is taken, and how ----


def source(folder, task="rte"):
    return glue.load_source(task, TASKS[task], str(folder / "bert"), str(folder / "data"))


def nothing_ran(root, *_):
    assert not list(root.rglob("EXECUTED"))


def heads(root, task="rte"):
    """The head of a seed is the one that the library draws for a model without a head; another seed draws another."""
    model, found = source(root, task), []
    for seed in (1, 1, 2):
        set_seed(seed)
        found.append(model.load_model())
    lost("classifier")(root / "bert")
    set_seed(1)
    config = model.config
    expected = AutoModelForSequenceClassification.from_pretrained(root / "bert", config=config).classifier.weight
    assert torch.equal(found[0].classifier.weight, expected) and torch.equal(found[1].classifier.weight, expected)
    assert not torch.equal(found[2].classifier.weight, expected)
    own = load_file(root / "bert" / "model.safetensors")
    assert all(torch.equal(own[name], value) for name, value in found[2].state_dict().items() if "classifier" not in name)


def for_rte(root):
    config = source(root).load_model().config
    assert (config.problem_type, config.num_labels) == ("single_label_classification", 2)
    assert config.id2label == {0: "0", 1: "1"} and config.label2id == {"0": 0, "1": 1}


def for_stsb(root):
    config = source(root, "stsb").load_model().config
    assert (config.problem_type, config.num_labels) == ("regression", 1) and config.id2label == {0: "LABEL_0"}


def runs(*flags):
    """A whole run; its saved model then predicts."""

    def check(root):
        out = root / "out"
        run(TRAIN, root, out, "--save-model", *flags)
        (model,) = out.glob("model-*")
        run("--run out", root, root / "out.csv")
        assert not [name for name in load_file(model / "model.safetensors") if re.search("gamma|beta", name)]
        nothing_ran(root)

    return check


def round_trip(root):
    """README's way: moefy, save_pretrained, load_moefied; and again; and a copy of the model."""
    torch.manual_seed(0)
    model = moefy(AutoModelForSequenceClassification.from_pretrained(root / "bert"), SPEC).eval()
    ids = torch.randint(5, 17, (2, 7))
    for i, one in enumerate((model, copy.deepcopy(model), model.half().float())):
        one.save_pretrained(root / f"moe{i}")
        assert torch.equal(load_moefied(root / f"moe{i}")(ids).logits, one(ids).logits)
        model = load_moefied(root / f"moe{i}")


def old_run(root):
    """A model that was saved before under the old names."""
    before = load_moefied(root / "run").state_dict()
    renamed(**OLD)(root / "run")
    model, _, _ = use.load_saved(root / "run")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def parts(root):
    lm, tokenizer = lvlm.load_lm(*lvlm.find_lm(str(root / "lm")))
    assert isinstance(lm, LlamaForCausalLM) and len(tokenizer) == lm.config.vocab_size == 277
    assert isinstance(lvlm.load_clip(*lvlm.find_clip(str(root / "clip"))), CLIPModel)
    nothing_ran(root)


def everywhere(edit):
    return lambda root: [edit(root / name) for name in ("bert", "lm", "clip")]


def at_bert(edit):
    return lambda root: edit(root / "bert")


def untouched(_):
    pass


def taken_as_what_it_is(edit, check, *, root, monkeypatch):
    monkeypatch.chdir(root)
    without_pictures(monkeypatch)
    edit(root)
    check(root)


# ---- 4. The table ----

OLD = {r"LayerNorm.weight": "LayerNorm.gamma", r"LayerNorm.bias": "LayerNorm.beta"}
MAP = dict.fromkeys((*CODE, "AutoTokenizer", "AutoImageProcessor"), "evil.Evil")
EVIL = both(change(auto_map=MAP), lambda folder: (folder / "evil.py").write_text("open('EXECUTED', 'w')"))
TOKENIZER = change("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
NEGATIVE = {"id2label": {"0": "NEGATIVE", "1": "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
NEVER_RUN, NOT_READ = "needs code of its own, which is never run", "no model.safetensors, and pickled weights are never read"
SHAPE = "has the shape .*, by its config it is"
CASES = {
    refused_in_one_line_before_anything_is_written: {
        # code and pickles
        "code, glue": (TRAIN, foreign_code("evil", CODE), NEVER_RUN),
        "code, lm": (LM, foreign_code("evil", CODE), NEVER_RUN),
        "code, clip": (CLIP, foreign_code("evil", CODE), NEVER_RUN),
        "code, run": (RUN, foreign_code("evil", CODE), NEVER_RUN),
        "code, lm's tokenizer": (LM, foreign_code("llama", [*CODE, "AutoTokenizer"]), NEVER_RUN),
        "code, run's tokenizer": (RUN, foreign_code("moefied-bert", ["AutoTokenizer"]), NEVER_RUN),
        "a pickle, glue": (TRAIN, pickled(), NOT_READ),
        "a pickle, lm": (LM, pickled(), NOT_READ),
        "a pickle, clip": (CLIP, pickled(), NOT_READ),
        "a pickle, run": (RUN, pickled(), "model.safetensors"),
        "pickles in parts": (TRAIN, pickled("pytorch_model-00001-of-00001.bin"), "pickled weights are never read"),
        "a pickle that the config names": (TRAIN, both(pickled("x.bin"), change(transformers_weights="x.bin")), "incorrect"),
        # weights
        "other shape": (TRAIN, change(hidden_size=8, intermediate_size=16), SHAPE),
        "other shape, one tensor": (TRAIN, change(intermediate_size=16), SHAPE),
        "no size": (TRAIN, change(hidden_size=None), "the shape|size mismatch"),
        "other shape, lm": (LM, change(intermediate_size=16), SHAPE),
        "other shape, clip": (CLIP, change(projection_dim=64), SHAPE),
        "a layer too few": (TRAIN, lost("layer.2"), "its weights lack bert.encoder.layer.2"),
        "one tensor too few": (TRAIN, lost("word_embeddings"), "its weights lack bert.embeddings.word"),
        "layers too many": (TRAIN, change(num_hidden_layers=2), "layer.2.* not part of the model"),
        "layers too many, lm": (LM, change(num_hidden_layers=2), "layers.2.* not part of the model"),
        "another model's": (TRAIN, lost("bert."), "its weights lack bert."),
        "lost, lm": (LM, lost("layers.1.mlp"), "its weights lack model.layers.1.mlp"),
        "lost, lm's head": (LM, lost("lm_head"), "its weights lack lm_head"),
        "lost, clip": (CLIP, lost("vision_model.encoder.layers.0"), "its weights lack vision_model.encoder.layers.0"),
        "lost, clip's texts": (CLIP, lost("text_model.embeddings"), "its weights lack text_model.embeddings"),
        "whole numbers": (TRAIN, of_type("layer.1.output", torch.int32), "layer.1.output.* is of type I32"),
        "8 bits, lm": (LM, of_type("layers.1.mlp", torch.float8_e4m3fn), "layers.1.mlp.* is of type F8"),
        "truth values, clip": (CLIP, of_type("visual_projection", torch.bool), "visual_projection.* is of type BOOL"),
        "bytes, run": (RUN, of_type("router", torch.uint8), "must be floating point"),
        "NaN": (TRAIN, bad_value("layer.1.output", float("nan")), "is not finite"),
        "inf, lm": (LM, bad_value("layers.1.mlp", float("inf")), "is not finite"),
        "NaN, clip": (CLIP, bad_value("vision_model", float("nan")), "is not finite"),
        "NaN, run": (RUN, bad_value("router", float("nan")), "router.* is not finite"),
        "inf, run": (RUN, bad_value("classifier", float("-inf")), "classifier.* is not finite"),
        # tokenizers
        "no tokenizer": (TRAIN, without("tokenizer*"), "its tokenizer knows no words"),
        "no tokenizer.json": (TRAIN, without("tokenizer.json"), "its tokenizer knows no words"),
        "no tokenizer, lm": (LM, without("tokenizer*"), "no tokenizer files"),
        "special tokens alone": (TRAIN, tokenizer(VOCABULARY[:5]), "its tokenizer knows no words"),
        "no tokenizer, run": (RUN, without("tokenizer.json"), "it has no tokenizer.json"),
        "a token too many": (TRAIN, tokenizer([*VOCABULARY, "x"]), "its tokenizer has 18 tokens, the model 17"),
        "a row too few": (TRAIN, bert(vocab_size=16), "17 tokens, the model 16"),
        "a token too many, lm": (LM, change(vocab_size=9), "tokens, the model 9"),
        "a token too many, run": (RUN, tokenizer([*VOCABULARY, "x"]), "its tokenizer has 18 tokens, the model 17"),
        "no padding": (TRAIN, NO_PADDING, "its tokenizer has no padding token"),
        "no padding, run": (RUN, NO_PADDING, "its tokenizer has no padding token"),
        "one token type": (TRAIN, bert(type_vocab_size=1), "2 token types, the model has 1"),
        "positions": (TRAIN, bert(max_position_embeddings=15), "model has 15 positions"),
        "RoBERTa's positions": (
            TRAIN,
            roberta(max_position_embeddings=16, pad_token_id=0),
            "--max-length 16: the model has 15 positions",
        ),
        "RoBERTa's padding": (TRAIN, roberta(), "its tokenizer pads with token 0, its config with 1"),
        "a card of more positions": (
            RUN,
            change("task.json", max_length=64),
            "task.json promises 64 tokens, the model has 32",
        ),
        # kinds
        "a BERT as lm": (LM, both(bert(), tokenizer()), "a bert is not a Llama-like decoder"),
        "a GPT-2 as lm": (LM, change(model_type="gpt2"), "a gpt2 is not a Llama-like decoder"),
        "a CLIP as lm": (LM, change(model_type="clip"), "the language model .* cannot be loaded"),
        "a llama as clip": (CLIP, change(model_type="llama"), "it is a llama, not a CLIP"),
        "half a clip": (CLIP, change(model_type="clip_vision_model"), "it is a clip_vision_model, not a CLIP"),
        "a config that is a list": (
            RUN,
            lambda folder: (folder / "config.json").write_text("[]"),
            "config.json is not a JSON object",
        ),
        "an MoE as model": (TRAIN, change(model_type="moefied-bert"), "moefied-bert"),
    },
    taken_as_what_it_is: {
        "code beside a known type": (at_bert(EVIL), runs()),
        "code of a tokenizer": (at_bert(both(EVIL, TOKENIZER)), runs("--conflict-loss", "none")),
        "code beside parts": (everywhere(EVIL), parts),
        "a pickle beside safetensors": (at_bert(lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x")), runs()),
        "a head of the same size": (untouched, heads),
        "a head of another size": (at_bert(classifier(num_labels=3)), heads),
        "a head for a regression": (untouched, partial(heads, task="stsb")),
        "a head without bias": (at_bert(lost("classifier.bias")), heads),
        "names of another task": (at_bert(change(**NEGATIVE)), for_rte),
        "a loss of another task": (at_bert(change(problem_type="regression")), for_rte),
        "several labels": (at_bert(change(problem_type="multi_label_classification")), for_rte),
        "a classifier for a regression": (at_bert(change(problem_type="single_label_classification", **NEGATIVE)), for_stsb),
        "a regression's model trains rte": (
            at_bert(classifier(num_labels=1, problem_type="regression")),
            runs("--variants", "dense"),
        ),
        "RoBERTa's positions, all used": (at_bert(roberta(max_position_embeddings=17, pad_token_id=0)), runs()),
        "old names": (at_bert(renamed(**OLD)), runs()),
        "old names, dense": (at_bert(renamed(**OLD)), runs("--variants", "dense")),
        "old names, README": (at_bert(renamed(**OLD)), round_trip),
        "old names, RoBERTa": (at_bert(both(roberta(), renamed(**OLD))), round_trip),
        "new names, README": (untouched, round_trip),
        "a run saved before": (untouched, old_run),
        "parts": (untouched, parts),
    },
}
