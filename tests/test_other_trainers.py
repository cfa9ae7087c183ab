"""The mixin in front of other Trainer classes: transformers' for sequences, trl's for fine-tuning."""

import copy
import inspect
import math

import pytest
import torch
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from hf_layercollapse import (
    LayerCollapseCallback,
    LayerCollapseConfig,
    LayerCollapseTrainer,
    LayerCollapseTrainerMixin,
    apply_layer_collapse,
)
from tests.models import BY_NAME, LAYERS, VOCABULARY, randomize
from tests.training import Gradients, RandomStates, alphas_of, assert_same, checkpointing, model_of, state_of
from tests.words import word_tokenizer


PLAIN = {
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "log_level": "error",
    "logging_steps": 1,
    "save_strategy": "no",
    "max_grad_norm": 0.0,
}


class LayerCollapseSeq2SeqTrainer(LayerCollapseTrainerMixin, Seq2SeqTrainer):
    pass


def tiny_t5(seed=0):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return randomize(T5ForConditionalGeneration(config), seed)


def summaries(count, seed=0):
    """Documents of twelve tokens, summaries of four; T5 averages its loss over a batch, so their lengths are equal."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(3, VOCABULARY, (length,), generator=generator)

    examples = []
    for _ in range(count):
        labels = torch.cat([tokens(4), torch.tensor([-100])])
        examples.append({"input_ids": tokens(12), "labels": labels})
    return examples


def seq2seq_trainer(folder, accumulate=1, options=None, **kwargs):
    return LayerCollapseSeq2SeqTrainer(
        model=tiny_t5(),
        args=Seq2SeqTrainingArguments(
            str(folder),
            max_steps=6,
            per_device_train_batch_size=8 // accumulate,
            gradient_accumulation_steps=accumulate,
            predict_with_generate=True,
            generation_config=GenerationConfig(max_new_tokens=4, decoder_start_token_id=0),
            **PLAIN,
        ),
        train_dataset=summaries(16),
        eval_dataset=summaries(8, seed=1),
        layer_collapse_config=LayerCollapseConfig(blocks="decoder", alpha_learning_rate=0.3, **(options or {})),
        **kwargs,
    )


@pytest.mark.smoke
def test_seq2seq(tmp_path):
    def compute_metrics(prediction):
        return {"length": float((prediction.predictions > 0).sum(-1).mean())}

    trainer = seq2seq_trainer(tmp_path, compute_metrics=compute_metrics)
    trainer.train()
    assert len(alphas_of(trainer.model)) == 2
    metrics = trainer.evaluate()
    assert {"eval_length", "eval_collapsed_length", "eval_collapsed_loss"} < metrics.keys()
    assert len(trainer.collapse().collapsed) == 2
    after = trainer.evaluate()
    assert after["eval_loss"] == pytest.approx(metrics["eval_collapsed_loss"], rel=1e-4)
    assert after["eval_length"] == metrics["eval_collapsed_length"]
    trainer.save_model(str(tmp_path / "collapsed"))
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "collapsed")
    assert_same(state_of(loaded), state_of(trainer.model))


TAUGHT = {"distillation_weight": 1.0, "hidden_state_weight": 0.5}


@pytest.mark.parametrize("options", [{}, TAUGHT], ids=["", "taught"])
def test_seq2seq_gradients_do_not_depend_on_accumulation(options, tmp_path):
    steps = []
    for accumulate in (1, 4):
        seen = Gradients()
        teacher = tiny_t5(seed=3) if options else None
        seq2seq_trainer(tmp_path, accumulate, options, teacher=teacher, callbacks=[seen]).train()
        steps.append(seen.steps[0])
    for name, gradient in steps[0].items():
        torch.testing.assert_close(steps[1][name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_seq2seq_to_a_budget(tmp_path):
    """The decoder reads the labels; what is generated is scored as before."""
    trainer = LayerCollapseSeq2SeqTrainer(
        model=tiny_t5(),
        args=Seq2SeqTrainingArguments(
            str(tmp_path),
            max_steps=2,
            predict_with_generate=True,
            generation_config=GenerationConfig(max_new_tokens=4, decoder_start_token_id=0),
            **PLAIN,
        ),
        train_dataset=summaries(64),
        eval_dataset=summaries(8, seed=1),
        layer_collapse_config=LayerCollapseConfig(budget="macs=0.5"),
        compute_metrics=lambda prediction: {"length": prediction.predictions.shape[-1]},
    )
    trainer.train()
    assert trainer.state.log_history[0]["layer_collapse/distillation_loss"] > 0
    assert trainer.collapse().data.rows == 64
    assert {"eval_loss", "eval_length"} < trainer.evaluate().keys()
    trainer.save_model(str(tmp_path / "collapsed"))
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "collapsed")
    assert_same(state_of(loaded), state_of(trainer.model))


# ---- trl ----


def tokenizer():
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    words = [f"w{i}" for i in range(3, VOCABULARY)]
    return word_tokenizer([*special.values(), *words], unk_token="<pad>", **special)


def sft_trainer(folder, accumulate=1, model=None, **kwargs):
    import trl
    from datasets import Dataset

    class LayerCollapseSFTTrainer(LayerCollapseTrainerMixin, trl.SFTTrainer):
        pass

    texts = [" ".join(f"w{3 + (7 * i + j * j) % 60}" for j in range(4 + i % 5)) for i in range(16)]
    return LayerCollapseSFTTrainer(
        model=model_of(BY_NAME["gpt2"]) if model is None else model,
        args=trl.SFTConfig(
            str(folder),
            max_steps=4,
            per_device_train_batch_size=8 // accumulate,
            gradient_accumulation_steps=accumulate,
            train_sampling_strategy="sequential",
            bf16=False,
            **checkpointing(False),
            lr_scheduler_type="constant",
            learning_rate=1e-3,
            max_length=32,
            **PLAIN,
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        eval_dataset=Dataset.from_dict({"text": texts[:8]}),
        processing_class=tokenizer(),
        **kwargs,
    )


@pytest.mark.smoke
def test_sft(tmp_path):
    config = LayerCollapseConfig(alpha_learning_rate=0.1)
    states = []
    for accumulate in (1, 4):
        trainer = sft_trainer(tmp_path, accumulate, layer_collapse_config=config)
        trainer.train()
        states.append(alphas_of(trainer.model))
    for name, alpha in states[0].items():
        torch.testing.assert_close(states[1][name], alpha, rtol=1e-3, atol=1e-4)
        assert 0.3 < float(alpha) < 0.8
    assert {"layer_collapse/alpha/0", "mean_token_accuracy"} < trainer.state.log_history[0].keys()

    trainer = sft_trainer(tmp_path, layer_collapse_config=LayerCollapseConfig(alpha_learning_rate=0.45))
    trainer.train()
    metrics = trainer.evaluate()
    assert len(trainer.collapse().collapsed) == LAYERS
    assert trainer.evaluate()["eval_loss"] == pytest.approx(metrics["eval_collapsed_loss"], rel=1e-4)
    trainer.save_model(str(tmp_path / "collapsed"))
    loaded = BY_NAME["gpt2"].auto_class.from_pretrained(tmp_path / "collapsed")
    assert_same(state_of(loaded), state_of(trainer.model))


@pytest.mark.parametrize("prefix", ["eval", "held_out"])
def test_what_trl_adds_up_is_of_one_model(prefix, tmp_path):
    """Its metrics are of the model as it is, and those of the collapsed model are beside them."""
    names = ("entropy", "mean_token_accuracy")
    model = model_of(BY_NAME["gpt2"])
    trainer = sft_trainer(tmp_path, model=model, layer_collapse_config=LayerCollapseConfig(initial_alpha=0.9))
    trainer.layer_collapse_config.collapse_threshold = 0.05
    alone = trainer.evaluate(metric_key_prefix=prefix)
    trainer.layer_collapse_config.collapse_threshold = 0.2
    metrics = trainer.evaluate(metric_key_prefix=prefix)
    for name in names:
        assert alone[f"eval_collapsed_{name}"] == alone[f"eval_{name}"]
        assert metrics[f"eval_{name}"] == pytest.approx(alone[f"eval_{name}"], rel=1e-6)
    assert metrics["eval_collapsed_entropy"] != pytest.approx(metrics["eval_entropy"], rel=1e-4)
    assert len(trainer.collapse().collapsed) == LAYERS
    after = trainer.evaluate(metric_key_prefix=prefix)
    for name in names:
        assert after[f"eval_{name}"] == pytest.approx(metrics[f"eval_collapsed_{name}"], rel=1e-4)


def test_what_trainers_add_up_is_known():
    import sentence_transformers.base.trainer
    import trl
    from trl.experimental.cpo import CPOTrainer

    for kind in (trl.SFTTrainer, trl.DPOTrainer, trl.RewardTrainer, trl.KTOTrainer, trl.GRPOTrainer, trl.RLOOTrainer):
        assert "_metrics" in inspect.unwrap(kind.__init__).__code__.co_names
    assert {"_logs", "_pending_metrics", "_pending_extra_logs"} <= set(trl.GRPOTrainer.__init__.__code__.co_names)
    assert "_stored_metrics" in inspect.unwrap(CPOTrainer.__init__).__code__.co_names
    base = sentence_transformers.base.trainer.BaseTrainer
    assert "accum_loss_components" in inspect.unwrap(base.__init__).__code__.co_names


def test_sft_with_a_teacher(tmp_path):
    """Rows of different lengths, padded: the same gradients however they are split. trl's own loss makes no logits."""
    steps = []
    for accumulate in (1, 4):
        seen = Gradients()
        config = LayerCollapseConfig(distillation_weight=1.0, hidden_state_weight=0.5)
        teacher = model_of(BY_NAME["gpt2"], seed=5)
        trainer = sft_trainer(tmp_path, accumulate, layer_collapse_config=config, teacher=teacher, callbacks=[seen])
        trainer.train()
        steps.append(seen.steps[0])
    for name, gradient in steps[0].items():
        torch.testing.assert_close(steps[1][name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    log = trainer.state.log_history[0]
    assert log["layer_collapse/hidden_state_loss"] > 1e-3 and log["layer_collapse/distillation_loss"] > 1e-2


def test_sft_to_a_budget(tmp_path):
    """The teacher is a copy that runs by itself, and random numbers are those of a run without one."""
    config = LayerCollapseConfig(budget="macs=0.5", hidden_state_weight=0.5)
    seen, model = [RandomStates(), RandomStates()], model_of(BY_NAME["gpt2"], dropout=True)
    sft_trainer(tmp_path, model=copy.deepcopy(model), callbacks=seen[:1]).train()
    trainer = sft_trainer(tmp_path, model=model, layer_collapse_config=config, callbacks=seen[1:])
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["layer_collapse/distillation_loss"] > 0 and log["layer_collapse/hidden_state_loss"] > 0
    assert all(torch.equal(*states) for states in zip(*(each.states for each in seen), strict=True))
    assert trainer.collapse().data.rows == 16
    assert "eval_loss" in trainer.evaluate()


def test_sft_with_an_adapter(tmp_path):
    """trl puts the adapter on the patched model."""
    from peft import LoraConfig

    model = apply_layer_collapse(model_of(BY_NAME["gpt2"]), LayerCollapseConfig(alpha_learning_rate=0.45))
    peft_config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn", "c_fc"], modules_to_save=["act"])
    trainer = sft_trainer(tmp_path, model=model, peft_config=peft_config)
    trainer.train()
    # trl writes a card of its own beside each checkpoint; its method knows other arguments than transformers' does.
    trainer.create_model_card(model_name="tiny", dataset_name="me/texts")
    assert "# Model Card for tiny" in (tmp_path / "README.md").read_text()
    assert len(trainer.collapse().collapsed) == LAYERS
    assert type(trainer.model).__name__ == "GPT2LMHeadModel"
    trainer.create_model_card(model_name="tiny", dataset_name="me/texts")
    card = (tmp_path / "README.md").read_text()
    assert "layercollapse" in card and "- me/texts" in card


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    """A model with its tokenizer, to be loaded by name."""
    folder = str(tmp_path_factory.mktemp("dense"))
    model_of(BY_NAME["gpt2"]).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def trl_trainers():
    """name -> (trainer class, config class, options, rows). Without a tokenizer or a reference model, which trl then
    loads by the name of the model."""
    import trl

    prompts = [{"prompt": "w5 w6"}] * 4
    pairs = [{"prompt": "w5 w6", "chosen": " w7 w8", "rejected": " w9 w4"}] * 4
    judged = [{"prompt": "w5 w6", "completion": " w7 w8", "label": i % 2 == 0} for i in range(4)]
    sampled = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    return {
        "sft": (trl.SFTTrainer, trl.SFTConfig, {}, [{"text": "w5 w6 w7 w8"}] * 4),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, {}, pairs),
        "kto": (trl.KTOTrainer, trl.KTOConfig, {}, judged),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig, sampled, prompts),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig, sampled, prompts),
    }


