"""Pictures in and out of files, and the figures that compare them."""

import os
import struct
import zlib

import imagecodecs
import numpy
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lipfast import images
from lipfast.errors import InputError


def picture(channels: int = 3, height: int = 24, width: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("suffix", "depth"), [(".png", 8), (".png", 16), (".tif", 8), (".tiff", 16)])
def test_lossless_formats_keep_every_level(tmp_path, channels, suffix, depth):
    levels = 2**depth - 1
    image = (picture(channels) * levels).round() / levels
    images.write(tmp_path / f"a{suffix}", image, depth=depth)
    back = images.read(tmp_path / f"a{suffix}")
    assert back.dtype == torch.float32
    assert torch.equal((back.double() * levels).round(), (image.double() * levels).round())
    assert float((back - image).abs().max()) < 1e-7


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_close(tmp_path, channels):
    smooth = torch.linspace(0, 1, 32).expand(channels, 32, 32).contiguous()
    images.write(tmp_path / "a.jpg", smooth)
    back = images.read(tmp_path / "a.jpg")
    assert back.shape == smooth.shape
    assert images.psnr(back, smooth) > 40


def test_low_byte_of_16_bit_colour_survives_a_foreign_writer(tmp_path):
    pixels = numpy.arange(4 * 5 * 3, dtype=numpy.uint16).reshape(4, 5, 3) + 256  # differences below 8 bits
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    assert numpy.array_equal((images.read(tmp_path / "a.png") * 65535).round().numpy().transpose(1, 2, 0), pixels)


@pytest.mark.parametrize("compression", [None, "lzw", "deflate"])
@pytest.mark.parametrize("kind", [numpy.uint8, numpy.uint16])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_variants(tmp_path, compression, kind, planar):
    pixels = (picture().numpy() * numpy.iinfo(kind).max).astype(kind)  # (3, H, W)
    stored = pixels if planar == "separate" else pixels.transpose(1, 2, 0)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar, compression=compression)
    assert numpy.array_equal((images.read(tmp_path / "a.tif") * numpy.iinfo(kind).max).round().numpy(), pixels)


