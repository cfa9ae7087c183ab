"""The blocks of the model that a Trainer holds: patching them, which of them train, are ready, have collapsed."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_compiled_module
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .blocks import bind_blocks
from .config import LayerCollapseConfig
from .families import FeedForwardBlock, find_feed_forward_blocks
from .modeling_layercollapse import CollapsibleActivation, has_own_adapters
from .models import is_peft_model, unwrap
from .neuron_budget import refuse_neuron_budget
from .optimization import budget_progress
from .outcomes import Outcome, outcome_of
from .patching import collapsible_activations, in_use_of, patch_or_check, tables_of


if TYPE_CHECKING:
    from .trainer import LayerCollapseTrainerMixin


# In logs.
READY_BLOCKS = "layer_collapse/ready_blocks"


@dataclass(frozen=True)
class Place:
    """Where the activation of a patched block stands.

    Args:
        block ([`FeedForwardBlock`]): As it was found.
        linears (`tuple[nn.Module, ...]`): Those of the block.
    """

    block: FeedForwardBlock
    linears: tuple[nn.Module, ...]


def places_of(model: nn.Module) -> dict[nn.Module, Place]:
    """Activation -> [`Place`], for each patched block of a model."""
    places: dict[nn.Module, Place] = {}
    for block in bind_blocks(model):
        # Without its modules, of which one is the key.
        described = {field.name: getattr(block, field.name) for field in fields(FeedForwardBlock)}
        place = Place(FeedForwardBlock(**described), tuple(block.linears.values()))
        places |= dict.fromkeys(block.collapsible, place)
    return places


def activations_in_use(model: nn.Module, places: Mapping[nn.Module, Place]) -> dict[str, CollapsibleActivation]:
    """Block index, as in [`find_feed_forward_blocks`], -> the activation in use; under its own name one that stands in
    no block that was found."""
    of_blocks: dict[str, dict[str, CollapsibleActivation]] = {}
    for name, module in collapsible_activations(model).items():
        place = places.get(module)
        of_blocks.setdefault(name if place is None else str(place.block.index), {})[name] = module
    in_use = {index: in_use_of(found) for index, found in of_blocks.items()}
    return {index: module for index, module in in_use.items() if module is not None}


def ready_blocks(outcomes: Collection[Outcome], config: LayerCollapseConfig, progress: float) -> float:
    """How many blocks of a model in training are ready: one with an alpha per neuron by the share of those that merge.
    With a budget, to which alphas have come so far in [0, 1], all are, once it is met.
    """
    if config.budget is not None:
        return len(outcomes) if progress >= 1 else 0
    return sum(outcome.share for outcome in outcomes)


class TrainedBlocks:
    """What the other parts of a Trainer ask of its model's blocks, which may be another model's at each call.

    Args:
        trainer ([`LayerCollapseTrainerMixin`]): Has the model, and the options in `layer_collapse_config`.
        calibration_data (iterable of `dict[str, Tensor]`, *optional*): For `linear_target="affine"`.
    """

    def __init__(self, trainer: LayerCollapseTrainerMixin, calibration_data: Iterable[Any] | None = None) -> None:
        self._trainer: Any = trainer  # whose attributes upstream lets be None until it is set up
        self._calibration_data = calibration_data
        self._places: weakref.WeakKeyDictionary[nn.Module, Place] = weakref.WeakKeyDictionary()
        self._collapsed: int | None = None  # how many, once they were counted

    def patch(self, model: nn.Module) -> None:
        """Patches a model, or checks that it is patched, as the Trainer's options say."""
        self.changed()
        refuse_neuron_budget(model, self._trainer.layer_collapse_config)
        patch_or_check(model, self._trainer.layer_collapse_config, self._calibration_data)

    def changed(self) -> None:
        """To be called when blocks were exchanged."""
        self._collapsed = None

    def tables(self) -> dict[str, dict]:
        """Replacement tables of the model; see [`tables_of`]."""
        return tables_of(unwrap(self._trainer.model, sharded=True)[0])

    def trainable_alphas(self) -> list[nn.Parameter]:
        """Those that a step is to move now."""
        # peft's `modules_to_save` keeps a frozen copy of each.
        alphas = {id(module.alpha): module.alpha for module in collapsible_activations(self._trainer.model).values()}
        return [alpha for alpha in alphas.values() if alpha.requires_grad]

    def alphas_beside_adapters(self) -> dict[str, nn.Parameter]:
        """Name -> alpha, for those that train under a PeftModel that does not save them."""
        return _outside_adapters(self._trainer.model) if unwrap(self._trainer.model, sharded=True)[1] else {}

    def activations(self) -> dict[str, CollapsibleActivation]:
        """Block index, as in [`find_feed_forward_blocks`], -> the activation in use."""
        if not all(module in self._places for module in collapsible_activations(self._trainer.model).values()):
            self._places.update(places_of(unwrap(self._trainer.model, sharded=True)[0]))
        return activations_in_use(self._trainer.model, self._places)

    def place(self, activation: CollapsibleActivation) -> Place:
        """Where one of the activations in use stands.

        Raises:
            ValueError: Its block is none any more.
        """
        place = self._places.get(activation)
        if place is None:
            raise ValueError(
                "The model has an alpha in a block whose code is not its own any more: something put a forward in its "
                "place, as fused kernels do. Load the model without that, or leave the block out of `blocks`."
            )
        return place

    def outcomes(self) -> dict[str, Outcome]:
        """Block index -> what [`collapse_model`] would make of it now: with a budget nothing until that is met."""
        config, activations = self._trainer.layer_collapse_config, self.activations()
        if config.budget is not None and self._progress() < 1:
            return {index: Outcome.of_one_that_waits(module) for index, module in activations.items()}
        return {index: outcome_of(self.place(module).block, module, config) for index, module in activations.items()}

    def count_ready(self) -> float:
        """With those that were ready before, and are collapsed since."""
        outcomes = self.outcomes().values()
        return ready_blocks(outcomes, self._trainer.layer_collapse_config, self._progress()) + self.count_collapsed()

    def _progress(self) -> float:
        """To a budget."""
        state = self._trainer.state
        return budget_progress(self._trainer.layer_collapse_config, state.global_step, state.max_steps)

    def count_collapsed(self) -> int:
        """Blocks that a progressive run has collapsed."""
        if not self._trainer.layer_collapse_config.progressive:
            return 0
        if self._collapsed is None:
            blocks = find_feed_forward_blocks(self._trainer.model)
            self._collapsed = sum(block.state == "collapsed" for block in blocks)
        return self._collapsed


