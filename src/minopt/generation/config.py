"""How to generate: one frozen, checked record. Names and defaults are those of transformers' GenerationConfig."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from minopt.config import is_int, is_number


@dataclass(frozen=True)
class GenerationConfig:
    """Options of ``minopt.generate``.

    Attributes:
        max_new_tokens: the most tokens to add to each row.
        min_new_tokens: no row ends before it has this many.
        do_sample: draw the next token; otherwise take the most probable one (greedy).
        temperature: logits are divided by it; above 0. Like ``top_k`` and ``top_p``, it acts on sampling only.
        top_k: draw from that many most probable tokens (and ties); 0 is no limit.
        top_p: draw from the fewest most probable tokens that together have this probability; 1.0 is no limit.
        seed: of the draws; ``None`` goes on with torch's own generator. Give this or a ``torch.Generator``.
        eos_token_id: ids that end a row; ``None`` means the model's; ``()`` ends none.
        pad_token_id: what follows in a row that has ended; ``None`` means the model's.
        suppress_tokens: ids that are never generated.
        output_scores: return the scores of every step.
        output_logprobs: return the log-probability of every new token.

    Raises:
        ValueError: naming each option that makes no sense.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    output_scores: bool = False
    output_logprobs: bool = False

    def __post_init__(self) -> None:
        for name in ("eos_token_id", "suppress_tokens"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        if problems := self._problems():
            raise ValueError("generation: " + "; ".join(problems) + ".")

    def _problems(self) -> list[str]:
        problems = []

        def check(name: str, fits: bool, expected: str) -> None:
            if not fits:
                problems.append(f"{name} must be {expected}, got {getattr(self, name)!r}")

        check("max_new_tokens", _is_count(self.max_new_tokens) and self.max_new_tokens > 0, "an integer of at least 1")
        check("min_new_tokens", _is_count(self.min_new_tokens), "an integer of at least 0")
        check("temperature", is_number(self.temperature) and self.temperature > 0, "above 0 (for the most probable "
              "token at each step leave do_sample off)")  # fmt: skip
        check("top_k", _is_count(self.top_k), "an integer of at least 0 (0 = no limit)")
        check("top_p", is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1")
        check(
            "seed",
            self.seed is None or (_is_count(self.seed) and self.seed < 2**64),
            "an integer from 0 to 2**64 - 1, or None",
        )
        check("eos_token_id", self.eos_token_id is None or _are_ids(self.eos_token_id), "an id, several, or None")
        check("pad_token_id", self.pad_token_id is None or _is_count(self.pad_token_id), "an id, or None")
        check("suppress_tokens", isinstance(self.suppress_tokens, tuple) and _are_ids(self.suppress_tokens), "ids")
        for name in ("do_sample", "output_scores", "output_logprobs"):
            check(name, isinstance(getattr(self, name), bool), "True or False")
        if not self.do_sample:
            idle = [n for n, default in _SAMPLING_DEFAULTS.items() if getattr(self, n) != default]
            problems += [f"{name} acts on sampling only, and do_sample is off" for name in idle]
        if not problems and self.min_new_tokens > self.max_new_tokens:
            problems.append(
                f"min_new_tokens must not exceed max_new_tokens, got {self.min_new_tokens} and {self.max_new_tokens}"
            )
        return problems

    def replace(self, **options: Any) -> GenerationConfig:
        """This configuration with some options changed.

        Raises:
            ValueError: if an option is unknown or makes no sense.
        """
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"generation: unknown option {', '.join(unknown)}; there are {', '.join(known)}.")
        return GenerationConfig(**(known | options))


_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "seed": None}


def _is_count(value: object) -> bool:
    return is_int(value) and value >= 0  # type: ignore[operator]


def _are_ids(value: object) -> bool:
    return _is_count(value) or (isinstance(value, tuple) and all(_is_count(i) for i in value))
