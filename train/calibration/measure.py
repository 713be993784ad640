"""The teacher's predictions of noised clips, with caption and with negative prompt."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from shared.device import to_device
from shared.models.spec import TIMESTEPS
from train.calibration.fit import Array
from train.data.batches import Batch
from train.functional.rng import noise
from train.functional.schedule import add_noise
from train.methods.flow_matching import over_frames
from train.model.roles import Roles

NOISE = "calibrate noise"


@torch.no_grad()
def inner_products(
    roles: Roles,
    clip: Batch,
    negative: torch.Tensor,
    sigmas: Sequence[float],
    *,
    number: int,
    batch_size: int,
    seed: int,
) -> Array:
    """(levels, 3) float64 of one clip: ⟨r, r⟩, ⟨r, d⟩ and ⟨d, d⟩ of `train.calibration.fit`.

    `clip` has one sample, `number` of the run; `negative` (tokens, D). Each level has its own
    noise, whatever is in one pass. What a sample keeps clean counts nowhere: σ is 0 there.
    """
    found = []
    for first in range(0, len(sigmas), batch_size):
        levels = range(len(sigmas))[first : first + batch_size]
        batch = _repeated(clip, len(levels))
        device = clip.latents.device
        sigma = to_device(torch.tensor([sigmas[n] for n in levels]), device)
        drawn = torch.cat([noise(clip.latents.shape[1:], seed, NOISE, n, [number]) for n in levels])
        sigma, timestep = over_frames(batch, sigma, TIMESTEPS * sigma)
        eps = to_device(drawn, device)
        x_t = add_noise(batch.latents, eps, sigma)
        with roles.teacher():
            v, v_unconditional = (
                roles.velocity(x_t, timestep, text, batch.condition, batch.image).double()
                for text in (batch.text, negative.expand(len(levels), -1, -1))
            )
        # x0 − x̂0_cond and x̂0_cond − x̂0_uncond, without the cancellation of x̂0s at small σ.
        r = sigma.double() * (v - (eps.double() - batch.latents.double()))
        d = sigma.double() * (v_unconditional - v)
        products = [(one * other).flatten(1).sum(1) for one, other in ((r, r), (r, d), (d, d))]
        found.append(torch.stack(products, dim=1).cpu().numpy())
    return np.concatenate(found)


def _repeated(clip: Batch, times: int) -> Batch:
    """The same sample so many times, for as many levels."""
    tensors = clip.tensors().items()
    repeated = {name: tensor.expand(times, *tensor.shape[1:]) for name, tensor in tensors}
    return replace(clip, samples=clip.samples * times, keys=clip.keys * times, **repeated)
