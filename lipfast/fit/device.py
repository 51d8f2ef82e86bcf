"""Where a fit runs."""

import torch

from lipfast.errors import BackendError, ConfigError


def checked_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: an unknown name.
        BackendError: it cannot run here.
    """
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r} must be cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendError("device='cuda': this torch finds no CUDA device; use device cpu")
    return torch.device(name)


def check_instruction_set() -> None:
    """Refuse a LIPFAST_ISA that cannot run here. The first kernel would too, but in the middle of the work.

    Raises:
        BackendError: with the known names.
    """
    try:
        import lipfast._C as _C
    except ImportError:  # not built: no kernels whose instructions could be missing
        return
    try:
        _C.isa()
    except RuntimeError as error:
        raise BackendError(str(error)) from None
