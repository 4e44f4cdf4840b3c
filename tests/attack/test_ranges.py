"""Values that no file of the kind can hold, counts that stand for too much, and files that are read in two ways."""

from __future__ import annotations

import io
import json
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.attack import files
from tests.attack.readers import READERS
from traces.importers.engine_dumps import import_engine_dumps
from traces.importers.event_csr import import_event_csr
from traces.importers.gpt_oss_json import import_gpt_oss_json
from traces.limits import MAX_BYTES, Budget, check_bytes, check_expansion, max_bytes
from traces.messages import TraceError
from traces.parameters import load_params, save_params
from traces.reading import npz_arrays, parse_json, read_bytes, read_json, read_npy
from traces.yamltext import read_yaml

READ = {reader.name: reader for reader in READERS}


def refused(name: str, path: Path) -> str:
    """The line in which the reader of that name refuses the file."""
    with pytest.raises(ValueError) as caught:
        READ[name].read(path)
    line = str(caught.value)
    assert len(line) <= 300
    assert line.isprintable()
    return line


# -- parameter files -----------------------------------------------------------------------------------------


def put(name: str, at: Any, value: float) -> Callable[[dict[str, Any]], None]:
    """A change of one value."""

    def change(arrays: dict[str, Any]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][at] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("bias", (0, 0), np.nan), r"array 'bias'\[0\]\[0\]: is nan"),
        (put("cross", (1, 2, 3), np.inf), r"array 'cross'\[1\]\[2\]\[3\]: is inf"),
        (put("half_lives", 0, 0), r"array 'half_lives'\[0\]: is 0, it must be above 0"),
        (put("half_lives", 1, -3), r"array 'half_lives'\[1\]: is -3"),
        (put("topic_length", 2, -1), r"array 'topic_length'\[2\]: is -1, it must be above 0"),
        (put("wander_share", (), 1.5), "array 'wander_share': is 1.5, it must be 0 or more and at most 1"),
        (put("residual", (0, 1), -0.5), r"array 'residual'\[0\]\[1\]: is -0.5"),
        (put("loadings", (0, 0, 0), 1e30), "at most 1e.06"),
        (put("row_size", (2, 1), 0.5), r"array 'row_size'\[2\]: adds up to 1.5"),
        (put("row_size", (0, slice(None)), [0.5, 0.5, 0.0]), r"'row_size'\[0\]\[0\]: is 0.5"),
        (put("weight_gap", (0, 0, 0), np.nan), "array 'weight_gap'"),
        (put("weight_sum", 0, -1), r"array 'weight_sum'\[0\]: is -1"),
        (lambda arrays: arrays.pop("weight_sum"), "array 'weight_sum': is missing"),
        (lambda arrays: arrays.pop("repeat"), "array 'repeat': is missing"),
        (lambda arrays: arrays.update(skew=np.zeros(3, np.float32)), r"array 'skew': has the shape \[3\]"),
        (lambda arrays: arrays.update(repeat=np.zeros(5, np.float32)), r"array 'repeat': has the shape \[5\]"),
        (lambda arrays: arrays.update(repeat=np.zeros(4, np.bool_)), "array 'repeat': holds bool"),
    ],
)
def test_a_parameter_out_of_range_is_named(change: Any, says: str, tmp_path: Path) -> None:
    arrays = files.params()
    change(arrays)
    path = tmp_path / "g.params.safetensors"
    save_file(arrays, path, metadata=files.PARAMS_HEADER)
    with pytest.raises(TraceError, match=says) as caught:
        load_params(path)
    assert str(caught.value).startswith(f"{path}: array ")
    assert "python -m traces fit" in str(caught.value)


def test_what_is_saved_is_loaded_as_it_was(tmp_path: Path) -> None:
    save_params(tmp_path / "g.params.safetensors", files.params(), model="tiny")
    found, header = load_params(tmp_path / "g.params.safetensors")
    assert header["model"] == "tiny"
    for name, array in files.params().items():
        np.testing.assert_array_equal(found[name], array)


