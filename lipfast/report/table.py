"""A search's rounds as a table, and in words what it shows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
STOPS = ("last", "stopped", "oracle")
STOP_NAMES = {"last": "last step", "stopped": "automatic stop", "oracle": "oracle stop"}


def psnr(row: Row, who: str, stop: str) -> float | None:
    """PSNR in dB of ``who`` ("ticket" or "random") in a row; None where it was not measured."""
    measured = row.get(who) or {}
    return (measured.get(stop) or {}).get("psnr")


def decibels(value: float | None) -> str:
    """Two decimals, or a dash where nothing was measured."""
    return "-" if value is None else f"{value:.2f}"


def cells(rows: Sequence[Row], stop: str) -> list[list[str]]:
    """One list a round: round, sparsity, PSNR of dense, ticket and random mask, seconds, bytes."""
    dense = psnr(rows[0], "ticket", stop)
    return [
        [
            str(row["round"]),
            f"{100 * row['sparsity']:.2f} %",
            decibels(dense),
            decibels(psnr(row, "ticket", stop)),
            decibels(psnr(row, "random", stop)),
            f"{row['seconds']:.1f}",
            f"{row['bytes']:,}" if row["bytes"] else "-",
        ]
        for row in rows
    ]


HEADER = ["round", "sparsity", "dense dB", "ticket dB", "random dB", "seconds", "bytes"]


def markdown(rows: Sequence[Row]) -> str:
    """One table for each stop that was measured, each followed by what it says."""
    parts = []
    for stop in STOPS:
        if all(psnr(row, "ticket", stop) is None for row in rows):
            continue
        lines = ["| " + " | ".join(HEADER) + " |", "|" + "---:|" * len(HEADER)]
        lines += ["| " + " | ".join(line) + " |" for line in cells(rows, stop)]
        parts.append(f"### PSNR at the {STOP_NAMES[stop]}\n\n" + "\n".join(lines) + f"\n\n{verdict(rows, stop)}\n")
    return "\n".join(parts) or "No clean picture, so no PSNR.\n"


def verdict(rows: Sequence[Row], stop: str) -> str:
    """In words: in how many rounds tickets beat the dense network and random masks, and by how much."""
    dense = psnr(rows[0], "ticket", stop)
    against_dense = [
        (value - dense, row)
        for row in rows[1:]
        if dense is not None and (value := psnr(row, "ticket", stop)) is not None
    ]
    against_random = [
        (ticket - random, row)
        for row in rows[1:]
        if (ticket := psnr(row, "ticket", stop)) is not None and (random := psnr(row, "random", stop)) is not None
    ]
    sentences = [_compare("the dense network", against_dense), _compare("random masks", against_random)]
    said = "; ".join(filter(None, sentences)) or "no ticket was measured"
    return f"At the {STOP_NAMES[stop]}: {said}." + (_unfired(rows) if stop == "stopped" else "")


def _unfired(rows: Sequence[Row]) -> str:
    """A sentence on the fits in which the stop rule did not fire, if there are any."""
    fired = [row.get("stop_fired", {}).get(who, True) for row in rows for who in ("ticket", "random") if row.get(who)]
    if all(fired):
        return ""
    return (
        f" The rule fired in {sum(fired)} of {len(fired)} fits; in the others they ended before it could, and its "
        "figures are those of the least variance until then."
    )


def _compare(other: str, gains: Sequence[tuple[float, Row]]) -> str:
    gains = [(gain, row) for gain, row in gains if math.isfinite(gain)]
    if not gains:
        return ""
    won = sum(gain > 0 for gain, _ in gains)
    best, row = max(gains, key=lambda pair: pair[0])
    return (
        f"tickets beat {other} in {won} of {len(gains)} rounds compared, the best {best:+.2f} dB "
        f"at {100 * row['sparsity']:.1f} % sparsity"
    )
