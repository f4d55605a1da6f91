"""``minopt convert``, ``minopt export`` and ``minopt inspect``."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minopt.cli.records import ADAPTER, DESTINATION, FORCE, MODEL, Reading, tell
from minopt.settings import option


@dataclass(frozen=True)
class Convert(Reading):
    """Converts a checkpoint of any kind (Hugging Face or metaseq; one file, parts or shards) to a Hugging Face folder
    or to metaseq's files.
    """

    summary = "convert a checkpoint to another format"
    alone = True

    source: str = option("", MODEL, is_word=True, required=True)
    destination: str = option("", DESTINATION, is_word=True, required=True)
    format: str = option("hf", "a Hugging Face folder, or metaseq's reshard.pt or its parts", choices=("hf", "metaseq"))
    parts: int = option(1, "with --format metaseq: the number of model parallel parts")
    dtype: str = option("auto", "float32, bfloat16, float16 or float64 (auto: as stored)")
    adapter: str | None = option(None, ADAPTER, kind="folder")
    quantize: str | None = option(
        None, "with --format hf: round the layers' weights to 8 or 4 bits", choices=("int8", "int4")
    )
    calibration: str | None = option(None, "with --quantize: a text, for int4 by GPTQ and for --smooth", kind="file")
    smooth: float | None = option(None, "with int8 and --calibration: SmoothQuant's strength, such as 0.5")
    device: str | None = option(None, "with --calibration: where it computes (the GPU if there is one)")
    max_shard_size: int = option(2 * 10**9, "with --format hf: the largest file (2GB)", kind="size")
    force: bool = option(False, FORCE)

    def run(self, given: dict[str, Any]) -> None:
        from minopt.checkpoint.convert import convert
        from minopt.int4 import RECORD
        from minopt.progress import counted

        options = {**vars(self), "show_progress": True}
        options["max_shard_bytes"] = options.pop("max_shard_size")
        convert(options.pop("source"), options.pop("destination"), **options)
        if self.calibration is not None:
            found = json.loads((Path(self.destination).expanduser() / RECORD).read_text(encoding="utf-8"))["perplexity"]
            tell(f"perplexity on {counted(found['windows'], 'held-out window')} of {self.calibration}: "
                 f"{found['before']:.4g} before, {found['after']:.4g} after (kept in {RECORD})")  # fmt: skip
        tell(f"wrote {self.destination}")


@dataclass(frozen=True)
class Export(Reading):
    """Compiles a model with AOTInductor, checks that the program decodes as the model does, and writes it with the
    tokenizer's files to a folder that minopt generate --model opens. This takes about a minute and needs a C++
    compiler. The program runs with this version of torch, on processors with the same instructions.
    """

    summary = "compile a model into a program that runs without model code"
    alone = True

    model: str = option("", MODEL, is_word=True, required=True)
    destination: str = option("", DESTINATION, is_word=True, required=True)
    dtype: str = option("auto", "float32, bfloat16 or float16 (auto: float32 on a CPU)")
    quantize: str | None = option(None, "compute linear layers with weights and inputs of 8 bits", choices=("int8",))
    max_length: int | None = option(None, "the most tokens of a text, prompt and new ones (the model's positions)")
    max_batch: int | None = option(None, "the most texts that run together (any number)")
    device: str = option("cpu", "where the program runs", choices=("cpu", "cuda"))
    force: bool = option(False, FORCE)

    def run(self, given: dict[str, Any]) -> None:
        from minopt.inference.compile import export_model

        options = {**vars(self)}
        export_model(options.pop("model"), options.pop("destination"), **options)
        tell(f"wrote {self.destination}")


@dataclass(frozen=True)
class Inspect(Reading):
    """Shows what a checkpoint is and whether it is complete. The exit code is 1 if it cannot be loaded, or if --check
    finds something.
    """

    summary = "show what a checkpoint is and whether it is complete"
    alone = True
    without = ("tokenizer",)

    model: str = option("", MODEL, is_word=True, required=True)
    tensors: bool = option(False, "list the tensors, as --json always does")
    check: bool = option(False, "read all values: report those not finite or beyond 100, and tensors of zeros")
    hash: bool = option(False, "digests of the tensors, the same in every format")
    sparsity: str | None = option(None, "run this text: the share of zeros behind each layer's relu", kind="file")
    json: bool = option(False, "write the report as JSON")

    def run(self, given: dict[str, Any]) -> int:
        from minopt.checkpoint.inspect import inspect_checkpoint
        from minopt.training.data import read_text

        text = None if self.sparsity is None else read_text(Path(self.sparsity), "sparsity")
        opening = {name: getattr(self, name) for name in ("revision", "local_files_only", "model_config", "ignore")}
        report = inspect_checkpoint(self.model, **opening, check=self.check, digest=self.hash, show_progress=True)
        if text is not None and report.config is not None and report.problem is None:
            report = replace(report, sparsity=self._zeros(text, report.config["activation_function"], opening))
        print(json.dumps(report.to_dict(), indent=2) if self.json else report.to_text(tensors=self.tensors))
        return 0 if report.is_sound else 1

    def _zeros(self, text: str, activation: str, opening: dict[str, Any]) -> tuple[float, ...]:
        from minopt.evaluation.sparsity import zeros_by_layer
        from minopt.loading import load

        if activation != "relu":
            raise ValueError(f"sparsity: expected a model with relu, got {activation}, behind which nothing is exactly "
                             f"zero ({self.model}). Leave it out.")  # fmt: skip
        lm = load(self.model, optimize=False, **opening)
        if lm.tokenizer is None:
            raise ValueError(f"sparsity: expected a model with a tokenizer, it has none ({self.model}). Put its files "
                             "beside the weights.")  # fmt: skip
        return zeros_by_layer(lm.model, lm.tokenizer.encode(text))
