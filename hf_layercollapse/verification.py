"""What runs between a block's linears, seen on the model itself: its own code, run on stand-ins that cost nothing.

A block's holder (or the smallest enclosing module that can be run) is copied as a skeleton: the same classes, and
copies of the attributes, but every linear is a stand-in that returns fixed random numbers and records what it was
given, and every other weight is a few random numbers. Running it shows the wiring and nothing else: whether the
activation gets the first linear's output untouched, the last linear the activation's, and what happens to the result.
A block of a 70B model is checked as fast as one of a toy, on the CPU, whatever device or dtype its weights have.

Nothing that runs reaches the model: what its code reads is copied when it reads it, down to the contents of lists and
of objects of the user's own. What is beyond a module is out of reach: attributes of classes, globals, and what cannot
be copied, such as a lock or a file. The reads are recorded too, so that a block which would show the probe nothing
else is not run again.
"""

import contextlib
import copy
import enum
import functools
import hashlib
import inspect
import math
import random
import re
import types
import weakref
import zlib
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .modeling_layercollapse import CollapsibleActivation, children_of, is_inplace, linear_shape, parameters_of
from .upstream import BUFFERS, CHILDREN, OF_TORCH, PARAMETERS, WRAPPERS, buffers_of, forward_before_hooks, is_hooked


logger = logging.get_logger(__name__)

DROPOUTS = (nn.Dropout, nn.Identity)
# Folded into the linear beside it; in evaluation mode it is a scale and a shift per feature.
NORMS = (nn.BatchNorm1d,)
# Their statistics are random numbers in a skeleton, as weights are, and they use them in training mode too.
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Rows of the probing input: enough that an accidental equality is impossible, few enough to cost nothing.
BATCH, LENGTH = 2, 4
# Features on which a function that knows no width shows what it does.
_ENOUGH = 32
# So many numbers are different ones, in outputs that nobody looks at and in weights; more of them are repeated.
_DIFFERENT = 4099


@dataclass(frozen=True)
class Wiring:
    """How a block's parts are connected, as seen when its code ran.

    Args:
        own_module (`bool`): The holder computes the block and nothing else: its one input goes into the first linear,
            and what it returns is the last linear's output, after the modules `then`.
        before, between (`tuple[str, ...]`): Dropouts and batch norms between the first linear and the activation, and
            between the activation and the last linear. Paths inside the holder; gone once the block is one map.
        then (`tuple[str, ...]`): Dropouts after the last linear inside an own module; they stay.
        scales (`tuple[float, float, float]`): Constants by which the code multiplies the input of the activation, the
            input of the last linear, and what an own module returns.
    """

    own_module: bool
    before: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def is_like(self, other):
        """Whether the code does the same with parts of other widths: constants are measured, with rounding errors."""
        close = all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(self.scales, other.scales, strict=True))
        return close and replace(self, scales=other.scales) == other


class Refusal(Exception):
    """Why something that is spelled like a feed-forward block is not one."""


# ----------------------------------------------------------------------------------------------------
# A copy whose code can run
# ----------------------------------------------------------------------------------------------------


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
_ALL = "*"


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
        self.attributes = _attributes(module)
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
        self.skeleton.seen.add((self.path, _ALL))
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


def _attributes(module):
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
_recording = weakref.WeakValueDictionary()


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


