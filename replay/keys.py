"""The keys that a replay has beside those of a simulation, and `python -m replay.keys`: every key there is.

Prints the page of docs/keys.md: each key with its type, range, unit and default, read from where it is declared.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import yaml

from expertflow.clairvoyant import Clairvoyant
from expertflow.keys import OTHER, REQUIRED, Key, Rule, arguments_of, declared, near_to, shown
from expertflow.model import ModelSpec
from expertflow.parts import Effort
from sim.job.keys import ModelKeys, PolicyKeys, RunKeys, TraceKeys
from sim.job.parts import KINDS, class_of
from sim.job.setup import Transfer
from sim.paths import CONF
from sim.specs.hardware import LEAST_GB_PER_S, Hardware, Stack
from sim.specs.links import LinkPreset
from sim.specs.storage import Storage
from traces.flags import Parser
from traces.help_text import Wrapped, hanging, width

MACHINES = ("auto", "cuda", "cpu")
FAULTS = ("delayed", "failed", "reordered", "duplicated", "early_reuse", "lost")
"""Of copies: see `replay.machine.faults`."""
HOST_FAULTS = ("host_wrong", "host_lost", "host_fails")
"""Of experts that the host computes."""
UNSTAMPED = ("lost", "host_lost", "host_fails")
"""Faults that end a run, so that no stamp is needed to see them."""
DEFAULT_FAULT_AT = 100


@dataclass(frozen=True)
class ReplayKeys:
    """A replay's own keys, as they are composed; `replay.settings.Settings` is what becomes of them."""

    machine: Annotated[str, Rule(choices=MACHINES, about="auto takes a GPU if there is one")]
    verify: Annotated[bool, Rule(about="check every chunk's stamp around every kernel")]
    log: Annotated[bool, Rule(about="write records.parquet, for python -m replay.lockstep")]
    fault: Annotated[str | None, Rule(choices=FAULTS + HOST_FAULTS, null="none", about="a fault on purpose")]
    fault_at: Annotated[
        int | None,
        Rule(1, 2**31 - 1, null=str(DEFAULT_FAULT_AT), about="at which copy, or host's expert; only with fault"),
    ]
    scale: Annotated[
        int | None, Rule(1, 1024, null="1 on a GPU, 16 on a CPU", about="the model's widths are divided by it")
    ]
    launch_ahead: Annotated[
        bool | None,
        Rule(
            null="on a GPU, unless the host computes experts",
            about="launch the experts of a single token before it is known which",
        ),
    ]
    throttle_gb_per_s: Annotated[
        float | None,
        Rule(
            LEAST_GB_PER_S,
            1e6,
            unit="GB/s",
            null="the profile's, at the experts' scale; none for local",
            about="pace of a CPU machine's link",
        ),
    ]


HEAD = """# Keys

Every key of a configuration, and what it may hold. This page is made by `python -m replay.keys` (`expertflow keys`)
from the declarations that the keys are checked by, and a test holds it equal to them.

A value of another type, or outside its range, an unknown key, a key that is missing, and two keys of which one would be
ignored are refused in one line, with exit code 2, before anything is run. `(` and `)` leave an end of a range out. A
whole number serves where a number is wanted; text, `true` and `false` never do. A group (`hardware`, `link`, `policy`,
`model`, `stack`, `storage`, `trace`, `policy/PART`) is given the name of one file.

The `_target_` of a policy's part must name a class that derives from that part's class in `expertflow/parts.py`. That
is checked before the class is called; to find it, its module is imported. Arguments are plain values: of what they
hold nothing is called.

These exclude each other: `residency` and `gpu_memory_gb`; `trace.path` and the other keys of `trace`; `fault_at`
without `fault`; `throttle_gb_per_s` and a GPU; `launch_ahead=true` and a CPU; `count_redundant=true` and a policy
without parts; `model.path` and `model=NAME`; `model=auto` without `model.path` and a key of `model`; `link=profile` and
a key of `link`; any other `link` and `hardware.link_gb_per_s`, `hardware.pageable_gb_per_s`, `throttle_gb_per_s`, or a
GPU; `stack.resident_tpot_ms` and the two overheads of `stack`, or a replay; `batch_size=as_recorded` and
`prefill_chunk` or `speculate`; `draft_ms` without `speculate`, or in a replay; `storage` and `policy.place`,
`verify=true`, `fault`, or a GPU; in a simulation, `host_memory_gb` without `storage`. An expert is cut into 1024 chunks
at most, and a run lasts 2^63 ns at most.
"""


_NOTES = {
    "storage": "Absent unless `+storage=NAME` chooses a file: then host memory (`host_memory_gb`) is a cache above it.",
    "model": "Any key may be given for any model, whether its file has it or not: `model.KEY=VALUE`. With `model.path` "
    "it takes the place of what the file says.",
}


