"""Merging and replacing, for every model of the table. References are computed here, in float64, from the weights."""

import json

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_layercollapse import (
    CollapseReport,
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    functional,
    remove_layer_collapse,
)
from hf_layercollapse.blocks import bind_blocks
from hf_layercollapse.calibration import Calibration
from hf_layercollapse.functional import gaussian_inputs

from .models import BY_NAME, LAYERS, WIDTH, text_inputs
from .test_patching import (
    KnownLine,
    alphas,
    assert_unchanged,
    dtypes,
    every_model,
    logits,
    set_alphas,
    snapshot,
    trained_step,
)


def linears(model, case, index):
    """`(W1, b1, W2, b2, activation)` of a block, weights as `(out, in)`."""
    holder = model.get_submodule(case.blocks()[index])
    up = {"bert": "intermediate.dense", "vit": "fc1", "distilbert": "lin1", "gpt2": "c_fc"}
    up = up.get(case.name, "fc1" if case.down == "fc2" else "intermediate.dense")
    values = []
    for path in (up, case.down):
        linear = holder.get_submodule(path)
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        values += [weight.detach().clone(), linear.bias.detach().clone()]
    return (*values, holder.get_submodule(case.activation))


def collapsed_linear(model, case, index):
    linear = model.get_submodule(f"{case.blocks()[index]}.{case.down}")
    return (linear.weight.T if isinstance(linear, Conv1D) else linear.weight).detach(), linear.bias.detach()


def patched(case, config=None, alpha=1.0, dtype=torch.float32):
    model = case.model(dtype=dtype)
    config = config or LayerCollapseConfig()
    data = [case.inputs(seed=seed) for seed in range(3)] if config.linear_target == "affine" else None
    apply_layer_collapse(model, config, data)
    set_alphas(model, alpha)
    return model


def data_of(case, batches=20):
    return [case.inputs(seed=seed) for seed in range(batches)]


# ----------------------------------------------------------------------------------------------------
# Merging
# ----------------------------------------------------------------------------------------------------


@every_model
@dtypes
@pytest.mark.parametrize("target", ["identity", "affine"])
def test_the_merge_is_exact_at_alpha_one(case, target, dtype):
    model = patched(case, LayerCollapseConfig(linear_target=target), dtype=dtype)
    blocks = [linears(model, case, index) for index in range(LAYERS)]
    report = collapse_model(model)
    assert report.collapsed == case.blocks() and report.not_collapsed == []
    for index, (up, up_bias, down, down_bias, activation) in enumerate(blocks):
        slope, offset = activation.line

        def merged(convert, slope=slope, offset=offset, parts=(up, up_bias, down, down_bias)):
            w1, b1, w2, b2 = (convert(part) for part in parts)
            s, t = (convert(v) if isinstance(v, torch.Tensor) else v for v in (slope, offset))
            return (w2 * s) @ w1, w2 @ (s * b1 + t) + b2

        exact = merged(torch.Tensor.double)
        plain = merged(lambda tensor: tensor.to(dtype))
        for actual, expected, computed in zip(collapsed_linear(model, case, index), exact, plain, strict=True):
            assert actual.dtype == dtype and actual.shape == expected.shape
            assert (actual - expected).abs().max() <= 2 * (computed - expected).abs().max()


@every_model
@pytest.mark.parametrize("target", ["identity", "affine"])
@pytest.mark.parametrize("granularity", ["block", "neuron"])
def test_logits_at_alpha_one_stay_within_the_rounding_error(case, target, granularity):
    config = LayerCollapseConfig(linear_target=target, granularity=granularity)
    model, exact_model = patched(case, config), patched(case, config).double()
    # The largest error of a few numbers is a matter of luck, and of the processor: batches enough to tell.
    batches = [case.inputs(seed=seed) for seed in range(16)]

    def all_logits(model, dtype):
        cast = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]
        return torch.cat([logits(model, batch).flatten() for batch in cast])

    plain, exact = all_logits(model, torch.float32), all_logits(exact_model, torch.float64)
    collapse_model(model)
    error = max((plain - exact).abs().max(), torch.finfo(torch.float32).eps * exact.abs().max())
    assert (all_logits(model, torch.float32) - exact).abs().max() <= 2 * error


