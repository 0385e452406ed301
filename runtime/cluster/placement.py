"""How many workers run, and how many cores and GPUs each of them has."""

from collections.abc import Sequence
from dataclasses import dataclass

from pos2d.errors import UsageError
from pos2d.runtime.backends.options import LoadOptions


@dataclass(frozen=True, slots=True)
class Machine:
    """The cores and GPUs that Ray may use of one machine."""

    cores: int
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """``workers`` with ``cores`` cores, which is their number of threads, and ``gpus`` GPUs each: none or one."""

    workers: int
    cores: int
    gpus: int = 0


def place_workers(
    machines: Sequence[Machine],
    *,
    most: int | None = None,
    workers: int | None = None,
    threads: int | None = None,
    on_gpus: bool = False,
    named: str = "num_workers",
) -> Placement:
    """The placement of ``workers`` workers, of which at most ``most`` have something to do.

    By default there is one for each machine that has cores, or for each GPU. With ``threads`` every worker has so many
    cores; without, it has the largest number with which all workers find room, so that no core has two threads.
    ``named`` is the option that ``workers`` comes from.

    Raises:
        UsageError: the machines have no room for the workers.
    """
    usable = [machine for machine in machines if machine.cores and (machine.gpus or not on_gpus)]
    if not usable:
        what = "no machine with a GPU" if on_gpus else "no machine with cores"
        raise UsageError(f"Ray has {what}; add machines to the cluster, or use another `device`")
    wanted = workers or (sum(machine.gpus for machine in usable) if on_gpus else len(usable))
    wanted = wanted if most is None else min(wanted, most)
    largest = max(machine.cores for machine in usable)
    for cores in [threads] if threads else range(largest, 0, -1):
        room = sum(_room(machine, cores, on_gpus) for machine in usable)
        if room >= wanted:
            return Placement(wanted, cores, int(on_gpus))
    needs = f"{cores} {'core' if cores == 1 else 'cores'}{' and a GPU' if on_gpus else ''}"
    raise UsageError(
        f"Ray has no room for {wanted} {'worker' if wanted == 1 else 'workers'} with {needs} each, but for {room}; "
        f"lower `{named}`{' or `threads`' if threads else ''}, or add machines"
    )


def _room(machine: Machine, cores: int, on_gpus: bool) -> int:
    """The number of workers that find room on a machine."""
    return min(machine.cores // cores, machine.gpus) if on_gpus else machine.cores // cores


def check_loading(loading: LoadOptions) -> None:
    """Check that a process of Ray, which has the cores and the GPU that Ray gives it, can load a model so.

    Raises:
        UsageError: several devices for one worker, or a certain GPU.
    """
    if loading.device_map is not None:
        raise UsageError("`device_map` spreads a model over devices, and a process of Ray has one; leave it out")
    if loading.device.startswith("cuda:"):
        raise UsageError(f"`device` {loading.device}: Ray chooses the GPU of every process; give `device='cuda'`")


def uses_gpu(device: str, kind: str, machines: Sequence[Machine]) -> bool:
    """Whether every process of Ray needs a GPU: ``auto`` takes one for models on torch where the cluster has any."""
    if device == "auto":
        return kind != "onnx" and any(machine.gpus for machine in machines)
    return device == "cuda"
