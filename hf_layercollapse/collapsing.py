"""Merging blocks and replacing them; what that did, as a [`CollapseReport`]."""

import dataclasses
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import functional
from .calibration import collect_moments, logits_of
from .config import LayerCollapseConfig
from .families import (
    FeedForwardBlock,
    check_weights,
    is_adapted,
    modules_of,
    select_blocks,
    survey_blocks,
    unwrap,
)
from .modeling_layercollapse import CollapsedBlock
from .patching import (
    collapsible_activations,
    layer_collapse_config_of,
    refresh_layer_collapse,
    replace_module,
    restore_blocks,
)


# Batches whose logits are compared before and after; enough to see a difference, few enough to hold.
LOGIT_BATCHES = 8


@dataclass(frozen=True)
class BlockReport:
    """What happened to one block.

    Args:
        name (`str`), index (`int`): Which block.
        outcome (`str`): `"collapsed"`; `"kept"` or `"restored"` if it was patched but not ready.
        method (`str`, *optional*): `"merged"` (alpha taken as 1) or `"refit"` (least squares on calibration data).
        alpha (`float`, *optional*): Smallest alpha of the block before, `None` if it was not patched.
        parameters_before, parameters_after (`int`): Weights and biases of the block.
        macs_before, macs_after (`int`): Multiply-accumulates per token.
        error (`float`, *optional*): Relative error of the one map against the block before, `|new - old| / |old|`, on
            the standard-normal inputs of [`functional.gaussian_inputs`].
        calibration_error (`float`, *optional*): The same on the calibration data, if there was any and the block was
            refit to it.
        r2 (`float`, *optional*): Share of the variance of the block's output that the map explains on that data.
    """

    name: str
    index: int
    outcome: str
    alpha: float | None
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    method: str | None = None
    error: float | None = None
    calibration_error: float | None = None
    r2: float | None = None


@dataclass(frozen=True)
class CollapseReport:
    """What a collapse did. Prints as a table.

    Args:
        blocks (`list[BlockReport]`): Every block that was looked at, in forward order.
        parameters_before, parameters_after (`int`): Of the whole model, shared ones counted once.
        largest_logit_difference (`float`, *optional*): Largest absolute difference of the model's first output before
            and after, over the first calibration batches.
    """

    blocks: list[BlockReport]
    parameters_before: int
    parameters_after: int
    largest_logit_difference: float | None = None

    @property
    def collapsed(self) -> list[str]:
        """Names of the blocks that are one linear map now."""
        return [block.name for block in self.blocks if block.outcome == "collapsed"]

    @property
    def not_collapsed(self) -> list[str]:
        """Names of the blocks that were patched but not ready."""
        return [block.name for block in self.blocks if block.outcome != "collapsed"]

    def to_dict(self):
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self):
        header = ["block", "outcome", "alpha", "parameters", "MACs/token", "relative error"]
        rows = [
            [
                block.name,
                block.outcome if block.method is None else f"{block.outcome} ({block.method})",
                "-" if block.alpha is None else f"{block.alpha:.4f}",
                _change(block.parameters_before, block.parameters_after),
                _change(block.macs_before, block.macs_after),
                "-" if block.error is None else f"{_least(block):.2e}",
            ]
            for block in self.blocks
        ]
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

        def line(cells):
            left = "  ".join(cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True))
            right = "  ".join(cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True))
            return f"{left}  {right}"

        saved = 1 - self.parameters_after / self.parameters_before
        lines = [line(header), line(["-" * width for width in widths]), *map(line, rows)]
        lines.append(
            f"{len(self.collapsed)} of {len(self.blocks)} blocks collapsed; model parameters "
            f"{self.parameters_before:,} -> {self.parameters_after:,} ({saved:.1%} fewer)"
        )
        if self.largest_logit_difference is not None:
            lines.append(f"largest logit difference on calibration data: {self.largest_logit_difference:.3e}")
        return "\n".join(lines)


def _change(before, after):
    return f"{before:,} -> {after:,}" if before != after else f"{before:,}"


def _least(block):
    return block.error if block.calibration_error is None else block.calibration_error


@dataclass(frozen=True)
class _Merge:
    """A block's one map, not yet in the model."""

    block: FeedForwardBlock
    linear: nn.Module
    report: BlockReport


