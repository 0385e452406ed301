"""How well an artifact reads a text, and how far it is from a reference: perplexity, KL and top token."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np

from pos2d.errors import InputError
from pos2d.layout import Ints
from pos2d.manifest import read_manifest
from pos2d.progress import Progress
from pos2d.runtime.backends.options import LoadFlags
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.engine.decode import forward_slots
from pos2d.runtime.evaluation.parity import Doubles, check_same_model, kl_divergence, log_softmax
from pos2d.runtime.evaluation.sequences import Reading, read_text
from pos2d.runtime.load import load
from pos2d.runtime.model.model import Model
from pos2d.runtime.text.tokenization import load_tokenizer
from pos2d.spec import Visibility

# Logits of one model at once: 32 MB, and twice that for every float64 array that is made of them.
LOGITS = 2**23
TABLE_HEAD = ("", "samples", "tokens read", "predicted", "perplexity", "reference", "nll change", "KL", "top-1")


@dataclass(frozen=True, slots=True)
class CaseFigures:
    """One way of reading: ``tokens`` were predicted, ``tokens_read`` are those and all that stands before them.

    ``nll`` is the mean negative log-likelihood in nats a token, ``perplexity`` its exponential. Against a reference:
    its perplexity, ``nll_change`` (artifact less reference), ``mean_kl`` (KL(reference || artifact) in nats a token),
    and the share of the tokens for which both have the same first choice.

    The errors are standard errors over sequences, because tokens of one are not independent; absent where there is one
    sequence only. That of the change is of paired differences, so it is smaller than those of the perplexities.
    """

    name: str
    sequences: int
    samples: int
    tokens: int
    tokens_read: int
    nll: float
    nll_error: float | None
    perplexity: float
    perplexity_error: float | None
    reference_perplexity: float | None = None
    reference_perplexity_error: float | None = None
    nll_change: float | None = None
    nll_change_error: float | None = None
    mean_kl: float | None = None
    mean_kl_error: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True, slots=True)
class EvalReport:
    """One branch, then columns, or in ``columns_skipped`` why there are none."""

    text: str
    visibility: Visibility
    cases: tuple[CaseFigures, ...]
    columns_skipped: str | None

    def lines(self) -> list[str]:
        """A table for people."""
        rows = [TABLE_HEAD, *map(_row, self.cases)]
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=False)]  # without a reference the rows are short
        table = ["  ".join(map(str.rjust, row, widths)) for row in rows]
        skipped = [f"columns: skipped, {self.columns_skipped}"] if self.columns_skipped else []
        return [f"{self.text}, {self.visibility}", *table, *skipped]


def evaluate(
    artifact: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    branches: int = 4,
    **loading: Unpack[LoadFlags],
) -> EvalReport:
    """Perplexity of ``artifact`` on the samples of a file, and its distance from ``against``.

    The samples are read one after the other, each as a sequence of its own, and then ``branches`` side by side, in the
    artifact's visibility (1 leaves that out); :func:`pos2d.runtime.evaluation.sequences.read_text` says what is cut
    and left out.

    ``text`` is JSONL or paragraphs, in the forms that :mod:`pos2d.text_samples` names. Of a conversation the last turn
    is
    predicted, through the chat template; of other texts all but the first token. No more than the first 10,000 tokens
    are read, and 512 of a sample.

    ``loading`` are the flags of :func:`pos2d.load` for ``artifact``; ``against`` is on the CPU in float32.

    Raises:
        UsageError: ``branches`` out of range, or a flag that the artifact cannot use.
        InputError: an artifact or a text that cannot be read, artifacts that are not the same model, a text with no
            token to predict or one that the model does not have, logits that are not finite.
    """
    directory, path = Path(artifact), Path(text)
    if against is not None:
        check_same_model(directory, Path(against))
    manifest = read_manifest(directory)
    alone, side_by_side = read_text(path, load_tokenizer(directory), manifest, branches)
    cases, skipped = {"one branch": alone}, None
    if side_by_side and branches > 1:
        cases[f"{branches} columns"] = side_by_side
    elif branches > 1:
        skipped = f"{path} has fewer than {branches} samples to stand side by side"
    models = [load(artifact, **loading)]
    if against is not None:
        models.append(load(against, device="cpu", dtype="float32"))
    with Progress("evaluating", sum(map(len, cases.values()))) as progress:
        figures = tuple(_figures(name, readings, models, progress) for name, readings in cases.items())
    return EvalReport(str(path), manifest.rope_2d.visibility, figures, skipped)


def _figures(name: str, readings: Sequence[Reading], models: Sequence[Model], progress: Progress) -> CaseFigures:
    scores = []
    for reading in readings:
        with np.errstate(invalid="ignore"):  # infinite logits; refused below
            scores.append(_score(reading, models))
        progress.advance()
    nll, other, kl, same = np.stack(scores, axis=1)
    for model, likelihoods in zip(models, (nll, other), strict=False):
        if not np.isfinite(likelihoods).all():
            raise InputError(f"{model.path} gives logits that are not finite for this text; make it again")
    counts = np.array([len(reading.targets) for reading in readings], dtype=np.float64)
    mean, error = _mean(nll, counts)
    facts: dict[str, float | None] = {}
    if len(models) > 1:
        facts["reference_perplexity"], facts["reference_perplexity_error"] = _perplexity(*_mean(other, counts))
        facts["nll_change"], facts["nll_change_error"] = _mean(nll - other, counts)
        facts["mean_kl"], facts["mean_kl_error"] = _mean(kl, counts)
        facts["top1_agreement"] = float(same.sum() / counts.sum())
    perplexity, perplexity_error = _perplexity(mean, error)
    return CaseFigures(
        name=name,
        sequences=len(readings),
        samples=sum(reading.samples for reading in readings),
        tokens=int(counts.sum()),
        tokens_read=sum(len(reading.layout) for reading in readings),
        nll=mean,
        nll_error=error,
        perplexity=perplexity,
        perplexity_error=perplexity_error,
        **facts,
    )


def _score(reading: Reading, models: Sequence[Model]) -> Doubles:
    """Sums over the predicted tokens of a sequence, read in pieces: see :func:`_sums`."""
    caches = [model.backend.new_cache(len(reading.layout)) for model in models]
    piece = max(1, min(models[0].backend.piece, LOGITS // models[0].manifest.vocab_size))
    sums = np.zeros(4)
    for start in range(0, len(reading.layout), piece):
        stop = min(start + piece, len(reading.layout))
        here = (reading.rows >= start) & (reading.rows < stop)
        rows = reading.rows[here] - start
        # A piece that predicts nothing goes into the cache all the same.
        asked = rows if rows.size else np.array([0])
        logits = [
            forward_slots(model.backend, reading.layout, start, stop, cache, asked)
            for model, cache in zip(models, caches, strict=True)
        ]
        if rows.size:
            sums += _sums(logits, reading.targets[here])
    return sums


def _sums(logits: Sequence[Floats], targets: Ints) -> Doubles:
    """Of logits ``[R, V]`` of the artifact and perhaps of its reference, float64 ``[4]``: negative log-likelihood of
    both, KL(reference || artifact), and equal first choices; without a reference the last three are 0."""
    each = np.arange(len(targets))
    found = log_softmax(logits[0])
    likelihood = -found[each, targets].sum()
    if len(logits) == 1:
        return np.array([likelihood, 0.0, 0.0, 0.0])
    expected = log_softmax(logits[1])
    same = (logits[0].argmax(-1) == logits[1].argmax(-1)).sum()
    return np.array([likelihood, -expected[each, targets].sum(), kl_divergence(expected, found).sum(), same])


def _mean(sums: Doubles, counts: Doubles) -> tuple[float, float | None]:
    """Mean a token of ``sums`` over sequences of ``counts`` tokens, and its standard error, the sequences drawn."""
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return mean, None
    spread = ((sums - mean * counts) ** 2).sum() * len(sums) / (len(sums) - 1)
    return mean, float(spread**0.5 / counts.sum())


def _perplexity(nll: float, error: float | None) -> tuple[float, float | None]:
    perplexity = float(np.exp(nll))
    return perplexity, None if error is None else perplexity * error


def _row(case: CaseFigures) -> tuple[str, ...]:
    counts = map(str, (case.samples, case.tokens_read, case.tokens))
    row = (case.name, *counts, _shown(case.perplexity, case.perplexity_error, ".4g"))
    if case.top1_agreement is None:
        return row
    return (
        *row,
        _shown(case.reference_perplexity, case.reference_perplexity_error, ".4g"),
        _shown(case.nll_change, case.nll_change_error, "+.2g"),
        _shown(case.mean_kl, case.mean_kl_error, ".2g"),
        f"{case.top1_agreement:.1%}",
    )


def _shown(value: float | None, error: float | None, form: str) -> str:
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:.1g}"
