"""What the cases share: a small BERT and its tokenizer, a run of a script in this process, and what a refusal looks like."""

import re
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from test_glue import WORDS
from transformers import BertTokenizerFast

import glue_moefy
from lab.run.cli import UserError
from lab.vision import lvlm
from lab.vision.instructions import Pixels

ONCE = [()]  # the rows of a kind that is one story
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
BERT = SMALL | {"vocab_size": len(VOCABULARY), "max_position_embeddings": 32}
PIXELS, CARD = Pixels(4, (0.5,) * 3, (0.5,) * 3), lvlm.Card(4, (0.5,) * 3, (0.5,) * 3, 1)
ENTRY = {"variant": "ce", "seed": 0, "lr": 3e-5, "last": {"score": 0.5, "epoch": 1}, "collapsed": False}  # of a record


def save_tokenizer(folder, tokens=VOCABULARY, **options):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), **options)
    (folder / "vocab.txt").unlink()
    tokenizer.save_pretrained(folder)
    return tokenizer


def start(words, script=glue_moefy):
    """The script with these words in its command line."""
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision per process
    script.main(script.parse(list(map(str, words))))


def check_line(line: str, pattern: str, *folders) -> None:
    """One line that matches, of less than 300 characters without the names of `folders`."""
    assert re.search(pattern, line), line
    for folder in map(str, folders):
        line = line.replace(folder, "")
    assert line.isprintable() and len(line) < 300, line


@contextmanager
def refused(pattern: str, *folders, error: type[Exception] = UserError):
    """What is done within it is refused in one line."""
    with pytest.raises(error) as found:
        yield found
    check_line(str(found.value), pattern, *folders)


@contextmanager
def stopped(capsys, pattern: str, code: int = 2):
    """What is done within it ends the script with this exit code and one line on stderr, which is its `line`."""
    said = SimpleNamespace()
    with pytest.raises(SystemExit) as end:
        yield said
    (said.line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == code, said.line
    check_line(said.line, pattern)
