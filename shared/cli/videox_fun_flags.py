"""Every flag of VideoX-Fun's `scripts/wan2.2/train_distill_lora.py`: an option here, or why not.

So that a shell file for that script can be handed to `wanprep encode` and `wantrain distill` as it
is. docs/from-videox-fun.md says the same to people.
"""

from dataclasses import dataclass
from typing import Literal

ENCODE, TRAIN = "wanprep encode", "wantrain distill"
DEAD = "VideoX-Fun's script ignores it, too"
Values = Literal[0, 1, 2, "+"]


@dataclass(frozen=True, kw_only=True)
class VideoXFunFlag:
    """One flag, as the script's parser has it."""

    name: str
    """With underscores, without dashes."""
    values: Values = 1
    """How many follow it; 0: a switch."""
    owner: str = ""
    """The command of ours that has it as an option; of both the later one. Empty: none."""
    reason: str = ""
    """Of a flag without an owner: why it is not needed, or not supported."""
    refused: bool = False
    """It would change the LoRA and is not supported: an error, not ignored."""
    same_as: str | None = None
    """A value of a refused flag that asks for what is done here anyway."""

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")


def _options(owner: str, *names: str, values: Values = 1) -> list[VideoXFunFlag]:
    return [VideoXFunFlag(name=name, values=values, owner=owner) for name in names]


def _not_needed(reason: str, *names: str, values: Values = 1) -> list[VideoXFunFlag]:
    return [VideoXFunFlag(name=name, values=values, reason=reason) for name in names]


def _refused(
    name: str, reason: str, *, values: Values = 1, same_as: str | None = None
) -> VideoXFunFlag:
    return VideoXFunFlag(name=name, values=values, reason=reason, refused=True, same_as=same_as)


VIDEOX_FUN_FLAGS: tuple[VideoXFunFlag, ...] = (
    *_options(
        TRAIN, "pretrained_model_name_or_path", "seed", "video_repeat", "train_mode",
        "output_dir", "train_batch_size",
        "num_train_epochs", "max_train_steps", "gradient_accumulation_steps", "learning_rate",
        "learning_rate_critic", "lr_scheduler", "lr_warmup_steps", "dataloader_num_workers",
        "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm",
        "mixed_precision", "checkpointing_steps", "checkpoints_total_limit",
        "resume_from_checkpoint", "rank", "network_alpha", "boundary_type", "gen_update_interval",
        "fake_guidance_scale", "real_guidance_scale", "lora_skip_name", "target_name",
        "transformer_path", "validation_steps", "report_to", "tracker_project_name", "logging_dir",
    ),
    *_options(
        TRAIN, "gradient_checkpointing", "allow_tf32", "uniform_sampling", "random_frame_crop",
        "low_vram", "use_8bit_adam", values=0,
    ),
    *_options(TRAIN, "denoising_step_indices_list", values="+"),
    *_options(
        ENCODE, "train_data_dir", "train_data_meta",
        "negative_prompt", "vae_mini_batch", "token_sample_size", "video_sample_size",
        "image_sample_size", "video_sample_stride", "video_sample_n_frames",
    ),
    *_options(
        ENCODE, "enable_bucket", "random_ratio_crop", "random_hw_adapt",
        "training_with_video_token_length", values=0,
    ),
    *_options(ENCODE, "fix_sample_size", values=2),
    *_options(ENCODE, "validation_prompts", values="+"),

    # Always so here, or without effect
    *_not_needed("read from the model's own config files", "config_path"),
    *_not_needed("the LoRA is always peft's", "use_peft_lora", values=0),
    *_not_needed("no text encoder runs in training", "enable_text_encoder_in_dataloader", values=0),
    *_not_needed("it hides the VAE's time, and no VAE runs in training", "multi_stream", values=0),
    *_not_needed("a checkpoint always holds the whole state", "save_state", values=0),
    *_not_needed(
        "all samples of an update have one shape, on all ranks",
        "keep_all_node_same_token_length", values=0,
    ),
    *_not_needed("use `--strategy` zero2, zero3 or fsdp", "use_deepspeed", "use_fsdp", values=0),
    *_not_needed("set by the launcher (LOCAL_RANK)", "local_rank"),
    *_not_needed("score levels are continuous, not one of so many", "train_sampling_steps"),
    *_not_needed("HF_HOME sets the folder of hub models; " + DEAD, "cache_dir"),
    *_not_needed("give the revision's folder as model; " + DEAD, "revision", "variant"),
    *_not_needed("an option of another script; " + DEAD, "non_ema_revision"),
    *_not_needed(
        "use huggingface-cli upload afterwards; " + DEAD, "hub_token", "hub_model_id",
    ),
    *_not_needed("use huggingface-cli upload afterwards; " + DEAD, "push_to_hub", values=0),
    *_not_needed(DEAD, "random_flip", "report_model_info", "snr_loss", "motion_sub_loss", values=0),
    *_not_needed(
        DEAD, "input_perturbation", "max_train_samples", "prediction_type", "noise_offset",
        "motion_sub_loss_ratio",
    ),
    *_not_needed("images are in the list of --validation-prompts", "validation_paths", values="+"),
    *_not_needed("--validation-steps counts optimizer steps", "validation_epochs"),

    # Would change the LoRA
    _refused("use_came", "the optimizer is AdamW; leave it out", values=0),
    _refused(
        "scale_lr", "set --learning-rate to the final learning rate; VideoX-Fun scales it by "
        "batch size, accumulation steps and processes", values=0,
    ),
    _refused(
        "train_text_encoder", "captions are encoded before training; leave it out", values=0
    ),
    _refused(
        "auto_tile_batch_size", "every optimizer step has exactly the given number of samples; "
        "leave it out, or raise --train-batch-size", values=0,
    ),
    _refused(
        "vae_path", "latents are from the model folder's own VAE; put the other one into a "
        "copy of that folder and give it as --pretrained-model-name-or-path to wanprep encode",
    ),
    _refused(
        "tokenizer_max_length", "the model reads 512 tokens, and as many are encoded; leave it out",
        same_as="512",
    ),
)  # fmt: skip
