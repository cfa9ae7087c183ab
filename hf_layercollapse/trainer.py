"""The Trainer that drives alphas to 1, as a mixin and in front of `transformers.Trainer`.

What it does is in the parts that the mixin holds, one file each; here stands where transformers calls them, and why it
has to be there. A new option is a field in `config.py`, read by the part that it concerns, which also refuses what it
cannot run with (`refuse_setup`). Only what no part is called for yet needs one more override here.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer
from transformers.utils import logging

from .alpha_gradients import refuse_liger
from .alpha_training import AlphaTraining
from .budgeted_training import BudgetedTraining
from .callbacks import LayerCollapseCallback
from .checkpoint_folders import CheckpointFolders
from .checkpoints import Checkpoints
from .collapse_after_training import CollapseAfterTraining
from .collapsed_evaluation import CollapsedEvaluation
from .comparison import Comparison
from .config import LayerCollapseConfig
from .exchanging import Exchanging
from .loss_scaling import counts_items
from .modeling_layercollapse import push_to
from .models import unwrap
from .patching import collapsible_activations, layer_collapse_config_of
from .plans import CollapsePlan
from .progressive import ProgressiveCollapse
from .reports import CollapseReport
from .sentence_models import sentence_model
from .sharding import Sharding
from .teaching import Teaching
from .trained_blocks import TrainedBlocks
from .training_card import TrainingCard
from .upstream import declared_scaling, require_trainer


logger = logging.get_logger(__name__)

require_trainer(Trainer)

if TYPE_CHECKING:
    # What the mixin stands in front of is some Trainer; which, the class that has both says.
    InFrontOf = Trainer
else:
    InFrontOf = object


class LayerCollapseTrainerMixin(InFrontOf):
    """Adds LayerCollapse (arXiv 2311.17943) to a Trainer class that it stands in front of.

    Training minimises `loss + strength * sum_b (1 - alpha_b)^2`. Alphas take plain gradient steps whatever the
    optimizer, clamped to [0, 1]: with no task gradient `1 - alpha` shrinks by the factor
    `1 - 2 * alpha_learning_rate * penalty_strength` a step, so twice the strength takes half the steps. They take no
    weight decay and stay out of gradient clipping, and a gradient that is not finite leaves an alpha as it is. The
    penalty counts once per optimizer step, however many batches are accumulated and processes take part: it joins
    where alphas step, so that a subclass may compute its loss as it likes, with or without `super().compute_loss`. A
    step that leaves trainable alphas out raises. Alphas may be frozen and unfrozen while training runs.

    Evaluation of a patched model reports each metric a second time as `eval_collapsed_<metric>`: as if
    [`~LayerCollapseTrainerMixin.collapse`] had been called. They stay when all blocks have collapsed, if training is
    `progressive` or `metric_for_best_model` names one of them. `eval_runtime` covers both passes. `compute_metrics` is
    called in both, last for the model as it is, unless the data have no length: those may be such that can be read
    only once. The best checkpoint is the one with the best such metric among those with the most ready blocks. The
    evaluation loss never contains the penalty.

    With `distillation_weight` or `hidden_state_weight` in the config, a teacher's predictions, or the outputs of its
    blocks, add terms to the training loss, scaled as the model's own loss is. Where the forwards of that loss give no
    predictions, as trl's, or are run while it goes backward, as those of sentence-transformers' cached losses, the
    model runs once more. A model that is collapsed is healed in this way: it is trained as it is, with the dense model
    for a teacher and no penalty. With `task_loss_weight=0` the teacher alone says what is learned, and the data need
    no labels.

    With a `budget` in the config nothing is patched. When training begins, a plan is made from training inputs without
    labels, one for all processes, the dense model becomes the teacher, and blocks collapse as the plan says; then what
    is left is trained as any collapsed model is. Batches and random numbers are those of a run without a budget.
    Checkpoints hold the collapsed model; a run is resumed with the dense one, which takes their shapes, and plans
    nothing. [`~LayerCollapseTrainerMixin.collapse`] returns the report of that collapse. `blocks` that cannot be so
    small are refused when the Trainer is made, and so are adapters, FSDP and DeepSpeed.

    Two things are put right for every model, patched or not. Checkpoints hold the names of the live model and are
    loaded completely ([`Trainer`] restores 8 of a ViT's 40 tensors). And where the loss is the model's own and ignores
    `num_items_in_batch`, as most classification heads' does, `model_accepts_loss_kwargs` is False, so that gradients
    do not grow with `gradient_accumulation_steps`. A class with a `compute_loss` of its own is given that count as
    [`Trainer`] gives it, and says by `loss_is_scaled_for_ga` (since 5.19) whether it divides by it; where it does not
    say, and batches are accumulated, `train` warns.

    Args:
        model (`nn.Module` or `str`, *optional*): Dense: it is patched, in place. Or patched already, as the config
            says. Or, without a config, any model. A name where the Trainer class takes one, as trl's do.
        layer_collapse_config ([`LayerCollapseConfig`], *optional*): What to patch, and how to drive it. Default: what
            the model was patched with; on a dense or collapsed model, no LayerCollapse at all.
        calibration_data (iterable of `dict[str, Tensor]`, *optional*): Model inputs, for `linear_target="affine"`,
            read once for each model that is patched; or, with a `budget`, to plan with in place of training inputs (in
            several processes each passes its part).
        teacher (`nn.Module`, *optional*): What distillation compares with; it must know the task. It is put into
            evaluation mode, moved to the model's device, and neither trained nor saved. Default, if the config asks
            for distillation: a frozen copy of the dense model before it is patched, or collapsed to a budget. Needed
            for a model that comes collapsed, or patched and trained. Of a `SentenceTransformer`, `CrossEncoder` or
            `SparseEncoder` another of its kind, which is given what the loss gives the model.
        args, kwargs: Everything that the Trainer class takes. With `model_init`, each model it makes is patched.

    Raises:
        TypeError: `layer_collapse_config` or `model` is of a wrong type, or the model is wrapped or sharded.
        ValueError: The model is patched in another way, or only collapsed and there is no distillation, a teacher is
            missing or does not fit, calibration data is missing, or training is to run under FSDP1, ZeRO-3, an
            optimizer that steps during backward, kernels of liger in the place of blocks, or, on several processes,
            reentrant checkpointing. Under FSDP2 and ZeRO-2, further settings are refused: those that shard alphas, and
            distillation. With a budget: the model is not dense or under an adapter, or cannot be so small; from
            `train`, that there are no inputs to plan with, that the teacher cannot be compared on them, or that a
            checkpoint is of another run. From `train` with `progressive`: training runs without evaluations.
        RuntimeError: From `train`: a step left alphas out, or the code of a block ran without its activation.
    """

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        layer_collapse_config: LayerCollapseConfig | None = None,
        calibration_data: Iterable[Any] | None = None,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if layer_collapse_config is not None and not isinstance(layer_collapse_config, LayerCollapseConfig):
            raise TypeError(
                f"`layer_collapse_config` must be a LayerCollapseConfig, got {type(layer_collapse_config).__name__}."
            )
        self.layer_collapse_config: LayerCollapseConfig | None = layer_collapse_config
        self.collapse_report: CollapseReport | None = None  # what `collapse` did last
        self._make_parts(calibration_data, teacher)
        loads_by_name = super(LayerCollapseTrainerMixin, type(self)).__init__ is not Trainer.__init__
        if model is not None and layer_collapse_config is not None and not (loads_by_name and isinstance(model, str)):
            unwrap(model)  # refuses what is no model or is wrapped, before anything is moved
        # Patched afterwards: a trainer that loads models or tokenizers by the name of this one still finds it (trl's
        # do), and what is refused leaves the model as it was.
        super().__init__(model, *args, **kwargs)
        self._take_over_patched()
        self._refuse_setup()
        self._count_items_where_the_loss_does()
        if self.layer_collapse_config is not None:
            self._exchanging.look_at_optimizer()
        if layer_collapse_config is not None and model is not None:
            self._patch(self.model)
        self.add_callback(self._teaching)
        self.add_callback(self._alphas)
        self.add_callback(self._budgeted)
        self.add_callback(self._exchanging)
        self.add_callback(self._card)
        self._alphas.warn_of_frozen()

    # ---- What the hooks below hand on to ----

    def _make_parts(self, calibration_data: Iterable[Any] | None, teacher: nn.Module | None) -> None:
        self._blocks = TrainedBlocks(self, calibration_data)
        self._sharding = Sharding(self, self._blocks)
        self._alphas = AlphaTraining(self, self._blocks, self._sharding)
        self._teaching = Teaching(self, teacher)
        self._exchanging = Exchanging(self, self._blocks, self._alphas)
        self._progressive = ProgressiveCollapse(self, self._blocks, self._exchanging)
        self._budgeted = BudgetedTraining(self, self._blocks, self._teaching, self._exchanging, calibration_data)
        self._ending = CollapseAfterTraining(
            self, self._blocks, self._sharding, self._alphas, self._teaching, self._progressive, self._budgeted
        )
        self._evaluation = CollapsedEvaluation(self, self._blocks)
        self._folders = CheckpointFolders(self)
        self._checkpoints = Checkpoints(self, self._blocks, self._folders, self._progressive, self._budgeted)
        self._card = TrainingCard(self)

    def _refuse_setup(self) -> None:
        self._teaching.refuse_teacher_without_options()
        if any(isinstance(callback, LayerCollapseCallback) for callback in self.callback_handler.callbacks):
            raise ValueError(
                "LayerCollapseCallback is for Trainers without the mixin; with both, the penalty would count twice. "
                "Leave the callback out."
            )
        model: Any = self.model
        refuse_liger(self.args, model, self.layer_collapse_config)
        if self.layer_collapse_config is not None:
            for part in (self._budgeted, self._sharding, self._alphas, self._progressive, self._teaching):
                part.refuse_setup()

    def _patch(self, model: Any) -> None:
        self._card.remember_base(model)
        if self._budgeted.is_asked_for:
            self._budgeted.check(model)
            return
        with self._teaching.of(model):
            self._blocks.patch(model)

    def _take_over_patched(self) -> None:
        """Takes the options that a model was patched with, where none were given."""
        model: Any = self.model
        if self.layer_collapse_config is not None or not collapsible_activations(model):
            return
        self.layer_collapse_config = layer_collapse_config_of(unwrap(model, sharded=True)[0])
        if self.layer_collapse_config is None:
            raise ValueError("The model is patched but carries no options: pass `layer_collapse_config`.")
        with self._teaching.of(model):
            pass

    def _count_items_where_the_loss_does(self) -> None:
        # Most heads take the count of labels and ignore it, which makes gradients grow with the accumulated batches.
        if not self._has_own_loss() and self._counts_for_nothing():
            self.model_accepts_loss_kwargs = False

    def _counts_for_nothing(self) -> bool:
        """Whether items are counted for a model that ignores how many there are, and nothing says what its loss is."""
        says = declared_scaling(self) or self.label_smoother is not None or self.compute_loss_func is not None
        model: Any = self.model
        return not says and self.model_accepts_loss_kwargs and not counts_items(unwrap(model, sharded=True)[0])

    def _has_own_loss(self) -> bool:
        """Whether the loss is not the model's, but of a class around it, which is given the count of items."""
        ours = (Trainer, LayerCollapseTrainerMixin)
        return any("compute_loss" in vars(kind) for kind in type(self).__mro__ if kind not in ours)

    def _warn_of_unsaid_scaling(self) -> None:
        # sentence-transformers' trainers count no items.
        if self.args.gradient_accumulation_steps == 1 or sentence_model(self.model) is not None:
            return
        if declared_scaling(self) is None and self._has_own_loss() and self._counts_for_nothing():
            logger.warning(
                f"{type(self).__name__} computes a loss of its own and does not say how: transformers takes it to be "
                "divided by `num_items_in_batch`. Gradients of a mean over each batch would grow with "
                "`gradient_accumulation_steps`: set `self.model_accepts_loss_kwargs = False` then, or, since "
                "transformers 5.19, in the class `loss_is_scaled_for_ga`: False for such a mean, True for a loss that "
                "is divided."
            )

    # ---- The model ----

    @property
    def teacher(self) -> nn.Module | None:
        """What distillation compares with, or `None`."""
        return self._teaching.teacher

    @property
    def collapse_plan(self) -> CollapsePlan | None:
        """By what the model collapsed to a `budget`; `None` without one, before training, and in a run that was
        resumed."""
        return self._budgeted.plan

    def collapse(
        self, calibration_data: Iterable[Any] | None = None, max_error: float | None = None, allow_none: bool = False
    ) -> CollapseReport:
        """Collapses the ready blocks of the model in place; see [`collapse_model`].

        Blocks that are not ready stay patched or go back to dense, as `layer_collapse_config.not_ready` says. The
        trainer can go on to evaluate, predict and save; `train` starts with a new optimizer made from `args`.

        On several processes all must call this, and all hold what the first one found. A model that FSDP2 shards is
        gathered: from here on each process holds it whole, as a new `trainer.model`, until `train` shards it again.

        With a `budget` blocks have collapsed when training began: this is the report of that.

        Args:
            calibration_data (iterable of `dict[str, Tensor]`, *optional*): Model inputs; blocks that are not exactly
                linear are fitted to what they compute on them.
            max_error (`float`, *optional*): Refuse if a block's relative error exceeds this.
            allow_none (`bool`): Return a report, rather than raise, if no block is ready.

        Returns:
            [`CollapseReport`]

        Raises:
            ValueError: As [`collapse_model`] does.
            RuntimeError: Training is still running; or there is a `budget`, and training has not begun.
        """
        return self._ending.collapse(calibration_data, max_error, allow_none)

    def call_model_init(self, trial: Any = None) -> Any:
        # Every model that model_init makes is dense again.
        model = super().call_model_init(trial)
        if self.layer_collapse_config is not None:
            self._patch(model)
        return model

    # ---- Loss and optimizer ----

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # After super(), which multiplies by the number of processes.
        return self._teaching.compute_loss(super().compute_loss, model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        # The loop goes on with what wrapped the model at its begin, and what it logs is to be what is minimised.
        with self._progressive.wrapper_of_now(model) as model:
            loss = super().training_step(model, *args, **kwargs)
        return loss + self._alphas.penalty_share()

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        # Decay would pull alpha to 0.
        return self._alphas.without_alphas(super().get_decay_parameter_names(model), model)

    def create_optimizer(self, model: Any = None) -> Any:
        # Before accelerate gets both; Adam normalises a gradient's size away, and with it the penalty's strength.
        self._budgeted.collapse()
        self._sharding.leave_alphas_out()
        super().create_optimizer(model)
        self._alphas.take_over()
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        # By now DeepSpeed has the model, and has cast every parameter to one dtype.
        self._alphas.restore()
        return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # Twelve alphas at 0 have a gradient of norm 6.9, for which the task's would be scaled down.
        return super()._clip_grad_norm(self._alphas.task_parameters(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # As above: the norm in the logs is the task's.
        return super()._get_grad_norm(self._alphas.task_parameters(model), grad_norm=grad_norm)

    # ---- Evaluation and logs ----

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Here and not in `evaluate`: one log and one `on_evaluate`, with all metrics in it.
        return self._evaluation.loop(super().evaluation_loop, *args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        # After what an evaluation found, and before the checkpoint of the same step.
        with self._evaluation.before_a_choice():
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        self._progressive.collapse_ready()
        return metrics

    def _determine_best_metric(self, metrics: dict[str, Any], trial: Any) -> bool:
        # By the metric alone the best model would be the least collapsed one.
        return self._evaluation.is_best(super()._determine_best_metric, metrics, trial)

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        # The default objective is the sum of all metrics: those that are reported twice must count once.
        return super().hyperparameter_search(
            hp_space, compute_objective or self._evaluation.objective, *args, **kwargs
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Adds ours without changing the dict that the caller goes on to use.
        added = self._alphas.logs(logs) | self._teaching.logs(logs)
        extended = {**logs, **added}
        super().log(extended, start_time)
        logs.update({name: value for name, value in extended.items() if name not in added})

    # ---- Checkpoints: upstream writes and deletes them in place, under names that it does not load ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._progressive.refuse_training()
        self._warn_of_unsaid_scaling()
        # What was interrupted while it was written or deleted is no checkpoint.
        folder = self._folders.to_resume_from(resume_from_checkpoint)
        try:
            return super().train(folder, *args, **kwargs)
        except BaseException:
            # Upstream leaves it, and `collapse` and `evaluate` ask: training that was interrupted has ended.
            self.is_in_train = False
            raise

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from its last checkpoint, a run that had ended would take one more step.
        if not self._folders.is_at_the_end():
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # What is named checkpoint-... is complete, whenever the process is killed.
        with self._folders.written_beside(self._get_output_dir(trial), push=self._push_from_checkpoint):
            super()._save_checkpoint(model, trial)

    def _get_output_dir(self, trial: Any) -> str:
        # Where a checkpoint is written.
        return self._folders.staging or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Once it is in its place, with the code that its config names.
        if self._folders.may_be_pushed(checkpoint_folder):
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        # Deletes checkpoints in place.
        self._folders.delete_all_but_the_best(self._get_output_dir(trial))
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Under the names of the live model, which a checkpoint is loaded into as it is.
        with self._checkpoints.saving(output_dir):
            super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # Under FSDP2 and DeepSpeed upstream saves nothing, or asks an engine that is none.
        # `push_to_hub` calls this as a checkpoint does.
        if not self._sharding.is_passed_over_by_save_model(in_checkpoint=self._folders.staging is not None):
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir, self._sharding.whole_state_dict())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Loads what fits, and warns of the rest. sentence-transformers' trainers take no model here.
        with self._checkpoints.loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *([] if model is None else [model]))

    def _load_best_model(self) -> None:
        # As above.
        if not self._checkpoints.best_is_less_collapsed():
            with self._checkpoints.loading_best():
                super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # FSDP2's state dicts want a state for each parameter, and alphas have none; nor do they have a config beside.
        with self._alphas.aside():
            super()._save_optimizer_and_scheduler(output_dir)
        self._sharding.save_config(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # As above.
        with self._alphas.aside():
            super()._load_optimizer_and_scheduler(checkpoint)

    # ---- Model card and Hub ----

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        comparison: Comparison | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """Writes `README.md` into `args.output_dir`, from what was measured; see [`model_card.create_model_card`].

        Holds the last collapse, the last evaluation and the hyper-parameters. `push_to_hub` hands its keyword
        arguments on to this. Of a model that is neither patched nor collapsed, or of an adapter, it is the stock card.

        Args:
            comparison ([`Comparison`], *optional*): The model beside others, of which it is called "collapsed".
            language, license, tags, model_name, finetuned_from, dataset_tags: Metadata, as in
                [`~transformers.Trainer.create_model_card`]; `finetuned_from` is by default what was patched, if it has
                a name on the Hub.
            dataset, dataset_name: In place of `dataset_tags`, where that is left out; trl's trainers have the second.
            tasks, dataset_args: For the stock card. On another they are left out, with a warning.
        """
        given = {"language": language, "license": license, "tags": tags, "model_name": model_name}
        given |= {"finetuned_from": finetuned_from, "tasks": tasks, "dataset_tags": dataset_tags}
        given |= {"dataset": dataset, "dataset_args": dataset_args, "dataset_name": dataset_name}
        return self._card.write(super().create_model_card, comparison, **given)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        # Upstream does not say that a repository may have been left half-written.
        with push_to(self.hub_model_id or str(self.args.output_dir)):
            return super().push_to_hub(*args, **kwargs)


class LayerCollapseTrainer(LayerCollapseTrainerMixin, Trainer):
    __doc__ = (LayerCollapseTrainerMixin.__doc__ or "").replace(
        "to a Trainer class that it stands in front of", "to [`~transformers.Trainer`]"
    )
