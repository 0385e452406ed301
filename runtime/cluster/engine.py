"""The engine of workers on a cluster, for a batch whose model and options are checked."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from pos2d.hf.tokenizer import load_tokenizer
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.batching.input_file import WINDOW, windows
from pos2d.runtime.batching.line_answers import Answers, LineOptions
from pos2d.runtime.batching.recipe import model_facts
from pos2d.runtime.cluster.attempts import AttemptCounter
from pos2d.runtime.cluster.connection import connected, machines
from pos2d.runtime.cluster.options import ClusterOptions
from pos2d.runtime.cluster.placement import check_loading, place_workers, uses_gpu
from pos2d.runtime.cluster.pool import answers_in_order
from pos2d.runtime.cluster.worker import Task
from pos2d.runtime.opening.opened_model import OpenedModel
from pos2d.runtime.text.artifact import LoadedArtifact
from pos2d.threads import default_threads


@contextlib.contextmanager
def ray_engine(
    cluster: ClusterOptions,
    model: str | Path,
    opened: OpenedModel,
    loading: LoadOptions,
    load: Callable[[OpenedModel, LoadOptions], LoadedArtifact],
    lines: LineOptions,
    source: Path,
    count: int,
) -> Iterator[Callable[[int], Generator[Answers]]]:
    """What answers the ``count`` lines of ``source`` after those that are done, with the workers of ``cluster``.

    Raises:
        UsageError: no cluster, no room for the workers, or options that a worker does not take.
        InputError: the model has no tokenizer.
    """
    check_loading(loading)
    load_tokenizer(opened.directory)
    with connected(cluster.ray_address) as is_ours:
        found = machines()
        place = partial(
            place_workers,
            found,
            workers=cluster.num_workers,
            threads=loading.threads,
            on_gpus=uses_gpu(loading.device, opened.manifest.kind, found),
        )
        place(most=_windows_after(0, count))  # before the output is opened

        def answers(done: int) -> Generator[Answers]:
            placement = place(most=_windows_after(done, count))
            # OMP_NUM_THREADS is that of this machine.
            threads = min(placement.cores, default_threads()) if is_ours else placement.cores
            task = Task(
                model=str(Path(model).resolve()) if Path(model).exists() else str(model),
                loading=replace(loading, threads=loading.threads or threads),
                load=load,
                lines=lines.elsewhere(),
                done=done,
                begin=AttemptCounter.start(),
                facts=model_facts(opened),
            )
            return answers_in_order(task, windows(source, done), placement)

        yield answers


def _windows_after(done: int, count: int) -> int:
    """The number of windows that have lines after ``done`` of ``count``; at least one."""
    return max(1, -(-count // WINDOW) - done // WINDOW)
