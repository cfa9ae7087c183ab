"""Collapsed models as ordinary checkpoints of their native model type, for where the plugin cannot be: `export_stock`.

For GELU, its tanh approximation, QuickGELU, SiLU and ReLU, `act(z) - act(-z) = z`. So a linear map `P V x` of rank `r`
is a native feed-forward block of width `2 r`, with `up = [V; -V]` and `down = [P, -P]`. In a gated block
`act(gate(x)) * up(x)` a bias makes the gate constant, and `r` neurons do. Kept neurons stay neurons.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from . import functional
from .blocks import BoundBlock, bind_blocks, weight_and_bias
from .families import BIAS_FIELDS, RATIO_FIELDS, WIDTH_FIELDS
from .modeling_layercollapse import (
    CollapsedBlock,
    CollapsedIdentity,
    LayerCollapseModelMixin,
    NarrowActivation,
    NarrowFeedForward,
)
from .models import count_parameters, evaluating, refuse_objects_around, shorten, unwrap
from .widths import (
    build_native,
    governing_fields,
    native_config,
    resized_blocks,
    shapes_outside,
    value_for,
)


# A gate's bias where it is to be constant: what activations give there is far from 0.
GATE_POINT = 1.0
# Relative to the dtype's precision: two products and a sum of up to a few thousand terms stay far below.
TOLERANCE = 1000
# Relative, of what is computed in float64 before weights are rounded: the same.
EXACT_TOLERANCE = 1e-9


@dataclass(frozen=True)
class StockReport:
    """What the detour over the native architecture costs. Prints as a table.

    Args:
        model_type (`str`): Native model type.
        fields (`dict[str, tuple]`): Field of the config -> (native value, new value); lists where it has a value for
            each layer.
        parameters_dense, parameters_collapsed, parameters_stock (`int`): Of the whole model.
        macs_dense, macs_collapsed, macs_stock (`int`): Multiply-accumulates per token in the feed-forward blocks.
        errors (`dict[str, float]`): Block -> relative error of the stock against the collapsed block, on Gaussian
            inputs.
    """

    model_type: str
    fields: dict[str, tuple]
    parameters_dense: int
    parameters_collapsed: int
    parameters_stock: int
    macs_dense: int
    macs_collapsed: int
    macs_stock: int
    errors: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        from .tables import table

        rows = [["", "parameters", "feed-forward MACs/token"]]
        for name in ("dense", "collapsed", "stock"):
            parameters, macs = (getattr(self, f"{what}_{name}") for what in ("parameters", "macs"))
            rows.append([name, f"{parameters:,}", f"{macs:,}"])
        changes = ", ".join(f"{field} {old} -> {new}" for field, (old, new) in self.fields.items())
        saved, possible = (
            1 - after / self.parameters_dense for after in (self.parameters_stock, self.parameters_collapsed)
        )
        return (
            f"{table(rows)}\nnative {self.model_type} with {changes}: {saved:.1%} fewer parameters than dense, where "
            f"the collapsed model has {possible:.1%} fewer; largest relative error of a block "
            f"{functional.largest(self.errors.values()):.1e}"
        )


@dataclass
class _Neurons:
    """A block as neurons of a native feed-forward block: float64, or as they are where they are such neurons already.
    Biases are `None` where they are zero."""

    up_mi: torch.Tensor
    up_m: torch.Tensor | None
    down_om: torch.Tensor
    down_o: torch.Tensor | None
    gate_mi: torch.Tensor | None = None
    gate_m: torch.Tensor | None = None

    @property
    def width(self) -> int:
        return self.up_mi.shape[0]


@dataclass(frozen=True)
class _Needs:
    """What the neurons of a block take, which themselves are made again when they are written.

    Args:
        width (`int`): How many there are.
        biases (`frozenset[str]`): Names of the linears that need one.
    """

    width: int
    biases: frozenset[str]

    @classmethod
    def of(cls, neurons: _Neurons) -> "_Needs":
        values = {"gate": neurons.gate_m, "up": neurons.up_m, "down": neurons.down_o}
        return cls(neurons.width, frozenset(name for name, value in values.items() if value is not None))


@torch.no_grad()
def export_stock(model: PreTrainedModel) -> tuple[PreTrainedModel, StockReport]:
    """A collapsed model as one of its native class, which transformers loads without this package, and a report.

    Every block keeps its input and output; hidden widths become what the widest block needs, and the others are padded
    with neurons that give zero. The model itself is not changed, and its weights that stay as they are (all but those
    of the blocks, and of blocks that are native modules of that width already) are not copied: both models hold the
    same tensors. `copy.deepcopy` of the native one gives it its own, where one of them is to be trained.

    Args:
        model (`PreTrainedModel`): A collapsed model.

    Returns:
        `(native model, StockReport)`; the native model is an ordinary one, with `save_pretrained`.

    Raises:
        TypeError: It is no patched or collapsed model, or only a part of it is one, by itself.
        ValueError: A block is patched; the native architecture cannot express what a block became (the message says
            why, and the width it would need); or it could, and would not save anything.
    """
    refuse_objects_around(model)
    model = unwrap(model)[0]
    blocks = _collapsed_blocks(model)
    _check_weights(model)
    config = native_config(model.config)
    dense = build_native(model, config)
    native_blocks = {block.name: block for block in bind_blocks(dense)}
    wanted = {
        name: _Needs.of(_as_neurons(block, native_blocks[name]))
        for name, block in blocks.items()
        if block.state == "collapsed"
    }
    native, fields, stock_blocks = _fitting_model(model, config, dense, blocks, native_blocks, wanted)
    _fill(native, model, blocks, native_blocks, stock_blocks)
    report = StockReport(
        native.config.model_type,
        fields,
        count_parameters(dense),
        count_parameters(model),
        count_parameters(native),
        sum(block.macs for block in native_blocks.values()),
        sum(block.macs for block in blocks.values()),
        sum(block.macs for block in stock_blocks.values()),
        {name: _error(model, blocks[name], stock_blocks[name]) for name in wanted},
    )
    _check_errors(report.errors, TOLERANCE * torch.finfo(model.dtype).eps)
    return native, report


def _check_errors(errors: Mapping[str, float], tolerance: float) -> None:
    if not functional.largest(errors.values()) <= tolerance:  # not (NaN) either
        raise ValueError(f"The native blocks do not compute what the collapsed ones do: {dict(errors)}.")


def _collapsed_blocks(model: Any) -> dict[str, BoundBlock]:
    """Name -> block of a collapsed model; raises where it is none, or its blocks are patched."""
    if not isinstance(model, LayerCollapseModelMixin):
        parts = [name for name, part in model.named_modules() if isinstance(part, LayerCollapseModelMixin)]
        if parts:
            raise TypeError(
                f"`{parts[0]}` of this {type(model).__name__} is patched or collapsed as a model of its own, and the "
                "whole has no table. Call `hf_layercollapse.patching.refresh_layer_collapse(model)` first, which "
                "gives it one."
            )
        raise TypeError(
            f"Expected a collapsed model, got {type(model).__name__}. A dense model is a checkpoint of its native "
            "type already: `save_pretrained` writes it."
        )
    blocks = {block.name: block for block in bind_blocks(model)}
    patched = [name for name, block in blocks.items() if block.state == "patched"]
    if patched:
        raise ValueError(
            f"These blocks are patched and not collapsed: {patched}. Collapse them with `collapse_model`, or take "
            "their alphas away with `remove_layer_collapse`, first."
        )
    return blocks


def _check_weights(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise ValueError(f"`{name}` is under an adapter. Call `model = model.merge_and_unload()` first.")
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not torch.Tensor or not parameter.is_floating_point() or parameter.is_meta:
            raise ValueError(
                f"`{name}` is {type(parameter.data).__name__} of {parameter.dtype} on {parameter.device}: load the "
                "model without quantization, with its weights in memory, and quantize what `export_stock` gives."
            )


def _fill(
    native: Any,
    model: Any,
    blocks: Mapping[str, BoundBlock],
    native_blocks: Mapping[str, BoundBlock],
    stock_blocks: Mapping[str, BoundBlock],
) -> None:
    """Gives a native model, which has none, the weights of the collapsed one: the same tensors where they fit, and one
    block after the other those of its neurons.

    Args:
        stock_blocks (`dict[str, BoundBlock]`): Of the native model; the others are of the collapsed one, and of the
            native class at its own width.

    Raises:
        ValueError: A block does not compute what the collapsed one does, or the native class has what the collapsed
            model does not have.
    """
    changed = {name: stock for name, stock in stock_blocks.items() if not _is_the_same(blocks[name], stock)}
    inside = {f"{stock.path(path)}.{kind}" for stock in changed.values() for path in stock.linears for kind in _KINDS}
    own = native.state_dict()
    outside = {key: value for key, value in model.state_dict().items() if key in own and key not in inside}
    native.load_state_dict(outside, strict=False, assign=True)
    _take_buffers(native, model)
    tensors = (*native.named_parameters(), *native.named_buffers())
    empty = [name for name, tensor in tensors if tensor.is_meta and name not in inside]
    if empty:
        raise ValueError(
            f"The native {type(native).__name__} has {shorten(empty)}, which this collapsed model has not. Save the "
            "model with `save_pretrained` instead."
        )
    for name, stock in stock_blocks.items():
        block = blocks[name]
        if block.state == "collapsed" or name in changed:
            entries = _weights(stock, _as_neurons(block, native_blocks[name]))
            _check_errors({name: _exact_error(block, stock, entries)}, EXACT_TOLERANCE)
        if name in changed:
            like = next(block.module.parameters())
            for path, values in entries.items():
                _load(stock.linears[path], [value.detach().to(like) for value in values])
    native.tie_weights()
    native.to(model.device).eval()
    if model.can_generate():
        native.generation_config = copy.deepcopy(model.generation_config)


_KINDS = ("weight", "bias")


def _is_the_same(block: BoundBlock, stock: BoundBlock) -> bool:
    """Whether a block has the linears of the native one, so that it can stay as it is."""

    def shapes(each: BoundBlock) -> dict[str, dict[str, torch.Size]]:
        return {
            path: {name: value.shape for name, value in linear.named_parameters()}
            for path, linear in each.linears.items()
        }

    return block.can_collapse and shapes(block) == shapes(stock)


def _take_buffers(native: nn.Module, model: nn.Module) -> None:
    """Buffers that are not saved (frequencies of rotary embeddings, say) become those of the collapsed model."""
    own = dict(native.named_buffers())
    for name, buffer in model.named_buffers():
        if name in own and own[name].is_meta:
            path, _, last = name.rpartition(".")
            setattr(native.get_submodule(path), last, buffer)


def _load(linear: nn.Module, values: Sequence[torch.Tensor]) -> nn.Module:
    """Makes these the weight, and the bias if there is one, of a linear in place."""
    linear.load_state_dict(dict(zip(_KINDS, values, strict=False)), assign=True)
    return linear


# ----------------------------------------------------------------------------------------------------
# One block
# ----------------------------------------------------------------------------------------------------


def _as_neurons(block: BoundBlock, native: BoundBlock) -> _Neurons:
    """A collapsed block as neurons of its native one, whatever biases that takes."""
    if block.can_collapse:
        return _native_neurons(block)
    if native.before or native.between or native.scales != (1.0, 1.0, 1.0):
        raise ValueError(
            f"`{block.name}` has a batch norm or a constant factor between its linears: it has no native form."
        )
    narrow = next((module for module in (block.module, block.activation) if isinstance(module, _NARROW)), None)
    count = 0 if narrow is None else narrow.neurons
    if narrow is not None and count and narrow.act_name != "native":
        raise ValueError(
            f"`{block.name}` keeps neurons with the activation {narrow.act_name!r}; its native class has another."
        )
    left, right, shift, kept = _parts(block, count)
    if not left.shape[1]:
        return kept
    # The linear part's own bias goes to the end of the block.
    down_o = kept.down_o if shift is None else left @ shift + (0.0 if kept.down_o is None else kept.down_o)
    return _joined(_linear_as_neurons(block, native, left, right), kept, down_o)


_NARROW = (NarrowFeedForward, NarrowActivation)


def _parts(block: BoundBlock, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, _Neurons]:
    """`(P, V, v, kept neurons)` of a collapsed block that keeps so many: `y = P (V x + v) + D act(U x + u) + b`."""
    down, down_o = _affine(block.down)
    channels, width = down.shape[1] - count, block.in_features
    if block.up is None or isinstance(block.up, CollapsedIdentity):
        up, up_bias = down.new_zeros(0, width), None
    else:
        up, up_bias = _affine(block.up)
    gate = gate_bias = None
    if block.layout.fused and count:
        (gate, up), (gate_bias, up_bias) = _cut_at(count, up, up_bias)
    elif block.gate is not None:
        gate, gate_bias = _affine(block.gate)
    if len(up) == count:
        # Full rank: the input itself is what goes past the activation; or no linear part at all.
        right, shift = torch.eye(width, dtype=torch.float64, device=down.device)[:channels], None
    else:
        (right, up), (shift, up_bias) = _cut_at(channels, up, up_bias)
    kept = _Neurons(up, _nonzero(up_bias), down[:, channels:], _nonzero(down_o), gate, _nonzero(gate_bias))
    return down[:, :channels], right, _nonzero(shift), kept


def _cut_at(
    count: int, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor | None, torch.Tensor | None]]:
    """`((first rows, others), (first biases, others))`; biases may be `None`."""
    biases = (None, None) if bias is None else (bias[:count], bias[count:])
    return (weight[:count], weight[count:]), biases


def _linear_as_neurons(block: BoundBlock, native: BoundBlock, left: torch.Tensor, right: torch.Tensor) -> _Neurons:
    """The linear map `P V` as [`_Neurons`] of a native block, without a bias at its end."""
    if any(True for _ in native.activation.parameters()):
        raise ValueError(f"The activation of `{block.name}` has parameters of its own: it has no native form.")
    activation = copy.deepcopy(native.activation).to("cpu")
    if block.layout.gated:
        constant = float(activation(torch.tensor(GATE_POINT, dtype=torch.float64)))
        if not 1e-3 < abs(constant) < 1e3:
            raise ValueError(f"The gate of `{block.name}` gives {constant} at {GATE_POINT}: nothing to divide by.")
        gate_bias = right.new_full((len(right),), GATE_POINT)
        return _Neurons(right, None, left / constant, None, torch.zeros_like(right), gate_bias)
    points = torch.linspace(-6, 6, 1000, dtype=torch.float64)
    slope = functional.odd_slope(points, activation(points), activation(-points))
    if slope is None:
        raise ValueError(
            f"The activation of `{block.name}`, {type(native.activation).__name__}, does not have "
            "`act(z) - act(-z) = c * z`, as GELU, SiLU and ReLU have: its native class computes no linear map."
        )
    up, down = functional.linear_as_neurons(left, right, slope)
    return _Neurons(up, None, down, None)


def _joined(first: _Neurons, second: _Neurons, down_o: torch.Tensor | None) -> _Neurons:
    """The neurons of both, with this bias at the end of the block."""

    def biases(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
        if one is None and other is None:
            return None
        return torch.cat(
            [_or_zeros(one, first.width).to(second.up_mi), _or_zeros(other, second.width).to(second.up_mi)]
        )

    return _Neurons(
        torch.cat([first.up_mi, second.up_mi]),
        biases(first.up_m, second.up_m),
        torch.cat([first.down_om, second.down_om], dim=1),
        down_o,
        None if first.gate_mi is None else torch.cat([first.gate_mi, _rows(second.gate_mi, first.gate_mi)]),
        biases(first.gate_m, second.gate_m),
    )


def _native_neurons(block: BoundBlock) -> _Neurons:
    """A block whose modules are native, dense or narrowed."""
    layout = block.layout
    up, up_bias = weight_and_bias(block.up)
    down, down_bias = weight_and_bias(block.down)
    gate = gate_bias = None
    if layout.fused:
        gate, up = layout.split(up, 0)
        if up_bias is not None:
            gate_bias, up_bias = layout.split(up_bias, 0)
    elif layout.gate:
        gate, gate_bias = weight_and_bias(block.gate)
    return _Neurons(up, up_bias, down, down_bias, gate, gate_bias)


def _affine(linear: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight, bias = weight_and_bias(linear)
    return functional.wide(weight), None if bias is None else functional.wide(bias)


def _nonzero(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None or not bias.any() else bias


def _rows(weight: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_zeros(0, like.shape[1]) if weight is None else weight


def _or_zeros(bias: torch.Tensor | None, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.float64) if bias is None else bias


def _weights(block: BoundBlock, neurons: _Neurons) -> dict[str, list[torch.Tensor]]:
    """`{path of a linear: [weight, bias]}` of a native block, padded with neurons that give zero; without a bias where
    that has none."""
    layout, width = block.layout, block.hidden_features
    padding = width - neurons.width
    pad_rows = torch.nn.functional.pad
    up = pad_rows(neurons.up_mi, (0, 0, 0, padding))
    up_bias = pad_rows(_or_zeros(neurons.up_m, neurons.width).to(up), (0, padding))
    down = pad_rows(neurons.down_om, (0, padding))
    parts = {layout.down: (down, _or_zeros(neurons.down_o, len(down)).to(up))}
    if layout.gated:
        gate = pad_rows(_rows(neurons.gate_mi, up), (0, 0, 0, padding))
        gate_bias = pad_rows(_or_zeros(neurons.gate_m, neurons.width).to(up), (0, padding))
        if layout.gate is None:
            up, up_bias = layout.join(gate, up, 0), layout.join(gate_bias, up_bias, 0)
        else:
            parts[layout.gate] = gate, gate_bias
    parts[layout.up] = up, up_bias
    entries = {}
    for path, (weight, bias) in parts.items():
        linear = block.linears[path]
        transposed = weight_and_bias(linear)[0] is not linear.weight
        entries[path] = [(weight.T if transposed else weight).contiguous()]
        if linear.bias is not None:
            entries[path].append(bias)
    return entries


def _exact_error(block: BoundBlock, stock: BoundBlock, entries: Mapping[str, Sequence[torch.Tensor]]) -> float:
    """Relative error, on Gaussian inputs, of the native block with these weights, before they are rounded to the
    model's type: all in float64, since in half precision a wrong block is hardly to be told from a rounded one."""
    entries = {path: [functional.wide(value) for value in values] for path, values in entries.items()}
    layout = stock.layout
    device = entries[layout.down][0].device

    def wide(module: Any) -> Any:
        return None if module is None else copy.deepcopy(module).to(device).double()

    paths = {"up": layout.up, "down": layout.down} | ({} if layout.gate is None else {"gate": layout.gate})
    linears: dict[str, Any] = {
        part: _load(copy.deepcopy(getattr(stock, part)), entries[path]) for part, path in paths.items()
    }
    native = dataclasses.replace(stock, activation=wide(stock.activation), **linears)
    names = ("module",) if _is_a_module(block) else ("up", "activation", "down", "gate")
    parts: dict[str, Any] = {name: wide(getattr(block, name)) for name in names}
    collapsed = dataclasses.replace(block, **parts)
    x = functional.wide(functional.gaussian_inputs(block.in_features)).to(device)
    return functional.relative_error(_outputs(collapsed, x), native.forward(x))


