"""Kill a merge with -9 at each of its write points, look at what it left, and resume it.

A program of its own, ``python -m tests.kill_points BASE LORA DIRECTORY [--force]``: it imports torch but never runs it,
so that forking is safe and every run starts in milliseconds. A write point is an open for writing, a write (cut in
half), an fsync, rename, mkdir, chmod or removal; each state between two of them is one that a kill can leave. Prints
how many points there were; a broken promise ends it with a traceback.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # noqa: F401 - everything is imported before the first fork
import torch  # noqa: F401
from huggingface_hub import ModelCard  # noqa: F401

from pos2d import exporter
from pos2d.exporter.artifact import staging

AUDITED = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
Tree = dict[str, bytes]


def main() -> None:
    base, lora, place = (Path(argument) for argument in sys.argv[1:4])
    force = "--force" in sys.argv
    new, old, out = place / "new", place / "old", place / "out"
    in_child(lambda: exporter.merge(base, lora, new))
    in_child(lambda: exporter.merge(base, lora, old, branch_stride=7))
    reference, former = tree(new), tree(old)
    assert reference != former
    point = 0
    while True:
        point += 1
        shutil.rmtree(out, ignore_errors=True)
        if force:
            shutil.copytree(old, out)
        killed = in_child(partial(killed_at, point, lambda: exporter.merge(base, lora, out, force=force)))
        found = tree(out) if out.exists() else None
        allowed = [reference, former] if force else [reference, None]
        assert found in allowed, f"point {point}: the target is half-written"
        if not killed:
            assert found == reference
            break
        in_child(lambda: exporter.merge(base, lora, out, resume=True, force=force))
        assert tree(out) == reference, f"point {point}: the resumed merge is not the same"
        left = {path.name for path in place.iterdir()} - {"new", "old", "out"}
        assert not left, f"point {point}: {left} were left"
    print(point - 1)


def in_child(work: Callable[[], object]) -> bool:
    """Whether the child was killed; any other failure of it is ours."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert status == 0, "the child failed"
    return False


def killed_at(point: int, work: Callable[[], object]) -> None:
    """Run ``work`` in this process and die at its ``point``-th write point."""
    count = 0

    def step(half: Callable[[], object] = lambda: None) -> None:
        nonlocal count
        count += 1
        if count == point:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writing = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writing or event in AUDITED:
            step()

    def counted(function: Callable[..., Any], cut: bool) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if cut:
                descriptor, data, *rest = arguments
                step(lambda: function(descriptor, data[: len(data) // 2], *rest))
            else:
                step()
            return function(*arguments)

        return call

    for name, cut in (("write", True), ("pwrite", True), ("fsync", False), ("sendfile", False)):
        setattr(os, name, counted(getattr(os, name), cut))
    staging._exchange = counted(staging._exchange, cut=False)
    sys.addaudithook(audit)
    work()


def tree(directory: Path) -> Tree:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


if __name__ == "__main__":
    main()
