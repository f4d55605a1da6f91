"""How to generate: one frozen, checked record. Names and defaults are those of transformers' GenerationConfig."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from minopt.config import is_int, is_number, read_json, within_table
from minopt.settings import expected, option

logger = logging.getLogger(__name__)

# Options without an effect unless another is set: which that is, and how it reads in an error.
_sampling = partial(option, acts_with=("do_sample", "on sampling only, and do_sample is off"))
_beams = partial(option, acts_with=("num_beams", "on beam search only, and num_beams is 1"))
_ngrams = partial(option, acts_with=("no_repeat_ngram_size", "on n-grams only, and no_repeat_ngram_size is 0"))
_lookup = partial(
    option, acts_with=("prompt_lookup_num_tokens", "on prompt lookup only, and prompt_lookup_num_tokens is None")
)


def _is_id(value: Any) -> bool:
    return is_int(value) and value >= 0


def _are_ids(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_id, value))


def _are_sequences(value: Any) -> bool:
    return isinstance(value, tuple) and all(_are_ids(ids) and ids for ids in value)


def _are_biases(value: Any) -> bool:
    if not isinstance(value, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        return False
    sequences = tuple(ids for ids, _ in value)
    fit = all(bias == -math.inf or (is_number(bias) and -1e4 <= bias <= 1e4) for _, bias in value)
    return _are_sequences(sequences) and fit and len(set(sequences)) == len(sequences)


# What an option may be where its type and limits do not say it, and how that reads in an error.
_IDS = (_are_ids, "ids")
_EOS = (lambda value: value is None or _is_id(value) or _are_ids(value), "an id, or several")
_SEQUENCES = (_are_sequences, "sequences of at least one id each")
_BIASES = (_are_biases, "pairs of ids and a number from -10000 to 10000 or -inf, each sequence of ids once")
_SEED = (lambda value: value is None or (_is_id(value) and value < 2**64), "an integer from 0 to 2**64 - 1")
_STOPPING = (lambda value: isinstance(value, bool) or value == "never", "true, false or never")
_TEXTS = (
    lambda value: isinstance(value, tuple) and all(isinstance(text, str) and text for text in value),
    "texts of at least one character",
)
_TEMPERATURE = (
    lambda value: is_number(value) and 1e-6 <= value <= 1e6,
    "from 1e-6 to 1e6 (for the most probable token at each step leave do_sample off)",
)


@dataclass(frozen=True)
class GenerationConfig:
    """Options of ``minopt.generate``, which are flags of ``minopt generate``.

    Each field says what it does; docs/generation.md says more, and in which order they act.

    Raises:
        ValueError: naming each option that makes no sense.
    """

    # How long
    max_new_tokens: int = option(20, "the most tokens to add to each prompt", least=1)
    min_new_tokens: int = option(0, "the fewest tokens to add to each prompt", least=0)
    truncate_prompt: bool = option(False, "cut the beginning of a prompt that is too long; otherwise it is an error")
    stop_strings: tuple[str, ...] = option(
        (), "end before this text or special token; for several, repeat the flag", fits=_TEXTS
    )
    eos_token_id: int | tuple[int, ...] | None = option(
        None, "ids that end a text, such as 2,50118 (the model's)", fits=_EOS
    )
    max_time: float | None = option(
        None, "seconds after which no further step begins, for those that began together", above=0
    )

    # How the next token is chosen
    do_sample: bool = option(False, "draw each token; otherwise the most probable one is taken")
    temperature: float = _sampling(
        1.0, "sampling: divide scores by X; below 1 favours probable tokens", fits=_TEMPERATURE
    )
    top_k: int = _sampling(50, "sampling: draw from the N most probable tokens; 0: from all", least=0)
    top_p: float = _sampling(
        1.0, "sampling: draw from the fewest tokens that together have probability X; 1: from all", above=0, most=1
    )
    min_p: float | None = _sampling(
        None, "sampling: draw from tokens at least X times as probable as the best one", least=0, most=1
    )
    seed: int | None = _sampling(None, "sampling: the same seed draws the same text (a new one each time)", fits=_SEED)
    num_beams: int = option(1, "beam search with N beams; 1: no beam search", least=1)
    num_return_sequences: int = option(
        1, "continuations of each prompt; above 1 with --do_sample or --num_beams", least=1
    )
    length_penalty: float = _beams(
        1.0, "beams: divide scores by length to the power of X; above 0 favours long texts", least=-5, most=5
    )
    early_stopping: bool | Literal["never"] = _beams(
        False,
        "beams: true: end with N finished texts; false: once a better one is unlikely; never: once it is impossible",
        fits=_STOPPING,
    )

    # Prompt lookup
    prompt_lookup_num_tokens: int | None = option(
        None,
        "where the text repeats itself, read up to N tokens in one step; the text stays the same (off)",
        least=1,
    )
    max_matching_ngram_size: int = _lookup(
        2, "prompt lookup: search the earlier text for the last N tokens, or fewer", least=1
    )

    # Rules on tokens; padding counts in none of them. Limits keep every sum of scores within float32
    repetition_penalty: float = option(
        1.0, "above 1 lowers the scores of tokens that are in the text already", least=1e-4, most=10000
    )
    presence_penalty: float = option(
        0.0, "subtract X once from the score of each token that was generated", least=-10000, most=10000
    )
    frequency_penalty: float = option(
        0.0, "subtract X from a token's score for each time it was generated", least=-10000, most=10000
    )
    no_repeat_ngram_size: int = option(0, "no N tokens in a row occur twice; 0: no limit", least=0)
    no_repeat_ngram_include_prompt: bool = _ngrams(True, "with --no_repeat_ngram_size: the prompt counts as well")
    suppress_tokens: tuple[int, ...] = option((), "ids that are never generated, such as 5,6", fits=_IDS)
    bad_words_ids: tuple[tuple[int, ...], ...] = option(
        (), "sequences of ids that are never generated: [[5, 6], [7]]", fits=_SEQUENCES
    )
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = option(
        (), "add a number to the score of a sequence's last id: [[[5, 6], -2.5]]", fits=_BIASES
    )
    forced_bos_token_id: int | None = option(None, "the first new token, where the prompt is a single token", least=0)
    pad_token_id: int | None = option(None, "the id that fills up texts that have ended (the model's)", least=0)

    # What is returned beside the tokens
    output_scores: bool = option(False, "return the scores of every step, after all rules")
    output_logprobs: bool = option(False, "give the ids and log-probabilities of the new tokens too")
    top_logprobs: int = option(0, "give the N most probable ids for each new token too; 0: none", least=0)

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _as_kept(f, getattr(self, f.name)))
        idle = [f"{name} acts {reason}" for name, reason in _idle(vars(self)).items()]
        if problems := [*_out_of_range(vars(self)), *idle] or self._contradictions():
            raise ValueError("generation: " + "; ".join(problems) + ".")

    def _contradictions(self) -> list[str]:
        new, least, beams, R = self.max_new_tokens, self.min_new_tokens, self.num_beams, self.num_return_sequences
        lookup = self.prompt_lookup_num_tokens
        rules = (
            (least > new, f"min_new_tokens must not exceed max_new_tokens, got {least} and {new}"),
            (1 < beams < R, f"num_return_sequences must not exceed num_beams, got {R} and {beams}"),
            (
                R > 1 and beams == 1 and not self.do_sample,
                f"num_return_sequences is {R}, and greedy decoding has one answer: set do_sample or num_beams",
            ),
            (
                lookup is not None and beams > 1,
                f"prompt_lookup_num_tokens is {lookup}, and beams have no drafts: leave out num_beams or "
                "prompt_lookup_num_tokens",
            ),
            (
                self.forced_bos_token_id in self.suppress_tokens,
                f"suppress_tokens holds the forced_bos_token_id {self.forced_bos_token_id}",
            ),
        )
        return [problem for is_broken, problem in rules if is_broken]

    def replace(self, **options: Any) -> GenerationConfig:
        """This configuration with some options changed.

        Raises:
            ValueError: if an option is unknown or makes no sense.
        """
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        unknown = sorted(set(options) - set(known))
        if unknown:
            hints = "".join(f" {name}: {_HINTS[name]}." for name in unknown if name in _HINTS)
            raise ValueError(f"generation: unknown option {', '.join(unknown)}; there are {', '.join(known)}.{hints}")
        return GenerationConfig(**(known | options))


_DEFAULTS = {field.name: field.default for field in fields(GenerationConfig)}

# What to use instead of names that transformers' generate has.
_HINTS = {
    "max_length": "set max_new_tokens", "min_length": "set min_new_tokens", "generation_config": "it is config here",
    "streamer": "use LanguageModel.stream", "prefix_allowed_tokens_fn": "give a logits_processor",
}  # fmt: skip


def _idle(options: Mapping[str, Any]) -> dict[str, str]:
    """Names of options that are set and have no effect, each with the reason."""

    def is_set(name: str) -> bool:
        return bool(options.get(name, _DEFAULTS[name]) != _DEFAULTS[name])

    marks = {f.name: f.metadata["acts_with"] for f in fields(GenerationConfig) if "acts_with" in f.metadata}
    return {name: reason for name, (switch, reason) in marks.items() if is_set(name) and not is_set(switch)}


def check_values(options: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for values that make no sense whatever the other options are."""
    if problems := _out_of_range(options):
        raise ValueError("generation: " + "; ".join(problems) + ".")


