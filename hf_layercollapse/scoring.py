"""What plans are scored on and by: the loss of a model, the divergence from its own outputs, or a metric."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from .calibration import reiterable, run_over
from .rows import IGNORED, hold_back
from .upstream import is_causal_language_model, is_classifier


# What to think of where labels are no classes.
SECRET = " In test splits whose labels are kept secret they are all -1: use another split."


class Score:
    """A number per model, lower is better; `sign` turns a metric into one."""

    def __init__(self, model, inner, data, metric):
        self.model, self.inner, self.data, self.metric = model, inner, data, metric
        self.sign = 1.0 if metric is None else -1.0
        self.reference = None
        self.shifted = None  # whether the loss leaves out the first label of each row
        causal = is_causal_language_model(inner)
        first = next(iter(data), None)
        if first is None:
            raise ValueError("There is no batch to score plans on.")
        self.label = causal and "labels" not in first and "input_ids" in first
        if metric is not None:
            self.name = "metric"
        elif self.label or "labels" in first:
            self.name = "loss"
        else:
            self.name = "divergence"

    def __call__(self) -> float:
        """The score as the user reads it: a metric is higher for better."""
        if self.metric is not None:
            value = float(self.metric(self.model))
        elif self.name == "loss":
            value = self._loss()
        else:
            value = self._divergence()
        if not math.isfinite(value):
            raise ValueError(f"The {self.name} of the model on the data that plans are scored on is {value}.")
        return value

    def _loss(self):
        total = weight = 0.0

        def hook(module, args, kwargs, output):
            nonlocal total, weight
            count = self._predicted(kwargs["labels"])
            total, weight = total + float(output.loss) * count, weight + count

        if self.shifted is None:
            self.shifted = self._is_shifted()
        handle = self.model.register_forward_hook(hook, with_kwargs=True)
        run_over(self.model, self._labelled(), [handle], "Scoring")
        if not weight:
            raise ValueError(f"All labels of the data that plans are scored on are {IGNORED}: nothing is predicted.")
        return total / weight

    def _predicted(self, labels):
        """How many labels a loss is the mean of."""
        if not isinstance(labels, torch.Tensor):
            return len(labels)
        return float(((labels[:, 1:] if self.shifted else labels) != IGNORED).sum())

    def _is_shifted(self):
        """Whether labels are those of the next token, so that the first is never predicted. Causal models and some
        others (that describe images) do so, encoder-decoders and classifiers of tokens do not: the loss says it."""
        batch = next(iter(self._labelled()))
        labels = batch["labels"]
        if not isinstance(labels, torch.Tensor) or labels.dim() != 2 or labels.is_floating_point():
            return False
        without = labels.clone()
        without[:, 0] = IGNORED
        if not bool((without != IGNORED).any()):
            return False
        losses = []
        handle = self.model.register_forward_hook(lambda module, args, output: losses.append(float(output.loss)))
        run_over(self.model, [batch, {**batch, "labels": without}], [handle], "Scoring")
        return losses[0] == losses[1]

    def _labelled(self):
        for batch in self.data:
            batch = dict(batch)
            if self.label:
                labels = batch["input_ids"]
                mask = batch.get("attention_mask")
                batch["labels"] = labels if mask is None else labels.masked_fill(mask == 0, IGNORED)
            if "labels" not in batch:
                raise ValueError("Some batches to score plans on have `labels` and some have none.")
            check_classes(self.inner, batch["labels"])
            yield batch

    def _divergence(self):
        outputs = []

        def hook(module, args, output):
            value = output["logits"] if "logits" in output else output[0]
            outputs.append(value.detach().float().cpu())

        run_over(self.model, self.data, [self.model.register_forward_hook(hook)], "Scoring")
        if self.reference is None:
            self.reference = outputs
        total = weight = 0.0
        for now, dense in zip(outputs, self.reference, strict=True):
            rows = math.prod(dense.shape[:-1])
            total += rows * float(
                torch.nn.functional.kl_div(
                    now.log_softmax(-1).flatten(0, -2),
                    dense.log_softmax(-1).flatten(0, -2),
                    log_target=True,
                    reduction="batchmean",
                )
            )
            weight += rows
        return total / weight


def check_classes(model: PreTrainedModel, labels: Any) -> None:
    """Raises if labels of whole inputs are no classes of the model's head.

    Raises:
        ValueError: They are not.
    """
    if not is_classifier(model) or not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return
    classes: Any = model.config.num_labels
    if labels.dim() != 1 or classes < 2 or model.config.problem_type == "regression":
        return
    wrong = labels[((labels < 0) & (labels != IGNORED)) | (labels >= classes)]
    if len(wrong):
        raise ValueError(
            f"There are labels of {sorted(set(wrong.tolist()))[:5]}, and this {type(model).__name__} has the classes "
            f"0 to {classes - 1}." + SECRET
        )


def split(calibration_data: Iterable[Any], evaluation_data: Iterable[Any] | None) -> tuple[Any, list]:
    """`(batches to fit to, batches to score on)`; the second are held, so that every score is of the same inputs."""
    data = reiterable(calibration_data)
    return hold_back(data) if evaluation_data is None else (data, list(evaluation_data))
