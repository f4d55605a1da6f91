"""What the README shows is what happens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import minopt
from minopt.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_command_prints_what_is_shown(capsys) -> None:  # type: ignore[no-untyped-def]
    match = re.search(r'^pip install \. && minopt generate "([^"]*)"\n```\n+```text\n(.*?)\n```', README, re.M | re.S)
    assert match is not None
    assert main(["generate", match[1], "--device", "cpu"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == match[2]


@pytest.mark.parametrize("file", ["README.md", "docs/generation.md", "docs/inference.md", "docs/training.md"])
def test_the_python_examples_run(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINOPT_HOME", str(tmp_path / "home"))
    blocks = re.findall(r"^```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    for block in blocks:
        exec(block.replace('"facebook/opt-125m"', repr(minopt.DEMO)), {})


def test_every_file_and_result_that_is_named_exists() -> None:
    names = re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(
        r"`((?:benchmarks|examples|docs)/[\w./-]+)`", README
    )
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_figures_of_loading_are_those_of_the_result() -> None:
    """The table has a row for each case, in order, with that case's ratio and medians."""
    rows = re.findall(r"^\|.*\((benchmarks/results/load_[\w.]+)\) \|$", README, re.M)
    cases = json.loads((ROOT / rows[0]).read_text())["cases"]
    lines = [line for line in README.splitlines() if line.startswith("|") and f"({rows[0]})" in line]
    assert len(lines) == len(rows) == len(cases)
    for line, case in zip(lines, cases, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert case["dtype"] in cells[0]
        for cell, who in zip(cells[1:3], ("minopt", "transformers"), strict=True):
            assert cell == f"{case[who]['load_seconds']:.3f} s, {case[who]['peak_mb']:.0f} MB"
        assert cells[3] == f"**{case['seconds_ratio']}x**", line


PEERS = {"float32": "ctranslate2", "bfloat16": "transformers", "int8": "ctranslate2"}


@pytest.mark.parametrize(
    ("file", "groups"),
    [
        ("README.md", "decode1 decode8 prefill512 beams"),
        ("benchmarks/README.md", "decode1 decode8 decode32 prefill512 prefill1536 beams sizes"),
    ],
)
def test_figures_of_inference_are_those_of_the_result(file: str, groups: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    (name,) = set(re.findall(r"results/inference_\w+\.json", text))
    result = json.loads((ROOT / "benchmarks" / name).read_text())
    cases = [case for case in result["cases"] if case["group"] in groups.split()]
    lines = re.findall(r"^\| .*(?:decode|prefill), .*batch \d+, prompt .*$", text, re.M)
    assert len(lines) == len(cases)
    for line, case in zip(lines, cases, strict=True):
        what, *times, ratio, of_exported, share = (cell.strip() for cell in line.strip("|").split("|"))
        assert what.endswith(f"batch {case['batch']}, prompt {case['prompt']:,}, {case['dtype']}")
        assert ("5 beams" in what, case["work"] in what) == (bool(case["options"]), True)
        assert case["model"] == "opt-125m" or what.startswith(case["model"].removeprefix("opt-"))
        for cell, variant in zip(times, ("minopt", "exported", "ctranslate2", "transformers"), strict=True):
            assert cell == (f"{case['variants'][variant]['median_ms']:.1f} ms" if variant in case["variants"] else "")
        peer = PEERS[case["dtype"]]
        assert ratio == f"**{case['ratios'][peer + ' / minopt']:.2f}x**"
        assert of_exported == (f"{case['ratios'][peer + ' / exported']:.2f}x" if "exported" in case["variants"] else "")
        assert share == (f"{case['share_of_bandwidth']['minopt']:.0%}" if "share_of_bandwidth" in case else "")
        assert all(equal == 1 for equal in case.get("same_tokens", {}).values())


def test_figures_of_conversions_are_those_of_the_result() -> None:
    lines = [line for line in README.splitlines() if line.startswith("|") and "(benchmarks/results/convert_" in line]
    result = json.loads((ROOT / re.findall(r"benchmarks/results/convert_[\w.]+", lines[0])[0]).read_text())
    assert len(lines) == len(result["conversions"])
    for line, (name, row) in zip(lines, result["conversions"].items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:5] == [name, f"{row['seconds']} s", f"{row['copy_seconds']} s", f"{row['peak_mb']} MB",
                             f"{row['largest_file_mb']} MB"]  # fmt: skip
        assert row["peak_mb"] <= row["bound_mb"]
        assert row["same_digest"] is not False


def test_figures_in_the_text_are_those_of_the_results() -> None:
    (kept,) = (ROOT / "benchmarks" / "results").glob("import_*.json")
    cost = json.loads(kept.read_text())["milliseconds_over_import_torch"]
    assert f"`import minopt` takes {cost['import minopt']} ms over `import torch`" in README
    assert f"`minopt.load` {cost['import minopt; minopt.load']} ms" in README
    (kept,) = (ROOT / "benchmarks" / "results").glob("parity_*.json")
    rows = json.loads(kept.read_text())["rows"]
    assert {difference for row in rows for difference in row["logits"].values()} == {0.0}
    assert [row["greedy_tokens_equal"] for row in rows if "greedy_tokens_equal" in row] == ["40 of 40 rows"] * 4
    assert "160 of 160 greedy continuations" in README


def kept_decoding() -> tuple[str, dict[str, Any]]:
    (kept,) = (ROOT / "benchmarks" / "results").glob("decoding_*.json")
    return f"(benchmarks/results/{kept.name})", json.loads(kept.read_text())


def test_figures_of_steps_are_those_of_the_result() -> None:
    """README has the beams, benchmarks/README.md all."""
    name, result = kept_decoding()
    for file, cases in (
        ("README.md", [case for case in result["steps"] if case["strategy"] == "beams"]),
        ("benchmarks/README.md", result["steps"]),
    ):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert all(case["same_tokens"] == 1 for case in cases if case["dtype"] == "float32")
        lines = re.findall(r"^\| (?:5 beams|greedy), batch .*$", text, re.M)
        assert len(lines) == len(cases)
        for line, case in zip(lines, cases, strict=True):
            strategy = {"beams": "5 beams", "greedy": "greedy"}[case["strategy"]]
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells[0] == f"{strategy}, batch {case['batch']}, prompt {case['prompt']:,}, {case['dtype']}"
            assert cells[1] == f"{case['minopt']['step']['median_ms']:.1f} ms"
            assert cells[2] == f"{case['transformers']['step']['median_ms']:.1f} ms"
            assert cells[3] == f"**{case['ratio']:.2f}x**"
            assert cells[4] == f"{case['rest_of_model']:.1%}"
        assert name.removeprefix("(benchmarks/").rstrip(")") in text
        greedy = [case["rest_of_model"] for case in result["steps"] if case["strategy"] == "greedy"]
        assert file != "README.md" or f"spend {min(greedy):.1%} to {max(greedy):.1%} beside the model" in text


def test_figures_of_many_prompts_are_those_of_the_result() -> None:
    name, result = kept_decoding()
    prompts = result["prompts"]
    lines = re.findall(r"^\| (?:one by one|\d+ ).*tokens/s.*$", README, re.M)
    assert len(lines) == len(prompts["ways"])
    for line, way in zip(lines, prompts["ways"], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells == [way["way"], f"{way['padding']:.1%}", f"{way['new_tokens_per_second']} tokens/s",
                         f"**{way['speedup']:.2f}x**"]  # fmt: skip
    assert f"{prompts['count']} SQuAD prompts of {prompts['shortest']} to {prompts['longest']} tokens" in README
    assert name in README


def test_figures_of_fine_tuning_are_those_of_the_results() -> None:
    (kept,) = (ROOT / "benchmarks" / "results").glob("finetune_xeon2_*.json")
    result = json.loads(kept.read_text())
    lines = re.findall(r"^\| batch \d+, \w+ \|.*$", README, re.M)
    assert len(lines) == len(result["cases"])
    for line, case in zip(lines, result["cases"], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        ours, *peers = (case[name] for name in ("minopt packed", "transformers padded", "transformers grouped"))
        assert cells == [
            f"batch {case['batch_size']}, {case['dtype']}",
            *(f"{v['tokens_per_second']:.0f} tokens/s, {v['peak_mb'] / 1e3:.1f} GB" for v in (ours, *peers)),
            f"**{case['packed to transformers padded']:.2f}x**",
            f"{case['packed to transformers grouped']:.2f}x",
        ]
        assert ours["peak_mb"] <= min(peer["peak_mb"] for peer in peers)
    whole, chunks = result["loss"]["whole"], result["loss"]["chunks"]
    assert f"{chunks['peak_mb']:.0f} MB instead of {whole['peak_mb']:,.0f} MB" in README
    assert f"{chunks['seconds']:.1f} s instead of {whole['seconds']:.1f} s" in README


def test_figures_of_the_squad_run_are_those_of_the_result() -> None:
    (kept,) = (ROOT / "benchmarks" / "results").glob("squad_xeon2_*.json")
    result = json.loads(kept.read_text())
    scores = result["scores"]
    names = {"before": "untrained", "after copying": "after copying", "after": "after the questions"}
    for name, row in names.items():
        loss, exact, f1 = (scores[name][key] for key in ("loss", "exact_match", "f1"))
        assert f"| {row} | {loss:.2f} | {exact:.1f} | {f1:.1f} |" in README
    assert scores["after"]["loss"] < scores["before"]["loss"]
    assert scores["after"]["f1"] > scores["before"]["f1"]
    assert f"all {result['examples']['questions']:,} questions" in README


def test_figures_of_int8_are_those_of_the_result() -> None:
    (kept,) = (ROOT / "benchmarks" / "results").glob("int8_xeon2_*.json")
    result = json.loads(kept.read_text())
    names = {"int8, rest of activations too": "int8 as from 6.7b on"}
    for scheme in result["perplexity"]["peter-pan"]:
        books = " | ".join(f"{result['perplexity'][book][scheme]:.2f}" for book in ("the-time-machine", "peter-pan"))
        errors = " | ".join(
            f"{result['logit_error'][case][scheme]:.1%}" for case in ("random weights", "outlier channels")
        )
        assert f"| {names.get(scheme, scheme)} | {books} | {errors} |" in README


def test_figures_of_larger_models_are_those_of_the_results() -> None:
    docs = (ROOT / "docs" / "parallel.md").read_text()
    (kept,) = (ROOT / "benchmarks" / "results").glob("plan_xeon2_*.json")
    cases = json.loads(kept.read_text())["cases"]
    for case in cases:
        held = f"{case['peak_mb'] / 1e3:.2f} GB | {case['planned_mb'] / 1e3:.2f} GB"
        step = f"{case['step_seconds']:.2f} s |"
        assert f"{case['batch']} x {case['length']:,} tokens | {held} | {case['error']:+.1%} | {step}" in docs
        assert case["model"] != "opt-6.7b" or f"{held} | {step}" in README
        assert round(case["planned_mb"] / case["peak_mb"] - 1, 2) == pytest.approx(case["error"], abs=0.006)
    assert f"within {max(abs(case['error']) for case in cases):.1%} of what processes held" in docs
    (kept,) = (ROOT / "benchmarks" / "results").glob("parallel_xeon2_*.json")
    for case in json.loads(kept.read_text())["cases"]:
        slowest = {key: max(rank.get(key, 0) for rank in case["ranks"]) for key in ("ms_per_token", "in_collectives")}
        if case["case"] == "speed" and case["form"] == "minopt":
            assert f"| {slowest['ms_per_token']:.1f} | {slowest['in_collectives']:.0%} |" in docs
        elif case["case"] == "speed":
            assert f" {slowest['ms_per_token']:.1f} |" in docs
        else:
            held = [
                max(sum(rank[f"{phase}_peak_mb"]) for rank in case["ranks"]) for phase in ("load", "training", "save")
            ]
            assert "".join(f" {mb / 1e3:.2f} GB |" for mb in held) in docs
