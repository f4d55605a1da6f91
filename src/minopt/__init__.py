"""minopt: OPT (Zhang et al. 2022, arXiv 2205.01068) in plain PyTorch.

``minopt.load("facebook/opt-125m").generate("Today is a beautiful day")``
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minopt.cache import KVCache
    from minopt.checkpoint.convert import convert
    from minopt.checkpoint.errors import CheckpointError
    from minopt.checkpoint.inspect import inspect_checkpoint
    from minopt.checkpoint.save import save_model
    from minopt.config import OPTConfig
    from minopt.generation.decode import generate
    from minopt.generation.options import GenerationConfig
    from minopt.generation.request import GenerationOutput
    from minopt.generation.texts import GeneratedText
    from minopt.inference.compile import export_model
    from minopt.loading import load, load_model
    from minopt.methods.heads import ClassifiedText, QuestionAnswering, SequenceClassifier
    from minopt.methods.labels import LabelledText, Preference
    from minopt.methods.trace import trace
    from minopt.model import OPT
    from minopt.text import LanguageModel
    from minopt.tokenizer import Tokenizer
    from minopt.training.config import TrainingConfig
    from minopt.training.data import Example, read_data
    from minopt.training.trainer import TrainResult, train

__version__ = "0.1.0"

DEMO = str(Path(__file__).parent / "demo")
"""Folder of the small checkpoint that the package carries: ``minopt.load(minopt.DEMO)`` works offline."""

# Where each public name is defined; imported on first use, so that `import minopt` costs nothing.
_HOME = {
    "KVCache": "minopt.cache",
    "convert": "minopt.checkpoint.convert",
    "CheckpointError": "minopt.checkpoint.errors",
    "inspect_checkpoint": "minopt.checkpoint.inspect",
    "save_model": "minopt.checkpoint.save",
    "OPTConfig": "minopt.config",
    "export_model": "minopt.inference.compile",
    "GenerationConfig": "minopt.generation.options",
    "GenerationOutput": "minopt.generation.request",
    "generate": "minopt.generation.decode",
    "GeneratedText": "minopt.generation.texts",
    "LanguageModel": "minopt.text",
    "trace": "minopt.methods.trace",
    "load": "minopt.loading",
    "load_model": "minopt.loading",
    "ClassifiedText": "minopt.methods.heads",
    "QuestionAnswering": "minopt.methods.heads",
    "SequenceClassifier": "minopt.methods.heads",
    "LabelledText": "minopt.methods.labels",
    "Preference": "minopt.methods.labels",
    "OPT": "minopt.model",
    "Tokenizer": "minopt.tokenizer",
    "TrainingConfig": "minopt.training.config",
    "Example": "minopt.training.data",
    "read_data": "minopt.training.data",
    "TrainResult": "minopt.training.trainer",
    "train": "minopt.training.trainer",
}

__all__ = [
    "DEMO",
    "OPT",
    "CheckpointError",
    "ClassifiedText",
    "Example",
    "GeneratedText",
    "GenerationConfig",
    "GenerationOutput",
    "KVCache",
    "LabelledText",
    "LanguageModel",
    "OPTConfig",
    "Preference",
    "QuestionAnswering",
    "SequenceClassifier",
    "Tokenizer",
    "TrainResult",
    "TrainingConfig",
    "convert",
    "export_model",
    "generate",
    "inspect_checkpoint",
    "load",
    "load_model",
    "read_data",
    "save_model",
    "trace",
    "train",
]


def __getattr__(name: str) -> object:
    if name == "interop":
        return import_module("minopt.interop")
    if name not in _HOME:
        raise AttributeError(f"module 'minopt' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
