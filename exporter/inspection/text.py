"""An inspection as lines for people: a label, then what there is to say."""

from collections.abc import Iterable, Mapping
from typing import Any

from pos2d.exporter.adapters.adapter import some
from pos2d.exporter.inspect import Fit, InspectReport
from pos2d.exporter.inspection.adapter_facts import AdapterFacts, ModuleKind
from pos2d.exporter.inspection.guess import Guess, Score
from pos2d.exporter.inspection.known_bases import KNOWN_BASES
from pos2d.exporter.inspection.model_facts import ArtifactFacts, BaseFacts
from pos2d.spec import spans

Row = tuple[str, str]
MOST_SCORES = 20


def inspect_lines(report: InspectReport) -> list[str]:
    """Aligned lines without colour, the path first."""
    rows: list[Row] = [("what", report.what)]
    if report.base:
        rows += _base(report.base)
    if report.artifact:
        rows += _artifact(report.artifact)
    if report.adapter:
        rows += _adapter(report.adapter)
        if report.guess is None:
            rows.append(("not in it", "ratio, stride and alignment of the training; --guess-ratio finds the first two"))
    if report.fit:
        rows += _fit(report.fit)
    lines = [report.path, *aligned(rows)]
    return [*lines, "", *_guess(report.guess)] if report.guess else lines


def aligned(rows: Iterable[Row]) -> list[str]:
    """Labels in one column; a label that repeats is left out."""
    rows = list(rows)
    width = max(len(label) for label, _ in rows)
    shown = [("" if n and rows[n - 1][0] == label else label, text) for n, (label, text) in enumerate(rows)]
    return [f"  {label.ljust(width)}  {text}".rstrip() for label, text in shown]


def _adapter(facts: AdapterFacts) -> Iterable[Row]:
    yield "file", f"{facts.file}, {size(facts.bytes)}, {facts.parameters:,} parameters, {types(facts.dtypes)}"
    if facts.sha256:
        yield "sha256", facts.sha256
    if facts.ranks:
        scales = "" if facts.scales == (1.0,) else f"{listed(f'{scale:g}' for scale in facts.scales)} * "
        yield "rank", f"{listed(facts.ranks)}, delta = {scales}B @ A"
    for name, found in facts.modules.items():
        yield "modules", f"{name} {listed(found.shapes)} in {_layers(found, facts.layers)}"
    if facts.other_modules:
        yield "modules", f"{some(list(facts.other_modules))}, outside of the layers"
    for key, value in facts.settings.items():
        yield "settings", f"{key} {listed(value) if isinstance(value, list) else value}"
    if facts.untrained:
        yield "untrained", f"B is zero, so nothing changes: {some(list(facts.untrained))}"
    if facts.not_finite:
        yield "not finite", f"NaN or infinite values, the training diverged: {some(list(facts.not_finite))}"
    for name in facts.fits:
        yield "fits", f"{name}, by its shapes"
    if not facts.fits:
        yield "fits", f"none of the {len(KNOWN_BASES)} well-known sizes; --base-model tries any other"


def _layers(found: ModuleKind, layers: int) -> str:
    if not found.missing_layers:
        return f"all {layers} layers"
    return f"{found.layers} of {layers} layers, not in {some([str(layer) for layer in found.missing_layers])}"


