"""What a module's forward assigns to its own attributes, where the next call finds it and assigns nothing: tables and
masks that are made once and kept.

The first call of such a module makes them as torch would, from the parameters and inputs it is given; what is recorded
is the call after that.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lipfast.engine.capture import Assigned, Call, Recording, Ref, assigns, left_as_it_was, made_by, refs_in
from lipfast.engine.patterns import written


def assign(
    module: nn.Module,
    assigned: Sequence[Assigned],
    first: Recording,
    again: Callable[[], Recording],
    run: Callable[[Sequence[Call], set[int]], Mapping[int, Any]],
) -> Recording:
    """Give a module's attributes what its forward assigns to them, and return the recording of the next call.

    Args:
        module: whose forward was recorded.
        assigned: what that assigned, tensors as `Ref`.
        first: that recording.
        again: records another call, which may assign nothing.
        run: runs some of the calls on the tensors at hand, and returns what they make and these numbers.

    Raises:
        InputError: the next call would assign something, too, or do something else than the first one.
    """
    wanted = {ref.number for one in assigned for ref in refs_in(one.value)}
    calls = made_by(first.calls, wanted)
    if first.leaves.keys() & wanted or _overwrites(first, calls):
        raise assigns(assigned)
    known = run(calls, wanted)
    values = [
        pytree.tree_map(lambda leaf: known[leaf.number] if isinstance(leaf, Ref) else leaf, one.value)
        for one in assigned
    ]
    with left_as_it_was(module):
        _put(module, assigned, values)
        settled = again()
    before, after, extra = (collections.Counter(c.name for c in made) for made in (first.calls, settled.calls, calls))
    if after - before or (before - after) - extra or first.counted != settled.counted:
        raise assigns(assigned)
    _put(module, assigned, values)
    return settled


def _overwrites(recording: Recording, calls: Sequence[Call]) -> bool:
    """Whether calls, which will run once more, may write into what the module is given."""
    given = {ref.number for ref in recording.inputs} | recording.leaves.keys()
    reads = any(ref.number in given for call in calls for ref in call.refs())
    return reads and bool(written(Recording([], {}, {}, list(calls), None, [])))


def _put(module: nn.Module, assigned: Sequence[Assigned], values: Sequence[Any]) -> None:
    for one, value in zip(assigned, values, strict=True):
        attributes = vars(module.get_submodule(one.path))
        if not one.entries:
            attributes[one.name] = value
            continue
        held = attributes[one.name]
        held.clear()
        held.update(value) if isinstance(held, dict) else held.extend(value)


def shares_memory(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether a tensor is, in part or whole, the memory of another one."""
    memory = tensor.untyped_storage()._cdata
    return any(memory == other.untyped_storage()._cdata for other in others)
