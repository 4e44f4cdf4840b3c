"""The keys of a GGUF file by their type and range: what the header says of a model beside its tensors."""

from __future__ import annotations

from collections.abc import Sequence

from sim.specs.gguf_format import REWRITE, Header, Value
from traces.jsontext import shown
from traces.messages import fault

MOST = 2**31 - 1


class GgufKeys:
    """Keys of one header; those of a model begin with its architecture, `{arch}` in the names of the package `gguf`."""

    def __init__(self, header: Header) -> None:
        from gguf.constants import Keys

        self.path, self._keys, self._counts = header.path, header.keys, header.counts
        self.arch = self.text(Keys.General.ARCHITECTURE)
        if not self.arch or len(self.arch) > 64 or not self.arch.isprintable():
            raise fault(self.path, f"key {Keys.General.ARCHITECTURE!r}", f"is {shown(self.arch)}, no name", REWRITE)

    def text(self, name: str, default: str | None = None) -> str:
        """A text; TraceError where it is missing and there is no default, or something else."""
        value = self._keys.get(name, default)
        if not isinstance(value, str):
            problem = f"lacks the key {name}" if value is None else f"has the key {name} of {shown(value)}, no text"
            raise fault(self.path, "file", problem, REWRITE)
        return value

    def whole(self, name: str, low: int, high: int = MOST, default: int | None = None) -> int:
        """A whole number from `low` to `high`; of an array whose values are all alike, that value."""
        key = name.format(arch=self.arch)
        value = self._keys.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        return self._checked(key, value, low, high)

    def given(self, name: str) -> bool:
        """Whether the file has that key."""
        key = name.format(arch=self.arch)
        return key in self._keys or key in self._counts

    def is_list(self, name: str) -> bool:
        """Whether it is an array."""
        return isinstance(self._keys.get(name.format(arch=self.arch)), list)

    def length(self, name: str) -> int:
        """Values of an array that is counted, not kept; 0 if there is none."""
        key = name.format(arch=self.arch)
        value = self._keys.get(key)
        return len(value) if isinstance(value, list) else self._counts.get(key, 0)

    def of_blocks(self, name: str, num_blocks: int, low: int, high: int, default: int | None = None) -> Sequence[int]:
        """A whole number for each of so many blocks: an array, or one number for all. Truth values count as 0 and 1."""
        key = name.format(arch=self.arch)
        value = self._keys.get(key, default)
        if not isinstance(value, list):
            return [self._checked(key, value, low, high)] * num_blocks
        if len(value) < num_blocks:
            raise fault(self.path, f"key {key!r}", f"has {len(value)} values, of {num_blocks} blocks", REWRITE)
        return [self._checked(key, int(v) if isinstance(v, bool) else v, low, high) for v in value[:num_blocks]]

    def _checked(self, key: str, value: Value | None, low: int, high: int) -> int:
        if value is None:
            # A text or array that is too long to be kept is no number either.
            if key in self._counts:
                raise fault(self.path, f"key {key!r}", f"has {self._counts[key]} values, a number is needed", REWRITE)
            raise fault(self.path, "file", f"lacks the key {key}", REWRITE)
        if type(value) is not int or not low <= value <= high:
            problem = f"is {shown(value)}, a whole number from {low} to {high} is needed"
            raise fault(self.path, f"key {key!r}", problem, REWRITE)
        return value
