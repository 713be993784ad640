"""The fingerprint of a cache that `encode` writes: every setting that changes its bytes."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from preprocess.dataset.clips import RESIZE_RULE
from preprocess.encode.config import EncodeConfig
from shared.errors import UserError
from shared.format.cache import CacheIndex, Sidecar
from shared.format.fingerprint import (
    FORMAT_VERSION,
    FRAME_RULE,
    LACKING,
    TEXT_CLEANING,
    Fingerprint,
    as_in_cache,
    cache_mode,
    differences,
    model_fields,
    refuse_differences,
)
from shared.io.hashing import FileHasher
from shared.io.names import quoted
from shared.io.store import Store
from shared.models.spec import ModelSpec
from shared.models.weights import check_component

# Raise when `shared.format.buckets` maps some size to another bucket than before.
BUCKET_TABLE_VERSION = 1
OFF = "off"
DIGESTING = "digesting the encoders' weights (read once, then remembered)"
BY_DATASET = "by dataset"
"""Stands for settings that each dataset of a --dataset-config has for itself."""


def encode_fingerprint(config: EncodeConfig, spec: ModelSpec, hasher: FileHasher) -> Fingerprint:
    """All fields that decide the bytes of a shard. Reads the encoders' weights to digest them.

    Raises UserError where a component that encoding needs has no weights.
    """
    fields = encoder_fields(spec, hasher)
    refuse_absent(spec, fields)
    by_fps, fixed = config.fps is not None, config.fix_sample_size is not None
    by_tokens = config.training_with_video_token_length
    media: dict[str, Any] = {
        "image_sample_size": OFF if fixed else config.image_size,
        "video_sample_size": OFF if fixed else config.video_size,
        "token_sample_size": config.token_size if by_tokens and not fixed else OFF,
        "enable_bucket": config.enable_bucket,
        "random_hw_adapt": config.random_hw_adapt and not fixed,
        "random_ratio_crop": config.random_ratio_crop,
        "fix_sample_size": list(config.fix_sample_size) if config.fix_sample_size else OFF,
        "video_sample_stride": OFF if by_fps else config.stride,
        "fps": config.fps if by_fps else OFF,
        "video_sample_n_frames": config.video_sample_n_frames,
        "clips": config.clips,
        "clips_per_video": config.clips_per_video,
    }
    if config.dataset_config is not None:
        # The keys tell such samples apart; were the values here, no dataset could be added later.
        media = dict.fromkeys(media, BY_DATASET)
    image = {"image": fields["image"]} if "image" in fields else {}
    return {
        "format": FORMAT_VERSION,
        "mode": cache_mode(spec),
        "latents": {**fields["latents"], "dtype": config.dtype, "compute": config.vae_dtype},
        "text": text_group(spec, fields["text"], config.dtype, config.text_encoder_dtype),
        **image,
        "media": {
            "resize": RESIZE_RULE,
            "bucket_table": BUCKET_TABLE_VERSION,
            "frame_rule": FRAME_RULE,
            **media,
            "seed": config.seed,
        },
    }


def text_group(
    spec: ModelSpec, encoder: Mapping[str, Any], dtype: str, compute: str
) -> dict[str, Any]:
    """A fingerprint's `text`, of these fields of the encoder."""
    return {
        **encoder,
        "dtype": dtype,
        "compute": compute,
        "max_length": spec.family.text_tokens,
        "cleaning": TEXT_CLEANING,
    }


def encoder_fields(spec: ModelSpec, hasher: FileHasher) -> Fingerprint:
    """`model_fields`, of encoders whose weights fit them.

    Where digests are remembered, the encoders' libraries are not imported for that. Raises
    UserError naming weights that are too few, too many or of another shape.
    """

    return model_fields(spec, hasher, partial(check_component, spec.family, spec.folder))


def fields_in_cache(spec: ModelSpec, cache: CacheIndex, console: Console) -> Fingerprint:
    """`encoder_fields` by the digests that a cache has for the same weights."""
    hasher = FileHasher()
    with console.status(DIGESTING):
        fields = encoder_fields(spec, hasher)
        return as_in_cache(fields, cache.fingerprint, spec.folder, hasher)


def refuse_other_vae(cache: CacheIndex, spec: ModelSpec, fields: Fingerprint, *, cure: str) -> None:
    """Raise UserError, which ends with `cure`, unless the model has the VAE of the cache.

    `fields` of the model as the cache has them.
    """
    latents = {"latents": fields["latents"]}
    refuse_absent(spec, latents)
    refuse_differences(
        {"latents": cache.fingerprint["latents"]},
        latents,
        what=f"shards: {cache.store} was encoded by another VAE than {spec.folder} has",
        cure=cure,
    )


def refuse_absent(spec: ModelSpec, fields: Fingerprint) -> None:
    """Raise UserError where a component behind these fields of the model has no weights."""
    for group, name, component in (
        ("latents", "vae", "vae"),
        ("text", "encoder", "text_encoder"),
        ("text", "tokenizer", "tokenizer"),
        ("image", "encoder", "image_encoder"),
        ("image", "processor", "image_processor"),
    ):
        if group in fields and fields[group][name] is None:
            raise UserError(
                f"model: {spec.folder / component} holds no weights. Download the whole "
                f"{component} folder, or set --pretrained-model-name-or-path (or MODEL_NAME) "
                "to a complete model."
            )


def settings_for_cache(
    config: EncodeConfig,
    output: Store,
    fingerprint: Fingerprint,
    model: Path,
    hasher: FileHasher,
    sidecars: list[Sidecar],
) -> Fingerprint:
    """`fingerprint` of a run as the cache in `output`, with these sidecars, has it.

    Raises UserError where its shards were made with other settings.
    """
    if sidecars:
        fingerprint = as_in_cache(fingerprint, sidecars[0].fingerprint, model, hasher)
    cure = partial(sparing_cure, config, fingerprint)
    refuse_other_settings(output, sidecars, fingerprint, cure=cure)
    return fingerprint


def refuse_other_settings(
    store: Store,
    sidecars: list[Sidecar],
    fingerprint: Fingerprint,
    *,
    cure: Callable[[Fingerprint], str],
) -> None:
    """Raise UserError where `store` holds shards that were made with other settings.

    `cure` says what to do about the fingerprint that was found.
    """
    for sidecar in sidecars:
        refuse_differences(
            sidecar.fingerprint,
            fingerprint,
            what=f"shards: {store.shown(store.folder / sidecar.shard)} was encoded with other "
            "settings than these",
            cure=cure(sidecar.fingerprint),
        )


def sparing_cure(config: EncodeConfig, expected: Fingerprint, found: Fingerprint) -> str:
    """What spares most of the work where a cache has another fingerprint than `expected`."""
    changed = {field.split(".")[0] for field, _, _ in differences(found, expected)}
    otherwise = (
        "Give this run a folder of its own (--output), or set the values that the shards have."
    )
    this = (
        f"--shards {quoted(config.output)} --pretrained-model-name-or-path {quoted(config.model)}"
    )
    if changed == {"text"}:
        return (
            f"To encode the text anew beside the shards: wanprep recaption {this} --name NAME "
            f"--same-captions; then wantrain distill --captions NAME. {otherwise}"
        )
    if changed <= {"mode", "image"} and found["mode"] in LACKING.get(expected["mode"], ()):
        data = "." if config.dataset_config else quoted(config.train_data_dir)
        mode = " --train-mode flf2v" if config.train_mode == "flf2v" else ""
        add = f"wanprep add-condition {this} --train-data-dir {data}{mode}"
        return f"To add them: {add}\n{otherwise}"
    return otherwise
