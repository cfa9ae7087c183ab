"""Models side by side: what is counted, and what the numbers say."""

import json
import weakref

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

from hf_layercollapse import LayerCollapseConfig, collapse_model, comparison, prediction_divergence
from hf_layercollapse.comparison import Comparison, compare_models, weights_folder
from hf_layercollapse.metrics import (
    accuracy_interval,
    mean_interval,
    paired_difference,
    paired_perplexity_difference,
    perplexity_interval,
)
from hf_layercollapse.profiling import macs_per_token, weights_size

from .models import BY_NAME, divergence, image_inputs, randomize, text_inputs, tiny_wav2vec2


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


@pytest.mark.parametrize("metric", ["accuracy", "divergence"])
def test_data_are_read_once_and_of_them_one_batch_is_kept(metric):
    """10,000 images are 6 GB. The first model runs once on a batch, however many are compared with it."""
    models = {name: BY_NAME["bert"].model(seed) for seed, name in enumerate(("dense", "control", "small"))}
    calls, alive, most = {name: 0 for name in models}, weakref.WeakSet(), []

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    handles = [model.register_forward_hook(count(name)) for name, model in models.items()]

    def batch_of(seed):
        labels = {"labels": torch.arange(8) % 3} if metric == "accuracy" else {}
        return {**BY_NAME["bert"].inputs(batch=8, seed=seed), **labels}

    def read():
        for seed in range(8):
            batch = batch_of(seed)
            alive.add(batch["input_ids"])
            yield batch
            del batch
            most.append(len(alive))

    found, scores, largest = comparison._scored(models, read())
    assert found == metric and calls == dict.fromkeys(models, 8) and len(scores["small"].arrays[0]) == 64
    assert max(most) <= 2 and torch.equal(largest["input_ids"], batch_of(0)["input_ids"])
    for handle in handles:
        handle.remove()
    # The same of what can be read once only as of a list.
    data = [batch_of(seed) for seed in range(8)]
    once, again = (compare_models(models, given, rounds=2, progress=False) for given in (iter(data), data))
    assert [(m.quality, m.interval, m.differences) for m in once.models] == [
        (m.quality, m.interval, m.differences) for m in again.models
    ]


def test_labels_of_some_batches_only():
    data = labelled(3)
    del data[2]["labels"]
    with pytest.raises(ValueError, match="pass labels with all of them"):
        compare_models({"dense": BY_NAME["bert"].model(), "other": BY_NAME["bert"].model()}, data, progress=False)


class OnlyALoss(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1)

    def forward(self, input):
        return {"loss": super().forward(input).sum()}


def test_what_is_refused():
    model = BY_NAME["bert"].model()
    with pytest.raises(ValueError, match="at least two"):
        compare_models({"dense": model}, labelled())
    with pytest.raises(ValueError, match="empty"):
        compare_models({"dense": model, "other": model}, [])
    with pytest.raises(ValueError, match="nothing is known to be a prediction"):
        compare_models({"dense": OnlyALoss(), "other": OnlyALoss()}, [{"input": torch.ones(2, 1)}])


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


def test_intervals_of_means_over_several_predictions():
    """Predictions of one input are no independent examples: all of them come and go with it."""
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 50, size=300)
    values = [rng.normal(rng.gamma(2.0), 0.1, size=count) for count in counts]
    sums = np.array([value.sum() for value in values])
    mean, low, high = mean_interval(sums, counts)
    assert mean == pytest.approx(np.concatenate(values).mean())
    error = np.sqrt(np.sum((sums - mean * counts) ** 2)) / counts.sum()
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert mean_interval(sums, counts, baseline=sums) == (0, 0, 0)


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


def sounds(seed=0, batch=8):
    return {"input_values": torch.randn(batch, 800, generator=torch.Generator().manual_seed(seed))}


def test_sounds():
    """What is timed, and what MACs are counted by, is what the model reads."""
    data = [{**sounds(seed), "labels": torch.arange(8) % 3} for seed in range(3)]
    models = {"dense": tiny_wav2vec2(num_labels=3), "other": tiny_wav2vec2(1, num_labels=3)}
    found = compare_models(models, data, rounds=2, warmup=0, progress=False)
    assert (found.metric, found.examples, found.unit) == ("accuracy", 24, "sound")
    assert found["dense"].macs == macs_per_token(tiny_wav2vec2(num_labels=3), sounds(), tokens=8)
    assert "a batch of 8x800 samples" in str(found) and "MACs per sound" in str(found)


