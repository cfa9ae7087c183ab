"""LayerCollapseConfig: what it accepts, refuses, and writes."""

import copy
import dataclasses
import json
import logging
from dataclasses import replace

import pytest
import yaml
from transformers import HfArgumentParser

from hf_layercollapse import LayerCollapseConfig
from hf_layercollapse.config import READERS


FULL = {
    "blocks": [0, 3],
    "linear_target": "affine",
    "granularity": "neuron",
    "activation": "relu",
    "initial_alpha": 0.25,
    "penalty_strength": 2.0,
    "penalty_schedule": "cosine",
    "penalty_warmup_ratio": 0.5,
    "alpha_learning_rate": 0.1,
    "alpha_lr_schedule": "same",
    "collapse_threshold": 0.02,
    "not_ready": "restore",
}


def test_defaults():
    config = LayerCollapseConfig()
    assert (config.blocks, config.linear_target, config.granularity) == ("all", "identity", "block")
    assert (config.initial_alpha, config.penalty_strength, config.collapse_threshold) == (0.0, 1.0, 0.05)
    assert all(field.metadata.get("help") for field in dataclasses.fields(config))


@pytest.mark.parametrize("values", [{}, FULL, {"blocks": ["a.b", "c"]}, {"blocks": "last:4"}], ids=str)
def test_round_trips_through_json(values):
    config = LayerCollapseConfig(**values)
    assert LayerCollapseConfig.from_json_string(config.to_json_string()) == config
    assert LayerCollapseConfig.from_dict(config.to_dict()) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert {**config.to_dict(), **values} == config.to_dict()


def test_something_reads_each_option():
    options = {option.name for option in dataclasses.fields(LayerCollapseConfig)}
    assert {option for read in READERS.values() for option in read} == options


def test_to_dict_is_a_copy():
    blocks = [1, 2]
    config = LayerCollapseConfig(blocks=blocks)
    config.to_dict()["blocks"].append(9)
    blocks.append(7)
    assert config.blocks == [1, 2]


def test_the_papers_setting():
    assert LayerCollapseConfig.paper() == LayerCollapseConfig(activation="relu", initial_alpha=0.01)
    config = LayerCollapseConfig.paper("last:2", initial_alpha=0.0, penalty_strength=5)
    assert (config.blocks, config.activation, config.initial_alpha) == ("last:2", "relu", 0.0)


def test_unknown_options_are_dropped_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        config = LayerCollapseConfig.from_dict({**FULL, "from_the_future": 1, "another": 2})
    assert config == LayerCollapseConfig(**FULL)
    assert "from_the_future" in caplog.text and "another" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        LayerCollapseConfig.from_dict(FULL)
    assert not caplog.text


@pytest.mark.parametrize("bounds", [("initial_alpha", 0, 1), ("collapse_threshold", 0, 0.999)], ids=str)
def test_bounds_are_included(bounds):
    name, *values = bounds
    for value in values:
        assert getattr(LayerCollapseConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("linear_target", "linear"),
        ("linear_target", None),
        ("linear_target", ["identity"]),
        ("granularity", "layer"),
        ("activation", "gelu"),
        ("penalty_schedule", "step"),
        ("alpha_lr_schedule", "linear"),
        ("not_ready", "drop"),
        ("initial_alpha", -0.01),
        ("initial_alpha", 1.01),
        ("penalty_strength", -1),
        ("penalty_strength", float("inf")),
        ("penalty_warmup_ratio", 0),
        ("penalty_warmup_ratio", 1.5),
        ("collapse_threshold", 1.0),
        ("collapse_threshold", -0.1),
        ("alpha_learning_rate", 0),
        ("alpha_learning_rate", -1e-3),
        ("alpha_learning_rate", float("inf")),
        *[
            (name, float("nan"))
            for name in (
                "initial_alpha",
                "penalty_strength",
                "penalty_warmup_ratio",
                "collapse_threshold",
                "alpha_learning_rate",
            )
        ],
        ("blocks", ""),
        ("blocks", []),
        ("blocks", ()),
        ("blocks", "last:"),
        ("blocks", "last:0"),
        ("blocks", "first:-1"),
        ("blocks", "first:two"),
        ("blocks", "last:1.5"),
        ("blocks", "layer.(1"),
        ("blocks", [1, 1]),
        ("blocks", ["a", "a"]),
    ],
    ids=str,
)
def test_values_that_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        LayerCollapseConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initial_alpha", "0.5"),
        ("initial_alpha", True),
        ("penalty_strength", None),
        ("collapse_threshold", [0.05]),
        ("alpha_learning_rate", "fast"),
        ("blocks", None),
        ("blocks", 3),
        ("blocks", {0, 1}),
        ("blocks", [0, "a"]),
        ("blocks", [True]),
        ("blocks", [0.0]),
        ("blocks", [None]),
    ],
    ids=str,
)
def test_types_that_are_refused(name, value):
    with pytest.raises(TypeError, match=f"`{name}`"):
        LayerCollapseConfig(**{name: value})


