"""Passes of a model over data, with hooks that see what runs: no more is computed than somebody reads."""

import contextlib
import inspect
import time

import torch
from transformers.modeling_utils import PreTrainedModel

from . import processes
from .models import device_of, evaluating, inputs_of, outputs_of
from .predictions import without_labels
from .progress import Progress


def run_over(model, inner, data, observe, progress=None, tokens=None, gradients=False, outputs=None):
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
            given = outputs_of(model, lean(inner, inputs, outputs is not None))
            if outputs is not None:
                outputs(inputs, given)
            batches += 1
            progress.step(time.perf_counter() - start)
    # Another process may have all that is different.
    if not batches and processes.count() == 1:
        raise ValueError("The calibration data is empty: it must give at least one batch of model inputs.")


def lean(inner, inputs, outputs=True) -> dict:
    """Model inputs with which nothing is computed that nobody reads: no key-value cache and, unless the outputs are
    read, no loss and the logits of the last token only."""
    if not isinstance(inner, PreTrainedModel):
        return inputs
    taken = inspect.signature(inner.forward).parameters
    given = dict(inputs) if outputs else without_labels(inner, inputs)
    if "use_cache" in taken:
        given.setdefault("use_cache", False)
    if "logits_to_keep" in taken and not outputs:
        given.setdefault("logits_to_keep", 1)
    return given


def first_tensor(output) -> torch.Tensor:
    """The first tensor that a model gives, without its graph."""
    if isinstance(output, torch.Tensor):
        return output.detach()
    values = output.values() if isinstance(output, dict) else output
    return next(value.detach() for value in values if isinstance(value, torch.Tensor) and value.dim() > 0)
