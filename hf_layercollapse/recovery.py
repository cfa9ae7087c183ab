"""Recovery: a short training on unlabelled inputs after a collapse, towards what the dense model predicts."""

import contextlib
import dataclasses
import itertools
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from . import processes
from .calibration_data import CalibrationData, both_model_inputs
from .class_labels import refuse_other_classes
from .data_reading import shuffled, split_data
from .forward_passes import lean
from .memory import MemoryBudget
from .models import device_of, evaluating, inputs_of, is_encoder_decoder, outputs_of, unwrap
from .patching import alpha_parameters
from .predictions import UNITS, Predictions, predictions_of
from .rows import DistinctRows
from .sentence_models import sentence_model
from .tables import table
from .upstream import is_causal_language_model, is_classifier


# Share of all steps in which the learning rate rises to its full value; it then falls to 0, both linearly.
WARMUP_RATIO = 0.1

# Largest norm of all gradients together, as in `TrainingArguments`.
MAX_GRAD_NORM = 1.0

# What losses of float16 models are multiplied by at first: with that of `GradScaler`, 16 times as large, some of the
# few steps may be lost to numbers beyond float16's.
FIRST_SCALE = 2.0**12

# Rows of a step where raw data are given, as runs were measured with (MiniLM on SST-2). Of long ones fewer: so many as
# have this many tokens together (eight of 512); of a language model, which predicts each of them, this many (SmolLM2
# was measured with one window of 1,024).
STEP_ROWS, STEP_TOKENS, STEP_TOKENS_PREDICTED = 32, 4096, 1024

# How many times in a run the rows held aside are measured. What is lost at the highest rate comes back as it falls (a
# plan of MiniLM at 20 %: 0.0105 before, 0.0134 after 50 of 150 steps), so that a run only ends where it is at more
# than twice what it began with, so many times in turn.
EVALUATIONS = 6
HOPELESS, PATIENCE = 2.0, 3


@dataclass(frozen=True)
class RecoveryReport:
    """What a recovery gained. Prints as a table.

    Args:
        unit (`str`): Of the divergences: `"nats"`, or `"cosine distance"` for embeddings, `"squared error / 2"` for
            values.
        before, after (`float`): Mean divergence of a prediction from the teacher's, on rows held aside.
        steps (`int`): Optimizer steps that were taken.
        best_step (`int`): Of the weights that were kept; 0: as they were.
        curve (`list[tuple[int, float | None, float]]`): Step, mean divergence in training since the one before, and
            on the rows held aside.
        predictions, held_aside (`int`): What was trained on, counted once, and what was held aside.
        seconds (`float`): In all.
    """

    unit: str
    before: float
    after: float
    steps: int
    best_step: int
    curve: list[tuple[int, float | None, float]]
    predictions: int
    held_aside: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [["step", "in training", "held aside"]]
        for step, training, held in self.curve:
            mark = "  kept" if step == self.best_step else ""
            rows.append([str(step), "" if training is None else f"{training:z.5f}", f"{held:z.5f}{mark}"])
        return (
            f"{table(rows)}\ndivergence from the teacher in {self.unit}, on {self.held_aside:,} predictions held "
            f"aside: {self.before:z.5f} -> {self.after:z.5f}; trained on {self.predictions:,}, {self.seconds:.0f} s"
        )


