"""The metric of the loss: what it is, that it predicts divergences, and that measuring it changes nothing."""

import pytest
import torch
from torch import is_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    CohereConfig,
    CohereForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_layercollapse import functional
from hf_layercollapse.blocks import bind_blocks
from hf_layercollapse.calibration import Calibration
from hf_layercollapse.loss_metric import (
    _GradientSums,
    _need_of_a_row,
    bytes_of_metrics,
    loss_metrics,
    measure_metrics,
)
from hf_layercollapse.predictions import Predictions, number_of, predictions_of
from hf_layercollapse.rows import bytes_of

from .models import BY_NAME


def batches_of(case, count=4, batch=8):
    return [case.inputs(batch=batch, seed=seed) for seed in range(count)]


def exact_metric(model, block, batches):
    """The expectation over all classes, one backward pass each, with gradients from plain autograd."""
    down = block.down
    total, predictions = 0.0, 0
    for batch in batches:
        outputs = []
        handle = down.register_forward_hook(lambda *call, into=outputs: into.append(call[-1]))
        logits = model(**batch).logits
        handle.remove()
        logits = logits.reshape(-1, logits.shape[-1])
        predictions += logits.shape[0]
        for row in range(logits.shape[0]):
            log_p = logits[row].log_softmax(-1)
            for value in log_p:
                (grad,) = torch.autograd.grad(value, outputs, retain_graph=True)
                grad = grad.reshape(-1, grad.shape[-1]).double()
                total = total + float(value.detach().exp()) * grad.T @ grad
    return total / predictions


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_it_is_the_fisher_information_at_a_blocks_output(name):
    case = BY_NAME[name]
    model, batches = case.model(), batches_of(case)
    blocks = bind_blocks(model)
    metrics = loss_metrics(model, model, blocks, batches, draws=200)
    for block in blocks:
        expected = exact_metric(model, block, batches)
        assert functional.relative_error(expected, metrics[block.name].matrix) < 0.1


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_it_predicts_what_a_small_change_of_an_output_costs(name):
    case = BY_NAME[name]
    model, batches = case.model(), batches_of(case, count=8)
    block = bind_blocks(model)[1]
    metric = loss_metrics(model, model, [block], batches, draws=20)[block.name].matrix
    generator = torch.Generator().manual_seed(0)
    noise = 0.01

    def disturb(module, args, output):
        return output + noise * torch.randn(output.shape, generator=generator)

    cost = predictions = 0.0
    with torch.no_grad():
        for batch in batches:
            (before,) = predictions_of(model, batch, model(**batch))
            handle = block.down.register_forward_hook(disturb)
            (after,) = predictions_of(model, batch, model(**batch))
            handle.remove()
            cost += float(after.divergence_from(before).sum())
            predictions += before.values.shape[0]
    assert cost / predictions == pytest.approx(float(metric.trace()) * noise**2 / 2, rel=0.25)


def test_measuring_changes_nothing():
    case = BY_NAME["bert"]
    model, batches = case.model().train(), batches_of(case)
    frozen = next(model.parameters()).requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    loss_metrics(model, model, bind_blocks(model), batches)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert model.training and torch.equal(torch.get_rng_state(), generator)
    assert not any(module._forward_hooks for module in model.modules())


def beside(blocks, batches):
    """Bytes that are held while rows run: the sums, what is added to one of them, and the rows."""
    sums = bytes_of_metrics(blocks)
    return sum((sums + bytes_of_metrics(blocks[:1]) + bytes_of(batches)).values()), sum(sums.values())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_what_takes_more_memory_than_there_is_runs_in_parts_and_layers_twice(name):
    case = BY_NAME[name]
    model, batches = case.model().train(), batches_of(case)
    blocks = bind_blocks(model)
    forwards = []
    handle = model.register_forward_hook(lambda *call: forwards.append(len(call[-1].logits)))

    def measured(batches, max_memory=None):
        engine = Calibration.on(model, model, batches, max_memory)
        room, found = engine.memory.room(), measure_metrics(engine, blocks)
        # The sums are held from here on, and nothing else.
        assert engine.memory.room() == room - kept
        return found

    held, kept = beside(blocks, batches)
    whole, report = measured(batches)
    assert (report.kind, report.checkpointed, report.rows) == ("loss", False, 32) and max(forwards) == 8
    row = report.bytes // 8
    del forwards[:]
    parts, small = measured(batches, held + 2 * row)
    assert not small.checkpointed and max(forwards) == 2 and small.bytes == 2 * row
    del forwards[:]
    twice, least = measured(batches, held + row - 1)
    assert least.checkpointed and max(forwards) == 1 and least.bytes < row
    assert least.tokens == small.tokens == report.tokens > 0 and "layers run twice" in str(least)
    del forwards[:]
    with pytest.raises(
        ValueError, match=rf"takes {least.bytes:,} bytes, of {least.bytes - 1:,} that there are beside"
    ):
        measured(batches, held + least.bytes - 1)
    with pytest.raises(ValueError, match=rf"takes {kept:,} bytes, of {kept - 1:,} that there are, .* 3 blocks"):
        measured(batches, kept - 1)
    # One row was looked at, as it is and with layers that run twice.
    assert forwards == [1, 1]
    handle.remove()
    # What is drawn differs with the parts; in the same parts it is the same.
    again, _ = measured([b for batch in batches for b in rows_of(batch)])
    for block in blocks:
        assert functional.relative_error(again[block.name].matrix, twice[block.name].matrix) < 1e-5
        assert functional.relative_error(whole[block.name].matrix, parts[block.name].matrix) < 0.6
    assert model.training and all(module.training for module in model.modules())
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers and not any(vars(layer).get("gradient_checkpointing") for layer in layers)


