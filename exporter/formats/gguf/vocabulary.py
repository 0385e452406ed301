"""The tokenizer as a GGUF file stores it: tokens, their types, merges or scores, special tokens and chat template."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pos2d.errors import InputError
from pos2d.exporter.formats.gguf.tokenizer_json import CURE, UNDERSCORE, Splitting, splitting_of
from pos2d.hf.tokenizer import load_tokenizer
from pos2d.sources.files.json_object import write_json
from pos2d.sources.sidecars.sidecars import TOKENIZER, write_sidecars
from pos2d.sources.source import Source

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerFast

# llama.cpp's numbers for the types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# The keys for tokens that end an answer, in the order in which they are used.
END_KEYS = ("eos", "eot", "eom")
# Texts of tokens at which llama.cpp ends an answer in any case.
KNOWN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>")
# The score of a token that no merge makes.
NO_SCORE = -1e6


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """A tokenizer for as many tokens as the model has rows.

    ``ids``: special tokens by the name of their key (``bos``, ``eos``, …). ``first`` and ``last``: whether BOS is put
    before every text, and EOS after it. ``merges`` are those of bytes, ``scores`` those of characters. ``template``:
    the chat template. ``notes``: what llama.cpp does otherwise.
    """

    splitting: Splitting
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    ids: Mapping[str, int]
    first: bool
    last: bool
    template: str | None
    notes: tuple[str, ...] = field(default=())

    def add_to(self, writer: "GGUFWriter") -> None:
        """Write the keys ``tokenizer.*``."""
        writer.add_tokenizer_model(self.splitting.model)
        writer.add_tokenizer_pre(self.splitting.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        else:
            writer.add_token_merges(self.merges)
        for name, token in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.first)
        writer.add_add_eos_token(self.last)
        if self.splitting.space_first is not None:
            writer.add_add_space_prefix(self.splitting.space_first)
        if self.template is not None:
            writer.add_chat_template(self.template)


def open_tokenizer(source: Source) -> "PreTrainedTokenizerFast | None":
    """The tokenizer with which we run an artifact of ``source``; None if it has none."""
    with tempfile.TemporaryDirectory(prefix="pos2d-") as folder:
        write_sidecars(source.sidecars, Path(folder), source.base.sizes.family)
        if not (Path(folder) / TOKENIZER).is_file():
            return None
        write_json(Path(folder) / "config.json", {"model_type": source.base.sizes.family})
        return load_tokenizer(Path(folder))


def read_vocabulary(tokenizer: "PreTrainedTokenizerFast", source: Source) -> Vocabulary:
    """The vocabulary of ``tokenizer`` for the model of ``source``.

    Raises:
        InputError: a tokenizer that llama.cpp cannot have, or without an end token.
    """
    place = _place(source)
    stored: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    splitting = splitting_of(stored, place)
    tokens, types = _tokens(stored, source.base.sizes.vocab, splitting.model, place)
    first, last = _around(tokenizer, place)
    ends = _end_tokens(tokenizer, source, last, place)
    unknown = tokenizer.unk_token_id if splitting.model == "llama" else None
    begins = first[0] if first else tokenizer.bos_token_id
    named = source.base.config.get("bos_token_id")
    if begins is None and type(named) is int and 0 <= named < source.base.sizes.vocab:
        begins = named
    # llama.cpp would take a token of its own for the beginning where none is named.
    ids = {"bos": ends[0] if begins is None else begins, **dict(zip(END_KEYS, ends, strict=False))}
    ids |= {key: token for key, token in (("unk", unknown), ("pad", tokenizer.pad_token_id)) if token is not None}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in stored["model"]["merges"]]
    if splitting.model == "gpt2" and not pairs:
        raise InputError(
            f"{place} has no merges, without which llama.cpp reads no tokenizer; give another one as `tokenizer`"
        )
    if splitting.model == "llama":
        _check_all_pairs(pairs, tokens, types, place)
    template = _template(tokenizer)
    return Vocabulary(
        splitting=splitting,
        tokens=tuple(tokens),
        types=tuple(types),
        merges=tuple(" ".join(pair) for pair in pairs) if splitting.model == "gpt2" else (),
        scores=tuple(_scores(pairs, tokens)) if splitting.model == "llama" else (),
        ids=ids,
        first=bool(first),
        last=bool(last),
        template=template,
        notes=(*splitting.notes, *_end_notes(ends, tokens), *_first_notes(tokenizer, template, first)),
    )


def _place(source: Source) -> str:
    path = source.sidecars.files.get(TOKENIZER)
    return str(path) if path is not None else f"the tokenizer of {source.sidecars.tokenizer_of}"


def _tokens(stored: Mapping[str, Any], rows: int, model: str, place: str) -> tuple[list[str], list[int]]:
    """The text and the type of every token; rows of the model without one get a text of their own."""
    vocabulary: Mapping[str, int] = stored["model"]["vocab"]
    last = max([*vocabulary.values(), *(token["id"] for token in stored["added_tokens"])], default=-1)
    if last >= rows:
        raise InputError(
            f"{place} has ids up to {last}, and the model has {rows} rows, which llama.cpp does not load; give the "
            "directory of a tokenizer that fits as `tokenizer`"
        )
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    for text, number in vocabulary.items():
        is_byte = model == "llama" and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens[number], types[number] = text, BYTE if is_byte else NORMAL
    if model == "llama" and stored["model"].get("unk_token") in vocabulary:
        types[vocabulary[stored["model"]["unk_token"]]] = UNKNOWN
    for token in stored["added_tokens"]:
        number, text = token["id"], token["content"]
        if types[number] == UNKNOWN:
            continue
        plain = text.replace(UNDERSCORE, " ") if model == "llama" and not token["special"] else text
        tokens[number], types[number] = plain, CONTROL if token["special"] else USER_DEFINED
    if len(set(tokens)) != rows:
        twice = next(text for text in tokens if tokens.count(text) > 1)
        raise InputError(
            f"{place} has two tokens {twice!r}, with which llama.cpp ends; give another one as `tokenizer`"
        )
    return tokens, types


def _around(tokenizer: "PreTrainedTokenizerFast", place: str) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after every text: none, or one each.

    Raises:
        InputError: others than BOS and EOS, which is all that llama.cpp can put there.
    """
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    starts = [start for start in range(len(whole) - len(plain) + 1) if whole[start : start + len(plain)] == plain]
    before, after = (whole[: starts[0]], whole[starts[0] + len(plain) :]) if starts else (whole, [])
    if len(before) > 1 or len(after) > 1:
        raise InputError(
            f"{place} puts the tokens {before + after} around every text, and llama.cpp can put one first and one "
            "last; give another one as `tokenizer`"
        )
    return before, after


