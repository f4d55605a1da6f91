"""The programs that bench_inference.py compares, behind one call: ids in, times and tokens out.

``VARIANTS`` is the one list of them. Each lives in a process of its own, as it would for a user: where two libraries
keep OpenMP threads in one process, there are more of those than processors, and libgomp then lets all of them sleep at
every barrier instead of waiting actively, which makes a step of either up to twice as long.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from unittest import mock

import common
import torch
import transformers
from torch import Tensor

import minopt
from minopt.inference.linear import build_product
from minopt.model import attend

SETTLE_SECONDS = 0.02  # OpenMP threads wait actively for some 5 ms after a call: the next one's process waits for that


class NotAvailable(Exception):
    """A variant that this machine or this version does not have; the text says why."""


@dataclass(frozen=True)
class Generation:
    """One generation: seconds to the first token and in all, and the new tokens of each row, if it makes any."""

    first: float
    whole: float
    tokens: list[list[int]] | None = None

    def seconds(self, new_tokens: int) -> float:
        """Of a token after the first; of the whole where there is but one."""
        return self.whole if new_tokens == 1 else (self.whole - self.first) / (new_tokens - 1)


class Variant(Protocol):
    """A loaded model: ``ids [B, T]`` on the CPU, exactly ``new_tokens`` of them, options under minopt's names."""

    def __call__(self, ids: Tensor, new_tokens: int, **options: Any) -> Generation: ...


@dataclass
class Checkpoint:
    """A model on disk in the forms that the libraries read; others than the first are made when they are asked for."""

    folder: Path
    device: str

    @property
    def config(self) -> minopt.OPTConfig:
        return minopt.OPTConfig.load(self.folder)

    def beside(self, suffix: str) -> Path:
        """Where another form of it goes."""
        return self.folder.with_name(self.folder.name + suffix)

    def converted(self) -> Path:
        """For CTranslate2. From 1.3B on the weights become int8 here and not at the load: a quarter of the disk."""
        path = self.beside("-ctranslate2")
        if not path.exists():
            quantization = "int8_float32" if self.config.hidden_size >= 2048 else None
            _converter(self.folder).convert(str(path), quantization=quantization)
        return path

    def exported(self, precision: str) -> Path:
        """What ``minopt export`` makes of it."""
        path = self.beside(f"-exported-{precision}")
        if not path.exists():
            options = ["--quantize", "int8"] if precision == "int8" else ["--dtype", precision]
            command = [sys.executable, "-m", "minopt", "export", str(self.folder), str(path), "--max-batch", "32"]
            done = subprocess.run([*command, *options, "--device", self.device], stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise NotAvailable(done.stderr.strip().splitlines()[-1])
        return path


def _converter(folder: Path) -> Any:
    """CTranslate2's converter, for a folder without a tokenizer: a token's text is its number."""
    try:
        from ctranslate2.converters import TransformersConverter
    except ImportError:
        raise NotAvailable('CTranslate2 is not installed: pip install -e ".[bench]"') from None

    class Converter(TransformersConverter):
        def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **options: Any) -> Any:
            size = minopt.OPTConfig.load(model_name_or_path).vocab_size
            vocabulary = {str(number): number for number in range(size)}
            return SimpleNamespace(get_vocab=lambda: vocabulary, bos_token="2", eos_token="2", unk_token="3")

    return Converter(str(folder))


class Minopt:
    """minopt, loaded in any way."""

    def __init__(self, folder: Path, device: str, **options: Any) -> None:
        self.model, self.device = minopt.load(folder, device=device, **options).decoder, device

    def __call__(self, ids: Tensor, new_tokens: int, **options: Any) -> Generation:
        read, ends = self.model.read, []

        def timed(*args: Any) -> Tensor:
            logits = read(*args)
            if not ends:  # the prompt
                common.synchronize(self.device)
                ends.append(time.perf_counter())
            return logits

        ids = ids.to(self.device)
        with mock.patch.object(self.model, "read", timed):
            begin = time.perf_counter()
            output = minopt.generate(self.model, ids, max_new_tokens=new_tokens, eos_token_id=(), **options)
            common.synchronize(self.device)
            end = time.perf_counter()
        return Generation(ends[0] - begin, end - begin, output.sequences[:, ids.shape[1] :].tolist())


def _loaded_as(precision: str) -> dict[str, str]:
    """``minopt.load``'s options for a precision; what int8 leaves alone is float32, as in CTranslate2."""
    return {"dtype": "float32", "quantize": "int8"} if precision == "int8" else {"dtype": precision}


class Transformers:
    """transformers' ``generate``; with a static cache on a GPU it compiles the step itself."""

    def __init__(self, folder: Path, precision: str, device: str, **options: Any) -> None:
        dtype = getattr(torch, precision)
        self.model = transformers.OPTForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
        self.device, self.options = device, options

    def __call__(self, ids: Tensor, new_tokens: int, **options: Any) -> Generation:
        ids, clock = ids.to(self.device), _FirstToken(self.device)
        begin = time.perf_counter()
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, stopping_criteria=[clock], **self.options, **options,
        )  # fmt: skip
        common.synchronize(self.device)
        end = time.perf_counter()
        return Generation(clock.at - begin, end - begin, output[:, ids.shape[1] :].tolist())


