"""How far what a finite test set says can be trusted: intervals of accuracies, differences, perplexities."""

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


def accuracy_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval that holds the accuracy on unlimited data of this kind, given `correct` of `total` (Wilson 1927).

    Unlike `p +- z * sqrt(p * (1 - p) / n)` it stays inside [0, 1] and keeps its confidence near 0 and 1.

    Args:
        correct (`int`): Right answers.
        total (`int`): Answers, at least 1.
        confidence (`float`): In (0, 1).

    Returns:
        `(low, high)`, floats in [0, 1].

    Raises:
        ValueError: The numbers do not describe a test.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"Need 0 <= correct <= total and total >= 1, got correct={correct}, total={total}.")
    z = _z(confidence)
    share = correct / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    # At 0 and at 1 one end is exact; rounding would move it.
    low = 0.0 if correct == 0 else float(centre - half)
    return low, 1.0 if correct == total else float(centre + half)


def paired_difference(
    correct: ArrayLike, baseline_correct: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """How much more often one model is right than another on the *same* examples, with a bootstrap interval.

    Models that were tested on the same examples mostly err on the same ones, so the interval of their difference is
    much narrower than two separate intervals suggest. The bootstrap draws examples, not runs: with several training
    seeds (rows) each example keeps its mean over them, and the interval is for these runs on unlimited data.

    Args:
        correct, baseline_correct (array of `bool`): Whether each example is right, shape `(examples,)` or
            `(runs, examples)`, examples in the same order.
        confidence (`float`): In (0, 1).
        resamples (`int`): Bootstrap samples.
        seed (`int`): Of the samples.

    Returns:
        `(difference, low, high)`: mean of `correct` minus mean of `baseline_correct`, and its percentile interval, as
        shares in [-1, 1].

    Raises:
        ValueError: The shapes differ, or there is no example.
    """
    correct, baseline = np.atleast_2d(correct).astype(float), np.atleast_2d(baseline_correct).astype(float)
    if correct.shape != baseline.shape or correct.ndim != 2 or correct.shape[1] == 0:
        raise ValueError(
            "`correct` and `baseline_correct` must have the same shape, (examples,) or (runs, examples), got "
            f"{np.shape(correct)} and {np.shape(baseline_correct)}."
        )
    differences = (correct - baseline).mean(axis=0)
    return float(differences.mean()), *bootstrap_interval(differences, None, confidence, resamples, seed)


def bootstrap_interval(
    values: ArrayLike,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval of a mean over examples, or of a function of it, from resampled examples (Efron 1979).

    Args:
        values (array of `float`): One number per example: whether it is right, its negative log-likelihood, or the
            difference of two models on it. Shape `(examples,)`.
        transform (`Callable`, *optional*): Of arrays of means, monotonous; `np.exp` makes perplexities of mean
            negative log-likelihoods. Default: the mean itself.
        confidence (`float`): In (0, 1).
        resamples (`int`): Bootstrap samples.
        seed (`int`): Of the samples.

    Returns:
        `(low, high)`, the percentile interval.

    Raises:
        ValueError: There is no example, or `confidence` is out of range.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"`values` must have the shape (examples,) with at least one example, got {values.shape}.")
    _z(confidence)
    # How often each value comes up is the same as drawing examples, and cheap where the values are few.
    values, counts = np.unique(values, return_counts=True)
    rng, drawn = np.random.default_rng(seed), []
    at_once = max(1, 2**22 // len(values))
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        drawn.append(rng.multinomial(counts.sum(), counts / counts.sum(), size=size) @ values / counts.sum())
    means = np.concatenate(drawn)
    low, high = np.quantile(
        means if transform is None else transform(means), [(1 - confidence) / 2, (1 + confidence) / 2]
    )
    return float(low), float(high)


def perplexity_interval(
    losses: ArrayLike, tokens: ArrayLike, confidence: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> tuple[float, float, float]:
    """Perplexity of a corpus and the interval that holds it on unlimited text of this kind, by a bootstrap that draws
    sequences: tokens of one sequence are no independent examples.

    Args:
        losses (array of `float`): Negative log-likelihood of each sequence, summed over its predicted tokens, in nats.
        tokens (array of `int`): How many those are.
        confidence (`float`): In (0, 1).
        resamples (`int`): Bootstrap samples.
        seed (`int`): Of the samples.

    Returns:
        `(perplexity, low, high)`.

    Raises:
        ValueError: The shapes differ, or there is no token.
    """
    return paired_perplexity_difference(losses, None, tokens, confidence, resamples, seed)


def paired_perplexity_difference(
    losses: ArrayLike,
    baseline_losses: ArrayLike | None,
    tokens: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How much higher one model's perplexity is than another's on the *same* sequences; as [`perplexity_interval`].

    Returns:
        `(difference, low, high)`.
    """
    return _resampled_mean(losses, baseline_losses, tokens, np.exp, confidence, resamples, seed)


def mean_interval(
    sums: ArrayLike,
    counts: ArrayLike,
    baseline: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean over all that was measured, where that is several numbers for each input, and the interval that holds it on
    unlimited inputs of this kind, by a bootstrap that draws inputs: numbers of one input are no independent examples.

    Args:
        sums (array of `float`): Of each input, summed over what was measured of it.
        counts (array of `int`): How many those are.
        baseline (array of `float`, *optional*): Sums of another model on the *same* inputs. Then it is the difference
            of the means, paired.
        confidence (`float`): In (0, 1).
        resamples (`int`): Bootstrap samples.
        seed (`int`): Of the samples.

    Returns:
        `(mean, low, high)`.

    Raises:
        ValueError: The shapes differ, or nothing was measured.
    """
    return _resampled_mean(sums, baseline, counts, np.asarray, confidence, resamples, seed)


def _resampled_mean(
    sums: ArrayLike,
    baseline_sums: ArrayLike | None,
    counts: ArrayLike,
    transform: Callable[[np.ndarray], np.ndarray],
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[float, float, float]:
    """`(value, low, high)` of a function of `sum(sums) / sum(counts)`, or of its difference from the baseline's."""
    sums, numbers = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    baseline = None if baseline_sums is None else np.asarray(baseline_sums, dtype=float)
    if sums.ndim != 1 or sums.shape != numbers.shape or (baseline is not None and baseline.shape != sums.shape):
        raise ValueError("Sums and counts (losses and tokens) must be one number for each input, of the same inputs.")
    if numbers.sum() < 1:
        raise ValueError("There is no predicted token.")
    _z(confidence)

    def value(drawn: np.ndarray) -> np.ndarray:
        total = drawn @ numbers
        found = transform(drawn @ sums / total)
        return found if baseline is None else found - transform(drawn @ baseline / total)

    # A few samples at a time: all at once would be an array of samples by inputs.
    rng, count = np.random.default_rng(seed), len(sums)
    found: list[np.ndarray] = []
    while len(found) < resamples:
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=min(100, resamples - len(found)))
        found.extend(value(drawn[drawn @ numbers > 0]))
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(value(np.ones(count))), float(low), float(high)


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be in (0, 1), got {confidence}.")
    return NormalDist().inv_cdf((1 + confidence) / 2)
