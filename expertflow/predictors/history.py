"""What the history network is fed with: the routing of the forwards so far, taken in as it becomes known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from expertflow.forward import PREFILL, KnownForward
from expertflow.network import SHIFTS, Block, Flags, Floats, HistoryNetwork, Ints, Singles
from expertflow.predictors.hybrid_compiled import CompiledNetwork


class RoutingHistory:
    """Sums of the forward that runs, and the memory of those before it.

    compiled: does the work for forwards of one token; None: numpy does it all, to the same integers. quick: the same,
    for the forward that runs. features [F, L, E]: own features as they stood before the forward, and once `closed`
    (all its layers are known) after it. after [H]: activations after the forward, by numpy.
    """

    def __init__(self, net: HistoryNetwork, top_k: int, compiled: CompiledNetwork | None) -> None:
        self.net = net
        self.top_k = top_k
        self.compiled = compiled
        self.memory = net.begin()
        self._features: Floats | None = None
        self._packed: Ints | None = None
        self._begin(1)

    @property
    def features(self) -> Floats:
        """Own features [F, L, E]."""
        if self._features is None:
            self._features = self.net.own_features(self.memory.use, self.memory.shares)
        return self._features

    @property
    def packed(self) -> Ints:
        """The forward that runs, for what is compiled."""
        if self._packed is None:
            assert self.compiled is not None
            self._packed = self.compiled.pack_history(self.sums, self.used, self.features)
        return self._packed

    def begin_forward(self, forward: KnownForward) -> None:
        """A forward begins; what came before it is forgotten if all its requests begin with it."""
        if len(forward.requests_started) == len(forward.requests):
            self.memory = self.net.begin()
            self._features = None
        self._begin(forward.num_tokens)
        # Requests of a batch are at unlike places: only the tokens of a prompt follow one another.
        self.num_steps = forward.num_tokens if forward.phase == PREFILL else 1

    def _begin(self, num_tokens: int) -> None:
        net = self.net
        self.num_tokens = num_tokens
        self.num_steps = 1
        self.quick = self.compiled if num_tokens == 1 else None
        self.num_known = 0
        self.closed = False
        self.base = net.base(self.memory.states)
        self.sums: Ints = np.zeros((2 + len(SHIFTS)) * net.H, np.int64)
        """Over all layers (and the forwards before), over recent layers, one per rate."""
        self.sums[: net.H] = self.base
        self.used: Floats = np.zeros(net.L * net.E)
        self._packed = None

    def know(self, forward: KnownForward, layer: int) -> None:
        """Take note of the routing up to `layer`, which has become known; after the last the forward is closed."""
        net, H, counts = self.net, self.net.H, forward.counts
        while self.num_known <= layer:
            known = self.num_known
            keys = forward.demands[known]
            self.num_known += 1
            if self.quick is not None and len(keys) == self.top_k:
                self.quick.learn(keys, known, self.packed)
                continue
            made = net.embed(keys, None if counts is None else [counts[known][key] for key in keys], self.num_tokens)
            self.sums[H : 2 * H] = net.forget_recent(self.sums[H : 2 * H].astype(np.float64))
            self.sums += made.astype(np.int64)
            for key in keys:
                self.used[key] = 1.0 if counts is None else counts[known][key] / self.num_tokens
            if self.quick is not None:
                self.quick.hidden[: net.H] = self.activations(known)
        if layer == net.L - 1 and not self.closed:
            self._close()

    def take(self, forward: KnownForward, layer: int) -> Sequence[int] | None:
        """The experts of `layer` for who takes note of them himself; None: they are known already."""
        keys = forward.demands[layer]
        if layer == self.net.L - 1 or self.num_known != layer or len(keys) != self.top_k:
            self.know(forward, layer)
            return None
        self.num_known += 1
        return keys

    def activations(self, layer: int) -> Singles:
        """[H], after `layer`, the last that is known."""
        H = self.net.H
        return self.net.activate(self.sums[:H] + self.sums[H : 2 * H] + self.net.place[layer + 1])

    def _close(self) -> None:
        self.closed = True
        net, memory = self.net, self.memory
        if self.quick is not None:
            self.quick.close(self.packed, memory, self.used)
            return
        total = self.sums[2 * net.H :].astype(np.float64)
        self.memory = net.after(memory, total, self.used.reshape(net.L, net.E), self.num_steps)
        self._features, self._packed = net.own_features(self.memory.use, self.memory.shares), None
        self.after: Singles = net.activate(net.base(self.memory.states) + net.place[0])

    def forecast(self) -> Ints:
        """Chances [L * E] of use in the next forwards; before the first forward has ended, what is usual."""
        if not self.closed:
            return self.net.frequency.reshape(-1).astype(np.int64)
        if self.quick is not None:
            return self.quick.forecast(self.packed)
        return self.net.forecast(self.after, self.features)

    def run_block(self, keys: Ints, starts: Flags) -> Block:
        """Take in whole forwards at once; arguments as of `HistoryNetwork.run_block`."""
        self.memory, block = self.net.run_block(self.memory, keys, starts)
        self.replaced()
        return block

    def replaced(self) -> None:
        """The memory is that after other forwards."""
        self._features = self._packed = None
