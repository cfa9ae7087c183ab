"""Dense <-> patched: exchanging the activation module of a block, and nothing else."""

import contextlib
import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from . import processes
from .blocks import BoundBlock, bind_blocks, check_weights, survey
from .calibration import Calibration
from .calibration_data import model_inputs
from .classes import make_native, refuse_lost_code, set_layer_collapse
from .config import LayerCollapseConfig
from .families import find_feed_forward_blocks
from .modeling_layercollapse import (
    FORMAT_VERSION,
    TAKEN_OUT,
    CollapsibleActivation,
    LayerCollapseModelMixin,
    NarrowFeedForward,
    apply_table,
    base_model_prefix_of,
    differences,
    found_at,
    linear_shape,
    mark_initialized,
    native_class_of,
    resolve_table,
    resolved_of,
    spec_of,
    standing,
    validate_layer_collapse,
)
from .models import base_layer, carriers_of, device_of, is_peft_model, shorten, unwrap
from .neuron_statistics import calibrate_affine_targets
from .progress import Progress
from .selection import select_blocks


ModelT = TypeVar("ModelT", bound=nn.Module)


def apply_layer_collapse(
    model: ModelT,
    config: LayerCollapseConfig | None = None,
    calibration_data: Iterable[Any] | None = None,
    max_memory: int | str | dict | None = None,
    processing_class: Any = None,
    token_mask_fn: Callable[..., Any] | None = None,
) -> ModelT:
    """Patches a dense model in place: each chosen block's activation becomes a [`CollapsibleActivation`].

    While every alpha is 0 the model computes what it did before, bit for bit. The model's class and config become
    those that save and load with the patch; `isinstance` of the native class stays true.

    Args:
        model (`nn.Module`): A dense model, or one that was collapsed before (its dense blocks are patched, and those
            that were only narrowed). A PeftModel or compiled model is looked through and stays valid; of a
            `SentenceTransformer`, `CrossEncoder` or `SparseEncoder` the transformers model that it holds is patched.
        config ([`LayerCollapseConfig`], *optional*): Which blocks, and how. Default: all blocks, identity target.
        calibration_data (iterable of `dict[str, Tensor]`, *optional*): Model inputs; needed, and only used, for
            `linear_target="affine"`, and for `"constant"` where a block is not gated.
        max_memory: As in [`collapse_model`]; here it is what inputs take that can be read only once.
        processing_class (*optional*): Tokenizer or processor that makes model inputs of raw texts, pairs, images or
            sounds, as [`CalibrationData`] says. Default: the data are model inputs, or what an object of
            sentence-transformers reads.
        token_mask_fn: As in [`collapse_model`].

    Returns:
        The same object.

    Raises:
        TypeError: `model` or `config` is of a wrong type, or the model is wrapped or sharded.
        ValueError: Nothing or something unknown is chosen, the model is patched already, its weights cannot be used,
            its class is the user's own and no Auto class knows it, or calibration data is missing, empty or not
            finite. Nothing has been changed then.
    """
    config = LayerCollapseConfig() if config is None else config
    if not isinstance(config, LayerCollapseConfig):
        raise TypeError(f"`config` must be a LayerCollapseConfig, got {type(config).__name__}.")
    refuse_budget_in(config)
    # Without data to fit to no other process takes part.
    with_data = calibration_data is not None and config.linear_target != "identity"
    with processes.together() if with_data else contextlib.nullcontext():
        inner, wrappers = unwrap_savable(model)
        blocks, refused = survey(inner)
        if collapsible_activations(inner):
            raise ValueError("The model is patched already. `remove_layer_collapse(model)` takes it back to dense.")
        chosen = _blocks_to_patch(select_blocks(blocks, config.blocks, refused), config)
        refuse_lost_code_inside(inner, chosen)
        check_weights(inner, chosen, merging=False)

        activations = {block.name: _activation_for(block, config) for block in chosen}
        to_fit = [block for block in chosen if _is_fitted(block, config.linear_target)]
        if to_fit and calibration_data is None:
            raise ValueError(
                f'linear_target="{config.linear_target}" needs `calibration_data`: some batches of model inputs to '
                "fit each neuron's line to."
            )
        data = model_inputs(calibration_data, processing_class, model) if to_fit else None
    if data is not None:
        with Progress("Affine targets") as progress:
            engine = Calibration.on(model, inner, data, max_memory, token_mask_fn, progress)
            calibrate_affine_targets(engine, to_fit, activations, config.linear_target == "constant")

    for block in chosen:
        block.exchange(block.layout.activation_path, activations[block.name].train(block.module.training))
    refresh_layer_collapse(inner, replace(config, blocks=[block.name for block in chosen]), wrappers)
    return model


