"""Transformers models inside other modules: the user's own around one, several, nested or shared."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, BertModel, Trainer

from hf_layercollapse import (
    LayerCollapseCallback,
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    remove_layer_collapse,
)
from hf_layercollapse.modeling_layercollapse import LayerCollapseModelMixin
from tests.models import BY_NAME, LAYERS, WIDTH, randomize, text_inputs
from tests.training import SetAlphas, alphas_of, assert_same, set_alphas, state_of, trainer_for


CASE = BY_NAME["bert"]
TEXT = text_inputs()


def backbone(seed=0, config=None):
    config = CASE.config() if config is None else config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(seed)
    return randomize(BertModel(config, add_pooling_layer=False), seed).eval()


class Net(nn.Module):
    """What a user writes: a backbone and a head of its own."""

    def __init__(self, inner=None):
        super().__init__()
        self.backbone = backbone() if inner is None else inner
        self.config = self.backbone.config
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.backbone(input_ids=input_ids).last_hidden_state.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Towers(nn.Module):
    """Two models, of one config object, at different depths."""

    def __init__(self):
        super().__init__()
        config = CASE.config()
        self.first = backbone(1, config)
        self.rest = nn.ModuleDict({"second": nn.Sequential(backbone(2, config))})

    def forward(self, input_ids):
        inner = self.rest["second"][0]
        return self.first(input_ids=input_ids)[0] + inner(input_ids=input_ids)[0]


def kind(model):
    table = model.config.__dict__.get("layer_collapse")
    assert isinstance(model, LayerCollapseModelMixin) == bool(table)
    return {spec["type"] for spec in table["modules"].values()} if table else set()


def assert_comes_back(model, folder):
    model.save_pretrained(folder)
    loaded = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    assert_same(state_of(loaded), state_of(model))
    with torch.no_grad():
        assert torch.equal(loaded(**TEXT)[0], model.eval()(**TEXT)[0])


# ---- In memory, and what is saved ----


def patched(net):
    apply_layer_collapse(net, LayerCollapseConfig(blocks="last:2"))
    set_alphas(net, 0.25, 0.75)


def affine(net):
    apply_layer_collapse(net, LayerCollapseConfig(linear_target="affine"), calibration_data=[TEXT])
    set_alphas(net, *[0.5] * LAYERS)


def merged(net):
    apply_layer_collapse(net, LayerCollapseConfig(blocks=[0, 1]))
    set_alphas(net, 1.0, 0.5)
    assert len(collapse_model(net).collapsed) == 1


def narrow(net):
    collapse_model(net, LayerCollapseConfig(rank=3, keep_neurons=2), calibration_data=[text_inputs(batch=40)])


@pytest.mark.parametrize(
    "change, kinds",
    [
        (patched, {"activation"}),
        (affine, {"activation"}),
        (merged, {"activation", "linear", "identity"}),
        (narrow, {"linear", "narrow_ffn"}),
    ],
)
def test_the_model_inside_says_what_it_is(change, kinds, tmp_path):
    native = backbone(seed=5)
    net = Net(backbone(config=native.config))
    inner = net.backbone
    change(net)
    assert net.backbone is inner and kind(inner) == kinds
    # The config is a copy, also where the module around holds it; another model's stays.
    assert net.config is inner.config is not native.config and kind(native) == set()
    assert_comes_back(inner, tmp_path)
    assert kind(copy.deepcopy(net).backbone) == kinds


def test_a_patched_model_inside_goes_back_to_dense(tmp_path):
    net = Net()
    before = state_of(net)
    apply_layer_collapse(net)
    remove_layer_collapse(net)
    assert type(net.backbone) is BertModel and kind(net.backbone) == set() and net.config is net.backbone.config
    assert_same(state_of(net), before)
    assert_comes_back(net.backbone, tmp_path)


def test_each_of_several_models_has_its_own_table(tmp_path):
    net = Towers()
    second = net.rest["second"][0]
    second.name_or_path = second.config._name_or_path = "somewhere"
    apply_layer_collapse(net, LayerCollapseConfig(blocks="first"))
    assert kind(net.first) == {"activation"} and type(second) is BertModel and second.name_or_path == "somewhere"
    set_alphas(net, *[1.0] * LAYERS)
    collapse_model(net)
    apply_layer_collapse(net, LayerCollapseConfig(blocks=r".*second.*layer\.0"))
    assert kind(net.first) == {"linear", "identity"} and kind(second) == {"activation"}
    assert_comes_back(net.first, tmp_path / "first")
    assert_comes_back(second, tmp_path / "second")


def test_models_that_share_a_part_both_have_it_in_their_tables(tmp_path):
    net = Towers()
    net.rest["second"][0].encoder = net.first.encoder
    apply_layer_collapse(net)
    set_alphas(net, *[1.0] * LAYERS)
    assert len(collapse_model(net).collapsed) == LAYERS
    for name, model in {"first": net.first, "second": net.rest["second"][0]}.items():
        assert_comes_back(model, tmp_path / name)


def test_a_model_that_is_reached_twice_is_one_model(tmp_path):
    """Once more by itself, as a part of another, and in front of it."""
    head = CASE.model()
    net = nn.ModuleDict({"part": head.bert, "whole": head, "again": head})
    apply_layer_collapse(net)
    assert kind(head) == {"activation"} and type(head.bert) is type(CASE.model().bert)
    head.save_pretrained(tmp_path)
    assert_same(state_of(CASE.auto_class.from_pretrained(tmp_path)), state_of(head))


def test_under_an_adapter_inside():
    """Which is around the model inside, and must not name the dense folder as its base."""
    inner = backbone()
    inner.name_or_path = inner.config._name_or_path = "dense"
    net = Net(get_peft_model(inner, LoraConfig(target_modules=["query"])))
    assert net.backbone.peft_config["default"].base_model_name_or_path == "dense"
    apply_layer_collapse(net)
    assert kind(inner) == {"activation"} and isinstance(net.backbone, PeftModel)
    assert net.backbone.config is net.config is inner.config
    assert net.backbone.peft_config["default"].base_model_name_or_path is None
    assert inner.name_or_path == ""


def test_a_wrapped_model_inside_is_refused_by_name():
    net = Net()
    net.backbone = nn.DataParallel(net.backbone)
    before = state_of(net)
    for verb in (apply_layer_collapse, find_feed_forward_blocks, collapse_model):
        with pytest.raises(TypeError, match="`backbone` is wrapped in DataParallel"):
            verb(net)
    assert_same(state_of(net), before)


class OwnBert(BertModel):
    """Of which no Auto class knows."""


def test_code_of_the_users_own_inside_is_refused():
    net = Towers()
    net.rest["second"][0].__class__ = OwnBert
    before = state_of(net)
    for change in (patched, narrow):
        with pytest.raises(ValueError, match="OwnBert"):
            change(net)
    assert_same(state_of(net), before)
    assert kind(net.first) == set()
    apply_layer_collapse(net, LayerCollapseConfig(blocks="first"))  # which leaves it alone
    assert kind(net.first) == {"activation"}


def test_models_patched_with_different_options(tmp_path):
    net = Towers()
    apply_layer_collapse(net.first, LayerCollapseConfig(collapse_threshold=0.1))
    apply_layer_collapse(net.rest["second"][0], LayerCollapseConfig(collapse_threshold=0.2))
    set_alphas(net, *[0.85] * 2 * LAYERS)
    with pytest.raises(ValueError, match="`first` and `rest.second.0` of this Towers .* with different options"):
        collapse_model(net)
    assert kind(net.first) == {"activation"}
    report = collapse_model(net, LayerCollapseConfig(collapse_threshold=0.15))
    assert len(report.collapsed) == 2 * LAYERS
    assert net.first.config.layer_collapse["options"]["collapse_threshold"] == 0.1


# ---- Training ----

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "linear"}


def trainer_of(net, folder, config=None, args=None, **kwargs):
    config = LayerCollapseConfig(alpha_learning_rate=0.1) if config is None else config
    return trainer_for("bert", folder, config=config, model=net, args={**SAVING, **(args or {})}, **kwargs)


def test_resumed_equals_uninterrupted(tmp_path):
    whole = trainer_of(Net(), tmp_path)
    whole.train()
    assert kind(whole.model.backbone) == {"activation"}
    resumed = trainer_of(Net(), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(state_of(resumed.model), state_of(whole.model))
    assert 0 < min(float(alpha) for alpha in alphas_of(whole.model).values()) < 1
    assert_comes_back(whole.model.backbone, tmp_path / "inner")


def test_a_progressive_run_resumes_equal(tmp_path):
    config = LayerCollapseConfig(progressive=True, alpha_learning_rate=0.1)
    args = {"eval_strategy": "steps", "eval_steps": 1}

    def trainer():
        net = Net()
        schedule = [(0.1, 0.2, 1.0), (0.2, 0.3), (0.4, 1.0), (0.5,)]
        return trainer_of(net, tmp_path, config, args, callbacks=[SetAlphas(schedule)])

    torch.manual_seed(0)
    whole = trainer()
    whole.train()
    assert kind(whole.model.backbone) == {"activation", "linear", "identity"}
    torch.manual_seed(0)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(state_of(resumed.model), state_of(whole.model))
    assert resumed.model.backbone.config.layer_collapse == whole.model.backbone.config.layer_collapse
    assert_comes_back(whole.model.backbone, tmp_path / "inner")


def test_the_best_checkpoint_comes_back(tmp_path):
    values = [0.9, 0.9, 0.1, 0.1]  # two passes each
    args = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = trainer_of(
        Net(),
        tmp_path,
        args={**args, "metric_for_best_model": "accuracy"},
        compute_metrics=lambda prediction: {"accuracy": values.pop(0)},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    logged = next(log for log in trainer.state.log_history if log["step"] == 2)
    for i, alpha in enumerate(alphas_of(trainer.model).values()):
        assert float(alpha) == pytest.approx(logged[f"layer_collapse/alpha/{i}"])


@pytest.mark.parametrize("life", ["dense", "collapsed", "other blocks"])
def test_a_checkpoint_of_another_life_is_refused(life, tmp_path):
    trainer_of(Net(), tmp_path).train()
    other = Net()
    if life == "collapsed":
        merged(other)
    config = LayerCollapseConfig(blocks="last:1") if life == "other blocks" else False
    trainer = trainer_of(other, tmp_path, config)
    before = state_of(other)
    with pytest.raises(ValueError, match=r"holds `backbone` that is patched \(3 alphas\), and the model here is"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(state_of(other), before)


def test_a_checkpoint_that_lost_its_alphas_is_refused(tmp_path):
    """Also one that does not say what it holds."""
    trainer_of(Net(), tmp_path).train()
    (tmp_path / "checkpoint-2" / "layer_collapse_tables.json").unlink()
    other = trainer_of(Net(), tmp_path, LayerCollapseConfig(blocks="last:1"))
    with pytest.raises(ValueError, match="unexpected .*alpha"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_callback_patches_the_model_inside(tmp_path):
    net = Net()
    callback = LayerCollapseCallback(LayerCollapseConfig(alpha_learning_rate=0.2))
    trainer_for("bert", tmp_path, False, net, Trainer, args={"max_steps": 2}, callbacks=[callback]).train()
    assert kind(net.backbone) == {"activation"} and min(map(float, alphas_of(net).values())) > 0.3
    assert_comes_back(net.backbone, tmp_path / "inner")


def test_options_of_a_run_are_recorded_in_the_model_inside(tmp_path):
    """Also where the model inside was patched before, by itself."""
    net = Net()
    apply_layer_collapse(net.backbone)
    net.backbone.name_or_path = net.backbone.config._name_or_path = "saved"
    trainer_of(net, tmp_path, LayerCollapseConfig(penalty_strength=2.0))
    assert net.backbone.config.layer_collapse["options"]["penalty_strength"] == 2.0
    assert net.backbone.name_or_path == "saved"  # nothing was changed
    trainer = trainer_of(net, tmp_path, False)
    assert trainer.layer_collapse_config.penalty_strength == 2.0


def test_a_checkpoint_does_not_name_the_model(tmp_path):
    net = Net()
    trainer_of(net, tmp_path).train()
    assert net.backbone.name_or_path == ""
    tables = json.loads((tmp_path / "checkpoint-4" / "layer_collapse_tables.json").read_text())
    assert tables == {"backbone": net.backbone.config.layer_collapse["modules"]}
