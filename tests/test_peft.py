"""Adapters over patched and collapsed models: training, checkpoints, the collapse, and what comes back."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AutoPeftModel,
    AutoPeftModelForSequenceClassification,
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForSequenceClassification, OPTConfig, OPTForCausalLM, Trainer, TrainerCallback

from hf_layercollapse import (
    LayerCollapseCallback,
    LayerCollapseConfig,
    LayerCollapseTrainer,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
)
from hf_layercollapse.patching import alpha_parameters
from tests.models import BY_NAME, HIDDEN, LAYERS, VOCABULARY, WIDTH, randomize, text_inputs
from tests.training import (
    NEWER_PEFT,
    adapters_of_transformers,
    alphas_of,
    assert_same,
    model_of,
    set_alphas,
    state_of,
    trainer_for,
)


CASE = BY_NAME["bert"]
FAST = {"alpha_learning_rate": 0.4}
ALPHAS = {"modules_to_save": ["intermediate_act_fn"]}


def lora(**options):
    targets = ["query", "intermediate.dense", "output.dense"]
    return LoraConfig(**{"task_type": "SEQ_CLS", "r": 2, "target_modules": targets, **options})


def with_adapter(model, how="saved", **options):
    """Under LoRA, with the alphas trainable: in the adapter, or just unfrozen."""
    model = get_peft_model(model, lora(**(ALPHAS if how == "saved" else {}), **options))
    if how == "unfrozen":
        unfreeze_alphas(model)
    return model


def unfreeze_alphas(model):
    for name, parameter in model.named_parameters():
        if name.endswith(".alpha"):
            parameter.requires_grad_(True)


class Thaw(TrainerCallback):
    """Alphas train from the second step on."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        unfreeze_alphas(model)


def trainer_by(way, folder, model, config=None, callbacks=(), **args):
    """A trainer with the mixin or the callback."""
    ours = [LayerCollapseCallback(config)] if way == "callback" else []
    return trainer_for(
        "bert",
        folder,
        config=False if way == "callback" or config is None else config,
        trainer_class=Trainer if way == "callback" else LayerCollapseTrainer,
        model=model,
        callbacks=[*ours, *callbacks],
        args=args,
    )


def patched_on_disk(folder, **options):
    model = apply_layer_collapse(model_of(CASE), LayerCollapseConfig(**{**FAST, **options}))
    model.save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder)


@torch.no_grad()
def logits(model):
    return model.eval()(**CASE.inputs(batch=4)).logits


# ---- Training ----


