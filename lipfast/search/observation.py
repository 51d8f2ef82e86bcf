"""The pictures of a search: read, checked, degraded, and named by what is in them."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipfast import images, tasks
from lipfast.config import derive_seed
from lipfast.errors import InputError

Picture = str | os.PathLike[str] | Tensor | tuple[str, Tensor]


@dataclass(frozen=True)
class Observation:
    """What a search fits and what it is judged by.

    Attributes:
        observed: the measurement, with a leading B for several pictures that keep their own output.
        clean: the clean picture(s) (C, H, W) or (B, C, H, W); None where nobody has them.
        sources: for each picture its name, shape and the SHA-256 of its values.
    """

    observed: Tensor
    clean: Tensor | None
    sources: list[dict[str, Any]]


def observe(
    pictures: Sequence[Picture], task: tasks.Task, *, multiple: int, several: str, seed: int, degraded: bool
) -> Observation:
    """Read pictures and degrade them.

    Args:
        pictures: files, tensors (C, H, W) in [0, 1], or (name, tensor); grey ones become RGB.
        task: degrades each; two pictures never get the same noise.
        multiple: sides of clean pictures are centre-cropped to a multiple of this many px.
        several: "each" stacks the measurements; "mean" averages them, which has the gradient of the authors' sum of
            losses against one output.
        seed: draws the degradation.
        degraded: the pictures are measurements already; nothing is cropped or drawn, and nothing is known to be clean.

    Raises:
        InputError: no picture, one that cannot be read, is too small, or has another size than the first.
    """
    if not pictures:
        raise InputError("search: no picture was given")
    named = [_load(picture, position) for position, picture in enumerate(pictures)]
    sources = [{"name": name, "shape": list(image.shape), "sha256": digest(image)} for name, image in named]
    if not degraded:
        named = [(name, _crop(name, image, multiple)) for name, image in named]
    _check_one_size(named)
    values = [image for _, image in named]
    if degraded:
        return Observation(_combine(values, several), None, sources)
    measured = [
        task.degrade(image, torch.Generator().manual_seed(derive_seed(seed, f"search/degrade/{position}")))
        for position, image in enumerate(values)
    ]
    return Observation(_combine(measured, several), _combine(values, several), sources)


def _load(picture: Picture, position: int) -> tuple[str, Tensor]:
    """Name and image (3, H, W)."""
    if isinstance(picture, Tensor):
        picture = (f"picture {position}", picture)
    if isinstance(picture, tuple):
        name, image = picture[0], images.check_scale(picture[1], picture[0])
    else:
        name, image = Path(picture).name, images.read(picture)
    return printable(name), image.expand(3, -1, -1).contiguous()


def printable(name: str) -> str:
    """A name for tables, tickets and titles: line breaks, and bytes that are no UTF-8, become escapes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def _crop(name: str, image: Tensor, multiple: int) -> Tensor:
    height, width = image.shape[-2:]
    if min(height, width) < multiple:
        raise InputError(
            f"{name}: {height} x {width} px is smaller than the network's stride of {multiple} px; use a larger picture"
        )
    return images.crop_to_multiple(image, multiple)


def _check_one_size(named: Sequence[tuple[str, Tensor]]) -> None:
    first = named[0]
    for name, image in named[1:]:
        if image.shape != first[1].shape:
            raise InputError(
                f"{name}: is searched as {tuple(image.shape)} but {first[0]} as {tuple(first[1].shape)}; pictures "
                "searched together need one size: give --size"
            )


def _combine(values: Sequence[Tensor], several: str) -> Tensor:
    if len(values) == 1:
        return values[0]
    stacked = torch.stack(list(values))
    return stacked.mean(0) if several == "mean" else stacked


def digest(values: Tensor) -> str:
    """SHA-256 of a picture's or a measurement's values."""
    return hashlib.sha256(values.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
