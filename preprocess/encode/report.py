"""Lines that a run and its plan say of their clips and of where the time went."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from preprocess.encode.speed import Times
from preprocess.encode.work import Work
from shared.cli.console import count, named


def oddities(work: Sequence[Work]) -> Iterator[str]:
    """The lines about clips that are not what was asked, or whose videos are odd."""
    # Shorter than asked.
    if short := [one for one in work if one.clip.bucket.frames < one.clip.asked]:
        asked = sorted({one.clip.asked for one in short})
        taken: dict[str, set[int]] = {}  # one video may have several clips
        for one in short:
            taken.setdefault(one.entry.source, set()).add(one.clip.bucket.frames)
        fewer = f"{asked[0]}" if len(asked) == 1 else f"{asked[0]} to {asked[-1]}"
        listed = named([f"{name} ({', '.join(map(str, sorted(n)))})" for name, n in taken.items()])
        yield (
            f"short    {count(len(taken), 'video')} with fewer than {fewer} frames at this stride, "
            f"taken at the largest 4n+1 there is: {listed}"
        )

    # Slower than --fps, if only in places.
    if slow := {one.entry.source: one for one in work if repeats(one)}:
        listed = named(
            [f"{name} ({repeats(one)} of {one.clip.bucket.frames})" for name, one in slow.items()]
        )
        yield (
            f"slow     {count(len(slow), 'video')} slower than --fps, at least in places: frames "
            f"are repeated, as a player shows them longer: {listed}"
        )

    # Odd, and taken all the same.
    noted = {one.entry.source: one.probe.notes for one in work if one.probe and one.probe.notes}
    if noted:
        kinds = dict.fromkeys(note for notes in noted.values() for note in notes)
        yield f"noted    {count(len(noted), 'video')} {'; '.join(kinds)}: {named(list(noted))}"


def repeats(work: Work) -> int:
    """How many frames of a clip are the frame before once more."""
    indices = work.clip.frame_indices
    return sum(one == other for one, other in pairwise(indices))


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
