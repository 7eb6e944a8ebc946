"""Loading from the Hugging Face hub, its cache, or a folder, with one-line errors.

`Checkpoint` is the one way to a model, tokenizer or config that others made: their code is never run, nothing is unpickled,
and what is incomplete or does not fit is refused.   1 Errors  2 Downloads  3 Checkpoints  4 Inputs
"""

import os
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants, hf_hub_download, list_repo_files, resolve_revision
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError
from huggingface_hub.utils import logging
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer, CamembertConfig, PreTrainedConfig, RobertaConfig, XLMRobertaConfig

from lab.run.cli import GLUE_WAYS, UserError, offline_message
from lab.run.reading import read_json

# ---- 1. Errors ----

WIDTH = 120  # of a library's reason in a line of ours
FIXES = {  # what a library's message contains: what to say instead of it, if not the same, and what to do
    "trust_remote_code|custom code": ("it needs code of its own, which is never run", "give a model that transformers has"),
    r"(no|a) file named \S*\.safetensors": (
        "it has no model.safetensors, and pickled weights are never read",
        "give another, or one that save_pretrained of transformers wrote",
    ),
    "(of|enough|allocate) memory|MemoryError|Unable to allocate": ("the memory is too small for it", "give a smaller one"),
    "backend tokenizer": ("it has no tokenizer files that can be read", "add its tokenizer.json"),
    "File reconstruction error": ("", "run the command again; HF_HUB_DISABLE_XET=1 avoids this storage"),
    r"\b40[134] [A-Z]": ("", "check the name; if it is gated or private, ask for access on its page, then: hf auth login"),
    "[Rr]epo.id": ("", "give an existing folder, or a name on the hub"),
}


def from_hub(what: str, flag: str, name: str, load: Callable, ways: str = GLUE_WAYS, again: str = "", kind: str = "model"):
    """Runs `load`, a loader of a library. UserError for any of its errors: `name` is absent, cut, damaged, or another kind.
    The message adds what to do: `ways` if neither the hub nor its cache has it, or `again`, or what the error asks for."""
    try:
        return load()
    except Exception as error:  # damaged files raise anything: tokenizers raises bare Exceptions only
        while isinstance(error, (LocalEntryNotFoundError, RevisionResolutionError)) and error.__cause__:
            error = error.__cause__  # they only guess at it
        if isinstance(error, OfflineModeIsEnabled):
            raise UserError(offline_message(what, name, ways)) from None
        text, folder = " ".join(str(error).split()) or type(error).__name__, Path(name).is_dir()
        noise = r"Task error: .*Request error: |Error\(s\) in loading state_dict for \w+: |(?<!\w)(https?:/)?/[^\s'\"]*/"
        reason = re.sub(noise, "", text)  # and long addresses
        fix = "save or fetch it again" if folder else f"run the command again, or first remove {cache_of(name, kind)}"
        instead = next((instead for pattern, instead in FIXES.items() if re.search(pattern, text)), ("", again or fix))
        reason = instead[0] or textwrap.shorten(reason, WIDTH, placeholder=" ...")
        raise UserError(f"{flag}: {what} {name} cannot be loaded ({reason}); {again or instead[1]}") from None


# ---- 2. Downloads ----

SMALL, WEIGHTS = r"[^/]+\.(json|txt|model|jinja)", r"model(-\d+-of-\d+)?\.safetensors"  # what is read of a model


def cache_of(name: str, kind: str) -> Path:
    """The folder of a repository in the hub's cache."""
    return Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")


@cache
def fetch(name: str, pattern: str, kind: str = "model") -> Path:
    """A folder of the hub's cache with the files of a repository whose names match; what it lacks is downloaded. If the hub
    does not answer, the cache has to do. Raises the errors of `huggingface_hub`."""
    logging.set_verbosity(logging.CRITICAL)  # otherwise each retry prints two lines
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_DURATION", "15s")  # otherwise its client retries for five silent minutes
    revision = resolve_revision(name, repo_type=kind).resolved
    folder = cache_of(name, kind) / "snapshots" / revision
    try:
        files = list_repo_files(name, repo_type=kind, revision=revision)
    except Exception:
        if not any(re.fullmatch(pattern, path.relative_to(folder).as_posix()) for path in folder.rglob("*")):
            raise
        return folder
    for file in filter(re.compile(pattern).fullmatch, files):
        hf_hub_download(name, file, repo_type=kind, revision=revision)
    return folder


