"""Every life of a model through `save_pretrained` and `from_pretrained`, bit for bit."""

import copy
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import CommitInfo, ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessorPil,
    pipeline,
)
from transformers.models.auto import auto_factory, modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_layercollapse
from hf_layercollapse import (
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    remove_layer_collapse,
)
from hf_layercollapse.modeling_layercollapse import CODE_FILE, OLD_SAVING_PREFIX, SAVING_PREFIX
from hf_layercollapse.patching import refresh_layer_collapse
from hf_layercollapse.upstream import TRANSFORMERS

from .models import BY_NAME, LAYERS, needs_torchvision
from .test_patching import alphas, every_model, logits, set_alphas, trained_step


LIVES = ["patched", "affine", "neurons", "collapsed", "half"]
every_life = pytest.mark.parametrize("life", LIVES)
STATES = {"collapsed": ["collapsed"] * LAYERS, "half": ["patched", "collapsed", "patched"]}


def in_life(case, life, dtype=torch.float32, model=None):
    """A model of the table in one of its lives, with alphas that no short decimal spells."""
    model = case.model(dtype=dtype) if model is None else model
    options = {"affine": {"linear_target": "affine"}, "neurons": {"granularity": "neuron"}}.get(life, {})
    data = [case.inputs(seed=seed) for seed in range(3)] if life == "affine" else None
    apply_layer_collapse(model, LayerCollapseConfig(**options), data)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for index, alpha in enumerate(alphas(model)):
            alpha.copy_(0.9 * torch.rand(alpha.shape, generator=generator))
            if life == "collapsed" or (life == "half" and index == 1):
                alpha.fill_(0.987654)
    if life in ("collapsed", "half"):
        collapse_model(model)
    return model.eval()


def auto_classes(native_config):
    """Every Auto class that knows the native config class."""
    for value in vars(modeling_auto).values():
        if isinstance(value, type) and issubclass(value, auto_factory._BaseAutoModelClass) and value._model_mapping:
            if native_config in value._model_mapping:
                yield value


def assert_same_weights(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name


# ----------------------------------------------------------------------------------------------------
# There and back
# ----------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@every_model
@every_life
def test_saved_and_loaded_logits_are_equal_bit_for_bit(case, life, tmp_path):
    model, inputs = in_life(case, life), case.inputs()
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded, info = case.auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(loaded) is type(model) and isinstance(loaded, type(case.model()))
    assert torch.equal(logits(loaded, inputs), expected)
    assert_same_weights(loaded, model)
    assert loaded.config.layer_collapse == model.config.layer_collapse
    assert [block.state for block in find_feed_forward_blocks(loaded)] == STATES.get(life, ["patched"] * LAYERS)
    assert loaded.name_or_path == str(tmp_path)
    assert all(alpha.dtype == torch.float32 and alpha.requires_grad for alpha in alphas(loaded))
    # A loaded model trains as the saved one does.
    steps = [trained_step(each, case) for each in (model, loaded)]
    assert torch.equal(steps[0][0], steps[1][0])
    for name, gradient in steps[0][2].items():
        assert torch.equal(steps[1][2][name], gradient), name


@pytest.mark.smoke
@every_model
@pytest.mark.parametrize("life", ["patched", "half"])
def test_every_auto_class_that_knows_the_native_class(case, life, tmp_path):
    model, inputs = in_life(case, life), case.inputs()
    with torch.no_grad():
        hidden = model.base_model(**inputs)[0]
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    native_config = type(case.config())
    classes = list(auto_classes(native_config))
    assert AutoModel in classes and case.auto_class in classes
    for auto_class in classes:
        # Heads of other tasks have other widths; what the table names must fit all the same.
        kwargs = {"num_labels": 2} if "QuestionAnswering" in auto_class.__name__ else {}
        loader = auto_class
        if "Backbone" in auto_class.__name__:  # loads from the Hub only
            loader = auto_class._model_mapping[type(AutoConfig.from_pretrained(tmp_path))]
        loaded = loader.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **kwargs).eval()
        native = auto_class._model_mapping[native_config]
        assert type(loaded).__name__ == native.__name__ and isinstance(loaded, native)
        assert [block.state for block in find_feed_forward_blocks(loaded)] == STATES.get(life, ["patched"] * LAYERS)
        base, layers = loaded.base_model, f"{case.block.split('.')[1]}."
        state = {name: value for name, value in model.base_model.state_dict().items() if name.startswith(layers)}
        assert len(state) > 10 and all(torch.equal(base.state_dict()[name], value) for name, value in state.items())
        if loader is not auto_class:
            continue
        with torch.no_grad():
            assert torch.equal(base(**inputs)[0], hidden), auto_class.__name__
        if type(loaded) is type(model):
            assert torch.equal(logits(loaded, inputs), expected)


