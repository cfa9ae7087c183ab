"""The one configuration object: what to patch, how alpha is driven, what happens at the collapse."""

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from .budgets import parse_budget


logger = logging.get_logger(__name__)

_CHOICES = {
    "linear_target": ("identity", "affine", "constant"),
    "granularity": ("block", "neuron"),
    "activation": ("native", "relu"),
    "penalty_schedule": ("constant", "linear", "cosine"),
    "alpha_lr_schedule": ("constant", "same"),
    "not_ready": ("keep", "restore"),
    "neuron_choice": ("greedy", "variance"),
    "constant_term": ("native", "always"),
    "adapters": ("merge", "refuse"),
    "budget_method": ("plan", "penalty"),
}

# What reads options -> those that it reads. Where some of these readers are missing, an option that none of the others
# reads is refused (`refuse_unread`), rather than do nothing.
READERS: dict[str, tuple[str, ...]] = {
    "patching": ("blocks", "linear_target", "granularity", "activation", "initial_alpha"),
    "alphas": (
        *("penalty_strength", "penalty_schedule", "penalty_warmup_ratio", "alpha_learning_rate", "alpha_lr_schedule"),
        *("collapse_threshold", "budget", "budget_method", "budget_ratio"),
    ),
    "teacher": ("distillation_weight", "hidden_state_weight", "task_loss_weight", "temperature"),
    # Those of a Trainer while it trains.
    "evaluations": ("progressive", "progressive_order"),
    # Its collapse has a method of its own.
    "plan": ("budget", "budget_method", "budget_samples", "blocks", "constant_term", "adapters"),
    "collapse": (
        *("blocks", "collapse_threshold", "not_ready", "adapters", "rank", "keep_neurons", "neuron_choice"),
        *("constant_term", "sequential"),
    ),
}

# Default of `distillation_weight`, which depends on `budget`: a number once the config is made, hence its type there.
_BY_BUDGET: Any = None


class _ByBudget(float):
    """A `distillation_weight` that nobody gave: a config that is made from this one chooses its own."""


# Name -> the interval that it is in, in words, and what tells.
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "initial_alpha": ("[0, 1]", lambda value: 0 <= value <= 1),
    "penalty_strength": ("[0, inf)", lambda value: 0 <= value < float("inf")),
    "penalty_warmup_ratio": ("(0, 1]", lambda value: 0 < value <= 1),
    "budget_ratio": ("(0, 1]", lambda value: 0 < value <= 1),
    "collapse_threshold": ("[0, 1)", lambda value: 0 <= value < 1),
    "alpha_learning_rate": ("(0, inf)", lambda value: 0 < value < float("inf")),
    "distillation_weight": ("[0, inf)", lambda value: 0 <= value < float("inf")),
    "hidden_state_weight": ("[0, inf)", lambda value: 0 <= value < float("inf")),
    "task_loss_weight": ("[0, inf)", lambda value: 0 <= value < float("inf")),
    "temperature": ("(0, inf)", lambda value: 0 < value < float("inf")),
}


