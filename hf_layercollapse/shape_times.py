"""How long feed-forward blocks of any size take on this machine: a table of shapes, measured once and read between."""

import bisect
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .block_sizes import BlockSize, any_fit, rank_of
from .forward_passes import run_over
from .merging import computed, has_constant, is_possible, make_merge, parameters_of, stored_neurons
from .models import device_of, inputs_of, kept_on
from .profiling import compare_latency
from .upstream import is_on_disk, offload_hook_of


if TYPE_CHECKING:
    from .blocks import BoundBlock


# Numbers of kept neurons that are timed for each rank, as shares of the hidden width.
TIMED_SHARES = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)

# Rounds in which all shapes take turns, after some that do not count.
ROUNDS, WARMUP = 5, 1


@dataclass(frozen=True)
class ShapeTimes:
    """Seconds that each block takes on one batch.

    Args:
        dense (`dict[str, float]`): Block name -> as it is.
        others (`dict[str, dict[int | None, list[tuple[int, float]]]]`): Block name -> rank of the linear map (`None`:
            full) -> `(neurons kept, seconds)`, rising.
    """

    dense: dict[str, float]
    others: dict[str, dict[int | None, list[tuple[int, float]]]]

    def of(self, block: str, size: BlockSize) -> float:
        """Of a [`block_sizes.BlockSize`] of the block of this name; between two that were timed on the line."""
        if size.as_it_is:
            return self.dense[block]
        points = self.others[block][size.rank]
        after = bisect.bisect_left(points, size.count, key=lambda point: point[0])
        if after == len(points):
            return points[-1][1]
        count, seconds = points[after]
        if count == size.count or not after:
            return seconds
        before, least = points[after - 1]
        return least + (seconds - least) * (size.count - before) / (count - before)

    def all(self, sizes: Mapping[str, BlockSize]) -> float:
        """Of all blocks, with these sizes (`dict[str, BlockSize]`)."""
        return sum(self.of(name, size) for name, size in sizes.items())


@torch.no_grad()
def measure_shapes(
    model: nn.Module,
    inner: Any,
    blocks: "Sequence[BoundBlock]",
    batch: Mapping[str, Any],
    rank_shares: Sequence[float | None],
    multiple_of: int,
    constant_term: str,
) -> ShapeTimes:
    """Times every rank, with a few numbers of neurons each, of every shape of block that there is, on the inputs that
    one batch gives it. All of them take turns in one process; medians count. What the weights are does not matter.

    Args:
        model, inner (`nn.Module`): The model, and what it wraps; left as they are.
        blocks (`list[BoundBlock]`): Dense.
        batch (`dict[str, Tensor]`): Model inputs.
        rank_shares, multiple_of, constant_term: As of a plan.
    """
    inputs: dict[str, torch.Tensor] = {}
    same = _of_one_shape(blocks)

    def observe() -> Iterator[RemovableHandle]:
        for first, *_ in same:

            def keep(module: nn.Module, args: Any, name: str = first.name) -> None:
                inputs[name] = args[0].detach()

            yield first.first.register_forward_pre_hook(keep)

    run_over(model, inner, [inputs_of(batch, device_of(inner))], observe)
    dense, others = {}, {}
    for alike in same:
        seconds, by_rank = _times(alike[0], inputs[alike[0].name], rank_shares, multiple_of, constant_term)
        for block in alike:
            dense[block.name], others[block.name] = seconds, by_rank
    return ShapeTimes(dense, others)


def bytes_to_time(
    blocks: "Iterable[BoundBlock]", rank_shares: Sequence[float | None], multiple_of: int, constant_term: str
) -> Counter[torch.device]:
    """What [`measure_shapes`] holds, in bytes, by device: blocks of one shape in all their sizes."""
    most: Counter[torch.device] = Counter()
    for block, *_ in _of_one_shape(blocks):
        sizes = _timed_sizes(block, rank_shares, multiple_of)
        parameters = sum(
            parameters_of(block, rank, stored_neurons(rank, count), constant_term) for rank, count in sizes
        )
        most |= Counter({kept_on(block.down): parameters * block.down.weight.element_size()})
    return most


def _of_one_shape(blocks: "Iterable[BoundBlock]") -> "list[list[BoundBlock]]":
    same: dict[Any, list[BoundBlock]] = {}
    for block in blocks:
        same.setdefault(_shape_of(block), []).append(block)
    return list(same.values())


def _timed_sizes(
    block: "BoundBlock", rank_shares: Sequence[float | None], multiple_of: int
) -> list[tuple[int | None, int]]:
    """`[(rank, neurons)]`."""
    ranks = {rank_of(block, share, multiple_of) for share in rank_shares}
    counts = sorted({round(share * block.hidden_features) for share in TIMED_SHARES})
    return [(rank, count) for rank in ranks for count in counts if is_possible(block, rank, count)]


def _shape_of(block: "BoundBlock") -> tuple[Any, ...]:
    """What blocks of equal times have in common."""
    down = block.down
    widths = block.in_features, block.hidden_features, block.out_features
    # Weights that are brought for each call take longer, from a disk longer still.
    places = device_of(down), offload_hook_of(down) is None, is_on_disk(down, "weight")
    return (*widths, block.kind, type(down), type(block.activation), down.weight.dtype, *places)


def _times(
    block: "BoundBlock", x: torch.Tensor, rank_shares: Sequence[float | None], multiple_of: int, constant_term: str
) -> tuple[float, dict[int | None, list[tuple[int, float]]]]:
    """`(seconds as it is, rank -> [(neurons, seconds)])`."""
    # As it is under no key of a size.
    calls: dict[tuple[int | None, int] | None, nn.Module] = {None: _Call(block.forward)}
    for rank, count in _timed_sizes(block, rank_shares, multiple_of):
        fit = any_fit(block, rank, stored_neurons(rank, count), has_constant(block, rank, constant_term))
        calls[rank, count] = _Call(computed(make_merge(block, fit, refit=False)))
    times = compare_latency(calls, {"x": x}, ROUNDS, WARMUP, progress=False)
    medians = {key: statistics.median(found.seconds) for key, found in times.items()}
    as_it_is = medians.pop(None)
    by_rank: dict[int | None, list[tuple[int, float]]] = {}
    for key, seconds in medians.items():
        if key is not None:
            by_rank.setdefault(key[0], []).append((key[1], seconds))
    return as_it_is, {rank: _rising(points) for rank, points in by_rank.items()}


def _rising(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points with each time at least that of fewer neurons: what is less is noise."""
    most, rising = 0.0, []
    for count, seconds in sorted(points):
        most = max(most, seconds)
        rising.append((count, most))
    return rising


class _Call(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)
