"""The CUDA library as nvcc builds it: what its machine code can reach, and that it loads without a driver.

Needs nvcc and no GPU: make test-gpu-static. Without nvcc these tests fail; they are never skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tables

pytestmark = pytest.mark.nvcc
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("cuda") / "_cuda.so"
    subprocess.run([sys.executable, str(ROOT / "csrc/cuda/build.py"), str(output)], check=True)
    return output


@pytest.fixture(scope="module")
def rows(library):
    import cuda_static

    return {(row["kernel"], row["target"]): row for row in cuda_static.describe_library(library)}


def test_no_spills(rows):
    assert {target for _, target in rows} == {"sm_80", "sm_90"}
    assert [row for row in rows.values() if row["spills"]] == []


def test_the_ceilings_on_an_h100(rows):
    """Shares of the FP32 peak that the machine code allows at 10 % density for a 3x3. Bounds, not timings.

    The bars are 30 and 20 %. Kernels that pass the first ran at a third of the speed of these (docs/gpu.md).
    """
    assert rows["SparseConvKernel large", "sm_90"]["ceiling"] >= 0.20
    assert rows["WeightGradientKernel large", "sm_90"]["ceiling"] >= 0.19


def test_a_kept_weight_costs_its_own_multiply_adds_only(rows):
    """An entry issues one tap's multiply-adds, not all taps' under predicates; sums of gradients may add one."""
    for row in rows.values():
        if "ceiling" in row:
            sums = 2.5 if row["kernel"].startswith("WeightGradient") else 0.1
            assert row["multiply_adds"] <= row["multiply_adds_wanted"] + sums, row


def test_nothing_is_worse_than_the_table(rows):
    assert tables.worse(rows.values(), tables.read("cuda")) == []


def import_backend(library: Path) -> subprocess.CompletedProcess[str]:
    """What the seam says about the backend in a fresh process that sees no GPU."""
    program = "from lipfast.ops import _dispatch; print(repr(_dispatch.load('cuda')))"
    environment = {
        **os.environ,
        "LIPFAST_CUDA_LIBRARY": str(library),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def test_without_a_usable_gpu_the_library_loads_and_says_why(library):
    done = import_backend(library)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ModuleNotFoundError(")
    assert "cannot use this machine's driver: counting devices: CUDA error" in done.stdout


def test_an_absent_library_is_a_reason(tmp_path):
    done = import_backend(tmp_path / "none.so")
    assert done.returncode == 0, done.stderr
    assert "install with LIPFAST_CUDA=1 where nvcc is on PATH" in done.stdout
