"""Help pages fit the terminal: 80 columns where none is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml

from replay.bench_decide import main as bench_decide
from replay.bench_host import main as bench_host
from replay.keys import main as keys
from sim.console import usage
from sim.paths import CONF
from traces.cli import main as traces
from traces.help_text import hanging, wrapped

COMMANDS: dict[str, tuple[Callable[[list[str]], object], list[str]]] = {
    "bench-decide": (bench_decide, []),
    "bench-host": (bench_host, []),
    "keys": (keys, []),
    "record": (traces, ["record"]),
    "fit": (traces, ["fit"]),
    "fit-predictor": (traces, ["fit-predictor"]),
    "score-predictors": (traces, ["score-predictors"]),
}


@pytest.mark.parametrize("columns", [None, 80, 100])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits(
    name: str, columns: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(columns))
    main, words = COMMANDS[name]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert max(map(len, printed.splitlines())) <= (columns or 80)


def test_the_list_of_commands_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (60, 80, 300):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert max(map(len, usage().splitlines())) <= min(columns, 120)


def test_paragraphs_are_joined_and_indented_lines_are_not() -> None:
    text = "one two\nthree four\n\nexamples:\n  python -m sim --out a b\n  short"
    told = "one two three\nfour\n\nexamples:\n  python -m \\\n      sim \\\n      --out a \\\n      b\n  short"
    assert wrapped(text, 15) == told
    assert hanging("a (python -m sim.bench) b", 12, 2) == ["a", "  (python -m sim.bench)", "  b"]


def test_what_the_help_of_a_replay_says_itself_fits() -> None:
    told = yaml.safe_load((CONF / "replay.yaml").read_text(encoding="utf-8"))["hydra"]["help"]["template"]
    assert max(map(len, told.splitlines())) <= 80
