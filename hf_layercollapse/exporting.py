"""Models for the runtimes that serve them: ONNX Runtime, OpenVINO, stock transformers; compared with PyTorch there.

The graphs are made by `transformers.exporters` (`torch.export`, and on from there). What this module adds: which axes
vary, the decoder step, a comparison of the saved files with the PyTorch model on shapes other than the traced one, and
a folder that is written whole or not at all.
"""

import contextlib
import copy
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from . import functional
from .families import find_feed_forward_blocks
from .models import evaluating, refuse_objects_around, shorten, unwrap, written_beside
from .profiling import weights_size
from .stock import StockReport, export_stock
from .upstream import refuse_old_exporters
from .widths import native_config


# format -> (packages that it needs, extra that brings them)
FORMATS = {
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "onnx"),
    "openvino": (("openvino",), "openvino"),
    "stock": ((), None),
}
# Largest difference that is let pass, relative to the largest output (or 1).
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_TOLERANCE = 5e-2
LEAST_LENGTH = 4


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how far it is from the PyTorch model.

    Args:
        to (`str`): `"onnx"`, `"openvino"` or `"stock"`.
        folder (`str`): Where it is.
        bytes (`int`): Of the files with the graph and the weights.
        bytes_torch (`int`): Of the PyTorch model's parameters.
        difference (`float`): Largest absolute difference of the first output (logits, hidden states).
        largest (`float`): Largest absolute value of that output.
        shapes (`list[str]`): What was compared.
        cache (`bool`): Whether the graph has a key-value cache.
        inputs, outputs (`list[str]`): Names in the graph; empty for `"stock"`.
        collapsed, blocks (`int`): Feed-forward blocks that are collapsed, and all.
        stock ([`StockReport`], *optional*): What the native architecture costs, for `"stock"`.
    """

    to: str
    folder: str
    bytes: int
    bytes_torch: int
    difference: float
    largest: float
    shapes: list[str]
    cache: bool
    inputs: list[str]
    outputs: list[str]
    collapsed: int
    blocks: int
    stock: StockReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        where = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "stock": "transformers without this package"}[self.to]
        lines = [
            f"{self.folder}: {self.bytes / 1e6:.1f} MB; {self.collapsed} of {self.blocks} feed-forward blocks are "
            "collapsed",
            f"largest difference in {where}: {self.difference:.1e}, of outputs up to {self.largest:.1f}, on "
            f"{', '.join(self.shapes)}",
        ]
        if self.stock is not None:
            lines.append(str(self.stock))
        if self.inputs:
            lines.append(f"inputs: {', '.join(shorten(self.inputs))}")
            lines.append(f"outputs: {', '.join(shorten(self.outputs))}")
        return "\n".join(lines)


def check_format(to: str) -> None:
    """Raises if nothing can be exported to this format here.

    Raises:
        ValueError: There is no such format, or what it needs is not installed or too old.
    """
    if to not in FORMATS:
        raise ValueError(f"`to` must be one of {sorted(FORMATS)}, got {to!r}.")
    packages, extra = FORMATS[to]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'Exporting to {to} needs {", ".join(missing)}: pip install "hf_layercollapse[{extra}]".')
    if to != "stock":
        refuse_old_exporters(to)


@torch.no_grad()
def export_model(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    output: str | os.PathLike[str],
    to: str = "onnx",
    *,
    cache: bool | None = None,
    processor: Any = None,
    tolerance: float | None = None,
) -> ExportReport:
    """Exports a dense, patched or collapsed model, and compares the files with it in the runtime they are for.

    - `"onnx"`: `model.onnx` (weights beside it), for ONNX Runtime.
    - `"openvino"`: `openvino_model.xml` and `.bin`.
    - `"stock"`: a checkpoint of the native model type ([`export_stock`]), for transformers without this package.

    The number of rows is dynamic, and that of tokens; pictures and sounds keep their size. A causal language model is
    exported as one step with a cache, which reads any number of tokens after any number of cached ones (none: the
    prompt). The folder also gets the native config, the generation config and the processor's files.

    Args:
        model (`PreTrainedModel`): On the CPU. Not changed. An encoder-decoder to `"stock"` only.
        inputs (`dict[str, Tensor]`): An example batch: what the graph takes, at least 4 tokens a row. Comparisons are
            never longer than it, and cover one row, and of what reads `input_ids` other lengths, and padding if there
            is an `attention_mask`: what is as long as the tokens is cut with them.
        output (`str` or `Path`): A folder that is not there yet, or empty.
        to (`str`): `"onnx"`, `"openvino"` or `"stock"`.
        cache (`bool`, *optional*): Whether the graph has a key-value cache. Default: if the model generates text.
        processor (*optional*): Tokenizer or processor, or a list of them, saved into the folder.
        tolerance (`float`, *optional*): Largest difference that is let pass, relative to the largest output, or to 1.
            Default: 1e-4, 5e-2 in half precision.

    Returns:
        [`ExportReport`].

    Raises:
        TypeError: It is no transformers model, or is sharded.
        ValueError: A package is missing or too old, the folder is not empty, the model cannot be exported, or the
            exported one differs: nothing is written then.
    """
    check_format(to)
    refuse_objects_around(model)
    model = unwrap(model)[0]
    _check(model, inputs, to)
    output = _checked_folder(output)
    cache = _has_cache(model, to, cache)

    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with written_beside(output) as folder:
        with evaluating(model):
            samples = _samples(model, inputs, cache)
            if to == "stock":
                report = _export_stock(model, samples, folder)
            else:
                report = _export_graph(model, samples, folder, to)
        _check_difference(report, tolerance, model, to, output)
        for each in processor if isinstance(processor, list) else [processor] if processor is not None else []:
            each.save_pretrained(folder)
    blocks = find_feed_forward_blocks(model)
    return ExportReport(
        to=to,
        folder=str(output),
        cache=cache,
        bytes_torch=sum(p.numel() * p.element_size() for p in model.parameters()),
        collapsed=sum(block.state == "collapsed" for block in blocks),
        blocks=len(blocks),
        **report,
    )


def _check(model: Any, inputs: Mapping[str, Any], to: str) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"Expected a transformers model, got {type(model).__name__}.")
    if model.config.is_encoder_decoder and to != "stock":
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: its parts are separate graphs, which "
            "`transformers.exporters.OnnxExporter().export_for_generation(model, inputs, config)` makes, for patched "
            'and collapsed models too. `to="stock"` exports it whole.'
        )
    if model.device.type != "cpu":
        raise ValueError(f"The model is on {model.device}: move it to the CPU first, `model.to('cpu')`.")
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if model.main_input_name not in tensors or len(tensors) != len(inputs):
        raise ValueError(
            f"`inputs` must be an example batch of tensors with {model.main_input_name!r}, got {sorted(inputs)}."
        )
    if "labels" in inputs:
        raise ValueError("`inputs` holds labels: an exported model computes no loss. Leave them out.")
    length = _tokens(inputs)
    if length is not None and length < LEAST_LENGTH:
        raise ValueError(
            f"The example needs a length of at least {LEAST_LENGTH} tokens, got "
            f"{ {name: tuple(value.shape) for name, value in tensors.items()} }."
        )


def _checked_folder(output: str | os.PathLike[str]) -> Path:
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder.")
    return output


def _has_cache(model: Any, to: str, wanted: Any) -> bool:
    """Whether the graph has a cache: as asked, else if the model generates text."""
    possible = model.can_generate() and to != "stock"
    if wanted and not possible:
        raise ValueError(
            "`cache=True` is for graphs of models that generate text; a stock checkpoint is a whole model."
        )
    return possible if wanted is None else wanted


def _check_difference(report: Mapping[str, Any], tolerance: float | None, model: Any, to: str, output: Any) -> None:
    """Raises where the exported model is further from the PyTorch one than is let pass."""
    if tolerance is None:
        tolerance = TOLERANCES.get(model.dtype, HALF_TOLERANCE)
    if not report["difference"] <= tolerance * max(1.0, report["largest"]):  # not (NaN) either
        raise ValueError(
            f"The {to} export of this {type(model).__name__} differs from it by {report['difference']:.3e} where "
            f"the tolerance is {tolerance:g} of outputs up to {report['largest']:.3g} (compared on "
            f"{', '.join(report['shapes'])}). Nothing was written to {output}."
        )


# ----------------------------------------------------------------------------------------------------
# What is traced, and what is compared
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """One batch: what the forward takes, and in words."""

    name: str
    inputs: dict


def _samples(model: Any, inputs: Mapping[str, Any], cache: bool) -> Any:
    """The batch that is traced, then those that are compared."""
    length = _tokens(inputs)
    if length is None:
        return [_Sample(f"{rows} rows", _resize(inputs, rows, None)) for rows in (2, 1, 3)]
    if not cache:
        # The traced one shorter than the longest, and no axis of size 1, which the tracer would take for a constant.
        shapes = [(2, length - 1), (1, length), (3, max(2, length // 2)), (1, 2)]
        return [_Sample(f"{rows} x {size} tokens", _resize(inputs, rows, size)) for rows, size in shapes]
    # Rows, cached tokens, new tokens.
    samples = []
    for rows, past, new in ((2, length - 2, 2), (2, 0, length), (1, length - 1, 1), (3, length // 2, length // 2)):
        step = decoder_step(model, _resize(inputs, rows, past + new), past)
        samples.append(_Sample(f"{rows} x {new} tokens after {past}", step))
    return samples


def _tokens(inputs: Mapping[str, Any]) -> int | None:
    """How many tokens a row has; `None` where no token ids are read: pictures and sounds are not to be cut short."""
    ids = inputs.get("input_ids")
    return ids.shape[1] if ids is not None and ids.dim() == 2 else None


def _is_of_tokens(value: torch.Tensor, lengths: set[int | None]) -> bool:
    """Whether a tensor of these lengths holds something of each token: ids, a mask, boxes; pixels are floats."""
    return value.dim() > 1 and value.shape[1] in lengths and (value.dim() == 2 or not value.is_floating_point())


def _resize(inputs: Mapping[str, Any], rows: int, length: int | None) -> dict[str, Any]:
    """The batch with this many rows and this many tokens, padding in the last row; no row is padding alone."""
    resized, tokens = {}, _tokens(inputs)
    for name, value in inputs.items():
        value = value[torch.arange(rows) % len(value)]
        if length is not None and _is_of_tokens(value, {tokens}):
            value = value[:, :length]
        resized[name] = value.clone()
    mask = resized.get("attention_mask")
    if mask is not None and length is not None and mask.shape == (rows, length):
        if rows > 1:
            mask[-1, length - length // 3 :] = 0
        # What was padded on the left, and is cut on the right.
        mask[~mask.bool().any(1)] = 1
    return resized


@torch.no_grad()
def decoder_step(model: PreTrainedModel, inputs: Mapping[str, Any], past: int) -> dict:
    """What a graph with a cache takes, for the tokens of a batch after the first `past` ones.

    Args:
        model (`PreTrainedModel`): A causal language model; fills the cache.
        inputs (`dict[str, Tensor]`): With `input_ids`, shape `(rows, tokens)`.
        past (`int`): How many tokens are in the cache, from 0 to `tokens - 1`. If any, the last row gets one token of
            padding on the left, where there are several.

    Raises:
        ValueError: The model's cache holds more than keys and values.
    """
    rows = len(inputs["input_ids"])
    mask = torch.ones_like(inputs["input_ids"])
    if rows > 1 and past:
        mask[-1, 0] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    first = max(1, past)
    begin = {"input_ids": inputs["input_ids"][:, :first], "attention_mask": mask[:, :first]}
    step = {"input_ids": inputs["input_ids"][:, past:], "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        begin["position_ids"], step["position_ids"] = positions[:, :first], positions[:, past:]
    cache = model(**begin, use_cache=True).get("past_key_values")
    layers = [] if cache is None else cache.layers
    if not layers or any(not isinstance(layer, DynamicLayer) for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise ValueError(
            f"A decoder step is exported with a cache of keys and values in every layer, and {type(model).__name__} "
            f"has {kinds or 'none'}. Pass `cache=False` for a graph without a cache."
        )
    if past == 0:
        # An empty cache is made from one that holds a token: the shapes of its tensors are the model's own affair.
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
    return {**step, "past_key_values": cache}


def _dynamic_shapes(inputs: Mapping[str, Any]) -> Any:
    """Which axes vary: rows, and tokens of what is (rows, tokens, ...)."""
    # `DYNAMIC`: an axis that the tracer finds constant is an error, not a graph of one shape.
    vary = torch.export.Dim.DYNAMIC
    shapes: dict[str, Any] = {}
    # In a step with a cache the mask is of the cached tokens too.
    lengths = {_tokens(inputs), *([inputs["attention_mask"].shape[1]] if "past_key_values" in inputs else [])}
    for name, value in inputs.items():
        if name == "past_key_values":
            shapes[name] = [{0: vary, 2: vary} for _ in range(2 * len(value.layers))]
        else:
            shapes[name] = {0: vary, 1: vary} if _is_of_tokens(value, lengths) else {0: vary}
    return shapes


# ----------------------------------------------------------------------------------------------------
# ONNX and OpenVINO
# ----------------------------------------------------------------------------------------------------


def _export_graph(model: Any, samples: Any, folder: Any, to: str) -> Any:
    traced = samples[0].inputs
    exported = _trace(model, traced, to)
    exported.config = native_config(model.config)
    if "past_key_values" in traced:
        exported.generation_config = model.generation_config
    exported.save_pretrained(folder)
    files = [file for file in folder.iterdir() if file.suffix in (".onnx", ".data", ".xml", ".bin")]
    runtime: Any = load_exported(folder)
    difference, largest = _compare(model, runtime, samples)
    names = runtime.names()
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "difference": difference,
        "largest": largest,
        "shapes": [sample.name for sample in samples],
        "inputs": names[0],
        "outputs": names[1],
    }


def _exporter(to: str, traced: Any) -> Any:
    """`(exporter, its config)` for a graph of this format."""
    options = {"dynamic_shapes": _dynamic_shapes(traced)}
    if to == "onnx":
        from transformers.exporters import OnnxConfig, OnnxExporter

        return OnnxExporter(), OnnxConfig(**options)
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    # The cache as inputs and outputs, as in ONNX, so that one comparison serves both.
    return OpenVINOExporter(), OpenVINOConfig(**options, stateful=False)


def _trace(model: Any, traced: Any, to: str) -> Any:
    """The graph of a model on these inputs, as transformers' exporter makes it."""
    exporter, config = _exporter(to, traced)
    flags = {"use_cache": "past_key_values" in traced} if "use_cache" in model.config.to_dict() else {}
    had_forward = "forward" in model.__dict__
    try:
        # The exporter talks on stdout, which is for reports.
        with contextlib.redirect_stdout(sys.stderr):
            return exporter.export(model, {**_copy(traced), **flags}, config)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} could not be exported to {to}: {' '.join(str(error).split())[:500]}"
        ) from error
    finally:
        # The exporter puts the bound method back as an attribute of the instance.
        if not had_forward:
            model.__dict__.pop("forward", None)


