"""What runs on Apple's MPS, which has no float64, no names of devices, and one device to wait for."""

import platform

import pytest
import torch
from torch import nn

from hf_layercollapse import functional
from hf_layercollapse.comparison import _losses, compare_models, prediction_divergence
from hf_layercollapse.outcomes import Outcome
from hf_layercollapse.profiling import compare_latency, describe_hardware, measure_speedup

from .mps import DEVICE, Mps


class Classifier(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return {"logits": self.head(x)}


@pytest.fixture
def mps(monkeypatch):
    """The device, and what was waited for on it."""
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    with Mps():
        yield waited


def there(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


def moved(model):
    for name, value in list(model.head.named_parameters()):
        setattr(model.head, name, nn.Parameter(value.detach().to(DEVICE), requires_grad=False))
    return model


def test_the_stand_in_has_no_float64(mps):
    (x,) = there(torch.ones(3))
    assert x.device == DEVICE and (x + x).device == DEVICE and (x + x).cpu().tolist() == [2, 2, 2]
    with pytest.raises(TypeError, match="float64"):
        x.double()


@pytest.mark.parametrize("labels", [{}, {"labels": torch.tensor([0, 1, 2, 0])}], ids=["divergence", "accuracy"])
def test_a_comparison(labels, mps):
    data = [{"x": torch.randn(4, 4), **labels}]
    here = {name: Classifier(seed) for seed, name in enumerate(("dense", "small"))}
    expected = compare_models(here, data, rounds=2, warmup=0, progress=False)
    on_it = {name: moved(model) for name, model in here.items()}
    found = compare_models(on_it, data, rounds=2, warmup=0, progress=False)
    assert found["small"].quality == pytest.approx(expected["small"].quality)
    assert "MPS" in found.hardware and set(mps) == {DEVICE}


def test_divergence_and_times(mps):
    models, data = [moved(Classifier(seed)) for seed in range(2)], {"x": torch.randn(4, 4).to(DEVICE)}
    assert prediction_divergence(models[0], models[0], [data]) == 0 < prediction_divergence(*models, [data])
    compare_latency(dict(enumerate(models)), data, rounds=2, warmup=0, progress=False)
    measure_speedup(*models, data, modes=["eager"], rounds=2, warmup=0, progress=False)
    assert set(mps) == {DEVICE}


def test_losses_of_language_models(mps):
    logits, batch = torch.randn(2, 5, 7), {"input_ids": torch.randint(0, 7, (2, 5))}
    expected = _losses(logits, batch)
    found = _losses(*there(logits), {"input_ids": batch["input_ids"].to(DEVICE)})
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))


def test_errors_and_shares(mps):
    expected, actual = there(torch.ones(3), 1.5 * torch.ones(3))
    assert functional.relative_error(expected, actual) == 0.5
    assert Outcome("collapsed", *there(torch.tensor([True, False]))).share == 0.5


def test_the_name_of_the_device():
    assert describe_hardware("mps") == f"{platform.processor() or platform.machine()}, MPS"
