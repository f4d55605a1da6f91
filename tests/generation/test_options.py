"""GenerationConfig: what is refused and with which words, and what comes from a model's generation_config.json."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from minopt import GenerationConfig
from minopt.generation.options import read_defaults, with_defaults
from tests.conftest import build_reference

NAMES = [field.name for field in dataclasses.fields(GenerationConfig)]
OURS_ALONE = {
    "seed", "truncate_prompt", "presence_penalty", "frequency_penalty", "no_repeat_ngram_include_prompt",
    "output_logprobs", "top_logprobs",
}  # fmt: skip

# --- what is refused

# What else must be set for an option to act.
SWITCHES: dict[str, dict[str, Any]] = {
    **{name: {"do_sample": True} for name in ("temperature", "top_k", "top_p", "min_p", "seed")},
    **{name: {"num_beams": 2} for name in ("length_penalty", "early_stopping")},
    "no_repeat_ngram_include_prompt": {"no_repeat_ngram_size": 2},
    "max_matching_ngram_size": {"prompt_lookup_num_tokens": 3},
}

COUNTS = (-1, 2.0, True, None, "3", math.nan, [1])
FLAGS = (0, 1, None, "yes", 1.0)
PENALTIES = (None, "1", True, math.nan, math.inf, -math.inf, 10001, -1e5)

# What each option must be, and values that are not that.
NONSENSE: dict[str, tuple[str, tuple[Any, ...]]] = {
    "max_new_tokens": ("an integer of at least 1", (0, *COUNTS)),
    "num_beams": ("an integer of at least 1", (0, *COUNTS)),
    "num_return_sequences": ("an integer of at least 1", (0, *COUNTS)),
    "min_new_tokens": ("an integer of at least 0", COUNTS),
    "no_repeat_ngram_size": ("an integer of at least 0", COUNTS),
    "top_logprobs": ("an integer of at least 0", COUNTS),
    "truncate_prompt": ("true or false", FLAGS),
    "do_sample": ("true or false", FLAGS),
    "no_repeat_ngram_include_prompt": ("true or false", FLAGS),
    "output_scores": ("true or false", FLAGS),
    "output_logprobs": ("true or false", FLAGS),
    "length_penalty": ("a number of at least -5 and at most 5", (None, "1", True, math.nan, math.inf, 5.1, -6)),
    "early_stopping": ("true, false or never", (None, 0, 1, "always", "True", "")),
    "temperature": (
        "from 1e-6 to 1e6 (for the most probable token at each step leave do_sample off)",
        (0, 0.0, -1.0, 1e-7, 2e6, math.nan, math.inf, "hot", None, True),
    ),
    "top_k": ("an integer of at least 0", COUNTS),
    "top_p": ("a number above 0 and at most 1", (0, 0.0, 2, 1.0001, -0.1, math.nan, None, "0.9", True)),
    "min_p": ("a number of at least 0 and at most 1", (-0.1, 1.0001, math.nan, "0.1", True)),
    "seed": ("an integer from 0 to 2**64 - 1", (-1, 0.5, 2**64, True, "7")),
    "repetition_penalty": ("a number of at least 0.0001 and at most 10000", (0, 1e-5, 10001, math.nan, None, "1")),
    "presence_penalty": ("a number of at least -10000 and at most 10000", PENALTIES),
    "frequency_penalty": ("a number of at least -10000 and at most 10000", PENALTIES),
    "sequence_bias": (
        "pairs of ids and a number from -10000 to 10000 or -inf, each sequence of ids once",
        (5, "ab", (5,), ((1, 2.0),), (((1,), "2"),), (((), 1.0),), (((1, -1), 1.0),), (((1,), math.nan),),
         (((1,), math.inf),), (((1,), 20000.0),), (((1,), 1.0, 2),), (((True,), 1.0),), (((1,), 1.0), ((1,), 2.0)),
         (((1,), None),), ((("1",), 1.0),)),
    ),
    "bad_words_ids": (
        "sequences of at least one id each",
        (5, "ab", ((),), ((1,), ()), (1, 2), ((1, -1),), ((1.0,),), (("a",),), ((True,),), (None,)),
    ),
    "suppress_tokens": ("ids", (5, (1, -1), "abc", (1.0,), (None,), ((1,),), (False,))),
    "forced_bos_token_id": ("an integer of at least 0", (-1, 2.0, "2", (2,), True)),
    "prompt_lookup_num_tokens": ("an integer of at least 1", (0, -1, 2.0, True, "3", math.nan, [1])),
    "max_matching_ngram_size": ("an integer of at least 1", (0, *COUNTS)),
    "eos_token_id": ("an id, or several", (-1, (2, -1), "</s>", 2.0, True, (2, None))),
    "pad_token_id": ("an integer of at least 0", (-1, 1.0, "<pad>", (1,), False)),
    "stop_strings": ("texts of at least one character", (5, ("",), ("a", ""), ("a", 5), (None,), (b"a",))),
    "max_time": ("a number above 0", (0, -1.0, math.nan, math.inf, "1", True)),
}  # fmt: skip


def test_the_values_below_try_each_option() -> None:
    assert set(NONSENSE) == set(NAMES)


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(name, value, id=f"{name}={value!r}") for name, (_, values) in NONSENSE.items() for value in values],
)
def test_each_option_without_sense_is_refused_with_its_value(name: str, value: Any) -> None:
    options = SWITCHES.get(name, {}) | {name: value}
    message = f"generation: {name} must be {NONSENSE[name][0]}, got {value!r}."
    for build in (GenerationConfig, GenerationConfig().replace):
        with pytest.raises(ValueError, match=r"^generation: ") as error:
            build(**options)
        assert str(error.value) == message


IDLE: list[tuple[str, Any, str]] = [
    *(
        (name, value, "on sampling only, and do_sample is off")
        for name, value in {"temperature": 0.5, "top_k": 10, "top_p": 0.9, "min_p": 0.0, "seed": 0}.items()
    ),
    *(
        (name, value, "on beam search only, and num_beams is 1")
        for name, value in (("length_penalty", 0.0), ("early_stopping", True), ("early_stopping", "never"))
    ),
    ("no_repeat_ngram_include_prompt", False, "on n-grams only, and no_repeat_ngram_size is 0"),
    ("max_matching_ngram_size", 3, "on prompt lookup only, and prompt_lookup_num_tokens is None"),
]


@pytest.mark.parametrize(("name", "value", "reason"), IDLE, ids=[f"{name}={value!r}" for name, value, _ in IDLE])
def test_options_that_would_do_nothing_are_refused_until_what_they_need_is_set(
    name: str, value: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match="generation") as error:
        GenerationConfig(**{name: value})
    assert str(error.value) == f"generation: {name} acts {reason}."
    config = GenerationConfig(**SWITCHES[name], **{name: value})
    assert getattr(config, name) == value
    off = {switch: getattr(GenerationConfig(), switch) for switch in SWITCHES[name]}
    with pytest.raises(ValueError, match=f"^generation: {name} acts {reason}\\.$"):
        config.replace(**off)
    others = {key: value for switch in SWITCHES.values() for key, value in switch.items() if key not in SWITCHES[name]}
    with pytest.raises(ValueError, match=f"^generation: {name} acts {reason}\\.$"):
        GenerationConfig(**others, **{name: value})


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "min_new_tokens must not exceed max_new_tokens, got 21 and 20": {"min_new_tokens": 21},
    "min_new_tokens must not exceed max_new_tokens, got 4 and 3": {"min_new_tokens": 4, "max_new_tokens": 3},
    "num_return_sequences must not exceed num_beams, got 4 and 3": {"num_return_sequences": 4, "num_beams": 3},
    "num_return_sequences must not exceed num_beams, got 3 and 2": {
        "num_return_sequences": 3, "num_beams": 2, "do_sample": True,
    },
    "num_return_sequences is 2, and greedy decoding has one answer: set do_sample or num_beams": {
        "num_return_sequences": 2,
    },
    "prompt_lookup_num_tokens is 5, and beams have no drafts: leave out num_beams or prompt_lookup_num_tokens": {
        "prompt_lookup_num_tokens": 5, "num_beams": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_options_that_contradict_each_other_are_refused_with_their_values(message: str) -> None:
    with pytest.raises(ValueError, match="generation") as error:
        GenerationConfig(**CONTRADICTIONS[message])
    assert str(error.value) == f"generation: {message}."


LIMITS: list[dict[str, Any]] = [
    {"max_new_tokens": 1, "min_new_tokens": 1},
    {"do_sample": True, "temperature": 1e-6, "top_k": 0, "top_p": 1e-9, "min_p": 0, "seed": 0},
    {"do_sample": True, "temperature": 1e6, "top_p": 1, "min_p": 1, "seed": 2**64 - 1, "num_return_sequences": 100},
    {"num_beams": 3, "num_return_sequences": 3, "length_penalty": -5, "early_stopping": "never"},
    {"num_beams": 3, "do_sample": True, "length_penalty": 5, "early_stopping": True},
    {"repetition_penalty": 1e-4, "presence_penalty": -1e4, "frequency_penalty": 1e4},
    {"repetition_penalty": 10000, "presence_penalty": 1e4, "frequency_penalty": -1e4},
    {"sequence_bias": (((0,), -math.inf), ((0, 0), 1e4), ((1,), -10000))},
    {"eos_token_id": (), "forced_bos_token_id": 0, "pad_token_id": 0, "max_time": 1e-9},
]


@pytest.mark.parametrize("options", LIMITS, ids=", ".join)
def test_the_limits_themselves_are_allowed(options: dict[str, Any]) -> None:
    """What lies just beyond them is refused above."""
    config = GenerationConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_all_nonsense_is_named_at_once() -> None:
    with pytest.raises(ValueError, match="generation") as error:
        GenerationConfig(max_new_tokens=0, temperature=0.5, seed=-1, length_penalty=2.0, min_new_tokens=5)
    assert str(error.value) == (
        "generation: max_new_tokens must be an integer of at least 1, got 0; seed must be an integer from 0 to "
        "2**64 - 1, got -1; temperature acts on sampling only, and do_sample is off; "
        "seed acts on sampling only, and do_sample is off; "
        "length_penalty acts on beam search only, and num_beams is 1."
    )
    wrong = {name: values[0] for name, (_, values) in NONSENSE.items()}
    with pytest.raises(ValueError, match="generation") as error:
        GenerationConfig(**wrong)
    assert all(f"{name} must be {NONSENSE[name][0]}, got {wrong[name]!r}" in str(error.value) for name in NAMES)


# --- spellings, replace


SPELLINGS: list[tuple[str, Any, list[Any]]] = [
    ("eos_token_id", (3, 4), [[3, 4]]),
    ("eos_token_id", (), [[]]),
    ("suppress_tokens", (3, 4), [[3, 4], range(3, 5)]),
    ("suppress_tokens", (), [None, []]),
    ("bad_words_ids", ((3, 4), (5,)), [[[3, 4], [5]], ([3, 4], (5,)), [(3, 4), range(5, 6)]]),
    ("bad_words_ids", (), [None, []]),
    (
        "sequence_bias",
        (((3, 4), 1.5), ((5,), -2.0)),
        [[[[3, 4], 1.5], [[5], -2.0]], {(3, 4): 1.5, (5,): -2.0}, (([3, 4], 1.5), [(5,), -2.0])],
    ),
    ("sequence_bias", (), [None, [], {}]),
    ("stop_strings", ("ab", "c"), [["ab", "c"]]),
    ("stop_strings", ("ab",), ["ab", ["ab"]]),
    ("stop_strings", (), [None, []]),
]


@pytest.mark.parametrize(("name", "kept", "others"), SPELLINGS, ids=[f"{n}={k!r}" for n, k, _ in SPELLINGS])
def test_other_spellings_are_the_same_value(name: str, kept: Any, others: list[Any]) -> None:
    config = GenerationConfig(**{name: kept})
    assert getattr(config, name) == kept
    for other in others:
        spelled = GenerationConfig(**{name: other})
        assert getattr(spelled, name) == kept
        assert spelled == config == GenerationConfig().replace(**{name: other})
        assert hash(spelled) == hash(config)


def test_unknown_options_are_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown option max_length, num_beam; there are max_new_tokens, ") as error:
        GenerationConfig().replace(num_beam=3, max_length=10, top_k=5)
    assert all(name in str(error.value) for name in NAMES)
    assert str(error.value).endswith(" max_length: set max_new_tokens.")


def test_it_does_not_change() -> None:
    words = [[1, 2]]
    config = GenerationConfig(bad_words_ids=words)
    words[0].append(5)
    assert config.bad_words_ids == ((1, 2),)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3  # type: ignore[misc]


# --- names and defaults are those of transformers


def test_the_names_are_those_of_transformers_but_for_our_own() -> None:
    theirs = transformers.GenerationConfig()
    assert {name for name in NAMES if not hasattr(theirs, name)} == OURS_ALONE


@pytest.fixture(scope="module")
def reference() -> Any:
    """A model of transformers' that never ends a text."""
    return build_reference("125m", eos_token_id=None)


