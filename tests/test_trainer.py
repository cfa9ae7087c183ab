"""The Trainer: what drives alphas, what is measured, and what a checkpoint keeps."""

import functools
import importlib
import json
import math
import os
import random
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LabelSmoother

from hf_layercollapse import (
    LayerCollapseCallback,
    LayerCollapseConfig,
    LayerCollapseTrainer,
    LayerCollapseTrainerMixin,
    apply_layer_collapse,
    collapse_model,
)
from hf_layercollapse.merging import is_ready
from hf_layercollapse.optimization import AlphaSteps, penalty_strength_at
from hf_layercollapse.patching import alpha_parameters
from hf_layercollapse.trainer import counts_items
from hf_layercollapse.upstream import TRANSFORMERS
from tests.models import BY_NAME, HIDDEN, LAYERS
from tests.test_patching import assert_unchanged, snapshot
from tests.training import (
    Gradients,
    OwnLoss,
    SetAlphas,
    alphas_of,
    assert_same,
    checkpointing,
    counted_cross_entropy,
    model_of,
    rows,
    set_alphas,
    state_of,
    trainer_for,
    zero_loss,
)


FAMILIES = ["bert", "vit", "gpt2"]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


# ---- Loss ----


def gradients(case, tmp_path, **kwargs):
    seen = Gradients()
    trainer_for(case, tmp_path, callbacks=[seen], **kwargs).train()
    (step,) = seen.steps
    return step


def full_batch(case):
    batch = rows(BY_NAME[case], 8)
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


@pytest.mark.smoke
@pytest.mark.parametrize("loss", ["model", "smoothing", "function"])
@pytest.mark.parametrize("case", FAMILIES)
def test_gradients_do_not_depend_on_accumulation(case, loss, tmp_path):
    """They are those of one batch of eight; and the penalty's joins where alphas step."""
    model = apply_layer_collapse(model_of(BY_NAME[case]), LayerCollapseConfig()).train()
    inputs = full_batch(case)
    if loss == "model":
        task = model(**inputs).loss
    else:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        if loss == "function":
            task = counted_cross_entropy(outputs, labels)
        else:
            task = LabelSmoother(epsilon=0.1)(outputs, labels, shift_labels=case == "gpt2")
    task.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert sum(name.endswith(".alpha") for name in expected) == LAYERS
    for accumulate in (1, 2, 4):
        seen = Gradients()
        trainer = trainer_for(
            case,
            tmp_path,
            config={"penalty_strength": 3.0},
            batch=8 // accumulate,
            accumulate=accumulate,
            train=rows(BY_NAME[case], 8),
            args={"label_smoothing_factor": 0.1 if loss == "smoothing" else 0.0},
            compute_loss_func=counted_cross_entropy if loss == "function" else None,
            callbacks=[seen],
        )
        trainer.train()
        (found,) = seen.steps
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        for name, alpha in alphas_of(trainer.model).items():
            # 3 * d/d alpha (1 - alpha)^2 at alpha = 0, at the default rate
            assert float(alpha) == pytest.approx(0.01 * (6.0 - float(expected[name])), rel=1e-3)


def test_upstream_lets_classification_gradients_grow_with_accumulation(tmp_path):
    """What `model_accepts_loss_kwargs` is set for. When this fails, upstream has mended it."""

    def norm(trainer_class, accumulate):
        found = gradients(
            "bert",
            tmp_path,
            config=False,
            trainer_class=trainer_class,
            batch=8 // accumulate,
            accumulate=accumulate,
        )
        return float(found["classifier.weight"].norm())

    assert norm(Trainer, 4) == pytest.approx(4 * norm(Trainer, 1), rel=1e-3)
    assert norm(LayerCollapseTrainer, 4) == pytest.approx(norm(Trainer, 1), rel=1e-3)


class Summed(Trainer):
    """A loss of its own, divided by the count that the Trainer makes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class Declared(Summed):
    loss_is_scaled_for_ga = True


class SummedBehindTheMixin(LayerCollapseTrainerMixin, Summed):
    pass


class DeclaredBehindTheMixin(LayerCollapseTrainerMixin, Declared):
    pass


@pytest.mark.parametrize("config", [None, False])
@pytest.mark.parametrize("trainer_class, plain", [(SummedBehindTheMixin, Summed), (DeclaredBehindTheMixin, Declared)])
def test_a_loss_of_a_subclass_is_given_the_count(trainer_class, plain, config, tmp_path, caplog):
    """As in front of [`Trainer`]: what the model's own loss would make of it is not asked."""

    def found(trainer_class, accumulate, config):
        options = {"trainer_class": trainer_class, "config": config, "accumulate": accumulate}
        return gradients("bert", tmp_path, batch=8 // accumulate, **options)["classifier.weight"]

    expected = found(plain, 1, False)
    for accumulate in (1, 4):
        torch.testing.assert_close(found(trainer_class, accumulate, config), expected, rtol=1e-4, atol=1e-6)
    # Said where it is not known, and only there.
    unsaid = plain is Summed or TRANSFORMERS < (5, 19)
    assert ("computes a loss of its own and does not say how" in caplog.text) is unsaid


@pytest.mark.parametrize("case, counts", [("bert", False), ("vit", False), ("dinov2", False), ("gpt2", True)])
def test_which_losses_count_items(case, counts, tmp_path):
    model = model_of(BY_NAME[case])
    assert counts_items(model) is counts
    assert trainer_for(case, tmp_path, config=False, model=model).model_accepts_loss_kwargs is counts
    with torch.no_grad():
        inputs = full_batch(case)
        losses = [float(model(**inputs, num_items_in_batch=torch.tensor(count)).loss) for count in (10, 1000)]
    if counts:
        assert losses[0] == pytest.approx(100 * losses[1], rel=1e-4)


def test_a_loss_that_cannot_be_read_or_is_not_counted_is_averaged(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x, labels=None, **kwargs):
            logits = self.linear(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    assert not counts_items(Own())
    namespace = {"nn": nn}
    exec("class Typed(nn.Module):\n    def forward(self, x, **kwargs):\n        return x", namespace)
    assert not counts_items(namespace["Typed"]())


OUTDENTED = '''
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

class Outdented(nn.Module):
    loss_function = staticmethod(ForCausalLMLoss)
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, labels=None, **kwargs):
        """
The docstring stands at column 0.
"""
        logits = self.linear(x)
        return {"loss": self.loss_function(logits, labels, 3, **kwargs), "logits": logits}

def forward(self, x, labels=None, **kwargs):
    return Outdented.forward(self, x, labels=labels, **kwargs), self.loss_function(x, labels, 3, **kwargs)

class Assigned(Outdented):
    pass

Assigned.forward = forward
'''


class NoFunction:
    def __call__(self, x, labels=None, **kwargs):
        return {"loss": x.sum()}


def test_a_forward_of_any_kind_makes_a_trainer(tmp_path, monkeypatch):
    (tmp_path / "outdented.py").write_text(OUTDENTED)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("outdented")

    class Callable(module.Outdented):
        forward = NoFunction()

    class Partial(module.Outdented):
        forward = functools.partialmethod(module.Outdented.forward)

    class Lambda(module.Outdented):
        forward = {"a": lambda self, x, **kwargs: {"loss": x.sum()}}["a"]

    # One that is assigned counts, but no label is to be counted for one that is not read.
    for net, counts in ((module.Outdented, True), (module.Assigned, True), (Callable, False), (Partial, False)):
        assert LayerCollapseTrainer(net(), TrainingArguments(str(tmp_path))).model_accepts_loss_kwargs is counts
    assert not counts_items(Lambda())


def test_evaluation_loss_has_no_penalty(tmp_path):
    data = rows(BY_NAME["bert"], 8)
    trainer = trainer_for("bert", tmp_path, config={"penalty_strength": 100.0}, evaluate=data)
    metrics = trainer.evaluate()
    with torch.no_grad():
        expected = trainer.model(**full_batch("bert")).loss
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    # The loss that training logs is what is minimised, however a step is split.
    for accumulate in (1, 2):
        trainer = trainer_for(
            "bert",
            tmp_path,
            config={"penalty_strength": 100.0},
            train=data,
            batch=8 // accumulate,
            accumulate=accumulate,
        )
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected) + 300.0, rel=1e-5)


