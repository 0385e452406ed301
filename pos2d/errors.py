"""All errors that this project raises on purpose, with their exit codes on the command line.

    Pos2DError            1  an internal error
    ├── UsageError        2  the call itself is wrong: a value out of range, parameters that contradict each other
    ├── InputError        3  bad or mismatching input: adapter, base, artifact, prompt
    ├── UnsafeInputError  4  input that could run code or leave its directory
    ├── StorageError      5  disk full, unreadable or unwritable files
    ├── OutputError       6  the output exists already or is busy
    ├── ParityError       7  the artifact does not agree with its reference
    └── HubError          8  the Hugging Face Hub cannot be reached, or refuses what is sent to it

Messages are one sentence that names the file, the key and the cure; parameters are in backticks. Only the command line
(``commands/shared/errors.py``) prints them and sets the exit code.
"""

from typing import ClassVar


class Pos2DError(Exception):
    """Base of the tree; raised itself only for an internal error."""

    exit_code: ClassVar[int] = 1


class UsageError(Pos2DError):
    exit_code = 2


class InputError(Pos2DError):
    exit_code = 3


class UnsafeInputError(Pos2DError):
    exit_code = 4


class StorageError(Pos2DError):
    exit_code = 5


class OutputError(Pos2DError):
    exit_code = 6


class ParityError(Pos2DError):
    exit_code = 7


class HubError(Pos2DError):
    exit_code = 8
