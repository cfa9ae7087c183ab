"""How each family of models spells its feed-forward block, as data; finding blocks; why one is refused."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .modeling_layercollapse import (
    PASS_ON,
    REMAINS,
    CollapsedBlock,
    CollapsedIdentity,
    CollapsibleActivation,
    LayerCollapseModelMixin,
    NarrowActivation,
    NarrowFeedForward,
    children_of,
    linear_shape,
    resolved_of,
)
from .models import CUT, base_layer, part_at, unwrap
from .verification import DROPOUTS, NORMS, Refusal, Verifier, Wiring


# Names under which blocks keep their activation module.
ACTIVATION_NAMES = (
    "act",
    "act_fn",
    "activation",
    "activation_fn",
    "activation_func",
    "activation_function",
    "intermediate_act_fn",
    "act_layer",
    "nonlinearity",
    "gelu_impl",
    "gelu",
    "silu",
    "relu",
    "activation_layer",
    "hidden_act",
    "actv",
    "non_linearity",
    "act_fct",
)
_SPLITS = ("gate,up", "up,gate", "interleaved")


@dataclass(frozen=True)
class FeedForwardLayout:
    """One way to spell a feed-forward block: paths of its parts, relative to the module that holds them all.

    A row claims nothing about the code that runs between these parts: that is checked on each model.

    Args:
        name (`str`): What reports call it.
        up, down (`str`): Paths of the first and the last linear.
        activation (`str` or `tuple[str, ...]`): Path of the activation module, or several to try in order.
        gate (`str`, *optional*): Path of the gate's linear; the block is then `down(activation(gate(x)) * up(x))`.
        fused (`str`, *optional*): Where `up` is one linear for the gate and up: `"gate,up"` or `"up,gate"` if its
            output holds one half after the other, `"interleaved"` if gate and up alternate, gate first.

    Raises:
        TypeError, ValueError: From the constructor, when a value is not one of those described.
    """

    name: str
    up: str
    down: str
    activation: str | tuple[str, ...] = ACTIVATION_NAMES
    gate: str | None = None
    fused: str | None = None

    def __post_init__(self) -> None:
        names = self.activation if isinstance(self.activation, tuple) else (self.activation,)
        paths = [self.up, self.down, *names, *([] if self.gate is None else [self.gate])]
        for path in (self.name, *paths):
            if not isinstance(path, str):
                raise TypeError(f"A layout's name and paths must be strings, got {path!r}.")
        for path in paths:
            if not all(part.isidentifier() or part.isdigit() for part in path.split(".")):
                raise ValueError(f"{path!r} is not the path of a module.")
        if not self.name or not names or len({*paths}) != len(paths):
            raise ValueError(f"Layout {self.name!r} needs a name, and different paths for its parts; got {paths}.")
        if self.fused is not None and (self.fused not in _SPLITS or self.gate is not None):
            raise ValueError(
                f"`fused` must be one of {_SPLITS}, and excludes `gate`; got {self.fused!r} with gate {self.gate!r}."
            )

    @property
    def activation_path(self) -> str:
        """Path of the activation in a block that was found, where it is one."""
        assert isinstance(self.activation, str), "one of several names, once a block was found"
        return self.activation

    @property
    def gated(self) -> bool:
        return self.gate is not None or self.fused is not None

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(path for path in (self.gate, self.up, self.down) if path is not None)

    def split(self, tensor: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`(gate, up)` halves of what a fused linear gives, or of its weight or bias, along `dim`."""
        if self.fused == "interleaved":
            even = torch.arange(0, tensor.shape[dim], 2, device=tensor.device)
            return tensor.index_select(dim, even), tensor.index_select(dim, even + 1)
        first, second = tensor.chunk(2, dim)
        return (first, second) if self.fused == "gate,up" else (second, first)

    def join(self, gate: torch.Tensor, up: torch.Tensor, dim: int) -> torch.Tensor:
        """The inverse of [`~FeedForwardLayout.split`]: the weight or bias of a fused linear."""
        if self.fused == "interleaved":
            return torch.stack([gate, up], dim + 1).flatten(dim, dim + 1)
        return torch.cat([gate, up] if self.fused == "gate,up" else [up, gate], dim)


