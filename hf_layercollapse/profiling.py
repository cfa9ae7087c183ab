"""What a model costs: parameters, multiply-accumulates (MACs), bytes on disk, seconds."""

import os
import re
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D


def count_parameters(model) -> int:
    """Elements of all parameters; shared (tied) ones count once, buffers do not."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model, inputs) -> int:
    """Multiply-accumulates of one forward pass (1 MAC = 2 FLOPs) in the model's linear and convolution layers.

    Every call of an `nn.Linear`, `Conv1D` or `nn.Conv{1,2,3}d` (transposed ones too) counts, so a layer that is used
    twice counts twice. Products without a weight layer (attention scores, softmax, norms, additions) and embedding
    look-ups do not.

    Args:
        model (`nn.Module`): Runs in evaluation mode without gradients; its modes are put back.
        inputs (`dict[str, Tensor]`): What the forward takes.
    """
    total = 0

    def hook(module, args, kwargs, output):
        nonlocal total
        total += _macs_of_call(module, args[0] if args else next(iter(kwargs.values())), output)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _COUNTED):
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(_evaluating(model))
        model(**inputs)
    return total


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_COUNTED = (nn.Linear, Conv1D, *_CONVOLUTIONS, *_TRANSPOSED)


def _macs_of_call(module, x, output):
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, Conv1D):
        return output.numel() * module.nx
    # weight: (out, in / groups, *kernel), and (in, out / groups, *kernel) for the transposed ones.
    return (x if isinstance(module, _TRANSPOSED) else output).numel() * module.weight[0].numel()


def macs_per_token(model, inputs, tokens=None) -> float:
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


_WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model).*\.(safetensors|bin)")


def weights_size(folder) -> int:
    """Bytes of the weight files in a folder written by `save_pretrained`: one file, or all its shards.

    Raises:
        ValueError: There are none.
    """
    sizes = [entry.stat().st_size for entry in os.scandir(folder) if _WEIGHTS.fullmatch(entry.name)]
    if not sizes:
        raise ValueError(f"There are no weights in {os.fspath(folder)}: expected model*.safetensors.")
    return sum(sizes)


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


def _quartiles(values):
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def compare_latency(
    models: Mapping[str, nn.Module], inputs, rounds: int = 30, warmup: int = 5, progress: bool = True
) -> dict[str, Latency]:
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
    if rounds < 2 or warmup < 0:
        raise ValueError(f"Need rounds >= 2 and warmup >= 0, got rounds={rounds}, warmup={warmup}.")
    names = list(models)
    seconds = {name: [] for name in names}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(_evaluating(model))
        for round_ in tqdm(range(-warmup, rounds), desc="Timing", leave=False, disable=not progress):
            turn = round_ % len(names)
            for name in names[turn:] + names[:turn]:
                elapsed = _time_call(models[name], inputs)
                if round_ >= 0:
                    seconds[name].append(elapsed)
    baseline = seconds[names[0]]
    return {
        name: Latency(tuple(times), tuple(time_ / base for time_, base in zip(times, baseline, strict=True)))
        for name, times in seconds.items()
    }


def _time_call(model, inputs):
    _synchronize(inputs)
    start = time.perf_counter()
    model(**inputs)
    _synchronize(inputs)
    return time.perf_counter() - start


def _synchronize(inputs):
    # Accelerators only queue the work.
    for device in {value.device for value in inputs.values() if isinstance(value, torch.Tensor)} - {_CPU}:
        torch.get_device_module(device).synchronize(device)


_CPU = torch.device("cpu")


@contextmanager
def _evaluating(model):
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
