"""What a drawing of a layout shows: rows of prompts, columns of times, and what one chosen token attends to."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from pos2d.layout import CONTEXT, Layout
from pos2d.spec import Align, Visibility

# Symbols for characters that are invisible; other invisible characters become a replacement character.
SYMBOLS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥", "\u2028": "⏎", "\u2029": "⏎"}
JOINERS = "\u200c\u200d"  # part of emoji and of some scripts
INVISIBLE_CATEGORIES = ("Cc", "Cf", "Cn", "Co", "Cs", "Zs")


@dataclass(frozen=True, slots=True)
class PlacedToken:
    """One token: ``branch`` and ``time`` are its ``pos2d``; ``visible`` says whether the chosen token attends to it.

    ``owner`` is the number of its prompt, from 0, and -1 for the context.
    """

    text: str
    slot: int
    position: int
    branch: int
    time: int
    owner: int
    visible: bool


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens of one prompt or of the context."""

    name: str
    branch: int
    tokens: tuple[PlacedToken, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """The tokens in the order of their slots; ``chosen`` is the slot of the token whose view is drawn.

    ``branch_stride`` is absent without 2D RoPE; ``words`` says that words stand in for tokens.
    """

    visibility: Visibility
    align_to: Align
    branch_stride: int | None
    words: bool
    chosen: int
    tokens: tuple[PlacedToken, ...]

    @property
    def columns(self) -> int:
        return max(token.time for token in self.tokens) + 1

    @property
    def rows(self) -> list[Row]:
        """The context if there is one, then every prompt."""
        rows = []
        for owner in sorted({token.owner for token in self.tokens}):
            tokens = tuple(token for token in self.tokens if token.owner == owner)
            name = "context" if owner == CONTEXT else f"prompt {owner + 1}"
            rows.append(Row(name, tokens[0].branch, tokens))
        return rows

    @property
    def headline(self) -> str:
        visible = sum(token.visible for token in self.tokens)
        chosen = clipped(printable(self.tokens[self.chosen].text))
        return f"“{chosen}” attends to {visible} of {len(self.tokens)} tokens"

    @property
    def rule(self) -> str:
        if self.visibility == "columnar":
            return "columnar: a token attends to itself and to all earlier columns, also those of other prompts"
        context = " and the context" if self.tokens[0].owner == CONTEXT else ""
        return f"isolated: a token attends to itself and to the tokens before it in its prompt{context}"

    @property
    def place(self) -> str:
        token = self.tokens[self.chosen]
        return f"it is at position {token.position}, branch {token.branch}, time {token.time}"

    @property
    def facts(self) -> str:
        stride = "no 2D RoPE" if self.branch_stride is None else f"branch stride {self.branch_stride}"
        aligned = (
            f"aligned {self.align_to}" if self.visibility == "columnar" else "positions as if each prompt were alone"
        )
        return f"{stride}; {aligned}" + ("; words in place of tokens" if self.words else "")

    @property
    def lines(self) -> tuple[str, ...]:
        """What the picture shows, in sentences."""
        return self.headline, self.rule, self.place, self.facts


def placed_tokens(layout: Layout, texts: Sequence[str], chosen: int) -> tuple[PlacedToken, ...]:
    """Every token of a layout, with what the one in slot ``chosen`` attends to; ``texts`` are in slot order."""
    visible = layout.mask(chosen)[0]
    return tuple(
        PlacedToken(
            text=text,
            slot=slot,
            position=int(layout.positions[slot]),
            branch=int(layout.branches[slot]),
            time=int(layout.times[slot]),
            owner=int(layout.owners[slot]),
            visible=bool(visible[slot]),
        )
        for slot, text in enumerate(texts)
    )


def printable(text: str) -> str:
    """``text`` with a symbol for every character that is invisible or would change how others are displayed."""
    return "".join(_printable(character) for character in text)


def _printable(character: str) -> str:
    if character in SYMBOLS:
        return SYMBOLS[character]
    if character in JOINERS or unicodedata.category(character) not in INVISIBLE_CATEGORIES:
        return character
    if unicodedata.category(character) == "Zs":
        return SYMBOLS[" "]
    return chr(0x2400 + ord(character)) if character < " " else "\ufffd"


def clipped(text: str, room: int = 20) -> str:
    """``text`` in at most ``room`` terminal cells, with an ellipsis if it is longer."""
    from rich.text import Text

    line = Text(text)
    line.truncate(room, overflow="ellipsis")
    return line.plain


def bands(widths: Sequence[int], room: int) -> list[range]:
    """Split columns of these widths into bands that each fit ``room``; a band has at least one column."""
    result, start, used = [], 0, 0
    for column, width in enumerate(widths):
        if column > start and used + width > room:
            result.append(range(start, column))
            start, used = column, 0
        used += width
    return [*result, range(start, len(widths))]
