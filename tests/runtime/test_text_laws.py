"""Seams between texts, and text that grows, on every kind of tokenizer and in both releases of transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pos2d.runtime.text.detokenizer import StreamDetokenizer
from pos2d.runtime.text.growing_text import WindowedText
from tests.runtime.test_transformers_loading import in_transformers
from tests.text_laws import check_growing, check_seams
from tests.tiny_tokenizers import KINDS, tiny_tokenizer
from tests.tokenizer_classes import differences

ROOT = Path(__file__).resolve().parents[2]
OLD_PROGRAM = """
import json, sys
sys.path.append(sys.argv[1])
import transformers
from tests.text_laws import check_growing, check_seams
from tests.tiny_tokenizers import KINDS
from tests.tokenizer_classes import differences
for kind in KINDS:
    check_seams(kind)
    check_growing(kind)
print(json.dumps({"version": transformers.__version__, "differences": differences(sys.argv[2])}))
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("law", [check_seams, check_growing], ids=["seams", "growing"])
def test_laws_of_texts(law: Callable[[str], None], kind: str) -> None:
    law(kind)


def test_laws_and_classes_in_the_old_release(tmp_path: Path) -> None:
    report = in_transformers("4.57", OLD_PROGRAM, tmp_path, ROOT, tmp_path)
    assert report["differences"] == []


def test_a_tokenizer_is_the_one_that_transformers_chooses(tmp_path: Path) -> None:
    assert differences(tmp_path) == []


@pytest.mark.parametrize("kind", ["bytes", "mark first"])
@pytest.mark.parametrize("byte", [0xFF, 0x80, 0xE2])
def test_bytes_that_are_no_character_flow(kind: str, byte: int) -> None:
    """Every one is shown as soon as it is certain; at most one is waited for."""
    tokenizer = tiny_tokenizer(kind)
    token = tokenizer.convert_tokens_to_ids(bytes_to_unicode()[byte] if kind == "bytes" else f"<0x{byte:02X}>")
    text = StreamDetokenizer(tokenizer)
    for count in range(1, 50):
        text.append(token)
        assert count - 1 <= len(text.text) <= count
    text.close()
    assert text.text == "\ufffd" * 49


def test_the_time_of_a_text_is_linear() -> None:
    """Also where bytes make no character, and where a run of bytes is characters to its end."""
    decoded = 0

    def decode(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return bytes(ids).decode("utf-8", "replace")

    for rows, has_bytes in ((b"\xff" * 2000, True), (b"a" * 2000, True), (b"\xff" * 2000, False)):
        decoded = 0
        text = WindowedText(decode, "<0x{:02X}>".format if has_bytes else str, has_bytes)
        for byte in rows:
            text.append(byte)
        text.close()
        assert decoded <= 4 * len(rows)


def test_a_stop_string_of_bytes_ends_an_answer_at_once() -> None:
    tokenizer = tiny_tokenizer("mark first")
    text = StreamDetokenizer(tokenizer, ("\n",))
    for token in tokenizer("Hello the\n", add_special_tokens=False).input_ids:
        assert not text.stopped
        text.append(token)
    assert text.stopped
    assert text.text == "Hello the"
