"""Times the GPU kernels on the skip net's layers against dense torch:  python benchmarks/bench_gpu.py OUTPUT.jsonl

One JSON line for each layer, density, direction and implementation: median, 20th and 80th percentile in microseconds,
with what ran it, where, and what the rule of docs/gpu.md would have run in fp32. Each sparse answer is checked against
the reference before it is timed. Then whole training steps of the skip net, direction "step". Times are CUDA events
around repeated calls, in ``--rounds`` rounds. ``--device cpu --size toy`` only checks that the script works.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lipfast
from lipfast import ops, priors
from lipfast.engine.graph_trainer import GraphTrainer
from lipfast.engine.operator_trainer import OperatorTrainer
from lipfast.engine.trainer import TorchTrainer, Trainer
from lipfast.errors import BackendError
from lipfast.ops import _dispatch, _gpu_rule, masked, reference

DENSITIES = (0.4, 0.2, 0.1, 0.05, 0.02)
REPEATS = 20  # calls between two events


@dataclass(frozen=True)
class Layer:
    """A convolution of the skip net at a picture size; reflection padding of half the kernel."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    pixels: int  # side of the input map


SIZES = {
    "toy": [Layer(3, 4, 3, 1, 8)],
    "full": [
        Layer(inputs, outputs, kernel, stride, pixels)
        for pixels in (64, 128, 256)
        for inputs, outputs, kernel, stride in ((128, 128, 3, 1), (132, 128, 3, 1), (128, 128, 3, 2), (128, 128, 1, 1))
    ],
}
STEPS = {"toy": [({"in_channels": 4, "down": [8], "skip": 2}, 16, (0.1,))]}  # network, pixels, densities
STEPS["full"] = [({}, pixels, DENSITIES) for pixels in (128, 256, 512)]
BASELINES = {
    "torch ieee": (torch.float32, False),
    "torch tf32": (torch.float32, True),
    "torch bf16": (torch.bfloat16, False),
}


@functools.cache
def implementations(device: torch.device) -> list[str]:
    """Backends that can run on ``device``, the reference aside."""
    found = []
    for name in ("cuda", "triton"):
        try:
            _dispatch.pick("sparse_conv2d_forward", device, name)
        except BackendError as reason:
            print(f"not timed: {reason}")
        else:
            found.append(name)
    return found


