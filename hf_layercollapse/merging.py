"""What one block becomes: its new linears from a fit or from its own weights, and their place in the model."""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import functional
from .families import CUT, FeedForwardBlock, modules_of, weight_and_bias
from .modeling_layercollapse import (
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
from .patching import replace_module
from .reports import BlockReport


@dataclass(frozen=True)
class BlockChoice:
    """What a block is to become.

    Args:
        rank (`int`, *optional*): Of its linear map; `None`: full.
        neurons (`int` or `list[int]`): How many neurons stay nonlinear, or which.
        in_metric (`bool`): Whether a linear map of low rank is chosen in the metric of the loss.
    """

    rank: int | None = None
    neurons: int | list[int] = 0
    in_metric: bool = False

    @property
    def count(self) -> int:
        """How many neurons stay."""
        return self.neurons if isinstance(self.neurons, int) else len(self.neurons)


@dataclass(frozen=True)
class Merge:
    """What a block becomes, not yet in the model.

    Args:
        block (`FeedForwardBlock`): Which.
        linears (`dict[str, nn.Module]`): Path in the block -> the linear that will stand there.
        fit (`functional.Fit`): What they hold.
        report (`BlockReport`): What that does.
    """

    block: FeedForwardBlock
    linears: dict[str, nn.Module]
    fit: functional.Fit
    report: BlockReport


def effective_rank(block, rank):
    """The rank of the two thin matrices, or `None` where one full matrix is no larger."""
    if rank is None or rank * (block.in_features + block.out_features) >= block.in_features * block.out_features:
        return None
    return rank


def cost_of(block, rank, neurons) -> int:
    """Weights (biases left out), which are also the MACs per token, of what a block becomes."""
    rank = effective_rank(block, rank)
    width, out = block.in_features, block.out_features
    linear = width * out if rank is None else rank * (width + out)
    return linear + neurons * (width * (2 if block.kind == "gated" else 1) + out)


def is_cut(parts, rank) -> bool:
    """Whether a block of these modules with a linear map of this rank is the native module with narrower linears:
    neurons only, of which nothing between the linears knows how many there are."""
    return rank == 0 and not parts.before and not parts.between and native_activation(parts)[1] == "native"


def has_constant(parts, rank, constant_term) -> bool:
    """Whether what is fitted in the place of these modules has a constant term.

    By `constant_term="native"` where the last linear of the native class has a bias, and where the result is a module
    of this package in any case: a gated block is linear only beside a constant gate, and batch norms shift.
    """
    ours = parts.before or parts.between or (parts.layout.gated and rank != 0)
    return constant_term == "always" or parts.down.bias is not None or bool(ours)


def parameters_of(block, parts, rank, neurons, constant_term) -> int:
    """Weights and biases of what a block becomes."""
    rank = effective_rank(block, rank)
    narrow, biases = bool(rank is not None or neurons), 0
    if narrow:
        before = [linear for linear in (parts.up, parts.gate) if linear is not None and linear.bias is not None]
        biases += neurons * len(before) * (2 if parts.layout.fused else 1)
        biases += (rank or 0) if parts.up.bias is not None else 0
    # A `NarrowFeedForward` has a bias at its end.
    ours = narrow and block.wiring.own_module and not is_cut(parts, rank)
    if ours or has_constant(parts, rank, constant_term):
        biases += block.out_features
    return cost_of(block, rank, neurons) + biases


def is_ready(alpha, collapse_threshold) -> bool:
    """Whether a block with these alphas (tensor of shape `(1,)` or `(hidden,)`) may collapse. Never if one is NaN."""
    return bool(ready_neurons(alpha, collapse_threshold).all())


def ready_neurons(alpha, collapse_threshold):
    """Which alphas have reached the threshold: a tensor of `bool`."""
    # In alpha's own precision: an alpha of 0.95 has reached a threshold of 0.05.
    return alpha.detach() >= torch.tensor(1 - collapse_threshold, dtype=alpha.dtype)


class Trial:
    """Blocks replaced for a while: everything returns to its place on exit."""

    def __init__(self, inner):
        self.inner, self.originals = inner, []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.undo()

    def put(self, merge):
        """Puts what a block becomes in its place."""
        put_in_place(self.inner, merge, self.originals)

    def undo(self, count=0):
        """Takes back all replacements but the first `count` (of `len(self.originals)`)."""
        while len(self.originals) > count:
            replace_module(self.inner, *self.originals.pop())


@torch.no_grad()
def make_merge(block, parts, fit, refit):
    """The [`Merge`] that a fit makes of a block."""
    linears = _linears_of(block, parts, fit)
    # Not the block's own width, where the first linear is what another block of a chain became.
    width = (fit.weight_oi if fit.right_ri is None else fit.right_ri).shape[1]
    x = functional.gaussian_inputs(width).to(parts.down.weight)
    error = functional.relative_error(parts.forward(x), _compute(block, parts, linears, fit, x))
    report = BlockReport(
        name=block.name,
        index=block.index,
        outcome="collapsed",
        method="refit" if refit else "merged",
        alpha=float(parts.activation.alpha.detach().min()) if block.state == "patched" else None,
        parameters_before=block.parameters,
        parameters_after=sum(p.numel() for linear in linears.values() for p in linear.parameters()),
        macs_before=block.macs,
        macs_after=sum(linear.weight.numel() for linear in linears.values()),
        error=error,
        calibration_error=fit.error if refit else None,
        r2=fit.r2 if refit else None,
        rank=fit.rank,
        kept_neurons=len(fit.neurons),
    )
    return Merge(block, linears, fit, report)


def fit_of_weights(parts, collapse_threshold):
    """The fit that the weights alone give: ready neurons as if at alpha 1, the others exactly as they are."""
    slope, offset = parts.activation.line
    alpha = parts.activation.alpha.detach()
    waiting = ~ready_neurons(alpha, collapse_threshold)
    neurons = []
    (down, down_bias), up = parts.down_affine(), parts.up_affine()
    if alpha.numel() > 1 and waiting.any():
        # (1 - alpha) act(z) + alpha line(z): the second part is linear, and merges.
        neurons = waiting.nonzero().flatten().tolist()
        share = torch.where(waiting, alpha, 1.0)
        slope, offset = share * slope, share * offset
    if parts.layout.gated:
        weight, bias = functional.merge_gated(*up, down, down_bias, offset)
    else:
        weight, bias = functional.merge_plain(*up, down, down_bias, slope, offset)
    kept = down.double()[:, neurons] * (1 - alpha.double()[neurons] if neurons else 1.0)
    return functional.Fit(weight, None, None, kept, bias, neurons)


def _linears_of(block, parts, fit):
    """Path in the block -> linear, for what the fit leaves of a block's linears, in the order they are called."""
    layout, neurons = block.layout, fit.neurons
    if is_cut(parts, fit.rank):
        return _cut_linears(parts, fit)
    linear = fit.weight_oi if fit.left_or is None else fit.left_or
    linears = {}
    if neurons or fit.right_ri is not None:
        up, up_bias = parts.up_affine()
        rows = [up.double()[neurons]]
        biases = [None if up_bias is None else up_bias.double()[neurons]]
        if fit.right_ri is not None:
            rows.insert(0, fit.right_ri)
            biases.insert(0, None)
        if layout.gated and neurons:
            if layout.fused:
                gate, gate_bias = (
                    None if tensor is None else layout.split(tensor, 0)[0] for tensor in weight_and_bias(parts.up)
                )
            else:
                gate, gate_bias = weight_and_bias(parts.gate)
            gate, gate_bias = gate.double()[neurons], None if gate_bias is None else gate_bias.double()[neurons]
            if layout.fused:
                rows.insert(0, gate)
                biases.insert(0, gate_bias)
            else:
                linears[layout.gate] = _make_linear(parts.gate, gate, gate_bias)
        linears[layout.up] = _make_linear(parts.up, torch.cat(rows), _stack_biases(rows, biases))
    bias = fit.bias_o
    if bias is None and linears and block.wiring.own_module:
        bias = linear.new_zeros(linear.shape[0])  # a `NarrowFeedForward` has one
    linears[layout.down] = _make_linear(parts.down, torch.cat([linear, fit.down_ok], dim=1), bias)
    return linears


def _cut_linears(parts, fit):
    """The native linears with the kept neurons only; what the last one gives is fitted."""
    layout, linears = parts.layout, {}

    def rows(tensor):
        return None if tensor is None else tensor.double()[fit.neurons]

    up = weight_and_bias(parts.up)
    if layout.gate is not None:
        gate = weight_and_bias(parts.gate)
        linears[layout.gate] = _make_linear(parts.gate, *map(rows, gate))
    if layout.fused:
        halves = [None if tensor is None else layout.split(tensor, 0) for tensor in up]
        up = [None if pair is None else layout.join(*map(rows, pair), 0) for pair in halves]
        linears[layout.up] = _make_linear(parts.up, *up)
    else:
        linears[layout.up] = _make_linear(parts.up, *map(rows, up))
    # The block's code goes on to multiply by its constants.
    _, leaves, returned = parts.scales
    bias = None if fit.bias_o is None else fit.bias_o / returned
    linears[layout.down] = _make_linear(parts.down, fit.down_ok / (leaves * returned), bias)
    return linears


def _stack_biases(rows, biases):
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [row.new_zeros(row.shape[0]) if bias is None else bias for row, bias in zip(rows, biases, strict=True)]
    )


