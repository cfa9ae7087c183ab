"""What one block becomes: its new linears from a fit or from its own weights, and their place in the model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import functional, processes
from .blocks import BoundBlock, Exchange, weight_and_bias
from .modeling_layercollapse import (
    PASS_ON,
    CollapsedBlock,
    CollapsedIdentity,
    CollapsibleActivation,
    NarrowActivation,
    NarrowFeedForward,
    PassOnConv1D,
    PassOnLinear,
    children_of,
    mark_initialized,
)
from .models import CUT, device_of, kept_on
from .reports import BlockReport
from .upstream import offload_like, weights_in_memory


if TYPE_CHECKING:
    from .families import FeedForwardBlock


@dataclass(frozen=True)
class BlockChoice:
    """What a block is to become.

    Args:
        rank (`int`, *optional*): Of its linear map; `None`: full.
        neurons (`int` or `list[int]`): How many neurons stay nonlinear, or which.
        in_metric (`bool`): Whether a linear map of low rank is chosen in the metric of the loss.
        dropped (`bool`): Whether rank 0 and no neurons are what is meant: the block gives a constant.
    """

    rank: int | None = None
    neurons: int | list[int] = 0
    in_metric: bool = False
    dropped: bool = False

    @property
    def count(self) -> int:
        """How many neurons stay."""
        return self.neurons if isinstance(self.neurons, int) else len(self.neurons)


# What a merge makes: of the class that the native code has there, or what passes its input on beside that.
LinearLayer = nn.Linear | Conv1D | PassOnLinear | PassOnConv1D


@dataclass(frozen=True)
class Merge:
    """What a block becomes, not yet in the model. Its weights wait where those of the block lie: in the host's memory
    where accelerate offloads these, brought to where they run for each call as they will be in the model.

    Args:
        block (`BoundBlock`): Which.
        linears (`dict[str, nn.Module]`): Path in the block -> the linear that will stand there.
        fit (`functional.Fit`): The shapes of what they hold: nothing reads the numbers again.
        report (`BlockReport`): What that does.
    """

    block: BoundBlock
    linears: dict[str, LinearLayer]
    fit: functional.Fit
    report: BlockReport

    @property
    def bytes(self) -> int:
        """What its linears take."""
        return sum(weight.numel() * weight.element_size() for weight in self.weights)

    @property
    def weights(self) -> list[torch.Tensor]:
        """Those of its linears, where they wait."""
        return [weight for linear in self.linears.values() for weight in weights_in_memory(linear)]

    @property
    def error(self) -> float:
        """The relative error, as [`BlockReport.measured_error`] has it."""
        error = self.report.measured_error
        assert error is not None, "every merge is measured"
        return error


def stored_rank(block: "FeedForwardBlock", rank: int | None) -> int | None:
    """The rank of the two thin matrices, or `None` where one full matrix is no larger."""
    if rank is None or rank * (block.in_features + block.out_features) >= block.in_features * block.out_features:
        return None
    return rank


def stored_neurons(rank: int | None, neurons: int) -> int:
    """How many neurons a block has with this choice: a dropped one, of which nothing is left, has one of zeros, as a
    linear without any weight is none."""
    return 1 if rank == 0 and neurons == 0 else neurons


def cost_of(block: "FeedForwardBlock", rank: int | None, neurons: int) -> int:
    """Weights (biases left out), which are also the MACs per token, of what a block becomes; linear in the neurons, so
    that the one of zeros that a dropped block has is for the caller to count (see [`stored_neurons`])."""
    rank = stored_rank(block, rank)
    width, out = block.in_features, block.out_features
    linear = width * out if rank is None else rank * (width + out)
    return linear + neurons * (width * (2 if block.kind == "gated" else 1) + out)


def is_cut(block: BoundBlock, rank: int | None) -> bool:
    """Whether a block with a linear map of this rank is the native module with narrower linears: neurons only, of
    which nothing between the linears knows how many there are."""
    return rank == 0 and not block.before and not block.between and native_activation(block)[1] == "native"


def is_possible(block: BoundBlock, rank: int | None, neurons: int) -> bool:
    """Whether a block can become a linear map of this rank with so many neurons: not where its own code scales what
    goes into its activation or its last linear, or its parts lie in modules of their own, unless it is native then or
    one map."""
    if is_cut(block, rank) or (rank is None and not neurons):
        return True
    nested = any("." in path for path in (*block.layout.linears, block.layout.activation_path))
    return block.code.scales[:2] == (1.0, 1.0) and not (block.code.own_module and nested)


def has_constant(block: BoundBlock, rank: int | None, constant_term: str) -> bool:
    """Whether what is fitted in the place of a block has a constant term.

    By `constant_term="native"` where the last linear of the native class has a bias, and where the result is a module
    of this package in any case: a gated block is linear only beside a constant gate, and batch norms shift.
    """
    ours = block.before or block.between or (block.layout.gated and rank != 0)
    return constant_term == "always" or block.down.bias is not None or bool(ours)


def parameters_of(block: BoundBlock, rank: int | None, neurons: int, constant_term: str) -> int:
    """Weights and biases of what a block becomes."""
    rank = stored_rank(block, rank)
    narrow, biases = bool(rank is not None or neurons), 0
    if narrow:
        before = [linear for linear in (block.up, block.gate) if linear is not None and linear.bias is not None]
        biases += neurons * len(before) * (2 if block.layout.fused else 1)
        biases += (rank or 0) if block.up.bias is not None else 0
    # A `NarrowFeedForward` has a bias at its end.
    ours = narrow and block.code.own_module and not is_cut(block, rank)
    if ours or has_constant(block, rank, constant_term):
        biases += block.out_features
    return cost_of(block, rank, neurons) + biases


def size_of(block: BoundBlock, rank: int | None, neurons: int, unit: str, constant_term: str) -> int:
    """What a block becomes, in the unit of a budget, `"macs"` or `"parameters"`; with the neuron of zeros that a
    dropped one has."""
    neurons = stored_neurons(rank, neurons)
    if unit == "macs":
        return cost_of(block, rank, neurons)
    return parameters_of(block, rank, neurons, constant_term)


def is_ready(alpha: torch.Tensor, collapse_threshold: float) -> bool:
    """Whether a block with these alphas (tensor of shape `(1,)` or `(hidden,)`) may collapse. Never if one is NaN."""
    return bool(ready_neurons(alpha, collapse_threshold).all())


def ready_neurons(alpha: torch.Tensor, collapse_threshold: float) -> torch.Tensor:
    """Which alphas have reached the threshold: a tensor of `bool`."""
    # In alpha's own precision: an alpha of 0.95 has reached a threshold of 0.05.
    return alpha.detach() >= torch.tensor(1 - collapse_threshold, dtype=alpha.dtype)


class Trial:
    """Blocks replaced for a while: everything returns to its place on exit."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.undo()

    def keep(self) -> None:
        """Everything stays as it is now."""
        self.exchanges = []

    def put(self, merge: Merge) -> None:
        """Puts what a block becomes in its place, with the hooks that bring its weights there."""
        put_in_place(merge, self.exchanges)

    def restore(self, blocks: Iterable[BoundBlock]) -> None:
        """Puts the native activations back into patched blocks."""
        for block in blocks:
            self.exchanges.append(block.restore())

    def undo(self, count: int = 0) -> None:
        """Takes back all exchanges but the first `count` (of `len(self.exchanges)`)."""
        while len(self.exchanges) > count:
            self.exchanges.pop().undo()


