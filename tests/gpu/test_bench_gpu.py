"""The GPU benchmark runs from end to end where there is no GPU; it then times the dense baselines only."""

import json
import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/bench_gpu.py"


def test_writes_a_row_for_each_measurement(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", str(output), "--device", "cpu", "--size", "toy", "--rounds", "3"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    seen = {(row["density"], row["direction"], row["implementation"]) for row in rows}
    assert len(seen) == len(rows) == 5 * 3 * 3 + 2
    assert {row["implementation"] for row in rows if row["direction"] == "step"} == {"lipfast", "torch"}
    assert {row["rule"] for row in rows if row["direction"] != "step"} == {"dense"}  # a CPU has no GPU backend
    assert all(0 < row["microseconds"]["p20"] <= row["microseconds"]["p80"] for row in rows)
    assert "triton runs on cuda" in capsys.readouterr().out
