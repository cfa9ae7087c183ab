# Copyright 2026 The hf_layercollapse authors. Licensed under the Apache License, Version 2.0.
"""What a patched or collapsed model is made of, and how transformers loads it again.

A copy of this file lies in every saved folder, so that `trust_remote_code=True` loads the model where the package is
not installed. It therefore imports torch and transformers only, knows no family of models, and reads one thing: the
*replacement table* in `config.json`, which maps module paths to plain data that says what stands there instead.

Three parts: the modules that a table can name, the table itself, and the registered classes.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, initialization
from transformers.activations import ACT2CLS, ACT2FN
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming
from transformers.dynamic_module_utils import get_class_from_dynamic_module, resolve_trust_remote_code
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import auto_factory, configuration_auto, modeling_auto
from transformers.pytorch_utils import Conv1D
from transformers.utils import ADAPTER_CONFIG_NAME, hub, logging, output_capturing


# Absent on Windows. Not imported in the usual way, which `trust_remote_code` takes for a requirement.
fcntl = importlib.import_module("fcntl") if os.name == "posix" else None

logger = logging.get_logger(__name__)

MODEL_TYPE = "layercollapse"
FORMAT_VERSION = 1
CODE_FILE = os.path.basename(__file__)
# Of folders in which something is being written. The Trainer's pushes of a whole folder pass over names with an
# underscore in front.
SAVING_PREFIX = "_layercollapse-saving-"
OLD_SAVING_PREFIX = ".layercollapse-saving-"  # what earlier versions left when they were killed

# What to do where something is of a newer version than this file. The package is on no index.
INSTALL_NEWER = (
    "Install a newer version of hf_layercollapse: `git pull` and `pip install -e .` in a clone, or a newer wheel."
)

# What a table may ask for at most: far above every real model, far below what would exhaust memory by itself.
MAX_ENTRIES = 100_000
MAX_WIDTH = 2**20
MAX_DEPTH = 32


# ----------------------------------------------------------------------------------------------------
# Upstream: what is used of transformers and torch beyond what they document. Each name stands here and nowhere else,
# with its reason, and is looked for when this file is imported.
# ----------------------------------------------------------------------------------------------------

# What all of it was seen in.
SEEN = "transformers 5.16.1 to 5.24.0, torch 2.8 to 2.13, accelerate 1.13 to 1.15 and peft 0.21 to 0.21.2"


def require(present, name, package):
    """Raises if an upstream name is gone.

    Raises:
        ImportError: `present` is false; the message says what to install.
    """
    if not present:
        raise ImportError(
            f"hf_layercollapse uses `{name}`, which {package.__name__} {package.__version__} does not have, or not as "
            f"it was. Install versions that it was tried with: {SEEN}."
        )


def require_methods(owner, methods, package):
    """Raises if a class has no method of a name, or one with other parameters.

    Args:
        owner (`type`): The upstream class.
        methods (`dict[str, str]`): Name -> its parameters after the first, those that are passed on as they are left
            out at the end.
        package (module): Where it is from.
    """
    for name, parameters in methods.items():
        present = name in dir(owner)
        if present:
            method = inspect.getattr_static(owner, name)
            found = list(inspect.signature(method.__func__ if isinstance(method, classmethod) else method).parameters)
            present = found[1:][: len(parameters.split())] == parameters.split()
        require(present, f"{owner.__name__}.{name}({parameters})", package)


# Overridden by the classes that are built, below.
MODEL_METHODS = {
    # Gives first values to what a checkpoint did not hold; of the model itself, last.
    "_init_weights": "module",
    # The one place where what was missing and left over is known and loading can still fail.
    "_finalize_model_loading": "load_config loading_info",
    # The one place where the model is built, its weights are not read, and their keys can get further names.
    "_load_pretrained_model": "state_dict checkpoint_files load_config",
    # Both read the source of the class's module, which for a built class is this file.
    "_can_set_attn_implementation": "",
    "_can_set_experts_implementation": "",
    # The last that `push_to_hub` does, when the stock card is written; of configs too.
    "_upload_modified_files": "working_dir repo_id files_timestamps commit_message token create_pr",
}
MODULE_METHODS = {
    # `.to(dtype)` goes through it; alphas keep theirs.
    "_apply": "fn recurse",
    # Keys that have no place any more are told of here, by the module whose they were.
    "_load_from_state_dict": "state_dict prefix local_metadata strict missing_keys unexpected_keys error_msgs",
}
require_methods(PreTrainedModel, MODEL_METHODS, transformers)
require_methods(nn.Module, MODULE_METHODS, torch)
# How a family's older checkpoints are read: each gives `(key now, ...)` for a key, and, turned round, the key then.
require_methods(WeightRenaming, {"rename_source_key": "source_key", "reverse_transform": ""}, transformers)


def children_of(module) -> dict:
    """Name -> child, as torch keeps them; what is written into it takes the place of a child.

    `named_children()` leaves out a module that has two names, and those that are `None`. Upstream: `Module._modules`.
    """
    return module._modules


def parameters_of(module) -> dict:
    """Name -> parameter, or `None`, as torch keeps them: a look-up that compilers see through.

    Upstream: `Module._parameters`.
    """
    return module._parameters


require("_modules" in nn.Module().__dict__, "Module._modules", torch)
require("_parameters" in nn.Module().__dict__, "Module._parameters", torch)


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is running. Upstream: `torch._C._are_functorch_transforms_active`, which
    `torch.autograd.Function` asks itself."""
    return torch._C._are_functorch_transforms_active()


require("_are_functorch_transforms_active" in dir(torch._C), "torch._C._are_functorch_transforms_active", torch)


def mark_initialized(module):
    """Says of a module that it has its values, as all modules do that a native model was built with. `init_weights()`
    and `post_init()`, of the model and of any other that it is put into, give first values to every other module.

    Upstream: `_is_hf_initialized`, on modules and, by the loader, on tensors.
    """
    module._is_hf_initialized = True


def is_initialized(tensor) -> bool:
    """Whether a checkpoint gave this tensor; see [`mark_initialized`]."""
    return tensor.__dict__.get("_is_hf_initialized", False)


_marked = torch.ones(1, device="cpu")
mark_initialized(_marked)
require(float(initialization.zeros_(_marked)) == 1.0, "_is_hf_initialized", transformers)


def has_own_adapters(model) -> bool:
    """Whether transformers put peft's adapters into the model: `active_adapters()` raises where there are none.

    Upstream: `PeftAdapterMixin._hf_peft_config_loaded`.
    """
    return model._hf_peft_config_loaded


require("_hf_peft_config_loaded" in dir(PreTrainedModel), "PreTrainedModel._hf_peft_config_loaded", transformers)


def record_outputs(built):
    """Enters a class into the registry by which a model's forward knows what to record (hidden states, attentions).

    Filled by `PreTrainedModel.__init__` only, which a live model that changes its class has behind it. Upstream:
    `output_capturing._CAN_RECORD_REGISTRY`, a dictionary by the name of the class, `_can_record_outputs`. From 5.23 on
    it makes that name of a model by itself; before, anything but a name in it stops `torch.compile` of every model.
    """
    dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(built), built._can_record_outputs)


require(isinstance(output_capturing._CAN_RECORD_REGISTRY, dict), "output_capturing._CAN_RECORD_REGISTRY", transformers)
require("_can_record_outputs" in dir(PreTrainedModel), "PreTrainedModel._can_record_outputs", transformers)


def auto_class_mappings():
    """`[(Auto class for models, its mapping from config classes to model classes)]`.

    Upstream: `auto_factory._BaseAutoModelClass` and its `_model_mapping`; `register` is public, looking up is not.
    """
    found: list[tuple[type, Any]] = []
    for auto_class in list(modeling_auto.__dict__.values()):
        if isinstance(auto_class, type) and issubclass(auto_class, auto_factory._BaseAutoModelClass):
            if auto_class._model_mapping is not None:
                found.append((auto_class, auto_class._model_mapping))
    return found


require("_BaseAutoModelClass" in dir(auto_factory), "auto_factory._BaseAutoModelClass", transformers)
require("_model_mapping" in dir(modeling_auto.AutoModel), "AutoModel._model_mapping", transformers)


def local_of(frame, name, kind):
    """What a function of transformers that is running calls `name`. An error if that is not of this kind: then it is
    written in another way than those that this was tried on, and who calls cannot be told."""
    value = frame.f_locals.get(name)
    if not isinstance(value, kind):
        raise RuntimeError(
            f"`{frame.f_code.co_name}` of transformers {transformers.__version__} has no `{name}` that is a "
            f"{kind.__name__}: what is being saved cannot be told. Install versions that hf_layercollapse was tried "
            f"with: {SEEN}."
        )
    return value


def is_save_pretrained(frame):
    """Whether a frame is of `PreTrainedModel.save_pretrained`."""
    return frame.f_code is PreTrainedModel.save_pretrained.__code__


require("self" in PreTrainedModel.save_pretrained.__code__.co_varnames, "save_pretrained(self)", transformers)
require(
    "model_to_save" in PreTrainedModel.save_pretrained.__code__.co_varnames,
    "`model_to_save` in PreTrainedModel.save_pretrained",
    transformers,
)


# What `PreTrainedModel.save_pretrained` names itself. All else that it is given is for the Hub.
SAVE_OPTIONS = frozenset(inspect.signature(PreTrainedModel.save_pretrained).parameters)
require({"token", "variant"} <= SAVE_OPTIONS, "save_pretrained(token, variant)", transformers)
require_methods(PreTrainedModel, {"should_save_on_this_rank": "is_main_process"}, transformers)


def repository_on_hub(repo_id, tags, token=None, **kwargs):
    """`(full name, card)` of a repository, which is made where there is none; its card is the stock one, tagged, where
    it has none. What `PreTrainedModel.save_pretrained` does with the same arguments for a push, in the middle of the
    save. Upstream: `utils.hub.hf_api`, `create_and_tag_model_card`."""
    given = {} if token is None else {"token": token}
    repo_id = hub.hf_api().create_repo(repo_id, exist_ok=True, **given, **kwargs).repo_id
    return repo_id, hub.create_and_tag_model_card(repo_id, tags, token=token)


require({"hf_api", "create_and_tag_model_card"} <= set(dir(hub)), "utils.hub.create_and_tag_model_card", transformers)


# ----------------------------------------------------------------------------------------------------
# Modules
# ----------------------------------------------------------------------------------------------------


# Elements that a CPU works on at a time, so that the temporaries of a chunk stay in its cache (1 MB in float32;
# whole tensors at once take twice as long).
CHUNK_ELEMENTS = 2**18


def collapsible(pre_activation, activated, alpha, slope, offset):
    """`(1 - alpha) * activated + alpha * line`, where `line = slope * pre_activation + offset`.

    `slope` and `offset` are tensors of shape `(width,)`, or numbers; `(1, 0)` is the paper's identity target, a slope
    of 0 makes a gate constant. Computed as `activated + alpha * (line - activated)`, which gives `activated` bit for
    bit at `alpha = 0` and, for ReLU with the identity target, exactly the PReLU of LayerCollapse (arXiv 2311.17943).
    Half-precision inputs are blended in float32, since alpha is float32; the output has the dtype of `activated`.
    """
    dtype = torch.promote_types(activated.dtype, alpha.dtype)
    line = _line(pre_activation.to(dtype), slope, offset)
    return _toward(activated.to(dtype), line, alpha).to(activated.dtype)


def _line(pre_activation, slope, offset):
    if isinstance(slope, torch.Tensor):
        return torch.addcmul(offset.to(pre_activation.dtype), pre_activation, slope.to(pre_activation.dtype))
    # A gate goes to a constant.
    return pre_activation if _is_one(slope) else offset


def _is_one(slope):
    return not isinstance(slope, torch.Tensor) and slope == 1


def _toward(start, end, alpha):
    return torch.addcmul(start, end - start, alpha.to(start.dtype))