@pytest.mark.smoke
@pytest.mark.parametrize("how", ["saved", "unfrozen"])
def test_train_and_collapse(how, tmp_path):
    model = with_adapter(apply_layer_collapse(model_of(CASE), LayerCollapseConfig(**FAST)), how)
    trainer = trainer_for("bert", tmp_path, config=False, model=model, args={"max_steps": 4, "learning_rate": 1e-2})
    with pytest.raises(ValueError, match="No block is ready"):
        trainer.collapse()
    assert trainer.model is model and any("lora_" in name for name, _ in model.named_parameters())
    trainer.train()
    expected = trainer.evaluate()["eval_collapsed_loss"]
    report = trainer.collapse()
    assert len(report.collapsed) == LAYERS
    # The adapter is in the weights, and the model an ordinary one.
    assert trainer.model is model.get_base_model() and not isinstance(trainer.model, PeftModel)
    assert not any("lora_" in name or "modules_to_save" in name for name in trainer.model.state_dict())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    trainer.save_model(str(tmp_path / "collapsed"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "collapsed")
    assert_same(state_of(loaded), state_of(trainer.model))


@pytest.mark.parametrize("how", ["saved", "unfrozen"])
def test_neurons_collapse_in_part(how, tmp_path):
    """With an adapter to merge a block is ready when it is without one."""
    model = with_adapter(apply_layer_collapse(model_of(CASE), LayerCollapseConfig(granularity="neuron")), how)
    trainer = trainer_for("bert", tmp_path, config=False, model=model)
    for alpha in alpha_parameters(model):
        alpha.data[: HIDDEN * 9 // 10] = 0.97 * alpha.requires_grad
    expected = trainer.evaluate()["eval_collapsed_loss"]
    assert trainer.state.log_history[-1]["layer_collapse/ready_blocks"] == pytest.approx(0.9 * LAYERS)
    assert [block.kept_neurons for block in trainer.collapse().blocks] == [4] * LAYERS
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_adapters_elsewhere_stay(tmp_path):
    model = with_adapter(
        apply_layer_collapse(model_of(CASE), LayerCollapseConfig(**FAST)), "unfrozen", target_modules=["query"]
    )
    trainer = trainer_for("bert", tmp_path, config=False, model=model, args={"max_steps": 4})
    trainer.train()
    assert len(trainer.collapse().collapsed) == LAYERS
    assert trainer.model is model and any("lora_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("how", ["saved", "unfrozen"])
def test_resumed_equals_uninterrupted(how, tmp_path):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    config = LayerCollapseConfig(alpha_learning_rate=0.05)

    def trainer():
        model = with_adapter(apply_layer_collapse(model_of(CASE), config), how, init_lora_weights="gaussian")
        return trainer_for("bert", tmp_path, config=False, model=model, args=args)

    torch.manual_seed(0)
    whole = trainer()
    whole.train()
    torch.manual_seed(0)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(state_of(resumed.model), state_of(whole.model))
    assert len({round(float(alpha), 4) for alpha in alphas_of(whole.model).values()}) > 1
    if how == "unfrozen":
        (tmp_path / "checkpoint-2" / "layer_collapse_alphas.safetensors").unlink()
        with pytest.raises(ValueError, match="holds 0 alphas beside its adapter, and the model here trains 3"):
            trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_best_adapter_comes_with_its_alphas(tmp_path):
    args = {
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
    }
    values = [0.9, 0.1, 0.1]
    model = with_adapter(
        apply_layer_collapse(model_of(CASE), LayerCollapseConfig(alpha_learning_rate=0.1)), "unfrozen"
    )
    trainer = trainer_for(
        "bert",
        tmp_path,
        config=False,
        model=model,
        args=args,
        compute_metrics=lambda prediction: {"accuracy": values.pop(0)},
    )
    trainer.train()
    logged = trainer.state.log_history[0]["layer_collapse/alpha/0"]
    assert float(next(iter(alphas_of(model).values()))) == pytest.approx(logged)


def test_an_adapter_that_would_lose_alphas_is_not_resumed(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 1}
    patched = with_adapter(apply_layer_collapse(model_of(CASE), LayerCollapseConfig(**FAST)))
    trainer_for("bert", tmp_path, config=False, model=patched, args=args).train()
    other = with_adapter(model_of(CASE))
    with pytest.raises(ValueError, match="holds 3 alphas, and the one here trains 0"):
        trainer_for("bert", tmp_path, config=False, model=other, args=args).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


def test_adapters_refused_by_the_config():
    model = with_adapter(apply_layer_collapse(model_of(CASE), LayerCollapseConfig(adapters="refuse")))
    set_alphas(model, *[1.0] * 2 * LAYERS)
    before = state_of(model)
    with pytest.raises(ValueError, match='adapters="merge"'):
        collapse_model(model)
    assert_same(state_of(model), before)


@pytest.mark.parametrize("how", ["saved", "unfrozen"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_collapse_that_is_refused_leaves_the_adapter(how, dora, tmp_path):
    """Which had to be merged to tell, bit for bit and able to train on."""
    model = apply_layer_collapse(model_of(CASE), LayerCollapseConfig(**FAST))
    model = with_adapter(model, how, init_lora_weights=False, use_dora=dora)
    names = [name for name, _ in model.named_modules()]
    set_alphas(model, *[0.97] * (2 * LAYERS if how == "saved" else LAYERS))
    before, expected = state_of(model), logits(model)
    with pytest.raises(ValueError, match="above max_error=0.0; nothing was changed"):
        collapse_model(model, max_error=0.0)
    assert isinstance(model, PeftModel) and [name for name, _ in model.named_modules()] == names
    assert_same(state_of(model), before)
    assert torch.equal(logits(model), expected)
    trainer = trainer_for("bert", tmp_path, config=False, model=model, args={"max_steps": 2, "learning_rate": 1e-2})
    trainer.train()
    trained = state_of(model)
    assert not torch.equal(logits(model), expected)
    assert {name for name in before if not torch.equal(before[name], trained[name])} > {
        name for name in before if "lora_A" in name
    }
    with model.disable_adapter():  # no longer merged in
        bare = logits(model)
    assert not torch.equal(bare, logits(model))
    assert len(collapse_model(model).collapsed) == LAYERS


def test_a_quantized_base_is_refused_before_its_adapter_is_merged():
    model = with_adapter(apply_layer_collapse(model_of(CASE), LayerCollapseConfig()))
    set_alphas(model, *[1.0] * 2 * LAYERS)
    base = model.get_base_model().bert.encoder.layer[0].output.dense.base_layer
    base.weight = nn.Parameter(base.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="is quantized .* Load the model without quantization, collapse it"):
        collapse_model(model)
    assert any("lora_" in name for name, _ in model.named_parameters())


# ---- What comes back ----


def test_adapters_on_a_collapsed_model(tmp_path):
    model = apply_layer_collapse(model_of(CASE), LayerCollapseConfig())
    set_alphas(model, *[1.0] * LAYERS)
    collapse_model(model)
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora(target_modules=["query", "output.dense"]))
    trainer = trainer_for("bert", tmp_path, config=False, model=model, args={"max_steps": 3, "learning_rate": 1e-2})
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert {block.state for block in find_feed_forward_blocks(loaded)} == {"collapsed"}
    assert torch.equal(logits(loaded), logits(model))


def test_adapters_on_a_patched_model(tmp_path):
    """Second case: the alphas that `modules_to_save` trained are there again."""
    model = with_adapter(patched_on_disk(tmp_path / "base"))
    trainer = trainer_for("bert", tmp_path, config=False, model=model, args={"max_steps": 3})
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    trained = {name: alpha for name, alpha in alphas_of(loaded).items() if ".modules_to_save." in name}
    assert len(trained) == LAYERS and all(float(alpha) > 0.5 for alpha in trained.values())
    # None of them trains here: what counts are the adapter's all the same.
    assert len(collapse_model(loaded).collapsed) == LAYERS
    assert not any("lora_" in name for name, _ in loaded.get_base_model().named_parameters())


@pytest.mark.parametrize("when", ["before", "after", "collapsed"])
def test_an_adapter_over_what_is_only_in_memory_is_not_saved(when, tmp_path):
    """First case: its base would be the dense folder that the model came from."""
    model_of(CASE).save_pretrained(tmp_path / "dense")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    if when == "before":
        apply_layer_collapse(model)
    model = with_adapter(model, "none", target_modules=["query"])
    if when != "before":
        # peft has noted the dense folder.
        assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "dense")
        apply_layer_collapse(model)
    if when == "collapsed":
        set_alphas(model, *[1.0] * LAYERS)
        collapse_model(model)
    with pytest.raises(ValueError, match="Save the base first"):
        model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="Save the base first"):
        trainer_for("bert", tmp_path, config=False, model=model).save_model(str(tmp_path / "adapter"))
    assert not list((tmp_path / "adapter").iterdir())

    # As it says, even though the adapter's layers are inside by now.
    expected = logits(model)
    model.get_base_model().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    assert {b.state for b in find_feed_forward_blocks(loaded)} == {"collapsed" if when == "collapsed" else "patched"}


def test_a_model_without_its_adapter_is_not_saved_beside_that(tmp_path):
    """It would be loaded with the adapter on top, a second time."""
    if not adapters_of_transformers():
        pytest.skip(NEWER_PEFT)
    model = collapsed_with_adapter(LoraConfig(target_modules=["query"], init_lora_weights=False))
    for _ in range(2):  # base and adapter in one folder, and both again
        model.get_base_model().save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match=r"adapter_config.json is of an adapter, and .* Save into another folder"):
        merged.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
    merged.save_pretrained(tmp_path / "merged")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).unlink()
    merged.save_pretrained(tmp_path)
    loaded = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in (tmp_path, tmp_path / "merged")]
    assert all(torch.equal(logits(each), logits(merged)) for each in loaded)


