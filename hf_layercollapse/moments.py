"""Sums over a block's tokens, never the tokens themselves, and the second moments that fits are made from."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from . import functional, processes


if TYPE_CHECKING:
    from .blocks import BoundBlock


# Up to this many features float64 products cost next to nothing beside the model, and are used.
NARROW_FEATURES = 256

# Calibration tokens for each dimension that they span. Below the first a fit is one of noise (MiniLM with 1.14 of them
# has an error of 1.2 on other text); from the second on, how many dimensions there are hardly matters.
LEAST_TOKENS, RICH_TOKENS = 1.25, 20

# Up to this many features it is worked out how many dimensions they span; with more the neurons count one each.
EXACT_DIMENSIONS = 8192

# Strips in which products of all features with each other are summed: n of them take (1 + 1 / n) / 2 of the
# arithmetic, and with more than eight products of narrow matrices cost what that saves.
STRIPS = 8

# Elements of the features of as many tokens as are worked on at a time.
CHUNK = 2**24


@dataclass(frozen=True)
class TokenRange:
    """Where the tokens of a block lie, as far as a sample of them tells.

    Args:
        limit (`float`): Length of an output from which on a token counts less; 0: none does.
        origin_x, origin_h, origin_o (`Tensor`): Means of its input, of all its hidden neurons (`None` where those are
            no features) and of its output, which sums are taken about: a large mean does not cost the variance its
            precision.
    """

    limit: float
    origin_x: torch.Tensor
    origin_h: torch.Tensor | None
    origin_o: torch.Tensor


class RangeSums:
    """Collects the [`TokenRange`] of a block."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: list[torch.Tensor | None] | None = None
        self.lengths: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, y: torch.Tensor, h: torch.Tensor | None = None, factor: float = 1.0) -> None:
        """Tokens of one call: input, output and all hidden neurons, shapes `(tokens, width)`."""
        if not x.shape[0]:
            return
        y = y.float() * factor
        sums = [None if part is None else part.float().sum(0) for part in (x, h, y)]
        if self.sums is not None:
            sums = [None if a is None or b is None else a + b for a, b in zip(sums, self.sums, strict=True)]
        self.sums = sums
        self.lengths.append(torch.linalg.vector_norm(y, dim=1))
        self.tokens += x.shape[0]

    def of_all_processes(self, device: torch.device) -> "RangeSums":
        """The sums over all processes, on this device."""
        whole, found = RangeSums(), processes.gathered((self.tokens, self.sums, self.lengths))
        with processes.together():
            for tokens, sums, lengths in found:
                whole.tokens += tokens
                whole.lengths += [part.to(device) for part in lengths]
                sums = sums and [None if part is None else part.to(device) for part in sums]
                if sums is not None and whole.sums is not None:
                    sums = [None if a is None else a + b for a, b in zip(sums, whole.sums, strict=True)]
                whole.sums = whole.sums if sums is None else sums
        return whole

    def finish(self) -> TokenRange:
        """What was found."""
        limit = functional.OUTLIER_LENGTH * float(torch.cat(self.lengths).median())
        # Of tokens that are not finite the sums will tell.
        means: list[Any] = [
            None if total is None else torch.nan_to_num(total / self.tokens, posinf=0.0, neginf=0.0)
            for total in self.sums or ()
        ]
        return TokenRange(limit if math.isfinite(limit) else 0.0, *means)


