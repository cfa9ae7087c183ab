"""What to collapse under a budget: how linear each block is, what it costs, and plans of what to do."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from . import processes
from .block_sizes import RANK_SHARES
from .blocks import BoundBlock, check_weights, survey
from .budgets import limit_of, one_budget
from .calibration import Calibration
from .calibration_data import both_model_inputs
from .merging import Merge, has_constant, make_merge, parameters_of
from .models import count_parameters, unwrap
from .moments import BlockMoments, bytes_to_fit
from .plan_search import (
    Candidate,
    PlanOptions,
    Score,
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
from .reports import DataReport
from .selection import select_blocks
from .tables import table
from .uniform_plans import LEVELS, counts_of, widths_for
from .widths import check_native, width_groups


if TYPE_CHECKING:
    from .reports import BlockReport


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
        data ([`DataReport`], *optional*): What was read of the calibration data.
    """

    score: float
    score_name: str
    blocks: list[BlockLinearity]
    data: DataReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
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
        lines = [table(rows), f"{self.score_name} of the model as it is: {self.score:.4f}"]
        return "\n".join(lines + ([] if self.data is None else [f"calibration data: {self.data}"]))


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
        model (`nn.Module`): A dense or patched model; what it may be wrapped in or held by, as in [`collapse_model`].
        calibration_data (iterable of `dict[str, Tensor]`): Model inputs; labels are not used. In several
            processes as in [`collapse_model`].
        blocks: As in [`LayerCollapseConfig`].
        evaluation_data (*optional*): What to score on. Default: a quarter of the different rows, chosen by their
            content, which are then not fitted to. It is held in memory.
        metric (`Callable`, *optional*): `metric(model) -> float`, higher is better, in place of the divergence of
            what the model predicts from what it predicts as it is, in nats.
        token_mask_fn, max_memory: As in [`collapse_model`].
        processing_class (*optional*): Tokenizer or processor that makes model inputs of raw texts, pairs, images or
            sounds, as [`CalibrationData`] says. Default: the data are model inputs, or what an object of
            sentence-transformers reads.

    Raises:
        ValueError: There is too little data or memory, or nothing to collapse.
    """
    with processes.together():
        inner, _ = unwrap(model)
        _, chosen = _candidates(inner, blocks)
        data = both_model_inputs(calibration_data, evaluation_data, processing_class, model)
    score = _score_of(model, metric)
    with Progress("Linearity map") as progress:
        engine, held = Calibration.holding_aside(model, inner, *data, max_memory, token_mask_fn, progress)
        merges = _linear_maps(engine, chosen)
        before, *scores = score.of(inner, [[], *([merges[block.name]] for block in chosen)], held, progress=progress)
        read = engine.data_report(held)
    found = [
        _block_linearity(merges[block.name].report, value - before)
        for block, value in zip(chosen, scores, strict=True)
    ]
    return processes.of_the_first(LinearityMap(before, score.name, found, read))


def _linear_maps(engine: Calibration, blocks: Sequence[BoundBlock]) -> dict[str, Merge]:
    """Block name -> its [`Merge`] to the linear map that fits it best."""

    def as_one_map(block: BoundBlock, moments: BlockMoments) -> Merge:
        if not has_constant(block, None, "native"):
            moments = moments.without_constant()
        return make_merge(block, moments.fit(), refit=True)

    working = {block.name: bytes_to_fit(block, 0) for block in blocks}
    kept = {b.name: parameters_of(b, None, 0, "native") * b.down.weight.element_size() for b in blocks}
    return engine.reduce(blocks, {block.name: [] for block in blocks}, as_one_map, working=working, kept=kept)


def _block_linearity(report: "BlockReport", change: float) -> BlockLinearity:
    assert report.r2 is not None, "what was fitted to data"
    return BlockLinearity(
        report.name,
        report.index,
        report.r2,
        change,
        report.parameters_before,
        report.parameters_after,
        report.macs_before,
        report.macs_after,
    )


def _score_of(model: nn.Module, metric: Callable[[nn.Module], float] | None) -> Score:
    if metric is None:
        return Score("divergence", 1.0, partial(divergences, model))
    return Score("metric", -1.0, partial(metric_scores, model, metric=metric))


def _candidates(inner: Any, selector: str | list[str] | list[int]) -> tuple[list[BoundBlock], list[BoundBlock]]:
    """`(all blocks, those that may change)`."""
    blocks, refused = survey(inner)
    chosen = [block for block in select_blocks(blocks, selector, refused) if block.can_collapse]
    if not chosen:
        raise ValueError("All chosen blocks are collapsed already.")
    check_weights(inner, chosen, merging=True)
    return blocks, chosen


def plan_collapse(
    model: nn.Module,
    calibration_data: Iterable[Any],
    *,
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
        model (`nn.Module`): A dense model; what it may be wrapped in or held by, as in [`collapse_model`]. What a
            `SentenceTransformer` predicts is its embeddings, after all of its modules, a `CrossEncoder` its scores, a
            `SparseEncoder` its vectors.
        calibration_data (iterable of `dict[str, Tensor]`): Model inputs; labels are not used. In several
            processes as in [`collapse_model`].
        parameters (`float` or `int`, *optional*): Largest number of parameters of the whole model, or largest share of
            those it has, in (0, 1).
        macs (`float` or `int`, *optional*): Largest number of multiply-accumulates per token in the feed-forward
            blocks, or largest share.
        latency (`float`, *optional*): Largest share of the dense model's time on the first scored batch, measured on
            this machine, in (0, 1). A table of the times that blocks of some shapes take says what is chosen, and the
            whole model's time with it is measured beside that of a copy, which counts as held.
        max_drop (`float`, *optional*): Largest divergence from the dense model's predictions (nats; cosine distance
            for embeddings; see [`predictions`]), or drop of the metric. Exactly one of these four.
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
            sounds, as [`CalibrationData`] says. Default: the data are model inputs, or what an object of
            sentence-transformers reads.

    Raises:
        ValueError: There is not exactly one budget, too little data, the budget cannot be met, the model's outputs are
            no predictions, or `max_memory` is too small for one block or one candidate.
    """
    started = time.perf_counter()
    budget = one_budget(parameters=parameters, macs=macs, latency=latency, max_drop=max_drop)
    options = PlanOptions(budget, uniform_width, rank_shares, multiple_of, constant_term, levels, points, whole_curve)
    with processes.together():
        inner, _ = unwrap(model)
        chosen, whole = _dense_blocks(inner, blocks, multiple_of)
        widths = _widths_in_reach(inner, chosen, whole, options)
        data = both_model_inputs(calibration_data, evaluation_data, processing_class, model)
    score = _score_of(model, metric)
    with Progress("Plan") as progress:
        engine, held = Calibration.holding_aside(model, inner, *data, max_memory, token_mask_fn, progress)
        # Fits of what is measured, and measuring some candidates.
        progress.foresee(engine.rows.batches + 4 * len(held))
        search = Search(engine, chosen, whole, held, score, options)
        search.look(widths)
        found = _of_any_sizes(search) if widths is None else _of_one_width(search, widths)
        plan = _plan_of(search, found, started)
    return processes.of_the_first(plan)


