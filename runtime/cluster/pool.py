"""Ray Data with a fixed pool of workers: windows of lines go in, their records come back in order."""

import contextlib
import logging
import pickle
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING

from pos2d.errors import Pos2DError
from pos2d.runtime.batching.line_answers import Answers, Window
from pos2d.runtime.cluster.placement import Placement
from pos2d.runtime.cluster.worker import COUNT, FAILURE, FIRST, LINES, NEW_TOKENS, RECORDS, Task, WindowWorker

if TYPE_CHECKING:
    import pyarrow as pa


def answers_in_order(task: Task, windows: Iterable[Window], placement: Placement) -> Generator[Answers]:
    """Answer windows with workers of their own processes; yield one ``Answers`` for each, in order.

    Ray starts a worker again whose process ended, and gives its windows to others.

    Raises:
        Pos2DError: what a worker raised, such as that it cannot load the model, or what Ray did.
    """
    import ray
    import ray.data

    source = ray.data.from_arrow([_table(window) for window in windows])
    answered = source.map_batches(
        WindowWorker,
        fn_constructor_args=(task,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=placement.workers),
        num_cpus=placement.cores,
        num_gpus=placement.gpus or None,
    )
    context = answered.context
    context.execution_options.preserve_order = True
    context.enable_progress_bars = context.print_on_execution_start = False
    with _quiet():
        try:
            for table in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in table.to_pylist():
                    if row[FAILURE] is not None:
                        raise pickle.loads(row[FAILURE])
                    yield Answers(row[RECORDS], row[COUNT], row[NEW_TOKENS])
        except ray.exceptions.RayError as error:
            raise Pos2DError(f"Ray ended the run: {' '.join(str(error).split())}") from error


def _table(window: Window) -> "pa.Table":
    """A block of one row for Ray Data: the number of the first line, and the bytes of all lines."""
    import pyarrow as pa

    columns = {FIRST: [window[0][0]], LINES: [b"".join(raw for _, raw in window)]}
    return pa.table(columns, schema=pa.schema([(FIRST, pa.int64()), (LINES, pa.large_binary())]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray Data's log, which has files of its own, off standard error."""
    logger = logging.getLogger("ray.data")
    shown = [handler for handler in logger.handlers if type(handler).__name__ == "PlainRayHandler"]
    for handler in shown:
        logger.removeHandler(handler)
    try:
        yield
    finally:
        for handler in shown:
            logger.addHandler(handler)
