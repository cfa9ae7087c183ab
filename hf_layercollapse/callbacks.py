"""LayerCollapse for a Trainer whose class cannot be changed."""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import ParallelMode, TrainingArguments
from transformers.utils import logging

from .alpha_gradients import AlphaGradients, refuse_liger
from .config import LayerCollapseConfig, refuse_unread
from .modeling_layercollapse import CollapsibleActivation
from .models import shorten, unwrap
from .neuron_budget import NeuronBudget, refuse_neuron_budget, refuse_several_devices
from .optimization import (
    NO_TRAINABLE_ALPHA,
    AlphaSteps,
    alpha_logs,
    budget_progress,
    penalty_strength_at,
    plain_optimizer,
    refuse_steps_in_backward,
)
from .outcomes import outcome_of
from .patching import (
    collapsible_activations,
    layer_collapse_config_of,
    patch_or_check,
    refuse_budget_in,
)
from .trained_blocks import (
    READY_BLOCKS,
    Place,
    activations_in_use,
    alphas_lost_in_saves,
    forget_base,
    places_of,
    ready_blocks,
    saves_adapters_alone,
)


logger = logging.get_logger(__name__)


class LayerCollapseCallback(TrainerCallback):
    """Drives alphas to 1 from inside any [`~transformers.Trainer`], as [`LayerCollapseTrainer`] does.

    Alphas take the same plain steps as there, in which the penalty joins. So it counts once per step, whatever the
    training is split into, and whatever loss the Trainer computes.

    What a callback cannot do, and [`LayerCollapseTrainerMixin`] in front of the class does: the logged loss does not
    contain the penalty; the alphas' task gradients take part in clipping; evaluation does not report what the
    collapsed model would do, and the best checkpoint may be one with few ready blocks; checkpoints of families whose
    weights are renamed on loading (ViT) are resumed incompletely; task gradients of heads that ignore
    `num_items_in_batch` grow with `gradient_accumulation_steps`; models that `model_init` makes, as in a search, are
    not patched; checkpoints of adapters hold those alphas alone whose activation modules are in the adapter's
    `modules_to_save`, so that a run with others is refused unless it saves none. Logs go into `state.log_history` and
    to callbacks added after this one. Collapse with [`collapse_model`] once training has ended.

    With setfit's Trainer it is the body that is patched and trained: collapse `model.model_body`, and fit the head to
    what it gives then with `trainer.train_classifier(texts, labels)`.

    Args:
        config ([`LayerCollapseConfig`], *optional*): What to patch, and how to drive it. The model is patched when the
            Trainer is constructed, if it is not. Default: what the model was patched with.
        calibration_data (iterable of `dict[str, Tensor]`, *optional*): Model inputs, for `linear_target="affine"`.

    Raises:
        TypeError: `config` is of a wrong type.
        ValueError: `config` has distillation, `progressive`, or a budget for a plan to meet. When the Trainer is
            constructed: the model is patched in another way, or collapsed, or cannot be as small as a budget. When
            training starts: it is not patched, or with such options, or training runs under FSDP or DeepSpeed, or with
            an optimizer that steps during backward, or checkpoints of adapters would lose alphas or their base.
            Kernels of liger would take the place of blocks.
        RuntimeError: In a step the code of a block ran without its activation.
    """

    def __init__(
        self, config: LayerCollapseConfig | None = None, calibration_data: Iterable[Any] | None = None
    ) -> None:
        if config is not None and not isinstance(config, LayerCollapseConfig):
            raise TypeError(f"`config` must be a LayerCollapseConfig, got {type(config).__name__}.")
        _refuse_what_nothing_here_reads(config)
        self.config = config
        self._calibration_data = calibration_data
        self._alpha_steps: AlphaSteps | None = None
        self._activations: dict[str, CollapsibleActivation] = {}
        self._places: weakref.WeakKeyDictionary[nn.Module, Place] = weakref.WeakKeyDictionary()
        self._gradients = AlphaGradients({})
        self._names_base, self._warned_of_frozen, self._patched, self._resumed = False, False, False, False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        args, model = _what_is_trained(args, model, **kwargs)
        refuse_liger(args, model, self.config)
        if self.config is None:
            self._find_places(model)
            return
        inner = unwrap(model)[0]
        name = inner.config.name_or_path if isinstance(inner, PreTrainedModel) else ""
        refuse_neuron_budget(model, self.config)
        patch_or_check(model, self.config, self._calibration_data)
        self._patched = True
        self._find_places(model)
        if name and not inner.config.name_or_path:  # it was patched here
            # The constructor goes on, and trl's read there whose reference model and tokenizer to load. The config
            # only: adapters ask the model.
            inner.config.name_or_path, self._names_base = name, True

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        args, model = _what_is_trained(args, model, **kwargs)
        if self._names_base:
            forget_base(model)
            self._names_base = False
        self._find_places(model)
        self._state, self._activations = state, _trained_activations(model, self._places, self._patched)
        activations = self._activations
        alphas = [module.alpha for module in activations.values() if module.alpha.requires_grad]
        if not alphas and not self._warned_of_frozen:
            self._warned_of_frozen = True
            logger.warning(NO_TRAINABLE_ALPHA)
        config = self._config_of(model)
        _refuse_sharding()
        refuse_steps_in_backward(args)
        if config.budget is not None:
            refuse_several_devices(args)
        _refuse_adapters_without_base(args, model)
        self._resumed = state.global_step > 0
        self._look_beside_adapters(args, model)
        optimizer = plain_optimizer(optimizer)
        steps = self._alpha_steps
        if steps is None or steps.optimizer is not optimizer or not steps.drives:
            # The schedule counts the groups that are there.
            strength, told = partial(self._penalty_strength, config), None
            if config.budget is not None:
                told = NeuronBudget(model, config, optimizer, partial(self._progress, config))
            steps = self._alpha_steps = AlphaSteps(optimizer, alphas, config, strength, scheduled=True, told=told)
        steps.begin_run()
        if steps.told is not None:
            steps.told.refuse_forgotten(state.global_step)
        self._gradients = AlphaGradients(self._blocks_of(activations))

    def _look_beside_adapters(self, args: TrainingArguments, model: Any) -> None:
        """Refuses a run whose checkpoints would lose what it trains; and what is saved after another names no base."""
        lost = alphas_lost_in_saves(model)
        if not lost:
            return
        if self._resumed or args.save_strategy != SaveStrategy.NO:
            raise ValueError(
                f"{len(lost)} alphas train under adapters, whose checkpoints do not hold them: {shorten(list(lost))}. "
                "A run that is resumed, and the best model, would go on with those of the base. Save the patched "
                "model, load it and name its activation modules in `modules_to_save` of the adapter; or use "
                "LayerCollapseTrainer or its mixin, whose checkpoints of a PeftModel hold them; or train in one run "
                'with save_strategy="no", and collapse or save the base after it.'
            )
        forget_base(model)  # as it was saved it has other alphas

    def _find_places(self, model: Any) -> None:
        """Where activations stand, before anything puts code of its own in the place of their blocks'."""
        # A model that trainers of other libraries hold need not be one itself.
        activations = collapsible_activations(model).values() if isinstance(model, nn.Module) else ()
        if not all(activation in self._places for activation in activations):
            self._places.update(places_of(unwrap(model, sharded=True)[0]))

    def _blocks_of(self, activations: dict[str, CollapsibleActivation]) -> dict[Any, Any]:
        """Activation -> name and linears of its block; no linears where other code has taken its place by now."""
        blocks: dict[Any, Any] = {}
        for name, activation in activations.items():
            place = self._places.get(activation)
            blocks[activation] = (name, ()) if place is None else (place.block.name, place.linears)
        return blocks

    def _config_of(self, model: Any) -> LayerCollapseConfig:
        """What the callback was given, or what the model was patched with."""
        if self.config is None:
            self.config = layer_collapse_config_of(unwrap(model)[0])
            if self.config is None:
                raise ValueError("The model is patched but carries no options: pass a config to the callback.")
            _refuse_what_nothing_here_reads(self.config)
        return self.config

    def _penalty_strength(self, config: LayerCollapseConfig) -> float:
        return penalty_strength_at(config, self._state.global_step, self._state.max_steps)

    def _progress(self, config: LayerCollapseConfig) -> float:
        return budget_progress(config, self._state.global_step + 1, self._state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._gradients.begin_step()
        if self._alpha_steps is not None and self._alpha_steps.told is not None:
            self._alpha_steps.told.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        args, model = _what_is_trained(args, model, **kwargs)
        # fp16 on a GPU, where the Trainer scales the loss.
        alone = args.parallel_mode != ParallelMode.DISTRIBUTED and not args.fp16
        assert self._alpha_steps is not None
        if self._alpha_steps.follow(model, alone):
            self._look_beside_adapters(args, model)
        self._alpha_steps.count_penalty(self._alpha_steps.penalty().detach())
        self._gradients.look(model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        if not any(map(_is_training_loss, logs)) or self.config is None or self._alpha_steps is None:
            return
        alphas = {index: module.alpha for index, module in self._activations.items()}
        placed = [module for module in self._activations.values() if module in self._places]
        outcomes = [outcome_of(self._places[module].block, module, self.config) for module in placed]
        progress = budget_progress(self.config, state.global_step, state.max_steps)
        strength = penalty_strength_at(self.config, max(0, state.global_step - 1), state.max_steps)
        added = {
            READY_BLOCKS: ready_blocks(outcomes, self.config, progress),
            **self._alpha_steps.penalty_logs(),
            **alpha_logs(alphas, strength),
        }
        logs.update(added)
        state.log_history[-1].update(added)
        self._alpha_steps.warn_if_not_finite()


def _what_is_trained(
    args: Any, model: Any, st_args: Any = None, st_model: Any = None, **kwargs: Any
) -> tuple[Any, Any]:
    """`(arguments, model)` of the Trainer that is at work. setfit's hands its own to callbacks, and beside them those
    of sentence-transformers' Trainer, which trains the body."""
    return (args, model) if st_model is None else (st_args, st_model)


def _is_training_loss(name: str) -> bool:
    # setfit gives its losses a prefix.
    return name == "loss" or (name.endswith("embedding_loss") and not name.startswith("eval_"))


def _refuse_what_nothing_here_reads(config: LayerCollapseConfig | None) -> None:
    refuse_budget_in(config)
    if config is not None:
        refuse_unread(
            config,
            ("teacher", "evaluations", "plan"),
            "A callback cannot distil, nor collapse blocks while training goes on",
            " (beside a `budget` set distillation_weight=0), or use LayerCollapseTrainer or LayerCollapseTrainerMixin",
        )


def _trained_activations(model: Any, places: Any, patched: bool) -> dict[str, CollapsibleActivation]:
    """Block index, as in [`find_feed_forward_blocks`], -> the activation in use, for every block that has an alpha.

    Args:
        model (`nn.Module`): That is going to be trained.
        places (`dict[nn.Module, Place]`): Where its activations stand.
        patched (`bool`): Whether one was patched when the Trainer was constructed.

    Raises:
        ValueError: None has.
    """
    activations = activations_in_use(model, places)
    if not activations and patched:
        raise ValueError(
            "The model has no alpha to train: it is another one than was patched when the Trainer was constructed. "
            "`model_init` makes a new one when training begins, once the Trainer has made its optimizer: put "
            "LayerCollapseTrainerMixin in front of the Trainer's class, which patches each of them, or pass a `model`."
        )
    if not activations:
        raise ValueError(
            "The model has no alpha to train. Give the Trainer this callback when it is constructed "
            "(`callbacks=[...]`), with a config, or a model from `apply_layer_collapse`."
        )
    return activations


def _refuse_adapters_without_base(args: TrainingArguments, model: Any) -> None:
    """Raises where the run's first checkpoint would: of a model with adapters a save holds these alone, and what was
    patched in memory is saved nowhere.

    Raises:
        ValueError: As said.
    """
    if args.save_strategy == SaveStrategy.NO or not saves_adapters_alone(model):
        return
    if not unwrap(model, sharded=True)[0].name_or_path:
        raise ValueError(
            "The model has adapters and was patched in memory: checkpoints of its adapters could name no base. Save "
            "the patched model before adapters are added, those of peft with its activation modules in "
            '`modules_to_save`; or train with save_strategy="no"; or use LayerCollapseTrainer or its mixin, whose '
            "checkpoints need no base."
        )


def _refuse_sharding() -> None:
    if AcceleratorState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "A callback comes too late to keep alphas out of what FSDP and DeepSpeed shard. Put "
            "LayerCollapseTrainerMixin in front of the Trainer's class, or train in DDP."
        )
