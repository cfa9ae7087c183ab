"""The search behind plans: what sizes lose, plans for all budgets at once, and a few candidates that are measured."""

import copy
import math
import time
from dataclasses import dataclass, replace

import torch
from tqdm.auto import tqdm

from .block_sizes import alike, allocations, any_fit, fit_size, sizes_of
from .calibration import moments_in_groups
from .families import find_feed_forward_blocks
from .merging import Trial, cost_of, has_constant, make_merge
from .models import count_parameters, device_of, evaluating, inputs_of
from .plans import CollapsePlan, PlanPoint, key_of, limit_of
from .predictions import predictions_of, without_labels
from .profiling import compare_latency


# Shares of the feed-forward weights at which the curve of plans has a point, beside the budget's own.
EVEN_POINTS = 24

# Linear parts of the candidates in which all blocks are alike, as shares of the input width; 0 is a width cut.
ALIKE = {"width cut": 0.0, "rank 1/8 and neurons": 1 / 8, "full rank and neurons": None}

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


class Search:
    """What the blocks of one model can become, and what that costs. The model is left as it is.

    Args:
        model, inner (`nn.Module`): The model, and what it wraps.
        blocks (`list[BoundBlock]`): Those that may change.
        fitting, held (iterable of `dict[str, Tensor]`): What is fitted to, and what is measured on.
        metrics (`dict[str, LossMetric]`): Of the loss; without an entry a block's share left unexplained counts.
        score (`Callable`): `score(inner, plans, held) -> list[float]`, see [`divergences`].
        sign (`float`): 1 where a lower score is better, -1 where a higher one is.
        options: `rank_shares`, `multiple_of`, `constant_term`, `token_mask_fn` and `max_memory` as of a plan.
    """

    def __init__(self, model, inner, blocks, fitting, held, metrics, score, sign, options):
        self.model, self.inner, self.fitting, self.held = model, inner, fitting, held
        self.blocks = {block.name: block for block in blocks}
        self.metrics, self.score, self.sign, self.options = metrics, score, sign, options
        everything = find_feed_forward_blocks(inner)
        self.fixed_macs = sum(block.macs for block in everything) - sum(block.macs for block in blocks)
        self.parameters = count_parameters(inner)
        self.sizes = {}

    # ---- What each size is expected to lose ----

    def look(self):
        """Measures every size of every block: passes over the data, as many as the memory needs."""
        options = self.options
        how = options.rank_shares, options.multiple_of, options.constant_term
        for block, moments in self._moments({name: None for name in self.blocks}):
            self.sizes[block.name] = sizes_of(block, moments, self.metrics.get(block.name), *how)

    def _moments(self, neurons):
        if not neurons:
            return
        blocks = [self.blocks[name] for name in neurons]
        options = self.options
        yield from moments_in_groups(
            self.model, self.inner, blocks, self.fitting, neurons, options.token_mask_fn, options.max_memory
        )

    # ---- Plans ----

    def dense(self):
        """The model as it is."""
        sizes = {name: found.dense for name, found in self.sizes.items()}
        return replace(Candidate(DENSE, sizes), score=self.score(self.inner, [[]], self.held)[0])

    def curve(self, budget, points=()):
        """The best plans at evenly spaced shares of the blocks' weights, at these, and at the budget, from large to
        small."""
        unit = _unit(budget)
        whole = sum(found.dense.amount(unit) for found in self.sizes.values())
        limits = {
            whole * share for share in (*(part / EVEN_POINTS for part in range(1, EVEN_POINTS)), *(points or ()))
        }
        if room := self.room(budget):
            limits.add(room)
        choice = {name: found.worth_having for name, found in self.sizes.items()}
        found = allocations(choice, sorted(limits, reverse=True), unit)
        return [Candidate(PLANNED, sizes) for sizes in found if sizes is not None]

    def room(self, budget):
        """What the blocks may have of a budget of parameters or MACs; `None` for another budget."""
        ((unit, value),) = budget.items()
        if unit not in ("parameters", "macs"):
            return None
        return room_of(unit, value, self.inner, self.blocks.values())

    def candidates(self, budget):
        """What is measured for one budget: the plan, and what it has to beat."""
        room, unit, multiple_of = self.room(budget), _unit(budget), self.options.multiple_of
        choice = {name: found.worth_having for name, found in self.sizes.items()}
        ends = {name: [found[0], found[-1]] for name, found in choice.items()}
        found = {PLANNED: allocations(choice, [room], unit)[0], DROPPED: allocations(ends, [room], unit)[0]}
        for name, share in ALIKE.items():
            if share in self.options.rank_shares:
                found[name] = alike(self.sizes, room, unit, share, multiple_of)
        candidates = [Candidate(name, sizes) for name, sizes in found.items() if sizes is not None]
        if not candidates:
            raise ValueError(f"The budget {budget} cannot be met with sizes of these ranks.")
        return candidates

    def of_widths(self, counts):
        """A candidate in which blocks keep so many neurons, and no linear map (`dict[FeedForwardBlock, int]`)."""
        sizes = {name: found.dense for name, found in self.sizes.items()}
        return Candidate(ONE_WIDTH, {**sizes, **{b.name: self.sizes[b.name].at(0, n) for b, n in counts.items()}})

    def largest_within(self, curve, budget):
        """The largest of these candidates that meets a budget of size."""
        room, unit = self.room(budget), _unit(budget)
        amounts = [sum(size.amount(unit) for size in candidate.sizes.values()) for candidate in curve]
        return max((pair for pair in zip(amounts, curve, strict=True) if pair[0] <= room), key=lambda pair: pair[0])[1]

    def point(self, candidate):
        """A candidate as a point of a curve."""
        sizes = candidate.sizes
        choices = {name: (size.rank, size.count) for name, size in sizes.items() if not size.as_it_is}
        saved = sum(self.blocks[name].parameters - size.parameters for name, size in sizes.items())
        macs = self.fixed_macs + sum(size.macs for size in sizes.values())
        return PlanPoint(
            choices,
            self.parameters - saved,
            macs,
            candidate.score,
            math.fsum(size.loss for size in sizes.values()),
            candidate.name,
        )

    def neurons(self):
        """Block name -> rank (as text) -> neurons in the order of their use."""
        return {
            name: {key_of(rank): order for rank, order in found.neurons.items()} for name, found in self.sizes.items()
        }

    # ---- What they do ----

    def measured(self, candidates):
        """The candidates with their scores, each fitted and put in place for a while."""
        merges = self._merges([candidate.sizes for candidate in candidates])
        plans = [[merges[key] for key in _keys(candidate.sizes)] for candidate in candidates]
        scores = self.score(self.inner, plans, self.held)
        return [replace(candidate, score=score) for candidate, score in zip(candidates, scores, strict=True)]

    def _merges(self, plans):
        """`(block name, rank, count)` -> what the block becomes, for all sizes in these plans."""
        wanted = {}
        for plan in plans:
            for name, rank, count in _keys(plan):
                wanted.setdefault(name, set()).add((rank, count))
        neurons = {}
        for name, sizes in wanted.items():
            used = {n for rank, count in sizes for n in self.sizes[name].neurons.get(rank, [])[:count]}
            neurons[name] = sorted(used)
        merges = {}
        for block, moments in self._moments(neurons):
            position = {neuron: index for index, neuron in enumerate(moments.neurons)}
            for rank, count in wanted[block.name]:
                kept = [position[neuron] for neuron in self.sizes[block.name].neurons[rank][:count]]
                constant = has_constant(block, rank, self.options.constant_term)
                about = moments if constant else moments.without_constant()
                fit = fit_size(about, kept, rank, self.metrics.get(block.name))
                merges[block.name, rank, count] = make_merge(block, fit, refit=True)
        return merges

    def latency_of(self, chosen, batch, dense):
        """Time of the model with these sizes as a share of the time of `dense`, a copy of it as it is. What the
        weights are does not matter, so none are fitted."""
        changed = [(self.blocks[name], size) for name, size in chosen.items() if not size.as_it_is]
        batch = inputs_of(batch, device_of(self.inner))
        with Trial() as trial:
            for block, size in changed:
                constant = has_constant(block, size.rank, self.options.constant_term)
                trial.put(make_merge(block, any_fit(block, size, constant), refit=False))
            models = {"dense": dense, "plan": self.inner}
            return compare_latency(models, batch, rounds=10, warmup=2, progress=False)["plan"].ratio


