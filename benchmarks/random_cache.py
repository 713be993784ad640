"""A cache of random samples of a true shape, by the code that writes every cache."""

from pathlib import Path

import torch

from shared.cache.index import build_index
from shared.cache.writer import ShardWriter
from shared.format.buckets import Bucket
from shared.format.fingerprint import cache_mode, condition_tensor, model_fields
from shared.format.prompts import Prompt
from shared.format.schema import Sample, SampleInfo, sample_key
from shared.io.hashing import FileHasher
from shared.io.store import Store
from shared.models.spec import read_model_spec


def write_cache(folder: Path, model: Path, bucket: Bucket, samples: int, *, shard_mb: int) -> None:
    """Random samples of a bucket under the fingerprint of a model, captions of 60 to 300 tokens."""
    folder.mkdir()
    spec = read_model_spec(model)
    fields = model_fields(spec, FileHasher())
    for group in ("latents", "text"):
        fields[group] = {**fields[group], "dtype": "bf16", "compute": "bf16"}
    fingerprint = {"format": 1, "mode": cache_mode(spec), **fields}
    writer = ShardWriter(Store(folder), fingerprint, shard_bytes=shard_mb * 10**6)
    bf16, width = torch.bfloat16, spec.text_dim
    writer.add_prompts(
        [Prompt(role, "", torch.ones(9, width, dtype=bf16)) for role in ("empty", "negative")]
    )
    random = torch.Generator().manual_seed(1)
    shape = bucket.latent_shape(spec.latent_channels, spec.stride)
    latents = torch.randn(shape, generator=random).to(bf16)
    for number in range(samples):
        tokens = int(torch.randint(60, 301, (1,), generator=random))
        info = SampleInfo(
            caption="c", type="video", source=f"{number}.mp4", width=bucket.width,
            height=bucket.height, frames=bucket.frames, frame_indices=list(range(bucket.frames)),
            fps=16.0, source_width=bucket.width, source_height=bucket.height,
        )  # fmt: skip
        text = torch.randn(tokens, width, generator=random).to(bf16)
        key = sample_key(str(number), {}, 0)
        name = condition_tensor(cache_mode(spec))
        condition = {} if name is None else {name: latents}
        writer.add(Sample(key=key, info=info, latents=latents, text=text, **condition))
    writer.close()
    build_index(Store(folder))
