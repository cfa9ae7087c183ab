"""Small inputs for running modules and models whose code is to be seen: arguments by their names."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel


# Rows of the probing input: enough that an accidental equality is impossible, few enough to cost nothing.
BATCH, LENGTH = 2, 4


# Names of arguments that take hidden states of the block's width.
_HIDDEN = (
    "hidden_states", "hidden_state", "x", "input", "inputs", "input_tensor", "hidden", "output_h", "features", "feat",
    "residual", "src", "tgt", "inputs_embeds", "attention_output", "embeddings", "tensor", "hs", "state",
    "lang_feats", "visn_feats", "image_features", "text_features", "cross_modal_text",
)  # fmt: skip


# Arguments that may be left out, but that some layers need all the same.
_CONTEXT = ("encoder_hidden_states", "attention_mask", "encoder_attention_mask", "query_length")


def signature_of(module: nn.Module) -> list[inspect.Parameter]:
    """The parameters of a class's `forward`, the module itself left out; none where it does not tell them."""
    try:
        # Of an instance that has nothing of its own: a `forward` may be more than a function.
        return list(inspect.signature(object.__new__(type(module)).forward).parameters.values())
    except (TypeError, ValueError):
        return []


def possible_arguments(module: nn.Module, width: int) -> Iterator[dict[str, Any]]:
    """Ways to call a module, most likely first: keyword arguments made up from the names in its signature."""
    parameters = [p for p in signature_of(module) if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not parameters:
        return
    first = parameters[0].name
    if isinstance(module, PreTrainedModel) and first not in _HIDDEN[:2]:
        inputs = model_inputs(module)
        if inputs is not None:
            yield inputs
        if first not in _HIDDEN:
            return
    tokens = (BATCH, LENGTH, width)
    for shape, full in (
        (tokens, False),
        (tokens, True),
        ((BATCH, width, 2, 2), False),
        ((BATCH, 2, 2, width), False),
        ((LENGTH, width), False),
    ):
        generator = torch.Generator().manual_seed(len(shape) + shape[1])
        arguments = {first: torch.randn(shape, generator=generator)}
        for parameter in parameters[1:]:
            name = parameter.name
            if parameter.default is parameter.empty or name == "position_embeddings" or (full and name in _CONTEXT):
                arguments[name] = _argument(name, shape, module, generator, full)
        yield arguments


def _argument(name: str, shape: Any, module: Any, generator: torch.Generator, full: bool) -> Any:
    if name in _HIDDEN or (full and name == "encoder_hidden_states"):
        return torch.randn(shape, generator=generator)
    if name == "query_length":
        return shape[1] if full else 0
    if full and name.endswith("attention_mask"):
        return torch.zeros(shape[0], 1, 1, shape[1])
    if name in ("position_embeddings", "rotary_pos_emb", "rotary_embeddings"):
        widths = [m.__dict__["head_dim"] for m in module.modules() if isinstance(m.__dict__.get("head_dim"), int)]
        if not widths:
            return None
        return tuple(torch.randn(1, shape[1], widths[0], generator=generator) for _ in range(2))
    if name in ("input_dimensions", "spatial_shape", "hw_shape"):
        return (2, 2)
    if name in ("height", "width"):
        return 2
    if name == "cu_seqlens":
        return torch.tensor([0, shape[0]], dtype=torch.int32)
    if name in ("position_ids", "cache_position"):
        return torch.arange(shape[1])[None]
    if name.startswith(("output_", "use_", "return_", "always_")):
        return False
    return None


def model_inputs(model: Any, batch: int = BATCH, length: int = 8) -> dict[str, Any] | None:
    """Made-up inputs of a transformers model by its `main_input_name` and config, or `None`."""
    generator = torch.Generator().manual_seed(0)
    parameters = inspect.signature(type(model).forward).parameters
    ids = _token_ids(model.config, batch, length, generator)
    inputs = {"input_ids": ids} if "input_ids" in parameters else {}
    # In this order: what is drawn for one depends on what was drawn before.
    for name, made in (
        ("pixel_values", _pixel_values),
        ("input_values", _input_values),
        ("input_features", _input_features),
        ("past_values", _past_values),
    ):
        if name in parameters:
            inputs[name] = made(model, batch, generator)
    if not inputs:
        return None
    if "past_values" in inputs:
        length = inputs["past_values"].shape[1]
    inputs.update(_beside(model.config, parameters, batch, length, generator))
    encoder_decoder = model.config.__dict__.get("is_encoder_decoder")
    if "decoder_input_ids" in parameters and (encoder_decoder or "input_ids" not in inputs):
        inputs["decoder_input_ids"] = ids
    return inputs


def _token_ids(config: Any, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    vocabulary = _attribute(config, "vocab_size", default=99)
    vocabulary = vocabulary if isinstance(vocabulary, int) else 99
    return torch.randint(1, max(2, min(vocabulary, 1000)), (batch, length), generator=generator)


def _pixel_values(model: Any, batch: int, generator: torch.Generator) -> torch.Tensor:
    channels = _attribute(model.config, "num_channels", "in_channels", "in_chans", default=3)
    size = _attribute(model.config, "image_size", "input_size", "img_size", default=32)
    sides = tuple(size)[-2:] if isinstance(size, (list, tuple)) else (size, size)
    frames = model.config.__dict__.get("num_frames")
    shape = (batch, channels, *sides) if frames is None else (batch, frames, channels, *sides)
    return torch.randn(shape, generator=generator)


def _input_values(model: Any, batch: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(batch, 4000, generator=generator)


def _input_features(model: Any, batch: int, generator: torch.Generator) -> torch.Tensor:
    bins = _attribute(model.config, "num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", default=80)
    frames = 2 * _attribute(model.config, "max_source_positions", default=32)
    features = torch.randn(batch, frames, bins, generator=generator)
    return features.transpose(1, 2) if "Whisper" in type(model).__name__ else features


def _past_values(model: Any, batch: int, generator: torch.Generator) -> torch.Tensor:
    length = _attribute(model.config, "context_length", default=32)
    channels = _attribute(model.config, "num_input_channels", default=1)
    return torch.randn(batch, length, channels, generator=generator)


def _beside(
    config: Any, parameters: Mapping[str, Any], batch: int, length: int, generator: torch.Generator
) -> dict[str, Any]:
    """What some models read beside their main input: features and places of regions (LXMERT), boxes of tokens."""
    inputs = {}
    for name in ("visual_feats", "visual_pos"):
        if name in parameters:
            width = 4
            if name == "visual_feats":
                width = _attribute(config, "visual_feats_dim", "visual_feat_dim", default=4)
            inputs[name] = torch.randn(batch, 4, width, generator=generator)
    if "bbox" in parameters:
        corners = 8 if "dim_bbox" in config.__dict__ and config.dim_bbox == 8 else 4
        inputs["bbox"] = torch.zeros(batch, length, corners, dtype=torch.long)
    return inputs


def _attribute(config: Any, *names: str, default: int) -> Any:
    """The first of these fields that a config or one inside it sets, in the order of the names."""
    for name in names:
        for holder in (config, *_sub_configs(config)):
            value = holder.__dict__.get(name)
            if value is not None:
                return value
    return default


def _sub_configs(config: Any) -> list[PreTrainedConfig]:
    return [value for value in config.__dict__.values() if isinstance(value, PreTrainedConfig)]
