"""Plans with one hidden width: the native architecture, in a process that has never seen the package."""

import contextlib
import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CLIPConfig,
    CLIPModel,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from hf_layercollapse import (
    LayerCollapseConfig,
    collapse_model,
    export_stock,
    find_feed_forward_blocks,
    moments,
    plan_collapse,
)
from hf_layercollapse.plans import CollapsePlan
from hf_layercollapse.rows import hold_back

from .models import BY_NAME, divergence, image_inputs, randomize, text_inputs
from .test_native import ROWS, Mlp, Net
from .test_patching import logits
from .test_stock import MODELS, decoder


ALL = {
    **{name: MODELS[name] for name in ("bert", "vit", "gpt2", "t5", "phi3", "bart", "dinov2")},
    "llama": (lambda: decoder(LlamaConfig), text_inputs),
    "qwen3": (lambda: decoder(Qwen3Config, head_dim=8), text_inputs),
    "mistral": (lambda: decoder(MistralConfig, sliding_window=4), text_inputs),
    "gemma": (lambda: decoder(GemmaConfig, head_dim=4), text_inputs),
}
# Families with another number than the plain one: of a config field, or of fields.
STEP = {"dinov2": 16}

WITHOUT_PLUGIN = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
for name in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{name}"
    (architecture,) = json.load(open(f"{folder}/config.json"))["architectures"]
    model = getattr(transformers, architecture).from_pretrained(folder).eval()
    with torch.no_grad():
        save_file({"logits": model(**load_file(f"{folder}.inputs")).logits.contiguous()}, f"{folder}.logits")
assert not [module for module in sys.modules if module.startswith("hf_layercollapse")]
"""


def planned(name, **options):
    make, inputs = {**MODELS, **ALL}[name]
    model, data = make(), [inputs(seed=seed) for seed in range(24)]
    plan = plan_collapse(model, data, **{"parameters": 0.8, "uniform_width": True, "multiple_of": 4, **options})
    collapse_model(model, plan=plan, calibration_data=data)
    return model.eval(), plan, inputs(seed=77)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Name -> (collapsed model, plan, inputs, report, logits in a process without the package)."""
    folder, found = tmp_path_factory.mktemp("stock"), {}
    for name in ALL:
        model, plan, inputs = planned(name)
        native, report = export_stock(model)
        native.save_pretrained(folder / name)
        save_file(inputs, folder / f"{name}.inputs")
        found[name] = model, plan, inputs, report
    subprocess.run([sys.executable, "-c", WITHOUT_PLUGIN, folder, *ALL], check=True, capture_output=True)
    return folder, {name: (*row, load_file(folder / f"{name}.logits")["logits"]) for name, row in found.items()}


@pytest.mark.parametrize("name", list(ALL))
def test_a_uniform_plan_is_the_native_architecture(name, exported):
    folder, found = exported
    model, plan, inputs, report, actual = found[name]
    # Fewer neurons, and nothing else: no padding, no bias.
    widths = {new for _, new in report.fields.values()}
    assert report.parameters_stock == report.parameters_collapsed == plan.point.parameters
    assert "mlp_bias" not in report.fields and len(report.fields) == (2 if name == "bart" else 1)
    assert {(block.hidden_features, block.state) for block in find_feed_forward_blocks(model)} == {
        (width * STEP.get(name, 1), "collapsed") for width in widths
    }
    assert all(width * STEP.get(name, 1) % 4 == 0 for width in widths)
    assert plan.point.parameters <= 0.8 * plan.curve[0].parameters
    config = json.loads((folder / name / "config.json").read_text())
    assert "layer_collapse" not in config and config["model_type"] == name
    torch.testing.assert_close(actual, logits(model, inputs), rtol=1e-5, atol=3e-6)


def test_blocks_of_more_features_than_are_spanned_exactly(monkeypatch):
    """Then the inputs are looked at alone, and of neurons alone there are none."""
    monkeypatch.setattr(moments, "EXACT_DIMENSIONS", 8)
    assert planned("bert")[1].point.choices


def test_the_largest_width_within_the_budget():
    for budget in ({"parameters": 0.8}, {"macs": 0.5}):
        ((name, share),) = budget.items()
        sizes = {}
        for step in (1, 4, 8):
            plan = planned("llama", parameters=None, multiple_of=step, **budget)[1] if name == "macs" else None
            plan = plan or planned("llama", multiple_of=step)[1]
            limit, (width,) = share * getattr(plan.curve[0], name), {count for _, count in plan.point.choices.values()}
            per_neuron = 2 * 3 * 16  # two blocks
            assert getattr(plan.point, name) <= limit < getattr(plan.point, name) + step * per_neuron
            assert width % step == 0 and len(plan.curve) == 2
            sizes[step] = width
        assert sizes[1] >= sizes[4] >= sizes[8]


