"""The callback form: for a Trainer whose class cannot be changed."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from hf_layercollapse import (
    LayerCollapseCallback,
    LayerCollapseConfig,
    LayerCollapseTrainer,
    apply_layer_collapse,
    collapse_model,
)
from tests.models import BY_NAME, LAYERS
from tests.training import (
    adapters_of_transformers,
    alphas_of,
    assert_same,
    model_of,
    set_alphas,
    state_of,
    trainer_for,
    zero_loss,
)


def plain(case, folder, config=None, callback=None, **kwargs):
    """A plain Trainer with the callback."""
    callback = callback or LayerCollapseCallback(LayerCollapseConfig(**(config or {})))
    callbacks = [callback, *kwargs.pop("callbacks", [])]
    return trainer_for(case, folder, config=False, trainer_class=Trainer, callbacks=callbacks, **kwargs)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_alphas_move_as_under_the_trainer(accumulate, schedule, tmp_path):
    config = {"alpha_learning_rate": 0.05, "penalty_schedule": schedule}
    args = {"max_steps": 6, "learning_rate": 0.01, "max_grad_norm": 1.0, "logging_steps": 2}
    options = {"batch": 8 // accumulate, "accumulate": accumulate, "args": args, "compute_loss_func": zero_loss}
    ours = trainer_for("bert", tmp_path, config=config, **options)
    other = plain("bert", tmp_path, config=config, **options)
    for trainer in (ours, other):
        trainer.train()
    for name, alpha in alphas_of(ours.model).items():
        torch.testing.assert_close(alphas_of(other.model)[name], alpha)
    for left, right in zip(ours.state.log_history[:-1], other.state.log_history[:-1], strict=True):
        left, right = ({n: v for n, v in log.items() if n.startswith("layer_collapse/")} for log in (left, right))
        assert right == pytest.approx(left, rel=1e-4, abs=1e-6) and "layer_collapse/penalty" in left


def test_everything_else_is_as_under_the_trainer(tmp_path):
    """With a loss that counts items and no clipping, down to the weights."""
    config = {"alpha_learning_rate": 0.02}
    options = {"batch": 2, "accumulate": 4, "args": {"max_steps": 5, "learning_rate": 0.01, "weight_decay": 0.1}}
    ours = trainer_for("gpt2", tmp_path, config=config, **options)
    other = plain("gpt2", tmp_path, config=config, **options)
    for trainer in (ours, other):
        trainer.train()
    expected = state_of(ours.model)
    for name, value in state_of(other.model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert 0.1 < float(next(iter(alphas_of(other.model).values()))) < 0.3


def test_train_log_collapse_and_save(tmp_path):
    seen = []

    class Spy(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = plain(
        "bert", tmp_path, config={"alpha_learning_rate": 0.4}, callbacks=[Spy()], args={"max_steps": 3}, batch=4
    )
    trainer.train()
    assert seen[0]["layer_collapse/ready_blocks"] == 0 and seen[2]["layer_collapse/ready_blocks"] == LAYERS
    assert trainer.state.log_history[2]["layer_collapse/alpha/2"] > 0.95
    assert "layer_collapse/penalty" not in seen[-1]
    assert len(collapse_model(trainer.model).collapsed) == LAYERS
    trainer.save_model(str(tmp_path / "collapsed"))
    loaded = BY_NAME["bert"].auto_class.from_pretrained(tmp_path / "collapsed")
    assert_same(state_of(loaded), state_of(trainer.model))


def test_resumed_equals_uninterrupted(tmp_path):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    config = {"alpha_learning_rate": 0.05}
    whole = plain("bert", tmp_path, config=config, args=args)
    whole.train()
    resumed = plain("bert", tmp_path, config=config, args=args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(state_of(resumed.model), state_of(whole.model))


def test_training_twice_goes_on(tmp_path):
    trainer = plain("bert", tmp_path, config={"alpha_learning_rate": 0.1}, compute_loss_func=zero_loss)
    trainer.train()
    trainer.train()
    assert list(map(float, alphas_of(trainer.model).values())) == pytest.approx([1 - 0.8**2] * LAYERS)


@pytest.mark.parametrize("make", [plain, trainer_for])
def test_the_first_log_of_a_run_is_of_its_own_steps(make, tmp_path):
    """And not of those of the run before that no log came after."""
    args = {"max_steps": 3, "logging_steps": 2}
    trainer = make("bert", tmp_path, config={"alpha_learning_rate": 0.1}, compute_loss_func=zero_loss, args=args)
    for taken in (0, 3):
        trainer.train()
        penalties = [LAYERS * 0.8 ** (2 * step) for step in (taken, taken + 1)]
        logged = trainer.state.log_history[0]["layer_collapse/penalty"]
        assert logged == pytest.approx(sum(penalties) / 2, rel=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_logs_have_the_names_that_the_trainer_gives_them(adapted, tmp_path):
    def logged(trainer_class, **kwargs):
        model = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig(blocks="last:2"))
        if adapted:
            names = {"target_modules": ["query"], "modules_to_save": ["intermediate_act_fn"]}
            model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, **names))
        trainer = trainer_for("bert", tmp_path, config=False, trainer_class=trainer_class, model=model, **kwargs)
        trainer.train()
        return {name for name in trainer.state.log_history[0] if name.startswith("layer_collapse/")}

    names = logged(Trainer, callbacks=[LayerCollapseCallback()])
    assert names == logged(LayerCollapseTrainer)
    assert {name for name in names if "alpha/" in name} == {"layer_collapse/alpha/1", "layer_collapse/alpha/2"}


def test_nan_never_moves_an_alpha(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs["logits"].sum() * float("nan")

    trainer = plain("bert", tmp_path, config={"initial_alpha": 0.9}, compute_loss_func=loss, args={"max_steps": 2})
    trainer.train()
    assert list(map(float, alphas_of(trainer.model).values())) == pytest.approx([0.9] * LAYERS)


def test_a_patched_model_brings_its_config(tmp_path):
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig(alpha_learning_rate=0.25))
    trainer = plain("bert", tmp_path, callback=LayerCollapseCallback(), model=model, compute_loss_func=zero_loss)
    trainer.train()
    assert list(map(float, alphas_of(model).values())) == pytest.approx([0.5] * LAYERS)


def test_what_is_refused(tmp_path):
    with pytest.raises(TypeError, match="got dict"):
        LayerCollapseCallback({"blocks": "all"})
    with pytest.raises(ValueError, match="no alpha to train"):
        plain("bert", tmp_path, callback=LayerCollapseCallback()).train()
    late = trainer_for("bert", tmp_path, config=False, trainer_class=Trainer)
    late.add_callback(LayerCollapseCallback(LayerCollapseConfig()))
    with pytest.raises(ValueError, match="when it is constructed"):
        late.train()
    made = plain("bert", tmp_path, model_init=lambda: model_of(BY_NAME["bert"]))
    with pytest.raises(ValueError, match="`model_init` makes a new one .* put LayerCollapseTrainerMixin in front"):
        made.train()
    other = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig(blocks="last:1"))
    with pytest.raises(ValueError, match="patched already, and not as"):
        plain("bert", tmp_path, model=other)
    collapsed = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig())
    set_alphas(collapsed, *[1.0] * LAYERS)
    collapse_model(collapsed)
    with pytest.raises(ValueError, match="collapsed"):
        plain("bert", tmp_path, model=collapsed)
    if adapters_of_transformers():
        adapted = model_of(BY_NAME["bert"])
        adapted.add_adapter(LoraConfig(target_modules=["query"]))
        with pytest.raises(ValueError, match="adapters and was patched in memory.* or its mixin, whose"):
            plain("bert", tmp_path, model=adapted, args={"save_strategy": "steps"}).train()
    with pytest.raises(ValueError, match="is for Trainers without the mixin"):
        trainer_for("bert", tmp_path, trainer_class=LayerCollapseTrainer, callbacks=[LayerCollapseCallback()])