@dataclass
class LayerCollapseConfig:
    """What to patch and collapse, and how training drives it there.

    LayerCollapse is arXiv 2311.17943; [`LayerCollapseConfig.paper`] gives the setting of its authors' code.

    Raises:
        ValueError, TypeError: From the constructor, when a value is not one of those described.
    """

    # In this order, and with a factory, HfArgumentParser makes it an option that takes words.
    blocks: str | list[str] | list[int] = field(
        default_factory=lambda: "all",
        metadata={
            "help": "Which feed-forward blocks: 'all', 'last:4', 'first:4', a part of the model ('decoder'), "
            "'encoder.last:2' for some of a part, a list of indices, a list of exact names, or one regular expression "
            "that block names must match in full. What matches nothing is an error."
        },
    )
    linear_target: str = field(
        default="identity",
        metadata={
            "help": "The line that alpha leads to: 'identity' (the paper's), or 'affine', per neuron and fitted to "
            "calibration data. On SST-2 (MiniLM, three seeds, recipes/results/equal_steps.md) affine is better by 1.2 "
            "points with three of six blocks, identity by 1.5 with all six. With "
            "granularity='neuron' also 'constant': a neuron goes to its mean over calibration data, one of a gated "
            "block to 0 with its gate, and leaves the block, of which nothing linear stays."
        },
    )
    granularity: str = field(
        default="block",
        metadata={
            "help": "One alpha per 'block' (the paper's), or per 'neuron'. A block's penalty is the mean over its "
            "neurons, and an alpha of a neuron takes as many times the step, so that both are as fast."
        },
    )
    activation: str = field(
        default="native",
        metadata={
            "help": "'native' keeps the pretrained activation, so that patching changes nothing; 'relu' is the "
            "paper's patch: the activation becomes PReLU(alpha), which changes every model not trained with ReLU."
        },
    )
    initial_alpha: float = field(
        default=0.0, metadata={"help": "Alpha after patching, in [0, 1]. 0: the model as it was. The paper: 0.01."}
    )
    penalty_strength: float = field(
        default=1.0,
        metadata={
            "help": "Factor of the penalty sum_b (1 - alpha_b)^2, >= 0. Twice as large takes half the steps, and "
            "withstands twice the task gradient. With all six blocks of MiniLM in 300 steps, 3 lost the task for good "
            "where 1 did not (recipes/results/equal_steps.md); a 'linear' schedule or a teacher prevents that."
        },
    )
    penalty_schedule: str = field(
        default="constant",
        metadata={
            "help": "How the strength comes to its full value: 'constant', from the first step; 'linear' or 'cosine', "
            "rising from 0 over the first `penalty_warmup_ratio` of training and then held."
        },
    )
    penalty_warmup_ratio: float = field(
        default=1.0,
        metadata={"help": "Share of all steps over which a 'linear' or 'cosine' schedule rises, in (0, 1]."},
    )
    alpha_learning_rate: float = field(
        default=1e-2,
        metadata={
            "help": "Learning rate of alpha, > 0. Alpha takes plain gradient steps, so that with no task gradient "
            "1 - alpha shrinks by the factor 1 - 2 * alpha_learning_rate * penalty_strength a step: a block is ready "
            "after 149 steps at the defaults."
        },
    )
    alpha_lr_schedule: str = field(
        default="constant",
        metadata={"help": "'constant', or 'same': scaled like the model's learning rate."},
    )
    collapse_threshold: float = field(
        default=0.05,
        metadata={
            "help": "A block is ready once 1 - alpha <= this, in [0, 1). 0.05 is the value in the paper's code."
        },
    )
    not_ready: str = field(
        default="keep",
        metadata={
            "help": "What a collapse does with patched blocks that are not ready: 'keep' or 'restore' to dense."
        },
    )
    progressive: bool = field(
        default=False,
        metadata={
            "help": "Whether the Trainer collapses each block after the first evaluation that finds it ready, with "
            "all of its neurons, and trains on with what is left; it needs an `eval_strategy`. Otherwise blocks "
            "collapse when `collapse` is called. For LayerCollapseTrainer and its mixin only."
        },
    )
    progressive_order: list[str] | None = field(
        default=None,
        metadata={
            "help": "With `progressive`: names of blocks, in the order in which they may collapse, as "
            "`CollapsePlan.order` gives them. Each waits until those before it have collapsed, and blocks that are "
            "not named wait for all of these. None: each as soon as it is ready."
        },
    )
    distillation_weight: float = field(
        default=_BY_BUDGET,
        metadata={
            "help": "Weight, >= 0, of a loss that the Trainer adds: how far the head's predictions are from the "
            "teacher's; 0: none. None: 1 with a `budget`, else 0. KL divergence at `temperature` for classes and "
            "tokens (arXiv 1503.02531), squared error for regression and scores of pairs, for embeddings the cosine "
            "distance and the squared error relative to the teacher's length."
        },
    )
    hidden_state_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight, >= 0, of a loss that the Trainer adds: squared error of the output of each patched or "
            "collapsed block against the teacher's block of that name, in units of the variance of the teacher's, "
            "mean over blocks. It also pulls alphas back, against the penalty. 0: none."
        },
    )
    task_loss_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight, >= 0, of the Trainer's own loss beside the teacher's. 0: the teacher alone, and training "
            "needs inputs only; labels that are there all the same say which tokens count, and no more. Another value "
            "than 1 needs a teacher."
        },
    )
    temperature: float = field(
        default=2.0,
        metadata={"help": "Temperature of both softmaxes in the distillation loss, > 0. 2 is DistilBERT's."},
    )
    adapters: str = field(
        default="merge",
        metadata={
            "help": "What a collapse does if a peft adapter is on a block, or trains its alpha: 'merge' all adapters "
            "into the weights first, after which the model is no PeftModel any more, or 'refuse'."
        },
    )

    rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank of the linear map of a block that is fitted to calibration data, >= 0; None: full. 0 leaves "
            "the kept neurons only (width pruning)."
        },
    )
    keep_neurons: int = field(
        default=0,
        metadata={
            "help": "How many neurons of each such block stay nonlinear beside its linear map, >= 0. With "
            "granularity='neuron' a patched block keeps those that are not ready instead."
        },
    )
    neuron_choice: str = field(
        default="greedy",
        metadata={
            "help": "Which neurons are kept: 'greedy', one by one the one that explains most of what is left of the "
            "block's output, or 'variance', those with the most variance that a line does not explain."
        },
    )
    constant_term: str = field(
        default="native",
        metadata={
            "help": "Whether what is fitted to calibration data has a constant term: 'native', where the block's last "
            "linear has a bias, so that Llama's blocks stay without one; or 'always'. A gated block with a linear "
            "part (rank > 0 or None) has one in any case, as it cannot be a native module."
        },
    )
    sequential: bool = field(
        default=False,
        metadata={
            "help": "Fit the blocks one after the other, each to the inputs it gets once those before it have "
            "collapsed. One pass over the calibration data for each block."
        },
    )

    budget: str | None = field(
        default=None,
        metadata={
            "help": "How small the Trainer makes the model: 'macs=0.125', 'parameters=0.8', 'latency=0.7' or "
            "'max_drop=0.02', as in `plan_collapse`. When training begins, a plan is made from training inputs, "
            "without labels, its blocks collapse, and what they became is trained, with the dense model as teacher. "
            "Nothing is patched then, so that options of alphas are refused beside it. For LayerCollapseTrainer and "
            "its mixin only. None: blocks are patched. See `budget_method` for another way there."
        },
    )
    budget_samples: int = field(
        default=1024,
        metadata={
            "help": "With `budget`: rows of the training data, >= 8, that the plan is made from, a quarter of them to "
            "measure it on, and that blocks are fitted to; from all over data that have a length, else the first. "
            "They are held in memory. `calibration_data` of the Trainer takes their place. Plans were measured with "
            "5,500 on SST-2 and 2,000 on Fashion-MNIST (the sweep.yaml of both recipes)."
        },
    )
    budget_method: str = field(
        default="plan",
        metadata={
            "help": "How training comes to the `budget`: by a 'plan' when it begins, or by the 'penalty', with "
            "granularity='neuron' and a budget of macs or parameters. Then blocks are patched, alphas are told which "
            "neurons are to go, those whose squared gradients say that they matter least, and how many, on a schedule "
            "that ends at the budget; the penalty is (goal - alpha)^2, with goal 1 for these and 0 for the others. "
            "Blocks collapse when `collapse` is called, to that size."
        },
    )
    budget_ratio: float = field(
        default=0.7,
        metadata={
            "help": "With budget_method='penalty': share of all steps, in (0, 1], after which every alpha is 0 or 1. "
            "In its first tenth gradients are looked at only; up to its half more and more neurons are told to go; in "
            "its second half alphas are held between a bound that rises to their goal and that goal."
        },
    )

    def __post_init__(self) -> None:
        self.blocks = _checked_blocks(self.blocks)
        by_budget = self.distillation_weight is None or isinstance(self.distillation_weight, _ByBudget)
        if by_budget:
            self.distillation_weight = 0.0 if self.budget is None else 1.0
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        for name in ("progressive", "sequential"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if self.progressive_order is not None:
            self.progressive_order = _checked_order(self.progressive_order, self.progressive)
        for name, allowed in _NUMBERS.items():
            setattr(self, name, _checked_number(name, getattr(self, name), *allowed))
        if by_budget:
            self.distillation_weight = _ByBudget(self.distillation_weight)
        if self.rank is not None:
            _check_count("rank", self.rank, "an integer >= 0 or None")
        _check_count("keep_neurons", self.keep_neurons, "an integer >= 0")
        _check_count("budget_samples", self.budget_samples, "an integer >= 8", least=8)
        if self.linear_target == "constant" and self.granularity != "neuron":
            raise ValueError(
                'linear_target="constant" is for single neurons, as a whole block would give nothing but a constant: '
                "set granularity=\"neuron\", or take 'affine' or 'identity'."
            )
        if self.rank == 0 and not self.keep_neurons:
            raise ValueError("rank=0 leaves the kept neurons only, so it needs `keep_neurons` > 0.")
        _refuse_weight_without_teacher(self)
        _check_budget(self)

    @classmethod
    def paper(cls, blocks: str | list[str] | list[int] = "all", **kwargs: Any) -> "LayerCollapseConfig":
        """The patch of the paper's authors: the activation becomes PReLU with slope 0.01, whatever it was before.

        For models that were trained with GELU or SiLU this changes the outputs at once (GPT-2's perplexity on
        WikiText-2 goes from 19 to 303); it is here to be compared with.
        """
        return cls(blocks=blocks, **{"activation": "relu", "initial_alpha": 0.01, **kwargs})

    @property
    def distils(self) -> bool:
        """Whether training has a teacher."""
        return self.distillation_weight > 0 or self.hidden_state_weight > 0

    @property
    def plans(self) -> bool:
        """Whether training begins with a plan, and no alpha is trained."""
        return self.budget is not None and self.budget_method == "plan"

    def to_dict(self) -> dict[str, Any]:
        # A plain number, for whatever writes it.
        return {**dataclasses.asdict(self), "distillation_weight": float(self.distillation_weight)}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LayerCollapseConfig":
        """The inverse of `to_dict`. Options this version does not know are dropped with a warning."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            logger.warning(f"Options that this version of hf_layercollapse does not know are ignored: {unknown}.")
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def from_json_string(cls, text: str) -> "LayerCollapseConfig":
        return cls.from_dict(json.loads(text))


def _refuse_weight_without_teacher(config: LayerCollapseConfig) -> None:
    if config.task_loss_weight != 1 and not config.distils:
        raise ValueError(
            f"`task_loss_weight` is {config.task_loss_weight:g}, and there is no teacher beside whose loss it would "
            "weigh: set `distillation_weight` or `hidden_state_weight`, or leave it at 1."
        )


def _check_budget(config: LayerCollapseConfig) -> None:
    """Raises if the budget is none, or another option contradicts it."""
    if config.budget is None:
        if config.budget_method != "plan":
            raise ValueError("`budget_method` says how training comes to a `budget`, and there is none: set both.")
        _refuse_changed(config, ("budget_samples", "budget_ratio"), "There is no `budget`, of which they say more")
        return
    if not isinstance(config.budget, str):
        raise TypeError(f"`budget` must be words such as 'macs=0.125' or None, got {config.budget!r}.")
    budget = parse_budget(config.budget)
    if config.budget_method == "penalty":
        _check_penalty_budget(config, budget)
        return
    beside = {*READERS["plan"], *READERS["teacher"]}
    others = [option.name for option in dataclasses.fields(config) if option.name not in beside]
    _refuse_changed(
        config,
        others,
        "A `budget` collapses blocks before they are trained, as a plan says, and no alpha leads there",
        ", or the `budget`",
    )


def refuse_unread(config: LayerCollapseConfig, missing: Iterable[str], reason: str, instead: str) -> None:
    """Raises if an option is set that no reader is there for.

    Args:
        missing (`Iterable[str]`): Names in [`READERS`] of those that are not.
        reason (`str`): Why they are not; the beginning of a sentence.
        instead (`str`): What else may be done than to leave such options out; the end of it.

    Raises:
        ValueError: As said.
    """
    missing = set(missing)
    read = {option for reader, options in READERS.items() if reader not in missing for option in options}
    unread = [option for reader in READERS if reader in missing for option in READERS[reader] if option not in read]
    _refuse_changed(config, unread, reason, instead)


def _refuse_changed(config: LayerCollapseConfig, names: Iterable[str], reason: str, instead: str = "") -> None:
    """Raises if one of these options is not as it is by default."""
    defaults = {option.name: option.default for option in dataclasses.fields(config)}
    defaults["distillation_weight"] = 0.0  # where no plan gives it another
    changed = [f"`{name}`" for name in names if getattr(config, name) != defaults[name]]
    if changed:
        raise ValueError(f"{reason}: leave {', '.join(changed)} out{instead}.")


def _check_penalty_budget(config: LayerCollapseConfig, budget: dict[str, float]) -> None:
    if not budget.keys() & {"macs", "parameters"}:
        raise ValueError(
            f"With budget_method='penalty' a `budget` counts weights, 'macs=...' or 'parameters=...', got "
            f"{config.budget!r}. For {' and '.join(budget)} take budget_method='plan'."
        )
    if config.granularity != "neuron" or config.progressive:
        raise ValueError(
            "budget_method='penalty' takes single neurons away, all by the end of `budget_ratio`: it needs "
            "granularity='neuron', and no `progressive`."
        )
    _refuse_changed(
        config,
        ("budget_samples", "rank", "keep_neurons"),
        "With budget_method='penalty' alphas say which neurons stay, beside a full linear map, or with "
        "linear_target='constant' alone",
    )


def _described(options: Iterable[dataclasses.Field[Any]]) -> str:
    """Options with their types, defaults and meanings, as a docstring has them."""
    lines = ["Args:"]
    for option in options:
        given = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
        kind = option.type if isinstance(option.type, str) else getattr(option.type, "__name__", str(option.type))
        lines.append(f"    {option.name} (`{kind}`, defaults to `{given!r}`):")
        lines += textwrap.wrap(option.metadata["help"], 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


# Said once, in the metadata, where a command line takes it from too.
LayerCollapseConfig.__doc__ = inspect.cleandoc(LayerCollapseConfig.__doc__ or "").replace(
    "Raises:", f"{_described(dataclasses.fields(LayerCollapseConfig))}\n\nRaises:"
)


def _checked_number(name: str, value: Any, allowed: str, holds: Callable[[float], bool]) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number in {allowed}, got {value!r}.")
    if not holds(value):
        raise ValueError(f"`{name}` must be in {allowed}, got {value}.")
    return float(value)


def _check_count(name: str, value: Any, allowed: str, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be {allowed}, got {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be {allowed}, got {value}.")


def _checked_order(order: Any, progressive: bool) -> list[str]:
    if not isinstance(order, (list, tuple)) or not all(isinstance(name, str) for name in order):
        raise TypeError(f"`progressive_order` must be a list of block names or None, got {order!r}.")
    if len(set(order)) != len(order):
        raise ValueError(f"`progressive_order` must name each block once, got {order!r}.")
    if not progressive:
        raise ValueError("`progressive_order` says when blocks collapse in training: set `progressive=True`.")
    return list(order)


def _checked_blocks(blocks: Any) -> str | list[str] | list[int]:
    what = (
        "`blocks` must be 'all', 'last:N', 'first:N', a part of the model, 'part.last:N', a list of indices, a list "
        "of names or a regular expression"
    )
    # How a command line gives one word. None of these can be the name of a module.
    if isinstance(blocks, list) and len(blocks) == 1 and isinstance(blocks[0], str):
        if blocks[0] == "all" or blocks[0].startswith(("last:", "first:")):
            blocks = blocks[0]
    if isinstance(blocks, str):
        if re.match(r"([\w.]+\.)?(last|first):", blocks) and not re.fullmatch(
            r"([\w.]+\.)?(last|first):[1-9]\d*", blocks
        ):
            raise ValueError(f"{what}; got {blocks!r}, where N is not a positive integer.")
        try:
            re.compile(blocks)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{what}; got {blocks!r}, which does not compile: {error}.") from error
        if not blocks:
            raise ValueError(f"{what}; got an empty string.")
        return blocks
    if not isinstance(blocks, (list, tuple)):
        raise TypeError(f"{what}; got {blocks!r}.")
    blocks = list(blocks)
    if not blocks:
        raise ValueError(f"{what}; got an empty list.")
    indices = all(isinstance(block, int) and not isinstance(block, bool) for block in blocks)
    if not indices and not all(isinstance(block, str) for block in blocks):
        raise TypeError(f"{what}; got a list of mixed or other types: {blocks!r}.")
    if len(set(blocks)) != len(blocks):
        raise ValueError(f"{what}; got duplicates in {blocks!r}.")
    return blocks
