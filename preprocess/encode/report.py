"""Lines that a run and its plan say of their clips and of where the time went."""

from collections.abc import Sequence
from itertools import pairwise

from preprocess.encode.speed import Times
from preprocess.encode.work import Work
from shared.cli.console import count, named


def oddities(work: Sequence[Work]) -> list[str]:
    """The lines about clips that are not what was asked, or whose videos are odd."""
    return [line for line in (_short(work), _slow(work), _noted(work)) if line]


def _short(work: Sequence[Work]) -> str | None:
    """The line about clips that are shorter than asked; None if there are none."""
    short = [item for item in work if item.clip.bucket.frames < item.clip.asked]
    if not short:
        return None
    taken: dict[str, set[int]] = {}  # of one video there may be several clips
    for item in short:
        taken.setdefault(item.entry.source, set()).add(item.clip.bucket.frames)
    listed = named([f"{name} ({', '.join(map(str, sorted(n)))})" for name, n in taken.items()])
    asked = sorted({item.clip.asked for item in short})
    fewer = f"{asked[0]}" if len(asked) == 1 else f"{asked[0]} to {asked[-1]}"
    return (
        f"short    {count(len(taken), 'video')} with fewer than {fewer} frames at this stride, "
        f"taken at the largest 4n+1 there is: {listed}"
    )


def repeats(work: Work) -> int:
    """How many frames of a clip are the frame before once more."""
    indices = work.clip.frame_indices
    return sum(one == other for one, other in pairwise(indices))


def _slow(work: Sequence[Work]) -> str | None:
    """The line about videos slower than --fps, if only in places; None if there are none."""
    slow = {item.entry.source: item for item in work if repeats(item)}
    if not slow:
        return None
    listed = named(
        [f"{name} ({repeats(item)} of {item.clip.bucket.frames})" for name, item in slow.items()]
    )
    return (
        f"slow     {count(len(slow), 'video')} slower than --fps, at least in places: frames are "
        f"repeated, as a player shows them longer: {listed}"
    )


def _noted(work: Sequence[Work]) -> str | None:
    """The line about what is odd of videos that are taken all the same; None if nothing is."""
    odd = {item.entry.source: item.probe.notes for item in work if item.probe and item.probe.notes}
    if not odd:
        return None
    kinds = dict.fromkeys(note for notes in odd.values() for note in notes)
    return f"noted    {count(len(odd), 'video')} {'; '.join(kinds)}: {named(list(odd))}"


def where_time_went(times: Times) -> str | None:
    """The line about the media pass; None where this process had no clip to encode."""
    if not times.clips:
        return None
    vae, decoding = times.vae.seconds, times.decoding.seconds
    rest = times.media - vae - decoding - times.writing
    return (
        f"time     media {times.media:.2f} s: in the encoders {vae:.2f}, waiting for "
        f"decoders {decoding:.2f}, for the disk {times.writing:.2f}, else {rest:.2f}; "
        f"a clip {vae / times.clips:.2f} s to encode, beside it "
        f"{times.decoders / times.clips:.2f} s to decode"
    )