def _base(facts: BaseFacts) -> Iterable[Row]:
    shards = f"{facts.shards} file{'s' if facts.shards > 1 else ''}"
    yield "family", f"{facts.family}, {facts.parameters:,} parameters"
    yield "weights", f"{size(facts.bytes)} in {shards}, {types(facts.dtypes)}"
    yield "layers", f"{facts.layers}, hidden {facts.hidden}, MLP {facts.intermediate}"
    yield "heads", f"{facts.heads} of {facts.head_dim}, {facts.kv_heads} for keys and values"
    yield "rope", f"{facts.head_dim // 2} frequencies, {pairs(facts.rope)}"
    yield "context", f"{facts.context_length:,} positions"
    yield "vocabulary", f"{facts.vocab:,}, head {'tied to the embedding' if facts.tied else 'of its own'}"
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
        yield "quantised", f"{facts.quant['name']}, but for {some(facts.quant['skip_modules']) or 'nothing'}"
    if rope["pair_indices"]:
        yield "2D RoPE", f"frequencies {spans(rope['pair_indices'])} of {len(rope['axes'])}"
        yield "2D RoPE", f"{axes[0]} turn with position, {axes[1]} with branch, {axes[2]} with time"
    else:
        yield "2D RoPE", f"none: all {axes[0]} frequencies turn with position"
    yield "layout", f"stride {rope['branch_stride']}, align {rope['align_to']}, {rope['visibility']}"
    yield "base", pairs(facts.base)
    for adapter in facts.adapters:
        yield "adapter", pairs(adapter)
    yield "context", f"{facts.context_length:,} positions, vocabulary {facts.vocab:,}"
    yield "end tokens", listed(facts.eos_token_ids) or "none"
    if facts.totals:
        yield "totals", pairs(facts.totals)
    if facts.parity:
        yield "parity", pairs({key: value for key, value in facts.parity.items() if key != "cases"})
    yield "files", f"{size(facts.bytes)} in {len(facts.files)}"
    for name, count in facts.files.items():
        yield "files", f"{name} {size(count)}"


def _fit(fit: Fit) -> Iterable[Row]:
    yield "base model", f"{fit.base}: it fits" if fit.fits else f"{fit.base}: it does not fit"


def _guess(guess: Guess) -> list[str]:
    shown = guess.scores[:MOST_SCORES]
    table = [("ratio", "pairs", "stride", "nats/token", "behind", ""), *(_score(score) for score in shown)]
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    lines = ["  ".join([c.rjust(w) for c, w in zip(row, widths, strict=False)] + [row[5]]).rstrip() for row in table]
    told = (
        f"{guess.tokens:,} tokens of {guess.branches} branches in {guess.sequences} sequences, {guess.seconds:.0f} s; "
        f"each branch alone, without 2D RoPE: {guess.ordinary.loss:.3f} nats/token"
    )
    return [*(f"  {line}" for line in lines), "", *(f"  {line}" for line in (told, *_verdict(guess)))]


def _score(score: Score) -> tuple[str, ...]:
    ratio, stride = ("none", "-") if score.ratio is None else (f"{score.ratio:g}", str(score.branch_stride))
    behind = f"{score.behind:.3f} ± {score.error:.3f}"
    return ratio, str(score.pairs), stride, f"{score.loss:.3f}", behind, "" if score.ruled_out else "not ruled out"


def _verdict(guess: Guess) -> Iterable[str]:
    """The flags, and how far they can be trusted."""
    usual = "" if guess.best is guess.scores[0] else ", the trainer's default among those that are not ruled out"
    yield f"merge flags: {guess.merge_flags}{usual}"
    if guess.ordinary_is_better:
        yield (
            "not reliable: branch by branch, without 2D RoPE, this text is read better still, so the adapter was "
            "trained side by side too little, on other text, or not at all (then merge with --no-patch-rope)"
        )
        return
    if not guess.ratio_is_clear:
        yield "the text does not tell apart the ratios that are not ruled out; one with longer branches may"
    if not guess.stride_is_clear:
        yield "the text does not tell apart the strides that are not ruled out, so the choice hardly matters for it"


def size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"


def listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def types(dtypes: Mapping[str, int]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return listed(f"{count} tensors {dtype}" for dtype, count in dtypes.items())


def pairs(block: Mapping[str, Any]) -> str:
    """What has a value, numbers short, hashes by their first digits."""
    return listed(f"{key} {_value(value)}" for key, value in block.items() if value is not None)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return listed(value) if isinstance(value, list | tuple) else str(value)
