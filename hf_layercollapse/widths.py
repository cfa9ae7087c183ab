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
from .classes import make_native
from .families import RATIO_FIELDS, WIDTH_FIELDS, FeedForwardBlock
from .modeling_layercollapse import config_parts, linear_shape, native_class_of


def native_config(config: Any) -> Any:
    """A copy of a config, without what patching and collapsing put there."""
    config = copy.deepcopy(config)
    for each in (config, *(part for _, part, _ in config_parts(config))):
        make_native(each)
    return config


def build_native(model: nn.Module, config: Any) -> PreTrainedModel:
    """A new model of the native class of `model`, from a native config, without weights: on the meta device, as
    transformers builds those that it loads."""
    with torch.device("meta"):
        return native_class_of(model)(copy.deepcopy(config))


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


@dataclasses.dataclass(frozen=True)
class WidthField:
    """A value of a native config that sets the hidden width of blocks.

    Args:
        path (`tuple[str, ...]`): Of the config inside the config.
        name (`str`): Of its field.
        layer (`int`, *optional*): The place in a field that has a value for each layer.
    """

    path: tuple[str, ...]
    name: str
    layer: int | None = None

    def whole(self, config: Any) -> Any:
        """What the field holds: a number, or a list of one for each layer."""
        return getattr(_part_of(config, self.path), self.name)

    def value(self, config: Any) -> Any:
        """The number that sets the width."""
        whole = self.whole(config)
        return whole if self.layer is None else whole[self.layer]

    def set(self, config: Any, value: Any) -> None:
        """Changes the number in a config in place."""
        if self.layer is not None:
            whole = self.whole(config)
            value = [*whole[: self.layer], value, *whole[self.layer + 1 :]]
        setattr(_part_of(config, self.path), self.name, value)


def _part_of(config: Any, path: Iterable[str]) -> Any:
    """The config inside a config that a path of attributes leads to."""
    for name in path:
        config = getattr(config, name)
    return config


def _config_parts(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, config
    for name in config.sub_configs:
        if config.__dict__.get(name) is not None:
            yield from _config_parts(getattr(config, name), (*path, name))


def governing_fields(model: nn.Module, config: Any, native_blocks: Mapping[str, BoundBlock]) -> dict[str, WidthField]:
    """Block -> the value of the config that sets its hidden width; seen by building models with each field changed."""
    governed: dict[str, WidthField] = {}
    hidden = {block.hidden_features for block in native_blocks.values()}
    features = {block.in_features for block in native_blocks.values()}
    for path, part in _config_parts(config):
        values = part.to_dict()
        for name in (*WIDTH_FIELDS, *RATIO_FIELDS):
            if name not in values or not _may_set_widths(name, values[name], hidden, features):
                continue
            changed = copy.deepcopy(config)
            fields = _told_apart(path, name, values[name], max(hidden))
            for field, value in fields.items():
                field.set(changed, value)
            for block in resized_blocks(build_native(model, changed), native_blocks).values():
                if block.hidden_features != native_blocks[block.name].hidden_features:
                    own = [field for field in fields if len(fields) == 1 or fields[field] == block.hidden_features]
                    if own:
                        governed.setdefault(block.name, own[0])
    return governed


def _may_set_widths(name: str, value: Any, hidden: set[int], features: set[int]) -> bool:
    """Whether a field has a value that blocks of these hidden widths and input widths may come of."""
    if name in RATIO_FIELDS:
        return isinstance(value, (int, float)) and any(int(width * value) in hidden for width in features)
    if isinstance(value, (list, tuple)):  # one for each layer
        return bool(value) and all(isinstance(each, int) and each in hidden for each in value)
    return value is None or (isinstance(value, int) and value in hidden)


def _told_apart(path: tuple[str, ...], name: str, value: Any, widest: int) -> dict[WidthField, Any]:
    """What a field sets -> a value that no block has now, another one for each layer where it has one for each."""
    if isinstance(value, (list, tuple)):
        return {WidthField(path, name, layer): 2 * widest + layer for layer in range(len(value))}
    return {WidthField(path, name): 2 * (widest if value is None else value)}


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
        field (`WidthField`): What sets it.
        blocks (`list[FeedForwardBlock]`): In forward order.
        width (`int`): The hidden width now, of the narrowest where some are narrower.
        step (`int`): What smaller widths are multiples of.
    """

    field: WidthField
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
    dense = build_native(model, config)
    native_blocks = {block.name: block for block in bind_blocks(dense)}
    wanted: dict[str, Any] = {}
    for group, width in zip(groups, widths, strict=True):
        field, features = group.field, group.blocks[0].in_features
        field.set(config, value_for(field.name, field.value(config), width, features))
        wanted |= {block.name: width for block in group.blocks}
    narrow = build_native(model, config)
    found = {name: block.hidden_features for name, block in resized_blocks(narrow, native_blocks).items()}
    other = shapes_outside(dense, native_blocks) != shapes_outside(narrow, native_blocks)
    if other or any(found[name] != width for name, width in wanted.items()):
        name = next((name for name, width in wanted.items() if found[name] != width), next(iter(wanted)))
        raise ValueError(
            f"`{groups[0].field.name}` of {type(config).__name__} does not set the width of these blocks and nothing "
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
                f"`{field.name}` of the config sets the width of all these blocks, and one width is for all or none: "
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
                + ("." if step == multiple_of else f", as `multiple_of` and `{field.name}` of the config want it.")
            )
        groups.append(WidthGroup(field, blocks, width, step))
    return groups


def _is_coarse(config: Any, field: WidthField) -> bool:
    return field.name in RATIO_FIELDS and isinstance(field.value(config), int)


def _fields_of(model: Any, chosen: Sequence[BoundBlock]) -> dict[str, WidthField]:
    """Name of a native block -> the field that sets its width, where it sets that of a chosen one."""
    config = native_config(model.config)
    dense = build_native(model, config)
    native_blocks = {block.name: block for block in bind_blocks(dense)}
    governed = governing_fields(model, config, native_blocks)
    for block in chosen:
        if block.name not in governed:
            raise ValueError(
                f"No field of {type(config).__name__} sets the hidden width of {block.name} alone or with others of "
                f"its width (tried {', '.join(WIDTH_FIELDS + RATIO_FIELDS)}): its native class is built at one width. "
                "Leave `uniform_width` out."
            )
    wanted = {governed[block.name] for block in chosen}
    return {name: field for name, field in governed.items() if field in wanted}
