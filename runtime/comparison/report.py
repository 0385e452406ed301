"""What ``compare`` returns."""

from dataclasses import dataclass

from pos2d.errors import ParityError
from pos2d.runtime.comparison.files import FileEvidence
from pos2d.runtime.comparison.logits import Distance, Parting
from pos2d.runtime.comparison.verdict import Verdict
from pos2d.runtime.comparison.weights import WeightEvidence


@dataclass(frozen=True, slots=True)
class Figures:
    """One model: its size in bytes, its speed in one branch, and its distance from the unmerged model.

    ``computed_in``: the type of its weights. ``columns`` is absent where the model has one branch only, or where other
    branches than the unmerged model's are visible to a token.
    """

    name: str
    kind: str
    computed_in: str
    bytes: int
    tokens_per_second: float | None = None
    one_branch: Distance | None = None
    columns: Distance | None = None


@dataclass(frozen=True, slots=True)
class TensorStrength:
    """How much of the adapter a tensor has: 0 none of it, 1 all of it; ``possible`` is what rounding leaves of 1."""

    name: str
    stored: str
    strength: float
    possible: float


@dataclass(frozen=True, slots=True)
class ArtifactReport:
    """An artifact beside the unmerged model.

    ``files``, ``positions`` and ``sizes`` say what is not as in the training. ``adapted`` are the tensors that the
    adapter changes, of an artifact on torch. ``partings``: where greedy answers part, and ``kl_by_step`` is the mean KL
    at every step of the unmerged model's answers.
    """

    figures: Figures
    verdict: Verdict
    files: FileEvidence
    positions: str
    sizes: str
    adapted: tuple[TensorStrength, ...] | None
    logit_strength: float | None
    partings: tuple[Parting, ...]
    kl_by_step: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class CompareReport:
    """Base, unmerged model and artifacts on the same tokens; ``answers`` are the greedy ones of the unmerged model."""

    text: str
    branches: int
    base: Figures
    unmerged: Figures
    artifacts: tuple[ArtifactReport, ...]
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    plot: str | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def raise_if_failed(self) -> None:
        """Raise an error that names the artifacts in which something is wrong.

        Raises:
            ParityError: there are some.
        """
        wrong = [artifact for artifact in self.artifacts if artifact.verdict.level == "fault"]
        if wrong:
            named = "; ".join(f"{artifact.figures.name}: {', '.join(artifact.verdict.causes)}" for artifact in wrong)
            raise ParityError(f"{len(wrong)} of {len(self.artifacts)} artifacts went wrong ({named})")


def strengths(evidence: WeightEvidence | None) -> tuple[TensorStrength, ...] | None:
    """The adapted tensors of an artifact, in their order."""
    if evidence is None:
        return None
    return tuple(
        TensorStrength(tensor.name, tensor.stored, tensor.strength, tensor.possible) for tensor in evidence.adapted
    )
