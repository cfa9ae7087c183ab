"""Which class a saved model is of, and which Auto class gives it."""

from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from .modeling_layercollapse import LayerCollapseConfigMixin, model_class_for, native_models_of


# Tried in this order, then the others as transformers lists them: some classes are known to several.
AUTO_CLASSES = (
    "AutoModelForSequenceClassification",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMultipleChoice",
    "AutoModelForImageTextToText",
    "AutoModelForAudioClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForCTC",
    "AutoModel",
)
# Has many classes that an Auto class of their task has too.
LAST = "AutoModelForPreTraining"
# Takes a folder for a name on the Hub.
NOT_OF_FOLDERS = "AutoBackbone"


def auto_class_of(config: PreTrainedConfig, architecture: str | None = None) -> str | None:
    """Name of the Auto class that loads a model with its head; `None` if none has its class.

    Args:
        config (`PreTrainedConfig`): Of the model, dense, patched or collapsed.
        architecture (`str`, *optional*): Name of its class. Default: what the config says.
    """
    wanted = architecture_of(config) if architecture is None else architecture
    found = [
        auto_class.__name__
        for auto_class, models, _ in native_models_of(type(config))
        if any(model.__name__ == wanted for model in models)
    ]
    found += [auto_class for auto_class, name in _classes_of_own(config).items() if name == wanted]
    usable = [name for name in found if name != NOT_OF_FOLDERS]
    return min(usable, key=_place, default=None)


def _place(auto_class: str) -> int:
    if auto_class in AUTO_CLASSES:
        return AUTO_CLASSES.index(auto_class)
    return len(AUTO_CLASSES) + (auto_class == LAST)


def _classes_of_own(config: PreTrainedConfig) -> dict[str, str]:
    """`{name of an Auto class: name of a model class}`, of code that comes with a model, or came with what it was."""
    auto_map = vars(config).get("auto_map") or {}
    named = {name: reference for name, reference in auto_map.items() if isinstance(reference, str)}
    own = {name: reference.rpartition(".")[2] for name, reference in named.items() if name.startswith("AutoModel")}
    return own | _stored(config).get("model_classes", {})


def _stored(config: PreTrainedConfig) -> dict[str, Any]:
    return config.layer_collapse if isinstance(config, LayerCollapseConfigMixin) else {}


def architecture_of(config: PreTrainedConfig) -> str:
    """Name of the class that a model was saved in.

    Raises:
        ValueError: The config does not say it.
    """
    stored = _stored(config)
    names = [*(config.architectures or ()), *filter(None, [stored.get("part")])]
    names += stored.get("model_classes", {}).values()
    if not names:
        raise ValueError(
            "its config.json names no class (`architectures`), so nothing says which head its weights are of. Load it "
            "in Python by the class that it was trained in, and save it again: `save_pretrained` writes the name."
        )
    return names[0]


def class_named(config: PreTrainedConfig, architecture: str) -> type[PreTrainedModel]:
    """transformers' class of this name, in the form that the config is of: dense, or patched and collapsed.

    Raises:
        ValueError: transformers has no such model class.
    """
    found = getattr(transformers, architecture) if architecture in dir(transformers) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"its config.json says that it is a {architecture}, which neither transformers {transformers.__version__} "
            "has nor an Auto class of code that comes with it."
        )
    return model_class_for(found, type(config)) if isinstance(config, LayerCollapseConfigMixin) else found
