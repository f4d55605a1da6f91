"""What lm-evaluation-harness gets from minopt is what it gets from transformers by its own model ``hf``."""

from __future__ import annotations

import copy
import json
import logging
import runpy
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import minopt
from minopt.cli import main
from minopt.interop import lm_eval as interop
from minopt.interop.lm_eval import MinoptLM
from tests.conftest import copy_of, lively

POSITIONS = 48
QUESTION = "Question: Which of them had gone to the house on the hill before it rained that morning?\nAnswer:"
PAIRS = [
    *((QUESTION, answer) for answer in (" the", " one", " of her sisters", " no", " he had, and she")),
    *((QUESTION + end, " yes") for end in ("", " ", "\n")),
    *(("", text) for text in ("It was", "</s>It was", "a")),
    ("</s>It was the best of times", " and the worst"), ("It was a long way. " * 12, " They went home"),
    ("A", " very long continuation of many, many words and signs" * 2), ("She said", ", 'no' \u00e9 \u6f22"),
]  # fmt: skip
TEXTS = [
    "",
    "One.",
    "It was the best of times, it was the worst of times; 1, 2, 3, 4, 5. " * 3,
    "</s>Begun",
    "\u6f22\u5b57",
]
GENERATION: list[dict[str, Any]] = [
    {"until": ["e", "\n\n"], "max_gen_toks": 14}, {"until": " the", "max_gen_toks": 9, "do_sample": False},
    {"max_gen_toks": 6, "temperature": 0.0, "until": []},
]  # fmt: skip

TASKS = {
    "choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
               "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "text": {"output_type": "generate_until", "doc_to_target": "{{choices[gold]}}", "target_delimiter": "",
             "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5}, "metric_list": [{"metric": "exact_match"}]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{question}}",
                "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    """No lines of the harness, no reading of the thousands of files of its own tasks, no files in the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(interop.tasks, "TaskManager", lambda include_path=None, **_: manager(include_path))
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def manager(folder: str | Path | None) -> TaskManager:
    return TaskManager(include_path=folder and str(folder), include_defaults=False)


@pytest.fixture(scope="module", params=["125m", "350m"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of a kind, with a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "model"
    copy_of(minopt.DEMO, folder)
    (folder / "model.safetensors").unlink()
    vocab_size = minopt.OPTConfig.load(folder / "config.json").vocab_size
    lively(request.param, torch.float32, vocab_size=vocab_size, max_position_embeddings=POSITIONS,
           eos_token_id=2).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[HFLM, MinoptLM]:
    """The harness' model on the files, and ours. Its cache takes texts for others where windows repeat each other."""
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=1, logits_cache=False)
    return theirs, MinoptLM(str(folder), device="cpu", dtype="float32")


def requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(copy.deepcopy(arguments))]


def assert_close(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4, rel=1e-6)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]


def test_likelihoods_and_greedy_flags(pair: tuple[HFLM, MinoptLM]) -> None:
    theirs, ours = pair
    given = requests("loglikelihood", PAIRS)
    expected = theirs.loglikelihood(given, disable_tqdm=True)
    assert_close(ours.loglikelihood(given, disable_tqdm=True), expected)
    # What greedy decoding gives is said to be that, and a token less likely is not.
    texts = theirs.generate_until(requests("generate_until", [(QUESTION, {"max_gen_toks": 1, "until": []})]))
    greedy = requests("loglikelihood", [(QUESTION, texts[0]), (QUESTION, " q"), (QUESTION, texts[0] + " q")])
    found = ours.loglikelihood(greedy, disable_tqdm=True)
    assert_close(found, theirs.loglikelihood(greedy, disable_tqdm=True))
    assert [is_greedy for _, is_greedy in found] == [True, False, False]


def test_answers_run_together_or_not_and_in_any_batches(pair: tuple[HFLM, MinoptLM], monkeypatch: Any) -> None:
    ours, given = pair[1], requests("loglikelihood", PAIRS)
    expected = ours.loglikelihood(given, disable_tqdm=True)
    for worth, rows in ((1, None), (10**9, None), (1, 2), (10**9, 1)):
        monkeypatch.setattr(interop, "_WORTH", worth)
        monkeypatch.setattr(ours, "_most_rows", rows)
        assert_close(ours.loglikelihood(given, disable_tqdm=True), expected)


