"""Rows of calibration data by their content: which are copies of others, and which are held back.

What a row says depends neither on its place nor on its padding. So rows are told apart by a hash of their inputs: a
list, a generator and a shuffled loader of the same rows are the same data.
"""

import copy
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import processes
from .memory import MemoryBudget


# One row of so many is held back for scoring.
HELD_BACK = 4

# Under which features of sentence-transformers say what a row is to the model, a query or a document.
ROUTE = "task"

IGNORED = -100  # the label of what is not predicted

_STEADY = "Pass it without random changes of its rows, or as a list of batches."

_PLAIN = (bool, int, float, str, type(None))


def not_inputs(batch: Any) -> str:
    """What is wrong with a batch that is no dict."""
    return (
        f"Calibration data must be an iterable of model inputs (dicts of tensors), got a {type(batch).__name__}. They "
        "are made of raw texts, images or sounds where you pass the tokenizer or processor as `processing_class`."
    )


@dataclass(frozen=True)
class _Row:
    """What is known of the rows that say one thing.

    Args:
        text (`bytes`): What they say without labels.
        tokens (`int`): Of one of them, padding left out; pixels count as none.
        size (`int`): Of its inputs, in bytes.
        copies (`int`): How many there are.
    """

    text: bytes
    tokens: int
    size: int
    copies: int


