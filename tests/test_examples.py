"""The examples run as a user would run them, on the checkpoint that the package carries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import minopt

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def run(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("name", "count"), [("quickstart", 1), ("decoding", 1), ("inside", 2)])
def test_a_notebook_runs_from_top_to_bottom_and_shows_what_is_stored(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stored = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    fresh = nbformat.from_dict(stored)
    NotebookClient(fresh, timeout=300).execute()

    def outputs(notebook: nbformat.NotebookNode) -> list[str]:
        return ["".join(o.get("text", "") for o in cell.get("outputs", [])) for cell in notebook.cells]

    assert outputs(fresh) == outputs(stored)
    pictures = [o for cell in stored.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == count


def test_the_notebooks_are_those_that_their_builder_writes() -> None:
    builder = EXAMPLES / "build_notebooks.py"
    namespace: dict[str, Any] = {"__file__": str(builder), "__name__": "builder"}
    exec(builder.read_text(encoding="utf-8"), namespace)
    assert {f"{name}.ipynb" for name in namespace["NOTEBOOKS"]} == {path.name for path in EXAMPLES.glob("*.ipynb")}
    for name, texts in namespace["NOTEBOOKS"].items():
        stored = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
        assert [cell.source for cell in stored.cells] == [text.strip() for text in texts]


def test_thirty_greedy_tokens_for_three_texts() -> None:
    output = run(EXAMPLES / "greedy_30_tokens.py")
    texts = output.rstrip("\n").split("\n\nT")  # each text ends with an empty line; two of the three begin with T
    lm = minopt.load(minopt.DEMO)
    expected = lm.generate("Today is a beautiful day and I want to", max_new_tokens=30, echo=True)
    assert expected in output
    assert len(texts) >= 3


def test_pretraining_runs_resumes_and_gives_a_model(tmp_path: Path) -> None:
    """Stopped after 4 steps and resumed, it ends with the very weights of a run that was not."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a", "b", "c", "d"):
        lines = [f"{name} is line {i}: the quick brown fox jumps over {i * i} lazy dogs." for i in range(400)]
        (texts / f"{name}.txt").write_text("\n".join(lines))
    common = ["--vocab-size", "300", "--batch-size", "1", "--save-every", "2", "--device", "cpu"]

    def command(out: str) -> list[str]:
        return [str(EXAMPLES / "pretrain.py"), str(texts), str(tmp_path / out), *common, "--steps", "6"]

    run(*command("whole"))
    with subprocess.Popen([sys.executable, *command("resumed")], stdout=subprocess.PIPE, text=True, cwd=ROOT) as killed:
        assert killed.stdout is not None
        assert any(line.startswith("step 4 ") for line in killed.stdout)
        killed.kill()
    assert not (tmp_path / "resumed" / "validation.json").exists()
    printed = run(*command("resumed"))
    assert "step 4 " not in printed
    assert "step 6 " in printed
    assert re.search(r"bits per byte: \{'c\.txt': [\d.]+, 'd\.txt': [\d.]+\}", printed)
    whole, resumed = (minopt.load(tmp_path / name) for name in ("whole", "resumed"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert a.equal(b), name
    assert len(resumed.generate("a is line", max_new_tokens=5)) > 0
    assert os.path.getsize(tmp_path / "resumed" / "model.safetensors") < 8_000_000
