"""Exported models, compared with the PyTorch model in the runtime itself: not by the exporter, but by hand."""

import json
import os

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LayoutLMConfig, LayoutLMModel, LlamaConfig, MambaConfig

from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, collapse_model, exporting, upstream
from hf_layercollapse.exporting import decoder_step, export_model, load_exported, logits_without_plugin
from hf_layercollapse.patching import alpha_parameters
from hf_layercollapse.profiling import compare_latency
from hf_layercollapse.upstream import TRANSFORMERS

from .models import BY_NAME, image_inputs, randomize, text_inputs, tiny_wav2vec2
from .test_stock import collapsed, t5


def llama():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return randomize(AutoModelForCausalLM.from_config(config)).eval()


MODELS = {"llama": llama} | {name: case.model for name, case in BY_NAME.items()}


def masked(batch, length, seed=0):
    inputs = text_inputs(batch, length, seed)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if batch > 1:
        inputs["attention_mask"][0, -2:] = 0
    return inputs


def inputs_of(name, batch=2, length=9, seed=0):
    return image_inputs(batch, seed) if name == "vit" else masked(batch, length, seed)


def in_state(name, state):
    """A model patched, in the middle of training; collapsed; collapsed beside kept neurons; or to them alone."""
    model = MODELS[name]()
    if state == "patched":
        apply_layer_collapse(model, LayerCollapseConfig(blocks="last:2"))
        for alpha in alpha_parameters(model):
            alpha.data.fill_(0.3)
    else:
        options = {"narrow": {"rank": 5, "keep_neurons": 4}, "neurons": {"rank": 0, "keep_neurons": 9}}.get(state, {})
        data = [inputs_of(name, seed=seed) for seed in range(20)]
        collapse_model(model, LayerCollapseConfig(blocks="last:2", **options), calibration_data=data)
    return model.eval()


def needs(to):
    if TRANSFORMERS < (5, 23):
        pytest.skip("transformers before 5.23 cannot load again what it exports")
    packages = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}[to]
    for package in packages:
        pytest.importorskip(package, reason=f"the extra {to} is not installed")


