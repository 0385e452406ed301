"""Says how many held-out answers belong to their own question, with 1, 2 and 4 questions answered at once.

    python examples/evaluate_demo_adapter.py --base demo/base --model demo/merged

An answer belongs where the base model, reading ordinary text, finds it likelier after its own question than after any
other of the held-out questions: the mean log-likelihood of its tokens is the highest of all. An empty answer belongs
nowhere. The reference answers of the data go through the same test, which shows what the test itself is worth.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from demo_questions import DATA, Question, groups_of, load_base, load_stock, prompt_ids, read_questions

from pos2d.layout import build_layout

if TYPE_CHECKING:
    import torch

    from pos2d.spec import Rope2DSpec

BRANCHES = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; ``owners[k]`` is the question (from 0) that answer k fits best, -1 where it is empty."""

    model: str
    branches: int
    answers: list[str]
    owners: list[int]

    @property
    def belongs(self) -> int:
        return sum(owner == k for k, owner in enumerate(self.owners))


def mean_log_likelihoods(model: Any, prompt: list[int], answers: Sequence[list[int]]) -> "torch.Tensor":
    """For every answer the mean log-likelihood of its tokens after the prompt, ``[A]``; the prompt is read once."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokens = pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True)
    real = pad_sequence([torch.ones(len(answer)) for answer in answers], batch_first=True)
    with torch.no_grad():
        read = model(torch.tensor([prompt]), use_cache=True)
        read.past_key_values.batch_repeat_interleave(len(answers))
        rest = model(tokens[:, :-1], past_key_values=read.past_key_values).logits
        logits = torch.cat((read.logits[:, -1:].expand(len(answers), -1, -1), rest), dim=1)
        chosen = logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
    return (chosen * real).sum(-1) / real.sum(-1)


def best_questions(model: Any, tokenizer: Any, questions: Sequence[Question], answers: Sequence[str]) -> list[int]:
    """For every answer the question that it fits best, -1 where it is empty."""
    import torch

    texts = sorted({answer for answer in answers if answer}, key=len)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    columns = []
    for k, question in enumerate(questions):
        print(f"\rreading answers after question {k + 1} of {len(questions)} ", end="", file=sys.stderr, flush=True)
        prompt = prompt_ids(tokenizer, question.text)
        columns.append(torch.cat([mean_log_likelihoods(model, prompt, part) for part in groups_of(ids, 40)]))
    print(file=sys.stderr)
    best = dict(zip(texts, torch.stack(columns, dim=-1).argmax(-1).tolist(), strict=True))
    return [best.get(answer, -1) for answer in answers]


def decode(model: Any, spec: "Rope2DSpec", branches: Sequence[list[int]], limit: int, end: int) -> list[list[int]]:
    """Greedy columnar decoding with a cache: how the untrained base, which is no artifact, answers several at once."""
    import torch
    from transformers import DynamicCache

    layout, cache = build_layout(branches, spec), DynamicCache()
    written: list[list[int]] = [[] for _ in branches]
    live, known = set(range(len(branches))), 0
    for _ in range(limit):
        with torch.no_grad():
            logits = model(
                input_ids=torch.from_numpy(layout.ids[known:])[None],
                position_ids=torch.from_numpy(layout.positions[known:])[None],
                pos2d=torch.from_numpy(layout.pos2d[known:])[None],
                attention_mask=torch.from_numpy(layout.mask(known))[None, None],
                past_key_values=cache,
            ).logits[0]
        chosen = {k: int(logits[layout.last[k] - known].argmax()) for k in live}
        live = {k for k in live if chosen[k] != end}
        if not live:
            break
        for k in live:
            written[k].append(chosen[k])
        known = len(layout)
        layout = layout.append([chosen[k] if k in live else None for k in range(len(branches))])
    return written


def base_answers(
    base: Path, prompts: Sequence[list[int]], limit: int, end: int
) -> Iterator[tuple[int, list[list[int]]]]:
    """The base model by itself: one question as ordinary text, several with the adapter's positions but no adapter."""
    import torch

    stock = load_stock(base)
    model, spec = load_base(base)
    for size in BRANCHES:
        if size == 1:
            tensors = [torch.tensor([prompt]) for prompt in prompts]
            texts = [stock.generate(ids, max_new_tokens=limit, do_sample=False)[0, ids.shape[1] :] for ids in tensors]
            yield size, [[token for token in ids.tolist() if token != end] for ids in texts]
        else:
            yield size, [ids for group in groups_of(prompts, size) for ids in decode(model, spec, group, limit, end)]


def artifact_answers(artifact: Path, prompts: Sequence[list[int]], limit: int) -> Iterator[tuple[int, list[list[int]]]]:
    """The merged adapter through the public interface of this project."""
    from pos2d import runtime

    model = runtime.load(artifact)
    for size in BRANCHES:
        groups = [model.generate_ids(list(group), max_new_tokens=limit) for group in groups_of(prompts, size)]
        yield size, [ids for group in groups for ids in group]


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'answers by':<22} {'branches':>8}   belong"]
    lines += [f"{row.model:<22} {row.branches:>8}   {row.belongs} of {len(row.answers)}" for row in rows]
    return "\n".join(lines)


@click.command()
@click.option("--base", type=click.Path(path_type=Path, exists=True), required=True, help="Hugging Face directory.")
@click.option(
    "--model", type=click.Path(path_type=Path, exists=True), required=True, help="Base with the adapter merged."
)
@click.option("--data", type=click.Path(path_type=Path, exists=True), default=DATA, show_default="examples/demo_data")
@click.option("--max-new-tokens", default=32, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--skip-base", is_flag=True, help="Leave out what the base model says without the adapter.")
@click.option("--json", "as_json", is_flag=True, help="JSON with every answer instead of the table.")
def main(
    base: Path, model: Path, data: Path, max_new_tokens: int, threads: int, skip_base: bool, as_json: bool
) -> None:
    """How many of the held-out answers belong to their question at 1, 2 and 4 branches."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(base)
    questions = read_questions(data / "held_out.jsonl")
    prompts = [prompt_ids(tokenizer, question.text) for question in questions]

    found = [("data", 1, [question.answer for question in questions])]
    sources = [] if skip_base else [("base", base_answers(base, prompts, max_new_tokens, tokenizer.eos_token_id))]
    sources.append(("adapter", artifact_answers(model, prompts, max_new_tokens)))
    for name, source in sources:
        for size, ids in source:
            print(f"{name} answered at {size}", file=sys.stderr)
            found.append((name, size, [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in ids]))

    owners = best_questions(
        load_stock(base), tokenizer, questions, [answer for _, _, answers in found for answer in answers]
    )
    rows = [Row(*line, owners=list(part)) for line, part in zip(found, groups_of(owners, len(questions)), strict=True)]
    if as_json:
        results = [asdict(row) | {"belongs": row.belongs} for row in rows]
        click.echo(
            json.dumps({"questions": [q.text for q in questions], "rows": results}, indent=1, ensure_ascii=False)
        )
    else:
        click.echo(table(rows))


if __name__ == "__main__":
    main()
