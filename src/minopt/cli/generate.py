"""``minopt generate``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

from minopt import DEMO
from minopt.cli.common import add_model_arguments, tell, true_or_false
from minopt.cli.prompts import Work, is_piped, plan_work, read_standard_input, write_results

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# The options of GenerationConfig: how each is written on the command line. Several ids are written 5,6.
_NUMBERS: dict[str, tuple[str, tuple[tuple[str, type, str], ...]]] = {
    "length": ("how long", (
        ("max-new-tokens", int, "the most tokens to add (30)"),
        ("min-new-tokens", int, "the fewest tokens to add (0)"),
        ("max-time", float, "seconds after which a batch ends, with the tokens that it has"),
    )),
    "choice": ("how the next token is chosen", (
        ("num-beams", int, "beam search with N beams (1: no beam search)"),
        ("num-return-sequences", int, "continuations of each prompt; above 1 with --do-sample or --num-beams (1)"),
        ("length-penalty", float, "beams: divide scores by length to the power of X; above 0 favours long texts (1.0)"),
        ("temperature", float, "sampling: scores are divided by X; below 1 favours probable tokens (1.0)"),
        ("top-k", int, "sampling: draw from the N most probable tokens (50; 0: all)"),
        ("top-p", float, "sampling: draw from the fewest tokens that together have probability X (1.0: all)"),
        ("min-p", float, "sampling: draw from tokens at least X times as probable as the most probable one"),
        ("seed", int, "sampling: the same seed draws the same text (a new one each time)"),
    )),
    "lookup": ("prompt lookup: the same tokens in fewer steps where a text repeats itself", (
        ("prompt-lookup-num-tokens", int, "greedy: the most tokens to copy from earlier text as a draft (off)"),
        ("max-matching-ngram-size", int, "search the earlier text for the last N tokens, or fewer (2)"),
    )),
    "rules": ("rules on tokens", (
        ("no-repeat-ngram-size", int, "no N tokens in a row occur twice (0: no limit)"),
        ("repetition-penalty", float, "above 1 lowers the scores of tokens that are in the text already (1.0)"),
        ("presence-penalty", float, "X is subtracted once from the score of each token that was generated (0)"),
        ("frequency-penalty", float, "X is subtracted from a token's score for each time it was generated (0)"),
        ("forced-bos-token-id", int, "the first new token, where the prompt is a single token"),
        ("pad-token-id", int, "the id that fills texts of a batch that have ended (the model's)"),
    )),
}  # fmt: skip


def add_generate(verbs: Any) -> None:
    parser = verbs.add_parser(
        "generate", help="continue a text, or each prompt of a file",
        description="Continues a text and shows it token by token; or continues each prompt of a file, in batches.",
    )  # fmt: skip
    parser.set_defaults(run=_generate)
    parser.add_argument(
        "prompt", nargs="?", type=_text, help='the text to continue, in quotes; "" is nothing, - standard input'
    )
    parser.add_argument("--echo", action="store_true", help="write the prompt first")
    add_model_arguments(parser)
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        metavar="N",
        help="refuse to run unless torchrun has started N processes; they always share the model",
    )
    parser.add_argument(
        "--offload",
        choices=("disk", "cpu"),
        help="for a model larger than the device: where the layers wait that do not compute",
    )
    parser.add_argument(
        "--optimize",
        type=_optimize,
        default=True,
        metavar="true|false|compile",
        help="true: packed weights; false: the plain model; compile: faster, after a minute (true)",
    )
    groups = {}
    for key, (title, options) in _NUMBERS.items():
        groups[key] = parser.add_argument_group(title)
        for name, kind, text in options:
            groups[key].add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=text)
    switch = argparse.BooleanOptionalAction
    groups["length"].add_argument(
        "--truncate-prompt", action=switch, help="cut the beginning of a prompt that is too long (without: an error)"
    )
    groups["length"].add_argument(
        "--stop-strings",
        action="append",
        type=_text,
        metavar="TEXT",
        help="end before this text (a line end: $'\\n'); repeat the flag for several",
    )
    groups["length"].add_argument("--skip-special-tokens", action=switch,
                                  help="leave special tokens such as </s> out of the text (yes)")  # fmt: skip
    groups["length"].add_argument(
        "--eos-token-id", type=_ids, metavar="IDS", help="ids that end a text, such as 2,50118 (the model's)"
    )
    groups["choice"].add_argument(
        "--do-sample", action=switch, help="draw tokens instead of taking the most probable one (no)"
    )
    groups["choice"].add_argument(
        "--early-stopping",
        type=_early_stopping,
        metavar="true|false|never",
        help="beams: end once enough are finished: true at once, false when no running beam is better, "
        "never when none can become better (false)",
    )
    groups["rules"].add_argument("--no-repeat-ngram-include-prompt", type=true_or_false, metavar="true|false",
                                 help="with --no-repeat-ngram-size: the prompt counts as well (true)")  # fmt: skip
    groups["rules"].add_argument(
        "--suppress-tokens", type=_ids, metavar="IDS", help="ids that are never generated, such as 5,6"
    )
    groups["rules"].add_argument(
        "--bad-words-ids", type=_json, metavar="JSON", help="sequences of ids that are never generated: [[5, 6], [7]]"
    )
    groups["rules"].add_argument("--sequence-bias", type=_json, metavar="JSON",
                                 help="added to the score of a sequence's last id: [[[5, 6], -2.5]]")  # fmt: skip
    files = parser.add_argument_group("many prompts")
    files.add_argument(
        "--input",
        metavar="FILE",
        help='a prompt a line (-: of standard input), or, in a .jsonl, {"prompt": ...} a line',
    )
    files.add_argument("--output", metavar="FILE", help="write JSON lines, in the order of the prompts (stdout)")
    files.add_argument("--unordered", action="store_true",
                       help="write each result as soon as it is done, long prompts first")  # fmt: skip
    files.add_argument("--resume", action="store_true", help="continue an output file that is not finished")
    files.add_argument("--force", action="store_true", help="replace an output file that exists")
    files.add_argument(
        "--batch-size", type=int, metavar="N", help="the most prompts that run together (as --max-batch-tokens allows)"
    )
    files.add_argument("--max-batch-tokens", type=int, metavar="N",
                       help="the most tokens that run together, new ones and padding included (8192)")  # fmt: skip
    files.add_argument(
        "--output-logprobs", action="store_true", help="write the new tokens' ids and log-probabilities too"
    )
    files.add_argument(
        "--top-logprobs", type=int, metavar="N", help="write the N most probable ids for each new token too"
    )


def _text(word: str) -> str:
    """A word of the command as UTF-8, also where the locale says that it is something less."""
    try:
        return os.fsencode(word).decode()
    except UnicodeError:
        return word


def _ids(text: str) -> tuple[int, ...]:
    """``5,6`` as ``(5, 6)``; nothing as ``()``."""
    try:
        return tuple(int(part) for part in text.split(",") if text.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ids such as 5 or 5,6, got {text!r}") from None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(f"expected JSON, got {text[:80]!r}") from None


def _early_stopping(text: str) -> bool | str:
    if text.lower() not in ("true", "false", "never"):
        raise argparse.ArgumentTypeError(f"expected true, false or never, got {text!r}")
    return "never" if text.lower() == "never" else true_or_false(text)


def _optimize(text: str) -> bool | str:
    if text.lower() not in ("true", "false", "compile"):
        raise argparse.ArgumentTypeError(f"expected true, false or compile, got {text!r}")
    return "compile" if text.lower() == "compile" else true_or_false(text)


def _generate(args: argparse.Namespace) -> None:
    from minopt.generation.options import check_values, option_names

    if args.prompt is None and args.input is None and is_piped():
        tell("reading the prompt from standard input")
        args.prompt = "-"
    if (args.prompt is None) == (args.input is None):
        raise ValueError(
            "prompt: expected one, or --input with a file of them. Either may be -, which is standard input."
        )
    for name in ("output", "unordered", "resume", "force", "batch_size", "max_batch_tokens", "output_logprobs",
                 "top_logprobs"):  # fmt: skip
        if args.input is None and getattr(args, name) is not None and getattr(args, name) is not False:
            raise ValueError(f"--{name.replace('_', '-')} goes with --input: there is no place for it beside one text.")
    if args.input is not None and args.echo:
        raise ValueError("--echo: the output of --input has the prompts already. Leave it out.")
    if args.resume and (args.force or args.output is None):
        raise ValueError(f"--resume: goes with --output{' and without --force' if args.force else ''}.")
    given = {name: getattr(args, name, None) for name in option_names()}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    check_values(options)  # complain before a model is loaded or fetched
    if args.tensor_parallel is not None and args.tensor_parallel != (size := int(os.environ.get("WORLD_SIZE", "1"))):
        raise ValueError(
            f"--tensor-parallel: expected the number of processes, {size}, got {args.tensor_parallel}. Start it with "
            f"torchrun --nproc-per-node {args.tensor_parallel} -m minopt generate ..."
        )
    is_first = os.environ.get("RANK", "0") == "0"
    work = Work()
    if is_first:  # files may differ from machine to machine
        if args.prompt == "-":
            args.prompt = read_standard_input().removesuffix("\n")
        if args.input is not None:
            work = plan_work(args.input, args.output, args.force, args.resume, options.get("num_return_sequences"))
    if args.model is None and args.revision is not None:
        raise ValueError("--revision needs --model: the small demo model has no revisions.")
    if args.model is None and is_first:
        tell("no --model given, using the small demo model (see minopt generate --help)")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        _run(args, options, work)
        return
    from torch.distributed.device_mesh import init_device_mesh

    from minopt.distributed import processes

    with processes(args.device) as world, contextlib.ExitStack() as stack:
        if not world.is_first:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            args.output = None
        args.prompt, work = world.gather((args.prompt, work))[0]
        _run(args, options, work, init_device_mesh(world.device.type, (world.size,)))


def _run(args: argparse.Namespace, options: dict[str, Any], work: Work, mesh: DeviceMesh | None = None) -> None:
    """Loads the model, in each process its share of it, and generates."""
    from minopt.generation.options import with_defaults
    from minopt.loading import load

    if args.input is not None and not work.todo:
        return
    lm = load(
        args.model or DEMO,
        device=args.device if mesh is None else None,
        mesh=mesh,
        dtype=args.dtype,
        offload=args.offload,
        quantize=args.quantize,
        optimize=args.optimize,
        revision=args.revision,
        local_files_only=args.local_files_only,
        model_config=args.model_config,
        ignore=args.ignore,
        tokenizer=args.tokenizer,
    )
    options = {"max_new_tokens": lm.generation_defaults.get("max_new_tokens", 30), **options}
    config = with_defaults(lm.generation_defaults, options)
    options["skip_special_tokens"] = args.skip_special_tokens is not False
    if args.input is not None:
        work.check(config.num_return_sequences)
        limits = {"batch_size": args.batch_size, "max_batch_tokens": args.max_batch_tokens}
        texts = [work.prompts[index]["prompt"] for index in work.todo]
        results = lm.generate_each(texts, in_order=not args.unordered, show_progress=True, **options, **limits)
        write_results(results, work, args.output)
        return
    if args.echo and config.num_beams == config.num_return_sequences == 1:
        print(args.prompt, end="", flush=True)
    texts = []
    if config.num_beams == config.num_return_sequences == 1:
        for piece in lm.stream(args.prompt, **options):
            print(piece, end="", flush=True)
            texts.append(piece)
        print()
    else:
        found = lm.generate(args.prompt, **options)
        texts = [found] if isinstance(found, str) else found
        print(*((args.prompt if args.echo else "") + text for text in texts), sep="\n---\n")
    if not any(texts) and os.environ.get("RANK", "0") == "0":
        tell("the continuation is empty: the model ended it at once (--min-new-tokens 1 forbids that).")
