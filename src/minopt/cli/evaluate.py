"""``minopt evaluate``."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from minopt.cli.records import MODEL, Loading, check_output
from minopt.evaluation.tasks import TASKS, EvaluationConfig
from minopt.settings import option

if TYPE_CHECKING:
    from minopt.distributed import World
    from minopt.text import LanguageModel

_SETTINGS = tuple(f.name for f in fields(EvaluationConfig) if f.name != "task")
_TASKS_OF = {
    **dict.fromkeys(("data", "window", "stride"), ("perplexity",)),
    **dict.fromkeys((*_SETTINGS, "output"), (*TASKS,)),
}
_NAMES = ", ".join(TASKS)


@dataclass(frozen=True)
class Evaluate(Loading):
    """Measures a model. The task reference compares opt-125m or opt-350m, in float32, with the numbers in the tests of
    metaseq and transformers; the exit code is 0 if all hold, and 1 otherwise. The task perplexity measures the text
    --data. The other tasks measure the loss, and score generated texts: squad exact match and F1 of answers,
    squad-question ROUGE of questions. Under torchrun the processes share the examples or the text.
    """

    summary = "measure a model: published numbers, perplexity, questions"
    records = (EvaluationConfig,)
    titles: ClassVar = {
        "data": "--task perplexity",
        "output": f"--task {_NAMES}; see also the last group",
        "device": "how the model is loaded",
        "prompt_template": f"data and generated texts of --task {_NAMES}",
    }

    task: str = option("", "what to measure", choices=("reference", "perplexity", *TASKS), required=True)
    model: str | None = option(None, MODEL)
    json: bool = option(False, "write the results as JSON")
    data: str | None = option(None, "a text: .txt, or .raw such as WikiText-2's wiki.test.raw", kind="file")
    window: int | None = option(None, "tokens in a window (the model's positions)")
    stride: int | None = option(None, "tokens from the start of one window to the next (those of the window)")
    output: str | None = option(None, "write the generated texts by id, in SQuAD's own format", kind="file")
    force: bool = option(False, "replace an --output file that exists")

    def run(self, given: dict[str, Any]) -> int:
        self._check_combination(given)
        if self.task == "reference":
            return self._reference()
        return self._perplexity() if self.task == "perplexity" else self._questions(given)

    def _check_combination(self, given: dict[str, Any]) -> None:
        """Refuses flags that do not go together."""
        if self.model is None:
            raise ValueError("--model: expected a checkpoint to measure, got none. Name one.")
        for name, tasks in _TASKS_OF.items():
            if name in given and self.task not in tasks:
                names = " or ".join(tasks)
                raise ValueError(f"--{name}: goes with --task {names}, got --task {self.task}. Leave it out.")
        if self.force and self.output is None:
            raise ValueError("--force: goes with --output, got none. Leave it out.")
        if self.task == "reference" and self.dtype not in ("auto", "float32"):
            raise ValueError(f"--dtype: published numbers are float32's, got {self.dtype}. Leave it out.")
        if self.task == "reference" and self.quantize is not None:
            raise ValueError(f"--quantize: published numbers are float32's, got {self.quantize}. Leave it out.")

    def _load(self, device: Any, **changes: Any) -> LanguageModel:
        from minopt.loading import load

        others = {f.name: getattr(self, f.name) for f in fields(Loading) if f.name not in ("model", "device")}
        return load(str(self.model), device=device, **others | changes)

    def _reference(self) -> int:
        from minopt.evaluation.harness import compare_with_published, format_table

        lm = self._load(self.device, dtype="float32", optimize=False)
        comparisons = compare_with_published(lm.model, lm.tokenizer)
        print(json.dumps([asdict(c) for c in comparisons], indent=2) if self.json else format_table(comparisons))
        return 0 if all(comparison.passed for comparison in comparisons) else 1

    def _perplexity(self) -> int:
        from minopt.distributed import processes
        from minopt.evaluation.perplexity import window_perplexity

        text = _text_of(self.data)
        with processes(self.device) as world:
            lm = world.first_then_all(lambda: self._load(world.device))
            ids = _tokenizer_of(lm).encode(text)
            result = window_perplexity(lm.decoder, ids, self.window, self.stride, world)
        if world.is_first:
            _print(asdict(result), self.json)
        return 0

    def _questions(self, given: dict[str, Any]) -> int:
        from minopt.distributed import processes
        from minopt.training.data import read_data

        config = EvaluationConfig(**{f.name: given[f.name] for f in fields(EvaluationConfig) if f.name in given})
        task = config.resolved_task()
        if self.output is not None:
            check_output(Path(self.output), self.force)
        with processes(self.device) as world:
            data = world.first_then_all(lambda: read_data(config.dev_file, task, split="dev"))
            if self.output is not None and isinstance(data, str):
                raise ValueError(f"--output: there are no predictions for a text ({config.dev_file}). Leave it out.")
            lm = world.first_then_all(lambda: self._load(world.device))
            evaluate_examples(lm, data, config, world, self.json, self.output)
        return 0


def evaluate_examples(
    lm: LanguageModel, data: Any, config: EvaluationConfig, world: World, as_json: bool = False,
    output: str | None = None,
) -> None:  # fmt: skip
    """Evaluates on examples in all processes, and writes the result in the first."""
    from minopt.atomic import write_text
    from minopt.evaluation.answers import evaluate
    from minopt.training.checks import check_fit, tokens_of, warn
    from minopt.training.data import references_of

    tokenizer = _tokenizer_of(lm)
    check_fit(lm.model, config, data)
    if not isinstance(data, str):
        data = data[: config.max_eval_samples]
    tokens = tokens_of(data, lm.model, tokenizer, config, world)
    warn(config, world, data, tokens)
    result = evaluate(
        lm.model, tokenizer, tokens.rows, references_of(data), config.resolved_task().scores, config.generation, world,
        batch_size=config.per_device_eval_batch_size,
    )  # fmt: skip
    assert result is not None
    if world.is_first:
        if output is not None:
            text = json.dumps(dict(result.predictions), ensure_ascii=False)
            write_text(Path(output), text + "\n")
        _print(dict(result.metrics), as_json)


def _tokenizer_of(lm: LanguageModel) -> Any:
    if lm.tokenizer is None:
        raise ValueError("--model: expected one with a tokenizer, got one without. Name its folder with --tokenizer.")
    return lm.tokenizer


def _text_of(name: str | None) -> str:
    """The text in ``--data``. The lines of a .raw are joined as for published figures."""
    from minopt.evaluation.perplexity import wikitext_text
    from minopt.training.data import read_text

    if name is None:
        raise ValueError("--data: expected a text file, such as WikiText-2's wiki.test.raw, got none. Name one.")
    path = Path(name)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "nothing of that name"
        raise FileNotFoundError(f"--data: expected a file, got {what} ({path}). Check the path.")
    if path.suffix.lower() not in (".txt", ".raw"):
        raise ValueError(f"--data: expected a text (.txt, .raw), got {path}. Name another.")
    text = read_text(path, "data")
    return wikitext_text(io.StringIO(text)) if path.suffix == ".raw" else text


def _print(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, indent=2))
        return
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:{width}}  {value:,.0f}" if float(value).is_integer() else f"{name:{width}}  {value:.4f}")