def refuse_budget_in(config: LayerCollapseConfig | None) -> None:
    """Raises if options have a budget that a plan is to meet, where nothing plans for it.

    Raises:
        ValueError: They have.
    """
    if config is not None and config.plans:
        raise ValueError(
            f"`budget` ({config.budget}) is what LayerCollapseTrainer and its mixin train a model to, and nothing "
            "else reads it. Without training: `plan = plan_collapse(model, data, macs=...)`, then "
            "`collapse_model(model, plan=plan, calibration_data=data)`."
        )


def _blocks_to_patch(chosen: Sequence[BoundBlock], config: LayerCollapseConfig) -> list[BoundBlock]:
    """The chosen blocks that are not collapsed; raises where none is left, or one was asked for by name."""
    collapsed = [block.name for block in chosen if not block.can_collapse]
    if collapsed and config.blocks != "all":
        raise ValueError(f"`blocks` names blocks that are collapsed already: {collapsed}.")
    remaining = [block for block in chosen if block.can_collapse]
    if not remaining:
        raise ValueError("Every block of the model is collapsed already; there is nothing to patch.")
    return remaining


def _is_fitted(block: BoundBlock, linear_target: str) -> bool:
    """Whether data say what a block's alphas lead to. A neuron of a gated block goes with its gate, to 0."""
    return linear_target == "affine" or (linear_target == "constant" and block.kind != "gated")


def _activation_for(block: BoundBlock, config: LayerCollapseConfig) -> CollapsibleActivation:
    """The activation with an alpha that is to stand in a block."""
    activation = CollapsibleActivation(
        block.activation,
        block.hidden_features,
        linear_target="identity" if config.linear_target == "identity" else "affine",
        granularity=config.granularity,
        gate=block.kind == "gated",
        act="native" if config.activation == "native" else config.activation,
        alpha=config.initial_alpha,
        device=device_of(block.up),
    )
    if config.linear_target == "constant":
        for part in activation.buffers(recurse=False):
            part.zero_()
    mark_initialized(activation)
    return activation


def patch_or_check(model: nn.Module, config: LayerCollapseConfig, calibration_data: Iterable[Any] | None) -> None:
    """Patches a dense model in place, or checks that a patched one is what the config describes.

    The config's other options, those that drive training and the collapse, are recorded in the model. A collapsed
    model is left as it is if the config has distillation, which then heals it.

    Raises:
        TypeError: The model is no module, wrapped or sharded.
        ValueError: It is patched in another way, or collapsed and not patched, and there is no distillation.
    """
    inner, wrappers = unwrap(model)
    blocks = bind_blocks(inner)
    patched = collapsible_activations(model)
    collapsed = [block.name for block in blocks if block.state == "collapsed"]
    if not patched:
        if collapsed and config.distils:
            return
        if collapsed:
            raise ValueError(
                f"The model is collapsed ({len(collapsed)} of {len(blocks)} blocks) and carries no alpha. To train it "
                "as it is, leave `layer_collapse_config` out, or set `distillation_weight` or `hidden_state_weight` "
                "in it and pass the dense model as `teacher`; to go on with its dense blocks, patch them first: "
                "`apply_layer_collapse(model, config)`."
            )
        apply_layer_collapse(model, config, calibration_data)
        return
    differences = _patch_differences(blocks, patched.values(), config)
    if differences:
        raise ValueError(
            "The model is patched already, and not as `layer_collapse_config` says:"
            + "".join(f"\n  {line}" for line in differences)
            + "\nLeave `layer_collapse_config` out to train the model as it is patched, or take it back to dense "
            "first: `remove_layer_collapse(model)`."
        )
    config = replace(config, blocks=_names_of_patched(blocks, patched.values()))
    carriers = [carrier for _, carrier in carriers_of(inner) if collapsible_activations(carrier)]
    if not all(isinstance(carrier, LayerCollapseModelMixin) for carrier in carriers):  # a part of one was patched
        refresh_layer_collapse(inner, config, wrappers)
    record_options(inner, config)


