"""What is told from the functions of transformers that are running: an error where they are written in another way."""

import copy
import types

import pytest
from transformers import PreTrainedConfig, PreTrainedModel

from hf_layercollapse import apply_layer_collapse

from .models import BY_NAME
from .test_families import tiny_llava, tiny_t5


def patched_inside():
    """A native model with a patched one in it, which its config does not tell of."""
    model = tiny_llava()
    apply_layer_collapse(model.base_model.language_model)
    return model


def with_arguments_unnamed(function):
    """The function in the way that a decorator would have it."""

    def save_pretrained(*args, **kwargs):
        return function(*args, **kwargs)

    return save_pretrained


def renamed(function, **names):
    """The same function with other names for its variables."""
    code = function.__code__
    varnames = tuple(names.get(name, name) for name in code.co_varnames)
    cellvars = tuple(names.get(name, name) for name in code.co_cellvars)
    code = code.replace(co_varnames=varnames, co_cellvars=cellvars)
    other = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    other.__kwdefaults__ = function.__kwdefaults__
    return other


def test_a_save_that_does_not_name_its_model(tmp_path, monkeypatch):
    model = patched_inside()
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", with_arguments_unnamed(PreTrainedModel.save_pretrained))
    with pytest.raises(RuntimeError, match="`save_pretrained` of transformers .* has no `self` that is a PreTrainedM"):
        model.save_pretrained(tmp_path)


def test_a_save_that_names_its_part_otherwise(tmp_path, monkeypatch):
    model = apply_layer_collapse(tiny_t5())
    other = renamed(PreTrainedModel.save_pretrained, model_to_save="saved")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", other)
    with pytest.raises(RuntimeError, match="has no `model_to_save` that is a PreTrainedModel"):
        model.get_encoder().save_pretrained(tmp_path)


def test_a_config_that_does_not_name_itself(monkeypatch):
    config = copy.deepcopy(apply_layer_collapse(BY_NAME["bert"].model()).config)
    assert config.to_diff_dict()["model_type"] == "bert"
    monkeypatch.setattr(PreTrainedConfig, "to_diff_dict", renamed(PreTrainedConfig.to_diff_dict, self="this"))
    with pytest.raises(RuntimeError, match="`to_diff_dict` of transformers .* has no `self` that is a PreTrainedConf"):
        config.to_diff_dict()
