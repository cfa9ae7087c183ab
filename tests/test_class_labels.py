"""Whose numbers the classes of some data are: by name where both sides have names."""

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from hf_layercollapse import CalibrationData, compare_models
from hf_layercollapse.class_labels import ModelClasses, class_numbers

from .models import BY_NAME, VOCABULARY
from .words import word_tokenizer


WORDS = [f"w{index}" for index in range(VOCABULARY - 2)]
UNNAMED = ["LABEL_0", "LABEL_1", "LABEL_2"]
NLI = ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]


@pytest.mark.parametrize(
    ("names", "model", "numbers"),
    [
        (["Fake", "Real"], ["Real", "Fake"], {0: 1, 1: 0}),
        (["entailment", "neutral", "contradiction"], NLI, {0: 2, 1: 1, 2: 0}),
        (["neutral"], NLI, {0: 1}),  # a part of the model's
        (["a", "b", "c"], UNNAMED, {0: 0, 1: 1, 2: 2}),
        (["LABEL_2", "LABEL_0"], UNNAMED, {0: 2, 1: 0}),
        (["0", "2"], UNNAMED, {0: 0, 1: 2}),  # folders that are called by the number
        (["0", "1", "2"], NLI, {0: 0, 1: 1, 2: 2}),  # a ClassLabel without names
        (["crane", "crane2", "tick"], ["crane", "crane", "tick"], {0: 0, 1: 1, 2: 2}),  # ImageNet
        (["Cardigan", "cardigan"], ["cardigan", "Cardigan"], {0: 1, 1: 0}),
    ],
)
def test_names_of_both(names, model, numbers):
    assert class_numbers(numbers, names, ModelClasses(dict(enumerate(model))), "label") == numbers


@pytest.mark.parametrize(
    ("found", "model", "numbers"),
    [
        ([0, 2], NLI, {0: 0, 2: 2}),
        ([1, 3, 5], ["1", "3", "5"], {1: 0, 3: 1, 5: 2}),  # stars
        (["Neutral", "ENTAILMENT"], NLI, {"Neutral": 1, "ENTAILMENT": 2}),
        (["2", "LABEL_0"], UNNAMED, {"2": 2, "LABEL_0": 0}),
        ([True, False], ["true", "false"], {True: 0, False: 1}),
        ([True, False], NLI, {True: 1, False: 0}),
    ],
)
def test_columns_without_names(found, model, numbers):
    assert class_numbers(found, None, ModelClasses(dict(enumerate(model))), "label") == numbers


@pytest.mark.parametrize(
    ("found", "names", "model", "message"),
    [
        ([0, 1], ["Fake", "Real"], ["genuine", "forged"], r"\['Fake', 'Real'\].*\['genuine', 'forged'\].*Call the"),
        ([0, 1, 2], ["neg", "neutral", "pos"], ["pos", "neg"], r"\['neutral'\] is not one of these"),
        ([0, 1, 2], ["crane", "tick", "crane2"], ["crane", "crane", "tick"], r"\['crane', 'crane2'\] is not one"),
        (["x"], None, NLI, r"class indices or \['CONTRADICTION', .*got 'x'"),
        ([0, 1], None, ["1", "2"], r"must be among these names"),
        ([0], [f"a{i}" for i in range(99)], [f"b{i}" for i in range(99)], "'a11'. and 87 more"),
    ],
)
def test_classes_that_are_not_the_models(found, names, model, message):
    with pytest.raises(ValueError, match=message):
        class_numbers(found, names, ModelClasses(dict(enumerate(model))), "label")


def test_further_names_in_a_config():
    """Some configs have names in one direction, and numbers as text."""
    classes = ModelClasses({0: "no", 1: "yes"}, {"LABEL_0": "0", "LABEL_1": "1", "yes": 0, "odd": "x"})
    assert [classes.number(name) for name in ("no", "yes", "LABEL_1", "odd")] == [0, 1, 1, None]
    assert ModelClasses(None).number("no") is None and not ModelClasses(None).named


