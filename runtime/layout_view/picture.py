"""A layout as a person looks at it: rows of prompts, columns of times, and what one chosen token may attend to."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from pos2d.layout import CONTEXT, Layout
from pos2d.spec import Align, Visibility

# How characters that cannot be seen are shown; the others of their kinds are a replacement character.
SIGNS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥", "\u2028": "⏎", "\u2029": "⏎"}
JOINERS = "\u200c\u200d"  # hold emoji and some scripts together
UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zs")


@dataclass(frozen=True, slots=True)
class PlacedToken:
    """``branch`` and ``time`` are its ``pos2d``; ``visible`` says whether the chosen token may attend to it.

    ``owner`` is the number of its prompt, from 0; the context's is -1.
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
    name: str
    branch: int
    tokens: tuple[PlacedToken, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """Tokens in the order of their slots; ``chosen`` is a slot.

    ``branch_stride`` is absent without 2D RoPE; ``words`` says that no tokenizer was at hand.
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
        """The context where there is one, then every prompt."""
        found = []
        for owner in sorted({token.owner for token in self.tokens}):
            own = tuple(token for token in self.tokens if token.owner == owner)
            name = "context" if owner == CONTEXT else f"prompt {owner + 1}"
            found.append(Row(name, own[0].branch, own))
        return found

    @property
    def headline(self) -> str:
        seen = sum(token.visible for token in self.tokens)
        return f"“{clipped(shown(self.tokens[self.chosen].text))}” sees {seen} of {len(self.tokens)} tokens"

    @property
    def rule(self) -> str:
        if self.visibility == "columnar":
            return "columnar: a token sees itself and all earlier columns, those of other prompts too"
        context = " and the context" if self.tokens[0].owner == CONTEXT else ""
        return f"isolated: a token sees itself and what stands before it in its own prompt{context}"

    @property
    def place(self) -> str:
        token = self.tokens[self.chosen]
        return f"it stands at position {token.position}, branch {token.branch}, time {token.time}"

    @property
    def facts(self) -> str:
        stride = "no 2D RoPE" if self.branch_stride is None else f"branch stride {self.branch_stride}"
        aligned = f"aligned {self.align_to}" if self.visibility == "columnar" else "positions as if each were alone"
        return f"{stride}; {aligned}" + ("; words stand for tokens" if self.words else "")

    @property
    def lines(self) -> tuple[str, ...]:
        """What it shows, in words."""
        return self.headline, self.rule, self.place, self.facts


def placed(layout: Layout, texts: Sequence[str], chosen: int) -> tuple[PlacedToken, ...]:
    """Every token of a layout, seen from the one in slot ``chosen``; ``texts`` are in the order of the slots."""
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


def shown(text: str) -> str:
    """``text`` with a sign for every character that could not be seen, or that would change how others are."""
    return "".join(_sign(character) for character in text)


def _sign(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    if character in JOINERS or unicodedata.category(character) not in UNSEEN:
        return character
    if unicodedata.category(character) == "Zs":
        return SIGNS[" "]
    return chr(0x2400 + ord(character)) if character < " " else "\ufffd"


def clipped(text: str, room: int = 20) -> str:
    """``text`` in at most ``room`` cells of a terminal, with an ellipsis where it was longer."""
    from rich.text import Text

    line = Text(text)
    line.truncate(room, overflow="ellipsis")
    return line.plain


def bands(widths: Sequence[int], room: int) -> list[range]:
    """Neighbouring columns that together fit ``room``, as often as it takes; each band has at least one column."""
    found, start, used = [], 0, 0
    for column, width in enumerate(widths):
        if column > start and used + width > room:
            found.append(range(start, column))
            start, used = column, 0
        used += width
    return [*found, range(start, len(widths))]
