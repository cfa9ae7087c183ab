"""Passes over data: nothing is computed that nobody reads, and an interrupted one leaves the model as it was."""

import copy
import time
from collections import OrderedDict

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertModel,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForAudioClassification,
)

from hf_layercollapse import (
    CollapsibleActivation,
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    compare_models,
    find_feed_forward_blocks,
    linearity_map,
    plan_collapse,
    prediction_divergence,
    recover_model,
)
from hf_layercollapse.blocks import bind_blocks
from hf_layercollapse.calibration import Calibration
from hf_layercollapse.loss_metric import measure_metrics
from hf_layercollapse.models import in_type_of
from hf_layercollapse.moments import bytes_of_sums
from hf_layercollapse.progress import Progress

from .models import BY_NAME, HIDDEN, VOCABULARY, WIDTH, randomize, text_inputs
from .test_memory import data, llama
from .training import trainer_for


def given_to(model):
    """What every forward of a model is given and gives."""
    seen = []
    model.register_forward_hook(lambda module, args, kwargs, output: seen.append((kwargs, output)), with_kwargs=True)
    return seen


def test_a_language_model_makes_no_cache_and_one_token_of_logits():
    model = llama()
    seen = given_to(model)
    batches = [{**batch, "labels": batch["input_ids"]} for batch in data()]
    engine = Calibration.on(model, model, batches)
    engine.run("", lambda: ())
    engine.moments(bind_blocks(model))
    assert len(seen) > 12
    for _kwargs, output in seen:
        assert output.past_key_values is None and output.logits.shape[1] == 1 and output.loss is None


def test_what_is_scored_has_all_its_logits_no_cache_and_no_loss():
    model = llama()
    seen = given_to(model)
    batches = [{**batch, "labels": batch["input_ids"]} for batch in data()]
    linearity_map(model, batches)
    measure_metrics(Calibration.on(model, model, batches), bind_blocks(model))
    whole = [output for _, output in seen if output.logits.shape[1] == 7]
    assert len(whole) >= 5 and all(output.past_key_values is None and output.loss is None for _, output in seen)


def test_what_was_asked_for_stays():
    model = llama()
    seen = given_to(model)
    batches = [{**batch, "use_cache": True, "logits_to_keep": 2} for batch in data()]
    Calibration.on(model, model, batches).run("", lambda: ())
    assert seen and all(output.past_key_values is not None and output.logits.shape[1] == 2 for _, output in seen)


@pytest.mark.parametrize("use", ["recover", "divergence", "compare", "teacher"])
def test_predictions_make_no_cache(use, tmp_path):
    case = BY_NAME["gpt2"]
    dense, model = case.model(), case.model(seed=1)
    seen = [given_to(dense), given_to(model)]
    batches = [case.inputs(batch=2, seed=seed) for seed in range(8)]
    if use == "recover":
        recover_model(model, dense, batches, max_steps=2)
    elif use == "divergence":
        prediction_divergence(model, dense, batches)
    elif use == "compare":
        compare_models({"dense": dense, "other": model}, batches, rounds=2, warmup=0, progress=False)
        seen = [[(kwargs, output) for kwargs, output in each if "use_cache" in kwargs] for each in seen]  # not timed
        assert len(seen[0]) == len(seen[1]) == len(batches)
    else:
        trainer_for(case, tmp_path, {"distillation_weight": 1.0}, model=model, teacher=dense).train()
        del seen[1]  # the Trainer's own
    for calls in seen:
        assert calls and all(output.past_key_values is None for _, output in calls)


def audio_model(dtype, seed=0):
    """Its first layer is a convolution, which casts nothing."""
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=16,
        pad_token_id=0,
        classifier_proj_size=8,
        num_labels=4,
    )
    model = WhisperForAudioClassification(config)
    randomize(model)
    return model.to(dtype).eval()


def sounds(dtype, count=8):
    generator = torch.Generator().manual_seed(0)
    return [{"input_features": torch.randn(4, 8, 32, generator=generator).to(dtype)} for _ in range(count)]


