"""--random-frame-crop: a slice of cached latents that equals the encoding of the shorter clip."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from preprocess.encode.encoders import LatentEncoder
from preprocess.media.decode import fit
from preprocess.media.reader import read_frames
from shared.format.buckets import Bucket
from shared.format.cache import MemberReader, open_cache
from shared.io.store import Store
from shared.models.spec import read_model_spec
from tests.train.conftest import encode
from tests.train.data.test_batches import _dataset
from tests.train.test_distill import distill, final_bytes
from train.data.batches import cropped_frames


def test_shares_of_the_lengths() -> None:
    """N = 17 frames are 5 latents: 5 in 90%, 2, 3, 4 in a third of the rest each."""
    drawn = Counter(cropped_frames(5, 3, update) for update in range(20_000))
    assert set(drawn) == {2, 3, 4, 5}
    assert abs(drawn[5] / 20_000 - 0.9) < 0.01
    for short in (2, 3, 4):
        assert abs(drawn[short] / 20_000 - 0.1 / 3) < 0.006
    assert {cropped_frames(1, 3, update) for update in range(99)} == {1}
    assert {cropped_frames(2, 3, update) for update in range(99)} == {2}  # 5 frames: none shorter


def test_a_cropped_batch_is_the_encoding_of_the_shorter_clip(
    dataset: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    shards = encode(dataset, tiny_i2v, tmp_path / "shards", "--dtype", "fp32")
    cropped = next(
        batch.to(torch.device("cpu"))
        for batch in _dataset(shards, tiny_i2v, frame_crop=True).ahead(start=0, stop=500, workers=0)
        if batch.latents.shape[2] == 2
    )
    index = open_cache(Store(shards))
    encoder = LatentEncoder(read_model_spec(tiny_i2v), dtype=torch.float32, device="cpu")
    rows = {index.key(row): row for row in range(len(index))}
    assert cropped.condition is not None and cropped.condition.shape[2] == 2
    for number, key in enumerate(cropped.keys):
        info = MemberReader(index).info(rows[key])
        assert info["frames"] == 9
        indices = info["frame_indices"][:5]
        frames = fit(
            read_frames(dataset / info["source"], "video", indices),
            Bucket(info["height"], info["width"], 5),
        )
        assert torch.equal(cropped.latents[number], encoder.latents(frames))
        assert torch.equal(cropped.condition[number, 4:], encoder.condition(frames)["cond"])
        assert cropped.condition[number, :4, 0].all() and not cropped.condition[number, :4, 1].any()


def test_it_changes_what_is_trained_only_where_a_clip_is_cut(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    common = ("--max-train-steps", "6", "--mixed-precision", "no")
    plain = distill(tiny_t2v, t2v_shards, tmp_path / "plain", *common)
    cropped = distill(tiny_t2v, t2v_shards, tmp_path / "crop", *common, "--random-frame-crop")
    assert np.any([cropped_frames(3, 42, update) < 3 for update in range(18)])
    assert final_bytes(plain) != final_bytes(cropped)
