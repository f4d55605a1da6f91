"""Prompts of ``minopt generate`` from files and standard input, and files of results, which can be gone on with."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minopt.cli.common import check_output, tell

# The keys of an output line, beside those of the prompt's own.
_WRITTEN = {
    "index", "sequence", "text", "stop_reason", "score", "token_ids", "logprobs", "top_logprobs", "drafted_tokens",
    "accepted_tokens",
}  # fmt: skip


@dataclass
class Work:
    """What is to be done.

    Attributes:
        prompts: of the input, each an object with a ``"prompt"``.
        todo: the indices of those without a result.
        kept_bytes: of the output that is there.
        sequences: continuations of each prompt in it; ``None`` if there is none.
    """

    prompts: list[dict[str, Any]] = field(default_factory=list)
    todo: list[int] = field(default_factory=list)
    kept_bytes: int = 0
    sequences: int | None = None

    def check(self, sequences: int) -> None:
        """Raises ``ValueError`` if the output has another number of continuations a prompt."""
        if self.sequences not in (None, sequences):
            raise ValueError(
                f"--resume: expected {sequences} continuations of a prompt, got an output with {self.sequences}. "
                "Give the flags that it was begun with."
            )


def is_piped() -> bool:
    """Whether standard input is a pipe or a file."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # there is none
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def read_standard_input() -> str:
    """All of it."""
    if sys.stdin is None:
        raise ValueError("stdin: expected a text, got none: it is closed.")
    if sys.stdin.isatty():
        tell("reading standard input up to its end (Ctrl-D)")
    return _decoded(sys.stdin.buffer.read(), "stdin")


def _decoded(data: bytes, name: object) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8, {error}. Convert it.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def plan_work(source: str, output: str | None, force: bool, resume: bool, sequences: int | None) -> Work:
    """Reads prompts, checks where results are to go, and finds those that are there, before a model is loaded."""
    path = Path(source)
    prompts = _prompts(read_standard_input() if source == "-" else _decoded(path.read_bytes(), path), path)
    work = Work(prompts, list(range(len(prompts))))
    if output is not None:
        if path.is_file() and Path(output).exists() and path.samefile(output):
            raise ValueError(f"--output: {output} is the --input too. Name another file.")
        check_output(Path(output), force or resume, "replace it with --force, or continue it with --resume")
        if resume and Path(output).is_file():
            _find_results(work, Path(output), sequences)
    if not prompts:
        tell(f"{source}: has no prompts, so there are no results")
    elif not work.todo:
        tell(f"{output}: has the results of all {len(prompts)} prompts already")
    if not prompts and output is not None:
        Path(output).write_text("")
    return work


def _prompts(text: str, path: Path) -> list[dict[str, Any]]:
    """Objects with a prompt: a line each of a text, or those of a .jsonl with all that they hold."""
    lines = text.removesuffix("\n").split("\n") if text else []
    if path.suffix.lower() == ".json":
        raise ValueError(f"{path}: expected lines of text, or a .jsonl with an object a line. Rename or convert it.")
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        if blank := [number for number, line in enumerate(lines, 1) if not line.strip()]:
            tell(
                f"{path}: {len(blank)} of {len(lines)} lines are blank, line {blank[0]} first: each is an empty prompt"
            )
        return [{"prompt": line} for line in lines]
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is no JSON ({getattr(error, 'msg', error)}).") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ValueError(f'{path}: line {number}: expected an object with a text "prompt", got {line[:80]!r}.')
        if taken := sorted(_WRITTEN & record.keys()):
            raise ValueError(
                f"{path}: line {number}: the output writes {', '.join(taken)} itself. Rename what is there."
            )
        prompts.append(record)
    return prompts


def _find_results(work: Work, output: Path, sequences: int | None) -> None:
    """Which prompts have all their continuations in an output; what is behind the last of those is to be cut."""
    found: list[tuple[int, int, int]] = []  # a prompt's index, how many continuations, where the last ends
    end = 0
    for number, line in enumerate(output.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break  # written by half
        index, sequence = _result(line, work) or (-1, 0)
        if index < 0 or (sequence != 0 and (not found or found[-1][:2] != (index, sequence))):
            raise ValueError(
                f"{output}: line {number} is not a result of this --input. Name another --output, or use --force."
            )
        end += len(line)
        if sequence:
            found.pop()
        found.append((index, sequence + 1, end))
    each = sequences or max((count for _, count, _ in found), default=0)
    if found and found[-1][1] < each:
        found.pop()
    work.todo = sorted(set(work.todo) - {index for index, _, _ in found})
    work.kept_bytes = found[-1][2] if found else 0
    for _, count, _ in found:
        work.sequences = count
        work.check(each)


def _result(line: bytes, work: Work) -> tuple[int, int] | None:
    """Index and sequence of an output's line; ``None`` if it is not of the prompt with that index."""
    try:
        record = json.loads(line)
        prompt = work.prompts[record["index"]]
        same = record["index"] >= 0 and all(record[name] == value for name, value in prompt.items())
        return (record["index"], record["sequence"]) if same else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def write_results(results: Iterator[Any], work: Work, output: str | None) -> None:
    """Lines of JSON for each prompt, written out when they are there; what has been written stays if it breaks."""
    done, empty, file = len(work.prompts) - len(work.todo), 0, None
    with contextlib.ExitStack() as stack:
        try:
            for number, records in results:
                if file is None:  # an old file is kept until there is something new
                    file = stack.enter_context(_open(output, work.kept_bytes))
                index = work.todo[number]
                lines = [json.dumps(work.prompts[index] | _fields(index, *pair), ensure_ascii=False) + "\n"
                         for pair in enumerate(records)]  # fmt: skip
                file.write("".join(lines))
                file.flush()
                done, empty = done + 1, empty + sum(not record.text for record in records)
        except KeyboardInterrupt:
            if output is not None:  # as in the first process only
                tell(f"interrupted, with {done} of {len(work.prompts)} prompts in {output}: go on with --resume")
            raise
    if empty and os.environ.get("RANK", "0") == "0":
        tell(f"{empty} continuations are empty: the model ended them at once (--min-new-tokens 1 forbids that)")


def _open(output: str | None, kept_bytes: int) -> contextlib.AbstractContextManager[Any]:
    """The output, behind what is kept of it."""
    if output is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # as JSON has to be, whatever the terminal's is
        return contextlib.nullcontext(sys.stdout)
    if kept_bytes:
        os.truncate(output, kept_bytes)
    return open(output, "a" if kept_bytes else "w", encoding="utf-8", newline="\n")


def _fields(index: int, sequence: int, record: Any) -> dict[str, Any]:
    """What an output line has beside the prompt's own."""
    fields: dict[str, Any] = {"index": index, "sequence": sequence, "text": record.text}
    fields["stop_reason"] = record.stop_reason
    if record.score is not None:
        fields["score"] = record.score if math.isfinite(record.score) else None  # JSON has no infinity
    if record.logprobs:
        fields |= {"token_ids": record.token_ids, "logprobs": record.logprobs}
    if record.top_logprobs:
        fields |= {"token_ids": record.token_ids, "top_logprobs": record.top_logprobs}
    if record.drafted_tokens is not None:
        fields |= {"drafted_tokens": record.drafted_tokens, "accepted_tokens": record.accepted_tokens}
    return fields
