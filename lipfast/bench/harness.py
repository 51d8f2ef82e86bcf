"""How lipfast times: interleaved with the baseline, medians with percentiles, ceilings of the same run, provenance.

A benchmark is a list of `Case`. Each case is set up, its answer is checked against its baseline or reference, then
lipfast and the baselines are called in turn, so that a drifting clock or a busy neighbour hits all of them alike. A
ratio is taken within each turn; what is reported is the median over turns with the 20th and 80th percentile.
"""

import dataclasses
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import torch

import lipfast
import lipfast._C as _C
from lipfast.errors import InputError

Size = Literal["toy", "full"]  # toy: every path in a second, for tests; its figures mean nothing

# glibc gives large buffers back to the system, so eager torch page-faults its outputs in every call and looks up to
# 1.7x slower than it is. With these it keeps them: the honest baseline.
KEEP_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}

WARM_UP_CALLS = 2
FEWEST_TURNS = 5
MOST_TURNS = 1000
SETTLE_SECONDS = 10e-3  # untimed calls before a sample
LONG_CALL = 0.5  # seconds; what lingers of the function before no longer shows
SHORTEST_SAMPLE = 2e-3  # seconds; shorter calls are repeated within a sample
CEILING_SECONDS = 0.1
ROUND_TRIP_SECONDS = 5e-3
LARGEST_COPY = 256 << 20  # bytes; beyond any cache


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What a case compares. Every function does the whole operation once.

    Attributes:
        ours: lipfast. Called many times; must give the same answer each time, with ``reset`` before it if given.
        baselines: name -> function; the first is the one that the bars in the docs speak of.
        check: raises AssertionError when ``ours`` is wrong. Runs before any timing.
        backend: the implementation that ``ours`` runs, as the seam picked it.
        flops: useful floating-point operations of one call of ``ours``; 0 where that is not what bounds it.
        bytes: bytes that one call of ``ours`` must read and write at least; 0 likewise.
        reset: restores what the functions change; not timed. Then each sample is a single call.
    """

    ours: Callable[[], object]
    baselines: Mapping[str, Callable[[], object]]
    check: Callable[[], None]
    backend: str
    flops: float = 0.0
    bytes: float = 0.0
    reset: Callable[[], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a case measured itself, where calling it again and again would not do.

    Attributes:
        samples: name -> seconds of each turn; ``""`` is lipfast, the others are baselines.
        backend: as in `Timed`.
        peak_bytes: name -> most resident memory above what the process had before; {} where that was not measured.
    """

    samples: Mapping[str, list[float]]
    backend: str
    peak_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to time. ``setup`` makes the data, so a list of cases costs nothing."""

    op: str
    name: str
    shape: str
    density: float
    setup: Callable[[], Timed | Measured]
    dtype: str = "float32"


@dataclass(frozen=True)
class Spread:
    """Median with 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> "Spread":
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[3])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement: lipfast against one baseline. Version and commit are part of what it says."""

    op: str
    case: str
    shape: str
    density: float
    dtype: str
    backend: str
    baseline: str
    seconds: Spread
    baseline_seconds: Spread
    speedup: Spread  # baseline time / our time, within each turn
    turns: int
    flops_per_second: float
    fma_peak: float  # floating-point operations a second at most, measured in this run
    bytes_per_second: float
    copy_peak: float  # bytes a second of the fastest copy that moves as much, measured in this run
    core_round_trip: float  # seconds of a cache line from core to core and back, right after the case; 0: one thread
    peak_bytes: int  # most resident memory above what the process had before; 0 where not measured
    baseline_peak_bytes: int
    threads: int
    isa: str
    device: str
    cpu: str
    malloc: str  # keep: buffers stay mapped (see KEEP_MALLOC); raw: as the system does it
    versions: dict[str, str]
    commit: str
    utc: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))

    @property
    def share_of_ceiling(self) -> float:
        """Share of the ceiling that bounds the case: arithmetic where it counts some, else bandwidth. 0 if neither."""
        if self.flops_per_second:
            return self.flops_per_second / self.fma_peak
        return self.bytes_per_second / self.copy_peak if self.bytes_per_second else 0.0

    def json_line(self) -> str:
        """The row on one line."""
        return json.dumps({**dataclasses.asdict(self), "share_of_ceiling": self.share_of_ceiling})


def measure(cases: Iterable[Case], *, seconds: float = 2.0) -> Iterator[Row]:
    """Check and time each case for about ``seconds``; one row for each of its baselines.

    Threads are torch's (``torch.set_num_threads``), the instruction set is the active one (``LIPFAST_ISA``).

    Raises:
        AssertionError: an answer is wrong; nothing is timed then.
        InputError: ``seconds`` is not positive.
    """
    if seconds <= 0:
        raise InputError(f"bench: seconds must be positive, got {seconds}")
    for case in cases:
        made = case.setup()
        if isinstance(made, Measured):
            for baseline in [name for name in made.samples if name]:
                yield _row(case, made, baseline)
            continue
        if made.reset:
            made.reset()
        made.check()
        samples = _interleave({"": made.ours, **made.baselines}, made.reset, seconds)
        for baseline in made.baselines:
            measured = Measured(samples=samples, backend=made.backend)
            yield _row(case, measured, baseline, flops=made.flops, moved=made.bytes)


def _interleave(
    functions: Mapping[str, Callable[[], object]], reset: Callable[[], None] | None, seconds: float
) -> dict[str, list[float]]:
    """Seconds per call of each function, one sample of each in every turn."""
    repeats, settles = {}, {}
    for name, function in functions.items():
        once = min(_sample(function, reset, 1, False) for _ in range(WARM_UP_CALLS))
        repeats[name] = 1 if reset else max(1, round(SHORTEST_SAMPLE / once))
        settles[name] = once < LONG_CALL
    samples: dict[str, list[float]] = {name: [] for name in functions}
    start, turn, order = time.perf_counter(), 0, list(functions)
    while turn < FEWEST_TURNS or (turn < MOST_TURNS and time.perf_counter() - start < seconds):
        for name in order:
            samples[name].append(_sample(functions[name], reset, repeats[name], settles[name]))
        order.append(order.pop(0))  # nobody always follows the same neighbour
        turn += 1
    return samples


def _sample(function: Callable[[], object], reset: Callable[[], None] | None, repeats: int, settle: bool) -> float:
    if reset:
        reset()
    elif settle:
        # Warm caches, and outlast the other's worker threads: torch's go on spinning on their core for milliseconds.
        settled = time.perf_counter() + SETTLE_SECONDS
        while time.perf_counter() < settled:
            function()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def _row(case: Case, measured: Measured, baseline: str, *, flops: float = 0.0, moved: float = 0.0) -> Row:
    ours, theirs = measured.samples[""], measured.samples[baseline]
    seconds = Spread.of(ours)
    threads = torch.get_num_threads()
    isa = _C.isa()
    return Row(
        op=case.op,
        case=case.name,
        shape=case.shape,
        density=case.density,
        dtype=case.dtype,
        backend=measured.backend,
        baseline=baseline,
        seconds=seconds,
        baseline_seconds=Spread.of(theirs),
        speedup=Spread.of([their / our for our, their in zip(ours, theirs, strict=True)]),
        turns=len(ours),
        flops_per_second=flops / seconds.median,
        fma_peak=fma_peak(threads, isa),
        bytes_per_second=moved / seconds.median,
        copy_peak=copy_peak(min(max(int(moved / 2), 1 << 16), LARGEST_COPY), threads),
        core_round_trip=core_round_trip(threads),
        peak_bytes=measured.peak_bytes.get("", 0),
        baseline_peak_bytes=measured.peak_bytes.get(baseline, 0),
        threads=threads,
        isa=isa,
        device="cpu",
        cpu=cpu_name(),
        malloc="keep" if keeps_malloc() else "raw",
        versions={"lipfast": lipfast.__version__, "torch": torch.__version__, "python": platform.python_version()},
        commit=commit(),
    )


@functools.cache
def fma_peak(threads: int, isa: str) -> float:
    """Floating-point operations a second in registers. ``isa`` is the active one; it keys the cache."""
    return _C.fma_peak(threads, CEILING_SECONDS)


@functools.cache
def copy_peak(block_bytes: int, threads: int) -> float:
    """Bytes read plus bytes written a second by the fastest copy of a block of this size."""
    return _C.copy_bandwidth(block_bytes, threads, CEILING_SECONDS)


def core_round_trip(threads: int) -> float:
    """Seconds of a cache line from core to core and back, now: virtual cores move. 0 for one thread."""
    return _C.core_round_trip(ROUND_TRIP_SECONDS) if threads > 1 else 0.0


@functools.cache
def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def commit() -> str:
    """The checkout's commit, ``-dirty`` when files differ from it; empty for an installed package."""
    root = Path(lipfast.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=False)
    except OSError:  # no git here
        return ""
    return found.stdout.strip()


def keeps_malloc() -> bool:
    """Whether this process was started with KEEP_MALLOC."""
    return all(os.environ.get(name) == value for name, value in KEEP_MALLOC.items())


def become_one_that_keeps_malloc(arguments: list[str]) -> NoReturn:
    """Go on as ``lipfast bench`` with these arguments: malloc reads its settings only when a program starts."""
    command = [sys.executable, "-m", "lipfast", "bench", *arguments]
    sys.stdout.flush()
    os.execve(sys.executable, command, {**os.environ, **KEEP_MALLOC})
