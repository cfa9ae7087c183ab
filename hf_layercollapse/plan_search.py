"""The search behind plans: what sizes lose, plans for all budgets at once, and a few candidates that are measured."""

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from . import functional, processes
from .block_sizes import (
    RANK_SHARES,
    BlockSize,
    BlockSizes,
    alike,
    allocations,
    any_fit,
    fit_size,
    possible_sizes,
    rank_of,
    root_to_fit,
    sizes_of,
    worth_having,
)
from .budgets import least_that_works, limit_of, room_of
from .forward_passes import lean
from .loss_metric import LossMetric, MetricReport, held_by_metrics, measure_metrics
from .merging import Merge, Trial, has_constant, is_possible, make_merge, size_of, stored_neurons
from .models import device_of, evaluating, inputs_of, kept_on, outputs_of
from .moments import BlockMoments, bytes_in_metric, bytes_of_root, bytes_to_choose, bytes_to_fit, bytes_to_span
from .plans import CollapsePlan, PlanPoint, key_of
from .predictions import number_of, predictions_of, without_labels
from .profiling import Latency, compare_latency
from .progress import Progress
from .rows import bytes_of
from .sentence_models import sentence_model
from .shape_times import ShapeTimes, bytes_to_time, measure_shapes
from .upstream import weights_in_memory


if TYPE_CHECKING:
    from .blocks import BoundBlock
    from .calibration import Calibration


# Shares of the feed-forward weights at which the curve of plans has a point, beside the budget's own.
EVEN_POINTS = 24

# Linear parts of the candidates in which all blocks are alike, as shares of the input width; 0 is a width cut.
ALIKE = {"width cut": 0.0, "rank 1/8 and neurons": 1 / 8, "full rank and neurons": None}

# How many plans are timed for a budget of time, each with less room than the one before.
LATENCY_TRIES = 6

DENSE, PLANNED, DROPPED, ONE_WIDTH = "dense", "planned", "blocks dropped", "one width"


@dataclass(frozen=True)
class Candidate:
    """Sizes of all blocks under one budget.

    Args:
        name (`str`): How they were chosen.
        sizes (`dict[str, BlockSize]`): Block name -> its size.
        score (`float`, *optional*): What was measured with them in place.
    """

    name: str
    sizes: dict
    score: float | None = None

    @property
    def measured(self) -> float:
        """The score of one that was measured."""
        assert self.score is not None, "what is compared was measured"
        return self.score


class Score(NamedTuple):
    """What models are measured by.

    Args:
        name (`str`): `"divergence"` or `"metric"`.
        sign (`float`): 1 where lower is better, -1 where higher is.
        of (`Callable`): `of(inner, plans, held, progress=...)` gives one number a plan; see [`divergences`].
    """

    name: str
    sign: float
    of: Callable[..., list[float]]


@dataclass(frozen=True)
class PlanOptions:
    """What is asked of a plan; see [`plan_collapse`].

    Raises:
        ValueError: One of them is none.
    """

    budget: dict[str, float]
    uniform_width: bool
    rank_shares: Sequence[float | None]
    multiple_of: int
    constant_term: str
    levels: Sequence[float]
    points: Sequence[float] | None
    whole_curve: bool

    def __post_init__(self) -> None:
        if self.uniform_width and self.rank_shares is not RANK_SHARES:
            raise ValueError("`uniform_width` leaves no linear part: leave `rank_shares` out.")
        object.__setattr__(self, "rank_shares", (0.0,) if self.uniform_width else tuple(self.rank_shares))
        if self.constant_term not in ("native", "always"):
            raise ValueError(f'`constant_term` must be "native" or "always", got {self.constant_term!r}.')
        if isinstance(self.multiple_of, bool) or not isinstance(self.multiple_of, int) or self.multiple_of < 1:
            raise ValueError(f"`multiple_of` must be an integer of at least 1, got {self.multiple_of!r}.")
        if self.points is not None and (not self.points or not all(0 < share < 1 for share in self.points)):
            raise ValueError(f"`points` must be shares in (0, 1), got {list(self.points)}.")

    @property
    def is_size(self) -> bool:
        """Whether the budget is one that the sizes of the blocks tell; others are measured."""
        return bool(self.budget.keys() & {"parameters", "macs"})


