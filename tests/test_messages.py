"""What a user sees who got something wrong: one message, to the word, and no traceback.

A row is what was typed and what comes back. `{name}` stands for a path of the `world` fixture.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import preprocess.cli.app
import train.cli.app
from tests.models import tiny_model
from tests.preprocess.conftest import render_clip
from tests.train.conftest import encode, write_dataset

MAINS = {"wanprep": preprocess.cli.app.main, "wantrain": train.cli.app.main}
World = dict[str, Path]

ENCODE = "wanprep encode --model {t2v} --size 64 --video-sample-n-frames 5 --output {new} "
DISTILL = (
    "wantrain distill --boundary-type low --model {t2v} --shards {shards} --output-dir {new} "
    "--max-train-steps 1 "
)
SAMPLE = "wantrain sample --model {t2v} --prompt cat --output {new} "
TEACHER = SAMPLE + "--teacher --height 64 --width 96 --num-frames 5 "

ROWS: dict[str, tuple[str, str]] = {
    "actors without an engine for them": (
        ENCODE + "--train-data-dir {data} --ray-actors 2",
        "error: --ray-actors: 2 without --engine ray. Add that.",
    ),
    "a Ray Client's address": (
        ENCODE + "--train-data-dir {data} --engine ray --ray-address ray://head:10001",
        "error: --ray-address: ray://head:10001 is a Ray Client's; expected HOST:PORT of the head "
        "node, and the command run on one of the cluster's nodes.",
    ),
    "Ray and an object store": (
        "wanprep encode --model {t2v} --train-data-dir {data} --output memory://shards "
        "--engine ray",
        "error: --engine ray: --output is memory://shards, and embeddings wait in it for the other "
        "actors. Expected a folder that all nodes share; ranks (torchrun, srun) write to object "
        "stores.",
    ),
    "model folder missing": (
        "wanprep encode --model {nowhere} --train-data-dir {data} --output {new}",
        "error: model: no folder '{nowhere}'. Set --pretrained-model-name-or-path (or "
        "MODEL_NAME) to a model folder in diffusers layout, a hub id such as "
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers, or 'toy'.",
    ),
    "model is a hub id, offline": (
        "wanprep encode --model some-org/Some-Model --train-data-dir {data} --output {new}",
        "error: model: 'some-org/Some-Model' is neither a local folder nor to be had from "
        "the Hugging Face hub (HF_HUB_OFFLINE is set and an earlier download is not on this "
        "machine). Set --pretrained-model-name-or-path (or MODEL_NAME) to a local folder, or "
        "run once online: hf download some-org/Some-Model",
    ),
    "model folder is no model": (
        "wanprep encode --model {empty} --train-data-dir {data} --output {new}",
        "error: model: {empty} has neither a model_index.json (diffusers' layout) nor "
        "high_noise_model/config.json or a WanModel's config.json (Wan's original layout). "
        "Download a whole repository, e.g. Wan-AI/Wan2.2-I2V-A14B-Diffusers.",
    ),
    "model lacks its vae": (
        "wanprep encode --model {partial} --size 64 --train-data-dir {data} --output {new}",
        "error: model: cannot read {partial}/vae/config.json (No such file or directory). "
        "Download the whole folder again.",
    ),
    "nothing to inspect": (
        "wanprep inspect --shards {empty}",
        "error: shards: {empty} has no manifest.json. Make shards first: wanprep encode --size 640 "
        "--output {empty}",
    ),
    "nothing to verify": (
        "wanprep verify --shards {empty}",
        "error: --shards: no shards in {empty}. Make some: wanprep encode --output {empty}",
    ),
    "a sample that is not there": (
        "wanprep verify --shards {shards} --sample 12 --model {t2v} --train-data-dir {data}",
        "error: --sample: '12' is no key of the 6 samples in {shards}. Keys are 32 hex digits; "
        "wanprep inspect shows some.",
    ),
    "no data folder": (
        ENCODE + "--train-data-dir {nowhere}",
        "error: dataset: no folder {nowhere}. Set --train-data-dir (or DATASET_NAME) to a "
        "folder of videos and images with a metadata.json (or .jsonl, .csv), or with "
        "same-named .txt captions beside them, or of WebDataset tars.",
    ),
    "empty data folder": (
        ENCODE + "--train-data-dir {empty}",
        "error: dataset: {empty} has no metadata.json or metadata.jsonl or metadata.csv and "
        "no media (.mp4 .mov .mkv .webm .avi .m4v .mpg .mpeg .jpg .jpeg .png .webp .bmp .gif "
        ".apng .tif .tiff .avif). Set"
        " --train-data-dir (or DATASET_NAME) to a folder that has.",
    ),
    "no metadata file": (
        ENCODE + "--train-data-dir {data} --train-data-meta {nowhere}.json",
        "error: dataset: cannot read {nowhere}.json (No such file or directory). Set "
        "--train-data-meta (or DATASET_META_NAME) to a .json, .jsonl or .csv file with a path"
        " (file_path | video_path | image_path | file_name) and a caption (text | caption | "
        "captions) in"
        " each entry, or leave it out to use the .txt captions.",
    ),
    "metadata of no JSON": (
        ENCODE + "--train-data-dir {data} --train-data-meta {bad_json}",
        "error: dataset: {bad_json} is not valid JSON (Expecting property name enclosed in "
        "double quotes: line 1 column 3 (char 2)). Expected a JSON list of objects with a "
        "path (file_path | video_path | image_path | file_name) and a caption (text | "
        "caption | captions).",
    ),
    "metadata of the wrong kind": (
        ENCODE + "--train-data-dir {data} --train-data-meta {dict_json}",
        "error: dataset: {dict_json} holds an object. Expected a JSON list of objects with a "
        "path (file_path | video_path | image_path | file_name) and a caption (text | "
        "caption | captions). Put it in [brackets], or rename the file to dict.jsonl if it has "
        "one a "
        "line.",
    ),
    "metadata with other columns": (
        ENCODE + "--train-data-dir {data} --train-data-meta {columns_csv}",
        "error: dataset: {columns_csv} has no path column: its first line names path;text. "
        "Expected a header with file_path or video_path or image_path or file_name. Save it "
        "with commas between the columns.",
    ),
    "metadata of another form": (
        ENCODE + "--train-data-dir {data} --train-data-meta {a_yaml}",
        "error: dataset: {a_yaml} ends in '.yaml', expected .json, .jsonl or .csv with a "
        "path (file_path | video_path | image_path | file_name) and a caption (text | "
        "caption | captions) in each entry, or .txt with a caption a line and no media. Set "
        "--train-data-meta (or DATASET_META_NAME) to such a file.",
    ),
    "a pattern without tars": (
        ENCODE + "--train-data-dir {data}/*.tar",
        "error: dataset: no tar fits {data}/*.tar. Set --train-data-dir (or DATASET_NAME) to a "
        "folder, a tar or a pattern such as 'clips/{000..099}.tar'.",
    ),
    "a tar that is not there": (
        ENCODE + "--train-data-dir {nowhere}.tar",
        "error: dataset: {nowhere}.tar has nothing that can be encoded.\n"
        "1 rejected, listed in {new}/rejected.jsonl:\n"
        "  nowhere.tar: there is no such file",
    ),
    "captions without media for an i2v model": (
        ENCODE.replace("{t2v}", "{i2v}") + "--train-data-meta {prompts_txt}",
        "error: dataset: {prompts_txt} has 2 text-only captions, and {i2v} is an i2v model, "
        "which needs a first frame for each. Encode them for text-to-video (--train-mode "
        "normal, --output DIR), or leave them out.",
    ),
    "a list that lacks its paths": (
        ENCODE + "--train-data-dir {data} --train-data-meta {pathless_json}",
        "error: dataset: {pathless_json} has nothing that can be encoded.\n"
        "1 rejected, listed in {new}/rejected.jsonl:\n"
        "  pathless.json[0]: no file_path or video_path or image_path or file_name, expected the "
        'path of a file; a caption that stands for itself says so: "type": "text"',
    ),
    "two metadata files": (
        ENCODE + "--train-data-dir {two}",
        "error: dataset: {two} holds metadata.json, metadata.csv; expected one. Choose: "
        "--train-data-meta {two}/metadata.json",
    ),
    "a key that no dataset has": (
        ENCODE + "--dataset-config {bad_toml}",
        "error: dataset: {bad_toml}: dataset 1: unknown key 'target_frame'. Expected: batch_size, "
        "bucket_no_upscale, cache_directory, caption_extension, clips, clips_per_video, "
        "enable_ar_bucket, enable_bucket, fix_sample_size, fps, frame_buckets, frame_extraction, "
        "frame_sample, frame_stride, image_directory, image_jsonl_file, image_sample_size, "
        "max_frames, metadata, multiple_target, num_repeats, path, random_hw_adapt, "
        "random_ratio_crop, resolution, resolutions, skip_empty_caption, target_frames, "
        "token_sample_size, training_with_video_token_length, variants, video_directory, "
        "video_jsonl_file, video_sample_n_frames, video_sample_size, "
        "video_sample_stride.",
    ),
    "a list and a file of datasets": (
        ENCODE + "--dataset-config {bad_toml} --train-data-meta {missing_json}",
        "error: --dataset-config: {bad_toml} and --train-data-meta (or DATASET_META_NAME) "
        "{missing_json} are both given, expected one of them. A dataset of the TOML file may "
        'name a list: metadata = "FILE".',
    ),
    "no file of datasets": (
        ENCODE + "--dataset-config {nowhere}",
        "error: --dataset-config: cannot read {nowhere} (No such file or directory). Expected a "
        'TOML file such as:\n[[datasets]]\nvideo_directory = "clips"',
    ),
    "a listed file is missing": (
        ENCODE + "--train-data-dir {data} --train-data-meta {missing_json}",
        "error: dataset: {missing_json} has nothing that can be encoded.\n"
        "1 rejected, listed in {new}/rejected.jsonl:\n"
        "  lost.mp4: {data}/lost.mp4: there is no such file",
    ),
    "an empty video": (
        ENCODE + "--train-data-dir {with-empty_mp4}",
        "error: dataset: {with-empty_mp4} has nothing that can be encoded.\n"
        "1 rejected, listed in {new}/rejected.jsonl:\n"
        "  empty.mp4: {with-empty_mp4}/empty.mp4: the file is empty (0 bytes)",
    ),
    "a video that is text": (
        ENCODE + "--train-data-dir {with-text_mp4}",
        "error: dataset: {with-text_mp4} has nothing that can be encoded.\n"
        "1 rejected, listed in {new}/rejected.jsonl:\n"
        "  text.mp4: {with-text_mp4}/text.mp4: cannot decode the video (it is a "
        "text that begins 'text'. Fetch the file itself)",
    ),
    "an image that is text": (
        ENCODE + "--train-data-dir {with-text_png}",
        "error: dataset: {with-text_png} has nothing that can be encoded.\n"
        "1 rejected, listed in {new}/rejected.jsonl:\n"
        "  text.png: {with-text_png}/text.png: cannot decode the image (it is a text "
        "that begins 'text'. Fetch the file itself)",
    ),
    "size 0": (
        ENCODE + "--train-data-dir {data} --size 0",
        "error: --size or --image-sample-size: 0 is not between 32 and 4096; 640 gives 480P, "
        "960 gives 720P.",
    ),
    "frames not 4n+1": (
        ENCODE + "--train-data-dir {data} --video-sample-n-frames 80",
        "error: --video-sample-n-frames: 80 is not of the form 4n+1 (1, 5, 9, … 81); the "
        "nearest that is: 81.",
    ),
    "stride 0": (
        ENCODE + "--train-data-dir {data} --video-sample-stride 0",
        "error: --video-sample-stride: found 0, expected a whole number from 1.",
    ),
    "a stride and a frame rate": (
        ENCODE + "--train-data-dir {data} --fps 16 --video-sample-stride 2",
        "error: --fps 16 and --video-sample-stride 2 are both given, expected one of them: each "
        "says which frames are taken.",
    ),
    "frame rate 0": (
        ENCODE + "--train-data-dir {data} --fps 0",
        "error: --fps: found 0.0, expected a number above 0.",
    ),
    "a fixed size that is too small": (
        ENCODE + "--train-data-dir {data} --fix-sample-size 480 16",
        "error: --fix-sample-size: 480 16 is not a height and a width between 32 and 4096 pixels.",
    ),
    "a fixed size and drawn ratios": (
        ENCODE + "--train-data-dir {data} --fix-sample-size 64 96 --random-ratio-crop",
        "error: --fix-sample-size and --random-ratio-crop are both given, expected one of them: a "
        "size that is fixed leaves no shape to choose.",
    ),
    "squares and drawn ratios": (
        ENCODE + "--train-data-dir {data} --no-enable-bucket --random-ratio-crop",
        "error: --random-ratio-crop and --no-enable-bucket are both given, expected one of them: "
        "squares have one ratio.",
    ),
    "drawn sizes the wrong way round": (
        ENCODE + "--train-data-dir {data} --random_hw_adapt --training_with_video_token_length "
        "--image_sample_size 32",
        "error: --image-sample-size: 32 is smaller than --video-sample-size 64. With "
        "--random-hw-adapt and --training-with-video-token-length sizes are drawn from "
        "--video-sample-size up to --image-sample-size; set both to one value for a fixed size.",
    ),
    "several first clips": (
        ENCODE + "--train-data-dir {data} --clips chunk --clips-per-video 2",
        "error: --clips-per-video: 2 has no meaning with --clips chunk; it goes with --clips "
        "random or uniform.",
    ),
    "no repeat": (
        ENCODE + "--train-data-dir {data} --video_repeat 0",
        "error: --video-repeat: found 0, expected a whole number from 1.",
    ),
    "a mode that the model has not": (
        ENCODE + "--train-data-dir {data} --train_mode i2v",
        "error: --train-mode: i2v, but {t2v} is a model for t2v; expected normal. Leave the option "
        "out, or choose another model with --pretrained-model-name-or-path (or MODEL_NAME).",
    ),
    "size is no number": (
        ENCODE + "--size big",
        "Error: Invalid value for '--size': Input should be a valid integer, unable to parse "
        "string as an integer",
    ),
    "option with a typo": (
        "wanprep encode --train-dat-dir x",
        "Error: No such option: --train-dat-dir (Possible options: --train-data-dir, "
        "--train-data-meta, --train-mode)",
    ),
    "unknown device": (
        ENCODE + "--train-data-dir {data} --device gpu",
        "error: --device: found 'gpu', which torch can't use (no such kind of device). "
        "Expected auto, cpu, cuda, cuda:1 …",
    ),
    "output is a file": (
        "wanprep encode --model {t2v} --size 64 --train-data-dir {data} --output {file}",
        "error: --output: cannot write to {file} (File exists). Choose another folder.",
    ),
    "index of nothing": (
        "wanprep index --shards {nowhere}",
        "error: --shards: no shards in {nowhere}. Make some: wanprep encode --output {nowhere}",
    ),
    "no shards": (
        "wantrain distill --model {t2v} --shards {nowhere}",
        "error: shards: {nowhere} has no manifest.json. Make shards first: wanprep encode "
        "--size 640 --output {nowhere}",
    ),
    "less than no room for shards of a store": (
        "wantrain distill --model {t2v} --shards {shards} --shard-cache-gb -1",
        "error: --shard-cache-gb: found -1, expected 0 or more.",
    ),
    "a URL of an unknown kind": (
        "wantrain distill --model {t2v} --shards s4://bucket/shards",
        "error: s4://bucket/shards: ValueError: Protocol not known: s4. Expected a folder or a URL "
        "that fsspec knows, e.g. s3://bucket/shards",
    ),
    "empty shards": (
        "wantrain distill --model {t2v} --shards {empty}",
        "error: shards: {empty} has no manifest.json. Make shards first: wanprep encode "
        "--size 640 --output {empty}",
    ),
    "shards of another model": (
        "wantrain distill --model {i2v} --shards {shards}",
        "error: shards: {shards} was encoded for text-to-video, without the conditions that an i2v "
        "model needs. Add them; the latents stay as they are: wanprep add-condition --shards "
        "{shards} --pretrained-model-name-or-path {i2v} --train-data-dir DIR",
    ),
    "model folder missing for training": (
        "wantrain distill --model {nowhere} --shards {shards}",
        "error: model: no folder '{nowhere}'. Set --pretrained-model-name-or-path (or "
        "MODEL_NAME) to a model folder in diffusers layout, a hub id such as "
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers, or 'toy'.",
    ),
    "a typo in training": (
        DISTILL + "--ranc 4",
        "Error: No such option: --ranc (Possible options: --guidance, --match, --rank)",
    ),
    "wrong expert": (
        DISTILL + "--boundary-type middle",
        "Error: Invalid value for '--boundary-type': Value error, 'middle' is not one of "
        "'low', 'high', 'full', 'both'.",
    ),
    "expert without steps": (
        DISTILL + "--denoising-step-indices-list 1000,900",
        "error: --boundary-type low: no step belongs to this expert. The timesteps are "
        "1000.0, 990.8 (shift 12) and the boundary is 875; change "
        "--denoising-step-indices-list or --flow-shift.",
    ),
    "steps rise": (
        DISTILL + "--denoising-step-indices-list 250,500",
        "error: --denoising-step-indices-list: found '250,500', expected numbers falling"
        ' from at most 1000 to above 0, e.g. "1000 750 500 250".',
    ),
    "steps are words": (
        DISTILL + "--denoising-step-indices-list a,b",
        "error: --denoising-step-indices-list: found 'a,b', expected numbers falling"
        ' from at most 1000 to above 0, e.g. "1000 750 500 250".',
    ),
    "rank 0": (
        DISTILL + "--rank 0",
        "error: --rank: found 0, expected a whole number from 1.",
    ),
    "negative rate": (
        DISTILL + "--learning-rate -1",
        "error: --learning-rate: found -1.0, expected a number above 0.",
    ),
    "rate nan": (
        DISTILL + "--learning-rate nan",
        "error: --learning-rate: found nan, expected a number above 0.",
    ),
    "no target": (
        DISTILL + "--target-name ,",
        "error: --target-name: found '', expected names of layers, e.g. q,k,v.",
    ),
    "unknown target": (
        DISTILL + "--target-name q,kk",
        "error: --target-name: 'kk' names no linear layer of this transformer's blocks. There"
        " are: self_attn.q, self_attn.k, self_attn.v, self_attn.o, cross_attn.q, "
        "cross_attn.k, cross_attn.v, cross_attn.o, ffn.0, ffn.2 (or diffusers' names: "
        "attn1.to_q, attn1.to_k, attn1.to_v, attn1.to_out.0, attn2.to_q, attn2.to_k, "
        "attn2.to_v, attn2.to_out.0, ffn.net.0.proj, ffn.net.2).",
    ),
    "dropout 2": (
        DISTILL + "--caption-dropout 2",
        "error: --caption-dropout: found 2.0, expected a share in [0, 1].",
    ),
    "score floor for low": (
        DISTILL + "--score-floor handover",
        "error: --score-floor: found handover with --boundary-type low; it is a choice only "
        "for the high-noise expert. Leave it out.",
    ),
    "seed recipe from latents": (
        DISTILL + "--recipe seed --start latents",
        "error: --recipe: found seed with --start latents, but the seed's recipe starts from "
        "noise, trains all steps, draws its score levels from the expert's whole interval, "
        "matches clips and has one guidance scale. Leave out one of the two.",
    ),
    "no such checkpoint": (
        DISTILL + "--resume-from-checkpoint {nowhere}",
        "error: --resume-from-checkpoint: {nowhere} is not a checkpoint (no state.json in "
        "it). In {new} there are: none.",
    ),
    "training output is a file": (
        "wantrain distill --model {t2v} --shards {shards} --output-dir {file} --max-train-steps 1",
        "error: --output-dir: can't write to {file} (File exists). Choose another folder.",
    ),
    "too few for a batch": (
        DISTILL + "--train-batch-size 64 --tail drop",
        "error: shards: no full batch of 64 in any bucket (bucket sizes [1, 3, 2]); use "
        "--tail pad, a smaller --train-batch-size, or more data.",
    ),
    "sample without prompt": (
        "wantrain sample --teacher",
        "Error: Missing option '--prompt'.",
    ),
    "sample of nothing": (
        SAMPLE,
        "error: --lora: found neither --lora nor --teacher, expected one: --lora FILE, or "
        "--teacher for only the base model.",
    ),
    "sample of both": (
        SAMPLE + "--teacher --lora {nowhere}",
        "error: --lora: found both --lora and --teacher, expected one: --lora FILE, or "
        "--teacher for only the base model.",
    ),
    "lora missing": (
        SAMPLE + "--lora {nowhere}",
        "error: LoRA: cannot read {nowhere} as safetensors (there is no such file). Expected "
        "a file that `wantrain distill` wrote, such as "
        "output_dir_distill/lora-low-diffusers.safetensors.",
    ),
    "lora is no safetensors": (
        SAMPLE + "--lora {text_safetensors}",
        "error: LoRA: cannot read {text_safetensors} as safetensors (SafetensorError: Error "
        "while deserializing header: header too large). Expected a file that `wantrain "
        "distill` wrote, such as output_dir_distill/lora-low-diffusers.safetensors.",
    ),
    "lora of someone else": (
        SAMPLE + "--lora {foreign_safetensors}",
        "error: LoRA: {foreign_safetensors} has no training metadata ('wandistill'), so its steps "
        "can't be reproduced. Expected a file that `wantrain distill` or `lora` wrote; other LoRAs "
        "are merged into the base: --base-lora FILE (or --base-lora-high), with --teacher or the "
        "LoRA that was trained on it.",
    ),
    "frames of a clip": (
        TEACHER + "--num-frames 80",
        "error: --num-frames: found 80, expected 4n+1, e.g. 77 or 81.",
    ),
    "height of a clip": (
        TEACHER + "--height 100",
        "error: --height: found 100, expected a multiple of 16.",
    ),
    "empty prompt": (
        "wantrain sample --model {t2v} --teacher --prompt ''",
        "error: --prompt: found an empty prompt, expected text.",
    ),
    "clip of another width": (
        "wanprep encode --model {narrow} --size 64 --video-sample-n-frames 5 "
        "--train-data-dir {data} --output {new}",
        "error: model: {narrow}/image_encoder gives embeddings of width 32, the transformer takes "
        "48 (image_dim). Download the folder again.",
    ),
    "i2v without image": (
        "wantrain sample --model {i2v} --teacher --prompt cat",
        "error: --image: {i2v} is an i2v model and needs a first frame: --image FILE.",
    ),
    "t2v with image": (
        TEACHER + "--image {image_png}",
        "error: --image: {t2v} is a t2v model and takes no image. Leave it out.",
    ),
    "image that is text": (
        TEACHER.replace("{t2v}", "{i2v}") + "--image {file}",
        "error: --image: cannot read {file} as an image (no image, or a truncated one). "
        "Expected e.g. PNG or JPEG.",
    ),
    "steps 0": (
        TEACHER + "--steps 0",
        "error: --steps: found 0, expected a whole number from 1.",
    ),
    "metadata of JSON lines": (
        ENCODE + "--train-data-dir {data} --train-data-meta {lines_json}",
        "error: dataset: {lines_json} is not valid JSON (Extra data: line 2 column 1 (char "
        "36)). Expected a JSON list of objects with a path (file_path | video_path | "
        "image_path | file_name) and a caption (text | caption | captions). It looks like JSON "
        "lines: "
        "rename it to lines.jsonl.",
    ),
    "metadata without a caption": (
        ENCODE + "--train-data-dir {data} --train-data-meta {caption_csv}",
        "error: dataset: {caption_csv} has no caption column: its first line names "
        "file_path, prompt. Expected a header with text or caption or captions. Rename the "
        "column that "
        "has the captions.",
    ),
    "metadata of nothing": (
        ENCODE + "--train-data-dir {data} --train-data-meta {nothing_jsonl}",
        "error: dataset: {nothing_jsonl} lists nothing. Expected at least one entry with a "
        "path (file_path | video_path | image_path | file_name) and a caption (text | "
        "caption | captions). Fill it, or set --train-data-meta (or DATASET_META_NAME) to "
        "another file.",
    ),
    "a csv row too long": (
        ENCODE + "--train-data-dir {data} --train-data-meta {fields_csv}",
        "error: dataset: {fields_csv} has nothing that can be encoded.\n"
        "1 rejected, listed in {new}/rejected.jsonl:\n"
        "  fields.csv line 2: 3 fields, expected 2 as in the header; put captions with "
        'commas in "double quotes"',
    ),
    "an empty caption": (
        ENCODE + "--train-data-dir {data} --train-data-meta {blank_json}",
        "error: dataset: {blank_json} has nothing that can be encoded.\n"
        "1 rejected, listed in {new}/rejected.jsonl:\n"
        "  a.mp4: the caption is empty",
    ),
    "an empty image": (
        ENCODE + "--train-data-dir {with-empty_png}",
        "error: dataset: {with-empty_png} has nothing that can be encoded.\n"
        "1 rejected, listed in {new}/rejected.jsonl:\n"
        "  empty.png: {with-empty_png}/empty.png: the file is empty (0 bytes)",
    ),
    "unknown option": (
        ENCODE + "--nonsense 1",
        "Error: No such option: --nonsense (Possible options: --seed)",
    ),
    "shards can't be written": (
        "wanprep encode --model {t2v} --size 64 --train-data-dir {data} --output /proc/nothing",
        "error: --output: cannot write to /proc/nothing (No such file or directory). Choose "
        "another folder.",
    ),
    "a truncated prompt bank": (
        "wantrain distill --model {t2v} --shards {cut} --output-dir {new} --max-train-steps 1",
        "error: shards: {cut}/prompts-w000-00000.tar is damaged (it ends without the two blocks of "
        "zeros that close a tar: it is truncated). Restore it, or delete it together with "
        "prompts-w000-00000.json and run `wanprep encode` again.",
    ),
    "a sidecar of another file": (
        "wanprep index --shards {astray}",
        "error: sidecar: {astray}/prompts-w000-00000.json is of '../../etc/passwd', expected "
        "'prompts-w000-00000.tar'. If both were renamed, write that name into its `shard`; else "
        "restore it, or delete it and its tar and run `wanprep encode` again.",
    ),
    "shards without manifest": (
        "wantrain distill --model {t2v} --shards {bare} --output-dir {new}",
        "error: shards: {bare} has no manifest.json. Rebuild it: wanprep index --shards {bare}",
    ),
    "shards of other weights": (
        "wantrain distill --model {other} --shards {shards} --output-dir {new}",
        "error: {shards} were encoded with another model than {other}:\n"
        "  latents.vae: shards have "
        "'<digest>', expected "
        "'<digest>'\n"
        "  text.encoder: shards have "
        "'<digest>', expected "
        "'<digest>'\n"
        "To be redone for the expected values: everything: latents, conditions and text.\n"
        "Use the model that encoded them (--pretrained-model-name-or-path), or encode for "
        "this one: wanprep encode --pretrained-model-name-or-path {other} --output <folder>",
    ),
    "high expert of one transformer": (
        "wantrain distill --model {one} --shards {shards} --output-dir {new} --boundary-type high",
        "error: --boundary-type high: this model has one transformer and no boundary; use "
        "--boundary-type full.",
    ),
    "model lacks its transformer": (
        "wantrain distill --model {blind} --shards {shards} --output-dir {new}",
        "error: model: cannot read {blind}/transformer/config.json (No such file or "
        "directory). Download the whole folder again.",
    ),
    "no such GPU": (
        DISTILL + "--device cuda:99",
        "error: --device: found 'cuda:99', which torch can't use (Torch not compiled with "
        "CUDA enabled). Expected auto, cpu, cuda, cuda:1 …",
    ),
    "no updates": (
        DISTILL + "--max-train-steps 0",
        "error: --max-train-steps: found 0, expected a whole number from 1.",
    ),
    "negative critic rate": (
        DISTILL + "--learning-rate-critic -1",
        "error: --learning-rate-critic: found -1.0, expected a number above 0.",
    ),
    "length is a word": (
        DISTILL + "--max-train-steps many",
        "Error: Invalid value for '--max-train-steps': Input should be a valid integer, "
        "unable to parse string as an integer",
    ),
    "training can't be written": (
        DISTILL + "--output-dir /proc/nothing",
        "error: --output-dir: can't write to /proc/nothing (No such file or directory). "
        "Choose another folder.",
    ),
    "lora is a folder": (
        SAMPLE + "--lora {empty}",
        "error: LoRA: {empty} is a folder without a LoRA. Expected a .safetensors file, or a "
        "folder of peft or diffusers (adapter_model.safetensors, "
        "pytorch_lora_weights.safetensors).",
    ),
    "no such image": (
        TEACHER.replace("{t2v}", "{i2v}") + "--image {nowhere}",
        "error: --image: cannot read {nowhere} as an image (No such file or directory). "
        "Expected e.g. PNG or JPEG.",
    ),
    "fps 0": (
        TEACHER + "--fps 0",
        "error: --fps: found 0, expected a whole number from 1.",
    ),
    "guidance nan": (
        TEACHER + "--guidance-scale nan",
        "error: --guidance-scale: found nan, expected 0 or more.",
    ),
    "sample on no device": (
        TEACHER + "--device gpu",
        "error: --device: found 'gpu', which torch can't use (no such kind of device). "
        "Expected auto, cpu, cuda, cuda:1 …",
    ),
}


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_t2v: Path,
    tiny_i2v: Path,
    tiny_wan21_i2v: Path,
) -> World:
    """Everything that the rows name, good and bad."""
    root = tmp_path_factory.mktemp("world")
    paths = {name: root / name for name in ("nowhere", "empty", "file", "new", "data", "partial")}
    for name in ("empty", "data"):
        paths[name].mkdir()
    paths["file"].write_text("a file")
    render_clip(paths["data"] / "a.mp4", height=64, width=96, frames=9)
    (paths["data"] / "a.txt").write_text("a caption")

    def listed(name: str, text: str) -> None:
        paths[name] = root / name
        paths[name].write_text(text)

    listed("bad.json", "[{")
    listed("dict.json", "{}")
    listed("columns.csv", "path;text\n")
    listed("a.yaml", "")
    listed("prompts.txt", "a cat\na dog\n")
    listed("pathless.json", json.dumps([{"path": "a.mp4", "text": "t"}]))
    listed("missing.json", json.dumps([{"file_path": "lost.mp4", "text": "t"}]))
    listed("lines.json", '{"file_path": "a.mp4", "text": "t"}\n' * 2)
    listed("caption.csv", "file_path,prompt\n")
    listed("nothing.jsonl", "")
    listed("fields.csv", "file_path,text\na.mp4,red, blue\n")
    listed("blank.json", json.dumps([{"file_path": "a.mp4", "text": " "}]))
    listed("bad.toml", '[[datasets]]\npath = "data"\ntarget_frame = 1\n')
    listed("text.safetensors", "no tensors at all")
    (root / "two").mkdir()
    paths["two"] = root / "two"
    for name in ("metadata.json", "metadata.csv"):
        (paths["two"] / name).touch()
    for name in ("empty.mp4", "empty.png", "text.mp4", "text.png"):
        folder = paths[f"with-{name}"] = root / f"with-{name}"
        folder.mkdir()
        (folder / name).write_text("" if name.startswith("empty") else "text")
        (folder / name).with_suffix(".txt").write_text("a caption")
    for name, part in (("partial", "vae"), ("blind", "transformer"), ("one", "transformer_2")):
        paths[name] = root / name
        shutil.copytree(tiny_t2v, paths[name], symlinks=True)
        shutil.rmtree(paths[name] / part)
    index = json.loads((paths["one"] / "model_index.json").read_text())
    del index["transformer_2"]
    (paths["one"] / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": None}))
    paths["narrow"] = Path(shutil.copytree(tiny_wan21_i2v, root / "narrow"))
    config = json.loads((paths["narrow"] / "transformer/config.json").read_text())
    (paths["narrow"] / "transformer/config.json").write_text(json.dumps(config | {"image_dim": 48}))
    paths["other"] = tiny_model(root / "other", "t2v", seed=5)
    paths["foreign.safetensors"] = root / "foreign.safetensors"
    save_file({"x": torch.zeros(2)}, paths["foreign.safetensors"])
    paths["image.png"] = root / "image.png"
    Image.new("RGB", (96, 64)).save(paths["image.png"])
    shards = encode(write_dataset(root / "set"), tiny_t2v, root / "shards")
    paths["bare"] = root / "bare"
    shutil.copytree(shards, paths["bare"])
    (paths["bare"] / "manifest.json").unlink()
    for name in ("cut", "astray"):
        paths[name] = Path(shutil.copytree(shards, root / name))
    prompts = paths["cut"] / "prompts-w000-00000.tar"
    prompts.write_bytes(prompts.read_bytes()[:1024])
    sidecar = paths["astray"] / "prompts-w000-00000.json"
    value = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(value | {"shard": "../../etc/passwd"}))
    return paths | {
        "t2v": tiny_t2v,
        "i2v": tiny_i2v,
        "shards": shards,
    }


Say = Callable[[str], tuple[int, str]]


@pytest.fixture
def say(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Say:
    """Type a command; its exit code and what stands on stderr, paths by their names again."""
    world = world | {"new": tmp_path / "new"}

    def typed(line: str) -> tuple[int, str]:
        words = [
            word.format(**{name.replace(".", "_"): p for name, p in world.items()})
            for word in shlex.split(line)
        ]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:  # any other exception would be a traceback
            MAINS[words[0]]()
        said = capsys.readouterr().err
        for name, path in sorted(world.items(), key=lambda item: -len(str(item[1]))):
            said = said.replace(str(path), "{" + name.replace(".", "_") + "}")
        # Digests change with the libraries that wrote the files, the words do not.
        said = re.sub(r"\b[0-9a-f]{32,64}\b", "<digest>", said)
        return int(ended.value.code or 0), said

    return typed


@pytest.mark.parametrize("row", ROWS)
def test_the_message(row: str, say: Say, tmp_path: Path) -> None:
    line, message = ROWS[row]
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("this machine's torch has CUDA and says it in other words")
    code, said = say(line)
    # A refused run leaves no file behind; `wanprep encode` may leave its list of the rejected.
    assert line.startswith("wanprep") or not any((tmp_path / "new").rglob("*"))
    assert code == (2 if message.startswith("Error: ") else 1), said
    assert said[said.index(message.split(" ")[0]) :].strip() == message


@pytest.mark.parametrize("row", ["no data folder", "option with a typo", "no shards"])
def test_the_installed_command_says_the_same(row: str, world: World, tmp_path: Path) -> None:
    """As a process: nothing else, such as a warning of a library, stands around the message."""
    line, message = ROWS[row]
    paths = {name.replace(".", "_"): path for name, path in world.items()}
    program, *words = (
        word.format(**paths | {"new": tmp_path / "new"}) for word in shlex.split(line)
    )
    ended = subprocess.run(
        [Path(sys.executable).with_name(program), *words],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    expected = message.format(**paths)
    assert ended.returncode == (2 if message.startswith("Error: ") else 1)
    assert ended.stderr.strip().endswith(expected)
    assert ended.stderr.startswith(("error: ", "Usage: ")) and ended.stdout == ""
