"""Blocks that collapse while a Trainer goes on, with its optimizer, its wrapper and its checkpoints."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_compiled_module
from torch import nn
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from .collapsing import collapse_as, collapse_model
from .config import refuse_unread
from .exchanging import Exchanging
from .families import find_feed_forward_blocks
from .modeling_layercollapse import resolve_table
from .models import carriers_of, shorten, unwrap
from .reports import CollapseReport
from .trained_blocks import TrainedBlocks


if TYPE_CHECKING:
    from .trainer import LayerCollapseTrainerMixin

logger = logging.get_logger(__name__)


class ProgressiveCollapse:
    """Collapses the ready blocks of a Trainer's model after an evaluation, where its options ask for that.

    Args:
        trainer ([`LayerCollapseTrainerMixin`]): Has the model, the optimizer and the options.
        blocks ([`TrainedBlocks`]): Of the model.
        exchanging ([`Exchanging`]): Takes along what holds the parameters.

    Attributes:
        reports (`list[CollapseReport]`): Of what was collapsed until now.
    """

    def __init__(self, trainer: LayerCollapseTrainerMixin, blocks: TrainedBlocks, exchanging: Exchanging) -> None:
        self._trainer: Any = trainer
        self._blocks, self._exchanging = blocks, exchanging
        self.reports: list[CollapseReport] = []

    @property
    def is_asked_for(self) -> bool:
        config = self._trainer.layer_collapse_config
        return config is not None and config.progressive

    def refuse_setup(self) -> None:
        if not self.is_asked_for:
            return
        trainer, wrappers = self._trainer, unwrap(self._trainer.model)[1]
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "`progressive` is not supported under FSDP and DeepSpeed, which cannot exchange parameters while they "
                "train. Collapse once training has ended, or train in DDP."
            )
        compiled = any(is_compiled_module(wrapper) for wrapper in wrappers)
        if compiled or (trainer.args.torch_compile and trainer.args.world_size > 1):
            raise ValueError(
                "`progressive` is not supported with a model that was compiled before, nor with `torch_compile` on "
                "several processes. Collapse once training has ended."
            )
        if wrappers:
            raise ValueError(
                "`progressive` is not supported under an adapter: checkpoints hold the adapter alone, and not the "
                "base that was collapsed under it. Collapse once training has ended."
            )
        names = {block.name for block in find_feed_forward_blocks(trainer.model)}
        unknown = [name for name in trainer.layer_collapse_config.progressive_order or () if name not in names]
        if unknown:
            raise ValueError(
                f"`progressive_order` names what is no block of this model: {shorten(unknown)}. Its blocks are "
                f"{shorten(sorted(names))}."
            )

    def refuse_training(self) -> None:
        """Raises if no block would ever collapse in the training that is about to begin.

        Raises:
            ValueError: As said.
        """
        config = self._trainer.layer_collapse_config
        if config is not None and self._trainer.args.eval_strategy == IntervalStrategy.NO:
            reason = 'Blocks collapse after evaluations, and with eval_strategy="no" training has none'
            refuse_unread(config, ["evaluations"], reason, ', or set `eval_strategy` to "steps" or "epoch"')

    def collapse_ready(self) -> None:
        """Collapses the blocks whose turn it is."""
        ready = self._ready_names() if self.is_asked_for else []
        if not ready:
            return
        options = replace(self._trainer.layer_collapse_config, not_ready="keep", blocks=ready)
        with self._exchanging.all_or_nothing():
            self.reports.append(collapse_model(self._trainer.model, options))
        logger.info(f"Step {self._trainer.state.global_step}: collapsed {self.reports[-1].collapsed}")

    def _ready_names(self) -> list[str]:
        # Neurons that are not ready go on to train: a collapse would leave them as they are for good.
        indices = [int(index) for index, outcome in self._blocks.outcomes().items() if outcome.is_whole]
        if not indices:
            return []
        blocks = find_feed_forward_blocks(self._trainer.model)
        ready = [block.name for block in blocks if block.index in indices]
        collapsed = [block.name for block in blocks if block.state == "collapsed"]
        order = self._trainer.layer_collapse_config.progressive_order or []
        reached = list(itertools.takewhile(lambda name: name in ready or name in collapsed, order))
        return [name for name in ready if name in reached or len(reached) == len(order)]

    @contextlib.contextmanager
    def following(self, stored: dict[str, dict] | None) -> Iterator[None]:
        """In which the blocks are collapsed that a checkpoint of this run, of which the tables are given, holds
        collapsed, so that its weights can be loaded; they stay so if they were."""
        waiting = self._collapsed_only_in(stored or {}) if self.is_asked_for else []
        if not waiting:
            yield
            return
        with self._exchanging.all_or_nothing():
            collapse_as(self._trainer.model, waiting)
            yield

    def _collapsed_only_in(self, stored: dict[str, dict]) -> list[str]:
        """Names of the patched blocks that are not so in these tables, if all else is the same there."""
        model, waiting = self._trainer.model, []
        carriers = dict(carriers_of(unwrap(model, sharded=True)[0]))
        blocks = find_feed_forward_blocks(model)
        patched = {block.path(block.layout.activation_path): block for block in blocks if block.state == "patched"}
        for name, live in self._blocks.tables().items():
            there = stored.get(name, {})
            waits = {path for path, spec in live.items() if spec["type"] == "activation" and there.get(path) != spec}
            resolved = resolve_table(carriers[name], live) if waits else []
            resolved = {path: f"{name}.{qualified}".lstrip(".") for path, qualified, _, _ in resolved}
            ready = [patched[resolved[path]] for path in waits if resolved.get(path) in patched]
            # Of the same model, only further on. A block that was narrowed before has entries of its linears, too.
            inside = {block.path(linear) for block in ready for linear in block.layout.linears}
            rest = [path for path in live if path not in waits and resolved.get(path) not in inside]
            if not all(there.get(path) == live[path] for path in rest):
                return []
            waiting += [block.name for block in ready]
        return waiting

    @contextlib.contextmanager
    def wrapper_of_now(self, model: nn.Module) -> Iterator[nn.Module]:
        """What a step is taken with, of a model as the training loop knows it from before a collapse."""
        trainer, wrapper = self._trainer, self._trainer.model_wrapped
        if not isinstance(model, nn.parallel.DistributedDataParallel) or model is wrapper:
            yield model
            return
        with contextlib.nullcontext() if trainer.accelerator.sync_gradients else wrapper.no_sync():
            yield wrapper