class _CollapsibleFunction(torch.autograd.Function):
    """[`collapsible`] in chunks, keeping only the pre-activation for backward, as GELU and SiLU do.

    Plain arithmetic would keep the difference of line and activation too, a tensor of the size of the input for each
    block, and take three times as long; `torch.utils.checkpoint` keeps the input only, and takes four times as long.
    """

    @staticmethod
    def forward(ctx, pre_activation, alpha, slope, offset, activation, squares):
        ctx.save_for_backward(pre_activation, alpha)
        ctx.line, ctx.activation = (slope, offset), activation
        chunks = (collapsible(z, activation(z), alpha, slope, offset) for z in _chunks(pre_activation))
        return _joined(chunks, pre_activation.shape)

    @staticmethod
    def backward(ctx, grad_output):
        pre_activation, alpha = ctx.saved_tensors
        grad_alphas, squares = [], []
        squared = ctx.needs_input_grad[-1]

        def grad_inputs():
            for z, grad in zip(_chunks(pre_activation), _chunks(grad_output), strict=True):
                grad_input, grad_alpha, square = _gradients(z, grad, alpha, *ctx.line, ctx.activation, squared)
                grad_alphas.append(grad_alpha)
                squares.append(square)
                yield grad_input

        grad_input = _joined(grad_inputs(), pre_activation.shape)
        grad_alpha = sum(grad_alphas).view(alpha.shape).to(alpha.dtype)
        return grad_input, grad_alpha, None, None, None, sum(squares) if squared else None


def _gradients(pre_activation, grad_output, alpha, slope, offset, activation, squared):
    """Those of a chunk: of its pre-activation and, in float32 at least, of alpha, and if wanted the sums of each
    neuron's squares over rows. They have gradients of their own."""
    again = torch.is_grad_enabled()  # a gradient of the gradient is wanted
    with torch.enable_grad():
        pre_activation = (pre_activation if again else pre_activation.detach()).requires_grad_()
        activated = activation(pre_activation)
    (through_activation,) = torch.autograd.grad(activated, pre_activation, grad_output, create_graph=again)
    dtype = torch.promote_types(grad_output.dtype, alpha.dtype)
    grad = grad_output.to(dtype)
    through_line = grad if _is_one(slope) else grad * slope
    grad_input = _toward(through_activation.to(dtype), through_line, alpha)
    difference = _line(pre_activation.to(dtype), slope, offset) - activated.to(dtype)
    if alpha.numel() == 1 and not squared:
        return grad_input.to(pre_activation.dtype), torch.dot(grad.flatten(), difference.flatten()), None
    each = grad * difference
    grad_alpha = each.sum() if alpha.numel() == 1 else each.sum(0)
    return grad_input.to(pre_activation.dtype), grad_alpha, each.square().sum(0) if squared else None


class _SquaresFunction(torch.autograd.Function):
    """The activation's output as it is; the gradient of `squares` is what [`CollapsibleActivation`] says."""

    @staticmethod
    def forward(ctx, output, difference, squares):
        ctx.save_for_backward(difference)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output):
        (difference,) = ctx.saved_tensors
        each = grad_output.to(difference.dtype) * difference
        return grad_output, None, each.reshape(-1, each.shape[-1]).square().sum(0)


