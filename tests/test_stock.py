"""Collapsed models as checkpoints of their native class: equal logits in a process that has never seen the package."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BertModel,
    BloomConfig,
    Gemma3nTextConfig,
    GraniteConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.activations import ACT2FN

from hf_layercollapse import (
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    export_stock,
    find_feed_forward_blocks,
    functional,
)
from hf_layercollapse.exporting import logits_without_plugin
from hf_layercollapse.families import LAYOUTS
from hf_layercollapse.patching import refresh_layer_collapse
from hf_layercollapse.widths import native_config

from .models import BY_NAME, image_inputs, randomize, text_inputs
from .test_families import bert_config, encoder_decoder_around


def seq2seq_inputs(seed=0):
    return {**text_inputs(seed=seed), "decoder_input_ids": text_inputs(seed=seed + 1)["input_ids"]}


def decoder(config_class, **kwargs):
    sizes = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = config_class(
        vocab_size=64,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **{**sizes, **kwargs},
    )
    return randomize(AutoModelForCausalLM.from_config(config)).eval()


def gemma3n():
    """A width for each layer."""
    return decoder(
        Gemma3nTextConfig,
        head_dim=8,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0, 0.0],
    )


def bart():
    config = BartConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=40,
        max_position_embeddings=40,
    )
    return randomize(AutoModelForSeq2SeqLM.from_config(config)).eval()


def t5():
    config = T5Config(vocab_size=64, d_model=16, d_ff=48, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return randomize(AutoModelForSeq2SeqLM.from_config(config)).eval()


MODELS = {name: (case.model, case.inputs) for name, case in BY_NAME.items()} | {
    "llama": (lambda: decoder(LlamaConfig), text_inputs),
    "granite": (lambda: decoder(GraniteConfig), text_inputs),
    "qwen2": (lambda: decoder(Qwen2Config), text_inputs),
    "phi3": (lambda: decoder(Phi3Config), text_inputs),
    "gemma3n": (gemma3n, text_inputs),
    "bart": (bart, seq2seq_inputs),
    "t5": (t5, seq2seq_inputs),
}


def collapsed(name, blocks="all", **options):
    make, inputs = MODELS[name]
    model = make()
    data = [inputs(seed=seed) for seed in range(20)]
    collapse_model(model, LayerCollapseConfig(blocks=blocks, **options), calibration_data=data)
    return model.eval(), inputs(seed=77)


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "silu", "relu"])
def test_odd_part_of_activations(name):
    act = ACT2FN[name]
    z = torch.linspace(-8, 8, 500, dtype=torch.float64)
    torch.testing.assert_close(act(z) - act(-z), z, rtol=1e-12, atol=0)
    assert functional.odd_slope(z, act(z), act(-z)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", ["relu2", "mish", "gelu_10", "tanh", "sigmoid"])
def test_other_activations_have_none(name):
    act = ACT2FN[name]
    z = torch.linspace(-12, 12, 500, dtype=torch.float64)
    assert functional.odd_slope(z, act(z), act(-z)) is None


def test_linear_as_neurons_is_exact():
    generator = torch.Generator().manual_seed(0)
    left, right, x = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 3), (3, 5), (50, 5))
    )
    expected = x @ right.T @ left.T
    for act, slope in ((torch.nn.functional.gelu, 1.0), (lambda z: torch.nn.functional.leaky_relu(z, 0.1), 1.1)):
        up, down = functional.linear_as_neurons(left, right, slope)
        assert up.shape == (6, 5) and down.shape == (7, 6)
        torch.testing.assert_close(act(x @ up.T) @ down.T, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [row for row in LAYOUTS if row.fused], ids=lambda row: row.name)
def test_join_is_the_inverse_of_split(layout):
    weight = torch.arange(24.0).reshape(8, 3)
    assert torch.equal(layout.join(*layout.split(weight, 0), 0), weight)
    assert torch.equal(layout.join(*layout.split(weight[:, 0], 0), 0), weight[:, 0])


FULL, BOTH, FULL_AND_KEPT, KEPT = (
    {},
    {"rank": 5, "keep_neurons": 4},
    {"keep_neurons": 3},
    {"rank": 0, "keep_neurons": 9},
)
EXPRESSIBLE = [(name, options) for name in ("bert", "gpt2", "llama") for options in (FULL, BOTH, FULL_AND_KEPT, KEPT)]
EXPRESSIBLE += [(name, options) for name in ("vit", "bart") for options in (FULL, BOTH)]
EXPRESSIBLE += [("electra", BOTH), ("distilbert", FULL_AND_KEPT), ("granite", BOTH)]


@pytest.mark.parametrize(("name", "options"), EXPRESSIBLE)
def test_the_native_model_computes_the_same(name, options):
    model, batch = collapsed(name, **options)
    native, report = export_stock(model)
    assert type(native).__module__.startswith("transformers.models.")
    assert type(native) is type(model).native_class and type(native.config) is type(model.config).native_class
    with torch.no_grad():
        torch.testing.assert_close(native(**batch).logits, model(**batch).logits, rtol=1e-5, atol=3e-6)
    assert report.parameters_collapsed <= report.parameters_stock < report.parameters_dense
    assert report.macs_collapsed <= report.macs_stock < report.macs_dense
    blocks = find_feed_forward_blocks(model)
    assert max(report.errors.values()) < 1e-6 and list(report.errors) == [block.name for block in blocks]
    # A linear map costs twice its rank in a plain block, its rank in a gated one, and kept neurons their number.
    rank = options.get("rank", 16)
    width = rank * (1 if name in ("llama", "granite") else 2) + options.get("keep_neurons", 0)
    for field, (_, new) in report.fields.items():
        if field != "mlp_bias":
            assert new == width
    assert ("mlp_bias" in report.fields) == (name in ("llama", "granite") and rank > 0)


def test_an_adapter_on_it_names_its_own_folder(tmp_path):
    collapsed("bert", rank=5)[0].save_pretrained(tmp_path / "collapsed")
    native, _ = export_stock(BY_NAME["bert"].auto_class.from_pretrained(tmp_path / "collapsed"))
    parts = [part for part in native.modules() if isinstance(part, PreTrainedModel)]
    assert len(parts) > 1 and {(part.name_or_path, part.config.name_or_path) for part in parts} == {("", "")}
    native.save_pretrained(tmp_path / "native")
    native = BY_NAME["bert"].auto_class.from_pretrained(tmp_path / "native")
    adapted = get_peft_model(native, LoraConfig(target_modules=["intermediate.dense"]))
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "native")


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_loads_in_a_process_without_the_package(name, tmp_path):
    model, batch = collapsed(name, rank=5, keep_neurons=4)
    native, report = export_stock(model)
    native.save_pretrained(tmp_path / "native")
    assert not (tmp_path / "native" / "modeling_layercollapse.py").exists()
    (logits,) = logits_without_plugin(tmp_path / "native", [batch], tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**batch).logits, rtol=1e-5, atol=3e-6)
    assert "fewer parameters than dense" in str(report) and report.to_dict()["model_type"] == model.config.model_type


def test_ratio_fields_are_rounded_up_and_padded():
    model, batch = collapsed("dinov2", rank=5, keep_neurons=4)
    native, report = export_stock(model)
    # 14 neurons are wanted, and the class is built at multiples of 16.
    assert report.fields == {"mlp_ratio": (3, 1)}
    assert native.dinov2.encoder.layer[0].mlp.fc1.out_features == 16
    assert not native.dinov2.encoder.layer[0].mlp.fc2.weight[:, 14:].any()
    with torch.no_grad():
        torch.testing.assert_close(native(**batch).logits, model(**batch).logits, rtol=1e-5, atol=3e-6)


def test_different_widths_are_padded():
    make, inputs = MODELS["bert"]
    model = make()
    data = [inputs(seed=seed) for seed in range(20)]
    collapse_model(model, LayerCollapseConfig(blocks=[0, 1], rank=3, keep_neurons=1), calibration_data=data)
    collapse_model(model, LayerCollapseConfig(blocks=[2], rank=6, keep_neurons=2), calibration_data=data)
    native, report = export_stock(model)
    assert report.fields == {"intermediate_size": (40, 14)}
    with torch.no_grad():
        torch.testing.assert_close(
            native(**inputs(seed=5)).logits, model.eval()(**inputs(seed=5)).logits, rtol=1e-5, atol=3e-6
        )


def test_a_width_for_each_layer_needs_no_padding():
    model, data = gemma3n(), [text_inputs(seed=seed) for seed in range(20)]
    for layer, count in enumerate((20, 12)):
        collapse_model(model, LayerCollapseConfig(blocks=[layer], rank=0, keep_neurons=count), data)
    native, report = export_stock(model.eval())
    assert report.fields == {"intermediate_size": ([48, 48], [20, 12])}
    assert report.parameters_stock == report.parameters_collapsed
    batch = text_inputs(seed=77)
    with torch.no_grad():
        torch.testing.assert_close(native(**batch).logits, model(**batch).logits, rtol=1e-5, atol=3e-6)


def test_one_part_of_an_encoder_decoder():
    model, batch = collapsed("bart", blocks="encoder", rank=4)
    native, report = export_stock(model)
    assert report.fields == {"encoder_ffn_dim": (48, 8)}
    with torch.no_grad():
        torch.testing.assert_close(native(**batch).logits, model(**batch).logits, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("name", ["t5", "qwen2", "phi3"])
@pytest.mark.parametrize("rank", [0, 5])
def test_fits_of_families_without_biases(name, rank):
    """Neurons alone for all of them; in plain blocks a linear map too."""
    if rank and name != "t5":
        assert "gate would need a bias" in refused(name, rank=rank, keep_neurons=4)
        return
    model, batch = collapsed(name, rank=rank, keep_neurons=4)
    native, report = export_stock(model)
    (new,) = [new for _, new in report.fields.values()]
    assert new == 4 + 2 * rank and max(report.errors.values()) < 1e-6
    with torch.no_grad():
        torch.testing.assert_close(native(**batch).logits, model(**batch).logits, rtol=1e-5, atol=3e-6)


def test_trained_collapse_of_bias_free_blocks():
    """At alpha = 1 nothing has a constant term: T5 needs no bias then."""
    model = t5()
    apply_layer_collapse(model, LayerCollapseConfig())
    for name, parameter in model.named_parameters():
        if name.endswith(".alpha"):
            parameter.data.fill_(1.0)
    collapse_model(model)
    native, report = export_stock(model.eval())
    assert report.fields == {"d_ff": (48, 32)}
    batch = seq2seq_inputs()
    with torch.no_grad():
        torch.testing.assert_close(native(**batch).logits, model(**batch).logits, rtol=1e-5, atol=3e-6)


def test_bfloat16_and_the_model_itself_is_not_changed():
    model, batch = collapsed("bert", rank=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    native, _ = export_stock(model)
    native = copy.deepcopy(native)
    for parameter in native.parameters():
        parameter.data.zero_()
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    native, report = export_stock(model.to(torch.bfloat16))
    assert native.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(native(**batch).logits, model(**batch).logits, rtol=0.05, atol=0.05)


def in_memory(model):
    return {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_weights_that_stay_are_not_copied(name):
    """Nor are those of blocks that are native modules of the right width."""
    model, batch = collapsed(name, rank=0, keep_neurons=9)
    native, _ = export_stock(model)
    assert in_memory(native) == in_memory(model)
    assert not {id(part) for part in native.parameters()} & {id(part) for part in model.parameters()}
    assert not any(tensor.is_meta for tensor in (*native.parameters(), *native.buffers()))
    if name == "llama":
        collapse_model(model, LayerCollapseConfig(blocks=[1], rank=0, keep_neurons=5), [batch] * 3)
        native, report = export_stock(model)
        assert report.fields == {"intermediate_size": (48, 9)}
        padded = {f"model.layers.1.mlp.{linear}_proj.weight" for linear in ("gate", "up", "down")}
        own, others = native.state_dict(), model.state_dict()
        assert {key for key in own if own[key].data_ptr() != others[key].data_ptr()} == padded


def test_tied_weights_stay_tied():
    make, inputs = MODELS["gpt2"]
    model = make()
    collapse_model(model, LayerCollapseConfig(rank=5), [inputs(seed=seed) for seed in range(20)])
    native, report = export_stock(model)
    assert native.lm_head.weight is native.transformer.wte.weight
    assert report.parameters_stock == sum(parameter.numel() for parameter in native.parameters())


class Float64(TorchDispatchMode):
    """How much there is of float64 at most at one time, in numbers."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64 and not value.is_meta:
                storage = value.untyped_storage()
                self.alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes() // 8)
        self.alive = {key: (held, size) for key, (held, size) in self.alive.items() if not held.expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return found


@pytest.mark.parametrize("options", [BOTH, KEPT], ids=["linear", "neurons"])
def test_one_block_at_a_time_is_float64(options):
    most = []
    for layers in (1, 3):
        model = decoder(LlamaConfig, num_hidden_layers=layers)
        collapse_model(model, LayerCollapseConfig(**options), [text_inputs(seed=seed) for seed in range(20)])
        with Float64() as seen:
            export_stock(model)
        most.append(seen.most)
    assert 0 < most[1] <= 1.01 * most[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{"keep_neurons": 3}, KEPT], ids=["linear", "neurons"])
