"""glue_moefy.py in two processes, as a launcher starts it: the training of one, and a resume that is exact there too."""

import json
import os
import subprocess
import sys

import pytest
from forked import Launched
from test_glue import CONFIG, ROOT, data, model, plain, run, words  # noqa: F401  (fixtures)
from test_resume import assert_same, outcome
from transformers import BertForSequenceClassification

from lab.run.cli import UserError

pytestmark = pytest.mark.slow


def launch(*command):
    """Starts two processes as `accelerate launch` does on GPUs: by torch's own launcher, which knows CPUs too."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "glue_moefy.py"]
    calm, pipe = os.environ | {"OMP_NUM_THREADS": "1"}, subprocess.PIPE
    return subprocess.Popen([*line, *map(str, command)], cwd=ROOT, env=calm, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def still(model, tmp_path):  # noqa: F811
    """The model without dropout, whose random numbers differ between processes."""
    folder = tmp_path / "still"
    config = type(CONFIG).from_dict(CONFIG.to_dict() | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    BertForSequenceClassification.from_pretrained(model, config=config).save_pretrained(folder)
    for path in model.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def curve(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one(words, still, tmp_path):  # noqa: F811
    command = [*words, "--model", still, "--variants", "ce,ce-one", "--lr", "1e-3", "--log-steps", "1"]
    with launch(*command, "--output-dir", tmp_path / "two") as two:
        run([*command, "--output-dir", tmp_path / "one"])
        stdout, stderr = two.communicate(timeout=300)
    assert two.returncode == 0, stderr[-2000:]
    assert stdout.count("written:") == 1  # one process speaks
    for name in ("ce-s0", "ce-one-s0"):
        one, two = curve(tmp_path / "one", name), curve(tmp_path / "two", name)
        assert len(one) == len(two) == 8
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() & {"loss", "eval_score", "conflict_ratio", "consistency", "balance_loss"}:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-3), (name, a["step"], key)


DYING = """
import torch
real, count = torch.optim.AdamW.step, []
def step(self, *args, **kwargs):
    count.append(1)
    assert len(count) < 5
    return real(self, *args, **kwargs)
torch.optim.AdamW.step = step
"""


def test_resume_in_two_processes(words, tmp_path, server):  # noqa: F811
    """With dropout: each process has random numbers of its own, and gets them back."""
    command = [*words, "--save-steps", "2", "--save-model", "--epochs", "2"]
    assert Launched(2, "glue_moefy.py", *command, "--output-dir", tmp_path / "whole").wait().returncode == 0
    killed = Launched(2, "glue_moefy.py", *command, "--output-dir", tmp_path / "cut", before=DYING).wait()
    assert killed.returncode != 0 and list((tmp_path / "cut" / "checkpoints" / "ce-s0").glob("step-*"))
    with pytest.raises(UserError, match="is of 2 processes, not 1; start as many"):
        run([*command, "--output-dir", tmp_path / "cut", "--resume"])
    assert Launched(2, "glue_moefy.py", *command, "--output-dir", tmp_path / "cut", "--resume").wait().returncode == 0
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))
    again = Launched(2, "glue_moefy.py", *command, "--output-dir", tmp_path / "cut").wait()
    assert again.returncode == 0 and again.stdout.count("finished with the same options; nothing is trained") == 1


def test_a_batch_that_cannot_be_shared(words, tmp_path, server):  # noqa: F811
    done = Launched(2, "glue_moefy.py", *words, "--batch-size", "5").wait()
    assert done.returncode != 0 and "--batch-size 5: 2 processes share it; use a multiple" in done.stderr
    assert not (tmp_path / "out").exists()