# -- fitted predictors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "content", "name", "value", "says"),
    [
        ("transition", files.transition, "num_forwards", np.array([0.0]), "no counts of 0 forwards"),
        ("transition", files.transition, "num_forwards", np.array([np.nan]), "holds nan"),
        ("transition", files.transition, "frequency", np.full((files.L, files.E), 102.0), "no counts of 100 forwards"),
        ("transition", files.transition, "persistence", np.zeros((4, 8, 8), np.bool_), "must hold counts"),
        ("network", files.network, "frequency", np.full((files.L, files.E), -1, np.int32), "at least 0 may be"),
        ("network", files.network, "table_bits", np.array([-1], np.int32), "at least 0 may be"),
        ("network", files.network, "out_scale", np.full((files.L, files.E), -5, np.int32), "at least 0 may be"),
        ("forest", files.forest, "max_tokens", np.array([0], np.int32), "it must be 1 …"),
        ("forest", files.forest, "leaves", np.full((8, files.E), 300, np.int16), "it must be -128 … 127"),
        ("forest", files.forest, "first_node", np.array([0, 1 << 59, 2, 3, 4]), "trees are damaged"),
        ("forest", files.forest, "calibration", np.full((1, files.L, 45), -1, np.int32), "it must be 0 …"),
    ],
)
def test_a_fitted_value_out_of_range_is_named_with_its_file(
    kind: str, content: Any, name: str, value: Any, says: str, tmp_path: Path
) -> None:
    path = tmp_path / f"mine.{kind}.safetensors"
    save_file({**content(), name: value}, path)
    line = refused(f"fitted-{kind}", path)
    assert says in line
    assert path.name in line


# -- event CSR -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10**8, 10**11, 10**15, 2**62])
def test_counts_of_a_small_event_file_are_not_followed(count: int, tmp_path: Path) -> None:
    """732 bytes that stand for 10^8 tokens, and made a trace of 1.1 GB."""
    one = {name: np.array([0], np.int64) for name in ("request", "scheduler_step", "forward_cycle", "phase", "layer")}
    arrays = {
        **one,
        "token_count": np.array([count]),
        "offsets": np.array([0, 1]),
        "expert_ids": np.array([3]),
        "assignment_counts": np.array([count]),
        "gate_mass": np.array([1.0]),
    }
    path = tmp_path / "e.safetensors"
    save_file(arrays, path, metadata={"model": "m"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TraceError, match=r"e\.safetensors: .*(token_count \d+: would take|is \d+; give at most)"):
        import_event_csr(path, tmp_path / "o.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert not (tmp_path / "o.safetensors").exists()


def test_more_tokens_in_an_event_than_its_file_explains_are_allowed_by_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = files.events() | {"token_count": np.array([10**6] * 4 + [1] * 4, np.int32)}
    first = arrays["offsets"][4]
    arrays["assignment_counts"] = np.where(np.arange(arrays["expert_ids"].size) < first, 10**6, 1).astype(np.int32)
    path = tmp_path / "e.safetensors"
    save_file(arrays, path, metadata={"model": "m"})
    with pytest.raises(TraceError, match=r"of a file of \d+ at most \d+ are allowed; check its counts, or allow it"):
        import_event_csr(path, tmp_path / "o.safetensors")
    monkeypatch.setenv(MAX_BYTES, "100000")
    with pytest.raises(TraceError, match="at most 100000 are allowed"):
        import_event_csr(path, tmp_path / "o.safetensors")


def test_a_gate_mass_that_no_weight_holds_is_refused(tmp_path: Path) -> None:
    arrays = files.events()
    arrays["gate_mass"][3] = 1e30
    save_file(arrays, tmp_path / "e.safetensors", metadata={"model": "m"})
    with pytest.raises(TraceError, match="gate mass of more than 65504"):
        import_event_csr(tmp_path / "e.safetensors", tmp_path / "o.safetensors")


# -- other sources -------------------------------------------------------------------------------------------


def test_requests_of_different_layers_are_named_by_file_and_entry(tmp_path: Path) -> None:
    two = files.fingerprints()
    for token in two[1]["router_data"]:
        for layers in token.values():
            del layers["layer_3"]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(two))
    with pytest.raises(TraceError, match=r"r\.json: entry 1: has 3 layers, r\.json \(entry 0\) has 4; import"):
        import_gpt_oss_json(path, tmp_path / "o.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<i4', 'fortran_order': False, 'shape': (5, 4, 2",
        b"{'descr': '<i4', 'fortran_order': False, 'shape': (5, 4, 2), 'x': __import__('os').system('id')}",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (5, 4, 2), }",
        b"{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000, 1000000000, 1000), }",
        b"{'descr': '<i4', 'fortran_order': False, 'shape': (-1, 4, 2), }",
        b"{'descr': '(1000000000,)<i4', 'fortran_order': False, 'shape': (1, 1, 1), }",
        b"(" * 500,
        b"\xff" * 50,
    ],
)
def test_a_npy_header_is_never_run_and_never_believed(header: bytes, tmp_path: Path) -> None:
    text = header.ljust(118) + b"\n"
    path = tmp_path / "d.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(160))
    with pytest.raises(TraceError, match=r"d\.npy: array: "):
        import_engine_dumps(path, tmp_path / "o.safetensors", model="m")


