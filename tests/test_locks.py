"""A child forked beside a busy thread finds locks open."""

import contextlib
import threading
import time

import pytest
import torch
from torch import nn

import lipfast
from lipfast.locks import lock

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def test_a_fork_waits_for_what_another_thread_holds(exit_code_of_a_child):
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


def test_a_child_forked_while_a_module_is_recorded_finds_its_parameters(exit_code_of_a_child):
    recording, failed = threading.Event(), threading.Event()

    class Slow(nn.Conv2d):
        def forward(self, x):
            if not recording.is_set():
                recording.set()
                time.sleep(0.2)  # stand-ins lie in the place of parameters
                raise ValueError("this recording fails, so that its thread ends here")
            return super().forward(x)

    def record():
        with torch.no_grad(), contextlib.suppress(ValueError):
            fast(x)
        failed.set()

    x = torch.randn(1, 4, 6, 6)
    lipfast.accelerate(nn.Conv2d(4, 4, 3))(x)  # what a process does once is done
    fast = lipfast.accelerate(Slow(4, 4, 3))
    expected = nn.functional.conv2d(x, fast.weight, fast.bias)
    thread = threading.Thread(target=record)
    thread.start()
    recording.wait()
    with torch.no_grad():
        assert exit_code_of_a_child(lambda: torch.allclose(fast(x), expected, atol=1e-5)) == 0
    thread.join()
    assert failed.is_set()


def test_threads_may_fork_at_once(exit_code_of_a_child):
    locks = [lock() for _ in range(50)]
    codes: list[int] = []

    def fork():
        codes.extend(exit_code_of_a_child(lambda: True) for _ in range(100))

    threads = [threading.Thread(target=fork) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert codes == [0] * 300
    assert all(one.acquire(timeout=5) for one in locks)
