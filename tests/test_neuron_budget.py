"""A penalty with a stated size: which neurons alphas are told to take away, how many, and what is left."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from hf_layercollapse import (
    CollapsibleActivation,
    LayerCollapseCallback,
    LayerCollapseConfig,
    LayerCollapseTrainer,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
)
from hf_layercollapse.neuron_budget import BlockWeights, told_to_go
from hf_layercollapse.patching import alpha_parameters, collapsible_activations
from tests.models import BY_NAME, HIDDEN, LAYERS, VOCABULARY, WIDTH, randomize
from tests.training import assert_same, model_of, rows, state_of, trainer_for


CONSTANT = {"granularity": "neuron", "linear_target": "constant"}
ALONE = {**CONSTANT, "budget_method": "penalty", "distillation_weight": 0.0}
BUDGET = {**ALONE, "budget": "macs=0.4"}


def data_for(case):
    return [BY_NAME[case].inputs(batch=16, seed=seed) for seed in range(2)]


def budget_trainer(case, folder, config=BUDGET, steps=12, **kwargs):
    args = {"max_steps": steps, **kwargs.pop("args", {})}
    return trainer_for(case, folder, config, calibration_data=data_for(case), args=args, **kwargs)


def llama():
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS}
    return randomize(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=2, **sizes)))


def macs_of(model):
    return sum(block.macs for block in find_feed_forward_blocks(model))


# ---- Which neurons ----


def test_the_least_important_neurons_for_their_weights_go():
    """As many as must: beside every way to keep neurons of two blocks."""
    generator = torch.Generator().manual_seed(0)
    blocks = [BlockWeights(4, 40, 0, 10, 10), BlockWeights(3, 90, 30, 50, 20)]
    importance = [torch.rand(4, generator=generator), torch.rand(3, generator=generator)]
    everything = sum(block.whole for block in blocks)
    ranked = []
    for index, (scores, block) in enumerate(zip(importance, blocks, strict=True)):
        ranked += [(float(score) / block.each, index, neuron) for neuron, score in enumerate(scores)]
    ranked.sort(reverse=True)
    for room in range(30, everything + 1, 10):
        goes = told_to_go(importance, blocks, room)
        kept = [int((~part).sum()) for part in goes]
        left = sum(block.with_kept(count) for block, count in zip(blocks, kept, strict=True))
        assert left <= room
        # Those that stay are the first of all, and with the next one there would be no room.
        stay = {(b, i) for b, part in enumerate(goes) for i in range(len(part)) if not part[i]}
        assert stay == {(b, i) for _, b, i in ranked[: len(stay)]}
        if len(stay) < len(ranked):
            kept[ranked[len(stay)][1]] += 1
            more = sum(block.with_kept(count) for block, count in zip(blocks, kept, strict=True))
            assert more > room
    assert not any(part.any() for part in told_to_go(importance, blocks, everything))


class Slowly(nn.Module):
    """An activation with a parameter of its own, which plain autograd takes."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        return torch.nn.functional.gelu(self.factor * x)


@pytest.mark.parametrize("native", [nn.GELU(), nn.ReLU(inplace=True), Slowly()], ids=["gelu", "in place", "plain"])
@pytest.mark.parametrize("granularity", ["neuron", "block"])
def test_squared_gradients_come_out_of_the_backward_pass(native, granularity):
    """Token by token, as one gradient a token gives them; over two backward passes they add up."""
    torch.manual_seed(0)
    activation = CollapsibleActivation(native, 6, linear_target="affine", granularity=granularity, alpha=0.3)
    activation.slope.normal_()
    activation.offset.normal_()
    names = set(activation.state_dict())
    activation.squares = torch.zeros(6, requires_grad=True)
    assert set(activation.state_dict()) == names
    expected = torch.zeros(6)
    for _ in range(2):
        z, weight = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
        with torch.no_grad():
            line, act = activation.slope * z + activation.offset, native(z.clone())
        expected += (weight * (line - act)).flatten(0, 1).square().sum(0)
        first = activation.alpha.grad
        (activation(z.clone().requires_grad_() * 1) * weight).sum().backward()
        assert first is None or activation.alpha.grad is first
    torch.testing.assert_close(activation.squares.grad, expected)
    both = activation.alpha.grad.clone()
    activation.alpha.grad, activation.squares = None, None
    (activation(z.clone()) * weight).sum().backward()
    assert activation.alpha.grad is not None and not torch.equal(activation.alpha.grad, both)