def headed(kind, seed=0):
    """A BERT whose head gives no classes."""
    config = BY_NAME["bert"].config()
    torch.manual_seed(seed)
    if kind == "masked":
        return randomize(AutoModelForMaskedLM.from_config(config), seed).eval()
    if kind == "encoder":
        return randomize(BertModel(config), seed).eval()
    config.num_labels, config.problem_type = 1 if kind == "one label" else 3, kind if "_" in kind else None
    return BY_NAME["bert"].model(seed, config=config)


HEADS = {
    "masked": "nats",
    "encoder": "cosine distance",
    "one label": "squared error / 2",
    "multi_label_classification": "nats",
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_without_classes(kind):
    """Predictions are compared with the first model's; each input counts once for the interval."""
    dense, other = headed(kind), headed(kind, seed=3)
    data = [text_inputs(batch=4, seed=seed) for seed in range(5)]
    for index, batch in enumerate(data):
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][index % 4, 3:] = 0
    found = compare_models({"dense": dense, "same": headed(kind), "other": other}, data, rounds=2, progress=False)
    assert (found.metric, found.examples, found.measured_in) == ("divergence", 20, HEADS[kind])
    assert found["other"].quality == pytest.approx(prediction_divergence(other, dense, data))
    assert found["dense"].quality == found["same"].quality == pytest.approx(0, abs=1e-6)
    low, high = found["other"].interval
    assert 0 < low < found["other"].quality < high
    difference = found["other"].differences["dense"]
    assert difference == pytest.approx((found["other"].quality, low, high), abs=1e-6)
    assert "-0.00000" not in str(found)  # a cosine distance of two of the same may be a little below 0
    assert f"divergence, {HEADS[kind]}" in str(found) and "from those of dense" in str(found)
    # And back from a file of before there was a unit.
    values = found.to_dict()
    del values["measured_in"]
    assert Comparison.from_dict(values).rows()[1][0] == "divergence"


def test_labels_of_no_classes_are_passed_over():
    """Those of a regression, and of masked tokens: predictions are compared all the same."""
    for kind, labels in (("one label", torch.rand(8)), ("masked", torch.full((8, 7), -100))):
        data = [text_inputs(batch=8, seed=seed) for seed in range(2)]
        models = {"dense": headed(kind), "other": headed(kind, seed=3)}
        without = compare_models(models, data, rounds=2, progress=False)
        found = compare_models(models, [{**batch, "labels": labels} for batch in data], rounds=2, progress=False)
        assert found.metric == "divergence" and found["other"].quality == without["other"].quality


def test_classifiers_without_labels():
    models = {"dense": BY_NAME["bert"].model(), "small": collapsed("bert")}
    data = [BY_NAME["bert"].inputs(batch=8, seed=seed) for seed in range(3)]
    found = compare_models(models, data, rounds=2, progress=False)
    assert (found.metric, found.measured_in, found.examples) == ("divergence", "nats", 24)


def t5(seed=0):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return randomize(T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)), seed).eval()


def captioner(seed=0):
    """Two models in one: it reads what its encoder does."""
    encoder, decoder = BY_NAME["vit"].config(), BY_NAME["gpt2"].config()
    decoder.is_decoder = decoder.add_cross_attention = True
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return randomize(VisionEncoderDecoderModel(config), seed).eval()


@pytest.mark.parametrize(
    ("make", "inputs", "unit", "call"),
    [(t5, text_inputs, "token", "4x7 tokens"), (captioner, image_inputs, "image", "4x3x8x8 pixels")],
)
def test_encoders_with_decoders(make, inputs, unit, call):
    """Decoder inputs are made from the labels, so that these are timed too."""
    data = [{**inputs(batch=4, seed=seed), "labels": text_inputs(4, 5, seed + 9)["input_ids"]} for seed in range(3)]
    data[0]["labels"][0, 2:] = -100
    models = {"dense": make(), "other": make(1)}
    found = compare_models(models, data, rounds=2, warmup=0, progress=False)
    assert (found.metric, found.examples, found.unit) == ("divergence", 12, unit) and call in found.call
    assert found["other"].quality == pytest.approx(prediction_divergence(models["other"], models["dense"], data))


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
    # As the test splits of GLUE have them: none.
    unlabelled = [{**batch, "labels": torch.full((2,), -1)} for batch in batches[8:]]
    assert prediction_divergence(model, dense, unlabelled) == pytest.approx(expected, rel=1e-5)
    config = case.config()
    config.num_labels = 5
    with pytest.raises(ValueError, match="they cannot be compared"):
        prediction_divergence(case.model(config=config), dense, batches)
    with pytest.raises(ValueError, match="is empty"):
        prediction_divergence(model, dense, [])
