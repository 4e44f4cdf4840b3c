"""What a model weighs: formulas on a tiny model, products of the published dimensions, and refusals."""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import yaml

from expertflow.model import ModelSpec, model_from_dict
from sim.paths import CONF

FOLDER = CONF / "model"
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "auto")

TINY = ModelSpec(
    name="tiny",
    source="made up",
    num_layers=3,
    num_experts=4,
    top_k=2,
    hidden_size=8,
    expert_intermediate=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    vocab_size=10,
)
TINY_MLA = replace(
    TINY, attention="mla", num_heads=2, num_kv_heads=0, head_dim=0, kv_rank=3, rope_dim=1, nope_dim=2, v_dim=5
)

# Bytes of an expert (MB), of all experts (GB), copied per token if all miss (GB); published parameters (1e9).
PUBLISHED = {
    "mixtral-8x7b": (352.3, 90.2, 22.5, 46.7),
    "mixtral-8x22b": (604.0, 270.6, 67.7, 140.6),
    "qwen1.5-moe-a2.7b": (17.3, 24.9, 1.66, 14.3),
    "qwen2-57b-a14b": (55.1, 98.7, 12.3, 57.4),
    "qwen3-30b-a3b": (9.44, 58.0, 3.62, 30.5),
    "qwen3-235b-a22b": (37.7, 454.0, 28.4, 235.0),
    "deepseek-v2-lite": (17.3, 28.8, 2.70, 15.7),
    "deepseek-v3": (44.0, 654.0, 20.4, 671.0),
    "olmoe-1b-7b": (12.6, 12.9, 1.61, 6.92),
    "phi-3.5-moe": (157.3, 80.5, 10.1, 41.9),
    "gpt-oss-20b": (13.2, 10.2, 1.27, 20.9),
    "gpt-oss-120b": (13.2, 60.9, 1.90, 116.8),
}


