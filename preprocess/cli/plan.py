"""`wanprep plan`: the options of `wanprep encode`, and what it would do with them."""

import json
from typing import TYPE_CHECKING

import typer

from preprocess.encode.config import PlanConfig, for_this_machine
from shared.cli.support import echo, echo_data
from shared.errors import UserError
from shared.io.mirror import open_store
from shared.io.names import on_one_line
from shared.io.store import Store

if TYPE_CHECKING:
    from preprocess.encode.dry_run import Foreseen

_NAMED = 5  # of a list, so many are printed


def plan(config: PlanConfig, _: typer.Context) -> None:
    r"""Print what an encode run with these options would do.

    Examples:
        # what `wanprep encode` would do with datasets/
        wanprep plan

        # at 720P, with a time estimate from a few clips that are encoded now
        wanprep plan --size 960 --train-data-dir my/clips --measure

        # the toy clips
        wanprep plan --model toy --train-data-dir toy-clips --size 64 \
            --video-sample-n-frames 17 --video-sample-stride 1 --output toy-shards
    """
    from rich.console import Console

    from preprocess.encode.dry_run import foresee

    with open_store(config.output, writer=config.rank.number).pulled() as output:
        console = Console(stderr=True)
        foreseen = foresee(for_this_machine(config), output, console, measure=config.measure)
    if config.json:
        echo_data(json.dumps(foreseen.to_json(), indent=1, ensure_ascii=False))
    else:
        for line in page(foreseen, output, prune=config.prune):
            echo(line)
        # Not for a cache that has begun: its latents are all of one dtype.
        if config.vae_dtype == "fp32" and foreseen.new and not foreseen.in_shards:
            echo(
                "faster   --vae-dtype bf16: half the VAE's memory, about a third of its time on a "
                "CPU; latents differ by 0.3% (relative L2)"
            )
    if not foreseen.samples:
        raise UserError(
            f"dataset: nothing in it can be encoded, {len(foreseen.rejected)} are rejected. Mend "
            "them, or set --train-data-dir (or DATASET_NAME) to other media."
        )
    if len(foreseen.rejected) > config.max_bad:
        raise UserError(
            f"{len(foreseen.rejected)} of the dataset would be rejected, more than --max-bad "
            f"{config.max_bad}. Mend them, or accept them with --max-bad {len(foreseen.rejected)}."
        )


def page(plan: "Foreseen", output: Store, *, prune: bool) -> list[str]:
    """What people read."""
    head = ("shape", "samples", "in shards", "new", "shortened", "upscaled", "new MB")
    rows = [
        (
            f"{one.width}x{one.height}, "
            + ("image" if one.frames == 1 else f"{one.frames} frames"),
            *map(str, (one.samples, one.in_shards, one.new, one.shortened, one.upscaled)),
            f"{one.bytes / 1e6:.2f}",
        )
        for one in plan.buckets
    ]
    counts = (plan.samples, plan.in_shards, plan.new)
    short = (sum(one.shortened for one in plan.buckets), sum(one.upscaled for one in plan.buckets))
    new_bytes = sum(one.bytes for one in plan.buckets)
    total = ("in all", *map(str, counts + short), f"{new_bytes / 1e6:.2f}")
    widths = [max(map(len, column)) for column in zip(head, *rows, total, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in (head, *rows, total)
    ]
    rejected = [f"{one.source}: {one.reason}" for one in plan.rejected]
    lines += _listed("rejected", rejected)
    for kind, changes in plan.changes.items():
        lines += _listed(kind, [f"{source}: {change}" for source, change in changes])
    if plan.source_frames:
        share = plan.dropped_frames / plan.source_frames
        lines.append(
            f"frames   {plan.dropped_frames} of {plan.source_frames} ({share:.0%}) of the videos "
            "lie in no clip"
        )
    if plan.leftover:
        then = "would be removed" if prune else "stay (but see --prune)"
        if plan.first_rule and not prune:
            then += ", but for those that an older frame rule misread: they are replaced"
        lines.append(f"leftover {plan.leftover} in {output} are not in this dataset and {then}")
    if plan.samples_an_epoch != plan.samples:
        lines.append(f"epoch    {plan.samples_an_epoch} samples, repeats counted")
    lines.append(f"disk     about {plan.bytes / 1e6:.2f} MB more in {output}, prompts included")
    lines.append(f"time     {_time(plan)}")
    return lines


def _listed(title: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    lines = [f"{title} {len(entries)}:", *(f"  {on_one_line(one)}" for one in entries[:_NAMED])]
    if len(entries) > _NAMED:
        lines.append(f"  ... {len(entries) - _NAMED} more (--json names all)")
    return lines


def _time(plan: "Foreseen") -> str:
    if not plan.new:
        return "nothing to encode"
    if plan.seconds is None:
        return (
            "unknown: these encoders have not run on this device yet. To know it, add --measure, "
            "which encodes a few clips"
        )
    minutes = round(plan.seconds / 60)
    if plan.seconds < 90:
        about = f"{plan.seconds:.0f} s" if plan.seconds >= 1 else "a second"
    else:
        about = f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    return (
        f"about {about} in one process, as fast as measured here before (without loading weights)"
    )