@every_model
@pytest.mark.parametrize("alpha", [0.97, 0.95])
@pytest.mark.parametrize("target", ["identity", "affine"])
def test_the_reported_error_is_the_true_one(case, alpha, target):
    model = patched(case, LayerCollapseConfig(linear_target=target), alpha)
    x = gaussian_inputs(WIDTH)
    expected = []
    for index in range(LAYERS):
        w1, b1, w2, b2, activation = linears(model, case, index)
        slope, offset = activation.line
        z = x.double() @ w1.double().T + b1.double()
        a = alpha * (slope * z + offset) + (1 - alpha) * activation.native(z)
        expected.append(a @ w2.double().T + b2.double())
    report = collapse_model(model)
    for index, block in enumerate(report.blocks):
        weight, bias = collapsed_linear(model, case, index)
        actual = x.double() @ weight.double().T + bias.double()
        error = (actual - expected[index]).norm() / expected[index].norm()
        assert block.error == pytest.approx(float(error), rel=1e-3) and block.error > 1e-4
        assert block.method == "merged" and block.alpha == pytest.approx(alpha)
        assert block.calibration_error is None and block.r2 is None


@every_model
def test_max_error_refuses_before_anything_changed(case):
    model, inputs = patched(case, alpha=0.96), case.inputs()
    errors = [block.error for block in collapse_model(patched(case, alpha=0.96)).blocks]
    outputs, before = logits(model, inputs), snapshot(model)
    for max_error in (0.0, min(errors) * 0.999, max(errors) * 0.999):
        with pytest.raises(ValueError, match="max_error"):
            collapse_model(model, max_error=max_error)
        assert_unchanged(model, before)
    with pytest.raises(ValueError, match="max_error"):
        collapse_model(model, calibration_data=data_of(case), max_error=1e-9)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, inputs), outputs)
    report = collapse_model(model, max_error=max(errors) * 1.001)
    assert report.collapsed == case.blocks()


@pytest.mark.parametrize("bad", [float("nan"), -0.1], ids=str)
def test_a_max_error_that_means_nothing(bad):
    model = patched(BY_NAME["bert"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="max_error"):
        collapse_model(model, max_error=bad)
    assert_unchanged(model, before)


@pytest.mark.parametrize("bad", ["0.1", [0.1], True], ids=str)
def test_a_max_error_of_a_wrong_type(bad):
    model = patched(BY_NAME["bert"])
    before = snapshot(model)
    with pytest.raises(TypeError, match="max_error"):
        collapse_model(model, max_error=bad)
    assert_unchanged(model, before)


# ----------------------------------------------------------------------------------------------------
# What stands there afterwards
# ----------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@every_model
def test_a_collapsed_model(case):
    model = patched(case)
    native_class, config = type(case.model()), model.config
    untouched = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not any(name.startswith(block) for block in case.blocks())
    }
    total = model.num_parameters()
    report = collapse_model(model)
    assert isinstance(report, CollapseReport)

    # The merged weight stands under the native key of the last linear, and the native class would refuse its shape.
    keys = {name for name in model.state_dict() if name.startswith(case.blocks()[0] + ".")}
    down = f"{case.blocks()[0]}.{case.down}"
    assert {f"{down}.weight", f"{down}.bias"} <= keys
    assert model.get_parameter(f"{down}.weight").shape == (WIDTH, WIDTH)
    assert not any("alpha" in name or "intermediate" in name or "fc1" in name or "c_fc" in name for name in keys)
    for name, value in untouched.items():
        assert torch.equal(model.state_dict()[name], value)

    for index, block in enumerate(find_feed_forward_blocks(model)):
        assert (block.name, block.index, block.state) == (case.blocks()[index], index, "collapsed")
        assert (block.in_features, block.hidden_features, block.out_features) == (WIDTH, 0, WIDTH)
        assert block.macs == WIDTH**2 and block.parameters == WIDTH**2 + WIDTH
        reported = report.blocks[index]
        assert (reported.macs_before, reported.macs_after) == (2 * WIDTH * case.hidden, WIDTH**2)
        assert reported.parameters_after == block.parameters
        assert reported.parameters_before == 2 * WIDTH * case.hidden + case.hidden + WIDTH
    assert report.parameters_after == model.num_parameters()
    # `total` counts the alphas.
    saved = sum(block.parameters_before - block.parameters_after for block in report.blocks)
    assert total - LAYERS - saved == model.num_parameters()
    assert report.parameters_before in (total, total - LAYERS)

    assert isinstance(model, native_class) and model.config is not config
    table = model.config.layer_collapse["modules"]
    assert {spec["type"] for spec in table.values()} == case.collapsed_kinds
    assert model.config.layer_collapse["version"] == 1
    assert model.name_or_path == model.config._name_or_path == ""
    assert json.loads(json.dumps(model.config.layer_collapse)) == model.config.layer_collapse


