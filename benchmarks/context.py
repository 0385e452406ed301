"""Ten questions about one document: side by side over its cache, and one by one with it cached and without.

``--cache-file`` measures a new process instead: how long it takes to the first token of one answer, with the keys and
values of the document in a file and without.

Every way answers the same questions with the same number of tokens in the same run, interleaved, and the median is
taken. Isolated columns must give the very tokens that the questions get alone; the share that does stands beside the
speed, as does the largest logit difference of the artifact to the merged float32 model.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
from columns import Ids

from pos2d import exporter, runtime
from pos2d.layout import build_layout
from pos2d.runtime.engine.decode import decode
from pos2d.runtime.engine.prefix_cache import PrefixCache
from pos2d.runtime.engine.sampler import Sampler
from pos2d.runtime.engine.sampling import Sampling
from pos2d.spec import Visibility

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples" / "demo_data"


@dataclass(frozen=True, slots=True)
class Row:
    """``seconds`` of all answers; ``speedup`` is the ratio to the two ways of asking one by one."""

    way: str
    seconds: float
    tokens_per_second: float
    times_cached: float
    times_uncached: float
    same_tokens: float


@dataclass(frozen=True, slots=True)
class Start:
    """A new process: seconds from its start to the first token, and without imports and loading; ``token`` is that one.

    ``cached_tokens`` of the document's were read from the file.
    """

    way: str
    process_seconds: float
    first_seconds: float
    cached_tokens: int
    token: str


@dataclass(frozen=True, slots=True, eq=False)
class Asking:
    """A document and questions about it, as token ids."""

    model: runtime.Model
    context: list[int]
    questions: Ids
    new_tokens: int

    def prefix(self) -> PrefixCache:
        return PrefixCache(self.model.backend, self.model.manifest.rope_2d, self.model.manifest.context_length)

    def answers(self, prefix: PrefixCache, questions: Ids, visibility: Visibility) -> Ids:
        """New ids of each question, after a context that is read where it is not there."""
        prefix.fill(self.context)
        layout = build_layout(questions, self.model.manifest.rope_2d, self.context, visibility)
        writers = [Sampler(Sampling(max_new_tokens=self.new_tokens)) for _ in questions]
        columns = decode(
            self.model.backend,
            layout,
            writers,
            context_length=self.model.manifest.context_length,
            cache=prefix.cache,
            start=len(self.context),
        )
        return [list(ids) for ids in zip(*(column.tokens for column in columns), strict=True)]


def ways(asking: Asking) -> dict[str, Callable[[], tuple[float, Ids]]]:
    """Seconds and answers of each; where the document is cached, reading it is not counted for either side."""

    def timed(prefix: PrefixCache | None, groups: list[Ids], visibility: Visibility) -> tuple[float, Ids]:
        if prefix is not None:
            prefix.fill(asking.context)
        started = time.perf_counter()
        found = [asking.answers(prefix or asking.prefix(), group, visibility) for group in groups]
        return time.perf_counter() - started, [ids for group in found for ids in group]

    kept = asking.prefix()
    alone = [[question] for question in asking.questions]
    return {
        "one by one": lambda: timed(None, alone, "isolated"),
        "one by one, document cached": lambda: timed(kept, alone, "isolated"),
        "isolated columns": lambda: timed(None, [asking.questions], "isolated"),
        "isolated columns, document cached": lambda: timed(kept, [asking.questions], "isolated"),
        "columnar": lambda: timed(None, [asking.questions], "columnar"),
        "columnar, document cached": lambda: timed(kept, [asking.questions], "columnar"),
    }


@click.command()
@click.option("--base-model", default=str(ROOT / "demo" / "base"), show_default="demo/base")
@click.option("-c", "--context-tokens", type=int, default=1500, show_default=True)
@click.option("-n", "--questions", type=int, default=10, show_default=True)
@click.option("-g", "--new-tokens", type=int, default=48, show_default=True, help="Of every answer.")
@click.option("-r", "--repeats", type=int, default=3, show_default=True)
@click.option("--torch", "on_torch", is_flag=True, help="The merged model on torch instead of the ONNX graph.")
@click.option("--cache-file", is_flag=True, help="Time a new process with the document's keys and values in a file.")
@click.option("--json", "as_json", is_flag=True)
def bench(
    base_model: str,
    context_tokens: int,
    questions: int,
    new_tokens: int,
    repeats: int,
    on_torch: bool,
    cache_file: bool,
    as_json: bool,
) -> None:
    """Merge, export and time; everything is made in a temporary directory."""
    with tempfile.TemporaryDirectory() as directory:
        merged, onnx = Path(directory) / "merged", Path(directory) / "onnx"
        exporter.merge(base_model, ROOT / "examples" / "demo_adapter" / "lora.pth", merged, rope_2d_ratio=1.0)
        exporter.export(merged, onnx, no_verify=True)
        parity = 0.0 if on_torch else runtime.verify(onnx, merged).max_rel_diff
        artifact = merged if on_torch else onnx
        asking = ask(runtime.load(artifact), context_tokens, questions, new_tokens)
        if cache_file:
            show_starts(measure_starts(artifact, asking, Path(directory), repeats), as_json)
            return
        rows = measure(asking, repeats)
    if as_json:
        click.echo(json.dumps({"max_rel_diff": parity, "rows": [asdict(row) for row in rows]}, indent=2))
        return
    click.echo(f"{'way':35} {'seconds':>8} {'tokens/s':>9} {'x cached':>9} {'x uncached':>11} {'same tokens':>12}")
    for row in rows:
        click.echo(
            f"{row.way:35} {row.seconds:8.2f} {row.tokens_per_second:9.1f} {row.times_cached:9.2f} "
            f"{row.times_uncached:11.2f} {row.same_tokens:12.1%}"
        )
    click.echo(f"largest logit difference to the merged model: {parity:.1e} of the largest logit")


def ask(model: runtime.Model, context_tokens: int, questions: int, new_tokens: int) -> Asking:
    """Answers of the training data are the document, held-out questions are asked."""
    texts = [json.loads(line)["a"] for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    document = model.tokenizer("\n".join(texts)).input_ids[:context_tokens]
    lines = (DATA / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[:questions]
    asked = [f"<|im_start|>user\n{json.loads(line)['q']}<|im_end|>\n<|im_start|>assistant\n" for line in lines]
    return Asking(model, document, [model.tokenizer(text).input_ids for text in asked], new_tokens)


def measure(asking: Asking, repeats: int) -> list[Row]:
    timed = ways(asking)
    seconds: dict[str, list[float]] = {way: [] for way in timed}
    answers: dict[str, Ids] = {}
    for _ in range(repeats):
        for way, run in timed.items():
            taken, answers[way] = run()
            seconds[way].append(taken)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    made = len(asking.questions) * asking.new_tokens
    alone = [token for ids in answers["one by one"] for token in ids]
    return [
        Row(
            way=way,
            seconds=median,
            tokens_per_second=made / median,
            times_cached=medians["one by one, document cached"] / median,
            times_uncached=medians["one by one"] / median,
            same_tokens=sum(a == b for a, b in zip(alone, (t for ids in answers[way] for t in ids), strict=True))
            / made,
        )
        for way, median in medians.items()
    ]


def measure_starts(artifact: Path, asking: Asking, directory: Path, repeats: int) -> list[Start]:
    """Medians over new processes that take turns; the file is written by one of their own before."""
    document = directory / "document.txt"
    document.write_text(asking.model.tokenizer.decode(asking.context), encoding="utf-8")
    question = asking.model.tokenizer.decode(asking.questions[0])
    command = ["run", str(artifact), "--context", f"@{document}", "-p", question, "-n", "1", "--ignore-chat-template"]
    store = ["--cache-context", str(directory / "document.safetensors")]
    written = start("file written", [*command, *store])
    pairs = [(start("without a file", command), start("with the file", [*command, *store])) for _ in range(repeats)]
    return [written, *(_median(starts) for starts in zip(*pairs, strict=True))]


def start(way: str, command: list[str]) -> Start:
    """Run our command for one token; its report comes right after that."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - started
        report = json.loads(line + process.stdout.read())
    text = report["completions"][0]["text"]
    return Start(way, seconds, report["first_seconds"], report["cached_tokens"], text)


def _median(starts: Sequence[Start]) -> Start:
    """The medians of the times; the tokens must be the same."""
    assert len({(one.way, one.cached_tokens, one.token) for one in starts}) == 1
    return replace(
        starts[0],
        process_seconds=statistics.median(one.process_seconds for one in starts),
        first_seconds=statistics.median(one.first_seconds for one in starts),
    )


def show_starts(rows: list[Start], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    click.echo(f"{'new process':16} {'start to token':>15} {'loaded to token':>16} {'cached':>7} {'token':>10}")
    for row in rows:
        click.echo(
            f"{row.way:16} {row.process_seconds:13.2f} s {row.first_seconds:14.3f} s {row.cached_tokens:7d} "
            f"{row.token!r:>10}"
        )
    _, without, stored = rows
    click.echo(
        f"with the file, the first token comes {without.process_seconds / stored.process_seconds:.2f} times sooner, "
        f"once the model is loaded {without.first_seconds / stored.first_seconds:.2f} times"
    )


if __name__ == "__main__":
    bench()