def page() -> str:
    """The page, in Markdown."""
    sections = [HEAD]
    for title, note, keys, defaults in tables():
        lines = [f"## {title}", "", *([note, ""] if note else [])]
        lines += ["| key | type and range | default | |", "|---|---|---|---|"]
        lines += [_row(name, key, defaults) for name, key in keys.items()]
        sections.append("\n".join([*lines, ""]))
    return "\n".join(sections)


def tables() -> Iterator[tuple[str, str, Mapping[str, Key], Mapping[str, Any]]]:
    """Title, a note, the keys by name, and the values of a file that gives them, table by table."""
    run, replay = (yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8")) for name in ("run", "replay"))
    yield "A run", "Of a simulation and of a replay.", declared(RunKeys), run
    yield "A replay alone", "`compare` is `none` there.", declared(ReplayKeys), replay
    grouped: tuple[tuple[str, Any], ...] = (
        ("trace", TraceKeys),
        ("hardware", Hardware),
        ("link", LinkPreset),
        ("stack", Stack),
        ("storage", Storage),
        ("model", ModelSpec),
        ("policy", PolicyKeys),
        ("policy.transfer", Transfer),
        ("policy.effort", Effort),
    )
    for group, cls in grouped:
        beside = declared(ModelKeys) if cls is ModelSpec else {}
        keys = {f"{group}.{name}": key for name, key in (*beside.items(), *declared(cls).items())}
        yield group, _NOTES.get(group, ""), keys, {}
    own, _ = arguments_of(Clairvoyant)
    keys = {f"policy.{name}": key for name, key in own.items() if name not in ("future", "place")}
    yield "policy=clairvoyant", "A policy without parts.", keys, {}
    yield from _parts()


def _parts() -> Iterator[tuple[str, str, Mapping[str, Key], Mapping[str, Any]]]:
    """One table for each class, under the first file that names it."""
    for part, kind in KINDS.items():
        seen = set()
        for path in sorted((CONF / "policy" / part).glob("*.yaml")):
            cfg = yaml.safe_load(path.read_text(encoding="utf-8"))
            target = cfg.get("_target_")
            if target is None or target in seen:
                continue
            seen.add(target)
            keys = {f"policy.{part}.{name}": key for name, key in arguments_of(class_of(cfg, part, kind))[0].items()}
            if keys:
                given = {f"policy.{part}.{name}": value for name, value in cfg.items()}
                yield f"policy/{part}={path.stem}", f"`{target}`", keys, given


def _row(name: str, key: Key, given: Mapping[str, Any]) -> str:
    kind, default, about = _told(name, key, given)
    default = default if default in ("", "–") else f"`{default}`"
    return f"| `{name}` | {kind} | {default} | {about} |"


def _told(name: str, key: Key, given: Mapping[str, Any]) -> tuple[str, str, str]:
    """Type and range, default (– where it must be given), and what it is for."""
    rule = key.rule
    kind = f"{key.allowed.removesuffix(', or null')}{', or null' if key.nullable else ''}"
    default = given.get(name, key.default)
    told = "–" if default is REQUIRED else "" if key.kind == OTHER and default != "auto" else _plain(default)
    about = f"{rule.about}; null: {rule.null}" if key.nullable and rule.null else rule.about
    return kind, told, about


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value}"


def matching(part: str) -> list[str]:
    """Of each key that contains `part` its name, and below it what it may hold, in lines that fit the terminal."""
    lines: list[str] = []
    for title, _, keys, given in tables():
        for name, key in keys.items():
            if part.casefold() not in name.casefold():
                continue
            kind, default, about = _told(name, key, given)
            chosen = f" (with {title})" if "=" in title else ""
            default = f"; default {default}" if default else ""
            lines += hanging(f"{name}{chosen}", width(), 4)
            lines += hanging(f"    {kind}{default}{f'; {about}' if about else ''}", width(), 4)
    return lines


def main(words: list[str] | None = None) -> int:
    """Command line."""
    parser = Parser(prog="python -m replay.keys", description=__doc__, formatter_class=Wrapped)
    parser.add_argument("part", nargs="?", help="only keys whose name contains this, as lines for a terminal")
    part = parser.parse_args(words).part
    if part is None:
        sys.stdout.write(page())
        return 0
    lines = matching(part)
    if not lines:
        names = [name for _, _, keys, _ in tables() for name in keys]
        # Whole, and by its last word alone: `residancy`, `policy.horizon.dept`.
        hint = near_to(part, names) or near_to(part, [name.rpartition(".")[2] for name in names])
        parser.error(f"no key contains {shown(part)}{hint}; without a word all are listed")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