def _chunks(tensor):
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows.split(max(1, CHUNK_ELEMENTS // rows.shape[-1])) if tensor.device.type == "cpu" else (rows,)


def _joined(chunks, shape):
    """Chunks of rows as one tensor; each is copied to its place while the cache still has it."""
    first = next(chunks)
    if first.numel() == shape.numel():
        return first.view(shape)
    joined, start = first.new_empty(shape), 0
    rows = joined.view(-1, shape[-1])
    for chunk in itertools.chain([first], chunks):
        rows[start : start + len(chunk)] = chunk
        start += len(chunk)
    return joined


class CollapsibleActivation(nn.Module):
    """An activation that a parameter `alpha` turns linear: 0 is the pretrained activation, 1 a line.

    Plain block: `(1 - alpha) * act(z) + alpha * (slope * z + offset)`, with slope 1 and offset 0 for the `identity`
    target (the PReLU of LayerCollapse, arXiv 2311.17943, when `act` is ReLU) and calibrated per-neuron buffers for the
    `affine` one. Gate of a gated block: `(1 - alpha) * act(g) + alpha * offset`, a constant, since a gate that is only
    linear leaves the block bilinear; offset is 1 for `identity`, calibrated for `affine`.

    `alpha`, `slope` and `offset` stay float32 through `.to(dtype)`; the output has the dtype that `act` gives. Input
    and output have shape `(..., width)`.

    Args:
        native (`nn.Module`): The activation module that stood here. Kept, so that the model can be restored.
        width (`int`): Hidden width of the feed-forward block, the size of the last dimension of the input.
        linear_target (`str`): `"identity"` or `"affine"`.
        granularity (`str`): `"block"` for an alpha of shape `(1,)`, `"neuron"` for one of shape `(width,)`.
        gate (`bool`): Whether this activation is the gate of a gated block.
        act (`str`): `"native"`, or the name of an activation in `transformers.activations.ACT2FN` to use instead.
        alpha (`float`): Initial value, in [0, 1].

    Attributes:
        squares (`torch.Tensor`, *optional*): `(width,)`, float32, a leaf that wants a gradient and belongs to no state
            dict. Where one is set, a backward pass adds to its gradient, per neuron, the sum over tokens of
            `(dL/da_j * (line_j - act_j))^2`: the squared gradients of alphas of single neurons, token by token.
    """

    slope: torch.Tensor
    offset: torch.Tensor
    squares: torch.Tensor | None

    def __init__(
        self,
        native: nn.Module,
        width: int,
        *,
        linear_target: str = "identity",
        granularity: str = "block",
        gate: bool = False,
        act: str = "native",
        alpha: float = 0.0,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.native = native
        self.replacement = None if act == "native" else ACT2FN[act]
        self.act_name, self.linear_target, self.granularity, self.gate = act, linear_target, granularity, gate
        self.width, self.squares = width, None
        shape = (1,) if granularity == "block" else (width,)
        self.alpha = nn.Parameter(torch.full(shape, alpha, dtype=torch.float32, device=device))
        if linear_target == "affine":
            if not gate:
                self.register_buffer("slope", torch.ones(width, dtype=torch.float32, device=device))
            offset = float(gate)
            self.register_buffer("offset", torch.full((width,), offset, dtype=torch.float32, device=device))

    @property
    def act(self) -> nn.Module:
        """The activation in use: a module."""
        return self.native if self.replacement is None else self.replacement

    @property
    def line(self) -> tuple[Any, Any]:
        """`(slope, offset)` of the linear target: tensors of shape `(width,)`, or numbers."""
        if self.linear_target == "affine":
            return (0.0 if self.gate else self.slope), self.offset
        return (0.0, 1.0) if self.gate else (1.0, 0.0)

    @property
    def leaves_constant(self) -> bool:
        """Whether at alpha 1 nothing linear is left of a neuron: lines without slopes, or gates that go to 0."""
        slope, offset = self.line
        factor = offset if self.gate else slope
        return not (factor.any() if isinstance(factor, torch.Tensor) else factor)

    @property
    def spec(self) -> dict[str, Any]:
        """This module as an entry of the replacement table."""
        return {
            "type": "activation",
            "act": self.act_name,
            "linear_target": self.linear_target,
            # What it is as a whole; a process may hold a part of it.
            "alpha_shape": [self.width if self.granularity == "neuron" else 1],
            "width": self.width,
            "gate": self.gate,
        }

    def forward(self, pre_activation: torch.Tensor) -> torch.Tensor:
        act: Any = self.act
        slope, offset = self.line
        in_the_open = (
            # A compiler fuses what it sees, and chooses by itself what to keep for backward.
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            # Forward mode, and batches of gradients, go through plain arithmetic only: `vmap` of what works in chunks,
            # and reads an alpha as a number, is another function.
            or is_transformed()
            # Parameters of the activation itself (PReLU, xIELU) get their gradients from plain autograd only.
            or any(True for _ in act.parameters())
        )
        if is_inplace(act):
            act = functools.partial(_out_of_place, act)
        if not in_the_open:
            return _CollapsibleFunction.apply(pre_activation, self.alpha, slope, offset, act, self.squares)
        activated = act(pre_activation)
        output = collapsible(pre_activation, activated, self.alpha, slope, offset)
        if self.squares is None:
            return output
        with torch.no_grad():
            difference = _line(pre_activation.to(self.alpha.dtype), slope, offset) - activated.to(self.alpha.dtype)
        return _SquaresFunction.apply(output, difference, self.squares)

    def init_weights(self) -> None:
        """Dense values for what a checkpoint did not hold; tensors that it did hold stay."""
        initialization.constant_(self.alpha, 0.0)
        if self.linear_target == "affine":
            initialization.constant_(self.offset, float(self.gate))
            if not self.gate:
                initialization.constant_(self.slope, 1.0)

    def _apply(self, fn, recurse=True):
        # Devices follow the model, dtypes do not: 0.987654 is 0.98828 in bfloat16.
        if recurse:
            for child in self.children():
                child._apply(fn)

        def keep_dtype(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse=False)

    def extra_repr(self) -> str:
        return f"width={self.width}, linear_target={self.linear_target!r}, granularity={self.granularity!r}"


def is_inplace(activation):
    """Whether an activation module writes over its input, as `nn.ReLU(inplace=True)` does."""
    return bool(activation.__dict__.get("inplace", False))


def _out_of_place(activation, pre_activation):
    return activation(pre_activation.clone())


class _Remains(nn.Module):
    """What a collapse left of linears: refuses what an adapter learned on those that it took away.

    peft and `load_state_dict(strict=False)` would drop it without a word.
    """

    # Components of the key of a parameter that a linear has here, `weight` or `up_proj.weight`. Adapters' have more.
    _key_length = 1

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        keys = [key for key in state_dict if key.startswith(prefix) and not self._has_place(key[len(prefix) :])]
        if keys:
            error_msgs.append(adapter_of_another_life(keys))

    def _has_place(self, key):
        first, *rest = key.split(".")
        return first in children_of(self) or len(rest) < self._key_length


class _NoAdapter(_Remains):
    """Where no adapter can be put, though the name may be among those that an adapter asks for."""

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        """As of any module; nothing for peft when it looks for names to put adapters on, so that it passes on."""
        frame = inspect.currentframe().f_back
        while frame.f_code.co_name == "named_modules":  # of the modules around
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith("peft.tuners."):
            return iter(())
        return super().named_modules(memo, prefix, remove_duplicate)


def adapter_of_another_life(keys):
    """What to say of adapter weights without a place."""
    return (
        f"{keys[0]!r} and {len(keys) - 1} more belong to an adapter that was trained before its block was collapsed, "
        "on a layer that is not there any more. Merge the adapter into the model that it was trained on "
        "(`merge_and_unload()`) and collapse that, or train an adapter on the collapsed model."
    )


class CollapsedIdentity(_NoAdapter, nn.Identity):
    """Stands where a collapse took a linear or an activation away; native models have identities of their own."""

    @property
    def spec(self):
        """This module as an entry of the replacement table."""
        return {"type": "identity"}


class CollapsedBlock(_Remains):
    """A feed-forward module that became one linear map: what is left of its children, applied in order.

    The linear map keeps the name that the block's last linear had, and so its key in the state dict; modules that came
    after it in the block (output dropout) follow.
    """

    _key_length = 2

    def __init__(self, children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    @property
    def spec(self):
        """This module as an entry of the replacement table; its linear has one of its own."""
        child, *then = children_of(self)
        return {"type": "block", "child": child, "then": then}

    def forward(self, hidden_states):
        down, *then = children_of(self).values()
        hidden_states = down(_in_dtype_of(down, hidden_states))
        for child in then:
            hidden_states = child(hidden_states)
        return hidden_states


def _in_dtype_of(linear, hidden_states):
    """What goes into a linear that its family keeps in float32 where the rest is float16, as T5 its `wo`: the native
    module does the same. Not where a quantizer or an adapter stands for the linear."""
    weight = parameters_of(linear).get("weight")
    if weight is not None and weight.dtype == torch.float32:
        return hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    return hidden_states


class NarrowFeedForward(_Remains):
    """A feed-forward module in which some channels skip the activation: `down([V x ; act(U x)])`, or
    `down([x ; act(U x)])` where the linear part has full rank. In a gated one only the neurons are gated.

    The linears keep the names, and so the keys, that they had. `up` gives the linear channels first, then the neurons;
    where gate and up were one linear, the gate's outputs come before both.

    Args:
        children (`dict[str, nn.Module]`): The parts under their native names, in order; those after `down` follow it.
        names (`dict[str, str]`): `"up"`, `"activation"`, `"down"` and, where it is a linear of its own, `"gate"`.
        linear_channels (`int`): Channels that skip the activation; the input width means the input itself.
        neurons (`int`): Channels that do not.
        gated (`bool`): Whether the neurons are `act(gate(x)) * up(x)`.
    """

    _key_length = 2

    def __init__(self, children, names, in_features, linear_channels, neurons, gated, act="native"):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.names, self.gated, self.act_name = names, gated, act
        self.in_features, self.linear_channels, self.neurons = in_features, linear_channels, neurons
        used = set(names.values())
        self.then = [name for name in children if name not in used]

    @property
    def form(self):
        """What an entry of the replacement table says of it beside its linears."""
        return {
            "type": "narrow_ffn",
            "part": "block",
            "linear_channels": self.linear_channels,
            "neurons": self.neurons,
            "gated": self.gated,
            "in_features": self.in_features,
            "up": self.names["up"],
            "activation": self.names["activation"],
            "down": self.names["down"],
            "gate": self.names.get("gate"),
            "then": list(self.then),
            "act": self.act_name,
        }

    @property
    def spec(self):
        """This module, its linears included, as an entry of the replacement table."""
        modules, names = children_of(self), self.names
        up, gate = (modules.get(names.get(part)) for part in ("up", "gate"))
        return {
            **self.form,
            "out_features": linear_shape(modules[names["down"]])[1],
            "up_bias": up is not None and up.bias is not None,
            "gate_bias": gate is not None and gate.bias is not None,
        }

    def forward(self, hidden_states):
        modules, names = children_of(self), self.names
        linear = hidden_states
        if self.neurons:
            up = modules[names["up"]](hidden_states)
            gate = None
            if self.gated and "gate" in names:
                gate = modules[names["gate"]](hidden_states)
            elif self.gated:
                gate, up = up[..., : self.neurons], up[..., self.neurons :]
            if self.linear_channels < self.in_features:
                linear, up = up[..., : self.linear_channels], up[..., self.linear_channels :]
            activation = modules[names["activation"]]
            neurons = activation(up) if gate is None else activation(gate) * up
            linear = torch.cat([linear, neurons], dim=-1)
        elif self.linear_channels < self.in_features:
            linear = modules[names["up"]](hidden_states)
        down = modules[names["down"]]
        hidden_states = down(_in_dtype_of(down, linear))
        for name in self.then:
            hidden_states = modules[name](hidden_states)
        return hidden_states

    def extra_repr(self):
        return f"linear_channels={self.linear_channels}, neurons={self.neurons}, gated={self.gated}"


class NarrowActivation(nn.Module):
    """The activation of a narrow feed-forward block whose code runs around it: the first channels pass.

    Args:
        native (`nn.Module`): The activation that stood here.
        linear_channels, neurons (`int`): Channels that pass, and those that do not.
        act (`str`): `"native"`, or the name of an activation in `transformers.activations.ACT2FN` to use instead.
    """

    def __init__(self, native, linear_channels, neurons, act="native"):
        super().__init__()
        self.native = native
        self.replacement = None if act == "native" else ACT2FN[act]
        self.act_name, self.linear_channels, self.neurons = act, linear_channels, neurons

    @property
    def spec(self):
        """This module as an entry of the replacement table."""
        return {
            "type": "narrow_ffn",
            "part": "activation",
            "linear_channels": self.linear_channels,
            "neurons": self.neurons,
            "gated": False,
            "act": self.act_name,
        }

    def forward(self, pre_activation):
        act = self.native if self.replacement is None else self.replacement
        linear, neurons = pre_activation.split([self.linear_channels, self.neurons], dim=-1)
        return torch.cat([linear, act(neurons)], dim=-1)

    def extra_repr(self):
        return f"linear_channels={self.linear_channels}, neurons={self.neurons}"


def _init_pass_on(layer, std=0.02):
    """First values of a layer that passes its input on; tensors that a checkpoint holds stay."""
    initialization.normal_(layer.weight, mean=0.0, std=std)
    if layer.bias is not None:
        initialization.zeros_(layer.bias)


def _spec_of_pass_on(in_features, neurons, bias):
    return {
        "type": "narrow_ffn",
        "part": "up",
        "linear_channels": in_features,
        "neurons": neurons,
        "gated": False,
        "in_features": in_features,
        "bias": bias,
    }


# No subclasses of the linears that they hold the weights of: what puts something in a linear's place, as peft and
# quantizers do, would take `out_features` for the channels that come out.
class PassOnLinear(_NoAdapter):
    """The first linear of a narrow feed-forward block at full rank, whose code runs around it: `[x ; U x + u]`.

    Args:
        in_features, out_features (`int`): Of `U`; `in_features + out_features` channels come out.
        bias (`bool`): Whether there is a `u`.
    """

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.init_weights()

    init_weights = _init_pass_on

    @property
    def spec(self):
        """This module as an entry of the replacement table."""
        return _spec_of_pass_on(self.in_features, self.out_features, self.bias is not None)

    def forward(self, hidden_states):
        neurons = nn.functional.linear(hidden_states, self.weight, self.bias)
        return torch.cat([hidden_states, neurons], dim=-1)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PassOnConv1D(_NoAdapter):
    """[`PassOnLinear`] with the weights of transformers' `Conv1D`.

    Args:
        nf, nx (`int`): Features out of and into the matrix.
    """

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.empty(nf))
        self.init_weights()

    init_weights = _init_pass_on

    @property
    def spec(self):
        """This module as an entry of the replacement table."""
        return _spec_of_pass_on(self.nx, self.nf, True)

    def forward(self, hidden_states):
        neurons = nn.functional.linear(hidden_states, self.weight.T, self.bias)
        return torch.cat([hidden_states, neurons], dim=-1)

    def extra_repr(self):
        return f"nf={self.nf}, nx={self.nx}"


PASS_ON = (PassOnLinear, PassOnConv1D)

# What a collapse leaves of a block in the place of native modules.
REMAINS = (CollapsedIdentity, CollapsedBlock, NarrowFeedForward, NarrowActivation, *PASS_ON)


def spec_of(module):
    """A module as an entry of the replacement table; `None` for one that no entry describes."""
    if isinstance(module, (*REMAINS, CollapsibleActivation)):
        return module.spec
    if isinstance(module, Conv1D):
        return {"type": "conv1d", "in_features": module.nx, "out_features": module.nf}
    if isinstance(module, nn.Linear):
        bias = module.bias is not None
        return {"type": "linear", "in_features": module.in_features, "out_features": module.out_features, "bias": bias}
    return None


# ----------------------------------------------------------------------------------------------------
# The replacement table: data from a file that may be damaged or hostile
# ----------------------------------------------------------------------------------------------------


def _is_integer_from(least):
    return lambda value: type(value) is int and least <= value <= MAX_WIDTH


# What a value must be: (check, how to say it).
_WIDTH = (_is_integer_from(1), f"an integer from 1 to {MAX_WIDTH}")
_COUNT = (_is_integer_from(0), f"an integer from 0 to {MAX_WIDTH}")
_BOOL = (lambda v: isinstance(v, bool), "true or false")
_CHILD = (lambda v: isinstance(v, str), "the name of a child module")
_CHILD_OR_NONE = (lambda v: v is None or isinstance(v, str), "the name of a child module, or null")
_CHILDREN = (lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v), "a list of names of children")
_ACT = (lambda v: v == "native" or (isinstance(v, str) and v in ACT2FN), "'native' or an activation's name")
_TARGET = (lambda v: v in ("identity", "affine"), "'identity' or 'affine'")
_ALPHA_SHAPE = (lambda v: isinstance(v, list) and len(v) == 1 and _WIDTH[0](v[0]), "[1] or [width]")
_PART = (lambda v: isinstance(v, str) and v in _NARROW_PARTS, "'block', 'up' or 'activation'")

# kind -> {key: what its value must be}; a key that may be left out has a value in _DEFAULTS.
_SPECS = {
    "activation": {"act": _ACT, "linear_target": _TARGET, "width": _WIDTH, "alpha_shape": _ALPHA_SHAPE, "gate": _BOOL},
    "linear": {"in_features": _WIDTH, "out_features": _WIDTH, "bias": _BOOL},
    "conv1d": {"in_features": _WIDTH, "out_features": _WIDTH},
    "identity": {},
    "block": {"child": _CHILD, "then": _CHILDREN},
    "narrow_ffn": {"part": _PART, "linear_channels": _COUNT, "neurons": _COUNT, "gated": _BOOL},
}
# What a `narrow_ffn` entry says beside that: the whole of an MLP module, or one part of a block that other code runs
# around (the last linear is a `linear` or `conv1d` there, and so is the first below full rank).
_NARROW_PARTS: dict[str, dict[str, tuple]] = {
    "block": {
        "in_features": _WIDTH,
        "out_features": _WIDTH,
        "up": _CHILD,
        "activation": _CHILD,
        "down": _CHILD,
        "gate": _CHILD_OR_NONE,
        "then": _CHILDREN,
        "up_bias": _BOOL,
        "gate_bias": _BOOL,
        "act": _ACT,
    },
    "up": {"in_features": _WIDTH, "bias": _BOOL},
    "activation": {"act": _ACT},
}
_DEFAULTS = {"gate": False, "then": []}


def validate_layer_collapse(layer_collapse):
    """Checks everything about `config.layer_collapse` that can be checked without a model.

    Raises:
        ValueError: It is not a table of this format version; the message names the entry.
    """
    if not isinstance(layer_collapse, dict):
        raise ValueError(f"`layer_collapse` in config.json must be an object, got {type(layer_collapse).__name__}.")
    version = layer_collapse.get("version")
    if type(version) is not int or version < 1:
        raise ValueError(f"`layer_collapse.version` must be a positive integer, got {version!r}.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"This model was saved in version {version} of the layer_collapse format, and this code reads versions up "
            f"to {FORMAT_VERSION}. {INSTALL_NEWER}"
        )
    if not isinstance(layer_collapse.get("options", {}), dict):
        raise ValueError("`layer_collapse.options` must be an object.")
    part = layer_collapse.get("part")
    if part is not None and not (isinstance(part, str) and part.isidentifier()):
        raise ValueError(f"`layer_collapse.part` must be the name of a model class, got {part!r}.")
    classes = layer_collapse.get("model_classes", {})
    if not isinstance(classes, dict) or not all(isinstance(name, str) for name in classes.values()):
        raise ValueError("`layer_collapse.model_classes` must be an object of Auto classes and names of classes.")
    table = layer_collapse.get("modules")
    if not isinstance(table, dict) or not table:
        raise ValueError("`layer_collapse.modules` must be an object with at least one entry.")
    if len(table) > MAX_ENTRIES:
        raise ValueError(f"`layer_collapse.modules` has {len(table)} entries, the format allows {MAX_ENTRIES}.")
    for path, spec in table.items():
        _validate_entry(path, spec)
    return layer_collapse


def _validate_entry(path, spec):
    entry = f"`layer_collapse.modules[{path!r}]`"
    _validate_path(entry, path)
    if not isinstance(spec, dict):
        raise ValueError(f"{entry}: expected an object, got {type(spec).__name__}.")
    kind = spec.get("type")
    if not isinstance(kind, str) or kind not in _SPECS:
        raise ValueError(f"{entry}: unknown type {kind!r}, expected one of {sorted(_SPECS)}.")
    keys = _SPECS[kind]
    if kind == "narrow_ffn":
        check, expected = _PART
        if not check(spec.get("part")):
            raise ValueError(f"{entry}: `part` of a narrow_ffn must be {expected}, got {spec.get('part')!r}.")
        keys = {**keys, **_NARROW_PARTS[spec["part"]]}
    for key in spec.keys() - {"type", "scope"} - keys.keys():
        raise ValueError(f"{entry}: unknown key {key!r} for type {kind!r}.")
    if spec.get("scope", "base_model") not in ("base_model", "model"):
        raise ValueError(f"{entry}: `scope` must be 'base_model' or 'model', got {spec['scope']!r}.")
    for key, (check, expected) in keys.items():
        value = spec.get(key) if kind == "narrow_ffn" else spec.get(key, _DEFAULTS.get(key))
        if not check(value):
            raise ValueError(f"{entry}: `{key}` must be {expected}, got {value!r}.")
    if kind == "activation" and spec["alpha_shape"] not in ([1], [spec["width"]]):
        raise ValueError(f"{entry}: `alpha_shape` must be [1] or [{spec['width']}], got {spec['alpha_shape']}.")
    if kind == "narrow_ffn":
        _validate_narrow(entry, spec)


def _validate_path(entry, path):
    parts = path.split(".")
    if len(parts) > MAX_DEPTH or not all(part.isidentifier() or part.isdigit() for part in parts):
        raise ValueError(f"{entry}: this is not the path of a module.")
    if any(part.startswith("_") for part in parts):
        raise ValueError(f"{entry}: a path may not go through private attributes.")


def _validate_narrow(entry, spec):
    """What must hold of the values of a narrow_ffn together."""
    channels, width = spec["linear_channels"], spec.get("in_features", MAX_WIDTH)
    if channels + spec["neurons"] < 1 or channels > width:
        raise ValueError(
            f"{entry}: `linear_channels` and `neurons` must not both be 0, and `linear_channels` is at most the "
            f"input width; got {channels} and {spec['neurons']}."
        )
    if spec["part"] != "block" and spec["gated"]:
        raise ValueError(f"{entry}: a gated block is replaced as a whole, by a 'block' part.")
    if spec["part"] == "up" and channels != width:
        raise ValueError(f"{entry}: an 'up' part passes its input on, so `linear_channels` must be {width}.")


def _child(module, name):
    """The registered child, never an attribute: a table must not reach anything but modules."""
    return children_of(module).get(name)


def _module_at(module, path):
    for name in path.split("."):
        module = None if module is None else _child(module, name)
    return module


def _is_scoped_to_model(spec):
    return spec.get("scope", "base_model") == "model"


def _root_of(model, spec):
    """What the path of a table entry begins at."""
    return model if _is_scoped_to_model(spec) else base_model_of(model)


def _has_part(model, path, spec):
    """Whether a model builds the part that an entry belongs to: a T5EncoderModel has no decoder."""
    return _child(_root_of(model, spec), path.split(".")[0]) is not None


def _without_scope(spec):
    return {key: value for key, value in spec.items() if key != "scope"}


_OTHER_TABLE = (
    "The table belongs to another model, or was edited, or a value of the config that its modules come of was changed "
    "(`num_hidden_layers`, say)."
)


def resolve_table(model, table):
    """`[(path, qualified name, native module, spec)]` for the entries that apply to this model, parents first.

    An entry whose first path component is absent belongs to a part that this class does not build (the decoder, in a
    T5EncoderModel) and is passed over.

    Raises:
        ValueError: An entry resolves only partly, or none applies.
    """
    resolved = []
    base_prefix = base_model_prefix_of(model)
    # Parents before children: a `block` keeps the children that further entries replace.
    for path in sorted(table, key=lambda path: path.count(".")):
        spec = table[path]
        first, *rest = path.split(".")
        module = _child(_root_of(model, spec), first)
        if module is None:
            continue
        for part in rest:
            parent, module = module, _child(module, part)
            if module is None:
                raise ValueError(
                    f"`layer_collapse.modules[{path!r}]` does not fit {type(model).__name__}: there is no "
                    f"{part!r} in {type(parent).__name__}. {_OTHER_TABLE}"
                )
        resolved.append((path, ("" if _is_scoped_to_model(spec) else base_prefix) + path, module, spec))
    if not resolved:
        raise ValueError(
            f"No entry of `layer_collapse.modules` applies to {type(model).__name__}; the first is "
            f"{next(iter(table))!r}. {_OTHER_TABLE}"
        )
    return resolved


def resolved_of(model):
    """[`resolve_table`] of a patched or collapsed model and its own table, without layers that it has no more."""
    table = model.config.layer_collapse["modules"]
    found = {path: found_at(_root_of(model, spec), path) for path, spec in table.items()}
    left = {path: spec for path, spec in table.items() if found[path] is not TAKEN_OUT}
    return resolve_table(model, left) if left else []


# In the place of a module: its list of layers is shorter by now, or a collapse took it out of what is around it.
TAKEN_OUT = object()


def found_at(root, path):
    """What stands at a path of a table in a live model, behind what is around it; [`TAKEN_OUT`] where it is not there
    any more, `None` where it is in no part of this class, or behind a module of somebody else's."""
    module = root
    for name in path.split("."):
        module = _inside(module)
        child = _child(module, name)
        if child is None:
            in_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and name.isdigit()
            return TAKEN_OUT if in_list or isinstance(module, REMAINS) else None
        module = child
    return _inside(module)


def _inside(module):
    """A module itself, where an adapter, FSDP or activation checkpointing may have put another around it."""
    while True:
        children = children_of(module)
        if type(module).__module__.startswith("peft."):
            inner = children.get("base_layer", children.get("original_module"))
        else:
            inner = next(iter(children.values())) if [name[:1] for name in children] == ["_"] else None
        if inner is None:
            return module
        module = inner


def _is_described(module, spec):
    """Whether a module is what an entry of a table says."""
    if spec["type"] in ("linear", "conv1d"):
        kind = Conv1D if spec["type"] == "conv1d" else nn.Linear
        return isinstance(module, kind) and linear_shape(module) == (spec["in_features"], spec["out_features"])
    if not isinstance(module, (*REMAINS, CollapsibleActivation)):
        return False
    said = module.form if isinstance(module, NarrowFeedForward) else module.spec
    return all(spec.get(key, _DEFAULTS.get(key)) == value for key, value in said.items())


def standing(model, table):
    """The entries of a table that say what stands in a model. None of one that a native class made from the config of
    a patched or collapsed model: it takes that for one of its own."""
    return {path: spec for path, spec in table.items() if _is_described(found_at(_root_of(model, spec), path), spec)}


def differences(model, table):
    """`(paths, paths, names)`: entries whose layers were taken out of a live model, entries that something else stands
    for, and the qualified names of what a collapse or a patch left that no entry speaks of. All are empty where the
    parts of the model are behind modules that do not tell."""
    taken_out, wrong, spoken_of = [], [], set()
    for path, spec in table.items():
        if not _has_part(model, path, spec):
            continue
        module = found_at(_root_of(model, spec), path)
        if module is None:
            return [], [], []
        if module is TAKEN_OUT:
            taken_out.append(path)
            continue
        # Of what a quantizer put in a linear's place, sizes are not asked.
        plain = spec["type"] not in ("linear", "conv1d") or isinstance(module, (nn.Linear, Conv1D, *REMAINS))
        if plain and not _is_described(module, spec):
            wrong.append(path)
        else:
            spoken_of.update(map(id, module.modules()))
    for part in model.modules():
        # Copies of activations that an adapter trains; models with a table of their own.
        own = part is not model and isinstance(part, LayerCollapseModelMixin)
        if own or type(part).__module__.startswith("peft."):
            spoken_of.update(map(id, part.modules()))
    ours = (*REMAINS, CollapsibleActivation)
    names = [name for name, part in model.named_modules() if isinstance(part, ours) and id(part) not in spoken_of]
    return taken_out, wrong, names


def base_model_of(model):
    """The module that table paths are relative to: the base model, also of a head on top of another head."""
    while isinstance(model, PreTrainedModel) and model.base_model is not model:
        model = model.base_model
    return model


def base_model_prefix_of(model):
    """What the qualified names of the base model's modules begin with: `"bert."`, or nothing."""
    base = base_model_of(model)
    return "" if base is model else next(name for name, module in model.named_modules() if module is base) + "."


def build_module(path, native, spec):
    """The module that a table entry asks for, in place of `native`. Parameters are made on the current device."""
    kind, entry = spec["type"], f"`layer_collapse.modules[{path!r}]`"
    if kind == "identity":
        return CollapsedIdentity()
    if kind == "activation":
        return CollapsibleActivation(
            native,
            spec["width"],
            linear_target=spec["linear_target"],
            granularity="neuron" if spec["alpha_shape"][0] == spec["width"] and spec["width"] > 1 else "block",
            gate=spec.get("gate", False),
            act=spec["act"],
        )
    if kind == "block":
        return CollapsedBlock(_children_named(native, [spec["child"], *spec.get("then", [])], entry))
    if kind == "narrow_ffn":
        return _build_narrow(entry, native, spec)
    native_in, native_out = linear_shape(native, entry)
    # One stores the other's weights transposed, which no shape tells where both are square.
    if (kind == "conv1d") != isinstance(native, Conv1D):
        raise ValueError(f"{entry}: a {kind} does not fit in place of {type(native).__name__}.")
    fits = spec["out_features"] == native_out or spec["in_features"] == native_in
    # A merged map is smaller than the two it came from, so it can be at most about twice its last linear.
    if not fits or spec["in_features"] * spec["out_features"] > 2 * native_in * native_out:
        raise ValueError(
            f"{entry}: a map {spec['in_features']} -> {spec['out_features']} does not fit in place of "
            f"{native_in} -> {native_out}. {_OTHER_TABLE}"
        )
    return _linear_like(native, spec["in_features"], spec["out_features"], spec.get("bias"))


def _children_named(module, names, entry):
    """`{name: child}` for names from a table."""
    missing = [name for name in names if _child(module, name) is None]
    if missing or len(set(names)) != len(names):
        raise ValueError(f"{entry}: {type(module).__name__} has no children {missing or names}.")
    return {name: _child(module, name) for name in names}


def _build_narrow(entry, native, spec):
    if spec["part"] == "activation":
        return NarrowActivation(native, spec["linear_channels"], spec["neurons"], spec["act"])
    if spec["part"] == "up":
        return _build_narrow_up(entry, native, spec)
    return _build_narrow_block(entry, native, spec)


def _build_narrow_up(entry, native, spec):
    neurons = spec["neurons"]
    native_in, native_out = linear_shape(native, entry)
    if spec["in_features"] != native_in or neurons > native_out:
        raise ValueError(
            f"{entry}: {neurons} neurons on {spec['in_features']} inputs do not fit in place of {native_in} -> "
            f"{native_out}. {_OTHER_TABLE}"
        )
    if isinstance(native, Conv1D):
        return PassOnConv1D(neurons, native_in)
    return PassOnLinear(native_in, neurons, bias=spec["bias"])


def _build_narrow_block(entry, native, spec):
    channels, neurons, gated = spec["linear_channels"], spec["neurons"], spec["gated"]
    names = {part: spec[part] for part in ("gate", "up", "activation", "down") if spec[part] is not None}
    modules = _children_named(native, [*names.values(), *spec["then"]], entry)
    width, out = spec["in_features"], spec["out_features"]
    down = modules[names["down"]]
    up_in, _ = linear_shape(modules[names["up"]], entry)
    hidden, down_out = linear_shape(down, entry)
    if (width, out) != (up_in, down_out) or neurons > hidden or (spec["gate"] is not None and not gated):
        raise ValueError(
            f"{entry}: {channels} linear channels and {neurons} neurons, {width} -> {out}, do not fit in place of "
            f"{up_in} -> {hidden} -> {down_out}. {_OTHER_TABLE}"
        )
    # The linear channels first; at full rank they are the input itself. A gate without a linear is in that of up.
    outputs = {"up": (channels if channels < width else 0) + neurons}
    if spec["gate"] is not None:
        outputs["gate"] = neurons
    elif gated:
        outputs["up"] += neurons
    for part, size in outputs.items():
        if size:
            modules[names[part]] = _linear_like(down, width, size, spec[f"{part}_bias"])
        else:
            del modules[names[part]]
    if spec["act"] != "native":
        modules[names["activation"]] = ACT2FN[spec["act"]]
    modules[names["down"]] = _linear_like(down, channels + neurons, out, True)
    return NarrowFeedForward(modules, names, width, channels, neurons, gated, spec["act"])


def _linear_like(like, in_features, out_features, bias):
    """A layer of the class of `like`. Parameters are made on the current device; a `Conv1D` always has a bias."""
    if isinstance(like, Conv1D):
        return Conv1D(out_features, in_features)
    return nn.Linear(in_features, out_features, bias=bias)


def linear_shape(module, what="module"):
    """`(in_features, out_features)` of the matrix of an `nn.Linear`, transformers' `Conv1D`, or what passes on too.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(module, (nn.Linear, PassOnLinear)):
        return module.in_features, module.out_features
    if isinstance(module, (Conv1D, PassOnConv1D)):
        return module.nx, module.nf
    raise ValueError(f"{what}: expected a Linear or Conv1D, found {type(module).__name__}.")


# ----------------------------------------------------------------------------------------------------
# Parts that a family has given another name since a table was written
# ----------------------------------------------------------------------------------------------------

# Classes that families' activations are of, and nothing else that stands beside linears.
ACTIVATIONS = {nn.GELU, *(kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values())}

_NARROW_LINEARS = ("gate", "up", "down")


def follow_renames(model, table):
    """`(table, names)`: the table with the paths that its parts have in this model, which is as its family builds it,
    and `{qualified name of an activation by the table: the one that it has}` where these are not the same.

    Families rename their modules between versions of transformers. Its conversions of older checkpoints, which know
    weights only, say where a linear is by now; an activation is the only one beside the linears that it stood beside.
    What that leaves open is not guessed: the entry stays as it is, for [`resolve_table`] to judge.

    Raises:
        ValueError: Of the entries below one name that is gone only some can be followed.
    """
    lost = [path for path, spec in table.items() if not _fits(model, path, spec)]
    if not lost:
        return table, {}
    renames = _Renames(model, lost)
    found = {path: renames.entry(path, table[path]) for path in lost}
    paths = collections.Counter(found[path][0] if found.get(path) else path for path in table)
    found = {path: entry for path, entry in found.items() if entry and paths[entry[0]] == 1}
    if not found:
        return table, {}
    gone = {_first_of(path, table[path]) for path in found if not _has_part(model, path, table[path])}
    for path in lost:
        if path not in found and _first_of(path, table[path]) in gone:
            raise ValueError(
                f"`layer_collapse.modules[{path!r}]` does not fit {type(model).__name__}: other entries below "
                f"{path.split('.')[0]!r} have another name in transformers {transformers.__version__}, and for this "
                "one none is known. Load the folder with the transformers that it was saved with "
                "(`transformers_version` in its config.json)."
            )
    names = {}
    for path, (now, spec) in found.items():
        before, after = _activation_of(path, table[path]), _activation_of(now, spec)
        if before != after:
            prefix = "" if _is_scoped_to_model(spec) else renames.base_prefix
            names[prefix + before] = prefix + after
    return dict(found.get(path, (path, spec)) for path, spec in table.items()), names


def _first_of(path, spec):
    return path.split(".")[0], _is_scoped_to_model(spec)


def _children_named_by(spec):
    """Key -> name, of the children that an entry names by a key of their own."""
    keys = {"block": ("child",), "narrow_ffn": (*_NARROW_LINEARS, "activation")}.get(spec["type"], ())
    return {key: spec[key] for key in keys if spec.get(key) is not None}


def _fits(model, path, spec):
    """Whether an entry's path, and the children that it names, are in a model."""
    module = _module_at(_root_of(model, spec), path)
    names = [*_children_named_by(spec).values(), *spec.get("then", [])]
    return module is not None and all(_child(module, name) is not None for name in names)


def _activation_of(path, spec):
    """Path of the activation that an entry puts something in the place of, or keeps; `None` if it does neither."""
    if spec["type"] == "activation" or spec.get("part") == "activation":
        return path
    return f"{path}.{spec['activation']}" if spec.get("part") == "block" else None


class _Renames:
    """What a natively built model has for names of an older version of its family, or a newer one."""

    def __init__(self, model, lost):
        self.model, self.base_prefix = model, base_model_prefix_of(model)
        # A family that named its base model wrongly had none: paths began at the whole.
        self.base_name = f"{model.base_model_prefix}."
        self.begins_at_whole = any(path.startswith(self.base_name) for path in lost)
        self.to_now = renamings_of(model)
        # As when it is saved: what changes prefixes does not say whether there was one.
        to_then = [each.reverse_transform() for each in reversed(self.to_now) if not isinstance(each, PrefixChange)]
        now, then = collections.defaultdict(set), collections.defaultdict(set)
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                now[_holder_of(name)].add(_holder_of(name))
                then[_holder_of(_renamed(f"{name}.weight", to_then).removesuffix(".weight"))].add(_holder_of(name))
        # Name of a module, now or then -> those that hold its linears now.
        self.places = {**then, **now}

    def entry(self, path, spec):
        """`(path, spec)` of an entry by the names that its parts have now; `None` if that is not plain."""
        prefix = "" if _is_scoped_to_model(spec) else self.base_prefix
        if self.begins_at_whole and _fits(self.model, path.removeprefix(self.base_name), spec):
            return path.removeprefix(self.base_name), spec
        if self.begins_at_whole and _fits(self.model, path, {**spec, "scope": "model"}):
            return path, {**spec, "scope": "model"}
        name, kind = prefix + path, spec.get("part", spec["type"])
        if kind == "block":
            name, spec = self.block(name, spec)
        elif kind == "activation":
            name = self.activation(name)
        elif kind == "identity":
            name = self.linear(name) or self.activation(name)
        else:
            name = self.linear(name)
        if name is None or not name.startswith(prefix):
            return None
        path = name.removeprefix(prefix)
        return (path, spec) if _fits(self.model, path, spec) else None

    def block(self, name, spec):
        """`(qualified name, spec)` of an MLP module that an entry describes whole: what holds all its parts now."""
        now = {
            key: (self.activation if key == "activation" else self.linear)(f"{name}.{child}")
            for key, child in _children_named_by(spec).items()
        }
        if None in now.values() or len({_holder_of(child) for child in now.values()}) != 1:
            return None, spec
        children = {key: child.rpartition(".")[2] for key, child in now.items()}
        return _holder_of(next(iter(now.values()))), {**spec, **children}

    def linear(self, name):
        """Where a linear of this qualified name is now, or `None`."""
        name = _renamed(f"{name}.weight", self.to_now).removesuffix(".weight")
        return name if isinstance(_module_at(self.model, name), (nn.Linear, Conv1D)) else None

    def activation(self, name):
        """Where an activation of this qualified name is now, or `None`: the only one beside the linears beside it."""
        places = self.places.get(_holder_of(name), ())
        found = [
            f"{place}.{child}" if place else child
            for place in places
            for child, module in children_of(self.model.get_submodule(place)).items()
            if type(module) in ACTIVATIONS
        ]
        return found[0] if len(places) == 1 and len(found) == 1 else None


def renamings_of(model):
    """What transformers renames in older checkpoints of a model, without what it renames for every model."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]


def _holder_of(name):
    return name.rpartition(".")[0]


def _renamed(key, renamings):
    for renaming in renamings:
        key = renaming.rename_source_key(key)[0]
    return key


def renamed_keys(model, names):
    """Key that transformers' conversions give for one of a checkpoint -> key in the model, for the tensors of
    activations that have another name than in the table. The checkpoint may be a base model's or one with a head.
    """
    renamings = renamings_of(model) if names else []
    prefix, keys = base_model_prefix_of(model), {}
    for then, now in names.items():
        in_base = then.removeprefix(prefix)
        for key in [key for key in model.state_dict() if key.startswith(f"{now}.")]:
            for start in {then, in_base, f"{model.base_model_prefix}.{in_base}"}:
                keys[_renamed(start + key.removeprefix(now), renamings)] = key
    return keys


class _RenamedKeys(WeightRenaming):
    """The last of the conversions of a checkpoint: keys of what transformers knows nothing of, by [`renamed_keys`].

    Not turned round when the model is saved, whose table has the names that its modules have.
    """

    __slots__ = ("keys",)

    def __init__(self, keys):
        super().__init__(source_patterns=r"(.+)", target_patterns=r"\1")
        self.keys = keys

    def rename_source_key(self, source_key):
        return self.keys.get(source_key, source_key), None

    def reverse_transform(self):
        return _RenamedKeys({})


def apply_table(model, table):
    """Reshapes a natively built model in place, as the table says; the weights are loaded afterwards."""
    # Activations last: the linears beside them may have become narrower.
    entries = sorted(resolve_table(model, table), key=lambda entry: entry[3]["type"] == "activation")
    for path, _, native, spec in entries:
        # Found anew: an earlier `block` entry may have replaced the parent.
        *above, name = path.split(".")
        parents = [_root_of(model, spec)]
        while above and parents[-1] is not None:
            parents.append(_child(parents[-1], above.pop(0)))
        if parents[-1] is None or name not in children_of(parents[-1]):
            raise ValueError(f"`layer_collapse.modules[{path!r}]`: another entry replaces the module around it.")
        if spec["type"] == "activation":
            _check_activation_width(path, spec["width"], parents)
        children_of(parents[-1])[name] = build_module(path, native, spec)
        # Some families initialise linears from a module around them. What holds nothing but other modules has nothing
        # to initialise by itself, and the linears that it would look for may be gone.
        for container in reversed(parents):
            if isinstance(container, PreTrainedModel) or _holds_tensors(container):
                break
            mark_initialized(container)


def _holds_tensors(module):
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _check_activation_width(path, width, parents):
    """The width of an activation is an output width beside it; anything else is damage, or an attack on memory."""
    beside = next(module for module in reversed(parents) if next(module.parameters(), None) is not None)
    widths = {size for parameter in beside.parameters() for size in parameter.shape}
    if width not in widths:
        raise ValueError(
            f"`layer_collapse.modules[{path!r}]`: `width` is {width}, and no weight beside it has that size: "
            f"{sorted(widths)}. {_OTHER_TABLE}"
        )


def prune_parallel_plans(model):
    """Takes modules that a collapse replaced out of the model's tensor-parallel and FSDP plans: sharding one half of a
    pair of linears whose other half is gone would give wrong results. Where a layer got narrower linears and nothing
    else, its blocks are what they were, and are sharded as before."""
    resolved = resolved_of(model)
    linears = ("linear", "conv1d")
    changed = {_layer_of(name) for _, name, _, spec in resolved if spec["type"] not in ("activation", *linears)}
    replaced = [
        re.sub(r"\d+", "*", name)
        for _, name, _, spec in resolved
        if spec["type"] != "activation" and (spec["type"] not in linears or _layer_of(name) in changed)
    ]
    for prefix, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        start = re.sub(r"\d+", "*", f"{prefix}." if prefix else "")
        gone = tuple(name[len(start) :] for name in replaced if name.startswith(start))
        for plan in (module.tp_plan, module.fsdp_plan):
            for key in [key for key in plan if any(key == name or key.startswith(f"{name}.") for name in gone)]:
                del plan[key]


def _layer_of(name):
    """The innermost numbered module that a module lies in; an empty name if it lies in none."""
    parts = name.split(".")[:-1]
    while parts and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts)


# ----------------------------------------------------------------------------------------------------
# Registered classes: subclasses of the native ones, made on demand
# ----------------------------------------------------------------------------------------------------


# What stands after the mixins in every class that is built.
if TYPE_CHECKING:
    _ConfigBase = PreTrainedConfig
    _ModelBase = PreTrainedModel
else:
    _ConfigBase = _ModelBase = object


@contextlib.contextmanager
def push_to(repo_id: str) -> Iterator[None]:
    """Says what holds where a push is interrupted: a commit is there as a whole or not at all."""
    try:
        yield
    except Exception:
        logger.error(
            f"The push to {repo_id} did not go through. Nothing is lost here; on the Hub a commit is made as a whole "
            "or not at all. Push again to go on: large files that have arrived are not sent a second time."
        )
        raise


class LayerCollapseConfigMixin(_ConfigBase):
    """In front of a native config class: writes the format, and the code that reads it, into every saved folder."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        # `type(model).from_pretrained(folder)` comes here, past `AutoConfig` and `StoredConfig`.
        content, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls._of_ours(content), unused

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return super().from_dict(cls._of_ours(config_dict), **kwargs)

    @classmethod
    def from_json_file(cls, json_file):
        return cls(**cls.get_config_dict(json_file)[0])

    @classmethod
    def _of_ours(cls, content):
        """What a config.json or `to_dict()` holds, with the native model type.

        Raises:
            ValueError: It is a dense model's.
        """
        if content.get("model_type") == MODEL_TYPE:
            return _in_memory(content)
        if "layer_collapse" not in content:
            raise ValueError(
                f"This is the config of a dense model, without `layer_collapse`, and a {cls.__name__} is that of a "
                "patched or collapsed one, as its model class is. Load a dense folder with an Auto class "
                f"(`AutoModelFor….from_pretrained(folder)`, `AutoConfig` for the config alone) or a native class "
                f"(`{cls.native_class.__name__}`)."
            )
        return content

    def to_json_string(self, use_diff=True):
        # Only the file says "layercollapse": in memory `model_type` stays native, since peft, pipelines and weight
        # conversions are keyed on it.
        content = json.loads(super().to_json_string(use_diff=use_diff))
        content["base_model_type"] = content["model_type"]
        content["model_type"] = MODEL_TYPE
        content["auto_map"] = {
            **_own_code(content),
            "AutoConfig": f"{os.path.splitext(CODE_FILE)[0]}.{StoredConfig.__name__}",
        }
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        if self.model_type not in configuration_auto.CONFIG_MAPPING:
            raise ValueError(
                f"`AutoConfig` does not know the model type {self.model_type!r}, so what is saved could not be loaded "
                f"again. Call `AutoConfig.register({self.model_type!r}, {type(self).native_class.__name__})` and "
                "`AutoModel.register` (or that of another Auto class) with the native classes first, here and where "
                "the model is loaded."
            )
        part = _part_being_saved(self)
        if part is not None:
            return _config_of_part(self, part).save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        # Here and not in the model's: `push_to_hub` uploads what this call leaves behind.
        os.makedirs(save_directory, exist_ok=True)
        target = os.path.join(save_directory, CODE_FILE)
        if not (os.path.exists(target) and os.path.samefile(__file__, target)):
            shutil.copyfile(__file__, target)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, **kwargs):
        # The code lies there since before the times were taken.
        times = {name: time for name, time in files_timestamps.items() if name != CODE_FILE}
        return super()._upload_modified_files(working_dir, repo_id, times, **kwargs)

    def to_dict(self):
        caller = inspect.currentframe().f_back
        if not self.name_or_path and _is_adapter_save(caller):
            raise ValueError(
                "The adapter's base model was patched or collapsed in memory and is not saved, so that the adapter "
                "could only name the dense model, or none. Save the base first: "
                "`model.get_base_model().save_pretrained(folder)`, then the adapter."
            )
        content = super().to_dict()
        # Inside another config (a Llava's language model, an EncoderDecoderModel's encoder) the file's type has to be
        # there already: the outer config rebuilds this one from what it finds, and a native type would give it a
        # native model without a word. The outer classes are native, so only the caller tells.
        if _is_nested(self, caller):
            # Configs of the families call it of their parts, and so may their functions and models.
            outer = caller.f_locals.get("self")
            if isinstance(outer, PreTrainedConfig):
                _refuse_fixed_part(outer, self)
            content["base_model_type"] = content["model_type"]
            content["model_type"] = MODEL_TYPE
        return content

    def __reduce_ex__(self, protocol):
        return _empty_config, (type(self).native_class,), self.__dict__


def _is_adapter_save(caller):
    """Whether `config.to_dict()` is called by `PeftModel.save_pretrained`, for the card that it writes first."""
    frames = (caller, caller.f_back)
    return [frame.f_code.co_name for frame in frames if frame] == ["get_model_config", "create_or_update_model_card"]


def _is_nested(config, caller):
    """Whether `config.to_dict()` is called by another config, to become a part of it.

    Nothing else tells: a sub-config is asked with the same call, without arguments, on a copy of it, that peft asks a
    model's own config with, which has to answer with the native type.
    """
    module = caller.f_globals.get("__name__", "")
    if module != PreTrainedConfig.__module__ and not module.startswith("transformers.models."):
        return False
    # What asks a config there is a method of another or its own, but for two that ask for default values.
    if module == PreTrainedConfig.__module__ and caller.f_code.co_name not in ("from_dict", "recursive_diff_dict"):
        local_of(caller, "self", PreTrainedConfig)
    return not isinstance(caller.f_locals.get("self"), type(config))


def config_parts(config, within=""):
    """`[(name, config of a part, whether any model may stand there)]`, of parts of parts too."""
    parts = []
    for name, part in config.__dict__.items():
        if isinstance(part, PreTrainedConfig):
            # Not declared: made from its own model type.
            free = config.sub_configs.get(name, AutoConfig) is AutoConfig
            parts.append((f"{within}{name}", part, free))
            parts += [(inner, inside, free and also) for inner, inside, also in config_parts(part, f"{within}{name}.")]
    return parts


def _part_being_saved(config):
    """The part of a patched or collapsed model that is being saved by itself, with the config of the whole.

    Raises:
        ValueError: They are where they would be in a dense model: this one was made by its native class.
    """
    frame = inspect.currentframe().f_back.f_back
    if not is_save_pretrained(frame):
        return None
    part = local_of(frame, "model_to_save", PreTrainedModel)
    if isinstance(part, LayerCollapseModelMixin) or part.config is not config:
        return None
    if _PLACE not in part.__dict__ and not standing(part, config.layer_collapse["modules"]):
        raise ValueError(
            f"This {type(part).__name__} is dense, and its config describes a patched or collapsed model: what is "
            "saved could not be loaded. `hf_layercollapse.patching.refresh_layer_collapse(model)` gives the model the "
            "config of what it is. For a new model as the config says, use `AutoModelFor….from_config(config)`."
        )
    return part


def _config_of_part(config, part):
    """A config for a part of a model alone: its table is that of the whole below the place of the part; that of the
    whole for the base model, or another head that has its paths."""
    table, kept = config.layer_collapse["modules"], config.layer_collapse
    if _PLACE in part.__dict__:
        place, in_model = part.__dict__[_PLACE]
        below = f"{place}."
        below_it = [path for path in table if path.startswith(below) and _is_scoped_to_model(table[path]) == in_model]
        table = {path.removeprefix(below): _without_scope(table[path]) for path in below_it}
        kept = {**kept, "part": type(part).__name__}
    if not table:
        raise ValueError(
            f"This {type(part).__name__} is a part of a patched or collapsed model, and nothing that the table of the "
            "whole names stands in it. Save the whole, and take the part from it where it is loaded: "
            "`AutoModel.from_pretrained(folder)`."
        )
    alone = copy.deepcopy(config)
    alone.layer_collapse = {**kept, "modules": _table_to_save(part, table)}
    return alone


def _table_to_save(model, table):
    """A table without the layers that were taken out of a live model since.

    Raises:
        ValueError: Nothing else is left, or something is not as the table says.
    """
    taken_out, wrong, names = differences(model, table)
    left = {path: spec for path, spec in table.items() if path not in taken_out}
    if wrong or names or (taken_out and not any(_has_part(model, path, spec) for path, spec in left.items())):
        _refuse_other_layers(model, [*wrong, *names, *taken_out])
    return left


def _refuse_other_layers(model, where):
    """Raises if there is anything in which a live model is not what its table says."""
    if where:
        raise ValueError(
            f"`{where[0]}` of this {type(model).__name__} is not what its config describes: layers that were patched "
            "or collapsed have been taken out, put in, or have changed places. What is saved could not be loaded. "
            "`hf_layercollapse.patching.refresh_layer_collapse(model)` gives the model the config of what it is."
        )


# Where a part that is a model stands in the whole whose config it has: (path, whether it begins at the whole and not
# at the base model). An encoder and a decoder may be of one shape, so that no table tells whose it is.
_PLACE = "place_in_layer_collapse"


def tell_places(model):
    """Tells the models inside a patched or collapsed one where they stand, for when one of them is saved by itself."""
    base, prefix = base_model_of(model), base_model_prefix_of(model)
    for name, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        if base_model_of(part) is base:  # paths begin there
            part.__dict__.pop(_PLACE, None)
        else:
            part.__dict__[_PLACE] = (name.removeprefix(prefix), not name.startswith(prefix))


def _refuse_fixed_part(outer, config):
    """Raises if a config says of its part that it is patched or collapsed, and its model does not look at that."""
    for name, part, free in config_parts(outer):
        if not free and type(part) is type(config) and part.layer_collapse == config.layer_collapse:
            raise ValueError(
                f"`{name}` of this {type(outer).__name__} describes a patched or collapsed model, and the model of a "
                f"{type(outer).__name__} has a native {type(config).native_class.__name__} model there whatever it "
                "says. " + PATCH_THE_WHOLE
            )


PATCH_THE_WHOLE = (
    'Patch or collapse the whole, naming the part: `LayerCollapseConfig(blocks="vision_model")`. Or, if the part is '
    "patched or collapsed already, put it in its place in the whole model, give the whole its native config, and call "
    "`hf_layercollapse.patching.refresh_layer_collapse(model)`: then the whole carries its table."
)


# (thread, table) of the models whose constructor is running.
_under_construction: list[tuple[int, dict]] = []


class LayerCollapseModelMixin(_ModelBase):
    """In front of a native model class: builds the native model, reshapes it by the table, and loads strictly."""

    # What `push_to_hub` is given while it runs.
    _model_card = None
    # What a model was called before it was patched or collapsed in memory: where its tokenizer is.
    native_name_or_path = ""
    # Keys of the state dict that the table made, in a model that was built by it.
    _table_keys: frozenset[str] = frozenset()
    # Keys in the checkpoint of a table whose paths are of another transformers -> keys of the state dict.
    _renamed_keys: dict[str, str] = {}

    def __init__(self, config=None, *args, **kwargs):
        if not isinstance(config, LayerCollapseConfigMixin):
            raise TypeError(
                f"This {type(self).__name__} is patched or collapsed as its config says, and a "
                f"{type(config).__name__} says nothing of that. Pass the config of a patched or collapsed model, or "
                "use the native class."
            )
        table = validate_layer_collapse(config.layer_collapse)["modules"]
        running = (threading.get_ident(), table)
        if running in _under_construction:
            # A part that its whole builds from the config of the whole; the paths are the whole's.
            super().__init__(config, *args, **kwargs)
            return
        _under_construction.append(running)
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            _under_construction.remove(running)
        table, names = self._follow_renames(table)
        apply_table(self, table)
        self._renamed_keys = renamed_keys(self, names)
        prefixes = tuple(f"{name}." for _, name, _, _ in resolve_table(self, table))
        self._table_keys = frozenset(key for key in self.state_dict() if key.startswith(prefixes))
        tell_places(self)
        prune_parallel_plans(self)
        self.init_weights()

    def _follow_renames(self, table):
        """As [`follow_renames`]; the configs of the model and of its parts say from here on what it is now."""
        followed, names = follow_renames(self, table)
        if followed is not table:
            _exchange_table(self, table, followed)
        return followed, names

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        # An Auto class passes the config, and knows no code in a folder of a type that is registered.
        if isinstance(config, LayerCollapseConfigMixin):
            own = _class_of_own(cls, config, pretrained_model_name_or_path, kwargs)
            if own is not cls:
                return own.from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    @classmethod
    def is_custom_code(cls):
        # Weight conversions (ViT's renamed layers, Mixtral's experts) are skipped for custom code.
        return cls.native_class.is_custom_code()

    @classmethod
    def _can_set_attn_implementation(cls):
        return cls.native_class._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls):
        return cls.native_class._can_set_experts_implementation()

    def _init_weights(self, module):
        if module is self:
            # Comes last, and also where this model is loaded as a part of another, whose native class does not check.
            refuse_uninitialised(self)
            # Not when their turn comes: parts of a model are initialised by their native classes, which do not know
            # these. What a checkpoint gave stays.
            std = self.config.__dict__.get("initializer_range") or 0.02
            for part in self.modules():
                if isinstance(part, CollapsibleActivation):
                    part.init_weights()
                elif isinstance(part, PASS_ON):
                    part.init_weights(std)
        super()._init_weights(module)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        if model._renamed_keys:
            conversions = [*(load_config.weight_mapping or []), _RenamedKeys(model._renamed_keys)]
            load_config = dataclasses.replace(load_config, weight_mapping=conversions)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        refuse_incomplete(model, loading_info)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def load_adapter(self, *args, **kwargs):
        loading_info = super().load_adapter(*args, **kwargs)
        prefixes = tuple(f"{name}." for _, name, _, spec in resolved_of(self) if spec["type"] != "activation")
        keys = [key for key in sorted(loading_info.unexpected_keys) if key.startswith(prefixes)]
        if keys:
            raise ValueError(adapter_of_another_life(keys))
        return loading_info

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        # Inside another model that is being saved: its native class asks nothing else of its parts.
        if prefix:
            _check_part_being_saved(self, prefix)
        return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def save_pretrained(
        self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, max_shard_size="50GB", **kwargs
    ):
        """As `PreTrainedModel.save_pretrained`, and safe to interrupt.

        Everything is written into a folder beside the old files, then moved in, `config.json` last: a save that is
        interrupted leaves the old model whole or a folder that does not load. Of several that save into one folder at
        a time, the last one's model is there as a whole, where the file system has locks.

        With `push_to_hub`, what was saved is uploaded once it is there. A README.md in the folder stays as it is: the
        repository keeps its own card, or gets the stock one.

        Raises:
            ValueError: The folder holds an adapter, and the model has none: it would be loaded with that on top. Or
                layers of the model have changed places since it was patched or collapsed.
        """
        _refuse_lost_table(self)
        _refuse_lost_base(self)
        _refuse_adapter_of_another(self, save_directory)
        _follow_layers_taken_out(self)
        if state_dict is None and not has_own_adapters(self):
            state_dict = state_dict_without_adapters(self)
        kwargs |= {"state_dict": state_dict, "max_shard_size": max_shard_size}
        if kwargs.get("distributed_checkpoint", False) or os.path.isfile(save_directory):
            return super().save_pretrained(save_directory, is_main_process, push_to_hub=push_to_hub, **kwargs)
        for_hub = {key: kwargs.pop(key) for key in kwargs.keys() - SAVE_OPTIONS}
        if not self.should_save_on_this_rank(is_main_process):
            # Takes part in gathering sharded weights, writes nothing.
            super().save_pretrained(save_directory, is_main_process=False, **kwargs)
            self._name_if_new(os.fspath(save_directory))
            return

        os.makedirs(save_directory, exist_ok=True)
        times = _times_of_files(save_directory) if push_to_hub else {}
        if has_own_adapters(self):
            for adapter in self.peft_config.values():
                # Added before the model was saved.
                adapter.base_model_name_or_path = adapter.base_model_name_or_path or self.name_or_path
            super().save_pretrained(save_directory, **kwargs)
        else:
            with _folder_beside(save_directory) as beside:
                super().save_pretrained(beside, **kwargs)
                with _lock(save_directory):
                    _move_in(beside, save_directory, kwargs.get("variant"))
            self._name_if_new(os.fspath(save_directory))
        if push_to_hub:
            for_hub.setdefault("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self._push_saved(os.fspath(save_directory), times, token=kwargs.get("token"), **for_hub)

    def _push_saved(self, folder, times, repo_id, commit_message=None, create_pr=False, token=None, **kwargs):
        """What `PreTrainedModel.save_pretrained` does for the Hub, with a folder that is whole: uploads what is new
        there since `times`. Further arguments are those of `create_repo`."""
        tags = dict.fromkeys([*(self.model_tags or []), MODEL_TYPE])
        with push_to(repo_id):
            repo_id, card = repository_on_hub(repo_id, list(tags), token, **kwargs)
            with _card_in(folder, card):
                # Nor what somebody else is saving there at the moment.
                saving = [name for name in os.listdir(folder) if name.startswith(SAVING_PREFIX)]
                times = {**times, **dict.fromkeys(saving, math.inf)}
                self._upload_modified_files(
                    folder, repo_id, times, commit_message=commit_message, token=token, create_pr=create_pr
                )

    def push_to_hub(self, repo_id, *args, model_card=None, **kwargs):
        """As `PreTrainedModel.push_to_hub`, with a card.

        Args:
            model_card (`huggingface_hub.ModelCard`, *optional*): Becomes the repository's README.md, in the commit of
                the weights. Default: the card that is there already, else the stock one.
        """
        # Before there is a repository.
        _refuse_lost_table(self)
        _refuse_lost_base(self)
        _follow_layers_taken_out(self)
        name = self.name_or_path
        tags = kwargs.pop("tags", None) or []
        kwargs["tags"] = [*([tags] if isinstance(tags, str) else tags), MODEL_TYPE]
        self._model_card = model_card
        try:
            with push_to(repo_id):
                result = super().push_to_hub(repo_id, *args, **kwargs)
        finally:
            del self._model_card
            # Not after the temporary folder that was uploaded from.
            self.name_or_path = self.config.name_or_path = name
        # A name stands for the main branch.
        if not kwargs.get("create_pr") and kwargs.get("revision") in (None, "main"):
            self._name_if_new(result.repo_url.repo_id)
        return result

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        if self._model_card is not None:
            self._model_card.save(os.path.join(working_dir, "README.md"))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _name_if_new(self, name):
        # A folder of an adapter is no folder of the model.
        if not self.name_or_path and not has_own_adapters(self):
            self.name_or_path = self.config.name_or_path = name

    def __reduce_ex__(self, protocol):
        return _empty_model, (type(self).native_class, type(self).config_class.native_class), self.__dict__


def _exchange_table(model, table, now):
    """Gives the configs of a model and of its parts another table in the place of one."""
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    for config in configs.values():
        stored = config.__dict__.get("layer_collapse")
        if stored is not None and stored["modules"] == table:
            # Names of blocks are of then too; what was chosen is what the table holds.
            options = {key: value for key, value in stored.get("options", {}).items() if key != "blocks"}
            config.layer_collapse = {**stored, "options": options, "modules": now}


def _follow_layers_taken_out(model):
    """Takes layers that were taken out of a model out of its table: a native model saves then, and loads."""
    table = model.config.layer_collapse["modules"]
    left = _table_to_save(model, table)
    if left.keys() != table.keys():
        _exchange_table(model, table, left)


def _refuse_lost_table(model):
    """Raises if the config of a patched or collapsed model has been replaced by one that says nothing of that."""
    if not isinstance(model.config, LayerCollapseConfigMixin):
        raise ValueError(
            f"This {type(model).__name__} is patched or collapsed, and its config has been replaced by a "
            f"{type(model.config).__name__} that says nothing of that: what is saved would be loaded as another "
            "model. Give it its own config back (a base model inside may still have it: `model.config = "
            "model.base_model.config`), and set values in that one: `model.config.id2label = …`."
        )


def _refuse_lost_base(model):
    """Raises if only adapters would be saved of a model that is nowhere, and that they could not name."""
    if has_own_adapters(model) and not model.name_or_path:
        raise ValueError(
            "The model was patched or collapsed in memory and is not saved, and with adapters of `add_adapter` in it "
            "only these are saved: they could only name the dense model, or none. Save the model first: "
            "`model.save_pretrained(folder)`, then `model.add_adapter(config)`. Where they are in it already: "
            "`base = copy.deepcopy(model)`, `base.delete_adapter(list(base.peft_config))`, "
            "`base.save_pretrained(folder)`, then `model.name_or_path = folder`."
        )


def _refuse_adapter_of_another(model, folder):
    """Raises if a model without adapters is being saved into the folder of one, with which it would be loaded: what
    an adapter learned would count twice where it was merged. A base whose adapter lies beside it has that in it."""
    file = os.path.join(folder, ADAPTER_CONFIG_NAME)
    if not os.path.isfile(file) or any(type(module).__module__.startswith("peft.") for module in model.modules()):
        return
    with open(file, encoding="utf-8") as stream:
        # Prompts are no part of the base, and cannot be merged into it.
        if '"num_virtual_tokens"' in stream.read():
            return
    raise ValueError(
        f"{file} is of an adapter, and this {type(model).__name__} has none: it would be loaded from there with that "
        "adapter on top, a second time where it has been merged. Save into another folder; or, if the adapter is not "
        "needed any more, delete its files (`adapter_config.json`, `adapter_model.safetensors`) first."
    )


def _check_part_being_saved(model, prefix):
    """Raises if a larger model is being saved with this one in it, and its config does not say so: it would come back
    with a native part, and the weights of that part lost or misread. Where it does, it warns: the class and the config
    of the whole are native and write no code."""
    frame = inspect.currentframe().f_back
    while frame is not None and not is_save_pretrained(frame):
        frame = frame.f_back
    if frame is None:
        return
    outer = local_of(frame, "self", PreTrainedModel)
    _refuse_lost_table(model)
    if outer is model or _names_all_of(outer, model, prefix):
        return
    _refuse_other_layers(model, sum(differences(model, model.config.layer_collapse["modules"]), []))
    what = f"`{prefix.removesuffix('.')}` of this {type(outer).__name__} is patched or collapsed"
    wanted = model.config.layer_collapse
    if wanted not in [part.__dict__.get("layer_collapse") for _, part, free in config_parts(outer.config) if free]:
        raise ValueError(
            f"{what}, and the config of the whole does not say so: what is saved would come back as a native model. "
            f"{PATCH_THE_WHOLE}"
        )
    logger.warning(
        f"{what} as a model of its own. What is saved is whole, and loads where hf_layercollapse is imported; not "
        "with `trust_remote_code=True`, since a whole of this kind writes no code. For a folder that loads in both "
        "ways call `hf_layercollapse.patching.refresh_layer_collapse(model)` before: the whole has the table then."
    )


def _names_all_of(outer, part, prefix):
    """Whether a model's own table names all that the table of its part does, as where a head makes its base model from
    the config of the whole."""
    if not isinstance(outer, LayerCollapseModelMixin):
        return False
    own = _specs_of(outer)
    return all(own.get(f"{prefix}{name}") == spec for name, spec in _specs_of(part).items())


def _specs_of(model):
    """Qualified name -> spec without its scope, of what a model's table says."""
    return {name: _without_scope(spec) for _, name, _, spec in resolved_of(model)}


def state_dict_without_adapters(model):
    """What a model's state dict was before peft put layers around its own; `None` if it has not.

    Those layers would otherwise be saved under their own names, which nothing loads.
    """
    outer = {name: module for name, module in model.named_modules() if type(module).__module__.startswith("peft.")}
    children = {f"{name}.{child}": name for name in outer for child in ("base_layer", "original_module")}
    children = {f"{child}.": f"{name}." for child, name in children.items()}
    if not outer:
        return None
    state_dict = {}
    for key, tensor in model.state_dict().items():
        inside = [name for name in outer if key.startswith(f"{name}.")]
        kept = [child for child in children if key.startswith(child)]
        if not inside or kept:
            for child in sorted(kept, key=len, reverse=True):
                key = children[child] + key.removeprefix(child)
            state_dict[key] = tensor
    return state_dict


def _times_of_files(folder):
    """Name -> when it was changed last, of what lies in a folder, but for what is being saved there."""
    with _lock(folder), os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_mtime for entry in entries if not entry.name.startswith(SAVING_PREFIX)}


