"""Metrics that need no Hub. How far what they give can be trusted says `intervals.py`, whose names stand here too.

`evaluate.load("accuracy")` downloads a script; the classes here are `evaluate.Metric`s with the same call, so they
work offline, with `compute`, `add_batch`, `evaluate.combine` and `evaluate.evaluator`.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from .intervals import accuracy_interval as accuracy_interval
from .intervals import bootstrap_interval as bootstrap_interval
from .intervals import mean_interval as mean_interval
from .intervals import paired_difference as paired_difference
from .intervals import paired_perplexity_difference as paired_perplexity_difference
from .intervals import perplexity_interval as perplexity_interval


class _OfflineMetric(evaluate.Metric):
    """Keeps what is added in memory: a metric that needs no Hub needs no cache folder either."""

    def __init__(self, keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)


class Accuracy(_OfflineMetric):
    """Share of predictions that equal the reference: `{"accuracy": float in [0, 1]}`.

    Args:
        predictions, references (`Sequence[int]`): Class indices, of the same length.

    Example:

    ```python
    Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])  # {"accuracy": 0.667}
    ```
    """

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description="Share of predictions that equal the reference.",
            citation="",
            inputs_description="predictions, references: class indices.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class Perplexity(_OfflineMetric):
    """Perplexity of a corpus, `exp(total negative log-likelihood / number of tokens)`: `{"perplexity": float >= 1}`.

    It is the exponential of the mean over *tokens*: averaging the perplexities, or the mean losses, of batches that
    differ in length gives another number.

    Args:
        predictions (`Sequence[float]`): Negative log-likelihood of each sequence or batch, summed over its predicted
            tokens, in nats.
        references (`Sequence[int]`): How many tokens were predicted in each.
    """

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description="exp(total negative log-likelihood / number of tokens).",
            citation="",
            inputs_description="predictions: summed negative log-likelihoods in nats; references: token counts.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"perplexity": float(np.exp(np.sum(predictions) / np.sum(references)))}
