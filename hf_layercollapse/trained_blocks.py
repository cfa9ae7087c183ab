"""The blocks of the model that a Trainer holds: patching them, which of them train, are ready, have collapsed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_compiled_module
from torch import nn

from .blocks import bind_blocks
from .families import find_feed_forward_blocks
from .merging import is_ready
from .modeling_layercollapse import CollapsibleActivation, has_own_adapters
from .models import unwrap
from .neuron_budget import refuse_neuron_budget
from .optimization import budget_progress
from .patching import collapsible_activations, in_use_of, patch_or_check, tables_of


if TYPE_CHECKING:
    from .trainer import LayerCollapseTrainerMixin


class TrainedBlocks:
    """What the other parts of a Trainer ask of its model's blocks, which may be another model's at each call.

    Args:
        trainer ([`LayerCollapseTrainerMixin`]): Has the model, and the options in `layer_collapse_config`.
        calibration_data (iterable of `dict[str, Tensor]`, *optional*): For `linear_target="affine"`.
    """

    def __init__(self, trainer: LayerCollapseTrainerMixin, calibration_data: Iterable[Any] | None = None) -> None:
        self._trainer: Any = trainer  # whose attributes upstream lets be None until it is set up
        self._calibration_data = calibration_data
        # Activation -> index of its block.
        self._indices: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
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
        if not unwrap(self._trainer.model, sharded=True)[1]:
            return {}
        activations = collapsible_activations(self._trainer.model).items()
        return {
            name: module.alpha
            for name, module in activations
            if module.alpha.requires_grad and ".modules_to_save." not in name
        }

    def activations(self) -> dict[str, CollapsibleActivation]:
        """Block index, as in [`find_feed_forward_blocks`], -> the activation in use."""
        activations = collapsible_activations(self._trainer.model)
        if not all(module in self._indices for module in activations.values()):
            self._find_indices()
        of_blocks: dict[str, dict[str, CollapsibleActivation]] = {}
        for name, module in activations.items():
            of_blocks.setdefault(str(self._indices[module]), {})[name] = module
        in_use = {index: in_use_of(found) for index, found in of_blocks.items()}
        return {index: module for index, module in in_use.items() if module is not None}

    def _find_indices(self) -> None:
        inner = unwrap(self._trainer.model, sharded=True)[0]
        for block in bind_blocks(inner):
            if block.activation is not None and block.state != "collapsed":
                # Looks into peft's wrappers.
                parts = block.activation.modules()
                self._indices.update(dict.fromkeys(parts, block.index))

    def is_ready(self, activation: CollapsibleActivation) -> bool:
        return is_ready(activation.alpha, self._trainer.layer_collapse_config.collapse_threshold)

    def count_ready(self) -> int:
        """With those that were ready before, and are collapsed since. With a budget all are, once it is met."""
        config, state = self._trainer.layer_collapse_config, self._trainer.state
        if config.budget is not None:
            met = budget_progress(config, state.global_step, state.max_steps) >= 1
            return len(self.activations()) if met else 0
        return sum(map(self.is_ready, self.activations().values())) + self.count_collapsed()

    def count_collapsed(self) -> int:
        """Blocks that a progressive run has collapsed."""
        if not self._trainer.layer_collapse_config.progressive:
            return 0
        if self._collapsed is None:
            blocks = find_feed_forward_blocks(self._trainer.model)
            self._collapsed = sum(block.state == "collapsed" for block in blocks)
        return self._collapsed


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
