"""What transformers keeps by a class or sets in a constructor, on models whose class and modules changed."""

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    BertPreTrainedModel,
    EncoderDecoderModel,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderModel,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.output_capturing import capture_outputs

from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, collapse_model, remove_layer_collapse
from hf_layercollapse.patching import refresh_layer_collapse

from .models import BY_NAME, needs_registration, randomize, registered
from .test_families import (
    bert_config,
    llama_config,
    tiny_bart,
    tiny_clip,
    tiny_gpt2,
    tiny_t5,
    tiny_whisper,
)
from .test_patching import alphas, every_model, set_alphas


LIVES = {
    "patched": LayerCollapseConfig(initial_alpha=0.5),
    "affine": LayerCollapseConfig(initial_alpha=0.5, linear_target="affine"),
    "neurons": LayerCollapseConfig(initial_alpha=0.5, granularity="neuron"),
    "collapsed": LayerCollapseConfig(),
    "narrow": LayerCollapseConfig(keep_neurons=4),
    "narrow, low rank": LayerCollapseConfig(rank=4, keep_neurons=4),
    "low rank": LayerCollapseConfig(rank=4),
    "width cut": LayerCollapseConfig(rank=0, keep_neurons=4),
}
every_life = pytest.mark.parametrize("life", LIVES)


def given(model, life, data):
    """A native model in one of its lives, in memory."""
    config = LIVES[life]
    if life in ("patched", "affine", "neurons"):
        apply_layer_collapse(model, config, data if life == "affine" else None)
    else:
        collapse_model(model, config, calibration_data=data)
    return model.eval()


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert [name for name in before if not torch.equal(after[name], before[name])] == []


# ----------------------------------------------------------------------------------------------------
# Weights that a model was given stay where it is built into another
# ----------------------------------------------------------------------------------------------------


@every_model
@every_life
def test_first_values_are_not_given_again(case, life):
    model = given(case.model(), life, [case.inputs(seed=seed) for seed in range(4)])
    for each in (model, copy.deepcopy(model)):
        before = weights(each)
        each.init_weights()
        each.post_init()
        assert_unchanged(each, before)


@pytest.mark.parametrize("build", [tiny_t5, tiny_bart, tiny_gpt2, tiny_clip, tiny_whisper])
def test_first_values_are_not_given_again_in_other_families(build):
    model = apply_layer_collapse(build())
    set_alphas(model, 1.0)
    collapse_model(model)
    before = weights(model)
    model.init_weights()
    assert_unchanged(model, before)


def text_decoder():
    return BertLMHeadModel(bert_config(is_decoder=True, add_cross_attention=True))


class Around(BertPreTrainedModel):
    """A model of the user's own around a finished one."""

    def __init__(self, config, inner):
        super().__init__(config)
        self.inner = inner
        self.head = nn.Linear(16, 3)
        self.post_init()


OUTER = {
    "encoder-decoder": ("bert", lambda inner: EncoderDecoderModel(encoder=inner, decoder=text_decoder())),
    "own": ("bert", lambda inner: Around(bert_config(), inner)),
    "vision encoder": ("vit", lambda inner: VisionEncoderDecoderModel(encoder=inner, decoder=text_decoder())),
    "two encoders": (
        "vit",
        lambda inner: VisionTextDualEncoderModel(vision_model=inner, text_model=BertModel(bert_config())),
    ),
}


@pytest.mark.parametrize("outer", OUTER)
@every_life
def test_first_values_are_not_given_by_a_model_around(outer, life):
    name, around = OUTER[outer]
    case = BY_NAME[name]
    inner = randomize(AutoModel.from_config(case.config())).eval()
    given(inner, life, [case.inputs(seed=seed) for seed in range(4)])
    before = weights(inner)
    around(inner)
    assert_unchanged(inner, before)


@pytest.mark.parametrize("life", ["patched", "collapsed", "narrow"])
def test_first_values_of_what_is_new(life):
    # Built anew from a config, a model has the first values that its family gives.
    case = BY_NAME["bert"]
    model = given(case.model(), life, [case.inputs(seed=seed) for seed in range(4)])
    torch.manual_seed(0)
    new = case.auto_class.from_config(model.config)
    native = dict(case.auto_class.from_config(case.config()).named_parameters())
    for name, value in new.named_parameters():
        if name.endswith(".alpha"):
            assert value.item() == 0.0
        elif value.dim() == 2:
            assert 0.01 < value.std() < 0.03, name
        elif name in native and "LayerNorm" in name:
            assert torch.equal(value, native[name]), name
        else:
            assert not value.any(), name
    # And where an alpha is taken away, what stays has its own values.
    if life == "patched":
        before = weights(model)
        remove_layer_collapse(model)
        model.init_weights()
        assert_unchanged(model, {name: value for name, value in before.items() if not name.endswith(".alpha")})


# ----------------------------------------------------------------------------------------------------
# What is kept by the name of a class
# ----------------------------------------------------------------------------------------------------


def captured(model, inputs, how):
    """How many hidden states and attentions a forward pass gives, asked for by an argument or by the config."""
    wanted = {"output_hidden_states": True, "output_attentions": True}
    for name, value in wanted.items():
        setattr(model.config, name, value if how == "config" else False)
    outputs = model(**inputs, **(wanted if how == "argument" else {}))
    return len(outputs.hidden_states), len(outputs.attentions)


