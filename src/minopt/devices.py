"""Which device and which dtype a user asks for."""

from __future__ import annotations

import os

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_SHORT = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16",
          "fp64": "float64", "double": "float64"}  # fmt: skip


def resolve_device(device: torch.device | str | None, local_rank: int | None = None) -> torch.device:
    """The device asked for; ``None`` is the GPU if there is one, else the CPU.

    Args:
        device: the user's word for it.
        local_rank: this process's, where torchrun started several on this machine: each takes another GPU.

    Raises:
        ValueError: if this machine or this torch does not have it.
    """
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if str(wanted).partition(":")[0] not in ("cpu", "cuda"):
            raise RuntimeError("minopt runs on cpu and cuda")
        chosen = torch.device(wanted)
        if chosen.type == "cuda" and local_rank is not None:
            if chosen.index is not None:
                raise ValueError(f"device: expected cuda, as each process takes its own GPU, got '{chosen}'.")
            gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            if 0 < gpus < processes:
                raise ValueError(
                    f"device: expected a GPU for each process of this machine, got {processes} processes and {gpus} "
                    "GPU(s). Start fewer processes."
                )
            chosen = torch.device("cuda", local_rank)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise ValueError(f'device: {str(device)!r} is not available here ({reason}). Try "cpu".') from None
    return chosen


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself. GPUs before Ampere (compute capability 8.0), such as a T4, emulate
    it: slowly, and without the fast kernels of attention. ``torch.cuda.is_bf16_supported`` says that they have it.
    """
    is_here = device.type == "cuda" and torch.cuda.is_available()  # a GPU that is only planned for is a new one
    return not is_here or torch.cuda.get_device_capability(device) >= (8, 0)


def auto_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of ``"auto"``: float32 on a CPU; on a GPU the one that a model is stored in, or float16 in place of a
    bfloat16 that it would emulate.
    """
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if stored == torch.bfloat16 and not has_bfloat16(device) else stored


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """The dtype asked for; ``None`` for ``"auto"``. Raises ``ValueError`` if an OPT does not compute in it."""
    if dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    resolved = DTYPES.get(_SHORT.get(name, name)) if isinstance(dtype, str) else dtype
    if resolved not in DTYPES.values():
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}.")
    return resolved
