"""Deletes each form of the decoder in turn and runs the other tests: ``python tests/delete_forms.py [pytest args]``.

A form is its files, its row in ``minopt.loading.FORMS`` and its file of tests. Forms that are built on another one are
deleted with it. Tests of the command line that load a form (``--offload``, ``minopt export``) fail without it.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Deletion:
    """What goes with a form.

    Attributes:
        rows: names in ``FORMS``.
        modules: below ``minopt``.
        tests: files in ``tests``.
        lines: pieces of lines elsewhere, by file, that offer the form to users.
    """

    rows: tuple[str, ...]
    modules: tuple[str, ...]
    tests: tuple[str, ...]
    lines: tuple[tuple[str, str], ...] = ()


GPU = ("gpu/test_fake", "gpu/test_acceptance")
DELETIONS = {
    "tensor_parallel": Deletion(
        ("tensor_parallel",), ("inference.tensor_parallel",), ("inference/test_tensor_parallel", "gpu/test_acceptance")
    ),
    "offload": Deletion(
        ("offload",),
        ("inference.offload",),
        ("inference/test_offload", "test_devices", "methods/test_heads", "gpu/test_acceptance"),
    ),
    "program and compile": Deletion(
        ("program", "compile"),
        ("inference.program", "inference.compile"),
        ("inference/test_program", "gpu/test_acceptance"),
        (("__init__.py", "export_model"),),
    ),
    "graphs": Deletion(("graphs",), ("inference.graphs",), ("inference/test_graphs", *GPU)),
    "fast and the forms that need it": Deletion(
        ("compile", "fast", "graphs", "tensor_parallel"),
        tuple(f"inference.{name}" for name in ("compile", "fast", "graphs", "tensor_parallel")),
        (
            *(
                f"inference/test_{name}"
                for name in ("fast", "frozen", "graphs", "int8", "plan", "program", "sparse", "tensor_parallel")
            ),
            "methods/test_heads",
            "methods/test_tokens",
            *GPU,
        ),
        (
            ("training/method.py", "FastOPT"),  # evaluation then runs the plain model
            ("__init__.py", "export_model"),
        ),
    ),
}


def delete(deletion: Deletion, tree: Path) -> None:
    """Takes a form out of a copy of the project."""
    package = tree / "src" / "minopt"
    for module in deletion.modules:
        (package / f"{module.replace('.', '/')}.py").unlink()
    for test in deletion.tests:
        (tree / "tests" / f"{test}.py").unlink()
    for file, piece in deletion.lines:
        _keep_lines(package / file, lambda number, line, piece=piece: piece not in line)
    loading = package / "loading.py"
    gone = _rows(loading.read_text(encoding="utf-8"), deletion.rows)
    _keep_lines(loading, lambda number, line: number not in gone)


def _rows(source: str, names: tuple[str, ...]) -> set[int]:
    """The lines of some rows of ``FORMS``."""
    table = next(
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "FORMS"
    )
    assert isinstance(table, ast.Tuple)
    rows = {ast.literal_eval(row.args[0]): row for row in table.elts if isinstance(row, ast.Call)}
    return {line for name in names for line in range(rows[name].lineno, (rows[name].end_lineno or 0) + 1)}


def _keep_lines(path: Path, wanted: object) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for number, line in enumerate(lines, 1) if wanted(number, line)]  # type: ignore[operator]
    path.write_text("".join(kept), encoding="utf-8")


def main(arguments: list[str]) -> int:
    failed = 0
    for name, deletion in DELETIONS.items():
        with tempfile.TemporaryDirectory(prefix="minopt-") as folder:
            tree = Path(folder) / "minopt"
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "results"))
            delete(deletion, tree)
            environment = os.environ | {"PYTHONPATH": str(tree / "src")}
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
            result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        failed += result.returncode != 0
        lines = result.stdout.splitlines() or [result.stderr]
        print(f"{name}: {'ok' if result.returncode == 0 else 'FAILED'}", flush=True)
        print(*(f"    {line}" for line in lines if line.startswith(("FAILED", "ERROR", "E  "))), sep="\n", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
