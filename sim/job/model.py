"""The model of a run: named, named by its trace, or read from a file of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expertflow.expert_sizes import BY_BITS, least_and_most
from expertflow.keys import declared, nearest, shown, unknown_key
from expertflow.model import ModelSpec, model_from_dict
from sim.job.compose import composed_file
from sim.job.keys import ModelKeys
from sim.paths import config_files
from sim.specs.model_file import ReadModel, read_model_file
from traces.reader import Trace

AUTO = "auto"
_PATH = "path"
_COUNTED = ("linear_params", "linear_state", "extra_attention_params", "extra_params", "extra_bytes", "mtp_bytes")
"""Keys that give a number of weights or bytes as such."""
_WIDTHS = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "v_dim", "vocab_size")
"""Keys on which the numbers of `_COUNTED` depended when they were made."""


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
        # As `traces record` writes it. Said and not taken: whose sizes a run has, its command tells.
        beside = trace.paths[0].with_suffix(".config.json")
        if beside.is_file():
            raise ValueError(
                f"the trace {trace.name} names the model {trace.model!r}, of which no sizes are known; {beside.name} "
                f"lies beside it: say model.path={beside}"
            )
        raise ValueError(
            f"the trace {trace.name} names the model {trace.model!r}, of which no sizes are known; "
            f"say model.path=FILE (a config.json), or model=NAME with one of: {nearest(name, sorted(files), 120)}"
        )
    return model_from_dict(composed_file("model", name))


def incomplete(model_file: ReadModel | None) -> list[str]:
    """What a reader of any result must know first: that a part of the model is not from its file."""
    return [] if model_file is None else [f"model: incomplete: {text}" for text in model_file.incomplete]


def remarks(model: ModelSpec, model_file: ReadModel | None) -> Iterator[str]:
    """What a reader of the result must know of how far the model is that of its file, or of the named one: a sentence
    each."""
    original = model_file.spec if model_file is not None else _named(model.name)
    if original is None:
        return
    read, now = asdict(original), asdict(model)
    changed = [key for key in now if now[key] != read[key]]
    if model_file is not None:
        for key in changed:
            # That sizes of the file hold no longer is said by `size_remarks`.
            if key != "expert_bytes" or now[key] is not None:
                yield f"model: {key}={shown(now[key])}, in place of {shown(read[key])}"
    kept = [key for key in _COUNTED if now[key] and key not in changed]
    if kept and set(changed) & set(_WIDTHS):
        yield f"model: {', '.join(kept)} as the file gives them: they follow no width, give them, too, if they change"
    if model.mtp and "mtp_bytes" not in changed and set(changed) & {"expert_bits", "weight_bits"}:
        yield f"model: mtp_bytes={model.mtp_bytes} as the file gives it: it follows no bits, give it, too"
    if model_file is not None:
        yield from (f"model: derived: {text}" for text in model_file.derived)
        yield from (f"model: assumed: {text}" for text in model_file.assumed)


def _named(name: str) -> ModelSpec | None:
    """The model of that name as its file gives it; None where there is none."""
    return model_from_dict(composed_file("model", name)) if name in config_files("model") and name != AUTO else None


def size_remarks(cfg: Mapping[str, Any], model: ModelSpec, trace: Trace, model_file: ReadModel | None) -> Iterator[str]:
    """What a reader must know where sizes of experts are those that the trace was recorded with, or where what the
    configuration says has taken the place of sizes that the trace or the model's file gives.

    cfg: the group `model`.
    """
    sizes = trace.expert_bytes
    if cfg.get("expert_bytes") == BY_BITS:
        givers = [
            *(["the model's file"] if _file_has_sizes(cfg, model_file) else []),
            *(["the trace"] if sizes else []),
        ]
        if givers:
            yield (
                f"model: an expert takes {model.mean_expert_bytes} bytes, {model.expert_params} weights of "
                f"{model.expert_bits:g} bits: the sizes that {' and '.join(givers)} gives hold no longer"
            )
    if sizes is not None and model.expert_bytes == sizes:
        least, most = least_and_most(sizes)
        text = f"{least}" if least == most else f"{least} to {most}"
        yield f"experts take {text} bytes, as the trace says; model.expert_bytes=N gives another size"


def _file_has_sizes(cfg: Mapping[str, Any], model_file: ReadModel | None) -> bool:
    """Whether the file that the model was read from, or the one of its name, lists sizes of experts."""
    if model_file is not None:
        return model_file.spec.expert_bytes is not None
    name = str(cfg.get("name"))
    return name in config_files("model") and composed_file("model", name).get("expert_bytes") is not None


def recorded(model: ModelSpec, model_file: ReadModel | None) -> dict[str, Any]:
    """The model as a result records it: every size, so that it can be run again without the file that gave them."""
    found: dict[str, Any] = {"model": asdict(model)}
    if model_file is not None:
        found["model_file"] = {"derived": list(model_file.derived), "assumed": list(model_file.assumed)}
        if model_file.incomplete:
            found["model_file"]["incomplete"] = list(model_file.incomplete)
    return found
