"""What to collapse under a budget: how linear each block is, what it costs, and plans that can be kept and applied."""

import copy
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from . import functional
from ._version import __version__
from .calibration import collect_moments, reiterable, run_over, score_neurons
from .collapsing import BlockChoice, Trial, cost_of, effective_rank, make_merge
from .families import check_weights, find_feed_forward_blocks, modules_of, select_blocks, survey_blocks, unwrap
from .profiling import compare_latency


# Shares of a block's weights that plans choose from. 0.125 is one full matrix in a block four times as wide as the
# model.
LEVELS = (0.9, 0.8, 0.65, 0.5, 0.375, 0.28, 0.22, 0.17, 0.125, 0.08)

# Ranks of the linear part that are tried at each level, as shares of the input width; `None` is full rank.
RANK_SHARES = (None, 0.25, 0.125, 0.0)

# Features (inputs and candidate neurons) of a block whose moments a plan collects: 134 MB a block in float64.
PLAN_FEATURES = 4096

# Candidates for the next step that are measured before the best of them is taken.
MEASURED_PER_STEP = 3

# A measurement after several steps corrects what is expected of the blocks that moved by at most this factor.
MOST_CORRECTED = 4.0

PLAN_VERSION = 1


@dataclass(frozen=True)
class BlockLinearity:
    """How linear one block is.

    Args:
        name (`str`), index (`int`): Which.
        r2 (`float`): Share of its output's variance that the best linear map explains, 1 = all.
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


def table(rows):
    """Rows of text as one, the first as its head, aligned: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


@dataclass(frozen=True)
class PlanPoint:
    """One plan of the curve.

    Args:
        choices (`dict[str, tuple[int | None, int]]`): Block name -> rank of its linear map (`None`: full) and number
            of neurons kept. Blocks that are not named stay as they are.
        parameters (`int`): Of the whole model.
        macs (`int`): Multiply-accumulates per token in the feed-forward blocks.
        score (`float`): Measured on the data that plans are scored on.
    """

    choices: dict[str, tuple[int | None, int]]
    parameters: int
    macs: int
    score: float


