"""Evaluation of a patched model as if it had been collapsed, and what that says of the best checkpoint."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import default_compute_objective, has_length
from transformers.utils import logging

from .modeling_layercollapse import CollapsibleActivation
from .outcomes import Outcome
from .random_state import same_random_state
from .trained_blocks import READY_BLOCKS, TrainedBlocks
from .upstream import accumulating_apart, added_up


if TYPE_CHECKING:
    from .trainer import LayerCollapseTrainerMixin

logger = logging.get_logger(__name__)


def _changes(activation: CollapsibleActivation, outcome: Outcome) -> bool:
    """Whether a block would compute something else."""
    if outcome.name == "restored":
        return bool(activation.alpha.any()) or activation.replacement is not None
    return not bool((activation.alpha == 1)[outcome.to_one].all())


class CollapsedEvaluation:
    """Gives each metric of an evaluation a second time, of what the collapsed model would do.

    Args:
        trainer ([`LayerCollapseTrainerMixin`]): That evaluates.
        blocks ([`TrainedBlocks`]): Of its model.
    """

    def __init__(self, trainer: LayerCollapseTrainerMixin, blocks: TrainedBlocks) -> None:
        self._trainer: Any = trainer
        self._blocks = blocks
        self._names: dict[str, str] = {}  # metric -> its name with the ready blocks collapsed
        self._is_choosing = False

    # ---- Two passes ----

    def loop(
        self,
        own_loop: Callable[..., Any],
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """What the Trainer's own `evaluation_loop` gives for the other arguments, with both kinds of metrics.

        What `compute_metrics` may write into a file is written last for the model as it is. Data without a length may
        be such that they can be read only once: by the model as it is.
        """
        loop = partial(own_loop, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if description != "Evaluation" or not self._is_reported():
            return loop()
        collapsed, gather = None, self._trainer.gather_function  # which each loop resets
        again = not self._is_collapsed_already()
        if again and has_length(dataloader):
            collapsed = self._loop_as_if_collapsed(loop)
            self._trainer.gather_function = gather
        output, metrics = self._measured(loop)
        if again and collapsed is None:
            if self._is_used_up(dataloader):
                logger.warning_once(
                    "The evaluation data can be read only once, so that nothing is measured of the collapsed model. "
                    "Pass a dataset, or an iterable that starts anew each time."
                )
                return output
            self._trainer.gather_function = gather
            collapsed = self._loop_as_if_collapsed(loop)
        self._add(output.metrics, metrics if collapsed is None else collapsed, metric_key_prefix)
        compared = self._compared_with_best(output.metrics) if self._is_choosing else None
        if compared is not None and compared[0] > 0:
            self._trainer.state.best_metric = None
        return output

    def _add(self, metrics: dict[str, Any], collapsed: Mapping[str, Any], prefix: str) -> None:
        for name, value in list(collapsed.items()):
            if name != f"{prefix}_model_preparation_time":
                # What trl adds up is named so whatever the prefix.
                head = prefix if name.startswith(f"{prefix}_") else "eval"
                self._names[name] = f"{head}_collapsed_{name.removeprefix(f'{head}_')}"
                metrics[self._names[name]] = value
        # A notebook's table takes the prefix of the last loss for that of all metrics.
        own_loss = f"{prefix}_loss"
        if own_loss in metrics:
            metrics[own_loss] = metrics.pop(own_loss)

    def _is_reported(self) -> bool:
        """While a block is patched, and, where it goes on or is asked for, when all have collapsed."""
        if self._trainer.layer_collapse_config is None:
            return False
        asked_for = "collapsed_" in (self._trainer.args.metric_for_best_model or "")
        return bool(asked_for or self._blocks.activations() or self._blocks.count_collapsed())

    def _is_collapsed_already(self) -> bool:
        """Whether the model computes what it would after a collapse, so that nothing need be measured."""
        outcomes = self._outcomes()
        collapses = any(outcome.collapses for _, outcome in outcomes)
        return not collapses or not any(_changes(module, outcome) for module, outcome in outcomes)

    def _outcomes(self) -> list[tuple[CollapsibleActivation, Outcome]]:
        """Each activation in use, and what would become of its block."""
        outcomes = self._blocks.outcomes()
        return [(module, outcomes[index]) for index, module in self._blocks.activations().items()]

    def _is_used_up(self, dataloader: Any) -> bool:
        """Whether data that were read have nothing more to give, on any process."""
        source: Any = dataloader.dataset if isinstance(dataloader, DataLoader) else dataloader
        nothing_left = all(False for _ in source)
        used_up = torch.tensor([nothing_left], dtype=torch.float32, device=self._trainer.args.device)
        return bool(self._trainer.accelerator.reduce(used_up, reduction="sum"))

    def _measured(self, loop: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
        """`(what a pass gives, its metrics)`, with those that the Trainer adds up in it, and averages once it logs."""
        before = {name: len(values) for name, values in added_up(self._trainer).items()}
        output = loop()
        metrics = dict(output.metrics)
        for name, values in added_up(self._trainer).items():
            valid = [value for value in values[before.get(name, 0) :] if not math.isnan(value)]
            if valid:
                metrics[name] = sum(valid) / len(valid)
        return output, metrics

    def _loop_as_if_collapsed(self, loop: Callable[[], Any]) -> dict[str, Any]:
        """The metrics alone: predictions may take gigabytes, and the other pass has its own."""
        trainer, callback_handler = self._trainer, self._trainer.callback_handler
        # Prediction steps must not be reported twice.
        trainer.callback_handler = CallbackHandler([DefaultFlowCallback], trainer.model, None, None, None)
        try:
            with same_random_state(), self._as_if_collapsed(), accumulating_apart(trainer):
                return self._measured(loop)[1]
        finally:
            trainer.callback_handler = callback_handler

    @contextlib.contextmanager
    def _as_if_collapsed(self) -> Iterator[None]:
        """What `collapse` would make of the model, without the merging: alpha 1 where ready, native where restored."""
        outcomes = self._outcomes()
        before = [(module, module.alpha.detach().clone(), module.replacement) for module, _ in outcomes]
        try:
            with torch.no_grad():
                for module, outcome in outcomes:
                    module.alpha.masked_fill_(outcome.to_one, 1)
                    if outcome.name == "restored":
                        module.alpha.fill_(0)
                        module.replacement = None
            yield
        finally:
            with torch.no_grad():
                for module, alpha, replacement in before:
                    module.alpha.copy_(alpha)
                    module.replacement = replacement

    # ---- What is made of the metrics ----

    @contextlib.contextmanager
    def before_a_choice(self) -> Iterator[None]:
        """In which an evaluation that has more ready blocks than the best one finds no best one: what is told of an
        evaluation (early stopping) compares with it by the metric alone, before `is_best` is asked."""
        state = self._trainer.state
        best, self._is_choosing = state.best_metric, True
        try:
            yield
        finally:
            state.best_metric, self._is_choosing = best, False

    def _compared_with_best(self, metrics: Mapping[str, float]) -> tuple[float, bool] | None:
        """`(how many more ready blocks there are than at the best evaluation until now, whether the metric with these
        collapsed is better)`; `None` where there is nothing to compare."""
        trainer, state = self._trainer, self._trainer.state
        key = trainer.args.metric_for_best_model or ""
        key = key if key.startswith("eval_") else f"eval_{key}"
        collapsed = self._names.get(key, key)
        if trainer.layer_collapse_config is None or not state.best_global_step or collapsed not in metrics:
            return None
        value, value_then = metrics[collapsed], self._logged_when_best(collapsed, state.best_metric)
        if math.isnan(value):
            return -math.inf, False
        more = self._blocks.count_ready() - self._logged_when_best(READY_BLOCKS, 0)
        return more, value > value_then if trainer.args.greater_is_better else value < value_then

    def is_best(self, is_best: Callable, metrics: dict[str, float], trial: Any) -> bool:
        """Whether a checkpoint is the best one until now: of those with the most ready blocks, by the metric with
        these collapsed. `is_best` is the Trainer's own judgement, by the metric alone, which sets its state.
        """
        state = self._trainer.state
        compared = self._compared_with_best(metrics)
        if compared is not None:
            more_ready, better = compared
            if more_ready < 0 or (more_ready == 0 and not better):
                return False
            state.best_metric = None
        best = is_best(metrics, trial)
        if best:
            # Also where the save strategy asks for no best checkpoint: it finds the best evaluation in the log.
            state.best_global_step = state.global_step
        return best

    def _logged_when_best(self, key: str, default: Any) -> Any:
        """From the log, since that survives a resume."""
        state = self._trainer.state
        at_best = (entry for entry in state.log_history if entry["step"] == state.best_global_step)
        return next((entry[key] for entry in at_best if key in entry), default)

    def objective(self, metrics: dict[str, float]) -> float:
        """The Trainer's default one of a search, in which metrics that are reported twice count once."""
        again = self._names.values()
        return default_compute_objective({name: value for name, value in metrics.items() if name not in again})
