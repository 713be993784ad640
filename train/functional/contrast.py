"""Contrast and motion of latents: what a student loses or overdoes before it shows in its losses.

Pure; everything in fp32, one number a sample, on the latents' device.
"""

import torch


def contrast(x0: torch.Tensor, generated: torch.Tensor | None = None) -> torch.Tensor:
    """(B,) standard deviation over space and time, the mean of the channels.

    `x0` (B, C, T, H, W) normalised latents. Counted is where `generated` (B, 1, T, 1, 1) is 1
    (None: all). Saturated clips have more than their model's own, washed-out ones less.
    """
    places = (2, 3, 4)
    if generated is None:
        return x0.std(dim=places, correction=0).mean(dim=1)
    counted = generated.expand(-1, 1, *x0.shape[2:])
    number = counted.sum(dim=places, keepdim=True)
    mean = (x0 * counted).sum(dim=places, keepdim=True) / number
    square = ((x0 - mean).square() * counted).sum(dim=places, keepdim=True) / number
    return square.sqrt().flatten(1).mean(dim=1)


def motion(x0: torch.Tensor, generated: torch.Tensor | None = None) -> torch.Tensor:
    """(B,) mean |x̂0[t+1] − x̂0[t]| over channels, space and pairs of neighbouring latent frames.

    Both frames of a pair must be `generated`: against one that is given, and so sharp, a blurred
    one would seem to move. `x0` as above with two generated frames or more.
    """
    gaps = (x0[:, :, 1:] - x0[:, :, :-1]).abs()
    if generated is None:
        return gaps.flatten(1).mean(dim=1)
    pairs = (generated[:, :, 1:] * generated[:, :, :-1]).expand_as(gaps)
    return (gaps * pairs).flatten(1).sum(dim=1) / pairs.flatten(1).sum(dim=1)
