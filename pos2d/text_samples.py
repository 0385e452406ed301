"""A file of text as token ids: JSONL in the forms that trainers read, or paragraphs."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from pos2d.errors import InputError

PAIRS = (("prompt", "answer"), ("question", "answer"), ("instruction", "output"), ("q", "a"))
CHATS = ("messages", "conversations")
TEXTS = ("text", "content")
FORMS = (
    'a line is {"branches": [...]}, {"prompt": ..., "answer": ...}, {"messages": [...]} or {"text": ...}; '
    "other files are paragraphs with blank lines between them"
)


@dataclass(frozen=True, slots=True)
class Branch:
    """Token ids; what comes from ``start`` on is taught, the rest is only read."""

    ids: tuple[int, ...]
    start: int = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One line or paragraph: a branch, or ``several`` with the context that all of them see (empty: none)."""

    branches: tuple[Branch, ...]
    context: tuple[int, ...] = ()
    several: bool = False


def read_rows(path: Path, tokenizer: Any, longest: int) -> Iterator[Row]:
    """Rows from the start of a file, each read when it is asked for.

    Branches and contexts are cut at ``longest`` tokens; a branch that has nothing left to teach after that is left out.
    A conversation teaches its last turn, a pair its answer. There are no special tokens but those of the chat
    template: the trainer lays branches out like that.

    Raises:
        InputError: an unreadable file, or a line of another form.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for place, row in _values(file, path):
                yield _row(row, tokenizer, longest, f"{path}, {place}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from None


def _values(file: Iterable[str], path: Path) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and what it is: a value of JSON, or a paragraph."""
    numbered = enumerate(file, 1)
    first = next(((number, line) for number, line in numbered if line.strip()), (1, ""))
    is_json = path.suffix == ".jsonl" or first[1].lstrip().startswith("{")
    return (_lines if is_json else _paragraphs)(chain([first], numbered), path)


def _paragraphs(lines: Iterable[tuple[int, str]], path: Path) -> Iterator[tuple[str, Any]]:
    for filled, block in groupby(lines, key=lambda line: bool(line[1].strip())):
        if filled:
            rows = list(block)
            yield f"line {rows[0][0]}", "\n".join(line.rstrip() for _, line in rows).strip()


def _lines(lines: Iterable[tuple[int, str]], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in lines:
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError:
                raise InputError(f"{path}, line {number} is not JSON; {FORMS}") from None


def _row(row: Any, tokenizer: Any, longest: int, place: str) -> Row:
    several = isinstance(row, Mapping) and "branches" in row
    entries = row["branches"] if several else [row]
    if not isinstance(entries, list):
        raise InputError(f"{place}: branches is not a list; {FORMS}")
    found = (_branch(entry, tokenizer, longest, place) for entry in entries)
    context = _ids(tokenizer, str(row.get("main") or ""))[:longest] if several else ()
    return Row(tuple(branch for branch in found if branch is not None), tuple(context), several)


def _branch(entry: Any, tokenizer: Any, longest: int, place: str) -> Branch | None:
    """None where nothing is left to teach after the cut."""
    read, taught = _texts(entry, tokenizer, place)
    before = _ids(tokenizer, read)
    # Tokenized as one text, so that the seam is the one of training.
    ids = _ids(tokenizer, read + taught)[:longest]
    start = len(before)
    if isinstance(entry, Mapping) and isinstance(entry.get("answer_offset"), int):
        start = entry["answer_offset"]
    branch = Branch(tuple(ids), max(1, start))
    return branch if branch.start < len(branch.ids) else None


def _texts(entry: Any, tokenizer: Any, place: str) -> tuple[str, str]:
    """What is only read and what is taught."""
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
    raise InputError(f"{place} is of an unknown form; {FORMS}")


def _conversation(turns: list[Any], tokenizer: Any, place: str) -> tuple[str, str]:
    """The chat template's text up to the last turn, and that turn; without a template the turns as they are."""
    if not all(isinstance(turn, Mapping) and isinstance(turn.get("content"), str) for turn in turns):
        raise InputError(f"{place}: a turn has no content; {FORMS}")
    *earlier, last = turns
    if not tokenizer.chat_template:
        return "".join(f"{turn['content']}\n" for turn in earlier), last["content"]
    try:
        read: str = tokenizer.apply_chat_template(earlier, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises whatever it likes
        raise InputError(f"{place}: these turns do not fit the chat template: {error}") from None
    return read, last["content"] + (tokenizer.eos_token or "")


def _ids(tokenizer: Any, text: str) -> list[int]:
    # The trainer lays branches out without special tokens.
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids if text else []
    return ids
