"""Native classes on folders of patched and collapsed models: an error, not a model with other weights."""

import pytest
import torch
import transformers
from transformers import SwinConfig, YolosConfig

from hf_layercollapse import apply_layer_collapse, collapse_model

from .models import randomize
from .test_families import tiny_llava
from .test_patching import every_model, set_alphas
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
