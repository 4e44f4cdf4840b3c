"""Every long command on a tiny input: how it is started, what it leaves, and what of that must never be half."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import yaml
from safetensors.numpy import load_file

from replay.calibration.profile import profiles
from replay.calibration.record import load_record
from replay.settings import CPU_SCALE
from tests.support.commands import small_trace
from tests.support.studies import write_study
from tests.unit.twin.tiny import write_text
from traces.reader import open_trace
from traces.stream import config_of, folder_of

SIM = ["+hardware=a100", "compare=none", "events=true", "timeline=true", "skip_done=true"]
SMALL = ["--machine", "cpu", "--quick", "--policies", "lru"]
"""Of a calibration or a validation."""


@dataclass(frozen=True)
class Command:
    """One long command. words: of Python. same: patterns of the files that have the same bytes each time; in no other
    state may they bear their names. check: AssertionError, or whatever a reader raises, where something half
    would pass as whole.
    codes: with which it ends when it is done. before: what has to be done before it is given again after a kill.
    """

    name: str
    words: Sequence[str]
    same: Sequence[str] = ()
    check: Callable[[Path], None] = lambda folder: None
    codes: Sequence[int] = (0,)
    before: Callable[[Path], None] = lambda folder: None
    together: bool = False
    """Whether two of them at once into one folder both end well."""

    def files(self, folder: Path) -> dict[str, bytes]:
        """What must be the same, by path: of all patterns in `same`."""
        found = sorted(path for pattern in self.same for path in folder.glob(pattern) if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def make_inputs(folder: Path) -> None:
    """Everything that the commands read."""
    from tests.unit.recorder.models import build

    folder.mkdir(parents=True, exist_ok=True)
    small_trace(folder / "trace.safetensors", 300, 4, prompt=4)
    small_trace(folder / "short.safetensors", 48, 4, prompt=4)
    build("qwen2_moe").save_pretrained(folder / "Tiny-Model")
    (folder / "prompts.jsonl").write_text("[1, 2, 3]\n" * 12)
    write_text(folder / "text")
    write_study(folder, variants={name: [f"+policy={name}"] for name in ("lru", "on_demand")}, claims=None, best=None)
    with (folder / "route.csv").open("w", newline="") as file:
        table = csv.writer(file)
        names = ("turn", "phase", "step", "layer", "slot", "expert", "weight", "residency", "expert_bytes")
        table.writerow(names)
        for step in range(400):
            for layer in range(6):
                table.writerows((0, 1, step, layer, slot, (step + layer + slot) % 8, 0.5, 0, 1) for slot in range(2))


def commands(inputs: Path) -> dict[str, Command]:
    """All of them, by name; each writes into the folder that it is started in."""
    trace, short = f"trace.path={inputs / 'trace.safetensors'}", f"trace.path={inputs / 'short.safetensors'}"
    run = ("metrics.json", "events.parquet", "timeline.json", ".hydra/config.yaml")
    plain = "out.safetensors"
    sweep = [short, "+policy=lru,two_level", "residency=0.25,0.5", "hydra.sweep.dir=sweep"]
    twin = "--width=16 --context=24 --tokenizer=bytes --batch=2 --steps=8 --save-every=2 --log-every=1 --threads=1"
    study = ["--config-dir", str(inputs), "--out", "study", "--set", f"recording={inputs / 'short.safetensors'}"]
    traces = ["-m", "traces"]
    route = ["model=toy", "num_experts=8"]
    record = ["record", f"model={inputs / 'Tiny-Model'}", f"prompts={inputs / 'prompts.jsonl'}", f"out={plain}"]
    validated = [
        *(word for word in SMALL if word != "--quick"),
        *_words("--residency 0.5 --stacks found --tokens 8 --log-tokens 4 --batch-sizes 1"),
    ]
    validated += _words("--verify-executions 0 --verify-tokens 8 --repeat 1 --minutes 1 --out validation")
    validated += ["--calibration", str(inputs / "hardware" / "mine.calibration.json")]
    made = [
        Command(
            "run",
            ["-m", "sim", *SIM, trace, "+policy=adaptive", "hydra.run.dir=run"],
            [f"run/{name}" for name in run],
            partial(_runs, views=("events.parquet", "timeline.json")),
            together=True,
        ),
        Command(
            "sweep",
            ["-m", "sim", "-m", *SIM, *sweep],
            [f"sweep/*/{name}" for name in run],
            partial(_runs, views=("events.parquet", "timeline.json")),
            together=True,
        ),
        Command(
            "study",
            ["-m", "sim.study", "tiny", *study, "--jobs", "2"],
            ["study/table.csv", "study/summary.json", "study/README.md"],
            _study,
            together=True,
        ),
        Command("generate", [*traces, "generate", plain, "--tokens", "300", "--requests", "4"], [plain], together=True),
        Command(
            "import",
            [*traces, "import", "route-csv", str(inputs / "route.csv"), plain, *route],
            [plain],
            together=True,
        ),
        Command(
            "fit",
            [*traces, "fit", str(inputs / "short.safetensors"), plain, "--rounds", "2"],
            [plain],
            together=True,
        ),
        Command(
            "fit-predictor",
            [*traces, "fit-predictor", str(inputs / "trace.safetensors"), plain, "kind=transition"],
            [plain],
            together=True,
        ),
        Command(
            "record",
            [*traces, *record, "max_new_tokens=3", "overwrite=true"],
            [plain, "out.config.json"],
            before=_recover,
        ),
        Command(
            "train",
            ["-m", "traces.twin", "train", "twin", "qwen1.5-moe-a2.7b", *twin.split(), f"--text={inputs / 'text'}"],
            ["twin/twin.json", "twin/tokenizer.json", "twin/checkpoint-00000008/*.safetensors"],
            _twin,
            together=True,
        ),
        Command(
            "replay",
            [
                "-m",
                "replay",
                "+hardware=local",
                "+policy=lru",
                "machine=cpu",
                "scale=64",
                short,
                "max_tokens=8",
                "log=true",
                "hydra.run.dir=run",
            ],
            check=partial(_runs, views=("records.parquet",)),
        ),
        Command(
            "calibrate",
            ["-m", "replay.calibrate", "mine", *SMALL, "--config-dir", "own"],
            check=_profile,
        ),
        Command(
            "validate",
            ["-m", "replay.validate", "mine", *validated],
            check=_validation,
            codes=(0, 1),
        ),
    ]
    return {command.name: command for command in made}


def _words(text: str) -> list[str]:
    return text.split()


def _runs(folder: Path, views: Sequence[str]) -> None:
    """Under a `DONE` everything is there and can be read."""
    for done in folder.rglob("DONE"):
        json.loads(done.read_text())
        for name in ("metrics.json", "provenance.json"):
            json.loads((done.parent / name).read_text())
        for name in views:
            view = done.parent / name
            if view.suffix == ".parquet":
                pq.read_table(view)
            else:
                json.loads(view.read_text())
        for name in ("config", "hydra", "overrides"):
            assert yaml.safe_load((done.parent / ".hydra" / f"{name}.yaml").read_text())


def _study(folder: Path) -> None:
    for done in (folder / "study" / "cells").glob("*.done"):
        json.loads(done.read_text())
        json.loads(done.with_suffix(".json").read_text())
    if (folder / "study" / "DONE").exists():
        assert len(pd.read_csv(folder / "study" / "table.csv")) == 4
        for name in ("summary.json", "provenance.json"):
            json.loads((folder / "study" / name).read_text())


def _twin(folder: Path) -> None:
    for path in (folder / "twin").glob("checkpoint-*"):
        assert len(load_file(path / "model.safetensors")) * 2 == len(load_file(path / "optimizer.safetensors"))
        assert json.loads((path / "state.json").read_text())["step"] == int(path.name[-8:])


def _recover(folder: Path) -> None:
    """Of a recording that was killed what was whole is a trace; then it is recorded anew."""
    from traces.container import TraceError
    from traces.stream import TraceWriter

    out = folder / "out.safetensors"
    if folder_of(out).is_dir():
        try:
            recovered = open_trace(TraceWriter.recover(out))
        except TraceError as error:
            assert "holds no whole request" in str(error)  # noqa: PT017 (another TraceError is a failure)
            TraceWriter.discard(out)
        else:
            assert 0 < recovered.num_requests <= 12
            assert recovered.header["recovered"] == "true"
            assert json.loads(config_of(out).read_text())["num_experts"] == recovered.num_experts
            out.unlink()


def _profile(folder: Path) -> None:
    """What stands under the profile's names is of one measurement, and simulates."""
    own = folder / "own"
    record = own / "hardware" / "mine.calibration.json"
    told: list[Mapping[str, object]] = []
    if record.exists():
        told = list(profiles(load_record(record, CPU_SCALE), "mine"))
    found = [own / kind / "mine.yaml" for kind in ("hardware", "stack")]
    if found[1].exists():
        # It is written last and taken away first.
        assert [yaml.safe_load(path.read_text()) for path in found] == told
    elif found[0].exists():
        yaml.safe_load(found[0].read_text())


def _validation(folder: Path) -> None:
    out = folder / "validation"
    for name in ("table.csv", "runs.csv"):
        if (out / name).exists():
            assert len(pd.read_csv(out / name))
    if (out / "summary.json").exists():
        summary = json.loads((out / "summary.json").read_text())
        finished = not any("still running" in why or "broke off" in why for why in summary["not_shown"])
        assert not finished or (out / "table.csv").exists()
