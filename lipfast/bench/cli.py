"""``lipfast bench FAMILY``: times lipfast against torch on this machine."""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from lipfast.bench import families

if TYPE_CHECKING:  # torch and rich load inside the commands, so that --help is quick
    from rich.table import Table

    from lipfast.bench.harness import Row, Size

app = typer.Typer(
    no_args_is_help=True,
    help="Time lipfast against torch on this machine. Every answer is checked before it is timed.\n\n"
    "Example: lipfast bench select --json",
)

WIDTH = 160  # of a table that goes to a file

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line instead of a table.")]
Threads = Annotated[int, typer.Option(min=0, max=os.cpu_count(), help="Threads; 0 for torch's own choice.")]
Seconds = Annotated[float, typer.Option(min=0.001, help="Time spent on each case.")]
Only = Annotated[str, typer.Option(help="Run the cases whose name contains this.")]
Toy = Annotated[bool, typer.Option("--toy", help="Tiny shapes: shows that all is well, not how fast it is.")]
Raw = Annotated[bool, typer.Option("--raw", help="Leave malloc as the system has it; torch looks slower then.")]


@app.callback()
def _family() -> None:
    """Makes every family a sub-command, even when there is only one."""


def run(
    family: str,
    *,
    json_lines: bool,
    threads: int,
    seconds: float,
    only: str,
    size: "Size",
) -> "list[Row]":
    """Measure a family in this process and print it, row by row as JSON or at the end as a table."""
    import torch
    from rich.console import Console

    from lipfast.bench import harness
    from lipfast.fit import check_instruction_set

    check_instruction_set()
    if threads:
        torch.set_num_threads(threads)
    rows = []
    for row in harness.measure((c for c in families.cases(family, size) if only in c.name), seconds=seconds):
        rows.append(row)
        if json_lines:
            print(row.json_line(), flush=True)
    if not rows:
        names = ", ".join(case.name for case in families.cases(family, size))
        raise typer.BadParameter(f"no case of {family} has {only!r} in its name; there are: {names}")
    if not json_lines:
        console = Console()
        console.width = console.width if console.is_terminal else WIDTH
        console.print(table(family, rows))
    return rows


def table(family: str, rows: "list[Row]") -> "Table":
    """The rows for people."""
    from rich.table import Table

    first = rows[0]
    peaks = f"FMA peak {first.fma_peak / 1e9:.0f} GFLOP/s, copy {first.copy_peak / 1e9:.0f} GB/s"
    if first.threads > 1:
        trips = [1e9 * row.core_round_trip for row in rows]
        peaks += f", core to core and back {min(trips):.0f} to {max(trips):.0f} ns"
    about = f"{first.cpu}, {first.isa}, {first.threads} threads, torch {first.versions['torch']}, malloc {first.malloc}"
    shown = Table(title=f"lipfast bench {family}", caption=f"{about}\n{peaks}; the speed-up is a median (20 % .. 80 %)")
    for heading in ("case", "shape", "density", "runs", "against"):
        shown.add_column(heading)
    for heading in ("lipfast", "baseline", "speed-up", "of ceiling"):
        shown.add_column(heading, justify="right")
    measured_memory = any(row.peak_bytes for row in rows)
    if measured_memory:
        shown.add_column("peak memory", justify="right")
    for row in rows:
        shown.add_row(
            row.case,
            row.shape,
            f"{row.density:.3g}",
            row.backend,
            row.baseline,
            _time(row.seconds.median),
            _time(row.baseline_seconds.median),
            f"{row.speedup.median:.2f}x ({row.speedup.p20:.2f} .. {row.speedup.p80:.2f})",
            f"{row.share_of_ceiling:.0%}" if row.share_of_ceiling else "",
            *([_memory(row)] if measured_memory else []),
        )
    return shown


def _memory(row: "Row") -> str:
    ours, theirs = row.peak_bytes, row.baseline_peak_bytes
    return f"{ours / 1e6:.0f} MB, {ours / theirs:.2f} of {theirs / 1e6:.0f}" if ours and theirs else ""


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.4g} ms"


def _command(family: str) -> Callable[..., None]:
    def command(
        json_lines: Json = False,
        threads: Threads = 0,
        seconds: Seconds = 2.0,
        only: Only = "",
        toy: Toy = False,
        raw: Raw = False,
    ) -> None:
        from lipfast.bench import harness

        if not raw and not harness.keeps_malloc():
            arguments = [family, "--threads", str(threads), "--seconds", str(seconds), "--only", only]
            harness.become_one_that_keeps_malloc(arguments + ["--json"] * json_lines + ["--toy"] * toy)
        run(
            family,
            json_lines=json_lines,
            threads=threads,
            seconds=seconds,
            only=only,
            size="toy" if toy else "full",
        )
        sys.stdout.flush()

    return command


for _name, (_module, _about) in families.FAMILIES.items():
    app.command(_name, help=f"{_about}\n\nExample: lipfast bench {_name} --threads 2 --json")(_command(_name))
