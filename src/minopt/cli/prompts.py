"""Prompts of ``minopt generate`` from files and standard input, and files of results, which can be continued."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minopt.cli.messages import tell
from minopt.cli.records import check_output
from minopt.settings import option

# The keys of an output line, beside those of the prompt's own.
_WRITTEN = {
    "index", "sequence", "text", "stop_reason", "score", "token_ids", "logprobs", "top_logprobs", "drafted_tokens",
    "accepted_tokens",
}  # fmt: skip


@dataclass(frozen=True)
class Files:
    """Flags of ``minopt generate`` for many prompts."""

    input: str | None = option(None, 'a prompt a line, or in a .jsonl {"prompt": ...} (-: standard input)', kind="file")
    output: str | None = option(None, "write JSON lines, in the order of the prompts (stdout)", kind="file")
    unordered: bool = option(False, "write each result as soon as it is done, long prompts first")
    resume: bool = option(False, "continue an unfinished output; its prompts are compared, flags are not")
    force: bool = option(False, "replace an output file that exists")
    batch_size: int | None = option(None, "the most prompts that run together (as --max_batch_tokens allows)")
    max_batch_tokens: int | None = option(
        None, "the most tokens that run together, new ones and padding included (8192)"
    )


@dataclass
class Work:
    """The prompts of an input, and what is left to do."""

    prompts: list[dict[str, Any]]  # objects with a "prompt"
    todo: list[int]  # the indices of those without a result
    kept_bytes: int = 0  # of the output that is there
    sequences: int | None = None  # continuations of each prompt in it, if there is any

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


def plan_work(files: Files, sequences: int | None) -> Work:
    """Reads prompts, checks where results are to go, and finds those that are there, before a model is loaded."""
    assert files.input is not None
    path, output = Path(files.input), None if files.output is None else Path(files.output)
    prompts = _prompts(read_standard_input() if files.input == "-" else _decoded(path.read_bytes(), path), path)
    work = Work(prompts, list(range(len(prompts))))
    if output is not None:
        if path.is_file() and output.exists() and path.samefile(output):
            raise ValueError(f"--output: {output} is the --input too. Name another file.")
        check_output(output, files.force or files.resume, "replace it with --force, or continue it with --resume")
        if files.resume and output.is_file():
            _find_results(work, output, sequences)
        if not prompts:
            output.write_text("")
    if not prompts:
        tell(f"{path}: has no prompts, so there are no results")
    elif not work.todo:
        tell(
            f"{output}: has results of all {len(prompts)} prompts. Flags are not compared: --force generates them anew"
        )
    return work


def _prompts(text: str, path: Path) -> list[dict[str, Any]]:
    """Objects with a prompt: a line each of a text, or those of a .jsonl with all that they hold."""
    lines = text.removesuffix("\n").split("\n") if text else []
    if path.suffix.lower() == ".json":
        raise ValueError(f"{path}: expected lines of text, or a .jsonl with an object a line. Rename or convert it.")
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return [_record(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if blank := [number for number, line in enumerate(lines, 1) if not line.strip()]:
        tell(f"{path}: {len(blank)} of {len(lines)} lines are blank, line {blank[0]} first: each is an empty prompt")
    return [{"prompt": line} for line in lines]


def _record(line: str, where: str) -> dict[str, Any]:
    """The object in a line of a .jsonl."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({getattr(error, 'msg', error)}).") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f'{where}: expected an object with a text "prompt", got {line[:80]!r}.')
    if taken := sorted(_WRITTEN & record.keys()):
        raise ValueError(f"{where}: the output writes {', '.join(taken)} itself. Rename what is there.")
    return record


def _find_results(work: Work, output: Path, sequences: int | None) -> None:
    """Finds which prompts have all their continuations in an output, and where the last of those ends."""
    counts, ends = dict[int, int](), [0]  # continuations of each prompt; where each prompt's last one ends
    last: int | None = None
    for number, line in enumerate(output.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break  # written by half
        index, sequence = _result(line, work)
        if index != last and sequence == 0 and index not in counts:
            ends.append(ends[-1])
        elif index != last or sequence != counts[index]:
            raise ValueError(
                f"{output}: line {number} is not a result of this --input. Name another --output, or use --force."
            )
        counts[index], last = sequence + 1, index
        ends[-1] += len(line)
    each = sequences or max(counts.values(), default=0)
    if last is not None and counts[last] < each:  # the rest of it is missing
        del counts[last], ends[-1]
    work.todo = [index for index in work.todo if index not in counts]
    work.kept_bytes = ends[-1]
    for work.sequences in counts.values():
        work.check(each)


def _result(line: bytes, work: Work) -> tuple[int, int]:
    """Index and sequence of an output's line; an index of -1 if it is not of the prompt with that index."""
    try:
        record = json.loads(line)
        index, prompt = record["index"], work.prompts[record["index"]]
        same = index >= 0 and all(record[name] == value for name, value in prompt.items())
        return (index, record["sequence"]) if same else (-1, -1)
    except (ValueError, TypeError, LookupError, RecursionError):
        return -1, -1


def write_results(results: Iterator[Any], work: Work, output: str | None) -> None:
    """Lines of JSON for each prompt, written as soon as they are there; what has been written stays if it breaks."""
    done, empty, file = len(work.prompts) - len(work.todo), 0, None
    with contextlib.ExitStack() as stack:
        try:
            for number, records in results:
                if file is None:  # an old file is kept until there is something new
                    file = stack.enter_context(_open(output, work.kept_bytes))
                index = work.todo[number]
                for sequence, record in enumerate(records):
                    line = {**work.prompts[index], "index": index, "sequence": sequence, **_fields(record)}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                done, empty = done + 1, empty + sum(not record.text for record in records)
        except KeyboardInterrupt:
            if output is not None:  # as in the first process only
                tell(f"interrupted, with {done} of {len(work.prompts)} prompts in {output}: go on with --resume")
            raise
    if empty and os.environ.get("RANK", "0") == "0":
        tell(f"{empty} continuations are empty: the model ended them at once (--min-new-tokens 1 forbids that)")


def _open(output: str | None, kept_bytes: int) -> contextlib.AbstractContextManager[Any]:
    """The output file, to be written on after what is kept of it."""
    if output is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # as JSON has to be, whatever the terminal's is
        return contextlib.nullcontext(sys.stdout)
    if kept_bytes:
        os.truncate(output, kept_bytes)
    return open(output, "a" if kept_bytes else "w", encoding="utf-8", newline="\n")


def _fields(record: Any) -> dict[str, Any]:
    """The fields of an output line for a continuation."""
    found = {"text": record.text, "stop_reason": record.stop_reason}
    if record.score is not None:
        found["score"] = record.score if math.isfinite(record.score) else None  # JSON has no infinity
    if record.logprobs or record.top_logprobs:
        found["token_ids"] = record.token_ids
    for name in ("logprobs", "top_logprobs", "drafted_tokens", "accepted_tokens"):
        if getattr(record, name) not in (None, ()):
            found[name] = getattr(record, name)
    return found
