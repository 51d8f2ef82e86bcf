"""Reading, writing, cropping and comparing images.

Everywhere in lipfast an image is a float32 tensor (C, H, W) with values in [0, 1], C = 1 (grey) or 3 (RGB).
Files may be PNG, JPEG or TIFF with 8 or 16 bits a channel. Pillow reads and writes all 8-bit files; imagecodecs and
tifffile those with 16 bits, because Pillow silently drops the low byte of 16-bit RGB.
"""

import os
import re
import secrets
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from lipfast.errors import InputError

# File signatures; the file's content decides, not its name.
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH = 24  # where its bits a channel stand: signature 8, length 4, "IHDR" 4, width 4, height 4
_JPEG = b"\xff\xd8\xff"
_JPEG_IN_TIFF = (6, 7, 33007, 34892)  # compressions whose decoder turns luma and chroma into RGB
_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")  # classic and BigTIFF, either byte order

_IN_MEMORY = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")  # what Pillow calls the file

_SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".tif": "tiff", ".tiff": "tiff"}
_JPEG_QUALITY = 95

# ITU-R BT.601 luma with its studio swing, in 1/255: Y = (65.481 R + 128.553 G + 24.966 B + 16) / 255.
_LUMA_WEIGHTS = (65.481, 128.553, 24.966)
_LUMA_OFFSET = 16.0

SUPER_RESOLUTION_BORDER = 4  # px cut from each side before a super-resolution PSNR
SSIM_WINDOW = 11  # px; smaller images have no SSIM


def read(path: str | os.PathLike[str]) -> Tensor:
    """Read a PNG, JPEG or TIFF file.

    An alpha channel is laid over white, the camera's orientation tag is obeyed, and a PNG's palette or a JPEG's CMYK
    becomes RGB; TIFF files in these two are refused, and those of 2, 4, 10 or 12 bits, in YCbCr without JPEG or of
    several pages.

    Args:
        path: the file. Its content decides the format, not its name.

    Returns:
        (C, H, W) float32 in [0, 1], C = 1 for grey files and 3 otherwise.

    Raises:
        InputError: the file is missing, unreadable, damaged, empty or of another kind.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror or problem})") from None
    if not content:
        raise InputError(f"{path}: the file is empty")
    decode = _decoder(content)
    if decode is None:
        raise InputError(f"{path}: not a PNG, JPEG or TIFF file; convert it to one of these")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a decoder's remark about odd metadata is not the user's business
            pixels = decode(content)
    except InputError as problem:
        raise InputError(f"{path}: {problem}") from None
    except Exception as problem:  # every decoder has its own kinds of error
        reason = _IN_MEMORY.sub("", str(problem))
        raise InputError(f"{path}: damaged or unsupported image ({reason})") from None
    return check(_to_tensor(pixels, path), str(path))


def write(path: str | os.PathLike[str], image: Tensor, depth: int = 8) -> None:
    """Write an image to a temporary name beside ``path`` and rename it, so a half-written file is never seen.

    Args:
        path: file name; its suffix (.png, .jpg, .jpeg, .tif, .tiff) decides the format.
        image: (C, H, W) float, C = 1 or 3; values outside [0, 1] are clipped.
        depth: bits a channel, 8 or 16 (JPEG has only 8).

    Raises:
        InputError: unknown suffix, a depth the format does not have, NaN, a wrong shape, or a folder that cannot be
            written.
    """
    path = Path(path)
    form = check_target(path, depth)
    scale, kind = (255, numpy.uint8) if depth == 8 else (65535, numpy.uint16)
    unit = check(image, str(path)).detach().cpu().double().clamp(0, 1)
    pixels = (unit * scale).round().permute(1, 2, 0).numpy().astype(kind)  # (H, W, C)
    write_atomically(path, _encode(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels, form))


def check_target(path: str | os.PathLike[str], depth: int) -> str:
    """Whether ``write`` could write there, asked before hours of work: returns the format.

    Raises:
        InputError: unknown suffix, a depth the format does not have, or as :func:`check_writable`.
    """
    path = Path(path)
    form = _SUFFIXES.get(path.suffix.lower())
    if form is None:
        raise InputError(f"{path}: cannot tell the format; use one of {', '.join(_SUFFIXES)}")
    if depth not in (8, 16):
        raise InputError(f"{path}: depth must be 8 or 16 bits, got {depth}")
    if form == "jpeg" and depth == 16:
        raise InputError(f"{path}: JPEG has 8 bits a channel; write PNG or TIFF for 16")
    check_writable(path)
    return form


def check_writable(path: str | os.PathLike[str]) -> None:
    """Whether ``write_atomically`` could write there, asked before hours of work.

    Raises:
        InputError: the folder is missing or not writable, or ``path`` is a folder itself.
    """
    path = Path(path)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        reason = "not writable" if path.parent.is_dir() else "no such folder"
        raise InputError(f"{path}: cannot be written ({path.parent}: {reason}); make it or choose another")
    if path.is_dir():
        raise InputError(f"{path}: cannot be written (it is a folder); choose another name")


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to a temporary name in the same folder, flush it to the disk and rename it to ``path``.

    Raises:
        InputError: the folder is missing or not writable, or the disk is full. ``path`` is then as it was.
    """
    path = Path(path)
    temporary = path.parent / f".{secrets.token_hex(8)}.part"  # short, so that every name that can be had works
    try:
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as problem:
        raise InputError(f"{path}: cannot be written ({problem.strerror or problem})") from None


