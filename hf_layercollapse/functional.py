"""The mathematics: tensors in, tensors out; no modules, no logging.

Shape suffixes: `n` rows of inputs, `i` input width, `m` hidden width, `o` output width. A weight `_oi` maps `i` to `o`
and is stored as `nn.Linear` stores it. Everything is computed in float64 unless said otherwise.
"""

import torch


def merge_plain(up_weight_mi, up_bias_m, down_weight_om, down_bias_o, slope_m=1.0, offset_m=0.0):
    """`down(slope * up(x) + offset)` as one linear map (LayerCollapse, arXiv 2311.17943, with slope 1 and offset 0).

    Args:
        up_bias_m, down_bias_o: `None` where the layer has none.
        slope_m, offset_m: tensors of shape `(m,)`, or numbers.

    Returns:
        `(weight_oi, bias_o)` in float64; the bias is `None` where it is zero by construction.
    """
    up, down = up_weight_mi.double(), down_weight_om.double()
    weight_oi = (down * _double(slope_m)) @ up
    inner_m = None if up_bias_m is None else _double(slope_m) * up_bias_m.double()
    if isinstance(offset_m, torch.Tensor) or offset_m != 0:
        inner_m = _double(offset_m) + (0.0 if inner_m is None else inner_m)
        if not isinstance(inner_m, torch.Tensor):
            inner_m = down.new_full((up.shape[0],), inner_m)
    bias_o = None if down_bias_o is None else down_bias_o.double()
    if inner_m is not None:
        bias_o = down @ inner_m + (0.0 if bias_o is None else bias_o)
    return weight_oi, bias_o


def merge_gated(up_weight_mi, up_bias_m, down_weight_om, down_bias_o, gate_m=1.0):
    """`down(gate * up(x))` with a constant gate, as one linear map.

    Args:
        gate_m: tensor of shape `(m,)`, or a number: what the activated gate has become.

    Returns:
        `(weight_oi, bias_o)` as [`merge_plain`].
    """
    return merge_plain(up_weight_mi, up_bias_m, down_weight_om, down_bias_o, slope_m=gate_m)


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def affine_target(count, sum_z_m, sum_zz_m, sum_a_m, sum_za_m):
    """The line through an activation's inputs and outputs that fits best, per neuron, from sums over tokens.

    `slope = cov(z, act(z)) / var(z)`, `offset = mean(act(z)) - slope * mean(z)`; a neuron whose input does not vary
    gets slope 0 and its mean output.

    Args:
        count: number of tokens.
        sum_z_m, sum_zz_m, sum_a_m, sum_za_m: sums of `z`, `z * z`, `act(z)` and `z * act(z)`, float64.

    Returns:
        `(slope_m, offset_m)`, float64.
    """
    mean_z, mean_a = sum_z_m / count, sum_a_m / count
    variance = sum_zz_m / count - mean_z.square()
    covariance = sum_za_m / count - mean_z * mean_a
    # Below the rounding error of the sums a variance is noise.
    varies = variance > 1e-10 * (sum_zz_m / count)
    slope = torch.where(varies, covariance / torch.where(varies, variance, 1.0), 0.0)
    return slope, mean_a - slope * mean_z


def least_squares_map(moments_ff, cross_fo, ridge=1e-6):
    """`argmin sum |y - W x - b|^2` from second moments of `f = [x, 1]`.

    Args:
        moments_ff: `sum f f^T`, shape `(i + 1, i + 1)`; the last feature is the constant 1.
        cross_fo: `sum f y^T`, shape `(i + 1, o)`.
        ridge (`float`): Added to the diagonal of every feature but the constant, relative to that feature's own
            second moment.

    Returns:
        `(weight_oi, bias_o)` in float64.
    """
    moments, cross = moments_ff.double(), cross_fo.double()
    diagonal = moments.diagonal()
    # Unit diagonal first: massive activations make features differ by many orders of magnitude.
    scale = diagonal.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    scale = torch.where(diagonal > 0, scale, 0.0)
    normal = moments * scale * scale[:, None]
    penalty = torch.full_like(diagonal, ridge)
    penalty[-1] = 0.0
    penalty = penalty + (diagonal <= 0)
    solution = torch.linalg.solve(normal + penalty.diag(), cross * scale[:, None]) * scale[:, None]
    return solution[:-1].T.contiguous(), solution[-1].contiguous()


def fit_quality(moments_ff, cross_fo, sum_yy_o, weight_oi, bias_o):
    """How well a map fits the data that the moments were taken from.

    Returns:
        `(r2, relative_error)`, floats: the share of the variance of `y` that is explained, 1 = all; and
        `|W x + b - y| / |y|` over all tokens.
    """
    count = moments_ff[-1, -1].double()
    solution_fo = torch.cat([weight_oi.double().T, bias_o.double()[None]])
    explained = 2 * (solution_fo * cross_fo.double()).sum() - (solution_fo * (moments_ff.double() @ solution_fo)).sum()
    squares = sum_yy_o.double().sum()
    residual = (squares - explained).clamp_min(0)
    variance = squares - cross_fo[-1].double().square().sum() / count
    if squares <= 0:
        return 1.0, 0.0
    return float(1 - residual / variance) if variance > 0 else 1.0, float((residual / squares).sqrt())


def gaussian_inputs(width, rows=1024, seed=0):
    """The inputs on which every merge is measured: standard normal, shape `(rows, width)`, float32, on the CPU."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def relative_error(expected, actual):
    """`|actual - expected| / |expected|` over all elements (float); 0 where both are zero."""
    expected, actual = expected.double(), actual.double()
    difference = torch.linalg.vector_norm(actual - expected)
    norm = torch.linalg.vector_norm(expected)
    return float(difference / norm) if norm > 0 else float(difference)
