"""The tokens on which models are compared: samples of a text, alone and side by side, and prompts to answer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pos2d.errors import InputError
from pos2d.layout import Ints, build_layout
from pos2d.manifest import Manifest
from pos2d.runtime.evaluation.sequences import EvalSequence, read_sequences
from pos2d.runtime.text.requests import encode_for
from pos2d.spec import Rope2DSpec

# The logits of the unmerged model that are kept while the artifacts run, in bytes a case.
MAX_LOGITS_BYTES = 2**28
# How many samples give a prompt where none is given, and how long it is where a sample is no conversation.
PROMPTS, PROMPT_TOKENS = 4, 16
# The samples where no text is given.
QUESTIONS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Why is the sky blue?", "Air scatters the short waves of sunlight, which are blue, more than the long ones."),
    ("Name three fruits.", "Apples, bananas and oranges."),
    ("How many days does a week have?", "A week has seven days."),
    ("Write a sentence about a river.", "The river winds slowly through the green valley to the sea."),
    ("What do bees make?", "Bees make honey from the nectar of flowers."),
    ("How do I boil an egg?", "Put the egg into boiling water for seven minutes, then cool it under cold water."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is a loop in a program?", "A loop repeats instructions until a condition no longer holds."),
    ("Translate 'good morning' into Spanish.", "Good morning is buenos días in Spanish."),
    ("What is 12 times 11?", "12 times 11 is 132."),
    ("Why do people sleep?", "Sleep lets the body recover and the brain store what it has learned."),
)


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Samples and prompts as token ids of one tokenizer; each artifact lays them out with its own positions.

    ``single`` and ``columns`` are sequences with the positions of the reference; ``prompts`` are the token ids of each.
    """

    name: str
    single: tuple[EvalSequence, ...]
    columns: tuple[EvalSequence, ...]
    prompts: tuple[tuple[int, ...], ...]
    longest: int


def default_text(directory: Path) -> Path:
    """Write the samples that are used where no text is given into ``directory``."""
    path = directory / "questions.jsonl"
    lines = (json.dumps({"question": question, "answer": answer}) for question, answer in QUESTIONS)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_texts(
    path: Path, name: str, tokenizer: Any, manifest: Manifest, branches: int, prompts: Sequence[str]
) -> Texts:
    """Samples from the start of a file, as many as the kept logits have room for, and prompts.

    Without ``prompts``, they are the first turns of the first conversations, or the first tokens of other samples.

    Raises:
        UsageError: ``branches`` is out of range.
        InputError: a file that cannot be read, or has no token to predict; an empty prompt.
    """
    single, columns = sequences_with(path, tokenizer, manifest, manifest.rope_2d, branches)
    if prompts:
        encoded = [encode_for(tokenizer, [prompt], None, manifest.rope_2d, False).branches[0] for prompt in prompts]
    else:
        encoded = [_start_of(sequence) for sequence in single[:PROMPTS]]
    longest = max(len(sequence.layout) for sequence in (*single, *columns))
    return Texts(name, single, columns, tuple(map(tuple, encoded)), longest)


def sequences_with(
    path: Path, tokenizer: Any, manifest: Manifest, spec: Rope2DSpec, branches: int
) -> tuple[tuple[EvalSequence, ...], tuple[EvalSequence, ...]]:
    """The same samples with the positions of ``spec``: alone, and ``branches`` side by side; none for 1."""
    single, columns = read_sequences(path, tokenizer, replace(manifest, rope_2d=spec), branches)
    room = max(1, MAX_LOGITS_BYTES // (4 * manifest.vocab_size))
    return _first(single, room), _first(columns, room) if branches > 1 else ()


def in_text_order(sequence: EvalSequence) -> EvalSequence:
    """The same sequence with its targets branch by branch, an order that does not depend on positions."""
    layout = sequence.layout
    order = np.lexsort((layout.times[sequence.rows], layout.owners[sequence.rows]))
    return replace(sequence, rows=sequence.rows[order], targets=sequence.targets[order])


def _first(sequences: Sequence[EvalSequence], room: int) -> tuple[EvalSequence, ...]:
    """The first sequences with at most ``room`` targets in all, and at least one of them."""
    chosen: list[EvalSequence] = []
    for sequence in sequences:
        room -= len(sequence.targets)
        if chosen and room < 0:
            break
        chosen.append(in_text_order(sequence))
    return tuple(chosen)


def _start_of(sequence: EvalSequence) -> list[int]:
    """The tokens before those that are predicted; of a sample that is no conversation, the first ones."""
    first = int(sequence.rows.min()) + 1
    ids: list[int] = sequence.layout.ids.tolist()
    return ids[: first if first > 1 else min(PROMPT_TOKENS, len(ids) - 1)]


def forced(prompt: Sequence[int], answer: Sequence[int], spec: Rope2DSpec) -> EvalSequence:
    """A prompt with an answer to it as one sequence, whose tokens are predicted; the last one is not fed."""
    layout = build_layout([[*prompt, *answer[:-1]]], spec)
    rows: Ints = np.arange(len(prompt) - 1, len(layout), dtype=np.int64)
    return EvalSequence(layout, 1, rows, np.array(answer, dtype=np.int64))


def check_room(texts: Texts, manifest: Manifest, new_tokens: int) -> None:
    """Check that prompts and answers fit into the model.

    Raises:
        InputError: they do not.
    """
    longest = max(map(len, texts.prompts)) + new_tokens
    if longest > manifest.context_length:
        raise InputError(
            f"a prompt and an answer take {longest} positions, the model has {manifest.context_length}; use shorter "
            "prompts or fewer `max_new_tokens`"
        )
