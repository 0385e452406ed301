"""Checks of sampling options against the artifact whose tokens they name, before anything is decoded."""

from pos2d.errors import UsageError
from pos2d.runtime.engine.sampling import Sampling, token_biases
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.end_tokens import end_token_ids


def check_sampling(artifact: LoadedArtifact, sampling: Sampling) -> None:
    """Check that ``artifact`` can heed the options.

    Raises:
        UsageError: a token that the tokenizer or the model does not have, a schema that cannot be enforced, or end
            tokens that a schema's JSON may need.
        InputError: a schema for a tokenizer that llguidance cannot read.
    """
    ends = end_token_ids(artifact.tokenizer, sampling)
    check_biases(artifact, sampling)
    if sampling.json_schema is not None:
        added = artifact.tokenizer.added_tokens_decoder
        if not all(token in added and added[token].special for token in ends):
            raise UsageError("`json_schema` goes with an `end_token` that is a special token, not with one of text")
        artifact.json_schemas.check(sampling.json_schema)


def check_biases(artifact: LoadedArtifact, sampling: Sampling) -> None:
    """Check the tokens of ``logit_bias``.

    Raises:
        UsageError: one is outside the vocabulary.
    """
    outside = [token for token in token_biases(sampling.logit_bias) if token >= artifact.manifest.vocab_size]
    if outside:
        raise UsageError(
            f"`logit_bias` has token {outside[0]}, which is outside the vocabulary of {artifact.manifest.vocab_size}"
        )
