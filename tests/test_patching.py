"""Dense <-> patched, for every model of the table."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertConfig, BertForSequenceClassification, CLIPConfig, CLIPModel, PreTrainedConfig

from hf_layercollapse import (
    CollapsibleActivation,
    LayerCollapseConfig,
    apply_layer_collapse,
    find_feed_forward_blocks,
    remove_layer_collapse,
)

from .models import BY_NAME, CASES, LAYERS, WIDTH, randomize, text_inputs
from .test_modeling import saved_storages
from .training import enable_checkpointing


every_model = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def alphas(model):
    return [module.alpha for module in model.modules() if isinstance(module, CollapsibleActivation)]


def set_alphas(model, value):
    with torch.no_grad():
        for alpha in alphas(model):
            alpha.fill_(value)


def snapshot(model):
    """All that a call which raises must leave as it was."""
    return {
        "class": type(model),
        "config class": type(model.config),
        "config": model.config,
        "config contents": copy.deepcopy(model.config.__dict__),
        "name_or_path": model.name_or_path,
        "modules": [(name, module, type(module), module.training) for name, module in model.named_modules()],
        "parameters": [(name, p, p.dtype, p.requires_grad) for name, p in model.named_parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "state": {name: value.clone() for name, value in model.state_dict().items() if not value.is_meta},
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    for key in before.keys() - {"state", "modules", "parameters", "config"}:
        assert after[key] == before[key], key
    assert after["config"] is before["config"]
    for key in ("modules", "parameters"):
        assert len(after[key]) == len(before[key])
        for old, new in zip(before[key], after[key], strict=True):
            assert old[0] == new[0] and old[1] is new[1] and old[2:] == new[2:], old[0]
    assert before["state"].keys() == after["state"].keys()
    for name, value in before["state"].items():
        assert torch.equal(value, after["state"][name]) or (value.isnan() == after["state"][name].isnan()).all(), name


# ----------------------------------------------------------------------------------------------------
# Finding
# ----------------------------------------------------------------------------------------------------


@every_model
def test_blocks_are_found_in_forward_order(case):
    model = case.model()
    blocks = find_feed_forward_blocks(model)
    assert [block.name for block in blocks] == case.blocks()
    order = []
    for block in blocks:
        down = model.get_submodule(block.path(case.down))
        down.register_forward_hook(lambda *_, name=block.name: order.append(name))
    logits(model, case.inputs())
    assert order == [block.name for block in blocks]
    for index, block in enumerate(blocks):
        assert (block.index, block.kind, block.state, block.alpha) == (index, "plain", "dense", None)
        assert (block.in_features, block.hidden_features, block.out_features) == (WIDTH, case.hidden, WIDTH)
        assert block.macs == 2 * WIDTH * case.hidden
        assert block.parameters == 2 * WIDTH * case.hidden + case.hidden + WIDTH


@every_model
def test_patched_blocks_are_found_with_their_alpha(case):
    model = apply_layer_collapse(case.model(), LayerCollapseConfig(blocks=[1]))
    set_alphas(model, 0.25)
    blocks = find_feed_forward_blocks(model)
    assert [block.name for block in blocks] == case.blocks()
    assert [block.state for block in blocks] == ["dense", "patched", "dense"]
    assert [block.alpha for block in blocks] == [None, 0.25, None]
    assert blocks[1].macs == blocks[0].macs and blocks[1].parameters == blocks[0].parameters


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("all", range(12)),
        ("last:4", range(8, 12)),
        ("first:3", range(3)),
        ("first:12", range(12)),
        ([0, 5, 11], [0, 5, 11]),
        ([11, 0], [0, 11]),
        ([-1, -12], [0, 11]),
        (["bert.encoder.layer.10"], [10]),
        (["bert.encoder.layer.11", "bert.encoder.layer.1"], [1, 11]),
        (r"bert\.encoder\.layer\.1", [1]),
        (r"bert.encoder.layer.1", [1]),
        (r".*\.1", [1]),
        (r".*\.1\d", [10, 11]),
        (r".*layer\.([0-3]|11)", [0, 1, 2, 3, 11]),
    ],
    ids=str,
)
def test_selectors(selector, expected):
    config = BY_NAME["bert"].config()
    config.num_hidden_layers = 12
    model = BertForSequenceClassification(config)
    apply_layer_collapse(model, LayerCollapseConfig(blocks=selector))
    patched = [block.index for block in find_feed_forward_blocks(model) if block.state == "patched"]
    assert patched == sorted(expected)
    paths = {f"encoder.layer.{index}.intermediate.intermediate_act_fn" for index in expected}
    assert model.config.layer_collapse["modules"].keys() == paths


# ----------------------------------------------------------------------------------------------------
# Patching changes nothing
# ----------------------------------------------------------------------------------------------------


def trained_step(model, case):
    """Loss, logits and all gradients of one training step, dropout on."""
    model.train()
    torch.manual_seed(1)
    output = model(**case.batch())
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output.loss.detach(), output.logits.detach(), gradients


@pytest.mark.smoke
@every_model
@dtypes
@pytest.mark.parametrize("granularity", ["block", "neuron"])
def test_at_alpha_zero_every_bit_is_as_before(case, dtype, granularity):
    model, inputs = case.model(dtype=dtype), case.inputs()
    before, before_step = logits(model, inputs), trained_step(model, case)
    model.eval()
    assert apply_layer_collapse(model, LayerCollapseConfig(granularity=granularity)) is model
    assert len(alphas(model)) == LAYERS and not any(alpha.any() for alpha in alphas(model))
    assert not model.training and not any(module.training for module in model.modules())
    assert torch.equal(logits(model, inputs), before)

    loss, train_logits, gradients = trained_step(model, case)
    assert torch.equal(loss, before_step[0]) and torch.equal(train_logits, before_step[1])
    assert not torch.equal(train_logits, before), "dropout was off: the training step shows nothing"
    ours = {name: gradients.pop(name) for name in list(gradients) if name.endswith(".alpha")}
    assert len(ours) == LAYERS and all(grad.any() and grad.dtype == torch.float32 for grad in ours.values())
    assert gradients.keys() == before_step[2].keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, before_step[2][name]), name


@every_model
@dtypes
def test_affine_and_gate_targets_change_nothing_at_alpha_zero(case, dtype):
    model, inputs = case.model(dtype=dtype), case.inputs()
    before, before_step = logits(model, inputs), trained_step(model, case)
    model.eval()
    apply_layer_collapse(model, LayerCollapseConfig(linear_target="affine"), [case.inputs(seed=s) for s in range(3)])
    assert torch.equal(logits(model, inputs), before)
    loss, train_logits, gradients = trained_step(model, case)
    assert torch.equal(loss, before_step[0]) and torch.equal(train_logits, before_step[1])
    for name, gradient in before_step[2].items():
        assert torch.equal(gradients[name], gradient), name


@every_model
def test_alpha_is_not_idle(case):
    model, inputs = case.model(), case.inputs()
    before = logits(model, inputs)
    apply_layer_collapse(model)
    for alpha in alphas(model):
        with torch.no_grad():
            alpha.fill_(0.5)
        assert (logits(model, inputs) - before).abs().max() > 1e-4
        with torch.no_grad():
            alpha.zero_()


@every_model
def test_only_the_activations_are_exchanged(case):
    model = case.model()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    native_class, native_config = type(model), type(model.config)
    apply_layer_collapse(model, LayerCollapseConfig(blocks=[0, 2]))
    places = [f"{case.blocks()[index]}.{case.activation}" for index in (0, 2)]
    for name, module in model.named_modules():
        if name.removesuffix(".native") in places:
            continue
        assert module is modules[name], name
    for place in places:
        assert model.get_submodule(place).native is modules[place]
    new = {name: p for name, p in model.named_parameters() if name not in parameters}
    assert new.keys() == {f"{place}.alpha" for place in places}
    assert all(p.shape == (1,) and p.dtype == torch.float32 and p.requires_grad for p in new.values())
    for name, parameter in parameters.items():
        assert model.get_parameter(name) is parameter
    assert isinstance(model, native_class) and type(model) is not native_class
    assert type(model).__name__ == native_class.__name__
    assert isinstance(model.config, native_config)
    assert model.config.model_type == native_config.model_type == model.config.to_dict()["model_type"]


@every_model
@dtypes
def test_patch_and_remove_is_exactly_dense(case, dtype):
    model, inputs = case.model(dtype=dtype), case.inputs()
    before, before_step = logits(model, inputs), trained_step(model, case)
    model.eval()
    untouched = snapshot(model)
    config = model.config
    apply_layer_collapse(model)
    set_alphas(model, 0.7)
    assert not torch.equal(logits(model, inputs), before)
    assert remove_layer_collapse(model) is model
    assert type(model) is untouched["class"] and type(model.config) is untouched["config class"]
    assert model.config.to_json_string() == config.to_json_string()
    for (name, module, kind, training), (new_name, new_module, new_kind, new_training) in zip(
        untouched["modules"], snapshot(model)["modules"], strict=True
    ):
        assert (name, kind, training) == (new_name, new_kind, new_training) and module is new_module
    assert list(model.state_dict()) == list(untouched["state"])
    assert torch.equal(logits(model, inputs), before)
    after_step = trained_step(model, case)
    assert torch.equal(after_step[0], before_step[0])
    for name, gradient in before_step[2].items():
        assert torch.equal(after_step[2][name], gradient), name


def test_remove_keeps_the_training_mode():
    model = apply_layer_collapse(BY_NAME["bert"].model().train())
    assert all(module.training for module in model.modules())
    model.eval()
    model.train()
    remove_layer_collapse(model)
    assert all(module.training for module in model.modules())


def test_patching_again_after_removing():
    case = BY_NAME["gpt2"]
    model, inputs = case.model(), case.inputs()
    before = logits(model, inputs)
    for _ in range(3):
        apply_layer_collapse(model)
        remove_layer_collapse(model)
    assert torch.equal(logits(model, inputs), before)
    assert not isinstance(model.transformer.h[0].mlp.act, CollapsibleActivation)


# ----------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------


def test_initial_alpha_and_granularity():
    case = BY_NAME["bert"]
    model = apply_layer_collapse(case.model(), LayerCollapseConfig(granularity="neuron", initial_alpha=0.5))
    assert all(torch.equal(alpha, torch.full((case.hidden,), 0.5)) for alpha in alphas(model))


def test_the_papers_patch_is_prelu_with_slope_001():
    case = BY_NAME["bert"]
    model, reference = case.model(), case.model()
    for layer in reference.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.PReLU(1, init=0.01)
    config = LayerCollapseConfig.paper()
    assert (config.linear_target, config.granularity, config.initial_alpha) == ("identity", "block", 0.01)
    apply_layer_collapse(model, config)
    assert torch.equal(logits(model, case.inputs()), logits(reference, case.inputs()))
    _, _, gradients = trained_step(model, case)
    _, _, expected = trained_step(reference, case)
    for name, gradient in expected.items():
        if name.endswith("intermediate_act_fn.weight"):
            name = name.replace("weight", "alpha")
            torch.testing.assert_close(gradients[name], gradient)
        else:
            assert torch.equal(gradients[name], gradient), name
    remove_layer_collapse(model.eval())
    assert torch.equal(logits(model, case.inputs()), logits(case.model(), case.inputs()))


@every_model
def test_per_neuron_alphas_reach_their_neurons(case):
    model, inputs = case.model(), case.inputs()
    apply_layer_collapse(model, LayerCollapseConfig(granularity="neuron"))
    block = find_feed_forward_blocks(model)[0]
    activation = model.get_submodule(block.path(case.activation))
    assert activation.alpha.shape == (case.hidden,)
    seen = {}
    activation.register_forward_hook(lambda m, args, out: seen.update(z=args[0], out=out))
    with torch.no_grad():
        activation.alpha[3] = 1.0
    logits(model, inputs)
    torch.testing.assert_close(seen["out"][..., 3], seen["z"][..., 3])
    rest = torch.arange(case.hidden) != 3
    assert torch.equal(seen["out"][..., rest], activation.native(seen["z"])[..., rest])


class KnownLine(nn.Module):
    """An activation that is a line already."""

    def __init__(self, slope=0.7, offset=0.2):
        super().__init__()
        self.slope, self.offset = slope, offset

    def forward(self, z):
        return self.slope * z + self.offset


def test_the_affine_target_finds_known_lines():
    case = BY_NAME["bert"]
    model = case.model()
    lines = [KnownLine(0.7, 0.2), KnownLine(-1.3, 0.0), KnownLine(0.0, 2.0)]
    for line, layer in zip(lines, model.bert.encoder.layer, strict=True):
        layer.intermediate.intermediate_act_fn = line
    before = logits(model, case.inputs())
    apply_layer_collapse(
        model, LayerCollapseConfig(linear_target="affine"), iter([case.inputs(seed=s) for s in range(20)])
    )
    for line, layer in zip(lines, model.bert.encoder.layer, strict=True):
        activation = layer.intermediate.intermediate_act_fn
        assert activation.slope.dtype == activation.offset.dtype == torch.float32
        for found, known in ((activation.slope, line.slope), (activation.offset, line.offset)):
            torch.testing.assert_close(found, torch.full_like(found, known), rtol=1e-5, atol=1e-5)
    set_alphas(model, 1.0)
    torch.testing.assert_close(logits(model, case.inputs()), before, rtol=1e-4, atol=1e-5)


@every_model
def test_the_affine_target_is_the_regression_line_over_all_tokens(case):
    model, data = case.model(), [case.inputs(seed=s) for s in range(4)]
    pairs = {}
    handles = [
        model.get_submodule(f"{name}.{case.activation}").register_forward_hook(
            lambda m, args, out, name=name: pairs.setdefault(name, []).append(
                (args[0].flatten(0, -2), out.flatten(0, -2))
            )
        )
        for name in case.blocks()
    ]
    for batch in data:
        logits(model, batch)
    for handle in handles:
        handle.remove()
    model.train()
    apply_layer_collapse(model, LayerCollapseConfig(linear_target="affine"), data)
    assert all(module.training for module in model.modules()), "calibration left the model in evaluation mode"
    for name in case.blocks():
        z, a = (torch.cat(values).double() for values in zip(*pairs[name], strict=True))
        activation = model.get_submodule(f"{name}.{case.activation}")
        for neuron in (0, case.hidden - 1):
            features = torch.stack([z[:, neuron], torch.ones(len(z), dtype=torch.float64)], dim=1)
            slope, offset = torch.linalg.lstsq(features, a[:, neuron]).solution
            assert abs(activation.slope[neuron] - slope) < 1e-5 and abs(activation.offset[neuron] - offset) < 1e-5


def test_calibration_ignores_padding():
    case = BY_NAME["bert"]
    batch = text_inputs(batch=3, length=8)
    batch["attention_mask"] = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6])
    short = [
        {key: value[row : row + 1, : int(batch["attention_mask"][row].sum())] for key, value in batch.items()}
        for row in range(3)
    ]
    config = LayerCollapseConfig(linear_target="affine")
    padded, trimmed = (apply_layer_collapse(case.model(), config, data) for data in ([batch], short))
    for name, expected in trimmed.named_buffers():
        if name.endswith((".slope", ".offset")):
            torch.testing.assert_close(padded.get_buffer(name), expected, rtol=1e-4, atol=1e-5)


def test_calibration_counts_the_tokens_that_the_user_says():
    case, ids = BY_NAME["bert"], text_inputs(batch=3, length=16)["input_ids"]
    config = LayerCollapseConfig(linear_target="affine")

    def of_the_first(name, batch, shape):
        return (batch["input_ids"] == ids[0]).all(dim=1, keepdim=True).expand(shape)

    masked = apply_layer_collapse(case.model(), config, [{"input_ids": ids}], token_mask_fn=of_the_first)
    for name, expected in apply_layer_collapse(case.model(), config, [{"input_ids": ids[:1]}]).named_buffers():
        if name.endswith((".slope", ".offset")):
            torch.testing.assert_close(masked.get_buffer(name), expected, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------
# What else holds on to the model
# ----------------------------------------------------------------------------------------------------


def test_models_made_from_one_config_object_are_not_touched():
    case = BY_NAME["bert"]
    config = case.config()
    teacher, student, control = (case.model(seed=seed, config=config) for seed in range(3))
    contents = copy.deepcopy(config.__dict__)
    before = logits(teacher, case.inputs())
    apply_layer_collapse(student)
    assert teacher.config is control.config is config and student.config is not config
    assert type(config) is BertConfig and config.__dict__ == contents
    assert type(teacher) is type(control) is BertForSequenceClassification
    assert torch.equal(logits(teacher, case.inputs()), before)
    assert not alphas(teacher) and not alphas(control)
    held = {id(module.config) for module in student.modules() if "config" in module.__dict__}
    assert held == {id(student.config)}


def test_sub_configs_stay_shared_with_the_modules_that_use_them():
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
    vision = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    heads = {"num_attention_heads": 2, "projection_dim": 16}
    config = CLIPConfig(text_config=text | heads, vision_config=vision | heads, projection_dim=16)
    model, control = randomize(CLIPModel(config)), CLIPModel(config)
    contents = copy.deepcopy(config.to_dict())
    apply_layer_collapse(model)
    known = {id(model.config), id(model.config.text_config), id(model.config.vision_config)}
    assert {id(module.config) for module in model.modules() if "config" in module.__dict__} == known
    model.set_attn_implementation("eager")
    assert model.text_model.config._attn_implementation == "eager"
    old = {id(config), id(config.text_config), id(config.vision_config)}
    assert {id(module.config) for module in control.modules() if "config" in module.__dict__} == old
    assert config.to_dict() == contents


def test_name_or_path_no_longer_names_the_dense_folder(tmp_path):
    case = BY_NAME["bert"]
    case.model().save_pretrained(tmp_path / "dense")
    model = case.auto_class.from_pretrained(tmp_path / "dense")
    assert model.name_or_path == str(tmp_path / "dense")
    apply_layer_collapse(model)
    assert model.name_or_path == "" and model.config._name_or_path == "" and model.config.name_or_path == ""
    assert model.native_name_or_path == copy.deepcopy(model).native_name_or_path == str(tmp_path / "dense")
    model.save_pretrained(tmp_path / "patched")
    assert model.name_or_path == model.config._name_or_path == str(tmp_path / "patched")
    remove_layer_collapse(model)
    assert model.name_or_path == model.config._name_or_path == ""


@every_model
def test_optimizers_hold_the_same_parameters(case):
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    apply_layer_collapse(model)
    model(**case.batch()).loss.backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.endswith(f"{case.down}.weight") for name in changed)


def test_peft_models_are_looked_through_and_stay_valid():
    from peft import LoraConfig, PeftModel, get_peft_model

    case = BY_NAME["bert"]
    model = get_peft_model(
        case.model(), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "dense"], init_lora_weights=False)
    ).eval()
    before = logits(model, case.inputs())
    assert [block.name for block in find_feed_forward_blocks(model)] == case.blocks()
    assert apply_layer_collapse(model) is model
    assert isinstance(model, PeftModel) and isinstance(model.get_base_model(), BertForSequenceClassification)
    assert torch.equal(logits(model, case.inputs()), before)
    assert model.config is model.get_base_model().config and model.config.layer_collapse["modules"]
    assert model.get_base_model().name_or_path == ""
    assert len(alphas(model)) == LAYERS
    set_alphas(model, 0.5)
    model(**case.batch()).loss.backward()
    assert any(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    remove_layer_collapse(model)
    assert torch.equal(logits(model, case.inputs()), before)
    assert type(model.config) is BertConfig and type(model.get_base_model()) is BertForSequenceClassification


def test_lora_on_top_of_a_patched_model():
    from peft import LoraConfig, get_peft_model

    case = BY_NAME["bert"]
    patched = apply_layer_collapse(case.model())
    before = logits(patched, case.inputs())
    # peft finds its default targets by `model_type`, which has to be native.
    model = get_peft_model(patched, LoraConfig(task_type="SEQ_CLS", r=2)).eval()
    assert torch.equal(logits(model, case.inputs()), before)
    assert any("query" in name and "lora_" in name for name, _ in model.named_parameters())
    assert not any(alpha.requires_grad for alpha in alphas(model))
    merged = model.merge_and_unload()
    assert merged is patched and len(alphas(merged)) == LAYERS


def test_compiled_models_are_looked_through_and_stay_valid():
    torch._dynamo.reset()
    case = BY_NAME["bert"]
    model, inputs = case.model(), case.inputs()
    expected = {}
    for alpha in (0.0, 0.5):
        reference = apply_layer_collapse(case.model())
        set_alphas(reference, alpha)
        expected[alpha] = logits(reference, inputs)
    compiled = torch.compile(model, backend="eager")
    logits(compiled, inputs)
    assert apply_layer_collapse(compiled) is compiled
    assert torch.equal(logits(compiled, inputs), expected[0.0])
    set_alphas(model, 0.5)
    assert torch.equal(logits(compiled, inputs), expected[0.5])
    assert compiled.config.layer_collapse["modules"]
    remove_layer_collapse(compiled)
    assert torch.equal(logits(compiled, inputs), expected[0.0])


def test_a_plain_module_that_holds_a_model():
    class Tower(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, **inputs):
            return self.encoder(**inputs).last_hidden_state

    encoder = randomize(AutoModel.from_config(BY_NAME["bert"].config())).eval()
    tower = Tower(encoder)
    with torch.no_grad():
        before = tower(**text_inputs())
    assert [block.name for block in find_feed_forward_blocks(tower)][0] == "encoder.encoder.layer.0"
    assert apply_layer_collapse(tower) is tower and type(tower) is Tower
    assert len(alphas(tower)) == LAYERS
    with torch.no_grad():
        assert torch.equal(tower(**text_inputs()), before)
    remove_layer_collapse(tower)
    assert not alphas(tower)


# ----------------------------------------------------------------------------------------------------
# Compiled, checkpointed, shared, copied
# ----------------------------------------------------------------------------------------------------


def compiled_outputs(model, inputs, backend):
    """Output and gradients of a compiled model."""
    torch._dynamo.reset()
    output = torch.compile(model, backend=backend)(**inputs)
    output = output if isinstance(output, torch.Tensor) else output.logits
    output.square().sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_within_twice_the_dense_error(build, inputs, backend):
    exact_model = build().double()
    with torch.no_grad():
        exact = exact_model(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
    exact = exact if isinstance(exact, torch.Tensor) else exact.logits
    dense, dense_gradients = compiled_outputs(build(), inputs, backend)
    patched, gradients = compiled_outputs(apply_layer_collapse(build()), inputs, backend)
    # One unit in the last place, for where the compiled dense model happens to be exact.
    error = max((dense - exact).abs().max(), torch.finfo(torch.float32).eps * exact.abs().max())
    assert (patched - exact).abs().max() <= 2 * error
    assert sum(name.endswith(".alpha") and grad.any() for name, grad in gradients.items())
    for name, gradient in dense_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


one_of_each_layout = pytest.mark.parametrize("name", ["bert", "vit", "distilbert", "gpt2"])


@one_of_each_layout
def test_compiled_is_as_close_as_the_compiled_dense_model(name):
    case = BY_NAME[name]
    assert_within_twice_the_dense_error(case.model, case.inputs(), "aot_eager")


@pytest.fixture
def compiler():
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"torch.compile finds no C++ compiler: {error}")


class Block(nn.Module):
    """One feed-forward block of a BERT and nothing else."""

    def __init__(self):
        super().__init__()
        layer = BY_NAME["bert"].model().bert.encoder.layer[0]
        self.intermediate, self.output = layer.intermediate, layer.output

    def forward(self, x):
        return self.output(self.intermediate(x), x)


def test_a_block_compiled_to_native_code(compiler):
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    assert_within_twice_the_dense_error(lambda: Block().eval(), {"x": x}, "inductor")


@pytest.mark.slow
@one_of_each_layout
def test_compiled_to_native_code(name, compiler):
    case = BY_NAME[name]
    assert_within_twice_the_dense_error(case.model, case.inputs(), "inductor")


@pytest.mark.smoke
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
def test_gradient_checkpointing(name, use_reentrant):
    case = BY_NAME[name]
    models = [apply_layer_collapse(case.model()) for _ in range(2)]
    for model in models:
        set_alphas(model, 0.3)
    enable_checkpointing(models[1], use_reentrant=use_reentrant)
    calls = []
    first = models[1].get_submodule(f"{case.blocks()[0]}.{case.activation}")
    first.register_forward_hook(lambda *_: calls.append(1))
    models[1].enable_input_require_grads()
    steps = [trained_step(model, case) for model in models]
    assert len(calls) == 2, "nothing was checkpointed"
    assert torch.equal(steps[0][0], steps[1][0])
    assert steps[0][2].keys() == steps[1][2].keys()
    for gradient_name, gradient in steps[0][2].items():
        assert torch.equal(gradient, steps[1][2][gradient_name]), gradient_name


def test_a_block_that_is_used_twice_has_one_alpha():
    def shared():
        model = BY_NAME["bert"].model()
        model.bert.encoder.layer[2] = model.bert.encoder.layer[0]
        return model

    inputs = text_inputs()
    dense = logits(shared(), inputs)
    model = apply_layer_collapse(shared(), LayerCollapseConfig(blocks=[1]))
    assert torch.equal(logits(model, inputs), dense)


@every_model
def test_the_whole_model_keeps_no_more_for_backward(case):
    config = case.config()
    if case.name == "distilbert":
        config.activation = "gelu"  # native ReLU keeps only its output, which the next linear keeps anyway
    model, batch = case.model(config=config), case.batch()

    def kept():
        storages, output = saved_storages(lambda: model(**batch).loss)
        del output
        return sum(storages.values())

    dense = kept()
    apply_layer_collapse(model)
    # Four bytes of alpha a block.
    assert kept() <= dense + 4 * LAYERS


@every_model
def test_deepcopy_and_pickle(case):
    import pickle

    model = apply_layer_collapse(case.model())
    set_alphas(model, 0.5)
    expected = logits(model, case.inputs())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model) and type(copied.config) is type(model.config)
        assert copied.config is not model.config and copied.config.to_dict() == model.config.to_dict()
        assert torch.equal(logits(copied, case.inputs()), expected)
        set_alphas(copied, 0.0)
        remove_layer_collapse(copied)
        assert torch.equal(logits(model, case.inputs()), expected)
    assert isinstance(copy.deepcopy(model.config), PreTrainedConfig)


@pytest.mark.parametrize("convert", ["bfloat16", "half", "to"])
def test_alpha_keeps_every_bit_when_the_model_changes_its_dtype(convert):
    model = apply_layer_collapse(BY_NAME["bert"].model(), LayerCollapseConfig(linear_target="affine"), [text_inputs()])
    set_alphas(model, 0.987654)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model = model.to(torch.bfloat16) if convert == "to" else getattr(model, convert)()
    for name, value in model.state_dict().items():
        if name.endswith((".alpha", ".slope", ".offset")):
            assert value.dtype == torch.float32 and torch.equal(value, before[name]), name
        elif value.is_floating_point():
            assert value.dtype == (torch.float16 if convert == "half" else torch.bfloat16), name
    assert model.dtype == (torch.float16 if convert == "half" else torch.bfloat16)
    assert logits(model, text_inputs()).isfinite().all()


def test_training_under_autocast():
    case = BY_NAME["bert"]
    dense, patched = case.model(), apply_layer_collapse(case.model())
    steps = []
    for model in (dense, patched):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            steps.append(trained_step(model, case))
    assert torch.equal(steps[0][1], steps[1][1])
    for name, gradient in steps[0][2].items():
        assert torch.equal(gradient, steps[1][2][name]), name
