"""What the plan says is what models hold, and what does not fit is said before anything is read."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import minopt
from minopt import OPTConfig, memory
from minopt.checkpoint import tensors
from minopt.checkpoint.checkpoint import open_checkpoint
from minopt.cli import main
from minopt.config import PRESETS
from minopt.inference import plan
from minopt.inference.linear import Plain, kind_on_cpu
from minopt.inference.plan import device_counts, find_config, plan_generation, rows_that_fit
from minopt.load_options import LoadOptions
from minopt.progress import size_of
from minopt.strangers import MANIFEST
from tests.conftest import build_ours, build_reference

FLOAT16_GPU: dict[str, Any] = {"dtype": torch.float16, "device": "cuda"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_cache_are_what_models_hold(kind: str, dtype: torch.dtype) -> None:
    config = build_ours(build_reference(kind)).config
    model = minopt.OPT(config, dtype=dtype)
    weights = sum(p.nbytes for p in model.parameters())
    head = 0 if kind_on_cpu(dtype) is Plain else model.embed_tokens.weight.nbytes
    found = plan_generation(config, dtype=dtype, batch=3, length=20)
    assert found.weights == weights + head
    assert found.cache == model.new_cache(3, 20).nbytes
    assert plan_generation(config, dtype=dtype, device="cuda").weights == weights
    int8 = plan_generation(config, dtype=dtype, quantize="int8").weights
    quantized = [p for name, p in model.named_parameters() if minopt.int8.is_quantized(name)]
    rows = sum(len(p) for p in quantized)
    table = model.embed_tokens.weight.numel()
    assert int8 == weights - sum(p.nbytes - p.numel() for p in quantized) + 4 * rows + table
    layers = sum(p.nbytes for name, p in model.named_parameters() if name.startswith("layers."))
    offloaded = plan_generation(config, dtype=dtype, offload="disk").weights
    assert offloaded == weights - layers + 2 * layers // config.num_hidden_layers


def test_a_share_is_a_share_of_what_is_divided() -> None:
    config = OPTConfig.preset("opt-6.7b")
    whole, half = (plan_generation(config, dtype=torch.float16, device="cuda", devices=n) for n in (1, 2))
    everywhere = (32 * (4 + 2) + 2 + 2050) * 4096  # norms, biases of summed layers, the last norm, positions
    assert half.weights == (whole.weights - 2 * everywhere) // 2 + 2 * everywhere
    assert half.cache == whole.cache // 2


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [({}, [1, 2, 3, 4, 6, 12]), ({"ffn_dim": 10}, [1, 2, 3, 4]), ({"vocab_size": 5}, [1, 2, 3])],
)
def test_each_process_of_a_division_has_a_part_of_everything(sizes: dict[str, int], expected: list[int]) -> None:
    """Of 10 inner units in shares of 2, the last of 6 processes would have none."""
    config = OPTConfig(**{"num_attention_heads": 12, "hidden_size": 48, "ffn_dim": 96, "vocab_size": 96} | sizes)  # type: ignore[arg-type]
    assert device_counts(config) == expected
    for count in set(range(1, 13)) - set(expected):
        with pytest.raises(ValueError, match=f"^devices: a model of 12 heads, .* among {count} processes. Take one of"):
            plan_generation(config, dtype=torch.float32, devices=count)


@pytest.mark.parametrize("options", [{}, {"devices": 4}, {"offload": "cpu"}, {"quantize": "int8"}])
def test_rows_that_fit_are_the_most(options: dict[str, Any]) -> None:
    config = OPTConfig.preset("opt-1.3b")
    options |= {"dtype": torch.float16, "device": "cuda", "length": 512}
    for most_bytes in (2**29, 4_000_000_000, 4_500_000_000, 10_000_000_000):
        most = rows_that_fit(config, most_bytes, **options)
        assert plan_generation(config, batch=max(most, 1), **options).total <= most_bytes or most == 0
        assert plan_generation(config, batch=most + 1, **options).total > most_bytes
    assert most > 1


def test_the_example_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text(encoding="utf-8")
    command, shown = re.findall(r"```sh\nminopt (plan .*)\n```\n\n```text\n(.*?)```", text, re.DOTALL)[0]
    assert main(command.split()) == 0
    assert capsys.readouterr().out == shown


def test_the_table_of_the_docs() -> None:
    """As check_plan.py --table writes it."""
    text = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text()
    lines = text.partition("<!-- plan -->\n")[2].partition("<!-- /plan -->")[0].splitlines()
    memories = [int(cell.split()[0]) * 10**9 for cell in lines[0].split("|")[3:-1]]
    assert memories == [n * 10**9 for n in (16, 24, 40, 80, 141)]
    for line, name in zip(lines[2:], [name for name in PRESETS if name.startswith("opt-")], strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        config = OPTConfig.preset(name)
        expected = []
        for free in memories:
            counts = [
                0 if config.num_attention_heads % n else rows_that_fit(config, free, devices=n, **FLOAT16_GPU)
                for n in (1, 2, 4, 8)
            ]
            expected.append(" / ".join(f"{count:,}" if count else "-" for count in counts))
        assert (cells[0], cells[2:]) == (name, expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # The article of 2022, 6.7B on two T4: whole with a text, divided with many.
        ("opt-6.7b --devices 2 --memory 16GB", ["1 of the 2 devices is enough for 1 x 2,048 tokens.", "Use: minopt "
         "generate --model facebook/opt-6.7b --dtype float16 --max-batch-tokens 2048"]),
        ("opt-6.7b --devices 2 --memory 10GB", ["Use: torchrun --nproc-per-node 2 -m minopt generate --model "
         "facebook/opt-6.7b --dtype float16 --max-batch-tokens 6144"]),
        ("opt-175b --devices 8 --memory 80GB", ["6 of the 8 devices are enough for 1 x 2,048 tokens.",
         "Use: torchrun --nproc-per-node 6 -m minopt generate --model facebook/opt-175b --dtype float16"]),
        ("opt-125m --devices 8 --memory 16GB", [
            "The model has 12 heads and can be divided among 1, 2, 3, 4, 6, 12 devices, not among 8.",
            "1 of the 8 devices is enough for 1 x 2,048 tokens.",
            "Use: minopt generate --model facebook/opt-125m --dtype float16"]),
        ("opt-30b --memory 16GB", ["Beside it, 59.2 GB of the machine's own memory.", "Use: minopt generate --model "
         "facebook/opt-30b --dtype float16 --offload cpu --max-batch-tokens 6144"]),
        ("opt-13b --memory 24GB --quantize int8", ["Use: minopt generate --model facebook/opt-13b --dtype float16 "
         "--quantize int8"]),
        ("opt-13b --memory 2GB --device cpu", ["Nothing fits: the least is 8.2 GB (--offload disk). Try a smaller "
         "--length, or --dtype bfloat16, or --devices 40."]),
    ],
)  # fmt: skip
def test_what_to_use_and_why(arguments: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", "--device", "cuda", *arguments.split()])
    first, *_, said = capsys.readouterr().out.split("\n\n")
    assert "1 x 2,048 tokens (prompt and new ones), on a " in first
    assert said.splitlines() == expected
    assert code == expected[-1].startswith("Nothing fits")


def test_sizes_have_the_unit_that_fits_them() -> None:
    for count, text in {0: "0 bytes", 999: "999 bytes", 1000: "1.0 kB", 20_300_000: "20.3 MB", 999_949_999: "999.9 MB",
                        999_960_000: "1.0 GB", 16 * 10**9: "16.0 GB", 7 * 10**11: "700.0 GB"}.items():  # fmt: skip
        assert size_of(count) == text


def test_a_folder_is_planned_as_it_is_stored(
    write_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, flags = write_checkpoint(dtype=torch.bfloat16), ["--memory", "1GB", "--length", "40", "--json"]
    assert main(["plan", str(folder), "--device", "cuda", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == f"minopt generate --model {shlex.quote(str(folder))} --dtype bfloat16"
    planned = plan_generation(OPTConfig.load(folder), dtype=torch.bfloat16, device="cuda", length=40)
    assert found["plans"][0]["total"] == planned.total
    assert [line["offload"] for line in found["plans"]] == [None, "cpu", "disk"]
    minopt.convert(folder, tmp_path / "int8", quantize="int8")
    main(["plan", str(tmp_path / "int8"), "--device", "cpu", *flags])
    lines = json.loads(capsys.readouterr().out)["plans"]
    assert [(line["quantize"], line["offload"]) for line in lines] == [("int8", None), (None, "disk")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("opt-125m --devices 0", "--devices: expected an integer of at least 1, got 0."),
        ("opt-125m --length 4096", "--length: expected at most 2048 tokens, the model's positions, got 4096."),
        ("{tmp}", "{tmp}: is an exported program, which is not planned. Name the model that it was made from."),
    ],
)
def test_bad_input_is_one_line(
    arguments: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (MANIFEST, "config.json"):
        (tmp_path / name).write_text("{}")
    assert main(["plan", *arguments.format(tmp=tmp_path).split()]) == 2
    assert capsys.readouterr().err == f"minopt: error: {expected.format(tmp=tmp_path)}\n"


def test_a_gpu_that_is_not_here_needs_its_memory_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "opt-125m", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == (
        "minopt: error: --memory: what is free cannot be read on this machine. Say how much there is.\n"
    )


def test_processes_on_one_cpu_share_what_is_free(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what --memory says, each has as much."""
    monkeypatch.setattr(memory, "available_memory", lambda _: 8_000_000_000)
    arguments = ["plan", "opt-1.3b", "--devices", "2", "--device", "cpu", "--json"]
    rows = []
    for more in ([], ["--memory", "8GB"], ["--memory", "4GB"]):
        main([*arguments, *more])
        rows.append([line["rows"] for line in json.loads(capsys.readouterr().out)["plans"]])
    assert rows[0] == [rows[1][0], rows[2][1], rows[1][2]]
    assert rows[1][1] > rows[2][1]