def test_rolling_likelihoods(pair: tuple[HFLM, MinoptLM]) -> None:
    theirs, ours = pair
    given = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = theirs.loglikelihood_rolling(given, disable_tqdm=True)
    assert ours.loglikelihood_rolling(given, disable_tqdm=True) == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_generated_texts(pair: tuple[HFLM, MinoptLM]) -> None:
    theirs, ours = pair
    contexts = [QUESTION, "It was", "</s>It was", "", "It was a long way. " * 12]
    given = [(context, options) for context in contexts for options in GENERATION]
    expected = theirs.generate_until(requests("generate_until", given), disable_tqdm=True)
    assert ours.generate_until(requests("generate_until", given), disable_tqdm=True) == expected
    assert len(set(expected)) > 5


@pytest.mark.parametrize("options", [{"add_bos_token": False}, {"prefix_token_id": 5}, {"max_length": 20}], ids=str)
def test_options_of_both_models(options: dict[str, Any], folder: Path) -> None:
    theirs = HFLM(str(folder), device="cpu", dtype="float32", logits_cache=False, **options)
    ours = MinoptLM(minopt.load(folder, device="cpu"), **options)
    given = requests("loglikelihood", [pair for pair in PAIRS if len(pair[1]) < 20])
    assert_close(ours.loglikelihood(given, disable_tqdm=True), theirs.loglikelihood(given, disable_tqdm=True))
    given = requests("loglikelihood_rolling", [(TEXTS[2],)])
    expected = theirs.loglikelihood_rolling(given, disable_tqdm=True)
    assert ours.loglikelihood_rolling(given, disable_tqdm=True) == pytest.approx(expected, abs=1e-4, rel=1e-6)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tasks on a file, and one whose data is on the hub."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [{"question": f"{QUESTION[10:60]} {i}?", "choices": [" one", " two of them", " no"], "gold": i % 3}
             for i in range(7)]  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
             "test_split": "test", "fewshot_split": "test", "doc_to_text": "{{question}}"}  # fmt: skip
    for name, settings in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **local, **settings}))
    (folder / "far.yaml").write_text(json.dumps({**local, **TASKS["choice"], "task": "far", "dataset_path": "no/such",
                                                 "dataset_kwargs": {}}))  # fmt: skip
    return folder


