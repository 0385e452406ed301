"""From the evidence in weights and manifests to faults: of the base, and of how the adapter was applied."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pos2d.manifest import Manifest
from pos2d.runtime.comparison.weights import TensorEvidence, WeightEvidence
from pos2d.spec import spans

Cause = Literal[
    "none",
    "other base",
    "adapter not in effect",
    "adapter applied twice",
    "adapter strength",
    "part of the adapter",
    "other adapter",
    "other tensors",
    "rounding",
    "quantisation",
    "positions",
    "tokenizer",
    "special tokens",
    "chat template",
    "end tokens",
    "unknown",
]
# Distance from the base, relative to a tensor, beyond which it is not the base's: twice rounding to bfloat16 moves a
# tensor by 0.24 % of its length, and fine-tuning or other weights by more.
FOREIGN = 5e-3
# A tensor without the adapter has less than this part of what it could have.
ABSENT = 0.25
# How far the strength of the whole adapter may be off, and what counts as twice.
STRENGTH, TWICE = 0.15, (1.75, 2.25)
# Retention below which rounding is a fault, as merge warns of it.
RETAINED = 0.9
# A tensor says something about the adapter if rounding leaves this much of it, and if its strength is this certain.
INFORMATIVE, CERTAIN = 0.3, 0.1
# By how much the logits may be off the strength 1 where the weights cannot be read.
LOGITS = (0.25, 0.7, 1.5)
LAYER = re.compile(r"\.layers\.(\d+)\.(?:\w+\.)?(\w+)\.")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong, as a main clause."""

    cause: Cause
    phrase: str


def faults_of_weights(evidence: WeightEvidence) -> list[Fault]:
    """What the weights themselves show."""
    moved = [tensor for tensor in evidence.others if _is_foreign(tensor)]
    if moved and 2 * len(moved) > len(evidence.others):
        distance = (sum(t.moved for t in moved) / sum(t.weight for t in moved)) ** 0.5
        return [
            Fault(
                "other base",
                f"it was made from another base: {len(moved)} of {len(evidence.others)} tensors that the adapter does "
                f"not change differ from this one, by {distance:.1%} of their size",
            )
        ]
    faults = _of_adapter(evidence)
    odd = [*(tensor.name for tensor in moved), *evidence.unlike]
    if odd:
        faults.append(Fault("other tensors", f"{len(odd)} tensors are not those of base and adapter, such as {odd[0]}"))
    return faults


def _is_foreign(tensor: TensorEvidence) -> bool:
    return tensor.beside > FOREIGN**2 * tensor.weight + 4 * tensor.rounded_error


def _of_adapter(evidence: WeightEvidence) -> list[Fault]:
    adapted = evidence.adapted
    if not adapted:
        return []
    strength = _mean(adapted, [tensor.strength for tensor in adapted])
    roundings = [_mean(adapted, values) for values in ([t.possible for t in adapted], [t.in_type for t in adapted])]
    possible = min(roundings, key=lambda rounding: abs(rounding - strength))
    telling = [t for t in adapted if min(t.possible, t.in_type) >= INFORMATIVE and t.uncertainty < CERTAIN]
    absent = [tensor for tensor in telling if abs(tensor.strength) < ABSENT * tensor.possible]
    foreign = [tensor for tensor in adapted if not tensor.is_quantised and _is_foreign(tensor)]
    if 2 * len(foreign) > len(adapted):
        return [_foreign(foreign, adapted, strength)]
    if absent and len(absent) == len(telling):
        return [
            Fault("adapter not in effect", f"the adapter is not in effect: {_those(absent)} have the base's values")
        ]
    if absent:
        kept = [tensor for tensor in telling if tensor not in absent]
        return [
            Fault(
                "part of the adapter",
                f"the adapter is in effect in {len(kept)} of {len(telling)} tensors only: {_those(absent)} have the "
                "base's values",
            )
        ]
    if possible < RETAINED and abs(strength - possible) <= STRENGTH:
        return [_dead_zone(adapted, strength)]
    ratio = strength / max(possible, ABSENT)
    if TWICE[0] <= ratio <= TWICE[1]:
        return [
            Fault("adapter applied twice", f"the adapter is applied twice: weights moved by {ratio:.2f} times of it")
        ]
    if abs(ratio - 1) > STRENGTH:
        return [
            Fault(
                "adapter strength",
                f"the adapter is applied at {ratio:.2f} of its strength: its weight or its scale (alpha, rank, rsLoRA) "
                "was another one",
            )
        ]
    return []


