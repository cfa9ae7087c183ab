"""Blocks that keep only neurons: native modules with narrower linears, that go through everything once more."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments

from hf_layercollapse import (
    LayerCollapseConfig,
    LayerCollapseTrainer,
    apply_layer_collapse,
    collapse_model,
    create_model_card,
    find_feed_forward_blocks,
    linearity_map,
    plan_collapse,
    remove_layer_collapse,
)
from hf_layercollapse.blocks import bind_blocks, weight_and_bias
from hf_layercollapse.rows import hold_back

from .models import BY_NAME, HIDDEN, WIDTH, divergence
from .test_narrow import _MORE, CASES, collapsed, data_of, every_layout, relative
from .test_patching import alphas, logits, set_alphas


BERT, LLAMA, PHI3, OPT = BY_NAME["bert"], *_MORE[:3]
KEPT = 9


def cut(case, keep=KEPT, **kwargs):
    return collapsed(case, 0, keep, **kwargs)[0]


def table_of(model):
    return model.config.layer_collapse["modules"]


def in_parts(case, model):
    """The modules of every block."""
    return bind_blocks(model)


@every_layout
def test_only_the_widths_of_linears_change(case):
    """Module for module the native classes, no bias that the family does not have, and its own weights in front."""
    dense, model = case.model(), cut(case)
    assert [(name, type(module)) for name, module in dense.named_modules()][1:] == [
        (name, type(module)) for name, module in model.named_modules()
    ][1:]
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert {spec["type"] for spec in table_of(model).values()} == {"conv1d" if case.name == "gpt2" else "linear"}
    for before, after in zip(in_parts(case, dense), in_parts(case, model), strict=True):
        neurons = [(b, a) for b, a in zip(_ups(before), _ups(after), strict=True) if b is not None]
        for wide, narrow in neurons:
            assert narrow.shape[0] == KEPT
            assert all((wide == row).flatten(1).all(1).any() for row in narrow) if wide.dim() > 1 else True


def _ups(parts):
    """Weights and biases of what goes into the activation, and of what its output is multiplied by."""
    tensors = [*weight_and_bias(parts.up), *(weight_and_bias(parts.gate) if parts.gate is not None else ())]
    if not parts.layout.fused:
        return tensors
    return [half for tensor in tensors if tensor is not None for half in parts.layout.split(tensor, 0)]


@every_layout
def test_patched_restored_and_collapsed_again(case, tmp_path):
    model, inputs = cut(case), case.inputs(seed=77)
    before = logits(model, inputs)
    entries = dict(table_of(model))
    apply_layer_collapse(model, LayerCollapseConfig(granularity="neuron"))
    assert torch.equal(logits(model, inputs), before)
    assert [(block.state, block.hidden_features) for block in find_feed_forward_blocks(model)] == [
        ("patched", KEPT)
    ] * len(find_feed_forward_blocks(model))
    model.save_pretrained(tmp_path / "patched")
    loaded = case.auto_class.from_pretrained(tmp_path / "patched").eval()
    assert torch.equal(logits(loaded, inputs), before)

    remove_layer_collapse(loaded)
    assert table_of(loaded) == entries and torch.equal(logits(loaded, inputs), before)
    assert {block.state for block in find_feed_forward_blocks(loaded)} == {"collapsed"}

    set_alphas(model, 1.0)
    linear = logits(model, inputs)
    collapse_model(model)
    torch.testing.assert_close(logits(model, inputs), linear, rtol=1e-4, atol=1e-4)
    assert {block.hidden_features for block in find_feed_forward_blocks(model)} == {0}
    model.save_pretrained(tmp_path / "linear")
    assert torch.equal(
        logits(case.auto_class.from_pretrained(tmp_path / "linear").eval(), inputs), logits(model, inputs)
    )


@every_layout
def test_narrowed_again(case, tmp_path):
    model = cut(case)
    report = collapse_model(model, LayerCollapseConfig(rank=0, keep_neurons=4), data_of(case))
    assert {(block.kept_neurons, block.rank) for block in report.blocks} == {(4, 0)}
    assert {block.hidden_features for block in find_feed_forward_blocks(model)} == {4}
    narrow, _ = collapsed(case, 3, 2, model=model)
    assert {block.hidden_features for block in find_feed_forward_blocks(narrow)} == {2}
    narrow.save_pretrained(tmp_path)
    inputs = case.inputs(seed=77)
    loaded = case.auto_class.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(narrow, inputs))
    with pytest.raises(ValueError, match="collapsed already"):
        collapse_model(loaded, LayerCollapseConfig(rank=0, keep_neurons=1), data_of(case))
    with pytest.raises(ValueError, match="cannot be kept: it has 9"):
        collapse_model(cut(case), LayerCollapseConfig(rank=0, keep_neurons=10), data_of(case))


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=lambda case: case.name)
def test_planned_again(case):
    model = cut(case)
    data = data_of(case, 24)
    assert [block.name for block in linearity_map(model, data).blocks] == case.blocks()
    plan = plan_collapse(model, data, macs=0.6)
    collapse_model(model, plan=plan, calibration_data=data)
    assert sum(block.macs for block in find_feed_forward_blocks(model)) == plan.point.macs


def test_a_patched_block_gets_its_native_activation_back():
    model = BERT.model()
    apply_layer_collapse(model)
    set_alphas(model, 0.96)
    collapse_model(model, LayerCollapseConfig(rank=0, keep_neurons=KEPT), data_of(BERT))
    assert alphas(model) == [] and {spec["type"] for spec in table_of(model).values()} == {"linear"}
    assert type(model.bert.encoder.layer[0].intermediate.intermediate_act_fn).__name__ == "GELUActivation"


def test_the_papers_relu_is_not_native(tmp_path):
    model = BERT.model()
    apply_layer_collapse(model, LayerCollapseConfig.paper())
    set_alphas(model, 0.96)
    collapse_model(model, LayerCollapseConfig(rank=0, keep_neurons=KEPT), data_of(BERT))
    model.save_pretrained(tmp_path)
    loaded, inputs = BERT.auto_class.from_pretrained(tmp_path).eval(), BERT.inputs(seed=77)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert [block.can_collapse for block in find_feed_forward_blocks(loaded)] == [False] * 3


def test_counts_as_collapsed(tmp_path):
    model, report = collapsed(BERT, 0, KEPT)
    assert report.collapsed == BERT.blocks()
    card = str(create_model_card(model, report))
    assert f"{KEPT} neurons" in card and "rank 0" not in card and f"{KEPT} neurons" in str(create_model_card(model))
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"is collapsed \(3 of 3 blocks\)"):
        LayerCollapseTrainer(model, layer_collapse_config=LayerCollapseConfig(), args=arguments)


# ----------------------------------------------------------------------------------------------------
# The constant term
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [BERT, BY_NAME["gpt2"], LLAMA, PHI3], ids=lambda case: case.name)
@pytest.mark.parametrize(("rank", "keep"), [(0, KEPT), (3, 2)])
def test_no_constant_term_that_the_family_does_not_have(case, rank, keep):
    explained = []
    for option in ("native", "always"):
        model, report = collapsed(case, rank, keep, constant_term=option)
        downs = [block.path(block.layout.down) for block in find_feed_forward_blocks(model)]
        biases = [name for name in downs if f"{name}.bias" in model.state_dict()]
        wanted = case.name in ("bert", "gpt2") or option == "always" or rank > 0
        assert len(biases) == (len(report.blocks) if wanted else 0)
        explained.append([block.r2 for block in report.blocks])
    # With one more feature the fit explains as much or more, of other data but for what it explains by chance.
    assert all(low <= high + 0.01 for low, high in zip(*explained, strict=True))


def test_the_plan_counts_what_a_missing_constant_costs():
    model, data = LLAMA.model(), data_of(LLAMA, 24)
    options = {"macs": 0.4, "rank_shares": [0.0]}
    native, always = (
        plan_collapse(model, data, **options),
        plan_collapse(model, data, constant_term="always", **options),
    )
    assert (native.constant_term, always.constant_term) == ("native", "always")
    for plan in (native, always):
        applied = LLAMA.model()
        fitting, held_back = hold_back(data)
        collapse_model(applied, plan=type(plan).from_dict(plan.to_dict()), calibration_data=fitting)
        has = {name.endswith("down_proj.bias") for name, _ in applied.named_parameters() if "down_proj" in name}
        assert (True in has) == (plan is always)
        assert divergence(applied, model, held_back) == pytest.approx(plan.point.score, rel=1e-3)


def test_plans_of_version_1_keep_their_constant():
    plan = plan_collapse(LLAMA.model(), data_of(LLAMA, 24), macs=0.5, rank_shares=[0.0])
    values = {key: value for key, value in plan.to_dict().items() if key != "constant_term"}
    assert type(plan).from_dict({**values, "version": 1}).constant_term == "always"
    with pytest.raises(ValueError, match="missing \\['constant_term'\\]"):
        type(plan).from_dict(values)
    with pytest.raises(ValueError, match="do not fit"):
        type(plan).from_dict({**values, "constant_term": "sometimes"})


# ----------------------------------------------------------------------------------------------------
# What reads native modules
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "targets"),
    [
        (BERT, ["query", "value", "dense"]),
        (OPT, ["q_proj", "fc1", "fc2"]),
        (LLAMA, ["gate_proj", "up_proj", "down_proj"]),
        (PHI3, ["gate_up_proj", "down_proj"]),
    ],
    ids=lambda value: value.name if value in CASES else None,
)
def test_lora_on_targets_by_name(case, targets):
    """The adapter config of the dense model applies."""
    model, inputs = cut(case), case.inputs(seed=5)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted, dense = get_peft_model(model, config), get_peft_model(case.model(), config)
    names = [{name for name, _ in one.named_parameters() if "lora_" in name} for one in (adapted, dense)]
    assert names[0] == names[1] and names[0]
    expected = logits(adapted, inputs)
    assert [block.state for block in find_feed_forward_blocks(adapted)] == ["collapsed"] * 3
    report = collapse_model(adapted, LayerCollapseConfig(rank=0, keep_neurons=KEPT), data_of(case, 30))
    assert {block.kept_neurons for block in report.blocks} == {KEPT}  # all of them: fitted to the merged weights
    assert relative(logits(model, inputs), expected) < 5e-2


def test_the_tensor_parallel_plan_stays(tmp_path):
    native, model = LLAMA.model(), cut(LLAMA)
    model.save_pretrained(tmp_path)
    for one in (model, LLAMA.auto_class.from_pretrained(tmp_path)):
        assert one.tp_plan == native.tp_plan and one.model.tp_plan == native.model.tp_plan
    # One plan is for all layers: a layer that became linear takes the others with it.
    collapse_model(model, LayerCollapseConfig(blocks=[0]), data_of(LLAMA))
    assert model.tp_plan == {key: style for key, style in native.tp_plan.items() if ".mlp." not in key}


@pytest.mark.parametrize("case", [BERT, LLAMA, OPT], ids=lambda case: case.name)
def test_compiled_as_one_graph(case):
    torch._dynamo.reset()
    model, inputs = cut(case), case.inputs(seed=5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(logits(compiled, inputs), logits(model, inputs))


# ----------------------------------------------------------------------------------------------------
# Plain torch, and code that cannot do with fewer neurons
# ----------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, HIDDEN), activation, nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class FixedWidth(Mlp):
    def forward(self, x):
        hidden = self.act(self.fc1(x)).reshape(-1, HIDDEN)
        return self.fc2(hidden).reshape(x.shape)


class Scaled(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x) * 0.5) * 3.0) * 0.25


class Net(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return x + self.mlp(x)


ROWS = [{"x": torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(seed))} for seed in range(4)]
KEEP_FIVE = LayerCollapseConfig(rank=0, keep_neurons=5)


def test_plain_torch_modules():
    for mlp in (
        Mlp(nn.GELU()),
        nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Dropout(), nn.ReLU(), nn.Linear(HIDDEN, 16)),
    ):
        net = Net(mlp)
        classes = [type(module) for module in net.modules()]
        assert collapse_model(net, KEEP_FIVE, ROWS).blocks[0].kept_neurons == 5
        assert [type(module) for module in net.modules()] == classes
        (block,) = find_feed_forward_blocks(net)
        assert (block.state, block.hidden_features, block.can_collapse) == ("collapsed", 5, True)
        collapse_model(net, LayerCollapseConfig(rank=0, keep_neurons=2), ROWS)
        assert find_feed_forward_blocks(net)[0].hidden_features == 2


def test_constants_in_the_code_go_on_to_multiply():
    net = Net(Scaled(nn.GELU()))
    report = collapse_model(net, LayerCollapseConfig(rank=0, keep_neurons=HIDDEN), ROWS).blocks[0]
    assert report.error < 1e-3 and report.calibration_error < 1e-3
    net = Net(Scaled(nn.GELU()))
    x = torch.cat([row["x"] for row in ROWS])
    before = net.mlp(x)
    report = collapse_model(net, LayerCollapseConfig(rank=0, keep_neurons=25), [{"x": x}]).blocks[0]
    # On other data the error is larger, by what is explained by chance.
    assert 1 <= report.calibration_error / relative(net.mlp(x), before) < 1.3


def test_code_that_needs_its_width_is_refused_first():
    net = Net(FixedWidth(nn.GELU()))
    before = {name: id(module) for name, module in net.named_modules()}
    with pytest.raises(ValueError, match="in its native module"):
        collapse_model(net, KEEP_FIVE, ROWS)
    assert {name: id(module) for name, module in net.named_modules()} == before
