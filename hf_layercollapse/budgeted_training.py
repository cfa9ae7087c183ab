"""A stated size in a Trainer: a plan from training inputs, a collapse before the first step, and what resumes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from torch import nn
from torch.utils.data import IterableDataset, Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import logging

from . import processes
from .blocks import survey
from .budgets import parse_budget
from .collapsing import collapse_model
from .exchanging import Exchanging
from .families import FeedForwardBlock, find_feed_forward_blocks
from .models import count_parameters, has_adapters, inputs_of, shorten, unwrap
from .patching import record_options, take_shapes
from .planning import plan_collapse, refuse_budget
from .plans import CollapsePlan
from .random_state import same_random_state
from .reports import BlockReport, CollapseReport
from .rows import contents
from .selection import select_blocks
from .sentence_models import features_in, sentence_model
from .teaching import Teaching
from .trained_blocks import TrainedBlocks


if TYPE_CHECKING:
    from .config import LayerCollapseConfig
    from .trainer import LayerCollapseTrainerMixin

logger = logging.get_logger(__name__)


class BudgetedTraining(TrainerCallback):
    """Collapses the model of a Trainer to the budget of its options when training begins. As a callback it sees
    whether training begins without that.

    Blocks collapse before there is an optimizer, and before anything is wrapped around the model: parameters, groups
    and processes are then those of any training of a collapsed model. Random numbers are as before afterwards, and
    neither the training data's sampler nor its loader is touched, so that batches and dropout are those of a run
    without a budget.

    Args:
        trainer ([`LayerCollapseTrainerMixin`]): Has the model, the data and the options.
        blocks ([`TrainedBlocks`]): Of the model.
        teaching ([`Teaching`]): Keeps the dense model as teacher.
        exchanging ([`Exchanging`]): Takes along what holds the parameters.
        calibration_data (iterable of `dict[str, Tensor]`, *optional*): In place of training inputs.

    Attributes:
        plan ([`CollapsePlan`] or `None`): What was planned; a run that is resumed plans nothing.
        report ([`CollapseReport`] or `None`): Of the collapse; of a run that is resumed, what blocks were and are.
        recorded ([`LayerCollapseConfig`] or `None`): What the model is recorded to be made by.
    """

    def __init__(
        self,
        trainer: LayerCollapseTrainerMixin,
        blocks: TrainedBlocks,
        teaching: Teaching,
        exchanging: Exchanging,
        calibration_data: Iterable[Any] | None = None,
    ):
        self._trainer: Any = trainer
        self._blocks, self._teaching, self._exchanging = blocks, teaching, exchanging
        self._given = calibration_data
        self.plan: CollapsePlan | None = None
        self.report: CollapseReport | None = None
        self.recorded: LayerCollapseConfig | None = None

    @property
    def is_asked_for(self) -> bool:
        config = self._trainer.layer_collapse_config
        return config is not None and config.plans

    # ---- Before training ----

    def refuse_setup(self) -> None:
        if not self.is_asked_for:
            return
        trainer = self._trainer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "A `budget` is not supported under FSDP and DeepSpeed. Collapse first (`plan_collapse`, "
                "`collapse_model`) and train what is left, or train in DDP."
            )

    def check(self, model: nn.Module) -> None:
        """Raises if a model cannot be collapsed to the budget, as far as that can be told without data.

        Raises:
            ValueError: It is under an adapter, patched or collapsed already, its blocks cannot be so small, or the
                teacher does not fit.
        """
        config = self._trainer.layer_collapse_config
        _refuse_adapters(model)
        states = _states(model) - {"dense"}
        if states:
            raise ValueError(
                f"A `budget` is for a dense model, and this one is {' and '.join(sorted(states))}. Pass the dense "
                "model, also to resume a run; or leave the `budget` out, and train this one as it is."
            )
        refuse_budget(model, config.blocks, config.constant_term, **parse_budget(config.budget))
        self._teaching.check(model)

    # ---- When training begins ----

    def collapse(self) -> None:
        """Plans and collapses a model that is dense; one that was collapsed, or that a checkpoint gave its shapes, is
        left as it is.

        Raises:
            ValueError: There are no inputs that a plan can be made from, or none that the teacher can be compared on,
                nothing is within the budget, or the Trainer was given an optimizer of another model.
        """
        trainer, model = self._trainer, self._trainer.model
        if not self.is_asked_for or "collapsed" in _states(model):
            return
        _refuse_adapters(model)  # one may have come since
        config = trainer.layer_collapse_config
        with self._exchanging.all_or_nothing(), same_random_state():
            data = self._inputs()
            self._rehearse(data)
            budget: dict[str, Any] = parse_budget(config.budget)
            plan = plan_collapse(model, data, blocks=config.blocks, constant_term=config.constant_term, **budget)
            if not plan.point.choices:
                raise ValueError(
                    f"No block can collapse within the budget {config.budget}: even the mildest plan loses more. "
                    "Allow more, or leave it out."
                )
            with self._teaching.of(model):
                report = collapse_model(model, plan=plan, calibration_data=data)
        self.plan = plan
        logger.info(f"{plan}\n{report}")
        self._collapsed(report)

    def _collapsed(self, report: CollapseReport) -> None:
        trainer = self._trainer
        self.report = trainer.collapse_report = report
        self.recorded = replace(trainer.layer_collapse_config, blocks=report.collapsed)
        record_options(trainer.model, self.recorded)

    def report_of_now(self) -> CollapseReport:
        """What `trainer.collapse()` gives.

        Raises:
            RuntimeError: The model is dense until training begins.
        """
        if self.report is None:
            raise RuntimeError("With a `budget` blocks collapse when training begins: call `train` first.")
        return self.report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_asked_for and "collapsed" not in _states(self._trainer.model):
            raise RuntimeError(
                f"Training begins with a dense model, though there is a `budget`: {type(self._trainer).__name__} "
                "makes its optimizer by a `create_optimizer` of its own. Let that call `super().create_optimizer()`."
            )

    # ---- A run that is resumed ----

    @contextlib.contextmanager
    def following(
        self, folder: str, stored: dict[str, dict] | None, options: Mapping[str, Any] | None
    ) -> Iterator[None]:
        """In which a dense model has the shapes of a checkpoint of this run, of which the tables are given, so that
        its weights can be loaded; if they were, it keeps them, and the dense model is the teacher.

        Args:
            options (`Mapping` or `None`): Those of the checkpoint's run, as far as it says them.

        Raises:
            ValueError: The checkpoint is of no run with this budget.
        """
        model = self._trainer.model
        if not self.is_asked_for or "collapsed" in _states(model):
            yield
            return
        patched = any(spec["type"] == "activation" for table in (stored or {}).values() for spec in table.values())
        if not stored or patched:
            raise ValueError(
                f"With a `budget` checkpoints hold a collapsed model, and {folder} "
                f"{'holds a patched one' if patched else 'does not say that it holds one'}. Resume from a checkpoint "
                "of a run with the same options, or leave the `budget` out."
            )
        if options is not None:
            self._refuse_other_options(folder, options)
        before, parameters = find_feed_forward_blocks(model), count_parameters(model)
        with self._exchanging.all_or_nothing(), same_random_state(), self._teaching.of(model):
            take_shapes(model, stored)
            yield
        self._collapsed(_report_of(before, find_feed_forward_blocks(model), parameters, count_parameters(model)))

    def _refuse_other_options(self, folder: str, options: Mapping[str, Any]) -> None:
        """Raises if a checkpoint's run made its model to other options than those of this run."""
        config = self._trainer.layer_collapse_config
        there = {name: options.get(name) for name in ("budget", "budget_method", "constant_term")}
        here = {name: getattr(config, name) for name in there}
        if there != here and (there["budget"] is None or _parsed(there) != _parsed(here)):
            raise ValueError(
                f"The checkpoint {folder} is of a run with {_in_words(there)}, and this one has {_in_words(here)}. "
                "Resume with the options that it was made with, or train anew into another `output_dir`."
            )
        blocks, refused = survey(unwrap(self._trainer.model)[0])
        chosen = {block.name for block in select_blocks(blocks, config.blocks, refused)}
        others = [name for name in options.get("blocks", ()) if name not in chosen]
        if others:
            raise ValueError(
                f"In the checkpoint {folder} blocks are collapsed that `blocks` does not choose here, "
                f"{shorten(others)}. Resume with the options that it was made with."
            )

    # ---- What plans are made from ----

    def _inputs(self) -> Any:
        """Batches of model inputs on the CPU."""
        if self._given is not None:
            if iter(self._given) is self._given:
                # They are read for the plan, and for the collapse.
                self._given = list(self._given)
            return self._given
        with processes.together():
            return self._batches(self._rows())

    def _rehearse(self, planned_with: Any) -> None:
        """Asks the teacher once about training inputs, while the model is dense; not about data that may be such that
        they can be read only once."""
        with processes.together():
            if self._given is None:
                batches = planned_with
            elif _is_countable(self._trainer.train_dataset):
                batches = self._batches(_spread(self._trainer.train_dataset, 1))
            else:
                return
            for batch in batches[:1]:
                self._teaching.rehearse(self._trainer.model, batch)

    def _rows(self) -> Any:
        """Rows of the training data, and not from its loader, whose order would be another one afterwards."""
        data: Any = self._trainer.train_dataset
        count = self._trainer.layer_collapse_config.budget_samples
        if data is None:
            raise ValueError(
                "A `budget` needs training inputs to plan with, and the Trainer has no `train_dataset`: pass batches "
                "of model inputs as `calibration_data`."
            )
        return _spread(data, count) if _is_countable(data) else self._first_rows(data, count)

    def _first_rows(self, data: Any, count: int) -> list[Any]:
        with same_random_state():
            rows = list(islice(iter(data), count))
        with same_random_state():
            again = list(islice(iter(data), 1))
        if not again or self._contents(again) != self._contents(rows[:1]):
            raise ValueError(
                "The training data give other rows each time that they are read, so that what a plan is made from "
                "would be missing in training: pass batches of model inputs as `calibration_data`."
            )
        return rows

    def _contents(self, rows: Any) -> list[bytes]:
        with same_random_state():  # collators may mask tokens at random
            return [content for batch in self._batches(rows) for content in contents(batch)]

    def _batches(self, rows: Any) -> list[dict[str, Any]]:
        """As the Trainer makes them. Of labels only those stay that tell what kind of prediction it is, or that a
        decoder reads; a plan looks no further at them."""
        left_out = set(self._trainer.label_names) - {"labels"}
        with _no_row_dropped(self._trainer.args):
            loader = self._trainer.get_test_dataloader(rows)
        batches = [part for batch in loader for part in self._parts_of(batch)]
        batches = [inputs_of(batch, "cpu") for batch in batches]
        return [{name: value for name, value in batch.items() if name not in left_out} for batch in batches]

    def _parts_of(self, batch: Any) -> Iterable[Any]:
        """What the model is given for a batch of the Trainer."""
        if not isinstance(batch, Mapping):
            kind = type(self._trainer).__name__
            raise ValueError(
                f"A batch of this {kind} is a {type(batch).__name__} and no dict of model inputs, of which a `budget` "
                "is planned and the teacher is asked. Collapse first (`plan_collapse`, `collapse_model`), and train "
                "what is left."
            )
        sentences = sentence_model(self._trainer.model)
        return [batch] if sentences is None else features_in(self._trainer, sentences, batch)


