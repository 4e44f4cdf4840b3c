"""A study as its file describes it, and the cells that it comes to. Runs nothing.

A cell is one run: one value of each axis, and one variant. Overrides are those of `python -m sim`; `{name}` in them
stands for a parameter of the study, given as `--set name=value`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from expertflow.keys import near_to
from sim.paths import config_files
from sim.study.checks import check_form, check_needed
from traces.jsontext import shown
from traces.shipped import is_here, offered, twins_of
from traces.yamltext import read_yaml

KINDS = ("runs", "estimates")
MAX_CELLS = 100_000
_EXTRAS = {
    "tables": {"title", "value", "rows", "columns", "variants", "only", "percent", "digits", "note"},
    "claims": {"name", "variants", "column", "at_most", "at_least", "split"},
    "best": {"name", "variant", "of", "column"},
    "pairs": {"name", "axis", "slow", "fast", "column"},
    "crossings": {"name", "axis", "variants", "column"},
    "pictures": {"file", "kind", "value", "variants", "marked", "line", "title", "heading", "axis", "axis_title"},
}
"""What each list that is evaluated after the runs may say."""


@dataclass(frozen=True)
class Study:
    """One file of `conf/study`.

    axes: name -> value -> overrides. variants: name -> overrides, compared within a cell's place. perfect: the variant
    with perfect prediction, for the gap that is closed. optional: variants that are left out, with the reason said,
    where a trace lacks what they need. parameters: name -> what it is, asked for when it is needed and not among
    `defaults`. recordings: parameter -> the model of `conf/model` that it must be a trace of.
    """

    name: str
    about: str
    kind: str = "runs"
    parameters: Mapping[str, str] = field(default_factory=dict)
    recordings: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    base: tuple[str, ...] = ()
    axes: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    perfect: str = "perfect"
    optional: tuple[str, ...] = ()
    tables: tuple[Mapping[str, Any], ...] = ()
    claims: tuple[Mapping[str, Any], ...] = ()
    best: tuple[Mapping[str, Any], ...] = ()
    pairs: tuple[Mapping[str, Any], ...] = ()
    crossings: tuple[Mapping[str, Any], ...] = ()
    pictures: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Cell:
    """One run: where it stands, and the overrides that make it.

    recordings: the parameters that name its trace, each with what was given for it and the model that it must be of.
    """

    place: tuple[tuple[str, str], ...]
    variant: str
    overrides: tuple[str, ...]
    recordings: tuple[tuple[str, str, str], ...] = ()

    def __str__(self) -> str:
        return " ".join([*(f"{axis}={value}" for axis, value in self.place), f"variant={self.variant}"])


def load_study(name: str) -> Study:
    """The study of that name; ValueError with the choices if there is none."""
    known = config_files("study")
    if name not in known:
        raise ValueError(
            f"study {name!r} does not exist{near_to(name, known)}; choose one of: {', '.join(sorted(known))}"
        )
    return read_study(known[name])


def read_study(path: Path) -> Study:
    """The study in one file; ValueError names file and key of what is wrong in it."""
    content = read_yaml(path, "write it as the shipped studies are (expertflow study --help)")
    known = {
        "name",
        "about",
        "kind",
        "parameters",
        "recordings",
        "defaults",
        "base",
        "axes",
        "variants",
        "sweeps",
        "perfect",
        "optional",
        *_EXTRAS,
    }
    for key in content:
        if key not in known:
            raise ValueError(f"{path.name}: {key} is no key of a study; known: {', '.join(sorted(known))}")
    if content.get("name") != path.stem or not isinstance(content.get("about"), str):
        raise ValueError(f"{path.name}: needs name: {path.stem}, as the file, and about: one sentence")
    if content.get("kind", "runs") not in KINDS:
        raise ValueError(f"{path.name}: kind={shown(content['kind'])} is unknown; choose one of: {', '.join(KINDS)}")
    check_form(path.name, content)
    given: dict[str, Any] = dict(content)
    given["base"] = tuple(map(str, given.get("base", ())))
    given["axes"] = {str(axis): _lists(values) for axis, values in given.get("axes", {}).items()}
    given["variants"] = _lists(given.get("variants", {}))
    given["variants"] |= _sweep(path.name, given.pop("sweeps", {}), given["variants"])
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    study = Study(**plain)
    _check_recordings(study, path.name)
    _check_extras(study, path.name)
    check_needed(path.name, content)
    return study


def _lists(values: Mapping[str, Sequence[str] | None]) -> dict[str, tuple[str, ...]]:
    return {str(name): tuple(map(str, overrides or ())) for name, overrides in values.items()}


def _sweep(file: str, sweeps: Mapping[str, Any], variants: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """One variant per value of each swept key: `of` a variant, everything else as there."""
    found: dict[str, tuple[str, ...]] = {}
    for of, keys in sweeps.items():
        if str(of) not in variants:
            raise ValueError(f"{file}: sweeps names the variant {of}, which is none of: {', '.join(variants)}")
        start = variants[str(of)]
        for key, values in keys.items():
            more, _, swept = str(key).rpartition(" ")
            for value in values:
                found[f"{re.split('[./]', swept)[-1]}={value}"] = (*start, *more.split(), f"{swept}={value}")
    return found


def _check_recordings(study: Study, file: str) -> None:
    # Which model is meant by auto, the trace would say.
    models = config_files("model").keys() - {"auto"}
    for name, model in study.recordings.items():
        if name not in study.parameters:
            raise ValueError(f"{file}: recordings names {name}, which is not among its parameters")
        if model not in models:
            raise ValueError(
                f"{file}: recordings names the model {shown(model)}, which does not exist{near_to(str(model), models)}"
            )


def _check_extras(study: Study, file: str) -> None:
    named = [("optional", variant) for variant in study.optional]
    for part, known in _EXTRAS.items():
        for entry in getattr(study, part):
            unknown = sorted(set(entry) - known)
            if unknown:
                raise ValueError(f"{file}: {part} has no key {unknown[0]}; known: {', '.join(sorted(known))}")
            for key in ("variants", "of", "marked"):
                named += [(part, variant) for variant in entry.get(key, ())]
            named += [(part, entry["variant"])] if "variant" in entry else []
    for entry in study.crossings:
        if len(entry.get("variants", ())) != 2 or entry.get("axis") not in study.axes:
            raise ValueError(f"{file}: crossings needs two variants and an axis of: {', '.join(study.axes)}")
    for part, variant in named:
        if variant not in study.variants:
            raise ValueError(
                f"{file}: {part} names the variant {variant}, which is none of the study's: {', '.join(study.variants)}"
            )


def cells(
    study: Study, values: Mapping[str, str], added: Sequence[str] = (), only: Mapping[str, Sequence[str]] | None = None
) -> list[Cell]:
    """Every cell, variants innermost.

    values: of the parameters. added: overrides, stronger than the study's: of every run, or as `NAME,…:KEY=VALUE` of
    those of the variants and values of axes that are named. only: axis (or `variant`) -> the names that are wanted.
    """
    only, values = dict(only or {}), {**study.defaults, **values}
    axes = {axis: _wanted(axis, list(named), only) for axis, named in study.axes.items()}
    variants = _wanted("variant", list(study.variants), only)
    if only:
        raise ValueError(f"--only {next(iter(only))}: no axis of {study.name}; it has: {', '.join([*axes, 'variant'])}")
    num_cells = len(variants) * math.prod(map(len, axes.values()))
    if num_cells > MAX_CELLS:
        raise ValueError(f"study {study.name} comes to {num_cells} cells; at most {MAX_CELLS} are run: use --only")
    _require_parameters(study, axes, variants, values)
    for word in added:
        _check_told(study, _told_cells(word)[0], word)
    found = []
    for chosen in product(*axes.values()):
        place = tuple(zip(axes, chosen, strict=True))
        where = [word for axis, value in place for word in study.axes[axis][value]]
        for variant in variants:
            words = [*study.base, *where, *study.variants[variant]]
            filled = [_filled(word, study, values) for word in words]
            more = [inner for names, inner in map(_told_cells, added) if _are_of(study, names, place, variant)]
            recordings = [
                (name, values[name], study.recordings[name]) for name in _named_in(words) if name in study.recordings
            ]
            found.append(Cell(place, variant, (*filled, *more), tuple(recordings)))
    return found


def _told_cells(word: str) -> tuple[Sequence[str], str]:
    """Names that tell of which cells an override is, none: of all; and the override."""
    key, sign, value = word.partition("=")
    names, colon, inner = key.rpartition(":")
    return (names.split(","), f"{inner}{sign}{value}") if colon else ((), word)


def _are_of(study: Study, names: Sequence[str], place: Sequence[tuple[str, str]], variant: str) -> bool:
    """Whether the cell is among those that the names tell: of one axis any of them holds, of different axes all do."""
    pairs = [(variant, study.variants), *((value, study.axes[axis]) for axis, value in place)]
    return all(own in names for own, known in pairs if any(name in known for name in names))


def _check_told(study: Study, names: Sequence[str], word: str) -> None:
    known = [*study.variants, *(value for values in study.axes.values() for value in values)]
    for name in names:
        if name not in known:
            raise ValueError(
                f"--set {word}: {name} is no variant and no value of an axis of {study.name}{near_to(name, known)}"
            )


def _named_in(words: Sequence[str]) -> list[str]:
    """What stands in braces in overrides, each once."""
    return list(dict.fromkeys(name for word in words for name in re.findall(r"\{(\w+)\}", word)))


def _require_parameters(
    study: Study, axes: Mapping[str, Sequence[str]], variants: Sequence[str], values: Mapping[str, str]
) -> None:
    """ValueError that names every parameter that the cells need and that was not given."""
    words = [*study.base, *(word for name in variants for word in study.variants[name])]
    words += [word for axis, names in axes.items() for value in names for word in study.axes[axis][value]]
    missing = [name for name in _named_in(words) if name in study.parameters and name not in values]
    if not missing:
        return
    told = " ".join(f"{name}=VALUE" for name in missing)
    first, *others = [study.parameters[name] for name in missing]
    about = "; ".join([first, *(one.removeprefix("a recording ") for one in others)])
    raise ValueError(f"study {study.name} needs --set {told}: {about}{_shipped_for(study, missing)}")


def _shipped_for(study: Study, missing: Sequence[str]) -> str:
    """Of what is missing the shipped recordings that fit, each where it is; all of them for one of no told model."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for name in missing:
        for recording in twins_of(study.recordings.get(name, "")):
            found[is_here(recording)].append(f"{name}={recording}")
    if not any(found.values()):
        asks = any("recording" in study.parameters[name] for name in missing)
        return f"; shipped are {offered()}" if asks else ""
    here = f"; shipped: {' '.join(found[True])}" if found[True] else ""
    return here + (f"; in the repository's traces/data: {' '.join(found[False])}" if found[False] else "")


def _wanted(axis: str, names: list[str], only: dict[str, Sequence[str]]) -> list[str]:
    wanted = only.pop(axis, None)
    if wanted is None:
        return names
    for name in wanted:
        if name not in names:
            raise ValueError(f"--only {axis}={name}: no such value; choose from: {', '.join(names)}")
    return [name for name in names if name in wanted]


def _filled(word: str, study: Study, values: Mapping[str, str]) -> str:
    for name in re.findall(r"\{(\w+)\}", word):
        if name not in study.parameters:
            raise ValueError(f"{study.name}.yaml: {word} names {{{name}}}, which is not among its parameters")
        word = word.replace(f"{{{name}}}", values[name])
    return word
