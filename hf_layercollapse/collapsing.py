"""Collapsing a model: what is to become of which block, all of it checked before anything is put in place."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from accelerate.utils import is_compiled_module
from torch import nn

from . import functional, processes
from .adapters import restored_on_error
from .blocks import BoundBlock, Exchange, bind_blocks, check_weights, confirm_wiring, survey
from .calibration import RANGE_BYTES, RANGE_TOKENS, Calibration
from .calibration_data import model_inputs
from .config import LayerCollapseConfig
from .fitting import BlockFitting
from .forward_passes import first_tensor, lean
from .merging import (
    BlockChoice,
    Merge,
    Trial,
    fit_of_weights,
    is_cut,
    is_possible,
    make_merge,
    put_in_place,
    stored_rank,
)
from .modeling_layercollapse import CollapsibleActivation
from .models import (
    count_parameters,
    device_of,
    evaluating,
    inputs_of,
    is_adapted,
    is_peft_model,
    kept_on,
    outputs_of,
    unwrap,
)
from .neuron_budget import refuse_size_not_met
from .outcomes import choice_of_neurons, outcome_of
from .patching import (
    activation_in_use,
    collapsible_activations,
    layer_collapse_config_of,
    refresh_layer_collapse,
    refuse_budget_in,
    refuse_lost_code_inside,
    unwrap_savable,
)
from .plans import CollapsePlan
from .progress import Progress
from .reports import BlockReport, CollapseReport
from .selection import select_blocks
from .upstream import uncompiled


# Rows whose outputs are compared before and after.
LOGIT_ROWS = 64


def collapse_model(
    model: nn.Module,
    config: LayerCollapseConfig | None = None,
    calibration_data: Iterable[Any] | None = None,
    plan: CollapsePlan | None = None,
    max_error: float | None = None,
    allow_none: bool = False,
    token_mask_fn: Callable[..., Any] | None = None,
    max_memory: int | str | dict | None = None,
    processing_class: Any = None,
) -> CollapseReport:
    """Collapses feed-forward blocks in place: each becomes a linear map, fewer neurons, or both.

    On a patched model every ready block (`1 - alpha <= collapse_threshold`) is merged as if alpha were 1; with
    calibration data a block that is not exactly there is instead fitted, by least squares, to what it computes now.
    With one alpha per neuron a block is ready once merging the neurons that are makes it smaller; the others stay
    beside the linear map. Blocks that are not ready are kept patched or restored to dense, as `config.not_ready` says.
    On a dense model the chosen blocks are fitted to the calibration data, with no training: to one linear map each, or
    with `config.rank` and `config.keep_neurons` to a linear map and a narrow block beside it.

    Adapters on blocks, or on their alphas, are merged into the weights first, all that the model has, or refused, as
    `config.adapters` says. Then `model.get_base_model()` is what is left of a PeftModel.

    Args:
        model (`nn.Module`): A patched or dense model. A PeftModel or compiled model is looked through; in an object
            of sentence-transformers the blocks that [`find_feed_forward_blocks`] finds in it collapse.
        config ([`LayerCollapseConfig`], *optional*): `blocks`, `collapse_threshold`, `not_ready`, `rank`,
            `keep_neurons`, `neuron_choice`, `constant_term`, `sequential` and `adapters` are used. Default: the one
            the model was patched with, and every patched block; for a model that is not patched, every dense block.
        calibration_data (iterable of `dict[str, Tensor]`, *optional*): Model inputs, in any order. Rows that repeat
            others are left out. They are read several times; what can be read only once (a generator) is kept. Where
            torch.distributed runs several processes each passes its part, and all of them call this; one that calls it
            without the others does so inside of `processes.alone()`, or it waits for them.
        plan ([`CollapsePlan`], *optional*): Blocks, ranks and neurons of a dense model, in place of the config's.
        max_error (`float`, *optional*): Refuse if a block's relative error exceeds this: the one to expect on other
            data of the calibration data's kind where the block is fitted to it, else that on standard-normal inputs.
        allow_none (`bool`): Return a report, rather than raise, if the model is patched and no block is ready.
        token_mask_fn (`Callable`, *optional*): `token_mask_fn(block_name, batch, shape)` gives a mask of that shape,
            1 where a calibration token is no padding, or `None` if none is. For models whose attention mask does not
            have the shape of their blocks' inputs.
        max_memory (`int`, `str` or `dict`, *optional*): Bytes (`"2GB"`), or as accelerate has it a dict of them by
            device, for all that is held beside the model and one forward pass: sums over the data, fits, new weights,
            inputs that can be read only once. With less, blocks are measured in more passes over the data. Default:
            half of what is free.
        processing_class (*optional*): Tokenizer or processor that makes model inputs of raw texts, pairs, images or
            sounds, as [`CalibrationData`] says. Default: the data are model inputs, or what an object of
            sentence-transformers reads.

    Returns:
        [`CollapseReport`]

    Raises:
        TypeError: `model` or `config` is of a wrong type, or the model is wrapped or sharded.
        ValueError: No block is ready, a dense model comes without data, weights cannot be merged, an error is above
            `max_error`, there is too little memory for one block, or the model's class is the user's own and no Auto
            class knows it. Nothing has been changed then, and neither after Ctrl-C.
    """
    # Without data no other process takes part.
    as_one: Callable[[], contextlib.AbstractContextManager[None]]
    as_one = contextlib.nullcontext if calibration_data is None else processes.together
    with as_one():
        _check_arguments(config, plan, max_error)
        inner, wrappers = unwrap_savable(model)
        calibration_data = model_inputs(calibration_data, processing_class, model)
        options = _options_for(inner, config, plan)
    merged = _adapters_merged(model, inner, options, allow_none, as_one)
    # Everything is checked before anything is changed.
    with Progress("Collapse") as progress, merged, Trial() as trial:
        with as_one():
            chosen = _choose(inner, config, options, plan, calibration_data is not None, allow_none)
        engine = None
        if calibration_data is not None:
            engine = Calibration.on(model, inner, calibration_data, max_memory, token_mask_fn, progress)
        merges = _merges_of(chosen, engine, options)
        with as_one():
            _confirm_cuts(inner, merges)
            _refuse_errors(merges, max_error)
            restored = [b for b in chosen.waiting if outcome_of(b, b.activation, options).name == "restored"]
        difference = None if engine is None else _largest_difference(engine, merges, restored)
        read = None if engine is None else engine.data_report()
        parameters_before, was_patched = count_parameters(inner), bool(collapsible_activations(inner))
        with as_one():
            for merge in merges:
                trial.put(merge)
            trial.restore(restored)
        # From here on no process waits for others.
        _record(merges, trial.exchanges, inner, wrappers, options, was_patched)
        trial.keep()
    reports = _block_reports(merges, chosen.waiting, restored)
    return CollapseReport(reports, parameters_before, count_parameters(inner), difference, read)


def _options_for(inner: Any, config: LayerCollapseConfig | None, plan: CollapsePlan | None) -> LayerCollapseConfig:
    """What says how blocks collapse: the config, or what the model was patched with; a plan says it of its blocks."""
    # What a model was collapsed with earlier says nothing of its other blocks.
    if config is None and collapsible_activations(inner):
        config = layer_collapse_config_of(inner)
    options = config or LayerCollapseConfig()
    return options if plan is None else replace(options, constant_term=plan.constant_term)


def _record(
    merges: Sequence[Merge],
    exchanges: Sequence[Exchange],
    inner: Any,
    wrappers: Iterable[nn.Module],
    options: LayerCollapseConfig,
    was_patched: bool,
) -> None:
    """Writes what was put in place into the model's config."""
    # What the model was patched with describes all that came of it; else the last collapse is what is recorded.
    done = replace(options, blocks=[merge.block.name for merge in merges]) if merges else None
    replaced = [exchange.new for exchange in exchanges]
    refresh_layer_collapse(inner, None if was_patched else done, wrappers, replaced, default=done)