def _end_tokens(
    tokenizer: "PreTrainedTokenizerFast", source: Source, last: Sequence[int], place: str
) -> tuple[int, ...]:
    """The tokens that end an answer, the one first that the tokenizer names or puts after a text."""
    named = last[0] if last else tokenizer.eos_token_id
    ends = source.eos_token_ids or (() if named is None else (named,))
    if not ends:
        raise InputError(
            f"{place} names no end token, and neither do the settings of the model; llama.cpp needs one: set "
            "eos_token_id in generation_config.json"
        )
    return tuple(sorted(ends, key=lambda token: token != named))


def _end_notes(ends: Sequence[int], tokens: Sequence[str]) -> list[str]:
    more = [tokens[token] for token in ends[len(END_KEYS) :] if tokens[token] not in KNOWN_ENDS]
    if not more:
        return []
    return [f"GGUF has room for {len(END_KEYS)} end tokens; llama.cpp does not end answers at {', '.join(more)}"]


def _first_notes(tokenizer: "PreTrainedTokenizerFast", template: str | None, first: Sequence[int]) -> list[str]:
    """A note where llama.cpp puts BOS before a chat, and the chat template has none."""
    if template is None or not first:
        return []
    try:
        text = str(tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False))
    except Exception:  # a template may raise anything
        return []
    if tokenizer.encode(text, add_special_tokens=False)[:1] == list(first):
        return []
    return ["the chat template does not begin with BOS, and llama.cpp puts it there as before any other text"]


def _template(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:  # several, and none of them is the default
        return None


def _check_all_pairs(pairs: Sequence[Sequence[str]], tokens: Sequence[str], types: Sequence[int], place: str) -> None:
    """Check that every two tokens that make a third one are merged, as in a vocabulary of SentencePiece.

    Raises:
        InputError: some are not; llama.cpp, which has no list of merges for these vocabularies, merges them.
    """
    known = {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    merged = {(one, other) for one, other in pairs}
    for text in known:
        for end in range(1, len(text)):
            pair = text[:end], text[end:]
            if known.issuperset(pair) and pair not in merged:
                raise InputError(
                    f"{place} does not merge {pair[0]!r} and {pair[1]!r} to its token {text!r}, as SentencePiece and "
                    f"llama.cpp do; {CURE}"
                )


def _scores(pairs: Sequence[Sequence[str]], tokens: Sequence[str]) -> list[float]:
    """A score for every token, by which llama.cpp merges in the order of ``pairs``: the earlier, the higher."""
    ranks: dict[str, int] = {}
    for one, other in pairs:
        ranks.setdefault(one + other, len(ranks))
    return [-float(ranks[text]) if text in ranks else NO_SCORE for text in tokens]
