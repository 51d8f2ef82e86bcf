"""Backward passes that have no gradient of their own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipfast.errors import InputError


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass whose results say so when they are differentiated.

    As ``torch.autograd.function.once_differentiable``, which lets one case pass: where the incoming gradient is
    constant, as in a gradient penalty, it returns constants although they depend on the input.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> Any:
        if any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients):
            raise InputError(
                "lipfast: gradients for several outputs at once (is_grads_batched, vectorize) are not supported; take "
                "them one by one"
            )
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        results = found if isinstance(found, tuple) else (found,)
        refuse = torch._C._functions.DelayedError(
            b"lipfast: double backward is not supported; to_dense() gives a module that has it", len(results)
        )
        marks = [r if r is None else r.detach().requires_grad_() for r in results]
        marked = refuse(*marks)  # type: ignore[arg-type]  # it takes None, too
        marked = (marked,) if isinstance(marked, Tensor) else marked
        return marked if isinstance(found, tuple) else marked[0]

    return run