def load(name: str) -> ModelSpec:
    return model_from_dict(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


def products(model: ModelSpec) -> tuple[float, float, float, float]:
    return (
        model.mean_expert_bytes / 1e6,
        model.total_expert_bytes / 1e9,
        model.num_layers * model.top_k * model.mean_expert_bytes / 1e9,
        model.num_params / 1e9,
    )


# -- formulas ------------------------------------------------------------------------------------------------


def test_an_expert_is_three_matrices_or_two() -> None:
    assert TINY.expert_params == 3 * 8 * 16
    assert replace(TINY, expert_matrices=2).expert_params == 2 * 8 * 16


def test_expert_bytes_follow_the_bits_and_round_up() -> None:
    assert TINY.mean_expert_bytes == 384 * 2
    assert replace(TINY, expert_bits=4.25).mean_expert_bytes == 204
    # 384 weights of 4.26 bits are 204.48 bytes.
    assert replace(TINY, expert_bits=4.26).mean_expert_bytes == 205
    assert TINY.total_expert_bytes == 3 * 4 * 768


def test_grouped_query_attention_counts_four_matrices() -> None:
    # Q and output 8 x 8, K and V 8 x 4.
    assert TINY.attention_params == 64 + 64 + 32 + 32


def test_latent_attention_counts_its_low_rank_matrices() -> None:
    # Q 8 x 2*3; down 8 x (3+1); up 3 x 2*(2+5); output 2*5 x 8.
    assert TINY_MLA.attention_params == 48 + 32 + 42 + 80
    # Low-rank queries: 8 x 4 and 4 x 2*3 stand for 8 x 2*3.
    assert replace(TINY_MLA, q_rank=4).attention_params == 56 + 32 + 42 + 80


def test_what_stays_on_the_gpu_is_everything_but_routed_experts() -> None:
    attention, router, head = 3 * 192, 3 * 8 * 4, 10 * 8
    assert TINY.non_expert_bytes == 2 * (attention + router + 2 * head)
    assert replace(TINY, tied_embeddings=True).non_expert_bytes == 2 * (attention + router + head)
    assert replace(TINY, shared_intermediate=5).non_expert_bytes == TINY.non_expert_bytes + 2 * 3 * 120
    dense = replace(TINY, num_dense_layers=2, dense_intermediate=7)
    assert dense.non_expert_bytes == TINY.non_expert_bytes + 2 * 2 * (192 + 3 * 8 * 7)


def test_quantised_weights_leave_embeddings_head_and_router_alone() -> None:
    half = replace(TINY, weight_bits=8)
    assert TINY.non_expert_bytes - half.non_expert_bytes == 3 * 192


def test_all_parameters_are_experts_and_the_rest() -> None:
    assert TINY.num_params == 3 * 4 * 384 + TINY.non_expert_bytes // 2


def test_kv_cache_of_grouped_and_of_latent_attention() -> None:
    assert TINY.kv_bytes_per_token_per_layer == 2 * 2 * 2 * 2
    assert TINY_MLA.kv_bytes_per_token_per_layer == (3 + 1) * 2
    assert replace(TINY, kv_bits=8).kv_bytes_per_token_per_layer == 8
    assert TINY.kv_bytes(100) == 3 * 16 * 100
    assert replace(TINY, num_dense_layers=2, dense_intermediate=7).kv_bytes(100) == 5 * 16 * 100


@pytest.mark.parametrize(("context", "tokens"), [(9, 27), (10, 30), (11, 11 + 20), (100, 100 + 20)])
def test_windowed_layers_keep_a_window_starting_with_the_first(context: int, tokens: int) -> None:
    windowed = replace(TINY, window=10, attention_pattern="wf")
    assert [windowed.is_windowed(layer) for layer in range(3)] == [True, False, True]
    assert windowed.kv_bytes(context) == tokens * 16


# -- published dimensions ------------------------------------------------------------------------------------


def test_every_file_is_named_as_its_model() -> None:
    assert {path.stem for path in FILES} >= {*PUBLISHED, "qwen2-57b-a14b-int4"}
    assert all(load(path.stem).name == path.stem for path in FILES)
    assert yaml.safe_load((FOLDER / "auto.yaml").read_text()) == {"name": "auto", "path": None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_products_of_the_dimensions_are_the_published_ones(name: str) -> None:
    assert products(load(name)) == pytest.approx(PUBLISHED[name], rel=0.01)


def test_a_wrong_dimension_is_seen_in_the_products() -> None:
    wrong = replace(load("gpt-oss-20b"), expert_intermediate=2944)
    assert products(wrong) != pytest.approx(PUBLISHED["gpt-oss-20b"], rel=0.01)


def test_int4_is_the_same_model_at_4_15625_bits() -> None:
    plain, int4 = load("qwen2-57b-a14b"), load("qwen2-57b-a14b-int4")
    bits = 4 + 20 / 128
    assert int4 == replace(plain, name=int4.name, source=int4.source, weight_bits=bits, expert_bits=bits)
    assert int4.mean_expert_bytes == 27_525_120 * bits / 8


def test_gpt_oss_experts_are_as_large_as_the_checkpoint_stores_them() -> None:
    assert load("gpt-oss-20b").mean_expert_bytes / 2**20 == pytest.approx(12.61, abs=0.01)


# -- refusals ------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_layers": 0}, r"model\.num_layers=0 is outside \[1, 10000\]"),
    ({"num_experts": 65_536}, r"num_experts=65536 is outside \[1, 65535\]"),
    ({"top_k": 5}, r"top_k=5 is outside \[1, 4\]; the upper end is num_experts"),
    ({"hidden_size": -8}, r"hidden_size=-8 is outside"),
    ({"vocab_size": 0}, r"vocab_size=0 is outside"),
    ({"expert_matrices": 4}, r"expert_matrices=4 is outside \[2, 3\]"),
    ({"expert_bits": 0.5}, r"expert_bits=0\.5 is outside \[1, 64\]"),
    ({"weight_bits": float("nan")}, r"weight_bits=nan is outside"),
    ({"attention": "mha"}, r"attention='mha' must be one of gqa, mla"),
    ({"num_kv_heads": 3}, r"num_kv_heads=3 does not divide num_heads=4"),
    ({"num_kv_heads": 0}, r"num_kv_heads=0 is outside \[1, .*gqa needs it"),
    ({"kv_rank": 3}, r"kv_rank=3 is outside \[0, 0\]; gqa does not use it"),
    ({"nope_dim": 3}, r"nope_dim=3 is outside \[0, 0\]; gqa does not use it"),
    ({"attention": "mla"}, r"kv_rank=0 is outside \[1, .*mla needs it"),
    ({"window": 10}, r"window=10 is of layers w or x or h, and attention_pattern has none"),
    ({"attention_pattern": "wf"}, r"window=0, and attention_pattern has layers w, which need it"),
    ({"dense_intermediate": 7}, r"num_dense_layers=0 and model\.dense_intermediate=7: give both"),
    ({"window": -1, "attention_pattern": "w"}, r"window=-1 is outside"),
    ({"source": ""}, r"source='' must be text"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_value_out_of_range_is_refused_with_its_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_latent_attention_refuses_what_it_does_not_use() -> None:
    with pytest.raises(ValueError, match=r"head_dim=2 is outside \[0, 0\]; mla does not use it"):
        replace(TINY_MLA, head_dim=2)
    with pytest.raises(ValueError, match=r"window_head_dim=2 is outside \[0, 0\]; mla does not use it"):
        replace(TINY_MLA, window=10, attention_pattern="wf", window_head_dim=2)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    assert replace(TINY, top_k=4).top_k == 4
    assert replace(TINY, num_experts=65_535, expert_bits=1, weight_bits=64).num_experts == 65_535


def mapping(**changes: object) -> Mapping[str, object]:
    raw: dict[str, object] = yaml.safe_load((FOLDER / "gpt-oss-20b.yaml").read_text())
    return {**raw, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_expert": 32},
            r"model\.num_expert is no key \(did you mean model\.num_experts\?\); known: ",
        ),
        ({"zzz": 1}, r"model\.zzz is no key; known"),
        ({"num_layers": "24"}, r"model\.num_layers='24' must be a whole number"),
        ({"num_layers": 24.0}, r"model\.num_layers=24\.0 must be a whole number"),
        ({"num_layers": True}, r"model\.num_layers=true must be a whole number"),
        ({"expert_bits": "4.25"}, r"expert_bits='4\.25' must be a number"),
        ({"tied_embeddings": 0}, r"tied_embeddings=0 must be true or false"),
        ({"name": 20}, r"name=20 must be text"),
        ({"window": None}, r"window=null must be a whole number"),
    ],
)
def test_a_mapping_with_a_wrong_key_or_type_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_from_dict(mapping(**changes))


def test_a_whole_number_serves_where_a_number_is_wanted() -> None:
    assert model_from_dict(mapping(expert_bits=4)).expert_bits == 4


def test_missing_keys_are_all_named() -> None:
    with pytest.raises(ValueError, match=r"model lacks expert_intermediate, hidden_size, .* or add"):
        model_from_dict({"name": "auto"})


def test_a_model_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        TINY.top_k = 3  # type: ignore[misc]
