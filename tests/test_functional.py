"""The mathematics, against the definition in float64."""

import pytest
import torch

from hf_layercollapse import functional


IN, HIDDEN, OUT = 5, 11, 7


def block(up_bias=True, down_bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    up, down = random(HIDDEN, IN), random(OUT, HIDDEN)
    return up, (random(HIDDEN) if up_bias else None), down, (random(OUT) if down_bias else None)


def linear(x, weight, bias):
    return x @ weight.double().T + (0.0 if bias is None else bias.double())


biases = pytest.mark.parametrize("up_bias", [True, False], ids=["up-bias", "no-up-bias"])
down_biases = pytest.mark.parametrize("down_bias", [True, False], ids=["down-bias", "no-down-bias"])


@biases
@down_biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("slope", "offset"),
    [(1.0, 0.0), (1.0, 0.3), (torch.linspace(-1, 2, HIDDEN), 0.0), (torch.linspace(-1, 2, HIDDEN), "tensor")],
    ids=["identity", "number", "slope", "affine"],
)
def test_merge_plain(up_bias, down_bias, dtype, slope, offset):
    up, up_b, down, down_b = block(up_bias, down_bias, dtype)
    if offset == "tensor":
        offset = torch.linspace(3, -2, HIDDEN)
    x = torch.randn(20, IN, dtype=torch.float64)
    expected = linear(slope * linear(x, up, up_b) + offset, down, down_b)
    weight, bias = functional.merge_plain(up, up_b, down, down_b, slope, offset)
    assert weight.shape == (OUT, IN) and weight.dtype == torch.float64
    assert (bias is None) == (up_b is None and down_b is None and not isinstance(offset, torch.Tensor) and offset == 0)
    torch.testing.assert_close(linear(x, weight, bias), expected, rtol=1e-12, atol=1e-12)


@biases
@down_biases
@pytest.mark.parametrize("gate", [1.0, "tensor"])
def test_merge_gated(up_bias, down_bias, gate):
    up, up_b, down, down_b = block(up_bias, down_bias)
    gate = torch.linspace(-1, 2, HIDDEN) if gate == "tensor" else gate
    x = torch.randn(20, IN, dtype=torch.float64)
    expected = linear(gate * linear(x, up, up_b), down, down_b)
    weight, bias = functional.merge_gated(up, up_b, down, down_b, gate)
    torch.testing.assert_close(linear(x, weight, bias), expected, rtol=1e-12, atol=1e-12)


def sums(z, a):
    return len(z), z.sum(0), z.square().sum(0), a.sum(0), (z * a).sum(0)


def test_affine_target_is_the_regression_line():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, HIDDEN, dtype=torch.float64, generator=generator) * 2 + 0.7
    a = torch.nn.functional.gelu(z)
    slope, offset = functional.affine_target(*sums(z, a))
    for neuron in range(HIDDEN):
        features = torch.stack([z[:, neuron], torch.ones(len(z), dtype=torch.float64)], dim=1)
        expected = torch.linalg.lstsq(features, a[:, neuron]).solution
        torch.testing.assert_close(torch.stack([slope[neuron], offset[neuron]]), expected, rtol=1e-10, atol=1e-12)


def test_affine_target_of_neurons_that_do_not_vary():
    z = torch.tensor([3.0, 0.0, -1e6], dtype=torch.float64).expand(50, 3)
    a = torch.tensor([2.5, 0.0, 1.0], dtype=torch.float64).expand(50, 3)
    slope, offset = functional.affine_target(*sums(z, a))
    assert torch.equal(slope, torch.zeros(3).double())
    torch.testing.assert_close(offset, a[0])
    # One token determines no slope.
    slope, offset = functional.affine_target(*sums(z[:1], a[:1]))
    assert torch.isfinite(slope).all() and torch.isfinite(offset).all()


def moments(x, y):
    features = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    return features.T @ features, features.T @ y, y.square().sum(0)


def test_least_squares_map_is_the_least_squares_map():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, IN, dtype=torch.float64, generator=generator) + 1
    y = torch.randn(300, OUT, dtype=torch.float64, generator=generator) + x @ torch.randn(IN, OUT).double()
    features, cross, _ = moments(x, y)
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(300, 1).double()], dim=1), y).solution
    weight, bias = functional.least_squares_map(features, cross, ridge=0.0)
    torch.testing.assert_close(torch.cat([weight.T, bias[None]]), expected, rtol=1e-10, atol=1e-10)
    weight, bias = functional.least_squares_map(features, cross)
    torch.testing.assert_close(torch.cat([weight.T, bias[None]]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e6], ids="scale={}".format)
