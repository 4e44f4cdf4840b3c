"""What training the history network may be told. Needs no torch: `fit-predictor --help` lists it."""

from __future__ import annotations

from dataclasses import dataclass

from traces.fitting.dataset import MAX_ROWS


@dataclass(frozen=True)
class Training:
    """How long and how: passes over the rows, widths of the two hidden layers, the farthest distance, and the seed.

    discount: of each further forward in what counts as soon. distances_a_step: how many distances a step is taken on.
    """

    epochs: int = 12
    hidden: int = 192
    mixed: int = 128
    distances: int = 8
    seed: int = 0
    batch: int = 128
    lr: float = 3e-3
    weight_decay: float = 0.05
    dropout: float = 0.1
    discount: float = 0.75
    distances_a_step: int = 4


@dataclass(frozen=True, kw_only=True)
class HybridOptions:
    """What `fit-predictor kind=hybrid` may be told.

    dropout: in percent; more where rows are few. rows: of whole requests, from the first, at most so many. threads: of
    torch, 0 = its own choice. The others as in `Training`.
    """

    epochs: int = 12
    hidden: int = 192
    mixed: int = 128
    distances: int = 8
    dropout: int = 10
    rows: int = MAX_ROWS
    seed: int = 0
    threads: int = 0

    def training(self, num_layers: int) -> Training:
        """How a network for so many layers is trained."""
        distances = min(self.distances, num_layers - 1)
        return Training(
            epochs=self.epochs,
            hidden=self.hidden,
            mixed=self.mixed,
            distances=distances,
            seed=self.seed,
            dropout=self.dropout / 100,
            distances_a_step=min(Training.distances_a_step, distances),
        )