def collapse_model(
    model,
    config: LayerCollapseConfig | None = None,
    calibration_data=None,
    plan=None,
    max_error: float | None = None,
    allow_none: bool = False,
) -> CollapseReport:
    """Collapses feed-forward blocks in place: each becomes one linear map.

    On a patched model every ready block (`1 - alpha <= collapse_threshold`) is merged as if alpha were 1; with
    calibration data a block that is not exactly there is instead fitted, by least squares, to what it computes now.
    Blocks that are not ready are kept patched or restored to dense, as `config.not_ready` says. On a dense model the
    chosen blocks are fitted to the calibration data, with no training.

    Adapters on blocks, or on their alphas, are merged into the weights first, all that the model has, or refused, as
    `config.adapters` says. Then `model.get_base_model()` is what is left of a PeftModel.

    Args:
        model (`nn.Module`): A patched or dense model. A PeftModel or compiled model is looked through.
        config ([`LayerCollapseConfig`], *optional*): `blocks`, `collapse_threshold`, `not_ready` and `adapters` are
            used. Default: the one the model was patched with, and every patched block.
        calibration_data (iterable of `dict[str, Tensor]`, *optional*): Model inputs. Read once.
        plan (*optional*): A [`CollapsePlan`]; not supported yet.
        max_error (`float`, *optional*): Refuse if a block's relative error exceeds this: on the calibration data where
            the block is fitted to it, else on standard-normal inputs.
        allow_none (`bool`): Return a report, rather than raise, if the model is patched and no block is ready.

    Returns:
        [`CollapseReport`]

    Raises:
        TypeError: `model` or `config` is of a wrong type, or the model is wrapped or sharded.
        ValueError: No block is ready, a dense model comes without data, weights cannot be merged, or an error is above
            `max_error`. Nothing has been changed then, except that adapters may be merged.
    """
    if config is not None and not isinstance(config, LayerCollapseConfig):
        raise TypeError(f"`config` must be a LayerCollapseConfig, got {type(config).__name__}.")
    if plan is not None:
        raise ValueError("`plan` is not supported in this version; name the blocks in `config`.")
    _check_max_error(max_error)
    inner, holders = unwrap(model)
    options = config or layer_collapse_config_of(inner) or LayerCollapseConfig()
    inner = _without_adapters(model, inner, options, allow_none)
    blocks, refused = survey_blocks(inner)
    patched = [block for block in blocks if block.state == "patched"]

    if patched:
        # The stored selector may name blocks as another head class spells them; what is patched is what it chose.
        if config is not None:
            patched = _chosen_of(patched, select_blocks(blocks, config.blocks, refused), config)
        ready, waiting = _split_ready(inner, patched, options, allow_none)
    else:
        if calibration_data is None:
            raise ValueError(
                "The model is dense: pass `calibration_data` (batches of model inputs) to fit each block's linear "
                "map, or patch it with `apply_layer_collapse` and train until its blocks are ready."
            )
        chosen = select_blocks(blocks, options.blocks, refused)
        ready, waiting = [block for block in chosen if block.state == "dense"], []
        if not ready:
            raise ValueError("All chosen blocks are collapsed already.")
    check_weights(inner, ready, merging=True)

    kept_batches, data = _keep_first(calibration_data)
    refit = [block for block in ready if not (block.state == "patched" and _smallest_alpha(inner, block) == 1)]
    moments = collect_moments(model, inner, refit, data) if calibration_data is not None and refit else {}
    merges = _merge_all(inner, ready, moments)
    _refuse_errors(merges, max_error)
    logits = None if kept_batches is None else logits_of(model, kept_batches)
    if logits is not None and not all(output.isfinite().all() for output in logits):
        raise ValueError("The calibration data gives outputs that are not finite.")

    parameters_before = _count_parameters(inner)
    replaced = [entry for merge in merges for entry in _replace(inner, merge)]
    if options.not_ready == "restore":
        restore_blocks(inner, waiting)
    # What the model was patched with describes the blocks that still are.
    refresh_layer_collapse(inner, None if layer_collapse_config_of(inner) else config, holders, replaced)

    reports = [merge.report for merge in merges] + [_waiting_report(inner, block, options) for block in waiting]
    difference = None
    if logits is not None:
        after = logits_of(model, kept_batches)
        difference = max(float((a - b).abs().max()) for a, b in zip(logits, after, strict=True))
    return CollapseReport(
        sorted(reports, key=lambda report: report.index), parameters_before, _count_parameters(inner), difference
    )


def collapse_as(model, names):
    """Collapses these patched blocks in place whatever their alphas are, for weights that are loaded afterwards."""
    inner, holders = unwrap(model)
    blocks = [block for block in survey_blocks(inner)[0] if block.name in names]
    check_weights(inner, blocks, merging=True)
    replaced = [entry for merge in _merge_all(inner, blocks, {}) for entry in _replace(inner, merge)]
    refresh_layer_collapse(inner, None, holders, replaced)


