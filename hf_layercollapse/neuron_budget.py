"""Which neurons a penalty takes away, and how many, on a schedule that ends at a stated size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from . import functional, processes
from .blocks import BoundBlock, bind_blocks, survey
from .budgets import least_that_works, limit_of, parse_budget, room_of
from .config import LayerCollapseConfig
from .merging import is_possible, size_of, stored_rank
from .modeling_layercollapse import CollapsibleActivation
from .models import count_parameters, shorten, unwrap
from .patching import activation_in_use, collapsible_activations
from .selection import select_blocks


if TYPE_CHECKING:
    from transformers import TrainingArguments


# Of the steps in which alphas come to 0 and 1: those before the first neuron is told to go, and those in which it is
# open which ones go.
LOOKING, CHOOSING = 0.1, 0.5

# How much of what was known of a neuron stays at each step.
MEMORY = 0.98


@dataclass(frozen=True)
class BlockWeights:
    """What a patched block has by its kept neurons, in weights of some kind.

    Args:
        width (`int`): How many neurons it has.
        whole (`int`): With all of them, when nothing collapses.
        none, one (`int`): Without any, and with one; the same where nothing else is left, as a neuron of zeros stands
            there then.
        each (`int`): More with each further one.
    """

    width: int
    whole: int
    none: int
    one: int
    each: int

    @classmethod
    def of(cls, block: BoundBlock, unit: str, rank: int | None, constant_term: str) -> "BlockWeights":
        """Of a block beside whose neurons a linear map of this rank stays, in `"macs"` or `"parameters"`."""
        whole = block.macs if unit == "macs" else block.parameters
        none, one, two = (size_of(block, rank, count, unit, constant_term) for count in (0, 1, 2))
        return cls(block.hidden_features, whole, none, one, two - one)

    def with_kept(self, neurons: int) -> int:
        """What it has with so many neurons."""
        if neurons == 0:
            return self.none
        return self.whole if neurons >= self.width else self.one + self.each * (neurons - 1)


def told_to_go(importance: Sequence[torch.Tensor], blocks: Sequence[BlockWeights], room: int) -> list[torch.Tensor]:
    """Which neurons go so that what is left is within a room: those that matter least for each of their weights.

    Args:
        importance (`list[Tensor]`): Of each block's neurons, `(width,)`, all in one unit.
        blocks (`list[BlockWeights]`): The same blocks.
        room (`int`): In the unit of their weights; at least what is left without any neuron.

    Returns:
        For each block a tensor `(width,)` of `bool`.
    """
    device = importance[0].device
    per_weight = [scores.to(device).float() / block.each for scores, block in zip(importance, blocks, strict=True)]
    owners = torch.cat([torch.full((block.width,), index) for index, block in enumerate(blocks)]).to(device)
    order = torch.cat(per_weight).argsort(descending=True, stable=True)
    owners_in_order = owners[order]

    def left(kept: int) -> int:
        counts = owners_in_order[:kept].bincount(minlength=len(blocks)).tolist()
        return sum(block.with_kept(count) for block, count in zip(blocks, counts, strict=True))

    most = len(order)
    if left(most) > room:
        least, most = 0, most - 1
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if left(middle) <= room else (least, middle - 1)
    goes = torch.ones(len(order), dtype=torch.bool, device=device)
    goes[order[:most]] = False
    return [
        part.to(scores.device) for part, scores in zip(goes.split([b.width for b in blocks]), importance, strict=True)
    ]


class NeuronBudget:
    """Tells the alphas of a patched model which neurons are to go, and how many.

    How much a neuron matters is `E[(dL/d alpha_j)^2]`, token by token, the diagonal of the metric of the loss. It
    comes out of the backward pass of the activation, with whatever loss is trained, and is averaged over steps, in
    units of the sum over all neurons. How many go rises as `1 - (1 - t)^3` (Zhu and Gupta, arXiv 1710.01878) until the
    model that is left has the stated size. A neuron that was told to go may be called back while it is open which ones
    go; afterwards a bound of each alpha moves to its goal, so that all are 0 or 1 in the end.

    What is known of neurons is kept in the optimizer's state, under the alphas, so that checkpoints have it.

    Args:
        model (`nn.Module`): Patched, with one alpha per neuron.
        config ([`LayerCollapseConfig`]): With a `budget` and budget_method="penalty".
        optimizer (`torch.optim.Optimizer`): Its state has room for what is known.
        progress (`Callable[[], float]`): How far alphas are to have come when the step is taken that is being taken;
            see [`budget_progress`].

    Raises:
        ValueError: The budget is below what is left without any neuron, or an alpha is frozen.
    """

    def __init__(
        self, model: nn.Module, config: LayerCollapseConfig, optimizer: Optimizer, progress: Callable[[], float]
    ) -> None:
        self._optimizer, self._progress = optimizer, progress
        blocks = [block for block in bind_blocks(unwrap(model)[0]) if block.state == "patched"]
        self._activations = [activation for block in blocks if (activation := activation_in_use(block)) is not None]
        _refuse_frozen(blocks, self._activations)
        self._weights, self._room = weights_within(model, blocks, config)
        self._index = {id(activation.alpha): index for index, activation in enumerate(self._activations)}
        self._told: tuple[float, list[torch.Tensor]] | None = None  # when, and which neurons go

    # ---- What alphas are told ----

    @property
    def count(self) -> int:
        """How many neurons are told to go."""
        return sum(int(part.sum()) for part in self._which())

    def goal(self, alpha: torch.Tensor) -> torch.Tensor:
        """What an alpha of the model is to become: `(width,)`, 0 or 1."""
        return self._which()[self._index[id(alpha)]].to(alpha)

    def bounds(self, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Between which values an alpha is held: two tensors `(width,)`."""
        held, goal = max(0.0, (self._progress() - CHOOSING) / (1 - CHOOSING)), self.goal(alpha)
        return held * goal, 1 - held * (1 - goal)

    def _which(self) -> list[torch.Tensor]:
        progress = min(self._progress(), CHOOSING)
        if self._told is None or self._told[0] != progress:
            known = [self._known(activation) for activation in self._activations]
            if progress >= CHOOSING and all(part is None for part in known):
                raise RuntimeError(
                    "It is time to say which neurons go, and no step so far had gradients that are finite and not all "
                    "0, which would say what the loss depends on. Look at the loss of the first steps."
                )
            importance = [
                torch.zeros_like(activation.alpha) if part is None else part
                for activation, part in zip(self._activations, known, strict=True)
            ]
            self._told = progress, told_to_go(importance, self._weights, self._room_at(progress))
        return self._told[1]

    def _room_at(self, progress: float) -> int:
        share = max(0.0, (progress - LOOKING) / (CHOOSING - LOOKING))
        whole = sum(block.whole for block in self._weights)
        return whole - round((1 - (1 - share) ** 3) * (whole - self._room))

    # ---- What is known of neurons ----

    def refuse_forgotten(self, steps: int) -> None:
        """Raises if a run goes on behind the steps in which it is found out which neurons matter, and nothing of that
        was loaded.

        Args:
            steps (`int`): That the run has taken already.

        Raises:
            ValueError: As said.
        """
        if steps and self._progress() >= CHOOSING and all(self._known(each) is None for each in self._activations):
            raise ValueError(
                f"The run goes on after step {steps}, when it is known which neurons go, and the checkpoint does not "
                "say: that is in the optimizer's state (`optimizer.pt`), which `save_only_model=True` leaves out. "
                "Resume from a checkpoint that has one, or train from the beginning."
            )

    def begin_step(self) -> None:
        """To be called before the backward passes of a step."""
        for activation in self._activations:
            if self._progress() >= CHOOSING and self._known(activation) is not None:
                activation.squares = None
                continue
            # The same tensor as long as it can be: a compiled model is made for it.
            if activation.squares is None or activation.squares.device != activation.alpha.device:
                activation.squares = torch.zeros_like(activation.alpha.detach(), requires_grad=True)
            activation.squares.grad = None

    def note(self) -> None:
        """To be called when the backward passes of a step are done: takes the squared gradients in."""
        leaves = [activation.squares for activation in self._activations if activation.squares is not None]
        if len(leaves) < len(self._activations):
            return
        # Of a block that did not run (layerdrop) there is no gradient on this process, and there may be on another.
        shares = _as_shares([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])
        if shares is None:
            return
        for activation, share in zip(self._activations, shares, strict=True):
            state, share = self._optimizer.state[activation.alpha], share.to(activation.alpha)
            # Adam's and others' want to find the steps that were taken wherever there is a state.
            state["step"] = state.get("step", torch.zeros(())) + 1
            known = state.get("importance", share)
            state["importance"] = MEMORY * known + (1 - MEMORY) * share
        self._told = None

    def _known(self, activation: CollapsibleActivation) -> torch.Tensor | None:
        return self._optimizer.state[activation.alpha].get("importance")


