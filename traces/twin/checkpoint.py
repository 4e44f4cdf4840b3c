"""What a twin's folder holds, written atomically and read as untrusted input.

    twin.json              settings, fixed when training begins
    tokenizer.json         the tokenizer (empty: plain bytes)
    loss.csv               the loss curve
    checkpoint-00000100/   model.safetensors, optimizer.safetensors, state.json of one step

A checkpoint appears under its name when it is whole; the one with the highest step counts. Nothing in these files is
executed: they are JSON and safetensors, and every name, shape, type and value in them is checked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from traces.container import fault, map_file
from traces.files import replace_text, writing
from traces.jsontext import shown
from traces.processes.whole import Unfinished, clear, remove_folder
from traces.reading import read_table
from traces.twin.config import TwinConfig
from traces.twin.model import Twin
from traces.twin.text import Tokenizer

TOKENIZERS = ("bpe", "bytes")
_MAX_JSON_BYTES = 1 << 20
_MOST_SECONDS = 1e10
_MOST_WEIGHT = 1e12
_SQUARES = "exp_avg_sq."
_NAME = re.compile(r"checkpoint-(\d{8})")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_REMEDY = "train it again in a new folder"


@dataclass(frozen=True)
class Settings:
    """What a training is, but for its length: the same settings and steps give the same weights on a CPU.

    batch: sequences a step, each of config.context tokens; lr: the peak learning rate; warmup: steps up to it; balance:
    weight of the load-balancing loss of each layer. text: a folder of documents, "" for the standard library;
    text_sha256: of their contents.
    """

    config: TwinConfig
    seed: int
    batch: int
    lr: float
    warmup: int
    balance: float
    tokenizer: str
    text: str
    text_sha256: str

    def __post_init__(self) -> None:
        for key, low, high in (("seed", 0, 1 << 31), ("batch", 1, 1 << 14), ("warmup", 1, 1 << 20)):
            value = getattr(self, key)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{key}={value!r} must be a whole number in {low} … {high}")
        for key, highest in (("lr", 1.0), ("balance", 100.0)):
            value = getattr(self, key)
            if type(value) not in (int, float) or not 0 <= value <= highest:
                raise ValueError(f"{key}={value!r} must lie in 0 … {highest:g}")
        if self.tokenizer not in TOKENIZERS:
            raise ValueError(f"tokenizer={self.tokenizer!r} is unknown; known are {', '.join(TOKENIZERS)}")
        if not isinstance(self.text, str) or not re.fullmatch(r"[0-9a-f]{64}", str(self.text_sha256)):
            raise ValueError("text must be a path and text_sha256 64 hex digits")


def write_settings(folder: Path, settings: Settings, tokenizer: Tokenizer) -> None:
    """Make `folder` that of a new twin: tokenizer first, so that settings never stand alone."""
    replace_text(folder / "tokenizer.json", tokenizer.text())
    replace_text(folder / "twin.json", json.dumps(asdict(settings), indent=1) + "\n")


def read_settings(folder: Path) -> Settings:
    """The settings of the twin in `folder`; ValueError where there is none, or they are spoiled."""
    path = folder / "twin.json"
    if folder.is_dir() and not path.exists():
        raise fault(folder, "twin", "is not the folder of a twin", "train one there: python -m traces.twin train")
    values = _read_json(path)
    known = set(Settings.__dataclass_fields__)
    if set(values) != known:
        raise fault(path, "settings", f"are not {', '.join(sorted(known))}", _REMEDY)
    try:
        return Settings(**{**values, "config": TwinConfig.from_json(values["config"])})
    except ValueError as error:
        raise fault(path, "settings", str(error), _REMEDY) from None


def read_tokenizer(folder: Path, settings: Settings) -> Tokenizer:
    """The twin's tokenizer; ValueError where it is spoiled or gives other ids than the model knows."""
    tokenizer = Tokenizer.read(folder / "tokenizer.json")
    if tokenizer.size != settings.config.vocab_size:
        problem = f"has {tokenizer.size} tokens, the model {settings.config.vocab_size}"
        raise fault(folder / "tokenizer.json", "tokenizer", problem, _REMEDY)
    return tokenizer


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints, in rising order."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def write_checkpoint(folder: Path, model: Twin, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Path:
    """Save model, optimizer and state (`step` among it); older checkpoints go once the new one stands."""
    target = folder / f"checkpoint-{state['step']:08d}"
    clear(folder)  # what a run that was killed has left
    if target.exists():  # as after a resume of no steps
        remove_folder(target)
    with writing(target), Unfinished(target, folder=True) as unfinished:
        _write_parts(unfinished.path, model, optimizer, state)
    for _, path in checkpoints(folder)[:-1]:
        remove_folder(path)
    return target


