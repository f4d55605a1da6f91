"""What is decided by the kind of GPU, on GPUs that are not there."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from minopt.checkpoint.checkpoint import open_checkpoint
from minopt.devices import auto_dtype, has_bfloat16
from minopt.distributed import processes
from minopt.inference.offload import StreamedOPT
from minopt.training.checks import check_precision
from minopt.training.config import TrainingConfig
from minopt.training.optim import float32_products

Write = Callable[..., Path]


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_without_bfloat16_computes_in_float16(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, write_checkpoint: Write
) -> None:
    """A T4 emulates bfloat16, and torch says that it has it. On a CPU models are in float32 anyway."""
    gpu, cpu = torch.device("cuda:1"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {gpu: capability}.__getitem__)
    assert has_bfloat16(cpu)
    assert has_bfloat16(gpu) == (dtype == torch.bfloat16)
    assert auto_dtype(torch.bfloat16, gpu) == dtype
    assert auto_dtype(torch.float32, gpu) == torch.float32
    assert auto_dtype(torch.bfloat16, cpu) == torch.float32
    assert open_checkpoint(write_checkpoint(dtype=torch.bfloat16)).dtype_on(gpu) == dtype


def test_a_run_on_one_gpu_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch makes no device the current one by "cuda" alone."""
    chosen: list[int] = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("minopt.distributed.resolve_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    with processes("cuda") as world:
        assert world.device == torch.device("cuda:1")
    assert chosen == [1]


def test_pinned_memory_is_as_large_as_the_layers_and_is_given_back(
    monkeypatch: pytest.MonkeyPatch, write_checkpoint: Write
) -> None:
    """torch's own allocator would round up to powers of two."""
    driver = mock.Mock(**{"cudaHostRegister.return_value": 0})
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    checkpoint = open_checkpoint(write_checkpoint(num_hidden_layers=5))
    model: Any = StreamedOPT(checkpoint, torch.device("cpu"), torch.float32, in_memory=True)
    layers = [tensor for name, tensor in checkpoint.tensors.items() if name.startswith("layers.")]
    (((address, count, _), _),) = driver.cudaHostRegister.call_args_list
    assert count == 4 * sum(torch.Size(tensor.shape).numel() for tensor in layers)
    assert not driver.cudaHostUnregister.called
    del model
    gc.collect()
    driver.cudaHostUnregister.assert_called_once_with(address)


def test_memory_that_the_driver_does_not_pin(monkeypatch: pytest.MonkeyPatch, write_checkpoint: Write) -> None:
    """The next kernel, whosoever, would fail with the same error once more."""
    driver, zeros, cleared = mock.Mock(**{"cudaHostRegister.return_value": 2}), torch.zeros, list[Any]()

    def launch(*size: Any, **options: Any) -> Any:
        if driver.cudaHostRegister.called:
            cleared.append(options["device"])
            raise RuntimeError("CUDA error: out of memory")
        return zeros(*size, **options)

    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch, "zeros", launch)
    checkpoint = open_checkpoint(write_checkpoint(num_hidden_layers=5))
    with pytest.raises(ValueError, match=r"^offload: the driver cannot pin .* of memory \(2\)\. Use offload disk\.$"):
        StreamedOPT(checkpoint, torch.device("cpu"), torch.float32, in_memory=True)
    assert cleared == [torch.device("cpu")]


def test_bfloat16_is_not_trained_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, config = torch.device("cuda:0"), TrainingConfig(output_dir="x", bf16=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_precision(config, gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"^--bf16: expected .* 8\.0 or more, got one of 7\.5, .* Use --fp16\.$"):
        check_precision(config, gpu)


def test_a_run_computes_in_tf32_on_a_gpu_unless_it_is_told_not_to() -> None:
    before = torch.get_float32_matmul_precision()
    for device, tf32, expected in (("cuda", True, "high"), ("cuda", False, before), ("cpu", True, before)):
        with float32_products(TrainingConfig(output_dir="x", tf32=tf32), torch.device(device)):
            assert torch.get_float32_matmul_precision() == expected
        assert torch.get_float32_matmul_precision() == before
