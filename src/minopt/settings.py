"""Records of options. Each field has its help text and its limits, from which flags and errors are made. No torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import Field, field, fields
from typing import Any

from minopt.config import is_int, is_number


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[str] = (),
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    fits: tuple[Callable[[Any], bool], str] | None = None,
    **marks: Any,
) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its value if none is given.
        help: one line for the command line and the reader. Brackets at its end say what the default is or means;
            without them ``--help`` adds the default in brackets, unless it is ``None``, ``False`` or empty.
        choices: the texts allowed. One that ends with "..." stands for all that begin with what is before it.
        least, above, below, most: the numbers allowed: ``least`` and ``most`` are, ``above`` and ``below`` are not.
        fits: where type and limits do not say which values are allowed: what does, and how that reads in an error.
        **marks: what else a reader of the field's ``metadata`` needs.
    """
    limits = {"choices": choices, "least": least, "above": above, "below": below, "most": most, "fits": fits}
    return field(default=default, metadata={"help": help, **limits, **marks})


def is_choice(text: str, choices: Collection[str]) -> bool:
    """Whether a text is one of the choices of an option."""
    return any(text == c or (c.endswith("...") and text.startswith(c[:-3])) for c in choices)


def expected(f: Field[Any], value: Any) -> str | None:
    """Says what a field expects if ``value`` does not fit; ``None`` if it fits, or the field has no such limits."""
    if f.metadata["fits"] is not None:
        fits, wanted = f.metadata["fits"]
        return None if fits(value) else wanted
    kind = f.type.removesuffix(" | None")
    if kind not in ("bool", "str", "int", "float") or (value is None and kind != f.type):
        return None
    if kind == "bool":
        return None if isinstance(value, bool) else "true or false"
    if kind == "str":
        choices = f.metadata["choices"]
        is_one = isinstance(value, str) and (not choices or is_choice(value, choices))
        return None if is_one else " or ".join(choices) or "a text"
    least, above, below, most = (f.metadata[name] for name in ("least", "above", "below", "most"))
    inside = is_int(value) if kind == "int" else is_number(value)
    inside = inside and (least is None or value >= least) and (above is None or value > above)
    if inside and (below is None or value < below) and (most is None or value <= most):
        return None
    bounds = [f"of at least {least}"] * (least is not None) + [f"above {above}"] * (above is not None)
    bounds += [f"below {below}"] * (below is not None) + [f"at most {most}"] * (most is not None)
    return " ".join(["an integer" if kind == "int" else "a number", " and ".join(bounds)]).strip()


def problems(record: Any) -> list[str]:
    """Says what is wrong with the fields of a record, as ``--name: expected ..., got ...``."""
    checked = ((f.name, getattr(record, f.name), expected(f, getattr(record, f.name))) for f in fields(record))
    return [f"--{name}: expected {wanted}, got {value!r}" for name, value, wanted in checked if wanted]
