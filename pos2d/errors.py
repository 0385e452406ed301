"""Every error that this project raises on purpose, and the exit code that the command line gives it.

    Pos2DError            1  a defect of ours
    ├── UsageError        2  the call itself is wrong: flags that contradict each other
    ├── InputError        3  bad or mismatching input: adapter, base, artifact, prompt
    ├── UnsafeInputError  4  input that could run code or leave its directory
    ├── StorageError      5  disk full, unreadable or unwritable files
    ├── OutputError       6  the output exists already or is busy
    └── ParityError       7  the artifact does not agree with its reference

Messages are one sentence that names the file, the key and the cure. Only ``cli.py`` turns them into an exit code.
"""

from typing import ClassVar


class Pos2DError(Exception):
    """Base of the tree; raised itself only for a defect of ours."""

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
