"""sentence-transformers' models: what is inside is patched, trained, saved and loaded with the whole."""

import json

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
)
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Router, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hf_layercollapse import (
    LayerCollapseCallback,
    LayerCollapseConfig,
    LayerCollapseTrainerMixin,
    apply_layer_collapse,
    collapse_model,
    remove_layer_collapse,
)
from tests.models import BY_NAME, LAYERS, randomize, text_inputs
from tests.training import alphas_of, assert_same, set_alphas, state_of


WORDS = "a cat dog sits barks on the mat outside rain stock market fell tomorrow".split()
TEXTS = ["a cat sits on the mat", "the dog barks outside", "the stock market fell", "rain tomorrow"]
PAIRS = list(zip(TEXTS, TEXTS[::-1], strict=True))


class LayerCollapseSentenceTransformerTrainer(LayerCollapseTrainerMixin, SentenceTransformerTrainer):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes a folder with a tiny BERT of an Auto class, and a tokenizer."""

    def make(auto_class):
        path = tmp_path_factory.mktemp("bert")
        config = BY_NAME["bert"].config()
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        config.num_labels = 1
        torch.manual_seed(0)
        randomize(auto_class.from_config(config)).save_pretrained(path)
        vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        special = {f"{name}_token": token for name, token in names.items()}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special).save_pretrained(path)
        return str(path)

    return make


@pytest.fixture(scope="module")
def bert(folder):
    return folder(AutoModel)


def sentence_transformer(bert):
    transformer = Transformer(bert)
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")


def embed(model):
    return model.encode(TEXTS, convert_to_tensor=True)


def patch(model):
    apply_layer_collapse(model, LayerCollapseConfig(blocks="last:2"))
    set_alphas(model, 0.25, 0.75)


def collapse(model):
    patch(model)
    set_alphas(model, 1.0, 0.75)
    assert len(collapse_model(model).collapsed) == 1


# ---- Saved and loaded ----


@pytest.mark.parametrize("change", [patch, collapse])
@pytest.mark.parametrize("kind", ["sentence", "cross", "sparse"])
def test_saved_with_the_whole(kind, change, folder, bert, tmp_path):
    if kind == "sentence":
        model, outputs = sentence_transformer(bert), embed
    elif kind == "cross":
        model = CrossEncoder(folder(AutoModelForSequenceClassification), device="cpu")
        outputs = lambda model: torch.tensor(model.predict(PAIRS))  # noqa: E731
    else:
        model = SparseEncoder(folder(AutoModelForMaskedLM), device="cpu")
        outputs = lambda model: embed(model).to_dense()  # noqa: E731
    before = outputs(model)
    change(model)
    expected = outputs(model)
    assert not torch.equal(expected, before)
    model.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "layercollapse"
    loaded = type(model)(str(tmp_path), device="cpu")
    assert torch.equal(outputs(loaded), expected)
    assert_same(state_of(loaded), state_of(model))
    # And goes on from there.
    remove_layer_collapse(loaded)
    assert not alphas_of(loaded)


def test_two_models_behind_a_router(bert, tmp_path):
    """In folders of their own."""
    parts = {"query": [Transformer(bert)], "document": [Transformer(bert)]}
    model = SentenceTransformer(modules=[Router(**{"sub_modules": parts, "default_route": "query"})], device="cpu")
    apply_layer_collapse(model, LayerCollapseConfig(blocks=r".*document.*"))
    set_alphas(model, *[1.0] * LAYERS)
    collapse_model(model)
    model.save_pretrained(str(tmp_path))
    types = [json.loads(file.read_text())["model_type"] for file in sorted(tmp_path.glob("*/config.json"))]
    assert sorted(types) == ["bert", "layercollapse"]
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert_same(state_of(loaded), state_of(model))


def test_least_squares_on_the_model_inside(bert, tmp_path):
    model = sentence_transformer(bert)
    config = LayerCollapseConfig(rank=3, keep_neurons=2)
    collapse_model(model[0].auto_model, config, calibration_data=[text_inputs(batch=40)])
    model.save_pretrained(str(tmp_path))
    assert torch.equal(embed(SentenceTransformer(str(tmp_path), device="cpu")), embed(model))


# ---- Training ----


def trainer_of(model, folder, config=None, **options):
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "seed": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    evaluates = "eval_strategy" in options
    return LayerCollapseSentenceTransformerTrainer(
        model,
        args=SentenceTransformerTrainingArguments(str(folder), **options),
        train_dataset=Dataset.from_dict({"anchor": TEXTS * 4, "positive": TEXTS[::-1] * 4}),
        evaluator=EmbeddingSimilarityEvaluator(TEXTS, TEXTS[::-1], [0.1, 0.5, 0.5, 0.2]) if evaluates else None,
        loss=MultipleNegativesRankingLoss(model),
        layer_collapse_config=config or LayerCollapseConfig(blocks="last:2", alpha_learning_rate=0.05),
    )


def test_resumed_equals_uninterrupted(bert, tmp_path):
    whole = trainer_of(sentence_transformer(bert), tmp_path)
    whole.train()
    loaded = SentenceTransformer(str(tmp_path / "checkpoint-4"), device="cpu")
    assert_same(state_of(loaded), state_of(whole.model))
    resumed = trainer_of(sentence_transformer(bert), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(state_of(resumed.model), state_of(whole.model))
    set_alphas(whole.model, 1.0, 1.0)
    assert len(whole.collapse().collapsed) == 2
    whole.save_model(str(tmp_path / "collapsed"))
    assert torch.equal(embed(SentenceTransformer(str(tmp_path / "collapsed"), device="cpu")), embed(whole.model))


def best_of(model, folder, monkeypatch, **kwargs):
    """A trainer whose best checkpoint is the first."""
    trainer = trainer_of(
        model,
        folder,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_spearman_cosine",
        **kwargs,
    )
    scores = [0.9, 0.9, 0.1, 0.1]  # two passes each
    monkeypatch.setattr(
        EmbeddingSimilarityEvaluator, "__call__", lambda self, *args, **kwargs: {"eval_spearman_cosine": scores.pop(0)}
    )
    return trainer


def test_the_best_checkpoint_comes_back(bert, tmp_path, monkeypatch):
    trainer = best_of(sentence_transformer(bert), tmp_path, monkeypatch)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = SentenceTransformer(trainer.state.best_model_checkpoint, device="cpu")
    assert_same(state_of(trainer.model), state_of(best))


def test_a_best_checkpoint_that_does_not_load_is_an_error(bert, tmp_path, monkeypatch):
    """sentence-transformers' own trainer logs it, and goes on with the last model."""
    trainer = best_of(sentence_transformer(bert), tmp_path, monkeypatch)
    load_best = trainer._load_best_model

    def damaged():
        (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"")
        load_best()

    monkeypatch.setattr(trainer, "_load_best_model", damaged)
    with pytest.raises(Exception, match="(?i)header|safetensors"):
        trainer.train()


