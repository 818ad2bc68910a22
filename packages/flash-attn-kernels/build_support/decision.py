"""Whether to compile: FLASH_ATTN_KERNELS_BUILD = auto (default), always or never."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from build_support.errors import BuildError

VARIABLE = "FLASH_ATTN_KERNELS_BUILD"
CHOICES = ("auto", "always", "never")
_HOW_TO_ASK = f"set {VARIABLE}=always to compile on this machine"


@dataclass(frozen=True)
class Decision:
    compile: bool
    reason: str


def decide(choice: str | None = None) -> Decision:
    """`choice` defaults to the environment variable; BuildError for a value that is none of CHOICES."""
    if choice is None:
        choice = os.environ.get(VARIABLE, "") or "auto"
    if choice not in CHOICES:
        raise BuildError(f"{VARIABLE}: got {choice!r}, expected one of {', '.join(CHOICES)}")
    if choice == "never":
        return Decision(False, f"{VARIABLE}=never: not compiling the CUDA kernels; {_HOW_TO_ASK}")
    if platform.system() != "Linux":
        message = f"the CUDA kernels build on Linux only, this is {platform.system()}"
        if choice == "always":
            raise BuildError(f"{VARIABLE}=always: {message}; unset it to get the pure package")
        return Decision(False, f"{message}: making the pure package")
    if choice == "always":
        return Decision(True, f"{VARIABLE}=always")
    if not has_nvidia_gpu():
        return Decision(False, f"no NVIDIA GPU here: making the pure package, no CUDA kernels; {_HOW_TO_ASK}")
    return Decision(True, f"an NVIDIA GPU is present (set {VARIABLE}=never to skip compiling)")


def has_nvidia_gpu() -> bool:
    """True where the driver exposes a GPU; answered without torch, which may not be installed yet."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    nvidia_smi = shutil.which("nvidia-smi")  # WSL has no /dev/nvidia*
    if nvidia_smi is None:
        return False
    listing = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU " in listing.stdout
