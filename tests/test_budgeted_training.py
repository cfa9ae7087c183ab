"""A stated size in the Trainer: a plan, a collapse before the first step, training with the dense model as teacher."""

import copy
import json
import shutil

import pytest
import safetensors.torch
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_layercollapse import (
    LayerCollapseCallback,
    LayerCollapseConfig,
    LayerCollapseTrainer,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    plan_collapse,
)
from hf_layercollapse.patching import layer_collapse_config_of, tables_of, take_shapes
from tests.models import BY_NAME, HIDDEN, LAYERS, VOCABULARY, WIDTH, randomize
from tests.training import RandomStates, assert_same, model_of, rows, state_of, trainer_for


BUDGET = {"budget": "macs=0.3", "budget_samples": 24}
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}


def watched(case, folder, config, **kwargs):
    """A trainer that has trained, the batches of its steps, and the state of the random numbers before them."""
    batches, random = [], RandomStates()

    class Watched(LayerCollapseTrainer):
        def training_step(self, model, inputs, *args, **options):
            batches.append({name: value.clone() for name, value in inputs.items()})
            return super().training_step(model, inputs, *args, **options)

    trainer = trainer_for(
        case, folder, config, trainer_class=Watched, callbacks=[random], dropout=True, args={"max_steps": 3}, **kwargs
    )
    trainer.train()
    return trainer, batches, random.states


def feed_forward_macs(model):
    return sum(block.macs for block in find_feed_forward_blocks(model))


@pytest.mark.smoke
@pytest.mark.parametrize("case", ["bert", "gpt2", "vit"])
def test_the_model_becomes_as_small_as_was_said(case, tmp_path):
    dense = model_of(BY_NAME[case], dropout=True)
    trainer, _, _ = watched(case, tmp_path, BUDGET, model=copy.deepcopy(dense))
    blocks = find_feed_forward_blocks(trainer.model)
    assert {block.state for block in blocks} <= {"collapsed", "dense"}
    assert 0.15 < feed_forward_macs(trainer.model) / feed_forward_macs(dense) <= 0.3
    # The dense model teaches; what is left of the blocks is trained with the rest.
    assert_same(state_of(trainer.teacher), state_of(dense))
    log = trainer.state.log_history[0]
    assert log["layer_collapse/distillation_loss"] > 0 and not any("alpha" in name for name in log)
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in trainer.model.parameters()}
    # It is what a plan on these rows gives, and `collapse` only says so.
    report = trainer.collapse()
    assert report is trainer.collapse_report and report.collapsed == list(trainer.collapse_plan.point.choices)
    metrics = trainer.evaluate()
    assert "eval_loss" in metrics and "eval_collapsed_loss" not in metrics
    trainer.save_model(tmp_path / "saved")
    loaded = BY_NAME[case].auto_class.from_pretrained(tmp_path / "saved")
    assert_same(state_of(loaded), state_of(trainer.model))
    recorded = layer_collapse_config_of(loaded)
    assert recorded.budget == "macs=0.3" and recorded.blocks == report.collapsed and recorded.distils
    trainer.create_model_card(model_name="small")
    card = (tmp_path / "README.md").read_text()
    assert "`macs=0.3`" in card and "Training had a teacher" in card


def test_batches_and_dropout_are_those_of_a_run_without_it(tmp_path):
    _, *without = watched("bert", tmp_path, False)
    _, *with_budget = watched("bert", tmp_path, BUDGET)
    for left, right in zip(without[0], with_budget[0], strict=True):
        assert_same(left, right)
    assert all(torch.equal(*states) for states in zip(without[1], with_budget[1], strict=True))


def test_it_is_what_a_plan_and_a_collapse_before_give(tmp_path):
    """To the bit: the same rows, the same blocks, the same training."""
    train = rows(BY_NAME["bert"], 24)
    trainer = trainer_for("bert", tmp_path, BUDGET, train=train, args={"max_steps": 2})
    trainer.train()
    dense = model_of(BY_NAME["bert"])
    model = copy.deepcopy(dense)
    data = [
        {name: torch.stack([row[name] for row in train[start : start + 8]]) for name in train[0]}
        for start in range(0, 24, 8)
    ]
    collapse_model(model, plan=plan_collapse(model, data, macs=0.3), calibration_data=data)
    config = LayerCollapseConfig(distillation_weight=1.0)
    by_hand = trainer_for("bert", tmp_path, config, model=model, teacher=dense, train=train, args={"max_steps": 2})
    by_hand.train()
    assert_same(state_of(trainer.model), state_of(by_hand.model))


