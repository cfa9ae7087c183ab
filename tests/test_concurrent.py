"""Several threads that load, and several processes that save, at one time."""

import functools
import multiprocessing
import os
import sys
import threading
import time
import traceback
import warnings

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertLayer

from hf_layercollapse import apply_layer_collapse, modeling_layercollapse
from hf_layercollapse.modeling_layercollapse import SAVING_PREFIX

from .models import BY_NAME, needs_registration, registered
from .test_families import tiny_whisper
from .test_interrupted_saving import save_interrupted, what_loads
from .test_patching import alphas, logits
from .test_saving_loading import in_life


CASE = BY_NAME["bert"]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


def in_a_process_of_its_own(test):
    """Runs a test in a forked child: threads that load at one time may leave torch's initialisers switched off, as
    transformers does while a model is loaded, native ones too. Other tests must not see that."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)

        def child():
            try:
                test(*args, **kwargs)
            except BaseException:  # noqa: BLE001 (told to the parent, which fails)
                sender.send(traceback.format_exc())
            else:
                sender.send(None)

        process = context.Process(target=child)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child uses none
            process.start()
        assert receiver.poll(240), "the threads hang"
        problem = receiver.recv()
        process.join(60)
        assert problem is None, problem

    return needs_fork(run)


@pytest.fixture
def switching_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("life", ["patched", "collapsed"])
@in_a_process_of_its_own
def test_threads_that_load(life, switching_often, tmp_path):
    model = in_life(CASE, life)
    expected = logits(model, CASE.inputs())
    model.save_pretrained(tmp_path)
    outcomes = []

    def load(start):
        start.wait()
        try:
            outcomes.append(torch.equal(logits(CASE.auto_class.from_pretrained(tmp_path), CASE.inputs()), expected))
        except Exception as error:  # noqa: BLE001 (a thread cannot fail a test)
            outcomes.append(error)

    for _ in range(4):
        start = threading.Barrier(3)
        threads = [threading.Thread(target=load, args=(start,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert outcomes == [True] * 12


def _save(model, folder, start, times):
    for _ in range(times):
        start.wait(60)
        model.save_pretrained(folder)


def in_processes(models, folder, times):
    """Saves each model in a forked process of its own, `times` times at once; gives their exit codes."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(len(models))
    processes = [context.Process(target=_save, args=(model, folder, start, times)) for model in models]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child uses none
        for process in processes:
            process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@needs_fork
def test_processes_that_save_into_one_folder(tmp_path):
    """Each save goes through, and what lies there is one of the models, whole."""
    first, second = in_life(CASE, "half"), in_life(CASE, "half", model=CASE.model(seed=5))
    second.config.id2label = {0: "this", 1: "is", 2: "another"}
    for _ in range(3):
        assert in_processes([first, second, first], tmp_path, times=5) == [0, 0, 0]
        assert what_loads(tmp_path, first, second) in ("old", "new")
        assert not [name for name in os.listdir(tmp_path) if name.startswith(SAVING_PREFIX)]


@needs_fork
def test_what_a_killed_process_left_does_not_stop_others(tmp_path):
    model = in_life(CASE, "half")
    assert save_interrupted(model, tmp_path, 6, "killed") != 0
    assert [name for name in os.listdir(tmp_path) if name.startswith(SAVING_PREFIX)]
    assert in_processes([model, model], tmp_path, times=2) == [0, 0]
    assert what_loads(tmp_path, None, model) == "new"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(SAVING_PREFIX)]


def at_once(work, *arguments):
    """What `work` gives for each of the arguments in a thread of its own, all started together; errors too."""
    outcomes, start = [], threading.Barrier(len(arguments))

    def run(argument):
        start.wait()
        try:
            outcomes.append(work(argument))
        except Exception as error:  # noqa: BLE001 (a thread cannot fail a test)
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.fixture
def nothing_built(monkeypatch):
    """As in a process that has not met a patched or collapsed model yet."""
    for name in ("_built", "_made"):
        monkeypatch.setattr(modeling_layercollapse, name, {})


@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
@in_a_process_of_its_own
def test_threads_that_need_a_class_for_the_first_time(part, switching_often, nothing_built, tmp_path):
    model = apply_layer_collapse(tiny_whisper())
    (model.get_encoder() if part else model).save_pretrained(tmp_path)
    for _ in range(4):
        modeling_layercollapse._built.clear()
        modeling_layercollapse._made.clear()
        models = at_once(AutoModel.from_pretrained, *[tmp_path] * 4)
        assert len({type(each) for each in models}) == 1 and all(alphas(each) for each in models)
        assert len({type(each.config) for each in models}) == 1


class SlowToSay:
    """A class attribute that takes its time, and lets other threads run."""

    def __get__(self, instance, owner):
        time.sleep(0.3)
        return {"hidden_states": BertLayer}


class RecordsSlowly(BertModel):
    _can_record_outputs = SlowToSay()


@needs_registration
@in_a_process_of_its_own
def test_threads_that_patch_live_models(nothing_built):
    def hidden_states(model):
        apply_layer_collapse(model)
        return model(**CASE.inputs(), output_hidden_states=True).hidden_states

    with registered(AutoModel, BertConfig, RecordsSlowly):
        states = at_once(hidden_states, *[RecordsSlowly(CASE.config()).eval() for _ in range(3)])
    assert [len(each) for each in states] == [4, 4, 4]