def test_a_base_is_saved_again_beside_prompts(tmp_path):
    """They are no part of it."""
    model = collapsed_with_adapter(PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"))
    for _ in range(2):
        model.get_base_model().save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)


def collapsed_with_adapter(config):
    model = apply_layer_collapse(model_of(CASE))
    set_alphas(model, *[1.0] * LAYERS)
    collapse_model(model)
    return get_peft_model(model, config)


@pytest.mark.parametrize("when", ["before", "after", "collapsed"])
def test_transformers_own_adapter_over_what_is_only_in_memory_is_not_saved(when, tmp_path):
    if not adapters_of_transformers():
        pytest.skip(NEWER_PEFT)
    model_of(CASE).save_pretrained(tmp_path / "dense")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    if when == "after":
        model.add_adapter(LoraConfig(target_modules=["query"], init_lora_weights=False))
    apply_layer_collapse(model)
    if when == "collapsed":
        set_alphas(model, *[1.0] * LAYERS)
        collapse_model(model)
    if when != "after":
        model.add_adapter(LoraConfig(target_modules=["query"], init_lora_weights=False))
    for save in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(ValueError, match="Save the model first"):
            save(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter").exists()

    # As it says.
    expected = logits(model)
    base = copy.deepcopy(model)
    base.delete_adapter(list(base.peft_config))
    base.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    assert {b.state for b in find_feed_forward_blocks(loaded)} == {"collapsed" if when == "collapsed" else "patched"}


@pytest.mark.parametrize("way", ["mixin", "callback"])
@pytest.mark.parametrize("how", ["unfrozen", "thawed"])
def test_a_base_whose_alphas_were_trained_is_not_the_saved_one(how, way, tmp_path):
    model = with_adapter(patched_on_disk(tmp_path / "base"), how)
    trainer = trainer_by(way, tmp_path, model, callbacks=[Thaw()] if how == "thawed" else [], max_steps=2)
    trainer.train()
    with pytest.raises(ValueError, match="Save the base first"):
        trainer.save_model(str(tmp_path / "adapter"))
    model.get_base_model().save_pretrained(tmp_path / "trained")
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert all(float(alpha) > 0.3 for alpha in alphas_of(loaded).values())


@pytest.mark.parametrize("way", ["mixin", "callback"])
def test_a_base_under_transformers_own_adapter_whose_alphas_were_trained_is_not_the_saved_one(way, tmp_path):
    if not adapters_of_transformers():
        pytest.skip(NEWER_PEFT)
    model = patched_on_disk(tmp_path / "base")
    model.add_adapter(LoraConfig(target_modules=["query"]))
    unfreeze_alphas(model)
    trainer_by(way, tmp_path, model).train()
    with pytest.raises(ValueError, match="Save the model first"):
        model.save_pretrained(tmp_path / "adapter")


SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("how", ["saved", "patched by the callback"])
def test_a_callback_refuses_adapters_without_a_base_before_the_first_step(how, tmp_path):
    if how == "saved":
        model, config = with_adapter(apply_layer_collapse(model_of(CASE))), None
    else:
        model_of(CASE).save_pretrained(tmp_path / "dense")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
        model, config = with_adapter(model, "none"), LayerCollapseConfig()
    trainer = trainer_by("callback", tmp_path, model, config, **SAVING)
    with pytest.raises(ValueError, match="patched in memory.*`modules_to_save`; .* or its mixin, whose"):
        trainer.train()
    assert trainer.state.global_step == 0 and not any(alphas_of(model).values())


@pytest.mark.parametrize("how", ["unfrozen", "thawed", "resumed"])
def test_a_callback_refuses_checkpoints_that_lose_alphas(how, tmp_path):
    def model():
        return with_adapter(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), how)

    patched_on_disk(tmp_path / "base")
    before = model()
    if how == "resumed":
        trainer_by("callback", tmp_path, before, **SAVING, save_only_model=True).train()  # they are frozen
        before = model()
        unfreeze_alphas(before)
        trainer, resume = trainer_by("callback", tmp_path, before, max_steps=2), str(tmp_path / "checkpoint-1")
    else:
        callbacks = [Thaw()] if how == "thawed" else []
        trainer, resume = trainer_by("callback", tmp_path, before, callbacks=callbacks, **SAVING), None
    with pytest.raises(ValueError, match="3 alphas train under adapters, .*`modules_to_save` .* or its mixin, whose"):
        trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == (0 if how == "unfrozen" else 1) and not any(alphas_of(before).values())


