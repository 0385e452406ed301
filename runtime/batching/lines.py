"""One line of a batch file: its request, or the reason why it has none."""

import codecs
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pos2d.errors import InputError, Pos2DError
from pos2d.messages import text_messages
from pos2d.options import options_of
from pos2d.runtime.batching.own_keys import own_keys
from pos2d.runtime.engine.sampling import Sampling, SamplingOptions, resolve_sampling, values_of
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.runtime.text.chat_template import check_arguments, render_for_answer, require_chat_template
from pos2d.runtime.text.options import LayoutOptions, PromptOptions, RequestOptions
from pos2d.runtime.text.requests import Request, encode_for, lay_out
from pos2d.runtime.text.tokenization import EncodedPrompts, encode
from pos2d.spec import Rope2DSpec
from pos2d.text_samples import PAIRS, TEXTS

PROMPT_KEYS = ("prompt", "messages", "prompts", "branches")
CONTEXT_KEYS = ("context", "main")
OPTION_KEYS = (*options_of(SamplingOptions), *options_of(LayoutOptions), "chat_template_kwargs")
KNOWN_KEYS = (*OPTION_KEYS, *PROMPT_KEYS, *CONTEXT_KEYS)
SYSTEM_ROLES = ("system", "developer")
SEPARATOR = "||"
FORMS = (
    'a line is {"prompt": ...}, {"messages": [...]}, {"context": ..., "prompts": [...]}, {"branches": [...]}, or "a||b"'
)


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A line, counted from 1, with its ``request`` or an ``error``; ``echoed`` are the user's own keys."""

    number: int
    echoed: Mapping[str, Any]
    request: Request | None = None
    error: str | None = None


def parse_line(
    number: int,
    raw: bytes,
    artifact: LoadedArtifact,
    options: RequestOptions,
    plain: bool = False,
    context: str | None = None,
) -> Line:
    """Read a line; ``options`` and ``context`` apply where the line has none.

    ``plain`` takes a line that is not JSON as a prompt.
    """
    echoed: dict[str, Any] = {}
    try:
        block = _block(_without_mark(number, raw), plain)
        echoed = own_keys(block, KNOWN_KEYS)
        return Line(number, echoed, request=_request(_with_context(block, context), artifact, options))
    except Pos2DError as error:
        return Line(number, echoed, error=" ".join(str(error).split()))


def context_of_line(number: int, raw: bytes, plain: bool, context: str | None) -> str | None:
    """The context that :func:`parse_line` would encode by itself; a line with an error has none."""
    try:
        return _context(_with_context(_block(_without_mark(number, raw), plain), context))
    except Pos2DError:
        return None


def _without_mark(number: int, raw: bytes) -> bytes:
    """The bytes of a line without the mark with which some programs begin a file."""
    return raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw


def _block(raw: bytes, plain: bool) -> dict[str, Any]:
    """The line as an object; ``a||b``, with or without quotes, is a list of branches.

    Raises:
        InputError: neither of these.
    """
    try:
        text = raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"not text in UTF-8: {error}") from None
    if not text:
        raise InputError(f"the line is empty; {FORMS}")
    try:
        value = json.loads(text)
    except RecursionError:
        raise InputError("the JSON is nested too deeply") from None
    except ValueError:
        value = None
    if not isinstance(value, dict | list | str) and (plain or SEPARATOR in text) and not text.startswith(("{", "[")):
        value = text  # no JSON, or a number
    if isinstance(value, str):
        value = {"branches": [part.strip() for part in value.split(SEPARATOR)]}
    if not isinstance(value, dict):
        raise InputError(f"neither a JSON object nor a text with {SEPARATOR}; {FORMS}")
    return value