def _mean(tensors: Sequence[TensorEvidence], values: Sequence[float]) -> float:
    """The mean of strengths, each with the size of its tensor's change as its weight."""
    total = sum(tensor.delta for tensor in tensors)
    return sum(value * tensor.delta for value, tensor in zip(values, tensors, strict=True)) / total


def _foreign(foreign: Sequence[TensorEvidence], adapted: Sequence[TensorEvidence], strength: float) -> Fault:
    what = "with another one in them" if strength > 1 - STRENGTH else "but not by this adapter"
    return Fault(
        "other adapter",
        f"{len(foreign)} of the {len(adapted)} tensors of the adapter differ from the base, {what} (strength of this "
        f"one {strength:.2f})",
    )


def _dead_zone(adapted: Sequence[TensorEvidence], strength: float) -> Fault:
    stored = Counter(tensor.stored for tensor in adapted).most_common(1)[0][0]
    return Fault(
        "rounding",
        f"rounding to {stored} lost {1 - strength:.0%} of the adapter, whose changes are smaller than the steps of "
        "that type: merge it in float32 or float16, or with `rounding='stochastic'`",
    )


def _those(tensors: Iterable[TensorEvidence]) -> str:
    """The modules and layers of some tensors: ``layers 15-29``, or ``q_proj, k_proj in layers 0-29``."""
    listed = list(tensors)
    found = [match for match in (LAYER.search(tensor.name) for tensor in listed) if match]
    if len(found) < len(listed):
        return ", ".join(tensor.name for tensor in listed[:3]) + (" and others" if len(listed) > 3 else "")
    layers = spans(sorted({int(match[1]) for match in found}))
    modules = sorted({match[2] for match in found})
    return f"{', '.join(modules)} in layers {layers}"


def faults_of_graph(expected: Manifest, found: Manifest, strength: float | None, is_lost: bool) -> list[Fault]:
    """What manifest and logits of a graph show, whose weights are not read.

    ``strength`` of the adapter by its logits, which is no linear measure, or None where they do not tell it.
    ``is_lost``: the graph is farther from the unmerged model than the base is.
    """
    low, less, more = LOGITS
    faults = _of_manifest(expected, found)
    if strength is None:
        if not faults and is_lost and found.base.get("config_sha256") != expected.base.get("config_sha256"):
            return [Fault("other base", f"it was made from another base: its manifest names {found.base.get('name')}")]
        return faults
    if faults and (faults[0].cause != "other adapter" or not less <= strength <= more):
        return faults
    moved = f"logits moved by {strength:.2f} of it"
    if strength < low:
        return [Fault("adapter not in effect", f"the adapter is not in effect: {moved}")]
    if strength > more:
        return [Fault("adapter applied twice", f"the adapter is applied twice or more: {moved}")]
    return [Fault("part of the adapter", f"part of the adapter is in effect only: {moved}")] if strength < less else []


def _of_manifest(expected: Manifest, found: Manifest) -> list[Fault]:
    """What the manifest of an artifact says about its adapters."""
    ours, theirs = ([(a["sha256"], a["weight"]) for a in manifest.adapters] for manifest in (expected, found))
    if ours == theirs or not expected.adapters:
        return []
    if not theirs:
        return [Fault("adapter not in effect", "the adapter is not in effect: the manifest names none")]
    if [name for name, _ in ours] == [name for name, _ in theirs]:
        pairs = [(one[1], other[1]) for one, other in zip(ours, theirs, strict=True)]
        one, other = next(pair for pair in pairs if pair[0] != pair[1])
        if other == 2 * one:
            return [
                Fault("adapter applied twice", "the adapter is applied twice: the manifest gives it twice the weight")
            ]
        return [Fault("adapter strength", f"the adapter has weight {other:g} in the manifest, and {one:g} here")]
    if sorted(theirs) == sorted(ours * 2):
        return [Fault("adapter applied twice", "the adapter is applied twice: the manifest names it twice")]
    names = ", ".join(str(adapter["file"]) for adapter in found.adapters)
    return [Fault("other adapter", f"the manifest names another adapter: {names}")]