def test_white_is_zero_tiff_is_inverted(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", numpy.zeros((3, 4), numpy.uint8), photometric="miniswhite")
    assert torch.equal(images.read(tmp_path / "a.tif"), torch.ones(1, 3, 4))


@pytest.mark.parametrize("kind", [numpy.uint8, numpy.uint16])
def test_white_is_zero_tiff_keeps_its_alpha(tmp_path, kind):
    peak = numpy.iinfo(kind).max
    pixels = numpy.array([[[0, peak], [peak, peak], [peak, 0]]], kind)  # white, black, black but transparent
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite", extrasamples=["UNASSALPHA"])
    assert images.read(tmp_path / "a.tif").flatten().tolist() == [1, 0, 1]


@pytest.mark.parametrize("bits", [2, 4, 10, 12])
def test_tiff_of_other_depths_is_refused(tmp_path, bits):
    kind = numpy.uint8 if bits < 8 else numpy.uint16
    pixels = numpy.full((4, 16), 2**bits - 1, kind)  # white
    tifffile.imwrite(tmp_path / "a.tif", pixels, bitspersample=bits, photometric="minisblack")
    with pytest.raises(InputError, match=rf"a\.tif: TIFF of {bits} bits a channel is not supported; use 8 or 16"):
        images.read(tmp_path / "a.tif")


def test_bilevel_tiff_is_black_and_white(tmp_path):
    bits = numpy.array([[True, False] * 8])
    tifffile.imwrite(tmp_path / "a.tif", bits, photometric="minisblack")
    assert images.read(tmp_path / "a.tif").flatten().tolist() == [1, 0] * 8


def test_luma_and_chroma_in_tiff_are_colours_only_where_the_decoder_makes_them_so(tmp_path):
    red = Image.new("RGB", (16, 16), "red").convert("YCbCr")
    tifffile.imwrite(tmp_path / "jpeg.tif", numpy.asarray(red), photometric="ycbcr", compression="jpeg")
    assert images.read(tmp_path / "jpeg.tif")[:, 8, 8].tolist() == pytest.approx([1, 0, 0], abs=0.02)  # JPEG's loss
    red.save(tmp_path / "plain.tif")
    with pytest.raises(InputError, match=r"plain\.tif: TIFF colour space YCBCR is not supported"):
        images.read(tmp_path / "plain.tif")


def test_palette_bilevel_and_cmyk_become_plain(tmp_path):
    colour = Image.fromarray((picture().permute(1, 2, 0).numpy() * 255).astype(numpy.uint8))
    colour.convert("P").save(tmp_path / "p.png")
    colour.convert("1").save(tmp_path / "b.png")
    colour.convert("CMYK").save(tmp_path / "c.jpg")
    palette, bilevel, cmyk = (images.read(tmp_path / name) for name in ("p.png", "b.png", "c.jpg"))
    assert palette.shape == cmyk.shape == (3, 24, 17)
    assert bilevel.shape == (1, 24, 17)
    assert set(bilevel.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("depth", [8, 16])
def test_alpha_is_laid_over_white(tmp_path, depth):
    peak = 2**depth - 1
    pixels = numpy.zeros((2, 2, 4), numpy.uint8 if depth == 8 else numpy.uint16)
    pixels[0, :, 3] = peak  # black and opaque above, black and transparent below
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    assert torch.equal(images.read(tmp_path / "a.png")[:, :, 0], torch.tensor([[0.0, 1.0]]).expand(3, 2))


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("kind", [numpy.uint8, numpy.uint16])
def test_colours_already_multiplied_by_alpha_are_not_multiplied_again(tmp_path, kind, planar):
    peak = numpy.iinfo(kind).max
    pixel = [peak // 3, 0, 0, peak // 3]  # red, one third opaque
    stored = numpy.array([[pixel]], kind) if planar == "contig" else numpy.array(pixel, kind).reshape(4, 1, 1)
    options = {"photometric": "rgb", "planarconfig": planar, "extrasamples": ["ASSOCALPHA"]}
    tifffile.imwrite(tmp_path / "a.tif", stored, **options)
    assert images.read(tmp_path / "a.tif").flatten().tolist() == pytest.approx([1, 2 / 3, 2 / 3], abs=1e-7)


def test_transparent_palette_colour_counts_as_alpha(tmp_path):
    drawn = Image.new("P", (2, 1))
    drawn.putpalette([0, 0, 0, 255, 0, 0])
    drawn.putpixel((1, 0), 1)
    drawn.save(tmp_path / "a.png", transparency=0)
    red, blank = [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    assert images.read(tmp_path / "a.png")[:, 0].T.tolist() == [blank, red]


def grey_png(depth: int, transparent: int) -> bytes:
    """One row of eight pixels, whose levels count up from 0 and start again, one level of which is transparent."""
    bits = "".join(f"{level % 2**depth:0{depth}b}" for level in range(8))
    row = b"\0" + int(bits, 2).to_bytes(depth, "big")  # eight pixels are as many bytes as a pixel has bits

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 1, depth, 0, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"tRNS", struct.pack(">H", transparent)),
        (b"IDAT", zlib.compress(row)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


@pytest.mark.parametrize("transparent", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_png_with_a_transparent_level_stays_grey(tmp_path, depth, transparent):
    (tmp_path / "a.png").write_bytes(grey_png(depth, transparent))
    levels = [level % 2**depth for level in range(8)]
    wanted = [1.0 if level == transparent else level / (2**depth - 1) for level in levels]
    back = images.read(tmp_path / "a.png")
    assert back.shape == (1, 1, 8)
    assert back.flatten().tolist() == pytest.approx(wanted, abs=1e-7)


def test_orientation_tag_is_obeyed(tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 6  # quarter turn
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=tag)
    assert images.read(tmp_path / "a.jpg").shape == (3, 8, 4)


@pytest.mark.parametrize("value", range(1, 9))
def test_every_orientation_is_obeyed_in_every_format(tmp_path, value):
    """Against Pillow, which turns 8-bit PNG files."""
    pixels = (picture(height=4, width=5).permute(1, 2, 0) * 255).byte().numpy()
    tag = Image.Exif()
    tag[0x0112] = value
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=tag)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extratags=[(0x0112, "H", 1, value, True)])
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"eXIf") - 4
    tagged = content[start : start + 12 + int.from_bytes(content[start : start + 4], "big")]
    deep = bytes(imagecodecs.png_encode(numpy.ascontiguousarray(pixels, numpy.uint16) * 257))
    (tmp_path / "deep.png").write_bytes(deep[:33] + tagged + deep[33:])  # behind the header
    expected = images.read(tmp_path / "a.png")
    assert torch.equal(images.read(tmp_path / "a.tif"), expected)
    assert torch.equal(images.read(tmp_path / "deep.png"), expected)


@pytest.mark.parametrize(("mode", "space"), [("P", "PALETTE"), ("CMYK", "SEPARATED")])
def test_palette_and_cmyk_are_refused_in_tiff(tmp_path, mode, space):
    Image.new(mode, (3, 3)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=f"TIFF colour space {space} is not supported"):
        images.read(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("depth", [8, 16])
def test_truncated_file_is_refused(tmp_path, suffix, depth):
    path = tmp_path / f"a{suffix}"
    images.write(path, picture(height=64, width=64), depth=8 if suffix == ".jpg" else depth)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"a\.\w+: damaged"):
        images.read(path)


@pytest.mark.parametrize(("name", "depth", "left"), [("a.png", 8, 30), ("a.png", 16, 30), ("a.jpg", 8, 3)])
def test_a_truncated_header_is_told_alike_each_time(tmp_path, name, depth, left):
    images.write(tmp_path / name, picture(), depth=depth)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:left])
    with pytest.raises(InputError, match=rf"{name}: damaged or unsupported image \(cannot identify image file\)"):
        images.read(tmp_path / name)


