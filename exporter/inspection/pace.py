"""A limit of time for work that is counted in tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pos2d.exporter.inspection.samples import Sample
from pos2d.spec import Rope2DSpec

# Returns the summed loss (nats) of the completion tokens of every branch of a sample.
BranchLosses = Callable[[Rope2DSpec, Sample], Sequence[float]]


@dataclass(slots=True)
class Pace:
    """What there is time for until ``deadline``, at the pace of the forward passes so far.

    ``clock`` returns seconds. ``reserved``: seconds that are kept for later. ``tokens`` counts those of all passes.
    ``cut`` is true once something was left out.
    """

    clock: Callable[[], float]
    deadline: float
    reserved: float = 0.0
    tokens: int = 0
    cut: bool = False
    _seconds: float = field(default=0.0, repr=False)

    def add(self, tokens: int, seconds: float) -> None:
        """Count a forward pass."""
        self.tokens += tokens
        self._seconds += seconds

    @property
    def tokens_left(self) -> float:
        """The number of tokens that there is time for; without limit before the first pass."""
        if not self._seconds:
            return float("inf")
        return (self.deadline - self.reserved - self.clock()) * self.tokens / self._seconds

    def allows(self, tokens: int) -> bool:
        """Whether there is time for so many tokens; if there is not, the work counts as cut."""
        allowed = tokens <= self.tokens_left
        self.cut = self.cut or not allowed
        return allowed


@dataclass(frozen=True, slots=True, eq=False)
class Scorer:
    """Scores samples with one model, and times it."""

    branch_losses: BranchLosses
    pace: Pace

    def losses(self, spec: Rope2DSpec, sample: Sample) -> list[float]:
        """The summed loss of every branch of a sample that is laid out as ``spec`` says."""
        began = self.pace.clock()
        losses = list(self.branch_losses(spec, sample))
        self.pace.add(len(sample), self.pace.clock() - began)
        return losses
