"""What single hidden neurons do, in one light pass: the lines of affine targets, and neurons by what a line leaves."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from . import functional, processes
from .modeling_layercollapse import CollapsibleActivation, is_inplace
from .models import device_of
from .moments import not_finite


if TYPE_CHECKING:
    from .blocks import BoundBlock
    from .calibration import Calibration


# Tokens that the lines of affine targets need, five for each of two numbers. With 3 a block of MiniLM is off by 0.75
# on other text, with 15 by 0.54, with 60 by 0.45, with thousands by 0.42.
LINE_TOKENS = 10

# Elements of neurons that are worked on at a time: what stays in a CPU's cache, and what keeps an accelerator busy
# (some 100 MB).
ON_CPU, ON_ACCELERATOR = 2**16, 2**21


def calibrate_affine_targets(
    engine: "Calibration",
    blocks: "Sequence[BoundBlock]",
    activations: Mapping[str, CollapsibleActivation],
    constant: bool = False,
) -> None:
    """Fits the line of each block's new activation (not yet in the model) to what the native one does.

    Args:
        engine ([`Calibration`]): Reads the data.
        activations (`dict[str, CollapsibleActivation]`): Block name -> the new one.
        constant (`bool`): Whether lines have slope 0: each neuron's mean. For blocks that are not gated.

    Raises:
        ValueError: The data is empty or too little, or what reaches a block is not finite. The activations are
            unchanged then.
    """

    turns = Turns()

    def observe(block: "BoundBlock", add: Callable[..., None]) -> list[RemovableHandle]:
        # Not through `activation.act`: the native module would call this hook again.
        replacement = activations[block.name].replacement

        return around_activation(block, turns, add, replacement)

    sums = _neuron_sums(engine, blocks, observe)
    fitted: dict[str, tuple[torch.Tensor | None, torch.Tensor]] = {}
    with processes.together():
        for block in blocks:
            count, (z, zz, a, _, za) = sums[block.name]
            if count < LINE_TOKENS:
                raise ValueError(
                    f"{count} calibration tokens of different rows are too few for the lines of block {block.name}: "
                    f"at least {LINE_TOKENS} are needed, and many times that is better; rows that repeat others do "
                    "not count."
                )
            if block.kind == "gated" or constant:
                fitted[block.name] = None, a / count
            else:
                fitted[block.name] = functional.affine_target(count, z, zz, a, za)
    for name, (slope, offset) in fitted.items():
        if slope is not None:
            activations[name].slope.copy_(slope)
        activations[name].offset.copy_(offset)
        # The same to the bit, whatever each process computes on.
        processes.spread([activations[name].offset, *([] if slope is None else [activations[name].slope])])


def score_neurons(engine: "Calibration", blocks: "Sequence[BoundBlock]") -> dict[str, torch.Tensor]:
    """How much each hidden neuron does that a linear map cannot do for it, in one light pass.

    For a plain block the variance that a line through the neuron's pre-activation leaves unexplained, for a gated one
    the variance of the product with the gate, times the squared norm of the neuron's output column.

    Returns:
        Block name -> scores `(m,)`, float64.
    """

    turns = Turns()

    def observe(block: "BoundBlock", add: Callable[..., None]) -> list[RemovableHandle]:
        if block.kind == "gated":
            return [block.down.register_forward_pre_hook(lambda module, args: add(args[0], args[0]))]
        return around_activation(block, turns, add)

    sums = _neuron_sums(engine, blocks, observe)
    scores = {}
    with processes.together():
        for block in blocks:
            count, (z, zz, a, aa, za) = sums[block.name]
            if block.kind == "gated":
                variance = (aa / count - (a / count).square()).clamp_min(0)
            else:
                variance = functional.line_residual(count, z, zz, a, aa, za)
            with block.weights_present():
                weight = block.down_affine()[0].detach().double()
            scores[block.name] = variance * weight.square().sum(0)
    return scores


class Turns:
    """Whose call of an activation it is, where one activation module serves several blocks: that of the block whose
    first linear ran last."""

    def __init__(self) -> None:
        # Activation -> names of blocks whose first linear ran and whose activation did not yet.
        self.begun: dict[nn.Module, list[str]] = {}

    def announce(self, block: "BoundBlock") -> RemovableHandle:
        """A hook that notes when the block's first linear has run."""
        begun = self.begun.setdefault(block.activation, [])
        return block.first.register_forward_hook(lambda *_: begun.append(block.name))

    def is_of(self, block: "BoundBlock", activation: nn.Module) -> bool:
        """Whether the call that runs now belongs to the block.

        Raises:
            ValueError: It may belong to several.
        """
        names = sorted(set(self.begun[activation]))
        if len(names) > 1:
            raise ValueError(
                f"Blocks {', '.join(names)} share one activation module and run at the same time, so that its calls "
                "cannot be told apart. Give each block an activation module of its own."
            )
        return names == [block.name]

    def done(self, activation: nn.Module) -> None:
        self.begun[activation].clear()


