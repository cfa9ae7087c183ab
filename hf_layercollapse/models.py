"""What a live model is asked: what wraps it, which of its modules are adapted, what stands at a path."""

import re

import torch
from accelerate.utils import is_compiled_module
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .modeling_layercollapse import children_of
from .upstream import uncompiled


# Marks the last linear of a block that a collapse made narrower, where no table says so: in a plain torch module.
CUT = "cut_by_layer_collapse"


def unwrap(model, sharded=False):
    """`(the model itself, its wrappers)`: looks through PeftModel and `torch.compile`.

    Args:
        sharded (`bool`): Whether the model itself may be one that `fully_shard` has sharded in place.

    Raises:
        TypeError: It is no module, or it is wrapped or sharded for distributed training.
    """
    wrappers = []
    while True:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"Expected a model (`nn.Module`), got {type(model).__name__}. If it holds one, as SetFit's "
                "`model_body`, pass that."
            )
        if is_compiled_module(model):
            wrappers.append(model)
            model = uncompiled(model)
        elif is_peft_model(model):
            wrappers.append(model)
            model = model.get_base_model()
        elif sharded and is_fully_sharded(model):
            return model, wrappers
        else:
            _refuse_wrapped(model, "The model")
            if not isinstance(model, PreTrainedModel):
                for name, module in model.named_modules():
                    if not is_fully_sharded(module):
                        _refuse_wrapped(module, f"`{name}`")
            return model, wrappers


def _refuse_wrapped(module, which):
    """Raises if the model, or a model inside of it, is wrapped in a way that it cannot be changed under."""
    kind = type(module)
    by_class = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(module, by_class) or kind.__module__.startswith(("deepspeed.", "torch.distributed.fsdp.")):
        raise TypeError(
            f"{which} is wrapped in {kind.__name__}. Patch it before it is wrapped (before the Trainer or "
            "`accelerator.prepare` gets it), and collapse the unwrapped one: `accelerator.unwrap_model(model)`."
        )
    if re.fullmatch(r"transformers_modules\..*\.modeling_layercollapse", kind.__module__):
        raise TypeError(
            f"{which} was built by the code in its own folder (`trust_remote_code=True`). Load it again after "
            "`import hf_layercollapse`, which then builds it."
        )


def is_peft_model(module):
    """Whether a module is a PeftModel."""
    return type(module).__module__.startswith("peft.") and isinstance(module, _peft_model_class())


def is_fully_sharded(model):
    """Whether `fully_shard` (FSDP2) has sharded a model in place."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def _peft_model_class():
    from peft import PeftModel

    return PeftModel


def base_layer(linear):
    """What an adapter wraps, or the linear itself."""
    return linear.get_base_layer() if is_adapted(linear) else linear


def is_adapted(linear):
    """Whether a linear is under a peft adapter."""
    return type(linear).__module__.startswith("peft.tuners.") and isinstance(linear, _tuner_layer_class())


def _tuner_layer_class():
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer


def part_at(module, path):
    """The module at a path inside another, by its registered children; `None` where there is none."""
    for part in path.split("."):
        module = children_of(module).get(part)
        if module is None:
            return None
    return module