@every_model
def test_the_class_of_a_live_model_loads_too(case, tmp_path):
    model = in_life(case, "half")
    model.save_pretrained(tmp_path)
    for again in (type(model).from_pretrained(tmp_path), case.auto_class.from_pretrained(tmp_path)):
        assert again.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
        assert again.config.model_type == case.config().model_type
        assert_same_weights(again, model)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["base_model_type"] == model.config.model_type


def test_the_class_of_a_live_model_refuses_a_dense_folder(tmp_path):
    case = BY_NAME["bert"]
    case.model().save_pretrained(tmp_path)
    built = type(in_life(case, "half"))
    for load in (built.from_pretrained, built.config_class.from_pretrained):
        with pytest.raises(ValueError, match="config of a dense model.*an Auto class.*`BertConfig`"):
            load(tmp_path)


def test_configs_that_are_read_by_hand(tmp_path):
    case = BY_NAME["vit"]
    model = in_life(case, "half")
    model.save_pretrained(tmp_path)
    config_class, file = type(model.config), tmp_path / "config.json"
    for config in (config_class.from_json_file(file), config_class.from_dict(json.loads(file.read_text()))):
        assert config.to_dict() == {**model.config.to_dict(), "_name_or_path": config.name_or_path}
        assert config.model_type == "vit" and "base_model_type" not in config.__dict__
        assert_same_weights(case.auto_class.from_pretrained(tmp_path, config=config), model)


@pytest.mark.parametrize("changed", [{"num_hidden_layers": 2}, {"intermediate_size": 24}], ids=str)
def test_a_value_that_the_table_depends_on_is_changed_on_loading(changed, tmp_path):
    case = BY_NAME["bert"]
    in_life(case, "affine").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="or a value of the config .* was changed"):
        case.auto_class.from_pretrained(tmp_path, **changed)


@every_model
@pytest.mark.parametrize("life", ["affine", "half"])
def test_configs(case, life, tmp_path):
    model = in_life(case, life)
    model.save_pretrained(tmp_path)
    native = type(case.config())
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, native) and type(config) is type(model.config)
    assert config.model_type == config.to_dict()["model_type"] == native.model_type
    assert config.architectures == [type(case.model()).__name__]
    assert config.layer_collapse == model.config.layer_collapse
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert on_disk["model_type"] == "layercollapse" and on_disk["base_model_type"] == native.model_type
    assert on_disk["auto_map"] == {"AutoConfig": "modeling_layercollapse.StoredConfig"}
    assert "base_model_type" not in config.__dict__ and "auto_map" not in config.__dict__
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == on_disk
    assert (tmp_path / "again" / CODE_FILE).exists()
    config, unused = AutoConfig.from_pretrained(tmp_path, num_labels=7, foreign=1, return_unused_kwargs=True)
    assert config.num_labels == 7 and unused == {"foreign": 1}
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(copied) is type(config) and copied.to_dict() == config.to_dict()


@every_model
@pytest.mark.parametrize("life", ["affine", "neurons", "half"])
def test_from_config_has_the_structure_and_first_values(case, life, tmp_path):
    model = in_life(case, life)
    model.save_pretrained(tmp_path)
    fresh = case.auto_class.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(fresh) is type(model)
    assert {n: v.shape for n, v in fresh.state_dict().items()} == {n: v.shape for n, v in model.state_dict().items()}
    for name, value in fresh.state_dict().items():
        if name.endswith((".alpha", ".offset")):
            assert not value.any(), name
        elif name.endswith(".slope"):
            assert (value == 1).all()
        assert value.isfinite().all() and value.abs().max() < 10
    assert logits(fresh.eval(), case.inputs()).isfinite().all()
    # Direct construction is no different, and the first model's config is not the second one's.
    direct = type(fresh)(copy.deepcopy(fresh.config))
    assert list(direct.state_dict()) == list(fresh.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh.eval(), case.inputs()), logits(model, case.inputs()))


