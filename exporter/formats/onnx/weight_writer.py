"""Writes the file of weights from the exact sums, calibrated block by block or rounded in one pass."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from pos2d.exporter.files.parallel import single_threaded_torch, worker_count
from pos2d.exporter.files.tensor_io import opened, write_at
from pos2d.exporter.formats.onnx.weight_layout import DATA_FILE, GraphWeight, GraphWeights
from pos2d.exporter.merging.ledger import Tally
from pos2d.exporter.quantisation.calibration import calibrate
from pos2d.exporter.quantisation.encodings import BlockBits, CompensatedBlockBits
from pos2d.exporter.quantisation.gptq import Curvature
from pos2d.exporter.quantisation.totals import QuantTotals, totals_of
from pos2d.exporter.quantisation.writing import write_tensor
from pos2d.exporter.sources.source import Source
from pos2d.exporter.tensors.plan import PlannedTensor
from pos2d.progress import Progress

# A weight, one of its parts, and the row of the weight at which that begins.
Job = tuple[GraphWeight, PlannedTensor, int]


def write_weights(source: Source, plan: GraphWeights, target: Path, *, calibrated: bool = False) -> QuantTotals:
    """Write the file into ``target``; ``calibrated`` layers are quantised with what is known of their inputs.

    Raises:
        InputError: values that are not finite, or a base that changed while it was read.
    """
    jobs = [
        (weight, tensor, first)
        for weight in plan.weights.values()
        for tensor, first in zip(weight.parts, _first_rows(weight.parts), strict=True)
    ]
    jobs.sort(key=lambda job: -job[1].source.nbytes)  # the largest first: the threads then end together
    tallies: list[Tally] = []
    descriptor = os.open(target / DATA_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.truncate(descriptor, plan.nbytes)
        with _Writer(source, plan, descriptor) as writer:
            waiting, tensors = jobs, {tensor.name: tensor for _, tensor, _ in jobs}
            for curvatures in calibrate(source, tensors, writer.workers) if calibrated else ():
                tallies += writer.write([job for job in waiting if _module(job[1]) in curvatures], curvatures)
                waiting = [job for job in waiting if _module(job[1]) not in curvatures]
            tallies += writer.write(waiting, {})
    finally:
        os.close(descriptor)
    return totals_of(tallies, len(jobs))


class _Writer:
    """Threads that write tensors into one open file."""

    def __init__(self, source: Source, plan: GraphWeights, descriptor: int) -> None:
        self._source, self._plan, self._descriptor = source, plan, descriptor
        self._open = ExitStack()

    def __enter__(self) -> "_Writer":
        files = {tensor.source.file for weight in self._plan.weights.values() for tensor in weight.parts}
        self._progress = self._open.enter_context(Progress("writing weights", self._plan.nbytes, unit="bytes"))
        self._files = self._open.enter_context(opened(self._source.base.directory, files))
        self.workers = self._open.enter_context(ThreadPoolExecutor(worker_count()))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def write(self, jobs: Sequence[Job], curvatures: Mapping[str, Curvature]) -> list[Tally]:
        """Sums over the quantised ones of them."""
        with single_threaded_torch():
            done = [self.workers.submit(self._write, *job, curvatures.get(_module(job[1]))) for job in jobs]
            try:
                return [tally for tally in (future.result() for future in done) if tally is not None]
            finally:
                for future in done:
                    future.cancel()

    def _write(
        self, weight: GraphWeight, tensor: PlannedTensor, first: int, curvature: Curvature | None
    ) -> Tally | None:
        encoding = weight.encoding
        if curvature is not None and isinstance(encoding, BlockBits):
            encoding = CompensatedBlockBits(encoding.bits, encoding.block, encoding.scales, curvature)

        def write(name: str, offset: int, data: memoryview) -> None:
            write_at(self._descriptor, data, weight.places[name].offset + offset)
            self._progress.advance(len(data))

        file = self._files[tensor.source.file]
        return write_tensor(tensor, file, encoding, write, name=weight.name, first=first)


def _module(tensor: PlannedTensor) -> str:
    return tensor.name.removesuffix(".weight")


def _first_rows(parts: Sequence[PlannedTensor]) -> Iterator[int]:
    first = 0
    for part in parts:
        yield first
        first += part.target.shape[0]
