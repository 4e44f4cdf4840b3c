"""The parts of a GGUF model and its blocks, those of parts that are not there taken to be like others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sim.specs.gguf_format import MAX_TENSORS, REWRITE, Header, read_header
from sim.specs.gguf_keys import GgufKeys
from sim.specs.gguf_tensors import Block, Contents, block_number, check_whole, sort_tensors
from traces.jsontext import shown
from traces.messages import TraceError, cut, fault

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.ASCII | re.DOTALL)
EMBEDDING = "token_embd.weight"
_MOST_PARTS = 10_000
_MOST_BLOCKS = 4096


@dataclass(frozen=True)
class GgufFile:
    """One model: its first part, which has the keys, the parts that are there with their numbers (from 0), and the
    names of those that are not."""

    path: Path
    first: Header
    parts: Mapping[int, Header]
    missing: Sequence[str]

    def fault(self, where: str, problem: str, remedy: str = REWRITE) -> TraceError:
        """The error to raise where something is wrong with it."""
        return fault(self.path, where, problem, remedy)


def read_parts(path: Path) -> GgufFile:
    """The file, and the other parts of its model that lie beside it."""
    from gguf.constants import Keys

    named = _PART.fullmatch(path.name)
    count = int(named[3]) if named else 1
    if not named or not 1 < count <= _MOST_PARTS or not 0 < int(named[2]) <= count:
        header = read_header(path)
        told = header.keys.get(Keys.Split.LLM_KV_SPLIT_COUNT, 1)
        if isinstance(told, int) and told > 1:
            problem = f"is one of {told} parts by its key {Keys.Split.LLM_KV_SPLIT_COUNT}"
            raise fault(path, "file", problem, "give the parts the names that they had, …-00001-of-00003.gguf")
        return GgufFile(path, header, {0: header}, [])
    names = [f"{named[1]}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    there = [number for number, name in enumerate(names) if name == path.name or (path.parent / name).exists()]
    if there[0] != 0:
        problem = f"is part {int(named[2])} of {count}, and {names[0]}, which has the keys, is not beside it"
        raise fault(path, "file", problem, "fetch the first part, too; its header is enough")
    parts: dict[int, Header] = {}
    total = 0
    for number in there:
        parts[number] = part = read_header(path.parent / names[number])
        total += len(part.tensors)
        if total > MAX_TENSORS:
            raise fault(path, "file", f"has more than {MAX_TENSORS} tensors with its other parts", REWRITE)
        own = [part.keys.get(key) for key in (Keys.Split.LLM_KV_SPLIT_NO, Keys.Split.LLM_KV_SPLIT_COUNT)]
        if own != [number, count]:
            problem = f"says that it is part {shown(own[0])} (from 0) of {shown(own[1])}"
            raise fault(part.path, "file", problem, "give the parts the names that they had")
    _check_tensors_of(path, parts.values(), len(parts) == count)
    return GgufFile(path, parts[0], parts, [name for number, name in enumerate(names) if number not in parts])


def _check_tensors_of(path: Path, parts: Collection[Header], whole: bool) -> None:
    """TraceError where a tensor stands in two parts, or they have not as many as they say together."""
    from gguf.constants import Keys

    counted = Counter(tensor.name for part in parts for tensor in part.tensors)
    for name, times in counted.most_common(1):
        if times > 1:
            raise fault(path, f"tensor {name!r}", "stands in two of its parts", REWRITE)
    told = next(iter(parts)).keys.get(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)
    if isinstance(told, int) and whole and told != len(counted):
        raise fault(path, "file", f"has {len(counted)} tensors with its other parts, its key says {told}", REWRITE)


@dataclass(frozen=True)
class Model:
    """Every block of the model itself, in its order; the tensors outside of blocks; what was computed; bytes of the
    blocks behind the model's, which predict further tokens (MTP); what is said of parts that are not there."""

    blocks: Sequence[Block]
    contents: Contents
    told: Sequence[str]
    mtp_bytes: int = 0
    incomplete: Sequence[str] = ()