@pytest.mark.smoke
@every_model
def test_the_native_class_refuses_a_collapsed_folder(case, tmp_path):
    for life in ("collapsed", "half"):
        in_life(case, life).save_pretrained(tmp_path / life)
        head = type(case.model())
        for native in (head, type(case.model().base_model)):
            with pytest.raises(RuntimeError, match="mismatch|size"):
                native.from_pretrained(tmp_path / life)


@every_model
def test_native_models_are_left_alone(case, tmp_path):
    in_life(case, "half").save_pretrained(tmp_path / "half")
    case.auto_class.from_pretrained(tmp_path / "half")
    dense = case.model()
    assert [block.state for block in find_feed_forward_blocks(dense)] == ["dense"] * LAYERS
    dense.save_pretrained(tmp_path / "dense")
    loaded = case.auto_class.from_pretrained(tmp_path / "dense")
    assert type(loaded) is type(dense) and type(loaded.config) is type(case.config())
    assert torch.equal(logits(loaded, case.inputs()), logits(dense, case.inputs()))
    assert not (tmp_path / "dense" / CODE_FILE).exists()
    assert "layer_collapse" not in (tmp_path / "dense" / "config.json").read_text()


@every_model
def test_removed_is_saved_as_dense(case, tmp_path):
    model = remove_layer_collapse(in_life(case, "patched"))
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(_saved_natively(case, tmp_path.parent / f"{case.name}-dense"))
    loaded = case.auto_class.from_pretrained(tmp_path)
    assert type(loaded) is type(case.model())
    assert torch.equal(logits(loaded, case.inputs()), logits(case.model(), case.inputs()))


def _saved_natively(case, folder):
    case.model().save_pretrained(folder)
    return os.listdir(folder)


def test_a_loaded_model_goes_on_living(tmp_path):
    """Load patched, collapse a part, save, load, patch... until nothing is left to collapse."""
    case = BY_NAME["vit"]
    in_life(case, "patched").save_pretrained(tmp_path / "0")
    model = case.auto_class.from_pretrained(tmp_path / "0")
    for step in range(1, LAYERS + 1):
        with torch.no_grad():
            alphas(model)[0].fill_(1.0)
        expected = logits(model, case.inputs())
        collapse_model(model)
        torch.testing.assert_close(logits(model, case.inputs()), expected, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / str(step))
        loaded = case.auto_class.from_pretrained(tmp_path / str(step))
        assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))
        model = loaded
    assert [block.state for block in find_feed_forward_blocks(model)] == ["collapsed"] * LAYERS


def test_a_patched_folder_of_the_base_model(tmp_path):
    case = BY_NAME["bert"]
    base = AutoModel.from_config(case.config())
    apply_layer_collapse(base, LayerCollapseConfig(blocks=["encoder.layer.2"]))
    set_alphas(base, 0.5)
    base.save_pretrained(tmp_path)
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert [block.state for block in find_feed_forward_blocks(head)] == ["dense", "dense", "patched"]
    assert alphas(head)[0] == 0.5
    # The stored selector names a block as the base model spells it.
    set_alphas(head, 1.0)
    assert collapse_model(head).collapsed == [case.blocks()[2]]


# ----------------------------------------------------------------------------------------------------
# Folders
# ----------------------------------------------------------------------------------------------------


def test_what_a_folder_holds(tmp_path):
    model = in_life(BY_NAME["bert"], "half")
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", CODE_FILE]
    with open(hf_layercollapse.modeling_layercollapse.__file__, "rb") as package:
        assert (tmp_path / CODE_FILE).read_bytes() == package.read()
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["bert.encoder.layer.1.output.dense.weight"].shape == (16, 16)
    assert tensors["bert.encoder.layer.0.intermediate.intermediate_act_fn.alpha"].dtype == torch.float32
    assert not any("layer.1.intermediate" in name for name in tensors)
    stored = json.loads((tmp_path / "config.json").read_text())["layer_collapse"]
    assert stored["version"] == 1
    assert stored["options"] == LayerCollapseConfig(blocks=BY_NAME["bert"].blocks()).to_dict()
    assert stored["modules"] == {
        "encoder.layer.0.intermediate.intermediate_act_fn": {
            "type": "activation",
            "act": "native",
            "linear_target": "identity",
            "alpha_shape": [1],
            "width": 40,
            "gate": False,
        },
        "encoder.layer.2.intermediate.intermediate_act_fn": {
            "type": "activation",
            "act": "native",
            "linear_target": "identity",
            "alpha_shape": [1],
            "width": 40,
            "gate": False,
        },
        "encoder.layer.1.intermediate.dense": {"type": "identity"},
        "encoder.layer.1.intermediate.intermediate_act_fn": {"type": "identity"},
        "encoder.layer.1.output.dense": {"type": "linear", "in_features": 16, "out_features": 16, "bias": True},
    }


