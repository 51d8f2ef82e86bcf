"""A whole search in lanes against the same search with torch's trainer, a round of each in turn.

Both are `lipfast.search`: same picture, steps, rounds, pruning and files; only the engine differs. torch runs eager in
the memory format that is its fastest on this CPU. A round is everything from the ticket to the next: planning, the fit
with its PSNR in every step, pruning, saving. Few steps a fit count planning and files more than a real search does.
"""

import functools
import shutil
import statistics
import tempfile
import time
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipfast import demo, tasks
from lipfast.bench.harness import Case, Measured, Size
from lipfast.bench.step import TOY
from lipfast.engine.trainer import fastest_format
from lipfast.fit import FitConfig
from lipfast.search import SearchConfig
from lipfast.search.imp import rounds

ROUNDS = 16  # of pruning, and the dense fit before them
SIDE = 128  # px
STEPS = 50  # of every fit
WARM_UP_STEPS = 2
TASK = tasks.Denoise(sigma=25)
TORCH = "contiguous" if fastest_format(torch.nn.Identity()) == torch.contiguous_format else "channels_last"
ENGINES = {"": "auto", TORCH: "torch"}
# dB between the two in a round; their mean over n rounds may be 1 / sqrt(n) of it. They differ by rounding alone, but
# the first steps of Adam enlarge that: single rounds of so few steps come out up to 2 dB apart, either way.
PSNR_TOLERANCE = 3.0

Rounds = Generator[dict[str, Any], None, Any]


def cases(size: Size) -> list[Case]:
    """A case for each round and one for their sum."""
    side, config, steps = SIDE, SearchConfig(rounds=ROUNDS), STEPS
    if size == "toy":
        side = 32
        config = SearchConfig(rounds=2, network=TOY)
        steps = 3
    race = _Race(demo.picture(demo.SEARCHED, side), config, steps)
    turns = [
        Case(
            op="search_round",
            name=f"round {number:02d}",
            shape=race.shape,
            density=(1 - config.prune) ** number,
            setup=functools.partial(race.round, number),
        )
        for number in range(config.rounds + 1)
    ]
    total = f"all {config.rounds + 1} fits"
    return [*turns, Case(op="search", name=total, shape=race.shape, density=1.0, setup=race.total)]


class _Race:
    """Both searches, advanced round by round as far as somebody asks."""

    def __init__(self, picture: Tensor, config: SearchConfig, steps: int) -> None:
        self.picture, self.config, self.steps = picture, config, steps
        self.shape = f"{picture.shape[-2]} x {picture.shape[-1]} px, {steps} steps a fit"
        self.seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
        self.searches: dict[str, Rounds] = {}
        self.psnr_apart: list[float] = []

    def round(self, number: int) -> Measured:
        """The seconds of one round."""
        while len(self.seconds[""]) <= number:
            self._advance()
        return _measured({name: seconds[number] for name, seconds in self.seconds.items()})

    def total(self) -> Measured:
        """The seconds of all rounds."""
        self.round(self.config.rounds)
        return _measured({name: sum(seconds) for name, seconds in self.seconds.items()})

    def _advance(self) -> None:
        """One round of each search; who is first alternates."""
        if not self.searches:
            folder = Path(tempfile.mkdtemp(prefix="lipfast-bench-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            for engine in ENGINES.values():  # torch compiles its kernels in the first steps of a process
                next(self._start(engine, folder, WARM_UP_STEPS))
            self.searches = {name: self._start(engine, folder, self.steps) for name, engine in ENGINES.items()}
        rows = {}
        order = list(ENGINES)
        for name in order if len(self.seconds[""]) % 2 else reversed(order):
            started = time.perf_counter()
            rows[name] = next(self.searches[name])
            self.seconds[name].append(time.perf_counter() - started)
        self._check(rows[""], rows[TORCH])

    def _check(self, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
        assert mine["kept"] == theirs["kept"], f"{mine['kept']} weights kept, torch's search kept {theirs['kept']}"
        ours, torchs = (row["ticket"]["last"]["psnr"] for row in (mine, theirs))
        self.psnr_apart.append(ours - torchs)
        apart, number = statistics.mean(self.psnr_apart), len(self.psnr_apart)
        assert abs(apart) < PSNR_TOLERANCE / number**0.5, f"{apart:+.2f} dB from torch's search in {number} rounds"

    def _start(self, engine: str, folder: Path, steps: int) -> Rounds:
        settings = FitConfig.for_task(TASK, iterations=steps, average=demo.AVERAGE)
        picture = (demo.SEARCHED, self.picture)
        return rounds(picture, TASK, config=self.config, fit_config=settings, out=folder, engine=engine)


def _measured(seconds: dict[str, float]) -> Measured:
    return Measured(samples={name: [value] for name, value in seconds.items()}, backend="cpu")
