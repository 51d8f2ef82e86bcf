"""The noise on a fit's input, fresh in each step."""

import torch
from torch import Tensor

from lipfast import ops
from lipfast.errors import InputError


class InputNoise:
    """Adds it: on the CPU a function of seed and step, on a GPU what its generator draws next.

    Args:
        z: the input without noise; float32, on the device of the fit.
        scale: standard deviation of the noise.
        seed: of all steps.
    """

    def __init__(self, z: Tensor, scale: float, seed: int) -> None:
        self._z, self._scale, self._seed = z, scale, seed
        self._generator = None if z.device.type == "cpu" else torch.Generator(z.device).manual_seed(seed)

    def added(self, step: int) -> Tensor:
        """The input of a step, counted from 0."""
        if self._generator is None:
            noisy: Tensor = ops.kernel("add_noise", self._z.device)(self._z, self._scale, self._seed, step)
            return noisy
        return self._z + self._scale * torch.randn(self._z.shape, generator=self._generator, device=self._z.device)

    def state(self) -> Tensor:
        """The generator's state, bytes; none on the CPU."""
        return torch.empty(0, dtype=torch.uint8) if self._generator is None else self._generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Go on from a state.

        Raises:
            InputError: it comes from another kind of device.
        """
        reason = None
        if self._generator is None:
            reason = f"{len(state)} bytes of a generator" if len(state) else None
        else:
            try:
                self._generator.set_state(state.cpu())
            except RuntimeError as failure:
                reason = str(failure)
        if reason:
            raise InputError(
                f"fit: the state's noise cannot go on on {self._z.device} ({reason}); resume on the device it began on"
            )