BOTH_TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


@BOTH_TYPES
def test_a_model_is_given_floats_of_its_own_type(dtype):
    """Whatever those of the data are: a model and its teacher, or two that are compared, may be of two types."""
    dense, model = audio_model(torch.bfloat16), audio_model(torch.bfloat16)
    collapse_model(model, LayerCollapseConfig(keep_neurons=12), calibration_data=sounds(dtype))
    before = prediction_divergence(model, dense.float(), sounds(dtype))
    assert 0 < before == pytest.approx(prediction_divergence(model.float(), dense, sounds(dtype)), rel=0.2)


@BOTH_TYPES
def test_a_model_and_its_teacher_may_be_of_two_types(dtype, tmp_path):
    model, teacher = audio_model(torch.bfloat16, seed=1), audio_model(torch.bfloat16)
    data = sounds(dtype)
    report = recover_model(model, teacher, data, max_steps=4)
    assert report.steps == 4 and model.dtype == torch.bfloat16
    rows = [{"input_features": sound, "labels": 0} for batch in data for sound in batch["input_features"].float()]
    trainer = trainer_for("bert", tmp_path, {"distillation_weight": 1.0}, model.float(), train=rows, teacher=teacher)
    trainer.train()
    assert trainer.state.log_history[0]["layer_collapse/distillation_loss"] > 0


def test_an_activation_s_own_float32_says_nothing_of_the_model():
    model = nn.Sequential(OrderedDict(act=nn.GELU(), up=nn.Linear(4, 4)))
    model.act = CollapsibleActivation(nn.GELU(), 4)
    batch = {"inputs_embeds": torch.ones(1), "labels": torch.ones(1), "input_ids": torch.ones(1).long()}
    given = in_type_of(model.bfloat16(), batch)
    assert [value.dtype for value in given.values()] == [torch.bfloat16, torch.float32, torch.int64]


def test_pictures_are_compared_in_each_model_s_own_type():
    case = BY_NAME["vit"]
    batches = [{**case.inputs(batch=4, seed=seed), "labels": torch.zeros(4).long()} for seed in range(2)]
    models = {"dense": case.model(), "half": case.model().half()}
    found = compare_models(models, batches, rounds=2, warmup=0, progress=False)
    assert found["half"].quality == found["dense"].quality


def calls_of_layers(model, layers):
    """How often each layer is called."""
    counts = [0] * len(layers)
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, index=index: counts.__setitem__(index, counts[index] + 1))
    return counts


def test_a_forward_ends_behind_the_last_block_that_is_measured():
    model = llama()
    blocks, batches = bind_blocks(model), data()
    expected = Calibration.on(model, model, batches).moments(blocks)
    engine = Calibration.on(model, model, batches, max_memory=bytes_of_sums(blocks[0], 0) + 1)
    counts = calls_of_layers(model, model.model.layers)
    found = engine.reduce(blocks, {block.name: [] for block in blocks}, lambda block, moments: moments)
    # A pass for each block, in order: each layer is called by its own and those behind, and once for the sample.
    passes = [count - counts[3] for count in counts]
    assert passes == [3 * len(batches), 2 * len(batches), len(batches), 0]
    for name, moments in expected.items():
        assert found[name].tokens == moments.tokens and torch.equal(found[name].cov_ff, moments.cov_ff)


class Twice(LlamaModel):
    """Calls its layers twice for short rows."""

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        return super().forward(inputs_embeds=out.last_hidden_state, **kwargs) if input_ids.shape[1] < 7 else out