def _copy(inputs: Any) -> Any:
    # A cache grows in place.
    return copy.deepcopy(inputs)


def _compare(model: Any, runtime: Any, samples: Any) -> Any:
    """`(largest difference, largest value)` of the first output; of a cache too, if it has one."""
    found, values = [0.0], [0.0]
    for sample in samples:
        flags = {"use_cache": True} if "past_key_values" in sample.inputs else {}
        expected = model(**_copy(sample.inputs), **flags)
        actual = runtime(**_copy(sample.inputs))
        pairs = [(expected[0], actual[0])]
        if "past_key_values" in sample.inputs:
            for layer, other in zip(expected.past_key_values.layers, actual.past_key_values.layers, strict=True):
                pairs += [(layer.keys, other.keys), (layer.values, other.values)]
        for one, other in pairs:
            if one.shape != other.shape:
                raise ValueError(f"The export gives {tuple(other.shape)} for {tuple(one.shape)} on {sample.name}.")
        found += [_difference(one, other) for one, other in pairs if one.numel()]
        values.append(float(expected[0].abs().max()))
    return functional.largest(found), functional.largest(values)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().max())


class ExportedRuntime(nn.Module):
    """An exported folder on its runtime, called as the model it came from; what `compare_latency` times.

    Args:
        exported (`transformers.exporters.ExportedModel`): On its runtime.
    """

    def __init__(self, exported: Any) -> None:
        super().__init__()
        self.exported = exported

    def forward(self, **inputs: Any) -> Any:
        return self.exported(**inputs)

    def names(self) -> tuple[list[str], list[str]]:
        """`(inputs, outputs)` of the graph."""
        runner = next(iter(self.exported.runners.values()))
        if self.exported.export_format == "onnx":
            return [i.name for i in runner.session.get_inputs()], [o.name for o in runner.session.get_outputs()]
        compiled = runner.compiled_model
        return [port.get_any_name() for port in compiled.inputs], [port.get_any_name() for port in compiled.outputs]


