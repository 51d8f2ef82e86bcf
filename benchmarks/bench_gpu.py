"""Times the GPU kernels against dense torch on one GPU:  python benchmarks/bench_gpu.py OUTPUT.jsonl

One JSON line a measurement, of four kinds:

ceiling   what this GPU reaches in torch: a copy (bytes read and written) and a matrix product in each precision.
conv      the skip net's layers: every direction, density and implementation, beside torch's dense convolution
          (density 1) in each precision and memory format, with what the rule of docs/gpu.md would have run in fp32.
flat      optimiser steps, masks, a pruning round: ours and torch's.
step      whole training steps of the skip net.

Each kernel's answer is checked against the reference before it is timed; that steps are torch's is for make test-gpu to
say. What a CUDA graph can hold is captured so often that a
replay outlasts its launch; a pruning round and a training step, which wait for the device or keep their own graphs, are
called from Python. All variants of a group are timed in turn, ``--rounds`` times, with CUDA events; rows give median,
20th and 80th percentile in microseconds. ``--device cpu --size toy`` only checks that the script works.
"""

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lipfast
from lipfast import ops, priors
from lipfast.bench import harness, select
from lipfast.bench.adam import BYTES_PER_WEIGHT, SKIP_NET
from lipfast.engine.graph_trainer import GraphTrainer
from lipfast.engine.operator_trainer import OperatorTrainer
from lipfast.engine.trainer import TorchTrainer, Trainer
from lipfast.errors import BackendError
from lipfast.ops import _dispatch, _gpu_rule, masked, reference
from lipfast.ops.batch_norm import batch_norm_activate

DENSITIES = (0.4, 0.2, 0.1, 0.05, 0.02)
MASKED_DENSITY = 0.4  # one is enough: the masked convolution does not skip what is dead
REPLAY_SECONDS = 2e-3  # what a captured graph should last
MOST_CALLS = 64  # in a graph
STEPS_A_SAMPLE = 3


