"""Distillation and healing: what a teacher adds to the loss, to whom, and when."""

import copy

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from hf_layercollapse import (
    LayerCollapseCallback,
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    functional,
)
from tests.models import BY_NAME, HIDDEN, LAYERS, VOCABULARY, WIDTH, randomize
from tests.training import (
    Gradients,
    alphas_of,
    assert_same,
    checkpointing,
    counted_cross_entropy,
    model_of,
    rows,
    set_alphas,
    state_of,
    trainer_for,
    zero_loss,
)


BOTH = {"distillation_weight": 0.7, "hidden_state_weight": 0.3, "temperature": 3.0}


def teacher_of(case, seed=5):
    """Of the same shape, with other weights."""
    return model_of(BY_NAME[case] if isinstance(case, str) else case, seed=seed)


def batch_of(examples):
    return {name: torch.stack([row[name] for row in examples]) for name in examples[0]}


def one_step(case, folder, config, **kwargs):
    """Gradients of one optimizer step."""
    seen = Gradients()
    trainer = trainer_for(case, folder, config=config, callbacks=[seen], **kwargs)
    trainer.train()
    (step,) = seen.steps
    return step, trainer


# ---- The terms ----


def test_soft_targets_against_their_definition():
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    p, q = (teacher / 3).double().softmax(-1), (student / 3).double().softmax(-1)
    expected = 9 * (p * (p / q).log()).sum(-1)
    found = functional.soft_target_loss(student, teacher, 3.0).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    p, q = (teacher / 3).double().sigmoid(), (student / 3).double().sigmoid()
    expected = 9 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    found = functional.soft_binary_loss(student, teacher, 3.0).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    for loss in (functional.soft_target_loss, functional.soft_binary_loss):
        assert float(loss(teacher, teacher, 3.0).abs().max()) < 1e-6
        half = loss(student.bfloat16(), teacher.bfloat16(), 3.0)
        assert half.dtype == torch.float32