@dataclass(frozen=True)
class BlockMoments:
    """First and second moments of a block's features `f = [x, h_C]` and output `y`, over weighted tokens.

    Args:
        block (`str`): Its name.
        rows (`int`), tokens (`int`): Different rows, and tokens of them, that were counted.
        in_features (`int`): Width of its input.
        width (`int`): How much of that is among the features: all, or 0 where only neurons are.
        neurons (`list[int]`): Hidden indices `C` of the other features.
        mean_f, mean_o (`Tensor`): Float64.
        cov_ff, cov_fo, cov_oo (`Tensor`): Centred, in the precision that they were summed in.
        constant (`bool`): Whether a fit has a constant term. Without one the last three are about the origin.
        ridge (`float`): Of fits, above the rounding noise of the sums.
    """

    block: str
    rows: int
    tokens: int
    in_features: int
    width: int
    neurons: list[int]
    mean_f: torch.Tensor
    mean_o: torch.Tensor
    cov_ff: torch.Tensor
    cov_fo: torch.Tensor
    cov_oo: torch.Tensor
    constant: bool = True
    ridge: float = functional.RIDGE

    @property
    def var_o(self) -> torch.Tensor:
        """Variance of each output, or without a constant term its mean square."""
        return self.cov_oo.diagonal().clamp_min(0)

    @cached_property
    def dimensions(self) -> float:
        """How many dimensions the features span on these tokens; all, where there are many tokens for each."""
        features = float(len(self.mean_f))
        if not features or self.tokens >= RICH_TOKENS * (features + 1):
            return features
        exact = features <= EXACT_DIMENSIONS
        kept = slice(None) if exact else slice(self.width)
        cov, mean = self.cov_ff[kept, kept], self.mean_f[kept]
        if not self.constant:
            cov = cov.addr(mean.to(cov), mean.to(cov), alpha=-1)
        return functional.effective_rank(cov) + (0 if exact else len(self.neurons))

    def without_constant(self, in_place: bool = False) -> "BlockMoments":
        """The same for fits that have no constant term: least squares through the origin.

        Args:
            in_place (`bool`): Whether this object is used up.
        """
        moments = self.mean_f, self.mean_o, self.cov_ff, self.cov_fo, self.cov_oo
        cov_ff, cov_fo, cov_oo = functional.about_origin(*moments, in_place=in_place)
        return replace(self, cov_ff=cov_ff, cov_fo=cov_fo, cov_oo=cov_oo, constant=False)

    def restricted(self, positions: Iterable[int], inputs: bool = True) -> "BlockMoments":
        """The same for the neurons at these positions of `neurons` only.

        Args:
            inputs (`bool`): Whether the input stays among the features.
        """
        positions, width = list(positions), self.width if inputs else 0
        if positions == list(range(len(self.neurons))) and width == self.width:
            return self
        keep = torch.cat([torch.arange(width), self.width + torch.as_tensor(positions, dtype=torch.long)])
        keep = keep.to(self.cov_ff.device)
        return replace(
            self,
            width=width,
            neurons=[self.neurons[position] for position in positions],
            mean_f=self.mean_f[keep],
            cov_ff=self.cov_ff[keep[:, None], keep],
            cov_fo=self.cov_fo[keep],
        )

    def coefficients(self, rank: int | None = None, neurons: int | None = None) -> float:
        """How many a fit has for each output: what it explains of its own data by chance grows with them.

        Args:
            rank (`int`, *optional*): Of its linear map; `None`: full.
            neurons (`int`, *optional*): How many are kept. Default: all of these.
        """
        neurons = len(self.neurons) if neurons is None else neurons
        of_x = min(self.width, self.dimensions)
        if rank is not None and rank < of_x:
            of_x = rank * (1 + (of_x - rank) / self.mean_o.shape[0])
        return int(self.constant) + min(of_x + neurons, self.dimensions)

    def refuse_too_few(self) -> None:
        """Raises if the tokens do not determine a fit to all features.

        Raises:
            ValueError: They do not.
        """
        if self.tokens >= LEAST_TOKENS * (self.dimensions + 1):
            return
        features, parts = len(self.mean_f), []
        if self.width:
            parts.append(f"its input has {self.width} features")
        if self.neurons:
            parts.append(f"{len(self.neurons)} of its neurons are to be fitted")
        raise ValueError(
            f"{self.tokens} calibration tokens, of {self.rows} different rows, do not determine the map of block "
            f"{self.block}: {' and '.join(parts)}, of which the data span {self.dimensions:.0f} dimensions, each "
            f"fitted by about one token. At least {math.ceil(LEAST_TOKENS * (features + 1))} tokens of different rows "
            "are needed, and several times that is better; rows that repeat others do not count."
        )

    def fit(
        self, rank: int | None = None, refine: int = functional.REFINE, right_ri: torch.Tensor | None = None
    ) -> functional.Fit:
        """The least-squares [`functional.Fit`] on all features; its quality is that to expect on other data.

        Args:
            rank (`int`, *optional*): Of the linear map; `None`: full.
            right_ri (`Tensor`, *optional*): What the linear map of this rank begins with. Default: what is best.

        Raises:
            ValueError: There are too few tokens.
        """
        self.refuse_too_few()
        assert rank == 0 or self.width, "a linear map needs the inputs among the features"
        moments = self.mean_f, self.mean_o, self.cov_ff, self.cov_fo, self.var_o
        inflation = functional.generalized(1.0, self.tokens, self.coefficients(rank))
        fit = functional.fit_block(
            *moments,
            self.width,
            self.neurons,
            rank,
            self.ridge,
            refine,
            constant=self.constant,
            inflation=inflation,
            right_ri=right_ri,
        )
        return fit if self.width else replace(fit, right_ri=fit.down_ok.new_zeros(0, self.in_features))


