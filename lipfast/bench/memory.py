"""Peak memory of training steps of the paper's network, in lanes and in torch, each in a process of its own.

What counts is the most resident memory from before the network is made to after the last step, above what the process
had with everything imported and one tiny step of the same kind done. The same processes time their steps; `step` times
better, with everybody in turn.
"""

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lipfast.bench.harness import Case, Measured, Size
from lipfast.bench.step import LAYER_DENSITIES, SIDES, TOY, pruned_fit
from lipfast.engine.lane_trainer import LaneTrainer
from lipfast.engine.trainer import TorchTrainer
from lipfast.errors import BackendError

STEPS = 4
TRAINERS: dict[str, Callable[..., LaneTrainer | TorchTrainer]] = {
    "": LaneTrainer,
    "channels_last": functools.partial(TorchTrainer, memory_format=torch.channels_last),
}
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def cases(size: Size) -> list[Case]:
    """One case for each picture size and sparsity."""
    if size == "toy":
        return [_case(TOY, 32, 0.89)]
    return [_case({}, side, sparsity) for side in SIDES for sparsity in (0.0, *LAYER_DENSITIES)]


def _case(config: dict[str, object], side: int, sparsity: float) -> Case:
    return Case(
        op="step_memory",
        name=f"{side} px, {sparsity:.0%} zeros",
        shape=f"skip net, {side} x {side} px",
        density=1 - sparsity,
        setup=functools.partial(_compare, config, side, sparsity),
    )


def _compare(config: dict[str, object], side: int, sparsity: float) -> Measured:
    found = {name: _in_a_process(name, config, side, sparsity) for name in TRAINERS}
    losses = {name: result["loss"] for name, result in found.items()}
    assert abs(losses[""] / losses["channels_last"] - 1) < 1e-3, f"first losses differ: {losses}"
    return Measured(
        samples={name: result["seconds"] for name, result in found.items()},
        backend="cpu",
        peak_bytes={name: result["peak_bytes"] for name, result in found.items()},
    )


def _in_a_process(name: str, *arguments: object) -> dict[str, Any]:
    """What `_steps` gives in a new process."""
    call = json.dumps([name, *arguments, torch.get_num_threads()])
    code = "import sys; from lipfast.bench import memory; memory.print_steps(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, call], capture_output=True, text=True)
    if done.returncode:
        raise BackendError(f"bench memory: the process that runs {name or 'lipfast'} failed: {done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def print_steps(call: str) -> None:
    """What the child process does."""
    name, config, side, sparsity, threads = json.loads(call)
    torch.set_num_threads(threads)
    _steps(name, TOY, 32, 0.89, steps=1)
    _CLEAR.write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    first, seconds = _steps(name, config, side, sparsity, steps=STEPS)
    peak = _status("VmHWM") - before
    print(json.dumps({"loss": first, "seconds": seconds, "peak_bytes": peak}))


def _steps(name: str, config: dict[str, object], side: int, sparsity: float, steps: int) -> tuple[float, list[float]]:
    """The first loss, and the seconds of each step but the first."""
    network, masks, z, target = pruned_fit(config, side, sparsity)
    trainer = TRAINERS[name](network, masks, lr=0.01)
    losses, times = [], []
    for _ in range(steps):
        started = time.perf_counter()
        losses.append(float(trainer.step(z, lambda output: nn.functional.mse_loss(output, target))[0]))
        times.append(time.perf_counter() - started)
    return losses[0], times[1:]


def _status(entry: str) -> int:
    """Bytes of one line of the kernel's account of this process."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024
