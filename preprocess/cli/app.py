"""`wanprep`: the command line of stage one. Heavy imports wait until a command runs."""

from preprocess.cli.doctor import doctor
from preprocess.cli.edit import compact, index, remove
from preprocess.cli.encode import encode
from preprocess.cli.inspect import inspect, verify
from preprocess.cli.overlays import add_condition, recaption
from preprocess.cli.plan import plan
from preprocess.encode.config import EncodeConfig, PlanConfig
from preprocess.overlays.config import ConditionConfig, RecaptionConfig
from shared.cli.config_command import add_config_command
from shared.cli.support import add_command, new_app, run
from shared.cli.videox_fun_command import VideoXFunCommand

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


add_config_command(app, EncodeConfig, encode, cls=VideoXFunCommand)
add_config_command(app, PlanConfig, plan, cls=VideoXFunCommand)
add_command(app, index)
add_command(app, remove)
add_command(app, compact)
add_config_command(app, RecaptionConfig, recaption)
add_config_command(app, ConditionConfig, add_condition)
add_command(app, inspect)
add_command(app, verify)
add_command(app, doctor)


def main() -> None:
    """The console script."""
    run(app)
