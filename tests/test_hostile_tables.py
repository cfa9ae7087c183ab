"""Property-based: whatever stands in a table, a config or a folder, loading it gives the model or a clear error."""

import json
import shutil

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_layercollapse import LayerCollapseConfig
from hf_layercollapse.modeling_layercollapse import MAX_WIDTH, validate_layer_collapse

from .models import BY_NAME
from .test_damaged import Largest
from .test_saving_loading import in_life


QUICK = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
# Each of these loads a model.
SLOW = settings(QUICK, max_examples=40)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, 16, 40, MAX_WIDTH, MAX_WIDTH + 1, 10**12, -1])
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["linear", "conv1d", "identity", "block", "activation", "narrow_ffn", "native", "gelu", "affine"]
    )
)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)

# Paths that reach for something else than a module of the model, beside real ones.
paths = st.sampled_from(
    [
        "__class__",
        "encoder.__class__",
        "encoder.layer.0.__init__.__globals__",
        "_modules.encoder",
        "encoder._modules",
        "encoder.layer.0.intermediate._parameters",
        "config",
        "config.layer_collapse",
        "encoder.layer.0.forward",
        "encoder.layer.0.output.dense.weight",
        "encoder.layer.99",
        "encoder.layer.-1",
        "encoder..layer",
        "",
        ".",
        "a" * 5000,
        ".".join(["encoder"] * 40),
        "encoder",
        "encoder.layer",
        "encoder.layer.0",
        "encoder.layer.0.output",
        "encoder.layer.0.output.dense",
        "encoder.layer.0.output.LayerNorm",
        "encoder.layer.0.intermediate.dense",
        "encoder.layer.2.intermediate.intermediate_act_fn",
        "embeddings.word_embeddings",
        "pooler",
        "classifier",
        "h.0.mlp",
        "h.1.mlp.c_proj",
        "transformer.h.0.mlp",
    ]
) | st.text(max_size=20)

widths = st.sampled_from([1, 16, 40, 64, MAX_WIDTH, MAX_WIDTH + 1, 10**15, 0, -4, True, 16.0, "16", None])
specs = st.one_of(
    st.just({"type": "identity"}),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["linear", "conv1d"]), "in_features": widths, "out_features": widths},
        optional={"bias": st.booleans() | st.none()},
    ),
    st.fixed_dictionaries(
        {
            "type": st.just("activation"),
            "act": st.sampled_from(["native", "relu", "os.system", "__import__", 3]),
            "linear_target": st.sampled_from(["identity", "affine", "exec", None]),
            "width": widths,
            "alpha_shape": st.lists(widths, max_size=3) | widths,
        },
        optional={"gate": st.booleans() | scalars},
    ),
    st.fixed_dictionaries(
        {"type": st.just("block"), "child": paths | scalars},
        optional={"then": st.lists(paths, max_size=3) | scalars},
    ),
    st.dictionaries(st.sampled_from(["type", "in_features", "child", "scope", "x"]), json_values, max_size=4),
    json_values,
)
tables = st.dictionaries(paths, specs, max_size=4)
layer_collapses = (
    st.fixed_dictionaries(
        {"version": st.just(1) | scalars, "modules": tables | json_values},
        optional={"options": json_values, "extra": json_values},
    )
    | json_values
)


@QUICK
@given(layer_collapses)
def test_validation_accepts_or_raises_value_error(value):
    before = json.dumps(value, sort_keys=True)
    try:
        accepted = validate_layer_collapse(value)
    except ValueError as error:
        assert "layer_collapse" in str(error)
    else:
        assert accepted is value
        assert all(
            spec["type"] in ("activation", "linear", "conv1d", "identity", "block")
            for spec in value["modules"].values()
        )
    assert json.dumps(value, sort_keys=True) == before


@QUICK
@given(st.integers(2, 10**30))
def test_future_versions_are_named(version):
    with pytest.raises(ValueError, match=f"version {version} of the layer_collapse format"):
        validate_layer_collapse({"version": version, "modules": {"a": {"type": "identity"}}})


# ----------------------------------------------------------------------------------------------------
# Whole folders
# ----------------------------------------------------------------------------------------------------