class Search:
    """What the blocks of one model can become, and what that costs. The model is left as it is.

    Args:
        engine ([`Calibration`]): Of the model, on what is fitted to.
        blocks (`list[BoundBlock]`): Those that may change.
        whole (`dict[str, int]`): `parameters` of the model, and `macs` of all its feed-forward blocks.
        held (`list[dict[str, Tensor]]`): What is measured on.
        score ([`Score`]): By what.
        options ([`PlanOptions`]): What is asked for.
    """

    def __init__(
        self,
        engine: "Calibration",
        blocks: "Sequence[BoundBlock]",
        whole: Mapping[str, int],
        held: list[dict[str, Any]],
        score: Score,
        options: PlanOptions,
    ) -> None:
        self.engine, self.model, self.inner, self.held = engine, engine.model, engine.inner, held
        self.blocks = {block.name: block for block in blocks}
        self.score, self.options = score, options
        self.of_model, self.fixed_macs = whole, whole["macs"] - sum(block.macs for block in blocks)
        # Of the loss; a block without an entry goes by its share left unexplained.
        self.metrics: dict[str, LossMetric] = {}
        self.metric_report: MetricReport | None = None
        # Without adapters and compilation, but with what an object of sentence-transformers does beside its model.
        sentences = sentence_model(engine.model)
        self.timed = engine.inner if sentences is None else sentences
        self.sizes: dict[str, BlockSizes] = {}

    # ---- What each size is expected to lose ----

    def look(self, widths: "Sequence[Mapping[BoundBlock, int]] | None" = None) -> None:
        """Measures what outputs matter, then every size of every block: passes over the data, as many as the memory
        needs.

        Args:
            widths (`list[dict[BoundBlock, int]]`, *optional*): What plans of one width choose from.

        Raises:
            ValueError: There is too little memory for that, or for what is measured next whatever this finds. That is
                known before anything is measured.
        """
        with_inputs = any(share != 0 for share in self.options.rank_shares)
        blocks = list(self.blocks.values())

        def sizes(block: "BoundBlock", moments: BlockMoments) -> BlockSizes:
            return sizes_of(block, moments, self.metrics.get(block.name), *self._how)

        working = {}
        for block in blocks:
            how = block, block.hidden_features, with_inputs
            to_choose = bytes_to_choose(*how) + bytes_in_metric(*how)
            working[block.name] = max(bytes_of_root(block), bytes_to_span(*how), to_choose)
        inputs = dict.fromkeys(self.blocks, with_inputs)
        memory, of_metrics = self.engine.memory, held_by_metrics(self.engine, blocks)
        # Fits ask the metric for linear maps of a low rank only.
        later = of_metrics if any(self.options.rank_shares) else {}
        with memory.holding(of_metrics):
            everything = {block.name: block.hidden_features for block in blocks}
            self.engine.refuse_too_little(blocks, everything, inputs, working)
        with memory.holding(later):
            self._refuse_too_little(widths)
            self._refuse_too_little_to_time()
        self.metrics, self.metric_report = measure_metrics(self.engine, blocks)
        found = self.engine.reduce(blocks, dict.fromkeys(self.blocks), sizes, inputs, working)
        self.sizes = _of_the_first(found)
        if not later:
            self.metrics = {}
            memory.hold_all({device: -count for device, count in of_metrics.items()})

    @property
    def _how(self) -> tuple[Sequence[float | None], int, str]:
        return self.options.rank_shares, self.options.multiple_of, self.options.constant_term

    def _refuse_too_little(self, widths: "Sequence[Mapping[BoundBlock, int]] | None") -> None:
        """Raises if there is too little memory for what is measured whatever the data say."""
        possible = {name: possible_sizes(block, *self._how) for name, block in self.blocks.items()}
        for sizes in self._foreseen(possible, widths):
            taken = self._taken([sizes])
            counts = {name: count for name, _, count in _keys(sizes)}
            self.engine.refuse_too_little([self.blocks[name] for name in counts], counts, *taken)

    def _refuse_too_little_to_time(self) -> None:
        """Raises if time is the budget and there is too little memory for what is held to measure it."""
        if "latency" not in self.options.budget:
            return
        with processes.together():
            memory, needed = self.engine.memory, self.bytes_of_shapes() | self.bytes_of_model()
            if not memory.fits(needed):
                raise ValueError(
                    f"Plans are timed beside a copy of the model, after blocks of many sizes: that takes "
                    f"{memory.told(needed)}. Raise `max_memory`, or give a budget of `macs` or `parameters`."
                )

    def _foreseen(
        self, possible: Mapping[str, BlockSizes], widths: "Sequence[Mapping[BoundBlock, int]] | None"
    ) -> list[dict[str, BlockSize]]:
        """The sizes of candidates that do not hang on the data: in which all blocks are alike."""
        options, unit = self.options, _unit(self.options.budget)
        if widths is not None:
            return [_of_widths(possible, row) for row in (widths if options.whole_curve else widths[-1:])]
        rooms = {share * self.whole(unit) for share in options.points or ()}
        if room := self.room(options.budget):
            rooms.add(room)
        shares = [share for share in ALIKE.values() if share in options.rank_shares]
        found = [
            alike(possible, room, unit, share, options.multiple_of)
            for room in sorted(rooms, reverse=True)
            for share in shares
        ]
        return [sizes for sizes in found if sizes is not None]

    # ---- Plans ----

    def dense(self) -> Candidate:
        """The model as it is."""
        sizes = {name: found.dense for name, found in self.sizes.items()}
        return replace(Candidate(DENSE, sizes), score=self.score.of(self.inner, [[]], self.held)[0])

    def curve(self, budget: Mapping[str, float], best: Iterable[tuple[float, Candidate]] = ()) -> list[Candidate]:
        """The best plans at evenly spaced shares of the blocks' weights and at the budget, from large to small.

        Args:
            best (`Sequence[tuple[float, Candidate]]`): What is best at further shares, measured before.
        """
        unit, whole = _unit(budget), self.whole(_unit(budget))
        wanted = {limit_of(part / EVEN_POINTS, whole) for part in range(1, EVEN_POINTS)}
        if room := self.room(budget):
            wanted.add(room)
        known = {limit_of(share, whole): candidate for share, candidate in best}
        limits = sorted(wanted - known.keys(), reverse=True)
        choice = {name: found.worth_having for name, found in self.sizes.items()}
        for limit, sizes in zip(limits, allocations(choice, limits, unit), strict=True):
            if sizes is not None:
                known[limit] = Candidate(PLANNED, sizes)
        return [known[limit] for limit in sorted(known, reverse=True)]

    def whole(self, unit: str) -> int:
        """What the blocks have now, in `"macs"` or `"parameters"`."""
        return sum(block.macs if unit == "macs" else block.parameters for block in self.blocks.values())

    def room(self, budget: Mapping[str, float]) -> int | None:
        """What the blocks may have of a budget of parameters or MACs; `None` for another budget."""
        ((unit, value),) = budget.items()
        if unit not in ("parameters", "macs"):
            return None
        return room_of(unit, value, self.of_model, self.blocks.values())

    def candidates(self, room: float, unit: str) -> list[Candidate]:
        """What is measured at one size: the plan, and what it has to beat.

        Args:
            room (`float`): What the blocks may have, in `unit` (`"macs"` or `"parameters"`).

        Raises:
            ValueError: Nothing is as small as that.
        """
        multiple_of = self.options.multiple_of
        choice = {name: found.worth_having for name, found in self.sizes.items()}
        ends = {name: [found.smallest, found.dense] for name, found in self.sizes.items()}
        found = {PLANNED: allocations(choice, [room], unit)[0], DROPPED: allocations(ends, [room], unit)[0]}
        for name, share in ALIKE.items():
            if share in self.options.rank_shares:
                found[name] = alike(self.sizes, room, unit, share, multiple_of)
        candidates = [Candidate(name, sizes) for name, sizes in found.items() if sizes is not None]
        if not candidates:
            raise ValueError(f"{room:,.0f} {unit} for the chosen blocks cannot be met with sizes of these ranks.")
        return candidates

    def best(self, candidates: Iterable[Candidate]) -> Candidate:
        """The candidate with the best score."""
        return min(candidates, key=lambda candidate: self.score.sign * candidate.measured)

    def of_widths(self, counts: "Mapping[BoundBlock, int]") -> Candidate:
        """A candidate in which blocks keep so many neurons, and no linear map (`dict[FeedForwardBlock, int]`)."""
        return Candidate(ONE_WIDTH, _of_widths(self.sizes, counts))

    def largest_within(self, curve: Sequence[Candidate], budget: Mapping[str, float]) -> Candidate:
        """The largest of these candidates that meets a budget of size."""
        room, unit = self.room(budget), _unit(budget)
        amounts = [sum(size.amount(unit) for size in candidate.sizes.values()) for candidate in curve]
        return max((pair for pair in zip(amounts, curve, strict=True) if pair[0] <= room), key=lambda pair: pair[0])[1]

    def point(self, candidate: Candidate) -> PlanPoint:
        """A candidate as a point of a curve."""
        sizes = candidate.sizes
        choices = {name: (size.rank, size.count) for name, size in sizes.items() if not size.as_it_is}
        saved = sum(self.blocks[name].parameters - size.parameters for name, size in sizes.items())
        macs = self.fixed_macs + sum(size.macs for size in sizes.values())
        return PlanPoint(
            choices,
            self.of_model["parameters"] - saved,
            macs,
            candidate.score,
            # Shares of the variance are in no unit that could be summed up for a reader.
            math.fsum(size.loss for size in sizes.values()) if self._in_nats else None,
            candidate.name,
        )

    @property
    def _in_nats(self) -> bool:
        return self.metric_report is not None and self.metric_report.kind == "loss"

    def neurons(self) -> dict[str, dict[str, list[int]]]:
        """Block name -> rank (as text) -> neurons in the order of their use."""
        return {
            name: {key_of(rank): order for rank, order in found.neurons.items()} for name, found in self.sizes.items()
        }

    # ---- What they do ----

    def measured(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates with their scores, each fitted and put in place for a while: as many at a time as fit half of
        the memory."""
        scored: list[Candidate] = []
        while len(scored) < len(candidates):
            part = self._next_of(candidates[len(scored) :])
            scores = self._scores_of(part)
            scored += [replace(candidate, score=score) for candidate, score in zip(part, scores, strict=True)]
        return scored

    def _scores_of(self, candidates: Sequence[Candidate]) -> list[float]:
        """What these candidates score. Their new weights are let go when it is known: the next take as much."""
        merges = self._merges([candidate.sizes for candidate in candidates])
        plans = [[merges[key] for key in _keys(candidate.sizes)] for candidate in candidates]
        return self.score.of(self.inner, plans, self.held, progress=self.engine.progress)

    def _next_of(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The first of these candidates, at least one, whose new weights fit half of the memory."""
        part: list[Candidate] = []
        twice: Counter[torch.device] = Counter()
        for candidate in candidates:
            for name, size in candidate.sizes.items():
                if not size.as_it_is:
                    twice[kept_on(self.blocks[name].down)] += 2 * self._bytes_of(name, size)
            if part and not all(processes.gathered(self.engine.memory.fits(twice))):
                break
            part.append(candidate)
        return part

    def _bytes_of(self, name: str, size: BlockSize) -> int:
        """What the new weights of a block of this name take."""
        return size.parameters * self.blocks[name].down.weight.element_size()

    def all_measured(self, candidates: Mapping[Any, Sequence[Candidate]]) -> dict[Any, list[Candidate]]:
        """The same for a dict of lists of them, in one pass over the data."""
        scored = iter(self.measured([candidate for found in candidates.values() for candidate in found]))
        return {key: [next(scored) for _ in found] for key, found in candidates.items()}

    def _merges(self, plans: Iterable[Mapping[str, BlockSize]]) -> dict[tuple[str, int | None, int], Merge]:
        """`(block name, rank, count)` -> what the block becomes, for all sizes in these plans."""
        plans = list(plans)
        wanted = {name: set(sizes) for name, sizes in _sizes_of_blocks(plans).items()}
        neurons = {
            name: sorted({n for rank, count in sizes for n in self.sizes[name].neurons.get(rank, [])[:count]})
            for name, sizes in wanted.items()
        }

        def merges(block: "BoundBlock", moments: BlockMoments) -> dict[tuple[str, int | None, int], Merge]:
            position = {neuron: index for index, neuron in enumerate(moments.neurons)}
            root = root_to_fit(moments, [rank for rank, _ in wanted[block.name]], self.metrics.get(block.name))
            found = {}
            for rank, count in wanted[block.name]:
                chosen = [position[neuron] for neuron in self.sizes[block.name].neurons[rank][:count]]
                constant = has_constant(block, rank, self.options.constant_term)
                fit = fit_size(moments, chosen, rank, root, constant)
                found[block.name, rank, count] = make_merge(block, fit, refit=True)
            return found

        blocks = [self.blocks[name] for name in wanted]
        made = self.engine.reduce(blocks, neurons, merges, *self._taken(plans))
        return {key: merge for of_block in made.values() for key, merge in of_block.items()}

    def _taken(self, plans: Iterable[Mapping[str, BlockSize]]) -> tuple[dict, dict, dict]:
        """What fits of these sizes take, of each block: whether its input is among the features, bytes that are worked
        with, and bytes of its new weights."""
        inputs, working, kept = {}, {}, {}
        for name, sizes in _sizes_of_blocks(plans).items():
            block = self.blocks[name]
            inputs[name] = any(rank != 0 for rank, _ in sizes)
            working[name] = max(bytes_to_fit(block, count, rank != 0, bool(rank)) for rank, count in sizes)
            kept[name] = sum(self._bytes_of(name, size) for size in sizes.values())
        return inputs, working, kept

    # ---- Time ----

    def bytes_of_shapes(self) -> Counter[torch.device]:
        """What [`~Search.shape_times`] holds, in bytes, by device."""
        return bytes_to_time(self.blocks.values(), *self._how)

    def bytes_of_model(self) -> Counter[torch.device]:
        """What a copy of the model takes, in bytes, by device. It reads what is on a disk from there, too."""
        tensors: dict[int, torch.Tensor] = {}
        for module in self.timed.modules():
            tensors |= {id(each): each for each in (*weights_in_memory(module), *module.buffers(recurse=False))}
        return bytes_of({"": tensor} for tensor in tensors.values())

    def shape_times(self, batch: Mapping[str, Any]) -> ShapeTimes:
        """Seconds of every block at every size, on one batch."""
        with processes.together(), self.engine.memory.holding(self.bytes_of_shapes()):
            found = measure_shapes(self.model, self.inner, list(self.blocks.values()), batch, *self._how)
        return processes.of_the_first(found)

    def quickest(self, times: ShapeTimes, room: float) -> Candidate | None:
        """What is expected to lose least of all that takes no longer; `None` where nothing is so quick.

        Args:
            times ([`ShapeTimes`]): Of the blocks.
            room (`float`): Seconds that they may take together.
        """
        rows = {name: worth_having(found.choice, partial(times.of, name)) for name, found in self.sizes.items()}
        costs = [[(times.of(name, size), size.loss) for size in sizes] for name, sizes in rows.items()]
        (chosen,) = functional.allocate(costs, [room]) if room > 0 else [None]
        if chosen is None:
            return None
        return Candidate(
            PLANNED, {name: sizes[index] for (name, sizes), index in zip(rows.items(), chosen, strict=True)}
        )

    def latency_of(
        self, chosen: Mapping[str, BlockSize], batch: Mapping[str, Any], dense: nn.Module
    ) -> dict[str, Latency]:
        """[`profiling.Latency`] of the model with these sizes, relative to `dense`, a copy of it as it is. What the
        weights are does not matter, so none are fitted."""
        changed = [(self.blocks[name], size) for name, size in chosen.items() if not size.as_it_is]
        batch = inputs_of(without_labels(self.inner, batch), device_of(self.inner))
        with processes.together(), Trial() as trial:
            for block, size in changed:
                constant = has_constant(block, size.rank, self.options.constant_term)
                trial.put(make_merge(block, any_fit(block, size.rank, size.count, constant), refit=False))
            models = {"dense": dense, "plan": self.timed}
            found = compare_latency(models, batch, rounds=10, warmup=2, progress=False)
        return processes.of_the_first(found)


def _of_the_first(sizes: Mapping[str, BlockSizes]) -> dict[str, BlockSizes]:
    """The first process's sizes, on all: what is added up has to be of the same neurons everywhere, and rounding can
    tip a choice."""
    parts = ("neurons", "losses", "choice", "worth_having")
    told = processes.of_the_first({name: {part: vars(found)[part] for part in parts} for name, found in sizes.items()})
    return {name: replace(found, **told[name]) for name, found in sizes.items()}


def _of_widths(sizes: Mapping[str, BlockSizes], counts: "Mapping[BoundBlock, int]") -> dict[str, BlockSize]:
    """These widths, and every other block as it is."""
    as_it_is = {name: found.dense for name, found in sizes.items()}
    return as_it_is | {block.name: sizes[block.name].at(0, count) for block, count in counts.items()}


def _sizes_of_blocks(
    plans: Iterable[Mapping[str, BlockSize]],
) -> dict[str, dict[tuple[int | None, int], BlockSize]]:
    """Block name -> `(rank, count)` -> size, of all that change in these plans."""
    found: dict[str, dict[tuple[int | None, int], BlockSize]] = {}
    for plan in plans:
        for name, rank, count in _keys(plan):
            found.setdefault(name, {})[rank, count] = plan[name]
    return found


def _keys(sizes: Mapping[str, BlockSize]) -> list[tuple[str, int | None, int]]:
    return [(name, size.rank, size.count) for name, size in sizes.items() if not size.as_it_is]


@torch.no_grad()
def divergences(
    model: nn.Module,
    inner: Any,
    plans: Sequence[Sequence[Merge]],
    data: Sequence[Mapping[str, Any]],
    progress: Progress | None = None,
) -> list[float]:
    """Mean divergence of the model's predictions from its own, for each of several plans put in place in turn.

    Every batch is run as it is and with each plan before the next one, so that only its own outputs are held.

    Args:
        plans (`list[list[Merge]]`): What blocks become in each.
        data (`list[dict[str, Tensor]]`): Model inputs, of several processes those that are this one's.
        progress ([`Progress`], *optional*): Told of every forward with a plan in place.

    Returns:
        One number a plan, in the unit of the predictions; see [`predictions`].
    """
    sums, count = [0.0] * len(plans), 0
    if not any(plans):  # the model as it is
        return sums
    progress = progress or Progress()
    progress.say("measuring plans")
    progress.expect(len(data) * sum(map(bool, plans)))
    with processes.together(), evaluating(model):
        for batch in data:
            of_plans, predictions = _divergences_on(batch, model, inner, plans, progress)
            sums = [total + part for total, part in zip(sums, of_plans, strict=True)]
            count += predictions
    (totals,) = processes.summed([torch.tensor([*sums, count], dtype=torch.float64)])
    *sums, count = totals.tolist()
    if not count:
        raise ValueError("There is no batch to measure plans on.")
    if not all(map(math.isfinite, sums)):
        raise ValueError("The divergence of a plan from the model as it is is not finite.")
    return [total / count for total in sums]


def _divergences_on(
    batch: Mapping[str, Any], model: nn.Module, inner: Any, plans: Sequence[Sequence[Merge]], progress: Progress
) -> tuple[list[float], int]:
    """`(sum of the divergences for each plan, predictions)` of one batch; no outputs are held beside the model's own
    and those of one plan."""
    inputs = inputs_of(batch, device_of(model))
    given = lean(inner, inputs)
    reference = predictions_of(inner, inputs, outputs_of(model, given))

    def divergence(merges: Sequence[Merge]) -> float:
        with Trial() as trial:
            for merge in merges:
                trial.put(merge)
            start = time.perf_counter()
            found = predictions_of(inner, inputs, outputs_of(model, given))
            progress.step(time.perf_counter() - start)
        pairs = zip(found, reference, strict=True)
        return sum(float(now.divergence_from(before).sum()) for now, before in pairs)

    return [divergence(merges) if merges else 0.0 for merges in plans], number_of(reference)


def metric_scores(
    model: nn.Module,
    inner: Any,
    plans: Sequence[Sequence[Merge]],
    data: Sequence[Mapping[str, Any]],
    metric: Callable[[nn.Module], float],
    progress: Progress | None = None,
) -> list[float]:
    """`metric(model)` with each of several plans put in place in turn; what it is measured on, it knows itself."""
    scores = []
    for merges in plans:
        with processes.together(), Trial() as trial:
            for merge in merges:
                trial.put(merge)
            score = float(metric(model))
        scores.append(processes.of_the_first(score))
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"The metric must be a finite number, got {scores}.")
    return scores


