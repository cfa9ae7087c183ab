"""What a model predicts, whatever its head: independent predictions, how far two of them are apart, and draws of them.

The unit is nats for everything that has a likelihood: classes (of inputs, of tokens, of start and end positions),
several labels, and values, which count as normal with variance 1. Embeddings have a direction and no likelihood: there
it is the cosine distance. Vectors that are compared by dot product or distance, as a sparse encoder's are, have a
length too: they are apart by half of the squared error in shares of the squared length, which of vectors of equal
lengths is the cosine distance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.modeling_utils import PreTrainedModel

from . import functional
from .models import is_encoder_decoder
from .rows import IGNORED


# Kind of predictions -> unit of how far they are apart.
UNITS = {
    "classes": "nats",
    "labels": "nats",
    "values": "squared error / 2",
    "embedding": "cosine distance",
    "vector": "relative squared error / 2",
}

# Squared length of a vector that is as good as none: a sparse one may have no entry.
LEAST_LENGTH = 1e-12


@dataclass(frozen=True)
class Predictions:
    """Some independent predictions of one kind.

    Args:
        kind (`str`): `"classes"` (of a softmax), `"labels"` (a sigmoid each), `"values"`, `"embedding"` or
            `"vector"`.
        values (`Tensor`): Shape `(n, c)`: logits, values, embeddings or vectors, one row a prediction.
        inputs (`Tensor`, *optional*): Shape `(n,)`: of which input of the batch each is. Default: one of each.
    """

    kind: str
    values: torch.Tensor
    inputs: torch.Tensor | None = None

    def divergence_from(self, reference: "Predictions") -> torch.Tensor:
        """How far each prediction is from what it was, shape `(n,)`, >= 0: `KL(reference || self)` in nats, half the
        squared error of values, `1 - cos` of embeddings, half the relative squared error of vectors.

        Raises:
            ValueError: They are of different kinds or shapes, as those of models with different heads.
        """
        if self.kind != reference.kind or self.values.shape != reference.values.shape:
            raise ValueError(
                f"Predictions ({self.kind}) of shape {tuple(self.values.shape)} and ({reference.kind}) of shape "
                f"{tuple(reference.values.shape)}: they cannot be compared, as both models must have the same head."
            )
        rows = max(1, functional.OUTPUTS // self.values.shape[-1])
        pairs = zip(self.values.split(rows), reference.values.split(rows), strict=True)
        return torch.cat([self._divergences(now, before) for now, before in pairs])

    def _divergences(self, now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        now, before = now.float(), before.to(now.device).float()
        if self.kind == "classes":
            return functional.soft_target_loss(now, before)
        if self.kind == "labels":
            return functional.soft_binary_loss(now, before).sum(-1)
        if self.kind == "values":
            return (now - before).square().sum(-1) / 2
        if self.kind == "vector":
            return (now - before).square().sum(-1) / (2 * before.square().sum(-1).clamp_min(LEAST_LENGTH))
        return 1 - F.cosine_similarity(now, before, dim=-1)

    def sampled_score(self, generator: torch.Generator) -> torch.Tensor:
        """A scalar whose gradient is that of the log likelihood of outcomes drawn from the predictions themselves,
        summed over them.

        Its second moment is the curvature of [`~Predictions.divergence_from`] at the reference: of the KL divergence
        (the Fisher information), of half the squared error, relative or not, and of the cosine distance.

        Args:
            generator (`torch.Generator`): Of the CPU; what is drawn depends on nothing else.
        """
        if self.kind == "classes":
            drawn, logs = functional.drawn_classes(self.values.detach(), generator)
            return _LogProbability.apply(self.values, drawn, logs.sum())
        values = self.values.float()
        with torch.no_grad():
            if self.kind == "labels":
                drawn = torch.bernoulli(values.sigmoid().cpu(), generator=generator)
            else:
                drawn = torch.randn(values.shape, generator=generator, dtype=torch.float32, device="cpu")
            drawn = drawn.to(values.device)
        if self.kind == "labels":
            return -F.binary_cross_entropy_with_logits(values, drawn, reduction="sum")
        if self.kind == "vector":
            length = values.detach().square().sum(-1, keepdim=True).clamp_min(LEAST_LENGTH).sqrt()
            return (drawn * values / length).sum()
        return (drawn * (values if self.kind == "values" else F.normalize(values, dim=-1))).sum()


class _LogProbability(torch.autograd.Function):
    """The logarithm of the probability of the classes that were drawn, which is given. Its gradient is worked out from
    the logits on the way back: of a large vocabulary each copy that autograd makes is as much as what the model gave.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, drawn: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, drawn)
        return score.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, drawn = ctx.saved_tensors
        gradient = functional.log_probability_gradient(logits, drawn)
        return gradient.mul_(grad), None, None


def number_of(predictions: Sequence[Predictions]) -> int:
    """How many they are: start and end of an answer are two."""
    return sum(len(part.values) for part in predictions)


# Names under which models give embeddings of whole inputs.
_EMBEDDINGS = ("sentence_embedding", "text_embeds", "image_embeds", "audio_embeds", "embeddings")


