"""Rows of calibration data by their content: which are copies of others, and which are held back.

What a row says depends neither on its place nor on its padding. So rows are told apart by a hash of their inputs: a
list, a generator and a shuffled loader of the same rows are the same data.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch


# One row of so many is held back for scoring.
HELD_BACK = 4

IGNORED = -100  # the label of what is not predicted

_PLAIN = (bool, int, float, str, type(None))


def not_inputs(batch: Any) -> str:
    """What is wrong with a batch that is no dict."""
    return (
        f"Calibration data must be an iterable of model inputs (dicts of tensors), got a {type(batch).__name__}. They "
        "are made of raw texts, images or sounds where you pass the tokenizer or processor as `processing_class`."
    )


class DistinctRows:
    """The batches of the data, without rows that were met before: a copy says nothing new, and must not count as if it
    did.

    Args:
        data (iterable of `dict[str, Tensor]`): Model inputs.
        labels (`bool`): Whether labels of tokens make rows different, as they do where a decoder reads them.
    """

    def __init__(self, data, labels=False):
        self.data, self.labels = data, labels
        self.rows = self.distinct = 0  # of the last pass

    def __iter__(self):
        self.rows = self.distinct = 0
        seen: set[bytes] = set()
        for batch in self.data:
            if not isinstance(batch, Mapping):
                raise ValueError(not_inputs(batch))
            found = contents(batch, self.labels)
            new = {content: index for index, content in reversed(list(enumerate(found))) if content not in seen}
            seen |= new.keys()
            self.rows, self.distinct = self.rows + len(found), self.distinct + len(new)
            if new:
                yield take(batch, sorted(new.values()))


def row_count(batch: Any) -> int | None:
    """How many rows a batch has, the first size of all its tensors; `None` where it can only be taken whole: tensors
    whose first sizes differ (patches of several images), or other objects (a cache)."""
    sizes = {value.shape[:1] for value in batch.values() if isinstance(value, torch.Tensor)}
    if len(sizes) != 1 or not all(isinstance(value, (torch.Tensor, *_PLAIN)) for value in batch.values()):
        return None
    (size,) = sizes
    return size[0] if size else None


def contents(batch: Any, labels: bool = False) -> list[bytes]:
    """A hash of what each row says, of a batch that can only be taken whole one hash.

    Padding does not count, and neither do labels, unless wanted those of tokens: a text is the same under another.
    """
    count = row_count(batch)
    tensors = {name: value for name, value in sorted(batch.items()) if isinstance(value, torch.Tensor)}
    if count is None:
        return [_hash({name: value for name, value in tensors.items() if name != "labels" or labels})]
    masks = {name: batch[name] > 0 for name in ("attention_mask", "decoder_attention_mask") if name in tensors}
    tensors = {name: value for name, value in tensors.items() if _counts(name, value, labels)}
    return [
        _hash({name: _real(name, value, masks, index) for name, value in tensors.items()}) for index in range(count)
    ]


def _counts(name, value, labels):
    if name in ("attention_mask", "decoder_attention_mask"):
        return value.dim() > 2
    return name != "labels" or (labels and value.dim() > 1 and not value.is_floating_point())


def _real(name, value, masks, index):
    """One row of an input, without its padding."""
    mask = masks.get("decoder_attention_mask" if name.startswith("decoder_") else "attention_mask")
    if name == "labels":
        return value[index][value[index] != IGNORED]
    if mask is not None and mask.dim() == 2 and value.shape[:2] == mask.shape:
        return value[index][mask[index].to(value.device)]
    return value[index]


def _hash(tensors):
    digest = hashlib.blake2b(digest_size=8)
    for name, value in tensors.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def take(batch: Any, indices: Sequence[int]) -> dict[str, Any]:
    """The batch with these of its rows only."""
    if row_count(batch) in (None, len(indices)):
        return batch
    index = torch.as_tensor(indices)
    return {
        name: value.index_select(0, index.to(value.device)) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def joined(parts: Iterable[Any]) -> list:
    """Rows from many batches in batches as large as the largest of these, full ones first. Only rows of one shape are
    put together."""
    parts = list(parts)
    groups: dict[str, list[Any]] = {}
    size = max((row_count(part) or 0 for part in parts), default=0)
    batches, whole = [], [part for part in parts if row_count(part) is None]
    for part in parts:
        if row_count(part) is not None:
            kind = [(k, (v.shape[1:], v.dtype) if isinstance(v, torch.Tensor) else v) for k, v in part.items()]
            groups.setdefault(repr(kind), []).append(part)
    for group in groups.values():
        rows = {
            name: torch.cat([part[name] for part in group]) if isinstance(value, torch.Tensor) else value
            for name, value in group[0].items()
        }
        count = row_count(rows) or 0
        batches += [take(rows, range(start, min(start + size, count))) for start in range(0, count, size)]
    return whole + sorted(batches, key=lambda batch: row_count(batch) or 0, reverse=True)


class _Part:
    """The rows of the data whose content is wanted."""

    def __init__(self, data, wanted):
        self.data, self.wanted = data, wanted

    def __iter__(self):
        for batch in self.data:
            kept = [index for index, content in enumerate(contents(batch)) if self.wanted(content)]
            if kept:
                yield take(batch, kept)


def hold_back(data: Iterable[Any]) -> tuple[Any, list]:
    """`(batches to fit to, batches to score on)`: one row of four by content, never a copy of one that is fitted to.

    Args:
        data: Model inputs that can be read again.

    Raises:
        ValueError: There are fewer than four different rows.
    """
    found = set()
    for batch in data:
        if not isinstance(batch, Mapping):
            raise ValueError(not_inputs(batch))
        found.update(contents(batch))
    if len(found) < HELD_BACK:
        raise ValueError(
            f"A quarter of the rows of the calibration data is held back to score on, and there are {len(found)} "
            "different rows: pass more data, or `evaluation_data`."
        )
    held_back = set(sorted(found)[: len(found) // HELD_BACK])
    return _Part(data, lambda content: content not in held_back), joined(_Part(data, held_back.__contains__))
