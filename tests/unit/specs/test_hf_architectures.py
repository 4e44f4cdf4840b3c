"""Every architecture with routed experts that transformers knows: the sizes that are read from its configuration are
those of the model that transformers builds of it, on the device `meta`, which takes no memory."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sim.specs.hf_layers import LAYER_TYPES
from sim.specs.model_file import read_model_file

torch = pytest.importorskip("torch", reason="pip install 'expertflow[record]'")
transformers = pytest.importorskip("transformers", reason="pip install 'expertflow[record]'")

from transformers.models.auto.configuration_auto import (  # noqa: E402 - only where it is installed
    CONFIG_MAPPING,
    model_type_to_module_name,
)
from transformers.models.auto.modeling_auto import (  # noqa: E402 - likewise
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

pytestmark = pytest.mark.slow

DEEPSEEK = {"num_experts_per_tok": 6, "n_routed_experts": 64, "first_k_dense_replace": 1}
GEMMA = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704, "num_global_key_value_heads": 2}
GEMMA4 = {**GEMMA, "enable_moe_block": True, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True}
QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 16,
}
GIVEN: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 8, "rope_theta": 5e5},
        "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4},
    },
    "deepseek_ocr2": {"text_config": {**DEEPSEEK, "mlp_layer_types": ["dense"] + ["sparse"] * 31}},
    "deepseek_ocr2_text": {**DEEPSEEK, "mlp_layer_types": ["dense"] + ["sparse"] * 31},
    "deepseek_v2": DEEPSEEK,
    "diffusion_gemma": {"text_config": GEMMA},
    "diffusion_gemma_text": GEMMA,
    "dots1": {"num_experts_per_tok": 6, "n_routed_experts": 128, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba"] * 8},
    "hunyuan_v1_moe": {"num_experts": 16, "moe_topk": 2, "head_dim": 128, "pad_token_id": 0},
    "lfm2_moe": {"layer_types": (["conv", "conv", "full_attention"] * 11)[:32]},
    "llama4_text": {"interleave_moe_layer_step": 2, "num_local_experts": 128},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"] * 20, "sliding_window": 512},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "mamba", "moe", "attention", "moe", "mlp"] * 4,
        "moe_latent_size": 1024,
    },
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "step3p5": {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"] * 15,
        "sliding_window": 512,
    },
}
"""Arguments beside the defaults, where those are of no Mixture of Experts, or of less than there is."""

REFUSED = {
    "nllb-moe": "of an encoder and a decoder",
    "switch_transformers": "of an encoder and a decoder",
    "doge": "its experts are rows of an embedding",
    "dots3_note_vision_encoder": "of no language model",
    "vitpose_backbone": "its experts belong to a vision model",
}
"""Architectures that are refused on purpose, and what is said."""

OTHERS = re.compile(r"vision|audio|encoder|timestamp|predictor|assistant")
"""Types of configurations that are parts of others without experts."""
PARTS_OF_OTHERS = (
    "deepseek_ocr2_text",
    "diffusion_gemma_text",
    "ernie4_5_vl_moe_text",
    "qwen3_omni_moe",
    "qwen3_omni_moe_talker_text",
    "qwen3_omni_moe_text",
    "step3p5",
    "unlimited_ocr_text",
)
"""Types of language parts, and of wholes, for which transformers has no model by themselves."""
PARTS = re.compile(r"vision_(?!moe)|visual|audio|asr|sam_|projector|timestamp|_mtp|mtp\.|view_sep|image_newline")
"""Names of parameters that belong to no language model."""


def with_experts() -> list[str]:
    """The types whose configuration speaks of experts."""
    folder = Path(importlib.util.find_spec("transformers").submodule_search_locations[0]) / "models"  # type: ignore[union-attr,index]
    speaks = re.compile(r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_selected_experts")
    found = []
    for path in sorted(folder.glob("*/configuration_*.py")):
        if speaks.search(path.read_text(encoding="utf-8")):
            found.append(path.parent.name)
    return found


def types_of(folders: list[str]) -> list[str]:
    """The model types that those folders declare."""
    found = []
    for name in CONFIG_MAPPING:
        if model_type_to_module_name(name) not in folders:
            # Not loaded: there are hundreds, and each worker of the tests asks.
            continue
        try:
            module = CONFIG_MAPPING[name].__module__
        except (ImportError, AttributeError):
            continue
        if module.split(".")[-2] in folders:
            found.append(name)
    return found


TYPES = types_of(with_experts())


def config_of(kind: str) -> Any:
    return CONFIG_MAPPING[kind](**GIVEN.get(kind, {}))


def model_of(kind: str, config: Any) -> Any:
    """The model of the configuration on the device `meta`; None where transformers has none that speaks."""
    text = getattr(config, "text_config", None)
    orders = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES]
    for names in orders if text is None else [*orders[1:2], orders[0], orders[2]]:
        name = names.get(kind)
        name = name[0] if isinstance(name, tuple | list) else name
        if name:
            is_text = text is not None and names is MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            with torch.device("meta"):
                return getattr(transformers, name)._from_config(text if is_text else config)
    return None


def expert_shapes(shapes: dict[str, tuple[int, ...]], num_experts: int) -> dict[str, list[tuple[int, ...]]]:
    """The stacked matrices [experts, …] of each layer's routed experts."""
    found: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for name, shape in shapes.items():
        layer = re.search(r"(.*layers\.\d+)\..*(experts|mlp\.(input|output)_linear)", name)
        blocks = re.search(r"(.*blocks\.\d+)\.ffn\.experts", name)
        if blocks:
            # DBRX: [experts * width, hidden].
            found[blocks[1]].append((num_experts, shape[0] // num_experts, shape[1]))
        if layer and len(shape) == 3 and not re.search(r"shared|self_att|bias|vision", name):
            found[layer[1]].append(shape)
    return found


def read(config: Any, folder: Path) -> Any:
    config.save_pretrained(folder)
    return read_model_file(folder)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if OTHERS.search(kind) or kind in REFUSED])
