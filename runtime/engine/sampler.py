"""Sampling the tokens of one branch: which logits processors run, in which order, and the random numbers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from pos2d.options import options_of
from pos2d.runtime.engine import logits_processors as processors
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.engine.sampling import Sampling

# Changes logits ``[V]``, given the value of its option and the branch's sampler.
Processor = Callable[[Floats, Any, "Sampler"], Floats]


def _penalise(logits: Floats, penalty: float, branch: "Sampler") -> Floats:
    return processors.penalise_repetition(logits, branch.seen_tokens, penalty)


def _suppress_end_tokens(logits: Floats, minimum: int, branch: "Sampler") -> Floats:
    if branch.new_tokens >= minimum or not branch.end_tokens:
        return logits
    return processors.suppress(logits, branch.end_tokens)


# The processor of each option, in the order in which transformers applies them. One whose option is at its default is
# left out. Greedy decoding applies the first table only.
PENALTIES: Mapping[str, Processor] = {
    "repetition_penalty": _penalise,
    "min_new_tokens": _suppress_end_tokens,
}
WARPERS: Mapping[str, Processor] = {
    "temperature": lambda logits, temperature, _: processors.apply_temperature(logits, temperature),
    "top_k": lambda logits, k, _: processors.keep_top_k(logits, k),
    "top_p": lambda logits, p, _: processors.keep_top_p(logits, p),
    "min_p": lambda logits, p, _: processors.keep_min_p(logits, p),
}


class Sampler:
    """Chooses the tokens of one branch; a :class:`pos2d.runtime.engine.sequence.BranchSampler`.

    ``random_stream`` identifies the branch's random numbers under the seed, so what is sampled depends neither on the
    other branches nor on their number. ``seen_tokens`` are those of the prompt, its context and the answer.
    """

    def __init__(
        self,
        sampling: Sampling,
        random_stream: Sequence[int] = (0,),
        end_tokens: Collection[int] = (),
        prompt_ids: Collection[int] = (),
    ) -> None:
        self.sampling = sampling
        self.end_tokens = end_tokens
        self.max_new_tokens = sampling.max_new_tokens
        self.new_tokens = 0
        self.seen_tokens = set(prompt_ids)
        self._random_stream = tuple(random_stream)
        self._greedy = sampling.temperature == 0.0
        self._processors = _active(sampling, PENALTIES if self._greedy else {**PENALTIES, **WARPERS})

    @cached_property
    def _random(self) -> "np.random.Generator":
        # Only when sampling: numpy loads numpy.random on first use, which greedy decoding does without.
        return np.random.default_rng(np.random.SeedSequence(self.sampling.seed, spawn_key=self._random_stream))

    def choose(self, logits: Floats) -> tuple[int, float | None]:
        """A token id from logits ``[V]``, and its log probability if the options record it."""
        token = self._sample(self.processed(logits))
        self.new_tokens += 1
        self.seen_tokens.add(token)
        return token, processors.log_probability(logits, token) if self.sampling.logprobs else None

    def append(self, token: int) -> bool:
        """Whether the answer ends with ``token``: never, since only text can hold a stop string."""
        return False

    def processed(self, logits: Floats) -> Floats:
        """Logits ``[V]`` after all processors."""
        for processor, value in self._processors:
            logits = processor(logits, value, self)
        return logits

    def _sample(self, logits: Floats) -> int:
        if self._greedy:
            return int(logits.argmax())
        ids = np.flatnonzero(logits > -np.inf)
        return int(ids[self._random.choice(len(ids), p=processors.probabilities(logits[ids]))])


def _active(sampling: Sampling, table: Mapping[str, Processor]) -> list[tuple[Processor, Any]]:
    """The processors whose options differ from their defaults, each with the value of its option."""
    declared = options_of(Sampling)
    values = {name: getattr(sampling, name) for name in table}
    return [(table[name], value) for name, value in values.items() if value != declared[name].default]
