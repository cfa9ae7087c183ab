"""Every model type of the committed list through the whole road, and the list's own length."""

import collections
import math
import os
import signal
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_layercollapse import families
from hf_layercollapse.families import LAYOUTS

from . import every_model_type as road


LIST = road.read_list()

# The transformers that the list is of. Others lack types of it, and have types and heads that it lacks.
PINNED = (Path(__file__).resolve().parent.parent / ".ci" / "constraints.txt").read_text()
LISTED = f"transformers=={transformers.__version__}\n" in PINNED

SMOKE = ("bert", "clip", "dinov2", "gpt2", "llama", "mixtral", "swin", "t5", "vit", "whisper")

# The list may grow. To take a type out of it is to lower this number.
MODEL_TYPES = 415

# Rows of the table that no model type of the list has, each with its reason.
NO_SUCH_MODEL = {
    "gate_up_proj/down_proj (up first)",  # none in transformers; a module of this kind is in test_families.py
    "w1/w3/w2",  # LFM2 calls its activation as a function, which is refused with that reason
}
# Rows that fewer than three model types of transformers have: as many as there are.
FEWER = {
    "dense.dense/output.dense": 1,  # Reformer
    "dense1/dense2": 1,  # PVT
    "fc_in/fc_out": 2,  # GPT-J, CodeGen
    "fc1/fc2 gated": 1,  # Moshi
    "fc1/fc2 gated (up first)": 1,  # Moonshine
    "ffn/ffn_output": 1,  # ALBERT
    "in_proj/out_proj": 1,  # Bark
    "input_linear/output_linear": 1,  # GraniteMoeHybrid
    "intermediate/output": 1,  # ProphetNet
    "layer_1/layer_2": 1,  # XLNet
    "linear_1/linear_2": 0,  # projectors between equal widths: one in each model
    "linear_up/linear_down": 1,  # LeViT
    "pwconv1/pwconv2": 1,  # ConvNeXt
    "split language": 1,  # LXMERT
    "split vision": 1,  # LXMERT
    "w_in/w_out": 1,  # CPM-Ant
}


# Configs that are searched for ten seconds and more.
LONG = {"cvt", "donut-swin"}


def marks_of(name):
    return [pytest.mark.smoke] * (name in SMOKE) + [pytest.mark.slow] * (name in LONG)


@pytest.mark.parametrize("model_type", [pytest.param(name, marks=marks_of(name)) for name in LIST["passed"]])
def test_model_type(model_type):
    if model_type not in CONFIG_MAPPING_NAMES and not LISTED:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    result = road.examine(model_type)
    if result["status"] == "not built" and not LISTED:
        pytest.skip(f"transformers {transformers.__version__} makes no small model of it: {result['reason']}")
    assert result["status"] == "passed", result
    listed = road.as_list([result])
    assert road.still_passes(model_type, LIST, listed, same_heads=LISTED), listed["passed"]


def test_a_layout_that_is_lost_is_noticed(monkeypatch):
    assert road.still_passes("bert", LIST, road.as_list([road.examine("bert")]))
    monkeypatch.setattr(families, "LAYOUTS", [row for row in LAYOUTS if row.name != "split"])
    lost = road.as_list([road.examine("bert")])
    assert not road.still_passes("bert", LIST, lost)
    assert lost["no blocks"] == {"bert": "nothing in it is spelled like a feed-forward block"}


def test_a_type_that_takes_too_long_or_dies_takes_no_other_with_it(monkeypatch):
    examine = road.examine

    def ends(model_type):
        if model_type == "gpt2":
            os.kill(os.getpid(), signal.SIGKILL)
        while model_type == "vit":
            math.sqrt(2)
        return examine(model_type)

    monkeypatch.setattr(road, "examine", ends)
    monkeypatch.setattr(road, "TIME_LIMIT", 8)
    types = ["vit", "gpt2", "bert", "opt"]
    results = {result["model_type"]: (result["status"], result.get("reason")) for result in road.examine_all(types)}
    assert results == {
        "vit": ("not built", "took more than 8 s of CPU time"),
        "gpt2": ("failed", f"the process died (exit status {-signal.SIGKILL})"),
        "bert": ("passed", None),
        "opt": ("passed", None),
    }


def test_the_list_does_not_shrink():
    assert len(LIST["passed"]) >= MODEL_TYPES
    assert [name for name, entry in LIST["passed"].items() if "not trained" in entry] == ["reformer"]


def test_every_layout_is_in_it_three_times_with_two_blocks():
    types = collections.Counter(
        layout for entry in LIST["passed"].values() for layout, blocks in entry["blocks"].items() if blocks >= 2
    )
    names = {row.name for row in LAYOUTS} | {"sequential"}
    # ALBERT has one, which all its layers share.
    shared = {"ffn/ffn_output"}
    assert {name for name in names - shared if types[name] < FEWER.get(name, 3)} == NO_SUCH_MODEL
    assert LIST["passed"]["albert"]["blocks"] == {"ffn/ffn_output": 1}


@pytest.mark.skipif(not LISTED, reason="the list is of the pinned transformers")
def test_every_model_type_is_accounted_for():
    listed = [name for status in LIST.values() for name in status]
    assert sorted(listed) == sorted(set(CONFIG_MAPPING_NAMES) - road.SKIPPED)
    assert all(LIST[status][name] for status in LIST for name in LIST[status])