def _out_of_range(options: Mapping[str, Any]) -> list[str]:
    given = [(f, _as_kept(f, options[f.name])) for f in fields(GenerationConfig) if f.name in options]
    return [f"{f.name} must be {wanted}, got {value!r}" for f, value in given if (wanted := expected(f, value))]


def _as_kept(f: Field[Any], value: Any) -> Any:
    """A value as it is kept. JSON has lists for tuples, transformers ``None`` for empty ones, numpy its own numbers."""
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if "tuple" not in f.type:
        return value
    if f.name == "stop_strings" and isinstance(value, str):
        return (value,)
    return f.default if value is None else _as_tuples(value)


def _as_tuples(value: Any) -> Any:
    """Lists in lists as tuples, and a mapping as its pairs."""
    if isinstance(value, Mapping):
        return tuple((_as_tuples(key), item) for key, item in value.items())
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return tuple(map(_as_tuples, value)) if is_list else value


def with_defaults(
    defaults: Mapping[str, Any], options: Mapping[str, Any], config: GenerationConfig | None = None
) -> GenerationConfig:
    """Options of a call over its ``config`` or, without one, over those of a model's ``generation_config.json``.

    An option of the call that has no effect is an error. One of the file is left out: it may hold a temperature for
    calls that sample.

    Raises:
        ValueError: if an option is unknown or makes no sense.
    """
    if not isinstance(config, GenerationConfig | None):
        raise ValueError(f"config: expected a minopt.GenerationConfig, got {type(config).__name__}.")
    if config is not None:
        return config.replace(**options)
    merged = {**defaults, **options}
    idle, has_beams = [*_idle(merged)], merged.get("num_beams", 1) != 1
    if not merged.get("do_sample") and not has_beams:
        idle.append("num_return_sequences")
    if has_beams and "prompt_lookup_num_tokens" not in options:
        idle += ["prompt_lookup_num_tokens", "max_matching_ngram_size"]
    kept = {name: value for name, value in defaults.items() if name not in idle}
    return GenerationConfig().replace(**{**kept, **options})


