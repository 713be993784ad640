"""Lines that a run and its plan say of their clips and of where the time went."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from time import perf_counter

from preprocess.encode.speed import Times
from preprocess.encode.work import Work
from shared.cli.console import count, named

CHANGES = ("shortened", "upscaled", "slow", "noted")
"""What may become of a media file. Slow: videos slower than the frame rate asked for, if only in
places; noted: what is odd about files that are used all the same."""


def oddities(works: Sequence[Work]) -> Iterator[str]:
    """A run's lines about clips that are not what was asked, or whose videos are odd."""
    for kind, found in changes(works).items():
        if kind == "noted":
            for note in dict.fromkeys(note for _, note in found):
                sources = [source for source, its in found if its == note]
                yield f"noted    {count(len(sources), 'file')} {note}: {named(sources)}"
        elif found and kind != "upscaled":
            videos = count(len({source for source, _ in found}), "video")
            listed = named([f"{source} ({change})" for source, change in found])
            yield f"{kind:<8} {videos}: {listed}"


def is_short(work: Work) -> bool:
    """Whether a video gives fewer frames than were asked."""
    return work.type == "video" and work.clip.bucket.frames < work.clip.asked


def upscaling(work: Work) -> float:
    """How much larger than the source a sample is shown; 1 or less: no pixel is made up."""
    bucket, probe = work.clip.bucket, work.probe
    if probe is None:
        return 0
    return max(bucket.height / probe.height, bucket.width / probe.width)


def changes(planned: Sequence[Work]) -> dict[str, list[tuple[str, str]]]:
    """By kind. Variants and captions of one media file are often changed alike."""
    found: dict[str, dict[tuple[str, str], None]] = {kind: {} for kind in CHANGES}
    for work in planned:
        for kind, change in _changes_of(work):
            found[kind][work.entry.source, change] = None
    return {kind: list(changes) for kind, changes in found.items()}


def _changes_of(work: Work) -> Iterator[tuple[str, str]]:
    """(kind, in words)."""
    probe, clip, bucket = work.probe, work.clip, work.clip.bucket
    if probe is None:
        return
    if is_short(work):
        yield "shortened", f"{clip.asked} frames asked, {bucket.frames} taken of {probe.frames}"
    if (factor := upscaling(work)) > 1:
        sizes = f"{probe.width}x{probe.height} to {bucket.width}x{bucket.height}"
        yield "upscaled", f"{sizes}, {factor:.2f} times as large"
    if number := sum(one == other for one, other in pairwise(work.clip.frame_indices)):
        repeated = f"{number} of {bucket.frames} frames are repeated"
        yield "slow", f"{repeated} ({probe.fps:g} a second)"
    yield from (("noted", note) for note in probe.notes)


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
