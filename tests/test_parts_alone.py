"""A part of a patched or collapsed model, saved by itself."""

import copy
import json

import pytest
import torch
from transformers import AutoModel, BertForSequenceClassification, PreTrainedModel

from hf_layercollapse import (
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    remove_layer_collapse,
)

from .models import randomize
from .test_families import bert_config, tiny_bart, tiny_t5, tiny_whisper
from .test_patching import set_alphas


def in_life(model, life, inputs, blocks="all"):
    if life in ("narrow", "cut"):
        rank = {"rank": 0} if life == "cut" else {}
        collapse_model(model, LayerCollapseConfig(keep_neurons=4, blocks=blocks, **rank), calibration_data=inputs)
        return model.eval()
    apply_layer_collapse(model, LayerCollapseConfig(blocks=blocks))
    set_alphas(model, 0.375 if life == "patched" else 1.0)
    if life == "collapsed":
        collapse_model(model)
    return model.eval()


def parts_of(model):
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def inputs_of(build):
    rows = torch.randint(3, 64, (24, 2, 7))
    if build is tiny_whisper:
        return [{"input_features": torch.randn(2, 8, 16), "decoder_input_ids": row[:, :5]} for row in rows]
    return [{"input_ids": row, "decoder_input_ids": row[:, :5]} for row in rows]


@pytest.mark.parametrize("build", [tiny_t5, tiny_bart, tiny_whisper])
@pytest.mark.parametrize("name", ["encoder", "decoder"])
@pytest.mark.parametrize("life", ["patched", "collapsed", "narrow"])
def test_comes_back_through_auto_model(build, name, life, tmp_path):
    whole = in_life(build(), life, inputs_of(build))
    part = whole.get_encoder() if name == "encoder" else whole.get_decoder()
    part.save_pretrained(tmp_path / "part")
    again, info = AutoModel.from_pretrained(tmp_path / "part", output_loading_info=True)
    assert isinstance(again, type(part)) and not info["unexpected_keys"]
    for round in range(2):
        # Token embeddings are the whole's: the part alone may not save them, natively either.
        missing = {key for key in info["missing_keys"] if "embed" in key}
        assert missing == set(info["missing_keys"])
        state = again.state_dict()
        for key, value in part.state_dict().items():
            assert key in missing or torch.equal(state[key], value), key
        again.save_pretrained(tmp_path / str(round))
        again, info = AutoModel.from_pretrained(tmp_path / str(round), output_loading_info=True)
    # Nothing is left of the table where there is none.
    if life == "patched":
        loaded = remove_layer_collapse(copy.deepcopy(whole))
        assert not any("layer_collapse" in vars(module.config) for module in parts_of(loaded))
    # The whole is what it was.
    whole.save_pretrained(tmp_path / "whole")
    loaded = type(whole).from_pretrained(tmp_path / "whole")
    tables = [[vars(module.config)["layer_collapse"] for module in parts_of(model)] for model in (whole, loaded)]
    assert tables[0] == tables[1]
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in whole.state_dict().items())


@pytest.mark.parametrize("encoder, decoder", [([0, 1], [0]), ([0], [0, 1]), ([0], [1])])
@pytest.mark.parametrize("life", ["patched", "collapsed", "narrow", "cut"])
def test_encoder_and_decoder_with_unequal_tables(encoder, decoder, life, tmp_path):
    """No table tells which of them it is of where the other's stands in it too."""
    whole = tiny_bart()
    layers = [f"encoder.layers.{i}" for i in encoder] + [f"decoder.layers.{i}" for i in decoder]
    blocks = [block.name for block in find_feed_forward_blocks(whole) if block.name.endswith(tuple(layers))]
    assert len(blocks) == len(layers)
    in_life(whole, life, inputs_of(tiny_bart), blocks=blocks)
    # As a copy, and after the whole was loaded.
    whole.save_pretrained(tmp_path / "whole")
    for model in (copy.deepcopy(whole), type(whole).from_pretrained(tmp_path / "whole")):
        for name, numbers in (("encoder", encoder), ("decoder", decoder)):
            part = getattr(model.base_model, name)
            part.save_pretrained(tmp_path / name)
            table = json.loads((tmp_path / name / "config.json").read_text())["layer_collapse"]["modules"]
            assert {int(path.split(".")[1]) for path in table} == set(numbers)
            again = AutoModel.from_pretrained(tmp_path / name)
            state = again.state_dict()
            kept = {key: value for key, value in part.state_dict().items() if "embed" not in key}
            assert kept.keys() == {key for key in state if "embed" not in key}
            assert all(torch.equal(state[key], value) for key, value in kept.items())


def test_goes_on_as_a_model_of_its_own(tmp_path):
    whole = in_life(tiny_whisper(), "patched", None)
    whole.get_encoder().save_pretrained(tmp_path / "encoder")
    encoder = AutoModel.from_pretrained(tmp_path / "encoder")
    set_alphas(encoder, 1.0)
    collapse_model(encoder)
    encoder.save_pretrained(tmp_path / "collapsed")
    again = AutoModel.from_pretrained(tmp_path / "collapsed").eval()
    features = torch.randn(2, 8, 16)
    assert torch.equal(again(features)[0], encoder.eval()(features)[0])
    dense = remove_layer_collapse(AutoModel.from_pretrained(tmp_path / "encoder"))
    assert type(dense) is type(whole.get_encoder())


def test_base_models_need_nothing_of_that(tmp_path):
    whole = in_life(randomize(BertForSequenceClassification(bert_config())), "collapsed", None)
    whole.bert.save_pretrained(tmp_path)
    assert "part" not in json.loads((tmp_path / "config.json").read_text())["layer_collapse"]
    again = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in whole.bert.state_dict().items())


def test_a_dense_part_of_a_collapsed_whole_is_refused(tmp_path):
    whole = tiny_whisper()
    apply_layer_collapse(whole, LayerCollapseConfig(blocks="model.encoder"))
    set_alphas(whole, 1.0)
    collapse_model(whole)
    with pytest.raises(ValueError, match="WhisperDecoder is a part of a patched or collapsed model, and nothing"):
        whole.get_decoder().save_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["os.system", "Conv1D", "WhisperEncoderLayer", "NoSuchModel", 3, ""])
def test_a_hostile_part(part, tmp_path):
    in_life(tiny_whisper(), "patched", None).get_encoder().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["layer_collapse"]["part"] = part
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="`layer_collapse.part`"):
        AutoModel.from_pretrained(tmp_path)
