"""How a tokenizer splits texts, in llama.cpp's terms: read from what ``tokenizer.json`` says, and not from a name.

llama.cpp has two kinds of BPE. For bytes (``gpt2``) the way in which a text is split into words has a name, by which
llama.cpp has the same regular expressions built in. For characters (``llama``, as SentencePiece makes them) the words
are the whole text, and tokens have scores in place of merges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pos2d.errors import InputError

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD = r"[^\r\n\p{L}\p{N}]?"
BYTES, BYTES_OF_WORDS = ("bytes", False), ("bytes", True)
# How a text is split, and whether words that are tokens stay whole, to the name for it in llama.cpp.
SPLITS: Mapping[tuple[tuple[Any, ...], bool], str] = {
    ((BYTES_OF_WORDS,), False): "gpt-2",
    ((("digits", True), BYTES_OF_WORDS), False): "smollm",
    ((("split", rf"{CONTRACTIONS}|{WORD}\p{{L}}+|\p{{N}}|{PUNCTUATION}[\r\n]*|{SPACES}"), BYTES), False): "qwen2",
    ((("split", rf"{CONTRACTIONS}|{WORD}\p{{L}}+|\p{{N}}{{1,3}}|{PUNCTUATION}[\r\n]*|{SPACES}"), BYTES), True): (
        "llama-bpe"
    ),
    (
        (
            (
                "split",
                rf"{WORD}{UPPER}*{LOWER}+|{WORD}{UPPER}+{LOWER}*|\p{{N}}|{PUNCTUATION}[\r\n/]*|{SPACES}",
            ),
            BYTES,
        ),
        True,
    ): "tekken",
}
UNDERSCORE = "\u2581"  # what SentencePiece writes for a space
TO_UNDERSCORE = {"type": "Replace", "pattern": {"String": " "}, "content": UNDERSCORE}
PREPENDED = {"type": "Prepend", "prepend": UNDERSCORE}
CURE = "give the directory of another tokenizer as `tokenizer`, or export with `format='stock'`"


@dataclass(frozen=True, slots=True)
class Splitting:
    """``model``: llama.cpp's name of the kind of BPE; ``pre``: of the way in which it splits a text.

    ``space_first``: whether a space is put before a text; None where llama.cpp has no such setting. ``notes``: what
    llama.cpp does otherwise, in sentences.
    """

    model: str
    pre: str
    space_first: bool | None = None
    notes: tuple[str, ...] = ()


def splitting_of(tokenizer: Mapping[str, Any], place: str) -> Splitting:
    """How the ``tokenizer``, the content of a ``tokenizer.json``, splits texts; ``place`` names it in errors.

    Raises:
        InputError: llama.cpp has nothing like it.
    """
    model = tokenizer["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise InputError(
            f"{place} is of type {model.get('type')}, and llama.cpp runs these models with BPE alone; {CURE}"
        )
    if model.get("byte_fallback"):
        return _of_characters(tokenizer, place)
    steps = tuple(_steps(tokenizer.get("pre_tokenizer")))
    name = SPLITS.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        raise InputError(
            f"{place} splits texts in a way for which no name in llama.cpp is known here (pre_tokenizer "
            f"{', '.join(str(step[0]) for step in steps) or 'none'}); known are {', '.join(SPLITS.values())}; {CURE}"
        )
    normalizers = [step.get("type") for step in _listed(tokenizer.get("normalizer"), "normalizers")]
    if normalizers not in ([], ["NFC"]):
        raise InputError(
            f"{place} changes texts by {', '.join(map(str, normalizers))}, which llama.cpp does not; {CURE}"
        )
    return Splitting("gpt2", name)


def _of_characters(tokenizer: Mapping[str, Any], place: str) -> Splitting:
    """A tokenizer that was converted from SentencePiece, with bytes for characters that it does not have."""
    normalizers = _listed(tokenizer.get("normalizer"), "normalizers")
    words = _listed(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if not words and normalizers in ([PREPENDED, TO_UNDERSCORE], [TO_UNDERSCORE]):
        return Splitting("llama", "default", space_first=PREPENDED in normalizers)
    if not normalizers and len(words) == 1 and words[0].get("type") == "Metaspace":
        scheme = words[0].get("prepend_scheme", "always")
        if words[0].get("replacement") == UNDERSCORE and not words[0].get("split", True):
            notes = (
                "the tokenizer puts a space before a text that begins with none; llama.cpp puts one before every text "
                "and after every special token",
            )
            return Splitting("llama", "default", scheme != "never", notes if scheme != "never" else ())
    raise InputError(f"{place} changes or splits texts in a way that llama.cpp's SentencePiece does not; {CURE}")


def _steps(stored: Mapping[str, Any] | None) -> "list[tuple[Any, ...]]":
    """The steps of a pre-tokenizer, each as a kind and what matters of its settings."""
    return [_step(step) for step in _listed(stored, "pretokenizers")]


def _step(step: Mapping[str, Any]) -> tuple[Any, ...]:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return ("bytes", bool(step.get("use_regex", True)))
    if kind == "Digits":
        return ("digits", bool(step.get("individual_digits")))
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return ("split", step["pattern"].get("Regex"))
    return (kind, "unknown")


def _listed(stored: Mapping[str, Any] | None, members: str) -> Sequence[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer: those of a sequence, the one, or none."""
    if stored is None:
        return []
    return list(stored[members]) if stored.get("type") == "Sequence" else [stored]
