"""What a command says of an error: one line of what to mend."""

from __future__ import annotations

import argparse
import errno
import os

from minopt.errors import is_connection_lost, is_out_of_memory, is_users

# The system's reasons that have an answer: what is said of a path, or alone.
_SYSTEMS = {
    errno.ENOENT: "there is no such file or folder. Check the path",
    errno.EISDIR: "expected a file, got a folder. Name a file in it",
    errno.ENOTDIR: "expected a folder, got a file on the way. Check the path",
    errno.EACCES: "permission denied. Change it, or name another path",
    errno.EPERM: "permission denied. Change it, or name another path",
    errno.EROFS: "cannot be written on this disk. Name another path",
    errno.ENOSPC: "the disk is full. Free some space, or name another path",
    errno.EDQUOT: "the disk quota is used up. Free some space, or name another path",
    errno.ENAMETOOLONG: "the name is too long. Check the path",
}


def explained(error: Exception, args: argparse.Namespace) -> str | None:
    """One line for an error that a user can mend; ``None`` for a bug of minopt's."""
    if is_out_of_memory(error):
        where = f"process {error.process}: " if hasattr(error, "process") else ""
        return f"{where}not enough memory. Try {args.when_out_of_memory}."
    if is_connection_lost(error):
        return (
            f"process {os.environ.get('RANK', '0')} has lost another one, which has died or is gone "
            f"({str(error).splitlines()[0][:200]})."
        )
    if not is_users(error):
        return None
    if isinstance(error, OSError) and error.errno is not None and error.strerror is not None:
        reason = _SYSTEMS.get(error.errno, error.strerror)
        if error.filename is None:
            return f"{reason}."
        name = str(error.filename)
        flags = args.parser.flags().items()
        flag = next((f"{flag}: " for dest, flag in flags if str(getattr(args, dest, None)) == name), "")
        return f"{flag}{name}: {reason}."
    return " ".join(str(error).split("\n"))
