"""ONNX Runtime's CUDA provider: whether it works here, and whether it computes everything that it is given."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnxruntime as ort

from pos2d.errors import InputError, UsageError

PROVIDER = "CUDAExecutionProvider"
RECORDED = "session.record_ep_graph_assignment_info"
UNUSABLE = (
    "ONNX Runtime cannot use its CUDA provider here; it needs a card, its driver, and the CUDA and cuDNN that it was "
    "built for, as torch's wheels bring them; use --device cpu"
)
# What counts and reshapes may be done beside the card: it moves a few whole numbers.
SHAPE_OPERATORS = {"Shape", "Gather", "Cast", "ReduceProd", "Range", "Unsqueeze", "Concat", "Reshape"}


# Steps of fixed shapes are recorded as CUDA graphs.
OPTIONS = {"enable_cuda_graph": "1"}


def check_card() -> None:
    """Load the provider's libraries, those of torch's wheels where the system has none, and touch the card.

    Raises:
        UsageError: there is no card, or something is missing.
    """
    if PROVIDER not in ort.get_available_providers():
        raise UsageError("device cuda: this ONNX Runtime has no CUDA; install onnxruntime-gpu, or use --device cpu")
    ort.preload_dlls()
    try:
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, dtype=np.float32), "cuda", 0)
    except RuntimeError:
        raise UsageError(f"device cuda: {UNUSABLE}") from None


def check_session(session: ort.InferenceSession) -> None:
    """Raises:
    UsageError: the provider could not be used, and ONNX Runtime took the CPU without a word.
    InputError: some of the computing would be done there.
    """
    if PROVIDER not in session.get_providers():
        raise UsageError(f"device cuda: {UNUSABLE}")
    strays = stray_operators(session.get_provider_graph_assignment_info())
    if strays:
        raise InputError(f"ONNX Runtime has no CUDA kernels for {', '.join(strays)} of this graph; use --device cpu")


def stray_operators(assignments: Iterable[Any]) -> list[str]:
    """The operators that compute, and were not given to CUDA."""
    elsewhere = (part for part in assignments if part.ep_name != PROVIDER)
    return sorted({node.op_type for part in elsewhere for node in part.get_nodes()} - SHAPE_OPERATORS)