def _keys(sizes):
    return [(name, size.rank, size.count) for name, size in sizes.items() if not size.as_it_is]


@torch.no_grad()
def divergences(model, inner, plans, data):
    """Mean divergence of the model's predictions from its own, for each of several plans put in place in turn.

    Every batch is run as it is and with each plan before the next one, so that one batch of outputs is held.

    Args:
        plans (`list[list[Merge]]`): What blocks become in each.
        data (iterable of `dict[str, Tensor]`): Model inputs.

    Returns:
        One number a plan: nats of KL, or the cosine distance of embeddings; see [`predictions`].
    """
    sums, count = [0.0] * len(plans), 0
    if not any(plans):  # the model as it is
        return sums
    device = device_of(model)
    with evaluating(model):
        for batch in tqdm(data, desc="Measuring plans", leave=False):
            inputs = inputs_of(batch, device)
            given = without_labels(inner, inputs)
            reference = predictions_of(inner, inputs, model(**given))
            count += sum(part.values.shape[0] for part in reference)
            for index, merges in enumerate(plans):
                if not merges:
                    continue
                with Trial() as trial:
                    for merge in merges:
                        trial.put(merge)
                    found = predictions_of(inner, inputs, model(**given))
                for now, before in zip(found, reference, strict=True):
                    sums[index] += float(now.divergence_from(before).sum())
    if not count:
        raise ValueError("There is no batch to measure plans on.")
    if not all(map(math.isfinite, sums)):
        raise ValueError("The divergence of a plan from the model as it is is not finite.")
    return [total / count for total in sums]