@dataclass(frozen=True)
class CollapsePlan:
    """Which blocks collapse, and how, with all plans that were met on the way to it.

    It holds choices and scores, no weights: [`collapse_model`] fits them to data again. A plan is for one model, by
    its weights' fingerprint, and is refused for another.

    Args:
        fingerprint (`str`): Of the model's weights.
        score_name (`str`): `"loss"`, `"divergence"` or `"metric"`; lower is better except for a metric.
        budget (`dict`): What was asked for.
        neurons (`dict[str, dict[str, list[int]]]`): Block name -> rank (as text) -> neurons in the order of their use:
            who keeps `k` keeps the first `k`.
        curve (`list[PlanPoint]`): From the model as it is to the smallest plan.
        chosen (`int`): Index in the curve.
        latency (`float`, *optional*): Measured share of the dense model's time, where that was the budget.
    """

    fingerprint: str
    score_name: str
    budget: dict
    neurons: dict[str, dict[str, list[int]]]
    curve: list[PlanPoint]
    chosen: int
    latency: float | None = None
    version: int = PLAN_VERSION
    made_by: str = field(default=f"hf_layercollapse {__version__}")

    @property
    def point(self) -> PlanPoint:
        """The chosen point of the curve."""
        return self.curve[self.chosen]

    @property
    def order(self) -> list[str]:
        """The blocks that the chosen point names, in the order in which the curve came to them: the cheapest first."""
        met = [name for point in self.curve[: self.chosen + 1] for name in point.choices]
        return [name for name in dict.fromkeys(met) if name in self.point.choices]

    def at(self, parameters=None, macs=None, max_drop=None) -> "CollapsePlan":
        """The same plan at another point of its curve, without measuring anything again.

        Args:
            parameters, macs, max_drop: One budget, as in [`plan_collapse`].

        Raises:
            ValueError: Not exactly one is given, or no point of the curve meets it.
        """
        budget = _one_budget(parameters=parameters, macs=macs, max_drop=max_drop)
        chosen = _first_within(self.curve, budget, self.score_name)
        if chosen is None:
            raise ValueError(f"No point of this plan's curve meets {budget}; make a plan for it.")
        return dataclasses.replace(self, chosen=chosen, budget=budget, latency=None)

    def choices_for(self, inner, blocks) -> dict[str, BlockChoice]:
        """Block name -> what it is to become in this model.

        Raises:
            ValueError: The plan was made for a model with other weights.
        """
        found = weights_fingerprint(inner)
        if found != self.fingerprint:
            raise ValueError(
                f"This plan was made for other weights: its fingerprint is {self.fingerprint}, and the model's is "
                f"{found}. Make a plan for this model with `plan_collapse`."
            )
        names = {block.name for block in blocks}
        unknown = sorted(self.point.choices.keys() - names)
        if unknown:
            raise ValueError(f"The plan names what is no block of this model: {unknown}.")
        return {
            name: BlockChoice(rank, sorted(self.neurons[name][_key(rank)][:count]))
            for name, (rank, count) in self.point.choices.items()
        }

    def to_dict(self):
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values) -> "CollapsePlan":
        """The inverse of `to_dict`.

        Raises:
            ValueError: It is no plan, or one of a newer version.
        """
        if not isinstance(values, dict) or not isinstance(values.get("version"), int):
            raise ValueError("This is no collapse plan: it has no version.")
        if values["version"] > PLAN_VERSION:
            raise ValueError(
                f"This plan has version {values['version']}, and this code reads versions up to {PLAN_VERSION}. "
                "Upgrade with `pip install -U hf_layercollapse`."
            )
        names = {f.name for f in dataclasses.fields(cls)}
        required = names - {"latency", "made_by"}
        if values.keys() - names or required - values.keys():
            raise ValueError(
                f"This is no collapse plan: missing {sorted(required - values.keys())}, unknown "
                f"{sorted(values.keys() - names)}."
            )
        try:
            curve = [
                PlanPoint(
                    {name: (rank, count) for name, (rank, count) in point["choices"].items()},
                    point["parameters"],
                    point["macs"],
                    point["score"],
                )
                for point in values["curve"]
            ]
            plan = cls(**{**values, "curve": curve})
            checks = [isinstance(plan.chosen, int) and 0 <= plan.chosen < len(curve), isinstance(plan.neurons, dict)]
            for point in curve:
                checks += [count <= len(plan.neurons[n][_key(rank)]) for n, (rank, count) in point.choices.items()]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"This is no collapse plan: {type(error).__name__} {error}.") from error
        if not all(checks):
            raise ValueError("This is no collapse plan: its choices do not fit together.")
        return plan

    def save(self, path):
        """Writes the plan as JSON."""
        beside = f"{os.fspath(path)}.tmp"
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=1)
            file.write("\n")
        os.replace(beside, path)

    @classmethod
    def load(cls, path) -> "CollapsePlan":
        """Reads what `save` wrote.

        Raises:
            ValueError: The file holds no plan.
        """
        with open(path, encoding="utf-8") as file:
            try:
                values = json.load(file)
            except json.JSONDecodeError as error:
                raise ValueError(f"{os.fspath(path)} is not JSON: {error}.") from error
        return cls.from_dict(values)

    def __str__(self):
        rows = [["plan", "parameters", "FFN MACs/token", self.score_name, "blocks collapsed"]]
        for index, point in enumerate(self.curve):
            mark = "*" if index == self.chosen else ""
            rows.append(
                [
                    f"{index}{mark}",
                    f"{point.parameters:,}",
                    f"{point.macs:,}",
                    f"{point.score:.4f}",
                    str(len(point.choices)),
                ]
            )
        chosen = [["block", "rank", "kept neurons"]]
        for name, (rank, count) in self.point.choices.items():
            chosen.append([name, "full" if rank is None else str(rank), str(count)])
        lines = [table(rows), "", table(chosen)]
        if self.latency is not None:
            lines.append(f"measured time, as a share of the dense model's: {self.latency:.3f}")
        return "\n".join(lines)


def _key(rank):
    return "full" if rank is None else str(rank)