_ATOMS = (
    bool, int, float, complex, str, bytes, type(None), type, enum.Enum, range, slice, re.Pattern,
    types.ModuleType, types.BuiltinFunctionType, types.CodeType,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip


class Skeleton:
    """A copy of a module's code without its weights. Nothing that runs in it touches the module it was made from.

    Args:
        module (`nn.Module`): What to copy.
        base_layer (callable): Gives the linear that an adapter wraps, or the module itself.
        activations (`set[nn.Module]`): Modules that become stand-ins that keep the width.
        watch (`str`): Calls are recorded of modules whose path begins so.
        seen (`set[tuple]`): Takes `(path of a module, name)` of each attribute and buffer that is read, and
            `(path, "*")` where it may be any.
        weights (`int`): Which random numbers stand for weights.
    """

    def __init__(self, module, base_layer, activations=frozenset(), watch="", seen=None, weights=0):
        self.base_layer, self.activations, self.watch = base_layer, activations, watch
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
        base = self.base_layer(module)
        if module in self.activations or isinstance(base, (nn.Linear, Conv1D)):
            width = None if module in self.activations else linear_shape(base)[1]
            made = self._keep(module, _StandIn(path, self.record, watched, width))
            self.seen.add((self.paths.get(id(base)), _ALL))
            for name, value in base.__dict__.items():  # `in_features`, `nf` and what else the code around may read
                if not name.startswith("_") and name not in made.__dict__ and name != "forward":
                    made.__dict__[name] = self.value(value)
            made.__dict__[PARAMETERS] = self._weights(base)
            self.modules.append(made)
            return made
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
        self.modules.append(made)
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
        if isinstance(value, _ATOMS):
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
def _by_itself():
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


def _seed_cpu(seed):
    # `torch.manual_seed` would seed every accelerator too.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


# ----------------------------------------------------------------------------------------------------
# Blocks
# ----------------------------------------------------------------------------------------------------


_UNKNOWN = object()


class Verifier:
    """Verifies the blocks of one model, which must not change meanwhile.

    A block is not run again where it would show nothing that a run has not seen: the modules that were run for another
    one have the same classes and shapes, and each attribute that was read then has the same content.

    Args:
        model (`nn.Module`): The model.
        base_layer (callable): Gives the linear that an adapter wraps, or the module itself.
    """

    def __init__(self, model, base_layer):
        self.model, self.base_layer = model, base_layer
        self.known = {}  # what blocks have in common -> [(what was seen, wiring or refusal)]
        self.structures, self.readable, self.contents = {}, {}, _Contents()

    def wiring(self, name, layout):
        """The [`Wiring`] of the block that the module `name` of the model holds: this module is run, or if it cannot
        be run alone the smallest around it that can.

        Raises:
            Refusal: Its code does something else than the layout says, or could not be run.
        """
        outer, failure = name, None
        while True:
            inside, module = name[len(outer) :].lstrip("."), self.model.get_submodule(outer)
            probe = _Probe(module, inside, not inside and bool(name), layout, self.base_layer, self.check_activation)
            result = self._once((layout, inside, probe.own), module, probe.wiring, probe.seen)
            if isinstance(result, Wiring):
                return result
            failure = failure or result
            if not outer:
                raise Refusal(f"its code could not be run to check it ({failure[:200]})")
            outer = outer.rpartition(".")[0]

    def check_activation(self, activation, shape):
        """Raises a `Refusal` unless a module, on an input of this shape, is a function of single numbers."""
        if not any(True for part in activation.modules() for _ in (*parameters_of(part), *buffers_of(part))):
            shape = (*shape[:-1], min(shape[-1], _ENOUGH))  # it knows no width
        work = functools.partial(_check_activation, activation, shape, self.base_layer)
        self._once((shape,), activation, work, {(path, _ALL) for path, _ in activation.named_modules()})

    def _once(self, key, module, work, seen):
        """What `work` returns or raises, or did for another module that shows the same."""
        known = self.known.setdefault((*key, self._structure(module)), [])
        results = (result for contents, result in known if self._shows(module, contents))
        result = next(results, _UNKNOWN)
        if result is _UNKNOWN:
            try:
                with _by_itself():
                    result = work()
            except Refusal as refusal:
                result = refusal
            # What reaches outside the module that was run is not compared.
            if all(path is not None for path, _ in seen):
                known.append(({read: self._content(module, read) for read in seen}, result))
        if isinstance(result, Refusal):
            raise result
        return result

    def _structure(self, module):
        """Classes, names and shapes: what a skeleton is made of, apart from what is read."""
        if id(module) not in self.structures:
            self.structures[id(module)] = tuple(
                (
                    path,
                    type(part),
                    tuple((key, None if p is None else p.shape) for key, p in parameters_of(part).items()),
                    tuple(buffers_of(part)),
                    tuple(part.__dict__),
                    tuple((key, child is None) for key, child in children_of(part).items()),
                    part.__dict__.get("head_dim"),
                )
                for path, part in module.named_modules(remove_duplicate=False)
            )
        return self.structures[id(module)]

    def _shows(self, module, contents):
        return all(self._content(module, read) == content for read, content in contents.items())

    def _content(self, module, read):
        path, name = read
        if id(module) not in self.readable:
            parts = module.named_modules(remove_duplicate=False)
            self.readable[id(module)] = {path: _readable(part) for path, part in parts}
        readable = self.readable[id(module)][path]
        if name != _ALL:
            return self.contents.of(readable[name])
        return tuple((key, self.contents.of(value)) for key, value in readable.items())


def _readable(module):
    """Buffers and attributes; a method that is bound to the module itself is the same of another one."""
    values = {**buffers_of(module), **_attributes(module)}
    return {
        name: ("own method", value.__func__)
        if isinstance(value, types.MethodType) and value.__self__ is module
        else value
        for name, value in values.items()
    }


class _Contents:
    """What values hold, in a form that is equal where copies of them would do the same."""

    def __init__(self):
        self.known = {}  # id -> (value, kept so that the id stays its own; its content)

    def of(self, value):
        if isinstance(value, (bool, int, float, complex)):
            return type(value), repr(value)  # 1, 1.0 and True differ, and nan is itself
        if isinstance(value, _ATOMS):
            return value
        if id(value) not in self.known:
            # Until it is known: of a value that holds itself.
            self.known[id(value)] = (value, ("itself", id(value)))
            self.known[id(value)] = (value, self._of(value))
        return self.known[id(value)][1]

    def _of(self, value):
        kind = type(value)
        if isinstance(value, torch.Tensor):
            shape = (kind, value.shape, value.dtype, value.is_meta)
            if isinstance(value, nn.Parameter) or value.is_meta:
                return shape
            if kind is torch.Tensor and value.layout is torch.strided and not value.is_quantized:
                data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                return *shape, hashlib.sha256(data).digest()
        elif isinstance(value, dict):
            return kind, tuple((self.of(key), self.of(item)) for key, item in value.items())
        elif isinstance(value, (list, tuple, deque)):
            return kind, tuple(map(self.of, value))
        elif isinstance(value, PreTrainedConfig):
            return kind, self.of(value.__dict__)
        elif isinstance(value, functools.partial):
            return kind, self.of(value.func), self.of(value.args), self.of(value.keywords)
        return "itself", id(value)


class _Probe:
    """Runs a module that holds a block, or has the module that does inside it.

    Args:
        module (`nn.Module`): What is run.
        inside (`str`): Path of the block's holder in it.
        own (`bool`): Whether it is the holder, and may be exchanged as a whole.
        layout (`FeedForwardLayout`): With one activation path.
        base_layer (callable): Gives the linear that an adapter wraps, or the module itself.
        check_activation (callable): Raises for a module that is none, given the shape of its input.
    """

    def __init__(self, module, inside, own, layout, base_layer, check_activation):
        self.module, self.own, self.layout, self.base_layer = module, own, layout, base_layer
        self.prefix = f"{inside}." if inside else ""
        self.activation = module.get_submodule(self.prefix + layout.activation)
        self.check_activation = check_activation
        # Inputs are made up from a model's config.
        self.seen = {("", "config")} if isinstance(module, PreTrainedModel) else set()

    def wiring(self):
        """The [`Wiring`], or, if the module could not be run, why not."""
        failure = None
        width = linear_shape(self.base_layer(self.module.get_submodule(self.prefix + self.layout.up)))[0]
        for arguments in possible_arguments(self.module, width):
            self.arguments = arguments
            try:
                events, output = self.run()
            except Exception as error:  # noqa: BLE001  (any code may run here, and each failure means: try another way)
                text = " ".join(str(error).split())
                failure = failure or f"{type(self.module).__name__}: {type(error).__name__}: {text}"
                continue
            if any(event.path == self.prefix + self.layout.down for event in events):
                return self._verified(events, output)
            failure = failure or f"running {type(self.module).__name__} does not reach it"
        return failure

    def run(self, salted=(), train=False, weights=0):
        """`(events, output)` of a new skeleton: nothing that ran before shows."""
        _seed_cpu(0)
        # A patched block's activation stands for the native one inside it.
        activations = {self.activation, _native(self.activation)}
        skeleton = Skeleton(self.module, self.base_layer, activations, self.prefix, self.seen, weights)
        # The code may write into its inputs.
        arguments = {name: skeleton.value(value) for name, value in self.arguments.items()}
        return skeleton.record, skeleton.run(**arguments, salted=salted, train=train)

    def _verified(self, events, output):
        wiring = self._judge(events, output)
        if wiring.scales != (1.0, 1.0, 1.0):
            other = self._judge(*self.run(weights=1))
            if not np.allclose(wiring.scales, other.scales, rtol=1e-3):
                raise Refusal("its code multiplies by a weight of its own")
        path = self.prefix + self.layout.activation
        self.seen |= {(f"{path}.{name}".rstrip("."), _ALL) for name, _ in self.activation.named_modules()}
        (first, *_) = (event for event in events if event.path == path)
        self.check_activation(_native(self.activation), first.input.shape)
        return wiring

    def _judge(self, events, output):
        layout, prefix = self.layout, self.prefix

        def calls(part):
            return [event for event in events if event.path == prefix + part]

        up, down, activation = calls(layout.up), calls(layout.down), calls(layout.activation)
        gate = calls(layout.gate) if layout.gate else up
        parts = [("up", layout.up, up), ("activation", layout.activation, activation), ("down", layout.down, down)]
        for _, path, part_events in parts + ([("gate", layout.gate, gate)] if layout.gate else []):
            if not part_events:
                raise Refusal(f"its code does not call `{path}` as a module")
            if len(part_events) != len(up):
                raise Refusal(
                    f"`{path}` is called {len(part_events)} times where `{layout.up}` is called {len(up)} times"
                )

        before, between, scales = set(), set(), []
        for u, g, a, d in zip(up, gate, activation, down, strict=True):
            if layout.gate and not _same(u.input, g.input):
                raise Refusal(f"`{layout.gate}` and `{layout.up}` get different inputs")
            inner = _split(layout, g.output)
            enters, passed = _follow(inner[0], a.input, events, prefix)
            if enters is None:
                raise Refusal(_why(layout.gate or layout.up, layout.activation, inner[0], events, prefix))
            before |= passed
            product = a.output if not layout.gated else a.output * (inner[1] if layout.fused else u.output)
            leaves, passed = _follow(product, d.input, events, prefix)
            if leaves is None:
                raise Refusal(_why(layout.activation, layout.down, product, events, prefix))
            between |= passed
            scales.append((enters, leaves))
        if len({(round(enters, 6), round(leaves, 6)) for enters, leaves in scales}) > 1:
            raise Refusal("its code multiplies by different constants in different calls")
        enters, leaves = scales[0]

        wiring = self._own_wiring(output, up, down, (enters, leaves)) if self.own else None
        if wiring is None:
            if layout.gated:
                raise Refusal(
                    "its module does more than the gated block (a residual, a norm, dropout as a function), so it "
                    "cannot be exchanged as a whole"
                )
            if (enters, leaves) != (1.0, 1.0):
                raise Refusal("its code multiplies by a constant between the two linears")
            again = self.run(salted={prefix + layout.up, prefix + layout.activation})[1]
            if not _same_output(output, again):
                raise Refusal(f"what `{layout.up}` gives is used elsewhere too, not only by `{layout.down}`")
            # Dropout that also runs elsewhere in the holder stays where it is.
            counts = {path: sum(event.path == prefix + path for event in events) for path in before | between}
            once = {path for path, count in counts.items() if count == len(up)}
            wiring = Wiring(False)
            before, between = before & once, between & once
        in_order = dict.fromkeys(event.path[len(prefix) :] for event in events)
        return replace(
            wiring,
            before=tuple(path for path in in_order if path in before),
            between=tuple(path for path in in_order if path in between),
            scales=(enters, leaves, wiring.scales[2]),
        )

    def _own_wiring(self, output, up, down, scales):
        """The wiring if the holder computes the block and nothing else, else `None`."""
        layout = self.layout
        if len(up) != 1 or not isinstance(output, torch.Tensor) or "." in layout.down:
            return None
        extra = _signature(self.module)[1:]
        required = [p for p in extra if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        # Where a caller may pass more than the hidden states, the module must stay.
        if required or (extra and not layout.gated):
            return None
        (given,) = [value for value in self.arguments.values() if isinstance(value, torch.Tensor)]
        factor = _ratio(down[0].output, output)
        if not _same(given, up[0].input) or factor is None:
            return None
        # Dropout written as a function shows in training mode only.
        train_events, train_output = self.run(train=True)
        (last,) = [event for event in train_events if event.path == layout.down]
        current, then = last.output, []
        for event in train_events[train_events.index(last) + 1 :]:
            if isinstance(event.module, nn.Dropout) and _same(event.input, current):
                current = event.output
                then.append(event.path)
        if _ratio(current, train_output) is None or any("." in path for path in then):
            return None
        return Wiring(True, then=tuple(then), scales=(*scales, factor))


def _native(activation):
    return activation.native if isinstance(activation, CollapsibleActivation) else activation


def _check_activation(activation, shape, base_layer):
    """Raises a `Refusal` unless a module is a function of one number, the same for every number of its input."""
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    kept = (1000 * x).long() % 2 == 0
    other = torch.where(kept, x, -2 * x)
    called = f"its activation ({type(activation).__name__})"
    skeleton = Skeleton(activation, base_layer)

    def run(given, train):
        entered = given.clone()
        try:
            left = skeleton.run(entered, train=train)
        except Exception as error:  # noqa: BLE001  (any code may run here)
            raise Refusal(f"{called} cannot be run by itself ({type(error).__name__}: {error})") from None
        if not isinstance(left, torch.Tensor) or left.shape != given.shape:
            found = tuple(left.shape) if isinstance(left, torch.Tensor) else type(left).__name__
            raise Refusal(f"{called} gives {found} for an input of shape {tuple(given.shape)}")
        if not left.is_floating_point():
            raise Refusal(f"{called} gives numbers of {left.dtype}")
        if not is_inplace(activation) and not torch.equal(entered, given):
            raise Refusal(f"{called} writes over its input, and has no attribute `inplace` that says so")
        return left.clone()

    for train in (False, True):
        _seed_cpu(0)
        where = "in training " if train else ""
        left, of_other, again = (run(given, train) for given in (x, other, x))
        if not torch.equal(left, again):
            raise Refusal(f"{called} {where}gives two outputs for one input: it draws random numbers or keeps a state")
        backwards = run(x.flatten().flip(0).reshape(shape), train).flatten().flip(0)
        rows = run(x.reshape(-1, shape[-1]), train)
        if not all(_close(*pair) for pair in ((of_other[kept], left[kept]), (backwards, left), (rows, left))):
            raise Refusal(f"{called} {where}is not the same function of each number of its input, whatever the others")
    if skeleton.has_changed_buffers():
        raise Refusal(f"{called} changes a buffer of its own when it runs")


def _close(a, b):
    return torch.allclose(a.flatten(), b.flatten(), rtol=1e-4, atol=1e-6, equal_nan=True)


def _split(layout, output):
    """`(what goes into the activation, what it is multiplied by)`, from what the gate or a fused linear gives."""
    return layout.split(output, -1) if layout.fused else (output, None)


def _follow(value, goal, events, prefix):
    """`(constant, modules passed)` if `goal` is `value` times a constant, perhaps through batch norms and dropouts."""
    passed = set()
    for event in events:
        if isinstance(event.module, (*DROPOUTS, *NORMS)) and _same(event.input, value):
            passed.add(event.path[len(prefix) :])
            value = event.output
    return _ratio(value, goal), passed


def _why(first, second, value, events, prefix):
    for event in events:
        if not isinstance(event.module, (*DROPOUTS, *NORMS)) and _ratio(value, event.input) is not None:
            path = event.path[len(prefix) :]
            if path not in (first, second):
                return f"`{path}` ({type(event.module).__name__}) runs between `{first}` and `{second}`"
    return f"its code does something else than the layout says between `{first}` and `{second}`"


def _same(a, b):
    if a.shape != b.shape:
        if a.numel() != b.numel() or a.shape[-1] != b.shape[-1]:
            return False
        a, b = a.reshape(-1), b.reshape(-1)
    return torch.equal(a.float(), b.float())


def _ratio(a, b):
    """The constant `c` with `b = c * a`, or `None`; exactly 1 where they are equal."""
    if _same(a, b):
        return 1.0
    if a.numel() != b.numel() or a.shape[-1] != b.shape[-1]:
        return None
    a, b = a.reshape(-1).double(), b.reshape(-1).double()
    factor = torch.dot(a, b) / torch.dot(a, a)
    close = torch.allclose(b, factor * a, rtol=1e-4, atol=1e-6 * float(a.abs().max()))
    return float(factor) if close and factor != 0 else None


def _same_output(a, b):
    a, b = list(_tensors(a)), list(_tensors(b))
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


# ----------------------------------------------------------------------------------------------------
# Inputs
# ----------------------------------------------------------------------------------------------------

# Names of arguments that take hidden states of the block's width.
_HIDDEN = (
    "hidden_states", "hidden_state", "x", "input", "inputs", "input_tensor", "hidden", "output_h", "features", "feat",
    "residual", "src", "tgt", "inputs_embeds", "attention_output", "embeddings", "tensor", "hs", "state",
    "lang_feats", "visn_feats", "image_features", "text_features", "cross_modal_text",
)  # fmt: skip


# Arguments that may be left out, but that some layers need all the same.
_CONTEXT = ("encoder_hidden_states", "attention_mask", "encoder_attention_mask", "query_length")


def _signature(module):
    """The parameters of a class's `forward`, the module itself left out; none where it does not tell them."""
    try:
        # Of an instance that has nothing of its own: a `forward` may be more than a function.
        return list(inspect.signature(object.__new__(type(module)).forward).parameters.values())
    except (TypeError, ValueError):
        return []


def possible_arguments(module, width):
    """Ways to call a module, most likely first: keyword arguments made up from the names in its signature."""
    parameters = [p for p in _signature(module) if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not parameters:
        return
    first = parameters[0].name
    if isinstance(module, PreTrainedModel) and first not in _HIDDEN[:2]:
        inputs = model_inputs(module)
        if inputs is not None:
            yield inputs
        if first not in _HIDDEN:
            return
    tokens = (BATCH, LENGTH, width)
    for shape, full in (
        (tokens, False),
        (tokens, True),
        ((BATCH, width, 2, 2), False),
        ((BATCH, 2, 2, width), False),
        ((LENGTH, width), False),
    ):
        generator = torch.Generator().manual_seed(len(shape) + shape[1])
        arguments = {first: torch.randn(shape, generator=generator)}
        for parameter in parameters[1:]:
            name = parameter.name
            if parameter.default is parameter.empty or name == "position_embeddings" or (full and name in _CONTEXT):
                arguments[name] = _argument(name, shape, module, generator, full)
        yield arguments


def _argument(name, shape, module, generator, full):
    if name in _HIDDEN or (full and name == "encoder_hidden_states"):
        return torch.randn(shape, generator=generator)
    if name == "query_length":
        return shape[1] if full else 0
    if full and name.endswith("attention_mask"):
        return torch.zeros(shape[0], 1, 1, shape[1])
    if name in ("position_embeddings", "rotary_pos_emb", "rotary_embeddings"):
        widths = [m.__dict__["head_dim"] for m in module.modules() if isinstance(m.__dict__.get("head_dim"), int)]
        if not widths:
            return None
        return tuple(torch.randn(1, shape[1], widths[0], generator=generator) for _ in range(2))
    if name in ("input_dimensions", "spatial_shape", "hw_shape"):
        return (2, 2)
    if name in ("height", "width"):
        return 2
    if name == "cu_seqlens":
        return torch.tensor([0, shape[0]], dtype=torch.int32)
    if name in ("position_ids", "cache_position"):
        return torch.arange(shape[1])[None]
    if name.startswith(("output_", "use_", "return_", "always_")):
        return False
    return None


def model_inputs(model, batch=BATCH, length=8):
    """Made-up inputs of a transformers model by its `main_input_name` and config, or `None`."""
    config = model.config
    generator = torch.Generator().manual_seed(0)

    def attribute(*names, default=None):
        for name in names:
            for holder in (config, *_sub_configs(config)):
                value = holder.__dict__.get(name)
                if value is not None:
                    return value
        return default

    parameters = inspect.signature(type(model).forward).parameters
    vocabulary = attribute("vocab_size", default=99)
    vocabulary = vocabulary if isinstance(vocabulary, int) else 99
    ids = torch.randint(1, max(2, min(vocabulary, 1000)), (batch, length), generator=generator)
    inputs = {}
    if "input_ids" in parameters:
        inputs["input_ids"] = ids
    if "pixel_values" in parameters:
        channels = attribute("num_channels", "in_channels", "in_chans", default=3)
        size = attribute("image_size", "input_size", "img_size", default=32)
        size = tuple(size)[-2:] if isinstance(size, (list, tuple)) else (size, size)
        frames = config.__dict__.get("num_frames")
        shape = (batch, channels, *size) if frames is None else (batch, frames, channels, *size)
        inputs["pixel_values"] = torch.randn(shape, generator=generator)
    if "input_values" in parameters:
        inputs["input_values"] = torch.randn(batch, 4000, generator=generator)
    if "input_features" in parameters:
        bins = attribute("num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", default=80)
        frames = 2 * attribute("max_source_positions", default=32)
        inputs["input_features"] = torch.randn(batch, frames, bins, generator=generator)
        if "Whisper" in type(model).__name__:
            inputs["input_features"] = inputs["input_features"].transpose(1, 2)
    if "past_values" in parameters:
        length = attribute("context_length", default=32)
        channels = attribute("num_input_channels", default=1)
        inputs["past_values"] = torch.randn(batch, length, channels, generator=generator)
    if not inputs:
        return None
    for name in ("visual_feats", "visual_pos"):  # LXMERT's regions
        if name in parameters:
            width = attribute(f"{name}_dim", "visual_feat_dim", default=4) if name == "visual_feats" else 4
            inputs[name] = torch.randn(batch, 4, width, generator=generator)
    if "bbox" in parameters:
        corners = 8 if "dim_bbox" in config.__dict__ and config.dim_bbox == 8 else 4
        inputs["bbox"] = torch.zeros(batch, length, corners, dtype=torch.long)
    if "decoder_input_ids" in parameters and (config.__dict__.get("is_encoder_decoder") or "input_ids" not in inputs):
        inputs["decoder_input_ids"] = ids
    return inputs


def _sub_configs(config):
    return [value for value in config.__dict__.values() if isinstance(value, PreTrainedConfig)]
