"""Small files: written whole or not at all, and the same content as the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from traces.container import fault
from traces.processes.whole import write_bytes


def safetensors_bytes(arrays: Mapping[str, npt.NDArray[np.generic]], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file; the library alone writes the entries of metadata in an order drawn anew."""
    from safetensors.numpy import save

    plain = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    length = int.from_bytes(plain[:8], "little")
    table = json.loads(plain[8 : 8 + length])
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())), **table}, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + plain[8 + length :]


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all. TraceError where that cannot be."""
    try:
        write_bytes(path, content)
    except OSError as error:
        raise fault(path, "file", f"cannot be written ({error.strerror})", "check folder, rights and space") from None
