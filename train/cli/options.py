"""Options that the commands which train have in common: type, help and group of each."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.errors import UserError
from train.data.weighted_folder import WeightedFolder, weighted_folder

INPUT, OUTPUT, LENGTH, WATCH, LORA, OPTIMIZER, DATA, DEVICE, PROCESSES = (
    "Input",
    "Output",
    "Length and checkpoints",
    "Watching",
    "LoRA",
    "Optimizer (AdamW)",
    "Data",
    "Device",
    "Processes",
)

DEFAULT_SHARDS = [WeightedFolder(Path("shards"))]
ALL_SAMPLES: list[str] = []


def shards_option(text: str | WeightedFolder) -> WeightedFolder:
    """`weighted_folder` for the command line, which shows a ValueError's value alone."""
    if isinstance(text, WeightedFolder):
        return text
    try:
        return weighted_folder(text)
    except UserError as error:
        raise typer.BadParameter(str(error)) from error


def names(text: str) -> tuple[str, ...]:
    """ "q,k v" → ("q", "k", "v")."""
    return tuple(text.replace(",", " ").split())


# fmt: off
Model = Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model to train a LoRA of: a folder of diffusers or Wan, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=INPUT)]
TransformerPath = Annotated[Path | None, typer.Option(metavar="PATH", help="Weights of your own in place of the expert's in MODEL: a .safetensors file (Wan's, ComfyUI's or diffusers' names; fp32, bf16, fp16 or fp8), or a folder. Config, VAE and text encoder stay MODEL's.", show_default="the expert in MODEL", rich_help_panel=INPUT)]
BaseLora = Annotated[list[str] | None, typer.Option(metavar="FILE[:X]", help="LoRA to merge into the base first, at strength X (1 if left out); diffusers', ComfyUI's or kohya's form. Can be given several times.", show_default="none", rich_help_panel=INPUT)]
Shards = Annotated[list[WeightedFolder], typer.Option(parser=shards_option, metavar="DIR|URL", help="Folder of shards that `wanprep encode` made; several, if given several times. DIR@W has a weight: an epoch shows its samples W times, e.g. DIR@3 or DIR@0.5.", rich_help_panel=INPUT)]
Where = Annotated[list[str], typer.Option(metavar="COND", help="Train only on samples that fulfil this, e.g. 'frames>=17', 'tag=good', 'caption~=cat' or 'source=clips/*'; if given several times, all of it. Fields: caption, source, tag, type, bucket, height, width, frames, tokens.", show_default="all samples", rich_help_panel=INPUT)]
ShardCacheGb = Annotated[float, typer.Option(metavar="GB", help="Room on this machine for whole shards of an object store (s3://bucket/shards); what is beyond is read sample by sample.", rich_help_panel=INPUT)]
Captions = Annotated[str | None, typer.Option(metavar="NAME", help="Captions that `wanprep recaption --name NAME` made, in place of the shards' own.", show_default="the shards' own", rich_help_panel=INPUT)]
BoundaryType = Annotated[Literal["low", "high", "full"] | None, typer.Option(help="Expert to train: the one for low or for high noise, or full for a model with one transformer (or one LoRA for all steps).", show_default="low where the model has two experts, else full", rich_help_panel=INPUT)]
Seed = Annotated[int, typer.Option(metavar="N", help="Random seed of the whole run.", rich_help_panel=INPUT)]

TrainMode = Annotated[Literal["normal", "i2v", "ti2v"] | None, typer.Option("--train-mode", help="What the model must be for, or it is refused; normal is t2v, and with a ti2v model shows all clips as text to video.", show_default="as the model is", rich_help_panel=INPUT)]

