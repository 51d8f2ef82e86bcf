"""The GPU benchmark runs from end to end where there is no GPU; it then times the dense baselines only."""

import json
import runpy
import sys
from collections import Counter
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/bench_gpu.py"


def test_writes_a_row_for_each_measurement(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", str(output), "--device", "cpu", "--size", "toy", "--rounds", "3"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    kinds = Counter(row["kind"] for row in rows)
    assert kinds == {"ceiling": 4, "conv": 3 * 5, "flat": 17, "step": 2 * 7}  # no GPU: dense baselines only
    assert {row["implementation"] for row in rows if row["kind"] == "step"} == {"lipfast", "torch"}
    assert all(0 < row["microseconds"]["p20"] <= row["microseconds"]["p80"] for row in rows)
    assert "triton runs on cuda" in capsys.readouterr().out
