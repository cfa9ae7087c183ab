"""Models side by side on the same data: how good, how large, how fast."""

import contextlib
import dataclasses
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers.modeling_utils import PreTrainedModel

from ._version import __version__
from .calibration_data import model_inputs
from .class_labels import refuse_other_classes
from .data_reading import checked_inputs
from .forward_passes import lean
from .intervals import (
    accuracy_interval,
    mean_interval,
    paired_difference,
    paired_perplexity_difference,
    perplexity_interval,
)
from .models import carriers_of, device_of, evaluating, inputs_of, outputs_of, unwrap
from .predictions import UNITS, Predictions, predictions_of, without_labels
from .profiling import Latency, compare_latency, count_macs, count_parameters, describe_hardware, weights_size
from .rows import IGNORED
from .scoring import SECRET
from .sentence_models import sentence_model
from .tables import table
from .upstream import is_causal_language_model, is_classifier


CONFIDENCE = 0.95

# What a model reads -> what MACs are counted for, and what the shape of a batch is counted in.
READS = {
    "input_ids": ("token", "tokens"),
    "pixel_values": ("image", "pixels"),
    "pixel_values_videos": ("video", "pixels"),
    "input_values": ("sound", "samples"),
    "input_features": ("sound", "features"),
}


@dataclass(frozen=True)
class MeasuredModel:
    """What was measured of one model.

    Args:
        name (`str`): What the comparison calls it.
        quality (`float`): Accuracy in [0, 1], perplexity, or divergence from the first model.
        interval (`tuple[float, float]`): Its 95 % interval: of an accuracy Wilson's, of the others a bootstrap over
            sequences or inputs.
        differences (`dict[str, tuple[float, float, float]]`): Name of each earlier model -> the quality of this minus
            the quality of that, paired on the same examples, and its 95 % interval.
        parameters (`int`): Shared ones counted once.
        macs (`float`): Multiply-accumulates in linear and convolution layers, per token, image or what else is read.
        bytes (`int`, *optional*): Of the weight files, where there are any.
        latency (`float`): Median seconds of a call.
        latency_quartiles (`tuple[float, float]`): Of the same.
        ratio (`float`): Median of the calls' times divided by the first model's in the same round.
        ratio_quartiles (`tuple[float, float]`): Of the same.
    """

    name: str
    quality: float
    interval: tuple[float, float]
    differences: dict[str, tuple[float, float, float]]
    parameters: int
    macs: float
    bytes: int | None
    latency: float
    latency_quartiles: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Models measured on the same data, in one process. Prints as a table.

    Args:
        metric (`str`): `"accuracy"` (higher is better), `"perplexity"` (lower) or `"divergence"` (lower): how far
            predictions are from the first model's, see [`predictions`].
        examples (`int`): Inputs, or sequences, that quality was measured on.
        unit (`str`): What MACs are counted for: `"token"`, `"image"`, `"sound"`, `"video"` or `"input"`.
        models (`list[MeasuredModel]`): The first is what ratios refer to.
        call (`str`): What one timed call was given.
        rounds (`int`): How many calls of each model were timed.
        hardware (`str`): What it ran on.
        data (`str`, *optional*), data_config (`str`, *optional*), split (`str`, *optional*): What it was measured on.
        versions (`dict[str, str]`): Of Python and the libraries.
        measured_in (`str`, *optional*): Unit of a divergence, one of [`predictions.UNITS`].
    """

    metric: str
    examples: int
    unit: str
    models: list[MeasuredModel]
    call: str
    rounds: int
    hardware: str
    data: str | None = None
    data_config: str | None = None
    split: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    measured_in: str | None = None

    def __getitem__(self, name: str) -> MeasuredModel:
        """The model of this name.

        Raises:
            KeyError: There is none.
        """
        found = {model.name: model for model in self.models}
        if name not in found:
            raise KeyError(f"No model named {name!r} was compared; there are {list(found)}.")
        return found[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Comparison":
        """The inverse of `to_dict`, also after JSON."""
        models = [
            MeasuredModel(
                **{
                    **model,
                    **{name: tuple(model[name]) for name in ("interval", "latency_quartiles", "ratio_quartiles")},
                    "differences": {name: tuple(numbers) for name, numbers in model["differences"].items()},
                }
            )
            for model in values["models"]
        ]
        return cls(**{**values, "models": models})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Comparison":
        """What `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def rows(self) -> list[list[str]]:
        """What was measured as rows of text: the head, then one for each quantity, a column for each model."""
        first, *others = self.models
        rows = [["", *(model.name for model in self.models)]]
        unit = f", {self.measured_in}" if self.measured_in else ""
        rows.append([f"{self.metric}{unit}", *(_text(self.metric, model.quality) for model in self.models)])
        rows.append(["  95 % interval", *(_range(self.metric, model.interval) for model in self.models)])
        for base in self.models[:-1]:
            if any(base.name in model.differences for model in others):
                minus = [_difference(self.metric, model.differences.get(base.name)) for model in self.models]
                rows.append([f"  minus {base.name}", *(short for short, _ in minus)])
                rows.append(["  95 % interval", *(interval for _, interval in minus)])
        rows.append(["parameters", *(f"{model.parameters:,}" for model in self.models)])
        rows.append([f"MACs per {self.unit}", *(f"{model.macs:,.0f}" for model in self.models)])
        if any(model.bytes is not None for model in self.models):
            rows.append(
                [
                    "weights, MB",
                    *("-" if model.bytes is None else f"{model.bytes / 1e6:,.1f}" for model in self.models),
                ]
            )
        rows.append(["latency, ms", *(f"{1e3 * model.latency:.2f}" for model in self.models)])
        low_high = [model.latency_quartiles for model in self.models]
        rows.append(["  quartiles", *(f"{1e3 * low:.2f} to {1e3 * high:.2f}" for low, high in low_high)])
        rows.append([f"  relative to {first.name}", *(f"{model.ratio:.3f}" for model in self.models)])
        low_high = [model.ratio_quartiles for model in self.models]
        rows.append(["  quartiles", *(f"{low:.3f} to {high:.3f}" for low, high in low_high)])
        return rows

    def __str__(self) -> str:
        where = " ".join(str(part) for part in (self.data, self.data_config, self.split) if part is not None)
        measured = f"{self.metric}: {self.examples:,} examples" + (f" of {where}" if where else "")
        measured += f", predictions from those of {self.models[0].name}" if self.metric == "divergence" else ""
        timed = f"latency: median of {self.rounds} calls with {self.call}, in turn, on {self.hardware}"
        return f"{table(self.rows())}\n{measured}\n{timed}"


# After the point, of what is no share.
_DIGITS = {"perplexity": 3, "divergence": 5}


def _text(metric: str, value: float) -> str:
    return f"{100 * value:.2f} %" if metric == "accuracy" else f"{value:z.{_DIGITS[metric]}f}"


def _range(metric: str, interval: tuple[float, float]) -> str:
    low, high = interval
    if metric == "accuracy":
        return f"{100 * low:.2f} to {100 * high:.2f}"
    return f"{_text(metric, low)} to {_text(metric, high)}"


def _difference(metric: str, numbers: tuple[float, float, float] | None) -> tuple[str, str]:
    if numbers is None:
        return "", ""
    value, low, high = numbers
    if metric == "accuracy":
        return f"{100 * value:+.2f} points", f"{100 * low:+.2f} to {100 * high:+.2f}"
    digits = _DIGITS[metric]
    return f"{value:+z.{digits}f}", f"{low:+z.{digits}f} to {high:+z.{digits}f}"


def compare_models(
    models: Mapping[str, nn.Module],
    data: Iterable[Any],
    folders: Mapping[str, str] | None = None,
    rounds: int = 30,
    warmup: int = 5,
    source: tuple[str | None, ...] = (),
    progress: bool = True,
    processing_class: Any = None,
) -> Comparison:
    """Measures models side by side: quality on the same inputs, size, and latency in turn.

    Quality is the perplexity of causal language models on their own inputs, padding left out, or on the `labels` where
    there are any that are not -100; the accuracy of heads that give one class for each input, where batches have
    `labels`; and of everything else, without labels too, the divergence of predictions from the first model's: in nats
    of classes (of inputs, tokens, pixels) and of several labels, half the squared error of values, the cosine distance
    of embeddings; half the relative squared error of those that an object of sentence-transformers compares otherwise.

    The data are read once, and every model runs on a batch before the next is read; of them the largest batch is kept.

    Args:
        models (`dict[str, nn.Module]`): What each is called -> the model, all on one device, of one kind. The first is
            what the others are compared with, and each is compared with all before it: pass a control second to last.
        data (iterable of `dict[str, Tensor]`): Model inputs.
        folders (`dict[str, str]`, *optional*): Where weights are saved, for those whose size on disk is wanted.
        rounds, warmup (`int`): Of the timing, see [`compare_latency`]. The timed call is the largest batch.
        source (`tuple[str, ...]`): Name, configuration and split of the data, for the record.
        progress (`bool`): Whether to show progress bars.
        processing_class (*optional*): Tokenizer or processor that makes model inputs of raw texts, pairs, images or
            sounds, as [`CalibrationData`] says. Default: the data are model inputs, or what an object of
            sentence-transformers reads.

    Returns:
        [`Comparison`]

    Raises:
        ValueError: There are fewer than two models, no data, outputs that are no predictions or differ in shape,
            classes that have other names in one model than in another, labels that are none of a head's classes, or
            of some batches only.
    """
    if len(models) < 2:
        raise ValueError(f"A comparison needs at least two models, got {list(models)}.")
    _check_kinds(models)
    _check_classes(models)
    first = next(iter(models.values()))
    device = device_of(first)
    metric, scores, largest = _scored(models, model_inputs(data, processing_class, first), progress=progress)
    _check_finite(metric, scores)
    timed, main = _timed_call(first, largest, device)
    unit, counted = READS.get(main, ("input", "numbers"))
    latencies = compare_latency(models, timed, rounds, warmup, progress)
    qualities = _qualities(metric, {name: score.arrays for name, score in scores.items()})
    units = timed[main].numel() if unit == "token" else len(timed[main])
    sizes = {name: _sizes(model, name, timed, units, folders) for name, model in models.items()}
    dataset, config, split = (*source, None, None, None)[:3]
    return Comparison(
        metric=metric,
        examples=len(next(iter(scores.values())).arrays[0]),
        unit=unit,
        models=[_measured(name, qualities[name], sizes[name], latencies[name]) for name in models],
        call=f"a batch of {'x'.join(map(str, timed[main].shape))} {counted}",
        rounds=rounds,
        hardware=describe_hardware(device),
        data=dataset,
        data_config=config,
        split=split,
        versions=_versions(),
        measured_in=next(iter(scores.values())).unit,
    )


def _check_classes(models: Mapping[str, nn.Module]) -> None:
    """Raises if a classifier names its classes otherwise than the first model: labels are numbers of that."""
    (first, inner), *others = ((name, unwrap(model)[0]) for name, model in models.items())
    for name, other in others:
        if is_classifier(inner) and is_classifier(other):
            remedy = "Set `id2label` in the config where it is wrong, or train the head on the same order of classes."
            refuse_other_classes(inner.config, other.config, f"{first}'s", f"{name}'s", remedy)


def _timed_call(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> tuple[dict[str, Any], str]:
    """`(inputs, name of what the model reads among them)` of a batch, without labels if it runs without."""
    inner = unwrap(model)[0]
    timed = inputs_of(without_labels(inner, batch), device)
    tensors = {name: value for name, value in timed.items() if isinstance(value, torch.Tensor)}
    own = [carrier.main_input_name for _, carrier in carriers_of(inner)]
    # Of a model in several parts some batches have only what one of these reads.
    known = [name for name in (*own, *READS) if name in tensors]
    return timed, known[0] if known else max(tensors, key=lambda name: tensors[name].numel())


def _qualities(metric: str, scores: Mapping[str, tuple[np.ndarray, ...]]) -> dict[str, dict[str, Any]]:
    """Of each model its quality, the interval of that, and the differences from all models before it."""
    qualities: dict[str, dict[str, Any]] = {}
    for name, score in scores.items():
        quality, interval = _quality(metric, score)
        differences = {other: _paired(metric, score, scores[other]) for other in qualities}
        qualities[name] = {"quality": quality, "interval": interval, "differences": differences}
    return qualities


def _sizes(
    model: nn.Module, name: str, timed: Mapping[str, Any], units: int, folders: Mapping[str, str] | None
) -> dict[str, Any]:
    """Parameters, MACs per token, image or what else is read, and bytes of one model."""
    return {
        "parameters": count_parameters(model),
        "macs": count_macs(model, timed) / units,
        "bytes": weights_size(folders[name]) if folders and name in folders else None,
    }


def _measured(name: str, quality: dict[str, Any], size: dict[str, Any], latency: Latency) -> MeasuredModel:
    return MeasuredModel(
        name=name,
        **quality,
        **size,
        latency=latency.median,
        latency_quartiles=latency.quartiles,
        ratio=latency.ratio,
        ratio_quartiles=latency.ratio_quartiles,
    )


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_layercollapse": __version__,
    }


def _count(batch: Mapping[str, Any]) -> int:
    return max((value.numel() for value in batch.values() if isinstance(value, torch.Tensor)), default=0)


def _check_kinds(models: Mapping[str, nn.Module]) -> None:
    """Raises unless all are objects of sentence-transformers of one kind, or none is one."""
    if len({type(sentence_model(model)).__name__ for model in models.values()}) > 1:
        raise ValueError(
            f"Only models of one kind can be compared on the same inputs, got "
            f"{[type(model).__name__ for model in models.values()]}."
        )


def _metric_of(models: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> str:
    """What quality is of these models, as the first batch says it."""
    inner = [unwrap(model)[0] for model in models.values()]
    of_sentences = any(sentence_model(model) is not None for model in models.values())
    if not of_sentences and all(is_causal_language_model(model) for model in inner):
        return "perplexity"
    if _is_of_classes(batch.get("labels")) and all(map(_has_classes, inner)):
        return "accuracy"
    return "divergence"


def _is_of_classes(labels: Any) -> bool:
    """Whether labels are one class for each input, as far as their shape tells."""
    return isinstance(labels, torch.Tensor) and labels.dim() == 1 and not labels.is_floating_point()


def _has_classes(model: Any) -> bool:
    """Whether a model's head gives one of several classes, as its config says; others are told by their outputs."""
    if not isinstance(model, PreTrainedModel):
        return True
    return (model.config.num_labels or 0) > 1 and model.config.problem_type in (None, "single_label_classification")


@dataclass(frozen=True)
class _Score:
    """What was measured of each example.

    Args:
        arrays (`tuple[np.ndarray, ...]`): Whether it is right; or what is summed over it, and over how many tokens or
            predictions.
        unit (`str`, *optional*): Of a divergence.
    """

    arrays: tuple[np.ndarray, ...]
    unit: str | None = None


def _scored(
    models: Mapping[str, nn.Module], data: Iterable[Any], metric: str | None = None, progress: bool = False
) -> tuple[str, dict[str, _Score], Mapping[str, Any]]:
    """`(metric, what was measured of each model, the largest batch)`, from one reading of the data. Where no metric is
    given, the first batch says which."""
    largest: Mapping[str, Any] = {}
    parts: dict[str, list[_Score]] = {name: [] for name in models}
    with contextlib.ExitStack() as modes, torch.no_grad():
        for model in models.values():
            modes.enter_context(evaluating(model))
        for batch in map(checked_inputs, tqdm(data, desc="Scoring", leave=False, disable=not progress)):
            metric = metric or _metric_of(models, batch)
            for name, score in _scores_on(batch, models, metric).items():
                parts[name].append(score)
            if not largest or _count(batch) > _count(largest):
                largest = batch
    if metric is None or not largest:
        raise ValueError("The data is empty: it must give at least one batch of model inputs.")
    return metric, {name: _joined(scores) for name, scores in parts.items()}, largest


def _joined(parts: Sequence[_Score]) -> _Score:
    arrays = zip(*(part.arrays for part in parts), strict=True)
    return _Score(tuple(np.concatenate(of_batches) for of_batches in arrays), parts[0].unit)


def _scores_on(batch: Mapping[str, Any], models: Mapping[str, nn.Module], metric: str) -> dict[str, _Score]:
    """What is measured of each model on one batch. Outputs, which may be large, are let go before the next model runs,
    but for the first one's where the others' are compared with them."""
    if metric == "divergence":
        return _divergences_on(batch, models)
    if metric == "accuracy" and not _is_of_classes(batch.get("labels")):
        raise ValueError(
            "The first batches have `labels` of classes and a later one has none: pass labels with all of them, or "
            "with none to compare predictions."
        )
    return {name: _score_on(inputs_of(batch, device_of(model)), model, metric, name) for name, model in models.items()}


def _score_on(batch: Mapping[str, Any], model: nn.Module, metric: str, name: str) -> _Score:
    logits = outputs_of(model, lean(unwrap(model)[0], batch))["logits"]
    if metric == "accuracy":
        _check_logits(name, logits, batch["labels"])
        return _Score(((logits.argmax(-1) == batch["labels"]).cpu().numpy(),))
    return _Score(_losses(logits, batch))


def _divergences_on(batch: Mapping[str, Any], models: Mapping[str, nn.Module]) -> dict[str, _Score]:
    """How far the predictions for each example are from the first model's; 0 of that itself."""
    first = next(iter(models.values()))
    inputs = inputs_of(batch, device_of(first))
    outputs = outputs_of(first, lean(unwrap(first)[0], inputs))
    return {name: _divergence_on(inputs, model, first, outputs, name) for name, model in models.items()}


def _divergence_on(inputs: Mapping[str, Any], model: nn.Module, first: nn.Module, outputs: Any, name: str) -> _Score:
    """The same of one model, from these outputs of the first one."""
    inner = unwrap(model)[0]
    then = predictions_of(inner, inputs, outputs)
    now = then if model is first else predictions_of(inner, inputs, outputs_of(model, lean(inner, inputs)))
    return _Score(_by_input(now, then, name), UNITS[now[0].kind])


def _check_finite(metric: str, scores: Mapping[str, _Score]) -> None:
    for name, score in scores.items():
        if not np.isfinite(score.arrays[0]).all():
            if metric == "perplexity":
                raise ValueError(f"The loss of {name} is not finite.")
            raise ValueError(f"How far predictions of {name} are from the first model's is not finite.")


def _by_input(
    predictions: Sequence[Predictions], reference: Sequence[Predictions], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """`(sums, counts)`: how far predictions are apart for one batch, shape `(inputs,)` each."""
    divergences, owners = [], []
    for now, then in zip(predictions, reference, strict=True):
        try:
            divergence = now.divergence_from(then)
        except ValueError as error:
            raise ValueError(f"{name} beside the first model: {error}") from error
        divergences.append(divergence.cpu().double())
        owners.append(torch.arange(len(now.values)) if now.inputs is None else now.inputs.cpu())
    owner = torch.cat(owners).numpy()
    return np.bincount(owner, torch.cat(divergences).numpy()), np.bincount(owner)


def _check_logits(name: str, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Raises where outputs are no scores of classes for each input, or labels are none of these."""
    classes = logits.shape[-1]
    if logits.shape[:-1] != labels.shape or classes < 2:
        raise ValueError(
            f"{name} gives outputs of shape {tuple(logits.shape)} for {labels.shape[0]} inputs: an accuracy needs one "
            "score for each of several classes. Without labels predictions are compared with the first model's."
        )
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(
            f"The labels go from {labels.min()} to {labels.max()}, and {name} has the classes 0 to {classes - 1}."
            + SECRET
        )


def _losses(logits: torch.Tensor, batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    # Labels say what of the inputs is predicted (an answer, say, and not the question).
    labels = batch.get("labels", batch["input_ids"])
    targets = labels[:, 1:]
    mask = batch.get("attention_mask")
    real = targets != IGNORED
    if mask is not None:
        real &= (mask[:, 1:] * mask[:, :-1]).bool()
    targets = targets.masked_fill(~real, 0)
    loss = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
    real = real.cpu()
    return (loss.cpu().double() * real).sum(1).numpy(), real.sum(1).numpy()


def _quality(metric: str, score: tuple[np.ndarray, ...]) -> tuple[float, tuple[float, float]]:
    if metric == "accuracy":
        return float(score[0].mean()), accuracy_interval(int(score[0].sum()), len(score[0]), CONFIDENCE)
    sums, counts = score
    interval = perplexity_interval if metric == "perplexity" else mean_interval
    value, low, high = interval(sums, counts, confidence=CONFIDENCE)
    return value, (low, high)


def _paired(
    metric: str, score: tuple[np.ndarray, ...], baseline: tuple[np.ndarray, ...]
) -> tuple[float, float, float]:
    if metric == "accuracy":
        return paired_difference(score[0], baseline[0], CONFIDENCE)
    if metric == "divergence":
        return mean_interval(score[0], score[1], baseline[0], CONFIDENCE)
    return paired_perplexity_difference(score[0], baseline[0], score[1], CONFIDENCE)


def prediction_divergence(
    model: nn.Module, reference: nn.Module, data: Iterable[Any], processing_class: Any = None
) -> float:
    """How far what a model predicts is from what another one predicts, mean over all predictions. Needs no labels.

    What plans and recoveries are measured by: `KL(reference || model)` in nats for classes, tokens and several labels,
    half the squared error of values, `1 - cos` of embeddings. 0 where they agree.

    Args:
        model (`nn.Module`): A collapsed one, say. Both run in evaluation mode; their modes are put back.
        reference (`nn.Module`): With the same head, as the dense model.
        data (iterable of `dict[str, Tensor]`): Model inputs; for the plan of a model take others than it was fitted
            to.
        processing_class (*optional*): Tokenizer or processor that makes model inputs of raw texts, pairs, images or
            sounds, as [`CalibrationData`] says. Default: the data are model inputs.

    Raises:
        ValueError: There is no data, outputs are no predictions, or the two do not predict the same things.
    """
    models = {"the reference": reference, "the model": model}
    _, scores, _ = _scored(models, model_inputs(data, processing_class, model), "divergence")
    sums, counts = scores["the model"].arrays
    return float(sums.sum() / counts.sum())


def weights_folder(name: str) -> str:
    """The folder that a model was loaded from: itself, or what the Hub's cache holds of that name."""
    if os.path.isdir(name):
        return name
    return os.path.dirname(str(transformers.utils.cached_file(name, transformers.utils.CONFIG_NAME)))
