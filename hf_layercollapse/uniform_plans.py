"""Plans in which all blocks have one hidden width: the native architecture, with a smaller number in its config."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from .budgets import least_that_works, limit_of
from .merging import size_of


if TYPE_CHECKING:
    from .blocks import BoundBlock
    from .widths import WidthGroup


# Shares of the widths now that are looked at where a budget is no size.
LEVELS = (0.9, 0.8, 0.65, 0.5, 0.375, 0.28, 0.22, 0.17, 0.125, 0.08)


def counts_of(groups: "Sequence[WidthGroup]", row: Sequence[int]) -> "dict[BoundBlock, int]":
    """Block -> the neurons that it keeps, at a width for each group. All blocks of a group that becomes narrower."""
    return {block: width for group, width in zip(groups, row, strict=True) for block in group.blocks}


def widths_at(groups: "Sequence[WidthGroup]", shares: Iterable[float]) -> list[list[int]]:
    """`[[width of each group]]` at these shares of the widths now, largest first, each once."""
    rows = [tuple(group.at(share) for group in groups) for share in sorted(shares, reverse=True)]
    return [list(row) for row in dict.fromkeys(rows)]


def widths_for(
    groups: "Sequence[WidthGroup]",
    budget: Mapping[str, float],
    shares: Iterable[float],
    constant_term: str,
    whole: Mapping[str, int],
) -> list[list[int]]:
    """`[[width of each group]]` that a search measures, largest first: at these shares of the widths now, and the
    largest that meets a budget of parameters or MACs; `whole` is what the model has of both."""
    rows = widths_at(groups, shares)
    if budget.keys() & {"parameters", "macs"}:
        rows.append(_widths_within(groups, budget, constant_term, whole))
    return [list(row) for row in sorted({tuple(row) for row in rows}, reverse=True)]


def _widths_within(
    groups: "Sequence[WidthGroup]", budget: Mapping[str, float], constant_term: str, whole: Mapping[str, int]
) -> list[int]:
    """The largest widths that meet a budget of parameters or MACs.

    Raises:
        ValueError: None do.
    """
    ((name, value),) = budget.items()
    limit = limit_of(value, whole[name])
    shares = {step * group.step / group.width for group in groups for step in range(1, group.width // group.step + 1)}
    for row in widths_at(groups, shares):
        saved = [_saved(block, width, name, constant_term) for block, width in counts_of(groups, row).items()]
        left = whole[name] - sum(saved)
        if left <= limit:
            return row
    raise ValueError(
        f"The budget {name}={value:g} cannot be met with one width for all blocks: at the smallest, {row[0]} neurons, "
        f"{least_that_works(name, left, whole[name])} Or take a smaller `multiple_of`."
    )


def _saved(block: "BoundBlock", width: int, unit: str, constant_term: str) -> int:
    """What a block saves at a width, in `"macs"` or `"parameters"`."""
    if width == block.hidden_features:
        return 0
    whole = block.macs if unit == "macs" else block.parameters
    return whole - size_of(block, 0, width, unit, constant_term)