def weights_fingerprint(model) -> str:
    """A hash of a sample of every parameter: equal for equal weights, whatever device they are on."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        stride = max(1, values.numel() // 256)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values[::stride].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


# ----------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------


class _Score:
    """A number per model, lower is better; `sign` turns a metric into one."""

    def __init__(self, model, inner, data, metric):
        self.model, self.inner, self.data, self.metric = model, inner, data, metric
        self.sign = 1.0 if metric is None else -1.0
        self.reference = None
        causal = type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        first = next(iter(data), None)
        if first is None:
            raise ValueError("There is no batch to score plans on.")
        self.label = causal and "labels" not in first and "input_ids" in first
        if metric is not None:
            self.name = "metric"
        elif self.label or "labels" in first:
            self.name = "loss"
        else:
            self.name = "divergence"

    def __call__(self) -> float:
        """The score as the user reads it: a metric is higher for better."""
        if self.metric is not None:
            value = float(self.metric(self.model))
        elif self.name == "loss":
            value = self._loss()
        else:
            value = self._divergence()
        if not math.isfinite(value):
            raise ValueError(f"The {self.name} of the model on the data that plans are scored on is {value}.")
        return value

    def _loss(self):
        total = weight = 0.0

        def hook(module, args, kwargs, output):
            nonlocal total, weight
            labels = kwargs["labels"]
            # What the loss is the mean of: all that is not masked out; a causal model predicts no first token.
            count = float(((labels[:, 1:] if self.label else labels) != -100).sum()) or 1.0
            total, weight = total + float(output.loss) * count, weight + count

        handle = self.model.register_forward_hook(hook, with_kwargs=True)
        run_over(self.model, self._labelled(), [handle], "Scoring")
        return total / weight

    def _labelled(self):
        for batch in self.data:
            batch = dict(batch)
            if self.label:
                labels = batch["input_ids"]
                mask = batch.get("attention_mask")
                batch["labels"] = labels if mask is None else labels.masked_fill(mask == 0, -100)
            yield batch

    def _divergence(self):
        outputs = []

        def hook(module, args, output):
            value = output["logits"] if "logits" in output else output[0]
            outputs.append(value.detach().float().cpu())

        run_over(self.model, self.data, [self.model.register_forward_hook(hook)], "Scoring")
        if self.reference is None:
            self.reference = outputs
        total = weight = 0.0
        for now, dense in zip(outputs, self.reference, strict=True):
            rows = math.prod(dense.shape[:-1])
            total += rows * float(
                torch.nn.functional.kl_div(
                    now.log_softmax(-1).flatten(0, -2),
                    dense.log_softmax(-1).flatten(0, -2),
                    log_target=True,
                    reduction="batchmean",
                )
            )
            weight += rows
        return total / weight


class _Part:
    """Every fourth batch of the data, or all others."""

    def __init__(self, data, scored):
        self.data, self.scored = data, scored

    def __iter__(self):
        for index, batch in enumerate(self.data):
            if (index % 4 == 3) == self.scored:
                yield batch


def _split(calibration_data, evaluation_data):
    data = reiterable(calibration_data)
    if evaluation_data is not None:
        return data, reiterable(evaluation_data)
    parts = _Part(data, False), _Part(data, True)
    if next(iter(parts[1]), None) is None:
        raise ValueError(
            "Plans are scored on every fourth batch of the calibration data, and there are fewer than four: pass more "
            "batches, or `evaluation_data`."
        )
    return parts


# ----------------------------------------------------------------------------------------------------
# The linearity map
# ----------------------------------------------------------------------------------------------------


def linearity_map(
    model, calibration_data, blocks="all", evaluation_data=None, metric: Callable | None = None, token_mask_fn=None
) -> LinearityMap:
    """How linear each block is, and what the model loses if it alone becomes its least-squares map. Changes nothing.

    Args:
        model (`nn.Module`): A dense or patched model; a PeftModel or compiled model is looked through.
        calibration_data (iterable of `dict[str, Tensor]`): Model inputs; with labels the score is the model's loss, a
            causal language model needs none, and otherwise it is the divergence from the model's own outputs.
        blocks: As in [`LayerCollapseConfig`].
        evaluation_data (*optional*): What to score on. Default: every fourth batch, which is then not fitted to.
        metric (`Callable`, *optional*): `metric(model) -> float`, higher is better, in place of the loss.

    Raises:
        ValueError: There is too little data, or nothing to collapse.
    """
    inner, _ = unwrap(model)
    chosen = _candidates(inner, blocks)
    fitting, scoring = _split(calibration_data, evaluation_data)
    score = _Score(model, inner, scoring, metric)
    before = score()
    moments = collect_moments(model, inner, chosen, fitting, token_mask_fn=token_mask_fn)
    rows = []
    for block in tqdm(chosen, desc="Measuring blocks", leave=False):
        merge = make_merge(block, modules_of(inner, block), moments[block.name].fit(), refit=True)
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
    chosen = [block for block in select_blocks(blocks, selector, refused) if block.state != "collapsed"]
    if not chosen:
        raise ValueError("All chosen blocks are collapsed already.")
    check_weights(inner, chosen, merging=True)
    return chosen


# ----------------------------------------------------------------------------------------------------
# Plans
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Option:
    """One size of one block."""

    rank: int | None
    count: int
    cost: int
    residual: float


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
        evaluation_data (*optional*): What to score on. Default: every fourth batch, which is then not fitted to. Take
            neither from what the result is to be tested on.
        blocks: As in [`LayerCollapseConfig`].
        levels (`Sequence[float]`): Shares of a block's weights to choose from.
        rank_shares (`Sequence[float | None]`): Ranks to choose from, as shares of the input width; `None`: full.
        points (`Sequence[float]`, *optional*): Shares of the feed-forward MACs at which the curve is measured, each
            in (0, 1); between them steps are taken on expectation, which each measurement corrects. For models with
            many blocks, where every measurement costs. Default: every step is measured.
        whole_curve (`bool`): Go on below the budget, to the smallest plan, so that `plan.at` can reach it.

    Raises:
        ValueError: There is not exactly one budget, too little data, or the budget cannot be met.
    """
    budget = _one_budget(parameters=parameters, macs=macs, latency=latency, max_drop=max_drop)
    if points is not None and (not points or not all(0 < share < 1 for share in points)):
        raise ValueError(f"`points` must be shares in (0, 1), got {list(points)}.")
    inner, _ = unwrap(model)
    chosen = _candidates(inner, blocks)
    if any(block.state == "patched" for block in find_feed_forward_blocks(inner)):
        raise ValueError("The model is patched; plans are for dense models. `remove_layer_collapse` takes it back.")
    fitting, scoring = _split(calibration_data, evaluation_data)
    score = _Score(model, inner, scoring, metric)
    moments = collect_moments(
        model, inner, chosen, fitting, _plan_neurons(model, inner, chosen, fitting, token_mask_fn), token_mask_fn
    )
    total = sum(parameter.numel() for parameter in inner.parameters())
    search = _Search(inner, chosen, moments, score, total, levels, rank_shares, points)
    del moments
    with search:
        for _ in search.steps():
            reached = _first_within(search.curve, budget, score.name) if "latency" not in budget else None
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
        index, measured = _within_latency(model, inner, search, next(iter(scoring)), budget["latency"])
    else:
        index = _first_within(search.curve, budget, score.name)
    if index is None:
        smallest = search.curve[-1]
        raise ValueError(
            f"The budget {budget} cannot be met: the smallest plan has {smallest.parameters:,} parameters and "
            f"{smallest.macs:,} feed-forward MACs per token ({smallest.parameters / total:.1%} and "
            f"{smallest.macs / search.curve[0].macs:.1%} of the dense model's)"
            + (f", and takes {measured:.3f} of its time." if measured is not None else ".")
        )
    return CollapsePlan(
        weights_fingerprint(inner), score.name, budget, search.neurons, search.curve, index, latency=measured
    )