def test_a_progressive_run_resumes_equal(bert, tmp_path):
    config = LayerCollapseConfig(blocks="last:2", alpha_learning_rate=0.45, progressive=True)
    options = {"eval_strategy": "steps", "eval_steps": 2}
    whole = trainer_of(sentence_transformer(bert), tmp_path, config, **options)
    whole.train()
    assert len(alphas_of(whole.model)) == 1  # the other block is collapsed, before the first checkpoint
    resumed = trainer_of(sentence_transformer(bert), tmp_path, config, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(state_of(resumed.model), state_of(whole.model))
    whole.model.save_pretrained(str(tmp_path / "saved"))
    assert_same(state_of(SentenceTransformer(str(tmp_path / "saved"), device="cpu")), state_of(whole.model))


def test_a_checkpoint_of_another_life_is_refused(bert, tmp_path):
    trainer_of(sentence_transformer(bert), tmp_path).train()
    config = LayerCollapseConfig(blocks="last:1")
    other = trainer_of(sentence_transformer(bert), tmp_path, config)
    before = state_of(other.model)
    with pytest.raises(ValueError, match=r"that is patched \(2 alphas\), and the model here is patched \(1 alphas\)"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(state_of(other.model), before)


# ---- SetFit ----


def test_setfit_on_a_patched_and_a_collapsed_body(bert, tmp_path):
    """Its trainer hands callbacks a SetFitModel, which is no module."""
    import setfit
    from sklearn.linear_model import LogisticRegression

    model = setfit.SetFitModel(model_body=sentence_transformer(bert), model_head=LogisticRegression())
    with pytest.raises(TypeError, match="got SetFitModel. If it holds one, .*`model_body`"):
        apply_layer_collapse(model)
    apply_layer_collapse(model.model_body)
    data = Dataset.from_dict({"text": TEXTS, "label": [0, 0, 1, 1]})
    options = {"max_steps": 1, "batch_size": 2, "report_to": "none", "show_progress_bar": False}
    args = setfit.TrainingArguments(output_dir=str(tmp_path / "run"), **options)
    with pytest.raises(TypeError, match="got SetFitModel"):
        setfit.Trainer(
            model=model, args=args, train_dataset=data, callbacks=[LayerCollapseCallback(LayerCollapseConfig())]
        )
    setfit.Trainer(model=model, args=args, train_dataset=data).train()
    for life in ("patched", "collapsed"):
        if life == "collapsed":
            set_alphas(model.model_body, *[1.0] * LAYERS)
            assert len(collapse_model(model.model_body).collapsed) == LAYERS
        model.save_pretrained(str(tmp_path / life))
        loaded = setfit.SetFitModel.from_pretrained(str(tmp_path / life))
        assert torch.equal(loaded.predict_proba(TEXTS), model.predict_proba(TEXTS))
