"""Blocks verified and look-alikes refused with the reason; parts of a model; models in others; plain torch."""

import inspect
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    BlipConfig,
    BlipModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralModel,
    PreTrainedModel,
    Qwen2MoeConfig,
    SegformerConfig,
    SegformerModel,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_layercollapse import (
    FeedForwardLayout,
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    register_feed_forward_layout,
    remove_layer_collapse,
)
from hf_layercollapse import families as families_module
from hf_layercollapse.families import LAYOUTS, refused_blocks
from hf_layercollapse.modeling_layercollapse import CODE_FILE
from hf_layercollapse.patching import alpha_parameters, refresh_layer_collapse

from .models import randomize


def set_alphas(model, value=1.0):
    with torch.no_grad():
        for alpha in alpha_parameters(model):
            alpha.fill_(value)


def collapse(model, blocks="all"):
    apply_layer_collapse(model, LayerCollapseConfig(blocks=blocks))
    set_alphas(model)
    return collapse_model(model)


def randomised(model):
    return randomize(model).eval()


# ----------------------------------------------------------------------------------------------------
# Verified, not guessed
# ----------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """A feed-forward module whose code between the linears is given."""

    def __init__(self, width=16, hidden=40, out=None, **children):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width if out is None else out)
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class ScaledMlp(Mlp):
    def forward(self, x):
        return 3.0 * self.fc2(0.5 * self.act(2.0 * self.fc1(x)))


class ResidualMlp(Mlp):
    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(x)))


class NormFirstMlp(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(self.norm(x))))


class DropoutMlp(Mlp):
    def forward(self, x):
        return F.dropout(self.fc2(F.dropout(self.act(self.fc1(x)), 0.1, self.training)), 0.1, self.training)


class ChunkedMlp(Mlp):
    def forward(self, x):
        return torch.cat([self.fc2(self.act(self.fc1(chunk))) for chunk in x.chunk(2, 0)], 0)


class NormBetweenMlp(Mlp):
    def forward(self, x):
        return self.fc2(self.norm(self.act(self.fc1(x))))


class SquaredMlp(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)).square())


class ShiftedMlp(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x) + 1.0))


class LeakyMlp(Mlp):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(self.act(hidden)) + hidden.mean(-1, keepdim=True)


class TwiceMlp(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.act(self.fc1(x))))


class WeightMlp(Mlp):
    def forward(self, x):
        return F.linear(self.act(self.fc1(x)), self.fc2.weight, self.fc2.bias)


class BrokenMlp(Mlp):
    def forward(self, x, table):
        return self.fc2(self.act(self.fc1(x + table[0])))


class Net(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x)


