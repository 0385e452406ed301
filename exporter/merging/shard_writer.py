"""Writes the weights of a merge: shard after shard, each tensor by tensor on a few threads."""

import hashlib
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pos2d.errors import OutputError
from pos2d.exporter.merging.background_fsync import BackgroundFsync
from pos2d.exporter.merging.journal import Journal
from pos2d.exporter.merging.ledger import Action, TensorEntry
from pos2d.exporter.merging.resume import is_intact, is_made_from
from pos2d.exporter.merging.shards import Shard, ShardLayout
from pos2d.progress import Progress
from pos2d.sources.adapters.deltas import Delta, Replaced
from pos2d.sources.files.parallel import single_threaded_torch, submitted, worker_count
from pos2d.sources.files.tensor_io import BLOCK, TensorFile, create_file, opened, pieces, write_at
from pos2d.sources.files.tensor_places import torch_dtype
from pos2d.sources.tensors.rounded_rows import check_copied, rounded_rows
from pos2d.sources.tensors.rounding import Rounding, round_nearest
from pos2d.sources.tensors.stats import DeltaStats, delta_stats
from pos2d.sources.tensors.tensor_plan import PlannedTensor

# Bytes of a copied tensor that are read at once: a piece stays in the processor's cache.
COPY_BYTES = 1 << 20
# An fsync is started whenever this much is written, so that the disk works while the rest is computed.
FLUSH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class MergeContext:
    """What the writing of all shards shares; ``forget``: files are not left in the system's cache."""

    base: Path
    rounding: Rounding
    workers: ThreadPoolExecutor
    fsync: BackgroundFsync
    progress: Progress
    forget: bool


@dataclass(frozen=True, slots=True, eq=False)
class TensorJob:
    """One tensor to write from an open file of the base into an open shard; ``target`` is the shard's descriptor."""

    tensor: PlannedTensor
    shard: Shard
    source: TensorFile
    target: int
    context: MergeContext

    @property
    def offset(self) -> int:
        """The tensor's first byte in the shard."""
        return self.shard.places[self.tensor.name].offset

    def entry(self, action: Action, hash_in: str, hash_out: str, stats: DeltaStats | None = None) -> TensorEntry:
        ranks = [delta.rank for delta in self.tensor.deltas if delta.rank is not None]
        return TensorEntry(
            file=self.shard.file,
            action=action,
            sources=(self.tensor.source.file, *self.tensor.adapters),
            elements=self.tensor.source.elements,
            sha256_in=hash_in,
            sha256_out=hash_out,
            rank=sum(ranks) if ranks else None,
            **(stats.figures() if stats else {}),
        )


def write_weights(
    layout: ShardLayout, base: Path, rounding: Rounding, journal: Journal, target: Path
) -> dict[str, TensorEntry]:
    """Write every shard that the journal does not have into ``target``; returns the ledger of all tensors.

    All other files in ``target`` are deleted.

    Raises:
        InputError: values that are not finite, in the base or after rounding, or a base that changed meanwhile.
        OutputError: finished shards of other weights; see :meth:`pos2d.exporter.merging.journal.Journal.read`.
    """
    finished = _finished_shards(layout, base, journal, target)
    # An interrupted run may leave an unfinished shard, or files that are written after the weights.
    for path in target.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in finished:
            path.unlink()
    forget = _outgrows_cache(layout)
    with (
        Progress("merging", layout.nbytes, unit="bytes") as progress,
        BackgroundFsync(forget) as fsync,
        ThreadPoolExecutor(worker_count()) as workers,
        single_threaded_torch(),
    ):
        context = MergeContext(base, rounding, workers, fsync, progress, forget)
        progress.advance(sum(shard.nbytes for shard in layout.shards if shard.file in finished))
        for shard in (shard for shard in layout.shards if shard.file not in finished):
            descriptor = create_file(target / shard.file)
            try:
                finished[shard.file] = _write_shard(shard, descriptor, context)
                fsync.wait()  # at most one finished shard may be waiting for the disk
            except BaseException:
                fsync.close(descriptor)
                raise
            fsync.finish(descriptor, partial(journal.write, dict(finished)))
        fsync.wait()
    return {name: entry for shard in layout.shards for name, entry in finished[shard.file].items()}