@torch.no_grad()
def make_merge(block: BoundBlock, fit: functional.Fit, refit: bool) -> Merge:
    """The [`Merge`] that a fit makes of a block."""
    dropped = fit.rank == 0 and not fit.neurons
    if dropped:
        # Its first neuron, which gives nothing: training can still give it something to say.
        fit = replace(fit, neurons=[0], down_ok=fit.down_ok.new_zeros(block.out_features, 1))
    with block.weights_present():
        linears = _linears_of(block, fit)
    # Not the block's own width, where the first linear is what another block of a chain became.
    width = fit.features
    x = functional.gaussian_inputs(width).to(device_of(block.down), block.down.weight.dtype)
    error = functional.relative_error(block.forward(x), _compute(block, linears, fit, x))
    report = BlockReport(
        name=block.name,
        index=block.index,
        outcome="collapsed",
        method="dropped" if dropped else "refit" if refit else "merged",
        alpha=float(block.activation.alpha.detach().min()) if block.state == "patched" else None,
        parameters_before=block.parameters,
        parameters_after=sum(p.numel() for linear in linears.values() for p in linear.parameters()),
        macs_before=block.macs,
        macs_after=sum(linear.weight.numel() for linear in linears.values()),
        error=error,
        calibration_error=fit.error if refit else None,
        r2=fit.r2 if refit else None,
        rank=fit.rank,
        kept_neurons=0 if dropped else len(fit.neurons),
    )
    return Merge(block, linears, fit.shapes(), report)