def check(image: Tensor, where: str, *, channels: tuple[int, ...] = (1, 3)) -> Tensor:
    """Return ``image`` as float32, without its history, if it is a proper image, else raise.

    Args:
        image: (C, H, W) floating point tensor.
        where: what the error message calls it, for example its file name.
        channels: the channel counts that are accepted.

    Raises:
        InputError: wrong type, wrong number of dimensions or channels, no pixels, NaN or infinite values.
    """
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"{where}: an image is a float tensor (C, H, W) in [0, 1], got {kind}")
    shape = tuple(image.shape)
    if image.dim() != 3 or shape[0] not in channels:
        counts = " or ".join(map(str, channels))
        raise InputError(f"{where}: an image has the shape (C, H, W) with C = {counts}, got {shape}")
    if image.numel() == 0:
        raise InputError(f"{where}: the image is empty, its shape is {shape}")
    if not bool(torch.isfinite(image).all()):
        bad = int((~torch.isfinite(image)).sum())
        raise InputError(f"{where}: {bad} of {image.numel()} values are NaN or infinite")
    return image.detach().to(torch.float32)


def check_scale(image: Tensor, where: str) -> Tensor:
    """As :func:`check`, and values on the scale [0, 1], which noise may leave by as much on both sides.

    Raises:
        InputError: as there, or values of another scale.
    """
    image = check(image, where)
    check_range(image, where)
    return image


def check_range(image: Tensor, where: str) -> None:
    """Refuse values of another scale than [0, 1], in a tensor of any shape.

    Raises:
        InputError: a value below -1 or above 2.
    """
    low, high = float(image.detach().min()), float(image.detach().max())
    if low < -1 or high > 2:
        raise InputError(f"{where}: values are on the scale [0, 1], got {low:g} to {high:g}; divide grey levels by 255")


def crop_centre(image: Tensor, height: int, width: int) -> Tensor:
    """Cut (..., height, width) out of the middle of (..., H, W); an odd rest loses its last row or column.

    Raises:
        InputError: the image is smaller than the cut.
    """
    rows, columns = image.shape[-2:]
    if not (0 < height <= rows and 0 < width <= columns):
        raise InputError(f"crop_centre: cannot cut {height} x {width} px out of {rows} x {columns} px")
    top, left = (rows - height) // 2, (columns - width) // 2
    return image[..., top : top + height, left : left + width]


