"""Models of the user's own code: what is saved comes back as that, or it is not changed in the first place."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, collapse_model
from hf_layercollapse.modeling_layercollapse import CODE_FILE

from .models import BY_NAME, needs_registration, registered
from .test_patching import logits
from .test_remote_code import HIDE
from .test_saving_loading import in_life


CASE = BY_NAME["bert"]

# ----------------------------------------------------------------------------------------------------
# Code that lies in a repository
# ----------------------------------------------------------------------------------------------------

MODELING = """
from transformers import BertConfig, BertForSequenceClassification, BertModel
from .pooling_x import mean

class LoudBert(BertModel):
    config_class = BertConfig
    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

class MeanBert(BertForSequenceClassification):
    config_class = BertConfig
    def forward(self, input_ids=None, labels=None, **kwargs):
        return {"logits": self.classifier(mean(self.bert(input_ids).last_hidden_state))}
"""
POOLING = "def mean(hidden_states):\n    return hidden_states.mean(1)\n"
AUTO_MAP = {"AutoModelForSequenceClassification": "modeling_x.MeanBert", "AutoModel": "modeling_x.LoudBert"}
FILES = {"modeling_x.py", "pooling_x.py", CODE_FILE, "config.json", "model.safetensors"}

START = """
import os, torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForSequenceClassification as Auto
torch.set_num_threads(1)
ids = torch.arange(3, 17).reshape(2, 7)

def compute(model):
    with torch.no_grad():
        return model.eval()(ids)["logits"]
"""
MAKE = """
from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, collapse_model
model = Auto.from_pretrained("theirs", trust_remote_code=True)
dense = compute(model)
apply_layer_collapse(model)
assert torch.equal(compute(model), dense) and type(model).__name__ == "MeanBert"
model.save_pretrained("patched")
for alpha in [p for name, p in model.named_parameters() if name.endswith(".alpha")][:2]:
    torch.nn.init.ones_(alpha)
collapse_model(model)
model.save_pretrained("collapsed")
base = AutoModel.from_pretrained("theirs", trust_remote_code=True).eval()
save_file({"patched": dense, "collapsed": compute(model), "base": base(ids)[0].detach()}, "expected.safetensors")
"""
LOAD = """
from safetensors.torch import load_file
expected = load_file("expected.safetensors")
for folder in ("patched", "collapsed"):
    for flag in ({}, {"trust_remote_code": False}):
        try:
            Auto.from_pretrained(folder, **flag)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError("another model was loaded without a word")
    model = Auto.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "MeanBert" and torch.equal(compute(model), expected[folder])
    model.save_pretrained(folder + "-again")
    assert sorted(os.listdir(folder + "-again")) == sorted(os.listdir(folder))
    again = Auto.from_pretrained(folder + "-again", trust_remote_code=True)
    assert type(again).__name__ == "MeanBert" and torch.equal(compute(again), expected[folder])
base = AutoModel.from_pretrained("patched", trust_remote_code=True).eval()
assert type(base).__name__ == "LoudBert" and torch.equal(base(ids)[0], expected["base"])
"""


def run(root, code):
    environment = {**os.environ, "HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=root, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that were saved by the class of a repository, in a process that has the package."""
    root = tmp_path_factory.mktemp("own-code")
    CASE.model().save_pretrained(root / "theirs")
    (root / "theirs" / "modeling_x.py").write_text(MODELING)
    (root / "theirs" / "pooling_x.py").write_text(POOLING)
    config = json.loads((root / "theirs" / "config.json").read_text())
    (root / "theirs" / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}))
    run(root, START + MAKE)
    return root


def test_their_code_is_in_the_folder(saved):
    for life in ("patched", "collapsed"):
        assert set(os.listdir(saved / life)) == FILES
        assert (saved / life / "modeling_x.py").read_text() == MODELING
        config = json.loads((saved / life / "config.json").read_text())
        assert config["auto_map"] == {**AUTO_MAP, "AutoConfig": "modeling_layercollapse.StoredConfig"}
        assert config["layer_collapse"]["model_classes"] == {
            auto: reference.split(".")[1] for auto, reference in AUTO_MAP.items()
        }
    expected = load_file(saved / "expected.safetensors")["patched"]
    assert not torch.equal(logits(CASE.model(), {"input_ids": torch.arange(3, 17).reshape(2, 7)}), expected)


