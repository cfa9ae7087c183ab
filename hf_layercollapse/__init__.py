"""LayerCollapse for Hugging Face transformers: make models smaller by turning feed-forward blocks into linear maps.

Importing this package lets `AutoConfig` and every `AutoModelFor….from_pretrained` read patched and collapsed models.
"""

import importlib
from typing import TYPE_CHECKING

from . import modeling_layercollapse  # noqa: F401  (registers the model type)
from ._version import __version__ as __version__


if TYPE_CHECKING:  # what a name is, for readers that run nothing
    from .calibration_data import CalibrationData as CalibrationData
    from .callbacks import LayerCollapseCallback as LayerCollapseCallback
    from .collapsing import collapse_model as collapse_model
    from .comparison import compare_models as compare_models
    from .comparison import prediction_divergence as prediction_divergence
    from .config import LayerCollapseConfig as LayerCollapseConfig
    from .exporting import export_model as export_model
    from .families import FeedForwardBlock as FeedForwardBlock
    from .families import FeedForwardLayout as FeedForwardLayout
    from .families import find_feed_forward_blocks as find_feed_forward_blocks
    from .families import register_feed_forward_layout as register_feed_forward_layout
    from .model_card import create_model_card as create_model_card
    from .modeling_layercollapse import CollapsibleActivation as CollapsibleActivation
    from .optimization import exchange_parameters as exchange_parameters
    from .patching import apply_layer_collapse as apply_layer_collapse
    from .patching import remove_layer_collapse as remove_layer_collapse
    from .planning import linearity_map as linearity_map
    from .planning import plan_collapse as plan_collapse
    from .plans import CollapsePlan as CollapsePlan
    from .recovery import recover_model as recover_model
    from .reports import CollapseReport as CollapseReport
    from .stock import export_stock as export_stock
    from .trainer import LayerCollapseTrainer as LayerCollapseTrainer
    from .trainer import LayerCollapseTrainerMixin as LayerCollapseTrainerMixin

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
    "prediction_divergence": "comparison",
    "recover_model": "recovery",
    "register_feed_forward_layout": "families",
    "remove_layer_collapse": "patching",
}

__all__ = sorted(_EXPORTS)


def register() -> None:
    """Called by vLLM in each of its processes, as a plugin; importing this package has registered the model type."""


if not TYPE_CHECKING:  # to a type checker any name would be one

    def __getattr__(name):
        if name not in _EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
