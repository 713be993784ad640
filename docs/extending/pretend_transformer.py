"""The pretend family's transformer: Wan's parts under other names. Text to video alone."""

from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.transformers.transformer_wan import (
    FP32LayerNorm,
    WanRotaryPosEmbed,
    WanTimeTextImageEmbedding,
    WanTransformerBlock,
)
from torch import nn


class PretendBlock(nn.Module):
    """Looks at the clip, reads the caption, thinks."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        wan = WanTransformerBlock(width, inner, heads, cross_attn_norm=True)
        self.norm1, self.norm2, self.norm3 = wan.norm1, wan.norm2, wan.norm3
        self.look, self.read, self.think = wan.attn1, wan.attn2, wan.ffn
        self.scale_shift_table = wan.scale_shift_table

    def forward(
        self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor, places: Any
    ) -> torch.Tensor:
        """(B, tokens, D) → the same."""
        table = self.scale_shift_table + time.float()
        shift, scale, gate, shift2, scale2, gate2 = table.chunk(6, dim=1)
        seen = self.look(
            (self.norm1(x.float()) * (1 + scale) + shift).type_as(x), None, None, places
        )
        x = (x.float() + seen * gate).type_as(x)
        x = x + self.read(self.norm2(x.float()).type_as(x), text, None, None)
        thought = self.think((self.norm3(x.float()) * (1 + scale2) + shift2).type_as(x))
        return (x.float() + thought.float() * gate2).type_as(x)


class PretendTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    """Called as Wan's is."""

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules: ClassVar = [
        "positions",
        "time_embedder",
        "scale_shift_table",
        "norm1",
        "norm2",
        "norm3",
    ]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 4,
        attention_head_dim: int = 32,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 64,
        freq_dim: int = 64,
        ffn_dim: int = 384,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.positions = WanRotaryPosEmbed(attention_head_dim, patch_size, 1024)
        self.entrance = nn.Conv3d(in_channels, width, kernel_size=patch_size, stride=patch_size)
        self.conditions = WanTimeTextImageEmbedding(width, freq_dim, width * 6, text_dim)
        self.stack = nn.ModuleList(
            PretendBlock(width, ffn_dim, num_attention_heads) for _ in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(width, 1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(width, 4 * out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """Velocity (B, C, T, H, W) of latents of that shape, which each get a caption."""
        assert encoder_hidden_states.shape[1] == 96, "the family's text length"
        samples, _, frames, high, wide = hidden_states.shape
        places = self.positions(hidden_states)
        x = self.entrance(hidden_states).flatten(2).transpose(1, 2).contiguous()
        time, steps, text, _ = self.conditions(timestep, encoder_hidden_states, None)
        steps = steps.unflatten(1, (6, -1))
        for block in self.stack:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, text, steps, places)
            else:
                x = block(x, text, steps, places)
        shift, scale = (self.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
        x = self.proj_out((self.norm_out(x.float()) * (1 + scale) + shift).type_as(x))
        x = x.reshape(samples, frames, high // 2, wide // 2, 2, 2, -1)
        return (x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4),)
