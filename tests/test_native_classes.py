"""Native classes on folders of patched and collapsed models: an error, not a model with other weights."""

import pytest
import torch
import transformers
from transformers import SwinConfig, YolosConfig

from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, collapse_model
from hf_layercollapse.patching import refresh_layer_collapse

from .models import BY_NAME, randomize
from .test_built_classes import given
from .test_families import tiny_llava
from .test_patching import every_model, logits, set_alphas
from .test_saving_loading import in_life


def tiny_swin():
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4)
    return randomize(transformers.SwinForImageClassification(config)).eval()


def tiny_yolos():
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        image_size=[16, 16],
        patch_size=8,
        num_detection_tokens=2,
    )
    return randomize(transformers.YolosForObjectDetection(config)).eval()


@every_model
@pytest.mark.parametrize("life", ["patched", "collapsed"])
def test_a_native_head_refuses_the_folder(case, life, tmp_path):
    model = in_life(case, life)
    model.save_pretrained(tmp_path)
    native = getattr(transformers, model.config.architectures[0])
    with pytest.raises(RuntimeError, match="holds a patched or collapsed model.*Auto class"):
        native.from_pretrained(tmp_path)
    assert isinstance(case.auto_class.from_pretrained(tmp_path), native)


@pytest.mark.parametrize("build", [tiny_swin, tiny_yolos, tiny_llava])
@pytest.mark.parametrize("life", ["patched", "collapsed"])
def test_families_whose_keys_are_renamed_by_their_model_type(build, life, tmp_path):
    model = apply_layer_collapse(build())
    if life == "collapsed":
        set_alphas(model, 1.0)
        collapse_model(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="holds a patched or collapsed model"):
        type(model).native_class.from_pretrained(tmp_path)
    # The class of ours, which has the family's own conversions.
    again = type(model).from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("case", [BY_NAME["bert"], BY_NAME["gpt2"]], ids=lambda case: case.name)
@pytest.mark.parametrize("life", ["patched", "neurons", "collapsed", "narrow", "width cut"])
def test_a_dense_model_with_the_config_of_another(case, life, tmp_path):
    other = given(case.model(), life, [case.inputs(seed=seed) for seed in range(12)])
    # Nothing tells a native class that it is to make anything else.
    make = type(other).native_class
    model = make(other.config).eval()
    for part in (model, model.base_model):
        with pytest.raises(ValueError, match="is dense, and its config describes a patched or collapsed model"):
            part.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused" / "config.json").exists()
    inputs = case.inputs(seed=77)
    before = logits(model, inputs)
    refresh_layer_collapse(model)
    assert type(model.config) is type(case.config())
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(case.auto_class.from_pretrained(tmp_path / "dense").eval(), inputs), before)
    assert type(other.config) is type(other).config_class


@pytest.mark.parametrize("life", ["patched", "collapsed"])
def test_what_becomes_of_it_is_what_was_asked_for(life, tmp_path):
    case, asked = BY_NAME["bert"], LayerCollapseConfig(blocks=[0])
    other = in_life(case, "collapsed")
    model = type(other).native_class(other.config)
    if life == "patched":
        apply_layer_collapse(model, asked)
    else:
        collapse_model(model, asked, [case.inputs(seed=seed) for seed in range(12)])
    assert {path.split(".")[2] for path in model.config.layer_collapse["modules"]} == {"0"}
    model.save_pretrained(tmp_path)
    again = case.auto_class.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
