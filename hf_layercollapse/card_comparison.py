"""A comparison in a model card: a section of its own, and entries of the `model-index`. Both can be added to a card
that is there, whoever wrote it, and take the place of what was added before."""

import os
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from .comparison import Comparison
from .tables import markdown


# What stands between these belongs to the comparison.
BEGIN = "<!-- A comparison: another one takes the place of all down to the next comment. -->"
END = "<!-- End of the comparison. -->"

METRIC_NAMES = {"accuracy": "Accuracy", "perplexity": "Perplexity", "divergence": "Divergence"}


def section_of(comparison: Comparison | None) -> str:
    """The section of a card; without a comparison the place where one will stand, which a reader does not see."""
    if comparison is None:
        return f"{BEGIN}\n{END}"
    return f"{BEGIN}\n\n## Compared\n\n{markdown(comparison.rows())}\n\n{_measured(comparison)}\n\n{END}"


def _measured(comparison: Comparison) -> str:
    where = _where(comparison)
    sentences = [
        f"{comparison.metric.capitalize()} was measured on {comparison.examples:,} examples"
        f"{f' of {where}' if where else ''}, the same for every model; intervals are over examples."
    ]
    if comparison.metric == "divergence":
        sentences.append(f"It is how far predictions are from those of {comparison.models[0].name}.")
    sentences.append(
        f"Latency is the median of {comparison.rounds} calls with {comparison.call}, in which the models took turns, "
        f"on {comparison.hardware} with torch {comparison.versions['torch']}; MACs are those of linear and "
        "convolution layers."
    )
    return " ".join(sentences)


def _where(comparison: Comparison) -> str:
    parts = [_data_name(comparison.data)] if comparison.data is not None else []
    parts += [part for part in (comparison.data_config, comparison.split) if part is not None]
    return " ".join(parts)


def _data_name(data: Any) -> Any:
    """A name on the Hub as it is, of a local file its name alone."""
    return os.path.basename(os.path.normpath(data)) if os.path.exists(data) else data


def results_of(comparison: Comparison, compared_as: str, task: str | None) -> list[EvalResult]:
    """Entries of the `model-index`: only what names its data set and task."""
    if comparison.data is None or task is None:
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=_data_name(comparison.data),
            dataset_name=_data_name(comparison.data),
            dataset_config=comparison.data_config,
            dataset_split=comparison.split,
            metric_type=comparison.metric,
            metric_name=METRIC_NAMES[comparison.metric],
            metric_value=round(comparison[compared_as].quality, 6),
        )
    ]


def put_comparison(card: ModelCard, comparison: Comparison, compared_as: str, name: str, task: str | None) -> None:
    """Puts a comparison into a card, in the place of one that was put there before, else at its end. All else that the
    card says stays: of the `model-index` only the same measurement is replaced.

    Args:
        card (`ModelCard`): Is changed.
        compared_as (`str`): What the comparison calls the card's model.
        name (`str`): Of the model, for a card that does not say one.
        task (`str`, *optional*): What the Hub calls that which the model does; without it there are no entries of the
            `model-index`.
    """
    card.text = _with_section(card.text, section_of(comparison))
    data: Any = card.data
    listed = [data.metrics] if isinstance(data.metrics, str) else data.metrics or []
    data.metrics = list(dict.fromkeys([*listed, comparison.metric]))
    for result in results_of(comparison, compared_as, task):
        kept = [entry for entry in data.eval_results or [] if not entry.is_equal_except_value(result)]
        data.eval_results, data.model_name = [*kept, result], data.model_name or name


def _with_section(text: str, section: str) -> str:
    line_break = "\r\n" if "\r\n" in text else "\n"
    section = section.replace("\n", line_break)
    start = text.rfind(BEGIN)
    end = text.find(END, start)
    if start < 0 or end < 0:
        return f"{text.rstrip()}{line_break}{line_break}{section}{line_break}"
    return text[:start] + section + text[end + len(END) :]
