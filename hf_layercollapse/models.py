"""What a live model is asked: what wraps it, what stands at a path, its mode, device, size; a place for its folder."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params, is_compiled_module
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .modeling_layercollapse import SAVING_PREFIX, CollapsibleActivation, children_of
from .rows import not_inputs
from .sentence_models import predicted, sentence_model
from .upstream import align_hook_of, offload_hook_of, uncompiled


# Marks the last linear of a block that a collapse made narrower, where no table says so: in a plain torch module.
CUT = "cut_by_layer_collapse"

# How many names stand in a message.
NAMED = 6


def unwrap(model: Any, sharded: bool = False) -> tuple[Any, list[Any]]:
    """`(the model itself, its wrappers)`: looks through PeftModel and `torch.compile`, and into an object of
    sentence-transformers that holds one transformers model, which is no wrapper: it runs and saves what it holds.

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
            adapted: Any = model
            wrappers.append(adapted)
            model = adapted.get_base_model()
        else:
            whole = sharded and is_fully_sharded(model)
            if not whole:
                _refuse_wrapped(model, "The model")
            if not whole and not isinstance(model, PreTrainedModel):
                for name, module in model.named_modules():
                    if not is_fully_sharded(module):
                        _refuse_wrapped(module, f"`{name}`")
            held = _model_held(model)
            if held is None:
                return model, wrappers
            model = held


def _model_held(model: Any) -> Any:
    """The one transformers model that an object of sentence-transformers holds, with what wraps it there; `None` for
    anything else. Where there are several (behind a `Router`), their paths in the object tell them apart."""
    sentences = sentence_model(model)
    return sentences.transformers_model if sentences is not None and len(carriers_of(sentences)) == 1 else None


