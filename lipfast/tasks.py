"""Restoration tasks: how an image was degraded, and how well an output explains what was observed.

A task holds a linear operator ``A`` (image -> measurement), its adjoint, and a data-fidelity loss. Images are
(C, H, W) or, for several at once, (B, C, H, W); measurements carry the same leading B.

Any object with ``A``, ``A_adjoint`` and ``__call__`` (deepinv's physics, and whatever looks like it) is a task too:
see :func:`as_task`.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from lipfast import images
from lipfast.config import check_seed, checks_types, derive_seed
from lipfast.errors import ConfigError, InputError

Metric = Literal["rgb", "luma"]


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """How a task is fitted and judged when nobody says otherwise (arXiv:2410.24187 and its code)."""

    iterations: int  # optimiser steps
    input_noise: float  # standard deviation of the fresh noise added to z in each step
    average: float  # weight of the past in the exponential average of outputs; 0 takes each output as it is
    backtrack: float  # dB that the loss may rise before the last good weights come back; 0 never
    metric: Metric  # "rgb": all channels and pixels; "luma": BT.601 luma, 4 px cut from each side


class Task(Protocol):
    """What a fit needs to know of a degradation."""

    @property
    def name(self) -> str:
        """Its name on the command line."""

    @property
    def defaults(self) -> Defaults:
        """How it is fitted and judged when nobody says otherwise."""

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able description; :func:`from_config` takes it back where the task has one."""

    def degrade(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The measurement of a clean ``image`` (..., C, H, W), noise included, drawn from ``generator``.

        Raises:
            InputError: ``image`` is no float tensor of this shape, or on another scale than [0, 1] where that is cut.
        """

    def loss(self, output: Tensor, observed: Tensor) -> Tensor:
        """Mean squared data misfit () of an output (..., C, H, W); differentiable."""

    def A(self, image: Tensor) -> Tensor:
        """The linear operator without noise: (..., C, H, W) -> measurement."""

    def A_adjoint(self, observed: Tensor) -> Tensor:
        """Transpose of ``A``: measurement -> (..., C, H, W)."""

    def adjoint(self, observed: Tensor) -> Tensor:
        """The same as ``A_adjoint``, under the name the rest of lipfast uses."""

    def image_shape(self, observed: Tensor) -> tuple[int, ...]:
        """Shape (..., C, H, W) of the images that have measurements like ``observed``.

        Raises:
            InputError: ``observed`` cannot be a measurement of this task.
        """


class _Linear:
    """What the tasks below share: the loss is the mean squared misfit of ``A``."""

    def A(self, image: Tensor) -> Tensor:
        raise NotImplementedError

    def A_adjoint(self, observed: Tensor) -> Tensor:
        raise NotImplementedError

    def adjoint(self, observed: Tensor) -> Tensor:
        return self.A_adjoint(observed)

    def loss(self, output: Tensor, observed: Tensor) -> Tensor:
        return functional.mse_loss(self.A(output), observed)

    def image_shape(self, observed: Tensor) -> tuple[int, ...]:
        return _image_shape(type(self).__name__, observed)


class Denoise(_Linear):
    """White Gaussian noise, clipped to [0, 1] as a picture file would.

    Args:
        sigma: standard deviation in grey levels of 255, 0 to 255. Only :meth:`degrade` uses it.

    Raises:
        ConfigError: sigma out of range.
    """

    name: ClassVar[str] = "denoise"
    defaults: ClassVar[Defaults] = Defaults(
        iterations=3000, input_noise=1 / 30, average=0.99, backtrack=5.0, metric="rgb"
    )

    @checks_types
    def __init__(self, sigma: float = 25.0) -> None:
        if not 0 <= sigma <= 255:
            raise ConfigError(f"denoise: sigma is in grey levels, 0 to 255, got {sigma}")
        self.sigma = sigma

    @property
    def config(self) -> dict[str, Any]:
        return {"name": self.name, "sigma": self.sigma}

    @checks_types
    def degrade(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _check_image(self.name, image)
        images.check_range(image, self.name)  # cut to [0, 1], grey levels would become white
        noise = torch.randn(image.shape, generator=generator, dtype=image.dtype)
        return (image + noise.to(image.device) * (self.sigma / 255)).clamp(0, 1)

    def A(self, image: Tensor) -> Tensor:
        return image

    def A_adjoint(self, observed: Tensor) -> Tensor:
        return observed


class Inpaint(_Linear):
    """Missing pixels. The loss looks only at the pixels that are there, its mean runs over all.

    Args:
        mask: (H, W), (1, H, W) or (C, H, W), true or 1 where the pixel is known. Not with ``keep``.
        keep: probability in (0, 1) that a pixel is known; the mask is drawn from ``seed``.
        per_channel: draw the channels of a pixel apart (the authors' code) or together.
        seed: of the drawn mask, 0 to 2^63 - 1.

    Raises:
        ConfigError: keep or seed out of range, or both or neither of mask and keep.
        InputError: the mask has another shape, other values than 0 and 1, or knows no pixel.
    """

    name: ClassVar[str] = "inpaint"
    defaults: ClassVar[Defaults] = Defaults(iterations=3000, input_noise=0.03, average=0.0, backtrack=0.0, metric="rgb")

    @checks_types
    def __init__(
        self, mask: Tensor | None = None, *, keep: float | None = None, per_channel: bool = True, seed: int = 0
    ) -> None:
        if (mask is None) == (keep is None):
            raise ConfigError("inpaint: give either a mask or the probability `keep` that a pixel is known")
        if keep is not None and not 0 < keep < 1:
            raise ConfigError(f"inpaint: keep is the probability that a pixel is known, in (0, 1), got {keep}")
        check_seed("inpaint: seed", seed)
        self.keep, self.per_channel, self.seed = keep, per_channel, seed
        self._mask = None if mask is None else _check_mask(mask)

    @property
    def config(self) -> dict[str, Any]:
        """With a mask of your own, its shape and checksum: enough to recognise it, not to rebuild it."""
        if self._mask is None:
            return {"name": self.name, "keep": self.keep, "per_channel": self.per_channel, "seed": self.seed}
        digest = hashlib.sha256((self._mask != 0).numpy().tobytes()).hexdigest()[:16]
        return {"name": self.name, "mask_sha256": digest, "mask_shape": list(self._mask.shape)}

    def mask(self, shape: Sequence[int]) -> Tensor:
        """A copy of the mask as float32, 1 where known, that applies to images of ``shape`` (..., C, H, W).

        Raises:
            InputError: the given mask has another size.
        """
        return self._mask_for(shape).clone()

    def _mask_for(self, shape: Sequence[int]) -> Tensor:
        """As :meth:`mask`, but the mask itself: not to be written."""
        if self._mask is None:
            # The images of a batch share the mask, so that one image alone has the same one.
            return _draw_mask(tuple(shape[-3:]), float(self.keep or 0), self.per_channel, self.seed)
        if self._mask.shape[1:] != tuple(shape[-2:]) or self._mask.shape[0] not in (1, shape[-3]):
            raise InputError(
                f"inpaint: the mask has shape {tuple(self._mask.shape)} but the image {tuple(shape)}; crop both alike"
            )
        return self._mask

    @checks_types
    def degrade(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Unknown pixels become 0. Nothing is drawn from ``generator``: the mask belongs to the task."""
        _check_image(self.name, image)
        return self.A(image)

    def loss(self, output: Tensor, observed: Tensor) -> Tensor:
        # Also masks `observed`, whose unknown pixels may hold anything.
        mask = self._mask_for(output.shape).to(output.device)
        return ((output - observed) * mask).square().mean()

    def A(self, image: Tensor) -> Tensor:
        return image * self._mask_for(image.shape).to(image.device, image.dtype)

    def A_adjoint(self, observed: Tensor) -> Tensor:
        return self.A(observed)


class SuperResolve(_Linear):
    """Fewer pixels. Low-resolution images come from a Lanczos-3 resize; the loss compares them with the output behind a
    differentiable Lanczos-2 downsampler (phase 0.5, edges repeated), both as in DIP.

    Args:
        factor: 4 or 8.

    Raises:
        ConfigError: another factor.

    Source: Turkowski 1990 for the kernel; Ulyanov et al. 2018 for its use here.
    """

    defaults: ClassVar[Defaults] = Defaults(
        iterations=2000, input_noise=0.03, average=0.0, backtrack=0.0, metric="luma"
    )

    @checks_types
    def __init__(self, factor: int = 4) -> None:
        if factor not in (4, 8):
            raise ConfigError(f"super-resolution: the factor is 4 or 8, got {factor}")
        self.factor = factor
        self.name = f"sr{factor}"

    @property
    def config(self) -> dict[str, Any]:
        return {"name": self.name}

    @checks_types
    def degrade(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Lanczos-3 resize, clipped to [0, 1]; (..., C, H, W) -> (..., C, H / factor, W / factor). Draws nothing.

        Raises:
            InputError: a side is no multiple of the factor.
        """
        _check_image(self.name, image)
        images.check_range(image, self.name)  # cut to [0, 1], grey levels would become white
        self._check_sides(image)
        return _along_both_sides(
            image, functools.partial(_shrink, factor=self.factor, lobes=3, edge="renormalise")
        ).clamp(0, 1)

    def A(self, image: Tensor) -> Tensor:
        self._check_sides(image)
        return _along_both_sides(image, self._matrix)

    def A_adjoint(self, observed: Tensor) -> Tensor:
        return _along_both_sides(observed, lambda size: self._matrix(size * self.factor).T)

    def image_shape(self, observed: Tensor) -> tuple[int, ...]:
        *lead, rows, columns = _image_shape(self.name, observed)
        return (*lead, rows * self.factor, columns * self.factor)

    def _matrix(self, size: int) -> Tensor:
        return _shrink(size, factor=self.factor, lobes=2, edge="repeat")

    def _check_sides(self, image: Tensor) -> None:
        rows, columns = image.shape[-2:]
        if rows % self.factor or columns % self.factor:
            raise InputError(f"{self.name}: {rows} x {columns} px cannot be divided by {self.factor}; crop the image")


class CompressedSensing(_Linear):
    """Random projections y = A x + noise with A ~ N(0, 1) / sqrt(m), one row for each measurement.

    The rows are drawn in blocks, each from its own seed, so that A need not exist as a whole: below
    ``memory_limit`` it is drawn once and kept, above it every product draws it anew, with equal numbers.

    Args:
        measurements: m, at least 1; the image's values times m are at most 2^40.
        seed: of A, 0 to 2^63 - 1.
        shape: (C, H, W) of the image. None takes that of the first image degraded.
        noise: standard deviation of the measurement noise, 0 or more.
        memory_limit: bytes that A may occupy.

    Raises:
        ConfigError: an argument out of range.

    Cost: m n products; above the limit also m n normal numbers, once a training step.
    """

    name: ClassVar[str] = "cs"
    defaults: ClassVar[Defaults] = Defaults(iterations=3000, input_noise=0.03, average=0.0, backtrack=0.0, metric="rgb")

    @checks_types
    def __init__(
        self,
        measurements: int,
        seed: int = 0,
        *,
        shape: Sequence[int] | None = None,
        noise: float = 0.01,
        memory_limit: int = 2**30,
    ) -> None:
        if measurements < 1:
            raise ConfigError(f"cs: the number of measurements must be at least 1, got {measurements}")
        if not (noise >= 0 and math.isfinite(noise)):
            raise ConfigError(f"cs: the noise's standard deviation must be 0 or more, got {noise}")
        check_seed("cs: seed", seed)
        if shape is not None:
            _check_measured(tuple(shape), measurements)
        self.measurements, self.seed, self.noise, self.memory_limit = measurements, seed, noise, memory_limit
        self.shape: tuple[int, ...] | None = None if shape is None else tuple(shape)
        self._kept: list[Tensor] = []

    @property
    def config(self) -> dict[str, Any]:
        shape = None if self.shape is None else list(self.shape)
        config = {"measurements": self.measurements, "seed": self.seed, "shape": shape, "noise": self.noise}
        return {"name": self.name, **config}

    @checks_types
    def degrade(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _check_image(self.name, image)
        measured = self.A(image)
        noise = torch.randn(measured.shape, generator=generator, dtype=measured.dtype)
        return measured + self.noise * noise.to(measured.device)

    def loss(self, output: Tensor, observed: Tensor) -> Tensor:
        return _MisfitOfRows.apply(self._flat(output), observed, self)  # type: ignore[no-any-return, no-untyped-call]

    def A(self, image: Tensor) -> Tensor:
        """(..., C, H, W) -> (..., m)."""
        flat = self._flat(image)
        return torch.cat([flat @ rows.T.to(flat) for rows in self.rows()], dim=-1)

    def A_adjoint(self, observed: Tensor) -> Tensor:
        """(..., m) -> (..., C, H, W)."""
        shape = self.image_shape(observed)
        flat = torch.zeros(*shape[:-3], math.prod(shape[-3:]), dtype=observed.dtype, device=observed.device)
        start = 0
        for rows in self.rows():
            flat += observed[..., start : start + len(rows)] @ rows.to(flat)
            start += len(rows)
        return flat.reshape(shape)

    def image_shape(self, observed: Tensor) -> tuple[int, ...]:
        if observed.dim() not in (1, 2) or observed.shape[-1] != self.measurements:
            raise InputError(f"cs: expected (..., {self.measurements}) measurements, got {tuple(observed.shape)}")
        return (*observed.shape[:-1], *self._known_shape())

    def rows(self) -> Iterator[Tensor]:
        """The blocks (rows, n) of A in order, float32."""
        n = math.prod(self._known_shape())
        if self._kept:
            yield from self._kept
            return
        fits = self.measurements * n * 4 <= self.memory_limit
        drawn = []
        for block, start in enumerate(range(0, self.measurements, _ROWS_IN_BLOCK)):
            rows = self._draw(block, min(_ROWS_IN_BLOCK, self.measurements - start), n)
            if fits:
                drawn.append(rows)
            yield rows
        self._kept = drawn

    def _draw(self, block: int, count: int, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, f"cs/block {block}"))
        return torch.randn(count, n, generator=generator).mul_(self.measurements**-0.5)

    def _flat(self, image: Tensor) -> Tensor:
        if self.shape is None:
            _check_measured(tuple(image.shape[-3:]), self.measurements)
            self.shape = tuple(image.shape[-3:])
        if tuple(image.shape[-3:]) != self.shape:
            raise InputError(f"cs: this task measures images of shape {self.shape}, got {tuple(image.shape)}")
        return image.reshape(*image.shape[:-3], -1)

    def _known_shape(self) -> tuple[int, ...]:
        if self.shape is None:
            raise InputError("cs: the image's shape is unknown; give CompressedSensing(shape=(C, H, W))")
        return self.shape


_ROWS_IN_BLOCK = 32
_LARGEST_IMAGE = 2**26  # values; a block of A's rows for it takes 8 GB
_LARGEST_MATRIX = 2**40  # entries of A; drawing as many takes hours


def _check_measured(shape: tuple[int, ...], measurements: int) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise ConfigError(f"cs: shape is the image's (C, H, W), got {shape}")
    values = math.prod(shape)
    if values > _LARGEST_IMAGE:
        raise ConfigError(f"cs: an image of shape {shape} has {values:,} values, at most {_LARGEST_IMAGE:,} are taken")
    if measurements * values > _LARGEST_MATRIX:
        raise ConfigError(
            f"cs: {measurements:,} measurements of {values:,} values are too many; "
            f"at most {_LARGEST_MATRIX // values:,} can be taken of this image"
        )


class _MisfitOfRows(torch.autograd.Function):
    """mean (A x - y)^2 and its gradient in one pass over the rows, so that A is drawn once a step, not twice."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, observed: Tensor, task: CompressedSensing) -> Tensor:
        gradient = torch.zeros_like(flat)
        total = torch.zeros((), dtype=flat.dtype, device=flat.device)
        start = 0
        for block in task.rows():
            rows = block.to(flat)
            misfit = flat @ rows.T - observed[..., start : start + len(rows)]
            total += misfit.square().sum()
            gradient += misfit @ rows
            start += len(rows)
        ctx.save_for_backward(gradient.mul_(2 / observed.numel()))
        return total / observed.numel()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None, None


class Physics(_Linear):
    """A foreign physics object (deepinv's interface: batched ``A``, ``A_adjoint`` and a noisy ``__call__``) as a task.

    Args:
        physics: the object; it sees batches (B, C, H, W).
        defaults: how it is fitted; inpainting's by default.

    Raises:
        InputError: ``physics`` lacks ``A``, ``A_adjoint`` or ``__call__``, or one of them does not give one tensor of
            the rank it should.
    """

    name: ClassVar[str] = "physics"

    def __init__(self, physics: Any, defaults: Defaults = Inpaint.defaults) -> None:
        missing = [name for name in ("A", "A_adjoint", "__call__") if not callable(getattr(physics, name, None))]
        if missing:
            raise InputError(f"{type(physics).__name__} is no physics object: it has no {', '.join(missing)}")
        self.physics, self.defaults = physics, defaults

    @property
    def config(self) -> dict[str, Any]:
        """The class of the object: enough to recognise it, not to rebuild it."""
        return {"name": self.name, "class": f"{type(self.physics).__module__}.{type(self.physics).__qualname__}"}

    def degrade(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``physics(image)`` with torch's global generator seeded from ``generator`` for the time of the call."""
        with torch.random.fork_rng(devices=[]):
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return self._batched(self.physics, image, image.dim() == 3)

    def A(self, image: Tensor) -> Tensor:
        return self._batched(self.physics.A, image, image.dim() == 3)

    def A_adjoint(self, observed: Tensor) -> Tensor:
        # A measurement's own rank is unknown: where it gives one image as a batch of one, it was one measurement.
        image = self._adjoint_of_one(observed)
        if image is not None:
            return image
        several = self.physics.A_adjoint(observed)
        if not isinstance(several, Tensor) or several.dim() != 4:
            got = tuple(several.shape) if isinstance(several, Tensor) else type(several).__name__
            raise InputError(f"physics: A_adjoint must give images (B, C, H, W), got {got}")
        return several

    def _adjoint_of_one(self, observed: Tensor) -> Tensor | None:
        """The image of ``observed`` read as one measurement; None if that is no reading."""
        try:
            single = self.physics.A_adjoint(observed.unsqueeze(0))
        except Exception:  # each physics has its own kind of error for an axis too many
            return None
        fits = isinstance(single, Tensor) and single.dim() == 4 and len(single) == 1
        return cast(Tensor, single[0]) if fits else None

    def image_shape(self, observed: Tensor) -> tuple[int, ...]:
        """The shape of what ``A_adjoint`` makes of ``observed``."""
        return tuple(self.A_adjoint(observed).shape)

    @staticmethod
    def _batched(call: Callable[[Tensor], Any], image: Tensor, single: bool) -> Tensor:
        result = call(image.unsqueeze(0) if single else image)
        if not isinstance(result, Tensor):
            raise InputError(f"physics: measurements must be one tensor, got {type(result).__name__}")
        return result[0] if single else result


def as_task(thing: Any) -> Task:
    """``thing`` itself if it is a task, a :class:`Physics` around it if it looks like deepinv's physics.

    Raises:
        InputError: it is neither.
    """
    if isinstance(thing, type):
        raise InputError(f"task: {thing.__name__} is a class; make one of it, such as {thing.__name__}(...)")
    needed = ("name", "config", "defaults", "degrade", "loss", "adjoint", "A", "A_adjoint", "image_shape")
    if all(hasattr(thing, name) for name in needed):
        return cast(Task, thing)
    return Physics(thing)


NAMES = ("denoise", "inpaint", "sr4", "sr8", "cs")


def parse(name: str, **options: Any) -> Task:
    """Make a task from the command line's words.

    Args:
        name: denoise | inpaint | sr4 | sr8 | cs.
        options: the task's arguments, by their names in its class; None stands for "not given".

    Raises:
        ConfigError: an unknown task, an option it does not have, or a value out of range.
    """
    given = {key: value for key, value in options.items() if value is not None}
    makers: dict[str, tuple[Callable[..., Task], tuple[str, ...]]] = {
        "denoise": (Denoise, ("sigma",)),
        "inpaint": (Inpaint, ("mask", "keep", "per_channel", "seed")),
        "sr4": (functools.partial(SuperResolve, 4), ()),
        "sr8": (functools.partial(SuperResolve, 8), ()),
        "cs": (CompressedSensing, ("measurements", "seed", "shape", "noise", "memory_limit")),
    }
    if name not in makers:
        raise ConfigError(f"unknown task {name!r}; known: {', '.join(NAMES)}")
    make, known = makers[name]
    if strange := [key for key in given if key not in known]:
        raise ConfigError(f"task {name}: no option {strange[0]!r}; it has {', '.join(known) or 'none'}")
    if name == "inpaint" and "mask" not in given:
        given.setdefault("keep", 0.5)
    if name == "cs" and "measurements" not in given:
        raise ConfigError("task cs: say how many measurements to take (measurements=, --measurements)")
    return make(**given)


def from_config(config: dict[str, Any], *, mask: Tensor | None = None) -> Task:
    """The task with ``task.config == config``.

    Args:
        config: a task's ``config``.
        mask: the mask of an inpainting task that was made from one; configs hold only its checksum.

    Raises:
        ConfigError: no such task, or it cannot be rebuilt from its config.
        InputError: the mask is not the one the config names.
    """
    if config.get("name") == Physics.name:
        raise ConfigError(f"physics: {config.get('class')} cannot be rebuilt from its config; give the task again")
    options = {key: value for key, value in config.items() if key != "name"}
    if "mask_sha256" not in options:
        return parse(str(config.get("name")), **options)
    if mask is None:
        raise ConfigError("inpaint: this task was made from a mask; give the mask again")
    task = Inpaint(mask)
    if task.config != config:
        raise InputError(f"inpaint: the mask is not the one of the config (checksum {options['mask_sha256']})")
    return task


def score(metric: Metric, image: Tensor, clean: Tensor) -> float:
    """PSNR in dB by a task's metric: over everything, or over the luma inside a border of 4 px."""
    return images.psnr(image, clean) if metric == "rgb" else images.psnr_luma(image, clean)


def similarity(metric: Metric, image: Tensor, clean: Tensor) -> float:
    """SSIM on the same pixels and channels as :func:`score`. Small images have none, see :func:`has_similarity`."""
    if metric == "luma":
        border = images.SUPER_RESOLUTION_BORDER
        image, clean = (images.luma(images.inside(picture, border)) for picture in (image, clean))
    return images.ssim(image, clean)


def has_similarity(task: Task, shape: Sequence[int]) -> bool:
    """Whether images of ``shape`` (..., H, W) are large enough for the window of SSIM."""
    border = images.SUPER_RESOLUTION_BORDER if task.defaults.metric == "luma" else 0
    return min(shape[-2:]) - 2 * border >= images.SSIM_WINDOW


def _image_shape(where: str, observed: Tensor) -> tuple[int, ...]:
    if observed.dim() not in (3, 4) or observed.numel() == 0:
        raise InputError(f"{where}: expected (C, H, W) or (B, C, H, W), got {tuple(observed.shape)}")
    return tuple(observed.shape)


def _check_image(where: str, image: Tensor) -> None:
    """Integers would be cut to whole numbers, most of them to 0."""
    if not image.is_floating_point() or image.dim() < 3 or image.numel() == 0:
        raise InputError(
            f"{where}: an image is a float tensor (..., C, H, W) in [0, 1], got {image.dtype} {tuple(image.shape)}"
        )


def _check_mask(mask: Tensor) -> Tensor:
    """(H, W) or (C, H, W) of zeros and ones -> float32 (1 or C, H, W)."""
    if mask.dim() not in (2, 3) or mask.numel() == 0:
        raise InputError(f"inpaint: a mask is (H, W) or (C, H, W), got {tuple(mask.shape)}")
    numbers = mask.detach().cpu().float().clone()  # the caller may write to his
    if not bool(((numbers == 0) | (numbers == 1)).all()):
        raise InputError("inpaint: a mask holds only 0 (unknown) and 1 (known); threshold it first")
    if not bool(numbers.any()):
        raise InputError("inpaint: the mask knows no pixel; 1 or white marks the known ones")
    return numbers if numbers.dim() == 3 else numbers.unsqueeze(0)


@functools.lru_cache(maxsize=8)
def _draw_mask(shape: tuple[int, ...], keep: float, per_channel: bool, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "inpaint/mask"))
    drawn = shape if per_channel else (1, *shape[1:])
    mask = torch.rand(drawn, generator=generator) < keep
    return mask.float()


@functools.lru_cache(maxsize=32)
def _shrink(size: int, *, factor: int, lobes: int, edge: Literal["repeat", "renormalise"]) -> Tensor:
    """Matrix (size / factor, size) float32 of a Lanczos downsampling along one axis.

    Output pixel i lies between inputs, at factor (i + 1/2) - 1/2 ("phase 0.5"), and takes ``2 lobes factor`` taps.
    Taps beyond the picture take its edge pixel (repeat) or are dropped and the rest rescaled (renormalise, as Pillow).
    """
    taps = 2 * lobes * factor
    offsets = (torch.arange(taps, dtype=torch.float64) + 0.5) / factor - lobes
    kernel = torch.sinc(offsets) * torch.sinc(offsets / lobes)
    kernel /= kernel.sum()
    matrix = torch.zeros(size // factor, size, dtype=torch.float64)
    for i in range(size // factor):
        positions = torch.arange(taps) + i * factor + factor // 2 - lobes * factor
        if edge == "repeat":
            matrix[i].index_add_(0, positions.clamp(0, size - 1), kernel)
        else:
            inside = (positions >= 0) & (positions < size)
            matrix[i, positions[inside]] = kernel[inside] / kernel[inside].sum()
    return matrix.float()


def _along_both_sides(image: Tensor, matrix_for: Callable[[int], Tensor]) -> Tensor:
    """Apply (h, H) and (w, W) matrices to the rows and columns of (..., H, W)."""
    rows, columns = (matrix_for(size).to(image) for size in image.shape[-2:])
    return rows @ image @ columns.T
