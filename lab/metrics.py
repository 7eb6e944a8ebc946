"""GLUE's metrics as an evaluate.Metric over scikit-learn: `evaluate.load` would download a script."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

SCORES = {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef}


class GlueMetric(evaluate.Metric):
    """The named scores of a task, and `score`, their mean: what the field's tables print. In [0, 1]; Matthews in [-1, 1]."""

    def __init__(self, names: tuple[str, ...]):
        unknown = set(names) - SCORES.keys()
        if unknown:
            raise ValueError(f"unknown metrics {sorted(unknown)}; there are {sorted(SCORES)}")
        self.score_names = names
        super().__init__(keep_in_memory=True)

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", inputs_description="class ids", features=features)

    def _compute(self, predictions, references):
        scores = {name: float(SCORES[name](references, predictions)) for name in self.score_names}
        return scores | {"score": sum(scores.values()) / len(scores)}
