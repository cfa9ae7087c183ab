"""A model as it was, if what is done to it fails."""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn


# Containers whose contents can be exchanged; what is made of them (outputs of transformers) may refuse that.
PLAIN = (dict, OrderedDict, list, set)


@contextlib.contextmanager
def structure_restored_on_error(model: nn.Module) -> Iterator[None]:
    """If what is done inside raises, every module that the model had stands where it stood, of the class that it had
    and with its attributes: parameters, hooks, config. What parameters hold is not looked at.

    The containers of a module (children, hooks) are filled again and not exchanged: handles of hooks know them.
    """
    modules = [(module, type(module), vars(module).copy(), _contents_of(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, kind, values, contents in modules:
            if type(module) is not kind:
                module.__class__ = kind
            vars(module).clear()
            vars(module).update(values)
            for container, content in contents:
                _fill(container, content)
        raise


def _contents_of(module: nn.Module) -> list[tuple[Any, Any]]:
    containers = [value for value in vars(module).values() if type(value) in PLAIN]
    return [(container, copy.copy(container)) for container in containers]


def _fill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)
