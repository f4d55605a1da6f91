"""Tells errors apart: those that the user can correct, a full memory, a lost process, and bugs in minopt."""

from __future__ import annotations

import os
import re
from opcode import opname

# What gloo and NCCL say of a process that is gone.
_CONNECTION_LOST = re.compile("connection (closed|reset|refused)|broken pipe|timed out|socket", re.IGNORECASE)
_OUT_OF_MEMORY = re.compile("OutOfMemoryError|out of memory|can't allocate memory")


def is_users(error: BaseException) -> bool:
    """Whether an error says what a user can mend: a ``raise`` of minopt's made it, or the system did (``OSError``).

    A ``ValueError`` that torch, numpy or Python raised beneath minopt is a bug of minopt's.
    """
    at = error.__traceback__
    if isinstance(error, OSError) or not isinstance(error, ValueError) or at is None:
        return isinstance(error, OSError)
    while at.tb_next is not None:
        at = at.tb_next
    is_minopts = at.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "minopt"
    return is_minopts and opname[at.tb_frame.f_code.co_code[at.tb_lasti]] == "RAISE_VARARGS"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, on a GPU or on the machine."""
    said = _OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and said is not None)


def is_connection_lost(error: BaseException) -> bool:
    """Whether another process of a run has died or is gone; one that runs alone has none to lose."""
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return not is_alone and isinstance(error, RuntimeError) and _CONNECTION_LOST.search(str(error)) is not None
