"""Rendering messages with the tokenizer's chat template."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pos2d.errors import InputError, UsageError
from pos2d.runtime.engine.common_prefix import common_length

Arguments = Mapping[str, Any]


def render_messages(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    arguments: Arguments | None = None,
    *,
    add_generation_prompt: bool,
) -> str:
    """The text of ``messages``; ``add_generation_prompt`` opens the assistant's message after them.

    ``arguments`` are further variables of the template.

    Raises:
        InputError: the template does not accept these messages.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **(arguments or {})
        )
    except Exception as error:  # a template may raise anything
        raise InputError(f"the chat template does not accept these messages: {error}") from None
    return text


def render_for_answer(tokenizer: Any, messages: Sequence[Mapping[str, Any]], arguments: Arguments | None = None) -> str:
    """The text that an answer to ``messages`` follows; a last message of the assistant is an answer to continue.

    Raises:
        InputError: the template does not accept these messages, or changes the answer that is to be continued.
    """
    if not messages or messages[-1]["role"] != "assistant":
        return render_messages(tokenizer, messages, arguments, add_generation_prompt=True)
    text = _continued(tokenizer, messages, arguments)
    if messages[-1]["content"].strip():
        return text
    # Where a template trims contents, transformers also takes the white space before an empty answer away.
    opened = _continued(tokenizer, [*messages[:-1], {**messages[-1], "content": "-"}], arguments).removesuffix("-")
    return text if text.startswith(opened) else opened


def _continued(tokenizer: Any, messages: Sequence[Mapping[str, Any]], arguments: Arguments | None) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, continue_final_message=True, **(arguments or {})
        )
    except Exception as error:
        reason = str(error).partition("!")[0]  # transformers adds the whole conversation
        raise InputError(f"the chat template cannot continue the assistant's last message: {reason}") from None
    return text


def render_chat(
    tokenizer: Any, prompts: Sequence[str], context: str | None, arguments: Arguments | None = None
) -> tuple[list[str], str]:
    """The text of every prompt as a user's message, after the context as a system message.

    The second value is the part with the context, with which all these texts begin; it is empty without a context.

    Raises:
        InputError: the template does not accept a system message before a user's.
    """
    system = [] if context is None else [{"role": "system", "content": context}]
    return render_questions(tokenizer, system, prompts, arguments)


def render_questions(
    tokenizer: Any, earlier: Sequence[Mapping[str, Any]], questions: Sequence[str], arguments: Arguments | None = None
) -> tuple[list[str], str]:
    """The text of every question as the next message after ``earlier``, and the part of ``earlier`` that they share.

    Raises:
        InputError: the template does not accept these messages.
    """

    def asked(question: str) -> str:
        messages = [*earlier, {"role": "user", "content": question}]
        return render_messages(tokenizer, messages, arguments, add_generation_prompt=True)

    texts = [asked(question) for question in questions]
    if not earlier:
        return texts, ""
    samples = [asked("a"), asked("b"), *texts]
    first, last = min(samples), max(samples)  # in alphabetical order, so that all others share what these two share
    shared = first[: common_length(first, last)]
    try:
        alone = render_messages(tokenizer, earlier, arguments, add_generation_prompt=False)
    except InputError:  # a template may want a question
        return texts, shared
    # Alone, the messages may look different, as in templates that show the thoughts of the newest answer only, or that
    # put the system message into the user's.
    complete = shared.startswith(alone) and str(earlier[-1]["content"]).strip() in alone
    return texts, alone if complete else shared


def check_arguments(tokenizer: Any, arguments: Arguments | None, *, uses_template: bool) -> None:
    """Check that the chat template reads every one of ``arguments``.

    Raises:
        UsageError: it does not, or no template is used.
        InputError: there are several templates, and none of them is the default.
    """
    if not arguments:
        return
    if not uses_template:
        raise UsageError("`chat_template_kwargs` has no effect without a chat template; leave it out")
    try:
        template = str(tokenizer.get_chat_template(tools=arguments.get("tools")))
    except ValueError:
        names = ", ".join(tokenizer.chat_template)
        raise InputError(f"the chat templates of this model are {names}; name one of them 'default'") from None
    unread = [name for name in arguments if not re.search(rf"\b{re.escape(name)}\b", template)]
    if unread:
        raise UsageError(
            f"`chat_template_kwargs` has {', '.join(map(repr, unread))}, which the chat template of this model does "
            "not read; leave it out"
        )


def require_chat_template(tokenizer: Any) -> None:
    """Check that there is a chat template.

    Raises:
        InputError: the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "the artifact has no chat template; put the base model's chat_template.jinja there, or give single "
            "prompts instead of a conversation"
        )
