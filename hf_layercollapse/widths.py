"""Which field of a native config sets the width of which feed-forward block, seen by building models."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .blocks import BoundBlock, bind, bind_blocks
from .families import RATIO_FIELDS, WIDTH_FIELDS, FeedForwardBlock
from .modeling_layercollapse import LayerCollapseConfigMixin, linear_shape, native_class_of


def native_config(config: Any) -> Any:
    """A copy of a config, without what patching and collapsing put there."""
    config = copy.deepcopy(config)
    if isinstance(config, LayerCollapseConfigMixin):
        built_class: Any = type(config)
        native_class = built_class.native_class
        config.__dict__.pop("layer_collapse")
        config.__class__ = native_class
    return config


def build_native(model: nn.Module, config: Any, meta: bool = False) -> PreTrainedModel:
    """A new model of the native class of `model`, from a native config; with `meta` it has no weights."""
    native_class = native_class_of(model)
    config = copy.deepcopy(config)
    if meta:
        with torch.device("meta"):
            return native_class(config)
    return native_class(config)


def resized_blocks(model: nn.Module, native_blocks: Mapping[str, FeedForwardBlock]) -> dict[str, BoundBlock]:
    """Name -> the same block, bound in a model of other widths. Not looked for: the narrowest would be refused as
    bottlenecks."""
    resized = {}
    for name, native in native_blocks.items():
        block = bind(model, native)
        linears = list(block.linears.values())
        resized[name] = dataclasses.replace(
            block,
            hidden_features=linear_shape(linears[-1])[0],
            parameters=sum(parameter.numel() for linear in linears for parameter in linear.parameters()),
            macs=sum(math.prod(linear_shape(linear)) for linear in linears),
        )
    return resized


def part_of(config: Any, path: Iterable[str]) -> Any:
    """The config inside a config that a path of attributes leads to."""
    for name in path:
        config = getattr(config, name)
    return config


def _config_parts(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, config
    for name in config.sub_configs:
        if config.__dict__.get(name) is not None:
            yield from _config_parts(getattr(config, name), (*path, name))


def governing_fields(
    model: nn.Module, config: Any, native_blocks: Mapping[str, BoundBlock]
) -> dict[str, tuple[tuple[str, ...], str]]:
    """Block -> the config field that sets its hidden width, `(path of the config inside the config, name)`; seen by
    building models with each field changed."""
    governed: dict[str, Any] = {}
    hidden = {block.hidden_features for block in native_blocks.values()}
    features = {block.in_features for block in native_blocks.values()}
    for path, part in _config_parts(config):
        values = part.to_dict()
        for name in (*WIDTH_FIELDS, *RATIO_FIELDS):
            if name not in values:
                continue
            old = values[name]
            if name in RATIO_FIELDS:
                fits = isinstance(old, (int, float)) and any(int(width * old) in hidden for width in features)
            else:
                fits = old is None or old in hidden
            if not fits:
                continue
            changed = copy.deepcopy(config)
            setattr(part_of(changed, path), name, 2 * (max(hidden) if old is None else old))
            for block in resized_blocks(build_native(model, changed, meta=True), native_blocks).values():
                if block.hidden_features != native_blocks[block.name].hidden_features:
                    governed.setdefault(block.name, (path, name))
    return governed


def value_for(field: str, old: Any, width: int, features: int) -> float:
    """The value of a config field that gives blocks this hidden width, or more where it can only be coarser.

    Args:
        field (`str`): Its name.
        old: Its value now.
        width, features (`int`): Hidden width that is wanted, and input width of the blocks.
    """
    if field not in RATIO_FIELDS:
        return width
    # The native class rounds down.
    return math.ceil(width / features) if isinstance(old, int) else (width + 0.5) / features


def shapes_outside(model: nn.Module, native_blocks: Mapping[str, BoundBlock]) -> dict[str, tuple[int, ...]]:
    """State dict key -> shape, of everything but the linears of the blocks."""
    linears = [block.path(path) for block in native_blocks.values() for path in block.layout.linears]
    inside = {f"{linear}.{kind}" for linear in linears for kind in ("weight", "bias")}
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in inside}


@dataclasses.dataclass(frozen=True)
class WidthGroup:
    """Blocks that have one hidden width in the native class.

    Args:
        field (`tuple`): What sets it: path of the config inside the config, and name.
        blocks (`list[FeedForwardBlock]`): In forward order.
        width (`int`): The hidden width now, of the narrowest where some are narrower.
        step (`int`): What smaller widths are multiples of.
    """

    field: tuple[tuple[str, ...], str]
    blocks: list[BoundBlock]
    width: int
    step: int

    def at(self, share: float) -> int:
        """The largest width of at most this share, at least one step."""
        return max(1, int(share * self.width / self.step + 1e-9)) * self.step


def check_native(model: PreTrainedModel, groups: Sequence[WidthGroup], widths: Sequence[int]) -> None:
    """Raises if the native class, with these widths in its config, is not the model with narrower blocks.

    Args:
        widths (`list[int]`): Of each group.

    Raises:
        ValueError: It has other widths then, or something else changes too.
    """
    config = native_config(model.config)
    dense = build_native(model, config, meta=True)
    native_blocks = {block.name: block for block in bind_blocks(dense)}
    wanted: dict[str, Any] = {}
    for group, width in zip(groups, widths, strict=True):
        path, name = group.field
        old = getattr(part_of(config, path), name)
        setattr(part_of(config, path), name, value_for(name, old, width, group.blocks[0].in_features))
        wanted |= {block.name: width for block in group.blocks}
    narrow = build_native(model, config, meta=True)
    found = {name: block.hidden_features for name, block in resized_blocks(narrow, native_blocks).items()}
    other = shapes_outside(dense, native_blocks) != shapes_outside(narrow, native_blocks)
    if other or any(found[name] != width for name, width in wanted.items()):
        name = next((name for name, width in wanted.items() if found[name] != width), next(iter(wanted)))
        raise ValueError(
            f"`{groups[0].field[1]}` of {type(config).__name__} does not set the width of these blocks and nothing "
            f"else: for {wanted[name]} neurons of {name} it gives {found[name]}"
            + (", and weights outside of the blocks change too" if other else "")
            + ". Leave `uniform_width` out."
        )


def width_groups(model: Any, chosen: Sequence[BoundBlock], multiple_of: int = 1) -> list[WidthGroup]:
    """The chosen blocks, grouped by what sets their width.

    Raises:
        TypeError: It is no transformers model.
        ValueError: No field of the config sets the width of a block; a field sets that of a block that is not chosen
            or cannot be narrowed; or no width is a multiple of `multiple_of`.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`uniform_width` is for transformers models, whose config has the width; this is a "
            f"{type(model).__name__}. `LayerCollapseConfig(rank=0, keep_neurons=...)` gives its blocks one width."
        )
    fields = _fields_of(model, chosen)
    named, groups = {block.name: block for block in chosen}, []
    for field in dict.fromkeys(fields.values()):
        names = [name for name in fields if fields[name] == field]
        left_out = [name for name in names if name not in named]
        if left_out:
            raise ValueError(
                f"`{field[1]}` of the config sets the width of all these blocks, and one width is for all or none: "
                f"`blocks` leaves out, or a collapse has made linear, {left_out[:6]}. Choose all of them, or leave "
                "`uniform_width` out."
            )
        blocks = [named[name] for name in names]
        width, step = min(block.hidden_features for block in blocks), multiple_of
        if _is_coarse(model.config, field):
            step = math.lcm(step, blocks[0].in_features)
        if step > width:
            raise ValueError(
                f"No width of block {blocks[0].name}, which has {width} neurons, is a multiple of {step}"
                + ("." if step == multiple_of else f", as `multiple_of` and `{field[1]}` of the config want it.")
            )
        groups.append(WidthGroup(field, blocks, width, step))
    return groups


def _is_coarse(config: Any, field: tuple[tuple[str, ...], str]) -> bool:
    path, name = field
    return name in RATIO_FIELDS and isinstance(getattr(part_of(config, path), name), int)


def _fields_of(model: Any, chosen: Sequence[BoundBlock]) -> dict[str, tuple[tuple[str, ...], str]]:
    """Name of a native block -> the field that sets its width, where it sets that of a chosen one."""
    config = native_config(model.config)
    dense = build_native(model, config, meta=True)
    native_blocks = {block.name: block for block in bind_blocks(dense)}
    governed = governing_fields(model, config, native_blocks)
    for block in chosen:
        if block.name not in governed:
            raise ValueError(
                f"No field of {type(config).__name__} sets the hidden width of {block.name} alone or with others of "
                f"its width (tried {', '.join(WIDTH_FIELDS + RATIO_FIELDS)}): its native class is built at one width, "
                "or at one for each layer. Leave `uniform_width` out."
            )
    wanted = {governed[block.name] for block in chosen}
    return {name: field for name, field in governed.items() if field in wanted}
