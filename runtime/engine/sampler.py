"""Sampling the tokens of one branch: which logits processors run, in which order, and the random numbers."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from pos2d.errors import InputError, UsageError
from pos2d.layout import Bools
from pos2d.options import options_of
from pos2d.runtime.engine import logits_processors as processors
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.engine.generation_settings import NO_SETTINGS
from pos2d.runtime.engine.sampling import Sampling, token_biases
from pos2d.runtime.engine.sequence import Choice

# Changes logits ``[V]``, given the value of its option and the branch's sampler.
Processor = Callable[[Floats, Any, "Sampler"], Floats]


def _suppress_end_tokens(logits: Floats, minimum: int, branch: "Sampler") -> Floats:
    if branch.new_tokens >= minimum or not branch.end_tokens:
        return logits
    return processors.suppress(logits, branch.end_tokens)


def _no_repetition(logits: Floats, size: int, branch: "Sampler") -> Floats:
    return processors.suppress(logits, processors.repeating(branch.tokens, size, branch.tokens))


def _no_repetition_of_prompt(logits: Floats, size: int, branch: "Sampler") -> Floats:
    return processors.suppress(logits, processors.repeating(branch.tokens, size, branch.prompt))


def _add_biases(logits: Floats, _: Any, branch: "Sampler") -> Floats:
    return processors.add_biases(logits, branch.tokens, branch.biases)


def _no_bad_words(logits: Floats, _: Any, branch: "Sampler") -> Floats:
    return processors.add_biases(logits, branch.tokens, branch.bad_words)


def _force_first(logits: Floats, token: int, branch: "Sampler") -> Floats:
    return processors.force(logits, _known([token], logits)) if len(branch.tokens) == 1 else logits


def _force_last(logits: Floats, tokens: Collection[int], branch: "Sampler") -> Floats:
    is_last = branch.new_tokens == branch.max_new_tokens - 1
    return processors.force(logits, _known(tokens, logits)) if is_last else logits


def _raise_end_tokens(logits: Floats, decay: tuple[int, float], branch: "Sampler") -> Floats:
    start, factor = decay
    beyond = branch.new_tokens - start
    return processors.raise_end_tokens(logits, branch.end_tokens, factor**beyond) if beyond > 0 else logits


def _suppress_at_begin(logits: Floats, tokens: Collection[int], branch: "Sampler") -> Floats:
    forced = branch.sampling.generation.forced_bos_token_id is not None and len(branch.prompt) <= 1
    return processors.suppress(logits, tokens) if branch.new_tokens == int(forced) else logits


def _known(tokens: Collection[int], logits: Floats) -> Collection[int]:
    """Check tokens that are forced.

    Raises:
        InputError: one is outside the vocabulary.
    """
    if max(tokens) >= len(logits):
        raise InputError(f"the generation settings force token {max(tokens)}, the vocabulary has {len(logits)}")
    return tokens


# The processor of each option or generation setting, in the order in which transformers applies them. Those that it
# does not have stand where vLLM has them: biases before penalties, and the penalties of frequency and presence after
# that of repetition. One whose value is at its default is left out. Greedy decoding applies the first table only.
PENALTIES: Mapping[str, Processor] = {
    "sequence_bias": _add_biases,
    "logit_bias": lambda logits, _, branch: processors.add_biases(logits, branch.tokens, branch.logit_biases),
    "encoder_repetition_penalty": lambda logits, penalty, branch: processors.penalise_repetition(
        logits, set(branch.prompt), 1 / penalty
    ),
    "repetition_penalty": lambda logits, penalty, branch: processors.penalise_repetition(
        logits, branch.seen_tokens, penalty
    ),
    "frequency_penalty": lambda logits, penalty, branch: processors.penalise_frequency(logits, branch.counts, penalty),
    "presence_penalty": lambda logits, penalty, branch: processors.penalise_presence(logits, branch.counts, penalty),
    "no_repeat_ngram_size": _no_repetition,
    "encoder_no_repeat_ngram_size": _no_repetition_of_prompt,
    "bad_words_ids": _no_bad_words,
    "min_length": lambda logits, minimum, branch: _suppress_end_tokens(logits, minimum - len(branch.prompt), branch),
    "min_new_tokens": _suppress_end_tokens,
    "forced_bos_token_id": _force_first,
    "forced_eos_token_id": _force_last,
    "exponential_decay_length_penalty": _raise_end_tokens,
    "suppress_tokens": lambda logits, tokens, _: processors.suppress(logits, tokens),
    "begin_suppress_tokens": _suppress_at_begin,
}
WARPERS: Mapping[str, Processor] = {
    "temperature": lambda logits, temperature, _: processors.apply_temperature(logits, temperature),
    "top_h": lambda logits, share, _: processors.keep_top_h(logits, share),
    "top_k": lambda logits, k, _: processors.keep_top_k(logits, k),
    "top_p": lambda logits, p, _: processors.keep_top_p(logits, p),
    "min_p": lambda logits, p, _: processors.keep_min_p(logits, p),
    "typical_p": lambda logits, mass, _: processors.keep_typical(logits, mass),
    "epsilon_cutoff": lambda logits, probability, _: processors.keep_above(logits, probability),
    "eta_cutoff": lambda logits, epsilon, _: processors.keep_eta(logits, epsilon),
}


class Constraint(Protocol):
    """What the text of one answer may be; it follows the answer token by token."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing can follow it."""

    def allowed(self, size: int) -> Bools:
        """The tokens ``[size]`` that may come next."""

    def accept(self, token: int) -> None:
        """Add a token to the answer."""