@pytest.mark.parametrize(
    "mlp, own",
    [
        (Mlp(), True),
        (ScaledMlp(), True),
        (ResidualMlp(), False),
        (NormFirstMlp(norm=nn.LayerNorm(16)), False),
        (DropoutMlp(), False),
        (ChunkedMlp(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_code_is_exact(mlp, own):
    net, x = randomised(Net(mlp)), torch.randn(4, 6, 16)
    (block,) = find_feed_forward_blocks(net)
    assert block.name == "mlp" and block.wiring.own_module is own
    before = net(x)
    apply_layer_collapse(net)
    assert torch.equal(net(x), before)
    set_alphas(net)
    exact = net(x)
    report = collapse_model(net)
    torch.testing.assert_close(net(x), exact, rtol=1e-5, atol=1e-5)
    assert report.blocks[0].error < 1e-6
    assert isinstance(net.mlp, ResidualMlp) or not own or list(net.mlp._modules) == ["fc2"]


@pytest.mark.parametrize(
    "mlp, reason",
    [
        (NormBetweenMlp(norm=nn.LayerNorm(40)), "`norm` (LayerNorm) runs between `act` and `fc2`"),
        (SquaredMlp(), "something else than the layout says between `act` and `fc2`"),
        (ShiftedMlp(), "something else than the layout says between `fc1` and `act`"),
        (LeakyMlp(), "what `fc1` gives is used elsewhere too"),
        (TwiceMlp(), "`act` is called 2 times where `fc1` is called 1 times"),
        (WeightMlp(), "could not be run to check it (running WeightMlp does not reach it"),
        (BrokenMlp(), "could not be run to check it"),
        (Mlp(hidden=8), "bottleneck 16 -> 8 -> 16"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_code_is_refused(mlp, reason):
    net = Net(mlp)
    assert find_feed_forward_blocks(net) == []
    assert reason in refused_blocks(net)["mlp"]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="mlp") as caught:
        apply_layer_collapse(net, LayerCollapseConfig(blocks=["mlp"]))
    assert reason in str(caught.value)
    assert type(net.mlp.act) is nn.GELU and all(torch.equal(net.state_dict()[name], state[name]) for name in state)


def test_refused_among_good_ones_by_name():
    net = nn.Sequential(Net(Mlp()), Net(SquaredMlp()))
    with pytest.raises(ValueError, match="1.mlp is refused: its code does something else"):
        apply_layer_collapse(net, LayerCollapseConfig(blocks=["1.mlp"]))
    with pytest.raises(ValueError, match="1.mlp is refused: its code does something else"):
        apply_layer_collapse(net, LayerCollapseConfig(blocks="1.mlp"))


def test_checking_leaves_the_model_alone():
    net = randomised(Net(DropoutMlp()))
    net.mlp.fc1.register_forward_hook(lambda *_: pytest.fail("the real module ran"))
    net.train()
    state, rng = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    find_feed_forward_blocks(net)
    assert net.training and net.mlp.act.training
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items())


def test_checking_a_large_model_is_cheap():
    config = LlamaConfig(num_hidden_layers=32)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    blocks = find_feed_forward_blocks(model)
    assert len(blocks) == 32 and {block.kind for block in blocks} == {"gated"}
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    "build, name, reason",
    [
        (
            lambda: SegformerModel(
                SegformerConfig(
                    num_encoder_blocks=1,
                    depths=[2],
                    sr_ratios=[1],
                    hidden_sizes=[16],
                    patch_sizes=[7],
                    strides=[4],
                    num_attention_heads=[2],
                    mlp_ratios=[4],
                )
            ),
            "mlp",
            "between",
        ),
        (
            lambda: MixtralModel(
                MixtralConfig(
                    vocab_size=64,
                    hidden_size=16,
                    intermediate_size=40,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    num_local_experts=2,
                )
            ),
            "experts",
            "MoE experts held as 3-D parameters",
        ),
    ],
    ids=["segformer", "mixtral"],
)
def test_look_alikes(build, name, reason):
    model = build()
    refused = refused_blocks(model)
    assert find_feed_forward_blocks(model) == [] and len(refused) == 2
    assert all(path.endswith(name) and reason in why for path, why in refused.items())
    with pytest.raises(ValueError, match="no feed-forward block of a known layout"):
        apply_layer_collapse(model)


# ----------------------------------------------------------------------------------------------------
# Layouts of one's own
# ----------------------------------------------------------------------------------------------------


class OwnNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.widen, self.bend, self.narrow = nn.Linear(16, 40), nn.SiLU(), nn.Linear(40, 16)

    def forward(self, x):
        return self.narrow(self.bend(self.widen(x)))


def test_register_layout(monkeypatch):
    monkeypatch.setattr(families_module, "LAYOUTS", list(LAYOUTS))
    net, x = randomised(Net(OwnNames())), torch.randn(3, 16)
    assert find_feed_forward_blocks(net) == []
    layout = FeedForwardLayout("own", "widen", "narrow", "bend")
    register_feed_forward_layout(layout)
    register_feed_forward_layout(layout)
    assert families_module.LAYOUTS.count(layout) == 1
    apply_layer_collapse(net)
    set_alphas(net)
    exact = net(x)
    collapse_model(net)
    torch.testing.assert_close(net(x), exact)
    with pytest.raises(ValueError, match="another layout named 'own'"):
        register_feed_forward_layout(FeedForwardLayout("own", "a", "b"))
    with pytest.raises(TypeError, match="FeedForwardLayout, got str"):
        register_feed_forward_layout("own")


@pytest.mark.parametrize(
    "values, error",
    [
        (("x", "a", "a"), ValueError),
        (("x", "a b", "c"), ValueError),
        (("x", "a", "b", ()), ValueError),
        (("x", "a", 3), TypeError),
        (("x", "a", "b", "c", "d", "gate,up"), ValueError),
        (("x", "a", "b", "c", None, "both"), ValueError),
        (("", "a", "b"), ValueError),
    ],
)
def test_bad_layouts(values, error):
    with pytest.raises(error):
        FeedForwardLayout(*values)


# ----------------------------------------------------------------------------------------------------
# Gated blocks
# ----------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order = order
        self.gate_up_proj, self.act, self.down_proj = nn.Linear(16, 80), nn.SiLU(), nn.Linear(40, 16)

    def forward(self, x):
        first, second = self.gate_up_proj(x).chunk(2, -1)
        if self.order == "interleaved":
            both = self.gate_up_proj(x)
            first, second = both[..., ::2], both[..., 1::2]
        elif self.order == "up,gate":
            first, second = second, first
        return self.down_proj(self.act(first) * second)


@pytest.mark.parametrize("order", ["gate,up", "up,gate"])
def test_fused_halves_are_told_apart(order):
    net, x = randomised(Net(Gated(order))), torch.randn(5, 16)
    (block,) = find_feed_forward_blocks(net)
    assert (
        block.layout.fused == order and block.hidden_features == 40 and block.parameters == 16 * 80 + 80 + 40 * 16 + 16
    )
    collapse_and_compare(net, x)


def test_interleaved(monkeypatch):
    monkeypatch.setattr(families_module, "LAYOUTS", list(LAYOUTS))
    net = randomised(Net(Gated("interleaved")))
    net.mlp.forward_calls = 1
    assert find_feed_forward_blocks(net) == []  # calls the fused linear twice
    assert "called" in refused_blocks(net)["mlp"]


def collapse_and_compare(net, x):
    apply_layer_collapse(net)
    set_alphas(net)
    exact = net(x)
    collapse_model(net)
    torch.testing.assert_close(net(x), exact, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------
# Parts of a model
# ----------------------------------------------------------------------------------------------------


def tiny_t5():
    return randomised(
        T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=16, d_ff=40, num_layers=3, num_heads=2, d_kv=8, decoder_start_token_id=0)
        )
    )


def tiny_bart():
    return randomised(
        BartForConditionalGeneration(
            BartConfig(
                vocab_size=64,
                d_model=16,
                encoder_ffn_dim=40,
                decoder_ffn_dim=40,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                max_position_embeddings=40,
                pad_token_id=1,
                bos_token_id=0,
                eos_token_id=2,
                decoder_start_token_id=2,
                forced_eos_token_id=None,
            )
        )
    )


def tiny_gpt2():
    return randomised(
        GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=0)
        )
    )


def llama_config():
    return LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        mlp_bias=True,
    )


