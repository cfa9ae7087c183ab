"""Tables whose paths are those of another transformers: followed where it is plain, refused where it is not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from hf_layercollapse.modeling_layercollapse import follow_renames

from .models import BY_NAME
from .test_saving_loading import in_life


def rename(folder, then):
    """Gives paths of the table, and keys of the weights with them, what `then` makes of them."""
    content = json.loads((folder / "config.json").read_text())
    table = content["layer_collapse"]["modules"]
    content["layer_collapse"]["modules"] = {then(path): spec for path, spec in table.items()}
    (folder / "config.json").write_text(json.dumps(content))
    weights = load_file(folder / "model.safetensors")
    save_file({then(key): value for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`{name: (model, folder)}` of half-collapsed models, with a head and, as `base`, without."""
    models = {name: in_life(BY_NAME[name], "half") for name in ("bert", "dinov2", "vit")}
    models["base"] = in_life(BY_NAME["dinov2"], "half", model=AutoModel.from_config(BY_NAME["dinov2"].config()).eval())
    root = tmp_path_factory.mktemp("saved")
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: (model, root / name) for name, model in models.items()}


@pytest.fixture
def copy_of(saved, tmp_path):
    def copy(name):
        model, folder = saved[name]
        return model, shutil.copytree(folder, tmp_path / name)

    return copy


def assert_same(model, loaded):
    state, other = model.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    assert model.config.layer_collapse["modules"] == loaded.config.layer_collapse["modules"]


def other_activation(path):
    return path.replace("mlp.activation", "mlp.nonlinearity").replace("nonlinearity_fn", "nonlinearity")


def test_another_name_of_the_activation(copy_of):
    model, folder = copy_of("dinov2")
    rename(folder, other_activation)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(model, loaded)
    # Without its head.
    assert_same(model.base_model, AutoModel.from_pretrained(folder).base_model)


def test_the_checkpoint_of_a_base_model_in_one_with_a_head(copy_of):
    model, folder = copy_of("base")
    rename(folder, other_activation)
    loaded = BY_NAME["dinov2"].auto_class.from_pretrained(folder)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.dinov2.state_dict()[key], value), key


def test_weights_that_stay_on_a_disk(copy_of, tmp_path):
    model, folder = copy_of("dinov2")
    rename(folder, other_activation)
    inputs = BY_NAME["dinov2"].inputs()
    loaded = type(model).from_pretrained(
        folder, device_map={"dinov2": "disk", "classifier": "cpu"}, offload_folder=tmp_path / "disk"
    )
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert all(parameter.device.type == "meta" for parameter in loaded.dinov2.parameters())


def test_alphas_of_a_followed_name_are_not_made_up(copy_of):
    model, folder = copy_of("dinov2")
    rename(folder, other_activation)
    weights = load_file(folder / "model.safetensors")
    del weights["dinov2.encoder.layer.0.mlp.nonlinearity.alpha"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="missing: .*layer.0.mlp.activation.*alpha"):
        type(model).from_pretrained(folder)


def set_table(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content["layer_collapse"]["modules"])
    (folder / "config.json").write_text(json.dumps(content))


def test_two_entries_for_one_activation_are_refused(copy_of):
    model, folder = copy_of("dinov2")
    rename(folder, other_activation)
    path = "encoder.layer.0.mlp.nonlinearity"
    set_table(folder, lambda table: table.update({"encoder.layer.0.mlp.another": table[path]}))
    with pytest.raises(ValueError, match="there is no '(nonlinearity|another)'"):
        type(model).from_pretrained(folder)


def test_two_activations_beside_the_linears_are_refused(copy_of):
    model, folder = copy_of("dinov2")
    native = BY_NAME["dinov2"].model()
    content = json.loads((folder / "config.json").read_text())
    table = {other_activation(path): spec for path, spec in content["layer_collapse"]["modules"].items()}
    followed, names = follow_renames(native, table)
    assert set(followed) == set(content["layer_collapse"]["modules"]) and len(names) == 2
    native.dinov2.encoder.layer[0].mlp.second = torch.nn.ReLU()
    followed, names = follow_renames(native, table)
    assert "encoder.layer.0.mlp.nonlinearity" in followed and len(names) == 1


def test_some_entries_of_a_part_cannot_be_followed(copy_of):
    """What is left over would be passed over as a part that this class does not build."""
    model, folder = copy_of("vit")

    def of_old(path):
        return path.replace("layers.", "encoder.layer.").replace("mlp.activation_fn", "intermediate.act")

    set_table(folder, lambda table: table.update({of_old(path): table.pop(path) for path in [*table] if "fn" in path}))
    # It is what ViT had, but for the name of the activation.
    assert_same(model, type(model).from_pretrained(folder))
    set_table(
        folder,
        lambda table: table.update({"encoder.layer.0.other.act": table.pop("encoder.layer.0.intermediate.act")}),
    )
    with pytest.raises(ValueError, match="'encoder.layer.0.other.act'.*none is known"):
        type(model).from_pretrained(folder)


def test_a_table_that_begins_at_the_whole(copy_of):
    model, folder = copy_of("dinov2")
    set_table(folder, lambda table: table.update({f"dinov2.{path}": table.pop(path) for path in [*table]}))
    assert_same(model, type(model).from_pretrained(folder))
    assert_same(model.base_model, AutoModel.from_pretrained(folder).base_model)


@pytest.mark.parametrize("kind, named", [("activation", "unexpected: "), ("identity", "missing: ")])
def test_an_entry_that_is_passed_over_though_its_part_is_there(copy_of, kind, named):
    model, folder = copy_of("bert")
    table = AutoConfig.from_pretrained(folder).layer_collapse["modules"]
    path = next(
        path for path, spec in table.items() if spec["type"] == kind and (kind != "identity" or "dense" in path)
    )
    set_table(folder, lambda table: table.update({path.removeprefix("encoder."): table.pop(path)}))
    with pytest.raises(ValueError, match=f"{named}.*{path}"):
        type(model).from_pretrained(folder)