def _one_budget(**budgets):
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"Exactly one budget of {', '.join(budgets)} is needed, got {sorted(given) or 'none'}.")
    ((name, value),) = given.items()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"`{name}` must be a number, got {value!r}.")
    whole = isinstance(value, int) and name in ("parameters", "macs") and value > 1
    if not (whole or (0 <= value if name == "max_drop" else 0 < value < 1)):
        allowed = {"max_drop": ">= 0", "latency": "a share in (0, 1)"}.get(name, "a share in (0, 1) or a count")
        raise ValueError(f"`{name}` must be {allowed}, got {value}.")
    return given


def _first_within(curve, budget, score_name):
    """Index of the point with the best score (of the smallest, for a `max_drop`) within the budget, or `None`."""
    ((name, value),) = budget.items()
    sign = -1.0 if score_name == "metric" else 1.0
    if name == "max_drop":
        within = [i for i, point in enumerate(curve) if sign * (point.score - curve[0].score) <= value]
        return max(within, key=lambda i: -curve[i].parameters)
    limit = value if value > 1 else value * getattr(curve[0], name)
    within = [i for i, point in enumerate(curve) if getattr(point, name) <= limit]
    return min(within, key=lambda i: sign * curve[i].score) if within else None


def _plan_neurons(model, inner, blocks, data, token_mask_fn):
    """Block name -> candidate neurons: all, or as many as `PLAN_FEATURES` allows."""
    room = {block.name: max(64, PLAN_FEATURES - block.in_features) for block in blocks}
    large = [block for block in blocks if block.hidden_features > room[block.name]]
    scores = score_neurons(model, inner, large, data, token_mask_fn) if large else {}
    return {
        block.name: sorted(scores[block.name].topk(room[block.name]).indices.tolist())
        if block.name in scores
        else list(range(block.hidden_features))
        for block in blocks
    }