def test_bfloat16_model_keeps_float32_alphas(tmp_path):
    model = model_of(BY_NAME["bert"]).to(torch.bfloat16)
    trainer = trainer_for("bert", tmp_path, model=model, config={"alpha_learning_rate": 1e-3}, args={"max_steps": 2})
    trainer.train()
    assert {parameter.dtype for parameter in alphas_of(model).values()} == {torch.float32}
    assert model.classifier.weight.dtype == torch.bfloat16
    for alpha in alphas_of(model).values():
        assert 0.003 < float(alpha) < 0.005


@pytest.mark.smoke
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant, tmp_path):
    def train(**args):
        trainer = trainer_for("bert", tmp_path, config={"alpha_learning_rate": 0.05}, args={"max_steps": 3, **args})
        trainer.train()
        return state_of(trainer.model)

    plain = train()
    checkpointed = train(**checkpointing(use_reentrant=reentrant))
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-6)


def test_torch_compile(tmp_path):
    args = {"max_steps": 3, "torch_compile": True, "torch_compile_backend": "eager"}
    trainer = trainer_for("bert", tmp_path, config={"alpha_learning_rate": 0.45}, args=args)
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    assert len(trainer.collapse().collapsed) == LAYERS
    # What wrapped the parameters that are gone is gone too.
    assert trainer.model_wrapped is trainer.model
    assert trainer.evaluate()["eval_loss"] > 0


def test_lora_on_a_linear_counts_each_alpha_once(tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LayerCollapseConfig(alpha_learning_rate=0.1, adapters="refuse")
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), config)
    peft_config = LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        target_modules=["intermediate.dense", "query"],
        modules_to_save=["intermediate_act_fn"],
    )
    model = get_peft_model(model, peft_config)
    assert len(alphas_of(model)) == 2 * LAYERS
    seen = Gradients()
    trainer = trainer_for("bert", tmp_path, config=False, model=model, compute_loss_func=zero_loss, callbacks=[seen])
    trainer.train()
    assert trainer.layer_collapse_config.alpha_learning_rate == 0.1
    driven = {name: gradient for name, gradient in seen.steps[0].items() if name.endswith(".alpha")}
    assert len(driven) == LAYERS
    assert all(float(gradient) == 0 for gradient in driven.values())
    log = trainer.state.log_history[0]
    assert log["layer_collapse/penalty"] == pytest.approx(LAYERS)
    assert [log[f"layer_collapse/alpha/{i}"] for i in range(LAYERS)] == pytest.approx([0.2] * LAYERS)
    with pytest.raises(ValueError, match="merge_and_unload"):
        trainer.collapse()
    set_alphas(model, *[1.0] * 2 * LAYERS)
    assert len(collapse_model(model.merge_and_unload()).collapsed) == LAYERS


def test_frozen_alphas_are_warned_of(tmp_path, caplog):
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(".alpha"))
    trainer = trainer_for("bert", tmp_path, config=False, model=model)
    assert "no alpha is trainable" in caplog.text
    trainer.train()
    assert all(float(alpha) == 0 for alpha in alphas_of(model).values())


def test_a_frozen_alpha_counts_as_ready_and_is_not_driven(tmp_path):
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig(alpha_learning_rate=0.1))
    set_alphas(model, 1.0, 0.0, 0.0)
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn.alpha.requires_grad_(False)
    trainer = trainer_for("bert", tmp_path, config=False, model=model, compute_loss_func=zero_loss)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["layer_collapse/ready_blocks"] == 1
    assert log["layer_collapse/penalty"] == pytest.approx(2.0)
    assert [log[f"layer_collapse/alpha/{i}"] for i in range(LAYERS)] == pytest.approx([1.0, 0.2, 0.2])


class RDrop(LayerCollapseTrainer):
    """Two forwards a batch (arXiv 2106.14448)."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return (super().compute_loss(model, dict(inputs)) + super().compute_loss(model, dict(inputs))) / 2


class FGM(LayerCollapseTrainer):
    """A second loss and backward pass on inputs that are moved against the first (arXiv 1605.07725)."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        embeddings = model.get_input_embeddings().weight
        moved = 0.01 * embeddings.grad
        embeddings.data += moved
        second = self.compute_loss(model, self._prepare_inputs(inputs)) / self.current_gradient_accumulation_steps
        self.accelerator.backward(second)
        embeddings.data -= moved
        return loss


class OwnStep(LayerCollapseTrainer):
    """A whole step without `super()`."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs)) / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class OwnOptimizer(OwnStep):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        return self.optimizer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("trainer_class", [OwnLoss, RDrop, FGM, OwnStep, OwnOptimizer])
def test_no_override_loses_the_penalty_or_counts_it_twice(trainer_class, accumulate, tmp_path):
    seen = Gradients()
    config = {"alpha_learning_rate": 0.1}
    trainer = trainer_for(
        "bert",
        tmp_path,
        config,
        trainer_class=trainer_class,
        batch=4 // accumulate,
        accumulate=accumulate,
        callbacks=[seen],
    )
    trainer.train()
    for name, alpha in alphas_of(trainer.model).items():
        assert float(alpha) == pytest.approx(0.1 * (2.0 - float(seen.steps[0][name])), rel=1e-5)
        assert float(alpha) > 0.15
    assert trainer.state.log_history[0]["layer_collapse/penalty"] == pytest.approx(LAYERS)


def test_a_loss_of_its_own_loses_no_teacher_in_silence(tmp_path):
    trainer = trainer_for("bert", tmp_path, {"distillation_weight": 1.0}, trainer_class=OwnLoss)
    with pytest.raises(RuntimeError, match="step was taken without the teacher: OwnLoss computes a loss of its own"):
        trainer.train()


def test_a_step_that_leaves_alphas_out_raises(tmp_path):
    class AnotherOptimizer(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            trainer.optimizer = trainer.accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))

    trainer = trainer_for("bert", tmp_path, callbacks=[AnotherOptimizer()])
    with pytest.raises(RuntimeError, match="left alphas where they were"):
        trainer.train()


class Unfreezing(TrainerCallback):
    """All layers frozen, then one thawed after each step, from the last, which is frozen again after the third."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.bert.encoder.requires_grad_(False)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        layers = model.bert.encoder.layer
        if state.global_step <= LAYERS:
            layers[-state.global_step].requires_grad_(True)
        if state.global_step == 3:
            layers[-1].requires_grad_(False)


@pytest.mark.parametrize(
    "trainer_class, frozen_before", [(LayerCollapseTrainer, False), (LayerCollapseTrainer, True), (Trainer, False)]
)
def test_gradual_unfreezing(trainer_class, frozen_before, tmp_path):
    """Each alpha is driven in those steps in which it is trainable; also where the optimizer never heard of it."""
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig(alpha_learning_rate=0.1))
    if frozen_before:
        model.bert.encoder.requires_grad_(False)
    ours = [LayerCollapseCallback()] if trainer_class is Trainer else []
    trainer = trainer_for(
        "bert",
        tmp_path,
        config=False,
        model=model,
        trainer_class=trainer_class,
        callbacks=[*ours, Unfreezing()],
        compute_loss_func=zero_loss,
        args={"max_steps": 4},
    )
    trainer.train()
    assert [float(alpha) for alpha in alphas_of(model).values()] == pytest.approx([1 - 0.8**n for n in (1, 2, 2)])


