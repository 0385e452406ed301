"""The text form of what ``inspect`` returns: lines of a label and a value, and the table of a guess."""

from collections.abc import Iterable, Mapping
from typing import Any

from pos2d.commands.shared.tables import table
from pos2d.exporter.inspect import Fit, InspectReport
from pos2d.exporter.inspection.adapter_facts import AdapterFacts, ModuleKind
from pos2d.exporter.inspection.known_bases import KNOWN_BASES
from pos2d.exporter.inspection.model_facts import ArtifactFacts, BaseFacts
from pos2d.exporter.inspection.ranking import Guess, Learnt, Score, merge_flags
from pos2d.sources.adapters.adapter import first_names
from pos2d.sources.positions import TRAINER_FORMS
from pos2d.spec import spans
from pos2d.units import size_text

Row = tuple[str, str]
MOST_SCORES = 20
# Longer lists of numbers, such as one for each rotary frequency, are shown by their range.
MOST_NUMBERS = 8


def inspect_text(report: InspectReport) -> str:
    """Aligned lines without colour, the path first."""
    rows: list[Row] = [("what", report.what)]
    if report.base:
        rows += _base(report.base)
    if report.artifact:
        rows += _artifact(report.artifact)
    if report.adapter:
        rows += _adapter(report.adapter)
        if report.adapter.form not in TRAINER_FORMS:
            rows.append(("positions", "read as ordinary, without 2D RoPE, unless --rope-2d-ratio is given"))
        elif report.guess is None:
            rows.append(("not in it", "ratio, stride and alignment of the training; --guess-ratio finds the first two"))
    if report.fit:
        rows += _fit(report.fit)
    lines = [report.path, *aligned(rows)]
    return "\n".join(
        [*lines, "", *guess_lines(report.guess, report.adapter.form)] if report.guess and report.adapter else lines
    )


def aligned(rows: Iterable[Row]) -> list[str]:
    """Lines with all labels in one column; a label that repeats is left out."""
    rows = list(rows)
    width = max(len(label) for label, _ in rows)
    shown = [("" if n and rows[n - 1][0] == label else label, text) for n, (label, text) in enumerate(rows)]
    return [f"  {label.ljust(width)}  {text}".rstrip() for label, text in shown]


def _adapter(facts: AdapterFacts) -> Iterable[Row]:
    yield "file", f"{facts.file}, {size_text(facts.bytes)}, {facts.parameters:,} parameters, {types(facts.dtypes)}"
    if facts.sha256:
        yield "sha256", facts.sha256
    if facts.ranks:
        scales = "" if facts.scales == (1.0,) else f"{listed(f'{scale:g}' for scale in facts.scales)} * "
        yield "rank", f"{listed(facts.ranks)}, delta = {scales}B @ A"
    for name, modules in facts.modules.items():
        yield "modules", f"{name} {listed(modules.shapes)} in {_layers(modules, facts.layers)}"
    if facts.other_modules:
        yield "modules", f"{first_names(list(facts.other_modules))}, outside the layers"
    for key, value in facts.settings.items():
        yield "settings", f"{key} {listed(value) if isinstance(value, list) else value}"
    if facts.untrained:
        yield "untrained", f"B is zero, so nothing changes: {first_names(list(facts.untrained))}"
    if facts.not_finite:
        yield "not finite", f"NaN or infinite values, the training diverged: {first_names(list(facts.not_finite))}"
    for name in facts.fits:
        yield "fits", f"{name}, by its shapes"
    if not facts.fits:
        yield "fits", f"none of the {len(KNOWN_BASES)} well-known sizes; --base-model tries any other"


def _layers(modules: ModuleKind, layers: int) -> str:
    if not modules.missing_layers:
        return f"all {layers} layers"
    return (
        f"{modules.layers} of {layers} layers, not in {first_names([str(layer) for layer in modules.missing_layers])}"
    )


