"""``minopt generate``: each option of the library on the command line, and files of prompts."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import minopt
import minopt.loading
from minopt import GenerationConfig
from minopt.cli import COMMANDS, main
from minopt.cli.flags import fields_of

Capture = pytest.CaptureFixture[str]

PROMPTS = ["The sea", "It was a dark and stormy night, and the old captain", "She", ""]


@pytest.fixture(scope="module")
def lm() -> minopt.LanguageModel:
    return minopt.load(minopt.DEMO, device="cpu")


def generate(*arguments: object) -> int:
    return main(["generate", "--model", minopt.DEMO, "--device", "cpu", *map(str, arguments)])


def refused(capsys: Capture, *arguments: object) -> str:
    """The one line on stderr of a command that says what to mend."""
    assert generate(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("minopt: error: ")
    return line.removeprefix("minopt: error: ")


def lines(source: Path | Capture) -> list[dict[str, Any]]:
    """The objects in a file of results, or on stdout."""
    text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source.readouterr().out
    return [json.loads(line) for line in text.splitlines()]


def test_every_option_that_has_a_place_beside_text_has_a_flag() -> None:
    assert {f.name for f in fields(GenerationConfig)} - fields_of(COMMANDS["generate"]).keys() == {"output_scores"}


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("--num-beams 3 --no-repeat-ngram-size 2", {"num_beams": 3, "no_repeat_ngram_size": 2}),
        ("--num-beams 3 --length-penalty 2 --early-stopping true --eos-token-id 15,12",
         {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "eos_token_id": (15, 12)}),
        ("--num-beams 2 --early-stopping never", {"num_beams": 2, "early_stopping": "never"}),
        ("--no-repeat-ngram-size 1 --no-no-repeat-ngram-include-prompt",
         {"no_repeat_ngram_size": 1, "no_repeat_ngram_include_prompt": False}),
        ("--repetition-penalty 1.5 --presence-penalty 1 --frequency-penalty 0.5",
         {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5}),
        ("--do-sample --min-p 0.2 --top-k 0 --seed 3", {"do_sample": True, "min_p": 0.2, "top_k": 0, "seed": 3}),
        ("--do-sample true --temperature 0.7 --top-k 20 --top-p 0.9 --seed 5 --min-new-tokens 2",
         {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 5, "min_new_tokens": 2}),
        ("--suppress-tokens 15,266 --bad-words-ids [[277,299],[262]]",
         {"suppress_tokens": (15, 266), "bad_words_ids": [[277, 299], [262]]}),
        ("--sequence-bias [[[266],-5.0]] --min-new-tokens 3", {"sequence_bias": [[[266], -5.0]], "min_new_tokens": 3}),
        ("--stop-strings th --stop-strings x", {"stop_strings": ["th", "x"]}),
        ("--forced-bos-token-id 300 --pad-token-id 7", {"forced_bos_token_id": 300, "pad_token_id": 7}),
    ],
)  # fmt: skip
def test_each_flag_is_the_librarys_option(
    flags: str, options: dict[str, Any], lm: minopt.LanguageModel, capsys: Capture
) -> None:
    prompt = "" if "forced" in flags else "The old house stood"
    assert generate(prompt, "--max-new-tokens", "12", *flags.split()) == 0
    out = capsys.readouterr().out
    assert out == lm.generate(prompt, max_new_tokens=12, **options) + "\n"
    assert out != lm.generate(prompt, max_new_tokens=12) + "\n"


def test_several_continuations_stand_one_below_the_other(lm: minopt.LanguageModel, capsys: Capture) -> None:
    assert generate("The sea", "--num-beams", "3", "--num-return-sequences", "2", "--echo") == 0
    texts = lm.generate("The sea", num_beams=3, num_return_sequences=2, max_new_tokens=30)
    assert capsys.readouterr().out == f"The sea{texts[0]}\n---\nThe sea{texts[1]}\n"


def test_the_models_own_defaults_hold_unless_a_flag_says_otherwise(
    lm: minopt.LanguageModel, tmp_path: Path, capsys: Capture
) -> None:
    own = minopt.LanguageModel(lm.model, lm.tokenizer, {"max_new_tokens": 3, "do_sample": True, "temperature": 0.5})
    own.save(tmp_path / "own")
    greedily = lm.generate("The sea", max_new_tokens=5)
    calls = {"--seed 1": own.generate("The sea", seed=1), "--no-do-sample --max-new-tokens 5": greedily}
    for flags, expected in calls.items():
        assert main(["generate", "The sea", "--model", str(tmp_path / "own"), "--device", "cpu", *flags.split()]) == 0
        assert capsys.readouterr().out == expected + "\n"


# --- files of prompts


def test_a_text_file_has_a_prompt_a_line(lm: minopt.LanguageModel, tmp_path: Path, capsys: Capture) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    file.write_text("\n".join(PROMPTS[:3]) + "\n\n", encoding="utf-8")  # the last prompt is an empty line
    assert generate("--input", file, "--output", out, "--max-new-tokens", "5", "--batch-size", "2") == 0
    said = f"minopt: {file}: 1 of 4 lines are blank, line 4 first: each is an empty prompt\n"
    assert capsys.readouterr() == ("", said)
    records = lines(out)
    assert [record["prompt"] for record in records] == PROMPTS
    assert [record["text"] for record in records] == lm.generate(PROMPTS, max_new_tokens=5)
    assert {tuple(record) for record in records} == {("prompt", "index", "sequence", "text", "stop_reason")}


def test_fields_of_a_jsonl_come_along_and_details_if_asked_for(
    lm: minopt.LanguageModel, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "The\\nsea", "id": "a"}\n\n{"id": 2, "prompt": "Käthe, Käthe"}\n', encoding="utf-8")
    flags = ["--num-beams", "2", "--num-return-sequences", "2", "--top-logprobs", "1", "--output-logprobs"]
    assert generate("--input", file, "--max-new-tokens", "4", *flags) == 0
    records = lines(capsys)
    assert [(r["id"], r["index"], r["sequence"]) for r in records] == [("a", 0, 0), ("a", 0, 1), (2, 1, 0), (2, 1, 1)]
    options = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4, "top_logprobs": 1}
    expected = [r for found in lm.generate(["The\nsea", "Käthe, Käthe"], return_details=True, **options) for r in found]
    for record, detail in zip(records, expected, strict=True):
        assert (record["text"], tuple(record["token_ids"])) == (detail.text, detail.token_ids)
        assert record["score"] == pytest.approx(detail.score, abs=1e-5)
        assert record["logprobs"] == pytest.approx(detail.logprobs, abs=1e-4)
        assert [step[0][0] for step in record["top_logprobs"]] == [step[0][0] for step in detail.top_logprobs]
    (file := tmp_path / "prompts.txt").write_text("One, two, three. One, two, three. One,")
    assert generate("--input", file, "--max-new-tokens", "20", "--prompt-lookup-num-tokens", "4") == 0
    (record,) = lines(capsys)
    assert record["drafted_tokens"] >= record["accepted_tokens"] > 0


def test_each_result_is_written_as_soon_as_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """And stays, if the run breaks off."""
    file, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    file.write_text("\n".join(PROMPTS[:3]))
    whole, seen = minopt.LanguageModel.generate_each, []

    def watched(self: minopt.LanguageModel, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for result in whole(self, *args, **kwargs):
            seen.append(len(lines(out)) if out.exists() else 0)
            if len(seen) == 3:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(minopt.LanguageModel, "generate_each", watched)
    assert generate("--input", file, "--output", out, "--max-new-tokens", "2", "--batch-size", "1") == 130
    assert seen == [0, 1, 2]
    assert len(lines(out)) == 2
    assert capsys.readouterr().err == f"minopt: interrupted, with 2 of 3 prompts in {out}: go on with --resume\n"


def test_an_existing_output_is_kept_unless_forced(tmp_path: Path, capsys: Capture) -> None:
    file, link, out = (tmp_path / name for name in ("prompts.txt", "link.txt", "out.jsonl"))
    file.write_text("The sea")
    link.hardlink_to(file)
    out.write_text("mine")
    arguments = ["--input", file, "--output", out, "--max-new-tokens", "1"]
    assert refused(capsys, *arguments) == (
        f"--output: {out} is there already. Name another file, or replace it with --force, or continue it with "
        "--resume."
    )
    assert refused(capsys, *arguments, "--force", "--max-new-tokens", "2000").startswith("prompt: ")
    assert out.read_text() == "mine"  # nothing is opened before all prompts are known to fit
    assert generate(*arguments, "--force") == 0
    assert len(lines(out)) == 1
    for output in (file, link):
        message = refused(capsys, "--input", file, "--output", output, "--force")
        assert message == f"--output: {output} is the --input too. Name another file."
    assert file.read_text() == "The sea"
    assert generate("--input", file, "--output", os.devnull, "--max-new-tokens", "1") == 0  # no file: it may be


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\nnonsense', "a.jsonl: line 2 is no JSON"),
        ("a.jsonl", b'{"prompt": "x", "text": "y", "score": 1}', "a.jsonl: line 1: the output writes score, text its"),
        ("a.jsonl", b'["x"]', 'a.jsonl: line 1: expected an object with a text "prompt"'),
        ("a.jsonl", b'{"prompt": 5}', 'a.jsonl: line 1: expected an object with a text "prompt"'),
        ("a.txt", b"\xff\xfe", "a.txt: expected UTF-8"),
        ("a.json", b'[{"prompt": "x"}]', "a.json: expected lines of text, or a .jsonl with an object a line"),
        ("a.NDJSON", b"nonsense", "a.NDJSON: line 1 is no JSON (Expecting value)"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl: line 1 is no JSON"),
        ("a.txt", b"a\nb\n" + b"word " * 2000, "(Prompt 3 of 3.)"),
    ],
)
def test_a_file_of_prompts_that_is_none_names_the_line(
    name: str, content: bytes, message: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refused(capsys, "--input", tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--input /nowhere.txt", "--input: /nowhere.txt: there is no such file or folder. Check the path."),
        ("--input /", "--input: /: expected a file, got a folder. Name a file in it."),
        ("x --input p.txt", "prompt: expected a prompt or --input, got both. Either may be -"),
        ("--input p.txt --resume", "--resume: needs --output, and"),
        ("--input p.txt --output o --resume --force", "--resume: needs --output, and cannot be combined with --force"),
        ("--input {tmp}/p.txt --output {tmp}/no/o --model /no", "there is no folder"),  # before a model is loaded
        ("--input {tmp}/p.txt --output {tmp} --model /no", "--output: expected a file, got a folder"),
        ("x --resume", "--resume: goes with --input"),
        ("x --output o.jsonl", "--output: goes with --input"),
        ("x --top-logprobs 2", "--top-logprobs: goes with --input"),
        ("--input p.txt --echo", "--echo: the output of --input has the prompts already"),
        ("x --sequence-bias [[5,1.0]]", "--sequence-bias must be pairs of ids and a number"),
        ("x --bad-words-ids 5", "--bad-words-ids must be sequences of at least one id each, got 5"),
        ("x --length-penalty 2", "--length-penalty acts on beam search only, and --num-beams is 1"),
        ("x --num-return-sequences 2", "greedy decoding has one answer"),
    ],
)
def test_what_goes_together_is_told(arguments: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "p.txt").write_text("The sea")
    assert message in refused(capsys, *arguments.format(tmp=tmp_path).split())


def test_what_is_empty_is_told(tmp_path: Path, capsys: Capture) -> None:
    ends = ["--sequence-bias", "[[[2], 1000.0]]"]
    assert generate("The sea", *ends) == 0
    assert capsys.readouterr() == (
        "\n", "minopt: the continuation is empty: the model ended it at once (--min-new-tokens 1 forbids that).\n"
    )  # fmt: skip
    assert generate("The sea", "--no-skip-special-tokens", *ends) == 0
    assert capsys.readouterr() == ("</s>\n", "")
    (tmp_path / "p.txt").write_text("a\nb\n")
    assert generate("--input", tmp_path / "p.txt", *ends) == 0
    assert "2 continuations are empty: the model ended them at once" in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text("")
    assert generate("--input", tmp_path / "p.jsonl", "--output", tmp_path / "o.jsonl") == 0
    assert (tmp_path / "o.jsonl").read_text() == ""
    assert capsys.readouterr().err == f"minopt: {tmp_path / 'p.jsonl'}: has no prompts, so there are no results\n"


# --- standard input, order, and going on


@pytest.mark.parametrize(("given", "flags"), [("The sea", ["-"]), ("The sea\n", [])])
def test_a_prompt_comes_through_a_pipe(given: str, flags: list[str], lm: minopt.LanguageModel) -> None:
    command = [sys.executable, "-m", "minopt", "generate", *flags, "--device", "cpu", "--max-new-tokens", "4", "--echo"]
    result = subprocess.run(command, input=given, capture_output=True, text=True, check=True, encoding="utf-8")
    assert result.stdout == lm.generate("The sea", max_new_tokens=4, echo=True) + "\n"
    assert ("reading the prompt from standard input" in result.stderr) == (not flags)


def test_lines_of_standard_input_are_prompts(
    lm: minopt.LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffK\u00e4the\r\nThe sea\r\n".encode())))
    assert generate("--input", "-", "--max-new-tokens", "3") == 0
    records = lines(capsys)
    assert [record["prompt"] for record in records] == ["K\u00e4the", "The sea"]
    assert [record["text"] for record in records] == lm.generate(["K\u00e4the", "The sea"], max_new_tokens=3)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert "stdin: expected UTF-8" in refused(capsys, "-")
    monkeypatch.setattr(sys, "stdin", None)
    assert "stdin: expected a text, got none" in refused(capsys, "--input", "-")


@pytest.mark.parametrize("flags", [[], ["--num-beams", "2", "--num-return-sequences", "2"], ["--unordered"]], ids=str)
def test_an_interrupted_output_is_gone_on_with_wherever_it_was_cut(
    flags: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order unless asked otherwise; the whole is then what it would have been."""
    file, whole, out = tmp_path / "in.txt", tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    file.write_text("\n".join(f"{'The sea ' * (n % 7)}{n}" for n in range(40)) + "\n")
    options = ["--input", file, "--max-new-tokens", "2", "--batch-size", "3", *flags]
    assert generate(*options, "--output", whole) == 0
    order = [record["index"] for record in lines(whole)]
    assert (order == sorted(order)) == ("--unordered" not in flags)
    data = whole.read_bytes().splitlines(keepends=True)
    for broken in (0, 1, 17, 40, 80):
        out.write_bytes(b"".join(data[:broken]) + b"".join(data[broken:])[:20])
        assert generate(*options, "--output", out, "--resume") == 0
        found, expected = (
            [(r["index"], r["sequence"], r["prompt"], r["text"]) for r in lines(p)] for p in (out, whole)
        )
        assert sorted(found) == sorted(expected)
        assert found == expected or "--unordered" in flags
    capsys.readouterr()
    monkeypatch.setattr(minopt.loading, "load", lambda *args, **options: pytest.fail("a model was loaded"))
    assert generate(*options, "--output", out, "--resume") == 0
    said = "has results of all 40 prompts. Flags are not compared: --force generates them anew"
    assert capsys.readouterr() == ("", f"minopt: {out}: {said}\n")