def test_tiff_of_several_pages_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", numpy.zeros((3, 16, 16), numpy.uint8), photometric="minisblack")
    with pytest.raises(InputError, match=r"a\.tif: TIFF of 3 pages; save the one that is meant alone"):
        images.read(tmp_path / "a.tif")


def test_a_thumbnail_is_no_page_of_a_tiff(tmp_path):
    pixels = (picture(1) * 255).byte().numpy()[0]
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(pixels, photometric="minisblack")
        file.write(pixels[::2, ::2], photometric="minisblack", subfiletype=1)
    assert images.read(tmp_path / "a.tif").shape == (1, 24, 17)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the file is empty"), (b"GIF89a....", "not a PNG, JPEG or TIFF"), (b"\x89PNG\r\n\x1a\nxx", "damaged")],
)
def test_bad_content_names_the_file(tmp_path, content, message):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.png: .*{message}"):
        images.read(tmp_path / "x.png")


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.png: no such file"):
        images.read(tmp_path / "none.png")
    with pytest.raises(InputError, match="cannot be read"):
        images.read(tmp_path)


def test_float_tiff_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "f.tif", numpy.zeros((4, 4), numpy.float32))
    with pytest.raises(InputError, match=r"f\.tif: float32 pixels are not supported"):
        images.read(tmp_path / "f.tif")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 4, 4), float("nan")), "48 of 48 values are NaN"),
        (torch.zeros(3, 0, 4), "empty"),
        (torch.zeros(2, 4, 4), r"C = 1 or 3, got \(2, 4, 4\)"),
        (torch.zeros(4, 4), r"got \(4, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"got torch\.uint8"),
        ([[0.0]], "got list"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, image, message):
    with pytest.raises(InputError, match=message):
        images.write(tmp_path / "a.png", image)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "depth", "message"),
    [("a.bmp", 8, "cannot tell the format"), ("a.jpg", 16, "JPEG has 8 bits"), ("a.png", 12, "got 12")],
)
def test_impossible_formats_are_refused(tmp_path, name, depth, message):
    with pytest.raises(InputError, match=message):
        images.write(tmp_path / name, picture(), depth=depth)


def test_values_outside_are_clipped(tmp_path):
    images.write(tmp_path / "a.png", torch.tensor([[[-1.0, 2.0]]]))
    assert images.read(tmp_path / "a.png").flatten().tolist() == [0.0, 1.0]


def test_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    images.write(tmp_path / "a.png", picture(seed=1))
    before = (tmp_path / "a.png").read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match=r"a\.png: cannot be written \(No space left on device\)"):
        images.write(tmp_path / "a.png", picture(seed=2))
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path):
    """The new content arrives by renaming: who has the old file open keeps it whole."""
    images.write(tmp_path / "a.png", picture(seed=1))
    before = (tmp_path / "a.png").read_bytes()
    with (tmp_path / "a.png").open("rb") as reader:
        images.write(tmp_path / "a.png", picture(seed=2))
        assert reader.read() == before
    assert (tmp_path / "a.png").read_bytes() != before


def test_the_longest_name_can_be_written(tmp_path):
    name = "x" * 251 + ".png"
    images.write(tmp_path / name, picture())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_is_no_file_to_write(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match="it is a folder"):
        images.check_target(tmp_path / "a.png", 8)


