"""The connection to a Ray cluster, or a cluster of this machine alone that ends with the connection."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from pos2d.errors import UsageError
from pos2d.runtime.cluster.placement import Machine
from pos2d.threads import usable_cores

VARIABLE = "RAY_ADDRESS"
# What makes Ray start a cluster of its own, whatever runs on this machine.
NEW = "local"
# The cluster that runs on this machine.
RUNNING = "auto"
# Texts go through the object store, which holds 30 % of the memory by default; what does not fit goes to the disk.
OBJECT_STORE_BYTES = 512 * 2**20
CONNECT_SECONDS = 10
# Unless the user has set them: Ray reports nothing to its makers, and the log of its core, which is written to standard
# error as well, has only what ends the process.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[bool]:
    """Connect to the cluster at ``address``, or as the variable RAY_ADDRESS says, or start one on this machine.

    A caller who is connected already keeps that connection; else it ends with the block, and with it a cluster that
    was started for it. Yields whether that is so.

    Raises:
        UsageError: there is no cluster at the address, or one with another version of Ray or Python.
    """
    import ray

    if ray.is_initialized():
        if address is not None:
            raise UsageError(
                "`ray_address` has no effect, since this process is connected to Ray already; leave it out"
            )
        yield False
        return
    address = address or os.environ.get(VARIABLE) or NEW
    # Ray prints what happened to a worker on standard output.
    with contextlib.redirect_stdout(sys.stderr):
        if address != NEW:
            check_reachable(address)
        with _own_signals(), _silent_standard_error():
            _init(address)
        try:
            yield address == NEW
        finally:
            ray.shutdown()


def machines() -> list[Machine]:
    """The machines of the cluster that are alive now."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Machine(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in resources]


def machines_in_reach() -> list[Machine]:
    """The machines of the cluster that this process is connected to or that runs here, else this machine alone."""
    import ray

    if ray.is_initialized():
        return machines()
    try:
        check_reachable(RUNNING)
        ray.init(address=RUNNING, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, UsageError):
        import torch

        return [Machine(usable_cores(), torch.cuda.device_count())]
    try:
        return machines()
    finally:
        ray.shutdown()


def _init(address: str) -> None:
    """Start or join a cluster; what Ray logs below an error is left out.

    Raises:
        UsageError: as :func:`connected`.
    """
    import ray

    quiet = {"configure_logging": True, "logging_level": logging.ERROR, "log_to_driver": False}
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address == NEW:
        ray.init(
            address=NEW,
            num_cpus=usable_cores(),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            **quiet,
        )
        return
    try:
        ray.init(address=address, **quiet)
    except (
        ConnectionError,
        ray.exceptions.RayError,
        RuntimeError,
        ValueError,
    ) as error:  # such as another version, or no token
        reason = " ".join(str(error).split()).replace("`", "'")
        raise UsageError(f"`ray_address` {address}: {reason}") from None


def check_reachable(address: str) -> None:
    """Check that something listens at HOST:PORT, which Ray itself finds out after minutes.

    Raises:
        UsageError: nothing does, or it is no such address.
    """
    if address == RUNNING:
        address = os.environ.get(VARIABLE) or noted_address() or ""
        if not address:
            raise UsageError("`ray_address` auto: no Ray runs on this machine; ray start --head starts it")
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal():
        raise UsageError(f"`ray_address` {address!r} must be HOST:PORT, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"`ray_address` {address}: nothing answers there ({reason}); ray status shows the address"
        ) from None


def noted_address() -> str | None:
    """The address of the cluster that was last started on this machine, from Ray's own note, which may be old."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        return (Path(folder) / "ray" / "ray_current_cluster").read_text(encoding="utf-8").strip()
    except OSError:
        return None


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM that Ray replaces when it connects."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _silent_standard_error() -> Iterator[None]:
    """Drop what is written to the file of standard error; the core of Ray says there that its log level is set."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