def tiny_clip():
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8}
    heads = {"num_attention_heads": 2, "projection_dim": 8}
    return randomised(
        CLIPModel(
            CLIPConfig(
                text_config={**text, **heads, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 0},
                vision_config={**vision, **heads},
                projection_dim=8,
            )
        )
    )


@pytest.mark.parametrize(
    "build, selector, expected",
    [
        (tiny_t5, "decoder", [3, 4, 5]),
        (tiny_t5, "encoder", [0, 1, 2]),
        (tiny_t5, "encoder.last:2", [1, 2]),
        (tiny_t5, "decoder.first:1", [3]),
        (tiny_t5, "last:4", [2, 3, 4, 5]),
        (tiny_bart, "model.decoder", [2, 3]),
        (tiny_bart, "decoder", [2, 3]),
        (tiny_bart, "encoder.last:1", [1]),
        (tiny_clip, "vision_model", [2, 3, 4]),
        (tiny_clip, "text_model.last:1", [1]),
        (tiny_clip, r"vision_model\..*[01]\.mlp", [2, 3]),
    ],
)
def test_parts(build, selector, expected):
    model = apply_layer_collapse(build(), LayerCollapseConfig(blocks=selector))
    assert [block.index for block in find_feed_forward_blocks(model) if block.state == "patched"] == expected


@pytest.mark.parametrize(
    "selector, message",
    [
        ("nothing", "neither a part of the model nor"),
        ("nothing.last:1", "no blocks in a part 'nothing'. Its parts are"),
        ("decoder.last:4", "its part 'decoder' has 3 blocks"),
    ],
)
def test_unknown_parts(selector, message):
    with pytest.raises(ValueError, match=message):
        apply_layer_collapse(tiny_t5(), LayerCollapseConfig(blocks=selector))


