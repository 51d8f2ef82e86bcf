"""Locks that a forked child finds open, and what they guard in one piece: a fork waits until they are free."""

import os
import threading
import weakref

# Whoever holds a lock may wait for one of a later rank, so a fork takes them in that order.
_ranks: list["weakref.WeakSet[threading.RLock]"] = [weakref.WeakSet(), weakref.WeakSet(), weakref.WeakSet()]
_forking = threading.RLock()  # one fork at a time: two would take the others in two orders
_held: list["threading.RLock"] = []


def lock(rank: int = 0) -> "threading.RLock":
    """A re-entrant lock; code that holds it takes only locks of a higher rank, 0 to 2."""
    made = threading.RLock()
    _ranks[rank].add(made)
    return made


def _before_fork() -> None:
    _forking.acquire()
    _held.extend(one for known in _ranks for one in list(known))
    for one in _held:
        one.acquire()


def _after_fork() -> None:
    while _held:
        _held.pop().release()
    _forking.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