def recover_model(
    model: nn.Module,
    teacher: nn.Module,
    calibration_data: Iterable[Any],
    max_steps: int = 150,
    learning_rate: float = 5e-5,
    evaluation_data: Iterable[Any] | None = None,
    top_k: int | None = None,
    seed: int = 0,
    processing_class: Any = None,
    batch_size: int | None = None,
) -> RecoveryReport:
    """Trains a collapsed model in place for a few minutes, towards the teacher's predictions; needs no labels.

    The loss is the divergence of the predictions: KL for classes, tokens and several labels (distillation at
    temperature 1, arXiv 1503.02531), half the squared error for values, the cosine distance for embeddings (half the
    relative squared error for those of an object that compares them otherwise, as a `SparseEncoder` does). Dropout is
    off, the optimizer is AdamW without weight decay, the learning rate rises over a tenth of the steps and falls to 0.
    After least squares more is not better: at 2e-4 Adam leaves the fit and does not come back, at 3e-5 to 5e-5 it
    gains. More rows help more than more steps.

    Rows held aside are measured in between: what was best on them is kept, and a run that only loses ends early.

    Args:
        model (`nn.Module`): Collapsed, or any model that is to come closer to the teacher. Trained are the parameters
            that want gradients; alphas stay. A PeftModel trains its adapter. The model computes in its own precision
            throughout; of trained weights in half precision float32 copies take the steps.
        teacher (`nn.Module`): The dense model, with the same head; of a `SentenceTransformer` another one. It runs in
            evaluation mode, unchanged.
        calibration_data (iterable of `dict[str, Tensor]`): Model inputs; their batches, without what is held aside of
            them, are those of the training. Of raw data, and of [`CalibrationData`] made of some, rows are put
            together anew, as `batch_size` says. Batches come in an order of each epoch's own, and none is held where
            the data can be asked for any of them (a list, a `DataLoader` in order, `CalibrationData`).
        max_steps (`int`): Optimizer steps at most, one batch each.
        learning_rate (`float`): The highest.
        evaluation_data (*optional*): Rows to hold aside. Default: a quarter of the calibration data's rows.
        top_k (`int`, *optional*): Keep the teacher's `k` largest classes and the mass of all others of each
            prediction, from one pass over the data, in place of asking it in every step. Default: ask it.
        seed (`int`): Of the order of batches.
        processing_class (*optional*): Tokenizer or processor that makes model inputs of raw texts, pairs, images or
            sounds, as [`CalibrationData`] says. Default: the data are model inputs, or what an object of
            sentence-transformers reads.
        batch_size (`int`, *optional*): Rows of a step, of raw data and [`CalibrationData`]. Default: 32; of long rows
            so many as have 4,096 tokens on average (eight of 512), of a language model 1,024.

    Returns:
        [`RecoveryReport`]

    Raises:
        TypeError: The model is wrapped or sharded for distributed training, or an argument of a wrong type.
        ValueError: The teacher is the model, predicts something else or has other classes, the data is empty or the
            model cannot take it, `batch_size` is given for data that come in batches, nothing is to be trained, or a
            loss is not finite. The model is as it was then.
    """
    _check_numbers(max_steps, learning_rate, top_k, batch_size)
    inner, _ = unwrap(model)
    parameters = _trained(model, inner, teacher)
    data = both_model_inputs(calibration_data, evaluation_data, processing_class, model)
    _check_labels(inner, unwrap(teacher)[0])
    _refuse_several_processes()
    rows, held = split_data(*data, MemoryBudget(), is_encoder_decoder(inner))
    training = _in_steps(rows, data[0], inner, batch_size, seed)
    started = time.perf_counter()
    with evaluating(model), evaluating(teacher), _restored_on_failure(model, parameters):
        run = _Run(model, inner, _Targets(teacher, top_k), parameters, learning_rate, max_steps, seed)
        curve, best, held_count = _steps_to_the_best(run, training, held)
    (_, _, before), (steps, _, _) = curve[0], curve[-1]
    seconds = time.perf_counter() - started
    return RecoveryReport(
        run.targets.unit, before, best.value, steps, best.step, curve, run.predictions, held_count, seconds
    )


