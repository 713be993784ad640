"""Overlays: text or conditions for the samples of a cache, in shards beside it.

    shards/captions/NAME/   other captions, with a prompt bank of their own
    shards/conditions/      conditions of given frames for a cache without, or with other ones

Each is a folder in the format of a cache, with the same keys, whose samples hold `json` and that
one member. The cache decides which samples live; an overlay only brings members for them.
"""

import re
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from shared.errors import UserError
from shared.format.cache import MEDIA_TYPES, CacheIndex, Overlay, open_cache
from shared.format.fingerprint import (
    Fingerprint,
    condition_tensor,
    differences,
    group_of,
    refuse_differences,
)
from shared.format.schema import CONDITION_MEMBER, JSON_MEMBER, MEMBERS, TEXT_MEMBER
from shared.io.names import quoted
from shared.io.store import Store

CAPTIONS = "captions"
CONDITIONS = "conditions"
# The fingerprint's field `overlay` → the one member that the samples have beside `json`.
OVERLAY_MEMBER = {CAPTIONS: TEXT_MEMBER, CONDITIONS: CONDITION_MEMBER}

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_NAMED = 3


def required_members(fingerprint: Fingerprint) -> tuple[str, ...]:
    """What each sample of a shard must have: all but the condition, or an overlay's two."""
    overlay = OVERLAY_MEMBER.get(fingerprint.get("overlay", ""))
    return MEMBERS[:3] if overlay is None else (JSON_MEMBER, overlay)


def made_by(fingerprint: Fingerprint) -> str:
    """The command that makes such shards, for messages."""
    made = {CAPTIONS: "wanprep recaption", CONDITIONS: "wanprep add-condition"}
    encoded = "wantrain synthesize" if "synthesis" in fingerprint else "wanprep encode"
    return made.get(fingerprint.get("overlay", ""), encoded)


def captions_of(store: Store, name: str) -> Store:
    """Where the captions `name` of a cache lie. Raises UserError for what is no name."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"captions: invalid caption-set name {name!r}; expected up to 64 letters, digits and "
            "- _ . (no dot in front), e.g. short."
        )
    return store.below(f"{CAPTIONS}/{name}")


def caption_names(store: Store) -> list[str]:
    """Names of the captions that a cache has beside its own, sorted."""
    found = (store.folder / CAPTIONS).glob("*/*.tar")
    return sorted({path.parent.name for path in found})


def overlays_in(store: Store) -> list[Store]:
    """Every overlay of a cache."""
    conditions = store.below(CONDITIONS)
    captions = [captions_of(store, name) for name in caption_names(store)]
    return captions + ([conditions] if any(conditions.folder.glob("*.tar")) else [])


def with_captions(index: CacheIndex, name: str) -> CacheIndex:
    """The cache with the captions `name` in place of its own.

    Samples that they lack keep the cache's own, as long as the same text encoder made both.
    Raises UserError where there are no captions of that name, or where that would mix encoders.
    """
    store = captions_of(index.store, name)
    make = f"wanprep recaption --name {name} --shards {quoted(index.store)}"
    if name not in (there := caption_names(index.store)):
        listed = f"; it has {', '.join(there)}" if there else ""
        raise UserError(
            f"captions: {index.store} has no captions {name!r}{listed}. Make them: {make} "
            "--train-data-meta FILE"
        )
    overlay = _overlay(index, store)
    text = group_of(overlay.index.fingerprint, "text", store)
    if len(overlay.lacking) and (
        differing := differences(
            {"text": group_of(index.fingerprint, "text", index.store)}, {"text": text}
        )
    ):
        fields = ", ".join(field for field, _, _ in differing)
        raise UserError(
            f"captions: {len(overlay.lacking)} of the {len(index)} samples in {index.store} have "
            f"no caption in {name!r} ({_keys(index, overlay)}), and the cache's own are of another "
            f"text encoder ({fields} differ). Add the missing ones: {make}"
        )
    return replace(
        index,
        fingerprint={**index.fingerprint, "text": text},
        overlays={**index.overlays, TEXT_MEMBER: overlay},
    )


def with_conditions(index: CacheIndex, model: str, wanted: str = "i2v") -> CacheIndex:
    """The cache with the conditions that were added to it, for a run that takes `wanted`, the mode
    of a cache that would have them itself.

    Raises UserError where samples have none, naming the command that adds them for `model`.
    """
    store = index.store.below(CONDITIONS)
    mode, needed = index.fingerprint.get("mode"), condition_tensor(wanted)
    both = needed == condition_tensor("flf2v")
    add = (
        f"wanprep add-condition --shards {quoted(index.store)} --pretrained-model-name-or-path "
        f"{quoted(model)} --train-data-dir DIR"
        f"{' --train-mode flf2v' if both else ''}"
    )
    given = "first and last frames" if both else "first frames alone"
    lacks = {
        None: "text-to-video, without the conditions that an i2v model needs",
        needed: "image-to-video without the CLIP embeddings that this model needs",
    }.get(
        condition_tensor(mode),
        f"{mode}, and this run needs conditions of {given}"
        f"{' (with --train-mode flf2v it would take them)' if wanted == 'i2v' else ''}",
    )
    if store not in overlays_in(index.store):
        raise UserError(
            f"shards: {index.store} was encoded for {lacks}. Add them; the latents stay as they "
            f"are: {add}"
        )
    overlay = _overlay(index, store)
    refuse_differences(
        {"latents": group_of(overlay.index.fingerprint, "latents", store)},
        {"latents": group_of(index.fingerprint, "latents", index.store)},
        what=f"shards: {store} belongs to another cache than {index.store}",
        cure=f"Delete that folder and make it again: {add}",
    )
    theirs = overlay.index.fingerprint
    if condition_tensor(theirs.get("mode")) != needed:
        raise UserError(
            f"shards: {store} holds conditions for {theirs.get('mode')}, and this run needs those "
            f"of {given}; a cache has one kind beside its own. Train for the other "
            f"(--train-mode), or delete that folder and make it anew: {add}"
        )
    without = np.intersect1d(
        overlay.lacking, np.flatnonzero(index.types != MEDIA_TYPES.index("text"))
    )
    if len(without):
        raise UserError(
            f"shards: {len(without)} of the {len(index)} samples in {index.store} have no "
            f"condition ({_keys(index, overlay)}). Add them: {add}"
        )
    return replace(
        index,
        fingerprint={
            **index.fingerprint,
            **{name: theirs[name] for name in ("mode", "image") if name in theirs},
        },
        overlays={**index.overlays, CONDITION_MEMBER: overlay},
    )


def _keys(index: CacheIndex, overlay: Overlay) -> str:
    """The first few keys that an overlay lacks."""
    named = ", ".join(index.key(int(row)) for row in overlay.lacking[:_NAMED])
    return named + (", ..." if len(overlay.lacking) > _NAMED else "")


def _overlay(index: CacheIndex, store: Store) -> Overlay:
    found = open_cache(store)
    return Overlay(index=found, rows=positions(index.keys, found.keys))


def positions(keys: npt.NDArray[np.uint8], among: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Where each of `keys` (N, 16) stands in `among` (M, 16), which is sorted; −1: nowhere."""
    if not len(among):
        return np.full(len(keys), -1, dtype=np.int64)
    wanted, there = (np.ascontiguousarray(part).view("S16").reshape(-1) for part in (keys, among))
    found = np.searchsorted(there, wanted).clip(max=len(there) - 1).astype(np.int64)
    return np.where(there[found] == wanted, found, -1)