def read_blocks(file: GgufFile, keys: GgufKeys) -> Model:
    """All tensors by block. TraceError where a block, or a matrix of its experts, is not there."""
    from gguf.constants import Keys

    told, incomplete = [], []
    count = keys.whole(Keys.LLM.BLOCK_COUNT, 1, _MOST_BLOCKS)
    extra = keys.whole(Keys.LLM.NEXTN_PREDICT_LAYERS, 0, count - 1, default=0)
    num_experts = keys.whole(Keys.LLM.EXPERT_COUNT, 2, 65_535)
    tensors = [tensor for part in file.parts.values() for tensor in part.tensors]
    contents = sort_tensors(tensors, count, num_experts, file.fault)
    wanted = range(count - extra)
    heads = [contents.blocks[index].num_bytes for index in range(count - extra, count) if index in contents.blocks]
    if extra:
        told.append(_about_heads(extra, count, heads, bool(file.missing)))
    if file.missing:
        blocks, num_filled = _filled(file, keys, contents, wanted)
        incomplete.append(
            f"{len(file.missing)} of {len(file.missing) + len(file.parts)} parts are not there "
            f"({cut(file.missing[0], 80)} first): {num_filled} of {len(wanted)} blocks are taken to be like others; "
            "fetch the headers of all for exact sizes"
        )
    else:
        for index in wanted:
            if index not in contents.blocks:
                raise file.fault(f"block {index}", f"has no tensors, the file says it has {count} blocks")
        blocks = [contents.blocks[index] for index in wanted]
    for index, block in enumerate(blocks):
        check_whole(f"block {index}", block, file.fault)
    if not any(block.experts for block in blocks):
        raise file.fault("file", "has no tensors of experts (ffn_up_exps …)", "give the file with the weights")
    if not file.missing and EMBEDDING not in contents.outside:
        raise file.fault("file", f"has no tensor {EMBEDDING}")
    return Model(blocks, contents, told, sum(heads), incomplete)


def _about_heads(number: int, count: int, heads: Sequence[int], in_parts: bool) -> str:
    """What is said of blocks that predict further tokens. heads: bytes of those that are there."""
    text = f"{number} of {count} blocks, which predict further tokens (MTP), are left out"
    if not heads:
        return f"{text}; no part that is there holds them" if in_parts else f"{text}; the file does not hold them"
    there = "" if len(heads) == number else f", {len(heads)} of them in the parts that are there"
    return f"{text}: {sum(heads) / 1e9:.3g} GB{there}, loaded with model.mtp=true"


def _filled(file: GgufFile, keys: GgufKeys, contents: Contents, wanted: range) -> tuple[list[Block], int]:
    """Every block, those that are not there whole like the nearest that is, at the same place of the period."""
    from gguf.constants import Keys

    names = {index: _names(contents.blocks[index]) for index in wanted if index in contents.blocks}
    kinds = set(names.values())
    partial = {kind for kind in kinds if any(kind < other for other in kinds)}
    cut = set(_cut_blocks(file))
    whole = {
        index
        for index, own in names.items()
        if index not in cut and own not in partial and _is_whole(contents.blocks[index])
    }
    if not any(contents.blocks[index].experts for index in whole):
        problem = "no block with experts is whole in the parts that are there"
        raise file.fault("file", problem, f"fetch {file.missing[0]}, too; its header is enough")
    period = keys.whole(Keys.LLM.FULL_ATTENTION_INTERVAL, 1, _MOST_BLOCKS, default=1)
    blocks = []
    for index in wanted:
        alike = [at for at in whole if (at - index) % period == 0 and contents.blocks[at].experts] or whole
        distances = [(abs(at - index), at) for at in ([index] if index in whole else alike)]
        blocks.append(contents.blocks[min(distances)[1]])
    return blocks, len(wanted) - len(whole)


def _cut_blocks(file: GgufFile) -> Iterator[int]:
    """Blocks that may go on in a part that is not there: those of a part's last and first tensor."""
    for number, part in file.parts.items():
        for other, tensors in ((number - 1, part.tensors), (number + 1, part.tensors[::-1])):
            if 0 <= other < len(file.parts) + len(file.missing) and other not in file.parts:
                numbers = (block_number(tensor.name) for tensor in tensors)
                yield from islice((found for found in numbers if found is not None), 1)


def _names(block: Block) -> frozenset[str]:
    """What a block has, without the sizes."""
    roles = block.experts.shapes if block.experts else ()
    return frozenset((*block.shapes, *(f"{role}_exps" for role in roles)))


def _is_whole(block: Block) -> bool:
    return block.experts is None or block.experts.whole
