"""Inputs of batches: every form of a line, many times."""

import json
from pathlib import Path
from typing import Any

FORMS: list[Any] = [
    {"prompt": "one", "id": "first"},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "and two"}]},
    {"context": "said before. ", "prompts": ["a", "bc", "def"]},
    {"branches": ["x y", {"question": "what?", "answer": "that"}, {"text": "said"}], "main": "over all"},
    "left||right",
    {"prompt": "drawn", "temperature": 1.1, "top_k": 20, "seed": 3, "max_new_tokens": 5},
    {"prompt": "stopped", "stop": ["e", "a"], "meta": {"any": [1]}},
    {"prompts": ["p", "q"], "visibility": "isolated", "preset": "code"},
    {"prompt": "wrong", "temprature": 1},
    {"prompt": "longer than the others " * 3, "logprobs": True},
]


def write_lines(path: Path, count: int) -> Path:
    """Mixed lines, each a little different from the others of its form."""
    lines = []
    for number in range(count):
        form = FORMS[number % len(FORMS)]
        if isinstance(form, dict) and "prompt" in form:
            form = form | {"prompt": f"{form['prompt']} {number}"}
        lines.append(form if isinstance(form, str) else json.dumps(form))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
