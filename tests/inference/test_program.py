"""Exported programs decode as their models do, and what cannot run says so in one line."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

import minopt
from minopt import OPT, LanguageModel, TrainingConfig, export_model, inspect_checkpoint
from minopt.cli import main
from minopt.generation.decoder import Draft
from minopt.inference import compile as export
from minopt.inference import linear
from minopt.inference import program as program_form
from minopt.inference.fast import FastOPT
from minopt.inference.program import ExportedModel
from minopt.load_options import LoadOptions
from tests.conftest import build_ours, build_reference, copy_of, quantized_state, read_next
from tests.inference.test_linear import SIZES, check_single_rows, draw

EXAMPLE = Path(__file__).parents[2] / "examples" / "infer_exported.py"
LENGTH, ROWS = 64, 4
TEXT = "The ship lay at anchor, and the captain went below to look for the chart. " * 20
PROMPTS = ["It was a dark night", "The captain", "“I will go,” said the old man, and he", "x"]


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("needs a C++ compiler (g++)")


@pytest.fixture(scope="module", autouse=True)
def untimed() -> Iterator[None]:
    """What is compiled here is not timed beside its model: that depends on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "beside", lambda program, model: {})
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint after a few steps of training."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    lm = minopt.load(minopt.DEMO, device="cpu", optimize=False)
    assert lm.tokenizer is not None
    config = TrainingConfig(output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3,
                            src_length=48, tgt_length=16, device="cpu")  # fmt: skip
    assert minopt.train(lm.model, TEXT, config, tokenizer=lm.tokenizer).steps == 3
    return folder


@pytest.fixture(scope="module")
def lm(source: Path) -> LanguageModel:
    return minopt.load(source, device="cpu")


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of it, in float32, with rows added to few ones in some products."""
    folder = tmp_path_factory.mktemp("exported") / "program"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "wants_full_rows", lambda weight: weight.shape[0] != weight.shape[1])
        assert main(["export", str(source), str(folder), "--max-length", str(LENGTH), "--max-batch", str(ROWS)]) == 0
    assert [path.name for path in folder.parent.iterdir()] == ["program"]  # what it was compiled in is gone
    return folder


@pytest.fixture(scope="module")
def exported(folder: Path) -> LanguageModel:
    """Opened and run once without building the Python model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OPT, "__init__", lambda *_, **__: pytest.fail("the Python model was built"))
        lm = minopt.load(folder)
        assert lm.generate(PROMPTS, max_new_tokens=2, num_beams=2) != [""] * len(PROMPTS)
    return lm


def program_of(folder: Path) -> ExportedModel:
    program = minopt.load(folder).decoder
    assert isinstance(program, ExportedModel)
    return program


def saved(base: Path, kind: str, **changes: Any) -> Path:
    """A model of one layer, without tokenizer."""
    minopt.save_model(build_ours(build_reference(kind, num_hidden_layers=1, **changes)), base / "model")
    return base / "model"


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> tuple[OPT, Path]:
    """A model of the 350m kind, with projections, and its program."""
    model = saved(base := tmp_path_factory.mktemp("bfloat16"), "350m", ffn_dim=32)
    export_model(model, base / "program", dtype="bfloat16")
    return minopt.load_model(model, device="cpu", dtype="bfloat16"), base / "program"


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> tuple[OPT, Path]:
    """A model of the 125m kind with the weights of an int8 folder, and the program that the command makes of it."""
    model = saved(base := tmp_path_factory.mktemp("int8"), "125m", ffn_dim=32)
    minopt.convert(model, base / "int8", quantize="int8")
    assert main(["export", str(base / "int8"), str(base / "program")]) == 0
    return quantised(minopt.load_model(model, device="cpu")), base / "program"