SIZES = {"single": {}, "sharded": {"max_shard_size": "10KB"}}


@pytest.mark.parametrize("before", ["dense-single", "dense-sharded", "patched-single", "patched-sharded"])
@pytest.mark.parametrize("after", SIZES)
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_saving_over_an_older_folder(name, before, after, tmp_path):
    case = BY_NAME[name]
    life, size = before.split("-")
    old = case.model(seed=9) if life == "dense" else in_life(case, "patched", model=case.model(seed=9))
    old.save_pretrained(tmp_path, **SIZES[size])
    assert any("-of-" in file for file in os.listdir(tmp_path)) == (size == "sharded")
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "vocab.txt").write_text("words")
    model = in_life(case, "half")
    model.save_pretrained(tmp_path, **SIZES[after])
    files = os.listdir(tmp_path)
    assert ("model.safetensors" in files) == (after == "single")
    assert ("model.safetensors.index.json" in files) == (after == "sharded")
    if after == "sharded":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert {file for file in files if "-of-" in file} == set(index["weight_map"].values())
    else:
        assert not any("-of-" in file for file in files)
    assert (tmp_path / "README.md").read_text() == "a card" and (tmp_path / "vocab.txt").exists()
    assert not [file for file in files if file.startswith((".", "_"))]
    loaded = case.auto_class.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))


def test_saving_again_gives_the_same_files(tmp_path):
    case = BY_NAME["vit"]
    in_life(case, "half").save_pretrained(tmp_path / "one")
    case.auto_class.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    case.auto_class.from_pretrained(tmp_path / "two").save_pretrained(tmp_path / "two")
    for file in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_variants_live_beside_each_other(tmp_path):
    case = BY_NAME["bert"]
    model = in_life(case, "half")
    model.save_pretrained(tmp_path)
    expected = logits(model, case.inputs())
    half_precision = copy.deepcopy(model).to(torch.bfloat16)
    half_precision.save_pretrained(tmp_path, variant="bf16")
    assert {"model.safetensors", "model.bf16.safetensors"} <= set(os.listdir(tmp_path))
    loaded = case.auto_class.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(loaded, case.inputs()), expected)
    loaded = case.auto_class.from_pretrained(tmp_path, variant="bf16", dtype="auto")
    assert torch.equal(logits(loaded, case.inputs()), logits(half_precision, case.inputs()))


@pytest.mark.parametrize("prefix", [SAVING_PREFIX, OLD_SAVING_PREFIX])
def test_leftovers_of_a_killed_save_are_cleared(prefix, tmp_path):
    case = BY_NAME["bert"]
    leftover = tmp_path / f"{prefix}abc"
    leftover.mkdir()
    (leftover / "model.safetensors").write_text("half")
    in_life(case, "half").save_pretrained(tmp_path)
    assert not leftover.exists()


def test_save_pretrained_takes_what_the_native_one_takes(tmp_path):
    case = BY_NAME["bert"]
    model = in_life(case, "half")
    state = {name: value + 1 if name == "classifier.bias" else value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "state", True, state)
    loaded = case.auto_class.from_pretrained(tmp_path / "state")
    assert torch.equal(loaded.classifier.bias, model.classifier.bias + 1)
    model.save_pretrained(str(tmp_path / "other"), is_main_process=False)
    assert not (tmp_path / "other" / "config.json").exists()
    file = tmp_path / "file"
    file.write_text("")
    model.save_pretrained(file)
    assert file.read_text() == ""
    model.save_pretrained(tmp_path / "layout", save_original_format=False)
    assert torch.equal(
        logits(case.auto_class.from_pretrained(tmp_path / "layout"), case.inputs()), logits(model, case.inputs())
    )