@dataclass(frozen=True)
class Layer:
    """A convolution of the skip net at a picture size; reflection padding of half the kernel."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    pixels: int  # side of the input map


FORMS = ((128, 128, 3, 1), (128, 128, 3, 2), (128, 128, 1, 1))  # inputs, outputs, kernel, stride
SIZES = {
    "toy": [Layer(3, 4, 3, 1, 8)],
    "short": [Layer(*form, 128) for form in FORMS],
    "full": [Layer(*form, pixels) for pixels in (8, 16, 32, 64, 128, 256) for form in FORMS],
}
TOY_NETWORK = {"in_channels": 4, "down": [8], "skip": 2}
STEP_PIXELS = {"toy": (16,), "short": (128,), "full": (128, 256, 512)}
BASELINES = {
    "torch ieee": (torch.float32, "ieee", torch.contiguous_format),
    "torch ieee channels_last": (torch.float32, "ieee", torch.channels_last),
    "torch tf32": (torch.float32, "tf32", torch.contiguous_format),
    "torch tf32 channels_last": (torch.float32, "tf32", torch.channels_last),
    "torch bf16 channels_last": (torch.bfloat16, "tf32", torch.channels_last),
}


@dataclass
class Subject:
    """Something to time.

    Attributes:
        keys: what its row says.
        call: does it once.
        captured: whether a CUDA graph can hold it.
        calls: how often `sample` calls it.
    """

    keys: dict[str, object]
    call: Callable[[], object]
    captured: bool = True
    calls: int = 1
    _replay: Callable[[], object] | None = field(default=None, repr=False)

    def prepare(self, device: torch.device) -> None:
        """Warm up, and capture as many calls as fill a replay."""
        for _ in range(3):
            self.call()
        if device.type != "cuda" or not self.captured:
            return
        once = self.sample(device)
        self.calls = max(1, min(MOST_CALLS, math.ceil(REPLAY_SECONDS / once)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.calls):
                self.call()
        self._replay = graph.replay
        graph.replay()

    def sample(self, device: torch.device) -> float:
        """Seconds of one call."""
        if device.type != "cuda":
            start = time.perf_counter()
            self.call()
            return time.perf_counter() - start
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        first.record()
        if self._replay is not None:
            self._replay()
        else:
            for _ in range(self.calls):
                self.call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / self.calls / 1e3


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


def ceilings(device: torch.device) -> Iterator[Subject]:
    """A copy beyond every cache, and square matrix products."""
    side = 8192 if device.type == "cuda" else 64
    source = torch.randn(side, side, device=device)
    target = torch.empty_like(source)
    yield Subject({"implementation": "copy", "bytes": 2 * source.nbytes}, lambda: target.copy_(source))
    for precision, dtype in {"ieee": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}.items():
        factor = torch.randn(side, side, device=device, dtype=dtype)

        def product(factor: Tensor = factor, precision: str = precision) -> Tensor:
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            return factor @ factor

        yield Subject({"implementation": f"product {precision}", "flops": 2 * side**3}, product)


def convolutions(layer: Layer, device: torch.device) -> Iterator[Subject]:
    """Every direction of one layer; sparse answers are checked."""
    torch.manual_seed(0)
    for density in DENSITIES:
        for subject in sparse_convolutions(layer, density, device):
            subject.keys["rule"] = rule(layer, density, str(subject.keys["direction"]), device)
            yield subject
    yield from dense_convolutions(layer, device)


def sparse_convolutions(layer: Layer, density: float, device: torch.device) -> Iterator[Subject]:
    side = layer.kernel // 2
    shape = torch.Size((layer.outputs, layer.inputs, layer.kernel, layer.kernel))
    positions = (torch.rand(shape.numel(), device=device) < density).nonzero().squeeze(1)
    values = torch.randn(len(positions), device=device)
    x = torch.randn(1, layer.inputs, layer.pixels, layer.pixels, device=device)
    layout = ((layer.stride,) * 2, (side,) * 2, "reflect" if side else "zeros")
    dy = torch.randn_like(reference.sparse_conv2d_forward(x, values, positions, shape, None, *layout))
    keys = {**asdict(layer), "density": density, "flops": 2 * len(positions) * dy[0, 0].numel()}
    arguments: dict[str, tuple[Any, ...]] = {
        "forward": (x, values, positions, shape, None, *layout),
        "input_gradient": (dy, values, positions, shape, x.shape, *layout),
        "weight_gradient": (x, dy, positions, shape, *layout),
    }
    for direction, given in arguments.items():
        op = f"sparse_conv2d_{direction}"
        want: Tensor = getattr(reference, op)(*given)
        for name in implementations(device):
            _, run = _dispatch.pick(op, device, name)
            check(run(*given), want)
            yield Subject({**keys, "direction": direction, "implementation": name}, functools.partial(run, *given))
    if "triton" in implementations(device) and density == MASKED_DENSITY:
        weight = ops.SparseWeight(values, positions, shape).to_dense()
        words = ops.pack_mask(weight != 0)
        for precision in masked.PRECISIONS:
            call = functools.partial(ops.masked_conv2d, x, weight, words, *layout, precision=precision)
            check(call(), reference.sparse_conv2d_forward(*arguments["forward"]), loose=precision != "ieee")
            yield Subject({**keys, "direction": "forward", "implementation": f"masked {precision}"}, call)


def check(got: Tensor, want: Tensor, *, loose: bool = False) -> None:
    """Raises AssertionError where an answer is off by more than its precision explains."""
    torch.testing.assert_close(got, want, rtol=0, atol=(2e-2 if loose else 1e-4) * max(1.0, float(want.abs().max())))


def dense_convolutions(layer: Layer, device: torch.device) -> Iterator[Subject]:
    """torch's dense convolution of the same layer, zero padded: the baseline."""
    out = (layer.pixels - 1) // layer.stride + 1
    shape = (layer.outputs, layer.inputs, layer.kernel, layer.kernel)
    sizes = (1, layer.outputs, out, out), (1, layer.inputs, layer.pixels, layer.pixels), shape
    settings = ([layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1], False, [0, 0], 1)
    keys = {**asdict(layer), "density": 1.0, "flops": 2 * math.prod(shape) * out * out}
    for name, (dtype, precision, memory_format) in BASELINES.items():
        dy, x, weight = (torch.randn(size, device=device).to(dtype, memory_format=memory_format) for size in sizes)

        def forward(x: Tensor = x, weight: Tensor = weight, precision: str = precision) -> Tensor:
            with reference.convolving_in(precision, device):
                return torch.nn.functional.conv2d(x, weight, None, layer.stride, layer.kernel // 2)

        def backward(
            wanted: list[bool], dy: Tensor = dy, x: Tensor = x, weight: Tensor = weight, precision: str = precision
        ) -> object:
            with reference.convolving_in(precision, device):
                return torch.ops.aten.convolution_backward(dy, x, weight, None, *settings, wanted)

        wanted = {"input_gradient": [True, False, False], "weight_gradient": [False, True, False]}
        yield Subject({**keys, "direction": "forward", "implementation": name}, forward)
        for direction, mask in wanted.items():
            call = functools.partial(backward, mask)
            yield Subject({**keys, "direction": direction, "implementation": name}, call)


def rule(layer: Layer, density: float, direction: str, device: torch.device) -> str:
    """What runs by the rule of docs/gpu.md, in fp32."""
    library, _ = _dispatch.pick("sparse_conv2d_forward", device)
    out = (layer.pixels - 1) // layer.stride + 1
    shape = (layer.outputs, layer.inputs, layer.kernel, layer.kernel)
    described = _gpu_rule.Layer(shape, (1, layer.outputs, out, out), (layer.stride, layer.stride), density)
    return _gpu_rule.choose(described, library=library, precision="ieee")[direction]


def optimiser_steps(size: str, device: torch.device) -> Iterator[Subject]:
    """Adam on packed values, time in proportion to what is kept, beside torch's fused Adam on dense ones."""
    n = 5_000 if size == "toy" else SKIP_NET
    for density in (1.0, 0.1):
        values, gradient, m, v = torch.rand(4, round(n * density), device=device).unbind()
        ours, plain = ([part.clone() for part in (values, gradient, m, v)] for _ in range(2))
        ops.adam_step(*ours, 3, 0.01)
        reference.adam_step(*plain, 3, 0.01, 0.9, 0.999, 1e-8, 0.0)
        check(torch.cat(ours), torch.cat(plain))
        keys = {"op": "adam", "density": density, "bytes": BYTES_PER_WEIGHT * len(values)}
        step = functools.partial(ops.adam_step, values, gradient, m, v, 3, 0.01)
        yield Subject({**keys, "implementation": "lipfast"}, step)
    parameter = torch.nn.Parameter(torch.rand(n, device=device))
    parameter.grad = torch.rand(n, device=device)
    adam = torch.optim.Adam([parameter], lr=0.01, fused=True, capturable=device.type == "cuda")
    keys = {"op": "adam", "density": 1.0, "bytes": BYTES_PER_WEIGHT * n}
    yield Subject({**keys, "implementation": "torch fused"}, adam.step)


def mask_applications(size: str, device: torch.device) -> Iterator[Subject]:
    rows, columns = 128, (5_000 if size == "toy" else SKIP_NET) // 128
    x, alive = torch.randn(rows, columns, device=device), torch.rand(rows, columns, device=device) < 0.1
    words = ops.pack_mask(alive)
    assert torch.equal(ops.apply_mask(x, words), torch.where(alive, x, 0.0))
    keys = {"op": "apply_mask", "density": 0.1, "bytes": 8 * x.numel() + words.nbytes}
    yield Subject({**keys, "implementation": "lipfast"}, lambda: ops.apply_mask(x, words))
    yield Subject({**keys, "implementation": "torch multiply"}, lambda: x * alive)


def normalisations(size: str, device: torch.device) -> Iterator[Subject]:
    x = torch.randn((1, 3, 5, 7) if size == "toy" else (1, 128, 256, 256), device=device)
    vectors = torch.rand(4, x.shape[1], device=device).add(0.5).unbind()

    def torch_form() -> Tensor:
        return torch.nn.functional.leaky_relu(torch.nn.functional.batch_norm(x, *vectors), 0.2)

    check(ops.normalise_activate(x, *vectors), torch_form())
    keys = {"op": "normalise_activate", "bytes": 2 * x.nbytes}
    yield Subject({**keys, "implementation": "lipfast"}, lambda: ops.normalise_activate(x, *vectors))
    yield Subject({**keys, "implementation": "torch"}, torch_form)


def batch_norms(size: str, device: torch.device) -> Iterator[Subject]:
    """BatchNorm in training with the activation behind it, there and back, at two sizes of the skip net."""
    for pixels in (6, 7) if size == "toy" else (32, 256):
        x, dy = torch.randn(2, 1, 3 if size == "toy" else 128, pixels, pixels, device=device).unbind()
        parts = [x.requires_grad_(), *torch.rand(2, x.shape[1], device=device).add(0.5).unbind()]
        running = torch.rand(2, x.shape[1], device=device).unbind()

        def ours(x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor] = running) -> Tensor:
            return batch_norm_activate(x, *running, weight, bias, 0.1, 1e-5, 0.2)

        def plain(x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor] = running) -> Tensor:
            normal = torch.nn.functional.batch_norm(x, *running, weight, bias, True, 0.1, 1e-5)
            return torch.nn.functional.leaky_relu(normal, 0.2)

        keys = {"op": "batch_norm_activate", "pixels": pixels, "bytes": 5 * x.nbytes}
        yield from there_and_back(keys, ours, plain, parts, dy)