def refuse_budget(
    model: nn.Module,
    blocks: str | list[str] | list[int] = "all",
    constant_term: str = "native",
    **budget: float,
) -> None:
    """Raises what [`plan_collapse`] would for the same arguments before it reads any data.

    Raises:
        ValueError: As said.
    """
    options = PlanOptions(one_budget(**budget), False, RANK_SHARES, 1, constant_term, LEVELS, None, False)
    inner, _ = unwrap(model)
    chosen, whole = _dense_blocks(inner, blocks, options.multiple_of)
    _widths_in_reach(inner, chosen, whole, options)


class _Found(NamedTuple):
    """What a search found: the model as it is, the curve below it, what was measured for the budget and elsewhere, and
    the share of the dense model's time where that is the budget."""

    dense: Candidate
    curve: list[Candidate]
    candidates: list[Candidate]
    others: list[Candidate]
    latency: float | None


def _of_one_width(search: Search, widths: Sequence[Mapping[BoundBlock, int]]) -> _Found:
    options, dense = search.options, search.dense()
    curve = [search.of_widths(counts) for counts in widths]
    if not options.is_size:
        candidates, latency = _within_measured(search, dense, curve, curve)
    else:
        chosen = [search.largest_within(curve, options.budget)] if options.whole_curve else curve[-1:]
        candidates, latency = search.measured(chosen), None
    return _Found(dense, curve, candidates, [], latency)


