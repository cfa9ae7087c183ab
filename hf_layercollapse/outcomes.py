"""What a collapse makes of a patched block, by its alphas: asked by the collapse itself, and by all that speaks of it
before: evaluation as if it had been done, the count of ready blocks, the choice of the best checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from . import functional
from .config import LayerCollapseConfig
from .merging import BlockChoice, cost_of, ready_neurons
from .modeling_layercollapse import CollapsibleActivation


if TYPE_CHECKING:
    from .families import FeedForwardBlock


@dataclass(frozen=True)
class Outcome:
    """What becomes of a patched block.

    Args:
        name (`str`): `"collapsed"`; or, of one that is not ready, `"kept"` or `"restored"`.
        to_one (`torch.Tensor`): Which of its alphas are as if they were 1 then, `bool` of the shape of alpha: none
            unless it collapses, and with one alpha per neuron those that are ready.
    """

    name: str
    to_one: torch.Tensor

    @classmethod
    def of_one_that_waits(cls, activation: CollapsibleActivation, name: str = "kept") -> Outcome:
        """Of a block none of whose alphas goes to 1."""
        return cls(name, torch.zeros_like(activation.alpha, dtype=torch.bool))

    @property
    def collapses(self) -> bool:
        return self.name == "collapsed"

    @property
    def is_whole(self) -> bool:
        """Whether it collapses with all of its neurons."""
        return bool(self.to_one.all())

    @property
    def share(self) -> float:
        """Of its neurons, of those that merge: 1 of a block that is ready with all of them."""
        return int(self.is_whole) if self.to_one.numel() == 1 else float(functional.wide(self.to_one).mean())


def outcome_of(block: FeedForwardBlock, activation: CollapsibleActivation, options: LayerCollapseConfig) -> Outcome:
    """The [`Outcome`] of a patched block.

    It collapses once its alpha has reached the threshold; with one alpha per neuron once merging those that have makes
    it smaller.

    Args:
        block ([`FeedForwardBlock`]): Which.
        activation ([`CollapsibleActivation`]): Its own, which trains.
        options ([`LayerCollapseConfig`]): `collapse_threshold`, `not_ready`, `rank` and `budget` are used.
    """
    ready = ready_neurons(activation.alpha, options.collapse_threshold)
    if bool(ready.all()) or (activation.granularity == "neuron" and _is_smaller(block, activation, options)):
        return Outcome("collapsed", ready)
    # A budget takes nothing of a block whose alphas are all 0.
    untouched = options.budget is not None and not activation.alpha.any()
    restored = untouched or options.not_ready == "restore"
    return Outcome.of_one_that_waits(activation, "restored" if restored else "kept")


def _is_smaller(block: FeedForwardBlock, activation: CollapsibleActivation, options: LayerCollapseConfig) -> bool:
    choice = choice_of_neurons(activation, options)
    return cost_of(block, choice.rank, choice.count) < block.macs


def choice_of_neurons(activation: CollapsibleActivation, options: LayerCollapseConfig) -> BlockChoice:
    """What a block with one alpha per neuron becomes: those that are not ready stay."""
    waiting = (~ready_neurons(activation.alpha, options.collapse_threshold)).nonzero().flatten().tolist()
    if activation.leaves_constant:
        return BlockChoice(0, waiting, dropped=not waiting)
    return BlockChoice(options.rank, waiting)
