"""One frozen base, three roles: teacher (adapters off), generator and critic (one LoRA each).

The known trainers of Wan hold a model per role; here a role is which adapter the layers apply.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from shared.models.spec import family_of
from train.model.lora_adapter import LoraSpec, adapter_parameters, add_adapter, fuse

GENERATOR = "generator"
CRITIC = "critic"


class Roles:
    """The transformer and its two adapters. Exactly one role is active at any time."""

    def __init__(
        self,
        transformer: nn.Module,
        spec: LoraSpec,
        *,
        seed: int,
        names: Iterable[str] = (GENERATOR, CRITIC),
        fused: bool = False,
    ) -> None:
        """`fused`: see `train.model.lora_adapter.fuse`."""
        names = tuple(names)
        transformer.requires_grad_(False)
        for name in names:
            add_adapter(transformer, spec, name, seed=seed)
        self.transformer = transformer
        self._patch: tuple[int, int, int] = transformer.config.patch_size  # type: ignore[union-attr, assignment]
        positions = getattr(transformer.config, "pos_embed_seq_len", None)
        self._frames_of_image = 1 if positions is None else 2
        self.lora = spec
        self._layers = [m for m in transformer.modules() if isinstance(m, LoraLayer)]
        for layer in self._layers:
            # peft would cast every input to the LoRA's fp32, and autocast back to bf16.
            layer.cast_input_dtype_enabled = False
            if fused:
                fuse(layer)
        # bf16 base: autocast runs the fp32 LoRA's matmuls in bf16 too. fp32 base: nothing to cast.
        self._dtype: torch.dtype = transformer.get_parameter(
            f"{family_of(transformer).patch_embedding}.weight"
        ).dtype
        for name in names:
            for parameter in self.parameters(name).values():
                parameter.requires_grad_(True)
        self._apply(None)

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The trainable parameters of a role under global names."""
        return adapter_parameters(self.transformer, role)

    def _apply(self, adapter: str | None) -> None:
        # Not peft's set_adapter(): it would also flip requires_grad of the other role's weights,
        # and a switch in the middle of a step must not change what is being trained.
        for layer in self._layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        self._active = adapter

    @contextmanager
    def role(self, adapter: str | None) -> Iterator[None]:
        """Context: the role of this name; None: the teacher."""
        before = self._active
        self._apply(adapter)
        try:
            yield
        finally:
            self._apply(before)

    def teacher(self) -> AbstractContextManager[None]:
        """Context: only the frozen base (the real score)."""
        return self.role(None)

    def generator(self) -> AbstractContextManager[None]:
        """Context: the student. Enter it again around `backward`: checkpointed blocks are
        recomputed with whatever adapter is active then."""
        return self.role(GENERATOR)

    def critic(self) -> AbstractContextManager[None]:
        """Context: the fake score, which follows the student's distribution."""
        return self.role(CRITIC)

    def velocity(
        self,
        x_t: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        condition: torch.Tensor | None,
        image: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """v̂ of the active role, fp32.

        Args:
            x_t: (B, C, T, H, W) fp32 noisy latents.
            timestep: (B,) fp32 in 0..1000, never rounded; or (B, T), one for each latent frame
                (ti2v), which the transformer gets for each of the frame's tokens.
            text: (B, tokens, D).
            condition: (B, 4+C, T, H, W) for i2v and flf2v, concatenated to the channels; else None.
            image: (B, tokens, D) of CLIP for Wan 2.1 i2v and, of two frames, flf2v; else None.
        """
        assert timestep.dtype == torch.float32
        if timestep.ndim == 2:
            _, high, wide = self._patch
            tokens = (x_t.shape[-2] // high) * (x_t.shape[-1] // wide)
            timestep = timestep.repeat_interleave(tokens, dim=1)
        if image is not None and self._frames_of_image > 1:  # as the class takes several
            image = image.reshape(len(image) * self._frames_of_image, -1, image.shape[-1])
        inputs = x_t if condition is None else torch.cat([x_t, condition], dim=1)
        # Autocast is entered per pass, not around the step: its cache of cast weights would hand
        # copies made under no_grad to the pass that needs gradients, and the LoRA would get none.
        with self._autocast(x_t.device):
            velocity: torch.Tensor = self.transformer(
                hidden_states=inputs.to(self._dtype),
                timestep=timestep,
                encoder_hidden_states=text.to(self._dtype),
                encoder_hidden_states_image=None if image is None else image.to(self._dtype),
                return_dict=False,
            )[0]
        return velocity.float()

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        fp32 = self._dtype == torch.float32
        return nullcontext() if fp32 else torch.autocast(device.type, self._dtype)