def test_what_is_no_decoder_with_experts_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    reason = REFUSED.get(kind, "of no Mixture of Experts|of no language model")
    with pytest.raises(ValueError, match=reason) as refusal:
        read(config_of(kind), tmp_path)
    assert len(str(refusal.value)) <= 300
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("kind", [kind for kind in TYPES if not OTHERS.search(kind) and kind not in REFUSED])
def test_what_is_read_is_what_transformers_builds(kind: str, tmp_path: Path) -> None:
    config = config_of(kind)
    found = read(config, tmp_path).spec
    model = model_of(kind, config)
    if model is None:
        # Read all the same: the model that has it as its language part is another case.
        assert kind in PARTS_OF_OTHERS
        return
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters() if not PARTS.search(name)}
    experts = expert_shapes(shapes, found.num_experts)
    assert len(experts) == found.num_layers
    assert {min(shape[0] for shape in stack) for stack in experts.values()} == {found.num_experts}
    assert {sum(math.prod(shape[1:]) for shape in stack) for stack in experts.values()} == {found.expert_params}
    total = sum(map(math.prod, shapes.values()))
    # LongCat's experts that do nothing: transformers gives them a part of one of the two stacked matrices.
    total -= sum((shape[0] - found.num_experts) * math.prod(shape[1:]) for stack in experts.values() for shape in stack)
    if not found.tied_embeddings and not any("lm_head" in name for name in shapes):
        total += found.head_params  # a model without its head
    assert found.num_params == pytest.approx(total, rel=0.01)


def test_every_kind_of_layer_that_transformers_translates_is_known() -> None:
    from transformers import configuration_utils

    legacy = configuration_utils._LEGACY_LAYER_TYPE_REMAP
    assert {name: LAYER_TYPES.get(name) for name in legacy} == {name: LAYER_TYPES[now] for name, now in legacy.items()}


TRANSLATED = [
    (kind, alias, name)
    for kind in TYPES
    if not OTHERS.search(kind) and kind not in REFUSED
    for alias, name in CONFIG_MAPPING[kind].attribute_map.items()
    # Of attention in latent form a file's head_dim says something else.
    if (kind, alias) != ("glm4_moe_lite", "head_dim")
]
"""Names of one key of a kind of models: what a file may say, and what transformers calls it."""


@pytest.mark.parametrize(("kind", "alias", "name"), TRANSLATED)
def test_both_names_of_a_key_are_read(kind: str, alias: str, name: str, tmp_path: Path) -> None:
    config_of(kind).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    if table.get(name) is None:
        return  # computed from others, and in no file
    found = replace(read_model_file(path).spec, source="-")
    others = {key: value for key, value in table.items() if key not in (alias, name)}
    path.write_text(json.dumps({**others, alias: table[name]}), encoding="utf-8")
    assert replace(read_model_file(path).spec, source="-") == found


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe", "bailing_hybrid", "mellum", "sarvam_moe"])
def test_heads_of_multi_token_prediction_are_those_that_transformers_builds(kind: str, tmp_path: Path) -> None:
    from transformers.modeling_layers import MtpModel

    layers = {"mtp_layer_types": ["full_attention"], "mtp_mlp_layer_types": ["sparse"]}
    own = layers if kind == "bailing_hybrid" else {}
    config = CONFIG_MAPPING[kind](**GIVEN.get(kind, {}), num_mtp_layers=1, **own)
    config.save_pretrained(tmp_path)
    spec = read_model_file(tmp_path).spec
    model = model_of(kind, config)
    with torch.device("meta"):
        heads = MtpModel(model, 1).layers
    assert 8 * spec.mtp_bytes / spec.weight_bits == pytest.approx(
        sum(one.numel() for one in heads.parameters()), rel=0.01
    )
