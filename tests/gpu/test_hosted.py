"""A worker on the host beside a GPU: on the fake, where its copies are ordered as on a device, and on a card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from replay.machine.cuda import CudaDevice
from replay.machine.device import Event
from replay.machine.ways import CudaWay
from replay.run import PartialRunError
from tests.gpu.fake_cuda import COPY_NS, DeviceOnFake, FakeCuda, on_fake
from tests.gpu.support import Case
from tests.support.commands import TINY_MODEL_WORDS, tiny_trace

WORDS = ("+hardware=a100", "+host=server", "residency=0.3", *TINY_MODEL_WORDS)
SCALE = 8


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_trace(tmp_path_factory.mktemp("trace") / "tiny.safetensors", 12, prompt=3)


def case_of(trace: Path, *words: str) -> Case:
    return Case.of(*WORDS, *words, f"trace.path={trace}", scale=SCALE)


@pytest.fixture
def fake() -> Iterator[tuple[FakeCuda, DeviceOnFake]]:
    with on_fake() as pair:
        yield pair


PLACES = [
    "+policy=lru +policy/place=cheaper",
    "+policy=lru +policy/place=host_layers policy.place.layers=2",
    "+policy=adaptive +policy/place=balanced",
    "+policy=adaptive +policy/place=capped policy.place.uploads=1 policy.place.behind=false batch_size=2",
]


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("words", PLACES)
def test_a_replay_with_a_place_is_whole_and_its_decisions_repeat(
    words: str, trace: Path, tmp_path: Path, fake: tuple[FakeCuda, DeviceOnFake]
) -> None:
    """Identities are asserted inside. All experts are checked, those of the host as well; nothing is pageable."""
    case, (cuda, device) = case_of(trace, *words.split()), fake
    metrics, integrity = case.replay(case.rig(device), verify=True, log=tmp_path / "log.parquet")
    assert integrity is not None
    assert (integrity.num_wrong, integrity.num_mislaunched) == (0, 0)
    assert integrity.num_executions == metrics["num_accesses"]
    assert metrics["num_host"] > 0
    assert metrics["host"]["busy_ns"] > 0
    assert metrics["elapsed_ns"] == metrics["compute_ns"] + metrics["stall_ns"] + metrics["overhead_ns"]
    # Nobody asks when results were added: the next launch of that program may overwrite its events.
    assert (cuda.num_spoiled, cuda.num_pageable) == (0, 0)
    found = case.lockstep(tmp_path / "log.parquet")
    assert (found.difference, found.partial) == (None, None)


def test_activations_go_over_and_results_come_back_in_the_devices_order(fake: tuple[FakeCuda, DeviceOnFake]) -> None:
    """Of two rows the first goes: the host has it when its event has happened, and the kernels behind `follow` read
    what was sent."""
    cuda, device = fake
    activations, at_host, from_host, results = (torch.full((2, 4), float(value)) for value in range(1, 5))
    for pinned in (at_host, from_host):
        start = pinned.untyped_storage().data_ptr()
        cuda.pinned.append(range(start, start + pinned.untyped_storage().nbytes()))
    way = device.way((activations, at_host, from_host, results))
    assert isinstance(way, CudaWay)
    way.begin_thread()
    way.fetch(16)
    assert at_host[0, 0] != 1
    way.await_fetched()
    assert at_host.tolist() == [[1] * 4, [2] * 4]
    began_ns = cuda.true_ns
    sent: Event = way.send(16)
    assert not device.happened(sent)
    seen: list[Any] = []
    way.follow()
    device.launch(device.program(lambda: seen.append(results.tolist()), captured=False))
    device.synchronize()
    assert seen == [[[3] * 4, [4] * 4]]
    assert cuda.true_ns > began_ns + COPY_NS
    assert cuda.num_pageable == 0


@pytest.mark.slow
def test_a_card_that_is_lost_in_the_workers_thread_is_a_partial_run(
    trace: Path, fake: tuple[FakeCuda, DeviceOnFake], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a mistake of the worker's: every CUDA call would fail from then on."""
    case, (_, device) = case_of(trace, "+policy=lru", "+policy/place=cheaper"), fake

    def lost(self: CudaWay, num_bytes: int) -> Event:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(CudaWay, "send", lost)
    with pytest.raises(PartialRunError, match="illegal memory access"):
        case.replay(case.rig(device))


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "told"), [("host_lost", "have not come for"), ("host_fails", "worker failed")])
def test_a_result_that_never_comes_ends_the_run_in_a_line(
    fault: str, told: str, trace: Path, fake: tuple[FakeCuda, DeviceOnFake], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the fake's time, which passes by its calls alone.
    monkeypatch.setattr("replay.machine.faults._PATIENCE_NS", 1_000_000)
    case, (_, device) = case_of(trace, "+policy=lru", "+policy/place=cheaper"), fake
    with pytest.raises(ValueError, match=told):
        case.replay(case.rig(device), fault=(fault, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: nothing of this was tried")
@pytest.mark.parametrize("words", PLACES)
def test_a_place_on_a_card(words: str, trace: Path, tmp_path: Path) -> None:
    """The same on real streams, and the products of the host are those of the weights that it read."""
    case = Case.of(*WORDS, *words.split(), f"trace.path={trace}")
    device = CudaDevice()
    try:
        metrics, integrity = case.replay(case.rig(device), verify=True, log=tmp_path / "log.parquet")
        _, caught = case.replay(case.rig(device), verify=True, fault=("host_wrong", 3))
    finally:
        device.close()
    assert integrity is not None
    assert caught is not None
    assert (integrity.num_wrong, integrity.num_mislaunched) == (0, 0)
    assert integrity.num_executions == metrics["num_accesses"]
    assert metrics["num_host"] > 0
    assert metrics["host"]["busy_ns"] > 0
    assert caught.num_wrong > 0
    assert case.lockstep(tmp_path / "log.parquet").difference is None
