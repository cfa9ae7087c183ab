"""The recipe for embedding models and rerankers, on tiny ones and a few texts."""

import json
from pathlib import Path

import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from .sentences import embed, random_texts, save_encoder, sentence_transformer


RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(autouse=True)
def recipes_on_the_path(monkeypatch):
    """Recipes import each other as scripts in one folder do."""
    monkeypatch.syspath_prepend(str(RECIPES))


@pytest.fixture
def options(tmp_path):
    """For a tiny model, and a hundred and forty texts of two classes, a headline and an article each."""
    lines = iter(random_texts(280, longest=16))
    for index in range(140):
        folder = tmp_path / "texts" / ("one", "other")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.txt").write_text(f"{next(lines)}\n\n{next(lines)}\n")
    model = save_encoder(tmp_path / "model", "sentence")
    sizes = ["--fit_samples=70", "--score_samples=20", "--recovery_samples=20", "--recovery_steps=2"]
    more = ["--test_samples=24", "--max_seq_length=24", "--latency_rounds=2", "--sizes", "0.5"]
    names = [f"--texts={tmp_path / 'texts'}", f"--model_name_or_path={model}", f"--output_dir={tmp_path / 'out'}"]
    return [*names, *sizes, *more, "--recovery_sizes", "0.5"]


WANTED = [
    ("dense", None, False),
    *((method, 0.5, recovered) for method in ("plan", "torch-pruning") for recovered in (False, True)),
    *(("half of the layers", None, recovered) for recovered in (False, True)),
]


@pytest.mark.parametrize("kind", ["sentence", "cross"])
def test_every_method_is_measured_once(kind, options, tmp_path):
    from embeddings import Pairs, Sentences, main

    options = [*options, f"--kind={kind}", "--train_steps=2"]
    main(options)
    path = tmp_path / "out" / "results.json"
    found = json.loads(path.read_text())
    rows = found["results"]
    assert [(row["method"], row["size"], row["recovered"]) for row in rows] == WANTED
    columns = {"sentence": Sentences, "cross": Pairs}[kind].columns
    for row in rows:
        assert row["feed_forward_share"] <= 0.5 or row["method"] in ("dense", "half of the layers")
        for name in columns:
            low, high = row[name]["from_dense_interval"]
            assert 0 <= row[name]["value"] <= 1 and low <= row[name]["from_dense"] <= high
    assert rows[5]["feed_forward_share"] == pytest.approx(2 / 3, abs=0.01)  # of three layers two
    table = (tmp_path / "out" / "table.md").read_text()
    assert "half of the layers, recovered" in table and all(words in table for words in columns.values())
    assert (tmp_path / "out" / "curve.png").stat().st_size > 1000
    # What is there is not measured again.
    rows[1]["parameters"] = 1
    path.write_text(json.dumps(found))
    main(options)
    assert json.loads(path.read_text())["results"][1]["parameters"] == 1


def test_nearest_texts_are_measured_as_an_evaluator_does(tmp_path):
    """Each text asks for others of its class: as many corpora as queries, since it is none of its own."""
    from embeddings import NEIGHBOURS, EmbeddingArguments, Sentences

    model = sentence_transformer(save_encoder(tmp_path, "sentence"))
    rows = [(text, str(index % 2)) for index, text in enumerate(random_texts(30))]
    arguments = EmbeddingArguments(texts="", model_name_or_path=str(tmp_path), max_seq_length=24)
    values = Sentences(arguments, {"test": rows}, 0).values(model)
    for index in (0, 7, 20):
        others = {str(other): text for other, (text, _) in enumerate(rows) if other != index}
        right = {other for other in others if rows[int(other)][1] == rows[index][1]}
        evaluator = InformationRetrievalEvaluator(
            {"q": rows[index][0]}, others, {"q": right}, ndcg_at_k=[NEIGHBOURS], precision_recall_at_k=[NEIGHBOURS]
        )
        scores = evaluator(model)
        assert float(values["ndcg"][index]) == pytest.approx(scores[f"cosine_ndcg@{NEIGHBOURS}"], abs=1e-5)
        assert float(values["precision"][index]) == pytest.approx(scores[f"cosine_precision@{NEIGHBOURS}"], abs=1e-5)
    assert torch.equal(values["kept"], torch.ones(30)) and embed(model).shape == (4, 16)


def test_ranks_are_measured_as_an_evaluator_does(options, tmp_path):
    from embeddings import EmbeddingArguments, Pairs, read_texts

    rows = read_texts(tmp_path / "texts")
    arguments = EmbeddingArguments(
        texts="",
        model_name_or_path=str(tmp_path / "model"),
        max_seq_length=24,
        train_steps=1,
        output_dir=str(tmp_path),
    )
    task = Pairs(arguments, {"train": rows[:40], "test": rows[40:60]}, seed=0)
    samples = [{"query": headline, "positive": [own], "negative": others} for (headline, own), *others in task.lists]
    assert isinstance(task.dense, CrossEncoder) and all(len(sample["negative"]) == 7 for sample in samples)
    scores = CrossEncoderRerankingEvaluator(samples, at_k=8)(task.dense)
    assert float(task.values(task.dense)["mrr"].mean()) == pytest.approx(scores["mrr@8"], abs=1e-5)


def test_a_table_of_several_seeds_has_their_range():
    from embeddings import table_of

    same = {"method": "plan", "size": 0.5, "recovered": False, "feed_forward_share": 0.5, "parameters": 1e6}
    rows = [
        {**same, "seed": seed, "latency": None, "mrr": {"value": value, "from_dense": value - 0.9}}
        for seed, value in enumerate((0.7, 0.9))
    ]
    assert "80.0 (-10.0), 70.0 to 90.0 |" in table_of(rows, {"mrr": "rank"})
    assert "70.0 (-20.0) |" in table_of(rows[:1], {"mrr": "rank"})


def test_wrong_options(options, tmp_path):
    from embeddings import main

    with pytest.raises(ValueError, match="sentence or cross, got 'other'"):
        main([*options, "--kind=other"])
    with pytest.raises(ValueError, match="there is no FOLDER/CLASS/FILE.txt"):
        main([*options, f"--texts={tmp_path / 'model'}"])
    with pytest.raises(ValueError, match="There are 140 texts, of which 240 are not to be tested on"):
        main([*options, "--fit_samples=200"])
