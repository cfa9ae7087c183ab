"""What is used of transformers, accelerate, peft and torch beyond what they document, and where their versions differ.

Each seam says why it is there, which upstream name it hangs on, and in which versions that was seen if not in all that
the package supports. Names are looked for when this module is imported, so that a version without them fails there
and says what to install. What saved models carry with them has a section of its own, at the head of
`modeling_layercollapse.py`.
"""

import transformers
from packaging.version import Version


# A comparison with a tuple of numbers; what leads to a release counts as that release.
TRANSFORMERS = Version(transformers.__version__).release


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
