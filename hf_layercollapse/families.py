"""How each family of models spells its feed-forward block, as data; finding blocks; why one is refused."""

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .modeling_layercollapse import CollapsedBlock, CollapsibleActivation, linear_shape


@dataclass(frozen=True)
class FeedForwardLayout:
    """One way to spell a feed-forward block: paths of its parts, relative to the module that holds them all.

    Args:
        name (`str`): What reports call it.
        up, activation, down (`str`): Paths of the first linear, the activation module and the last linear.
        gate (`str`, *optional*): Path of the gate's linear; the activation is then the gate's.
        between (`tuple[str, ...]`): Dropouts between activation and last linear; gone once the block is one map.
        after (`tuple[str, ...]`): Modules that follow the last linear inside the same module, in order; they stay.
        own_module (`bool`): The holder is an MLP module that computes the block and nothing else, so it is replaced as
            a whole. Otherwise other code runs around the parts, and the first linear and the activation become
            `nn.Identity` instead.
    """

    name: str
    up: str
    activation: str
    down: str
    gate: str | None = None
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    own_module: bool = True

    @property
    def linears(self):
        return tuple(path for path in (self.gate, self.up, self.down) if path is not None)

    @property
    def parts(self):
        return (*self.linears, self.activation, *self.between, *self.after)


# Tried from top to bottom; a row whose holder is the MLP module itself matches only where that module has no other
# children, so that inline blocks with the same names are not mistaken for it.
LAYOUTS = [
    FeedForwardLayout(
        "split", "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", own_module=False
    ),  # BERT, RoBERTa, ELECTRA, DeBERTa, MPNet, Longformer, BEiT, ...
    FeedForwardLayout("fc1/fc2", "fc1", "activation_fn", "fc2"),  # ViT, DeiT, DINOv2, CLIP, SigLIP, ...
    FeedForwardLayout("lin1/lin2", "lin1", "activation", "lin2", after=("dropout",)),  # DistilBERT
    FeedForwardLayout("c_fc/c_proj", "c_fc", "act", "c_proj", after=("dropout",)),  # GPT-2, GPT-Neo, ...
]


@dataclass(frozen=True)
class FeedForwardBlock:
    """A feed-forward block of one particular model, as found by [`find_feed_forward_blocks`].

    Args:
        name (`str`): Qualified name of the module that holds the block's parts.
        index (`int`): Position in forward order, from 0. Collapsed blocks keep their place.
        kind (`str`): `"plain"` or `"gated"`.
        state (`str`): `"dense"`, `"patched"` or `"collapsed"`.
        layout (`FeedForwardLayout`): How it is spelled.
        in_features, hidden_features, out_features (`int`): Widths; `hidden_features` is 0 once collapsed.
        parameters (`int`): Weights and biases of its linears.
        macs (`int`): Multiply-accumulates per token.
        alpha (`float`, *optional*): Mean alpha if patched, else `None`.
    """

    name: str
    index: int
    kind: str
    state: str
    layout: FeedForwardLayout
    in_features: int
    hidden_features: int
    out_features: int
    parameters: int
    macs: int
    alpha: float | None = None

    def path(self, part):
        """Qualified name of a part, given its path inside the block."""
        return f"{self.name}.{part}" if self.name else part


@dataclass(frozen=True)
class BlockModules:
    """The live modules of a block."""

    holder: nn.Module
    up: nn.Module
    activation: nn.Module
    down: nn.Module
    gate: nn.Module | None


def modules_of(model, block):
    """The live modules of a dense or patched block."""
    layout = block.layout

    def get(part):
        return None if part is None else model.get_submodule(block.path(part))

    return BlockModules(
        model.get_submodule(block.name), get(layout.up), get(layout.activation), get(layout.down), get(layout.gate)
    )


def find_feed_forward_blocks(model) -> list[FeedForwardBlock]:
    """The feed-forward blocks of a model that can be patched and collapsed, and those that are collapsed, in forward
    order.

    Args:
        model (`nn.Module`): A dense, patched or collapsed model; a PeftModel or compiled model is looked through.

    Raises:
        TypeError: The model is wrapped for distributed training.
    """
    return _survey(unwrap(model)[0])[0]


def refused_blocks(model) -> dict[str, str]:
    """What looks like a feed-forward block of the model but cannot be patched: name -> reason."""
    return _survey(unwrap(model)[0])[1]


