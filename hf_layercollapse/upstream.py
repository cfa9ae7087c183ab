"""What is used of transformers, accelerate, peft and torch beyond what they document, and where their versions differ.

Each seam says why it is there, which upstream name it hangs on, and in which versions that was seen if not in all that
the package supports. Names are looked for when this module is imported, so that a version without them fails there
and says what to install. What saved models carry with them has a section of its own, at the head of
`modeling_layercollapse.py`.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import torch
import transformers
from accelerate import hooks
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from packaging.version import Version
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import modeling_auto

from .modeling_layercollapse import require, require_methods


# A comparison with a tuple of numbers; what leads to a release counts as that release.
TRANSFORMERS = Version(transformers.__version__).release


def _set_in(function: Callable[..., Any], name: str) -> bool:
    """Whether a function, such as a constructor, reads or sets an attribute of this name."""
    return name in inspect.unwrap(function).__code__.co_names


# ----------------------------------------------------------------------------------------------------
# Versions
# ----------------------------------------------------------------------------------------------------


def checkpointing_of(args: Any) -> tuple[bool, dict]:
    """`(whether activations are computed again in backward, options)` that `TrainingArguments` ask for.

    `activation_checkpointing` since 5.23, where `gradient_checkpointing` is a deprecated alias of it.
    """
    if TRANSFORMERS >= (5, 23):
        return bool(args.activation_checkpointing), args.activation_checkpointing_kwargs or {}
    return args.gradient_checkpointing, args.gradient_checkpointing_kwargs or {}


def declared_scaling(trainer: Any) -> bool | None:
    """What a Trainer's class says of its loss: whether it is scaled for the number of accumulated batches; `None`:
    nothing. `Trainer.loss_is_scaled_for_ga` exists since 5.19.
    """
    return trainer.loss_is_scaled_for_ga if TRANSFORMERS >= (5, 19) else None


def loss_is_scaled(trainer: Any, num_items_in_batch: Any) -> bool:
    """What `Trainer.training_step` asks before it divides the loss by the number of accumulated batches, and keeps to
    itself."""
    declared = declared_scaling(trainer)
    if declared is not None:
        return declared
    counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return counted or trainer.compute_loss_func is not None


# Kernels of liger, by their names in `TrainingArguments.liger_kernel_config`: those that bind a forward of their own
# to modules of gated blocks; and those that put a module in the place of an activation, whose name in transformers is
# given.
LIGER_GATED = {"swiglu", "geglu"}
LIGER_ACTIVATIONS = {"relu_squared": "relu2"}


def liger_kernels(args: Any) -> set[str]:
    """Those of the kernels above that `TrainingArguments` ask for: all of them, unless they say otherwise."""
    options = args.liger_kernel_config or {}
    return {name for name in {*LIGER_GATED, *LIGER_ACTIVATIONS} if args.use_liger_kernel and options.get(name, True)}


def limit_of_registration(config_class: type) -> str:
    """What to say of `AutoModel.register` where it keeps no class of one's own for a config of transformers': before
    5.19, whatever `exist_ok` says. Empty where it does."""
    if TRANSFORMERS >= (5, 19) or not config_class.__module__.startswith("transformers."):
        return ""
    return (
        f" For {config_class.__name__} itself transformers {transformers.__version__} keeps no class of yours, and "
        "this call does nothing: make such a config class, or install transformers 5.19 or newer."
    )


def refuse_old_exporters(to: str) -> None:
    """Raises if transformers cannot load again what its exporters write: `exporters.ExportedModel` is new in 5.23.

    Raises:
        ValueError: It is older.
    """
    if TRANSFORMERS < (5, 23):
        raise ValueError(
            f"Exporting to {to} needs transformers 5.23 or newer, and here is {transformers.__version__}: "
            "pip install -U transformers."
        )


# ----------------------------------------------------------------------------------------------------
# transformers
# ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def layers_checkpointed(model: Any, layers: Any) -> Iterator[None]:
    """These layers of the model keep nothing of a forward pass but their inputs, and run again in the backward pass,
    though nothing trains: they ask whether they themselves are in training mode, which their parts do not hear of.

    Upstream: `GradientCheckpointingLayer.gradient_checkpointing`, `._gradient_checkpointing_func`. The model's own
    switch is another one before 5.23, and acts in training mode only.
    """
    before = [{name: vars(layer).get(name) for name in _CHECKPOINTING} for layer in layers]

    def begin(module: nn.Module, args: Any) -> None:
        for layer in layers:
            layer.training = True

    handle = model.register_forward_pre_hook(begin)
    try:
        for layer in layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        yield
    finally:
        handle.remove()
        for layer, values in zip(layers, before, strict=True):
            for name, value in values.items():
                delattr(layer, name) if value is None else setattr(layer, name, value)


_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
require(
    "_gradient_checkpointing_func" in inspect.getsource(GradientCheckpointingLayer),
    "GradientCheckpointingLayer._gradient_checkpointing_func",
    transformers,
)


# ----------------------------------------------------------------------------------------------------
# torch
# ----------------------------------------------------------------------------------------------------


def uncompiled(module: Any) -> nn.Module:
    """What `torch.compile` wrapped, one layer of it; accelerate's public function looks through DDP as well.

    Upstream: `OptimizedModule._orig_mod`. Not looked for at import, which would load the compiler.
    """
    return module._orig_mod


# The dictionaries that a module keeps its own tensors and children in, and all that torch keeps in every module but
# for the buffers, which code may read whole. What is made without a constructor has to be given them by name.
PARAMETERS, BUFFERS, CHILDREN = "_parameters", "_buffers", "_modules"
OF_TORCH = frozenset(nn.Module().__dict__) - {BUFFERS}
require({PARAMETERS, BUFFERS, CHILDREN} <= nn.Module().__dict__.keys(), "Module._parameters, ._buffers", torch)


def buffers_of(module: Any) -> dict:
    """Name -> buffer, or `None`, as torch keeps them. Upstream: `Module._buffers`."""
    return module._buffers


def let_the_scaler_unscale(optimizer: Any) -> None:
    """Fused optimizers unscale gradients inside their kernel, so that the GradScaler does not; ours must find them
    unscaled.

    Upstream: `Optimizer._step_supports_amp_scaling`, which only some optimizers have.
    """
    if vars(optimizer).get("_step_supports_amp_scaling"):
        optimizer._step_supports_amp_scaling = False


require(_set_in(torch.optim.Adam.__init__, "_step_supports_amp_scaling"), "Adam._step_supports_amp_scaling", torch)


# ----------------------------------------------------------------------------------------------------
# accelerate
# ----------------------------------------------------------------------------------------------------


def prepared_models(accelerator: Any) -> list:
    """The models that an accelerator has prepared: what stands there is evaluated as it is. May be changed.

    Nothing public takes a model out again, or in without preparing it. Upstream: `Accelerator._models`.
    """
    return accelerator._models


require(_set_in(accelerate.Accelerator.__init__, "_models"), "Accelerator._models", accelerate)


def is_hooked(module: Any) -> bool:
    """Whether accelerate put a hook around a module's forward. Upstream: `_hf_hook`."""
    return "_hf_hook" in module.__dict__