def test_alphas_thawed_too_late_to_be_averaged_are_refused():
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig())
    first, *others = alpha_parameters(model)
    first.requires_grad_(False)
    steps = AlphaSteps(torch.optim.SGD(model.parameters()), others, LayerCollapseConfig(), lambda: 1.0)
    steps.follow(model, alone=False)
    first.requires_grad_(True)
    with pytest.raises(RuntimeError, match="1 alphas became trainable after training had been made ready"):
        steps.follow(model, alone=False)
    steps.follow(model, alone=True)
    assert len(steps.alphas) == LAYERS


def test_frozen_from_the_start_is_warned_of_once(tmp_path, caplog):
    class Freeze(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.endswith(".alpha"))

    trainer = trainer_for("bert", tmp_path, callbacks=[Freeze()], args={"max_steps": 2})
    assert "no alpha is trainable" not in caplog.text
    trainer.train()
    trainer.train()
    assert caplog.text.count("no alpha is trainable") == 1
    assert all(float(alpha) == 0 for alpha in alphas_of(trainer.model).values())


def test_a_step_without_its_alphas_raises(tmp_path):
    class CollapseInTheMiddle(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            collapse_model(model)

    trainer = trainer_for(
        "bert", tmp_path, config={"initial_alpha": 1.0}, args={"max_steps": 3}, callbacks=[CollapseInTheMiddle()]
    )
    with pytest.raises(RuntimeError, match="made for 3 alphas, and the model now has 0 others"):
        trainer.train()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_training_that_was_interrupted_has_ended(error, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise error

    trainer = trainer_for(
        "bert", tmp_path, config={"alpha_learning_rate": 0.45}, args={"max_steps": 50}, callbacks=[Interrupt()]
    )
    with pytest.raises(error):
        trainer.train()
    assert "eval_loss" in trainer.evaluate()
    assert len(trainer.collapse().collapsed) == LAYERS


def test_collapsing_while_training_runs_raises(tmp_path):
    class CollapseInTheMiddle(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.collapse()

    callbacks = [CollapseInTheMiddle()]
    config = {"initial_alpha": 1.0}
    trainer = trainer_for("bert", tmp_path, config=config, args={"max_steps": 3}, callbacks=callbacks)
    with pytest.raises(RuntimeError, match="once training has ended"):
        trainer.train()


# ---- Optimizer ----


def steps_until_ready(tmp_path, strength, **args):
    config = {"penalty_strength": strength, "alpha_learning_rate": 0.05, "collapse_threshold": 0.05}
    trainer = trainer_for(
        "bert", tmp_path, config=config, batch=2, compute_loss_func=zero_loss, args={"max_steps": 40, **args}
    )
    trainer.train()
    return next(
        log["step"] for log in trainer.state.log_history if log.get("layer_collapse/ready_blocks", 0) == LAYERS
    )


def steps_expected(strength):
    return math.ceil(math.log(0.05) / math.log(1 - 2 * 0.05 * strength))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
def test_twice_the_strength_takes_half_the_steps(optim, tmp_path):
    single, double = (steps_until_ready(tmp_path, strength, optim=optim) for strength in (1.0, 2.0))
    assert (single, double) == (steps_expected(1.0), steps_expected(2.0)) == (29, 14)


@pytest.mark.parametrize("width", [1, 256])
def test_steps_at_the_defaults(width):
    """As the config's help says; alphas of neurons are as fast as that of a block."""
    config = LayerCollapseConfig()
    alpha = nn.Parameter(torch.zeros(width))
    optimizer = torch.optim.AdamW([alpha])
    driven = AlphaSteps(optimizer, [alpha], config, lambda: config.penalty_strength)
    while not is_ready(alpha, config.collapse_threshold):
        optimizer.step()
    assert driven.taken == 149


def test_a_constant_alpha_rate_ignores_the_schedule(tmp_path):
    steps = steps_until_ready(tmp_path, 1.0, lr_scheduler_type="linear", warmup_steps=10)
    assert steps == steps_expected(1.0)


def test_alpha_rate_may_follow_the_schedule(tmp_path):
    config = {"alpha_learning_rate": 0.1, "alpha_lr_schedule": "same"}
    args = {"max_steps": 4, "lr_scheduler_type": "linear"}
    trainer = trainer_for("bert", tmp_path, config=config, args=args, compute_loss_func=zero_loss)
    trainer.train()
    logs = trainer.state.log_history[:4]
    left = 1.0
    for log, factor in zip(logs, (1.0, 0.75, 0.5, 0.25), strict=True):
        left *= 1 - 0.2 * factor
        assert log["layer_collapse/alpha_mean"] == pytest.approx(1 - left, rel=1e-5)


@pytest.mark.parametrize("patched_before", [True, False])
@pytest.mark.parametrize("scheduler", [None, "lambda", "one_cycle", "plateau"])
def test_optimizers_made_by_the_user(scheduler, patched_before, tmp_path):
    model = model_of(BY_NAME["bert"])
    config = LayerCollapseConfig(alpha_learning_rate=0.1)
    if patched_before:
        apply_layer_collapse(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
    schedulers = {
        None: lambda: None,
        "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10),
        "one_cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=10),
        "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    }
    args = {"max_steps": 3, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}
    before = state_of(model)
    trainer = trainer_for(
        "bert",
        tmp_path,
        config=config,
        model=model,
        optimizers=(optimizer, schedulers[scheduler]()),
        compute_loss_func=zero_loss,
        args=args,
    )
    trainer.train()
    for alpha in alphas_of(model).values():
        assert float(alpha) == pytest.approx(1 - 0.8**3, rel=1e-5)
    # The user's optimizer is used, with its decay; alphas appear once.
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])
    parameters = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(model.parameters()))


@pytest.mark.parametrize("trainer_class", [LayerCollapseTrainer, Trainer])
def test_an_optimizer_that_goes_from_one_trainer_to_the_next(trainer_class, tmp_path):
    """The last one drives alphas, once a step."""
    config = LayerCollapseConfig(alpha_learning_rate=0.1)
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        set_alphas(model, *[0.0] * LAYERS)
        trainer = trainer_for(
            "bert",
            tmp_path,
            config=config if trainer_class is LayerCollapseTrainer else False,
            model=model,
            trainer_class=trainer_class,
            optimizers=(optimizer, None),
            callbacks=[] if trainer_class is LayerCollapseTrainer else [LayerCollapseCallback()],
            compute_loss_func=zero_loss,
            args={"max_steps": 2},
        )
        trainer.train()
        assert list(map(float, alphas_of(model).values())) == pytest.approx([1 - 0.8**2] * LAYERS)


def test_an_optimizer_goes_back_to_the_trainer_that_had_it(tmp_path):
    config = LayerCollapseConfig(alpha_learning_rate=0.1)
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"model": model, "optimizers": (optimizer, None), "compute_loss_func": zero_loss}
    first, second = (
        trainer_for("bert", tmp_path / name, config=config, args={"max_steps": 2}, **options) for name in "ab"
    )
    for trainer in (first, second, first):
        set_alphas(model, *[0.0] * LAYERS)
        trainer.train()
        assert list(map(float, alphas_of(model).values())) == pytest.approx([1 - 0.8**2] * LAYERS)


def test_an_optimizer_that_is_let_go_steps_by_itself():
    alpha = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([alpha], lr=0.5)
    steps = AlphaSteps(optimizer, [alpha], LayerCollapseConfig(alpha_learning_rate=0.1), lambda: 1.0)
    alpha.grad = torch.zeros(1)
    optimizer.step()
    assert float(alpha.detach()) == pytest.approx(0.2) and steps.taken == 1
    steps.leave()
    alpha.grad = torch.ones(1)
    optimizer.param_groups[-1]["lr"] = 0.5
    optimizer.step()
    assert float(alpha.detach()) == pytest.approx(-0.3) and steps.taken == 1


def test_alphas_have_their_own_group_without_decay(tmp_path):
    config = {"initial_alpha": 0.5, "penalty_strength": 0.0}
    args = {"max_steps": 2, "weight_decay": 0.5, "learning_rate": 0.1}
    trainer = trainer_for("bert", tmp_path, config=config, args=args, compute_loss_func=zero_loss)
    trainer.train()
    names = trainer.get_decay_parameter_names(trainer.model)
    assert "classifier.weight" in names and not [name for name in names if "alpha" in name]
    group = trainer.optimizer.param_groups[-1]
    alphas = [parameter for name, parameter in trainer.model.named_parameters() if name.endswith(".alpha")]
    assert [id(parameter) for parameter in group["params"]] == [id(alpha) for alpha in alphas]
    assert group["weight_decay"] == 0.0
    assert [float(alpha.detach()) for alpha in alphas] == [0.5] * LAYERS


@pytest.mark.smoke
def test_clipping_is_of_the_task_alone(tmp_path):
    """With alphas of which twelve have a gradient as large as the task's."""
    config = BY_NAME["bert"].config()
    config.num_hidden_layers = 12
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0

    def first_step(max_grad_norm):
        seen = Gradients()
        args = {"max_grad_norm": max_grad_norm}
        model = BY_NAME["bert"].model(config=config)
        trainer = trainer_for("bert", tmp_path, model=model, args=args, callbacks=[seen])
        trainer.train()
        return seen.steps[0], trainer.state.log_history[0]["grad_norm"]

    free, norm = first_step(0.0)
    task = [gradient for name, gradient in free.items() if not name.endswith(".alpha")]
    alphas = [gradient for name, gradient in free.items() if name.endswith(".alpha")]
    task_norm = float(torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in task])))
    assert len(alphas) == 12 and float(torch.cat(alphas).norm()) > 0
    assert norm == pytest.approx(task_norm, rel=1e-5)
    clipped, norm = first_step(1.001 * task_norm)
    assert_same(clipped, free)
    assert norm == pytest.approx(task_norm, rel=1e-5)
    # And it does clip.
    clipped, _ = first_step(0.5 * task_norm)
    for name, gradient in free.items():
        factor = 1.0 if name.endswith(".alpha") else 0.5
        torch.testing.assert_close(clipped[name], factor * gradient, rtol=1e-4, atol=1e-7)