def _survey(model):
    blocks, refused = [], {}
    taken = set()
    for name, holder in model.named_modules():
        for layout in LAYOUTS:
            state = _match(holder, layout)
            if state is None:
                continue
            linears = [_descend(holder, path) for path in layout.linears]
            if taken & {id(linear) for linear in linears if linear is not None}:
                continue
            reason = None if state == "collapsed" else _reason_against(holder, layout)
            if reason:
                refused[name] = reason
            else:
                taken |= {id(linear) for linear in linears}
                blocks.append(_describe(name, len(blocks), state, holder, layout))
            break
    return blocks, refused


def _descend(module, path):
    for part in path.split("."):
        module = module._modules.get(part)
        if module is None:
            return None
    return module


def _match(holder, layout):
    """The state of the block that `holder` holds in this layout, or `None`."""
    if isinstance(holder, CollapsedBlock):
        return "collapsed" if list(holder._modules)[0] == layout.down else None
    up, down = _descend(holder, layout.up), _descend(holder, layout.down)
    if up is None or down is None or (layout.gate and _descend(holder, layout.gate) is None):
        return None
    if layout.own_module and set(holder._modules) - {*layout.parts}:
        return None
    activation = _descend(holder, layout.activation)
    if isinstance(up, nn.Identity):
        return "collapsed" if isinstance(activation, nn.Identity) and _is_linear(down) else None
    if not (_is_linear(up) and _is_linear(down)):
        return None
    return "patched" if isinstance(activation, CollapsibleActivation) else "dense"


def _base_layer(linear):
    """What an adapter wraps, or the linear itself."""
    return linear.get_base_layer() if is_adapted(linear) else linear


def is_adapted(linear):
    """Whether a linear is under a peft adapter."""
    return type(linear).__module__.startswith("peft.")


def _is_linear(module):
    return isinstance(_base_layer(module), (nn.Linear, Conv1D))


def _reason_against(holder, layout):
    """Why a block that matches by its names cannot be patched, or `None`."""
    if _descend(holder, layout.activation) is None:
        return f"its activation `{layout.activation}` is a plain function, not a module that can be exchanged"
    up, down = (linear_shape(_base_layer(_descend(holder, path))) for path in (layout.up, layout.down))
    if up[1] != down[0]:
        return f"its linears do not chain: {up[0]} -> {up[1]} and {down[0]} -> {down[1]}"
    if up[0] * down[1] >= up[0] * up[1] + down[0] * down[1]:
        return f"it is a bottleneck {up[0]} -> {up[1]} -> {down[1]}: one map would be larger than the two"
    return None


def _describe(name, index, state, holder, layout):
    linears = [_base_layer(module) for path in layout.linears if (module := _descend(holder, path)) is not None]
    linears = [linear for linear in linears if not isinstance(linear, nn.Identity)]
    shapes = [linear_shape(linear) for linear in linears]
    activation = _descend(holder, layout.activation)
    return FeedForwardBlock(
        name=name,
        index=index,
        kind="gated" if layout.gate else "plain",
        state=state,
        layout=layout,
        in_features=shapes[0][0],
        hidden_features=0 if state == "collapsed" else shapes[-1][0],
        out_features=shapes[-1][1],
        parameters=sum(parameter.numel() for linear in linears for parameter in linear.parameters()),
        macs=sum(features_in * features_out for features_in, features_out in shapes),
        alpha=float(activation.alpha.detach().float().mean()) if state == "patched" else None,
    )