@pytest.mark.parametrize("selector", ["decoder.last:0", "decoder.first:-1", "encoder.last:x"])
def test_malformed_parts(selector):
    with pytest.raises(ValueError, match="not a positive integer"):
        LayerCollapseConfig(blocks=selector)


def llama_causal():
    return randomised(LlamaForCausalLM(llama_config()))


@pytest.mark.parametrize("build", [tiny_gpt2, llama_causal, tiny_t5, tiny_bart])
def test_generate_with_cache(build):
    model, ids = build(), torch.randint(3, 64, (2, 5))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    dense = model.generate(input_ids=ids, **options)
    apply_layer_collapse(model)
    assert torch.equal(model.generate(input_ids=ids, **options), dense)
    set_alphas(model)
    linear = model.generate(input_ids=ids, **options)
    collapse_model(model)
    assert torch.equal(model.generate(input_ids=ids, **options), linear)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **options), linear)


def tiny_whisper():
    return randomised(
        WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=64,
                d_model=16,
                encoder_ffn_dim=40,
                decoder_ffn_dim=40,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                num_mel_bins=8,
                max_source_positions=8,
                max_target_positions=16,
                pad_token_id=1,
                bos_token_id=2,
                eos_token_id=2,
                decoder_start_token_id=2,
            )
        )
    )


@pytest.mark.parametrize(
    "build, auto_class, part",
    [
        (tiny_t5, AutoModelForTextEncoding, "encoder"),
        (tiny_bart, AutoModelForCausalLM, "decoder"),
        (tiny_whisper, AutoModelForCausalLM, "decoder"),
        (tiny_whisper, AutoModelForAudioClassification, "encoder"),
        (tiny_clip, AutoModelForImageClassification, "vision_model"),
        (lambda: PARTS["siglip"][0](), AutoModelForImageClassification, "vision_model"),
    ],
)
@pytest.mark.parametrize("collapsed", [False, True], ids=["patched", "collapsed"])
def test_part_classes_load(build, auto_class, part, collapsed, tmp_path):
    model = apply_layer_collapse(build())
    if collapsed:
        set_alphas(model)
        collapse_model(model)
    else:
        set_alphas(model, 0.25)
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    # Not the embeddings: BART keeps them under a key that its decoder alone does not know, natively too.
    whole = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    state = {key.removeprefix("model."): value for key, value in loaded.state_dict().items()}
    checked = [key for key in state if key.startswith(f"{part}.") and "embed" not in key]
    assert len(checked) > 10 and all(torch.equal(state[key], whole[key]) for key in checked)
    states = {block.state for block in find_feed_forward_blocks(loaded)}
    assert states == {"collapsed" if collapsed else "patched"}


@pytest.mark.parametrize("config", [None, {"keep_neurons": 4}, {"rank": 4}], ids=["full", "narrow", "low rank"])
def test_a_linear_that_stays_in_float32(config, tmp_path):
    model, ids = tiny_t5(), torch.randint(3, 64, (2, 6))
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    rows = torch.randint(3, 64, (24, 2, 6))
    data = [{"input_ids": row, "decoder_input_ids": row} for row in rows]
    if config is None:
        collapse(model)
    else:
        collapse_model(model, LayerCollapseConfig(**config), calibration_data=data)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16).eval()
    dtypes = {value.dtype for name, value in loaded.named_parameters() if name.endswith("wo.weight")}
    assert dtypes == {torch.float32}
    torch.testing.assert_close(loaded(**inputs).logits.float(), model(**inputs).logits, rtol=0.1, atol=0.1)


def test_text_tower_alone(tmp_path):
    model = randomised(
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=64,
                hidden_size=16,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=16,
                eos_token_id=2,
                bos_token_id=0,
            )
        )
    )
    collapse(model)
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 64, (2, 5))
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again).__name__ == "CLIPTextModel"
    assert torch.equal(again(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)


def test_dropout_as_a_function_stays_until_it_is_switched_off(tmp_path):
    """BART's layer calls `F.dropout` between its linears: nothing to replace, and after a collapse it acts on what the
    merged linear gets. It is an option of the config, so the saved model can be loaded without it."""
    model = tiny_bart()
    ids = torch.randint(3, 64, (2, 5))
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        layer.activation_dropout = model.config.activation_dropout = 0.5
        layer.dropout = model.config.dropout = layer.self_attn.dropout = model.config.attention_dropout = 0.0
    model.model.encoder.dropout = model.model.decoder.dropout = 0.0
    collapse(model)
    model.save_pretrained(tmp_path)
    evaluated = model(input_ids=ids).logits
    assert not torch.allclose(model.train()(input_ids=ids).logits, evaluated)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, activation_dropout=0.0)
    assert again.config.activation_dropout == 0.0
    assert torch.equal(again.eval()(input_ids=ids).logits, evaluated)
    assert torch.equal(again.train()(input_ids=ids).logits, evaluated)


