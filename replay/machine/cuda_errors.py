"""What an error of CUDA means here: a user's mistake with a remedy, one of ours, or a device that is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from replay.lost import DeviceLostError, found_lost

_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
_OUR_MISTAKES = (
    "device not ready",
    "invalid argument",
    "invalid configuration argument",
    "invalid resource handle",
    "CUBLAS_STATUS_INVALID_VALUE",
    "CUBLAS_STATUS_NOT_SUPPORTED",
    "captur",
    "invalid device function",
    "too many resources",
    "named symbol not found",
    "kernel image is invalid",
    "operation not supported",
)
"""CUDA errors that a wrong call earns and the device survives: they deserve their traceback."""


def explained(error: RuntimeError) -> Exception:
    """What an error raised by torch means here: DeviceLostError, a ValueError with a remedy, or the error itself.

    Errors are told apart by their text: versions of torch differ in the class of a CUDA error, none in how its text
    begins.
    """
    if isinstance(error, DeviceLostError):
        return error
    text = str(error)
    line = text.splitlines()[0].strip() if text.strip() else type(error).__name__
    if isinstance(error, torch.cuda.OutOfMemoryError):
        # Its first line is a paragraph: what was tried, what is free, who has the rest.
        return ValueError(
            f"GPU memory: {'. '.join(line.split('. ')[:2]).rstrip('.')}; lower residency, batch_size or "
            "prefill_chunk, or close what else uses the GPU"
        )
    # Triton speaks of the same errors in its own words.
    line = line.replace("Triton Error [CUDA]", "CUDA error")
    if not line.startswith("CUDA error") or any(mistake in line for mistake in _OUR_MISTAKES):
        return error
    if any(memory in line for memory in _MEMORY):
        # The allocator speaks for GPU memory with a class of its own: what is left is pinned memory and libraries.
        return ValueError(f"memory that the GPU must reach: {line}; lower host_memory_gb (pinned memory) or residency")
    if "no kernel image" in line:
        return ValueError(
            f"machine=cuda: {line}: this build of torch has no kernels for this GPU; install one that "
            "has, or choose machine=cpu"
        )
    return DeviceLostError(line)


def told_if_lost(meaning: Exception) -> None:
    """Report a GPU that is gone before anything is taken down.

    Nothing is to be taken down where no CUDA context exists.
    """
    if isinstance(meaning, DeviceLostError) and torch.cuda.is_initialized():
        found_lost(meaning)


@contextmanager
def explaining() -> Iterator[None]:
    """Around what allocates or computes on the device beside `CudaDevice`: its errors as `explained`."""
    try:
        yield
    except RuntimeError as error:
        meaning = explained(error)
        told_if_lost(meaning)
        if meaning is error:
            raise
        raise meaning from error
