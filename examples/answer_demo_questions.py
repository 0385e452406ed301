"""Writes the demo data: what SmolLM2-135M-Instruct itself answers to every question of a file, greedily in float32.

    python examples/answer_demo_questions.py --base demo/base examples/demo_data/train.jsonl

An answer is its first paragraph, or all of it where that only announces a list, and at most 40 tokens. ``end`` says
``stop`` where the answer came to its end and ``length`` where it was cut. The file is replaced.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from demo_questions import groups_of, load_stock, prompt_ids

PARAGRAPH = "\n\n"


def shape_answer(text: str, finished: bool) -> tuple[str, bool]:
    """The first paragraph, which is finished where another one follows."""
    first, gap, _ = text.strip().partition(PARAGRAPH)
    if gap and not first.endswith(":"):
        return first, True
    return text.strip(), finished


def answers(
    model: Any, tokenizer: Any, questions: Sequence[str], batch: int, limit: int
) -> Iterator[tuple[str, str, bool]]:
    """Question, answer and whether it is finished; a batch holds prompts of one length, so that nothing is padded."""
    import torch

    by_length = defaultdict(list)
    for question in questions:
        prompt = prompt_ids(tokenizer, question)
        by_length[len(prompt)].append((question, prompt))
    for alike in by_length.values():
        for group in groups_of(alike, batch):
            prompts = torch.tensor([prompt for _, prompt in group])
            written = model.generate(prompts, max_new_tokens=limit, do_sample=False)[:, prompts.shape[1] :].tolist()
            for (question, _), ids in zip(group, written, strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                yield question, *shape_answer(text, tokenizer.eos_token_id in ids)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--base", type=click.Path(path_type=Path, exists=True), required=True, help="Hugging Face directory.")
@click.option("--batch", default=16, show_default=True)
@click.option("--max-new-tokens", default=40, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(file: Path, base: Path, batch: int, max_new_tokens: int, threads: int) -> None:
    """Replace the answers in FILE (JSON lines with q, a, end) by the base model's own."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_stock(base)
    questions = [json.loads(line)["q"] for line in file.read_text(encoding="utf-8").splitlines()]
    found = {}
    for question, answer, finished in answers(model, tokenizer, questions, batch, max_new_tokens):
        found[question] = {"q": question, "a": answer, "end": "stop" if finished else "length"}
        print(f"\r{len(found)} of {len(questions)} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    partial = file.with_suffix(".partial")
    partial.write_text("".join(json.dumps(found[q], ensure_ascii=False) + "\n" for q in questions), encoding="utf-8")
    os.replace(partial, file)


if __name__ == "__main__":
    main()
