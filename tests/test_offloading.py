"""Models that accelerate spreads over devices: weights on the CPU or on a disk that come and go with every call."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from hf_layercollapse import (
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    linearity_map,
    plan_collapse,
)
from hf_layercollapse.block_sizes import possible_sizes
from hf_layercollapse.blocks import bind_blocks
from hf_layercollapse.calibration import Calibration
from hf_layercollapse.models import device_of
from hf_layercollapse.patching import collapsible_activations
from hf_layercollapse.plan_search import PlanOptions, Search
from hf_layercollapse.shape_times import _of_one_shape
from hf_layercollapse.upstream import is_hooked

from .models import BY_NAME
from .test_families import batch_norm_net, set_alphas, vgg_classifier
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


def present_in(model):
    """A list that gets, of each forward of the model from now on, the parameters that are not brought only for the
    calls of their modules."""
    seen = []

    def note(module, *_):
        seen.append([name for name, parameter in module.named_parameters() if not parameter.is_meta])

    model.register_forward_pre_hook(note)
    return seen


@pytest.mark.parametrize("config", ["narrow", "in-turn"])
def test_while_it_is_fitted_a_model_runs_as_it_will(config):
    """New weights wait, and are tried, where the old ones lie: an accelerator that had no room for these has none."""
    case = BY_NAME["bert"]
    model = cpu_offload(case.model(), torch.device("cpu"))
    seen = present_in(model)
    collapse_model(model, LayerCollapseConfig(**CONFIGS[config]), data_of(case))
    assert seen and not any(seen)


def test_what_is_measured_for_a_plan_runs_as_the_result_will():
    case = BY_NAME["bert"]
    model = cpu_offload(case.model(), torch.device("cpu"))
    seen = present_in(model)
    plan_collapse(model, data_of(case), macs=0.5)
    assert len(seen) > 2 * len(data_of(case)) and not any(seen)
    blocks, batch = bind_blocks(model), data_of(case)[0]
    options = PlanOptions({"latency": 0.5}, False, (0.0,), 1, "native", (), None, False)
    whole = {"parameters": 0, "macs": sum(block.macs for block in blocks)}
    search = Search(Calibration.on(model, model, [batch]), blocks, whole, [], None, options)
    small = {block.name: possible_sizes(block, (0.0,), 1, "native").at(0, 3) for block in blocks}
    seen.clear()
    assert search.latency_of(small, batch, copy.deepcopy(model)).keys() == {"dense", "plan"}
    assert seen and not any(seen)


def test_ctrl_c_while_new_weights_are_tried_leaves_an_offloaded_model_as_it_was():
    case = BY_NAME["bert"]
    model = cpu_offload(case.model(), torch.device("cpu"))
    inputs, modules = case.inputs(seed=99), dict(model.named_modules())
    dense = logits(model, inputs)

    def fail(module, args, output):
        if module not in modules.values() and any(module is part for part in model.modules()):
            raise KeyboardInterrupt("one that is tried")

    hook = torch.nn.modules.module.register_module_forward_hook(fail)
    with hook, pytest.raises(KeyboardInterrupt, match="one that is tried"):
        collapse_model(model, LayerCollapseConfig(**CONFIGS["narrow"]), data_of(case))
    assert dict(model.named_modules()) == modules
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model, inputs), dense)


def test_blocks_on_a_disk_are_not_timed_for_others(tmp_path):
    model, here = BY_NAME["gpt2"].model(), torch.device("cpu")
    for index, layer in enumerate(model.transformer.h):
        if index == 1:
            cpu_offload(layer, here)
        else:
            disk_offload(layer, str(tmp_path / str(index)), execution_device=here)
    assert [[block.index for block in same] for same in _of_one_shape(bind_blocks(model))] == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("build", "shape"), [(vgg_classifier, (6, 4, 4)), (batch_norm_net, (6, 16))], ids=["chain", "batch norm"]
)
def test_weights_that_are_brought_for_each_call_are_merged(build, shape):
    torch.manual_seed(0)
    expected, x = build().eval(), torch.randn(shape)
    model = cpu_offload(copy.deepcopy(expected), torch.device("cpu"))
    for one in (expected, model):
        apply_layer_collapse(one)
        set_alphas(one)
        collapse_model(one)
    assert torch.equal(model(x), expected(x)) and all(parameter.is_meta for parameter in model.parameters())


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
