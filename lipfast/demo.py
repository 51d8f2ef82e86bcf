"""The demonstration: find tickets on one picture, restore a second one with them in a new process."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipfast import images, priors, search, tasks
from lipfast.config import derive_seed
from lipfast.errors import LipfastError
from lipfast.fit import FitConfig, fit
from lipfast.report import pictures

# Chosen for a minute on two cores: ten fits, and as far as the pictures come in that time.
ITERATIONS = 150  # of every fit
NETWORK = {"down": [64] * 5}  # half the paper's width: three times as many steps in the same time
SIZE = 96  # px
SIGMA = 25.0  # grey levels of 255
ROUNDS = 5
PRUNE = 0.36  # of the remaining: each round does two of the paper's at once, 1 - 0.8^2; 89.26 % sparsity in the end
CONTROLS = (5,)  # rounds compared with a random mask
AVERAGE = 0.9  # of outputs; the paper's 0.99 is for fits of thousands of steps
SEARCHED, RESTORED = "astronaut", "coffee"  # inside scikit-image, no download


@dataclass(frozen=True)
class Demo:
    """What the demonstration shows.

    Attributes:
        result: the search on the first picture.
        second: figures of the second picture: PSNR in dB of the noisy, dense and ticket versions; seconds.
        files: what was written, by what it is.
    """

    result: search.SearchResult
    second: dict[str, Any]
    files: dict[str, Path]


def run(out: Path, *, iterations: int = ITERATIONS, engine: str = "auto", watch: search.Watch | None = None) -> Demo:
    """Search, restore, and write tickets, panel and curve under ``out``. Run again, it continues.

    Raises:
        LipfastError: one line that says what failed.
    """
    task = tasks.Denoise(SIGMA)
    fit_config = FitConfig.for_task(task, iterations=iterations, average=AVERAGE)
    config = search.SearchConfig(rounds=ROUNDS, prune=PRUNE, controls=CONTROLS, network=NETWORK)
    result = search.search(
        (SEARCHED, picture(SEARCHED)), task, config=config, fit_config=fit_config, out=out, engine=engine, watch=watch
    )
    clean = picture(RESTORED)
    noisy = task.degrade(clean, torch.Generator().manual_seed(derive_seed(config.seed, "demo/second picture")))
    files = {"noisy": out / f"{RESTORED}-noisy.png", "clean": out / f"{RESTORED}-clean.png"}
    images.write(files["noisy"], noisy)
    images.write(files["clean"], clean)
    ticket = result.folder / f"ticket-{ROUNDS:02d}.safetensors"
    files["restored"] = out / f"{RESTORED}-restored.png"
    second = _restore_in_new_process(files, ticket, iterations, engine)
    network = priors.build(config.prior, dict(config.network), config.seed)
    dense = fit(network, task, images.read(files["noisy"]), config=fit_config, clean=clean, engine=engine).last
    second |= {"noisy_psnr": images.psnr(noisy, clean), "dense_psnr": dense.psnr}
    files |= {"panel": out / "panel.png", "curve": out / "curve.png", "tickets": result.folder}
    pictures.save_panel(
        files["panel"],
        [
            (f"noisy, {second['noisy_psnr']:.2f} dB", noisy),
            (f"dense network, {second['dense_psnr']:.2f} dB", dense.image),
            (
                f"ticket, {100 * result.rows[-1]['sparsity']:.1f} % zeros, {second['psnr']:.2f} dB",
                images.read(files["restored"]),
            ),
            ("clean", clean),
        ],
    )
    pictures.save_curve(
        files["curve"], result.rows, f"{SEARCHED}, {SIZE} px, noise {SIGMA:g}/255, {iterations} steps a fit"
    )
    return Demo(result, second, files)


def picture(name: str, side: int = SIZE) -> Tensor:
    """A colour picture from scikit-image (3, side, side) in [0, 1]."""
    import skimage.data

    pixels = torch.from_numpy(getattr(skimage.data, name)())  # (H, W, 3) uint8
    return images.shrink_to_square(pixels.permute(2, 0, 1).float() / 255, side)


def _restore_in_new_process(files: dict[str, Path], ticket: Path, iterations: int, engine: str) -> dict[str, Any]:
    """Nothing but files passes from the search to the restoration."""
    command = [sys.executable, "-m", "lipfast", "restore", str(files["noisy"]), "--ticket", str(ticket)]
    command += ["--iterations", str(iterations), "--average", str(AVERAGE), "--clean", str(files["clean"])]
    command += ["--engine", engine, "-o", str(files["restored"]), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LipfastError(f"demo: restoring in a new process failed: {done.stderr.strip()}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report
