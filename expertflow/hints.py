"""What a module of the core tells mypyc of its classes. Run as it is written it means nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr as mypyc_attr
else:

    def mypyc_attr(**hints):
        """As `mypy_extensions.mypyc_attr`, which need not be installed where nothing is compiled."""
        return lambda kind: kind