def _unit(budget: Mapping[str, float]) -> str:
    return "parameters" if "parameters" in budget else "macs"


def refuse_unreachable(whole: Mapping[str, int], blocks: "Sequence[BoundBlock]", options: PlanOptions) -> None:
    """Raises if even the smallest size of every block is above a budget; asks no data.

    Raises:
        ValueError: As said.
    """
    if not options.is_size:
        return
    ((unit, value),) = options.budget.items()
    smallest = 0
    for block in blocks:
        wanted = {rank_of(block, share, options.multiple_of) for share in options.rank_shares}
        ranks = [rank for rank in wanted if is_possible(block, rank, stored_neurons(rank, 0))] or [None]
        smallest += min(size_of(block, rank, 0, unit, options.constant_term) for rank in ranks)
    room = room_of(unit, value, whole, blocks)
    if smallest > room:
        least = limit_of(value, whole[unit]) - room + smallest
        raise ValueError(
            f"The budget {unit}={value:g} cannot be met: with the chosen blocks at their smallest, "
            f"{least_that_works(unit, least, whole[unit])}"
        )


def within_latency(
    search: Search, batch: Mapping[str, Any], share: float, widths: Sequence[Candidate] = ()
) -> tuple[list[Candidate], float | None]:
    """`([the plan, measured], its share of the dense model's time)`: what is expected to lose least within the time
    that a table of shapes says, put in place and timed; if it is too slow after all, with less room.

    Args:
        batch (`dict[str, Tensor]`): What is timed.
        share (`float`): Of the dense model's time, in (0, 1).
        widths (`list[Candidate]`): To choose from where blocks have one width, from large to small.

    Raises:
        ValueError: Nothing is so quick.
    """
    times = search.shape_times(batch)
    with search.engine.memory.holding(search.bytes_of_model()):
        candidate, measured = _quick_enough(search, times, batch, share, widths)
    return search.measured([candidate]), measured


