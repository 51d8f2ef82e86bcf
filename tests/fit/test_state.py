"""The file of a fit's state."""

import json

import pytest
import safetensors.torch
import torch

from lipfast.errors import InputError
from lipfast.fit import FitState

STATE = FitState(
    {"a.x": torch.arange(3), "a.y.z": torch.tensor(0.1, dtype=torch.float64), "ab": torch.empty(0)},
    {"step": 7, "loss": 0.1, "none": None, "nested": {"list": [1, 2]}},
)


def test_round_trip(tmp_path):
    STATE.save(tmp_path / "s.safetensors")
    back = FitState.load(tmp_path / "s.safetensors")
    assert back.scalars == STATE.scalars
    assert back.step == 7
    assert back.tensors.keys() == STATE.tensors.keys()
    for name, tensor in STATE.tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert torch.equal(back.tensors[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_group_ends_at_its_dot():
    assert STATE.group("a").keys() == {"x", "y.z"}


def test_missing_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(InputError, match=r"s\.safetensors: no such file"):
        FitState.load(path)
    STATE.save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="not a readable fit state"):
        FitState.load(path)


def test_foreign_and_newer_files_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="not the state of a fit"):
        FitState.load(path)
    for text in ("[1]", "3", "[" * 100_000):
        safetensors.torch.save_file({"a": torch.zeros(1)}, path, {"lipfast_fit": text})
        with pytest.raises(InputError, match="not the state of a fit"):
            FitState.load(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, {"lipfast_fit": json.dumps({"version": 3})})
    with pytest.raises(InputError, match="version 3, this lipfast reads version 2"):
        FitState.load(path)


def test_an_unwritable_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"missing/s\.safetensors: cannot be written"):
        STATE.save(tmp_path / "missing" / "s.safetensors")