def test_least_squares_map_is_exact_on_a_block_that_is_linear(scale):
    generator = torch.Generator().manual_seed(0)
    # One feature a thousand times the others, as massive activations are.
    x = scale * torch.randn(300, IN, dtype=torch.float64, generator=generator) * torch.tensor([1e3, 1, 1, 1, 1])
    weight, bias = torch.randn(OUT, IN).double(), torch.randn(OUT).double()
    y = x @ weight.T + bias
    features, cross, squares = moments(x, y)
    fitted = functional.least_squares_map(features, cross, ridge=1e-12)
    assert functional.relative_error(y, linear(x, *fitted)) < 1e-10
    torch.testing.assert_close(fitted[0], weight, rtol=1e-6, atol=1e-6)
    r2, error = functional.fit_quality(features, cross, squares, *functional.least_squares_map(features, cross))
    assert r2 > 1 - 1e-9 and error < 1e-5


def test_least_squares_map_with_dead_and_repeated_features():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, IN, dtype=torch.float64, generator=generator)
    x[:, 1] = 0.0
    x[:, 3] = x[:, 2]
    y = torch.randn(300, OUT, dtype=torch.float64, generator=generator) + x[:, :1] - 3 * x[:, 3:4] + 2
    features, cross, squares = moments(x, y)
    weight, bias = functional.least_squares_map(features, cross)
    assert torch.equal(weight[:, 1], torch.zeros(OUT).double())
    assert weight.abs().max() < 10
    keep = torch.cat([x[:, [0, 2, 4]], torch.ones(300, 1).double()], dim=1)
    best = (y - keep @ torch.linalg.lstsq(keep, y).solution).norm()
    assert (y - linear(x, weight, bias)).norm() <= best * (1 + 1e-6)


def test_fit_quality_is_that_of_the_map():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, IN, dtype=torch.float64, generator=generator)
    y = torch.relu(x @ torch.randn(IN, OUT, generator=generator).double()) + 1
    features, cross, squares = moments(x, y)
    for weight, bias in (
        functional.least_squares_map(features, cross),
        (torch.randn(OUT, IN).double(), torch.randn(OUT).double()),
        (torch.zeros(OUT, IN).double(), y.mean(0)),
    ):
        residual = y - linear(x, weight, bias)
        r2, error = functional.fit_quality(features, cross, squares, weight, bias)
        assert r2 == pytest.approx(float(1 - residual.square().sum() / (y - y.mean(0)).square().sum()), abs=1e-9)
        assert error == pytest.approx(float(residual.norm() / y.norm()), abs=1e-9)


def test_fit_quality_of_a_block_that_gives_zero():
    x = torch.randn(30, IN).double()
    y = torch.zeros(30, OUT).double()
    features, cross, squares = moments(x, y)
    assert functional.fit_quality(features, cross, squares, *functional.least_squares_map(features, cross)) == (1, 0)


def test_gaussian_inputs_are_always_the_same():
    state = torch.get_rng_state()
    first = functional.gaussian_inputs(IN)
    torch.manual_seed(5)
    assert torch.equal(first, functional.gaussian_inputs(IN)) and first.shape == (1024, IN)
    assert not torch.equal(first, functional.gaussian_inputs(IN, seed=1))
    assert abs(first.mean()) < 0.1 and abs(first.std() - 1) < 0.1
    torch.set_rng_state(state)
    functional.gaussian_inputs(IN)
    assert torch.equal(torch.get_rng_state(), state)


def test_relative_error():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert functional.relative_error(a, b) == pytest.approx(0.1)
    assert functional.relative_error(a, a) == 0.0
    assert functional.relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert functional.relative_error(torch.zeros(2), a) > 1
    assert functional.relative_error(a, a * float("nan")) != functional.relative_error(a, a * float("nan"))
    # Beyond what bfloat16 or float32 squares hold.
    assert functional.relative_error(1e25 * a, 2e25 * a) == pytest.approx(1.0)
