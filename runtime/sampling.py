"""From one row of logits to one token."""

from dataclasses import dataclass, field

import numpy as np

from pos2d.errors import UsageError
from runtime.backend import Floats


@dataclass(frozen=True, slots=True)
class Sampler:
    """Greedy at temperature 0, else a draw from ``softmax(logits / temperature)``.

    Every branch has its own stream of random numbers, so that what it draws does not depend on its neighbours.
    """

    temperature: float = 0.0
    seed: int = 0
    _streams: dict[int, np.random.Generator] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature {self.temperature} must be 0 (greedy) or above")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} must not be negative")

    def draw(self, logits: Floats, branch: int) -> int:
        """A token id from logits ``[V]``."""
        if self.temperature == 0.0:
            return int(logits.argmax())
        stream = self._streams.setdefault(branch, np.random.default_rng((self.seed, branch)))
        scaled = logits.astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled.max())
        return int(stream.choice(len(weights), p=weights / weights.sum()))
