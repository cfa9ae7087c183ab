"""The Trainer that drives alphas to 1, as a mixin and in front of `transformers.Trainer`."""

import ast
import contextlib
import inspect
import itertools
import math
import os
import random
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import is_compiled_module
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import default_compute_objective, has_length
from transformers.training_args import ParallelMode
from transformers.utils import logging

from .blocks import bind_blocks
from .callbacks import NO_TRAINABLE_ALPHA, LayerCollapseCallback
from .checkpoints import CheckpointsMixin, forget_base
from .collapsing import collapse_model
from .config import LayerCollapseConfig
from .distillation import Distillation, teacher_for
from .families import find_feed_forward_blocks
from .merging import is_ready
from .model_card import create_model_card
from .modeling_layercollapse import (
    CollapsibleActivation,
    push_failed,
)
from .models import is_fully_sharded, unwrap
from .optimization import AlphaSteps, TaskParameters, exchange_parameters, penalty_strength_at, replicate_alphas
from .patching import (
    collapsible_activations,
    layer_collapse_config_of,
    patch_or_check,
    penalty,
    shorten,
    tables_of,
)
from .reports import CollapseReport
from .sharding import gathered, in_turn, leave_out_of_sharding, refuse_deepspeed_setup, refuse_fsdp_setup
from .upstream import checkpointing_of, loss_is_scaled, prepared_models, require_trainer


logger = logging.get_logger(__name__)

require_trainer(Trainer)

READY_BLOCKS = "layer_collapse/ready_blocks"
COLLAPSED_BLOCKS = "layer_collapse/collapsed_blocks"


