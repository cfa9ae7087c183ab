"""Collapsing a model: what is to become of which block, all of it checked before anything is put in place."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from accelerate.utils import is_compiled_module
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from . import functional
from .adapters import is_copied, restored_on_error
from .block_sizes import fit_size
from .blocks import BoundBlock, bind_blocks, check_weights, confirm_wiring, survey
from .calibration import CANDIDATES_PER_NEURON, BlockMoments, collect_moments, logits_of, reiterable, score_neurons
from .calibration_data import model_inputs
from .classes import refuse_lost_code
from .config import LayerCollapseConfig
from .families import FeedForwardBlock
from .loss_metric import measure_metrics
from .merging import (
    BlockChoice,
    Trial,
    cost_of,
    effective_rank,
    fit_of_weights,
    has_constant,
    is_cut,
    is_possible,
    is_ready,
    make_merge,
    put_in_place,
    ready_neurons,
)
from .models import count_parameters, is_adapted, unwrap
from .patching import (
    collapsible_activations,
    layer_collapse_config_of,
    refresh_layer_collapse,
    refuse_lost_code_inside,
    restore_blocks,
)
from .plans import CollapsePlan
from .reports import BlockReport, CollapseReport
from .selection import select_blocks
from .upstream import uncompiled


# Batches whose logits are compared before and after; enough to see a difference, few enough to hold.
LOGIT_BATCHES = 8


def collapse_model(
    model: nn.Module,
    config: LayerCollapseConfig | None = None,
    calibration_data: Iterable[Any] | None = None,
    plan: CollapsePlan | None = None,
    max_error: float | None = None,
    allow_none: bool = False,
    token_mask_fn: Callable[..., Any] | None = None,
    processing_class: Any = None,
) -> CollapseReport:
    """Collapses feed-forward blocks in place: each becomes one linear map.

    On a patched model every ready block (`1 - alpha <= collapse_threshold`) is merged as if alpha were 1; with
    calibration data a block that is not exactly there is instead fitted, by least squares, to what it computes now.
    With one alpha per neuron a block is ready once merging the neurons that are makes it smaller; the others stay
    beside the linear map. Blocks that are not ready are kept patched or restored to dense, as `config.not_ready` says.
    On a dense model the chosen blocks are fitted to the calibration data, with no training: to one linear map each, or
    with `config.rank` and `config.keep_neurons` to a linear map and a narrow block beside it.

    Adapters on blocks, or on their alphas, are merged into the weights first, all that the model has, or refused, as
    `config.adapters` says. Then `model.get_base_model()` is what is left of a PeftModel.

    Args:
        model (`nn.Module`): A patched or dense model. A PeftModel or compiled model is looked through.
        config ([`LayerCollapseConfig`], *optional*): `blocks`, `collapse_threshold`, `not_ready`, `rank`,
            `keep_neurons`, `neuron_choice`, `constant_term`, `sequential` and `adapters` are used. Default: the one
            the model was patched with, and every patched block; for a model that is not patched, every dense block.
        calibration_data (iterable of `dict[str, Tensor]`, *optional*): Model inputs. Read once; twice with kept
            neurons, and once more for each block with `sequential`. Rows that repeat others are left out.
        plan ([`CollapsePlan`], *optional*): Blocks, ranks and neurons of a dense model, in place of the config's.
        max_error (`float`, *optional*): Refuse if a block's relative error exceeds this: the one to expect on other
            data of the calibration data's kind where the block is fitted to it, else that on standard-normal inputs.
        allow_none (`bool`): Return a report, rather than raise, if the model is patched and no block is ready.
        token_mask_fn (`Callable`, *optional*): `token_mask_fn(block_name, batch, shape)` gives a mask of that shape,
            1 where a calibration token is no padding, or `None` if none is. For models whose attention mask does not
            have the shape of their blocks' inputs.
        processing_class (*optional*): Tokenizer or processor that makes model inputs of raw texts, pairs, images or
            sounds, as [`CalibrationData`] says. Default: the data are model inputs.

    Returns:
        [`CollapseReport`]

    Raises:
        TypeError: `model` or `config` is of a wrong type, or the model is wrapped or sharded.
        ValueError: No block is ready, a dense model comes without data, weights cannot be merged, an error is above
            `max_error`, or the model's class is the user's own and no Auto class knows it. Nothing has been changed
            then.
    """
    _check_arguments(config, plan, max_error)
    inner, wrappers = unwrap(model)
    if isinstance(inner, PreTrainedModel):
        refuse_lost_code(inner)
    calibration_data = model_inputs(calibration_data, processing_class, model)
    was_patched = bool(collapsible_activations(inner))
    # What a model was collapsed with earlier says nothing of its other blocks.
    options = config or (layer_collapse_config_of(inner) if was_patched else None) or LayerCollapseConfig()
    if plan is not None:
        options = replace(options, constant_term=plan.constant_term)
    # Everything is checked before anything is changed.
    with _adapters_merged(model, inner, options, allow_none):
        chosen = _choose(inner, config, options, plan, calibration_data is not None, allow_none)
        first, data = _keep_first(calibration_data)
        how: dict[str, Any] = {"neuron_choice": options.neuron_choice, "constant_term": options.constant_term}
        fit = partial(fit_blocks, model, inner, **how, token_mask_fn=token_mask_fn)
        merges = _merges_of(chosen, data, options, fit)
        _confirm_cuts(inner, merges)
        _refuse_errors(merges, max_error)
        logits = None if first is None else _finite_logits(model, first)

    parameters_before = count_parameters(inner)
    replaced = _put(merges)
    if options.not_ready == "restore":
        restore_blocks(chosen.waiting)
    # What the model was patched with describes all that came of it; else the last collapse is what is recorded.
    done = replace(options, blocks=[merge.block.name for merge in merges]) if merges else None
    refresh_layer_collapse(inner, None if was_patched else done, wrappers, replaced, default=done)

    reports = [merge.report for merge in merges] + [_waiting_report(block, options) for block in chosen.waiting]
    difference = None
    if logits is not None:
        pairs = zip(logits, logits_of(model, first), strict=True)
        difference = max(float((before - after).abs().max()) for before, after in pairs)
    return CollapseReport(
        sorted(reports, key=lambda report: report.index), parameters_before, count_parameters(inner), difference
    )


def _check_arguments(config, plan, max_error):
    if config is not None and not isinstance(config, LayerCollapseConfig):
        raise TypeError(f"`config` must be a LayerCollapseConfig, got {type(config).__name__}.")
    if plan is not None:
        from .plans import CollapsePlan

        if not isinstance(plan, CollapsePlan):
            raise TypeError(f"`plan` must be a CollapsePlan, got {type(plan).__name__}.")
    if max_error is not None:
        if isinstance(max_error, bool) or not isinstance(max_error, (int, float)):
            raise TypeError(f"`max_error` must be a number, got {max_error!r}.")
        if not max_error >= 0:
            raise ValueError(f"`max_error` must be a relative error, at least 0, got {max_error}.")
    if plan is not None and config is not None:
        raise ValueError("Pass `plan` or `config`, not both: each says which blocks collapse, and how.")


def collapse_as(model: nn.Module, names: Any) -> None:
    """Collapses these patched blocks in place whatever their alphas are, for weights that are loaded afterwards."""
    inner, wrappers = unwrap(model)
    blocks = [block for block in bind_blocks(inner) if block.name in names]
    check_weights(inner, blocks, merging=True)
    replaced = _put(_merge_all(blocks, {}, collapse_threshold=1.0))
    refresh_layer_collapse(inner, None, wrappers, replaced)


def _put(merges):
    """Puts what blocks become in their places; returns the modules that now stand there."""
    return [exchange.new for merge in merges for exchange in put_in_place(merge)]


@contextlib.contextmanager
def _adapters_merged(model, inner, options, allow_none):
    """The model with adapters merged into its weights, if there are any on its blocks or alphas; if what is done
    inside raises, as it was.
    """
    alphas = [name for name in collapsible_activations(inner) if ".modules_to_save." in name]
    blocks = []
    if alphas or any(is_adapted(module) for module in inner.modules()):
        blocks = [block for block in bind_blocks(inner) if block.can_collapse]
    linears = [block.path(path) for block in blocks for path, part in block.linears.items() if is_adapted(part)]
    if not alphas and not linears:
        yield
        return
    where = f"The alpha of `{alphas[0]}`" if alphas else f"`{linears[0]}`"
    # `torch.compile` may be around the PeftModel.
    while is_compiled_module(model):
        model = uncompiled(model)
    if options.adapters == "refuse" or model is inner:
        raise ValueError(
            f"{where} belongs to an adapter that is not merged. Call `model = model.merge_and_unload()` first, and "
            "collapse that."
            + (' Or let the collapse do so: `adapters="merge"` in the config.' if model is not inner else "")
        )
    # Whatever can be refused is refused before that.
    check_weights(inner, blocks, merging=False)
    in_use = {name: module.alpha for name, module in collapsible_activations(inner).items() if not is_copied(name)}
    if in_use and not allow_none:
        _refuse_none_ready(in_use, options)
    with restored_on_error(model):
        model.merge_and_unload(safe_merge=True)
        yield


# ----------------------------------------------------------------------------------------------------
# What is to become of which block
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    """What is to become of a model's blocks.

    Args:
        ready (`list[BoundBlock]`): Those that collapse, in forward order.
        choices (`dict[str, BlockChoice]`): Name of such a block -> what it becomes.
        waiting (`list[BoundBlock]`): Patched ones that are not ready.
    """

    ready: list[BoundBlock]
    choices: dict[str, BlockChoice]
    waiting: list[BoundBlock]


def _choose(inner, config, options, plan, with_data, allow_none):
    """The [`_Chosen`] of a model, checked; `options` are those of the config, or where there is none the model's."""
    blocks, refused = survey(inner)
    patched = [block for block in blocks if block.state == "patched"]
    if not patched and not with_data:
        raise ValueError(
            "The model is dense: pass `calibration_data` (batches of model inputs) to fit each block's linear map, or "
            "patch it with `apply_layer_collapse` and train until its blocks are ready."
        )
    waiting, choices = [], None
    if plan is not None:
        choices = plan.choices_for(inner, blocks)
        if patched:
            raise ValueError("A plan is for the dense model it was made on; this one is patched.")
        # Whatever the model was collapsed with before: the plan says which blocks.
        ready = [block for block in blocks if block.name in choices]
    elif patched:
        # The stored selector may name blocks as another head class spells them; what is patched is what it chose.
        if config is not None:
            patched = _chosen_of(patched, select_blocks(blocks, config.blocks, refused), config)
        ready, waiting = _split_ready(patched, options, allow_none)
    else:
        ready = [block for block in select_blocks(blocks, options.blocks, refused) if block.can_collapse]
        if not ready:
            raise ValueError("All chosen blocks are collapsed already.")
    refuse_lost_code_inside(inner, ready)
    check_weights(inner, ready, merging=True)
    if choices is None:
        choices = {block.name: _choice(block, options) for block in ready}
    check_choices(ready, choices)
    return _Chosen(ready, choices, waiting)


