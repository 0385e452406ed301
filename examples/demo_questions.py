"""What training and evaluating the demo adapter share: questions, prompts, and the base with three positions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pos2d.spec import Rope2DSpec, pair_indices_for_ratio

if TYPE_CHECKING:
    from pos2d.hf.modeling_pos2d import Pos2DLlamaForCausalLM

HERE = Path(__file__).resolve().parent
DATA = HERE / "demo_data"
ADAPTER = HERE / "demo_adapter"

Item = TypeVar("Item")

RATIO = 1.0
STRIDE = 128


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the base model's own answer, and whether that answer came to its end or was cut."""

    text: str
    answer: str
    finished: bool


def read_questions(path: Path) -> list[Question]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Question(text=row["q"], answer=row["a"], finished=row["end"] == "stop") for row in rows]


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    """One whole conversation up to the assistant's turn: system turn, question, header of the answer."""
    turn = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False))


def groups_of(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Neighbours together; the last group may be smaller."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def demo_spec(head_dim: int) -> Rope2DSpec:
    """Every frequency turns with branch or time: distances inside a branch do not depend on how many there are."""
    frequencies = head_dim // 2
    return Rope2DSpec(frequencies, pair_indices_for_ratio(frequencies, RATIO), branch_stride=STRIDE)


def load_stock(directory: Path) -> Any:
    """The base model as it is, for ordinary text, in float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def load_base(directory: Path, rope: Rope2DSpec | None = None) -> tuple["Pos2DLlamaForCausalLM", Rope2DSpec]:
    """The base model in float32 with the demo's rotary block (or ``rope``) in its config."""
    import torch
    from transformers.utils import logging

    from pos2d.hf.configuration_pos2d import Pos2DLlamaConfig
    from pos2d.hf.modeling_pos2d import Pos2DLlamaForCausalLM

    logging.disable_progress_bar()
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    spec = rope or demo_spec(values["head_dim"])
    kept = {key: value for key, value in values.items() if key not in ("model_type", "architectures")}
    config = Pos2DLlamaConfig(**kept, rope_2d=spec.to_dict())
    model = Pos2DLlamaForCausalLM.from_pretrained(directory, config=config, dtype=torch.float32)
    return model.eval(), spec
