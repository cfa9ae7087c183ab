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

import functools
import hashlib
import math
import types
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .modeling_layercollapse import CollapsibleActivation, children_of, is_inplace, linear_shape, parameters_of
from .models import base_layer, part_at
from .probe_inputs import BATCH, LENGTH, possible_arguments, signature_of
from .skeletons import ALL, ATOMS, Skeleton, attributes_of, by_itself, seed_cpu
from .upstream import buffers_of


DROPOUTS = (nn.Dropout, nn.Identity)
# Folded into the linear beside it; in evaluation mode it is a scale and a shift per feature.
NORMS = (nn.BatchNorm1d,)
# Features on which a function that knows no width shows what it does.
_ENOUGH = 32


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


@dataclass(frozen=True)
class _Way:
    """What runs between a block's linears in one call.

    Args:
        enters, leaves (`float`): Constants that the input of the activation, and of the last linear, is multiplied by.
        before, between (`set[str]`): Modules that are passed before and after the activation.
    """

    enters: float
    leaves: float
    before: set
    between: set


_UNKNOWN = object()


class Verifier:
    """Verifies the blocks of one model, which must not change meanwhile.

    A block is not run again where it would show nothing that a run has not seen: the modules that were run for another
    one have the same classes and shapes, and each attribute that was read then has the same content.

    Args:
        model (`nn.Module`): The model.
    """

    def __init__(self, model):
        self.model = model
        self.known = {}  # what blocks have in common -> [(what was seen, wiring or refusal)]
        self.structures, self.readable, self.contents = {}, {}, _Contents()

    def wiring(self, name, layout):
        """The [`Wiring`] of the block that the module `name` of the model holds.

        Raises:
            Refusal: Its code does something else than the layout says, or could not be run.
        """
        holder = self.model.get_submodule(name)
        return self._in_sequence(holder, layout) if layout.name == "sequential" else self._shown(name, layout)

    def _in_sequence(self, holder, layout):
        """That of an `nn.Sequential` stands there."""
        activation = part_at(holder, layout.activation)
        hidden = linear_shape(base_layer(part_at(holder, layout.down)))[0]
        self.check_activation(_native(activation), (BATCH, LENGTH, hidden))
        names = list(children_of(holder))
        first, middle, last = (names.index(path) for path in (layout.up, layout.activation, layout.down))
        return Wiring(False, tuple(names[first + 1 : middle]), tuple(names[middle + 1 : last]))

    def _shown(self, name, layout):
        """The module is run, or if it cannot be run alone the smallest around it that can."""
        outer, failure = name, None
        while True:
            inside, module = name[len(outer) :].lstrip("."), self.model.get_submodule(outer)
            probe = _Probe(module, inside, not inside and bool(name), layout, self.check_activation)
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
        work = functools.partial(_check_activation, activation, shape)
        self._once((shape,), activation, work, {(path, ALL) for path, _ in activation.named_modules()})

    def _once(self, key, module, work, seen):
        """What `work` returns or raises, or did for another module that shows the same."""
        known = self.known.setdefault((*key, self._structure(module)), [])
        results = (result for contents, result in known if self._shows(module, contents))
        result = next(results, _UNKNOWN)
        if result is _UNKNOWN:
            try:
                with by_itself():
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
        if name != ALL:
            return self.contents.of(readable[name])
        return tuple((key, self.contents.of(value)) for key, value in readable.items())