def test_numbers_become_floats():
    config = LayerCollapseConfig(penalty_strength=2, initial_alpha=1)
    assert type(config.penalty_strength) is float and type(config.initial_alpha) is float


def test_makes_a_command_line():
    def parse(*arguments):
        return HfArgumentParser(LayerCollapseConfig).parse_args_into_dataclasses(list(arguments))[0]

    assert parse() == LayerCollapseConfig()
    config = parse("--linear_target", "affine", "--collapse_threshold", "0.1", "--not_ready", "restore")
    assert config == LayerCollapseConfig(linear_target="affine", collapse_threshold=0.1, not_ready="restore")
    assert parse("--blocks", "last:2") == LayerCollapseConfig(blocks="last:2")
    assert parse("--blocks", "all") == LayerCollapseConfig()
    assert parse("--blocks", "encoder.layer.0").blocks == ["encoder.layer.0"]
    assert parse("--blocks", "encoder.layer.0", "encoder.layer.4").blocks == ["encoder.layer.0", "encoder.layer.4"]


@pytest.mark.parametrize(
    "other",
    [
        {"initial_alpha": 0.5},
        {"penalty_strength": 3.0},
        {"progressive": True},
        {"linear_target": "affine"},
        {"granularity": "neuron"},
        {"rank": 4},
        {"keep_neurons": 4},
        {"sequential": True},
    ],
)
def test_options_of_alphas_contradict_a_budget(other):
    (name,) = other
    with pytest.raises(ValueError, match=f"leave `{name}` out, or the `budget`"):
        LayerCollapseConfig(budget="macs=0.5", **other)


@pytest.mark.parametrize(
    "budget, message",
    [
        ("macs", "`budget` must be parameters="),
        ("size=0.5", "`budget` must be parameters="),
        ("macs=half", "'half' is not a number"),
        ("macs=0", "`macs` must be a share"),
        ("latency=2", "`latency` must be a share"),
    ],
)
def test_budgets_that_are_none(budget, message):
    with pytest.raises(ValueError, match=message):
        LayerCollapseConfig(budget=budget)


def test_a_weight_that_nobody_gave_goes_with_the_budget():
    with_budget, without = LayerCollapseConfig(budget="macs=0.5"), LayerCollapseConfig()
    assert replace(with_budget, budget=None).distillation_weight == 0
    assert replace(replace(without, budget="macs=0.5"), temperature=3.0).distillation_weight == 1
    for weight in (0.0, 0.5, 1.0):
        assert replace(replace(with_budget, distillation_weight=weight), budget=None).distillation_weight == weight
    # To whoever reads or writes it, it is a number.
    options = with_budget.to_dict()
    assert type(options["distillation_weight"]) is float and yaml.safe_load(yaml.safe_dump(options)) == options
    assert LayerCollapseConfig.from_dict(options) == with_budget == copy.deepcopy(with_budget)
    assert LayerCollapseConfig.from_json_string(with_budget.to_json_string()) == with_budget


def test_a_budget_teaches_unless_it_is_told_not_to():
    assert LayerCollapseConfig().distillation_weight == 0
    assert LayerCollapseConfig(budget="macs=0.5").distillation_weight == 1
    assert LayerCollapseConfig(budget="macs=0.5", distillation_weight=0).distillation_weight == 0
    with pytest.raises(ValueError, match="`budget_samples` must be an integer >= 8"):
        LayerCollapseConfig(budget="macs=0.5", budget_samples=7)
    with pytest.raises(TypeError, match="`budget` must be words"):
        LayerCollapseConfig(budget=0.5)
