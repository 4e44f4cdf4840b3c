"""Every reader of a file that a user may hand over, with a tiny valid file of its kind.

`READERS` is the one list that the tests of damaged files and the standing attack go by: a new reader is added here,
and all of it is tried on it. A reader returns what it read, or raises a ValueError whose text is one line; anything
else that it raises is a fault of the reader.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from safetensors.numpy import save_file

from tests.attack import files
from tests.support import gguf_models, import_sources


class Reader(NamedTuple):
    """make: writes a valid file into a folder and gives its path. read: opens it, or what was made of it."""

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], Any]


def _text(name: str, content: Callable[[], str]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_text(content(), encoding="utf-8")
        return path

    return make


def _arrays(name: str, content: Callable[[], dict[str, Any]], **header: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        save_file(content(), path, metadata=header or None)
        return path

    return make


def _copied(name: str, content: Callable[[], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content())
        return path

    return make


# -- traces and what they are made of ------------------------------------------------------------------------


def _make_trace(folder: Path) -> Path:
    from traces.format import About, write_trace

    return write_trace(folder / "trace.safetensors", files.trace_arrays(), About("tiny", files.E, "tests", "none"))


def _read_trace(path: Path) -> Any:
    from traces.reader import open_trace

    return open_trace(path)


def _imported(kind: str, **options: Any) -> Callable[[Path], Any]:
    """Import into a folder of its own, and open what was written."""

    def read(path: Path) -> Any:
        from traces.cli import importer_of
        from traces.reader import open_trace

        with tempfile.TemporaryDirectory(prefix="expertflow-") as folder:
            report = importer_of(kind)(path, Path(folder) / "out.safetensors", None, **options)
            trace = open_trace(report.path)
            return dataclasses.replace(report, path=path), {k: np.array(v) for k, v in trace.layout_arrays().items()}

    return read


def _recognised(path: Path) -> Any:
    from traces.importers.auto import recognise

    return recognise(path)


def _read_params(path: Path) -> Any:
    from traces.generate import generate, load_params, split_tokens

    params, header = load_params(path)
    return generate(params, split_tokens(12, 2), 0), header


def _make_recording(folder: Path) -> Path:
    """The journal of a recording that was killed after two requests."""
    from traces.stream import TraceWriter, folder_of

    path = folder / "recorded.safetensors"
    writer = TraceWriter(path, model="tiny", num_experts=files.E, source="tests", license="none", config="{}")
    for request in range(2):
        writer.append(prompt_len=1, context_len=0, label=f"r{request}", experts=files.routing(3, request))
    writer._release()
    return folder_of(path) / "journal.json"


def _read_recording(path: Path) -> Any:
    from traces.format import About, checked_trace
    from traces.journal import Journal

    journal = Journal(path.parent)
    about = About(**journal.facts, request_labels=journal.labels(), header=dict(journal.header))
    return checked_trace(path, journal.arrays(), about), journal.config()


def _read_prompts(path: Path) -> Any:
    from traces.recorder.prompts import read_prompts

    return list(read_prompts(path))


# -- fitted predictors ---------------------------------------------------------------------------------------


def _fitted(kind: str) -> Callable[[Path], Any]:
    """As a run with policy.predictor.fitted=FILE reads it, up to the predictor that is ready to predict."""

    def read(path: Path) -> Any:
        from expertflow.predictors.forest import ForestPredictor
        from expertflow.predictors.hybrid import HybridPredictor
        from expertflow.predictors.transition import TransitionPredictor
        from sim.job.fitted_start import fitted_arrays, transition_start
        from tests.support.workloads import view_of

        predictor: Any
        if kind == "transition":
            predictor = TransitionPredictor(fitted_start=transition_start(str(path), "tiny"))
        else:
            arrays = fitted_arrays(str(path), "tiny", kind)
            predictor = ForestPredictor(arrays) if kind == "forest" else HybridPredictor(arrays)
        predictor.start(view_of(files.L, files.E, files.K), None)
        return predictor

    return read


# -- what runs leave behind ----------------------------------------------------------------------------------


@cache
def _metrics() -> str:
    from sim.job.output import to_json
    from tests.support.commands import job

    words = ("+hardware=a100", "+policy=lru", "trace.num_tokens=8", "trace.num_requests=1", "compare=none")
    return to_json(job(*words))


def _make_metrics(folder: Path) -> Path:
    (folder / "DONE").write_text("{}", encoding="utf-8")
    return _text("metrics.json", _metrics)(folder)


def _provenance() -> str:
    words = ["+hardware=a100", "chunk_mib=4", "policy/eviction=lru", "policy.transfer.serial=true", "trace.path=[a,b]"]
    return json.dumps({"overrides": words, "wall_s": 1.5})


def _read_provenance(path: Path) -> Any:
    from sim.job.given import columns, given_in

    return given_in(path), columns([path.parent], ())


def _read_metrics(path: Path) -> Any:
    from sim.collect import collect, write_table

    table = collect(path.parent)
    with tempfile.TemporaryDirectory(prefix="expertflow-") as folder:
        write_table(table, Path(folder), "table")
    return table


def _read_pins(path: Path) -> Any:
    from sim.regress import read_pins

    return read_pins(path)


def _read_ratios(path: Path) -> Any:
    from sim.bench import read_ratios

    return read_ratios(path)


def _read_done(path: Path) -> Any:
    from sim.job.decided import stands

    return stands(path, "0" * 64)


@cache
def _timeline() -> str:
    from sim.views.timeline import Timeline
    from tests.unit.views.support import by_hand, run

    timeline = Timeline("lru", 4)
    run(by_hand(), 4, 3, [timeline])
    with tempfile.TemporaryDirectory(prefix="expertflow-") as folder:
        timeline.write(Path(folder) / "timeline.json")
        return (Path(folder) / "timeline.json").read_text(encoding="utf-8")


def _read_timeline(path: Path) -> Any:
    from sim.views.timeline import load_timeline

    return load_timeline(path)


def _make_log(folder: Path) -> Path:
    from tests.lockstep.support import small_header, some_forwards, write_events

    return write_events(folder / "records.parquet", small_header(), some_forwards())


def _read_log(path: Path) -> Any:
    from replay.lockstep.log_reader import LogReader

    with LogReader(path) as reader:
        return reader.header, list(reader)


def _make_kept(folder: Path) -> Path:
    from traces.kept import KeptArrays

    kept = KeptArrays(folder)
    kept.keep("scores", (6, 4), np.int64, [np.arange(12).reshape(3, 4), np.arange(12).reshape(3, 4)])
    return kept._path("scores")


def _read_kept(path: Path) -> Any:
    from traces.kept import KeptArrays

    found = KeptArrays(path.parent).find("scores", (6, 4), np.int64)
    if found is None:
        return None
    rows = np.empty((6, 4), np.int64)
    assert found.read(0, rows) == len(rows)
    return rows


# -- machines and models -------------------------------------------------------------------------------------


def _calibration() -> str:
    from tests.timing.validation.test_refused import whole

    return json.dumps(whole())


def _read_calibration(path: Path) -> Any:
    from replay.calibration.profile import simulated_as
    from replay.calibration.record import load_record
    from sim.specs.hardware import Stack

    raw = load_record(path, 1)
    return [simulated_as(raw, "mine", model, "lru", Stack("eager", 5, 5)) for model in raw["kernels"]]


def _shipped_yaml(group: str, name: str) -> Callable[[], str]:
    def content() -> str:
        from sim.paths import CONF

        return (CONF / group / f"{name}.yaml").read_text(encoding="utf-8")

    return content


def _profile_yaml() -> str:
    from replay.calibration.profile import profiles
    from tests.timing.validation.test_refused import whole

    return yaml.safe_dump(profiles(whole(), "mine")[0], sort_keys=False)


def _spec(group: str) -> Callable[[Path], Any]:
    """The file by itself, as a command says what is wrong with it."""

    def read(path: Path) -> Any:
        from expertflow.model import model_from_dict
        from sim.job.errors import one_line
        from sim.specs.hardware import hardware_from_dict, stack_from_dict
        from sim.specs.links import link_from_dict
        from sim.specs.storage import storage_from_dict
        from traces.yamltext import read_yaml

        kinds: dict[str, Any] = {
            "hardware": hardware_from_dict,
            "link": link_from_dict,
            "stack": stack_from_dict,
            "storage": storage_from_dict,
            "model": model_from_dict,
        }
        try:
            return kinds[group](read_yaml(path))
        except ValueError as error:
            raise ValueError(one_line(error)) from error

    return read


def _read_model(path: Path) -> Any:
    """As model.path=FILE reads it, up to the YAML that python -m sim.model prints."""
    from sim.model import as_yaml
    from sim.specs.model_file import read_model_file

    found = read_model_file(path)
    return found, as_yaml(found)


def _composed(group: str) -> Callable[[Path], Any]:
    """As a command reads the file mine.yaml of a user's own folder: FOLDER/GROUP/mine.yaml."""

    def read(path: Path) -> Any:
        from sim.job.errors import one_line
        from sim.job.setup import make_workload
        from sim.study.plan import load_study
        from tests.attack.composing import composed, own_folder

        try:
            if group == "study":
                with own_folder(group, path):
                    return load_study("mine")
            return make_workload(composed(group, path))
        except AssertionError:
            raise
        except Exception as error:
            told = one_line(error)  # as the command says it
            if told is None:
                raise
            raise ValueError(told) from error

    return read


