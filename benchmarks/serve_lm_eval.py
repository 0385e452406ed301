"""lm-eval's ``local-completions`` over HTTP, and our own loop in process, over the same 50 questions.

lm-eval sends every question with each of its answers, as token ids, and reads the log-likelihood of the answer from the
echoed prompt. Our loop reads each in the scheduler, without a server, and adds up the log probabilities itself: the
sums must be equal in every digit that lm-eval prints, and so must the accuracies. One forward pass without a cache, in
another graph, must agree within rounding. Needs ``make serve-tools``; nothing is downloaded.

    .venv/bin/python benchmarks/serve_lm_eval.py --artifact onnx
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from serve_report import Check, verdicts
from served import HOST, OFFLINE, ROOT, demo_artifact, free_port, ours, processor, served

from pos2d import runtime
from pos2d.layout import build_layout
from pos2d.runtime.engine.sampler import Sampler
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.engine.sequence import SequenceState
from pos2d.runtime.scheduling.pace import WholeChunks
from pos2d.runtime.scheduling.scheduler import Limits, Scheduler
from pos2d.runtime.serving.prompt_scorer import PromptScorer

TASK = "pos2d_facts"
TASKS = ROOT / "benchmarks" / "lm_eval_task"
PYTHON = ROOT / ".venv-serve" / "bin" / "python"
DIGITS = 4


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer to one question: its log-likelihood, and whether every token of it is the likeliest."""

    question: str
    answer: str
    log_likelihood: float
    is_greedy: bool


@click.command()
@click.option("--artifact", type=click.Choice(["int8", "onnx"]), default="onnx", show_default=True, help="Of the demo.")
@click.option("--concurrent", type=int, default=4, show_default=True, help="Requests of lm-eval at a time.")
@click.option("--serve-flag", "flags", multiple=True, help="A flag of `serve`, such as --threads=2.")
@click.option(
    "--log", type=click.Path(path_type=Path), default=ROOT / "out" / "serve.log", show_default="out/serve.log"
)
@click.option("--json", "as_json", is_flag=True)
def bench(artifact: str, concurrent: int, flags: Sequence[str], log: Path, as_json: bool) -> None:
    """Score everything twice, and compare."""
    if not PYTHON.exists():
        raise click.ClickException("run `make serve-tools` first")
    model, port = demo_artifact(artifact), free_port()
    with served(ours(model, port, flags), port, log) as server:
        name = json.loads(server.get("/v1/models")[1])["data"][0]["id"]
        theirs, accuracy = over_http(model, name, port, concurrent)
    loaded = runtime.load(model)
    one_pass = [in_one_pass(loaded, scored) for scored in theirs]
    own = [in_process(loaded, scored) for scored in theirs]
    checks = compared(theirs, own, one_pass, accuracy, own_accuracy(own))
    figures = {"processor": processor(), "artifact": artifact, "accuracy": accuracy, "answers": len(theirs)}
    if as_json:
        click.echo(json.dumps(figures | {"checks": [check.as_dict() for check in checks]}, indent=2))
    else:
        click.echo("\n".join([*(f"{name}: {value}" for name, value in figures.items()), "", *verdicts(checks)]))


def over_http(model: Path, name: str, port: int, concurrent: int) -> tuple[list[Scored], float]:
    """What lm-eval got for every answer, and its accuracy."""
    arguments = {
        "model": name,
        "base_url": f"http://{HOST}:{port}/v1/completions",
        "tokenizer": str(model),
        "tokenizer_backend": "huggingface",
        "num_concurrent": concurrent,
        "max_retries": 1,
        "max_length": 2048,
    }
    with tempfile.TemporaryDirectory() as place:
        words = ",".join(f"{key}={value}" for key, value in arguments.items())
        command = [
            *(str(PYTHON), "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", words),
            *("--tasks", TASK, "--include_path", str(TASKS), "--output_path", place, "--log_samples"),
        ]
        environment = os.environ | OFFLINE | {"HF_HOME": place}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise click.ClickException(f"lm-eval failed:\n{(done.stdout + done.stderr)[-4000:]}")
        samples, results = (next(Path(place).rglob(f"{name}*")) for name in ("samples_", "results_"))
        accuracy = json.loads(results.read_text(encoding="utf-8"))["results"][TASK]["acc,none"]
        lines = samples.read_text(encoding="utf-8").splitlines()
        return [scored for line in lines for scored in read_sample(json.loads(line))], float(accuracy)