# Tried from top to bottom; the first row that a module's children and widths fit and whose wiring the module's own
# code confirms is taken. Adding a family is one row here and one case in tests/test_families.py.
LAYOUTS = [
    # BERT, RoBERTa, ELECTRA, DeBERTa, MPNet, Longformer, BEiT, ...; then Q-Former's and LXMERT's second blocks
    FeedForwardLayout(
        "split",
        "intermediate.dense",
        "output.dense",
        ("intermediate.intermediate_act_fn", "intermediate.activation"),
    ),
    FeedForwardLayout(
        "split query", "intermediate_query.dense", "output_query.dense", "intermediate_query.intermediate_act_fn"
    ),
    FeedForwardLayout("split language", "lang_inter.dense", "lang_output.dense", "lang_inter.intermediate_act_fn"),
    FeedForwardLayout("split vision", "visn_inter.dense", "visn_output.dense", "visn_inter.intermediate_act_fn"),
    FeedForwardLayout("dense.dense/output.dense", "dense.dense", "output.dense", "dense.act_fn"),  # Reformer
    # T5, LongT5, Switch, UDOP; then gated: Llama, Mistral, Qwen, Gemma, OLMo, Cohere, ...; mT5, UMT5; LFM2
    FeedForwardLayout("wi/wo", "wi", "wo"),
    FeedForwardLayout("gate_proj/up_proj/down_proj", "up_proj", "down_proj", gate="gate_proj"),
    FeedForwardLayout("wi_0/wi_1/wo", "wi_1", "wo", gate="wi_0"),
    FeedForwardLayout("w1/w3/w2", "w3", "w2", gate="w1"),
    FeedForwardLayout("w_in/w_out", "w_in.w_1", "w_out", "w_in.act", gate="w_in.w_0"),  # CPM-Ant
    # Gated, gate and up in one linear: Phi-3, GLM, Dia; ModernBERT; Moshi; Moonshine; GraniteMoeHybrid
    FeedForwardLayout("gate_up_proj/down_proj", "gate_up_proj", "down_proj", fused="gate,up"),
    FeedForwardLayout("gate_up_proj/down_proj (up first)", "gate_up_proj", "down_proj", fused="up,gate"),
    FeedForwardLayout("Wi/Wo", "Wi", "Wo", fused="gate,up"),
    FeedForwardLayout("fc1/fc2", "fc1", "fc2"),  # ViT, CLIP, SigLIP, DINOv2 and inside the layer BART, OPT, Whisper
    FeedForwardLayout("fc1/fc2 gated", "fc1", "fc2", fused="gate,up"),
    FeedForwardLayout("fc1/fc2 gated (up first)", "fc1", "fc2", fused="up,gate"),
    FeedForwardLayout("input_linear/output_linear", "input_linear", "output_linear", fused="gate,up"),
    # Plain
    FeedForwardLayout("lin1/lin2", "lin1", "lin2"),  # DistilBERT, SAM
    FeedForwardLayout("c_fc/c_proj", "c_fc", "c_proj"),  # GPT-2 (Conv1D), GPT-Neo, StarCoder2
    FeedForwardLayout("dense_h_to_4h/dense_4h_to_h", "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    FeedForwardLayout("fc_in/fc_out", "fc_in", "fc_out"),  # GPT-J, CodeGen
    FeedForwardLayout("ffn/ffn_output", "ffn", "ffn_output"),  # ALBERT
    FeedForwardLayout("layer_1/layer_2", "layer_1", "layer_2"),  # XLNet
    FeedForwardLayout("intermediate_dense/output_dense", "intermediate_dense", "output_dense"),  # wav2vec 2.0, HuBERT
    FeedForwardLayout("up_proj/down_proj", "up_proj", "down_proj"),  # MPT, Nemotron, Apertus, Arcee, DINOv3
    FeedForwardLayout("linear1/linear2", "linear1", "linear2"),  # Parakeet
    FeedForwardLayout("linear_1/linear_2", "linear_1", "linear_2"),  # Funnel, projectors between equal widths
    FeedForwardLayout("linear_fc1/linear_fc2", "linear_fc1", "linear_fc2"),  # Qwen-VL's vision tower
    FeedForwardLayout("proj_in/proj_out", "proj_in", "proj_out"),  # SAM 2
    FeedForwardLayout("in_proj/out_proj", "in_proj", "out_proj"),  # Bark
    FeedForwardLayout("intermediate/output", "intermediate", "output"),  # ProphetNet
    FeedForwardLayout("dense1/dense2", "dense1", "dense2"),  # PVT, Perceiver
    FeedForwardLayout("pointwise_conv1/pointwise_conv2", "pointwise_conv1", "pointwise_conv2"),  # DINOv3 ConvNeXt
    FeedForwardLayout("pwconv1/pwconv2", "pwconv1", "pwconv2"),  # ConvNeXt
    FeedForwardLayout("linear_up/linear_down", "linear_up.linear", "linear_down.linear"),  # LeViT, with batch norms
]


# Fields of native configs that hold the hidden width of feed-forward blocks, as a number or as a multiple of the
# model's width. Which of them does in one particular model, and for which blocks, is seen by building it.
WIDTH_FIELDS = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "ffn_hidden_size",
    "n_inner",
    "d_ff",
    "d_inner",
    "dff",
    "dim_ff",
    "hidden_dim",
    "mlp_dim",
    "inner_dim",
)
RATIO_FIELDS = ("mlp_ratio", "expansion_ratio")
# Fields that give the linears of feed-forward blocks, and no others, biases.
BIAS_FIELDS = ("mlp_bias",)


