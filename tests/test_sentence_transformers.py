"""sentence-transformers' models: what is inside is patched, trained, saved and loaded with the whole."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    CosineSimilarityLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Router, Transformer
from sentence_transformers.sparse_encoder.losses import SparseCosineSimilarityLoss, SpladeLoss
from torch.nn import functional as F
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoModel

from hf_layercollapse import (
    LayerCollapseCallback,
    LayerCollapseConfig,
    LayerCollapseTrainerMixin,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    remove_layer_collapse,
)
from tests.models import LAYERS, text_inputs
from tests.sentences import PAIRS, TEXTS, WORDS, embed, model_of, predictions_of, save_encoder, sentence_transformer
from tests.training import Gradients, alphas_of, assert_same, set_alphas, state_of


class LayerCollapseSentenceTransformerTrainer(LayerCollapseTrainerMixin, SentenceTransformerTrainer):
    pass


class LayerCollapseCrossEncoderTrainer(LayerCollapseTrainerMixin, CrossEncoderTrainer):
    pass


class LayerCollapseSparseEncoderTrainer(LayerCollapseTrainerMixin, SparseEncoderTrainer):
    pass


def splade_loss(model):
    """Without the regularizer, which is no mean over rows."""
    return SpladeLoss(model, SparseCosineSimilarityLoss(model), document_regularizer_weight=0.0)


# kind -> trainer, its arguments, a loss that is a mean over rows.
KINDS = {
    "sentence": (LayerCollapseSentenceTransformerTrainer, SentenceTransformerTrainingArguments, CosineSimilarityLoss),
    "cross": (LayerCollapseCrossEncoderTrainer, CrossEncoderTrainingArguments, BinaryCrossEntropyLoss),
    "sparse": (LayerCollapseSparseEncoderTrainer, SparseEncoderTrainingArguments, splade_loss),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save_encoder(tmp_path_factory.mktemp("bert"), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def bert(folders):
    return folders["sentence"]


def patch(model):
    apply_layer_collapse(model, LayerCollapseConfig(blocks="last:2"))
    set_alphas(model, 0.25, 0.75)


def collapse(model):
    patch(model)
    set_alphas(model, 1.0, 0.75)
    assert len(collapse_model(model).collapsed) == 1


# ---- Saved and loaded ----


@pytest.mark.parametrize("change", [patch, collapse])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_with_the_whole(kind, change, folders, tmp_path):
    model = model_of(kind, folders)
    before = predictions_of(model)
    change(model)
    expected = predictions_of(model)
    assert not torch.equal(expected, before)
    model.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "layercollapse"
    loaded = type(model)(str(tmp_path), device="cpu")
    assert torch.equal(predictions_of(loaded), expected)
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


def trainer_of(model, folder, config=None, loss=None, callbacks=None, teacher=None, texts=TEXTS * 4, **options):
    kind = {SentenceTransformer: "sentence", CrossEncoder: "cross", SparseEncoder: "sparse"}[type(model)]
    trainer_class, args_class, own_loss = KINDS[kind]
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
    labels = [0.1, 0.9, 0.8, 0.2] * (len(texts) // 4)
    data = Dataset.from_dict({"one": texts, "other": texts[::-1], "label": labels})
    return trainer_class(
        model,
        args=args_class(str(folder), **options),
        train_dataset=data,
        eval_dataset=data.select(range(4)) if "eval_strategy" in options else None,
        loss=(loss or own_loss)(model),
        layer_collapse_config=config or LayerCollapseConfig(blocks="last:2", alpha_learning_rate=0.05),
        callbacks=callbacks,
        teacher=teacher,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(kind, folders, tmp_path):
    whole = trainer_of(model_of(kind, folders), tmp_path)
    inside = [block.name for block in find_feed_forward_blocks(whole.model.transformers_model)]
    assert whole.model.transformers_model.config.layer_collapse["options"]["blocks"] == inside[1:]
    whole.train()
    loaded = type(whole.model)(str(tmp_path / "checkpoint-4"), device="cpu")
    assert_same(state_of(loaded), state_of(whole.model))
    resumed = trainer_of(model_of(kind, folders), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(state_of(resumed.model), state_of(whole.model))
    set_alphas(whole.model, 1.0, 1.0)
    assert whole.collapse().collapsed == inside[1:]
    whole.save_model(str(tmp_path / "collapsed"))
    loaded = type(whole.model)(str(tmp_path / "collapsed"), device="cpu")
    assert torch.equal(predictions_of(loaded), predictions_of(whole.model))


class Scripted:
    """An evaluator that gives these scores: two passes each, the collapsed model's and the model's own."""

    def __init__(self, *scores):
        self.scores = [score for score in scores for _ in range(2)]

    def __call__(self, model, *args, **kwargs):
        return {"eval_score": self.scores.pop(0)}


def best_of(model, folder, **kwargs):
    """A trainer whose best checkpoint is the first."""
    trainer = trainer_of(
        model,
        folder,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_score",
        **kwargs,
    )
    trainer.evaluator = Scripted(0.9, 0.1)
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_checkpoint_comes_back(kind, folders, tmp_path):
    trainer = best_of(model_of(kind, folders), tmp_path)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = type(trainer.model)(trainer.state.best_model_checkpoint, device="cpu")
    assert_same(state_of(trainer.model), state_of(best))
    with pytest.raises(AssertionError):
        assert_same(state_of(trainer.model), state_of(type(best)(str(tmp_path / "checkpoint-4"), device="cpu")))


def test_a_best_checkpoint_that_does_not_load_is_an_error(bert, tmp_path, monkeypatch):
    """sentence-transformers' own trainer logs it, and goes on with the last model."""
    trainer = best_of(sentence_transformer(bert), tmp_path)
    load_best = trainer._load_best_model

    def damaged():
        (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"")
        load_best()

    monkeypatch.setattr(trainer, "_load_best_model", damaged)
    with pytest.raises(Exception, match="(?i)header|safetensors"):
        trainer.train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_progressive_run_resumes_equal(kind, folders, tmp_path):
    # By the names that blocks have in the transformers model inside.
    config = LayerCollapseConfig(blocks=r"(bert\.)?encoder\.layer\.[12]", alpha_learning_rate=0.45, progressive=True)
    options = {"eval_strategy": "steps", "eval_steps": 2}
    whole = trainer_of(model_of(kind, folders), tmp_path, config, **options)
    whole.train()
    assert len(alphas_of(whole.model)) < 2  # collapsed before a checkpoint
    logged = [log["layer_collapse/collapsed_blocks"] for log in whole.state.log_history if "eval_loss" in log]
    assert logged[0] == 0 and "eval_collapsed_loss" in whole.state.log_history[0]
    resumed = trainer_of(model_of(kind, folders), tmp_path, config, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(state_of(resumed.model), state_of(whole.model))
    whole.model.save_pretrained(str(tmp_path / "saved"))
    assert_same(state_of(type(whole.model)(str(tmp_path / "saved"), device="cpu")), state_of(whole.model))


def test_a_checkpoint_of_another_life_is_refused(bert, tmp_path):
    trainer_of(sentence_transformer(bert), tmp_path).train()
    config = LayerCollapseConfig(blocks="last:1")
    other = trainer_of(sentence_transformer(bert), tmp_path, config)
    before = state_of(other.model)
    with pytest.raises(ValueError, match=r"that is patched \(2 alphas\), and the model here is patched \(1 alphas\)"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(state_of(other.model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_to_a_budget_without_labels(kind, folders, tmp_path):
    """A plan and a teacher read what the loss would be given; a run that is resumed plans nothing."""
    config = LayerCollapseConfig(budget="macs=0.5", task_loss_weight=0)
    texts = [" ".join(WORDS[(i * j + i // 5) % len(WORDS)] for j in range(1, 9)) for i in range(48)]
    whole = trainer_of(model_of(kind, folders), tmp_path, config, texts=texts, logging_steps=1)
    whole.train()
    assert 30 < whole.collapse().data.distinct <= 48
    log = whole.state.log_history[0]
    assert log["loss"] == pytest.approx(log["layer_collapse/distillation_loss"], rel=1e-3, abs=1e-6)
    loaded = type(whole.model)(str(tmp_path / "checkpoint-4"), device="cpu")
    assert_same(state_of(loaded), state_of(whole.model))
    resumed = trainer_of(model_of(kind, folders), tmp_path, config, texts=texts)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.collapse_plan is None and resumed.collapse().collapsed == whole.collapse().collapsed
    assert_same(state_of(resumed.model), state_of(whole.model))
    other = LayerCollapseConfig(budget="macs=0.6", task_loss_weight=0)
    with pytest.raises(ValueError, match="is of a run with budget='macs=0.5'"):
        trainer_of(model_of(kind, folders), tmp_path, other, texts=texts).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


# ---- A teacher ----


def in_order(dataset, batch_size, drop_last, **kwargs):
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def expected_terms(student, teacher):
    """Of one call, a number for each row: cosine distance and squared error of embeddings, squared error of scores."""
    if "scores" in student:
        return (student["scores"] - teacher["scores"]).square().flatten()
    mine, theirs = student["sentence_embedding"], teacher["sentence_embedding"]
    relative = (mine - theirs).square().sum(-1) / theirs.square().sum(-1)
    return 1 - F.cosine_similarity(mine, theirs) + relative


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_hears_what_the_model_is_given(kind, folders, tmp_path):
    """The gradients are those of the loss and of the terms, over all calls, however the batch is split."""
    config = LayerCollapseConfig(blocks="last:2", distillation_weight=0.5, penalty_strength=0.0)
    teacher = model_of(kind, folders)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.8)
    steps = []
    for accumulate in (1, 2):
        seen, options = Gradients(), {"max_steps": 1, "logging_steps": 1, "max_grad_norm": 0.0}
        options |= {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 4 // accumulate}
        options |= {"batch_sampler": in_order, "save_strategy": "no"}
        trainer = trainer_of(model_of(kind, folders), tmp_path, config, callbacks=[seen], teacher=teacher, **options)
        student = copy.deepcopy(trainer.model)
        trainer.train()
        steps.append(seen.steps[0])
    assert trainer.state.log_history[0]["layer_collapse/distillation_loss"] > 1e-3

    batches = [PAIRS] if kind == "cross" else [TEXTS, TEXTS[::-1]]
    student.train()
    terms = []
    for batch in batches:
        with torch.no_grad():
            taught = teacher(student.preprocess(batch))
        terms.append(expected_terms(student(student.preprocess(batch)), taught))
    labels = torch.tensor([0.1, 0.9, 0.8, 0.2])
    features = [TEXTS, TEXTS[::-1]] if kind == "cross" else [student.preprocess(batch) for batch in batches]
    loss = KINDS[kind][2](student)(features, labels)
    loss = sum(loss.values()) if isinstance(loss, dict) else loss
    (loss + 0.5 * torch.cat(terms).mean()).backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 1e-6:
            for gradients in steps:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_healing_a_collapsed_model(kind, folders, tmp_path):
    """The dense model teaches predictions and blocks; it is what the distance falls to."""
    model, dense = model_of(kind, folders), model_of(kind, folders)
    patch(model)
    set_alphas(model, 1.0, 1.0)
    collapse_model(model)
    config = LayerCollapseConfig(distillation_weight=10.0, hidden_state_weight=1.0)
    options = {"max_steps": 30, "logging_steps": 10, "learning_rate": 3e-3, "save_strategy": "no"}
    trainer = trainer_of(model, tmp_path, config, teacher=dense, **options)
    trainer.train()
    logs = trainer.state.log_history[:3]
    for name in ("layer_collapse/distillation_loss", "layer_collapse/hidden_state_loss"):
        assert 0 < logs[2][name] < logs[0][name]
    assert trainer.teacher is dense


def test_a_teacher_beside_a_loss_with_a_cache(bert, folders, tmp_path):
    """Such a loss runs the model with gradients only while it goes backward."""
    config, steps = LayerCollapseConfig(blocks="last:2", distillation_weight=1.0, hidden_state_weight=0.5), []
    for loss in (MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss):
        seen, options = Gradients(), {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "max_grad_norm": 0.0}
        options |= {"batch_sampler": in_order}
        teacher = model_of("sentence", folders)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(0.8)
        model = sentence_transformer(bert)
        trainer = trainer_of(model, tmp_path, config, loss, callbacks=[seen], teacher=teacher, **options)
        trainer.train()
        steps.append(seen.steps[0])
        log = trainer.state.log_history[0]
        assert log["layer_collapse/distillation_loss"] > 0.1 and log["layer_collapse/hidden_state_loss"] > 0.1
    for name, gradient in steps[0].items():
        torch.testing.assert_close(steps[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_what_a_teacher_cannot_hear(bert, folders, tmp_path):
    config = LayerCollapseConfig(blocks="last:2", distillation_weight=1.0)
    teacher = AutoModel.from_pretrained(bert)
    with pytest.raises(ValueError, match="SentenceTransformer takes one dict .* a BertModel, does not"):
        trainer_of(sentence_transformer(bert), tmp_path, config, teacher=teacher).train()
    teacher = model_of("sparse", folders)
    with pytest.raises(ValueError, match=r"embeddings of shape \(4, 64\), the model \(4, 16\)"):
        trainer_of(sentence_transformer(bert), tmp_path, config, teacher=teacher).train()


# ---- SetFit ----


def setfit_trainer(model, folder, **kwargs):
    import setfit

    data = Dataset.from_dict({"text": TEXTS, "label": [0, 0, 1, 1]})
    options = {"max_steps": 4, "batch_size": 2, "logging_steps": 1, "report_to": "none", "show_progress_bar": False}
    args = setfit.TrainingArguments(output_dir=str(folder), **options)
    return setfit.Trainer(model=model, args=args, train_dataset=data, **kwargs)


def setfit_model(bert):
    import setfit
    from sklearn.linear_model import LogisticRegression

    return setfit.SetFitModel(model_body=sentence_transformer(bert), model_head=LogisticRegression())


def test_setfit_with_the_callback(bert, tmp_path):
    """Its trainer hands callbacks a SetFitModel, which is no module; the body inside is what is patched."""
    import setfit

    model = setfit_model(bert)
    config = LayerCollapseConfig(blocks="last:2", alpha_learning_rate=0.45)
    trainer = setfit_trainer(model, tmp_path / "run", callbacks=[LayerCollapseCallback(config)])
    assert len(alphas_of(model.model_body)) == 2
    trainer.train()
    assert all(0.95 < float(alpha) <= 1 for alpha in alphas_of(model.model_body).values())
    logs = [log for log in trainer.st_trainer.state.log_history if "layer_collapse/ready_blocks" in log]
    assert [log["layer_collapse/ready_blocks"] for log in logs] == [0, 2, 2, 2]
    assert len(collapse_model(model.model_body).collapsed) == 2
    trainer.train_classifier(TEXTS, [0, 0, 1, 1])
    model.save_pretrained(str(tmp_path / "collapsed"))
    loaded = setfit.SetFitModel.from_pretrained(str(tmp_path / "collapsed"))
    assert torch.equal(loaded.predict_proba(TEXTS), model.predict_proba(TEXTS))


def test_setfit_on_a_patched_and_a_collapsed_body(bert, tmp_path):
    import setfit

    model = setfit_model(bert)
    with pytest.raises(TypeError, match="got SetFitModel. If it holds one, .*`model_body`"):
        apply_layer_collapse(model)
    apply_layer_collapse(model.model_body)
    setfit_trainer(model, tmp_path / "run").train()
    for life in ("patched", "collapsed"):
        if life == "collapsed":
            set_alphas(model.model_body, *[1.0] * LAYERS)
            assert len(collapse_model(model.model_body).collapsed) == LAYERS
        model.save_pretrained(str(tmp_path / life))
        loaded = setfit.SetFitModel.from_pretrained(str(tmp_path / life))
        assert torch.equal(loaded.predict_proba(TEXTS), model.predict_proba(TEXTS))
