"""The options of a command that can run on a Ray cluster, and how they go together."""

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from shared.cache.ranks import WithRank
from shared.cli.checks import AT_LEAST_1
from shared.errors import UserError
from shared.io.object_store import local_path

CLUSTER = "Cluster"


# fmt: off
@dataclass(frozen=True, kw_only=True)
class WithRay(WithRank):
    """A configuration of a command that ranks run together, or actors of a Ray cluster."""

    engine: Annotated[Literal["local", "ray"], typer.Option(help="Where the models run: local is this process (or one per GPU under torchrun, accelerate, srun); ray is a Ray cluster, whose nodes may come and go.", rich_help_panel=CLUSTER)] = "local"
    ray_address: Annotated[str | None, typer.Option(metavar="HOST:PORT", envvar="RAY_ADDRESS", help="Head node of the Ray cluster, or auto: the cluster that this machine belongs to. Run the command on one of its nodes.", show_default="a local cluster", rich_help_panel=CLUSTER)] = None
    ray_actors: Annotated[int | None, typer.Option(metavar="N", help="Maximum number of actors; each has a model, on a GPU of its own if there are any.", show_default="as many as fit", rich_help_panel=CLUSTER), AT_LEAST_1] = None
    # fmt: on

    def check_engine(self, output: str, waiting: str) -> None:
        """UserError for what can't be on a cluster. `waiting`: what lies in `output` meanwhile."""
        if self.engine == "ray" and self.rank.world > 1:
            raise UserError(
                f"--engine ray: started as rank {self.rank.number} of {self.rank.world}. Ray "
                "shares the work out by itself: start one process, without torchrun or srun."
            )
        if self.engine == "ray" and (self.ray_address or "").startswith("ray://"):
            raise UserError(
                f"--ray-address: {self.ray_address} is a Ray Client's; expected HOST:PORT of the "
                "head node, and the command run on one of the cluster's nodes."
            )
        if self.engine == "ray" and local_path(output) is None:
            raise UserError(
                f"--engine ray: --output is {output}, and {waiting} wait in it for the other "
                "actors. Expected a folder that all nodes share; ranks (torchrun, srun) write to "
                "object stores."
            )
        if self.engine == "local" and self.ray_actors is not None:
            raise UserError(f"--ray-actors: {self.ray_actors} without --engine ray. Add that.")
