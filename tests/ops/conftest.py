import pytest
import torch

import lipfast._C as _C


@pytest.fixture(params=_C.available_isas())
def isa(request):
    """Each instruction set that this machine has, in turn."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def for_each_thread_count():
    """Calls a function with 1, 2, 3 and 8 threads and returns the answers."""
    before = torch.get_num_threads()

    def call(function):
        answers = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            answers.append(function())
        return answers

    yield call
    torch.set_num_threads(before)
