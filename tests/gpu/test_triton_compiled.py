"""Every Triton kernel with every shipped setting compiles for every target, as well as the committed table says."""

import pytest
import tables

TARGETS = {"sm_80", "sm_90", "gfx942"}
# Streams over flat buffers: all but the mask words (and scalars) moves in 128-bit accesses.
STREAMS = {"adam", "adam bf16", "adam packed", "sgd", "apply_mask", "apply_mask fp16"}
STREAMS |= {"normalise", "normalise bf16", "normalise_backward"}


@pytest.fixture(scope="module")
def compiled():
    return tables.compile_triton()


def test_all_targets_and_no_spills(compiled):
    names = {row["kernel"] for row in compiled}
    assert {(row["kernel"], row["target"]) for row in compiled} == {(n, t) for n in names for t in TARGETS}
    assert [row for row in compiled if row["spills"]] == []


def test_nothing_is_worse_than_the_table(compiled):
    assert tables.worse(compiled, tables.read("triton")) == []


@pytest.mark.parametrize("target", sorted(TARGETS - {"gfx942"}))
def test_streaming_kernels_use_128_bit_accesses(compiled, target):
    streams = [row for row in compiled if row["kernel"] in STREAMS and row["target"] == target]
    assert {row["kernel"] for row in streams} == STREAMS
    for row in streams:
        # Narrow are a program's mask words or numbers of its channel; the wide ones move the data. In bf16 two of those
        # are enough, and a channel has four numbers.
        assert row["wide"] >= 2, row
        assert row["narrow"] <= (4 if row["kernel"] == "normalise bf16" else row["wide"]), row


def test_precision_decides_about_tensor_cores(compiled):
    for row in compiled:
        if row["kernel"].startswith("masked_conv") and row["target"] != "gfx942":
            assert (row["tensor_core"] > 0) == (row["kernel"] != "masked_conv ieee"), row


def test_sums_take_no_atomics(compiled):
    """Integer counts in shared memory may (any order gives one answer); sums of floats must not."""
    assert {row["kernel"] for row in compiled if row.get("atomics")} <= {"histogram", "choose", "count", "remove"}


def test_a_worse_kernel_is_noticed(compiled):
    table = [dict(row) for row in compiled]
    table[0]["registers"] -= 1
    assert tables.worse(compiled, table) == [
        f"adam sm_80: registers {compiled[0]['registers']}, at most {table[0]['registers']} in the table"
    ]
    assert tables.worse(compiled[1:], compiled) == ["adam sm_80: in the table, but not compiled"]