@pytest.mark.parametrize("way", ["mixin", "callback"])
def test_alphas_in_the_adapter_are_in_the_checkpoints(way, tmp_path):
    """Also where the options are given once more."""
    config = LayerCollapseConfig(alpha_learning_rate=0.05)
    patched_on_disk(tmp_path / "base")

    def trainer(**args):
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        return trainer_by(way, tmp_path, with_adapter(base), config, **args)

    whole = trainer(**SAVING)
    whole.train()
    resumed = trainer(max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(state_of(resumed.model), state_of(whole.model))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert_same(alphas_of(loaded), alphas_of(whole.model))
    assert 0.15 < max(map(float, alphas_of(loaded).values())) < 0.25


def test_a_checkpoint_over_what_is_only_in_memory_does_not_load_without_it(tmp_path):
    """It resumes in the live model, and names no folder that AutoPeft could take for its base."""
    model = with_adapter(apply_layer_collapse(model_of(CASE), LayerCollapseConfig(**FAST)))
    trainer = trainer_for(
        "bert", tmp_path, config=False, model=model, args={"save_strategy": "steps", "save_steps": 1}
    )
    trainer.train()
    stored = json.loads((tmp_path / "checkpoint-1" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == "(patched in memory and not saved)"
    with pytest.raises(OSError, match="patched in memory and not saved"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-1")
    assert model.peft_config["default"].base_model_name_or_path is None
    assert model.get_base_model().name_or_path == ""


def test_a_checkpoint_of_transformers_own_adapter_does_not_load_without_its_base(tmp_path):
    if not adapters_of_transformers():
        pytest.skip(NEWER_PEFT)
    model = apply_layer_collapse(model_of(CASE), LayerCollapseConfig(**FAST))
    model.add_adapter(LoraConfig(target_modules=["query"]))
    args = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer_for("bert", tmp_path, config=False, model=model, args=args).train()
    stored = json.loads((tmp_path / "checkpoint-1" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == "(patched in memory and not saved)"
    assert model.name_or_path == "" and not model.peft_config["default"].base_model_name_or_path


def test_on_a_dense_base_that_is_passed_by_hand_peft_drops_alphas(tmp_path):
    """Not ours to refuse: peft ignores keys that have no place. The adapter names the base that it belongs to."""
    model = with_adapter(patched_on_disk(tmp_path / "base"))
    set_alphas(model, *[0.5] * 2 * LAYERS)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(model_of(CASE), tmp_path / "adapter")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert not alphas_of(loaded) and not torch.equal(logits(loaded), logits(model))
    # What it names is right.
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize("process", ["here", "fresh"])
def test_without_a_task_type(process, tmp_path):
    """Third case: peft has to import the class from this package, and says how to allow it."""
    model = with_adapter(patched_on_disk(tmp_path / "base"), task_type=None, init_lora_weights=False)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="not in the import allowlist") as refused:
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    module = "hf_layercollapse.modeling_layercollapse"
    assert f"`import_allowlist=['{module}']`" in str(refused.value)
    if process == "here":
        loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=[module])
        assert torch.equal(logits(loaded), logits(model))
        return
    # Where no class has been made yet.
    code = (
        "import sys, torch; from peft import AutoPeftModel\n"
        f"model = AutoPeftModel.from_pretrained(sys.argv[1], import_allowlist=['{module}'])\n"
        "torch.save(model.get_base_model().state_dict(), sys.argv[2])"
    )
    file = tmp_path / "state.pt"
    subprocess.run([sys.executable, "-c", code, tmp_path / "adapter", file], check=True, capture_output=True)
    assert_same(torch.load(file), state_of(model.get_base_model()))


# ---- Adapters that name linears ----

# Names of a dense model's linears, as its adapters have them, and with `None` all linears.
TARGETS = {"bert": ["query", "value", "dense"], "opt": ["q_proj", "fc1", "fc2"], "gpt2": ["c_attn", "c_fc", "c_proj"]}
TARGETS["vit"] = ["q_proj", "fc1", "fc2"]


def tiny_opt():
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=40,
        dropout=0.0,
    )
    torch.manual_seed(0)
    return randomize(OPTForCausalLM(config)).eval()


def dense_model(family):
    return tiny_opt() if family == "opt" else model_of(BY_NAME[family])


def inputs_of(family, **kwargs):
    return text_inputs(**kwargs) if family == "opt" else BY_NAME[family].inputs(**kwargs)


def mixed(family):
    """A block with kept neurons, one of low rank, and one that is a linear map."""
    model, data = dense_model(family), [inputs_of(family, batch=40)]
    collapse_model(model, LayerCollapseConfig(blocks=[0], keep_neurons=4), data)
    collapse_model(model, LayerCollapseConfig(blocks=[1], rank=4), data)
    collapse_model(model, LayerCollapseConfig(blocks=[2]), data)
    return model


def outputs(model, inputs):
    return model.eval()(**inputs).logits


@pytest.fixture(scope="module")
def mixed_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    mixed("bert").save_pretrained(folder)
    return folder


def methods():
    """Every method of peft that works on linears."""
    options = {
        "lora": LoraConfig(r=2, init_lora_weights=False),
        "dora": LoraConfig(r=2, init_lora_weights=False, use_dora=True),
        "ia3": IA3Config(feedforward_modules=["dense"], init_ia3_weights=False),
        "loha": LoHaConfig(r=2, init_weights=False),
        "lokr": LoKrConfig(r=2, init_weights=False),
        "oft": OFTConfig(oft_block_size=4, init_weights=False),
        "boft": BOFTConfig(boft_block_size=2, init_weights=False),
        "hra": HRAConfig(r=2, init_weights=False),
        "adalora": AdaLoraConfig(init_r=2, total_step=10, init_lora_weights=False),
        "vera": VeraConfig(r=2, init_weights=False),
        "randlora": RandLoraConfig(r=2, init_weights=False),
        "fourierft": FourierFTConfig(n_frequency=4, init_weights=False),
        "vblora": VBLoRAConfig(r=2, vector_length=4, num_vectors=8, topk=2),
    }
    for config in options.values():
        config.task_type = "SEQ_CLS"
    return options


@pytest.mark.parametrize("targets", ["names", "all-linear"])
@pytest.mark.parametrize("method", list(methods()))
def test_every_method_by_names(method, targets, mixed_bert, tmp_path):
    config = methods()[method]
    base = AutoModelForSequenceClassification.from_pretrained(mixed_bert)
    keys, inputs = list(base.state_dict()), CASE.inputs(batch=4)
    before = outputs(base, inputs)
    config.target_modules = set(TARGETS["bert"]) if targets == "names" else "all-linear"
    if method == "ia3" and targets == "all-linear":
        config.feedforward_modules = []
    model = get_peft_model(base, config)
    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    blocks = [name.partition("layer.")[2] for name in adapted if "attention" not in name and "layer." in name]
    # Down of each; up where it is a linear: the one of low rank.
    assert sorted(blocks) == ["0.output.dense", "1.intermediate.dense", "1.output.dense", "2.output.dense"]
    model(**inputs, labels=torch.zeros(4, dtype=torch.long)).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    expected = outputs(model, inputs)
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(loaded, inputs), expected, rtol=1e-5, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(outputs(merged, inputs), expected, rtol=1e-3, atol=1e-3)
    assert list(merged.state_dict()) == keys
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert_same(state_of(again), state_of(merged))


@pytest.mark.parametrize("road", ["peft", "transformers"])
@pytest.mark.parametrize("family", ["bert", "opt", "gpt2", "vit"])
def test_the_dense_models_adapter_config(family, road, tmp_path):
    """Is that of the collapsed one, whatever the layout. An adapter that the dense model has learned is none of it."""
    if road == "transformers" and not adapters_of_transformers():
        pytest.skip(NEWER_PEFT)
    config = LoraConfig(r=2, target_modules=TARGETS[family], init_lora_weights=False)
    get_peft_model(dense_model(family), config).save_pretrained(tmp_path / "of the dense")
    up = {"bert": "intermediate.dense", "opt": "fc1", "gpt2": "c_fc", "vit": "fc1"}[family]
    up_only = LoraConfig(r=2, target_modules=[TARGETS[family][0], up], layers_to_transform=[2])
    get_peft_model(dense_model(family), up_only).save_pretrained(tmp_path / "up only")
    base, inputs = mixed(family), inputs_of(family)
    before = outputs(base, inputs)
    if road == "peft":
        model = get_peft_model(base, config)
    else:
        base.add_adapter(config)
        model = base
    assert not torch.equal(outputs(model, inputs), before)
    # Sizes that do not fit are refused upstream.
    errors = {"of the dense": "size mismatch|ignore_mismatched_sizes", "up only": "trained before its block was"}
    for folder, error in errors.items():
        other = mixed(family)
        with pytest.raises((RuntimeError, ValueError), match=error):
            if road == "peft":
                PeftModel.from_pretrained(other, tmp_path / folder)
            else:
                other.load_adapter(str(tmp_path / folder))


def test_what_peft_passes_over_is_there_for_everything_else():
    model = mixed("bert")
    names = {name for name, _ in model.named_modules()}
    ups = [f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 2)]
    assert names.issuperset(ups) and f"{ups[0]}.weight" in dict(model.named_parameters())
    # Also for peft, where it is to be trained as it is.
    trained = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=["intermediate.dense"]))
    assert any(f"{ups[0]}.modules_to_save" in name for name, _ in trained.named_parameters())


@pytest.mark.parametrize("case", ["vit", "gpt2"])
def test_a_base_is_saved_without_its_adapter(case, tmp_path):
    """In the original names, and as it was before."""
    case = BY_NAME[case]
    targets = {"vit": ["q_proj", "fc1"], "gpt2": ["c_attn", "c_fc"]}[case.name]
    plain = apply_layer_collapse(model_of(case))
    plain.save_pretrained(tmp_path / "plain")
    model = get_peft_model(plain, lora(task_type=None, target_modules=targets, modules_to_save=[case.activation]))
    model.get_base_model().save_pretrained(tmp_path / "base")
    left, right = (case.auto_class.from_pretrained(tmp_path / name) for name in ("plain", "base"))
    assert_same(state_of(left), state_of(right))
