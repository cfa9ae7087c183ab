"""Calibration data made of raw texts, pairs, conversations, images, sounds and batches."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, Value
from PIL import Image as PillowImage
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSeq2SeqLM,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    Wav2Vec2FeatureExtractor,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_layercollapse import (
    CalibrationData,
    LayerCollapseConfig,
    apply_layer_collapse,
    calibration_data,
    collapse_model,
    compare_models,
    linearity_map,
    plan_collapse,
    recover_model,
)
from hf_layercollapse.calibration_data import positions_of

from .models import BY_NAME, VOCABULARY, tiny_wav2vec2
from .words import word_tokenizer


WORDS = [f"w{index}" for index in range(VOCABULARY - 4)]
TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word, between [CLS] and [SEP]."""
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return word_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS], framed=True, model_input_names=inputs)


@pytest.fixture(scope="module")
def bert():
    return BY_NAME["bert"].model()


def words(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[index] for index in torch.randint(0, len(WORDS), (count,), generator=generator))


TEXTS = [words(3 + seed % 20, seed) for seed in range(120)]


def batches_of(tokenizer, texts):
    return [tokenizer(texts[i : i + 8], padding=True, return_tensors="pt") for i in range(0, len(texts), 8)]


def rows_of(data):
    """What is read of each row, without padding."""
    return [
        ids[mask > 0].tolist()
        for batch in data
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


# ---- Texts ----


def test_texts_are_what_the_tokenizer_makes_of_them(tokenizer, bert):
    data = CalibrationData(TEXTS, tokenizer, bert)
    for made, by_hand in zip(data, batches_of(tokenizer, TEXTS), strict=True):
        assert made.keys() == by_hand.keys()
        assert all(torch.equal(made[name], by_hand[name]) for name in made)
    assert len(data) == len(list(data)) == 15
    assert len(list(CalibrationData(iter(TEXTS), tokenizer, batch_size=50))) == 3
    tokens = sum(len(text.split()) + 2 for text in TEXTS)
    assert str(data) == f"120 rows, 120 different, {tokens:,} tokens"


def test_every_function_takes_texts_with_their_tokenizer(tokenizer, bert):
    """The same as batches made by hand."""
    case, given = BY_NAME["bert"], {"processing_class": tokenizer}
    batches = [dict(batch) for batch in batches_of(tokenizer, TEXTS)]
    assert linearity_map(bert, TEXTS, **given) == linearity_map(bert, batches)
    plans = [plan_collapse(bert, TEXTS, macs=0.5, **given), plan_collapse(bert, batches, macs=0.5)]
    timed = {"seconds": None, "metric": None}
    assert plans[0].to_dict() | timed == plans[1].to_dict() | timed
    models = case.model(), case.model()
    reports = [
        collapse_model(models[0], plan=plans[0], calibration_data=TEXTS, **given),
        collapse_model(models[1], plan=plans[0], calibration_data=batches),
    ]
    assert reports[0].to_dict() == reports[1].to_dict()
    recoveries = [
        recover_model(models[0], bert, TEXTS, max_steps=3, **given),
        recover_model(models[1], bert, batches, max_steps=3),
    ]
    # Steps are of other rows, and the same are held aside.
    assert recoveries[0].before == pytest.approx(recoveries[1].before, rel=1e-5)
    assert [each.held_aside for each in recoveries] == [30, 30] and recoveries[0].predictions == 90
    affine = LayerCollapseConfig(linear_target="affine")
    patched = [
        apply_layer_collapse(case.model(), affine, TEXTS, **given),
        apply_layer_collapse(case.model(), affine, batches),
    ]
    states = [model.state_dict() for model in patched]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    gpt2 = BY_NAME["gpt2"].model()
    result = compare_models({"a": gpt2, "b": gpt2}, TEXTS, rounds=2, warmup=0, progress=False, **given)
    assert result.metric == "perplexity" and result.examples == 120


def test_raw_texts_without_their_tokenizer(bert):
    with pytest.raises(ValueError, match="pass it as `processing_class` .none was given"):
        CalibrationData(TEXTS)
    with pytest.raises(ValueError, match="dicts of tensors.*`processing_class`"):
        collapse_model(bert, calibration_data=TEXTS)


@pytest.mark.parametrize("slow", [False, True])
def test_long_texts_are_read_to_their_end(slow, tokenizer):
    """In rows of the length that is wanted, each with the special tokens of its own."""
    if slow:
        tokenizer, text = ByT5Tokenizer(), words(30)
        found, ends = rows_of(CalibrationData([text, "w1"], tokenizer, max_length=20)), [1]
    else:
        text = words(100)
        found, ends = rows_of(CalibrationData([text, "w1"], tokenizer, max_length=20)), [3]
        assert all(row[0] == 2 for row in found)
    assert max(map(len, found)) == 20 and all(row[-1:] == ends for row in found)
    special = set(tokenizer.all_special_ids)
    plain = [token for row in found[:-1] for token in row if token not in special]
    assert plain == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_length_is_what_the_model_takes(tokenizer, bert):
    assert positions_of(bert) == 40
    data = CalibrationData([words(2000)], tokenizer, bert)
    assert data.max_length == 40 and len(rows_of(data)) == 53
    assert CalibrationData([words(20_000)], tokenizer).max_length == 512
    with pytest.raises(ValueError, match="Rows of 41 tokens .* takes 40"):
        CalibrationData(TEXTS, tokenizer, bert, max_length=41)
    # Positions that are counted from behind the padding's.
    roberta = BY_NAME["roberta"].model()
    assert positions_of(roberta) == 38
    for batch in CalibrationData([words(2000)], tokenizer, roberta):
        roberta(**batch)
    assert positions_of(BY_NAME["gpt2"].model()) == 40
    assert positions_of(BY_NAME["vit"].model()) is None
    assert positions_of(torch.nn.Linear(2, 2)) is None


def test_a_short_document_is_read_in_shorter_rows(tokenizer):
    """Where they may be: one row cannot be fitted to and scored on at once."""
    data = CalibrationData([words(1000)], tokenizer)
    assert data.max_length == 64 and len(rows_of(data)) == 17
    assert CalibrationData([words(1000)], tokenizer, max_length=512).max_length == 512
    assert CalibrationData(TEXTS[:5], tokenizer).max_length == 512


def test_samples_come_from_as_many_texts_as_there_are(tokenizer):
    texts = [words(400, seed) for seed in range(6)] + ["", None]
    data = CalibrationData(texts, tokenizer, max_length=22, samples=12)
    whole = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[:6]]
    where = [
        index for row in rows_of(data) for index, tokens in enumerate(whole) if str(row[1:-1])[1:-1] in str(tokens)
    ]
    assert len(where) == 12 and set(where) == set(range(6))
    assert rows_of(data) == rows_of(CalibrationData(texts, tokenizer, max_length=22, samples=12))
    assert rows_of(data) != rows_of(CalibrationData(texts, tokenizer, max_length=22, samples=12, seed=1))
    # One text of many and many short ones: all windows there are.
    few = CalibrationData([words(200), *TEXTS[:3]], tokenizer, max_length=22, samples=100)
    assert len(rows_of(few)) == 13 and "all there are (fewer than 100)" in str(few)