# ---- Training to a size ----


@pytest.mark.smoke
@pytest.mark.parametrize("case", ["bert", "gpt2", "vit"])
def test_the_model_becomes_as_small_as_was_said(case, tmp_path):
    dense = model_of(BY_NAME[case])
    trainer = budget_trainer(case, tmp_path, model=copy.deepcopy(dense))
    trainer.train()
    ready = [log["layer_collapse/ready_blocks"] for log in trainer.state.log_history if "loss" in log]
    told = [log["layer_collapse/told_neurons"] for log in trainer.state.log_history if "loss" in log]
    assert told[0] < told[-1] and told == sorted(told) and ready[0] == 0 and ready[-1] == LAYERS
    alphas = torch.cat([alpha.detach() for alpha in alpha_parameters(trainer.model)])
    assert set(alphas.tolist()) == {0.0, 1.0} and int(alphas.sum()) == told[-1]
    before = trainer.evaluate()
    report = trainer.collapse()
    share = macs_of(trainer.model) / macs_of(dense)
    assert 0.4 - 1 / HIDDEN < share <= 0.4
    # Exactly what was trained, in linears that the native class knows.
    assert max(block.error for block in report.blocks if block.outcome == "collapsed") < 1e-5
    after = trainer.evaluate()
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    kinds = {spec["type"] for spec in trainer.model.config.layer_collapse["modules"].values()}
    assert kinds <= {"linear", "conv1d"}
    trainer.save_model(tmp_path / "saved")
    loaded = BY_NAME[case].auto_class.from_pretrained(tmp_path / "saved")
    assert_same(state_of(loaded), state_of(trainer.model))


def test_gates_go_to_zero_and_llama_stays_native(tmp_path):
    """Without data, a bias or a module of this package."""
    model = llama()
    trainer = trainer_for(
        "gpt2", tmp_path, {**BUDGET, "budget": "parameters=0.8"}, model=model, args={"max_steps": 12}
    )
    before = sum(parameter.numel() for parameter in llama().parameters())
    trainer.train()
    patched = copy.deepcopy(trainer.model).eval()
    trainer.collapse()
    left = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert 0.8 - 3 * WIDTH / before < left / before <= 0.8
    assert not any("bias" in name for name in trainer.model.state_dict())
    inputs = BY_NAME["gpt2"].inputs()
    with torch.no_grad():
        torch.testing.assert_close(trainer.model.eval()(**inputs).logits, patched(**inputs).logits)


def test_a_block_of_which_nothing_goes_is_dense_again(tmp_path):
    trainer = budget_trainer("bert", tmp_path, {**BUDGET, "budget": "macs=0.99"})
    trainer.train()
    report = trainer.collapse()
    untouched = [block for block in find_feed_forward_blocks(trainer.model) if block.hidden_features == HIDDEN]
    assert untouched and {block.state for block in untouched} == {"dense"}
    assert {block.outcome for block in report.blocks} == {"collapsed", "restored"}


@pytest.mark.parametrize("target", ["identity", "affine"])
def test_neurons_may_leave_a_linear_map_behind(target, tmp_path):
    trainer = budget_trainer("bert", tmp_path, {**BUDGET, "linear_target": target, "budget": "macs=0.6"})
    whole = LAYERS * 2 * WIDTH * HIDDEN
    trainer.train()
    trainer.collapse()
    assert 0.6 - 2 * WIDTH / whole < macs_of(trainer.model) / whole <= 0.6


