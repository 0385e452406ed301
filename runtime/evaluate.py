"""Perplexity of an artifact on a text, and its KL and top-1 agreement with a reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pos2d.errors import InputError
from pos2d.layout import Ints
from pos2d.options import read_options, takes_options
from pos2d.progress import Progress
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.engine.backend import Floats
from pos2d.runtime.engine.decode import forward_slots
from pos2d.runtime.evaluation.parity import Doubles, check_same_model, kl_divergence, log_softmax
from pos2d.runtime.evaluation.sequences import EvalSequence, read_sequences
from pos2d.runtime.load import load_opened
from pos2d.runtime.model.model import Model
from pos2d.runtime.opening.opened_model import open_model
from pos2d.runtime.text.tokenization import load_tokenizer
from pos2d.spec import Visibility

# Logits of one model in memory at a time: 32 MB, and twice that for every float64 array that is made from them.
MAX_LOGITS = 2**23


@dataclass(frozen=True, slots=True)
class CaseFigures:
    """Figures over ``tokens`` predicted tokens; ``tokens_read`` also counts contexts and prompts.

    ``nll`` is the mean negative log-likelihood in nats per token, ``perplexity`` its exponential. With a reference:
    its perplexity, ``nll_change`` (artifact minus reference), ``mean_kl`` (KL(reference || artifact) in nats per
    token), and the share of the tokens for which both have the same top token.

    Errors are standard errors over sequences, because tokens of one sequence are not independent; they are absent if
    there is only one sequence. The error of the change is that of paired differences, so it is smaller than those of
    the perplexities.
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
    """The figures of single branches, then those of columns; ``columns_skipped`` says why there are none."""

    text: str
    visibility: Visibility
    cases: tuple[CaseFigures, ...]
    columns_skipped: str | None


@takes_options(LoadOptions)
def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    branches: int = 4,
    **loading: Any,
) -> EvalReport:
    """Measure the perplexity of ``model`` on the samples of a file, and its distance from ``against``.

    Samples are evaluated as one sequence each, and then ``branches`` side by side with the artifact's visibility; 1
    leaves the latter out. :func:`pos2d.runtime.evaluation.sequences.read_sequences` says what is cut and left out.

    ``text`` is JSONL or paragraphs, in the forms that :mod:`pos2d.text_samples` names. In a conversation the last turn
    is predicted, formatted with the chat template; in other texts all tokens but the first are. At most 10,000 tokens
    of the file and 512 of a sample are read.

    ``loading`` are the options of :func:`pos2d.load` for ``model``; ``against`` runs on the CPU in float32.

    Raises:
        UsageError: ``branches`` is out of range, or the artifact cannot use an option.
        InputError: an artifact or a text that cannot be read, artifacts that are not the same model, a text with no
            token to predict or with one outside the vocabulary, logits that are not finite.
    """
    (options,) = read_options(loading, LoadOptions)
    path = Path(text)
    opened = open_model(model)
    reference = None if against is None else open_model(against)
    if reference is not None:
        check_same_model(opened, reference)
    manifest = opened.manifest
    single, grouped = read_sequences(path, load_tokenizer(opened.directory), manifest, branches)
    cases, skipped = {"one branch": single}, None
    if grouped and branches > 1:
        cases[f"{branches} columns"] = grouped
    elif branches > 1:
        skipped = f"{path} has fewer than {branches} neighbouring samples with the same context"
    models = [load_opened(opened, options)]
    if reference is not None:
        models.append(load_opened(reference, LoadOptions(device="cpu", dtype="float32")))
    with Progress("evaluating", sum(map(len, cases.values()))) as progress:
        figures = tuple(_figures(name, sequences, models, progress) for name, sequences in cases.items())
    return EvalReport(str(path), manifest.rope_2d.visibility, figures, skipped)