def _refuse_frozen(blocks: Sequence[BoundBlock], activations: Sequence[CollapsibleActivation]) -> None:
    pairs = zip(blocks, activations, strict=True)
    frozen = [block.name for block, activation in pairs if not activation.alpha.requires_grad]
    if frozen:
        raise ValueError(
            f"A budget counts on the alphas of all patched blocks, and those of {shorten(frozen)} are frozen. Leave "
            "them trainable (under peft, name the activations in `modules_to_save`), or patch the other blocks only."
        )


def _as_shares(squares: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """Sums over all processes, as shares of what they add up to: float64 tensors on one device. `None` where one is
    not finite, or all are 0: such a step says nothing."""
    device = squares[0].device
    (joined,) = processes.summed([functional.wide(torch.cat([part.to(device) for part in squares]))])
    shares = joined / joined.sum()
    # Asked once for all blocks: it waits for the device.
    return list(shares.split([len(part) for part in squares])) if bool(shares.isfinite().all()) else None


def weights_within(
    model: nn.Module, blocks: Sequence[BoundBlock], config: LayerCollapseConfig
) -> tuple[list[BlockWeights], int]:
    """`(what these blocks of a model have by their neurons, what the budget leaves for them)`.

    Raises:
        ValueError: Without any neuron they have more than that.
    """
    assert config.budget is not None
    ((unit, value),) = parse_budget(config.budget).items()
    inner = unwrap(model)[0]
    # Alphas are not what a dense model has.
    alphas = sum(activation.alpha.numel() for activation in collapsible_activations(inner).values())
    macs = sum(block.macs for block in bind_blocks(inner))
    whole = {"parameters": count_parameters(inner) - alphas, "macs": macs}
    room = room_of(unit, value, whole, blocks)
    rank = 0 if config.linear_target == "constant" else config.rank
    indivisible = [block.name for block in blocks if not is_possible(block, stored_rank(block, rank), 1)]
    if indivisible:
        raise ValueError(
            f"Neurons of {shorten(indivisible)} cannot go one by one: leave these blocks out of `blocks`."
        )
    weights = [BlockWeights.of(block, unit, rank, config.constant_term) for block in blocks]
    least = sum(block.with_kept(0) for block in weights)
    if least > room:
        raise ValueError(
            f"The budget {config.budget} cannot be met: without any neuron in the chosen blocks, "
            + least_that_works(unit, limit_of(value, whole[unit]) - room + least, whole[unit])
            + (
                ""
                if config.linear_target == "constant"
                else ' With linear_target="constant" nothing else is left of them.'
            )
        )
    return weights, room


def refuse_size_not_met(model: nn.Module, kept: Sequence[tuple[BoundBlock, int]], config: LayerCollapseConfig) -> None:
    """Raises if what patched blocks would become is above the budget that their alphas were trained to.

    Args:
        kept (`list[tuple[BoundBlock, int]]`): Each patched block, and how many neurons it would keep.

    Raises:
        ValueError: It is.
    """
    assert config.budget is not None
    weights, room = weights_within(model, [block for block, _ in kept], config)
    left = sum(block.with_kept(count) for block, (_, count) in zip(weights, kept, strict=True))
    if left > room:
        raise ValueError(
            f"The budget {config.budget} is not met: {left:,} weights of the chosen blocks would be left, and it "
            f"allows {room:,}. Alphas come to it in the first {config.budget_ratio:g} (`budget_ratio`) of training's "
            "steps: was it stopped before? Train on; or collapse what is ready, by options without a budget: "
            "`collapse_model(model, LayerCollapseConfig(granularity='neuron', "
            f"linear_target={config.linear_target!r}))`."
        )


def refuse_neuron_budget(model: nn.Module, config: LayerCollapseConfig) -> None:
    """Raises if a model, dense or patched, cannot be as small as a budget that the penalty is to meet; asks no data.

    Raises:
        ValueError: As said.
    """
    if config.budget is None or config.plans:
        return
    blocks, refused = survey(unwrap(model)[0])
    weights_within(model, select_blocks(blocks, config.blocks, refused), config)


def refuse_several_devices(args: "TrainingArguments", sharded: bool = False) -> None:
    """Raises if squared gradients would not all be found where they are looked for.

    Args:
        sharded (`bool`): Whether FSDP or DeepSpeed is at work.

    Raises:
        ValueError: As said.
    """
    if sharded or args.n_gpu > 1:
        raise ValueError(
            "A `budget` that the penalty is to meet is not supported under FSDP and DeepSpeed, nor with several "
            "accelerators in one process: the squared gradients of alphas are read where they arise. Train in DDP "
            "(`accelerate launch`), on one accelerator, or with budget_method='plan'."
        )
