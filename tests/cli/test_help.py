"""What `--help` says: what the command does, an example, and what may be given, in lines that fit."""

from __future__ import annotations

import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from replay.command import cli as replay
from sim.app import cli as sim

BEGINS = {"sim": "Simulate one configuration", "replay": "Run one configuration on this machine"}
EXAMPLES = {
    "sim": "python -m sim +hardware=a100 +policy=adaptive",
    "replay": "python -m replay +hardware=local +policy",
}


def help_of(name: str, *words: str) -> str:
    out = io.StringIO()
    GlobalHydra.instance().clear()
    try:
        with (
            patch.object(sys, "argv", [name, "--help", *words]),
            redirect_stdout(out),
            pytest.raises(SystemExit) as stop,
        ):
            {"sim": sim, "replay": replay}[name]()
        assert stop.value.code == 0
    finally:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
    return out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sim", "replay"])
def test_help_begins_with_what_the_command_does_and_fits(name: str) -> None:
    text = help_of(name)
    assert text.startswith(BEGINS[name])
    assert EXAMPLES[name] in text
    assert "+hardware=NAME +policy=NAME" in text
    assert "policy/eviction: " in text
    assert "study" not in text
    assert ("hardware: a10, a100, " in text, re.search(r"\blocal\b", text) is not None) == (True, name == "replay")
    assert max(map(len, text.splitlines())) <= 100
    if name == "sim":
        # What it says itself: the configuration below it is YAML's.
        said = text.partition("With the\nwords given here:")[0]
        assert len(said) < len(text)
        assert max(map(len, said.splitlines())) <= 80


@pytest.mark.slow
def test_help_lists_ones_own_files(tmp_path: Path) -> None:
    (tmp_path / "hardware").mkdir()
    (tmp_path / "hardware" / "box.yaml").write_text("name: box\n", encoding="utf-8")
    assert "box" in help_of("sim", "--config-dir", str(tmp_path))