def _figures(name: str, sequences: Sequence[EvalSequence], models: Sequence[Model], progress: Progress) -> CaseFigures:
    """The figures of one case; ``models`` are the artifact and, if there is one, the reference.

    Raises:
        InputError: logits that are not finite.
    """
    scores = []
    for sequence in sequences:
        with np.errstate(invalid="ignore"):  # infinite logits are refused below
            scores.append(_score(sequence, models))
        progress.advance()
    nll, reference_nll, kl, same_top = np.stack(scores, axis=1)
    for model, sums in zip(models, (nll, reference_nll), strict=False):
        if not np.isfinite(sums).all():
            raise InputError(f"{model.path} gives logits that are not finite for this text; make it again")
    counts = np.array([len(sequence.targets) for sequence in sequences], dtype=np.float64)
    mean, error = _mean(nll, counts)
    distances: dict[str, float | None] = {}
    if len(models) > 1:
        reference = _perplexity(*_mean(reference_nll, counts))
        distances["reference_perplexity"], distances["reference_perplexity_error"] = reference
        distances["nll_change"], distances["nll_change_error"] = _mean(nll - reference_nll, counts)
        distances["mean_kl"], distances["mean_kl_error"] = _mean(kl, counts)
        distances["top1_agreement"] = float(same_top.sum() / counts.sum())
    perplexity, perplexity_error = _perplexity(mean, error)
    return CaseFigures(
        name=name,
        sequences=len(sequences),
        samples=sum(sequence.samples for sequence in sequences),
        tokens=int(counts.sum()),
        tokens_read=sum(len(sequence.layout) for sequence in sequences),
        nll=mean,
        nll_error=error,
        perplexity=perplexity,
        perplexity_error=perplexity_error,
        **distances,
    )


def _score(sequence: EvalSequence, models: Sequence[Model]) -> Doubles:
    """Sums over the predicted tokens of a sequence, float64 ``[4]`` as :func:`_sums`; it is read in chunks."""
    length = len(sequence.layout)
    caches = [model.backend.new_cache(length) for model in models]
    chunk = max(1, min(models[0].backend.prefill_chunk, MAX_LOGITS // models[0].manifest.vocab_size))
    sums = np.zeros(4)
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        in_chunk = (sequence.rows >= start) & (sequence.rows < stop)
        rows = sequence.rows[in_chunk] - start
        # A chunk that predicts nothing still has to go into the cache, and a pass has logits of at least one token.
        logits_rows = rows if rows.size else np.array([0])
        logits = [
            forward_slots(model.backend, sequence.layout, start, stop, cache, logits_rows)
            for model, cache in zip(models, caches, strict=True)
        ]
        if rows.size:
            sums += _sums(logits, sequence.targets[in_chunk])
    return sums


def _sums(logits: Sequence[Floats], targets: Ints) -> Doubles:
    """Sums over tokens, float64 ``[4]``, from logits ``[R, V]`` of the artifact and, if there is one, the reference.

    They are the negative log-likelihoods of the artifact and of the reference, KL(reference || artifact), and the
    number of equal top tokens; without a reference the last three are 0.
    """
    each = np.arange(len(targets))
    actual = log_softmax(logits[0])
    nll = -actual[each, targets].sum()
    if len(logits) == 1:
        return np.array([nll, 0.0, 0.0, 0.0])
    expected = log_softmax(logits[1])
    same_top = (logits[0].argmax(-1) == logits[1].argmax(-1)).sum()
    return np.array([nll, -expected[each, targets].sum(), kl_divergence(expected, actual).sum(), same_top])


def _mean(sums: Doubles, counts: Doubles) -> tuple[float, float | None]:
    """Mean per token, and its standard error with sequences as the sampling units.

    ``sums`` and ``counts`` ``[N]`` are each sequence's sum and number of tokens.
    """
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return mean, None
    spread = ((sums - mean * counts) ** 2).sum() * len(sums) / (len(sums) - 1)
    return mean, float(spread**0.5 / counts.sum())


def _perplexity(nll: float, error: float | None) -> tuple[float, float | None]:
    perplexity = float(np.exp(nll))
    return perplexity, None if error is None else perplexity * error
