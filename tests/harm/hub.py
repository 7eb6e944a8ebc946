"""The whole way from the hub: `glue_moefy.py` by its default names against a stand-in, then offline, and every failure.

The scripts run in processes whose libraries have the stand-in's address and an empty home from their start.
"""

import functools
import json
import os
import shutil
import threading
import time

import pyarrow.parquet
import pytest
import torch
from forked import Server
from harm.build import BERT, ONCE, check_line, save_tokenizer, stopped
from safetensors.torch import load, save
from standin_hub import Fault, Hub
from test_glue import write_split, write_task
from transformers import BertConfig, BertForPreTraining

from lab.run import options
from lab.run.cli import Parser, hub_is_reachable, is_offline

MODEL, GLUE = "models/google-bert/bert-large-cased", "datasets/nyu-mll/glue"
TRAIN = "--task rte --moe-layers 1 --num-experts 4 --epochs 1 --seeds 0 --max-length 16 --device cpu".split()
AT_ONCE = "import time\ntime.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))"  # no waits before retries
CARD = """---
dataset_info:
- config_name: rte
  features:
  - name: sentence1
    dtype: string
  - name: sentence2
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': entailment
          '1': not_entailment
  - name: idx
    dtype: int32
  splits:
  - name: train
    num_examples: 24
  - name: validation
    num_examples: 9
configs:
- config_name: rte
  data_files:
  - split: train
    path: rte/train-*
  - split: validation
    path: rte/validation-*
---
"""


