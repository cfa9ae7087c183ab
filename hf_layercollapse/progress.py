"""One bar for all that a calibration does, with what is left of it."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm

from . import processes


class Progress:
    """Counts work in forward passes of one batch. Shown as one bar while it is entered.

    Args:
        title (`str`): What is being done.
        disable (`bool`): Whether nothing is shown.
    """

    def __init__(self, title: str = "", disable: bool = False) -> None:
        self.title, self.disable = title, disable
        self.done = self.expected = self.foreseen = 0.0
        self._batches, self._seconds = 0, 0.0
        self._parts, self._part = 0, 1.0  # how many are to come, and what each is taken for
        self._bar: Any = None  # while it is entered

    def __enter__(self) -> "Progress":
        # Without a unit: what is left is told by the time that it takes.
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        disable = self.disable or processes.rank() > 0
        self._bar = tqdm(desc=self.title, total=0, bar_format=form, leave=False, disable=disable)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()
        self._bar = None

    def say(self, what: str) -> None:
        """What is being done now."""
        if self._bar is not None:
            self._bar.set_description_str(f"{self.title}: {what}" if self.title else what, refresh=False)

    def foresee(self, batches: float) -> None:
        """About so many batches are to come, which are told of more exactly later."""
        self.foreseen += batches
        self._refresh()

    def expect(self, batches: float, parts: int = 0) -> None:
        """So many batches are to come, and parts of work that take as long as the first of them will show."""
        self.expected += batches + parts * self._part
        self.foreseen = max(0.0, self.foreseen - batches)
        self._parts += parts
        self._refresh()

    def step(self, seconds: float) -> None:
        """A batch is done, in so many seconds."""
        self._batches, self._seconds = self._batches + 1, self._seconds + seconds
        self._advance(1.0)

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """One of the parts of work: what is done inside."""
        start = time.perf_counter()
        yield
        took = (time.perf_counter() - start) / max(self._seconds / max(self._batches, 1), 1e-9)
        self.expected += max(self._parts, 1) * (took - self._part)
        self._parts, self._part = max(self._parts - 1, 0), took
        self._advance(took)

    def _advance(self, work: float) -> None:
        self.done += work
        # What was not known of before counts as known now.
        self.expected = max(self.expected, self.done)
        self._refresh()

    def _refresh(self) -> None:
        if self._bar is not None:
            self._bar.total = self.expected + self.foreseen
            self._bar.update(self.done - self._bar.n)
