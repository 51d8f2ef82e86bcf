"""The lane layout, against torch's own padding and slicing."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import lipfast._C as _C
from lipfast.errors import InputError
from lipfast.ops.lanes import GRID, LANES, PADDING_MODES, LaneMap

SIZES = [(1, 1), (2, 3), (4, 4), (5, 7), (8, 8), (13, 33), (16, 64), (67, 70)]  # either side of the 4 x 4 grid
BORDERS = [(0, 0), (1, 1), (2, 1), (3, 3)]  # halo, padding


pytestmark = pytest.mark.usefixtures("isa")


def allowed(mode: str, pad: int, size: tuple[int, int]) -> bool:
    most = {"reflect": min(size) - 1, "circular": min(size)}.get(mode, pad)
    return pad <= most


def pad(x: Tensor, width: int, mode: str) -> Tensor:
    return functional.pad(x, [width] * 4, mode="constant" if mode == "zeros" else mode) if width else x


def expected(x: Tensor, halo: int, mode: str, width: int, block: tuple[int, int]) -> Tensor:
    """Each lane cut out of the padded picture, which zeros surround."""
    margin = GRID * max(block) + halo
    around = functional.pad(pad(x, width, mode), [margin] * 4)
    start = margin + width
    lanes = []
    for lane in range(LANES):
        top, left = start + lane // GRID * block[0] - halo, start + lane % GRID * block[1] - halo
        lanes.append(around[:, :, top : top + block[0] + 2 * halo, left : left + block[1] + 2 * halo])
    return torch.stack(lanes, dim=-1)


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize(("halo", "width"), BORDERS)
@pytest.mark.parametrize("size", SIZES)
def test_every_lane_is_its_block_with_its_neighbours_around(size, halo, width, mode):
    if not allowed(mode, width, size):
        with pytest.raises(ValueError, match=f"padding of {width} is too large for a side"):
            LaneMap.from_tensor(torch.randn(1, 1, *size), halo, mode, width)
        return
    x = torch.randn(2, 3, *size)
    block = (-(-size[0] // GRID), -(-size[1] // GRID))
    want = expected(x, halo, mode, width, block)
    for view in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        lanes = LaneMap.from_tensor(view, halo, mode, width)
        assert torch.equal(lanes.data, want)
        assert torch.equal(lanes.to_tensor(), x)
        assert torch.equal(lanes.to_tensor(torch.channels_last), x)


@pytest.mark.parametrize("width", [4, 20, 32, 36, 44, 64, 76])  # blocks of 1, 5, 8, 9, 11, 16 and 19 columns, none dead
@pytest.mark.parametrize("channels", [3, 7, 8, 11, 16, 21])
def test_squares_of_columns_and_channels_that_overlap_at_the_end(isa, channels, width):
    x = torch.randn(2, channels, 8, width)
    for view in (x, x.to(memory_format=torch.channels_last)):
        lanes = LaneMap.from_tensor(view)
        assert torch.equal(lanes.data, expected(x, 0, "zeros", 0, (2, width // GRID)))
        assert torch.equal(lanes.to_tensor(), x)
        assert torch.equal(lanes.to_tensor(torch.channels_last), x)


@pytest.mark.parametrize("size", [(8, 33), (7, 66), (4, 75), (4, 190)])  # the last blocks end in dead columns, or rows
@pytest.mark.parametrize("channels", [3, 7, 8, 21])
def test_squares_end_where_a_block_has_dead_pixels(isa, channels, size):
    x = torch.randn(2, channels, *size)
    block = (-(-size[0] // GRID), -(-size[1] // GRID))
    for view in (x, x.to(memory_format=torch.channels_last)):
        lanes = LaneMap.from_tensor(view)
        assert torch.equal(lanes.data, expected(x, 0, "zeros", 0, block))
        assert torch.equal(lanes.to_tensor(), x)
        assert torch.equal(lanes.to_tensor(torch.channels_last), x)


def test_blocks_larger_than_a_quarter():
    x = torch.randn(1, 2, 9, 10)
    assert torch.equal(LaneMap.from_tensor(x, 1, "reflect", 1, (6, 4)).data, expected(x, 1, "reflect", 1, (6, 4)))


def test_a_channel_slice_is_a_map():
    whole = LaneMap.allocate(1, 5, 8, 8)
    x = torch.randn(1, 2, 8, 8)
    part = LaneMap(whole.data[:, 2:4], 8, 8, 0)
    part.data.copy_(LaneMap.from_tensor(x).data)
    assert torch.equal(part.to_tensor(), x)
    assert whole.to_tensor()[:, [0, 1, 4]].abs().max() == 0


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 4), torch.zeros(1, 1, 4, 4, dtype=torch.float64)])
def test_other_tensors_are_refused_by_what_they_are(bad):
    with pytest.raises(InputError, match="expected 4-D float32 on cpu"):
        LaneMap.from_tensor(bad)


def test_padding_that_there_is_not_is_refused():
    with pytest.raises(InputError, match="mode 'bogus' is unknown; use zeros, reflect"):
        LaneMap.from_tensor(torch.zeros(1, 1, 8, 8), 1, "bogus", 1)
    with pytest.raises(InputError, match="5 pixels of padding do not fit a halo of 1"):
        LaneMap.from_tensor(torch.zeros(1, 1, 8, 8), 1, "reflect", 5)
    with pytest.raises(InputError, match="3 pixels of padding do not fit a halo of 0"):
        LaneMap.from_tensor(torch.zeros(1, 1, 8, 8), 0, "reflect", 3)


def test_sizes_that_no_map_has_are_refused():
    with pytest.raises(InputError, match=r"floats is larger than any memory"):
        LaneMap.allocate(2**40, 2**20, 9, 9)
    with pytest.raises(InputError, match="-1 pictures of 2 channels"):
        LaneMap.allocate(-1, 2, 9, 9)


def test_bindings_refuse_what_a_kernel_would_trust():
    x, lanes = torch.zeros(1, 1, 8, 8), LaneMap.allocate(1, 1, 8, 8).data
    with pytest.raises(ValueError, match="expected float32 with 4 axes, got float64"):
        _C.lanes_from_plain(x.double().numpy(), lanes.numpy(), 0, 1)
    with pytest.raises(ValueError, match="cannot hold 8 x 8 pixels"):
        _C.lanes_from_plain(x.numpy(), lanes[:, :, :1].contiguous().numpy(), 0, 1)
    with pytest.raises(ValueError, match="vectors must be 64-byte aligned"):
        _C.lanes_from_plain(x.numpy(), torch.zeros(65)[1:].view(1, 1, 2, 2, 16).numpy(), 0, 1)
    with pytest.raises(ValueError, match="does not fit in a halo of 0"):
        _C.fill_halo(lanes.numpy(), 8, 8, 0, 0, 1, 1)


@pytest.mark.parametrize("block", [None, (5, 7)])
def test_pixels_are_copied_whatever_blocks_and_halo(isa, block):
    x = torch.randn(2, 3, 13, 18)
    target = LaneMap.allocate(2, 3, 13, 18, 2, block)
    target.data.fill_(7)
    target.copy_pixels(LaneMap.from_tensor(x, 1))
    assert torch.equal(target.to_tensor(), x)
    assert bool((target.data[:, :, :2] == 7).all())  # the halo stays
    with pytest.raises(ValueError, match="differ in size"):
        target.copy_pixels(LaneMap.from_tensor(x[:1], 1))


def test_memory_that_is_used_again_holds_no_numbers_of_before():
    x = torch.randn(1, 40, 90, 93)
    want = LaneMap.from_tensor(x, 2).data.clone()
    for _ in range(3):
        spoilt = LaneMap.allocate(1, 40, 90, 93, 2)
        assert not spoilt.data.any()
        spoilt.data.fill_(torch.nan)
        del spoilt
        assert torch.equal(LaneMap.from_tensor(x, 2).data, want)


def test_a_map_in_use_keeps_its_memory():
    first = LaneMap.allocate(1, 40, 90, 93)
    address = first.data.data_ptr()
    assert LaneMap.allocate(1, 40, 90, 93).data.data_ptr() != address
    view = first.data[:, :1]
    del first
    assert LaneMap.allocate(1, 40, 90, 93).data.data_ptr() != address
    del view
    assert LaneMap.allocate(1, 40, 90, 93).data.data_ptr() == address


def test_little_memory_is_kept():
    """At most 64 MB, of those that were dropped last: the first of seven maps of 11 MB is mapped anew."""
    maps = [LaneMap.allocate(1, 128, 148, 148) for _ in range(7)]
    addresses = [lanes.data.data_ptr() for lanes in maps]
    while maps:
        maps.pop(0)
    again = [LaneMap.allocate(1, 128, 148, 148) for _ in range(5)]
    assert [lanes.data.data_ptr() for lanes in again] == addresses[:1:-1]
