"""Recovery: it brings a collapsed model closer to the dense one without labels, or leaves it as it was."""

import copy
import weakref
from collections.abc import Sequence

import peft
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForQuestionAnswering, BertConfig

from hf_layercollapse import (
    CalibrationData,
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    predictions,
    recover_model,
    recovery,
)
from hf_layercollapse.patching import alpha_parameters
from hf_layercollapse.rows import hold_back

from .models import BY_NAME, divergence


def batches_of(case, count=16, batch=8):
    return [case.inputs(batch=batch, seed=seed) for seed in range(count)]


def collapsed(case, blocks="all", dtype=torch.float32):
    """A dense model, and one whose blocks became the identity target's maps: much is left to gain."""
    dense = case.model(dtype=dtype)
    model = apply_layer_collapse(copy.deepcopy(dense), LayerCollapseConfig(blocks=blocks, initial_alpha=1.0))
    collapse_model(model)
    return dense, model


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
def test_it_brings_the_model_closer_to_the_dense_one_on_other_data(name):
    case = BY_NAME[name]
    batches, others = batches_of(case), [case.inputs(batch=8, seed=seed) for seed in range(100, 108)]
    dense, model = collapsed(case)
    before = divergence(model, dense, others)
    report = recover_model(model, dense, batches, max_steps=60, learning_rate=2e-3)
    assert divergence(model, dense, others) < 0.8 * before
    assert report.after < report.before and report.unit == "nats" and 0 < report.best_step <= report.steps <= 60
    # What is reported is what the model now does on the rows held aside.
    held = hold_back(batches)[1]
    assert report.after == pytest.approx(divergence(model, dense, held), rel=1e-4)
    assert str(report.held_aside) in str(report).replace(",", "") and "kept" in str(report)


def test_only_what_wants_gradients_is_trained_and_all_else_is_as_it_was():
    case = BY_NAME["bert"]
    batches = batches_of(case)
    dense, model = collapsed(case, blocks=[0])
    model.train()
    teacher = {name: value.clone() for name, value in dense.state_dict().items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    recover_model(model, dense, batches, max_steps=12, learning_rate=1e-2)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, kept[name])}
    assert changed and all("classifier" in name for name in changed)
    assert all(torch.equal(value, teacher[name]) for name, value in dense.state_dict().items())
    assert model.training and not dense.training and torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_alphas_stay():
    case = BY_NAME["bert"]
    batches = batches_of(case)
    dense = case.model()
    model = apply_layer_collapse(copy.deepcopy(dense), LayerCollapseConfig(initial_alpha=0.5))
    recover_model(model, dense, batches, max_steps=6, learning_rate=1e-3)
    assert all(float(alpha.detach()) == 0.5 for alpha in alpha_parameters(model))


def test_what_does_not_gain_on_rows_held_aside_is_not_kept():
    case = BY_NAME["bert"]
    batches = batches_of(case)
    dense, model = collapsed(case, blocks=[0])
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    report = recover_model(model, dense, batches, max_steps=30, learning_rate=10.0)
    assert (report.best_step, report.after) == (0, report.before)
    assert report.steps < 30  # given up early
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_what_is_lost_at_the_highest_rate_may_come_back_as_it_falls():
    """Measured at its worst in the middle of the run, which goes on to its end."""
    case = BY_NAME["bert"]
    dense = case.model()
    model = copy.deepcopy(dense)
    with torch.no_grad():  # a little off, so that steps of this size first lead away
        for parameter in model.parameters():
            parameter.add_(7e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    report = recover_model(model, dense, batches_of(case), max_steps=60, learning_rate=1.5e-3)
    values = [held for _, _, held in report.curve]
    assert min(values[1:4]) > values[0] > report.after and report.steps == 60


def test_the_same_seed_gives_the_same_weights():
    case = BY_NAME["bert"]
    batches = batches_of(case)
    dense, first = collapsed(case)
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    recover_model(first, dense, batches, max_steps=8, learning_rate=1e-3)
    torch.manual_seed(5)
    recover_model(second, dense, iter(batches), max_steps=8, learning_rate=1e-3)
    recover_model(third, dense, batches, max_steps=8, learning_rate=1e-3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))


def rows_of_steps(model, *arguments, **options):
    """How many rows the model is given in each step of a recovery."""
    rows = []
    handle = model.register_forward_pre_hook(
        lambda _, args, given: rows.append(len(given["input_ids"])) if torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    recover_model(model, *arguments, **options)
    handle.remove()
    return rows


def test_rows_are_put_together_in_steps_of_one_size():
    """However many are held aside of the batches that the data were made in; batches that were given stay."""
    dense, model = collapsed(BY_NAME["bert"])
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 64, (5,), generator=generator).tolist()} for _ in range(96)]
    data = CalibrationData(rows, model=dense)
    counts = rows_of_steps(model, dense, data, max_steps=6)
    assert sorted(counts[:3]) == sorted(counts[3:]) == [8, 32, 32]
    assert sorted(rows_of_steps(model, dense, data, max_steps=8, batch_size=10)) == [2, *[10] * 7]
    given = rows_of_steps(model, dense, list(data), max_steps=12)
    assert sum(given) == 72 and max(given) <= 8
    with pytest.raises(ValueError, match="come in batches.*pass batches of that size"):
        recover_model(model, dense, list(data), batch_size=10)


