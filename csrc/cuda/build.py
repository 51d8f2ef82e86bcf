"""Builds the CUDA library:  python csrc/cuda/build.py OUTPUT.so

Needs nvcc (from ``CUDA_HOME``, else ``PATH`` or the usual place) and no GPU. The runtime is linked statically, so the
result needs libc alone and loads on a machine without a driver.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "sparse_conv.cu"
TARGETS = ("80", "90")  # A100, H100; newer GPUs compile the PTX of the last one when the library loads


def find_nvcc() -> str:
    """Path of nvcc.

    Raises:
        FileNotFoundError: there is none, with the ways to name one.
    """
    home = os.environ.get("CUDA_HOME")
    places = f"{home}/bin" if home else os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    nvcc = shutil.which("nvcc", path=places)
    if nvcc is None:
        where = places if home else "PATH or /usr/local/cuda/bin"
        raise FileNotFoundError(
            f"no nvcc in {where}; install the CUDA toolkit or set CUDA_HOME, or build without LIPFAST_CUDA"
        )
    return nvcc


def build(output: Path) -> None:
    """Compile for every target and link; nvcc's own message explains a failure."""
    codes = [f"arch=compute_{target},code=sm_{target}" for target in TARGETS]
    codes.append(f"arch=compute_{TARGETS[-1]},code=compute_{TARGETS[-1]}")
    flags = ["-std=c++17", "-O3", "--threads", "0", "--cudart", "static", "-Xcompiler", "-fPIC", "-shared"]
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    subprocess.run(
        [
            find_nvcc(),
            *flags,
            *(part for code in codes for part in ("-gencode", code)),
            str(SOURCE),
            "-o",
            str(partial),
        ],
        check=True,
    )
    partial.replace(output)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
