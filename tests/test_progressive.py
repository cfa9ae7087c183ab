"""Blocks that collapse while training goes on."""

import copy
import dataclasses
import logging
import shutil

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_layercollapse import (
    CollapsePlan,
    LayerCollapseCallback,
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    exchange_parameters,
    find_feed_forward_blocks,
)
from hf_layercollapse.patching import alpha_parameters, penalty
from hf_layercollapse.plans import PlanPoint
from tests.models import BY_NAME, HIDDEN, LAYERS
from tests.training import SetAlphas, alphas_of, assert_same, model_of, rows, set_alphas, state_of, trainer_for


PROGRESSIVE = {"progressive": True, "penalty_strength": 0.0}
# Block 2 is ready at step 2, block 0 at step 4, block 1 never.
SCHEDULE = [(0.0, 0.0, 0.0), (0.5, 0.5, 0.96), (0.6, 0.5), (0.97, 0.5), (0.6,), (0.6,), (0.6,), (0.6,)]
ARGS = {
    "max_steps": 8,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "lr_scheduler_type": "linear",
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
}


class Watch(TrainerCallback):
    def __init__(self):
        self.rates, self.states, self.momenta = [], [], {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.states.append([block.state for block in find_feed_forward_blocks(model)])
        embedding = next(model.parameters())
        self.momenta[state.global_step] = int(optimizer.state.get(embedding, {}).get("step", 0))
        live = {id(parameter) for parameter in model.parameters()}
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert set(held) == live and len(held) == len(live)
        assert {id(parameter) for parameter in optimizer.state} <= live


def run(case, folder, watch=None, schedule=SCHEDULE, resume=None, config=None, model=None, **args):
    callbacks = [SetAlphas(schedule), *([watch] if watch else [])]
    trainer = trainer_for(
        case,
        folder,
        config={**PROGRESSIVE, **(config or {})},
        model=model,
        dropout=True,
        args={**ARGS, **args},
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("case", ["bert", "gpt2", "vit"])
def test_ready_blocks_collapse_at_evaluations(case, tmp_path):
    watch = Watch()
    trainer = run(case, tmp_path, watch)
    d, p, c = "dense", "patched", "collapsed"
    assert d not in sum(watch.states, [])
    assert watch.states == [[p, p, p]] * 2 + [[p, p, c]] * 2 + [[c, p, c]] * 4
    # The schedule goes on as if nothing had happened, and so do the moments of what stays.
    assert watch.rates == pytest.approx([1e-2 * (1 - i / 8) for i in range(1, 9)])
    assert list(watch.momenta.values()) == list(range(8))
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["layer_collapse/ready_blocks"] for log in evaluations] == [1, 2, 2, 2]
    assert [log["layer_collapse/collapsed_blocks"] for log in evaluations] == [0, 1, 2, 2]
    # What is left collapses at the end; the report is of all.
    with torch.no_grad():
        next(value for name, value in trainer.model.named_parameters() if name.endswith(".alpha")).fill_(1.0)
    report = trainer.collapse()
    assert len(report.collapsed) == LAYERS
    assert [block.index for block in report.blocks] == [0, 1, 2]
    assert report.parameters_after == sum(parameter.numel() for parameter in trainer.model.parameters())
    assert report.parameters_before > report.parameters_after
    trainer.save_model(str(tmp_path / "collapsed"))
    assert_same(state_of(BY_NAME[case].auto_class.from_pretrained(tmp_path / "collapsed")), state_of(trainer.model))


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
@pytest.mark.parametrize("step", [2, 4, 6])
def test_checkpoints_from_before_and_after_resume(step, optim, tmp_path):
    """The first before any block is collapsed in the model that is given, the later ones with one and two of them."""
    whole = run("bert", tmp_path, optim=optim)
    resumed = run("bert", tmp_path, optim=optim, resume=str(tmp_path / f"checkpoint-{step}"))
    assert_same(state_of(resumed.model), state_of(whole.model))
    assert resumed.model.config.layer_collapse == whole.model.config.layer_collapse


@pytest.mark.parametrize("case", ["bert", "vit"])
def test_a_model_that_was_narrowed_before_resumes(case, tmp_path):
    """The linears of a block have entries of their own there, which go with the block."""
    narrow = model_of(BY_NAME[case], dropout=True)
    data = [BY_NAME[case].inputs(seed=seed) for seed in range(24)]
    collapse_model(narrow, LayerCollapseConfig(rank=0, keep_neurons=9), data)
    apply_layer_collapse(narrow)
    whole = run(case, tmp_path, model=copy.deepcopy(narrow))
    assert [block.hidden_features for block in find_feed_forward_blocks(whole.model)] == [0, 9, 0]
    resumed = run(case, tmp_path, model=narrow, resume=str(tmp_path / "checkpoint-4"))
    assert_same(state_of(resumed.model), state_of(whole.model))
    assert resumed.model.config.layer_collapse == whole.model.config.layer_collapse


def test_a_resume_that_fails_leaves_blocks_patched(tmp_path):
    whole = run("bert", tmp_path)
    folder = tmp_path / "cut" / "checkpoint-4"
    shutil.copytree(tmp_path / "checkpoint-4", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    trainer = trainer_for(
        "bert", tmp_path, config=PROGRESSIVE, dropout=True, args=ARGS, callbacks=[SetAlphas(SCHEDULE)]
    )
    before, table = state_of(trainer.model), trainer.model.config.layer_collapse
    with pytest.raises(ValueError, match="cannot be read"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert_same(state_of(trainer.model), before)
    assert trainer.model.config.layer_collapse == table
    assert [block.state for block in find_feed_forward_blocks(trainer.model)] == ["patched"] * LAYERS
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(state_of(trainer.model), state_of(whole.model))


def test_training_goes_on_when_all_are_collapsed(tmp_path):
    schedule = [(0.96,) * LAYERS] * 2 + [()] * 6
    whole = run("bert", tmp_path, schedule=schedule)
    assert not alphas_of(whole.model) and whole.state.global_step == 8
    logs = [log for log in whole.state.log_history if "eval_loss" in log]
    assert [log["layer_collapse/ready_blocks"] for log in logs] == [LAYERS] * 4
    resumed = run("bert", tmp_path, schedule=schedule, resume=str(tmp_path / "checkpoint-4"))
    assert_same(state_of(resumed.model), state_of(whole.model))
    assert len(whole.collapse().collapsed) == LAYERS


def test_the_best_is_kept_where_it_is_not_less_collapsed(tmp_path, caplog):
    args = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    trainer = run("bert", tmp_path, **args)
    # Two blocks are ready from step 4 on.
    assert trainer.state.best_global_step >= 4
    assert [block.state for block in find_feed_forward_blocks(trainer.model)] == ["collapsed", "patched", "collapsed"]
    best = BY_NAME["bert"].auto_class.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(state_of(best), state_of(trainer.model))
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    with caplog.at_level(logging.WARNING):
        trainer._load_best_model()
    assert "holds fewer collapsed blocks" in caplog.text
    assert_same(state_of(best), state_of(trainer.model))


def test_it_is_off_by_default(tmp_path):
    trainer = run("bert", tmp_path, schedule=[(0.96,) * LAYERS] * 8, config={"progressive": False})
    assert {block.state for block in find_feed_forward_blocks(trainer.model)} == {"patched"}


def test_nothing_is_ready(tmp_path):
    trainer = run("bert", tmp_path, schedule=[(0.5,) * LAYERS] * 8)
    assert {block.state for block in find_feed_forward_blocks(trainer.model)} == {"patched"}
    assert trainer._progressive.reports == []
    assert [log["layer_collapse/ready_blocks"] for log in trainer.state.log_history if "eval_loss" in log] == [0] * 4


def test_neurons_that_are_not_ready_train_on(tmp_path):
    """A block collapses when all of its neurons are ready; until then an evaluation says what those would give."""

    class Neurons(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for block, alpha in enumerate(alpha_parameters(model)):
                whole = block == 0 and state.global_step == 2
                alpha.data.fill_(0.2)[: HIDDEN if whole else HIDDEN * 9 // 10] = 0.97

    config = {**PROGRESSIVE, "granularity": "neuron"}
    args = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_for("bert", tmp_path, config=config, args=args, callbacks=[Neurons()])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["layer_collapse/ready_blocks"] for log in logs] == pytest.approx([2.7, 2.8])
    assert all(log["eval_collapsed_loss"] != log["eval_loss"] for log in logs)
    states = [block.state for block in find_feed_forward_blocks(trainer.model)]
    assert states == ["collapsed", "patched", "patched"]
    assert [block.kept_neurons for block in trainer.collapse().blocks] == [0, 4, 4]


@pytest.mark.parametrize("scheduler", ["constant", "reduce_lr_on_plateau"])
def test_metrics_of_the_collapsed_model_stay_when_all_are_collapsed(scheduler, tmp_path):
    """The best checkpoint and the learning rate may hang on them."""
    trainer = run(
        "bert",
        tmp_path,
        schedule=[(0.96,) * LAYERS] * 2 + [()] * 6,
        lr_scheduler_type=scheduler,
        metric_for_best_model="eval_collapsed_loss",
        load_best_model_at_end=True,
        greater_is_better=False,
    )
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(logs) == 4 and all("eval_collapsed_loss" in log for log in logs)
    assert all(log["eval_collapsed_loss"] == log["eval_loss"] for log in logs[1:])
    assert trainer.state.best_metric == min(log["eval_collapsed_loss"] for log in logs)


def test_a_metric_that_is_asked_for_stays_after_a_collapse(tmp_path):
    args = {"metric_for_best_model": "collapsed_loss", "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_for("bert", tmp_path, {"initial_alpha": 1.0}, args=args)
    trainer.train()
    trainer.collapse()
    trainer.train()
    assert trainer.state.log_history[-2]["eval_collapsed_loss"] == trainer.state.log_history[-2]["eval_loss"]


class Converge(TrainerCallback):
    """Block 0 is ready from step 1 on, block 2 from step 3, block 1 from step 5."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, alpha in model.named_parameters():
            if name.endswith(".alpha"):
                block = int(name.split(".layer.")[1].split(".")[0])
                alpha.data.fill_(0.97 if state.global_step >= {0: 1, 2: 3, 1: 5}[block] else 0.5)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (None, [[0], [0, 2], [0, 1, 2], [0, 1, 2]]),
        # 0 waits for 2.
        ([2, 0], [[], [0, 2], [0, 1, 2], [0, 1, 2]]),
        ([0, 1, 2], [[0], [0], [0, 1, 2], [0, 1, 2]]),
        # What is not named waits for all that are.
        ([1], [[], [], [0, 1, 2], [0, 1, 2]]),
        ([2], [[], [0, 2], [0, 1, 2], [0, 1, 2]]),
    ],
)
def test_the_order_is_kept(order, expected, tmp_path):
    names = None if order is None else [f"bert.encoder.layer.{index}" for index in order]
    watch = Watch()
    trainer = trainer_for(
        "bert",
        tmp_path,
        config={**PROGRESSIVE, "progressive_order": names},
        args=ARGS,
        callbacks=[Converge(), watch],
    )
    trainer.train()
    after = [watch.states[step] for step in (2, 4, 6, 7)]
    assert [[i for i, state in enumerate(states) if state == "collapsed"] for states in after] == expected


def test_the_order_of_a_plan():
    points = [
        PlanPoint(choices, 1, 1, 0.0)
        for choices in ({}, {"b": (None, 4)}, {"b": (None, 0), "a": (2, 0)}, {"a": (2, 0), "c": (None, 0)})
    ]
    plan = CollapsePlan("", "loss", {}, {}, points, chosen=2)
    assert plan.order == ["b", "a"]
    assert dataclasses.replace(plan, chosen=3).order == ["a", "c"]
    assert dataclasses.replace(plan, chosen=0).order == []
    assert LayerCollapseConfig(progressive=True, progressive_order=plan.order).progressive_order == ["b", "a"]


def test_what_is_refused(tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(TypeError, match="`progressive` must be True or False, got 1"):
        LayerCollapseConfig(progressive=1)
    with pytest.raises(TypeError, match="must be a list of block names or None, got 'all'"):
        LayerCollapseConfig(progressive=True, progressive_order="all")
    with pytest.raises(ValueError, match="must name each block once"):
        LayerCollapseConfig(progressive=True, progressive_order=["a", "a"])
    with pytest.raises(ValueError, match="set `progressive=True`"):
        LayerCollapseConfig(progressive_order=["a"])
    with pytest.raises(ValueError, match=r"no block of this model: \['a'\]"):
        trainer_for("bert", tmp_path, config={**PROGRESSIVE, "progressive_order": ["a"]})
    for options, named in ((PROGRESSIVE, "`progressive`"), ({"temperature": 3.0}, "`temperature`")):
        with pytest.raises(ValueError, match=f"nor collapse blocks while training goes on: leave {named} out"):
            LayerCollapseCallback(LayerCollapseConfig(**options))
    trainer = trainer_for("bert", tmp_path, config=PROGRESSIVE)
    with pytest.raises(ValueError, match='with eval_strategy="no" training has none: leave `progressive` out, or set'):
        trainer.train()
    assert "eval_collapsed_loss" in trainer.evaluate()  # which needs none
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: 2))
    trainer._refuse_setup()
    trainer.args.torch_compile = True
    with pytest.raises(ValueError, match="nor with `torch_compile` on several processes"):
        trainer._refuse_setup()
    monkeypatch.undo()
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig(**PROGRESSIVE))
    brought = trainer_for(
        "bert", tmp_path, False, model=model, trainer_class=Trainer, callbacks=[LayerCollapseCallback()]
    )
    with pytest.raises(ValueError, match="leave `progressive` out"):
        brought.train()
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with pytest.raises(ValueError, match="not supported under an adapter"):
        trainer_for("bert", tmp_path, config=False, model=model)


def test_a_compiled_model_goes_on(tmp_path):
    torch._dynamo.reset()
    trainer = run("bert", tmp_path, optim="sgd", torch_compile=True, torch_compile_backend="eager")
    plain = run("bert", tmp_path / "plain", optim="sgd")
    for name, value in state_of(plain.model).items():
        torch.testing.assert_close(state_of(trainer.model)[name], value, rtol=1e-3, atol=1e-4)


def test_exchange_parameters():
    """A bias that was not there before goes to the biases, and groups keep the order of the model."""
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
    biases = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    before = {"a.weight": weights[0], "a.bias": biases[0], "b.weight": weights[1], "c.weight": weights[2]}
    before["c.bias"] = biases[1]
    optimizer = torch.optim.Adam([{"params": weights, "weight_decay": 0.1}, {"params": biases}])
    sum(parameter.sum() for parameter in before.values()).backward()
    optimizer.step()
    merged = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    after = {"a.weight": weights[0], "a.bias": biases[0], "b.weight": merged[0], "b.bias": merged[1]}
    after["c.weight"], after["c.bias"] = weights[2], biases[1]
    exchange_parameters(optimizer, before, after)
    groups = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    assert groups == [
        [id(p) for p in (weights[0], merged[0], weights[2])],
        [id(p) for p in (biases[0], merged[1], biases[1])],
    ]
    assert weights[1] not in optimizer.state and int(optimizer.state[weights[2]]["step"]) == 1


# ---- A training loop of one's own ----


def optimizer_of(model):
    alphas = {id(alpha) for alpha in alpha_parameters(model)}
    task = [parameter for parameter in model.parameters() if id(parameter) not in alphas]
    groups = [{"params": task}, {"params": alpha_parameters(model), "lr": 0.1, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2)


def take_steps(model, optimizer, schedule, count):
    inputs = {name: torch.stack([row[name] for row in rows(BY_NAME["bert"], 8)]) for name in ("input_ids", "labels")}
    for _ in range(count):
        (model(**inputs).loss + penalty(alpha_parameters(model))).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.mark.smoke
def test_a_loop_of_ones_own_goes_on_over_a_collapse():
    model = apply_layer_collapse(model_of(BY_NAME["bert"]))
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=10)
    take_steps(model, optimizer, schedule, 3)
    set_alphas(model, 0.5, 1.0, 0.5)
    before = dict(model.named_parameters())
    assert len(collapse_model(model, LayerCollapseConfig(not_ready="keep")).collapsed) == 1
    exchange_parameters(optimizer, before, dict(model.named_parameters()))
    merged = state_of(model)
    take_steps(model, optimizer, schedule, 3)
    # All that the model is now made of is trained, and what stayed goes on where it was.
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert all(not torch.equal(value, merged[name]) for name, value in model.named_parameters())
    steps = {name: int(optimizer.state[parameter]["step"]) for name, parameter in model.named_parameters()}
    new = {f"bert.encoder.layer.1.output.dense.{name}" for name in ("weight", "bias")}
    assert {name for name, count in steps.items() if count == 3} == new and set(steps.values()) == {3, 6}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - 0.5 * 6 / 10))
    # As a new optimizer of this model would be, so that a checkpoint goes on too.
    resumed = copy.deepcopy(model)
    other = optimizer_of(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rest = torch.optim.lr_scheduler.LinearLR(other, 1.0, 0.5, total_iters=10)
    rest.load_state_dict(schedule.state_dict())
    take_steps(model, optimizer, schedule, 2)
    take_steps(resumed, other, rest, 2)
    assert_same(state_of(resumed), state_of(model))


def test_an_optimizer_that_cannot_follow():
    weights = {"a.weight": nn.Parameter(torch.ones(2, 3)), "b.weight": nn.Parameter(torch.ones(3, 2))}
    after = {"b.weight": nn.Parameter(torch.ones(3, 3)), "b.bias": nn.Parameter(torch.ones(3))}
    # It steps a copy, as optimizers with master weights of their own do.
    masters = torch.optim.SGD([weight.detach().clone() for weight in weights.values()])
    held = list(masters.param_groups[0]["params"])
    with pytest.raises(ValueError, match="SGD holds none of the 2 parameters that the model had before"):
        exchange_parameters(masters, weights, after)
    assert all(now is then for now, then in zip(masters.param_groups[0]["params"], held, strict=True))
    # Of two optimizers, what is new goes to the one that trains the module which it is in.
    head = nn.Parameter(torch.ones(1))
    first, second = torch.optim.SGD(weights.values()), torch.optim.SGD([head])
    for optimizer in (first, second):
        exchange_parameters(optimizer, weights | {"head": head}, after | {"head": head})
    assert [id(p) for p in first.param_groups[0]["params"]] == [id(p) for p in after.values()]
    assert [id(p) for p in second.param_groups[0]["params"]] == [id(head)]
