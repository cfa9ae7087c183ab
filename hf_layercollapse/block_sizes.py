"""What each size of a block is expected to cost: every rank and number of neurons, from one greedy run a rank."""

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import functional
from .blocks import BoundBlock
from .merging import cost_of, has_constant, is_possible, parameters_of, stored_neurons, stored_rank


if TYPE_CHECKING:
    from .loss_metric import LossMetric
    from .moments import BlockMoments


# Ranks of the linear part that plans choose from, as shares of the input width; `None` is full rank.
RANK_SHARES = (None, 1 / 4, 1 / 8, 1 / 16, 1 / 48, 0.0)

# Numbers of kept neurons that plans choose from, for each rank: evenly spaced ones, and halves of the first of them.
EVEN_COUNTS = 96


@dataclass(frozen=True)
class BlockSize:
    """One size of one block.

    Args:
        rank (`int`, *optional*): Of its linear map; `None`: full. Without a meaning where the block stays as it is.
        count (`int`): Neurons kept. None of them and rank 0: the block is dropped.
        macs (`int`): Weights, which are its multiply-accumulates per token; a dropped block has one neuron of zeros.
        parameters (`int`): Weights and biases.
        loss (`float`): Expected to be lost: nats a prediction in the metric of the loss, else the share of the
            output's variance that is left unexplained.
        as_it_is (`bool`): Whether this is the block untouched.
    """

    rank: int | None
    count: int
    macs: int
    parameters: int
    loss: float
    as_it_is: bool = False

    def amount(self, unit: str) -> int:
        """What it takes of a budget in `"macs"` or `"parameters"`."""
        return self.macs if unit == "macs" else self.parameters


@dataclass(frozen=True)
class BlockSizes:
    """What one block can become.

    Args:
        block (`BoundBlock`): As it is.
        constant_term (`str`): As in [`LayerCollapseConfig`].
        neurons (`dict[int | None, list[int]]`): Rank -> hidden neurons in the order of their use.
        losses (`dict[int | None, list[float]]`): Rank -> what is expected to be lost with the first `k` of them.
        choice (`list[BlockSize]`): Those that plans choose from, the block as it is last.
        worth_having (`list[BlockSize]`): Of these, those that are not lossier than one with fewer weights; from the
            smallest to the block as it is.
    """

    block: BoundBlock
    constant_term: str
    neurons: dict[int | None, list[int]]
    losses: dict[int | None, list[float]]
    choice: list[BlockSize]
    worth_having: list[BlockSize]

    @property
    def dense(self) -> BlockSize:
        """The block as it is."""
        return self.worth_having[-1]

    def at(self, rank: int | None, count: int) -> BlockSize:
        """One size; as many neurons as there are, and no linear map, are the block as it is."""
        if rank == 0 and count == self.block.hidden_features:
            return self.dense
        stored = stored_neurons(rank, count)
        parameters = parameters_of(self.block, rank, stored, self.constant_term)
        return BlockSize(rank, count, cost_of(self.block, rank, stored), parameters, self.losses[rank][count])

    @property
    def smallest(self) -> BlockSize:
        """The block dropped, or where only linear maps are wanted the smallest of them."""
        return self.at(0, 0) if 0 in self.losses else self.worth_having[0]

    def largest(self, rank: int | None, room: float, unit: str, multiple_of: int) -> BlockSize | None:
        """The largest size of this rank that takes no more than `room` of a budget; `None` if there is none."""
        counts = range(0 if rank != 0 else multiple_of, len(self.losses.get(rank, ())), multiple_of)
        fitting = bisect.bisect_right(counts, room, key=lambda count: self.at(rank, count).amount(unit))
        return self.at(rank, counts[fitting - 1]) if fitting else None


def rank_of(block: BoundBlock, share: float | None, multiple_of: int = 1) -> int | None:
    """The rank that a share of the input width stands for; `None` where one full matrix is no larger."""
    if share is None or share == 0:
        return stored_rank(block, None if share is None else 0)
    return stored_rank(block, max(1, round(share * block.in_features / multiple_of)) * multiple_of)


