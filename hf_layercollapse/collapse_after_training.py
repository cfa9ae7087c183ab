"""What `trainer.collapse()` does: the model that was trained collapses, and the Trainer goes on with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from .alpha_training import AlphaTraining
from .budgeted_training import BudgetedTraining
from .collapsing import collapse_model
from .models import has_adapters, is_transformers_model, unwrap
from .patching import layer_collapse_config_of
from .progressive import ProgressiveCollapse
from .reports import CollapseReport
from .sharding import Sharding
from .teaching import Teaching
from .trained_blocks import TrainedBlocks


if TYPE_CHECKING:
    from .config import LayerCollapseConfig
    from .trainer import LayerCollapseTrainerMixin


class CollapseAfterTraining:
    """Collapses the model of a Trainer, on all of its processes, and takes what was made of it into the Trainer.

    Args:
        trainer ([`LayerCollapseTrainerMixin`]): Has the model.
        blocks, sharding, alphas, teaching, progressive, budgeted: The other parts of the Trainer that hold something
            of it.
    """

    def __init__(
        self,
        trainer: LayerCollapseTrainerMixin,
        blocks: TrainedBlocks,
        sharding: Sharding,
        alphas: AlphaTraining,
        teaching: Teaching,
        progressive: ProgressiveCollapse,
        budgeted: BudgetedTraining,
    ) -> None:
        self._trainer: Any = trainer
        self._blocks, self._sharding = blocks, sharding
        self._alphas, self._teaching, self._progressive, self._budgeted = alphas, teaching, progressive, budgeted

    def collapse(
        self, calibration_data: Iterable[Any] | None = None, max_error: float | None = None, allow_none: bool = False
    ) -> CollapseReport:
        """See [`LayerCollapseTrainerMixin.collapse`]."""
        trainer, reports = self._trainer, self._progressive.reports
        ended = trainer.state.global_step >= trainer.state.max_steps or trainer.control.should_training_stop
        if trainer.is_in_train and not ended:
            raise RuntimeError(
                "`collapse` replaces parameters that are being trained: call it once training has ended."
            )
        if self._budgeted.is_asked_for:
            return self._budgeted.report_of_now()
        if reports and not self._blocks.activations():
            trainer.collapse_report = _joined(reports)
            return trainer.collapse_report
        config, model = self._options(), self._sharding.whole_model()
        work = partial(collapse_model, model, config, calibration_data, max_error=max_error, allow_none=allow_none)
        report = self._sharding.on_all_processes(model, work)
        trainer.collapse_report = _joined([*reports, report])
        self._go_on_with(model)
        return trainer.collapse_report

    def _options(self) -> LayerCollapseConfig | None:
        """`None` for the model's own: its blocks are those that are patched, however it names them."""
        config = self._trainer.layer_collapse_config
        stored = layer_collapse_config_of(unwrap(self._trainer.model, sharded=True)[0])
        if self._blocks.activations() and stored is not None and replace(config, blocks=stored.blocks) == stored:
            return None
        return config

    def _go_on_with(self, model: nn.Module) -> None:
        trainer = self._trainer
        inner, wrappers = unwrap(model)
        if wrappers and not has_adapters(inner) and is_transformers_model(model):
            # They were merged, and what is left of the PeftModel would save an empty adapter.
            model = inner
        self._sharding.let_go(model)
        # They hold parameters that are gone.
        trainer.optimizer = trainer.lr_scheduler = None
        self._alphas.forget()
        trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model
        self._blocks.changed()
        self._teaching.changed(inner)


def _joined(reports: Sequence[CollapseReport]) -> CollapseReport:
    """One report of collapses that came one after the other."""
    if len(reports) == 1:
        return reports[0]
    *earlier, last = reports
    blocks = [block for report in earlier for block in report.blocks if block.outcome == "collapsed"] + last.blocks
    return replace(
        last,
        blocks=sorted(blocks, key=lambda block: block.index),
        parameters_before=reports[0].parameters_before,
    )
