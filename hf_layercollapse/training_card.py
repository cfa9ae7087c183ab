"""The model card that a Trainer writes, from what it did and measured."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .comparison import Comparison
from .model_card import create_model_card
from .models import is_transformers_model, unwrap
from .patching import tables_of


if TYPE_CHECKING:
    from .trainer import LayerCollapseTrainerMixin

logger = logging.get_logger(__name__)

# What the stock card's `model-index` has, and this one's, which a comparison makes, has not.
UNUSED = ("tasks", "dataset_args")

# Names of metrics that say how long it took.
TIMES = ("runtime", "per_second", "preparation_time")


class TrainingCard(TrainerCallback):
    """Writes the card of a Trainer's model. As a callback it sees whether weights were trained after a collapse.

    Args:
        trainer ([`LayerCollapseTrainerMixin`]): Has the model, its last collapse and evaluation.
    """

    def __init__(self, trainer: LayerCollapseTrainerMixin) -> None:
        self._trainer: Any = trainer
        self._base_model: str | None = None  # what the model was before it was patched, by name
        self._trained: list[Any] = []  # the report that there was in the last step of training

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trained = [self._trainer.collapse_report]

    def remember_base(self, model: nn.Module) -> None:
        """To be called before a model is patched, which makes it forget its name."""
        inner = unwrap(model)[0]
        if isinstance(inner, PreTrainedModel) and inner.name_or_path:
            self._base_model = inner.name_or_path

    def write(self, stock_card: Callable[..., None], comparison: Comparison | None = None, **metadata: Any) -> None:
        """Writes the card; of a model that this package knows nothing of, `stock_card` does, the Trainer's own method.

        Args:
            comparison ([`Comparison`], *optional*): See [`LayerCollapseTrainerMixin.create_model_card`].
            metadata: As there. trl's own method does not take all of it, so that it gets what is given.
        """
        inner, wrappers = unwrap(self._trainer.model, sharded=True)
        if wrappers or not (is_transformers_model(self._trainer.model) and tables_of(inner)):
            return stock_card(**{name: value for name, value in metadata.items() if value is not None})
        if self._trainer.is_world_process_zero():
            _warn_of_unused(metadata)
            card = self._make(inner, comparison, metadata)
            card.save(os.path.join(self._trainer.args.output_dir, "README.md"))
        return None

    def _make(self, model: PreTrainedModel, comparison: Comparison | None, metadata: dict[str, Any]) -> Any:
        base = metadata["finetuned_from"] or self._base_model
        return create_model_card(
            model,
            self._trainer.collapse_report,
            comparison,
            plan=self._trainer.collapse_plan,
            trained_since=any(report is self._trainer.collapse_report for report in self._trained),
            name=metadata["model_name"] or Path(self._trainer.args.output_dir).name,
            base_model=base if base and not os.path.isdir(base) else None,
            repo_id=self._trainer.hub_model_id,
            datasets=metadata["dataset_tags"] or metadata["dataset"] or metadata["dataset_name"],
            language=metadata["language"],
            license=metadata["license"],
            tags=metadata["tags"],
            training=extract_hyperparameters_from_trainer(self._trainer),
            evaluation=self._last_evaluation(),
        )

    def _last_evaluation(self) -> dict[str, float]:
        """Metrics of the last evaluation, without those that say how long it took."""
        history = reversed(self._trainer.state.log_history)
        logs = (log for log in history if any(name.startswith("eval_") for name in log))
        return {
            name: value
            for name, value in next(logs, {}).items()
            if name.startswith("eval_") and not name.endswith(TIMES)
        }


def _warn_of_unused(metadata: dict[str, Any]) -> None:
    unused = [f"`{name}`" for name in UNUSED if metadata[name] is not None]
    if unused:
        logger.warning(
            f"{' and '.join(unused)} cannot be on the card of a patched or collapsed model: its task is that of the "
            "model's class, and what it says of measurements comes from `comparison`. Data sets are named by "
            "`dataset_tags` or `dataset`."
        )
