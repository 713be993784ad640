"""The frozen encoders: captions → text embeddings, frames → latents and conditions.

Sole user of the real models.

Representations, each made in one place:

    frames      (F, H, W, 3) uint8 RGB
    pixels      (1, 3, F, H, W) fp32 in [−1, 1]                     `to_pixels`
    raw latents (1, C, T, h, w) fp32, the posterior's mode           `LatentEncoder._raw`
    latents     (C, T, h, w) fp32, (raw − mean)·(1/std)              `LatentEncoder._normalised`
    clip        (tokens, D) fp32, of the given frames                `ImageEncoder.encode`

What comes out is to the bit what diffusers' Wan pipelines compute for the same frames and prompt.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import transformers
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from PIL import Image

from shared.errors import UserError
from shared.format.fingerprint import cache_mode, condition_tensor
from shared.models import weights
from shared.models.pixels import latents_to_frames, tile_if_full
from shared.models.processors import load_image_processor, load_tokenizer
from shared.models.spec import ModelSpec


class TextEncoder:
    """UMT5 and its tokenizer, as `WanPipeline.encode_prompt(max_sequence_length=512)` uses them."""

    def __init__(self, spec: ModelSpec, *, dtype: torch.dtype, device: str) -> None:
        """Load `tokenizer` and `text_encoder` of a model folder; UserError if they are damaged."""
        transformers.utils.logging.disable_progress_bar()  # would tear our own bars apart
        self._tokenizer = load_tokenizer(spec.folder)
        self._most = spec.family.text_tokens
        model = weights.load_component(spec.family, spec.folder, "text_encoder", dtype=dtype)
        self._model = model.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def encode(self, caption: str) -> torch.Tensor:
        """(tokens, D) on the CPU, in the encoder's dtype, at the caption's true length.

        One caption at a time, padded to the family's length: another padding or batch would change
        the last bits.
        """
        inputs = self._tokenizer(
            [prompt_clean(caption)],
            padding="max_length",
            max_length=self._most,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        tokens, mask = inputs.input_ids, inputs.attention_mask
        device = self._model.device
        hidden = self._model(tokens.to(device), mask.to(device)).last_hidden_state
        text = hidden[0, : int(mask.sum())].cpu()
        if not bool(torch.isfinite(text).all()):
            raise UserError(
                "text encoder: the embedding of a caption has NaN or infinite values "
                f"({caption[:60]!r}). Try --text-encoder-dtype fp32; if that is no better, the "
                "weights are damaged."
            )
        return text


class ImageEncoder:
    """The CLIP vision model of Wan 2.1, as `WanImageToVideoPipeline.encode_image` uses it.

    In fp32, as diffusers' documentation loads it: a frame or two a clip are a small part of the
    work.
    """

    def __init__(self, spec: ModelSpec, *, device: str) -> None:
        """Load `image_encoder` and `image_processor`; UserError where they don't fit."""
        folder = spec.folder / "image_encoder"
        # PIL's resizing, also where torchvision is installed: the same bits on every machine.
        pil = hasattr(transformers, "CLIPImageProcessorPil")  # before transformers 5 it's the only
        processor = transformers.CLIPImageProcessorPil if pil else transformers.CLIPImageProcessor
        transformers.utils.logging.disable_progress_bar()
        model = weights.load_component(
            spec.family, spec.folder, "image_encoder", dtype=torch.float32
        )
        self._processor = load_image_processor(processor, spec.folder, model.config.image_size)
        if model.config.hidden_size != spec.image_dim:
            raise UserError(
                f"model: {folder} gives embeddings of width {model.config.hidden_size}, the "
                f"transformer takes {spec.image_dim} (image_dim). Download the folder again."
            )
        self._model = model.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def encode(self, frames: npt.NDArray[np.uint8]) -> torch.Tensor:
        """(N, H, W, 3) uint8 RGB → (N · tokens, D), fp32 on the CPU: the last hidden state but one.

        Bytes, because the processor would rescale floats in 0…1 a second time. In one batch, as in
        the pipeline, for the last bits.
        """
        inputs = self._processor(images=list(map(Image.fromarray, frames)), return_tensors="pt")
        outputs = self._model(**inputs.to(self._model.device), output_hidden_states=True)
        hidden: torch.Tensor = outputs.hidden_states[-2].flatten(0, 1)
        return hidden.cpu()