# ---- Data of a model ----


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(["[PAD]", "[UNK]", *WORDS])


def named_bert(*names):
    model = BY_NAME["bert"].model()
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    return model


def named_data(names, labels, **columns):
    texts = [
        " ".join(WORDS[(7 * row + word) % len(WORDS)] for word in range(3 + row % 5)) for row in range(len(labels))
    ]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": texts, "label": labels}, features=features)


def labels_of(data):
    return torch.cat([batch["labels"] for batch in data]).tolist()


@pytest.mark.parametrize("form", ["rows", "stream", "torch", "transformed", "tokenized"])
def test_a_data_set_says_what_its_numbers_are(form, tokenizer):
    data, model = named_data(["one", "three", "two"], [0, 1, 2, 1, 0, 2, 2, 0]), named_bert("One", "Two", "Three")
    if form == "stream":
        data = data.to_iterable_dataset()
    if form == "torch":
        data = data.with_format("torch")
    if form == "transformed":
        data = data.with_transform(lambda rows: rows)
    if form == "tokenized":
        data = data.map(lambda row: tokenizer(row["text"]), remove_columns="text")
    read = CalibrationData(data, tokenizer, model, label_column="label")
    assert labels_of(read) == [0, 2, 1, 2, 0, 1, 1, 0]
    assert str(read).endswith("classes by name: three 1 -> 2; two 2 -> 1")
    plain = CalibrationData(data, tokenizer, named_bert(*UNNAMED), label_column="label")
    assert labels_of(plain) == [0, 1, 2, 1, 0, 2, 2, 0] and "by name" not in str(plain)


def test_a_model_is_as_right_as_its_names_say(tokenizer):
    """Numbered in the order of the alphabet, the data has other numbers for each class."""
    model, names = named_bert("Real", "Fake", "Drawn"), ["Drawn", "Fake", "Real"]
    data = named_data(names, [0] * 40)
    logits = torch.cat([model(**batch).logits for batch in CalibrationData(data, tokenizer, model, columns="text")])
    predicted = [model.config.id2label[number] for number in logits.argmax(-1).tolist()]
    data = named_data(names, [names.index(name) for name in predicted])
    read = CalibrationData(data, tokenizer, model, label_column="label")
    found = compare_models({"dense": model, "same": model}, read, rounds=2, warmup=0, progress=False)
    assert found["dense"].quality == found["same"].quality == 1.0


def test_rows_without_a_label_are_left_out(tokenizer):
    """An empty cell makes the numbers beside it floats; `datasets` marks with -1 what is unknown."""
    texts = [f"w1 w{row}" for row in range(6)]
    for labels in ([1.0, None, 0.0, float("nan"), 2.0, 1.0], ["LABEL_1", None, "0", " ", "LABEL_2", "1"]):
        rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
        read = CalibrationData(rows, tokenizer, named_bert(*UNNAMED), label_column="label")
        assert labels_of(read) == [1, 0, 2, 1] and "2 without a label left out" in str(read)
    read = CalibrationData(
        named_data(["a", "b", "c"], [0, -1, 2]), tokenizer, named_bert("c", "b", "a"), label_column="label"
    )
    assert labels_of(read) == [2, 0] and "1 without a label left out" in str(read)
    with pytest.raises(ValueError, match="No row has a label.*another split"):
        CalibrationData(named_data(["a", "b"], [-1, -1]), tokenizer, named_bert(*UNNAMED), label_column="label")


def test_models_that_call_their_classes_otherwise_are_not_compared():
    one, other = named_bert("a", "b", "c"), named_bert("a", "c", "b")
    data = [{**BY_NAME["bert"].inputs(batch=4), "labels": torch.tensor([0, 1, 2, 0])}]
    with pytest.raises(ValueError, match=r"dense's classes are \['a', 'b', 'c'\], and small's \['a', 'c', 'b'\]"):
        compare_models({"dense": one, "small": other}, data, rounds=2)
    compare_models({"dense": one, "small": named_bert(*UNNAMED)}, data, rounds=2, warmup=0, progress=False)
