import os
import signal
import time

import pytest


def _fork() -> int:
    while True:
        try:
            return os.fork()
        except RuntimeError:  # filelock, where torch has imported it, lets one thread fork at a time
            time.sleep(1e-4)


@pytest.fixture
def exit_code_of_a_child():
    """Runs an action in a forked child: 0 where it returns True, -14 where it takes longer than 20 s."""

    def run(action) -> int:
        child = _fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if action() else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return run
