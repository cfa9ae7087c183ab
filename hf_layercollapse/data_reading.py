"""Reading calibration data: batches of model inputs, as often as they are needed, and each time the same rows."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from . import processes
from .calibration_data import CalibrationData, is_stream, refuse_endless
from .rows import DistinctRows, bytes_of, held_to_measure_on, hold_back, not_inputs, read_within, row_count


if TYPE_CHECKING:
    from .memory import MemoryBudget


# Inputs of models -> the number of dimensions that one row has of them without a batch.
OF_A_ROW = {"input_ids": 1, "input_values": 1, "input_features": 2, "pixel_values": 3}

# Sizes of the first dimension of a `pixel_values` of three dimensions that is one image, and no batch of patches.
CHANNELS = (1, 3, 4)


def read_calibration_data(data: Any, memory: "MemoryBudget", labels: bool = False) -> DistinctRows:
    """The different rows of some data, from its first reading on.

    Args:
        data (iterable of `dict[str, Tensor]`): Model inputs; arrays of numpy become tensors.
        memory ([`MemoryBudget`]): Where the data cannot be read twice in one order (a generator, a shuffled loader),
            its inputs are kept, within this.
        labels (`bool`): As in [`DistinctRows`].

    Raises:
        TypeError: It is no iterable.
        ValueError: It gives no batch, something else than batches of model inputs, is too large to be kept and can be
            read only once, or is a stream that goes on and on (see [`CalibrationData`]).
    """
    with processes.together():
        data = readable(data, memory)
    return DistinctRows(data, labels)


def split_data(
    calibration_data: Any, evaluation_data: Any, memory: "MemoryBudget", labels: bool = False
) -> tuple[DistinctRows, list[dict[str, Any]]]:
    """`(rows to fit to, batches to score on)`, as [`hold_back`] does it or as they are given. The second are kept.

    Raises:
        ValueError: As [`read_calibration_data`], or there is too little memory for the second.
    """
    with processes.together():
        data = readable(calibration_data, memory)
        held = None
        if evaluation_data is not None:
            held = held_to_measure_on(_Checked(evaluation_data, "evaluation"), memory)
    if held is None:
        fitting, held = hold_back(data, labels, memory)
    else:
        fitting = DistinctRows(data, labels)
    memory.hold_all(bytes_of(held))
    return fitting, held


def readable(data: Any, memory: "MemoryBudget") -> Iterable[dict[str, Any]]:
    """Batches of model inputs that can be read again: the data themselves, or what was read of them, kept."""
    if isinstance(data, Mapping):
        raise ValueError(
            "Calibration data must be an iterable of batches of model inputs, and this is one batch (a "
            f"{type(data).__name__}): pass a list of them, `[batch]`."
        )
    if not isinstance(data, Iterable) and not isinstance(data, torch.utils.data.Dataset):
        raise TypeError(f"Calibration data must be an iterable of batches of model inputs, got {data!r:.100}.")
    checked = _Checked(data, "calibration")
    if isinstance(data, Sequence) or _is_in_order(data):
        return checked
    iterator = iter(data)
    kept, taken = read_within(_Checked(data, "calibration", iterator), memory)
    if memory.fits(taken):
        memory.hold_all(taken)
        return kept
    if iterator is data:
        raise ValueError(
            f"The calibration data can be read only once, and its first {len(kept)} batches take "
            f"{memory.told(taken)}: pass what can be read again (a list, a DataLoader without shuffling), fewer rows, "
            "or raise `max_memory`."
        )
    return checked


def _is_in_order(data: Any) -> bool:
    """Whether it gives the same batches in the same order each time, as far as it decides that itself."""
    by_index = isinstance(data, DataLoader) and isinstance(data.sampler, SequentialSampler)
    return by_index or isinstance(data, CalibrationData)


def shuffled(
    data: DistinctRows | CalibrationData, order: random.Random
) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Every batch once, `(its number, batch)`, none held: in a random order, where any batch can be asked for (of a
    list, a loader, [`CalibrationData`]), else in that of the data and without a number.

    Raises:
        ValueError: There are other rows than at the first reading.
    """
    numbers = list(range(len(data)) if isinstance(data, CalibrationData) else data.places)
    order.shuffle(numbers)
    found = _at(data, numbers)
    if found is None:
        yield from ((None, batch) for batch in data)
    else:
        yield from zip(numbers, found, strict=True)


