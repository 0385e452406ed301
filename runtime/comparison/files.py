"""Whether an artifact's tokenizer, chat template, special tokens and end tokens are those that the adapter had."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pos2d.errors import InputError
from pos2d.runtime.engine.common_prefix import common_length
from pos2d.runtime.opening.opened_model import OpenedModel
from pos2d.runtime.text.tokenization import load_tokenizer

# Special tokens that change what a model reads or writes; padding and masks do not.
NAMED = ("bos_token", "eos_token", "unk_token")
CONVERSATION = (
    {"role": "user", "content": "What is tea?"},
    {"role": "assistant", "content": "A drink made of leaves."},
    {"role": "user", "content": "And  coffee?\nBe brief."},
)
SYSTEM = {"role": "system", "content": "You are a careful assistant."}
# Letters, numbers, spaces, other scripts and line breaks, which normalisers and pre-tokenizers treat differently.
PROBE = "Hello  World's 3.14 naïve Ångström 東京 мир\n\n\tdef f(x): return x+1 \U0001f600 ﬁ"
# How much of two different texts is shown, and how much of it before the difference.
SHOWN, BEFORE = 40, 10


@dataclass(frozen=True, slots=True)
class FileEvidence:
    """What is not as in the model that the adapter was trained on, a phrase each; empty where it is the same."""

    tokenizer: str = ""
    special_tokens: str = ""
    chat_template: str = ""
    end_tokens: str = ""


def compare_files(reference: OpenedModel, artifact: OpenedModel) -> FileEvidence:
    """Compare the small files of two models; the reference must have a tokenizer.

    Raises:
        InputError: the reference's tokenizer cannot be read.
    """
    expected = load_tokenizer(reference.directory)
    ends = _end_tokens(expected, reference.manifest.eos_token_ids, artifact.manifest.eos_token_ids)
    try:
        found = load_tokenizer(artifact.directory)
    except InputError as error:
        missing = "it has none" if "has no tokenizer" in str(error) else "it cannot be read"
        return FileEvidence(tokenizer=missing, end_tokens=ends)
    return FileEvidence(_tokenizer(expected, found), _special(expected, found), _template(expected, found), ends)


def _tokenizer(expected: Any, found: Any) -> str:
    """How the token ids of a text differ."""
    one, other = expected.get_vocab(), found.get_vocab()
    if one != other:
        moved = [token for token in one if token in other and one[token] != other[token]]
        lacking = [token for token in one if token not in other]
        if not moved and not lacking:
            return f"it has {len(other) - len(one)} more tokens, such as {_shown(next(iter(set(other) - set(one))))}"
        example = (moved or lacking)[0]
        what = f"token {_shown(example)} is {other.get(example, 'missing')} instead of {one[example]}"
        return f"{what} ({len(moved) + len(lacking)} such tokens)"
    for special in (True, False):
        ids, others = (
            tokenizer(PROBE, add_special_tokens=special, verbose=False).input_ids for tokenizer in (expected, found)
        )
        if ids != others:
            where = common_length(ids, others)
            return f"a text gets other tokens from the {_ordinal(where + 1)} on" + (
                ", where special tokens are added" if special else ""
            )
    return ""


def _special(expected: Any, found: Any) -> str:
    """How the special tokens differ."""
    for name in NAMED:
        one, other = getattr(expected, name, None), getattr(found, name, None)
        if one != other:
            return f"{name} is {_shown(other)} instead of {_shown(one)}"
    marked = [
        {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        for tokenizer in (expected, found)
    ]
    lacking = sorted(marked[0] - marked[1])
    return f"{_shown(lacking[0])} is no special token ({len(lacking)} such tokens)" if lacking else ""


def _template(expected: Any, found: Any) -> str:
    """How a conversation is written differently."""
    if expected.chat_template == found.chat_template:
        return ""
    if not found.chat_template:
        return "it has none"
    if not expected.chat_template:
        return "it has one, and the model of the training has none"
    for turns in ((SYSTEM, *CONVERSATION), CONVERSATION):
        one, other = _rendered(expected, turns), _rendered(found, turns)
        if one != other:
            at = max(common_length(one, other) - BEFORE, 0)
            return f"a conversation has {_shown(other[at:])} where {_shown(one[at:])} was trained"
    return ""


def _rendered(tokenizer: Any, turns: Sequence[Any]) -> str:
    try:
        text: str = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template can raise anything
        return f"an error: {type(error).__name__}"
    return text


def _end_tokens(tokenizer: Any, expected: Sequence[int], found: Sequence[int]) -> str:
    """Which end tokens are missing, and which are new."""
    lacking = [token for token in expected if token not in found]
    new = [token for token in found if token not in expected]
    phrases = [f"{_named(tokenizer, lacking)} is missing"] if lacking else []
    phrases += [f"{_named(tokenizer, new)} is new"] if new else []
    return ", and ".join(phrases)


def _named(tokenizer: Any, ids: Sequence[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in ids)


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number % 100 not in (11, 12, 13) else 0, "th")
    return f"{number}{ending}"


def _shown(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"
