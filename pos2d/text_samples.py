"""A text file as token ids: JSONL in the forms that trainers use, or paragraphs."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from pos2d.errors import InputError
from pos2d.messages import content_text
from pos2d.text_files import open_text

PAIRS = (("prompt", "answer"), ("question", "answer"), ("instruction", "output"), ("q", "a"))
CHATS = ("messages", "conversations")
TEXTS = ("text", "content")
FORMS = (
    'a line is {"branches": [...]}, {"prompt": ..., "answer": ...}, {"messages": [...]} or {"text": ...}; '
    "other files are paragraphs with blank lines between them"
)


@dataclass(frozen=True, slots=True)
class Branch:
    """Token ids: prompt tokens before index ``start``, and from there on completion tokens, which are scored."""

    ids: tuple[int, ...]
    start: int = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One line or paragraph: a single branch, or ``grouped`` branches with the context that all of them attend to.

    An empty context is none.
    """

    branches: tuple[Branch, ...]
    context: tuple[int, ...] = ()
    grouped: bool = False


def read_rows(path: Path, tokenizer: Any, max_tokens: int) -> Iterator[Row]:
    """Yield rows from the start of a file, each when it is needed.

    Branches and contexts are truncated to ``max_tokens``; a branch without completion tokens after that is skipped.
    The completion of a conversation is its last turn, that of a pair its answer. No special tokens are added except
    those of the chat template, as in training.

    Raises:
        InputError: a file that cannot be read, or a line in an unknown form.
    """
    try:
        with open_text(path) as file:
            for place, value in _values(file, path):
                yield _row(value, tokenizer, max_tokens, f"{path}, {place}")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8 ({error}); save it as UTF-8") from None


def _values(file: Iterable[str], path: Path) -> Iterator[tuple[str, Any]]:
    """Line number and value of each row, which is a JSON value or a paragraph."""
    numbered = enumerate(file, 1)
    first = next(((number, line) for number, line in numbered if line.strip()), (1, ""))
    is_json = path.suffix == ".jsonl" or first[1].lstrip().startswith("{")
    return (_lines if is_json else _paragraphs)(chain([first], numbered), path)


def _paragraphs(lines: Iterable[tuple[int, str]], path: Path) -> Iterator[tuple[str, Any]]:
    for has_text, block in groupby(lines, key=lambda line: bool(line[1].strip())):
        if has_text:
            paragraph = list(block)
            yield f"line {paragraph[0][0]}", "\n".join(line.rstrip() for _, line in paragraph).strip()


def _lines(lines: Iterable[tuple[int, str]], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in lines:
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError:
                raise InputError(f"{path}, line {number} is not JSON; {FORMS}") from None


def _row(value: Any, tokenizer: Any, max_tokens: int, place: str) -> Row:
    grouped = isinstance(value, Mapping) and "branches" in value
    entries = value["branches"] if grouped else [value]
    if not isinstance(entries, list):
        raise InputError(f"{place}: branches is not a list; {FORMS}")
    branches = (_branch(entry, tokenizer, max_tokens, place) for entry in entries)
    context = _ids(tokenizer, str(value.get("main") or ""))[:max_tokens] if grouped else ()
    return Row(tuple(branch for branch in branches if branch is not None), tuple(context), grouped)


def _branch(entry: Any, tokenizer: Any, max_tokens: int, place: str) -> Branch | None:
    """One branch, or None if truncation leaves no completion tokens."""
    prompt, completion = _texts(entry, tokenizer, place)
    # Both are tokenized as one text, as in training: a token can contain the end of one and the start of the other.
    ids = _ids(tokenizer, prompt + completion)[:max_tokens]
    start = len(_ids(tokenizer, prompt))
    if isinstance(entry, Mapping) and isinstance(entry.get("answer_offset"), int):
        start = entry["answer_offset"]
    branch = Branch(tuple(ids), max(1, start))
    return branch if branch.start < len(branch.ids) else None


def _texts(entry: Any, tokenizer: Any, place: str) -> tuple[str, str]:
    """Prompt and completion."""
    if isinstance(entry, str):
        return "", entry
    if isinstance(entry, Mapping):
        for question, answer in PAIRS:
            if isinstance(entry.get(question), str) and isinstance(entry.get(answer), str):
                turns = [{"role": "user", "content": entry[question]}, {"role": "assistant", "content": entry[answer]}]
                return _conversation(turns, tokenizer, place)
        for key in CHATS:
            if isinstance(entry.get(key), list) and len(entry[key]) > 1:
                return _conversation(entry[key], tokenizer, place)
        for key in TEXTS:
            if isinstance(entry.get(key), str):
                return "", entry[key]
    raise InputError(f"{place} has an unknown form; {FORMS}")


def _conversation(turns: list[Any], tokenizer: Any, place: str) -> tuple[str, str]:
    """The text of the chat template up to the last turn, and that turn; without a template, the turns as they are."""
    if not all(isinstance(turn, Mapping) and content_text(turn.get("content")) is not None for turn in turns):
        raise InputError(f"{place}: a turn has no content; {FORMS}")
    *earlier, last = ({**turn, "content": content_text(turn["content"])} for turn in turns)
    if not tokenizer.chat_template:
        return "".join(f"{turn['content']}\n" for turn in earlier), last["content"]
    try:
        prompt: str = tokenizer.apply_chat_template(earlier, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template can raise anything
        raise InputError(f"{place}: these turns do not fit the chat template: {error}") from None
    return prompt, last["content"] + (tokenizer.eos_token or "")


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids if text else []
    return ids