def stream_of(make, count=10**9):
    """`(a streaming data set, the indices that were read)`."""
    read = []

    def rows():
        for index in range(count):
            read.append(index)
            yield make(index)

    return IterableDataset.from_generator(rows), read


def test_of_a_stream_the_beginning_is_read(tokenizer, bert, monkeypatch):
    monkeypatch.setattr(calibration_data, "MOST_OF_A_STREAM", 500)
    stream, read = stream_of(lambda index: {"text": "" if index % 3 == 0 else words(5, index)})
    data = CalibrationData(stream, tokenizer, samples=30)
    assert len(rows_of(data)) == 30 and rows_of(data) == rows_of(CalibrationData(stream, tokenizer, samples=30))
    assert max(read) <= 60
    # One that ends is read to its end.
    few, read = stream_of(lambda index: {"text": words(5, index)}, count=50)
    assert len(rows_of(CalibrationData(few.take(40), tokenizer))) == 40 and max(read) <= 40
    with pytest.raises(ValueError, match=r"a stream .* more than 500 rows.*take\(1000\).*samples=1000"):
        linearity_map(bert, stream, processing_class=tokenizer)


@pytest.mark.parametrize("form", ["loader", "batches", "loader in CalibrationData"])
def test_a_stream_of_batches_ends_or_is_refused(form, bert, monkeypatch):
    """Before it fills the memory."""
    monkeypatch.setattr(calibration_data, "MOST_OF_A_STREAM", 500)
    stream, read = stream_of(lambda index: {"input_ids": [3 + index % 50, 4]})
    stream = stream.with_format("torch")
    data = {
        "loader": lambda data: DataLoader(data, batch_size=50),
        "batches": lambda data: data.batch(50),
        "loader in CalibrationData": lambda data: CalibrationData(DataLoader(data, batch_size=50)),
    }[form]
    for use in (
        lambda: linearity_map(bert, data(stream)),
        lambda: recover_model(bert, BY_NAME["bert"].model(), data(stream), max_steps=1),
        lambda: linearity_map(bert, data(stream.take(100)), evaluation_data=data(stream)),
    ):
        with pytest.raises(ValueError, match=r"more than 500 rows.*take\(1000\)"):
            use()
    assert max(read) < 2000
    taken = linearity_map(bert, data(stream.take(100))).data
    assert taken.distinct + taken.held_aside == 50


