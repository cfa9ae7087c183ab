"""What is refused, and that the model is the same afterwards: every module, weight, hook, class and config."""

import warnings

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

from hf_layercollapse import (
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    remove_layer_collapse,
)

from .models import BY_NAME, text_inputs
from .test_patching import assert_unchanged, set_alphas, snapshot
from .test_saving_loading import in_life


BERT, VIT = BY_NAME["bert"], BY_NAME["vit"]
AFFINE = LayerCollapseConfig(linear_target="affine")


def refuses(call, kind, match, model):
    """`call()` raises and leaves the model as it is."""
    before = snapshot(model)
    with pytest.raises(kind, match=match):
        call()
    assert_unchanged(model, before)


def ready(case=BERT):
    model = apply_layer_collapse(case.model())
    set_alphas(model, 1.0)
    return model


# ----------------------------------------------------------------------------------------------------
# Which blocks
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "named"),
    [
        (["bert.encoder.layer.3"], "bert.encoder.layer.3"),
        (["encoder.layer.0"], "encoder.layer.0"),
        (["bert.encoder.layer.0", "bert.encoder.layer.1 "], "bert.encoder.layer.1 "),
        (["bert.encoder"], "bert.encoder"),
        ([3], r"\[3\].*0 to 2"),
        ([0, -4], r"\[-4\]"),
        ("first:4", "first:4.*3 blocks"),
        ("last:99", "last:99.*3 blocks"),
        (r"encoder\.layer\.1", "in full"),
        (r"bert\.encoder\.layer\.", "in full"),
        (r"bert\.encoder\.layer\.1\d", "in full"),
        ("decoder", "decoder"),
    ],
    ids=str,
)
def test_unknown_blocks(blocks, named):
    model = BERT.model()
    config = LayerCollapseConfig(blocks=blocks)
    data = [text_inputs(seed=seed) for seed in range(9)]
    refuses(lambda: apply_layer_collapse(model, config), ValueError, named, model)
    refuses(lambda: collapse_model(model, config, data), ValueError, named, model)


@pytest.mark.parametrize("config", ["all", {"blocks": "all"}, 3, LayerCollapseConfig], ids=str)
def test_a_config_that_is_none(config):
    model = BERT.model()
    refuses(lambda: apply_layer_collapse(model, config), TypeError, "LayerCollapseConfig", model)
    refuses(lambda: collapse_model(model, config, [text_inputs()]), TypeError, "LayerCollapseConfig", model)


# ----------------------------------------------------------------------------------------------------
# In which life
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("life", ["patched", "half"])
def test_patching_twice(life):
    model = in_life(BERT, life)
    refuses(lambda: apply_layer_collapse(model), ValueError, "patched already.*remove_layer_collapse", model)


def test_alphas_that_an_adapter_holds():
    """peft's `modules_to_save` puts a wrapper with two copies where the activation was."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["intermediate_act_fn"])
    model = get_peft_model(ready(), lora)
    inner = model.get_base_model()
    refuses(lambda: apply_layer_collapse(model), ValueError, "patched already", inner)
    refusing = LayerCollapseConfig(adapters="refuse")
    refuses(lambda: collapse_model(model, refusing), ValueError, "merge_and_unload", inner)
    refuses(lambda: remove_layer_collapse(model), ValueError, "merge_and_unload", inner)
    merged = model.merge_and_unload()
    assert [block.state for block in find_feed_forward_blocks(merged)] == ["patched"] * 3
    assert len(collapse_model(merged).collapsed) == 3


@pytest.mark.parametrize("life", ["dense", "collapsed"])
def test_removing_what_is_not_there(life):
    model = BERT.model() if life == "dense" else in_life(BERT, life)
    refuses(lambda: remove_layer_collapse(model), ValueError, "not patched", model)


def test_patching_what_is_collapsed():
    model = in_life(BERT, "collapsed")
    refuses(lambda: apply_layer_collapse(model), ValueError, "collapsed already", model)
    model = remove_layer_collapse(in_life(BERT, "half"))
    config = LayerCollapseConfig(blocks=[0, 1])
    refuses(lambda: apply_layer_collapse(model, config), ValueError, r"collapsed already.*layer\.1", model)
    apply_layer_collapse(model, LayerCollapseConfig(blocks="all"))
    assert [block.state for block in find_feed_forward_blocks(model)] == ["patched", "collapsed", "patched"]


def test_collapsing_a_dense_model_without_data():
    model = BERT.model()
    refuses(lambda: collapse_model(model), ValueError, "calibration_data.*apply_layer_collapse", model)


def test_collapsing_what_is_collapsed():
    model = in_life(BERT, "collapsed")
    refuses(lambda: collapse_model(model, calibration_data=[text_inputs()]), ValueError, "collapsed already", model)


def test_nothing_ready():
    model = apply_layer_collapse(BERT.model())
    refuses(lambda: collapse_model(model), ValueError, "No block is ready.*0.05", model)


def test_affine_needs_data():
    model = BERT.model()
    refuses(lambda: apply_layer_collapse(model, AFFINE), ValueError, "calibration_data", model)


# ----------------------------------------------------------------------------------------------------
# Which models
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bert", None, {}, BERT.config(), BertForSequenceClassification], ids=repr)
def test_what_is_no_model(model):
    for call in (apply_layer_collapse, remove_layer_collapse, collapse_model, find_feed_forward_blocks):
        with pytest.raises(TypeError, match="nn.Module"):
            call(model)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Module(), nn.Sequential(nn.Linear(2, 2), nn.ReLU())], ids=str)
def test_models_with_no_block(model):
    assert find_feed_forward_blocks(model) == []
    with pytest.raises(ValueError, match="no feed-forward block"):
        apply_layer_collapse(model)
    with pytest.raises(ValueError, match="no feed-forward block"):
        collapse_model(model, calibration_data=[{"input": torch.zeros(2, 2)}])
    with pytest.raises(ValueError, match="not patched"):
        remove_layer_collapse(model)


class Int8Linear(nn.Linear):
    """As weight-only quantization leaves a Linear."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scale = linear.weight.detach().abs().max() / 127
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class PackedLinear(nn.Linear):
    """As 4-bit quantization leaves a Linear: two numbers to a byte."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


class ScaledLinear(nn.Linear):
    """Floating-point weights, but not what `weight` and `bias` say."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())

    def forward(self, x):
        return 2 * super().forward(x)