def merges_of_the_first(merges: Mapping[str, Merge]) -> dict[str, Merge]:
    """The first process's merges of the same blocks to the same sizes, on all: what is decided by them, or fitted with
    them in place, is to be the same everywhere."""
    told = processes.of_the_first([(merge.fit, merge.report) for merge in merges.values()])
    processes.spread([weight for merge in merges.values() for weight in merge.weights])
    pairs = zip(merges.items(), told, strict=True)
    return {name: replace(merge, fit=fit, report=report) for (name, merge), (fit, report) in pairs}


def computed(merge: Merge) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function of its input that a block is going to be."""
    return lambda x: _compute(merge.block, merge.linears, merge.fit, x)


def fit_of_weights(block: BoundBlock, collapse_threshold: float) -> functional.Fit:
    """The fit that the weights alone give: ready neurons as if at alpha 1, the others exactly as they are. Where these
    go to a constant nothing linear is left of them, and its rank is 0."""
    slope, offset = block.activation.line
    alpha = block.activation.alpha.detach()
    waiting = ~ready_neurons(alpha, collapse_threshold)
    neurons = []
    (down, down_bias), up = block.down_affine(), block.up_affine()
    if alpha.numel() > 1 and waiting.any():
        # (1 - alpha) act(z) + alpha line(z): the second part is linear, and merges.
        neurons = waiting.nonzero().flatten().tolist()
        share = torch.where(waiting, alpha, 1.0)
        slope, offset = share * slope, share * offset
    if block.layout.gated:
        weight, bias = functional.merge_gated(*up, down, down_bias, offset)
    else:
        weight, bias = functional.merge_plain(*up, down, down_bias, slope, offset)
    kept = down.double()[:, neurons] * (1 - alpha.double()[neurons] if neurons else 1.0)
    if block.activation.leaves_constant:
        left, right = weight.new_zeros(weight.shape[0], 0), weight.new_zeros(0, weight.shape[1])
        return functional.Fit(None, left, right, kept, bias, neurons)
    return functional.Fit(weight, None, None, kept, bias, neurons)


def _linears_of(block: BoundBlock, fit: functional.Fit) -> dict[str, LinearLayer]:
    """Path in the block -> linear, for what the fit leaves of a block's linears, in the order they are called."""
    layout, neurons = block.layout, fit.neurons
    if is_cut(block, fit.rank):
        return _cut_linears(block, fit)
    linear = fit.linear_or
    linears: dict[str, LinearLayer] = {}
    # Native code gives what leaves the first linear to the activation, and that to the last one.
    passes = not block.code.own_module and fit.right_ri is None
    if neurons or fit.right_ri is not None:
        up, up_bias = block.up_affine()
        rows = [up[neurons].double()]
        biases = [None if up_bias is None else up_bias[neurons].double()]
        if fit.right_ri is not None:
            rows.insert(0, fit.right_ri)
            biases.insert(0, None)
        if layout.gated and neurons:
            gate, gate_bias = block.gate_affine()
            gate, gate_bias = gate[neurons].double(), None if gate_bias is None else gate_bias[neurons].double()
            if layout.gate is None:
                rows.insert(0, gate)
                biases.insert(0, gate_bias)
            else:
                linears[layout.gate] = _make_linear(block.gate, gate, gate_bias)
        linears[layout.up] = _make_linear(block.up, torch.cat(rows), _stack_biases(rows, biases), passes)
    bias = fit.bias_o
    if bias is None and linears and block.code.own_module:
        bias = linear.new_zeros(linear.shape[0])  # a `NarrowFeedForward` has one
    linears[layout.down] = _make_linear(block.down, torch.cat([linear, fit.down_ok], dim=1), bias)
    return linears


