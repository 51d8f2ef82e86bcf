"""A ticket and a degraded picture in, a restored picture out.

The module can be called: ``lipfast.restore(...)`` is ``lipfast.restore.restore(...)``.
"""

import sys
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

import lipfast
from lipfast import images, priors, tasks
from lipfast.config import checks_types
from lipfast.errors import InputError
from lipfast.fit import FitConfig, FitResult, checked_device, fit
from lipfast.fit.loop import Callback
from lipfast.tickets import Ticket


@dataclass(frozen=True)
class Restored:
    """What a restoration gives.

    Attributes:
        image: (C, H, W) in [0, 1]; C as in the degraded picture.
        report: what was done, JSON-able: sizes, ticket, settings, which output was taken, seconds, metrics if known.
        fit: the whole fit on the padded picture.
    """

    image: Tensor
    report: dict[str, Any]
    fit: FitResult


@checks_types
def restore(
    degraded: Tensor,
    ticket: Ticket,
    task: tasks.Task | Any | None = None,
    *,
    fit_config: FitConfig | None = None,
    clean: Tensor | None = None,
    engine: str = "auto",
    device: str = "cpu",
    callbacks: Sequence[Callback] = (),
) -> Restored:
    """Fit a ticket to a degraded picture of any size and return the picture it forms.

    For denoising, inpainting and super-resolution the picture is mirrored at its borders until both sides suit the
    network (multiples of its stride, 32 px for the paper's), and the result is cut back: no pixel is lost. A grey
    picture is fitted as three equal channels and their mean is returned. Other tasks must have a fitting size.

    Args:
        degraded: the measurement: (1 or 3, H, W) in [0, 1], or what ``task.degrade`` returns.
        ticket: what to fit.
        task: how it was degraded; None takes the task the ticket was searched on.
        fit_config: None takes the task's defaults and the ticket's seed.
        clean: the clean picture (C, H, W) if known, only for the metrics in the report (SSIM from 11 px on).
        engine: "auto" or "torch".
        device: "cpu" or "cuda".
        callbacks: called after each step of the fit.

    Returns:
        The output at the automatic stop where ``fit_config`` has a stop rule (if that did not fire: at the least
        variance so far; the report's ``taken`` says so), else the last one.

    Raises:
        InputError: a picture, mask or measurement that does not fit.
        ConfigError: a setting out of range.
        BackendError: the device cannot be had.
    """
    task = tasks.from_config(ticket.task) if task is None else tasks.as_task(task)
    fit_config = FitConfig.for_task(task, seed=ticket.seed) if fit_config is None else fit_config
    place = checked_device(device)
    network = ticket.to_model()
    frame = _Frame.around(degraded, task, priors.as_prior(network), int(ticket.config.get("out_channels", 3)))
    reference = None if clean is None else frame.check_clean(clean)
    started = time.perf_counter()
    result = fit(
        network.to(place),
        frame.task,
        frame.observed,
        config=fit_config,
        masks=ticket.masks,
        engine=engine,
        callbacks=callbacks,
    )
    seconds = time.perf_counter() - started
    picked = result.stopped if result.stopped is not None else result.last
    image = frame.cut(picked.image.cpu())
    report = {
        "task": task.config,
        "size": [image.shape[-2], image.shape[-1]],
        "fitted_size": list(picked.image.shape[-2:]),
        "channels": image.shape[0],
        "ticket": {
            "round": ticket.round,
            "sparsity": ticket.sparsity,
            "searched_on": ticket.task,
            "prior": ticket.prior,
        },
        "iterations": fit_config.iterations,
        "taken": _taken(result),
        "taken_step": picked.step,
        "loss": float(result.losses[-1]),
        "seconds": round(seconds, 3),
        "engine": engine,
        "device": device,
        "lipfast": lipfast.__version__,
        "torch": torch.__version__,
    }
    if reference is not None:
        report["psnr"] = tasks.score(task.defaults.metric, image, reference)
        if tasks.has_similarity(task, image.shape):
            report["ssim"] = tasks.similarity(task.defaults.metric, image, reference)
    return Restored(image, report, result)


def _taken(result: FitResult) -> str:
    if result.stopped is None:
        return "last step"
    return "automatic stop" if result.stop_fired else "least variance (the stop rule did not fire)"


@dataclass(frozen=True)
class _Frame:
    """A measurement padded to what the network can make, and the way back."""

    task: tasks.Task  # fits the padded measurement
    observed: Tensor
    top: int  # px of the restored picture before the part that is wanted
    left: int
    height: int
    width: int
    grey: bool

    @classmethod
    def around(cls, degraded: Tensor, task: tasks.Task, prior: priors.Prior, channels: int) -> "_Frame":
        if not isinstance(task, tasks.Denoise | tasks.Inpaint | tasks.SuperResolve):
            shape = task.image_shape(degraded)
            if len(shape) != 3:
                raise InputError(f"restore: one measurement at a time, got {len(degraded)} of images {shape[1:]}")
            return cls(task, degraded, 0, 0, shape[-2], shape[-1], grey=False)
        image = images.check_scale(degraded, "restore: the degraded picture")
        factor = task.factor if isinstance(task, tasks.SuperResolve) else 1
        multiple = prior.stride // gcd(prior.stride, factor)
        minimum = -(-prior.minimum_size // factor)
        if isinstance(task, tasks.Inpaint):  # before padding: a drawn mask depends on the picture's size
            task = tasks.Inpaint(images.pad_to_multiple(task.mask(image.shape), multiple, minimum))
        padded = images.pad_to_multiple(image, multiple, minimum)
        grey = image.shape[0] == 1 and channels != 1
        if not grey and image.shape[0] != channels:
            raise InputError(f"restore: the picture has {image.shape[0]} channels but the ticket makes {channels}")
        rows, columns = image.shape[-2:]
        return cls(
            task,
            padded.expand(channels, -1, -1) if grey else padded,
            top=factor * ((padded.shape[-2] - rows) // 2),
            left=factor * ((padded.shape[-1] - columns) // 2),
            height=factor * rows,
            width=factor * columns,
            grey=grey,
        )

    def check_clean(self, clean: Tensor) -> Tensor:
        """The clean picture, if the restored one can be judged by it."""
        clean = images.check_scale(clean, "restore: the clean picture")
        channels = 1 if self.grey else self.task.image_shape(self.observed)[-3]
        wanted = (channels, self.height, self.width)
        if tuple(clean.shape) != wanted:
            raise InputError(f"restore: the clean picture has shape {tuple(clean.shape)}, the restored one {wanted}")
        tasks.score(self.task.defaults.metric, clean, clean)  # where it cannot be taken it says so before the fit
        return clean

    def cut(self, restored: Tensor) -> Tensor:
        """The part of a restored picture (C, H, W) that was asked for."""
        part = restored[:, self.top : self.top + self.height, self.left : self.left + self.width]
        return part.mean(0, keepdim=True) if self.grey else part


class _CallableModule(types.ModuleType):
    """``lipfast.restore`` is this module as soon as anything imports it; this keeps it the public function as well."""

    def __call__(self, *arguments: Any, **options: Any) -> Restored:
        return restore(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
