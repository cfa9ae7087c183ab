"""A stand-in for Apple's MPS on machines without it: tensors that say they are there, are computed on the CPU, and are
never float64, as there."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


DEVICE = torch.device("mps", 0)


class _There(torch.Tensor):
    """A tensor on the device; `held` is where its numbers are."""

    @staticmethod
    def __new__(cls, held):
        # Of the device that torch itself was built for; what asks in Python hears of the other.
        there = torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), dtype=held.dtype)
        there.held = held
        return there

    device = property(lambda self: DEVICE)

    def cpu(self):
        return self.held

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class Mps(TorchDispatchMode):
    """While it is on, `"mps"` is a device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


def _run(operation, args, kwargs):
    there = any(isinstance(value, _There) for value in tree_flatten((args, kwargs))[0])
    device = kwargs.get("device")
    if device is not None:
        there = torch.device(device).type == "mps"
        kwargs = {**kwargs, "device": torch.device("cpu") if there else device}
    args, kwargs = tree_map(lambda value: value.held if isinstance(value, _There) else value, (args, kwargs))
    return tree_map(_moved, operation(*args, **kwargs)) if there else operation(*args, **kwargs)


def _moved(value):
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    return _There(value)
