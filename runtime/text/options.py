"""Options of a request: how its prompts are encoded and laid out, and how its answers are sampled."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pos2d.errors import UsageError
from pos2d.options import check_options, option, split_options
from pos2d.runtime.engine.sampling import Sampling, resolve_sampling
from pos2d.runtime.text.cache_place import check_contexts
from pos2d.spec import MAX_STRIDE, Align, Rope2DSpec, Visibility

MAX_BRANCHES = 16
# Names that transformers takes for itself where it renders a template.
RESERVED = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutOptions:
    """How prompts stand side by side; None means the positions that the artifact was trained with.

    Raises:
        UsageError: a value that does not exist or is out of range.
    """

    visibility: Visibility | None = option(
        None,
        "columnar: a branch attends to the tokens of all branches in earlier columns, as in 2D RoPE training. "
        "isolated: a branch attends only to the context and to itself, as if it were alone.",
        default_text="the artifact's",
    )
    align_to: Align | None = option(
        None,
        "Prompts of different length start in the same column (left) or end in the same column (right).",
        default_text="the artifact's",
    )
    branch_stride: int | None = option(
        None,
        "Step between the branch positions of neighbouring branches.",
        minimum=1,
        maximum=MAX_STRIDE,
        default_text="the artifact's",
    )
    max_branches: int | None = option(
        None,
        "Largest number of prompts in one sequence. Further prompts are decoded in another sequence over the same "
        "context, and the two do not see each other.",
        minimum=1,
        default_text=str(MAX_BRANCHES),
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def branches_per_sequence(self) -> int:
        return self.max_branches or MAX_BRANCHES

    def apply_to(self, spec: Rope2DSpec) -> Rope2DSpec:
        """``spec`` with the positions that these options replace."""
        values = {name: getattr(self, name) for name in ("visibility", "align_to", "branch_stride")}
        return replace(spec, **{name: value for name, value in values.items() if value is not None})

    def check_effect(self, spec: Rope2DSpec) -> None:
        """Check that every option changes something where ``spec`` would hold without it.

        Raises:
            UsageError: an option that has no effect.
        """
        if self.branch_stride is not None and not spec.is_2d:
            raise UsageError("`branch_stride` has no effect for an artifact without 2D RoPE; leave it out")
        if self.align_to is not None and (self.visibility or spec.visibility) == "isolated":
            raise UsageError(
                "`align_to` has no effect where prompts are isolated; leave it out, or add `visibility='columnar'`"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """How texts are encoded.

    Raises:
        UsageError: a value of another type, or arguments of the template that are set otherwise.
    """

    ignore_chat_template: bool = option(False, "Encode the texts as they are, without the chat template.")
    chat_template_kwargs: Mapping[str, Any] | None = option(
        None,
        'Variables of the chat template, such as {"enable_thinking": false}.',
        metavar="JSON|@FILE",
        default_text="those of the template",
    )

    def __post_init__(self) -> None:
        check_options(self)
        arguments = self.chat_template_kwargs or {}
        reserved = [name for name in arguments if not isinstance(name, str) or name in RESERVED]
        if reserved:
            raise UsageError(f"`chat_template_kwargs` has {reserved[0]!r}, which pos2d sets itself; leave it out")
        if arguments and self.ignore_chat_template:
            raise UsageError("`chat_template_kwargs` has no effect with `ignore_chat_template`; leave one of them out")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextOptions:
    """What becomes of a context's keys and values.

    Raises:
        UsageError: a value that is no path.
    """

    cache_context: str | None = option(
        None,
        "Store the keys and values of the context there, and read them from there the next time in place of computing "
        "them: a file NAME.safetensors for one context, or a directory for any number.",
        metavar="FILE|DIR",
        default_text="no",
    )

    def __post_init__(self) -> None:
        if isinstance(self.cache_context, Path):
            object.__setattr__(self, "cache_context", str(self.cache_context))
        check_options(self)
        if self.cache_context is not None and (not self.cache_context or "\0" in self.cache_context):
            raise UsageError(f"`cache_context` {self.cache_context!r} is no path; name a file or a directory")


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """All options of a request, with the artifact's generation settings where none was given."""

    sampling: Sampling
    layout: LayoutOptions
    ignore_chat_template: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    cache_context: str | None = None

    def check_cache(self, *contexts: str | None) -> None:
        """Check ``cache_context`` before anything is loaded; ``contexts`` are those of all prompts.

        Raises:
            UsageError: there is no context, there are several for one file, or something else is in its place.
        """
        check_contexts(self.cache_context, contexts)


def request_options(
    directory: Path, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> RequestOptions:
    """The options of a request to the artifact in ``directory``, from keywords of all groups.

    ``defaults`` replace the artifact's generation settings; see
    :func:`pos2d.runtime.engine.sampling.resolve_sampling`.

    Raises:
        UsageError: a value out of range, or options that contradict each other.
        InputError: generation settings that cannot be read.
    """
    layout, prompt, context = split_options(options, LayoutOptions, PromptOptions, ContextOptions)
    encoding = PromptOptions(**prompt)
    return RequestOptions(
        sampling=resolve_sampling(directory, options, defaults),
        layout=LayoutOptions(**layout),
        ignore_chat_template=encoding.ignore_chat_template,
        chat_template_kwargs=encoding.chat_template_kwargs,
        cache_context=ContextOptions(**context).cache_context,
    )
