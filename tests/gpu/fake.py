"""Runs minopt on a GPU that is not there: FakeTensors on "cuda", which have shapes, dtypes and devices but no numbers.

torch's CPU build lacks what FakeTensors on "cuda" stand on (fake_cuda.cpp), and what torch.cuda calls in Python
(``gpu``). Both need a process of their own: ``python -m tests.gpu.cases``, which test_fake.py starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock


def load_library(folder: Path) -> None:
    """Builds and loads the library; ``torch`` must not have been imported."""
    assert "torch" not in sys.modules
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch, source, built = Path(spec.origin).parent, Path(__file__).with_name("fake_cuda.cpp"), folder / "fake_cuda.so"
    include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", *include, str(source), *libraries, "-o"]
    subprocess.run([*command, str(built)], check=True)
    ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)


# What follows needs torch, which is imported once the library is loaded.


class Run:
    """What a piece of code did on the GPU.

    Attributes:
        kernels: operators that launch kernels, by name, in their order.
        reads: how often the host waited for a number.
        attention: which backends of attention were chosen.
        graphs: the devices on which CUDA graphs were captured.
        captured: the kernels of the newest of them.
    """

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.reads = 0
        self.attention: Counter[str] = Counter()
        self.graphs: list[str] = []
        self.captured: list[str] = []


@contextlib.contextmanager
def gpu(
    answer: int,
    on_cpu: int = 0,
    lists: Mapping[tuple[int, ...], list[int]] = MappingProxyType({}),
    capability: tuple[int, int] = (9, 0),
) -> Iterator[Run]:
    """Runs a block with a GPU that is not there.

    Any number that the host reads from it is ``answer``, and one that it computes on the CPU is ``on_cpu``; ``lists``
    are what it reads of tensors of some shapes.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    aten, run = torch.ops.aten, Run()
    nothing = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach,
               aten.detach_, aten.lift_fresh}  # fmt: skip
    copies, numbers = {aten._to_copy, aten.to, aten.copy_}, {aten._local_scalar_dense, aten.item, aten.is_nonzero}

    mode = _mode()

    def value(tensor: Any) -> Any:
        if tensor.dtype == torch.bool:
            return True
        if tensor.device.type == "cpu":
            return on_cpu
        return float(answer) if tensor.is_floating_point() else 1 if tensor.dtype == torch.int8 else answer

    def values(tensor: Any) -> Any:
        run.reads += tensor.device.type == "cuda"
        if tuple(tensor.shape) in lists:
            return lists[tuple(tensor.shape)]
        if tensor.dtype == torch.bool and tensor.ndim == 1:  # whether something goes on; whether something is wrong
            return [True, *[False] * (len(tensor) - 1)]
        return _nested(tensor.shape, value(tensor))

    def choose(query: Any, mask: Any = None) -> None:
        """Notes which attention torch would choose on a GPU."""
        half = query.dtype in (torch.float16, torch.bfloat16) and (
            capability >= (8, 0) or query.dtype != torch.bfloat16
        )
        if half and capability >= (9, 0) and torch.backends.cuda.cudnn_sdp_enabled():
            name = "cudnn"
        elif half and capability >= (8, 0) and mask is None:
            name = "flash"
        else:
            name = "efficient" if half or query.dtype == torch.float32 else "math"
        run.attention[name] += 1

    class Attention(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention and args[0].device.type == "cuda":
                choose(args[0], args[3])
            return func(*args, **(kwargs or {}))

    def as_fake(tensor: Any) -> Any:
        return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            packet, kwargs = func.overloadpacket, kwargs or {}
            args = tree_map_only(torch.Tensor, as_fake, args)
            if packet in numbers and (args[0].constant is None or args[0].device.type == "cuda"):
                run.reads += args[0].device.type == "cuda"
                return value(args[0])
            if packet in (aten.pin_memory, aten._pin_memory):
                return args[0]
            if packet is aten.nonzero:  # its shape is a number that the host reads
                run.reads += args[0].device.type == "cuda"
                return args[0].new_zeros(1, args[0].ndim, dtype=torch.long)
            result = func(*args, **kwargs)
            given, made = ([t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
                           for tree in ((args, kwargs), result))  # fmt: skip
            if packet in copies and any(t.device.type == "cuda" for t in given) and made[0].device.type == "cpu":
                run.reads += 1
            memory = {t.untyped_storage()._cdata for t in given}
            is_view = not packet.__name__.endswith("_") and all(t.untyped_storage()._cdata in memory for t in made)
            if any(t.device.type == "cuda" for t in made) and not is_view and packet not in nothing:
                run.kernels.append(packet.__name__)
            return result

    with contextlib.ExitStack() as stack:
        for patch in _patches(run, capability):
            stack.enter_context(patch)
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", values))
        stack.enter_context(mode)
        stack.enter_context(Recorder())
        stack.enter_context(Attention())
        yield run


@functools.cache
def _mode() -> Any:
    """The one mode, which all tensors share."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Mode(FakeTensorMode):
        avoid_device_init = True  # constants are not moved to a real GPU

    return Mode()


def _nested(shape: Any, value: Any) -> Any:
    return [_nested(shape[1:], value) for _ in range(shape[0])] if len(shape) else value


def _patches(run: Run, capability: tuple[int, int]) -> Iterator[Any]:
    """What torch.cuda gives in Python."""
    import torch

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.device = torch.device(device if device is not None else "cuda")

        def wait_stream(self, other: Any) -> None:
            assert other.device == self.device, (other.device, self.device)

        def wait_event(self, event: Any) -> None:
            pass

        def record_event(self) -> Any:
            return mock.MagicMock()

    @contextlib.contextmanager
    def graph(graph: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        run.graphs.append(str(stream.device))
        before = len(run.kernels)
        yield
        run.captured = run.kernels[before:]

    class Device(contextlib.nullcontext[None]):
        def __init__(self, device: Any) -> None:
            super().__init__()

    fakes: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 2, "set_device": lambda device: None,
        "current_device": lambda: 0, "get_device_capability": lambda device=None: capability,
        "is_bf16_supported": lambda *args: True, "mem_get_info": lambda device=None: (8 * 10**10, 8 * 10**10),
        "memory_reserved": lambda device=None: 0, "memory_allocated": lambda device=None: 0,
        "synchronize": lambda device=None: None, "Stream": Stream, "Event": mock.MagicMock,
        "current_stream": lambda device=None: Stream(device), "stream": lambda stream: contextlib.nullcontext(),
        "device": Device, "CUDAGraph": mock.MagicMock, "graph": graph, "graph_pool_handle": lambda: (0, 1),
        "_lazy_init": lambda: None,
    }  # fmt: skip
    for name, fake in fakes.items():
        yield mock.patch.object(torch.cuda, name, fake)
