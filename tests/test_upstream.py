"""Private names of transformers, accelerate, peft and torch stand in two places, and are looked for at import."""

import ast
import re
import types
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedConfig, PreTrainedModel, Trainer
from transformers.utils import output_capturing

import hf_layercollapse
from hf_layercollapse import modeling_layercollapse, upstream
from hf_layercollapse.modeling_layercollapse import MODEL_METHODS, MODULE_METHODS, require_methods
from hf_layercollapse.upstream import TRAINER_METHODS


PACKAGE = Path(hf_layercollapse.__file__).parent
SEAMS, TRAVELS = "upstream.py", "modeling_layercollapse.py"
UPSTREAM = (Trainer, PreTrainedModel, PreTrainedConfig, nn.Module)
# The private names that the package uses. One that is new here needs a seam, with its reason and a check.
USED = {
    "_BaseAutoModelClass",
    "_C",
    "_CAN_RECORD_REGISTRY",
    "_are_functorch_transforms_active",
    "_auto_class",
    "_buffers",
    "_can_record_outputs",
    "_compiled_call_impl",
    "_gradient_checkpointing_func",
    "_hf_hook",
    "_hf_peft_config_loaded",
    "_is_hf_initialized",
    "_logs",
    "_metrics",
    "_model_mapping",
    "_models",
    "_modules",
    "_old_forward",
    "_orig_mod",
    "_parameters",
    "_pending_extra_logs",
    "_pending_metrics",
    "_step_supports_amp_scaling",
    "_stored_metrics",
}


def is_private(name):
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def sources():
    return {file.name: ast.parse(file.read_text()) for file in sorted(PACKAGE.glob("*.py"))}


def own_names(trees):
    """What the package defines itself: functions, classes, variables, arguments, and attributes that a class gives
    itself."""
    names = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname for alias in node.names if alias.asname}
    return names


def names_used(tree):
    """`[(private name, line)]`: attributes, imports, and strings that are nothing but such a name."""
    inside_text = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for name in [*(node.module or "").split("."), *(alias.name for alias in node.names)]:
                if is_private(name):
                    yield name, node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_private(node.value):
            if id(node) not in inside_text and not node.value.endswith("_"):
                yield node.value, node.lineno


def section(source, title):
    """`(first line, last line)` of a part of a file, by the head that stands between two rules."""
    lines = source.split("\n")
    heads = [i for i, line in enumerate(lines) if line.startswith("# ---") and lines[i + 1].startswith("# ")]
    heads = [i for i in heads if not lines[i - 1].startswith("# ")] + [len(lines)]
    for start, end in zip(heads, heads[1:], strict=False):
        if lines[start + 1].startswith(f"# {title}"):
            return start + 1, end
    raise AssertionError(f"no section {title}")


def test_private_names_stand_in_two_places():
    trees = sources()
    own = own_names(trees)
    methods = {*MODEL_METHODS, *MODULE_METHODS, *TRAINER_METHODS}
    # Endings of words; what a copy of a module keeps of its own, by name.
    words = {"_model_preparation_time", "_dim", "_source"}
    first, last = section((PACKAGE / TRAVELS).read_text(), "Upstream")
    found, elsewhere = set(), []
    for file, tree in trees.items():
        for name, line in names_used(tree):
            if name in own or name in methods or name in words:
                continue
            found.add(name)
            if not (file == SEAMS or (file == TRAVELS and first <= line <= last)):
                elsewhere.append(f"{file}:{line} {name}")
    assert not elsewhere, "private upstream names outside of their seams"
    assert found == USED


def test_every_override_of_a_private_method_is_listed():
    overridden = {}
    for file, tree in sources().items():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            for method in (item for item in node.body if isinstance(item, ast.FunctionDef)):
                if is_private(method.name) and any(method.name in dir(owner) for owner in UPSTREAM):
                    overridden.setdefault(method.name, set()).add(file)
    assert overridden.keys() == {*MODEL_METHODS, *MODULE_METHODS, *TRAINER_METHODS}
    for name, files in overridden.items():
        assert files <= ({"trainer.py", "checkpoints.py"} if name in TRAINER_METHODS else {TRAVELS}), name


@pytest.mark.smoke
def test_a_name_that_is_gone_says_what_to_install():
    class Renamed:
        def _save(self, folder, state_dict):
            pass

    upstream.require_trainer(Trainer)
    for methods in ({"_save_checkpoint": "model trial"}, {"_save": "output_dir state_dict"}):
        with pytest.raises(ImportError, match=rf"uses `Renamed\._save.*transformers {transformers.__version__}"):
            require_methods(Renamed, methods, transformers)
    with pytest.raises(ImportError, match=f"tried with: {modeling_layercollapse.SEEN}"):
        modeling_layercollapse.require(False, "nn.Module._gone", torch)


@pytest.mark.smoke
def test_seams_do_what_they_say():
    linear = nn.Linear(2, 2)
    compiled = torch.compile(linear, backend="eager")
    assert upstream.uncompiled(compiled) is linear
    optimizer = torch.optim.AdamW(linear.parameters(), fused=True)
    assert optimizer._step_supports_amp_scaling
    upstream.let_the_scaler_unscale(optimizer)
    assert not optimizer._step_supports_amp_scaling
    hooked = nn.Linear(2, 2)
    forward = hooked.forward
    assert not upstream.is_hooked(hooked)
    upstream.hooks.add_hook_to_module(hooked, upstream.hooks.ModelHook())
    assert upstream.is_hooked(hooked) and upstream.forward_before_hooks(hooked) == forward
    mapping = dict(modeling_layercollapse.auto_class_mappings())[transformers.AutoModel]
    assert mapping[transformers.BertConfig] is transformers.BertModel


def test_checkpointing_and_scaled_losses_by_version(monkeypatch):
    new = types.SimpleNamespace(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})
    old = types.SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs=None)
    trainer = types.SimpleNamespace(
        loss_is_scaled_for_ga=True, model_accepts_loss_kwargs=False, compute_loss_func=None
    )
    monkeypatch.setattr(upstream, "TRANSFORMERS", (5, 23, 0))
    assert upstream.checkpointing_of(new) == (True, {"use_reentrant": True})
    assert upstream.loss_is_scaled(trainer, None)
    monkeypatch.setattr(upstream, "TRANSFORMERS", (5, 16, 1))
    assert upstream.checkpointing_of(old) == (True, {})
    assert not upstream.loss_is_scaled(trainer, None)


def test_what_a_class_records_is_found_under_its_name():
    """By models of a class that was never constructed; and nothing else is in the registry, which stops compilers."""

    class Unbuilt(BertModel):
        pass

    config = BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=2, intermediate_size=8, vocab_size=8)
    model = BertModel(config).eval()
    modeling_layercollapse.record_outputs(Unbuilt)
    model.__class__ = Unbuilt
    assert len(model(torch.arange(3)[None], output_hidden_states=True).hidden_states) == 3
    assert all(isinstance(name, str) for name in output_capturing._CAN_RECORD_REGISTRY)


def test_older_transformers_keep_no_class_of_ones_own(monkeypatch):
    class OwnConfig(BertConfig):
        pass

    monkeypatch.setattr(upstream, "TRANSFORMERS", (5, 18, 0))
    assert "make such a config class, or install transformers 5.19" in upstream.limit_of_registration(BertConfig)
    assert upstream.limit_of_registration(OwnConfig) == ""
    monkeypatch.setattr(upstream, "TRANSFORMERS", (5, 19, 0))
    assert upstream.limit_of_registration(BertConfig) == ""