def _patch_differences(
    blocks: Sequence[BoundBlock], activations: Collection[CollapsibleActivation], config: LayerCollapseConfig
) -> list[str]:
    differences = []
    for option, found in (
        ("linear_target", {target_of(activation) for activation in activations}),
        ("granularity", {activation.granularity for activation in activations}),
        ("activation", {activation.act_name for activation in activations}),
    ):
        asked = getattr(config, option)
        if found != {asked}:
            differences.append(f"`{option}`: {asked!r} in the config, {' and '.join(map(repr, sorted(found)))} here")
    remaining = [block for block in blocks if block.state != "collapsed"]
    patched = _names_of_patched(blocks, activations)
    wanted = [block.name for block in select_blocks(blocks, config.blocks) if block in remaining]
    if patched != wanted:
        differences.append(f"`blocks`: {config.blocks!r} chooses {shorten(wanted)}, patched are {shorten(patched)}")
    return differences


def _names_of_patched(blocks: Sequence[BoundBlock], activations: Iterable[CollapsibleActivation]) -> list[str]:
    """Of the blocks in which these activations are, in peft's `modules_to_save` or not."""
    ours = {id(activation) for activation in activations}
    remaining = [block for block in blocks if block.state != "collapsed"]
    return [block.name for block in remaining if any(id(module) in ours for module in block.activation.modules())]


def remove_layer_collapse(model: ModelT) -> ModelT:
    """Takes a patched model back to dense in place, exactly: the native activations return, whatever alpha is.

    Blocks that were collapsed stay collapsed.

    Args:
        model (`nn.Module`): A patched model; what it may be wrapped in or held by, as in [`apply_layer_collapse`].

    Returns:
        The same object.

    Raises:
        TypeError: The model is wrapped or sharded.
        ValueError: The model is not patched.
    """
    inner, wrappers = unwrap(model)
    refuse_adapted_alphas(inner)
    blocks = [block for block in bind_blocks(inner) if block.state == "patched"]
    if not blocks:
        raise ValueError("The model is not patched: none of its blocks carries an alpha.")
    for block in blocks:
        block.restore()
    refresh_layer_collapse(inner, None, wrappers)
    return model


def collapsible_activations(model: nn.Module) -> dict[str, CollapsibleActivation]:
    """Qualified name -> activation, for every patched block; a shared block once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CollapsibleActivation)}


def activation_in_use(block: BoundBlock) -> CollapsibleActivation | None:
    """The activation with an alpha in a block; `None` where there is none."""
    return None if block.activation is None else in_use_of(collapsible_activations(block.activation))


def in_use_of(activations: Mapping[str, CollapsibleActivation]) -> CollapsibleActivation | None:
    """Which one of a block's activations counts, of those by name that peft's `modules_to_save` makes of one: that
    which trains, or where none does an adapter's, and not the one that it was copied from."""
    trained = [activation for activation in activations.values() if activation.alpha.requires_grad]
    copies = [activation for name, activation in activations.items() if name.split(".")[-1] != "original_module"]
    return next(iter([*trained, *copies]), None)


def refuse_adapted_alphas(model: nn.Module) -> None:
    """Raises a ValueError if peft's `modules_to_save` holds activations with alphas: two copies of each."""
    wrapped = [name for name in collapsible_activations(model) if ".modules_to_save." in name]
    if wrapped:
        raise ValueError(
            f"The alpha of `{wrapped[0]}` belongs to an adapter that is not merged. Call "
            "`model = model.merge_and_unload()` first."
        )


def unwrap_savable(model: nn.Module) -> tuple[Any, list[Any]]:
    """[`unwrap`] for what is to change in place; raises as `refuse_lost_code` does, before any data is read."""
    inner, wrappers = unwrap(model)
    if isinstance(inner, PreTrainedModel):
        refuse_lost_code(inner)
    return inner, wrappers


def refuse_lost_code_inside(model: nn.Module, blocks: Iterable[BoundBlock]) -> None:
    """Raises as `refuse_lost_code` does, for the models inside a module whose blocks are to change."""
    for name, carrier in carriers_of(model):
        if any(block.name.startswith(f"{name}.") for block in blocks):
            refuse_lost_code(carrier)