def _refuse_adapters(model: nn.Module) -> None:
    if unwrap(model)[1] or has_adapters(model):
        raise ValueError(
            "A `budget` is not supported for a model under an adapter or `torch.compile`: checkpoints hold the "
            "adapter alone, and not the base that was collapsed under it. Collapse and save the base first "
            "(`plan_collapse`, `collapse_model`), and put the adapter on that; to compile, set `torch_compile`."
        )


def _parsed(options: Mapping[str, Any]) -> dict[str, Any]:
    return {**options, "budget": parse_budget(options["budget"])}


def _in_words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _is_countable(data: Any) -> bool:
    return data is not None and has_length(data) and not isinstance(data, IterableDataset)


@contextlib.contextmanager
def _no_row_dropped(args: TrainingArguments) -> Iterator[None]:
    """In which loaders are made that give their last batch whatever its size: here rows are counted, not steps."""
    drop_last, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = drop_last


def _spread(data: Any, count: int) -> Any:
    """So many rows from all over the data, or all of them."""
    count = min(count, len(data))
    indices = [index * len(data) // count for index in range(count)]
    return data.select(indices) if isinstance(data, Dataset) else Subset(data, indices)


def _states(model: nn.Module) -> set[str]:
    return {block.state for block in find_feed_forward_blocks(model)}


def _report_of(
    before: list[FeedForwardBlock], after: list[FeedForwardBlock], parameters_before: int, parameters_after: int
) -> CollapseReport:
    """What is known of a collapse by what blocks were and are."""
    blocks = [
        BlockReport(
            now.name,
            now.index,
            "collapsed",
            None,
            then.parameters,
            now.parameters,
            then.macs,
            now.macs,
            rank=None if now.rank == now.in_features else now.rank,
            kept_neurons=now.hidden_features,
        )
        for then, now in zip(before, after, strict=True)
        if now.state == "collapsed"
    ]
    return CollapseReport(blocks, parameters_before, parameters_after)
