"""`wanprep`: the command line of stage one. Heavy imports wait until a command runs."""

from preprocess.cli import edit, encode, inspect, overlays, plan
from shared.cli.support import new_app, run

PROGRAM_EXAMPLES = """
# encode datasets/ for Wan2.2-I2V-A14B, then train on the shards
wanprep encode
wantrain distill

# everything that a command takes
wanprep encode --help
"""

app = new_app(
    "Encode videos and images with captions, once, into shards that `wantrain` reads.",
    PROGRAM_EXAMPLES,
)


@app.callback()
def wanprep() -> None:
    """Keeps `encode` a subcommand whatever other commands there are."""


encode.add_command(app)
plan.add_command(app)
edit.add_commands(app)
overlays.add_commands(app)
inspect.add_commands(app)


def main() -> None:
    """The console script."""
    run(app)
