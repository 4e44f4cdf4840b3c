"""What a machine whose host computes experts must be told of times: by whom they are worked out is not its business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from expertflow.machine import Costs


class HostTimes(Protocol):
    """How long a host takes, in whole ns."""

    def expert_ns(self, num_tokens: int) -> int:
        """The products of one expert over so many tokens."""

    def there_ns(self, num_rows: int) -> int:
        """Until the activations of so many rows are in the host's memory; the results take as long back."""


class Figures(Protocol):
    """What experts cost on the host and on the GPU beside it."""

    @property
    def times(self) -> HostTimes:
        """Of the host."""

    @property
    def chunk_ns(self) -> Sequence[int]:
        """Of each chunk of one expert, on an idle link."""

    def costs(self, tokens: Sequence[int], num_tokens: int, link_wait_ns: int) -> Costs:
        """As of `expertflow.machine.HostMachine.estimate`. num_tokens: of the whole forward."""
