"""Models that are sharded over processes while a Trainer runs: alphas stay whole, and a collapse gathers the rest."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import PreTrainedModel
from transformers.training_args import ParallelMode

from . import processes
from .models import is_fully_sharded, whole_class_of
from .optimization import replicate_alphas
from .patching import collapsible_activations
from .trained_blocks import TrainedBlocks
from .upstream import prepared_models


if TYPE_CHECKING:
    from .trainer import LayerCollapseTrainerMixin

Result = TypeVar("Result")


class Sharding:
    """What a Trainer's processes, FSDP2 and DeepSpeed ask for while a model has alphas, and when it collapses.

    Args:
        trainer ([`LayerCollapseTrainerMixin`]): Has the model and the accelerator.
        blocks ([`TrainedBlocks`]): Of its model.
    """

    def __init__(self, trainer: LayerCollapseTrainerMixin, blocks: TrainedBlocks) -> None:
        self._trainer: Any = trainer
        self._blocks = blocks
        # Hooks on alphas that nothing else keeps the same on all processes.
        self._replicating: list[RemovableHandle] = []

    def refuse_setup(self) -> None:
        trainer, state = self._trainer, self._trainer.accelerator.state
        if trainer.is_deepspeed_enabled:
            refuse_deepspeed_setup(state.deepspeed_plugin)
        if trainer.is_fsdp_enabled:
            precision = trainer.accelerator.mixed_precision
            refuse_fsdp_setup(state.fsdp_plugin, trainer.model, trainer.args.torch_compile, precision)

    def leave_alphas_out(self) -> None:
        """To be called before accelerate is given model and optimizer."""
        trainer = self._trainer
        if not trainer.is_fsdp_enabled or is_fully_sharded(trainer.model):
            return
        alphas = self._blocks.trainable_alphas()
        if alphas:
            leave_out_of_sharding(trainer.accelerator.state.fsdp_plugin, trainer.model, trainer.args.device)
            self.replicate(alphas)

    def replicate(self, alphas: list[nn.Parameter]) -> None:
        """Keeps alphas the same on all processes, where nothing else does; see [`replicate_alphas`]."""
        for handle in self._replicating:
            handle.remove()
        self._replicating = replicate_alphas(alphas)

    def whole_model(self) -> nn.Module:
        """The Trainer's model; if it is sharded, a new one, gathered."""
        model = self._trainer.model
        return gathered(model, self._trainer.args.device) if is_fully_sharded(model) else model

    def on_all_processes(self, model: nn.Module, work: Callable[[], Result]) -> Result:
        """Runs `work`, which changes a whole model, so that all processes hold what the first one found."""
        if self._trainer.args.parallel_mode != ParallelMode.DISTRIBUTED:
            return work()
        result = first_process_first(work)
        # Fitted to data, which may differ between processes.
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
        return result

    def let_go(self, model: nn.Module) -> None:
        """Lets a sharded model go; from here on this one is evaluated, as it is."""
        trainer = self._trainer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            trainer.accelerator.free_memory()
            prepared_models(trainer.accelerator).append(model)
            trainer.deepspeed = model if trainer.is_deepspeed_enabled else None

    # ---- Saving ----

    def is_passed_over_by_save_model(self, in_checkpoint: bool) -> bool:
        """Whether upstream would save nothing, or ask an engine that is none before training and after a collapse.

        Args:
            in_checkpoint (`bool`): Whether a state dict that is sharded is being written beside.
        """
        trainer = self._trainer
        if trainer.is_fsdp_enabled:
            # Where checkpoints are sharded, upstream would save nothing at all. FSDP1 wraps instead.
            whole = not is_fully_sharded(trainer.model)
            return trainer.accelerator.state.fsdp_plugin.fsdp_version == 2 and (whole or not in_checkpoint)
        return trainer.is_deepspeed_enabled and trainer.model_wrapped is trainer.model

    def whole_state_dict(self) -> dict[str, torch.Tensor] | None:
        """Of a sharded model; of another, `None`, which is its own."""
        model = self._trainer.model
        return self._trainer.accelerator.get_state_dict(model) if is_fully_sharded(model) else None

    def save_config(self, folder: str) -> None:
        """Beside a state dict that is sharded upstream leaves none, and with it no trace of which model it is of."""
        trainer = self._trainer
        if trainer.is_fsdp_enabled and trainer.args.should_save and isinstance(trainer.model, PreTrainedModel):
            trainer.model.config.save_pretrained(folder)