# ----------------------------------------------------------------------------------------------------
# A collapsed model inside another
# ----------------------------------------------------------------------------------------------------


def vision_config():
    return CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )


@pytest.mark.parametrize("collapsed", [False, True], ids=["patched", "collapsed"])
def test_collapsed_llama_inside_llava(collapsed, tmp_path):
    inner = apply_layer_collapse(randomised(LlamaModel(llama_config())))
    set_alphas(inner, 0.375)
    if collapsed:
        set_alphas(inner)
        collapse_model(inner)
    outer = LlavaForConditionalGeneration(
        LlavaConfig(text_config=inner.config, vision_config=vision_config(), image_token_index=63)
    ).eval()
    outer.model.language_model.load_state_dict(inner.state_dict())
    outer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "llava" and saved["text_config"]["model_type"] == "layercollapse"
    assert inner.config.to_dict()["model_type"] == "llama"
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 60, (2, 5))
    assert torch.equal(again(input_ids=ids).logits, outer(input_ids=ids).logits)
    assert type(again.model.language_model) is type(inner)


def test_collapse_of_a_whole_llava(tmp_path):
    model = randomised(
        LlavaForConditionalGeneration(
            LlavaConfig(text_config=llama_config(), vision_config=vision_config(), image_token_index=63)
        )
    )
    assert collapse(model, "language_model").collapsed == [
        "model.language_model.layers.0.mlp",
        "model.language_model.layers.1.mlp",
    ]
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 60, (2, 5))
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def bert_config(**kwargs):
    return BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, **kwargs
    )


@pytest.mark.parametrize("from_folders", [False, True])
def test_collapsed_bert_inside_encoder_decoder(from_folders, tmp_path, caplog):
    encoder = randomised(BertModel(bert_config()))
    collapse(encoder)
    decoder = randomised(BertLMHeadModel(bert_config(is_decoder=True, add_cross_attention=True)))
    if from_folders:
        encoder.save_pretrained(tmp_path / "encoder")
        decoder.save_pretrained(tmp_path / "decoder")
        model = EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "decoder").eval()
    else:
        model = EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    model.save_pretrained(tmp_path / "both")
    assert "`encoder` of this EncoderDecoderModel is patched or collapsed as a model of its own" in caplog.text
    again = EncoderDecoderModel.from_pretrained(tmp_path / "both").eval()
    ids = torch.randint(3, 64, (2, 5))
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert isinstance(again.encoder.encoder.layer[0].intermediate.dense, nn.Identity)
    # As it says.
    caplog.clear()
    refresh_layer_collapse(again)
    again.save_pretrained(tmp_path / "whole")
    assert not caplog.text and (tmp_path / "whole" / CODE_FILE).exists()
    whole = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(whole(**inputs).logits, model(**inputs).logits)


def llava_around(inner):
    outer = LlavaForConditionalGeneration(
        LlavaConfig(text_config=inner.config, vision_config=vision_config(), image_token_index=63)
    ).eval()
    outer.model.language_model.load_state_dict(inner.state_dict())
    return outer


def encoder_decoder_around(inner):
    decoder = BertLMHeadModel(bert_config(is_decoder=True, add_cross_attention=True))
    return EncoderDecoderModel(encoder=inner, decoder=decoder).eval()


