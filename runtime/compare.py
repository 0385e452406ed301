"""Compare artifacts with the base and the adapter that they were made from, and say where they went wrong."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pos2d.errors import InputError, OutputError, UsageError
from pos2d.options import read_options, takes_options
from pos2d.progress import Progress
from pos2d.runtime.backends.options import LoadDtype, LoadOptions
from pos2d.runtime.comparison.files import FileEvidence, compare_files
from pos2d.runtime.comparison.logits import kl_by_step, parting
from pos2d.runtime.comparison.measuring import (
    Expected,
    Measured,
    Setting,
    figures_of,
    first_logits,
    measure,
    measure_unmerged,
    untrained,
)
from pos2d.runtime.comparison.opening import open_artifact
from pos2d.runtime.comparison.positions import compare_positions, compare_sizes
from pos2d.runtime.comparison.report import ArtifactReport, CompareReport, Figures, strengths
from pos2d.runtime.comparison.texts import check_room, default_text, read_texts
from pos2d.runtime.comparison.verdict import Evidence, judge
from pos2d.runtime.comparison.weights import weigh
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.load import load_opened
from pos2d.runtime.model.model import Model
from pos2d.runtime.opening.opened_model import OpenedModel, TemporaryFolder, open_model
from pos2d.runtime.text.tokenization import load_tokenizer
from pos2d.sources.base_options import BaseOptions
from pos2d.sources.positions import TrainedPositions
from pos2d.threads import ThreadOptions

SUFFIX = ".svg"
# A text is likelier if its perplexity is below this part of another.
LIKELIER = 0.95
DEFAULT = "twelve questions with short answers"


@takes_options(BaseOptions, TrainedPositions, ThreadOptions)
def compare(
    artifacts: str | Path | Sequence[str | Path],
    *,
    text: str | Path | None = None,
    prompt: str | Sequence[str] = (),
    branches: int = 4,
    max_new_tokens: int = 64,
    plot: str | Path | None = None,
    **options: Any,
) -> CompareReport:
    """Compare ``artifacts`` with ``base_model`` and the unmerged adapters of ``lora``, and say where they went wrong.

    The unmerged model computes ``y = W x + scale * B (A x)`` in float32 with the positions of the training. An artifact
    is any that pos2d runs, or a plain model that another tool merged. Models run one after the other on the CPU:
    graphs and quantised weights in their own type, all others in float32. So the distances are those of the weights.

    Args:
        artifacts: directories, or ids of plain models on the Hub.
        text: as of :func:`pos2d.evaluate`; without it, twelve questions with short answers.
        prompt: prompts for the greedy answers; without it, the first turns of the first samples.
        branches: how many samples stand side by side; 1 compares one branch only.
        max_new_tokens: the length of the greedy answers.
        plot: an SVG file of the KL at every step of these answers, which is replaced if it exists.

    Raises:
        UsageError: no adapter, a value out of range, or an artifact that another engine runs.
        InputError: a model or a text that cannot be read.
        OutputError: ``plot`` is no name of an SVG file in an existing directory.
    """
    listed = [artifacts] if isinstance(artifacts, str | Path) else list(artifacts)
    base, positions, threads = read_options(options, BaseOptions, TrainedPositions, ThreadOptions)
    _check(listed, base, max_new_tokens)
    picture = _checked_plot(plot)
    reference, plain = open_model(None, base, positions), _base_alone(base)
    opened = [open_artifact(path) for path in listed]
    folder = TemporaryFolder()
    path = default_text(folder.path) if text is None else Path(text)
    tokenizer = load_tokenizer(reference.directory)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    texts = read_texts(path, DEFAULT if text is None else str(text), tokenizer, reference.manifest, branches, prompts)
    check_room(texts, reference.manifest, max_new_tokens)
    setting = Setting(reference, tokenizer, path, texts, branches, max_new_tokens, threads.threads)
    candidates = [_candidate(setting, str(place), artifact) for place, artifact in zip(listed, opened, strict=True)]
    report = _run(setting, plain, candidates)
    if picture is not None:
        from pos2d.runtime.comparison.svg import draw_steps

        picture.write_text(draw_steps(report), encoding="utf-8")
        report = replace(report, plot=str(picture))
    return report


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """An artifact, and what its files say before it runs."""

    name: str
    opened: OpenedModel
    files: FileEvidence
    sizes: str
    positions: str

    @property
    def is_graph(self) -> bool:
        return self.opened.manifest.kind == "onnx"


def _candidate(setting: Setting, name: str, opened: OpenedModel) -> Candidate:
    """Compare the files of an artifact.

    Raises:
        InputError: it has fewer positions than the text needs.
    """
    sizes = compare_sizes(setting.reference, opened)
    length = opened.manifest.context_length
    if not sizes and length < setting.texts.longest:
        raise InputError(
            f"{name} has {length} positions, and the longest sequence of the text takes {setting.texts.longest}; give "
            "a `text` of shorter samples"
        )
    positions = "" if sizes else compare_positions(setting.reference, opened)
    return Candidate(name, opened, compare_files(setting.reference, opened), sizes, positions)


def _run(setting: Setting, plain: OpenedModel, candidates: Sequence[Candidate]) -> CompareReport:
    """Run the unmerged model, the base and every artifact, one after the other."""
    running = [candidate for candidate in candidates if not candidate.sizes]
    with Progress("comparing", setting.passes * (2 + len(running)), long=True) as progress:
        unmerged, expected = measure_unmerged(setting, progress)
        base = _base_figures(setting, plain, expected, progress)
        has_graphs = any(candidate.is_graph for candidate in running)
        start = first_logits(setting, _load(untrained(setting.reference), setting.threads)) if has_graphs else ()
        artifacts = [_report(setting, candidate, expected, unmerged, base, start, progress) for candidate in candidates]
    decode = setting.tokenizer.decode
    return CompareReport(
        text=setting.texts.name,
        branches=setting.branches,
        base=base,
        unmerged=unmerged,
        artifacts=tuple(artifacts),
        prompts=tuple(decode(list(ids)) for ids in setting.texts.prompts),
        answers=tuple(decode(list(answer.tokens)) for answer in expected.answers),
        warnings=setting.reference.warnings,
        notes=setting.reference.notes,
    )


def _report(
    setting: Setting,
    candidate: Candidate,
    expected: Expected,
    unmerged: Figures,
    base: Figures,
    start: Sequence[Floats],
    progress: Progress,
) -> ArtifactReport:
    opened = candidate.opened
    result, weights = Measured(figures_of(opened, candidate.name)), None
    if not candidate.sizes:
        model = _load(opened, setting.threads)
        logits = start if candidate.is_graph else ()
        result = measure(setting, model, opened, candidate.name, expected, progress, logits)
        del model
    if not candidate.sizes and not candidate.is_graph:
        assert setting.reference.source is not None
        weights = weigh(setting.reference.source, opened)
    evidence = Evidence(
        opened.manifest,
        setting.reference.manifest,
        candidate.files,
        candidate.sizes,
        candidate.positions,
        weights,
        result.strength,
        _doubt(unmerged, result.figures),
    )
    partings = [
        parting(number, answer, logits, setting.tokenizer)
        for number, (answer, logits) in enumerate(zip(expected.answers, result.steps, strict=False), 1)
    ]
    return ArtifactReport(
        figures=result.figures,
        verdict=judge(evidence, result.figures.one_branch, base.one_branch, result.figures.bytes, base.bytes),
        files=candidate.files,
        positions=candidate.positions,
        sizes=candidate.sizes,
        adapted=strengths(weights),
        logit_strength=result.strength,
        partings=tuple(found for found in partings if found is not None),
        kl_by_step=kl_by_step(expected.answers, result.steps) if result.steps else (),
    )


def _doubt(unmerged: Figures, artifact: Figures) -> str:
    """Why the positions of the artifact may be those of the training: with them, the text is likelier."""
    pairs = [(unmerged.columns, artifact.columns), (unmerged.one_branch, artifact.one_branch)]
    for expected, found in pairs:
        if expected is not None and found is not None:
            if found.perplexity > LIKELIER * expected.perplexity:
                return ""
            return (
                f"but the text is likelier with those of the artifact (perplexity {found.perplexity:.4g}, and "
                f"{expected.perplexity:.4g} with those that were given), so check the flags of this call too"
            )
    return ""


def _base_figures(setting: Setting, plain: OpenedModel, expected: Expected, progress: Progress) -> Figures:
    """The figures of the base, which may lack tokens that an adapter added."""
    largest = max(int(sequence.layout.ids.max()) for sequence in (*setting.texts.single, *setting.texts.columns))
    written = max(max(answer.tokens) for answer in expected.answers)
    if max(largest, written) >= plain.manifest.vocab_size:
        return figures_of(plain, "base")
    return measure(setting, _load(plain, setting.threads), plain, "base", expected, progress).figures


def _load(opened: OpenedModel, threads: int | None) -> Model:
    """Load a model on the CPU: in float32, or in its own type if it is a graph or quantised."""
    is_float = opened.manifest.kind != "onnx" and opened.manifest.quant is None
    dtype: LoadDtype = "float32" if is_float else "auto"
    return load_opened(opened, LoadOptions(device="cpu", dtype=dtype, threads=threads))


def _base_alone(base: BaseOptions) -> OpenedModel:
    """The base without adapters, as an ordinary model."""
    return open_model(
        None, BaseOptions(base_model=base.base_model, revision=base.revision), TrainedPositions(no_patch_rope=True)
    )


def _check(artifacts: Sequence[str | Path], base: BaseOptions, max_new_tokens: int) -> None:
    """Check what no other place checks.

    Raises:
        UsageError: no artifact, no base or no adapter, or a number out of range.
    """
    if not artifacts:
        raise UsageError("give at least one artifact to compare")
    if base.base_model is None or not base.lora:
        raise UsageError(
            "give `base_model` and `lora`, from which the artifact was made; `pos2d eval` compares two artifacts"
        )
    if max_new_tokens < 1:
        raise UsageError(f"`max_new_tokens` {max_new_tokens} must be at least 1")


def _checked_plot(plot: str | Path | None) -> Path | None:
    """The file of the picture, if any.

    Raises:
        OutputError: it does not end in .svg, is a directory, or is in a directory that does not exist.
    """
    if plot is None:
        return None
    path = Path(plot)
    if path.suffix.lower() != SUFFIX:
        raise OutputError(f"{path} does not end in {SUFFIX}; only SVG is written")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OutputError(f"{path} cannot be written: give the name of a file in a directory that exists")
    return path