def sizes_of(
    block: BoundBlock,
    moments: "BlockMoments",
    metric: "LossMetric | None" = None,
    rank_shares: Sequence[float | None] = RANK_SHARES,
    multiple_of: int = 1,
    constant_term: str = "native",
) -> BlockSizes:
    """The [`BlockSizes`] of a block.

    Neurons and linear maps are chosen in the metric of the loss `G = S S`: reduced-rank regression and orthogonal
    least squares of `y S` in place of `y`, so that what is left unexplained there is `tr(G R)`, and half of it the
    expected loss in nats (see [`loss_metric.LossMetric`]). It is corrected for what a fit explains of its own data by
    chance (generalised cross-validation).

    Args:
        block (`BoundBlock`): What may change.
        moments ([`moments.BlockMoments`]): Of its input, all its neurons and its output. They are used up.
        metric ([`loss_metric.LossMetric`], *optional*): Default: every direction of the output counts alike.
        rank_shares (`Sequence[float | None]`): See `RANK_SHARES`.
        multiple_of (`int`): Of which ranks and numbers of neurons are multiples.
        constant_term (`str`): As in [`LayerCollapseConfig`].
    """
    moments.refuse_too_few()
    root = None if metric is None else metric.root().to(moments.cov_fo)
    dense = BlockSize(None, block.hidden_features, block.macs, block.parameters, 0.0, as_it_is=True)
    found = BlockSizes(block, constant_term, {}, {}, [], [dense])
    ranks = _ranks_of(block, rank_shares, multiple_of)
    chosen: dict[int | None, tuple[list[int], list[float]]] = {}
    # Those without a constant term last: moments about the origin take the place of the centred ones.
    target = None
    for rank in sorted(ranks, key=lambda rank: not has_constant(block, rank, constant_term)):
        if moments.constant and not has_constant(block, rank, constant_term):
            target, moments = None, moments.without_constant(in_place=True)
        most = _most_neurons(block, rank)
        if most is None:
            continue
        target = target or _Target.of(moments, root)
        order, left = _chosen(moments, rank, most, target)
        unit = 0.5 if metric is not None else 1 / max(float(moments.cov_oo.trace()), 1e-300)
        losses = [
            unit * functional.generalized(value, moments.tokens, moments.coefficients(rank, count))
            for count, value in enumerate(left.tolist())
        ]
        chosen[rank] = [moments.neurons[position] for position in order], losses
    for rank in (rank for rank in ranks if rank in chosen):
        found.neurons[rank], found.losses[rank] = chosen[rank]
        found.choice.extend(found.at(rank, count) for count in _counts(len(chosen[rank][0]), block, multiple_of))
    found.worth_having[:0] = worth_having(found.choice, lambda size: size.macs)
    found.choice.append(dense)
    return found


def possible_sizes(
    block: BoundBlock, rank_shares: Sequence[float | None], multiple_of: int, constant_term: str
) -> BlockSizes:
    """The sizes that a block can have, before anything is known of what they lose: to see what they take."""
    most = {rank: _most_neurons(block, rank) for rank in _ranks_of(block, rank_shares, multiple_of)}
    losses = {rank: [0.0] * (count + 1) for rank, count in most.items() if count is not None}
    dense = BlockSize(None, block.hidden_features, block.macs, block.parameters, 0.0, as_it_is=True)
    return BlockSizes(block, constant_term, {}, losses, [dense], [dense])


def _ranks_of(block: BoundBlock, rank_shares: Sequence[float | None], multiple_of: int) -> list[int | None]:
    shares = {rank_of(block, share, multiple_of) for share in rank_shares}
    return sorted(shares, key=lambda rank: math.inf if rank is None else rank)


