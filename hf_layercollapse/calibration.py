"""Passes over calibration data: sums over tokens, never the activations themselves."""

from collections.abc import Mapping

import torch
from torch import nn
from tqdm.auto import tqdm

from . import functional
from .families import modules_of
from .modeling_layercollapse import CollapsibleActivation, is_inplace


def calibrate_affine_targets(model, inner, blocks, activations, calibration_data):
    """Fits the line of each block's new activation (not yet in the model) to what the native one does.

    Raises:
        ValueError: The data is empty or what reaches a block is not finite. The activations are unchanged then.
    """
    sums, batch = {}, {}

    def observe(block):
        activation: CollapsibleActivation = activations[block.name]

        native = modules_of(inner, block).activation
        inputs = []

        def before(module, args):
            inputs[:] = [args[0].clone() if is_inplace(native) else args[0]]

        def hook(module, args, output):
            # Not through `activation.act`: the native module would call this hook again.
            activated = output if activation.replacement is None else activation.replacement(inputs[0])
            z, a = token_rows(inputs.pop(), batch).double(), token_rows(activated, batch).double()
            terms = torch.stack([z.sum(0), z.square().sum(0), a.sum(0), (z * a).sum(0)])
            count, total = sums.get(block.name, (0, 0.0))
            sums[block.name] = count + z.shape[0], total + terms

        return [native.register_forward_pre_hook(before), native.register_forward_hook(hook)]

    handles = [handle for block in blocks for handle in observe(block)]
    run_over(model, calibration_data, handles, "Calibrating", batch)
    fitted = {}
    for block in blocks:
        count, total = sums.get(block.name, (0, None))
        if not count:
            raise ValueError(f"No calibration token reached block {block.name}.")
        if not torch.isfinite(total).all():
            raise ValueError(f"The calibration data gives inputs to block {block.name} that are not finite.")
        if block.kind == "gated":
            fitted[block.name] = None, total[2] / count
        else:
            fitted[block.name] = functional.affine_target(count, *total)
    for name, (slope, offset) in fitted.items():
        if slope is not None:
            activations[name].slope.copy_(slope)
        activations[name].offset.copy_(offset)


def collect_moments(model, inner, blocks, calibration_data):
    """Second moments of every block's input and output, in one pass.

    Returns:
        Block name -> `(moments (i + 1, i + 1), cross (i + 1, o), sum of y * y (o,))`, float64, features `[x, 1]`.

    Raises:
        ValueError: The data is empty or what reaches a block is not finite.
    """
    moments, inputs, batch = {}, {}, {}

    def observe(block):
        parts = modules_of(inner, block)

        def before(module, args):
            inputs[block.name] = token_rows(args[0], batch)

        def after(module, args, output):
            x = inputs.pop(block.name).double()
            y = token_rows(output, batch).double() * parts.scales[2]
            f = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
            new = f.T @ f, f.T @ y, y.square().sum(0)
            old = moments.get(block.name)
            moments[block.name] = new if old is None else tuple(a + b for a, b in zip(old, new, strict=True))

        first = parts.up if parts.gate is None else parts.gate
        return [first.register_forward_pre_hook(before), parts.down.register_forward_hook(after)]

    handles = [handle for block in blocks for handle in observe(block)]
    run_over(model, calibration_data, handles, "Calibrating", batch)
    for block in blocks:
        if block.name not in moments:
            raise ValueError(f"No calibration token reached block {block.name}.")
        tensors = moments[block.name]
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise ValueError(f"The calibration data gives inputs to block {block.name} that are not finite.")
        count, width = int(tensors[0][-1, -1]), block.in_features
        if count < width + 1:
            raise ValueError(
                f"{count} calibration tokens do not determine the map of block {block.name}: its input has {width} "
                f"features, so at least {width + 1} tokens are needed, and several times that is better."
            )
    return moments


def token_rows(hidden_states, batch):
    """`(..., width)` as `(tokens, width)`, detached, without what the batch's `attention_mask` says is padding.

    A mask counts where it has one value for every row; models that pack or pool their tokens have their own shapes.
    """
    hidden_states, mask = hidden_states.detach(), batch.get("attention_mask")
    if mask is not None and mask.shape == hidden_states.shape[:-1]:
        return hidden_states[mask.to(hidden_states.device, torch.bool)]
    return hidden_states.flatten(0, -2)


def run_over(model, data, handles, description, current=None):
    """Runs the model over the data in evaluation mode, without gradients; removes the hooks whatever happens.

    Args:
        current (`dict`, *optional*): Holds the inputs of the batch that is being run, for the hooks to look at.

    Raises:
        ValueError: There is no batch, or a batch is not a dict of model inputs.
    """
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    batches = 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in tqdm(data, desc=description, leave=False):
                inputs = _inputs(batch, device)
                if current is not None:
                    current.clear()
                    current.update(inputs)
                model(**inputs)
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    if not batches:
        raise ValueError("The calibration data is empty: it must give at least one batch of model inputs.")


def _inputs(batch, device):
    if not isinstance(batch, Mapping):  # as dicts and BatchEncodings are
        raise ValueError(
            f"Calibration data must be an iterable of model inputs (dicts of tensors), got a {type(batch).__name__}."
        )
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def logits_of(model: nn.Module, data):
    """The first output of every batch, on the CPU in float32, without gradients."""
    outputs = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(_first_tensor(output)))
    run_over(model, data, [handle], "Measuring")
    return outputs


def _first_tensor(output):
    if isinstance(output, torch.Tensor):
        return output.detach().float().cpu()
    values = output.values() if isinstance(output, dict) else output
    return next(
        value.detach().float().cpu() for value in values if isinstance(value, torch.Tensor) and value.dim() > 0
    )