LATE = "".join(
    json.dumps({"prompt": "ab"[index], "index": index, "sequence": sequence}) + "\n"
    for index, sequence in ((0, 0), (1, 0), (0, 1))
)
TWO = '{"prompt": "a", "index": 0, "sequence": 0}\n{"prompt": "a", "index": 0, "sequence": 1}\n'


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ('{"prompt": "b", "index": 0, "sequence": 0}\n', [], "line 1 is not a result of this --input. Name another"),
        ('{"prompt": "a", "index": -2, "sequence": 0}\n', [], "line 1 is not a result of this --input"),
        ('{"prompt": "a", "index": 0, "sequence": 1}\n', [], "line 1 is not a result of this --input"),
        (LATE, [], "line 3 is not a result of this --input"),
        ("no JSON\n", [], "line 1 is not a result of this --input"),
        (TWO, ["--num-return-sequences", "1"], "--resume: expected 1 continuations of a prompt, got an output with 2."),
        (TWO, [], "--resume: expected 1 continuations of a prompt, got an output with 2. Give the flags that it was"),
    ],
)
def test_an_output_of_something_else_is_not_gone_on_with(
    content: str, flags: list[str], message: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "in.txt").write_text("a\nb\n")
    (tmp_path / "out.jsonl").write_text(content)
    arguments = ["--input", tmp_path / "in.txt", "--output", tmp_path / "out.jsonl", "--resume"]
    assert message in refused(capsys, *arguments, *flags)
    assert (tmp_path / "out.jsonl").read_text() == content


