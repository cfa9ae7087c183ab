"""How alphas are driven: the strength of the penalty over time, and steps that no optimizer rescales."""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers.training_args import OptimizerNames, TrainingArguments
from transformers.utils import logging

from .config import LayerCollapseConfig
from .patching import collapsible_activations, penalty, refuse_sharded
from .upstream import let_the_scaler_unscale


if TYPE_CHECKING:
    from .neuron_budget import NeuronBudget

logger = logging.get_logger(__name__)

NO_TRAINABLE_ALPHA = (
    "The model is patched, but no alpha is trainable, so its blocks will not become linear. Under peft, name the "
    "activation modules in `modules_to_save`."
)


def penalty_strength_at(config: LayerCollapseConfig, step: int, max_steps: int) -> float:
    """The strength that is in force at a step, counted from 0; a function of nothing else, so it survives a resume."""
    warmup = config.penalty_warmup_ratio * max_steps
    if config.penalty_schedule == "constant" or step >= warmup:
        return config.penalty_strength
    progress = step / warmup
    if config.penalty_schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return config.penalty_strength * progress


def budget_progress(config: LayerCollapseConfig, steps: int, max_steps: int) -> float:
    """How far alphas have come to a budget when so many steps have been taken, in [0, 1]; 1: each is 0 or 1."""
    return min(1.0, steps / (config.budget_ratio * max_steps)) if max_steps > 0 else 0.0


def plain_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that takes the steps, without what accelerate puts around it."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def refuse_steps_in_backward(args: TrainingArguments) -> None:
    """Raises if the optimizer that training arguments name takes its steps during the backward pass.

    Raises:
        ValueError: It does.
    """
    if "lomo" in args.optim or "layerwise" in args.optim:
        raise ValueError(
            f"optim={OptimizerNames(args.optim).value!r} updates parameters during the backward pass, where alphas "
            "cannot take steps of their own. Use an optimizer that works in `step`, such as 'adamw_torch'."
        )


# Of each optimizer, what hides alphas from it and steps them: there is one at a time that does.
_HOOKS: weakref.WeakKeyDictionary[Optimizer, list[RemovableHandle]] = weakref.WeakKeyDictionary()