@pytest.fixture
def hub(monkeypatch):
    """A Hub that notes what is uploaded: repository -> {file: bytes}."""
    uploaded = {}

    def upload(self, working_dir, repo_id, *args, **kwargs):
        uploaded[repo_id] = {file.name: file.read_bytes() for file in Path(working_dir).iterdir()}
        return CommitInfo(f"https://huggingface.co/{repo_id}/commit/1", "", "", "1")

    api = SimpleNamespace(create_repo=lambda repo_id, **kwargs: SimpleNamespace(repo_id=f"me/{repo_id}"))
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda *args, **kwargs: api)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("card"))
    monkeypatch.setattr(transformers.utils.hub.PushToHubMixin, "_upload_modified_files", upload)
    return uploaded


@pytest.mark.smoke
@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained", "save_pretrained-named"])
def test_what_is_pushed_loads(hub, how, tmp_path):
    case = BY_NAME["bert"]
    model = in_life(case, "half")
    if how == "push_to_hub":
        model.push_to_hub("smaller")
        assert model.name_or_path == model.config.name_or_path == "me/smaller"
    else:
        named = {"repo_id": "smaller"} if how.endswith("named") else {}
        model.save_pretrained(tmp_path / ("x" if named else "smaller"), push_to_hub=True, commit_message="x", **named)
        assert model.name_or_path == str(tmp_path / ("x" if named else "smaller"))
    assert hub.keys() == {"me/smaller"}
    assert {"config.json", "model.safetensors", CODE_FILE} <= hub["me/smaller"].keys()
    (tmp_path / "downloaded").mkdir()
    for name, content in hub["me/smaller"].items():
        (tmp_path / "downloaded" / name).write_bytes(content)
    loaded = case.auto_class.from_pretrained(tmp_path / "downloaded")
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))


@pytest.mark.parametrize("life", ["patched", "collapsed"])
def test_a_config_that_was_replaced_is_not_saved(hub, life, tmp_path):
    case = BY_NAME["bert"]
    model = in_life(case, life)
    model.config = case.config()
    for save in (model.save_pretrained, model.push_to_hub, lambda name: Around(model).save_pretrained(name)):
        with pytest.raises(ValueError, match="its config has been replaced by a BertConfig that says nothing"):
            save(str(tmp_path / "refused"))
    assert not hub and not (tmp_path / "refused" / "model.safetensors").exists()
    # As it says.
    model.config = model.base_model.config
    names = {number: f"class {number}" for number in range(model.config.num_labels)}
    model.config.id2label = names
    model.save_pretrained(tmp_path / "saved")
    loaded = case.auto_class.from_pretrained(tmp_path / "saved")
    assert loaded.config.id2label == names
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))


class Around(PreTrainedModel):
    """A larger model."""

    config_class = PreTrainedConfig

    def __init__(self, inner):
        super().__init__(PreTrainedConfig())
        self.inner = inner


# ----------------------------------------------------------------------------------------------------
# Layers that are taken out of a live model
# ----------------------------------------------------------------------------------------------------

some_models = pytest.mark.parametrize(
    "case", [BY_NAME[name] for name in ("bert", "distilbert", "gpt2")], ids=lambda case: case.name
)


def take_layers(model, indices):
    """Keeps these layers, in this order."""
    name, layers = next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == LAYERS
    )
    holder, _, child = name.rpartition(".")
    setattr(model.get_submodule(holder), child, torch.nn.ModuleList(layers[index] for index in indices))
    for index, layer in enumerate(model.get_submodule(name)):
        for module in layer.modules():
            if "layer_idx" in vars(module):  # where its keys and values are cached
                module.layer_idx = index
    model.config.num_hidden_layers = len(indices)
    return model


def cut(case, block):
    """One block keeps five neurons in its native linears."""
    data = [case.inputs(batch=8, seed=seed) for seed in range(3)]
    config = LayerCollapseConfig(blocks=[block], rank=0, keep_neurons=5)
    model = case.model()
    collapse_model(model, config, calibration_data=data)
    return model.eval()


