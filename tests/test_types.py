"""What type checkers, `help` and the tools of this repository see."""

import ast
import dataclasses
import inspect
import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_layercollapse
from hf_layercollapse import LayerCollapseConfig


ROOT = Path(__file__).parent.parent
PACKAGE = Path(hf_layercollapse.__file__).parent

USER = """
import hf_layercollapse
from hf_layercollapse import LayerCollapseConfig, colapse_model

hf_layercollapse.LayerColapseConfig()
LayerCollapseConfig(penalty_strenght=1.0)
LayerCollapseConfig(keep_neurons="all")
"""
# What torch and transformers hold is not asked here, and takes a minute to read.
SETTINGS = """
[mypy]
follow_imports = skip
[mypy-hf_layercollapse.*]
follow_imports = normal
"""


def test_a_misspelt_name_is_an_error_to_a_type_checker(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "user.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    errors = {line.split(":")[1]: line for line in result.stdout.splitlines() if line.startswith("user.py")}
    assert errors.keys() == {"3", "5", "6", "7"}, result.stdout + result.stderr
    for line, name in (("3", "colapse_model"), ("5", "LayerColapseConfig"), ("6", "penalty_strenght"), ("7", "str")):
        assert name in errors[line], errors[line]


def test_every_public_name_is_there_for_type_checkers():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    ifs = {ast.unparse(node.test): node for node in tree.body if isinstance(node, ast.If)}
    names = {}
    for node in ifs["TYPE_CHECKING"].body:
        assert isinstance(node, ast.ImportFrom) and node.level == 1
        # `X as X`: only so is a name given on.
        names |= {alias.name: node.module for alias in node.names if alias.asname == alias.name}
    assert names == hf_layercollapse._EXPORTS
    assert (PACKAGE / "py.typed").exists()


def test_help_explains_every_option():
    text = re.sub(r"[\s|]+", " ", pydoc.plain(pydoc.render_doc(LayerCollapseConfig)))
    for option in dataclasses.fields(LayerCollapseConfig):
        assert f"{option.name} (`" in text
        assert re.sub(r"[\s|]+", " ", option.metadata["help"]) in text, option.name


def test_tools_have_one_version():
    pinned = re.search(r"^ruff==(.+)$", (ROOT / ".ci" / "constraints.txt").read_text(), re.M)[1]
    hook = re.search(r"ruff-pre-commit\n +rev: v(.+)", (ROOT / ".pre-commit-config.yaml").read_text())[1]
    assert hook == pinned


def parameters_of(function):
    return [
        (name, parameter.annotation)
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("self", "cls") and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


@pytest.mark.parametrize("name", hf_layercollapse.__all__)
def test_public_names_are_annotated(name):
    public = getattr(hf_layercollapse, name)
    functions = {name: public}
    if isinstance(public, type):
        # Those of its own, and of bases that are the package's too.
        own = [kind for kind in public.__mro__ if kind.__module__.startswith("hf_layercollapse")]
        members = {f"{name}.{key}": value for kind in own for key, value in vars(kind).items() if key[0] != "_"}
        functions = {key: inspect.unwrap(getattr(value, "__func__", value)) for key, value in members.items()}
        functions = {key: value.fget if isinstance(value, property) else value for key, value in functions.items()}
        functions = {key: value for key, value in functions.items() if inspect.isfunction(value)}
        assert all(annotation is not inspect.Parameter.empty for _, annotation in parameters_of(public.__init__))
    for key, function in functions.items():
        missing = [name for name, annotation in parameters_of(function) if annotation is inspect.Parameter.empty]
        assert not missing and "return" in function.__annotations__, (key, missing)
