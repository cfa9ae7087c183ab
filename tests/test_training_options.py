"""Training arguments that change how a step is taken: each works with alphas, or is refused."""

import shutil

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, collapse_model
from tests.models import BY_NAME, LAYERS
from tests.training import Gradients, alphas_of, model_of, rows, state_of, trainer_for, zero_loss


def after(steps, rate=0.1):
    """Alpha after plain steps on the penalty alone."""
    return pytest.approx([1 - (1 - 2 * rate) ** steps] * LAYERS, rel=1e-4)


def values(model):
    return list(map(float, alphas_of(model).values()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bf16(accumulate, tmp_path):
    args = {"bf16": True, "max_steps": 3, "max_grad_norm": 1.0}
    trainer = trainer_for(
        "bert",
        tmp_path,
        config={"alpha_learning_rate": 0.1},
        args=args,
        accumulate=accumulate,
        compute_loss_func=zero_loss,
    )
    assert trainer.accelerator.mixed_precision == "bf16"
    trainer.train()
    assert values(trainer.model) == after(3)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_bf16_goes_where_float32_goes(tmp_path):
    trained = []
    for bf16 in (False, True):
        trainer = trainer_for(
            "gpt2", tmp_path, config={"alpha_learning_rate": 0.05}, args={"bf16": bf16, "max_steps": 5}
        )
        trainer.train()
        trained.append(values(trainer.model))
    assert trained[1] == pytest.approx(trained[0], abs=0.02) and trained[0] != trained[1]


class WithScaler(TrainerCallback):
    """What accelerate does for fp16 on a GPU, on a CPU, where it has none."""

    def __init__(self, trainer):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        trainer.accelerator.scaler = self.scaler
        trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = "fp16"
        self.alphas, self.weights = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.alphas.append(values(model))
        self.weights.append(state_of(model)["classifier.weight"])


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_fp16_loss_scaling(clip, tmp_path):
    """Alphas step by unscaled gradients, and a step that overflows moves nothing."""
    calls = []

    def loss(outputs, labels, num_items_in_batch=None):
        calls.append(1)
        return outputs["logits"].float().sum() * (float("inf") if len(calls) == 2 else 1e-3)

    trainer = trainer_for(
        "bert",
        tmp_path,
        config={"alpha_learning_rate": 0.1, "penalty_strength": 1.0},
        args={"max_steps": 3, "max_grad_norm": clip},
        compute_loss_func=loss,
    )
    seen = WithScaler(trainer)
    trainer.add_callback(seen)
    trainer.train()
    assert seen.alphas[0] == pytest.approx([0.2] * LAYERS, abs=2e-3)
    assert seen.alphas[1] == seen.alphas[0] and torch.equal(seen.weights[1], seen.weights[0])
    assert seen.scaler.get_scale() == 2.0**9
    assert seen.alphas[2] == pytest.approx([0.36] * LAYERS, abs=4e-3)
    assert not torch.equal(seen.weights[2], seen.weights[1])
    assert {alpha.dtype for alpha in alphas_of(trainer.model).values()} == {torch.float32}


@pytest.mark.slow
def test_auto_find_batch_size(tmp_path):
    """The attempts that ran out of memory leave nothing behind."""
    sizes = []

    def loss(outputs, labels, num_items_in_batch=None):
        sizes.append(outputs["logits"].shape[0])
        if sizes[-1] > 4 or len(sizes) == 4:
            raise RuntimeError("CUDA out of memory.")
        return zero_loss(outputs, labels)

    trainer = trainer_for(
        "bert",
        tmp_path,
        config={"alpha_learning_rate": 0.1},
        args={"auto_find_batch_size": True, "max_steps": 3},
        batch=6,
        compute_loss_func=loss,
    )
    trainer.train()
    assert sizes[:2] == [6, 5] and set(sizes[2:]) <= {3, 4}
    # A step was taken before memory ran out once more; then three.
    assert values(trainer.model) == after(4)
    parameters = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(set(parameters))


def test_neftune(tmp_path):
    trainer = trainer_for(
        "gpt2",
        tmp_path,
        config={"alpha_learning_rate": 0.1},
        args={"neftune_noise_alpha": 5.0, "max_steps": 3},
        compute_loss_func=zero_loss,
    )
    trainer.train()
    assert values(trainer.model) == after(3)
    assert not trainer.model.get_input_embeddings()._forward_hooks


def test_group_by_length(tmp_path):
    data = rows(BY_NAME["bert"], 16)
    for i, row in enumerate(data):
        row["input_ids"] = row["input_ids"][: 3 + i // 4]

    def collate(batch):
        lengths = [len(row["input_ids"]) for row in batch]
        assert lengths == sorted(lengths, reverse=True)
        inputs = torch.stack([row["input_ids"][: min(lengths)] for row in batch])
        return {"input_ids": inputs, "labels": torch.stack([row["labels"] for row in batch])}

    trainer = trainer_for(
        "bert",
        tmp_path,
        config={"alpha_learning_rate": 0.1},
        args={"train_sampling_strategy": "group_by_length", "max_steps": 4},
        train=data,
        batch=4,
        data_collator=collate,
        compute_loss_func=zero_loss,
    )
    trainer.train()
    assert values(trainer.model) == after(4)


def test_hyperparameter_search(tmp_path):
    pytest.importorskip("optuna", reason="needs a backend for the search")
    made = []

    def model_init(trial=None):
        made.append(model_of(BY_NAME["bert"]))
        return made[-1]

    trainer = trainer_for(
        "bert",
        tmp_path,
        config={"alpha_learning_rate": 0.1},
        model_init=model_init,
        compute_metrics=lambda prediction: {"accuracy": 0.5},
        args={"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3)},
        n_trials=2,
        backend="optuna",
        direction="maximize",
    )
    # Each trial starts from a patched model of its own, and counts each metric once.
    assert best.objective == 0.5
    trained = [model for model in made if values(model)[0] > 0]
    assert len(trained) == 2 and len({id(model) for model in trained}) == 2
    for run in (tmp_path / "run-0", tmp_path / "run-1"):
        loaded = BY_NAME["bert"].auto_class.from_pretrained(run / "checkpoint-2")
        assert values(loaded)[0] > 0.2


class TwoDevices(nn.Module):
    """What `nn.DataParallel` does, on one device: parts of the batch go through replicas, outputs are gathered."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        parts = zip(*(value.chunk(2) for value in inputs.values()), strict=True)
        outputs = [self.module(**dict(zip(inputs, part, strict=True))) for part in parts]
        gathered = {"logits": torch.cat([output.logits for output in outputs])}
        return {"loss": torch.stack([output.loss for output in outputs]), **gathered}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_data_parallel(accumulate, tmp_path, monkeypatch):
    """Plain `python train.py` on two GPUs: the penalty counts once, and the task is the whole batch's."""

    def gradients(case="bert", **kwargs):
        seen = Gradients()
        trainer = trainer_for(case, tmp_path, callbacks=[seen], train=rows(BY_NAME[case], 8), **kwargs)
        yield trainer
        trainer.train()
        yield seen.steps[0]

    _, expected = gradients()
    parallel = gradients(batch=4 // accumulate, accumulate=accumulate)
    trainer = next(parallel)
    trainer.args._n_gpu = 2
    trainer._train_batch_size = trainer.args.train_batch_size
    monkeypatch.setattr(nn, "DataParallel", TwoDevices)
    found = next(parallel)
    assert isinstance(trainer.model_wrapped, TwoDevices)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.gpu
def test_fp16_on_a_gpu(tmp_path):
    args = {"fp16": True, "use_cpu": False, "max_steps": 3}
    trainer = trainer_for(
        "bert", tmp_path, config={"alpha_learning_rate": 0.1}, args=args, compute_loss_func=zero_loss
    )
    trainer.train()
    assert trainer.accelerator.scaler is not None
    assert values(trainer.model) == after(3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler for CPUs")
def test_inductor_goes_where_no_compiler_goes(tmp_path):
    runs = [
        trainer_for(
            "gpt2",
            tmp_path,
            config={"alpha_learning_rate": 0.1},
            args={"max_steps": 4, "optim": "sgd", "learning_rate": 0.02, "torch_compile": compiled},
        )
        for compiled in (True, False)
    ]
    assert runs[0].args.torch_compile_backend == "inductor"
    for trainer in runs:
        trainer.train()
    expected = state_of(runs[1].model)
    for name, value in state_of(runs[0].model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_collapse_after_compiled_training_in_bf16(tmp_path):
    torch._dynamo.reset()
    args = {"bf16": True, "torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4}
    trainer = trainer_for("vit", tmp_path, config={"alpha_learning_rate": 0.45}, args=args)
    trainer.train()
    assert len(trainer.collapse().collapsed) == LAYERS


def test_nan_never_leads_to_a_collapse():
    """Not even one that was written into an alpha from outside."""
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig())
    for name, parameter in model.named_parameters():
        if name.endswith(".alpha"):
            nn.init.constant_(parameter, float("nan"))
    with pytest.raises(ValueError, match="No block is ready"):
        collapse_model(model)
