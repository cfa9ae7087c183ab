"""A Trainer's alphas: taken over from its optimizer, stepped with the penalty, kept out of decay and clipping."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode
from transformers.utils import logging

from .alpha_gradients import AlphaGradients
from .neuron_budget import NeuronBudget, refuse_several_devices
from .optimization import (
    NO_TRAINABLE_ALPHA,
    AlphaSteps,
    AlphaStepsApart,
    TaskParameters,
    alpha_logs,
    budget_progress,
    penalty_strength_at,
    plain_optimizer,
    refuse_steps_in_backward,
)
from .patching import collapsible_activations
from .sharding import Sharding
from .trained_blocks import READY_BLOCKS, TrainedBlocks, alphas_lost_in_saves, forget_base
from .upstream import checkpointing_of


if TYPE_CHECKING:
    from .trainer import LayerCollapseTrainerMixin

logger = logging.get_logger(__name__)

COLLAPSED_BLOCKS = "layer_collapse/collapsed_blocks"


class AlphaTraining(TrainerCallback):
    """Drives the alphas of a Trainer, and accounts for the penalty. As a callback it is reached at points that no
    override of the Trainer's methods can lose.

    Args:
        trainer ([`LayerCollapseTrainerMixin`]): Has the optimizer, the state and the options.
        blocks ([`TrainedBlocks`]): Of its model.
        sharding ([`Sharding`]): Keeps alphas the same on all processes.

    Attributes:
        steps ([`AlphaSteps`] or `None`): There once there are alphas and an optimizer.
    """

    def __init__(self, trainer: LayerCollapseTrainerMixin, blocks: TrainedBlocks, sharding: Sharding) -> None:
        self._trainer: Any = trainer
        self._blocks, self._sharding = blocks, sharding
        self.steps: AlphaSteps | None = None
        self._penalty: float | torch.Tensor = 0.0  # times its strength, in the step that is being taken
        self._taken_before = 0
        self._warned_of_frozen = False
        self._gradients = AlphaGradients({})

    def refuse_setup(self) -> None:
        args = self._trainer.args
        checkpointing, options = checkpointing_of(args)
        if checkpointing and options.get("use_reentrant", False) and args.world_size > 1:
            raise ValueError(
                "Reentrant activation checkpointing runs a backward pass of its own, in which DistributedDataParallel "
                "would see each alpha a second time, after the penalty. Set use_reentrant=False, the default."
            )
        refuse_steps_in_backward(args)
        if self._trainer.layer_collapse_config.budget is not None:
            refuse_several_devices(args, self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled)

    def warn_of_frozen(self) -> None:
        if not self._warned_of_frozen and self._blocks.activations() and not self._blocks.trainable_alphas():
            self._warned_of_frozen = True
            logger.warning(NO_TRAINABLE_ALPHA)

    # ---- The optimizer ----

    def without_alphas(self, names: list[str], model: nn.Module) -> list[str]:
        alphas = {f"{name}.alpha" for name in collapsible_activations(model)}
        return [name for name in names if name not in alphas]

    def take_over(self) -> None:
        """Takes alphas over from the optimizer that was made."""
        config = self._trainer.layer_collapse_config
        alphas = self._blocks.trainable_alphas() if config is not None else []
        if alphas:
            self._drive(alphas)
            return
        self.steps = None
        if config is not None and config.progressive and self._trainer.lr_scheduler is None:
            # In place of theirs, which checkpoints of this run have: they were there when it began.
            group = {"params": [], "lr": config.alpha_learning_rate, "weight_decay": 0.0}
            plain_optimizer(self._trainer.optimizer).add_param_group(group)

    def _drive(self, alphas: list[nn.Parameter]) -> None:
        """Takes alphas over from the optimizer that there is, unless that was done."""
        optimizer, config = plain_optimizer(self._trainer.optimizer), self._trainer.layer_collapse_config
        if self.steps is not None and self.steps.optimizer is optimizer and self.steps.drives:
            return
        if self._trainer.is_deepspeed_enabled:
            # It flattens what is in the optimizer into parts, in the model's dtype.
            self._sharding.replicate(alphas)
            self.steps = AlphaStepsApart(optimizer, alphas, config, self.penalty_strength)
        else:
            scheduled = self._trainer.lr_scheduler is not None
            told = None
            if config.budget is not None:
                told = NeuronBudget(self._trainer.model, config, optimizer, self._progress)
            self.steps = AlphaSteps(optimizer, alphas, config, self.penalty_strength, scheduled, told)
        self._forget_base_that_changes()

    def _forget_base_that_changes(self) -> None:
        # What adapters are on is not the saved model any more.
        if alphas_lost_in_saves(self._trainer.model):
            forget_base(self._trainer.model)

    def restore(self) -> None:
        """Puts right what an engine did to alphas that are apart from its optimizer."""
        if isinstance(self.steps, AlphaStepsApart):
            self.steps.restore()

    def forget(self) -> None:
        """To be called when the optimizer is let go."""
        if self.steps is not None:
            self.steps.leave()
        self.steps = None

    def exchanged(self) -> None:
        """To be called when alphas went with their blocks, and the optimizer knows."""
        if self.steps is not None:
            self.steps.alphas = self._blocks.trainable_alphas()

    def aside(self) -> contextlib.AbstractContextManager:
        """In which FSDP2's state dicts find an optimizer without alphas."""
        if self.steps is None or not self._trainer.is_fsdp_enabled:
            return contextlib.nullcontext()
        return self.steps.aside()

    def task_parameters(self, model: nn.Module) -> nn.Module | TaskParameters:
        """What is clipped of a model, and in the norm that is logged."""
        if self.steps is None or isinstance(self.steps, AlphaStepsApart):
            return model
        return TaskParameters(model, self._blocks.trainable_alphas())

    # ---- Steps ----

    def penalty_strength(self) -> float:
        state = self._trainer.state
        return penalty_strength_at(self._trainer.layer_collapse_config, state.global_step, state.max_steps)

    def _progress(self) -> float:
        """To a budget, once the step is taken that is being taken."""
        state = self._trainer.state
        return budget_progress(self._trainer.layer_collapse_config, state.global_step + 1, state.max_steps)

    def penalty_share(self) -> torch.Tensor:
        """The part of the penalty in the loss of one of the batches that are accumulated."""
        return self._penalty / self._trainer.current_gradient_accumulation_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._penalty = 0.0
        if self._trainer.layer_collapse_config is None or not self._blocks.activations():
            return
        self.warn_of_frozen()
        in_use = {activation: self._blocks.place(activation) for activation in self._blocks.activations().values()}
        self._gradients = AlphaGradients({a: (place.block.name, place.linears) for a, place in in_use.items()})
        # Those that a subclass's own `create_optimizer` left to it, or none as long as all are frozen.
        self._drive(self._blocks.trainable_alphas())
        if self.steps is not None:
            self.steps.begin_run()
            if self.steps.told is not None:
                self.steps.told.refuse_forgotten(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.layer_collapse_config is None:
            return
        self._look_at_alphas(args)
        self._gradients.begin_step()
        if self.steps is not None and self.steps.told is not None:
            self.steps.told.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Again: alphas may have been unfrozen since.
        if self._trainer.layer_collapse_config is not None:
            self._look_at_alphas(args)
            self._gradients.look(self._trainer.model)

    def _look_at_alphas(self, args: TrainingArguments) -> None:
        if self.steps is not None:
            one_process = args.parallel_mode != ParallelMode.DISTRIBUTED
            if self.steps.follow(self._trainer.model, one_process and self._trainer.accelerator.scaler is None):
                self._forget_base_that_changes()
            self._taken_before = self.steps.taken
            with torch.no_grad():
                self._penalty = self.steps.penalty().to(args.device)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # DeepSpeed has taken its step by now.
        if isinstance(self.steps, AlphaStepsApart):
            self.steps.step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.steps is None:
            return
        skipped = self._trainer.accelerator.optimizer_step_was_skipped
        if not skipped and self._blocks.trainable_alphas() and self.steps.taken == self._taken_before:
            raise RuntimeError(
                "This step left alphas where they were, though they are trainable: something else than the `step` of "
                "`trainer.optimizer` was taken. Pass the optimizer as `optimizers`, or let `create_optimizer` make it."
            )
        self.steps.count_penalty(self._penalty)

    # ---- Logs ----

    def logs(self, logs: dict[str, float]) -> dict[str, float]:
        """What goes beside the logs of a step or an evaluation."""
        config = self._trainer.layer_collapse_config
        if config is None or "train_runtime" in logs:
            return {}
        activations, collapsed = self._blocks.activations(), self._blocks.count_collapsed()
        if not (activations or collapsed):
            return {}
        added: dict[str, float] = {READY_BLOCKS: self._blocks.count_ready()}
        if config.progressive:
            added[COLLAPSED_BLOCKS] = collapsed
        if "loss" not in logs or not activations:
            return added
        step = max(0, self._trainer.state.global_step - 1)  # the one that was taken last
        strength = penalty_strength_at(config, step, self._trainer.state.max_steps)
        added |= alpha_logs({name: module.alpha for name, module in activations.items()}, strength)
        if self.steps is not None:
            added |= self.steps.penalty_logs()
            if self.steps.told is not None:
                added["layer_collapse/told_neurons"] = self.steps.told.count
            self.steps.warn_if_not_finite()
        return added
