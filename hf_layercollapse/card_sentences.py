"""What a model card says in sentences: what blocks became, how, and of when its numbers are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._version import __version__
from .reports import BlockReport, CollapseReport


if TYPE_CHECKING:
    from .config import LayerCollapseConfig
    from .plans import CollapsePlan
    from .recovery import RecoveryReport


PAPER = "[arXiv 2311.17943](https://arxiv.org/abs/2311.17943)"

# What a block may have become -> what one did, and what several did.
FORMS = {
    "linear": ("is one linear map", "are one linear map each"),
    "linear and neurons": (
        "is a linear map with some of its neurons beside it",
        "are a linear map each, with some of their neurons beside it",
    ),
    "neurons": ("keeps some of its neurons", "keep some of their neurons"),
    "dropped": ("is dropped", "are dropped"),
}

# How weights were trained after blocks had collapsed -> of when the report's numbers are.
SINCE = {"recovery": "before recovery", "training": "before training", "progressive": "when it collapsed"}


@dataclass(frozen=True)
class Making:
    """How a model's blocks became what they are, as far as it is known.

    Args:
        forms (`list[str]`): Of each collapsed block, one of [`FORMS`].
        patched (`int`): Blocks that carry an alpha.
        report ([`CollapseReport`], *optional*): Of the collapse.
        config ([`LayerCollapseConfig`], *optional*): What the model has recorded of it.
        plan ([`CollapsePlan`], *optional*): By which blocks collapsed.
        recovery ([`RecoveryReport`], *optional*): Of what came after it.
        trained_since (`bool`): Whether weights were trained since in another way.
    """

    forms: list[str]
    patched: int = 0
    report: CollapseReport | None = None
    config: LayerCollapseConfig | None = None
    plan: CollapsePlan | None = None
    recovery: RecoveryReport | None = None
    trained_since: bool = False

    @property
    def reported(self) -> list[BlockReport]:
        """All blocks of the report."""
        return [] if self.report is None else self.report.blocks

    @property
    def collapsed(self) -> list[BlockReport]:
        """Those of the report that collapsed."""
        return [block for block in self.reported if block.outcome == "collapsed"]

    @property
    def by_penalty(self) -> bool:
        """Whether alphas were trained, as in LayerCollapse."""
        told = self.config is not None and self.config.budget is not None and not self.config.plans
        return bool(self.patched) or told or any(block.alpha is not None for block in self.reported)

    @property
    def planned_in_training(self) -> bool:
        """Whether a Trainer planned, and collapsed, before its first step."""
        return self.config is not None and self.config.plans

    @property
    def since(self) -> str | None:
        """How weights were trained after blocks had collapsed, one of [`SINCE`]; `None` where they were not."""
        if not self.forms:
            return None
        if self.config is not None and self.config.progressive:
            return "progressive"
        if self.trained_since or self.planned_in_training:
            return "training"
        return "recovery" if self.recovery is not None and self.recovery.best_step else None

    @property
    def moment(self) -> str:
        """Of when the report's numbers are, where that is not now; else nothing."""
        return SINCE.get(self.since or "", "")


def summary(making: Making) -> str:
    """What collapsed blocks became: what follows on a colon."""
    counts = {form: making.forms.count(form) for form in FORMS if form in making.forms}
    if len(counts) == 1:
        ((form, count),) = counts.items()
        return f"{'it' if count == 1 else 'each'} {FORMS[form][0]}"
    return ", ".join(f"{count} {FORMS[form][count > 1]}" for form, count in counts.items())


def method(making: Making) -> str:
    """Whose method it was."""
    if making.by_penalty:
        return f"The method is LayerCollapse ({PAPER}), as `hf_layercollapse` {__version__} implements it."
    if making.collapsed:
        return (
            f"`hf_layercollapse` {__version__} fitted them to data; the package is named after LayerCollapse "
            f"({PAPER}), which trains blocks to be linear instead."
        )
    return f"That was done with `hf_layercollapse`, which is named after LayerCollapse ({PAPER})."


def how(making: Making) -> list[str]:
    """How blocks became what they are, and of when what the report says of them is."""
    return [*_trained_to_collapse(making), *_chosen(making), *_made(making), *_afterwards(making)]