def _most_neurons(block: BoundBlock, rank: int | None) -> int | None:
    """How many neurons can stay beside a linear map of this rank, so that the block is smaller than it is; `None`
    where it can have no such map."""
    most = min((block.macs - 1 - cost_of(block, rank, 0)) // cost_of(block, 0, 1), block.hidden_features)
    if not is_possible(block, rank, 1):
        most = min(most, 0) if rank is None else -1
    return None if most < 0 or (rank == 0 and most == 0) else most


class _Target(NamedTuple):
    """What neurons and linear maps are chosen for: the output's moments with the features `(f, o)` in the metric of
    the loss, and its variance there."""

    cov_fo: torch.Tensor
    variance: float

    @classmethod
    def of(cls, moments: "BlockMoments", root: torch.Tensor | None) -> "_Target":
        if root is None:
            return cls(moments.cov_fo, float(moments.cov_oo.trace()))
        return cls(moments.cov_fo @ root, float((root @ moments.cov_oo @ root).trace()))


def _chosen(moments: "BlockMoments", rank: int | None, most: int, target: _Target) -> tuple[list[int], torch.Tensor]:
    """`(order, what is left)`: neurons in the order of their use, and `tr(G R)` with the first `k` of them."""
    width = moments.width
    given = None if rank is None else moments.mean_f.new_zeros(0, width)
    if rank:
        of_x = moments.cov_ff[:width, :width], target.cov_fo[:width]
        given = functional.reduced_rank(*of_x, width, rank, moments.ridge)[1]
    order, explained = functional.greedy_neurons(moments.cov_ff, target.cov_fo, width, most, given, moments.ridge)
    return order, (target.variance - explained).clamp_min(0)


def _counts(most: int, block: BoundBlock, multiple_of: int) -> list[int]:
    """Numbers of neurons that plans choose from."""
    step = max(1, block.hidden_features // EVEN_COUNTS)
    counts, small = {*range(step, most + 1, step), most}, step
    while small > 1:
        small //= 2
        counts.add(small)
    counts = {-(-count // multiple_of) * multiple_of for count in counts} | {most // multiple_of * multiple_of}
    return sorted({0, *(count for count in counts if count <= most)})


def worth_having(sizes: Iterable[BlockSize], cost: Callable[[BlockSize], float]) -> list[BlockSize]:
    """Those that lose less than any that costs no more, from the cheapest on."""
    worth, best = [], math.inf
    for size in sorted(sizes, key=lambda size: (cost(size), size.loss)):
        if size.loss < best:
            best = size.loss
            worth.append(size)
    return worth


def allocations(
    sizes: Mapping[str, Sequence[BlockSize]], budgets: Sequence[float], unit: str = "macs"
) -> list[dict[str, BlockSize] | None]:
    """Block name -> its size, for each budget: the smallest sum of expected losses.

    Args:
        sizes (`dict[str, list[BlockSize]]`): What each block may become.
        budgets (`Sequence[float]`): Largest sums over the blocks.
        unit (`str`): Of what: `"macs"` or `"parameters"`.

    Returns:
        For each budget the sizes, or `None` where the smallest sizes of all blocks are too large.
    """
    rows = [[(size.amount(unit), size.loss) for size in found] for found in sizes.values()]
    return [
        None if chosen is None else {n: f[i] for (n, f), i in zip(sizes.items(), chosen, strict=True)}
        for chosen in functional.allocate(rows, budgets)
    ]


def alike(
    sizes: Mapping[str, BlockSizes], budget: float, unit: str, rank_share: float | None, multiple_of: int
) -> dict[str, BlockSize] | None:
    """Every block with a linear part of the same share of its width, and as many neurons as the same share of its
    weights allows: what a plan has to beat.

    Args:
        sizes (`dict[str, BlockSizes]`): Of every block.
        budget, unit: As in [`allocations`].
        rank_share (`float`, *optional*): `None`: full rank.

    Returns:
        Block name -> size, or `None` where a block has no such size.
    """
    share = budget / sum(found.dense.amount(unit) for found in sizes.values())
    chosen = {}
    for name, found in sizes.items():
        rank, room = rank_of(found.block, rank_share, multiple_of), share * found.dense.amount(unit)
        largest = found.largest(rank, room, unit, multiple_of)
        if largest is None:
            return None
        chosen[name] = largest
    return chosen


def fit_size(
    moments: "BlockMoments",
    positions: Iterable[int],
    rank: int | None,
    root: torch.Tensor | None = None,
    constant: bool = True,
) -> functional.Fit:
    """The weights of a size: the linear map's input directions are chosen in the metric of the loss, everything that
    is computed from them and from the neurons is plain least squares.

    Args:
        positions (`Sequence[int]`): Of the kept neurons among those of the moments.
        rank (`int`, *optional*): Of the linear map; `None`: full.
        root (`Tensor`, *optional*): `S`, see [`root_to_fit`]. Default: every direction of the output counts alike.
        constant (`bool`): Whether there is a constant term.
    """
    kept = moments.restricted(sorted(positions, key=lambda position: moments.neurons[position]), rank != 0)
    if kept.constant and not constant:
        kept = kept.without_constant()
    if not rank or root is None:
        return kept.fit(rank)
    right = functional.reduced_rank(kept.cov_ff, kept.cov_fo @ root, kept.width, rank, kept.ridge)[1]
    return kept.fit(rank, right_ri=right)


def root_to_fit(
    moments: "BlockMoments", ranks: Iterable[int | None], metric: "LossMetric | None"
) -> torch.Tensor | None:
    """`S` of a block's [`LossMetric`] `S S`, for all fits to its moments with maps of these ranks; `None` where none
    of them depends on it."""
    return None if metric is None or not any(ranks) else metric.root().to(moments.cov_fo)


def any_fit(block: BoundBlock, rank: int | None, count: int, constant: bool) -> functional.Fit:
    """A [`functional.Fit`] of the shapes of a size, for what does not depend on weights."""
    width, out = block.in_features, block.out_features

    def some(*shape: int) -> torch.Tensor:
        return torch.full(shape, 1 / width, dtype=torch.float64)

    return functional.Fit(
        some(out, width) if rank is None else None,
        None if rank is None else some(out, rank),
        None if rank is None else some(rank, width),
        some(out, count),
        some(out) if constant else None,
        list(range(count)),
    )