def _chosen_of(patched, chosen, config):
    names = {block.name for block in chosen}
    both = [block for block in patched if block.name in names]
    if not both:
        raise ValueError(
            f"`blocks` is {config.blocks!r}, and none of these blocks is patched. Patched are "
            f"{[block.name for block in patched]}."
        )
    return both


def _split_ready(patched, options, allow_none):
    alphas = {block.name: block.activation.alpha.detach() for block in patched}
    on_meta = [name for name, alpha in alphas.items() if alpha.is_meta]
    if on_meta:
        raise ValueError(
            f"{on_meta} are on the meta device or offloaded: there are no weights to work on. Load the model with its "
            "weights in memory."
        )
    ready = [
        block
        for block in patched
        if is_ready(alphas[block.name], options.collapse_threshold) or _partly_ready(block, options)
    ]
    if not ready and not allow_none:
        _raise_none_ready(alphas, options)
    return ready, [block for block in patched if block not in ready]


def _partly_ready(block, options):
    """Whether merging the neurons that are ready makes a block with one alpha per neuron smaller."""
    if block.activation.granularity != "neuron":
        return False
    choice = _choice(block, options)
    return cost_of(block, choice.rank, choice.count) < block.macs


def _choice(block, options):
    """What the options make of a block."""
    if block.state == "patched" and block.activation.granularity == "neuron":
        waiting = ~ready_neurons(block.activation.alpha, options.collapse_threshold)
        return BlockChoice(options.rank, waiting.nonzero().flatten().tolist())
    return BlockChoice(options.rank, options.keep_neurons)