def read_sample(sample: dict[str, Any]) -> list[Scored]:
    """The answers of one question in lm-eval's log, in the order of the choices."""
    questions = sample["arguments"]
    given = [questions[key] for key in sorted(questions)] if isinstance(questions, dict) else questions
    found = []
    for pair, (response, *_) in zip(given, sample["resps"], strict=True):
        question, answer = (pair["arg_0"], pair["arg_1"]) if isinstance(pair, dict) else pair
        likelihood, greedy = response
        found.append(Scored(question, answer, float(likelihood), str(greedy) == "True"))
    return found


def encoded(model: runtime.Model, asked: Scored) -> tuple[list[int], list[int]]:
    """Token ids of a question, and of it with its answer."""
    texts = (asked.question, asked.question + asked.answer)
    question, whole = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return question, whole


def in_process(model: runtime.Model, asked: Scored) -> Scored:
    """The same answer in a scheduler of this process."""
    question, whole = encoded(model, asked)
    layout = build_layout([whole], model.manifest.rope_2d)
    scorer = PromptScorer(layout, top=1)
    scheduler = Scheduler(model.backend, Limits(1, 10**5, 0), WholeChunks(model.backend.prefill_chunk))
    samplers = [Sampler(Sampling(max_new_tokens=1))]
    scheduler.add(SequenceState(layout, samplers, model.manifest.context_length), scorer)
    while not scheduler.is_idle:
        scheduler.step()
    scores, answer = scorer.scores(), slice(len(question), len(whole))
    likelihood = sum(score for score in scores.logprobs[answer] if score is not None)
    greedy = all(best[0][0] == token for best, token in zip(scores.top[answer], whole[answer], strict=True))
    return Scored(asked.question, asked.answer, likelihood, greedy)


def in_one_pass(model: runtime.Model, asked: Scored) -> Scored:
    """The same answer in one forward pass without a cache."""
    question, whole = encoded(model, asked)
    logits = model.logits(whole)[0].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    places = np.arange(len(question), len(whole))
    tokens = np.asarray(whole)[places]
    likelihood = float(log_probabilities[places - 1, tokens].sum())
    return Scored(asked.question, asked.answer, likelihood, bool((logits[places - 1].argmax(-1) == tokens).all()))


def own_accuracy(own: Sequence[Scored]) -> float:
    """Share of questions whose right answer is the likeliest."""
    lines = (TASKS / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
    right: dict[str, str] = {entry["question"]: " " + entry["choices"][entry["answer"]] for entry in entries}
    best: dict[str, Scored] = {}
    for scored in own:
        if scored.question not in best or scored.log_likelihood > best[scored.question].log_likelihood:
            best[scored.question] = scored
    hits = sum(scored.answer == right[question] for question, scored in best.items())
    return hits / len(right)


def compared(
    theirs: Sequence[Scored], own: Sequence[Scored], one_pass: Sequence[Scored], accuracy: float, ours_: float
) -> list[Check]:
    differences = [abs(a.log_likelihood - b.log_likelihood) for a, b in zip(theirs, one_pass, strict=True)]
    alike = sum(repr(a.log_likelihood) == repr(b.log_likelihood) for a, b in zip(theirs, own, strict=True))
    greedy = sum(a.is_greedy == b.is_greedy for a, b in zip(theirs, own, strict=True))
    return [
        Check("answers", len(theirs), at_least=200),
        Check(f"log-likelihoods equal in every digit, of {len(theirs)}", alike, at_least=len(theirs)),
        Check("largest difference to one forward pass", max(differences), at_most=0.5 * 10**-DIGITS),
        Check(f"is_greedy alike, of {len(theirs)}", greedy, at_least=len(theirs)),
        Check("difference of the accuracies", abs(accuracy - ours_), at_most=0),
    ]


if __name__ == "__main__":
    bench()
