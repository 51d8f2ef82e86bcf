"""Which implementation runs, and on which device."""

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch

from lipfast import ops
from lipfast.errors import BackendError
from lipfast.ops import _cuda_library, _dispatch

SECOND = torch.device("cuda", 1)


@pytest.fixture
def events(monkeypatch):
    """What happens, in order; ``torch.cuda.device`` only notes that it was entered and left."""
    noted = []

    @contextlib.contextmanager
    def device(which):
        noted.append(f"enter {which}")
        yield
        noted.append(f"leave {which}")

    monkeypatch.setattr(torch.cuda, "device", device)
    return noted


@pytest.fixture
def gpu_backend(monkeypatch, events):
    """A backend for CUDA tensors whose ops note that they ran."""

    def rewind(start, into):
        events.append("rewind")
        return [], [], torch.empty(0)

    pruning = SimpleNamespace(living=1, nan_part=-1, masks=lambda: events.append("masks") or [], rewind=rewind)
    backend = SimpleNamespace(
        adam_step=lambda *given: events.append(("adam_step", given)), begin_pruning=lambda *given: pruning
    )
    monkeypatch.setattr(_dispatch, "load", lambda name: backend)


def test_a_gpus_kernels_run_with_its_tensors_device_current(gpu_backend, events):
    """Triton launches on the current device, whatever its tensors say."""
    name, run = _dispatch.pick("adam_step", SECOND, "triton")
    assert name == "triton"
    assert events == []
    run(1, 2)
    assert events == ["enter cuda:1", ("adam_step", (1, 2)), "leave cuda:1"]


def test_on_a_cpu_nothing_is_guarded(gpu_backend, events):
    _, run = _dispatch.pick("adam_step", torch.device("cpu"), "reference")
    run(1)
    assert events == [("adam_step", (1,))]


def test_a_pruning_rounds_later_launches_are_guarded(gpu_backend, events, monkeypatch):
    monkeypatch.setattr("lipfast.ops.select.device_of", lambda weights: SECOND)
    monkeypatch.setattr("lipfast.ops.rewind.device_of", lambda weights: SECOND)
    guard = ["enter cuda:1", "leave cuda:1"]
    weights, alive = [torch.ones(1)], [torch.ones(1, dtype=torch.bool)]
    ops.prune_smallest(weights, alive, 0, backend="triton")
    assert events == [*guard, "enter cuda:1", "masks", "leave cuda:1"]  # one for begin_pruning
    events.clear()
    ops.prune_rewind_pack(weights, alive, weights, 0, backend="triton")
    assert events == [*guard, "enter cuda:1", "rewind", "leave cuda:1"]


def test_cuda_kernels_get_the_tensors_device_and_its_current_stream(monkeypatch):
    asked, launched = [], []

    def current_stream(device):
        asked.append(device)
        return SimpleNamespace(cuda_stream=0xABCD)

    def launch(arguments, device, stream):
        launched.append((device, stream.value))
        return 0

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    library = object.__new__(_cuda_library.Library)
    library._c = SimpleNamespace(lipfast_sparse_conv=launch)
    arguments = ctypes.c_int32()
    library.run("lipfast_sparse_conv", arguments, SECOND)
    library.run("lipfast_sparse_conv", arguments, torch.device("cuda", 0))
    assert asked == [SECOND, torch.device("cuda", 0)]
    assert launched == [(1, 0xABCD), (0, 0xABCD)]


def test_reasons_are_given_for_every_backend():
    with pytest.raises(
        BackendError, match=r"no_such_op cannot run on cpu: cuda runs on cuda; triton .*; cpu has no no_such"
    ):
        _dispatch.pick("no_such_op", torch.device("cpu"))
    with pytest.raises(BackendError, match="unknown backend 'tpu'; known: cuda, triton, cpu, reference"):
        _dispatch.pick("adam_step", torch.device("cpu"), "tpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_kernel_behind_an_op(backend, monkeypatch):
    monkeypatch.setenv("LIPFAST_BACKEND", backend)
    dense = torch.randn(5, 7)
    mask = dense > 0
    gather = ops.kernel("gather_kept", dense.device)
    assert gather.__module__ == f"lipfast.ops.{backend}"
    assert torch.equal(gather(dense, mask), ops.gather_kept(dense, mask))
    with pytest.raises(BackendError, match="has no hammer"):
        ops.kernel("hammer", dense.device)
