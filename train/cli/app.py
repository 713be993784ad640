"""`wantrain`: the command line of stage two. Heavy imports wait until a command runs."""

from shared.cli.support import new_app, run
from train.cli import bench, decode, distill, export, lora, merge, plan, sample

PROGRAM_EXAMPLES = """
# a LoRA of Wan2.2-I2V-A14B's low-noise expert, then a clip with it
wantrain distill
wantrain sample --lora output_dir_distill/lora-low-diffusers.safetensors \\
    --image frame.png --prompt "a cat turns its head"

# everything that a command takes
wantrain distill --help
"""

app = new_app(
    "Train LoRAs of Wan models from shards, few-step ones or plain, and sample with them.",
    PROGRAM_EXAMPLES,
)


for command in (distill, lora, sample, decode, export, merge, plan, bench):
    command.add_command(app)


def main() -> None:
    """Console script `wantrain`."""
    run(app)


if __name__ == "__main__":
    main()