def check_choices(blocks: Sequence[FeedForwardBlock], choices: Mapping[str, BlockChoice]) -> None:
    """Raises if a block cannot become what is asked of it.

    Raises:
        ValueError: There are not so many neurons, nothing would be left, or the block's own code forbids it.
    """
    for block in blocks:
        choice = choices[block.name]
        if choice.count > block.hidden_features:
            raise ValueError(
                f"{choice.count} neurons of block {block.name} cannot be kept: it has {block.hidden_features}."
            )
        if effective_rank(block, choice.rank) == 0 and not choice.count and not choice.dropped:
            raise ValueError(f"Rank 0 without kept neurons leaves nothing of block {block.name}.")
        if not is_possible(block, effective_rank(block, choice.rank), choice.count):
            raise ValueError(
                f"Block {block.name} can only collapse whole (`rank=None`, `keep_neurons=0`)"
                + (" or to neurons alone (`rank=0`)" if is_cut(block, 0) else "")
                + ": its code scales what goes into its activation or its last linear, or its parts lie in modules of "
                "their own."
            )


def _refuse_none_ready(alphas, options):
    """Raises if no block has reached the threshold (name -> alpha)."""
    if not any(is_ready(alpha, options.collapse_threshold) for alpha in alphas.values()):
        _raise_none_ready(alphas, options)


