"""What runs between a block's linears, seen on the model itself: its own code, run on stand-ins that cost nothing.

A block's holder (or the smallest enclosing module that can be run) is copied as a skeleton: the same classes and the
same attributes, but every linear is a stand-in that returns fixed random numbers and records what it was given, and
every other weight is a constant that takes no memory. Running it shows the wiring and nothing else: whether the
activation gets the first linear's output untouched, the last linear the activation's, and what happens to the result.
A block of a 70B model is checked as fast as one of a toy, on the CPU, whatever device or dtype its weights have.
"""

import contextlib
import inspect
import math
import zlib
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .modeling_layercollapse import CollapsibleActivation, linear_shape


logger = logging.get_logger(__name__)

DROPOUTS = (nn.Dropout, nn.Identity)
# Folded into the linear beside it; in evaluation mode it is a scale and a shift per feature.
NORMS = (nn.BatchNorm1d,)
# Rows of the probing input: enough that an accidental equality is impossible, few enough to cost nothing.
BATCH, LENGTH = 2, 4


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


@dataclass
class _Event:
    path: str
    module: nn.Module
    input: torch.Tensor
    output: torch.Tensor


class _StandIn(nn.Linear):
    """In place of a linear or an activation: fixed random numbers of the right shape."""

    def __init__(self, path, native, record, watched, out_features=None):
        nn.Module.__init__(self)
        self.watched = watched
        self.path, self.record, self.out_features = path, record, out_features
        self.salt, self.calls = 0, 0
        for name, value in native.__dict__.items():  # `in_features`, `nf` and what else the code around may read
            if not name.startswith("_") and name not in self.__dict__ and name != "forward":
                self.__dict__[name] = value
        for name, parameter in native._parameters.items():
            self._parameters[name] = None if parameter is None else _costless(parameter)

    def forward(self, hidden_states, *args, **kwargs):
        width = hidden_states.shape[-1] if self.out_features is None else self.out_features
        seed = zlib.crc32(f"{self.path} {self.calls} {self.salt}".encode())
        self.calls += 1
        generator = torch.Generator().manual_seed(seed)
        shape = (*hidden_states.shape[:-1], width)
        if self.watched:
            output = torch.randn(shape, generator=generator)
        else:  # the same few numbers again and again: whole towers may run around the block
            numel = math.prod(shape)
            few = torch.randn(min(numel, 4099), generator=generator)
            output = few.repeat(-(-numel // max(1, len(few))))[:numel].reshape(shape)
        if self.watched:
            self.record.append(_Event(self.path, self, hidden_states.detach().clone(), output.clone()))
        return output


class Skeleton:
    """A copy of a module's code without its weights. Nothing that runs in it touches the module it was made from.

    Args:
        module (`nn.Module`): What to copy.
        base_layer (callable): Gives the linear that an adapter wraps, or the module itself.
        activations (`set[nn.Module]`): Modules that become stand-ins that keep the width.
        watch (`str`): Calls are recorded of modules whose path begins so.
    """

    def __init__(self, module, base_layer, activations, watch=""):
        self.watch = watch
        self.base_layer, self.activations = base_layer, activations
        self.record, self.stand_ins, self.copies, self.paths = [], [], {}, {}
        self.module = self._copy(module, "")

    def _copy(self, module, path):
        if module is None:
            return None
        if module in self.copies:
            return self.copies[module]
        base = self.base_layer(module)
        if module in self.activations or isinstance(base, (nn.Linear, Conv1D)):
            width = None if module in self.activations else linear_shape(base)[1]
            copy = _StandIn(path, base, self.record, path.startswith(self.watch), width)
            self.stand_ins.append(copy)
        else:
            copy = object.__new__(type(module))
            copy.__dict__ = {
                name: value.__class__() if name.endswith(("_hooks", "_hooks_with_kwargs")) else value
                for name, value in module.__dict__.items()
                # An instance's own `forward` is a wrapper that is bound to the module it was made for.
                if name not in ("forward", "_old_forward", "_hf_hook")
            }
            copy._parameters = {name: None if p is None else _costless(p) for name, p in module._parameters.items()}
            copy._buffers = {name: None if b is None else _on_cpu(b) for name, b in module._buffers.items()}
            self.copies[module] = copy
            copy._modules = {
                name: self._copy(child, f"{path}.{name}" if path else name) for name, child in module._modules.items()
            }
            if not copy._modules and path.startswith(self.watch):
                copy.register_forward_hook(self._recorder(path))
        self.copies[module] = copy
        return copy

    def _recorder(self, path):
        def hook(module, args, output):
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                self.record.append(_Event(path, module, args[0].detach().clone(), output.detach().clone()))

        return hook

    def run(self, arguments, salted=(), train=False, module=None):
        """Runs the copy; stand-ins named in `salted` return other numbers than they would otherwise.

        Returns:
            `(events, output)`
        """
        self.record.clear()
        for stand_in in self.stand_ins:
            stand_in.calls, stand_in.salt = 0, int(stand_in.path in salted)
        self.module.train(train)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(0)
            output = (module or self.module)(**arguments)
        return list(self.record), output


@contextlib.contextmanager
def _quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _costless(parameter):
    # Stride 0: one number, whatever the shape.
    value = torch.ones((), dtype=torch.float32 if parameter.is_floating_point() else parameter.dtype)
    return nn.Parameter(value.expand(parameter.shape), requires_grad=False)


def _on_cpu(buffer):
    if buffer.is_meta:
        return torch.zeros(buffer.shape, dtype=torch.float32 if buffer.is_floating_point() else buffer.dtype)
    buffer = buffer.detach().to("cpu")
    return buffer.float() if buffer.is_floating_point() else buffer


def verify(model, name, layout, base_layer):
    """The [`Wiring`] of the block that the module `name` of the model holds.

    Raises:
        Refusal: Its code does something else than the layout says, or could not be run.
    """
    holder = model.get_submodule(name)
    chain, outer = [(name, holder)], name
    while outer:
        outer = outer.rpartition(".")[0]
        chain.append((outer, model.get_submodule(outer)))
    activation = holder.get_submodule(layout.activation)
    activations = {activation} | {module for module in _stateful_activations(activation)}
    width = linear_shape(base_layer(holder.get_submodule(layout.up)))[0]
    failure = None
    for ancestor_name, ancestor in chain:
        inside = name[len(ancestor_name) :].lstrip(".")
        prefix = f"{inside}." if inside else ""
        skeleton = Skeleton(ancestor, base_layer, activations, prefix)
        for arguments in possible_arguments(ancestor, width):
            try:
                events, output = skeleton.run(arguments)
            except Refusal:
                raise
            except Exception as error:  # noqa: BLE001  (any code may run here, and each failure means: try another way)
                failure = failure or f"{type(ancestor).__name__}: {type(error).__name__}: {error}"
                continue
            if not any(event.path == prefix + layout.down for event in events):
                failure = failure or f"running {type(ancestor).__name__} does not reach it"
                continue
            return _judge(
                skeleton, layout, prefix, arguments, events, output, own=not inside and bool(name), holder=holder
            )
    failure = " ".join(str(failure).split())
    raise Refusal(f"its code could not be run to check it ({failure[:200]})")


def _stateful_activations(activation):
    # A patched block's activation stands for the native one inside it.
    return [activation.native] if isinstance(activation, CollapsibleActivation) else []


def _judge(skeleton, layout, prefix, arguments, events, output, own, holder):
    def calls(part):
        return [event for event in events if event.path == prefix + part]

    up, down, activation = calls(layout.up), calls(layout.down), calls(layout.activation)
    gate = calls(layout.gate) if layout.gate else up
    parts = [("up", layout.up, up), ("activation", layout.activation, activation), ("down", layout.down, down)]
    for _, path, part_events in parts + ([("gate", layout.gate, gate)] if layout.gate else []):
        if not part_events:
            raise Refusal(f"its code does not call `{path}` as a module")
        if len(part_events) != len(up):
            raise Refusal(f"`{path}` is called {len(part_events)} times where `{layout.up}` is called {len(up)} times")

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

    wiring = None
    if own:
        wiring = _own_wiring(skeleton, layout, arguments, events, output, up, down, (enters, leaves), holder)
    if wiring is None:
        if layout.gated:
            raise Refusal(
                "its module does more than the gated block (a residual, a norm, dropout as a function), so it cannot "
                "be exchanged as a whole"
            )
        if (enters, leaves) != (1.0, 1.0):
            raise Refusal("its code multiplies by a constant between the two linears")
        inner_parts = {prefix + layout.up, prefix + layout.activation}
        again = skeleton.run(arguments, salted=inner_parts)[1]
        if not _same_output(output, again):
            raise Refusal(f"what `{layout.up}` gives is used elsewhere too, not only by `{layout.down}`")
        # Dropout that also runs elsewhere in the holder stays where it is.
        counts = {path: sum(event.path == prefix + path for event in events) for path in before | between}
        once = {path for path, count in counts.items() if count == len(up)}
        wiring = Wiring(False)
        before, between = before & once, between & once
    order = [event.path[len(prefix) :] for event in events]
    in_order = dict.fromkeys(order)
    return Wiring(
        wiring.own_module,
        tuple(path for path in in_order if path in before),
        tuple(path for path in in_order if path in between),
        wiring.then,
        (enters, leaves, wiring.scales[2]),
    )


def _own_wiring(skeleton, layout, arguments, events, output, up, down, scales, holder):
    """The wiring if the holder computes the block and nothing else, else `None`."""
    if len(up) != 1 or not isinstance(output, torch.Tensor) or "." in layout.down:
        return None
    extra = [p for p in inspect.signature(type(holder).forward).parameters.values()][2:]
    required = [p for p in extra if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    # Where a caller may pass more than the hidden states, the module must stay.
    if required or (extra and not layout.gated):
        return None
    (given,) = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    factor = _ratio(down[0].output, output)
    if not _same(given, up[0].input) or factor is None:
        return None
    # Dropout written as a function shows in training mode only.
    train_events, train_output = skeleton.run(arguments, train=True)
    (last,) = [event for event in train_events if event.path == layout.down]
    current, then = last.output, []
    for event in train_events[train_events.index(last) + 1 :]:
        if isinstance(event.module, nn.Dropout) and _same(event.input, current):
            current = event.output
            then.append(event.path)
    if _ratio(current, train_output) is None or any("." in path for path in then):
        return None
    return Wiring(True, then=tuple(then), scales=(*scales, factor))


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


def possible_arguments(module, width):
    """Ways to call a module, most likely first: keyword arguments made up from the names in its signature."""
    parameters = [
        p
        for p in list(inspect.signature(type(module).forward).parameters.values())[1:]
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
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
        inputs["input_features"] = torch.randn(batch, 2 * attribute("max_source_positions", default=32), bins)
        if "Whisper" in type(model).__name__:
            inputs["input_features"] = inputs["input_features"].transpose(1, 2)
    if "past_values" in parameters:
        length = attribute("context_length", default=32)
        inputs["past_values"] = torch.randn(batch, length, attribute("num_input_channels", default=1))
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