def without(folder, *endings):
    """Takes tensors out of a saved folder."""
    state = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in state.items() if not key.endswith(endings)}
    assert len(kept) < len(state)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "build, around, auto_class, activation, down",
    [
        (
            lambda: LlamaModel(llama_config()),
            llava_around,
            AutoModelForImageTextToText,
            "mlp.act_fn",
            "mlp.down_proj",
        ),
        (
            lambda: BertModel(bert_config()),
            encoder_decoder_around,
            AutoModelForSeq2SeqLM,
            "intermediate.intermediate_act_fn",
            "output.dense",
        ),
    ],
    ids=["llava", "encoder-decoder"],
)
@pytest.mark.parametrize("life", ["patched", "affine", "collapsed"])
def test_incomplete_weights_of_a_model_inside_another(build, around, auto_class, activation, down, life, tmp_path):
    inner = randomised(build())
    if life == "collapsed":
        collapse(inner)
        lost = f"1.{down}.bias"
    else:
        data = [{"input_ids": torch.randint(3, 60, (4, 9))}]
        apply_layer_collapse(inner, LayerCollapseConfig(linear_target="affine"), data)
        lost = f"1.{activation}.{'alpha' if life == 'patched' else 'offset'}"
    outer = around(inner)
    outer.save_pretrained(tmp_path)
    again = auto_class.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in outer.state_dict().items())
    without(tmp_path, lost)
    with pytest.raises(ValueError, match="does not hold what its layer_collapse table describes") as caught:
        auto_class.from_pretrained(tmp_path)
    assert lost in str(caught.value)
    # Built from the config alone it has first values, and nothing is missing.
    auto_class.from_config(again.config)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda table: table.update({"__class__.x": {"type": "identity"}}), "private attributes"),
        (lambda table: table.update({"layers.9.mlp.act_fn": {"type": "identity"}}), "no '9' in ModuleList"),
        (lambda table: table["layers.0.mlp.act_fn"].update(width=2**19), "no weight beside it has that size"),
        (lambda table: table["layers.0.mlp.act_fn"].update(type="pickle"), "unknown type 'pickle'"),
    ],
    ids=["private", "elsewhere", "absurd", "unknown"],
)
def test_a_damaged_table_inside_another_config(edit, message, tmp_path):
    inner = apply_layer_collapse(randomised(LlamaModel(llama_config())))
    llava_around(inner).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    edit(content["text_config"]["layer_collapse"]["modules"])
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def tiny_towers(config_class, model_class):
    """Two towers whose configs are of fixed classes."""
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
    vision = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    heads = {"num_attention_heads": 2, "projection_dim": 16}
    config = config_class(
        text_config={**text, **heads, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 0},
        vision_config={**vision, **heads},
    )
    return lambda: randomised(model_class(config))


def tiny_llava():
    return randomised(
        LlavaForConditionalGeneration(
            LlavaConfig(text_config=llama_config(), vision_config=vision_config(), image_token_index=63)
        )
    )


PARTS = {
    "clip": (tiny_towers(CLIPConfig, CLIPModel), "vision_model", "text_model"),
    "siglip": (tiny_towers(SiglipConfig, SiglipModel), "text_model", "vision_model"),
    "blip": (tiny_towers(BlipConfig, BlipModel), "vision_model", "text_model"),
    "llava": (tiny_llava, "model.language_model", "model.vision_tower"),
    "bart": (tiny_bart, "model", None),
}


def part_in_life(model, part, life):
    """Patches or collapses a part of a live model, as a model of its own."""
    tower = apply_layer_collapse(model.get_submodule(part))
    set_alphas(tower, 0.375)
    if life == "collapsed":
        set_alphas(tower)
        collapse_model(tower)
    return tower


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize("life", ["patched", "collapsed"])
def test_a_part_of_a_live_model(case, life, tmp_path):
    build, part, _ = PARTS[case]
    model = build()
    part_in_life(model, part, life)
    # The class of the whole is native, and writes a config that knows nothing of it.
    with pytest.raises(ValueError, match=f"`{part}` of this {type(model).__name__} is patched or collapsed"):
        model.save_pretrained(tmp_path / "refused")
    assert len(model.state_dict()) > 10
    refresh_layer_collapse(model)
    assert_comes_back(model, tmp_path / "whole")


@pytest.mark.parametrize("case", [case for case in PARTS if PARTS[case][2]])
@pytest.mark.parametrize("life", ["patched", "collapsed"])
def test_a_part_and_then_another(case, life, tmp_path):
    build, part, other = PARTS[case]
    model = build()
    tower = part_in_life(model, part, life)
    native = [type(module) for module in build().modules() if isinstance(module, PreTrainedModel)]
    if life == "collapsed":
        collapse(model, other)
    else:
        set_alphas(tower)
        collapse_model(model)
    # One table, that of the whole; its parts are native again.
    assert [type(m) for m in model.modules() if isinstance(m, PreTrainedModel)][1:] == native[1:]
    assert_comes_back(model, tmp_path)