def test_the_command_gives_what_the_harness_gives_for_its_own_model(
    folder: Path, tasks: Path, pair: tuple[HFLM, MinoptLM], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    expected = simple_evaluate(pair[0], tasks=[*TASKS], limit=5, num_fewshot=1, task_manager=manager(tasks))["results"]
    words = f"--model {folder} --device cpu --include-path {tasks} --limit 5 --num-fewshot 1 --json".split()
    assert main(["evaluate", "--task", f"lm_eval:{','.join(TASKS)}", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    for task in TASKS:
        numbers = {name: value for name, value in expected[task].items() if isinstance(value, float)}
        assert {name: found[f"{task} {name}"] for name in numbers} == pytest.approx(numbers, rel=1e-5), task
        assert found[f"{task} examples"] == 5
    # The harness' own command, which writes a table.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path=None, **_: manager(include_path))
    typed = (
        f"lm_eval --model minopt --model_args pretrained={folder},dtype=float32 --tasks choice --include_path {tasks}"
    )
    monkeypatch.setattr(sys, "argv", [*typed.split(), "--limit", "5", "--num_fewshot", "1"])
    interop.main()
    assert f"{expected['choice']['acc_norm_stderr,none']:.4f}" in capsys.readouterr().out


class Together:
    """One of two processes as ``World`` has them, here threads."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.values, self.barrier = rank, values, barrier

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.wait()
        found = list(self.values)
        self.wait()
        return found

    def wait(self) -> None:
        self.barrier.wait(60)


def test_two_processes_share_the_examples(tasks: Path) -> None:
    """Seven examples: one more in a process than in the other."""
    lm, found = minopt.load(minopt.DEMO, device="cpu"), list[Any]([None, None])
    expected = simple_evaluate(MinoptLM(lm), tasks=[*TASKS], task_manager=manager(tasks))["results"]
    values, barrier = [None, None], threading.Barrier(2)

    def work(rank: int) -> None:
        ours = MinoptLM(lm)
        ours._rank, ours._world_size, ours._world = rank, 2, Together(rank, values, barrier)
        found[rank] = simple_evaluate(ours, tasks=[*TASKS], task_manager=manager(tasks))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[1] is None
    for task in TASKS:
        numbers = {name: value for name, value in expected[task].items() if isinstance(value, float)}
        assert {name: found[0]["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-6)


@pytest.mark.parametrize(("words", "message"), [
    ("--task lm_eval:nonsense,choice --include-path {tasks}", "task: lm-evaluation-harness has no task nonsense."),
    ("--task lm_eval: --include-path {tasks}", "lm-evaluation-harness has no task "),
    ("--task lm_eval:far --include-path {tasks}", "the data of far cannot be downloaded ("),
    ("--task lm_eval:choice --include-path {tasks}/no", "--include-path: expected a folder of tasks, there is none ("),
    ("--task perplexity --limit 3", "--limit: goes with --task lm_eval:..., got --task perplexity. Leave it out."),
    ("--task lm_eval:choice --window 3", "--window: goes with --task perplexity, got --task lm_eval:choice. Leave"),
    ("--task lm_eval:choice --limit 0", "--limit: expected an integer of at least 1, got 0."),
    ("--task lm_evil:x", "--task: expected reference or perplexity or squad or squad-question or lm_eval:..., got"),
])  # fmt: skip
def test_what_cannot_be_measured_is_said_in_one_line(
    words: str, message: str, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    try:
        code = main(["evaluate", "--model", minopt.DEMO, "--device", "cpu", *words.format(tasks=tasks).split()])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err
    assert code == 2
    assert message.replace("task: the data", "--task: the data") in said
    assert said.count("minopt: error") == 1


def test_limits_of_the_model_are_said(folder: Path, pair: tuple[HFLM, MinoptLM], tmp_path: Path) -> None:
    ours = pair[1]
    with pytest.raises(ValueError, match=f"continuation: .* tokens, the model reads {POSITIONS}"):
        ours.loglikelihood(requests("loglikelihood", [("a", "It was a long way. " * 40)]))
    with pytest.raises(
        ValueError, match=f"max_gen_toks: expected less than the {POSITIONS} tokens that the model reads"
    ):
        ours.generate_until(requests("generate_until", [("a", {"until": []})]))
    with pytest.raises(ValueError, match="nonsense"):
        ours.generate_until(requests("generate_until", [("a", {"max_gen_toks": 3, "nonsense": 1})]))
    (copy_of(folder, tmp_path / "bare") / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer: expected one beside"):
        MinoptLM(str(tmp_path / "bare"), device="cpu")


def test_without_the_harness_the_line_that_installs_it_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "minopt.interop.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", "--task", "lm_eval:piqa", "--model", minopt.DEMO, "--device", "cpu"]) == 2
    assert (
        "lm_eval: expected to find it, it is not installed. pip install 'minopt[lm-eval]'." in capsys.readouterr().err
    )
    monkeypatch.delitem(sys.modules, "minopt.interop.lm_eval", raising=False)
    with pytest.raises(SystemExit, match=r"^minopt: error: lm_eval: expected to find it, it is not installed\."):
        runpy.run_module("minopt.interop.lm_eval", run_name="__main__")


def test_without_a_network_nothing_is_tried_again_and_again(
    tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(interop, "getproxies", dict)
    unknown = mock.Mock(side_effect=socket.gaierror(-2, "Name or service not known"))
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    words = ["evaluate", "--model", minopt.DEMO, "--device", "cpu", "--include-path", str(tasks), "--task"]
    assert main([*words, "lm_eval:far"]) == 2
    assert "the data of far cannot be downloaded (" in capsys.readouterr().err
    assert unknown.call_count == 1
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
