"""Quantised experts on the host: reading and unpacking add up, by hand and against a published pair of figures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from expertflow.model import ModelSpec
from sim.machine.host_compute import CpuTimes
from sim.specs.hardware import Hardware
from tests.support.workloads import HARDWARE, model_of

HOST: dict[str, float | int] = {
    "host_memory_gb_per_s": 100.0,
    "host_memory_efficiency": 0.8,
    "host_tflops": 1.0,
    "host_round_trip_ns": 0,
}


def _times(model: ModelSpec, **host: float) -> CpuTimes:
    hardware: Hardware = replace(HARDWARE, **{**HOST, **host})  # type: ignore[arg-type]
    return CpuTimes(model, hardware)


def test_unpacking_adds_to_reading_once_for_all_tokens() -> None:
    model = model_of(2, 4, 2, expert_bits=4.0)
    read_ns = model.mean_expert_bytes / 80  # 80 % of 100 GB/s
    unpack_ns = model.expert_params / 50
    assert _times(model).expert_ns(1) == math.ceil(read_ns)
    unpacked = _times(model, host_unpack_gweights_per_s=50.0)
    assert unpacked.expert_ns(1) == math.ceil(read_ns + unpack_ns)
    # So many tokens that products take longer than reading: 2 operations a weight and token at 1 TFLOP/s.
    products_ns = 2 * model.expert_params * 1000 / 1000
    assert products_ns > read_ns
    assert unpacked.expert_ns(1000) == math.ceil(products_ns + unpack_ns)


def test_what_is_not_quantised_is_not_unpacked() -> None:
    model = model_of(2, 4, 2, expert_bits=16.0)
    assert _times(model, host_unpack_gweights_per_s=50.0).expert_ns(1) == _times(model).expert_ns(1)


@pytest.mark.parametrize(("reads", "computes"), [(146.1, 110.3), (142.7, 108.4)])
def test_both_hosts_of_a_published_pair_come_out_of_one_rate(reads: float, computes: float) -> None:
    # GitHub FreeToken#444: a STREAM read, and fp4 experts (4.25 bits with their scales) computed from it.
    model = model_of(2, 4, 2, expert_bits=4.25, expert_intermediate=4096)
    host = {"host_memory_gb_per_s": reads, "host_memory_efficiency": 1.0, "host_unpack_gweights_per_s": 847.0}
    gb_per_s = model.mean_expert_bytes / _times(model, **host).expert_ns(1)
    assert gb_per_s == pytest.approx(computes, rel=0.005)