def assert_comes_back(model, case, folder):
    expected = logits(model, case.inputs())
    model.save_pretrained(folder)
    loaded = case.auto_class.from_pretrained(folder)
    assert_same_weights(loaded, model)
    assert torch.equal(logits(loaded.eval(), case.inputs()), expected)
    assert loaded.config.layer_collapse["modules"] == model.config.layer_collapse["modules"]
    states = [block.state for block in find_feed_forward_blocks(model)]
    assert [block.state for block in find_feed_forward_blocks(loaded)] == states
    return states


@some_models
@pytest.mark.parametrize("life", ["patched", "half", "cut"])
def test_layers_are_taken_out(case, life, tmp_path):
    model = take_layers(cut(case, 1) if life == "cut" else in_life(case, life), [0, 1])
    states = [block.state for block in find_feed_forward_blocks(model)]
    assert len(states) == 2
    model.base_model.save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    for key, value in model.base_model.state_dict().items():
        assert torch.equal(base.state_dict()[key], value), key
    assert assert_comes_back(model, case, tmp_path / "whole") == states
    assert torch.equal(alphas(model)[0], alphas(base)[0]) if life != "cut" else not alphas(model)


@some_models
@pytest.mark.parametrize("life", ["half", "cut"])
def test_layers_change_places(case, life, tmp_path):
    model = take_layers(cut(case, 1) if life == "cut" else in_life(case, life), [1, 2])
    folder = tmp_path / "folder"
    with pytest.raises(ValueError, match="is not what its config describes.*refresh_layer_collapse"):
        model.save_pretrained(folder)
    assert not folder.exists()
    refresh_layer_collapse(model)
    assert assert_comes_back(model, case, folder) == ["collapsed", "patched" if life == "half" else "dense"]


def test_what_is_left_of_a_patched_model_goes_on(tmp_path):
    case = BY_NAME["bert"]
    model = take_layers(in_life(case, "patched"), [0, 1])
    dense = remove_layer_collapse(copy.deepcopy(model))
    assert type(dense) is type(case.model())
    set_alphas(model, 1.0)
    assert collapse_model(model).collapsed == case.blocks()[:2]
    assert assert_comes_back(model, case, tmp_path) == ["collapsed"] * 2


def test_nothing_that_was_patched_is_left(tmp_path):
    case = BY_NAME["bert"]
    model = apply_layer_collapse(case.model(), LayerCollapseConfig(blocks="last:2"))
    take_layers(model, [0])
    with pytest.raises(ValueError, match="is not what its config describes"):
        model.save_pretrained(tmp_path / "refused")
    refresh_layer_collapse(model)
    assert type(model) is type(case.model()) and type(model.config) is type(case.config())


# ----------------------------------------------------------------------------------------------------
# dtypes
# ----------------------------------------------------------------------------------------------------


def exact(model):
    kinds = (".alpha", ".slope", ".offset")
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith(kinds)}


