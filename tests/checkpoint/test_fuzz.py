"""Damaged checkpoints, a few hundred of the thousands that benchmarks/fuzz_checkpoints.py opens, and its verdict.

The verdict is what all of that hangs on, so it is tested on openers that break each promise.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minopt import OPT, CheckpointError, OPTConfig, load_model
from minopt.memory import empty

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
fuzz = importlib.import_module("fuzz_engine")
mutations = importlib.import_module("fuzz_mutations")
runs = importlib.import_module("fuzz_checkpoints")

INPUTS = 300


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """A valid checkpoint of every kind, each of which opens."""
    built = fuzz.build_kinds(tmp_path_factory.mktemp("valid"))
    fuzz.check_valid(built)
    return built


@pytest.fixture(scope="module")
def model(kinds: list[Any]) -> OPT:
    return load_model(kinds[0].folder, device="cpu")


def test_damaged_checkpoints_load_or_are_refused_in_one_line(kinds: list[Any], tmp_path: Path) -> None:
    outcomes = [fuzz.run_one(kinds, 0, number, tmp_path / "checkpoint") for number in range(INPUTS)]
    findings = [(o.number, o.kind, o.group, o.detail) for o in outcomes if o.result == "finding"]
    assert not findings, findings[:5]
    results = [outcome.result for outcome in outcomes]
    assert results.count("loaded") > INPUTS / 20  # or the damage is too coarse to get past the outer form
    assert results.count("refused") > INPUTS / 2
    assert len({outcome.kind for outcome in outcomes}) == len(kinds)


def test_an_input_follows_from_seed_and_number(kinds: list[Any]) -> None:
    for number in range(60):
        one, same = (fuzz.damage(kinds, 3, number) for _ in range(2))
        assert (one.files, one.opened, one.done) == (same.files, same.opened, same.done)
    assert any(fuzz.damage(kinds, 3, n).files != fuzz.damage(kinds, 4, n).files for n in range(5))


def test_every_kind_of_damage_happens_and_changes_the_file(kinds: list[Any]) -> None:
    """Each edit of bytes, and of the structure of each form of file, by the words that it says of itself."""
    for kind in kinds:
        for name, data in kind.files.items():
            rng, anatomy = random.Random(7), kind.anatomies[name]
            if len(data) > 100_000:
                continue
            for edit in (mutations.edit_bytes, mutations.edit_structure):
                changed = [edit(data, anatomy, rng, kinds[0].files["config.json"]) for _ in range(30)]
                assert sum(content != data for content, _ in changed) > 20
                assert len({how for _, how in changed}) > 5


def hog(path: Path) -> None:
    empty((150_000_000,), torch.int8).fill_(1)  # in new pages: of its own, malloc may have as many left by other tests
    raise CheckpointError(f"{path}: refused, but after 150 MB.")


def loop(path: Path) -> None:
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    raise CheckpointError(f"{path}: refused, but late.")


class Unclean(CheckpointError):
    """Says what it was given, whatever a ``CheckpointError`` would make of it."""

    def __str__(self) -> str:
        return str(self.args[0])

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.args = (text,)


def fail(error: Callable[[Path], BaseException]) -> Callable[[Path], None]:
    def opener(path: Path) -> None:
        raise error(path)

    return opener


def hidden_memory_error(path: Path) -> None:
    try:
        raise MemoryError
    except MemoryError:
        raise CheckpointError(f"{path}: damaged.") from None


def warns(path: Path) -> None:
    warnings.warn("odd", stacklevel=1)
    raise CheckpointError(f"{path}: damaged.")


class Panic(BaseException):
    """As Rust's, no Exception."""


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "one clear line": (fail(lambda path: CheckpointError(f"{path}: damaged.")), ""),
    "another exception": (fail(lambda path: KeyError(str(path))), "KeyError at"),
    "a panic": (fail(lambda path: Panic(str(path))), "Panic at"),
    "another file": (fail(lambda path: CheckpointError("model.bin: damaged.")), "names no file of the checkpoint"),
    "two lines": (fail(lambda path: Unclean(f"{path}: damaged\nbadly.")), "more than one line"),
    "an escape": (fail(lambda path: Unclean(f"{path}: \x1b[2J.")), "not printable"),
    "half a letter": (fail(lambda path: Unclean(f"{path}: \udcff.")), "not printable"),
    "a very long line": (fail(lambda path: Unclean(f"{path}: {'x' * 5000}.")), "a line of more than"),
    "memory that ran out": (hidden_memory_error, "MemoryError behind a CheckpointError"),
    "a warning": (warns, "warning UserWarning"),
    "too late": (loop, "took too long"),
    "too much memory": (hog, "took too much memory"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_only_one_clear_line_in_time_is_a_refusal(refusal: str, kinds: list[Any]) -> None:
    opener, group = REFUSALS[refusal]
    folder = kinds[0].folder
    limits = fuzz.Limits(seconds=0.2 if refusal == "too late" else 5.0, memory_bytes=100_000_000)
    outcome = fuzz.verdict(opener, folder, folder, [kinds[0]], limits)
    assert outcome.group.startswith(group)
    assert outcome.result == ("finding" if group else "refused")


def test_a_bomb_is_stopped_at_the_bound(kinds: list[Any]) -> None:
    """More than twice what is allowed is not given, so that no input can take the machine with it."""
    folder = kinds[0].folder
    opener = fail(lambda path: CheckpointError(f"{path}: {len(bytearray(300_000_000))} bytes."))
    outcome = fuzz.verdict(opener, folder, folder, [kinds[0]], fuzz.Limits(memory_bytes=100_000_000))
    assert (outcome.result, outcome.group.split()[0]) == ("finding", "MemoryError")
    assert len(bytearray(300_000_000)) == 300_000_000  # and the bound is gone afterwards


def changed(model: OPT, **changes: Any) -> OPT:
    config = OPTConfig.from_dict(model.config.to_dict() | changes)
    return OPT(config).eval()


def sharing(model: OPT) -> OPT:
    other = changed(model)
    other.layers[1].fc1.weight = torch.nn.Parameter(other.layers[0].fc1.weight[:])
    return other


MODELS: dict[str, tuple[Callable[[OPT], OPT], str]] = {
    "the model": (lambda model: model, ""),
    "other numbers": (lambda model: changed(model), ""),
    "a layer less": (lambda model: changed(model, num_hidden_layers=1), "a model of other names or shapes"),
    "a row less": (lambda model: changed(model, vocab_size=47), "a model of other names or shapes"),
    "a wider layer": (lambda model: changed(model, ffn_dim=48), "a model of other names or shapes"),
    "another dtype": (lambda model: changed(model).half(), "a model of another dtype"),
    "shared memory": (sharing, "a model whose parameters share memory"),
}


def judge(loaded: OPT, kind: Any) -> Any:
    """The verdict where opening a kind's checkpoint gives a model."""
    return fuzz.verdict(lambda path: loaded, kind.folder, kind.folder, [kind], fuzz.Limits())


@pytest.mark.parametrize("case", MODELS)
def test_only_the_same_names_shapes_and_dtypes_are_the_model(case: str, kinds: list[Any], model: OPT) -> None:
    build, group = MODELS[case]
    outcome = judge(build(model), kinds[0])
    assert outcome.group == group
    assert outcome.result == ("finding" if group else "loaded")


def test_rows_of_a_table_may_differ_only_where_no_config_json_says_how_many(kinds: list[Any], model: OPT) -> None:
    metaseq = next(kind for kind in kinds if kind.name == "metaseq, namespace, 125m")
    for built, result in ((changed(model, vocab_size=47), "loaded"), (changed(model, ffn_dim=48), "finding")):
        outcome = judge(built, metaseq)
        assert outcome.result == result


def test_what_is_written_to_the_terminal_is_a_finding(kinds: list[Any], tmp_path: Path) -> None:
    def opener(path: Path) -> None:
        os.write(2, b"panicked")
        raise CheckpointError(f"{path}: damaged.")

    (outcome, *_) = runs.run_many(kinds, 0, 1, tmp_path, 1, opener)
    assert (outcome.group, outcome.detail) == ("wrote to the terminal", "panicked")


def test_a_worker_that_dies_or_hangs_is_a_finding_and_the_rest_goes_on(kinds: list[Any], tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    opened.mkdir()

    def opener(path: Path) -> None:
        number = len(list(opened.iterdir()))  # one worker opens all in turn
        (opened / str(number)).touch()
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 5:
            time.sleep(60)
        raise CheckpointError(f"{path}: damaged.")

    limits = fuzz.Limits(patience_seconds=2.0)
    outcomes = list(runs.run_many(kinds, 0, 12, tmp_path / "scratch", 1, opener, limits))
    assert [outcome.number for outcome in outcomes] == list(range(12))
    ends = {o.number: o.group for o in outcomes if o.result == "finding"}
    assert ends == {3: "died (SIGKILL), at no line of minopt", 5: "hung (2 s), at no line of minopt"}
    assert "in opener" in outcomes[5].detail  # where it hung
    assert all(outcome.kind and outcome.done for outcome in outcomes)
