"""`python -m traces`: what it prints, its exit codes, one line per error."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import small_trace
from tests.support.traces import HEADER, check_error, run, save, sound_arrays
from tests.unit.traces.test_importers import BY_LAYER, GAP, record
from traces import cli
from traces.cli import KINDS, _options_of, importer_of
from traces.fitting import generator
from traces.format import open_trace
from traces.importers.option_words import MEANINGS


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return save(tmp_path / "sound.safetensors", sound_arrays(), HEADER)


def test_validate_describes_a_sound_trace(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "validate", sound)
    assert (code, err) == (0, "")
    assert out.startswith("ok: sound: toy, 2 requests, 6 tokens × 3 layers × top-2 of 8 experts; experts, weights,")
    assert out.rstrip().endswith(open_trace(sound).sha256()[:12])


def test_validate_goes_on_after_a_faulty_file(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = save(sound.with_name("broken"), sound_arrays(), HEADER | {"top_k": "3"})
    code, out, err = run(capsys, "validate", broken, sound, sound.with_name("none"))
    assert code == 2
    assert out.count("ok: ") == 1
    assert [line.split(": ")[1] for line in err.splitlines()] == [str(broken), str(sound.with_name("none"))]


def test_import_says_what_it_wrote_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.json").write_text(json.dumps([record(2), record(1, has_repetition=True)]))
    output = tmp_path / "out.safetensors"
    code, out, err = run(capsys, "import", "gpt-oss-json", tmp_path / "in.json", output)
    assert (code, err) == (0, "")
    *said, topology = out.splitlines()
    shown = "2 tokens × 2 layers × top-2 of 32 experts"
    assert said == [f"wrote {output}: 1 requests, {shown}", "note: left out: 1 flagged"]
    # Its two layers are not those of the model that the importer names.
    assert topology.startswith("note: gpt-oss-20b has 24 MoE layers, the trace 2")
    assert run(capsys, "import", "gpt-oss-json", tmp_path / "in.json", output, "keep_all=true")[0] == 0
    assert open_trace(output).num_requests == 2


def test_import_options_reach_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text(BY_LAYER)
    (tmp_path / "b.csv").write_text(GAP)
    output = tmp_path / "out.safetensors"
    assert run(capsys, "import", "moe-beyond-csv", tmp_path / "a.csv", output, "phase=decode", "num_experts=70")[0] == 0
    trace = open_trace(output)
    assert (trace.num_experts, trace.prompt_len.tolist()) == (70, [0, 0])
    words = ("incomplete=repeat", "model=m", "license=MIT")
    assert run(capsys, "import", "route-csv", tmp_path / "b.csv", output, *words)[0] == 0
    trace = open_trace(output)
    assert (trace.model, trace.header["license"], trace.num_tokens) == ("m", "MIT", 4)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("required: COMMAND", "python -m traces --help")),
        (("chek",), ("invalid choice: 'chek'",)),
        (("validate",), ("required: PATH", "validate --help")),
        (("validate", "none*"), ("none*: glob: matches no file",)),
        (("import", "xml", "a", "b"), ("argument KIND: invalid choice: 'xml'",)),
        (("import", "route-csv", "none", "b"), ("none: file: does not exist",)),
        (("import", "route-csv", "a", "b", "model"), ("option 'model' has no value",)),
        (("import", "route-csv", "a", "b", "modle=x"), ("option 'modle' is unknown to route-csv; known are inc",)),
        (("import", "route-csv", "a", "b", "model="), ("option model is empty",)),
        (("import", "route-csv", "a", "b", "model=x", "model=y"), ("option model is given twice",)),
        (("import", "route-csv", "a", "b", "num_experts=0"), ("option num_experts=0 must be a whole number from 1",)),
        (("import", "route-csv", "a", "b", "incomplete=maybe"), ("incomplete=maybe is unknown; choose one of drop,",)),
        (("import", "gpt-oss-json", "a", "b", "keep_all=yes"), ("option keep_all=yes must be true or false",)),
        (("stats", "none"), ("none: file: does not exist",)),
        (("stats",), ("required: path",)),
        (("fit", "none", "b"), ("none: file: does not exist",)),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    words: tuple[str, ...],
    parts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    check_error(run(capsys, *words), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["validate", "import", "stats", "fit", "generate"])
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert f"python -m traces {command} " in out.split("examples:")[1]


def test_import_help_lists_the_options_of_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "import", "--help")[1]
    for text in ("route-csv: incomplete=drop", "gpt-oss-json: split=all keep_all=false", "event-csr: prefill_phase=0"):
        assert text in out


@pytest.mark.parametrize("columns", ["40", "80", "120"])
def test_import_help_fits_and_says_what_each_option_means(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    out = run(capsys, "import", "--help")[1]
    assert out.startswith("usage: python -m traces import [-h] KIND SOURCE… OUT [key=value …]\n")
    assert max(map(len, out.splitlines())) <= max(int(columns), 80)
    options = {name for kind in KINDS for name in _options_of(importer_of(kind))}
    assert options == set(MEANINGS)
    assert [name for name in sorted(options) if f"\n  {name}=  " not in out] == []
    # Broken lines of an example are one command to a shell.
    assert "import table log.csv my.safetensors token=pos layer=l expert=e0,e1 prompt_len=12" in " ".join(
        out.replace("\\\n", " ").split()
    )


@pytest.mark.parametrize(
    ("raised", "code"),
    [(KeyboardInterrupt(), 130), (ValueError("two\nlines"), 2), (PermissionError(13, "Permission denied", "x"), 2)],
)
def test_exit_codes(
    raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> int:
        raise raised

    monkeypatch.setattr(cli, "open_trace", fail)
    monkeypatch.setattr(cli, "run_validate", fail)
    got, _, err = run(capsys, "validate", "x")
    assert got == code
    assert err.count("\n") == 1


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any) -> int:
        raise AssertionError("ours")

    monkeypatch.setattr(cli, "run_validate", fail)
    with pytest.raises(AssertionError):
        run(capsys, "validate", "x")


def test_as_a_program(sound: Path) -> None:
    command = [sys.executable, "-m", "traces", "validate"]
    good = subprocess.run([*command, str(sound)], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    bad = subprocess.run([*command, str(sound.parent)], capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith(f"error: {sound.parent}: file: is a folder")
    assert bad.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_fit_counts_what_it_has_done_and_says_its_steps_apart_from_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[Callable[[], float], float]] = []

    @contextmanager
    def shown(what: str, done: Callable[[], float], total: float) -> Iterator[None]:
        assert done() == 0
        counted.append((done, total))
        yield

    monkeypatch.setattr(generator, "shown", shown)
    trace = small_trace(tmp_path / "t.safetensors", 40, 2)
    code, out, err = run(capsys, "fit", trace, tmp_path / "p.safetensors", "--rounds", 2)
    assert (code, out.count("\n")) == (0, 1)
    assert out.startswith("wrote ")
    assert err.splitlines()[-1].startswith("calibration: round 2 of 2, ")
    ((done, total),) = counted
    assert done() == pytest.approx(total)
    # Where a terminal shows how far it is, the steps do not scroll past it.
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = run(capsys, "fit", trace, tmp_path / "p.safetensors", "--rounds", 2)
    assert (code, err) == (0, "")