def native_activation(parts):
    """`(the activation that stood there, the name in a table of the one that kept neurons have, that one)`."""
    activation = parts.activation
    if isinstance(activation, CollapsibleActivation):
        return activation.native, activation.act_name, activation.act
    return activation, "native", activation


def _compute(block, parts, linears, fit, x):
    """What the block is going to compute."""
    layout = block.layout
    if is_cut(parts, fit.rank):
        cut = {"up": linears[layout.up], "gate": linears.get(layout.gate), "down": linears[layout.down]}
        return replace(parts, **cut, activation=native_activation(parts)[0]).forward(x)
    if fit.right_ri is None and not fit.neurons:
        return linears[layout.down](x)
    gate, up = None, linears[layout.up](x)
    count = len(fit.neurons)
    if layout.gate is not None and count:
        gate = linears[layout.gate](x)
    elif layout.fused and count:
        gate, up = up[..., :count], up[..., count:]
    linear, up = (x, up) if fit.right_ri is None else (up[..., : fit.rank], up[..., fit.rank :])
    act = native_activation(parts)[2]
    return linears[layout.down](torch.cat([linear, act(up) if gate is None else act(gate) * up], dim=-1))


@torch.no_grad()
def _make_linear(like, weight, bias):
    """A layer of the same kind, device and dtype as `like` that holds these weights."""
    out_features, in_features = weight.shape
    with torch.device("meta"):  # neither time nor random numbers go into first values
        if isinstance(like, Conv1D):
            linear, weight = Conv1D(out_features, in_features), weight.T
        else:
            linear = nn.Linear(in_features, out_features, bias=bias is not None)
    linear.to(like.weight.dtype).to_empty(device=like.weight.device)
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(torch.zeros(()) if bias is None else bias)
    linear.requires_grad_(like.weight.requires_grad)
    mark_initialized(linear)
    return linear.train(like.training)


