"""The committed tables of compiled kernels: what each may need at most and must reach at least.

    python tests/gpu/tools/tables.py cuda LIBRARY.so      writes tests/gpu/tables/cuda.json
    python tests/gpu/tools/tables.py triton               writes tests/gpu/tables/triton.json

A test compares fresh compilations with them, so a change of a kernel that costs registers, spills or ceiling shows up
in review as a change of these files. docs/gpu.md is written from them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parents[1] / "tables"
ROOT = Path(__file__).parents[3]
Row = Mapping[str, Any]

AT_MOST = ("registers", "spills", "shared", "narrow", "atomics", "entry_instructions", "branches")
AT_LEAST = ("ceiling", "occupancy", "wide", "tensor_core")
SLACK = 0.005  # of a rounded figure


def read(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((TABLES / f"{name}.json").read_text())
    return rows


def write(name: str, rows: Iterable[Row]) -> None:
    text = ",\n".join(json.dumps(row) for row in rows)
    (TABLES / f"{name}.json").write_text(f"[\n{text}\n]\n")


def worse(rows: Iterable[Row], table: Iterable[Row]) -> list[str]:
    """Everything in which freshly compiled ``rows`` fall behind the committed ones; kernels must be the same."""
    fresh = {(row["kernel"], row["target"]): row for row in rows}
    known = {(row["kernel"], row["target"]): row for row in table}
    found = [f"{' '.join(key)}: not in the table" for key in fresh.keys() - known.keys()]
    found += [f"{' '.join(key)}: in the table, but not compiled" for key in known.keys() - fresh.keys()]
    for key in fresh.keys() & known.keys():
        for name, limit in known[key].items():
            got = fresh[key].get(name)
            if name in AT_MOST and (got is None or got > limit + SLACK):
                found.append(f"{' '.join(key)}: {name} {got}, at most {limit} in the table")
            if name in AT_LEAST and (got is None or got < limit - SLACK):
                found.append(f"{' '.join(key)}: {name} {got}, at least {limit} in the table")
    return sorted(found)


def compile_triton() -> list[dict[str, Any]]:
    """Compile all Triton kernels in a fresh process, where they are not interpreted."""
    import os

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_aot.py"))],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    if sys.argv[1] == "triton":
        write("triton", compile_triton())
    else:
        import cuda_static

        write("cuda", cuda_static.describe_library(Path(sys.argv[2])))
