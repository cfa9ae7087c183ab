"""Two gloo processes calibrate one model, each on its part of the data: as one does on all of it, and alike to the
bit."""

import pytest
import torch

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


def test_what_one_process_is_given_wrong_both_say(results):
    first, second = (result["refused"] for result in results)
    assert "ValueError on process 1: The calibration data is empty" in first["no data"]
    assert "calibration data is empty" in second["no data"]
    assert first["other model"] == second["other model"] and "Processes [1] hold another model" in first["other model"]
    assert " on process 1: " in first["broken"]
    assert "`recover_model` trains in one process" in first["recovery"]
