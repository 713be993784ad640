"""`wantrain decode` on the command line."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.cli.support import Command
from shared.device import default_device
from shared.models.spec import DEFAULT_MODEL
from train.options import DEVICE, INPUT, OUTPUT

DECODE_EXAMPLES = """
# what the students of Wan2.2-I2V-A14B made after 50 updates
wantrain decode --latents output_dir_distill/validation/step-50

# all validations of a run, one below the other
wantrain decode --latents output_dir_distill/validation --output all-steps

# the bundled toy model, on samples of its shards
wantrain distill --model toy --shards toy-shards --output-dir toy-watched \\
    --boundary-type full --start latents --max-train-steps 1 --rank 8 \\
    --validation-steps 1
wantrain decode --model toy --latents toy-watched/validation \\
    --output toy-decoded
"""


# fmt: off
def decode(
    latents: Annotated[list[Path], typer.Option(metavar="FILE|DIR", help="Latents that --validation-steps left, or a folder of them with all that is below; may be given several times.", rich_help_panel=INPUT)],
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model whose VAE decodes: a folder of diffusers or Wan, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=INPUT)] = DEFAULT_MODEL,

    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the clips (mp4) and the contact sheet (png).", rich_help_panel=OUTPUT)] = Path("decoded"),
    fps: Annotated[int, typer.Option(metavar="N", help="Frames per second of the mp4; Wan is trained at 16.", rich_help_panel=OUTPUT)] = 16,

    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Number format that the VAE computes in.", rich_help_panel=DEVICE)] = "fp32",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto takes a GPU where there is one.", rich_help_panel=DEVICE)] = "auto",
) -> None:
    """Show validation clips as the VAE decodes them.

    Training has no VAE and shows the colours of latents; this makes the clips themselves, afterwards or beside it, of every clip that a run has sampled.

    Next: wantrain sample --lora FILE --prompt TEXT, for the student alone
    """
    from rich.console import Console

    from train.sampling.decode import DecodeConfig, decode_clips

    config = DecodeConfig(
        latents=tuple(latents),
        model=model,
        output=output,
        fps=fps,
        dtype=dtype,
        device=default_device() if device == "auto" else device,
    )
    decode_clips(config, Console(stderr=True))


# fmt: on
def add_command(app: typer.Typer) -> None:
    """Make it a command of `wantrain`."""
    app.command(cls=Command, epilog=DECODE_EXAMPLES)(decode)