def test_the_gradient_has_the_same_size_at_every_temperature():
    student, teacher = 0.01 * torch.randn(6, 5, dtype=torch.float64), torch.zeros(6, 5, dtype=torch.float64)
    norms = []
    for temperature in (4.0, 8.0):
        logits = student.clone().requires_grad_()
        functional.soft_target_loss(logits, teacher, temperature).sum().backward()
        norms.append(float(logits.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


def test_unexplained_share():
    teacher = torch.randn(2, 5, 50)
    real = torch.ones(2, 5, dtype=torch.bool)
    constant = teacher.mean(-1, keepdim=True).expand_as(teacher)
    shares = functional.unexplained_share(constant, teacher, real)
    assert shares.shape == (2,) and 0.8 < float(shares.min()) <= float(shares.max()) <= 1
    assert float(functional.unexplained_share(teacher, teacher, real).abs().max()) == 0
    expected = functional.unexplained_share(0.9 * teacher, teacher, real)
    # A massive token weighs as much as another, one that is all but zero is no measure, and padding is nothing.
    huge = teacher * torch.tensor([1.0, 1e4, 1.0, 1.0, 1.0])[:, None]
    torch.testing.assert_close(functional.unexplained_share(0.9 * huge, huge, real), expected, rtol=0.1, atol=0)
    tiny = teacher * torch.tensor([1.0, 1e-4, 1.0, 1.0, 1.0])[:, None]
    moved = tiny + 0.1 * torch.randn(2, 5, 50)
    assert float(functional.unexplained_share(moved, tiny, real).max()) < 0.03
    longer = torch.cat([teacher, 1e6 * torch.randn(2, 3, 50)], dim=1)
    mask = torch.arange(8).expand(2, 8) < 5
    wrong = torch.cat([0.9 * teacher, torch.zeros(2, 3, 50)], dim=1)
    torch.testing.assert_close(functional.unexplained_share(wrong, longer, mask), expected)


# ---- Whose gradients ----


def reference(case, config, model, teacher, inputs):
    """Gradients of task, distillation and hidden states on one whole batch, the long way round."""
    case = BY_NAME[case]
    outputs, blocks = {}, {}
    for name, net in (("student", model.train()), ("teacher", teacher.eval())):
        downs = [net.get_submodule(f"{block}.{case.down}") for block in case.blocks()]
        kept = blocks[name] = []
        handles = [
            down.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output)) for down in downs
        ]
        outputs[name] = net(**inputs)
        for handle in handles:
            handle.remove()
    logits, target = (outputs[name].logits.double() for name in ("student", "teacher"))
    if case.labels == "tokens":
        used = inputs["labels"][:, 1:] != -100
        logits, target = logits[:, :-1][used], target[:, :-1][used]
    t = config["temperature"]
    p, q = (target / t).softmax(-1), (logits / t).softmax(-1)
    divergence = t**2 * (p * (p / q).log()).sum(-1).mean()
    hidden = 0.0
    for student, taught in zip(blocks["student"], blocks["teacher"], strict=True):
        variance = taught.var(-1, correction=0)
        scale = torch.maximum(variance, variance.median(1, keepdim=True).values)
        hidden = hidden + ((student - taught).square().mean(-1) / scale).mean() / LAYERS
    task = outputs["student"].loss
    if case.labels == "tokens":
        # As the Trainer counts GPT-2's labels.
        task = task * used.sum() / (inputs["labels"] != -100).sum()
        divergence = divergence * used.sum() / (inputs["labels"] != -100).sum()
    loss = task + config["distillation_weight"] * divergence + config["hidden_state_weight"] * hidden
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("case", ["bert", "vit", "gpt2"])
def test_gradients_do_not_depend_on_accumulation(case, tmp_path):
    model = apply_layer_collapse(model_of(BY_NAME[case]), LayerCollapseConfig())
    expected = reference(case, BOTH, model, teacher_of(case), batch_of(rows(BY_NAME[case], 8)))
    for accumulate in (1, 2, 4):
        found, _ = one_step(
            case,
            tmp_path,
            BOTH,
            batch=8 // accumulate,
            accumulate=accumulate,
            train=rows(BY_NAME[case], 8),
            teacher=teacher_of(case),
        )
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=3e-4, atol=3e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", ["bert", "gpt2"])
@pytest.mark.parametrize("loss", ["smoothing", "function"])
def test_nor_with_other_losses(case, loss, tmp_path):
    """Label smoothing and a loss of one's own take the labels out of the inputs."""

    def step(accumulate, config):
        return one_step(
            case,
            tmp_path,
            config,
            batch=8 // accumulate,
            accumulate=accumulate,
            train=rows(BY_NAME[case], 8),
            teacher=teacher_of(case) if config else None,
            args={"label_smoothing_factor": 0.1 if loss == "smoothing" else 0.0},
            compute_loss_func=counted_cross_entropy if loss == "function" else None,
        )[0]

    whole, parts, without = step(1, BOTH), step(4, BOTH), step(1, {})
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=3e-4, atol=3e-5)
    assert any(not torch.allclose(without[name], whole[name], rtol=0.01) for name in whole)


def test_padding_counts_nothing(tmp_path):
    """The same rows, padded further: same gradients. And however they are split, though lengths differ."""

    def padded(length):
        examples = []
        for i, row in enumerate(rows(BY_NAME["bert"], 8)):
            ids, mask = torch.zeros(2, length, dtype=torch.long)
            real = 3 + i % 5
            ids[:real], mask[:real] = row["input_ids"][:real], 1
            examples.append({"input_ids": ids, "attention_mask": mask, "labels": row["labels"]})
        return examples

    def step(length, accumulate=1):
        kwargs = {"teacher": teacher_of("bert"), "batch": 8 // accumulate, "accumulate": accumulate}
        return one_step("bert", tmp_path, BOTH, train=padded(length), **kwargs)[0]

    expected = step(7)
    for found in (step(12), step(7, accumulate=4)):
        for name, gradient in expected.items():
            # Positions that only padding has.
            if "position_embeddings" not in name:
                torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=3e-5, msg=lambda m, n=name: n + m)


def bert(head, **kwargs):
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **kwargs,
    )
    torch.manual_seed(0)
    return randomize(head(config))