def _raise_none_ready(alphas, options):
    listed = "".join(f"\n  {name}: alpha {float(alpha.detach().min()):.4f}" for name, alpha in alphas.items())
    raise ValueError(
        f"No block is ready: none has 1 - alpha <= {options.collapse_threshold}. Train longer, with a larger "
        f"`penalty_strength` or `alpha_learning_rate`, or raise `collapse_threshold`.{listed}"
    )


# ----------------------------------------------------------------------------------------------------
# What blocks become
# ----------------------------------------------------------------------------------------------------


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


def _exactly_linear(block, choices):
    """Whether a block is one line at alpha 1, which no data can fit better."""
    choice = choices[block.name]
    whole = not choice.count and effective_rank(block, choice.rank) is None
    return whole and block.state == "patched" and float(block.activation.alpha.detach().min()) == 1


def _merges_of(chosen, data, options, fit):
    """What the chosen blocks become, each fitted to the data if there are any and it is not one line already.

    Args:
        fit (`Callable`): `fit(blocks, choices, data)` gives block name -> [`functional.Fit`].
    """
    ready, choices, threshold = chosen.ready, chosen.choices, options.collapse_threshold
    refit = [block for block in ready if data is not None and not _exactly_linear(block, choices)]
    if not (refit and options.sequential):
        return _merge_all(ready, fit(refit, choices, data) if refit else {}, threshold)
    # Each with those before it in place; the model is left as it was.
    data, merges = reiterable(data), []
    with Trial() as trial:
        for block in ready:
            bound = _after(block, _merge_before(block, merges))
            fits = fit([bound], choices, data) if block in refit else {}
            merges += _merge_all([bound], fits, threshold)
            trial.put(merges[-1])
    return merges


