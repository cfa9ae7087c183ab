"""What a collapse did, block by block."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from .tables import table


@dataclass(frozen=True)
class BlockReport:
    """What happened to one block.

    Args:
        name (`str`), index (`int`): Which block.
        outcome (`str`): `"collapsed"`; `"kept"` or `"restored"` if it was patched but not ready.
        method (`str`, *optional*): `"merged"` (alpha taken as 1), `"refit"` (least squares on calibration data), or
            `"dropped"`: it gives a constant, the mean of its output where its class has a bias and zero where it has
            none. One neuron of zeros keeps its place.
        alpha (`float`, *optional*): Smallest alpha of the block before, `None` if it was not patched.
        parameters_before, parameters_after (`int`): Weights and biases of the block.
        macs_before, macs_after (`int`): Multiply-accumulates per token.
        error (`float`, *optional*): Relative error of what the block became against what it was,
            `|new - old| / |old|`, on the standard-normal inputs of [`functional.gaussian_inputs`].
        calibration_error (`float`, *optional*): The same on other data of the calibration data's kind, by generalised
            cross-validation, if the block was refit to such data.
        r2 (`float`, *optional*): Share of the variance of the block's output that what it became explains, on such
            data.
        rank (`int`, *optional*): Of the linear map where it is two thin matrices; `None`: full.
        kept_neurons (`int`): Neurons that stay nonlinear, beside the map if there is one.
    """

    name: str
    index: int
    outcome: str
    alpha: float | None
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    method: str | None = None
    error: float | None = None
    calibration_error: float | None = None
    r2: float | None = None
    rank: int | None = None
    kept_neurons: int = 0

    @property
    def measured_error(self) -> float | None:
        """The relative error on data like the calibration data where there is one, else on normal inputs."""
        return self.error if self.calibration_error is None else self.calibration_error


@dataclass(frozen=True)
class DataReport:
    """What was read of calibration data.

    Args:
        rows (`int`): All that were fitted to.
        distinct (`int`): Those that say something different, which are what is used.
        tokens (`int`): Tokens of theirs, or patches, that reached a block, padding left out.
        held_aside (`int`): Further rows, that something was measured on.
    """

    rows: int
    distinct: int
    tokens: int
    held_aside: int = 0

    def __str__(self) -> str:
        aside = f", {self.held_aside:,} rows held aside" if self.held_aside else ""
        return f"{self.rows:,} rows, {self.distinct:,} different, {self.tokens:,} tokens{aside}"


@dataclass(frozen=True)
class CollapseReport:
    """What a collapse did. Prints as a table.

    Args:
        blocks (`list[BlockReport]`): Every block that was looked at, in forward order.
        parameters_before, parameters_after (`int`): Of the whole model, shared ones counted once.
        largest_logit_difference (`float`, *optional*): Largest absolute difference of the model's first output before
            and after, over a sample of the calibration rows.
        data ([`DataReport`], *optional*): What was read of the calibration data.
    """

    blocks: list[BlockReport]
    parameters_before: int
    parameters_after: int
    largest_logit_difference: float | None = None
    data: DataReport | None = None

    @property
    def collapsed(self) -> list[str]:
        """Names of the blocks that collapsed: to a linear map, to fewer neurons, to both, or that were dropped."""
        return [block.name for block in self.blocks if block.outcome == "collapsed"]

    @property
    def not_collapsed(self) -> list[str]:
        """Names of the blocks that were patched but not ready."""
        return [block.name for block in self.blocks if block.outcome != "collapsed"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        narrow = any(block.kept_neurons or block.rank is not None for block in self.blocks)
        header = ["block", "outcome", "alpha", "parameters", "MACs/token", "relative error"]
        header += ["rank", "kept neurons"] if narrow else []
        rows = [
            [
                block.name,
                block.outcome if block.method is None else f"{block.outcome} ({block.method})",
                "-" if block.alpha is None else f"{block.alpha:.4f}",
                _change(block.parameters_before, block.parameters_after),
                _change(block.macs_before, block.macs_after),
                "-" if block.error is None else f"{block.measured_error:.2e}",
                *([_rank(block), str(block.kept_neurons)] if narrow else []),
            ]
            for block in self.blocks
        ]
        saved = 1 - self.parameters_after / self.parameters_before
        lines = [table([header, *rows], left=2)]
        lines.append(
            f"{len(self.collapsed)} of {len(self.blocks)} blocks collapsed; model parameters "
            f"{self.parameters_before:,} -> {self.parameters_after:,} ({saved:.1%} fewer)"
        )
        if self.largest_logit_difference is not None:
            lines.append(f"largest logit difference on calibration data: {self.largest_logit_difference:.3e}")
        if self.data is not None:
            lines.append(f"calibration data: {self.data}")
        return "\n".join(lines)


def _rank(block: BlockReport) -> str:
    return "-" if block.outcome != "collapsed" else "full" if block.rank is None else str(block.rank)


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,}" if before != after else f"{before:,}"