def test_texts_with_labels_are_examples(tokenizer, bert):
    rows = [{"text": text, "label": index % 3} for index, text in enumerate([words(90), *TEXTS[:20]])]
    data = CalibrationData(rows, tokenizer, bert, label_column="label")
    assert torch.cat([batch["labels"] for batch in data]).tolist() == [index % 3 for index in range(21)]
    assert len(rows_of(data)[0]) == 40 and str(data).endswith("1 of them cut to 40 tokens")
    numpy = [{**row, "label": np.int64(row["label"])} for row in rows]
    assert str(CalibrationData(numpy, tokenizer, bert, label_column="label")) == str(data)
    named = [{"text": row["text"], "label": f"LABEL_{row['label']}"} for row in rows]
    names = CalibrationData(named, tokenizer, bert, label_column="label")
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(data, names, strict=True))
    for wrong, message in ((3, "labels of .3."), ("x", "class indices or .'LABEL_0'"), (0.5, "got 0.5")):
        with pytest.raises(ValueError, match=message):
            CalibrationData([{"text": "w1", "label": wrong}], tokenizer, bert, label_column="label")


def test_pairs(tokenizer, bert):
    pairs = list(zip(TEXTS[:20], TEXTS[20:40], strict=True))
    by_hand = tokenizer(TEXTS[:8], TEXTS[20:28], padding=True, truncation=True, max_length=40, return_tensors="pt")
    first = next(iter(CalibrationData(pairs, tokenizer, bert)))
    assert all(torch.equal(first[name], by_hand[name]) for name in by_hand)
    assert int(first["token_type_ids"].max()) == 1
    rows = [{"a": a, "b": b, "n": 1} for a, b in pairs]
    of_columns = next(iter(CalibrationData(rows, tokenizer, bert, columns=["a", "b"])))
    assert all(torch.equal(of_columns[name], by_hand[name]) for name in by_hand)