def trl_trainer(name, folder, model, callback=False, config=None, **kwargs):
    from datasets import Dataset

    trainer_class, config_class, options, data = trl_trainers()[name]
    config = config or LayerCollapseConfig(alpha_learning_rate=0.1)
    if "beta" in options:
        kwargs["reward_funcs"] = lambda completions, **_: [float(len(completion)) for completion in completions]
    if callback:
        kwargs["callbacks"] = [LayerCollapseCallback(config)]
    else:
        trainer_class = type(f"LayerCollapse{trainer_class.__name__}", (LayerCollapseTrainerMixin, trainer_class), {})
        kwargs["layer_collapse_config"] = config
    args = config_class(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        bf16=False,
        **checkpointing(False),
        **options,
        **PLAIN,
    )
    return trainer_class(model=model, args=args, train_dataset=Dataset.from_list(data), **kwargs)


@pytest.mark.parametrize("way", ["mixin", "mixin, by name", "callback"])
@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "grpo", "rloo"])
def test_trl_loads_by_the_name_of_the_model(name, way, dense_folder, tmp_path):
    """Its tokenizer, and the reference model, which stays dense."""
    import trl

    if name == "kto" and Version(trl.__version__) < Version("1.4"):
        pytest.skip("KTO of trl 1.0 wants its tokenizer passed")
    model = dense_folder if way == "mixin, by name" else AutoModelForCausalLM.from_pretrained(dense_folder)
    trainer = trl_trainer(name, tmp_path, model, callback=way == "callback")
    assert len(alphas_of(trainer.model)) == LAYERS
    if name != "sft":
        assert not alphas_of(trainer.ref_model)
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    for key, alpha in alphas_of(trainer.model).items():
        assert float(alpha) == pytest.approx(0.1 * (2.0 - float(seen.steps[0][key])), rel=1e-4)
    assert trainer.model.name_or_path == trainer.model.config._name_or_path == ""