def _at(data: Any, numbers: list[int]) -> Iterator[Any] | None:
    """The batches of these numbers; `None` where data can only be read from their beginning."""
    if isinstance(data, (DistinctRows, _Checked)):
        found = _at(data.data, numbers)
        if found is None:
            return None
        if isinstance(data, _Checked):
            return map(checked_inputs, found)
        return data.again(numbers, found)
    if isinstance(data, CalibrationData):
        return data.at(numbers) if data.given is None else _at(data.given, numbers)
    if isinstance(data, Sequence):
        return (data[number] for number in numbers)
    # One of a class of its own may do more than its parts say.
    if type(data) is not DataLoader or type(data.batch_sampler) is not BatchSampler or not _is_in_order(data):
        return None
    indices = list(data.batch_sampler)
    reordered: DataLoader[Any] = DataLoader(
        data.dataset,
        batch_sampler=[indices[number] for number in numbers],
        collate_fn=data.collate_fn,
        num_workers=data.num_workers,
        pin_memory=data.pin_memory,
        worker_init_fn=data.worker_init_fn,
        multiprocessing_context=data.multiprocessing_context,
        generator=data.generator,
    )
    return iter(reordered)


class _Checked:
    """The batches of some data, each checked to be model inputs. A stream ends, or is refused.

    Args:
        data (iterable), kind (`str`): What, and what of.
        iterator (*optional*): Of the data, where one has been begun.
    """

    def __init__(self, data: Any, kind: str, iterator: Iterator[Any] | None = None) -> None:
        self.data, self.kind, self.iterator = data, kind, iterator

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows, endless = 0, is_stream(self.data)
        for batch in self.data if self.iterator is None else self.iterator:
            inputs = checked_inputs(batch)
            rows += row_count(inputs) or 1
            if endless:
                refuse_endless(self.data, rows)
            yield inputs
        if not rows:
            raise ValueError(f"The {self.kind} data is empty: it must give at least one batch of model inputs.")


def checked_inputs(batch: Any) -> dict:
    """A batch of model inputs with tensors for arrays.

    Raises:
        ValueError: It is no dict, one row without a batch around it, or its values are lists.
    """
    if not isinstance(batch, Mapping):  # as dicts and BatchEncodings are
        raise ValueError(not_inputs(batch))
    inputs = {
        name: torch.as_tensor(value) if isinstance(value, np.ndarray) and value.dtype != object else value
        for name, value in batch.items()
    }
    for name, value in inputs.items():
        if isinstance(value, (list, tuple, np.ndarray)) and name in (*OF_A_ROW, "attention_mask"):
            raise ValueError(
                f"`{name}` of the calibration data is a {type(value).__name__}, not a tensor: tokenize with "
                '`return_tensors="pt"`, or `dataset.with_format("torch")` and a DataLoader.'
            )
        if isinstance(value, torch.Tensor) and OF_A_ROW.get(name) == value.dim():
            # Patches of images have a mask or their sizes beside them, and their first dimension is a batch.
            alone = not any(isinstance(other, torch.Tensor) and other.dim() for other in _others(inputs, name))
            if name != "pixel_values" or (alone and value.shape[0] in CHANNELS):
                raise ValueError(
                    f"`{name}` of the calibration data has the shape {tuple(value.shape)}: these are rows, and not "
                    "batches of rows. Pass `DataLoader(data, batch_size=8)`."
                )
    return inputs


def _others(inputs: Mapping[str, Any], name: str) -> list[Any]:
    return [value for other, value in inputs.items() if other != name]