def _check_arguments(config: Any, plan: Any, max_error: Any) -> None:
    if config is not None and not isinstance(config, LayerCollapseConfig):
        raise TypeError(f"`config` must be a LayerCollapseConfig, got {type(config).__name__}.")
    refuse_budget_in(config)
    if plan is not None:
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
    merges = _merge_all(blocks, {}, collapse_threshold=1.0)
    replaced = [exchange.new for merge in merges for exchange in put_in_place(merge)]
    refresh_layer_collapse(inner, None, wrappers, replaced)


@contextlib.contextmanager
def _adapters_merged(
    model: Any, inner: Any, options: LayerCollapseConfig, allow_none: bool, as_one: Callable[[], Any]
) -> Iterator[None]:
    """The model with adapters merged into its weights, if there are any on its blocks or alphas; if what is done
    inside raises, as it was. `as_one` is [`processes.together`] where other processes do the same.
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
    # Inside of another object a PeftModel would be left around what was merged, and save an adapter of nothing.
    mergeable = is_peft_model(model)
    if options.adapters == "refuse" or not mergeable:
        raise ValueError(
            f"{where} belongs to an adapter that is not merged. Call `model = model.merge_and_unload()` first, and "
            "collapse that." + (' Or let the collapse do so: `adapters="merge"` in the config.' if mergeable else "")
        )
    # Whatever can be refused is refused before that.
    check_weights(inner, blocks, merging=False)
    in_use = [(block, module) for block in blocks if (module := activation_in_use(block)) is not None]
    if in_use and not allow_none:
        _refuse_none_ready(in_use, options)
    with contextlib.ExitStack() as stack:
        with as_one():
            stack.enter_context(restored_on_error(model))
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


def _choose(
    inner: Any,
    config: LayerCollapseConfig | None,
    options: LayerCollapseConfig,
    plan: CollapsePlan | None,
    with_data: bool,
    allow_none: bool,
) -> _Chosen:
    """The [`_Chosen`] of a model, checked; `options` are those of the config, or where there is none the model's."""
    blocks, refused = survey(inner)
    patched = [block for block in blocks if block.state == "patched"]
    if not patched and not with_data:
        raise ValueError(
            "The model is dense: pass `calibration_data` (batches of model inputs) to fit each block's linear map, or "
            "patch it with `apply_layer_collapse` and train until its blocks are ready."
        )
    waiting: list[BoundBlock] = []
    choices = None
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
    elif options.budget is not None:
        raise ValueError(
            f"`budget` ({options.budget}) with budget_method='penalty' is what alphas are trained to, and this model "
            "has none. Without training: `plan_collapse(model, data, macs=...)`, then "
            "`collapse_model(model, plan=plan, ...)`."
        )
    else:
        ready = [block for block in select_blocks(blocks, options.blocks, refused) if block.can_collapse]
        if not ready:
            raise ValueError("All chosen blocks are collapsed already.")
    refuse_lost_code_inside(inner, ready)
    check_weights(inner, ready, merging=True)
    if choices is None:
        choices = {block.name: _choice(block, options) for block in ready}
    check_choices(ready, choices)
    if ready and patched and options.budget is not None:
        kept = {block.name: block.hidden_features for block in waiting} | {n: c.count for n, c in choices.items()}
        refuse_size_not_met(inner, [(block, kept[block.name]) for block in patched], options)
    return _Chosen(ready, choices, waiting)


