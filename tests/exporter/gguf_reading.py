"""What llama.cpp computes from a GGUF file, and what Go makes of a template, written down once more."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, quants

Floats = npt.NDArray[np.float32]


class GgufModel:
    """The graph of a file, in float64: pairs of neighbours turn in ``llama``, the halves of a head in the others."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            tensor.name: torch.from_numpy(
                quants.dequantize(np.array(tensor.data), tensor.tensor_type).reshape(
                    tuple(reversed(tensor.shape.tolist()))
                )
            ).double()
            for tensor in reader.tensors
        }
        self.architecture = self.fields["general.architecture"]

    def setting(self, name: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.architecture}.{name}", default)

    def logits(self, ids: Sequence[int]) -> Floats:
        """Logits ``[S, vocab]`` of one sequence."""
        hidden = self.tensors["token_embd.weight"][torch.tensor(ids)]
        for block in range(self.setting("block_count")):
            hidden = hidden + self._attention(self._norm(hidden, f"blk.{block}.attn_norm"), f"blk.{block}.")
            inner = self._norm(hidden, f"blk.{block}.ffn_norm")
            gate = torch.nn.functional.silu(self._linear(inner, f"blk.{block}.ffn_gate"))
            up = self._linear(inner, f"blk.{block}.ffn_up")
            hidden = hidden + self._linear(gate * up, f"blk.{block}.ffn_down")
        head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        found: Floats = (self._norm(hidden, "output_norm") @ head.T).float().numpy()
        return found

    def _linear(self, values: torch.Tensor, name: str) -> torch.Tensor:
        product = values @ self.tensors[f"{name}.weight"].T
        return product + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else product

    def _norm(self, values: torch.Tensor, name: str) -> torch.Tensor:
        square = values.pow(2).mean(-1, keepdim=True) + self.setting("attention.layer_norm_rms_epsilon")
        scaled: torch.Tensor = values / square.sqrt() * self.tensors[f"{name}.weight"]
        return scaled

    def _attention(self, values: torch.Tensor, block: str) -> torch.Tensor:
        heads, groups = self.setting("attention.head_count"), self.setting("attention.head_count_kv")
        q, k, v = (self._linear(values, f"{block}attn_{part}") for part in "qkv")
        q, k, v = (part.reshape(len(values), count, -1) for part, count in ((q, heads), (k, groups), (v, groups)))
        if f"{block}attn_q_norm.weight" in self.tensors:
            q, k = self._norm(q, f"{block}attn_q_norm"), self._norm(k, f"{block}attn_k_norm")
        q, k = self._turned(q), self._turned(k)
        k, v = (part.repeat_interleave(heads // groups, 1) for part in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return self._linear(torch.einsum("hij,jhd->ihd", shares, v).flatten(1), f"{block}attn_output")

    def _turned(self, values: torch.Tensor) -> torch.Tensor:
        count = values.shape[-1] // 2
        powers = self.setting("rope.freq_base") ** (-torch.arange(count).double() / count)
        frequencies = powers / self.tensors.get("rope_freqs.weight", torch.ones(count))
        angles = torch.arange(len(values))[:, None, None] * frequencies
        scaling = self.setting("rope.scaling.attn_factor", 1.0)
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        neighbours = self.architecture == "llama"
        one, other = (values[..., 0::2], values[..., 1::2]) if neighbours else values.chunk(2, -1)
        parts = one * cos - other * sin, one * sin + other * cos
        return torch.stack(parts, -1).flatten(-2) if neighbours else torch.cat(parts, -1)


def sentencepiece_ids(model: GgufModel, text: str) -> list[int]:
    """As llama.cpp reads a text with a vocabulary of kind ``llama``: the best neighbours merge, until none do."""
    tokens, scores = model.fields["tokenizer.ggml.tokens"], model.fields["tokenizer.ggml.scores"]
    number_of = {token: number for number, token in enumerate(tokens)}
    first = " " if model.fields["tokenizer.ggml.add_space_prefix"] else ""
    pieces = list((first + text).replace(" ", "\u2581"))
    while True:
        merged = ["".join(pair) for pair in pairwise(pieces)]
        known = [index for index, piece in enumerate(merged) if piece in number_of]
        if not known:
            break
        best = max(known, key=lambda index: (scores[number_of[merged[index]]], -index))
        pieces[best : best + 2] = [merged[best]]
    ids: list[int] = []
    for piece in pieces:
        of_bytes = [number_of[f"<0x{byte:02X}>"] for byte in piece.encode()]
        ids += [number_of[piece]] if piece in number_of else of_bytes
    return ids


def go_rendered(template: str, messages: Sequence[dict[str, str]]) -> str:
    """What Go's text/template makes of ``messages``, for the actions that our templates have."""
    parts = iter(re.split(r"(\{\{.*?\}\})", re.sub(r"\s+\{\{-", "{{", template), flags=re.DOTALL))
    tree = _block(parts)[0]
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return _run(tree, {".System": system, "$.System": system, ".Messages": list(messages)})


def _block(parts: Iterator[str]) -> tuple[list[Any], str]:
    """The nodes up to ``else`` or ``end``, and that action."""
    nodes: list[Any] = []
    for part in parts:
        action = part[2:-2].strip() if part.startswith("{{") else None
        if action is None or not action.startswith(("if ", "range ", "else", "end")):
            nodes.append(part if action is None else ("do", action))
            continue
        if action == "end" or action.startswith("else"):
            return nodes, action
        body, stop = _block(parts)
        branches = [(action, body)]
        while stop != "end":
            condition = stop.removeprefix("else").strip() or "if true"
            body, stop = _block(parts)
            branches.append((condition, body))
        nodes.append(("choose", branches))
    return nodes, "end"


def _run(nodes: Sequence[Any], scope: dict[str, Any]) -> str:
    text = ""
    for node in nodes:
        if isinstance(node, str):
            text += node
        elif node[0] == "do" and "=" in node[1]:
            name, value = re.split(r"\s*:?=\s*", node[1], maxsplit=1)
            scope[name] = _value(value, scope)
        elif node[0] == "do":
            text += str(_value(node[1], scope))
        elif node[1][0][0].startswith("range"):
            for index, message in enumerate(scope[".Messages"]):
                scope |= {"$i": index, ".Role": message["role"], ".Content": message["content"]}
                text += _run(node[1][0][1], scope)
        else:
            chosen = (body for condition, body in node[1] if _value(condition.removeprefix("if "), scope))
            text += _run(next(chosen, []), scope)
    return text


def _value(expression: str, scope: dict[str, Any]) -> Any:
    if expression.startswith('"'):
        return expression[1:-1].encode("latin-1", "backslashreplace").decode("unicode-escape")
    if expression == "eq (len (slice $.Messages $i)) 1":
        return scope["$i"] == len(scope[".Messages"]) - 1
    if expression.startswith("eq "):
        name, text = expression.split()[1:]
        return scope[name] == text.strip('"')
    if expression.startswith("and "):
        return all(_value(part, scope) for part in expression.split()[1:])
    return {"true": True, "false": False}[expression] if expression in ("true", "false") else scope[expression]
