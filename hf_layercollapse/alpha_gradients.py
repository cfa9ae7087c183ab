"""Whether the loss reaches the alphas that train: not where other code has taken the place of a block's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.activations import ACT2FN
from transformers.utils import logging

from .blocks import BoundBlock, survey
from .config import LayerCollapseConfig
from .models import shorten
from .selection import select_blocks
from .upstream import LIGER_ACTIVATIONS, LIGER_GATED, liger_kernels


if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .modeling_layercollapse import CollapsibleActivation

logger = logging.get_logger(__name__)


def refuse_liger(args: TrainingArguments, model: nn.Module, config: LayerCollapseConfig | None) -> None:
    """Raises if training arguments have liger's kernels put in the place of blocks that are, or will be, patched or
    collapsed. They compute native ones.

    Args:
        config ([`LayerCollapseConfig`], *optional*): What a dense model is about to be patched with.

    Raises:
        ValueError: As said.
    """
    kernels = liger_kernels(args)
    if not kernels:
        return
    blocks, refused = survey(model)
    ours = [block for block in blocks if block.collapsible or not block.can_collapse]
    if config is not None and not ours and all(block.state == "dense" for block in blocks):
        ours = select_blocks(blocks, config.blocks, refused)
    replaced = [block.name for block in ours if kernels & _kernels_of(block)]
    if replaced:
        options = dict(args.liger_kernel_config or {})
        options |= {name: False for block in ours for name in sorted(_kernels_of(block))}
        raise ValueError(
            f"`use_liger_kernel` puts code of its own in the place of {shorten(replaced)}, which runs neither an "
            "activation with an alpha nor what a block has collapsed to: another model would be trained than is "
            f"saved. Set liger_kernel_config={options} in the training arguments; its other kernels stay."
        )


def _kernels_of(block: BoundBlock) -> set[str]:
    """Those of liger's that take the place of such a block, or of its activation."""
    if block.kind == "gated":
        return LIGER_GATED
    parts = [] if block.activation is None else block.activation.modules()
    return {name for name, act in LIGER_ACTIVATIONS.items() if any(isinstance(p, type(ACT2FN[act])) for p in parts)}


class AlphaGradients:
    """Watches, in the steps of a training run, whether alphas get a gradient of the loss.

    Whatever puts a forward of its own in the place of a block's (fused kernels do) may leave its activation out. The
    penalty alone would drive the alpha then, and another model would be trained than is saved. The gradients of a step
    show it: the block's linears have some, and the alpha has none. A block that no batch of the step visits (an
    expert, a tower that is not used) has neither. An alpha that was reached once is not looked at again.

    Args:
        blocks (`dict[CollapsibleActivation, tuple[str, list[nn.Module]]]`): For each activation in use the name of its
            block, and the linears of that.
    """

    def __init__(self, blocks: Mapping[CollapsibleActivation, tuple[str, Sequence[nn.Module]]]) -> None:
        self._unseen = dict(blocks)
        self._in_step: list[CollapsibleActivation] = []
        self._reached_any = False

    def begin_step(self) -> None:
        """To be called before the forward passes of a step: an alpha that is thawed later has no gradient in it."""
        self._in_step = [activation for activation in self._unseen if activation.alpha.requires_grad]

    def look(self, model: Any) -> None:
        """To be called when the gradients of a step are there.

        Raises:
            RuntimeError: Code of a block ran without its activation.
        """
        for activation in self._in_step:
            if activation.alpha.grad is not None:
                self._reached_any = True
                del self._unseen[activation]
        missed = [self._unseen[activation] for activation in self._in_step if activation in self._unseen]
        around = [name for name, linears in missed if any(map(_has_gradient, linears))]
        if around:
            raise RuntimeError(
                f"The code of {shorten(around)} ran without the activation that has an alpha: in this step the "
                "linears of these blocks have a gradient, and their alphas have none. Something put a forward of its "
                "own in the place of theirs, as fused kernels do (liger, unsloth, kernels from the Hub): another "
                "model would be trained than is saved. Switch it off for feed-forward blocks, or leave these out of "
                "`blocks`."
            )
        if missed and not self._reached_any and _has_gradient(model):
            self._reached_any = True
            logger.warning(
                f"The loss of this step reached no alpha, of {len(missed)}: the penalty alone moves them. If no batch "
                "runs these blocks, leave them out of `blocks`; if it does, something put a forward of its own in the "
                "place of theirs, as fused kernels do, and the model that is trained is not the one that is saved."
            )


def _has_gradient(module: nn.Module) -> bool:
    return any(parameter.grad is not None for parameter in module.parameters())
