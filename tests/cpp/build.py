"""Builds the C++ kernel tests: ``build.py OUTPUT [--emulate-avx512] [FLAG...]``. Sources and instruction sets are those
of setup.py.

Kernels that will not run, because this CPU has not their instruction set or ``LIPFAST_ISA`` names another, are compiled
fast and without the flags. With ``--emulate-avx512`` the AVX-512 kernels need AVX2 only.
"""

import argparse
import importlib.util
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
CXX = "g++"
EMULATION = ["-include", str(Path(__file__).parent / "avx512_emulation.h"), "-Wno-psabi", "-Wno-ignored-attributes"]


def load_setup():
    spec = importlib.util.spec_from_file_location("lipfast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def will_run(namespace: str) -> bool:
    only = os.environ.get("LIPFAST_ISA")
    if only:
        return namespace == only
    needed = {"plain": None, "avx2": "avx2", "avx512": "avx512f"}[namespace]
    return needed is None or needed in Path("/proc/cpuinfo").read_text().split()


def compile_one(source: Path, output: Path, flags: list[str]) -> Path:
    subprocess.run([CXX, "-c", str(source), "-o", str(output), "-I", str(ROOT / "csrc"), *flags], check=True)
    return output


def main(output: Path, emulate_avx512: bool, flags: list[str]) -> None:
    setup = load_setup()
    if emulate_avx512:
        setup.TARGETS["avx512"] = (2, [*setup.TARGETS["avx2"][1], *EMULATION])
        flags = [*flags, "-D__builtin_cpu_supports(isa)=1"]
    folder = output.parent
    folder.mkdir(parents=True, exist_ok=True)
    common = [*setup.COMMON_FLAGS, "-O1", "-g1", *flags]
    cpu = ROOT / "csrc/cpu"
    jobs = [(source, "test", common) for source in sorted(Path(__file__).parent.glob("*.cc"))]
    jobs += [(cpu / name, "once", common) for name in sorted(setup.ONCE)]
    for namespace, (number, isa) in setup.TARGETS.items():
        options = common if will_run(namespace) else [*setup.COMMON_FLAGS, "-O0"]
        macros = [f"-DLIPFAST_TARGET={number}", f"-DLIPFAST_NS={namespace}"]
        jobs += [(source, namespace, [*options, *isa, *macros]) for source in setup.kernel_sources()]
    jobs.sort(key=lambda job: -job[0].stat().st_size)  # what takes longest must not start last
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = pool.map(lambda job: compile_one(job[0], folder / f"{job[0].stem}-{job[1]}.o", job[2]), jobs)
        subprocess.run([CXX, *map(str, objects), "-o", str(output), "-pthread", *flags], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--emulate-avx512", action="store_true")
    known, other = parser.parse_known_args()
    main(known.output.resolve(), known.emulate_avx512, other)