def test_a_npy_is_mapped_and_an_empty_one_is_empty(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.asfortranarray(files.routing(5)))
    np.testing.assert_array_equal(read_npy(tmp_path / "f.npy"), files.routing(5))
    np.save(tmp_path / "e.npy", np.empty((0, 3, 2), np.int8))
    assert read_npy(tmp_path / "e.npy").shape == (0, 3, 2)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = io.BytesIO()
    np.save(array, np.zeros((50_000, 24, 4), np.uint8))
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(20):
            archive.writestr(f"a{number}.npy", array.getvalue())
    monkeypatch.setenv(MAX_BYTES, str(50_000_000))
    with pytest.raises(TraceError, match=r"b\.npz: file: would take 96\d+ bytes of memory, at most 50000000"):
        list(npz_arrays(tmp_path / "b.npz"))


def test_members_of_an_archive_are_checked(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, files.routing(2))
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        archive.writestr("a.npy", array.getvalue())
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", array.getvalue())
    with pytest.raises(TraceError, match="array 'a': comes twice; keep one"):
        list(npz_arrays(tmp_path / "twice.npz"))
    with zipfile.ZipFile(tmp_path / "more.npz", "w") as archive:
        archive.writestr("a.npy", array.getvalue() + b"x")
    with pytest.raises(TraceError, match="array 'a': has bytes after its last value"):
        list(npz_arrays(tmp_path / "more.npz"))


def test_one_long_text_among_ids_makes_no_room_for_all(tmp_path: Path) -> None:
    rows = [[["x" * 1_000_000, 1]]] + [[["a", "b"]]] * 2000
    (tmp_path / "d.json").write_text(json.dumps({"routed_experts": rows}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TraceError, match=r"d\.json: file: is no list of numbers"):
        import_engine_dumps(tmp_path / "d.json", tmp_path / "o.safetensors", model="m")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


# -- what runs leave behind ----------------------------------------------------------------------------------


def drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        for key in keys[:-1]:
            table = table[key]
        del table[keys[-1]]

    return change


def replace(value: Any, *keys: str) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        for key in keys[:-1]:
            table = table[key]
        table[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("stack"), "stack: is None, no text"),
        (replace([1], "hardware"), "hardware: is [1], no text"),
        (replace("x", "prefetch", "issued"), "prefetch.issued: is 'x', no number of 0 or more"),
        (replace(10**400, "trace", "num_tokens"), "trace.num_tokens: is a huge number"),
        (replace(-1, "stall_ns"), "stall_ns: is -1"),
        (replace(True, "num_tokens"), "num_tokens: is True"),
        (replace(2.0, "capacity", "residency"), "capacity.residency: is 2.0"),
        (replace(5, "tpot_ms"), "tpot_ms: is 5, no table"),
        (replace(10**6, "num_hits"), "num_hits: is 1000000, more than num_accesses"),
        (replace({"lru": 3}, "compare"), "compare.lru: is 3, no run"),
        (replace([1, "a"], "notes"), "notes: is [1, 'a'], a list of several kinds"),
        (replace(1, "link.busy_ns"), "link.busy_ns stands twice"),
    ],
)
def test_metrics_that_no_run_writes_are_named(change: Any, says: str, tmp_path: Path) -> None:
    path = READ["metrics"].make(tmp_path)
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    line = refused("metrics", path)
    assert says in line
    assert line.startswith(str(path))


