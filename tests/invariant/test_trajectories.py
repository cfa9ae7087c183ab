"""Runs that must not differ: the same batches of eight, however they are split, over twenty steps."""

import pytest

from hf_layercollapse import LayerCollapseTrainer
from hf_layercollapse.patching import penalty
from tests.training import STEPS, assert_close, counted_cross_entropy, trajectory


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
        assert_close(split, whole)
    # Something happened: alphas moved by what they should, and the weights with them.
    assert 0.1 < float(whole["alphas"][-1].min()) < float(whole["alphas"][-1].max()) < 0.9
    assert len({round(float(loss), 3) for loss in whole["loss"]}) > STEPS // 2


class OncePerBatch(LayerCollapseTrainer):
    """The mistake that the trajectories are there to find: the penalty in each batch's loss."""

    def compute_loss(self, *args, **kwargs):
        again = self._alphas.penalty_strength() * penalty(self._blocks.trainable_alphas())
        return super().compute_loss(*args, **kwargs) + again


def test_a_penalty_counted_once_per_batch_would_be_seen(tmp_path):
    """The invariant can fail."""
    ours, theirs = (
        trajectory("gpt2", tmp_path, 2, trainer_class=kind)["alphas"] for kind in (LayerCollapseTrainer, OncePerBatch)
    )
    assert float((theirs[-1] - ours[-1]).min()) > 0.05
