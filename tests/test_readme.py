"""What the README shows is what happens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import minopt
from minopt.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_command_prints_what_is_shown(capsys) -> None:  # type: ignore[no-untyped-def]
    match = re.search(r'^pip install \. && minopt generate "([^"]*)"\n```\n+```text\n(.*?)\n```', README, re.M | re.S)
    assert match is not None
    assert main(["generate", match[1], "--device", "cpu"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == match[2]


def test_the_python_examples_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)```", README, re.M | re.S)
    assert blocks
    for block in blocks:
        exec(block.replace('"facebook/opt-125m"', repr(minopt.DEMO)), {})


def test_every_file_and_result_that_is_named_exists() -> None:
    names = re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(
        r"`((?:benchmarks|examples|docs)/[\w./-]+)`", README
    )
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_figures_are_those_of_the_results() -> None:
    """Each table row ends with the file it comes from; its ratios stand in that file."""
    rows = [line for line in README.splitlines() if line.startswith("|") and "benchmarks/results/" in line]
    assert rows
    for row in rows:
        path = re.search(r"benchmarks/results/[\w.-]+\.json", row)
        assert path is not None
        kept = json.dumps(json.loads((ROOT / path[0]).read_text()))
        for figure in re.findall(r"\*\*([\d.]+)x?\*\*", row):
            assert re.search(rf"[: ]{re.escape(figure)}", kept), (row, figure)
