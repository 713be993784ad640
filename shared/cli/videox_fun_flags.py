"""Every flag of VideoX-Fun's `scripts/wan2.2/train_distill_lora.py`: an option here, or why not.

So that a shell file for that script can be handed to `wanprep encode` and `wantrain distill` as it
is. docs/from-videox-fun.md says the same to people.
"""

from dataclasses import dataclass
from typing import Literal

ENCODE, TRAIN = "wanprep encode", "wantrain distill"
DEAD = "VideoX-Fun's script does nothing with it, either"


Values = Literal[0, 1, 2, "+"]


@dataclass(frozen=True, kw_only=True)
class SeedFlag:
    """One flag, as the script's parser has it."""

    name: str
    """With underscores, without dashes."""
    values: Values = 1
    """How many follow it; 0: a switch."""
    fate: str = ""
    """What became of a flag that is no option of ours, to follow "not needed" or "there is none"."""
    refused: bool = False
    """It would change the LoRA in a way that there is not here: told, not passed over."""
    same_as: str | None = None
    """A value of a refused flag that asks for what is done here anyway."""

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")


def _options(*names: str, values: Values = 1) -> list[SeedFlag]:
    return [SeedFlag(name=name, values=values) for name in names]


def _moot(fate: str, *names: str, values: Values = 1) -> list[SeedFlag]:
    return [SeedFlag(name=name, values=values, fate=fate) for name in names]


def _refused(name: str, fate: str, *, values: Values = 1, same_as: str | None = None) -> SeedFlag:
    return SeedFlag(name=name, values=values, fate=fate, refused=True, same_as=same_as)


SEED_FLAGS: tuple[SeedFlag, ...] = (
    # Options of one of our commands, or of both
    *_options(
        "pretrained_model_name_or_path", "seed", "video_repeat", "train_mode", "train_data_dir",
        "train_data_meta", "negative_prompt", "vae_mini_batch", "token_sample_size",
        "video_sample_size", "image_sample_size", "video_sample_stride",
        "video_sample_n_frames", "output_dir", "train_batch_size", "num_train_epochs",
        "max_train_steps", "gradient_accumulation_steps", "learning_rate",
        "learning_rate_critic", "lr_scheduler", "lr_warmup_steps", "dataloader_num_workers",
        "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm",
        "mixed_precision", "checkpointing_steps", "checkpoints_total_limit",
        "resume_from_checkpoint", "rank", "network_alpha", "boundary_type",
        "gen_update_interval", "fake_guidance_scale", "real_guidance_scale", "lora_skip_name",
        "target_name", "transformer_path", "validation_steps", "report_to",
        "tracker_project_name", "logging_dir",
    ),
    *_options(
        "enable_bucket", "random_ratio_crop", "random_hw_adapt",
        "training_with_video_token_length", "gradient_checkpointing", "allow_tf32",
        "uniform_sampling", "random_frame_crop", "low_vram", "use_8bit_adam", values=0,
    ),
    *_options("fix_sample_size", values=2),
    *_options("validation_prompts", "denoising_step_indices_list", values="+"),

    # Asks for what is so here anyway, or for nothing
    *_moot("what it says stands in the model's own config files", "config_path"),
    *_moot("the LoRA is peft's, always", "use_peft_lora", values=0),
    *_moot("no text encoder runs in training", "enable_text_encoder_in_dataloader", values=0),
    *_moot("no VAE runs in training, whose time it hides", "multi_stream", values=0),
    *_moot("a checkpoint holds the whole state, always", "save_state", values=0),
    *_moot(
        "all samples of an update have one shape, on all ranks",
        "keep_all_node_same_token_length", values=0,
    ),
    *_moot("`--strategy` says it: zero2, zero3 or fsdp", "use_deepspeed", "use_fsdp", values=0),
    *_moot("a launcher says it by LOCAL_RANK", "local_rank"),
    *_moot("score levels are any number, not one of so many", "train_sampling_steps"),
    *_moot("hub models lie where HF_HOME says; " + DEAD, "cache_dir"),
    *_moot("a folder of the revision can be given as model; " + DEAD, "revision", "variant"),
    *_moot("it is of another script; " + DEAD, "non_ema_revision"),
    *_moot(
        "huggingface-cli upload does it afterwards; " + DEAD, "hub_token", "hub_model_id",
    ),
    *_moot("huggingface-cli upload does it afterwards; " + DEAD, "push_to_hub", values=0),
    *_moot(DEAD, "random_flip", "report_model_info", "snr_loss", "motion_sub_loss", values=0),
    *_moot(
        DEAD, "input_perturbation", "max_train_samples", "prediction_type", "noise_offset",
        "motion_sub_loss_ratio",
    ),
    *_moot("pictures stand in the list of --validation-prompts", "validation_paths", values="+"),
    *_moot("--validation-steps counts updates", "validation_epochs"),

    # Would change what is learnt
    _refused("use_came", "the optimizer is AdamW; leave it out", values=0),
    _refused(
        "scale_lr", "set --learning-rate to the product that you want; there it is the rate times "
        "batch size, accumulation steps and processes", values=0,
    ),
    _refused(
        "train_text_encoder", "captions are encoded before training; leave it out", values=0
    ),
    _refused(
        "auto_tile_batch_size", "every update has as many samples as you say; leave it out, or "
        "raise --train-batch-size", values=0,
    ),
    _refused(
        "vae_path", "latents are those of the model folder's own VAE; put the other one into a "
        "copy of that folder and give it as --pretrained-model-name-or-path to wanprep encode",
    ),
    _refused(
        "tokenizer_max_length", "the model reads 512 tokens, and so much is encoded; leave it out",
        same_as="512",
    ),
)  # fmt: skip
