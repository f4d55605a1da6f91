"""Imports run one way, cost nothing before they are needed, and the public names are there."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import minopt

PACKAGE = Path(minopt.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# A room imports from those before it. Rooms of one line do not import each other.
ORDER = (
    ("atomic", "devices", "errors", "memory", "progress", "strangers", "watch"),
    ("config",),
    ("settings",),
    ("cache", "distributed", "int8", "load_options", "masks"),
    ("attention", "int4"),
    ("model",),
    ("tokenizer", "wrapped"),
    ("stops",),
    ("generation",),
    ("checkpoint",),
    ("inference",),
    ("evaluation",),
    ("training",),
    ("text",),
    ("loading",),
    ("methods",),
    ("interop",),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}

# What a function may import: heavy or optional things, and in the command line the library itself.
LAZY = {
    **{f"minopt.checkpoint.{name}": {"huggingface_hub"} for name in ("hub", "hub_watch")},
    "minopt.attention": {"torch"},
    "minopt.progress": {"tqdm"},
    **{f"minopt.cli.{verb}": {"minopt"} for verb in ("checkpoints", "evaluate", "finetune", "records")},
    **{f"minopt.cli.{verb}": {"minopt", "torch"} for verb in ("generate", "plan")},
}
FORBIDDEN = {"transformers", "peft", "lm_eval", "fairseq", "metaseq"}  # but for interop's files


def room_of(module: str) -> str:
    """``minopt.checkpoint.save`` is in the room ``checkpoint``; the package itself is in none: ``""``."""
    return module.partition(".")[2].partition(".")[0]


def targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules that a statement imports; a public name of ``minopt`` counts as the module that has it."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    source = "." * node.level + (node.module or "")
    for alias in node.names:
        if source == "minopt" and alias.name in minopt._HOME:
            yield minopt._HOME[alias.name]
        else:
            yield f"{source}.{alias.name}" if f"{source}.{alias.name}" in FILES else source


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Each imported module of a source, and whether that stands inside a function."""
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((target, id(node) in inside) for target in targets(node))


def problems(module: str, source: str) -> list[str]:
    """What is wrong with the imports of one module."""
    found = []
    here = room_of(module)
    if here and here not in RANK:
        found.append(f"{module} has no place in ORDER")
    for target, lazy in imports(source):
        top, there = target.split(".")[0], room_of(target)
        if not top:
            found.append(f"{module} imports {target}, which is relative")
        if top in FORBIDDEN and here != "interop":
            found.append(f"{module} imports {target}")
        if lazy and top not in LAZY.get(module, ()):
            found.append(f"{module} imports {target} inside a function")
        if top == "minopt" and here and there and here != there and RANK.get(there, 99) >= RANK.get(here, 99):
            found.append(f"{module} imports {target}, which does not come before it")
    return found


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module: str) -> None:
    assert problems(module, FILES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("minopt.cache", "import minopt.generation.decode", "does not come before it"),
        ("minopt.model", "from minopt import Tokenizer", "minopt.tokenizer, which does not come before it"),
        ("minopt.model", "from minopt.checkpoint import names", "does not come before it"),
        ("minopt.training.loss", "from minopt.training.trainer import train\nimport minopt.cli.flags", "does not come"),
        ("minopt.evaluation.squad", "from minopt.training.data import Example", "does not come before it"),
        ("minopt.generation.decode", "def f():\n    import numpy", "inside a function"),
        ("minopt.model", "class A:\n    def f(self):\n        from minopt.cache import KVCache", "inside a function"),
        ("minopt.cli", "def f():\n    from minopt.loading import load", "inside a function"),
        ("minopt.cli", "import transformers", "minopt.cli imports transformers"),
        ("minopt.model", "from .cache import KVCache", "relative"),
        ("minopt.attic", "import torch", "minopt.attic has no place in ORDER"),
    ],
)
def test_a_break_of_the_rules_is_found(module: str, source: str, message: str) -> None:
    assert any(message in problem for problem in problems(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("minopt.model", "import torch\nfrom minopt.cache import KVCache\nfrom minopt import OPTConfig"),
        ("minopt.checkpoint.hub", "def f():\n    from huggingface_hub.errors import HfHubHTTPError"),
        ("minopt.training.trainer", "from minopt.evaluation.squad import score\nimport minopt.training.weights"),
        ("minopt.cli.generate", "from minopt import DEMO\ndef f():\n    from minopt.distributed import processes"),
    ],
)
def test_what_the_rules_allow_is_let_be(module: str, source: str) -> None:
    assert problems(module, source) == []