def holds_predictions(outputs: Any) -> bool:
    """Whether what a model gave has a name under which predictions are known: some losses have it give none, since
    they make no logits."""
    if not isinstance(outputs, Mapping):
        return False
    names = ("logits", "start_logits", "scores", "sentence_vector", *_EMBEDDINGS, "last_hidden_state")
    return any(isinstance(outputs.get(name), torch.Tensor) for name in names)


def predictions_of(model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> list[Predictions]:
    """What a model predicts for one batch, padding left out.

    Args:
        model (`nn.Module`): The model itself, not wrapped.
        inputs (`Mapping`): What it was given; the masks are used, labels only for their type.
        outputs (`Mapping`): What it gave.

    Raises:
        ValueError: The outputs hold nothing that is known to be a prediction.
    """
    if not isinstance(outputs, Mapping):
        raise ValueError("Predictions are read from the model's outputs by name: leave `return_dict=False` out.")
    given = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    if "start_logits" in given and "end_logits" in given:
        return [Predictions("classes", given[name]) for name in ("start_logits", "end_logits")]
    logits = given.get("logits")
    if logits is not None and logits.dim() == 4:  # segmentation: (inputs, classes, height, width)
        pixels = logits.movedim(1, -1)
        return [Predictions("classes", pixels.flatten(0, -2), _inputs_of_rows(pixels))]
    if logits is not None and logits.dim() == 2:
        return [Predictions(_kind_of(model, inputs, logits), logits)]
    if logits is not None and logits.dim() == 3:
        return [_of_tokens(model, inputs, logits)]
    if "sentence_vector" in given:
        return [Predictions("vector", given["sentence_vector"])]
    embeddings = [given[name] for name in _EMBEDDINGS if name in given and given[name].dim() == 2]
    if embeddings:
        return [Predictions("embedding", value) for value in embeddings]
    hidden = given.get("last_hidden_state")
    if hidden is not None and hidden.dim() >= 3:
        return [Predictions("embedding", _mean_of_real(model, inputs, hidden))]
    raise ValueError(
        f"This {type(model).__name__} gives {sorted(outputs)}, of which nothing is known to be a prediction. Known "
        "are `logits` of shape (inputs, classes) or (inputs, tokens, classes), `start_logits` with `end_logits`, "
        f"{', '.join(f'`{name}`' for name in _EMBEDDINGS)} and `last_hidden_state`."
    )


def without_labels(model: nn.Module, inputs: Mapping[str, Any]) -> dict:
    """Model inputs without labels, which predictions do not need, except where decoder inputs are made from them."""
    if is_encoder_decoder(model) and "decoder_input_ids" not in inputs:
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name != "labels"}


def _kind_of(model: Any, inputs: Mapping[str, Any], logits: torch.Tensor) -> str:
    if logits.dim() == 3:
        return "classes" if logits.shape[-1] > 1 else "values"
    kind = model.config.problem_type if isinstance(model, PreTrainedModel) else None
    if kind == "regression" or (kind is None and logits.shape[-1] == 1):
        return "values"
    labels = inputs.get("labels")
    several = isinstance(labels, torch.Tensor) and labels.is_floating_point() and labels.shape == logits.shape
    return "labels" if kind == "multi_label_classification" or several else "classes"


def _real_mask(model: Any, inputs: Mapping[str, Any], shape: Sequence[int]) -> torch.Tensor | None:
    """Which positions of an output are no padding, or `None` where no mask has its shape."""
    decoder = is_encoder_decoder(model)
    mask = inputs.get("decoder_attention_mask" if decoder else "attention_mask")
    labels = inputs.get("labels")
    if decoder and mask is None and isinstance(labels, torch.Tensor) and not labels.is_floating_point():
        mask = labels != IGNORED
    return mask if isinstance(mask, torch.Tensor) and mask.shape == shape else None


def _of_tokens(model: Any, inputs: Mapping[str, Any], logits: torch.Tensor) -> Predictions:
    rows, owners = logits.flatten(0, -2), _inputs_of_rows(logits)
    mask = _real_mask(model, inputs, logits.shape[:-1])
    real = None if mask is None else mask.reshape(-1).to(rows.device) > 0
    if real is not None and not bool(real.all()):
        rows, owners = rows[real], owners[real]
    return Predictions(_kind_of(model, inputs, logits), rows, owners)


def _inputs_of_rows(values: torch.Tensor) -> torch.Tensor:
    """Of which input each row is, of values of shape `(inputs, ..., c)`."""
    return torch.arange(values.shape[0], device=values.device).repeat_interleave(values[0, ..., 0].numel())


def _mean_of_real(model: Any, inputs: Mapping[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    if hidden.dim() > 3:  # feature maps: (inputs, channels, height, width)
        return hidden.flatten(2).mean(-1)
    mask = _real_mask(model, inputs, hidden.shape[:-1])
    if mask is None:
        return hidden.mean(1)
    # Sums of many tokens are beyond half precision, as `mean` knows.
    weights = (mask.to(hidden.device) > 0).float()[..., None]
    return ((hidden.float() * weights).sum(1) / weights.sum(1).clamp_min(1)).to(hidden.dtype)
