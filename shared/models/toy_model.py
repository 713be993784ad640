"""The bundled toy models: real Wan classes at small size, with weights in this package.

`--model toy` (text to video) and `--model toy-i2v` (image to video) are ordinary diffusers
folders; only their size is small. Both experts have one weight file, so the package holds it once
and the folders are put together in the cache on first use. `toy-experts` (text to video) and
`toy-experts-i2v` have two experts, each finetuned on its own noise levels, and know the harder
world of the benchmarks (`scripts/speed_world.py`). Those of i2v are small differences to those of
t2v in the package. `scripts/` remakes the weights.
"""

import hashlib
import os
import shutil
from pathlib import Path

from shared.io.hashing import cache_folder, digest_of

TOY_MODELS = {
    "toy": "t2v",
    "toy-i2v": "i2v",
    "toy-experts": "experts-t2v",
    "toy-experts-i2v": "experts-i2v",
}
_DATA = Path(__file__).parents[1] / "toy"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_DIFFERENCE = "difference.safetensors"  # to the transformer of experts-t2v in the same slot


def toy_folder(name: str) -> Path:
    """Folder of the toy model `name` in diffusers layout, built in the cache if need be.

    The folder's name carries a digest of its content: new weights never meet an old copy.
    """
    parts = {part.name: part for part in sorted((_DATA / "common").iterdir())}
    own = _DATA / TOY_MODELS[name]
    high = own / "transformer"
    low = own / "transformer_2"
    parts |= {"transformer": high, "transformer_2": low if low.is_dir() else high}

    bases = {
        part: _DATA / "experts-t2v" / part / _WEIGHTS
        for part, source in parts.items()
        if (source / _DIFFERENCE).exists()
    }
    content = [
        (part, file.relative_to(source).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest())
        for part, source in sorted(parts.items())
        for file in sorted(source.rglob("*"))
        if file.is_file()
    ]
    content += [
        (part, _WEIGHTS, hashlib.sha256(base.read_bytes()).hexdigest())
        for part, base in bases.items()
    ]
    content.append(("", "model_index.json", (own / "model_index.json").read_text()))
    folder = cache_folder() / f"{name}-{digest_of(content)[:12]}"
    if folder.exists():
        return folder

    building = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for part, source in parts.items():
        shutil.copytree(source, building / part)
        if part in bases:
            _merge(bases[part], building / part / _DIFFERENCE)
    shutil.copy(own / "model_index.json", building)
    try:
        building.rename(folder)
    except OSError:  # another process was first; its copy is the same
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _merge(base: Path, difference: Path) -> None:
    """Put the weights of `base` with `difference` in the place of the latter: W + B·A for each
    LoRA, in fp32, rounded to bf16; whole tensors replace those of the base."""
    from safetensors.torch import load_file, save_file  # not for those who only ask for names

    weights, own = load_file(base), load_file(difference)
    for name, tensor in own.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            change = own[f"{module}.lora_B.weight"].float() @ tensor.float()
            weight = weights[f"{module}.weight"]
            weights[f"{module}.weight"] = (weight.float() + change).to(weight.dtype)
        elif not name.endswith(".lora_B.weight"):
            weights[name] = tensor
    save_file(weights, difference.with_name(_WEIGHTS))
    difference.unlink()