def t5():
    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_ff=HIDDEN, d_kv=8, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return randomize(T5ForConditionalGeneration(config))


def other(model):
    """A teacher that knows something else."""
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return teacher.eval()


IDS = BY_NAME["bert"].inputs(batch=4)["input_ids"]
HEADS = {
    "tokens": (
        lambda: bert(BertForTokenClassification, num_labels=4),
        {"input_ids": IDS, "labels": torch.where(IDS % 3 == 0, -100, IDS % 4)},
        lambda s, t, b: kl(s.logits[b["labels"] != -100], t.logits[b["labels"] != -100]),
    ),
    "answers": (
        lambda: bert(BertForQuestionAnswering),
        {"input_ids": IDS, "start_positions": torch.arange(4), "end_positions": torch.arange(4)},
        lambda s, t, b: (kl(s.start_logits, t.start_logits) + kl(s.end_logits, t.end_logits)) / 2,
    ),
    "choices": (
        lambda: bert(BertForMultipleChoice),
        {"input_ids": IDS.reshape(2, 2, -1), "labels": torch.tensor([0, 1])},
        lambda s, t, b: kl(s.logits, t.logits),
    ),
    "regression": (
        lambda: bert(BertForSequenceClassification, num_labels=1),
        {"input_ids": IDS, "labels": torch.randn(4)},
        lambda s, t, b: (s.logits - t.logits).square().mean(),
    ),
    "several labels": (
        lambda: model_of(BY_NAME["bert"]),
        {"input_ids": IDS, "labels": torch.randint(0, 2, (4, 3)).float()},
        lambda s, t, b: functional.soft_binary_loss(s.logits, t.logits, 2.0).mean(),
    ),
    "translation": (
        t5,
        {"input_ids": IDS, "labels": torch.where(IDS % 3 == 0, -100, IDS)},
        lambda s, t, b: kl(s.logits[b["labels"] != -100], t.logits[b["labels"] != -100]),
    ),
}


def kl(student, teacher):
    return functional.soft_target_loss(student, teacher, 2.0).mean()


