"""What a survey of a module finds, and when it says that the module has changed."""

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import lipfast._C as _C
from lipfast.engine.lane_module import accelerate
from lipfast.engine.survey import Survey
from lipfast.errors import InputError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.twin = self.first
        self.scale, self.sizes = 2.0, [1, 2]
        self.register_parameter("none", None)
        self._modules = OrderedDict(self._modules)


def replace_by_an_equal_tensor(net: Net) -> None:
    net.norm.weight = nn.Parameter(net.norm.weight.detach().clone())


def rename(net: Net) -> None:
    net._parameters = {"other": None}


def move_to_the_buffers(net: Net) -> None:
    net._buffers["none"] = net._parameters.pop("none")


def replace_all_attributes(net: Net) -> None:
    net.norm.__dict__ = dict(net.norm.__dict__)


def change_class(net: Net) -> None:
    net.norm.__class__ = nn.BatchNorm1d


def reorder(net: Net) -> None:
    net._modules.move_to_end("first")  # of an OrderedDict


CHANGES: dict[str, Callable[[Net], object]] = {
    "an equal parameter": replace_by_an_equal_tensor,
    "a name": rename,
    "parameter to buffer": move_to_the_buffers,
    "a new buffer": lambda net: net.norm.register_buffer("more", torch.zeros(1)),
    "a parameter less": lambda net: net.first.register_parameter("bias", None),
    "all attributes": replace_all_attributes,
    "a class": change_class,
    "an order": reorder,
    "a child": lambda net: setattr(net, "first", nn.Conv2d(1, 2, 3)),
    "a new child": lambda net: net.add_module("last", nn.ReLU()),
    "a child less": lambda net: delattr(net, "twin"),
    "a child's attribute": lambda net: setattr(net.norm, "eps", 0.5),
    "a mode": lambda net: net.norm.eval(),
    "a new attribute": lambda net: setattr(net, "more", 1),
    "an attribute less": lambda net: delattr(net, "scale"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change):
    net = Net()
    survey = Survey(net)
    assert survey.holds()
    change(net)
    assert not survey.holds()
    again = Survey(net)
    assert again.holds()
    named = dict(net.named_parameters()) | dict(net.named_buffers())
    assert list(again.tensors) == list(named)
    assert all(again.tensors[name] is tensor for name, tensor in named.items())


def test_numbers_and_entries_of_a_list_are_not_looked_at():
    net = Net()
    survey = Survey(net)
    with torch.no_grad():
        net.first.weight.zero_()
    net.sizes.append(3)
    assert survey.holds()


def test_no_parameter_is_kept_alive():
    net = Net()
    survey = Survey(net)
    weight = weakref.ref(net.first.weight)
    net.first.weight = nn.Parameter(torch.zeros(2, 1, 3, 3))
    gc.collect()
    assert weight() is None
    assert not survey.holds()
    net.norm.bias = None  # a tensor that is gone is not None
    assert not survey.holds()


class Switched(nn.BatchNorm2d):
    """A mode that no attribute of the module tells."""

    on = False
    training = property(lambda self: Switched.on, lambda self, mode: None)


def set_eps_among_new_attributes(model: nn.Module) -> None:
    norm = model._modules["1"]
    norm.__dict__ = dict(norm.__dict__)
    norm.eps = 9.0


def replace_the_activation(model: nn.Module) -> None:
    model._modules["2"].__class__ = nn.Tanh


def switch(model: nn.Module) -> None:
    Switched.on = True


@pytest.mark.parametrize(
    ("norm", "change"),
    [(nn.BatchNorm2d, set_eps_among_new_attributes), (nn.BatchNorm2d, replace_the_activation), (Switched, switch)],
)
def test_an_accelerated_module_runs_as_it_is_now(norm, change, monkeypatch):
    monkeypatch.setattr(Switched, "on", False)
    fast = accelerate(nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU()).eval())
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = fast(x)
        change(fast)
        dense = fast.to_dense()
        after = fast(x)
        torch.testing.assert_close(after, dense(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)


def test_hooks_are_seen_and_refused():
    net = Net()
    survey = Survey(net)
    handle = net.norm.register_forward_hook(lambda *_: None)
    assert not survey.holds()
    with pytest.raises(InputError, match="module 'norm' has hooks"):
        Survey(net)
    handle.remove()
    assert Survey(net).holds()


class Record:
    """Entries of dicts as they were found, one after the other."""

    def __init__(self, *entries: object) -> None:
        self.entries = list(entries)
        self.versions = np.zeros(sum(isinstance(entry, dict) for entry in entries), np.uint64)

    def holds(self) -> bool:
        return _C.same_entries(self.entries, self.versions)


def test_each_dict_has_its_own_entries():
    first, second = {"a": 1}, {"b": 2}
    record = Record(first, "a", 1, second, "b", 2)
    assert record.holds()
    second["c"] = 3  # the last one has more
    assert not record.holds()
    del second["c"]
    assert record.holds()
    first["c"] = 3  # and one before it
    assert not record.holds()
    first.clear()
    assert not record.holds()
    first["a"] = 1
    second.clear()
    assert not record.holds()
    assert Record(first, "a", 1).holds()
    assert not Record({}, {}, 7).holds()
    assert Record().holds()
    with pytest.raises(ValueError, match="more dicts than the 1 versions"):
        _C.same_entries([first, "a", 1, {}], np.zeros(1, np.uint64))


class Thing:
    """Its attributes lie in the object, until its dict is asked for."""

    def __init__(self) -> None:
        self.a = 1


def write_an_attribute(thing: Thing) -> None:
    thing.a = 2


WRITES: dict[str, Callable[[Thing], object]] = {
    "an attribute": lambda thing: [write_an_attribute(thing) for _ in range(100)],  # so that Python specialises it
    "setattr": lambda thing: setattr(thing, "a", 2),
    "an entry": lambda thing: vars(thing).__setitem__("a", 2),
    "update": lambda thing: vars(thing).update(a=2),
    "pop and insert": lambda thing: vars(thing).update(a=vars(thing).pop("a") + 1),
    "another key": lambda thing: vars(thing).update(b=vars(thing).pop("a")),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("combined", [False, True], ids=["of its class", "keys of its own"])
def test_a_dict_that_was_looked_at_is_looked_at_again_once_it_is_written(write, combined):
    thing = Thing()
    if combined:
        thing.__dict__ = dict(vars(thing))
    record = Record(vars(thing), "a", thing.a)
    assert record.holds()
    assert record.holds()
    write(thing)
    assert not record.holds()
    vars(thing).clear()
    thing.a = 1
    assert record.holds()
