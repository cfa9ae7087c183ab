"""Training that is killed, or cannot write: what is named a checkpoint is complete, loads and resumes."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_layercollapse.modeling_layercollapse import OLD_SAVING_PREFIX, SAVING_PREFIX
from tests.models import BY_NAME
from tests.training import assert_same, state_of, trainer_for


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

CASE = BY_NAME["bert"]
STEPS = 8
KILLED = 99
ARGS = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
# Events of Python's audit hooks that change a folder.
CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "open"}


def trainer(folder, **args):
    config = {"alpha_learning_rate": 0.05}
    return trainer_for(CASE, folder, config=config, dropout=True, batch=4, args={**ARGS, **args})


def forked(function):
    """Runs in a child; returns its process id. It ends with code 0, or 1 after an exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child uses none
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
        function()
        code = 0
    finally:
        os._exit(code)


def ended(pid, timeout=60):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the training process hangs")


def resume(folder, **args):
    trained = trainer(folder, **args)
    trained.train(resume_from_checkpoint=True if get_last_checkpoint(folder) else None)
    return trained


def steps_there(folder):
    return sorted(int(name.split("-")[1]) for name in os.listdir(folder) if name.startswith("checkpoint-"))


def assert_complete(folder, expected):
    """Each checkpoint is that of the uninterrupted run, down to the state of the optimizer and of random numbers."""
    for step in steps_there(folder):
        left, right = folder / f"checkpoint-{step}", expected / f"checkpoint-{step}"
        assert set(os.listdir(left)) == set(os.listdir(right))
        assert (left / "model.safetensors").read_bytes() == (right / "model.safetensors").read_bytes()
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            assert os.path.getsize(left / name) == os.path.getsize(right / name)
        assert json.loads((left / "trainer_state.json").read_text())["global_step"] == step


def counting_calls(function, kill_at=None):
    """Runs it; returns how many Python functions were called meanwhile. The process is killed at one of them: a moment
    that is the same on a slow machine and on a fast one."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    trained = trainer(folder)
    calls = counting_calls(trained.train)
    return folder, state_of(trained.model), calls


@pytest.mark.slow  # the next one kills at every moment of one step
def test_killed_at_random_moments(uninterrupted, tmp_path):
    """kill -9, ten times, at moments spread over training and saving; each time the run goes on from what is there."""
    expected, state, calls = uninterrupted
    moments = random.Random(0)
    reached = []
    for _ in range(10):
        kill_at = int(moments.uniform(0.1, 0.6) * calls)
        assert ended(forked(lambda at=kill_at: counting_calls(lambda: resume(tmp_path), at))) in (0, -signal.SIGKILL)
        assert_complete(tmp_path, expected)
        reached.append(max(steps_there(tmp_path), default=0))
    assert reached == sorted(reached)
    assert_same(state_of(resume(tmp_path).model), state)
    assert_complete(tmp_path, expected)


# With a limit there are all the operations that there are without one.
@pytest.mark.parametrize("limit", [pytest.param(None, marks=pytest.mark.slow), 1])
def test_killed_before_any_file_operation(limit, uninterrupted, tmp_path):
    """Of those that one more step makes: saving, moving in, deleting what is too old."""
    expected, state, _ = uninterrupted
    template = tmp_path / "template"
    args = {"save_total_limit": limit, "max_steps": STEPS}

    def first_steps():
        trainer_args = {**args, "save_steps": 1}
        stopping = trainer(template, **trainer_args)
        stopping.add_callback(StopAt(2))
        stopping.train()

    assert ended(forked(first_steps)) == 0
    codes = []
    for position in range(1, 60):
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)

        def one_more_step(folder=folder, position=position):
            left = [position]

            def audit(event, details):
                if event not in CHANGES or str(folder) not in str(details[0]):
                    return
                if event == "open" and not set(str(details[1] or "r")) & set("wax+"):
                    return
                left[0] -= 1
                if left[0] == 0:
                    os._exit(KILLED)

            resumed = trainer(folder, **args)
            resumed.add_callback(StopAt(3))
            sys.addaudithook(audit)
            resumed.train(resume_from_checkpoint=True)

        codes.append(ended(forked(one_more_step)))
        assert codes[-1] in (0, KILLED)
        assert_complete(folder, expected)
        assert not pushed_of(folder)
        last = os.path.basename(get_last_checkpoint(folder))
        assert last in ("checkpoint-2", "checkpoint-3")
        if position % 7 == 1:
            assert_same(state_of(resume(folder, **args).model), state)
            assert not [name for name in os.listdir(folder) if name.startswith(SAVING_PREFIX)]
        if codes[-1] == 0:
            break
    assert codes[-1] == 0 and len(codes) > 8


def pushed_of(folder):
    """Files in the folder of a run that the Trainer's pushes take, which may list them while one is being written."""
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return list(filter_repo_objects(files, ignore_patterns=["_*", "checkpoint-*"]))


