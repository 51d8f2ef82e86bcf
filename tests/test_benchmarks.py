"""Every benchmark runs at toy size and checks its own answer; the harness counts and checks as it says."""

import dataclasses
import functools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lipfast._C as _C
from lipfast import ops
from lipfast.bench import cli, families, harness, search, step
from lipfast.errors import InputError

ROOT = Path(__file__).parent.parent
step_profile = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/step_profile.py")))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_runs_and_checks_its_answer(family):
    cases = families.cases(family, "toy")
    rows = list(harness.measure(cases, seconds=0.001))
    assert {row.case for row in rows} == {case.name for case in cases}
    for row in rows:
        assert 0 < row.seconds.p20 <= row.seconds.median <= row.seconds.p80
        assert row.turns >= (1 if family in families.MEASURE_THEMSELVES else harness.FEWEST_TURNS)
        assert row.backend.split(":")[0] == "cpu"
        assert row.isa == _C.isa()
        assert row.threads == torch.get_num_threads()
        assert json.loads(row.json_line())["versions"]["torch"] == torch.__version__


def test_a_wrong_answer_stops_the_benchmark(monkeypatch):
    def forgets_a_step(values, *rest):
        pass

    monkeypatch.setattr(ops, "adam_step", forgets_a_step)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        next(harness.measure(families.cases("adam", "toy"), seconds=0.001))


def test_the_search_stops_where_the_two_searches_part(monkeypatch):
    whole = families.cases("search", "toy")[-1]
    rounds = search.rounds
    monkeypatch.setattr(search, "rounds", lambda *a, engine, **k: spoilt(rounds(*a, engine=engine, **k), engine))
    with pytest.raises(AssertionError, match="weights kept, torch's search kept"):
        whole.setup()


def spoilt(rows, engine):
    """The rows of a search; with torch, one weight is missing from the second on."""
    for row in rows:
        yield {**row, "kept": row["kept"] - (engine == "torch" and row["round"] > 0)}


def test_a_search_is_the_sum_of_its_rounds():
    rows = list(harness.measure(families.cases("search", "toy")))
    *turns, whole = rows
    assert [row.case for row in rows] == ["round 00", "round 01", "round 02", "all 3 fits"]
    assert whole.seconds.median == pytest.approx(sum(row.seconds.median for row in turns))
    assert whole.baseline_seconds.median == pytest.approx(sum(row.baseline_seconds.median for row in turns))


def fake_case(calls, **changes):
    timed = harness.Timed(
        ours=lambda: calls.append("ours"),
        baselines={"slow": lambda: calls.append("slow"), "other": lambda: calls.append("other")},
        check=lambda: calls.append("check"),
        backend="cpu",
        **changes,
    )
    return harness.Case(op="fake", name="fake", shape="-", density=1.0, setup=lambda: timed)


def test_reset_precedes_every_call_and_each_turn_calls_everyone_once():
    calls = []
    rows = list(harness.measure([fake_case(calls, reset=lambda: calls.append("reset"))], seconds=1e-9))
    assert [row.baseline for row in rows] == ["slow", "other"]
    assert calls[:2] == ["reset", "check"]
    assert calls[2::2] == ["reset"] * len(calls[2::2])
    timed = calls[3::2][3 * harness.WARM_UP_CALLS :]
    turns = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    assert len(turns) == harness.FEWEST_TURNS == rows[0].turns
    assert all(sorted(turn) == ["other", "ours", "slow"] for turn in turns)
    assert len({turn[0] for turn in turns}) == 3  # everyone goes first at times


def test_percentiles_and_ceilings():
    spread = harness.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (spread.p20, spread.median, spread.p80) == (2.0, 3.5, 5.0)
    (row, _) = harness.measure([fake_case([], flops=1000.0)], seconds=1e-9)
    assert row.flops_per_second == pytest.approx(1000.0 / row.seconds.median)
    assert row.share_of_ceiling == pytest.approx(row.flops_per_second / row.fma_peak)
    moves = dataclasses.replace(row, flops_per_second=0.0, bytes_per_second=3.0, copy_peak=6.0)
    assert moves.share_of_ceiling == 0.5


def test_seconds_must_be_positive():
    with pytest.raises(InputError, match="seconds must be positive, got 0"):
        next(harness.measure([], seconds=0))


@pytest.mark.parametrize("isa", _C.available_isas())
def test_fma_peak_counts_what_the_instruction_set_can_do(isa):
    before = _C.isa()
    _C.set_isa(isa)
    try:
        per_core = _C.fma_peak(1, 0.01)
    finally:
        _C.set_isa(before)
    assert 1e8 < per_core < 1e12  # an optimised-away loop would be far above, a forgotten one far below


def test_a_round_trip_between_cores_takes_some_time_and_only_rows_of_several_threads_have_it(request):
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        (row, _) = harness.measure([fake_case([])], seconds=1e-9)
        assert (row.core_round_trip > 1e-9) == (threads == 2)
        assert row.core_round_trip < 1
    with pytest.raises(ValueError, match="core_round_trip: seconds must be positive"):
        _C.core_round_trip(0)


def test_the_command_reruns_itself_with_malloc_that_keeps_its_buffers():
    run = [sys.executable, "-m", "lipfast", "bench", "adam", "--toy", "--seconds", "0.001", "--only", "100%", "--json"]
    clean = {name: value for name, value in os.environ.items() if name not in harness.KEEP_MALLOC}
    ran = subprocess.run(run, env=clean, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert [json.loads(line)["malloc"] for line in ran.stdout.splitlines()] == ["keep", "keep"]


def test_a_table_has_a_line_for_each_row(capsys):
    rows = cli.run("adam", json_lines=False, threads=0, seconds=0.001, only="50%", size="toy")
    shown = capsys.readouterr().out
    assert len(rows) == 2
    assert all(row.baseline in shown for row in rows)
    assert "FMA peak" in shown


def test_the_pytest_benchmarks_run():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--benchmark-disable",
        "-o",
        "python_functions=bench",
        "-k",
        "select",
    ]
    environment = {**os.environ, "LIPFAST_BENCH_SIZE": "toy"}
    done = subprocess.run(
        [*command, "benchmarks/bench_families.py"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "nonexistent"], "no case of adam has 'nonexistent' in its name; there are: "),
        (["--threads", "100000"], "Invalid value for '--threads'"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    command = [sys.executable, "-m", "lipfast", "bench", "adam", "--toy", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_the_profile_of_a_step_is_whole(capsys):
    rows = step_profile.profiled(step.TOY, 32, 0.89, steps=2)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    kinds = {"conv, forward", "conv, input gradient", "conv, weight gradient", "BatchNorm, backward", "conversions"}
    assert kinds | {step_profile.OUTSIDE} <= {row["operation"] for row in rows}
    step_profile.show(rows)
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(rows)


def test_the_profile_counts_kept_weights():
    network = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 1))
    mask = torch.zeros(3, 2, 3, 3, dtype=torch.bool)
    mask.view(-1)[:5] = True
    flops = step_profile.flops_of(network, {"0.weight": mask}, torch.zeros(1, 2, 4, 6))
    both, second = 2 * (5 + 12) * 24, 2 * 12 * 24
    assert flops == {"conv, forward": both, "conv, weight gradient": both, "conv, input gradient": second}
    assert step_profile.numbers_of("norm backward 3x4x6") == 3 * 4 * 6
