"""Merge, export and run LoRA adapters that were trained with 2D RoPE, and ordinary ones.

    import pos2d

    pos2d.merge("BASE", "lora.pth", "merged", rope_2d_ratio=0.5)
    pos2d.export("merged", "onnx", format="onnx", quant="int8")
    model = pos2d.load("onnx")
    for completion in model.generate(["What is tea?", "What is a volcano?"]):
        print(completion.text)

Everything is imported when it is first used. The modules of this directory itself are the contract that the exporter
and the runtime share: positions, layout, manifest, options, errors, and the names in artifacts.
"""

from pos2d.lazy import lazy_attributes

# Not from the module typing: ``python -m pos2d`` would look for its file in the current directory first.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pos2d.errors import (
        HubError,
        InputError,
        OutputError,
        ParityError,
        Pos2DError,
        StorageError,
        UnsafeInputError,
        UsageError,
    )
    from pos2d.exporter.export import ExportReport, export
    from pos2d.exporter.inspect import InspectReport, inspect
    from pos2d.exporter.merge import MergeReport, merge
    from pos2d.exporter.plan import PlanReport, plan
    from pos2d.exporter.push import PushReport, push
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

__version__ = "0.1.0"

__all__ = [
    "BatchReport",
    "BenchReport",
    "CompareReport",
    "Completion",
    "Conversation",
    "DoctorReport",
    "EvalReport",
    "Event",
    "ExportReport",
    "HubError",
    "InputError",
    "InspectReport",
    "LayoutReport",
    "MergeReport",
    "Model",
    "OutputError",
    "ParityError",
    "ParityReport",
    "PlanReport",
    "Pos2DError",
    "PushReport",
    "RunReport",
    "Sampling",
    "StorageError",
    "UnsafeInputError",
    "UsageError",
    "batch",
    "bench",
    "compare",
    "doctor",
    "evaluate",
    "export",
    "inspect",
    "load",
    "merge",
    "plan",
    "push",
    "run",
    "serve",
    "show_layout",
    "verify",
]

_REPORTS = ("ExportReport", "InspectReport", "MergeReport", "PlanReport", "PushReport")
_EXPORTER = (*_REPORTS, "export", "inspect", "merge", "plan", "push")
_MODULES = {name: "pos2d.exporter" if name in _EXPORTER else "pos2d.runtime" for name in __all__}
_MODULES |= {name: "pos2d.errors" for name in __all__ if name.endswith("Error")}

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)
