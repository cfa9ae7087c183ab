"""Which of a block's tokens are real ones, and no padding."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from .families import TOKENS_INSIDE, TokensInside
from .models import config_around, is_encoder_decoder, prompt_tokens, unwrap
from .rows import IGNORED


if TYPE_CHECKING:
    from .blocks import BoundBlock
    from .families import FeedForwardBlock


@dataclass(frozen=True)
class _Mask:
    """What a batch says of its tokens.

    Args:
        tokens (`Tensor`): Positive where one is no padding.
        whole (`bool`): Whether none is padding.
        given (`bool`): Whether it is in the batch; else nothing is said but how many tokens there are.
    """

    tokens: torch.Tensor
    whole: bool
    given: bool = True

    @classmethod
    def of(cls, tokens: torch.Tensor) -> "_Mask":
        return cls(tokens, bool((tokens > 0).all()))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it says of each of so many tokens, flattened ones too."""
        return self.tokens.shape == shape or (len(shape) == 1 and self.tokens.numel() == shape[0])

    def inside(self, code: TokensInside, config: Any, prompts: int) -> "list[_Mask]":
        """What blocks may see of it: itself, and that with what the model puts before the tokens and behind them."""
        before = prompts + code.before_of(config)
        length = before + self.tokens.shape[1]
        added = -length % code.multiple_of(config)
        found = [self]
        if before or added:
            longer = F.pad(F.pad(self.tokens, (before, 0), value=1), (0, added))
            found.append(_Mask(longer, self.whole and not added, self.given))
        return [_Mask(mask.tokens.T, mask.whole, mask.given) for mask in found] if code.time_first else found


