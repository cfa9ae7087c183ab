"""Folders as each version of the format wrote them load, and compute what they computed, for ever."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from hf_layercollapse import find_feed_forward_blocks
from hf_layercollapse.modeling_layercollapse import FORMAT_VERSION

from .make import FOLDERS, HERE, MODELS, NARROW, machine


VERSIONS = sorted(name for name in os.listdir(HERE) if name.startswith("v"))
# The same, saved under the oldest transformers that is supported.
FLOORS = sorted(name for name in os.listdir(HERE) if name.startswith("transformers-"))


def saved_folders():
    for version in VERSIONS + FLOORS:
        for folder in sorted(os.listdir(os.path.join(HERE, version))):
            if os.path.isdir(os.path.join(HERE, version, folder)):
                yield f"{version}/{folder}"


@pytest.mark.smoke
@pytest.mark.parametrize("folder", list(saved_folders()))
def test_loads_and_computes_what_it_did(folder):
    path = os.path.join(HERE, folder)
    name, _, values = {**FOLDERS, **{name: (*row, (1, 1)) for name, row in NARROW.items()}}[os.path.basename(folder)]
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


def test_every_version_and_kind_is_kept():
    assert VERSIONS == [f"v{version}" for version in range(1, FORMAT_VERSION + 1)]
    kinds, activations = set(), set()
    for folder in saved_folders():
        with open(os.path.join(HERE, folder, "config.json")) as file:
            table = json.load(file)["layer_collapse"]
        assert folder.split("/")[0] in (f"v{table['version']}", *FLOORS)
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
    for version in VERSIONS + FLOORS:
        walk = os.walk(os.path.join(HERE, version))
        assert sum(os.path.getsize(os.path.join(root, file)) for root, _, files in walk for file in files) < 150_000
