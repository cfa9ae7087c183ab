"""How alphas are driven: the strength of the penalty over time, and steps that no optimizer rescales."""

import contextlib
import math

import torch
import torch.distributed as dist
from transformers.utils import logging

from .config import LayerCollapseConfig
from .patching import collapsible_activations, penalty, refuse_sharded
from .upstream import let_the_scaler_unscale


logger = logging.get_logger(__name__)


def penalty_strength_at(config: LayerCollapseConfig, step: int, max_steps: int) -> float:
    """The strength that is in force at a step, counted from 0; a function of nothing else, so it survives a resume."""
    warmup = config.penalty_warmup_ratio * max_steps
    if config.penalty_schedule == "constant" or step >= warmup:
        return config.penalty_strength
    progress = step / warmup
    if config.penalty_schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return config.penalty_strength * progress


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
        optimizer (`torch.optim.Optimizer`): Changed in place: hooks around its `step` hide the alphas' gradients.
        alphas (`list[nn.Parameter]`): Taken out of the optimizer's other groups.
        config ([`LayerCollapseConfig`]): `alpha_learning_rate` and `alpha_lr_schedule` are used.
        strength (`Callable[[], float]`): Gives the strength of the penalty in the step that is being taken.
        scheduled (`bool`): Whether a learning rate schedule is attached.
        apart (`bool`): Whether alphas are in none of the groups, and take their steps when `step` is called.

    Attributes:
        taken (`int`): How many steps there were.
    """

    def __init__(self, optimizer, alphas, config, strength, scheduled=False, apart=False):
        self.optimizer, self.alphas, self.config, self.apart = optimizer, alphas, config, apart
        self.strength, self.taken = strength, 0
        self._hidden = None  # while the optimizer steps: alphas and their gradients
        self._aside = False
        self._not_finite = None  # a flag on the device of an alpha
        self._warned = False

        ours = {id(alpha) for alpha in alphas}
        if scheduled and not apart:
            found = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            optimizer.param_groups[-1]["params"].extend(alpha for alpha in alphas if id(alpha) not in found)
        else:
            for group in optimizer.param_groups:
                group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in ours]
        # What `alpha_lr_schedule="same"` compares with; a schedule sets it too.
        optimizer.param_groups[0].setdefault("initial_lr", optimizer.param_groups[0]["lr"])
        self._values = [alpha.detach().clone() for alpha in alphas] if apart else None
        if apart:
            return
        if not scheduled:
            optimizer.add_param_group({"params": alphas, "lr": config.alpha_learning_rate, "weight_decay": 0.0})
        let_the_scaler_unscale(optimizer)
        optimizer.register_step_pre_hook(self._hide)
        optimizer.register_step_post_hook(self._show_and_step)

    def restore(self):
        """Gives alphas that are apart the values and the dtype that they had when this was made."""
        for alpha, value in zip(self.alphas, self._values, strict=True):
            alpha.data = value.to(alpha.device, copy=True)

    def follow(self, model, alone):
        """Drives those alphas too that have become trainable since.

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

    @contextlib.contextmanager
    def aside(self):
        """The optimizer without the alphas, which rest. torch's distributed state dicts want a state for each of its
        parameters, and these have none; to get the others' they take a step of no length.
        """
        self._aside = True
        ours = {id(alpha) for alpha in self.alphas}
        groups = self.optimizer.param_groups
        held = [[parameter for parameter in group["params"] if id(parameter) in ours] for group in groups]
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ours]
        empty = {i: group for i, group in enumerate(groups) if not group["params"]}
        groups[:] = [group for group in groups if group["params"]]
        try:
            yield
        finally:
            self._aside = False
            # Other dicts, if a state was loaded.
            groups = self.optimizer.param_groups
            for i, group in empty.items():
                groups.insert(i, group)
            for group, parameters in zip(groups, held, strict=True):
                group["params"].extend(parameters)

    @property
    def learning_rate(self) -> float:
        """In force now."""
        if self.config.alpha_lr_schedule == "constant":
            return self.config.alpha_learning_rate
        first = self.optimizer.param_groups[0]
        initial = float(first["initial_lr"])
        return self.config.alpha_learning_rate * (float(first["lr"]) / initial if initial else 0.0)

    def _hide(self, optimizer, args, kwargs):
        # Every optimizer passes over parameters without a gradient. The hooks run once more where a subclass's `step`
        # calls its parent's; by then nothing is left to hide.
        hidden = [(alpha, alpha.grad) for alpha in self.alphas if alpha.grad is not None]
        if hidden or self._hidden is None:
            self._hidden = hidden
        for alpha, _ in hidden:
            alpha.grad = None

    def _show_and_step(self, optimizer, args, kwargs):
        if self._hidden is None:
            return
        hidden, self._hidden = self._hidden, None
        for alpha, gradient in hidden:
            alpha.grad = gradient
        if not self._aside:
            self._step_all()

    def step(self):
        """One step of all alphas, which uses their gradients up. For alphas that are apart from the optimizer."""
        self._step_all()
        for alpha in self.alphas:
            alpha.grad = None

    def _step_all(self):
        driven = [alpha for alpha in self.alphas if alpha.requires_grad]
        if driven:
            with torch.enable_grad():
                gradients = torch.autograd.grad(self.strength() * penalty(driven), driven)
            for alpha, gradient in zip(driven, gradients, strict=True):
                self._step(alpha, gradient if alpha.grad is None else gradient + alpha.grad)
        self.taken += 1

    @torch.no_grad()
    def _step(self, alpha, gradient):
        finite = gradient.isfinite()
        stepped = (alpha - self.learning_rate * alpha.numel() * gradient).clamp(0, 1)
        alpha.copy_(torch.where(finite, stepped, alpha))
        found = ~finite.all()
        self._not_finite = found if self._not_finite is None else self._not_finite | found.to(self._not_finite.device)

    def warn_if_not_finite(self):
        """Once; waits for the device, so not at every step."""
        if not self._warned and self._not_finite is not None and bool(self._not_finite):
            self._warned = True
            logger.warning(
                "The gradient of an alpha was not finite; that alpha was left as it was. If the loss is NaN or "
                "infinite, lower the learning rate or check the data."
            )


