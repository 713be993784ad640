"""The commands of `wanprep` that add to a cache what its samples lack: `recaption`, `add-condition`."""

import typer

from preprocess.cli.encode import leave_if_interrupted
from preprocess.overlays.config import ConditionConfig, RecaptionConfig
from shared.cli.support import echo
from shared.errors import UserError
from shared.io.mirror import open_store
from shared.io.names import quoted


def recaption(config: RecaptionConfig, _: typer.Context) -> None:
    """Encode the captions, and say what the cache has of them.

    Examples:
        # the captions of a list, called short; then train with them
        wanprep recaption --name short --train-data-meta captions-short.jsonl
        wantrain distill --captions short

        # the captions that the shards have, by another text encoder
        wanprep recaption --name other-encoder --same-captions --model my/wan

        # the shards of the bundled toy model
        wanprep recaption --name again --same-captions --model toy --shards toy-shards
    """
    from rich.console import Console

    from preprocess.overlays import recaption as recaptioning
    from shared.cli.console import count

    with open_store(config.shards, writer=config.rank.number).pulled() as store:
        done = recaptioning.recaption(config, store, Console(stderr=True))
    have = 0 if done.index is None else len(done.index)
    echo(f"{done.store}: {count(have, 'caption')}, {done.written} of them new")
    leave_if_interrupted(done, "caption")
    if done.removed:
        echo(f"{count(done.removed, 'caption')} removed that the list does not give any more")
    for line in recaptioning.unmatched_captions(done):
        echo(line, err=True)
    if have == 0:
        raise UserError(f"captions: no caption for {store} was encoded.")
    echo(f"next: wantrain distill --captions {config.name} --shards {quoted(store)}")


def add_condition(config: ConditionConfig, _: typer.Context) -> None:
    r"""Encode the conditions, and say what the cache has of them.

    Examples:
        # a t2v cache in shards/ and its media in datasets/: train i2v on it too
        wanprep add-condition --model Wan-AI/Wan2.2-I2V-A14B-Diffusers
        wantrain distill --model Wan-AI/Wan2.2-I2V-A14B-Diffusers

        # first and last frames, also for i2v shards
        wanprep add-condition --train-mode flf2v
        wantrain distill --train-mode flf2v

        # the shards of the bundled toy model
        wanprep add-condition --model toy-i2v --train-data-dir toy-clips \
            --shards toy-shards
    """
    from rich.console import Console

    from preprocess.overlays import conditions
    from shared.cache.rejected import rejections
    from shared.cli.console import count

    with open_store(config.shards, writer=config.rank.number).pulled() as store:
        done = conditions.add_condition(config, store, Console(stderr=True))
    have = 0 if done.index is None else len(done.index)
    echo(f"{done.store}: {count(have, 'condition')}, {done.written} of them new")
    leave_if_interrupted(done, "sample")
    if done.rejected:
        listed = rejections(done.rejected, done.store, config.rank.number)
        raise UserError(
            f"{listed}\nTheir samples have no condition, and `wantrain` refuses the shards "
            "until they have: mend the files and run again, or take the samples out with "
            "`wanprep remove`."
        )
    options = f"--pretrained-model-name-or-path {quoted(config.model)} --shards {quoted(store)}"
    mode = f" --train-mode {config.train_mode}" if config.train_mode else ""
    echo(f"next: wantrain distill {options}{mode}")
