"""What an indexer keeps of a token: the choice of the engines, whatever the file that the weights are from."""

from __future__ import annotations


def fp8_key_bits(index_dim: int) -> float:
    """Bits of each of the `index_dim` values of an index key in fp8, with a scale of 32 bits for every 128 values.

    132 bytes for 128 values of DeepSeek-V3.2 (FlashInfer-Bench, dsa_topk_indexer_fp8, head_dim_with_scale); of GLM-5
    (GitHub vllm-project/vllm#48558) and of each entry of DeepSeek-V4 (#51209) as many. All have a form in 4 bits, too,
    which is off by default.
    """
    return 8 + 32 * -(-index_dim // 128) / index_dim