def test_a_teacher_and_accumulated_batches(tmp_path):
    """Two halves of a batch say the same of neurons as the whole batch."""
    config = {**BUDGET, "distillation_weight": 1.0}
    train = rows(BY_NAME["bert"], 48)
    whole = budget_trainer("bert", tmp_path, config, train=train, batch=8, steps=6)
    halves = budget_trainer("bert", tmp_path, config, train=train, batch=4, accumulate=2, steps=6)
    for trainer in (whole, halves):
        trainer.train()
    for left, right in zip(alpha_parameters(whole.model), alpha_parameters(halves.model), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("save_steps", [3, 9])
def test_a_resumed_run_takes_the_same_neurons(save_steps, tmp_path):
    """From while it is open which ones go, and from later."""

    def run(resume=None):
        args = {"save_strategy": "steps", "save_steps": save_steps, "lr_scheduler_type": "linear"}
        trainer = budget_trainer("bert", tmp_path, steps=16, args=args, dropout=True)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run()
    # The patched model of a checkpoint says in version 1 of the format what it is.
    stored = json.loads((tmp_path / f"checkpoint-{save_steps}" / "config.json").read_text())["layer_collapse"]
    assert stored["version"] == 1 and {s["linear_target"] for s in stored["modules"].values()} == {"affine"}
    resumed = run(str(tmp_path / f"checkpoint-{save_steps}"))
    assert_same(state_of(resumed.model), state_of(whole.model))


@pytest.mark.parametrize("with_callback", [False, True])
def test_a_checkpoint_that_forgot_which_neurons_go(with_callback, tmp_path):
    """Without the optimizer's state nothing says so, and what they were told is half done."""

    def trainer():
        args = {"save_strategy": "steps", "save_steps": 9, "save_only_model": True, "max_steps": 12}
        if not with_callback:
            return budget_trainer("bert", tmp_path, args=args)
        callbacks = [LayerCollapseCallback(LayerCollapseConfig(**BUDGET), data_for("bert"))]
        return trainer_for("bert", tmp_path, False, trainer_class=Trainer, callbacks=callbacks, args=args)

    trainer().train()
    with pytest.raises(ValueError, match="after step 9, .*`optimizer.pt`.*`save_only_model=True` leaves out"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_the_best_checkpoint_is_of_the_stated_size(tmp_path):
    args = {
        **{"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        **{"load_best_model_at_end": True, "metric_for_best_model": "loss"},
    }
    trainer = budget_trainer("bert", tmp_path, args=args)
    trainer.train()
    assert trainer.state.best_global_step >= 0.7 * 12
    trainer.collapse()
    assert macs_of(trainer.model) <= 0.4 * LAYERS * 2 * WIDTH * HIDDEN


def test_in_a_trainer_whose_class_cannot_be_changed(tmp_path):
    callback = LayerCollapseCallback(LayerCollapseConfig(**BUDGET), data_for("bert"))
    trainer = trainer_for(
        "bert",
        tmp_path,
        False,
        trainer_class=Trainer,
        callbacks=[callback],
        args={"max_steps": 12, "logging_steps": 1},
    )
    trainer.train()
    report = collapse_model(trainer.model)
    assert len(report.collapsed) == LAYERS
    assert 0.4 - 1 / HIDDEN < macs_of(trainer.model) / (LAYERS * 2 * WIDTH * HIDDEN) <= 0.4


# ---- The target ----


def test_a_neuron_goes_to_its_mean():
    """On data, and a block of which nothing is left gives the constant that is the mean of its output."""
    model, data = model_of(BY_NAME["bert"]).eval(), data_for("bert")
    seen = []
    block = model.bert.encoder.layer[1]
    block.intermediate.intermediate_act_fn.register_forward_hook(lambda m, a, output: seen.append(output))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    mean = torch.cat(seen).flatten(0, 1).mean(0)
    apply_layer_collapse(model, LayerCollapseConfig(**CONSTANT, blocks=[1]), calibration_data=data)
    (activation,) = collapsible_activations(model).values()
    assert not activation.slope.any()
    torch.testing.assert_close(activation.offset, mean, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        activation.alpha.fill_(1)
        expected = model(**data[0]).logits
        report = collapse_model(model)
        assert report.blocks[0].method == "dropped"
        torch.testing.assert_close(model(**data[0]).logits, expected)


def test_a_block_without_biases_keeps_what_its_neurons_gave(tmp_path):
    """A constant is left of neurons of T5's, whose linears have no bias: the merged one does."""
    sizes = {"d_model": WIDTH, "d_ff": HIDDEN, "d_kv": 4, "num_heads": 2, "num_layers": 2}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)).eval()
    ids = torch.randint(2, VOCABULARY, (4, 6))
    data = [{"input_ids": ids, "decoder_input_ids": ids}]
    apply_layer_collapse(model, LayerCollapseConfig(**CONSTANT), calibration_data=data)
    with torch.no_grad():
        for alpha in alpha_parameters(model):
            alpha[: HIDDEN // 2] = 1
        expected = model(**data[0]).logits
        collapse_model(model)
        torch.testing.assert_close(model(**data[0]).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**data[0]).logits, expected)


def test_what_is_left_may_be_fitted_to_data():
    model, data = model_of(BY_NAME["bert"]).eval(), data_for("bert")
    apply_layer_collapse(model, LayerCollapseConfig(**CONSTANT), calibration_data=data)
    with torch.no_grad():
        for alpha in alpha_parameters(model):
            alpha[: HIDDEN // 2] = 0.97
    report = collapse_model(model, calibration_data=data)
    assert {(block.method, block.rank, block.kept_neurons) for block in report.blocks} == {
        ("refit", 0, HIDDEN - HIDDEN // 2)
    }


# ---- What is refused ----


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_run_that_was_stopped_before_it_was_there(tmp_path):
    """Some neurons have gone by then, and not as many as were said."""
    config = {**BUDGET, "alpha_learning_rate": 0.4}
    trainer = budget_trainer("bert", tmp_path, config, steps=20, callbacks=[StopAt(6)])
    trainer.train()
    before = state_of(trainer.model)
    for collapse in (trainer.collapse, lambda: collapse_model(trainer.model)):
        with pytest.raises(ValueError, match="The budget macs=0.4 is not met: .* was it stopped before"):
            collapse()
        assert_same(state_of(trainer.model), before)
    report = collapse_model(trainer.model, LayerCollapseConfig(**CONSTANT))
    assert report.collapsed and macs_of(trainer.model) > 0.4 * LAYERS * 2 * WIDTH * HIDDEN


def test_steps_that_say_nothing_of_any_neuron(tmp_path):
    class Infinite(LayerCollapseTrainer):
        def compute_loss(self, *args, **kwargs):
            return float("inf") * super().compute_loss(*args, **kwargs)

    trainer = budget_trainer("bert", tmp_path, trainer_class=Infinite)
    with pytest.raises(RuntimeError, match="no step so far had gradients that are finite"):
        trainer.train()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"linear_target": "constant"}, "single neurons"),
        ({**BUDGET, "granularity": "block", "linear_target": "identity"}, "granularity='neuron'"),
        ({**BUDGET, "budget": "latency=0.5"}, "budget_method='plan'"),
        ({**BUDGET, "budget": "max_drop=0.1"}, "budget_method='plan'"),
        ({**BUDGET, "progressive": True}, "no `progressive`"),
        ({**BUDGET, "budget": None}, "set both"),
        ({**BUDGET, "budget_ratio": 0.0}, "budget_ratio"),
        ({"budget": "macs=0.4", "budget_ratio": 0.5}, "`budget_ratio`"),
        ({**BUDGET, "budget_method": "magic"}, "budget_method"),
        ({**BUDGET, "linear_target": "identity", "rank": 2}, "leave `rank` out"),
        ({**BUDGET, "linear_target": "identity", "rank": 0, "keep_neurons": 1}, "leave `rank`, `keep_neurons` out"),
        ({**BUDGET, "budget_samples": 64}, "leave `budget_samples` out"),
        ({"budget_ratio": 0.5}, "There is no `budget`"),
    ],
)
def test_options_that_contradict_it(options, message):
    with pytest.raises(ValueError, match=message):
        LayerCollapseConfig(**options)