def _with_context(block: dict[str, Any], context: str | None) -> dict[str, Any]:
    """The line with the context of the whole file, unless it has one of its own; an empty one is one of its own."""
    if context is None or any(block.get(name) is not None for name in CONTEXT_KEYS):
        return block
    turns = block.get("messages")
    if turns is None:
        return block | {"context": context}
    roles = [turn.get("role") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    if not roles or any(role in SYSTEM_ROLES for role in roles):
        return block
    return block | {"messages": [{"role": "system", "content": context}, *turns]}


def _request(block: Mapping[str, Any], artifact: LoadedArtifact, options: RequestOptions) -> Request:
    """The request of a line.

    Raises:
        InputError: keys, texts or lengths that cannot be used.
        UsageError: options that cannot be used.
    """
    given = {name: block[name] for name in OPTION_KEYS if name in block}
    # The options of the batch have the artifact's generation settings in them already.
    sampling: Sampling = resolve_sampling(artifact.path, given, defaults=values_of(options.sampling))
    in_line = {name: given[name] for name in options_of(LayoutOptions) if given.get(name) is not None}
    LayoutOptions(**in_line).check_effect(options.layout.apply_to(artifact.manifest.rope_2d))
    layout = replace(options.layout, **in_line)
    spec = layout.apply_to(artifact.manifest.rope_2d)
    arguments = given.get("chat_template_kwargs")
    if arguments is not None:
        PromptOptions(ignore_chat_template=options.ignore_chat_template, chat_template_kwargs=arguments)
        options = replace(options, chat_template_kwargs=arguments)
    encoded = _encoded(block, artifact, spec, options)
    request = lay_out(artifact, encoded, spec, sampling, layout.branches_per_sequence)
    return replace(request, cache_context=options.cache_context)


def _encoded(
    block: Mapping[str, Any], artifact: LoadedArtifact, spec: Rope2DSpec, options: RequestOptions
) -> EncodedPrompts:
    """Token ids of the line's prompts and context."""
    keys = [name for name in PROMPT_KEYS if name in block]
    if len(keys) != 1:
        raise InputError(f"a line must have one of {', '.join(PROMPT_KEYS)}; {FORMS}")
    context = _context(block)
    if keys != ["messages"]:
        prompts = _prompts(block[keys[0]], keys[0])
        return encode_for(
            artifact.tokenizer, prompts, context, spec, options.ignore_chat_template, options.chat_template_kwargs
        )
    if context is not None:
        raise InputError("messages has its own system turn; put the context there")
    if options.ignore_chat_template:
        raise InputError("messages need the chat template; use prompt, or leave `ignore_chat_template` out")
    return _encoded_messages(block["messages"], artifact.tokenizer, options.chat_template_kwargs)


def _context(block: Mapping[str, Any]) -> str | None:
    contexts = [block[name] for name in CONTEXT_KEYS if block.get(name) is not None]
    if len(contexts) > 1 or not all(isinstance(context, str) for context in contexts):
        raise InputError("the context must be one text")
    return contexts[0] if contexts else None


def _prompts(value: Any, key: str) -> list[str]:
    entries = [value] if key == "prompt" else value
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{key} must be a list of texts; {FORMS}")
    return [_prompt(entry, key) for entry in entries]


def _prompt(entry: Any, key: str) -> str:
    """A text, or the question of a training sample in one of the trainer's forms."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, Mapping) and key == "branches":
        for name in (*(question for question, _ in PAIRS), *TEXTS):
            if isinstance(entry.get(name), str):
                return str(entry[name])
    raise InputError(f"{key} has {entry!r}, which is not a text")


def _encoded_messages(messages: Any, tokenizer: Any, arguments: Mapping[str, Any] | None) -> EncodedPrompts:
    """Token ids of a conversation, whose last message is answered, or continued if it is the assistant's."""
    turns = messages if isinstance(messages, list) else []
    if not turns or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str | list)
        for turn in turns
    ):
        raise InputError("messages must be a list of turns, each with a role and a content")
    turns = text_messages(turns)
    require_chat_template(tokenizer)
    check_arguments(tokenizer, arguments, uses_template=True)
    return EncodedPrompts([encode(tokenizer, render_for_answer(tokenizer, turns, arguments))], None)
