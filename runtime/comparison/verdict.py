"""One sentence that says where an artifact went wrong, or that it did not."""

from dataclasses import dataclass
from typing import Literal

from pos2d.manifest import Manifest
from pos2d.runtime.comparison.faults import Cause, Fault, faults_of_graph, faults_of_weights
from pos2d.runtime.comparison.files import FileEvidence
from pos2d.runtime.comparison.logits import Distance
from pos2d.runtime.comparison.weights import WeightEvidence
from pos2d.units import size_text

# KL in nats a token that kernels of two libraries make in float32.
FLOAT_KL = 1e-6
Level = Literal["fine", "cost", "fault"]
# The causes that say nothing about logits.
OF_FILES = ("tokenizer", "special tokens", "chat template", "end tokens")


@dataclass(frozen=True, slots=True)
class Verdict:
    """``level``: ``fine`` is the unmerged model, ``cost`` is it but for quantisation or rounding, ``fault`` is not it.

    ``causes``: all that was found, the weightiest first.
    """

    level: Level
    causes: tuple[Cause, ...]
    sentence: str

    @property
    def cause(self) -> Cause:
        return self.causes[0]


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known of an artifact.

    ``sizes`` and ``positions`` are phrases, empty where all is as it should be. ``weights`` are those of an artifact on
    torch; ``logits``, of a graph, how far its logits moved from the base towards the unmerged model and beyond, 1 being
    the adapter as trained. ``doubt``: why the positions that were given for the training may be the wrong ones.
    """

    manifest: Manifest
    unmerged: Manifest
    files: FileEvidence
    sizes: str = ""
    positions: str = ""
    weights: WeightEvidence | None = None
    logits: float | None = None
    doubt: str = ""


def judge(
    evidence: Evidence, distance: Distance | None, base: Distance | None, file_bytes: int, base_bytes: int
) -> Verdict:
    """The verdict on an artifact; ``distance`` and ``base`` are those of artifact and base in one branch.

    ``file_bytes`` and ``base_bytes``: how large the two are.
    """
    faults = _of_model(evidence, distance, base)
    is_model = not faults
    faults += _of_files(evidence.files)
    cost = None
    if is_model and distance is not None:
        cost = _cost(evidence.manifest, distance, base, file_bytes, base_bytes)
    if cost is not None and cost.cause == "unknown":
        faults, cost = [cost, *faults], None
    if faults:
        phrases = [fault.phrase for fault in faults]
        causes = [fault.cause for fault in faults]
        if cost is not None and cost.cause != "none":
            phrases.append(f"beside that, {cost.phrase}")
            causes.append(cost.cause)
        return Verdict("fault", tuple(dict.fromkeys(causes)), "; ".join(phrases))
    assert cost is not None
    if cost.cause == "none":
        return Verdict("fine", ("none",), f"nothing is wrong: {cost.phrase}")
    return Verdict("cost", (cost.cause,), f"{cost.phrase}; nothing else is wrong")


def _of_model(evidence: Evidence, distance: Distance | None, base: Distance | None) -> list[Fault]:
    """Faults of the base, the adapter and the positions."""
    if evidence.sizes:
        return [Fault("other base", f"it was made from another base: {evidence.sizes}")]
    faults: list[Fault] = []
    if evidence.weights is not None:
        faults += faults_of_weights(evidence.weights)
    elif distance is not None and distance.mean_kl > FLOAT_KL:
        is_lost = base is not None and distance.mean_kl > base.mean_kl
        faults += faults_of_graph(evidence.unmerged, evidence.manifest, evidence.logits, is_lost)
    if evidence.positions:
        doubt = f"; {evidence.doubt}" if evidence.doubt else ""
        faults.append(Fault("positions", f"positions are not those of the training: {evidence.positions}{doubt}"))
    return faults


def _of_files(files: FileEvidence) -> list[Fault]:
    found: list[Fault] = []
    if files.tokenizer:
        found.append(Fault("tokenizer", f"its tokenizer is another one: {files.tokenizer}"))
    if files.special_tokens:
        found.append(Fault("special tokens", f"its special tokens are others: {files.special_tokens}"))
    if files.chat_template:
        found.append(Fault("chat template", f"its chat template is another one: {files.chat_template}"))
    if files.end_tokens:
        found.append(Fault("end tokens", f"its end tokens are others: {files.end_tokens}"))
    return found


def _cost(manifest: Manifest, distance: Distance, base: Distance | None, file_bytes: int, base_bytes: int) -> Fault:
    """What explains the distance of an artifact whose weights and positions are right."""
    figures = f"KL {distance.mean_kl:.1e}, same top token {distance.top1_agreement:.1%}"
    recipe = manifest.recipe
    if recipe is not None:
        more = base is not None and distance.mean_kl > base.mean_kl
        than = ", which is more than the adapter itself changes on this text" if more else ""
        size = f"{size_text(file_bytes)} in place of the base's {size_text(base_bytes)}"
        return Fault("quantisation", f"quantised to {_precision(manifest)}, which costs {figures}{than} ({size})")
    if distance.mean_kl <= FLOAT_KL:
        return Fault("none", f"it computes what base and adapter compute ({figures})")
    if manifest.dtype in ("float16", "bfloat16"):
        return Fault("rounding", f"rounded to {manifest.dtype}, which costs {figures}")
    return Fault(
        "unknown", f"logits differ ({figures}), though weights, positions and sizes that could be compared are right"
    )


def _precision(manifest: Manifest) -> str:
    if manifest.graph_quant is not None:
        return f"{manifest.graph_quant.name} in blocks of {manifest.graph_quant.block_size}"
    assert manifest.quant is not None
    return manifest.quant.name
