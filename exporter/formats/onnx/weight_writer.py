"""Writes the weight file from the exact sums, calibrated layer by layer or rounded in one pass."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from pos2d.exporter.formats.onnx.weight_layout import GraphWeight, WeightLayout
from pos2d.exporter.quantisation.exact_pass import ExactPass
from pos2d.exporter.quantisation.gptq import HessianFactors
from pos2d.exporter.quantisation.summary import QuantisationSummary, summarise
from pos2d.exporter.quantisation.writing import write_tensor
from pos2d.onnx_io import DATA_FILE
from pos2d.progress import Progress
from pos2d.reference import HeldOut, Prediction
from pos2d.sources.files.parallel import single_threaded_torch, submitted, worker_count
from pos2d.sources.files.tensor_io import opened, write_at
from pos2d.sources.source import Source
from pos2d.sources.tensors.stats import DeltaStats
from pos2d.sources.tensors.tensor_plan import PlannedTensor

# A weight, one of its parts, and the row of the weight at which that part begins.
Job = tuple[GraphWeight, PlannedTensor, int]


def write_weights(
    source: Source,
    layout: WeightLayout,
    tensors: Mapping[str, PlannedTensor],
    target: Path,
    *,
    calibrated: bool = False,
    held_out: Sequence[HeldOut] = (),
) -> tuple[QuantisationSummary, tuple[Prediction, ...]]:
    """Write the weight file into the directory ``target``; ``tensors`` are those of ``layout``, by name.

    ``calibrated``: quantise the decoder's linear layers with GPTQ. Also returns what the exact model predicts after
    the ``held_out`` tokens.

    Raises:
        InputError: values that are not finite, or a base that changed while it was read.
    """
    jobs = [
        (weight, tensors[part], first_row)
        for weight in layout.weights.values()
        for part, first_row in zip(weight.parts, _first_rows(weight.parts, tensors), strict=True)
    ]
    jobs.sort(
        key=lambda job: -job[1].source.nbytes
    )  # the largest first, so that all threads end at about the same time
    tallies: list[DeltaStats] = []
    descriptor = os.open(target / DATA_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.truncate(descriptor, layout.nbytes)
        files = {tensor.source.file for tensor in tensors.values()}
        with _Writer(source.base.directory, files, layout.nbytes, descriptor) as writer:
            remaining = jobs
            exact = ExactPass(source, tensors, writer.workers, held_out)
            for hessians in exact.layers(calibrated=calibrated):
                tallies += writer.write([job for job in remaining if _module(job[1]) in hessians], hessians)
                remaining = [job for job in remaining if _module(job[1]) not in hessians]
            tallies += writer.write(remaining, {})
    finally:
        os.close(descriptor)
    return summarise(tallies, len(jobs)), exact.predictions


class _Writer:
    """Threads that read tensors of a base and write them into one open file."""

    def __init__(self, base: Path, files: set[str], nbytes: int, descriptor: int) -> None:
        self._base, self._files, self._nbytes, self._descriptor = base, files, nbytes, descriptor
        self._resources = ExitStack()

    def __enter__(self) -> "_Writer":
        self._progress = self._resources.enter_context(Progress("writing weights", self._nbytes, unit="bytes"))
        self._opened = self._resources.enter_context(opened(self._base, self._files))
        self.workers = self._resources.enter_context(ThreadPoolExecutor(worker_count()))
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.close()

    def write(self, jobs: Sequence[Job], hessians: Mapping[str, HessianFactors]) -> list[DeltaStats]:
        """Write the parts of ``jobs``, with error compensation where ``hessians`` has their module.

        Returns the sums over each quantised one.
        """
        arguments = ((*job, hessians.get(_module(job[1]))) for job in jobs)
        with single_threaded_torch(), submitted(self.workers, self._write_part, arguments) as tallies:
            return [tally for tally in tallies if tally is not None]

    def _write_part(
        self, weight: GraphWeight, tensor: PlannedTensor, first_row: int, hessian: HessianFactors | None
    ) -> DeltaStats | None:
        def write(name: str, offset: int, data: memoryview) -> None:
            write_at(self._descriptor, data, weight.places[name].offset + offset)
            self._progress.advance(len(data))

        encoding = weight.encoding if hessian is None else weight.encoding.calibrated_with(hessian)
        file = self._opened[tensor.source.file]
        return write_tensor(tensor, file, encoding, write, name=weight.name, first=first_row)


def _module(tensor: PlannedTensor) -> str:
    return tensor.name.removesuffix(".weight")


def _first_rows(parts: Sequence[str], tensors: Mapping[str, PlannedTensor]) -> Iterator[int]:
    """The row at which each part begins, in a weight that holds one below the other."""
    first_row = 0
    for part in parts:
        yield first_row
        first_row += tensors[part].shape[0]