class TokenFilter:
    """Which rows of a block's tensors are real tokens: those that the batch's attention mask keeps.

    A mask is used where its shape is that of the block's tensors without the last dimension: as it is, flattened, in
    the chunks that the feed-forward is called with, or with what is known to be added within the model: prompts before
    the tokens, padding behind them. Blocks of a decoder that reads an encoder use the decoder's mask. Where no mask
    fits and the batch has padding, or more tokens come to a block than a batch of tokens alone has, that is an error.

    Args:
        model (`nn.Module`): What runs, wrapped or not.
        token_mask_fn (`Callable`, *optional*): `token_mask_fn(block_name, batch, shape)` gives the mask of the
            given shape (bool, or 0 and 1), or `None` for all tokens, in place of all that.
    """

    def __init__(self, model: Any, token_mask_fn: Callable[..., Any] | None = None) -> None:
        self.inner, self.token_mask_fn = unwrap(model)[0], token_mask_fn
        self.prompts = prompt_tokens(model)
        self.encoder_decoder = is_encoder_decoder(self.inner)
        self.batch: Mapping[str, Any] = {}
        self.masks: dict[str, _Mask] = {}
        self.offsets: dict[Any, Any] = {}
        self._configs: dict[str, Any] = {}  # by block

    def start(self, batch: Mapping[str, Any]) -> None:
        """Called with the inputs before each forward."""
        self.batch, self.offsets = batch, {}
        self.masks = {}
        ids, embeds = batch.get("input_ids"), batch.get("inputs_embeds")
        tokens = ids.shape if isinstance(ids, torch.Tensor) else None
        if tokens is None and isinstance(embeds, torch.Tensor):
            tokens = embeds.shape[:-1]
        for key in ("attention_mask", "decoder_attention_mask"):
            mask = batch.get(key)
            if isinstance(mask, torch.Tensor):
                # Of multiple choices all are rows to the blocks.
                self.masks[key] = _Mask.of(mask.flatten(0, -2) if mask.shape == tokens else mask)
        if self.encoder_decoder and "decoder_attention_mask" not in batch:
            labels = batch.get("labels")
            if isinstance(labels, torch.Tensor) and labels.dim() == 2:
                self.masks["decoder_attention_mask"] = _Mask.of(labels != IGNORED)
        if tokens is not None and "attention_mask" not in self.masks:
            every = torch.ones((), dtype=torch.long).expand(tokens).flatten(0, -2)
            self.masks["attention_mask"] = _Mask(every, whole=True, given=False)

    def select(self, block: "BoundBlock", *tensors: torch.Tensor) -> list[torch.Tensor]:
        """`(..., width)` tensors of one call as `(tokens, width)`, detached, padding left out."""
        rows = [tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in tensors]
        mask = self.mask(block, tensors[0].shape[:-1])
        if mask is None:
            return rows
        kept = mask.to(rows[0].device).reshape(-1).bool().nonzero().squeeze(1)
        return [row.index_select(0, kept) for row in rows]

    def mask(self, block: "FeedForwardBlock", shape: Sequence[int]) -> torch.Tensor | None:
        """Which tokens of one call are no padding: a mask of as many elements as the shape, or `None` for all.

        Raises:
            ValueError: That is not known, or `token_mask_fn` gives another shape.
        """
        if self.token_mask_fn is not None:
            mask = self.token_mask_fn(block.name, self.batch, tuple(shape))
            if mask is not None and tuple(mask.shape) != tuple(shape):
                raise ValueError(
                    f"`token_mask_fn` gave a mask of shape {tuple(mask.shape)} for block {block.name}, whose tokens "
                    f"have the shape {tuple(shape)}."
                )
            return mask
        in_decoder = self.encoder_decoder and "decoder" in block.name.split(".")
        mask = self.masks.get("decoder_attention_mask" if in_decoder else "attention_mask")
        if mask is None:
            return None
        config = self._config_around(block)
        code = TokensInside() if config is None else TOKENS_INSIDE.get(config.model_type, TokensInside())
        possible = mask.inside(code, config, self.prompts) if mask.tokens.dim() == 2 else [mask]
        fitting = next((each for each in possible if each.fits(shape)), None)
        if fitting is not None:
            return None if fitting.whole else fitting.tokens
        chunked = [each for each in possible if _is_chunk(config, shape, each.tokens)]
        if len(chunked) == 1:
            return self._next_chunk(block, chunked[0], shape[1])
        if code.are_its_own(config, mask.tokens.shape[0], shape):
            return None
        # Fewer tokens than there are in a batch may be pooled ones, or those that an expert gets; others are patches.
        if mask.whole and not code.multiple and not (mask.given and self._are_more(mask.tokens, shape)):
            return None
        raise ValueError(_unknown(block, mask, shape, code.multiple_of(config)))

    def _config_around(self, block: "FeedForwardBlock") -> Any:
        if block.name not in self._configs:
            self._configs[block.name] = config_around(self.inner, block.holder)
        return self._configs[block.name]

    def _next_chunk(self, block: "FeedForwardBlock", mask: _Mask, size: int) -> torch.Tensor | None:
        """Consecutive calls see consecutive parts of the sequence."""
        offset = self.offsets.get(block.name, 0)
        self.offsets[block.name] = (offset + size) % mask.tokens.shape[1]
        return None if mask.whole else mask.tokens[:, offset : offset + size]

    def _are_more(self, tokens: torch.Tensor, shape: Sequence[int]) -> bool:
        """Whether rows are longer than those of a batch that has nothing but tokens."""
        if len(shape) != 2 or shape[0] != tokens.shape[0] or shape[1] <= tokens.shape[1]:
            return False
        others = {
            name: value
            for name, value in self.batch.items()
            if isinstance(value, torch.Tensor) and value.dim() > 1 and "label" not in name
        }
        return all(
            name.startswith("decoder_") or name == "inputs_embeds" or _is_of_tokens(value, tokens)
            for name, value in others.items()
        )


def _is_of_tokens(value: torch.Tensor, tokens: torch.Tensor) -> bool:
    """Whether an input says something of each token, and is none of its own as patches of pictures are."""
    return value.shape[:2] == tokens.shape and not (value.dim() > 2 and value.is_floating_point())


def _is_chunk(config: Any, shape: Sequence[int], tokens: torch.Tensor) -> bool:
    """Whether a call gets one of the chunks that its model cuts the sequence into."""
    if config is None or len(shape) != 2 or not config.chunk_size_feed_forward:
        return False
    rows, size = shape
    return size == config.chunk_size_feed_forward and rows == tokens.shape[0] and tokens.shape[1] % size == 0


def _unknown(block: "FeedForwardBlock", mask: _Mask, shape: Sequence[int], multiple: int) -> str:
    """Why it cannot be told which tokens are padding, and what to do."""
    has = "no padding" if mask.whole else "padding"
    if multiple > 1:
        advice = f"Pad its rows to a multiple of {multiple} tokens, which the model does within"
    elif mask.whole:
        advice = "Use inputs that the model adds no tokens to"
    else:
        advice = "Use inputs without padding (of one length)"
    return (
        f"The batch has {has}, and its mask of shape {tuple(mask.tokens.shape)} does not say which of the tokens of "
        f"block {block.name}, of shape {tuple(shape)}, are padding. {advice}, or pass a "
        "`token_mask_fn(block_name, batch, shape)` that gives the mask, or `None` where none is."
    )
