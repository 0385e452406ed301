"""Reading text that other programs wrote: UTF-8, with or without a byte order mark.

Editors and shells of Windows begin a file with the mark U+FEFF, which is no character of the text, or write UTF-16.
"""

import codecs
import json
from pathlib import Path
from typing import Any, TextIO

from pos2d.errors import InputError

# UTF-32 first: the little-endian mark of UTF-16 is the beginning of its own.
OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
LONGEST_MARK = 4
# Characters that some programs take for the end of a line, though JSON does not, and their escapes.
LINE_SEPARATORS = {ord(separator): f"\\u{ord(separator):04x}" for separator in "\x85\u2028\u2029"}


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark and with every line break as a newline.

    Raises:
        InputError: the file is not text in UTF-8.
        OSError: the file cannot be read.
    """
    return decode_text(path.read_bytes(), str(path))


def decode_text(data: bytes, name: str) -> str:
    """The text of ``data``, by the rules of :func:`read_text`; ``name`` says in an error where it came from.

    Raises:
        InputError: not text in UTF-8.
    """
    check_encoding(data, name)
    try:
        return with_newlines(data.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not text in UTF-8 ({error}); save it as UTF-8") from None


def with_newlines(text: str) -> str:
    """``text`` with every line break as a newline."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def open_text(path: Path) -> TextIO:
    """Open a file for reading its text line by line, by the rules of :func:`read_text`.

    Raises:
        InputError: the file is in UTF-16 or UTF-32. Other bytes that are not UTF-8 raise UnicodeDecodeError when they
            are read.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        check_encoding(file.read(LONGEST_MARK), str(path))
    return path.open(encoding="utf-8-sig")


def check_encoding(data: bytes, name: str) -> None:
    """Check the bytes of a text, or the first of them, for what only other encodings have.

    Raises:
        InputError: the text is in UTF-16 or UTF-32.
    """
    check_mark(data, name)
    if b"\0" in data:
        raise InputError(f"{name} has zero bytes, as text in UTF-16 has; save it as UTF-8")


def check_mark(data: bytes, name: str) -> None:
    """Check that a text does not begin with the mark of another encoding.

    Raises:
        InputError: the text is in UTF-16 or UTF-32.
    """
    for mark, encoding in OTHER_MARKS.items():
        if data.startswith(mark):
            raise InputError(f"{name} is text in {encoding}; save it as UTF-8")


def json_line(value: Any) -> str:
    """A value as JSON on one line, with all other characters as themselves."""
    return json.dumps(value, ensure_ascii=False).translate(LINE_SEPARATORS)