def exchange_parameters(optimizer, before, after):
    """Makes an optimizer follow modules that were replaced: a parameter takes the place of the one that had its name.

    The state of all others is kept, and so are the groups, which a schedule counts; new parameters start without any.

    Args:
        optimizer (`torch.optim.Optimizer`): Changed in place.
        before, after (`dict[str, nn.Parameter]`): The model's parameters by name, in order.
    """
    old_order = {id(parameter): i for i, parameter in enumerate(before.values())}
    order = {id(parameter): i for i, parameter in enumerate(after.values())}
    successors = {id(before[name]): after[name] for name in before if name in after}
    # A bias where there was none goes where biases are.
    biases = {id(parameter) for name, parameter in after.items() if name.endswith(".bias")}
    added = [p for name, p in after.items() if name not in before]
    for group in optimizer.param_groups:
        positions = [old_order.get(id(parameter), -1) for parameter in group["params"]]
        kept = []
        for parameter in group["params"]:
            gone = id(parameter) in old_order and id(parameter) not in order
            successor = successors.get(id(parameter)) if gone else parameter
            if gone:
                optimizer.state.pop(parameter, None)
            if successor is not None:
                kept.append(successor)
        if any(id(parameter) in biases for parameter in kept):
            kept, added = kept + added, []
        # As a new optimizer would be given them, so that a checkpoint fits it.
        if positions == sorted(positions):
            kept.sort(key=lambda parameter: order.get(id(parameter), -1))
        group["params"] = kept
    if added:
        optimizer.param_groups[0]["params"].extend(added)


def replicate_alphas(alphas):
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


def _average_gradient(alpha):
    dist.all_reduce(alpha.grad)  # gloo knows no mean
    alpha.grad /= dist.get_world_size()


class TaskParameters:
    """Stands in for a model where nothing but `parameters()` is asked for: all but the alphas."""

    def __init__(self, model, alphas):
        self._model, self._alphas = model, {id(alpha) for alpha in alphas}

    def parameters(self):
        return (parameter for parameter in self._model.parameters() if id(parameter) not in self._alphas)