def tables_of(model: nn.Module) -> dict[str, dict]:
    """Qualified name of a carrier -> its replacement table, without those that are dense."""
    stored = {name: carrier.config.__dict__.get("layer_collapse") for name, carrier in carriers_of(model)}
    return {name: layer_collapse["modules"] for name, layer_collapse in stored.items() if layer_collapse}


def writes_code(model: nn.Module) -> bool:
    """Whether what a patched or collapsed model saves holds the code that reads it, for `trust_remote_code=True`. It
    does not where only a part of a transformers model is one, by itself."""
    carriers = [carrier for _, carrier in carriers_of(model)]
    holding = [each for each in carriers if any(isinstance(part, LayerCollapseModelMixin) for part in each.modules())]
    return all(isinstance(each, LayerCollapseModelMixin) for each in holding)


def layer_collapse_config_of(model: nn.Module) -> LayerCollapseConfig | None:
    """The [`LayerCollapseConfig`] that a patched or collapsed model carries, else `None`. Of several models inside of
    a module those that are patched count, if one is.

    Its `blocks` are names. A file may come from anywhere, and a regular expression in it is not run: what its writer
    chose is what the tables hold.

    Raises:
        ValueError: They carry different ones.
    """
    carriers = carriers_of(model)
    carriers = [(name, carrier) for name, carrier in carriers if collapsible_activations(carrier)] or carriers
    stored = {name: carrier.config.__dict__.get("layer_collapse") for name, carrier in carriers}
    options = {name: dict(table["options"]) for name, table in stored.items() if table and table.get("options")}
    if not options:
        return None
    blocks = {name: values.pop("blocks", None) for name, values in options.items()}
    for name, carrier in carriers:
        if isinstance(blocks.get(name), list):
            blocks[name] = [each for each in blocks[name] if found_at(carrier, str(each)) is not TAKEN_OUT]
    (first, chosen), *others = options.items()
    different = [name for name, other in others if other != chosen]
    if different:
        raise ValueError(
            f"`{first}` and `{different[0]}` of this {type(model).__name__} were patched or collapsed with different "
            "options: pass the LayerCollapseConfig that is meant."
        )
    if first == "" and isinstance(blocks[first], list):
        names = blocks[first]
    elif all(isinstance(part, list) and all(isinstance(block, str) for block in part) for part in blocks.values()):
        names = [f"{name}.{block}" for name, part in blocks.items() for block in part]
    else:
        names = [block.name for block in find_feed_forward_blocks(model) if block.state != "dense"]
    # A head may leave out the part that holds them.
    return LayerCollapseConfig.from_dict({**chosen, "blocks": names or "all"})


def _options_of(config: LayerCollapseConfig, carrier: str) -> dict[str, Any]:
    """Options as a carrier of this name records them: its own blocks, by the names that they have in it."""
    prefix = f"{carrier}." if carrier else ""
    names = [str(block).removeprefix(prefix) for block in config.blocks if str(block).startswith(prefix)]
    return {**config.to_dict(), "blocks": names}


def record_options(model: nn.Module, config: LayerCollapseConfig) -> None:
    """Writes options, with names as `blocks`, into the configs of what is patched or collapsed, in place; where
    something is patched, into those only."""
    carriers = carriers_of(unwrap(model)[0])
    carriers = [(name, carrier) for name, carrier in carriers if collapsible_activations(carrier)] or carriers
    for name, carrier in carriers:
        stored = carrier.config.__dict__.get("layer_collapse")
        if stored:
            carrier.config.layer_collapse = {**stored, "options": _options_of(config, name)}


def take_shapes(model: nn.Module, tables: dict[str, dict]) -> None:
    """Makes a dense model in place what tables of a collapsed one of its kind say, but for the weights of what they
    replace, which are to be loaded afterwards.

    Args:
        tables (`dict[str, dict]`): As [`tables_of`] gives them.

    Raises:
        ValueError: One of them is no table of this format, or belongs to another model.
    """
    inner, wrappers = unwrap(model)
    for name, carrier in carriers_of(inner):
        if name in tables:
            layer_collapse = validate_layer_collapse({"version": FORMAT_VERSION, "modules": tables[name]})
            _take_shape(carrier, layer_collapse["modules"])
            set_layer_collapse(carrier, layer_collapse, [*wrappers, *_adapters_around(carrier, inner)])


