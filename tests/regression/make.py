"""Writes the folder of a format version: `python -m tests.regression.make v1`, once, when the version is new, and
`transformers-5.16.1` under a transformers that becomes the oldest supported one, and `renamed-5.16.1` where a family
has given its modules other names since or before.

A folder that is there is never written again: it stands for the ones that lie on people's disks.
"""

import json
import os
import platform
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    Dinov2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    SwinConfig,
    ViTConfig,
)

from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, collapse_model
from hf_layercollapse.modeling_layercollapse import CODE_FILE, CollapsibleActivation

from ..models import randomize


HERE = os.path.dirname(__file__)
TEXT = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**TEXT, "max_position_embeddings": 8, "num_labels": 2}
VISION = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 4, "patch_size": 2}
MODELS = {
    "bert": (AutoModelForSequenceClassification, lambda: BertConfig(**BERT)),
    "vit": (
        AutoModelForImageClassification,
        lambda: ViTConfig(**VISION, intermediate_size=12, num_labels=2),
    ),
    "dinov2": (AutoModelForImageClassification, lambda: Dinov2Config(**VISION, mlp_ratio=2, num_labels=2)),
    "swin": (
        AutoModelForImageClassification,
        lambda: SwinConfig(
            image_size=4,
            patch_size=2,
            embed_dim=8,
            depths=[2],
            num_heads=[2],
            window_size=2,
            mlp_ratio=2,
            num_labels=2,
        ),
    ),
    "distilbert": (
        AutoModelForSequenceClassification,
        lambda: DistilBertConfig(
            vocab_size=16, dim=8, hidden_dim=12, n_layers=2, n_heads=2, max_position_embeddings=8, num_labels=2
        ),
    ),
    "gpt2": (
        AutoModelForCausalLM,
        lambda: GPT2Config(vocab_size=16, n_embd=8, n_inner=12, n_layer=2, n_head=2, n_positions=8),
    ),
    "llama": (AutoModelForCausalLM, lambda: LlamaConfig(**TEXT, num_key_value_heads=1, max_position_embeddings=8)),
}
# folder -> model, options, and the alphas of its two blocks; those at 1 are collapsed before the save
FOLDERS = {
    "bert-patched": ("bert", {}, (0.987654, 0.123456)),
    "bert-neurons-relu": ("bert", {"granularity": "neuron", "activation": "relu"}, (0.3, 0.7)),
    "bert-half": ("bert", {"linear_target": "affine"}, (1.0, 0.4)),
    "vit-half": ("vit", {"linear_target": "affine", "granularity": "neuron"}, (0.6, 1.0)),
    "distilbert-collapsed": ("distilbert", {}, (1.0, 1.0)),
    "gpt2-half": ("gpt2", {}, (1.0, 0.2)),
    "llama-half": ("llama", {"linear_target": "affine"}, (0.5, 1.0)),
    "llama-neurons": ("llama", {"granularity": "neuron"}, (0.5, 0.1)),
}
# The same, of families whose modules have other names in another transformers.
RENAMED = {
    "dinov2-half": ("dinov2", {"linear_target": "affine", "granularity": "neuron"}, (1.0, 0.4)),
    "vit-half": FOLDERS["vit-half"],
    "swin-half": ("swin", {}, (0.6, 1.0)),
}
# folder -> model, and what its blocks are fitted to
NARROW = {
    "bert-neurons-only": ("bert", {"rank": 0, "keep_neurons": 5}),
    "llama-neurons-only": ("llama", {"rank": 0, "keep_neurons": 5}),
    "llama-narrow": ("llama", {"rank": 2, "keep_neurons": 3}),
}
RENAMED_NARROW = {
    "dinov2-narrow": ("dinov2", {"rank": 2, "keep_neurons": 3}),
    "vit-narrow": ("vit", {"rank": 8, "keep_neurons": 3}),
}


def inputs_of(config, seed=None):
    if config.model_type in ("vit", "dinov2", "swin"):
        seed = 3 if seed is None else seed
        return {"pixel_values": torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))}
    if seed is not None:
        return {"input_ids": torch.randint(1, 16, (2, 7), generator=torch.Generator().manual_seed(seed))}
    return {"input_ids": torch.arange(1, 15).reshape(2, 7)}


def machine():
    """Where floating-point results are the same to the last bit."""
    model = "unknown"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    return {
        "machine": platform.machine(),
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save(model, path):
    inputs = inputs_of(model.config)
    with torch.no_grad():
        logits = model(**inputs).logits
    model.save_pretrained(path)
    os.remove(os.path.join(path, CODE_FILE))
    save_file({**inputs, "logits": logits.contiguous()}, os.path.join(path, "expected.safetensors"))


def make(root):
    os.makedirs(root, exist_ok=False)
    renamed = os.path.basename(root).startswith("renamed-")
    for folder, (name, options, values) in (RENAMED if renamed else FOLDERS).items():
        auto_class, config = MODELS[name]
        model = randomize(auto_class.from_config(config())).eval()
        config = LayerCollapseConfig(**options)
        apply_layer_collapse(model, config, [inputs_of(model.config)])
        activations = [module for module in model.modules() if isinstance(module, CollapsibleActivation)]
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for activation, value in zip(activations, values, strict=True):
                spread = 0.0 if value == 1 else 0.1
                activation.alpha.copy_(value - spread * torch.rand(activation.alpha.shape, generator=generator))
            if 1.0 in values:
                collapse_model(model)
        save(model, os.path.join(root, folder))
    for folder, (name, options) in (RENAMED_NARROW if renamed else NARROW).items():
        auto_class, config = MODELS[name]
        model = randomize(auto_class.from_config(config())).eval()
        collapse_model(model, LayerCollapseConfig(**options), [inputs_of(model.config, seed) for seed in range(12)])
        save(model, os.path.join(root, folder))
    with open(os.path.join(root, "machine.json"), "w") as file:
        json.dump(machine(), file, indent=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make(os.path.join(HERE, sys.argv[1]))