def crop_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Centre-crop (..., H, W) so that both sides are multiples of ``multiple`` px, as the paper does.

    Raises:
        InputError: a side is shorter than ``multiple``.
    """
    rows, columns = image.shape[-2:]
    if rows < multiple or columns < multiple:
        raise InputError(f"crop_to_multiple: {rows} x {columns} px is smaller than {multiple} px; pad it instead")
    return crop_centre(image, rows // multiple * multiple, columns // multiple * multiple)


def shrink_to_square(image: Tensor, size: int) -> Tensor:
    """Scale (C, H, W) so that its shorter side has ``size`` px (bicubic, antialiased) and cut out the middle square.

    Raises:
        InputError: the image is smaller than that (enlarging would invent pixels), or no proper image.
    """
    image = check(image, "shrink_to_square")
    rows, columns = image.shape[-2:]
    if size < 1 or min(rows, columns) < size:
        raise InputError(
            f"shrink_to_square: cannot make {size} x {size} px of {rows} x {columns} px; use a smaller size"
        )
    scaled = [max(size, round(side * size / min(rows, columns))) for side in (rows, columns)]
    shrunk = functional.interpolate(image.unsqueeze(0), size=scaled, mode="bicubic", antialias=True)[0].clamp(0, 1)
    return crop_centre(shrunk, size, size)


def pad_to_multiple(image: Tensor, multiple: int, minimum: int = 1) -> Tensor:
    """Mirror the borders of (..., H, W) until both sides are multiples of ``multiple`` px and at least ``minimum``.

    The picture stays in the middle: ``crop_centre(padded, H, W)`` is the way back. Mirroring repeats for images
    smaller than their padding.
    """
    rows, columns = image.shape[-2:]
    for axis, size in ((-2, rows), (-1, columns)):
        target = -(-max(size, minimum) // multiple) * multiple
        image = image.index_select(axis, _mirrored(size, target).to(image.device))
    return image


def luma(image: Tensor) -> Tensor:
    """BT.601 luma of (..., 3, H, W) as (..., 1, H, W), in [16/255, 235/255]; a grey image gets the same swing."""
    if image.shape[-3] == 1:
        return (image * sum(_LUMA_WEIGHTS) + _LUMA_OFFSET) / 255
    weights = torch.tensor(_LUMA_WEIGHTS, dtype=image.dtype, device=image.device)
    return (torch.einsum("...chw,c->...hw", image, weights).unsqueeze(-3) + _LUMA_OFFSET) / 255


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all channels and pixels, peak 1; infinite for equal images.

    Args:
        image, reference: tensors of the same shape (..., C, H, W), values in [0, 1].

    Raises:
        InputError: the shapes differ, or one is no float tensor.
    """
    _check_pair("psnr", image, reference)
    error = float((image.detach().double() - reference.detach().double()).square().mean())
    return float("inf") if error == 0 else float(-10 * numpy.log10(error))


def psnr_luma(image: Tensor, reference: Tensor, border: int = SUPER_RESOLUTION_BORDER) -> float:
    """PSNR in dB of the BT.601 luma with ``border`` px cut from each side: the super-resolution metric.

    Raises:
        InputError: the shapes differ, or nothing is left inside the border.
    """
    _check_pair("psnr_luma", image, reference)
    return psnr(luma(inside(image, border)), luma(inside(reference, border)))


def inside(image: Tensor, border: int) -> Tensor:
    """(..., H - 2 border, W - 2 border) of (..., H, W).

    Raises:
        InputError: nothing would be left.
    """
    rows, columns = image.shape[-2:]
    if min(rows, columns) <= 2 * border:
        raise InputError(
            f"inside: a border of {border} px leaves nothing of a picture of {rows} x {columns} px; use a larger one"
        )
    return crop_centre(image, rows - 2 * border, columns - 2 * border)


def ssim(image: Tensor, reference: Tensor) -> float:
    """Mean structural similarity over all channels: 11 px Gaussian window (sigma 1.5), peak 1, no padding.

    Args:
        image, reference: tensors of the same shape (..., C, H, W), both sides at least 11 px.

    Raises:
        InputError: the shapes differ, or a side is shorter than the window.

    Source: Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 13 (2004), with its K1 = 0.01 and K2 = 0.03.
    """
    _check_pair("ssim", image, reference)
    rows, columns = image.shape[-2:]
    window = _gaussian_window(sigma=1.5, radius=SSIM_WINDOW // 2)
    if min(rows, columns) < len(window):
        raise InputError(f"ssim: the window has {len(window)} px, the image only {rows} x {columns}")
    x = image.detach().cpu().double().reshape(-1, 1, rows, columns)
    y = reference.detach().cpu().double().reshape(-1, 1, rows, columns)
    moments = _blur(torch.cat([x, y, x * x, y * y, x * y]), window)
    mean_x, mean_y, square_x, square_y, product = moments.chunk(5)
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * (product - mean_x * mean_y) + c2)
    norm = (mean_x**2 + mean_y**2 + c1) * (square_x - mean_x**2 + square_y - mean_y**2 + c2)
    return float((likeness / norm).mean())


