"""The teacher of a Trainer: when it is made, what of each batch it hears, and how its terms join the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .config import LayerCollapseConfig
from .distillation import Distillation, check_teacher, teacher_for
from .models import device_of, evaluating, in_type_of, inputs_of
from .random_state import same_random_state
from .sentence_models import features_in, sentence_model
from .upstream import loss_is_scaled


if TYPE_CHECKING:
    from .trainer import LayerCollapseTrainerMixin


class Teaching(TrainerCallback):
    """Adds a teacher's terms to the loss of a Trainer. As a callback it sees whether a step was taken without them.

    Args:
        trainer ([`LayerCollapseTrainerMixin`]): Has the model and the options.
        teacher (`nn.Module`, *optional*): As the Trainer was given it; see [`teacher_for`].

    Attributes:
        distillation ([`Distillation`] or `None`): There once a model with a teacher is.
    """

    def __init__(self, trainer: LayerCollapseTrainerMixin, teacher: nn.Module | None = None) -> None:
        self._trainer: Any = trainer
        self._given = teacher
        self.distillation: Distillation | None = None
        self._taught = False  # in this step

    def refuse_setup(self) -> None:
        trainer, config = self._trainer, self._trainer.layer_collapse_config
        if config.distils and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise ValueError(
                "A teacher is not supported under FSDP and DeepSpeed, which shard the blocks that are compared with "
                "its own. Train in DDP, or set `distillation_weight` and `hidden_state_weight` to 0."
            )
        if config.hidden_state_weight and (trainer.args.torch_compile or trainer.args.n_gpu > 1):
            raise ValueError(
                "`hidden_state_weight` watches single blocks, which `torch_compile` and `nn.DataParallel` do not "
                "allow. Leave them out (several GPUs: `accelerate launch`), or use `distillation_weight` alone."
            )

    def refuse_teacher_without_options(self) -> None:
        if self._given is not None and self._trainer.layer_collapse_config is None:
            raise ValueError("There is a `teacher`, but no `layer_collapse_config` that says what it teaches.")

    def check(self, model: nn.Module) -> None:
        """Raises if the teacher that was given does not fit the options, or a model that nothing is done to yet.

        Raises:
            TypeError, ValueError: As said.
        """
        if self._given is not None:
            check_teacher(self._given, model, self._trainer.layer_collapse_config)

    def rehearse(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Raises if a model that nothing is done to yet cannot be compared with its teacher on a batch of training
        inputs: predictions of another kind than the labels tell, other labels than the teacher's, and the like.

        Args:
            model (`nn.Module`): By default its own teacher.
            batch (`Mapping`): What the model is given in training, with labels.
        """
        trainer, config = self._trainer, self._trainer.layer_collapse_config
        if not config.distils:
            return
        # Of blocks `check` knows enough; they are compared once they are patched or collapsed.
        # A plain number is what is meant, also of a weight that nobody gave: there is no budget here.
        weight = float(config.distillation_weight)
        heads = LayerCollapseConfig(distillation_weight=weight, temperature=config.temperature)
        teacher = model if self._given is None else self._given
        distillation = Distillation(heads, teacher, model)
        inputs = in_type_of(model, inputs_of(batch, device_of(model)))
        with torch.no_grad(), evaluating(model), evaluating(teacher):
            with distillation.watching(model, model) as seen:
                if sentence_model(model) is None:
                    model(**distillation.without_labels(inputs, trainer.label_names))
                else:
                    model(dict(inputs))
            distillation.loss(inputs, seen, label_names=trainer.label_names)

    @property
    def teacher(self) -> nn.Module | None:
        return self.distillation.teacher if self.distillation is not None else None

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Finds the teacher of a model, which by default is what the model is on entry, and teaches what it is on
        exit."""
        teacher = teacher_for(model, self._trainer.layer_collapse_config, self._given)
        yield
        if teacher is not None:
            self.distillation = Distillation(self._trainer.layer_collapse_config, teacher, model)

    def changed(self, model: nn.Module) -> None:
        """To be called when blocks were exchanged. Of those that are dense again nothing is compared."""
        if self.distillation is not None:
            self.distillation.find_blocks(model)
            if not self.distillation.compares:
                self.distillation = None

    def compute_loss(
        self,
        own_loss: Callable[..., Any],
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """What the Trainer's own `compute_loss` gives for the other arguments, with the teacher's terms."""
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        distillation = self.distillation
        if distillation is None or not model.training:
            return own_loss(model, inputs, **options)
        weight = distillation.config.task_loss_weight
        given = dict(inputs)  # label smoothing takes labels out
        with distillation.watching(self._trainer.model, model) as seen:
            if weight:
                result = own_loss(model, inputs, **options)
                loss, outputs = result if return_outputs else (result, None)
            else:
                # The Trainer's own would ask for labels.
                loss, outputs = 0.0, self._run_without_loss(distillation, model, inputs)
        if not distillation.hears(seen):
            # trl's losses make no logits, and sentence-transformers' Cached... losses run the model while they go
            # backward. What is drawn for dropout here is no part of the run without a teacher.
            with same_random_state(), distillation.watching(self._trainer.model, model) as seen:
                self._run_without_loss(distillation, model, given)
        self._taught = True
        loss = weight * loss + self._terms(distillation, given, seen, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _run_without_loss(self, distillation: Distillation, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        trainer, sentences = self._trainer, sentence_model(self._trainer.model)
        if sentences is None:
            return model(**distillation.without_labels(inputs, trainer.label_names))
        for features in features_in(trainer, sentences, inputs):
            model(inputs_of(features, trainer.args.device))
        return {}  # as sentence-transformers' trainers have it

    def _terms(
        self, distillation: Distillation, inputs: Mapping[str, Any], seen: Any, num_items_in_batch: Any
    ) -> torch.Tensor:
        """They weigh each label as the model's own loss does."""
        trainer, items, batches = self._trainer, None, 1
        if loss_is_scaled(trainer, num_items_in_batch):
            # training_step will not divide, and adds up this many of them.
            batches = trainer.current_gradient_accumulation_steps
            if num_items_in_batch is not None:
                items = self._items_here(num_items_in_batch)
        with trainer.accelerator.autocast():
            return distillation.loss(inputs, seen, items, batches, trainer.label_names)

    def _items_here(self, num_items_in_batch: Any) -> torch.Tensor:
        """What a sum over the labels of this process is divided by, where gradients are averaged over processes."""
        args = self._trainer.args
        items = torch.as_tensor(num_items_in_batch, dtype=torch.float32).flatten()[0]  # one for each replica
        averaged = args.average_tokens_across_devices
        if args.n_gpu > 1:
            return items if averaged else items * args.n_gpu
        return items / (self._trainer.accelerator.num_processes // self._trainer.get_tp_size()) if averaged else items

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        config = self._trainer.layer_collapse_config
        if self.distillation is not None:
            self.distillation.begin_run()
        elif config is not None and config.distils and not config.plans and not config.task_loss_weight:
            raise ValueError(
                "Nothing is left to learn: with task_loss_weight=0 it was what `hidden_state_weight` compares, and "
                "all blocks are dense again. Make a new Trainer with other options."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.distillation is not None and not self._taught:
            raise RuntimeError(
                f"This step was taken without the teacher: {type(self._trainer).__name__} computes a loss of its own. "
                "Add to `super().compute_loss(...)`, or set `distillation_weight` and `hidden_state_weight` to 0."
            )
        self._taught = False

    def logs(self, logs: dict[str, float]) -> dict[str, float]:
        """What goes beside the logs of a step."""
        return self.distillation.logs() if self.distillation is not None and "loss" in logs else {}
