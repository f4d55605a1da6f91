"""``minopt generate``."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from minopt import DEMO
from minopt.cli.flags import fill, utf8
from minopt.cli.messages import tell
from minopt.cli.prompts import Files, Work, is_piped, plan_work, read_standard_input, write_results
from minopt.cli.records import Loading
from minopt.generation.options import GenerationConfig, check_values, with_defaults
from minopt.settings import option

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from minopt.text import LanguageModel

MAX_NEW_TOKENS = 30  # where neither a flag nor the model says how many


@dataclass(frozen=True)
class Generate(Loading):
    """Continues a text and shows it token by token; or continues each prompt of a file, in batches. Under torchrun the
    processes divide the model among them.
    """

    summary = "continue a text, or each prompt of a file"
    records = (Files, GenerationConfig)
    titles: ClassVar = {
        "offload": "how the model is loaded",
        "input": "many prompts",
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
    offload: str | None = option(None, "where layers wait that do not fit on the device", choices=("disk", "cpu"))
    optimize: bool | Literal["compile"] = option(
        True, "true: packed weights; false: the plain model; compile: faster, after a minute"
    )

    def run(self, given: dict[str, Any]) -> None:
        files, prompt, work = fill(Files, given), self.prompt, None
        options = {f.name: given[f.name] for f in fields(GenerationConfig) if f.name in given}
        if prompt is None and files.input is None and is_piped():
            tell("reading the prompt from standard input")
            prompt = "-"
        _check_combination(self, files, given, prompt)
        check_values(options)  # complain before a model is loaded or fetched
        if os.environ.get("RANK", "0") == "0":  # files may differ from machine to machine
            if prompt is not None:
                prompt = read_standard_input().removesuffix("\n") if prompt == "-" else utf8(prompt)
            if files.input is not None:
                work = plan_work(files, options.get("num_return_sequences"))
            if self.model is None:
                tell("no --model given, using the small demo model (see minopt generate --help)")
        if os.environ.get("WORLD_SIZE", "1") == "1":
            _run(self, files, options, prompt, work)
            return
        from torch.distributed.device_mesh import init_device_mesh

        from minopt.distributed import processes

        with processes(self.device) as world, contextlib.ExitStack() as stack:
            prompt, work = world.gather((prompt, work))[0]
            if not world.is_first:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                files = replace(files, output=None)
            mesh = init_device_mesh(world.device.type, (world.size,))
            _run(replace(self, device=None), files, options, prompt, work, mesh)


def _check_combination(call: Generate, files: Files, given: dict[str, Any], prompt: str | None) -> None:
    """Refuses flags that do not go together."""
    if (prompt is None) == (files.input is None):
        raise ValueError(
            "prompt: expected one, or --input with a file of them. Either may be -, which is standard input."
        )
    for name in (*(f.name for f in fields(Files)), "output_logprobs", "top_logprobs"):
        if name in given and files.input is None:
            raise ValueError(f"--{name}: goes with --input. Leave it out beside one text.")
    if files.input is not None and call.echo:
        raise ValueError("--echo: the output of --input has the prompts already. Leave it out.")
    if files.resume and (files.force or files.output is None):
        raise ValueError(f"--resume: goes with --output{' and without --force' if files.force else ''}.")
    if call.model is None and call.revision is not None:
        raise ValueError("--revision: goes with --model. The small demo model has no revisions.")


def _run(
    call: Generate, files: Files, options: dict[str, Any], prompt: str | None, work: Work | None,
    mesh: DeviceMesh | None = None,
) -> None:  # fmt: skip
    """Loads the model, in each process its share of it, and generates."""
    from minopt.loading import load

    if work is not None and not work.todo:
        return
    names = (*(f.name for f in fields(Loading) if f.name != "model"), "offload", "optimize")
    lm = load(call.model or DEMO, mesh=mesh, **{name: getattr(call, name) for name in names})
    options = {"max_new_tokens": lm.generation_defaults.get("max_new_tokens", MAX_NEW_TOKENS), **options}
    config = with_defaults(lm.generation_defaults, options)
    options["skip_special_tokens"] = call.skip_special_tokens
    if work is not None:
        work.check(config.num_return_sequences)
        texts = [work.prompts[index]["prompt"] for index in work.todo]
        limits = {"batch_size": files.batch_size, "max_batch_tokens": files.max_batch_tokens}
        results = lm.generate_each(texts, in_order=not files.unordered, show_progress=True, **options, **limits)
        write_results(results, work, files.output)
    elif prompt is not None:
        streams = config.num_beams == config.num_return_sequences == 1
        _show(lm, prompt, options, echo=call.echo, streams=streams)


def _show(lm: LanguageModel, prompt: str, options: dict[str, Any], *, echo: bool, streams: bool) -> None:
    """Writes the continuations of one prompt; a single one as its tokens come."""
    before, texts = prompt if echo else "", []
    if streams:
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