def test_values_of_another_scale_are_named():
    noisy = picture() + 0.5
    assert torch.equal(images.check_scale(noisy, "here"), noisy)
    with pytest.raises(
        InputError, match=r"here: values are on the scale \[0, 1\], got -1 to 255; divide grey levels by 255"
    ):
        images.check_scale(torch.tensor([[[-1.0, 255.0]]]), "here")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere/a\.png: cannot be written"):
        images.write(tmp_path / "nowhere" / "a.png", picture())


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 8, 32]), st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_padding_is_undone_by_cropping(height, width, multiple, minimum):
    image = picture(1, height, width)
    padded = images.pad_to_multiple(image, multiple, minimum)
    assert all(side % multiple == 0 and side >= minimum for side in padded.shape[1:])
    assert all(
        side - old < multiple or side < minimum + multiple for side, old in zip(padded.shape, image.shape, strict=True)
    )
    assert torch.equal(images.crop_centre(padded, height, width), image)


def test_padding_mirrors_without_the_edge():
    row = torch.tensor([[[0.0, 1.0, 2.0]]])
    assert images.pad_to_multiple(row, 1, 9)[0, 0].tolist() == [1, 2, 1, 0, 1, 2, 1, 0, 1]


def test_crop_to_multiple_takes_the_middle():
    image = torch.arange(37.0).expand(1, 33, 37)
    assert images.crop_to_multiple(image, 32)[0, 0].tolist() == list(range(2, 34))
    with pytest.raises(InputError, match="31 x 64 px is smaller than 32"):
        images.crop_to_multiple(torch.zeros(1, 31, 64), 32)
    with pytest.raises(InputError, match="cannot cut"):
        images.crop_centre(image, 40, 4)


def test_psnr_as_in_skimage():
    a, b = picture(seed=1), picture(seed=2)
    expected = peak_signal_noise_ratio(b.double().numpy(), a.double().numpy(), data_range=1.0)
    assert images.psnr(a, b) == pytest.approx(expected, abs=1e-9)
    assert images.psnr(a, a) == float("inf")


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_file_needs_a_name(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ask in (lambda: images.write_atomically(path, b"x"), lambda: images.check_writable(path)):
        with pytest.raises(InputError, match="cannot be written"):
            ask()
    assert not list(tmp_path.iterdir())


def test_an_images_history_is_nobodys_business():
    grown = picture().requires_grad_()
    assert not images.check_scale(grown, "here").requires_grad
    assert images.psnr(grown, picture(seed=1)) == images.psnr(picture(), picture(seed=1))


@pytest.mark.parametrize("image", [torch.zeros(3, 16, 16, dtype=torch.uint8), numpy.zeros((3, 16, 16)), None])
def test_what_is_no_float_image_is_not_judged(image):
    for measure in (images.psnr, images.psnr_luma, images.ssim):
        for pair in ((image, picture()), (picture(), image)):
            with pytest.raises(InputError, match=rf"{measure.__name__}: images are float tensors"):
                measure(*pair)
    with pytest.raises(InputError, match="shrink_to_square: an image is a float tensor"):
        images.shrink_to_square(image, 8)


def test_luma_psnr_as_in_skimage():
    a, b = picture(3, 40, 30, seed=1), picture(3, 40, 30, seed=2)
    ours = images.psnr_luma(a, b)
    luma = [rgb2ycbcr(x.permute(1, 2, 0).double().numpy())[4:-4, 4:-4, 0] / 255 for x in (a, b)]
    assert ours == pytest.approx(peak_signal_noise_ratio(*luma, data_range=1.0), abs=1e-4)


def test_grey_has_the_luma_of_equal_channels():
    grey = picture(1)
    assert torch.allclose(images.luma(grey), images.luma(grey.expand(3, -1, -1)), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(11, 11), (40, 23)])
def test_ssim_as_in_skimage(channels, size):
    a = picture(channels, *size, seed=1)
    b = (a + 0.2 * picture(channels, *size, seed=2)).clamp(0, 1)
    expected = structural_similarity(
        a.double().numpy(),
        b.double().numpy(),
        channel_axis=0,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert images.ssim(a, b) == pytest.approx(expected, abs=1e-9)
    assert images.ssim(a, a) == pytest.approx(1)


def test_figures_refuse_unequal_shapes():
    for measure in (images.psnr, images.psnr_luma, images.ssim):
        with pytest.raises(InputError, match=r"got \(3, 24, 17\) and \(3, 24, 16\)"):
            measure(picture(), picture(width=16))
    with pytest.raises(InputError, match="window has 11 px, the image only 10 x 17"):
        images.ssim(picture(height=10), picture(height=10))
    with pytest.raises(InputError, match="leaves nothing"):
        images.psnr_luma(picture(height=8), picture(height=8))