def test_pairs_of_an_encoder_decoder_are_source_and_target(tokenizer):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(
        T5Config(
            vocab_size=VOCABULARY, d_model=16, d_ff=40, num_layers=2, num_heads=2, d_kv=8, decoder_start_token_id=0
        )
    ).eval()
    assert positions_of(model) is None
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    data = CalibrationData(pairs, tokenizer, model)
    first = next(iter(data))
    assert first.keys() == {"input_ids", "attention_mask", "labels"}
    assert first["labels"][0][first["labels"][0] != -100].tolist() == tokenizer(TEXTS[-1])["input_ids"]
    assert collapse_model(model, calibration_data=pairs, processing_class=tokenizer).collapsed
    with pytest.raises(ValueError, match="pass pairs of these"):
        CalibrationData(TEXTS, tokenizer, model)


@pytest.fixture
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)).eval()


def test_conversations_go_through_the_chat_template(tokenizer, llama):
    conversations = [
        [{"role": "w1", "content": words(5, seed)}, {"role": "w2", "content": words(4, seed + 50)}]
        for seed in range(40)
    ]
    with pytest.raises(ValueError, match="no chat template"):
        CalibrationData(conversations, tokenizer, llama)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=TEMPLATE)
    data = CalibrationData(conversations, tokenizer, llama)
    assert rows_of(data)[0] == tokenizer(f"w1 {words(5)} w2 {words(4, 50)}", add_special_tokens=False)["input_ids"]
    of_rows = CalibrationData([{"messages": chat, "n": 1.5} for chat in conversations], tokenizer, llama)
    assert rows_of(of_rows) == rows_of(data) and str(of_rows).startswith("column messages, 40 rows")
    # What Llama does not take (token_type_ids) is left out, and so is the need for a padding token.
    assert next(iter(data)).keys() == {"input_ids", "attention_mask"}
    assert linearity_map(llama, data).blocks


def test_language_models_are_padded_on_the_right(tokenizer, llama):
    """Positions that nobody says count from the left, whatever side generation pads."""
    left = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", padding_side="left"
    )
    first = next(iter(CalibrationData(TEXTS, left, llama)))
    assert first["attention_mask"][:, 0].all() and not first["attention_mask"][:, -1].all()
    assert not next(iter(CalibrationData(TEXTS, left)))["attention_mask"][:, 0].all()


# ---- Rows, batches, data sets ----


def test_batches_stay_as_they_are(bert):
    batches = [BY_NAME["bert"].inputs(seed=seed) for seed in range(4)]
    assert all(made is given for made, given in zip(CalibrationData(batches), batches, strict=True))
    assert linearity_map(bert, CalibrationData(batches)) == linearity_map(bert, batches)


@pytest.mark.parametrize("torch_format", [False, True])
def test_rows_that_are_tokenized(torch_format, tokenizer):
    data = Dataset.from_dict({"text": TEXTS, "label": [0] * 120}).map(lambda row: tokenizer(row["text"]))
    if torch_format:
        data.set_format("torch", columns=["input_ids", "attention_mask", "label"])
    made = CalibrationData(data, tokenizer)
    assert rows_of(made) == rows_of(CalibrationData(TEXTS, tokenizer))
    assert next(iter(made))["labels"].tolist() == [0] * 8
    assert rows_of(CalibrationData([{"input_ids": [5, 6]}, {"input_ids": [7]}])) == [[5, 6], [7]]


def test_what_is_refused(tokenizer, bert):
    for data, message in [
        ([], "is empty"),
        (["", None, " "], "all 3 rows are empty"),
        ("a text", "must be a list"),
        ([1.5], "a float"),
        ([["a", "b", "c"]], "a list of str"),
        ([{"n": 1}], "no column with any text"),
        ([{"a": "w1", "b": "w2"}], "several columns of text, .'a', 'b'."),
        (["w1", ("w2", "w3")], None),
        (["w1", 3], "Row 1 .* a int where others hold text"),
    ]:
        if message is None:
            assert len(rows_of(CalibrationData(data, tokenizer))) == 2
            continue
        with pytest.raises(ValueError, match=message):
            CalibrationData(data, tokenizer, bert)
    with pytest.raises(ValueError, match="no column 'x'"):
        CalibrationData([{"a": "w1"}], tokenizer, columns="x")
    with pytest.raises(ValueError, match="are of data that has some"):
        CalibrationData(TEXTS, tokenizer, columns="x")
    with pytest.raises(ValueError, match="`batch_size` must be"):
        CalibrationData(TEXTS, tokenizer, batch_size=0)
    with pytest.raises(TypeError, match="must be a tokenizer"):
        CalibrationData(TEXTS, "bert-base-uncased")


