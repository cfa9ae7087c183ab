"""Two gloo processes calibrate one model, each on its part of the data: as one does on all of it, and alike to the
bit."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from hf_layercollapse import processes
from tests import command_line
from tests.processes_run import CONFIGS, run
from tests.test_distributed import ROOT, launch, launched


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    script = ROOT / "tests" / "processes_run.py"
    return launched(tmp_path_factory, "processes", lambda folder: launch("ddp.yaml", script, folder))[1]


@pytest.fixture(scope="module")
def one():
    return run(0, 1)


def assert_alike(told, expected, rel):
    """All but times, and the rows that both read."""
    if isinstance(told, dict):
        assert told.keys() == expected.keys()
        for name in told.keys() - {"seconds", "rows"}:
            assert_alike(told[name], expected[name], rel)
    elif isinstance(told, (list, tuple)):
        assert len(told) == len(expected)
        for left, right in zip(told, expected, strict=True):
            assert_alike(left, right, rel)
    else:
        assert told == (pytest.approx(expected, rel=rel, abs=1e-7) if isinstance(told, float) else expected)


@pytest.mark.parametrize("name", [*CONFIGS, "affine", "plan", "less memory", "map", "metric"])
def test_two_processes_are_one(name, results, one):
    (weights, told), (other_weights, other_told) = (result["run"][name] for result in results)
    assert told == other_told
    assert all(torch.equal(value, other_weights[key]) for key, value in weights.items())
    expected_weights, expected = one[name]
    # In turn what rounding does to one block is what the next is fitted to.
    rel = 2e-2 if name.startswith("in turn") else 1e-3
    if name != "metric":
        assert_alike(told, expected, rel)
    for key, value in weights.items():
        torch.testing.assert_close(value, expected_weights[key], rtol=rel, atol=rel)


@pytest.mark.parametrize(
    ("device", "backends", "expected"),
    [
        ("cpu", "cpu:gloo,cuda:gloo", "cpu"),
        ("cpu", "cpu:gloo,cuda:nccl", "cpu"),
        ("cpu", "cuda:nccl", "cuda"),
        ("cuda:1", "cuda:nccl", "cuda:1"),
        ("cuda:1", "cpu:gloo,cuda:nccl", "cuda:1"),
        ("cuda:1", "cpu:gloo,cuda:gloo", "cpu"),
        ("cuda:1", "cpu:gloo", "cpu"),
        ("cpu", "cuda:gloo", "cuda"),
    ],
)
def test_where_tensors_travel(device, backends, expected):
    """Nothing carries tensors on a CPU where nccl is all that there is."""
    assert processes.place_of(torch.device(device), backends) == torch.device(expected)


def test_what_is_chosen_is_the_first_processs_choice(results):
    """Sums over the neurons of one are never added to sums over the neurons of another."""
    first, second = (result["tipped"] for result in results)
    planned = results[0]["run"]["plan"][1]
    for found in (first, second):
        assert {**found["metric of the loss"], "seconds": 0, "metric": {}} == {**planned, "seconds": 0, "metric": {}}
    assert first["neurons"] == second["neurons"] and first["sizes"] == second["sizes"]
    for what in ("merges", "offloaded"):
        for name, weights in first[what].items():
            assert weights and all(map(torch.equal, weights, second[what][name]))
    # The second process's own would be even numbers of neurons only.
    assert any(count % 2 for sizes in second["sizes"].values() for _, count in sizes)


def test_what_blocks_become_is_sent_once(results):
    assert [result["sent"] for result in results] == [[1] * 6] * 2


def test_what_one_process_has_no_memory_for_all_hear_of(results):
    first, second = (result["no memory"] for result in results)
    for name, said in first.items():
        assert said == "OutOfMemoryError on process 1: no memory is left", name
        assert second[name] == "no memory is left"


@pytest.mark.parametrize("use", ["patched", "in turn", "affine", "plan"])
def test_wherever_one_process_has_no_memory_all_hear_of_it(use, results):
    """And the model of neither is changed."""
    first, second = (result["anywhere"][use] for result in results)
    assert len(first) == len(second) and all("no memory is left" in said for said in second)
    assert all(re.search("Error on process 1: .*no memory is left", said, re.DOTALL) for said in first)


def test_what_one_process_is_given_wrong_both_say(results):
    first, second = (result["refused"] for result in results)
    assert "ValueError on process 1: The calibration data is empty" in first["no data"]
    assert "calibration data is empty" in second["no data"]
    assert first["other model"] == second["other model"] and "Processes [1] hold another model" in first["other model"]
    assert " on process 1: " in first["broken"]
    assert "`recover_model` trains in one process" in first["recovery"]


def test_a_folder_that_every_process_saves_into(results):
    """The first writes, as of a dense model; the others take nothing away."""
    for files, name in (result["saved"] for result in results):
        assert {"config.json", "model.safetensors", "modeling_layercollapse.py"} <= set(files)
        assert name.endswith("saved")


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """`(folder, arguments of a collapse into a folder there)`, of a model and a text file."""
    folder = tmp_path_factory.mktemp("shell")
    command_line.save_text_model(folder / "model")
    (folder / "lines.txt").write_text("\n".join(command_line.lines_of_words(80)) + "\n")

    def collapse(name):
        arguments = ["collapse", folder / "model", "--data", folder / "lines.txt", "--budget", "macs=0.5"]
        told = ["--json", folder / f"{name}.json", "--save-plan", folder / f"{name}.plan"]
        return [*arguments, "--output", folder / name, *told]

    return folder, collapse


def test_the_command_line_in_two_processes_is_that_in_one(shell):
    folder, collapse = shell
    done = launch("ddp.yaml", "hf_layercollapse.cli", *collapse("two"), options=["--cpu", "-m"])
    assert command_line.run(*collapse("one")).exit_code == 0
    # Said once.
    assert len(re.findall("^(?:data: |Saved in )", done.stdout, re.MULTILINE)) == 2
    assert {path.name for path in (folder / "two").iterdir()} == {path.name for path in (folder / "one").iterdir()}
    weights = [load_file(folder / name / "model.safetensors") for name in ("two", "one")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)
    told = [json.loads((folder / f"{name}.json").read_text()) for name in ("two", "one")]
    for part in ("plan", "report"):
        assert_alike(told[0][part], told[1][part], 1e-3)
    assert json.loads((folder / "two.plan").read_text()) == told[0]["plan"]


def test_what_the_command_line_refuses_all_processes_say(results):
    for result in results:
        for name, words in {
            "no data": "there is no such file",
            "no folder": "Make it first",
            "few rows": "fewer rows than there are processes (2)",
            "recovery": "--recovery-steps trains in one process",
            "compare": "compare runs in one process, and 2 were launched",
        }.items():
            code, line = result["shell"][name]
            assert code == 1 and line.startswith("layercollapse: ") and words in line, (name, line)
        assert result["shell"]["left"] == ["lines.txt", "model", "two.txt"]
