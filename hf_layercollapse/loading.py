"""What the commands of `layercollapse` load: models in the class that they were saved in, and their processors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import AutoConfig, ProcessorMixin
from transformers.utils import FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, has_file, logging

from .auto_classes import architecture_of, auto_class_of, class_named
from .data_files import is_path
from .models import shorten
from .sentence_models import KIND_FILES, load_sentence_model, saved_kind, sentence_model


logger = logging.get_logger(__name__)

# What a model is loaded for: "list" takes it as it comes, "measure" refuses weights that the checkpoint did not give,
# "save" also tells of those that the class has no place for.
Purpose = Literal["list", "measure", "save"]
Found = TypeVar("Found")

# Weights that are read in training alone, which many checkpoints lack: what SpecAugment masks with.
_TRAINING_ONLY = ("masked_spec_embed",)


def load_model(name: str, trust_remote_code: bool = False, purpose: Purpose = "measure") -> Any:
    """What a folder or a Hub name holds: an object of sentence-transformers, or a transformers model.

    Raises:
        ValueError: There is no such folder and no such name, or it holds no model that can be read whole.
    """
    folder = _folder_of(name)
    if folder is None:
        kind = saved_kind(Path(_on_hub(name, lambda: snapshot_download(name, allow_patterns=list(KIND_FILES)))))
    else:
        kind = saved_kind(folder)
    if kind is None:
        return load_transformers_model(name, trust_remote_code, purpose)
    try:
        return load_sentence_model(name if folder is None else str(folder), kind, trust_remote_code)
    except SafetensorError as error:
        raise ValueError(f"The weights of {name} are damaged: {error}") from error


def _folder_of(name: str) -> Path | None:
    """The folder of a model; `None` if it is a name on the Hub.

    Raises:
        ValueError: There is no such folder, or it holds an adapter.
    """
    folder = Path(name).expanduser()
    if not is_path(name) and not folder.exists():
        return None
    if not folder.is_dir():
        raise ValueError(f"{name}: there is no such folder.")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{name} holds an adapter, not a model: merge it (`merge_and_unload`) and save that.")
    return folder


def _on_hub(name: str, look_up: Callable[[], Found]) -> Found:
    """What a look-up of this name on the Hub, or in its cache, gives.

    Raises:
        ValueError: It fails; the message has the Hub's own reason, but where that is that there is no such name.
    """
    try:
        return look_up()
    except (OSError, ValueError) as error:
        offline = isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, OfflineModeIsEnabled)
        if offline:
            reason = "no model of this name in the Hub's cache, where alone it was looked for (HF_HUB_OFFLINE)."
        elif isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            reason = "no model of this name on the Hub that this account may read."
        else:
            reason = f"of the Hub: {error}"
        raise ValueError(f"{name}: there is no such folder here, and {reason}") from error


# A `PreTrainedModel`; its `to` is wrapped in a way that mypy takes for another function.
def load_transformers_model(name: str, trust_remote_code: bool = False, purpose: Purpose = "measure") -> Any:
    """The transformers model that a folder or a Hub name holds, in the class that was saved; of a folder of
    sentence-transformers the one inside.

    Raises:
        ValueError: There is no such folder and no such name, or it holds no model that can be read whole.
    """
    folder = _folder_of(name)
    if folder is None:
        _on_hub(name, lambda: hf_hub_download(name, "config.json"))
    elif not (folder / "config.json").is_file():
        raise ValueError(f"{name} holds no transformers model: it has no config.json.")
    place = name if folder is None else str(folder)
    config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    try:
        architecture = architecture_of(config)
        auto_class = auto_class_of(config, architecture)
        model_class: Any = (
            class_named(config, architecture) if auto_class is None else getattr(transformers, auto_class)
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    options = {} if auto_class is None else {"trust_remote_code": trust_remote_code}
    try:
        model, found = model_class.from_pretrained(place, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ValueError(f"The weights of {name} are damaged: {error}") from error
    _look_at_weights(name, model, found, purpose)
    return model.eval()


def _look_at_weights(name: str, model: Any, found: Mapping[str, Any], purpose: Purpose) -> None:
    """Refuses a checkpoint that has less than the model's class, and tells of what it has more, as far as transformers
    finds it.

    Raises:
        ValueError: There is less.
    """
    kind = type(model).__name__
    missing = sorted(key for key in found["missing_keys"] if key.rpartition(".")[2] not in _TRAINING_ONLY)
    if missing and purpose != "list":
        raise ValueError(
            f"{name} does not hold all weights of a {kind}, and random numbers would stand in their place: "
            f"{', '.join(shorten(missing))}. Make it whole in Python, and save it again by `save_pretrained`."
        )
    # What a class makes by itself, older checkpoints hold.
    made = [f".{buffer}" for buffer, _ in model.named_buffers()]
    left = [key for key in sorted(found["unexpected_keys"]) if not any(each.endswith(f".{key}") for each in made)]
    if left and purpose == "save":
        logger.warning(
            f"{name} holds weights that a {kind} has no place for, and what is saved lacks them, as with "
            f"`save_pretrained`: {', '.join(shorten(left))}."
        )


def load_processor(model: Any, name: str, options: Any, trust_remote_code: bool) -> Any:
    """The tokenizer or processor that makes this model's inputs; `None` for what has its own."""
    sentences = sentence_model(model)
    if sentences is not None:
        if options.processor is not None:
            raise ValueError(f"--processor is of transformers models; a {type(sentences).__name__} has its own.")
        return None
    return processor_of(model, options.processor or name, trust_remote_code)


