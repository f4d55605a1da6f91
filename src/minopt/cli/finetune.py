"""``minopt finetune``: its flags are the fields of ``TrainingConfig``."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

from minopt.cli.evaluate import evaluate_examples, table_of
from minopt.cli.flags import Command, given_to
from minopt.cli.records import MODEL, tell
from minopt.progress import counted
from minopt.settings import option
from minopt.training.config import TrainingConfig, with_recipe


@dataclass(frozen=True)
class Finetune(Command):
    """Fine-tunes a model on SQuAD, on pairs of prompt and completion, or on a text, and writes it to --output-dir. With
    --task classification or reward it becomes a classifier or a reward model; with --lora-rank, adapters are trained.
    Under torchrun it runs in all processes that torchrun starts. Started again with the same settings, it continues
    from its latest checkpoint.
    """

    summary = "fine-tune a model, in one process or under torchrun"
    records = (TrainingConfig,)
    titles: ClassVar = {
        "output_dir": "what to do",
        "num_train_epochs": "optimisation",
        "fp16": "how to compute",
        "evaluation_strategy": "evaluation while training",
        "logging_steps": "what to write",
        "task": "task, data and generated texts",
    }
    when_out_of_memory = "a smaller --per-device-train-batch-size, or --recompute"

    config: str | None = option(None, "settings as JSON, such as a run's run.json; flags replace them", kind="file")

    def run(self, given: dict[str, Any]) -> int:
        settings = {} if self.config is None else TrainingConfig.from_file(self.config)
        config = TrainingConfig(**(settings | with_recipe(given_to(TrainingConfig, given))))
        if (name := config.model_name_or_path) is None:
            raise ValueError(f"--model_name_or_path: expected {MODEL}, got none. Name one.")

        from minopt.distributed import processes
        from minopt.loading import load
        from minopt.training.method import method_of
        from minopt.training.trainer import TrainingStopped, train
        from minopt.training.weights import NO_TOKENIZER

        method = method_of(config)
        train_data: Any = None
        eval_data: Any = None
        with processes(config.device) as world:
            if config.trains:
                train_data = world.first_then_all(lambda: method.read(config, "train"))
            if config.evaluates:
                eval_data = world.first_then_all(lambda: method.read(config, "dev"))
            if not config.trains:
                measured = method.evaluate(name, eval_data, config, world)
                if measured is None:
                    lm = world.first_then_all(lambda: load(name, device=world.device, dtype="float32", optimize=False))
                    if lm.tokenizer is None:
                        raise ValueError(NO_TOKENIZER.format(name))
                    measured = evaluate_examples(lm, eval_data, config, world)
                if world.is_first:
                    print(table_of(dict(measured.metrics)))
                return 0
            try:
                result = train(name, train_data, config, eval_data=eval_data)
            except TrainingStopped as stopped:
                if world.is_first:
                    tell(f"{stopped} To go on:\n{_this_command(config)}")
                return 128 + stopped.signal
            if world.is_first:
                tell(f"{counted(result.steps, 'step')}, loss {result.loss:.4f}. The model is in {result.output_dir}")
        return 0


def _this_command(config: TrainingConfig) -> str:
    """The command that goes on with this run: as typed, torchrun's part from environment variables."""
    command = ["minopt", *sys.argv[1:], *(["--resume", "auto"] if config.resume == "never" else [])]
    command += ["--overwrite-output-dir", "false"] if config.overwrite_output_dir else []
    if "LOCAL_WORLD_SIZE" in os.environ:
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        several = ["--nnodes", str(nodes)] if nodes > 1 else []
        command = ["torchrun", *several, "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", *command]
    return shlex.join(command)
