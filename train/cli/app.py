"""`wantrain`: the command line of stage two. Heavy imports wait until a command runs."""

from shared.cli.config_command import add_config_command
from shared.cli.support import add_command, new_app, run
from shared.cli.videox_fun_command import VideoXFunCommand
from train.calibration.config import CalibrateConfig
from train.cli.bench import bench
from train.cli.calibrate import calibrate
from train.cli.decode import decode
from train.cli.distill import distill
from train.cli.doctor import doctor
from train.cli.evaluate import evaluate
from train.cli.export import export
from train.cli.lora import lora
from train.cli.merge import merge
from train.cli.plan import plan
from train.cli.sample import sample
from train.cli.synthesize import synthesize
from train.cli.workflow import workflow
from train.config import BenchConfig, DistillConfig, FinetuneConfig, PlanConfig
from train.evaluation.config import EvaluateConfig
from train.sampling.config import DecodeConfig, SampleConfig, WorkflowConfig
from train.saving.config import MergeConfig
from train.synthesis.config import SynthesizeConfig

PROGRAM_EXAMPLES = """
# LoRAs of Wan2.2-I2V-A14B's two experts, then a clip with them
wantrain distill
wantrain sample \\
    --lora output_dir_distill/high/lora-high-diffusers.safetensors \\
    --lora output_dir_distill/low/lora-low-diffusers.safetensors \\
    --image frame.png --prompt "a cat turns its head"

# everything that a command takes
wantrain distill --help
"""

app = new_app(
    "Train LoRAs of Wan models from shards, few-step ones or plain, and sample with them.",
    PROGRAM_EXAMPLES,
)

add_config_command(app, DistillConfig, distill, cls=VideoXFunCommand)
add_config_command(app, FinetuneConfig, lora, cls=VideoXFunCommand)
add_config_command(app, SampleConfig, sample)
add_config_command(app, SynthesizeConfig, synthesize)
add_config_command(app, CalibrateConfig, calibrate)
add_config_command(app, DecodeConfig, decode)
add_config_command(app, EvaluateConfig, evaluate)
add_command(app, export)
add_config_command(app, WorkflowConfig, workflow)
add_config_command(app, MergeConfig, merge)
add_config_command(app, PlanConfig, plan)
add_config_command(app, BenchConfig, bench, cls=VideoXFunCommand)
add_command(app, doctor)


def main() -> None:
    """Console script `wantrain`."""
    run(app)


if __name__ == "__main__":
    main()