def test_lines_on_stdout_are_utf8_whatever_the_terminals_encoding(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "The sea", "note": "🙂 é"}', encoding="utf-8")
    command = [sys.executable, "-m", "minopt", "generate", "--input", str(file), "--max-new-tokens", "1"]
    result = subprocess.run(command, capture_output=True, check=True, env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert json.loads(result.stdout.decode("utf-8"))["note"] == "🙂 é"


def test_a_draft_changes_no_text(capsys: Capture) -> None:
    assert generate("It was", "--max-new-tokens", "12") == 0
    plain = capsys.readouterr().out
    for draft in ("int8", minopt.DEMO):
        assert generate("It was", "--max-new-tokens", "12", "--draft", draft) == 0
        assert capsys.readouterr().out == plain
    assert "expected greedy decoding or sampling, got --num-beams 2" in refused(
        capsys, "It was", "--draft", "int8", "--num-beams", "2"
    )


def test_a_models_own_draft_is_for_one_prompt_and_files_run_in_full_batches(tmp_path: Path, capsys: Capture) -> None:
    (file := tmp_path / "prompts.txt").write_text("The sea\nIt was\n")
    assert generate("--input", file, "--max-new-tokens", "6") == 0
    plain = lines(capsys)
    for draft, drafts in (("int8", False), (minopt.DEMO, True)):
        assert generate("--input", file, "--max-new-tokens", "6", "--draft", draft) == 0
        captured = capsys.readouterr()
        found = [json.loads(line) for line in captured.out.splitlines()]
        assert [record["text"] for record in found] == [record["text"] for record in plain]
        assert all(("drafted_tokens" in record) == drafts for record in found)
        assert ("--draft int8: is for one text. These run in full batches" in captured.err) == (not drafts)
    file.write_text("The sea\n")
    assert generate("--input", file, "--max-new-tokens", "6", "--draft", "int8") == 0
    (record,) = lines(capsys)
    assert record["text"] == plain[0]["text"]
    assert "drafted_tokens" in record