def _without_adapters(model, inner, options, allow_none):
    """The model with adapters merged into its weights, if there are any on its blocks or alphas."""
    blocks = survey_blocks(inner)[0]
    alphas = [name for name in collapsible_activations(inner) if ".modules_to_save." in name]
    linears = [
        block.path(path)
        for block in blocks
        for path in block.layout.linears
        if block.state != "collapsed" and is_adapted(inner.get_submodule(block.path(path)))
    ]
    if not alphas and not linears:
        return inner
    where = f"The alpha of `{alphas[0]}`" if alphas else f"`{linears[0]}`"
    # `torch.compile` may be around the PeftModel.
    while isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    if options.adapters == "refuse" or model is inner:
        raise ValueError(
            f"{where} belongs to an adapter that is not merged. Call `model = model.merge_and_unload()` first, and "
            "collapse that."
            + (' Or let the collapse do so: `adapters="merge"` in the config.' if model is not inner else "")
        )
    # Whatever can be refused is refused before that.
    check_weights(inner, [block for block in blocks if block.state != "collapsed"], merging=False)
    in_use = {name: module.alpha for name, module in collapsible_activations(inner).items() if not _is_copied(name)}
    ready = [alpha for alpha in in_use.values() if is_ready(alpha, options.collapse_threshold)]
    if in_use and not ready and not allow_none:
        _refuse_none_ready(in_use, options)
    return model.merge_and_unload(safe_merge=True)


def _is_copied(name):
    """Whether a module is the one that peft's `modules_to_save` keeps frozen beside the one that trains."""
    return name.endswith(".original_module")


def _chosen_of(patched, chosen, config):
    names = {block.name for block in chosen}
    both = [block for block in patched if block.name in names]
    if not both:
        raise ValueError(
            f"`blocks` is {config.blocks!r}, and none of these blocks is patched. Patched are "
            f"{[block.name for block in patched]}."
        )
    return both


def _split_ready(inner, patched, options, allow_none):
    alphas = {block.name: modules_of(inner, block).activation.alpha.detach() for block in patched}
    on_meta = [name for name, alpha in alphas.items() if alpha.is_meta]
    if on_meta:
        raise ValueError(
            f"{on_meta} are on the meta device or offloaded: there are no weights to work on. Load the model with its "
            "weights in memory."
        )
    ready = [block for block in patched if is_ready(alphas[block.name], options.collapse_threshold)]
    if not ready and not allow_none:
        _refuse_none_ready(alphas, options)
    return ready, [block for block in patched if block not in ready]


def _refuse_none_ready(alphas, options):
    listed = "".join(f"\n  {name}: alpha {float(alpha.detach().min()):.4f}" for name, alpha in alphas.items())
    raise ValueError(
        f"No block is ready: none has 1 - alpha <= {options.collapse_threshold}. Train longer, with a larger "
        f"`penalty_strength` or `alpha_learning_rate`, or raise `collapse_threshold`.{listed}"
    )


def is_ready(alpha, collapse_threshold) -> bool:
    """Whether a block with these alphas (tensor of shape `(1,)` or `(hidden,)`) may collapse. Never if one is NaN."""
    # In alpha's own precision: an alpha of 0.95 has reached a threshold of 0.05.
    return bool((alpha.detach() >= torch.tensor(1 - collapse_threshold, dtype=alpha.dtype)).all())


def _smallest_alpha(inner, block):
    return float(modules_of(inner, block).activation.alpha.detach().min()) if block.state == "patched" else None


def _keep_first(data):
    """The first batches as a list, and an iterable that still gives all of them."""
    if data is None:
        return None, None
    iterator = iter(data)
    kept = list(islice(iterator, LOGIT_BATCHES))

    def everything():
        yield from kept
        yield from iterator

    return kept, everything()


def _merge_all(inner, ready, moments):
    """The merges in forward order; where a linear ends one block and begins the next, that takes the merged one."""
    merges, merged = [], {}
    for block in ready:
        parts = modules_of(inner, block)
        if parts.up in merged:
            if block.name in moments:
                raise ValueError(
                    f"Block {block.name} begins with the linear that ends {merged[parts.up].block.name}; fitted to "
                    "data, they cannot collapse in one call. Name one of them in `blocks`, then the other."
                )
            parts = replace(parts, up=merged[parts.up].linear)
        merge = _merge(inner, block, parts, moments.get(block.name))
        merged[parts.down] = merge
        merges.append(merge)
    return merges


