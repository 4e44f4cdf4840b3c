"""Kinds of attention beside full and windowed: weights, bytes and times of tiny models, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from expertflow.layers import Layer
from expertflow.model import ModelSpec, model_from_dict
from tests.unit.specs.test_kernels import TINY, times
from tests.unit.specs.test_model import TINY_MLA

# TINY: hidden 8, 4 heads of 2, 2 KV heads, 3 MoE layers of 4 experts; a KV token takes 2 * 2 * 2 values of 2 bytes.
TOKEN = 16
ATTENTION = 192
ROUTER = 32
INDEX = {"index_top_k": 4, "index_heads": 3, "index_dim": 5}
INDEXED = {**INDEX, "attention_pattern": "i"}
COMPRESSED = {**INDEX, "window": 4, "sparse_ratio": 2, "heavy_ratio": 3}


def kv(model: ModelSpec, context: int) -> int:
    return model.kv_bytes(context)


def test_patterns_are_repeated_over_all_layers() -> None:
    model = replace(
        TINY, num_dense_layers=3, dense_intermediate=7, window=4, attention_pattern="wwf", feed_pattern="dm"
    )
    assert model.layers == tuple(map(Layer, "wwfwwf", "dmdmdm"))
    assert (model.moe_attention, dict(model.num_of)) == ("wwf", {"w": 4, "f": 2})


@pytest.mark.parametrize(
    ("every", "dense", "pattern"), [(0, 0, "f"), (1, 0, "w"), (2, 0, "wf"), (3, 0, "wff"), (2, 2, "ffwfw")]
)
def test_the_former_window_every_is_understood(every: int, dense: int, pattern: str) -> None:
    values = {
        **{key: getattr(TINY, key) for key in ("name", "source", "num_layers", "num_experts", "top_k", "hidden_size")},
        **{key: getattr(TINY, key) for key in ("expert_intermediate", "num_heads", "num_kv_heads", "head_dim")},
        "vocab_size": 10,
        "window": 4 if every else 0,
        "num_dense_layers": dense,
        "dense_intermediate": 7 if dense else 0,
    }
    assert model_from_dict({**values, "window_every": every}).attention_pattern == pattern
    with pytest.raises(ValueError, match="window_every is called attention_pattern now"):
        model_from_dict({**values, "window_every": every, "attention_pattern": "f"})


@pytest.mark.parametrize(
    ("changes", "context", "expected"),
    [
        ({"attention_pattern": "c", "chunk": 4}, 3, 3 * 3 * TOKEN),
        ({"attention_pattern": "c", "chunk": 4}, 10, 3 * 4 * TOKEN),
        # Two states of 9 values in 32 bits; the third layer is full.
        ({"attention_pattern": "llf", "linear_params": 5, "linear_state": 9}, 10, 10 * TOKEN + 2 * 36),
        ({"attention_pattern": "nf"}, 10, 10 * TOKEN),
        # Index keys of 5 values in 16 bits, one a token, or one for every four tokens begun.
        (INDEXED, 10, 3 * 10 * (TOKEN + 10)),
        ({**INDEXED, "index_block": 4, "index_bits": 8}, 10, 3 * (10 * TOKEN + 3 * 5)),
        ({**INDEX, "attention_pattern": "iss"}, 10, 3 * 10 * TOKEN + 10 * 10),
        # The window of 4, and 10 // 2 entries with index keys, or 10 // 3 without.
        ({**COMPRESSED, "attention_pattern": "xh"}, 10, 2 * (4 + 5) * TOKEN + 2 * 5 * 10 + (4 + 3) * TOKEN),
        ({"attention_pattern": "wf", "window": 4, "window_kv_heads": 1, "window_head_dim": 6}, 10, 2 * 4 * 24 + 160),
        ({"v_dim": 3}, 10, 3 * 10 * 2 * (2 + 3) * 2),
        ({"shared_kv": True}, 10, 3 * 10 * 2 * 2 * 2),
    ],
)
def test_what_a_request_keeps(changes: dict[str, object], context: int, expected: int) -> None:
    assert kv(replace(TINY, **changes), context) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "kind", "expected"),
    [
        ({}, "f", ATTENTION),
        ({"extra_attention_params": 7}, "f", ATTENTION + 7),
        # Queries 8 * 3 * 5, keys 8 * 5, weights of the heads 8 * 3.
        (INDEXED, "i", ATTENTION + 120 + 40 + 24),
        ({**INDEX, "attention_pattern": "is"}, "s", ATTENTION),
        ({"attention_pattern": "lf", "linear_params": 55, "extra_attention_params": 7}, "l", 55),
        ({"attention_pattern": "nf"}, "n", 0),
        ({"q_rank": 3}, "f", 3 * (8 + 8) + 32 + 32 + 64),
        # Two groups: each of 4 of the 8 outputs into 3, and 3 into the hidden width.
        ({"o_rank": 3, "o_groups": 2}, "f", 64 + 32 + 32 + 8 * 3 + 2 * 3 * 8),
        ({"shared_kv": True}, "f", 64 + 32 + 64),
        ({"v_dim": 3}, "f", 8 * 8 + 8 * 2 * (2 + 3) + 4 * 3 * 8),
        ({"attention_pattern": "wf", "window": 4, "window_heads": 2, "window_head_dim": 6}, "w", 8 * 6 * (2 + 4 + 2)),
    ],
)
def test_weights_of_attention(changes: dict[str, object], kind: str, expected: int) -> None:
    assert replace(TINY, **changes).mixer_params(kind) == expected  # type: ignore[arg-type]


def test_windowed_latent_attention_has_ranks_of_its_own() -> None:
    model = replace(TINY_MLA, attention_pattern="wf", window=4, window_kv_rank=6, window_heads=3, window_nope_dim=4)
    # Queries 8 * 3 * 5, compression 8 * 7, expansion 6 * 3 * 9, output 3 * 5 * 8.
    assert model.mixer_params("w") == 120 + 56 + 162 + 120
    assert model.kv_bytes(10) == 2 * 4 * (6 + 1) * 2 + 10 * (3 + 1) * 2


def test_latent_experts_and_the_gate_of_shared_ones() -> None:
    model = replace(TINY, expert_hidden=5, shared_intermediate=2, shared_gate=True)
    assert (model.expert_params, model.router_params) == (3 * 5 * 16, 32 + 2 * 8 * 5)
    assert model.shared_params == 3 * 8 * 2 + 8


def test_what_is_resident_beside() -> None:
    more = replace(TINY, extra_params=100, extra_bytes=33)
    assert more.non_expert_bytes == TINY.non_expert_bytes + 200 + 33
    assert more.num_params == TINY.num_params + 100


# A byte and an operation take a nanosecond in `times`; weights are 2 bytes.
MOE_NS = 2 * (ATTENTION + ROUTER)


@pytest.mark.parametrize("kv_len", [1, 50, 5000])
def test_a_linear_layer_does_not_grow_with_the_context(kv_len: int) -> None:
    kernels = times(replace(TINY, attention_pattern="lf", linear_params=50, linear_state=9))
    # The state is read and written: 2 * 36 bytes for each request.
    assert kernels.attention_list_ns(1, (kv_len,), False)[::2] == [2 * (50 + ROUTER) + 72] * 2
    assert kernels.attention_list_ns(2, (kv_len, kv_len), False)[0] == 2 * (50 + ROUTER) + 144


@pytest.mark.parametrize(("kv_len", "read"), [(3, 3), (4, 4), (5, 1), (11, 3)])
def test_a_chunked_layer_reads_its_own_chunk(kv_len: int, read: int) -> None:
    kernels = times(replace(TINY, attention_pattern="c", chunk=4))
    assert kernels.attention_list_ns(1, (kv_len,), False) == [MOE_NS + TOKEN * read] * 3


@pytest.mark.parametrize(("kv_len", "read"), [(3, 3), (4, 4), (100, 4)])
def test_an_indexed_layer_reads_what_is_chosen_and_all_index_keys(kv_len: int, read: int) -> None:
    kernels = times(replace(TINY, attention_pattern="iss", **INDEX))  # type: ignore[arg-type]
    own, shared = kernels.attention_list_ns(1, (kv_len,), False)[:2]
    assert shared == MOE_NS + TOKEN * read
    # At two operations a nanosecond the scores of 3 heads of 5 take longer than the keys' bytes, once they are many.
    flops = 2 * (ATTENTION + ROUTER + 120 + 40 + 24) + 32 * read + 2 * 3 * 5 * kv_len
    assert own == max(shared + 2 * (120 + 40 + 24) + 10 * kv_len, flops // 2)


def test_compressed_layers_read_a_window_and_entries_that_stand_for_several_tokens() -> None:
    kernels = times(replace(TINY, attention_pattern="xh", **COMPRESSED))  # type: ignore[arg-type]
    sparse, heavy = kernels.attention_list_ns(1, (31,), False)[:2]
    assert heavy == MOE_NS + TOKEN * (4 + 31 // 3)
    assert sparse == MOE_NS + 2 * (120 + 40 + 24) + TOKEN * (4 + 4) + 10 * (31 // 2)


def test_layers_without_experts_count_into_the_next_that_has_some() -> None:
    model = replace(
        TINY,
        num_dense_layers=2,
        dense_intermediate=7,
        num_bare_layers=1,
        feed_pattern="mdnmmd",
        attention_pattern="nffnnf",
    )
    dense = 2 * (ATTENTION + 3 * 8 * 7) + TOKEN * 5
    bare = 2 * ATTENTION + TOKEN * 5
    # The first has none before it, the last also what follows it.
    router = 2 * ROUTER
    assert times(model).attention_list_ns(1, (5,), False) == [router, router + dense + bare, router + dense]


def test_a_prompt_reads_each_chunk_once_and_pairs_within_it() -> None:
    kernels = times(replace(TINY, attention_pattern="c", chunk=4))
    # Token 7 is the third of the chunk 5 to 8.
    assert kernels.attention_list_ns(1, (7,), True) == [MOE_NS + TOKEN * 3] * 3
    # Two tokens are compute-bound, with 2 + 3 pairs of 32 operations.
    assert kernels.attention_list_ns(2, (6, 7), True) == [(2 * 2 * (ATTENTION + ROUTER) + 5 * 32) // 2] * 3


def test_the_sum_of_lengths_gives_an_upper_bound() -> None:
    model = replace(TINY, attention_pattern="xhf", **COMPRESSED)  # type: ignore[arg-type]
    kernels = times(model)
    exact = kernels.attention_list_ns(2, (3, 40), False)
    assert all(kernels.attention_ns(layer, 2, 43) >= exact[layer] for layer in range(3))
    assert [kernels.attention_ns(layer, 1, 43) for layer in range(3)] == kernels.attention_list_ns(1, (43,), False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_pattern": "fq"}, "attention_pattern='fq' must be text of the letters"),
        ({"attention_pattern": "lf"}, "linear_params=0, and attention_pattern has layers l"),
        ({"attention_pattern": "c"}, "chunk=0, and attention_pattern has layers c"),
        ({"attention_pattern": "fs"}, "index_top_k=0, and attention_pattern has layers s"),
        ({"chunk": 4}, "chunk=4 is of layers c, and attention_pattern has none"),
        ({"linear_state": 4}, "linear_state=4 is of layers l"),
        ({"window_heads": 4}, "window_heads=4 is of layers w"),
        ({"index_top_k": 4, "attention_pattern": "i"}, "index_top_k=4 and model.index_heads=0: give both"),
        (INDEX, "index_top_k=4 is of layers i or s or x"),
        ({"feed_pattern": "md"}, "feed_pattern gives 2 layers m of 3, and model.num_layers=3"),
        ({"feed_pattern": "m", "num_bare_layers": 1}, "feed_pattern gives 4 layers m of 4, and model.num_layers=3"),
        ({"o_rank": 4}, "o_rank=4 and model.o_groups=0: give both"),
        ({"window": 4, "attention_pattern": "w", "window_kv_heads": 3}, "window_kv_heads=3 does not divide"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^model.{message}") as refusal:
        replace(TINY, **changes)  # type: ignore[arg-type]
    assert len(str(refusal.value)) <= 300