def put_in_place(inner, merge, originals=None):
    """Puts what a block becomes where it was; returns `(qualified name, spec)` for the replacement table.

    Args:
        originals (`list`, *optional*): Gets `(qualified name, module)` of everything that was replaced, in order.
    """
    block, layout, linears, fit = merge.block, merge.block.layout, merge.linears, merge.fit
    wiring, parts = block.wiring, modules_of(inner, block)
    training = linears[layout.down].training
    entries = []

    def put(name, module, spec):
        if originals is not None:
            originals.append((name, inner.get_submodule(name)))
        mark_initialized(module)
        replace_module(inner, name, module.train(training))
        entries.append((name, spec))

    narrow = fit.right_ri is not None or fit.neurons
    channels = block.in_features if fit.right_ri is None else fit.rank
    native, act_name, act = native_activation(parts)
    if is_cut(parts, fit.rank):
        for path, linear in linears.items():
            put(block.path(path), linear, _linear_spec(linear))
        linears[layout.down].__dict__[CUT] = True
        if block.state == "patched":
            # No entry: the native one stands there again.
            activation = block.path(layout.activation)
            if originals is not None:
                originals.append((activation, parts.activation))
            replace_module(inner, activation, native.train(training))
    elif wiring.own_module and narrow:
        put(block.holder, *_narrow_module(inner, merge, parts, channels))
    elif wiring.own_module:
        holder, then = inner.get_submodule(block.holder), list(wiring.then)
        children = {layout.down: linears[layout.down], **{name: children_of(holder)[name] for name in then}}
        put(block.holder, CollapsedBlock(children), {"type": "block", "child": layout.down, "then": then})
        entries.append((block.path(layout.down), _linear_spec(linears[layout.down])))
    else:
        idle = [*wiring.before, *wiring.between]
        put(block.path(layout.down), linears[layout.down], _linear_spec(linears[layout.down]))
        if not narrow:
            idle += [layout.up, layout.activation]
        elif fit.right_ri is None:
            up = _pass_on(linears[layout.up])
            spec = {"type": "narrow_ffn", "part": "up", "linear_channels": channels, "neurons": len(fit.neurons)}
            spec.update(gated=False, in_features=channels, bias=up.bias is not None)
            put(block.path(layout.up), up, spec)
        else:
            put(block.path(layout.up), linears[layout.up], _linear_spec(linears[layout.up]))
        if narrow and fit.neurons:
            activation = NarrowActivation(native, channels, len(fit.neurons), act_name)
            if act_name != "native":
                activation.replacement = act  # with what it learned
            spec = {"type": "narrow_ffn", "part": "activation", "linear_channels": channels}
            spec.update(neurons=len(fit.neurons), gated=False, act=act_name)
            put(block.path(layout.activation), activation, spec)
        elif narrow:
            idle.append(layout.activation)
        for path in idle:
            put(block.path(path), CollapsedIdentity(), {"type": "identity"})
    return entries


