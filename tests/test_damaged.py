"""Folders that are damaged, mixed, hostile or from the future: an error that names the entry, never another model."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from hf_layercollapse import collapse_model

from .models import BY_NAME
from .test_patching import alphas, logits, set_alphas
from .test_saving_loading import in_life


CASE = BY_NAME["bert"]
ACTIVATION = "encoder.layer.0.intermediate.intermediate_act_fn"
LINEAR = "encoder.layer.1.output.dense"
IDENTITY = "encoder.layer.1.intermediate.dense"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Half-collapsed models of three layouts."""
    root = tmp_path_factory.mktemp("folders")
    for name in ("bert", "vit", "gpt2", "distilbert"):
        in_life(BY_NAME[name], "half").save_pretrained(root / name)
    return root


@pytest.fixture
def folder(folders, tmp_path):
    return shutil.copytree(folders / "bert", tmp_path / "bert")


def edit(folder, change):
    """Applies `change` to the content of config.json."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // 4)
        return result


def assert_refused(folder, *named, config_loads=None):
    """Loading raises a ValueError that names what is wrong, through every road, and allocates nothing large.

    Args:
        config_loads: Whether AutoConfig accepts it, so that the model has to refuse; `None` if either may.
    """
    with Largest() as largest:
        for load in (AutoModelForSequenceClassification.from_pretrained, AutoModel.from_pretrained):
            with pytest.raises(ValueError) as error:
                load(folder)
            for part in named:
                assert part in str(error.value), str(error.value)
        try:
            config = AutoConfig.from_pretrained(folder)
        except ValueError as error:
            assert not config_loads, str(error)
            for part in named:
                assert part in str(error), str(error)
        else:
            assert config_loads is not False, "AutoConfig did not see it"
            with pytest.raises(ValueError) as error:
                AutoModelForSequenceClassification.from_config(config)
            for part in named:
                assert part in str(error.value), str(error.value)
    assert largest.numel < 2**19


# ----------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------


def spec(path, **changes):
    """Changes an entry; a value of `...` takes the key out."""

    def change(content):
        entry = content["layer_collapse"]["modules"][path]
        for key, value in changes.items():
            if value is ...:
                entry.pop(key)
            else:
                entry[key] = value

    return change


def put(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def drop(*keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def entry(path, value):
    return put("layer_collapse", "modules", path, value=value)


BIG = 2**20
CONFIG_DAMAGE = {
    # what the file says about itself
    "no-table": (drop("layer_collapse"), ["layer_collapse"]),
    "table-null": (put("layer_collapse", value=None), ["layer_collapse"]),
    "table-list": (put("layer_collapse", value=[]), ["layer_collapse"]),
    "table-string": (put("layer_collapse", value="all"), ["layer_collapse"]),
    "no-version": (drop("layer_collapse", "version"), ["layer_collapse.version"]),
    "future-version": (
        put("layer_collapse", "version", value=2),
        ["version 2", "a newer version of hf_layercollapse"],
    ),
    "version-string": (put("layer_collapse", "version", value="1"), ["layer_collapse.version", "'1'"]),
    "version-bool": (put("layer_collapse", "version", value=True), ["layer_collapse.version"]),
    "version-float": (put("layer_collapse", "version", value=1.0), ["layer_collapse.version"]),
    "version-zero": (put("layer_collapse", "version", value=0), ["layer_collapse.version"]),
    "version-list": (put("layer_collapse", "version", value=[1]), ["layer_collapse.version"]),
    "options-list": (put("layer_collapse", "options", value=[]), ["layer_collapse.options"]),
    "options-string": (put("layer_collapse", "options", value="x"), ["layer_collapse.options"]),
    "options-null": (put("layer_collapse", "options", value=None), ["layer_collapse.options"]),
    "no-modules": (drop("layer_collapse", "modules"), ["layer_collapse.modules"]),
    "modules-empty": (put("layer_collapse", "modules", value={}), ["layer_collapse.modules"]),
    "modules-list": (
        put("layer_collapse", "modules", value=[[LINEAR, {"type": "identity"}]]),
        ["layer_collapse.modules"],
    ),
    "too-many": (
        put("layer_collapse", "modules", value={f"encoder.x{i}": {"type": "identity"} for i in range(100_001)}),
        ["layer_collapse.modules", "100001"],
    ),
    # base_model_type
    "no-base": (drop("base_model_type"), ["base_model_type"]),
    "base-unknown": (put("base_model_type", value="bert-from-2031"), ["base_model_type", "bert-from-2031"]),
    "base-ours": (put("base_model_type", value="layercollapse"), ["base_model_type"]),
    "base-number": (put("base_model_type", value=3), ["base_model_type", "3"]),
    "base-list": (put("base_model_type", value=["bert"]), ["base_model_type"]),
    "base-null": (put("base_model_type", value=None), ["base_model_type"]),
    # paths
    **{
        f"path-{path!r}": (entry(path, {"type": "identity"}), [repr(path)])
        for path in (
            "",
            ".",
            "encoder.",
            ".encoder",
            "encoder..layer",
            "__class__",
            "encoder.__class__",
            "encoder.__dict__.layer",
            "_modules.encoder",
            "encoder._modules.layer",
            "encoder.layer.0._x",
            "encoder/layer",
            "encoder.layer[0]",
            "encoder layer",
            "encoder.layer.-1",
            "encoder\n",
            ".".join(["encoder"] * 33),
        )
    },
    # entries
    "entry-null": (entry(LINEAR, None), [LINEAR]),
    "entry-string": (entry(LINEAR, "identity"), [LINEAR]),
    "entry-list": (entry(LINEAR, ["identity"]), [LINEAR]),
    "kind-unknown": (spec(LINEAR, type="bilinear"), [LINEAR, "bilinear"]),
    "kind-later": (entry(LINEAR, {"type": "narrow_ffn", "linear_channels": 4}), [LINEAR, "narrow_ffn"]),
    "kind-missing": (spec(LINEAR, type=...), [LINEAR, "type"]),
    "kind-null": (spec(LINEAR, type=None), [LINEAR, "type"]),
    "kind-list": (spec(LINEAR, type=["linear"]), [LINEAR, "type"]),
    "kind-object": (spec(LINEAR, type={"a": 1}), [LINEAR, "type"]),
    "kind-class": (spec(LINEAR, type="torch.nn.Linear"), [LINEAR, "torch.nn.Linear"]),
    "unknown-key": (spec(LINEAR, dtype="float32"), [LINEAR, "dtype"]),
    "identity-with-keys": (spec(IDENTITY, width=3), [IDENTITY, "width"]),
    "scope-unknown": (spec(LINEAR, scope="global"), [LINEAR, "scope"]),
    "scope-list": (spec(LINEAR, scope=["model"]), [LINEAR, "scope"]),
    # values
    "no-in": (spec(LINEAR, in_features=...), [LINEAR, "in_features"]),
    "in-zero": (spec(LINEAR, in_features=0), [LINEAR, "in_features"]),
    "in-negative": (spec(LINEAR, in_features=-16), [LINEAR, "in_features"]),
    "in-float": (spec(LINEAR, in_features=16.0), [LINEAR, "in_features"]),
    "in-bool": (spec(LINEAR, in_features=True), [LINEAR, "in_features"]),
    "in-string": (spec(LINEAR, in_features="16"), [LINEAR, "in_features"]),
    "in-absurd": (spec(LINEAR, in_features=2**40), [LINEAR, "in_features"]),
    "out-absurd": (spec(LINEAR, out_features=10**30), [LINEAR, "out_features"]),
    "no-bias": (spec(LINEAR, bias=...), [LINEAR, "bias"]),
    "bias-number": (spec(LINEAR, bias=1), [LINEAR, "bias"]),
    "act-unknown": (spec(ACTIVATION, act="os.system"), [ACTIVATION, "act"]),
    "act-null": (spec(ACTIVATION, act=None), [ACTIVATION, "act"]),
    "act-list": (spec(ACTIVATION, act=["gelu"]), [ACTIVATION, "act"]),
    "target-unknown": (spec(ACTIVATION, linear_target="cubic"), [ACTIVATION, "linear_target"]),
    "target-list": (spec(ACTIVATION, linear_target=["affine"]), [ACTIVATION, "linear_target"]),
    "alpha-number": (spec(ACTIVATION, alpha_shape=1), [ACTIVATION, "alpha_shape"]),
    "alpha-empty": (spec(ACTIVATION, alpha_shape=[]), [ACTIVATION, "alpha_shape"]),
    "alpha-two": (spec(ACTIVATION, alpha_shape=[1, 40]), [ACTIVATION, "alpha_shape"]),
    "alpha-other": (spec(ACTIVATION, alpha_shape=[39]), [ACTIVATION, "alpha_shape"]),
    "alpha-absurd": (spec(ACTIVATION, alpha_shape=[2**40]), [ACTIVATION, "alpha_shape"]),
    "width-absurd": (spec(ACTIVATION, width=2**40), [ACTIVATION, "width"]),
    "gate-number": (spec(ACTIVATION, gate=0), [ACTIVATION, "gate"]),
}

MODEL_DAMAGE = {
    "no-such-layer": (entry("encoder.layer.99.output.dense", {"type": "identity"}), ["encoder.layer.99.output.dense"]),
    "no-such-child": (entry("encoder.layer.0.outptu.dense", {"type": "identity"}), ["encoder.layer.0.outptu.dense"]),
    "past-a-leaf": (entry("encoder.layer.0.output.dense.weight", {"type": "identity"}), ["output.dense.weight"]),
    "not-a-linear": (
        entry(
            "encoder.layer.0.output.LayerNorm", {"type": "linear", "in_features": 16, "out_features": 16, "bias": True}
        ),
        ["encoder.layer.0.output.LayerNorm"],
    ),
    "other-kind-of-linear": (
        entry(LINEAR, {"type": "conv1d", "in_features": 16, "out_features": 16}),
        [LINEAR],
    ),
    "out-other": (spec(LINEAR, out_features=17), [LINEAR, "17"]),
    "in-too-wide": (spec(LINEAR, in_features=BIG), [LINEAR, str(BIG)]),
    "width-too-wide": (spec(ACTIVATION, width=BIG, linear_target="affine"), [ACTIVATION]),
    "alpha-too-wide": (spec(ACTIVATION, width=BIG, alpha_shape=[BIG]), [ACTIVATION]),
    "width-of-no-weight": (spec(ACTIVATION, width=39), [ACTIVATION, "39"]),
    "block-without-child": (
        entry("encoder.layer.0.output", {"type": "block", "child": "fc2"}),
        ["encoder.layer.0.output", "fc2"],
    ),
    "block-of-attributes": (
        entry("encoder.layer.0.output", {"type": "block", "child": "forward"}),
        ["encoder.layer.0.output", "forward"],
    ),
    "block-with-doubles": (
        entry("encoder.layer.0.output", {"type": "block", "child": "dense", "then": ["dense"]}),
        ["encoder.layer.0.output", "dense"],
    ),
    "below-an-identity": (entry("encoder.layer.1.output", {"type": "identity"}), [LINEAR]),
    "below-a-linear": (entry(f"{LINEAR}.native", {"type": "identity"}), [f"{LINEAR}.native"]),
    "below-an-activation": (entry(f"{ACTIVATION}.act", {"type": "identity"}), [f"{ACTIVATION}.act"]),
    "another-model": (
        put("layer_collapse", "modules", value={"layers.0.mlp.fc1": {"type": "identity"}}),
        ["layers.0.mlp.fc1"],
    ),
    "only-the-head": (
        put("layer_collapse", "modules", value={"classifier": {"type": "identity"}}),
        ["classifier"],
    ),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_a_damaged_table_is_refused_with_the_config(folder, damage):
    change, named = CONFIG_DAMAGE[damage]
    edit(folder, change)
    assert_refused(folder, *named, config_loads=False)


@pytest.mark.parametrize("damage", MODEL_DAMAGE)
def test_a_table_that_does_not_fit_is_refused_by_the_model(folder, damage):
    change, named = MODEL_DAMAGE[damage]
    edit(folder, change)
    assert_refused(folder, *named, config_loads=True)


def test_a_table_in_memory_is_checked_too(folder):
    config = AutoConfig.from_pretrained(folder)
    config.layer_collapse["modules"][LINEAR]["in_features"] = "16"
    with pytest.raises(ValueError, match="in_features"):
        AutoModelForSequenceClassification.from_config(config)


# Not BERT's in a ViT: it is what ViT's was, when its modules had the names that BERT's have.
@pytest.mark.parametrize("family, other, named", [("vit", "gpt2", "h.0.mlp"), ("bert", "vit", "layers.0.mlp")])
def test_a_table_of_another_family(folders, tmp_path, family, other, named):
    folder = shutil.copytree(folders / family, tmp_path / family)
    table = json.loads((folders / other / "config.json").read_text())["layer_collapse"]
    edit(folder, put("layer_collapse", value=table))
    with pytest.raises(ValueError, match=named):
        BY_NAME[family].auto_class.from_pretrained(folder)


def test_a_linear_in_place_of_a_conv1d(folders, tmp_path):
    """Its weights are stored transposed, and a merged one is square: this would load without any other sign."""
    folder = shutil.copytree(folders / "gpt2", tmp_path / "gpt2")
    path = "h.1.mlp.c_proj"
    value = {"type": "linear", "in_features": 16, "out_features": 16, "bias": True}
    edit(folder, entry(path, value))
    with pytest.raises(ValueError, match=path):
        BY_NAME["gpt2"].auto_class.from_pretrained(folder)


def test_an_entry_for_a_part_that_is_not_built_is_passed_over(folder):
    expected = logits(CASE.auto_class.from_pretrained(folder), CASE.inputs())
    edit(
        folder,
        entry("decoder.layer.0.output.dense", {"type": "linear", "in_features": 1, "out_features": 1, "bias": True}),
    )
    assert torch.equal(logits(CASE.auto_class.from_pretrained(folder), CASE.inputs()), expected)


def test_options_from_the_future_are_a_warning(folder, caplog):
    edit(folder, put("layer_collapse", "options", "momentum", value=0.9))
    model = CASE.auto_class.from_pretrained(folder)
    set_alphas(model, 1.0)
    with caplog.at_level(logging.WARNING):
        assert collapse_model(model).collapsed
    assert "momentum" in caplog.text


def test_options_that_mean_nothing_are_an_error_when_they_are_used(folder):
    edit(folder, put("layer_collapse", "options", "collapse_threshold", value="high"))
    model = CASE.auto_class.from_pretrained(folder)
    with pytest.raises(TypeError, match="collapse_threshold"):
        collapse_model(model)


# ----------------------------------------------------------------------------------------------------
# The checkpoint
# ----------------------------------------------------------------------------------------------------


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def key_of(folder, ending):
    (key,) = [key for key in load_file(folder / "model.safetensors") if key.endswith(ending)]
    return key


# What the files of each layout call the alpha of block 0, and the merged linear and the first linear of block 1. ViT's
# are not what its modules are called.
FILE_KEYS = {
    "bert": (
        "encoder.layer.0.intermediate.intermediate_act_fn.alpha",
        "encoder.layer.1.output.dense",
        "encoder.layer.1.intermediate.dense",
    ),
    "vit": (".0.mlp.activation_fn.alpha", ".layer.1.output.dense", ".layer.1.intermediate.dense"),
    "gpt2": ("h.0.mlp.act.alpha", "h.1.mlp.c_proj", "h.1.mlp.c_fc"),
    "distilbert": ("layer.0.ffn.activation.alpha", "layer.1.ffn.lin2", "layer.1.ffn.lin1"),
}
layouts = pytest.mark.parametrize("name", FILE_KEYS)


def assert_checkpoint_refused(name, folder, *named, **kwargs):
    for auto_class in (BY_NAME[name].auto_class, AutoModel):
        with pytest.raises(ValueError) as error:
            auto_class.from_pretrained(folder, **kwargs)
        for part in named:
            assert part in str(error.value), str(error.value)


@layouts
@pytest.mark.parametrize("which", ["alpha", "weight", "bias"])
def test_a_missing_key(folders, tmp_path, name, which):
    folder = shutil.copytree(folders / name, tmp_path / name)
    alpha, linear, _ = FILE_KEYS[name]
    key = key_of(folder, alpha if which == "alpha" else f"{linear}.{which}")
    change_tensors(folder, lambda tensors: tensors.pop(key))
    assert_checkpoint_refused(name, folder, "missing", which)
    assert_checkpoint_refused(name, folder, "missing", which, ignore_mismatched_sizes=True)


@layouts
@pytest.mark.parametrize("extra", ["first-linear", "below-linear"])
def test_an_unexpected_key(folders, tmp_path, name, extra):
    folder = shutil.copytree(folders / name, tmp_path / name)
    _, linear, first = FILE_KEYS[name]
    weight = key_of(folder, f"{linear}.weight")
    new = weight.replace(linear, first) if extra == "first-linear" else weight.replace("weight", "gain")
    change_tensors(folder, lambda tensors: tensors.update({new: torch.zeros(40, 16)}))
    assert_checkpoint_refused(name, folder, "unexpected")


@layouts
@pytest.mark.parametrize("which", ["alpha", "weight", "bias"])
@pytest.mark.parametrize("ignore", [False, True])
def test_a_wrong_shape(folders, tmp_path, name, which, ignore):
    folder = shutil.copytree(folders / name, tmp_path / name)
    alpha, linear, _ = FILE_KEYS[name]
    key = key_of(folder, alpha if which == "alpha" else f"{linear}.{which}")
    shape = (16, 40) if which == "weight" else (40,)
    change_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(shape)}))
    if ignore:
        assert_checkpoint_refused(name, folder, which, str(shape), ignore_mismatched_sizes=True)
    else:
        for auto_class in (BY_NAME[name].auto_class, AutoModel):
            with pytest.raises((ValueError, RuntimeError)):
                auto_class.from_pretrained(folder)


@layouts
@pytest.mark.parametrize("ignore", [False, True])
def test_a_folder_mixed_from_two_models(folders, tmp_path, name, ignore):
    case = BY_NAME[name]
    case.model().save_pretrained(tmp_path / "dense")
    in_life(case, "patched").save_pretrained(tmp_path / "patched")
    half = folders / name
    for config, weights in (
        (half, tmp_path / "dense"),
        (half, tmp_path / "patched"),
        (tmp_path / "patched", tmp_path / "dense"),
        (tmp_path / "patched", half),
        (tmp_path / "dense", half),
    ):
        mixed = tmp_path / "mixed"
        shutil.copytree(weights, mixed, dirs_exist_ok=True)
        shutil.copy(config / "config.json", mixed)
        if config == tmp_path / "dense" and ignore:
            continue  # a native model then, which says so and goes on
        with pytest.raises((ValueError, RuntimeError)):
            case.auto_class.from_pretrained(mixed, ignore_mismatched_sizes=ignore)


@pytest.mark.parametrize("length", [0, 5, 100, 0.5, 0.999], ids=str)
def test_a_truncated_file(folder, length):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    with pytest.raises(Exception, match="(?i)header|safetensors|incomplete|metadata|invalid"):
        CASE.auto_class.from_pretrained(folder)


@pytest.mark.parametrize("gone", ["shard", "index"])
def test_an_incomplete_sharded_folder(tmp_path, gone):
    in_life(CASE, "half").save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*"))
    assert len(shards) > 2
    (shards[1] if gone == "shard" else tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises((OSError, ValueError)):
        CASE.auto_class.from_pretrained(tmp_path)


def test_a_head_that_is_missing_is_no_damage(folder):
    change_tensors(folder, lambda tensors: tensors.pop("classifier.weight"))
    model = CASE.auto_class.from_pretrained(folder)
    assert len(alphas(model)) == 2