def _quick_enough(
    search: Search, times: ShapeTimes, batch: Mapping[str, Any], share: float, widths: Sequence[Candidate]
) -> tuple[Candidate, float | None]:
    """`(what is expected to lose least, its measured share of the time)`; the copy that it is timed beside goes with
    this call."""
    with processes.together():
        dense = copy.deepcopy(search.timed)
    as_it_is = {name: found.dense for name, found in search.sizes.items()}
    whole = search.latency_of(as_it_is, batch, dense)["dense"].median

    def propose(room: float) -> Candidate | None:
        if not widths:
            return search.quickest(times, room)
        return next((candidate for candidate in widths if times.all(candidate.sizes) <= room), None)

    room = times.all(as_it_is) - (1 - share) * whole
    candidate, measured = first_that_holds(
        propose, lambda found: search.latency_of(found.sizes, batch, dense)["plan"].ratio, share, room, whole
    )
    if candidate is None:
        said = "" if measured is None else f": the last that was tried takes {measured:.3f}"
        raise ValueError(
            f"The budget latency={share} cannot be met{said} of the dense model's time, and without its blocks the "
            f"model takes about {max(0.0, 1 - times.all(as_it_is) / whole):.3f}."
        )
    return candidate, measured


def first_that_holds(
    propose: Callable[[float], Candidate | None],
    measure: Callable[[Candidate], float],
    share: float,
    room: float,
    whole: float,
) -> tuple[Candidate | None, float | None]:
    """`(candidate, what was measured)`: proposals with less and less room, until one takes no more than its share. The
    candidate is `None` where nothing is proposed, or not one of `LATENCY_TRIES` proposals is quick enough.

    Args:
        propose (`Callable`): `propose(room)` gives a candidate that should take no more, or `None`.
        measure (`Callable`): Its share of the whole.
        share, room, whole (`float`): The share that is allowed, what of the whole that leaves for what is proposed.
    """
    measured = None
    for _ in range(LATENCY_TRIES):
        candidate = propose(room)
        if candidate is None:
            break
        measured = measure(candidate)
        if measured <= share:
            return candidate, measured
        # By what it was too slow, and a little more: the next is to hold.
        room -= 1.1 * (measured - share) * whole
    return None, measured


