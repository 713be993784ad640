"""Create shared/toy: a Wan model small enough for a test, with seeded random weights.

The classes are those of the real models; only the sizes differ. The text encoder stays random
for ever (it only has to tell words apart); the VAE and the transformers are trained by
`train_toy_vae.py` and `train_toy_transformer.py`, which replace the weights written here.

    python scripts/init_toy_model.py
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers import __version__ as diffusers_version
from render_clips import CAPTIONS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TOY = Path(__file__).resolve().parent.parent / "shared" / "toy"
TEXT_DIM = 64
VOCABULARY = 512  # 256 bytes, the special tokens, and the words of the captions
LATENT_CHANNELS = 16
# Conditioned on an image: 16 noisy + 4 mask + 16 condition channels, as in Wan2.2-I2V-A14B.
IN_CHANNELS = {"t2v": 16, "i2v": 36}
PIPELINES = {"t2v": "WanPipeline", "i2v": "WanImageToVideoPipeline"}
BOUNDARIES = {"t2v": 0.875, "i2v": 0.9}


def toy_vae() -> AutoencoderKLWan:
    """The Wan VAE at toy size: 8x in space, 4x in time, 16 channels, 1.06 M parameters."""
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 3, 6],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        attn_scales=[],
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        # Neither 0 nor 1, so that a forgotten normalisation shows. Measured after training.
        latents_mean=[0.05 * (channel - 7.5) for channel in range(LATENT_CHANNELS)],
        latents_std=[0.6 + 0.05 * channel for channel in range(LATENT_CHANNELS)],
    )


def toy_transformer(mode: str) -> WanTransformer3DModel:
    """The Wan transformer at toy size, about 1.1 M parameters; mode is t2v or i2v."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=IN_CHANNELS[mode],
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        image_dim=None,
        added_kv_proj_dim=None,
        rope_max_seq_len=1024,
        pos_embed_seq_len=None,
    )


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the words of the captions; any other text falls to bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=["<pad>", "</s>", "<unk>"],  # ids 0, 1, 2, as in T5
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )


def toy_text_encoder() -> UMT5EncoderModel:
    """A random UMT5 encoder: [B, L] token ids to [B, L, 64]; never trained."""
    config = UMT5Config(
        vocab_size=VOCABULARY,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=0,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config)


def toy_scheduler() -> UniPCMultistepScheduler:
    """The scheduler of the Wan2.2 repositories."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=5.0,
        num_train_timesteps=1000,
        solver_order=2,
    )


def model_index(mode: str) -> dict[str, object]:
    """model_index.json of a pipeline with two experts."""
    index: dict[str, object] = {
        "_class_name": PIPELINES[mode],
        "_diffusers_version": diffusers_version,
        "boundary_ratio": BOUNDARIES[mode],
        "expand_timesteps": False,
    }
    if mode == "i2v":
        index["image_encoder"] = [None, None]
        index["image_processor"] = [None, None]
    return index | {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def save_component(model: torch.nn.Module, folder: Path) -> None:
    """Save as bf16 safetensors beside `folder`, then put it in its place; casts `model`.

    Readers see the old component or the new one, never half of one (up to the instant between
    two renames).
    """
    beside, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One by one, since `model.to` warns of the modules that are to be kept in fp32: that is for
    # those who load, what is stored is bf16 all the same.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(beside, safe_serialization=True)
    config = json.loads((beside / "config.json").read_text())
    config.pop("_name_or_path", None)  # where it was loaded from on this machine
    (beside / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in beside.iterdir():
        file.chmod(0o644)  # safetensors writes 0600
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=TOY)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    common = args.output / "common"
    if common.exists():
        parser.error(f"{common} exists (with trained weights?); remove {args.output} first")
    torch.manual_seed(args.seed)
    save_component(toy_text_encoder(), common / "text_encoder")
    save_component(toy_vae(), common / "vae")
    toy_tokenizer().save_pretrained(common / "tokenizer")
    toy_scheduler().save_pretrained(common / "scheduler")
    for mode in PIPELINES:
        folder = args.output / mode
        save_component(toy_transformer(mode), folder / "transformer")
        (folder / "model_index.json").write_text(json.dumps(model_index(mode), indent=2) + "\n")
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
