"""The page of bounds says what the committed tables say, and the streaming kernels are bound by memory."""

import bounds
import pytest
import tables


def test_the_page_is_up_to_date():
    page = bounds.filled(bounds.PAGE, bounds.SECTIONS)
    assert page == bounds.PAGE.read_text(), "run: python tests/gpu/tools/bounds.py"


STREAMS = [row for row in tables.read("triton") if row["kernel"] in bounds.STREAM_BYTES and row["target"] != "gfx942"]


@pytest.mark.parametrize("row", STREAMS, ids=lambda row: f"{row['kernel']} {row['target']}")
def test_streaming_kernels_are_bound_by_memory(row):
    assert bounds.stream_margin(row) > 1.2


def test_streams_are_all_there():
    assert {row["kernel"] for row in STREAMS} == set(bounds.STREAM_BYTES)


def test_the_layers_are_the_papers():
    """26 convolutions hold 2,208,768 weights; left out here are the 1x1 skip convs (4 channels) and the output conv."""
    weights = sum(layer.inputs * layer.outputs * layer.kernel**2 for layer in bounds.skip_net(256))
    assert weights == 2_208_768 - 128 - 4 * 512 - 384
