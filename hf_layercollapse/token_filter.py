"""Which of a block's tokens are real ones, and no padding."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .models import is_encoder_decoder
from .rows import IGNORED


if TYPE_CHECKING:
    from .blocks import BoundBlock
    from .families import FeedForwardBlock


class TokenFilter:
    """Which rows of a block's tensors are real tokens: those that the batch's attention mask keeps.

    A mask is used where its shape is that of the block's tensors without the last dimension: as it is, flattened, or
    in the chunks that the feed-forward is called with. Blocks of a decoder that reads an encoder use the decoder's
    mask. Where no mask fits and the batch has padding, that is an error.

    Args:
        token_mask_fn (`Callable`, *optional*): `token_mask_fn(block_name, batch, shape)` gives the mask of the
            given shape (bool, or 0 and 1), or `None` for all tokens, in place of all that.
    """

    def __init__(self, inner: Any, token_mask_fn: Callable[..., Any] | None = None) -> None:
        self.token_mask_fn = token_mask_fn
        self.encoder_decoder = is_encoder_decoder(inner)
        self.batch: Mapping[str, Any] = {}
        self.masks: dict[str, torch.Tensor | None] = {}
        self.offsets: dict[Any, Any] = {}

    def start(self, batch: Mapping[str, Any]) -> None:
        """Called with the inputs before each forward."""
        self.batch, self.offsets = batch, {}
        self.masks = {}
        for key in ("attention_mask", "decoder_attention_mask"):
            mask = batch.get(key)
            if isinstance(mask, torch.Tensor):
                self.masks[key] = None if bool((mask > 0).all()) else mask
        if self.encoder_decoder and "decoder_attention_mask" not in batch:
            labels = batch.get("labels")
            mask = labels != IGNORED if isinstance(labels, torch.Tensor) and labels.dim() == 2 else None
            self.masks["decoder_attention_mask"] = None if mask is None or bool(mask.all()) else mask

    def select(self, block: "BoundBlock", *tensors: torch.Tensor) -> list[torch.Tensor]:
        """`(..., width)` tensors of one call as `(tokens, width)`, detached, padding left out."""
        rows = [tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in tensors]
        mask = self.mask(block, tensors[0].shape[:-1])
        if mask is None:
            return rows
        kept = mask.to(rows[0].device).reshape(-1).bool().nonzero().squeeze(1)
        return [row.index_select(0, kept) for row in rows]

    def mask(self, block: "FeedForwardBlock", shape: Sequence[int]) -> torch.Tensor | None:
        """Which tokens of one call are no padding: a mask of as many elements as the shape, or `None` for all."""
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
        if mask.dim() == 2:
            if mask.shape == shape or (len(shape) == 1 and mask.numel() == shape[0]):
                return mask
            if len(shape) == 2 and shape[0] == mask.shape[0] and mask.shape[1] % shape[1] == 0:
                # Chunked feed-forward: consecutive calls see consecutive parts of the sequence.
                offset = self.offsets.get(block.name, 0)
                self.offsets[block.name] = (offset + shape[1]) % mask.shape[1]
                return mask[:, offset : offset + shape[1]]
        raise ValueError(
            f"The batch has padding, and its mask of shape {tuple(mask.shape)} does not say which of the tokens of "
            f"block {block.name}, of shape {tuple(shape)}, are padding. Use inputs without padding (of one length), "
            "or pass a `token_mask_fn(block_name, batch, shape)` that gives the mask."
        )
