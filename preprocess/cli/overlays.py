"""The commands of `wanprep` that add to a cache what its samples lack: `recaption`, `add-condition`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.cli.support import Command, echo
from shared.device import default_device
from shared.errors import UserError
from shared.interrupt import SIGNAL_EXIT
from shared.io.mirror import open_store
from shared.io.names import quoted
from shared.models.spec import DEFAULT_MODEL

RECAPTION_EXAMPLES = """
# the captions of a list, called short; then train with them
wanprep recaption --name short --train-data-meta captions-short.jsonl
wantrain distill --captions short

# the captions that the shards have, by another text encoder
wanprep recaption --name other-encoder --same-captions --model my/wan

# the shards of the bundled toy model
wanprep recaption --name again --same-captions --model toy --shards toy-shards
"""
CONDITION_EXAMPLES = """
# a t2v cache in shards/ and its media in datasets/: train i2v on it too
wanprep add-condition --model Wan-AI/Wan2.2-I2V-A14B-Diffusers
wantrain distill --model Wan-AI/Wan2.2-I2V-A14B-Diffusers

# the shards of the bundled toy model
wanprep add-condition --model toy-i2v --train-data-dir toy-clips \\
    --shards toy-shards
"""

INPUT, CAPTIONS, ENCODERS = "Input", "Captions", "Encoders"
Dtype = Literal["bf16", "fp32"]


# fmt: off
def recaption(
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the caption set, for wantrain distill --captions NAME.", rich_help_panel=CAPTIONS)],
    train_data_dir: Annotated[str, typer.Option(metavar="DIR|URL", envvar="DATASET_NAME", help="Folder (or tars) that the files of the list are relative to; the media need not be there.", rich_help_panel=CAPTIONS)] = "datasets",
    train_data_meta: Annotated[str | None, typer.Option(metavar="FILE|URL", envvar="DATASET_META_NAME", help="List of files and captions, as wanprep encode takes it.", show_default="metadata.json, .jsonl or .csv in the data folder, else a.txt beside a.mp4", rich_help_panel=CAPTIONS)] = None,
    dataset_config: Annotated[Path | None, typer.Option(metavar="FILE", help="Several datasets in one TOML file, as wanprep encode takes it, in place of --train-data-dir.", show_default="one dataset", rich_help_panel=CAPTIONS)] = None,
    same_captions: Annotated[bool, typer.Option("--same-captions", help="No list: encode the captions that the shards have, for a model with another text encoder.", show_default="off", rich_help_panel=CAPTIONS)] = False,
    negative_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Negative prompt of the teacher's CFG when training on these captions.", show_default="the one in the shards", rich_help_panel=CAPTIONS)] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove captions that an earlier list of this name gave and this one does not.", show_default="off", rich_help_panel=CAPTIONS)] = False,

    shards: Annotated[str, typer.Option(metavar="DIR|URL", help="Folder of the shards.", rich_help_panel=INPUT)] = "shards",
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model whose text encoder is used: a folder of diffusers or Wan, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=ENCODERS)] = DEFAULT_MODEL,
    text_encoder_dtype: Annotated[Dtype | None, typer.Option(help="Compute dtype of the text encoder.", show_default="as for the shards", rich_help_panel=ENCODERS)] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto uses a GPU if available.", rich_help_panel=ENCODERS)] = "auto",
) -> None:
    """Encode other captions for existing shards.

    Only the text encoder runs. The embeddings are stored in shards of their own, in captions/NAME; nothing else is changed, and there may be several caption sets. Files are matched by their names in the dataset. Samples without a new caption keep their old one. Run again, it encodes what is new or edited.

    Next: wantrain distill --captions NAME --shards DIR
    """
    from rich.console import Console

    from preprocess.cache.ranks import this_rank
    from preprocess.overlays.recaption import RecaptionConfig, unmatched_captions
    from preprocess.overlays.recaption import recaption as run_recaption
    from shared.cli.console import count

    rank = this_rank()
    with open_store(shards, writer=rank.number).pulled() as store:
        done = run_recaption(
            RecaptionConfig(
                name=name,
                shards=store,
                model=model,
                data_dir=train_data_dir,
                metadata=train_data_meta,
                dataset_config=dataset_config,
                same_captions=same_captions,
                negative_prompt=negative_prompt,
                text_encoder_dtype=text_encoder_dtype,
                prune=prune,
                device=rank.device(default_device()) if device == "auto" else device,
                rank=rank,
            ),
            Console(stderr=True),
        )
    have = 0 if done.index is None else len(done.index)
    echo(f"{done.store}: {count(have, 'caption')}, {done.written} of them new")
    if done.signum is not None:
        echo(
            f"interrupted, {count(done.left, 'caption')} to go. To continue, run the same "
            "command again.",
            err=True,
        )
        raise typer.Exit(SIGNAL_EXIT + done.signum)
    if done.removed:
        echo(f"{count(done.removed, 'caption')} removed that the list does not give any more")
    for line in unmatched_captions(done):
        echo(line, err=True)
    if have == 0:
        raise UserError(f"captions: no caption for {store} was encoded.")
    echo(f"next: wantrain distill --captions {name} --shards {quoted(store)}")


def add_condition(
    shards: Annotated[str, typer.Option(metavar="DIR|URL", help="Folder of the shards, encoded for a t2v model.", rich_help_panel=INPUT)] = "shards",
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="The i2v model that will be trained, with the VAE of the shards: a folder, a hub id, or the bundled toy-i2v.", rich_help_panel=INPUT)] = DEFAULT_MODEL,
    train_data_dir: Annotated[str, typer.Option(metavar="DIR|URL", envvar="DATASET_NAME", help="Folder (or tars) of the videos and images that were encoded.", rich_help_panel=INPUT)] = "datasets",

    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto uses a GPU if available.", rich_help_panel=ENCODERS)] = "auto",
    num_workers: Annotated[int | None, typer.Option(metavar="N", help="Processes that decode media while the VAE works.", show_default="cores minus 1, at most 8", rich_help_panel=ENCODERS)] = None,
    decode_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Reject a file if no frame of it was decoded for this long.", rich_help_panel=ENCODERS)] = 120,
) -> None:
    """Add the i2v condition to shards of a t2v model.

    The VAE encodes the first frame of every clip; the conditions are stored in shards of their own, in conditions. Latents and text stay unchanged, and t2v models train on them as before. Each media file must be the same as when it was encoded. Run again, it encodes what is missing.

    Next: wantrain distill --model I2V-MODEL --shards DIR
    """
    from rich.console import Console

    from preprocess.cache.ranks import this_rank
    from preprocess.dataset.rejected import rejections
    from preprocess.media.remote import open_folder
    from preprocess.media.worker_pool import default_workers
    from preprocess.overlays.conditions import ConditionConfig
    from preprocess.overlays.conditions import add_condition as run_add_condition
    from shared.cli.console import count

    rank = this_rank()
    with open_store(shards, writer=rank.number).pulled() as store:
        done = run_add_condition(
            ConditionConfig(
                shards=store,
                model=model,
                data_dir=open_folder(train_data_dir),
                device=rank.device(default_device()) if device == "auto" else device,
                workers=default_workers(rank.local_world) if num_workers is None else num_workers,
                decode_timeout=decode_timeout,
                rank=rank,
            ),
            Console(stderr=True),
        )
    have = 0 if done.index is None else len(done.index)
    echo(f"{done.store}: {count(have, 'condition')}, {done.written} of them new")
    if done.signum is not None:
        echo(
            f"interrupted, {count(done.left, 'sample')} to go. To continue, run the same "
            "command again.",
            err=True,
        )
        raise typer.Exit(SIGNAL_EXIT + done.signum)
    if done.rejected:
        listed = rejections(done.rejected, done.store, rank.number)
        raise UserError(
            f"{listed}\nTheir samples have no condition, and `wantrain` refuses the shards for i2v "
            "until they have: mend the files and run again, or take the samples out with "
            "`wanprep remove`."
        )
    options = f"--pretrained-model-name-or-path {quoted(model)} --shards {quoted(store)}"
    echo(f"next: wantrain distill {options}")


# fmt: on
def add_commands(app: typer.Typer) -> None:
    """Make them commands of `wanprep`."""
    app.command(cls=Command, epilog=RECAPTION_EXAMPLES)(recaption)
    app.command("add-condition", cls=Command, epilog=CONDITION_EXAMPLES)(add_condition)