def load_exported(folder: str | os.PathLike[str], precision: Any = "f32") -> nn.Module:
    """What [`export_model`] wrote, on its runtime, on the CPU, with as many threads as torch uses.

    It is called as the model it came from, so [`compare_latency`] times it; with a cache it takes what
    [`decoder_step`] gives.

    Args:
        folder (`str` or `Path`): The folder.
        precision (`str`): Of OpenVINO's arithmetic. By itself it takes bfloat16 on CPUs that have it.
    """
    folder = Path(folder)
    if not (folder / "export.json").exists():
        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
        return getattr(transformers, architecture).from_pretrained(folder).eval()
    export_format = json.loads((folder / "export.json").read_text())["export_format"]
    refuse_old_exporters(export_format)
    from transformers.exporters import ExportedModel

    threads = torch.get_num_threads()
    if export_format == "onnx":
        import onnxruntime

        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = threads
        options = {"session_options": session_options}
    else:
        options = {"config": {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}}
    return ExportedRuntime(ExportedModel.from_pretrained(folder, device="cpu", **options)).eval()


# ----------------------------------------------------------------------------------------------------
# Stock transformers
# ----------------------------------------------------------------------------------------------------


def _export_stock(model: Any, samples: Any, folder: Any) -> Any:
    expected = [model(**sample.inputs)[0] for sample in samples]
    native, report = export_stock(model)
    native.save_pretrained(folder)
    del native  # the other process holds it
    with tempfile.TemporaryDirectory() as work:
        actual = logits_without_plugin(folder, [sample.inputs for sample in samples], work)
    return {
        "bytes": weights_size(folder),
        "difference": functional.largest(_difference(*pair) for pair in zip(expected, actual, strict=True)),
        "largest": functional.largest(float(one.abs().max()) for one in expected),
        "shapes": [sample.name for sample in samples],
        "inputs": [],
        "outputs": [],
        "stock": report,
    }


