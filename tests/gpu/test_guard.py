"""The guard page must be able to kill: otherwise the guarded tests prove nothing."""

import ctypes
import os
import signal

import pytest
import torch
import triton
import triton.language as tl
from guard import guarded_empty, guarding_outputs


@triton.jit
def read_kernel(x, y, n, BLOCK: tl.constexpr, BOUNDED: tl.constexpr):
    i = tl.arange(0, BLOCK)
    inside = i < n if BOUNDED else i < BLOCK
    tl.store(y + i, tl.load(x + i, mask=inside, other=0.0))


def exit_code_of(action) -> int:
    """Exit code of ``action`` in a forked child; minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("n", [1, 5, 1024])
def test_one_element_too_far_is_fatal(n):
    tensor = guarded_empty(n).fill_(1.0)
    numbers = ctypes.cast(tensor.data_ptr(), ctypes.POINTER(ctypes.c_float))
    assert exit_code_of(lambda: numbers[n - 1]) == 0
    assert exit_code_of(lambda: numbers[n]) == -signal.SIGSEGV


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_kernel_without_its_bound_dies():
    x, y = guarded_empty(5).fill_(1.0), torch.zeros(8)
    assert exit_code_of(lambda: read_kernel[(1,)](x, y, 5, BLOCK=8, BOUNDED=True)) == 0
    assert exit_code_of(lambda: read_kernel[(1,)](x, y, 5, BLOCK=8, BOUNDED=False)) == -signal.SIGSEGV


def test_outputs_are_guarded():
    with guarding_outputs():
        made = torch.empty(3, 5), torch.empty((7,), dtype=torch.int32), torch.empty_like(torch.zeros(2, 2))
    for tensor in made:
        end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
        assert exit_code_of(lambda end=end: ctypes.string_at(end, 1)) == -signal.SIGSEGV
