"""Folders on machines without the package: with and without `trust_remote_code`, in fresh processes."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from transformers import BertModel

import hf_layercollapse
from hf_layercollapse import modeling_layercollapse
from hf_layercollapse.modeling_layercollapse import CODE_FILE
from hf_layercollapse.patching import refresh_layer_collapse

from .models import BY_NAME
from .test_families import encoder_decoder_around
from .test_patching import logits
from .test_saving_loading import in_life


# Where the package cannot be imported, whatever is installed.
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_layercollapse":
            raise ModuleNotFoundError("No module named 'hf_layercollapse'", name="hf_layercollapse")

sys.meta_path.insert(0, Hidden())
"""

START = """
import shutil, torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, pipeline
torch.set_num_threads(1)
auto = {"bert": AutoModelForSequenceClassification, "vit": AutoModelForImageClassification}
auto["gpt2"], auto["whole"] = AutoModelForCausalLM, AutoModelForSeq2SeqLM
inputs, expected = torch.load("inputs.pt"), torch.load("logits.pt")

def check(name, folder, **kwargs):
    model = auto[name].from_pretrained(folder, **kwargs)
    with torch.no_grad():
        assert torch.equal(model(**inputs[name]).logits, expected[name]), name
    return model

def refused(load, *args, **kwargs):
    try:
        load(*args, **kwargs)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("loaded code that nobody trusts")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("remote")
    inputs, outputs = {}, {}
    for name in ("bert", "vit", "gpt2"):
        model = in_life(BY_NAME[name], "half")
        model.save_pretrained(root / name)
        inputs[name] = BY_NAME[name].inputs()
        outputs[name] = logits(model, inputs[name])
    model = in_life(BY_NAME["bert"], "half")
    model.save_pretrained(root / "holder" / "inner")
    whole = encoder_decoder_around(in_life(BY_NAME["bert"], "half", model=BertModel(BY_NAME["bert"].config())))
    whole.save_pretrained(root / "part")
    refresh_layer_collapse(whole)
    whole.save_pretrained(root / "whole")
    ids = BY_NAME["bert"].inputs()["input_ids"]
    inputs["whole"] = {"input_ids": ids, "decoder_input_ids": ids}
    outputs["whole"] = logits(whole, inputs["whole"])
    torch.save(inputs, root / "inputs.pt")
    torch.save(outputs, root / "logits.pt")
    return root


def run(root, code, hidden=True):
    """Runs code in a fresh process in `root`, with nothing to read from and a cache of its own."""
    environment = {**os.environ, "HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    script = (HIDE if hidden else "") + START + code
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.smoke
def test_without_the_package(folders):
    run(
        folders,
        """
try:
    import hf_layercollapse
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the package is not hidden")

# Neither package nor flag.
refused(AutoModelForSequenceClassification.from_pretrained, "bert")
refused(AutoConfig.from_pretrained, "bert")

# The flag: the copied file does it.
model = check("bert", "bert", trust_remote_code=True)
assert isinstance(model, transformers.BertForSequenceClassification)
assert type(model).__module__.startswith("transformers_modules.")
assert model.config.model_type == "bert"
assert torch.equal(
    AutoModel.from_pretrained("bert", trust_remote_code=True)(**inputs["bert"])[0],
    model.base_model(**inputs["bert"])[0],
)
assert type(AutoModelForSequenceClassification.from_config(model.config)) is type(model)

# One trusted folder does not vouch for another.
refused(AutoModelForImageClassification.from_pretrained, "vit")
refused(AutoModelForSequenceClassification.from_pretrained, "bert")
check("vit", "vit", trust_remote_code=True)
check("gpt2", "gpt2", trust_remote_code=True)

# A whole with a patched or collapsed part: by its own table, and not where the part alone has one.
check("whole", "whole", trust_remote_code=True)
try:
    auto["whole"].from_pretrained("part", trust_remote_code=True)
except ValueError as error:
    assert "layercollapse" in str(error), error
else:
    raise AssertionError("loaded without code")

# transformers looks for code beside the folders of a repository, and not in them.
try:
    check("bert", "holder", subfolder="inner", trust_remote_code=True)
except OSError as error:
    assert "modeling_layercollapse.py" in str(error), error
else:
    raise AssertionError("transformers finds code in a subfolder by now: save_and_load.md says that it does not")
shutil.copy("holder/inner/modeling_layercollapse.py", "holder")
check("bert", "holder", subfolder="inner", trust_remote_code=True)

# Saved again, the file is there again.
model.save_pretrained("again")
assert open("again/modeling_layercollapse.py").read() == open("bert/modeling_layercollapse.py").read()
again = check("bert", "again", trust_remote_code=True)
again.save_pretrained("again")
check("bert", "again", trust_remote_code=True)
import copy, pickle
check_copy = pickle.loads(pickle.dumps(copy.deepcopy(again)))
assert torch.equal(check_copy(**inputs["bert"]).logits, expected["bert"])

# Dense models are what they were.
model = AutoModelForSequenceClassification.from_config(transformers.BertConfig(
    vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2))
