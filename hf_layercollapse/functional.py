"""The mathematics: tensors in, tensors out; no modules, no logging.

Shape suffixes: `n` rows of inputs, `i` input width, `m` hidden width, `o` output width, `k` kept neurons, `r` rank,
`f` features of a fit, `c` classes of a head, `b` examples of `t` tokens. A weight `_oi` maps `i` to `o` and is stored
as `nn.Linear` stores it. Everything is computed in float64 unless said otherwise, from moments in the precision that
they were summed in.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch


# Ridge of the fits, relative to each feature's variance; the second where products were summed in float32. It has to
# be well above the rounding noise of the sums: refinement then takes it back only where there is more than noise.
RIDGE, RIDGE_FLOAT32 = 1e-6, 1e-4

# Below this part of the features' variances a direction is none: several times the noise of float32 sums.
LEAST_SHARE = 1e-5

# Steps of iterative refinement that take the ridge back.
REFINE = 2

# Up to so many candidates neurons are chosen one by one, in float64.
EXACT_CANDIDATES = 512

# A token whose output is longer than this many times the median counts less, so that its squared error weighs as much
# as one at that length. Ordinary models have none; in decoders the first token's output is hundreds of times longer
# and would decide the fit alone.
OUTLIER_LENGTH = 8.0

# Rows that large matrices are worked on at a time.
STRIP = 1024

# Elements of a model's outputs that are worked on at a time: in float32, and with what is computed from them, those of
# a whole batch of logits are several times what the model gave.
OUTPUTS = 2**22

_TINY = 1e-30


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float64; on the CPU where that is not to be had, as on MPS."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def merge_plain(
    up_weight_mi: torch.Tensor,
    up_bias_m: torch.Tensor | None,
    down_weight_om: torch.Tensor,
    down_bias_o: torch.Tensor | None,
    slope_m: torch.Tensor | float = 1.0,
    offset_m: torch.Tensor | float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
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


def merge_gated(
    up_weight_mi: torch.Tensor,
    up_bias_m: torch.Tensor | None,
    down_weight_om: torch.Tensor,
    down_bias_o: torch.Tensor | None,
    gate_m: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`down(gate * up(x))` with a constant gate, as one linear map.

    Args:
        gate_m: tensor of shape `(m,)`, or a number: what the activated gate has become.

    Returns:
        `(weight_oi, bias_o)` as [`merge_plain`].
    """
    return merge_plain(up_weight_mi, up_bias_m, down_weight_om, down_bias_o, slope_m=gate_m)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) else value


