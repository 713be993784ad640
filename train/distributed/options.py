"""Options that say in which processes a run computes, and on which device."""

from dataclasses import dataclass
from typing import Annotated

import typer

from train.options import DEVICE, PROCESSES


# fmt: off
@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """As they were given; `placement.place` says what they mean here."""

    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto uses a GPU if available.", rich_help_panel=DEVICE)] = "auto"
    num_processes: Annotated[int | None, typer.Option(metavar="N", envvar="NUM_PROCESS", help="Processes over all machines, one per GPU; this command starts those of its machine.", show_default="1, or one per GPU with a strategy", rich_help_panel=PROCESSES)] = None
    num_machines: Annotated[int, typer.Option(metavar="N", envvar="WORLD_SIZE", help="Machines (nodes) of the run; start the same command on each.", rich_help_panel=PROCESSES)] = 1
    machine_rank: Annotated[int, typer.Option(metavar="N", envvar="RANK", help="Rank of this machine among them, from 0.", rich_help_panel=PROCESSES)] = 0
    main_process_ip: Annotated[str, typer.Option(metavar="HOST", envvar="MASTER_ADDR", help="Address of machine 0.", rich_help_panel=PROCESSES)] = "127.0.0.1"
    main_process_port: Annotated[int | None, typer.Option(metavar="PORT", envvar="MASTER_PORT", help="Rendezvous port of machine 0.", show_default="a free one, on one machine", rich_help_panel=PROCESSES)] = None
    ddp_timeout: Annotated[int, typer.Option(metavar="S", help="Seconds that a process waits for the others before the run fails.", rich_help_panel=PROCESSES)] = 1200
