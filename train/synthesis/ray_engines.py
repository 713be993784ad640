"""Ray for `wantrain synthesize`: a cluster while the run lasts, and the engine that works on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from shared.cluster.ray_cluster import Wanted, connected
from train.synthesis.engine import MakeEngine
from train.synthesis.job import Job

_CPUS = 2
"""Of an actor: an expert, and what packs its clips into shards."""


@contextmanager
def on_cluster(job: Job) -> Iterator[tuple[Job, MakeEngine, str]]:
    """Join or start the cluster: the job on its device, the engine, a line about it. UserError
    where Ray is not installed or there is no cluster."""
    config = job.config
    wanted = Wanted(
        address=config.ray_address, device=config.device, cpus=_CPUS, actors=config.ray_actors
    )
    with connected(wanted) as cluster:
        from train.synthesis.ray_engine import RayEngine  # imports ray, which is installed here

        yield job.on_cluster(cluster.device), partial(RayEngine, cluster), cluster.described()