def test_a_resumed_run_plans_nothing(tmp_path, monkeypatch):
    def run(resume=None):
        trainer = trainer_for("bert", tmp_path, BUDGET, args=SAVING, dropout=True)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run()
    monkeypatch.setattr("hf_layercollapse.budgeted_training.plan_collapse", None)
    resumed = run(str(tmp_path / "checkpoint-2"))
    assert_same(state_of(resumed.model), state_of(whole.model))
    assert resumed.model.config.layer_collapse == whole.model.config.layer_collapse
    assert_same(state_of(resumed.teacher), state_of(whole.teacher))
    # And again from the end: a collapsed model trains on.
    assert resumed.collapse().collapsed == whole.collapse().collapsed
    assert resumed.collapse().parameters_after == whole.collapse().parameters_after
    resumed.train()


def llama(case):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
    )
    return randomize(LlamaForCausalLM(config))


FAMILIES = {"bert": model_of, "gpt2": model_of, "vit": model_of, "llama": llama}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_takes_the_shapes_of_a_collapsed_one(family):
    """In place, with what was frozen, and with parameters in the same order, as an optimizer's state counts them."""
    case, build = "gpt2" if family == "llama" else family, FAMILIES[family]
    data = [BY_NAME[case].inputs(batch=16, seed=seed) for seed in range(2)]
    for rank, neurons in ((None, 0), (3, 5), (None, 4), (0, 9)):
        dense = build(BY_NAME[case]).to(torch.bfloat16)
        for name, parameter in dense.named_parameters():
            parameter.requires_grad_(".0." not in name)
        collapsed = copy.deepcopy(dense)
        collapse_model(collapsed, LayerCollapseConfig(blocks=[0, 2], rank=rank, keep_neurons=neurons), data)
        take_shapes(dense, tables_of(collapsed))
        dense.load_state_dict(collapsed.state_dict())
        assert type(dense) is type(collapsed) and tables_of(dense) == tables_of(collapsed)
        for left, right in zip(dense.named_parameters(), collapsed.named_parameters(), strict=True):
            assert left[0] == right[0] and left[1].dtype == right[1].dtype
            assert left[1].requires_grad == right[1].requires_grad, left[0]
        found, expected = find_feed_forward_blocks(dense), find_feed_forward_blocks(collapsed)
        assert [(block.state, block.rank, block.parameters) for block in found] == [
            (block.state, block.rank, block.parameters) for block in expected
        ]
        inputs = BY_NAME[case].inputs(batch=2, seed=9)
        assert torch.equal(dense.eval()(**inputs).logits, collapsed.eval()(**inputs).logits)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    trainer = trainer_for(
        "bert",
        tmp_path,
        BUDGET,
        args={
            **SAVING,
            "learning_rate": 0.5,  # so that it only gets worse
            "eval_strategy": "steps",
            "eval_steps": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "collapsed_loss",
            "greater_is_better": False,
        },
    )
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["eval_collapsed_loss"] for log in evaluations] == [log["eval_loss"] for log in evaluations]
    best = min(evaluations, key=lambda log: log["eval_loss"])
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best['step']}")
    assert_same(
        state_of(BY_NAME["bert"].auto_class.from_pretrained(trainer.state.best_model_checkpoint)),
        state_of(trainer.model),
    )


