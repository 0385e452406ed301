"""A request: prompts over one context, laid out in as many sequences as they need; the context is prefilled once."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pos2d.layout import Layout, build_layout
from pos2d.runtime.engine.prefix_cache import PrefixCache
from pos2d.runtime.engine.sampler import new_token_limit
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.engine.sequence import check_branches, check_length
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.chat_template import check_arguments
from pos2d.runtime.text.completions import Event
from pos2d.runtime.text.context_store import ContextStore
from pos2d.runtime.text.options import RequestOptions
from pos2d.runtime.text.sampling_checks import check_sampling
from pos2d.runtime.text.text_decode import decode_text
from pos2d.runtime.text.tokenization import EncodedPrompts, encode_prompts
from pos2d.spec import Rope2DSpec


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Prompts that were checked and laid out: ``layouts`` are the sequences, each with the context before its prompts.

    ``spec`` has the positions of these layouts. ``cache_context``: where the keys and values of the context are stored.
    """

    encoded: EncodedPrompts
    layouts: tuple[Layout, ...]
    spec: Rope2DSpec
    sampling: Sampling
    cache_context: str | None = None

    @property
    def most_branches(self) -> int:
        """The number of branches of the sequence that has most."""
        return max(len(layout.last) for layout in self.layouts)


def prepare_request(
    artifact: LoadedArtifact, prompts: Sequence[str], context: str | None, options: RequestOptions
) -> Request:
    """Encode and lay out ``prompts``; everything that can be wrong with them is found here.

    Raises:
        InputError: no tokenizer, no prompt or an empty one, or prompts that are longer than the model.
        UsageError: options that this artifact cannot use.
    """
    options.check_cache(context)
    options.layout.check_effect(artifact.manifest.rope_2d)
    spec = options.layout.apply_to(artifact.manifest.rope_2d)
    encoded = encode_for(
        artifact.tokenizer, prompts, context, spec, options.ignore_chat_template, options.chat_template_kwargs
    )
    request = lay_out(artifact, encoded, spec, options.sampling, options.layout.branches_per_sequence)
    return replace(request, cache_context=options.cache_context)


def encode_for(
    tokenizer: Any,
    prompts: Sequence[str],
    context: str | None,
    spec: Rope2DSpec,
    ignore_chat_template: bool,
    template_arguments: Mapping[str, Any] | None = None,
) -> EncodedPrompts:
    """Token ids of prompts that will have the positions of ``spec``.

    The rules are those of :func:`pos2d.runtime.text.tokenization.encode_prompts`.

    Raises:
        UsageError: arguments that the chat template does not read.
    """
    chat = bool(tokenizer.chat_template) and not ignore_chat_template
    check_arguments(tokenizer, template_arguments, uses_template=chat)
    return encode_prompts(
        tokenizer,
        prompts,
        context,
        chat=chat,
        add_special_tokens=len(prompts) == 1 or spec.visibility == "isolated",
        template_arguments=template_arguments,
    )


def lay_out(
    artifact: LoadedArtifact, encoded: EncodedPrompts, spec: Rope2DSpec, sampling: Sampling, branches_per_sequence: int
) -> Request:
    """Lay out encoded prompts.

    Raises:
        InputError: token ids outside the vocabulary, a sequence that is longer than the model, or a prompt that leaves
            no room below the artifact's ``max_length``.
        UsageError: an end token that the tokenizer does not have, a biased token that the model does not have, or
            branches for an artifact that has none.
    """
    check_sampling(artifact, sampling)
    for branch in encoded.branches:
        new_token_limit(sampling, len(encoded.context or ()) + len(branch))
    # An isolated branch is what it is in a sequence of its own.
    alone = spec.visibility == "isolated" and not artifact.manifest.has_branches
    size = 1 if alone else branches_per_sequence
    groups = (encoded.branches[first : first + size] for first in range(0, len(encoded.branches), size))
    layouts = tuple(build_layout(branches, spec, encoded.context) for branches in groups)
    check_branches(artifact.manifest, layouts)
    for layout in layouts:
        artifact.check_ids(layout.ids)
        check_length(layout, artifact.manifest.context_length)
    return Request(encoded, layouts, spec, sampling)


def stream_columns(
    artifact: LoadedArtifact, request: Request, prefix: PrefixCache | None = None, turn: Sequence[int] = ()
) -> Generator[list[Event]]:
    """Decode the sequences of a request one after the other; yield the events of every column.

    ``Event.branch`` counts the prompts of the request. The context is prefilled into ``prefix`` and stays there.
    ``turn`` and the branch identify the random numbers of an answer.
    """
    context = request.encoded.context or []
    artifact.backend.expect_branches(request.most_branches)
    prefix = prefix or PrefixCache(artifact.backend, request.spec, artifact.manifest.context_length)
    fill_from_store(artifact, prefix, request)
    first = 0
    for layout in request.layouts:
        prefix.fill(context)
        branches = range(first, first + len(layout.last))
        random_streams = [(*turn, branch) for branch in branches]
        samplings = [request.sampling] * len(branches)
        for events in decode_text(artifact, layout, samplings, random_streams, prefix.cache, len(context)):
            yield [replace(event, branch=branches[event.branch]) for event in events]
        first = branches.stop


def fill_from_store(artifact: LoadedArtifact, prefix: PrefixCache, request: Request) -> None:
    """Make ``prefix`` hold the whole context of a request from its file, or write that; if it asks for that.

    Raises:
        InputError, UsageError, StorageError: as :meth:`pos2d.runtime.text.context_store.ContextStore.fill`.
    """
    if request.cache_context is not None and request.encoded.context:
        # The same tokens whatever the prompts are; where a prompt takes some of them, these are dropped again.
        ids = (request.encoded.whole_context or request.encoded.context)[: artifact.manifest.context_length]
        ContextStore(artifact, Path(request.cache_context)).fill(prefix, ids)


def stream_events(
    artifact: LoadedArtifact, request: Request, prefix: PrefixCache | None = None, turn: Sequence[int] = ()
) -> Generator[Event]:
    """The events of :func:`stream_columns`, one by one."""
    for events in stream_columns(artifact, request, prefix, turn):
        yield from events