@contextlib.contextmanager
def _card_in(folder, card):
    """A card as README.md while the folder is uploaded. It stays, unless there was one."""
    file = os.path.join(folder, "README.md")
    own = None
    if os.path.exists(file):
        with open(file, "rb") as stream:
            own = stream.read()
    try:
        card.save(file)
        yield
    finally:
        if own is not None:
            with open(file, "wb") as stream:
                stream.write(own)


@contextlib.contextmanager
def _lock(folder, wait=True):
    """Holds the lock of a folder, which a process that ends leaves free. Gives whether it is held: not where the
    system or the file system has no locks, nor, without `wait`, where somebody else holds it.
    """
    if fcntl is None:
        yield False
        return
    held, descriptor = False, os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        yield held
    finally:
        if held:
            # Closing would not do: a process that was forked meanwhile has the descriptor too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextlib.contextmanager
def _folder_beside(folder):
    """A temporary folder in `folder`, locked while it is in use; what saves that were killed left there is removed."""
    with contextlib.ExitStack() as in_use:
        with _lock(folder) as alone:
            # Without locks, what somebody is saving at the moment looks the same.
            prefixes = (SAVING_PREFIX, OLD_SAVING_PREFIX)
            left = [name for name in os.listdir(folder) if alone and name.startswith(prefixes)]
            for path in (os.path.join(folder, name) for name in left):
                with _lock(path, wait=False) as nobody_saves:
                    if nobody_saves:
                        shutil.rmtree(path)
            beside = tempfile.mkdtemp(prefix=SAVING_PREFIX, dir=folder)
            in_use.enter_context(_lock(beside))
        try:
            yield beside
        finally:
            with _lock(folder):
                shutil.rmtree(beside)