def forward(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize(
    ("name", "state"),
    [("bert", "patched"), ("bert", "narrow"), ("vit", "narrow")],
)
def test_onnx(name, state, tmp_path):
    needs("onnx")
    import onnxruntime

    model = in_state(name, state)
    report = export_model(model, inputs_of(name), tmp_path / "out")
    assert report.difference < 1e-5 < report.largest and len(report.shapes) > 2
    assert report.collapsed == (0 if state == "patched" else 2) and report.blocks == 3
    assert report.bytes == sum((tmp_path / "out" / file).stat().st_size for file in ("model.onnx", "model.onnx.data"))
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    expected_names = ["pixel_values"] if name == "vit" else ["input_ids", "attention_mask"]
    assert [value.name for value in session.get_inputs()] == expected_names == report.inputs
    # Other batch sizes, other lengths, longer ones too.
    for batch, length in ((1, 3), (5, 14), (3, 1)):
        inputs = inputs_of(name, batch, length, seed=batch)
        feed = {key: value.numpy() for key, value in inputs.items()}
        (logits,) = session.run(["logits"], feed)
        np.testing.assert_allclose(logits, forward(model, inputs).numpy(), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_onnx_decodes_as_generate_does(name, tmp_path):
    """A loop of numpy and onnxruntime alone gives the tokens of `generate`, for prompts padded to one length too."""
    needs("onnx")
    import onnxruntime

    model = in_state(name, "narrow")
    report = export_model(model, masked(2, 9), tmp_path / "out")
    assert report.cache and report.difference < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    prompt = text_inputs(3, 6, seed=4)
    prompt["attention_mask"] = torch.tensor([[1] * 6, [0, 0] + [1] * 4, [0] + [1] * 5])
    expected = model.generate(**prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)

    tokens, mask = prompt["input_ids"].numpy(), prompt["attention_mask"].numpy()
    past = {
        value.name: np.zeros([3 if isinstance(size, str) and i == 0 else 0 if isinstance(size, str) else size
                              for i, size in enumerate(value.shape)], dtype=np.float32)
        for value in session.get_inputs()
        if "past_key_values" in value.name
    }  # fmt: skip
    assert all(value.shape[2] == 0 for value in past.values()) and len(past) == 2 * model.config.num_hidden_layers
    names = [value.name for value in session.get_outputs()]
    new = tokens
    for _ in range(8):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -new.shape[1] :]
        feed = {"input_ids": new, "attention_mask": mask, "position_ids": positions, **past}
        results = dict(zip(names, session.run(None, feed), strict=True))
        new = results["logits"][:, -1:].argmax(-1)
        tokens = np.concatenate([tokens, new], axis=1)
        mask = np.concatenate([mask, np.ones_like(new)], axis=1)
        # What stands before `layers` is for transformers to say.
        cache = {name.partition("layers.")[2]: value for name, value in results.items()}
        past = {name: cache[name.partition("layers.")[2]] for name in past}
    np.testing.assert_array_equal(tokens, expected.numpy())


@pytest.mark.parametrize(("name", "state"), [("bert", "narrow"), ("vit", "patched"), ("llama", "narrow")])
def test_openvino(name, state, tmp_path):
    needs("openvino")
    model = in_state(name, state)
    report = export_model(model, inputs_of(name), tmp_path / "out", to="openvino")
    assert report.difference < 1e-5
    runtime = load_exported(tmp_path / "out")
    for batch, length in ((1, 5), (5, 14)):
        inputs = inputs_of(name, batch, length, seed=batch)
        expected = forward(model, inputs)
        if name == "llama":
            inputs = decoder_step(model, inputs, past=length - 2)
            expected = forward(model, {**inputs, "past_key_values": decoder_step_cache(model, inputs, batch, length)})
        torch.testing.assert_close(runtime(**inputs).logits, expected, rtol=1e-4, atol=5e-6)


def decoder_step_cache(model, inputs, batch, length):
    """The cache again: PyTorch's grows in place."""
    return decoder_step(model, inputs_of("llama", batch, length, seed=batch), past=length - 2)["past_key_values"]


def test_stock(tmp_path):
    """Of an encoder-decoder too; and what is said where the other process does not get as far."""
    model, batch = collapsed("t5", rank=5, keep_neurons=4)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["decoder_input_ids"] = batch["decoder_input_ids"][:, :5]
    folder = tmp_path / "out"
    report = export_model(model, batch, folder, to="stock")
    assert report.difference < 1e-5 and report.stock.fields == {"d_ff": (48, 14)} and len(report.shapes) == 4
    assert "without this package" in str(report) and not report.cache
    assert report.to_dict()["stock"]["parameters_stock"] == report.stock.parameters_stock
    assert type(load_exported(folder)).__module__ == "transformers.models.t5.modeling_t5"
    with pytest.raises(ValueError, match="(?s)loads the exported model and does not run it.*must specify exactly one"):
        logits_without_plugin(folder, [{"input_ids": batch["input_ids"]}], tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="(?s)does not load the exported model.*model.safetensors"):
        logits_without_plugin(folder, [batch], tmp_path)


def test_graphs_of_encoder_decoders_are_transformers_own(tmp_path):
    needs("onnx")
    with pytest.raises(ValueError, match='is an encoder-decoder.*`to="stock"` exports it whole'):
        export_model(t5(), masked(2, 9), tmp_path / "out")


def samples_of(model, inputs):
    """Those that are compared, each run once."""
    samples = [sample.inputs for sample in exporting._samples(model, inputs, cache=False)]
    with torch.no_grad():
        assert all(model(**sample)[0].isfinite().all() for sample in samples)
    return samples


def test_whatever_is_of_tokens_is_cut_with_them():
    config = LayoutLMConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_2d_position_embeddings=8,
    )
    inputs = {**masked(2, 9), "bbox": torch.zeros(2, 9, 4, dtype=torch.long)}
    samples = samples_of(LayoutLMModel(config).eval(), inputs)
    assert {(*sample["input_ids"].shape, 4) for sample in samples} == {sample["bbox"].shape for sample in samples}
    assert len({sample["bbox"].shape[1] for sample in samples}) > 2
    assert [set(axes) for axes in exporting._dynamic_shapes(samples[0]).values()] == [{0, 1}] * 3


def test_sounds_keep_their_length():
    inputs = {"input_values": torch.randn(2, 400), "attention_mask": torch.ones(2, 400, dtype=torch.long)}
    samples = samples_of(tiny_wav2vec2().eval(), inputs)
    assert [tuple(value.shape) for sample in samples for value in sample.values()] == [
        (rows, 400) for rows in (2, 2, 1, 1, 3, 3)
    ]
    assert [set(axes) for axes in exporting._dynamic_shapes(samples[0]).values()] == [{0}] * 2


@pytest.mark.parametrize("length", [4, 5, 9])
def test_no_row_is_padding_alone(length):
    inputs = {**text_inputs(2, length), "attention_mask": torch.ones(2, length, dtype=torch.long)}
    samples = samples_of(MODELS["bert"]().eval(), inputs)
    assert any(not sample["attention_mask"].all() for sample in samples)
    inputs["attention_mask"][1, :-1] = 0  # on the left
    samples += samples_of(MODELS["bert"]().eval(), inputs)
    assert all(sample["attention_mask"].any(1).all() for sample in samples)