def test_nan_never_moves_an_alpha(tmp_path, caplog):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs["logits"].sum() * float("nan")

    trainer = trainer_for(
        "bert", tmp_path, config={"initial_alpha": 0.9}, compute_loss_func=loss, args={"max_steps": 3}
    )
    trainer.train()
    assert [float(alpha) for alpha in alphas_of(trainer.model).values()] == pytest.approx([0.9] * LAYERS)
    assert caplog.text.count("gradient of an alpha was not finite") == 1
    with pytest.raises(ValueError, match="No block is ready"):
        trainer.collapse()


def test_steps_are_clamped_and_leave_non_finite_neurons(tmp_path):
    alpha = nn.Parameter(torch.tensor([0.1, 0.5, 0.9, 0.4]))
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([alpha, weight], lr=1.0)
    AlphaSteps(optimizer, [alpha], LayerCollapseConfig(alpha_learning_rate=0.125), lambda: 0.0)
    # Four times the step: the penalty is a mean over four.
    alpha.grad, weight.grad = torch.tensor([1.0, float("nan"), -1.0, 0.2]), torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(alpha.detach(), torch.tensor([0.0, 0.5, 1.0, 0.3]))
    torch.testing.assert_close(weight.detach(), torch.zeros(2))
    assert alpha.grad is not None and alpha not in optimizer.state


@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler(fused):
    """Alphas step by unscaled gradients, and not at all where the scaler skips the step."""
    alpha, weight = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight, alpha], lr=0.1, fused=fused)
    AlphaSteps(optimizer, [alpha], LayerCollapseConfig(alpha_learning_rate=0.1), lambda: 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(factor):
        optimizer.zero_grad()
        scaler.scale(-2 * alpha.sum() + factor * weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    step(1.0)
    assert float(alpha.detach()) == pytest.approx(0.2)
    moved = float(weight.detach())
    step(float("inf"))
    assert float(alpha.detach()) == pytest.approx(0.2) and float(weight.detach()) == moved
    step(1.0)
    assert float(alpha.detach()) == pytest.approx(0.4) and float(weight.detach()) < moved


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_in_backward_are_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=f"optim='{optim}' updates parameters during the backward pass"):
        trainer_for("bert", tmp_path, args={"optim": optim})


def test_reentrant_checkpointing_on_several_processes_is_refused(tmp_path, monkeypatch):
    trainer = trainer_for("bert", tmp_path, args=checkpointing(use_reentrant=True))
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="Set use_reentrant=False"):
        trainer._refuse_setup()


# ---- Schedule and logs ----