def test_runs_that_disagree_in_the_kind_of_a_value_are_named(tmp_path: Path) -> None:
    from sim.collect import collect

    for name, note in (("a", 1), ("b", "text")):
        (tmp_path / name).mkdir()
        path = READ["metrics"].make(tmp_path / name)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"note": note}))
    with pytest.raises(TraceError, match=r"b/metrics\.json: note: is 'text', in .*a/metrics\.json it is 1; collect"):
        collect(tmp_path)


def test_a_done_file_that_names_a_device_is_out_of_date(tmp_path: Path) -> None:
    from sim.job.decided import stands

    (tmp_path / "DONE").write_text(json.dumps({"asked": "m", "files": {"/dev/zero": "0"}, "code": {}}))
    assert not stands(tmp_path / "DONE", "m")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (replace(0, "chunk_ns", "gpt-oss-20b"), "chunk_ns.gpt-oss-20b is 0, no number above 0"),
        (replace("x", "host", "gpt-oss-20b", "found", "adaptive", "decide"), "decide is 'x', no table"),
        (replace(-5, "python_loop_ns"), "python_loop_ns is -5, no list of figures"),
        (replace(-1, "pad_share"), "pad_share is -1"),
        (drop("device", "torch"), "device.torch is None, no text"),
    ],
)
def test_a_calibration_that_no_machine_gives_is_named(change: Any, says: str, tmp_path: Path) -> None:
    path = READ["calibration"].make(tmp_path)
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    line = refused("calibration", path)
    assert says in line
    assert path.name in line


# -- JSON and YAML -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1: is no JSON"),
        ('{"a": 1,\n"b" 2}', "line 2: is no JSON (Expecting ':' delimiter, column 5)"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e999]", "1e999 is too large a number"),
        ("[1E+0999]", "1E+0999 is too large a number"),
        (f"[{'9' * 400}.5]", "is too large a number"),
        (f"[{'9' * 5000}]", "a number of too many digits"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_json_is_read_in_one_way_only(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(TraceError) as caught:
        read_json(tmp_path / "a.json")
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: ")


def test_a_byte_order_mark_is_left_out_and_other_encodings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.json").write_bytes('{"a": 1}'.encode("utf-16"))
    with pytest.raises(TraceError, match=r"is not UTF-8 text \(byte 0\)"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["[[],[]]", '[{"a":1},{"a":2}]', '["aa","bb"]', "[1.5,2.5]", '{"a":{"b":{"c":[1]}}}'])
def test_what_json_takes_is_estimated_from_above(text: str) -> None:
    """Many times the same, by what Python's own accounting says."""
    import tracemalloc

    from traces.jsontext import json_bytes

    many = "[" + ",".join([text] * 2000) + "]"
    tracemalloc.start()
    value = parse_json("x", "file", many)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(value) == 2000
    assert taken <= json_bytes(many) <= 12 * taken


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1\n- 2\n", "file: holds a YAML list, not a table"),
        ("", "file: holds a YAML nothing, not a table"),
        ("a: 1\na: 2\n", "line 2: gives 'a' twice"),
        ("a: &x [*x]\n", "holds an alias of itself"),
        ("a: !!python/object/apply:os.system [id]\n", "line 1: is no YAML"),
        ("a: b: c\n", "line 1: is no YAML"),
        ("a: \x00\n", "line 1: is no YAML"),
        ("? [1, 2]\n: 3\n", "line 1: has a key that is no text"),
        ("a: 2020-13-45\n", "file: is no usable YAML"),
        ("a: " + "[" * 5000 + "\n", "nested too deeply"),
    ],
)
def test_yaml_is_plain_values_alone(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(TraceError) as caught:
        read_yaml(tmp_path / "a.yaml")
    assert says in str(caught.value)


def billion_laughs() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 9)]
    return "\n".join(lines) + "\n"


