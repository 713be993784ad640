"""The options of `wanprep recaption` and `add-condition`: type, default, help and check, once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import typer

from preprocess.encode.config import ENCODERS, INPUT, StoredDtype
from shared.cache.ranks import WithRank
from shared.cli.checks import AT_LEAST_1, POSITIVE, check_options
from shared.models.spec import DEFAULT_MODEL

CAPTIONS = "Captions"


# fmt: off
@dataclass(frozen=True, kw_only=True)
class RecaptionConfig(WithRank):
    """Encode other captions for existing shards.

    Only the text encoder runs. The embeddings are stored in shards of their own, in captions/NAME; nothing else is changed, and there may be several caption sets. Files are matched by their names in the dataset. Samples without a new caption keep their old one. Run again, it encodes what is new or edited.

    Next: wantrain distill --captions NAME --shards DIR
    """

    PANELS: ClassVar[Sequence[str]] = (CAPTIONS, INPUT, ENCODERS)

    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the caption set, for wantrain distill --captions NAME.", rich_help_panel=CAPTIONS)]
    train_data_dir: Annotated[str, typer.Option(metavar="DIR|URL", envvar="DATASET_NAME", help="Folder (or tars) that the files of the list are relative to; the media need not be there.", rich_help_panel=CAPTIONS)] = "datasets"
    train_data_meta: Annotated[str | None, typer.Option(metavar="FILE|URL", envvar="DATASET_META_NAME", help="List of files and captions, as wanprep encode takes it.", show_default="metadata.json, .jsonl or .csv in the data folder, else a.txt beside a.mp4", rich_help_panel=CAPTIONS)] = None
    dataset_config: Annotated[Path | None, typer.Option(metavar="FILE", help="Several datasets in one TOML file, as wanprep encode takes it, in place of --train-data-dir.", show_default="one dataset", rich_help_panel=CAPTIONS)] = None
    same_captions: Annotated[bool, typer.Option("--same-captions", help="No list: encode the captions that the shards have, for a model with another text encoder.", show_default="off", rich_help_panel=CAPTIONS)] = False
    negative_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Negative prompt of the teacher's CFG when training on these captions.", show_default="the one in the shards", rich_help_panel=CAPTIONS)] = None
    prune: Annotated[bool, typer.Option("--prune", help="Remove captions that an earlier list of this name gave and this one does not.", show_default="off", rich_help_panel=CAPTIONS)] = False

    shards: Annotated[str, typer.Option(metavar="DIR|URL", help="Folder of the shards.", rich_help_panel=INPUT)] = "shards"
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="Model whose text encoder is used: a folder of diffusers or Wan, a hub id, or a bundled toy (toy, toy-i2v).", rich_help_panel=ENCODERS)] = DEFAULT_MODEL
    text_encoder_dtype: Annotated[StoredDtype | None, typer.Option(help="Compute dtype of the text encoder.", show_default="as for the shards", rich_help_panel=ENCODERS)] = None
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto uses a GPU if available.", rich_help_panel=ENCODERS)] = "auto"
    # fmt: on


# fmt: off
@dataclass(frozen=True, kw_only=True)
class ConditionConfig(WithRank):
    """Add the i2v or flf2v condition to shards without it.

    The VAE encodes the first frame of every clip, for flf2v also the last; the conditions are stored in shards of their own, in conditions. Latents and text stay unchanged, and other models train on them as before. Each media file must be the same as when it was encoded. Run again, it encodes what is missing.

    Next: wantrain distill --model I2V-MODEL --shards DIR
    """

    PANELS: ClassVar[Sequence[str]] = (INPUT, ENCODERS)

    shards: Annotated[str, typer.Option(metavar="DIR|URL", help="Folder of the shards.", rich_help_panel=INPUT)] = "shards"
    model: Annotated[str, typer.Option("--model", "--pretrained-model-name-or-path", metavar="MODEL", envvar="MODEL_NAME", help="The model that will be trained, with the VAE of the shards: a folder, a hub id, or the bundled toy-i2v.", rich_help_panel=INPUT)] = DEFAULT_MODEL
    train_data_dir: Annotated[str, typer.Option(metavar="DIR|URL", envvar="DATASET_NAME", help="Folder (or tars) of the videos and images that were encoded.", rich_help_panel=INPUT)] = "datasets"
    train_mode: Annotated[Literal["i2v", "flf2v"] | None, typer.Option("--train-mode", help="What the conditions are for: the first frame, or the first and the last, which Wan 2.2 I2V-A14B takes, too.", show_default="the model's", rich_help_panel=INPUT)] = None

    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N; auto uses a GPU if available.", rich_help_panel=ENCODERS)] = "auto"
    num_workers: Annotated[int | None, typer.Option(metavar="N", help="Processes that decode media while the VAE works.", show_default="cores minus 1, at most 8", rich_help_panel=ENCODERS), AT_LEAST_1] = None
    decode_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Reject a file if no frame of it was decoded for this long.", rich_help_panel=ENCODERS), POSITIVE] = 120
    # fmt: on

    def __post_init__(self) -> None:
        check_options(self)
