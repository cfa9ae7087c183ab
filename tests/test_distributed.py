"""Two processes over gloo, started by `accelerate launch` once for all that is checked; see distributed_run.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.distributed_run import RESUMES, TRAJECTORIES, budgeted, full_shard, progressive, told, with_callback
from tests.models import LAYERS
from tests.training import STEPS, assert_close, assert_same, state_of, trajectory


pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "accelerate_configs"


def launch(config, script, *arguments, options=()):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command += [str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return done


def launched(tmp_path_factory, name, start):
    """`(folder, what each process saw)` of `start(folder)`."""
    folder = tmp_path_factory.mktemp(name)
    start(folder)
    return folder, [torch.load(folder / f"results_{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    script = ROOT / "tests" / "distributed_run.py"
    return launched(tmp_path_factory, "distributed", lambda folder: launch("ddp.yaml", script, folder))


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_batch_8_is_2_processes_by_4(name, results, tmp_path):
    case, options = TRAJECTORIES[name]
    _, (first, second) = results
    whole = trajectory(case, tmp_path, **options)
    assert_close(first[name], whole)
    for left, right in zip(first[name].values(), second[name].values(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    # And 2 x 4 accumulated in one process.
    assert_close(trajectory(case, tmp_path, accumulate=2, **options), whole)
    # Something happened.
    assert 0.1 < float(whole["alphas"][-1].min()) < float(whole["alphas"][-1].max()) < 0.9
    assert len({round(float(loss), 3) for loss in whole["loss"]}) > STEPS // 4


def test_a_penalty_counted_once_per_process_would_be_seen(results):
    _, (first, _) = results
    once, twice = first["causal"]["alphas"], first["counted twice"]["alphas"]
    assert float((twice[-1] - once[-1]).min()) > 0.05
    with pytest.raises(AssertionError):
        assert_close(first["counted twice"], first["causal"])


def test_the_callback_counts_the_penalty_once(results, tmp_path):
    _, (first, second) = results
    whole = with_callback(tmp_path)
    for name, alpha in whole.items():
        assert torch.equal(first["callback"][name], second["callback"][name])
        torch.testing.assert_close(first["callback"][name], alpha, rtol=1e-3, atol=1e-4)
        assert 0.3 < float(alpha) < 0.9


def test_blocks_collapse_while_two_processes_train(results, tmp_path):
    _, (first, second) = results
    whole = progressive(tmp_path)
    for name in ("progressive", "progressive, accumulated"):
        assert_same(first[name]["state"], second[name]["state"])
        assert_close(first[name]["state"], whole["state"])
        for key in ("states", "rates", "collapsed"):
            assert first[name][key] == second[name][key] == whole[key]
        # What is reduced is what is left.
        assert first[name]["wrapped"] == "DistributedDataParallel" and first[name]["reducer"] == whole["reducer"]
    assert whole["states"][-1] == ["collapsed", "patched", "collapsed"]


needs_resuming = pytest.mark.skipif(
    not RESUMES, reason="before 5.18 transformers reads no optimizer on a CPU where there are several processes"
)


@needs_resuming
@pytest.mark.parametrize("step", [2, 4, 6])
def test_two_processes_resume_from_before_and_after_a_collapse(step, results):
    _, (first, _) = results
    assert_same(first[f"progressive, resumed from {step}"]["state"], first["progressive"]["state"])


def test_two_processes_collapse_to_a_budget_by_one_plan(results, tmp_path):
    _, (first, second) = results
    whole = budgeted(tmp_path)
    found = first["budgeted"]
    assert found["wrapped"] == "DistributedDataParallel"
    assert found["choices"] == second["budgeted"]["choices"] == whole["choices"]
    assert_same(found["state"], second["budgeted"]["state"])
    assert_close(found["state"], whole["state"])
    assert found["rows"] == whole["rows"] == 24
    if RESUMES:
        resumed = first["budgeted, resumed"]
        assert resumed["choices"] is None and resumed["table"] == found["table"]
        assert_same(resumed["state"], found["state"])


def test_two_processes_tell_the_same_neurons_to_go(results, tmp_path):
    """By the squared gradients of both."""
    _, (first, second) = results
    whole, found = told(tmp_path), first["told"]
    assert found["wrapped"] == "DistributedDataParallel"
    assert found["told"] == second["told"]["told"] == whole["told"] and whole["told"][-1] > 0
    assert_same(found["state"], second["told"]["state"])
    assert_close(found["state"], whole["state"])
    if RESUMES:
        assert_same(first["told, resumed"]["state"], found["state"])


def test_it_is_distributed(results):
    _, both = results
    for result in both:
        run = result["run"]
        assert (run["distributed_type"], run["backend"], run["world_size"]) == ("MULTI_CPU", "gloo", 2)
        assert run["wrapped"] == "DistributedDataParallel"


def test_both_processes_hold_and_log_the_same(results):
    _, (first, second) = results
    for name in ("whole", "resumed", "collapsed", "healed"):
        assert_same(first["run"][name], second["run"][name])
    logs = [
        [{k: v for k, v in log.items() if k.startswith("layer_collapse/")} for log in result["run"]["logs"]]
        for result in (first, second)
    ]
    assert logs[0] == logs[1]
    assert {f"layer_collapse/alpha/{i}" for i in range(LAYERS)} < logs[0][0].keys()


@needs_resuming
def test_resumed_equals_uninterrupted(results):
    _, (first, _) = results
    assert_same(first["run"]["resumed"], first["run"]["whole"])


def test_collapsed_and_saved_by_the_main_process_only(results):
    folder, (first, second) = results
    assert [block["outcome"] for block in first["run"]["report"]["blocks"]] == ["collapsed"] * LAYERS
    # They were fitted to different data, and hold what the first fitted.
    assert first["run"]["report"]["blocks"][0]["method"] == "refit"
    errors = [[block["error"] for block in result["run"]["report"]["blocks"]] for result in (first, second)]
    assert errors[0] != errors[1]
    assert not (folder / "collapsed_by_1").exists()
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "collapsed_by_0")
    assert_same(state_of(loaded), first["run"]["collapsed"])
    assert first["run"]["metrics"]["eval_collapsed_loss"] == second["run"]["metrics"]["eval_collapsed_loss"]
    assert first["run"]["metrics_collapsed"]["eval_loss"] == second["run"]["metrics_collapsed"]["eval_loss"]


def test_fsdp2(results, tmp_path):
    """`fully_shard` itself, in a loop of one's own; through the Trainer: test_sharded.py."""
    folder, (first, second) = results
    sharded, whole = first["fsdp2"], full_shard(tmp_path, None)
    assert sharded["weight"] == second["fsdp2"]["weight"] == "DTensor" and sharded["alpha"] == "Tensor"
    torch.testing.assert_close(sharded["alphas"], second["fsdp2"]["alphas"], rtol=0, atol=0)
    torch.testing.assert_close(sharded["alphas"], whole["alphas"], rtol=1e-4, atol=1e-5)
    assert_close(sharded["state"], whole["state"])
    assert float(whole["alphas"][0].min()) > 0.05 and float(whole["alphas"][-1].min()) >= 0.95
    # Gathered, collapsed, saved, and loaded by one process.
    assert [block["outcome"] for block in sharded["report"]["blocks"]] == ["collapsed"] * LAYERS
    assert_same(state_of(AutoModelForSequenceClassification.from_pretrained(folder / "fsdp2")), sharded["collapsed"])
    assert sharded["half"] == ["torch.bfloat16", "torch.float32"]


def test_one_process_through_its_config(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from accelerate import PartialState\n"
        "from tests.training import trainer_for\n"
        "trainer = trainer_for('bert', sys.argv[1])\n"
        "trainer.train()\n"
        "print(trainer.accelerator.distributed_type.value, PartialState().num_processes)\n"
    )
    assert "NO 1" in launch("cpu.yaml", script, tmp_path).stdout
