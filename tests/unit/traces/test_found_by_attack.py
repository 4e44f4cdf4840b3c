"""What the attack has found in the reading of traces, each by its smallest input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.attack import files
from tests.support.traces import HEADER, save, sound_arrays
from traces.batching import BatchConfig, Batches
from traces.cli import main
from traces.importers.route_csv import import_route_csv
from traces.parameters import load_params
from traces.reader import TraceError, open_trace
from traces.reading import read_npy
from traces.yamltext import read_yaml


def test_files_that_write_one_number_in_two_ways_are_chained(tmp_path: Path) -> None:
    first = save(tmp_path / "a.safetensors", sound_arrays(), HEADER)
    second = save(tmp_path / "b.safetensors", sound_arrays(), HEADER | {"num_experts": "08", "top_k": "0002"})
    trace = open_trace([first, second])
    assert (trace.num_experts, trace.top_k, trace.num_tokens) == (8, 2, 12)


def test_forwards_that_leave_no_numbers_for_the_next_file_are_refused(tmp_path: Path) -> None:
    arrays = sound_arrays()
    arrays["forward_id"] = arrays["forward_id"] + (2**63 - 3)
    first = save(tmp_path / "a.safetensors", arrays, HEADER)
    second = save(tmp_path / "b.safetensors", sound_arrays(), HEADER)
    assert open_trace(first).num_tokens == 6
    with pytest.raises(TraceError, match=r"a\.safetensors: forward_id: goes up to 9223372036854775807, .*; number"):
        open_trace([first, second])
    arrays["forward_id"] = arrays["forward_id"] - (2**63 - 2**61)
    chained = open_trace([save(first, arrays, HEADER), second])
    assert np.unique(np.asarray(chained.forward_id)).size == 6


def test_a_header_that_is_no_literal_is_refused_in_our_words(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': x}".ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64))
    with pytest.raises(TraceError, match=r"a\.npy: array: is no plain array file \(no \.npy header\); save integers"):
        read_npy(path)


@pytest.mark.parametrize("value", ["!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!binary aGVsbG8="])
def test_kinds_that_only_yaml_has_are_named_with_their_line(value: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\ndecide_ns: {value}\n")
    kind = value.split()[0].removeprefix("!!")
    with pytest.raises(TraceError, match=rf"mine\.yaml: line 2: holds a YAML {kind}, which is no value"):
        read_yaml(path)


@pytest.mark.filterwarnings("error")
def test_a_header_that_python_2_wrote_is_read_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (2L, 2, 2)}".ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(32))
    assert read_npy(path).shape == (2, 2, 2)


@pytest.mark.filterwarnings("error")
def test_parameters_in_half_precision_are_held_against_bounds_that_it_cannot_hold(tmp_path: Path) -> None:
    for dtype in (np.float16, np.float32):
        path = tmp_path / "a.params.safetensors"
        arrays = {name: np.asarray(array, dtype) for name, array in files.params().items()}
        save_file(arrays, path, files.PARAMS_HEADER)
        params, _ = load_params(path)
        assert params["bias"].dtype == dtype


@pytest.mark.parametrize("model", ["two\nlines\r\u2028and more", "x" * 70_000, "\u202egnp\x1b[2J"])
def test_a_trace_is_described_in_one_line_whatever_it_is_called(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "a.safetensors", sound_arrays(), HEADER | {"model": model})
    assert main(["validate", str(path)]) == 0
    line = capsys.readouterr().out.removesuffix("\n")
    assert line.isprintable()
    assert len(line) < 400


def test_a_key_that_is_no_text_is_refused_before_hydra_fails_on_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\n~: 3\n", encoding="utf-8")
    with pytest.raises(TraceError, match=r"mine\.yaml: line 2: has a key that is no text"):
        read_yaml(path)


@pytest.mark.filterwarnings("error")
def test_the_look_ahead_of_layers_behind_the_last_one_may_hold_anything(tmp_path: Path) -> None:
    arrays = sound_arrays()
    rows, layers = arrays["experts"].shape[:2]
    lookahead = np.zeros((rows, layers, 2, 8), np.float16)
    # A NaN that signals: any arithmetic on it is told, until it has gone through one.
    signals = np.uint16(0x7C01).view(np.float16)
    lookahead[:, layers - 1] = signals
    lookahead[:, layers - 2, 1] = signals
    arrays["lookahead"] = lookahead
    trace = open_trace(save(tmp_path / "a.safetensors", arrays, HEADER | {"lookahead_distance": "2"}))
    forward = next(iter(Batches(trace, BatchConfig())))
    found = forward.recorded.lookahead(forward.rows, 0)
    assert found is not None
    assert np.isfinite(found[:, 0]).all()


def test_an_expert_beyond_any_model_is_refused_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    rows = "\n".join(f"0,0,0,{layer},0,{4294967296 if layer == 2 else 3},0.5" for layer in range(4))
    path.write_text(f"turn,phase,step,layer,slot,expert,weight\n{rows}\n", encoding="utf-8")
    with pytest.raises(TraceError, match=r"r\.csv: line 4: expert is 4294967296; experts are numbers below 2\^31"):
        import_route_csv(path, tmp_path / "out.safetensors", model="tiny")
