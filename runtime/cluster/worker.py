"""A worker: a process of Ray that has a model of its own and answers windows of lines with it."""

import io
import pickle
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pos2d import __version__
from pos2d.errors import InputError, Pos2DError
from pos2d.runtime.backends.options import LoadOptions
from pos2d.runtime.batching.line_answers import LineOptions
from pos2d.runtime.batching.recipe import model_facts
from pos2d.runtime.cluster.attempts import MOST
from pos2d.runtime.opening.opened_model import OpenedModel, open_model
from pos2d.runtime.text.artifact import LoadedArtifact

if TYPE_CHECKING:
    import pyarrow as pa

# Columns of a window on its way to a worker, and of its answers on their way back.
FIRST, LINES = "first", "lines"
RECORDS, COUNT, NEW_TOKENS, FAILURE = "records", "count", "new_tokens", "failure"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What all workers of a run do.

    ``load`` makes the model of one that is open, ``begin`` counts an attempt at the window that begins with a line,
    ``facts`` are those of the model that the run began with, and ``version`` is that of pos2d there.
    """

    model: str
    loading: LoadOptions
    load: Callable[[OpenedModel, LoadOptions], LoadedArtifact]
    lines: LineOptions
    done: int
    begin: Callable[[int], int]
    facts: Mapping[str, Any]
    version: str = __version__

    def loaded(self) -> LoadedArtifact:
        """The model, on this machine.

        Raises:
            InputError: another model has this name here, or another version of pos2d is installed.
            Pos2DError: as :func:`pos2d.load`.
        """
        here = f"on the machine {socket.gethostname()}"
        if self.version != __version__:
            raise InputError(f"pos2d is {__version__} {here}, and {self.version} where the run began; install that")
        try:
            opened = open_model(self.model)
        except Pos2DError as error:
            raise type(error)(f"{here}: {error}; every machine must have the model under the same name") from None
        if model_facts(opened) != self.facts:
            raise InputError(f"{here}, {self.model} is another model than where the run began; copy that one there")
        return self.load(opened, self.loading)


class WindowWorker:
    """What Ray Data calls, in the process of the worker. Errors that are ours come back as values."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._failure: Pos2DError | None = None
        try:
            self._model = task.loaded()
        except Pos2DError as error:
            self._failure = error

    def __call__(self, windows: "pa.Table") -> "pa.Table":
        """Answer windows: a table with the records of each, or with the error that ends the run."""
        import pyarrow as pa

        rows = [self.answered(row) for row in windows.to_pylist()]
        types = {FIRST: pa.int64(), RECORDS: pa.large_binary(), COUNT: pa.int64(), NEW_TOKENS: pa.int64()}
        return pa.Table.from_pylist(rows, schema=pa.schema([*types.items(), (FAILURE, pa.large_binary())]))

    def answered(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Answer one window: the columns of its row."""
        if self._failure is not None:
            return _failed(row[FIRST], self._failure)
        if self._task.begin(row[FIRST]) > MOST:
            return _failed(row[FIRST], _poisoned(row))
        window = list(enumerate(io.BytesIO(row[LINES]), row[FIRST]))
        try:
            parts = list(self._task.lines.answers(self._model, window, self._task.done))
        except Pos2DError as error:
            return _failed(row[FIRST], error)
        return {
            FIRST: row[FIRST],
            RECORDS: b"".join(part.data for part in parts),
            COUNT: sum(part.lines for part in parts),
            NEW_TOKENS: sum(part.new_tokens for part in parts),
            FAILURE: None,
        }


def _poisoned(row: Mapping[str, Any]) -> Pos2DError:
    last = row[FIRST] + row[LINES].rstrip(b"\n").count(b"\n")
    return Pos2DError(
        f"the worker of Ray that answered lines {row[FIRST]} to {last} ended {MOST} times, perhaps for lack of memory; "
        "lower `num_workers` or `max_branches`, and the same command continues"
    )


def _failed(first: int, error: Pos2DError) -> dict[str, Any]:
    return {FIRST: first, RECORDS: b"", COUNT: 0, NEW_TOKENS: 0, FAILURE: pickle.dumps(error)}
