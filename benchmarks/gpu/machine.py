"""What the machine is: versions, its speed by itself, and torch's attention kernels."""

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu.place import Place, first_line

KERNELS: Mapping[str, SDPBackend | None] = {
    "native": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_PACKAGES = ("diffusers", "peft", "transformers", "accelerate", "bitsandbytes", "flash_attn")


def machine(place: Place) -> None:
    """Versions, matmul, the way to the card, noise; then attention, kernel by kernel."""
    found: dict[str, Any] = {"versions": versions(place)}
    place.keep(found)
    found |= speeds(place)
    place.keep(found)
    found["attention"] = attention(place, lambda so_far: place.keep({**found, "attention": so_far}))
    place.keep(found)


def versions(place: Place) -> dict[str, Any]:
    """Of all that decides speed and bits."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": "CPU"}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if place.on_gpu:
        properties = torch.cuda.get_device_properties(place.device)
        driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {
            "device": properties.name,
            "bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": subprocess.run(driver, capture_output=True, text=True).stdout.strip(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        }
    return found


def speeds(place: Place) -> dict[str, Any]:
    """Of plain work: FLOP/s of a matmul in bf16, bytes/s from pinned memory, noise of a sample."""
    from train.functional.rng import noise

    side = 256 if place.quick else 8192
    bf16 = torch.bfloat16
    one, other = (torch.randn(side, side, device=place.device, dtype=bf16) for _ in range(2))
    host = torch.empty(side * side, dtype=bf16, pin_memory=place.on_gpu)
    there = torch.empty(side * side, dtype=bf16, device=place.device)
    shape = (16, 3, 4, 8) if place.quick else (16, 21, 60, 104)
    copied = place.seconds(lambda: there.copy_(host, non_blocking=True), 5)
    return {
        "matmul_side": side,
        "matmul_flops": 2 * side**3 / place.seconds(lambda: one @ other, 10),
        "to_device_bytes": host.nbytes / copied,
        "noise_seconds": place.seconds(lambda: noise(shape, 1, "bench", 0, (0,)), 3),
    }


def attention(place: Place, keep: Callable[[Any], None]) -> dict[str, Any]:
    """Of A14B at 832 × 480 × 81, laid out as diffusers gives it: (1, heads, tokens, channels)."""
    heads, tokens = (2, 64) if place.quick else (40, 32760)
    random = torch.Generator(place.device).manual_seed(1)
    inputs = [
        torch.randn(
            1, tokens, heads, 128, device=place.device, dtype=torch.bfloat16, generator=random
        )
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(3)
    ]
    found: dict[str, Any] = {
        "shape": list(inputs[0].shape),
        "chosen": SDPBackend(torch._fused_sdp_choice(*inputs)).name,
        "kernels": {},
    }
    for name, backend in KERNELS.items():
        found["kernels"][name] = _kernel(place, inputs, backend)
        keep(found)
    return found


def _kernel(place: Place, inputs: list[torch.Tensor], backend: SDPBackend | None) -> dict[str, Any]:
    """Seconds forward and backward (medians of 3), and whether two backwards have equal bits."""

    def forward() -> torch.Tensor:
        if backend is None:
            return scaled_dot_product_attention(*inputs)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*inputs)

    def once() -> tuple[float, float, tuple[torch.Tensor, ...]]:
        place.wait()
        began = time.perf_counter()
        out = forward()
        place.wait()
        half = time.perf_counter()
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
        place.wait()
        return half - began, time.perf_counter() - half, gradients

    def equal() -> bool:
        first, second = once()[2], once()[2]
        return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    try:
        once()
        runs = [once()[:2] for _ in range(3)]
        found: dict[str, Any] = {
            "forward": statistics.median(forward for forward, _ in runs),
            "backward": statistics.median(backward for _, backward in runs),
            "equal_bits": equal(),
        }
    except RuntimeError as error:
        return {"left out": first_line(error)}
    torch.use_deterministic_algorithms(True)
    try:
        found["equal_bits_deterministic"] = equal()
    except RuntimeError as error:
        found["equal_bits_deterministic"] = first_line(error)
    finally:
        torch.use_deterministic_algorithms(False)
    return found