def saves_adapters_alone(model: nn.Module) -> bool:
    """Whether a save of a model holds its adapters, peft's or those that transformers put in, and nothing of what they
    are on."""
    inner, wrappers = unwrap(model, sharded=True)
    return any(map(is_peft_model, wrappers)) or (isinstance(inner, PreTrainedModel) and has_own_adapters(inner))


def alphas_lost_in_saves(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> alpha, for those that train under adapters with which they are not saved."""
    return _outside_adapters(model) if saves_adapters_alone(model) else {}


def _outside_adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    activations = collapsible_activations(model).items()
    return {
        name: module.alpha
        for name, module in activations
        if module.alpha.requires_grad and ".modules_to_save." not in name
    }


def forget_base(model: nn.Module, only: str | None = None) -> None:
    """Adapters name their base once they are saved; that base is not what they are on."""
    inner, wrappers = unwrap(model, sharded=True)
    if only is None:
        inner.name_or_path = inner.config.name_or_path = ""
    holders = [wrapper for wrapper in wrappers if not is_compiled_module(wrapper)]
    for holder in [*holders, inner] if has_own_adapters(inner) else holders:
        for adapter in holder.peft_config.values():
            if only in (None, adapter.base_model_name_or_path):
                adapter.base_model_name_or_path = None