def test_other_budgets_measure_a_curve(tmp_path):
    make, inputs = ALL["llama"]
    model, data = make(), [inputs(seed=seed) for seed in range(24)]
    before = logits(model, inputs(seed=77))
    options = {"uniform_width": True, "multiple_of": 8, "levels": (0.9, 0.5, 0.2)}
    plan = plan_collapse(model, data, max_drop=100.0, **options)
    widths = [{count for _, count in point.choices.values()} for point in plan.curve]
    assert widths == [set(), {40}, {24}, {8}] and plan.point is plan.curve[-1]
    assert plan_collapse(model, data, max_drop=0.0, **options).point.score <= plan.curve[0].score
    # Whatever this machine says of a toy: a width that is fast enough, or a refusal that names what was measured.
    with contextlib.suppress(ValueError):
        assert plan_collapse(model, data, latency=0.97, **options).latency <= 0.97
    assert torch.equal(logits(model, inputs(seed=77)), before)
    # Another point of the same curve, from a file.
    whole = plan_collapse(model, data, parameters=0.9, whole_curve=True, **options)
    whole.save(tmp_path / "plan.json")
    other = CollapsePlan.load(tmp_path / "plan.json").at(macs=0.5)
    assert {count for _, count in other.point.choices.values()} == {24}
    fitting, held_back = hold_back(data)
    dense = copy.deepcopy(model)
    collapse_model(model, plan=other, calibration_data=fitting)
    assert divergence(model, dense, held_back) == pytest.approx(other.point.score, rel=1e-3)


def test_two_towers_get_the_same_share_each():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}
    text = {**sizes, "intermediate_size": 40, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = {**sizes, "intermediate_size": 64, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = randomize(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))).eval()
    data = [{**text_inputs(seed=seed), **image_inputs(seed=seed)} for seed in range(24)]
    plan = plan_collapse(model, data, macs=0.5, uniform_width=True, metric=lambda model: 0.0, evaluation_data=data[:1])
    assert {count for name, (_, count) in plan.point.choices.items() if "text" in name} == {20}
    assert {count for name, (_, count) in plan.point.choices.items() if "vision" in name} == {32}


def test_a_width_for_each_layer():
    """Where all have one, all get one."""
    model, plan, inputs = planned("gemma3n", parameters=0.9)
    (width,) = {count for _, count in plan.point.choices.values()}
    native, report = export_stock(model)
    assert report.fields == {"intermediate_size": ([48, 48], [width, width])}
    torch.testing.assert_close(logits(native, inputs), logits(model, inputs), rtol=1e-5, atol=3e-6)


def test_blocks_that_are_narrower_already():
    """One width for all: at most that of the narrowest."""
    make, inputs = ALL["llama"]
    model, data = make(), [inputs(seed=seed) for seed in range(24)]
    collapse_model(model, LayerCollapseConfig(blocks=[1], rank=0, keep_neurons=20), data)
    plan = plan_collapse(model, data, max_drop=100.0, uniform_width=True, levels=(1.0, 0.5))
    assert [{count for _, count in point.choices.values()} for point in plan.curve] == [set(), {20}, {10}]
    collapse_model(model, plan=plan, calibration_data=data)
    assert export_stock(model)[1].fields == {"intermediate_size": (48, 10)}


@pytest.mark.parametrize("options", [{"parameters": 0.7}, {"macs": 0.4}])
def test_multiples_in_other_plans(options):
    case = BY_NAME["bert"]
    data = [case.inputs(seed=seed) for seed in range(24)]
    plan = plan_collapse(case.model(), data, multiple_of=4, whole_curve=True, **options)
    sizes = {size for point in plan.curve for size in point.choices.values()}
    assert sizes and all(count % 4 == 0 and (rank is None or rank % 4 == 0) for rank, count in sizes)
    assert {count for _, count in sizes} - {0}


def refused(name, match, error=ValueError, **options):
    make, inputs = ALL[name] if isinstance(name, str) else name
    data = [inputs(seed=seed) for seed in range(24)]
    with pytest.raises(error, match=match):
        plan_collapse(make(), data, **{"parameters": 0.8, "uniform_width": True, **options})


def test_widths_that_cannot_be():
    refused("llama", "no chosen block has more than 48", multiple_of=64)
    refused(
        "llama",
        "cannot be met with one width.*at the smallest, 32 neurons, the least that works is",
        parameters=0.3,
        multiple_of=32,
    )
    refused("dinov2", "is a multiple of 80, as `multiple_of` and `mlp_ratio`", multiple_of=5)
    refused("llama", "`multiple_of` must be", multiple_of=0)
    refused("llama", "leave `rank_shares` out", rank_shares=(0.5, 0.0))
    refused("llama", "leaves out.*model.layers.0.mlp", blocks="last:1")
    refused("bart", "leaves out.*encoder.layers.0", blocks=["model.encoder.layers.1"])


def bloom():
    config = BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
    return randomize(AutoModelForCausalLM.from_config(config)).eval()


def test_a_config_without_a_single_width():
    refused((bloom, text_inputs), "No field of BloomConfig sets the hidden width")
    refused((lambda: Net(Mlp(torch.nn.GELU())), lambda seed: ROWS[0]), "is for transformers models", TypeError)


def test_a_part_of_an_encoder_decoder():
    """Its own field, and nothing of the other part."""
    model, plan, inputs = planned("bart", blocks="decoder", parameters=0.9)
    assert all("decoder" in name for name in plan.point.choices)
    native, report = export_stock(model)
    assert list(report.fields) == ["decoder_ffn_dim"] and report.parameters_stock == report.parameters_collapsed
    torch.testing.assert_close(logits(native, inputs), logits(model, inputs), rtol=1e-5, atol=3e-6)