@needs_registration
@every_model
@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("life", ["patched", "collapsed"])
def test_hidden_states_and_attentions_of_a_class_that_was_never_constructed(case, life, how):
    base = AutoModel._model_mapping[type(case.config())]
    base = base[0] if isinstance(base, tuple) else base
    fresh = type(base.__name__, (base,), {"__module__": __name__})  # nobody else's, so nothing is kept by its name
    config = case.config()
    config._attn_implementation = "eager"
    model = fresh(config).eval()
    with registered(AutoModel, type(config), fresh):
        apply_layer_collapse(model, LayerCollapseConfig(initial_alpha=1.0))
        if life == "collapsed":
            collapse_model(model)
    assert captured(model, case.inputs(), how) == captured(base(config).eval(), case.inputs(), how) == (4, 3)


def namesake(layer_class):
    """A model class with the name of every other that this makes, which records what its own layers give."""

    class Namesake(BertPreTrainedModel):
        _can_record_outputs = {"hidden_states": layer_class}

        def __init__(self, config):
            super().__init__(config)
            self.bert = BertModel(config)
            self.layer = layer_class()
            self.post_init()

        @capture_outputs(tie_last_hidden_states=False)
        def forward(self, input_ids, **kwargs):
            return BaseModelOutput(last_hidden_state=self.layer(self.bert(input_ids).last_hidden_state))

    Namesake.__module__ = f"repository_{layer_class.__name__}"
    return Namesake


class One(nn.Identity):
    pass


class Other(nn.Identity):
    pass


@needs_registration
def test_namesakes_record_each_their_own():
    models = [namesake(layer)(bert_config()).eval() for layer in (One, Other)]
    for model in models:
        with registered(AutoModel, BertConfig, type(model)):
            apply_layer_collapse(model)
    for model in models:
        assert len(model(torch.arange(3, 9)[None], output_hidden_states=True).hidden_states) == 2


# ----------------------------------------------------------------------------------------------------
# Constructors
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [lambda: BertForSequenceClassification(bert_config()), tiny_gpt2, tiny_clip])
def test_a_constructor_looks_like_the_native_one(build):
    native = type(build())
    built = type(apply_layer_collapse(build()))
    assert built is not native
    assert inspect.signature(built.__init__) == inspect.signature(native.__init__)
    assert inspect.signature(built) == inspect.signature(native)
    assert built.__init__.__doc__ == native.__init__.__doc__
    assert inspect.signature(built.config_class) == inspect.signature(native.config_class)


@every_model
def test_a_class_generates_as_the_native_one_does(case):
    native = type(case.model())
    built = type(apply_layer_collapse(case.model()))
    for each in (native, built):
        # What transformers looks at, and its own model tests.
        assert ("GenerationMixin" in str(each.__bases__)) is (case.name == "gpt2")
        assert each.can_generate() is (case.name == "gpt2")


def test_arguments_of_a_constructor():
    model = apply_layer_collapse(BertModel(bert_config()))
    for new in (type(model)(model.config, add_pooling_layer=False), type(model)(config=model.config)):
        assert alphas(new) and type(new) is type(model)
    assert type(model)(model.config, False).pooler is None


def test_a_native_config_is_refused_with_the_remedy():
    model = apply_layer_collapse(BertModel(bert_config()))
    for arguments in ((bert_config(),), ()):
        with pytest.raises(TypeError, match="is patched or collapsed as its config says"):
            type(model)(*arguments)


# ----------------------------------------------------------------------------------------------------
# Heads that make their base model from the config of the whole
# ----------------------------------------------------------------------------------------------------


def llama_head(life, auto_class=AutoModelForSequenceClassification):
    model = randomize(auto_class.from_config(llama_config())).eval()
    model.config.pad_token_id = 0
    return given(model, life, [{"input_ids": torch.randint(3, 64, (2, 7))} for _ in range(4)])


@pytest.mark.parametrize("life", ["patched", "collapsed", "narrow"])
@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_loaded_head_is_saved_again(auto_class, life, tmp_path):
    model = llama_head(life, auto_class)
    before = weights(model)
    for round in range(3):
        model.save_pretrained(tmp_path / str(round))
        model = auto_class.from_pretrained(tmp_path / str(round))
        assert_unchanged(model, before)
    assert model.model.config is model.config
    if life == "patched":
        set_alphas(model, 1.0)
        collapse_model(model)
        # As natively: what the whole is told, its base model knows.
        assert model.model.config is model.config
        model.save_pretrained(tmp_path / "collapsed")
        assert_unchanged(auto_class.from_pretrained(tmp_path / "collapsed"), weights(model))


def test_a_head_whose_base_became_another_is_still_refused(tmp_path):
    llama_head("collapsed").save_pretrained(tmp_path / "all")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "all")
    other = AutoModel.from_config(llama_config())
    apply_layer_collapse(other, LayerCollapseConfig(blocks=[1]))
    model.model = other
    with pytest.raises(ValueError, match="is not what its config describes.*refresh_layer_collapse"):
        model.save_pretrained(tmp_path / "again")
    refresh_layer_collapse(model)
    before = weights(model)
    model.save_pretrained(tmp_path / "again")
    assert_unchanged(AutoModelForSequenceClassification.from_pretrained(tmp_path / "again"), before)