def _error(model: Any, block: BoundBlock, stock: BoundBlock) -> float:
    """Relative error of the native block, on Gaussian inputs, as the models are."""
    x = functional.gaussian_inputs(block.in_features).to(model.device, next(block.module.parameters()).dtype)
    return functional.relative_error(_outputs(block, x), stock.forward(x))


def _outputs(block: BoundBlock, x: torch.Tensor) -> torch.Tensor:
    """What a block of the collapsed model computes, dropouts off."""
    if block.can_collapse:
        return block.forward(x)
    whole = block.module if _is_a_module(block) else nn.Sequential(block.up, block.activation, block.down)
    with evaluating(whole):
        return whole(x)


def _is_a_module(block: BoundBlock) -> bool:
    """Whether a block became one module, and not several in the places of its parts."""
    return isinstance(block.module, (CollapsedBlock, NarrowFeedForward))


# ----------------------------------------------------------------------------------------------------
# The config
# ----------------------------------------------------------------------------------------------------


def _fitting_model(
    model: Any,
    config: Any,
    dense: nn.Module,
    blocks: Mapping[str, BoundBlock],
    native_blocks: Mapping[str, BoundBlock],
    wanted: Mapping[str, _Needs],
) -> tuple[Any, dict[str, Any], dict[str, BoundBlock]]:
    """`(native model without weights, {field: (old, new)}, {name: its block})`: one where every block fits, and that
    is smaller than the dense one."""
    needed = {name: wanted[name].width if name in wanted else native_blocks[name].hidden_features for name in blocks}
    changed, fields = _with_widths(model, config, native_blocks, wanted, needed)
    lacking = _lacking_biases(native_blocks, wanted)
    if lacking:
        flags = [name for name in BIAS_FIELDS if name in changed.to_dict() and getattr(changed, name) is False]
        for name in flags:
            setattr(changed, name, True)
            fields[name] = (False, True)
        if flags:
            lacking = _lacking_biases(resized_blocks(build_native(model, changed), native_blocks), wanted)
        if lacking:
            _refuse_biases(config, native_blocks, needed, wanted, lacking)

    stock = build_native(model, changed)
    stock_blocks = resized_blocks(stock, native_blocks)
    _check_shapes(dense, stock, native_blocks, stock_blocks, needed, fields)
    _check_saving(config, dense, stock, native_blocks, wanted, needed)
    return stock, fields, stock_blocks


