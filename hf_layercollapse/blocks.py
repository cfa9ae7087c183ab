"""The feed-forward blocks of one live model, bound to its modules: what they compute, and where each part hangs.

An operation binds the blocks once, before it changes anything, and hands them on.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import functional
from .families import FeedForwardBlock, survey_blocks
from .modeling_layercollapse import CollapsibleActivation, PassOnConv1D, children_of
from .models import base_layer, is_adapted, part_at, unwrap, weights_present
from .verification import NORMS, Refusal, Verifier, Wiring


@dataclass(frozen=True)
class Exchange:
    """A module that took the place of another.

    Args:
        parent (`nn.Module`): What holds it.
        child (`str`): Its name there.
        old, new (`nn.Module`): What stood there, and what does now.
    """

    parent: nn.Module
    child: str
    old: nn.Module
    new: nn.Module

    def undo(self) -> None:
        """Puts back what stood there."""
        children_of(self.parent)[self.child] = self.old


def _module() -> Any:
    return field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class BoundBlock(FeedForwardBlock):
    """A [`FeedForwardBlock`] with the live modules of its model, as they stand when it is bound.

    Args:
        module (`nn.Module`): What holds its parts.
        around (`nn.Module`, *optional*): What holds that; `None` where it is the model itself.
        up (`nn.Module`): The first linear, the fused one where gate and up are one. `None` like the other parts where
            a collapse took it away.
        activation, down (`nn.Module`): Activation and last linear.
        gate (`nn.Module`, *optional*): The gate's own linear.
        before, between (`tuple[nn.Module, ...]`): The batch norms around the activation (dropouts left out).
    """

    module: nn.Module = _module()
    around: nn.Module | None = _module()
    # Asked for their weights, alphas and adapters, which no common class of theirs has.
    up: Any = _module()
    activation: Any = _module()
    down: Any = _module()
    gate: Any = _module()
    before: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)
    between: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)

    @property
    def linears(self) -> dict[str, nn.Module]:
        """Path in the block -> linear, as the layout has them."""
        return {path: part_at(self.module, path) for path in self.layout.linears}

    @property
    def collapsible(self) -> list[CollapsibleActivation]:
        """The activations with an alpha: none, one, or two in a wrapper of peft's."""
        parts = [] if self.activation is None else self.activation.modules()
        return [part for part in parts if isinstance(part, CollapsibleActivation)]

    @property
    def first(self) -> nn.Module:
        """The linear that the block begins with: the gate's, where it has its own."""
        return self.up if self.gate is None else self.gate

    @property
    def code(self) -> Wiring:
        """What its code does, of a block that its own code computes."""
        assert self.wiring is not None, "one that can collapse"
        return self.wiring

    @property
    def scales(self) -> tuple[float, float, float]:
        """Constants of its code, see [`Wiring`]."""
        return self.code.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the block computes from its input, dropouts off."""
        enters, leaves, returned = self.scales
        up = self.up(x)
        if self.layout.fused:
            gate, up = self.layout.split(up, -1)
        else:
            gate = up if self.gate is None else self.gate(x)
        hidden = self.activation(_normed(self.before, gate * enters if enters != 1 else gate))
        if self.layout.gated:
            hidden = hidden * up
        hidden = _normed(self.between, hidden)
        output = self.down(hidden * leaves if leaves != 1 else hidden)
        return output * returned if returned != 1 else output

    def up_affine(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(weight (m, i), bias (m,) or None)` from the block's input to what a linear activation acts on (plain), or
        to what the gate multiplies (gated)."""
        weight, bias = weight_and_bias(self.up)
        if self.layout.fused:
            return self.layout.split(weight, 0)[1], None if bias is None else self.layout.split(bias, 0)[1]
        if self.layout.gated:
            return weight, bias
        weight = weight.double() * self.scales[0]
        bias = None if bias is None else bias.double() * self.scales[0]
        for norm in self.before:
            scale, shift = _scale_and_shift(norm)
            weight = scale[:, None] * weight
            bias = shift if bias is None else scale * bias + shift
        return weight, bias

    def gate_affine(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(weight (m, i), bias (m,) or None)` from a gated block's input to what its activation acts on."""
        if self.gate is not None:
            return weight_and_bias(self.gate)
        weight, bias = weight_and_bias(self.up)
        return self.layout.split(weight, 0)[0], None if bias is None else self.layout.split(bias, 0)[0]

    def down_affine(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(weight (o, m), bias (o,) or None)` from what leaves the activation to what the block returns."""
        weight, bias = weight_and_bias(self.down)
        _, leaves, returned = self.scales
        weight = weight.double() * leaves
        bias = None if bias is None else bias.double()
        for norm in reversed(self.between):
            scale, shift = _scale_and_shift(norm)
            shifted = weight @ shift
            bias = shifted if bias is None else bias + shifted
            weight = weight * scale
        return weight * returned, None if bias is None else bias * returned

    def weights_present(self) -> contextlib.AbstractContextManager[None]:
        """A context in which its weights can be read, wherever accelerate keeps them."""
        # A linear of its own may be what another block of a chain is to become.
        linears = [linear for linear in (self.gate, self.up, self.down) if linear is not None]
        return weights_present([*linears, *self.before, *self.between])

    def exchange(self, path: str, module: nn.Module) -> Exchange:
        """Puts a module where a part stands, or with the path `""` in the place of all of the block; in the model,
        not in this object. Returns the [`Exchange`]."""
        above, _, child = path.rpartition(".")
        parent = part_at(self.module, above) if above else self.module
        if not path:
            parent, child = self.around, self.holder.rpartition(".")[2]
        done = Exchange(parent, child, children_of(parent)[child], module)
        # Keeps the position among its siblings.
        children_of(parent)[child] = module
        return done

    def restore(self) -> Exchange:
        """Puts the native activation of a patched block back, as [`~BoundBlock.exchange`] does."""
        native = self.activation.native.train(self.activation.training)
        return self.exchange(self.layout.activation_path, native)


def _normed(norms: Iterable[nn.Module], hidden_states: torch.Tensor) -> torch.Tensor:
    for norm in norms:
        with weights_present([norm]):
            scale, shift = _scale_and_shift(norm)
        hidden_states = hidden_states * scale.to(hidden_states) + shift.to(hidden_states)
    return hidden_states


def _scale_and_shift(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch norm in evaluation mode: a factor and a term per feature, float64."""
    scale = (functional.wide(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * functional.wide(norm.weight)
    shift = -functional.wide(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + functional.wide(norm.bias)


def weight_and_bias(linear: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`(weight (out, in), bias (out,) or None)` of what [`modeling_layercollapse.linear_shape`] knows."""
    return (linear.weight.T if isinstance(linear, (Conv1D, PassOnConv1D)) else linear.weight), linear.bias


def bind(model: nn.Module, block: FeedForwardBlock) -> BoundBlock:
    """A block that was found in a model, or in one whose modules have the same names, with this model's modules."""
    layout, wiring = block.layout, block.wiring
    module = model.get_submodule(block.holder)

    def norms(paths: Iterable[str]) -> tuple[nn.Module, ...]:
        return tuple(part for part in (part_at(module, path) for path in paths) if isinstance(part, NORMS))

    return BoundBlock(
        **{described.name: getattr(block, described.name) for described in fields(FeedForwardBlock)},
        module=module,
        around=model.get_submodule(block.holder.rpartition(".")[0]) if block.holder else None,
        up=part_at(module, layout.up),
        activation=part_at(module, layout.activation) if isinstance(layout.activation, str) else None,
        down=part_at(module, layout.down),
        gate=None if layout.gate is None else part_at(module, layout.gate),
        before=norms(() if wiring is None else wiring.before),
        between=norms(() if wiring is None else wiring.between),
    )


def survey(model: nn.Module) -> tuple[list[BoundBlock], dict[str, str]]:
    """`(blocks in forward order, refused)`, as [`find_feed_forward_blocks`] and [`refused_blocks`] find them."""
    model = unwrap(model)[0]
    blocks, refused = survey_blocks(model)
    return [bind(model, block) for block in blocks], refused


def bind_blocks(model: nn.Module) -> list[BoundBlock]:
    """The feed-forward blocks of a model, in forward order."""
    return survey(model)[0]


def confirm_wiring(model: nn.Module, blocks: Sequence[BoundBlock]) -> None:
    """Raises if these blocks, whose linears have become narrower, do not run as they did.

    Raises:
        ValueError: The code of one needs its native width.
    """
    verifier = Verifier(model)
    for block in blocks:
        try:
            found = verifier.wiring(block.holder, block.layout)
        except Refusal as refusal:
            found = refusal
        if isinstance(found, Refusal) or not found.is_like(block.wiring):
            raise ValueError(
                f"Block {block.name} cannot keep fewer neurons in its native module, whose code does something else "
                f"then ({found}). Give it a linear map beside them (`rank` > 0)."
            )


# ----------------------------------------------------------------------------------------------------
# Weights that can be read and merged
# ----------------------------------------------------------------------------------------------------


def check_weights(model: nn.Module, blocks: Sequence[BoundBlock], merging: bool) -> None:
    """Raises if the weights of these blocks cannot be read or merged.

    Args:
        blocks (`list[BoundBlock]`): Of the model.
        merging (`bool`): Whether the blocks are to be merged now; an adapter on top only matters then.

    Raises:
        TypeError: Weights are sharded over processes.
        ValueError: Weights are quantized, on the meta device, tied, or under an adapter; or on MPS, if merging.
    """
    uses = _uses(model)
    for block in blocks:
        for path, linear in block.linears.items():
            name = block.path(path)
            if merging and is_adapted(linear):
                raise ValueError(
                    f"`{name}` is under an adapter that is not merged. Call `model = model.merge_and_unload()` first."
                )
            linear = base_layer(linear)
            with weights_present([linear]):
                _refuse_unreadable(name, linear)
            if merging and linear.weight.device.type == "mps":
                raise ValueError(
                    f"`{name}` is on MPS, which has no float64 that merging and fitting need: collapse the model on "
                    'the CPU (`model.to("cpu")`), and move it back.'
                )
            _refuse_shared(name, linear, block, uses)


def _uses(model: nn.Module) -> Counter[int]:
    """id -> how many modules hold a module or parameter.

    By what holds them: a module that is reached by several ways, in models that share a part, is changed once.
    """
    modules = list(model.modules())
    uses = Counter(id(child) for module in modules for child in children_of(module).values())
    for module in modules:
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        uses.update(id(parameter) for _, parameter in own)
    return uses


def _refuse_unreadable(name: str, linear: Any) -> None:
    weight = linear.weight
    # By name: torch.distributed is not part of every build of torch.
    if type(weight).__name__ == "DTensor" or type(weight.data).__name__ == "DTensor":
        raise TypeError(
            f"`{name}` is sharded over processes. Patch the model before `fully_shard`, and gather it "
            "(`get_model_state_dict` with `full_state_dict=True`) before collapsing."
        )
    plain = type(weight.data) is torch.Tensor and weight.is_floating_point()
    if not plain or not (weight.is_meta or _computes_linear(linear)):
        raise ValueError(
            f"`{name}` is quantized or of a kind that cannot be merged: {type(linear).__name__} with weights "
            f"{type(weight.data).__name__} of {weight.dtype}. Load the model without quantization, collapse it, save "
            "it, and quantize the saved model."
        )
    if weight.is_meta:
        raise ValueError(
            f"`{name}` is on the meta device: there are no weights to work on. Load the model with its weights, in "
            "memory or offloaded by `device_map`."
        )


def _refuse_shared(name: str, linear: Any, block: BoundBlock, uses: Mapping[int, int]) -> None:
    shared = [key for key, parameter in linear.named_parameters() if uses[id(parameter)] > 1]
    if shared:
        raise ValueError(
            f"`{name}` shares its {' and '.join(shared)} with another module (tied weights): merging it would change "
            "that module too. Untie it first."
        )
    replaced = {name: linear, block.holder: block.module}
    shared = [path for path, module in replaced.items() if uses[id(module)] > 1]
    if shared:
        raise ValueError(
            f"`{shared[0]}` stands in several places of the model: merging it would change one of them, and leave it "
            "as it is in the others. Put a copy into each."
        )


@torch.no_grad()
def _computes_linear(linear: Any) -> bool:
    """Whether a subclass of `nn.Linear` (Falcon has its own) does what `nn.Linear` does with its weight and bias."""
    if type(linear) in (nn.Linear, Conv1D):
        return True
    if not isinstance(linear, nn.Linear):
        return False
    x = functional.gaussian_inputs(linear.in_features, rows=4).to(linear.weight)
    expected = nn.functional.linear(x, linear.weight, linear.bias)
    return functional.relative_error(expected, linear(x)) < 10 * torch.finfo(x.dtype).eps