class Subclassed(torch.Tensor):
    """As torchao's quantized tensors are."""


def exchange(model, make):
    layer = model.bert.encoder.layer[1]
    layer.output.dense = make(layer.output.dense)


def quantize_dynamically(model):
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no quantization engine here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def subclass_weights(model):
    dense = model.bert.encoder.layer[1].output.dense
    dense.weight = nn.Parameter(dense.weight.detach().as_subclass(Subclassed))


def tie(model):
    first, second = (model.bert.encoder.layer[index].output.dense for index in (0, 1))
    second.weight = first.weight


def tie_bias(model):
    first, second = (model.bert.encoder.layer[index].intermediate.dense for index in (0, 1))
    second.bias = first.bias


BROKEN = {
    "int8": (lambda model: exchange(model, Int8Linear), "layer.1.output.dense.*quantized.*int8"),
    "packed": (lambda model: exchange(model, PackedLinear), "layer.1"),
    "scaled": (lambda model: exchange(model, ScaledLinear), "layer.1.output.dense.*ScaledLinear"),
    "subclass": (subclass_weights, "layer.1.output.dense.*Subclassed"),
    "meta": (lambda model: model.to("meta"), "meta device"),
    "tied": (tie, r"layer\.\d\.output\.dense.*tied"),
    "tied-bias": (tie_bias, r"layer\.\d\.intermediate\.dense.*tied"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_weights_that_cannot_be_used(broken):
    breaks, match = BROKEN[broken]
    model = BERT.model()
    breaks(model)
    config = LayerCollapseConfig(blocks=[0, 1])
    if broken == "packed":  # no longer chains with the linear before it, so it is no block at all
        config = LayerCollapseConfig(blocks=["bert.encoder.layer.0", "bert.encoder.layer.1"])
    refuses(lambda: apply_layer_collapse(model, config), ValueError, match, model)
    data = [text_inputs(seed=seed) for seed in range(9)]
    refuses(lambda: collapse_model(model, config, data), ValueError, match, model)


@pytest.mark.parametrize("broken", sorted(BROKEN.keys() - {"packed"}))
def test_weights_that_cannot_be_merged(broken):
    breaks, match = BROKEN[broken]
    model = ready()
    breaks(model)
    refuses(lambda: collapse_model(model), ValueError, match, model)


def test_weight_norm_is_merged_with_the_rest():
    model, plain = ready(), ready()
    nn.utils.parametrizations.weight_norm(model.bert.encoder.layer[1].output.dense)
    collapse_model(model)
    collapse_model(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_dynamically_quantized():
    model = BERT.model()
    quantize_dynamically(model)
    refuses_plainly = pytest.raises(ValueError, match="block|quantized")
    with refuses_plainly:
        apply_layer_collapse(model)
    assert type(model) is BertForSequenceClassification and "layer_collapse" not in model.config.__dict__


def test_an_activation_that_is_no_module():
    model = BERT.model()
    for layer in model.bert.encoder.layer:
        del layer.intermediate.intermediate_act_fn
        layer.intermediate.intermediate_act_fn = nn.functional.gelu
    refuses(lambda: apply_layer_collapse(model), ValueError, "not a module", model)
    # One among others: the others can be patched, it cannot be asked for.
    model = BERT.model()
    del model.bert.encoder.layer[1].intermediate.intermediate_act_fn
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.functional.gelu
    config = LayerCollapseConfig(blocks=["bert.encoder.layer.1"])
    refuses(lambda: apply_layer_collapse(model, config), ValueError, "bert.encoder.layer.1 is refused", model)


# ----------------------------------------------------------------------------------------------------
# Wrapped and sharded
# ----------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def refused_wrapped(wrapped, inner, match):
    for call in (apply_layer_collapse, remove_layer_collapse, collapse_model, find_feed_forward_blocks):
        refuses(lambda call=call: call(wrapped), TypeError, match, inner)


def test_data_parallel():
    model = ready()
    refused_wrapped(nn.DataParallel(model), model, "DataParallel.*before")


def test_distributed_data_parallel(process_group):
    model = ready()
    refused_wrapped(nn.parallel.DistributedDataParallel(model), model, "DistributedDataParallel.*before")


def test_fully_sharded(process_group):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = fully_shard(ready(), mesh=mesh)
    refused_wrapped(model, model, "FSDP")
    # Only the layers.
    for model, call in ((BERT.model(), apply_layer_collapse), (ready(), collapse_model)):
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        refuses(lambda call=call, model=model: call(model), TypeError, "sharded", model)


# ----------------------------------------------------------------------------------------------------
# Calibration data
# ----------------------------------------------------------------------------------------------------


def generator():
    yield from ()


def breaks_off():
    yield text_inputs()
    raise RuntimeError("the disk is gone")


BAD_DATA = {
    "empty-list": ([], ValueError, "empty"),
    "empty-generator": (generator, ValueError, "empty"),
    "empty-loader": (torch.utils.data.DataLoader([]), ValueError, "empty"),
    "number": (3, TypeError, "iterable"),
    "one-batch": (text_inputs(), ValueError, "this is one batch"),
    "strings": (["good film"], ValueError, "got a str"),
    "tensors": ([text_inputs()["input_ids"]], ValueError, "Tensor"),
    "lists": ([[text_inputs()["input_ids"]]], ValueError, "list"),
    "numbers": ([1, 2], ValueError, "int"),
    "nones": ([None], ValueError, "None"),
    "no-inputs": ([{}], ValueError, None),
    "unknown-inputs": ([{"pixel_values": torch.zeros(1, 3, 8, 8)}], (TypeError, ValueError), None),
    "breaks-off": (breaks_off, RuntimeError, "disk"),
}


@pytest.mark.parametrize("data", BAD_DATA)
def test_bad_calibration_data(data):
    values, kind, match = BAD_DATA[data]

    def fresh():
        return values() if callable(values) else values

    model = BERT.model()
    refuses(lambda: apply_layer_collapse(model, AFFINE, fresh()), kind, match, model)
    refuses(lambda: collapse_model(model, calibration_data=fresh()), kind, match, model)
    # Also where it would only be measured on.
    model = ready()
    refuses(lambda: collapse_model(model, calibration_data=fresh()), kind, match, model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 5, 19])
def test_calibration_data_that_is_not_finite(value, where):
    data = [VIT.inputs(seed=seed) for seed in range(20)]
    data[where]["pixel_values"][0, 0, 0, 0] = value
    model = VIT.model()
    refuses(lambda: apply_layer_collapse(model, AFFINE, data), ValueError, "not finite", model)
    refuses(lambda: collapse_model(model, calibration_data=data), ValueError, "not finite", model)
    model = apply_layer_collapse(VIT.model())
    set_alphas(model, 0.96)
    refuses(lambda: collapse_model(model, calibration_data=data), ValueError, "not finite", model)
    if where < 8:
        model = ready(VIT)
        refuses(lambda: collapse_model(model, calibration_data=data), ValueError, "not finite", model)


def test_too_few_tokens():
    model = BERT.model()
    data = [text_inputs(batch=2, length=8)]  # 16 tokens, 16 features and a constant
    refuses(lambda: collapse_model(model, calibration_data=data), ValueError, "16 calibration tokens.*22", model)
    padded = {**text_inputs(batch=3, length=8), "attention_mask": torch.ones(3, 8, dtype=torch.long)}
    padded["attention_mask"][2] = 0
    refuses(lambda: collapse_model(model, calibration_data=[padded]), ValueError, "16 calibration tokens", model)


def test_nothing_but_padding():
    model = BERT.model()
    data = [{**text_inputs(), "attention_mask": torch.zeros(2, 7, dtype=torch.long)}]
    refuses(lambda: apply_layer_collapse(model, AFFINE, data), ValueError, "No calibration token|not finite", model)


def test_a_plan_that_is_none():
    model = ready()
    refuses(lambda: collapse_model(model, plan={"bert.encoder.layer.0": 1}), TypeError, "CollapsePlan", model)