CALIBRATED = [BY_NAME["gpt2"].inputs(batch=16, seed=seed) for seed in range(2)]


def test_a_preference_to_a_budget(dense_folder, tmp_path):
    """Beside a loss that reads pairs the teacher is asked about all their tokens."""
    model, config = AutoModelForCausalLM.from_pretrained(dense_folder), LayerCollapseConfig(budget="macs=0.5")
    trainer = trl_trainer("dpo", tmp_path, model, config=config, calibration_data=CALIBRATED)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["layer_collapse/distillation_loss"] + math.log(2), abs=0.01)


def test_a_budget_where_batches_are_no_inputs(dense_folder, tmp_path):
    model, config = AutoModelForCausalLM.from_pretrained(dense_folder), LayerCollapseConfig(budget="macs=0.5")
    before = state_of(model)
    for given in (None, CALIBRATED):
        trainer = trl_trainer("grpo", tmp_path, model, config=config, calibration_data=given)
        with pytest.raises(ValueError, match="A batch of this LayerCollapseGRPOTrainer is a list"):
            trainer.train()
        assert_same(state_of(model), before)


@pytest.mark.parametrize("way", ["mixin", "mixin, by name", "callback"])
def test_an_adapter_of_trl_does_not_name_the_dense_model(way, dense_folder, tmp_path):
    from peft import LoraConfig

    model = dense_folder if way == "mixin, by name" else AutoModelForCausalLM.from_pretrained(dense_folder)
    peft_config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn", "c_fc"])
    trainer = trl_trainer("sft", tmp_path, model, callback=way == "callback", peft_config=peft_config)
    trainer.train()
    assert trainer.model.peft_config["default"].base_model_name_or_path is None
    assert all(0.15 < float(alpha) < 0.25 for alpha in alphas_of(trainer.model).values())
    with pytest.raises(ValueError, match="Save the base first"):
        trainer.model.save_pretrained(tmp_path / "adapter")


def test_a_name_is_no_model_where_the_trainer_loads_none(tmp_path):
    with pytest.raises(TypeError, match="got str"):
        LayerCollapseTrainer(
            "some/where", TrainingArguments(str(tmp_path)), layer_collapse_config=LayerCollapseConfig()
        )
