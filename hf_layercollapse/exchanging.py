"""Parameters of a Trainer's model that are exchanged while it has an optimizer: all that holds them follows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .alpha_training import AlphaTraining
from .blocks import BoundBlock, bind_blocks
from .models import shorten
from .optimization import exchange_parameters, plain_optimizer, refuse_other_optimizer
from .patching import alpha_parameters
from .restoring import structure_restored_on_error
from .trained_blocks import TrainedBlocks
from .upstream import prepared_models


if TYPE_CHECKING:
    from .trainer import LayerCollapseTrainerMixin


class Exchanging(TrainerCallback):
    """Takes what holds parameters of a Trainer's model along when they are exchanged. As a callback it sees whether an
    optimizer has lost some.

    Args:
        trainer ([`LayerCollapseTrainerMixin`]): Has the model, the optimizer and the wrapper.
        blocks ([`TrainedBlocks`]): Of the model.
        alphas ([`AlphaTraining`]): Those that are left are told to it.
    """

    def __init__(self, trainer: LayerCollapseTrainerMixin, blocks: TrainedBlocks, alphas: AlphaTraining) -> None:
        self._trainer: Any = trainer
        self._blocks, self._alphas = blocks, alphas
        self._held_all = False  # of the blocks' parameters, an optimizer that the Trainer was given

    def look_at_optimizer(self) -> None:
        """To be called once the Trainer has what it was given."""
        optimizer = self._trainer.optimizer
        self._held_all = optimizer is not None and not _left_out(self._trainer.model, optimizer)

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """In which modules of the model are replaced. On exit the optimizer holds the parameters that are there then,
        in the groups of those that they take the place of; and so does what steps alphas, and what reduces gradients.
        If what is done inside raises, the model is as it was, but for what its weights hold.

        Raises:
            ValueError: The optimizer holds no parameter of the model, and could not follow. Before anything is done.
        """
        trainer = self._trainer
        before = dict(trainer.model.named_parameters())
        if trainer.optimizer is not None:
            refuse_other_optimizer(trainer.optimizer, before)
        with structure_restored_on_error(trainer.model):
            try:
                yield
            finally:
                self._blocks.changed()
            if trainer.optimizer is not None:
                exchange_parameters(trainer.optimizer, before, dict(trainer.model.named_parameters()))
        self._alphas.exchanged()
        if isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel):
            # It reduces the parameters that it was made with. A new one takes its place, in `wrapper_of_now`.
            prepared_models(trainer.accelerator).remove(trainer.model)
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
            trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        # Engines that shard exchange parameters by themselves, and what they optimize are parts.
        if not self._held_all or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return
        lost = _left_out(trainer.model, trainer.optimizer)
        if lost:
            raise RuntimeError(
                f"Training begins with {len(lost)} parameters of blocks that no step would reach: {shorten(lost)}. "
                "The optimizer that this Trainer was given held those of all blocks, and modules have been replaced "
                "since without a word to it. Collapse with `trainer.collapse()`, tell the optimizer "
                "(`exchange_parameters`), or replace modules before the optimizer and the Trainer are made."
            )


def _left_out(model: Any, optimizer: Optimizer) -> list[str]:
    """Names of the trainable parameters of a model's blocks that are in no group of an optimizer. Alphas may be
    stepped by other means."""
    groups = plain_optimizer(optimizer).param_groups
    known = {id(parameter) for group in groups for parameter in group["params"]}
    known |= {id(alpha) for alpha in alpha_parameters(model)}
    return [
        name
        for block in bind_blocks(model)
        for name, parameter in _parameters_of(block).items()
        if parameter.requires_grad and id(parameter) not in known
    ]


def _parameters_of(block: BoundBlock) -> dict[str, nn.Parameter]:
    """Name -> parameter of a block's linears, where a collapse has left them, and of its activation."""
    parts = {path: part for path, part in block.linears.items() if part is not None}
    if block.activation is not None:
        parts[block.layout.activation_path] = block.activation
    return {
        f"{block.path(path)}.{name}": parameter
        for path, part in parts.items()
        for name, parameter in part.named_parameters()
    }