def assert_comes_back(model, folder):
    model.save_pretrained(folder)
    again = AutoModel if type(model).__name__ in ("CLIPModel", "SiglipModel", "BlipModel") else type(model)
    again = again.from_pretrained(folder).eval()
    assert type(again) is type(model)
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
    states = [block.state for block in find_feed_forward_blocks(model)]
    assert [block.state for block in find_feed_forward_blocks(again)] == states


@pytest.mark.parametrize("config_class", [CLIPConfig, SiglipConfig, BlipConfig])
@pytest.mark.parametrize("life", ["patched", "collapsed"])
def test_a_config_whose_parts_are_fixed_is_not_saved(config_class, life, tmp_path):
    case = config_class.model_type
    tower = part_in_life(PARTS[case][0](), "text_model", life)
    with pytest.raises(ValueError, match=f"`text_config` of this {config_class.__name__} describes a patched or"):
        # In older transformers the constructor of CLIP's writes its parts out too, and there is nothing to save.
        config_class(text_config=tower.config).save_pretrained(tmp_path / "saved")
    if (tmp_path / "saved").exists():
        with pytest.raises(OSError, match="not a valid JSON"):
            config_class.from_pretrained(tmp_path / "saved")


# ----------------------------------------------------------------------------------------------------
# What native classes have beside their modules
# ----------------------------------------------------------------------------------------------------


def test_tensor_parallel_plan_loses_what_is_replaced(tmp_path):
    native = llama_causal()
    model = llama_causal()
    assert any("mlp" in key for key in native.tp_plan)
    apply_layer_collapse(model)
    assert model.tp_plan == native.tp_plan and model.model.tp_plan == native.model.tp_plan
    set_alphas(model)
    collapse_model(model)
    model.save_pretrained(tmp_path)
    for one in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert one.tp_plan == {key: style for key, style in native.tp_plan.items() if ".mlp." not in key}
        assert one.model.tp_plan == {key: style for key, style in native.model.tp_plan.items() if ".mlp." not in key}
    assert any("mlp" in key for key in llama_causal().tp_plan)


FRESH = """
import json, sys
import torch
import hf_layercollapse
from hf_layercollapse.upstream import TRANSFORMERS
from transformers import AutoModel, AutoModelForCausalLM
out = {}
for name in ("dense", "collapsed"):
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", dtype=torch.bfloat16)
    out[name] = [
        type(model)._can_set_attn_implementation(),
        type(model)._can_set_experts_implementation(),
        model.config._attn_implementation,
        model.config._experts_implementation,
        sorted(model._keep_in_fp32_modules or []),
        sorted(model._no_split_modules or []),
        {key: style for key, style in model.tp_plan.items() if "shared_expert" not in key},
        # Public since 5.23.
        *([model.ep_plan] if TRANSFORMERS >= (5, 23) else []),
        str(model.dtype),
    ]
    model.set_attn_implementation("eager")
assert type(model).__name__ == "Qwen2MoeForCausalLM" and hasattr(model.config, "layer_collapse")
assert out["dense"] == out["collapsed"], out
"""


def test_implementations_and_plans_equal_native_ones_in_a_fresh_process(tmp_path):
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=40,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = randomised(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(tmp_path / "dense")
    assert set(refused_blocks(model).values()) == {"MoE experts held as 3-D parameters"}
    assert [block.name for block in find_feed_forward_blocks(model)] == [
        "model.layers.0.mlp.shared_expert",
        "model.layers.1.mlp.shared_expert",
    ]
    collapse(model)
    model.save_pretrained(tmp_path / "collapsed")
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], check=True, timeout=300)


FRESH_DTYPES = """
import sys
import torch
import hf_layercollapse
from transformers import AutoModelForSeq2SeqLM
dtypes = []
for name in ("dense", "collapsed"):
    model = AutoModelForSeq2SeqLM.from_pretrained(f"{sys.argv[1]}/{name}", dtype=torch.float16)
    dtypes.append({key: str(value.dtype) for key, value in model.state_dict().items()})
dense, collapsed = dtypes
assert dense["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == "torch.float32"
assert collapsed == {key: dense[key] for key in collapsed} and len(collapsed) == len(dense) - 6, collapsed
"""