def _readable(module):
    """Buffers and attributes; a method that is bound to the module itself is the same of another one."""
    values = {**buffers_of(module), **attributes_of(module)}
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
        if isinstance(value, ATOMS):
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
        check_activation (callable): Raises for a module that is none, given the shape of its input.
    """

    def __init__(self, module, inside, own, layout, check_activation):
        self.module, self.own, self.layout = module, own, layout
        self.prefix = f"{inside}." if inside else ""
        self.activation = module.get_submodule(self.prefix + layout.activation)
        self.check_activation = check_activation
        # Inputs are made up from a model's config.
        self.seen = {("", "config")} if isinstance(module, PreTrainedModel) else set()

    def wiring(self):
        """The [`Wiring`], or, if the module could not be run, why not."""
        failure = None
        width = linear_shape(base_layer(self.module.get_submodule(self.prefix + self.layout.up)))[0]
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
        seed_cpu(0)
        # A patched block's activation stands for the native one inside it.
        activations = {self.activation, _native(self.activation)}
        skeleton = Skeleton(self.module, activations, self.prefix, self.seen, weights)
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
        self.seen |= {(f"{path}.{name}".rstrip("."), ALL) for name, _ in self.activation.named_modules()}
        (first, *_) = (event for event in events if event.path == path)
        self.check_activation(_native(self.activation), first.input.shape)
        return wiring

    def _judge(self, events, output):
        """The [`Wiring`] that a run shows."""
        up, gate, activation, down = self._calls(events)
        ways = [self._way(events, *call) for call in zip(up, gate, activation, down, strict=True)]
        if len({(round(way.enters, 6), round(way.leaves, 6)) for way in ways}) > 1:
            raise Refusal("its code multiplies by different constants in different calls")
        scales = ways[0].enters, ways[0].leaves
        before = {path for way in ways for path in way.before}
        between = {path for way in ways for path in way.between}
        wiring = self._own_wiring(output, up, down, scales) if self.own else None
        if wiring is None:
            self._refuse_other_code(output, scales)
            # Dropout that also runs elsewhere in the holder stays where it is.
            often = {path for path in before | between if len(self._calls_of(events, path)) != len(up)}
            wiring, before, between = Wiring(False), before - often, between - often
        in_order = dict.fromkeys(event.path[len(self.prefix) :] for event in events)
        return replace(
            wiring,
            before=tuple(path for path in in_order if path in before),
            between=tuple(path for path in in_order if path in between),
            scales=(*scales, wiring.scales[2]),
        )

    def _calls_of(self, events, path):
        return [event for event in events if event.path == self.prefix + path]

    def _calls(self, events):
        """The calls of up, gate, activation and down, as many of each; where the gate is none of its own, up's."""
        layout = self.layout
        paths = [layout.up, layout.activation, layout.down, *([layout.gate] if layout.gate else [])]
        calls = {path: self._calls_of(events, path) for path in paths}
        count = len(calls[layout.up])
        for path, found in calls.items():
            if not found:
                raise Refusal(f"its code does not call `{path}` as a module")
            if len(found) != count:
                raise Refusal(f"`{path}` is called {len(found)} times where `{layout.up}` is called {count} times")
        return [calls[path] for path in (layout.up, layout.gate or layout.up, layout.activation, layout.down)]

    def _way(self, events, up, gate, activation, down):
        """The [`_Way`] from the first linears to the last one, in one call of each."""
        layout, prefix = self.layout, self.prefix
        if layout.gate and not _same(up.input, gate.input):
            raise Refusal(f"`{layout.gate}` and `{layout.up}` get different inputs")
        start, factor = layout.split(gate.output, -1) if layout.fused else (gate.output, up.output)
        enters, before = _follow(start, activation.input, events, prefix)
        if enters is None:
            raise Refusal(_why(layout.gate or layout.up, layout.activation, start, events, prefix))
        product = activation.output * factor if layout.gated else activation.output
        leaves, between = _follow(product, down.input, events, prefix)
        if leaves is None:
            raise Refusal(_why(layout.activation, layout.down, product, events, prefix))
        return _Way(enters, leaves, before, between)

    def _refuse_other_code(self, output, scales):
        """Raises unless parts of the block can be exchanged while code of the holder's goes on to run around them."""
        layout, prefix = self.layout, self.prefix
        if layout.gated:
            raise Refusal(
                "its module does more than the gated block (a residual, a norm, dropout as a function), so it cannot "
                "be exchanged as a whole"
            )
        if scales != (1.0, 1.0):
            raise Refusal("its code multiplies by a constant between the two linears")
        again = self.run(salted={prefix + layout.up, prefix + layout.activation})[1]
        if not _same_output(output, again):
            raise Refusal(f"what `{layout.up}` gives is used elsewhere too, not only by `{layout.down}`")

    def _own_wiring(self, output, up, down, scales):
        """The wiring if the holder computes the block and nothing else, else `None`."""
        layout = self.layout
        if len(up) != 1 or not isinstance(output, torch.Tensor) or "." in layout.down:
            return None
        extra = signature_of(self.module)[1:]
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
    """The activation itself, without an alpha; peft's `modules_to_save` may be around both."""
    patched = (module for module in activation.modules() if isinstance(module, CollapsibleActivation))
    return next((module.native for module in patched), activation)


def _check_activation(activation, shape):
    """Raises a `Refusal` unless a module is a function of one number, the same for every number of its input."""
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    kept = (1000 * x).long() % 2 == 0
    other = torch.where(kept, x, -2 * x)
    called = f"its activation ({type(activation).__name__})"
    skeleton = Skeleton(activation)

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
        seed_cpu(0)
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
