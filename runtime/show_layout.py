"""Draw positions, branches and times: prompts on a grid, and what one of their tokens attends to."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pos2d.errors import OutputError, UsageError
from pos2d.layout import Layout, build_layout
from pos2d.options import takes_options
from pos2d.runtime.layout_view.picture import Picture, clipped, placed_tokens, printable
from pos2d.runtime.opening.opened_model import open_model
from pos2d.runtime.text.options import MAX_BRANCHES, LayoutOptions, PromptOptions
from pos2d.runtime.text.requests import encode_for
from pos2d.runtime.text.tokenization import EncodedPrompts, load_tokenizer
from pos2d.spec import Align, Rope2DSpec, Visibility

SUFFIX = ".svg"
# Which frequencies are rotated by branch and time does not matter for a layout, as long as there are some.
PLAIN_SPEC = Rope2DSpec(num_frequencies=2, pair_indices=(1, 2))
# Tokens that an error about an unknown token lists.
EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class LayoutReport(Picture):
    """The picture as values; ``output`` is the file that was written, if any."""

    output: str | None


@takes_options()
def show_layout(
    model: str | Path | None = None,
    *,
    prompt: str | Sequence[str],
    context: str | None = None,
    token: str | int | None = None,
    visibility: Visibility | None = None,
    align_to: Align | None = None,
    branch_stride: int | None = None,
    ignore_chat_template: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    force: bool = False,
) -> LayoutReport:
    """Lay out prompts as ``run`` would, without reading weights. Without a model, words take the place of tokens.

    ``token`` is a slot or the text of a token; by default it is the last token of the last prompt. Visibility,
    alignment and stride default to the model's, or to columnar, left and 128. ``output`` is an SVG file.

    Raises:
        InputError: no model, no tokenizer, an empty prompt.
        UsageError: a value out of range, a token that does not exist, or an option without effect here.
        OutputError: the output exists, or does not end in .svg.
    """
    file = _checked_output(output, force)
    prompt = [prompt] if isinstance(prompt, str) else prompt
    if len(prompt) > MAX_BRANCHES:
        raise UsageError(f"{len(prompt)} prompts do not fit in one sequence; give at most {MAX_BRANCHES}")
    encoding = PromptOptions(ignore_chat_template=ignore_chat_template, chat_template_kwargs=chat_template_kwargs)
    if encoding != PromptOptions() and model is None:
        name = "ignore_chat_template" if ignore_chat_template else "chat_template_kwargs"
        raise UsageError(f"`{name}` concerns a model's template; give a model, or leave it out")
    opened = None if model is None else open_model(model)
    spec = PLAIN_SPEC if opened is None else opened.manifest.rope_2d
    options = LayoutOptions(visibility=visibility, align_to=align_to, branch_stride=branch_stride)
    options.check_effect(spec)
    spec = options.apply_to(spec)
    if opened is None:
        encoded, text_of = _words(prompt, context)
    else:
        encoded, text_of = _tokens(opened.directory, prompt, context, spec, encoding)
    layout = build_layout(encoded.branches, spec, encoded.context)
    texts = [text_of(int(number)) for number in layout.ids]
    chosen = _chosen(token, texts, layout)
    report = LayoutReport(
        visibility=spec.visibility,
        align_to=spec.align_to,
        branch_stride=spec.branch_stride if spec.is_2d else None,
        words=model is None,
        chosen=chosen,
        tokens=placed_tokens(layout, texts, chosen),
        output=str(output) if file else None,
    )
    if file:
        from pos2d.runtime.layout_view.svg import draw_svg

        _write(file, draw_svg(report))
    return report


def _checked_output(output: str | Path | None, force: bool) -> Path | None:
    """The file to write, if any.

    Raises:
        UsageError: ``force`` without an output.
        OutputError: the output exists, or does not end in .svg.
    """
    if output is None:
        if force:
            raise UsageError("`force` replaces the file at `output`; give both, or leave it out")
        return None
    path = Path(output)
    if path.suffix.lower() != SUFFIX:
        raise OutputError(f"{path} does not end in {SUFFIX}; only SVG is written")
    if path.is_dir():
        raise OutputError(f"{path} is a directory; choose another output")
    if os.path.lexists(path) and not force:
        raise OutputError(f"{path} exists already; choose another output, or replace it with `force=True`")
    return path


def _words(prompts: Sequence[str], context: str | None) -> tuple[EncodedPrompts, Callable[[int], str]]:
    """Words as token ids, and a function from an id to its word."""
    vocabulary: list[str] = []

    def encode(text: str) -> list[int]:
        words = text.split()
        vocabulary.extend(words)
        return list(range(len(vocabulary) - len(words), len(vocabulary)))

    encoded = EncodedPrompts([encode(prompt) for prompt in prompts], encode(context or ""))
    return encoded, vocabulary.__getitem__


def _tokens(
    directory: Path, prompts: Sequence[str], context: str | None, spec: Rope2DSpec, options: PromptOptions
) -> tuple[EncodedPrompts, Callable[[int], str]]:
    """The token ids that ``run`` would feed, and a function from an id to its text."""
    tokenizer: Any = load_tokenizer(directory)
    encoded = encode_for(tokenizer, prompts, context, spec, options.ignore_chat_template, options.chat_template_kwargs)

    def text_of(number: int) -> str:
        text: str = tokenizer.decode([number], clean_up_tokenization_spaces=False)
        # Some tokenizers drop a leading space when they decode, and here every token is decoded by itself.
        spaced = str(tokenizer.convert_ids_to_tokens(number)).startswith("▁") and not text.startswith(" ")
        return " " + text if spaced else text

    return encoded, text_of


def _chosen(token: str | int | None, texts: Sequence[str], layout: Layout) -> int:
    """The slot of a token given by its slot or its text, with or without surrounding spaces.

    Raises:
        UsageError: there is no such token.
    """
    if token is None:
        return layout.last[-1]
    named = str(token)
    if named.isdecimal() and int(named) < len(texts):
        return int(named)
    for spellings in (texts, [text.strip() for text in texts], [printable(text) for text in texts]):
        if named in spellings and not named.isdecimal():
            return list(spellings).index(named)
    examples = ", ".join(f"{slot} ({clipped(printable(texts[slot]))})" for slot in range(min(EXAMPLES, len(texts))))
    raise UsageError(f"there is no token {named}; give a slot from 0 to {len(texts) - 1} or a text, such as {examples}")


def _write(file: Path, text: str) -> None:
    """Write a file atomically: after an interruption it is whole or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