# ---- 1. A hub, and processes that know no other ----


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A BERT with the names that its weights had at first, files that nobody reads, and tables without names of classes."""
    root = tmp_path_factory.mktemp("content")
    save_tokenizer(root / "model")
    torch.manual_seed(0)
    BertForPreTraining(BertConfig(**BERT)).save_pretrained(root / "model")
    weights = root / "model" / "model.safetensors"
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load(weights.read_bytes()).items()
    }
    assert any("gamma" in name for name in tensors)
    weights.write_bytes(save(tensors, {"format": "pt"}))
    write_split(root / "glue" / "rte", "train", 24)
    write_split(root / "glue" / "rte", "validation", 9)
    for file in (root / "glue" / "rte").glob("*"):
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).replace_schema_metadata(), file)
    write_task(root / "glue", "sst2")
    (root / "glue" / "README.md").write_text(CARD)
    unread = {"pytorch_model.bin": b"pickled", "onnx/model.onnx": b"large", "openvino/model.safetensors": b"large"}
    return {MODEL: files_of(root / "model") | unread, GLUE: files_of(root / "glue")}


class Place:
    """A stand-in, the home that its files are cached in, and servers of scripts, online and offline."""

    def __init__(self, root, content):
        self.hub, self.home, self.out, self.content = Hub({}), root / "home", root / "out", content
        quick = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1"}
        self.shared = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "OMP_NUM_THREADS": "1"} | quick
        self.online = Server(HF_HUB_OFFLINE="", **self.shared)

    @functools.cached_property
    def offline(self):
        return Server(HF_HUB_OFFLINE="", TRANSFORMERS_OFFLINE="1", **self.shared)

    def reset(self):
        for folder in (self.home, self.out):
            shutil.rmtree(folder, ignore_errors=True)
        self.hub.repositories = {name: dict(files) for name, files in self.content.items()}
        self.hub.faults, self.hub.xet = [], False

    def run(self, *flags, offline=False, script="glue_moefy.py"):
        self.hub.asked.clear()
        return (self.offline if offline else self.online).run(script, *flags, "--output-dir", self.out, before=AT_ONCE)

    def refused(self, pattern, *flags, given="", **options):
        """The command is refused in one line that matches, and leaves nothing. `given`: a name that may be long."""
        done = self.run(*flags, **options)
        assert done.returncode == 2 and not self.out.exists(), done.stderr
        (line,) = done.stderr.strip().splitlines()
        check_line(line, pattern, self.home, given)

    def cached(self, name):
        (path,) = (path for path in self.home.glob("hub/*/snapshots/*/**/*") if path.name == name)
        return path.resolve()


@pytest.fixture(scope="module")
def everything(tmp_path_factory, content):
    place = Place(tmp_path_factory.mktemp("place"), content)
    yield place
    place.online.close()
    if "offline" in vars(place):
        place.offline.close()


@pytest.fixture
def place(everything):
    everything.reset()
    return everything


# ---- 2. What works ----


def the_whole_way_by_the_default_names_and_again_offline(*, place):
    done = place.run(*TRAIN, "--save-model")
    assert (done.returncode, done.stderr) == (0, "")
    fetched = {path.name for path in place.home.glob("hub/*/snapshots/*/**/*") if path.is_file()}
    tables = {f"{split}-00000-of-00001.parquet" for split in ("train", "validation")}
    assert fetched == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "README.md"} | tables

    inspected = place.online.run("glue_moefy.py", "--inspect", place.out, "--device", "cpu")
    assert inspected.returncode == 0 and "not_entailment" in inspected.stdout  # the card's names of the classes

    curve = (place.out / "ce-s0.jsonl").read_text()
    shutil.rmtree(place.out)
    done = place.run(*TRAIN, offline=True)
    assert (done.returncode, done.stderr, place.hub.asked) == (0, "", [])
    same = [
        [(line["step"], line["loss"]) for line in map(json.loads, text.splitlines()) if "loss" in line]
        for text in (curve, (place.out / "ce-s0.jsonl").read_text())
    ]
    assert same[0] == same[1] and same[0]


def what_is_in_the_cache_does_while_the_hub_fails(kind, *, place):
    assert place.run(*TRAIN).returncode == 0
    shutil.rmtree(place.out)
    place.hub.faults = [Fault(kind, "^/.")]
    assert place.run(*TRAIN).returncode == 0


def a_card_may_say_nothing(card, *, place):
    place.hub.repositories[GLUE]["README.md"] = card
    if card is None:
        del place.hub.repositories[GLUE]["README.md"]
    assert place.run(*TRAIN).returncode == 0


def a_slow_hub_is_waited_for(*, place):
    place.hub.faults = [Fault("slow", "config.json", "GET")]
    assert place.run(*TRAIN).returncode == 0


# ---- 3. What fails ----

AGAIN, LOGIN = "run the command again, or first remove .*hub/{}", "hf auth login"
CONFIG_FILE, TOKENIZER, WEIGHTS = (
    f"bert-large-cased/resolve/.*/{name}" for name in ("config.json", "tokenizer.json", "model")
)
OF_MODEL, OF_DATA = AGAIN.format("models--google-bert--bert-large-cased"), AGAIN.format("datasets--nyu-mll--glue")
STORE = "^/storage/"  # train's table is the first file there


def a_failing_hub_is_one_line(fault, reason, fix, *, place):
    place.hub.faults = [fault]
    place.refused(f"{reason}.*; .*{fix}", *TRAIN)


def a_failing_xet_storage_is_one_line(kind, reason, *, place):
    place.hub.xet, place.hub.faults = True, [Fault(kind, "^/cas/")]
    place.refused(f"rte of nyu-mll/glue cannot be loaded .*{reason}.*HF_HUB_DISABLE_XET=1", *TRAIN)


def changed(name, file, content):
    """With another content of a file; None takes it away."""

    def change(place):
        place.hub.repositories[name] = files = place.hub.repositories[name] | {file: content}
        if content is None:
            del files[file]

    return change


def card(old, new):
    return changed(GLUE, "README.md", CARD.replace(old, new).encode())


def wrong_content_is_one_line(change, message, *, place):
    change(place)
    place.refused(message, *TRAIN)


def what_the_model_cannot_do_is_found_before_data_and_weights(flags, *, place):
    place.refused("", *TRAIN, *flags.split())
    assert place.hub.asked and not [path for _, path in place.hub.asked if "datasets" in path or "storage" in path]


def a_damaged_file_in_the_cache_names_the_folder_to_remove(name, message, offline, *, place):
    assert place.run(*TRAIN).returncode == 0
    shutil.rmtree(place.out)
    file = place.cached(name)
    file.write_bytes(b"---\ndataset_info: [\n---" if name == "README.md" else file.read_bytes()[: file.stat().st_size // 2])
    place.refused(f"{message}.*remove {file.parents[1]}", *TRAIN, offline=offline)
    if not offline:
        shutil.rmtree(file.parents[1])
        assert place.run(*TRAIN).returncode == 0


def what_the_cache_lacks_is_named_offline(*, place):
    def lacks(what, *more):
        missing = "is not in the local cache and the Hugging Face hub cannot be reached: give local folders"
        place.refused(f"{what} {missing}", *TRAIN, *more, offline=True)

    lacks("the model google-bert/bert-large-cased")
    place.hub.faults = [Fault("500", "datasets")]
    place.refused("", *TRAIN)
    lacks("the data set rte of nyu-mll/glue")
    place.hub.faults = [Fault("500", WEIGHTS)]
    place.refused("", *TRAIN)
    lacks("the model google-bert/bert-large-cased")
    place.hub.faults = []
    assert place.run(*TRAIN).returncode == 0
    shutil.rmtree(place.out)
    for task in ("sst2", "mnli"):
        lacks(f"the data set {task} of nyu-mll/glue", "--task", task)


def what_cannot_be_a_name_is_one_line(name, *, place):
    fix = "give an existing (folder|one), or a (name on the hub|hub name)"
    place.refused(f"--model:? .*; {fix}", *TRAIN, f"--model={name}", given=name)


def the_other_script_says_the_same(flag, code, message, *, place):
    place.hub.faults = [Fault("401", CONFIG_FILE, code=code)]
    name = "google-bert/bert-large-cased"
    place.refused(f"{flag}: the .* {name} .*{message}.*hf auth login", flag, name, script="toy_lvlm.py")


# ---- 4. Addresses, and offline mode ----


def an_address_without_its_scheme_is_one_line(address, *, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv("HF_ENDPOINT", address)
    with stopped(capsys, f"HF_ENDPOINT={address} .*https://"):
        options.check_model(Parser(prog="p"), "--model", "a/b", "a way")


def an_odd_address_is_not_reached(address, *, monkeypatch, capfd):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv("HF_ENDPOINT", address)
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    assert not hub_is_reachable(Parser(prog="p"), seconds=2)
    time.sleep(0.1)  # for the thread
    assert capfd.readouterr() == ("", "") and not failed and os.environ["HF_HUB_OFFLINE"] == "1"


def offline_as_the_libraries_have_it(hub, transformers, offline, *, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", hub)
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", transformers)
    assert is_offline() is offline


# ---- 5. The table ----

TABLE = "rte/train-00000-of-00001.parquet"
CASES = {
    the_whole_way_by_the_default_names_and_again_offline: ONCE,
    what_is_in_the_cache_does_while_the_hub_fails: ["500", "drop"],
    a_card_may_say_nothing: [None, b"no header", b"---\nlicense: other\n---\n"],
    a_slow_hub_is_waited_for: ONCE,
    a_failing_hub_is_one_line: {
        "config, 500": (Fault("500", CONFIG_FILE), "--model: the model .*500 Internal Server Error", OF_MODEL),
        "config, 503": (Fault("503", CONFIG_FILE), "503 Service Unavailable", OF_MODEL),
        "config, 401": (Fault("401", CONFIG_FILE), "401 Unauthorized", LOGIN),
        "config, 403": (Fault("403", CONFIG_FILE), "403 Forbidden", LOGIN),
        "config, gated, no token": (Fault("401", CONFIG_FILE, code="GatedRepo"), "gated repo .*its owner says why", LOGIN),
        "config, gated, a token": (Fault("403", CONFIG_FILE, code="GatedRepo"), "gated repo .*its owner says why", LOGIN),
        "config, 404": (Fault("404", CONFIG_FILE), "404 Not Found", LOGIN),
        "config, cut": (Fault("cut", CONFIG_FILE), "peer closed connection .*received .* bytes", OF_MODEL),
        "config, no answer": (Fault("drop", CONFIG_FILE), "Server disconnected", OF_MODEL),
        "config, half": (Fault("half", CONFIG_FILE), "config.json is not a JSON object", OF_MODEL),
        "no repository": (Fault("401", "api/models", code="RepoNotFound"), "Repository Not Found", LOGIN),
        "repository, 500": (Fault("500", "api/models"), "500 Internal", OF_MODEL),
        "list, 500": (Fault("500", "api/models/.*/tree"), "500 Internal", OF_MODEL),
        "tokenizer, 500": (Fault("500", TOKENIZER), "500 Internal Server Error", OF_MODEL),
        "tokenizer, 401": (Fault("401", TOKENIZER), "401 Unauthorized", LOGIN),
        "tokenizer, cut": (Fault("cut", TOKENIZER), "peer closed connection", OF_MODEL),
        "tokenizer, half": (Fault("half", TOKENIZER), "the tokenizer .*Expecting|the tokenizer .*Unterminated", OF_MODEL),
        "weights, 500": (Fault("500", WEIGHTS), "the model .*500 Internal Server Error", OF_MODEL),
        "weights, gated": (Fault("403", WEIGHTS, code="GatedRepo"), "gated", LOGIN),
        "storage, 500": (
            Fault("500", STORE),
            "--data-dir: the data set rte of nyu-mll/glue .*500 Internal Server Error",
            OF_DATA,
        ),
        "storage, 403": (Fault("403", STORE), "403 Forbidden", LOGIN),
        "storage, cut": (Fault("cut", STORE), "peer closed connection", OF_DATA),
        "storage, no answer": (Fault("drop", STORE), "Server disconnected", OF_DATA),
        "storage, half": (Fault("half", STORE), "should be of size .* but has size", OF_DATA),
        "data, 500": (Fault("500", "datasets"), "rte of nyu-mll/glue .*500 Internal", OF_DATA),
        "data, 401": (Fault("401", "datasets"), "Repository Not Found|401 Unauthorized", LOGIN),
        "data, gated, no token": (Fault("401", "datasets", code="GatedRepo"), "gated", LOGIN),
        "data, gated, a token": (Fault("403", "datasets", code="GatedRepo"), "gated", LOGIN),
        "data, no answer": (Fault("drop", "datasets"), "Server disconnected", OF_DATA),
        "table, 404": (Fault("404", "resolve.*parquet"), "404 Not Found", LOGIN),
        "card, cut": (Fault("cut", "README"), "peer closed connection", OF_DATA),
    },
    a_failing_xet_storage_is_one_line: [("500", "500 Internal"), ("403", "403 Forbidden"), ("404", "404 Not"), ("drop", "")],
    wrong_content_is_one_line: {
        "no train file": (changed(GLUE, TABLE, None), "nyu-mll/glue has no rte/train-.*parquet.*remove"),
        "no dev file": (
            changed(GLUE, TABLE.replace("train", "validation"), None),
            "nyu-mll/glue has no rte/validation-.*parquet.*remove",
        ),
        "two of three": (
            changed(GLUE, "rte/train-00001-of-00003.parquet", b"x"),
            "has 2 files rte/train-.*; fetch those that are missing",
        ),
        "other rows than the card's": (card("24", "2490"), "train has 24 rows, by its card 2490.*remove"),
        "other dev rows than the card's": (
            card("num_examples: 9", "num_examples: 277"),
            "validation has 9 rows, by its card 277",
        ),
        "other columns than the card's": (card("sentence2", "hypothesis"), "cannot be loaded .*(hypothesis|sentence2)"),
        "a table that is no Parquet": (changed(GLUE, TABLE, b"PAR1" * 30), f"{TABLE[4:]} is not readable .*remove"),
        "no config": (changed(MODEL, "config.json", None), "bert-large-cased: it has no config.json"),
        "no safetensors": (
            changed(MODEL, "model.safetensors", None),
            "it has no model.safetensors, and pickled weights are never read",
        ),
        "weights that are none": (changed(MODEL, "model.safetensors", b"x" * 99), f"the model .*{OF_MODEL}"),
    },
    what_the_model_cannot_do_is_found_before_data_and_weights: [
        "--moe-layers 9",
        "--max-length 99",
        "--num-experts 7 --experts split",
    ],
    a_damaged_file_in_the_cache_names_the_folder_to_remove: [
        (name, message, offline)
        for offline in (False, True)
        for name, message in {
            "train-00000-of-00001.parquet": "train-00000-of-00001.parquet is not readable Parquet",
            "model.safetensors": "--model: the model",
            "config.json": "config.json is not a JSON object",
            "tokenizer.json": "the tokenizer",
            "README.md": "rte of nyu-mll/glue cannot be loaded",
        }.items()
    ],
    what_the_cache_lacks_is_named_offline: ONCE,
    what_cannot_be_a_name_is_one_line: ["x y", "-a", "a--b/c..d", "\u00fc/\u00fc", "a/b.git", "x" * 97],
    the_other_script_says_the_same: [
        (flag, *case) for flag in ("--lm", "--clip") for case in (("", "401 Unauthorized"), ("GatedRepo", "gated"))
    ],
    an_address_without_its_scheme_is_one_line: ["hf-mirror.com", "", "ftp://hf-mirror.com", "localhost:8000", "//hf.co"],
    an_odd_address_is_not_reached: ["http://127.0.0.1:port", "https://", "http://[", "http://a b"],
    offline_as_the_libraries_have_it: [
        ("1", "", True),
        ("", "1", True),
        ("", "yes", True),
        ("0", "1", False),
        ("", "0", False),
        ("", "", False),
        ("true", "0", True),
    ],
}