def enlargements(size: str, device: torch.device) -> Iterator[Subject]:
    """Bilinear upsampling by 2, there and back, at two sizes of the skip net."""
    for pixels in (3, 4) if size == "toy" else (16, 128):
        x = torch.randn(1, 3 if size == "toy" else 128, pixels, pixels, device=device, requires_grad=True)
        dy = torch.randn(*x.shape[:2], 2 * pixels, 2 * pixels, device=device)

        def ours(x: Tensor, size: torch.Size = dy.shape[2:]) -> Tensor:
            return ops.upsample_bilinear(x, size, scales=(2.0, 2.0))

        plain = functools.partial(torch.nn.functional.interpolate, scale_factor=2.0, mode="bilinear")
        keys = {"op": "upsample_bilinear", "pixels": 2 * pixels, "bytes": 2 * (x.nbytes + dy.nbytes)}
        yield from there_and_back(keys, ours, plain, [x], dy)


def there_and_back(
    keys: dict[str, object],
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    parts: list[Tensor],
    dy: Tensor,
) -> Iterator[Subject]:
    """Forward and backward pass of both forms of a function of ``parts``, of which the first wants a gradient."""

    def both_ways(form: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y = form(*parts)
        return y.detach(), *torch.autograd.grad(y, parts[0], dy)

    for mine, theirs in zip(both_ways(ours), both_ways(plain), strict=True):
        check(mine, theirs)
    for name, form in {"lipfast": ours, "torch": plain}.items():
        yield Subject({**keys, "implementation": name}, functools.partial(both_ways, form))


def pruning_rounds(size: str, device: torch.device) -> Iterator[Subject]:
    """Select, prune, rewind and pack over all tensors of the skip net, as in round 5 of a search."""
    shapes = [(5, 3, 3, 3), (7, 5, 1, 1)] if size == "toy" else select.skip_net_shapes()
    start, trained, network = ([part.to(device) for part in select.draw(shapes, seed)] for seed in (0, 1, 2))
    alive = [torch.rand(shape, device=device) < (1 - select.PRUNE_FRACTION) ** 4 for shape in shapes]
    trained = [weight * mask for weight, mask in zip(trained, alive, strict=True)]
    living, total = sum(int(mask.sum()) for mask in alive), sum(mask.numel() for mask in alive)
    count = round(select.PRUNE_FRACTION * living)
    select.check(trained, alive, start, count)
    ours = functools.partial(ops.prune_rewind_pack, trained, alive, start, count, into=network)
    keys = {"op": "prune_rewind_pack", "density": (living - count) / total}
    yield Subject({**keys, "implementation": "lipfast"}, ours, captured=False, calls=STEPS_A_SAMPLE)
    theirs = select.torch_round(trained, start, total - living + count)
    yield Subject({**keys, "implementation": "torch.nn.utils.prune"}, theirs, captured=False, calls=STEPS_A_SAMPLE)


def training_steps(size: str, pixels: int, precision: str, device: torch.device) -> Iterator[Subject]:
    """One step of the skip net, dense and with random masks, and masked in torch."""
    kinds: list[tuple[str, Callable[..., Trainer], float]] = [
        *(("lipfast", OperatorTrainer, density) for density in (1.0, *DENSITIES)),
        ("torch", TorchTrainer, 0.1),
    ]
    if device.type == "cuda":
        kinds.append(("torch graphs", GraphTrainer, 0.1))
    for name, make, density in kinds:
        torch.manual_seed(0)
        module = priors.build("skip", TOY_NETWORK if size == "toy" else {}, 0).to(device)
        weights = {} if density == 1 else {n: p for n, p in module.named_parameters() if p.dim() == 4}
        masks = {name: torch.rand(weight.shape, device=device) < density for name, weight in weights.items()}
        trainer = make(module, masks, lr=0.01)
        z = torch.rand(priors.as_prior(module).input_shape(pixels, pixels), device=device)

        def step(trainer: Trainer = trainer, z: Tensor = z) -> object:
            with reference.convolving_in(precision, device):
                return trainer.step(z, lambda y: (y - 0.5).square().mean())

        keys = {"pixels": pixels, "precision": precision, "density": density, "implementation": name}
        yield Subject(keys, step, captured=False, calls=STEPS_A_SAMPLE)


def groups(size: str, device: torch.device) -> Iterator[tuple[str, Iterator[Subject]]]:
    """(kind, subjects to time in turn)."""
    yield "ceiling", ceilings(device)
    for layer in SIZES[size]:
        yield "conv", convolutions(layer, device)
    for flat in (optimiser_steps, mask_applications, normalisations, batch_norms, enlargements, pruning_rounds):
        yield "flat", flat(size, device)
    for pixels in STEP_PIXELS[size]:
        for precision in ("ieee", "tf32"):
            yield "step", training_steps(size, pixels, precision, device)


def measure(size: str, device: torch.device, rounds: int, only: str, commit: str) -> Iterator[dict[str, object]]:
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {"lipfast": lipfast.__version__, "torch": torch.__version__, "cuda": torch.version.cuda},
        "commit": commit,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    for kind, subjects in groups(size, device):
        if only not in kind:
            continue
        group = list(subjects)
        for subject in group:
            subject.prepare(device)
        turns = [[subject.sample(device) * 1e6 for subject in group] for _ in range(rounds)]
        for subject, times in zip(group, zip(*turns, strict=True), strict=True):
            p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
            spread = {"p20": p20, "median": statistics.median(times), "p80": p80}
            yield {"kind": kind, **subject.keys, "microseconds": spread, **about}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    parser.add_argument("--deterministic", action="store_true", help="torch's switch for equal bits")
    parser.add_argument("--commit", default=harness.commit(), help="what rows name where there is no checkout")
    arguments = parser.parse_args()
    if arguments.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic, torch.utils.deterministic.fill_uninitialized_memory = True, False
    torch.backends.cudnn.benchmark = True  # the fastest of torch's convolutions for each layer
    torch.backends.cudnn.allow_tf32 = False  # references are exact; baselines say what they use
    partial = arguments.output.with_suffix(".partial")
    with partial.open("w") as file:
        what = arguments.size, torch.device(arguments.device), arguments.rounds, arguments.only, arguments.commit
        for row in measure(*what):
            print(json.dumps(row), file=file, flush=True)
    partial.replace(arguments.output)


if __name__ == "__main__":
    main()
