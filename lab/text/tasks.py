"""The tasks of GLUE, one row each. Standard library only, so that --help answers at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """What a task's data look like, and how it is scored."""

    columns: tuple[str, ...]  # one sentence or two
    metrics: tuple[str, ...]  # their mean is the score
    rows: int  # of the official training set
    dev_rows: int  # of the official (first) dev set: a run on fewer of either gets a name of its own
    num_labels: int = 2  # 1: a regression
    dev: tuple[str, ...] = ("validation",)  # the first is the score's; a second one's metrics end in _mm
    epochs: int = 10  # at most


# Epochs as in DynMoE's runs; the others of their size alike.
TASKS = {
    "cola": Task(("sentence",), ("matthews",), 8551, 1043),
    "mrpc": Task(("sentence1", "sentence2"), ("accuracy", "f1"), 3668, 408),
    "qnli": Task(("question", "sentence"), ("accuracy",), 104743, 5463, epochs=3),
    "mnli": Task(
        ("premise", "hypothesis"), ("accuracy",), 392702, 9815, 3, ("validation_matched", "validation_mismatched"), epochs=3
    ),
    "rte": Task(("sentence1", "sentence2"), ("accuracy",), 2490, 277),
    "sst2": Task(("sentence",), ("accuracy",), 67349, 872, epochs=3),
    "qqp": Task(("question1", "question2"), ("accuracy", "f1"), 363846, 40430, epochs=3),
    "stsb": Task(("sentence1", "sentence2"), ("pearson", "spearman"), 5749, 1500, num_labels=1),
    "wnli": Task(("sentence1", "sentence2"), ("accuracy",), 635, 71),
}
PAPER = ("cola", "mrpc", "qnli", "mnli", "rte")  # the columns of its table
