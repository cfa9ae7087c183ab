"""The mathematics, against the definition in float64."""

import math

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


def second_moments(f, y, weights=None):
    weights = torch.ones(len(f), 1).double() if weights is None else weights[:, None]
    total = float(weights.sum())
    wf, wy = weights * f, weights * y
    return functional.second_moments_(total, wf.sum(0), wy.sum(0), f.T @ wf, f.T @ wy, y.T @ wy)


def moments(f, y, weights=None):
    """The same with the variances of `y` in place of its covariance."""
    *others, cov_oo = second_moments(f, y, weights)
    return *others, cov_oo.diagonal()


def lstsq(f, y):
    """`(solution without the intercept, intercept)`."""
    solution = torch.linalg.lstsq(torch.cat([f, torch.ones(len(f), 1).double()], dim=1), y).solution
    return solution[:-1], solution[-1]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relu_block(rows=400, seed=0):
    """`(x, h, y)` of a block of random weights with ReLU."""
    x = random(rows, IN, seed=seed) + 0.5
    h = torch.relu(x @ random(IN, HIDDEN, seed=seed + 1) + random(HIDDEN, seed=seed + 2))
    return x, h, h @ random(HIDDEN, OUT, seed=seed + 3) + 1


def features(x, h, neurons):
    return torch.cat([x, h[:, neurons]], dim=1)


def evaluate(fit, x, h):
    linear_part = x @ (fit.weight_oi if fit.rank is None else fit.left_or @ fit.right_ri).T
    return linear_part + h[:, fit.neurons] @ fit.down_ok.T + fit.bias_o


def test_second_moments_are_centred_and_weighted():
    f, y, weights = random(50, 3) + 4, random(50, 2, seed=1) - 2, random(50, seed=2).abs()
    mean_f, mean_o, cov_ff, cov_fo, cov_oo = second_moments(f, y, weights)
    share = (weights / weights.sum())[:, None]
    expected_f, expected_o = (share * f).sum(0), (share * y).sum(0)
    torch.testing.assert_close(mean_f, expected_f)
    torch.testing.assert_close(mean_o, expected_o)
    torch.testing.assert_close(cov_ff, (f - expected_f).T @ (share * (f - expected_f)))
    torch.testing.assert_close(cov_fo, (f - expected_f).T @ (share * (y - expected_o)))
    torch.testing.assert_close(cov_oo, (y - expected_o).T @ (share * (y - expected_o)))


def test_the_full_fit_is_the_least_squares_map():
    x = random(300, IN) + 1
    y = random(300, OUT, seed=1) + x @ random(IN, OUT, seed=2)
    weight, bias = lstsq(x, y)
    fit = functional.fit_block(*moments(x, y), IN)
    torch.testing.assert_close(fit.weight_oi, weight.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fit.bias_o, bias, rtol=1e-10, atol=1e-10)
    assert fit.neurons == [] and fit.rank is None


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e6], ids="scale={}".format)
def test_the_fit_is_exact_on_a_block_that_is_linear(scale):
    # One feature a thousand times the others, as massive activations are.
    x = scale * random(300, IN) * torch.tensor([1e3, 1, 1, 1, 1])
    weight, bias = random(OUT, IN, seed=1), random(OUT, seed=2)
    fit = functional.fit_block(*moments(x, x @ weight.T + bias), IN)
    torch.testing.assert_close(fit.weight_oi, weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fit.bias_o, bias, rtol=1e-9, atol=1e-9 * scale)
    assert fit.r2 == pytest.approx(1, abs=1e-9) and fit.error < 1e-5


def test_the_fit_with_dead_and_repeated_features():
    x = random(300, IN)
    x[:, 1] = 0.0
    x[:, 3] = x[:, 2]
    y = random(300, OUT, seed=1) + x[:, :1] - 3 * x[:, 3:4] + 2
    fit = functional.fit_block(*moments(x, y), IN)
    assert torch.equal(fit.weight_oi[:, 1], torch.zeros(OUT).double())
    assert fit.weight_oi.abs().max() < 10
    weight, bias = lstsq(x[:, [0, 2, 4]], y)
    best = (y - x[:, [0, 2, 4]] @ weight - bias).norm()
    assert (y - linear(x, fit.weight_oi, fit.bias_o)).norm() <= best * (1 + 1e-9)