def align_hook_of(module: nn.Module) -> hooks.AlignDevicesHook | None:
    """accelerate's hook that brings a module's inputs, and weights that it keeps elsewhere, to a device."""
    hook = module.__dict__.get("_hf_hook")
    found = hook.hooks if isinstance(hook, hooks.SequentialHook) else (hook,)
    return next((each for each in found if isinstance(each, hooks.AlignDevicesHook)), None)


def offload_hook_of(module: nn.Module) -> hooks.AlignDevicesHook | None:
    """accelerate's hook that keeps a module's own weights in the host's memory, or on a disk, and brings them to where
    it runs for each call; `None` where they lie there."""
    hook = align_hook_of(module)
    return hook if hook is not None and hook.offload else None


def offload_like(module: nn.Module, like: nn.Module) -> None:
    """Keeps a module's own weights, which are on the CPU, there, in place, and brings them to where it runs for each
    call, if accelerate does so with another's, or has those on a disk."""
    hook = offload_hook_of(like)
    if hook is not None:
        given = {"execution_device": hook.execution_device, "skip_keys": hook.skip_keys}
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(offload=True, **given))


def weights_in_memory(module: nn.Module) -> list[torch.Tensor]:
    """A module's own parameters, as they are kept between its calls; without those on a disk."""
    hook, own = offload_hook_of(module), dict(module.named_parameters(recurse=False))
    if hook is None:
        return list(own.values())
    return [hook.weights_map[name] for name in own if not is_on_disk(module, name)]


def is_on_disk(module: nn.Module, name: str) -> bool:
    """Whether accelerate reads a module's own parameter of this name from a disk for each call."""
    hook = offload_hook_of(module)
    kept = None if hook is None else hook.weights_map
    while isinstance(kept, PrefixedDataset):
        kept, name = kept.dataset, kept.prefix + name
    return isinstance(kept, OffloadedWeightsLoader) and name not in kept.state_dict


def forward_before_hooks(module: Any) -> Callable[..., Any]:
    """The forward that is inside accelerate's. Upstream: `_old_forward`."""
    return module.__dict__["_old_forward"]


# Bound to the module that they were made for: accelerate's hooks, and what `Module.compile` keeps.
WRAPPERS = ("_hf_hook", "_old_forward", "_compiled_call_impl")
for _name in WRAPPERS[:2]:
    require(_set_in(hooks.add_hook_to_module, _name), f"{_name} in add_hook_to_module", accelerate)
