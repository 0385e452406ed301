"""Artifact -> text. One verb, one file, one function."""

from runtime.answers import Completion, Event
from runtime.batch import BatchReport, batch
from runtime.bench import BenchReport, bench
from runtime.chat import chat
from runtime.conversation import Conversation
from runtime.doctor import DoctorReport, doctor
from runtime.evaluate import EvalReport, evaluate
from runtime.load import load
from runtime.model import Model
from runtime.run import RunReport, run
from runtime.sampling import Sampling
from runtime.show_layout import LayoutReport, show_layout
from runtime.verify import ParityReport, verify

__all__ = [
    "BatchReport",
    "BenchReport",
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
    "chat",
    "doctor",
    "evaluate",
    "load",
    "run",
    "show_layout",
    "verify",
]
