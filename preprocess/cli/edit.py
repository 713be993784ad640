"""The commands of `wanprep` that change a cache that is there: `index`, `remove`, `compact`."""

from typing import TYPE_CHECKING, Annotated

import typer

from shared.cache.ranks import this_rank
from shared.cli.support import echo
from shared.io.mirror import open_store
from shared.io.names import on_one_line, quoted

if TYPE_CHECKING:
    from preprocess.cache.remove import Chosen


INPUT, OUTPUT = "Input", "Output"


# fmt: off
def index(
    shards: Annotated[str, typer.Option(metavar="DIR|URL", help="Folder of the shards.", rich_help_panel=INPUT)] = "shards",
) -> None:
    """Rebuild manifest.json and index.zarr from the shards.

    For shards that were copied from elsewhere, or an index that is lost. Reads every tar once and checks it against its sidecar; also those of caption sets and conditions.

    Next: wantrain distill --shards DIR

    Examples:
        # the shards in shards/
        wanprep index

        # shards for Wan2.2-I2V-A14B that were copied from another machine
        wanprep index --shards shards-720p

        # the shards of the bundled toy model
        wanprep index --shards toy-shards
    """
    from preprocess.cache.remove import require_shards
    from shared.cache.index import build_index, check_shards
    from shared.cache.report import contents
    from shared.cache.writer import output_lock, refusals_explained
    from shared.format.overlays import overlays_in

    with open_store(shards, writer=this_rank().number).pulled() as root:
        require_shards(root)
        for store in (root, *overlays_in(root)):
            kept = "The shards are as they were."
            with output_lock(store.folder), refusals_explained(store.folder, kept):
                if not store.is_remote:  # an object store checks what it keeps
                    check_shards(store)
                echo(contents(build_index(store)))


def remove(
    sample: Annotated[list[str], typer.Option("--sample", metavar="NAME", help="What to remove: a key, or a file as the dataset names it, with all of its samples. Where no file is named exactly so, * stands for any characters (/ too) and ? for one; nothing else is special. May be given several times.", rich_help_panel=INPUT)],
    shards: Annotated[str, typer.Option(metavar="DIR|URL", help="Folder of the shards.", rich_help_panel=INPUT)] = "shards",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be removed, then stop.", show_default="off", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Remove samples from a cache.

    Prints which ones and how many before it removes them; if one name matches nothing, none is removed. Removed samples leave the index at once and are not trained on any more; their bytes stay in the shards until `wanprep compact`. A file that the dataset still lists comes back with the next `wanprep encode`. To remove all that a dataset does not list any more: wanprep encode --prune

    Next: wanprep compact --shards DIR

    Examples:
        # a clip and a whole folder, as the dataset names them: what would go
        wanprep remove --sample clips/a.mp4 --sample 'drafts/*' --dry-run

        # one sample by its key
        wanprep remove --sample 0123456789abcdef0123456789abcdef --shards shards-720p

        # the shards of the bundled toy model
        wanprep remove --sample '00003*' --shards toy-shards
    """
    from preprocess.cache.remove import remove as remove_samples
    from shared.cli.console import count

    def announce(chosen: "Chosen") -> None:
        for key, source in sorted(chosen.sources.items(), key=lambda item: item[::-1]):
            echo(f"{key}  {on_one_line(source)}")
        for note in chosen.notes:
            echo(note)
        number = count(len(chosen.sources), "sample")
        echo(f"{number} would be removed; nothing was" if dry_run else f"{number} will be removed")

    with open_store(shards, writer=this_rank().number).pulled() as store:
        removed = remove_samples(store, sample, dry_run=dry_run, announce=announce)
    if not dry_run:
        number = count(len(removed.sources), "sample")
        echo(f"{number} removed, {len(removed.index)} left in {store}")
        echo(f"next: wanprep compact --shards {quoted(store)}, to have the room back")


def compact(
    shards: Annotated[str, typer.Option(metavar="DIR|URL", help="Folder of the shards.", rich_help_panel=INPUT)] = "shards",
    shard_size_mb: Annotated[int, typer.Option(metavar="MB", min=1, help="Size, in megabytes, at which a new shard is closed and the next one started.", rich_help_panel=OUTPUT)] = 256,
) -> None:
    """Free the disk space of removed and replaced samples.

    Shards that contain any are rewritten without them; the other samples keep their bytes and keys. Caption sets and conditions lose what belongs to no sample any more. While it runs it needs disk space for one bucket of those shards. If it is interrupted, nothing is lost: run it again. Do not run it while `wantrain` reads the same shards.

    Next: wantrain distill --shards DIR

    Examples:
        # the shards in shards/
        wanprep compact

        # the shards of the bundled toy model
        wanprep compact --shards toy-shards
    """
    from preprocess.cache.compact import compact_with_overlays
    from shared.cache.report import contents
    from shared.cli.console import count

    with open_store(shards, writer=this_rank().number).pulled() as store:
        done = compact_with_overlays(store, shard_bytes=shard_size_mb * 1_000_000)
    echo(contents(done.index))
    dropped = count(done.dropped, "dead sample")
    echo(f"compacted: {dropped} dropped, {done.freed / 1e6:.1f} MB freed")


# fmt: on
