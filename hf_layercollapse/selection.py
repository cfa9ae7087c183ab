"""Which blocks a selector asks for: all, the first or last ones, those of a part of the model, names or indices."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from . import families
from .families import FeedForwardBlock
from .models import shorten


# `"last:4"`, or in a part of the model `"encoder.last:4"`.
COUNTED = re.compile(r"((?P<part>[^:]+)\.)?(?P<side>first|last):(?P<count>[1-9]\d*)")


BlockT = TypeVar("BlockT", bound=FeedForwardBlock)


def select_blocks(
    blocks: Sequence[BlockT], selector: str | list[str] | list[int], refused: Mapping[str, str] | None = None
) -> list[BlockT]:
    """The blocks that `LayerCollapseConfig.blocks` asks for, in forward order.

    Raises:
        ValueError: A part of the selector matches nothing, or names a block that is refused.
    """
    refused = refused or {}
    if not blocks:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in list(refused.items())[:10])
        raise ValueError(
            "The model has no feed-forward block of a known layout "
            f"({', '.join(layout.name for layout in families.LAYOUTS)})." + (f" Refused:{reasons}" if reasons else "")
        )
    if isinstance(selector, list):
        indices = [index for index in selector if isinstance(index, int)]
        names = [name for name in selector if isinstance(name, str)]
        return _named(blocks, names, refused) if names else _numbered(blocks, indices)
    if selector == "all":
        return list(blocks)
    counted = COUNTED.fullmatch(selector)
    if counted:
        return _first_or_last(blocks, selector, counted["part"], counted["side"], int(counted["count"]))
    chosen = _of_part(blocks, selector) or [block for block in blocks if re.fullmatch(selector, block.name)]
    if not chosen:
        why = f" {selector} is refused: {refused[selector]}." if selector in refused else ""
        raise ValueError(
            f"`blocks` is {selector!r}, which is neither a part of the model nor, as a regular expression, matches a "
            f"block name in full.{why} The names are {_names(blocks)}. {_parts(blocks)}"
        )
    return chosen


def _named(blocks: Sequence[BlockT], names: Sequence[str], refused: Mapping[str, str]) -> list[BlockT]:
    known = {block.name for block in blocks}
    unknown = [name for name in names if name not in known]
    if unknown:
        why = "".join(f" {name} is refused: {refused[name]}." for name in unknown if name in refused)
        raise ValueError(
            f"`blocks` names what is no block of this model: {unknown}.{why} Its blocks are {_names(blocks)}."
        )
    return [block for block in blocks if block.name in names]


def _numbered(blocks: Sequence[BlockT], indices: Sequence[int]) -> list[BlockT]:
    wrong = [index for index in indices if not -len(blocks) <= index < len(blocks)]
    if wrong:
        raise ValueError(
            f"`blocks` has indices {wrong}, and the model has {len(blocks)} blocks (0 to {len(blocks) - 1})."
        )
    chosen = {index % len(blocks) for index in indices}
    return [block for block in blocks if block.index in chosen]


def _first_or_last(blocks: Sequence[BlockT], selector: str, part: str | None, side: str, count: int) -> list[BlockT]:
    where = list(blocks) if part is None else _of_part(blocks, part)
    if not where:
        raise ValueError(f"`blocks` is {selector!r}, and the model has no blocks in a part {part!r}. {_parts(blocks)}")
    if count > len(where):
        within = "the model" if part is None else f"its part {part!r}"
        raise ValueError(f"`blocks` is {selector!r}, and {within} has {len(where)} blocks.")
    return where[:count] if side == "first" else where[-count:]


def _names(blocks: Sequence[BlockT]) -> list[str]:
    return shorten(block.name for block in blocks)


def _of_part(blocks: Sequence[BlockT], part: str) -> list[BlockT]:
    """The blocks inside a module, named by its qualified name or by the last components of it (`"decoder"` for
    `"model.decoder"`)."""
    for levels in range(max((block.name.count(".") for block in blocks), default=0) + 1):
        found: dict[str, list[BlockT]] = {}
        for block in blocks:
            components = block.name.split(".")
            if ".".join(components[levels:]).startswith(f"{part}."):
                found.setdefault(".".join(components[:levels]), []).append(block)
        # The outermost level counts, and a name that stands for several modules there for none.
        if found:
            return next(iter(found.values())) if len(found) == 1 else []
    return []


def _parts(blocks: Sequence[BlockT]) -> str:
    """In words, the modules that `blocks` can name as parts."""
    names: dict[str, None] = {}
    for block in blocks:
        components = block.name.split(".")
        depth = next((i for i, component in enumerate(components) if component.isdigit()), len(components) - 1)
        names[".".join(components[:depth])] = None
    return f"Its parts are {shorten(names)}." if "" not in names else ""