def test_a_wrong_block_is_refused_in_half_precision_too(options, dtype):
    """Here the native class would compute with another activation than the collapsed model does."""
    model, _ = collapsed("bert", **options)
    model.to(dtype)
    assert max(export_stock(model)[1].errors.values()) < 0.05
    model.config.hidden_act = "relu"
    with pytest.raises(ValueError, match="do not compute what the collapsed ones do"):
        export_stock(model)


def test_a_block_that_gives_no_numbers_is_refused():
    """Also where it is not the first."""
    model, _ = collapsed("bert", rank=5)
    model.bert.encoder.layer[2].output.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="do not compute what the collapsed ones do.*nan"):
        export_stock(model)


def refused(name, blocks="all", **options):
    with pytest.raises(ValueError) as error:
        export_stock(collapsed(name, blocks, **options)[0])
    return str(error.value)


def test_what_cannot_be_expressed_is_said():
    for name in ("qwen2", "phi3"):
        message = refused(name, rank=5, keep_neurons=4)
        assert "gate would need a bias" in message and "9 of 48 neurons" in message
    message = refused("t5", rank=5, constant_term="always")
    assert "down would need a bias" in message and "10 of 48 neurons" in message
    message = refused("bert", blocks=[0, 1])
    assert "saves nothing" in message and "'bert.encoder.layer.2'" in message and "of 40 neurons" in message
    assert "they need" in refused("dinov2", keep_neurons=3)