def carriers_of(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """`[(qualified name, model)]` of the transformers models whose configs hold the tables: the outermost ones, each
    once, wherever they stand in a module. A transformers model is its own and only carrier, whatever its parts are.
    """
    if isinstance(model, PreTrainedModel):
        return [("", model)]
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    inside = {id(part) for _, outer in found for part in outer.modules() if part is not outer}
    return [(name, outer) for name, outer in found if id(outer) not in inside]


def is_transformers_model(model: nn.Module) -> bool:
    """Whether it is a transformers model, wrapped or not, and not a module that holds one and runs and saves it."""
    return sentence_model(model) is None and isinstance(unwrap(model, sharded=True)[0], PreTrainedModel)


def is_encoder_decoder(inner: Any) -> bool:
    """Whether a model's decoder reads an encoder."""
    return isinstance(inner, PreTrainedModel) and bool(inner.config.is_encoder_decoder)


def refuse_objects_around(model: nn.Module) -> None:
    """Raises a TypeError if a model is one inside an object of sentence-transformers, where that alone is asked for:
    its pooling and what else the object does would be lost without a word."""
    sentences = sentence_model(model)
    if sentences is not None:
        raise TypeError(
            f"A {type(sentences).__name__} does more than the transformers model that it holds, which is all that can "
            "be written here: pass that, `model.transformers_model`."
        )


def outputs_of(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What a model gives for a batch of its inputs: the one place where a model runs on calibration data."""
    sentences, inputs = sentence_model(model), in_type_of(model, inputs)
    return model(**inputs) if sentences is None else predicted(sentences, model, inputs)


def in_type_of(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch whose floats (pictures, sounds, embeddings) are of the type that the model's weights are: that of the
    first one, as transformers' pipelines give them. Many families' first layer casts nothing, and what is computed
    for one model may be given to another in half precision. Labels stay: they meet outputs, not weights."""
    own = _type_of(model)
    return {
        name: value.to(own) if _is_float(value) and own is not None and "label" not in name else value
        for name, value in inputs.items()
    }


def _type_of(model: nn.Module) -> torch.dtype | None:
    """Of a model's first floating weight; an activation's own stay float32 whatever the model is."""
    weights = (
        parameter
        for module in model.modules()
        if not isinstance(module, CollapsibleActivation)
        for parameter in module.parameters(recurse=False)
    )
    return next((weight.dtype for weight in weights if _is_float(weight)), None)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _refuse_wrapped(module: nn.Module, which: str) -> None:
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


def is_peft_model(module: Any) -> bool:
    """Whether a module is a PeftModel."""
    if not type(module).__module__.startswith("peft."):
        return False
    from peft import PeftModel

    return isinstance(module, PeftModel)


def prompt_tokens(model: Any) -> int:
    """How many tokens of its own an adapter (prompt tuning) puts before those of each row."""
    adapters = [wrapper.active_peft_config for wrapper in unwrap(model)[1] if is_peft_model(wrapper)]
    return sum(adapter.num_virtual_tokens for adapter in adapters if adapter.is_prompt_learning)


def config_around(model: nn.Module, path: str) -> Any:
    """The config of the innermost transformers model that the module at a path is in; `None` if it is in none."""
    parts = path.split(".") if path else []
    around = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts) + 1)]
    return next((part.config for part in reversed(around) if isinstance(part, PreTrainedModel)), None)


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` (FSDP2) has sharded a model in place."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def whole_class_of(model: Any) -> type[Any]:
    """The class of a model, also of one that `fully_shard` has given another."""
    if not is_fully_sharded(model):
        return type(model)
    from torch.distributed.fsdp import FSDPModule

    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def base_layer(linear: Any) -> Any:
    """What an adapter wraps, or the linear itself."""
    return linear.get_base_layer() if is_adapted(linear) else linear


def has_adapters(model: nn.Module) -> bool:
    """Whether modules of peft are in a model, around it or not."""
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def is_adapted(linear: Any) -> bool:
    """Whether a linear is under a peft adapter."""
    if not type(linear).__module__.startswith("peft.tuners."):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(linear, BaseTunerLayer)


def part_at(module: Any, path: str) -> Any:
    """The module at a path inside another, by its registered children; `None` where there is none."""
    for part in path.split("."):
        module = children_of(module).get(part)
        if module is None:
            return None
    return module


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters; shared (tied) ones count once, buffers do not."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode that it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go, and where a part of it runs: where the first of accelerate's hooks says, else the
    device of its first parameter."""
    devices = (hook.execution_device for hook in map(align_hook_of, model.modules()) if hook is not None)
    device = next((device for device in devices if device is not None), None)
    return next(model.parameters()).device if device is None else torch.device(device)


def kept_on(part: nn.Module) -> torch.device:
    """Where a linear's weights lie between its calls, and what takes its place waits and stays: in the host's memory
    where accelerate offloads them, also those that it has on a disk; else where it runs."""
    return device_of(part) if offload_hook_of(part) is None else torch.device("cpu")


@contextlib.contextmanager
def weights_present(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Weights that accelerate's hooks keep elsewhere are in memory for a while, where these modules run. They are to
    be read, not changed."""
    with contextlib.ExitStack() as present:
        for module in modules:
            for part in module.modules():
                if has_offloaded_params(part):
                    present.enter_context(align_module_device(part))
        yield


def inputs_of(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """A batch of model inputs on a device.

    Raises:
        ValueError: It is no mapping.
    """
    if not isinstance(batch, Mapping):  # as dicts and BatchEncodings are
        raise ValueError(not_inputs(batch))
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def shorten(names: Iterable[str]) -> list[str]:
    """Names for a message: the first of them, and how many more there are."""
    names = list(names)
    return names if len(names) <= NAMED else [*names[:NAMED], f"and {len(names) - NAMED} more"]


@contextlib.contextmanager
def written_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new path beside a file or folder, which takes its place once all that is done inside has succeeded; else
    nothing is left. A folder whose place is taken must be empty.

    Raises:
        OSError: Nothing can be written there.
    """
    place = Path(path).absolute()
    with tempfile.TemporaryDirectory(prefix=SAVING_PREFIX, dir=place.parent) as folder:
        beside = Path(folder) / place.name
        yield beside
        os.replace(beside, place)