class _FirstToken(transformers.StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; notes when it was first asked."""

    def __init__(self, device: str) -> None:
        self.device, self.at = device, 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        if not self.at:
            common.synchronize(self.device)
            self.at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class CTranslate2:
    """CTranslate2's generator; the prompt is read in one pass, as by the others."""

    def __init__(self, folder: Path, precision: str, device: str) -> None:
        import ctranslate2

        compute = {"int8": "int8_float32"}.get(precision, precision)
        threads = torch.get_num_threads()
        self.generator = ctranslate2.Generator(str(folder), device, compute_type=compute, intra_threads=threads)

    def __call__(self, ids: Tensor, new_tokens: int, num_beams: int = 1, **options: Any) -> Generation:
        prompts, times = [[str(number) for number in row] for row in ids.tolist()], []

        def run(count: int, **more: Any) -> Any:
            return self.generator.generate_batch(
                prompts, max_length=count, min_length=count, beam_size=num_beams, include_prompt_in_result=False,
                **options, **more,
            )  # fmt: skip

        def note(step: Any) -> bool:
            if not times:
                times.append(time.perf_counter())
            return False

        begin = time.perf_counter()
        if num_beams > 1:  # it tells nothing of beams on the way
            run(1)
            first = time.perf_counter() - begin
            begin = time.perf_counter()
            found = run(new_tokens)
        else:
            found = run(new_tokens, callback=note)
            first = times[0] - begin
        end = time.perf_counter()
        return Generation(first, end - begin, [row.sequences_ids[0] for row in found])


class Products:
    """A prompt's matrix products and attention alone, of minopt's own kinds and shapes but of no model."""

    def __init__(self, config: minopt.OPTConfig, precision: str, device: str) -> None:
        self.config, self.options = config, {"dtype": getattr(torch, precision), "device": device}
        C, F = config.hidden_size, config.ffn_dim
        shapes = {"qkv": (3 * C, C), "out": (C, C), "fc1": (F, C), "fc2": (C, F)}
        self.layers = [
            {name: self._product(*shape) for name, shape in shapes.items()} for _ in range(config.num_hidden_layers)
        ]
        self.head = self._product(config.vocab_size, config.embed_dim)

    def _product(self, outputs: int, inputs: int) -> Any:
        weight, bias = torch.randn(outputs, inputs, **self.options), torch.randn(outputs, **self.options)
        return build_product(weight * 0.02, bias)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, new_tokens: int, **options: Any) -> Generation:
        B, T = ids.shape
        H, D = self.config.num_attention_heads, self.config.head_dim
        x = torch.randn(B, T, self.config.hidden_size, **self.options)
        begin = time.perf_counter()
        for layer in self.layers:
            q, k, v = layer["qkv"](x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind()
            attend(q, k, v, None, scale=D**-0.5)
            layer["out"](x)
            layer["fc2"](layer["fc1"](x))
        self.head(x[:, -1:])
        seconds = time.perf_counter() - begin
        return Generation(seconds, seconds)


@dataclass(frozen=True)
class Kind:
    """How a variant is opened.

    Attributes:
        files: makes what it reads of a checkpoint in a precision, if that is not there yet.
        load: of that folder, with precision and device.
    """

    files: Callable[[Checkpoint, str], Path]
    load: Callable[[Path, str, str], Variant]


def _as_written(checkpoint: Checkpoint, precision: str) -> Path:
    return checkpoint.folder


VARIANTS = {
    "plain": Kind(_as_written, lambda path, p, device: Minopt(path, device, optimize=False, **_loaded_as(p))),
    "minopt": Kind(_as_written, lambda path, p, device: Minopt(path, device, **_loaded_as(p))),
    "exported": Kind(lambda checkpoint, p: checkpoint.exported(p), lambda path, p, device: Minopt(path, device)),
    "transformers": Kind(_as_written, lambda path, p, device: Transformers(path, p, device)),
    "transformers static": Kind(
        _as_written, lambda path, p, device: Transformers(path, p, device, cache_implementation="static")
    ),
    "ctranslate2": Kind(lambda checkpoint, p: checkpoint.converted(), CTranslate2),
    "products": Kind(_as_written, lambda path, p, device: Products(minopt.OPTConfig.load(path), p, device)),
}

OURS = ("minopt", "exported")
"""Those that the others are held against."""


class Running:
    """A variant in a process of its own."""

    def __init__(self, name: str, checkpoint: Checkpoint, precision: str) -> None:
        path, context = VARIANTS[name].files(checkpoint, precision), multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, name, path, precision, checkpoint.device, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._answer()  # it has loaded

    def __call__(self, ids: Tensor, new_tokens: int, **options: Any) -> Generation:
        """As of a ``Variant``."""
        self._connection.send((ids.tolist(), new_tokens, options))
        generation: Generation = self._answer()
        return generation

    def stop(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join()

    def _answer(self) -> Any:
        answer = self._connection.recv()
        if isinstance(answer, NotAvailable):
            raise answer
        return answer


def _serve(connection: Connection, name: str, path: Path, precision: str, device: str, threads: int) -> None:
    """Runs one variant for as long as somebody asks."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        variant = VARIANTS[name].load(path, precision, device)
    except NotAvailable as reason:
        connection.send(reason)
        return
    connection.send(None)
    while True:
        try:
            ids, new_tokens, options = connection.recv()
        except EOFError:
            return
        connection.send(variant(torch.tensor(ids), new_tokens, **options))