def _trained_to_collapse(making: Making) -> Iterable[str]:
    config = making.config
    if any(block.alpha is not None for block in making.reported):
        targets = {"affine": "each neuron's calibrated line", "constant": "each neuron's mean"}
        target = targets.get(config.linear_target if config else "", "the identity")
        yield (
            "Training drove each block's alpha, which blends its activation with a line "
            f"({target}), towards 1 with a penalty on `(1 - alpha)^2`."
        )
    if config is not None and config.budget is not None and not config.plans:
        yield (
            f"Alphas were told which neurons go to come to the budget `{config.budget}`: those that the loss depends "
            "on least."
        )


def _chosen(making: Making) -> Iterable[str]:
    if making.planned_in_training and making.config is not None:
        yield (
            f"A plan for the budget `{making.config.budget}`, made from inputs without labels before the first step "
            "of training, chose which blocks collapse, and how."
        )
    elif making.plan is not None:
        budget = ", ".join(f"{name}={value}" for name, value in making.plan.budget.items())
        yield f"A plan for the budget `{budget}` chose which blocks collapse, and how."


def _made(making: Making) -> Iterable[str]:
    methods = {
        method: [b for b in making.collapsed if b.method == method] for method in ("merged", "refit", "dropped")
    }
    if methods["merged"]:
        yield "Merged blocks are the product of their linears, with the activation taken as that line."
    if methods["refit"]:
        yield _fitted(methods["refit"], making)
    if methods["dropped"]:
        yield "Dropped blocks give a constant; one neuron of zeros keeps their place."
    if any(block.calibration_error is not None for block in making.collapsed):
        yield "R^2 and relative errors are estimates for other data of the kind, by generalised cross-validation."
    if any(block.error is not None and block.calibration_error is None for block in making.collapsed):
        others = "of merged blocks " if methods["refit"] else ""
        yield f"The relative error {others}is that on standard-normal inputs."


def _fitted(blocks: Sequence[BlockReport], making: Making) -> str:
    parts = ["the linear map"] if any(block.rank != 0 for block in blocks) else []
    parts += ["the output weights of the neurons that stay"] if any(block.kept_neurons for block in blocks) else []
    data = making.report.data if making.report is not None else None
    read = "" if data is None else f" ({data.distinct:,} rows, {data.tokens:,} tokens)"
    verb = "is" if parts == ["the linear map"] else "are"
    return (
        f"In refit blocks {' and '.join(parts)} {verb} the least-squares fit to what they computed on calibration "
        f"data{read}."
    )


def _afterwards(making: Making) -> Iterable[str]:
    if making.recovery is not None:
        yield _recovered(making.recovery)
    if making.since == "training":
        yield "Then the weights were trained on."
    if making.since == "progressive":
        yield "Blocks collapsed while training went on."
    if making.config is not None and making.config.distils:
        yield _taught(making.config)


def _recovered(recovery: RecoveryReport) -> str:
    if not recovery.best_step:
        return (
            f"A recovery of {recovery.steps} steps towards the dense model's predictions gained nothing on those held "
            "aside, and left the weights as they were."
        )
    return (
        f"Then the weights were trained for {recovery.steps} steps towards the dense model's predictions, without "
        f"labels, and those of step {recovery.best_step} kept: on {recovery.held_aside:,} predictions held aside "
        f"their divergence went from {recovery.before:.3g} to {recovery.after:.3g} {recovery.unit}."
    )


def _taught(config: LayerCollapseConfig) -> str:
    weights = [
        f"distillation weight {config.distillation_weight:g}",
        f"hidden state weight {config.hidden_state_weight:g}",
        f"temperature {config.temperature:g}",
    ]
    if config.task_loss_weight != 1:
        weights.append(f"weight of the task's own loss {config.task_loss_weight:g}")
    return f"Training had a teacher: {', '.join(weights)}."


def largest_difference(making: Making) -> str | None:
    """How far the model's first output changed, and when."""
    if making.report is None or making.report.largest_logit_difference is None:
        return None
    number = f"{making.report.largest_logit_difference:.3g}"
    if not making.moment:
        return f"The largest difference of an output on calibration data is {number}."
    if making.since == "progressive":
        return f"When the last ones collapsed, the largest difference of an output on calibration data was {number}."
    return f"{making.moment.capitalize()} the largest difference of an output on calibration data was {number}."
