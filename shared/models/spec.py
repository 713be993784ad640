"""What a model is, read from its own config files (never from its name): its family among others.

Nothing here builds a network: stage two knows the VAE's normalisation, the text width and the
experts from JSON only.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.errors import UserError, first_line
from shared.io.names import in_home_folder, quoted
from shared.models import original_layout
from shared.models.family import Family, Mode, TrainMode
from shared.models.toy_model import TOY_MODELS, toy_folder
from shared.models.wan import WAN

DEFAULT_MODEL = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
FAMILIES = (WAN,)
MAX_TEXT_TOKENS = max(family.text_tokens for family in FAMILIES)
"""What a cache may hold of a caption, whichever family it is for."""
TIMESTEPS = 1000.0
TRAIN_MODES: Mapping[TrainMode, Mode] = {
    "i2v": "i2v",
    "flf2v": "flf2v",
    "ti2v": "ti2v",
    "normal": "t2v",
}

HUB_NAME_PARTS = 2


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The facts of one model folder that both stages compute with."""

    folder: Path
    family: Family
    mode: Mode
    two_experts: bool
    """True where `transformer` is the high-noise expert and `transformer_2` the low-noise one."""
    boundary: float | None
    """Share of the timesteps above which the high-noise expert works; None with one expert."""
    latent_channels: int
    stride: tuple[int, int, int]
    """VAE strides in (time, height, width)."""
    patch: tuple[int, int, int]
    """Transformer patch in latents, (time, height, width)."""
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    text_dim: int
    image_dim: int | None
    """Width of the CLIP image embeddings (Wan 2.1 i2v and flf2v), else None."""

    @property
    def side_multiple(self) -> int:
        """Both pixel sides of a sample must be multiples of this."""
        return self.stride[1] * self.patch[1]

    @property
    def flow_shift(self) -> float:
        """Training shift of such a model of the family."""
        family = self.family
        return family.other_flow_shifts.get((self.mode, self.two_experts), family.flow_shift)

    @property
    def given_frames(self) -> tuple[int, ...]:
        """The frames of a clip, 0 or −1, that lie in its condition; () for a mode without one."""
        return self.family.given_frames.get(self.mode, ())

    @property
    def modes(self) -> tuple[Mode, ...]:
        """What it can serve, its own first. A model for i2v with CLIP takes one embedding, so it
        has no place for a last frame's."""
        between = self.mode == "i2v" and self.image_dim is None
        return (self.mode, "flf2v") if between else (self.mode,)

    @property
    def expert_folders(self) -> tuple[str, ...]:
        """Component names of the transformers, high-noise first."""
        return ("transformer", "transformer_2") if self.two_experts else ("transformer",)


def in_train_mode(spec: ModelSpec, train_mode: TrainMode | None) -> ModelSpec:
    """The model in one of its modes; None: its own.

    A ti2v model may also serve as a t2v one, and stays what it is. Raises UserError for a mode
    that the model does not have.
    """
    own = [name for name, mode in TRAIN_MODES.items() if mode in spec.modes]
    if spec.mode == "ti2v":
        own.append("normal")
    if train_mode not in (None, *own):
        raise UserError(
            f"--train-mode: {train_mode}, but {spec.folder} is a model for {spec.mode}; expected "
            f"{' or '.join(own)}. Leave the option out, or choose another model with "
            "--pretrained-model-name-or-path (or MODEL_NAME)."
        )
    wanted = None if train_mode is None else TRAIN_MODES[train_mode]
    return spec if wanted is None or wanted not in spec.modes else replace(spec, mode=wanted)


def family_of(transformer: Any) -> Family:
    """That of a transformer which one of the families' classes has built."""
    return next(family for family in FAMILIES if family.is_of(transformer))


def family_of_layers(modules: Iterable[str]) -> Family:
    """The first that has all these layers, by their whole names."""
    return next(family for family in FAMILIES if all(map(family.has, modules)))


def blocks_of(transformer: Any) -> Any:
    """The list of its blocks, whichever family it is of."""
    return getattr(transformer, family_of(transformer).blocks)


def resolve_model(name: str, components: Sequence[str]) -> Path:
    """Folder that holds the model `name`: a toy, a local folder, or a Hugging Face hub id.

    `components` are the parts that the caller will read ("vae", "transformer", …); only these,
    and every config file, are downloaded from the hub. Raises UserError where there is no model.
    """
    if name in TOY_MODELS:
        return toy_folder(name)
    for folder in (Path(name), in_home_folder(name)):
        if folder.is_dir():
            _check_name(folder)
            return folder
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != HUB_NAME_PARTS - 1
    if looks_local:
        raise UserError(
            f"model: no folder {name!r}. Set --pretrained-model-name-or-path (or MODEL_NAME) to a "
            f"model folder in diffusers layout, a hub id such as {DEFAULT_MODEL}, or 'toy'."
        )
    from huggingface_hub import snapshot_download

    wanted = ["*.json", *(f"{component}/*" for component in components)]
    wanted += [pattern for part in components for pattern in original_layout.PATTERNS.get(part, ())]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        if os.environ.get("HF_HUB_OFFLINE"):
            why = "HF_HUB_OFFLINE is set and an earlier download is not on this machine"
        else:
            why = first_line(error)
        raise UserError(
            f"model: {name!r} is neither a local folder nor to be had from the Hugging Face hub "
            f"({why}). "
            "Set --pretrained-model-name-or-path (or MODEL_NAME) to a local folder, "
            f"or run once online: hf download {quoted(name)}"
        ) from error