@pytest.mark.parametrize("hidden", [False, True], ids=["with-the-package", "without"])
def test_their_class_comes_back(saved, hidden):
    run(saved, (HIDE if hidden else "import hf_layercollapse\n") + START + LOAD)


# ----------------------------------------------------------------------------------------------------
# Code that is installed, or stands in a script
# ----------------------------------------------------------------------------------------------------


class MeanBert(BertForSequenceClassification):
    config_class = BertConfig

    def forward(self, input_ids=None, labels=None, **kwargs):
        return {"logits": self.classifier(self.bert(input_ids).last_hidden_state.mean(1))}


class OwnBertConfig(BertConfig):
    extra: int = 1


class OwnConfigBert(BertForSequenceClassification):
    config_class = OwnBertConfig


def outputs(model):
    with torch.no_grad():
        return model.eval()(**CASE.inputs())["logits"]


@needs_registration
def test_registered_classes(tmp_path):
    # The family is in use before the class is known.
    in_life(CASE, "half").save_pretrained(tmp_path / "stock")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock")
    model = MeanBert(CASE.config()).eval()
    expected = outputs(model)
    with registered(AutoModelForSequenceClassification, BertConfig, MeanBert):
        apply_layer_collapse(model)
        model.save_pretrained(tmp_path / "own")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "own")
        assert isinstance(loaded, MeanBert) and torch.equal(outputs(loaded), expected)
        loaded.save_pretrained(tmp_path / "again")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
        assert isinstance(again, MeanBert) and torch.equal(outputs(again), expected)
        # As a dense folder of the stock class would.
        assert isinstance(AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock"), MeanBert)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock")
    assert not isinstance(stock, MeanBert)
    # Where nobody knows the class, the stock one would compute something else.
    for flag in ({}, {"trust_remote_code": True}):
        with pytest.raises(ValueError, match="AutoModelForSequenceClassification.register.BertConfig, MeanBert"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "own", **flag)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "own")), expected)
    # Its body is transformers' own.
    base = AutoModel.from_pretrained(tmp_path / "own").eval()
    with torch.no_grad():
        assert torch.equal(base(**CASE.inputs())[0], model.bert(**CASE.inputs())[0])


@pytest.mark.parametrize(
    ("own", "advice"),
    [
        (lambda: MeanBert(CASE.config()), r"`AutoModel.register\(BertConfig, MeanBert, exist_ok=True\)`"),
        (lambda: OwnConfigBert(OwnBertConfig(**CASE.config().to_dict())), r"`AutoConfig.register\('bert', OwnBertC"),
        (
            lambda: BertForSequenceClassification(OwnBertConfig(**CASE.config().to_dict())),
            r"`AutoConfig.register\('bert', OwnBertC.*`model_type` of its own",
        ),
    ],
    ids=["class", "class-and-config", "config"],
)
def test_classes_that_nobody_knows_are_refused_before_anything_changes(own, advice):
    model = own()
    before, kind, config = copy.deepcopy(model.state_dict()), type(model), model.config
    with pytest.raises(ValueError, match=advice):
        apply_layer_collapse(model)
    with pytest.raises(ValueError, match=advice):
        collapse_model(model, LayerCollapseConfig(blocks=[0]), calibration_data=[CASE.inputs()])
    assert type(model) is kind and model.config is config and "layer_collapse" not in config.__dict__
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_code_of_a_script_cannot_be_copied():
    """`save_pretrained` only warns that what stands in `__main__` is not in the folder."""
    script = type("MeanBert", (MeanBert,), {"__module__": "__main__", "_auto_class": "AutoModel"})
    with pytest.raises(ValueError, match="AutoModel.register"):
        apply_layer_collapse(script(CASE.config()))