def test_fewer_images_are_looked_at_than_there_is_memory_for():
    """They have no tokens that could be counted."""
    case = BY_NAME["vit"]
    model, batches = case.model(), batches_of(case)
    blocks = bind_blocks(model)
    whole, most = measure_metrics(Calibration.on(model, model, batches), blocks)
    one, kept = sum(bytes_of(batches).values()) // 32, sum(bytes_of_metrics(blocks).values())
    # Half of what is left may go to them.
    metrics, report = measure_metrics(Calibration.on(model, model, batches, kept + 2 * 16 * one), blocks)
    assert (most.rows, report.rows) == (32, 16) and metrics.keys() == whole.keys()


def test_looking_at_what_a_row_takes_keeps_nothing():
    """Neither what the pass would keep, nor a second set of sums."""
    case = BY_NAME["bert"]
    model, batches = case.model(), batches_of(case)
    blocks = bind_blocks(model)
    engine = Calibration.on(model, model, batches)
    backward = []
    layer = blocks[1].down
    layer.register_forward_hook(lambda module, args, output: output.register_hook(backward.append) and None)
    needed, layers = _need_of_a_row(engine, blocks, batches[:1])
    assert not backward and not layers and sum(needed.values()) > 0
    measure_metrics(engine, blocks)
    assert len(backward) == len(batches)


def test_the_sums_of_wide_blocks_are_float32():
    generator = torch.Generator().manual_seed(0)
    block = bind_blocks(BY_NAME["bert"].model())[0]
    for width, dtype in ((16, torch.float64), (300, torch.float32)):
        grads = [torch.randn(50, width, generator=generator) * torch.arange(1, width + 1) for _ in range(8)]
        sums = _GradientSums()
        for grad in grads:
            sums.add(grad, None)
        found, whole = sums.finish(block, 100, 2), torch.cat(grads).double()
        expected = whole.T @ whole / 200
        shrinkage = functional.shrinkage(whole.T @ whole / 400, float(whole.square().sum(1).square().mean()), 400)
        assert found.matrix.dtype == dtype and found.shrunk().dtype == found.root().dtype == torch.float64
        assert functional.relative_error(expected, found.matrix.double()) < 1e-6
        assert found.shrinkage == pytest.approx(shrinkage, rel=1e-5) and 0 < shrinkage < 1


def rows_of(batch):
    count = len(next(iter(batch.values())))
    return [{name: value[index : index + 1] for name, value in batch.items()} for index in range(count)]


