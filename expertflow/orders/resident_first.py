"""Resident experts run first, then those in flight, then the rest as they land (arXiv 2510.26730).

The re-ordering changes when an expert runs, never which: outputs stay exact.
"""

from __future__ import annotations

from expertflow.parts import Order


class ResidentFirst(Order):
    """Whatever has landed may run; within a group in touch order."""

    strict = False