class DistinctRows:
    """The batches of the data, without rows that were met before: a copy says nothing new, and must not count as if it
    did. Every reading gives the same rows, in whatever order.

    Of several processes each reads its own data, and of rows that several read one gets them.

    Args:
        data (iterable of `dict[str, Tensor]`): Model inputs that can be read again.
        labels (`bool`): Whether labels of tokens make rows different, as they do where a decoder reads them.

    Raises:
        ValueError: In a later reading: other rows come.
    """

    def __init__(self, data: Iterable[Any], labels: bool = False) -> None:
        self.data, self.labels = data, labels
        # Of each process: content -> what was met.
        self._found: list[dict[bytes, _Row]] = [{} for _ in range(processes.count())]
        # Whether rows can be told apart in every batch.
        self.divisible = True
        self._batches: list[dict[bytes, int]] = []  # contents that are new in each batch here -> their place in it
        with processes.together():
            for batch, new, everything in self._reading(self._own):
                self.divisible = self.divisible and row_count(batch) is not None
                self._batches.append({content: index for index, content in new.items()})
                for content in everything:
                    row = self._own[content]
                    self._own[content] = replace(row, copies=row.copies + 1)
        self._found = processes.gathered(self._own)

    @property
    def _own(self) -> dict[bytes, _Row]:
        return self._found[processes.rank()]

    @property
    def _others(self) -> set[bytes]:
        """What is left to other processes of what is here."""
        return {content for found in self._found[: processes.rank()] for content in found}

    @property
    def tokens_of(self) -> dict:
        """What a row says -> its tokens, of the rows of all processes."""
        return {content: row.tokens for found in self._found for content, row in found.items()}

    @property
    def sizes(self) -> dict:
        """What a row says -> bytes of its inputs, of the rows of all processes."""
        return {content: row.size for found in self._found for content, row in found.items()}

    @property
    def texts(self) -> set:
        """What rows say without labels."""
        return {row.text for found in self._found for row in found.values()}

    @property
    def distinct(self) -> int:
        """How many rows say something different."""
        return len(self.tokens_of)

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(row.copies for found in self._found for row in found.values())

    @property
    def batches(self) -> int:
        """How many batches this process gets."""
        return len(self.places)

    @property
    def places(self) -> dict[int, list[int]]:
        """Number of each batch of the data that this process gets something of -> the places of that in it."""
        mine = self._own.keys() - self._others
        found = {
            number: [place for content, place in batch.items() if content in mine]
            for number, batch in enumerate(self._batches)
        }
        return {number: places for number, places in found.items() if places}

    def part(self, wanted: Any) -> Any:
        """Those of the rows for which `wanted(what they say without labels)`."""
        part = copy.copy(self)
        part._found = [{content: row for content, row in found.items() if wanted(row.text)} for found in self._found]
        return part

    def again(self, numbers: Iterable[int], batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """What this process gets of the batches of these numbers, which are read once more.

        Raises:
            ValueError: One holds other rows than before.
        """
        places = self.places
        for number, batch in zip(numbers, batches, strict=True):
            now = contents(batch, self.labels)
            before = {place: content for content, place in self._batches[number].items()}
            if any(place >= len(now) or now[place] != before[place] for place in places[number]):
                raise ValueError(f"The calibration data changes: batch {number} has other rows than before. {_STEADY}")
            yield take(batch, places[number])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        found: dict[bytes, _Row] = {}
        own, others = self._own, self._others
        for batch, new, _ in self._reading(found):
            kept = [index for index, content in new.items() if content in own and content not in others]
            if kept:
                yield take(batch, kept)
        everything = set().union(*self._batches)
        if found.keys() != everything:
            new, gone = len(found.keys() - everything), len(everything - found.keys())
            raise ValueError(
                f"The calibration data changes: of {len(found)} different rows {new} are new, and {gone} that "
                f"were read before are gone. {_STEADY}"
            )

    def _reading(self, found: dict[bytes, Any]) -> Iterator[Any]:
        """Yields `(batch, index -> content of those rows that were not met before, contents of all)`; what is met is
        added to `found`."""
        for batch in self.data:
            texts = contents(batch)
            full = contents(batch, self.labels) if self.labels else texts
            new, size = {}, bytes_of([batch]).total() // max(1, len(texts))
            for index, content in enumerate(full):
                if content not in found:
                    found[content] = _Row(texts[index], _tokens_of(batch, index), size, 0)
                    new[index] = content
            yield batch, new, full


def _tokens_of(batch: Mapping[str, Any], index: int) -> int:
    """Tokens of a row that are no padding; pixels count as none."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or index >= len(ids):
        return 0
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        return int((mask[index] > 0).sum())
    return ids[index].numel()


def bytes_of(batches: Iterable[Mapping[str, Any]]) -> Counter[torch.device]:
    """What batches take, in bytes, by device."""
    taken: Counter[torch.device] = Counter()
    for tensor in (value for batch in batches for value in batch.values() if isinstance(value, torch.Tensor)):
        taken[tensor.device] += tensor.numel() * tensor.element_size()
    return taken


def tokens_in(batch: Any) -> int:
    """Tokens of a batch that are no padding; pixels count as none."""
    ids = batch.get("input_ids")
    return sum(_tokens_of(batch, index) for index in range(len(ids))) if isinstance(ids, torch.Tensor) else 0


def sample(rows: DistinctRows, most_rows: int, most_tokens: int, most_bytes: int) -> list:
    """Some batches of the data, always of the same rows: those whose contents have the smallest hashes. Every process
    gets them.

    Args:
        rows ([`DistinctRows`]): What to take them from.
        most_rows, most_tokens (`int`): How many at most; at least one row.
        most_bytes (`int`): Of the inputs of them all: pixels and sounds have no tokens.
    """
    chosen: dict[bytes, int] = {}
    tokens, taken, sizes = 0, 0, rows.sizes
    for content, count in sorted(rows.tokens_of.items()):
        too_large = taken + sizes[content] > most_bytes
        if chosen and (len(chosen) == most_rows or tokens + count > most_tokens or too_large):
            break
        chosen[content] = len(chosen)
        tokens += count
        taken += sizes[content]
    found, largest = [], 1
    with processes.together():
        for batch in rows:
            largest = max(largest, row_count(batch) or 0)
            for index, content in enumerate(contents(batch, rows.labels)):
                if content in chosen:
                    found.append((chosen[content], take(batch, [index])))
    found = [pair for part in processes.gathered(found) for pair in part]
    largest = max(processes.gathered(largest))
    with processes.together():
        return joined((part for _, part in sorted(found, key=lambda pair: pair[0])), largest)


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

    Padding does not count, and neither do labels, unless wanted those of tokens: a text is the same under another. As
    a query and as a document it is not: a model may have a way for each.
    """
    count, route = row_count(batch), batch.get(ROUTE)
    tensors = {name: value for name, value in sorted(batch.items()) if isinstance(value, torch.Tensor)}
    if count is None:
        return [_hash({name: value for name, value in tensors.items() if name != "labels" or labels}, route)]
    masks = {name: batch[name] > 0 for name in ("attention_mask", "decoder_attention_mask") if name in tensors}
    tensors = {name: value for name, value in tensors.items() if _counts(name, value, labels)}
    return [
        _hash({name: _real(name, value, masks, index) for name, value in tensors.items()}, route)
        for index in range(count)
    ]


def _counts(name: str, value: Any, labels: bool) -> bool:
    if name in ("attention_mask", "decoder_attention_mask"):
        return value.dim() > 2
    return name != "labels" or (labels and value.dim() > 1 and not value.is_floating_point())


def _real(name: str, value: Any, masks: dict[Any, Any], index: int) -> torch.Tensor:
    """One row of an input, without its padding."""
    mask = masks.get("decoder_attention_mask" if name.startswith("decoder_") else "attention_mask")
    if name == "labels":
        return value[index][value[index] != IGNORED]
    if mask is not None and mask.dim() == 2 and value.shape[:2] == mask.shape:
        return value[index][mask[index].to(value.device)]
    return value[index]


def _hash(tensors: Mapping[str, torch.Tensor], route: Any = None) -> bytes:
    digest = hashlib.blake2b(b"" if route is None else str(route).encode(), digest_size=8)
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


def joined(parts: Iterable[Any], size: int | None = None) -> list:
    """Rows from many batches in batches of this size, full ones first. Only rows of one shape are put together.

    Args:
        size (`int`, *optional*): Default: that of the largest of these.
    """
    parts = list(parts)
    groups: dict[str, list[Any]] = {}
    size = size or max((row_count(part) or 0 for part in parts), default=0)
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


def read_within(batches: Iterable[Any], memory: MemoryBudget) -> tuple[list, Counter[torch.device]]:
    """`(batches, what they take by device)`, up to the first that there is no memory for, with that."""
    kept: list[dict[str, Any]] = []
    taken: Counter[torch.device] = Counter()
    for batch in batches:
        kept.append(batch)
        taken += bytes_of([batch])
        if not memory.fits(taken):
            break
    return kept, taken


def held_to_measure_on(batches: Iterable[Any], memory: MemoryBudget) -> list:
    """The batches, which are to be held.

    Raises:
        ValueError: They take more memory than there is.
    """
    held, taken = read_within(batches, memory)
    if not memory.fits(taken):
        raise ValueError(
            f"The rows to measure on take {memory.told(taken)}, with the first {len(held)} batches of them: pass "
            "fewer, or raise `max_memory`."
        )
    return held


def hold_back(
    data: Iterable[Any], labels: bool = False, memory: MemoryBudget | None = None
) -> tuple[DistinctRows, list]:
    """`(batches to fit to, batches to score on)`: one row of four by content, never a copy of one that is fitted to.

    Args:
        data (iterable of `dict[str, Tensor]`): Model inputs that can be read again.
        labels (`bool`): As in [`DistinctRows`].
        memory ([`MemoryBudget`], *optional*): For what is scored on.

    Returns:
        [`DistinctRows`], and a list.

    Raises:
        ValueError: There are fewer than four different rows, or too little memory.
    """
    rows = DistinctRows(data, labels)
    found = rows.texts
    if len(found) < HELD_BACK:
        raise ValueError(
            f"A quarter of the rows of the calibration data is held back to score on, and there are {len(found)} "
            "different rows: pass more data, or `evaluation_data`."
        )
    held_back = set(sorted(found)[: len(found) // HELD_BACK])
    fitting = rows.part(lambda text: text not in held_back)
    with processes.together():
        return fitting, joined(held_to_measure_on(rows.part(held_back.__contains__), memory or MemoryBudget()))
