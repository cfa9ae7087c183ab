"""A teacher for training: what a model's head and its blocks are to give, while alphas rise or after a collapse."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import PreTrainedModel

from . import functional
from .config import LayerCollapseConfig
from .families import FeedForwardBlock, find_feed_forward_blocks
from .forward_passes import lean
from .models import in_type_of, is_encoder_decoder, is_transformers_model, shorten, unwrap
from .patching import collapsible_activations, layer_collapse_config_of, remove_layer_collapse
from .predictions import holds_predictions, predictions_of
from .rows import IGNORED
from .selection import select_blocks
from .sentence_models import sentence_model
from .token_filter import TokenFilter
from .upstream import has_causal_loss, is_hooked


def teacher_for(model: Any, config: LayerCollapseConfig, teacher: nn.Module | None = None) -> nn.Module | None:
    """The teacher of a training run, made before the model is patched; `None` if the config asks for none.

    Args:
        model (`nn.Module`): What is going to be trained, as it comes.
        config ([`LayerCollapseConfig`]): Says whether there is distillation.
        teacher (`nn.Module`, *optional*): Taken as it is. Default: a frozen copy of the model if it is dense, or
            patched and not trained since.

    Raises:
        TypeError: `teacher` is no model.
        ValueError: There is a teacher and nothing that it teaches, the other way round, or it is the model itself.
    """
    if teacher is not None:
        check_teacher(teacher, model, config)
        return teacher.eval()
    return _frozen_copy(model, config) if config.distils else None


def check_teacher(teacher: Any, model: Any, config: LayerCollapseConfig) -> None:
    """Raises as [`teacher_for`] does for a teacher that is given."""
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"`teacher` must be a model, got {type(teacher).__name__}.")
    if not config.distils:
        raise ValueError(
            "There is a `teacher`, but `distillation_weight` and `hidden_state_weight` of the "
            "`layer_collapse_config` are both 0. Set at least one, or leave the teacher out."
        )
    if unwrap(teacher)[0] is unwrap(model)[0]:
        raise ValueError("`teacher` is the model itself, which training changes; pass a copy.")
    if config.hidden_state_weight:
        blocks = find_feed_forward_blocks(unwrap(model)[0])
        patched = [block for block in blocks if block.state != "dense"] or select_blocks(blocks, config.blocks)
        _refuse_blocks_without_a_teacher([block.path(block.layout.down) for block in patched], teacher)


def _frozen_copy(model: Any, config: LayerCollapseConfig) -> nn.Module:
    """What the model was before it was patched."""
    inner = unwrap(model)[0]
    states = {block.state for block in find_feed_forward_blocks(inner)}
    needs = "so its dense form is not known: pass the dense model as `teacher`."
    if "collapsed" in states:
        raise ValueError(f"The model is collapsed, {needs}")
    if "patched" in states:
        activations = collapsible_activations(inner)
        initial = (layer_collapse_config_of(inner) or config).initial_alpha
        if any(bool((module.alpha != initial).any()) for module in activations.values()):
            raise ValueError(f"The model is patched and has been trained since, {needs}")
        if any(".modules_to_save." in name for name in activations):
            raise ValueError(f"Alphas of the model belong to an adapter, {needs}")
    teacher = copy.deepcopy(model)
    copied = unwrap(teacher)[0]
    if not is_hooked(copied):
        # trl's trainers give a model a forward of its own that calls the one of the model they were given.
        vars(copied).pop("forward", None)
    if "patched" in states:
        remove_layer_collapse(teacher)
    return teacher.requires_grad_(False).eval()


@dataclass
class Seen:
    """What a model was given and gave while it was watched.

    Args:
        given (`list[tuple[tuple, dict]]`): Arguments of each call of the model, before it may have changed them.
        outputs (`list`): Of the model itself, per call.
        hidden (`dict[str, list[Tensor]]`): Path of a block's last linear -> its outputs, in all calls.
        starts (`list[dict[str, int]]`): How many outputs of each block there were before each call.
    """

    given: list
    outputs: list
    hidden: dict[str, list[torch.Tensor]]
    starts: list

    @property
    def takes_one_dict(self) -> bool:
        """Whether the model is called as sentence-transformers' are, `model(features)`: by a loss, and once for each
        column of the data."""
        return bool(self.given) and all(len(args) == 1 and isinstance(args[0], Mapping) for args, _ in self.given)

    def calls(self) -> Iterator[tuple[tuple, dict, list, dict[str, list[torch.Tensor]]]]:
        """Arguments, outputs and outputs of the blocks, for each call by itself."""
        ends = [*self.starts[1:], {path: len(outputs) for path, outputs in self.hidden.items()}]
        for (args, kwargs), output, start, end in zip(self.given, self.outputs, self.starts, ends, strict=True):
            hidden = {path: outputs[start[path] : end[path]] for path, outputs in self.hidden.items()}
            yield args, kwargs, [output], hidden


@dataclass
class Lesson:
    """One call of the model beside the same call of its teacher.

    Args:
        inputs (`Mapping`): What both were given.
        outputs (`list`): What the model gave.
        taught: What the teacher gave.
        hidden, expected (`dict[str, list[Tensor]]`): The same of their blocks.
    """

    inputs: Mapping
    outputs: list
    taught: Any
    hidden: dict[str, list[torch.Tensor]]
    expected: dict[str, list[torch.Tensor]]


class Distillation:
    """The terms that a teacher adds to the loss of a training step.

    Args:
        config ([`LayerCollapseConfig`]): `distillation_weight`, `hidden_state_weight` and `temperature` are used.
        teacher (`nn.Module`): In evaluation mode. It is moved to the device of the first batch, unless it is spread
            over several devices, and runs without gradients.
        model (`nn.Module`): The student, patched or collapsed; not wrapped for distributed training yet.

    Raises:
        ValueError: The teacher has no block of a name that is to be compared, or the student none to compare.
    """

    def __init__(self, config: LayerCollapseConfig, teacher: nn.Module, model: nn.Module) -> None:
        self.config, self.teacher = config, teacher
        self._device: torch.device | None = None
        self.begin_run()
        self.find_blocks(model)
        if config.hidden_state_weight and not self._blocks:
            raise ValueError("`hidden_state_weight` compares patched and collapsed blocks, and the model has none.")

    @property
    def compares(self) -> bool:
        """Whether anything is: predictions, or blocks."""
        return bool(self.config.distillation_weight or self._blocks)

    def find_blocks(self, model: nn.Module) -> None:
        """Chooses the blocks that are compared: those that are patched or collapsed now. There may be none left."""
        self._inner, self._by_itself = unwrap(model)[0], is_transformers_model(model)
        sentences = sentence_model(model)
        self._kind = type(self._inner if sentences is None else sentences).__name__
        self._tokens = TokenFilter(model)
        self._blocks = {}
        if not self.config.hidden_state_weight:
            return
        blocks = [block for block in find_feed_forward_blocks(self._inner) if block.state != "dense"]
        self._blocks = {block.path(block.layout.down): block for block in blocks}
        _refuse_blocks_without_a_teacher(self._blocks, self.teacher)

    @contextlib.contextmanager
    def watching(self, model: nn.Module, wrapped: nn.Module) -> Iterator[Seen]:
        """Gives a [`Seen`] that collects what forwards inside give, of the model itself and of the compared blocks.

        Hooks stay no longer than that: gradient checkpointing runs forwards again during backward. Forwards in another
        gradient mode than that on entry (for the metrics of a trainer) are not those that are trained.
        """
        inner = unwrap(model)[0]
        seen, mode = Seen([], [], {path: [] for path in self._blocks}, []), torch.is_grad_enabled()

        def start(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled() == mode:
                args = tuple(dict(arg) if isinstance(arg, Mapping) else arg for arg in args)
                seen.given.append((args, dict(kwargs)))
                seen.starts.append({path: len(outputs) for path, outputs in seen.hidden.items()})

        def keep(found: list[Any]) -> Callable[..., None]:
            return lambda module, args, output: found.append(output) if torch.is_grad_enabled() == mode else None

        handles = [inner.get_submodule(path).register_forward_hook(keep(found)) for path, found in seen.hidden.items()]
        handles.append(wrapped.register_forward_pre_hook(start, with_kwargs=True))
        handles.append(wrapped.register_forward_hook(keep(seen.outputs)))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def hears(self, seen: Seen) -> bool:
        """Whether the forwards that were watched gave what is compared."""
        if self.config.distillation_weight:
            return any(map(holds_predictions, seen.outputs))
        return bool(seen.outputs) or any(seen.hidden.values())

    def loss(
        self,
        inputs: Mapping[str, Any],
        seen: Seen,
        items: Any = None,
        batches: int = 1,
        label_names: Sequence[str] = ("labels",),
    ) -> torch.Tensor:
        """The weighted terms of one batch, a scalar with gradients.

        Args:
            inputs (`dict`): What the student was given, with labels.
            seen ([`Seen`]): What it gave.
            items (`float` or `Tensor`, *optional*): What a sum over labels is divided by, where the whole step's count
                is known. Default: their mean in this batch.
            batches (`int`): What means over this batch are divided by.
            label_names (`Sequence[str]`): Inputs that the teacher does not need.
        """
        lessons = self._lessons(inputs, seen, label_names)
        parts: list[torch.Tensor] = []
        terms: dict[str, torch.Tensor] = {}
        if self.config.distillation_weight:
            losses = torch.cat([loss for lesson in lessons for loss in self._head_losses(lesson)])
            terms["distillation"] = losses.mean() if losses.numel() else losses.sum()
            whole = losses.sum() / items if items is not None else terms["distillation"] / batches
            parts.append(self.config.distillation_weight * whole)
        if self._blocks:
            shares = [self._hidden_loss(lesson.inputs, lesson.hidden, lesson.expected) for lesson in lessons]
            terms["hidden_state"] = torch.stack(shares).mean()
            parts.append(self.config.hidden_state_weight * terms["hidden_state"] / batches)
        for name, term in terms.items():
            before = self._sums.get(name)
            self._sums[name] = term.detach() if before is None else before + term.detach()
        self._count += 1
        return sum(parts, torch.zeros(()))

    def logs(self) -> dict[str, float]:
        """Means of the unweighted terms over the batches of this process since the last call."""
        logs = {f"layer_collapse/{name}_loss": float(total) / self._count for name, total in self._sums.items()}
        self.begin_run()
        return logs

    def begin_run(self) -> None:
        """To be called when training begins: its first log is not of batches of the run before."""
        self._sums: dict[str, torch.Tensor] = {}  # since the last log
        self._count = 0

    def _lessons(self, inputs: Mapping[str, Any], seen: Seen, label_names: Sequence[str]) -> list[Lesson]:
        if not seen.takes_one_dict:
            taught, expected = self._run_teacher(inputs, self.without_labels(inputs, label_names))
            return [Lesson(inputs, seen.outputs, taught, seen.hidden, expected)]
        if is_transformers_model(self.teacher):
            raise ValueError(
                f"A {self._kind} takes one dict of features, and the teacher, "
                f"a {type(unwrap(self.teacher)[0]).__name__}, does not. Pass a teacher of the model's own kind."
            )
        lessons = []
        for (features,), options, outputs, hidden in seen.calls():
            taught, expected = self._run_teacher(features, features, options)
            lessons.append(Lesson(features, outputs, taught, hidden, expected))
        return lessons

    def without_labels(self, inputs: Mapping[str, Any], label_names: Iterable[str]) -> dict[str, Any]:
        """What of a batch a prediction needs: an encoder-decoder makes the decoder's inputs from the labels."""
        needed = self._tokens.encoder_decoder and "decoder_input_ids" not in inputs
        return {name: value for name, value in inputs.items() if needed or name not in label_names}

    @torch.no_grad()
    def _run_teacher(
        self, inputs: Mapping[str, Any], given: Mapping[str, Any], options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, list[torch.Tensor]]]:
        """What the teacher gives, and its blocks, for what of a batch it is to be given: as names or, with `options`
        (which may be none), as one dict beside them."""
        device = next(value.device for value in inputs.values() if isinstance(value, torch.Tensor))
        if self._device != device:
            if not vars(unwrap(self.teacher)[0]).get("hf_device_map"):
                self.teacher.to(device)
            self._device = device
        # A dict of its own: modules put what they compute into the one that they are given.
        given = in_type_of(self.teacher, lean(unwrap(self.teacher)[0], given))
        with self.watching(self.teacher, self.teacher) as expected:
            taught = self.teacher(**given) if options is None else self.teacher(given, **options)
        return taught, expected.hidden

    def _head_losses(self, lesson: Lesson) -> Iterable[torch.Tensor]:
        outputs = lesson.outputs
        if not self._by_itself and any(_is_of_sentences(given) for given in outputs):
            return [_encoder_losses(next(filter(_is_of_sentences, outputs)), lesson.taught, self.config.temperature)]
        return _head_losses(self._inner, lesson.inputs, outputs, lesson.taught, self.config.temperature)

    def _hidden_loss(
        self,
        inputs: Mapping[str, Any],
        hidden: Mapping[str, Sequence[torch.Tensor]],
        expected: Mapping[str, Sequence[torch.Tensor]],
    ) -> torch.Tensor:
        self._tokens.start(inputs)
        examples = next(value.shape[0] for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim())
        terms = []
        for path, block in self._blocks.items():
            # None at all where the student drops the layer in this step.
            if not hidden[path]:
                continue
            if [output.shape for output in hidden[path]] != [output.shape for output in expected[path]]:
                raise ValueError(
                    f"Block {block.name} gave {_shapes(hidden[path])}, and the teacher's {_shapes(expected[path])}: "
                    "they must be of one width, and run as often."
                )
            shares = []
            for student, teacher in zip(hidden[path], expected[path], strict=True):
                shares.append(self._share(block, student, teacher.to(student.device), examples))
            terms.append(torch.cat(shares).mean())
        if not terms or not any(term.requires_grad for term in terms):
            raise ValueError(
                "No compared block has an output with a gradient, so that `hidden_state_weight` would do nothing. "
                "Reentrant activation checkpointing does that (use_reentrant=False is the default), and so does a "
                "model of which nothing in or before these blocks is trained."
            )
        return torch.stack([term.to(terms[0].device) for term in terms]).mean()

    def _share(
        self, block: FeedForwardBlock, student: torch.Tensor, teacher: torch.Tensor, examples: int
    ) -> torch.Tensor:
        """One number for each example, however long it is: as the rows of a batch count in the loss, so that it does
        not matter how a batch is split."""
        shape = student.shape[:-1]
        mask = self._tokens.mask(block, shape)
        real = torch.ones(shape, dtype=torch.bool, device=student.device) if mask is None else mask > 0
        # Many layers flatten examples, or cut them in windows.
        rows = examples if shape.numel() % examples == 0 else 1
        width = student.shape[-1]
        student, teacher = student.reshape(rows, -1, width), teacher.reshape(rows, -1, width)
        real = real.to(student.device).reshape(rows, -1)
        return functional.unexplained_share(student, teacher, real)[real.any(dim=1)]