def test_outputs_that_are_no_numbers_are_refused(tmp_path):
    """Also where the first sample that is compared has none."""
    model, _ = collapsed("bert", rank=5)
    model.bert.embeddings.position_embeddings.weight.data[8] = float("nan")
    with pytest.raises(ValueError, match="differs from it by nan"):
        export_model(model, masked(2, 9), tmp_path / "out", to="stock")
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    needs("onnx")
    folder = tmp_path_factory.mktemp("exported") / "out"
    model = in_state("bert", "collapsed").train()
    model.bert.pooler.eval()
    return model, folder, export_model(model, masked(2, 9), folder)


def test_the_folder(exported):
    """Native config, so that neither the package nor its code is needed; nothing of the model's own weights."""
    from transformers.exporters import ExportedModel

    model, folder, _ = exported
    assert sorted(os.listdir(folder)) == ["config.json", "export.json", "model.onnx", "model.onnx.data"]
    content = json.loads((folder / "config.json").read_text())
    assert content["model_type"] == "bert" and not {"layer_collapse", "auto_map"} & set(content)
    assert type(AutoConfig.from_pretrained(folder)).__module__.startswith("transformers.")
    # transformers' own way to load it.
    inputs = masked(3, 5)
    logits = ExportedModel.from_pretrained(folder, device="cpu")(**inputs).logits
    torch.testing.assert_close(logits, forward(in_state("bert", "collapsed"), inputs), rtol=1e-4, atol=2e-6)


def test_the_model_is_not_changed(exported):
    model, folder, report = exported
    again = in_state("bert", "collapsed")
    assert "forward" not in model.__dict__ and model.config.to_dict() == again.config.to_dict()
    assert model.training and model.dropout.training and not model.bert.pooler.training
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    text = str(report)
    assert "ONNX Runtime" in text and "2 of 3" in text and str(folder) in text


def test_latency_in_turn(exported):
    model, folder, _ = exported
    runtime = load_exported(folder)
    times = compare_latency({"torch": model, "onnx": runtime}, masked(2, 9), rounds=3, warmup=1, progress=False)
    assert len(times["onnx"].seconds) == 3 and times["torch"].ratio == 1.0


def test_a_difference_is_refused_and_nothing_is_left(tmp_path):
    needs("onnx")
    model = MODELS["vit"]()
    with pytest.raises(ValueError, match=r"differs from it by .* Nothing was written"):
        export_model(model, image_inputs(), tmp_path / "out", tolerance=0.0)
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_traced_is_said(tmp_path):
    needs("onnx")
    model = MODELS["bert"]()
    # A branch on what is in the tensors.
    model.bert.embeddings.register_forward_hook(lambda module, args, output: output * float(output.sum() > 0))
    with pytest.raises(ValueError, match="could not be exported to onnx"):
        export_model(model, masked(2, 9), tmp_path / "out")
    assert os.listdir(tmp_path) == [] and "forward" not in model.__dict__


def test_errors(tmp_path, monkeypatch):
    model, inputs = MODELS["bert"](), masked(2, 9)
    with pytest.raises(ValueError, match="`to` must be one of"):
        export_model(model, inputs, tmp_path / "out", to="tflite")
    with pytest.raises(TypeError, match="Expected a transformers model"):
        export_model(torch.nn.Linear(2, 2), inputs, tmp_path / "out", to="stock")
    with pytest.raises(TypeError, match="Expected a collapsed model"):
        export_model(model, inputs, tmp_path / "out", to="stock")
    with pytest.raises(ValueError, match="labels"):
        export_model(model, {**inputs, "labels": torch.zeros(2)}, tmp_path / "out", to="stock")
    with pytest.raises(ValueError, match="'input_ids'"):
        export_model(model, image_inputs(), tmp_path / "out", to="stock")
    with pytest.raises(ValueError, match="length of at least 4"):
        export_model(model, masked(2, 3), tmp_path / "out", to="stock")
    with pytest.raises(ValueError, match="cache=True"):
        export_model(model, inputs, tmp_path / "out", to="stock", cache=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        export_model(model, inputs, tmp_path / "full", to="stock")
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1, intermediate_size=32)
    )
    with pytest.raises(ValueError, match="cache of keys and values"):
        decoder_step(mamba, inputs, 3)
    monkeypatch.setitem(exporting.FORMATS, "onnx", (("no_such_package",), "onnx"))
    with pytest.raises(ValueError, match=r'needs no_such_package: pip install "hf_layercollapse\[onnx\]"'):
        export_model(model, inputs, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["full"]


def test_transformers_that_cannot_load_exports_is_refused_by_name(tmp_path, monkeypatch):
    for to in ("onnx", "openvino"):
        monkeypatch.setitem(exporting.FORMATS, to, ((), to))
    monkeypatch.setattr(upstream, "TRANSFORMERS", (5, 22, 2))
    for to in ("onnx", "openvino"):
        with pytest.raises(ValueError, match=f"Exporting to {to} needs transformers 5.23 or newer"):
            export_model(MODELS["bert"](), masked(2, 9), tmp_path / "out", to=to)
    assert os.listdir(tmp_path) == []
