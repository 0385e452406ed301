"""Options of where the lines of a batch are computed."""

import importlib.util
from dataclasses import dataclass
from typing import Literal

from pos2d.errors import UsageError
from pos2d.options import check_options, option

EngineName = Literal["local", "ray"]
# What the extra ``ray`` installs, as modules that a batch imports.
EXTRA = ("ray", "pyarrow")
# Addresses of Ray Client, on which Ray Data does not run.
CLIENT = "ray://"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """Where lines are computed.

    Raises:
        UsageError: a value that cannot be used, an option of Ray without Ray, or Ray is not installed.
    """

    engine: EngineName = option(
        "local",
        "local: this process computes. ray: workers of Ray compute, each with a model of its own, on this machine or "
        "on a cluster.",
    )
    ray_address: str | None = option(
        None,
        "Ray cluster to connect to, as HOST:PORT; auto is the one that runs on this machine.",
        metavar="ADDRESS",
        default_text="RAY_ADDRESS, else Ray is started for this run, on this machine alone",
    )
    num_workers: int | None = option(
        None,
        "Number of workers of Ray.",
        minimum=1,
        maximum=100_000,
        metavar="N",
        default_text="one for each machine, or for each GPU",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.engine == "local":
            for name in ("ray_address", "num_workers"):
                if getattr(self, name) is not None:
                    raise UsageError(f"`{name}` has no effect without `engine='ray'`; give both, or leave it out")
            return
        if (self.ray_address or "").startswith(CLIENT):
            raise UsageError(
                f"`ray_address` {self.ray_address}: Ray Data does not run through Ray Client; start the command on a "
                "machine of the cluster, or with ray job submit, and give HOST:PORT or auto"
            )
        if not all(importlib.util.find_spec(name) for name in EXTRA):
            raise UsageError("`engine='ray'` needs further packages; install them with: pip install 'pos2d[ray]'")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOptions:
    """How many replicas of a server run on a cluster.

    Raises:
        UsageError: a value that cannot be used, or fewer replicas at most than at least.
    """

    min_replicas: int = option(1, "Number of replicas that always run.", minimum=0)
    max_replicas: int | None = option(
        None,
        "Number of replicas at most.",
        minimum=1,
        default_text="one for each machine, or for each GPU",
    )
    target_ongoing_requests: float | None = option(
        None,
        "Number of requests for each replica from which on further replicas are started.",
        minimum=0.1,
        default_text="`max_running_branches`",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise UsageError(f"`max_replicas` {self.max_replicas} is less than `min_replicas` {self.min_replicas}")
