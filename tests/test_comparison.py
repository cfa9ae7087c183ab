"""Models side by side: what is counted, and what the numbers say."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_layercollapse import LayerCollapseConfig, collapse_model, prediction_divergence
from hf_layercollapse.comparison import Comparison, compare_models, weights_folder
from hf_layercollapse.metrics import (
    accuracy_interval,
    paired_difference,
    paired_perplexity_difference,
    perplexity_interval,
)
from hf_layercollapse.profiling import macs_per_token, weights_size

from .models import BY_NAME, divergence


def labelled(count=6, batch=8):
    return [{**BY_NAME["bert"].inputs(batch=batch, seed=i), "labels": torch.arange(batch) % 3} for i in range(count)]


def collapsed(case, blocks="last:2"):
    model = BY_NAME[case].model()
    data = [BY_NAME[case].inputs(batch=8, seed=i) for i in range(10)]
    collapse_model(model, LayerCollapseConfig(blocks=blocks), calibration_data=data)
    return model


def test_classifiers(tmp_path):
    dense, small, control = BY_NAME["bert"].model(), collapsed("bert"), BY_NAME["bert"].model(seed=3)
    small.save_pretrained(tmp_path)
    data = labelled()
    with torch.no_grad():
        right = {
            name: np.concatenate(
                [(model(input_ids=b["input_ids"]).logits.argmax(-1) == b["labels"]).numpy() for b in data]
            )
            for name, model in (("dense", dense), ("control", control), ("collapsed", small))
        }
    found = compare_models(
        {"dense": dense, "control": control, "collapsed": small.train()},
        iter(data),
        folders={"collapsed": tmp_path},
        rounds=3,
        source=("some/data", None, "test"),
        progress=False,
    )
    assert small.training and not dense.training
    assert (found.metric, found.examples, found.unit) == ("accuracy", 48, "token")
    for name in right:
        assert found[name].quality == right[name].mean()
        assert found[name].interval == accuracy_interval(int(right[name].sum()), 48)
    assert found["collapsed"].differences == {
        other: paired_difference(right["collapsed"], right[other]) for other in ("dense", "control")
    }
    assert found["dense"].differences == {}
    assert found["collapsed"].parameters == sum(parameter.numel() for parameter in small.parameters())
    assert found["collapsed"].macs == macs_per_token(small, {"input_ids": data[0]["input_ids"]})
    assert found["collapsed"].bytes == weights_size(tmp_path) and found["dense"].bytes is None
    assert found["dense"].ratio == 1 and found["collapsed"].latency > 0
    assert "threads" in found.hardware or "thread" in found.hardware
    text = str(found)
    assert "minus control" in text and "some/data test" in text and "8x7 tokens" in text
    # And back from a file.
    found.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json") == found
    with pytest.raises(KeyError, match="there are"):
        found["other"]


def test_language_models():
    """Perplexity over all real tokens; the model's own loss says the same."""
    dense, small = BY_NAME["gpt2"].model(), collapsed("gpt2")
    data = [BY_NAME["gpt2"].inputs(batch=4, seed=i) for i in range(5)]
    for i, batch in enumerate(data):
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][i % 4, 4:] = 0
    total = tokens = 0.0
    with torch.no_grad():
        for batch in data:
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            count = int((labels[:, 1:] != -100).sum())
            total, tokens = total + float(small(**batch, labels=labels).loss) * count, tokens + count
    found = compare_models({"dense": dense, "collapsed": small}, data, rounds=2, progress=False)
    assert found.metric == "perplexity" and found.examples == 20
    assert found["collapsed"].quality == pytest.approx(np.exp(total / tokens), rel=1e-5)
    low, high = found["collapsed"].interval
    assert low < found["collapsed"].quality < high
    value, low, high = found["collapsed"].differences["dense"]
    assert value == pytest.approx(found["collapsed"].quality - found["dense"].quality)
    assert low < value < high
    # Paired: much narrower than the two intervals.
    assert high - low < 0.5 * (found["dense"].interval[1] - found["dense"].interval[0])