def read_defaults(path: Path, rows: int = 2**31) -> dict[str, Any]:
    """The options in a ``generation_config.json`` as transformers writes it; ``{}`` if there is no such file.

    One warning names all other settings that would change tokens.

    Args:
        path: the file.
        rows: the model's token table has so many; an id beyond means nothing.

    Raises:
        ValueError: if the file is no JSON object, or an option in it that has an effect makes no sense.
    """
    content = read_json(path) if path.is_file() else {}
    given = {name: value for name, value in content.items() if value is not None and name not in _IRRELEVANT}
    options = {name: value for name, value in given.items() if name in _DEFAULTS}
    for name in ("pad_token_id", "eos_token_id"):
        if name in options and (kept := within_table(name, options.pop(name), rows)) is not None:
            options[name] = kept
    try:
        check_values({name: value for name, value in options.items() if name not in _idle(options)})
    except ValueError as error:
        raise ValueError(f"{path}: {error} Correct the file, or remove it.") from None
    if foreign := [name for name in given if name not in _DEFAULTS and given[name] not in (False, _OFF.get(name))]:
        logger.warning("%s: options that minopt does not have are ignored: %s.", path, ", ".join(foreign))
    return options


# What transformers writes into the file that changes no token here.
_IRRELEVANT = {
    "_from_model_config", "transformers_version", "bos_token_id", "use_cache", "cache_implementation", "cache_config",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "disable_compile", "compile_config", "max_cache_len", "decoder_start_token_id",
}  # fmt: skip

# Values with which its other options do nothing, where that is not False or 0.
_OFF = {"encoder_repetition_penalty": 1.0, "typical_p": 1.0, "num_beam_groups": 1, "guidance_scale": 1.0}