def _check_name(folder: Path) -> None:
    """UserError for a name that safetensors and tokenizers can't open."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"model: {folder} has a name that is not UTF-8 text, which safetensors can't open. "
            "Rename the folder, or make a link with another name to it: ln -s FOLDER model"
        ) from error


def read_model_spec(folder: Path) -> ModelSpec:
    """Read the model's facts from `model_index.json` and the components' `config.json`.

    Of a folder in Wan's original layout: from what `shared.models.original_layout` makes of its
    own.
    """
    original = original_layout.is_original(folder)
    if not original and not (folder / "model_index.json").is_file():
        raise UserError(
            f"model: {folder} has neither a model_index.json (diffusers' layout) nor "
            "high_noise_model/config.json or a WanModel's config.json (Wan's original layout). "
            f"Download a whole repository, e.g. {DEFAULT_MODEL}."
        )
    try:
        if original:
            index = original_layout.model_index(folder)
            transformer = original_layout.transformer_config(folder)
            vae = original_layout.vae_config(folder)
        else:
            index = original_layout.read_json(folder / "model_index.json", "model")
            transformer = original_layout.read_json(folder / "transformer" / "config.json", "model")
            vae = original_layout.read_json(folder / "vae" / "config.json", "model")
        return _spec_from_configs(folder, index, transformer, vae)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"model: the configs of {folder} lack or misspell a field ({first_line(error)}); "
            f"expected a {_known('transformer')} and an {_known('vae')} config."
        ) from error


def _known(component: str) -> str:
    return " or ".join(family.classes[component][1] for family in FAMILIES)


def _family(folder: Path, transformer: dict[str, Any]) -> Family:
    """By the class that the transformer's config names. UserError for one that is not known."""
    found = transformer["_class_name"]
    for family in FAMILIES:
        if found == family.classes["transformer"][1]:
            return family
    raise UserError(
        f"model: {folder}/transformer/config.json is of a {found}; expected a "
        f"{_known('transformer')}. Choose a model of a known family."
    )


def _spec_from_configs(
    folder: Path, index: dict[str, Any], transformer: dict[str, Any], vae: dict[str, Any]
) -> ModelSpec:
    family = _family(folder, transformer)
    two_experts = (index.get("transformer_2") or [None])[0] is not None
    boundary = index.get("boundary_ratio")
    if two_experts != (boundary is not None):
        raise UserError(
            f"model: {folder}/model_index.json has transformer_2={two_experts} but "
            f"boundary_ratio={boundary}; two experts need a boundary and one must have none."
        )
    channels = int(vae["z_dim"])
    mode = _mode(folder, index, int(transformer["in_channels"]), channels, family.mask_channels)
    image_dim = transformer.get("image_dim")
    if image_dim is not None and mode not in family.given_frames:
        raise UserError(
            f"model: {folder}/transformer/config.json has image_dim={image_dim} with "
            f"in_channels={transformer['in_channels']} ({mode}); only i2v models take CLIP image "
            "embeddings."
        )
    # Positions of the embeddings of two frames: diffusers' class then takes nothing else.
    if (tokens := transformer.get("pos_embed_seq_len")) is not None:
        if image_dim is None or mode != "i2v" or two_experts:
            raise UserError(
                f"model: {folder}/transformer/config.json has pos_embed_seq_len={tokens}, of a "
                f"first-last-frame model, with image_dim={image_dim}, in_channels="
                f"{transformer['in_channels']} and {'two experts' if two_experts else 'one expert'}"
                "; expected CLIP image embeddings, the channels of i2v and one expert, as in "
                "Wan 2.1 FLF2V."
            )
        mode = "flf2v"
    time, high, wide = family.stride
    spatial = vae.get("scale_factor_spatial")
    return ModelSpec(
        folder=folder,
        family=family,
        mode=mode,
        two_experts=two_experts,
        boundary=None if boundary is None else float(boundary),
        latent_channels=channels,
        stride=(
            int(vae.get("scale_factor_temporal") or time),
            int(spatial or high),
            int(spatial or wide),
        ),
        patch=tuple(transformer["patch_size"]),
        latents_mean=tuple(map(float, vae["latents_mean"])),
        latents_std=tuple(map(float, vae["latents_std"])),
        text_dim=int(transformer["text_dim"]),
        image_dim=image_dim,
    )


def _mode(
    folder: Path, index: dict[str, Any], in_channels: int, latent_channels: int, mask_channels: int
) -> Mode:
    expanded = bool(index.get("expand_timesteps"))
    if in_channels == latent_channels:
        return "ti2v" if expanded else "t2v"
    if expanded:
        raise UserError(
            f"model: {folder}/transformer/config.json has in_channels={in_channels}; with "
            f"expand_timesteps (ti2v) expected the VAE's {latent_channels} latent channels."
        )
    conditioned = 2 * latent_channels + mask_channels
    if in_channels == conditioned:
        return "i2v"
    raise UserError(
        f"model: {folder}/transformer/config.json has in_channels={in_channels}; with "
        f"{latent_channels} latent channels expected {latent_channels} (t2v) or "
        f"{conditioned} (i2v: {mask_channels} mask + {latent_channels} condition channels)."
    )