def _chosen_of(
    patched: Sequence[BoundBlock], chosen: Sequence[BoundBlock], config: LayerCollapseConfig
) -> list[BoundBlock]:
    names = {block.name for block in chosen}
    both = [block for block in patched if block.name in names]
    if not both:
        raise ValueError(
            f"`blocks` is {config.blocks!r}, and none of these blocks is patched. Patched are "
            f"{[block.name for block in patched]}."
        )
    return both


def _split_ready(
    patched: Sequence[BoundBlock], options: LayerCollapseConfig, allow_none: bool
) -> tuple[list[BoundBlock], list[BoundBlock]]:
    alphas = {block.name: block.activation.alpha.detach() for block in patched}
    on_meta = [name for name, alpha in alphas.items() if alpha.is_meta]
    if on_meta:
        raise ValueError(
            f"{on_meta} are on the meta device or offloaded: there are no weights to work on. Load the model with its "
            "weights in memory."
        )
    ready = [block for block in patched if outcome_of(block, block.activation, options).collapses]
    if not ready and not allow_none:
        _raise_none_ready(alphas, options)
    return ready, [block for block in patched if block not in ready]


def _choice(block: BoundBlock, options: LayerCollapseConfig) -> BlockChoice:
    """What the options make of a block."""
    if block.state == "patched" and block.activation.granularity == "neuron":
        return choice_of_neurons(block.activation, options)
    return BlockChoice(options.rank, options.keep_neurons)


