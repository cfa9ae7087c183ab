"""What plans are scored on and by: the loss of a model, the divergence from its own outputs, or a metric."""

import math

import torch

from .calibration import reiterable, run_over
from .upstream import is_causal_language_model


class Score:
    """A number per model, lower is better; `sign` turns a metric into one."""

    def __init__(self, model, inner, data, metric):
        self.model, self.inner, self.data, self.metric = model, inner, data, metric
        self.sign = 1.0 if metric is None else -1.0
        self.reference = None
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
            labels = kwargs["labels"]
            # What the loss is the mean of: all that is not masked out; a causal model predicts no first token.
            count = float(((labels[:, 1:] if self.label else labels) != -100).sum()) or 1.0
            total, weight = total + float(output.loss) * count, weight + count

        handle = self.model.register_forward_hook(hook, with_kwargs=True)
        run_over(self.model, self._labelled(), [handle], "Scoring")
        return total / weight

    def _labelled(self):
        for batch in self.data:
            batch = dict(batch)
            if self.label:
                labels = batch["input_ids"]
                mask = batch.get("attention_mask")
                batch["labels"] = labels if mask is None else labels.masked_fill(mask == 0, -100)
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


class _Part:
    """Every fourth batch of the data, or all others."""

    def __init__(self, data, scored):
        self.data, self.scored = data, scored

    def __iter__(self):
        for index, batch in enumerate(self.data):
            if (index % 4 == 3) == self.scored:
                yield batch


def split(calibration_data, evaluation_data):
    data = reiterable(calibration_data)
    if evaluation_data is not None:
        return data, reiterable(evaluation_data)
    parts = _Part(data, False), _Part(data, True)
    if next(iter(parts[1]), None) is None:
        raise ValueError(
            "Plans are scored on every fourth batch of the calibration data, and there are fewer than four: pass more "
            "batches, or `evaluation_data`."
        )
    return parts