def test_activations_without_an_odd_part():
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        hidden_act="mish",
    )
    model = randomize(ViTForImageClassification(config)).eval()
    data = [image_inputs(seed=seed) for seed in range(20)]
    collapse_model(model, LayerCollapseConfig(rank=4), calibration_data=data)
    with pytest.raises(ValueError, match="act.z. - act.-z."):
        export_stock(model)


def test_no_field_for_the_width():
    config = BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
    model = randomize(AutoModelForCausalLM.from_config(config)).eval()
    data = [text_inputs(seed=seed) for seed in range(20)]
    collapse_model(model, LayerCollapseConfig(rank=4), calibration_data=data)
    with pytest.raises(ValueError, match="No field of BloomConfig .* would need 8 of 64"):
        export_stock(model)


def test_a_whole_in_which_a_part_is_collapsed_by_itself():
    encoder = randomize(BertModel(bert_config()))
    collapse_model(encoder, LayerCollapseConfig(rank=5), [text_inputs(seed=seed) for seed in range(20)])
    whole, batch = encoder_decoder_around(encoder), seq2seq_inputs()
    with pytest.raises(TypeError, match="`encoder` of this EncoderDecoderModel .* `.*refresh_layer_collapse"):
        export_stock(whole)
    assert type(native_config(whole.config).encoder) is BertConfig
    refresh_layer_collapse(whole)
    native, report = export_stock(whole)
    assert type(native.encoder) is BertModel and list(report.fields) == ["encoder.intermediate_size"]
    with torch.no_grad():
        torch.testing.assert_close(native(**batch).logits, whole(**batch).logits, rtol=1e-5, atol=3e-6)


def test_models_that_are_not_collapsed():
    with pytest.raises(TypeError, match="Expected a collapsed model"):
        export_stock(BY_NAME["bert"].model())
    model = BY_NAME["bert"].model()
    apply_layer_collapse(model, LayerCollapseConfig(blocks=[0]))
    with pytest.raises(ValueError, match="patched and not collapsed"):
        export_stock(model)