@dataclass(frozen=True)
class TokensInside:
    """What a family's own code does to the tokens of a batch on their way to its blocks.

    Args:
        multiple (`tuple[str, ...]`): Fields of its config. It pads rows on the right to a multiple of the least common
            multiple of these, of a field that has a number for each layer of the largest; some do for long rows only.
        before (`str`, *optional*): Field of its config. It puts so many tokens of its own before those of each row.
        beside (`str`, *optional*): Field of its config. Its blocks are called with so many tokens of its own, too.
        time_first (`bool`): Whether its blocks see `(tokens, rows)` in place of `(rows, tokens)`.
    """

    multiple: tuple[str, ...] = ()
    before: str | None = None
    beside: str | None = None
    time_first: bool = False

    def multiple_of(self, config: Any) -> int:
        """What the length of a row is padded to a multiple of; 1 where it stays."""
        values = [vars(config)[name] for name in self.multiple]
        return math.lcm(*(max(value) if isinstance(value, (list, tuple)) else value for value in values))

    def before_of(self, config: Any) -> int:
        """How many tokens come before those of each row."""
        return vars(config)[self.before] if self.before is not None else 0

    def are_its_own(self, config: Any, rows: int, shape: Sequence[int]) -> bool:
        """Whether a call with tokens of this shape gets those of its own."""
        return self.beside is not None and tuple(shape) == (rows, vars(config)[self.beside])


# By model type; of all others the blocks see the tokens of the batch.
TOKENS_INSIDE = {
    "longformer": TokensInside(multiple=("attention_window",)),
    "led": TokensInside(multiple=("attention_window",)),
    "big_bird": TokensInside(multiple=("block_size",)),  # rows that are long enough for sparse attention
    "bigbird_pegasus": TokensInside(multiple=("block_size",)),
    "pegasus_x": TokensInside(multiple=("block_size",), beside="num_global_tokens"),
    "reformer": TokensInside(multiple=("lsh_attn_chunk_length", "local_attn_chunk_length")),  # rows over one chunk
    "cpmant": TokensInside(before="prompt_length"),
    "fsmt": TokensInside(time_first=True),
    "xlnet": TokensInside(time_first=True),
}


def register_feed_forward_layout(layout: FeedForwardLayout) -> None:
    """Adds a way to spell a feed-forward block, for models that no row of the table fits. It is tried last.

    Args:
        layout ([`FeedForwardLayout`]): What its modules are called. What the code between them does is checked on each
            model, as for every other row. Registering an equal one again does nothing.

    Raises:
        TypeError: It is not a `FeedForwardLayout`.
        ValueError: Another layout has this name.
    """
    if not isinstance(layout, FeedForwardLayout):
        raise TypeError(f"Expected a FeedForwardLayout, got {type(layout).__name__}.")
    if layout in LAYOUTS:
        return
    if any(row.name == layout.name for row in LAYOUTS):
        raise ValueError(f"There is another layout named {layout.name!r}; choose another name.")
    LAYOUTS.append(layout)