def _read_cases(path: Path) -> Any:
    from sim.published import read_cases

    return [(group.name, [row.measured for row in rows]) for group, rows in read_cases(path)]


def _make_gguf(model: Callable[[], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return gguf_models.write(folder / "m.gguf", *model())

    return make


def _make_gguf_parts(folder: Path) -> Path:
    """Two parts of one model; the first is attacked."""
    return gguf_models.in_parts(folder, "m", gguf_models.tiny(), 20)[0]


def _read_gguf(path: Path) -> Any:
    from sim.specs.gguf_header import read_gguf

    return read_gguf(path)


# -- twins ---------------------------------------------------------------------------------------------------


def _make_twin(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for file, content in _twin().items():
            path = folder / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        return folder / name

    return make


@cache
def _twin() -> dict[str, bytes]:
    """The files of a tiny twin that was trained for two steps."""
    from tests.unit.twin.tiny import train, write_text

    with tempfile.TemporaryDirectory(prefix="expertflow-") as name:
        folder = Path(name)
        train(folder / "twin", write_text(folder / "text"), 2)
        found = (path for path in (folder / "twin").rglob("*") if path.is_file())
        return {path.relative_to(folder / "twin").as_posix(): path.read_bytes() for path in sorted(found)}


def _read_twin(path: Path) -> Any:
    from traces.twin.checkpoint import read_model, read_settings, read_tokenizer

    folder = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
    settings = read_settings(folder)
    return settings, read_tokenizer(folder, settings), read_model(folder, settings)


def _read_moments(path: Path) -> Any:
    import torch

    from traces.twin.checkpoint import read_model, read_optimizer, read_settings

    folder = path.parent.parent
    model, state = read_model(folder, read_settings(folder))
    optimizer = torch.optim.AdamW(model.parameters())
    read_optimizer(folder, model, optimizer, state["step"])
    return optimizer


def _read_curve(path: Path) -> Any:
    from traces.twin.train import _read_curve

    return _read_curve(path, 100)


READERS: list[Reader] = [
    Reader("trace", _make_trace, _read_trace),
    Reader("generator-params", _arrays("g.params.safetensors", files.params, **files.PARAMS_HEADER), _read_params),
    Reader("recording", _make_recording, _read_recording),
    Reader("prompts-jsonl", _text("p.jsonl", files.prompts), _read_prompts),
    Reader("prompts-txt", _text("p.txt", lambda: "A first prompt.\nA second one.\n"), _read_prompts),
    Reader("gpt-oss-json", _text("r.json", lambda: json.dumps(files.fingerprints())), _imported("gpt-oss-json")),
    Reader("gpt-oss-jsonl", _text("r.jsonl", lambda: files.lines(files.fingerprints())), _imported("gpt-oss-json")),
    Reader("moe-beyond-csv", _text("a.csv", files.activations), _imported("moe-beyond-csv")),
    Reader("route-csv", _text("r.csv", files.routes), _imported("route-csv", model="tiny")),
    Reader("event-csr", _arrays("e.safetensors", files.events, model="tiny"), _imported("event-csr")),
    Reader("engine-npy", _copied("d.npy", files.npy), _imported("engine-dumps", model="tiny")),
    Reader("engine-npz", _copied("d.npz", files.npz), _imported("engine-dumps", model="tiny")),
    Reader("engine-npz-compressed", _copied("d.npz", files.npz_compressed), _imported("engine-dumps", model="tiny")),
    Reader(
        "engine-json",
        _text("d.json", lambda: json.dumps(files.answers())),
        _imported("engine-dumps", model="tiny", num_layers=files.L, top_k=files.K),
    ),
    Reader(
        "engine-jsonl",
        _text("d.jsonl", lambda: files.lines(files.answers())),
        _imported("engine-dumps", model="tiny", num_layers=files.L, top_k=files.K),
    ),
    Reader("vllm-log", import_sources.vllm, _imported("vllm-log")),
    Reader("llama-csv", import_sources.llama_upstream, _imported("llama-csv", top_k=2)),
    Reader("llama-csv-tokens", import_sources.llama_with_tokens, _imported("llama-csv")),
    Reader("nested-json", import_sources.nested, _imported("nested-json")),
    Reader("nested-json-flat", import_sources.flat, _imported("nested-json", prompt_len=4)),
    Reader("nested-json-bare", import_sources.bare_lists, _imported("nested-json", prompt_len=4)),
    Reader("megatron", import_sources.megatron, _imported("megatron")),
    Reader("sglang-steps", import_sources.sglang_steps, _imported("sglang-recorder")),
    Reader("sglang-dump", import_sources.sglang_dump, _imported("sglang-recorder")),
    Reader("table-jsonl", import_sources.table_jsonl, _imported("table")),
    Reader("table-parquet", import_sources.table_parquet, _imported("table")),
    Reader("table-packed", import_sources.table_packed, _imported("table")),
    Reader("table-objects", import_sources.table_objects, _imported("table")),
    Reader("table-melted", import_sources.table_melted, _imported("table", prompt_len=4)),
    Reader("table-batches", import_sources.table_of_batches, _imported("table")),
    Reader("table-csv", import_sources.table_csv_of_lists, _imported("table", positions=True)),
    Reader("table-text", import_sources.table_text, _imported("table", token="1", layer="2", expert="3,4")),
    Reader(
        "table-binary",
        import_sources.table_binary,
        _imported("table", fields="t:u4,l:u2,e:u2*2", token="t", layer="l", expert="e"),
    ),
    Reader("recognised", import_sources.llama_with_tokens, _recognised),
    Reader("fitted-transition", _arrays("t.safetensors", files.transition), _fitted("transition")),
    Reader("fitted-network", _arrays("n.safetensors", files.network), _fitted("hybrid")),
    Reader("fitted-forest", _arrays("f.safetensors", files.forest), _fitted("forest")),
    Reader("metrics", _make_metrics, _read_metrics),
    Reader("provenance", _text("provenance.json", _provenance), _read_provenance),
    Reader("bench-ratios", _text("bench.json", files.ratios), _read_ratios),
    Reader("golden-runs", _text("runs.json", files.pins), _read_pins),
    Reader("done", _text("DONE", files.done), _read_done),
    Reader("timeline", _text("timeline.json", _timeline), _read_timeline),
    Reader("lockstep-log", _make_log, _read_log),
    Reader("kept-scores", _make_kept, _read_kept),
    Reader("calibration", _text("mine.calibration.json", _calibration), _read_calibration),
    Reader("hardware-yaml", _text("mine.yaml", _profile_yaml), _spec("hardware")),
    Reader("link-yaml", _text("mine.yaml", _shipped_yaml("link", "pcie4x8")), _spec("link")),
    Reader("stack-yaml", _text("mine.yaml", _shipped_yaml("stack", "graph")), _spec("stack")),
    Reader("storage-yaml", _text("mine.yaml", _shipped_yaml("storage", "nvme-gen4")), _spec("storage")),
    Reader("model-yaml", _text("mine.yaml", _shipped_yaml("model", "gpt-oss-20b")), _spec("model")),
    Reader("model-config", _text("config.json", lambda: json.dumps(files.model_config())), _read_model),
    Reader("model-config-hybrid", _text("config.json", lambda: json.dumps(files.hybrid_config())), _read_model),
    Reader("hardware-composed", _text("mine.yaml", _profile_yaml), _composed("hardware")),
    Reader("link-composed", _text("mine.yaml", _shipped_yaml("link", "pcie4x8")), _composed("link")),
    Reader("host-composed", _text("mine.yaml", _shipped_yaml("host", "desktop")), _composed("host")),
    Reader("stack-composed", _text("mine.yaml", _shipped_yaml("stack", "graph")), _composed("stack")),
    Reader("storage-composed", _text("mine.yaml", _shipped_yaml("storage", "nvme-gen4")), _composed("storage")),
    Reader("model-composed", _text("mine.yaml", _shipped_yaml("model", "gpt-oss-20b")), _composed("model")),
    Reader("gguf", _make_gguf(gguf_models.tiny), _read_gguf),
    Reader("gguf-hybrid", _make_gguf(gguf_models.tiny_hybrid), _read_gguf),
    Reader("gguf-parts", _make_gguf_parts, _read_gguf),
    Reader("study-yaml", _text("mine.yaml", files.study), _composed("study")),
    Reader("published-yaml", _text("cases.yaml", files.published), _read_cases),
    Reader("twin-settings", _make_twin("twin.json"), _read_twin),
    Reader("twin-state", _make_twin("checkpoint-00000002/state.json"), _read_twin),
    Reader("twin-weights", _make_twin("checkpoint-00000002/model.safetensors"), _read_twin),
    Reader("twin-moments", _make_twin("checkpoint-00000002/optimizer.safetensors"), _read_moments),
    Reader("twin-curve", _make_twin("loss.csv"), _read_curve),
]
"""Name, `make(folder) -> path` and `read(path) -> object` of each."""
