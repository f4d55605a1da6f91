"""What several commands share: how a checkpoint is found, read and run, and lines on stderr."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minopt import DEMO
from minopt.cli.flags import Command
from minopt.progress import say
from minopt.settings import option

if TYPE_CHECKING:
    from minopt.text import LanguageModel

MODEL = "a folder, any one file of a checkpoint, or a name such as facebook/opt-125m"
DESTINATION = "the folder to write; it is created"
ADAPTER = "the folder of a LoRA, as peft writes it, to merge into the weights"
FORCE = "replace a model or program that is already in the destination"


@dataclass(frozen=True)
class Reading(Command):
    """Arguments of everything that opens a checkpoint."""

    tokenizer: str | None = option(None, "the tokenizer's files (beside the weights, or one folder up)", kind="folder")
    revision: str | None = option(None, "branch, tag or commit of a model on the hub")
    local_files_only: bool = option(False, "use only files that are already on this machine")
    model_config: str | None = option(None, "a preset (opt-1.3b) or a config.json, in place of the checkpoint's own")
    ignore: tuple[str, ...] = option((), "leave out tensors of this name, such as v_head.*; for several, repeat it")


@dataclass(frozen=True)
class Loading(Reading):
    """Arguments of ``load``."""

    model: str | None = option(None, f"{MODEL} (the small model in the package)")
    device: str | None = option(None, "cpu, cuda, cuda:1, ... (the GPU if there is one)")
    dtype: str = option("auto", "float32, bfloat16, float16 or float64 (auto: float32 on a CPU, else the file's own)")
    quantize: str | None = option(None, "round the weights to 8 bits, or on a CPU to 4", choices=("int8", "int4"))
    adapter: str | None = option(None, ADAPTER, kind="folder")

    def load(self, **others: Any) -> LanguageModel:
        """The model that is asked for, with other arguments of ``load`` too."""
        from minopt.loading import load

        options = {f.name: getattr(self, f.name) for f in fields(Loading)} | others
        return load(options.pop("model") or DEMO, **options)


def tell(text: str) -> None:
    """One line on stderr."""
    say(f"minopt: {text}")


def check_output(output: Path, force: bool, remedy: str = "replace it with --force") -> None:
    """Refuses an ``--output`` that cannot or must not be written, before a model is loaded."""
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output: there is no folder {output.parent}. Make it first.")
    if output.is_dir():
        raise IsADirectoryError(f"--output: expected a file, got a folder ({output}). Name a file in it.")
    if output.is_file() and not force:  # /dev/null may be written
        raise FileExistsError(f"--output: {output} is there already. Name another file, or {remedy}.")