def _move_in(source, target, variant):
    """Moves the files of a finished save into a folder that may hold another model."""
    config_file = os.path.join(target, "config.json")
    # From here on the folder does not load, until the new config.json is there.
    if os.path.exists(config_file):
        os.remove(config_file)
    # Weights of the model that was here. A whole file would be read before new shards, old shards would be left over.
    tag = f".{re.escape(variant)}" if variant else ""
    stale = re.compile(rf"model{tag}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{tag}\.json")
    for name in os.listdir(target):
        if stale.fullmatch(name):
            os.remove(os.path.join(target, name))
    for name in sorted(os.listdir(source), key=lambda name: name == "config.json"):
        os.replace(os.path.join(source, name), os.path.join(target, name))


def refuse_incomplete(model, loading_info):
    """Raises if the checkpoint and the modules of the replacement table do not match exactly.

    A native model with missing weights warns and goes on with random ones; for an alpha or a merged matrix that would
    be a different model.
    """
    resolved = resolved_of(model)
    prefixes = tuple(f"{name}." for _, name, _, _ in resolved)
    # A base model's checkpoint in a head model, or the other way round: what found no place keeps its own prefix.
    paths = [path for path, _, _, spec in resolved if not _is_scoped_to_model(spec)]
    foreign = tuple(f"{prefix}{path}." for path in paths for prefix in ("", f"{model.base_model_prefix}."))
    problems = [f"missing: {key}" for key in sorted(loading_info.missing_keys) if key.startswith(prefixes)]
    problems += [
        f"unexpected: {key}" for key in sorted(loading_info.unexpected_keys) if key.startswith(prefixes + foreign)
    ]
    problems += [
        f"{key}: {tuple(found)} in the checkpoint, {tuple(expected)} in the table"
        for key, found, expected in sorted(loading_info.mismatched_keys)
        if key.startswith(prefixes)
    ]
    # Of a part that this class does not build, whose entries are passed over, no key is missing and no module there.
    passed = set(model.config.layer_collapse["modules"]) - {path for path, _, _, _ in resolved}
    problems += [f"missing: {key}" for key in sorted(loading_info.missing_keys) if _named_in(passed, key)]
    problems += [
        f"unexpected: {key}"
        for key in sorted(loading_info.unexpected_keys)
        if _module_at(model, _holder_of(_named_in(passed, key))) is not None
    ]
    _refuse_checkpoint(model, problems)