# ---- 3. Checkpoints ----

SIZES = {"hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads"}
FEW = 10**8  # weights that every machine can hold


def check_sizes(config: dict) -> dict:
    """The config. ValueError for a size below 1, and for more layers than a model has: some configs list theirs."""
    for key, value in config.items():
        low, high = 1 if key in SIZES else value, 1000 if key.endswith(("n_layer", "layers")) else value
        if isinstance(value, dict):
            check_sizes(value)
        elif type(value) is int and not low <= value <= high:
            raise ValueError(f"its {key} is {value!r:.40}")
    return config


def sketch(build: Callable[[], nn.Module], folder: str | Path) -> nn.Module:
    """`build()` without memory for its weights. ValueError if they are more than its files, or this machine, can hold."""
    with torch.device("meta"):
        model = build()
    count = sum(parameter.numel() for parameter in model.parameters())
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    if count > (room := FEW + 2 * size if size else psutil.virtual_memory().total // 4):
        raise ValueError(f"its config describes {count:.2g} weights, its files or this machine hold {room:.2g} at most")
    return model


@dataclass(frozen=True)
class Checkpoint:
    """A model of others: a repository of the hub or a folder, which a flag names."""

    flag: str
    name: str | Path
    ways: str = GLUE_WAYS  # see from_hub
    again: str = ""  # what to do about a damaged or unfit one, if not to give another

    def refuse(self, reason: str):
        raise UserError(f"{self.flag} {self.name}: {reason}; {self.again or 'give another checkpoint'}")

    def require(self, *files: str) -> None:
        """Refuses a model without these files: transformers would replace some of them by something."""
        for file in files:
            if not (self.folder() / file).is_file():
                self.refuse(f"it has no {file}")

    def folder(self, what: str = "the model", pattern: str = SMALL) -> Path:
        """The folder itself, or that of the repository's files whose names match."""
        own = Path(self.name)
        return own if own.is_dir() else self.guard(what, lambda: fetch(str(self.name), pattern))

    def guard(self, what: str, load: Callable):
        return from_hub(what, self.flag, str(self.name), load, self.ways, self.again)

    def load(self, what: str, loader: type, **options):
        """`loader.from_pretrained`, which reads a folder without the hub."""
        folder = self.folder(what, WEIGHTS if options.get("use_safetensors") else SMALL)
        options |= {"trust_remote_code": False, "local_files_only": True}
        return self.guard(what, lambda: loader.from_pretrained(folder, **options))

    def read(self, file: str, make: Callable = dict, **kinds):
        """`make`, such as a dataclass, of the JSON object in a file of the folder."""
        self.require(file)
        return self.guard(f"{file} of", lambda: make(**read_json(self.folder() / file, **kinds)))

    def config(self, what: str = "the model", **changes) -> PreTrainedConfig:
        self.require("config.json")
        self.guard(what, lambda: check_sizes(read_json(self.folder() / "config.json")))
        return self.load(what, AutoConfig, **changes)

    def sketch(self, what: str, loader: type, config: PreTrainedConfig) -> nn.Module:
        """The model without memory for its weights. Refused if its files, or this machine, cannot hold as many."""
        build = partial(loader.from_config, trust_remote_code=False) if hasattr(loader, "from_config") else loader
        return self.guard(what, lambda: sketch(partial(build, config), self.folder(what)))

    def model(self, what: str, loader: type, config: PreTrainedConfig | None = None, new="", dtype="auto") -> nn.Module:
        """The model in eval mode, with every weight from the files. `new`: a pattern of names that the files may lack; the
        head, all that is not below the base model, then is always new. Both are drawn from the global seed. Saved again,
        the weights have the model's own names."""
        config = config or self.config(what)
        self.sketch(what, loader, config)
        options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = self.load(what, loader, config=config, dtype=dtype, **options)
        prefix, absent = f"{model.base_model_prefix}.", set(info["missing_keys"])
        other_shape = {key: shapes for key, *shapes in info["mismatched_keys"]}
        own = set(model.state_dict())
        head = {key for key in own if not key.startswith(prefix)} if new else set()
        if lost := [key for key in absent if not new or not re.search(new, key)]:
            self.refuse(f"its weights lack {min(lost)}, which would stay random")
        if wrong := other_shape.keys() - head:
            found, wanted = (tuple(shape) for shape in other_shape[min(wrong)])
            self.refuse(f"its weight {min(wrong)} has the shape {found}, by its config it is {wanted}")
        stacks = {re.split(r"\.\d+\.", key.removeprefix(prefix))[0] for key in own}  # the names of its lists of layers
        for key in sorted(info["unexpected_keys"]):
            stack, *inner = re.split(r"\.\d+\.", key.removeprefix(prefix))
            if inner and stack in stacks and "inv_freq" not in key:  # a buffer of old Llamas, computed since
                self.refuse(f"its weight {key} is not part of the model that its config describes")
        if head - absent - other_shape.keys():
            for name, part in model.named_children():
                if f"{name}." != prefix:
                    for parameter in part.parameters():
                        parameter._is_hf_initialized = False  # transformers' mark of a weight that came from a file
                    part.apply(model._init_weights)
        model._weight_conversions = []  # otherwise transformers saves the names that the files had, such as gamma and beta
        self.check_weights(model)
        return model.eval()

    def check_weights(self, model: nn.Module) -> None:
        """Refuses numbers that are not finite, and files with numbers of a kind that would be cast silently."""
        for path in sorted(self.folder().glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    if (kind := file.get_slice(name).get_dtype()) not in ("F16", "BF16", "F32", "F64", "I64"):
                        self.refuse(f"its weight {name} is of type {kind}")
        for name, value in model.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                self.refuse(f"its weight {name} is not finite")

    def tokenizer(self, config: PreTrainedConfig, added: tuple[str, ...] = ()):
        """The tokenizer, which knows words, and whose tokens, except those `added`, all have a row in the model's table."""
        tokenizer = self.load("the tokenizer", AutoTokenizer, config=config)
        rows = self.guard("the tokenizer", lambda: config.get_text_config().vocab_size)
        if not self.guard("the tokenizer", lambda: tokenizer(["a", "\u0f00"])).get("input_ids"):  # or it raises
            self.refuse("its tokenizer makes no input_ids")
        ids, special = tokenizer.get_vocab(), set(tokenizer.all_special_tokens)
        if not any(any(map(str.isalnum, token)) for token in ids.keys() - special):  # as transformers makes without files
            self.refuse("its tokenizer knows no words: tokenizer.json is missing or empty")
        top = max(id for token, id in ids.items() if token not in added)
        if top >= rows:
            self.refuse(f"its tokenizer has {top + 1} tokens, the model {rows}")
        return tokenizer


# ---- 4. Inputs ----


def count_positions(config: PreTrainedConfig) -> int:
    """The tokens of the longest input. RoBERTa and its kin leave the positions up to that of padding unused."""
    return config.max_position_embeddings - first_position(config)


def first_position(config: PreTrainedConfig) -> int:
    alike = (RobertaConfig, XLMRobertaConfig, CamembertConfig)
    return (config.pad_token_id or 0) + 1 if isinstance(config, alike) else 0


def misfit(config: PreTrainedConfig, tokenizer, num_texts: int) -> str:
    """Why a BERT-like model cannot read what its tokenizer makes of so many texts and of padding; '' if it can."""
    if tokenizer.pad_token_id is None:
        return "its tokenizer has no padding token"
    if first_position(config) and config.pad_token_id != tokenizer.pad_token_id:
        return f"its tokenizer pads with token {tokenizer.pad_token_id}, its config with {config.pad_token_id}"
    types = 1 + max(tokenizer(*["a"] * num_texts).get("token_type_ids") or [0])
    if types > config.type_vocab_size:
        return f"its tokenizer makes {types} token types, the model has {config.type_vocab_size}"
    return ""