def test_the_defaults_are_those_of_transformers_generate(reference: Any) -> None:
    """Where it has ``None`` for nothing, there is nothing here either: the tests below tell that it does nothing."""
    theirs, _ = reference._prepare_generation_config(None)
    expected = {name: getattr(theirs, name) for name in NAMES if name not in OURS_ALONE}
    del expected["max_new_tokens"]  # None, for it has max_length: see below
    expected["pad_token_id"] = None  # the model's, in both
    expected["max_matching_ngram_size"] = PromptLookupCandidateGenerator().max_matching_ngram_size  # who uses it knows
    ours = {name: getattr(GenerationConfig(), name) for name in expected}
    unset = {name for name, value in expected.items() if value is None}
    assert {name: value for name, value in ours.items() if name not in unset} == {
        name: value for name, value in expected.items() if name not in unset
    }
    assert all(ours[name] in (None, (), 0) for name in unset)
    assert len(expected) - len(unset) >= 10


def test_as_many_tokens_are_new_by_default_as_in_transformers(reference: Any) -> None:
    ids = torch.full((1, 7), 5)
    assert reference.generate(ids).shape[1] - 7 == GenerationConfig().max_new_tokens


# --- a model's generation_config.json


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function that writes options as transformers does, and some that it would refuse; returns the file."""

    def write(refused: dict[str, Any] | None = None, **options: Any) -> Path:
        transformers.GenerationConfig(**options).save_pretrained(tmp_path)
        path = tmp_path / "generation_config.json"
        if refused:
            path.write_text(json.dumps(json.loads(path.read_text()) | refused))
        return path

    return write


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


FILES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "greedy": {"max_new_tokens": 7, "min_new_tokens": 2, "repetition_penalty": 1.2},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "seed": 3},
    "beams": {
        "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.8, "early_stopping": "never",
        "no_repeat_ngram_size": 3,
    },
    "ids": {
        "eos_token_id": [2, 50118], "pad_token_id": 1, "suppress_tokens": [5, 6], "forced_bos_token_id": 9,
        "bad_words_ids": [[7], [8, 9]], "sequence_bias": [[[3, 4], -1.5], [[10], -math.inf]],
    },
    "stopping": {"stop_strings": ["\n\n", "é"], "max_time": 2.5},
    "one stop string": {"stop_strings": "\n"},
    "ours alone": {"presence_penalty": 0.5, "frequency_penalty": 0.25, "truncate_prompt": True},
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_options_come_out_of_a_file_as_transformers_wrote_them(
    write: Write, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(**FILES[name])
    assert read_defaults(path) == FILES[name]
    assert with_defaults(read_defaults(path), {}) == GenerationConfig(**FILES[name])
    assert warnings(caplog) == []


def test_the_file_that_transformers_writes_beside_a_model_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It has use_cache, output_attentions, _from_model_config and more that changes no token."""
    build_reference("125m").save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    assert {"_from_model_config", "use_cache", "output_attentions"} <= set(json.loads(path.read_text()))
    assert read_defaults(path) == {"eos_token_id": 2, "pad_token_id": 1}
    assert warnings(caplog) == []


