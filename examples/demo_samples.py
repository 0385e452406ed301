"""Questions as training samples: token ids, positions and mask of a few conversations side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from demo_questions import Question, prompt_ids

from pos2d.layout import build_layout
from pos2d.spec import Rope2DSpec

if TYPE_CHECKING:
    import torch

NO_TARGET = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one question: its whole prompt, and its answer with the end token where it came to its end."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One flat sequence of S tokens: int64 ``[1, S]``, ``[1, S]``, ``[1, S, 2]``, bool ``[1, 1, S, S]``, int64 ``[S]``.

    ``targets`` is the token that must follow, ``NO_TARGET`` where none is taught.
    """

    input_ids: "torch.Tensor"
    position_ids: "torch.Tensor"
    pos2d: "torch.Tensor"
    mask: "torch.Tensor"
    targets: "torch.Tensor"


def encode(tokenizer: Any, questions: Sequence[Question]) -> list[Encoded]:
    def answer(question: Question) -> list[int]:
        ids: list[int] = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        return [*ids, tokenizer.eos_token_id] if question.finished else ids

    return [Encoded(prompt_ids(tokenizer, question.text), answer(question)) for question in questions]


def system_turn(tokenizer: Any, row: Encoded) -> int:
    """How many tokens come before the user's turn, the same ones in every prompt."""
    return row.prompt.index(tokenizer.bos_token_id, 1)


def make_sample(rows: Sequence[Encoded], spec: Rope2DSpec, shared: int = 0) -> Sample:
    """Lay out prompts, then answers column by column, as decoding does.

    The first ``shared`` tokens of the prompts become the context. A token sees what the cache held when it was fed:
    slots of its own step or of an earlier one, within the rule of the layout.
    """
    import torch

    layout = build_layout([row.prompt[shared:] for row in rows], spec, rows[0].prompt[:shared] or None)
    steps = [0] * len(layout)
    targets: dict[int, int] = {}
    for column in range(max(len(row.answer) for row in rows)):
        targets |= {layout.last[k]: row.answer[column] for k, row in enumerate(rows) if column < len(row.answer)}
        fed = [row.answer[column] if column + 1 < len(row.answer) else None for row in rows]
        layout = layout.append(fed)
        steps += [column + 1] * (len(layout) - len(steps))

    when = np.array(steps)
    mask = layout.mask() & (when[None, :] <= when[:, None])
    return Sample(
        input_ids=torch.from_numpy(layout.ids)[None],
        position_ids=torch.from_numpy(layout.positions)[None],
        pos2d=torch.from_numpy(layout.pos2d)[None],
        mask=torch.from_numpy(mask)[None, None],
        targets=torch.tensor([targets.get(slot, NO_TARGET) for slot in range(len(layout))]),
    )
