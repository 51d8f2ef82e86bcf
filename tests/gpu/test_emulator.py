"""The CUDA kernels on the CPU: right in three schedules, clean under the sanitizers, and wrong when a bug is put in."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from sparse_conv_cases import LAYERS, SIZES, check, main

from lipfast.errors import BackendError
from lipfast.ops._cuda_library import Library

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SOURCES = ROOT / "csrc/cuda"
SCHEDULES = {"forward": "0", "reverse": "1", "random": "7"}

# name -> (file, text, what replaces it). Each is a bug that a GPU may or may not punish; the tests must.
MUTATIONS = {
    "no barrier before reading a stage": (
        "tile.cuh",
        "    __syncthreads();                      // for every thread, and all are done with the one before\n",
        "",
    ),
    "no barrier before the next tile": (
        "sparse_conv.cu",
        "    __syncthreads();  // nobody reads the tile before any more\n",
        "",
    ),
    "no zeros around the map": ("tile.cuh", "shared.planes[c * shared.plane + pixel] = 0.0f;", ";"),
    "no wait for the copies": (
        "tile.cuh",
        "__pipeline_wait_prior(kBuffers - 2);",
        "__pipeline_wait_prior(kBuffers - 1);",
    ),
    "a stage refilled while it is read": ("tile.cuh", "buffer == 0 ? kBuffers - 1 : buffer - 1;", "buffer;"),
    "pairs replaced before all lanes have read them": (
        "sparse_conv.cu",
        "      __syncwarp();  // all lanes have read the last pair\n",
        "",
    ),
    "pairs read before all lanes have stored them": (
        "sparse_conv.cu",
        "      __syncwarp();  // all lanes have stored theirs\n",
        "",
    ),
    "barrier of half a warp": ("sparse_conv.cu", "__syncwarp();  // all lanes have stored\n", "__syncwarp(0xffffu);\n"),
    "shuffle of half a warp": ("tile.cuh", "kFullWarp = 0xffffffffu", "kFullWarp = 0xffffu"),
    "lane sums read before all lanes stored": ("sparse_conv.cu", "  __syncwarp();  // all lanes have stored\n", ""),
    "no bound on stored rows": ("sparse_conv.cu", "if (row >= 0 && row < a.y_rows) to[", "to["),
    "no bound on source columns": ("tile.cuh", "if (i >= 0 && i < size) return i;", "if (i >= 0) return i;"),
    "vectors where rows are not on 16 bytes": ("tile.cuh", "aligned && at.x >= 0 &&", "at.x >= 0 &&"),
    "the odd entry of a list left out": ("sparse_conv.cu", "if (count[g] % 2 != 0) {", "if (false) {"),
    "shared memory one stage short": ("tile.cuh", "(phases + kBuffers * STAGE)", "(phases + (kBuffers - 1) * STAGE)"),
}

NEEDS_SANITIZER = {"shared memory one stage short"}  # a GPU might read anything there


def build(sources: Path, output: Path, *flags: str) -> Path:
    header = HERE / "emulator/cuda_emulator.h"
    command = [os.environ.get("CXX", "g++"), "-std=c++17", *flags, "-fPIC", "-shared", "-x", "c++"]
    subprocess.run([*command, "-include", str(header), str(sources / "sparse_conv.cu"), "-o", str(output)], check=True)
    return output


# Which imports torch once, not every version's process. It has not this process's sys.path, so no module of the tests.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["lipfast.ops._cuda_sparse_conv", "lipfast.ops.reference"])
LONGEST = 300  # seconds


def _cases_in_fork(library: Path, order: str, output: Path) -> None:
    torch.set_num_threads(1)
    os.environ["CUDA_EMULATOR_ORDER"] = order
    with output.open("w") as file, contextlib.redirect_stdout(file):
        code = main(str(library))
    os._exit(code)


def run_cases(library: Path, order: str) -> str:
    """How the kernels fail in a schedule; empty if they do not."""
    output = library.with_suffix(f".{order}")
    child = _forks.Process(target=_cases_in_fork, args=(library, order, output))
    child.start()
    child.join(LONGEST)
    if child.is_alive():
        child.kill()
        return f"no end within {LONGEST} s"
    return "" if child.exitcode == 0 else output.read_text() or f"exit code {child.exitcode}"


# Unoptimised: compiling takes longer than running.
SANITIZE = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=alignment")
SANITIZE_ADDRESSES = ("-O0", "-g1", "-fsanitize=address")


def run_sanitized(library: Path) -> str:
    """As `run_cases`, in a process that starts with the sanitizer's runtime."""
    runtime = subprocess.run(
        [os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    added = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LD_PRELOAD": runtime.stdout.strip()}
    done = subprocess.run(
        [sys.executable, str(HERE / "sparse_conv_cases.py"), str(library)],
        env={**os.environ, **added, "ASAN_OPTIONS": options},
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr or f"exit code {done.returncode}"


def build_and_run(sources: Path, output: Path, flags: tuple[str, ...]) -> str:
    """How one version of the kernels fails in the first schedule in which it does; empty if in none."""
    library = build(sources, output, *flags)
    if any("sanitize" in flag for flag in flags):
        return run_sanitized(library)
    return next(filter(None, (run_cases(library, order) for order in SCHEDULES.values())), "")


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    """Of the kernels sanitized as they are, and with each bug; two at a time."""
    folder = tmp_path_factory.mktemp("emulator")
    with ThreadPoolExecutor(2) as pool:
        started = {"sanitized": pool.submit(build_and_run, SOURCES, folder / "sanitized.so", SANITIZE)}
        for number, (name, (file, text, replacement)) in enumerate(MUTATIONS.items()):
            sources = folder / f"mutation{number}"
            sources.mkdir()
            for source in SOURCES.iterdir():
                content = source.read_text()
                if source.name == file:
                    assert content.count(text) == 1, f"{name}: {file} holds {content.count(text)} times {text!r}"
                    content = content.replace(text, replacement)
                (sources / source.name).write_text(content)
            flags = SANITIZE_ADDRESSES if name in NEEDS_SANITIZER else ("-O0",)
            started[name] = pool.submit(build_and_run, sources, folder / f"{number}.so", flags)
    return {name: future.result() for name, future in started.items()}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The kernels as they are."""
    return build(SOURCES, tmp_path_factory.mktemp("emulator") / "plain.so", "-O0")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_matches_the_reference(library, layer, size, schedule, monkeypatch):
    monkeypatch.setenv("CUDA_EMULATOR_ORDER", SCHEDULES[schedule])
    check(Library(library), layer, size, "cpu")


def test_sanitizers_find_nothing(failures):
    assert failures["sanitized"] == ""


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_seen(failures, name):
    assert failures[name]
    if name in NEEDS_SANITIZER:
        assert "AddressSanitizer" in failures[name]


def test_a_library_of_another_interface_is_refused(library, monkeypatch):
    monkeypatch.setattr("lipfast.ops._cuda_library.ABI_VERSION", 99)
    with pytest.raises(BackendError, match="has interface 2176, expected 99176; build it again"):
        Library(library)


def test_a_damaged_library_is_refused(tmp_path):
    (tmp_path / "broken.so").write_text("not a library")
    with pytest.raises(BackendError, match="cannot be loaded"):
        Library(tmp_path / "broken.so")
