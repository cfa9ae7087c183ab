"""What a model costs: parameters, multiply-accumulates (MACs), bytes on disk, seconds."""

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from .families import FeedForwardBlock
from .merging import cost_of as cost_of
from .modeling_layercollapse import PASS_ON
from .models import count_parameters as count_parameters
from .models import evaluating, outputs_of
from .sentence_models import MODULES_FILE


def count_macs(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Multiply-accumulates of one forward pass (1 MAC = 2 FLOPs) in the model's linear and convolution layers.

    Every call of an `nn.Linear`, `Conv1D` or `nn.Conv{1,2,3}d` (transposed ones too, and what stands for a linear in a
    narrow block) counts, so a layer that is used twice counts twice. Products without a weight layer (attention
    scores, softmax, norms, additions) and embedding look-ups do not.

    Args:
        model (`nn.Module`): Runs in evaluation mode without gradients; its modes are put back.
        inputs (`dict[str, Tensor]`): What the forward takes.
    """
    total = 0

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal total
        total += _macs_of_call(module, args[0] if args else next(iter(kwargs.values())), output)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _COUNTED):
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        outputs_of(model, inputs)
    return total


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_COUNTED = (nn.Linear, Conv1D, *PASS_ON, *_CONVOLUTIONS, *_TRANSPOSED)


def _macs_of_call(module: Any, x: torch.Tensor, output: torch.Tensor) -> int:
    if isinstance(module, PASS_ON):
        return x.shape[:-1].numel() * module.weight.numel()
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, Conv1D):
        return output.numel() * module.nx
    # weight: (out, in / groups, *kernel), and (in, out / groups, *kernel) for the transposed ones.
    return (x if isinstance(module, _TRANSPOSED) else output).numel() * module.weight[0].numel()


def macs_per_token(model: nn.Module, inputs: Mapping[str, Any], tokens: int | None = None) -> float:
    """MACs of [`count_macs`] divided by the number of input tokens, padding included.

    What runs once per sequence (a pooler, a classification head) is shared out over its tokens, so compare models on
    the same inputs.

    Args:
        tokens (`int`, *optional*): Number of tokens in `inputs`. Default: the size of `input_ids`, or the positions of
            `inputs_embeds`.

    Raises:
        ValueError: `tokens` is needed, or not positive.
    """
    if tokens is None:
        if "input_ids" in inputs:
            tokens = inputs["input_ids"].numel()
        elif "inputs_embeds" in inputs:
            tokens = inputs["inputs_embeds"][..., 0].numel()
        else:
            raise ValueError(
                f"`inputs` has neither `input_ids` nor `inputs_embeds` (got {list(inputs)}): say `tokens`."
            )
    if tokens < 1:
        raise ValueError(f"`tokens` must be at least 1, got {tokens}.")
    return count_macs(model, inputs) / tokens


def neurons_within(block: FeedForwardBlock, share: float, rank: int | None = None) -> int:
    """How many neurons a block keeps beside a linear map, if a share of its weights is left: what
    `LayerCollapseConfig(keep_neurons=..., rank=...)` takes. `cost_of(block, rank, neurons)` is the inverse.

    Args:
        block ([`FeedForwardBlock`]): A dense block.
        share (`float`): In (0, 1).
        rank (`int`, *optional*): Of the linear map; 0 for none, `None` for a full one.

    Raises:
        ValueError: `share` is none, or too small for the linear map alone, or for one neuron without one.
    """
    if not 0 < share < 1:
        raise ValueError(f"`share` must be in (0, 1), got {share!r}.")
    # Shares that are written in decimals are not exact.
    neurons = int((share * block.macs * (1 + 1e-9) - cost_of(block, rank, 0)) // cost_of(block, 0, 1))
    if neurons < 0 or neurons + (rank != 0) < 1:
        least = cost_of(block, rank, int(rank == 0)) / block.macs
        raise ValueError(
            f"{share:.4g} of the weights of {block.name} is less than what its linear map, or one neuron without one, "
            f"takes: {least:.4g}. Ask for more, or for a lower rank."
        )
    return neurons


def describe_hardware(device: torch.device | str = "cpu") -> str:
    """What a time was measured on: the accelerator's name, or the processor's and how many threads torch uses."""
    device = torch.device(device)
    if device.type not in ("cpu", "mps"):
        return torch.get_device_module(device).get_device_name(device)
    name = platform.processor() or platform.machine()
    if device.type == "mps":  # a part of the processor, and without a name before torch 2.9
        return f"{name}, MPS"
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


# Names of weights, those of a model and those of an adapter, in the order in which loaders look for them: the first
# that is there is read. An index names the files that it is of.
_WEIGHTS = (
    (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
    (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME),
)


def weights_size(folder: str | os.PathLike[str], variant: str | None = None) -> int:
    """Bytes of the weights that `from_pretrained` reads from a folder: of one file or of all shards that its index
    names, of safetensors where there are any; of an object of sentence-transformers also those of its further modules.

    Args:
        folder (`str` or `Path`): As `save_pretrained` writes it.
        variant (`str`, *optional*): As `from_pretrained` takes it, `"fp16"` say. Default: none, whatever is there.

    Raises:
        ValueError: There are none.
    """
    folder = Path(folder)
    inside = [folder]
    if (folder / MODULES_FILE).is_file():
        below = (path for path in folder.rglob("*") if path.is_dir())
        inside += [path for path in below if not path.relative_to(folder).parts[0].startswith("checkpoint-")]
    files = [file for each in inside for names in _WEIGHTS for file in _files_read(each, names, variant)]
    if not files:
        wanted = _with_variant(SAFE_WEIGHTS_NAME, variant)
        raise ValueError(
            f"There are no weights in {os.fspath(folder)}: expected {wanted}, or the index of its shards."
        )
    return sum(file.stat().st_size for file in files)


def _files_read(folder: Path, names: Sequence[str], variant: str | None) -> list[Path]:
    """What is read where a loader looks for the first of these names."""
    paths = [folder / _with_variant(name, variant) for name in names]
    path = next((path for path in paths if path.is_file()), None)
    if path is None or path.suffix != ".json":
        return [] if path is None else [path]
    shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / shard for shard in sorted(set(shards))]


def _with_variant(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


@dataclass(frozen=True)
class Latency:
    """How long one call of a model takes.

    Args:
        seconds (`tuple[float, ...]`): Every measured call, in order.
        ratios (`tuple[float, ...]`): Each divided by the first model's call of the same round; below 1 is faster.
    """

    seconds: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, in seconds: half of all calls lie between."""
        return _quartiles(self.seconds)

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def ratio_quartiles(self) -> tuple[float, float]:
        """First and third quartile of the ratios."""
        return _quartiles(self.ratios)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


# What models are called.
KeyT = TypeVar("KeyT")


def compare_latency(
    models: Mapping[KeyT, nn.Module],
    inputs: Mapping[str, Any],
    rounds: int = 30,
    warmup: int = 5,
    progress: bool = True,
) -> dict[KeyT, Latency]:
    """Times several models in turn in one process, so that whatever else the machine does meets all of them alike.

    Each round calls every model once, and the order is turned by one from round to round. Ratios are taken within a
    round: they hold on a machine whose speed drifts, where two medians measured one after the other do not.

    Args:
        models (`dict[str, nn.Module]`): The first is what the ratios refer to. They run in evaluation mode without
            gradients; their modes are put back.
        inputs (`dict[str, Tensor]`): The same for all, on the models' device.
        rounds (`int`): Measured rounds, at least 2.
        warmup (`int`): Rounds before them that are not measured.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        Name -> [`Latency`].

    Raises:
        ValueError: There is no model, or there are too few rounds.
    """
    if not models:
        raise ValueError("There is no model to measure.")
    seconds = _seconds_of({name: (model, inputs) for name, model in models.items()}, rounds, warmup, progress)
    baseline = next(iter(seconds.values()))
    return {
        name: Latency(tuple(times), tuple(time_ / base for time_, base in zip(times, baseline, strict=True)))
        for name, times in seconds.items()
    }


def _seconds_of(
    calls: Mapping[KeyT, tuple[nn.Module, Mapping[str, Any]]], rounds: int, warmup: int, progress: bool
) -> dict[KeyT, list[float]]:
    """Name -> seconds of each round, for `calls` name -> `(model, inputs)`."""
    if rounds < 2 or warmup < 0:
        raise ValueError(f"Need rounds >= 2 and warmup >= 0, got rounds={rounds}, warmup={warmup}.")
    names = list(calls)
    seconds: dict[KeyT, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        for model, _ in calls.values():
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        for round_ in tqdm(range(-warmup, rounds), desc="Timing", leave=False, disable=not progress):
            turn = round_ % len(names)
            for name in names[turn:] + names[:turn]:
                elapsed = _time_call(*calls[name])
                if round_ >= 0:
                    seconds[name].append(elapsed)
    return seconds


def _time_call(model: nn.Module, inputs: Mapping[str, Any]) -> float:
    _synchronize(inputs)
    start = time.perf_counter()
    outputs_of(model, inputs)
    _synchronize(inputs)
    return time.perf_counter() - start


def _synchronize(inputs: Mapping[str, Any]) -> None:
    # Accelerators only queue the work.
    for device in {value.device for value in inputs.values() if isinstance(value, torch.Tensor)} - {_CPU}:
        torch.accelerator.synchronize(device)


_CPU = torch.device("cpu")


@dataclass(frozen=True)
class FixedCost:
    """How much of a call does not depend on the batch, and why.

    Args:
        seconds (`float`): Median time of one call.
        fixed (`float`): Seconds of it that a batch of half the rows takes as well.
        reading (`float`): Seconds that it takes to read every weight from memory once.
    """

    seconds: float
    fixed: float
    reading: float

    @property
    def share(self) -> float:
        """Of the call's time, in [0, 1]."""
        return min(max(self.fixed / self.seconds, 0.0), 1.0)

    @property
    def bound_by(self) -> str:
        """`"compute"`, or where most of the time is fixed `"memory"` (reading weights) or `"launches"` (starting
        operations, in Python and on the device)."""
        if self.share < 0.5:
            return "compute"
        return "memory" if self.reading > self.fixed / 2 else "launches"

    def __str__(self) -> str:
        told = f"{self.share:.0%} of the dense model's {1000 * self.seconds:.3g} ms do not depend on the batch"
        if self.bound_by == "compute":
            return f"{told}: it is bound by compute, where fewer MACs show."
        why = {
            "memory": "reading weights, so the time follows the weights' bytes and not the MACs",
            "launches": "starting operations, so fewer MACs cannot show",
        }[self.bound_by]
        return f"{told}: it is bound by {self.bound_by} ({why}). Larger or more inputs a batch would."


def fixed_cost(
    model: nn.Module, inputs: Mapping[str, Any], rounds: int = 10, warmup: int = 2, progress: bool = True
) -> FixedCost:
    """Measures what a call costs whatever the batch: with `t(n) = fixed + n * more`, from the batch and half of it.

    A batch of one row is compared with that row twice.

    Args:
        model (`nn.Module`): Runs in evaluation mode without gradients; its modes are put back.
        inputs (`dict[str, Tensor]`): On the model's device; tensors that are as long as the first one in their first
            dimension are cut along it, others stay as they are.
        rounds, warmup (`int`), progress (`bool`): As in [`compare_latency`].

    Raises:
        ValueError: There is no tensor among the inputs, or there are too few rounds.
    """
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim()]
    if not tensors:
        raise ValueError(f"`inputs` holds no tensor with a batch dimension, only {list(inputs)}.")
    rows = tensors[0].shape[0]

    def with_rows(index: slice | list[int]) -> dict[str, Any]:
        return {
            key: value[index] if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows else value
            for key, value in inputs.items()
        }

    smaller = max(1, rows // 2)
    larger = rows if rows > 1 else 2
    calls = {
        "smaller": (model, with_rows(slice(0, smaller))),
        "larger": (model, with_rows([0, 0] if rows == 1 else slice(0, rows))),
        "weights": (_ReadWeights(model), {}),
    }
    seconds = _seconds_of(calls, rounds, warmup, progress)
    small, large, reading = (statistics.median(times) for times in seconds.values())
    slope = (large - small) / (larger - smaller)
    at_batch = large if rows > 1 else small
    return FixedCost(at_batch, at_batch - rows * slope, reading)


class _ReadWeights(nn.Module):
    """Reads every parameter once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = [parameter.detach() for parameter in model.parameters()]

    def forward(self) -> float:
        # One number each, fetched at the end: the call is over when all are read.
        return float(sum(weight.sum(dtype=torch.float32) for weight in self.weights))


@dataclass(frozen=True)
class Speedup:
    """A dense and a collapsed model, timed in turn.

    Args:
        mode (`str`): `"eager"` or `"compiled"`.
        dense, collapsed ([`Latency`]): Their times.
        promised (`float`): Dense MACs over collapsed MACs, as [`count_macs`] counts them: without attention scores,
            norms and activations, so that it is more than arithmetic alone allows.
        fixed_cost ([`FixedCost`]): Of the dense model.
    """

    mode: str
    dense: Latency
    collapsed: Latency
    promised: float
    fixed_cost: FixedCost

    @property
    def measured(self) -> float:
        """How many times as fast the collapsed model is: the median over rounds."""
        return 1 / self.collapsed.ratio

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of it."""
        low, high = self.collapsed.ratio_quartiles
        return 1 / high, 1 / low

    def __str__(self) -> str:
        low, high = self.quartiles
        return (
            f"{self.mode}: {1000 * self.dense.median:.3g} -> {1000 * self.collapsed.median:.3g} ms, "
            f"{self.measured:.2f} times as fast (quartiles {low:.2f} to {high:.2f}); the MACs promise "
            f"{self.promised:.2f}, of which this is {self.measured / self.promised:.0%}. {self.fixed_cost}"
        )


def measure_speedup(
    dense: nn.Module,
    collapsed: nn.Module,
    inputs: Mapping[str, Any],
    modes: Any = ("eager", "compiled"),
    rounds: int = 30,
    warmup: int = 5,
    progress: bool = True,
) -> list[Speedup]:
    """What a collapse is worth at these inputs, with and without `torch.compile`.

    Args:
        dense, collapsed (`nn.Module`): Run in evaluation mode without gradients; their modes are put back.
        inputs (`dict[str, Tensor]`): The batch and length that matter to the user, on the models' device.
        modes (`Sequence[str]`): Of `"eager"` and `"compiled"`; the latter compiles both models in their default
            mode, which takes some seconds to minutes and needs a C++ compiler on a CPU.
        rounds, warmup (`int`), progress (`bool`): As in [`compare_latency`].

    Returns:
        One [`Speedup`] for each mode.

    Raises:
        ValueError: There is another mode, or there are too few rounds.
    """
    unknown = sorted(set(modes) - {"eager", "compiled"})
    if unknown or not modes:
        raise ValueError(f"`modes` must be of 'eager' and 'compiled', got {list(modes)}.")
    promised = count_macs(dense, inputs) / count_macs(collapsed, inputs)
    found = []
    for mode in modes:
        models: dict[str, Any] = {"dense": dense, "collapsed": collapsed}
        if mode == "compiled":
            models = {name: torch.compile(model) for name, model in models.items()}
        times = compare_latency(models, inputs, rounds, warmup, progress)
        fixed = fixed_cost(models["dense"], inputs, max(2, rounds // 3), max(1, warmup // 2), progress)
        found.append(Speedup(mode, times["dense"], times["collapsed"], promised, fixed))
    return found
