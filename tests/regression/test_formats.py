"""Folders as each version of the format wrote them load, and compute what they computed, for ever."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from hf_layercollapse import find_feed_forward_blocks
from hf_layercollapse.modeling_layercollapse import FORMAT_VERSION
from hf_layercollapse.patching import layer_collapse_config_of

from .make import FOLDERS, HERE, MODELS, NARROW, RENAMED, RENAMED_NARROW, machine


VERSIONS = sorted(name for name in os.listdir(HERE) if name.startswith("v"))
# The same, saved under the oldest transformers that is supported.
FLOORS = sorted(name for name in os.listdir(HERE) if name.startswith("transformers-"))
# Families whose modules have not the same names in each of these transformers.
OTHER_NAMES = sorted(name for name in os.listdir(HERE) if name.startswith("renamed-"))
ROWS = {**FOLDERS, **RENAMED, **{name: (*row, (1, 1)) for name, row in {**NARROW, **RENAMED_NARROW}.items()}}


def saved_folders():
    for version in VERSIONS + FLOORS + OTHER_NAMES:
        for folder in sorted(os.listdir(os.path.join(HERE, version))):
            if os.path.isdir(os.path.join(HERE, version, folder)):
                yield f"{version}/{folder}"


@pytest.mark.smoke
@pytest.mark.parametrize("folder", list(saved_folders()))
def test_loads_and_computes_what_it_did(folder):
    path = os.path.join(HERE, folder)
    name, _, values = ROWS[os.path.basename(folder)]
    auto_class, _ = MODELS[name]
    model, info = auto_class.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    states = ["collapsed" if value == 1 else "patched" for value in values]
    assert [block.state for block in find_feed_forward_blocks(model)] == states

    file = load_file(os.path.join(path, "model.safetensors"))
    # Under the module's own names; ViT's files have older ones.
    same = [key for key in model.state_dict() if key in file]
    assert len(same) > 5
    for key in same:
        value = model.state_dict()[key]
        assert value.dtype == file[key].dtype and torch.equal(value, file[key]), key
    alphas = [value for key, value in model.state_dict().items() if key.endswith(".alpha")]
    stored = [value for key, value in file.items() if key.endswith(".alpha")]
    assert sorted(alpha.tolist() for alpha in alphas) == sorted(alpha.tolist() for alpha in stored)

    expected = load_file(os.path.join(path, "expected.safetensors"))
    logits = expected.pop("logits")
    with torch.no_grad():
        actual = model(**expected).logits
    torch.testing.assert_close(actual, logits, rtol=1e-4, atol=1e-5)
    with open(os.path.join(HERE, folder.split("/")[0], "machine.json")) as file:
        if json.load(file) == machine():
            assert torch.equal(actual, logits)


@pytest.mark.parametrize("folder", [folder for folder in saved_folders() if folder.split("/")[0] in OTHER_NAMES])
def test_what_is_saved_again_has_the_names_of_now(folder, tmp_path):
    path = os.path.join(HERE, folder)
    auto_class, config = MODELS[ROWS[os.path.basename(folder)][0]]
    model = auto_class.from_pretrained(path)
    model.save_pretrained(tmp_path)
    with open(tmp_path / "config.json") as file:
        table = json.load(file)["layer_collapse"]["modules"]
    native = auto_class.from_config(config())
    assert {path for path in table if native.base_model.get_submodule(path)} == set(table)
    # Chosen blocks are named, if they are, by the names of now.
    chosen = layer_collapse_config_of(model).blocks
    assert chosen == "all" or set(chosen) <= {block.name for block in find_feed_forward_blocks(model)}

    again, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = load_file(os.path.join(path, "expected.safetensors"))
    del expected["logits"]
    with torch.no_grad():
        assert torch.equal(again(**expected).logits, model(**expected).logits)


def test_every_version_and_kind_is_kept():
    assert VERSIONS == [f"v{version}" for version in range(1, FORMAT_VERSION + 1)]
    kinds, activations = set(), set()
    for folder in saved_folders():
        with open(os.path.join(HERE, folder, "config.json")) as file:
            table = json.load(file)["layer_collapse"]
        assert folder.split("/")[0] in (f"v{table['version']}", *FLOORS, *OTHER_NAMES)
        for spec in table["modules"].values():
            kinds.add(spec["type"])
            if spec["type"] == "activation":
                activations.add(
                    (spec["linear_target"], len(spec["alpha_shape"]), spec["alpha_shape"] == [1], spec["gate"])
                )
    assert kinds == {"activation", "linear", "conv1d", "identity", "block", "narrow_ffn"}
    assert {(target, gate) for target, _, _, gate in activations} == {
        (target, gate) for target in ("identity", "affine") for gate in (True, False)
    }
    assert {block for _, _, block, _ in activations} == {True, False}


def test_the_folders_stay_small():
    for version in VERSIONS + FLOORS + OTHER_NAMES:
        walk = os.walk(os.path.join(HERE, version))
        assert sum(os.path.getsize(os.path.join(root, file)) for root, _, files in walk for file in files) < 150_000