def _take_shape(carrier: PreTrainedModel, table: dict[str, Any]) -> None:
    known = {id(parameter) for parameter in carrier.parameters()}
    native = [(name, module) for _, name, module, _ in resolve_table(carrier, table)]
    apply_table(carrier, table)
    for name, before in native:
        like: Any = next(before.parameters(), None)
        module = carrier.get_submodule(name)
        for parameter in module.parameters():
            if id(parameter) not in known:
                parameter.data = parameter.data.to(like)
                parameter.requires_grad_(like.requires_grad)
        for part in module.modules():
            mark_initialized(part)
        module.train(before.training)


def refresh_layer_collapse(
    inner: Any,
    config: LayerCollapseConfig | None = None,
    wrappers: Iterable[nn.Module] = (),
    replaced: Any = (),
    default: LayerCollapseConfig | None = None,
) -> None:
    """Writes what the modules now are into the model's config in place, and gives it the classes that belong to that.

    A part that is a patched or collapsed model of its own becomes a part of this one: its table is taken over. Of a
    module that is no transformers model, but holds some, each of these is written to that has changed.

    Args:
        config ([`LayerCollapseConfig`], *optional*): Options to record, with names as `blocks`. Default: those that
            are there.
        default ([`LayerCollapseConfig`], *optional*): What they are where none are there.
        wrappers (`Sequence[nn.Module]`): What wraps the model.
        replaced (`Sequence[nn.Module]`): What a collapse put in the place of other modules.
    """
    # By module and not by name: models inside a module may share parts. What native code runs around may have its
    # native activation again, of which no table speaks.
    specs = {id(module): spec for module in replaced if (spec := spec_of(module)) is not None}
    carriers, exchanged = carriers_of(inner), []
    for name, carrier in carriers:
        own = [(path, specs[id(module)]) for path, module in carrier.named_modules() if id(module) in specs]
        layer_collapse = _described(carrier, name, config, default, own)
        stored = carrier.config.__dict__.get("layer_collapse")
        if carrier is inner or _table_in(layer_collapse) != _table_in(stored):
            exchanged.append((carrier, carrier.config))
            set_layer_collapse(carrier, layer_collapse, [*wrappers, *_adapters_around(carrier, inner)])
    in_carriers = {id(module) for _, carrier in carriers for module in carrier.modules()}
    for module in inner.modules():
        if id(module) not in in_carriers:
            # Their own config, or that of the model inside: then it is a copy by now.
            for carrier, old in exchanged:
                if module.__dict__.get("config") is old:
                    module.config = carrier.config
                    break


def _adapters_around(carrier: nn.Module, inner: Any) -> list[nn.Module]:
    """PeftModels inside a module that hold one of its carriers."""
    return [module for module in inner.modules() if is_peft_model(module) and carrier in module.modules()]


def _table_in(layer_collapse: dict[str, Any] | None) -> dict[str, Any] | None:
    return layer_collapse["modules"] if layer_collapse else None


def _described(
    model: PreTrainedModel,
    carrier: str,
    config: LayerCollapseConfig | None,
    default: LayerCollapseConfig | None,
    replaced: Sequence[tuple[str, dict[str, Any]]],
) -> dict[str, Any] | None:
    """What the config of the carrier of this name has to say of its modules as they are now; `None` if it is dense."""
    stored = model.config.__dict__.get("layer_collapse") or {}
    table = {path: spec for path, spec in stored.get("modules", {}).items() if spec["type"] != "activation"}
    if not isinstance(model, LayerCollapseModelMixin):
        table = standing(model, table)
    inside = [
        (name, part)
        for name, part in model.named_modules()
        if part is not model and isinstance(part, LayerCollapseModelMixin)
    ]
    options = stored.get("options", {})
    for _, part in inside:
        options = options or part.config.layer_collapse.get("options", {})
    recorded = config or (None if options else default)
    if recorded is not None:
        options = _options_of(recorded, carrier)
    of_parts = [(f"{name}.{path}", spec) for name, part in inside for path, spec in replaced_modules(part)]
    added = [(name, {key: value for key, value in spec.items() if key != "scope"}) for name, spec in of_parts]
    added += [(name, activation.spec) for name, activation in collapsible_activations(model).items()]
    prefix = base_model_prefix_of(model)
    table |= dict(_entry(prefix, name, spec) for name, spec in added)
    # What was narrowed before may lie inside what is replaced as a whole now.
    gone = {_entry(prefix, name, spec)[0] for name, spec in replaced}
    table = {path: spec for path, spec in table.items() if not gone.intersection(_and_above(path))}
    table |= dict(_entry(prefix, name, spec) for name, spec in replaced)
    now = _as_layers_are(model, table)
    if now.keys() != table.keys():
        options = {key: value for key, value in options.items() if key != "blocks"}
    table = now
    if not table:
        return None
    layer_collapse = {"version": FORMAT_VERSION, "options": options, "modules": table}
    return {**layer_collapse, "part": stored["part"]} if "part" in stored else layer_collapse


