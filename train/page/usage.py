"""What to do with the LoRAs of a run, as commands: printed at its end, and on its page."""

from collections.abc import Sequence

from shared.io.names import quoted
from train.config import TrainConfig
from train.memory.quantize import is_quantised
from train.run import Run
from train.sampling.comfyui import UI_FILE
from train.sampling.config import SampleConfig
from train.sampling.model_card import sample_command
from train.saving.export import lora_path
from train.saving.provenance import read_provenance


def sampling_hint(config: TrainConfig, runs: Sequence[Run]) -> str:
    """The command that makes a clip as large and long as the largest of the training."""
    loras = [lora_path(run.config.output_dir, run.objective.expert, "diffusers") for run in runs]
    return sample_command(read_provenance(loras[-1]), loras, config.model, _device_words(config))


def _device_words(config: TrainConfig) -> list[str]:
    """Options of `wantrain sample` that make it run where, and as small as, the training did."""
    words = []
    if config.device != SampleConfig.__dataclass_fields__["device"].default:
        words.append(f"--device {config.device}")
    if is_quantised(config.base_precision):
        words.append(f"--base-precision {config.base_precision}")
    if config.low_vram:
        words.append("--low-vram")
    return words


def comfyui_hint(config: TrainConfig, runs: Sequence[Run]) -> str:
    """Where the files go, and what to open."""
    paths = [lora_path(run.config.output_dir, run.objective.expert, "comfyui") for run in runs]
    copied = " ".join(map(quoted, paths))
    return f"copy {copied} to models/loras, then open {quoted(config.output_dir / UI_FILE)}"
