"""Ray for `wanprep encode`: a cluster while the run lasts, and the engine that works on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from preprocess.cluster.ray_cluster import Cluster, connected
from preprocess.encode.config import EncodeConfig
from preprocess.encode.engine import Engine
from shared.format.fingerprint import Fingerprint
from shared.interrupt import Interruption
from shared.models.spec import ModelSpec


@dataclass(frozen=True)
class RayEngines:
    """What `preprocess.encode.run.encode` is handed in place of this process (its `Elsewhere`)."""

    cluster: Cluster

    @property
    def device(self) -> str:
        """That actors compute on."""
        return self.cluster.device

    def described(self) -> str:
        return f"cluster  {self.cluster.described()}; an actor takes {self.cluster.demand}"

    def engine(
        self,
        config: EncodeConfig,
        spec: ModelSpec,
        fingerprint: Fingerprint,
        signals: Interruption,
        say: Callable[[str], None],
    ) -> Engine:
        from preprocess.cluster.ray_engine import RayEngine  # imports ray, which is installed here

        return RayEngine(self.cluster, config, spec, fingerprint, signals, say)


@contextmanager
def ray_engines(config: EncodeConfig) -> Iterator[RayEngines]:
    """Join or start the cluster. UserError where Ray is not installed or there is no cluster."""
    with connected(config) as cluster:
        yield RayEngines(cluster)