def check_choices(blocks: Sequence[BoundBlock], choices: Mapping[str, BlockChoice]) -> None:
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
        if stored_rank(block, choice.rank) == 0 and not choice.count and not choice.dropped:
            raise ValueError(f"Rank 0 without kept neurons leaves nothing of block {block.name}.")
        if not is_possible(block, stored_rank(block, choice.rank), choice.count):
            raise ValueError(
                f"Block {block.name} can only collapse whole (`rank=None`, `keep_neurons=0`)"
                + (" or to neurons alone (`rank=0`)" if is_cut(block, 0) else "")
                + ": its code scales what goes into its activation or its last linear, or its parts lie in modules of "
                "their own."
            )


def _refuse_none_ready(
    in_use: Sequence[tuple[BoundBlock, CollapsibleActivation]], options: LayerCollapseConfig
) -> None:
    """Raises if none of these blocks would collapse, by their activations in use."""
    if not any(outcome_of(block, activation, options).collapses for block, activation in in_use):
        _raise_none_ready({block.name: activation.alpha for block, activation in in_use}, options)


def _raise_none_ready(alphas: Mapping[str, torch.Tensor], options: LayerCollapseConfig) -> NoReturn:
    listed = "".join(f"\n  {name}: alpha {float(alpha.detach().min()):.4f}" for name, alpha in alphas.items())
    raise ValueError(
        f"No block is ready: none has 1 - alpha <= {options.collapse_threshold}. Train longer, with a larger "
        f"`penalty_strength` or `alpha_learning_rate`, or raise `collapse_threshold`.{listed}"
    )


# ----------------------------------------------------------------------------------------------------
# What blocks become
# ----------------------------------------------------------------------------------------------------


def _exactly_linear(block: BoundBlock, choices: Mapping[str, BlockChoice]) -> bool:
    """Whether a block is one line at alpha 1, which no data can fit better."""
    choice = choices[block.name]
    whole = not choice.count and stored_rank(block, choice.rank) is None
    return whole and block.state == "patched" and float(block.activation.alpha.detach().min()) == 1


def _merges_of(chosen: _Chosen, engine: Calibration | None, options: LayerCollapseConfig) -> list[Merge]:
    """What the chosen blocks become, each fitted to the data if there are any and it is not one line already."""
    ready, choices, threshold = chosen.ready, chosen.choices, options.collapse_threshold
    if engine is None:
        return _merge_all(ready, {}, threshold)
    with processes.together():
        refit = [block for block in ready if not _exactly_linear(block, choices)]
        fitting = BlockFitting(engine, choices, options.neuron_choice, options.constant_term)
        if not options.sequential:
            _refuse_fitted_chains(ready, refit)
    if options.sequential:
        merges = _merge_in_turn(fitting, ready, refit, threshold)
    else:
        fitted = fitting.merges(refit)
        with processes.together():
            merges = _merge_all(ready, fitted, threshold)
    # The same to the bit, whatever each process computes on; those that were fitted are.
    told = {block.name for block in refit}
    processes.spread([weight for merge in merges if merge.block.name not in told for weight in merge.weights])
    return merges


def _merge_in_turn(
    fitting: BlockFitting, ready: Sequence[BoundBlock], refit: Sequence[BoundBlock], collapse_threshold: float
) -> list[Merge]:
    """The merges, each fitted with those before it in place; the model is left as it was."""
    fitting.refuse_too_little_in_turn(ready, refit)
    merges: list[Merge] = []
    with Trial() as trial:
        for block in ready:
            bound = _after(block, merges)
            fitted = fitting.merges([bound]) if block in refit else {}
            with processes.together():
                merges += _merge_all([bound], fitted, collapse_threshold)
                trial.put(merges[-1])
            # The next are fitted beside it.
            fitting.engine.memory.hold(merges[-1].bytes, kept_on(block.down))
    return merges