def _decoder(content: bytes) -> Any:
    if content.startswith(_PNG):
        return _decode_png16 if content[_PNG_DEPTH : _PNG_DEPTH + 1] == b"\x10" else _decode_with_pillow
    if content.startswith(_JPEG):
        return _decode_with_pillow
    if content.startswith(_TIFF):
        return _decode_tiff
    return None


def _decode_with_pillow(content: bytes) -> Any:
    from PIL import Image, ImageOps

    with Image.open(BytesIO(content), formats=["PNG", "JPEG"]) as file:
        picture = ImageOps.exif_transpose(file)
        if picture.mode in ("1", "L") and "transparency" in picture.info:
            highest = 2 ** content[_PNG_DEPTH] - 1
            if picture.info["transparency"] <= highest:  # Pillow scales the pixels to 8 bits, but not this level
                picture.info["transparency"] = picture.info["transparency"] * 255 // highest
            picture = picture.convert("LA")
        elif picture.mode == "P" or "transparency" in picture.info:
            picture = picture.convert("RGBA")
        elif picture.mode not in ("L", "LA", "RGB", "RGBA"):
            picture = picture.convert("L" if picture.mode == "1" else "RGB")
        return numpy.asarray(picture)


def _decode_png16(content: bytes) -> Any:
    import imagecodecs
    from PIL import Image

    with Image.open(BytesIO(content), formats=["PNG"]) as file:  # reads the header alone
        orientation = file.getexif().get(_ORIENTATION, 1)
    return _turned(imagecodecs.png_decode(content), orientation)


def _decode_tiff(content: bytes) -> Any:
    import tifffile

    with tifffile.TiffFile(BytesIO(content)) as file:
        pages: list[Any] = list(file.pages)
        page = pages[0]
        others = [other for other in pages[1:] if not other.is_reduced]  # a thumbnail is no picture of its own
        if others:
            raise InputError(f"TIFF of {1 + len(others)} pages; save the one that is meant alone")
        pixels = page.asarray()
        kind = page.photometric
        planar = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and pixels.ndim == 3
        extra = tuple(page.extrasamples)
        orientation = page.tags.valueof(_ORIENTATION, default=1)
    made_rgb = page.compression in _JPEG_IN_TIFF and not planar and not extra  # by the decoder
    if kind not in (
        tifffile.PHOTOMETRIC.MINISBLACK,
        tifffile.PHOTOMETRIC.MINISWHITE,
        tifffile.PHOTOMETRIC.RGB,
    ) and not (kind == tifffile.PHOTOMETRIC.YCBCR and made_rgb):
        raise InputError(f"TIFF colour space {getattr(kind, 'name', kind)} is not supported; convert it to RGB or grey")
    if pixels.dtype in (numpy.uint8, numpy.uint16) and page.bitspersample not in (8, 16):
        raise InputError(f"TIFF of {page.bitspersample} bits a channel is not supported; use 8 or 16 bits a channel")
    if planar:
        pixels = numpy.moveaxis(pixels, 0, -1)
    if pixels.dtype == numpy.bool_:
        pixels = pixels.astype(numpy.uint8) * 255
    if kind == tifffile.PHOTOMETRIC.MINISWHITE and pixels.dtype in (numpy.uint8, numpy.uint16):
        pixels = _inverted(pixels, len(extra))
    premultiplied = extra == (tifffile.EXTRASAMPLE.ASSOCALPHA,)
    return _turned(_over_white(pixels) if premultiplied else pixels, orientation)


def _inverted(pixels: Any, extra: int) -> Any:
    """Integers (H, W) or (H, W, C) with black and white exchanged, but for the last ``extra`` channels: alpha."""
    inverted = numpy.iinfo(pixels.dtype).max - pixels
    if extra:
        inverted[..., -extra:] = pixels[..., -extra:]
    return inverted