@pytest.mark.parametrize(
    "schedule, ratio, expected",
    [
        ("constant", 1.0, [2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", 1.0, [0.0, 0.5, 1.0, 1.5, 2.0]),
        ("linear", 0.5, [0.0, 1.0, 2.0, 2.0, 2.0]),
        ("cosine", 1.0, [0.0, 1 - math.sqrt(0.5), 1.0, 1 + math.sqrt(0.5), 2.0]),
    ],
)
def test_penalty_strength_over_time(schedule, ratio, expected):
    config = LayerCollapseConfig(penalty_strength=2.0, penalty_schedule=schedule, penalty_warmup_ratio=ratio)
    assert [penalty_strength_at(config, step, 100) for step in (0, 25, 50, 75, 100)] == pytest.approx(expected)


def test_logs(tmp_path):
    class Spy(LayerCollapseTrainer):
        given = []

        def log(self, logs, start_time=None):
            before = dict(logs)
            super().log(logs, start_time)
            Spy.given.append((before, logs))

    config = {"blocks": "last:2", "penalty_schedule": "linear", "alpha_learning_rate": 0.1}
    args = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    trainer = trainer_for(
        "bert",
        tmp_path,
        config=config,
        accumulate=2,
        batch=4,
        args=args,
        compute_loss_func=zero_loss,
        trainer_class=Spy,
    )
    trainer.train()
    first, second, evaluation, summary = trainer.state.log_history
    # Strengths 0, 1/4, 1/2, 3/4; two blocks.
    left = [1.0]
    for strength in (0.0, 0.25, 0.5, 0.75):
        left.append(left[-1] * (1 - 0.2 * strength))
    penalties = [2 * strength * share**2 for strength, share in zip((0.0, 0.25, 0.5, 0.75), left[:-1], strict=True)]
    for log, pair, strength, share in ((first, penalties[:2], 0.25, left[2]), (second, penalties[2:], 0.75, left[4])):
        assert log["layer_collapse/penalty"] == pytest.approx(sum(pair) / 2, rel=1e-5)
        assert log["loss"] == pytest.approx(sum(pair) / 2, rel=1e-5)
        assert log["layer_collapse/penalty_strength"] == strength
        assert log["layer_collapse/ready_blocks"] == 0
        alphas = {name: value for name, value in log.items() if name.startswith("layer_collapse/alpha/")}
        assert alphas == pytest.approx({f"layer_collapse/alpha/{i}": 1 - share for i in (1, 2)}, rel=1e-5)
        assert log["layer_collapse/alpha_mean"] == pytest.approx(1 - share, rel=1e-5)
    assert evaluation["layer_collapse/ready_blocks"] == 0
    assert "eval_loss" in evaluation and "layer_collapse/penalty" not in evaluation
    assert not [name for name in summary if name.startswith("layer_collapse")]
    json.dumps(trainer.state.log_history)
    # The caller's dict has what upstream puts there, and nothing of ours.
    for before, after in Spy.given:
        assert after.keys() - before.keys() <= {"epoch"} and "epoch" in after


# ---- Evaluation ----


class Counter(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events.append("evaluate")
        self.metrics = dict(metrics)

    def on_log(self, args, state, control, **kwargs):
        self.events.append("log")

    def on_prediction_step(self, args, state, control, **kwargs):
        self.events.append("step")


@pytest.mark.smoke
@pytest.mark.parametrize(
    "options",
    [{}, {"not_ready": "restore"}, {"not_ready": "restore", "activation": "relu"}, {"granularity": "neuron"}],
    ids=["keep", "restore", "restore-relu", "neuron"],
)
def test_collapsed_metrics_are_those_of_the_collapsed_model(options, tmp_path):
    counter = Counter()
    args = {"per_device_eval_batch_size": 6}
    trainer = trainer_for("bert", tmp_path, config=options, compute_metrics=accuracy, callbacks=[counter], args=args)
    set_alphas(trainer.model, 0.96, 1.0, 0.6)
    before = state_of(trainer.model)
    metrics = trainer.evaluate()
    assert_same(state_of(trainer.model), before)
    assert counter.events == ["step", "step", "log", "evaluate"]
    assert counter.metrics == metrics
    assert metrics["eval_collapsed_loss"] != metrics["eval_loss"]
    assert not [name for name in metrics if name.count("collapsed") > 1 or "collapsed_model_preparation" in name]

    report = trainer.collapse()
    assert [block.outcome for block in report.blocks] == [
        "collapsed",
        "collapsed",
        "restored" if "not_ready" in options else "kept",
    ]
    after = trainer.evaluate()
    for name in ("loss", "accuracy"):
        assert metrics[f"eval_collapsed_{name}"] == pytest.approx(after[f"eval_{name}"], rel=1e-4)


@pytest.mark.parametrize(
    "options, shares, value, ready",
    [
        ({"collapse_threshold": 0.3}, [0.9, 0.9, 0.9], 0.71, 2.7),
        ({"not_ready": "restore"}, [1.0, 0.9, 0.9], 1.0, 2.8),
        ({"not_ready": "restore"}, [1.0, 0.9, 0.1], 0.97, 1.9),  # the last would not be smaller
        ({}, [0.1, 0.05, 0.0], 0.97, 0),
    ],
    ids=["in part", "one wholly", "restored", "none"],
)
def test_collapsed_metrics_of_blocks_that_are_ready_in_part(options, shares, value, ready, tmp_path):
    """What an evaluation says of the collapsed model is what a collapse makes of it."""
    trainer = trainer_for("bert", tmp_path, config={"granularity": "neuron", **options})
    with torch.no_grad():
        for alpha, share in zip(alpha_parameters(trainer.model), shares, strict=True):
            alpha.fill_(0.1)
            alpha[: round(share * HIDDEN)] = value
    before = state_of(trainer.model)
    metrics = trainer.evaluate()
    assert_same(state_of(trainer.model), before)
    assert trainer.state.log_history[-1]["layer_collapse/ready_blocks"] == pytest.approx(ready)
    if not ready:
        assert metrics["eval_collapsed_loss"] == metrics["eval_loss"]
        with pytest.raises(ValueError, match="No block is ready"):
            trainer.collapse()
        return
    # At 1 a collapse of neurons changes nothing.
    assert (metrics["eval_collapsed_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)) == (value == 1)
    report = trainer.collapse()
    waits = "restored" if "not_ready" in options else "kept"
    assert [block.outcome for block in report.blocks] == ["collapsed" if s > 0.1 else waits for s in shares]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(metrics["eval_collapsed_loss"], rel=1e-4)


def test_nothing_is_measured_twice_where_nothing_would_change(tmp_path):
    calls = []

    def compute_metrics(prediction):
        calls.append(1)
        return accuracy(prediction)

    trainer = trainer_for("bert", tmp_path, compute_metrics=compute_metrics)
    for values in ((0.0, 0.5, 0.9), (1.0, 1.0, 0.5)):
        calls.clear()
        set_alphas(trainer.model, *values)
        metrics = trainer.evaluate()
        assert len(calls) == 1
        assert metrics["eval_collapsed_loss"] == metrics["eval_loss"]
        assert metrics["eval_collapsed_accuracy"] == metrics["eval_accuracy"]


def test_collapsed_metrics_of_several_sets_and_other_prefixes(tmp_path):
    data = {"a": rows(BY_NAME["bert"], 4), "b": rows(BY_NAME["bert"], 4, seed=2)}
    trainer = trainer_for("bert", tmp_path, evaluate=data)
    set_alphas(trainer.model, 0.96, 0.96, 0.96)
    assert {
        "eval_a_loss",
        "eval_a_collapsed_loss",
        "eval_b_loss",
        "eval_b_collapsed_loss",
    } <= trainer.evaluate().keys()
    metrics = trainer.evaluate(data["a"], metric_key_prefix="held_out")
    assert {"held_out_loss", "held_out_collapsed_loss"} <= metrics.keys()
    assert "test_collapsed_loss" not in trainer.predict(data["a"]).metrics


def test_what_metrics_write_is_of_the_model_as_it_is(tmp_path):
    """They are computed twice; what is in the file afterwards is what `predict` gives."""

    def compute_metrics(prediction):
        np.save(tmp_path / "predictions.npy", prediction.predictions)
        return {"first": float(prediction.predictions[0, 0])}

    trainer = trainer_for("bert", tmp_path, {"initial_alpha": 0.96}, compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    assert metrics["eval_first"] != metrics["eval_collapsed_first"]
    written = np.load(tmp_path / "predictions.npy")
    np.testing.assert_array_equal(written, trainer.predict(trainer.eval_dataset).predictions)


class Once(IterableDataset):
    """Gives its rows once, as a stream from a pipe does."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


class Stream(Once):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_only_one_pass_of_predictions_is_held(tmp_path):
    held = []

    def compute_metrics(prediction):
        alive = sum(array() is not None for array in held)
        held.append(weakref.ref(prediction.predictions))
        return {"alive": alive}

    trainer = trainer_for("bert", tmp_path, compute_metrics=compute_metrics)
    set_alphas(trainer.model, *[0.96] * LAYERS)
    assert trainer.evaluate()["eval_alive"] == 0 and len(held) == 2


def test_data_that_can_be_read_only_once_are_for_the_model_as_it_is(tmp_path, caplog):
    data = rows(BY_NAME["bert"], 12, seed=1)
    options = {"config": {"initial_alpha": 0.96}}
    expected = trainer_for("bert", tmp_path, evaluate=data, **options).evaluate()
    metrics = trainer_for("bert", tmp_path, evaluate=Stream(data), **options).evaluate()
    assert metrics["eval_collapsed_loss"] == pytest.approx(expected["eval_collapsed_loss"], rel=1e-6)
    assert "read only once" not in caplog.text
    metrics = trainer_for("bert", tmp_path, evaluate=Once(data), **options).evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert "eval_collapsed_loss" not in metrics
    assert "evaluation data can be read only once" in caplog.text


def test_the_last_loss_is_the_own_one(tmp_path):
    """A notebook's table takes its prefix for that of all metrics, and leaves out the times of that prefix."""
    trainer = trainer_for("bert", tmp_path, {"initial_alpha": 0.96}, compute_metrics=lambda prediction: {"a": 0.5})
    metrics = trainer.evaluate()
    assert [name for name in metrics if name.endswith("_loss")] == ["eval_collapsed_loss", "eval_loss"]


def test_evaluation_restores_alphas_after_an_error(tmp_path):
    calls = []

    def compute_metrics(prediction):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError
        return {}

    trainer = trainer_for("bert", tmp_path, compute_metrics=compute_metrics)
    set_alphas(trainer.model, 0.96, 0.97, 0.5)
    before, handler = state_of(trainer.model), trainer.callback_handler
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate()
    assert_same(state_of(trainer.model), before)
    assert trainer.callback_handler is handler


def test_evaluation_leaves_random_numbers_alone(tmp_path):
    def compute_metrics(prediction):
        return {"noise": random.random() + float(np.random.rand()) + float(torch.rand(()))}

    def next_numbers(*alphas):
        trainer = trainer_for("bert", tmp_path, compute_metrics=compute_metrics)
        set_alphas(trainer.model, *alphas)
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        trainer.evaluate()
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert next_numbers(0.96, 0.96, 0.96) == next_numbers(0.0, 0.0, 0.0)


# (alphas, accuracy, accuracy with the ready blocks collapsed); measured once where no block is ready.
SCRIPT = [
    ((0.0, 0.0, 0.0), 0.90, None),
    ((0.96, 0.0, 0.0), 0.95, 0.60),
    ((0.96, 0.0, 0.0), 0.70, 0.65),  # the best: one block is ready, and the collapsed model is better
    ((0.96, 0.0, 0.0), 0.99, 0.50),
    ((0.0, 0.0, 0.0), 1.00, None),
]


def scripted_trainer(tmp_path, start=0, **kwargs):
    # The collapsed model's first.
    values = [value for _, *pair in SCRIPT[start:] for value in pair[::-1] if value is not None]
    args = {
        "max_steps": len(SCRIPT),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "accuracy",
        "greater_is_better": True,
        **kwargs,
    }
    return trainer_for(
        "bert",
        tmp_path,
        config={"penalty_strength": 0.0},
        compute_metrics=lambda prediction: {"accuracy": values.pop(0)},
        callbacks=[SetAlphas([alphas for alphas, *_ in SCRIPT])],
        args=args,
    )


def test_the_best_is_among_those_with_the_most_ready_blocks(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    trainer = scripted_trainer(tmp_path, **saving)
    trainer.train()
    assert os.path.basename(trainer.state.best_model_checkpoint) == "checkpoint-3"
    assert trainer.state.best_metric == 0.70
    assert list(map(float, alphas_of(trainer.model).values())) == pytest.approx([0.96, 0.0, 0.0])

    # What is needed to go on comparing survives a resume.
    for start in (2, 3):
        resumed = scripted_trainer(tmp_path, start=start, **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{start}"))
        assert os.path.basename(resumed.state.best_model_checkpoint) == "checkpoint-3"


def test_the_best_is_followed_without_checkpoints(tmp_path):
    trainer = scripted_trainer(tmp_path)
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.70, 3)


def test_upstream_would_choose_the_least_collapsed(tmp_path):
    class Upstream(LayerCollapseTrainer):
        def _determine_best_metric(self, metrics, trial):
            return Trainer._determine_best_metric(self, metrics, trial)

    values = [value for _, *pair in SCRIPT for value in pair if value is not None]
    trainer = trainer_for(
        "bert",
        tmp_path,
        config={"penalty_strength": 0.0},
        trainer_class=Upstream,
        compute_metrics=lambda prediction: {"accuracy": values.pop(0)},
        callbacks=[SetAlphas([alphas for alphas, *_ in SCRIPT])],
        args={
            "max_steps": 5,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "best",
            "metric_for_best_model": "accuracy",
        },
    )
    trainer.train()
    assert trainer.state.best_global_step == 5


@pytest.mark.parametrize("resumed", [False, True])
def test_early_stopping_goes_on_while_more_blocks_get_ready(resumed, tmp_path):
    """Each evaluation is the best until all are ready, though the metric falls."""

    def trainer():
        alphas = [tuple(0.97 if block < step else 0.1 for block in range(LAYERS)) for step in range(1, 9)]
        made = trainer_for(
            "bert",
            tmp_path,
            config={"penalty_strength": 0.0},
            compute_metrics=lambda prediction: {"accuracy": 0.9 - 0.1 * made.state.global_step},
            callbacks=[SetAlphas(alphas), EarlyStoppingCallback(2)],
            args={
                "max_steps": 8,
                "eval_strategy": "steps",
                "eval_steps": 1,
                "save_strategy": "steps",
                "save_steps": 1,
                "load_best_model_at_end": True,
                "metric_for_best_model": "accuracy",
                "restore_callback_states_from_checkpoint": True,
            },
        )
        return made

    made = trainer()
    made.train()
    if resumed:
        made = trainer()
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert made.state.global_step == LAYERS + 2
    assert made.state.best_global_step == LAYERS
    assert made.state.best_metric == pytest.approx(0.9 - 0.1 * LAYERS)


def test_early_stopping_stops_when_nothing_gets_better(tmp_path):
    """With a ready block, whose collapsed metric is worse than the live one."""
    live_and_collapsed = [0.9, 0.8] * 10
    trainer = trainer_for(
        "bert",
        tmp_path,
        config={"penalty_strength": 0.0, "initial_alpha": 0.96, "alpha_learning_rate": 1e-9},
        compute_metrics=lambda prediction: {"accuracy": live_and_collapsed.pop(0)},
        callbacks=[EarlyStoppingCallback(2)],
        args={
            "max_steps": 8,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "accuracy",
        },
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert os.path.basename(trainer.state.best_model_checkpoint) == "checkpoint-1"


def test_search_objective_counts_a_metric_once(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        Trainer, "hyperparameter_search", lambda self, space, objective, **kw: seen.update(f=objective)
    )
    trainer = trainer_for("bert", tmp_path, compute_metrics=lambda prediction: {"accuracy": 0.5})
    set_alphas(trainer.model, 0.96, 0.96, 0.96)
    metrics = trainer.evaluate()
    trainer.hyperparameter_search(n_trials=1)
    metrics = {name: value for name, value in metrics.items() if not name.endswith("preparation_time")}
    assert seen["f"](metrics) == 0.5


# ---- Checkpoints ----


RESUMED = {"penalty_schedule": "cosine", "alpha_learning_rate": 0.05}


@pytest.mark.smoke
@pytest.mark.parametrize("case, optim", [*((case, "adamw_torch") for case in FAMILIES), ("bert", "adafactor")])
def test_resumed_equals_uninterrupted(case, optim, tmp_path):
    args = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": optim,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
    }
    whole = trainer_for(case, tmp_path, config=RESUMED, dropout=True, batch=4, accumulate=2, args=args)
    whole.train()
    resumed = trainer_for(case, tmp_path, config=RESUMED, dropout=True, batch=4, accumulate=2, args=args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(state_of(resumed.model), state_of(whole.model))
    assert 0 < float(next(iter(alphas_of(whole.model).values()))) < 1
    runtime = ("train_runtime", "train_loss", "train_samples_per_second", "train_steps_per_second", "total_flos")
    for left, right in zip(resumed.state.log_history, whole.state.log_history, strict=True):
        assert {k: v for k, v in left.items() if k not in runtime} == {
            k: v for k, v in right.items() if k not in runtime
        }


def test_upstream_resumes_a_vit_incompletely(tmp_path):
    """What checkpoints in live names are for. When this fails, upstream has mended it."""

    def restored(trainer_class, folder):
        args = {"save_strategy": "steps", "save_steps": 1}
        trained = trainer_for("vit", folder, config=False, trainer_class=trainer_class, args=args)
        trained.train()
        model = model_of(BY_NAME["vit"], seed=5)
        other = trainer_for("vit", folder, config=False, trainer_class=trainer_class, model=model)
        other._load_from_checkpoint(str(folder / "checkpoint-1"))
        expected = state_of(trained.model)
        return [name for name, value in state_of(model).items() if torch.equal(value, expected[name])], expected

    found, expected = restored(Trainer, tmp_path / "upstream")
    assert 0 < len(found) < len(expected) / 2
    found, expected = restored(LayerCollapseTrainer, tmp_path / "ours")
    assert len(found) == len(expected)


@pytest.mark.smoke
@pytest.mark.parametrize("case", FAMILIES)
def test_load_best_model_at_end(case, tmp_path):
    # Ready only at step 1, so that the best is not the last.
    args = {
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "learning_rate": 0.05,
    }
    states = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            states.append(state_of(model))

    schedule = SetAlphas([(0.96,) * LAYERS, (0.5,) * LAYERS, (0.5,) * LAYERS])
    trainer = trainer_for(case, tmp_path, config={}, args=args, callbacks=[schedule, Keep()])
    trainer.train()
    assert os.path.basename(trainer.state.best_model_checkpoint) == "checkpoint-1"
    assert_same(state_of(trainer.model), states[0])
    auto_class = BY_NAME[case].auto_class
    assert_same(auto_class.from_pretrained(tmp_path / "checkpoint-1").state_dict(), states[0])


def test_checkpoints_do_not_name_the_model(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 1}
    trainer = trainer_for("vit", tmp_path, args=args)
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "config.json").is_file()
    assert trainer.model.name_or_path == "" and trainer.model.config._name_or_path == ""
    trainer.save_model(str(tmp_path / "own"))
    assert trainer.model.name_or_path == str(tmp_path / "own")


def test_save_model_writes_the_original_names(tmp_path):
    from safetensors import safe_open

    args = {"save_strategy": "steps", "save_steps": 1}
    trainer = trainer_for("vit", tmp_path, config={"blocks": [0]}, args=args)
    trainer.train()
    trainer.save_model(str(tmp_path / "own"))
    with safe_open(tmp_path / "own" / "model.safetensors", "pt") as file:
        assert "vit.encoder.layer.1.intermediate.dense.weight" in file.keys()
    with safe_open(tmp_path / "checkpoint-1" / "model.safetensors", "pt") as file:
        assert "vit.layers.1.mlp.fc1.weight" in file.keys()
    for folder in ("own", "checkpoint-1"):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / folder)
        assert_same(state_of(loaded), state_of(trainer.model))


def test_resuming_another_life_is_an_error(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 1}
    trainer_for("bert", tmp_path / "patched", args=args).train()
    trainer_for("bert", tmp_path / "dense", config=False, args=args).train()
    last = {"config": {"blocks": "last:1"}}
    for folder, options, message in (
        ("patched", {"config": False}, r"patched \(3 alphas\), and the model here is dense"),
        ("dense", {}, r"dense, and the model here is patched \(3 alphas\)"),
        ("patched", last, r"patched \(3 alphas\), and the model here is patched \(1 alphas\)"),
    ):
        other = trainer_for("bert", tmp_path, **options)
        before = state_of(other.model)
        with pytest.raises(ValueError, match=message):
            other.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-1"))
        assert_same(state_of(other.model), before)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "shard", "bin"])
def test_resuming_a_damaged_checkpoint_is_an_error(damage, tmp_path):
    """Before any weight is read into the model."""
    from safetensors.torch import load_file, save_file

    trainer_for("gpt2", tmp_path, args={"save_strategy": "steps", "save_steps": 1}).train()
    folder = tmp_path / "checkpoint-1"
    file, second = folder / "model.safetensors", folder / "model-00002-of-00002.safetensors"
    tensors, message = load_file(file), rf"{damage} \['transformer.h.1.mlp"
    if damage == "missing":
        del tensors["transformer.h.1.mlp.act.alpha"]
    elif damage == "unexpected":
        tensors["transformer.h.1.mlp.extra"] = torch.zeros(1)
    elif damage == "shape":
        tensors["transformer.h.1.mlp.act.alpha"] = torch.zeros(2)
        message = r"of another shape \['transformer.h.1.mlp.act.alpha \(2,\) in place of \(1,\)'"
    save_file(tensors, file, metadata={"format": "pt"})
    if damage == "shard":
        names, first = list(tensors), folder / "model-00001-of-00002.safetensors"
        parts = {first: names[:5], second: names[5:]}
        for part, held in parts.items():
            save_file({name: tensors[name] for name in held}, part, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: part.name for part, held in parts.items() for name in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        file.unlink()
        trainer_for("gpt2", tmp_path, args={"max_steps": 2}).train(resume_from_checkpoint=str(folder))
        second.write_bytes(second.read_bytes()[:-10])
        message = f"{second.name} cannot be read"
    elif damage == "bin":
        file.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        whole = (folder / "pytorch_model.bin").read_bytes()
        (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
        message = "pytorch_model.bin cannot be read"
    other = trainer_for("gpt2", tmp_path)
    before = state_of(other.model)
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=str(folder))
    assert_same(state_of(other.model), before)


def test_a_pushed_checkpoint_has_its_code(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: None)
    trainer = trainer_for("bert", tmp_path, args={"save_strategy": "steps", "save_steps": 1})
    trainer.train()
    assert not (tmp_path / "modeling_layercollapse.py").exists()
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert (tmp_path / "modeling_layercollapse.py").is_file()


# ---- Collapse ----


@pytest.mark.smoke
@pytest.mark.parametrize(
    "case, auto_class",
    [
        ("bert", AutoModelForSequenceClassification),
        ("vit", AutoModelForImageClassification),
        ("gpt2", AutoModelForCausalLM),
    ],
)
def test_train_collapse_save_load_and_go_on(case, auto_class, tmp_path):
    config = {"alpha_learning_rate": 0.4, "penalty_strength": 1.0}
    trainer = trainer_for(case, tmp_path, config=config, args={"max_steps": 4})
    trainer.train()
    patched_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    report = trainer.collapse()
    assert len(report.collapsed) == LAYERS and report.parameters_before == patched_parameters
    metrics = trainer.evaluate()
    assert not [name for name in metrics if "collapsed" in name]
    trainer.save_model(str(tmp_path / "collapsed"))
    loaded = auto_class.from_pretrained(tmp_path / "collapsed")
    assert_same(state_of(loaded), state_of(trainer.model))
    predictions = trainer.predict(trainer.eval_dataset).predictions

    # Training goes on with an optimizer that holds the new parameters.
    before = state_of(trainer.model)
    args = {"save_strategy": "steps", "save_steps": 1}
    trainer.train()
    weight = next(name for name in before if "fc2.weight" in name or "output.dense" in name or "c_proj" in name)
    assert not torch.equal(state_of(trainer.model)[weight], before[weight])
    assert not np.array_equal(trainer.predict(trainer.eval_dataset).predictions, predictions)

    # A collapsed model trains without a config, and resumes.
    healing = trainer_for(case, tmp_path / "heal", config=False, model=loaded, args={"max_steps": 2, **args})
    healing.train()
    model = auto_class.from_pretrained(tmp_path / "collapsed")
    resumed = trainer_for(case, tmp_path / "heal", config=False, model=model, args={"max_steps": 2, **args})
    resumed.train(resume_from_checkpoint=str(tmp_path / "heal" / "checkpoint-1"))
    assert_same(state_of(model), state_of(loaded))


def test_collapse_of_waiting_and_of_no_blocks(tmp_path):
    trainer = trainer_for("bert", tmp_path, config={"not_ready": "restore"})
    set_alphas(trainer.model, 0.96, 0.5, 0.0)
    report = trainer.collapse()
    assert report.not_collapsed == ["bert.encoder.layer.1", "bert.encoder.layer.2"]
    assert not alphas_of(trainer.model)

    for not_ready in ("keep", "restore"):
        trainer = trainer_for("bert", tmp_path, config={"not_ready": not_ready})
        with pytest.raises(ValueError, match="No block is ready"):
            trainer.collapse()
        report = trainer.collapse(allow_none=True)
        assert report.collapsed == [] and len(report.not_collapsed) == LAYERS
        assert len(alphas_of(trainer.model)) == (LAYERS if not_ready == "keep" else 0)
        trainer.train()


def test_collapse_refuses_a_large_error_and_refits_on_data(tmp_path):
    data = [{name: value for name, value in BY_NAME["bert"].inputs(batch=16, seed=i).items()} for i in range(4)]
    errors = {}
    for name, batches in (("merged", None), ("refit", data)):
        trainer = trainer_for("bert", tmp_path, config={"initial_alpha": 0.96})
        with pytest.raises(ValueError, match="max_error=0"):
            trainer.collapse(batches, max_error=0.0)
        assert len(alphas_of(trainer.model)) == LAYERS
        report = trainer.collapse(batches, max_error=10.0)
        assert {block.method for block in report.blocks} == {name}
        errors[name] = report
    assert errors["refit"].largest_logit_difference is not None


# ---- What the Trainer is given ----


def test_model_init_patches_each_model(tmp_path):
    made = []

    def model_init():
        made.append(model_of(BY_NAME["bert"]))
        return made[-1]

    config = {"alpha_learning_rate": 0.1}
    trainer = trainer_for("bert", tmp_path, config=config, model_init=model_init, compute_loss_func=zero_loss)
    for _ in range(2):
        trainer.train()
        assert trainer.model is made[-1]
        assert list(map(float, alphas_of(made[-1]).values())) == pytest.approx([0.2] * LAYERS)
    assert len(made) == 3 and all(len(alphas_of(model)) == LAYERS for model in made)


def test_training_twice_goes_on(tmp_path):
    config = {"alpha_learning_rate": 0.1}
    trainer = trainer_for("bert", tmp_path, config=config, compute_loss_func=zero_loss)
    trainer.train()
    trainer.train()
    assert list(map(float, alphas_of(trainer.model).values())) == pytest.approx([1 - 0.8**2] * LAYERS)
    assert len(trainer.optimizer.param_groups) == 3


def test_a_patched_model_brings_its_own_config(tmp_path):
    stored = LayerCollapseConfig(blocks="last:1", alpha_learning_rate=0.25)
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), stored)
    trainer = trainer_for("bert", tmp_path, config=False, model=model, compute_loss_func=zero_loss)
    assert trainer.layer_collapse_config == replace(stored, blocks=BY_NAME["bert"].blocks()[-1:])
    trainer.train()
    assert list(map(float, alphas_of(model).values())) == pytest.approx([0.5])


def test_a_patched_model_may_be_driven_otherwise(tmp_path):
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig(blocks="last:1"))
    config = LayerCollapseConfig(blocks=[2], alpha_learning_rate=0.25)
    trainer = trainer_for("bert", tmp_path, config=config, model=model, compute_loss_func=zero_loss)
    trainer.train()
    assert list(map(float, alphas_of(model).values())) == pytest.approx([0.5])
    trainer.save_model()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["layer_collapse"]["options"]["alpha_learning_rate"] == 0.25


@pytest.mark.parametrize(
    "options, message",
    [
        ({"blocks": "last:1"}, r"`blocks`: 'last:1' chooses \['bert.encoder.layer.2'\], patched are"),
        ({"granularity": "neuron"}, "`granularity`: 'neuron' in the config, 'block' here"),
        ({"activation": "relu"}, "`activation`: 'relu' in the config, 'native' here"),
        ({"linear_target": "affine"}, "`linear_target`: 'affine' in the config, 'identity' here"),
    ],
)
def test_a_model_patched_otherwise_is_refused(options, message, tmp_path):
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig())
    with pytest.raises(ValueError, match=message):
        trainer_for("bert", tmp_path, config=options, model=model)


@pytest.mark.parametrize(
    "config, kwargs, error",
    [
        ({"progressive": True, "progressive_order": ["no.such.block"]}, {}, "no block of this model"),
        ({}, {"args": {"optim": "lomo"}}, "during the backward pass"),
        ({"linear_target": "affine"}, {}, "needs `calibration_data`"),
        ({}, {"callbacks": [LayerCollapseCallback()]}, "for Trainers without the mixin"),
        ({}, {"no_such_argument": 1}, "no_such_argument"),
        ({"hidden_state_weight": 1.0}, {"teacher": nn.Linear(2, 2)}, "has no"),
    ],
)
def test_a_refused_setup_leaves_the_model_as_it_was(config, kwargs, error, tmp_path):
    """So that the corrected call goes through."""
    model = model_of(BY_NAME["bert"])
    model.name_or_path = model.config._name_or_path = "some/where"
    model.config.use_cache = False  # as every Trainer sets it
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=error):
        trainer_for("bert", tmp_path, {"blocks": "last:2", **config}, model=model, **kwargs)
    assert_unchanged(model, before)
    trainer_for("bert", tmp_path, {"blocks": "last:1"}, model=model)
    assert len(alphas_of(model)) == 1