def fit_blocks(
    model: nn.Module,
    inner: nn.Module,
    blocks: Sequence[BoundBlock],
    choices: Mapping[str, Any],
    data: Iterable[Any],
    neuron_choice: str = "greedy",
    token_mask_fn: Callable[..., Any] | None = None,
    constant_term: str = "native",
) -> dict[str, functional.Fit]:
    """Block name -> the least-squares [`functional.Fit`] of what it is to become, in one pass over the data, or in two
    where neurons have to be chosen.
    """
    ranks = {block.name: effective_rank(block, choices[block.name].rank) for block in blocks}
    open_choices = {
        block.name: choices[block.name].neurons
        for block in blocks
        if isinstance(choices[block.name].neurons, int) and 0 < choices[block.name].neurons
    }
    candidates = {block.name: choices[block.name].neurons for block in blocks if block.name not in open_choices}
    candidates = {name: [] if neurons == 0 else neurons for name, neurons in candidates.items()}
    per_neuron = CANDIDATES_PER_NEURON if neuron_choice == "greedy" else 1
    wanted = {name: count * per_neuron for name, count in open_choices.items()}
    candidates |= {block.name: list(range(block.hidden_features)) for block in blocks if block.name in wanted}
    to_score = [block for block in blocks if wanted.get(block.name, math.inf) < block.hidden_features]
    if to_score:
        data = reiterable(data)
        scores = score_neurons(model, inner, to_score, data, token_mask_fn)
        for block in to_score:
            candidates[block.name] = sorted(scores[block.name].topk(wanted[block.name]).indices.tolist())
    in_metric = [block for block in blocks if choices[block.name].in_metric and ranks[block.name]]
    metrics = {}
    if in_metric:
        data = reiterable(data)
        metrics, _ = measure_metrics(model, inner, in_metric, data, token_mask_fn)
    moments = collect_moments(model, inner, blocks, data, candidates, token_mask_fn)
    fits = {}
    for block in blocks:
        found, rank = moments[block.name], ranks[block.name]
        if not has_constant(block, rank, constant_term):
            found = found.without_constant()
        if block.name in metrics:
            fits[block.name] = fit_size(found, range(len(found.neurons)), rank, metrics[block.name])
        else:
            fits[block.name] = best_fit(found, rank, open_choices.get(block.name))
    return fits


def best_fit(moments: BlockMoments, rank: int | None, count: int | None = None) -> functional.Fit:
    """The fit with the `count` neurons that explain most, chosen from those of the moments; `None`: all of them."""
    if count is not None and count < len(moments.neurons):
        cov_ff, cov_fo, width = moments.cov_ff, moments.cov_fo, moments.width
        if rank is None:
            chosen, _ = functional.greedy_neurons(cov_ff, cov_fo, width, count, ridge=moments.ridge)
        else:
            # Neurons for a given map, then the map for these neurons: twice, after which little changes.
            right = functional.reduced_rank(cov_ff[:width, :width], cov_fo[:width], width, rank, moments.ridge)[1]
            for step in range(2 if rank else 1):
                if step:
                    part = moments.restricted(chosen)
                    right = functional.reduced_rank(part.cov_ff, part.cov_fo, width, rank, moments.ridge)[1]
                chosen, _ = functional.greedy_neurons(cov_ff, cov_fo, width, count, right, moments.ridge)
        moments = moments.restricted(sorted(chosen))
    return moments.fit(rank)


def _merge_all(ready, fits, collapse_threshold):
    """The merges in forward order; where a linear ends one block and begins the next, that takes the merged one."""
    merges = []
    for block in ready:
        before = _merge_before(block, merges)
        if before is not None and block.name in fits:
            raise ValueError(
                f"Block {block.name} begins with the linear that ends {before.block.name}; fitted to data, they "
                "cannot collapse in one call. Name one of them in `blocks`, then the other."
            )
        block, fit = _after(block, before), fits.get(block.name)
        merges.append(make_merge(block, fit or fit_of_weights(block, collapse_threshold), refit=fit is not None))
    return merges


def _merge_before(block, merges):
    """The merge of the block whose last linear is this one's first."""
    return next((merge for merge in merges if merge.block.down is block.up), None)


def _after(block, before):
    """The block as it is with that merge in place."""
    return block if before is None else replace(block, up=before.linears[before.block.layout.down])


def _confirm_cuts(inner, merges):
    """Raises if native code does not run with the linears that it is to get."""
    cut = [merge for merge in merges if is_cut(merge.block, merge.fit.rank)]
    with Trial() as trial:
        for merge in cut:
            trial.put(merge)
        confirm_wiring(inner, [merge.block for merge in cut])


def _finite_logits(model, batches):
    logits = logits_of(model, batches)
    if not all(output.isfinite().all() for output in logits):
        raise ValueError("The calibration data gives outputs that are not finite.")
    return logits


def _refuse_errors(merges, max_error):
    if max_error is None:
        return
    above = [merge.report for merge in merges if not merge.report.measured_error <= max_error]
    if above:
        listed = "".join(f"\n  {report.name}: {report.measured_error:.3e}" for report in above)
        raise ValueError(
            f"The relative error of {len(above)} merged blocks is above max_error={max_error}; nothing was changed. "
            f"Train until alpha is closer to 1, pass `calibration_data`, or raise `max_error`.{listed}"
        )


def _waiting_report(block, options):
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
