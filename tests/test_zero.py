"""DeepSpeed through accelerate and the Trainer: two processes over gloo; see zero_run.py."""

import functools
import importlib.util
import os

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.models import BY_NAME, LAYERS
from tests.test_distributed import ROOT, launch, launched
from tests.training import assert_close, assert_same, model_of, state_of, trajectory
from tests.zero_run import RUNS, TRAJECTORIES


pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="needs DeepSpeed, which has no wheel: `DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed`",
    ),
]


def start(stage, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
        script = ROOT / "tests" / "zero_run.py"
        launch(f"zero{stage}.yaml", script, stage, folder, options=["--mixed_precision", "no"])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return launched(tmp_path_factory, "zero_2", functools.partial(start, "2"))


@pytest.mark.parametrize("name", [*TRAJECTORIES, "accumulated"])
def test_batch_8_is_2_processes_by_4(name, results, tmp_path):
    _, (first, second) = results
    whole = trajectory("gpt2", tmp_path, **TRAJECTORIES.get(name, {}))
    assert_close(first[name], whole)
    assert_same(first[name], second[name])
    assert 0.1 < float(whole["alphas"][-1].min()) < float(whole["alphas"][-1].max()) < 0.9


@pytest.mark.parametrize("name", RUNS)
def test_it_is_sharded_and_alphas_are_float32(name, results):
    _, both = results
    for result in both:
        run = result[name]
        assert (run["distributed_type"], run["backend"]) == ("DEEPSPEED", "gloo")
        assert (run["wrapped"], run["optimizer"]) == ("DeepSpeedEngine", "DeepSpeedZeroOptimizer")
        assert run["kinds"] == [(False, "Tensor", f"torch.{name}"), (True, "Tensor", "torch.float32")]
        # Each process optimizes one half, and some padding.
        total = sum(value.numel() for name, value in run["whole"].items() if "alpha" not in name)
        assert run["optimized"] < 0.6 * total


@pytest.mark.parametrize("name", RUNS)
def test_resumed_equals_uninterrupted_on_both(name, results):
    _, (first, second) = results
    assert_same(first[name]["resumed"], first[name]["whole"])
    for state in ("whole", "resumed", "collapsed", "healed"):
        assert_same(first[name][state], second[name][state])
    assert {f"layer_collapse/alpha/{i}" for i in range(LAYERS)} < first[name]["logs"][0].keys()


@pytest.mark.parametrize("name", RUNS)
def test_collapsed_and_saved_by_the_main_process_only(name, results):
    folder, (first, second) = results
    run = first[name]
    assert [block["outcome"] for block in run["report"]["blocks"]] == ["collapsed"] * LAYERS
    assert not (folder / f"{name}_collapsed_by_1").exists()
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / f"{name}_collapsed_by_0")
    assert_same(state_of(loaded), run["collapsed"])
    assert run["metrics_collapsed"]["eval_loss"] == second[name]["metrics_collapsed"]["eval_loss"]
    patched = AutoModelForSequenceClassification.from_pretrained(folder / f"{name}_patched")
    assert_same(state_of(patched), run["resumed"])


def test_what_is_refused(results):
    _, (first, _) = results
    budget, optimizer, scaled = first["refused"]
    assert "A `budget` is not supported under FSDP and DeepSpeed" in budget
    assert 'Leave `"optimizer"` out' in optimizer
    assert "Use bf16" in scaled


def test_zero_3_after_the_collapse(tmp_path_factory):
    folder, (first, _) = launched(tmp_path_factory, "zero_3", functools.partial(start, "3"))
    assert "Use FSDP2" in first["refused"]
    assert first["stage"] == 3 and first["sharded"] and len(set(first["losses"])) == 3
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "zero_3")
    assert_same(state_of(loaded), first["state"])
    assert sum(map(torch.numel, first["state"].values())) < sum(
        p.numel() for p in model_of(BY_NAME["bert"]).parameters()
    )