def of_a_decoder(source: str) -> list[str]:
    """The calls in a source that ask what kind of decoder it drives, or what it has."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    asks = [call for call in calls if ast.unparse(call.func) in ("isinstance", "getattr", "hasattr", "type")]
    return [ast.unparse(call) for call in asks if {"decoder", "model"} & names(call.args[0])]


def names(tree: ast.AST) -> set[str]:
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return found | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_generation_drives_any_decoder_and_asks_none_what_it_is() -> None:
    for module, path in FILES.items():
        if module.startswith("minopt.generation"):
            assert of_a_decoder(path.read_text(encoding="utf-8")) == [], module
    in_text = of_a_decoder(FILES["minopt.text"].read_text(encoding="utf-8"))
    # The repr names the form.
    assert {call for call in in_text if "self.decoder" in call} == {"type(self.decoder)"}
    assert of_a_decoder("most = getattr(request.decoder, 'max_batch', None)") != []
    assert of_a_decoder("def f(model):\n    return isinstance(model, OPT)") != []


def handmade_masks(source: str) -> list[str]:
    """Assignments of masks and positions that come from no function of ``masks.py``."""
    tree = ast.parse(source)
    made = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "minopt.masks"
            for alias in node.names}  # fmt: skip
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            is_one = name in ("mask", "position_ids")
            if is_one and not names(node.value) & {*made, name} and ast.unparse(node.value) != "attention_mask":
                found.append(ast.unparse(node))
    return found


def test_masks_and_positions_are_made_in_one_module() -> None:
    where = [m for m in FILES if m.startswith(("minopt.generation", "minopt.inference")) or m == "minopt.model"]
    for module in where:
        source = FILES[module].read_text(encoding="utf-8")
        assert not names(ast.parse(source)) & {"tril", "triu"}, module
        if module != "minopt.inference.compile":  # which draws prompts
            assert handmade_masks(source) == [], module
    assert handmade_masks("from minopt.masks import causal_mask\nmask = torch.ones(3, 3).tril()") != []
    assert handmade_masks("position_ids = torch.arange(3) + past") != []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: {t for t, _ in imports(path.read_text(encoding="utf-8")) if t in FILES and t != "minopt"}
             for module, path in FILES.items() if module != "minopt"}  # fmt: skip
    assert graph["minopt.model"] >= {"minopt.cache", "minopt.config"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    graph["minopt.config"].add("minopt.model")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("statement", ["import minopt", "import minopt; minopt.OPTConfig.preset('opt-175b')",
                                       "import minopt.cli"])  # fmt: skip
def test_importing_the_package_loads_nothing_heavy(statement: str) -> None:
    third_party = {"torch", "numpy", "transformers", "huggingface_hub", "tokenizers", "safetensors", "tqdm"}
    assert not loaded_by(statement) & third_party


def test_loading_models_needs_neither_transformers_nor_the_hubs_client_nor_the_compiler() -> None:
    loaded = loaded_by("import minopt; minopt.load(minopt.DEMO, device='cpu')")
    assert {"torch", "tokenizers"} <= loaded
    assert not loaded & {"transformers", "huggingface_hub", "torch._dynamo"}


def test_public_names_are_there_and_declared_alike_everywhere() -> None:
    """In ``__all__``, in the table that resolves them, and in the imports that type checkers read."""
    assert all(getattr(minopt, name) is not None for name in minopt.__all__)
    assert set(dir(minopt)) == {*minopt.__all__, "__version__"}
    tree = ast.parse(FILES["minopt"].read_text(encoding="utf-8"))
    typed = {alias.name: node.module for block in tree.body if isinstance(block, ast.If)
             for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}  # fmt: skip
    assert typed == minopt._HOME
    assert set(minopt.__all__) == {*minopt._HOME, "DEMO"}
    assert "transformers" not in loaded_by("import minopt; minopt.interop.need")
    with pytest.raises(AttributeError, match="module 'minopt' has no attribute 'Bert'"):
        minopt.Bert  # noqa: B018
