"""Ray for `wanprep encode`: a cluster while the run lasts, and the engine that works on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from preprocess.encode.config import EncodeConfig
from preprocess.encode.engine import Elsewhere
from shared.cluster.ray_cluster import Wanted, connected


@contextmanager
def ray_engines(config: EncodeConfig) -> Iterator[Elsewhere]:
    """Join or start the cluster. UserError where Ray is not installed or there is no cluster."""
    wanted = Wanted(
        address=config.ray_address,
        device=config.device,
        cpus=1 + config.workers,  # an encoder and its decoders
        actors=config.ray_actors,
    )
    with connected(wanted) as cluster:
        from preprocess.cluster.ray_engine import RayEngine  # imports ray, which is installed here

        yield Elsewhere(
            device=cluster.device,
            described=cluster.described(),
            engine=partial(RayEngine, cluster),
        )