@pytest.mark.parametrize("head", HEADS)
def test_heads(head, tmp_path):
    """What the log calls the distillation loss is what the head's own labels say counts."""
    build, batch, expected = HEADS[head]
    model = build()
    teacher = other(model)
    with torch.no_grad():
        value = float(expected(model(**batch), teacher(**batch), batch))
    count = len(batch["input_ids"])
    examples = [{name: tensor[i] for name, tensor in batch.items()} for i in range(count)]
    trainer = trainer_for(
        "bert",
        tmp_path,
        {"distillation_weight": 1.0, "hidden_state_weight": 1.0},
        model=model,
        teacher=teacher,
        train=examples,
        batch=count,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["layer_collapse/distillation_loss"] == pytest.approx(value, rel=1e-4) and value > 1e-3
    assert 1e-3 < log["layer_collapse/hidden_state_loss"] < 10


# ---- The teacher alone ----


ALONE = {"distillation_weight": 1.0, "task_loss_weight": 0.0}


# head -> the model, and what it is told of the teacher's predictions where no label says what kind they are.
UNLABELLED = {
    "tokens": (HEADS["tokens"][0], lambda s, t: kl(s.logits, t.logits)),
    "answers": (
        HEADS["answers"][0],
        lambda s, t: (kl(s.start_logits, t.start_logits) + kl(s.end_logits, t.end_logits)) / 2,
    ),
    "regression": (HEADS["regression"][0], lambda s, t: (s.logits - t.logits).square().mean()),
    "several labels": (
        lambda: bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"),
        lambda s, t: functional.soft_binary_loss(s.logits, t.logits, 2.0).mean(),
    ),
    "embeddings": (
        lambda: bert(BertModel),
        lambda s, t: functional.embedding_loss(s.last_hidden_state.mean(1), t.last_hidden_state.mean(1)).mean(),
    ),
}


@pytest.mark.parametrize("head", UNLABELLED)
def test_without_labels(head, tmp_path):
    """Every prediction that is no padding counts, of the kind that the model itself says."""
    build, expected = UNLABELLED[head]
    model = build()
    teacher = other(model)
    with torch.no_grad():
        value = float(expected(model(input_ids=IDS), teacher(input_ids=IDS)))
    examples = [{"input_ids": ids} for ids in IDS]
    trainer = trainer_for("bert", tmp_path, ALONE, model=model, teacher=teacher, train=examples, batch=len(IDS))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["layer_collapse/distillation_loss"] == pytest.approx(value, rel=1e-4) and value > 1e-3
    # The penalty is what is left beside it.
    assert log["loss"] - log["layer_collapse/penalty"] == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("case", ["gpt2", "vit"])
def test_without_labels_it_does_not_matter_how_a_batch_is_split(case, tmp_path):
    unlabelled = [{k: v for k, v in row.items() if k != "labels"} for row in rows(BY_NAME[case], 8)]
    found = [
        one_step(case, tmp_path, ALONE, teacher=teacher_of(case), train=unlabelled, batch=8 // k, accumulate=k)[0]
        for k in (1, 4)
    ]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_the_weight_of_the_task(tmp_path):
    """The loss is linear in it; labels that are there at weight 0 say which tokens count."""
    losses = {}
    for weight in (0.0, 0.5, 1.0):
        config = {**BOTH, "task_loss_weight": weight, "penalty_strength": 0.0}
        trainer = trainer_for("gpt2", tmp_path, config, teacher=teacher_of("gpt2"))
        trainer.train()
        losses[weight] = trainer.state.log_history[0]["loss"]
    assert losses[0.5] == pytest.approx((losses[0.0] + losses[1.0]) / 2, rel=1e-4)
    log = trainer.state.log_history[0]
    taught = 0.7 * log["layer_collapse/distillation_loss"] + 0.3 * log["layer_collapse/hidden_state_loss"]
    assert losses[0.0] == pytest.approx(taught, rel=1e-4)


def test_a_weight_of_the_task_needs_a_teacher():
    for weight in (0.0, 0.5):
        with pytest.raises(ValueError, match="there is no teacher beside whose loss it would weigh"):
            LayerCollapseConfig(task_loss_weight=weight)
    with pytest.raises(ValueError, match=r"`task_loss_weight` must be in \[0, inf\), got -1"):
        LayerCollapseConfig(task_loss_weight=-1, distillation_weight=1.0)
    config = LayerCollapseConfig(task_loss_weight=0, hidden_state_weight=1.0)
    assert LayerCollapseConfig.from_json_string(config.to_json_string()) == config


# ---- Which teacher ----


def test_by_default_the_teacher_is_the_dense_model(tmp_path):
    dense = model_of(BY_NAME["bert"], dropout=True)
    expected, inputs = state_of(dense), BY_NAME["bert"].batch()
    logits = dense.eval()(**inputs).logits
    trainer = trainer_for("bert", tmp_path, BOTH, model=dense, args={"max_steps": 3})
    trainer.train()
    teacher = trainer.teacher
    assert_same(state_of(teacher), expected)
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(teacher(**inputs).logits, logits)
    # It takes part in nothing else.
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in teacher.parameters()}
    assert trainer.model.state_dict().keys() - expected.keys() == {f"{name}" for name in alphas_of(trainer.model)}


def test_a_patched_model_that_was_not_trained_is_taken_back(tmp_path):
    patched = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig(**BOTH))
    trainer = trainer_for("bert", tmp_path, False, model=patched)
    assert trainer.layer_collapse_config.distillation_weight == 0.7
    assert_same(state_of(trainer.teacher), state_of(model_of(BY_NAME["bert"])))
    assert type(trainer.teacher) is type(model_of(BY_NAME["bert"]))
    set_alphas(patched, 0.1, 0.0, 0.0)
    with pytest.raises(ValueError, match="trained since, so its dense form is not known"):
        trainer_for("bert", tmp_path, False, model=patched)
    assert trainer_for("bert", tmp_path, False, model=patched, teacher=teacher_of("bert")).teacher is not None