def _as_layers_are(model: PreTrainedModel, table: dict[str, Any]) -> dict[str, Any]:
    """A table after layers were taken out of a live model, put in, or have changed places."""
    taken_out, wrong, names = differences(model, table)
    table = {path: spec for path, spec in table.items() if path not in {*taken_out, *wrong}}
    if not wrong and not names:
        return table
    prefix = base_model_prefix_of(model)
    specs = {name: spec_of(model.get_submodule(name)) for name in names}
    return table | dict(_entry(prefix, name, spec) for name, spec in {**specs, **_resized_linears(model)}.items())


def _resized_linears(model: PreTrainedModel) -> dict[str, Any]:
    """Qualified name -> spec, of the linears of a model that have another size than its native class gives them, and
    are called by native code. Nothing tells them from others but that."""
    config = copy.deepcopy(model.config)
    make_native(config)
    with torch.device("meta"):
        native = native_class_of(model)(config)
    whole = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, NarrowFeedForward))
    now = {name: part for name, part in model.named_modules() if not f"{name}.".startswith(whole)}
    resized = {}
    for name, part in native.named_modules():
        linear = base_layer(now.get(name))
        if isinstance(part, (nn.Linear, Conv1D)) and isinstance(linear, (nn.Linear, Conv1D)):
            if linear_shape(linear) != linear_shape(part):
                resized[name] = spec_of(linear)
    return resized


def _entry(prefix: str, name: str, spec: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A module of a model as its table has it: by its path in the base model, or with the scope of the model."""
    return (name[len(prefix) :], spec) if name.startswith(prefix) else (name, {**spec, "scope": "model"})


def _and_above(path: str) -> list[str]:
    """A path and those of the modules around it."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def replaced_modules(model: PreTrainedModel) -> list[tuple[str, dict[str, Any]]]:
    """`[(qualified name, spec)]` of what a collapse replaced in a model, as its own table says."""
    return [(name, spec) for _, name, _, spec in resolved_of(model) if spec["type"] != "activation"]


def target_of(activation: CollapsibleActivation) -> str:
    """The `linear_target` that a block was patched with; in a table `"constant"` is `"affine"` without slopes."""
    constant = activation.granularity == "neuron" and activation.leaves_constant
    return "constant" if constant else activation.linear_target


def alpha_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The alphas of a patched model, each once, in forward order."""
    seen: dict[int, nn.Parameter] = {}
    for activation in collapsible_activations(model).values():
        seen.setdefault(id(activation.alpha), activation.alpha)
    return list(seen.values())


def penalty(
    alphas: Iterable[torch.Tensor], goal: Callable[[torch.Tensor], torch.Tensor | float] | None = None
) -> torch.Tensor:
    """`sum_b (1 - alpha_b)^2` (LayerCollapse, arXiv 2311.17943), over blocks; with one alpha per neuron, the mean of a
    block's neurons. A float32 scalar; 0 for no alphas.

    Args:
        goal (`Callable`, *optional*): Gives what an alpha is to become in the place of 1, of its shape.

    Raises:
        TypeError: An alpha is sharded over processes.
    """
    for alpha in alphas:
        refuse_sharded(alpha)
    terms = [((1 if goal is None else goal(alpha)) - alpha).square().mean() for alpha in alphas]
    # A model may be spread over several devices.
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else torch.zeros(())


def refuse_sharded(alpha: torch.Tensor) -> None:
    """Raises `TypeError` if an alpha is a DTensor: what one process holds of it is not its value."""
    # By name: torch.distributed is not part of every build of torch.
    if type(alpha.data).__name__ == "DTensor":
        raise TypeError(
            "An alpha is sharded over processes. With `alphas = alpha_parameters(model)` from before, leave them out: "
            "`fully_shard(module, ignored_params=set(alphas))` for every module, then `replicate_alphas(alphas)`."
        )