@pytest.mark.parametrize("kind", ["shared", "twice", "chunks"])
def test_forwards_run_to_their_end_where_a_layer_may_come_again(kind):
    torch.manual_seed(0)
    sizes = {"embedding_size": 12, "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": 2}
    if kind == "twice":
        model = Twice(llama().config)
    elif kind == "shared":
        model = AlbertModel(AlbertConfig(vocab_size=VOCABULARY, num_hidden_layers=3, **sizes))
    else:
        chunked = copy.deepcopy(BY_NAME["bert"].config())
        chunked.chunk_size_feed_forward = 2
        model = BertModel(chunked)
    model = randomize(model).eval()
    batches = [text_inputs(batch=4, seed=seed, length=8 - 2 * (seed % 2)) for seed in range(24)]
    blocks, engine = bind_blocks(model), Calibration.on(model, model, batches)
    engine.moments(blocks)
    tokens = {name: moments.tokens for name, moments in engine.moments(blocks).items()}
    calls = []
    for block in blocks:
        block.down.register_forward_hook(lambda *call, name=block.name: calls.append((name, call[1][0].shape[:-1])))
    engine.run("", lambda: ())
    assert tokens == {b.name: sum(shape.numel() for name, shape in calls if name == b.name) for b in blocks}


def test_a_decoder_still_gets_the_labels_that_its_inputs_are_made_of():
    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_ff=HIDDEN, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = randomize(T5ForConditionalGeneration(config)).eval()
    batches = [{**text_inputs(seed=seed), "labels": text_inputs(seed=seed + 50)["input_ids"]} for seed in range(10)]
    found = Calibration.on(model, model, batches).moments(bind_blocks(model))
    assert all(moments.tokens == 140 for moments in found.values())


# ----------------------------------------------------------------------------------------------------
# Ctrl-C
# ----------------------------------------------------------------------------------------------------


def state_of(model):
    modules = {name: (type(module), module.training) for name, module in model.named_modules()}
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return modules, hooks, wanted, type(model), model.config.to_dict()


USES = {
    "collapse": lambda model: collapse_model(model, LayerCollapseConfig(rank=2, keep_neurons=3), data()),
    "in-turn": lambda model: collapse_model(model, LayerCollapseConfig(sequential=True), data()),
    "plan": lambda model: plan_collapse(model, data(), macs=0.4),
    "map": lambda model: linearity_map(model, data()),
    "affine": lambda model: apply_layer_collapse(model, LayerCollapseConfig(linear_target="affine"), data()),
}


@pytest.mark.parametrize("use", USES)
def test_ctrl_c_leaves_the_model_as_it_was(use):
    """In every part of the work: at forwards spread over all that it takes, and in the last one."""
    model = llama(2).train()
    count = []
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: count.append(1))
    USES[use](model)
    handle.remove()
    for stop in (1, 2 * len(count) // 3, len(count)):
        model = llama(2).train()
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        before, seen = state_of(model), []

        def interrupt(module, args, output, seen=seen, stop=stop):
            seen.append(1)
            if len(seen) == stop:
                raise KeyboardInterrupt

        handle = model.model.embed_tokens.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            USES[use](model)
        handle.remove()
        assert state_of(model) == before
        assert {block.state for block in find_feed_forward_blocks(model)} == {"dense"}
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_one_bar_for_all(capsys):
    case = BY_NAME["bert"]
    collapse_model(case.model(), LayerCollapseConfig(keep_neurons=2), [case.inputs(seed=seed) for seed in range(20)])
    shown = [line for line in capsys.readouterr().err.replace("\n", "\r").split("\r") if line.strip()]
    assert shown and all(line.startswith("Collapse") for line in shown)


def test_what_is_left_in_all():
    with Progress("Test", disable=True) as progress:
        progress.foresee(4)
        progress.expect(2)
        assert progress.expected + progress.foreseen == 4
        progress.expect(3, parts=2)
        assert (progress.expected, progress.foreseen) == (7, 0)
        for _ in range(5):
            progress.step(1e-4)
        with progress.part():
            time.sleep(0.01)
        # The other part is taken for as long as this one.
        assert progress.done > 5 + 50 and progress.expected - progress.done == pytest.approx(progress.done - 5)
        with progress.part():
            pass
        assert progress.expected == pytest.approx(progress.done)
        progress.step(1.0)
        assert progress.expected == pytest.approx(progress.done)