class Sampler:
    """Chooses the tokens of one branch; a :class:`pos2d.runtime.engine.sequence.BranchSampler`.

    ``random_stream`` identifies the branch's random numbers under the seed, so what is sampled depends neither on the
    other branches nor on their number. ``prompt`` are the tokens that the branch would have before its answer if it
    were alone, in their order: the context's and its own. ``tokens`` has those of the answer as well, and ``counts``
    how often each of them is in the answer. A ``constraint`` holds whatever the options say: they choose among the
    tokens that it allows, and where they forbid all of those, the model's own logits do.

    Raises:
        UsageError: options with a schema, without its constraint.
    """

    def __init__(
        self,
        sampling: Sampling,
        random_stream: Sequence[int] = (0,),
        end_tokens: Collection[int] = (),
        prompt_ids: Sequence[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        if sampling.json_schema is not None and constraint is None:
            raise UsageError("`json_schema` is about texts; use stream() or generate()")
        self.sampling = sampling
        self.end_tokens = end_tokens
        self.max_new_tokens = new_token_limit(sampling, len(prompt_ids))
        self.new_tokens = 0
        self.prompt: Sequence[int] = prompt_ids
        self.tokens: list[int] = list(prompt_ids)
        self.seen_tokens: set[int] = set(prompt_ids)
        self.counts: Counter[int] = Counter()
        self._random_stream = tuple(random_stream)
        self._greedy = sampling.temperature == 0.0
        self._constraint = constraint
        self._penalties = _active(sampling, PENALTIES)
        self._warpers = [] if self._greedy else _active(sampling, WARPERS)

    @cached_property
    def _random(self) -> "np.random.Generator":
        # Only when sampling: numpy loads numpy.random on first use, which greedy decoding does without.
        return np.random.default_rng(np.random.SeedSequence(self.sampling.seed, spawn_key=self._random_stream))

    @cached_property
    def logit_biases(self) -> processors.Biases:
        return processors.biases_of(((token,), bias) for token, bias in token_biases(self.sampling.logit_bias).items())

    @cached_property
    def biases(self) -> processors.Biases:
        return processors.biases_of(self.sampling.generation.sequence_bias)

    @cached_property
    def bad_words(self) -> processors.Biases:
        """The table of ``bad_words_ids``, without those that are a single end token."""
        words = self.sampling.generation.bad_words_ids
        return processors.biases_of((ids, -np.inf) for ids in words if len(ids) > 1 or ids[0] not in self.end_tokens)

    def choose(self, logits: Floats) -> Choice:
        """A token id from logits ``[V]``, with the log probabilities that the options record."""
        token = self._sample(self.processed(logits))
        self.add(token)
        count = self.sampling.top_logprobs
        if not self.sampling.logprobs and not count:
            return Choice(token)
        top = processors.most_likely(logits, count) if count else []
        logprob, *others = processors.log_probabilities(logits, [token, *top])
        return Choice(token, logprob, tuple(zip(top, others, strict=True)) if count else None)

    def add(self, token: int) -> None:
        """Count a token as one of the answer, for the processors that look at it."""
        self.new_tokens += 1
        self.tokens.append(token)
        self.counts[token] += 1
        self.seen_tokens.add(token)

    def append(self, token: int) -> bool:
        """Whether the answer ends with ``token``, since its constraint allows nothing after it."""
        if self._constraint is None:
            return False
        self._constraint.accept(token)
        return self._constraint.is_complete

    def processed(self, logits: Floats) -> Floats:
        """Logits ``[V]`` after all processors."""
        processed = logits
        for processor, value in self._penalties:
            processed = processor(processed, value, self)
        if self._constraint is not None:
            processed = processors.keep_allowed(processed, self._constraint.allowed(len(logits)), logits)
        for processor, value in self._warpers:
            processed = processor(processed, value, self)
        return processed

    def _sample(self, logits: Floats) -> int:
        likeliest = int(logits.argmax())
        if logits[likeliest] == -np.inf:
            raise InputError("the options and the artifact's generation settings forbid every token; loosen them")
        if self._greedy:
            return likeliest
        possible = logits > -np.inf
        ids = None if possible.all() else np.flatnonzero(possible)
        # What Generator.choice draws, without its checks, which take as long again.
        cumulated = np.cumsum(processors.probabilities(logits if ids is None else logits[ids]))
        cumulated /= cumulated[-1]
        drawn = cumulated.searchsorted(self._random.random(), side="right")
        return int(drawn if ids is None else ids[drawn])


def new_token_limit(sampling: Sampling, prompt_tokens: int) -> int:
    """The most tokens of an answer after ``prompt_tokens``.

    Raises:
        InputError: the prompt leaves none.
    """
    length = sampling.generation.max_length
    if length is None:
        return sampling.max_new_tokens
    if prompt_tokens >= length:
        raise InputError(
            f"max_length in the artifact's generation_config.json is {length} tokens, and the prompt has "
            f"{prompt_tokens}; give `max_new_tokens`, which takes precedence"
        )
    return min(sampling.max_new_tokens, length - prompt_tokens)


def _active(sampling: Sampling, table: Mapping[str, Processor]) -> list[tuple[Processor, Any]]:
    """The processors whose values differ from their defaults, each with its value."""
    options = options_of(Sampling)
    values = [
        (name, getattr(sampling, name), options[name].default)
        if name in options
        else (name, getattr(sampling.generation, name), getattr(NO_SETTINGS, name))
        for name in table
    ]
    return [(table[name], value) for name, value, default in values if value != default]
