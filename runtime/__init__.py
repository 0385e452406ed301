"""Artifact -> text. One verb, one file, one function."""

from runtime.doctor import DoctorReport, doctor
from runtime.evaluate import EvalReport, evaluate
from runtime.load import load
from runtime.model import Model
from runtime.run import Completion, RunReport, run
from runtime.verify import ParityReport, verify

__all__ = [
    "Completion",
    "DoctorReport",
    "EvalReport",
    "Model",
    "ParityReport",
    "RunReport",
    "doctor",
    "evaluate",
    "load",
    "run",
    "verify",
]