class AlphaSteps:
    """Makes an optimizer leave alphas alone, and steps them itself, with the penalty: `alpha -= lr * gradient` of
    `loss + strength * penalty`, clamped to [0, 1].

    The penalty's gradient joins here, where a step is taken: by then the task's has been added up over batches and
    processes, clipped and unscaled, so that the penalty counts once per step, whatever the loss is computed by and
    however often. An alpha of a neuron takes `width` times the step, since its block's penalty is a mean over neurons:
    both gradients weigh as they do with one alpha for the block, and alphas are as fast. A gradient that is not finite
    moves nothing, and an alpha that is frozen at the time stays where it is.

    Alphas are in the optimizer's groups nevertheless, since it is there that a GradScaler finds what to unscale: in a
    group of their own, or, if a schedule is already attached, which counts the groups, in those that exist. What those
    groups say of learning rate and decay does not touch them.

    Args:
        optimizer (`torch.optim.Optimizer`): Changed in place: hooks around its `step` hide the alphas' gradients. They
            take the place of those of an earlier one, which a Trainer made that had this optimizer before.
        alphas (`list[nn.Parameter]`): Taken out of the optimizer's other groups.
        config ([`LayerCollapseConfig`]): `alpha_learning_rate` and `alpha_lr_schedule` are used.
        strength (`Callable[[], float]`): Gives the strength of the penalty in the step that is being taken.
        scheduled (`bool`): Whether a learning rate schedule is attached.
        told ([`NeuronBudget`], *optional*): Says which alphas lead to 1 and which stay at 0.

    Attributes:
        taken (`int`): How many steps there were.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        alphas: list[nn.Parameter],
        config: LayerCollapseConfig,
        strength: Callable[[], float],
        scheduled: bool = False,
        told: "NeuronBudget | None" = None,
    ) -> None:
        self.optimizer, self.alphas, self.config, self.strength = optimizer, alphas, config, strength
        self.told = told
        self.taken = 0
        # While the optimizer steps: alphas and their gradients.
        self._hidden: list[tuple[nn.Parameter, torch.Tensor]] | None = None
        self._resting = False
        self._not_finite: torch.Tensor | None = None  # a flag on the device of an alpha
        self._warned = False
        self.begin_run()
        # What `alpha_lr_schedule="same"` compares with; a schedule sets it too.
        optimizer.param_groups[0].setdefault("initial_lr", optimizer.param_groups[0]["lr"])
        for handle in _HOOKS.pop(optimizer, []):
            handle.remove()
        self._join(scheduled)

    @property
    def drives(self) -> bool:
        """Whether no later one has taken the optimizer."""
        return _HOOKS.get(self.optimizer) is self._handles

    def leave(self) -> None:
        """The optimizer steps as it would by itself from here on, unless a later one drives it."""
        if self.drives:
            for handle in _HOOKS.pop(self.optimizer):
                handle.remove()

    def _join(self, scheduled: bool) -> None:
        if scheduled:
            found = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
            self.optimizer.param_groups[-1]["params"].extend(a for a in self.alphas if id(a) not in found)
        else:
            _take_out(self.optimizer, self.alphas)
            rate = self.config.alpha_learning_rate
            self.optimizer.add_param_group({"params": self.alphas, "lr": rate, "weight_decay": 0.0})
        let_the_scaler_unscale(self.optimizer)
        self._handles = _HOOKS[self.optimizer] = [
            self.optimizer.register_step_pre_hook(self._hide),
            self.optimizer.register_step_post_hook(self._show_and_step),
        ]

    def follow(self, model: nn.Module, alone: bool) -> bool:
        """Drives those alphas too that have become trainable since, and says whether there are any.

        Args:
            model (`nn.Module`): What is trained.
            alone (`bool`): Whether gradients are what backward leaves: neither averaged over processes nor scaled.

        Raises:
            RuntimeError: An alpha is gone from the model, or one became trainable and there is more to be done to its
                gradient than was made ready for.
        """
        present = {id(module.alpha): module.alpha for module in collapsible_activations(model).values()}
        known = {id(alpha) for alpha in self.alphas}
        others = [alpha for key, alpha in present.items() if key not in known]
        if known - present.keys():
            raise RuntimeError(
                f"The optimizer was made for {len(known)} alphas, and the model now has {len(others)} others. Patch "
                "and collapse between two calls of `train`, with `trainer.collapse()`."
            )
        unfrozen = [alpha for alpha in others if alpha.requires_grad]
        if unfrozen and not alone:
            raise RuntimeError(
                f"{len(unfrozen)} alphas became trainable after training had been made ready without them: their "
                "gradients would be neither averaged over processes nor unscaled. Leave alphas trainable until "
                "`train` has begun, and freeze them in `on_train_begin` (in DDP with "
                "`ddp_find_unused_parameters=True`)."
            )
        self.alphas = [*self.alphas, *unfrozen]
        return bool(unfrozen)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """The optimizer without the alphas, which rest. torch's distributed state dicts want a state for each of its
        parameters, and these have none; to get the others' they take a step of no length.
        """
        self._resting = True
        try:
            with _groups_without(self.optimizer, self.alphas):
                yield
        finally:
            self._resting = False

    @property
    def learning_rate(self) -> float:
        """In force now."""
        if self.config.alpha_lr_schedule == "constant":
            return self.config.alpha_learning_rate
        first = self.optimizer.param_groups[0]
        initial = float(first["initial_lr"])
        return self.config.alpha_learning_rate * (float(first["lr"]) / initial if initial else 0.0)

    def _hide(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # Every optimizer passes over parameters without a gradient. The hooks run once more where a subclass's `step`
        # calls its parent's; by then nothing is left to hide.
        hidden = [(alpha, alpha.grad) for alpha in self.alphas if alpha.grad is not None]
        if hidden or self._hidden is None:
            self._hidden = hidden
        for alpha, _ in hidden:
            alpha.grad = None

    def _show_and_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._hidden is None:
            return
        hidden, self._hidden = self._hidden, None
        for alpha, gradient in hidden:
            alpha.grad = gradient
        if not self._resting:
            self._step_all()

    # ---- The penalty ----

    @property
    def _driven(self) -> list[nn.Parameter]:
        return [alpha for alpha in self.alphas if alpha.requires_grad]

    def penalty(self) -> torch.Tensor:
        """[`penalty`] of the alphas that a step moves now, with the goals that they have, times its strength."""
        return self.strength() * penalty(self._driven, None if self.told is None else self.told.goal)

    def begin_run(self) -> None:
        """To be called when training begins: its first log is not of steps of the run before."""
        self._penalty_sum: float | torch.Tensor = 0.0  # since the last log
        self._penalty_count = 0

    def count_penalty(self, value: float | torch.Tensor) -> None:
        """Adds the penalty of a step, before alphas move, to what the next log is of."""
        self._penalty_sum = self._penalty_sum + value
        self._penalty_count += 1

    def penalty_logs(self) -> dict[str, float]:
        """The mean over the steps since the last call, as the loss is logged; nothing if there were none."""
        mean = float(self._penalty_sum) / self._penalty_count if self._penalty_count else None
        self.begin_run()
        return {} if mean is None else {"layer_collapse/penalty": mean}

    # ---- Steps ----

    def _step_all(self) -> None:
        if self.told is not None:
            self.told.note()
        driven = self._driven
        if driven:
            with torch.enable_grad():
                gradients = torch.autograd.grad(self.penalty(), driven)
            for alpha, gradient in zip(driven, gradients, strict=True):
                bounds = (0, 1) if self.told is None else self.told.bounds(alpha)
                self._note(_step(alpha, gradient, self.learning_rate, *bounds))
        self.taken += 1

    def _note(self, not_finite: torch.Tensor) -> None:
        known = self._not_finite
        self._not_finite = not_finite if known is None else known | not_finite.to(known.device)

    def warn_if_not_finite(self) -> None:
        """Once; waits for the device, so not at every step."""
        if not self._warned and self._not_finite is not None and bool(self._not_finite):
            self._warned = True
            logger.warning(
                "The gradient of an alpha was not finite; that alpha was left as it was. If the loss is NaN or "
                "infinite, lower the learning rate or check the data."
            )


class AlphaStepsApart(AlphaSteps):
    """The same for an engine that flattens what is in its optimizer, and casts it: alphas are in none of the groups,
    and take their steps when `step` is called.

    Args:
        optimizer, alphas, config, strength: As of [`AlphaSteps`].
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        alphas: list[nn.Parameter],
        config: LayerCollapseConfig,
        strength: Callable[[], float],
    ) -> None:
        super().__init__(optimizer, alphas, config, strength)
        self._values = [alpha.detach().clone() for alpha in alphas]

    def _join(self, scheduled: bool) -> None:
        _take_out(self.optimizer, self.alphas)

    def restore(self) -> None:
        """Gives alphas the values and the dtype that they had when this was made."""
        for alpha, value in zip(self.alphas, self._values, strict=True):
            alpha.data = value.to(alpha.device, copy=True)

    def step(self) -> None:
        """One step of all alphas, which uses their gradients up."""
        self._step_all()
        for alpha in self.alphas:
            alpha.grad = None