def _named_in(paths, key):
    """Name of the module around a key's tensor that ends with one of these paths, or `""`."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        if any(".".join(parts[start:end]) in paths for start in range(end)):
            return ".".join(parts[:end])
    return ""


def refuse_uninitialised(model):
    """Raises if a model that is being loaded has tensors of its table that no checkpoint gave.

    What is loaded carries transformers' mark for it, and a model that is only built has none. What a quantizer added
    to what the table made, or put in its place, is the quantizer's.
    """
    tensors = model.state_dict(keep_vars=True)
    if any(_is_loaded(tensor) for tensor in tensors.values()):
        made = {key: tensors[key] for key in sorted(model._table_keys) if key in tensors}
        _refuse_checkpoint(model, [f"missing: {key}" for key, tensor in made.items() if not _is_loaded(tensor)])


def _is_loaded(tensor):
    # What lies on a disk is on the meta device by now, and nothing else is.
    return is_initialized(tensor) or tensor.device.type == "meta"


def _refuse_checkpoint(model, problems):
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(
            f"The checkpoint of this {type(model).__name__} does not hold what its layer_collapse table describes:\n"
            f"  {shown}\nThe folder is damaged or mixed from two models; load a complete copy."
        )


def _in_memory(content):
    """What a config.json of the format holds, with the native model type, checked."""
    base_model_type = content.get("base_model_type")
    known = isinstance(base_model_type, str) and base_model_type in configuration_auto.CONFIG_MAPPING
    if not known or base_model_type == MODEL_TYPE:
        raise ValueError(
            f"`base_model_type` in config.json must name a model type that transformers knows, got "
            f"{base_model_type!r}. If it is newer than this transformers, upgrade with "
            "`pip install -U transformers`; if it is of your own, call `AutoConfig.register` first."
        )
    validate_layer_collapse(content.get("layer_collapse"))
    own_code = _own_code(content)
    content = {key: value for key, value in content.items() if key not in ("base_model_type", "auto_map")}
    return {**content, "model_type": base_model_type, **({"auto_map": own_code} if own_code else {})}


def _own_code(content):
    """The entries of a config's `auto_map` that name model classes which lie in the folder as code."""
    auto_map, classes = content.get("auto_map"), content["layer_collapse"].get("model_classes", {})
    return {auto: auto_map[auto] for auto in classes if auto in auto_map} if isinstance(auto_map, dict) else {}


