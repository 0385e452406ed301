"""Held-out tokens: text on which a quantised model is compared with the exact one; calibration never sees it."""

from pathlib import Path

from pos2d.reference import COLUMNS, MOST_LIKELY, ONE_BRANCH, HeldOut

# Tokens of one branch; of a context and of the branches after it, whose lengths differ so that alignment matters.
LENGTH, CONTEXT, BRANCHES = 224, 48, (48, 36, 52, 40)
SEED = 987654321

TEXT = """\
The ferry left the harbour a little after six, when the fishermen were already mending their nets on the quay. On \
deck a woman with a green umbrella asked the captain how long the crossing would take. "Three hours if the wind stays \
in the west," he said, "and four if it turns." She nodded, opened a book about the history of lighthouses, and did not \
look up again until the first island came into sight.

Question: Why does ice float on water?
Answer: Water expands when it freezes, because its molecules form an open lattice. Ice is therefore about nine percent \
less dense than liquid water, so that it floats with most of its volume below the surface.

def running_mean(values, width):
    total = sum(values[:width])
    means = [total / width]
    for old, new in zip(values, values[width:]):
        total += new - old
        means.append(total / width)
    return means

Shopping list: flour, eggs, two litres of milk, butter, 500 g of rice, onions, and a new bulb for the lamp in the hall.

Am Abend saßen die Kinder am Fenster und zählten die Lichter auf der anderen Seite des Flusses. Le train de huit \
heures est en retard, mais le café de la gare est encore ouvert. El puente se cerró durante tres meses por obras.

To repair a flat tyre, first turn the bicycle upside down and loosen the nuts of the wheel. Take the tyre off the rim \
with two levers, pull out the tube, and pump it up until you hear where the air escapes. Roughen the place with \
sandpaper, spread a thin layer of glue, wait two minutes, and press the patch on firmly. Before you put everything \
back, run a finger along the inside of the tyre: what made the hole may still be there.

In 1889 the town had 4,312 inhabitants, two mills and one school; by 1914 there were 19,870 people, eleven factories \
and a theatre with 600 seats. Historians disagree about the reasons. Some point to the railway, which arrived in 1893, \
others to the cheap coal from the valley, and a few to the stubbornness of the mayor, who held the office for thirty \
years and refused to sell the river meadows.

Dear Mr Okafor, thank you for your letter of 3 May. We are sorry that the second parcel arrived damaged. A replacement \
was sent this morning and should reach you by Friday; please keep the broken lamp until our driver collects it. If you \
would rather have your money back, reply to this message and we will arrange it within five working days.

The area of a circle with radius 5 is 25 times pi, which is about 78.5. If the radius doubles, the area becomes four \
times as large. A square with the same area as the first circle has sides of about 8.86.
"""


def held_out_tokens(directory: Path, vocab: int, context_length: int) -> tuple[list[HeldOut], bool]:
    """The sequences to compare on, and whether they are text.

    The tokens are those of :data:`TEXT` if ``directory`` has a ``tokenizer.json`` that fits the vocabulary, otherwise
    random ones. A model with few positions gets fewer.
    """
    text = _text_tokens(directory / "tokenizer.json", vocab)
    ids = text or _random_tokens(vocab)
    lengths = _lengths(context_length)
    parts, start = [], 0
    for length in lengths:
        parts.append(tuple(ids[(start + place) % len(ids)] for place in range(length)))
        start += length
    one, context, *branches = parts
    if context_length < sum(lengths[1:]):  # a handful of positions
        return [HeldOut(ONE_BRANCH, (), (one,))], bool(text)
    return [HeldOut(ONE_BRANCH, (), (one,)), HeldOut(COLUMNS, context, tuple(branches))], bool(text)


def reference_bytes(vocab: int, context_length: int) -> int:
    """The size of the file with the exact model's predictions, without a few hundred bytes."""
    return sum(_lengths(context_length)) * min(MOST_LIKELY, vocab) * 8  # a token and a float32 each


def _lengths(context_length: int) -> list[int]:
    """Tokens of the one branch, of the context, and of the branches after it."""
    share = min(1.0, context_length / LENGTH, context_length / (CONTEXT + sum(BRANCHES)))
    return [max(1, int(length * share)) for length in (LENGTH, CONTEXT, *BRANCHES)]


def _text_tokens(path: Path, vocab: int) -> list[int]:
    """The tokens of :data:`TEXT`; none where it cannot be encoded in this vocabulary."""
    if not path.is_file():
        return []
    from tokenizers import Tokenizer

    try:
        ids: list[int] = Tokenizer.from_file(str(path)).encode(TEXT).ids
    except Exception:  # the library raises bare exceptions; what is wrong with the file is said when it is used
        return []
    return ids if ids and max(ids) < vocab else []


def _random_tokens(vocab: int) -> list[int]:
    import numpy as np

    return list(map(int, np.random.default_rng(SEED).integers(0, vocab, LENGTH + CONTEXT + sum(BRANCHES))))
