"""The tokens that end an answer: the artifact's, those of the options, and special tokens that are given as texts."""

from typing import Any

from pos2d.errors import UsageError
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.text.artifact import LoadedArtifact


def end_tokens(artifact: LoadedArtifact, sampling: Sampling) -> set[int]:
    """The end tokens of the artifact and of the options; a tokenizer may have tokens that the model does not have."""
    tokens = {*artifact.manifest.eos_token_ids, *end_token_ids(artifact.tokenizer, sampling)}
    return {token for token in tokens if token < artifact.manifest.vocab_size}


def end_token_ids(tokenizer: Any, sampling: Sampling) -> list[int]:
    """The ids of the option ``end_token``, and of the special tokens in ``stop``.

    Raises:
        UsageError: a token that the tokenizer does not have, or a special token within a text.
    """
    if not sampling.end_token and not sampling.stop:
        return []
    vocabulary = tokenizer.get_vocab() if sampling.end_token else {}
    unknown = [token for token in sampling.end_token if token not in vocabulary]
    if unknown:
        raise UsageError(
            f"`end_token` {', '.join(map(ascii, unknown))} is not in the tokenizer; `stop` ends answers before any text"
        )
    return [*(vocabulary[token] for token in sampling.end_token), *_special_stops(tokenizer, sampling)]


def _special_stops(tokenizer: Any, sampling: Sampling) -> list[int]:
    """The ids of special tokens in ``stop``: the text of an answer has none, so only their ids can be found.

    White space around a special token does not count, since it may come after the token.
    """
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for stop in sampling.stop:
        within = [token for token in special if token and token in stop and token != stop.strip()]
        if within and stop.strip() not in special:
            raise UsageError(
                f"`stop` {stop!r}, or stop_strings of the artifact's generation_config.json, has the special token "
                f"{within[0]}, which no text of an answer has; end answers with `end_token` {within[0]}"
            )
    return [special[stop.strip()] for stop in sampling.stop if stop.strip() in special]