def test_a_collapsed_model_is_refused(tmp_path):
    for not_ready in ("keep", "restore"):
        model = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig(not_ready=not_ready))
        set_alphas(model, 1.0, 1.0, 0.0 if not_ready == "restore" else 1.0)
        collapse_model(model)
        with pytest.raises(ValueError, match="is collapsed .* and carries no alpha"):
            trainer_for("bert", tmp_path, model=model)
    # Its dense blocks can be patched, and then trained.
    trainer = trainer_for("bert", tmp_path, model=apply_layer_collapse(model))
    trainer.train()
    assert "layer_collapse/alpha/2" in trainer.state.log_history[0]
    assert "layer_collapse/alpha/1" not in trainer.state.log_history[0]


def test_affine_targets_need_data(tmp_path):
    with pytest.raises(ValueError, match="needs `calibration_data`"):
        trainer_for("bert", tmp_path, config={"linear_target": "affine"})
    data = [BY_NAME["bert"].inputs(batch=4, seed=i) for i in range(2)]
    trainer = trainer_for("bert", tmp_path, config={"linear_target": "affine"}, calibration_data=data)
    slopes = [value for name, value in trainer.model.named_buffers() if name.endswith(".slope")]
    assert len(slopes) == LAYERS and not any(bool((slope == 1).all()) for slope in slopes)
    trainer.train()