@torch.no_grad()
def _step(alpha: torch.Tensor, gradient: torch.Tensor, learning_rate: float, low: Any, high: Any) -> torch.Tensor:
    """Takes one step in place, by the penalty's gradient and the task's, where that is finite, between two bounds.

    Returns:
        Whether any of it is not, a tensor.
    """
    gradient = gradient if alpha.grad is None else gradient + alpha.grad
    finite = gradient.isfinite()
    stepped = alpha - learning_rate * alpha.numel() * gradient
    alpha.copy_(torch.where(finite, stepped, alpha).clamp(low, high))
    return ~finite.all()


def _take_out(optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
    ours = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in ours]


@contextlib.contextmanager
def _groups_without(optimizer: Any, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """The optimizer without some of its parameters, and without groups that hold nothing else."""
    ours, groups = {id(parameter) for parameter in parameters}, optimizer.param_groups
    held = [[parameter for parameter in group["params"] if id(parameter) in ours] for group in groups]
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ours]
    empty = {i: group for i, group in enumerate(groups) if not group["params"]}
    groups[:] = [group for group in groups if group["params"]]
    try:
        yield
    finally:
        # Other dicts, if a state was loaded.
        groups = optimizer.param_groups
        for i, group in empty.items():
            groups.insert(i, group)
        for group, parameters in zip(groups, held, strict=True):
            group["params"].extend(parameters)


