"""Gives a live model the classes of what it is: those that save and load a table, or its native ones."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import configuration_auto

from .modeling_layercollapse import (
    LayerCollapseConfigMixin,
    LayerCollapseModelMixin,
    config_class_for,
    config_parts,
    has_own_adapters,
    is_native,
    model_class_for,
    native_class_of,
    native_models_of,
    prune_parallel_plans,
    tell_places,
    validate_layer_collapse,
)
from .upstream import auto_class_of_code, limit_of_registration


def model_classes_of_own(native_model: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, str]:
    """`{name of an Auto class: name of a model class}`: what Auto classes have to give for this model, as far as that
    is code of the user's own; empty for a model of transformers.
    """
    if is_native(native_model):
        return {}
    native_config = native_class_of(config)
    known = {auto_class.__name__: models for auto_class, models, _ in native_models_of(native_config)}
    classes = {name: native_model.__name__ for name, models in known.items() if native_model in models}
    # `save_pretrained` puts the code of what was loaded with `trust_remote_code=True` into the folder. That code may
    # have classes for other tasks too.
    loaded_by = auto_class_of_code(native_model)
    if native_model.is_remote_code() and native_model.__module__ != "__main__" and loaded_by in known:
        auto_map = config.__dict__.get("auto_map") or {}
        classes |= {name: auto_map[name].rpartition(".")[2] for name in known if name in auto_map}
        classes[loaded_by] = native_model.__name__
    return classes


def refuse_lost_code(model: PreTrainedModel) -> None:
    """Raises if `from_pretrained` would make another model of what this one saves: its class or that of its config is
    the user's own, and no Auto class knows it.

    Raises:
        ValueError: The message names the calls that register the classes.
    """
    native_model, native_config = native_class_of(model), native_class_of(model.config)
    model_type, known, calls = native_config.model_type, configuration_auto.CONFIG_MAPPING, []
    if not is_native(native_config):
        if model_type not in known or known[model_type] is not native_config:
            calls.append(f"AutoConfig.register({model_type!r}, {native_config.__name__})")
    if not is_native(native_model) and not model_classes_of_own(native_model, model.config):
        calls.append(f"AutoModel.register({native_config.__name__}, {native_model.__name__}, exist_ok=True)")
    if calls:
        raise ValueError(
            f"{native_model.__name__} with {native_config.__name__} is code of your own that no Auto class knows: "
            "what is saved would be loaded as another model. Call "
            f"{' and '.join(f'`{call}`' for call in calls)} first (AutoModel, or the Auto class of its task), here "
            "and where the model is loaded. A config class of your own needs a `model_type` of its own for that."
            + limit_of_registration(native_config)
        )


def set_layer_collapse(
    model: PreTrainedModel, layer_collapse: dict[str, Any] | None, wrappers: Iterable[nn.Module] = ()
) -> PreTrainedModel:
    """Gives a live model its patched or collapsed classes, or, with `None`, the native ones back, in place.

    The config is copied first: another model made from the same config object must not change.

    Args:
        layer_collapse (`dict`, *optional*): The table with its version and options, as in config.json.
        wrappers (iterable of `nn.Module`): Further modules (a PeftModel around the model) whose `config` is the same
            object.

    Raises:
        ValueError: `layer_collapse` is not a table of this format.
    """
    native_model, native_config = native_class_of(model), native_class_of(model.config)
    copies: dict[int, Any] = {}  # id of a config and of each part of it -> its copy
    configs = [copy.deepcopy(model.config, copies)]
    for _, part_config, _ in config_parts(configs[0]):
        make_native(part_config)
    _make_parts_native(model, copies)
    # Some parts hold a copy of the config of the whole, as T5's encoder and decoder do.
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and isinstance(part.config, native_config):
            if id(part.config) not in copies:
                configs.append(copy.deepcopy(part.config, copies))
    if layer_collapse is None:
        model.__class__ = native_model
    else:
        own = model_classes_of_own(native_model, configs[0])
        layer_collapse = validate_layer_collapse({**layer_collapse, "model_classes": own} if own else layer_collapse)
        model.__class__ = model_class_for(native_model, config_class_for(native_config))
    for config in configs:
        if layer_collapse is None:
            make_native(config)
        else:
            config.__class__ = config_class_for(native_config)
            config.layer_collapse = layer_collapse
        # An adapter would otherwise name the dense folder as its base.
        config.name_or_path = ""
    for module in (model, *wrappers):
        _give_configs(module, copies)
    if model.name_or_path:
        model.__dict__["native_name_or_path"] = model.name_or_path
    model.name_or_path = ""
    if layer_collapse is not None:
        tell_places(model)
        prune_parallel_plans(model)
    return model


def make_native(config: PreTrainedConfig) -> None:
    """Gives the config of a patched or collapsed model its native class back, in place."""
    if isinstance(config, LayerCollapseConfigMixin):
        config.__class__ = native_class_of(config)
        config.__dict__.pop("layer_collapse", None)
        # An adapter on the native model would otherwise name the folder of this one as its base.
        config.name_or_path = ""


def _make_parts_native(model: PreTrainedModel, copies: dict[int, Any]) -> None:
    """The whole carries the table of all its parts."""
    for part in model.modules():
        if part is not model and isinstance(part, LayerCollapseModelMixin):
            part.__class__ = native_class_of(part)
            part.name_or_path = ""
            if id(part.config) not in copies:
                config = copy.deepcopy(part.config, copies)
                for each in (config, *(inner for _, inner, _ in config_parts(config))):
                    make_native(each)
                config.name_or_path = ""


def _give_configs(holder: Any, copies: dict[int, Any]) -> None:
    """Replaces configs by their copies, in a model or in what is around it."""
    own = isinstance(holder, PreTrainedModel) and has_own_adapters(holder)
    if own or type(holder).__module__.startswith("peft."):
        for adapter in holder.peft_config.values():
            adapter.base_model_name_or_path = adapter.revision = None
    for module in holder.modules():
        # The towers of a composite model hold its sub-configs.
        if isinstance(module.__dict__.get("config"), PreTrainedConfig):
            module.config = copies.get(id(module.config), module.config)