@every_model
@pytest.mark.parametrize("life", ["affine", "half"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_alpha_keeps_every_bit_through_half_precision(case, life, dtype, tmp_path):
    model = in_life(case, life)
    expected = exact(model)
    assert any(torch.any(value.to(dtype) != value) for value in expected.values())

    def assert_kept(loaded):
        kept = exact(loaded)
        assert kept.keys() == expected.keys()
        for name, value in expected.items():
            assert kept[name].dtype == torch.float32 and torch.equal(kept[name], value), name

    model.save_pretrained(tmp_path / "full")
    loaded = case.auto_class.from_pretrained(tmp_path / "full", dtype=dtype)
    assert loaded.dtype == dtype
    assert_kept(loaded)
    converted = copy.deepcopy(model).to(dtype)
    assert_same_weights(loaded, converted)
    outputs = logits(loaded, _to(case.inputs(), dtype))
    assert torch.equal(outputs, logits(converted, _to(case.inputs(), dtype)))

    loaded.save_pretrained(tmp_path / "half")
    again = case.auto_class.from_pretrained(tmp_path / "half")
    assert again.dtype == dtype
    assert_kept(again)
    assert torch.equal(logits(again, _to(case.inputs(), dtype)), outputs)
    assert_kept(case.auto_class.from_pretrained(tmp_path / "half", dtype=torch.float32))
    assert_kept(case.auto_class.from_pretrained(tmp_path / "half", dtype="auto"))


def _to(inputs, dtype):
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


# ----------------------------------------------------------------------------------------------------
# Models of one's own
# ----------------------------------------------------------------------------------------------------


class OwnConfig(PreTrainedConfig):
    model_type = "own-model"
    width: int = 8


class OwnMLP(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(width, 3 * width), torch.nn.Linear(3 * width, width)
        self.activation_fn = torch.nn.GELU()

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "own"

    def __init__(self, config):
        super().__init__(config)
        self.mlp = OwnMLP(config.width)
        self.post_init()

    def forward(self, x):
        return self.mlp(x)


def test_models_that_auto_classes_do_not_know(tmp_path):
    model, x = OwnModel(OwnConfig()), torch.randn(3, 8)
    expected = model(x)
    # What could never be loaded again is not changed.
    with pytest.raises(ValueError, match="AutoConfig.register.'own-model', OwnConfig.* and `AutoModel.register"):
        apply_layer_collapse(model)
    assert type(model) is OwnModel and type(model.mlp.activation_fn) is torch.nn.GELU
    # Registered, it is as good as any.
    AutoConfig.register("own-model", OwnConfig)
    AutoModel.register(OwnConfig, OwnModel)
    try:
        apply_layer_collapse(model)
        assert torch.equal(model(x), expected)
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert isinstance(loaded, OwnModel) and torch.equal(loaded(x), expected)
        set_alphas(loaded, 1.0)
        collapse_model(loaded)
        loaded.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(again(x), loaded(x))
    finally:
        CONFIG_MAPPING._extra_content.pop("own-model")
        AutoModel._model_mapping._extra_content.pop(OwnConfig)


# ----------------------------------------------------------------------------------------------------
# What lies beside a model
# ----------------------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "was", "it"]


def tokenizer():
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


@pytest.mark.smoke
def test_text_pipeline(tmp_path):
    model = in_life(BY_NAME["bert"], "half")
    model.config.id2label = {0: "bad", 1: "good", 2: "neither"}
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), top_k=None)
    assert type(classify.model) is type(model)
    scores = {entry["label"]: entry["score"] for entry in classify("it was a good film")[0]}
    inputs = classify.tokenizer("it was a good film", return_tensors="pt")
    expected = logits(model, inputs).softmax(-1)[0]
    assert [scores[label] for label in ("bad", "good", "neither")] == pytest.approx(expected.tolist())


def test_text_generation_pipeline_and_generate(tmp_path):
    case = BY_NAME["gpt2"]
    model = in_life(case, "half")
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**case.inputs(), **options)
    assert torch.equal(loaded.generate(**case.inputs(), **options), expected)
    generate = pipeline("text-generation", model=str(tmp_path))
    assert generate("it was", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("it was")


def test_image_pipeline(tmp_path):
    from PIL import Image

    case = BY_NAME["vit"]
    model = in_life(case, "collapsed")
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path)
    image = Image.effect_mandelbrot((20, 30), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    classify = pipeline("image-classification", model=str(tmp_path), top_k=3)
    scores = {entry["label"]: entry["score"] for entry in classify(image)}
    expected = logits(model, processor(image, return_tensors="pt")).softmax(-1)[0]
    assert [scores[f"LABEL_{index}"] for index in range(3)] == pytest.approx(expected.tolist(), rel=1e-4)


def test_tokenizers_beside_the_model(tmp_path):
    in_life(BY_NAME["bert"], "collapsed").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer())
    assert loaded("it was bad")["input_ids"] == tokenizer()("it was bad")["input_ids"]
    # As older folders are: nothing but the model says which tokenizer it is.
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is type(tokenizer())


@needs_torchvision
def test_image_processors_beside_the_model(tmp_path):
    in_life(BY_NAME["vit"], "collapsed").save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is ViTImageProcessorPil
    file = next(path for path in tmp_path.iterdir() if "processor" in path.name)
    settings = json.loads(file.read_text())
    for key in ("image_processor_type", "processor_class", "feature_extractor_type"):
        settings.pop(key, None)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ViTImageProcessorPil and loaded.size == {"height": 8, "width": 8}


