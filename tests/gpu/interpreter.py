"""Tests of Triton kernels on a CPU: run once by Triton's interpreter in a process of its own, and reported one by one.

TRITON_INTERPRET counts from triton's first import on, and for all kernels of a process: what else runs here must not
see it. So `interpreted` tests run in a second pytest, started by the first of them, which says what became of each.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
INSIDE = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def outcomes(file: str) -> dict[str, tuple[str, str]]:
    """By the name of a test: passed, failed or skipped, and what it said. If they did not run, by "": why."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", file]
        ran = subprocess.run(command, cwd=ROOT, env=kept | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        if not report.exists():
            return {"": ("failed", f"the interpreter's tests ended early: {ran.stdout[-2000:]}{ran.stderr[-2000:]}")}
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    found = {}
    for case in cases:
        wrong = next((part for kind in ("failure", "error") if (part := case.find(kind)) is not None), None)
        skipped = case.find("skipped")
        part = wrong if wrong is not None else skipped
        outcome = "failed" if wrong is not None else "skipped" if skipped is not None else "passed"
        found[str(case.get("name"))] = (outcome, "" if part is None else part.get("message", "") + (part.text or ""))
    return found


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """A test that Triton's interpreter runs; skipped where triton is not installed. Slow: the first waits for all."""
    if INSIDE:
        return test
    plain = inspect.signature(test)

    def reported(request: pytest.FixtureRequest, **_: Any) -> None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed: pip install 'expertflow[kernels]'")
        found = outcomes(str(request.path))
        outcome, text = found.get(request.node.name, found.get("", ("failed", "was not run")))
        if outcome == "skipped":
            pytest.skip(text)
        assert outcome == "passed", text

    functools.update_wrapper(reported, test)
    del reported.__wrapped__  # type: ignore[attr-defined]
    request = inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY)
    fixtures = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in plain.parameters.values()]
    reported.__signature__ = plain.replace(parameters=[request, *fixtures])  # type: ignore[attr-defined]
    return pytest.mark.slow(reported)
