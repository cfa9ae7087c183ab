"""Dense <-> patched: exchanging the activation module of a block, and nothing else."""

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .calibration import calibrate_affine_targets
from .config import LayerCollapseConfig
from .families import (
    check_weights,
    find_feed_forward_blocks,
    modules_of,
    select_blocks,
    survey_blocks,
    unwrap,
)
from .modeling_layercollapse import (
    FORMAT_VERSION,
    CollapsibleActivation,
    LayerCollapseModelMixin,
    base_model_prefix_of,
    resolve_table,
    set_layer_collapse,
)


def apply_layer_collapse(model, config: LayerCollapseConfig | None = None, calibration_data=None):
    """Patches a dense model in place: each chosen block's activation becomes a [`CollapsibleActivation`].

    While every alpha is 0 the model computes what it did before, bit for bit. The model's class and config become
    those that save and load with the patch; `isinstance` of the native class stays true.

    Args:
        model (`nn.Module`): A dense model, or one that was collapsed before (its dense blocks are patched). A
            PeftModel or compiled model is looked through and stays valid.
        config ([`LayerCollapseConfig`], *optional*): Which blocks, and how. Default: all blocks, identity target.
        calibration_data (iterable of `dict[str, Tensor]`, *optional*): Model inputs; needed, and only used, for
            `linear_target="affine"`.

    Returns:
        The same object.

    Raises:
        TypeError: `model` or `config` is of a wrong type, or the model is wrapped or sharded.
        ValueError: Nothing or something unknown is chosen, the model is patched already, its weights cannot be used,
            or calibration data is missing, empty or not finite. Nothing has been changed then.
    """
    config = LayerCollapseConfig() if config is None else config
    if not isinstance(config, LayerCollapseConfig):
        raise TypeError(f"`config` must be a LayerCollapseConfig, got {type(config).__name__}.")
    inner, holders = unwrap(model)
    blocks, refused = survey_blocks(inner)
    if collapsible_activations(inner):
        raise ValueError("The model is patched already. `remove_layer_collapse(model)` takes it back to dense.")
    chosen = select_blocks(blocks, config.blocks, refused)
    collapsed = [block.name for block in chosen if block.state == "collapsed"]
    if collapsed and config.blocks != "all":
        raise ValueError(f"`blocks` names blocks that are collapsed already: {collapsed}.")
    chosen = [block for block in chosen if block.state == "dense"]
    if not chosen:
        raise ValueError("Every block of the model is collapsed already; there is nothing to patch.")
    check_weights(inner, chosen, merging=False)

    activations = {}
    for block in chosen:
        parts = modules_of(inner, block)
        activations[block.name] = activation = CollapsibleActivation(
            parts.activation,
            block.hidden_features,
            linear_target=config.linear_target,
            granularity=config.granularity,
            gate=block.kind == "gated",
            act="native" if config.activation == "native" else config.activation,
            alpha=config.initial_alpha,
            device=next(parts.up.parameters()).device,
        )
        mark_initialized(activation)
    if config.linear_target == "affine":
        if calibration_data is None:
            raise ValueError(
                'linear_target="affine" needs `calibration_data`: some batches of model inputs to fit each neuron\'s '
                "line to."
            )
        calibrate_affine_targets(model, inner, chosen, activations, calibration_data)

    for block in chosen:
        replace_module(inner, block.path(block.layout.activation), activations[block.name])
        activations[block.name].train(modules_of(inner, block).holder.training)
    refresh_layer_collapse(inner, config, holders)
    return model


def patch_or_check(model, config, calibration_data):
    """Patches a dense model in place, or checks that a patched one is what the config describes.

    The config's other options, those that drive training and the collapse, are recorded in the model. A collapsed
    model is left as it is if the config has distillation, which then heals it.

    Raises:
        TypeError: The model is no module, wrapped or sharded.
        ValueError: It is patched in another way, or collapsed and not patched, and there is no distillation.
    """
    inner, holders = unwrap(model)
    blocks = find_feed_forward_blocks(inner)
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
    differences = _patch_differences(inner, blocks, patched.values(), config)
    if differences:
        raise ValueError(
            "The model is patched already, and not as `layer_collapse_config` says:"
            + "".join(f"\n  {line}" for line in differences)
            + "\nLeave `layer_collapse_config` out to train the model as it is patched, or take it back to dense "
            "first: `remove_layer_collapse(model)`."
        )
    if isinstance(inner, LayerCollapseModelMixin):
        inner.config.layer_collapse = {**inner.config.layer_collapse, "options": config.to_dict()}
    elif isinstance(inner, PreTrainedModel):  # a part of it was patched
        refresh_layer_collapse(inner, config, holders)


def _patch_differences(inner, blocks, activations, config):
    differences = []
    for option, found in (
        ("linear_target", {activation.linear_target for activation in activations}),
        ("granularity", {activation.granularity for activation in activations}),
        ("activation", {activation.act_name for activation in activations}),
    ):
        wanted = getattr(config, option)
        if found != {wanted}:
            differences.append(f"`{option}`: {wanted!r} in the config, {' and '.join(map(repr, sorted(found)))} here")
    ours = {id(activation) for activation in activations}
    remaining = [block for block in blocks if block.state != "collapsed"]
    patched = [
        block.name
        for block in remaining
        if any(id(module) in ours for module in modules_of(inner, block).activation.modules())
    ]
    wanted = [block.name for block in select_blocks(blocks, config.blocks) if block in remaining]
    if patched != wanted:
        differences.append(f"`blocks`: {config.blocks!r} chooses {shorten(wanted)}, patched are {shorten(patched)}")
    return differences