def _base(facts: BaseFacts) -> Iterable[Row]:
    shards = f"{facts.shards} file{'s' if facts.shards > 1 else ''}"
    yield "family", f"{facts.family}, {facts.parameters:,} parameters"
    yield "weights", f"{size_text(facts.bytes)} in {shards}, {types(facts.dtypes)}"
    yield "layers", f"{facts.layers}, hidden {facts.hidden}, MLP {facts.intermediate}"
    yield "heads", f"{facts.heads} of {facts.head_dim}, {facts.kv_heads} for keys and values"
    yield "rope", f"{facts.head_dim // 2} frequencies, {pairs(facts.rope)}"
    yield "context", f"{facts.context_length:,} positions"
    yield "vocabulary", f"{facts.vocab:,}, head {'tied to the embedding' if facts.tied else 'not tied'}"
    yield "end tokens", listed(facts.eos_token_ids) or "none"
    covers = listed(facts.trainer_covers)
    yield (
        "trainer",
        (
            f"its LoRA covers {covers} (the square linear layers)"
            if covers
            else "its LoRA covers nothing: no linear layer is square, so such a base cannot be trained with it"
        ),
    )


def _artifact(facts: ArtifactFacts) -> Iterable[Row]:
    rope = facts.rope_2d
    axes = [rope["axes"].count(axis) for axis in (0, 1, 2)]
    yield "kind", f"{facts.kind}, {facts.family}, {facts.dtype}, made by version {facts.tool_version}"
    if facts.quant:
        yield "quantised", f"{facts.quant['name']}, but for {first_names(facts.quant['skip_modules']) or 'nothing'}"
    if facts.one_branch_of is not None:
        trained = spans(sorted(facts.one_branch_of["pair_indices"]))
        yield "2D RoPE", f"one branch of a model whose frequencies {trained} encode branch and time"
    elif rope["pair_indices"]:
        yield "2D RoPE", f"frequencies {spans(rope['pair_indices'])} of {len(rope['axes'])}"
        yield "2D RoPE", f"{axes[0]} are rotated by position, {axes[1]} by branch, {axes[2]} by time"
    else:
        yield "2D RoPE", f"none: all {axes[0]} frequencies are rotated by position"
    placed = f"stride {rope['branch_stride']}, align {rope['align_to']}, " if rope["pair_indices"] else ""
    yield "layout", f"{placed}{rope['visibility']}"
    yield "base", pairs(facts.base)
    for adapter in facts.adapters:
        yield "adapter", pairs(adapter)
    yield "context", f"{facts.context_length:,} positions, vocabulary {facts.vocab:,}"
    yield "end tokens", listed(facts.eos_token_ids) or "none"
    if facts.totals:
        yield "totals", pairs(facts.totals)
    if facts.parity:
        yield "parity", pairs({key: value for key, value in facts.parity.items() if key != "cases"})
    yield "files", f"{size_text(facts.bytes)} in {len(facts.files)}"
    for name, count in facts.files.items():
        yield "files", f"{name} {size_text(count)}"


def _fit(fit: Fit) -> Iterable[Row]:
    yield "base model", f"{fit.base}: it fits" if fit.fits else f"{fit.base}: it does not fit"


def guess_lines(guess: Guess, form: str) -> list[str]:
    """The table of the scores, what was scored, and the flags to use for an adapter of this form, with the reasons."""
    scores = [_score(score, lowest=score is guess.scores[0]) for score in guess.scores[:MOST_SCORES]]
    shown = table(("ratio", "pairs", "stride", "nats/token", "difference", ""), scores)
    summary = (
        f"{guess.tokens:,} tokens of {guess.branches} branches in {guess.sequences} sequences, {guess.seconds:.0f} s; "
        f"each branch alone, without 2D RoPE: {guess.separate.loss:.3f} nats/token"
    )
    lines = [shown, "", summary]
    if guess.cut:
        lines.append(
            f"the limit of two minutes left out a part: {guess.tokens:,} of {guess.text_tokens:,} tokens of the text "
            f"and {len(guess.scores)} candidates were scored; a faster or less busy machine scores more"
        )
    return [*lines, *(_ordinary(guess, form) if guess.winner == "ordinary" else _parallel(guess))]


