"""Several processes that calibrate one model together: each reads its part of the data, and all get the same sums.

They are those of `torch.distributed`, as `accelerate launch` starts them. What is done by one of them alone is done
inside of [`alone`]; what one of them may fail at, for want of memory or by what its part of the data holds, is done
inside of [`together`], or the others would wait for it.
"""

import atexit
import contextlib
import contextvars
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import recursively_apply


_ALONE = contextvars.ContextVar("alone", default=False)


def launched() -> int:
    """How many processes `accelerate launch` or torchrun started of this program, 1 without them; whether or not they
    have joined yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(on_cpu: bool) -> None:
    """Joins the processes that were launched with this one, if any. Each has an accelerator of its own from then on,
    the one that torch takes where a device has no index.

    Args:
        on_cpu (`bool`): Whether they compute on the CPU all the same.
    """
    if launched() > 1 and not dist.is_initialized():
        PartialState(cpu=on_cpu)
        atexit.register(dist.destroy_process_group)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What is done inside is done by this process only: nothing is asked of the others."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def count() -> int:
    """How many processes there are; 1 without torch.distributed, or inside of [`alone`]."""
    if _ALONE.get() or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size()


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if count() > 1 else 0


def gathered(value: Any) -> list:
    """The value of each process, on all of them. It is pickled; tensors in its lists and dicts come to the CPU, as a
    device of another process is not one of this."""
    if count() == 1:
        return [value]
    with together():
        value = recursively_apply(torch.Tensor.cpu, value)
    return _told(value)


def _told(value: Any) -> list:
    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def of_the_first(value: Any) -> Any:
    """The value of the first process, on all of them; as with [`gathered`]."""
    if count() == 1:
        return value
    with together():
        values = [recursively_apply(torch.Tensor.cpu, value) if rank() == 0 else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def place_of(device: torch.device, backends: str) -> torch.device:
    """Where a tensor has to be to travel between processes.

    Args:
        device (`torch.device`): Where it is.
        backends (`str`): What carries tensors of which kind of device, as `torch.distributed.get_backend_config` has
            it: `"cuda:nccl"`, `"cpu:gloo,cuda:nccl"`.

    Returns:
        Its own device where something carries it there, else the CPU; where nothing carries what is on a CPU (nccl
        alone), this process's accelerator.
    """
    carried = dict(part.split(":") for part in backends.split(","))
    # gloo itself takes everything over the CPU.
    if carried.get(device.type, "gloo") != "gloo":
        return device
    return torch.device("cpu" if "cpu" in carried else next(iter(carried)))


def summed(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The sums of tensors over all processes, the same bits on each. In place where tensors travel from where they
    are."""
    if count() == 1:
        return list(tensors)
    results = []
    for tensor in tensors:
        there = _travelling(tensor)
        dist.all_reduce(there)
        dist.broadcast(there, src=0)
        results.append(_at(there, tensor.device))
    return results


def spread(tensors: Sequence[torch.Tensor]) -> None:
    """The first process's numbers go into the tensors of all, in place."""
    if count() == 1:
        return
    for tensor in tensors:
        there = _travelling(tensor.detach())
        dist.broadcast(there, src=0)
        tensor.data.copy_(there)


def _travelling(tensor: torch.Tensor) -> torch.Tensor:
    return _at(tensor, place_of(tensor.device, dist.get_backend_config()))


def _at(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    """The tensor at a place, in one piece."""
    # One process may have no memory for the copy, and whether there is one, each decides by its own device.
    with together():
        return tensor.to(place).contiguous()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What raises inside on one process raises on all, so that none waits for one that has gone. Nothing inside may
    wait for the others, not by another of these either: one that fails before it would be asked once, and they twice.

    Raises:
        ValueError: What another process raised was a TypeError or ValueError.
        RuntimeError: It was something else.
    """
    error = None
    try:
        yield
    except Exception as raised:  # whatever it is, such as no memory: the others wait for this process
        error = raised
    message = error and f"{type(error).__name__} on process {rank()}: {error}"
    of_this = message and (message, isinstance(error, (TypeError, ValueError)))
    told: list[Any] = [of_this] if count() == 1 else _told(of_this)
    if error is not None:
        raise error
    found = [each for each in told if each is not None]
    if found:
        kind = ValueError if all(refused for _, refused in found) else RuntimeError
        raise kind("\n".join(message for message, _ in found))