def test_model_init_makes_a_teacher_each_time(tmp_path):
    made = []

    def model_init():
        made.append(model_of(BY_NAME["bert"], seed=len(made)))
        return made[-1]

    trainer = trainer_for("bert", tmp_path, BOTH, model_init=model_init)
    trainer.train()
    assert len(made) == 2
    assert_same(state_of(trainer.teacher), state_of(model_of(BY_NAME["bert"], seed=1)))


def test_what_is_refused(tmp_path):
    def error(kind=ValueError, config=BOTH, **kwargs):
        with pytest.raises(kind) as caught:
            trainer_for("bert", tmp_path, config, **kwargs)
        return str(caught.value)

    assert "both 0" in error(config={}, teacher=teacher_of("bert"))
    assert "no `layer_collapse_config`" in error(config=False, teacher=teacher_of("bert"))
    assert "must be a model" in error(TypeError, teacher="bert")
    model = model_of(BY_NAME["bert"])
    assert "the model itself" in error(model=model, teacher=model)
    assert "has no ['bert.encoder.layer.0.output.dense'" in error(teacher=teacher_of("gpt2"))
    assert "torch_compile" in error(args={"torch_compile": True, "torch_compile_backend": "eager"})
    with pytest.raises(ValueError, match="cannot distil"):
        LayerCollapseCallback(LayerCollapseConfig(**BOTH))
    for option in ({"distillation_weight": -1}, {"hidden_state_weight": float("inf")}, {"temperature": 0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            LayerCollapseConfig(**option)

    small = BY_NAME["bert"].config()
    small.num_labels = 5
    with pytest.raises(ValueError, match=r"logits of shape \(8, 5\), the model \(8, 3\)"):
        trainer_for("bert", tmp_path, BOTH, teacher=BY_NAME["bert"].model(config=small)).train()


def test_the_callback_refuses_what_a_model_was_patched_with(tmp_path):
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig(**BOTH))
    trainer = trainer_for(
        "bert", tmp_path, False, model=model, trainer_class=Trainer, callbacks=[LayerCollapseCallback()]
    )
    with pytest.raises(ValueError, match="cannot distil"):
        trainer.train()


# ---- The rest of training ----


@pytest.mark.parametrize("weights", [{"hidden_state_weight": 1.0}, BOTH], ids=["blocks", "both"])
def test_nothing_is_compared_of_blocks_that_went_back_to_dense(weights, tmp_path):
    """What is left is the Trainer that it is without; and the old optimizer, which holds their alphas, is let go."""
    trainer = trainer_for("bert", tmp_path, {**weights, "not_ready": "restore"})
    trainer.train()
    report = trainer.collapse(allow_none=True)
    assert report.collapsed == [] and trainer.collapse_report is report and trainer.optimizer is None
    assert not alphas_of(trainer.model)
    trainer.train()
    told = {"layer_collapse/distillation_loss"} if "distillation_weight" in weights else set()
    assert {name for name in trainer.state.log_history[0] if name.endswith("_loss")} == told
    assert (trainer.teacher is None) is (not told)


def test_the_first_log_of_a_run_is_of_its_own_batches(tmp_path):
    args = {"max_steps": 3, "logging_steps": 2, "learning_rate": 0.0, "train_sampling_strategy": "sequential"}
    config = {**BOTH, "alpha_learning_rate": 1e-12}
    trainer = trainer_for("bert", tmp_path, config, teacher=teacher_of("bert"), args=args)
    logged = []
    for _ in range(2):
        trainer.train()
        log = trainer.state.log_history[0]
        logged.append([log[f"layer_collapse/{name}_loss"] for name in ("distillation", "hidden_state")])
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)


def test_blocks_alone_teach_nothing_once_they_are_dense(tmp_path):
    config = {"hidden_state_weight": 1.0, "task_loss_weight": 0.0, "not_ready": "restore"}
    trainer = trainer_for("bert", tmp_path, config)
    trainer.train()
    trainer.collapse(allow_none=True)
    with pytest.raises(ValueError, match="Nothing is left to learn: with task_loss_weight=0"):
        trainer.train()