def test_a_size_by_its_name_is_asked_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "find_model", lambda *_, **__: pytest.fail("the hub was asked"))
    for name in ("opt-175b", "facebook/opt-175b"):
        assert find_config(name)[0] == OPTConfig.preset("opt-175b")


@pytest.mark.parametrize(
    ("options", "free", "fits"),
    [({}, 150_000, "What fits: "), ({}, 1000, "See minopt plan."), ({"quantize": "int8"}, 1000, "See minopt plan."),
     ({"offload": "disk"}, 1000, "See minopt plan.")],
)  # fmt: skip
def test_too_little_memory_is_said_before_anything_is_read(
    options: dict[str, Any], free: int, fits: str, write_checkpoint: Callable[..., Path], monkeypatch: Any
) -> None:
    folder = write_checkpoint("125m", num_hidden_layers=12)
    monkeypatch.setattr(tensors.SourceTensor, "read", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr(plan, "available_memory", lambda _: free)
    said = rf"^memory: {folder} takes [0-9.]+ kB as [a-z0-9]+, and [0-9.]+ kB are free on this machine\. {fits}[^\n]*$"
    with pytest.raises(ValueError, match=said):
        minopt.load(folder, device="cpu", **options)


def test_what_waits_for_a_gpu_has_to_have_room(
    write_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(write_checkpoint())
    free = {"cpu": 50_000, "cuda": 10**9}
    monkeypatch.setattr(plan, "available_memory", lambda device: free[device.type])
    layers = sum(t.numel for n, t in checkpoint.tensors.items() if n.startswith("layers."))
    to_disk, to_cpu = (LoadOptions(torch.device("cuda"), torch.float32, offload=to) for to in ("disk", "cpu"))
    plan.check_fits(checkpoint, to_disk)
    message = r"^memory: the layers of .+ take [0-9.]+ kB .*, and [0-9.]+ kB are free\. What fits: offload disk\.$"
    with pytest.raises(ValueError, match=message):
        plan.check_fits(checkpoint, to_cpu)
    free["cpu"] = 4 * layers
    plan.check_fits(checkpoint, to_cpu)


def test_a_check_counts_weights_in_the_form_that_they_will_have(
    write_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """int8 files that become int4, the scales of smaller groups, and tables that another form holds already."""
    minopt.convert(write_checkpoint("125m", hidden_size=64, ffn_dim=128), tmp_path / "int8", quantize="int8")
    checkpoint, options = open_checkpoint(tmp_path / "int8"), LoadOptions(torch.device("cpu"), torch.float32)

    def needs(quantize: str, group: int = 64) -> int:
        found = plan_generation(checkpoint.config, dtype=torch.float32, quantize=quantize, group=group, length=1)
        return found.weights + found.loading

    in_int8, in_int4 = needs("int8"), needs("int4")
    assert in_int4 < needs("int4", group=32) < in_int8
    free = in_int4
    monkeypatch.setattr(plan, "available_memory", lambda _: free)
    plan.check_fits(checkpoint, options, group=64)
    for group in (32, None):
        with pytest.raises(ValueError, match=r"^memory: "):
            plan.check_fits(checkpoint, options, group=group)
    table = torch.empty(in_int8 - in_int4, dtype=torch.uint8)
    plan.check_fits(checkpoint, replace(options, held={"embed_tokens.weight": table}))