def test_aliases_that_unfold_without_end_are_refused_before_hydra_follows_them(tmp_path: Path) -> None:
    from sim.paths import check_named, own_folder, use_own_folder

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(billion_laughs())
    says = r"mine\.yaml: line \d+: comes to more than 65536 values by its aliases"
    with pytest.raises(TraceError, match=says):
        use_own_folder(tmp_path)
    assert own_folder() is None
    with pytest.raises(TraceError, match=says):
        check_named(tmp_path)


# -- the bound -----------------------------------------------------------------------------------------------


def test_the_bound_is_set_by_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max_bytes() == 4 << 30
    monkeypatch.setenv(MAX_BYTES, "1000")
    assert max_bytes() == 1000
    check_bytes("f", "file", 1000)
    with pytest.raises(TraceError, match=r"f: file: would take 1001 bytes of memory, at most 1000 are allowed; split"):
        check_bytes("f", "file", 1001)
    budget = Budget("f")
    budget.take("line 1", 600)
    with pytest.raises(TraceError, match="f: line 2: brings what is read to 1200 bytes of memory, at most 1000"):
        budget.take("line 2", 600)
    for wrong in ("0", "-1", "many", "1e9", "1" * 30):
        monkeypatch.setenv(MAX_BYTES, wrong)
        with pytest.raises(ValueError, match=r"EXPERTFLOW_MAX_BYTES=.* must be a whole number of bytes above 0"):
            max_bytes()


def test_a_small_file_grows_by_a_bounded_factor_unless_the_variable_says_more(monkeypatch: pytest.MonkeyPatch) -> None:
    check_expansion("f", "event 0", (16 << 20) + 100 * 16384, 100)
    with pytest.raises(TraceError, match="of a file of 100 at most"):
        check_expansion("f", "event 0", (16 << 20) + 100 * 16384 + 1, 100)
    monkeypatch.setenv(MAX_BYTES, str(1 << 30))
    check_expansion("f", "event 0", 1 << 30, 100)


@pytest.mark.parametrize("command", ["stats", "fit-predictor", "fit"])
def test_a_trace_that_claims_many_experts_makes_no_table_of_their_pairs(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """528 bytes, of which tables of 34 GB a layer would be made."""
    from traces import cli
    from traces.format import About, write_trace

    experts = np.array([[[0, 65_534]] * 2] * 4)
    path = write_trace(
        tmp_path / "wide.safetensors",
        {"experts": experts, "request_start": [0, 4], "prompt_len": [1]},
        About("x", 65_535, "tests", "none"),
    )
    more = {"fit-predictor": [str(tmp_path / "o"), "kind=transition"], "fit": [str(tmp_path / "o")]}
    assert cli.main([command, str(path), *more.get(command, [])]) == 2
    assert f"{path}: num_experts 65535: would take " in capsys.readouterr().err


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    monkeypatch.setattr("traces.reading.check_file", lambda _: 100)
    with pytest.raises(TraceError, match="changes its size while it is read; wait until it is written"):
        read_bytes(path)
