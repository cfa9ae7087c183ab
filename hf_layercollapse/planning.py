"""What to collapse under a budget: how linear each block is, what it costs, and plans of what to do."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from tqdm.auto import tqdm

from .calibration import collect_moments
from .families import check_weights, find_feed_forward_blocks, modules_of, select_blocks, survey_blocks, unwrap
from .merging import Trial, has_constant, make_merge
from .plan_search import (
    LEVELS,
    MOST_STEPPED_BLOCKS,
    RANK_SHARES,
    Search,
    candidate_neurons,
    default_points,
    within_latency,
)
from .plans import CollapsePlan, first_within, one_budget, weights_fingerprint
from .scoring import Score, split
from .tables import table
from .uniform_plans import UniformSearch, widths_for
from .widths import width_groups


@dataclass(frozen=True)
class BlockLinearity:
    """How linear one block is.

    Args:
        name (`str`), index (`int`): Which.
        r2 (`float`): Share of its output's variance that the best linear map explains on other data of the kind, 1 =
            all.
        score_change (`float`): What the model's score gains (loses, if negative) when this block alone becomes that
            map; the score is a loss, lower is better, unless a metric was given.
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
        score_name (`str`): What it is: `"loss"`, `"divergence"` (of the outputs from the model's own) or `"metric"`.
        blocks (`list[BlockLinearity]`): In forward order.
    """

    score: float
    score_name: str
    blocks: list[BlockLinearity]

    def to_dict(self):
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
    model, calibration_data, blocks="all", evaluation_data=None, metric: Callable | None = None, token_mask_fn=None
) -> LinearityMap:
    """How linear each block is, and what the model loses if it alone becomes its least-squares map. Changes nothing.

    Args:
        model (`nn.Module`): A dense or patched model; a PeftModel or compiled model is looked through.
        calibration_data (iterable of `dict[str, Tensor]`): Model inputs; with labels the score is the model's loss, a
            causal language model needs none, and otherwise it is the divergence from the model's own outputs.
        blocks: As in [`LayerCollapseConfig`].
        evaluation_data (*optional*): What to score on. Default: a quarter of the different rows, chosen by their
            content, which are then not fitted to. It is held in memory.
        metric (`Callable`, *optional*): `metric(model) -> float`, higher is better, in place of the loss.

    Raises:
        ValueError: There is too little data, or nothing to collapse.
    """
    inner, _ = unwrap(model)
    chosen = _candidates(inner, blocks)
    fitting, scoring = split(calibration_data, evaluation_data)
    score = Score(model, inner, scoring, metric)
    before = score()
    moments = collect_moments(model, inner, chosen, fitting, token_mask_fn=token_mask_fn)
    rows = []
    for block in tqdm(chosen, desc="Measuring blocks", leave=False):
        parts, found = modules_of(inner, block), moments[block.name]
        fit = (found if has_constant(parts, None, "native") else found.without_constant()).fit()
        merge = make_merge(block, parts, fit, refit=True)
        with Trial(inner) as trial:
            trial.put(merge)
            change = score() - before
        report = merge.report
        rows.append(
            BlockLinearity(
                block.name,
                block.index,
                report.r2,
                change,
                report.parameters_before,
                report.parameters_after,
                report.macs_before,
                report.macs_after,
            )
        )
    return LinearityMap(before, score.name, rows)


def _candidates(inner, selector):
    blocks, refused = survey_blocks(inner)
    chosen = [block for block in select_blocks(blocks, selector, refused) if block.can_collapse]
    if not chosen:
        raise ValueError("All chosen blocks are collapsed already.")
    check_weights(inner, chosen, merging=True)
    return chosen


def plan_collapse(
    model,
    calibration_data,
    parameters: float | int | None = None,
    macs: float | int | None = None,
    latency: float | None = None,
    max_drop: float | None = None,
    metric: Callable | None = None,
    evaluation_data=None,
    blocks="all",
    levels=LEVELS,
    rank_shares=RANK_SHARES,
    points=None,
    whole_curve: bool = False,
    uniform_width: bool = False,
    multiple_of: int = 1,
    constant_term: str = "native",
    token_mask_fn=None,
) -> CollapsePlan:
    """Chooses blocks, ranks and kept neurons under a budget; changes nothing.

    One pass over the data gives every size of every block its least-squares fit. From the dense model on, the step
    that is expected to cost the score least for what it saves is measured, with the next best ones where these may be
    better, and the best is taken: each point of the curve is measured, and so is what a block costs in the company of
    the others.

    Args:
        model (`nn.Module`): A dense model; a PeftModel or compiled model is looked through.
        calibration_data (iterable of `dict[str, Tensor]`): Model inputs, as in [`linearity_map`].
        parameters (`float` or `int`, *optional*): Largest number of parameters of the whole model, or largest share of
            those it has, in (0, 1).
        macs (`float` or `int`, *optional*): Largest number of multiply-accumulates per token in the feed-forward
            blocks, or largest share.
        latency (`float`, *optional*): Largest share of the dense model's time on the first scored batch, measured on
            this machine, in (0, 1).
        max_drop (`float`, *optional*): Largest rise of the loss or divergence (nats), or drop of the metric. Exactly
            one of these four.
        metric (`Callable`, *optional*): `metric(model) -> float`, higher is better, in place of the loss.
        evaluation_data (*optional*): What to score on. Default: as in [`linearity_map`]. Take
            neither from what the result is to be tested on.
        blocks: As in [`LayerCollapseConfig`].
        levels (`Sequence[float]`): Shares of a block's weights to choose from.
        rank_shares (`Sequence[float | None]`): Ranks to choose from, as shares of the input width; `None`: full.
        points (`Sequence[float]`, *optional*): Shares of the feed-forward MACs at which the curve is measured, each
            in (0, 1); between them steps are taken on expectation, which each measurement corrects. Default: every
            step is measured up to eight blocks; with more, 23 evenly spaced shares and the budget's own.
        whole_curve (`bool`): Go on below the budget, to the smallest plan, so that `plan.at` can reach it.
        uniform_width (`bool`): One hidden width for all blocks, and no linear part: what is left is the native
            architecture with a smaller number in its config, which [`export_stock`] writes. Which neurons stay is
            chosen for each block. Where several fields set widths (an encoder's and a decoder's, two towers'), each
            gets the same share of its own, and blocks of one field that differ already get at most the narrowest's.
            With a budget of parameters or MACs one width is measured, otherwise those of `points` or `levels`.
        multiple_of (`int`): What the number of neurons that a block keeps, and the rank of a linear map below full
            rank, are multiples of.
        constant_term (`str`): `"native"` or `"always"`, as in [`LayerCollapseConfig`].

    Raises:
        ValueError: There is not exactly one budget, too little data, or the budget cannot be met.
    """
    if uniform_width and rank_shares is not RANK_SHARES:
        raise ValueError("`uniform_width` leaves no linear part: leave `rank_shares` out.")
    if constant_term not in ("native", "always"):
        raise ValueError(f'`constant_term` must be "native" or "always", got {constant_term!r}.')
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"`multiple_of` must be an integer of at least 1, got {multiple_of!r}.")
    budget = one_budget(parameters=parameters, macs=macs, latency=latency, max_drop=max_drop)
    if points is not None and (not points or not all(0 < share < 1 for share in points)):
        raise ValueError(f"`points` must be shares in (0, 1), got {list(points)}.")
    inner, _ = unwrap(model)
    chosen = _candidates(inner, blocks)
    widest = max(block.hidden_features for block in chosen)
    if multiple_of > widest:
        raise ValueError(
            f"`multiple_of` is {multiple_of}, and no chosen block has more than {widest} neurons: none could keep any."
        )
    total = sum(parameter.numel() for parameter in inner.parameters())
    if uniform_width:
        groups = width_groups(inner, chosen, multiple_of)
    elif points is None and len(chosen) > MOST_STEPPED_BLOCKS:
        points = default_points(budget, total, sum(block.macs for block in find_feed_forward_blocks(inner)))
    if any(block.state == "patched" for block in find_feed_forward_blocks(inner)):
        raise ValueError("The model is patched; plans are for dense models. `remove_layer_collapse` takes it back.")
    fitting, scoring = split(calibration_data, evaluation_data)
    score = Score(model, inner, scoring, metric)
    if uniform_width:
        macs_before = sum(block.macs for block in find_feed_forward_blocks(inner))
        shares = (points or levels) if whole_curve or not budget.keys() & {"parameters", "macs"} else []
        widths = widths_for(inner, groups, total, macs_before, budget, shares, constant_term)
        neurons = {block.name: list(range(block.hidden_features)) for block in chosen}
        moments = collect_moments(model, inner, chosen, fitting, neurons, token_mask_fn)
        search = UniformSearch(inner, groups, moments, score, total, macs_before, widths, constant_term)
    else:
        neurons = candidate_neurons(model, inner, chosen, fitting, token_mask_fn)
        moments = collect_moments(model, inner, chosen, fitting, neurons, token_mask_fn)
        options = levels, rank_shares, points, multiple_of, constant_term
        search = Search(inner, chosen, moments, score, total, *options)
    del moments
    with search:
        for _ in search.steps():
            reached = first_within(search.curve, budget, score.name) if "latency" not in budget else None
            if whole_curve or "latency" in budget:
                continue
            if reached is not None and "max_drop" not in budget:
                break
            # Losses are not monotonous to the last digit: a plan far beyond the drop ends the search.
            drop = score.sign * (search.curve[-1].score - search.curve[0].score)
            if "max_drop" in budget and drop > 2 * budget["max_drop"] + 1e-12:
                break
    measured = None
    if "latency" in budget:
        index, measured = within_latency(model, inner, search, next(iter(scoring)), budget["latency"])
    else:
        index = first_within(search.curve, budget, score.name)
    if index is None:
        smallest = search.curve[-1]
        raise ValueError(
            f"The budget {budget} cannot be met: the smallest plan has {smallest.parameters:,} parameters and "
            f"{smallest.macs:,} feed-forward MACs per token ({smallest.parameters / total:.1%} and "
            f"{smallest.macs / search.curve[0].macs:.1%} of the dense model's)"
            + (f", and takes {measured:.3f} of its time." if measured is not None else ".")
        )
    return CollapsePlan(
        weights_fingerprint(inner), score.name, budget, search.neurons, search.curve, index, measured, constant_term
    )