# ---- Images and sounds ----


def encoded_image(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def test_images(monkeypatch):
    """Only those that are used are decoded."""
    rows = {"image": [encoded_image(seed) for seed in range(60)] + [None], "label": list(range(60)) + [0]}
    data = Dataset.from_dict(rows, Features({"image": Image(), "label": Value("int64")}))
    processor, vit = ViTImageProcessorPil(size={"height": 8, "width": 8}), BY_NAME["vit"].model()
    decoded = []
    decode = Image.decode_example
    monkeypatch.setattr(Image, "decode_example", lambda *args, **kwargs: decoded.append(1) or decode(*args, **kwargs))
    made = CalibrationData(data, processor, vit, samples=16)
    assert sum(len(batch["pixel_values"]) for batch in made) == 16 and len(decoded) < 25
    pictures = [row["image"] for row in data.select(range(60))]
    plain, of_rows = CalibrationData(pictures, processor, vit), CalibrationData(data, processor, vit)
    assert str(of_rows) == "column image, 60 rows"
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(plain, of_rows, strict=True))
    arrays = CalibrationData([np.asarray(picture) for picture in pictures], processor)
    assert torch.equal(next(iter(arrays))["pixel_values"], next(iter(plain))["pixel_values"])
    assert linearity_map(vit, pictures, processing_class=processor).blocks
    with pytest.raises(ValueError, match="an image processor makes model inputs of"):
        CalibrationData(pictures)


def test_gray_images():
    """For a model of one channel."""
    config = BY_NAME["vit"].config()
    config.num_channels = 1
    model = BY_NAME["vit"].model(config=config)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    pictures = [PillowImage.open(io.BytesIO(encoded_image(seed)["bytes"])) for seed in range(9)]
    (first, *_) = CalibrationData(pictures, processor, model)
    assert first["pixel_values"].shape == (8, 1, 8, 8)
    model(**first)


def test_sounds():
    model, extractor = tiny_wav2vec2(), Wav2Vec2FeatureExtractor()
    sounds = [np.random.default_rng(seed).normal(size=800).astype(np.float32) for seed in range(16)]
    first = next(iter(CalibrationData(sounds, extractor, model, batch_size=4)))
    by_hand = extractor(sounds[:4], sampling_rate=16_000, return_tensors="pt")
    assert torch.equal(first["input_values"], by_hand["input_values"])
    dicts = [{"array": sound, "sampling_rate": 16_000} for sound in sounds]
    assert torch.equal(
        next(iter(CalibrationData(dicts, extractor, model, batch_size=4)))["input_values"], first["input_values"]
    )
    assert linearity_map(model, sounds, processing_class=extractor).blocks
    with pytest.raises(ValueError, match="8000"):
        list(CalibrationData([{"array": sounds[0], "sampling_rate": 8000}], extractor))
    with pytest.raises(ValueError, match="a tokenizer makes model inputs of|`processing_class` .got"):
        CalibrationData(TEXTS, extractor)


def test_values_to_predict(tokenizer):
    """A head with one output is given numbers, whole ones too."""
    config = BY_NAME["bert"].config()
    config.num_labels = 1
    model = BY_NAME["bert"].model(config=config)
    rows = [{"text": text, "score": value} for text, value in zip(TEXTS, [1, 0.5] * 60, strict=True)]
    first = next(iter(CalibrationData(rows, tokenizer, model, label_column="score")))
    assert first["labels"].tolist() == [1.0, 0.5] * 4
    assert model(**first).loss.isfinite()
