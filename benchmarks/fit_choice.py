"""The constants of csrc/cpu/choice.cc for the instruction set in use: times of layers, and the costs fitted to them.

``python benchmarks/fit_choice.py OUT.jsonl``, on one quiet core: one line for each time, then for each direction the
constants and how far the model is from the times.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import statistics
import time
from pathlib import Path

import numpy
import torch
from scipy.optimize import nnls

import lipfast
import lipfast._C as _C
from lipfast.bench import harness
from lipfast.bench.choice import DIRECTIONS, KERNELS, OneDirection
from lipfast.ops import ConvForm

# channels in, out; kernel; stride; pixels: layers of the paper's network and of classifiers
LAYERS = (
    *((128, 128, 3, 1, pixels) for pixels in (128, 64, 32, 16, 8)),
    *((64, 64, 3, 1, 56), (128, 128, 3, 1, 28), (256, 256, 3, 1, 14), (512, 512, 3, 1, 7), (16, 16, 3, 1, 64)),
    *((128, 128, 3, 2, 64), (64, 128, 3, 2, 56), (256, 512, 3, 2, 14)),
    *((128, 128, 1, 1, 64), (512, 512, 1, 1, 7), (64, 64, 5, 1, 32)),
)
DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
SWEEPS = 3  # over all layers, so that a busy neighbour does not hit one layer alone
SECONDS = 0.03  # a sample


@dataclasses.dataclass(frozen=True)
class Timing:
    """One layer, direction and kernel, and the amounts of work that its cost is a sum over."""

    layer: tuple[int, ...]
    density: float
    direction: str
    kernel: str
    work: list[float]
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    timings = measured()
    about = {"isa": _C.isa(), "cpu": harness.cpu_name(), "commit": harness.commit()}
    about |= {"version": lipfast.__version__, "utc": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
    with arguments.out.open("a") as file:
        for timing in timings:
            file.write(json.dumps({**dataclasses.asdict(timing), **about}) + "\n")
    for direction, kernel in itertools.product(DIRECTIONS, KERNELS):
        rows = [t for t in timings if (t.direction, t.kernel) == (direction, kernel)]
        constants, errors = fitted(rows)
        numbers = ", ".join(f"{c:.3g}" for c in constants)
        worst = f"median error {statistics.median(errors):.0%}, largest {max(errors):.0%}"
        print(f"{direction:16} {kernel:9} {numbers:24} {worst}")


def measured() -> list[Timing]:
    """The least time of each kernel that can do each layer."""
    best: dict[tuple[object, ...], Timing] = {}
    for _ in range(SWEEPS):
        for layer, density, direction, kernel in itertools.product(LAYERS, DENSITIES, DIRECTIONS, KERNELS):
            if kernel == "dense" and density not in (1.0, 0.25):
                continue  # takes as long at every density
            into, out, size, stride, pixels = layer
            form = ConvForm(out, into, (size, size), stride, (size // 2,) * 2)
            one = OneDirection(form, pixels, density, direction, kernel)
            if one.kernel != kernel:
                continue
            timing = Timing(layer, density, direction, kernel, work(one, form, pixels, direction), seconds_of(one))
            key = (layer, density, direction, kernel)
            if key not in best or timing.seconds < best[key].seconds:
                best[key] = timing
    return list(best.values())


def seconds_of(one: OneDirection) -> float:
    """The least of several calls."""
    one.run()
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        one.run()
        times.append(time.perf_counter() - start)
    return min(times)


def work(one: OneDirection, form: ConvForm, pixels: int, direction: str) -> list[float]:
    """What WorkOf of choice.cc counts, in the order of the constants."""
    block = one.conv.out_block
    positions = block[0] * block[1]
    filters = form.out_channels * form.in_channels * form.kernel[0] * form.kernel[1]
    if one.kernel == "sparse":
        backward = direction == "input_gradient"
        vectors = positions * (form.stride**2 * form.in_channels if backward else form.out_channels)
        return [positions * one.conv.kept, vectors, one.conv.kept]
    if one.kernel == "dense":
        return [positions * filters, filters]
    tile = _C.winograd_tile(*block, form.kernel[0], form.stride)
    side = tile + form.kernel[0] - 1  # frequencies of a filter along each side
    tiles = -(-block[0] // tile) * -(-block[1] // tile) * ((2 * tile + 1) if form.stride == 2 else side) ** 2
    pairs = form.out_channels * form.in_channels
    weights = pairs * side**2
    far = 2.0 if 4 * weights > (12 if _C.isa() == "avx512" else 16) << 20 else 1.0
    return [tiles * pairs, tiles * (form.in_channels + form.out_channels), far * weights]


def fitted(rows: list[Timing]) -> tuple[list[float], list[float]]:
    """Constants in nanoseconds by least squares of relative errors, and the errors."""
    amounts = numpy.array([[amount / (1e9 * row.seconds) for amount in row.work] for row in rows])
    constants, _ = nnls(amounts, numpy.ones(len(rows)))
    return list(constants), list(numpy.abs(amounts @ constants - 1))


if __name__ == "__main__":
    main()