def test_adapters_on_a_saved_collapsed_model(tmp_path):
    from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model

    case = BY_NAME["bert"]
    case.model().save_pretrained(tmp_path / "dense")
    model = in_life(case, "half", model=case.auto_class.from_pretrained(tmp_path / "dense"))
    lora = {"task_type": "SEQ_CLS", "init_lora_weights": False}
    # Not saved yet: an adapter made now must not name the dense folder as its base.
    unsaved = get_peft_model(copy.deepcopy(model), LoraConfig(**lora))
    assert unsaved.peft_config["default"].base_model_name_or_path in ("", None)
    model.save_pretrained(tmp_path / "half")
    adapted = get_peft_model(model, LoraConfig(**lora)).eval()
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "half")
    expected = logits(adapted, case.inputs())
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, case.inputs()), expected)
    if TRANSFORMERS >= (5, 19):  # before, it finds no weights of a head that an adapter holds, of dense models too
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(logits(loaded, case.inputs()), expected)


# ----------------------------------------------------------------------------------------------------
# from_pretrained's other roads
# ----------------------------------------------------------------------------------------------------


def test_a_new_head_on_a_collapsed_model(tmp_path):
    case = BY_NAME["bert"]
    model = in_life(case, "half")
    model.save_pretrained(tmp_path)
    loaded = case.auto_class.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert loaded.classifier.weight.shape == (5, 16)
    with torch.no_grad():
        assert torch.equal(loaded.bert(**case.inputs())[0], model.bert(**case.inputs())[0])


@every_model
def test_what_the_native_class_can_do_is_not_lost(case):
    native, built = type(case.model()), type(in_life(case, "half"))
    assert built.__name__ == native.__name__ and built.__doc__ == native.__doc__
    assert not built.is_custom_code()
    for name in (
        "_can_set_attn_implementation",
        "_can_set_experts_implementation",
        "can_generate",
        "is_custom_code",
    ):
        assert getattr(built, name)() == getattr(native, name)(), name
    for name in ("_supports_sdpa", "_no_split_modules", "supports_gradient_checkpointing", "base_model_prefix"):
        assert getattr(built, name) == getattr(native, name), name


def test_device_map_and_attention(tmp_path):
    case = BY_NAME["bert"]
    model = in_life(case, "half")
    model.save_pretrained(tmp_path)
    loaded = case.auto_class.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))
    loaded = case.auto_class.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(loaded, case.inputs()), logits(model, case.inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("life", ["affine", "half", "narrow"])
def test_disk_offload(life, tmp_path):
    """What lies on a disk is not missing."""
    case = BY_NAME["bert"]
    if life == "narrow":
        model = case.model()
        config = LayerCollapseConfig(rank=4, keep_neurons=6)
        collapse_model(model, config, calibration_data=[case.inputs(batch=8, seed=seed) for seed in range(4)])
    else:
        model = in_life(case, life)
    expected = logits(model, case.inputs())
    model.save_pretrained(tmp_path)
    rest = ["bert.embeddings", "bert.encoder.layer.0", "bert.pooler", "dropout", "classifier"]
    device_map = {**dict.fromkeys(rest, "cpu"), "bert.encoder.layer.1": "disk", "bert.encoder.layer.2": "disk"}
    loaded = case.auto_class.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offloaded")
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    assert torch.equal(logits(loaded, case.inputs()), expected)
    with pytest.warns(UserWarning, match="offloaded modules"):
        loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(case.auto_class.from_pretrained(tmp_path / "again"), case.inputs()), expected)


def test_resized_embeddings(tmp_path):
    case = BY_NAME["bert"]
    model = in_life(case, "half")
    model.resize_token_embeddings(70, mean_resizing=False)
    model.save_pretrained(tmp_path)
    loaded = case.auto_class.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 70
    assert torch.equal(logits(loaded, case.inputs()), logits(model, case.inputs()))


def test_tags_do_not_reach_the_native_class(tmp_path):
    case = BY_NAME["bert"]
    model = in_life(case, "half")
    model.add_model_tags("smaller")
    assert "smaller" in model.model_tags
    assert not case.model().model_tags and not BertForSequenceClassification.model_tags


def test_loaded_models_copy_and_pickle(tmp_path):
    case = BY_NAME["vit"]
    model = in_life(case, "half")
    model.save_pretrained(tmp_path)
    loaded = case.auto_class.from_pretrained(tmp_path)
    for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert type(copied) is type(loaded) and isinstance(copied.config, PreTrainedConfig)
        assert torch.equal(logits(copied, case.inputs()), logits(model, case.inputs()))
        copied.save_pretrained(tmp_path / "copy")
        assert_same_weights(case.auto_class.from_pretrained(tmp_path / "copy"), model)
