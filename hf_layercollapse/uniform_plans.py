"""Plans in which all blocks have one hidden width: the native architecture, with a smaller number in its config."""

from . import functional
from .families import modules_of
from .merging import Trial, cost_of, has_constant, make_merge
from .plans import PlanPoint, key_of
from .widths import check_native


class UniformSearch:
    """The model at one width after another; on exit it is as it was.

    Every block keeps as many neurons as its width says, and which ones is chosen for each block. Where several fields
    of a config set widths (an encoder's and a decoder's), each gets the same share of its own.

    Args:
        inner (`PreTrainedModel`): The model.
        groups (`list[WidthGroup]`): Its blocks.
        moments (`dict[str, BlockMoments]`): Of all their neurons.
        score ([`Score`]): What the points are measured by.
        total (`int`), macs (`int`): Parameters of the model, multiply-accumulates per token of its blocks.
        widths (`list[list[int]]`): What is measured after the model as it is: a width for each group.
        constant_term (`str`): As in [`LayerCollapseConfig`].
    """

    def __init__(self, inner, groups, moments, score, total, macs, widths, constant_term):
        self.inner, self.groups, self.score, self.total, self.macs = inner, groups, score, total, macs
        self.widths, self.curve = widths, []
        self.trials = {block.name: Trial(inner) for group in groups for block in group.blocks}
        self.moments, self.orders, self.neurons = {}, {}, {}
        for position, group in enumerate(groups):
            most = max(row[position] for row in widths)
            for block in group.blocks:
                found = moments[block.name]
                if not has_constant(modules_of(inner, block), 0, constant_term):
                    found = found.without_constant()
                nothing = found.cov_ff.new_zeros(0, found.width)
                order, _ = functional.greedy_neurons(
                    found.cov_ff, found.cov_fo, found.width, most, nothing, found.ridge
                )
                self.moments[block.name], self.orders[block.name] = found, order
                self.neurons[block.name] = {key_of(0): [found.neurons[position] for position in order]}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for trial in self.trials.values():
            trial.undo()

    def put(self, index):
        """Puts a point of the curve into the model."""
        for trial in self.trials.values():
            trial.undo()
        choices = self.curve[index].choices
        self._put({block: choices[block.name][1] for group in self.groups for block in group.blocks if choices})

    def _put(self, counts):
        """The merges, one for each block that becomes narrower; they stand in the model."""
        merges = []
        for block, count in counts.items():
            fit = self.moments[block.name].restricted(self.orders[block.name][:count]).fit(0, refine=0)
            merges.append(make_merge(block, modules_of(self.inner, block), fit, refit=True))
            self.trials[block.name].put(merges[-1])
        return merges

    def steps(self):
        """Measures; every step is a new point of the curve."""
        self.curve.append(PlanPoint({}, self.total, self.macs, self.score()))
        for row in self.widths:
            check_native(self.inner, self.groups, row)
            counts = counts_of(self.groups, row)
            with self:
                reports = [merge.report for merge in self._put(counts)]
                score = self.score()
            saved = sum(report.parameters_before - report.parameters_after for report in reports)
            saved_macs = sum(report.macs_before - report.macs_after for report in reports)
            choices = {block.name: (0, count) for block, count in counts.items()}
            self.curve.append(PlanPoint(choices, self.total - saved, self.macs - saved_macs, score))
            yield


def counts_of(groups, row):
    """Block -> the neurons that it keeps, at a width for each group. All blocks of a group that becomes narrower."""
    return {block: width for group, width in zip(groups, row, strict=True) for block in group.blocks}


def widths_at(groups, shares):
    """`[[width of each group]]` at these shares of the widths now, largest first, each once."""
    rows = [tuple(group.at(share) for group in groups) for share in sorted(shares, reverse=True)]
    return [list(row) for row in dict.fromkeys(rows)]


def widths_for(inner, groups, total, macs, budget, shares, constant_term):
    """`[[width of each group]]` that a search measures, largest first: at these shares of the widths now, and the
    largest that meets a budget of parameters or MACs."""
    rows = widths_at(groups, shares)
    if budget.keys() & {"parameters", "macs"}:
        rows.append(_widths_within(inner, groups, total, macs, budget, constant_term))
    return [list(row) for row in sorted({tuple(row) for row in rows}, reverse=True)]


def _widths_within(inner, groups, total, macs, budget, constant_term):
    """The largest widths that meet a budget of parameters or MACs.

    Args:
        total, macs (`int`): Of the whole model, and of its feed-forward blocks.
        budget (`dict`): As of a plan.

    Raises:
        ValueError: None do.
    """
    ((name, value),) = budget.items()
    whole = {"parameters": total, "macs": macs}[name]
    limit = value if value > 1 else value * whole
    shares = {step * group.step / group.width for group in groups for step in range(1, group.width // group.step + 1)}
    for row in widths_at(groups, shares):
        sizes = [_saved(inner, block, width, constant_term)[name] for block, width in counts_of(groups, row).items()]
        left = whole - sum(sizes)
        if left <= limit:
            return row
    raise ValueError(
        f"The budget {budget} cannot be met with one width for all blocks: at the smallest, {row[0]} neurons, "
        f"{left:,} {name} are left of {whole:,}. Take a larger budget or a smaller `multiple_of`."
    )


def _saved(inner, block, width, constant_term):
    """What a block saves at a width: `{"parameters": ..., "macs": ...}`."""
    parts = modules_of(inner, block)
    macs = block.macs - cost_of(block, 0, width)
    inputs = [linear for linear in (parts.up, parts.gate) if linear is not None and linear.bias is not None]
    bias = width * (2 if parts.layout.fused else 1) * len(inputs)
    bias += block.out_features if has_constant(parts, 0, constant_term) else 0
    return {"macs": macs, "parameters": block.parameters - cost_of(block, 0, width) - bias}