def test_evaluation_has_no_teacher(tmp_path):
    with_teacher = trainer_for("bert", tmp_path, BOTH, teacher=teacher_of("bert")).evaluate()
    without = trainer_for("bert", tmp_path, {}).evaluate()
    assert with_teacher["eval_loss"] == without["eval_loss"]


def test_bf16(tmp_path):
    losses = []
    for bf16 in (False, True):
        trainer = trainer_for("gpt2", tmp_path, BOTH, teacher=teacher_of("gpt2"), args={"bf16": bf16, "max_steps": 3})
        trainer.train()
        log = trainer.state.log_history[2]
        losses.append([log["layer_collapse/distillation_loss"], log["layer_collapse/hidden_state_loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[0] != losses[1]


def test_compiled(tmp_path):
    def first_loss(args):
        trainer = trainer_for("bert", tmp_path, {"distillation_weight": 1.0}, teacher=teacher_of("bert"), args=args)
        trainer.train()
        return trainer.state.log_history[0]["layer_collapse/distillation_loss"]

    compiled = first_loss({"torch_compile": True, "torch_compile_backend": "eager"})
    assert compiled == pytest.approx(first_loss({}), rel=1e-4)


def test_checkpointed_activations(tmp_path):
    """What runs again during backward is not seen a second time."""
    found = [
        one_step("bert", tmp_path, BOTH, teacher=teacher_of("bert"), args=checkpointing(again))[0]
        for again in (False, True)
    ]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)
    reentrant = checkpointing(use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        one_step("bert", tmp_path, BOTH, teacher=teacher_of("bert"), args=reentrant)


def test_resumed_equals_uninterrupted(tmp_path):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_for("bert", tmp_path, BOTH, args=args, dropout=True)
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    size = (checkpoint / "model.safetensors").stat().st_size
    plain = trainer_for("bert", tmp_path / "plain", {}, args=args, dropout=True)
    plain.train()
    assert size == (tmp_path / "plain" / "checkpoint-2" / "model.safetensors").stat().st_size
    resumed = trainer_for("bert", tmp_path, BOTH, args={**args, "save_strategy": "no"}, dropout=True)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(state_of(resumed.model), state_of(whole.model))
    assert any(not torch.equal(a, state_of(plain.model)[name]) for name, a in state_of(whole.model).items())


def test_a_shared_block_is_compared_call_by_call(tmp_path):
    config = AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=8, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = randomize(AlbertForSequenceClassification(config))
    teacher, calls = other(model), []
    block = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output"
    inputs = BY_NAME["bert"].inputs(batch=8)
    for net in (model, teacher):
        handle = net.get_submodule(block).register_forward_hook(lambda module, args, output: calls.append(output))
        net(**inputs)
        handle.remove()
    assert len(calls) == 2 * LAYERS
    real = torch.ones(8, 7, dtype=torch.bool)
    pairs = zip(calls[:LAYERS], calls[LAYERS:], strict=True)
    shares = [functional.unexplained_share(student, taught, real).mean() for student, taught in pairs]
    train = [{"input_ids": ids, "labels": torch.tensor(0)} for ids in inputs["input_ids"]]
    config = {"hidden_state_weight": 1.0}
    trainer = trainer_for("bert", tmp_path, config, model=model, teacher=teacher, train=train)
    trainer.train()
    found = trainer.state.log_history[0]["layer_collapse/hidden_state_loss"]
    assert found == pytest.approx(float(sum(shares).detach()) / LAYERS, rel=1e-4)


# ---- Healing ----


def healed(tmp_path, model, dense, rate=3e-3):
    trainer = trainer_for(
        "bert",
        tmp_path,
        {"distillation_weight": 1.0, "hidden_state_weight": 1.0},
        model=model,
        teacher=dense,
        compute_loss_func=zero_loss,
        args={"max_steps": 40, "learning_rate": rate, "max_grad_norm": 1.0},
    )
    trainer.train()
    return trainer


def collapsed_bert(narrow=False):
    """And the dense model that it was. Badly collapsed: by the identity target, or to rank 1."""
    dense = model_of(BY_NAME["bert"])
    model = copy.deepcopy(dense)
    config = LayerCollapseConfig(blocks="last:2", rank=1 if narrow else None, keep_neurons=2 if narrow else 0)
    if narrow:
        collapse_model(model, config, calibration_data=[BY_NAME["bert"].inputs(batch=16)])
    else:
        apply_layer_collapse(model, config)
        set_alphas(model, 1.0, 1.0)
        collapse_model(model)
    return dense, model


def distance(model, dense):
    """From the dense model, on inputs that neither training nor calibration had."""
    inputs = BY_NAME["bert"].inputs(batch=64, seed=999)
    with torch.no_grad():
        return float(kl(model.eval()(**inputs).logits, dense(**inputs).logits))


@pytest.mark.parametrize("narrow", [False, True])
def test_healing_brings_a_collapsed_model_back_to_its_teacher(narrow, tmp_path):
    dense, model = collapsed_bert(narrow)
    before, weights, config = distance(model, dense), state_of(model), copy.deepcopy(model.config.layer_collapse)
    trainer = healed(tmp_path, model, dense)
    assert distance(trainer.model, dense) < 0.5 * before
    first, last = trainer.state.log_history[0], trainer.state.log_history[39]
    for name in ("layer_collapse/distillation_loss", "layer_collapse/hidden_state_loss"):
        assert last[name] < 0.8 * first[name]
    assert not any("penalty" in name or "alpha" in name for name in first)
    # It is the same model, and is saved and loaded as before.
    assert state_of(model).keys() == weights.keys() and model.config.layer_collapse == config
    trainer.save_model(tmp_path / "healed")
    assert_same(state_of(BY_NAME["bert"].auto_class.from_pretrained(tmp_path / "healed")), state_of(model))
    assert_same(state_of(dense), state_of(model_of(BY_NAME["bert"])))


def test_healing_needs_a_teacher(tmp_path):
    dense, model = collapsed_bert()
    with pytest.raises(ValueError, match="pass the dense model as `teacher`"):
        trainer_for("bert", tmp_path, BOTH, model=model)
    with pytest.raises(ValueError, match="as `teacher`"):
        trainer_for("bert", tmp_path, {}, model=model)


def test_healing_with_lora(tmp_path):
    """Adapters on the collapsed linears: they alone train, and come back on the saved base."""
    dense, model = collapsed_bert()
    before = distance(model, dense)
    model.save_pretrained(tmp_path / "base")
    base = BY_NAME["bert"].auto_class.from_pretrained(tmp_path / "base")
    frozen = state_of(base)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["output.dense"], task_type="SEQ_CLS")
    trainer = healed(tmp_path, get_peft_model(base, lora), dense, rate=2e-2)
    assert distance(trainer.model, dense) < 0.8 * before
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    inputs = BY_NAME["bert"].inputs(batch=8)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, trainer.model.eval()(**inputs).logits)
    merged = loaded.merge_and_unload()
    assert isinstance(merged.bert.encoder.layer[2].output.dense, nn.Linear)
    assert tuple(merged.bert.encoder.layer[2].output.dense.weight.shape) == (WIDTH, WIDTH)
    live = {name.replace(".base_layer", ""): value for name, value in state_of(trainer.model.get_base_model()).items()}
    for name in frozen.keys() & live.keys():
        assert torch.equal(live[name], frozen[name])
    assert {"bert.encoder.layer.2.output.dense.weight", "bert.pooler.dense.weight"} <= live.keys() & frozen.keys()


def test_collapse_and_heal_in_one_trainer(tmp_path):
    """Train with a teacher, collapse, train on: the second `train` heals."""
    trainer = trainer_for(
        "bert",
        tmp_path,
        {**BOTH, "alpha_learning_rate": 0.4, "collapse_threshold": 0.5},
        args={"max_steps": 12, "lr_scheduler_type": "linear"},
    )
    trainer.train()
    trainer.collapse()
    trainer.train()
    logs = trainer.state.log_history
    assert not alphas_of(trainer.model) and "layer_collapse/hidden_state_loss" in logs[0]
    assert logs[10]["layer_collapse/distillation_loss"] < logs[0]["layer_collapse/distillation_loss"]