def test_what_changes_no_token_brings_no_warning(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    """Defaults written out, as older releases did; helpers of assisted generation; how to compile."""
    defaults = transformers.GenerationConfig._get_default_generation_params()
    del defaults["max_length"]  # of prompt and new tokens together: that is another limit
    path = write(refused={"guidance_scale": 1.0}, **defaults, is_assistant=False, disable_compile=True)
    del defaults["output_scores"]
    assert read_defaults(path) == {name: defaults[name] for name in NAMES if defaults.get(name) is not None}
    assert warnings(caplog) == []


def test_one_warning_names_all_that_does_not_apply(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write(
        refused={"typical_p": 0.9, "unheard_of": "x", "diversity_penalty": 0.0, "num_beam_groups": 2},
        top_k=30, do_sample=True, max_length=50, guidance_scale=1.5,
    )  # fmt: skip
    assert read_defaults(path) == {"top_k": 30, "do_sample": True}
    (message,) = warnings(caplog)
    start, names = message.rsplit(": ", 1)
    assert start == f"{path}: options that minopt does not have are ignored"
    assert sorted(names.removesuffix(".").split(", ")) == [
        "guidance_scale", "max_length", "num_beam_groups", "typical_p", "unheard_of",
    ]  # fmt: skip


def test_without_a_file_there_are_no_defaults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_defaults(tmp_path / "generation_config.json") == {}
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    ("defaults", "call", "comes_alive"),
    [
        ({"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "seed": 5}, {"do_sample": True}, True),
        ({"length_penalty": 2.0, "early_stopping": True}, {"num_beams": 3}, True),
        ({"no_repeat_ngram_include_prompt": False}, {"no_repeat_ngram_size": 2}, True),
        ({"temperature": 0.7, "length_penalty": 2.0}, {"max_new_tokens": 5}, False),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, {"do_sample": False}, False),
        ({"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"}, {"num_beams": 1}, False),
        ({"no_repeat_ngram_size": 2, "no_repeat_ngram_include_prompt": False}, {"no_repeat_ngram_size": 0}, False),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "alive" if value else "idle",
)
def test_idle_options_of_a_file_are_no_error_and_act_when_the_call_lets_them(
    write: Write, defaults: dict[str, Any], call: dict[str, Any], comes_alive: bool
) -> None:
    read = read_defaults(write(refused=defaults))
    assert read == defaults
    config = with_defaults(read, call)
    switched_off = [name for name in defaults if not comes_alive and name not in call]
    expected = {name: value for name, value in defaults.items() if name not in switched_off} | call
    assert config == GenerationConfig(**expected)
    assert bool(switched_off) != comes_alive


def test_what_a_call_asks_for_goes_before_the_file(write: Write) -> None:
    read = read_defaults(write(do_sample=True, temperature=0.7, top_k=40, max_new_tokens=9, eos_token_id=7))
    assert with_defaults(read, {"top_k": 0, "max_new_tokens": 3}) == GenerationConfig(
        do_sample=True, temperature=0.7, top_k=0, max_new_tokens=3, eos_token_id=7
    )
    assert with_defaults(read, {"eos_token_id": None, "temperature": 1.0}).eos_token_id is None
    assert read == {"do_sample": True, "temperature": 0.7, "top_k": 40, "max_new_tokens": 9, "eos_token_id": 7}


def test_what_a_call_asks_for_in_vain_is_an_error_whatever_the_file_holds() -> None:
    for defaults in ({}, {"temperature": 0.7, "num_beams": 3}):
        with pytest.raises(
            ValueError, match=r"^generation: temperature acts on sampling only, and do_sample is off\.$"
        ):
            with_defaults(defaults, {"temperature": 0.5})
    with pytest.raises(ValueError, match=r"^generation: top_p acts on sampling only, and do_sample is off\.$"):
        with_defaults({"do_sample": True, "temperature": 0.7}, {"do_sample": False, "top_p": 0.5})
    with pytest.raises(ValueError, match="unknown option max_length"):
        with_defaults({}, {"max_length": 5})
    assert with_defaults({"do_sample": True}, {"temperature": 0.5}).temperature == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"top_k": -1, "do_sample": True}, "top_k must be an integer of at least 0, got -1"),
        ({"num_beams": 0}, "num_beams must be an integer of at least 1, got 0"),
        ({"do_sample": "yes", "max_new_tokens": 1.5}, "at least 1, got 1.5; do_sample must be true or false"),
        ({"sequence_bias": {"(1, 2)": -2.0}}, "sequence_bias must be pairs of ids"),
    ],
    ids=repr,
)
def test_nonsense_in_a_file_names_the_file(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"generation_config\.json") as error:
        read_defaults(path)
    assert str(error.value).startswith(f"{path}: generation: ")
    assert message in str(error.value)
    assert str(error.value).endswith(". Correct the file, or remove it.")
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match=rf"^{path}: expected a JSON object, got list"):
        read_defaults(path)


