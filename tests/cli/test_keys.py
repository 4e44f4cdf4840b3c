"""The page of keys is what is declared, and every key of a configuration's files is on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import pytest

from expertflow.keys import OTHER, REQUIRED, TEXT, WHOLE, Key, Rule, arguments_of, nearest, shown, unknown_key
from replay.keys import main, page
from sim.job.configure import configure
from sim.paths import CONF
from traces.messages import MOST, shortened

PAGE = Path(__file__).parents[2] / "docs" / "keys.md"


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == page() == PAGE.read_text(encoding="utf-8")


def test_a_word_lists_the_keys_that_contain_it_in_lines_that_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["Resid"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if not line.startswith(" ")] == [
        "residency",
        "stack.resident_tpot_ms",
    ]
    assert "a number in (0, 1], or null; default null; share of all experts with a slot" in printed
    for columns in (60, 80, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["policy."]) == 0
        printed = capsys.readouterr().out
        assert columns - 12 < max(map(len, printed.splitlines())) <= columns
    assert "policy.horizon.depth (with policy/horizon=fixed_1)" in printed


def test_a_word_in_no_key_is_one_line_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for word, meant in (("residancy", "residency"), ("decision_shar_", "policy.horizon.decision_share")):
        with pytest.raises(SystemExit) as stop:
            main([word])
        assert stop.value.code == 2
        told = capsys.readouterr().err
        assert f"no key contains {word!r} (did you mean {meant}?)" in told
        assert told.count("\n") == 1


def test_every_key_of_the_files_is_on_the_page() -> None:
    listed = set(re.findall(r"^\| `([\w.]+)` ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert len(listed) > 120
    for path in sorted((CONF / "policy").glob("*.yaml")):
        plain = configure(["+hardware=a100", f"+policy={path.stem}", "model=gpt-oss-20b"])
        assert set(keys_of(plain)) - listed == set(), path.stem


def keys_of(value: Any, place: str = "") -> list[str]:
    """Every key of a configuration; of a predictor that is one of several, as of the predictor."""
    if not isinstance(value, dict) or place.endswith((".sources", ".kernel_ns")):
        return [re.sub(r"^policy\.predictor\.(hybrid|lookahead|forest|transition)\.", "policy.predictor.", place)]
    prefix = f"{place}." if place else ""
    return [key for name, inner in value.items() if name != "_target_" for key in keys_of(inner, prefix + name)]


def test_every_key_says_what_it_is_for() -> None:
    rows = [row for row in PAGE.read_text(encoding="utf-8").splitlines() if row.startswith("| `")]
    assert [row for row in rows if row.rstrip("| ").endswith(("`", "–")) or "| ;" in row] == []


class Mine:
    """What a user's own part may look like."""

    def __init__(self, depth: int, share: float = 0.5, names: Annotated[str, Rule(choices=("a", "b"))] = "a") -> None:
        self.depth, self.share, self.names = depth, share, names


def test_a_class_declares_its_keys_by_its_annotations() -> None:
    keys, open_ended = arguments_of(Mine)
    assert (list(keys), open_ended) == (["depth", "share", "names"], False)
    assert keys["depth"] == Key("depth", WHOLE, Rule(), REQUIRED)
    assert (keys["names"].kind, keys["names"].rule.choices) == (TEXT, ("a", "b"))
    for wrong in (1.5, True, "1", None, 10**30):
        with pytest.raises(ValueError, match=r"^depth="):
            keys["depth"].check(wrong)
    keys["depth"].check(-5)


def test_what_is_annotated_with_a_class_of_ones_own_is_left_to_that_class() -> None:
    def call(what: Mine, more: object = None, either: int | Mine = 5, **others: int) -> None:
        del what, more, either, others

    keys, open_ended = arguments_of(call)
    assert open_ended
    assert {key.kind for key in keys.values()} == {OTHER}
    keys["either"].check("anything")


def test_a_long_list_of_choices_begins_with_the_nearest() -> None:
    known = [f"choice_{number}" for number in range(100)]
    text = nearest("choice_77", known)
    assert text.startswith("choice_77, ")
    assert text.endswith(" more")
    assert len(text) <= 160
    assert nearest("x", ["a", "b"]) == "a, b"


def test_no_message_is_longer_than_a_line_takes() -> None:
    assert len(shown("x" * 9999)) == 60
    assert shown(10**5000) == "a number of thousands of digits"
    assert len(str(unknown_key("group", "k" * 999, [f"key_{number}" for number in range(999)]))) <= MOST
    line = shortened(f"key={'x' * 999} is wrong; do this")
    assert len(line) <= MOST
    assert line.startswith("key=x")
    assert line.endswith("do this")
