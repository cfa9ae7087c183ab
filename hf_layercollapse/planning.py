"""What to collapse under a budget: how linear each block is, what it costs, and plans of what to do."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from . import processes
from .block_sizes import RANK_SHARES
from .blocks import check_weights, survey
from .budgets import limit_of, one_budget
from .calibration import Calibration, refuse_different_models
from .calibration_data import model_inputs
from .data_reading import split_data
from .loss_metric import measure_metrics
from .memory import MemoryBudget
from .merging import has_constant, make_merge
from .models import count_parameters, unwrap
from .moments import bytes_to_fit
from .plan_search import (
    Search,
    divergences,
    metric_scores,
    plan_of,
    refuse_unreachable,
    within_drop,
    within_latency,
)
from .plans import CollapsePlan, weights_fingerprint
from .progress import Progress
from .selection import select_blocks
from .tables import table
from .token_filter import is_encoder_decoder
from .uniform_plans import LEVELS, counts_of, widths_for
from .widths import check_native, width_groups


@dataclass(frozen=True)
class BlockLinearity:
    """How linear one block is.

    Args:
        name (`str`), index (`int`): Which.
        r2 (`float`): Share of its output's variance that the best linear map explains on other data of the kind, 1 =
            all.
        score_change (`float`): What the model's score gains (loses, if negative) when this block alone becomes that
            map; the score is a divergence, lower is better, unless a metric was given.
        parameters, parameters_after (`int`): Its weights and biases as it is, and as one map.
        macs, macs_after (`int`): Multiply-accumulates per token.
    """

    name: str
    index: int
    r2: float
    score_change: float
    parameters: int
    parameters_after: int
    macs: int
    macs_after: int


@dataclass(frozen=True)
class LinearityMap:
    """How linear every block of a model is. Prints as a table; see also [`plotting.plot_linearity`].

    Args:
        score (`float`): Of the model as it is.
        score_name (`str`): What it is: `"divergence"` (of the predictions from the model's own, 0 as it is, see
            [`predictions`]) or `"metric"`.
        blocks (`list[BlockLinearity]`): In forward order.
    """

    score: float
    score_name: str
    blocks: list[BlockLinearity]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self):
        rows = [["block", "R^2", f"{self.score_name} change", "parameters", "MACs/token"]]
        for block in self.blocks:
            rows.append(
                [
                    block.name,
                    f"{block.r2:.4f}",
                    f"{block.score_change:+.4f}",
                    f"{block.parameters:,} -> {block.parameters_after:,}",
                    f"{block.macs:,} -> {block.macs_after:,}",
                ]
            )
        return table(rows) + f"\n{self.score_name} of the model as it is: {self.score:.4f}"


def linearity_map(
    model: nn.Module,
    calibration_data: Iterable[Any],
    blocks: str | list[str] | list[int] = "all",
    evaluation_data: Iterable[Any] | None = None,
    metric: Callable | None = None,
    token_mask_fn: Callable[..., Any] | None = None,
    max_memory: int | str | dict | None = None,
    processing_class: Any = None,
) -> LinearityMap:
    """How linear each block is, and what the model loses if it alone becomes its least-squares map. Changes nothing.

    Args:
        model (`nn.Module`): A dense or patched model; a PeftModel or compiled model is looked through.
        calibration_data (iterable of `dict[str, Tensor]`): Model inputs; labels are not used. In several
            processes as in [`collapse_model`].
        blocks: As in [`LayerCollapseConfig`].
        evaluation_data (*optional*): What to score on. Default: a quarter of the different rows, chosen by their
            content, which are then not fitted to. It is held in memory.
        metric (`Callable`, *optional*): `metric(model) -> float`, higher is better, in place of the divergence of
            what the model predicts from what it predicts as it is, in nats.
        token_mask_fn, max_memory: As in [`collapse_model`].
        processing_class (*optional*): Tokenizer or processor that makes model inputs of raw texts, pairs, images or
            sounds, as [`CalibrationData`] says. Default: the data are model inputs.

    Raises:
        ValueError: There is too little data or memory, or nothing to collapse.
    """
    inner, _ = unwrap(model)
    _, chosen = _candidates(inner, blocks)
    calibration_data, evaluation_data = (
        model_inputs(data, processing_class, model) for data in (calibration_data, evaluation_data)
    )
    memory = MemoryBudget(max_memory)
    name, _, score = _score_of(model, metric)

    def as_one_map(block, moments):
        if not has_constant(block, None, "native"):
            moments = moments.without_constant()
        return make_merge(block, moments.fit(), refit=True)

    with Progress("Linearity map") as progress:
        refuse_different_models(inner)
        fitting, held = split_data(calibration_data, evaluation_data, memory, is_encoder_decoder(inner))
        engine = Calibration(model, inner, fitting, memory, token_mask_fn, progress)
        working = {block.name: bytes_to_fit(block, 0) for block in chosen}
        merges = engine.reduce(chosen, {block.name: [] for block in chosen}, as_one_map, working=working)
        before, *scores = score(inner, [[], *([merges[block.name]] for block in chosen)], held, progress=progress)
    rows = []
    for block, value in zip(chosen, scores, strict=True):
        report = merges[block.name].report
        rows.append(
            BlockLinearity(
                block.name,
                block.index,
                report.r2,
                value - before,
                report.parameters_before,
                report.parameters_after,
                report.macs_before,
                report.macs_after,
            )
        )
    return LinearityMap(before, name, rows)


def _score_of(model, metric):
    """`(name, sign, score)` of what plans are measured by; the sign is 1 where lower is better, else -1."""
    if metric is None:
        return "divergence", 1.0, partial(divergences, model)
    return "metric", -1.0, partial(metric_scores, model, metric=metric)


def _candidates(inner, selector):
    """`(all blocks, those that may change)`."""
    blocks, refused = survey(inner)
    chosen = [block for block in select_blocks(blocks, selector, refused) if block.can_collapse]
    if not chosen:
        raise ValueError("All chosen blocks are collapsed already.")
    check_weights(inner, chosen, merging=True)
    return blocks, chosen


@dataclass(frozen=True)
class _Options:
    """What sizes plans choose from, and how they are measured; see [`plan_collapse`]."""

    rank_shares: tuple
    multiple_of: int
    constant_term: str


def plan_collapse(
    model: nn.Module,
    calibration_data: Iterable[Any],
    parameters: float | int | None = None,
    macs: float | int | None = None,
    latency: float | None = None,
    max_drop: float | None = None,
    metric: Callable | None = None,
    evaluation_data: Iterable[Any] | None = None,
    blocks: str | list[str] | list[int] = "all",
    levels: Sequence[float] = LEVELS,
    rank_shares: Sequence[float | None] = RANK_SHARES,
    points: Sequence[float] | None = None,
    whole_curve: bool = False,
    uniform_width: bool = False,
    multiple_of: int = 1,
    constant_term: str = "native",
    token_mask_fn: Callable[..., Any] | None = None,
    max_memory: int | str | dict | None = None,
    processing_class: Any = None,
) -> CollapsePlan:
    """Chooses blocks, ranks and kept neurons under a budget; changes nothing.

    What counts is what the model predicts. A backward pass over some of the data, without labels, gives for every
    block how much a change of its output matters to that ([`loss_metric.LossMetric`]). In this metric neurons and
    linear maps are chosen, and what every size of every block is expected to lose comes out in one unit, nats of KL
    divergence from the dense model a prediction. The sizes with the smallest sum under a budget are found exactly, for
    all budgets at once; the smallest size of a block is to drop it. A few candidates are then measured on rows held
    aside: that plan, all blocks alike (narrower, or with a linear map beside the neurons), and whole blocks dropped.
    The best of them is the plan. Where no backward pass is possible (offloaded weights, some quantizers) the variance
    of outputs counts in place of the metric, and `plan.metric` says why.

    Args:
        model (`nn.Module`): A dense model; a PeftModel or compiled model is looked through.
        calibration_data (iterable of `dict[str, Tensor]`): Model inputs; labels are not used. In several
            processes as in [`collapse_model`].
        parameters (`float` or `int`, *optional*): Largest number of parameters of the whole model, or largest share of
            those it has, in (0, 1).
        macs (`float` or `int`, *optional*): Largest number of multiply-accumulates per token in the feed-forward
            blocks, or largest share.
        latency (`float`, *optional*): Largest share of the dense model's time on the first scored batch, measured on
            this machine, in (0, 1). A table of the times that blocks of some shapes take says what is chosen, and the
            whole model's time with it is measured.
        max_drop (`float`, *optional*): Largest divergence from the dense model's predictions (nats; cosine distance
            for embeddings), or drop of the metric. Exactly one of these four.
        metric (`Callable`, *optional*): `metric(model) -> float`, higher is better, in place of the divergence.
        evaluation_data (*optional*): What to measure on. Default: as in [`linearity_map`]. Take neither from what the
            result is to be tested on.
        blocks: As in [`LayerCollapseConfig`].
        levels (`Sequence[float]`): With `uniform_width`, shares of the widths now that are measured where the budget
            is no size, or `whole_curve` is set; other plans look at every size.
        rank_shares (`Sequence[float | None]`): Ranks to choose from, as shares of the input width; `None`: full.
        points (`Sequence[float]`, *optional*): Further sizes, as shares of these blocks' weights, each in (0, 1), at
            which the same candidates are measured as for the budget, so that the curve has the best of them there
            ([`~CollapsePlan.at`]); with `uniform_width` in place of `levels`. Others of its points, 23 evenly spaced
            ones, are planned and not measured.
        whole_curve (`bool`): Measure every point of the curve.
        uniform_width (`bool`): One hidden width for all blocks, and no linear part: what is left is the native
            architecture with a smaller number in its config, which [`export_stock`] writes. Which neurons stay is
            chosen for each block. Where several fields set widths (an encoder's and a decoder's, two towers'), each
            gets the same share of its own, and blocks of one field that differ already get at most the narrowest's.
        multiple_of (`int`): What the number of neurons that a block keeps, and the rank of a linear map below full
            rank, are multiples of. A block that is dropped keeps none; one of zeros stands in its place.
        constant_term (`str`): `"native"` or `"always"`, as in [`LayerCollapseConfig`].
        token_mask_fn: As in [`collapse_model`].
        max_memory: As in [`collapse_model`].
        processing_class (*optional*): Tokenizer or processor that makes model inputs of raw texts, pairs, images or
            sounds, as [`CalibrationData`] says. Default: the data are model inputs.

    Raises:
        ValueError: There is not exactly one budget, too little data, the budget cannot be met, the model's outputs are
            no predictions, or `max_memory` is too small for one block.
    """
    started = time.perf_counter()
    _check(uniform_width, rank_shares, constant_term, multiple_of, points)
    budget = one_budget(parameters=parameters, macs=macs, latency=latency, max_drop=max_drop)
    inner, _ = unwrap(model)
    chosen, whole = _dense_blocks(inner, blocks, multiple_of)
    widths = None
    if uniform_width:
        shares = (points or levels) if whole_curve or not _is_size(budget) else []
        widths = _uniform_widths(inner, chosen, budget, shares, multiple_of, constant_term, whole)
    else:
        refuse_unreachable(whole, chosen, budget, rank_shares, multiple_of, constant_term)
    calibration_data, evaluation_data = (
        model_inputs(data, processing_class, model) for data in (calibration_data, evaluation_data)
    )
    score_name, sign, score = _score_of(model, metric)
    options = _Options((0.0,) if uniform_width else tuple(rank_shares), multiple_of, constant_term)
    memory = MemoryBudget(max_memory)
    with Progress("Plan") as progress:
        refuse_different_models(inner)
        fitting, held = split_data(calibration_data, evaluation_data, memory, is_encoder_decoder(inner))
        engine = Calibration(model, inner, fitting, memory, token_mask_fn, progress)
        # Fits of what is measured, and measuring some candidates.
        progress.foresee(fitting.batches + 4 * len(held))
        metrics, measured = measure_metrics(engine, chosen)
        search = Search(engine, chosen, whole, held, metrics, score, sign, options)
        search.look()
        dense = search.dense()
        if uniform_width:
            found = _of_one_width(search, budget, dense, widths, whole_curve)
        else:
            found = _of_any_sizes(search, budget, dense, points or ())
        plan = plan_of(
            search,
            [dense, *(search.measured(found.curve) if whole_curve else found.curve)],
            search.best(found.candidates),
            [*found.others, *found.candidates],
            fingerprint=weights_fingerprint(inner),
            score_name=score_name,
            budget=budget,
            latency=found.latency,
            constant_term=constant_term,
            metric=measured,
            started=started,
        )
    return processes.of_the_first(plan)


class _Found(NamedTuple):
    """What a search found: the curve below the dense model, what was measured for the budget and elsewhere, and the
    share of the dense model's time where that is the budget."""

    curve: list
    candidates: list
    others: list
    latency: float | None


def _of_one_width(search, budget, dense, widths, whole_curve):
    curve = [search.of_widths(counts) for counts in widths]
    if not _is_size(budget):
        candidates, latency = _within_measured(search, budget, dense, curve, curve)
    else:
        chosen = [search.largest_within(curve, budget)] if whole_curve else curve[-1:]
        candidates, latency = search.measured(chosen), None
    return _Found(curve, candidates, [], latency)


def _of_any_sizes(search, budget, dense, points):
    unit = "parameters" if "parameters" in budget else "macs"
    whole = search.whole(unit)
    compared = search.all_measured({share: search.candidates(share * whole, unit) for share in points})
    curve = search.curve(budget, [(share, search.best(found)) for share, found in compared.items()])
    if not _is_size(budget):
        candidates, latency = _within_measured(search, budget, dense, curve)
    else:
        room, latency = search.room(budget), None
        candidates = next((found for share, found in compared.items() if limit_of(share, whole) == room), None)
        candidates = candidates or search.measured(search.candidates(room, unit))
    others = [candidate for found in compared.values() if found is not candidates for candidate in found]
    return _Found(curve, candidates, others, latency)


def _within_measured(search, budget, dense, curve, widths=()):
    """`(candidates, share of the time)` within a budget that only measuring tells."""
    if "latency" in budget:
        return within_latency(search, _first(search.held), budget["latency"], widths)
    return within_drop(search, [dense, *curve], budget["max_drop"]), None


def _is_size(budget):
    """Whether a budget is one that the sizes of the blocks tell."""
    return bool(budget.keys() & {"parameters", "macs"})


def _dense_blocks(inner, blocks, multiple_of):
    """`(the chosen blocks, what the model has in all)`: its `parameters`, and `macs` of all its feed-forward blocks.

    Raises:
        ValueError: The model is patched, or none could keep so many neurons.
    """
    everything, chosen = _candidates(inner, blocks)
    widest = max(block.hidden_features for block in chosen)
    if multiple_of > widest:
        raise ValueError(
            f"`multiple_of` is {multiple_of}, and no chosen block has more than {widest} neurons: none could keep any."
        )
    if any(block.state == "patched" for block in everything):
        raise ValueError("The model is patched; plans are for dense models. `remove_layer_collapse` takes it back.")
    return chosen, {"parameters": count_parameters(inner), "macs": sum(block.macs for block in everything)}


def _uniform_widths(inner, chosen, budget, shares, multiple_of, constant_term, whole):
    """`[{block: the neurons that it keeps}]`, largest first, all of which the native class can hold."""
    groups = width_groups(inner, chosen, multiple_of)
    rows = widths_for(groups, budget, shares, constant_term, whole)
    for row in rows:
        check_native(inner, groups, row)
    return [counts_of(groups, row) for row in rows]


def _first(held):
    """The first batch of the first process that has one."""
    return next(batch for part in processes.gathered(held[:1]) for batch in part)


def _check(uniform_width, rank_shares, constant_term, multiple_of, points):
    if uniform_width and rank_shares is not RANK_SHARES:
        raise ValueError("`uniform_width` leaves no linear part: leave `rank_shares` out.")
    if constant_term not in ("native", "always"):
        raise ValueError(f'`constant_term` must be "native" or "always", got {constant_term!r}.')
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"`multiple_of` must be an integer of at least 1, got {multiple_of!r}.")
    if points is not None and (not points or not all(0 < share < 1 for share in points)):
        raise ValueError(f"`points` must be shares in (0, 1), got {list(points)}.")
