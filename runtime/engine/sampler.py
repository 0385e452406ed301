"""The draws of one branch."""

from collections.abc import Collection, Sequence
from functools import cached_property

import numpy as np

from pos2d.runtime.engine import logits_processors as change
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.engine.sampling import Sampling


class Sampler:
    """Chooses the tokens of one branch; a :class:`pos2d.runtime.engine.sequence.Writer`.

    ``stream`` numbers its random numbers: what it draws depends neither on its neighbours nor on how many there are.
    """

    def __init__(
        self,
        sampling: Sampling,
        stream: Sequence[int] = (0,),
        end_tokens: Collection[int] = (),
        prompt_ids: Collection[int] = (),
    ) -> None:
        self.sampling = sampling
        self.end_tokens = end_tokens
        self.max_new_tokens = sampling.max_new_tokens
        self._count = 0
        self._stream = tuple(stream)
        self._seen = set(prompt_ids)

    @cached_property
    def _random(self) -> "np.random.Generator":
        # Greedy answers never come here: numpy.random is a library of its own, and is only loaded when it is touched.
        return np.random.default_rng(np.random.SeedSequence(self.sampling.seed, spawn_key=self._stream))

    def choose(self, logits: Floats) -> tuple[int, float | None]:
        """A token id from logits ``[V]``, and the logarithm of its probability where the options ask for it."""
        token = self._draw(self._changed(logits))
        self._count += 1
        self._seen.add(token)
        return token, change.log_probability(logits, token) if self.sampling.logprobs else None

    def ended(self, token: int) -> bool:
        return False

    def _changed(self, logits: Floats) -> Floats:
        options = self.sampling
        if options.repetition_penalty != 1.0:
            logits = change.penalise_repetition(logits, self._seen, options.repetition_penalty)
        if self._count < options.min_new_tokens and self.end_tokens:
            logits = change.forbid(logits, self.end_tokens)
        if options.temperature == 0.0:
            return logits
        logits = logits / np.float32(options.temperature)
        if options.top_k:
            logits = change.keep_top_k(logits, options.top_k)
        if options.top_p < 1.0:
            logits = change.keep_top_p(logits, options.top_p)
        if options.min_p > 0.0:
            logits = change.keep_min_p(logits, options.min_p)
        return logits

    def _draw(self, logits: Floats) -> int:
        if self.sampling.temperature == 0.0:
            return int(logits.argmax())
        ids = np.flatnonzero(logits > -np.inf)
        return int(ids[self._random.choice(len(ids), p=change.probabilities(logits[ids]))])
