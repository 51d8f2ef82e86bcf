"""Builds ``lipfast._C``: plain C++17 kernels, compiled once per instruction set and chosen at run time.

Needs setuptools, pybind11 and a C++ compiler. Nothing is downloaded, nothing is tuned to the building machine.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
COMMON_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",
]
# namespace -> (value of LIPFAST_TARGET, flags)
TARGETS: dict[str, tuple[int, list[str]]] = {"plain": (0, [])}
if platform.machine() in ("x86_64", "AMD64"):
    TARGETS["avx2"] = (1, ["-mavx2", "-mfma"])
    # The prefer-vector-width flag is about the compiler's own loops; 512-bit intrinsics are used either way.
    # GCC 12 turns `b ? x + y : x` of vectors in a loop into a masked addition and takes the bool for the mask of all
    # lanes, so that lane 0 alone is added.
    TARGETS["avx512"] = (
        2,
        [
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
            *("-mprefer-vector-width=512", "-fno-tree-loop-if-convert"),
        ],
    )
ONCE = {
    "isa.cc",
    "pool.cc",
    "tables.cc",
    "arena.cc",
    "border.cc",
    "heads.cc",
    "conv.cc",
    "choice.cc",
    "prune.cc",
}  # the rest of csrc/cpu is built per target


def kernel_sources() -> list[Path]:
    kernels = [path for path in (ROOT / "csrc/cpu").glob("*.cc") if path.name not in ONCE]
    return sorted(kernels, key=lambda path: (-path.stat().st_size, path.name))  # a long one last would end alone


def plain_sources() -> list[str]:
    every = [ROOT / "csrc/bindings/module.cc", *sorted((ROOT / "csrc/engine").glob("*.cc"))]
    every += [path for name in sorted(ONCE) if (path := ROOT / "csrc/cpu" / name).exists()]
    return [str(path.relative_to(ROOT)) for path in every]


class BuildKernels(build_ext):
    """Compiles the kernel sources once per target, then the rest as usual; with LIPFAST_CUDA=1 the GPU library too."""

    def run(self) -> None:
        super().run()
        if os.environ.get("LIPFAST_CUDA") == "1":
            output = Path(self.get_ext_fullpath("lipfast._C")).with_name("_cuda.so")
            subprocess.run([sys.executable, "csrc/cuda/build.py", str(output)], check=True)

    def build_extension(self, ext: Pybind11Extension) -> None:
        compiler = self.compiler.compiler_cxx[0] if hasattr(self.compiler, "compiler_cxx") else "c++"
        if not shutil.which(compiler):
            raise CompileError(
                f"lipfast needs a C++17 compiler and found no {compiler!r}; install g++ or clang++ "
                "(Debian: apt-get install g++) or name one in the environment variable CXX"
            )
        for name, (number, flags) in TARGETS.items():
            ext.extra_objects += self.compiler.compile(
                [str(path.relative_to(ROOT)) for path in kernel_sources()],
                output_dir=str(Path(self.build_temp) / name),
                macros=[("LIPFAST_TARGET", str(number)), ("LIPFAST_NS", name)],
                include_dirs=["csrc"],
                extra_postargs=[*COMMON_FLAGS, *flags, "-fPIC"],
                depends=[str(path) for path in (ROOT / "csrc").rglob("*.h")],
            )
        ext.depends += ext.extra_objects  # a changed kernel alone links again, too
        super().build_extension(ext)


if __name__ == "__main__":
    os.chdir(ROOT)
    ParallelCompile(default=0).install()  # all cores
    setup(
        ext_modules=[
            Pybind11Extension(
                "lipfast._C",
                plain_sources(),
                include_dirs=["csrc"],
                extra_compile_args=COMMON_FLAGS,
                extra_link_args=["-pthread", "-ldl"],
            )
        ],
        cmdclass={"build_ext": BuildKernels},
    )
