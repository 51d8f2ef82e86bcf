"""The same measurements through pytest-benchmark: ``pytest -o python_functions=bench benchmarks/bench_families.py``.

Each case is checked, then lipfast and each of its baselines is one benchmark; they are grouped by case.
``LIPFAST_BENCH_SIZE=toy`` takes tiny shapes. The numbers to quote come from ``lipfast bench``, which interleaves.
"""

import os

import pytest

from lipfast.bench import families

SIZE = os.environ.get("LIPFAST_BENCH_SIZE", "full")
REPEATABLE = [family for family in families.FAMILIES if family not in families.MEASURE_THEMSELVES]
CASES = [(family, case) for family in REPEATABLE for case in families.cases(family, SIZE)]


@pytest.mark.parametrize(("family", "case"), CASES, ids=[f"{family}: {case.name}" for family, case in CASES])
@pytest.mark.parametrize("who", ["lipfast", "baseline"])
def bench(benchmark, family, case, who):
    timed = case.setup()
    if timed.reset:
        timed.reset()
    timed.check()
    function = timed.ours if who == "lipfast" else next(iter(timed.baselines.values()))
    benchmark.group = f"{family}: {case.name}"
    benchmark.extra_info.update(shape=case.shape, density=case.density, backend=timed.backend)
    benchmark.pedantic(function, setup=timed.reset, rounds=5, warmup_rounds=1)
