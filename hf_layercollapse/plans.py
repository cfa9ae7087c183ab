"""Plans as data: points of a curve, budgets, a file that can be kept, and the weights that it is for."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from ._version import __version__
from .budgets import limit_of, one_budget
from .families import FeedForwardBlock
from .loss_metric import MetricReport
from .merging import BlockChoice
from .modeling_layercollapse import INSTALL_NEWER
from .models import written_beside
from .reports import DataReport
from .tables import table


PLAN_VERSION = 3


@dataclass(frozen=True)
class PlanPoint:
    """One plan of the curve.

    Args:
        choices (`dict[str, tuple[int | None, int]]`): Block name -> rank of its linear map (`None`: full) and number
            of neurons kept; `(0, 0)` is a block that is dropped. Blocks that are not named stay as they are.
        parameters (`int`): Of the whole model.
        macs (`int`): Multiply-accumulates per token in the feed-forward blocks.
        score (`float`, *optional*): Measured on the rows held aside, if it was.
        expected (`float`, *optional*): Expected loss: nats of KL divergence from the dense model a prediction, cosine
            distance for embeddings.
        name (`str`): How its sizes were chosen.
    """

    choices: dict[str, tuple[int | None, int]]
    parameters: int
    macs: int
    score: float | None
    expected: float | None = None
    name: str = "planned"


@dataclass(frozen=True)
class CollapsePlan:
    """Which blocks collapse, and how, with the plans for other sizes, and what it was compared with.

    It holds choices and scores, no weights: [`collapse_model`] fits them to data again. A plan is for one model, by
    its weights' fingerprint, and is refused for another.

    Args:
        fingerprint (`str`): Of the model's weights.
        score_name (`str`): `"divergence"` (from the dense model's predictions) or `"metric"`, of which more is better;
            `"loss"` in plans of before December 2026.
        budget (`dict`): What was asked for.
        neurons (`dict[str, dict[str, list[int]]]`): Block name -> rank (as text) -> neurons in the order of their use:
            who keeps `k` keeps the first `k`.
        curve (`list[PlanPoint]`): From the model as it is to the smallest plan.
        chosen (`int`): Index in the curve.
        latency (`float`, *optional*): Measured share of the dense model's time, where that was the budget.
        constant_term (`str`): Which blocks get one, as in [`LayerCollapseConfig`]; with version 1 all do.
        candidates (`list[PlanPoint]`): What was measured for the budget, the chosen one among them.
        seconds (`float`, *optional*): What making the plan took.
        metric ([`loss_metric.MetricReport`], *optional*): How it was measured what outputs matter; `None` in plans of
            version 2 and before.
        data ([`DataReport`], *optional*): What was read of the calibration data; `None` in plans of before December
            2026.
    """

    fingerprint: str
    score_name: str
    budget: dict
    neurons: dict[str, dict[str, list[int]]]
    curve: list[PlanPoint]
    chosen: int
    latency: float | None = None
    constant_term: str = "native"
    candidates: list[PlanPoint] = field(default_factory=list)
    seconds: float | None = None
    metric: MetricReport | None = None
    data: DataReport | None = None
    version: int = PLAN_VERSION
    made_by: str = field(default=f"hf_layercollapse {__version__}")

    @property
    def point(self) -> PlanPoint:
        """The chosen point of the curve."""
        return self.curve[self.chosen]

    @property
    def order(self) -> list[str]:
        """The blocks that the chosen point names, in the order in which they first shrink along the curve."""
        met = [name for point in self.curve[: self.chosen + 1] for name in point.choices]
        return [name for name in dict.fromkeys(met) if name in self.point.choices]

    def at(
        self, parameters: float | None = None, macs: float | None = None, max_drop: float | None = None
    ) -> "CollapsePlan":
        """The same plan at another point of its curve, without measuring anything again.

        Args:
            parameters, macs, max_drop: One budget, as in [`plan_collapse`].

        Raises:
            ValueError: Not exactly one is given, or no point of the curve meets it.
        """
        budget = one_budget(parameters=parameters, macs=macs, max_drop=max_drop)
        chosen = first_within(self.curve, budget, self.score_name)
        if chosen is None:
            raise ValueError(f"No point of this plan's curve meets {budget}; make a plan for it.")
        return dataclasses.replace(self, chosen=chosen, budget=budget, latency=None)

    def instead(self, name: str, parameters: float | None = None, macs: float | None = None) -> "CollapsePlan":
        """The same plan with one of those that it was compared with in the place of the chosen one: all blocks alike,
        say, as a control.

        Args:
            name (`str`): Of some of the `candidates`, as the printed plan has it, as `"width cut"` (neurons only, in
                every block the same share of its weights).
            parameters, macs: One budget of size, as in [`plan_collapse`]: the largest of that name within it. Those
                that were measured are of the plan's own size, and of its `points`.

        Raises:
            ValueError: Not exactly one budget is given, or no candidate of that name meets it.
        """
        budget = one_budget(parameters=parameters, macs=macs)
        ((unit, value),) = budget.items()
        limit = limit_of(value, getattr(self.curve[0], unit))
        found = [point for point in self.candidates if point.name == name and getattr(point, unit) <= limit]
        if not found:
            there = [f"{point.name!r} with {getattr(point, unit):,} {unit}" for point in self.candidates]
            raise ValueError(f"No candidate {name!r} of this plan meets {budget}; there are {', '.join(there)}.")
        point = max(found, key=lambda point: getattr(point, unit))
        curve = self.curve if point in self.curve else sorted([*self.curve, point], key=lambda point: -point.macs)
        return dataclasses.replace(self, curve=curve, chosen=curve.index(point), budget=budget, latency=None)

    def choices_for(self, inner: nn.Module, blocks: Sequence[FeedForwardBlock]) -> dict[str, BlockChoice]:
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
        widths = {block.name: block.hidden_features for block in blocks if block.can_collapse}
        unknown = sorted(self.point.choices.keys() - widths.keys())
        if unknown:
            raise ValueError(f"The plan names what is no block of this model that can collapse: {unknown}.")
        for name, (rank, _) in self.point.choices.items():
            if any(neuron >= widths[name] for neuron in self.neurons[name][key_of(rank)]):
                raise ValueError(f"The plan names neurons of {name} that there are none of: it has {widths[name]}.")
        in_metric = self.point.expected is not None
        return {
            name: BlockChoice(
                rank, sorted(self.neurons[name][key_of(rank)][:count]), in_metric, dropped=(rank, count) == (0, 0)
            )
            for name, (rank, count) in self.point.choices.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "CollapsePlan":
        """The inverse of `to_dict`.

        Raises:
            ValueError: It is no plan, or one of a newer version.
        """
        if not isinstance(values, dict) or not isinstance(values.get("version"), int):
            raise ValueError("This is no collapse plan: it has no version.")
        if values["version"] > PLAN_VERSION:
            raise ValueError(
                f"This plan has version {values['version']}, and this code reads versions up to {PLAN_VERSION}. "
                f"{INSTALL_NEWER}"
            )
        if values["version"] == 1 and "constant_term" not in values:
            values = {**values, "constant_term": "always", "version": PLAN_VERSION}
        names = {f.name for f in dataclasses.fields(cls)}
        required = names - {"latency", "made_by", "candidates", "seconds", "metric", "data"}
        if values.keys() - names or required - values.keys():
            raise ValueError(
                f"This is no collapse plan: missing {sorted(required - values.keys())}, unknown "
                f"{sorted(values.keys() - names)}."
            )
        try:
            lists = {name: [_point_from(point) for point in values.get(name, [])] for name in ("curve", "candidates")}
            metric = None if values.get("metric") is None else MetricReport(**values["metric"])
            data = None if values.get("data") is None else DataReport(**values["data"])
            plan = cls(**{**values, **lists, "metric": metric, "data": data, "version": PLAN_VERSION})
            curve = plan.curve
            checks = [is_count(plan.chosen) and plan.chosen < len(curve), isinstance(plan.neurons, dict)]
            checks.append(plan.constant_term in ("native", "always"))
            orders = [order for by_rank in plan.neurons.values() for order in by_rank.values()]
            checks += [all(map(is_count, order)) and len(set(order)) == len(order) for order in orders]
            for point in [*curve, *plan.candidates]:
                checks.append(is_count(point.parameters) and is_count(point.macs))
                checks += [value is None or math.isfinite(value) for value in (point.score, point.expected)]
                for name, (rank, count) in point.choices.items():
                    checks.append((rank is None or is_count(rank)) and is_count(count))
                    checks.append(all(checks) and count <= len(plan.neurons[name][key_of(rank)]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"This is no collapse plan: {type(error).__name__} {error}.") from error
        if not all(checks):
            raise ValueError("This is no collapse plan: its choices do not fit together.")
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON."""
        with written_beside(path) as beside, open(beside, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=1)
            file.write("\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CollapsePlan":
        """Reads what `save` wrote.

        Raises:
            ValueError: The file holds no plan.
        """
        with open(path, encoding="utf-8") as file:
            try:
                values = json.load(file)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{os.fspath(path)} is not JSON: {error}.") from error
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def __str__(self) -> str:
        rows = [["plan", "parameters", "FFN MACs/token", "expected", self.score_name, "blocks collapsed"]]
        for index, point in enumerate(self.curve):
            mark = "*" if index == self.chosen else ""
            rows.append([f"{index}{mark}", f"{point.parameters:,}", f"{point.macs:,}", *_losses(point)])
            rows[-1].append(str(len(point.choices)))
        lines = [table(rows)]
        if len(self.candidates) > 1:
            compared = [["compared", "FFN MACs/token", "expected", self.score_name]]
            compared += [[point.name, f"{point.macs:,}", *_losses(point)] for point in self.candidates]
            lines += ["", table(compared)]
        chosen = [["block", "rank", "kept neurons"]]
        for name, (rank, count) in self.point.choices.items():
            chosen.append([name, "full" if rank is None else str(rank), str(count)])
        lines += ["", table(chosen)]
        if self.latency is not None:
            lines.append(f"measured time, as a share of the dense model's: {self.latency:.3f}")
        if self.metric is not None:
            lines.append(str(self.metric))
        if self.data is not None:
            lines.append(f"calibration data: {self.data}")
        return "\n".join(lines)


def _losses(point: PlanPoint) -> list[str]:
    return ["" if value is None else f"{value:.4f}" for value in (point.expected, point.score)]


def _point_from(values: dict[str, Any]) -> PlanPoint:
    """A [`PlanPoint`] from plain data."""
    choices = {name: (rank, count) for name, (rank, count) in values["choices"].items()}
    return PlanPoint(**{**values, "choices": choices})


def key_of(rank: int | None) -> str:
    return "full" if rank is None else str(rank)


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of a sample of every parameter: equal for equal weights, whatever device they are on."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        holder, _, own = name.rpartition(".")
        module = model.get_submodule(holder)
        # Offloaded weights are brought in, those of one module at a time.
        with align_module_device(module) if parameter.is_meta else contextlib.nullcontext():
            values = module.get_parameter(own).data
            # Quantized weights of some kinds are tensors of a class that knows no views.
            values = (values if type(values) is torch.Tensor else values.dequantize()).flatten()
            stride = max(1, values.numel() // 256)
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(values[::stride].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def first_within(curve: Sequence[PlanPoint], budget: Mapping[str, float], score_name: str) -> int | None:
    """Index of the largest point within a budget of size, of the smallest within a `max_drop`; `None` if none is.

    Of points that were not measured a drop is what is expected, where that is in the unit of the score.
    """
    ((name, value),) = budget.items()
    if name == "max_drop":
        within = [index for index, point in enumerate(curve) if _drop(point, curve[0], score_name) <= value]
        return max(within, key=lambda index: -curve[index].parameters)
    limit = limit_of(value, getattr(curve[0], name))
    within = [index for index, point in enumerate(curve) if getattr(point, name) <= limit]
    return max(within, key=lambda index: getattr(curve[index], name)) if within else None


def _drop(point: PlanPoint, dense: PlanPoint, score_name: str) -> float:
    if point.score is not None and dense.score is not None:
        return (-1.0 if score_name == "metric" else 1.0) * (point.score - dense.score)
    return point.expected if score_name == "divergence" and point.expected is not None else math.inf


def is_count(value: Any) -> bool:
    """Whether a value read from a file is an integer from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