def within_drop(search: Search, curve: Sequence[Candidate], drop: float) -> list[Candidate]:
    """The smallest plan of a curve that loses no more than the drop from its first point, measured, in a list."""
    seen = {0: curve[0]}

    def too_much(index: int) -> bool:
        if index not in seen:
            (seen[index],) = search.measured([curve[index]])
        return search.score.sign * (seen[index].measured - curve[0].measured) > drop

    index = first_for_which(len(curve), too_much)
    return [seen[len(curve) - 1 if index is None else index - 1]]


def first_for_which(count: int, holds: Callable[[int], bool]) -> int | None:
    """The first index below `count` for which `holds(index)`, where it does from some index on; `None` if for none.

    By bisection; the last index is always asked, and so is the one before the result.
    """
    if not holds(count - 1):
        return None
    low, high = -1, count - 1
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def plan_of(
    search: Search,
    curve: Iterable[Candidate],
    best: Candidate,
    candidates: Iterable[Candidate],
    started: float,
    **fields: Any,
) -> CollapsePlan:
    """The [`CollapsePlan`] of a search: its curve, with the chosen candidate on it.

    Args:
        curve (`list[Candidate]`): From the dense model on.
        best (`Candidate`): The chosen one.
        candidates (`list[Candidate]`): What was measured.
        started (`float`): `time.perf_counter()` then.
        fields: The rest of the plan.
    """
    points = {}
    for candidate in [*curve, best]:
        point = search.point(candidate)
        # The same sizes, measured now.
        points[tuple(sorted(point.choices.items()))] = point
    ordered = sorted(points.values(), key=lambda point: -point.macs)
    chosen = search.point(best)
    return CollapsePlan(
        neurons=search.neurons(),
        curve=ordered,
        chosen=ordered.index(chosen),
        candidates=[search.point(candidate) for candidate in candidates],
        seconds=time.perf_counter() - started,
        **fields,
    )