def test_what_an_earlier_version_left_is_removed(tmp_path):
    for name in ("checkpoint/checkpoint-1", "deleted"):
        (tmp_path / f"{OLD_SAVING_PREFIX}{name}").mkdir(parents=True)
    run = trainer(tmp_path, max_steps=1)
    run.train()
    assert os.listdir(tmp_path) == ["checkpoint-1"]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_disk_that_is_full(uninterrupted, tmp_path):
    """A limit on the size of files, which weights do not exceed and the optimizer's state does."""
    expected, state, _ = uninterrupted
    size = os.path.getsize(expected / "checkpoint-3" / "model.safetensors") + 4000
    assert size < os.path.getsize(expected / "checkpoint-3" / "optimizer.pt")

    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def train():
        stopped = trainer(tmp_path)
        stopped.add_callback(Full())
        try:
            stopped.train()
        except OSError as error:
            (tmp_path / "message").write_text(str(error))

    assert ended(forked(train)) == 0
    message = (tmp_path / "message").read_text()
    assert f"The checkpoint of step 4 could not be written to {tmp_path}" in message
    assert "resume_from_checkpoint=True" in message
    assert steps_there(tmp_path) == [1, 2, 3]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(SAVING_PREFIX)]
    assert_same(state_of(resume(tmp_path).model), state)


def test_a_folder_that_cannot_be_written(tmp_path):
    class Unwritable(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                # A file where the folder was: also for root, whom no permission keeps out.
                os.rename(tmp_path / "run", tmp_path / "moved")
                (tmp_path / "run").write_text("")

    stopped = trainer(tmp_path / "run")
    stopped.add_callback(Unwritable())
    with pytest.raises(OSError, match="The checkpoint of step 3 could not be written to .*run"):
        stopped.train()
    assert steps_there(tmp_path / "moved") == [1, 2]


def test_what_a_plain_trainer_left_incomplete_is_passed_over(tmp_path, caplog):
    args = {"max_steps": 3}
    state = state_of(resume(tmp_path, **args).model)
    for damage in ("missing", "truncated"):
        broken = tmp_path / "checkpoint-7"
        shutil.copytree(tmp_path / "checkpoint-3", broken)
        file = broken / "trainer_state.json"
        if damage == "missing":
            file.unlink()
        else:
            file.write_text(file.read_text()[:100])
        assert get_last_checkpoint(tmp_path) == str(broken)
        with pytest.raises(ValueError, match="checkpoint-7 is no complete checkpoint"):
            trainer(tmp_path, **args).train(resume_from_checkpoint=str(broken))
        resumed = trainer(tmp_path, **args)
        resumed.train(resume_from_checkpoint=True)
        assert "checkpoint-7 is not complete and is passed over" in caplog.text
        assert_same(state_of(resumed.model), state)
        shutil.rmtree(broken)
    shutil.rmtree(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer(tmp_path / "empty", **args).train(resume_from_checkpoint=True)


def test_training_again_in_the_same_folder_replaces_checkpoints_whole(tmp_path):
    for seed in (0, 1):
        again = trainer(tmp_path, max_steps=2, seed=seed)
        again.train()
        (tmp_path / "checkpoint-1" / "left-over").write_text("")
    assert steps_there(tmp_path) == [1, 2]
    again = trainer(tmp_path, max_steps=2)
    again.train()
    assert not (tmp_path / "checkpoint-1" / "left-over").exists()


@pytest.mark.parametrize("limit, kept", [(1, [2, 5]), (2, [2, 5]), (3, [2, 4, 5])])
def test_old_checkpoints_are_deleted_and_the_best_is_kept(limit, kept, tmp_path):
    values = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.2, 5: 0.2}
    run = trainer_for(
        CASE,
        tmp_path,
        config={"penalty_strength": 0.0},
        compute_metrics=lambda prediction: {"accuracy": values[run.state.global_step]},
        args={
            **ARGS,
            "max_steps": 5,
            "save_total_limit": limit,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "metric_for_best_model": "accuracy",
            "load_best_model_at_end": True,
        },
    )
    present = []

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            present.append(steps_there(tmp_path))

    run.add_callback(Watch())
    run.train()
    assert present[-1] == kept
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    stored = (
        json.loads((tmp_path / f"checkpoint-{kept[-1]}" / "trainer_state.json").read_text()) if limit > 1 else None
    )
    assert stored is None or stored["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    # As upstream does: with a limit of one only the best is left.
    assert steps_there(tmp_path) == ([2] if limit == 1 else kept)


def test_nan_leaves_the_last_good_alphas_in_the_checkpoint(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs["logits"].sum() * (float("nan") if run.state.global_step >= 1 else 0.0)

    run = trainer_for(
        CASE, tmp_path, config={"alpha_learning_rate": 0.1}, compute_loss_func=loss, args={**ARGS, "max_steps": 3}
    )
    run.train()
    loaded = CASE.auto_class.from_pretrained(tmp_path / "checkpoint-3")
    alphas = [float(value) for name, value in loaded.state_dict().items() if name.endswith(".alpha")]
    assert alphas == pytest.approx([0.2] * 3)
    assert torch.isnan(loaded.classifier.weight).any()
