"""What a user asks of a model when it is loaded: where it lives, in which numbers, and in which form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # it takes a quarter of a second to import
    from torch.distributed.device_mesh import DeviceMesh

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_SHORT = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16",
          "fp64": "float64", "double": "float64"}  # fmt: skip

# What each option may be, whatever the others are, and how that reads in an error.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "quantize": (lambda value: value in (None, "int8"), 'None or "int8"'),
    "optimize": (lambda value: isinstance(value, bool) or value == "compile", 'True, False or "compile"'),
    "offload": (lambda value: value in (None, "disk", "cpu"), '"disk" or "cpu"'),
}


@dataclass(frozen=True)
class LoadOptions:
    """The options of ``minopt.load`` that say how a model runs.

    Attributes:
        device: one that this machine has.
        dtype: of weights and activations; ``None`` is ``"auto"``: float32 on a CPU, the file's own elsewhere.
        quantize, optimize, mesh, offload: see ``minopt.load``.
        any_device: the user named no device.

    Raises:
        ValueError: if a value is none that the option has. Which values go together, each form says (its ``check``).
    """

    device: torch.device
    dtype: torch.dtype | None = None
    quantize: str | None = None
    optimize: bool | str = True
    mesh: DeviceMesh | None = None
    offload: str | None = None
    any_device: bool = False

    def __post_init__(self) -> None:
        for name, (fits, expected) in _VALUES.items():
            if not fits(getattr(self, name)):
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}.")


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, by default the GPU if there is one.

    Raises:
        ValueError: if this machine or this torch does not have it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise ValueError(f'device: {str(device)!r} is not available here ({reason}). Try "cpu".') from None
    return device


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """The dtype asked for, ``None`` for ``"auto"``.

    Raises:
        ValueError: if it is none that an OPT computes in.
    """
    if dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    resolved = DTYPES.get(_SHORT.get(name, name)) if isinstance(dtype, str) else dtype
    if resolved not in DTYPES.values():
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}.")
    return resolved
