"""``minopt evaluate``."""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minopt.cli.common import add_force, add_model_arguments, check_output
from minopt.cli.settings import add_settings, settings_of
from minopt.training.config import TrainingConfig

if TYPE_CHECKING:
    from minopt.distributed import World
    from minopt.text import LanguageModel

_SETTINGS = ("dev_file", "prompt_template", "completion_template", "src_length", "tgt_length", "max_eval_samples",
             "per_device_eval_batch_size", "num_beams", "min_tgt_length", "length_penalty", "no_repeat_ngram_size",
             "select_topk", "top_k", "top_p")  # fmt: skip
_NO_TOKENIZER = "--model: expected one with a tokenizer, got one without. Name its folder with --tokenizer."
_TASKS = ("reference", "perplexity", "squad", "squad-question")


def add_evaluate(verbs: Any) -> None:
    """Adds the command to a parser's."""
    parser = verbs.add_parser(
        "evaluate", help="measure a model: published numbers, perplexity, questions",
        description="Measures a model. Under torchrun the processes share the examples or the text. With --task "
        "reference the exit code is 0 if all published numbers hold, and 1 otherwise.",
    )  # fmt: skip
    parser.set_defaults(run=_evaluate)
    parser.add_argument("--task", choices=_TASKS, required=True,
                        help="reference: compare opt-125m or opt-350m with the numbers in metaseq's and transformers' "
                        "tests, in float32; perplexity: perplexity of the text --data; squad: loss, exact match and "
                        "F1 of generated answers; squad-question: loss and ROUGE of generated questions")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="write the results as JSON")
    add_model_arguments(parser, default="required")
    text = parser.add_argument_group("--task perplexity")
    text.add_argument(
        "--data",
        metavar="FILE",
        help="a text (.txt, .raw); the lines of a .raw, such as WikiText-2's wiki.test.raw, are joined as "
        "for published figures",
    )
    text.add_argument("--window", type=int, metavar="N", help="tokens in a window (the model's positions)")
    text.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from the start of one window to the next: below --window they overlap (--window)",
    )
    squad = parser.add_argument_group("--task squad, squad-question", "these, and the groups data and evaluation below")
    squad.add_argument("--output", metavar="FILE", help="write the generated texts by their ids, in SQuAD's own format")
    add_force(squad, "an --output file that already exists")
    add_settings(parser, _SETTINGS)


def _evaluate(args: argparse.Namespace) -> int:
    from minopt.devices import DTYPES, resolve_dtype
    from minopt.loading import load

    settings = {name: value for name, value in settings_of(args).items() if name in _SETTINGS}
    questions = args.task in ("squad", "squad-question")
    if args.model is None:
        raise ValueError("--model: expected a checkpoint to measure, got none. Name one.")
    if given := [name for name in (*_SETTINGS, "output") if not questions and getattr(args, name, None) is not None]:
        raise ValueError(f"--{given[0]}: goes with --task squad, got --task {args.task}. Leave it out.")
    if given := [
        name for name in ("data", "window", "stride") if args.task != "perplexity" and getattr(args, name) is not None
    ]:
        raise ValueError(f"--{given[0]}: goes with --task perplexity, got --task {args.task}. Leave it out.")
    if args.force and args.output is None:
        raise ValueError("--force: goes with --output, got none. Leave it out.")
    if args.task == "reference" and resolve_dtype(args.dtype) not in (None, DTYPES["float32"]):
        raise ValueError(f"--dtype: published numbers are float32's, got {args.dtype}. Leave it out.")
    if args.task == "reference" and args.quantize is not None:
        raise ValueError(f"--quantize: published numbers are float32's, got {args.quantize}. Leave it out.")
    options = {
        "dtype": "float32" if args.task == "reference" else args.dtype, "quantize": args.quantize,
        "revision": args.revision,
        "local_files_only": args.local_files_only, "model_config": args.model_config,
        "ignore": args.ignore, "tokenizer": args.tokenizer,
    }  # fmt: skip
    if args.task == "reference":
        return _reference(load(args.model, device=args.device, **options), args.json)
    if args.task == "perplexity":
        return _perplexity(args, options)

    from minopt.distributed import processes
    from minopt.training.data import read_data
    from minopt.training.prepare import template_of

    config = TrainingConfig(do_eval=True, task=args.task, device=args.device, **settings)
    template = template_of(config)
    if args.output is not None:
        check_output(Path(args.output), args.force)
    with processes(args.device) as world:
        data = world.first_then_all(lambda: read_data(config.dev_file, template, split="dev"))
        if args.output is not None and isinstance(data, str):
            raise ValueError(f"--output: there are no predictions for a text ({config.dev_file}). Leave it out.")
        lm = world.first_then_all(lambda: load(args.model, device=world.device, **options))
        return evaluate_examples(lm, data, config, world, args.json, args.output)


def evaluate_examples(
    lm: LanguageModel, data: Any, config: TrainingConfig, world: World, as_json: bool = False,
    output: str | None = None,
) -> int:  # fmt: skip
    """Evaluates on examples in all processes, and writes the result in the first."""
    from minopt.atomic import write_text
    from minopt.training.evaluation import evaluate
    from minopt.training.prepare import check, prepare, warn

    if lm.tokenizer is None:
        raise ValueError(_NO_TOKENIZER)
    check(lm.model, config, data)
    if not isinstance(data, str):
        data = data[: config.max_eval_samples]
    tokens = prepare(data, lm.model, lm.tokenizer, config, world, training=False)
    warn(config, world, data, tokens)
    result = evaluate(lm.model, lm.tokenizer, data, tokens, config, world)
    assert result is not None
    if world.is_first:
        if output is not None:
            text = json.dumps(dict(result.predictions), ensure_ascii=False)
            write_text(Path(output), text + "\n")
        _print(dict(result.metrics), as_json)
    return 0


def _reference(lm: LanguageModel, as_json: bool) -> int:
    from minopt.evaluation.harness import compare_with_published, format_table

    comparisons = compare_with_published(lm.model, lm.tokenizer)
    print(json.dumps([asdict(c) for c in comparisons], indent=2) if as_json else format_table(comparisons))
    return 0 if all(comparison.passed for comparison in comparisons) else 1


def _perplexity(args: argparse.Namespace, options: dict[str, Any]) -> int:
    from minopt.distributed import processes
    from minopt.evaluation.perplexity import wikitext_text, window_perplexity
    from minopt.loading import load
    from minopt.training.data import read_text

    if args.data is None:
        raise ValueError("--data: expected a text file, such as WikiText-2's wiki.test.raw, got none. Name one.")
    path = Path(args.data)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "nothing of that name"
        raise FileNotFoundError(f"--data: expected a file, got {what} ({path}). Check the path.")
    if path.suffix.lower() not in (".txt", ".raw"):
        raise ValueError(f"--data: expected a text (.txt, .raw), got {path}. Name another.")
    text = read_text(path, "data")
    if path.suffix == ".raw":
        text = wikitext_text(io.StringIO(text))
    with processes(args.device) as world:
        lm = world.first_then_all(lambda: load(args.model, device=world.device, **options))
        if lm.tokenizer is None:
            raise ValueError(_NO_TOKENIZER)
        ids = lm.tokenizer.encode(text)
        result = window_perplexity(lm.decoder, ids, args.window, args.stride, world)
    if world.is_first:
        _print(asdict(result), args.json)
    return 0


def _print(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, indent=2))
        return
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:{width}}  {value:,.0f}" if float(value).is_integer() else f"{name:{width}}  {value:.4f}")
