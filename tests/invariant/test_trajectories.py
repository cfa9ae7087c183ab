"""Runs that must not differ: the same batches of eight, however they are split, over twenty steps."""

import pytest
import torch

from tests.models import BY_NAME
from tests.training import counted_cross_entropy, rows, state_of, trainer_for


STEPS = 20


def trajectory(case, tmp_path, accumulate, *, optim="sgd", smoothing=0.0, clip=0.0, loss_function=None):
    """`(losses, states after every fifth step)`; SGD, since Adam blows rounding up where gradients are near 0."""
    trainer = trainer_for(
        case,
        tmp_path,
        config={"alpha_learning_rate": 0.03, "penalty_strength": 0.5, "penalty_schedule": "linear"},
        batch=8 // accumulate,
        accumulate=accumulate,
        train=rows(BY_NAME[case], 32),
        compute_loss_func=loss_function,
        args={
            "max_steps": STEPS,
            "optim": optim,
            "learning_rate": 0.02,
            "weight_decay": 0.01,
            "lr_scheduler_type": "linear",
            "label_smoothing_factor": smoothing,
            "max_grad_norm": clip,
        },
    )
    trainer.train()
    logs = trainer.state.log_history[:STEPS]
    losses = {name: torch.tensor([log[name] for log in logs]) for name in ("loss", "grad_norm")}
    alphas = torch.tensor([[log[f"layer_collapse/alpha/{i}"] for i in range(3)] for log in logs])
    return {**losses, "alphas": alphas, **state_of(trainer.model)}


@pytest.mark.parametrize("case", ["bert", "gpt2", "vit"])
@pytest.mark.parametrize(
    "options",
    [{}, {"smoothing": 0.1, "clip": 0.5}, {"loss_function": counted_cross_entropy}],
    ids=["plain", "smoothing-clipping", "loss-function"],
)
def test_batch_8_is_2_by_4_accumulated(case, options, tmp_path):
    whole = trajectory(case, tmp_path, 1, **options)
    for accumulate in (2, 4) if not options else (4,):
        split = trajectory(case, tmp_path, accumulate, **options)
        assert split.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(split[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    # Something happened: alphas moved by what they should, and the weights with them.
    assert 0.1 < float(whole["alphas"][-1].min()) < float(whole["alphas"][-1].max()) < 0.9
    assert len({round(float(loss), 3) for loss in whole["loss"]}) > STEPS // 2


def test_a_penalty_counted_once_per_batch_would_be_seen(tmp_path, monkeypatch):
    """The invariant can fail."""
    from hf_layercollapse import LayerCollapseTrainer

    once = trajectory("gpt2", tmp_path, 2)["alphas"]
    monkeypatch.setattr(LayerCollapseTrainer, "_loss_is_scaled", lambda self, count: False)
    twice = trajectory("gpt2", tmp_path, 2)["alphas"]
    assert float((twice[-1] - once[-1]).min()) > 0.05
