"""What to do with the LoRAs of a run, as commands: printed at its end, and on its page."""

from collections.abc import Sequence

from shared.io.names import quoted
from shared.models.spec import DEFAULT_MODEL
from train.config import TrainConfig
from train.memory.quantize import is_quantised
from train.run import Run
from train.sampling.comfyui import UI_FILE
from train.sampling.config import SampleConfig
from train.saving.export import lora_path


def sample_command(config: TrainConfig, runs: Sequence[Run]) -> str:
    """The command that makes a clip as large and long as the largest of the training."""
    spec = runs[0].spec
    words = ["wantrain sample"]
    if config.model != DEFAULT_MODEL:
        words.append(f"--model {quoted(config.model)}")
    for run in runs:
        expert = run.objective.expert
        file = lora_path(run.config.output_dir, expert, "diffusers")
        words.append(f"--lora {quoted(file)}")
    largest = max(
        runs[0].data.filled_buckets(), key=lambda b: (b.height * b.width * b.frames, b.width)
    )
    shape = {"height": largest.height, "width": largest.width, "num_frames": largest.frames}
    options = SampleConfig.__dataclass_fields__
    for name, value in shape.items():
        if value != options[name].default:
            words.append(f"--{name.replace('_', '-')} {value}")
    if config.device != options["device"].default:
        words.append(f"--device {config.device}")
    if is_quantised(config.base_precision):
        words.append(f"--base-precision {config.base_precision}")
    if config.low_vram:
        words.append("--low-vram")
    if spec.given_frames:
        words.append("--image FIRST-FRAME")
    if len(spec.given_frames) > 1:
        words.append("--last-image LAST-FRAME")
    return " ".join([*words, "--prompt TEXT"])


def comfyui_hint(config: TrainConfig, runs: Sequence[Run]) -> str:
    """Where the files go, and what to open."""
    paths = [lora_path(run.config.output_dir, run.objective.expert, "comfyui") for run in runs]
    copied = " ".join(map(quoted, paths))
    return f"copy {copied} to models/loras, then open {quoted(config.output_dir / UI_FILE)}"
