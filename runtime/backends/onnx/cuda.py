"""ONNX Runtime's CUDA provider: whether it works on this machine, and whether it computes the whole graph."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnxruntime as ort

from pos2d.errors import InputError, UsageError

PROVIDER = "CUDAExecutionProvider"
# Decode steps of fixed shapes are captured as CUDA graphs.
PROVIDER_OPTIONS = {"enable_cuda_graph": "1"}
# Lets a session say which provider each node was assigned to.
RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
UNUSABLE = (
    "ONNX Runtime cannot use its CUDA provider here; it needs a GPU, its driver, and the CUDA and cuDNN versions that "
    "it was built for, such as those of torch's wheels; use `device='cpu'`"
)
# Operators that compute shapes and counts may run on the CPU: they move a few integers.
SHAPE_OPERATORS = {"Shape", "Gather", "Cast", "ReduceProd", "Range", "Unsqueeze", "Concat", "Reshape"}


def check_gpu() -> None:
    """Load the provider's libraries, from torch's wheels if the system has none, and place a value on the GPU.

    Raises:
        UsageError: there is no GPU, or a library is missing.
    """
    if PROVIDER not in ort.get_available_providers():
        raise UsageError(
            "`device='cuda'`: ONNX Runtime has no CUDA provider here; install onnxruntime-gpu, or use `device='cpu'`"
        )
    ort.preload_dlls()
    try:
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, dtype=np.float32), "cuda", 0)
    except RuntimeError:
        raise UsageError(f"`device='cuda'`: {UNUSABLE}") from None


def check_session(session: ort.InferenceSession) -> None:
    """Check that a session computes on the GPU; ONNX Runtime falls back to the CPU without an error.

    Raises:
        UsageError: the provider cannot be used.
        InputError: the provider has no kernels for some of the graph's operators.
    """
    if PROVIDER not in session.get_providers():
        raise UsageError(f"`device='cuda'`: {UNUSABLE}")
    operators = operators_off_gpu(session.get_provider_graph_assignment_info())
    if operators:
        raise InputError(
            f"ONNX Runtime has no CUDA kernels for {', '.join(operators)} of this graph; use `device='cpu'`"
        )


def operators_off_gpu(assignments: Iterable[Any]) -> list[str]:
    """The operators that were not assigned to CUDA, without those that only compute shapes."""
    elsewhere = (part for part in assignments if part.ep_name != PROVIDER)
    return sorted({node.op_type for part in elsewhere for node in part.get_nodes()} - SHAPE_OPERATORS)
