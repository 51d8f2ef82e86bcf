"""A child forked beside a busy thread finds locks open."""

import os
import signal
import threading
import time

import pytest
import torch
from torch import nn

import lipfast
from lipfast.locks import lock

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def exit_code_of_a_child(action) -> int:
    """0 where ``action`` returns True in a forked child; -14 where it takes longer than 20 s."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if action() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_fork_waits_for_what_another_thread_holds():
    first, second = lock(rank=1), lock()
    held, steps = threading.Event(), []

    def hold():
        with second, first:
            held.set()
            time.sleep(0.3)
            steps.append("let go")

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    assert exit_code_of_a_child(lambda: steps == ["let go"] and first.acquire() and second.acquire()) == 0
    thread.join()
    with first, second:
        pass


def test_a_child_forked_while_a_module_is_recorded_computes_the_same():
    recording = threading.Event()

    class Slow(nn.Conv2d):
        def forward(self, x):
            recording.set()
            time.sleep(0.2)
            return super().forward(x)

    fast, x = lipfast.accelerate(Slow(4, 4, 3)), torch.randn(1, 4, 6, 6)
    expected = super(Slow, fast.to_dense()).forward(x)
    with torch.no_grad():
        thread = threading.Thread(target=lambda: fast(x))
        thread.start()
        recording.wait()
        assert exit_code_of_a_child(lambda: torch.allclose(fast(x), expected, atol=1e-5)) == 0
        thread.join()