def quantised(model: OPT) -> export.Int8OPT:
    return export.Int8OPT(model.config, quantized_state(model))


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy to the limit": {"max_new_tokens": LENGTH - 20},
    "sampling": {"do_sample": True, "seed": 3},
    "several samples": {"do_sample": True, "seed": 3, "num_return_sequences": 2, "batch_size": 2},
    "beams": {"num_beams": 4, "no_repeat_ngram_size": 3, "num_return_sequences": 2},
    "more beams than rows": {"num_beams": ROWS + 3, "max_new_tokens": 40},
    "sampled beams": {"num_beams": 3, "do_sample": True, "seed": 5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_texts_are_the_models_whatever_the_options(name: str, lm: LanguageModel, exported: LanguageModel) -> None:
    """One at a time and in batches with padding."""
    options = {"max_new_tokens": 24, **OPTIONS[name]}
    assert exported.generate(PROMPTS, **options) == lm.generate(PROMPTS, **options)
    options.pop("batch_size", None)
    assert exported.generate(PROMPTS[1], **options) == lm.generate(PROMPTS[1], **options)
    if name == "greedy":
        assert "".join(exported.stream(PROMPTS[0], **options)) == lm.generate(PROMPTS[0], **options)


def test_a_program_drafts_and_others_draft_for_it(
    lm: LanguageModel, exported: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Draft, "cost_for", lambda self, other: 0.2)
    for model, draft in ((lm, exported), (exported, lm)):
        plain = model.generate(PROMPTS[:2], max_new_tokens=12, return_details=True)
        found = model.generate(PROMPTS[:2], max_new_tokens=12, return_details=True, draft=draft, batch_size=2)
        assert [record.token_ids for record in found] == [record.token_ids for record in plain]
        assert max(record.accepted_tokens for record in found) > 0


def test_log_probabilities_of_texts_are_the_models(lm: LanguageModel, exported: LanguageModel) -> None:
    texts = [*PROMPTS, "It was", "</s>"]  # more than the program takes at once
    for found, expected in zip(exported.score(texts), lm.score(texts), strict=True):
        assert found.token_ids == expected.token_ids
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    pair = [exported, lm]
    found, expected = ([x.total for x in each.score("The", [" captain", " old man"])] for each in pair)
    assert found == pytest.approx(expected, abs=1e-4)
    assert exported.perplexity(TEXT) == pytest.approx(lm.perplexity(TEXT, window=LENGTH), rel=1e-5)


def test_train_predict_export_infer_give_the_same_tokens(
    source: Path, lm: LanguageModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trained model, the command on its folder, the command on the program, and a script without minopt."""
    prompt, flags = "The ship", ["--max-new-tokens", "20"]
    text = lm.generate(prompt, max_new_tokens=20)
    assert text != minopt.load(minopt.DEMO, device="cpu").generate(prompt, max_new_tokens=20)
    for model in (source, folder):
        capsys.readouterr()
        assert main(["generate", prompt, "--model", str(model), *flags]) == 0
        assert capsys.readouterr().out == text + "\n"
    code = (
        "import runpy, sys; sys.modules['minopt'] = None; sys.argv[:] = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(EXAMPLE), str(folder), prompt, *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode(prompt + text)
    assert result.stdout == lm.tokenizer.backend.decode(ids) + "\n"


def test_the_manifest_tells_what_the_program_needs_and_is_made_of(source: Path, folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["torch"] == torch.__version__
    assert manifest["device"] == "cpu"
    assert (manifest["dtype"], manifest["max_length"], manifest["max_batch"]) == ("float32", LENGTH, ROWS)
    assert manifest["program_sha256"] == hashlib.sha256((folder / "program.pt2").read_bytes()).hexdigest()
    assert manifest["weights_sha256"] == inspect_checkpoint(source, digest=True).digest
    assert set(manifest["instructions"]) <= torch.cpu.get_capabilities().keys()
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json", "program.pt2", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json"}  # fmt: skip


@pytest.mark.parametrize("program", ["bfloat16", "int8"])
def test_rounded_programs_decode_as_their_models_but_for_near_ties(
    program: str, request: pytest.FixtureRequest
) -> None:
    """Their scores are as close to those of the same weights without rounding as the model's own."""
    model, folder = request.getfixturevalue(program)
    assert json.loads((folder / "manifest.json").read_text())["quantize"] == (None if program == "bfloat16" else "int8")
    found, exact = program_of(folder), export._unrounded(model)
    ids = minopt.generate(model, torch.arange(27).view(3, 9), max_new_tokens=20, eos_token_id=()).sequences
    with torch.inference_mode():
        for T in (1, 4, 28):
            cache = found.new_cache(3, T + 1)
            steps = [read_next(found, ids[:, :T], None, cache), read_next(found, ids[:, T : T + 1], None, cache)]
            right = exact(ids[:, : T + 1])[:, -2:]
            errors = [(x - right).abs().max() for x in (torch.stack(steps, 1), model(ids[:, : T + 1])[:, -2:])]
            assert 0 < errors[0] < 1.5 * errors[1] < 0.15 * right.abs().max()
    export.check_tokens(model, found)


@torch.no_grad()
def test_rows_are_added_to_the_inputs_of_each_product_that_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_ours(build_reference("350m", num_hidden_layers=1)).eval()
    for wanted in (True, False):
        monkeypatch.setattr(linear, "wants_full_rows", lambda weight, wanted=wanted: wanted)
        graph = export._trace(model).graph
        pads, products = (
            graph.find_nodes(op="call_function", target=target)
            for target in (torch.ops.aten.pad.default, torch.ops.aten.linear.default)
        )
        assert len(products) == 9  # both projections and the head too
        assert [product.args[0] for product in products if product.args[0] in pads] == (pads if wanted else [])
        assert len(pads) == 9 * wanted


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize(("levels", "unsigned"), [(127, False), (127, True), (63, False)])
def test_int8_is_the_nearest_of_255_steps_a_channel_and_a_token(
    outliers: bool, levels: int, unsigned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against numpy, in float64; of 127 steps a token where the processor's sums are short."""
    if levels == 127 and export._saturates():
        pytest.skip("this processor sums int8 in 16 bits")
    monkeypatch.setattr(export, "_saturates", lambda: levels == 63)
    monkeypatch.setattr(export, "has", lambda name: name == "avx512_vnni" and unsigned)
    generator = np.random.default_rng(0)
    weight, bias, x = (generator.normal(size=size) for size in ((5, 7), 5, (2, 3, 7)))
    weight[3] *= 1000
    x[..., 2] *= 1000
    x[1, 1] = 0
    integers = minopt.int8.quantize(torch.tensor(weight))
    layer = export.Int8Linear(*integers, torch.tensor(bias).float(), outliers=outliers)
    assert layer._zero == (64 if levels == 63 else 128 if unsigned else 0)

    def rounded(values: np.ndarray, levels: int = 127) -> np.ndarray:
        step = np.abs(values).max(-1, keepdims=True).clip(1e-30) / levels
        return np.round(values / step) * step

    x32, terms = torch.tensor(x, dtype=torch.float32), rounded(x, levels)
    if outliers:  # what is left is at most half a step, which as many levels divide
        step = np.abs(x).max(-1, keepdims=True).clip(1e-30) / levels / (2 * levels)
        terms = terms + np.round((x - terms) / step) * step
    exact = x @ rounded(weight).T + bias
    np.testing.assert_allclose(layer(x32), terms @ rounded(weight).T + bias, rtol=1e-4, atol=2e-2)
    error = np.abs(layer(x32).numpy() - exact).max()
    assert error < 0.02 * np.abs(exact).max() if outliers else error > 1
    layer.rounds_inputs = False
    np.testing.assert_allclose(layer(x32), exact, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("saturates", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_single_row_is_as_exact_as_one_of_a_batch_whatever_its_size(
    size: float, saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in 7 bits, as on processors without VNNI."""
    in_7_bits = saturates or export._saturates()
    monkeypatch.setattr(export, "_saturates", lambda: in_7_bits)
    weight, scale = minopt.int8.quantize(draw(64, 256))
    check_single_rows(export.Int8Linear(weight, scale, None), weight, scale, size)


def test_a_program_runs_in_a_process_that_did_not_compile_it(int8: tuple[OPT, Path]) -> None:
    code = (
        "import sys, torch, minopt; "
        "ids = torch.arange(27).view(3, 9); program = minopt.load(sys.argv[1]).decoder; "
        "print(minopt.generate(program, ids, max_new_tokens=4, eos_token_id=()).sequences.tolist())"
    )
    result = subprocess.run([sys.executable, "-c", code, str(int8[1])], capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.returncode, result.stderr)
    ids = torch.arange(27).view(3, 9)
    expected = minopt.generate(minopt.load(int8[1]).decoder, ids, max_new_tokens=4, eos_token_id=()).sequences.tolist()
    assert json.loads(result.stdout) == expected


def test_int8_is_for_linear_layers_and_the_head_alone(bfloat16: tuple[OPT, Path]) -> None:
    model, _ = bfloat16
    found = quantised(model)
    linear = {f"layers.0.{name}.weight" for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")}  # fmt: skip
    names = {name for name, buffer in found.named_buffers() if buffer.dtype == torch.int8}
    assert names == linear | {"head_proj.weight"}
    left = {name for name, _ in found.named_parameters()}
    assert left == {name for name, _ in model.named_parameters() if name.replace("bias", "weight") not in linear}


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_what_is_compiled_is_the_model_whatever_its_files(
    quantize: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[OPT] = []
    monkeypatch.setattr(export, "_trace", lambda model: compiled.append(model) or 1 / 0)
    minopt.convert(saved(tmp_path, "125m"), tmp_path / "int8", quantize="int8")
    for folder in ("model", "int8"):
        with pytest.raises(ZeroDivisionError):
            export_model(tmp_path / folder, tmp_path / "program", quantize=quantize)
    plain, other = compiled
    assert isinstance(other, export.Int8OPT)
    assert type(plain) is (OPT if quantize is None else export.Int8OPT)
    expected = plain if quantize else quantised(plain)
    for one, same in zip([*expected.parameters(), *expected.buffers()], [*other.parameters(), *other.buffers()],
                         strict=True):  # fmt: skip
        assert torch.equal(one, same)


@pytest.mark.parametrize(
    ("dtype", "scale", "accepted"),
    [("bfloat16", 0.9995, True), ("bfloat16", 0.5, True), ("float32", 0.9995, False), ("float32", 0.5, True)],
)
def test_equal_scores_may_decide_otherwise_in_sixteen_bits_alone(dtype: str, scale: float, accepted: bool) -> None:
    """A decoder leans to odd tokens: 2k and 2k + 1 are all but the same, or (nothing changes) 2k is better."""
    model = build_ours(build_reference("125m"))
    with torch.no_grad():
        model.embed_tokens.weight[1::2] = scale * model.embed_tokens.weight[::2]
    model = model.to(getattr(torch, dtype))
    leaning: Any = copy.copy(model)
    leaning.read = lambda *args: model.read(*args).double() + torch.arange(model.config.vocab_size) % 2 * 0.01
    message = (
        r"^export: the program's token \d+ after the check prompt 'one row' is \d+, the model's is \d+, and their "
        r"scores are .* apart \(rounding explains [^)]*\)\. Nothing was written; try another dtype, and report it\.$"
    )
    with contextlib.nullcontext() if accepted else pytest.raises(ValueError, match=message):
        export.check_tokens(model, leaning)


def test_a_program_of_another_model_is_found_out(bfloat16: tuple[OPT, Path], source: Path, folder: Path) -> None:
    for model, program in (bfloat16, (minopt.load_model(source, device="cpu"), folder)):
        changed = OPT(model.config, dtype=model.dtype).eval()
        changed.load_state_dict(model.state_dict())
        with torch.no_grad():
            changed.embed_positions.weight.copy_(model.embed_positions.weight.roll(1, 0))
        with pytest.raises(ValueError, match=r"^export: the program's token \d+ after the check prompt 'one row'"):
            export.check_tokens(changed, program_of(program))


def test_the_check_has_a_row_alone_rows_with_padding_and_one_of_full_length(exported: LanguageModel) -> None:
    program = exported.decoder
    assert isinstance(program, ExportedModel)
    one, padded, longest = export._check_prompts(program.config, program.max_batch)
    assert one[1].shape[0] == 1
    assert padded[2] is not None
    assert padded[2].sum(1).tolist() == [9, 5, 1]
    assert longest[1].shape[1] + export._NEW == LENGTH


# What a user can mend, once the program is there.


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "manifest.json").read_text()) | changes
        (folder / "manifest.json").write_text(json.dumps({k: v for k, v in values.items() if v != "gone"}))

    return change


def cut(folder: Path) -> None:
    content = (folder / "program.pt2").read_bytes()
    (folder / "program.pt2").write_bytes(content[: len(content) // 2])


def change_a_weight(folder: Path) -> None:
    """The file has the same length, and is a sound package still."""
    content = bytearray((folder / "program.pt2").read_bytes())
    content[-100_000] ^= 1
    (folder / "program.pt2").write_bytes(content)


NOT_THE_FILE = r"is not the file that manifest\.json describes \(its SHA-256 differs\): .* Fetch the folder again\."
AGAIN = r"Export the model again \(minopt export\), where it is to run\."
TORCH = torch.__version__.replace("+", ".")
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (cut, NOT_THE_FILE),
    "other weights": (change_a_weight, NOT_THE_FILE),
    "no program": (lambda f: (f / "program.pt2").unlink(), r"expected program\.pt2 beside manifest\.json\. Fetch .*"),
    "no config": (lambda f: (f / "config.json").unlink(), r"expected weights, got program\.pt2: a program of .*"),
    "no JSON": (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json: expected JSON, .* Fetch .*"),
    "newer format": (edit(format=3), rf"manifest\.json: expected format 1 or 2, got 3\. {AGAIN}"),
    "lacking": (edit(dtype="gone", flavour="x"), r"manifest\.json: dtype, flavour missing or unknown\. Fetch the .*"),
    "unknown dtype": (edit(dtype="float8"), rf"manifest\.json: expected dtype float32 or .*, got 'float8'\. {AGAIN}"),
    "another torch": (edit(torch="2.11.0"), rf"was compiled by torch 2\.11\.0, this is {TORCH}\. {AGAIN}"),
    "another system": (edit(platform="Darwin arm64"), rf"was compiled for Darwin arm64, this is .*\. {AGAIN}"),
    "another processor": (edit(instructions=["avx2", "avx99", "sve7"]), rf"with .*avx99, sve7, .* lacks\. {AGAIN}"),
    "a GPU": (edit(device="cuda"), rf"program\.pt2: was compiled for a GPU, and torch sees none here\. {AGAIN}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_cannot_run_here_says_why(
    damage: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "program")
    change, message = DAMAGES[damage]
    change(tmp_path / "program")
    assert main(["generate", "x", "--model", str(tmp_path / "program")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^minopt: error: {re.escape(str(tmp_path / 'program'))}.*{message}$", line), line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, r"^dtype: .*\.pt2 was exported with --dtype float32, got bfloat16\. Leave it out, or"),
        ({"dtype": torch.float16}, r"^dtype: .* was exported with --dtype float32, got float16\. Leave it out, or"),
        ({"model_config": "opt-125m"}, r"^model_config: .* is an exported program, to which it does not apply\. Leave"),
        ({"quantize": "int8"}, r"^quantize: .* is an exported program, to which it does not apply\. Leave it out\.$"),
    ],
)
def test_a_program_is_what_it_was_exported_as(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        minopt.load(folder, **options)
    assert minopt.load(folder, device="cpu", dtype=torch.float32).decoder.dtype == torch.float32


def test_a_program_for_a_cpu_does_not_run_on_a_gpu(folder: Path) -> None:
    checkpoint, options = program_form.open_files(folder, None, ()), LoadOptions(torch.device("cuda:1"))
    with pytest.raises(ValueError, match=r"^device: .* was exported with --device cpu, got cuda\. .* --device cuda\.$"):
        program_form.build(checkpoint, options)


def test_its_limits_are_told_before_anything_runs(exported: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExportedModel, "read", lambda *_: pytest.fail("the program ran"))
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match=rf"^prompt: .* \+ max_new_tokens 60 = .* positions, the model has {LENGTH}\."):
        exported.generate("The old man and the sea", max_new_tokens=60)
    rows = rf"^batch: the program was exported for at most {ROWS} rows, got %d\. Run fewer .* larger --max-batch\.$"
    with pytest.raises(ValueError, match=rows % (ROWS + 1)):
        minopt.generate(exported.decoder, ids.expand(ROWS + 1, 2))
    with pytest.raises(ValueError, match=rows % 6):
        exported.generate("x", do_sample=True, num_return_sequences=6)
    with pytest.raises(ValueError, match=rows % 6):
        exported.generate(PROMPTS * 2, batch_size=6)


def test_a_full_cache_is_not_written_beyond(exported: LanguageModel) -> None:
    program, ids = exported.decoder, torch.tensor([[5, 6]])
    cache = program.new_cache(1, 2)
    read_next(program, ids, None, cache)
    for shape in ((1, 1), (2, 1)):
        message = rf"^cache: made for 1 rows of 2 tokens, 2 filled, got ids \[{shape[0]}, 1\] and a mask of 3 tokens\. "
        with pytest.raises(ValueError, match=message):
            read_next(program, ids.view(2, 1)[: shape[0]], None, cache)


def test_what_needs_weights_says_that_a_program_has_none(
    exported: LanguageModel, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "model: this is an exported program, which generates and scores, but has no weights to train"
    with pytest.raises(ValueError, match=f"^{message}"):
        exported.save(tmp_path / "run")
    (tmp_path / "text.txt").write_text(TEXT)
    flags = f"--model {folder} --do_train --train_file {tmp_path}/text.txt --output_dir {tmp_path}/run --device cpu"
    assert main(["finetune", *flags.split()]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


# What a user can mend before there is a program.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_length": 1025}, ValueError, r"^max_length: expected at most the model's 1024 positions, got 1025\.$"),
        ({"max_length": 1}, ValueError, r"^max_length: expected 2 or more tokens, got 1\.$"),
        ({"quantize": "int4"}, ValueError, r'^quantize: expected None or "int8", got .int4.\.$'),
        ({"max_batch": 0}, ValueError, r"^max_batch: expected 1 or more rows, got 0\.$"),
        ({"dtype": "int8"}, ValueError, r"^dtype: expected auto, float32, .*, got 'int8'\.$"),
        ({"tokenizer": "nowhere"}, FileNotFoundError, r"^nowhere: expected tokenizer\.json"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export_model(minopt.DEMO, tmp_path / "program", **options)
    with pytest.raises(ValueError, match=r"^model: expected a folder or a name on the hub, got OPT\. Save a model"):
        export_model(build_ours(build_reference("125m")), tmp_path / "program")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"^quantize: int8 programs run on a CPU, got cuda\. Leave it out, or export "):
        export._check_options("int8", torch.device("cuda"), None, None)


@pytest.mark.parametrize("kind", ["file", "folder", "source"])
def test_what_is_there_is_not_replaced_unasked(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "program"
    if kind == "file":
        path.write_text("mine")
    else:
        copy_of(minopt.DEMO, path)
    source, force = (str(path), ["--force"]) if kind == "source" else (minopt.DEMO, [])
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", source, str(path), *force]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    expected = {"file": "expected a folder to write to, got a file", "source": "program: is, or holds, the source"}
    assert expected.get(kind, "replace it with --force") in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("step", "error"), [("_compile", KeyboardInterrupt()), ("check_tokens", ValueError("export: other tokens"))]
)
def test_what_breaks_off_leaves_nothing(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        assert list(tmp_path.iterdir()) != []
        raise error

    if step == "check_tokens":
        monkeypatch.setattr(export, "_fastest", lambda *_: None)
    monkeypatch.setattr(export, step, fail)
    with pytest.raises(type(error)):
        export_model(minopt.DEMO, tmp_path / "program")
    assert list(tmp_path.iterdir()) == []


NO_COMPILER = (
    "minopt: error: export: needs a C++ compiler, and found none (no-such-compiler). Install one (apt install g++, "
    "dnf install gcc-c++, conda install gxx), or name yours in the environment variable CXX."
)
BROKEN_COMPILER = (
    "minopt: error: export: compiling failed (x.cpp:1: error: no space left on device). Is the disk full, or the "
    "compiler too old?"
)


@pytest.mark.parametrize(("compiler", "message"), [("no-such-compiler", NO_COMPILER), ("broken", BROKEN_COMPILER)])
def test_a_compiler_that_is_missing_or_fails_is_one_line_and_leaves_nothing(
    compiler: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if compiler == "broken":
        path = tmp_path / "broken-g++"
        path.write_text('#!/bin/sh\nfor a in "$@"; do [ "$a" = --version ] && exec g++ --version; done\n'
                        "echo 'x.cpp:1: error: no space left on device' >&2; exit 1\n")  # fmt: skip
        path.chmod(0o755)
        compiler = str(path)
    model = saved(tmp_path, "125m")
    before = sorted(tmp_path.iterdir())
    with torch._inductor.config.patch({"cpp.cxx": (None, compiler)}):
        assert main(["export", str(model), str(tmp_path / "program")]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == message
    assert sorted(tmp_path.iterdir()) == before


class Trial:
    """Compiles nothing: each way writes its number, and takes as long as a test says."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, times: list[float | None], processor: Sequence[str] = ()
    ) -> None:
        self.times, self.tried, self.failed = iter(times), list[str | None](), 0
        monkeypatch.setattr(export, "has", lambda name: name in processor)
        monkeypatch.setattr(export, "aoti_compile_and_package", self.package)
        monkeypatch.setattr(export, "beside", lambda program, model: program.given)

    def package(self, program: Any, package_path: str, inductor_configs: dict[str, Any]) -> None:
        assert not torch.backends.cuda.cudnn_sdp_enabled()  # a program for a GPU would plan each new length
        assert inductor_configs["freezing"]
        self.tried.append(inductor_configs.get("max_autotune_gemm_backends"))
        time = next(self.times)
        if time is None:
            self.failed += 1
            raise CppCompileError(["g++"], "NoValidChoicesError")
        Path(package_path).write_text(json.dumps({"1 row": {"program": time, "model": 1.0}}))

    def run(self, model: OPT, folder: Path) -> tuple[float, float]:
        """The times of the program that is taken, and of the file that is kept."""
        loads = []

        def load() -> Any:
            loads.append(1)
            return SimpleNamespace(given=json.loads((folder / "program.pt2").read_text()), manifest=MANIFEST)

        best: Any = export._fastest(model, object(), folder, load)  # type: ignore[arg-type]
        assert [path.name for path in folder.iterdir()] == ["program.pt2"]
        assert len(loads) == len(self.tried) - self.failed  # each once
        kept = json.loads((folder / "program.pt2").read_text())
        return best.manifest.milliseconds["1 row"]["program"], kept["1 row"]["program"]


MANIFEST = program_form.Manifest(2, "", "", "cpu", (), "float32", None, 9, None)
OWN = ["CPP", "CPP,ATEN"]


@pytest.mark.parametrize(
    ("form", "processor", "times", "tried", "taken"),
    [
        ("float32", ["amx_tile", "avx512_vnni"], [1.04], [None], 1.04),
        ("bfloat16", ["avx512_vnni"], [0.9], [None], 0.9),  # inductor's products need AMX
        ("bfloat16", ["amx_tile"], [1.05], ["CPP"], 1.05),
        ("bfloat16", ["amx_tile"], [1.06, 0.8], OWN, 0.8),
        ("bfloat16", ["amx_tile"], [1.2, 1.1, 1.3], [*OWN, None], 1.1),
        ("bfloat16", ["amx_tile"], [1.2, None, 1.3], [*OWN, None], 1.2),
        ("int8", ["avx512_vnni"], [None, 0.7], OWN, 0.7),
        ("int8", [], [0.7], [None], 0.7),
    ],
)
def test_the_first_way_that_is_nowhere_slower_is_taken_or_the_least_slow(
    form: str, processor: list[str], times: list[float | None], tried: list[str | None], taken: float,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    trial = Trial(monkeypatch, times, processor)
    model = build_ours(build_reference("125m", num_hidden_layers=1))
    model = quantised(model) if form == "int8" else model.to(getattr(torch, form))
    (tmp_path / "program").mkdir()
    assert trial.run(model, tmp_path / "program") == (taken, taken)
    assert trial.tried == tried


def test_where_no_way_compiles_the_last_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(monkeypatch, [None, None, None], ["amx_tile"])
    model = build_ours(build_reference("125m", num_hidden_layers=1)).bfloat16()
    with pytest.raises(OSError, match=r"^export: compiling failed \(.+\)\. Is"):
        trial.run(model, tmp_path)
    assert trial.tried == [*OWN, None]


SLOW = {"1 row": {"program": 12.7, "model": 5.3}, "8 rows": {"program": 1.0, "model": 1.0}}
WHERE = "slower than the loaded model: 1 row in 12.7 ms, the model in 5.3 ms. Load the model for such work."


def slow_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is a file of a few bytes, and slower than the model."""

    def fastest(model: OPT, fast: Any, folder: Path, _: Any) -> Any:
        (folder / "program.pt2").write_bytes(b"a program")
        return SimpleNamespace(manifest=replace(MANIFEST, milliseconds=SLOW), dtype=model.dtype)

    monkeypatch.setattr(export, "_fastest", fastest)
    monkeypatch.setattr(export, "check_tokens", lambda *_: None)


def test_a_program_that_is_slower_says_where_and_its_manifest_keeps_the_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow_program(monkeypatch)
    hashed: list[Path] = []
    monkeypatch.setattr(export, "sha256", lambda path: hashed.append(path) or program_form.sha256(path))
    assert main(["export", str(saved(tmp_path, "125m")), str(tmp_path / "program")]) == 0
    assert f"minopt: warning: export: the program is {WHERE}" in capsys.readouterr().err.splitlines()
    assert len(hashed) == 1
    read = program_form.Manifest.read
    assert read(tmp_path / "program").milliseconds == SLOW
    edit(format=1, milliseconds="gone")(tmp_path / "program")  # as an older minopt has written it
    assert read(tmp_path / "program").milliseconds == {}


def test_a_model_that_is_slower_once_compiled_runs_uncompiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow_program(monkeypatch)
    model = saved(tmp_path, "125m")
    lm = minopt.load(model, device="cpu", optimize="compile", quantize="int8")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("minopt")] == [
        "optimize: compiled, the model is slower: 1 row in 12.7 ms, the model in 5.3 ms. It runs as it does without "
        "compiling."]  # fmt: skip
    assert type(lm.decoder) is FastOPT
    ids = torch.arange(3, 17).view(2, 7)
    found, expected = (minopt.generate(decoder, ids, max_new_tokens=12).sequences for decoder in (
        lm.decoder, minopt.load(model, device="cpu", quantize="int8").decoder))  # fmt: skip
    assert torch.equal(found, expected)


def test_a_model_that_is_compiled_while_loading_says_what_it_says_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tmp_path, "125m")
    for name in ("sha256", "digest_of"):
        monkeypatch.setattr(export, name, None)  # a program that is used once has no need of them
    monkeypatch.setattr(Draft, "cost_for", lambda self, other: 0.2)
    compiled = minopt.load(model, device="cpu", optimize="compile", draft="int8")
    assert repr(compiled.decoder) == "ExportedModel(program, torch.float32, cpu)"
    with pytest.raises(AttributeError, match=r"^ExportedModel: has no 'half'\. model: this is an exported program"):
        _ = compiled.decoder.half
    with pytest.raises(ValueError, match=r"^ExportedModel: cannot be copied or pickled\."):
        copy.deepcopy(compiled)
    ids, mask = torch.arange(3, 17).view(2, 7), torch.arange(14).view(2, 7) > 3
    found, expected = (minopt.generate(lm.decoder, ids, mask, max_new_tokens=12).sequences
                       for lm in (compiled, minopt.load(model, device="cpu")))  # fmt: skip
    assert torch.equal(found, expected)
    with_draft = minopt.generate(compiled.decoder, ids, mask, max_new_tokens=12, draft=compiled.draft)
    assert torch.equal(with_draft.sequences, expected)
    assert with_draft.drafted_tokens is not None
    assert max(with_draft.drafted_tokens) > 0
    with pytest.raises(ValueError, match="model: this is an exported program"):
        compiled.save(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