def test_rows_of_a_step():
    """Fewer where they are long, and fewer of a model that predicts each token."""
    bert, gpt2 = BY_NAME["bert"].model(), BY_NAME["gpt2"].model()
    assert [recovery.step_rows(bert, tokens) for tokens in (0, 20, 512, 9000)] == [32, 32, 8, 1]
    assert [recovery.step_rows(gpt2, tokens) for tokens in (7, 64, 512, 2048)] == [32, 16, 2, 1]


class Lazy(Sequence):
    """Batches that are made when they are asked for."""

    def __init__(self, made, count=16):
        self.made, self.count = made, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        return self.made(index)


@pytest.mark.parametrize("form", ["list", "loader"])
def test_data_that_can_be_read_again_are_not_held(form):
    """And come in the order of the same seed, whatever they are in."""
    case, alive, most = BY_NAME["bert"], weakref.WeakSet(), []
    dense, model = collapsed(case)
    other = copy.deepcopy(model)
    batches = batches_of(case)

    def made(index):
        batch = {name: value.clone() for name, value in batches[index].items()}
        alive.add(batch["input_ids"])
        most.append(len(alive))
        return batch

    data = Lazy(made)
    if form == "loader":
        data = DataLoader(range(16), collate_fn=lambda indices: made(indices[0]))
    reports = [recover_model(each, dense, of, max_steps=20) for each, of in ((model, data), (other, batches))]
    assert max(most) <= 3 and reports[0].curve == reports[1].curve
    assert reports[0].predictions == reports[1].predictions
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_data_that_change_between_steps():
    case, calls = BY_NAME["bert"], []
    batches = batches_of(case, 40)

    def made(index):
        calls.append(index)
        return batches[index if len(calls) <= 40 else index + 16]

    dense, model = collapsed(case)
    with pytest.raises(ValueError, match="data changes: batch .* has other rows"):
        recover_model(model, dense, Lazy(made), max_steps=20)


def test_data_in_an_order_of_their_own():
    """A loader of somebody's own class is read from its beginning in each epoch."""

    class Loader(DataLoader):
        pass

    case = BY_NAME["bert"]
    dense, model = collapsed(case)
    data = Loader(batches_of(case), collate_fn=lambda found: found[0])
    report = recover_model(model, dense, data, max_steps=40, learning_rate=2e-3, top_k=1)
    assert report.after < report.before and report.predictions + report.held_aside == 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_below_half_precision_add_up(dtype):
    """Numbers of bfloat16 at 0.2 are eight times as far apart as one step; all come to as much as in float32."""
    case = BY_NAME["bert"]
    batches = batches_of(case)
    dense, model = collapsed(case, dtype=dtype)
    options = {"max_steps": 30, "learning_rate": 1e-4}
    expected = recover_model(copy.deepcopy(model).float(), copy.deepcopy(dense).float(), batches, **options)
    report = recover_model(model, dense, batches, **options)
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {dtype}
    assert expected.before - expected.after > 0.01 * expected.before
    assert report.before - report.after == pytest.approx(expected.before - expected.after, rel=0.1)


def test_under_autocast_every_step_sees_the_weights_as_they_are():
    """autocast keeps casts of weights until its context ends: a run inside one would go by those it began with."""
    case = BY_NAME["bert"]
    batches = batches_of(case)
    dense, model = collapsed(case)
    with torch.autocast("cpu", torch.bfloat16):
        report = recover_model(model, dense, batches, max_steps=40, learning_rate=2e-3)
    held = hold_back(batches)[1]
    assert report.after < 0.8 * report.before
    assert divergence(model, dense, held) == pytest.approx(report.after, rel=0.1)


def test_the_largest_classes_stand_for_all():
    case = BY_NAME["gpt2"]
    batches = batches_of(case)
    dense, model = collapsed(case)
    same = copy.deepcopy(model)
    whole = recover_model(model, dense, batches, max_steps=20, learning_rate=1e-3)
    calls = []
    handle = dense.register_forward_hook(lambda *_: calls.append(1))
    part = recover_model(same, dense, batches, max_steps=20, learning_rate=1e-3, top_k=60)
    handle.remove()
    fitting, held = hold_back(batches)
    assert len(calls) == len(list(fitting)) + len(held)  # once each, whatever the steps
    # A little less than the whole divergence, and nearly the same gain.
    assert 0.8 * whole.before < part.before <= whole.before + 1e-6
    assert divergence(same, dense, batches) < whole.before


@pytest.mark.parametrize("auto, unit", [(AutoModel, "cosine distance"), (AutoModelForQuestionAnswering, "nats")])
def test_heads_without_classes(auto, unit):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    dense = auto.from_config(BertConfig(vocab_size=64, **sizes)).eval()
    batches = batches_of(BY_NAME["bert"])
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in model.encoder.parameters() if auto is AutoModel else model.bert.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    report = recover_model(model, dense, batches, max_steps=40, learning_rate=2e-3)
    assert report.unit == unit and report.after < 0.9 * report.before