def remove_layer_collapse(model):
    """Takes a patched model back to dense in place, exactly: the native activations return, whatever alpha is.

    Blocks that were collapsed stay collapsed.

    Args:
        model (`nn.Module`): A patched model; a PeftModel or compiled model is looked through.

    Returns:
        The same object.

    Raises:
        TypeError: The model is wrapped or sharded.
        ValueError: The model is not patched.
    """
    inner, holders = unwrap(model)
    refuse_adapted_alphas(inner)
    blocks = [block for block in find_feed_forward_blocks(inner) if block.state == "patched"]
    if not blocks:
        raise ValueError("The model is not patched: none of its blocks carries an alpha.")
    restore_blocks(inner, blocks)
    refresh_layer_collapse(inner, None, holders)
    return model


def restore_blocks(inner, blocks):
    """Puts the native activation back into patched blocks."""
    for block in blocks:
        activation = modules_of(inner, block).activation
        replace_module(inner, block.path(block.layout.activation), activation.native.train(activation.training))


def shorten(names, limit=6):
    names = list(names)
    return names if len(names) <= limit else [*names[:limit], f"and {len(names) - limit} more"]


def replace_module(model, name, module):
    """Puts `module` where `name` stands, keeping the position among its siblings."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def mark_initialized(module):
    """Says of a module that it has its values, as all modules do that a native model was built with. `init_weights()`
    and `post_init()`, of the model and of any other that it is put into, give first values to every other module."""
    module._is_hf_initialized = True


def collapsible_activations(model) -> dict[str, CollapsibleActivation]:
    """Qualified name -> activation, for every patched block; a shared block once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CollapsibleActivation)}


def refuse_adapted_alphas(model):
    """Raises a ValueError if peft's `modules_to_save` holds activations with alphas: two copies of each."""
    wrapped = [name for name in collapsible_activations(model) if ".modules_to_save." in name]
    if wrapped:
        raise ValueError(
            f"The alpha of `{wrapped[0]}` belongs to an adapter that is not merged. Call "
            "`model = model.merge_and_unload()` first."
        )


def layer_collapse_config_of(model) -> LayerCollapseConfig | None:
    """The [`LayerCollapseConfig`] that a patched or collapsed transformers model carries, else `None`."""
    if not isinstance(model, PreTrainedModel):
        return None
    stored = model.config.__dict__.get("layer_collapse")
    return LayerCollapseConfig.from_dict(stored["options"]) if stored and stored.get("options") else None


def refresh_layer_collapse(inner, config=None, holders=(), replaced=()):
    """Writes what the modules now are into the model's config in place, and gives it the classes that belong to that.

    A part that is a patched or collapsed model of its own becomes a part of this one: its table is taken over.

    Args:
        config ([`LayerCollapseConfig`], *optional*): Options to record. Default: those that are there.
        replaced (`Sequence[tuple[str, dict]]`): Qualified names and specs of modules that a collapse replaced.
    """
    if not isinstance(inner, PreTrainedModel):
        return
    stored = inner.config.__dict__.get("layer_collapse") or {}
    options = stored.get("options", {})
    prefix = base_model_prefix_of(inner)
    table = {path: spec for path, spec in stored.get("modules", {}).items() if spec["type"] != "activation"}
    from_parts = []
    for name, part in inner.named_modules():
        if part is not inner and isinstance(part, LayerCollapseModelMixin):
            options = options or part.config.layer_collapse.get("options", {})
            from_parts += [(f"{name}.{path}", spec) for path, spec in replaced_modules(part)]
    if config is not None:
        options = config.to_dict()

    def add(name, spec):
        if name.startswith(prefix):
            table[name[len(prefix) :]] = spec
        else:
            table[name] = {**spec, "scope": "model"}

    for name, spec in from_parts:
        add(name, {key: value for key, value in spec.items() if key != "scope"})
    for name, activation in collapsible_activations(inner).items():
        add(name, activation.spec)
    for name, spec in replaced:
        add(name, spec)
    layer_collapse = {"version": FORMAT_VERSION, "options": options, "modules": table} if table else None
    set_layer_collapse(inner, layer_collapse, holders)


def replaced_modules(model):
    """`[(qualified name, spec)]` of what a collapse replaced in a model, as its own table says."""
    table = model.config.layer_collapse["modules"]
    table = {path: spec for path, spec in table.items() if spec["type"] != "activation"}
    return [(name, spec) for _, name, _, spec in resolve_table(model, table)] if table else []


def alpha_parameters(model) -> list[nn.Parameter]:
    """The alphas of a patched model, each once, in forward order."""
    seen: dict[int, nn.Parameter] = {}
    for activation in collapsible_activations(model).values():
        seen.setdefault(id(activation.alpha), activation.alpha)
    return list(seen.values())


def penalty(alphas) -> torch.Tensor:
    """`sum_b (1 - alpha_b)^2` (LayerCollapse, arXiv 2311.17943), over blocks; with one alpha per neuron, the mean of a
    block's neurons. A float32 scalar; 0 for no alphas.

    Raises:
        TypeError: An alpha is sharded over processes.
    """
    for alpha in alphas:
        refuse_sharded(alpha)
    terms = [(1 - alpha).square().mean() for alpha in alphas]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def refuse_sharded(alpha):
    """Raises `TypeError` if an alpha is a DTensor: what one process holds of it is not its value."""
    # By name: torch.distributed is not part of every build of torch.
    if type(alpha.data).__name__ == "DTensor":
        raise TypeError(
            "An alpha is sharded over processes. With `alphas = alpha_parameters(model)` from before, leave them out: "
            "`fully_shard(module, ignored_params=set(alphas))` for every module, then `replicate_alphas(alphas)`."
        )
