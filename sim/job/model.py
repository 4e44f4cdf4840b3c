"""The model of a run: named, named by its trace, or read from a file of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expertflow.expert_sizes import least_and_most
from expertflow.keys import declared, nearest, shown, unknown_key
from expertflow.model import ModelSpec, model_from_dict
from sim.job.compose import composed_file
from sim.job.keys import ModelKeys
from sim.paths import config_files
from sim.specs.model_file import ReadModel, read_model_file
from traces.reader import Trace

AUTO = "auto"
_PATH = "path"


def model_file_of(cfg: Mapping[str, Any]) -> ReadModel | None:
    """What the file tells that the group `model` of a configuration names; None where it names none."""
    for name, key in declared(ModelKeys).items():
        key.check(cfg.get(name), f"model.{name}")
    path = cfg.get(_PATH)
    if path is None:
        return None
    if "source" in cfg and "num_layers" in cfg:
        raise ValueError(
            f"model.path={shown(path)} and model={shown(cfg.get('name'))} are two models; leave one out "
            "(model.KEY=VALUE changes a key of either)"
        )
    _check_path(str(path))
    return read_model_file(Path(path))


def _check_path(path: str) -> None:
    """ValueError for what is read another way than from a file that describes a model."""
    if "://" in path:
        raise ValueError(f"model.path={shown(path)} is an address; download its config.json and give that file")
    file = Path(path)
    if file.suffix in (".yaml", ".yml"):
        raise ValueError(
            f"model.path={shown(path)} takes no YAML; put the file into FOLDER/model/ and say "
            f"--config-dir=FOLDER model={file.stem[:60]}"
        )
    if not file.exists() and path != AUTO and path in config_files("model"):
        raise ValueError(f"model.path={shown(path)}: there is no such file, but a model of that name; say model={path}")


def told_model(cfg: Mapping[str, Any], model_file: ReadModel | None = None) -> ModelSpec | None:
    """The model that the group `model` of a configuration names or reads; None where that is left to the trace.

    model_file: what `model_file_of` has read (None: read it). ValueError for keys that exclude each other.
    """
    model_file = model_file or model_file_of(cfg)
    keys = {key: value for key, value in cfg.items() if key != _PATH}
    if model_file is not None:
        changes = {key: value for key, value in keys.items() if (key, value) != ("name", AUTO)}
        return model_from_dict({**asdict(model_file.spec), **changes}) if changes else model_file.spec
    return None if keys.get("name") == AUTO else model_from_dict(keys)


def chosen_model(cfg: Mapping[str, Any], trace: Trace, model_file: ReadModel | None = None) -> ModelSpec:
    """The model of the group `model` of a configuration. model_file: what `model_file_of` has read (None: read it).

    ValueError, one line, for keys that exclude each other and for a trace whose model is not known.
    """
    told = told_model(cfg, model_file)
    if told is not None:
        return told
    extra = sorted(set(cfg) - {"name", _PATH})
    if extra:
        known = [*declared(ModelKeys), *declared(ModelSpec)]
        if extra[0] not in known:
            raise unknown_key("model", extra[0], known)
        raise ValueError(
            f"model.{extra[0]} means nothing with model=auto; name the model to change its sizes, or give model.path"
        )
    # A twin has its original's topology; sizes and speeds come from the original.
    name = trace.model.removesuffix("-twin")
    files = config_files("model")
    del files[AUTO]
    if name not in files:
        raise ValueError(
            f"the trace {trace.name} names the model {trace.model!r}, of which no sizes are known; "
            f"say model.path=FILE (a config.json), or model=NAME with one of: {nearest(name, sorted(files), 120)}"
        )
    return model_from_dict(composed_file("model", name))


def remarks(model: ModelSpec, model_file: ReadModel | None) -> Iterator[str]:
    """What a reader of the result must know of a model that was read from a file: a sentence each."""
    if model_file is None:
        return
    read = asdict(model_file.spec)
    for key, value in asdict(model).items():
        if value != read[key]:
            yield f"model: {key}={shown(value)}, in place of {shown(read[key])}"
    yield from (f"model: derived: {text}" for text in model_file.derived)
    yield from (f"model: assumed: {text}" for text in model_file.assumed)


def size_remarks(model: ModelSpec, trace: Trace) -> Iterator[str]:
    """What a reader must know where sizes of experts are those that the trace was recorded with."""
    sizes = trace.expert_bytes
    if sizes is not None and model.expert_bytes == sizes:
        least, most = least_and_most(sizes)
        text = f"{least}" if least == most else f"{least} to {most}"
        yield f"experts take {text} bytes, as the trace says; model.expert_bytes=N gives another size"


def recorded(model: ModelSpec, model_file: ReadModel | None) -> dict[str, Any]:
    """The model as a result records it: every size, so that it can be run again without the file that gave them."""
    found: dict[str, Any] = {"model": asdict(model)}
    if model_file is not None:
        found["model_file"] = {"derived": list(model_file.derived), "assumed": list(model_file.assumed)}
    return found