def _cut_linears(block: BoundBlock, fit: functional.Fit) -> dict[str, LinearLayer]:
    """The native linears with the kept neurons only; what the last one gives is fitted."""
    layout = block.layout
    linears: dict[str, LinearLayer] = {}

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        if not layout.fused:
            return tensor[fit.neurons].double()
        gate, up = layout.split(tensor, 0)
        return layout.join(gate[fit.neurons].double(), up[fit.neurons].double(), 0)

    parts = {layout.up: block.up} if layout.gate is None else {layout.gate: block.gate, layout.up: block.up}
    for path, linear in parts.items():
        weight, bias = weight_and_bias(linear)
        linears[path] = _make_linear(linear, kept(weight), None if bias is None else kept(bias))
    # The block's code goes on to multiply by its constants.
    _, leaves, returned = block.scales
    bias = None if fit.bias_o is None else fit.bias_o / returned
    linears[layout.down] = _make_linear(block.down, fit.down_ok / (leaves * returned), bias)
    return linears


def _stack_biases(rows: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [row.new_zeros(row.shape[0]) if bias is None else bias for row, bias in zip(rows, biases, strict=True)]
    )


def native_activation(block: BoundBlock) -> tuple[nn.Module, str, nn.Module]:
    """`(the activation that stood there, the name in a table of the one that kept neurons have, that one)`."""
    activation = block.activation
    if isinstance(activation, CollapsibleActivation):
        return activation.native, activation.act_name, activation.act
    return activation, "native", activation


def _compute(
    block: BoundBlock, linears: Mapping[str, LinearLayer], fit: functional.Fit, x: torch.Tensor
) -> torch.Tensor:
    """What the block is going to compute."""
    layout = block.layout
    if is_cut(block, fit.rank):
        gate = None if layout.gate is None else linears[layout.gate]
        cut: dict[str, Any] = {"up": linears[layout.up], "gate": gate, "down": linears[layout.down]}
        return replace(block, **cut, activation=native_activation(block)[0]).forward(x)
    if fit.right_ri is None and not fit.neurons:
        return linears[layout.down](x)
    gate, up = None, linears[layout.up](x)
    count = len(fit.neurons)
    if layout.gate is not None and count:
        gate = linears[layout.gate](x)
    elif layout.fused and count:
        gate, up = up[..., :count], up[..., count:]
    linear = x
    if fit.right_ri is not None or isinstance(linears[layout.up], PASS_ON):
        linear, up = up.split([up.shape[-1] - count, count], dim=-1)
    act = native_activation(block)[2]
    return linears[layout.down](torch.cat([linear, act(up) if gate is None else act(gate) * up], dim=-1))


@torch.no_grad()
def _make_linear(like: Any, weight: torch.Tensor, bias: torch.Tensor | None, passes: bool = False) -> LinearLayer:
    """A layer of the same kind and dtype as `like` that holds these weights, where those of `like` lie, offloaded as
    they are.

    Args:
        passes (`bool`): Whether it passes its input on.
    """
    out_features, in_features = weight.shape
    with torch.device("meta"):  # neither time nor random numbers go into first values
        linear: LinearLayer
        if isinstance(like, Conv1D):
            weight, sizes = weight.T, (out_features, in_features)
            linear = PassOnConv1D(*sizes) if passes else Conv1D(*sizes)
        else:
            shape = in_features, out_features, bias is not None
            linear = PassOnLinear(*shape) if passes else nn.Linear(*shape)
    linear.to(like.weight.dtype).to_empty(device=kept_on(like))
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(torch.zeros(()) if bias is None else bias)
    linear.requires_grad_(like.weight.requires_grad)
    mark_initialized(linear)
    offload_like(linear, like)
    return linear


