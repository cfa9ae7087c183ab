"""Passes of a model over data, with hooks that see what runs: no more is computed than somebody reads."""

import contextlib
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from . import processes
from .models import device_of, evaluating, inputs_of, outputs_of
from .predictions import without_labels
from .progress import Progress
from .upstream import WRAPPERS


if TYPE_CHECKING:
    from .token_filter import TokenFilter


def run_over(
    model: nn.Module,
    inner: Any,
    data: Iterable[Mapping[str, Any]],
    observe: Callable[[], Iterable[Any]],
    progress: Progress | None = None,
    tokens: "TokenFilter | None" = None,
    gradients: bool = False,
    outputs: Callable[[Any, Any], None] | None = None,
) -> None:
    """Runs the model over the data in evaluation mode; removes the hooks whatever happens.

    Args:
        model (`nn.Module`): What runs; `inner` is what it wraps.
        data (iterable of `dict[str, Tensor]`): Model inputs.
        observe (`Callable`): Makes the hooks, and gives their handles.
        progress ([`Progress`], *optional*): Told of every batch.
        tokens ([`TokenFilter`], *optional*): Told of the inputs before each forward.
        gradients (`bool`): Whether hooks may ask for gradients of what they see.
        outputs (`Callable`, *optional*): `outputs(inputs, given)` reads what the model gives in the end. Without it
            the logits of one token of a language model are enough.

    Raises:
        ValueError: There is no batch, or a batch is not a dict of model inputs.
    """
    device, batches = device_of(model), 0
    progress = progress or Progress()
    with contextlib.ExitStack() as hooks, evaluating(model), torch.set_grad_enabled(gradients):
        for handle in observe():
            hooks.callback(handle.remove)
        for batch in data:
            inputs = inputs_of(batch, device)
            if tokens is not None:
                tokens.start(inputs)
            start = time.perf_counter()
            with contextlib.suppress(_Enough):
                _run(model, inner, inputs, outputs)
            batches += 1
            progress.step(time.perf_counter() - start)
    # Another process may have all that is different.
    if not batches and processes.count() == 1:
        raise ValueError("The calibration data is empty: it must give at least one batch of model inputs.")


def _run(model: nn.Module, inner: Any, inputs: Mapping[str, Any], outputs: Callable[[Any, Any], None] | None) -> None:
    """One forward pass; what it gives, with its graph, goes before the next."""
    given = outputs_of(model, lean(inner, inputs, outputs is not None))
    if outputs is not None:
        outputs(inputs, given)


class _Enough(Exception):
    """Ends a forward pass: nobody reads what comes later."""


class LayerOrder:
    """The order in which the forwards of a model call its layers, seen in a first pass over data; later forwards can
    end behind the last layer that somebody looks into.

    They do where the model calls its layers one after the other, each once in every forward, and where nothing has to
    come after a forward: weights that accelerate's hooks put back, or the rest of a compiled graph.

    Args:
        model (`nn.Module`): What runs; `inner` is what it wraps.
    """

    def __init__(self, model: nn.Module, inner: Any) -> None:
        bound = any(name in module.__dict__ for module in model.modules() for name in WRAPPERS)
        self.model, self.inner = model, inner
        self.forwards: list[list[nn.Module]] | None = None if not bound and isinstance(inner, PreTrainedModel) else []

    def observe(self, blocks: Iterable[Any]) -> Iterator[Any]:
        """Hooks for one pass: those that note the order, or the one that ends a forward behind these blocks."""
        if self.forwards is None:
            forwards: list[list[nn.Module]] = []
            self.forwards = forwards
            layers = [module for module in self.inner.modules() if isinstance(module, GradientCheckpointingLayer)]
            yield self.model.register_forward_pre_hook(lambda *_: forwards.append([]))
            for layer in layers:
                yield layer.register_forward_hook(lambda module, *_: forwards[-1].append(module))
            return
        last = self.last_of(blocks)
        if last is not None:
            yield last.register_forward_hook(_enough)

    def last_of(self, blocks: Iterable[Any]) -> nn.Module | None:
        """The layer behind which none of these blocks runs; `None` where that cannot be told."""
        order = self.forwards[0] if self.forwards else []
        once = len(set(order)) == len(order) and all(other == order for other in self.forwards or ())
        inside = [{block.name for block in blocks if _holds(layer, block.down)} for layer in order]
        if not once or {name for names in inside for name in names} != {block.name for block in blocks}:
            return None
        return next((layer for layer, found in zip(reversed(order), reversed(inside), strict=True) if found), None)


def _holds(layer: nn.Module, module: nn.Module) -> bool:
    return any(part is module for part in layer.modules())


def _enough(*_: Any) -> None:
    raise _Enough


def lean(inner: Any, inputs: Mapping[str, Any], outputs: bool = True) -> dict[str, Any]:
    """Model inputs with which nothing is computed that nobody reads: no loss (but where decoder inputs are made of
    labels), no key-value cache and, unless the outputs are read, the logits of the last token only."""
    given = without_labels(inner, inputs)
    if not isinstance(inner, PreTrainedModel):
        return given
    taken = inspect.signature(inner.forward).parameters
    if "use_cache" in taken:
        given.setdefault("use_cache", False)
    if "logits_to_keep" in taken and not outputs:
        given.setdefault("logits_to_keep", 1)
    return given


def first_tensor(output: Any) -> torch.Tensor:
    """The first tensor that a model gives, without its graph."""
    if isinstance(output, torch.Tensor):
        return output.detach()
    values = output.values() if isinstance(output, dict) else output
    return next(value.detach() for value in values if isinstance(value, torch.Tensor) and value.dim() > 0)