require("_compiled_call_impl" in dir(nn.Module), "Module._compiled_call_impl", torch)


# ----------------------------------------------------------------------------------------------------
# transformers: models
# ----------------------------------------------------------------------------------------------------


def is_causal_language_model(model: Any) -> bool:
    """Whether `AutoModelForCausalLM` gives this class. Upstream: `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`."""
    return type(model).__name__ in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def is_classifier(model: Any) -> bool:
    """Whether this class's labels are classes of whole inputs. Upstream: `MODEL_FOR_..._CLASSIFICATION_MAPPING_NAMES`,
    whose values are a name, or several."""
    names = (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
    )
    name = type(model).__name__
    return any(name == value or (isinstance(value, tuple) and name in value) for of in names for value in of.values())


def has_causal_loss(model: Any) -> bool:
    """Whether a model's loss is that of next tokens. Upstream: `transformers.loss.loss_utils.ForCausalLMLoss`."""
    return model.loss_function is ForCausalLMLoss


def auto_class_of_code(native_class: type[PreTrainedModel]) -> str | None:
    """Name of the Auto class that a class from a repository's own code was loaded by, or `None`.

    Upstream: `PreTrainedModel._auto_class`, set by `register_for_auto_class` and by the loader.
    """
    return native_class._auto_class


require("_auto_class" in dir(PreTrainedModel), "PreTrainedModel._auto_class", transformers)


# ----------------------------------------------------------------------------------------------------
# transformers: the Trainer. Its private methods are overridden where checkpoints, clipping and evaluation have no
# public hook; each override calls the method that it stands in front of.
# ----------------------------------------------------------------------------------------------------

# Name -> parameters, as the overrides pass them on.
TRAINER_METHODS = {
    # Alphas are clipped apart, and the norm in the logs is the task's.
    "_clip_grad_norm": "model",
    "_get_grad_norm": "model grad_norm",
    # The best is among those with the most ready blocks; a collapse comes between an evaluation and its checkpoint.
    "_determine_best_metric": "metrics trial",
    "_evaluate": "trial ignore_keys_for_eval skip_scheduler",
    # Checkpoints are written beside and moved in, hold live names, and are loaded completely or refused.
    "_save_checkpoint": "model trial",
    "_get_output_dir": "trial",
    "_save": "output_dir state_dict",
    "_save_optimizer_and_scheduler": "output_dir",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_best_model": "",
    "_push_from_checkpoint": "checkpoint_folder",
    # Resumed from its last checkpoint, a run takes no further step, and deletes nothing in place.
    "_run_epoch": "",
    "_finalize_training": "trial num_train_samples start_time",
}


def require_trainer(trainer_class: type) -> None:
    """Raises if the Trainer has not the methods that are overridden; called where they are, since it is slow to load.

    Raises:
        ImportError: It has not.
    """
    require_methods(trainer_class, TRAINER_METHODS, transformers)


# ----------------------------------------------------------------------------------------------------
# Trainers of other libraries
# ----------------------------------------------------------------------------------------------------

# What they add up in each forward pass, until they `log`: package -> attribute -> what `log` puts in front of the
# names of the averages that it makes of it in an evaluation; `None` where it makes none that are among the metrics.
# Upstream: trl 1.16 (`_stored_metrics`: CPO and ORPO; the last three: GRPO, RLOO), sentence-transformers 6.2.
ACCUMULATORS: dict[str, dict[str, str | None]] = {
    "trl": {
        "_metrics": "eval_",
        "_stored_metrics": "",
        "_logs": None,
        "_pending_metrics": None,
        "_pending_extra_logs": None,
    },
    "sentence_transformers": {"accum_loss_components": None},
}


def _accumulators_of(trainer: Any) -> dict[str, str | None]:
    packages = {kind.__module__.partition(".")[0] for kind in type(trainer).__mro__}
    tables = [table for package, table in ACCUMULATORS.items() if package in packages]
    return {name: prefix for table in tables for name, prefix in table.items() if name in vars(trainer)}


@contextlib.contextmanager
def accumulating_apart(trainer: Any) -> Iterator[None]:
    """What a Trainer adds up inside is forgotten afterwards."""
    held = {name: vars(trainer)[name] for name in _accumulators_of(trainer)}
    vars(trainer).update(copy.deepcopy(held))
    try:
        yield
    finally:
        vars(trainer).update(held)


def added_up(trainer: Any) -> dict[str, list[float]]:
    """Name of a metric -> what a Trainer has added up for it while it evaluates, and is going to average in `log`."""
    return {
        f"{prefix}{name}": [float(value) for value in values]
        for attribute, prefix in _accumulators_of(trainer).items()
        if prefix is not None
        for name, values in vars(trainer)[attribute].get("eval", {}).items()
    }