def _of_any_sizes(search: Search) -> _Found:
    options, dense = search.options, search.dense()
    unit = "parameters" if "parameters" in options.budget else "macs"
    whole = search.whole(unit)
    compared = search.all_measured({share: search.candidates(share * whole, unit) for share in options.points or ()})
    curve = search.curve(options.budget, [(share, search.best(found)) for share, found in compared.items()])
    room, latency = search.room(options.budget), None
    if room is None:
        candidates, latency = _within_measured(search, dense, curve)
    else:
        at_room = [found for share, found in compared.items() if limit_of(share, whole) == room]
        candidates = at_room[0] if at_room else search.measured(search.candidates(room, unit))
    others = [candidate for found in compared.values() if found is not candidates for candidate in found]
    return _Found(dense, curve, candidates, others, latency)


def _within_measured(
    search: Search, dense: Candidate, curve: Sequence[Candidate], widths: Sequence[Candidate] = ()
) -> tuple[list[Candidate], float | None]:
    """`(candidates, share of the time)` within a budget that only measuring tells."""
    budget = search.options.budget
    if "latency" in budget:
        return within_latency(search, _first(search.held), budget["latency"], widths)
    return within_drop(search, [dense, *curve], budget["max_drop"]), None


def _plan_of(search: Search, found: _Found, started: float) -> CollapsePlan:
    """The plan with the best of what was found, made in the time since `started`."""
    options = search.options
    return plan_of(
        search,
        [found.dense, *(search.measured(found.curve) if options.whole_curve else found.curve)],
        search.best(found.candidates),
        [*found.others, *found.candidates],
        started,
        fingerprint=weights_fingerprint(search.inner),
        score_name=search.score.name,
        budget=options.budget,
        latency=found.latency,
        constant_term=options.constant_term,
        metric=search.metric_report,
        data=search.engine.data_report(search.held),
    )


def _dense_blocks(
    inner: Any, blocks: str | list[str] | list[int], multiple_of: int
) -> tuple[list[BoundBlock], dict[str, int]]:
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


def _widths_in_reach(
    inner: Any, chosen: Sequence[BoundBlock], whole: Mapping[str, int], options: PlanOptions
) -> list[dict[BoundBlock, int]] | None:
    """`[{block: the neurons that it keeps}]` of a plan of one width, largest first, all of which the native class can
    hold; `None` for other plans.

    Raises:
        ValueError: Nothing is as small as the budget.
    """
    if not options.uniform_width:
        refuse_unreachable(whole, chosen, options)
        return None
    groups = width_groups(inner, chosen, options.multiple_of)
    shares = (options.points or options.levels) if options.whole_curve or not options.is_size else []
    rows = widths_for(groups, options.budget, shares, options.constant_term, whole)
    for row in rows:
        check_native(inner, groups, row)
    return [counts_of(groups, row) for row in rows]


def _first(held: list[dict[str, Any]]) -> dict[str, Any]:
    """The first batch of the first process that has one."""
    return next(batch for part in processes.gathered(held[:1]) for batch in part)
