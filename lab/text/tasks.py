"""The tasks of GLUE. Standard library only, so that --help answers at once."""

from dataclasses import dataclass

HUB = "nyu-mll/glue"  # their data


@dataclass(frozen=True)
class Task:
    """The data format of a task, and how it is scored."""

    columns: tuple[str, ...]  # one sentence or two
    metrics: tuple[str, ...]  # their mean is the score
    rows: int  # of the official training set
    dev_rows: int  # of the official (first) dev set; a run on another number of rows gets another name
    num_labels: int = 2  # 1 means a regression
    dev: tuple[str, ...] = ("validation",)  # the first gives the score; the metrics of a second one end in _mm
    epochs: int = 10  # at most
    also: tuple[str, ...] = ()  # a metric that is not in the score: Matthews moves by points between seeds
    labels: tuple[str, ...] = ()  # GLUE's names of the classes, in the order of their numbers


ENTAILMENT, DUPLICATE = ("entailment", "not_entailment"), ("not_duplicate", "duplicate")
NLI, HALVES = ("entailment", "neutral", "contradiction"), ("validation_matched", "validation_mismatched")
# Epochs as in DynMoE's runs; other tasks get the epochs of a task of similar size.
TASKS = {
    "cola": Task(("sentence",), ("matthews",), 8551, 1043, also=("accuracy",), labels=("unacceptable", "acceptable")),
    "mrpc": Task(("sentence1", "sentence2"), ("accuracy", "f1"), 3668, 408, labels=("not_equivalent", "equivalent")),
    "qnli": Task(("question", "sentence"), ("accuracy",), 104743, 5463, epochs=3, labels=ENTAILMENT),
    "mnli": Task(("premise", "hypothesis"), ("accuracy",), 392702, 9815, 3, HALVES, epochs=3, labels=NLI),
    "rte": Task(("sentence1", "sentence2"), ("accuracy",), 2490, 277, labels=ENTAILMENT),
    "sst2": Task(("sentence",), ("accuracy",), 67349, 872, epochs=3, labels=("negative", "positive")),
    "qqp": Task(("question1", "question2"), ("accuracy", "f1"), 363846, 40430, epochs=3, labels=DUPLICATE),
    "stsb": Task(("sentence1", "sentence2"), ("pearson", "spearman"), 5749, 1500, num_labels=1),
    "wnli": Task(("sentence1", "sentence2"), ("accuracy",), 635, 71, labels=ENTAILMENT[::-1]),
}
TITLES = {"cola": "CoLA", "mrpc": "MRPC", "qnli": "QNLI", "mnli": "MNLI", "rte": "RTE"}  # the columns of the paper's table
