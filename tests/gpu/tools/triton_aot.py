"""Compiles every Triton kernel with every shipped setting for every target and prints one JSON row each. No GPU needed.

    python tests/gpu/tools/triton_aot.py

Runs in a process of its own, without TRITON_INTERPRET: interpreted and compiled kernels cannot share one.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import static_roofline
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lipfast.ops.masked import PRECISIONS
from lipfast.ops.triton import fold, mask, masked_conv, norm, resample, rewind, select, sparse_conv, step
from lipfast.ops.triton.configs import CONFIGS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
F32, F16, BF16, I32, I64, U8 = "*fp32", "*fp16", "*bf16", "*i32", "*i64", "*u8"

# name -> (setting, kernel, argument types in order, constants beside the setting's). Integer arguments named in
# MULTIPLES_OF_16 are promised to be multiples of 16, as Triton itself finds out at run time.
MULTIPLES_OF_16 = {"n", "kept", "plane"}
FLOATS = {"step_size", "root_scale", "beta1", "beta2", "eps", "weight_decay", "lr", "momentum", "dampening", "slope"}
FLOATS |= {"unbiased", "row_ratio", "column_ratio", "row_inverse", "column_inverse", "shift"}
KERNELS = {
    "adam": ("adam", step.adam_kernel, [F32, F32, F32, F32, I32], {"MASKED": True}),
    "adam bf16": ("adam", step.adam_kernel, [BF16, BF16, F32, F32, I32], {"MASKED": True}),
    "adam packed": ("adam", step.adam_kernel, [F32, F32, F32, F32, I32], {"MASKED": False}),
    "sgd": (
        "sgd",
        step.sgd_kernel,
        [F32, F32, F32, I32],
        {"MASKED": True, "MOMENTUM": True, "FIRST": False, "NESTEROV": False},
    ),
    "apply_mask": ("apply_mask", mask.apply_mask_kernel, [F32, I32, F32], {}),
    "apply_mask fp16": ("apply_mask", mask.apply_mask_kernel, [F16, I32, F16], {}),
    "pack_mask": ("pack_mask", mask.pack_mask_kernel, [U8, I32], {}),
    "bilinear": ("bilinear", resample.bilinear_kernel, [F32, F32], {}),
    "bilinear_backward": (  # of doubled maps
        "bilinear_backward",
        resample.bilinear_backward_kernel,
        [F32, F32],
        {"ROWS": 4, "COLUMNS": 4},
    ),
    "histogram": ("histogram", select.histogram_kernel, [F32, U8, I32, I32], {"SHIFT": 8, "BINS": select.BINS}),
    "choose": ("choose", select.choose_kernel, [I32, I32], {"SHIFT": 8}),
    "count": ("count", select.count_kernel, [F32, U8, I32, I32], {}),
    "remove": ("remove", select.remove_kernel, [F32, U8, I32, I32, U8], {}),
    "compact": ("compact", rewind.compact_kernel, [U8, F32, I32, F32, F32], {"DENSE": True}),
    "expand": ("expand", rewind.expand_kernel, [U8, F32, I32, F32], {}),
    "fold": ("fold", fold.fold_kernel, [F32, F32], {"CIRCULAR": False}),
    "normalise": ("normalise", norm.normalise_kernel, [F32] * 6, {}),
    "normalise bf16": ("normalise", norm.normalise_kernel, [BF16, F32, F32, F32, F32, BF16], {}),
    "normalise_backward": ("normalise_backward", norm.normalise_backward_kernel, 8 * [F32], {}),
    "statistics": ("batch_norm", norm.statistics_kernel, 3 * [F32], {}),
    "batch_norm": ("batch_norm", norm.batch_norm_kernel, 10 * [F32], {"AFFINE": True, "RUNNING": True, "PARTS": 16}),
    "batch_norm whole": (
        "batch_norm_whole",
        norm.batch_norm_kernel,
        10 * [F32],
        {"AFFINE": True, "RUNNING": True, "PARTS": 1},
    ),
    "batch_norm_sums": ("batch_norm", norm.batch_norm_sums_kernel, 8 * [F32], {"AFFINE": True}),
    "batch_norm_backward": (
        "batch_norm",
        norm.batch_norm_backward_kernel,
        11 * [F32],
        {"AFFINE": True, "PARTS": 16},
    ),
    "batch_norm_backward whole": (
        "batch_norm_whole",
        norm.batch_norm_backward_kernel,
        11 * [F32],
        {"AFFINE": True, "PARTS": 1},
    ),
    "sparse_forward": (
        "sparse_forward",
        sparse_conv.sparse_forward_kernel,
        [F32, F32, I32, I32, F32, F32],
        {"BIASED": True},
    ),
    "sparse_forward fp16": (
        "sparse_forward",
        sparse_conv.sparse_forward_kernel,
        [F16, F16, I32, I32, F16, F16],
        {"BIASED": True},
    ),
    "sparse_input_gradient": (
        "sparse_input_gradient",
        sparse_conv.sparse_input_gradient_kernel,
        [F32, F32, I64, I32, I32, I32, I32, F32],
        {"STRIDE_ROWS": 2, "STRIDE_COLUMNS": 2},
    ),
    "sparse_weight_gradient": (
        "sparse_weight_gradient",
        sparse_conv.sparse_weight_gradient_kernel,
        [F32, F32, I32, I32, I32, F32],
        {},
    ),
    **{
        f"masked_conv {precision}": (
            "masked_conv_ieee" if precision == "ieee" else "masked_conv",
            masked_conv.masked_conv_kernel,
            [F32, F32, I32, F32],
            {"PRECISION": precision},
        )
        for precision in PRECISIONS
    },
}


def compile_one(name: str, target: str) -> triton.compiler.CompiledKernel:
    setting, kernel, pointers, constants = KERNELS[name]
    config = CONFIGS[setting]
    constants = {**constants, **config["meta"]}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif len(signature) < len(pointers):
            signature[argument] = pointers[len(signature)]
        else:
            signature[argument] = "fp32" if argument in FLOATS else "i32"
    index = kernel.arg_names.index
    aligned = [a for a, kind in signature.items() if kind.startswith("*") or a in MULTIPLES_OF_16]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(index(a),): value for a, value in constants.items()},
        attrs={(index(a),): [["tt.divisibility", 16]] for a in aligned},
    )
    options = {"num_warps": config["warps"], "num_stages": config["stages"]}
    return triton.compile(source, target=TARGETS[target], options=options)


def describe(name: str, target: str) -> dict[str, object]:
    compiled = compile_one(name, target)
    row: dict[str, object] = {"kernel": name, "target": target, "shared": compiled.metadata.shared}
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.vgpr_{what}:\s+(\d+)", text)[1])  # type: ignore[index]
            for what in ("count", "spill_count")
        )
        return {**row, "registers": registers, "spills": spills}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (kernel,) = static_roofline.read_cubin(Path(file.name)).values()
    ops = [i.op for i in kernel.instructions()]
    warps = CONFIGS[KERNELS[name][0]]["warps"]
    machine = static_roofline.MACHINES[target]
    resident, limit = static_roofline.occupancy(machine, 32 * warps, kernel.registers, compiled.metadata.shared)
    row |= sparse_ceiling(kernel, resident) if name.startswith("sparse") else {}
    return {
        **row,
        "registers": kernel.registers,
        "spills": kernel.spill_instructions + kernel.stack,
        "occupancy": round(resident / machine.warps, 2),
        "occupancy_limit": limit,
        "wide": sum(op.startswith(("LDG.E.128", "STG.E.128")) for op in ops),
        "narrow": sum(op.startswith(("LDG", "STG")) and ".128" not in op for op in ops),
        "instructions": len(ops),
        "tensor_core": sum(static_roofline.pipe(op) == "tensor" for op in ops),
        "atomics": sum(static_roofline.pipe(op) == "atomic" for op in ops),
    }


def sparse_ceiling(kernel: static_roofline.Kernel, resident: int) -> dict[str, object]:
    """Share of the FP32 peak that the loop over kept weights can reach, whatever the density."""
    machine = static_roofline.MACHINES[kernel.arch]
    loop = static_roofline.hot_loops(kernel)[0]
    work = static_roofline.work_of(kernel, loop, static_roofline.children_of(kernel, loop))
    cycles = static_roofline.cycles_of(work, machine, resident)
    bound = max(cycles, key=cycles.__getitem__)
    share = work.of("FFMA") * 32 / machine.fp32 / cycles[bound]
    return {"ceiling": round(share, 3), "bound": bound}


if __name__ == "__main__":
    for name in KERNELS:
        for target in TARGETS:
            print(json.dumps(describe(name, target)), flush=True)