class LayerCollapseTrainerMixin(CheckpointsMixin):
    """Adds LayerCollapse (arXiv 2311.17943) to a Trainer class that it stands in front of.

    Training minimises `loss + strength * sum_b (1 - alpha_b)^2`. Alphas take plain gradient steps whatever the
    optimizer, clamped to [0, 1]: with no task gradient `1 - alpha` shrinks by the factor
    `1 - 2 * alpha_learning_rate * penalty_strength` a step, so twice the strength takes half the steps. They take no
    weight decay and stay out of gradient clipping, and a gradient that is not finite leaves an alpha as it is. The
    penalty counts once per optimizer step, however many batches are accumulated and processes take part: it joins
    where alphas step, so that a subclass may compute its loss as it likes, with or without `super().compute_loss`. A
    step that leaves trainable alphas out raises. Alphas may be frozen and unfrozen while training runs.

    Evaluation of a patched model reports each metric a second time as `eval_collapsed_<metric>`: as if
    [`~LayerCollapseTrainerMixin.collapse`] had been called. They stay when all blocks have collapsed, if training is
    `progressive` or `metric_for_best_model` names one of them. `eval_runtime` covers both passes. `compute_metrics` is
    called in both, last for the model as it is, unless the data have no length: those may be such that can be read
    only once. The best checkpoint is the one with the best such metric among those with the most ready blocks. The
    evaluation loss never contains the penalty.

    With `distillation_weight` or `hidden_state_weight` in the config, a teacher's predictions, or the outputs of its
    blocks, add terms to the training loss, scaled as the model's own loss is. A model that is collapsed is healed in
    this way: it is trained as it is, with the dense model for a teacher and no penalty.

    Two things are put right for every model, patched or not. Checkpoints hold the names of the live model and are
    loaded completely ([`Trainer`] restores 8 of a ViT's 40 tensors). And where the model's own loss ignores
    `num_items_in_batch`, as most classification heads' does, `model_accepts_loss_kwargs` is False, so that gradients
    do not grow with `gradient_accumulation_steps`.

    Args:
        model (`nn.Module` or `str`, *optional*): Dense: it is patched, in place. Or patched already, as the config
            says. Or, without a config, any model. A name where the Trainer class takes one, as trl's do.
        layer_collapse_config ([`LayerCollapseConfig`], *optional*): What to patch, and how to drive it. Default: what
            the model was patched with; on a dense or collapsed model, no LayerCollapse at all.
        calibration_data (iterable of `dict[str, Tensor]`, *optional*): Model inputs, for `linear_target="affine"`;
            read once for each model that is patched.
        teacher (`nn.Module`, *optional*): What distillation compares with; it must know the task. It is put into
            evaluation mode, moved to the model's device, and neither trained nor saved. Default, if the config asks
            for distillation: a frozen copy of the dense model before it is patched. Needed for a model that is
            collapsed, or patched and trained.
        args, kwargs: Everything that the Trainer class takes. With `model_init`, each model it makes is patched.

    Raises:
        TypeError: `layer_collapse_config` or `model` is of a wrong type, or the model is wrapped or sharded.
        ValueError: The model is patched in another way, or only collapsed and there is no distillation, a teacher is
            missing or does not fit, calibration data is missing, or training is to run under FSDP1, ZeRO-3, an
            optimizer that steps during backward, or, on several processes, reentrant checkpointing. Under FSDP2 and
            ZeRO-2, further settings are refused: those that shard alphas, and distillation.
    """

    def __init__(self, model=None, *args, layer_collapse_config=None, calibration_data=None, teacher=None, **kwargs):
        if layer_collapse_config is not None and not isinstance(layer_collapse_config, LayerCollapseConfig):
            raise TypeError(
                f"`layer_collapse_config` must be a LayerCollapseConfig, got {type(layer_collapse_config).__name__}."
            )
        self.layer_collapse_config = layer_collapse_config
        self._calibration_data = calibration_data
        self._given_teacher, self._distillation = teacher, None
        self._alpha_steps = None
        self._whole_class = None  # of the model, before FSDP2 exchanged it
        self._replicating = []  # hooks on alphas that nothing else keeps the same on all processes
        self._penalty_sum, self._penalty_count = 0.0, 0  # since the last log
        self._block_indices = weakref.WeakKeyDictionary()  # activation -> index of its block
        self._collapsed_names = {}  # metric -> its name with the ready blocks collapsed
        self._penalty = 0.0  # times its strength, in the step that is being taken
        self._steps_before, self._taught = 0, False
        self._collapsed_blocks = None  # how many, once they were counted
        self._reports = []  # of blocks that were collapsed while training ran
        self.collapse_report = None  # what `collapse` did last
        self._base_model = None  # what the model was before it was patched, by name
        loads_by_name = super().__init__.__func__ is not Trainer.__init__
        if model is not None and layer_collapse_config is not None and not (loads_by_name and isinstance(model, str)):
            unwrap(model)  # refuses what is no model or is wrapped, before anything is moved
        # Patched afterwards: a trainer that loads models or tokenizers by the name of this one still finds it (trl's
        # do), and what is refused leaves the model as it was.
        super().__init__(model, *args, **kwargs)

        if self.layer_collapse_config is None and collapsible_activations(self.model):
            self.layer_collapse_config = layer_collapse_config_of(unwrap(self.model, sharded=True)[0])
            if self.layer_collapse_config is None:
                raise ValueError("The model is patched but carries no options: pass `layer_collapse_config`.")
            self._teach(self.model, teacher_for(self.model, self.layer_collapse_config, teacher))
        if teacher is not None and self.layer_collapse_config is None:
            raise ValueError("There is a `teacher`, but no `layer_collapse_config` that says what it teaches.")
        if any(isinstance(callback, LayerCollapseCallback) for callback in self.callback_handler.callbacks):
            raise ValueError(
                "LayerCollapseCallback is for Trainers without the mixin; with both, the penalty would count twice. "
                "Leave the callback out."
            )
        # Most heads take the count of labels and ignore it, which makes gradients grow with the accumulated batches.
        own_loss = self.label_smoother is None and self.compute_loss_func is None
        if own_loss and self.model_accepts_loss_kwargs and not counts_items(unwrap(self.model, sharded=True)[0]):
            self.model_accepts_loss_kwargs = False
        if self.layer_collapse_config is not None:
            self._refuse_setup()
        if layer_collapse_config is not None and model is not None:
            self._patch(self.model)
        self.add_callback(_EveryStep(self))
        self._warned_of_frozen = False
        self._warn_of_frozen_alphas()

    def _warn_of_frozen_alphas(self):
        if not self._warned_of_frozen and self._activations() and not self._trainable_alphas():
            self._warned_of_frozen = True
            logger.warning(NO_TRAINABLE_ALPHA)

    def _refuse_setup(self):
        if self.is_deepspeed_enabled:
            refuse_deepspeed_setup(self.accelerator.state.deepspeed_plugin)
        if self.is_fsdp_enabled:
            plugin, precision = self.accelerator.state.fsdp_plugin, self.accelerator.mixed_precision
            refuse_fsdp_setup(plugin, self.model, self.args.torch_compile, precision)
        checkpointing, options = checkpointing_of(self.args)
        if checkpointing and options.get("use_reentrant", False) and self.args.world_size > 1:
            raise ValueError(
                "Reentrant activation checkpointing runs a backward pass of its own, in which DistributedDataParallel "
                "would see each alpha a second time, after the penalty. Set use_reentrant=False, the default."
            )
        if "lomo" in self.args.optim or "layerwise" in self.args.optim:
            raise ValueError(
                f"optim={self.args.optim.value!r} updates parameters during the backward pass, where alphas cannot "
                "take steps of their own. Use an optimizer that works in `step`, such as 'adamw_torch'."
            )

        if self.layer_collapse_config.progressive:
            self._refuse_progressive()
        if self.layer_collapse_config.distils and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "A teacher is not supported under FSDP and DeepSpeed, which shard the blocks that are compared with "
                "its own. Train in DDP, or set `distillation_weight` and `hidden_state_weight` to 0."
            )
        if self.layer_collapse_config.hidden_state_weight and (self.args.torch_compile or self.args.n_gpu > 1):
            raise ValueError(
                "`hidden_state_weight` watches single blocks, which `torch_compile` and `nn.DataParallel` do not "
                "allow. Leave them out (several GPUs: `accelerate launch`), or use `distillation_weight` alone."
            )

    def _refuse_progressive(self):
        holders = unwrap(self.model)[1]
        compiled = any(is_compiled_module(holder) for holder in holders)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "`progressive` is not supported under FSDP and DeepSpeed, which cannot exchange parameters while they "
                "train. Collapse once training has ended, or train in DDP."
            )
        if compiled or (self.args.torch_compile and self.args.world_size > 1):
            raise ValueError(
                "`progressive` is not supported with a model that was compiled before, nor with `torch_compile` on "
                "several processes. Collapse once training has ended."
            )
        if holders:
            raise ValueError(
                "`progressive` is not supported under an adapter: checkpoints hold the adapter alone, and not the "
                "base that was collapsed under it. Collapse once training has ended."
            )
        names = {block.name for block in find_feed_forward_blocks(self.model)}
        unknown = [name for name in self.layer_collapse_config.progressive_order or () if name not in names]
        if unknown:
            raise ValueError(
                f"`progressive_order` names what is no block of this model: {shorten(unknown)}. Its blocks are "
                f"{shorten(sorted(names))}."
            )

    # ---- The model ----

    def _patch(self, model):
        # Patching makes the model forget it.
        inner = unwrap(model)[0]
        if isinstance(inner, PreTrainedModel) and inner.name_or_path:
            self._base_model = inner.name_or_path
        self._collapsed_blocks = None
        # The teacher first: by default it is what the model was before.
        teacher = teacher_for(model, self.layer_collapse_config, self._given_teacher)
        patch_or_check(model, self.layer_collapse_config, self._calibration_data)
        self._teach(model, teacher)

    def _teach(self, model, teacher):
        if teacher is not None:
            self._distillation = Distillation(self.layer_collapse_config, teacher, model)

    def call_model_init(self, trial=None):
        # Every model that model_init makes is dense again.
        model = super().call_model_init(trial)
        if self.layer_collapse_config is not None:
            self._patch(model)
        return model

    @property
    def teacher(self):
        """What distillation compares with, or `None`."""
        return self._distillation.teacher if self._distillation is not None else None

    def _trainable_alphas(self) -> list[nn.Parameter]:
        # peft's `modules_to_save` keeps a frozen copy of each.
        alphas = {id(module.alpha): module.alpha for module in collapsible_activations(self.model).values()}
        return [alpha for alpha in alphas.values() if alpha.requires_grad]

    def _activations(self) -> dict[str, CollapsibleActivation]:
        """Block index, as in [`find_feed_forward_blocks`], -> the activation in use."""
        activations = collapsible_activations(self.model).values()
        if not all(module in self._block_indices for module in activations):
            inner = unwrap(self.model, sharded=True)[0]
            for block in bind_blocks(inner):
                if block.state != "collapsed":
                    # Looks into peft's wrappers.
                    parts = block.activation.modules()
                    self._block_indices.update(dict.fromkeys(parts, block.index))
        in_use = {}
        for module in activations:
            index = str(self._block_indices[module])
            # A second one of the same block is peft's: the trainable copy is in use.
            if index not in in_use or module.alpha.requires_grad:
                in_use[index] = module
        return in_use

    def _is_ready(self, activation):
        return is_ready(activation.alpha, self.layer_collapse_config.collapse_threshold)

    def _count_ready(self):
        ready = sum(self._is_ready(activation) for activation in self._activations().values())
        return ready + self._count_collapsed()

    def _count_collapsed(self):
        """Blocks that were ready before, and are collapsed since."""
        if not self.layer_collapse_config.progressive:
            return 0
        if self._collapsed_blocks is None:
            blocks = find_feed_forward_blocks(self.model)
            self._collapsed_blocks = sum(block.state == "collapsed" for block in blocks)
        return self._collapsed_blocks

    def collapse(self, calibration_data=None, max_error=None, allow_none=False) -> CollapseReport:
        """Collapses the ready blocks of the model in place; see [`collapse_model`].

        Blocks that are not ready stay patched or go back to dense, as `layer_collapse_config.not_ready` says. The
        trainer can go on to evaluate, predict and save; `train` starts with a new optimizer made from `args`.

        On several processes all must call this, and all hold what the first one found. A model that FSDP2 shards is
        gathered: from here on each process holds it whole, as a new `trainer.model`, until `train` shards it again.

        Args:
            calibration_data (iterable of `dict[str, Tensor]`, *optional*): Model inputs; blocks that are not exactly
                linear are fitted to what they compute on them.
            max_error (`float`, *optional*): Refuse if a block's relative error exceeds this.
            allow_none (`bool`): Return a report, rather than raise, if no block is ready.

        Returns:
            [`CollapseReport`]

        Raises:
            ValueError: As [`collapse_model`] does.
            RuntimeError: Training is still running.
        """
        ended = self.state.global_step >= self.state.max_steps or self.control.should_training_stop
        if self.is_in_train and not ended:
            raise RuntimeError(
                "`collapse` replaces parameters that are being trained: call it once training has ended."
            )
        config = self.layer_collapse_config
        if self._reports and not self._activations():
            return _joined(self._reports)
        stored = layer_collapse_config_of(unwrap(self.model, sharded=True)[0])
        if self._activations() and stored is not None and replace(config, blocks=stored.blocks) == stored:
            config = None  # the model's own: its blocks are those that are patched, however it names them
        model, options = self.model, {"max_error": max_error, "allow_none": allow_none}
        if is_fully_sharded(model):
            model = gathered(model, self._whole_class, self.args.device)
        if self.args.parallel_mode == ParallelMode.DISTRIBUTED:
            report = in_turn(lambda: collapse_model(model, config, calibration_data, **options))
            # Fitted to data, which may differ between processes.
            for tensor in model.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)
        else:
            report = collapse_model(model, config, calibration_data, **options)
        inner, holders = unwrap(model)
        if holders and not _has_adapters(inner):
            # They were merged, and what is left of the PeftModel would save an empty adapter.
            model = inner
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # The sharded one is let go; from here on this one is evaluated, as it is.
            self.accelerator.free_memory()
            prepared_models(self.accelerator).append(model)
            self.deepspeed = model if self.is_deepspeed_enabled else None
        if self._distillation is not None:
            self._distillation.find_blocks(inner)
        self._collapsed_blocks = None
        # They hold parameters that are gone.
        self.optimizer = self.lr_scheduler = self._alpha_steps = None
        self.model = self.model_wrapped = self.callback_handler.model = model
        self.collapse_report = _joined([*self._reports, report])
        return self.collapse_report

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        # After what an evaluation found, and before the checkpoint of the same step.
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        config = self.layer_collapse_config
        ready = self._ready_names() if config is not None and config.progressive else []
        if ready:
            with self._optimizer_follows():
                options = replace(config, not_ready="keep", blocks=ready)
                self._reports.append(collapse_model(self.model, options))
            logger.info(f"Step {self.state.global_step}: collapsed {self._reports[-1].collapsed}")
        return metrics

    def _ready_names(self):
        """The patched blocks whose turn it is."""
        indices = [int(index) for index, activation in self._activations().items() if self._is_ready(activation)]
        if not indices:
            return []
        blocks = find_feed_forward_blocks(self.model)
        ready = [block.name for block in blocks if block.index in indices]
        collapsed = [block.name for block in blocks if block.state == "collapsed"]
        order = self.layer_collapse_config.progressive_order or []
        turn = list(itertools.takewhile(lambda name: name in ready or name in collapsed, order))
        return [name for name in ready if name in turn or len(turn) == len(order)]

    @contextlib.contextmanager
    def _optimizer_follows(self):
        """Parameters that are exchanged inside are exchanged in the optimizer too."""
        before = dict(self.model.named_parameters())
        yield
        self._collapsed_blocks = None
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if optimizer is not None:
            exchange_parameters(optimizer, before, dict(self.model.named_parameters()))
        if self._alpha_steps is not None:
            self._alpha_steps.alphas = self._trainable_alphas()
        if isinstance(self.model_wrapped, nn.parallel.DistributedDataParallel):
            # It reduces the parameters that it was made with. A new one takes its place, in `training_step`.
            prepared_models(self.accelerator).remove(self.model)
            self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
            self.model_wrapped = self.accelerator.prepare_model(self.model)

    # ---- Loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # After super(), which multiplies by the number of processes.
        distils = self._distillation is not None and model.training
        given = dict(inputs)  # label smoothing takes labels out
        with self._distillation.watching(self.model, model) if distils else contextlib.nullcontext() as seen:
            result = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if not distils:
            return result
        self._taught = True
        taught = self._distillation_terms(given, seen, num_items_in_batch)
        return (result[0] + taught, result[1]) if return_outputs else result + taught

    def _distillation_terms(self, inputs, seen, num_items_in_batch):
        """They weigh each label as the model's own loss does."""
        items, batches = None, 1
        if self._loss_is_scaled(num_items_in_batch):
            # training_step will not divide, and adds up this many of them.
            batches = self.current_gradient_accumulation_steps
            if num_items_in_batch is not None:
                items = self._items_here(num_items_in_batch)
        with self.accelerator.autocast():
            return self._distillation.loss(inputs, seen, items, batches, self.label_names)

    def _items_here(self, num_items_in_batch):
        """What a sum over the labels of this process is divided by, where gradients are averaged over processes."""
        items = torch.as_tensor(num_items_in_batch, dtype=torch.float32).flatten()[0]  # one for each replica
        averaged = self.args.average_tokens_across_devices
        if self.args.n_gpu > 1:
            return items if averaged else items * self.args.n_gpu
        return items / (self.accelerator.num_processes // self.get_tp_size()) if averaged else items

    def _loss_is_scaled(self, num_items_in_batch):
        return loss_is_scaled(self, num_items_in_batch)

    # ---- Optimizer ----

    def get_decay_parameter_names(self, model):
        # Decay would pull alpha to 0.
        alphas = {f"{name}.alpha" for name in collapsible_activations(model)}
        return [name for name in super().get_decay_parameter_names(model) if name not in alphas]

    def create_optimizer(self, model=None):
        if self.is_fsdp_enabled and not is_fully_sharded(self.model):
            # Before accelerate gets both, as it will.
            self._whole_class = type(self.model)
            if self._trainable_alphas():
                leave_out_of_sharding(self.accelerator.state.fsdp_plugin, self.model, self.args.device)
                self._replicate(self._trainable_alphas())
        # Adam normalises a gradient's size away, and with it the strength of the penalty.
        super().create_optimizer(model)
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        alphas = self._trainable_alphas() if self.layer_collapse_config is not None else []
        if not alphas:
            self._alpha_steps = None
            config = self.layer_collapse_config
            if config is not None and config.progressive and self.lr_scheduler is None:
                # In place of theirs, which checkpoints of this run have: they were there when it began.
                optimizer.add_param_group({"params": [], "lr": config.alpha_learning_rate, "weight_decay": 0.0})
        else:
            self._drive(alphas)
        return self.optimizer

    def _drive(self, alphas):
        """Takes alphas over from the optimizer that there is, unless that was done."""
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if self._alpha_steps is not None and self._alpha_steps.optimizer is optimizer:
            return
        scheduled = self.lr_scheduler is not None
        # DeepSpeed flattens what is in the optimizer into parts, in the model's dtype.
        apart = self.is_deepspeed_enabled
        if apart:
            self._replicate(alphas)
        self._alpha_steps = AlphaSteps(
            optimizer, alphas, self.layer_collapse_config, self._penalty_strength, scheduled, apart
        )
        if self._alphas_beside_adapters():
            # The base is about to change, so it is not the saved one any more.
            forget_base(self.model)

    def _penalty_strength(self):
        return penalty_strength_at(self.layer_collapse_config, self.state.global_step, self.state.max_steps)

    def create_scheduler(self, num_training_steps, optimizer=None):
        # By now DeepSpeed has the model, and has cast every parameter to one dtype.
        if self._alpha_steps is not None and self._alpha_steps.apart:
            self._alpha_steps.restore()
        return super().create_scheduler(num_training_steps, optimizer)

    def _replicate(self, alphas):
        for handle in self._replicating:
            handle.remove()
        self._replicating = replicate_alphas(alphas)

    def training_step(self, model, *args, **kwargs):
        waits = contextlib.nullcontext()
        if isinstance(model, nn.parallel.DistributedDataParallel) and model is not self.model_wrapped:
            model = self.model_wrapped
            waits = waits if self.accelerator.sync_gradients else model.no_sync()
        with waits:
            loss = super().training_step(model, *args, **kwargs)
        # What is logged is what is minimised. As many of them are added up.
        return loss + self._penalty / self.current_gradient_accumulation_steps

    def _begin(self):
        """When training begins, with the optimizer and what wraps the model."""
        if self.layer_collapse_config is None or not self._activations():
            return
        self._warn_of_frozen_alphas()
        # Those that a subclass's own `create_optimizer` left to it, or none as long as all are frozen.
        self._drive(self._trainable_alphas())

    def _before_step(self):
        """Before the first batch of a step, and again before the optimizer takes it."""
        if self.layer_collapse_config is None:
            return
        if self._alpha_steps is not None:
            one_process = self.args.parallel_mode != ParallelMode.DISTRIBUTED
            self._alpha_steps.follow(self.model, alone=one_process and self.accelerator.scaler is None)
            self._steps_before = self._alpha_steps.taken
        with torch.no_grad():
            self._penalty = (self._penalty_strength() * penalty(self._trainable_alphas())).to(self.args.device)

    def _take_step(self):
        """Where the optimizer takes its step; DeepSpeed has by now."""
        if self._alpha_steps is not None and self._alpha_steps.apart:
            self._alpha_steps.step()

    def _after_step(self):
        if self._distillation is not None and not self._taught:
            raise RuntimeError(
                f"This step was taken without the teacher: {type(self).__name__} computes a loss of its own. Add to "
                "`super().compute_loss(...)`, or set `distillation_weight` and `hidden_state_weight` to 0."
            )
        self._taught = False
        if self._alpha_steps is None:
            return
        skipped = self.accelerator.optimizer_step_was_skipped
        if not skipped and self._trainable_alphas() and self._alpha_steps.taken == self._steps_before:
            raise RuntimeError(
                "This step left alphas where they were, though they are trainable: something else than the `step` of "
                "`trainer.optimizer` was taken. Pass the optimizer as `optimizers`, or let `create_optimizer` make it."
            )
        self._penalty_sum = self._penalty_sum + self._penalty
        self._penalty_count += 1

    def _clip_grad_norm(self, model):
        # Twelve alphas at 0 have a gradient of norm 6.9, for which the task's would be scaled down.
        return super()._clip_grad_norm(self._task_parameters(model))

    def _get_grad_norm(self, model, grad_norm=None):
        # As above: the norm in the logs is the task's.
        return super()._get_grad_norm(self._task_parameters(model), grad_norm=grad_norm)

    def _task_parameters(self, model):
        if self._alpha_steps is None or self._alpha_steps.apart:
            return model
        return TaskParameters(model, self._trainable_alphas())

    # ---- Evaluation ----

    def evaluation_loop(
        self,
        dataloader,
        description,
        prediction_loss_only=None,
        ignore_keys=None,
        metric_key_prefix="eval",
    ):
        # Here and not in `evaluate`: one log and one `on_evaluate`, with all metrics in it.
        loop = partial(
            super().evaluation_loop, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if description != "Evaluation" or not self._reports_collapsed():
            return loop()
        measured, gather = None, self.gather_function  # which each loop resets
        again = not self._is_collapsed_already()
        # What `compute_metrics` may write into a file is written last for the model as it is. Data without a length
        # may be such that they can be read only once: by the model as it is.
        if again and has_length(dataloader):
            measured = self._loop_as_if_collapsed(loop)
            self.gather_function = gather
        output = loop()
        if again and measured is None:
            if self._is_used_up(dataloader):
                logger.warning_once(
                    "The evaluation data can be read only once, so that nothing is measured of the collapsed model. "
                    "Pass a dataset, or an iterable that starts anew each time."
                )
                return output
            self.gather_function = gather
            measured = self._loop_as_if_collapsed(loop)
        metrics = output.metrics if measured is None else measured.metrics
        for name, value in list(metrics.items()):
            if name != f"{metric_key_prefix}_model_preparation_time":
                collapsed = f"{metric_key_prefix}_collapsed_{name.removeprefix(f'{metric_key_prefix}_')}"
                self._collapsed_names[name] = collapsed
                output.metrics[collapsed] = value
        # A notebook's table takes the prefix of the last loss for that of all metrics.
        own_loss = f"{metric_key_prefix}_loss"
        if own_loss in output.metrics:
            output.metrics[own_loss] = output.metrics.pop(own_loss)
        return output

    def _reports_collapsed(self):
        """Whether evaluation tells what the collapsed model would do: while a block is patched, and, where it goes on
        or is asked for, when all have collapsed."""
        if self.layer_collapse_config is None:
            return False
        asked_for = "collapsed_" in (self.args.metric_for_best_model or "")
        return bool(asked_for or self._activations() or self._count_collapsed())

    def _is_used_up(self, dataloader):
        """Whether data that were read have nothing more to give, on any process."""
        source = dataloader.dataset if isinstance(dataloader, DataLoader) else dataloader
        used_up = torch.tensor([all(False for _ in source)], dtype=torch.float32, device=self.args.device)
        return bool(self.accelerator.reduce(used_up, reduction="sum"))

    def _loop_as_if_collapsed(self, loop):
        callback_handler = self.callback_handler
        # Prediction steps must not be reported twice.
        self.callback_handler = CallbackHandler([DefaultFlowCallback], self.model, None, None, None)
        try:
            with _same_random_state(), self._as_if_collapsed():
                return loop()
        finally:
            self.callback_handler = callback_handler

    def _is_collapsed_already(self):
        """Whether the model computes what it would after a collapse, so that nothing need be measured."""
        activations = self._activations().values()
        ready = [activation for activation in activations if self._is_ready(activation)]
        restores = self.layer_collapse_config.not_ready == "restore" and len(ready) < len(activations)
        return not ready or (all(bool((module.alpha == 1).all()) for module in ready) and not restores)

    @contextlib.contextmanager
    def _as_if_collapsed(self):
        """What `collapse` would make of the model, without the merging: alpha 1 where ready, native where restored."""
        activations = self._activations().values()
        before = [(module, module.alpha.detach().clone(), module.replacement) for module in activations]
        restores = self.layer_collapse_config.not_ready == "restore"
        try:
            with torch.no_grad():
                for module in activations:
                    if self._is_ready(module):
                        module.alpha.fill_(1)
                    elif restores:
                        module.alpha.fill_(0)
                        module.replacement = None
            yield
        finally:
            with torch.no_grad():
                for module, alpha, replacement in before:
                    module.alpha.copy_(alpha)
                    module.replacement = replacement

    def _determine_best_metric(self, metrics, trial):
        # By the metric alone the best model would be the least collapsed one.
        key = self.args.metric_for_best_model or ""
        key = key if key.startswith("eval_") else f"eval_{key}"
        collapsed = self._collapsed_names.get(key, key)
        if self.layer_collapse_config is not None and self.state.best_global_step and collapsed in metrics:
            ready, ready_then = self._count_ready(), self._logged_when_best(READY_BLOCKS, 0)
            value, value_then = metrics[collapsed], self._logged_when_best(collapsed, self.state.best_metric)
            better = value > value_then if self.args.greater_is_better else value < value_then
            if math.isnan(value) or ready < ready_then or (ready == ready_then and not better):
                return False
            self.state.best_metric = None
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            # Also where the save strategy asks for no best checkpoint: it finds the best evaluation in the log.
            self.state.best_global_step = self.state.global_step
        return is_best

    def _logged_when_best(self, key, default):
        """From the log, since that survives a resume."""
        at_best = (entry for entry in self.state.log_history if entry["step"] == self.state.best_global_step)
        return next((entry[key] for entry in at_best if key in entry), default)

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args, **kwargs):
        # The default objective is the sum of all metrics: those that are reported twice must count once.
        def objective(metrics):
            again = self._collapsed_names.values()
            return default_compute_objective({name: value for name, value in metrics.items() if name not in again})

        return super().hyperparameter_search(hp_space, compute_objective or objective, *args, **kwargs)

    # ---- Logs ----

    def log(self, logs, start_time=None):
        # Adds ours without changing the dict that the caller goes on to use.
        added = self._layer_collapse_logs(logs)
        if self._distillation is not None and "loss" in logs:
            added |= self._distillation.logs()
        extended = {**logs, **added}
        super().log(extended, start_time)
        logs.update({name: value for name, value in extended.items() if name not in added})

    def _layer_collapse_logs(self, logs):
        activations = self._activations() if self.layer_collapse_config is not None else {}
        collapsed = self._count_collapsed() if self.layer_collapse_config is not None else 0
        if not (activations or collapsed) or "train_runtime" in logs:
            return {}
        added = {READY_BLOCKS: sum(map(self._is_ready, activations.values())) + collapsed}
        if self.layer_collapse_config.progressive:
            added[COLLAPSED_BLOCKS] = collapsed
        if "loss" not in logs or not activations:
            return added
        step = max(0, self.state.global_step - 1)  # the one that was taken last
        strength = penalty_strength_at(self.layer_collapse_config, step, self.state.max_steps)
        alphas = [float(module.alpha.detach().mean()) for module in activations.values()]  # on several devices, maybe
        if self._penalty_count:
            added["layer_collapse/penalty"] = float(self._penalty_sum) / self._penalty_count
            self._penalty_sum, self._penalty_count = 0.0, 0
        added["layer_collapse/penalty_strength"] = strength
        added["layer_collapse/alpha_mean"] = sum(alphas) / len(alphas)
        for name, alpha in zip(activations, alphas, strict=True):
            added[f"layer_collapse/alpha/{name}"] = alpha
        if self._alpha_steps is not None:
            self._alpha_steps.warn_if_not_finite()
        return added

    # ---- Model card and Hub ----

    def create_model_card(
        self,
        language=None,
        license=None,
        tags=None,
        model_name=None,
        finetuned_from=None,
        tasks=None,
        dataset_tags=None,
        dataset=None,
        dataset_args=None,
        comparison=None,
    ):
        """Writes `README.md` into `args.output_dir`, from what was measured; see [`model_card.create_model_card`].

        Holds the last collapse, the last evaluation and the hyper-parameters. `push_to_hub` hands its keyword
        arguments on to this. Of a model that is neither patched nor collapsed, or of an adapter, it is the stock card.

        Args:
            comparison ([`Comparison`], *optional*): The model beside others, of which it is called "collapsed".
            language, license, tags, model_name, finetuned_from, dataset_tags: Metadata, as in
                [`~transformers.Trainer.create_model_card`]; `finetuned_from` is by default what was patched, if it has
                a name on the Hub.
        """
        inner, holders = unwrap(self.model)
        if holders or not (isinstance(inner, PreTrainedModel) and tables_of(inner)):
            return super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
        if not self.is_world_process_zero():
            return None
        base = finetuned_from or self._base_model
        card = create_model_card(
            inner,
            self.collapse_report,
            comparison,
            name=model_name or Path(self.args.output_dir).name,
            base_model=base if base and not os.path.isdir(base) else None,
            repo_id=self.hub_model_id,
            datasets=dataset_tags,
            language=language,
            license=license,
            tags=tags,
            training=extract_hyperparameters_from_trainer(self),
            evaluation=self._last_evaluation(),
        )
        card.save(os.path.join(self.args.output_dir, "README.md"))
        return None

    def _last_evaluation(self):
        """Metrics of the last evaluation, without those that say how long it took."""
        logs = (log for log in reversed(self.state.log_history) if any(name.startswith("eval_") for name in log))
        times = ("runtime", "per_second", "preparation_time")
        return {
            name: value
            for name, value in next(logs, {}).items()
            if name.startswith("eval_") and not name.endswith(times)
        }

    def push_to_hub(self, *args, **kwargs):
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception:
            logger.error(push_failed(self.hub_model_id or self.args.output_dir))
            raise


class LayerCollapseTrainer(LayerCollapseTrainerMixin, Trainer):
    __doc__ = LayerCollapseTrainerMixin.__doc__.replace(
        "to a Trainer class that it stands in front of", "to [`~transformers.Trainer`]"
    )


class _EveryStep(TrainerCallback):
    """Reaches a trainer at points that no override of its methods can lose."""

    def __init__(self, trainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer._begin()

    def on_step_begin(self, args, state, control, **kwargs):
        self._trainer._before_step()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._trainer._before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._trainer._take_step()

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer._after_step()


# ----------------------------------------------------------------------------------------------------
# The model that a Trainer is given, and what it does
# ----------------------------------------------------------------------------------------------------


def _has_adapters(inner):
    return any(type(module).__module__.startswith("peft.") for module in inner.modules())


def counts_items(model) -> bool:
    """Whether the loss that a model computes is a sum divided by `num_items_in_batch`.

    It is if `forward` hands its keyword arguments on to `self.loss_function(...)` and that function has a parameter of
    this name, as `ForCausalLMLoss` and `ForMaskedLMLoss` have. `ForSequenceClassificationLoss` uses it for one of its
    three kinds of labels only, and heads that make a `CrossEntropyLoss()` in `forward` never do. Where this says False
    of a loss that does count, the Trainer averages over batches instead of over items.
    """
    forward = type(model).forward
    if not inspect.isfunction(forward):
        return False
    try:
        source = inspect.getsource(forward)
        # Indented as it is: what a docstring holds may stand further left than the code around it.
        tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    except (OSError, SyntaxError):  # typed in, or a lambda among other code
        return False
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "loss_function"
    ]
    passed_on = all(any(keyword.arg in (None, "num_items_in_batch") for keyword in call.keywords) for call in calls)
    return bool(calls) and passed_on and "num_items_in_batch" in inspect.signature(model.loss_function).parameters


def _joined(reports):
    """One report of collapses that came one after the other."""
    if len(reports) == 1:
        return reports[0]
    *earlier, last = reports
    blocks = [block for report in earlier for block in report.blocks if block.outcome == "collapsed"] + last.blocks
    return replace(
        last,
        blocks=sorted(blocks, key=lambda block: block.index),
        parameters_before=reports[0].parameters_before,
    )


@contextlib.contextmanager
def _same_random_state():
    """Random numbers drawn inside do not change those drawn afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
