"""Flags of `wanprep encode` on a training command: they must say what the shards are."""

from typing import Any

from shared.cli.videox_fun_command import Given
from shared.errors import UserError
from shared.format.fingerprint import Fingerprint
from shared.io.store import Store

# Of a fingerprint's media settings. A setting that played no part has no value, and datasets of a
# --dataset-config have each their own.
OFF, BY_DATASET = "off", "by dataset"
TOKEN_BUDGET = "training_with_video_token_length"


def refuse_other_encoding(given: Given, fingerprint: Fingerprint, shards: Store) -> None:
    """Raise UserError for a flag whose value is not that with which `shards` were encoded.

    Flags that no fingerprint knows, such as folders of media, pass.
    """
    media: dict[str, Any] = dict(fingerprint.get("media", {}))
    if "token_sample_size" in media:
        media[TOKEN_BUDGET] = media["token_sample_size"] not in (OFF, False)
    for name, values in given.items():
        found = media.get(name)
        if found is None or found == BY_DATASET:
            continue
        if found == OFF and name != "video_sample_stride":
            if name == "fix_sample_size":
                _refuse(name, values, "no fixed size", shards)
            continue
        if not _same(values, found):
            as_fps = f"off, with --fps {media.get('fps')}" if found == OFF else found
            _refuse(name, values, as_fps, shards)


def _same(values: tuple[str, ...], found: Any) -> bool:
    if isinstance(found, bool):  # a switch, or its no- form, has no value
        return found
    wanted = found if isinstance(found, list) else [found]
    return list(values) == [str(one) for one in wanted]


def _refuse(name: str, values: tuple[str, ...], found: Any, shards: Store) -> None:
    option = " ".join(["--" + name.replace("_", "-"), *values])
    raise UserError(
        f"{option}: {shards} were encoded with {found if found is not False else 'it off'}. Leave "
        f"it out, or encode for it: wanprep encode {option} --output <new folder>"
    )