def put_in_place(merge: Merge, exchanges: list[Exchange] | None = None) -> list[Exchange]:
    """Puts what a block becomes where it was. What is new there is in the mode that the block is in now; what goes on
    to run there keeps its own.

    Args:
        exchanges (`list`, *optional*): Gets every [`Exchange`] as it is made.

    Returns:
        `list[Exchange]`, in order. The modules that now stand there say what the replacement table holds of them.
    """
    holder = merge.block.module
    standing, exchanges = set(holder.modules()), [] if exchanges is None else exchanges
    for path, module in _replacements(merge).items():
        mark_initialized(module)
        for part in module.modules():
            if part not in standing:
                part.training = holder.training
        exchanges.append(merge.block.exchange(path, module))
    return exchanges


def _replacements(merge: Merge) -> dict[str, nn.Module]:
    """Path in the block -> what will stand there, `""` for the module that holds it; in the order of exchange."""
    block, layout, linears, fit = merge.block, merge.block.layout, merge.linears, merge.fit
    if is_cut(block, fit.rank):
        linears[layout.down].__dict__[CUT] = True
        # Where an alpha was, the native activation stands again.
        native = {layout.activation_path: native_activation(block)[0]} if block.state == "patched" else {}
        return {**linears, **native}
    if not block.code.own_module:
        return _parts_of(merge)
    then = {name: children_of(block.module)[name] for name in block.code.then}
    if not _is_narrow(fit):
        down: dict[str, nn.Module] = {layout.down: linears[layout.down]}
        return {**down, "": CollapsedBlock({**down, **then})}
    return {"": _narrow_module(merge, then)}


def _is_narrow(fit: functional.Fit) -> bool:
    """Whether there is more than one full linear map."""
    return fit.right_ri is not None or bool(fit.neurons)


def _linear_channels(merge: Merge) -> int:
    """Channels that skip the activation."""
    return merge.block.in_features if merge.fit.right_ri is None else len(merge.fit.right_ri)


def _parts_of(merge: Merge) -> dict[str, nn.Module]:
    """What will stand in the places of a block whose own code goes on to run around them."""
    block, layout, linears, fit = merge.block, merge.block.layout, merge.linears, merge.fit
    idle = (layout.up, layout.activation_path, *block.code.before, *block.code.between)
    modules: dict[str, nn.Module] = {layout.down: linears[layout.down]}
    modules |= {path: CollapsedIdentity() for path in idle}
    if layout.up in linears:
        modules[layout.up] = linears[layout.up]
    if fit.neurons:
        native, name, act = native_activation(block)
        narrow = NarrowActivation(native, _linear_channels(merge), len(fit.neurons), name)
        if name != "native":
            narrow.replacement = act  # with what it learned
        modules[layout.activation_path] = narrow
    return modules


def _narrow_module(merge: Merge, then: Mapping[str, nn.Module]) -> NarrowFeedForward:
    """A narrow block in place of an own module, with what runs after it there."""
    block, layout, fit = merge.block, merge.block.layout, merge.fit
    _, act_name, act = native_activation(block)
    names = {"up": layout.up, "activation": layout.activation_path, "down": layout.down}
    if layout.gate is not None:
        names = {"gate": layout.gate, **names}
    standing: dict[str, nn.Module] = {**merge.linears, layout.activation_path: act}
    children = {**{name: standing[name] for name in names.values() if name in standing}, **then}
    channels, count = _linear_channels(merge), len(fit.neurons)
    return NarrowFeedForward(children, names, block.in_features, channels, count, layout.gated, act_name)