@pytest.mark.parametrize("rank", [None, 0, 2])
@pytest.mark.parametrize("neurons", [[], [7, 2, 5]], ids=["k=0", "k=3"])
def test_the_quality_is_that_of_the_map(rank, neurons):
    x, h, y = relu_block()
    fit = functional.fit_block(*moments(features(x, h, neurons), y), IN, neurons, rank)
    residual = y - evaluate(fit, x, h)
    assert fit.neurons == sorted(neurons)
    assert fit.r2 == pytest.approx(float(1 - residual.square().sum() / (y - y.mean(0)).square().sum()), abs=1e-9)
    assert fit.error == pytest.approx(float(residual.norm() / y.norm()), abs=1e-9)


def test_the_quality_on_a_block_that_gives_zero():
    x = random(30, IN)
    fit = functional.fit_block(*moments(x, torch.zeros(30, OUT).double()), IN)
    assert (fit.r2, fit.error) == (1, 0)


def test_kept_neurons_are_fitted_jointly_with_the_map():
    x, h, y = relu_block()
    neurons = [1, 4, 9]
    fit = functional.fit_block(*moments(features(x, h, neurons), y), IN, neurons)
    solution, bias = lstsq(features(x, h, neurons), y)
    torch.testing.assert_close(torch.cat([fit.weight_oi, fit.down_ok], dim=1), solution.T, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fit.bias_o, bias, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank", [None, 0, 3])
def test_keeping_all_neurons_reproduces_the_block(rank):
    x, h, y = relu_block()
    neurons = list(range(HIDDEN))
    fit = functional.fit_block(*moments(features(x, h, neurons), y), IN, neurons, rank)
    torch.testing.assert_close(evaluate(fit, x, h), y, rtol=1e-8, atol=1e-8)
    if rank == 0:
        torch.testing.assert_close(fit.down_ok, random(HIDDEN, OUT, seed=3).T, rtol=1e-8, atol=1e-8)


def test_rank_zero_is_width_pruning():
    x, h, y = relu_block()
    neurons = [0, 3, 8]
    fit = functional.fit_block(*moments(features(x, h, neurons), y), IN, neurons, rank=0)
    solution, bias = lstsq(h[:, neurons], y)
    assert fit.left_or.shape == (OUT, 0) and fit.right_ri.shape == (0, IN) and fit.rank == 0
    torch.testing.assert_close(fit.down_ok, solution.T, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fit.bias_o, bias, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("neurons", [[], [1, 4, 9]], ids=["k=0", "k=3"])
def test_no_map_of_the_rank_is_better(neurons):
    x, h, y = relu_block()
    f = features(x, h, neurons)
    data = moments(f, y)
    fit = functional.fit_block(*data, IN, neurons, rank=2)
    assert torch.linalg.matrix_rank(fit.left_or @ fit.right_ri) == 2
    best = (y - evaluate(fit, x, h)).square().sum()
    # Alternating least squares on the two factors, from there and from elsewhere, finds nothing better.
    for left in (fit.left_or, random(OUT, 2, seed=5)):
        for _ in range(40):
            # y (left^+)^T on all features gives V, then left and the rest follow from V x.
            right = lstsq(f, y @ torch.linalg.pinv(left).T)[0][:IN].T
            narrow = torch.cat([x @ right.T, h[:, neurons]], dim=1)
            solution, bias = lstsq(narrow, y)
            left = solution[:2].T
        assert (y - narrow @ solution - bias).square().sum() >= best * (1 - 1e-9)


def test_a_rank_that_suffices_gives_the_full_map():
    x = random(300, IN)
    weight = random(OUT, 2, seed=1) @ random(2, IN, seed=2)
    fit = functional.fit_block(*moments(x, x @ weight.T + 3), IN, rank=2)
    torch.testing.assert_close(fit.left_or @ fit.right_ri, weight, rtol=1e-9, atol=1e-9)
    # Channels of one size on both sides.
    torch.testing.assert_close(fit.left_or.norm(dim=0), fit.right_ri.norm(dim=1))


def test_a_negative_rank_is_refused():
    x, _, y = relu_block()
    with pytest.raises(ValueError, match="at least 0"):
        functional.fit_block(*moments(x, y), IN, rank=-1)


@pytest.mark.parametrize("given", [None, 0, 2], ids=["all-of-x", "nothing", "two-directions"])
def test_greedy_neurons_takes_the_best_one_each_time(given):
    x, h, y = relu_block()
    directions = None if given is None else random(given, IN, seed=9)
    chosen, _ = functional.greedy_neurons(*moments(torch.cat([x, h], dim=1), y)[2:4], IN, 4, given=directions)
    base = x if given is None else x @ directions.T

    def residual(neurons):
        solution, bias = lstsq(torch.cat([base, h[:, neurons]], dim=1), y)
        return (y - torch.cat([base, h[:, neurons]], dim=1) @ solution - bias).square().sum()

    for count in range(4):
        before = chosen[:count]
        others = [neuron for neuron in range(HIDDEN) if neuron not in before]
        assert chosen[count] == min(others, key=lambda neuron: residual([*before, neuron]))


def test_greedy_neurons_never_takes_one_twice():
    x, h, y = relu_block()
    h[:, 3] = h[:, 5]
    h[:, 7] = 0
    h[:, 8] = x @ random(IN, seed=4)
    chosen, _ = functional.greedy_neurons(*moments(torch.cat([x, h], dim=1), y)[2:4], IN, HIDDEN)
    assert sorted(chosen) == list(range(HIDDEN))
    # The dead, the linear and one of the equal ones explain nothing, and come last.
    assert set(chosen[-3:]) in ({3, 7, 8}, {5, 7, 8})


@pytest.mark.parametrize("given", [None, 3, 0])
def test_greedy_neurons_says_what_each_number_of_them_explains(given):
    x, h, y = relu_block()
    directions = None if given is None else random(given, IN, seed=9)
    mean_f, mean_o, cov_ff, cov_fo, var_o = moments(torch.cat([x, h], dim=1), y)
    chosen, explained = functional.greedy_neurons(cov_ff, cov_fo, IN, 4, given=directions)
    base = x if given is None else x @ directions.T
    for count in range(5):
        features = torch.cat([base, h[:, chosen[:count]]], dim=1)
        solution, bias = lstsq(features, y)
        left = (y - features @ solution - bias).square().mean(0).sum()
        assert float(var_o.sum() - explained[count]) == pytest.approx(float(left), rel=1e-5)


def test_greedy_neurons_in_batches_explain_nearly_as_much_as_one_by_one():
    torch.manual_seed(0)
    width, hidden, rows = 16, 700, 4000
    x = torch.randn(rows, width, dtype=torch.float64)
    h = (x @ torch.randn(width, hidden, dtype=torch.float64)).relu()
    y = h @ torch.randn(hidden, width, dtype=torch.float64)
    _, _, cov_ff, cov_fo, var_o = moments(torch.cat([x, h], dim=1), y)
    count = 200
    one_by_one, _ = functional.greedy_neurons(cov_ff, cov_fo, width, count, batch=1)
    chosen, explained = functional.greedy_neurons(cov_ff, cov_fo, width, count)
    assert hidden > functional.EXACT_CANDIDATES and len(set(chosen)) == count

    def left(neurons):
        keep = torch.cat([torch.arange(width), width + torch.tensor(neurons)])
        solution = functional.regress(cov_ff[keep][:, keep], cov_fo[keep])
        return functional.unexplained(cov_ff[keep][:, keep], cov_fo[keep], var_o, solution)

    assert left(chosen) < 1.05 * left(one_by_one)
    assert left(chosen) < 0.9 * left(list(range(count)))
    # The curve is what a fit of the chosen ones leaves, to float32.
    assert float(var_o.sum() - explained[-1]) == pytest.approx(left(chosen), rel=0.01)
    assert (explained.diff() >= 0).all()


def test_what_neurons_explain_does_not_hang_on_the_default_dtype():
    torch.manual_seed(0)
    f, y = torch.randn(400, 30).double(), torch.randn(400, 5).double()
    _, _, cov_ff, cov_fo, _ = moments(f, y)
    _, expected = functional.greedy_neurons(cov_ff, cov_fo, 4, 20)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        _, found = functional.greedy_neurons(cov_ff, cov_fo, 4, 20)
        assert torch.equal(functional.gaussian_inputs(3), functional.gaussian_inputs(3).float())
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, expected)


def test_no_features_span_nothing():
    assert functional.effective_rank(torch.zeros(0, 0)) == 0.0


def test_line_residual_is_the_variance_around_the_line():
    z = random(500, 4) * 2
    a = torch.nn.functional.gelu(z)
    sums = [z.sum(0), z.square().sum(0), a.sum(0), a.square().sum(0), (z * a).sum(0)]
    for neuron in range(4):
        slope, offset = lstsq(z[:, neuron : neuron + 1], a[:, neuron : neuron + 1])
        expected = (a[:, neuron] - z[:, neuron] * slope[0, 0] - offset).square().mean()
        torch.testing.assert_close(functional.line_residual(500, *sums)[neuron], expected, rtol=1e-9, atol=1e-12)


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


def test_embedding_loss():
    student, teacher = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosine = (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))
    expected = 1 - cosine + (student - teacher).norm(dim=-1) ** 2 / teacher.norm(dim=-1) ** 2
    torch.testing.assert_close(functional.embedding_loss(student, teacher).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(functional.embedding_loss(teacher, teacher), torch.zeros(5))
    # Sparse embeddings may be all zeros.
    zeros = torch.zeros(5, 8)
    torch.testing.assert_close(functional.embedding_loss(zeros, teacher), torch.full((5,), 2.0))
    expected = 1 + student.square().sum(-1)
    torch.testing.assert_close(functional.embedding_loss(student, zeros).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_largest_is_no_number_if_one_is_none(place):
    values = [1.0, 3.0, 2.0]
    assert functional.largest(values) == 3.0
    values[place] = float("nan")
    assert math.isnan(functional.largest(values))


def test_relative_error():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert functional.relative_error(a, b) == pytest.approx(0.1)
    assert functional.relative_error(a, a) == 0.0
    assert functional.relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert functional.relative_error(torch.zeros(2), a) > 1
    assert functional.relative_error(a, a * float("nan")) != functional.relative_error(a, a * float("nan"))
    # Beyond what bfloat16 or float32 squares hold.
    assert functional.relative_error(1e25 * a, 2e25 * a) == pytest.approx(1.0)


def test_generalized_residual_is_what_other_data_shows():
    """Noise that is fitted with many features explains part of its own data, and is wrong on other data."""
    torch.manual_seed(0)
    tokens, seen, unseen = 600, [], []
    for features in (50, 300):
        f, y = torch.randn(2 * tokens, features).double(), torch.randn(2 * tokens, 8).double()
        solution = functional.regress(f[:tokens].T @ f[:tokens] / tokens, f[:tokens].T @ y[:tokens] / tokens)
        left = (y - f @ solution).square()
        seen.append(functional.generalized(float(left[:tokens].mean()), tokens, features))
        unseen.append(float(left[tokens:].mean()))
    assert seen == pytest.approx(unseen, rel=0.1) and unseen[1] > 1.5 * unseen[0]
    assert functional.generalized(0.1, 10, 10) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fit_of_nothing(dtype):
    """A dropped block: no linear part and no neurons, of sums in either precision."""
    mean_f, mean_o = torch.zeros(4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    moments = torch.eye(4, dtype=dtype), torch.ones(4, 3, dtype=dtype)
    fit = functional.fit_block(mean_f, mean_o, *moments, torch.ones(3, dtype=torch.float64), 4, [], 0)
    assert fit.down_ok.shape == (3, 0) and fit.r2 == pytest.approx(0.0)