def test_wrong_types(tmp_path):
    with pytest.raises(TypeError, match="must be a LayerCollapseConfig, got dict"):
        LayerCollapseTrainer(model_of(BY_NAME["bert"]), layer_collapse_config={"blocks": "all"})
    with pytest.raises(TypeError, match="got str"):
        LayerCollapseTrainer("bert", layer_collapse_config=LayerCollapseConfig())
    with pytest.raises(TypeError, match="Patch it before it is wrapped"):
        trainer_for("bert", tmp_path, model=nn.DataParallel(model_of(BY_NAME["bert"])))


def test_without_a_config_it_is_a_plain_trainer(tmp_path):
    def train(trainer_class):
        args = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "max_grad_norm": 1.0, "weight_decay": 0.1}
        trainer = trainer_for("bert", tmp_path, config=False, trainer_class=trainer_class, dropout=True, args=args)
        trainer.train()
        return trainer

    ours, plain = train(LayerCollapseTrainer), train(Trainer)
    assert_same(state_of(ours.model), state_of(plain.model))
    for left, right in zip(ours.state.log_history, plain.state.log_history, strict=True):
        assert left.keys() == right.keys()


def test_the_mixin_in_front_of_another_trainer(tmp_path):
    class Both(LayerCollapseTrainerMixin, Seq2SeqTrainer):
        pass

    trainer = Both(
        model=model_of(BY_NAME["bert"]),
        args=Seq2SeqTrainingArguments(
            str(tmp_path), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False
        ),
        train_dataset=rows(BY_NAME["bert"], 8),
        eval_dataset=rows(BY_NAME["bert"], 8),
        layer_collapse_config=LayerCollapseConfig(alpha_learning_rate=0.48),
        compute_loss_func=zero_loss,
    )
    trainer.train()
    assert "eval_collapsed_loss" in trainer.evaluate()
    assert len(trainer.collapse().collapsed) == LAYERS