@every_model
def test_a_collapsed_model_trains(case):
    model = patched(case)
    collapse_model(model)
    loss, _, gradients = trained_step(model, case)
    assert torch.isfinite(loss)
    down = f"{case.blocks()[0]}.{case.down}"
    assert gradients[f"{down}.weight"].any() and gradients[f"{down}.bias"].any()
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_frozen_weights_are_kept(name, training):
    case = BY_NAME[name]
    model = patched(case).requires_grad_(False).train(training)
    collapse_model(model)
    assert all(module.training is training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["distilbert", "gpt2"])
def test_output_dropout_stays(name):
    case = BY_NAME[name]
    model, inputs = patched(case), case.inputs()
    collapse_model(model)
    block = model.get_submodule(case.blocks()[0])
    dropouts = [module for module in block.modules() if isinstance(module, nn.Dropout)]
    assert len(dropouts) == 1
    dropouts[0].p = 1.0
    block.train()
    assert not block(torch.randn(2, 3, WIDTH)).any()
    block.eval()
    assert block(torch.randn(2, 3, WIDTH)).any()
    logits(model, inputs)


@every_model
def test_the_random_state_is_left_alone(case):
    model = case.model()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    apply_layer_collapse(model)
    set_alphas(model, 0.98)
    collapse_model(model, calibration_data=data_of(case))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_report():
    case = BY_NAME["bert"]
    model = patched(case)
    with torch.no_grad():
        alphas(model)[1].fill_(0.4)
    report = collapse_model(model)
    text = str(report)
    lines = text.splitlines()
    assert [block.outcome for block in report.blocks] == ["collapsed", "kept", "collapsed"]
    assert report.not_collapsed == [case.blocks()[1]]
    for name in case.blocks():
        assert sum(line.startswith(name + " ") for line in lines) == 1
    assert "0.4000" in lines[3] and "kept" in lines[3]
    assert f"{report.parameters_before:,} -> {report.parameters_after:,}" in text and "2 of 3" in text
    assert len({len(line) for line in lines[:5]}) == 1, "columns do not align"
    values = json.loads(json.dumps(report.to_dict()))
    assert values["parameters_after"] == report.parameters_after
    assert [block["name"] for block in values["blocks"]] == case.blocks()


# ----------------------------------------------------------------------------------------------------
# Ready or not
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "ready"),
    [
        ([1.0, 0.95, 0.9499], [0, 1]),
        ([0.951, 0.0, 2.0], [0, 2]),
        ([float("nan"), 0.99, 0.5], [1]),
    ],
    ids=str,
)
def test_only_ready_blocks_collapse(values, ready):
    case = BY_NAME["bert"]
    model = patched(case)
    with torch.no_grad():
        for alpha, value in zip(alphas(model), values, strict=True):
            alpha.fill_(value)
    waiting = [index for index in range(LAYERS) if index not in ready]
    report = collapse_model(model)
    assert report.collapsed == [case.blocks()[index] for index in ready]
    states = [block.state for block in find_feed_forward_blocks(model)]
    assert [index for index, state in enumerate(states) if state == "collapsed"] == ready
    assert [index for index, state in enumerate(states) if state == "patched"] == waiting


def test_a_block_of_neurons_is_ready_when_merging_those_that_are_makes_it_smaller():
    case = BY_NAME["bert"]
    model = patched(case, LayerCollapseConfig(granularity="neuron"), 0.99)
    with torch.no_grad():
        alphas(model)[0][:7] = 0.9
        # 16 x 16 and 2 x 16 for each neuron that stays: with 32 of 40 as large as before.
        alphas(model)[1][:31] = 0.5
        alphas(model)[2][:32] = 0.5
    report = collapse_model(model)
    assert report.collapsed == case.blocks()[:2] and report.blocks[2].outcome == "kept"
    assert [block.kept_neurons for block in report.blocks] == [7, 31, 0]
    assert report.blocks[1].macs_after == 16 * 16 + 31 * 32 < report.blocks[1].macs_before


