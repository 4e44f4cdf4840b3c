"""Every expert is computed on the GPU: what is missing is copied."""

from __future__ import annotations

from expertflow.parts import Place


class Gpu(Place):
    """The default, and never asked."""