_WITHOUT_PLUGIN = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
folder, inputs, outputs = sys.argv[1:]
with open(f"{folder}/config.json") as file:
    architecture = json.load(file)["architectures"][0]
model = getattr(transformers, architecture).from_pretrained(folder).eval()
print("loaded")
batches = {}
for key, value in load_file(inputs).items():
    number, name = key.split(" ")
    batches.setdefault(number, {})[name] = value
with torch.no_grad():
    found = {number: model(**batch)[0].contiguous() for number, batch in batches.items()}
assert "hf_layercollapse" not in sys.modules
save_file(found, outputs)
"""


def logits_without_plugin(
    folder: str | os.PathLike[str], batches: Sequence[Any], work: str | os.PathLike[str]
) -> list[torch.Tensor]:
    """First outputs of a saved native model, in a process that does not import this package.

    Args:
        folder (`str` or `Path`): The model.
        batches (`list[dict[str, Tensor]]`): Its inputs.
        work (`str` or `Path`): A folder for what the processes exchange.

    Raises:
        ValueError: The model does not load there, or does not run on these inputs.
    """
    inputs, outputs = Path(work) / "inputs.safetensors", Path(work) / "outputs.safetensors"
    save_file(
        {
            f"{number} {name}": value.contiguous()
            for number, batch in enumerate(batches)
            for name, value in batch.items()
        },
        inputs,
    )
    command = [sys.executable, "-c", _WITHOUT_PLUGIN, *map(str, (folder, inputs, outputs))]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        fails = (
            "loads the exported model and does not run it"
            if "loaded" in result.stdout.split()
            else "does not load the exported model"
        )
        raise ValueError(
            f"Stock transformers {fails} (exit status {result.returncode}): {result.stderr.strip()[-500:]}"
        )
    found = load_file(outputs)
    return [found[str(number)] for number in range(len(batches))]