def metric_scores(model, inner, plans, data, metric):
    """`metric(model)` with each of several plans put in place in turn; what it is measured on, it knows itself."""
    scores = []
    for merges in plans:
        with Trial() as trial:
            for merge in merges:
                trial.put(merge)
            scores.append(float(metric(model)))
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"The metric must be a finite number, got {scores}.")
    return scores


def _unit(budget):
    return "parameters" if "parameters" in budget else "macs"


def room_of(unit, value, inner, blocks):
    """What these blocks may have of a budget of parameters of the model, or of MACs of its feed-forward blocks."""
    if unit == "parameters":
        whole = count_parameters(inner)
        ours = sum(block.parameters for block in blocks)
    else:
        whole = sum(block.macs for block in find_feed_forward_blocks(inner))
        ours = sum(block.macs for block in blocks)
    return limit_of(value, whole) - (whole - ours)


def refuse_unreachable(inner, blocks, budget, multiple_of):
    """Raises if even the smallest size of every block is above a budget; asks no data.

    Raises:
        ValueError: As said.
    """
    ((unit, value),) = budget.items()
    if unit not in ("parameters", "macs"):
        return
    smallest = sum(cost_of(block, 0, multiple_of) for block in blocks)
    room = room_of(unit, value, inner, blocks)
    if smallest > room:
        ours = sum(block.macs for block in blocks)
        raise ValueError(
            f"The budget {budget} cannot be met: it leaves {room:,.0f} {unit} for the chosen blocks, and with "
            f"{multiple_of} neurons each they have {smallest:,} ({smallest / ours:.1%} of what they have now)."
        )


def within_latency(search, curve, batch, share):
    """`([the largest plan that is fast enough, measured], its share of the dense model's time)`."""
    dense = copy.deepcopy(search.inner)
    seen = {}

    def fast_enough(index):
        seen[index] = search.latency_of(curve[index].sizes, batch, dense)
        return seen[index] <= share

    index = first_for_which(len(curve), fast_enough)
    if index is None:
        raise ValueError(
            f"The budget latency={share} cannot be met: the smallest plan takes {seen[len(curve) - 1]:.3f} of the "
            "dense model's time."
        )
    return search.measured([curve[index]]), seen[index]


def within_drop(search, curve, drop):
    """The smallest plan of a curve that loses no more than the drop from its first point, measured, in a list."""
    seen = {0: curve[0]}

    def too_much(index):
        if index not in seen:
            (seen[index],) = search.measured([curve[index]])
        return search.sign * (seen[index].score - curve[0].score) > drop

    index = first_for_which(len(curve), too_much)
    return [seen[len(curve) - 1 if index is None else index - 1]]


def first_for_which(count, holds):
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


def plan_of(search, curve, candidates, started, **fields):
    """The [`CollapsePlan`] of a search: its curve, with the best candidate on it.

    Args:
        curve (`list[Candidate]`): From the dense model on.
        candidates (`list[Candidate]`): What was measured.
        started (`float`): `time.perf_counter()` then.
        fields: The rest of the plan.
    """
    best = min(candidates, key=lambda candidate: search.sign * candidate.score)
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
