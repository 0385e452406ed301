"""Runs one model after the other on the same tokens; only the logits of the unmerged model stay in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pos2d.manifest import Manifest
from pos2d.progress import Progress
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.comparison.logits import (
    Answer,
    Distance,
    answered,
    followed,
    logits_of,
    measured,
    of_itself,
    strength_of,
    tokens_per_second,
)
from pos2d.runtime.comparison.report import Figures
from pos2d.runtime.comparison.texts import Texts, sequences_with
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.evaluation.sequences import EvalSequence
from pos2d.runtime.model.model import Model
from pos2d.runtime.opening.opened_model import OpenedModel

# Sequences on which the strength of the adapter is estimated from logits.
PROBED = 4


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """The unmerged model, before it is loaded, and the tokens on which all models are compared."""

    reference: OpenedModel
    tokenizer: Any
    path: Path
    texts: Texts
    branches: int
    new_tokens: int
    threads: int | None

    @property
    def passes(self) -> int:
        """How many sequences each model reads."""
        return len(self.texts.single) + len(self.texts.columns) + len(self.texts.prompts)

    def columns_for(self, manifest: Manifest) -> Sequence[EvalSequence]:
        """The samples side by side with the positions of a model; none if it sees other tokens in them."""
        spec, expected = manifest.rope_2d, self.reference.manifest.rope_2d
        if not self.texts.columns or spec.visibility != expected.visibility:
            return ()
        if spec == expected:
            return self.texts.columns
        return sequences_with(self.path, self.tokenizer, self.reference.manifest, spec, self.branches)[1]


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What the unmerged model computes: logits float32 ``[R, V]`` of every sequence, and its answers."""

    single: tuple[Floats, ...]
    columns: tuple[Floats, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """``steps``: logits ``[T, V]`` at every step of each answer. ``strength``: see :func:`strength_of`."""

    figures: Figures
    steps: tuple[Floats, ...] = ()
    strength: float | None = None


def load_reference(opened: OpenedModel, threads: int | None) -> Model:
    """Load the base with its adapters beside it, in float32 on the CPU."""
    from pos2d.runtime.backends.torch.unmerged import load_unmerged

    backend = load_unmerged(opened, LoadOptions(device="cpu", dtype="float32", threads=threads))
    return Model(opened.directory, opened.manifest, backend, opened.temporary)


def measure_unmerged(setting: Setting, progress: Progress) -> tuple[Figures, Expected]:
    """The figures of the unmerged model, and the logits that the others are compared with."""
    reference, texts = setting.reference, setting.texts
    model = load_reference(reference, setting.threads)
    speed = tokens_per_second(model, texts.prompts[0])
    logits: list[list[Floats]] = [[], []]
    for sequences, kept in zip((texts.single, texts.columns), logits, strict=True):
        for sequence in sequences:
            kept.append(logits_of(model, sequence))
            progress.advance()
    answers = []
    for prompt in texts.prompts:
        answers.append(answered(model, prompt, reference.manifest.rope_2d, setting.new_tokens))
        progress.advance()
    single, columns = logits
    figures = Figures(
        "unmerged",
        "base and adapter",
        "float32",
        figures_of(reference, "").bytes + adapter_bytes(reference),
        speed,
        of_itself(texts.single, single),
        of_itself(texts.columns, columns),
    )
    return figures, Expected(tuple(single), tuple(columns), tuple(answers))


def measure(
    setting: Setting,
    model: Model,
    opened: OpenedModel,
    name: str,
    expected: Expected,
    progress: Progress,
    base_logits: Sequence[Floats] = (),
) -> Measured:
    """The figures of a model, the logits of its steps, and with ``base_logits`` the strength of the adapter in it."""
    spec = opened.manifest.rope_2d
    speed = tokens_per_second(model, setting.texts.prompts[0])
    single = measured(model, setting.texts.single, expected.single, progress)
    steps = []
    for answer in expected.answers:
        steps.append(followed(model, answer, spec))
        progress.advance()
    strength = None
    if base_logits:
        strength = strength_of(base_logits, expected.single[:PROBED], first_logits(setting, model))
    columns: Distance | None = measured(model, setting.columns_for(opened.manifest), expected.columns, progress)
    return Measured(
        replace(figures_of(opened, name), tokens_per_second=speed, one_branch=single, columns=columns),
        tuple(steps),
        strength,
    )


def untrained(reference: OpenedModel) -> OpenedModel:
    """The base with the positions of the training but without its adapters."""
    assert reference.source is not None
    return replace(reference, source=replace(reference.source, adapters=()))


def first_logits(setting: Setting, model: Model) -> tuple[Floats, ...]:
    """Logits of a model for the first samples."""
    return tuple(logits_of(model, sequence) for sequence in setting.texts.single[:PROBED])


def figures_of(opened: OpenedModel, name: str) -> Figures:
    """What is known of a model before it runs."""
    manifest = opened.manifest
    recipe = manifest.recipe
    size = manifest.total_bytes
    kind: str = manifest.kind
    if opened.source is not None:  # its manifest has the weights alone
        kind = "plain"
        size += sum(file.stat().st_size for file in opened.source.sidecars.files.values())
    return Figures(name, kind, recipe.name if recipe is not None else manifest.dtype, size)


def adapter_bytes(reference: OpenedModel) -> int:
    """Bytes of the files of the adapters."""
    assert reference.source is not None
    paths = [adapter.path for adapter in reference.source.adapters]
    files = [file for path in paths for file in ([path] if path.is_file() else path.glob("*.safetensors"))]
    return sum(file.stat().st_size for file in files)
