"""``minopt evaluate``."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from minopt.cli.flags import given_to
from minopt.cli.records import MODEL, Loading, check_output
from minopt.evaluation.tasks import TASKS, EvaluationConfig
from minopt.settings import is_choice, option

if TYPE_CHECKING:
    from minopt.distributed import World
    from minopt.evaluation.answers import EvaluationResult
    from minopt.text import LanguageModel

# Programs that have tasks of their own: ``--task NAME:TASK,TASK``, and the module whose ``evaluate`` runs them.
_PROGRAMS = {"lm_eval": "minopt.interop.lm_eval"}

_NAMES = ", ".join(TASKS)
_OF_PROGRAMS = ("limit", "num_fewshot", "include_path")
_OF_PERPLEXITY = ("data", "window", "stride")
_OF_TASKS = ("output", *(f.name for f in fields(EvaluationConfig) if f.name != "task"))


@dataclass(frozen=True)
class Evaluate(Loading):
    """Measures a model. The task reference compares opt-125m or opt-350m, in float32, with the numbers in the tests of
    metaseq and transformers; the exit code is 0 if all hold, and 1 otherwise. The task perplexity measures the text
    --data. squad and squad-question measure the loss, and score generated texts: exact match and F1 of answers, ROUGE
    of questions. lm_eval:TASK,TASK are tasks of lm-evaluation-harness (pip install 'minopt[lm-eval]'). Under torchrun
    the processes share the examples or the text.
    """

    summary = "measure a model: published numbers, perplexity, questions"
    records = (EvaluationConfig,)
    titles: ClassVar = {
        "data": "--task perplexity",
        "limit": "--task lm_eval:...",
        "output": f"--task {_NAMES}; see also the last group",
        "device": "how the model is loaded",
        "prompt_template": f"data and generated texts of --task {_NAMES}",
    }

    task: str = option("", "what to measure", required=True, choices=(
        "reference", "perplexity", *TASKS, *(f"{name}:..." for name in _PROGRAMS)))  # fmt: skip
    model: str | None = option(None, MODEL)
    json: bool = option(False, "write the results as JSON")
    data: str | None = option(None, "a text: .txt, or .raw such as WikiText-2's wiki.test.raw", kind="file")
    window: int | None = option(None, "tokens in a window (the model's positions)")
    stride: int | None = option(None, "tokens from the start of one window to the next (those of the window)")
    limit: int | None = option(None, "the first N examples of each task (all)", least=1)
    num_fewshot: int | None = option(None, "examples before each question (the task's own number)", least=0)
    include_path: str | None = option(None, "a folder with tasks of your own, as YAML", kind="folder")
    output: str | None = option(None, "write the generated texts by id, in SQuAD's own format", kind="file")
    force: bool = option(False, "replace an --output file that exists")

    def run(self, given: dict[str, Any]) -> int:
        self._check_combination(given)
        if self.task == "reference":
            from minopt.evaluation.harness import compare_with_published, format_table

            lm = self.load(dtype="float32", optimize=False)
            rows = compare_with_published(lm.model, lm.tokenizer)
            print(json.dumps([asdict(row) for row in rows], indent=2) if self.json else format_table(rows))
            return 0 if all(row.passed for row in rows) else 1

        from minopt.distributed import processes

        with processes(self.device) as world:
            if ":" in self.task:
                program, _, names = self.task.partition(":")
                module, options = (
                    import_module(_PROGRAMS[program]),
                    {name: getattr(self, name) for name in _OF_PROGRAMS},
                )
                measured = module.evaluate(
                    world.first_then_all(lambda: self.load(device=world.device)), names, **options
                )
            else:
                measured = self._perplexity(world) if self.task == "perplexity" else self._questions(world, given)
            if world.is_first:
                print(json.dumps(measured, indent=2) if self.json else table_of(measured))
        return 0

    def _check_combination(self, given: dict[str, Any]) -> None:
        """Refuses flags that do not go together."""
        if self.model is None:
            raise ValueError("--model: expected a checkpoint to measure, got none. Name one.")
        programs = tuple(f"{name}:..." for name in _PROGRAMS)
        for names, tasks in ((_OF_PERPLEXITY, ("perplexity",)), (_OF_TASKS, tuple(TASKS)), (_OF_PROGRAMS, programs)):
            for name in names:
                if name in given and not is_choice(self.task, tasks):
                    wanted = " or ".join(tasks)
                    raise ValueError(f"--{name}: goes with --task {wanted}, got --task {self.task}. Leave it out.")
        if self.force and self.output is None:
            raise ValueError("--force: goes with --output, got none. Leave it out.")
        for name in ("dtype", "quantize"):
            if self.task == "reference" and given.get(name, "float32") not in ("auto", "float32"):
                raise ValueError(f"--{name}: published numbers are float32's, got {given[name]}. Leave it out.")

    def _perplexity(self, world: World) -> dict[str, float]:
        from minopt.evaluation.perplexity import wikitext_text, window_perplexity
        from minopt.training.data import read_text

        path = Path(self.data or "")
        if path.suffix.lower() not in (".txt", ".raw") or not path.is_file():
            got = "none" if self.data is None else path if path.is_file() else f"{path}, which is no file"
            wanted = "a text (.txt, .raw) such as WikiText-2's wiki.test.raw"
            raise ValueError(f"--data: expected {wanted}, got {got}. Name one.")
        text = read_text(path, "data")
        if path.suffix == ".raw":
            text = wikitext_text(io.StringIO(text))  # lines are joined as for published figures
        lm = world.first_then_all(lambda: self.load(device=world.device))
        ids = _tokenizer_of(lm).encode(text)
        return asdict(window_perplexity(lm.decoder, ids, self.window, self.stride, world))

    def _questions(self, world: World, given: dict[str, Any]) -> dict[str, float]:
        from minopt.atomic import write_text
        from minopt.training.data import read_data

        config = EvaluationConfig(**given_to(EvaluationConfig, given))
        task = config.resolved_task()
        if self.output is not None:
            check_output(Path(self.output), self.force)
        data = world.first_then_all(lambda: read_data(config.dev_file, task, split="dev"))
        if self.output is not None and isinstance(data, str):
            raise ValueError(f"--output: there are no predictions for a text ({config.dev_file}). Leave it out.")
        lm = world.first_then_all(lambda: self.load(device=world.device))
        result = evaluate_examples(lm, data, config, world)
        if world.is_first and self.output is not None:
            write_text(Path(self.output), json.dumps(dict(result.predictions), ensure_ascii=False) + "\n")
        return dict(result.metrics)


def evaluate_examples(lm: LanguageModel, data: Any, config: EvaluationConfig, world: World) -> EvaluationResult:
    """Evaluates on examples or a text, in all processes."""
    from minopt.evaluation.answers import evaluate
    from minopt.training.batches import tokenise
    from minopt.training.checks import check_fit, warn
    from minopt.training.data import references_of

    tokenizer = _tokenizer_of(lm)
    check_fit(lm.model, config, data)
    if not isinstance(data, str):
        data = data[: config.max_eval_samples]
    tokens = world.each(lambda: tokenise(data, tokenizer, lm.model.config, config, training=False))
    warn(config, world, {"train_file": None, "dev_file": tokens}, eval_is_text=isinstance(data, str))
    result = evaluate(
        lm.model, tokenizer, tokens.rows, references_of(data), config.resolved_task().scores, config.generation, world,
        batch_size=config.per_device_eval_batch_size,
    )  # fmt: skip
    assert result is not None
    return result


def _tokenizer_of(lm: LanguageModel) -> Any:
    if lm.tokenizer is None:
        raise ValueError("--model: expected one with a tokenizer, got one without. Name its folder with --tokenizer.")
    return lm.tokenizer


def table_of(values: dict[str, float]) -> str:
    """A line for each value."""
    width = max(map(len, values))
    shown = {name: f"{value:,.0f}" if float(value).is_integer() else f"{value:.4f}" for name, value in values.items()}
    return "\n".join(f"{name:{width}}  {text}" for name, text in shown.items())
