"""Describe what is at a path, an adapter, a base or an artifact, and say whether an adapter fits a base."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pos2d.errors import InputError, UsageError
from pos2d.exporter.inspection.adapter_facts import AdapterFacts, mlx_facts, peft_facts, trainer_facts
from pos2d.exporter.inspection.guess import guess_positions
from pos2d.exporter.inspection.model_facts import ArtifactFacts, BaseFacts, artifact_facts, base_facts
from pos2d.exporter.inspection.ranking import Guess
from pos2d.exporter.inspection.samples import read_samples
from pos2d.hf.tokenizer import load_tokenizer
from pos2d.manifest import FILE_NAME
from pos2d.options import takes_options
from pos2d.sources.adapters import Adapter, read_adapters
from pos2d.sources.adapters.location import is_hub_id, locate
from pos2d.sources.adapters.peft_files import ADAPTER_CONFIG
from pos2d.sources.checkpoints.base import read_base
from pos2d.sources.checkpoints.checkpoint import Checkpoint
from pos2d.sources.checkpoints.location import split_revision
from pos2d.sources.checkpoints.weight_files import CONFIG
from pos2d.sources.files.hub import hub_errors
from pos2d.sources.files.parallel import limited_threads
from pos2d.threads import ThreadOptions

DESCRIPTIONS = {
    "trainer": "LoRA of the trainer",
    "state dict": "full state of the trainer",
    "peft": "PEFT LoRA",
    "mlx": "MLX LoRA",
    "base": "base model",
    "artifact": "artifact of this tool",
}

FACTS = {"trainer": trainer_facts, "peft": peft_facts, "mlx": mlx_facts}


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether an adapter fits ``base``; ``reason`` is the message with which ``merge`` would refuse it."""

    base: str
    fits: bool
    reason: str | None


@dataclass(frozen=True, slots=True)
class InspectReport:
    """Facts about ``path``: exactly one of ``adapter``, ``base`` and ``artifact``.

    ``what`` describes it in words. ``fit`` is present if a base was given, ``guess`` with ``guess_ratio``.
    """

    path: str
    what: str
    adapter: AdapterFacts | None = None
    base: BaseFacts | None = None
    artifact: ArtifactFacts | None = None
    fit: Fit | None = None
    guess: Guess | None = None

    def raise_if_misfit(self) -> None:
        """Fail if the adapter does not fit the base that was given.

        Raises:
            InputError: with the message of ``merge``.
        """
        if self.fit is not None and self.fit.reason is not None:
            raise InputError(self.fit.reason)


@takes_options(ThreadOptions)
def inspect(
    path: str | Path,
    *,
    base_model: str | Path | None = None,
    revision: str | None = None,
    guess_ratio: bool = False,
    text: str | Path | None = None,
    **options: Any,
) -> InspectReport:
    """Describe ``path`` from configuration, headers and small tensors; no code in it is run and nothing is written.

    Args:
        path: the trainer's ``.pth`` or a directory with one, a PEFT or MLX directory, the id of an adapter on the Hub
            as ``ORG/NAME@REVISION``, a base or an artifact.
        base_model: say whether the adapter fits this base.
        revision: commit, tag or branch of a base from the Hub.
        guess_ratio: find the positions of the training by scoring ``text``: ratio and stride, or ordinary ones. This
            loads the base in float32, and takes at most about two minutes.
        text: a file like the training data, in one of the forms that :mod:`pos2d.text_samples` lists.
        options: fields of :class:`pos2d.threads.ThreadOptions`, for ``guess_ratio``.

    Raises:
        UsageError: a parameter without another one, or for another kind of path, than it needs.
        InputError: ``path`` is none of these or is damaged; with ``guess_ratio``, an adapter that does not fit.
        UnsafeInputError: a file that would run code.
    """
    given, path, threads = path, Path(path), ThreadOptions(**options).threads
    _check_parameters(base_model, revision, guess_ratio, text)
    kind = _kind(path)
    if kind != "adapter" and base_model is not None:
        raise UsageError(f"{path} is not an adapter, so there is nothing to compare with `base_model`; leave it out")
    if kind == "artifact":
        return InspectReport(str(path), DESCRIPTIONS[kind], artifact=artifact_facts(path))
    if kind == "base":
        return InspectReport(str(path), DESCRIPTIONS[kind], base=base_facts(read_base(str(path))))
    location = locate(given)
    facts = FACTS[location.form](location.path)
    report = InspectReport(str(path), DESCRIPTIONS[facts.form], adapter=facts)
    if base_model is None:
        return report
    try:
        base, adapters = _read_both(location.path, base_model, revision)
    except InputError as misfit:
        if guess_ratio:
            raise
        return replace(report, fit=Fit(str(base_model), False, str(misfit)))
    with limited_threads(threads):
        guess = _guess(base, adapters, text) if text is not None else None
    return replace(report, fit=Fit(str(base_model), True, None), guess=guess)


def _check_parameters(base_model: object, revision: object, guess_ratio: bool, text: object) -> None:
    if guess_ratio and base_model is None:
        raise UsageError("`guess_ratio=True` scores a text with the adapter on its base; give `base_model`")
    if guess_ratio and text is None:
        raise UsageError("`guess_ratio=True` needs a text like the training data, a few dozen lines of it; give `text`")
    if text is not None and not guess_ratio:
        raise UsageError("`text` is used with `guess_ratio=True` only; give both")
    if revision is not None and base_model is None:
        raise UsageError("`revision` is that of a base from the Hub; give `base_model`")


def _kind(path: Path) -> str:
    """``artifact``, ``adapter`` or ``base``, by the files that are there."""
    if path.is_file():
        if path.suffix in (".safetensors", ".onnx", ".json") and not (path.parent / ADAPTER_CONFIG).is_file():
            raise InputError(f"{path} is one file of a model or adapter; give its directory")
        return "adapter"
    if not path.is_dir() and is_hub_id(str(path).partition("@")[0]):
        return _kind_on_hub(str(path))
    if not path.is_dir():
        raise InputError(f"{path} does not exist; give an adapter, a base model's directory or an artifact")
    for name, kind in ((FILE_NAME, "artifact"), (ADAPTER_CONFIG, "adapter"), (CONFIG, "base")):
        if (path / name).is_file():
            return kind
    if any(path.iterdir()):
        return "adapter"
    raise InputError(
        f"{path} is nothing that this tool knows: it has no {FILE_NAME} (an artifact), no {ADAPTER_CONFIG} (PEFT), no "
        "config.json (a base model) and no .pth file (the trainer's LoRA)"
    )


def _kind_on_hub(name: str) -> str:
    """Whether a repository of the Hub has a model (``base``, for an artifact too) or an adapter, by its configurations.

    Raises:
        InputError: it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    hub_id, revision = split_revision(name)
    with hub_errors(hub_id, revision, "a path here nor a model or adapter"):
        found = Path(snapshot_download(hub_id, revision=revision, allow_patterns=[ADAPTER_CONFIG, CONFIG, FILE_NAME]))
    is_model = (found / CONFIG).is_file() or (found / FILE_NAME).is_file()
    return "base" if is_model and not (found / ADAPTER_CONFIG).is_file() else "adapter"


def _read_both(path: Path, base_model: str | Path, revision: str | None) -> tuple[Checkpoint, list[Adapter]]:
    base = read_base(base_model, revision=revision)
    return base, read_adapters([path], base)


def _guess(base: Checkpoint, adapters: list[Adapter], text: str | Path) -> Guess:
    samples = read_samples(Path(text), load_tokenizer(base.directory))
    return guess_positions(base, adapters, samples)
