"""FakeTensors on device `cuda` in a CPU build of torch: a stub of CUDA's hooks and device guard.

Nothing computes on a device: under FakeTensorMode every operator checks devices and dtypes and
gives shapes. Streams and events are empty shells.
"""

import ctypes
import hashlib
import os
import subprocess
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
_TORCH = Path(sysconfig.get_paths()["purelib"]) / "torch"
_LIBRARIES = _TORCH / "lib"


def built() -> Path:
    """The stub for this torch, compiled (seconds) where it isn't in the temporary folder yet.

    Raises OSError or CalledProcessError where it can't be.
    """
    inputs = SOURCE.read_bytes() + version("torch").encode() + str(_TORCH).encode()
    digest = hashlib.sha256(inputs).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"wandistill-fake-cuda-{os.getuid()}-{digest}.so"
    if library.exists():
        return library
    building = library.with_suffix(f".{os.getpid()}.tmp")
    include = _TORCH / "include"
    command = [
        "c++", "-std=c++20", "-O0", "-shared", "-fPIC", str(SOURCE), f"-I{include}",
        f"-I{include}/torch/csrc/api/include", f"-L{_LIBRARIES}", "-lc10", "-ltorch_cpu",
        "-o", str(building),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    building.rename(library)
    return library


def load() -> None:
    """Register the stub. Call it before torch is imported; there is no way back."""
    for library in (_LIBRARIES / "libc10.so", _LIBRARIES / "libtorch_cpu.so", built()):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import torch
    import torch.cuda.amp.common as amp

    amp.amp_definitely_not_available = lambda: False  # type: ignore[assignment]
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True  # type: ignore[assignment]
