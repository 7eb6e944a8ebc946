"""GLUE's metrics as an evaluate.Metric that uses scikit-learn, since `evaluate.load` would download a script."""

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def correlation(of):
    """A correlation as a score. It is 0 if one side is constant, where scipy returns NaN."""
    return lambda truth, guess: of(truth, guess)[0] if np.ptp(truth) * np.ptp(guess) else 0.0


SCORES = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews": matthews_corrcoef,
    "pearson": correlation(pearsonr),
    "spearman": correlation(spearmanr),
}


class GlueMetric(evaluate.Metric):
    """The named scores of a task, and `score`, their mean, as tables in the literature print it. In [0, 1]; Matthews and the
    correlations in [-1, 1]. Classes are given as ids, the values of a regression as floats. `also`: not in the mean."""

    def __init__(self, names: tuple[str, ...], also: tuple[str, ...] = ()):
        unknown = {*names, *also} - SCORES.keys()
        if unknown:
            raise ValueError(f"unknown metrics {sorted(unknown)}; known: {sorted(SCORES)}")
        self.score_names, self.also = names, also
        super().__init__(keep_in_memory=True)

    def _info(self):
        kind = datasets.Value("float64" if {"pearson", "spearman"} & set(self.score_names) else "int64")
        features = datasets.Features({"predictions": kind, "references": kind})
        return evaluate.MetricInfo(description=self.__doc__, citation="", inputs_description="class ids", features=features)

    def _compute(self, predictions, references):
        scores = {name: float(SCORES[name](references, predictions)) for name in self.score_names}
        more = {name: float(SCORES[name](references, predictions)) for name in self.also}
        return scores | more | {"score": sum(scores.values()) / len(scores)}