@pytest.mark.parametrize("patched", [False, True])
def test_a_size_that_cannot_be_is_refused_before_anything_changed(patched, tmp_path):
    """With the identity as target a linear map of each block is left."""
    model = model_of(BY_NAME["bert"])
    options = {"granularity": "neuron"}
    if patched:
        apply_layer_collapse(model, LayerCollapseConfig(**options))
    before = state_of(model)
    config = {**BUDGET, "linear_target": "identity", "budget": "macs=0.1"}
    with pytest.raises(
        ValueError, match='the least that works is macs=0.2, or 768 of 3,840.*linear_target="constant"'
    ):
        budget_trainer("bert", tmp_path, config, model=model)
    assert_same(state_of(model), before)
    assert bool(collapsible_activations(model)) == patched


def test_another_target_than_that_of_the_model(tmp_path):
    model = model_of(BY_NAME["bert"])
    apply_layer_collapse(model, LayerCollapseConfig(**CONSTANT), calibration_data=data_for("bert"))
    with pytest.raises(ValueError, match="'affine' in the config, 'constant' here"):
        trainer_for("bert", tmp_path, {"granularity": "neuron", "linear_target": "affine"}, model=model)
    # And patched as it says, it is taken.
    trainer_for("bert", tmp_path, BUDGET, model=model)


