"""The number of threads: affinity, the quotas of both versions of control groups, the environment, and the option."""

import os
from pathlib import Path

import pytest

from pos2d import threads
from pos2d.errors import UsageError
from pos2d.threads import ThreadOptions, cpu_quota, default_threads, usable_cores


def group(root: Path, **files: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text + "\n")


def quota_of(tmp_path: Path, membership: str) -> float | None:
    (tmp_path / "membership").write_text(membership)
    return cpu_quota(tmp_path / "cgroup", tmp_path / "membership")


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("max 100000", "150000 100000", 1.5),
        ("200000 100000", "max 100000", 2.0),
        ("50000 100000", "300000 100000", 0.5),
        ("max 100000", "max 100000", None),
        ("", "damaged", None),
    ],
)
def test_the_smallest_quota_of_all_groups_around_holds(
    tmp_path: Path, outer: str, inner: str, expected: float | None
) -> None:
    group(tmp_path / "cgroup" / "machine", cpu__max=outer)
    group(tmp_path / "cgroup" / "machine" / "job", cpu__max=inner)
    assert quota_of(tmp_path, "0::/machine/job\n") == expected


def test_quotas_of_version_1(tmp_path: Path) -> None:
    group(tmp_path / "cgroup" / "cpu,cpuacct" / "box", cpu__cfs_quota_us="250000", cpu__cfs_period_us="100000")
    group(tmp_path / "cgroup" / "cpu,cpuacct", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert quota_of(tmp_path, "5:memory:/box\n4:cpu,cpuacct:/box\n") == 2.5


def test_a_container_sees_its_group_at_the_root_of_the_mount(tmp_path: Path) -> None:
    group(tmp_path / "cgroup", cpu__max="100000 100000")
    assert quota_of(tmp_path, "0::/outside/of/the/container\n") == 1.0


def test_no_control_groups_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "membership") is None


def test_the_environment_and_the_quota_limit_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    cores = usable_cores()
    assert default_threads() == cores <= (os.cpu_count() or 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1,4")
    assert default_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert default_threads() == cores
    monkeypatch.setattr(threads, "cpu_quota", lambda: 0.2)
    assert default_threads() == 1


@pytest.mark.parametrize("count", [0, -1, 1025, 2.0, "two", True])
def test_numbers_that_no_machine_has_are_refused(count: object) -> None:
    with pytest.raises(UsageError, match="`threads`"):
        ThreadOptions(threads=count)  # type: ignore[arg-type]