def test_keep_in_float32_equals_the_native_one_in_a_fresh_process(tmp_path):
    model = tiny_t5()
    model.save_pretrained(tmp_path / "dense")
    collapse(model)
    model.save_pretrained(tmp_path / "collapsed")
    subprocess.run([sys.executable, "-c", FRESH_DTYPES, str(tmp_path)], check=True, timeout=300)


# ----------------------------------------------------------------------------------------------------
# Plain torch
# ----------------------------------------------------------------------------------------------------


def filled(norm):
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


def batch_norm_net():
    return nn.Sequential(
        nn.Linear(16, 40),
        filled(nn.BatchNorm1d(40)),
        nn.ReLU(inplace=True),
        filled(nn.BatchNorm1d(40)),
        nn.Dropout(0.2),
        nn.Linear(40, 8),
    )


def vgg_classifier():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(16, 40),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(40, 40),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(40, 10),
    )


class Mixer(nn.Module):
    def __init__(self, tokens=6, width=16):
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(width), Mlp(tokens, 24)
        self.norm2, self.channels = nn.LayerNorm(width), Mlp(width, 40)

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


@pytest.mark.parametrize(
    "build, shape, names",
    [
        (batch_norm_net, (6, 16), ["0"]),
        (vgg_classifier, (6, 4, 4), ["1", "4"]),
        (lambda: nn.Sequential(Mixer(), Mixer()), (2, 6, 16), ["0.tokens", "0.channels", "1.tokens", "1.channels"]),
        (lambda: Mlp(), (5, 16), ["fc1"]),
    ],
    ids=["batch norm", "chain of three", "mixer", "the model is the block"],
)
@pytest.mark.parametrize("target", ["identity", "affine"])
def test_plain_torch(build, shape, names, target):
    model, x = build().eval(), torch.randn(64, *shape[1:])
    first = next(iter(inspect.signature(model.forward).parameters))
    dense = model(x.clone())
    assert [block.name for block in find_feed_forward_blocks(model)] == names
    apply_layer_collapse(model, LayerCollapseConfig(linear_target=target), calibration_data=[{first: x.clone()}])
    assert torch.equal(model(x.clone()), dense)
    model.train()
    model(x.clone()).square().mean().backward()
    assert all(alpha.grad is not None and alpha.grad.abs() > 0 for alpha in alpha_parameters(model))
    model.eval()
    set_alphas(model)
    exact = model(x.clone()).detach()
    report = collapse_model(model)
    assert report.collapsed == names and report.parameters_after < report.parameters_before
    torch.testing.assert_close(model(x.clone()), exact, rtol=1e-5, atol=1e-5)


def test_chain_one_at_a_time():
    model, x = vgg_classifier().eval(), torch.randn(6, 4, 4)
    collapse(model, ["4"])
    assert isinstance(model[4], nn.Identity) and model[7].in_features == 40
    before = model(x)
    assert [block.name for block in find_feed_forward_blocks(model)] == ["1"]
    apply_layer_collapse(model)
    assert torch.equal(model(x), before)
    set_alphas(model)
    exact = model(x)
    collapse_model(model)
    torch.testing.assert_close(model(x), exact)
    assert model[7].in_features == 16 and model[7].out_features == 10


def test_chain_cannot_be_fitted_at_once():
    model, x = vgg_classifier().eval(), torch.randn(200, 4, 4)
    with pytest.raises(ValueError, match="Name one of them in `blocks`"):
        collapse_model(model, calibration_data=[{"input": x}])
    assert isinstance(model[1], nn.Linear)


def test_inplace_activation_comes_back():
    model, x = vgg_classifier().eval(), torch.randn(6, 4, 4)
    before = model(x)
    apply_layer_collapse(model)
    set_alphas(model, 0.5)
    hidden = model[1](model[0](x))
    kept = hidden.clone()
    model[2](hidden)
    assert torch.equal(hidden, kept)
    remove_layer_collapse(model)
    assert type(model[2]) is nn.ReLU and model[2].inplace and torch.equal(model(x), before)