def test_data_are_needed_for_a_mean():
    model = model_of(BY_NAME["bert"])
    with pytest.raises(ValueError, match='linear_target="constant" needs `calibration_data`'):
        apply_layer_collapse(model, LayerCollapseConfig(**CONSTANT))
    assert not collapsible_activations(model)


def test_alphas_that_are_frozen_cannot_go(tmp_path):
    trainer = budget_trainer("bert", tmp_path)
    alpha_parameters(trainer.model)[1].requires_grad_(False)
    with pytest.raises(ValueError, match="alphas of all patched blocks, and those of .*layer.1.* are frozen"):
        trainer.train()


def test_a_block_that_did_not_run_says_nothing(tmp_path):
    """As with layerdrop: the others' squared gradients are known all the same, and those that are not finite are
    nobody's."""
    trainer = budget_trainer("bert", tmp_path)
    trainer.create_optimizer()
    told, (first, second, _) = trainer._alphas.steps.told, collapsible_activations(trainer.model).values()
    told.begin_step()
    first(torch.randn(3, HIDDEN)).sum().backward()
    told.note()
    known = trainer.optimizer.state[first.alpha]["importance"].clone()
    assert known.sum() == pytest.approx(1) and not trainer.optimizer.state[second.alpha]["importance"].any()
    told.begin_step()
    (first(torch.randn(3, HIDDEN)).sum() * float("inf")).backward()
    told.note()
    assert torch.equal(trainer.optimizer.state[first.alpha]["importance"], known)


def test_the_card_says_how_the_size_was_met(tmp_path):
    trainer = budget_trainer("bert", tmp_path)
    trainer.train()
    trainer.collapse()
    trainer.create_model_card(model_name="small")
    card = (tmp_path / "README.md").read_text()
    assert "to come to the budget `macs=0.4`" in card and "each neuron's mean" in card and "by a plan" not in card


def test_a_dense_model_is_not_collapsed_as_if_there_were_no_budget():
    model = model_of(BY_NAME["bert"])
    before = state_of(model)
    with pytest.raises(ValueError, match="is what alphas are trained to, and this model has none"):
        collapse_model(model, LayerCollapseConfig(**BUDGET), calibration_data=data_for("bert"))
    assert_same(state_of(model), before)
