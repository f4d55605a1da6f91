"""``minopt generate``: one text, or files of prompts and of results, which can be continued."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from minopt.cli.flags import given_to, utf8
from minopt.cli.records import Loading, check_output, tell
from minopt.generation.options import GenerationConfig, check_values, with_defaults
from minopt.settings import option

if TYPE_CHECKING:
    from minopt.text import LanguageModel

MAX_NEW_TOKENS = 30  # where neither a flag nor the model says how many
_MANY = ("output", "unordered", "resume", "force", "batch_size", "max_batch_tokens", "output_logprobs", "top_logprobs")

# The keys of an output line, beside those of the prompt's own.
_DETAILS = ("logprobs", "top_logprobs", "drafted_tokens", "accepted_tokens")
_WRITTEN = {"index", "sequence", "text", "stop_reason", "score", "token_ids", *_DETAILS}


@dataclass(frozen=True)
class Generate(Loading):
    """Continues a text and shows it token by token; or continues each prompt of a file, in batches. Under torchrun the
    processes divide the model among them.
    """

    summary = "continue a text, or each prompt of a file"
    records = (GenerationConfig,)
    titles: ClassVar = {
        "input": "many prompts",
        "offload": "how the model is loaded",
        "max_new_tokens": "how long",
        "do_sample": "how the next token is chosen",
        "prompt_lookup_num_tokens": "prompt lookup: the same tokens in fewer steps where a text repeats itself",
        "repetition_penalty": "rules on tokens",
        "output_logprobs": "what is written of many prompts beside the texts",
    }
    defaults: ClassVar = {"max_new_tokens": MAX_NEW_TOKENS}
    without = ("output_scores",)

    prompt: str | None = option(None, 'the text to continue, in quotes ("": nothing; -: standard input)', is_word=True)
    echo: bool = option(False, "write the prompt first")
    skip_special_tokens: bool = option(True, "leave special tokens such as </s> out of the text")

    input: str | None = option(None, 'a prompt a line, or in a .jsonl {"prompt": ...} (-: standard input)', kind="file")
    output: str | None = option(None, "write JSON lines, in the order of the prompts (stdout)", kind="file")
    unordered: bool = option(False, "write each result as soon as it is done, long prompts first")
    resume: bool = option(False, "continue an unfinished output; its prompts are compared, flags are not")
    force: bool = option(False, "replace an output file that exists")
    batch_size: int | None = option(None, "the most prompts that run together (as --max_batch_tokens allows)")
    max_batch_tokens: int | None = option(None, "the most tokens that run together, with new ones and padding (8192)")

    offload: str | None = option(None, "where layers wait that do not fit on the device", choices=("disk", "cpu"))
    draft: str | None = option(
        None, "int8, or a smaller model: it drafts, and the text is as without, in less time (not with beams)"
    )
    optimize: bool | Literal["compile"] = option(
        True, "true: packed weights; false: the plain model; compile: faster, after a minute"
    )

    def run(self, given: dict[str, Any]) -> None:
        options, prompt, work = given_to(GenerationConfig, given), self.prompt, None
        if prompt is None and self.input is None and _is_piped():
            tell("reading the prompt from standard input")
            prompt = "-"
        self._check_combination(given, prompt)
        check_values(options)  # complain before a model is loaded or fetched
        if os.environ.get("RANK", "0") == "0":  # files may differ from machine to machine
            if prompt is not None:
                prompt = _read("-").removesuffix("\n") if prompt == "-" else utf8(prompt)
            if self.input is not None:
                work = self._plan_work(self.input, options.get("num_return_sequences"))
            if self.model is None:
                tell("no --model given, using the small demo model (see minopt generate --help)")
        if os.environ.get("WORLD_SIZE", "1") == "1":
            self._generate(options, prompt, work)
            return
        from torch.distributed.device_mesh import init_device_mesh

        from minopt.distributed import processes

        with processes(self.device) as world, contextlib.ExitStack() as stack:
            prompt, work = world.gather((prompt, work))[0]
            call = replace(self, device=None)
            if not world.is_first:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                call = replace(call, output=None)
            call._generate(options, prompt, work, mesh=init_device_mesh(world.device.type, (world.size,)))

    def _check_combination(self, given: dict[str, Any], prompt: str | None) -> None:
        """Refuses flags that do not go together."""
        if (prompt is None) == (self.input is None):
            got = "neither" if prompt is None else "both"
            raise ValueError(f"prompt: expected a prompt or --input, got {got}. Either may be -, for standard input.")
        for name in _MANY:
            if name in given and self.input is None:
                raise ValueError(f"--{name}: goes with --input. Leave it out beside one text.")
        if self.input is not None and self.echo:
            raise ValueError("--echo: the output of --input has the prompts already. Leave it out.")
        if self.resume and (self.force or self.output is None):
            raise ValueError("--resume: needs --output, and cannot be combined with --force.")
        if self.model is None and self.revision is not None:
            raise ValueError("--revision: goes with --model. The small demo model has no revisions.")

    def _plan_work(self, input: str, sequences: int | None) -> Work:
        """Reads prompts, checks where results are to go, and finds those that are there, before a model is loaded."""
        path, output = Path(input), None if self.output is None else Path(self.output)
        prompts = _prompts(_read(input), path)
        work = Work(prompts, list(range(len(prompts))))
        if output is not None:
            if path.is_file() and output.exists() and path.samefile(output):
                raise ValueError(f"--output: {output} is the --input too. Name another file.")
            check_output(output, self.force or self.resume, "replace it with --force, or continue it with --resume")
            if self.resume and output.is_file():
                _find_results(work, output, sequences)
            if not prompts:
                output.write_text("")
        if not prompts:
            tell(f"{path}: has no prompts, so there are no results")
        elif not work.todo:
            said = f"has results of all {len(prompts)} prompts. Flags are not compared: --force generates them anew"
            tell(f"{output}: {said}")
        elif self.draft == "int8" and len(work.todo) > 1:
            tell("--draft int8: is for one text. These run in full batches without it, which is faster.")
        return work

    def _generate(self, options: dict[str, Any], prompt: str | None, work: Work | None, **mesh: Any) -> None:
        """Loads the model, or this process' share of it, and writes the continuations."""
        if work is not None and not work.todo:
            return
        # A model's own draft is for one text: full batches are faster.
        own = "int8" if self.draft == "int8" and (work is None or len(work.todo) == 1) else None
        lm = self.load(offload=self.offload, optimize=self.optimize, draft=own, **mesh)
        options = {"max_new_tokens": lm.generation_defaults.get("max_new_tokens", MAX_NEW_TOKENS), **options}
        config = with_defaults(lm.generation_defaults, options)
        options["skip_special_tokens"] = self.skip_special_tokens
        if self.draft not in (None, "int8"):
            options["draft"] = self._other_draft(self.draft, **mesh)
        elif own is not None:
            options["draft"] = lm.draft
        if work is not None:
            work.check(config.num_return_sequences)
            options |= {"batch_size": self.batch_size, "max_batch_tokens": self.max_batch_tokens}
            texts = [work.prompts[index]["prompt"] for index in work.todo]
            results = lm.generate_each(texts, in_order=not self.unordered, show_progress=True, **options)
            _write_results(results, work, self.output)
            return
        assert prompt is not None
        before, texts = prompt if self.echo else "", []
        if config.num_beams == config.num_return_sequences == 1:
            print(before, end="", flush=True)
            for piece in lm.stream(prompt, **options):
                print(piece, end="", flush=True)
                texts.append(piece)
            print()
        else:
            found = lm.generate(prompt, **options)
            texts = [found] if isinstance(found, str) else found
            print(*(before + text for text in texts), sep="\n---\n")
        if not any(texts) and os.environ.get("RANK", "0") == "0":
            tell("the continuation is empty: the model ended it at once (--min-new-tokens 1 forbids that).")

    def _other_draft(self, model: str, **mesh: Any) -> LanguageModel:
        """A smaller model that drafts, on the same device and in the same dtype."""
        call = Loading(model=model, device=self.device, dtype=self.dtype, local_files_only=self.local_files_only)
        return call.load(**mesh)


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


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # there is none
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _read(name: str) -> str:
    """The text of a file; ``-`` is standard input."""
    if name != "-":
        data = Path(name).read_bytes()
    elif sys.stdin is None:
        raise ValueError("stdin: expected a text, got none: it is closed.")
    else:
        name = "stdin"
        if sys.stdin.isatty():
            tell("reading standard input up to its end (Ctrl-D)")
        data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8, {error}. Convert it.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _prompts(text: str, path: Path) -> list[dict[str, Any]]:
    """Objects with a prompt: a line each of a text, or those of a .jsonl with all that they hold."""
    lines = list(enumerate(text.removesuffix("\n").split("\n") if text else [], 1))
    if path.suffix.lower() == ".json":
        raise ValueError(f"{path}: expected lines of text, or a .jsonl with an object a line. Rename or convert it.")
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return [_record(line, f"{path}: line {number}") for number, line in lines if line.strip()]
    if blank := [number for number, line in lines if not line.strip()]:
        tell(f"{path}: {len(blank)} of {len(lines)} lines are blank, line {blank[0]} first: each is an empty prompt")
    return [{"prompt": line} for _, line in lines]


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
    counts, sizes, last = dict[int, int](), dict[int, int](), -1  # continuations and bytes of each prompt, in order
    for number, line in enumerate(output.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break  # written by half
        index, sequence = _place(line, work)
        if sequence != counts.get(index, 0) or (sequence > 0 and index != last):
            raise ValueError(
                f"{output}: line {number} is not a result of this --input. Name another --output, or use --force."
            )
        counts[index], sizes[index], last = sequence + 1, sizes.get(index, 0) + len(line), index
    each = sequences or max(counts.values(), default=0)
    if counts and counts[last] < each:  # the rest of it is missing
        del counts[last]
    for work.sequences in counts.values():
        work.check(each)
    work.todo = [index for index in work.todo if index not in counts]
    work.kept_bytes = sum(sizes[index] for index in counts)


def _place(line: bytes, work: Work) -> tuple[int, int]:
    """Index and sequence of an output's line; -1 if it is not of the prompt with that index."""
    try:
        record = json.loads(line)
        index, prompt = record["index"], work.prompts[record["index"]]
        same = index >= 0 and all(record[name] == value for name, value in prompt.items())
        return (index, record["sequence"]) if same else (-1, -1)
    except (ValueError, TypeError, LookupError, RecursionError):
        return -1, -1


def _write_results(results: Iterator[Any], work: Work, output: str | None) -> None:
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
    details = {name: getattr(record, name) for name in _DETAILS}
    return found | {name: value for name, value in details.items() if value not in (None, ())}
