"""What is used of transformers, accelerate, peft and torch beyond what they document, and where their versions differ.

Each seam says why it is there, which upstream name it hangs on, and in which versions that was seen if not in all that
the package supports. Names are looked for when this module is imported, so that a version without them fails there
and says what to install. What saved models carry with them has a section of its own, at the head of
`modeling_layercollapse.py`.
"""

import inspect

import accelerate
import torch
import transformers
from packaging.version import Version
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


# A comparison with a tuple of numbers; what leads to a release counts as that release.
TRANSFORMERS = Version(transformers.__version__).release
# What the names below were seen in, all of them unless a seam says otherwise.
SEEN = "transformers 5.16.1 to 5.24.0, torch 2.8 to 2.13, accelerate 1.10 to 1.15 and peft 0.19.1 to 0.21.2"


def require(present, name, of):
    """Raises if an upstream name is gone.

    Args:
        present (`bool`): Whether it is there.
        name (`str`): The name.
        of (module): The package that should have it.

    Raises:
        ImportError: It is not.
    """
    if not present:
        raise ImportError(
            f"hf_layercollapse uses `{name}`, which {of.__name__} {of.__version__} does not have as it was. Install "
            f"versions that were tried: {SEEN}."
        )


def _set_in(function, name):
    """Whether a function, such as a constructor, reads or sets an attribute of this name."""
    return name in inspect.unwrap(function).__code__.co_names


# ----------------------------------------------------------------------------------------------------
# Versions
# ----------------------------------------------------------------------------------------------------


def checkpointing_of(args) -> tuple[bool, dict]:
    """`(whether activations are computed again in backward, options)` that `TrainingArguments` ask for.

    `activation_checkpointing` since 5.23, where `gradient_checkpointing` is a deprecated alias of it.
    """
    if TRANSFORMERS >= (5, 23):
        return bool(args.activation_checkpointing), args.activation_checkpointing_kwargs or {}
    return args.gradient_checkpointing, args.gradient_checkpointing_kwargs or {}


def loss_is_scaled(trainer, num_items_in_batch) -> bool:
    """What `Trainer.training_step` asks before it divides the loss by the number of accumulated batches.

    It keeps the answer to itself. `Trainer.loss_is_scaled_for_ga`, where a subclass says it, exists since 5.19.
    """
    if TRANSFORMERS >= (5, 19) and trainer.loss_is_scaled_for_ga is not None:
        return trainer.loss_is_scaled_for_ga
    counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return counted or trainer.compute_loss_func is not None


def refuse_old_exporters(to):
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
# torch
# ----------------------------------------------------------------------------------------------------


def uncompiled(module):
    """What `torch.compile` wrapped, one layer of it; accelerate's public function looks through DDP as well.

    Upstream: `OptimizedModule._orig_mod`. Not looked for at import, which would load the compiler.
    """
    return module._orig_mod


def let_the_scaler_unscale(optimizer):
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


def prepared_models(accelerator) -> list:
    """The models that an accelerator has prepared: what stands there is evaluated as it is. May be changed.

    Nothing public takes a model out again, or in without preparing it. Upstream: `Accelerator._models`.
    """
    return accelerator._models


require(_set_in(accelerate.Accelerator.__init__, "_models"), "Accelerator._models", accelerate)


# ----------------------------------------------------------------------------------------------------
# transformers: models
# ----------------------------------------------------------------------------------------------------


def is_causal_language_model(model) -> bool:
    """Whether `AutoModelForCausalLM` gives this class. Upstream: `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`."""
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def is_classifier(model) -> bool:
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


def has_causal_loss(model) -> bool:
    """Whether a model's loss is that of next tokens. Upstream: `transformers.loss.loss_utils.ForCausalLMLoss`."""
    return model.loss_function is ForCausalLMLoss