class MomentSums:
    """The sums of one block: in float64 where it is narrow, else in float32, which is far above what fits need once
    everything is taken about the origin.

    Args:
        token_range ([`TokenRange`]): Of the block.
        neurons (`list[int]`): Hidden neurons that are features.
        inputs (`bool`): Whether the block's input is among the features.
    """

    def __init__(self, token_range: TokenRange, neurons: Sequence[int], inputs: bool = True) -> None:
        self.range, self.neurons, self.inputs = token_range, neurons, inputs
        self.tokens, self.total = 0, 0.0
        origin_h = token_range.origin_o[:0] if token_range.origin_h is None else token_range.origin_h
        self.everyone = bool(neurons) and neurons == list(range(len(origin_h)))
        device = token_range.origin_o.device
        self.index = torch.as_tensor(neurons, dtype=torch.long, device=device)
        origins = [token_range.origin_x] if inputs else []
        origins += [origin_h[self.index]] if neurons else []
        features, outputs = sum(map(len, origins)), len(token_range.origin_o)
        dtype = torch.float64 if features <= NARROW_FEATURES else torch.float32
        self.origin_f = torch.cat([token_range.origin_o[:0], *origins]).to(dtype)
        self.origin_o = token_range.origin_o.to(dtype)
        sizes = [(features,), (outputs,), (features, features), (features, outputs), (outputs, outputs)]
        self.sums = [self.origin_f.new_zeros(size) for size in sizes]

    def add(self, x: torch.Tensor, y: torch.Tensor, h: torch.Tensor | None = None, factor: float = 1.0) -> None:
        """Tokens of one call: input, output and hidden neurons (all of them), shapes `(tokens, width)`."""
        step = CHUNK // max(1, len(self.origin_f))
        for start in range(0, x.shape[0], step):
            part = slice(start, start + step)
            self._add(x[part], y[part], None if h is None else h[part], factor)

    def _add(self, x: torch.Tensor, y: torch.Tensor, h: torch.Tensor | None, factor: float) -> None:
        f, width = self.origin_f.new_empty(len(x), len(self.origin_f)), x.shape[1] if self.inputs else 0
        if self.inputs:
            torch.sub(x, self.origin_f[:width], out=f[:, :width])
        if h is not None and self.neurons:
            chosen = h if self.everyone else h.index_select(1, self.index)
            torch.sub(chosen, self.origin_f[width:], out=f[:, width:])
        y = y.to(f.dtype) * factor
        lengths = torch.linalg.vector_norm(y, dim=1)
        weights = functional.outlier_factors(lengths, self.range.limit)
        y -= self.origin_o
        if bool((weights < 1).any()):
            f *= weights[:, None]
            y *= weights[:, None]
        self.tokens += x.shape[0]
        self.total += float(weights.square().sum(dtype=torch.float64))
        sum_f, sum_o, ff, fo, oo = self.sums
        _add_products(ff, f)
        _add_products(oo, y)
        fo.addmm_(f.T, y)
        sum_f.addmv_(f.T, weights)
        sum_o.addmv_(y.T, weights)

    def of_all_processes(self) -> "MomentSums":
        """These sums, over all processes from now on."""
        numbers = torch.tensor([self.tokens, self.total], dtype=torch.float64)
        (numbers,) = processes.summed([numbers])
        self.tokens, self.total = int(numbers[0]), float(numbers[1])
        self.sums = processes.summed(self.sums)
        return self

    def finish(self, block: "BoundBlock", rows: int) -> BlockMoments:
        """The moments of a block over so many different rows. The sums are used up.

        Raises:
            ValueError: No token came, or one that is not finite.
        """
        if not self.tokens:
            raise ValueError(f"No calibration token reached block {block.name}.")
        sums = self.sums
        # No product is larger than the squares on the diagonals.
        if not all(torch.isfinite(tensor.diagonal()).all() for tensor in (sums[2], sums[4])):
            raise ValueError(not_finite(block))
        del self.sums
        mean_f, mean_o, cov_ff, cov_fo, cov_oo = functional.second_moments_(self.total, *sums)
        return BlockMoments(
            block.name,
            rows,
            self.tokens,
            len(self.range.origin_x),
            len(self.range.origin_x) if self.inputs else 0,
            list(self.neurons),
            mean_f + self.origin_f.to(mean_f),
            mean_o + self.origin_o.to(mean_o),
            cov_ff,
            cov_fo,
            cov_oo,
            ridge=functional.RIDGE if cov_ff.dtype == torch.float64 else functional.RIDGE_FLOAT32,
        )