@pytest.mark.parametrize("only_model", [False, True])
def test_an_optimizer_that_is_given_follows(only_model, tmp_path):
    """When the model collapses, and when it takes the shapes of a checkpoint."""

    def run(resume=None):
        model = model_of(BY_NAME["bert"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        args = {**SAVING, "save_only_model": only_model}
        trainer = trainer_for("bert", tmp_path, BUDGET, model=model, args=args, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert held == [id(parameter) for parameter in model.parameters()]
        return state_of(model)

    whole, resumed = run(), run(str(tmp_path / "checkpoint-2"))
    if not only_model:
        assert_same(resumed, whole)
    before = safetensors.torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert not [name for name in before if "layer" in name and torch.equal(resumed[name], before[name])]


def test_an_optimizer_of_another_model_is_refused_before_a_plan(tmp_path):
    optimizer = torch.optim.SGD(model_of(BY_NAME["bert"]).parameters(), lr=1e-2)
    refused("holds none of the", tmp_path, when="trained", optimizers=(optimizer, None))


def test_blocks_that_an_optimizer_has_lost(tmp_path):
    """It held their parameters, and something replaced them without a word to it."""
    model = model_of(BY_NAME["bert"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    trainer = trainer_for("bert", tmp_path, {"initial_alpha": 1.0}, model=model, optimizers=(optimizer, None))
    collapse_model(model)
    with pytest.raises(RuntimeError, match="6 parameters of blocks .*layer.0.output.dense.weight"):
        trainer.train()
    trainer.optimizer = None
    trainer.train()


def test_each_model_of_model_init_is_planned_for(tmp_path):
    made = []

    def model_init():
        made.append(model_of(BY_NAME["bert"], seed=len(made)))
        return made[-1]

    trainer = trainer_for("bert", tmp_path, BUDGET, model_init=model_init)
    trainer.train()
    assert trainer.model is made[1]
    assert_same(state_of(trainer.teacher), state_of(model_of(BY_NAME["bert"], seed=1)))
    assert trainer.collapse().collapsed


def test_inputs_are_all_that_is_needed(tmp_path):
    """A plan, a teacher and no label anywhere; data without a length are read from their beginning."""

    class Stream(IterableDataset):
        def __iter__(self):
            return ({k: v for k, v in row.items() if k != "labels"} for row in rows(BY_NAME["bert"], 40))

    config = {**BUDGET, "task_loss_weight": 0.0}
    trainer = trainer_for("bert", tmp_path, config, train=Stream(), args={"max_steps": 2})
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["layer_collapse/distillation_loss"], rel=1e-4)
    assert trainer.collapse().data.rows == 24


def test_calibration_data_take_the_place_of_training_rows(tmp_path):
    data = (BY_NAME["bert"].inputs(batch=4, seed=seed) for seed in range(5))
    trainer = trainer_for("bert", tmp_path, BUDGET, calibration_data=data)
    trainer.train()
    assert trainer.collapse().data.rows == 20


# ---- What is refused, before anything is changed ----


def refused(match, folder, config=None, model=None, when="made", kind=ValueError, **kwargs):
    model = model_of(BY_NAME["bert"]) if model is None else model
    before, modules = state_of(model), [name for name, _ in model.named_modules()]
    with pytest.raises(kind, match=match):
        trainer = trainer_for("bert", folder, {**BUDGET, **(config or {})}, model=model, **kwargs)
        assert when == "trained"
        trainer.train()
    assert_same(state_of(model), before)
    assert [name for name, _ in model.named_modules()] == modules


def test_models_that_are_not_dense(tmp_path):
    patched = apply_layer_collapse(model_of(BY_NAME["bert"]))
    refused("is for a dense model, and this one is patched", tmp_path, model=patched)
    collapsed = model_of(BY_NAME["bert"])
    data = [BY_NAME["bert"].inputs(batch=16, seed=seed) for seed in range(2)]
    collapse_model(collapsed, LayerCollapseConfig(blocks="last:1", rank=0, keep_neurons=9), data)
    refused("is for a dense model, and this one is collapsed", tmp_path, model=collapsed)


def test_models_under_an_adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model_of(BY_NAME["bert"]), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    refused("not supported for a model under an adapter", tmp_path, model=model)


@pytest.mark.parametrize("when", ["made", "trained"])
@pytest.mark.parametrize("way", ["transformers", "injected"])
def test_models_with_an_adapter_inside(way, when, tmp_path):
    """Which no wrapper shows."""
    from peft import LoraConfig, inject_adapter_in_model

    def add(model):
        config = LoraConfig(target_modules=["query"])
        model.add_adapter(config) if way == "transformers" else inject_adapter_in_model(config, model)

    model = model_of(BY_NAME["bert"])
    if when == "made":
        add(model)
        refused("not supported for a model under an adapter", tmp_path, model=model)
        return
    trainer = trainer_for("bert", tmp_path, BUDGET, model=model)
    add(model)
    before = state_of(model)
    with pytest.raises(ValueError, match="not supported for a model under an adapter"):
        trainer.train()
    assert_same(state_of(model), before)


def test_budgets_that_cannot_be_met(tmp_path):
    refused("cannot be met", tmp_path, {"blocks": "last:1"})
    refused("`blocks`", tmp_path, {"blocks": "no such block"})
    refused("even the mildest plan loses more", tmp_path, {"budget": "max_drop=0"}, when="trained")


def test_data_that_no_plan_is_made_from(tmp_path):
    class Once(IterableDataset):
        def __init__(self):
            self.rows = iter(rows(BY_NAME["bert"], 40))

        def __iter__(self):
            return self.rows

    class OwnLoader(LayerCollapseTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.train_dataset = None

        def get_train_dataloader(self):
            return DataLoader(rows(BY_NAME["bert"], 32), batch_size=8)

    refused("give other rows each time", tmp_path, when="trained", args={"max_steps": 2}, train=Once())
    refused("has no `train_dataset`", tmp_path, when="trained", trainer_class=OwnLoader)
    refused("and there are 3 different rows", tmp_path, when="trained", train=rows(BY_NAME["bert"], 3), batch=3)


def test_a_teacher_that_does_not_fit(tmp_path):
    refused("must be a model", tmp_path, kind=TypeError, teacher="bert")
    model = model_of(BY_NAME["bert"])
    refused("the model itself", tmp_path, model=model, teacher=model)
    refused("both 0", tmp_path, {"distillation_weight": 0.0}, teacher=model_of(BY_NAME["bert"], seed=1))


def test_a_teacher_that_cannot_be_compared(tmp_path):
    five = BY_NAME["bert"].config()
    five.num_labels = 5
    given = {"when": "trained", "teacher": BY_NAME["bert"].model(1, config=five)}
    refused(r"The teacher gives logits of shape \(8, 5\)", tmp_path, **given)
    data = [BY_NAME["bert"].inputs(batch=16, seed=seed) for seed in range(2)]
    refused(r"The teacher gives logits of shape \(1, 5\)", tmp_path, calibration_data=data, **given)
    pairs = [{**row, "labels": row["labels"].expand(2)} for row in rows(BY_NAME["bert"], 32)]
    refused("The labels are of shape", tmp_path, {"task_loss_weight": 0.0}, when="trained", train=pairs)


def test_a_checkpoint_of_another_run(tmp_path):
    plain = trainer_for("bert", tmp_path, False, args=SAVING)
    plain.train()
    model = model_of(BY_NAME["bert"])
    trainer = trainer_for("bert", tmp_path, BUDGET, model=model, args=SAVING)
    before = state_of(model)
    with pytest.raises(ValueError, match="does not say that it holds one"):
        trainer.train(resume_from_checkpoint=True)
    assert_same(state_of(model), before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": "macs=0.6"}, "is of a run with budget='macs=0.3'.*and this one has budget='macs=0.6'"),
        ({"constant_term": "always"}, "is of a run with .*constant_term='native'"),
    ],
)
def test_a_checkpoint_of_other_options(options, message, tmp_path):
    trainer_for("bert", tmp_path, BUDGET, args=SAVING).train()
    model = model_of(BY_NAME["bert"])
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        trainer_for("bert", tmp_path, {**BUDGET, **options}, model=model, args=SAVING).train(
            resume_from_checkpoint=True
        )
    assert_same(state_of(model), before)
    # The same budget in other figures is the same.
    again = trainer_for("bert", tmp_path, {**BUDGET, "budget": "macs=0.30"}, args={**SAVING, "max_steps": 5})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5


def test_a_checkpoint_of_other_blocks(tmp_path):
    half = {**BUDGET, "budget": "macs=0.5"}
    trainer_for("bert", tmp_path, half, args=SAVING).train()
    model = model_of(BY_NAME["bert"])
    before = state_of(model)
    trainer = trainer_for("bert", tmp_path, {**half, "blocks": "first:2"}, model=model, args=SAVING)
    with pytest.raises(ValueError, match="that `blocks` does not choose here"):
        trainer.train(resume_from_checkpoint=True)
    assert_same(state_of(model), before)


def test_a_checkpoint_of_a_patched_model(tmp_path):
    trainer_for("bert", tmp_path, {}, args=SAVING).train()
    model = model_of(BY_NAME["bert"])
    before, modules = state_of(model), [type(module) for module in model.modules()]
    trainer = trainer_for("bert", tmp_path, BUDGET, model=model, args=SAVING)
    with pytest.raises(ValueError, match="holds a patched one"):
        trainer.train(resume_from_checkpoint=True)
    assert_same(state_of(model), before)
    assert [type(module) for module in model.modules()] == modules


DAMAGE = ["cut", "shape", "missing", "table"]


def damage(folder, kind):
    """A checkpoint of a collapsed model that cannot be loaded."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors, stored = safetensors.torch.load_file(weights), json.loads(config.read_text())
    name = [name for name in tensors if name.endswith("output.dense.weight")][-1]
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "table":
        # Its other entries fit.
        table = stored["layer_collapse"]["modules"]
        table[list(table)[-1]] = {"type": "linear", "in_features": 7, "out_features": 7, "bias": True}
        config.write_text(json.dumps(stored))
    else:
        tensor = tensors.pop(name)
        if kind == "shape":
            tensors[name] = tensor[:, 1:].contiguous()
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})


def test_a_resume_that_fails_leaves_the_model_as_it_was(tmp_path):
    whole = trainer_for("bert", tmp_path, BUDGET, args=SAVING)
    whole.train()
    model = model_of(BY_NAME["bert"])
    trainer = trainer_for("bert", tmp_path / "again", BUDGET, model=model, args={**SAVING, "save_strategy": "no"})
    before, modules, config = state_of(model), dict(model.named_modules()), model.config
    for kind in DAMAGE:
        folder = tmp_path / kind / "checkpoint-2"
        shutil.copytree(tmp_path / "checkpoint-2", folder)
        damage(folder, kind)
        with pytest.raises(ValueError, match="cannot be read|does not hold this model|does not fit"):
            trainer.train(resume_from_checkpoint=str(folder))
        assert_same(state_of(model), before)
        assert dict(model.named_modules()) == modules and model.config is config
        assert type(model) is type(model_of(BY_NAME["bert"]))
        assert (trainer.collapse_report, trainer.teacher, trainer.collapse_plan) == (None, None, None)
    # And what follows is a run from its begin.
    set_seed(trainer.args.seed)
    trainer.train()
    assert trainer.collapse_plan is not None
    assert_same(state_of(model), state_of(whole.model))


def test_rows_are_planned_with_whatever_the_last_batch_of_training_is(tmp_path):
    """Fewer rows than a batch has, in a run that leaves out the rest of its rows."""
    args = {"dataloader_drop_last": True, "per_device_eval_batch_size": 32}
    trainer = trainer_for("bert", tmp_path, BUDGET, args={**args, "max_steps": 1})
    trainer.train()
    read = trainer.collapse_plan.data
    assert read.rows + read.held_aside == BUDGET["budget_samples"] and trainer.args.dataloader_drop_last
    five = BY_NAME["bert"].config()
    five.num_labels = 5
    given = {"when": "trained", "teacher": BY_NAME["bert"].model(1, config=five), "args": args}
    data = [BY_NAME["bert"].inputs(batch=16, seed=seed) for seed in range(2)]
    refused("The teacher gives logits of shape", tmp_path, calibration_data=data, **given)


def test_before_training_there_is_nothing_to_say(tmp_path):
    with pytest.raises(RuntimeError, match="call `train` first"):
        trainer_for("bert", tmp_path, BUDGET).collapse()


def test_an_optimizer_made_without_super(tmp_path):
    class Own(LayerCollapseTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
            return self.optimizer

    refused("create_optimizer` of its own", tmp_path, kind=RuntimeError, when="trained", trainer_class=Own)


def test_nothing_else_reads_the_option(tmp_path):
    config, model = LayerCollapseConfig(**BUDGET), model_of(BY_NAME["bert"])
    data = [BY_NAME["bert"].inputs(batch=16)]
    for work in (
        lambda: apply_layer_collapse(model, config),
        lambda: collapse_model(model, config, data),
        lambda: LayerCollapseCallback(config),
    ):
        with pytest.raises(ValueError, match=r"`budget` \(macs=0.3\) is what LayerCollapseTrainer"):
            work()
    assert {block.state for block in find_feed_forward_blocks(model)} == {"dense"}