def _over_white(pixels: Any) -> Any:
    """(H, W, C + 1) integers whose colours were multiplied by their alpha, the last channel -> (H, W, C) over white."""
    colour, alpha = pixels[..., :-1], pixels[..., -1:]
    return numpy.minimum(colour, alpha) + (numpy.iinfo(pixels.dtype).max - alpha)


_ORIENTATION = 274  # the tag of EXIF and TIFF
_TURNS: dict[int, Callable[[Any], Any]] = {  # by the tag's value; without a turn: 1
    2: numpy.fliplr,
    3: lambda pixels: numpy.rot90(pixels, 2),
    4: numpy.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: numpy.rot90(pixels, -1),
    7: lambda pixels: numpy.rot90(pixels, 2).swapaxes(0, 1),
    8: numpy.rot90,
}


def _turned(pixels: Any, orientation: int) -> Any:
    """(H, W) or (H, W, C) as the photographer saw it."""
    return _TURNS[orientation](pixels) if orientation in _TURNS else pixels


def _to_tensor(pixels: Any, path: Path) -> Tensor:
    """(H, W) or (H, W, 1..4) integers of 8 or 16 bits -> (1 or 3, H, W) float32 in [0, 1]."""
    if pixels.dtype not in (numpy.uint8, numpy.uint16):
        raise InputError(f"{path}: {pixels.dtype} pixels are not supported; use 8 or 16 bits a channel")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4:
        raise InputError(f"{path}: expected one grey or RGB picture, got an array of shape {pixels.shape}")
    peak = numpy.float32(numpy.iinfo(pixels.dtype).max)
    unit = numpy.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(numpy.float32) / peak  # (C, H, W)
    if unit.shape[0] in (2, 4):
        colour, alpha = unit[:-1], unit[-1:]
        unit = colour if alpha.min(initial=1) == 1 else colour * alpha + (1 - alpha)
    return torch.from_numpy(numpy.ascontiguousarray(unit))


def _encode(pixels: Any, form: str) -> bytes:
    """(H, W) or (H, W, 3) uint8 or uint16 -> the bytes of a file."""
    buffer = BytesIO()
    if form == "tiff":
        import tifffile

        tifffile.imwrite(buffer, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack")
    elif form == "png" and pixels.dtype == numpy.uint16:
        import imagecodecs

        return bytes(imagecodecs.png_encode(numpy.ascontiguousarray(pixels)))
    else:
        from PIL import Image

        options = {"quality": _JPEG_QUALITY, "subsampling": 0} if form == "jpeg" else {}
        Image.fromarray(pixels).save(buffer, format=form, **options)
    return buffer.getvalue()


def _mirrored(size: int, target: int) -> Tensor:
    """Indices (target,) into an axis of ``size`` that keep it in the middle and mirror it without its edge."""
    positions = torch.arange(target) - (target - size) // 2
    if size == 1:
        return torch.zeros_like(positions)
    period = 2 * (size - 1)
    folded = positions.remainder(period)
    return torch.minimum(folded, period - folded)


def _check_pair(where: str, image: Tensor, reference: Tensor) -> None:
    for one in (image, reference):
        if not isinstance(one, Tensor) or not one.is_floating_point():  # of integers the peak would be wrong
            kind = one.dtype if isinstance(one, Tensor) else type(one).__name__
            raise InputError(f"{where}: images are float tensors (..., C, H, W) in [0, 1], got {kind}")
    if image.shape != reference.shape or image.dim() < 3 or image.numel() == 0:
        raise InputError(
            f"{where}: two images of one shape (..., C, H, W) are compared, "
            f"got {tuple(image.shape)} and {tuple(reference.shape)}"
        )


def _gaussian_window(sigma: float, radius: int) -> Tensor:
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def _blur(maps: Tensor, window: Tensor) -> Tensor:
    """Separable valid convolution of (N, 1, H, W) with ``window`` along both axes."""
    maps = functional.conv2d(maps, window.view(1, 1, -1, 1))
    return functional.conv2d(maps, window.view(1, 1, 1, -1))
