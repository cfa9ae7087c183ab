"""How much memory a calibration may take, and what of it is taken."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import convert_file_size_to_int
from packaging.version import Version

from . import processes


# Share of the free memory that a calibration may take, if nothing else is said.
FREE_SHARE = 0.5


class MemoryBudget:
    """Bytes for what a calibration holds beside the model and one forward pass: sums over the data, what is worked out
    from them, new weights that wait for their place, and inputs that cannot be read again.

    Args:
        max_memory (`int`, `str` or `dict`, *optional*): Bytes (`2_000_000_000`, `"2GB"`, `"500MB"`) of all devices
            together, or as accelerate has it a dict of them by device (`{0: "10GB", "cpu": "20GB"}`; `"cuda"` is the
            current one). Default, also for devices that the dict leaves out: half of what is free on the device when
            it is first asked for; of a CPU no more than what control groups (of a container or a job) leave.

    Raises:
        TypeError, ValueError: It is none of these, not positive, or names a device that there is not.
    """

    def __init__(self, max_memory: Any = None) -> None:
        self._limits: dict[torch.device, int] = {}
        self._total: int | None = None
        if isinstance(max_memory, dict):
            # What accelerate may put on disk is not held.
            given = {key: value for key, value in max_memory.items() if key != "disk"}
            self._limits = {_device_of(key): _bytes_of(value) for key, value in given.items()}
        elif max_memory is not None:
            self._total = _bytes_of(max_memory)
        self._held: dict[torch.device, int] = {}

    @property
    def is_one_number(self) -> bool:
        """Whether one number is for all devices together."""
        return self._total is not None

    def room(self, device: torch.device | str = "cpu") -> int:
        """Bytes that are left on a device."""
        device = _one_name(torch.device(device))
        if self._total is not None:
            return self._total - sum(self._held.values())
        if device not in self._limits:
            self._limits[device] = int(FREE_SHARE * _free(device))
        return self._limits[device] - self._held.get(device, 0)

    def hold(self, count: int, device: torch.device | str = "cpu") -> None:
        """Takes bytes of the budget, or gives them back where the count is negative."""
        device = _one_name(torch.device(device))
        self._held[device] = self._held.get(device, 0) + count

    def hold_all(self, counts: Mapping[torch.device, int]) -> None:
        """Takes bytes on each of these devices."""
        for device, count in counts.items():
            self.hold(count, device)

    @contextlib.contextmanager
    def holding(self, counts: Mapping[torch.device, int]) -> Iterator[None]:
        """Takes bytes on each of these devices for what is done inside."""
        self.hold_all(counts)
        try:
            yield
        finally:
            self.hold_all({device: -count for device, count in counts.items()})

    def fits(self, needed: Mapping[torch.device, int], in_turn: Mapping[torch.device, int] | None = None) -> bool:
        """Whether so many bytes are left on each of these devices, or of one number for all devices together.

        Args:
            in_turn (`dict[torch.device, int]`, *optional*): Further bytes, taken on one device after the other.
        """
        return all(count <= room for count, room, _ in self._compared(needed, in_turn or {}))

    def held(self, device: torch.device) -> int:
        """Bytes that count against the room of a device and are taken."""
        return self.counted_on(_one_name(device), self._held)

    def counted_on(self, device: torch.device, counts: Mapping[torch.device, int]) -> int:
        """How many of these bytes count against the room of a device: all, where one number is for all devices."""
        return sum(counts.values()) if self._total is not None else counts.get(device, 0)

    def times(self, needed: Mapping[torch.device, int]) -> int:
        """How often so many bytes on each of these devices fit."""
        return min(max(0, room) // max(1, count) for count, room, _ in self._compared(needed, {}))

    def told(self, needed: Mapping[torch.device, int]) -> str:
        """What of this does not fit, for a message: `"1,792 bytes, of 1,700 that there are"`."""
        compared = self._compared(needed, {})
        count, room, where = next((each for each in compared if each[0] > each[1]), compared[0])
        return f"{count:,} bytes, of {max(0, room):,} that there are{where}"

    def _compared(
        self, needed: Mapping[torch.device, int], in_turn: Mapping[torch.device, int]
    ) -> list[tuple[int, int, str]]:
        """`[(bytes that are needed, bytes that are left, where)]`."""
        if self._total is not None:
            return [(sum(needed.values()) + max(in_turn.values(), default=0), self.room(), "")]
        devices = dict.fromkeys([*needed, *in_turn])
        return [
            (needed.get(device, 0) + in_turn.get(device, 0), self.room(device), f" on {device}") for device in devices
        ]


def _bytes_of(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f'`max_memory` must be bytes, or a size such as "2GB", got {value!r}.')
    try:
        count = convert_file_size_to_int(value)
    except ValueError:
        count = -1
    if count <= 0:
        raise ValueError(f'`max_memory` must be a positive number of bytes, or a size such as "2GB", got {value!r}.')
    return count


def _device_of(key: Any) -> torch.device:
    try:
        device = torch.device(key)
    except (RuntimeError, TypeError):
        device = None
    if device is None or not _exists(device):
        raise ValueError(f"`max_memory` names the device {key!r}, and there is none such here.")
    return _one_name(device)


def _exists(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != device.type:
        return False
    return device.index is None or device.index < torch.accelerator.device_count()


# Devices whose tensors lie in the memory of the host, or nowhere.
_OF_HOST = ("cpu", "mps", "meta")

# From this version on torch says of every accelerator how much is free (2.13 does; earlier ones were not looked at).
_EVERY_ACCELERATOR = (2, 13)


def _one_name(device: torch.device) -> torch.device:
    """The host's, and the one device of its kind, without an index, every other with one: the current one's."""
    if device.type in _OF_HOST:
        return torch.device(device.type)
    return device if device.index is not None else torch.device(device.type, torch.accelerator.current_device_index())


def _free(device: torch.device) -> int:
    if device.type in _OF_HOST:
        free = [psutil.virtual_memory().available, *left_by_control_groups()]
        # Processes of one host share it.
        return min(free) // processes.count()
    if device.type == "cuda":
        # What torch keeps of freed tensors is free for others.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if Version(torch.__version__).release < _EVERY_ACCELERATOR:
        raise ValueError(
            f"How much memory is free on {device} torch {torch.__version__} does not say: pass `max_memory`, such as "
            f'{{"{device}": "10GB"}}.'
        )
    cached = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return torch.accelerator.get_memory_info(device)[0] + cached


# Of control groups: the folder of their limits, files of the limit and of what is used, and the line of the used that
# is cache of files, which is given up where memory is short; by version.
_GROUPS = {
    2: ("", "memory.max", "memory.current", "inactive_file"),
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def left_by_control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes that each control group of this process (Docker's, Kubernetes's, Slurm's) leaves of its limit; none where
    there is no limit, or no such group.

    Args:
        root (`Path`): Where groups are mounted.
        own (`Path`): What says which are this process's, in lines of `number:controllers:path`.
    """
    left: list[int] = []
    try:
        lines = own.read_text().splitlines()
    except OSError:  # this is no Linux
        return left
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        folder, limit, used, cache = _GROUPS[2 if number == "0" else 1]
        # A container may see its own group as the root, under the path that the host has for it.
        inner = Path(path.lstrip("/"))
        for group in (root / folder / part for part in (inner, *inner.parents)):
            try:
                most, taken = (group / limit).read_text().strip(), int((group / used).read_text())
            except OSError:  # there is no such group, or it may not be read
                continue
            if most != "max":
                left.append(max(0, int(most) - taken + _cached_in(group, cache)))
    return left


def _cached_in(group: Path, name: str) -> int:
    """Bytes of a control group's cache of files; 0 where it does not say (gVisor's have no `memory.stat`)."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
