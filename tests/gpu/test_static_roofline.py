"""The analysis itself, on control flow small enough to work out by hand."""

import pytest
from static_roofline import MACHINES, Block, Instruction, Kernel, Loop, Work, find_loops, hot_loops, occupancy, work_of


def block(ops: str, *successors: int) -> Block:
    return Block([Instruction(op, "", False) for op in ops.split()], list(successors))


def kernel(*blocks: Block) -> Kernel:
    return Kernel("k", "sm_90", 32, 0, 0, list(blocks))


# 0 -> loop {1 -> (2 -> (3 | 4) | 5) -> 6 -> 1} -> 7: a dispatch tree over three cases, two on one side.
DISPATCH = kernel(
    block("MOV", 1),
    block("LDS BRA", 2, 5),
    block("ISETP BRA", 3, 4),
    block("FFMA FFMA BRA", 6),
    block("FFMA FFMA BRA", 6),
    block("FFMA FFMA BRA", 6),
    block("IADD3 BRA", 1, 7),
    block("EXIT"),
)


def test_finds_the_loop():
    assert find_loops(DISPATCH.blocks) == [Loop(1, frozenset({1, 2, 3, 4, 5, 6}))]


def test_every_case_is_equally_likely():
    (loop,) = hot_loops(DISPATCH)
    work = work_of(DISPATCH, loop, [])
    assert work.of("FFMA") == pytest.approx(2)
    assert work.of("ISETP") == pytest.approx(2 / 3)  # two of three cases lie behind the second test
    assert work.issued == pytest.approx(2 + 2 * 2 / 3 + 3 + 2)


def test_a_rare_side_has_its_probability():
    flush = kernel(block("FFMA BRA", 1, 2), block("STG", 2), block("BRA", 0, 3), block("EXIT"))
    work = work_of(flush, hot_loops(flush)[0], [], rare={"STG": 1 / 32})
    assert work.of("STG") == pytest.approx(1 / 32)
    assert work.issued == pytest.approx(3 + 1 / 32)


def test_predicated_zeros_are_counted():
    """Nine taps under predicates cost nine taps, although one is alive: the reason for this tool."""
    dense = kernel(block("LDS " + 9 * "FFMA " + "BRA", 0, 1), block("EXIT"))
    assert work_of(dense, hot_loops(dense)[0], []).of("FFMA") == 9


def test_an_inner_loop_is_left_to_itself():
    nest = kernel(block("MOV", 1), block("LDS", 2), block("FFMA BRA", 2, 3), block("BRA", 1, 4), block("EXIT"))
    inner, outer = hot_loops(nest)
    assert (inner.header, outer.header) == (2, 1)
    assert work_of(nest, outer, [inner]).ops == {"LDS": 1, "BRA": 1}


def test_pipes():
    work = Work()
    work.ops.update({"FFMA": 8, "LDS.128": 2, "SHFL.IDX": 1, "LOP3.LUT": 2})
    cycles = work.cycles(MACHINES["sm_90"])
    assert cycles == {"issue": 13 / 4, "fp32": 2, "integer": 1, "special": 0, "load/store": 9}
    assert work.cycles(MACHINES["sm_80"])["fp32"] == 4
    assert work.cycles(MACHINES["sm_90"], uniform_shared=True)["load/store"] == 3


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "warps", "limit"),
    [
        ("sm_90", 128, 32, 0, 64, "warps"),
        ("sm_90", 128, 40, 0, 48, "registers"),
        ("sm_90", 128, 194, 39232, 8, "registers"),
        ("sm_80", 128, 32, 40 << 10, 16, "shared"),
        ("sm_80", 32, 32, 0, 32, "blocks"),
    ],
)
def test_occupancy(arch, threads, registers, shared, warps, limit):
    assert occupancy(MACHINES[arch], threads, registers, shared) == (warps, limit)


def test_peaks_are_the_data_sheets():
    assert MACHINES["sm_80"].fp32_teraflops == pytest.approx(19.5, rel=0.01)
    assert MACHINES["sm_90"].fp32_teraflops == pytest.approx(66.9, rel=0.01)