@every_model
def test_blocks_that_are_not_ready_are_kept(case):
    model, inputs = patched(case, alpha=1.0), case.inputs()
    with torch.no_grad():
        alphas(model)[1].fill_(0.3)
    expected, kept = logits(model, inputs), alphas(model)[1]
    collapse_model(model)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert len(alphas(model)) == 1 and alphas(model)[0] is kept
    kinds = {spec["type"] for spec in model.config.layer_collapse["modules"].values()}
    assert kinds == case.collapsed_kinds | {"activation"}
    # The rest collapses later.
    set_alphas(model, 1.0)
    expected = logits(model, inputs)
    report = collapse_model(model)
    assert report.collapsed == [case.blocks()[1]] and not alphas(model)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert {spec["type"] for spec in model.config.layer_collapse["modules"].values()} == case.collapsed_kinds
    assert [block.state for block in find_feed_forward_blocks(model)] == ["collapsed"] * LAYERS


@every_model
def test_blocks_that_are_not_ready_are_restored(case):
    config = LayerCollapseConfig(not_ready="restore")
    model = patched(case, config, alpha=1.0)
    with torch.no_grad():
        alphas(model)[1].fill_(0.3)
    native = alphas(model) and model.get_submodule(f"{case.blocks()[1]}.{case.activation}").native
    report = collapse_model(model)
    assert [block.outcome for block in report.blocks] == ["collapsed", "restored", "collapsed"]
    assert report.not_collapsed == [case.blocks()[1]]
    assert model.get_submodule(f"{case.blocks()[1]}.{case.activation}") is native
    assert not alphas(model)
    assert {spec["type"] for spec in model.config.layer_collapse["modules"].values()} == case.collapsed_kinds
    # And may be patched again, beside the collapsed ones.
    apply_layer_collapse(model)
    assert [block.state for block in find_feed_forward_blocks(model)] == ["collapsed", "patched", "collapsed"]
    remove_layer_collapse(model)
    assert [block.state for block in find_feed_forward_blocks(model)] == ["collapsed", "dense", "collapsed"]
    assert {spec["type"] for spec in model.config.layer_collapse["modules"].values()} == case.collapsed_kinds


@pytest.mark.parametrize("value", [0.0, 0.94, float("nan")])
def test_nothing_ready_is_an_error(value):
    case = BY_NAME["bert"]
    model = patched(case, alpha=value)
    before = snapshot(model)
    with pytest.raises(ValueError, match="No block is ready"):
        collapse_model(model)
    assert_unchanged(model, before)
    report = collapse_model(model, allow_none=True)
    assert report.collapsed == [] and report.not_collapsed == case.blocks()
    assert report.parameters_after == report.parameters_before
    assert [block.state for block in find_feed_forward_blocks(model)] == ["patched"] * LAYERS


def test_a_larger_threshold_takes_more_blocks():
    case = BY_NAME["bert"]
    report = collapse_model(patched(case, alpha=0.9), LayerCollapseConfig(collapse_threshold=0.1))
    assert report.collapsed == case.blocks()


def test_the_config_of_a_collapse_names_blocks_on_a_patched_model():
    case = BY_NAME["bert"]
    model = patched(case)
    report = collapse_model(model, LayerCollapseConfig(blocks=[2]))
    assert report.collapsed == [case.blocks()[2]]
    assert [block.state for block in find_feed_forward_blocks(model)] == ["patched", "patched", "collapsed"]
    before = snapshot(model)
    with pytest.raises(ValueError, match="blocks"):
        collapse_model(model, LayerCollapseConfig(blocks=[2]))
    assert_unchanged(model, before)


def test_the_options_of_a_patched_model_survive_a_collapse_with_other_options():
    case = BY_NAME["bert"]
    model = patched(case, LayerCollapseConfig(linear_target="affine", penalty_strength=3.0))
    with torch.no_grad():
        alphas(model)[0].fill_(0.9)
        alphas(model)[1].fill_(0.5)
    report = collapse_model(model, LayerCollapseConfig(collapse_threshold=0.2))
    assert report.collapsed == [case.blocks()[0], case.blocks()[2]]
    options = model.config.layer_collapse["options"]
    assert (options["linear_target"], options["penalty_strength"]) == ("affine", 3.0)


