"""Models that accelerate spreads over devices: weights on the CPU or on a disk that come and go with every call."""

import pytest
import torch
from accelerate import disk_offload, dispatch_model, init_empty_weights
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from hf_layercollapse import (
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    linearity_map,
    plan_collapse,
)
from hf_layercollapse.models import device_of
from hf_layercollapse.patching import collapsible_activations
from hf_layercollapse.upstream import is_hooked

from .models import BY_NAME
from .test_patching import logits


MAPS = {
    "hooks": lambda case: {"": "cpu"},
    "embeddings on disk": lambda case: {**dict.fromkeys(_parts(case), "cpu"), _parts(case)[0]: "disk"},
    "blocks on disk": lambda case: dict.fromkeys(_parts(case), "disk"),
    "all on disk": None,
}
CONFIGS = {
    "whole": {},
    "narrow": {"rank": 0, "keep_neurons": 7},
    "both": {"rank": 2, "keep_neurons": 5},
    "in-turn": {"rank": None, "keep_neurons": 3, "sequential": True},
    "variance": {"keep_neurons": 3, "neuron_choice": "variance"},
}


def _parts(case):
    base = case.model().base_model_prefix
    model = case.model()
    inside = [f"{base}.{name}" for name, _ in getattr(model, base).named_children()]
    return inside + [name for name, _ in model.named_children() if name != base]


def spread(case, device_map, folder):
    model = case.model()
    if device_map == "all on disk":
        return disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    given = MAPS[device_map](case)
    return dispatch_model(model, given, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def data_of(case):
    return [case.inputs(seed=seed) for seed in range(24)]


RUNS = [("bert", device_map, config) for device_map in MAPS for config in CONFIGS]
RUNS += [("gpt2", "blocks on disk", config) for config in ("whole", "narrow", "both")]


@pytest.mark.parametrize(("name", "device_map", "config"), RUNS)
def test_a_model_collapses_where_its_blocks_are(name, device_map, config, tmp_path):
    case = BY_NAME[name]
    options = LayerCollapseConfig(**CONFIGS[config])
    expected, model = case.model(), spread(case, device_map, tmp_path)
    inputs = case.inputs(seed=99)
    dense = logits(expected, inputs)
    torch.testing.assert_close(logits(model, inputs), dense)
    offloaded = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    report = collapse_model(expected, options, data_of(case))
    found = collapse_model(model, options, data_of(case))
    assert (found.blocks, found.data) == (report.blocks, report.data) and device_of(model) == torch.device("cpu")
    torch.testing.assert_close(logits(model, inputs), logits(expected, inputs), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits(model, inputs), dense)
    # What was kept elsewhere still is.
    now = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert bool(now) == bool(offloaded)
    if device_map == "all on disk":
        assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("device_map", ["embeddings on disk", "all on disk"])
def test_a_plan_of_an_offloaded_model(device_map, tmp_path):
    case = BY_NAME["bert"]
    model = spread(case, device_map, tmp_path)
    lines = linearity_map(model, data_of(case))
    expected = linearity_map(case.model(), data_of(case))
    assert [block.r2 for block in lines.blocks] == pytest.approx([block.r2 for block in expected.blocks], rel=1e-6)
    assert {block.state for block in find_feed_forward_blocks(model)} == {"dense"}


def test_a_patched_model_that_is_offloaded(tmp_path):
    case = BY_NAME["bert"]
    expected = case.model()
    apply_layer_collapse(expected, LayerCollapseConfig(linear_target="affine"), data_of(case))
    model = spread(case, "all on disk", tmp_path)
    apply_layer_collapse(model, LayerCollapseConfig(linear_target="affine"), data_of(case))
    for one in (expected, model):
        for activation in collapsible_activations(one).values():
            with torch.no_grad():
                activation.alpha.fill_(1.0)
    inputs = case.inputs(seed=99)
    torch.testing.assert_close(logits(model, inputs), logits(expected, inputs), rtol=1e-6, atol=1e-6)
    collapse_model(model)
    collapse_model(expected)
    torch.testing.assert_close(logits(model, inputs), logits(expected, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", ["whole", "narrow", "both"])
def test_a_model_loaded_with_a_device_map_is_collapsed_and_saved(config, tmp_path):
    case, options = BY_NAME["gpt2"], LayerCollapseConfig(**CONFIGS[config])
    case.model().save_pretrained(tmp_path / "dense")
    device_map = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    device_map |= {f"transformer.h.{index}": "disk" if index else "cpu" for index in range(3)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    expected = case.model()
    for one in (model, expected):
        collapse_model(one, options, data_of(case))
    inputs = case.inputs(seed=99)
    torch.testing.assert_close(logits(model, inputs), logits(expected, inputs), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=1e-6, atol=1e-6)
    assert not any(is_hooked(module) for module in loaded.modules())


def test_a_model_without_weights_is_refused():
    with init_empty_weights():
        model = BertForSequenceClassification(BY_NAME["bert"].config())
    with pytest.raises(ValueError, match="on the meta device: there are no weights .* offloaded by `device_map`"):
        collapse_model(model, LayerCollapseConfig(), data_of(BY_NAME["bert"]))
    with pytest.raises(ValueError, match="on the meta device"):
        plan_collapse(model, data_of(BY_NAME["bert"]), macs=0.5)