def _add_products(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Adds `rows^T rows` to the upper triangle of a matrix, in strips: the rest is its mirror image."""
    strip = max(1, -(-rows.shape[1] // STRIPS))
    for start in range(0, rows.shape[1], strip):
        part = slice(start, start + strip)
        total[part, start:].addmm_(rows[:, part].T, rows[:, start:])


def not_finite(block: "BoundBlock") -> str:
    """What to say of a block that is given such inputs."""
    return f"The calibration data gives inputs to block {block.name} that are not finite."


def bytes_of_sums(block: "BoundBlock", candidates: int, inputs: bool = True) -> int:
    """Memory of one block's sums: `f^2 + f o + o^2` numbers, of `f` features."""
    features, outputs = (block.in_features if inputs else 0) + candidates, block.out_features
    return (8 if features <= NARROW_FEATURES else 4) * (features * (features + outputs) + outputs**2)


def bytes_to_choose(block: "BoundBlock", candidates: int, inputs: bool = True) -> int:
    """Memory that choosing among so many neurons takes beside the sums, see [`functional.greedy_neurons`]."""
    width, outputs = block.in_features if inputs else 0, block.out_features
    strip = min(functional.STRIP, candidates)
    number = 8 if candidates <= functional.EXACT_CANDIDATES else 4
    of_neurons = candidates * (number * candidates + (8 + 2 * number) * outputs)
    return of_neurons + 8 * width * (3 * width + 3 * outputs + 6 * strip)


def bytes_in_metric(block: "BoundBlock", candidates: int, inputs: bool = True) -> int:
    """Memory of one block's sums with outputs in another metric, and of that: `f o + 3 o^2` numbers."""
    features, outputs = (block.in_features if inputs else 0) + candidates, block.out_features
    return (8 if features <= NARROW_FEATURES else 4) * (features * outputs + 3 * outputs**2)


def bytes_to_fit(block: "BoundBlock", neurons: int, inputs: bool = True, low_rank: bool = False) -> int:
    """Memory that a fit with so many neurons takes beside the sums, see [`functional.fit_block`]."""
    features, outputs = (block.in_features if inputs else 0) + neurons, block.out_features
    solved = 8 * features * (2 * outputs + 5 * min(functional.STRIP, outputs)) + 16 * outputs**2
    if not low_rank:
        return 20 * features**2 + solved
    # In the metric of the loss: what the outputs are multiplied by, and what that gives.
    in_metric = (8 if features <= NARROW_FEATURES else 4) * features * outputs + 8 * outputs**2
    return max(bytes_of_root(block), 28 * features**2 + solved + in_metric)


def bytes_to_span(block: "BoundBlock", candidates: int, inputs: bool = True) -> int:
    """Memory that [`BlockMoments.dimensions`] takes beside the sums: two matrices of float64, and one of theirs."""
    width = block.in_features if inputs else 0
    return 20 * (width + candidates if width + candidates <= EXACT_DIMENSIONS else width) ** 2


def bytes_of_root(block: "BoundBlock") -> int:
    """Memory that the root of a block's metric of the loss takes while it is worked out: seven matrices of float64."""
    return 56 * block.out_features**2