def affine_target(
    count: int, sum_z_m: torch.Tensor, sum_zz_m: torch.Tensor, sum_a_m: torch.Tensor, sum_za_m: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
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


def second_moments_(
    total: float,
    sum_f: torch.Tensor,
    sum_o: torch.Tensor,
    moments_ff: torch.Tensor,
    cross_fo: torch.Tensor,
    moments_oo: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means and centred second moments from (weighted) sums over tokens. The second moments are centred in place: no
    larger matrices are held than these.

    Args:
        total (`float`): Sum of the tokens' weights.
        sum_f, sum_o, moments_ff, cross_fo, moments_oo: Sums of `f`, `y`, `f f^T`, `f y^T` and `y y^T`, all about one
            and the same origin per feature, so that large means do not cost precision. Of `f f^T` and `y y^T` only the
            upper triangles are read.

    Returns:
        `(mean_f, mean_o, cov_ff, cov_fo, cov_oo)`: means in float64, the others as they were summed.
    """
    mean_f, mean_o = sum_f.double() / total, sum_o.double() / total
    mirror_(moments_ff)
    mirror_(moments_oo)
    pairs = ((moments_ff, mean_f, mean_f), (cross_fo, mean_f, mean_o), (moments_oo, mean_o, mean_o))
    for moments, first, second in pairs:
        moments.addr_(first.to(moments), second.to(moments), beta=1 / total, alpha=-1)
    return mean_f, mean_o, moments_ff, cross_fo, moments_oo


def mirror_(matrix_ff: torch.Tensor) -> None:
    """Copies the upper triangle of a square matrix onto the lower one, in place."""
    for rows in _strips(matrix_ff.shape[0], 128):  # what is on the diagonal is copied: little
        on_diagonal = matrix_ff[rows, rows]
        on_diagonal.copy_(on_diagonal.triu() + on_diagonal.triu(1).T)
        matrix_ff[rows.stop :, rows] = matrix_ff[rows, rows.stop :].T


def regress(cov_ff: torch.Tensor, cov_fo: torch.Tensor, ridge: float = RIDGE, refine: int = REFINE) -> torch.Tensor:
    """`argmin_A E |y - A^T f|^2` over centred features, shape `(f, o)`.

    Args:
        ridge (`float`): Relative to each feature's own variance.
        refine (`int`): Steps that take back what the ridge costs where the data does determine the answer. After two
            a block which is linear is fitted exactly; each costs as much again as the rest.
    """
    solver, outputs = _Solver(cov_ff, ridge, refine), cov_fo.shape[1]
    return torch.cat([solver(cov_fo[:, part]) for part in _strips(outputs)], dim=1) if outputs else cov_fo.double()


class _Solver:
    """Regressions on one set of features, whose moments are factorised once."""

    def __init__(self, cov_ff: torch.Tensor, ridge: float, refine: int = REFINE) -> None:
        self.cov_ff, self.refine = cov_ff, refine
        self.scale, self.factor = _damped_factor(cov_ff, ridge)

    def __call__(self, cov_fo: torch.Tensor) -> torch.Tensor:
        scale = self.scale[:, None]
        target = cov_fo.double() * scale
        solution = torch.cholesky_solve(target, self.factor)
        for _ in range(self.refine):
            left = target - scale * _product(self.cov_ff, scale * solution)
            solution += torch.cholesky_solve(left, self.factor)
        return solution * scale


def _strips(count: int, size: int = STRIP) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _product(matrix_ff: torch.Tensor, columns_fo: torch.Tensor) -> torch.Tensor:
    """`matrix @ columns` in float64, without a copy of the matrix in float64."""
    if matrix_ff.dtype == torch.float64:
        return matrix_ff @ columns_fo
    product_fo = columns_fo.new_empty(matrix_ff.shape[0], columns_fo.shape[1])
    for rows in _strips(matrix_ff.shape[0]):
        product_fo[rows] = matrix_ff[rows].double() @ columns_fo
    return product_fo


def _damped_factor(cov_ff: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`(scale, factor)`: what scales a feature to unit variance (0 where it does not vary), and the Cholesky factor of
    the features' correlations with the ridge on their diagonal."""
    # Unit diagonal first: massive activations make features differ by many orders of magnitude.
    scale = _to_unit_variance(cov_ff)
    factor, failed = torch.linalg.cholesky_ex(_damped(cov_ff, scale, ridge))
    if failed:
        # Sums of float32 products are not exactly positive definite.
        values, vectors = torch.linalg.eigh(_damped(cov_ff, scale, ridge))
        factor = vectors * values.clamp_min(ridge)[None].sqrt()
        factor = torch.linalg.qr(factor.T).R.T
    return scale, factor


def _to_unit_variance(cov_ff: torch.Tensor) -> torch.Tensor:
    variance = cov_ff.diagonal().double()
    varies = variance > 1e-12 * variance.max()
    return torch.where(varies, torch.where(varies, variance, 1.0).rsqrt(), 0.0)


def _damped(cov_ff: torch.Tensor, scale: torch.Tensor, ridge: float) -> torch.Tensor:
    damped = cov_ff.to(torch.float64, copy=True).mul_(scale).mul_(scale[:, None])
    damped.diagonal().add_(ridge + (scale == 0).double())
    return damped


def effective_rank(cov_ff: torch.Tensor, least_share: float = LEAST_SHARE) -> float:
    """How many dimensions features span (float): the effective degrees of freedom of a fit to them with such a ridge,
    `tr(C (C + ridge)^-1)` of their correlations `C`.

    Args:
        cov_ff: Centred second moments.
        least_share (`float`): A direction of this part of the features' variance counts half.
    """
    if not len(cov_ff):
        return 0.0
    scale, factor = _damped_factor(cov_ff, least_share)
    squares = torch.zeros_like(scale)
    for part in _strips(len(factor)):
        # Columns of the inverse of a triangle begin at the diagonal.
        below = factor[part.start :, part.start :]
        columns = torch.eye(len(below), part.stop - part.start).to(below)
        squares[part] = torch.linalg.solve_triangular(below, columns, upper=False).square().sum(0)
    return float((1 - least_share * squares)[scale > 0].sum().clamp_min(0))


def generalized(residual: float, tokens: int, features: float) -> float:
    """What a least-squares fit leaves unexplained on other data than its own, by generalised cross-validation.

    `residual / (1 - features / tokens)^2` (Golub, Heath and Wahba 1979): each feature explains a part of its own data
    by chance, so that fits of different sizes cannot be compared by what they leave there.

    Args:
        residual (`float`): Share of the variance left unexplained on the data that was fitted to, in [0, 1].
        tokens (`int`): Of that data.
        features (`float`): Coefficients for each output.
    """
    return residual / (1 - features / tokens) ** 2 if features < tokens else math.inf


def unexplained(cov_ff: torch.Tensor, cov_fo: torch.Tensor, var_o: torch.Tensor, solution_fo: torch.Tensor) -> float:
    """Variance of `y - A^T f`, summed over outputs (float)."""
    explained = 2 * (solution_fo * cov_fo).sum() - (solution_fo * _product(cov_ff, solution_fo)).sum()
    return float((var_o.double().sum() - explained).clamp_min(0))


def reduced_rank(
    cov_ff: torch.Tensor,
    cov_fo: torch.Tensor,
    width: int,
    rank: int,
    ridge: float = RIDGE,
    refine: int = REFINE,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best `y = P V x + D h` with `rank(P V) <= rank`, for features `f = [x, h]` (Izenman 1975).

    Args:
        width (`int`): Size of `x`, the first features; the rest is `h` and unconstrained.
        rank (`int`): From 0 to `width`.

    Returns:
        `(left_or, right_ri, down_fo)`: `P`, `V`, and `D^T` with one row per feature of `h`.
    """
    kept = cov_ff.shape[0] > width
    if rank == 0:
        down = cov_fo[width:].double()
        if kept:
            down = regress(cov_ff[width:, width:], down, ridge, refine)
        return down.new_zeros(cov_fo.shape[1], 0), down.new_zeros(0, width), down
    solution = regress(cov_ff, cov_fo, ridge, refine)
    weight_io = solution[:width]
    xx, xh, hh = cov_ff[:width, :width].double(), cov_ff[:width, width:].double(), cov_ff[width:, width:]
    if kept and rank < width:
        # What of x the neurons do not give already.
        xx = xx - xh @ regress(hh, xh.T, ridge, refine)
    fitted_oo = weight_io.T @ xx @ weight_io
    _, vectors = torch.linalg.eigh((fitted_oo + fitted_oo.T) / 2)
    left = vectors[:, vectors.shape[1] - rank :].flip(1)
    right = (weight_io @ left).T
    if not kept:
        return left, right, left.new_zeros(0, cov_fo.shape[1])
    # The same product in a form whose channels are of one size: half-precision models need it.
    rest = cov_fo[width:].double() - xh.T @ right.T @ left.T
    return left, right, regress(hh, rest, ridge, refine)


def balance(left_or: torch.Tensor, right_ri: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with channels of one norm on both sides: what half precision represents best."""
    left, right = left_or.norm(dim=0), right_ri.norm(dim=1)
    factor = torch.where((left > 0) & (right > 0), (right / left.clamp_min(1e-300)).sqrt(), 1.0)
    return left_or * factor, right_ri / factor[:, None]


def line_residual(
    count: int,
    sum_z_m: torch.Tensor,
    sum_zz_m: torch.Tensor,
    sum_a_m: torch.Tensor,
    sum_aa_m: torch.Tensor,
    sum_za_m: torch.Tensor,
) -> torch.Tensor:
    """Variance of each neuron's activation that the best line through its pre-activation leaves unexplained."""
    slope, _ = affine_target(count, sum_z_m, sum_zz_m, sum_a_m, sum_za_m)
    variance_a = sum_aa_m / count - (sum_a_m / count).square()
    covariance = sum_za_m / count - sum_z_m * sum_a_m / count**2
    return (variance_a - slope * covariance).clamp_min(0)


def greedy_neurons(
    cov_ff: torch.Tensor,
    cov_fo: torch.Tensor,
    width: int,
    count: int,
    given: torch.Tensor | None = None,
    ridge: float = RIDGE,
    batch: int | None = None,
) -> tuple[list[int], torch.Tensor]:
    """Neurons in the order of greedy orthogonal least squares: each the one whose addition explains most of what is
    left of `y`, and how much all up to it explain.

    In batches: the candidates with the largest gains, four for each of a batch, are chosen from one by one, exactly,
    and what the batch explains is then taken out of all others at once. Up to `EXACT_CANDIDATES` neurons the order is
    that of choosing one by one. With more it explains as much (MiniLM, 307 of 1,536 neurons in batches of 32: 0.0222
    of the variance left, one by one 0.0220), and the time is that of a few products of `(m, m)` matrices.

    Args:
        cov_ff, cov_fo: Centred moments of `f = [x, h]` and `y`; the candidates are the features after the first
            `width`. With `cov_fo S` in place of `cov_fo`, `y` is explained in the metric `S S`.
        count (`int`): How many to choose, at most the number of candidates.
        given: Directions `(r, i)` of `x` that are features already; default: all of `x`. Shape `(0, i)`: none.
        batch (`int`, *optional*): Default: a twentieth of `count`, at least 32.

    Returns:
        `(chosen, explained)`: indices among the candidates, in order of choice, and a float64 tensor `(count + 1,)` of
        the variance that the given features and the first `k` neurons explain, summed over outputs.
    """
    hh = cov_ff[width:, width:]
    # Of what is left and changes in place; a large block's is exact enough in float32, and twice as fast.
    dtype = torch.float32 if hh.shape[0] > EXACT_CANDIDATES else torch.float64
    floor = (1e-6 * hh.diagonal().double().clamp_min(torch.finfo(torch.float64).tiny)).to(dtype)
    if width and (given is None or given.shape[0]):
        left_hh, rest_ho, base = _without_given(cov_ff, cov_fo, width, given, ridge, dtype)
    else:
        left_hh, rest_ho, base = hh.to(dtype, copy=True), cov_fo[width:].to(dtype, copy=True), 0.0
    batch = max(32, count // 20) if batch is None else batch
    pool = max(4 * batch, EXACT_CANDIDATES if hh.shape[0] <= EXACT_CANDIDATES else 0)
    taken = torch.zeros(hh.shape[0], dtype=torch.bool, device=hh.device)
    chosen: list[int] = []
    gains: list[float] = []
    while len(chosen) < count:
        candidates = _most_promising(left_hh, rest_ho, floor, taken, min(pool, hh.shape[0] - len(chosen)))
        size = min(batch, count - len(chosen)) if len(candidates) < hh.shape[0] - len(chosen) else count - len(chosen)
        places, gained, factor_bh = _greedy_among(
            left_hh[candidates[:, None], candidates], rest_ho[candidates], floor[candidates], size
        )
        picked = candidates[places]
        chosen += picked.tolist()
        gains += gained
        taken[picked] = True
        if len(chosen) < count:
            _take_out(left_hh, rest_ho, picked, factor_bh)
    explained = base + torch.tensor([0.0, *gains], dtype=torch.float64, device="cpu").cumsum(0)
    return chosen, explained


def _most_promising(
    left_hh: torch.Tensor, rest_ho: torch.Tensor, floor_h: torch.Tensor, taken_h: torch.Tensor, count: int
) -> torch.Tensor:
    """The candidates that each by itself explain most of what is left, in falling order; none that is taken."""
    diagonal = left_hh.diagonal()
    score = torch.where(diagonal > floor_h, rest_ho.square().sum(1) / diagonal.clamp_min(_TINY), -1.0)
    return score.masked_fill(taken_h, -torch.inf).topk(count).indices


def _take_out(left_hh: torch.Tensor, rest_ho: torch.Tensor, picked: torch.Tensor, factor_bh: torch.Tensor) -> None:
    """Takes what these neurons explain out of all that is left, in place: H -= U^T U and rest -= U^T V."""
    of_hb = torch.linalg.solve_triangular(factor_bh, left_hh[picked], upper=False)
    of_ob = torch.linalg.solve_triangular(factor_bh, rest_ho[picked], upper=False)
    left_hh.addmm_(of_hb.T, of_hb, alpha=-1)
    rest_ho.addmm_(of_hb.T, of_ob, alpha=-1)


def _without_given(
    cov_ff: torch.Tensor,
    cov_fo: torch.Tensor,
    width: int,
    given: torch.Tensor | None,
    ridge: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`(left_hh, rest_ho, base)`: what features that are there already leave of candidates and target, and how much of
    the target's variance they explain. For the arguments see [`greedy_neurons`]."""

    def through_x(columns: torch.Tensor) -> torch.Tensor:
        return columns.double() if given is None else given @ columns.double()

    xx, xh, xo = cov_ff[:width, :width], cov_ff[:width, width:], through_x(cov_fo[:width])
    hh, solver = cov_ff[width:, width:], _Solver(xx if given is None else through_x(through_x(xx).T), ridge)
    left_hh = torch.empty_like(hh, dtype=dtype)
    for columns in _strips(hh.shape[0]):
        of_h = solver(through_x(xh[:, columns]))
        for rows in _strips(columns.stop):
            part = (hh[rows, columns].double() - through_x(xh[:, rows]).T @ of_h).to(dtype)
            left_hh[rows, columns] = part
            left_hh[columns, rows] = part.T
    of_o = torch.cat([solver(xo[:, part]) for part in _strips(xo.shape[1])], dim=1)
    rest_ho = cov_fo[width:].to(torch.float64, copy=True)
    for rows in _strips(hh.shape[0]):
        rest_ho[rows] -= through_x(xh[:, rows]).T @ of_o
    return left_hh, rest_ho.to(dtype), float((of_o * xo).sum())


def _greedy_among(
    left_cc: torch.Tensor, rest_co: torch.Tensor, floor_c: torch.Tensor, count: int
) -> tuple[torch.Tensor, list[float], torch.Tensor]:
    """`(picked, gains, L)`: greedy choice one by one, what each explains, and the Cholesky factor of the picked ones'
    moments, in order. Below `floor` a candidate is a combination of what is there; noise would choose it.

    The outputs come in by the candidates' products with each other only, so that a step costs nothing that grows with
    their number. In float64.
    """
    dtype, left_cc, floor_c = left_cc.dtype, left_cc.double(), floor_c.double()
    products_cc = (rest_co @ rest_co.T).double()
    left, squares = left_cc.diagonal().clone(), products_cc.diagonal().clone()
    columns, crossed = left_cc.new_zeros(count, len(left)), left_cc.new_zeros(count, len(left))
    gains = left_cc.new_zeros(count)
    taken = torch.zeros_like(left, dtype=torch.bool)
    picked, explained = torch.zeros(count, dtype=torch.long, device=left.device), []
    for step in range(count):
        score = torch.where(left > floor_c, squares / left.clamp_min(_TINY), -1.0)
        best = int(score.masked_fill(taken, -torch.inf).argmax())
        pivot = torch.maximum(left[best], floor_c[best]).sqrt()
        of_best = columns[:step, best]
        column = (left_cc[:, best] - of_best @ columns[:step]) / pivot
        # Exactly what a triangular factor holds, whatever the rounding.
        column[best] = pivot
        # Products of all that is left of the target with its part along the new direction.
        cross = products_cc[:, best] - (crossed[:step, best] - gains[:step] * of_best) @ columns[:step]
        cross = (cross - of_best @ crossed[:step]) / pivot
        gains[step] = gain = (cross[best] / pivot).clamp_min(0)
        explained.append(float(gain) if bool(left[best] > floor_c[best]) else 0.0)
        columns[step], crossed[step] = column, cross
        squares += column.square() * gain - 2 * column * cross
        left -= column.square()
        taken[best] = True
        picked[step] = best
    return picked, explained, columns[:, picked].T.tril().to(dtype)


@dataclass(frozen=True)
class Fit:
    """What a block becomes: `y = W x + b + D h_K`, or `P V x` in place of `W x`. All float64.

    Args:
        weight_oi: `W`, or `None` where it has a lower rank.
        left_or, right_ri: `P` and `V`, or `None` at full rank.
        down_ok: `D`.
        bias_o: `b`, or `None` where there is none.
        neurons (`list[int]`): `K`, indices of hidden neurons, ascending.
        r2 (`float`): Share of the output's (weighted) variance that is explained on other data of the kind, 1 = all.
        error (`float`): `|new - old| / |old|` over the (weighted) tokens of such data.
    """

    weight_oi: torch.Tensor | None
    left_or: torch.Tensor | None
    right_ri: torch.Tensor | None
    down_ok: torch.Tensor
    bias_o: torch.Tensor | None
    neurons: list[int]
    r2: float | None = None
    error: float | None = None

    @property
    def rank(self) -> int | None:
        """Channels of the linear part, `None` at full rank."""
        return None if self.left_or is None else self.left_or.shape[1]

    @property
    def linear_or(self) -> torch.Tensor:
        """What the last linear holds of the linear part: `W`, or `P`."""
        linear = self.weight_oi if self.left_or is None else self.left_or
        assert linear is not None, "one of both"
        return linear

    @property
    def features(self) -> int:
        """Width of the input."""
        first = self.weight_oi if self.right_ri is None else self.right_ri
        assert first is not None, "one of both"
        return first.shape[1]

    def shapes(self) -> "Fit":
        """The same without its numbers: every tensor is on the meta device."""
        tensors: dict[str, Any] = {
            name: value.to("meta") for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **tensors)


def outlier_factors(lengths_n: torch.Tensor, limit: float) -> torch.Tensor:
    """What features and output of each token are multiplied by before they are fitted, in (0, 1]: with an output
    longer than `limit` (of [`OUTLIER_LENGTH`] times the median) it counts as if it were as long as that. 0: all
    count alike."""
    return limit / lengths_n.clamp_min(limit) if limit > 0 else torch.ones_like(lengths_n)


def about_origin(
    mean_f: torch.Tensor,
    mean_o: torch.Tensor,
    cov_ff: torch.Tensor,
    cov_fo: torch.Tensor,
    cov_oo: torch.Tensor,
    in_place: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Centred moments about the origin: `(E f f^T, E f y^T, E y y^T)`. What is fitted to them has no constant term."""
    pairs = ((cov_ff, mean_f, mean_f), (cov_fo, mean_f, mean_o), (cov_oo, mean_o, mean_o))
    add = torch.Tensor.addr_ if in_place else torch.Tensor.addr
    return tuple(add(moment, first.to(moment), second.to(moment)) for moment, first, second in pairs)


def fit_block(
    mean_f: torch.Tensor,
    mean_o: torch.Tensor,
    cov_ff: torch.Tensor,
    cov_fo: torch.Tensor,
    var_o: torch.Tensor,
    width: int,
    neurons: Sequence[int] = (),
    rank: int | None = None,
    ridge: float = RIDGE,
    refine: int = REFINE,
    constant: bool = True,
    inflation: float = 1.0,
    right_ri: torch.Tensor | None = None,
) -> Fit:
    """The least-squares [`Fit`] of a block from the moments of its features `[x, h_K]`.

    Args:
        width (`int`): Input width: the first features.
        neurons (`Sequence[int]`): Hidden indices of the other features, in their order.
        rank (`int`, *optional*): Of the linear part; `None`: full.
        ridge, refine: As in [`regress`].
        constant (`bool`): Whether there is a constant term. Without one `cov_ff`, `cov_fo` and `var_o` are the moments
            [`about_origin`]; `r2` still is of the variance about the mean.
        inflation (`float`): How much more other data leave unexplained, at least 1; see [`generalized`].
        right_ri (`Tensor`, *optional*): `V` of the linear part `P V`, of that rank. Default: the best.

    Raises:
        ValueError: `rank` is negative.
    """
    if rank is not None and rank < 0:
        raise ValueError(f"`rank` must be at least 0 or None, got {rank}.")
    weight = left = right = None
    if rank is None:
        solution = regress(cov_ff, cov_fo, ridge, refine)
        weight, down = solution[:width].T, solution[width:]
    else:
        left, right, down = _thin_parts(cov_ff, cov_fo, width, rank, right_ri, ridge, refine)
        solution = torch.cat([(left @ right).T, down])
        left, right = balance(left, right)
    bias = mean_o - solution.T @ mean_f if constant else None
    r2, error = _quality(inflation * unexplained(cov_ff, cov_fo, var_o, solution), mean_o, var_o, constant)
    order = sorted(range(len(neurons)), key=lambda index: neurons[index])
    return Fit(
        weight_oi=None if weight is None else weight.contiguous(),
        left_or=left,
        right_ri=right,
        down_ok=down[order].T.contiguous(),
        bias_o=bias,
        neurons=[int(neurons[index]) for index in order],
        r2=r2,
        error=error,
    )


def _quality(residual: float, mean_o: torch.Tensor, var_o: torch.Tensor, constant: bool) -> tuple[float, float]:
    """`(r2, error)` of a [`Fit`] from what it leaves of the output's squares."""
    total, squared_mean = float(var_o.sum()), float(mean_o.square().sum())
    variance, squares = (total, total + squared_mean) if constant else (max(0.0, total - squared_mean), total)
    r2 = 1 - residual / variance if variance > 0 else 1.0
    return r2, math.sqrt(residual / squares) if squares > 0 else 0.0


def _thin_parts(
    cov_ff: torch.Tensor,
    cov_fo: torch.Tensor,
    width: int,
    rank: int,
    right_ri: torch.Tensor | None,
    ridge: float,
    refine: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(P, V, D^T)` of least squares with a linear part `P V` of this rank; `V` is the best, or the given one."""
    if right_ri is None:
        return reduced_rank(cov_ff, cov_fo, width, min(rank, width, cov_fo.shape[1]), ridge, refine)
    solution = regress(*_reduced(cov_ff, cov_fo, right_ri), ridge, refine)
    return solution[: len(right_ri)].T, right_ri, solution[len(right_ri) :]


def _reduced(cov_ff: torch.Tensor, cov_fo: torch.Tensor, right_ri: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of the features `[V x, h]` from those of `[x, h]`: `(cov_ff, cov_fo)`."""
    rank, width = right_ri.shape
    through_x = right_ri @ cov_ff[:width].double()
    reduced_ff = right_ri.new_empty(2 * (rank + cov_ff.shape[0] - width,))
    reduced_ff[:rank, :rank] = through_x[:, :width] @ right_ri.T
    reduced_ff[:rank, rank:] = through_x[:, width:]
    reduced_ff[rank:, :rank] = through_x[:, width:].T
    reduced_ff[rank:, rank:] = cov_ff[width:, width:]
    cov_fo = cov_fo.double()
    return reduced_ff, torch.cat([right_ri @ cov_fo[:width], cov_fo[width:]])


def shrinkage(matrix_oo: torch.Tensor, fourth: float, rows: int) -> float:
    """How much of a second moment `E[g g^T]` that was seen on few rows to replace by `mu I`, with the same trace.

    `min(1, E|g g^T - G|^2 / (n |G - mu I|^2))`, Ledoit and Wolf 2004 (A well-conditioned estimator for
    large-dimensional covariance matrices, lemma 3.4), which makes the expected squared error smallest.

    Args:
        matrix_oo: The moment over the rows.
        fourth (`float`): `E[|g|^4]` over the same.
        rows (`int`): How many there were.

    Returns:
        A number in [0, 1]; 1 where the matrix is a multiple of the identity.
    """
    mean = matrix_oo.diagonal().mean()
    squared = float(matrix_oo.square().sum(dtype=torch.float64))
    spread = squared - matrix_oo.shape[0] * float(mean) ** 2
    noise = max(fourth - squared, 0.0) / rows
    return min(1.0, noise / spread) if spread > 0 else 1.0


def shrunk(matrix_oo: torch.Tensor, share: float) -> torch.Tensor:
    """`(1 - share) G + share mu I`, with `mu` the mean of the diagonal of `G`."""
    shrunk = (1 - share) * matrix_oo
    shrunk.diagonal().add_(share * matrix_oo.diagonal().mean())
    return shrunk


def psd_root(matrix_oo: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh((matrix_oo + matrix_oo.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def allocate(options: Any, budgets: Sequence[float], bins: int = 20_000) -> list[Any]:
    """One option of each list, so that the sum of their values is smallest while their costs stay within a budget: for
    several budgets at once.

    Dynamic programming over the largest budget in `bins` parts; costs are rounded up to these, so that no budget is
    ever exceeded, and what an option costs is known to within one part for each list. The cheapest options are
    compared with a budget as they are.

    Args:
        options (`Sequence[Sequence[tuple[float, float]]]`): Lists of `(cost, value)`, cost >= 0.
        budgets (`Sequence[float]`): Largest sums of costs, > 0.

    Returns:
        For each budget the indices, one for each list; `None` where even the cheapest options cost more.
    """
    unit = max(budgets) / bins
    best = torch.zeros(bins + 1, dtype=torch.float64)
    chosen = []
    for row in options:
        parts = [math.ceil(cost / unit - 1e-9) for cost, _ in row]
        reached = torch.full_like(best, torch.inf)
        index = torch.zeros(bins + 1, dtype=torch.int32)
        for position, (part, (_, value)) in enumerate(zip(parts, row, strict=True)):
            if part > bins:
                continue
            sums = best[: bins + 1 - part] + value
            better = sums < reached[part:]
            reached[part:][better] = sums[better]
            index[part:][better] = position
        chosen.append((parts, index))
        best = reached
    found = [_traced_back(best, chosen, min(bins, math.floor(budget / unit + 1e-9))) for budget in budgets]
    cheapest = [min(range(len(row)), key=row.__getitem__) for row in options]
    least = sum(row[index][0] for row, index in zip(options, cheapest, strict=True))
    return [
        cheapest if result is None and least <= budget else result
        for result, budget in zip(found, budgets, strict=True)
    ]


def _traced_back(best: torch.Tensor, chosen: Sequence[tuple[list[int], torch.Tensor]], place: int) -> list[int] | None:
    """The choice of each block that leads to the best place up to this one; `None` if there is none."""
    place = int(best[: place + 1].argmin())
    if not math.isfinite(float(best[place])):
        return None
    result = []
    for parts, index in reversed(chosen):
        result.append(int(index[place]))
        place -= parts[result[-1]]
    return result[::-1]


def odd_slope(points: torch.Tensor, values: torch.Tensor, mirrored: torch.Tensor) -> float | None:
    """The `c` of an activation with `act(z) - act(-z) = c * z`, or `None` if it is none such.

    GELU, its tanh approximation, QuickGELU, SiLU and ReLU have `c = 1`: they are `z * g(z)` with `g(z) + g(-z) = 1`.

    Args:
        points, values, mirrored: `z`, `act(z)` and `act(-z)`, float64, `z` different from 0.
    """
    ratios = (values - mirrored) / points
    slope = float(ratios.mean())
    same = torch.allclose(ratios, torch.full_like(ratios, slope), rtol=1e-9, atol=0)
    return slope if same and slope != 0 else None


def linear_as_neurons(
    left_or: torch.Tensor, right_ri: torch.Tensor, slope: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Neurons that compute the linear map `P V x`: `down act(up x)`, for an activation with
    `act(z) - act(-z) = slope * z` (see [`odd_slope`]).

    Returns:
        `(up_weight_mi, down_weight_om)` with `m = 2 r`: `[V; -V]` and `[P, -P] / slope`.
    """
    return torch.cat([right_ri, -right_ri]), torch.cat([left_or, -left_or], dim=1) / slope


def gaussian_inputs(width: int, rows: int = 1024, seed: int = 0) -> torch.Tensor:
    """The inputs on which every merge is measured: standard normal, shape `(rows, width)`, float32, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float32, device="cpu")


def largest(values: Iterable[float]) -> float:
    """The largest of some numbers, NaN if one of them is: `max` passes over it unless it comes first."""
    return max(values, key=lambda value: (value != value, value))


def is_finite(outputs: torch.Tensor) -> bool:
    """Whether every element is; some are looked at at a time."""
    return all(bool(part.isfinite().all()) for part in outputs.reshape(-1).split(OUTPUTS))


def largest_difference(outputs: torch.Tensor, others: torch.Tensor) -> float:
    """The largest absolute difference of elements, NaN if one is; some are compared at a time."""
    pairs = zip(outputs.reshape(-1).split(OUTPUTS), others.reshape(-1).split(OUTPUTS), strict=True)
    return largest(float((part.float() - other.float()).abs().max()) for part, other in pairs)


def relative_error(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """`|actual - expected| / |expected|` over all elements (float); 0 where both are zero."""
    expected, actual = wide(expected), wide(actual)
    difference = torch.linalg.vector_norm(actual - expected)
    norm = torch.linalg.vector_norm(expected)
    return float(difference / norm) if norm > 0 else float(difference)


def drawn_classes(logits_nc: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`(classes, logarithms of their probabilities)`, shapes `(n,)`: one of each row, drawn from its softmax.

    What is drawn is what `torch.multinomial` draws of the same probabilities, without a copy of them all: of numbers
    `q` from an exponential distribution, the class where `p / q` is largest.

    Args:
        generator: of the CPU, where one float32 number of each logit is drawn.
    """
    waiting_nc = torch.empty(logits_nc.shape, dtype=torch.float32, device="cpu").exponential_(generator=generator)
    drawn, logs = [], []
    for rows in _output_strips(logits_nc):
        p_nc = logits_nc[rows].float().softmax(-1)
        class_n1 = (p_nc.cpu() / waiting_nc[rows]).argmax(-1, keepdim=True).to(p_nc.device)
        drawn.append(class_n1[:, 0])
        logs.append(p_nc.gather(-1, class_n1)[:, 0].log())
    return torch.cat(drawn), torch.cat(logs)


def log_probability_gradient(logits_nc: torch.Tensor, class_n: torch.Tensor) -> torch.Tensor:
    """The gradient of the logarithm of each row's probability of its class, in the logits' own type: the class's one,
    less the softmax."""
    gradient_nc = torch.empty_like(logits_nc)
    for rows in _output_strips(logits_nc):
        minus_nc = logits_nc[rows].float().softmax(-1).neg_()
        minus_nc.scatter_add_(-1, class_n[rows, None], minus_nc.new_ones(len(minus_nc), 1))
        gradient_nc[rows] = minus_nc
    return gradient_nc


def _output_strips(outputs_nc: torch.Tensor) -> list[slice]:
    """Rows that are worked on at a time."""
    return _strips(len(outputs_nc), max(1, OUTPUTS // max(1, outputs_nc.shape[-1])))


def soft_target_loss(student_nc: torch.Tensor, teacher_nc: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))` of each row, in float32: distillation as in Hinton et
    al., arXiv 1503.02531, section 2; the factor keeps gradients the same size for every temperature.

    Returns:
        Shape `(n,)`, nats, >= 0.
    """
    student = torch.log_softmax(student_nc.float() / temperature, dim=-1)
    teacher = torch.log_softmax(teacher_nc.float() / temperature, dim=-1)
    return temperature**2 * torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def soft_binary_loss(student_nc: torch.Tensor, teacher_nc: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """[`soft_target_loss`] of independent yes-or-no classes, whose logits go through a sigmoid: shape `(n, c)`."""
    student, teacher = student_nc.float() / temperature, teacher_nc.float() / temperature
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    targets = teacher.sigmoid()
    return temperature**2 * (bce(student, targets, reduction="none") - bce(teacher, targets, reduction="none"))


def embedding_loss(student_nd: torch.Tensor, teacher_nd: torch.Tensor) -> torch.Tensor:
    """`1 - cos(student, teacher) + |student - teacher|^2 / |teacher|^2` of each row, in float32: the direction, which
    searches compare, and the length, which sparse embeddings and dot products weigh by.

    Returns:
        Shape `(n,)`, >= 0: 0 where they agree, 2 where the student gives zeros. Where the teacher does, which has no
        direction and no length, `1 + |student|^2`.
    """
    student, teacher = student_nd.float(), teacher_nd.float()
    squares_n = teacher.square().sum(-1)
    squares_n = torch.where(squares_n > 0, squares_n, 1.0)
    distance_n = 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    return distance_n + (student - teacher).square().sum(-1) / squares_n


def unexplained_share(student_bto: torch.Tensor, teacher_bto: torch.Tensor, real_bt: torch.Tensor) -> torch.Tensor:
    """Squared error of each token's output in units of its variance over the `o` features, mean over the tokens of
    each of `b` examples, in float32.

    By token, so that one with massive activations counts as much as any other. The variance is the teacher's of that
    token, or of the example's median token where that is larger: an output that is all but constant is no measure.

    Args:
        real_bt: `False` where a token is padding.

    Returns:
        Shape `(b,)`: 0 where they agree, about 1 where the student gives a constant; NaN without a real token.
    """
    student, teacher = student_bto.float(), teacher_bto.float()
    variance_bt = teacher.var(dim=-1, correction=0)
    median_b1 = variance_bt.masked_fill(~real_bt, float("nan")).nanmedian(dim=1, keepdim=True).values
    scale_bt = torch.maximum(variance_bt, median_b1) + torch.finfo(torch.float32).tiny
    share_bt = (student - teacher).square().mean(-1) / scale_bt
    return share_bt.masked_fill(~real_bt, float("nan")).nanmean(dim=1)