def alpha_logs(alphas: Mapping[str, nn.Parameter], strength: float) -> dict[str, float]:
    """What is logged of alphas, by the indices of their blocks, and of the penalty's strength."""
    means = {name: float(alpha.detach().mean()) for name, alpha in alphas.items()}  # on several devices, maybe
    return {
        "layer_collapse/penalty_strength": strength,
        "layer_collapse/alpha_mean": sum(means.values()) / len(means),
        **{f"layer_collapse/alpha/{name}": mean for name, mean in means.items()},
    }


def exchange_parameters(
    optimizer: Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]
) -> None:
    """Makes an optimizer follow a model whose modules were replaced, in place: a parameter takes the place of the one
    that had its name.

    For a training loop of one's own in which blocks collapse while it goes on (the Trainer does it by itself, with
    `LayerCollapseConfig(progressive=True)`):

        before = dict(model.named_parameters())
        collapse_model(model)
        exchange_parameters(optimizer, before, dict(model.named_parameters()))

    **Groups.** What stands in `after` under a name of `before` goes into the group of that one, under its learning
    rate and weight decay, whatever the shapes: a merged weight `(hidden, hidden)` for a linear's `(hidden,
    intermediate)`. What has no name in `after` any more (the first linear, alphas) is taken out. What is new and
    trained, in a module of which the optimizer has something (a bias where the linear had none), joins the first group
    that holds biases, or else the first. Groups keep the order of the model, as a new optimizer would have it, so that
    state dicts of one fit the other.

    **State.** Moments and step counts of every parameter that stays are kept. Those of parameters that are gone are
    dropped, and what takes their place starts as at the first step. Gradients are not carried over: exchange between
    `optimizer.zero_grad()` and the next backward pass.

    **Schedules** go on: they count the groups, which stay as many as they were, even if one is left empty.

    **Master weights.** The optimizer must hold the model's own parameters. One that steps copies of them (float32
    masters of half-precision weights, DeepSpeed's and FSDP1's flat parameters) is refused; float32 weights under
    autocast, with or without a `GradScaler`, are as good as any. What else keeps the parameters that it was made with
    has to be told separately: DistributedDataParallel is made anew, an average of weights too, and [`AlphaSteps`] gets
    `steps.alphas = alpha_parameters(model)`.

    Args:
        optimizer (`torch.optim.Optimizer`): Changed in place; one that accelerate prepared is looked through.
        before, after (`Mapping[str, nn.Parameter]`): `dict(model.named_parameters())` from before and after, in that
            order, of any shapes. What the optimizer holds that is in neither (a loss with weights) stays as it is.
            With several optimizers, call it for each.

    Raises:
        ValueError: What the optimizer holds is no parameter of `before`: it was made for another model, or steps
            copies. Nothing is changed then.
    """
    refuse_other_optimizer(optimizer, before)
    optimizer = plain_optimizer(optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    old_order = {id(parameter): i for i, parameter in enumerate(before.values())}
    order = {id(parameter): i for i, parameter in enumerate(after.values())}
    successors = {id(parameter): after.get(name) for name, parameter in before.items() if id(parameter) not in order}
    added = _new_beside_trained(before, after, held)
    # A bias where there was none goes where biases are.
    biases = {id(parameter) for name, parameter in after.items() if name.endswith(".bias")}
    for group in optimizer.param_groups:
        positions = [old_order.get(id(parameter), -1) for parameter in group["params"]]
        kept = [successors.get(id(parameter), parameter) for parameter in group["params"]]
        kept = [parameter for parameter in kept if parameter is not None]
        if any(id(parameter) in biases for parameter in kept):
            kept, added = kept + added, []
        # As a new optimizer would be given them, so that a checkpoint fits it.
        if positions == sorted(positions):
            kept.sort(key=lambda parameter: order.get(id(parameter), -1))
        group["params"] = kept
    if added:
        optimizer.param_groups[0]["params"].extend(added)
    for parameter in before.values():
        if id(parameter) in successors:
            optimizer.state.pop(parameter, None)


def refuse_other_optimizer(optimizer: Optimizer, before: Mapping[str, nn.Parameter]) -> None:
    """Raises as [`exchange_parameters`] does for an optimizer that cannot follow a model with these parameters.

    Raises:
        ValueError: It holds none of them.
    """
    optimizer = plain_optimizer(optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held and not any(id(parameter) in held for parameter in before.values()):
        raise ValueError(
            f"This {type(optimizer).__name__} holds none of the {len(before)} parameters that the model had before. "
            "Take `dict(model.named_parameters())` before anything is replaced, of the model that the optimizer was "
            "made for. An optimizer that steps copies of the parameters cannot follow: collapse once training has "
            "ended, or make a new one."
        )


def _new_beside_trained(before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter], held: Any) -> list[Any]:
    """Parameters under names that are new, where the optimizer trains something of the module around them."""

    def is_trained(name: str) -> bool:
        while name:
            name = name.rpartition(".")[0]
            beside = [parameter for other, parameter in before.items() if other.startswith(f"{name}.") or not name]
            if beside:
                return any(id(parameter) in held for parameter in beside)
        return False

    return [p for name, p in after.items() if name not in before and p.requires_grad and is_trained(name)]


def replicate_alphas(alphas: Iterable[nn.Parameter]) -> list[RemovableHandle]:
    """Keeps alphas that `fully_shard` leaves alone the same on all processes, and float32 beside sharded parameters of
    any dtype: their values become those of the first process, their gradients, from now on, the mean over processes.

    Under FSDP2 name the alphas in `fully_shard(..., ignored_params=set(alphas))`, for each module that is sharded: the
    penalty is made of them outside any module's forward, where a sharded one is not whole.

    Args:
        alphas (`list[nn.Parameter]`): As `alpha_parameters(model)` gives them before the model is sharded.

    Returns:
        A list of handles; `handle.remove()` takes the hook of one alpha away.
    """
    for alpha in alphas:
        refuse_sharded(alpha)
        dist.broadcast(alpha.data, src=0)
    # After every backward: the mean of what is accumulated, of which all but the last part is the same everywhere.
    return [alpha.register_post_accumulate_grad_hook(_average_gradient) for alpha in alphas]


def _average_gradient(alpha: nn.Parameter) -> None:
    assert alpha.grad is not None, "the hook of a gradient that is there"
    dist.all_reduce(alpha.grad)  # gloo knows no mean
    alpha.grad /= dist.get_world_size()


class TaskParameters:
    """Stands in for a model where nothing but `parameters()` is asked for: all but the alphas."""

    def __init__(self, model: nn.Module, alphas: list[nn.Parameter]) -> None:
        self._model, self._alphas = model, {id(alpha) for alpha in alphas}

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self._model.parameters() if id(parameter) not in self._alphas)
