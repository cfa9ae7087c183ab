"""Every class that Auto classes have for the families of the test models: saved, loaded, saved and loaded again."""

import pytest
import torch
from transformers import AutoBackbone, BlipConfig, BlipModel, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from hf_layercollapse import apply_layer_collapse, collapse_model
from hf_layercollapse.modeling_layercollapse import LayerCollapseModelMixin, native_models_of

from .models import CASES, randomize
from .test_families import llama_config, tiny_bart, tiny_llava, tiny_t5, tiny_towers, tiny_whisper
from .test_narrow import CASES as NARROW_CASES
from .test_native_classes import tiny_swin, tiny_yolos
from .test_patching import alphas


CONFIGS = {case.name: case.config for case in (*CASES, *NARROW_CASES)}
CONFIGS |= {
    "bart": lambda: tiny_bart().config,
    "blip": lambda: tiny_towers(BlipConfig, BlipModel)().config,
    "clip": lambda: tiny_towers(CLIPConfig, CLIPModel)().config,
    "llama": llama_config,
    "llava": lambda: tiny_llava().config,
    "siglip": lambda: tiny_towers(SiglipConfig, SiglipModel)().config,
    "swin": lambda: tiny_swin().config,
    "t5": lambda: tiny_t5().config,
    "whisper": lambda: tiny_whisper().config,
    "yolos": lambda: tiny_yolos().config,
}


def heads_of(config):
    """Native model class -> an Auto class that gives it for this config."""
    found = {}
    for auto_class, models, _ in native_models_of(type(config)):
        # Several classes for one config are told apart by `architectures`.
        found |= {model: auto_class for model in models if model.config_class is type(config)}
    return found


def half_collapsed(model):
    """Every other block collapsed, the others patched."""
    apply_layer_collapse(model)
    with torch.no_grad():
        for index, alpha in enumerate(alphas(model)):
            alpha.fill_(0.375 if index % 2 else 1.0)
    collapse_model(model)
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_saved_and_loaded_twice(family, tmp_path):
    heads = heads_of(CONFIGS[family]())
    assert len(heads) > 1
    for native, auto_class in heads.items():
        config = CONFIGS[family]()
        if native.__name__.endswith("QuestionAnswering"):  # DistilBERT's takes nothing else
            config.num_labels = 2
        model = half_collapsed(randomize(native(config)))
        # By the look of its own bases, as transformers' model tests ask.
        looks = ["GenerationMixin" in str(each.__bases__) for each in (type(model), native)]
        assert looks[0] is looks[1] and type(model).can_generate() is native.can_generate(), native.__name__
        expected, table = model.state_dict(), model.config.layer_collapse
        assert len({spec["type"] == "activation" for spec in table["modules"].values()}) == 2
        for round in range(2):
            folder = tmp_path / native.__name__ / str(round)
            model.save_pretrained(folder)
            # AutoBackbone asks the Hub for a repository of that name, of a dense model too.
            loader = type(model) if auto_class is AutoBackbone else auto_class
            model = loader.from_pretrained(folder)
            assert isinstance(model, LayerCollapseModelMixin) and isinstance(model, native)
            assert model.config.layer_collapse == table
            state = model.state_dict()
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], expected[key]) for key in expected), native.__name__
