"""Lines that a run and its plan say of their clips and of where the time went."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from time import perf_counter

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
    noted: dict[str, dict[str, None]] = {}
    for one in work:
        for note in one.probe.notes if one.probe else ():
            noted.setdefault(note, {})[one.entry.source] = None
    for note, sources in noted.items():
        yield f"noted    {count(len(sources), 'file')} {note}: {named(list(sources))}"


def repeats(work: Work) -> int:
    """How many frames of a clip are the frame before once more."""
    indices = work.clip.frame_indices
    return sum(one == other for one, other in pairwise(indices))


def where_time_went(times: Times, *, writing: float) -> str | None:
    """The line about the media pass, which ends now; None if this process had no clip to encode.

    `writing`: seconds that it has waited for shards to be written.
    """
    if not times.clips:
        return None
    media = perf_counter() - times.media_began
    vae, decoding = times.vae.seconds, times.decoding.seconds
    return (
        f"time     media {media:.2f} s: in the encoders {vae:.2f}, waiting for decoders "
        f"{decoding:.2f}, for the disk {writing:.2f}, else {media - vae - decoding - writing:.2f}; "
        f"a clip {vae / times.clips:.2f} s to encode, beside it "
        f"{times.decoders / times.clips:.2f} s to decode"
    )