# ----------------------------------------------------------------------------------------------------
# Calibration data
# ----------------------------------------------------------------------------------------------------


def rows(model, case, index, data):
    """Inputs and outputs of a block on the data, float64."""
    holder, xs, ys = model.get_submodule(case.blocks()[index]), [], []
    first = next(
        module for module in holder.modules() if type(module) in (nn.Linear, Conv1D) and "query" not in str(module)
    )
    first = holder.get_submodule(
        {"gpt2": "c_fc", "distilbert": "lin1"}.get(case.name, "fc1" if case.down == "fc2" else "intermediate.dense")
    )
    handles = [
        first.register_forward_pre_hook(lambda m, args: xs.append(args[0].flatten(0, -2).double())),
        holder.get_submodule(case.down).register_forward_hook(
            lambda m, a, out: ys.append(out.flatten(0, -2).double())
        ),
    ]
    for batch in data:
        logits(model, batch)
    for handle in handles:
        handle.remove()
    return torch.cat(xs), torch.cat(ys)


def own_to_other(case, index, data):
    """By how much the error on other data exceeds that on the data a block of a fresh model is fitted to."""
    model = case.model()
    block = bind_blocks(model)[index]
    moments = Calibration.on(model, model, data).moments([block])[block.name]
    return functional.generalized(1.0, moments.tokens, moments.coefficients()) ** 0.5


@pytest.mark.smoke
@every_model
def test_a_dense_model_collapses_to_its_least_squares_maps(case):
    model, data = case.model(), data_of(case)
    inputs = case.inputs(seed=100)
    before = [logits(model, batch) for batch in data]
    x, y = rows(model, case, 1, data)
    features = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
    # Behind a layer norm one direction of the input is nothing but rounding noise.
    best = torch.linalg.lstsq(features, y, rcond=1e-4, driver="gelsd").solution
    residual = (features @ best - y).norm()

    report = collapse_model(model, LayerCollapseConfig(blocks=[1]), iter(data))
    assert report.collapsed == [case.blocks()[1]]
    (block,) = report.blocks
    assert block.method == "refit" and block.alpha is None
    weight, bias = collapsed_linear(model, case, 1)
    actual = (x @ weight.double().T + bias.double() - y).norm()
    assert actual <= residual * 1.001
    # What to expect on other data: the part that is explained by chance is taken off.
    expected = actual * own_to_other(case, 1, data)
    assert block.calibration_error == pytest.approx(float(expected / y.norm()), rel=1e-3)
    assert block.r2 == pytest.approx(float(1 - expected.square() / (y - y.mean(0)).square().sum()), rel=1e-3, abs=1e-3)
    after = [logits(model, batch) for batch in data]
    # On a sample of the rows.
    difference = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    assert 0.3 * difference < report.largest_logit_difference <= difference * (1 + 1e-5)
    states = [b.state for b in find_feed_forward_blocks(model)]
    assert states == ["dense", "collapsed", "dense"]
    assert logits(model, inputs).isfinite().all()
    assert model.config.layer_collapse["options"]["blocks"] == [case.blocks()[1]]


@pytest.mark.parametrize("name", ["bert", "gpt2", "distilbert", "vit"])
def test_a_block_that_is_linear_is_fitted_exactly(name):
    case = BY_NAME[name]
    model, inputs = case.model(), case.inputs(seed=100)
    for block in case.blocks():
        parent, _, child = f"{block}.{case.activation}".rpartition(".")
        model.get_submodule(parent)._modules[child] = KnownLine()
    before = logits(model, inputs)
    report = collapse_model(model, calibration_data=data_of(case))
    assert report.collapsed == case.blocks()
    for block in report.blocks:
        assert block.calibration_error < 1e-4 and block.r2 > 1 - 1e-6
    torch.testing.assert_close(logits(model, inputs), before, rtol=1e-3, atol=1e-3)