@dataclass(frozen=True)
class FeedForwardBlock:
    """A feed-forward block of one particular model, as found by [`find_feed_forward_blocks`].

    Args:
        name (`str`): Qualified name of the module that holds the block's parts; of its first linear where one module
            holds several blocks.
        index (`int`): Position in forward order, from 0. Collapsed blocks keep their place.
        kind (`str`): `"plain"` or `"gated"`.
        state (`str`): `"dense"`, `"patched"` or `"collapsed"`. A block that keeps neurons only is collapsed too; it is
            the native module with narrower linears.
        layout (`FeedForwardLayout`): How it is spelled.
        in_features, hidden_features, out_features (`int`): Widths; once collapsed `hidden_features` counts the neurons
            that were kept.
        parameters (`int`): Weights and biases of its linears.
        macs (`int`): Multiply-accumulates per token.
        alpha (`float`, *optional*): Mean alpha if patched, else `None`.
        holder (`str`): Qualified name of the module that holds the block's parts.
        wiring ([`Wiring`], *optional*): What its code does with them; `None` where a collapse left other modules than
            the native ones.
        rank (`int`, *optional*): Of its linear map once it is collapsed: `in_features` is full rank, 0 none.
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
    holder: str = ""
    wiring: Wiring | None = None
    rank: int | None = None

    @property
    def can_collapse(self) -> bool:
        """Whether its own code computes it: it is dense, patched, or collapsed to fewer neurons. Such a block can be
        patched and collapsed, and narrowed again."""
        return self.wiring is not None

    def path(self, part: str) -> str:
        """Qualified name of a part, given its path inside the block."""
        return f"{self.holder}.{part}" if self.holder else part


def find_feed_forward_blocks(model: nn.Module) -> list[FeedForwardBlock]:
    """The feed-forward blocks of a model that can be patched and collapsed, and those that are collapsed, in forward
    order.

    What a block's code does between its linears is checked by running it on stand-ins, see `verification.py`.

    Args:
        model (`nn.Module`): A dense, patched or collapsed model. A PeftModel or compiled model is looked through. Of
            a `SentenceTransformer`, `CrossEncoder` or `SparseEncoder` it is the transformers model that it holds,
            whose blocks have the names that they have there. Where it holds several, as behind a `Router`, their paths
            in the object come first.

    Raises:
        TypeError: The model is wrapped for distributed training.
    """
    return survey_blocks(model)[0]


def refused_blocks(model: nn.Module) -> dict[str, str]:
    """What looks like a feed-forward block of the model but cannot be patched: name -> reason."""
    return survey_blocks(model)[1]


def survey_blocks(model: nn.Module) -> tuple[list[FeedForwardBlock], dict[str, str]]:
    """`(blocks, refused)` as [`find_feed_forward_blocks`] and [`refused_blocks`] give them, in one pass."""
    model = unwrap(model)[0]
    found = _Survey(model)
    for name, module in model.named_modules():
        found.look_into(name, module)
    return _in_forward_order(model, found.blocks), found.refused


class _Survey:
    """What is found in one model, module by module."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.verifier, self.cut = model, Verifier(model), _cut_linears(model)
        self.blocks: list[FeedForwardBlock] = []
        self.refused: dict[str, str] = {}
        self.ups: set[int] = set()  # ids of linears that belong to a block
        self.downs: set[int] = set()
        self.names: set[str] = set()

    def look_into(self, name: str, holder: Any) -> None:
        """Adds the blocks that a module holds, or why it holds none."""
        if _holds_experts(holder):
            self.refused[name] = "MoE experts held as 3-D parameters"
            return
        if not children_of(holder):
            return
        reasons, count = [], len(self.blocks)
        for row in (*_sequential_layouts(holder), *LAYOUTS):
            layout = _match(holder, row)
            if layout is None or self._is_taken(holder, layout):
                continue
            try:
                self._add(name, holder, layout)
            except Refusal as refusal:
                reasons.append(str(refusal))
        if reasons and len(self.blocks) == count:
            self.refused[name] = reasons[0]

    def _is_taken(self, holder: nn.Module, layout: FeedForwardLayout) -> bool:
        return id(part_at(holder, layout.up)) in self.ups or id(part_at(holder, layout.down)) in self.downs

    def _add(self, holder_name: str, holder: nn.Module, layout: FeedForwardLayout) -> None:
        up, down = part_at(holder, layout.up), part_at(holder, layout.down)
        state, wiring = _state_of(holder, layout), None
        if state != "collapsed":
            # A block that was cut is narrower than others may be.
            if down not in self.cut:
                _refuse_shapes(self.model, holder, layout)
            wiring = self.verifier.wiring(holder_name, layout)
        if state == "dense" and down in self.cut:
            state = "collapsed"
        if _is_linear(up):
            self.ups.add(id(up))
        self.downs.add(id(down))
        several = isinstance(holder, nn.Sequential) or not holder_name or holder_name in self.names
        name = f"{holder_name}.{layout.up}".lstrip(".") if several else holder_name
        self.names.add(name)
        self.blocks.append(_describe(name, len(self.blocks), state, holder_name, holder, layout, wiring))


