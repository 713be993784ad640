"""What shards are for, where the command line says it instead of the model (`train_mode`)."""

from dataclasses import replace
from typing import Literal

from shared.errors import UserError
from shared.models.spec import Mode, ModelSpec

_MODES: dict[str, Mode] = {"normal": "t2v", "i2v": "i2v", "ti2v": "ti2v"}


def in_train_mode(
    spec: ModelSpec, train_mode: Literal["normal", "i2v", "ti2v"] | None
) -> ModelSpec:
    """The model as it is to be encoded for; None: as it is.

    `normal` makes text-to-video of an i2v model: no conditions are encoded. Raises UserError for a
    mode that the model does not have.
    """
    if train_mode is None or _MODES[train_mode] == spec.mode:
        return spec
    if (train_mode, spec.mode) == ("normal", "i2v"):
        return replace(spec, mode="t2v", image_dim=None)
    if (train_mode, spec.mode) == ("normal", "ti2v"):  # its shards hold nothing but what t2v needs
        return spec
    own = next(name for name, mode in _MODES.items() if mode == spec.mode)
    raise UserError(
        f"--train-mode: {train_mode}, but {spec.folder} is a model for {spec.mode}; expected "
        f"{own}. Leave the option out, or choose another model with "
        "--pretrained-model-name-or-path (or MODEL_NAME)."
    )