def around_activation(
    block: "BoundBlock", turns: Turns, add: Callable[..., None], replacement: nn.Module | None = None
) -> list[RemovableHandle]:
    """Hooks that call `add(input, output)` for the block's own calls of its activation."""
    inputs = []

    def before(module: nn.Module, args: Any) -> None:
        if turns.is_of(block, module):
            inputs.append(args[0].clone() if is_inplace(module) else args[0])

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if inputs:
            turns.done(module)
            z = inputs.pop()
            add(z, output if replacement is None else replacement(z))

    return [
        turns.announce(block),
        block.activation.register_forward_pre_hook(before),
        block.activation.register_forward_hook(after),
    ]


def tokens_at_a_time(device: torch.device, width: int) -> int:
    """How many tokens of so many neurons are worked on at a time, in some six copies of float64."""
    return max(1, (ON_CPU if device.type == "cpu" else ON_ACCELERATOR) // width)


def _neuron_sums(
    engine: "Calibration", blocks: "Sequence[BoundBlock]", observe: Callable[..., Iterable[RemovableHandle]]
) -> dict[str, tuple[int, torch.Tensor]]:
    """Block name -> `(tokens, sums of z, z^2, a, a^2 and z a per neuron)`, where `observe(block, add)` makes the
    hooks that call `add(z, a)`."""
    sums: dict[str, tuple[int, torch.Tensor]] = {}

    def adder(block: "BoundBlock") -> Callable[..., None]:
        def add(z: torch.Tensor, a: torch.Tensor) -> None:
            z, a = engine.tokens.select(block, z, a)
            count, total = sums.get(block.name, (0, z.new_zeros(())))
            rows = tokens_at_a_time(z.device, z.shape[-1])
            for z_part, a_part in zip(z.split(rows), a.split(rows), strict=True):
                z_part, a_part = functional.wide(z_part), functional.wide(a_part)
                products = [z_part, z_part.square(), a_part, a_part.square(), z_part * a_part]
                total = total + torch.stack([product.sum(0) for product in products])
            sums[block.name] = count + z.shape[0], total

        return add

    engine.progress.expect(engine.rows.batches)

    def hooks() -> list[RemovableHandle]:
        return [handle for block in blocks for handle in observe(block, adder(block))]

    engine.run("looking at neurons", hooks, blocks=blocks)
    for block in blocks:
        with processes.together():
            none = functional.wide(torch.zeros(5, block.hidden_features, device=device_of(block.down)))
            count, total = sums.get(block.name, (0, none))
            number = torch.tensor(float(count), dtype=torch.float64)
        number, total = processes.summed([number, total])
        count = int(number)
        sums[block.name] = count, total
        if not count:
            raise ValueError(f"No calibration token reached block {block.name}.")
        if not torch.isfinite(total).all():
            raise ValueError(not_finite(block))
    return sums
