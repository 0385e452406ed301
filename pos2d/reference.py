"""The exact model's predictions for held-out tokens, which travel in a quantised artifact so that it can be compared.

Of every distribution the :data:`MOST_LIKELY` tokens are stored, and the rest as one probability. The KL of these
shortened distributions is at most that of the whole ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pos2d.errors import InputError
from pos2d.layout import Layout, build_layout
from pos2d.spec import Rope2DSpec

FILE_NAME = "reference.npz"
# Tokens of each position whose probabilities are stored, out of the whole vocabulary if that is smaller.
MOST_LIKELY = 256

ONE_BRANCH, COLUMNS = "one branch", "four branches after a context"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Prompts that are read side by side, after ``context`` if that is not empty; ``name`` says what is compared."""

    name: str
    context: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    def layout(self, spec: Rope2DSpec) -> Layout:
        """The sequence in the artifact's own layout."""
        return build_layout(self.branches, spec, self.context)


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What the exact model predicts after every token of a layout of ``S`` tokens, in the order of the slots.

    ``tokens`` int32 ``[S, K]`` are the most likely next tokens, the first of them first, and ``log_probs`` float32
    ``[S, K]`` their log-probabilities in nats.
    """

    held_out: HeldOut
    tokens: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The content of the file; ``is_text``: the held-out tokens are text, not random tokens."""

    predictions: tuple[Prediction, ...]
    is_text: bool

    def write(self, directory: Path) -> None:
        """Write the file; equal contents are equal bytes."""
        arrays: dict[str, npt.NDArray[Any]] = {"is_text": np.array(self.is_text)}
        for number, prediction in enumerate(self.predictions):
            held_out = prediction.held_out
            parts = (held_out.context, *held_out.branches)
            arrays |= {
                f"{number}.name": np.array(held_out.name),
                f"{number}.ids": np.array([token for part in parts for token in part], dtype=np.int32),
                f"{number}.lengths": np.array([len(part) for part in parts], dtype=np.int32),
                f"{number}.tokens": prediction.tokens,
                f"{number}.log_probs": prediction.log_probs,
            }
        np.savez(directory / FILE_NAME, allow_pickle=False, **arrays)


def read_reference(directory: Path) -> Reference | None:
    """The reference of an artifact, or None if it has none.

    Raises:
        InputError: a file that cannot be read.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            count = sum(name.endswith(".name") for name in arrays.files)
            return Reference(tuple(_prediction(arrays, number) for number in range(count)), bool(arrays["is_text"]))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); make the artifact again") from None


def _prediction(arrays: Any, number: int) -> Prediction:
    lengths: Sequence[int] = arrays[f"{number}.lengths"].tolist()
    context, *branches = np.split(arrays[f"{number}.ids"], np.cumsum(lengths)[:-1])
    held_out = HeldOut(
        str(arrays[f"{number}.name"]), tuple(context.tolist()), tuple(tuple(branch.tolist()) for branch in branches)
    )
    return Prediction(held_out, arrays[f"{number}.tokens"], arrays[f"{number}.log_probs"])
