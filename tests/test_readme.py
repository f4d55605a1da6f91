"""What the README and the docs show is what happens, and what was measured."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

import minopt
from minopt.cli import main

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md")
}
README = DOCUMENTS["README.md"]


def load_tables() -> Any:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_command_prints_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    match = re.search(r'^pip install \. && minopt generate "([^"]*)"\n```\n+```text\n(.*?)\n```', README, re.M | re.S)
    assert match is not None
    assert main(["generate", match[1], "--device", "cpu"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == match[2]


@pytest.mark.parametrize(
    "file",
    ["README.md", *(f"docs/{name}.md" for name in ("generation", "heads", "inference", "other_programs", "training"))],
)
def test_the_python_examples_run(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINOPT_HOME", str(tmp_path / "home"))
    blocks = re.findall(r"^```python\n(.*?)```", DOCUMENTS[file], re.M | re.S)
    assert blocks
    for block in blocks:
        exec(block.replace('"facebook/opt-125m"', repr(minopt.DEMO)), {})


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 155


@pytest.mark.parametrize("file", DOCUMENTS)
def test_what_a_document_links_to_exists(file: str) -> None:
    folder = (ROOT / file).parent
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", DOCUMENTS[file]):
        path = folder / target if target else ROOT / file
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for name in re.findall(r"`((?:benchmarks|examples|docs|tests)/[\w./-]+)`", DOCUMENTS[file]):
        assert (ROOT / name).exists(), name


def test_the_tables_are_those_of_the_results() -> None:
    tables = load_tables()
    found = set()
    for name in tables.DOCUMENTS:
        assert DOCUMENTS[name] == tables.render(DOCUMENTS[name]), f"{name}: run python benchmarks/tables.py"
        found |= set(re.findall(r"<!-- (\w+) -->\n\|", DOCUMENTS[name]))
    assert found >= set(tables.TABLES)


def test_figures_in_sentences_are_those_of_the_results() -> None:
    newest, text = load_tables().newest, " ".join(DOCUMENTS["benchmarks/README.md"].split())
    cost = newest("import")["milliseconds_over_import_torch"]
    assert f"`import minopt` takes {cost['import minopt']} ms over `import torch`" in text
    assert f"`minopt.load` {cost['import minopt; minopt.load']} ms" in text
    loss = newest("finetune")["loss"]
    assert f"takes {loss['chunks']['peak_mb']:.0f} MB instead of {loss['whole']['peak_mb']:,.0f} MB" in text
    assert f"{loss['chunks']['seconds']:.1f} s instead of {loss['whole']['seconds']:.1f} s" in text
    ratios = [step["ratio"] for step in newest("decoding")["steps"]
              if step["strategy"] == "beams" and step["prompt"] == 1400]  # fmt: skip
    readme = " ".join(README.split())
    assert f"{min(ratios):.0f} to {int(max(ratios))} times as fast" in readme
    peak = {row["way"]: row["opt-1.3b"] / 1e9 for row in newest("methods", "epyc2")["peak_bytes"]}
    assert (
        f"LoRA takes {peak['LoRA, bfloat16']:.1f} GB. Training all weights takes {peak['all weights']:.0f} GB" in readme
    )
    seconds = [case["cpu_seconds"] for case in newest("lm_eval", "epyc2")["cases"]]
    times = [min(case["hf, batch_size 1"], case["hf, batch_size 8"]) / case["minopt"] for case in seconds]
    assert f"tasks run {min(times):.1f} to {max(times):.1f} times as fast" in readme
    gptq, nearest, floats = (
        newest("gptq", "epyc2")["perplexity"][way]["the-time-machine"]
        for way in ("int4, GPTQ, 128", "int4, nearest, 128", "float32")
    )
    assert f"perplexity of {gptq:.1f}, rounded to nearest {nearest:.1f}, in float32 {floats:.1f}" in readme


def test_results_hold_what_the_docs_say_of_them() -> None:
    newest = load_tables().newest
    rows = newest("parity")["rows"]
    assert {difference for row in rows for difference in row["logits"].values()} == {0.0}
    assert [row["greedy_tokens_equal"] for row in rows if "greedy_tokens_equal" in row] == ["40 of 40 rows"] * 4
    for case in newest("inference")["cases"] + newest("decoding")["steps"]:
        same = case.get("same_tokens", {})
        if case["dtype"] == "float32":
            assert all(part == 1 for part in (same.values() if isinstance(same, dict) else [same]))
    for row in newest("convert")["conversions"].values():
        assert row["peak_mb"] <= row["bound_mb"]
        assert row["same_digest"] is not False
    cases = newest("plan")["cases"]
    assert all(
        round(case["planned_mb"] / case["peak_mb"] - 1, 2) == pytest.approx(case["error"], abs=6e-3) for case in cases
    )
    scores = newest("squad")["scores"]
    assert scores["after"]["f1"] > scores["before"]["f1"]
    worst = max(abs(case["error"]) for case in cases)
    assert f"within {worst:.1%} of what processes held" in " ".join(DOCUMENTS["docs/parallel.md"].split())


def test_ci_finds_both_commands_as_lines_of_their_own() -> None:
    """As ``.ci/run`` looks for them."""
    for begin in ("pip install -e ", "pip install . "):
        assert sum(line.startswith(begin) for line in README.splitlines()) == 1
