"""Patched and collapsed models in what serves them: torch.compile, torch.export, pipelines, static caches, torchao."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TorchAoConfig,
    pipeline,
)

from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, collapse_model, find_feed_forward_blocks
from hf_layercollapse.patching import alpha_parameters
from hf_layercollapse.upstream import TRANSFORMERS

from .models import BY_NAME, VOCABULARY, needs_exporters, text_inputs
from .test_exporting import forward, in_state, inputs_of, masked
from .words import word_tokenizer


STATES = ["patched", "collapsed", "narrow"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="Inductor compiles with gcc, which is not installed")
@pytest.mark.parametrize(
    ("name", "state"),
    [("bert", "patched"), ("llama", "narrow"), ("llama", "neurons")],
)
def test_inductor(name, state):
    """The whole graph, compiled, for sequences of any length."""
    torch._dynamo.reset()
    model = in_state(name, state)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for length in (7, 9):
        inputs = inputs_of(name, 2, length)
        torch.testing.assert_close(forward(compiled, inputs), forward(model, inputs), rtol=1e-4, atol=5e-6)


@needs_exporters
@pytest.mark.parametrize("state", STATES)
def test_torch_export(state, tmp_path):
    from transformers.exporters import DynamoConfig, DynamoExporter, ExportedModel

    model = in_state("bert", state)
    vary = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {"input_ids": vary, "attention_mask": vary}
    exported = DynamoExporter().export(model, masked(2, 7), DynamoConfig(dynamic_shapes=shapes))
    exported.save_pretrained(tmp_path)
    # From 5.24 on its pickles have to be trusted.
    loaded = ExportedModel.from_pretrained(tmp_path, **{"trust_remote_code": True} if TRANSFORMERS >= (5, 24) else {})
    for batch, length in ((1, 3), (5, 14)):
        inputs = masked(batch, length)
        torch.testing.assert_close(loaded(**inputs).logits, forward(model, inputs), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("state", STATES)
def test_pipeline_with_batches(state, tmp_path):
    in_state("bert", state).save_pretrained(tmp_path)
    word_tokenizer(["[PAD]", "[UNK]", *(f"w{i}" for i in range(VOCABULARY - 2))]).save_pretrained(tmp_path)
    texts = [" ".join(f"w{(7 * row + i) % 60}" for i in range(2 + row)) for row in range(6)]
    classify = pipeline("text-classification", model=str(tmp_path), top_k=None)
    one_by_one, together = (
        [sorted(r, key=lambda x: x["label"]) for r in classify(texts, batch_size=n)] for n in (1, 4)
    )
    for single, batched in zip(one_by_one, together, strict=True):
        assert [x["score"] for x in single] == pytest.approx([x["score"] for x in batched], abs=1e-6)
    assert len({round(row[0]["score"], 6) for row in one_by_one}) > 1


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_with_a_static_cache(name, state):
    model = in_state(name, state)
    prompt = text_inputs(3, 6, seed=4)
    prompt["attention_mask"] = torch.tensor([[1] * 6, [0, 0] + [1] * 4, [0] + [1] * 5])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, **options, cache_implementation="static"), expected)
    without = model.generate(**prompt, **options, use_cache=False)
    assert torch.equal(without, expected)


# Quantization


def quantization(name):
    torchao = pytest.importorskip("torchao.quantization", reason="the extra torchao is not installed")
    return {
        "dynamic int8": torchao.Int8DynamicActivationInt8WeightConfig,
        "weight-only int8": torchao.Int8WeightOnlyConfig,
    }[name]()


@pytest.mark.parametrize("kind", ["dynamic int8", "weight-only int8"])
@pytest.mark.parametrize("state", STATES)
def test_quantized_loading_saving_and_loading(kind, state, tmp_path):
    """The table reshapes the model, then the quantizer takes its linears; saved quantized, it loads quantized."""
    config = quantization(kind)
    from torchao.utils import TorchAOBaseTensor

    model = in_state("bert", state)
    model.save_pretrained(tmp_path / "float")
    quantized = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "float", quantization_config=TorchAoConfig(config)
    ).eval()
    for layer in range(3):
        for linear in ("intermediate.dense", "output.dense"):
            path = f"bert.encoder.layer.{layer}.{linear}"
            native = model.get_submodule(path)
            if isinstance(native, torch.nn.Linear):
                weight = quantized.get_submodule(path).weight
                assert isinstance(weight, TorchAOBaseTensor), path
                assert weight.shape == native.weight.shape
                torch.testing.assert_close(weight.dequantize(), native.weight, rtol=0, atol=0.02)
    inputs = masked(3, 8)
    expected, logits = forward(model, inputs), forward(quantized, inputs)
    assert 0 < (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert all(alpha.dtype == torch.float32 for alpha in alpha_parameters(quantized))
    states = [block.state for block in find_feed_forward_blocks(model)]
    assert [block.state for block in find_feed_forward_blocks(quantized)] == states

    quantized.save_pretrained(tmp_path / "quantized")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "quantized").eval()
    assert torch.equal(forward(again, inputs), logits)
    sizes = [
        sum(value.nbytes for value in load_file(tmp_path / folder / "model.safetensors").values())
        for folder in ("float", "quantized")
    ]
    assert sizes[1] < sizes[0]


def test_quantized_decoder(tmp_path):
    config = quantization("weight-only int8")
    model = in_state("llama", "narrow")
    model.save_pretrained(tmp_path / "float")
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=TorchAoConfig(config)
    ).eval()
    inputs = masked(2, 8)
    assert 0 < (forward(quantized, inputs) - forward(model, inputs)).abs().max() < 0.2
    quantized.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").eval()
    assert torch.equal(forward(again, inputs), forward(quantized, inputs))


def test_quantized_models_are_not_patched_or_collapsed(tmp_path):
    config = quantization("weight-only int8")
    BY_NAME["bert"].model().save_pretrained(tmp_path)
    quantized = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=TorchAoConfig(config))
    with pytest.raises(ValueError, match="quantize the saved model"):
        collapse_model(quantized, LayerCollapseConfig(blocks=[0]), calibration_data=[masked(2, 8)])
    with pytest.raises(ValueError, match="quantize the saved model"):
        apply_layer_collapse(quantized, LayerCollapseConfig(blocks=[0]))
