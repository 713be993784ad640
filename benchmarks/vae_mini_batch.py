"""Does a clip get the same latents in a batch as alone? Why `--vae-mini-batch` has no effect.

    python benchmarks/vae_mini_batch.py

Three Wan VAEs with random or the toy's weights, four shapes, batches of 2 and 4, fp32 on the CPU,
one thread and two: the largest difference to the bits of one clip at a time, and the times.
"""

import time
from itertools import product

import torch
from diffusers import AutoencoderKLWan

from shared.models.toy_model import toy_folder

SHAPES = ((5, 48, 80), (9, 64, 112), (1, 64, 64), (17, 96, 96))


def vaes() -> dict[str, AutoencoderKLWan]:
    """The form of the Wan 2.1 VAE, narrow and wider, and the toy's."""
    torch.manual_seed(0)
    form = {"z_dim": 16, "temperal_downsample": [False, True, True]}
    return {
        "narrow": AutoencoderKLWan(
            base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1, **form
        ).eval(),
        "wider": AutoencoderKLWan(
            base_dim=32, dim_mult=[1, 2, 4, 4], num_res_blocks=2, **form
        ).eval(),
        "toy": AutoencoderKLWan.from_pretrained(toy_folder("toy") / "vae").eval(),
    }


@torch.inference_mode()
def main() -> None:
    """Print a line for each case."""
    print("threads  vae     frames x height x width  batch  largest difference  alone s  batched s")
    found = vaes()
    for threads, (name, vae), shape, batch in product((1, 2), found.items(), SHAPES, (2, 4)):
        torch.set_num_threads(threads)
        clips = torch.rand(batch, 3, *shape) * 2 - 1
        began = time.perf_counter()
        alone = torch.cat([vae.encode(clip[None]).latent_dist.mode() for clip in clips])
        between = time.perf_counter()
        batched = vae.encode(clips).latent_dist.mode()
        ended = time.perf_counter()
        difference = float((alone - batched).abs().max())
        print(
            f"{threads:<7}  {name:<6}  {'x'.join(map(str, shape)):<23}  {batch:<5}  "
            f"{'none' if torch.equal(alone, batched) else f'{difference:.1e}':<18}  "
            f"{between - began:<7.2f}  {ended - between:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
