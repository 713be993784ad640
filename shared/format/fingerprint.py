"""The settings that decide the bytes of a cache, and the refusal to mix caches that differ.

A fingerprint is a plain nested dict of JSON values, so that it can be stored in every sidecar, read
by a person, and compared field by field.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.format.strict_json import Fields, is_list, is_shallow, require
from shared.io.hashing import FileHasher
from shared.io.names import quoted
from shared.io.store import Store
from shared.models.digest import component_digest, first_digest, processor_digest
from shared.models.spec import ModelSpec

FORMAT_VERSION = 1
TEXT_CLEANING = "ftfy, html unescape twice, whitespace"
FIRST_FRAME_RULE = (
    "every stride-th frame, largest 4n+1, start uniform by SHA-256 of seed and content"
)
FRAME_RULE = (
    "as shown, counted in output order: every stride-th or nearest in time; largest 4n+1, start "
    "uniform by SHA-256 of seed and content"
)

# Both frame rules may lie in one cache: where the second may give other frames of a file than the
# first, its samples have other keys.
_FRAME_RULES = {FIRST_FRAME_RULE, FRAME_RULE}

Fingerprint = dict[str, Any]

_WITH_CLIP = "+clip"
# Mode of a cache → modes of caches that lack its conditions and nothing else.
LACKING = {
    "i2v": ("t2v", "flf2v", "flf2v+clip"),
    "i2v+clip": ("t2v", "i2v", "flf2v", "flf2v+clip"),
    "flf2v": ("t2v", "i2v", "i2v+clip"),
    "flf2v+clip": ("t2v", "i2v", "i2v+clip", "flf2v"),
}


_FIELDS: Fields = {
    **dict.fromkeys(("latents", "text", "media", "synthesis"), dict),
    **dict.fromkeys(("mode", "overlay"), str),
}


def check_fingerprint(value: Fingerprint) -> None:
    """Raise ValueError for an object from a file that no fingerprint can be."""
    if not is_shallow(value):
        raise ValueError("fingerprint is nested too deeply")
    require(value, _FIELDS, optional=_FIELDS)


def state_timesteps(fingerprint: Fingerprint) -> tuple[float, ...]:
    """Timesteps (σ·1000) of the states that each sample of a synthesised cache has; else none.

    Raises ValueError for what no fingerprint has there.
    """
    states = fingerprint.get("synthesis", {}).get("states")
    if states is None:
        return ()
    timesteps: Any = states.get("timesteps") if isinstance(states, dict) else None
    if not is_list(timesteps, lambda t: type(t) in (int, float) and 0 < t <= 1000):
        raise ValueError(f"synthesis.states is {states!r:.80}")
    return tuple(map(float, timesteps))


def cache_mode(spec: ModelSpec) -> str:
    """Mode of the cache that a model needs: which members, and tensors in them, samples have."""
    return spec.mode if spec.image_dim is None else spec.mode + _WITH_CLIP


def condition_tensor(mode: str | None) -> str | None:
    """Name of the condition's tensor in a cache of this mode; None where there is none.

    The mask that belongs to it follows from the mode, so a reader must not take one for another.
    """
    return {"i2v": "cond", "flf2v": "first_last"}.get((mode or "").removesuffix(_WITH_CLIP))


def model_fields(
    spec: ModelSpec, hasher: FileHasher, check: Callable[[str], None] = lambda component: None
) -> Fingerprint:
    """The part of a fingerprint that only the model folder decides.

    Stage two computes it without building any encoder. A digest is None where that component's
    weights are absent (a training machine may hold transformers only). Raises UserError for weights
    that can't be read or understood; `check` as in `component_digest`.
    """
    image = {
        "encoder": component_digest(spec.folder, "image_encoder", hasher, check),
        "processor": processor_digest(spec.folder),
        "dim": spec.image_dim,
        "compute": "fp32",
    }
    return {
        **({} if spec.image_dim is None else {"image": image}),
        "latents": {
            "vae": component_digest(spec.folder, "vae", hasher, check),
            "channels": spec.latent_channels,
            "stride": list(spec.stride),
            "mean": list(spec.latents_mean),
            "std": list(spec.latents_std),
        },
        "text": {
            "encoder": component_digest(spec.folder, "text_encoder", hasher, check),
            "tokenizer": component_digest(spec.folder, "tokenizer", hasher),
            "dim": spec.text_dim,
        },
    }


_DIGESTS = {
    "latents": ("vae", "vae"),
    "text": ("encoder", "text_encoder"),
    "image": ("encoder", "image_encoder"),
}
"""Group of a fingerprint → the field with a component's digest, and the component."""


