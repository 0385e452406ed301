"""The number of threads that compute: what the caller asks for, else what this process may use of the machine."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from pos2d.options import check_options, option

MAX_THREADS = 1024
CGROUPS = Path("/sys/fs/cgroup")
# Where the libraries of OpenMP, torch among them, look for their number of threads.
VARIABLE = "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadOptions:
    """How many threads compute.

    Raises:
        UsageError: a number out of range.
    """

    threads: int | None = option(
        None,
        "Number of threads that compute on the CPU. Fewer are faster where other programs use the same cores.",
        minimum=1,
        maximum=MAX_THREADS,
        metavar="N",
        default_text="the cores that this process may use",
    )

    def __post_init__(self) -> None:
        check_options(self)


def default_threads() -> int:
    """The number of threads where none is asked for: ``OMP_NUM_THREADS`` if it is set, at most the usable cores."""
    first = os.environ.get(VARIABLE, "").split(",")[0].strip()
    return min(int(first), usable_cores()) if first.isdecimal() and int(first) else usable_cores()


def usable_cores() -> int:
    """The number of cores that this process may use: its affinity, and the CPU quota of its container, rounded up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def cpu_quota(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPU time per second that the control groups of Linux grant this process, None if they do not limit it.

    The limits of all groups around the process hold, in version 2 (``cpu.max``) and version 1 (``cpu.cfs_quota_us``).
    """
    quotas = [_quota(folder) for folder in _groups(root, membership)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _groups(root: Path, membership: Path) -> list[Path]:
    """The directories of the process's CPU control groups, from the innermost to the root of the mount."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / controllers if controllers else root
        # A container may see its own group at the root of the mount, whatever its path is outside.
        inner = mount / path.strip("/")
        folders += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount)]
    return folders


def _quota(folder: Path) -> float | None:
    """The quota of one control group, in cores."""
    try:
        if (folder / "cpu.max").is_file():
            limit, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            limit, period = (
                (folder / name).read_text(encoding="ascii").strip()
                for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            )
        # Without a limit the file says "max", or -1 in version 1.
        return int(limit) / int(period) if limit.isdecimal() and int(limit) and int(period) else None
    except (OSError, ValueError):
        return None