def sample(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, from `REPEATS` calls in a row."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(REPEATS):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / REPEATS / 1e3


def cases(layer: Layer, density: float, device: torch.device) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(direction, implementation, call) with every sparse answer already checked."""
    torch.manual_seed(0)
    side = layer.kernel // 2
    shape = torch.Size((layer.outputs, layer.inputs, layer.kernel, layer.kernel))
    positions = (torch.rand(shape.numel(), device=device) < density).nonzero().squeeze(1)
    values = torch.randn(len(positions), device=device)
    x = torch.randn(1, layer.inputs, layer.pixels, layer.pixels, device=device)
    layout = ((layer.stride,) * 2, (side,) * 2, "reflect" if side else "zeros")
    dy = torch.randn_like(reference.sparse_conv2d_forward(x, values, positions, shape, None, *layout))
    arguments: dict[str, tuple[object, ...]] = {
        "forward": (x, values, positions, shape, None, *layout),
        "input_gradient": (dy, values, positions, shape, x.shape, *layout),
        "weight_gradient": (x, dy, positions, shape, *layout),
    }
    for direction, given in arguments.items():
        op = f"sparse_conv2d_{direction}"
        want: Tensor = getattr(reference, op)(*given)
        for name in implementations(device):
            _, run = _dispatch.pick(op, device, name)
            torch.testing.assert_close(run(*given), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
            yield direction, name, lambda run=run, given=given: run(*given)
    if "triton" in implementations(device):
        yield from masked_cases(x, positions, values, shape, layout)
    yield from dense_cases(x, dy, shape, layer)


def masked_cases(
    x: Tensor, positions: Tensor, values: Tensor, shape: torch.Size, layout: tuple[Any, Any, str]
) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """The dense convolution under a packed mask."""
    weight = ops.SparseWeight(values, positions, shape).to_dense()
    words = ops.pack_mask(weight != 0)
    for precision in masked.PRECISIONS:
        yield (
            "forward",
            f"masked {precision}",
            functools.partial(ops.masked_conv2d, x, weight, words, *layout, precision=precision),
        )


def step_cases(
    network: dict[str, Any], pixels: int, density: float, device: torch.device
) -> Iterator[tuple[str, Callable[[], object]]]:
    """(implementation, one training step) of the skip net with random masks."""
    trainers: dict[str, Callable[..., Trainer]] = {"lipfast": OperatorTrainer, "torch": TorchTrainer}
    if device.type == "cuda":
        trainers["torch graphs"] = GraphTrainer
    for name, make in trainers.items():
        torch.manual_seed(0)
        module = priors.build("skip", network, 0).to(device)
        parameters = dict(module.named_parameters())
        masks = {n: torch.rand(p.shape) < density for n, p in parameters.items() if p.dim() == 4}
        trainer = make(module, masks, lr=0.01)
        z = torch.rand(priors.as_prior(module).input_shape(pixels, pixels), device=device)
        yield name, lambda trainer=trainer, z=z: trainer.step(z, lambda y: (y - 0.5).square().mean())


def dense_cases(
    x: Tensor, dy: Tensor, shape: torch.Size, layer: Layer
) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """torch's dense convolution of the same layer, zero padded: the baseline at each precision."""
    weight = torch.randn(shape, device=x.device)
    settings = ([layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1], False, [0, 0], 1)
    for name, (dtype, tf32) in BASELINES.items():
        given = [part.to(dtype, memory_format=torch.channels_last) for part in (dy, x, weight)]

        def forward(given: list[Tensor] = given, tf32: bool = tf32) -> Tensor:
            torch.backends.cudnn.allow_tf32 = tf32
            return torch.nn.functional.conv2d(given[1], given[2], None, layer.stride, layer.kernel // 2)

        def backward(wanted: list[bool], given: list[Tensor] = given, tf32: bool = tf32) -> object:
            torch.backends.cudnn.allow_tf32 = tf32
            return torch.ops.aten.convolution_backward(*given, None, *settings, wanted)

        yield "forward", name, forward
        yield "input_gradient", name, lambda run=backward: run([True, False, False])
        yield "weight_gradient", name, lambda run=backward: run([False, True, False])


def rule(layer: Layer, density: float, direction: str, device: torch.device) -> str:
    """What runs by the rule of docs/gpu.md, in fp32."""
    library, _ = _dispatch.pick("sparse_conv2d_forward", device)
    out = layer.pixels // layer.stride
    shape = (layer.outputs, layer.inputs, layer.kernel, layer.kernel)
    sizes = (1, layer.inputs, layer.pixels, layer.pixels), (1, layer.outputs, out, out)
    described = _gpu_rule.Layer(shape, *sizes, (layer.stride, layer.stride), density)
    target = _gpu_rule.target_of(device)
    return _gpu_rule.choose(described, target=target, library=library, precision="ieee")[direction]


def jobs(size: str, device: torch.device) -> Iterator[tuple[dict[str, object], Callable[[], object]]]:
    """What a row says, and the call it times."""
    for layer in SIZES[size]:
        for density in DENSITIES:
            for direction, name, call in cases(layer, density, device):
                chosen = rule(layer, density, direction, device)
                keys = {"density": density, "direction": direction, "implementation": name, "rule": chosen}
                yield asdict(layer) | keys, call
    for network, pixels, densities in STEPS[size]:
        for density in densities:
            for name, call in step_cases(network, pixels, density, device):
                keys = {"density": density, "direction": "step", "implementation": name}
                yield {"network": network, "pixels": pixels} | keys, call


def measure(size: str, device: torch.device, rounds: int) -> Iterator[dict[str, object]]:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    for keys, call in jobs(size, device):
        for _ in range(3):
            call()
        times = sorted(sample(call, device) * 1e6 for _ in range(rounds))
        p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
        yield keys | {
            "microseconds": {"p20": p20, "median": statistics.median(times), "p80": p80},
            "device": where,
            "versions": {"lipfast": lipfast.__version__, "torch": torch.__version__, "cuda": torch.version.cuda},
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    partial = arguments.output.with_suffix(".partial")
    with partial.open("w") as file:
        for row in measure(arguments.size, torch.device(arguments.device), arguments.rounds):
            print(json.dumps(row), file=file, flush=True)
    partial.replace(arguments.output)


if __name__ == "__main__":
    main()