def as_in_cache(
    fields: Fingerprint, cache: Fingerprint, folder: Path, hasher: FileHasher
) -> Fingerprint:
    """`fields` of the model in `folder`, with a cache's digests where they are of the same weights.

    What a digest is of has changed once (`shared.models.digest.first_digest`); a cache keeps its
    own.
    """
    for group, (field, component) in _DIGESTS.items():
        own, other = fields.get(group, {}).get(field), cache.get(group, {}).get(field)
        if None in (own, other) or own == other:
            continue
        if first_digest(folder, component, hasher) == other:
            fields = {**fields, group: {**fields[group], field: other}}
    return fields


def group_of(fingerprint: Fingerprint, name: str, store: Store) -> dict[str, Any]:
    """`latents` or `text` of the fingerprint of the cache in `store`, with dtypes that there are.

    Raises UserError where it has none.
    """
    group: dict[str, Any] = fingerprint.get(name, {})
    for field in ("dtype", "compute"):
        if group.get(field) not in ("bf16", "fp32"):
            raise UserError(
                f"shards: {name}.{field} in the fingerprint of {store} is {group.get(field)!r:.40}"
                ", expected bf16 or fp32. Restore its sidecars (NAME.json beside NAME.tar), then: "
                f"wanprep index --shards {quoted(store)}"
            )
    return group


def flatten(fingerprint: Fingerprint, prefix: str = "") -> dict[str, Any]:
    """{"latents": {"vae": x}} → {"latents.vae": x}."""
    flat: dict[str, Any] = {}
    for name, value in fingerprint.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def differences(found: Fingerprint, expected: Fingerprint) -> list[tuple[str, Any, Any]]:
    """(field, found, expected) for each field of `expected` that differs in `found`.

    Unknown values (None in `expected`) are not compared. Of two whole caches' (they have `media`)
    `synthesis` must be the same, or lacking in both.
    """
    flat_found = flatten(found)
    synthesis: list[tuple[str, Any, Any]] = []
    if "media" in expected:
        own, other = (flatten({"s": one.get("synthesis", {})}) for one in (found, expected))
        fields = [f for f in {**own, **other} if own.get(f) != other.get(f)]
        synthesis = [(f"synthesis{f[1:]}", own.get(f), other.get(f)) for f in fields]
        expected = {name: value for name, value in expected.items() if name != "synthesis"}
    return synthesis + [
        (field, flat_found.get(field), value)
        for field, value in flatten(expected).items()
        if value is not None
        and flat_found.get(field) != value
        and not (field == "media.frame_rule" and {flat_found.get(field), value} <= _FRAME_RULES)
    ]


def has_first_frame_rule(fingerprint: Fingerprint) -> bool:
    """Whether its samples may hold wrong pictures: see `preprocess.frames.first_rule`."""
    media = fingerprint.get("media")
    return isinstance(media, dict) and media.get("frame_rule") == FIRST_FRAME_RULE


def of_cache(own: Fingerprint, shards: Iterable[Fingerprint]) -> Fingerprint:
    """`own`, one of its shards', as the fingerprint of a whole cache.

    It has the first frame rule if any shard has: what is rewritten under it is then looked at
    again, and a cache that grows keeps its fingerprint.
    """
    if isinstance(own.get("media"), dict) and any(map(has_first_frame_rule, shards)):
        return {**own, "media": {**own["media"], "frame_rule": FIRST_FRAME_RULE}}
    return own


def to_redo(differing: list[tuple[str, Any, Any]]) -> str:
    """What of a cache would have to be encoded again to take the expected values, in words.

    `differing` as `differences` gives it, not empty.
    """
    groups = {field.partition(".")[0] for field, _, _ in differing}
    pixels, words = groups & {"latents", "media"}, "text" in groups
    if "synthesis" in groups:
        return "everything: the clips are samples of a model, made by other settings or not at all"
    modes = [(found, expected) for field, found, expected in differing if field == "mode"]
    if not groups <= {"latents", "media", "text", "image", "mode"} or (pixels and words):
        return "everything: latents, conditions and text"
    if pixels:
        return "latents and conditions; the text embeddings would be the same"
    lacking = "image" in groups or any(
        found in LACKING.get(expected, ()) for found, expected in modes
    )
    if words:
        also = ", and conditions" if lacking else ""
        return f"text embeddings only{also}; the latents would be the same"
    if lacking:
        return "conditions only; latents and text embeddings would be the same"
    found, expected = modes[0]
    return f"nothing: {expected} models with this VAE train on {found} caches as they are"


def refuse_differences(found: Fingerprint, expected: Fingerprint, *, what: str, cure: str) -> None:
    """Raise UserError with every differing field, both values, what to redo, and the cure."""
    differing = differences(found, expected)
    if differing:
        lines = [f"  {field}: shards have {a!r}, expected {b!r}" for field, a, b in differing]
        redo = f"To be redone for the expected values: {to_redo(differing)}."
        raise UserError("\n".join([f"{what}:", *lines, redo, cure]))