class _Search:
    """The greedy walk from the dense model to the smallest plan; on exit the model is as it was."""

    def __init__(self, inner, blocks, moments, score, total, levels, rank_shares, points):
        self.inner, self.blocks, self.score, self.total = inner, {block.name: block for block in blocks}, score, total
        self.neurons, self.options, self.merges = {}, {}, {}
        for block in tqdm(blocks, desc="Fitting", leave=False):
            self._prepare(block, moments[block.name], levels, rank_shares)
        self.state = dict.fromkeys(self.blocks)
        self.trials = {name: Trial(inner) for name in self.blocks}
        self.sensitivity = {}
        self.dense_macs = sum(block.macs for block in find_feed_forward_blocks(inner))
        self.curve = []
        self.points = None if points is None else [share * self.dense_macs for share in sorted(points, reverse=True)]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for trial in self.trials.values():
            trial.undo()

    def _prepare(self, block, moments, levels, rank_shares):
        """The best option of a block at each level, and its merge."""
        width, positions = block.in_features, {}
        parts = modules_of(self.inner, block)
        found = {}
        ranks = {effective_rank(block, None if s is None else round(s * width)) for s in rank_shares}
        per_neuron = cost_of(block, 0, 1)
        for rank in sorted(ranks, key=lambda rank: math.inf if rank is None else rank):
            base = cost_of(block, rank, 0)
            counts = {int((level * block.macs - base) // per_neuron) for level in levels}
            if rank is None:
                counts.add(0)
            counts = sorted(count for count in counts if count > 0 or (count == 0 and rank != 0))
            counts = [count for count in counts if count <= len(moments.neurons)]
            if not counts:
                continue
            given = None
            if rank is not None:
                given = functional.reduced_rank(moments.cov_ff[:width, :width], moments.cov_fo[:width], width, rank)[1]
            order = functional.greedy_neurons(moments.cov_ff, moments.cov_fo, width, counts[-1], given)
            positions[rank] = order
            for count in counts:
                fit = moments.restricted(order[:count]).fit(rank)
                cost = cost_of(block, rank, count)
                found[cost, rank, count] = _Option(rank, count, cost, 1 - fit.r2), fit
        # A size is worth having if nothing smaller is as good.
        best = math.inf
        options = []
        for _, (option, fit) in sorted(found.items(), key=lambda item: (item[1][0].cost, item[1][0].residual)):
            if option.cost < block.macs and option.residual < best:
                best = option.residual
                options.append(option)
                self.merges[block.name, option.rank, option.count] = make_merge(block, parts, fit, refit=True)
        self.options[block.name] = sorted(options, key=lambda option: -option.cost)
        self.neurons[block.name] = {
            _key(rank): [moments.neurons[p] for p in order] for rank, order in positions.items()
        }

    def _set(self, name, option):
        self.trials[name].undo()
        if option is not None:
            self.trials[name].put(self.merges[name, option.rank, option.count])

    def _record(self, score):
        choices = {name: (option.rank, option.count) for name, option in self.state.items() if option is not None}
        saved_macs = saved = 0
        for name, (rank, count) in choices.items():
            report = self.merges[name, rank, count].report
            saved += report.parameters_before - report.parameters_after
            saved_macs += report.macs_before - report.macs_after
        self.curve.append(PlanPoint(choices, self.total - saved, self.dense_macs - saved_macs, score))

    def _now(self, name):
        option = self.state[name]
        return (self.blocks[name].macs, 0.0) if option is None else (option.cost, option.residual)

    def _moves(self):
        """`(expected change of the score per weight saved, block, option)`, best first; one move a block."""
        moves = []
        for name, options in self.options.items():
            cost, residual = self._now(name)
            reachable = [option for option in options if option.cost < cost]
            if reachable:
                # The next size down, or one further if the way there is flat.
                worth = [
                    (max(o.residual - residual, 1e-12) * self.sensitivity[name] / (cost - o.cost), o.cost, o)
                    for o in reachable[:3]
                ]
                rate, _, option = min(worth, key=lambda item: item[:2])
                moves.append((rate, name, option))
        return sorted(moves, key=lambda move: move[:2])

    def steps(self):
        """Walks; every step is a new point of the curve."""
        base = self.score()
        self._record(base)
        for name, options in tqdm(self.options.items(), desc="Measuring blocks", leave=False):
            if options:
                option = options[-1]
                self._set(name, option)
                self.sensitivity[name] = self._rate(self.score() - base, option.residual)
                self._set(name, None)
        with tqdm(total=self.points and len(self.points), desc="Planning", leave=False) as progress:
            for _ in self._every_step(base) if self.points is None else self._to_points(base):
                progress.update()
                yield

    def _every_step(self, current):
        while moves := self._moves():
            tried = []
            for rate, name, option in moves[:MEASURED_PER_STEP]:
                if tried and rate >= min(tried)[0]:
                    break
                self._set(name, option)
                value = self.score()
                self._set(name, self.state[name])
                cost, residual = self._now(name)
                change = self.score.sign * (value - current)
                self.sensitivity[name] = (
                    self.sensitivity[name] + self._rate(value - current, option.residual - residual)
                ) / 2
                tried.append((change / (cost - option.cost), name, option.cost, option, value))
            _, name, _, option, current = min(tried, key=lambda item: item[:3])
            self.state[name] = option
            self._set(name, option)
            self._record(current)
            yield

    def _to_points(self, current):
        for point in self.points:
            moved, expected = set(), 0.0
            while self._macs() > point and (moves := self._moves()):
                rate, name, option = moves[0]
                expected += rate * (self._now(name)[0] - option.cost)
                self.state[name] = option
                moved.add(name)
            if not moved:
                continue
            for name in moved:
                self._set(name, self.state[name])
            value = self.score()
            ratio = self.score.sign * (value - current) / expected
            for name in moved:
                self.sensitivity[name] *= min(max(ratio, 1 / MOST_CORRECTED), MOST_CORRECTED)
            current = value
            self._record(current)
            yield

    def _macs(self):
        return self.dense_macs - sum(block.macs - self._now(name)[0] for name, block in self.blocks.items())

    def _rate(self, change, residual):
        return max(self.score.sign * change, 1e-6) / max(residual, 1e-9)


def _within_latency(model, inner, search, batch, share):
    """`(index on the curve, measured share)`: the largest plan that is fast enough, by bisection."""
    device = next(inner.parameters()).device
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    dense = copy.deepcopy(inner)

    def measure(index):
        with search:
            for name, (rank, count) in search.curve[index].choices.items():
                search.trials[name].put(search.merges[name, rank, count])
            result = compare_latency({"dense": dense, "plan": inner}, batch, rounds=10, warmup=2, progress=False)
        return result["plan"].ratio

    low, high = 0, len(search.curve) - 1
    best = measure(high)
    if best > share:
        return None, best
    while high - low > 1:
        middle = (low + high) // 2
        ratio = measure(middle)
        if ratio <= share:
            high, best = middle, ratio
        else:
            low = middle
    return high, best
