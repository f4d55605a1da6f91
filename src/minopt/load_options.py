"""The options with which a user loads a model: its device, its dtype, and its form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # it takes a quarter of a second to import
    from torch.distributed.device_mesh import DeviceMesh

# What each option may be, whatever the others are, and how that reads in an error.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "quantize": (lambda value: value in (None, "int8", "int4"), 'None, "int8" or "int4"'),
    "optimize": (lambda value: isinstance(value, bool) or value == "compile", 'True, False or "compile"'),
    "offload": (lambda value: value in (None, "disk", "cpu"), '"disk" or "cpu"'),
    "draft": (lambda value: value in (None, "int8"), 'None or "int8" (another model is an option of generate)'),
}


@dataclass(frozen=True)
class LoadOptions:
    """The options of ``minopt.load`` that say how a model runs. Which go together, each form says (its ``check``)."""

    device: torch.device
    dtype: torch.dtype | None = None  # None is "auto": float32 on a CPU, the file's own elsewhere
    quantize: str | None = None
    optimize: bool | str = True
    mesh: DeviceMesh | None = None
    offload: str | None = None
    any_device: bool = False  # the user named none
    draft: str | None = None
    held: Mapping[str, Tensor] = field(default_factory=dict)  # weights that need not be read: another form has them

    def __post_init__(self) -> None:
        for name, (fits, expected) in _VALUES.items():
            if not fits(getattr(self, name)):
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}.")
        if self.quantize != "int4":
            return
        others = (
            (self.device.type != "cpu", f"device={self.device}", 'give device="cpu"'),
            (self.dtype == torch.float64, "dtype=float64", "give another dtype"),
            (self.optimize is not True, f"optimize={self.optimize}", "leave optimize out"),
            (self.mesh is not None, "a mesh", "leave the mesh out"),
            (self.offload is not None, f"offload={self.offload}", "leave offload out"),
            (self.draft is not None, f"draft={self.draft}", "leave draft out"),
        )
        if wrong := [(got, advice) for applies, got, advice in others if applies]:
            got, advice = (" and ".join(words) for words in zip(*wrong, strict=True))
            raise ValueError(
                "quantize: int4 weights are for one process on a CPU, in float32, bfloat16 or float16, not compiled, "
                f"without an int8 draft, got {got}. {advice[0].upper()}{advice[1:]}."
            )
