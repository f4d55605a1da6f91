"""Finds a process of a run that hangs: each counts in a store that all read, and one that counts no more is named.

Torch waits half an hour for an exchange that does not come, and does not say for whom. A process that works counts on,
however long the others wait for it; one that is stopped, swapped out or waits for a disk does not.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

VARIABLE = "MINOPT_TIMEOUT_SECONDS"
_DEFAULT_SECONDS = 300.0
_TICKS = 20  # in that time
_LEFT = "-1"  # the count of a process that needs the others no more

_begun: Counter[tuple[int, ...]] = Counter()  # watches of the same processes, which must not read each other's counts
_alive: set[tuple[int, ...]] = set()


class Watch:
    """Counts for this process, and ends it when another one has not counted for the time limit.

    It ends only what waits: the thread that has made the watch has not moved in all that time either. Time is counted
    in ticks of this process, so that one that was stopped together with all others does not blame them.

    Args:
        store: the process group's; the watch makes its own connection to it.
        rank: this process's rank.
        ranks: all processes that have such a watch, this one among them.
    """

    def __init__(self, store: Any, rank: int, ranks: Iterable[int]) -> None:
        self._key = tuple(ranks)
        self._rank, self._others = rank, [other for other in self._key if other != rank]
        self._seconds = limit_seconds()
        self._done = threading.Event()
        self._counts: dict[int, int] = {}
        self._threads: list[threading.Thread] = []
        if not self._others or any(set(self._key) <= set(other) for other in _alive):
            return  # they are watched already
        _begun[self._key] += 1
        name = f"minopt/{'-'.join(map(str, self._key))}/{_begun[self._key]}"
        self._store = dist.PrefixStore(name, store.clone())  # type: ignore[attr-defined]
        _alive.add(self._key)
        for target in (self._count, functools.partial(self._judge, threading.get_ident())):
            self._threads.append(threading.Thread(target=target, daemon=True))
            self._threads[-1].start()

    def stop(self, well: bool = True) -> None:
        """Ends the watch. ``well``: this process has done its part, and the others do not expect it to count on."""
        if not self._threads:
            return
        self._done.set()
        _alive.discard(self._key)
        for thread in self._threads:
            thread.join(5)
        if well and not self._threads[0].is_alive():
            with contextlib.suppress(RuntimeError):  # the store has gone with the process that held it
                self._store.set(str(self._rank), _LEFT)

    def _count(self) -> None:
        """Counts, and reads the others' counts, which takes for ever where the process that holds the store hangs."""
        try:
            while not self._done.wait(self._seconds / _TICKS):
                self._store.add(str(self._rank), 1)
                self._counts = {other: self._store.add(str(other), 0) for other in self._others}
        except RuntimeError:  # the store is gone, which the exchange itself notices
            self._done.set()

    def _judge(self, waiting: int) -> None:
        """Looks at what was counted, and at the thread that waits."""
        counts, place = self._counts, None
        silent, unread, unmoved = Counter[int](), 0, 0  # ticks without a new count, new counts at all, and a move
        while not self._done.wait(self._seconds / _TICKS):
            found, frame = self._counts, sys._current_frames().get(waiting)
            here = None if frame is None else (id(frame), frame.f_lasti)
            del frame
            for other, count in found.items() if found is not counts else ():
                silent[other] = silent[other] + 1 if count == counts.get(other, 0) and count >= 0 else 0
            unread = unread + 1 if found is counts else 0
            unmoved = unmoved + 1 if here == place else 0
            counts, place = found, here
            hanging = [str(other) for other in self._others if silent[other] >= _TICKS]
            if unmoved >= _TICKS and hanging:
                is_first = True  # to find it: torchrun ends the others once one has ended
                with contextlib.suppress(RuntimeError):
                    is_first = self._store.add("told", 1) == 1
                if not is_first:
                    time.sleep(5)
                    os._exit(2)
                self._end(f"process {', '.join(hanging)}")
            if unmoved >= _TICKS and unread >= _TICKS:
                self._end("torchrun" if "TORCHELASTIC_USE_AGENT_STORE" in os.environ else "process 0")

    def _end(self, hanging: str) -> None:
        """Ends this process, whose main thread cannot be reached."""
        text = (
            f"minopt: error: {hanging} has not answered for {self._seconds:g} seconds: stopped, swapped out, or "
            f"waiting for a disk. Checkpoints are whole: start the run again. {VARIABLE} sets the time limit.\n"
        )
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        os._exit(2)


def limit_seconds() -> float:
    """After how many seconds a process that says nothing counts as one that hangs."""
    text = os.environ.get(VARIABLE, str(_DEFAULT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise ValueError(f"{VARIABLE}: expected a number of seconds above 0, got {text!r}. Change it, or leave it out.")
    return seconds
