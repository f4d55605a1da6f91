"""GenerationConfig: what is refused, and with which words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import transformers

from minopt import GenerationConfig

OURS_ALONE = {"seed", "output_logprobs"}
SAMPLING = ({"temperature": 0.5}, {"top_k": 10}, {"top_p": 0.9})

NONSENSE: list[tuple[dict[str, Any], str]] = [
    *(
        ({"max_new_tokens": value}, f"max_new_tokens must be an integer of at least 1, got {value!r}")
        for value in (0, -3, 1.0, True, None)
    ),
    *(
        ({"min_new_tokens": value}, f"min_new_tokens must be an integer of at least 0, got {value!r}")
        for value in (-1, 2.0)
    ),
    ({"min_new_tokens": 21}, "min_new_tokens must not exceed max_new_tokens, got 21 and 20"),
    *(
        ({"do_sample": True, "temperature": value}, "temperature must be above 0 (for the most probable token at each "
         f"step leave do_sample off), got {value!r}")
        for value in (0, 0.0, -1.0, math.nan, math.inf, "hot")
    ),
    *(
        ({"do_sample": True, "top_k": value}, f"top_k must be an integer of at least 0 (0 = no limit), got {value!r}")
        for value in (-1, 2.5, None)
    ),
    *(
        ({"do_sample": True, "top_p": value}, f"top_p must be above 0 and at most 1, got {value!r}")
        for value in (0.0, 2, 1.0001, -0.1, math.nan, None)
    ),
    *(
        ({"seed": value}, f"seed must be an integer from 0 to 2**64 - 1, or None, got {value!r}")
        for value in (-1, 0.5, 2**64)
    ),
    *(
        ({"eos_token_id": value}, f"eos_token_id must be an id, several, or None, got {value!r}")
        for value in (-1, (2, -1), "</s>", 2.0)
    ),
    ({"pad_token_id": -1}, "pad_token_id must be an id, or None, got -1"),
    *(
        ({"suppress_tokens": value}, f"suppress_tokens must be ids, got {value!r}")
        for value in (5, (1, -1), "abc", None)
    ),
    *(
        ({name: 1}, f"{name} must be True or False, got 1")
        for name in ("do_sample", "output_scores", "output_logprobs")
    ),
    *(
        ({"do_sample": False, **option}, f"{next(iter(option))} acts on sampling only, and do_sample is off")
        for option in SAMPLING
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), NONSENSE, ids=[repr(options) for options, _ in NONSENSE])
def test_each_option_without_sense_is_refused_with_its_value(options: dict[str, Any], message: str) -> None:
    for build in (GenerationConfig, GenerationConfig().replace):
        with pytest.raises(ValueError, match=r"^generation: ") as error:
            build(**options)
        assert message in str(error.value)


def test_all_nonsense_is_named_at_once() -> None:
    with pytest.raises(ValueError, match="generation") as error:
        GenerationConfig(max_new_tokens=0, temperature=0.5, seed=-1)
    assert str(error.value) == (
        "generation: max_new_tokens must be an integer of at least 1, got 0; seed must be an integer from 0 to "
        "2**64 - 1, or None, got -1; temperature acts on sampling only, and do_sample is off; "
        "seed acts on sampling only, and do_sample is off."
    )


@pytest.mark.parametrize("option", SAMPLING, ids=repr)
def test_sampling_options_go_with_sampling(option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    assert getattr(GenerationConfig(do_sample=True, **option), name) == value


def test_the_limits_themselves_are_allowed() -> None:
    GenerationConfig(max_new_tokens=1, min_new_tokens=1, do_sample=True, temperature=1e-3, top_k=0, top_p=1, seed=0)


@pytest.mark.parametrize("name", ["eos_token_id", "suppress_tokens"])
def test_ids_may_come_in_a_list(name: str) -> None:
    assert getattr(GenerationConfig(**{name: [3, 4]}), name) == (3, 4)


def test_replace_changes_what_it_is_given_and_nothing_else() -> None:
    first = GenerationConfig(max_new_tokens=7, do_sample=True, top_k=3, eos_token_id=(4,))
    second = first.replace(top_k=5)
    assert second == GenerationConfig(max_new_tokens=7, do_sample=True, top_k=5, eos_token_id=(4,))
    assert first.top_k == 3
    assert first.replace() == first


def test_unknown_options_are_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown option max_length, num_beam; there are max_new_tokens, ") as error:
        GenerationConfig().replace(num_beam=3, max_length=10, top_k=5)
    assert all(field.name in str(error.value) for field in dataclasses.fields(GenerationConfig))


def test_it_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationConfig().top_k = 3  # type: ignore[misc]


def test_the_names_are_those_of_transformers() -> None:
    theirs = transformers.GenerationConfig()
    missing = {f.name for f in dataclasses.fields(GenerationConfig) if not hasattr(theirs, f.name)}
    assert missing == OURS_ALONE