class LatentEncoder:
    """The Wan VAE with the pipelines' normalisation; with CLIP beside it where the model has it.

    CLIP (1.3 GB in bf16) stays beside the VAE, so that a frame is decoded once for both.
    """

    def __init__(self, spec: ModelSpec, *, dtype: torch.dtype, device: str) -> None:
        """Load `vae` (and CLIP) of a model folder; UserError if they are damaged."""
        vae = weights.load_component(spec.family, spec.folder, "vae", dtype=dtype)
        self._vae = vae.to(device).eval().requires_grad_(False)
        self._spec = spec
        per_channel = (1, spec.latent_channels, 1, 1, 1)
        self._mean = torch.tensor(spec.latents_mean).view(per_channel).to(device)
        self._inverse_std = 1.0 / torch.tensor(spec.latents_std).view(per_channel).to(device)
        self._of_zeros = lru_cache(maxsize=8)(self._encode_zeros)
        self._image = None if spec.image_dim is None else ImageEncoder(spec, device=device)

    @torch.inference_mode()
    def latents(self, frames: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Frames (F, H, W, 3), F = 4n+1 → latents (C, T, h, w), fp32 on the CPU."""
        return self._normalised(self._raw(to_pixels(frames, self._vae.device)))

    @torch.inference_mode()
    def condition(self, frames: npt.NDArray[np.uint8]) -> dict[str, torch.Tensor]:
        """The condition by the names in the shards, fp32 on the CPU.

        `cond` (C, T, h, w): first frame, then zeros, encoded; of flf2v `first_last`, whose last
        frame is the clip's. For models with CLIP also `clip` (tokens, D), of these frames one after
        the other. For a single frame both would give the target away, so the first is the encoding
        of zeros and `clip` is zeros (and the mask is 0 in training).
        """
        given = list(self._spec.given_frames)
        clip = None if self._image is None else self._image.encode(frames[given])
        if len(frames) == 1:
            cond = self._of_zeros(*frames.shape[1:3])
            clip = None if clip is None else torch.zeros_like(clip)
        else:
            shown = to_pixels(frames[given], self._vae.device)
            pixels = shown.new_zeros(1, 3, len(frames), *shown.shape[-2:])
            pixels[:, :, given] = shown
            cond = self._normalised(self._raw(pixels))
        name = condition_tensor(cache_mode(self._spec))
        assert name is not None, "conditions are made only for modes that have them"
        return {name: cond} if clip is None else {name: cond, "clip": clip}

    def tile_if_full(self, say: Callable[[str], None]) -> None:
        """Let `frames` decode in tiles what doesn't fit whole; encoding never does."""
        tile_if_full(self._vae, say)

    def frames(self, latents: torch.Tensor) -> npt.NDArray[np.uint8]:
        """Latents (C, T, h, w) as a cache holds them → frames (F, H, W, 3) uint8 RGB."""
        return latents_to_frames(self._vae, latents, self._spec)

    def _encode_zeros(self, height: int, width: int) -> torch.Tensor:
        zeros = torch.zeros(1, 3, 1, height, width, device=self._vae.device)
        return self._normalised(self._raw(zeros))

    def _raw(self, pixels: torch.Tensor) -> torch.Tensor:
        # The mode is what the pipelines take (sample_mode="argmax"); a sample would add noise.
        return self._vae.encode(pixels.to(self._vae.dtype)).latent_dist.mode().float()

    def _normalised(self, raw: torch.Tensor) -> torch.Tensor:
        return ((raw - self._mean) * self._inverse_std)[0].cpu()


def to_pixels(frames: npt.NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """Frames (F, H, W, 3) uint8 → pixels (1, 3, F, H, W) fp32 in [−1, 1], as VideoProcessor does.

    They travel to the device as bytes, a quarter of the floats.
    """
    levels = torch.from_numpy(frames).to(device).permute(3, 0, 1, 2).unsqueeze(0).contiguous()
    # By a tensor: a Python number CUDA would divide by through its reciprocal, one bit off.
    return 2.0 * (levels.float() / torch.tensor(255.0, device=device)) - 1.0