def step_rows(inner: Any, tokens: float) -> int:
    """How many rows a step takes where nothing else is said.

    Args:
        inner (`nn.Module`): The model, unwrapped.
        tokens (`float`): Of a row on average; 0 of images and sounds.
    """
    most = STEP_TOKENS_PREDICTED if is_causal_language_model(inner) else STEP_TOKENS
    return max(1, min(STEP_ROWS, int(most // max(1.0, tokens))))


def _in_steps(
    rows: DistinctRows, data: Any, inner: Any, batch_size: int | None, seed: int
) -> DistinctRows | CalibrationData:
    """The rows to train on in the batches of the steps: of a size of their own, or those that were given."""
    if not isinstance(data, CalibrationData) or data.given is not None or not rows.divisible:
        if batch_size is not None:
            raise ValueError(
                "`batch_size` is of rows, and the recovery data come in batches, which are those of the training: "
                "pass batches of that size, or raw data with their `processing_class`."
            )
        return rows
    if batch_size is None:
        batch_size = step_rows(inner, sum(rows.tokens_of.values()) / max(1, rows.distinct))
    return data.regrouped(rows.places, batch_size, seed)


def _steps_to_the_best(
    run: "_Run", training: DistinctRows | CalibrationData, held: list[dict[str, Any]]
) -> "tuple[list[tuple[int, float | None, float]], _Best, int]":
    """Trains until the last step, or until it only loses, and puts back the weights that were best on the rows held
    aside: `(curve, best, predictions held aside)`, the curve as in [`RecoveryReport`]."""
    before, held_count = run.measure(held)
    curve: list[tuple[int, float | None, float]] = [(0, None, before)]
    best, lost = _Best(run.parameters, before), 0
    for step, loss in run.steps(training, every=max(1, -(-run.max_steps // EVALUATIONS))):
        value, _ = run.measure(held)
        curve.append((step, loss, value))
        best.see(step, value)
        lost = lost + 1 if value > HOPELESS * before else 0
        if lost == PATIENCE:
            break
    best.put_back()
    return curve, best, held_count


def _refuse_several_processes() -> None:
    if processes.count() > 1:
        raise ValueError(
            "`recover_model` trains in one process. In several, train the collapsed model with LayerCollapseTrainer, "
            "`distillation_weight` and the dense model as `teacher`."
        )


def _trained(model: nn.Module, inner: Any, teacher: Any) -> list[nn.Parameter]:
    """The parameters that are to be trained.

    Raises:
        TypeError, ValueError: There are none that can be, or the teacher is no other model.
    """
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"`teacher` must be a model, got {type(teacher).__name__}.")
    kinds = [type(sentence_model(each)).__name__ for each in (model, teacher)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"Model and teacher must be of one kind to be given the same, got a {type(model).__name__} and a "
            f"{type(teacher).__name__}."
        )
    if unwrap(teacher)[0] is inner:
        raise ValueError("`teacher` is the model itself; pass the dense model, a copy of what was collapsed.")
    frozen = {id(alpha) for alpha in alpha_parameters(inner)}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in frozen]
    if not parameters:
        raise ValueError("No parameter of the model wants a gradient, so there is nothing to train.")
    if not all(p.is_floating_point() for p in parameters):
        raise ValueError("Quantized weights cannot be trained: put an adapter (LoRA) on the model and pass that.")
    return parameters


class _Best:
    """The weights at the smallest divergence so far, on the CPU."""

    def __init__(self, parameters: Sequence[nn.Parameter], value: float) -> None:
        self.parameters, self.value, self.step = parameters, value, 0
        self.kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]

    def see(self, step: int, value: float) -> None:
        if value < self.value:
            self.value, self.step = value, step
            for copy, parameter in zip(self.kept, self.parameters, strict=True):
                copy.copy_(parameter.detach())

    @torch.no_grad()
    def put_back(self) -> None:
        for copy, parameter in zip(self.kept, self.parameters, strict=True):
            parameter.copy_(copy)
        torch.clear_autocast_cache()


def _check_numbers(max_steps: Any, learning_rate: Any, top_k: Any, batch_size: Any) -> None:
    for name, value in (("max_steps", max_steps), ("top_k", top_k), ("batch_size", batch_size)):
        if value is None and name != "max_steps":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}` must be an integer, got {value!r}.")
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, (int, float)):
        raise TypeError(f"`learning_rate` must be a number, got {learning_rate!r}.")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"`learning_rate` must be in (0, inf), got {learning_rate}.")


def _check_labels(inner: Any, teacher: Any) -> None:
    """Raises if both name their classes, and name them differently: equal logits would mean something else."""
    if is_classifier(inner) and is_classifier(teacher):
        refuse_other_classes(
            teacher.config, inner.config, "The teacher's", "the model's", "Pass the dense model that was collapsed."
        )


def _predicted(who: str, model: nn.Module, inner: Any, inputs: Mapping[str, Any]) -> list[Predictions]:
    """The predictions for one batch.

    Raises:
        ValueError: The model cannot take it.
    """
    try:
        outputs = outputs_of(model, lean(inner, inputs))
    except (IndexError, KeyError, TypeError) as error:  # ids beyond the vocabulary, inputs of another kind of model
        shapes = {name: list(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        raise ValueError(
            f"The {who}, a {type(inner).__name__}, cannot take a batch of the recovery data ({shapes}): {error}. "
            "Prepare it with the tokenizer or processor of this model."
        ) from error
    return predictions_of(inner, inputs, outputs)


class _Targets:
    """What the teacher predicts for a batch: asked each time, or kept as its largest classes."""

    def __init__(self, teacher: nn.Module, top_k: int | None) -> None:
        self.teacher, self.inner, self.top_k = teacher, unwrap(teacher)[0], top_k
        self.unit = ""  # of the divergences, once something was predicted
        self._kept: dict[Any, Sequence[Predictions | _Largest]] = {}  # position of a batch -> what it predicts

    def of(self, key: Any, inputs: Mapping[str, Any]) -> "Sequence[Predictions | _Largest]":
        """The teacher's predictions; `key` tells batches apart, `None` says that they do not come again."""
        if key in self._kept:
            return self._kept[key]
        given = inputs_of(inputs, device_of(self.teacher))
        with torch.no_grad():
            found = _predicted("teacher", self.teacher, self.inner, given)
        self.unit = self.unit or UNITS[found[0].kind]
        if self.top_k is None:
            return found
        largest = [_Largest.of(part, self.top_k) for part in found]
        if key is not None:
            self._kept[key] = largest
        return largest


@dataclass(frozen=True)
class _Largest:
    """The `k` largest classes of each prediction, and all others as one: what is compared with them is reduced to the
    same, so that the divergence is a lower bound of the whole one."""

    log_probabilities: torch.Tensor  # (n, k + 1), the last of all others together
    classes: torch.Tensor  # (n, k)

    @classmethod
    def of(cls, part: Predictions, k: int) -> "Predictions | _Largest":
        if part.kind != "classes" or part.values.shape[-1] <= k + 1:
            return dataclasses.replace(part, values=part.values.cpu())
        log_p = part.values.float().log_softmax(-1)
        largest = log_p.topk(k, dim=-1).indices
        return cls(cls._reduced(log_p, largest).cpu(), largest.cpu())

    @staticmethod
    def _reduced(log_p: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        chosen = log_p.gather(-1, classes)
        others = torch.log1p(-chosen.exp().sum(-1, keepdim=True).clamp_max(1 - 1e-7))
        return torch.cat([chosen, others], dim=-1)

    def divergence(self, now: Predictions) -> torch.Tensor:
        """Of predictions by classes from these, shape `(n,)`."""
        classes = self.classes.to(now.values.device)
        reduced = self._reduced(now.values.float().log_softmax(-1), classes)
        return Predictions("classes", reduced).divergence_from(Predictions("classes", self.log_probabilities))


def _divergence(
    model: nn.Module, inner: Any, inputs: Mapping[str, Any], targets: _Targets, key: Any
) -> tuple[torch.Tensor, int]:
    """`(sum over predictions, their number)` for one batch."""
    found = _predicted("model", model, inner, inputs)
    expected = targets.of(key, inputs)
    divergences, count = [], 0
    for now, then in zip(found, expected, strict=True):
        if isinstance(then, _Largest):
            divergences.append(then.divergence(now).sum())
        else:
            divergences.append(now.divergence_from(then).sum())
        count += now.values.shape[0]
    return torch.stack(divergences).sum(), count


def _finite(value: float) -> float:
    if not torch.isfinite(torch.tensor(value)):
        raise ValueError(f"The divergence from the teacher is {value}: the model's or the teacher's outputs are.")
    return value


class _Run:
    """The optimizer's steps."""

    def __init__(
        self,
        model: nn.Module,
        inner: Any,
        targets: _Targets,
        parameters: list[nn.Parameter],
        learning_rate: float,
        max_steps: int,
        seed: int,
    ) -> None:
        self.model, self.inner, self.targets, self.parameters = model, inner, targets, parameters
        self.max_steps, self.order = max_steps, random.Random(seed)
        self.taken = _Steps(model, parameters, learning_rate)
        warmup = max(1, round(WARMUP_RATIO * max_steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.taken.optimizer,
            lambda step: min((step + 1) / warmup, (max_steps - step) / max(1, max_steps - warmup)),
        )
        self.predictions = 0  # how many different ones were trained on

    @torch.no_grad()
    def measure(self, data: Iterable[Any]) -> tuple[float, int]:
        """`(mean divergence, predictions)` on rows held aside."""
        device = device_of(self.model)
        total, count = 0.0, 0
        for index, batch in enumerate(tqdm(data, desc="Measuring", leave=False)):
            inputs = inputs_of(batch, device)
            part, rows = _divergence(self.model, self.inner, inputs, self.targets, ("held", index))
            total, count = total + float(part), count + rows
        if not count:
            raise ValueError("There is no row to hold aside: pass more calibration data, or `evaluation_data`.")
        return _finite(total / count), count

    def steps(self, data: DistinctRows | CalibrationData, every: int) -> Iterator[tuple[int, float]]:
        """Yields `(step, mean divergence since the last yield)` after every so many steps, and at the end."""
        device = device_of(self.model)
        total, count = 0.0, 0
        with tqdm(total=self.max_steps, desc="Recovering", leave=False) as progress:
            for step, (epoch, number, batch) in enumerate(self._batches(data), start=1):
                part, rows = _divergence(self.model, self.inner, inputs_of(batch, device), self.targets, number)
                self._step(part / rows)
                self.predictions += rows if epoch == 0 else 0
                total, count = total + _finite(float(part.detach())), count + rows
                progress.update()
                if step % every == 0 or step == self.max_steps:
                    yield step, total / count
                    total, count = 0.0, 0

    def _step(self, loss: torch.Tensor) -> None:
        if not loss.requires_grad:
            raise ValueError("What the model predicts depends on no parameter that is trained.")
        self.taken.take(loss)
        self.schedule.step()
        # A context of autocast around all this keeps casts of weights until it ends.
        torch.clear_autocast_cache()

    def _batches(self, data: DistinctRows | CalibrationData) -> Iterator[tuple[int, int | None, Any]]:
        """`max_steps` batches with the number of their epoch and their own, each epoch in an order of its own."""
        epochs = ((epoch, *found) for epoch in itertools.count() for found in shuffled(data, self.order))
        return itertools.islice(epochs, self.max_steps)


@contextlib.contextmanager
def _restored_on_failure(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Weights and gradients as they were, if what is done inside raises; else the gradients."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]  # alphas want some, too
    weights = [parameter.detach().to("cpu", copy=True) for parameter in trained]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, weight in zip(trained, weights, strict=True):
                parameter.copy_(weight)
        raise
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


class _Steps:
    """AdamW whose steps add up in float32: one of 5e-5 is below what bfloat16 can add to a weight.

    Of weights in half precision a float32 copy is what steps change, and they are that copy rounded. Layers of one
    model take inputs of one type, so that weights in float32 in the midst of others would take a whole base to float32
    with them. Losses of float16 models are scaled, or their gradients would be 0.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], learning_rate: float) -> None:
        self.parameters = parameters
        self.exact = [p if p.element_size() >= 4 else nn.Parameter(p.detach().float()) for p in parameters]
        self.optimizer = torch.optim.AdamW(self.exact, lr=learning_rate, weight_decay=0.0)
        scaled = any(parameter.dtype == torch.float16 for parameter in model.parameters())
        self._scaler = torch.amp.GradScaler(device_of(model).type, init_scale=FIRST_SCALE, enabled=scaled)

    def take(self, loss: torch.Tensor) -> None:
        """One step down the gradient of a loss."""
        self._scaler.scale(loss).backward()
        for parameter, exact in self._rounded():
            exact.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self._scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.exact, MAX_GRAD_NORM)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, exact in self._rounded():
                parameter.copy_(exact)

    def _rounded(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        pairs = zip(self.parameters, self.exact, strict=True)
        return ((parameter, exact) for parameter, exact in pairs if exact is not parameter)
