"""CPU tensors that pose as torch's CUDA tensors: their memory is the fake device's, and `.device` says so.

torch itself has no CUDA here. It computes on such a tensor's memory at once, so wait for the device before.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from cupy.cuda import Stream, runtime

_devices: dict[int, torch.device] = {}  # of each address that `Torch.empty` gave out


class CudaTensor(torch.Tensor):
    """On the device that its memory is on."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # what torch makes of one is a CPU tensor

    @property
    def device(self) -> torch.device:
        return _devices[self.untyped_storage().data_ptr()]


class Torch:
    """What torch would do for the adapter: name a device's current stream, and allocate in its order."""

    def __init__(self) -> None:
        self.streams = dict.fromkeys(range(2), Stream.null)  # the current one of each device
        self.alive: dict[int, int] = {}  # bytes by address
        self.allocations = 0

    def current_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(cuda_stream=self.streams[device.index].ptr)

    def empty(self, *shape: Any, device: Any = None, **others: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "cuda":
            return _torch_empty(*shape, device=device, **others)
        device = torch.device("cuda", torch.device(device).index or 0)
        plain = _torch_empty(*shape, device="meta", **others)
        size = max(1, plain.numel() * plain.element_size())  # an empty tensor has a device, too
        stream = self.streams[device.index]
        with _current(device.index):
            address = runtime.mallocAsync(size, stream.ptr)
        memory = (ctypes.c_char * size).from_address(address)
        _devices[address] = device
        self.alive[address] = size
        self.allocations += 1
        weakref.finalize(memory, self._free, address, stream).atexit = False
        whole = torch.from_numpy(np.frombuffer(memory, np.uint8))
        elements = whole[: plain.numel() * plain.element_size()].view(plain.dtype)
        return elements.as_strided(plain.shape, plain.stride()).as_subclass(CudaTensor)

    def _free(self, address: int, stream: Stream) -> None:
        with _current(_devices.pop(address).index):
            runtime.freeAsync(address, stream.ptr)
        del self.alive[address]

    def cuda(self, tensor: torch.Tensor | None, device: int = 0) -> Any:
        """A copy in device memory, with the same strides."""
        if tensor is None:
            return None
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        length = 1 + sum(stride * (size - 1) for size, stride in steps) if tensor.numel() else 0
        memory = self.empty(length, dtype=tensor.dtype, device=torch.device("cuda", device))
        copy = memory.as_strided(tensor.shape, tensor.stride()).as_subclass(CudaTensor)
        copy.copy_(tensor.detach())
        return copy.requires_grad_(tensor.requires_grad)


_torch_empty = torch.empty


@contextlib.contextmanager
def posing() -> Iterator[Torch]:
    """Meanwhile torch has CUDA devices, as far as the adapter asks."""
    fake = Torch()
    with (
        mock.patch.object(torch, "empty", fake.empty),
        mock.patch.object(torch.cuda, "current_stream", fake.current_stream),
    ):
        yield fake


@contextlib.contextmanager
def _current(device: int) -> Iterator[None]:
    before = runtime.getDevice()
    runtime.setDevice(device)
    try:
        yield
    finally:
        runtime.setDevice(before)
