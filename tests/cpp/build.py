"""Builds the C++ kernel tests: ``build.py OUTPUT [FLAG...]``. Sources and instruction sets are those of setup.py."""

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
CXX = "g++"


def load_setup():
    spec = importlib.util.spec_from_file_location("lipfast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_one(source: Path, output: Path, flags: list[str]) -> Path:
    subprocess.run([CXX, "-c", str(source), "-o", str(output), "-I", str(ROOT / "csrc"), *flags], check=True)
    return output


def main(output: Path, flags: list[str]) -> None:
    setup = load_setup()
    folder = output.parent
    folder.mkdir(parents=True, exist_ok=True)
    common = [*setup.COMMON_FLAGS, "-O1", "-g1", *flags]
    cpu = ROOT / "csrc/cpu"
    jobs = [(source, "test", common) for source in sorted(Path(__file__).parent.glob("*.cc"))]
    jobs += [(cpu / name, "once", common) for name in sorted(setup.ONCE)]
    for namespace, (number, isa) in setup.TARGETS.items():
        macros = [f"-DLIPFAST_TARGET={number}", f"-DLIPFAST_NS={namespace}"]
        jobs += [(source, namespace, [*common, *isa, *macros]) for source in setup.kernel_sources()]
    with ThreadPoolExecutor(2) as pool:
        objects = pool.map(lambda job: compile_one(job[0], folder / f"{job[0].stem}-{job[1]}.o", job[2]), jobs)
        subprocess.run([CXX, *map(str, objects), "-o", str(output), "-pthread", *flags], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
