"""Bytes of experts that are not all alike: as a model gives them, and by expert key.

Mixed quantisers keep some layers at more bits than others, so that experts of different layers take different bytes.
A size is that of all that one load copies. Shape letters: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from expertflow.keys import number_text, shown

ExpertBytes = int | tuple[int | tuple[int, ...], ...]
"""One size for all; one a layer [L]; or where a layer's experts differ one each [L][E]. Both forms may be mixed."""
BY_BITS = "by_bits"
"""In place of sizes: by the bits of a weight, whatever a file or a trace would say."""
MOST_EXPERT_BYTES = 10**13
"""Of one expert: more than a model has."""
ABOUT = "a list of num_layers of them, each a number or a list of num_experts"
"""The further form, for messages."""


def frozen(value: object) -> object:
    """Lists as tuples, two deep, which neither change nor fail to be hashed; None for BY_BITS, which gives none;
    anything else as it is."""
    if value == BY_BITS:
        return None
    if not isinstance(value, list | tuple):
        return value
    return tuple(tuple(one) if isinstance(one, list | tuple) else one for one in value)


def check_expert_bytes(value: object, key: str, num_layers: int, num_experts: int) -> None:
    """ValueError, one line that names `key`, where a list is not of this model's shape or holds what is no size."""
    if not isinstance(value, list | tuple):
        return
    if len(value) != num_layers:
        raise ValueError(f"{key} lists {len(value)} sizes, the model has num_layers={num_layers}; give one each")
    for layer, own in enumerate(value):
        each = own if isinstance(own, list | tuple) else (own,)
        if isinstance(own, list | tuple) and len(own) != num_experts:
            raise ValueError(
                f"{key}[{layer}] lists {len(own)} sizes, a layer has num_experts={num_experts}; give one each, or one "
                "number for all"
            )
        for size in each:
            if type(size) is not int or not 1 <= size <= MOST_EXPERT_BYTES:
                raise ValueError(
                    f"{key}[{layer}] holds {shown(size)}; give whole numbers of bytes in "
                    f"[1, {number_text(MOST_EXPERT_BYTES)}]"
                )


def sizes_by_key(value: ExpertBytes | None, num_layers: int, num_experts: int) -> tuple[int, ...] | None:
    """Bytes by expert key [L * E]; None where all are alike, or nothing is given."""
    if value is None or isinstance(value, int):
        return None
    found: list[int] = []
    for own in value:
        found.extend(own if isinstance(own, tuple) else (own,) * num_experts)
    return None if min(found) == max(found) else tuple(found)


def shortest_form(sizes: Sequence[Sequence[int]]) -> ExpertBytes:
    """What `sizes` [L][E] are as a model gives them: one number, one a layer, or one an expert where they differ."""
    layers = tuple(own[0] if min(own) == max(own) else tuple(own) for own in sizes)
    first = layers[0]
    return first if isinstance(first, int) and all(one == first for one in layers) else layers


def least_and_most(value: ExpertBytes) -> tuple[int, int]:
    """The smallest and the largest size."""
    if isinstance(value, int):
        return value, value
    each = [size for own in value for size in (own if isinstance(own, tuple) else (own,))]
    return min(each), max(each)


def most_that_fit(sizes: Iterable[int], room: int) -> int:
    """How many experts can be in `room` bytes at once, whichever: the smallest ones."""
    count = 0
    for size in sorted(sizes):
        room -= size
        if room < 0:
            break
        count += 1
    return count