@torch.no_grad()
def _merge(inner, block, parts, moments):
    calibration_error = r2 = None
    if moments is None:
        weight, bias = _merged_at_one(parts)
        method = "merged"
    else:
        features, cross, squares = moments
        weight, bias = functional.least_squares_map(features, cross)
        r2, calibration_error = functional.fit_quality(features, cross, squares, weight, bias)
        method = "refit"
    linear = _make_linear(parts.down, weight, bias)
    x = functional.gaussian_inputs(weight.shape[1]).to(parts.down.weight)
    error = functional.relative_error(parts.forward(x), linear(x))
    report = BlockReport(
        name=block.name,
        index=block.index,
        outcome="collapsed",
        method=method,
        alpha=_smallest_alpha(inner, block),
        parameters_before=block.parameters,
        parameters_after=sum(parameter.numel() for parameter in linear.parameters()),
        macs_before=block.macs,
        macs_after=weight.numel(),
        error=error,
        calibration_error=calibration_error,
        r2=r2,
    )
    return _Merge(block, linear, report)


def _merged_at_one(parts):
    slope, offset = parts.activation.line
    if parts.layout.gated:
        return functional.merge_gated(*parts.up_affine(), *parts.down_affine(), offset)
    return functional.merge_plain(*parts.up_affine(), *parts.down_affine(), slope, offset)


def _make_linear(down, weight, bias):
    """A layer of the same kind, device and dtype as `down` that holds the merged map."""
    out_features, in_features = weight.shape
    with torch.device("meta"):  # neither time nor random numbers go into first values
        if isinstance(down, Conv1D):
            linear, weight = Conv1D(out_features, in_features), weight.T
        else:
            linear = nn.Linear(in_features, out_features, bias=bias is not None)
    linear.to(down.weight.dtype).to_empty(device=down.weight.device)
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(torch.zeros(()) if bias is None else bias)
    linear.requires_grad_(down.weight.requires_grad)
    return linear.train(down.training)


def _check_max_error(max_error):
    if max_error is None:
        return
    if isinstance(max_error, bool) or not isinstance(max_error, (int, float)):
        raise TypeError(f"`max_error` must be a number, got {max_error!r}.")
    if not max_error >= 0:
        raise ValueError(f"`max_error` must be a relative error, at least 0, got {max_error}.")


def _refuse_errors(merges, max_error):
    if max_error is None:
        return
    above = [merge.report for merge in merges if not _least(merge.report) <= max_error]
    if above:
        listed = "".join(f"\n  {report.name}: {_least(report):.3e}" for report in above)
        raise ValueError(
            f"The relative error of {len(above)} merged blocks is above max_error={max_error}; nothing was changed. "
            f"Train until alpha is closer to 1, pass `calibration_data`, or raise `max_error`.{listed}"
        )


def _replace(inner, merge):
    """Puts the map where the block was; returns `(qualified name, spec)` for the replacement table."""
    block, layout, linear = merge.block, merge.block.layout, merge.linear
    if isinstance(linear, Conv1D):
        spec = {"type": "conv1d", "in_features": linear.nx, "out_features": linear.nf}
    else:
        spec = {
            "type": "linear",
            "in_features": linear.in_features,
            "out_features": linear.out_features,
            "bias": linear.bias is not None,
        }
    entries = [(block.path(layout.down), spec)]
    wiring = block.wiring
    if wiring.own_module:
        holder = inner.get_submodule(block.holder)
        then = list(wiring.then)
        collapsed = CollapsedBlock(
            {name: linear if name == layout.down else holder._modules[name] for name in [layout.down, *then]}
        )
        replace_module(inner, block.holder, collapsed.train(holder.training))
        entries.append((block.holder, {"type": "block", "child": layout.down, "then": then}))
    else:
        replace_module(inner, block.path(layout.down), linear)
        for path in (layout.up, *wiring.before, layout.activation, *wiring.between):
            name = block.path(path)
            replace_module(inner, name, nn.Identity().train(linear.training))
            entries.append((name, {"type": "identity"}))
    return entries


def _waiting_report(inner, block, options):
    return BlockReport(
        name=block.name,
        index=block.index,
        outcome="restored" if options.not_ready == "restore" else "kept",
        alpha=block.alpha,
        parameters_before=block.parameters,
        parameters_after=block.parameters,
        macs_before=block.macs,
        macs_after=block.macs,
    )


def _count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())
