"""From an artifact to text: every verb is one function in one file."""

from pos2d.runtime.batch import BatchReport, batch
from pos2d.runtime.bench import BenchReport, bench
from pos2d.runtime.compare import compare
from pos2d.runtime.comparison.report import CompareReport
from pos2d.runtime.doctor import DoctorReport, doctor
from pos2d.runtime.engine.sampling import Sampling
from pos2d.runtime.evaluate import EvalReport, evaluate
from pos2d.runtime.load import load
from pos2d.runtime.model.model import Model
from pos2d.runtime.run import RunReport, run
from pos2d.runtime.serve import serve
from pos2d.runtime.show_layout import LayoutReport, show_layout
from pos2d.runtime.text.completions import Completion, Event
from pos2d.runtime.text.conversation import Conversation
from pos2d.runtime.verify import ParityReport, verify

__all__ = [
    "BatchReport",
    "BenchReport",
    "CompareReport",
    "Completion",
    "Conversation",
    "DoctorReport",
    "EvalReport",
    "Event",
    "LayoutReport",
    "Model",
    "ParityReport",
    "RunReport",
    "Sampling",
    "batch",
    "bench",
    "compare",
    "doctor",
    "evaluate",
    "load",
    "run",
    "serve",
    "show_layout",
    "verify",
]
