"""Whether a model's own loss can be added up over accumulated batches and processes."""

import ast
import inspect
from typing import Any

from torch import nn


def counts_items(model: nn.Module) -> bool:
    """Whether the loss that a model computes is a sum divided by `num_items_in_batch`.

    It is if `forward` hands its keyword arguments on to `self.loss_function(...)` and that function has a parameter of
    this name, as `ForCausalLMLoss` and `ForMaskedLMLoss` have. `ForSequenceClassificationLoss` uses it for one of its
    three kinds of labels only, and heads that make a `CrossEntropyLoss()` in `forward` never do. Where this says False
    of a loss that does count, the Trainer averages over batches instead of over items.
    """
    forward = type(model).forward
    if not inspect.isfunction(forward):
        return False
    try:
        source = inspect.getsource(forward)
        # Indented as it is: what a docstring holds may stand further left than the code around it.
        tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    except (OSError, SyntaxError):  # typed in, or a lambda among other code
        return False
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "loss_function"
    ]
    passed_on = all(any(keyword.arg in (None, "num_items_in_batch") for keyword in call.keywords) for call in calls)
    loss_function: Any = model.loss_function if calls else None
    return bool(calls) and passed_on and "num_items_in_batch" in inspect.signature(loss_function).parameters