class StoredConfig(PreTrainedConfig):
    """What `model_type: layercollapse` in a config.json resolves to. Never instantiated: it makes the real one."""

    model_type = MODEL_TYPE

    def __new__(cls, *args, **kwargs):
        # Another config makes its parts by calling the class that CONFIG_MAPPING gives for their model type.
        return cls.from_dict(kwargs) if kwargs else super().__new__(cls)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        config_dict = _in_memory(config_dict)
        native_class = configuration_auto.CONFIG_MAPPING[config_dict["model_type"]]
        built = config_class_for(native_class)
        _register(native_class, built)  # again: a user may have registered models since
        part = config_dict["layer_collapse"].get("part")
        if part is not None:
            built = _config_class_for_part(native_class, part)
        return built.from_dict(config_dict, **kwargs)


_built: dict[Any, type] = {}
# The same classes, from before transformers' registries know them.
_made: dict[Any, type] = {}


def _once(key, make, register):
    """The class that `make()` gave first, in whichever thread, and only once `register` has been through with it."""
    if key not in _built:
        made = _made.setdefault(key, make())
        # Whoever is first may not be through yet.
        register(made)
        _built[key] = made
    return _built[key]


def native_class_of(model_or_config):
    """The class of a model or a config in its dense form."""
    ours = isinstance(model_or_config, (LayerCollapseModelMixin, LayerCollapseConfigMixin))
    return type(model_or_config).native_class if ours else type(model_or_config)


