import evaluate
import numpy as np
import pytest

from hf_layercollapse.metrics import Accuracy, Perplexity, accuracy_interval, paired_difference


def test_accuracy_is_the_share_of_equal_predictions():
    assert Accuracy().compute(predictions=[0, 1, 1, 2], references=[0, 1, 0, 2]) == {"accuracy": 0.75}


def test_accuracy_over_batches_weighs_examples_and_not_batches():
    metric = Accuracy()
    metric.add_batch(predictions=[1, 1, 1], references=[1, 1, 1])
    metric.add_batch(predictions=[0], references=[1])
    assert metric.compute() == {"accuracy": 0.75}
    # A metric is empty again after `compute`.
    assert metric.compute(predictions=[0], references=[1]) == {"accuracy": 0.0}


def test_metrics_combine_without_the_hub():
    combined = evaluate.combine([Accuracy()])
    assert combined.compute(predictions=[0, 1], references=[0, 0]) == {"accuracy": 0.5}


def test_perplexity_averages_over_tokens():
    # 3 tokens of ln 2 and 1 token of ln 8: exp((3 ln 2 + ln 8) / 4) = 2 ** 1.5, not the mean over sequences.
    result = Perplexity().compute(predictions=[3 * np.log(2), np.log(8)], references=[3, 1])
    assert result["perplexity"] == pytest.approx(2**1.5)


@pytest.mark.parametrize(
    "correct, total, low, high",
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score without continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_accuracy_interval_against_published_values(correct, total, low, high):
    assert accuracy_interval(correct, total) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


def test_accuracy_interval_widens_with_confidence():
    narrow, wide = accuracy_interval(540, 600, confidence=0.8), accuracy_interval(540, 600, confidence=0.99)
    assert wide[0] < narrow[0] < 0.9 < narrow[1] < wide[1]


@pytest.mark.parametrize(
    "arguments", [(1, 0), (-1, 10), (11, 10), (5, 10, 1.0), (5, 10, 0)], ids=lambda arguments: str(arguments)
)
def test_accuracy_interval_refuses_what_is_no_test(arguments):
    with pytest.raises(ValueError, match="got"):
        accuracy_interval(*arguments)


def test_paired_difference_against_the_normal_approximation():
    # 30 gained and 18 lost of 600: mean 0.02, variance (48 / 600 - 0.02 ** 2) / 600.
    correct = np.array([1] * 30 + [0] * 18 + [1] * 552)
    baseline = np.array([0] * 30 + [1] * 18 + [1] * 552)
    difference, low, high = paired_difference(correct, baseline)
    half = 1.96 * np.sqrt((48 / 600 - 0.02**2) / 600)
    assert difference == pytest.approx(0.02)
    assert (low, high) == (pytest.approx(0.02 - half, abs=2e-3), pytest.approx(0.02 + half, abs=2e-3))


def test_paired_difference_of_equal_answers_is_exactly_zero():
    answers = np.array([True, False, True])
    assert paired_difference(answers, answers) == (0.0, 0.0, 0.0)


def test_paired_difference_is_mirrored_reproducible_and_averages_runs():
    generator = np.random.default_rng(0)
    ours, theirs = generator.random((3, 200)) < 0.8, generator.random((3, 200)) < 0.8
    difference, low, high = paired_difference(ours, theirs)
    assert paired_difference(ours, theirs) == (difference, low, high)
    assert difference == pytest.approx(ours.mean() - theirs.mean())
    mirrored = paired_difference(theirs, ours)
    assert mirrored == (pytest.approx(-difference), pytest.approx(-high, abs=5e-3), pytest.approx(-low, abs=5e-3))
    one_run = paired_difference(ours[0], theirs[0])
    assert high - low < one_run[2] - one_run[1]


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((0,), (0,)), ((2, 3), (3,))], ids=str)
def test_paired_difference_refuses_answers_that_are_not_paired(shapes):
    with pytest.raises(ValueError, match="same shape"):
        paired_difference(np.ones(shapes[0]), np.ones(shapes[1]))