def _refuse_blocks_without_a_teacher(paths: Iterable[str], teacher: nn.Module) -> None:
    teacher = unwrap(teacher)[0]
    known = {name for name, _ in teacher.named_modules()}
    missing = [path for path in paths if path not in known]
    if missing:
        raise ValueError(
            f"`hidden_state_weight` compares blocks of one name, and the teacher, a {type(teacher).__name__}, has no "
            f"{shorten(missing)}. Take a teacher of the model's own architecture, or `distillation_weight` alone."
        )


def _shapes(tensors: Iterable[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def _shifts_labels(model: Any) -> bool:
    """Whether the model's loss compares position i with label i + 1."""
    return isinstance(model, PreTrainedModel) and not is_encoder_decoder(model) and has_causal_loss(model)


def _head_losses(
    model: Any, inputs: Mapping[str, Any], forwards: Sequence[Any], taught: Any, temperature: float
) -> Iterator[torch.Tensor]:
    """Losses of a head's predictions, one per label that counts, for each part of its output."""
    named = [outputs for outputs in forwards if isinstance(outputs, Mapping)]
    if not named:
        raise ValueError("`distillation_weight` needs the model's outputs by name: leave `return_dict=False` out.")
    outputs = next(filter(holds_predictions, named), named[0])
    if "start_logits" in outputs and "end_logits" in outputs:
        for name in ("start_logits", "end_logits"):
            _check_shapes(outputs[name], taught[name])
            # Both make one item, as in the head's own loss.
            yield functional.soft_target_loss(outputs[name], taught[name], temperature)
        return
    if inputs.get("labels") is None and inputs.get("shift_labels") is None:
        yield from _unlabelled_losses(model, inputs, outputs, taught, temperature)
        return
    if "logits" not in outputs or outputs["logits"] is None:
        raise ValueError(
            f"`distillation_weight` compares the `logits` of model and teacher, and this {type(model).__name__} gives "
            f"{list(outputs)}. `hidden_state_weight` alone needs no logits."
        )
    logits, target = outputs["logits"], taught["logits"].to(outputs["logits"].device)
    _check_shapes(logits, target)
    yield _labelled_losses(model, _labels_of(model, inputs, logits), logits, target, temperature)


def _is_of_sentences(outputs: Any) -> bool:
    """Whether a module gave what those of sentence-transformers give."""
    return isinstance(outputs, Mapping) and ("scores" in outputs or "sentence_embedding" in outputs)


def _encoder_losses(
    outputs: Mapping[str, torch.Tensor], taught: Mapping[str, torch.Tensor], temperature: float
) -> torch.Tensor:
    """What sentence-transformers' models predict needs no labels: scores of pairs, or classes of them if there are
    several, or embeddings."""
    if "scores" in outputs:
        scores, target = outputs["scores"], taught["scores"].to(outputs["scores"].device)
        _check_shapes(scores, target)
        if scores.dim() == 2 and scores.shape[-1] > 1:
            return functional.soft_target_loss(scores, target, temperature)
        return (scores.float() - target.float()).square().flatten()
    embeddings, target = outputs["sentence_embedding"], taught["sentence_embedding"]
    _check_shapes(embeddings, target, "embeddings", "be of the same width")
    return functional.embedding_loss(embeddings, target.to(embeddings.device))


def _labels_of(model: Any, inputs: Mapping[str, Any], logits: torch.Tensor) -> Any:
    """One for each position of the logits, or for each input."""
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs["labels"]
        if labels.dim() == 2 and logits.dim() == 3 and _shifts_labels(model):
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return labels


def _unlabelled_losses(
    model: Any, inputs: Mapping[str, Any], outputs: Any, taught: Any, temperature: float
) -> Iterator[torch.Tensor]:
    """All predictions that are no padding count, and the model tells what kind they are."""
    pairs = zip(*(predictions_of(model, inputs, each) for each in (outputs, taught)), strict=True)
    for now, then in pairs:
        values, target = now.values, then.values.to(now.values.device)
        _check_shapes(values, target, f"predictions ({now.kind})")
        if now.kind == "classes":
            yield functional.soft_target_loss(values, target, temperature)
        elif now.kind == "labels":
            yield functional.soft_binary_loss(values, target, temperature).flatten()
        elif now.kind == "values":
            yield (values.float() - target.float()).square().flatten()
        else:
            yield functional.embedding_loss(values, target)


def _labelled_losses(
    model: Any, labels: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, temperature: float
) -> torch.Tensor:
    """What kind of prediction it is, the labels tell."""
    if labels.shape == logits.shape[:-1] and logits.shape[-1] > 1:
        if not labels.is_floating_point():
            kept = labels.to(logits.device) != IGNORED
            return functional.soft_target_loss(logits[kept], target[kept], temperature)
    elif logits.dim() == 2 and labels.shape[:1] == logits.shape[:1]:
        kind = model.config.problem_type if isinstance(model, PreTrainedModel) else None
        if kind == "regression" or (kind is None and logits.shape[-1] == 1):
            return (logits.float() - target.float()).square().flatten()
        if labels.shape == logits.shape and labels.is_floating_point():
            return functional.soft_binary_loss(logits, target, temperature).flatten()
    raise ValueError(
        f"`distillation_weight` knows classes (of inputs or of tokens), several labels and regression. The labels are "
        f"of shape {tuple(labels.shape)} and logits {tuple(logits.shape)}. "
        "`hidden_state_weight` alone works for every head."
    )


def _check_shapes(
    mine: torch.Tensor,
    taught: torch.Tensor,
    what: str = "logits",
    same: str = "have the same labels or the same vocabulary",
) -> None:
    if mine.shape != taught.shape:
        raise ValueError(
            f"The teacher gives {what} of shape {tuple(taught.shape)}, the model {tuple(mine.shape)}: "
            f"both must {same}."
        )
