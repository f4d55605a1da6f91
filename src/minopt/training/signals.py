"""SIGTERM and SIGINT as a wish to stop, which the loop grants after a step."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

_REPEATED = 5.0  # seconds within which signals count as one


class StopSignal:
    """The first signal that came; 0 if none has."""

    number: int = 0

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Notes signals instead of ending the process; a later one does what it would have done.

        Not one of the same moment: where a terminal or a scheduler signals all processes, torchrun does once more.
        """
        before: dict[int, Any] = {}
        first = 0.0

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal first
            if self.number == 0:
                self.number, first = int(number), time.monotonic()
            elif time.monotonic() - first > _REPEATED:
                signal.signal(number, before[number])
                signal.raise_signal(number)

        with contextlib.suppress(ValueError):  # not in the main thread: nothing to catch there
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for caught, handler in before.items():
                signal.signal(caught, handler)
