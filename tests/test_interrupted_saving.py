"""A save that is killed, or fails, before any one of its file operations: the folder loads as it was, as it should
be, or not at all."""

import os
import shutil
import sys
import time
import warnings

import pytest
import torch
from transformers import modeling_utils

from hf_layercollapse.modeling_layercollapse import CODE_FILE, SAVING_PREFIX

from .models import BY_NAME
from .test_saving_loading import assert_same_weights, in_life


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

CASE = BY_NAME["bert"]
KILLED, FAILED = 99, 98
# Events of Python's audit hooks that change a folder, and where their paths are.
WATCHED = {"open": 1, "os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1}


def save_interrupted(model, folder, position, how, **kwargs):
    """Saves in a forked process that dies, or meets a full disk, before file operation number `position` in `folder`.

    Returns:
        The exit code: 0 if the save had no so many operations.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child uses none
        pid = os.fork()
    if pid:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        raise AssertionError("the saving process hangs")
    code = 1
    try:
        left = [position]
        operation = _operations(str(folder), left, how)
        sys.addaudithook(operation)
        write = modeling_utils.safe_save_file

        def save_file(tensors, file, *args, **kwargs):
            # Written by code that no audit hook sees: an operation before it, and one when half of it is there.
            operation("open", (file, "w", 0))
            write(tensors, file, *args, **kwargs)
            size = os.path.getsize(file)
            if left[0] == 1:
                os.truncate(file, size // 2)
            operation("open", (file, "w", 0))

        modeling_utils.safe_save_file = save_file
        model.save_pretrained(folder, **kwargs)
        code = 0
    except OSError:
        code = FAILED
    finally:
        os._exit(code)


def _operations(folder, left, how):
    def audit(event, args):
        if event not in WATCHED or not any(str(path).startswith(folder) for path in args[: WATCHED[event]]):
            return
        if event == "open" and not (set(args[1] or "r") & set("wax+") or args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if event == "os.mkdir" and os.path.isdir(args[0]):
            return
        left[0] -= 1
        if left[0] == 0:
            if how == "killed":
                os._exit(KILLED)
            raise OSError(28, "No space left on device")

    return audit


def what_loads(folder, old, new):
    try:
        loaded = CASE.auto_class.from_pretrained(folder)
    except Exception:
        return "nothing"
    for name, model in (("old", old), ("new", new)):
        if model is not None and type(loaded) is type(model):
            if all(
                key in loaded.state_dict() and torch.equal(loaded.state_dict()[key], value)
                for key, value in model.state_dict().items()
            ):
                assert_same_weights(loaded, model)
                assert loaded.config.id2label == model.config.id2label, "weights of one, config of the other"
                assert name == "old" or CODE_FILE in os.listdir(folder)
                return name
    raise AssertionError("a mixture of the old model and the new one")


@pytest.mark.parametrize(
    ("before", "after", "how"),
    [
        ("nothing", "single", "killed"),
        ("nothing", "sharded", "killed"),
        ("dense", "single", "killed"),
        ("dense", "sharded", "killed"),
        ("dense-sharded", "single", "killed"),
        ("dense-sharded", "sharded", "killed"),
        ("patched", "single", "killed"),
        ("patched-sharded", "single", "killed"),
        ("patched", "sharded", "killed"),
        ("collapsed", "single", "killed"),
        ("half", "single", "killed"),
        ("half-sharded", "sharded", "killed"),
        ("nothing", "single", "failed"),
        ("dense", "single", "failed"),
        ("patched-sharded", "sharded", "failed"),
    ],
)
def test_no_interruption_leaves_a_mixture(before, after, how, tmp_path):
    life, _, size = before.partition("-")
    shards = {"max_shard_size": "20KB"} if after == "sharded" else {}
    old = None
    template = tmp_path / "template"
    template.mkdir()
    if life != "nothing":
        old = CASE.model(seed=5)
        old.config.id2label = {0: "this", 1: "is", 2: "old"}
        old = old if life == "dense" else in_life(CASE, life, model=old)
        old.save_pretrained(template, **({"max_shard_size": "20KB"} if size else {}))
    new = in_life(CASE, "half")
    outcomes = []
    for position in range(1, 100):
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        code = save_interrupted(new, folder, position, how, **shards)
        outcomes.append(what_loads(folder, old, new))
        if code == 0:
            break
        assert code == (KILLED if how == "killed" else FAILED)
        if how == "failed" and outcomes[-1] != "new":
            assert not [name for name in os.listdir(folder) if name.startswith(SAVING_PREFIX)]
    assert code == 0 and outcomes[-1] == "new"
    # The test is worth something: the save was caught early, in the middle, and with the old model gone.
    assert len(outcomes) > 8 and outcomes[0] == ("nothing" if old is None else "old")
    assert outcomes == sorted(outcomes, key=["old", "nothing", "new"].index)
    assert old is None or 2 <= outcomes.count("old") < len(outcomes) - 3


@pytest.mark.parametrize("before", ["nothing", "dense"])
def test_a_save_after_a_killed_one_makes_it_good(before, tmp_path):
    new = in_life(CASE, "half")
    for position in (2, 6, 9):
        if before == "dense":
            CASE.model(seed=5).save_pretrained(tmp_path)
        assert save_interrupted(new, tmp_path, position, "killed") == KILLED
        new.save_pretrained(tmp_path)
        assert what_loads(tmp_path, None, new) == "new"
        assert not [name for name in os.listdir(tmp_path) if name.startswith(SAVING_PREFIX)]