def config_class_for(native_class):
    """The config class of patched and collapsed models whose dense form uses `native_class`; made on first use.

    Its model classes are registered under every Auto class that knows the native config, and so are the tokenizers
    and processors of the family.
    """
    if issubclass(native_class, LayerCollapseConfigMixin):
        return native_class

    def make():
        namespace = {"__module__": __name__, "native_class": native_class, "__annotations__": {}}
        return type(f"LayerCollapse{native_class.__name__}", (LayerCollapseConfigMixin, native_class), namespace)

    return _once(native_class, make, lambda built: _register(native_class, built))


def _config_class_for_part(native_class, name):
    """The config class of a part that was saved by itself: an encoder, which `AutoModel` does not know."""
    base = dict(auto_class_mappings())[modeling_auto.AutoModel][native_class]
    module = importlib.import_module((base[0] if isinstance(base, (tuple, list)) else base).__module__)
    part = module.__dict__.get(name)
    if not (isinstance(part, type) and issubclass(part, PreTrainedModel) and part.__module__ == module.__name__):
        raise ValueError(f"`layer_collapse.part` in config.json is {name!r}, which {module.__name__} does not have.")

    def make():
        whole = config_class_for(native_class)
        return type(whole.__name__, (whole,), {"__module__": __name__, "__annotations__": {}})

    def register(alone):
        modeling_auto.AutoModel.register(alone, model_class_for(part, alone), exist_ok=True)

    return _once((native_class, part), make, register)


def model_class_for(native_class, config_class):
    """The model class of patched and collapsed models whose dense form is `native_class`; made on first use.

    It keeps the native name: `pipeline`, `architectures`, `loss_type` and weight conversions are keyed on it.
    """
    if issubclass(native_class, LayerCollapseModelMixin):
        return native_class

    def make():
        namespace = {
            # Of a class of the user's own, `save_pretrained` copies the file of its module.
            "__module__": __name__ if is_native(native_class) else native_class.__module__,
            # With the module of the native class: what is keyed by a class's name keeps namesakes apart.
            "__qualname__": f"{native_class.__module__}.{native_class.__qualname__}",
            "__doc__": native_class.__doc__,
            "__init__": _constructor_of(native_class),
            "native_class": native_class,
            "config_class": config_class,
        }
        # Whether a class can generate is looked up by name among its own bases.
        mixins = [base for base in native_class.__bases__ if not issubclass(base, PreTrainedModel)]
        bases = (LayerCollapseModelMixin, native_class, *mixins)
        return type(native_class.__name__, bases, namespace)

    # Some native classes serve several configs.
    return _once((native_class, config_class), make, record_outputs)


def _constructor_of(native_class):
    """`__init__` of a built class, with the signature and the docstring of the native one."""

    @functools.wraps(native_class.__init__)
    def __init__(self, *args, **kwargs):
        LayerCollapseModelMixin.__init__(self, *args, **kwargs)

    return __init__


def __getattr__(name):
    """The class of patched and collapsed models by the name of its native one: in this module, an adapter without a
    `task_type` says, is the class of its base, and AutoPeft looks it up.
    """
    if not name.startswith("_") and name in dir(transformers):
        native = getattr(transformers, name)
        if isinstance(native, type) and issubclass(native, PreTrainedModel) and native.config_class is not None:
            return model_class_for(native, config_class_for(native.config_class))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_native(native_class):
    """Whether a class is transformers' own, which every process knows, and not of the user's code."""
    return native_class.__module__.startswith("transformers.")


def native_models_of(native_config):
    """`[(Auto class, its native model classes, whether it has several)]`, for the Auto classes that know a config."""
    found = []
    for auto_class, mapping in auto_class_mappings():
        if native_config not in mapping:
            continue
        try:
            native_models = mapping[native_config]
        except ValueError:  # transformers names a class there that it does not have
            continue
        several = isinstance(native_models, (list, tuple))
        found.append((auto_class, tuple(native_models) if several else (native_models,), several))
    return found


def _register(native_config, built_config):
    for auto_class, native_models, several in native_models_of(native_config):
        # A class that is made from a part's config (Mllama's text model) is not made from this one.
        built_models = tuple(
            model_class_for(model, built_config)
            for model in native_models
            if model.config_class not in native_config.sub_configs.values()
        )
        if built_models:
            auto_class.register(built_config, built_models if several else built_models[0], exist_ok=True)
    for module, mapping_name in (
        ("tokenization_auto", "TOKENIZER_MAPPING"),
        ("image_processing_auto", "IMAGE_PROCESSOR_MAPPING"),
        ("feature_extraction_auto", "FEATURE_EXTRACTOR_MAPPING"),
        ("processing_auto", "PROCESSOR_MAPPING"),
    ):
        mapping = importlib.import_module(f"transformers.models.auto.{module}").__dict__[mapping_name]
        if native_config not in mapping:
            continue
        # Of images or sounds, by a library that may not be installed. The model itself does not need it.
        try:
            native = mapping[native_config]
        except ModuleNotFoundError:
            continue
        mapping.register(built_config, native, exist_ok=True)


def _class_of_own(built_class, config, name_or_path, kwargs):
    """The class to load where an Auto class gave `built_class`: another one, if what was saved was code of the user's
    own that is not registered here, and its code lies in the folder.
    """
    native_config = type(config).native_class
    for auto_class, native_models, _ in native_models_of(native_config):
        name = config.layer_collapse.get("model_classes", {}).get(auto_class.__name__)
        if name in (None, built_class.native_class.__name__) or built_class.native_class not in native_models:
            continue
        reference = (config.__dict__.get("auto_map") or {}).get(auto_class.__name__, "")
        if reference.rpartition(".")[2] != name:
            raise ValueError(
                f"This folder holds a {name}, which is code that neither transformers nor the folder has. Call "
                f"`{auto_class.__name__}.register({native_config.__name__}, {name}, exist_ok=True)` first."
            )
        resolve_trust_remote_code(kwargs.get("trust_remote_code"), name_or_path, False, True)
        options = ("cache_dir", "force_download", "local_files_only", "revision", "token")
        own = get_class_from_dynamic_module(
            reference, name_or_path, **{key: kwargs[key] for key in options if key in kwargs}
        )
        own.register_for_auto_class(auto_class)
        return model_class_for(auto_factory.add_generation_mixin_to_remote_model(own), type(config))
    return built_class


# What a pickle calls, maybe in a process that knows nothing of these classes: a pickle by value, as servers send it to
# their workers, brings this module and what it has built along, and no entry in transformers' registries.


def _empty_config(native_class):
    built = config_class_for(native_class)
    _register(native_class, built)
    return built.__new__(built)


def _empty_model(native_class, native_config_class):
    built_config = config_class_for(native_config_class)
    _register(native_config_class, built_config)
    built = model_class_for(native_class, built_config)
    record_outputs(built)
    return built.__new__(built)


class _RefuseNativeClass(WeightRenaming):
    """Stands for the weight conversions of `model_type: layercollapse`.

    No model of ours has that model type in memory. What asks for them is a native class that read the config.json of a
    patched or collapsed model, and would load it as dense, or leave every key that its own conversions rename random.
    """

    __slots__ = ()

    def __init__(self):
        super().__init__(source_patterns=r"(.+)", target_patterns=r"\1")

    def rename_source_key(self, source_key):
        raise RuntimeError(
            "This folder holds a patched or collapsed model: its weights are of other sizes, more, or under other "
            f"names than those of the native class (the first is {source_key!r}). Load it with an Auto class "
            "(`AutoModelFor….from_pretrained(folder)`), and give what takes a model or a path, as trl's trainers do, "
            "the model. For a dense model again: `remove_layer_collapse(model)`, which takes a patched model back."
        )


# A copy of this file inside a repository must not answer for other repositories.
if not __name__.startswith("transformers_modules."):
    AutoConfig.register(MODEL_TYPE, StoredConfig, exist_ok=True)
    register_checkpoint_conversion_mapping(MODEL_TYPE, [_RefuseNativeClass()], overwrite=True)
