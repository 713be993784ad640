"""The Ray cluster that a run uses: joined, or started on this machine; what it has room for."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from shared.cli.console import count
from shared.device import default_device
from shared.errors import UserError, first_line

LOCAL = "local"
"""The address of a cluster on only this machine, which lasts as long as the run."""

# Captions and messages are all that passes through it; Ray would take a third of the memory.
_OBJECT_STORE_BYTES = 100_000_000
# Ray gives its workers the driver's folder before all packages.
_IN_WORKERS = {"worker_process_setup_hook": "wandistill_cli.ours_first"}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run asks of a cluster."""

    address: str | None
    """None: `LOCAL`."""
    device: str
    """That actors are to compute on; auto: a GPU where a node has one."""
    cpus: int
    """Of one actor, if a node has as many."""
    actors: int | None
    """At most; None: as many as there is room for."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A connection, and what one actor asks of a node."""

    device: str
    """That actors compute on."""
    cpus: int
    gpus: int
    most: int | None
    """Actors at most; None: as many as there is room for."""

    @property
    def demand(self) -> str:
        """What one actor needs, in words."""
        return f"{self.cpus} CPU" + (f" and {self.gpus} GPU" if self.gpus else "")

    def room(self) -> int:
        """Actors that the nodes which live now could hold if they did nothing else."""
        if self.most is not None:
            return self.most
        demand = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return sum(
            int(min(resources.get(name, 0) // number for name, number in demand.items()))
            for resources in _living()
        )

    def actor(self, kind: type, threads: int) -> Any:
        """A class whose `remote` makes one on a node with room for it; Ray calls its methods in so
        many threads."""
        import ray

        return ray.remote(kind).options(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_restarts=0,
            max_concurrency=threads,
            scheduling_strategy="SPREAD",
        )

    def described(self) -> str:
        """A line about the nodes, what they have, and what an actor takes of it."""
        nodes = _living()
        cpus = sum(int(resources.get("CPU", 0)) for resources in nodes)
        gpus = sum(int(resources.get("GPU", 0)) for resources in nodes)
        has = f"{cpus} CPU" + (f", {gpus} GPU" if gpus else "")
        return f"cluster  {count(len(nodes), 'node')}, {has}; an actor takes {self.demand}"


@contextmanager
def connected(wanted: Wanted) -> Iterator[Cluster]:
    """Join the cluster of its address, or start one; leave it, or end it, at the end.

    Takes over SIGTERM, so it comes before `catch_signals`. Raises UserError where Ray is not
    installed, there is no such cluster, or the one of this machine has no room for an actor.
    """
    # Read when ray is imported: no word to its makers; the second spares users a warning.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--engine ray: Ray is not installed. Install it on every node: "
            "pip install 'wandistill[ray]'."
        ) from error
    address = wanted.address or LOCAL
    own = address == LOCAL
    options: dict[str, Any] = {}
    if own:
        cores = len(os.sched_getaffinity(0))
        options = {
            # Two actors on two cores are slow, but they are what --ray-actors 2 asks for.
            "num_cpus": max(cores, (wanted.actors or 1) * wanted.cpus),
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    try:
        ray.init(
            address,
            runtime_env=_IN_WORKERS,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **options,
        )
    except Exception as error:  # ConnectionError, ValueError, RuntimeError, a bare Exception …
        raise UserError(
            f"--ray-address: cannot {'start' if own else 'join'} the cluster {address} "
            f"({first_line(error)}). Expected HOST:PORT of a head node, the command run on one of "
            "the cluster's nodes with its Ray and Python versions and, where it asks for a token, "
            f"RAY_AUTH_MODE=token; {LOCAL} starts one on this machine."
        ) from error
    try:
        with redirect_stdout(sys.stderr):  # Ray's threads print about dead workers as they learn
            yield _cluster(wanted, own)
    finally:
        ray.shutdown()


def _cluster(wanted: Wanted, own: bool) -> Cluster:
    nodes = _living()
    device = wanted.device
    has_gpu = any(resources.get("GPU", 0) for resources in nodes)
    if device == "auto":
        device = "cuda" if has_gpu or (own and default_device() == "cuda") else "cpu"
    gpus = 1 if device.partition(":")[0] == "cuda" else 0
    # As many as an actor wants, but no more than keeps a GPU idle for want of cores.
    shares = [
        int(resources.get("CPU", 0) // max(1, resources.get("GPU", 0)))
        for resources in nodes
        if bool(resources.get("GPU", 0)) or not gpus
    ]
    usable = [share for share in shares if share]
    cpus = max(1, min([wanted.cpus, *usable]))
    if own and gpus and not has_gpu:
        raise UserError(
            f"--device: found {device}, but this machine has no GPU that Ray can see. Expected "
            "auto or cpu, or --ray-address of a cluster that has some."
        )
    return Cluster(device=device, cpus=cpus, gpus=gpus, most=wanted.actors)


def _living() -> list[dict[str, float]]:
    """The resources of each living node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
