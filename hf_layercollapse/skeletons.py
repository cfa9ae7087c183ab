"""Copies of a module's code that can run without its weights, and touch nothing of it."""

import contextlib
import copy
import enum
import functools
import math
import random
import re
import types
import weakref
import zlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .modeling_layercollapse import children_of, linear_shape, parameters_of
from .models import base_layer
from .upstream import BUFFERS, CHILDREN, OF_TORCH, PARAMETERS, WRAPPERS, buffers_of, forward_before_hooks, is_hooked


# Their statistics are random numbers in a skeleton, as weights are, and they use them in training mode too.
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# So many numbers are different ones, in outputs that nobody looks at and in weights; more of them are repeated.
_DIFFERENT = 4099


@dataclass
class _Event:
    path: str
    module: nn.Module
    input: torch.Tensor
    output: torch.Tensor


class _StandIn(nn.Linear):
    """In place of a linear or an activation: fixed random numbers of the right shape."""

    def __init__(self, path, record, watched, out_features=None):
        nn.Module.__init__(self)
        self.path, self.record, self.watched, self.out_features = path, record, watched, out_features
        self.salt, self.calls = 0, 0

    def forward(self, hidden_states, *args, **kwargs):
        width = hidden_states.shape[-1] if self.out_features is None else self.out_features
        seed = zlib.crc32(f"{self.path} {self.calls} {self.salt}".encode())
        self.calls += 1
        generator = torch.Generator().manual_seed(seed)
        shape = (*hidden_states.shape[:-1], width)
        if self.watched:
            output = torch.randn(shape, generator=generator, dtype=torch.float32)
        else:  # the same few numbers again and again: whole towers may run around the block
            numel = math.prod(shape)
            few = torch.randn(min(numel, _DIFFERENT), generator=generator, dtype=torch.float32)
            output = few.repeat(-(-numel // max(1, len(few))))[:numel].reshape(shape)
        if self.watched:
            self.record.append(_Event(self.path, self, hidden_states.detach().clone(), output.clone()))
        return output


# Every attribute of a module, in a record of what was read.
ALL = "*"


def _state(module):
    """A copy's `__dict__`, unrecorded."""
    return object.__getattribute__(module, "__dict__")


class _Reads:
    """In front of a module's class in its copy: what is read is copied from the module when it is, and recorded."""

    def __getattribute__(self, name):
        if name in OF_TORCH:
            return object.__getattribute__(self, name)
        if name == "__class__":  # code may ask for it
            return type(self).__mro__[2]
        own = _state(self)
        own["_source"].read(name)
        for kind in (CHILDREN, BUFFERS, PARAMETERS):
            if name in own[kind] and not own["_source"].in_class(name):
                return own[kind][name]
        return object.__getattribute__(self, name)

    def __getattr__(self, name):
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class _Source:
    """The module that a copy is of: where its attributes come from.

    Args:
        module, copied (`nn.Module`): The real one, which is not changed, and its copy.
        skeleton (`Skeleton`): Whose copy it is.
        path (`str`, *optional*): Of the module inside what the skeleton is of, `None` for one outside of it.
    """

    def __init__(self, module, copied, skeleton, path):
        self.module, self.copied, self.skeleton, self.path = module, copied, skeleton, path
        self.buffers = dict(buffers_of(module))
        self.attributes = attributes_of(module)
        self.readable = {*self.attributes, *self.buffers}

    def in_class(self, name):
        return any(name in kind.__dict__ for kind in type(self.module).__mro__)

    def read(self, name):
        if name in ("__dict__", BUFFERS):
            self.read_all()
        elif name in self.readable:
            self.skeleton.seen.add((self.path, name))
            self._give(name)

    def read_all(self):
        self.skeleton.seen.add((self.path, ALL))
        for name in (*self.attributes, *self.buffers):
            self._give(name)

    def _give(self, name):
        if name in self.attributes:
            value = self.attributes.pop(name)
            # The code may have set it before it read it.
            _state(self.copied).setdefault(name, self.skeleton.value(value))
        if name in self.buffers:
            value = self.buffers.pop(name)
            _state(self.copied)[BUFFERS][name] = self.skeleton.buffer(self.module, name, value)


def attributes_of(module):
    """What a module's code can read of it, tensors and children left out."""
    left_out = {BUFFERS, *OF_TORCH, *WRAPPERS}
    attributes = {name: value for name, value in module.__dict__.items() if name not in left_out}
    if is_hooked(module):
        # accelerate's `forward` is around the class's own, or around another one of the instance.
        attributes.pop("forward", None)
        wrapped = forward_before_hooks(module)
        if not (isinstance(wrapped, types.MethodType) and wrapped.__func__ is type(module).forward):
            attributes["forward"] = wrapped
    return attributes


# Class -> the same with `_Reads` in front; kept no longer than copies of it.
_recording: weakref.WeakValueDictionary[type, Any] = weakref.WeakValueDictionary()


def _recording_class(kind):
    """`kind` with [`_Reads`] in front; `None` where code of the class itself would run and see the new one."""
    if type(kind) is not type or not all(map(functools.partial(_is_native, kind), _SEEING)):
        return None
    recording = _recording.get(kind)
    if recording is None:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__slots__": ()}
        recording = _recording[kind] = type(kind.__name__, (_Reads, kind), names)
    return recording


_SEEING = ("__init_subclass__", "__getattribute__", "__getattr__")


def _is_native(kind, method):
    first = next(base for base in kind.__mro__ if method in base.__dict__)
    return first in (object, nn.Module, PreTrainedModel)


ATOMS = (
    bool, int, float, complex, str, bytes, type(None), type, enum.Enum, range, slice, re.Pattern,
    types.ModuleType, types.BuiltinFunctionType, types.CodeType,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip


class Skeleton:
    """A copy of a module's code without its weights. Nothing that runs in it touches the module it was made from.

    Args:
        module (`nn.Module`): What to copy.
        activations (`set[nn.Module]`): Modules that become stand-ins that keep the width.
        watch (`str`): Calls are recorded of modules whose path begins so.
        seen (`set[tuple]`): Takes `(path of a module, name)` of each attribute and buffer that is read, and
            `(path, "*")` where it may be any.
        weights (`int`): Which random numbers stand for weights.
    """

    def __init__(self, module, activations=frozenset(), watch="", seen=None, weights=0):
        self.activations, self.watch = activations, watch
        self.seen = set() if seen is None else seen
        self.record, self.modules = [], []
        self.copies = {}  # id -> (what it is a copy of, kept so that the id stays its own; the copy)
        self.paths = {id(part): path for path, part in module.named_modules()}
        self.generator = torch.Generator().manual_seed(weights)
        self.module = self._module(module)

    def run(self, *args, salted=(), train=False, **kwargs):
        """What the copy returns; stand-ins named in `salted` return other numbers than they would otherwise."""
        for module in self.modules:
            state = _state(module)
            state["training"] = train and not isinstance(module, _BATCH_NORMS)
            if isinstance(module, _StandIn):
                state["salt"] = int(module.path in salted)
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def has_changed_buffers(self):
        """Whether the code has written to a buffer that it read; statistics of batch norms are left out."""
        for original, made in self.copies.values():
            if isinstance(original, nn.Module) and not isinstance(original, (nn.Linear, Conv1D, *_BATCH_NORMS)):
                buffers = _state(made)[BUFFERS]
                for name, buffer in buffers_of(original).items():
                    if buffers[name] is not None and not torch.equal(buffers[name], _on_cpu(buffer)):
                        return True
        return False

    def _keep(self, original, made):
        self.copies[id(original)] = (original, made)
        return made

    def _module(self, module):
        if module is None:
            return None
        if id(module) in self.copies:
            return self.copies[id(module)][1]
        path = self.paths.get(id(module))
        watched = path is not None and path.startswith(self.watch)
        base = base_layer(module)
        if module in self.activations or isinstance(base, (nn.Linear, Conv1D)):
            made = self._stand_in(module, base, path, watched)
        else:
            made = self._copy(module, path, watched)
        self.modules.append(made)
        return made

    def _stand_in(self, module, base, path, watched):
        """What stands for an activation or a linear, with all that the code around it may read."""
        width = None if module in self.activations else linear_shape(base)[1]
        made = self._keep(module, _StandIn(path, self.record, watched, width))
        self.seen.add((self.paths.get(id(base)), ALL))
        for name, value in base.__dict__.items():  # `in_features`, `nf` and what else the code around may read
            if not name.startswith("_") and name not in made.__dict__ and name != "forward":
                made.__dict__[name] = self.value(value)
        made.__dict__[PARAMETERS] = self._weights(base)
        return made

    def _copy(self, module, path, watched):
        """A module of the same class, with copies of what it holds, made as its code reads them."""
        kind = type(module)
        recording = _recording_class(kind)
        made = self._keep(module, object.__new__(recording or kind))
        state = _state(made)
        state |= {
            name: type(value)() if isinstance(value, (dict, set)) else value
            for name, value in module.__dict__.items()
            if name in OF_TORCH
        }
        state["_source"] = source = _Source(module, made, self, path)
        state[PARAMETERS] = self._weights(module)
        state[BUFFERS] = dict.fromkeys(buffers_of(module))
        state[CHILDREN] = {}
        for name, child in children_of(module).items():
            state[CHILDREN][name] = self._module(child)
        if recording is None:
            source.read_all()
        if not children_of(module) and watched:
            made.register_forward_hook(self._recorder(path))
        return made

    def _recorder(self, path):
        def hook(module, args, output):
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                self.record.append(_Event(path, module, args[0].detach().clone(), output.detach().clone()))

        return hook

    def _weights(self, module):
        return {
            name: None if parameter is None else self.value(parameter)
            for name, parameter in parameters_of(module).items()
        }

    def _weight(self, parameter):
        """Random numbers about 1, no more than a few: further rows are the same ones, and take no memory."""
        if not parameter.is_floating_point():
            return torch.ones((), dtype=parameter.dtype).expand(parameter.shape)
        shape = parameter.shape if parameter.numel() <= _DIFFERENT else parameter.shape[-1:]
        return (torch.rand(shape, generator=self.generator, dtype=torch.float32) + 0.5).expand(parameter.shape)

    def buffer(self, module, name, buffer):
        """The copy of a buffer; of a batch norm's statistics, random numbers in their place."""
        if isinstance(module, _BATCH_NORMS) and buffer is not None and buffer.is_floating_point():
            return self._weight(buffer)
        return self.value(buffer)

    def value(self, value):
        """A copy of what stands in an attribute, whose contents are copies too."""
        if isinstance(value, ATOMS):
            return value
        if id(value) in self.copies:
            return self.copies[id(value)][1]
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, nn.Parameter):
            return self._keep(value, nn.Parameter(self._weight(value), requires_grad=False))
        if isinstance(value, torch.Tensor):
            return self._keep(value, _on_cpu(value))
        if isinstance(value, torch.Generator):
            made = torch.Generator(value.device)
            made.set_state(value.get_state())
            return self._keep(value, made)
        if isinstance(value, tuple):
            parts = [self.value(part) for part in value]
            return self._keep(value, tuple.__new__(type(value), parts))
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.value(value.__self__))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            arguments = (self.value(value.args), self.value(value.keywords))
            return functools.partial(self.value(value.func), *arguments[0], **arguments[1])
        if isinstance(value, weakref.ReferenceType):
            return value if value() is None else weakref.ref(self.value(value()))
        return self._object(value)

    def _function(self, function):
        if not function.__closure__:
            return function
        cells = tuple(types.CellType() for _ in function.__closure__)
        made = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
        )
        made.__kwdefaults__ = function.__kwdefaults__
        self._keep(function, made)
        for cell, original in zip(cells, function.__closure__, strict=True):
            try:
                cell.cell_contents = self.value(original.cell_contents)
            except ValueError:  # nothing in it yet
                continue
        return made

    def _object(self, value):
        kind = type(value)
        if isinstance(value, (np.ndarray, np.random.Generator, np.random.RandomState, random.Random)):
            return self._keep(value, copy.deepcopy(value))
        if isinstance(value, (dict, list, set, deque)):
            made = self._keep(value, copy.copy(value))
            if isinstance(value, dict):
                made.update({key: self.value(item) for key, item in value.items()})
            else:
                made.clear()
                (made.update if isinstance(value, set) else made.extend)(list(map(self.value, value)))
        else:
            try:
                made = self._keep(value, object.__new__(kind))
            except TypeError:  # made by code that is not Python's: a lock, a file, a stream of a device
                return self._keep(value, value)
        if kind.__dictoffset__:
            made.__dict__.update({name: self.value(item) for name, item in value.__dict__.items()})
        for slot in _slots(kind):
            try:
                slot.__set__(made, self.value(slot.__get__(value)))
            except AttributeError:  # nothing in it
                continue
        return made


def _slots(kind):
    members = [member for base in kind.__mro__ for member in base.__dict__.values()]
    return [member for member in members if isinstance(member, types.MemberDescriptorType)]


def _on_cpu(buffer):
    if buffer.is_meta:
        return torch.zeros(buffer.shape, dtype=torch.float32 if buffer.is_floating_point() else buffer.dtype)
    buffer = buffer.detach().to("cpu", copy=True)
    return buffer.float() if buffer.is_floating_point() else buffer


@contextlib.contextmanager
def by_itself():
    """The process as its own: random numbers drawn inside change none that are drawn afterwards, tensors are made on
    the CPU whatever a caller made the default, and transformers is silent."""
    level = logging.get_verbosity()
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    elsewhere = torch.get_default_device().type != "cpu"
    try:
        logging.set_verbosity_error()
        with torch.device("cpu") if elsewhere else contextlib.nullcontext():
            yield
    finally:
        logging.set_verbosity(level)
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def seed_cpu(seed):
    # `torch.manual_seed` would seed every accelerator too.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
