"""A model card made from what was measured; what was not is left out."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from . import modeling_layercollapse
from .auto_classes import auto_class_of
from .blocks import BoundBlock, bind_blocks
from .card_comparison import put_comparison, results_of, section_of
from .card_sentences import Making, how, largest_difference, method, summary
from .comparison import Comparison
from .modeling_layercollapse import FORMAT_VERSION, LayerCollapseModelMixin
from .models import is_fully_sharded, unwrap, whole_class_of
from .patching import collapsible_activations, layer_collapse_config_of, refuse_sharded, writes_code
from .plans import CollapsePlan
from .recovery import RecoveryReport
from .reports import CollapseReport
from .sentence_models import sentence_model
from .tables import markdown


TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ("layercollapse", "model-compression")
# Class of sentence-transformers -> what the Hub calls its task.
SENTENCE_TASKS = {
    "SentenceTransformer": "sentence-similarity",
    "CrossEncoder": "text-ranking",
    "SparseEncoder": "feature-extraction",
}


def create_model_card(
    model: nn.Module,
    report: CollapseReport | None = None,
    comparison: Comparison | None = None,
    *,
    plan: CollapsePlan | None = None,
    recovery: RecoveryReport | None = None,
    trained_since: bool = False,
    name: str | None = None,
    compared_as: str = "collapsed",
    base_model: str | None = None,
    repo_id: str | None = None,
    datasets: str | list[str] | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    training: dict[str, object] | None = None,
    evaluation: dict[str, float] | None = None,
) -> ModelCard:
    """The card of a patched or collapsed model. It holds what it is given and what the model itself shows.

    Write it beside the weights with `card.save(f"{folder}/README.md")`, push it with them by
    `model.push_to_hub(repo_id, model_card=card)`, or alone by `card.push_to_hub(repo_id)`.

    Args:
        model (`nn.Module`): A patched or collapsed model, or an object of sentence-transformers with one inside. Of a
            transformers model that `fully_shard` has sharded no weight is read, so that one process can write a card.
        report ([`CollapseReport`], *optional*): From [`collapse_model`], for how each block became what it is, and how
            far off that is.
        comparison ([`Comparison`], *optional*): From [`compare_models`] or `layercollapse compare --json-file`, for
            quality, size and latency beside the dense model and controls, and the `model-index`.
        plan ([`CollapsePlan`], *optional*): By which it collapsed, from [`plan_collapse`].
        recovery ([`RecoveryReport`], *optional*): From [`recover_model`], if that came after the collapse.
        trained_since (`bool`): Whether weights were trained in another way since `report` was made: its errors are
            then of the model before that. A Trainer of this package says so by itself in its card, and a model
            that it collapsed to a budget knows it.
        name (`str`, *optional*): Of the model. Default: that of `repo_id`, or of its class.
        compared_as (`str`): What the comparison calls this model.
        base_model (`str`, *optional*): Name on the Hub of the model that this one was made from.
        repo_id (`str`, *optional*): Where it is going to be, for the code that loads it.
        datasets, language, license, tags: Metadata, as the Hub has them.
        training (`dict`, *optional*): Hyper-parameters to list.
        evaluation (`dict`, *optional*): Further measurements of this model to list, by name.

    Raises:
        TypeError: `report`, `comparison`, `plan` or `recovery` is of a wrong type, or the model is wrapped for
            distributed training, or an alpha is sharded.
        ValueError: The model is neither patched nor collapsed, or the comparison has no model called `compared_as`.
    """
    kinds = {"report": CollapseReport, "comparison": Comparison, "plan": CollapsePlan, "recovery": RecoveryReport}
    for (what, kind), value in zip(kinds.items(), (report, comparison, plan, recovery), strict=True):
        if value is not None:
            _check_type(what, value, kind)
    if comparison is not None:
        _check_name(comparison, compared_as)
    inner, _ = unwrap(model, sharded=True)
    blocks = _blocks_of(inner)
    if all(block.state == "dense" for block in blocks):
        raise ValueError("The model is dense: a card says which blocks are patched or collapsed.")
    making = Making(
        [_form(block) for block in blocks if block.state == "collapsed"],
        sum(block.state == "patched" for block in blocks),
        report,
        layer_collapse_config_of(inner),
        plan,
        recovery,
        trained_since,
    )
    name = name or (repo_id.split("/")[-1] if repo_id else whole_class_of(inner).__name__)
    metadata = {"language": language, "license": license, "base_model": base_model, "model_name": name}
    return ModelCard.from_template(
        _metadata(model, comparison, compared_as, datasets=datasets, tags=tags, **metadata),
        template_path=str(TEMPLATE),
        name=name,
        base_model=base_model,
        repo_id=repo_id or "path/or/name-of-this-model",
        training=training,
        evaluation=evaluation,
        **_of_model(model, blocks, making),
        compared=section_of(comparison),
    )


def add_comparison(
    card: ModelCard,
    model: nn.Module,
    comparison: Comparison,
    *,
    compared_as: str = "collapsed",
    name: str | None = None,
) -> None:
    """Adds a comparison to a card that is there, in place: a section between comments, the metric, and an entry of the
    `model-index`. The section of a comparison before this is replaced, and in the `model-index` the same measurement;
    all else stays as it is.

    Args:
        card (`ModelCard`): From `ModelCard.load(f"{folder}/README.md")`, say.
        model (`nn.Module`): What it is the card of.
        comparison ([`Comparison`]): From [`compare_models`].
        compared_as (`str`): What the comparison calls this model.
        name (`str`, *optional*): Of the model, where the card says none. Default: that of its class.

    Raises:
        TypeError: `card` or `comparison` is of a wrong type.
        ValueError: The comparison has no model called `compared_as`.
    """
    _check_type("card", card, ModelCard)
    _check_type("comparison", comparison, Comparison)
    _check_name(comparison, compared_as)
    put_comparison(
        card, comparison, compared_as, name or whole_class_of(unwrap(model, sharded=True)[0]).__name__, _task_of(model)
    )


def _blocks_of(inner: Any) -> list[BoundBlock]:
    """The blocks of a model; of one that is sharded over processes, as its config describes them: their weights are
    whole on no process, and to look at them would wait for all. Alphas are not sharded."""
    if not is_fully_sharded(inner):
        return bind_blocks(inner)
    with torch.device("meta"):
        described = whole_class_of(inner)(copy.deepcopy(inner.config))
    alphas = collapsible_activations(inner)
    return [
        replace(block, alpha=_mean(alphas[block.path(block.layout.activation_path)].alpha))
        if block.state == "patched"
        else block
        for block in bind_blocks(described)
    ]


def _mean(alpha: torch.Tensor) -> float:
    refuse_sharded(alpha)
    return float(alpha.detach().mean())


def _check_type(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be a {kind.__name__}, got {type(value).__name__}.")


def _check_name(comparison: Comparison, compared_as: str) -> None:
    names = [measured.name for measured in comparison.models]
    if compared_as not in names:
        raise ValueError(f"The comparison has no model called {compared_as!r}, it has {names}: say `compared_as`.")


def _metadata(
    model: nn.Module,
    comparison: Comparison | None,
    compared_as: str,
    *,
    datasets: Any,
    tags: Any,
    **known: Any,
) -> Any:
    """The head of the card, which the Hub reads."""
    task = _task_of(model)
    return ModelCardData(
        library_name=loader_of(model).library.replace("_", "-"),
        tags=list(dict.fromkeys([*TAGS, *_listed(tags)])),
        datasets=_listed(datasets) or None,
        metrics=[comparison.metric] if comparison is not None else None,
        pipeline_tag=task,
        eval_results=(results_of(comparison, compared_as, task) or None) if comparison is not None else None,
        ignore_metadata_errors=False,
        **known,
    )


def _task_of(model: nn.Module) -> str | None:
    """What the Hub calls that which a model does."""
    sentences = sentence_model(model)
    if sentences is not None:
        return SENTENCE_TASKS.get(type(sentences).__name__)
    from transformers.modelcard import TASK_MAPPING  # with the Trainer's arguments, and peft, behind it

    tasks: Mapping[str, Any] = TASK_MAPPING
    name = whole_class_of(unwrap(model, sharded=True)[0]).__name__
    return next((task for task, names in tasks.items() if name in names.values()), None)


class Loader(NamedTuple):
    """How a saved model is loaded.

    Args:
        library (`str`): What the model is of.
        module (`str`): What the class is imported from.
        name (`str`): Of the class.
        call (`str`): What is called with the folder's name.
    """

    library: str
    module: str
    name: str
    call: str

    @property
    def is_known(self) -> bool:
        """Whether the library itself has what loads the model: it has not where no Auto class knows the model's class,
        whose native form refuses the folder."""
        return self.module == self.library


def loader_of(model: nn.Module) -> Loader:
    """How a model is loaded from the folder that it saves."""
    sentences = sentence_model(model)
    if sentences is not None:
        name = type(sentences).__name__
        return Loader("sentence_transformers", "sentence_transformers", name, name)
    inner: Any = unwrap(model, sharded=True)[0]
    name, module = whole_class_of(inner).__name__, "transformers"
    auto_class = auto_class_of(inner.config, name)
    if auto_class is not None:
        name = auto_class
    elif name not in dir(transformers):
        name = "AutoModel"  # a part that is saved by itself
    elif isinstance(inner, LayerCollapseModelMixin):
        module = modeling_layercollapse.__name__
    return Loader("transformers", module, name, f"{name}.from_pretrained")


def _of_model(model: nn.Module, blocks: Sequence[BoundBlock], making: Making) -> dict[str, Any]:
    """What the template says of the model and its blocks."""
    return {
        "block_count": len(blocks),
        "collapsed_count": len(making.forms),
        "patched_count": making.patched,
        "summary": summary(making),
        "method": method(making),
        "by_penalty": making.by_penalty,
        "how": how(making),
        "block_table": markdown(_block_rows(blocks, making)),
        "report": making.report,
        "largest_difference": largest_difference(making),
        "loader": loader_of(model),
        "writes_code": writes_code(unwrap(model, sharded=True)[0]),
        "format_version": FORMAT_VERSION,
    }


def _listed(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _block_rows(blocks: Sequence[BoundBlock], making: Making) -> list[Any]:
    reported = {block.name: block for block in making.reported}
    columns = ["block", "kind", "now", "parameters"]
    then = f" {making.moment}" if making.moment else ""
    measured = {
        "method": lambda block: block.method,
        "alpha before": lambda block: None if block.alpha is None else f"{block.alpha:.4f}",
        f"R^2{then}": lambda block: None if block.r2 is None else f"{block.r2:.4f}",
        f"relative error{then}": lambda block: _scientific(block.measured_error),
    }
    measured = {
        column: value for column, value in measured.items() if any(value(block) for block in reported.values())
    }
    alphas = any(block.alpha is not None for block in blocks)
    rows = [[*columns, *(["alpha"] if alphas else []), *measured]]
    for block in blocks:
        entry = reported.get(block.name)
        parameters = f"{block.parameters:,}"
        if entry is not None and entry.parameters_before != block.parameters:
            parameters = f"{entry.parameters_before:,} -> {parameters}"
        row = [f"`{block.name}`", block.kind, _form_in_words(block), parameters]
        row += ["" if block.alpha is None else f"{block.alpha:.4f}"] if alphas else []
        rows.append(row + ["" if entry is None else value(entry) or "" for value in measured.values()])
    return rows


def _scientific(value: float | None) -> str | None:
    return None if value is None else f"{value:.1e}"


def _form(block: BoundBlock) -> str:
    """What a collapsed block is, one of [`card_sentences.FORMS`]."""
    if block.rank:
        return "linear and neurons" if block.hidden_features else "linear"
    return "dropped" if _gives_nothing(block) else "neurons"


def _gives_nothing(block: BoundBlock) -> bool:
    if block.hidden_features > 1:
        return False
    with block.weights_present():
        return not block.down.weight.is_meta and not block.down.weight.any()


def _form_in_words(block: BoundBlock) -> str:
    """With its sizes, of a block in whatever state."""
    if block.state != "collapsed" or _form(block) == "dropped":
        return block.state if block.state != "collapsed" else "dropped"
    neurons = f"{block.hidden_features} neuron{'' if block.hidden_features == 1 else 's'}"
    if not block.rank:
        return neurons
    linear = "linear" if block.rank == block.in_features else f"rank {block.rank}"
    return f"{linear} + {neurons}" if block.hidden_features else linear