def test_with_data_a_patched_block_is_fitted_to_what_it_computes_now():
    case = BY_NAME["bert"]
    model, data = patched(case, alpha=0.96), data_of(case)
    with torch.no_grad():
        alphas(model)[0].fill_(1.0)
    x, y = rows(model, case, 1, data)
    before = [logits(model, batch) for batch in data]
    snapped = patched(case, alpha=0.96)
    collapse_model(snapped)
    report = collapse_model(model, calibration_data=data)
    assert [block.method for block in report.blocks] == ["merged", "refit", "refit"]
    weight, bias = collapsed_linear(model, case, 1)
    snapped_weight, snapped_bias = collapsed_linear(snapped, case, 1)
    fitted, snap = (
        (x @ w.double().T + b.double() - y).norm() for w, b in ((weight, bias), (snapped_weight, snapped_bias))
    )
    assert fitted < snap
    expected = float(fitted / y.norm()) * own_to_other(case, 1, data)
    assert report.blocks[1].calibration_error == pytest.approx(expected, rel=1e-3)
    assert report.blocks[0].calibration_error is None
    difference = max(float((logits(model, b) - a).abs().max()) for a, b in zip(before[:8], data[:8], strict=True))
    assert report.largest_logit_difference == pytest.approx(difference, rel=1e-5)


def test_padding_does_not_count():
    case = BY_NAME["bert"]

    def batch(seed, padding):
        inputs = text_inputs(batch=4, length=8, seed=seed)
        mask = torch.ones(4, 8, dtype=torch.long)
        mask[1:, 5:] = 0
        inputs["input_ids"][mask == 0] = padding
        return {**inputs, "attention_mask": mask}

    fitted = []
    for padding in (0, 9):
        model = case.model()
        report = collapse_model(model, calibration_data=[batch(seed, padding) for seed in range(10)])
        fitted.append((collapsed_linear(model, case, 2), [block.calibration_error for block in report.blocks]))
    torch.testing.assert_close(fitted[0], fitted[1], rtol=1e-4, atol=1e-5)


def test_data_is_read_once():
    case = BY_NAME["bert"]
    read = []

    def generator():
        for seed in range(20):
            read.append(seed)
            yield case.inputs(seed=seed)

    collapse_model(case.model(), calibration_data=generator())
    assert read == list(range(20))


def test_data_loader_and_labels():
    case = BY_NAME["bert"]
    examples = [{key: value[0] for key, value in case.batch(seed=seed).items()} for seed in range(40)]
    loader = torch.utils.data.DataLoader(examples, batch_size=8)
    model = case.model().train()
    report = collapse_model(model, calibration_data=loader)
    assert report.collapsed == case.blocks() and report.largest_logit_difference > 0.0
    assert all(module.training for module in model.modules())


# ----------------------------------------------------------------------------------------------------
# Wrapped
# ----------------------------------------------------------------------------------------------------


def test_a_compiled_model_stays_valid():
    torch._dynamo.reset()
    case = BY_NAME["bert"]
    model, inputs = patched(case), case.inputs()
    expected = patched(case)
    collapse_model(expected)
    compiled = torch.compile(model, backend="eager")
    logits(compiled, inputs)
    report = collapse_model(compiled)
    assert report.collapsed == case.blocks()
    assert torch.equal(logits(compiled, inputs), logits(expected, inputs))
    assert compiled.config.layer_collapse["modules"]


def test_adapters_are_merged_first():
    from peft import LoraConfig, get_peft_model

    case = BY_NAME["bert"]
    model = get_peft_model(
        case.model(), LoraConfig(task_type="SEQ_CLS", target_modules=["dense", "query"], init_lora_weights=False)
    ).eval()
    apply_layer_collapse(model, LayerCollapseConfig(adapters="refuse"))
    set_alphas(model, 1.0)
    before, inner = snapshot(model.get_base_model()), model.get_base_model()
    with pytest.raises(ValueError, match="merge_and_unload"):
        collapse_model(model)
    assert_unchanged(inner, before)
    expected = logits(model, case.inputs())
    merged = model.merge_and_unload()
    assert collapse_model(merged).collapsed == case.blocks()
    torch.testing.assert_close(logits(merged, case.inputs()), expected, rtol=1e-4, atol=1e-4)


def test_adapters_elsewhere_do_not_matter():
    from peft import LoraConfig, get_peft_model

    case = BY_NAME["bert"]
    model = get_peft_model(
        case.model(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    ).eval()
    apply_layer_collapse(model)
    set_alphas(model, 1.0)
    expected = logits(model, case.inputs())
    assert collapse_model(model).collapsed == case.blocks()
    torch.testing.assert_close(logits(model, case.inputs()), expected, rtol=1e-4, atol=1e-4)
    assert model.get_base_model().name_or_path == ""