def test_what_is_refused():
    model = BY_NAME["bert"].model()
    with pytest.raises(ValueError, match="at least two"):
        compare_models({"dense": model}, labelled())
    with pytest.raises(ValueError, match="empty"):
        compare_models({"dense": model, "other": model}, [])
    with pytest.raises(ValueError, match="label-column"):
        compare_models({"dense": model, "other": model}, [BY_NAME["bert"].inputs()])


def test_perplexity_intervals():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, size=300)
    rates = rng.normal(3.0, 0.5, size=300)
    value, low, high = perplexity_interval(rates * tokens, tokens)
    assert value == pytest.approx(np.exp((rates * tokens).sum() / tokens.sum()))
    # By the delta method: the standard error of a ratio of sums.
    error = np.sqrt(np.sum((tokens * (rates - np.log(value))) ** 2)) / tokens.sum()
    assert np.log(high / low) == pytest.approx(2 * 1.96 * error, rel=0.1)
    difference, low, high = paired_perplexity_difference(rates * tokens + 0.1 * tokens, rates * tokens, tokens)
    assert difference == pytest.approx(value * (np.exp(0.1) - 1))
    assert low < difference < high
    assert paired_perplexity_difference(rates, rates, tokens) == (0, 0, 0)
    with pytest.raises(ValueError, match="no predicted token"):
        perplexity_interval([1.0], [0])
    with pytest.raises(ValueError, match="one number for each"):
        perplexity_interval([1.0, 2.0], [3])


def test_the_folder_of_weights(tmp_path):
    collapsed("gpt2").save_pretrained(tmp_path)
    assert weights_folder(str(tmp_path)) == str(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) and AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("label", [-1, 3, -100])
def test_labels_that_are_no_classes(label):
    """-1 is what GLUE's test splits have."""
    data = labelled(2)
    data[1]["labels"][3] = label
    models = {"dense": BY_NAME["bert"].model(), "small": BY_NAME["bert"].model()}
    with pytest.raises(ValueError, match="has the classes 0 to 2.*use another split"):
        compare_models(models, data, rounds=2, progress=False)


@pytest.mark.parametrize("kind", ["one label", "multi_label_classification", "regression"])
def test_heads_without_classes(kind):
    config = BY_NAME["bert"].config()
    if kind == "one label":
        config.num_labels = 1
    else:
        config.problem_type = kind
    models = {name: BY_NAME["bert"].model(config=config) for name in ("dense", "small")}
    with pytest.raises(ValueError, match="one class for each input.*labels\\)"):
        compare_models(models, labelled(2), rounds=2, progress=False)


def test_the_perplexity_is_of_the_labels_where_there_are_any():
    model = BY_NAME["gpt2"].model()
    data = [BY_NAME["gpt2"].inputs(batch=4, seed=i) for i in range(3)]
    total = tokens = 0.0
    for batch in data:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :4] = -100
        with torch.no_grad():
            total, tokens = total + float(model(**batch).loss) * 12, tokens + 12
    found = compare_models({"dense": model, "same": model}, data, rounds=2, progress=False)
    assert found["dense"].quality == pytest.approx(np.exp(total / tokens), rel=1e-5)


def test_how_far_predictions_are_apart():
    case = BY_NAME["bert"]
    dense, model = case.model(), case.model()
    batches = [case.batch(seed=seed) for seed in range(12)]
    assert prediction_divergence(model, dense, batches[8:]) == 0
    collapse_model(model, LayerCollapseConfig(blocks=[1]), batches[:8])
    expected = divergence(model, dense, batches[8:])
    model.train()
    assert prediction_divergence(model, dense, batches[8:]) == pytest.approx(expected, rel=1e-5) and expected > 0
    assert model.training and not dense.training
    config = case.config()
    config.num_labels = 5
    with pytest.raises(ValueError, match="they cannot be compared"):
        prediction_divergence(case.model(config=config), dense, batches)
    with pytest.raises(ValueError, match="is empty"):
        prediction_divergence(model, dense, [])