def select_blocks(blocks, selector, refused=None):
    """The blocks that `LayerCollapseConfig.blocks` asks for, in forward order.

    Raises:
        ValueError: A part of the selector matches nothing, or names a block that is refused.
    """
    refused = refused or {}
    if not blocks:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in list(refused.items())[:10])
        raise ValueError(
            "The model has no feed-forward block of a known layout "
            f"({', '.join(layout.name for layout in LAYOUTS)})." + (f" Refused:{reasons}" if reasons else "")
        )
    by_name = {block.name: block for block in blocks}
    if isinstance(selector, list):
        if isinstance(selector[0], str):
            unknown = [name for name in selector if name not in by_name]
            if unknown:
                why = "".join(f" {name} is refused: {refused[name]}." for name in unknown if name in refused)
                raise ValueError(
                    f"`blocks` names what is no block of this model: {unknown}.{why} Its blocks are "
                    f"{_shorten([block.name for block in blocks])}."
                )
            chosen = set(selector)
            return [block for block in blocks if block.name in chosen]
        wrong = [index for index in selector if not -len(blocks) <= index < len(blocks)]
        if wrong:
            raise ValueError(
                f"`blocks` has indices {wrong}, and the model has {len(blocks)} blocks (0 to {len(blocks) - 1})."
            )
        chosen = {index % len(blocks) for index in selector}
        return [block for block in blocks if block.index in chosen]
    if selector == "all":
        return list(blocks)
    if selector.startswith(("first:", "last:")):
        side, count = selector.split(":")
        count = int(count)
        if count > len(blocks):
            raise ValueError(f"`blocks` is {selector!r}, and the model has {len(blocks)} blocks.")
        return blocks[:count] if side == "first" else blocks[-count:]
    chosen = [block for block in blocks if re.fullmatch(selector, block.name)]
    if not chosen:
        raise ValueError(
            f"`blocks` is the regular expression {selector!r}, which matches no block name in full. The names are "
            f"{_shorten([block.name for block in blocks])}."
        )
    return chosen


def _shorten(names, limit=6):
    return names if len(names) <= limit else [*names[: limit - 1], "...", names[-1]]


def unwrap(model):
    """`(the model itself, its wrappers)`: looks through PeftModel and `torch.compile`.

    Raises:
        TypeError: It is no module, or it is wrapped or sharded for distributed training.
    """
    holders = []
    while True:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected a model (`nn.Module`), got {type(model).__name__}.")
        kind = type(model)
        if isinstance(model, torch._dynamo.OptimizedModule):
            holders.append(model)
            model = model._orig_mod
        elif kind.__module__.startswith("peft.") and isinstance(model, _peft_model_class()):
            holders.append(model)
            model = model.get_base_model()
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or kind.__module__.startswith(
            ("deepspeed.", "torch.distributed.fsdp.")
        ):
            raise TypeError(
                f"The model is wrapped in {kind.__name__}. Patch it before it is wrapped (before the Trainer or "
                "`accelerator.prepare` gets it), and collapse the unwrapped one: `accelerator.unwrap_model(model)`."
            )
        else:
            return model, holders


def _peft_model_class():
    from peft import PeftModel

    return PeftModel


def check_weights(model, blocks, merging):
    """Raises if the weights of these blocks cannot be read or merged.

    Args:
        merging (`bool`): Whether the blocks are to be merged now; an adapter on top only matters then.

    Raises:
        TypeError: Weights are sharded over processes.
        ValueError: Weights are quantized, on the meta device, tied, or under an adapter.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for block in blocks:
        for path in block.layout.linears:
            name = block.path(path)
            linear = model.get_submodule(name)
            if is_adapted(linear):
                if merging:
                    raise ValueError(
                        f"`{name}` is under an adapter that is not merged. Call `model = model.merge_and_unload()` "
                        "first."
                    )
                linear = _base_layer(linear)
            weight = linear.weight
            # By name: torch.distributed is not part of every build of torch.
            if type(weight).__name__ == "DTensor" or type(weight.data).__name__ == "DTensor":
                raise TypeError(
                    f"`{name}` is sharded over processes. Patch the model before `fully_shard`, and gather it "
                    "(`get_model_state_dict` with `full_state_dict=True`) before collapsing."
                )
            if (
                type(linear) not in (nn.Linear, Conv1D)
                or type(weight.data) is not torch.Tensor
                or not weight.is_floating_point()
            ):
                raise ValueError(
                    f"`{name}` is quantized or of a kind that cannot be merged: {type(linear).__name__} with weights "
                    f"{type(weight.data).__name__} of {weight.dtype}. Load the model without quantization, collapse "
                    "it, save it, and quantize the saved model."
                )
            if weight.is_meta:
                raise ValueError(
                    f"`{name}` is on the meta device or offloaded: there are no weights to work on. Load the model "
                    "with its weights in memory."
                )
            shared = [key for key, parameter in linear.named_parameters() if uses[id(parameter)] > 1]
            if shared:
                raise ValueError(
                    f"`{name}` shares its {' and '.join(shared)} with another module (tied weights): merging it would "
                    "change that module too. Untie it first."
                )