def _with_widths(
    model: Any,
    config: Any,
    native_blocks: Mapping[str, BoundBlock],
    wanted: Mapping[str, _Needs],
    needed: Mapping[str, int],
) -> tuple[Any, dict[str, Any]]:
    """`(config, {field: (old, new)})`: a copy whose fields give collapsed blocks the width they need."""
    governed = governing_fields(model, config, native_blocks)
    missing = [name for name in wanted if name not in governed]
    if missing:
        raise ValueError(
            f"No field of {type(config).__name__} sets the hidden width of {missing[0]} (tried "
            f"{', '.join(WIDTH_FIELDS + RATIO_FIELDS)}): the native class is built at one width. It would need "
            f"{needed[missing[0]]} of {native_blocks[missing[0]].hidden_features}."
        )
    changed, fields = copy.deepcopy(config), {}
    for field in dict.fromkeys(governed.values()):
        names = [block for block in governed if governed[block] == field]
        if not any(block in wanted for block in names):
            continue
        width = max(needed[block] for block in names)
        field.set(changed, value_for(field.name, field.value(config), width, native_blocks[names[0]].in_features))
        fields[".".join((*field.path, field.name))] = (field.whole(config), field.whole(changed))
    return changed, fields


def _check_saving(
    config: Any,
    dense: nn.Module,
    stock: nn.Module,
    native_blocks: Mapping[str, BoundBlock],
    wanted: Mapping[str, _Needs],
    needed: Mapping[str, int],
) -> None:
    """Raises where the native model would be no smaller than the dense one."""
    before, after = count_parameters(dense), count_parameters(stock)
    if after < before:
        return
    widths = {name: needed[name] for name in list(needed)[:8]}
    full = [name for name in needed if name not in wanted]
    why = f" Not collapsed, and so of full width: {full}." if full else ""
    raise ValueError(
        f"As a native {config.model_type} this model would have {after:,} parameters, and the dense one has "
        f"{before:,}: the detour saves nothing. One width must fit all blocks, and they need {widths} of "
        f"{max(block.hidden_features for block in native_blocks.values())} neurons (a linear map of rank r needs "
        f"2r, in a gated block r).{why} Save it with `save_pretrained` instead, collapse more blocks, or collapse "
        "to a lower rank."
    )


