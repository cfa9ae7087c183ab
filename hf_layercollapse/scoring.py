"""Labels that are to be scored on."""

from typing import Any

import torch
from transformers import PreTrainedModel

from .rows import IGNORED
from .upstream import is_classifier


# What to think of where labels are no classes.
SECRET = " In test splits whose labels are kept secret they are all -1: use another split."


def check_classes(model: PreTrainedModel, labels: Any) -> None:
    """Raises if labels of whole inputs are no classes of the model's head.

    Raises:
        ValueError: They are not.
    """
    if not is_classifier(model) or not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return
    classes: Any = model.config.num_labels
    if labels.dim() != 1 or classes < 2 or model.config.problem_type == "regression":
        return
    wrong = labels[((labels < 0) & (labels != IGNORED)) | (labels >= classes)]
    if len(wrong):
        raise ValueError(
            f"There are labels of {sorted(set(wrong.tolist()))[:5]}, and this {type(model).__name__} has the classes "
            f"0 to {classes - 1}." + SECRET
        )