def _write_parts(folder: Path, model: Twin, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """The files of one checkpoint, on disk when this returns."""
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    # The library's own writing to a file tells no full disk from other faults.
    (folder / "model.safetensors").write_bytes(save(weights))
    moments = {}
    for name, parameter in model.named_parameters():
        for moment in _MOMENTS:
            moments[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    (folder / "optimizer.safetensors").write_bytes(save(moments))
    (folder / "state.json").write_text(json.dumps(dict(state), indent=1) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def read_model(folder: Path, settings: Settings) -> tuple[Twin, dict[str, Any]]:
    """The model of the latest checkpoint, in eval mode, and its state; ValueError where there is none, or a fault."""
    path = _latest(folder)
    with torch.device("meta"):
        model = Twin(settings.config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights = dict(_read_tensors(path / "model.safetensors", shapes))
    model.load_state_dict(weights, assign=True)
    return model.eval(), _read_state(path)


def read_optimizer(folder: Path, model: Twin, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Give `optimizer` the moments of the latest checkpoint."""
    path = _latest(folder) / "optimizer.safetensors"
    parameters = dict(model.named_parameters())
    shapes = {f"{moment}.{name}": tuple(p.shape) for name, p in parameters.items() for moment in _MOMENTS}
    for name, tensor in _read_tensors(path, shapes):
        moment, _, of = name.partition(".")
        parameter = parameters[of]
        optimizer.state[parameter][moment] = tensor.to(parameter.device)
        optimizer.state[parameter]["step"] = torch.tensor(float(step), device=parameter.device)


def _latest(folder: Path) -> Path:
    found = checkpoints(folder)
    if not found:
        raise fault(folder, "checkpoint", "there is none", "train longer: python -m traces.twin train")
    return found[-1][1]


def _read_state(path: Path) -> dict[str, Any]:
    state = _read_json(path / "state.json")
    step, seconds = state.get("step"), state.get("seconds")
    if type(step) is not int or step < 0 or step >= 10**8 or f"checkpoint-{step:08d}" != path.name:
        raise fault(path / "state.json", "step", f"is {shown(step)}, not that of its folder", _REMEDY)
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds <= _MOST_SECONDS:
        raise fault(path / "state.json", "seconds", f"is {shown(seconds)}", _REMEDY)
    return state


def _read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Exactly the named float32 arrays; what their shapes ask for is in the file, so no size is taken on trust."""
    arrays = map_file(path).arrays
    if set(arrays) != set(shapes):
        name = sorted(set(arrays) ^ set(shapes))[0]
        raise fault(path, f"array {name[:80]!r}", "is " + ("unknown" if name in arrays else "missing"), _REMEDY)
    for name, array in arrays.items():
        if array.dtype != np.float32 or array.shape != shapes[name]:
            problem = f"is {array.dtype} {list(array.shape)}, needed is float32 {list(shapes[name])}"
            raise fault(path, f"array {name!r}", problem, _REMEDY)
        if not np.isfinite(array).all():
            raise fault(path, f"array {name!r}", "holds values that are not finite", _REMEDY)
        if np.abs(array).max(initial=0) > _MOST_WEIGHT or (name.startswith(_SQUARES) and array.min(initial=0) < 0):
            problem = f"holds values beyond {_MOST_WEIGHT:g}, or below 0 where squares are kept"
            raise fault(path, f"array {name!r}", problem, _REMEDY)
        yield name, torch.from_numpy(array.copy())


def _read_json(path: Path) -> dict[str, Any]:
    return read_table(path, _REMEDY, _MAX_JSON_BYTES)
