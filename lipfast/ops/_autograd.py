"""What the differentiable ops share."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from lipfast.errors import BackendError


def register_gradient(op: Any, name: str, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
    """Make ``backward`` the gradient of ``op``, the custom op behind op ``name``."""

    def first_order(ctx: Any, *gradients: Tensor) -> Any:
        refuse_tangents(name, *gradients)
        return backward(ctx, *gradients)

    op.register_autograd(first_order, setup_context=setup_context)


def refuse_double_backward(gradient_op: Any, name: str) -> None:
    """Make differentiating ``gradient_op``, a custom op that computes a gradient of op ``name``, a clear error."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        raise BackendError(
            f"{name}: double backward is not supported, its gradient has no gradient of its own; "
            f"leave out create_graph=True, or use torch's own function for this layer"
        )

    gradient_op.register_autograd(backward)


def has_tangent(value: Any) -> bool:
    """Whether forward-mode differentiation follows a tensor."""
    if forward_ad._current_level < 0 or not isinstance(value, Tensor):
        return False
    return forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]


def refuse_tangents(op: str, *operands: Tensor | None) -> None:
    """Forward-mode differentiation takes a custom op for a constant, and says nothing."""
    if any(has_tangent(operand) for operand in operands):
        raise BackendError(f"{op}: forward-mode differentiation is not supported; use torch's own function")


def version_of(tensor: Tensor) -> int:
    """Changes when the tensor is written in place; tensors made under inference_mode keep no count."""
    return 0 if tensor.is_inference() else tensor._version


def note_writes(*tensors: Tensor) -> None:
    """Tell autograd of writes that torch does not see: a backward pass that needs the old numbers then says so."""
    increment_version([tensor for tensor in tensors if not tensor.is_inference()])
