"""Between the GPU and the host's worker: activations go over, results come back and are added to the GPU's own.

Each way has streams of its own, so that neither waits for a copy of weights. Of one way at most one task is under way:
the next layer's attention waits for its results.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from replay.machine.device import Event, RawCopy


class MemoryWay:
    """Between two stretches of the host's own memory: what is sent is there at once.

    activations, results: [rows, hidden] on the device; at_host, from_host: the same on the host.
    """

    def __init__(
        self, activations: torch.Tensor, at_host: torch.Tensor, from_host: torch.Tensor, results: torch.Tensor
    ) -> None:
        self._down = at_host.data_ptr(), activations.data_ptr()
        self._up = results.data_ptr(), from_host.data_ptr()

    def begin_thread(self) -> None:
        """One thread of torch's: more would fight with the streams."""
        torch.set_num_threads(1)

    def fetch(self, num_bytes: int) -> None:
        """At once: a few rows, of which nobody writes any now."""
        ctypes.memmove(*self._down, num_bytes)

    def await_fetched(self) -> None:
        """They are there."""

    def send(self, num_bytes: int) -> Event:
        """At once; no event tells more than the worker itself."""
        ctypes.memmove(*self._up, num_bytes)
        return None

    def follow(self) -> None:
        """They were there before the worker said so."""


class CudaWay:
    """Implements `replay.machine.device.Way` by two streams of a GPU. All host memory is pinned.

    guarded: calls a function and raises its CUDA errors as the device does. compute: the stream of the kernels. down,
    up: raw copies to the host and to the device. num_threads: of the CPU that the worker's products may use.
    """

    def __init__(
        self,
        device: torch.device,
        compute: Any,
        guarded: Callable[..., Any],
        copies: tuple[RawCopy, RawCopy],
        memory: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        num_threads: int,
    ) -> None:
        activations, at_host, from_host, results = memory
        self._device, self._compute, self._guarded, self._num_threads = device, compute, guarded, num_threads
        self._copy_down, self._copy_up = copies
        self._down = at_host.data_ptr(), activations.data_ptr()
        self._up = results.data_ptr(), from_host.data_ptr()
        self._down_stream, self._up_stream = (torch.cuda.Stream(device=device) for _ in range(2))
        # One of each serves the whole run: a task is over before the next one begins.
        self._fetched, self._sent = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def begin_thread(self) -> None:
        """Choose the device, which a thread does for itself, and leave a core to the thread that polls."""
        torch.cuda.set_device(self._device)
        torch.set_num_threads(self._num_threads)

    def fetch(self, num_bytes: int) -> None:
        self._guarded(self._fetch, num_bytes)

    def _fetch(self, num_bytes: int) -> None:
        # The host has seen the router's number: what attention wrote is complete, and no event need be waited for.
        self._copy_down(*self._down, num_bytes, self._down_stream)
        self._fetched.record(self._down_stream)

    def await_fetched(self) -> None:
        # Without the interpreter: the runtime's thread polls meanwhile.
        self._fetched.synchronize()

    def send(self, num_bytes: int) -> Event:
        self._copy_up(*self._up, num_bytes, self._up_stream)
        self._sent.record(self._up_stream)
        return self._sent

    def follow(self) -> None:
        self._guarded(self._compute.wait_event, self._sent)
