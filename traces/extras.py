"""How to install what an optional package is wanted for; of torch also that it is large, and how to take less."""

from __future__ import annotations

_CPU = "pip install torch --index-url https://download.pytorch.org/whl/cpu"


def install(name: str, extra: str) -> str:
    """The remedy where the module `name` is missing, which the extra of that name brings."""
    line = f"install it: pip install 'expertflow[{extra}]'"
    if name != "torch":
        return line
    return f"{line}; on Linux torch brings CUDA, several GB: without a GPU run before it {_CPU}"
