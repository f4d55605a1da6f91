"""The processes of a run: who they are, and how they agree."""

from __future__ import annotations

import atexit
import functools
import gc
import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from minopt.devices import resolve_device
from minopt.errors import is_connection_lost, is_out_of_memory, is_users
from minopt.watch import Watch, limit_seconds

_T = TypeVar("_T")

_calls = itertools.count()  # of `processes`, the same in all of them

# An exchange may wait so long for a process that downloads or reads; one that hangs is found by its watch.
_LONGEST = timedelta(hours=6)


@dataclass(frozen=True)
class World:
    """One process among those of a run.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        device: the one on which this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sums numbers over all processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Waits until all processes have come here."""
        self.sum(0.0)

    def gather(self, value: _T) -> list[_T]:
        """The values of all processes, by rank; any that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, error: Exception | None) -> None:
        """Raises the first error of any process in all of them; each has to call it."""
        if error is not None and self.size == 1:
            raise error
        for process, packed in enumerate(self.gather(None if error is None else _packed(error, self.rank))):
            if packed is not None:
                common = _unpacked(packed, process, error if process == self.rank else None)
                raise common from (error.__cause__ if common is error else error)

    def first(self, run: Callable[[], _T]) -> _T:
        """Runs something in the first process alone; its result, which can be pickled, or its error is everyone's."""
        return self.gather(self.each(lambda: run() if self.is_first else None))[0]  # type: ignore[return-value]

    def first_then_all(self, run: Callable[[], _T]) -> _T:
        """Runs something in the first process, then in the others, which find what it has left in a cache."""
        result = self.each(lambda: run() if self.is_first else None)
        return self.each(lambda: cast(_T, result) if self.is_first else run())

    def each(self, run: Callable[[], _T]) -> _T:
        """Runs something in every process; the first error is everyone's."""
        result, error = None, None
        try:
            result = run()
        except Exception as e:
            if not isinstance(e, (ValueError, OSError)) and not is_out_of_memory(e):
                raise
            error = e
        self.agree(error)
        return cast(_T, result)


def _packed(error: Exception, rank: int) -> bytes:
    """An error as bytes, of its own type where a message alone makes one; of memory, with the process that lacks it."""
    if is_out_of_memory(error):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        error = torch.OutOfMemoryError(f"process {rank}: {reason}")
    try:
        packed = pickle.dumps(error)
        same = pickle.loads(packed)
        if type(same) is type(error) and str(same) == str(error):
            return packed
    except Exception:  # whatever the class does
        pass
    kinds = (FileNotFoundError, FileExistsError, ValueError, OSError)
    return pickle.dumps(next(kind for kind in kinds if isinstance(error, kind))(str(error)))


def _unpacked(packed: bytes, process: int, own: Exception | None) -> Exception:
    """The error of a process, which tells the user of it; in that process its ``own``, with its traceback."""
    error: Exception = pickle.loads(packed)
    if own is not None and type(own) is type(error) and str(own) == str(error):
        error = own
    error.process = process  # type: ignore[attr-defined]
    return error


@contextmanager
def processes(device: str | None) -> Iterator[World]:
    """Joins the processes that torchrun has started, by its environment variables; without them there is one.

    Args:
        device: ``"cpu"``, ``"cuda"``, or a device of a single process such as ``"cuda:1"``; ``None`` is the GPU if
            there is one.

    Raises:
        ValueError: if there is no such device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = resolve_device(device, int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else None)
    if chosen.type == "cuda":
        if chosen.index is None:  # torch sets no device without a number
            chosen = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        # torchrun sets it for want of anything better; an even share of the cores is meant.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", size))))
    joined_here = not dist.is_initialized()
    # Two backends: numbers of the processes (losses, errors) go by way of the CPU and do not wait for a GPU.
    watch = _join("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo") if joined_here else watch_group()
    end_well()
    world, key = World(dist.get_rank(), dist.get_world_size(), chosen), f"minopt-error-{next(_calls)}"
    try:
        yield world
    except BaseException as error:
        common = _common(error, world.rank, key) if isinstance(error, Exception) else None
        watch.stop(well=False)
        if common is None:
            raise
        raise common from (error.__cause__ if common is error else error)
    watch.stop()
    gc.collect()  # what was wrapped for the group, and holds it, may be in a cycle
    if joined_here:  # not after an error: the others may not come to the same point
        dist.destroy_process_group()


def _common(error: Exception, rank: int, key: str) -> Exception | None:
    """The error of the process that failed first, which has left word of it in the store that all share.

    All others only see that it is gone, and end with its error too. ``None`` where there is no other error to raise.
    """
    lost = is_connection_lost(error)
    if hasattr(error, "process") or not (lost or is_users(error) or is_out_of_memory(error)):
        return None
    try:
        store = _get_default_store()
        if lost and not store.check([key]):  # killed, without a word
            return None
        word = store.get(key) if lost else store.compare_set(key, "", f"{rank} {_packed(error, rank).hex()}")
    except RuntimeError:  # the store is gone as well
        return None
    process, packed = word.decode().split()
    return _unpacked(bytes.fromhex(packed), int(process), error if int(process) == rank else None)


def _join(backend: str) -> Watch:
    """Joins the group of all processes, each of which is watched from then on."""
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE: is set without {', '.join(missing)}. Start the processes with torchrun.")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store: Any = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, timeout=timedelta(seconds=limit_seconds()),
        is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # A restart by torchrun on one node goes on with the same store, which still has the addresses of dead
        # processes; several nodes meet anew for each.
        store = dist.PrefixStore(  # type: ignore[attr-defined]
            f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
        )
    watch = Watch(store, rank, range(size))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_LONGEST)
    return watch


def watch_group(group: dist.ProcessGroup | None = None) -> Watch:
    """Watches the processes of a group that somebody else has made; ``None`` is that of all."""
    store = _get_default_store()
    return Watch(store, dist.get_rank(), dist.get_process_group_ranks(group))


@functools.cache
def end_well() -> None:
    """Has this process, before it ends, wait for what gloo's threads still have to do.

    They let go of the tensors of the last exchange, for which they need the interpreter. One that is being taken apart
    ends such a thread, and with it the process ("terminate called without an active exception"), or waits for it for
    ever.
    """
    atexit.register(time.sleep, 0.1)
