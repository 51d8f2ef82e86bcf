"""A watch notices every write, and reads nothing while there is none."""

import copy
import ctypes
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lipfast.engine.watch import Watch


def some_weights() -> list[Tensor]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(8, 6, 3, 3)), nn.Parameter(torch.randn(4, 8, 1, 1))]


def calm(tensors: list[Tensor]) -> Watch:
    """A watch that reads no more."""
    watch = Watch(tensors)
    assert watch.unchanged(tensors)
    assert watch.reads
    assert watch.unchanged(tensors)
    assert not watch.reads
    return watch


def write_past_torch(tensor: Tensor) -> None:
    address = torch._C._data_address(tensor)
    ctypes.c_float.from_address(address).value += 1


@torch.no_grad()
def in_place(weights: list[Tensor]) -> None:
    weights[1][2, 3] += 1e-6


def through_data(weights: list[Tensor]) -> None:
    weights[0].data[7, 5, 2, 2] = 3.0


def new_data(weights: list[Tensor]) -> None:
    weights[0].data = weights[0].data * 2


def optimiser(weights: list[Tensor]) -> None:
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    torch.optim.Adam(weights).step()


def numpy(weights: list[Tensor]) -> None:
    weights[1].detach().numpy()[0] = 5


def dlpack(weights: list[Tensor]) -> None:
    torch.from_dlpack(weights[0].detach()).zero_()


def memory_format(weights: list[Tensor]) -> None:  # the numbers of the first weight in another order
    weights[0].data = weights[0].data.to(memory_format=torch.channels_last)


WRITES = [in_place, through_data, new_data, optimiser, numpy, dlpack, memory_format]


@pytest.mark.parametrize("asked", [0, 1, 2], ids=["at once", "once unchanged", "calm"])
@pytest.mark.parametrize("write", WRITES)
def test_every_write_is_seen(write, asked):
    weights = some_weights()
    watch = Watch(weights)
    for _ in range(asked):
        assert watch.unchanged(weights)
    assert watch.reads == (asked < 2)
    write(weights)
    for _ in range(3):  # it is asked about the first numbers, not about the last answer
        assert not watch.unchanged(weights)


@torch.no_grad()
def test_an_alias_from_before_is_no_way_around():
    weights = some_weights()
    alias, row = weights[0].detach(), weights[0].detach()[3]
    for view in (alias, row):
        watch = calm(weights)
        view.add_(1)
        assert not watch.unchanged(weights)


def test_a_calm_watch_reads_nothing():
    weights = some_weights()
    watch = calm(weights)
    write_past_torch(weights[0])
    assert watch.unchanged(weights)


def test_reads_asks_for_reading_every_time():
    weights = some_weights()
    watch = Watch(weights, reads=True)
    for _ in range(4):
        assert watch.unchanged(weights)
        assert watch.reads
    write_past_torch(weights[0])
    assert not watch.unchanged(weights)


def of_numpy() -> tuple[Tensor, np.ndarray]:
    array = np.ones((2, 3), np.float32)
    return torch.from_numpy(array), array


def lent_to_numpy() -> tuple[Tensor, np.ndarray]:
    tensor = torch.ones(2, 3)
    return tensor, tensor.numpy()


def shared_with_processes() -> tuple[Tensor, np.ndarray]:
    tensor = torch.ones(2, 3).share_memory_()
    return tensor, torch.empty(0).set_(tensor.untyped_storage(), 0, (2, 3)).numpy()


@pytest.mark.parametrize("make", [of_numpy, lent_to_numpy, shared_with_processes])
def test_memory_that_others_may_write_is_read_every_time(make):
    tensor, array = make()
    watch = Watch([tensor])
    for _ in range(4):
        assert watch.unchanged([tensor])
        assert watch.reads
    array[1, 2] = 2
    assert not watch.unchanged([tensor])


@pytest.mark.parametrize("hand_out", [lambda t: t.data_ptr(), lambda t: torch.from_dlpack(t.detach())])
def test_after_a_pointer_was_handed_out_numbers_are_read(hand_out):
    weights = some_weights()
    watch = calm(weights)
    pointer = hand_out(weights[1])
    for _ in range(3):
        assert watch.unchanged(weights)
        assert watch.reads
    write_past_torch(weights[1])
    assert not watch.unchanged(weights)
    del pointer


def test_watching_leaves_the_tensors_as_they_were():
    weights = some_weights()
    before = [weight.detach().clone() for weight in weights]
    watch = calm(weights)
    twins = copy.deepcopy(weights)
    for weight, twin, old in zip(weights, twins, before, strict=True):
        weight.square().sum().backward()
        assert torch.equal(weight, old)
        assert torch.equal(twin, old)
        assert torch.equal(weight.grad, 2 * old)
        twin.data.zero_()  # a copy is no alias
    assert watch.unchanged(weights)
    through_data(weights)
    assert float(weights[0].data[7, 5, 2, 2]) == 3.0
    assert torch.equal(weights[1], before[1])


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 1),
        lambda t: t[1::2, :, 1:],
        lambda t: t.flatten()[5:],
        lambda t: t.expand(2, *t.shape),
    ],
    ids=["channels_last", "transposed", "strided", "offset", "expanded"],
)
def test_layouts(layout):
    view = layout(torch.randn(6, 4, 3, 3))
    watch = calm([view])
    view[(-1,) * view.dim()] += 1
    assert not watch.unchanged([view])


def test_threads_may_ask_at_once():
    weights = some_weights()
    watch = Watch(weights)
    wrong: list[str] = []

    def ask() -> None:
        for _ in range(200):
            if not watch.unchanged(weights):
                wrong.append("changed")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    in_place(weights)
    assert not watch.unchanged(weights)


def test_inference_tensors():
    with torch.inference_mode():
        weights = [torch.randn(3, 3)]
        watch = calm(weights)
        weights[0][1, 1] = 0
        assert not watch.unchanged(weights)