def test_an_adapter_is_what_is_trained():
    case = BY_NAME["bert"]
    batches = batches_of(case)
    dense, model = collapsed(case)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query", "value"]))
    report = recover_model(adapted, dense, batches, max_steps=30, learning_rate=5e-3)
    assert report.after < report.before
    unloaded = adapted.unload()
    assert all(torch.equal(value, base[name]) for name, value in unloaded.state_dict().items())


class Copies(TorchFunctionMode):
    """Shapes of tensors that are copied or cast."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.to, torch.Tensor.float, torch.Tensor.clone):
            self.shapes.add(args[0].shape)
        return func(*args, **(kwargs or {}))


def test_a_frozen_base_in_half_precision_stays_that_and_is_not_copied():
    case = BY_NAME["bert"]
    dense, model = collapsed(case, dtype=torch.bfloat16)
    frozen = model.get_input_embeddings().weight
    base = {name: value.clone() for name, value in model.state_dict().items()}
    # The head, which peft trains beside the adapter, is in half precision as well.
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    adapted, types = peft.get_peft_model(model, config), set()
    adapted.register_forward_pre_hook(
        lambda *_: types.update(p.dtype for p in model.parameters() if not p.requires_grad)
    )
    with Copies() as copies:
        report = recover_model(adapted, dense, batches_of(case), max_steps=30, learning_rate=5e-3)
    assert types == {torch.bfloat16} and frozen.shape not in copies.shapes
    assert report.after < report.before
    assert all(
        torch.equal(value, base[name])
        for name, value in adapted.unload().state_dict().items()
        if "classifier" not in name
    )


def _interrupt_at(model, call):
    calls = []

    def hook(module, args, output):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    return model.register_forward_hook(hook)


def test_an_interrupted_recovery_leaves_the_model_as_it_was():
    case = BY_NAME["bert"]
    batches = batches_of(case)
    dense, model = collapsed(case, dtype=torch.bfloat16)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    handle = _interrupt_at(model, 10)
    with pytest.raises(KeyboardInterrupt):
        recover_model(model, dense, batches, max_steps=20, learning_rate=1e-2)
    handle.remove()
    after = model.state_dict()
    assert all(torch.equal(value, kept[name]) and value.dtype == kept[name].dtype for name, value in after.items())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_bad_input_is_refused_and_changes_nothing():
    case = BY_NAME["bert"]
    batches = batches_of(case)
    dense, model = collapsed(case, blocks=[0])
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    config = case.config()
    config.num_labels = 5
    other = case.model(config=config)
    for arguments, error, message in (
        ((model, batches), ValueError, "is the model itself"),
        (("dense", batches), TypeError, "must be a model, got str"),
        ((other, batches), ValueError, r"must have the same head"),
        ((dense, []), ValueError, "calibration data is empty"),
        ((dense, [[1]] * 8), ValueError, "dicts of tensors"),
        ((dense, [{"pixel_values": torch.full((1, 3, 8, 8), float(i))} for i in range(8)]), ValueError, "input_ids"),
    ):
        with pytest.raises(error, match=message):
            recover_model(model, *arguments, max_steps=4)
    renamed = copy.deepcopy(dense)
    model.config.id2label, renamed.config.id2label = ({i: f"{w}{i}" for i in range(3)} for w in ("a", "b"))
    with pytest.raises(ValueError, match=r"The teacher's classes are \['b0', 'b1', 'b2'\], and the model's \['a0'"):
        recover_model(model, renamed, batches, max_steps=4)
    beyond = [{"input_ids": batch["input_ids"] + 1000} for batch in batches]
    for data in (beyond, [*batches[:12], *beyond]):
        with pytest.raises(ValueError, match=r"a BertForSequenceClassification, cannot take a batch .*input_ids"):
            recover_model(model, dense, data, max_steps=20)
    for values, error in (
        ({"max_steps": 0}, ValueError),
        ({"max_steps": 1.5}, TypeError),
        ({"learning_rate": 0}, ValueError),
        ({"learning_rate": "1"}, TypeError),
        ({"top_k": 0}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(values))):
            recover_model(model, dense, batches, **values)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        recover_model(model, dense, batches, max_steps=4)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was():
    case = BY_NAME["bert"]
    batches = batches_of(case)
    dense, model = collapsed(case, blocks=[0])
    broken = copy.deepcopy(dense)
    with torch.no_grad():
        broken.classifier.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="is nan"):
        recover_model(model, broken, batches, max_steps=4)


def test_reduced_divergences_are_a_lower_bound():
    generator = torch.Generator().manual_seed(0)
    now, then = (predictions.Predictions("classes", 3 * torch.randn(50, 30, generator=generator)) for _ in range(2))
    whole = now.divergence_from(then)
    for k in (1, 5, 28):
        part = recovery._Largest.of(then, k).divergence(now)
        assert (part <= whole + 1e-5).all() and (part >= 0).all()
    assert torch.allclose(recovery._Largest.of(then, 28).divergence(now), whole, rtol=0.05, atol=1e-3)