def test_a_layer_with_a_dropout_of_its_own_is_not_run_twice():
    """BART's layers ask whether they train: with checkpoints they would drop out at random."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.5}
    config = BartConfig(vocab_size=64, max_position_embeddings=32, pad_token_id=0, **sizes, **heads)
    model = BartForConditionalGeneration(config).eval()
    batches = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches_of(BY_NAME["bert"])]
    blocks = bind_blocks(model)
    _, report = measure_metrics(Calibration.on(model, model, batches), blocks)
    row = report.bytes // 8
    assert report.kind == "loss" and not report.checkpointed
    with pytest.raises(ValueError, match=rf"one row of the calibration data takes {row:,} bytes, of {row - 1:,} that"):
        measure_metrics(Calibration.on(model, model, batches, beside(blocks, batches)[0] + row - 1), blocks)


def test_gradients_that_are_not_finite_are_refused():
    case = BY_NAME["bert"]
    model = case.model()
    blocks = bind_blocks(model)

    def steep(module, args, output):
        return output + (output - output.detach()).abs().sqrt()  # the same, with a slope that is none

    handle = model.classifier.register_forward_hook(steep)
    with pytest.raises(ValueError, match=f"gradients that reach block {blocks[0].name} are not finite"):
        loss_metrics(model, model, blocks, batches_of(case))
    handle.remove()
    with torch.no_grad():
        model.classifier.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="BertForSequenceClassification predicts for the calibration data is not"):
        loss_metrics(model, model, blocks, batches_of(case))


def test_the_same_seed_gives_the_same_metric_and_padding_counts_for_nothing():
    case = BY_NAME["bert"]
    model, (batch,) = case.model(), batches_of(case, count=1)
    (block, *_) = bind_blocks(model)
    mask = torch.ones_like(batch["input_ids"])
    plain = loss_metrics(model, model, [block], [{**batch, "attention_mask": mask}])[block.name]
    padding = torch.zeros_like(mask[:, :3])
    padded = {
        "input_ids": torch.cat([batch["input_ids"], padding], dim=1),
        "attention_mask": torch.cat([mask, padding], dim=1),
    }
    again = loss_metrics(model, model, [block], [padded])[block.name]
    assert (plain.tokens, plain.predictions) == (again.tokens, again.predictions) == (mask.numel(), len(mask))
    assert torch.allclose(plain.matrix, again.matrix, rtol=1e-3, atol=1e-3 * float(plain.matrix.abs().max()))


@pytest.mark.parametrize("kind", ["embedding", "positions"])
def test_heads_without_classes(kind):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2
    )
    auto = AutoModel if kind == "embedding" else AutoModelForQuestionAnswering
    model = auto.from_config(config).eval()
    batches = batches_of(BY_NAME["bert"])
    blocks = bind_blocks(model)
    metrics = loss_metrics(model, model, blocks, batches)
    assert all(float(metric.matrix.trace()) > 0 for metric in metrics.values())
    found = predictions_of(model, batches[0], model(**batches[0]))
    assert [part.kind for part in found] == (["embedding"] if kind == "embedding" else ["classes", "classes"])
    # What is expected and what is measured are by prediction, of which an answer has two.
    predicted = sum(number_of(predictions_of(model, batch, model(**batch))) for batch in batches)
    assert {metric.predictions for metric in metrics.values()} == {predicted}
    assert predicted == (1 if kind == "embedding" else 2) * sum(len(batch["input_ids"]) for batch in batches)


def test_a_mean_of_many_tokens_in_half_precision():
    hidden, mask = torch.full((1, 2000, 4), 40.0, dtype=torch.float16), torch.ones(1, 2000)
    mask[0, 0] = 0
    given = {"last_hidden_state": hidden}
    for inputs in ({"attention_mask": mask}, {}):
        (found,) = predictions_of(torch.nn.Identity(), inputs, given)
        assert torch.equal(found.values, hidden[:, 0]) and found.values.dtype == torch.float16


def test_a_block_that_no_prediction_depends_on_is_named():
    case = BY_NAME["bert"]
    model = case.model()
    blocks = bind_blocks(model)

    def cut(module, args, output):
        return output.detach()

    handle = model.get_submodule(blocks[1].name).register_forward_hook(cut)
    with pytest.raises(ValueError, match=f"No gradient reaches block {blocks[0].name}"):
        loss_metrics(model, model, blocks, batches_of(case))
    handle.remove()


def test_segments_are_classes_of_each_place():
    logits = torch.randn(2, 3, 4, 5)
    (found,) = predictions_of(torch.nn.Identity(), {}, {"logits": logits})
    assert (found.kind, tuple(found.values.shape)) == ("classes", (40, 3))
    assert torch.equal(found.values[7], logits[0, :, 1, 2])


def test_outputs_that_are_no_predictions_are_refused():
    with pytest.raises(ValueError, match="nothing is known to be a prediction"):
        predictions_of(torch.nn.Identity(), {}, {"loss": torch.zeros(())})


@pytest.mark.parametrize("kind", ["classes", "labels", "values", "embedding"])
def test_the_sampled_score_has_the_curvature_of_the_divergence(kind):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 4, generator=generator, dtype=torch.float64).requires_grad_()
    reference = Predictions(kind, values.detach())

    def divergence(moved):
        return Predictions(kind, moved).divergence_from(reference).sum()

    curvature = torch.autograd.functional.hessian(divergence, values.detach()).reshape(4, 4)
    seen = 0.0
    draws = 20_000
    score = Predictions(kind, values.detach().expand(draws, 4).clone().requires_grad_())
    (grad,) = torch.autograd.grad(score.sampled_score(generator), score.values)
    seen = grad.T @ grad / draws
    assert functional.relative_error(curvature, seen) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_classes_are_drawn_in_parts_as_multinomial_draws_them(dtype, monkeypatch):
    monkeypatch.setattr(functional, "OUTPUTS", 150)
    torch.manual_seed(0)
    logits = (3 * torch.randn(20, 40)).to(dtype).requires_grad_()
    generator, other = (torch.Generator().manual_seed(7) for _ in range(2))
    for _ in range(2):
        values = logits.float()
        drawn = torch.multinomial(values.softmax(-1), 1, generator=other)
        expected = values.log_softmax(-1).gather(-1, drawn).sum()
        score = Predictions("classes", logits).sampled_score(generator)
        assert float(score.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        (grad,), (other_grad,) = (torch.autograd.grad(2 * each, logits) for each in (score, expected))
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, other_grad, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(generator.get_state(), other.get_state())


class Held(TorchDispatchMode):
    """The most bytes that tensors which are made inside take at a time."""

    def __init__(self):
        super().__init__()
        self.most, self.alive = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        given = {
            value.untyped_storage().data_ptr() for value in pytree.tree_leaves((args, kwargs)) if is_tensor(value)
        }
        for value in filter(is_tensor, pytree.tree_leaves(out)):
            storage = value.untyped_storage()
            if storage.data_ptr() not in given:
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.alive = {reference: count for reference, count in self.alive.items() if not reference.expired()}
        # MKL draws in float64, which is seen by nobody.
        drawing = 8 * out.numel() if func is torch.ops.aten.exponential_.default else 0
        self.most = max(self.most, sum(self.alive.values()) + drawing)
        return out


@pytest.mark.parametrize("scale", [None, 0.5], ids=["product", "scaled"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_counted_is_held_where_the_vocabulary_is_large(dtype, padded, scale, monkeypatch):
    monkeypatch.setattr(functional, "OUTPUTS", 2**13)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"vocab_size": 4000, "num_key_value_heads": 2, **sizes}
    model = LlamaForCausalLM(LlamaConfig(**config)) if scale is None else CohereForCausalLM(CohereConfig(**config))
    model = model.to(dtype).eval()
    batch = BY_NAME["gpt2"].inputs(batch=4, length=32)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1:, 20 if padded else 32 :] = 0
    engine = Calibration.on(model, model, [batch])
    with Held() as held:
        _, report = measure_metrics(engine, bind_blocks(model))
    assert report.rows == 4 and not report.checkpointed
    assert 0.7 * report.bytes < held.most < 1.05 * report.bytes, (held.most, report.bytes)


def test_shrinkage_is_small_for_many_rows_and_large_for_few():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    truth = root @ root.T

    def seen(rows):
        g = torch.randn(rows, 16, generator=generator, dtype=torch.float64) @ root.T
        matrix = g.T @ g / rows
        share = functional.shrinkage(matrix, float(g.square().sum(1).square().mean()), rows)
        return matrix, share

    few, many = seen(10), seen(10_000)
    assert 0 < many[1] < 0.01 < few[1] < 1
    assert functional.relative_error(truth, functional.shrunk(*few)) < functional.relative_error(truth, few[0])
    identity = torch.eye(4, dtype=torch.float64)
    assert functional.shrinkage(identity, 4.0, 10) == 1.0
    assert torch.allclose(functional.shrunk(few[0], 0.3).trace(), few[0].trace())


def test_psd_root():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    root = functional.psd_root(half @ half.T)
    assert torch.allclose(root @ root, half @ half.T) and torch.allclose(root, root.T)


def test_allocation_is_as_good_as_trying_everything():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        options = [[(float(c), float(v)) for c, v in torch.rand(5, 2, generator=generator)] for _ in range(4)]
        budget = 1.5
        (found,) = functional.allocate(options, [budget])
        every = torch.cartesian_prod(*[torch.arange(5)] * 4).tolist()
        costs = [sum(row[i][0] for row, i in zip(options, pick, strict=True)) for pick in every]
        values = [sum(row[i][1] for row, i in zip(options, pick, strict=True)) for pick in every]
        possible = [value for cost, value in zip(costs, values, strict=True) if cost <= budget]
        if found is None:
            assert not possible
            continue
        assert sum(row[i][0] for row, i in zip(options, found, strict=True)) <= budget
        # Costs are rounded up to 1 / 20,000 of the budget.
        tight = [v for c, v in zip(costs, values, strict=True) if c <= budget * (1 - 4 / 20_000)]
        assert min(possible) <= sum(row[i][1] for row, i in zip(options, found, strict=True)) <= min(tight)


def test_allocation_for_several_budgets_and_too_small_ones():
    options = [[(2.0, 0.0), (1.0, 5.0)], [(1.0, 1.0)]]
    assert functional.allocate(options, [1.5, 2.5, 3.5, 100.0]) == [None, [1, 0], [0, 0], [0, 0]]


def test_predictions_of_other_heads_are_not_compared():
    values = torch.zeros(4, 3)
    for kind, given in (("values", values), ("classes", values[:, :1]), ("classes", values[:1])):
        with pytest.raises(ValueError, match="both models must have the same head"):
            Predictions(kind, given).divergence_from(Predictions("classes", values))