def test_a_least_length_that_only_calls_can_meet_is_no_nonsense(write: Write) -> None:
    """transformers writes it, and whoever asks for enough tokens may use it."""
    read = read_defaults(write(min_new_tokens=30))
    assert with_defaults(read, {"max_new_tokens": 40}) == GenerationConfig(max_new_tokens=40, min_new_tokens=30)


def test_numbers_may_be_numpys() -> None:
    config = GenerationConfig(max_new_tokens=np.int64(5), do_sample=True, temperature=np.float32(0.5))
    assert config == GenerationConfig(max_new_tokens=5, do_sample=True, temperature=0.5)
    assert (type(config.max_new_tokens), type(config.temperature)) == (int, float)


def test_a_files_prompt_lookup_gives_way_to_beams() -> None:
    file = {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 3}
    for options in ({}, {"do_sample": True}):
        config = with_defaults(file, options)
        assert (config.prompt_lookup_num_tokens, config.max_matching_ngram_size) == (5, 3)
    beams = {"num_beams": 2}
    assert with_defaults(file, beams).prompt_lookup_num_tokens is None
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens is 4, and beams have no drafts"):
        with_defaults(beams, {"prompt_lookup_num_tokens": 4})
    with pytest.raises(ValueError, match="max_matching_ngram_size acts on prompt lookup only"):
        with_defaults(file, beams | {"max_matching_ngram_size": 4})


def test_a_files_number_of_continuations_gives_way_to_greedy_decoding() -> None:
    file = {"num_beams": 4, "num_return_sequences": 3}
    assert with_defaults(file, {}).num_return_sequences == 3
    assert with_defaults(file, {"num_beams": 1}) == GenerationConfig()


def test_ids_beyond_the_token_table_are_left_out_of_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"pad_token_id": -1, "eos_token_id": [2, 99], "max_new_tokens": 3}))
    assert read_defaults(path, 96) == {"eos_token_id": [2], "max_new_tokens": 3}
    assert len(caplog.messages) == 2
    path.write_text(json.dumps({"eos_token_id": 99}))
    assert read_defaults(path, 96) == {}
    assert read_defaults(path) == {"eos_token_id": 99}
