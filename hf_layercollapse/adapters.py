"""Adapters (peft) on a model that is to change under them: merged, and back again if what follows fails."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from .modeling_layercollapse import children_of
from .restoring import structure_restored_on_error


@contextlib.contextmanager
def restored_on_error(model: Any) -> Iterator[None]:
    """If what is done inside raises, the model is as it was before peft merged its adapters: every module with its
    attributes, whichever of them a method or a version of peft touches, and the weights under adapters.

    Weights are copied, since to subtract what was added leaves a rounding error.
    """
    weights = [(parameter, parameter.detach().clone()) for parameter in _weights_under_adapters(model)]
    with structure_restored_on_error(model):
        try:
            yield
        except BaseException:
            for parameter, weight in weights:
                parameter.data = weight
            raise


def _weights_under_adapters(model: nn.Module) -> list[nn.Parameter]:
    adapted = (module for module in model.modules() if type(module).__module__.startswith("peft.tuners."))
    layers = [children_of(module)["base_layer"] for module in adapted if "base_layer" in children_of(module)]
    return list({id(p): p for layer in layers for p in layer.parameters()}.values())