assert type(model) is transformers.BertForSequenceClassification
""",
    )
    # What was saved there loads here.
    case = BY_NAME["bert"]
    loaded = case.auto_class.from_pretrained(folders / "again")
    assert torch.equal(logits(loaded, case.inputs()), torch.load(folders / "logits.pt")["bert"])


def test_pickled_by_value(folders):
    """As vLLM, Ray and workers of a DataLoader send objects to processes that have neither package nor folder."""
    run(
        folders,
        """
import cloudpickle, pathlib
config = AutoConfig.from_pretrained("bert", trust_remote_code=True)
model = check("bert", "bert", trust_remote_code=True)
import transformers_modules
cloudpickle.register_pickle_by_value(transformers_modules)
pathlib.Path("config.pkl").write_bytes(cloudpickle.dumps(config))
pathlib.Path("model.pkl").write_bytes(cloudpickle.dumps(model))
""",
    )
    for first, second in (("config", "model"), ("model", "config")):
        run(
            folders,
            f"""
import pickle, sys
loaded = {{name: pickle.load(open(name + ".pkl", "rb")) for name in ({first!r}, {second!r})}}
config, model = loaded["config"], loaded["model"]
"""
            + """
new = AutoModelForSequenceClassification.from_config(config)
assert new.state_dict().keys() == model.state_dict().keys()
assert "transformers_modules" not in sys.modules
with torch.no_grad():
    output = model(**inputs["bert"], output_hidden_states=True)
    assert torch.equal(output.logits, expected["bert"]) and len(output.hidden_states) == 4
    assert len(new(**inputs["bert"], output_hidden_states=True).hidden_states) == 4
    assert type(AutoModelForSequenceClassification.from_config(model.config)) is type(model)
""",
        )


def test_the_plugin_of_vllm():
    with open(os.path.join(os.path.dirname(os.path.dirname(__file__)), "pyproject.toml")) as file:
        value = re.search(r'"vllm.general_plugins"\]\nhf_layercollapse = "(.+)"', file.read())[1]
    assert EntryPoint("hf_layercollapse", value, "vllm.general_plugins").load()() is None


def test_the_package_wins_over_the_code_in_the_folder(folders):
    (folders / "hostile").mkdir()
    for file in (folders / "bert").iterdir():
        (folders / "hostile" / file.name).write_bytes(file.read_bytes())
    (folders / "hostile" / CODE_FILE).write_text("raise SystemExit('ran code from the folder')")
    run(
        folders,
        """
# The copies first, then the package, in one process.
remote = check("bert", "bert", trust_remote_code=True)
import hf_layercollapse
for flag in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
    model = check("bert", "hostile", **flag)
    assert type(model).__module__ == "hf_layercollapse.modeling_layercollapse"
    check("vit", "vit", **flag)

# A model that the copy built is not one that the package knows its way around in.
for call in (hf_layercollapse.apply_layer_collapse, hf_layercollapse.collapse_model,
             hf_layercollapse.remove_layer_collapse, hf_layercollapse.find_feed_forward_blocks):
    try:
        call(remote)
    except TypeError as error:
        assert "import hf_layercollapse" in str(error), error
    else:
        raise AssertionError(call)
with torch.no_grad():
    assert torch.equal(remote(**inputs["bert"]).logits, expected["bert"])
""",
        hidden=False,
    )


def test_the_file_stands_alone():
    with open(modeling_layercollapse.__file__) as file:
        tree = ast.parse(file.read())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports would need other files"
            imported.add(node.module.split(".")[0])
    assert imported <= {"torch", "transformers"} | sys.stdlib_module_names
    assert {"torch", "transformers"} <= imported


def test_importing_the_package_costs_little():
    """Neither the Trainer nor what only other parts need is imported, nor any family of models."""
    script = """
import sys
from transformers import AutoConfig, AutoModel, PreTrainedModel
before = set(sys.modules)
import hf_layercollapse
new = {name for name in set(sys.modules) - before if not name.startswith("hf_layercollapse")}
for name in ("transformers.trainer", "peft", "datasets", "evaluate", "accelerate", "pandas", "matplotlib", "tqdm.auto",
             "torch._dynamo", "transformers.models.bert.modeling_bert", "transformers.models.vit.modeling_vit"):
    assert name not in new, f"{name} is imported with the package"
allowed = {"hf_layercollapse", "hf_layercollapse._version", "hf_layercollapse.modeling_layercollapse"}
assert {name for name in sys.modules if name.startswith("hf_layercollapse")} == allowed
print(len(new))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.splitlines()[-1]) < 40


def test_the_shells_program_starts_with_little():
    """Its help, versions and refusals need neither what reads data and metrics, nor adapters, nor a Trainer."""
    pytest.importorskip("typer", reason="the extra cli is not installed")
    script = """
import sys
from transformers import AutoConfig, AutoModel, PreTrainedModel
before = set(sys.modules)
import hf_layercollapse.cli
new = set(sys.modules) - before
for name in ("datasets", "evaluate", "peft", "bitsandbytes", "transformers.training_args", "transformers.trainer"):
    assert name not in new, f"{name} is imported with the program"
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_there():
    for name in hf_layercollapse.__all__:
        assert getattr(hf_layercollapse, name).__name__ == name
    assert set(hf_layercollapse.__all__) <= set(dir(hf_layercollapse))
    with pytest.raises(AttributeError, match="no_such_name"):
        hf_layercollapse.no_such_name  # noqa: B018
