"""The table of test models that most tests share: tiny, from configs, with random weights and non-zero biases."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    Dinov2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    RobertaConfig,
    ViTConfig,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)
from transformers.utils import is_torchvision_available

from hf_layercollapse.upstream import TRANSFORMERS


WIDTH, HIDDEN, LAYERS, VOCABULARY = 16, 40, 3, 64


def text_inputs(batch=2, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # From 3: RoBERTa counts positions by what is not padding (1), and no special token is wanted.
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator)}


def image_inputs(batch=2, seed=0):
    return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


def tiny_wav2vec2(seed=0, **options):
    """A classifier of sounds, of 800 samples, say."""
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    options = {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, **options}
    torch.manual_seed(seed)
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**sizes, **convolutions, **options)).eval()


def _encoder(config_class, **kwargs):
    return lambda: config_class(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=40,
        num_labels=3,
        **kwargs,
    )


def _vision(config_class, **kwargs):
    return lambda: config_class(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.1,
        **kwargs,
    )


@dataclass(frozen=True)
class Case:
    """One family: how to build it, what to feed it, and what must be found in it.

    Args:
        name (`str`): Family and test id.
        config (`Callable`): Gives a fresh native config.
        auto_class: The Auto class of its head model.
        inputs (`Callable`): `inputs(seed=...)`, model inputs without labels.
        block (`str`): Name of block `{i}` in the head model.
        activation, down (`str`): Paths inside the block.
        hidden (`int`): Hidden width of its blocks.
        labels (`str`): `"class"` or `"tokens"`.
        collapsed_kinds (`set`): Kinds of table entries that a collapse leaves.
    """

    name: str
    config: Callable[[], Any]
    auto_class: Any
    inputs: Callable[..., dict[str, torch.Tensor]]
    block: str
    activation: str
    down: str
    hidden: int = HIDDEN
    labels: str = "class"
    collapsed_kinds: frozenset = field(default=frozenset({"linear", "identity"}))

    def model(self, seed=0, dtype=torch.float32, config=None):
        """The native head model in evaluation mode, the same for the same seed."""
        torch.manual_seed(seed)
        model = self.auto_class.from_config(self.config() if config is None else config).to(dtype)
        return randomize(model, seed).eval()

    def batch(self, seed=0):
        """Inputs with labels."""
        inputs = self.inputs(seed=seed)
        first = next(iter(inputs.values()))
        if self.labels == "tokens":
            return {**inputs, "labels": inputs["input_ids"]}
        return {**inputs, "labels": torch.arange(first.shape[0]) % 3}

    def blocks(self):
        return [self.block.format(i=i) for i in range(LAYERS)]


def randomize(model, seed=0):
    """Random numbers onto every parameter, so that no bias is zero and no norm is trivial."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise.to(parameter.dtype))
    return model


# Upstream's limits, of versions that the package supports.
needs_registration = pytest.mark.skipif(
    TRANSFORMERS < (5, 19), reason="before 5.19 transformers keeps no class of one's own for a config of its own"
)
needs_exporters = pytest.mark.skipif(
    TRANSFORMERS < (5, 23), reason="before 5.23 transformers cannot load again what it exports"
)
needs_torchvision = pytest.mark.skipif(
    TRANSFORMERS < (5, 18) and not is_torchvision_available(),
    reason="before 5.18 transformers' Auto classes of processors need torchvision",
)


@contextlib.contextmanager
def registered(auto_class, config_class, model_class):
    """A class of one's own is what an Auto class gives for a config, for a while."""
    auto_class.register(config_class, model_class, exist_ok=True)
    try:
        yield
    finally:
        del auto_class._model_mapping._extra_content[config_class]


_SPLIT = {"activation": "intermediate.intermediate_act_fn", "down": "output.dense"}
_FC = {
    "activation": "activation_fn",
    "down": "fc2",
    "collapsed_kinds": frozenset({"linear", "block"}),
}

CASES = [
    Case(
        "bert",
        _encoder(BertConfig),
        AutoModelForSequenceClassification,
        text_inputs,
        "bert.encoder.layer.{i}",
        **_SPLIT,
    ),
    Case(
        "roberta",
        _encoder(RobertaConfig),
        AutoModelForSequenceClassification,
        text_inputs,
        "roberta.encoder.layer.{i}",
        **_SPLIT,
    ),
    Case(
        "electra",
        _encoder(ElectraConfig, embedding_size=12, hidden_act="gelu_new"),
        AutoModelForSequenceClassification,
        text_inputs,
        "electra.encoder.layer.{i}",
        **_SPLIT,
    ),
    Case(
        "vit",
        _vision(ViTConfig, intermediate_size=HIDDEN),
        AutoModelForImageClassification,
        image_inputs,
        "vit.layers.{i}.mlp",
        **_FC,
    ),
    Case(
        "dinov2",
        _vision(Dinov2Config, mlp_ratio=3),
        AutoModelForImageClassification,
        image_inputs,
        "dinov2.encoder.layer.{i}.mlp",
        hidden=48,
        **(_FC if TRANSFORMERS >= (5, 18) else {**_FC, "activation": "activation"}),
    ),
    Case(
        "distilbert",
        lambda: DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=WIDTH,
            hidden_dim=HIDDEN,
            n_layers=LAYERS,
            n_heads=2,
            max_position_embeddings=40,
            num_labels=3,
            activation="relu",
        ),
        AutoModelForSequenceClassification,
        text_inputs,
        "distilbert.transformer.layer.{i}.ffn",
        activation="activation",
        down="lin2",
        collapsed_kinds=frozenset({"linear", "block"}),
    ),
    Case(
        "gpt2",
        lambda: GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_inner=HIDDEN,
            n_layer=LAYERS,
            n_head=2,
            n_positions=40,
            bos_token_id=1,
            eos_token_id=2,
        ),
        AutoModelForCausalLM,
        text_inputs,
        "transformer.h.{i}.mlp",
        activation="act",
        down="c_proj",
        labels="tokens",
        collapsed_kinds=frozenset({"conv1d", "block"}),
    ),
]
BY_NAME = {case.name: case for case in CASES}


def divergence(model, dense, batches):
    """Mean KL divergence, in nats, of what a model predicts by classes from what another one does, padding left out:
    what is reported of plans and recovery."""
    apart = []
    with torch.no_grad():
        for batch in batches:
            now, then = (each(**batch).logits.float().log_softmax(-1) for each in (model, dense))
            found = F.kl_div(now, then, reduction="none", log_target=True).sum(-1)
            if found.dim() == 2 and "attention_mask" in batch:
                found = found[batch["attention_mask"] > 0]
            apart.append(found.flatten())
    return float(torch.cat(apart).mean())
