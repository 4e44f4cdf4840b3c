"""The pieces in which an expert is copied."""

from __future__ import annotations

DEFAULT_CHUNK_BYTES = 4 << 20


def chunk_sizes(expert_bytes: int, chunk_bytes: int) -> list[int]:
    """The fewest chunks of at most `chunk_bytes` that make up one expert; they differ by one byte at most."""
    if expert_bytes < 1:
        raise ValueError(f"expert_bytes={expert_bytes} must be at least 1")
    check_chunk(chunk_bytes)
    num_chunks = -(-expert_bytes // chunk_bytes)
    size, num_larger = divmod(expert_bytes, num_chunks)
    return [size + 1] * num_larger + [size] * (num_chunks - num_larger)


def check_chunk(chunk_bytes: int) -> None:
    """ValueError for chunks of nothing."""
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes={chunk_bytes} must be at least 1; raise chunk_mib")