def _score(score: Score, *, lowest: bool) -> tuple[str, ...]:
    ratio, stride = ("none", "-") if score.ratio is None else (f"{score.ratio:g}", str(score.branch_stride))
    difference = f"{score.difference:.3f} ± {score.standard_error:.3f}"
    mark = "lowest" if lowest else "tied" if score.tied else ""
    return ratio, str(score.pairs), stride, f"{score.loss:.3f}", difference, mark


def _parallel(guess: Guess) -> Iterable[str]:
    """The flags to use for parallel branches, and how reliable they are."""
    default = "" if guess.best is guess.scores[0] else " (tied with the lowest loss, and the trainer's default)"
    yield f"merge flags: {guess.merge_flags}{default}"
    if guess.winner == "columnar":
        yield "columns without 2D RoPE win: run what is merged with --visibility columnar"
    if not guess.winner_is_clear:
        yield (
            "not reliable: each branch alone, without 2D RoPE, has a loss that is no higher beyond chance, so the "
            "adapter may as well be ordinary (then merge with --no-patch-rope)"
        )
    ties = [score for score in guess.scores if score.tied]
    if any(score.pairs != guess.best.pairs for score in ties):
        yield "the text does not tell apart the ratios that are tied; one with longer branches may"
    elif not guess.ratio_is_clear:
        yield "there was no time to score every ratio, so another one may be better"
    if any(score.pairs == guess.best.pairs and score != guess.best for score in ties):
        yield "the text does not tell apart the strides that are tied, so the choice hardly matters for it"
    elif not guess.stride_is_clear:
        yield "there was no time to score every stride of this ratio, so another one may be better"


def _ordinary(guess: Guess, form: str) -> Iterable[str]:
    """The flags to use for ordinary positions, and what speaks for them."""
    name = {"peft": "PEFT", "mlx": "MLX"}.get(form)
    yield f"merge flags: {guess.merge_flags}" + (f" (no flag is needed for an adapter of {name})" if name else "")
    yield "ordinary positions win: each branch alone, without 2D RoPE, has a lower loss than every candidate in columns"
    best = guess.best_2d
    yield (
        f"the best with 2D RoPE is ratio {best.ratio:g} and stride {best.branch_stride}, with {best.loss:.3f} "
        "nats/token"
    )
    yield _reading(guess.learnt, merge_flags(best))
    if not guess.complete:
        yield "there was no time to score every ratio and stride, so with another one the adapter may be better still"


def _reading(learnt: Learnt | None, flags: str) -> str:
    """What the losses of the base say about an adapter for which ordinary positions win.

    ``flags`` are those of the best candidate with 2D RoPE.
    """
    if learnt is None:
        return (
            "there was no time to score the base without the adapter, which tells an ordinary adapter from one that "
            "was trained with 2D RoPE too little"
        )
    costs = (
        f"columns cost {learnt.columns - learnt.alone:.3f} nats/token with the adapter and "
        f"{learnt.base_columns - learnt.base_alone:.3f} without it"
    )
    if learnt.parallel:
        return (
            f"{costs}: it may have been trained with 2D RoPE too little, or be an ordinary one whose text is easy; if "
            f"you know that it was trained on parallel branches, merge with {flags}"
        )
    if learnt.text:
        return f"{costs}: it learnt the text but nothing of such columns, as an ordinary adapter does"
    return (
        f"{costs}, and each branch alone the base is as good ({learnt.base_alone:.3f} nats/token): the text is not "
        "like the training data, or the adapter learnt little, so nothing is known of its training"
    )


def listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def types(dtypes: Mapping[str, int]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return listed(f"{count} tensors {dtype}" for dtype, count in dtypes.items())


def pairs(block: Mapping[str, Any]) -> str:
    """Keys and values, without those that are None or empty; numbers are short, and hashes are their first digits."""
    return listed(f"{key} {_value(value)}" for key, value in block.items() if value not in (None, ""))


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if isinstance(value, list | tuple) and len(value) > MOST_NUMBERS and all(type(part) is float for part in value):
        return f"{len(value)} numbers from {min(value):.4g} to {max(value):.4g}"
    return listed(value) if isinstance(value, list | tuple) else str(value)