def processor_of(model: Any, name: str, trust_remote_code: bool) -> Any:
    """What makes inputs of a transformers model of texts, images or sounds, from this folder or Hub name.

    Raises:
        ValueError: There is none that can be read.
    """
    what = {"pixel_values": "image processor", "input_ids": "tokenizer"}.get(model.main_input_name, "processor")
    lacking = f"{name} has no {what} that can be read: say where one is with --processor."
    # Of some families transformers makes a tokenizer without words where a folder has none.
    if what == "tokenizer" and Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _WORDS):
        raise ValueError(lacking)
    kinds = {"pixel_values": "AutoImageProcessor", "input_ids": "AutoTokenizer"}
    kind = kinds.get(model.main_input_name, "AutoFeatureExtractor")
    if kind == "AutoFeatureExtractor" and model.config.is_encoder_decoder:
        kind = "AutoProcessor"
    try:
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{lacking} ({str(error).splitlines()[0]})") from error


def processors_to_save(reader: Any, name: str, given: str | None, trust_remote_code: bool) -> list[Any]:
    """What goes beside a model that is saved, in this order: every processor of the source, and what read the data.

    Args:
        reader: The tokenizer or processor that read the data.
        name, given (`str`): Where the model is from, and where `--processor` says that its processor is.

    Raises:
        ValueError: The source has a processor that cannot be read.
    """
    own = [] if given is None else _processors_in(name, trust_remote_code)
    beside = _processors_in(name if given is None else given, trust_remote_code)
    if not any(isinstance(each, ProcessorMixin) for each in beside):
        beside = [*(each for each in beside if type(each) is not type(reader)), reader]
    return [*own, *beside]


def _processors_in(name: str, trust_remote_code: bool) -> list[Any]:
    """The processor of a folder, or a name on the Hub, where it has one of several parts; else each part that is not
    only a tokenizer, and the tokenizer beside it."""
    options = {"trust_remote_code": trust_remote_code}
    has = {file for file in (PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME, VIDEO_PROCESSOR_NAME) if has_file(name, file)}
    has_words = bool(has) and any(has_file(name, file) for file in _WORDS)
    if PROCESSOR_NAME in has or has_words:
        try:
            whole = transformers.AutoProcessor.from_pretrained(name, **options)
        except (OSError, ValueError, ImportError) as error:
            # For many families transformers has one whose parts need not all be there.
            if PROCESSOR_NAME in has:
                raise ValueError(
                    f"{name} has a processor that cannot be read here, and what is saved would lack it: {error}"
                ) from error
        else:
            if isinstance(whole, ProcessorMixin):
                return [whole]
    kinds: list[Any] = []
    if FEATURE_EXTRACTOR_NAME in has:  # of images or of sounds
        values, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
        of_sounds = "feature_extractor_type" in values
        kinds.append(transformers.AutoFeatureExtractor if of_sounds else transformers.AutoImageProcessor)
    if VIDEO_PROCESSOR_NAME in has:
        kinds.append(transformers.AutoVideoProcessor)
    if has_words:
        kinds.append(transformers.AutoTokenizer)
    return [kind.from_pretrained(name, **options) for kind in kinds]


# Files that a tokenizer is read from, one of which each has.
_WORDS = (
    *("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model"),
    "sentencepiece.bpe.model",
)
