"""LayerCollapse for Hugging Face transformers: make models smaller by turning feed-forward blocks into linear maps.

Importing this package lets `AutoConfig` and every `AutoModelFor….from_pretrained` read patched and collapsed models.
"""

import importlib

from . import modeling_layercollapse  # noqa: F401  (registers the model type)
from ._version import __version__ as __version__


# name -> module; loaded on first use, so that importing the package costs little.
_EXPORTS = {
    "CalibrationData": "calibration_data",
    "CollapsePlan": "plans",
    "CollapseReport": "reports",
    "CollapsibleActivation": "modeling_layercollapse",
    "FeedForwardBlock": "families",
    "FeedForwardLayout": "families",
    "LayerCollapseCallback": "callbacks",
    "LayerCollapseConfig": "config",
    "LayerCollapseTrainer": "trainer",
    "LayerCollapseTrainerMixin": "trainer",
    "apply_layer_collapse": "patching",
    "collapse_model": "collapsing",
    "compare_models": "comparison",
    "create_model_card": "model_card",
    "exchange_parameters": "optimization",
    "export_model": "exporting",
    "export_stock": "stock",
    "find_feed_forward_blocks": "families",
    "linearity_map": "planning",
    "plan_collapse": "planning",
    "recover_model": "recovery",
    "register_feed_forward_layout": "families",
    "remove_layer_collapse": "patching",
}

__all__ = sorted(_EXPORTS)


def register():
    """Called by vLLM in each of its processes, as a plugin; importing this package has registered the model type."""


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__():
    return [*globals(), *__all__]