def _lacking_biases(native_blocks: Mapping[str, BoundBlock], wanted: Mapping[str, _Needs]) -> dict[str, list[str]]:
    """Block -> the linears that need a bias and have none."""
    lacking = {}
    for name, needs in wanted.items():
        block = native_blocks[name]
        linears = {"up": block.up, "down": block.down, "gate": block.first}
        missing = [part for part in sorted(needs.biases) if linears[part].bias is None]
        if missing:
            lacking[name] = missing
    return lacking


def _refuse_biases(
    config: Any,
    native_blocks: Mapping[str, BoundBlock],
    needed: Mapping[str, int],
    wanted: Mapping[str, _Needs],
    lacking: Mapping[str, list[str]],
) -> NoReturn:
    name = next(iter(lacking))
    block = native_blocks[name]
    why = (
        "a gated block is linear only where a bias keeps its gate constant"
        if "gate" in lacking[name]
        else "what the collapse fitted has a constant term"
    )
    raise ValueError(
        f"A native {config.model_type} cannot express `{name}`: its {' and '.join(lacking[name])} would need a bias, "
        f"which this class does not have ({why}). With biases it would take {needed[name]} of "
        f"{block.hidden_features} neurons. The same holds for {len(lacking)} of {len(wanted)} collapsed blocks. Save "
        "the model with `save_pretrained`, or export it to ONNX or OpenVINO."
    )


def _check_shapes(
    dense: nn.Module,
    stock: nn.Module,
    native_blocks: Mapping[str, BoundBlock],
    stock_blocks: Mapping[str, BoundBlock],
    needed: Mapping[str, int],
    fields: Mapping[str, Any],
) -> None:
    """The changed fields must have changed the blocks, and nothing else."""
    short = [name for name in needed if stock_blocks[name].hidden_features < needed[name]]
    shapes = [shapes_outside(model, native_blocks) for model in (dense, stock)]
    if short or shapes[0] != shapes[1]:
        other = sorted(key for key in shapes[0] | shapes[1] if shapes[0].get(key) != shapes[1].get(key))
        raise ValueError(
            f"Setting {fields} does not give the native class blocks of the wanted widths and nothing else: too "
            f"narrow {short}, otherwise changed {other[:5]}."
        )
