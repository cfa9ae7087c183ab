"""FSDP2 through accelerate and the Trainer: two processes over gloo, started once; see sharded_run.py."""

import functools

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_layercollapse import create_model_card
from tests.models import LAYERS
from tests.sharded_run import RUNS, TRAJECTORIES
from tests.test_distributed import ROOT, launch, launched
from tests.training import assert_close, assert_same, state_of, trajectory


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    script, options = ROOT / "tests" / "sharded_run.py", ["--mixed_precision", "no"]
    start = functools.partial(launch, "fsdp2.yaml", script, options=options)
    return launched(tmp_path_factory, "sharded", start)


@pytest.mark.parametrize("name", [*TRAJECTORIES, "accumulated"])
def test_batch_8_is_2_shards_by_4(name, results, tmp_path):
    _, (first, second) = results
    whole = trajectory("gpt2", tmp_path, **TRAJECTORIES.get(name, {}))
    assert_close(first[name], whole)
    assert_same(first[name], second[name])
    assert 0.1 < float(whole["alphas"][-1].min()) < float(whole["alphas"][-1].max()) < 0.9


@pytest.mark.parametrize("name", RUNS)
def test_it_is_sharded_and_alphas_are_not(name, results):
    _, both = results
    alpha, other = (True, "Tensor", "torch.float32"), (False, "DTensor", "torch.float32")
    for result in both:
        run = result[name]
        assert (run["distributed_type"], run["backend"]) == ("FSDP", "gloo")
        assert run["kinds"] == [other, alpha]
        assert run["kinds_collapsed"] == [(False, "Tensor", "torch.float32")]
        # Training goes on with the collapsed model, sharded again.
        assert run["kinds_healed"] == [other]


@pytest.mark.parametrize("name", RUNS)
def test_both_processes_hold_and_log_the_same(name, results):
    _, (first, second) = (results[0], [result[name] for result in results[1]])
    for state in ("whole", "resumed", "collapsed", "healed"):
        assert_same(first[state], second[state])
    logs = [
        [{k: v for k, v in log.items() if k.startswith("layer_collapse/")} for log in run["logs"]]
        for run in (first, second)
    ]
    assert logs[0] == logs[1]
    assert {f"layer_collapse/alpha/{i}" for i in range(LAYERS)} < logs[0][0].keys()


@pytest.mark.parametrize("name", RUNS)
def test_resumed_equals_uninterrupted(name, results):
    _, (first, _) = results
    run = first[name]
    assert_same(run["resumed"], run["whole"])
    weights = "pytorch_model_fsdp.bin" if name == "full" else "pytorch_model_fsdp_0"
    assert {weights, "config.json"} < set(run["files"])
    assert ("model.safetensors" in run["files"]) == (name == "full")


@pytest.mark.parametrize("name", RUNS)
def test_gathered_collapsed_and_saved_by_the_main_process_only(name, results):
    folder, (first, second) = results
    run = first[name]
    assert [block["outcome"] for block in run["report"]["blocks"]] == ["collapsed"] * LAYERS
    # Older transformers write the arguments in every process.
    assert {path.name for path in (folder / f"{name}_collapsed_by_1").glob("*")} <= {"training_args.bin"}
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / f"{name}_collapsed_by_0")
    assert_same(state_of(loaded), run["collapsed"])
    assert run["metrics_collapsed"]["eval_loss"] == second[name]["metrics_collapsed"]["eval_loss"]
    assert run["metrics"]["eval_collapsed_loss"] == pytest.approx(run["metrics_collapsed"]["eval_loss"], rel=0.02)
    # And before that, as it was trained.
    patched = AutoModelForSequenceClassification.from_pretrained(folder / f"{name}_patched")
    assert_same(state_of(patched), run["resumed"])


def block_table(card):
    lines = card.split("## Feed-forward blocks")[1].splitlines()
    return [line for line in lines if line.startswith("| ") and ("alpha" in line or "bert.encoder" in line)]


@pytest.mark.parametrize("name", RUNS)
def test_what_a_trainer_says_and_saves_of_a_sharded_model(name, results):
    """Cards, predictions, and what would go to the Hub, before a collapse; the card of what is trained after it."""
    folder, (first, second) = results
    cards, pushed = first[name]["cards"], folder / f"{name}_pushed"
    loaded = AutoModelForSequenceClassification.from_pretrained(pushed)
    assert_same(state_of(loaded), first[name]["resumed"])
    whole = block_table(str(create_model_card(loaded)))
    assert len(whole) == LAYERS + 1 and block_table(cards["patched"]) == whole
    assert block_table((pushed / "README.md").read_text()) == whole
    for card in ("in training", "patched"):
        assert f"in which {LAYERS} of {LAYERS} feed-forward blocks carry an alpha" in cards[card]
        assert "AutoModelForSequenceClassification.from_pretrained" in cards[card]
        assert "pipeline_tag: text-classification" in cards[card]
    assert f"in which {LAYERS} of {LAYERS} feed-forward blocks are collapsed" in cards["healed"]
    assert "generated automatically" in cards["dense"]  # the stock one
    assert torch.equal(first[name]["predictions"], second[name]["predictions"])


def test_what_is_refused(results):
    _, (first, _) = results
    one, lazy, compiled, callback, progressive, teacher, adapter, budget = first["refused"]
    assert "Use FSDP2" in one and "fsdp_version: 2" in one
    assert "fsdp_cpu_ram_efficient_loading: false" in lazy
    assert "(under `torch_compile`)" in compiled
    assert "LayerCollapseTrainerMixin in front" in callback
    assert "`progressive` is not supported under FSDP" in progressive
    assert "A teacher is not supported under FSDP" in teacher
    assert "(PeftModelForSequenceClassification)" in adapter and "without adapters" in adapter
    assert "A `budget` is not supported under FSDP" in budget and "Collapse first" in budget