OutputDir = Annotated[Path, typer.Option(metavar="DIR", help="Folder for checkpoints, logs and the final LoRA.", rich_help_panel=OUTPUT)]
SavePrecision = Annotated[Literal["bf16", "fp32"], typer.Option(help="Number format of the final LoRA files (checkpoints are fp32).", rich_help_panel=OUTPUT)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration, the plan and an estimate of the memory, then stop.", show_default="off", rich_help_panel=OUTPUT)]

MaxTrainSteps = Annotated[int | None, typer.Option(metavar="N", help="Optimizer steps of the LoRA (distill: of the generator), in place of epochs.", show_default="as many as the epochs have", rich_help_panel=LENGTH)]
NumTrainEpochs = Annotated[int, typer.Option(metavar="N", help="Epochs, passes over the shards, in place of --max-train-steps (distill: counting steps of both roles).", rich_help_panel=LENGTH)]
CheckpointingSteps = Annotated[int, typer.Option(metavar="N", help="Save a checkpoint every N optimizer steps of the LoRA (distill: of the generator).", rich_help_panel=LENGTH)]
CheckpointsTotalLimit = Annotated[int | None, typer.Option(metavar="N", help="Keep at most N checkpoints; the oldest are deleted.", show_default="all", rich_help_panel=LENGTH)]
ResumeFromCheckpoint = Annotated[str | None, typer.Option(metavar="DIR|latest", help="Checkpoint to go on from: its folder, or latest (a new run where there is none yet).", show_default="a new run", rich_help_panel=LENGTH)]

ValidationSteps = Annotated[int | None, typer.Option(metavar="N", help="Sample the shards' validation prompts (see `wanprep encode`) every N updates of the LoRA, and once before the first; shown by the latents' colours, without a VAE.", show_default="never", rich_help_panel=WATCH)]
ReportTo = Annotated[str, typer.Option(metavar="LIST", help="Where numbers and validation clips go: tensorboard, csv, wandb, comet_ml, aim, mlflow, clearml, dvclive, swanlab, trackio; several with commas, all that are installed, or none.", rich_help_panel=WATCH)]
LoggingDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the trackers' files.", show_default="logs in the output folder", rich_help_panel=WATCH)]
TrackerProjectName = Annotated[str, typer.Option(metavar="NAME", help="Project under which wandb and its like file the run.", rich_help_panel=WATCH)]

InitLora = Annotated[Path | None, typer.Option(metavar="FILE", help="Start from this LoRA in place of a zero one (distill: the generator only); diffusers', ComfyUI's or kohya's form, of any alpha and a rank up to --rank.", show_default="none", rich_help_panel=LORA)]
Rank = Annotated[int, typer.Option(metavar="N", help="LoRA rank.", rich_help_panel=LORA)]
NetworkAlpha = Annotated[float, typer.Option(metavar="X", help="LoRA alpha: the LoRA's output is scaled by alpha / rank.", rich_help_panel=LORA)]
TargetName = Annotated[str, typer.Option(metavar="LIST", help="Layers of each block that get a LoRA, by Wan's or diffusers' names.", rich_help_panel=LORA)]
LoraSkipName = Annotated[str, typer.Option(metavar="LIST", help="Skip layers whose name contains one of these, e.g. cross_attn.", show_default="none", rich_help_panel=LORA)]
EmaDecay = Annotated[float, typer.Option(metavar="X", help="EMA decay of the LoRA's weights, e.g. 0.99: the saved LoRA is their moving average; 0: the last weights.", rich_help_panel=LORA)]
EmaStart = Annotated[int, typer.Option(metavar="N", help="Optimizer steps of the LoRA before the EMA begins.", rich_help_panel=LORA)]

LearningRate = Annotated[float, typer.Option(metavar="X", help="Learning rate of the LoRA (distill: of the generator).", rich_help_panel=OPTIMIZER)]
LrScheduler = Annotated[Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"], typer.Option(metavar="NAME", help="Learning-rate schedule after the warm-up: constant, linear, cosine, cosine_with_restarts or polynomial (diffusers').", rich_help_panel=OPTIMIZER)]
LrWarmupSteps = Annotated[int, typer.Option(metavar="N", help="Optimizer steps over which the learning rate rises from 0 (distill: of each role).", rich_help_panel=OPTIMIZER)]
AdamBeta1 = Annotated[float, typer.Option(metavar="X", help="AdamW beta1: decay rate of the first moment.", rich_help_panel=OPTIMIZER)]
AdamBeta2 = Annotated[float, typer.Option(metavar="X", help="AdamW beta2: decay rate of the second moment.", rich_help_panel=OPTIMIZER)]
AdamWeightDecay = Annotated[float, typer.Option(metavar="X", help="AdamW weight decay.", rich_help_panel=OPTIMIZER)]
AdamEpsilon = Annotated[float, typer.Option(metavar="X", help="AdamW epsilon.", rich_help_panel=OPTIMIZER)]
Use8bitAdam = Annotated[bool, typer.Option("--use-8bit-adam", help="AdamW with 8-bit moments, a quarter of their memory; matrices of fewer than 4096 weights keep fp32. For single and ddp.", show_default="off", rich_help_panel=OPTIMIZER)]
MaxGradNorm = Annotated[float, typer.Option(metavar="X", help="Clip the gradient norm of each optimizer step to this.", rich_help_panel=OPTIMIZER)]

TrainBatchSize = Annotated[int, typer.Option(metavar="N", help="Samples per process in one forward and backward pass.", rich_help_panel=DATA)]
GradientAccumulationSteps = Annotated[int, typer.Option(metavar="N", help="Forward and backward passes per optimizer step.", rich_help_panel=DATA)]
VideoRepeat = Annotated[int | None, typer.Option(metavar="N", help="Times that a video occurs in an epoch, whatever `wanprep encode` said.", show_default="as the shards say", rich_help_panel=DATA)]
CaptionDropout = Annotated[float, typer.Option(metavar="X", help="Share of captions, 0 to 1, that are replaced by the empty prompt.", rich_help_panel=DATA)]
RandomFrameCrop = Annotated[bool, typer.Option("--random-frame-crop", help="In one update of ten, show clips up to a random frame only, 4n+1 from 5 on, so that the LoRA knows shorter clips, too.", show_default="off", rich_help_panel=DATA)]
Tail = Annotated[Literal["pad", "drop"], typer.Option(help="A bucket's last, incomplete batch: pad it with samples of the bucket, or drop it.", rich_help_panel=DATA)]
DataloaderNumWorkers = Annotated[int, typer.Option(metavar="N", help="Threads that read batches ahead; 0: read in the training loop.", rich_help_panel=DATA)]

MixedPrecision = Annotated[Literal["bf16", "no"], typer.Option(help="Base and compute in bf16 (LoRA stays fp32), or all in fp32.", rich_help_panel=DEVICE)]
BasePrecision = Annotated[Literal["bf16", "fp8", "int8", "nf4"] | None, typer.Option(help="How the linear layers of the base's blocks are kept: int8 and fp8 take half of bf16's memory, nf4 (bitsandbytes) less than a third. Teacher, generator and critic all use them; a matmul is in bf16 or fp32 all the same.", show_default="as --mixed-precision says", rich_help_panel=DEVICE)]
GradientCheckpointing = Annotated[bool, typer.Option(help="Recompute each block in the backward pass: far less memory, a third more time.", show_default="on", rich_help_panel=DEVICE)]
LowVram = Annotated[bool, typer.Option("--low-vram", help="Keep the base's blocks in CPU memory and copy each to the GPU while the one before it computes. Slower where clips are small.", show_default="off", rich_help_panel=DEVICE)]
BlocksToSwap = Annotated[int | None, typer.Option(metavar="N", help="The same for N of the blocks, spread evenly; the others stay on the GPU.", show_default="none; with --low-vram all", rich_help_panel=DEVICE)]
ActivationOffloading = Annotated[bool, typer.Option("--activation-offloading", help="Keep the activations that gradient checkpointing stores (each block's input) in CPU memory.", show_default="off", rich_help_panel=DEVICE)]
AllowTf32 = Annotated[bool, typer.Option("--allow-tf32", help="Let a GPU multiply fp32 matrices in TF32: faster, and rounded to 10 bits.", show_default="off", rich_help_panel=DEVICE)]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the transformer's blocks with torch.compile: minutes at the start, then faster steps; see docs/speed.md.", show_default="off", rich_help_panel=DEVICE)]
AttentionBackend = Annotated[str, typer.Option(metavar="NAME", envvar="DIFFUSERS_ATTN_BACKEND", help="Attention backend, by diffusers' names: native (torch SDPA), flash (flash-attn), _flash_3_hub, xformers, _native_cudnn, _native_flash and so on.", rich_help_panel=DEVICE)]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto takes a GPU where there is one.", rich_help_panel=DEVICE)]

Strategy = Annotated[Literal["single", "ddp", "zero2", "zero3", "fsdp"] | None, typer.Option(help="How processes share the work: ddp keeps the whole model in each; fsdp and zero3 shard it across them, zero2 only the optimizer (zero2, zero3: DeepSpeed).", show_default="what accelerate launch was told; else ddp for several processes, single for one", rich_help_panel=PROCESSES)]
NumProcesses = Annotated[int | None, typer.Option(metavar="N", envvar="NUM_PROCESS", help="Processes over all machines, one per GPU; this command starts those of its machine.", show_default="1, or one for each GPU with a strategy", rich_help_panel=PROCESSES)]
NumMachines = Annotated[int, typer.Option(metavar="N", envvar="WORLD_SIZE", help="Machines (nodes) of the run; start the same command on each.", rich_help_panel=PROCESSES)]
MachineRank = Annotated[int, typer.Option(metavar="N", envvar="RANK", help="Rank of this machine among them, from 0.", rich_help_panel=PROCESSES)]
MainProcessIp = Annotated[str, typer.Option(metavar="HOST", envvar="MASTER_ADDR", help="Address of machine 0.", rich_help_panel=PROCESSES)]
MainProcessPort = Annotated[int | None, typer.Option(metavar="PORT", envvar="MASTER_PORT", help="Port of machine 0 at which processes meet.", show_default="a free one, on one machine", rich_help_panel=PROCESSES)]
DdpTimeout = Annotated[int, typer.Option(metavar="S", help="Seconds that a process waits for the others before the run is given up.", rich_help_panel=PROCESSES)]
# fmt: on