def _linear_spec(linear):
    if isinstance(linear, Conv1D):
        return {"type": "conv1d", "in_features": linear.nx, "out_features": linear.nf}
    return {
        "type": "linear",
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
    }


def _pass_on(linear):
    """The same weights in a layer that passes its input on."""
    # Built like any other and not converted: a module must be of the class that the table will make.
    kind = PassOnConv1D if isinstance(linear, Conv1D) else PassOnLinear
    passing = kind.__new__(kind)
    passing.__dict__.update(linear.__dict__)
    return passing


def _narrow_module(inner, merge, parts, channels):
    """`(module, spec)` of a narrow block in place of an own module."""
    block, layout, linears, fit = merge.block, merge.block.layout, merge.linears, merge.fit
    holder, then = inner.get_submodule(block.holder), list(block.wiring.then)
    native, act_name, act = native_activation(parts)
    names = {"up": layout.up, "activation": layout.activation, "down": layout.down}
    if layout.gate is not None:
        names = {"gate": layout.gate, **names}
    children = {**linears, layout.activation: native if act_name == "native" else act}
    children = {name: children[name] for name in names.values() if name in children}
    children.update({name: children_of(holder)[name] for name in then})
    count, gated = len(fit.neurons), layout.gated
    module = NarrowFeedForward(children, names, block.in_features, channels, count, gated, act_name)
    up, gate = linears.get(layout.up), linears.get(layout.gate)
    spec = {
        "type": "narrow_ffn",
        "part": "block",
        "linear_channels": channels,
        "neurons": count,
        "gated": gated,
        "in_features": block.in_features,
        "out_features": block.out_features,
        "up": layout.up,
        "activation": layout.activation,
        "down": layout.down,
        "gate": layout.gate,
        "then": then,
        "up_bias": up is not None and up.bias is not None,
        "gate_bias": gate is not None and gate.bias is not None,
        "act": act_name,
    }
    return module, spec
