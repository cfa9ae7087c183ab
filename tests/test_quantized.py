"""Collapsed folders with the quantizers of bitsandbytes and quanto, on a CPU; torchao's are in test_serving.py."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    QuantoConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from hf_layercollapse import (
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    plan_collapse,
)
from hf_layercollapse.patching import alpha_parameters


pytestmark = pytest.mark.slow

IDS = torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(0))
INT8 = BitsAndBytesConfig(load_in_8bit=True)
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
QUANTIZERS = {"int8": INT8, "nf4": NF4, "quanto": QuantoConfig(weights="int8")}
# What the blocks' linears become.
CLASSES = {"int8": "Linear8bitLt", "nf4": "Linear4bit", "quanto": "QLinear"}
LIVES = ["patched", "linear", "narrow", "neurons"]


def dense():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


def in_life(life):
    """A Llama of which the first block is dense, and the others are in one of the lives."""
    model = dense()
    if life == "patched":
        apply_layer_collapse(model, LayerCollapseConfig(blocks="last:2", initial_alpha=0.3))
        return model
    # Sums over a multiple of 64, as the CPU kernels of bitsandbytes need them.
    options = {
        "linear": {},
        "narrow": {"rank": 64, "keep_neurons": 64},
        "neurons": {"rank": 0, "keep_neurons": 128},
    }[life]
    data = [{"input_ids": torch.randint(3, 64, (16, 24))} for _ in range(4)]
    collapse_model(model, LayerCollapseConfig(blocks="last:2", **options), calibration_data=data)
    return model.eval()


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


def quantized_classes(model):
    return {
        type(module).__name__ for module in model.model.layers[1].mlp.modules() if "Linear" in type(module).__name__
    }


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_quantized_loading(kind, life, tmp_path):
    model = in_life(life)
    model.save_pretrained(tmp_path / "float")
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=QUANTIZERS[kind], device_map="cpu"
    )
    assert quantized_classes(quantized) == {CLASSES[kind]}
    assert [block.state for block in find_feed_forward_blocks(quantized)] == [
        block.state for block in find_feed_forward_blocks(model)
    ]
    assert [alpha.dtype for alpha in alpha_parameters(quantized)] == [torch.float32] * len(alpha_parameters(model))
    if kind != "quanto":  # transformers does not save what it quantized with quanto
        # Before the first forward, in which bitsandbytes packs weights for the CPU, dense models' too, and saves that.
        quantized.save_pretrained(tmp_path / "quantized")
    expected, logits = logits_of(model), logits_of(quantized)
    relative = float((logits.float() - expected).norm() / expected.norm())
    assert 0 < relative < (0.3 if kind == "nf4" else 0.1)
    if kind == "quanto":
        return
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map="cpu")
    assert quantized_classes(again) == {CLASSES[kind]} and torch.equal(logits_of(again), logits)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_damaged_folder_is_still_refused(kind, tmp_path):
    model = in_life("linear")
    state_dict = model.state_dict()
    del state_dict["model.layers.1.mlp.down_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state_dict)
    with pytest.raises(ValueError, match="missing: model.layers.1.mlp.down_proj.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QUANTIZERS[kind], device_map="cpu")


@pytest.mark.parametrize("life", ["linear", "narrow", "neurons"])
def test_healing_in_four_bits(life, tmp_path):
    """QLoRA: adapters in float on what was collapsed and loaded in four bits."""
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    in_life(life).save_pretrained(tmp_path / "float")

    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=NF4, device_map="cpu")

    model = prepare_model_for_kbit_training(load())
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    assert any("mlp.down_proj.lora_A" in name for name, _ in model.named_parameters() if "layers.1" in name)
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=30,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        logging_steps=1,
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    healed = logits_of(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(again), healed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["quanto", "torchao"])
def test_a_plan_of_blocks_that_are_not_quantized_in_a_model_that_is(kind, tmp_path):
    """Gradients pass through quantized attention: the metric of the loss is measured, and fingerprints are taken."""
    dense().save_pretrained(tmp_path)
    torchao = pytest.importorskip("torchao.quantization", reason="the extra torchao is not installed")
    kept = [*(f"model.layers.{index}.mlp" for index in range(3)), "lm_head"]
    quantizers = {
        "quanto": QuantoConfig(weights="int8", modules_to_not_convert=kept),
        "torchao": TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=kept),
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantizers[kind], device_map="cpu")
    data = [{"input_ids": torch.randint(3, 64, (16, 24))} for _ in range(8)]
    plan = plan_collapse(model, data, macs=0.5)
    assert plan.metric.kind == "loss" and plan.metric.bytes > 0
    report = collapse_model(model, plan=plan, calibration_data=data)
    assert set(report.collapsed) == plan.point.choices.keys()