def _refuse_fitted_chains(ready: Sequence[BoundBlock], refit: Sequence[BoundBlock]) -> None:
    """Raises where a linear ends one block and begins another that is fitted to data.

    Raises:
        ValueError: As said.
    """
    for block in refit:
        before = next((other for other in ready if other.down is block.up), None)
        if before is not None:
            raise ValueError(
                f"Block {block.name} begins with the linear that ends {before.name}; fitted to data, they cannot "
                "collapse in one call. Name one of them in `blocks`, then the other."
            )


def _merge_all(ready: Sequence[BoundBlock], fitted: Mapping[str, Merge], collapse_threshold: float) -> list[Merge]:
    """The merges in forward order, of the weights alone where none was fitted; where a linear ends one block and
    begins the next, that takes the merged one."""
    merges: list[Merge] = []
    for block in ready:
        if block.name in fitted:
            merges.append(fitted[block.name])
            continue
        block = _after(block, merges)
        with block.weights_present():
            fit = fit_of_weights(block, collapse_threshold)
        merges.append(make_merge(block, fit, refit=False))
    return merges


def _after(block: BoundBlock, merges: Sequence[Merge]) -> BoundBlock:
    """The block as it is with these merges in place: one may end with the linear that it begins with."""
    before = next((merge for merge in merges if merge.block.down is block.up), None)
    return block if before is None else replace(block, up=before.linears[before.block.layout.down])


def _confirm_cuts(inner: Any, merges: Sequence[Merge]) -> None:
    """Raises if native code does not run with the linears that it is to get."""
    cut = [merge for merge in merges if is_cut(merge.block, merge.fit.rank)]
    with Trial() as trial:
        for merge in cut:
            trial.put(merge)
        confirm_wiring(inner, [merge.block for merge in cut])


@torch.no_grad()
def _largest_difference(engine: Calibration, merges: Sequence[Merge], restored: Iterable[BoundBlock]) -> float:
    """The largest difference of the model's first output, as it is and with these merges in place and these blocks
    restored, over some rows of the data, of all processes; the outputs of one batch are held at a time."""
    largest, batches = 0.0, engine.sample(LOGIT_ROWS, RANGE_TOKENS, RANGE_BYTES)
    engine.progress.say("comparing outputs")
    with processes.together(), evaluating(engine.model):
        for batch in batches:
            largest = functional.largest([largest, _difference_on(batch, engine, merges, restored)])
    return largest


def _difference_on(
    batch: Mapping[str, Any], engine: Calibration, merges: Sequence[Merge], restored: Iterable[BoundBlock]
) -> float:
    model = engine.model
    inputs = lean(engine.inner, inputs_of(batch, device_of(model)))
    before = first_tensor(outputs_of(model, inputs))
    if not functional.is_finite(before):
        raise ValueError("The calibration data gives outputs that are not finite.")
    with Trial() as trial:
        for merge in merges:
            trial.put(merge)
        trial.restore(restored)
        return functional.largest_difference(before, first_tensor(outputs_of(model, inputs)))


def _refuse_errors(merges: Sequence[Merge], max_error: float | None) -> None:
    if max_error is None:
        return
    # One that is not a number is above any.
    above = [merge.report for merge in merges if not merge.error <= max_error]
    if above:
        listed = "".join(f"\n  {report.name}: {report.measured_error:.3e}" for report in above)
        raise ValueError(
            f"The relative error of {len(above)} merged blocks is above max_error={max_error}; nothing was changed. "
            f"Train until alpha is closer to 1, pass `calibration_data`, or raise `max_error`.{listed}"
        )


def _block_reports(
    merges: Sequence[Merge], waiting: Sequence[BoundBlock], restored: Sequence[BoundBlock]
) -> list[BlockReport]:
    """What became of every block that was looked at, in forward order."""
    reports = [merge.report for merge in merges] + [_waiting_report(block, block in restored) for block in waiting]
    return sorted(reports, key=lambda report: report.index)


def _waiting_report(block: BoundBlock, restored: bool) -> BlockReport:
    return BlockReport(
        name=block.name,
        index=block.index,
        outcome="restored" if restored else "kept",
        alpha=block.alpha,
        parameters_before=block.parameters,
        parameters_after=block.parameters,
        macs_before=block.macs,
        macs_after=block.macs,
    )