def refuse_fsdp_setup(plugin: Any, model: nn.Module, compiles: bool = False, mixed_precision: str = "no") -> None:
    """Raises if alphas cannot be left out of what accelerate's FSDP is about to shard.

    Args:
        plugin (`accelerate.FullyShardedDataParallelPlugin`): As the Trainer made it.
        model (`nn.Module`): Patched, not sharded yet.
        compiles (`bool`): Whether it is to be compiled first.
        mixed_precision (`str`): `"no"`, `"bf16"` or `"fp16"`.

    Raises:
        ValueError: It is FSDP1, is to load on the first process only, or the model cannot be gathered again.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            "Alphas are not trained under FSDP1, which flattens parameters of one dtype into one. Use FSDP2: "
            '`fsdp_version: 2` in the accelerate config, or `TrainingArguments(fsdp_config={"version": 2})`.'
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "With `cpu_ram_efficient_loading` accelerate takes every tensor of the model for sharded, and alphas are "
            "not. Set `fsdp_cpu_ram_efficient_loading: false` in the accelerate config, or "
            '`TrainingArguments(fsdp_config={"cpu_ram_efficient_loading": False})`.'
        )
    if mixed_precision == "fp16":
        raise ValueError(
            "Alphas are not trained under FSDP's fp16: its loss scaling cannot unscale gradients of which some are "
            "sharded and some are not. Use bf16."
        )
    if compiles or not isinstance(model, PreTrainedModel):
        what = "under `torch_compile`" if compiles else type(model).__name__
        raise ValueError(
            f"A patched model ({what}) cannot be trained under FSDP: to collapse it, it has to be gathered into a new "
            "one, which takes a `PreTrainedModel` without adapters and `torch.compile`. Train in DDP."
        )


def refuse_deepspeed_setup(plugin: Any) -> None:
    """Raises if alphas cannot be kept out of what DeepSpeed is about to shard.

    Args:
        plugin (`accelerate.DeepSpeedPlugin`): As the Trainer made it.

    Raises:
        ValueError: It shards parameters (ZeRO-3), makes the optimizer itself, or scales the loss.
    """
    config = plugin.deepspeed_config
    if plugin.zero_stage == 3:
        raise ValueError(
            "Alphas are not trained under ZeRO-3, which shards every parameter and can leave none out. Use FSDP2, "
            "which shards the same, or ZeRO-2. After the collapse the model trains under ZeRO-3 like any other."
        )
    if "optimizer" in config:
        raise ValueError(
            "DeepSpeed is configured to make the optimizer, in which alphas could not take steps of their own. Leave "
            '`"optimizer"` out of its config; the Trainer makes the one that `optim` names.'
        )
    if config.get("fp16", {}).get("enabled") is True:
        raise ValueError(
            "Alphas are not trained under DeepSpeed's fp16: it scales the loss, and unscales only the gradients that "
            "it shards. Use bf16."
        )


def leave_out_of_sharding(plugin: Any, model: nn.Module, device: torch.device) -> None:
    """Makes accelerate's FSDP2 leave the activations with alphas whole, in float32 beside parameters of any dtype.

    Args:
        plugin (`accelerate.FullyShardedDataParallelPlugin`): Changed in place; what it ignored before, it still does.
        model (`nn.Module`): Patched, not sharded yet.
        device (`torch.device`): Where training will be: what is ignored is not moved there with the rest.
    """
    ours = list(collapsible_activations(model).values())
    ignored = plugin.ignored_modules or []
    if isinstance(ignored, str):
        ignored = [module for name, module in model.named_modules() if re.fullmatch(ignored, name)]
    for module in ours:
        module.to(device)
    plugin.ignored_modules = [*(module for module in ignored if module not in ours), *ours]


def gathered(model: Any, device: torch.device) -> nn.Module:
    """A model that `fully_shard` sharded, whole again on every process: a new one, with all that it was trained to.

    Args:
        model (`PreTrainedModel`): Sharded. Its config tells what its modules are.
        device (`torch.device`): Where the new one goes.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with torch.random.fork_rng():
        whole = whole_class_of(model)(copy.deepcopy(model.config))
    whole.load_state_dict(state_dict, assign=True)
    whole.tie_weights()
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(trainable[name])
    if model.can_generate():
        whole.generation_config = model.generation_config
    return whole.to(device).train(model.training)


def first_process_first(work: Callable[[], Result]) -> Result:
    """Runs `work` on the first process and, unless it raises there, on the others; what it raises, all raise.

    Returns:
        What it returned on this process.
    """
    results: list[Result] = []
    for first in (True, False):
        with processes.together():
            if first == (processes.rank() == 0):
                with processes.alone():
                    results.append(work())
    return results[0]