def _cut_linears(model: nn.Module) -> set[nn.Module]:
    """The linears that a collapse put into a model and that are called by native code."""
    cut = {module for module in model.modules() if CUT in module.__dict__}
    for part in model.modules():
        if isinstance(part, LayerCollapseModelMixin):
            cut.update(module for _, _, module, spec in resolved_of(part) if spec["type"] in ("linear", "conv1d"))
    return cut


def _in_forward_order(model: nn.Module, blocks: list[FeedForwardBlock]) -> list[FeedForwardBlock]:
    """Modules are registered in the order they run in, with one exception: a layer that holds a block itself comes
    before the blocks inside its children (MobileBERT's further feed-forward networks), and runs it last."""
    ordered = []
    open_layers: list[Any] = []
    for block in blocks:
        while open_layers and not block.holder.startswith(f"{open_layers[-1].holder}."):
            ordered.append(open_layers.pop())
        holder = model.get_submodule(block.holder)
        whole = isinstance(holder, (CollapsedBlock, nn.Sequential)) or (block.wiring and block.wiring.own_module)
        (ordered if whole else open_layers).append(block)
    ordered.extend(reversed(open_layers))
    return [replace(block, index=index) for index, block in enumerate(ordered)]


def _holds_experts(module: nn.Module) -> bool:
    stacked = [parameter.shape[0] for parameter in module.parameters(recurse=False) if _is_stacked(parameter)]
    return len(stacked) >= 2 and len(set(stacked)) == 1 and "experts" in type(module).__name__.lower()


def _is_stacked(parameter: nn.Parameter) -> bool:
    return parameter.dim() == 3


def _sequential_layouts(holder: nn.Module) -> Iterator[FeedForwardLayout]:
    """A layout for each Linear, activation, Linear in an `nn.Sequential`; dropouts and batch norms may be between."""
    if type(holder).forward is not nn.Sequential.forward:
        return
    up = activation = None
    for name, child in children_of(holder).items():
        if _is_linear(child):
            if up is not None and activation is not None:
                yield FeedForwardLayout("sequential", up, name, activation)
            up, activation = name, None
        elif isinstance(child, CollapsibleActivation) or _is_elementwise(child):
            if up is not None and activation is None:
                activation = name
            else:
                up = None
        elif not isinstance(child, (*DROPOUTS, *NORMS)):
            up = None


def _is_elementwise(module: nn.Module) -> bool:
    if type(module).__module__ not in ("torch.nn.modules.activation", "transformers.activations"):
        return False
    return not isinstance(module, (nn.GLU, nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin))


def _match(holder: Any, layout: FeedForwardLayout) -> FeedForwardLayout | None:
    """The layout, with one activation path, if the holder's children are spelled like this; else `None`."""
    if isinstance(holder, CollapsedBlock):
        return layout if holder.spec["child"] == layout.down else None
    if isinstance(holder, NarrowFeedForward):
        names = holder.names
        same = (names["up"], names["down"], names.get("gate")) == (layout.up, layout.down, layout.gate)
        return replace(layout, activation=names["activation"]) if same and holder.gated == layout.gated else None
    if part_at(holder, layout.up) is None:  # so it is of most rows
        return None
    paths = layout.activation if isinstance(layout.activation, tuple) else (layout.activation,)
    standing = [path for path in paths if part_at(holder, path) is not None]
    layout = replace(layout, activation=standing[0] if standing else paths[0])
    return layout if _fit_together(holder, layout) else None


