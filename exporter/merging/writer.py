"""The weights of a merge: planned shards, written tensor by tensor on a few threads."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pos2d.exporter.adapters.deltas import Change, Replaced
from pos2d.exporter.files.parallel import single_threaded_torch, worker_count
from pos2d.exporter.files.tensor_io import BLOCK, TensorFile, opened, pieces, write_at
from pos2d.exporter.inputs.checkpoint import DTYPES
from pos2d.exporter.merging.background_fsync import Settler
from pos2d.exporter.merging.journal import Journal
from pos2d.exporter.merging.ledger import Action, Tally, TensorEntry, tally_of
from pos2d.exporter.merging.resume import is_intact
from pos2d.exporter.merging.rounded_rows import check_copied, rounded_rows
from pos2d.exporter.tensors.plan import MergePlan, PlannedShard, PlannedTensor
from pos2d.exporter.tensors.rounding import Rounding, round_nearest
from pos2d.progress import Progress

# Bytes read at once of a tensor that is copied: a piece stays in the cache.
COPY_BYTES = 1 << 20
# The disk takes in what is written while the rest is computed, whenever this much is waiting.
FLUSH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """What all shards of a merge have in common."""

    base: Path
    rounding: Rounding
    workers: ThreadPoolExecutor
    settler: Settler
    progress: Progress
    forget: bool


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One tensor on its way from an open file of the base to an open shard."""

    tensor: PlannedTensor
    file: str
    source: TensorFile
    target: int
    shared: Shared

    def entry(self, action: Action, hash_in: str, hash_out: str, tally: Tally | None = None) -> TensorEntry:
        ranks = [change.rank for change in self.tensor.changes if change.rank is not None]
        return TensorEntry(
            file=self.file,
            action=action,
            sources=(self.tensor.source.file, *self.tensor.adapters),
            elements=self.tensor.source.elements,
            sha256_in=hash_in,
            sha256_out=hash_out,
            rank=sum(ranks) if ranks else None,
            **(tally.figures() if tally else {}),
        )


def write_weights(
    plan: MergePlan, base: Path, rounding: Rounding, journal: Journal, target: Path
) -> dict[str, TensorEntry]:
    """Write every shard into ``target`` that the journal does not have; returns the ledger of all tensors.

    Nothing else is in ``target`` afterwards.

    Raises:
        InputError: values that are not finite, in the base or after rounding, or a base that changed meanwhile.
        OutputError: see :meth:`pos2d.exporter.merging.journal.Journal.read`.
    """
    noted = journal.read()
    finished = {s.file: noted[s.file] for s in plan.shards if s.file in noted and is_intact(s, noted[s.file], target)}
    for left in target.iterdir():  # of an interrupted run: begun, or written after the weights
        if left.name not in finished:
            left.unlink()
    forget = _outgrows_cache(plan)
    with (
        Progress("merging", plan.nbytes, unit="bytes") as progress,
        Settler(forget) as settler,
        ThreadPoolExecutor(worker_count()) as workers,
        single_threaded_torch(),
    ):
        shared = Shared(base, rounding, workers, settler, progress, forget)
        progress.advance(sum(shard.nbytes for shard in plan.shards if shard.file in finished))
        for shard in (shard for shard in plan.shards if shard.file not in finished):
            descriptor = os.open(target / shard.file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                finished[shard.file] = _write_shard(shard, descriptor, shared)
                settler.wait()  # one shard may still be on its way to the disk, not more
            except BaseException:
                settler.abandon(descriptor)
                raise
            settler.settle(descriptor, partial(journal.write, dict(finished)))
        settler.wait()
    return {name: entry for shard in plan.shards for name, entry in finished[shard.file].items()}


def _outgrows_cache(plan: MergePlan) -> bool:
    """Whether base and result are more than the system should keep in its cache.

    Making room there for what nobody reads again would cost it more than the copying itself.
    """
    import psutil

    return 2 * plan.nbytes > psutil.virtual_memory().available // 2


def _write_shard(shard: PlannedShard, descriptor: int, shared: Shared) -> dict[str, TensorEntry]:
    write_at(descriptor, memoryview(shard.header), 0)
    shared.progress.advance(len(shard.header))
    with opened(shared.base, {tensor.source.file for tensor in shard.tensors}, shared.forget) as sources:
        # The largest first: the threads then end together.
        order = sorted(shard.tensors, key=lambda tensor: -tensor.target.nbytes)
        jobs = [Job(tensor, shard.file, sources[tensor.source.file], descriptor, shared) for tensor in order]
        done = {shared.workers.submit(_copy if job.tensor.copied else _compute, job): job.tensor for job in jobs}
        entries: dict[str, TensorEntry] = {}
        waiting = 0
        try:
            for future in as_completed(done):
                entries[done[future].name] = future.result()
                waiting += done[future].target.nbytes
                if waiting >= FLUSH_BYTES:
                    shared.settler.flush(descriptor)
                    waiting = 0
        finally:
            for future in done:
                future.cancel()
            wait(done)  # nobody may read or write a file once it is closed
    return {tensor.name: entries[tensor.name] for tensor in shard.tensors}


def _copy(job: Job) -> TensorEntry:
    import torch

    place, dtype = job.tensor.source, getattr(torch, DTYPES[job.tensor.source.dtype][0])
    buffer = memoryview(bytearray(min(COPY_BYTES, place.nbytes)))
    digest = hashlib.sha256()
    # After the first piece the others begin where blocks of the file do, so that they may be shared.
    lead = -place.offset % BLOCK
    for start, count in pieces(place.nbytes, COPY_BYTES, first=0 if lead % dtype.itemsize else lead):
        data = buffer[:count]
        job.source.read_into(job.tensor.origin, place, start, data)
        digest.update(data)
        check_copied(job.tensor, torch.frombuffer(data, dtype=dtype))
        job.source.copy_to(place, start, data, job.target, job.tensor.target.offset + start)
        job.shared.progress.advance(count)
    return job.entry("copied", digest.hexdigest(), digest.hexdigest())


def _compute(job: Job) -> TensorEntry:
    import torch

    tensor = job.tensor
    dtype = getattr(torch, DTYPES[tensor.target.dtype][0])
    same_type = tensor.source.dtype == tensor.target.dtype
    hash_in, hash_out, tally = hashlib.sha256(), hashlib.sha256(), Tally()
    offset = tensor.target.offset
    for block in rounded_rows(tensor, job.source, job.shared.rounding):
        hash_in.update(block.data)
        if block.delta is not None:
            before = block.weight if same_type else round_nearest(block.weight, dtype).double()
            tally += tally_of(block.weight, before, block.delta, block.rounded)
        written = block.rounded.contiguous().reshape(-1).view(torch.uint8).numpy().data
        hash_out.update(written)
        write_at(job.target, written, offset)
        offset += len(written)
        job.shared.progress.advance(len(written))
    hashes = hash_in.hexdigest(), hash_out.hexdigest()
    action = _action(tensor.changes)
    if action == "replaced" and hashes[0] == hashes[1]:
        return job.entry("copied", *hashes)  # PEFT saves some base weights with an adapter
    return job.entry(action, *hashes, tally if tensor.changes else None)


def _action(changes: tuple[Change, ...]) -> Action:
    if not changes:
        return "converted"
    return "replaced" if all(isinstance(change, Replaced) for change in changes) else "merged"