MODELS = {"bert": AutoModelForSequenceClassification, "gpt2": AutoModelForCausalLM}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A half-collapsed model, its folder and the content of its config.json."""
    folder = tmp_path_factory.mktemp(request.param)
    in_life(BY_NAME[request.param], "half").save_pretrained(folder)
    return MODELS[request.param], folder, json.loads((folder / "config.json").read_text())


def check(saved, content):
    """Loading gives exactly what the file holds, or an error that a user understands; no large tensor either way."""
    auto_class, folder, original = saved
    (folder / "config.json").write_text(json.dumps(content))
    held = load_file(folder / "model.safetensors")
    with Largest() as largest:
        try:
            model = auto_class.from_pretrained(folder)
        except (ValueError, RuntimeError) as error:
            # RuntimeError is transformers' own for sizes that do not match.
            assert len(str(error)) > 20
            model = None
        finally:
            (folder / "config.json").write_text(json.dumps(original))
    assert largest.numel <= 50 * max(tensor.numel() for tensor in held.values())
    if model is not None:
        state = model.state_dict()
        shared = {key for key in state if key in held}
        assert all(torch.equal(state[key], held[key]) for key in shared)
        prefixes = tuple(f"{path}." for path in content["layer_collapse"]["modules"])
        lost = [key for key in held.keys() - state.keys() if key.split(".", 1)[1].startswith(prefixes)]
        assert not lost
        assert all(torch.isfinite(value).all() for value in state.values())


def positions(value, path=()):
    """Every place in a JSON value, as paths of keys."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from positions(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from positions(value[index], (*path, index))


@SLOW
@given(data=st.data())
def test_one_edit_of_a_table(saved, data):
    content = json.loads(json.dumps(saved[2]))
    table = content["layer_collapse"]
    places = [place for place in positions(table) if place]
    place = data.draw(st.sampled_from(places))
    target = table
    for key in place[:-1]:
        target = target[key]
    kind = data.draw(st.sampled_from(["replace", "delete", "rename"]))
    if kind == "replace" or isinstance(target, list):
        target[place[-1]] = data.draw(json_values | specs)
    elif kind == "delete":
        del target[place[-1]]
    else:
        target[data.draw(paths)] = target.pop(place[-1])
    check(saved, content)


@SLOW
@given(data=st.data())
def test_hostile_entries_beside_good_ones(saved, data):
    content = json.loads(json.dumps(saved[2]))
    content["layer_collapse"]["modules"].update(data.draw(tables))
    check(saved, content)


@SLOW
@given(table=layer_collapses)
def test_another_table_altogether(saved, table):
    check(saved, {**saved[2], "layer_collapse": table})


@SLOW
@given(json_values | st.sampled_from(["layercollapse", "t5", "vit", "llama", "auto", "../bert", "os"]))
def test_other_base_model_types(saved, value):
    auto_class, folder, original = saved
    if value == original["base_model_type"]:
        return
    (folder / "config.json").write_text(json.dumps({**original, "base_model_type": value}))
    try:
        with pytest.raises((ValueError, RuntimeError, StrictDataclassError)):
            auto_class.from_pretrained(folder)
    finally:
        (folder / "config.json").write_text(json.dumps(original))


@SLOW
@given(data=st.data())
def test_a_file_cut_anywhere(saved, data, tmp_path_factory):
    auto_class, folder, _ = saved
    copy = tmp_path_factory.mktemp("cut") / "copy"
    shutil.copytree(folder, copy)
    name = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: data.draw(st.integers(0, len(content) - 3))])
    with pytest.raises(Exception) as caught:  # noqa: B017  (safetensors has an error class of its own)
        auto_class.from_pretrained(copy)
    assert type(caught.value).__name__ in (
        "SafetensorError",
        "OSError",
        "ValueError",
        "EnvironmentError",
        "JSONDecodeError",
    )
    shutil.rmtree(copy)


# ----------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------

patterns = st.text(alphabet="()[]{}.*+?\\|^$09ab:-,", max_size=30)
options = st.dictionaries(
    st.sampled_from([*LayerCollapseConfig.__dataclass_fields__, "unknown"]), json_values | patterns, max_size=4
)


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
@QUICK
@given(options)
def test_options_are_valid_or_refused(values):
    try:
        config = LayerCollapseConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        assert len(str(error)) > 20
    else:
        again = LayerCollapseConfig.from_json_string(config.to_json_string())
        assert again == config and LayerCollapseConfig.from_dict(config.to_dict()) == config


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
@QUICK
@given(
    patterns | st.sampled_from(["(" * 500, "(a" * 5000 + ")" * 5000, "a{99999999999999999999}", "(?i", "\\", "last:0"])
)
def test_any_pattern(pattern):
    try:
        assert LayerCollapseConfig(blocks=pattern).blocks == pattern
    except ValueError as error:
        assert "blocks" in str(error)