def _fit_together(holder: nn.Module, layout: FeedForwardLayout) -> bool:
    """Whether the parts are linears and what is between them, and the last one takes what the first one gives."""
    up, activation, down = (part_at(holder, path) for path in (layout.up, layout.activation_path, layout.down))
    if not _is_linear(down) or (layout.gate and not _is_linear(part_at(holder, layout.gate))):
        return False
    if layout.gated and isinstance(activation, REMAINS):  # gated blocks are replaced as a whole
        return False
    if isinstance(up, CollapsedIdentity):
        return isinstance(activation, CollapsedIdentity)
    if not _is_linear(up):
        return False
    width_in, given = _linear_shape(up)
    if isinstance(up, PASS_ON):
        given += width_in
    return given == (2 if layout.fused else 1) * _linear_shape(down)[0]


def _state_of(holder: nn.Module, layout: FeedForwardLayout) -> str:
    """`"collapsed"` where a collapse left modules of this package, `"patched"` or `"dense"`."""
    activation = part_at(holder, layout.activation) if isinstance(layout.activation, str) else None
    if any(isinstance(module, REMAINS) for module in (holder, activation)):
        return "collapsed"
    return "patched" if isinstance(activation, CollapsibleActivation) else "dense"


def _is_linear(module: nn.Module | None) -> bool:
    return module is not None and isinstance(base_layer(module), (nn.Linear, Conv1D, *PASS_ON))


def _linear_shape(module: Any) -> tuple[int, int]:
    return linear_shape(base_layer(module))


def _refuse_shapes(model: nn.Module, holder: nn.Module, layout: FeedForwardLayout) -> None:
    (up_in, up_out), (down_in, down_out) = (_linear_shape(part_at(holder, path)) for path in (layout.up, layout.down))
    if isinstance(model, PreTrainedModel) and up_in != down_out:
        raise Refusal(f"it maps {up_in} to {down_out}: a head or a projection, not a block between equal widths")
    if part_at(holder, layout.activation_path) is None:
        raise Refusal("its activation is a plain function, not a module that can be exchanged")
    gate = up_in * down_in if layout.gate else 0
    if up_in * down_out >= up_in * up_out + gate + down_in * down_out:
        raise Refusal(f"it is a bottleneck {up_in} -> {down_in} -> {down_out}: one map would be larger than the two")


def _describe(
    name: str,
    index: int,
    state: str,
    holder_name: str,
    holder: nn.Module,
    layout: FeedForwardLayout,
    wiring: Wiring | None,
) -> FeedForwardBlock:
    linears = [base_layer(module) for path in layout.linears if (module := part_at(holder, path)) is not None]
    linears = [linear for linear in linears if not isinstance(linear, CollapsedIdentity)]
    shapes = [linear_shape(linear) for linear in linears]
    activation = part_at(holder, layout.activation) if isinstance(layout.activation, str) else None
    # What goes into the last linear are the linear map's channels and the neurons.
    hidden = channels = shapes[-1][0]
    if wiring is None:
        narrow = (NarrowFeedForward, NarrowActivation)
        hidden = sum(module.neurons for module in (holder, activation) if isinstance(module, narrow))
    return FeedForwardBlock(
        name=name,
        index=index,
        kind="gated" if layout.gated else "plain",
        state=state,
        layout=layout,
        in_features=shapes[0][0],
        hidden_features=hidden,
        out_features=shapes[-1][1],
        parameters=sum(parameter.numel() for linear in linears for parameter in linear.parameters()),
        macs=sum(features_in * features_out for features_in, features_out in shapes),
        alpha=_mean_alpha(activation) if state == "patched" else None,
        holder=holder_name,
        wiring=wiring,
        rank=channels - hidden if state == "collapsed" else None,
    )


def _mean_alpha(activation: Any) -> float | None:
    return None if activation.alpha.is_meta else float(activation.alpha.detach().float().mean())