def _finished_shards(
    layout: ShardLayout, base: Path, journal: Journal, target: Path
) -> dict[str, Mapping[str, TensorEntry]]:
    """The ledger of every shard that an earlier run finished and that is intact, by file.

    Raises:
        OutputError: one was made from other weights than the base has now. Times and sizes do not tell: copies keep
            them, and images and archives give all files one time.
    """
    recorded = journal.read()
    finished: dict[str, Mapping[str, TensorEntry]] = {}
    for shard in layout.shards:
        entries = recorded.get(shard.file)
        if entries is None or not is_intact(shard, entries, target):
            continue
        if not is_made_from(base, shard.tensors, entries):
            raise OutputError(
                f"{target.parent} belongs to a merge of other weights: {shard.file} was not made from those "
                f"that are in {base} now; `resume=True` needs the same inputs, `force=True` starts over"
            )
        finished[shard.file] = entries
    return finished


def _outgrows_cache(layout: ShardLayout) -> bool:
    """Whether base and result together are more than the system should keep in its cache.

    Evicting other pages for files that are not read again would cost more than the copying itself.
    """
    import psutil

    return 2 * layout.nbytes > psutil.virtual_memory().available // 2


def _write_shard(shard: Shard, descriptor: int, context: MergeContext) -> dict[str, TensorEntry]:
    write_at(descriptor, memoryview(shard.header), 0)
    context.progress.advance(len(shard.header))
    with opened(context.base, {tensor.source.file for tensor in shard.tensors}, context.forget) as sources:
        # The largest first, so that the threads finish at about the same time.
        order = sorted(shard.tensors, key=lambda tensor: -tensor.nbytes)
        jobs = ((TensorJob(tensor, shard, sources[tensor.source.file], descriptor, context),) for tensor in order)
        entries: dict[str, TensorEntry] = {}
        unsynced = 0
        with submitted(context.workers, _write_tensor, jobs) as results:
            for tensor, entry in zip(order, results, strict=True):
                entries[tensor.name] = entry
                unsynced += tensor.nbytes
                if unsynced >= FLUSH_BYTES:
                    context.fsync.start(descriptor)
                    unsynced = 0
    return {tensor.name: entries[tensor.name] for tensor in shard.tensors}


def _write_tensor(job: TensorJob) -> TensorEntry:
    return _copy(job) if job.tensor.copied else _compute(job)


def _copy(job: TensorJob) -> TensorEntry:
    import torch

    place, dtype = job.tensor.source, torch_dtype(job.tensor.source.dtype)
    buffer = memoryview(bytearray(min(COPY_BYTES, place.nbytes)))
    digest = hashlib.sha256()
    # A shorter first piece lets the others start at block boundaries of the file, so that blocks can be shared.
    lead = -place.offset % BLOCK
    for start, count in pieces(place.nbytes, COPY_BYTES, first=0 if lead % dtype.itemsize else lead):
        data = buffer[:count]
        job.source.read_into(job.tensor.origin, place, start, data)
        digest.update(data)
        check_copied(job.tensor, torch.frombuffer(data, dtype=dtype))
        job.source.copy_to(place, start, data, job.target, job.offset + start)
        job.context.progress.advance(count)
    return job.entry("copied", digest.hexdigest(), digest.hexdigest())


def _compute(job: TensorJob) -> TensorEntry:
    import torch

    tensor = job.tensor
    dtype = torch_dtype(tensor.dtype)
    same_type = tensor.source.dtype == tensor.dtype
    hash_in, hash_out, stats = hashlib.sha256(), hashlib.sha256(), DeltaStats()
    offset = job.offset
    for block, rounded in rounded_rows(tensor, job.source, job.context.rounding):
        hash_in.update(block.data)
        if block.delta is not None:
            before = block.weight if same_type else round_nearest(block.weight, dtype).double()
            stats += delta_stats(block.weight, before, block.delta, rounded)
        written = rounded.contiguous().reshape(-1).view(torch.uint8).numpy().data
        hash_out.update(written)
        write_at(job.target, written, offset)
        offset += len(written)
        job.context.progress.advance(len(written))
    hashes = hash_in.hexdigest(), hash_out.hexdigest()
    action = _action(tensor.deltas)
    if action == "replaced" and hashes[0] == hashes[1]:
        return job.entry("copied", *hashes)  # PEFT saves some base weights with an adapter
    return job.entry(action, *hashes, stats if tensor.deltas else None)


def _action(deltas: tuple[Delta, ...]) -> Action:
    if not deltas:
        return "converted"
    return "replaced" if all(isinstance(delta, Replaced) for delta in deltas) else "merged"
